// Threads that wait give way to other programs.
//
// Unless it is told otherwise, libgomp lets a thread that waits for others spin for many milliseconds before
// it sleeps. Where another program works on the same cores, the thread that is waited for does not run
// meanwhile: with two busy loops beside two threads a quantization took 5.4 times as long as alone
// (scripts/busy_loops.sh). With a few thousand turns, about a tenth of a millisecond, it takes 2.0 times as
// long, and alone as long as before.
//
// libgomp reads that number from the environment when it is loaded, so the program has to be started again
// with it. Functions of .preinit_array run before the constructors of all libraries, which are most of what
// starting costs; the C library is not ready there, so that only system calls and static memory are used.

#include <unistd.h>

#include <cstddef>
#include <cstring>

namespace {

constexpr char kSpins[] = "GOMP_SPINCOUNT=";
constexpr size_t kMostVariables = 4096;

bool names(const char* entry, const char* variable) {
  return std::strncmp(entry, variable, std::strlen(variable)) == 0;
}

/// Returns when the user has chosen how threads wait, or the program cannot be started again.
void start_again_with_brief_waits(int /*argc*/, char** argv, char** environment) {
  static char setting[] = "GOMP_SPINCOUNT=3000";
  static char* variables[kMostVariables + 2];
  static char path[4096];
  size_t count = 0;
  for (char** entry = environment; *entry != nullptr; ++entry) {
    if (count == kMostVariables || names(*entry, kSpins) || names(*entry, "OMP_WAIT_POLICY=")) return;
    variables[count++] = *entry;
  }
  variables[count++] = setting;
  variables[count] = nullptr;
  // By its real path: a process started from /proc/self/exe is shown as "exe".
  const ssize_t length = ::readlink("/proc/self/exe", path, sizeof path - 1);
  if (length <= 0 || length == sizeof path - 1) return;
  path[length] = '\0';
  ::execve(path, argv, variables);
}

using Constructor = void (*)(int, char**, char**);
[[gnu::section(".preinit_array"), gnu::used]] const Constructor kStartAgain = start_again_with_brief_waits;

}  // namespace

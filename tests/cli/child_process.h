#pragma once
// The real program in a process of its own.

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "support/files.h"
#include "support/scratch_directory.h"

namespace stbllm::test {

inline std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

/// What a process left behind.
struct Outcome {
  int status;  ///< exit status, or -signal when a signal ended it
  std::string out, err;
};

class ChildProcess {
 public:
  /// Starts `STBLLM_BINARY args...`. With `largest_file` above 0 a write beyond so many bytes of a file
  /// fails, as on a disk that is full. `environment` is added to this process's own.
  explicit ChildProcess(const std::vector<std::string>& args, int64_t largest_file = 0,
                        const std::map<std::string, std::string>& environment = {}) {
    std::vector<char*> argv = {const_cast<char*>(STBLLM_BINARY)};
    for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
    argv.push_back(nullptr);
    const std::string out = (scratch_ / "out").string(), err = (scratch_ / "err").string();
    pid_ = ::fork();
    if (pid_ != 0) return;
    redirect(out, STDOUT_FILENO);
    redirect(err, STDERR_FILENO);
    ::setenv("OMP_WAIT_POLICY", "passive", 1);  // tests run side by side
    for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
    ::signal(SIGINT, SIG_DFL);
    if (largest_file > 0) {
      ::signal(SIGXFSZ, SIG_IGN);  // write() then fails with EFBIG
      const rlimit limit = {static_cast<rlim_t>(largest_file), static_cast<rlim_t>(largest_file)};
      ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    ::execv(STBLLM_BINARY, argv.data());
    ::_exit(127);
  }
  ~ChildProcess() {
    if (pid_ <= 0) return;
    send(SIGKILL);
    wait();
  }
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  void send(int signal) const { ::kill(pid_, signal); }

  /// Waits for `path` to appear; false when the process ended before.
  bool appears(const std::filesystem::path& path) const {
    while (!std::filesystem::exists(path)) {
      siginfo_t info{};
      ::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT);
      if (info.si_pid == pid_) return false;
      ::usleep(500);
    }
    return true;
  }

  Outcome wait() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = 0;
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), read_all(scratch_ / "out"),
            read_all(scratch_ / "err")};
  }

 private:
  static void redirect(const std::string& path, int target) {
    const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    ::dup2(fd, target);
    ::close(fd);
  }

  ScratchDirectory scratch_;
  pid_t pid_ = 0;
};

inline Outcome run_program(const std::vector<std::string>& args, int64_t largest_file = 0) {
  return ChildProcess(args, largest_file).wait();
}

/// Standard output of a command of /bin/sh.
inline std::string output_of(const std::string& command) {
  std::string output;
  std::FILE* pipe = ::popen(command.c_str(), "r");
  for (int c; (c = std::fgetc(pipe)) != EOF;) output += static_cast<char>(c);
  ::pclose(pipe);
  return output;
}

}  // namespace stbllm::test

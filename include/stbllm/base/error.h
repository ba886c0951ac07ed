#pragma once
// Errors. Libraries throw Error and never print, abort or exit; the command line turns one into a
// single line on stderr and the code into the exit status.

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace stbllm {

/// What went wrong, as a process exit status. 1 is left to unexpected faults (a bug, an exception of a
/// library).
enum class ErrorCode : int {
  kUsage = 2,          ///< command line or recipe: unknown option, value out of range
  kNotFound = 3,       ///< a path that does not exist or cannot be read
  kCorrupt = 4,        ///< a file that is damaged: truncated, bad header, wrong checksum
  kMismatch = 5,       ///< parts that do not fit together: missing tensor, wrong shape, wrong fingerprint
  kUnsupported = 6,    ///< a model, option or format this program does not implement
  kTooLittleText = 7,  ///< a text too short for the windows asked for
  kExists = 8,         ///< the output is there already and --force was not given
  kWriteFailed = 9,    ///< disk full, no permission
  kVerifyFailed = 10,  ///< the packed file does not reproduce the quantizer's result
  kOutOfMemory = 11,   ///< the machine or a limit has no more memory to give
  kInterrupted = 130,  ///< Ctrl-C, or another process of a group is gone
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

/// Throws Error. One sentence: object, expected, found, what to do.
template <typename... Args>
[[noreturn]] void fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace stbllm

/// An invariant of this program (not of its input): a failure is a bug, reported with file, line and values.
#define STBLLM_CHECK(condition, ...)                                                                    \
  do {                                                                                                  \
    if (!(condition))                                                                                   \
      throw std::logic_error(fmt::format("{}:{}: check failed: {}: {}", __FILE__, __LINE__, #condition, \
                                         fmt::format(__VA_ARGS__)));                                    \
  } while (false)

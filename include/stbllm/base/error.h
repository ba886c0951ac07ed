#pragma once
// How failures are reported. Libraries throw Error and never print, abort or exit. The command line writes
// the message as one line to stderr, and the code is its exit status.

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace stbllm {

/// What went wrong, as an exit status. 1 is left to faults that nobody expected: a bug, or an exception that
/// a library throws.
enum class ErrorCode : int {
  kUsage = 2,          ///< the command line or a recipe has an unknown option or a value out of range
  kNotFound = 3,       ///< a path does not exist or cannot be read
  kCorrupt = 4,        ///< a file is damaged: truncated, with a bad header or a wrong checksum
  kMismatch = 5,       ///< parts do not fit together: a missing tensor, a wrong shape, another fingerprint
  kUnsupported = 6,    ///< this program does not implement a model, an option or a format
  kTooLittleText = 7,  ///< a text is too short for the windows that were asked for
  kExists = 8,         ///< the output is there already and --force was not given
  kWriteFailed = 9,    ///< a file cannot be written: the disk is full, or there is no permission
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

/// Throws Error. The message is one sentence that names the object, what was expected, what was found, and
/// what to do.
template <typename... Args>
[[noreturn]] void fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace stbllm

/// Throws std::logic_error with file, line and values unless `condition` holds. It is for invariants of this
/// program, whose failure is a bug, and not for its input.
#define STBLLM_CHECK(condition, ...)                                                                    \
  do {                                                                                                  \
    if (!(condition))                                                                                   \
      throw std::logic_error(fmt::format("{}:{}: check failed: {}: {}", __FILE__, __LINE__, #condition, \
                                         fmt::format(__VA_ARGS__)));                                    \
  } while (false)

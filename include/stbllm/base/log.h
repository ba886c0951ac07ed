#pragma once
// Logging and progress, on stderr. Results go to stdout and never through here.

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <utility>

namespace stbllm::log {

enum class Level { kTrace, kDebug, kInfo, kWarn, kError, kOff };

/// Messages below `level` are dropped. The default is kInfo.
void set_level(Level level);
/// Level by the name spdlog gives it ("debug", "info", ...). Throws Error(kUsage) on another name.
Level parse_level(const std::string& name);
void write(Level level, const std::string& message);

template <typename... Args>
void debug(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kDebug, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kInfo, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void warn(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kWarn, fmt::format(format, std::forward<Args>(args)...));
}

/// A running count with an estimate of the time left: one line rewritten in place on a terminal, a plain
/// line at most every ten seconds otherwise. Silent when info messages are.
class Progress {
 public:
  Progress(std::string what, int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  /// `done` of `total` items are finished; `note` follows the count.
  void update(int64_t done, const std::string& note = "");

 private:
  std::string what_;
  int64_t total_;
  double started_;
  double last_shown_ = -1e9;
  bool on_terminal_;
};

}  // namespace stbllm::log

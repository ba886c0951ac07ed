#pragma once
// Messages and progress, which go to stderr. Results go to stdout and never through here.

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "stbllm/base/forecast.h"

namespace stbllm::log {

enum class Level { kDebug, kInfo, kWarn, kError, kOff };

/// Drops messages below `level` from now on. Before the first call that is kInfo.
void set_level(Level level);
/// Whether messages of this level are written.
bool shows(Level level);
/// The level with this name: debug, info, warning, error or off. Throws Error(kUsage) on another name.
Level parse_level(std::string_view name);
/// Writes a line to stderr unless `level` is below the one that was set.
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

/// While it lives, every Progress whose text begins with the name of one of its stages and a colon speaks of
/// the whole run: of its share that is done, and of the time to its end. There is at most one.
class WholeRun {
 public:
  explicit WholeRun(std::vector<ExpectedStage> stages);
  ~WholeRun();
  WholeRun(const WholeRun&) = delete;
  WholeRun& operator=(const WholeRun&) = delete;
};

/// Shows a running count with an estimate of the time that is left: on a terminal as one line, with a bar and
/// the rate, that is rewritten in place and makes room for messages; elsewhere as a plain line at most every
/// ten seconds. It is silent when info messages are.
class Progress {
 public:
  Progress(std::string what, int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  /// Says that `done` of `total` items are finished. `note` follows the count.
  void update(int64_t done, const std::string& note = "");

 private:
  std::string what_;
  int64_t total_;
  double started_;
  double last_shown_ = -1e9;
  bool in_whole_run_ = false;
  bool on_terminal_;
};

}  // namespace stbllm::log

#include "stbllm/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"

namespace stbllm::log {
namespace {

spdlog::logger& logger() {
  static auto instance = [] {
    auto made = spdlog::stderr_color_mt("stbllm");
    made->set_pattern("%^[%H:%M:%S %L]%$ %v");
    return made;
  }();
  return *instance;
}

spdlog::level::level_enum of_spdlog(Level level) {
  switch (level) {
    case Level::kDebug:
      return spdlog::level::debug;
    case Level::kInfo:
      return spdlog::level::info;
    case Level::kWarn:
      return spdlog::level::warn;
    case Level::kError:
      return spdlog::level::err;
    case Level::kOff:
      return spdlog::level::off;
  }
  return spdlog::level::off;
}

std::string duration(double seconds) {
  const auto s = static_cast<int64_t>(seconds + 0.5);
  if (s >= 3600) return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
  return fmt::format("{}m{:02}s", s / 60, s % 60);
}

bool g_line_open = false;  // a progress line without its newline is on the terminal

/// Names from a stranger's file may hold line ends and commands for the terminal.
std::string printable(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < ' ' || c == '\x7f') c = '?';
  return text;
}

void close_line() {
  if (!g_line_open) return;
  std::fputc('\n', stderr);
  g_line_open = false;
}

}  // namespace

void set_level(Level level) { logger().set_level(of_spdlog(level)); }

Level parse_level(std::string_view name) {
  if (name == "debug") return Level::kDebug;
  if (name == "info") return Level::kInfo;
  if (name == "warning" || name == "warn") return Level::kWarn;
  if (name == "error") return Level::kError;
  if (name == "off") return Level::kOff;
  fail(ErrorCode::kUsage, "--log-level {}: expected debug, info, warning, error or off", name);
}

void write(Level level, const std::string& message) {
  if (!logger().should_log(of_spdlog(level))) return;
  close_line();
  logger().log(of_spdlog(level), printable(message));
}

Progress::Progress(std::string what, int64_t total)
    : what_(std::move(what)),
      total_(total),
      started_(seconds_now()),
      on_terminal_(isatty(STDERR_FILENO) != 0) {}

Progress::~Progress() { close_line(); }

void Progress::update(int64_t done, const std::string& note) {
  if (!logger().should_log(spdlog::level::info)) return;
  const double time = seconds_now();
  const bool last = done >= total_;
  if (!last && time - last_shown_ < (on_terminal_ ? 0.1 : 10.0)) return;
  last_shown_ = time;
  const double elapsed = time - started_;
  std::string line = fmt::format("{} {}/{}", what_, done, total_);
  if (!note.empty()) line += "  " + note;
  line += fmt::format("  {} elapsed", duration(elapsed));
  if (done > 0 && !last) line += fmt::format(", {} left", duration(elapsed / done * (total_ - done)));
  if (on_terminal_) {
    fmt::print(stderr, "\r\033[K{}", line);
    std::fflush(stderr);
    g_line_open = true;
  } else {
    logger().info(line);
  }
}

}  // namespace stbllm::log

#include "stbllm/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <optional>

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

/// The run of the WholeRun that lives.
struct CurrentRun {
  Forecast forecast;
  double started;
};
std::optional<CurrentRun> g_run;

/// Names from a stranger's file may hold line ends and commands for the terminal.
std::string printable(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < ' ' || c == '\x7f') c = '?';
  return text;
}

void erase_line() {
  if (!g_line_open) return;
  std::fputs("\r\033[K", stderr);
  g_line_open = false;
}

void close_line() {
  if (!g_line_open) return;
  std::fputc('\n', stderr);
  g_line_open = false;
}

/// A line that wraps could not be rewritten.
size_t terminal_columns() {
  winsize size{};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string bar(double done) {
  constexpr int kWidth = 16;
  const int full = std::clamp(static_cast<int>(done * kWidth), 0, kWidth);
  return fmt::format("[{}{}] {:3.0f} %", std::string(full, '#'), std::string(kWidth - full, '.'), 100 * done);
}

std::string rate(double per_second) {
  return per_second >= 1 ? fmt::format("{:.1f}/s", per_second) : fmt::format("{:.1f} s each", 1 / per_second);
}

}  // namespace

void set_level(Level level) { logger().set_level(of_spdlog(level)); }

bool shows(Level level) { return logger().should_log(of_spdlog(level)); }

Level parse_level(std::string_view name) {
  if (name == "debug") return Level::kDebug;
  if (name == "info") return Level::kInfo;
  if (name == "warning" || name == "warn") return Level::kWarn;
  if (name == "error") return Level::kError;
  if (name == "off") return Level::kOff;
  fail(ErrorCode::kUsage, "--log-level {}: expected debug, info, warning, error or off", name);
}

void write(Level level, const std::string& message) {
  if (!shows(level)) return;
  erase_line();
  logger().log(of_spdlog(level), printable(message));
}

WholeRun::WholeRun(std::vector<ExpectedStage> stages) {
  g_run.emplace(CurrentRun{.forecast = Forecast(std::move(stages)), .started = seconds_now()});
}

WholeRun::~WholeRun() {
  g_run.reset();
  erase_line();
}

Progress::Progress(std::string what, int64_t total)
    : what_(std::move(what)),
      total_(total),
      started_(seconds_now()),
      on_terminal_(isatty(STDERR_FILENO) != 0) {
  const std::string stage = what_.substr(0, what_.find(':'));
  in_whole_run_ = g_run && g_run->forecast.knows(stage);
  if (in_whole_run_) g_run->forecast.begin(stage, started_ - g_run->started);
}

Progress::~Progress() {
  if (!in_whole_run_) close_line();  // else the line is that of the next stage too
}

void Progress::update(int64_t done, const std::string& note) {
  if (!shows(Level::kInfo)) return;
  const double time = seconds_now();
  const bool last = done >= total_;
  if (!last && time - last_shown_ < (on_terminal_ ? 0.1 : 10.0)) return;
  last_shown_ = time;
  const double in_stage = time - started_;
  const double fraction = total_ > 0 ? static_cast<double>(done) / static_cast<double>(total_) : 1;
  double elapsed = in_stage, share = fraction, left = done > 0 ? in_stage / fraction - in_stage : 0;
  if (in_whole_run_) {
    elapsed = time - g_run->started;
    share = g_run->forecast.done(fraction);
    left = g_run->forecast.left(fraction, elapsed);
  }
  const std::string count = fmt::format("{} {}/{}", what_, done, total_);
  const std::string remark = note.empty() ? "" : "  " + note;
  if (on_terminal_) {
    // In the order of weight: what does not fit is cut off.
    std::string line = fmt::format("{}  {} left  {}", bar(share), duration(left), count);
    if (done > 0) line += "  " + rate(static_cast<double>(done) / in_stage);
    line += remark;
    line.resize(std::min(line.size(), terminal_columns() - 1));
    fmt::print(stderr, "\r\033[K{}", line);
    std::fflush(stderr);
    g_line_open = true;
    return;
  }
  std::string line = fmt::format("{}{}  {} elapsed", count, remark, duration(elapsed));
  if (in_whole_run_)
    line += fmt::format(", {} left of the run", duration(left));
  else if (done > 0 && !last)
    line += fmt::format(", {} left", duration(left));
  logger().info(line);
}

}  // namespace stbllm::log

#pragma once

#include <time.h>

#include <algorithm>

namespace stbllm::bench {

inline double seconds_on(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// The shortest of repeated calls f(i), i = 0, 1, ..., copies - 1, 0, ..., that together take at least
/// `min_seconds` and include every copy twice. That is the one figure which other processes on the machine do
/// not spoil, as long as a call is shorter than a time slice; longer work of a single thread is timed by its
/// share of a core instead.
template <typename F>
double best_seconds(int threads, double min_seconds, int copies, F&& f) {
  constexpr double kTimeSlice = 3e-3;
  double best_wall = 1e9, best_thread = 1e9;
  const double begin = seconds_on(CLOCK_MONOTONIC);
  for (int i = 0; i < 2 * copies || seconds_on(CLOCK_MONOTONIC) - begin < min_seconds; ++i) {
    const double wall = seconds_on(CLOCK_MONOTONIC), thread = seconds_on(CLOCK_THREAD_CPUTIME_ID);
    f(i % copies);
    best_thread = std::min(best_thread, seconds_on(CLOCK_THREAD_CPUTIME_ID) - thread);
    best_wall = std::min(best_wall, seconds_on(CLOCK_MONOTONIC) - wall);
  }
  return threads == 1 && best_wall > kTimeSlice ? best_thread : best_wall;
}

}  // namespace stbllm::bench

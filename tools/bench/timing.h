#pragma once

#include <time.h>

#include <algorithm>

namespace stbllm::bench {

/// Seconds on the wall, or, for work on the calling thread alone, of this thread on a core: other processes
/// on a busy machine then cost cache and bandwidth but no time.
inline double now(int threads) {
  timespec t;
  clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// The shortest of repeated calls f(i), i = 0, 1, ..., copies - 1, 0, ..., that together take at least
/// `min_seconds` and include every copy twice.
template <typename F>
double best_seconds(int threads, double min_seconds, int copies, F&& f) {
  double best = 1e9;
  const double begin = now(threads);
  for (int i = 0; i < 2 * copies || now(threads) - begin < min_seconds; ++i) {
    const double start = now(threads);
    f(i % copies);
    best = std::min(best, now(threads) - start);
  }
  return best;
}

}  // namespace stbllm::bench

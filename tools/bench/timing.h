#pragma once

#include <algorithm>
#include <chrono>

namespace stbllm::bench {

/// The shortest of repeated calls f(i), i = 0, 1, ..., copies - 1, 0, ..., that together take at least
/// `min_seconds` and include every copy twice. The minimum is the one figure that other processes on the
/// machine do not spoil.
template <typename F>
double best_seconds(double min_seconds, int copies, F&& f) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  const auto begin = Clock::now();
  for (int i = 0; i < 2 * copies || std::chrono::duration<double>(Clock::now() - begin).count() < min_seconds;
       ++i) {
    const auto start = Clock::now();
    f(i % copies);
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

}  // namespace stbllm::bench

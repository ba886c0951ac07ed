#pragma once
// Loops that are split over the threads of OpenMP.
//
// An exception that leaves an OpenMP region ends the program on the spot. A loop whose body can throw, and an
// allocation already can, therefore goes through parallel_for().

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>

namespace stbllm {

/// The threads to start for work that `useful` threads can share: one or all. libgomp ends the surplus
/// threads of a smaller team and starts new ones for the next larger team, which costs a millisecond where
/// waking threads that wait takes microseconds. Those without work go straight to the end.
inline int team_size(int64_t useful) { return useful > 1 ? omp_get_max_threads() : 1; }

/// A thread's place among those of its region that share the work.
struct ThreadPlace {
  int64_t thread, threads;

  /// Inside a region whose work is for `useful` threads. `thread` is at least `threads` where there is no
  /// work left.
  static ThreadPlace among(int64_t useful) {
    return {.thread = omp_get_thread_num(), .threads = std::clamp<int64_t>(useful, 1, omp_get_num_threads())};
  }
  /// Where this thread's share of 0 .. count - 1 begins; that of the next thread begins at its end.
  int64_t begin(int64_t count) const { return std::min(count, count * thread / threads); }
  int64_t end(int64_t count) const { return std::min(count, count * (thread + 1) / threads); }
};

/// Calls body(begin, end) for consecutive ranges that together are 0 .. count - 1, one per thread, each of
/// about `grain` (>= 1) or more; a single range is run by the calling thread. When all threads are done, the
/// exception of the lowest range that threw is thrown again: a body that goes upwards reports the lowest
/// fault, whatever the number of threads.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const int64_t useful = std::min<int64_t>((count + grain - 1) / grain, omp_get_max_threads());
  std::exception_ptr exception;
  int64_t thrown_by = useful;
#pragma omp parallel num_threads(team_size(useful))
  {
    const ThreadPlace place = ThreadPlace::among(useful);
    const int64_t begin = place.begin(count), end = place.end(count);
    try {
      if (begin < end) body(begin, end);
    } catch (...) {
#pragma omp critical(stbllm_parallel_for)
      if (place.thread < thrown_by) {
        thrown_by = place.thread;
        exception = std::current_exception();
      }
    }
  }
  if (exception) std::rethrow_exception(exception);
}

}  // namespace stbllm

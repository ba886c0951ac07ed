#pragma once
// Loops that are split over the threads of OpenMP.
//
// An exception that leaves an OpenMP region ends the program on the spot. A loop whose body can throw, and an
// allocation already can, therefore goes through parallel_for().

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace stbllm {

/// The threads to start for work that `useful` threads can share: one or all. libgomp ends the surplus
/// threads of a smaller team and starts new ones for the next larger team, which costs a millisecond where
/// waking threads that wait takes microseconds. Those without work go straight to the end.
inline int team_size(int64_t useful) { return useful > 1 ? omp_get_max_threads() : 1; }

/// The processors that the process may run on, counted when first asked for. Tests assume more.
inline int& processors() {
  static int count = omp_get_num_procs();
  return count;
}

/// The threads that can run at the same time. Where threads wait for each other often, one more than there
/// are processors would stop the others until it gets its turn.
inline int64_t runnable_threads() { return std::min(omp_get_max_threads(), processors()); }

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

/// Where threads wait for each other. A thread that waits spins for about a tenth of a millisecond and then
/// sleeps, so that it gives way to other programs.
class Barrier {
 public:
  /// Returns when `threads` threads have called it, all of them with that number.
  void wait(int64_t threads) {
    if (threads == 1) return;
    const uint32_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      // In one order with the count of sleeping threads that notify_all() reads, or one would never wake.
      turn_.fetch_add(1, std::memory_order_seq_cst);
      turn_.notify_all();
      return;
    }
    constexpr int kSpins = 3000;
    for (int spins = 0; spins < kSpins; ++spins) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
      relax();
    }
    turn_.wait(turn, std::memory_order_acquire);
  }

 private:
  /// Leaves the core to its other thread for some cycles.
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
  }

  // Apart, so that those who arrive do not disturb those who spin.
  alignas(64) std::atomic<uint32_t> turn_ = 0;
  alignas(64) std::atomic<int64_t> arrived_ = 0;
};

/// A thread's place in a team: threads of a region that share work and wait for each other.
struct TeamPlace : ThreadPlace {
  Barrier* barrier;

  /// Inside a region of which `useful` threads are the team. The others have no place in it (is_outside()).
  static TeamPlace among(int64_t useful, Barrier& barrier) { return {ThreadPlace::among(useful), &barrier}; }
  bool is_outside() const { return thread >= threads; }
  void wait_for_all() const { barrier->wait(threads); }
  /// The place where no more than `useful` threads of the team have work.
  ThreadPlace among(int64_t useful) const {
    return {.thread = thread, .threads = std::clamp<int64_t>(useful, 1, threads)};
  }
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

#include "stbllm/base/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <new>
#include <thread>
#include <vector>

#include "stbllm/base/error.h"
#include "support/expect_error.h"

namespace stbllm {
namespace {

/// Runs a scope with so many threads of OpenMP.
class OmpThreads {
 public:
  explicit OmpThreads(int count) { omp_set_num_threads(count); }
  ~OmpThreads() { omp_set_num_threads(before_); }

 private:
  int before_ = omp_get_max_threads();
};

TEST(Barrier, NoThreadPassesBeforeTheLastHasCome) {
  constexpr int kThreads = 5, kTurns = 2000;  // more than cores, so that some sleep
  Barrier barrier;
  std::vector<int> counts(kThreads);  // plain numbers: what one thread wrote before, the others see behind
  std::atomic<int> faults = 0;
  std::vector<std::thread> threads;
  for (int own = 0; own < kThreads; ++own)
    threads.emplace_back([&, own] {
      for (int turn = 1; turn <= kTurns; ++turn) {
        counts[static_cast<size_t>(own)] = turn;
        barrier.wait(kThreads);
        for (const int count : counts) faults += count != turn;
        barrier.wait(kThreads);
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(faults, 0);
}

TEST(TeamPlace, IsAmongThoseWithWork) {
  const OmpThreads threads(4);
  Barrier barrier;
  std::vector<TeamPlace> places(4);
#pragma omp parallel num_threads(4)
  places[static_cast<size_t>(omp_get_thread_num())] = TeamPlace::among(3, barrier);
  for (int64_t i = 0; i < 4; ++i) {
    const TeamPlace& place = places[static_cast<size_t>(i)];
    EXPECT_EQ(place.thread, i);
    EXPECT_EQ(place.threads, 3);
    EXPECT_EQ(place.is_outside(), i == 3);
    EXPECT_EQ(place.among(2).threads, 2);
    EXPECT_EQ(place.among(5).threads, 3);
  }
}

TEST(ParallelFor, VisitsEveryIndexOnce) {
  const OmpThreads threads(4);
  for (const int64_t count : {0, 1, 3, 4, 1001})
    for (const int64_t grain : {1, 7, 5000}) {
      std::vector<int> visits(static_cast<size_t>(count));
      parallel_for(count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++visits[i];
      });
      EXPECT_EQ(visits, std::vector<int>(visits.size(), 1)) << count << " in parts of " << grain;
    }
}

TEST(ParallelFor, StartsNoThreadsForWorkOfOne) {
  const OmpThreads threads(4);
  parallel_for(10, 10, [](int64_t begin, int64_t end) {
    EXPECT_EQ(omp_get_num_threads(), 1);
    EXPECT_EQ(end - begin, 10);
  });
}

TEST(ParallelFor, ThrowsWhatTheBodyThrows) {
  const OmpThreads threads(4);
  EXPECT_THROW(parallel_for(4, 1, [](int64_t, int64_t) { throw std::bad_alloc(); }), std::bad_alloc);
}

TEST(ParallelFor, ThrowsTheExceptionOfTheLowestIndexAfterAllThreadsAreDone) {
  const OmpThreads threads(4);
  std::atomic<int> finished = 0;
  test::expect_error(ErrorCode::kCorrupt, "index 3", [&] {
    parallel_for(8, 1, [&](int64_t begin, int64_t end) {
      if (begin == 0) {
        ++finished;
        return;
      }
      for (int64_t i = begin; i < end; ++i)
        if (i >= 3) fail(ErrorCode::kCorrupt, "index {}", i);
    });
  });
  EXPECT_EQ(finished, 1);
}

TEST(ParallelFor, RunsInsideAnotherRegion) {
  const OmpThreads threads(4);
  std::atomic<int64_t> sum = 0;
  parallel_for(4, 1, [&](int64_t, int64_t) {
    parallel_for(10, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum += i;
    });
  });
  EXPECT_EQ(sum, 4 * 45);
}

}  // namespace
}  // namespace stbllm

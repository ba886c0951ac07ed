#include "stbllm/base/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <new>
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

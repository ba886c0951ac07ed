// The harness itself: what it must report, it reports.

#include <gtest/gtest.h>

#include <stdexcept>

#include "../../kernels/cuda/ptx.cuh"

namespace stbllm::cuda {
namespace {

using simt::Schedule;

std::string fault_of(int threads, const std::function<void()>& body) {
  try {
    simt::launch({1, 1}, threads, 4096, body);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "none";
}

TEST(Simt, ReportsABarrierThatNotAllThreadsReach) {
  const std::string fault = fault_of(64, [] {
    if (thread_index() != 40) sync_threads();
  });
  EXPECT_NE(fault.find("deadlock"), std::string::npos) << fault;
  EXPECT_NE(fault.find("thread 40 at the end"), std::string::npos) << fault;
}

TEST(Simt, ReportsDivergentWarpInstructions) {
  const std::string fault = fault_of(32, [] {
    if (thread_index() < 16)
      sync_warp();
    else
      warp_max(1);
  });
  EXPECT_NE(fault.find("divergence"), std::string::npos) << fault;
}

TEST(Simt, ReportsWhatMeetsAtTwoPlacesOfTheSource) {
  for (const int threads : {32, 64}) {
    const std::string fault = fault_of(threads, [&] {
      const auto meet = [&](bool first) {
        if (threads == 32 && first) sync_warp();
        if (threads == 32 && !first) sync_warp();
        if (threads == 64 && first) sync_threads();
        if (threads == 64 && !first) sync_threads();
      };
      meet(thread_index() < 16);
    });
    EXPECT_NE(fault.find("divergence: thread 16"), std::string::npos) << fault;
    EXPECT_NE(fault.find("simt_test.cc:"), std::string::npos) << fault;
  }
}

TEST(Simt, SharedMemoryHasNotAByteMore) {
  EXPECT_DEATH(simt::launch({1, 1}, 32, 4080, [] { shared_memory()[4080] = std::byte{1}; }), "");
  EXPECT_DEATH(simt::launch({1, 1}, 32, 4096, [] { shared_memory()[-1] = std::byte{1}; }), "");
  EXPECT_THROW(simt::launch({1, 1}, 32, 4080, [] { shared_memory()[-1] = std::byte{1}; }), std::logic_error);
}

TEST(Simt, ReportsInvalidMetadata) {
  const std::string fault = fault_of(32, [] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[4] = {};
    mma_sparse<0>(d, a, b, 0x44444440u);  // the lowest four: positions 0 and 0
  });
  EXPECT_NE(fault.find("do not ascend"), std::string::npos) << fault;
}

TEST(Simt, CopiesThatArriveAtOnceOverwriteWhatIsStillRead) {
  alignas(16) static const uint32_t source[4] = {1, 2, 3, 4};
  uint32_t seen[2] = {};
  for (const auto copies : {Schedule::Copies::kAtWait, Schedule::Copies::kAtIssue})
    simt::launch({1, 1}, 32, 16,
                 [&] {
                   auto* shared = reinterpret_cast<Words4*>(shared_memory());
                   if (thread_index() != 0) return;
                   shared->word[0] = 7;
                   copy_async_16(shared, source, true);
                   commit_copies();
                   seen[copies == Schedule::Copies::kAtIssue] = shared->word[0];
                   wait_copies<0>();
                 },
                 {.copies = copies});
  EXPECT_EQ(seen[0], 7u);
  EXPECT_EQ(seen[1], 1u);
}

TEST(Simt, AsynchronousCopiesArriveOnlyWhenWaitedFor) {
  alignas(16) static const uint32_t source[4] = {1, 2, 3, 4};
  simt::launch({1, 1}, 32, 1024, [] {
    auto* shared = reinterpret_cast<Words4*>(shared_memory()) + thread_index();
    copy_async_16(shared, source, thread_index() % 2 == 0);
    commit_copies();
    copy_async_16(shared, source, true);
    commit_copies();
    EXPECT_EQ(shared->word[3], 0xffffffffu);
    wait_copies<1>();
    EXPECT_EQ(shared->word[3], thread_index() % 2 == 0 ? 4u : 0u);
    wait_copies<0>();
    EXPECT_EQ(shared->word[3], 4u);
  });
}

TEST(Simt, AMissingBarrierShowsInOneOfTheOrders) {
  int seen[2] = {};
  for (const auto order : {Schedule::Order::kAscending, Schedule::Order::kDescending})
    simt::launch({1, 1}, 64, 64,
                 [&] {
                   auto* word = reinterpret_cast<int*>(shared_memory());
                   if (thread_index() == 0) *word = 7;
                   if (thread_index() == 63) seen[order == Schedule::Order::kDescending] = *word;
                 },
                 {.order = order});
  EXPECT_NE(seen[0], seen[1]);
}

TEST(Simt, ShuffledOrdersFollowTheirSeed) {
  const auto order_of = [](unsigned seed) {
    std::vector<int> order;
    simt::launch({1, 1}, 64, 0, [&] { order.push_back(thread_index()); },
                 {.order = Schedule::Order::kShuffled, .seed = seed});
    return order;
  };
  EXPECT_EQ(order_of(1), order_of(1));
  EXPECT_NE(order_of(1), order_of(2));
}

}  // namespace
}  // namespace stbllm::cuda

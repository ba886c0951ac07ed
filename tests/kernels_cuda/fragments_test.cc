// fragments.h against the pictures of the PTX ISA manual, and the probe of probe.cuh against the host model.

#include <gtest/gtest.h>

#include <set>
#include <tuple>

#include "../../kernels/cuda/probe.cuh"

namespace stbllm::cuda {
namespace {

// The manual's m16n8k16 pictures name the lane and the register half of single elements.
TEST(Fragments, MatchTheManual) {
  EXPECT_EQ(a_element(0, 0, 1), (Element{0, 1}));             // T0: a1
  EXPECT_EQ(a_element(0, 1, 0), (Element{8, 0}));             // T0: a2
  EXPECT_EQ(a_element(0, 2, 0), (Element{0, 8}));             // T0: a4
  EXPECT_EQ(a_element(31, 3, 1), (Element{15, 15}));          // T31: a7
  EXPECT_EQ(a_element(5, 0, 0), (Element{1, 2}));             // T5: a0
  EXPECT_EQ(b_element(0, 1, 0), (Element{8, 0}));             // T0: b2
  EXPECT_EQ(b_element(3, 0, 1), (Element{7, 0}));             // T3: b1
  EXPECT_EQ(b_element(4, 3, 1), (Element{25, 1}));            // T4: b7 of m16n8k32
  EXPECT_EQ(d_element(0, 1), (Element{0, 1}));                // T0: c1
  EXPECT_EQ(d_element(30, 2), (Element{15, 4}));              // T30: c2
  EXPECT_EQ(metadata_slot(0, 0, 0), (MetadataSlot{0, 0}));    // T0: [3..0] in row 0, columns 0..3
  EXPECT_EQ(metadata_slot(0, 0, 4), (MetadataSlot{1, 0}));    // T1 holds columns 16..31
  EXPECT_EQ(metadata_slot(0, 8, 3), (MetadataSlot{0, 28}));   // rows 8..15 in the upper half
  EXPECT_EQ(metadata_slot(1, 7, 7), (MetadataSlot{31, 12}));  // selector 1: T2 and T3
}

TEST(Fragments, HoldEveryElementOnce) {
  std::set<std::pair<int, int>> a, b, d;
  std::set<std::pair<int, int>> metadata;
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 4; ++reg)
      for (int half = 0; half < 2; ++half) {
        a.insert({a_element(lane, reg, half).row, a_element(lane, reg, half).col});
        b.insert({b_element(lane, reg, half).row, b_element(lane, reg, half).col});
      }
    for (int i = 0; i < 4; ++i) d.insert({d_element(lane, i).row, d_element(lane, i).col});
  }
  for (int selector = 0; selector < 2; ++selector)
    for (int row = 0; row < 16; ++row)
      for (int q = 0; q < 8; ++q) {
        const MetadataSlot slot = metadata_slot(selector, row, q);
        metadata.insert({slot.lane, slot.shift});
      }
  EXPECT_EQ(a.size(), 16u * 16);
  EXPECT_EQ(b.size(), 32u * 8);
  EXPECT_EQ(d.size(), 16u * 8);
  EXPECT_EQ(metadata.size(), 2u * 16 * 8);
}

TEST(Fragments, TheProbeAcceptsTheHostModel) {
  int mismatches = -1, first = 0;
  simt::launch({1, 1}, 32, 0, [&] { probe(&mismatches, &first); });
  EXPECT_EQ(mismatches, 0);
  EXPECT_EQ(first, -1);
}

TEST(Ptx, PermuteBytesSelectsAndReplicatesSigns) {
  EXPECT_EQ(permute_bytes(0x33221100u, 0x77665544u, 0x7410u), 0x77441100u);
  EXPECT_EQ(permute_bytes(0x00008000u, 0, 0xbb99u), 0x0000ffffu);
  EXPECT_EQ(permute_bytes(0x80007fffu, 0, 0xbb99u), 0xffff0000u);
}

}  // namespace
}  // namespace stbllm::cuda

// The way from planes to fragments, step by step and lane by lane.

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "emulated_matrix.h"
#include "support/random_matrix.h"

namespace stbllm {
namespace {

using cuda::Element;

Layout layout_of(int64_t rows, int64_t cols, NmPattern nm, int levels = 1) {
  Layout layout;
  layout.rows = rows;
  layout.cols = cols;
  layout.nm = nm;
  layout.levels = levels;
  return layout;
}

TEST(DecodeCode, EqualsDecodeGroupForEveryCodeOfSmallGroups) {
  std::mt19937_64 rng(1);
  for (const int group : {4, 8, 16})
    for (int keep = 1; keep <= group; ++keep)
      for (int levels = 1; levels <= 3; ++levels) {
        const uint64_t states = layout_of(1, 16, {keep, group}, levels).code_states();
        const uint64_t count = std::min<uint64_t>(states, 2000);
        for (uint64_t i = 0; i < count; ++i) {
          const uint64_t code = states <= 2000 ? i : i == 0 ? states - 1 : rng() % states;
          const GroupSymbols expected = decode_group({keep, group}, levels, code);
          const cuda::GroupContent found = cuda::decode_code(keep, group, levels, code);
          uint32_t kept = 0;
          for (int k = 0; k < keep; ++k) {
            const int p = expected.position[k];
            kept |= 1u << p;
            ASSERT_EQ(found.sign(p), expected.sign[k]);
            ASSERT_EQ(found.level_of(p), expected.level[k]);
          }
          ASSERT_EQ(found.kept, kept) << keep << ":" << group << " levels " << levels << " code " << code;
        }
      }
}

TEST(StoredFour, KeepsWhatIsKeptAndNumbersTheSupport) {
  std::map<uint32_t, std::pair<int, int>> supports;
  for (uint32_t kept = 0; kept < 16; ++kept) {
    if (std::popcount(kept) > 2) continue;
    const cuda::StoredFour four(kept);
    ASSERT_LT(four.position[0], four.position[1]);
    const uint32_t stored = 1u << four.position[0] | 1u << four.position[1];
    EXPECT_EQ(stored & kept, kept);
    if (std::popcount(kept) == 2) supports[four.support()] = {four.position[0], four.position[1]};
  }
  ASSERT_EQ(supports.size(), 6u);
  for (const auto& [support, positions] : supports) {
    // Each support at each of the eight nibbles, all others at support 0 (positions 0 and 1).
    for (int n = 0; n < 8; ++n) {
      const int nibble = n / 2 + 4 * (n % 2);
      const uint32_t metadata = cuda::expand_metadata(support << (4 * nibble));
      const auto expected = static_cast<uint32_t>(positions.first | positions.second << 2);
      EXPECT_EQ(metadata, (0x44444444u & ~(15u << (4 * n))) | expected << (4 * n));
    }
  }
}

TEST(HalfMasks, SpreadTheSignBits) {
  EXPECT_EQ(cuda::half_masks(0x7fff7fffu), 0u);
  EXPECT_EQ(cuda::half_masks(0x00008000u), 0x0000ffffu);
  EXPECT_EQ(cuda::half_masks(0x80000000u), 0xffff0000u);
  EXPECT_EQ(cuda::half_masks(0x80008000u), 0xffffffffu);
}

// Rebuilds every weight of a matrix from the registers of all lanes; nothing is multiplied.
template <bool kSparse, int kPlanes>
std::vector<std::vector<float>> weights_of_fragments(const cuda::WeightView& view) {
  std::vector<std::vector<float>> weights(static_cast<size_t>(view.row_tiles) * 16,
                                          std::vector<float>(static_cast<size_t>(view.column_tiles) * 256));
  for (int tile = 0; tile < view.row_tiles * view.column_tiles; ++tile)
    for (int chunk = 0; chunk < 4; ++chunk) {
      std::vector<cuda::TileChunk<kSparse, kPlanes>> lanes;
      for (int lane = 0; lane < 32; ++lane)
        lanes.emplace_back(view.records + int64_t{tile} * view.record_words, view.levels, chunk, lane);
      const int first_row = tile / view.column_tiles * 16;
      const int first_column = tile % view.column_tiles * 256 + 64 * chunk;
      for (int lane = 0; lane < 32; ++lane)
        for (int step = 0; step < (kSparse ? 2 : 4); ++step) {
          uint32_t a[4];
          lanes[lane].fragment(a, 4 * step);
          for (int reg = 0; reg < 4; ++reg)
            for (int half = 0; half < 2; ++half) {
              const Element e = cuda::a_element(lane, reg, half);
              int column = first_column + 16 * step + e.col;
              if (kSparse) {
                const cuda::MetadataSlot slot = cuda::metadata_slot(step, e.row, e.col / 2);
                const uint32_t bits = lanes[slot.lane].metadata() >> slot.shift & 15u;
                column =
                    first_column + 32 * step + 4 * (e.col / 2) + static_cast<int>(bits >> (2 * half) & 3u);
              }
              const float value = half_to_float(static_cast<uint16_t>(a[reg] >> (16 * half))) * view.scale;
              weights[first_row + cuda::tile_row(e.row)][column] += value;  // unkept columns stay 0
            }
        }
    }
  return weights;
}

template <bool kSparse, int kPlanes>
void expect_fragments_equal_at(NmPattern nm, int levels) {
  const StructuredBinaryMatrix matrix =
      test::random_matrix(layout_of(20, 300, nm, levels), 5, test::Content::kExact);
  const test::EmulatedMatrix emulated(matrix);
  ASSERT_EQ(emulated.view().format.sparse, kSparse);
  ASSERT_EQ(emulated.view().format.level_planes, kPlanes);
  const auto weights = weights_of_fragments<kSparse, kPlanes>(emulated.view());
  for (int row = 0; row < 20; ++row)
    for (int col = 0; col < 300; ++col)
      ASSERT_EQ(weights[row][col], matrix.at(row, col)) << row << ", " << col;
}

TEST(Fragments, AreTheWeightsOfTheMatrix) {
  expect_fragments_equal_at<true, 0>({2, 4}, 1);
  expect_fragments_equal_at<true, 1>({2, 4}, 2);
  expect_fragments_equal_at<true, 1>({1, 8}, 1);
  expect_fragments_equal_at<true, 2>({2, 4}, 3);
  expect_fragments_equal_at<true, 2>({2, 16}, 3);
  expect_fragments_equal_at<false, 0>({8, 8}, 1);
  expect_fragments_equal_at<false, 1>({4, 4}, 2);
  expect_fragments_equal_at<false, 1>({4, 8}, 1);
  expect_fragments_equal_at<false, 2>({5, 8}, 2);
  expect_fragments_equal_at<false, 2>({3, 4}, 3);
}

TEST(Plan, DeviceBitsPerWeightAreThoseOfTheDocumentation) {
  const auto bits = [](NmPattern nm, int levels) {
    const Layout layout = layout_of(64, 1024, nm, levels);
    const cuda::Plan plan = cuda::plan_matrix(test::random_matrix(layout, 1));
    return 8.0 * static_cast<double>(plan.bytes()) / (64 * 1024);
  };
  EXPECT_DOUBLE_EQ(bits({2, 4}, 1), 1.375);
  EXPECT_DOUBLE_EQ(bits({2, 4}, 3), 2.625);
  EXPECT_DOUBLE_EQ(bits({1, 4}, 1), 1.875);
  EXPECT_DOUBLE_EQ(bits({2, 8}, 1), 1.875);
  EXPECT_DOUBLE_EQ(bits({4, 8}, 1), 2.125);
  EXPECT_DOUBLE_EQ(bits({8, 8}, 1), 1.125);
  EXPECT_DOUBLE_EQ(bits({4, 8}, 3), 3.375);
}

// Devices of compute capability 8.6, 8.9 and 12.0 offer 99 KiB of shared memory to a block.
TEST(Plan, EveryKernelFitsTheSmallestSharedMemory) {
  for (const bool sparse : {true, false})
    for (const int planes : {0, 1, 2}) {
      const int record_words = cuda::most_record_words(sparse, planes);
      EXPECT_LE(cuda::LargeGemm::shared_bytes(record_words), size_t{99} << 10);
      EXPECT_LE(cuda::SmallGemm::shared_bytes(record_words), size_t{99} << 10);
      EXPECT_LE(cuda::FewTokens::shared_bytes(record_words, cuda::FewTokens::kMaxTokens), size_t{99} << 10);
      EXPECT_LE(cuda::SomeTokens::shared_bytes(record_words, cuda::SomeTokens::kMaxTokens), size_t{99} << 10);
    }
}

}  // namespace
}  // namespace stbllm

#pragma once
// The CUDA backend on the CPU: the same plan and the same kernel bodies, run by the SIMT harness.

#include <vector>

#include "../../kernels/cuda/gemm.cuh"
#include "../../kernels/cuda/gemv.cuh"
#include "../../kernels/cuda/plan.h"
#include "../../kernels/cuda/repack.cuh"
#include "support/simt.h"

namespace stbllm::test {

class EmulatedMatrix {
 public:
  explicit EmulatedMatrix(const StructuredBinaryMatrix& matrix, const simt::Schedule& schedule = {})
      : source_(matrix), schedule_(schedule), plan_(cuda::plan_matrix(matrix)) {
    cuda::PlaneView planes = plan_.planes;
    const auto at = [&](auto& pointer, Plane plane) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(matrix.plane(plane).data());
    };
    at(planes.codes, Plane::kCodes);
    at(planes.scales, Plane::kScales);
    at(planes.scale_codes, Plane::kScaleCodes);
    at(planes.row_scales, Plane::kRowScales);
    at(planes.level_values, Plane::kLevels);
    at(planes.salient_columns, Plane::kSalientColumns);
    at(planes.salient_signs, Plane::kSalientSigns);
    at(planes.outlier_values, Plane::kOutlierValues);

    records_.resize(static_cast<size_t>(plan_.record_words()) / 4);
    extra_.resize(static_cast<size_t>(plan_.extra_words()) / 4);
    cuda::WeightView& view = plan_.weights;
    view.records = records_.empty() ? nullptr : records_.data()->word;
    view.extra_values = extra_.empty() ? nullptr : extra_.data()->word;
    view.extra_columns = plan_.extra_columns.data();
    view.taken = plan_.taken.data();
    const int warps = cuda::kRepackThreads / 32;
    const int tiles = view.row_tiles * view.column_tiles, steps = view.row_tiles * view.extra_steps;
    simt::launch(
        {(tiles + warps - 1) / warps, 1}, cuda::kRepackThreads, 0,
        [&] { cuda::repack_tiles(planes, view, records_.data()->word); }, schedule_);
    simt::launch(
        {(steps + warps - 1) / warps, 1}, cuda::kRepackThreads, 0,
        [&] { cuda::repack_extra(planes, view, extra_.data()->word); }, schedule_);
  }
  EmulatedMatrix(const EmulatedMatrix&) = delete;

  const cuda::WeightView& view() const { return plan_.weights; }
  const cuda::Plan& plan() const { return plan_; }

  template <typename Shape>
  void gemm(const cuda::InputView& x, const cuda::OutputView& y) const {
    const Staged staged = stage(x);
    const auto blocks = [](int count, int size) { return (count + size - 1) / size; };
    const simt::Index grid{blocks(view().row_tiles, Shape::kBlockTiles),
                           blocks(x.tokens, Shape::kBlockTokens)};
    by_format([&]<bool kSparse, int kPlanes>() {
      simt::launch(
          grid, Shape::kThreads, Shape::shared_bytes(view().record_words),
          [&] { cuda::gemm<kSparse, kPlanes, Shape>(view(), staged.halves(), staged.scales.data(), y); },
          schedule_);
    });
  }

  template <typename Shape>
  void gemv(const cuda::InputView& x, const cuda::OutputView& y) const {
    const Staged staged = x.tokens > 1 ? stage(x) : Staged();
    const simt::Index grid{(view().row_tiles + Shape::kRowTiles - 1) / Shape::kRowTiles, 1};
    by_format([&]<bool kSparse, int kPlanes>() {
      simt::launch(
          grid, Shape::kThreads, Shape::shared_bytes(view().record_words, x.tokens),
          [&] { cuda::gemv<kSparse, kPlanes, Shape>(view(), x, staged.halves(), staged.scales.data(), y); },
          schedule_);
    });
  }

 private:
  struct Staged {
    std::vector<cuda::Words4> pieces;
    std::vector<float> scales;
    const uint16_t* halves() const { return reinterpret_cast<const uint16_t*>(pieces.data()); }
  };
  Staged stage(const cuda::InputView& x) const {
    Staged staged;
    staged.pieces.resize(static_cast<size_t>(x.tokens) * cuda::staged_width(view()) / 8);
    staged.scales.resize(static_cast<size_t>(x.tokens));
    auto* halves = reinterpret_cast<uint16_t*>(staged.pieces.data());
    simt::launch(
        {x.tokens, 1}, cuda::kStageThreads, cuda::kStageThreads / 8,
        [&] { cuda::stage_token(view(), x, halves, staged.scales.data()); }, schedule_);
    return staged;
  }

  template <typename Run>
  void by_format(const Run& run) const {
    const cuda::TileFormat format = view().format;
    switch (10 * format.sparse + format.level_planes) {
      case 0:
        return run.template operator()<false, 0>();
      case 1:
        return run.template operator()<false, 1>();
      case 2:
        return run.template operator()<false, 2>();
      case 10:
        return run.template operator()<true, 0>();
      case 11:
        return run.template operator()<true, 1>();
      case 12:
        return run.template operator()<true, 2>();
    }
  }

  StructuredBinaryMatrix source_;
  const simt::Schedule schedule_;
  cuda::Plan plan_;
  std::vector<cuda::Words4> records_, extra_;  // aligned to 16 bytes
};

}  // namespace stbllm::test

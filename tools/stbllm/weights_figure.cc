#include "weights_figure.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "commands.h"
#include "stbllm/base/error.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/checkpoint/checkpoint.h"

namespace stbllm {
namespace {

/// The histogram has at most so many bars, and holds so many standard deviations to both sides, which are all
/// but one of 150 thousand normal weights.
constexpr int64_t kMostBars = 120;
constexpr double kDeviations = 4.5;

/// Weights of one kind.
struct Class {
  std::string name;
  std::vector<int64_t> counts;  ///< per bar
  int64_t weights = 0;
  double magnitude = 0, packed_magnitude = 0;  ///< sums over the weights
};

/// The class of each weight, int64 (rows, cols): 0 not kept, then levels, salient, outlier columns.
at::Tensor classes_of(const BinarizedWeight& weight) {
  at::Tensor classes = weight.symbols.abs().to(at::kLong);
  if (weight.has_salient()) {
    const at::Tensor columns = weight.salient_columns.to(at::kLong);
    const at::Tensor kept = classes.index_select(1, columns).gt(0).to(at::kLong);
    classes.index_copy_(1, columns, kept * (weight.levels + 1));
  }
  if (weight.has_outliers()) classes.index_fill_(1, weight.outlier_columns.to(at::kLong), weight.levels + 2);
  return classes.contiguous();
}

std::vector<Class> empty_classes(int levels, int64_t bars) {
  std::vector<Class> classes(static_cast<size_t>(levels) + 3);
  for (Class& each : classes) each.counts.resize(static_cast<size_t>(bars));
  classes[0].name = "not kept";
  for (int level = 1; level <= levels; ++level)
    classes[level].name = levels == 1 ? "kept" : fmt::format("kept, level {}", level);
  classes[levels + 1].name = "kept, salient column";
  classes[levels + 2].name = "outlier column";
  return classes;
}

const StructuredBinaryMatrix& find_linear(const PackedReader& reader, const std::string& linear,
                                          const std::string& path) {
  const auto found = reader.linears().find(linear);
  if (found != reader.linears().end()) return found->second;
  fail(ErrorCode::kUsage, "{}: no packed linear '{}'; it has {} and others, which 'stbllm inspect' lists",
       path, linear, reader.linears().empty() ? "none" : reader.linears().begin()->first);
}

}  // namespace

nlohmann::json weights_figure(const std::string& packed, const std::string& checkpoint,
                              const std::string& linear) {
  const PackedReader reader = open_packed(packed);
  const StructuredBinaryMatrix& matrix = find_linear(reader, linear, packed);
  const Layout& layout = matrix.layout();
  const at::Tensor original = Checkpoint::open(checkpoint)
                                  .load(linear + ".weight", {layout.rows, layout.cols})
                                  .to(at::kFloat)
                                  .contiguous();
  const at::Tensor stored = unpack_dense(matrix), of = classes_of(unpack_weight(matrix));
  const double reach = kDeviations * original.std().item<double>();
  if (!(reach > 0) || !std::isfinite(reach))
    fail(ErrorCode::kUnsupported,
         "{}: the weights of {} are all equal or not finite; there is nothing to draw", checkpoint, linear);

  // A power of two: other steps hold more values of bfloat16 in one bar than in the next.
  const double step = std::exp2(std::ceil(std::log2(2 * reach / kMostBars)));
  const int64_t half = static_cast<int64_t>(std::ceil(reach / step)), bars = 2 * half;

  std::vector<Class> classes = empty_classes(layout.levels, bars);
  int64_t outside = 0;
  for (int64_t i = 0; i < original.numel(); ++i) {
    const float value = original.data_ptr<float>()[i];
    Class& own = classes[static_cast<size_t>(of.data_ptr<int64_t>()[i])];
    ++own.weights;
    own.magnitude += std::abs(value);
    own.packed_magnitude += std::abs(stored.data_ptr<float>()[i]);
    const auto bar = static_cast<int64_t>(std::floor(value / step)) + half;
    if (bar < 0 || bar >= bars)
      ++outside;
    else
      ++own.counts[bar];
  }
  nlohmann::json json = nlohmann::json::array();
  for (const Class& each : classes)
    if (each.weights > 0)
      json.push_back({{"name", each.name},
                      {"counts", each.counts},
                      {"weights", each.weights},
                      {"mean", each.magnitude / static_cast<double>(each.weights)},
                      {"packed_mean", each.packed_magnitude / static_cast<double>(each.weights)}});
  return {{"weights",
           {{"linear", linear},
            {"code", Scheme{.nm = layout.nm, .levels = layout.levels}.str()},
            {"packed", packed},
            {"checkpoint", checkpoint},
            {"rows", layout.rows},
            {"cols", layout.cols},
            {"first", -static_cast<double>(half) * step},
            {"step", step},
            {"outside", outside},
            {"classes", json}}}};
}

}  // namespace stbllm

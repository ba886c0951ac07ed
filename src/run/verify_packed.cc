#include <ATen/ATen.h>

#include <cmath>

#include "stbllm/backend/backend.h"
#include "stbllm/base/error.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/run/assemble.h"
#include "stbllm/run/tables.h"

namespace stbllm {
namespace {

/// Packed and dense logits differ by float32 rounding only, which deep models amplify.
constexpr double kLogitTolerance = 2e-3;

/// `ids` behind the last of the assembled blocks, dense and in float32.
HiddenStream run_dense(Decoder& decoder, const at::Tensor& ids, const Assembly& assembly) {
  HiddenStream stream(decoder, ids, {});
  for (int64_t i = 0; i < assembly.spec.layers; ++i) {
    const auto block = decoder.block(i);
    if (i < assembly.quantized_blocks) {
      const QuantizedBlock quantized = assembly.quantized(i);
      install(quantized, *block, assembly.spec);
      install(quantized.tensors, decoder.final_norm(), assembly.spec.final_norm());
    }
    stream.advance(*block);
  }
  return stream;
}

HiddenStream run_packed(const Decoder& decoder, const at::Tensor& ids) {
  HiddenStream stream(decoder, ids, {});
  for (int64_t i = 0; i < decoder.spec().layers; ++i) stream.advance(*decoder.block(i));
  return stream;
}

/// Relative L2 distance of the logits, a few tokens at a time.
double logit_distance(const Decoder& dense, const HiddenStream& dense_stream, const Decoder& packed,
                      const HiddenStream& packed_stream) {
  double difference = 0, energy = 0;
  for (int64_t w = 0; w < dense_stream.windows(); ++w)
    for (int64_t first = 0; first < dense_stream.seqlen(); first += kTokensPerVerification) {
      const int64_t count = std::min(kTokensPerVerification, dense_stream.seqlen() - first);
      const auto logits = [&](const Decoder& decoder, const HiddenStream& stream) {
        return decoder.logits(stream.read(w, 1).narrow(1, first, count));
      };
      const at::Tensor a = logits(dense, dense_stream), b = logits(packed, packed_stream);
      difference += (a - b).square().sum(at::kDouble).item<double>();
      energy += a.square().sum(at::kDouble).item<double>();
    }
  return std::sqrt(difference / energy);
}

}  // namespace

double verify_packed(const std::filesystem::path& path, const Assembly& assembly,
                     std::span<const std::vector<int32_t>> windows) {
  const at::Tensor ids = ids_of(windows);
  Decoder dense = Decoder::from_checkpoint(assembly.checkpoint);
  assembly.tables.install(dense);
  const HiddenStream dense_stream = run_dense(dense, ids, assembly);
  const PackedReader reader = PackedReader::open(path);
  const Decoder packed = Decoder::from_packed(reader, find_backend("cpu"), at::kFloat);
  const double distance = logit_distance(dense, dense_stream, packed, run_packed(packed, ids));
  if (!(distance < kLogitTolerance))
    fail(
        ErrorCode::kVerifyFailed,
        "the packed file does not reproduce the quantizer's logits: relative distance {:.2e}, expected below "
        "{:.0e}; nothing was written",
        distance, kLogitTolerance);
  return distance;
}

}  // namespace stbllm

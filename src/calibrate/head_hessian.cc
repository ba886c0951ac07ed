#include "stbllm/calibrate/head_hessian.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "stbllm/base/profile.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/quantize/input_stats.h"

namespace stbllm {

at::Tensor head_hessian(const Decoder& dense, const Calibration& calibration) {
  const StageTimer timer("inputs of the head");
  const at::NoGradGuard no_grad;
  HiddenStream stream(dense, ids_of(calibration.first_training_windows(kHeadTokens)), {});
  for (int64_t i = 0; i < dense.spec().layers; ++i) stream.advance(*dense.block(i));
  StatsAccumulator sum(dense.spec().embedding_width, {});
  for (int64_t w = 0; w < stream.windows(); ++w)
    sum.add(dense.before_head(stream.read(w, 1)), /*holdout=*/false);
  return sum.finish().hessian.cpu();
}

}  // namespace stbllm

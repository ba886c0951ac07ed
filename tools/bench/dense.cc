#include "dense.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "timing.h"

namespace stbllm::bench {

double dense_seconds(ElementType type, int64_t rows, int64_t cols, int64_t tokens, int copies,
                     double min_seconds, int threads) {
  const c10::InferenceMode guard;
  at::set_num_threads(threads);
  const auto dtype = type == ElementType::kFloat32 ? at::kFloat : at::kBFloat16;
  std::vector<at::Tensor> weights;
  for (int i = 0; i < copies; ++i) weights.push_back(at::full({rows, cols}, 0.01, dtype));
  const at::Tensor x = at::ones({tokens, cols}, dtype);
  return best_seconds(threads, min_seconds, copies, [&](int i) { return at::linear(x, weights[i]); });
}

}  // namespace stbllm::bench

#include "stbllm/model/fused.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "elements.h"
#include "fused_rows.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"

namespace stbllm {
namespace {

/// Elements that are worth a second thread.
constexpr int64_t kGrain = 1 << 14;

/// 1 / the root of the mean square of a row.
template <typename Lanes, typename T>
STBLLM_INLINE float norm_scale(const T* x, int64_t width, float eps) {
  Lanes squares = {};
  for_each_lanes(0, width, [&](int64_t at, int count) STBLLM_INLINED {
    const Lanes v = load<Lanes>(x + at, count);
    squares += v * v;
  });
  return 1 / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps);
}

template <typename Lanes, typename T>
STBLLM_INLINE void rms_norm_rows_of(const NormRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = rows.x + row * rows.width;
    T* y = rows.y + row * rows.width;
    const float scale = norm_scale<Lanes>(x, rows.width, rows.eps);
    for_each_lanes(0, rows.width, [&](int64_t at, int count) STBLLM_INLINED {
      Lanes v = rounded<T>(load<Lanes>(x + at, count) * scale);
      if (rows.weight != nullptr) v = rounded<T>(v * load<Lanes>(rows.weight + at, count));
      store(y + at, v, count);
    });
  }
}

}  // namespace

template <typename T>
void rms_norm_rows(const NormRows<T>& rows, int64_t begin, int64_t end) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { rms_norm_rows_of<Lanes>(rows, begin, end); });
}
template void rms_norm_rows(const NormRows<float>&, int64_t, int64_t);
template void rms_norm_rows(const NormRows<uint16_t>&, int64_t, int64_t);

namespace {

template <typename Lanes, typename T>
STBLLM_INLINE void layer_norm_rows_of(const NormRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = rows.x + row * rows.width;
    T* y = rows.y + row * rows.width;
    Lanes sum = {}, squares = {};
    for_each_lanes(0, rows.width,
                   [&](int64_t at, int count) STBLLM_INLINED { sum += load<Lanes>(x + at, count); });
    const float mean = sum_of(sum) / static_cast<float>(rows.width);
    for_each_lanes(0, rows.width, [&](int64_t at, int count) STBLLM_INLINED {
      const Lanes v = load_or<Lanes>(x + at, count, mean) - mean;
      squares += v * v;
    });
    const float scale = 1 / std::sqrt(sum_of(squares) / static_cast<float>(rows.width) + rows.eps);
    for_each_lanes(0, rows.width, [&](int64_t at, int count) STBLLM_INLINED {
      Lanes v = (load<Lanes>(x + at, count) - mean) * scale;
      if (rows.weight != nullptr) v = v * load<Lanes>(rows.weight + at, count);
      if (rows.bias != nullptr) v = v + load<Lanes>(rows.bias + at, count);
      store(y + at, rounded<T>(v), count);
    });
  }
}

}  // namespace

template <typename T>
void layer_norm_rows(const NormRows<T>& rows, int64_t begin, int64_t end) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { layer_norm_rows_of<Lanes>(rows, begin, end); });
}
template void layer_norm_rows(const NormRows<float>&, int64_t, int64_t);
template void layer_norm_rows(const NormRows<uint16_t>&, int64_t, int64_t);

namespace {

/// What the norm of rows hands back: with n = x * scale, the gradient of n is g = y_gradient * weight, that
/// of x is (g - n mean(g n)) * scale, and that of the weight is the sum of y_gradient * n over the rows.
template <typename T>
struct NormGradientRows {
  const T *x, *weight, *y_gradient;
  T* x_gradient;
  int64_t width;
  float eps;
};
/// Adds the rows' share to `weight_gradient` (width).
template <typename Lanes, typename T>
STBLLM_INLINE void norm_gradient_rows_of(const NormGradientRows<T>& rows, int64_t begin, int64_t end,
                                         float* weight_gradient) {
  for (int64_t row = begin; row < end; ++row) {
    const T *x = rows.x + row * rows.width, *y_gradient = rows.y_gradient + row * rows.width;
    T* x_gradient = rows.x_gradient + row * rows.width;
    const float scale = norm_scale<Lanes>(x, rows.width, rows.eps);
    Lanes products = {};
    for_each_lanes(0, rows.width, [&](int64_t at, int count) STBLLM_INLINED {
      products += load<Lanes>(y_gradient + at, count) * load<Lanes>(rows.weight + at, count) *
                  load<Lanes>(x + at, count);
    });
    const float shared = sum_of(products) * scale * scale / static_cast<float>(rows.width);
    for_each_lanes(0, rows.width, [&](int64_t at, int count) STBLLM_INLINED {
      const Lanes v = load<Lanes>(x + at, count), g = load<Lanes>(y_gradient + at, count);
      const Lanes change = (g * load<Lanes>(rows.weight + at, count) - v * shared) * scale;
      store(x_gradient + at, rounded<T>(change), count);
      store_lanes(weight_gradient + at, load_lanes<Lanes>(weight_gradient + at, count) + g * v * scale,
                  count);
    });
  }
}
template <typename T>
void norm_gradient_rows(const NormGradientRows<T>& rows, int64_t begin, int64_t end, float* weight_gradient) {
  with_lanes([&]<typename Lanes>()
                 STBLLM_INLINED { norm_gradient_rows_of<Lanes>(rows, begin, end, weight_gradient); });
}

template <typename Lanes, typename T>
STBLLM_INLINE void rotate_rows_of(const RotateRows<T>& rows, int64_t begin, int64_t end) {
  const int64_t half = rows.width / 2;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t head = row % rows.heads, token = row / rows.heads % rows.tokens,
                  batch = row / rows.heads / rows.tokens;
    const int64_t offset = batch * rows.batch_stride + head * rows.head_stride + token * rows.token_stride;
    const T *x = rows.x + offset, *cos = rows.cos + token * rows.width, *sin = rows.sin + token * rows.width;
    T* y = rows.y + offset;
    for_each_lanes(0, half, [&](int64_t at, int count) STBLLM_INLINED {
      const Lanes low = load<Lanes>(x + at, count), high = load<Lanes>(x + half + at, count);
      const auto turned = [&](const Lanes& straight, const Lanes& crossed, int64_t column) STBLLM_INLINED {
        return rounded<T>(rounded<T>(straight * load<Lanes>(cos + column, count)) +
                          rounded<T>(crossed * load<Lanes>(sin + column, count)));
      };
      store(y + at, turned(low, -high, at), count);
      store(y + half + at, turned(high, low, half + at), count);
    });
  }
}

}  // namespace

template <typename T>
void rotate_rows(const RotateRows<T>& rows, int64_t begin, int64_t end) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { rotate_rows_of<Lanes>(rows, begin, end); });
}
template void rotate_rows(const RotateRows<float>&, int64_t, int64_t);
template void rotate_rows(const RotateRows<uint16_t>&, int64_t, int64_t);

namespace {

template <typename Lanes, typename T>
STBLLM_INLINE void multiply_gates_of(const Gates<T>& gates, int64_t begin, int64_t end) {
  for_each_lanes(begin, end, [&](int64_t at, int count) STBLLM_INLINED {
    const Lanes x = load<Lanes>(gates.gate + at, count);
    store(gates.y + at, rounded<T>(rounded<T>(x / (1.f + exp_of(-x))) * load<Lanes>(gates.up + at, count)),
          count);
  });
}

}  // namespace

template <typename T>
void multiply_gates(const Gates<T>& gates, int64_t begin, int64_t end) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { multiply_gates_of<Lanes>(gates, begin, end); });
}
template void multiply_gates(const Gates<float>&, int64_t, int64_t);
template void multiply_gates(const Gates<uint16_t>&, int64_t, int64_t);

template <typename T>
void rectify(T* x, int64_t begin, int64_t end) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED {
    for_each_lanes(begin, end, [&](int64_t at, int count) STBLLM_INLINED {
      const Lanes v = load<Lanes>(x + at, count);
      store(x + at, select(v < 0.f, Lanes{}, v), count);
    });
  });
}
template void rectify(float*, int64_t, int64_t);
template void rectify(uint16_t*, int64_t, int64_t);

template <typename T>
void add_elements(const T* x, T* y, int64_t begin, int64_t end) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED {
    for_each_lanes(begin, end, [&](int64_t at, int count) STBLLM_INLINED {
      store(y + at, rounded<T>(load<Lanes>(y + at, count) + load<Lanes>(x + at, count)), count);
    });
  });
}
template void add_elements(const float*, float*, int64_t, int64_t);
template void add_elements(const uint16_t*, uint16_t*, int64_t, int64_t);

namespace {

template <typename T>
struct GateGradients {
  const T *gate, *up, *y_gradient;
  T *gate_gradient, *up_gradient;
};
template <typename Lanes, typename T>
STBLLM_INLINE void gate_gradients_of(const GateGradients<T>& gates, int64_t begin, int64_t end) {
  for_each_lanes(begin, end, [&](int64_t at, int count) STBLLM_INLINED {
    const Lanes x = load<Lanes>(gates.gate + at, count), g = load<Lanes>(gates.y_gradient + at, count);
    const Lanes share = 1.f / (1.f + exp_of(-x)), slope = share * (1.f + x * (1.f - share));
    store(gates.gate_gradient + at, rounded<T>(g * load<Lanes>(gates.up + at, count) * slope), count);
    store(gates.up_gradient + at, rounded<T>(g * x * share), count);
  });
}
template <typename T>
void gate_gradients(const GateGradients<T>& gates, int64_t begin, int64_t end) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { gate_gradients_of<Lanes>(gates, begin, end); });
}

/// Rows of logits, `width` each.
template <typename T>
struct LogitRows {
  const T *teacher, *student;
  float* divergence;  // of each row
  T* gradient;        // like the logits, or null
  int64_t width;
};
/// Behind the last logit: its probability is 0, and its difference from another such one too.
constexpr float kNoLogit = -1e30f;
/// softmax(x) = exp(x - largest) / total.
struct SoftmaxScale {
  float largest, total;
};
template <typename Lanes, typename T>
STBLLM_INLINE SoftmaxScale softmax_scale(const T* row, int64_t width) {
  Lanes largest = Lanes{} + kNoLogit;
  for_each_lanes(0, width, [&](int64_t at, int count) STBLLM_INLINED {
    const Lanes x = load_or<Lanes>(row + at, count, kNoLogit);
    largest = select(x > largest, x, largest);
  });
  SoftmaxScale scale{.largest = largest_of(largest), .total = 0};
  Lanes total = {};
  for_each_lanes(0, width, [&](int64_t at, int count) STBLLM_INLINED {
    total += exp_of(load_or<Lanes>(row + at, count, kNoLogit) - scale.largest);
  });
  scale.total = sum_of(total);
  return scale;
}
template <typename Lanes, typename T>
STBLLM_INLINE void diverge_rows_of(const LogitRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *teacher = rows.teacher + row * rows.width, *student = rows.student + row * rows.width;
    const SoftmaxScale t = softmax_scale<Lanes>(teacher, rows.width),
                       s = softmax_scale<Lanes>(student, rows.width);
    Lanes sum = {};
    for_each_lanes(0, rows.width, [&](int64_t at, int count) STBLLM_INLINED {
      const Lanes a = load_or<Lanes>(teacher + at, count, kNoLogit) - t.largest,
                  b = load_or<Lanes>(student + at, count, kNoLogit) - s.largest;
      const Lanes p = exp_of(a) * (1 / t.total), q = exp_of(b) * (1 / s.total);
      sum += p * (a - b);
      if (rows.gradient != nullptr) store(rows.gradient + row * rows.width + at, rounded<T>(q - p), count);
    });
    rows.divergence[row] = sum_of(sum) - std::log(t.total / s.total);
  }
}
template <typename T>
void diverge_rows(const LogitRows<T>& rows, int64_t begin, int64_t end) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { diverge_rows_of<Lanes>(rows, begin, end); });
}

template <typename T>
const T* elements(const at::Tensor& x) {
  return x.defined() ? static_cast<const T*>(x.const_data_ptr()) : nullptr;
}

/// norm_rows(rows, begin, end) for all rows of x.
template <typename T, typename NormOfRows>
at::Tensor norm_of(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                   const NormOfRows& norm_rows) {
  const at::Tensor input = x.contiguous(), output = at::empty_like(input);
  const int64_t width = x.size(-1);
  const NormRows<T> rows{.x = elements<T>(input),
                         .weight = elements<T>(weight),
                         .bias = elements<T>(bias),
                         .y = static_cast<T*>(output.data_ptr()),
                         .width = width,
                         .eps = static_cast<float>(eps)};
  at::parallel_for(0, x.numel() / width, std::max<int64_t>(1, kGrain / width),
                   [&](int64_t begin, int64_t end) { norm_rows(rows, begin, end); });
  return output;
}

void check_norm(const at::Tensor& x, std::initializer_list<at::Tensor> weights) {
  for (const at::Tensor& own : weights)
    STBLLM_CHECK(!own.defined() || (own.scalar_type() == x.scalar_type() && own.is_contiguous() &&
                                    own.numel() == x.size(-1)),
                 "the weight or bias of a norm of {}", x.size(-1));
}

/// The gradients of x and of the weight, the latter in float32.
template <typename T>
std::pair<at::Tensor, at::Tensor> rms_norm_gradient_of(const at::Tensor& x, const at::Tensor& weight,
                                                       double eps, const at::Tensor& y_gradient) {
  constexpr int64_t kRowsPerSum = 64;  // in an order that does not depend on the number of threads
  const at::Tensor input = x.contiguous(), slopes = y_gradient.contiguous(), result = at::empty_like(input);
  const int64_t width = x.size(-1), count = x.numel() / width, parts = ceil_div(count, kRowsPerSum);
  const at::Tensor sums = at::zeros({parts, width}, at::kFloat);
  const NormGradientRows<T> rows{.x = elements<T>(input),
                                 .weight = elements<T>(weight),
                                 .y_gradient = elements<T>(slopes),
                                 .x_gradient = static_cast<T*>(result.data_ptr()),
                                 .width = width,
                                 .eps = static_cast<float>(eps)};
  at::parallel_for(0, parts, std::max<int64_t>(1, kGrain / width / kRowsPerSum),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t p = begin; p < end; ++p)
                       norm_gradient_rows(rows, p * kRowsPerSum, std::min(count, (p + 1) * kRowsPerSum),
                                          sums.data_ptr<float>() + p * width);
                   });
  return {result, sums.sum(0)};
}

template <typename T>
at::Tensor rotate_of(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const at::Tensor output = at::empty_strided(x.sizes(), x.strides(), x.options());
  const int64_t width = x.size(3);
  const RotateRows<T> rows{.x = elements<T>(x),
                           .y = static_cast<T*>(output.data_ptr()),
                           .cos = elements<T>(cos),
                           .sin = elements<T>(sin),
                           .heads = x.size(1),
                           .tokens = x.size(2),
                           .width = width,
                           .batch_stride = x.stride(0),
                           .head_stride = x.stride(1),
                           .token_stride = x.stride(2)};
  at::parallel_for(0, x.numel() / width, std::max<int64_t>(1, kGrain / width),
                   [&](int64_t begin, int64_t end) { rotate_rows(rows, begin, end); });
  return output;
}

template <typename T>
at::Tensor silu_multiply_of(const at::Tensor& gate, const at::Tensor& up) {
  const at::Tensor gate_rows = gate.contiguous(), up_rows = up.contiguous(),
                   output = at::empty_like(gate_rows);
  const Gates<T> gates{
      .gate = elements<T>(gate_rows), .up = elements<T>(up_rows), .y = static_cast<T*>(output.data_ptr())};
  at::parallel_for(0, gate.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { multiply_gates(gates, begin, end); });
  return output;
}

template <typename T>
std::pair<at::Tensor, at::Tensor> silu_multiply_gradient_of(const at::Tensor& gate, const at::Tensor& up,
                                                            const at::Tensor& y_gradient) {
  const at::Tensor gate_rows = gate.contiguous(), up_rows = up.contiguous(), slopes = y_gradient.contiguous(),
                   of_gate = at::empty_like(gate_rows), of_up = at::empty_like(gate_rows);
  const GateGradients<T> gates{.gate = elements<T>(gate_rows),
                               .up = elements<T>(up_rows),
                               .y_gradient = elements<T>(slopes),
                               .gate_gradient = static_cast<T*>(of_gate.data_ptr()),
                               .up_gradient = static_cast<T*>(of_up.data_ptr())};
  at::parallel_for(0, gate.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { gate_gradients(gates, begin, end); });
  return {of_gate, of_up};
}

template <typename T>
at::Tensor softmax_divergence_of(const at::Tensor& teacher, const at::Tensor& student, at::Tensor* gradient) {
  const at::Tensor teacher_rows = teacher.contiguous(), student_rows = student.contiguous(),
                   result = at::empty({teacher.size(0)}, teacher.options().dtype(at::kFloat));
  if (gradient != nullptr) *gradient = at::empty_like(student_rows);
  const LogitRows<T> rows{.teacher = elements<T>(teacher_rows),
                          .student = elements<T>(student_rows),
                          .divergence = result.data_ptr<float>(),
                          .gradient = gradient == nullptr ? nullptr : static_cast<T*>(gradient->data_ptr()),
                          .width = teacher.size(1)};
  at::parallel_for(0, teacher.size(0), std::max<int64_t>(1, kGrain / teacher.size(1)),
                   [&](int64_t begin, int64_t end) { diverge_rows(rows, begin, end); });
  return result;
}

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

/// The functions below while somebody records gradients: forward is the same pass, and backward another one.
struct NormFunction : torch::autograd::Function<NormFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            double eps) {
    context->save_for_backward({x, weight});
    context->saved_data["eps"] = eps;
    return rms_norm(x, weight, eps);
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const tensor_list saved = context->get_saved_variables();
    const double eps = context->saved_data["eps"].toDouble();
    const auto [of_x, of_weight] =
        saved[0].scalar_type() == at::kFloat
            ? rms_norm_gradient_of<float>(saved[0], saved[1], eps, gradients[0])
            : rms_norm_gradient_of<uint16_t>(saved[0], saved[1], eps, gradients[0]);
    return {of_x, of_weight.to(saved[1].scalar_type()), {}};
  }
};

struct RotateFunction : torch::autograd::Function<RotateFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
    context->save_for_backward({cos, sin});
    return rotate(x, cos, sin);
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const tensor_list saved = context->get_saved_variables();
    const at::Tensor& slopes = gradients[0];
    return {rotate(slopes.stride(-1) == 1 ? slopes : slopes.contiguous(), saved[0], saved[1].neg()), {}, {}};
  }
};

struct GateFunction : torch::autograd::Function<GateFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gate, const at::Tensor& up) {
    context->save_for_backward({gate, up});
    return silu_multiply(gate, up);
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const tensor_list saved = context->get_saved_variables();
    const auto [of_gate, of_up] = saved[0].scalar_type() == at::kFloat
                                      ? silu_multiply_gradient_of<float>(saved[0], saved[1], gradients[0])
                                      : silu_multiply_gradient_of<uint16_t>(saved[0], saved[1], gradients[0]);
    return {of_gate, of_up};
  }
};

}  // namespace

bool records_gradients(const at::Tensor& x) {
  return at::GradMode::is_enabled() && x.defined() && x.requires_grad();
}

bool can_fuse(const at::Tensor& x) {
  return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) &&
         x.stride(-1) == 1;
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_norm(x, {weight});
  if (records_gradients(x) || records_gradients(weight))
    return NormFunction::apply(x, weight.defined() ? weight : at::ones({x.size(-1)}, x.options()), eps);
  return x.scalar_type() == at::kFloat ? norm_of<float>(x, weight, {}, eps, rms_norm_rows<float>)
                                       : norm_of<uint16_t>(x, weight, {}, eps, rms_norm_rows<uint16_t>);
}

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  check_norm(x, {weight, bias});
  return x.scalar_type() == at::kFloat ? norm_of<float>(x, weight, bias, eps, layer_norm_rows<float>)
                                       : norm_of<uint16_t>(x, weight, bias, eps, layer_norm_rows<uint16_t>);
}

at::Tensor silu_multiply(const at::Tensor& gate, const at::Tensor& up) {
  STBLLM_CHECK(gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type(),
               "a gate of {} elements for {}", gate.numel(), up.numel());
  if (records_gradients(gate) || records_gradients(up)) return GateFunction::apply(gate, up);
  return gate.scalar_type() == at::kFloat ? silu_multiply_of<float>(gate, up)
                                          : silu_multiply_of<uint16_t>(gate, up);
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  for (const at::Tensor& table : {cos, sin})
    STBLLM_CHECK(table.is_contiguous() && table.scalar_type() == x.scalar_type() &&
                     table.size(0) == x.size(2) && table.size(1) == x.size(3) && x.size(3) % 2 == 0,
                 "rotary tables of {} positions for {} tokens of width {}", table.size(0), x.size(2),
                 x.size(3));
  if (records_gradients(x)) return RotateFunction::apply(x, cos, sin);
  return x.scalar_type() == at::kFloat ? rotate_of<float>(x, cos, sin) : rotate_of<uint16_t>(x, cos, sin);
}

at::Tensor softmax_divergence(const at::Tensor& teacher, const at::Tensor& student, at::Tensor* gradient) {
  STBLLM_CHECK(teacher.dim() == 2 && teacher.sizes() == student.sizes() &&
                   teacher.scalar_type() == student.scalar_type(),
               "logits of {} and {} elements", teacher.numel(), student.numel());
  if (!can_fuse(teacher) || !can_fuse(student)) {  // the readable twin
    const at::Tensor log_p = at::log_softmax(teacher.to(at::kFloat), -1), p = log_p.exp(),
                     log_q = at::log_softmax(student.to(at::kFloat), -1);
    if (gradient != nullptr) *gradient = (log_q.exp() - p).to(student.scalar_type());
    return (p * (log_p - log_q)).sum(-1);
  }
  return teacher.scalar_type() == at::kFloat ? softmax_divergence_of<float>(teacher, student, gradient)
                                             : softmax_divergence_of<uint16_t>(teacher, student, gradient);
}

}  // namespace stbllm

#include "stbllm/eval/divergence.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"

namespace stbllm {
namespace {

/// One of the two models: its decoder, what it has yielded so far and the time that took.
struct Side {
  const Decoder& decoder;
  std::vector<double> window_nll;
  double seconds = 0;

  template <typename Work>
  at::Tensor timed(const Work& work) {
    const double start = seconds_now();
    at::Tensor result = work();
    seconds += seconds_now() - start;
    return result;
  }
};

/// Means over the positions of one window.
struct WindowComparison {
  double reference_nll = 0;
  double model_nll = 0;
  double kl = 0;
  double agreement = 0;
};

/// `reference_hidden`, `model_hidden`: (seqlen, hidden) of the window `ids`.
WindowComparison compare(Side& reference, const at::Tensor& reference_hidden, Side& model,
                         const at::Tensor& model_hidden, const std::vector<int32_t>& ids) {
  const at::Tensor targets = at::tensor(ids, at::kLong).slice(0, 1).unsqueeze(1);
  const int64_t predicted = targets.size(0);
  const int64_t step = std::min(tokens_per_head_pass(reference.decoder), tokens_per_head_pass(model.decoder));
  WindowComparison sum;
  for (int64_t first = 0; first < predicted; first += step) {
    const int64_t last = std::min(first + step, predicted);
    const auto log_probabilities_of = [&](Side& side, const at::Tensor& hidden) {
      return side.timed([&] { return log_probabilities(side.decoder, hidden.slice(0, first, last)).cpu(); });
    };
    const at::Tensor log_p = log_probabilities_of(reference, reference_hidden);
    const at::Tensor log_q = log_probabilities_of(model, model_hidden);
    const at::Tensor wanted = targets.slice(0, first, last);
    sum.reference_nll -= log_p.gather(1, wanted).sum(at::kDouble).item<double>();
    sum.model_nll -= log_q.gather(1, wanted).sum(at::kDouble).item<double>();
    sum.kl += (log_p.exp() * (log_p - log_q)).sum(at::kDouble).item<double>();
    sum.agreement += log_p.argmax(1).eq(log_q.argmax(1)).sum().item<double>();
  }
  const auto positions = static_cast<double>(predicted);
  return {sum.reference_nll / positions, sum.model_nll / positions, sum.kl / positions,
          sum.agreement / positions};
}

}  // namespace

Divergence evaluate_divergence(const Decoder& reference, const Decoder& model, const Windows& windows,
                               int64_t hidden_bytes) {
  if (reference.spec().vocab != model.spec().vocab)
    fail(ErrorCode::kMismatch, "models with vocabularies of {} and {} cannot be compared",
         reference.spec().vocab, model.spec().vocab);
  check_windows(reference.spec(), windows);
  check_windows(model.spec(), windows);
  const at::NoGradGuard no_grad;
  const auto count = static_cast<int64_t>(windows.size());
  const auto seqlen = static_cast<int64_t>(windows.front().size());
  const EvaluationOptions half{hidden_bytes / 2};  // two sets of hidden states are held
  const int64_t chunk =
      std::min(windows_per_chunk(reference, seqlen, half), windows_per_chunk(model, seqlen, half));

  Side left{reference, {}}, right{model, {}};
  std::vector<double> kl, agreement;
  log::Progress progress("divergence", count * (reference.spec().layers + model.spec().layers));
  int64_t done = 0;  // windows through one block
  for (int64_t first = 0; first < count; first += chunk) {
    const auto part = std::span(windows).subspan(static_cast<size_t>(first),
                                                 static_cast<size_t>(std::min(chunk, count - first)));
    const auto run = [&](Side& side) {
      return side.timed([&] {
        return final_hidden_states(
            side.decoder, part, [&](int64_t) { progress.update(done += static_cast<int64_t>(part.size())); });
      });
    };
    const at::Tensor left_hidden = run(left);
    const at::Tensor right_hidden = run(right);
    for (size_t i = 0; i < part.size(); ++i) {
      const auto window = static_cast<int64_t>(i);
      const WindowComparison means = compare(left, left_hidden[window], right, right_hidden[window], part[i]);
      left.window_nll.push_back(means.reference_nll);
      right.window_nll.push_back(means.model_nll);
      kl.push_back(means.kl);
      agreement.push_back(means.agreement);
    }
  }
  Divergence result;
  const auto [mean_kl, kl_error] = mean_and_error(kl);
  result.mean_kl = mean_kl;
  result.kl_error = kl_error;
  result.top1_agreement = mean_and_error(agreement).mean;
  result.reference = summarize(std::move(left.window_nll), seqlen, seqlen - 1, left.seconds);
  result.model = summarize(std::move(right.window_nll), seqlen, seqlen - 1, right.seconds);
  return result;
}

}  // namespace stbllm

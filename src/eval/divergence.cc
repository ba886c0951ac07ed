#include "stbllm/eval/divergence.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <limits>

#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"

namespace stbllm {
namespace {

/// One of the models: its decoder, what it has yielded so far and the time that took.
struct Side {
  explicit Side(const Decoder& of) : decoder(of) {}

  const Decoder& decoder;
  std::vector<double> window_nll, window_kl, window_agreement;
  double seconds = 0;
  at::Tensor hidden;  // (windows, seqlen, hidden) of the windows at hand

  template <typename Work>
  at::Tensor timed(const Work& work) {
    const double start = seconds_now();
    at::Tensor result = work();
    if (!result.is_cpu()) result.flatten()[0].item();  // a device is done then
    seconds += seconds_now() - start;
    return result;
  }
};

/// Sums over positions of (NLL, KL, agreement), float64 (3), where the reference is.
at::Tensor sums_of(const at::Tensor& nll, const at::Tensor& kl, const at::Tensor& agreement) {
  return at::stack({nll.sum(at::kDouble), kl.sum(at::kDouble), agreement.sum(at::kDouble)});
}

/// Adds the means over the scored positions of window `index` of those at hand, whose tokens are `ids`, to
/// all sides.
void compare(Side& reference, std::vector<Side>& models, int64_t index, const std::vector<int32_t>& ids,
             int64_t first_token) {
  const at::Device device = reference.decoder.device();
  const at::Tensor targets = at::tensor(ids, at::kLong).slice(0, first_token).unsqueeze(1).to(device);
  const int64_t predicted = targets.size(0);
  int64_t step = tokens_per_head_pass(reference.decoder);
  for (const Side& model : models) step = std::min(step, tokens_per_head_pass(model.decoder));
  // (1 + models, 3): of the reference, of which only the first counts, and of each model.
  at::Tensor sums = at::zeros({std::ssize(models) + 1, 3}, at::kDouble);
  for (int64_t first = 0; first < predicted; first += step) {
    const int64_t last = std::min(first + step, predicted);
    const at::Tensor wanted = targets.slice(0, first, last);
    const auto log_probabilities_of = [&](Side& side) {
      const at::Tensor hidden = side.hidden[index].slice(0, first_token - 1 + first, first_token - 1 + last);
      return side.timed([&] { return log_probabilities(side.decoder, hidden).to(device); });
    };
    const at::Tensor log_p = log_probabilities_of(reference), p = log_p.exp(), preferred = log_p.argmax(1);
    const at::Tensor none = at::zeros({1}, log_p.options());
    std::vector<at::Tensor> found = {sums_of(-log_p.gather(1, wanted), none, none)};
    for (Side& model : models) {
      const at::Tensor log_q = log_probabilities_of(model);
      found.push_back(sums_of(-log_q.gather(1, wanted), p * (log_p - log_q), preferred.eq(log_q.argmax(1))));
    }
    sums += at::stack(found).cpu();
  }
  const auto positions = static_cast<double>(predicted);
  const at::Tensor mean = sums / positions;
  const auto means = mean.accessor<double, 2>();
  reference.window_nll.push_back(means[0][0]);
  for (int64_t m = 0; m < std::ssize(models); ++m) {
    models[m].window_nll.push_back(means[m + 1][0]);
    models[m].window_kl.push_back(means[m + 1][1]);
    models[m].window_agreement.push_back(means[m + 1][2]);
  }
}

ModelDivergence result_of(Side& side, const Side& reference, int64_t seqlen, int64_t scored) {
  ModelDivergence result;
  std::vector<double> differences;
  for (size_t i = 0; i < side.window_nll.size(); ++i)
    differences.push_back(side.window_nll[i] - reference.window_nll[i]);
  const MeanAndError kl = mean_and_error(side.window_kl), difference = mean_and_error(differences);
  result.mean_kl = kl.mean;
  result.kl_error = kl.error;
  result.nll_difference = difference.mean;
  result.difference_error = difference.error;
  result.top1_agreement = mean_and_error(side.window_agreement).mean;
  result.window_kl = std::move(side.window_kl);
  result.model = summarize(std::move(side.window_nll), seqlen, scored, side.seconds);
  return result;
}

}  // namespace

Divergence evaluate_divergence(const Decoder& reference, std::span<const Decoder* const> models,
                               const Windows& windows, const EvaluationOptions& options) {
  check_windows(reference.spec(), windows);
  for (const Decoder* model : models) {
    check_windows(model->spec(), windows);
    if (reference.spec().vocab != model->spec().vocab)
      fail(ErrorCode::kMismatch, "models with vocabularies of {} and {} cannot be compared",
           reference.spec().vocab, model->spec().vocab);
  }
  Side left(reference);
  std::vector<Side> right;
  for (const Decoder* model : models) right.emplace_back(*model);
  // A set of hidden states for each model.
  EvaluationOptions share = options;
  share.hidden_bytes /= std::ssize(models) + 1;
  const auto count = std::ssize(windows);
  const auto seqlen = std::ssize(windows.front());
  const int64_t first_token = first_scored_token(seqlen, options);
  int64_t chunk = std::numeric_limits<int64_t>::max(), layers = 0;
  const auto for_each_side = [&](const auto& visit) {
    visit(left);
    for (Side& side : right) visit(side);
  };
  for_each_side([&](const Side& side) {
    chunk = std::min(chunk, windows_per_chunk(side.decoder, seqlen, share));
    layers += side.decoder.spec().layers;
  });

  const at::NoGradGuard no_grad;
  log::Progress progress("divergence", count * layers);
  int64_t done = 0;  // windows through one block
  for (int64_t first = 0; first < count; first += chunk) {
    const auto part = std::span(windows).subspan(static_cast<size_t>(first),
                                                 static_cast<size_t>(std::min(chunk, count - first)));
    for_each_side([&](Side& side) {
      side.hidden = side.timed([&] {
        return final_hidden_states(side.decoder, part,
                                   [&](int64_t) { progress.update(done += std::ssize(part)); });
      });
    });
    for (int64_t i = 0; i < std::ssize(part); ++i)
      compare(left, right, i, part[static_cast<size_t>(i)], first_token);
  }
  Divergence result;
  for (Side& side : right) result.models.push_back(result_of(side, left, seqlen, seqlen - first_token));
  result.reference = summarize(std::move(left.window_nll), seqlen, seqlen - first_token, left.seconds);
  return result;
}

}  // namespace stbllm

#include "stbllm/eval/perplexity.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"

namespace stbllm {
namespace {

/// Bound on the float32 logits held at a time.
constexpr int64_t kLogitBytes = int64_t{64} << 20;

}  // namespace

int64_t first_scored_token(int64_t seqlen, const EvaluationOptions& options) {
  const int64_t first = options.second_half ? seqlen / 2 + 1 : 1;
  if (first >= seqlen)
    fail(ErrorCode::kUsage, "windows of {} tokens have no second half to score; use longer ones", seqlen);
  return first;
}

int64_t windows_per_chunk(const Decoder& decoder, int64_t seqlen, const EvaluationOptions& options) {
  const int64_t bytes_per_window =
      seqlen * decoder.spec().hidden * static_cast<int64_t>(at::elementSize(decoder.dtype()));
  const int64_t pass = windows_per_pass(seqlen);
  return std::max<int64_t>(1, options.hidden_bytes / bytes_per_window / pass) * pass;
}

at::Tensor final_hidden_states(const Decoder& decoder, std::span<const std::vector<int32_t>> windows,
                               const std::function<void(int64_t)>& on_block) {
  HiddenStream stream(decoder, ids_of(windows), {.dtype = decoder.dtype()});
  for (int64_t index = 0; index < decoder.spec().layers; ++index) {
    stream.advance(*decoder.block(index));
    if (on_block) on_block(index + 1);
  }
  return stream.states();
}

int64_t tokens_per_head_pass(const Decoder& decoder) {
  return std::max<int64_t>(1, kLogitBytes / (decoder.spec().vocab * int64_t{sizeof(float)}));
}

at::Tensor log_probabilities(const Decoder& decoder, const at::Tensor& hidden) {
  return at::log_softmax(decoder.logits(hidden.unsqueeze(0)).squeeze(0), -1, at::kFloat);
}

at::Tensor token_nll(const Decoder& decoder, const at::Tensor& window_hidden,
                     const std::vector<int32_t>& window, int64_t first_token) {
  const at::NoGradGuard no_grad;
  const at::Tensor hidden = window_hidden.slice(0, first_token - 1, -1);
  const int64_t predicted = hidden.size(0);
  const at::Tensor targets =
      at::tensor(window, at::kLong).slice(0, first_token).unsqueeze(1).to(decoder.device());
  const int64_t step = tokens_per_head_pass(decoder);
  const at::Tensor nll =
      at::empty({predicted}, at::TensorOptions().dtype(at::kDouble).device(decoder.device()));
  for (int64_t first = 0; first < predicted; first += step) {
    const int64_t last = std::min(first + step, predicted);
    const at::Tensor log_p = log_probabilities(decoder, hidden.slice(0, first, last));
    nll.slice(0, first, last).copy_(-log_p.gather(1, targets.slice(0, first, last)).squeeze(1));
  }
  const at::Tensor on_host = nll.cpu();
  if (!std::isfinite(on_host.sum().item<double>()))
    fail(ErrorCode::kCorrupt,
         "the logits are not finite; the model's weights are damaged, or its activations overflow");
  return on_host;
}

MeanAndError mean_and_error(const std::vector<double>& values) {
  const auto count = static_cast<double>(values.size());
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / count;
  if (values.size() < 2) return {mean, 0.0};
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return {mean, std::sqrt(squares / (count - 1) / count)};
}

Perplexity summarize(std::vector<double> window_nll, int64_t seqlen, int64_t scored, double seconds) {
  Perplexity result;
  const auto [mean, error] = mean_and_error(window_nll);
  result.mean_nll = mean;
  result.nll_error = error;
  result.perplexity = std::exp(mean);
  result.perplexity_error = result.perplexity * error;
  result.windows = static_cast<int64_t>(window_nll.size());
  result.seqlen = seqlen;
  result.tokens = result.windows * scored;
  result.seconds = seconds;
  result.tokens_per_second = seconds > 0 ? static_cast<double>(result.windows * seqlen) / seconds : 0;
  result.window_nll = std::move(window_nll);
  return result;
}

Perplexity evaluate_perplexity(const Decoder& decoder, const Windows& windows,
                               const EvaluationOptions& options) {
  check_windows(decoder.spec(), windows);
  const double start = seconds_now();
  const auto count = static_cast<int64_t>(windows.size());
  const auto seqlen = static_cast<int64_t>(windows.front().size());
  const int64_t chunk = windows_per_chunk(decoder, seqlen, options);
  const int64_t layers = decoder.spec().layers;
  const int64_t first_token = first_scored_token(seqlen, options);

  log::Progress progress("perplexity", count * layers);  // in windows through one block
  std::vector<double> window_nll;
  for (int64_t first = 0; first < count; first += chunk) {
    const auto part = std::span(windows).subspan(static_cast<size_t>(first),
                                                 static_cast<size_t>(std::min(chunk, count - first)));
    const at::Tensor hidden = final_hidden_states(decoder, part, [&](int64_t blocks) {
      progress.update(first * layers + blocks * static_cast<int64_t>(part.size()));
    });
    for (size_t i = 0; i < part.size(); ++i)
      window_nll.push_back(
          token_nll(decoder, hidden[static_cast<int64_t>(i)], part[i], first_token).mean().item<double>());
  }
  return summarize(std::move(window_nll), seqlen, seqlen - first_token, seconds_now() - start);
}

}  // namespace stbllm

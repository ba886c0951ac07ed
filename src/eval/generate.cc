#include "stbllm/eval/generate.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "sample.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/random.h"
#include "stbllm/model/hidden_stream.h"

namespace stbllm {
namespace {

void check_options(const Decoder& decoder, std::span<const int32_t> prompt, const GenerateOptions& options) {
  const int64_t longest = decoder.spec().max_positions;
  if (prompt.empty()) fail(ErrorCode::kUsage, "generation needs a prompt of at least one token");
  if (static_cast<int64_t>(prompt.size()) >= longest)
    fail(ErrorCode::kUsage, "a prompt of {} tokens leaves no room: the model takes {}", prompt.size(),
         longest);
  if (options.max_tokens < 1)
    fail(ErrorCode::kUsage, "max_tokens = {} must be at least 1", options.max_tokens);
  check_sampling(options.temperature, options.top_p);
  check_ids(decoder.spec(), prompt);
}

}  // namespace

Generation generate(const Decoder& decoder, std::span<const int32_t> prompt, const GenerateOptions& options,
                    const std::function<bool(int32_t)>& on_token) {
  check_options(decoder, prompt, options);
  const c10::InferenceMode inference;
  const auto prompt_tokens = static_cast<int64_t>(prompt.size());
  const int64_t max_tokens = std::min(options.max_tokens, decoder.spec().max_positions - prompt_tokens);
  KeyValueCache cache = decoder.make_cache(1, prompt_tokens + max_tokens);
  SplitMix64 random(options.seed);
  const auto next_token = [&](std::span<const int32_t> ids) {
    const at::Tensor input = at::tensor(at::ArrayRef<int32_t>(ids.data(), ids.size()), at::kInt).unsqueeze(0);
    const at::Tensor hidden = decoder.forward(input, &cache);
    const at::Tensor logits = decoder.logits(hidden.slice(1, -1)).flatten().to(at::kCPU, at::kFloat);
    return sample({logits.const_data_ptr<float>(), static_cast<size_t>(logits.numel())}, options.temperature,
                  options.top_p, random);
  };

  Generation result;
  result.prompt_tokens = prompt_tokens;
  double start = seconds_now();
  int32_t token = next_token(prompt);
  result.prefill_seconds = seconds_now() - start;

  start = seconds_now();
  while (std::ranges::find(options.stop_ids, token) == options.stop_ids.end()) {
    result.ids.push_back(token);
    const bool go_on = !on_token || on_token(token);
    if (!go_on || static_cast<int64_t>(result.ids.size()) == max_tokens) break;
    token = next_token({&token, 1});
    ++result.decode_passes;
  }
  result.decode_seconds = seconds_now() - start;
  return result;
}

}  // namespace stbllm

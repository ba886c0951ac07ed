#include "stbllm/eval/write_texts.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "sample.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/base/parallel.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/text/corpus.h"
#include "stbllm/text/unicode.h"
#include "stbllm/text/windows.h"

namespace stbllm {
namespace {

/// Tokens of a line that a text begins with.
constexpr int64_t kStartTokens = 8;

/// Whether a token begins a word and holds nothing but letters. Byte-level vocabularies write the space in
/// front of it as U+0120, SentencePiece's as U+2581.
bool begins_word(const Tokenizer& tokenizer, int32_t id) {
  const std::string& token = tokenizer.tokens()[static_cast<size_t>(id)];
  if (!token.starts_with("\u0120") && !token.starts_with("\u2581")) return false;
  const std::string text = tokenizer.decode({&id, 1});
  size_t at = text.starts_with(' ') ? 1 : 0;
  bool letters = at < text.size();
  while (at < text.size() && letters) {
    const CodePoint point = decode_utf8(text, at);
    letters = point.valid && char_class(point.value) == CharClass::kLetter;
    at += static_cast<size_t>(point.length);
  }
  return letters;
}

std::vector<int32_t> with_prefix(const Tokenizer& tokenizer, std::vector<int32_t> ids) {
  ids.insert(ids.begin(), tokenizer.prefix().begin(), tokenizer.prefix().end());
  return ids;
}

/// A text on its way. Each draws for itself, so that it does not depend on those beside it.
struct Draft {
  std::vector<int32_t> ids;
  SplitMix64 random;
  bool ended = false;
};

/// More at once are hardly faster on a CPU.
constexpr int64_t kMostAtOnce = 128, kCacheBytes = int64_t{1} << 30;

/// As many as have room in the cache, but no more than are wanted.
int64_t texts_at_once(const Decoder& decoder, const WriteTextsOptions& options, int64_t wanted_tokens) {
  const ModelSpec& spec = decoder.spec();
  const int64_t text_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * options.longest *
                             static_cast<int64_t>(c10::elementSize(decoder.dtype()));
  return std::clamp<int64_t>(kCacheBytes / text_bytes, 1,
                             std::min(kMostAtOnce, ceil_div(wanted_tokens, options.longest)));
}

int64_t tokens_of(const std::vector<Draft>& drafts) {
  int64_t tokens = 0;
  for (const Draft& draft : drafts) tokens += std::ssize(draft.ids);
  return tokens;
}

/// Adds a token to each text until all have ended or are as long as they may be.
void finish(const Decoder& decoder, std::vector<Draft>& drafts, const WriteTextsOptions& options,
            const std::function<void()>& on_tokens) {
  const auto count = std::ssize(drafts);
  KeyValueCache cache = decoder.make_cache(count, options.longest);
  Windows starts;
  for (const Draft& draft : drafts) starts.push_back(draft.ids);
  at::Tensor input = ids_of(starts);
  for (auto length = std::ssize(starts.front()); length < options.longest; ++length) {
    if (std::ranges::all_of(drafts, &Draft::ended)) return;
    const at::Tensor hidden = decoder.forward(input, &cache);
    const at::Tensor logits =
        decoder.logits(hidden.slice(1, -1)).squeeze(1).to(at::kCPU, at::kFloat).contiguous();
    input = at::empty({count, 1}, at::kInt);
    const auto vocabulary = static_cast<size_t>(logits.size(1));
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Draft& draft = drafts[static_cast<size_t>(i)];
        input.data_ptr<int32_t>()[i] = draft.ids.back();
        if (draft.ended) continue;  // what follows it is of no use
        const std::span<const float> own(logits.const_data_ptr<float>() + i * logits.size(1), vocabulary);
        const int32_t token = sample(own, options.temperature, options.top_p, draft.random);
        draft.ended = std::ranges::find(options.stop_ids, token) != options.stop_ids.end();
        if (draft.ended) continue;
        draft.ids.push_back(token);
        input.data_ptr<int32_t>()[i] = token;
      }
    });
    on_tokens();
  }
}

}  // namespace

DrawStart starts_with_word(const Tokenizer& tokenizer, const ModelSpec& spec) {
  std::vector<int32_t> words;
  for (int32_t id = 0; id < std::min(tokenizer.vocab_size(), spec.vocab); ++id)
    if (begins_word(tokenizer, id)) words.push_back(id);
  if (words.empty())
    fail(ErrorCode::kUnsupported, "no token of the vocabulary begins a word; name a text with --from");
  return [&tokenizer, words](SplitMix64& random) {
    return with_prefix(tokenizer, {words[random.below(words.size())]});
  };
}

DrawStart starts_of_lines(const Tokenizer& tokenizer, const std::string& data) {
  std::vector<std::vector<int32_t>> starts;
  const Corpus corpus = read_corpus(data);
  for (std::string_view rest = corpus.text; !rest.empty();) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    std::vector<int32_t> ids = tokenizer.encode(line, /*add_special_tokens=*/false);
    if (std::ssize(ids) >= kStartTokens) {
      ids.resize(kStartTokens);
      starts.push_back(with_prefix(tokenizer, std::move(ids)));
    }
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
  }
  if (starts.empty())
    fail(ErrorCode::kTooLittleText, "{}: no line has {} tokens; name another text", data, kStartTokens);
  return [starts](SplitMix64& random) { return starts[random.below(starts.size())]; };
}

void write_texts(const Decoder& decoder, const DrawStart& draw_start, const WriteTextsOptions& options,
                 const std::function<void(std::span<const int32_t>)>& on_text) {
  if (options.tokens < 1) fail(ErrorCode::kUsage, "{} tokens of text: expected at least 1", options.tokens);
  if (options.longest > decoder.spec().max_positions)
    fail(ErrorCode::kUsage, "texts of {} tokens are longer than the model takes: {}", options.longest,
         decoder.spec().max_positions);
  check_sampling(options.temperature, options.top_p);
  const c10::InferenceMode inference;
  SplitMix64 random(options.seed);
  log::Progress progress("text: token", options.tokens);
  for (int64_t written = 0; written < options.tokens;) {
    std::vector<Draft> drafts;
    for (int64_t left = texts_at_once(decoder, options, options.tokens - written); left > 0; --left) {
      SplitMix64 own(random.next());
      std::vector<int32_t> start = draw_start(own);
      if (std::ssize(start) >= options.longest)
        fail(ErrorCode::kUsage, "texts of {} tokens: their start alone has {}", options.longest,
             start.size());
      check_ids(decoder.spec(), start);
      drafts.push_back({.ids = std::move(start), .random = own});
    }
    finish(decoder, drafts, options,
           [&] { progress.update(std::min(options.tokens - 1, written + tokens_of(drafts))); });
    for (const Draft& draft : drafts) {
      if (written >= options.tokens) break;
      written += std::ssize(draft.ids);
      on_text(draft.ids);
    }
  }
  progress.update(options.tokens);
}

}  // namespace stbllm

#include "stbllm/eval/choices.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "stbllm/base/error.h"
#include "stbllm/text/unicode.h"

namespace stbllm {
namespace {

/// Where the white space at the end of `text` begins.
size_t end_of_words(std::string_view text) {
  size_t end = 0;
  for (size_t at = 0; at < text.size();) {
    const CodePoint point = decode_utf8(text, at);
    at += static_cast<size_t>(point.length);
    if (char_class(point.value) != CharClass::kSpace) end = at;
  }
  return end;
}

double count_characters(std::string_view text) {
  int64_t count = 0;
  for (size_t at = 0; at < text.size(); ++count) at += static_cast<size_t>(decode_utf8(text, at).length);
  return static_cast<double>(count);
}

/// The tokens that all choices begin with. The last token before a continuation is left out: what it predicts
/// is scored.
int64_t shared_tokens(const std::vector<ChoiceTokens>& choices) {
  const std::vector<int32_t>& first = choices.front().ids;
  auto shared = std::ssize(first);
  for (const ChoiceTokens& choice : choices) {
    const auto differs = std::ranges::mismatch(first, choice.ids).in1;
    shared = std::min({shared, differs - first.begin(), std::ssize(choice.ids) - choice.scored - 1});
  }
  return shared;
}

/// 1 where the highest of `scores` belongs to a right choice; of equal ones the first counts.
double is_right(const std::vector<double>& scores, const std::vector<int64_t>& gold) {
  const int64_t best = std::ranges::max_element(scores) - scores.begin();
  return std::ranges::find(gold, best) != gold.end() ? 1 : 0;
}

}  // namespace

ChoiceTokens tokens_of(const Choice& choice, const Tokenizer& tokenizer, int64_t max_positions) {
  ChoiceTokens tokens;
  if (choice.context.empty()) {
    const std::vector<int32_t> continuation =
        tokenizer.encode(choice.continuation, /*add_special_tokens=*/false);
    const int32_t start = tokenizer.prefix().empty() ? tokenizer.eos_id() : tokenizer.prefix().front();
    if (start < 0)
      fail(ErrorCode::kUnsupported,
           "a question without a context needs a token that begins or ends a text, and the tokenizer has "
           "none");
    if (continuation.empty() || continuation.front() != start) tokens.ids.push_back(start);
    tokens.ids.insert(tokens.ids.end(), continuation.begin(), continuation.end());
    tokens.scored = std::ssize(tokens.ids) - 1;
  } else {
    const std::string context = choice.context.substr(0, end_of_words(choice.context));
    tokens.ids = tokenizer.encode(choice.context + choice.continuation);
    tokens.scored = std::ssize(tokens.ids) - std::ssize(tokenizer.encode(context));
  }
  if (tokens.scored < 1 || tokens.scored >= std::ssize(tokens.ids))
    fail(ErrorCode::kUnsupported, "the continuation '{}' has no tokens of its own behind its context",
         choice.continuation);
  const int64_t surplus = std::ssize(tokens.ids) - max_positions;
  if (tokens.scored >= max_positions)
    fail(ErrorCode::kUnsupported, "a continuation has {} tokens, and the model takes {}", tokens.scored,
         max_positions);
  if (surplus > 0) tokens.ids.erase(tokens.ids.begin(), tokens.ids.begin() + surplus);
  return tokens;
}

std::vector<double> log_likelihoods(const Decoder& decoder, const std::vector<ChoiceTokens>& choices) {
  const c10::InferenceMode inference;
  const auto count = std::ssize(choices);
  const int64_t shared = shared_tokens(choices);
  int64_t longest = 0;
  for (const ChoiceTokens& choice : choices) {
    check_ids(decoder.spec(), choice.ids);
    longest = std::max(longest, std::ssize(choice.ids));
  }

  std::optional<KeyValueCache> cache;
  if (shared > 0) {
    KeyValueCache prefix = decoder.make_cache(1, shared);
    const at::Tensor ids =
        at::tensor(at::ArrayRef<int32_t>(choices.front().ids.data(), static_cast<size_t>(shared)), at::kInt);
    decoder.forward(ids.unsqueeze(0), &prefix);
    cache = prefix.repeated(count, longest);
  }
  // Shorter choices are filled up behind their end, where no token of theirs looks.
  at::Tensor rest = at::zeros({count, longest - shared}, at::kInt);
  for (int64_t c = 0; c < count; ++c) {
    const std::vector<int32_t>& ids = choices[static_cast<size_t>(c)].ids;
    std::copy(ids.begin() + shared, ids.end(), rest[c].data_ptr<int32_t>());
  }
  const at::Tensor hidden = decoder.forward(rest, cache ? &*cache : nullptr);
  std::vector<double> result;
  for (int64_t c = 0; c < count; ++c) {
    const ChoiceTokens& choice = choices[static_cast<size_t>(c)];
    const std::vector<int32_t> own(choice.ids.begin() + shared, choice.ids.end());
    const at::Tensor nll = token_nll(decoder, hidden[c].slice(0, 0, std::ssize(own)), own,
                                     /*first_token=*/std::ssize(own) - choice.scored);
    result.push_back(-nll.sum().item<double>());
  }
  return result;
}

Answers answer(const Decoder& decoder, const Tokenizer& tokenizer, const std::vector<Question>& questions,
               const std::function<void(int64_t done)>& on_question) {
  Answers answers;
  for (const Question& question : questions) {
    std::vector<ChoiceTokens> choices;
    for (const Choice& choice : question.choices)
      choices.push_back(tokens_of(choice, tokenizer, decoder.spec().max_positions));
    const std::vector<double> likelihoods = log_likelihoods(decoder, choices);
    std::vector<double> by_character, by_byte, by_token;
    for (size_t c = 0; c < choices.size(); ++c) {
      std::string_view text = question.choices[c].continuation;
      if (text.size() > 1 && text.front() == ' ') text.remove_prefix(1);
      by_character.push_back(likelihoods[c] / count_characters(text));
      by_byte.push_back(likelihoods[c] / static_cast<double>(text.size()));
      by_token.push_back(likelihoods[c] / static_cast<double>(choices[c].scored));
    }
    answers.acc.push_back(is_right(likelihoods, question.gold));
    answers.acc_norm.push_back(is_right(by_character, question.gold));
    answers.acc_bytes.push_back(is_right(by_byte, question.gold));
    answers.acc_tokens.push_back(is_right(by_token, question.gold));
    answers.log_likelihoods.push_back(likelihoods);
    if (on_question) on_question(std::ssize(answers.acc));
  }
  return answers;
}

}  // namespace stbllm

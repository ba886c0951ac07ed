// tokenizer.json: what it makes of a text, and of all ids.

#include <nlohmann/json.hpp>
#include <numeric>
#include <vector>

#include "fuzz/fuzz_target.h"
#include "stbllm/text/tokenizer.h"

STBLLM_FUZZ_TARGET(tokenizer_json) {
  stbllm::fuzz::allow_error([&] {
    const nlohmann::json files = {{"tokenizer.json", stbllm::fuzz::text_of(bytes)}};
    std::string serialized;
    try {
      serialized = files.dump();
    } catch (const nlohmann::json::exception&) {
      return;  // no UTF-8, which the directory's reader refuses as well
    }
    const auto tokenizer = stbllm::Tokenizer::from_serialized(serialized);
    const auto ids = tokenizer->encode("Hello  wörld, it's 2024!\n\t<s>the end</s> \u4f60\u597d");
    tokenizer->decode(ids);
    std::vector<int32_t> all(static_cast<size_t>(std::min<int64_t>(tokenizer->vocab_size(), 1000)));
    std::iota(all.begin(), all.end(), -1);
    tokenizer->decode(all);
  });
}

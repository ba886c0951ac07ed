#pragma once
// Texts that a model writes by itself, as lines of JSON.

#include <filesystem>
#include <string>

#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/eval/write_texts.h"
#include "stbllm/model/load_model.h"

namespace stbllm {

struct WrittenTexts {
  std::string lines;  ///< an object with "text" per line, with what `remark` says in the first
  int64_t texts = 0, tokens = 0;
};

/// Texts of `model` that begin with words of its vocabulary or, where `from` names a text, with the first
/// words of its lines.
WrittenTexts write_lines(const LoadedModel& model, const std::string& from, WriteTextsOptions options,
                         const nlohmann::json& remark = nlohmann::json::object());

/// The file behind --calib self: what the checkpoint wrote, at least `tokens` tokens, as
/// <name of the checkpoint>.self.jsonl in `directory`. Where it is not there the model writes it, on the CPU.
/// Throws Error(kExists) where another model has written it, or too little, and Error(kUsage) where several
/// processes would have to write it.
std::filesystem::path self_text(const Checkpoint& checkpoint, const std::filesystem::path& directory,
                                int64_t tokens);

}  // namespace stbllm

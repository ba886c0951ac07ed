#include "self_text.h"

#include <algorithm>

#include "stbllm/base/error.h"
#include "stbllm/base/json_fields.h"
#include "stbllm/base/log.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/base/text_file.h"
#include "stbllm/processes/process_group.h"
#include "stbllm/run/fingerprint.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

constexpr const char* kRemark = "written_by";

/// What the first line of a file says of who wrote it; null where it says nothing.
nlohmann::json remark_of(const fs::path& path) {
  const std::string text = read_text(path);
  const nlohmann::json first = try_parse_json(text.substr(0, text.find('\n')));
  return first.is_object() && first.contains(kRemark) ? first[kRemark] : nlohmann::json();
}

void check_written(const fs::path& path, const std::string& weights, int64_t tokens) {
  const nlohmann::json remark = remark_of(path);
  if (!remark.is_object() || remark.value("weights", "") != weights)
    fail(ErrorCode::kExists,
         "{}: this is not what the checkpoint has written; move it, or name a text with --calib",
         path.string());
  const auto there = remark.contains("tokens") ? integer_of(remark["tokens"]).value_or(0) : 0;
  if (there < tokens)
    fail(ErrorCode::kExists,
         "{}: {} tokens, and {} are wanted; remove it, so that the model writes more, or ask for fewer "
         "windows",
         path.string(), there, tokens);
}

}  // namespace

WrittenTexts write_lines(const LoadedModel& model, const std::string& from, WriteTextsOptions options,
                         const nlohmann::json& remark) {
  const ModelSpec& spec = model.decoder.spec();
  options.longest = std::min(options.longest, spec.max_positions);
  options.stop_ids = model.stop_ids();
  const DrawStart draw_start =
      from.empty() ? starts_with_word(*model.tokenizer, spec) : starts_of_lines(*model.tokenizer, from);
  WrittenTexts written;
  nlohmann::json line = remark;
  write_texts(model.decoder, draw_start, options, [&](std::span<const int32_t> ids) {
    line["text"] = model.tokenizer->decode(ids);
    written.lines += line.dump() + "\n";
    line = nlohmann::json::object();
    ++written.texts;
    written.tokens += std::ssize(ids);
  });
  return written;
}

fs::path self_text(const Checkpoint& checkpoint, const fs::path& directory, int64_t tokens) {
  const std::string name = fs::canonical(checkpoint.directory()).filename().string();
  const fs::path path = directory / (name + ".self.jsonl");
  const std::string weights = weights_checksum(checkpoint, ModelSpec::from_checkpoint(checkpoint));
  if (std::error_code ignored; fs::exists(path, ignored)) {
    check_written(path, weights, tokens);
    return path;
  }
  if (ProcessGroup::from_environment().size() > 1)
    fail(ErrorCode::kUsage,
         "{}: the text of the model is not there, and several processes cannot write it; write one with "
         "'stbllm write-text' and name it with --calib",
         path.string());
  log::info("{}: the model writes {} tokens of text to calibrate on", path.string(), tokens);
  const LoadedModel model =
      load_model(checkpoint.directory().string(), "cpu", "bfloat16", /*keep_blocks=*/true);
  const WrittenTexts written =
      write_lines(model, "", {.tokens = tokens}, {{kRemark, {{"weights", weights}, {"tokens", tokens}}}});
  write_text(path, written.lines);
  return path;
}

}  // namespace stbllm

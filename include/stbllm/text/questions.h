#pragma once
// Multiple-choice questions, in the JSON lines that lm-evaluation-harness writes with --log_samples: its own
// prompts, few-shot examples and choices, word for word.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace stbllm {

/// One answer to choose: what the model reads, and what it is to go on with.
struct Choice {
  std::string context, continuation;
};

struct Question {
  std::vector<Choice> choices;  ///< two or more
  std::vector<int64_t> gold;    ///< the right ones, one as a rule
};

/// The questions of one task.
struct QuestionSet {
  std::string task;
  std::vector<Question> questions;
};

/// Reads a .jsonl file of one object per line, with
///   "arguments"  [[context, continuation], ...], or {"gen_args_0": {"arg_0": context, "arg_1":
///                continuation}, ...} as the harness writes them;
///   "gold"       the number of the right choice from 0 on; where it is missing,
///   "target"     that number, a list of such numbers, or the continuation itself, as the harness has it.
/// Where all continuations are alike and the contexts differ (WinoGrande), "doc"."answer" takes the place of
/// "target" and counts the choices from 1 on.
/// The name of the task is "task" of the first line, or NAME of a file samples_NAME_DATE.jsonl, or the file's
/// name. At most `limit` questions when that is positive. Throws Error(kNotFound), Error(kCorrupt) with the
/// line, and Error(kUnsupported) for requests that are no multiple choice.
QuestionSet read_questions(const std::filesystem::path& path, int64_t limit = 0);

}  // namespace stbllm

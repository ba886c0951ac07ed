// The program as a user meets it: its output, its errors, its exit codes, and what it leaves on disk.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "child_process.h"
#include "stbllm/base/error.h"
#include "stbllm/model/load_model.h"
#include "support/calibration_text.h"
#include "support/expect_error.h"
#include "support/files.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm::test {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
using Args = std::vector<std::string>;

const char* const kSubcommands[] = {"quantize",   "plan",    "info",     "eval-ppl",  "compare",
                                    "eval-tasks", "inspect", "generate", "write-text"};

/// A tiny checkpoint, a text, and a directory `results` that starts empty.
class Cli : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::string(STBLLM_BINARY).empty()) GTEST_SKIP() << "the program was not built";
    write_checkpoint(checkpoint_, model_);
    fs::create_directory(results_);
    text_ = write_calibration_text(scratch_.path());
  }

  /// quantize to results/`output`, calibrated on text_, then more options.
  Args quantize(const std::string& output, const Args& more = {}) const {
    Args args = {
        "quantize", checkpoint_.string(), "-o", (results_ / output).string(), "--calib", text_, "--nsamples",
        "8",        "--seqlen",           "48"};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }

  /// `args` fail with `code` and one line on stderr that has `part`, nothing on stdout and nothing new in
  /// results.
  void expect_fault(const Args& args, ErrorCode code, const std::string& part,
                    int64_t largest_file = 0) const {
    const auto before = list(results_);
    const Outcome outcome = run_program(args, largest_file);
    EXPECT_EQ(outcome.status, static_cast<int>(code)) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    const auto lines = lines_of(outcome.err);
    EXPECT_EQ(
        std::ranges::count_if(lines, [](const std::string& line) { return line.find(" E] ") != line.npos; }),
        1)
        << outcome.err;
    EXPECT_THAT(lines.empty() ? "" : lines.back(), HasSubstr(part));
    EXPECT_EQ(list(results_), before);
  }

  TinyModel model_ = tiny_llama();
  ScratchDirectory scratch_;
  const fs::path checkpoint_ = scratch_ / "checkpoint", results_ = scratch_ / "results";
  std::string text_;
};

// --- help ---------------------------------------------------------------------------------------------

TEST_F(Cli, HelpNamesEverySubcommandAndExitCode) {
  const Outcome help = run_program({"--help"});
  EXPECT_EQ(help.status, 0);
  EXPECT_EQ(help.err, "");
  for (const std::string name : kSubcommands) EXPECT_THAT(help.out, HasSubstr(name));
  EXPECT_THAT(help.out, HasSubstr("130 interrupted"));
}

TEST_F(Cli, EverySubcommandExplainsItself) {
  for (const std::string name : kSubcommands) {
    const Outcome help = run_program({name, "--help"});
    EXPECT_EQ(help.status, 0) << name;
    EXPECT_EQ(help.err, "") << name;
    EXPECT_THAT(help.out, HasSubstr("--threads")) << name;
    EXPECT_THAT(help.out, HasSubstr("--json")) << name;
  }
}

TEST_F(Cli, PrintsItsVersion) {
  const Outcome version = run_program({"--version"});
  EXPECT_EQ(version.status, 0);
  EXPECT_THAT(version.out, testing::StartsWith("stbllm " STBLLM_VERSION " ("));
  EXPECT_THAT(version.out, HasSubstr("libtorch 2."));
  EXPECT_THAT(version.out, HasSubstr("backends reference, "));
}

// --- messages -------------------------------------------------------------------------------------------

TEST_F(Cli, QuietPrintsTheResultAlone) {
  const Outcome quantized = run_program(quantize("packed.safetensors", {"--quiet"}));
  ASSERT_EQ(quantized.status, 0) << quantized.err;
  EXPECT_EQ(quantized.err, "");
  EXPECT_THAT(quantized.out, HasSubstr("packed.safetensors"));
}

TEST_F(Cli, ProgressIsThatOfTheWholeRun) {
  const Outcome logged = run_program(quantize("logged.safetensors"));
  ASSERT_EQ(logged.status, 0) << logged.err;
  EXPECT_THAT(logged.err, HasSubstr(" left of the run"));

  // On a terminal it is one line, written again and again; what is behind its last version is a message.
  std::string command = STBLLM_BINARY;
  for (const std::string& arg : quantize("shown.safetensors")) command += " " + arg;
  const std::string shown = output_of("script -qec '" + command + "' /dev/null");
  EXPECT_THAT(shown, HasSubstr("\r\033[K[#"));
  EXPECT_THAT(shown, testing::ContainsRegex(" %  [0-9]+m[0-9]+s left  quantize: linear 1"));
  EXPECT_THAT(shown, testing::Not(testing::ContainsRegex("left  quantize[^\r\n]*\r\n")));
}

// --- the whole job --------------------------------------------------------------------------------------

TEST_F(Cli, WritesATextToCalibrateOn) {
  const std::string own = (results_ / "own.jsonl").string();
  const Args write = {"write-text", checkpoint_.string(), "-o", own,     "-n",
                      "600",        "--longest",          "48", "--json"};
  const Outcome written = run_program(write);
  ASSERT_EQ(written.status, 0) << written.err;
  const auto summary = nlohmann::json::parse(written.out);
  EXPECT_GE(summary["tokens"], 600);
  const auto lines = lines_of(read_all(own));
  ASSERT_EQ(lines.size(), summary["texts"]);
  for (const std::string& line : lines) EXPECT_TRUE(nlohmann::json::parse(line)["text"].is_string());

  Args quantized = quantize("own.safetensors");
  *std::ranges::find(quantized, text_) = own;
  EXPECT_EQ(run_program(quantized).status, 0);

  Args from_lines = write;
  from_lines.insert(from_lines.end(), {"--from", text_, "--force"});
  EXPECT_EQ(run_program(from_lines).status, 0);
  EXPECT_NE(lines_of(read_all(own)), lines);
  expect_fault(write, ErrorCode::kExists, "--force");
  expect_fault({"write-text", checkpoint_.string(), "-o", (results_ / "own.txt").string()}, ErrorCode::kUsage,
               ".jsonl");
}

TEST_F(Cli, CalibratesOnWhatTheModelWritesAndKeepsIt) {
  Args args = quantize("packed.safetensors");
  args.insert(args.end(), {"--calib", "self"});
  const Outcome quantized = run_program(args);
  ASSERT_EQ(quantized.status, 0) << quantized.err;
  const fs::path own = results_ / "checkpoint.self.jsonl";
  const std::string written = read_all(own);
  EXPECT_EQ(nlohmann::json::parse(lines_of(written).front())["written_by"]["tokens"], (4 + 1) * 48 * 17 / 16);

  // It serves again, unless it is too short or another model's.
  args[3] = (results_ / "again.safetensors").string();
  EXPECT_EQ(run_program(args).status, 0);
  EXPECT_EQ(read_all(own), written);
  EXPECT_EQ(read_all(results_ / "again.safetensors"), read_all(results_ / "packed.safetensors"));
  args[3] = (results_ / "more.safetensors").string();
  Args more = args;
  more.insert(more.end(), {"--nsamples", "80"});
  more.erase(more.begin() + 6, more.begin() + 8);  // the first --nsamples
  expect_fault(more, ErrorCode::kExists, "tokens, and");
  write_all(own, "{\"text\": \"of another\"}\n");
  expect_fault(args, ErrorCode::kExists, "not what the checkpoint has written");
}

TEST_F(Cli, QuantizesInspectsEvaluatesAndGenerates) {
  const std::string packed = (results_ / "packed.safetensors").string();
  const Outcome quantized = run_program(
      quantize("packed.safetensors", {"--json", "--report", (scratch_ / "report.json").string()}));
  ASSERT_EQ(quantized.status, 0) << quantized.err;
  const auto summary = nlohmann::json::parse(quantized.out);
  EXPECT_EQ(summary["output"], packed);
  EXPECT_EQ(summary["file_bytes"], fs::file_size(packed));
  EXPECT_EQ(list(results_), Args{"packed.safetensors"});
  EXPECT_EQ(nlohmann::json::parse(read_all(scratch_ / "report.json"))["linears"].size(), 14u);

  const Outcome inspected = run_program({"inspect", packed, "--verify", "--json"});
  ASSERT_EQ(inspected.status, 0) << inspected.err;
  EXPECT_EQ(inspected.err, "");
  const auto ledger = nlohmann::json::parse(inspected.out);
  EXPECT_EQ(ledger["linears"].size(), 14u);
  EXPECT_EQ(ledger["verified"], true);
  EXPECT_EQ(ledger["stored_bits"], summary["stored_bits"]);
  const Outcome table = run_program({"inspect", packed});
  EXPECT_EQ(table.status, 0);
  EXPECT_THAT(table.out, HasSubstr("model.layers.1.mlp.down_proj"));

  for (const std::string& model : {packed, checkpoint_.string()}) {
    const Outcome evaluated =
        run_program({"eval-ppl", model, "--data", text_, "--seqlen", "48", "--windows", "5", "--json"});
    ASSERT_EQ(evaluated.status, 0) << evaluated.err;
    const auto result = nlohmann::json::parse(evaluated.out);
    EXPECT_EQ(result["windows"], 5);
    EXPECT_EQ(result["tokens"], 5 * 47);
    EXPECT_NEAR(result["perplexity"].get<double>(), std::exp(result["mean_nll"].get<double>()),
                1e-9 * result["perplexity"].get<double>());
    EXPECT_GT(result["mean_nll"], 0);
    const bool same_text = model == packed;
    EXPECT_EQ(evaluated.err.find("calibrated on the text") != std::string::npos, same_text) << evaluated.err;
  }

  const Args generate = {"generate", packed, "--prompt", "the cat", "-n", "5", "--seed", "3"};
  Args generate_json = generate;
  generate_json.push_back("--json");
  const Outcome generated = run_program(generate_json);
  ASSERT_EQ(generated.status, 0) << generated.err;
  const auto continuation = nlohmann::json::parse(generated.out);
  EXPECT_GE(continuation["ids"].size(), 1u);
  EXPECT_LE(continuation["ids"].size(), 5u);
  const Outcome shown = run_program(generate);
  EXPECT_EQ(shown.status, 0);
  EXPECT_TRUE(shown.out.starts_with("the cat")) << shown.out;
  EXPECT_EQ(shown.out, run_program(generate).out);
}

TEST_F(Cli, PrintsNothingButTheResultWhenQuiet) {
  const Outcome quantized = run_program(quantize("packed", {"--log-level", "warning"}));
  EXPECT_EQ(quantized.status, 0);
  EXPECT_EQ(quantized.err, "");
  EXPECT_TRUE(quantized.out.starts_with((results_ / "packed").string() + "\n")) << quantized.out;
}

TEST_F(Cli, FieldsOfTheRecipeAreOverridden) {
  ASSERT_EQ(
      run_program(quantize("packed", {"--recipe", "rtn", "--nm", "6:8", "--set", "method.column_block=64"}))
          .status,
      0);
  const auto ledger =
      nlohmann::json::parse(run_program({"inspect", (results_ / "packed").string(), "--json"}).out);
  EXPECT_EQ(ledger["recipe"]["model"]["nm"], "6:8");
  EXPECT_EQ(ledger["recipe"]["method"]["column_block"], 64);
  EXPECT_EQ(ledger["density"], 0.75);
}

TEST_F(Cli, EffortDecidesWhichStagesRun) {
  const auto epochs = [&](const std::string& effort) {
    const Outcome quantized = run_program(quantize(effort, {"--effort", effort, "--json"}));
    EXPECT_EQ(quantized.status, 0) << quantized.err;
    const auto training = nlohmann::json::parse(quantized.out)["recipe"]["training"];
    const auto of = [&](const char* stage) {
      return training[stage].is_null() ? 0 : training[stage]["epochs"].get<int>();
    };
    return std::pair(of("tune"), of("distill"));
  };
  EXPECT_EQ(epochs("fast"), std::pair(0, 0));
  EXPECT_EQ(epochs("best"), std::pair(1, 1));
  const Outcome alone = run_program(quantize("alone", {"--effort", "best", "--set", "training.tune=null",
                                                       "--set", "training.distill.lr=0.01", "--json"}));
  ASSERT_EQ(alone.status, 0) << alone.err;
  const auto training = nlohmann::json::parse(alone.out)["recipe"]["training"];
  EXPECT_TRUE(training["tune"].is_null());
  EXPECT_EQ(training["distill"]["lr"], 0.01);
  expect_fault(quantize("x", {"--effort", "much"}), ErrorCode::kUsage, "--effort");
  expect_fault(quantize("x", {"--distill-nsamples", "4"}), ErrorCode::kUsage, "nothing is distilled");
}

TEST_F(Cli, TargetsBoundBitsAndBytes) {
  const auto quantized = [&](const std::string& name, const std::string& option, const std::string& target) {
    const Outcome outcome = run_program(quantize(name, {"--recipe", "stbllm", "--json", option, target}));
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return nlohmann::json::parse(outcome.out);
  };
  const auto bits = quantized("bits", "--target-bpw", "1.9");
  EXPECT_EQ(bits["recipe"]["model"]["allocation"], "budget");
  EXPECT_LE(bits["stored_bits"], 1.9);
  const int64_t size = bits["file_bytes"];
  const auto bytes =
      quantized("bytes", "--target-size", fmt::format("{:.3f}k", static_cast<double>(size) / 1000));
  EXPECT_LE(bytes["file_bytes"], size);
  EXPECT_EQ(fs::file_size(results_ / "bytes"), bytes["file_bytes"].get<uintmax_t>());
  expect_fault(quantize("x", {"--target-size", "1000"}), ErrorCode::kUsage, "--target-size");
  expect_fault(quantize("x", {"--target-bpw", "0.01"}), ErrorCode::kUsage, "smallest schemes");
  expect_fault(quantize("x", {"--target-bpw", "0.01", "--dry-run"}), ErrorCode::kUsage, "smallest schemes");
  expect_fault(quantize("x", {"--target-bpw", "1", "--target-size", "1000000"}), ErrorCode::kUsage,
               "--target");
}

TEST_F(Cli, DenseExportIsACheckpoint) {
  ASSERT_EQ(run_program(quantize("dense", {"--dense"})).status, 0);
  EXPECT_EQ(list(results_), Args{"dense"});
  EXPECT_EQ(
      run_program({"eval-ppl", (results_ / "dense").string(), "--data", text_, "--seqlen", "48"}).status, 0);
}

TEST_F(Cli, ExportsAPackedFile) {
  ASSERT_EQ(run_program(quantize("packed", {})).status, 0);
  const std::string packed = (results_ / "packed").string(), directory = (results_ / "hf").string(),
                    gguf = (results_ / "model.gguf").string();
  EXPECT_EQ(run_program({"export", packed, directory, "--to", "hf"}).status, 0);
  EXPECT_EQ(run_program({"eval-ppl", directory, "--data", text_, "--seqlen", "48"}).status, 0);
  const Outcome exported = run_program({"export", packed, gguf, "--to", "gguf", "--dequantize", "--json"});
  EXPECT_EQ(exported.status, 0);
  EXPECT_EQ(nlohmann::json::parse(exported.out)["bytes"], fs::file_size(gguf));

  expect_fault({"export", packed, gguf}, ErrorCode::kUsage, "--to");
  expect_fault({"export", packed, gguf, "--to", "onnx"}, ErrorCode::kUsage, "onnx");
  expect_fault({"export", directory, gguf, "--to", "gguf"}, ErrorCode::kUsage, "found a directory");
  expect_fault({"export", packed + "x", gguf, "--to", "gguf"}, ErrorCode::kNotFound, "packedx");
  expect_fault({"export", packed, gguf, "--to", "gguf", "--force"}, ErrorCode::kUnsupported, "--dequantize");
  for (const char* to : {"hf", "gguf"})
    expect_fault({"export", packed, packed, "--to", to, "--force"}, ErrorCode::kUsage, "choose another path");
  expect_fault({"export", packed, directory, "--to", "gguf"}, ErrorCode::kUsage, "a directory is there");
  expect_fault({"export", packed, directory, "--to", "hf"}, ErrorCode::kExists, "--force");
  EXPECT_EQ(run_program({"export", packed, directory, "--to", "hf", "--force"}).status, 0);
}

TEST_F(Cli, ComparesModelsWithTheFirstOne) {
  ASSERT_EQ(run_program(quantize("packed", {})).status, 0);
  const std::string packed = (results_ / "packed").string(), dense = checkpoint_.string();
  const Outcome compared =
      run_program({"compare", dense, packed, dense, "--data", text_, "--seqlen", "48", "--json"});
  ASSERT_EQ(compared.status, 0) << compared.err;
  const auto json = nlohmann::json::parse(compared.out);
  EXPECT_EQ(json["reference"]["model"], dense);
  ASSERT_EQ(json["models"].size(), 2u);
  EXPECT_GT(json["models"][0]["kl"], 0);
  EXPECT_EQ(json["models"][0]["window_kl"].size(), json["windows"].get<size_t>());
  EXPECT_EQ(json["models"][1]["kl"], 0);
  EXPECT_EQ(json["models"][1]["nll_difference"], 0);
  const Outcome evaluated =
      run_program({"eval-ppl", packed, "--kl", dense, "--data", text_, "--seqlen", "48", "--json"});
  EXPECT_EQ(nlohmann::json::parse(evaluated.out)["kl"], json["models"][0]["kl"]);
  expect_fault({"compare", dense, "--data", text_}, ErrorCode::kUsage, "models");
}

TEST_F(Cli, JudgesTasksAgainstAnotherModel) {
  ASSERT_EQ(run_program(quantize("packed", {})).status, 0);
  const std::string packed = (results_ / "packed").string(), dense = checkpoint_.string();
  const std::string requests = (scratch_ / "samples_quiz_2026-01-02T03-04-05.jsonl").string();
  write_all(requests, R"({"target": "1", "arguments": [["the sun", " and"], ["the sun", " in"]]})"
                      "\n"
                      R"({"target": "0", "arguments": [["a cat", " on"], ["a cat", " at the"]]})"
                      "\n");
  const Outcome judged = run_program({"eval-tasks", packed, requests, "--against", dense, "--json"});
  ASSERT_EQ(judged.status, 0) << judged.err;
  const auto task = nlohmann::json::parse(judged.out)["tasks"][0];
  EXPECT_EQ(task["task"], "quiz");
  EXPECT_EQ(task["questions"], 2);
  EXPECT_EQ(task["log_likelihoods"].size(), 2u);
  EXPECT_NEAR(task["acc"]["difference"], double{task["acc"]["value"]} - double{task["acc"]["reference"]},
              1e-12);
  EXPECT_THAT(run_program({"eval-tasks", dense, requests}).out, HasSubstr("acc_norm"));
  expect_fault({"eval-tasks", dense, (scratch_ / "none.jsonl").string()}, ErrorCode::kNotFound, "none.jsonl");
}

TEST_F(Cli, TakesOptionsFromAFile) {
  const std::string config = (scratch_ / "options.ini").string();
  write_all(config, "[eval-ppl]\nseqlen = 48\nwindows = 3\n");
  const Outcome evaluated =
      run_program({"--config", config, "eval-ppl", checkpoint_.string(), "--data", text_, "--json"});
  ASSERT_EQ(evaluated.status, 0) << evaluated.err;
  EXPECT_EQ(nlohmann::json::parse(evaluated.out)["windows"], 3);
  expect_fault({"--config", (scratch_ / "none.ini").string(), "eval-ppl", checkpoint_.string()},
               ErrorCode::kUsage, "none.ini");
  for (const char* mistyped : {"[eval-ppl]\nseq_len = 48\n", "[eval-pple]\nseqlen = 48\n", "windows = 3\n"}) {
    write_all(config, mistyped);
    expect_fault({"--config", config, "eval-ppl", checkpoint_.string(), "--data", text_}, ErrorCode::kUsage,
                 "INI");
  }
}

TEST_F(Cli, WarnsOfATextThatItWasPartlyCalibratedOn) {
  ASSERT_EQ(run_program(quantize("packed")).status, 0);
  const std::string part = (scratch_ / "part.txt").string(), text = read_all(text_);
  write_all(part, text.substr(text.size() / 4));
  const Outcome evaluated =
      run_program({"eval-ppl", (results_ / "packed").string(), "--data", part, "--seqlen", "48"});
  EXPECT_THAT(evaluated.err, HasSubstr("was calibrated on parts of this text"));
}

TEST_F(Cli, WritesAPlanThatQuantizeFollows) {
  const std::string plan = (results_ / "plan.json").string();
  const Args windows = {"--calib", text_, "--nsamples", "8", "--seqlen", "48"};
  Args args = {"plan",   checkpoint_.string(), "-o",    plan, "--target-bpw", "1.7",
               "--keep", "*.o_proj",           "--json"};
  args.insert(args.end(), windows.begin(), windows.end());
  const Outcome planned = run_program(args);
  ASSERT_EQ(planned.status, 0) << planned.err;
  const auto summary = nlohmann::json::parse(planned.out);
  EXPECT_LE(summary["stored_bits"], 1.7);
  EXPECT_LT(summary["quantized_share"], 1);
  expect_fault(args, ErrorCode::kExists, "--force");
  const Outcome quantized = run_program(quantize("packed", {"--plan", plan, "--json"}));
  ASSERT_EQ(quantized.status, 0) << quantized.err;
  EXPECT_LE(nlohmann::json::parse(quantized.out)["stored_bits"], summary["stored_bits"]);
  const Outcome inspected = run_program({"inspect", (results_ / "packed").string(), "--json"});
  const auto ledger = nlohmann::json::parse(inspected.out);
  EXPECT_EQ(ledger["kept_linears"].size(), 2u);
  EXPECT_EQ(ledger["kept_linears"][0]["name"], "model.layers.0.self_attn.o_proj.weight");
  expect_fault(quantize("other", {"--plan", plan, "--nm", "2:4"}), ErrorCode::kUsage, "--nm");
  expect_fault(quantize("other", {"--plan", text_}), ErrorCode::kUsage, "not JSON");
  const std::string no_plan = (scratch_ / "no_plan.json").string();
  write_all(no_plan, "{}");
  expect_fault(quantize("other", {"--plan", no_plan}), ErrorCode::kUsage, "no plan");
  expect_fault(quantize("other", {"--code", "2:4"}), ErrorCode::kUsage, "GLOB=N:M");
}

TEST_F(Cli, SaysWhatEachPresetWouldCost) {
  const Outcome info = run_program(
      {"info", checkpoint_.string(), "--calib", text_, "--nsamples", "8", "--seqlen", "48", "--json"});
  ASSERT_EQ(info.status, 0) << info.err;
  const auto json = nlohmann::json::parse(info.out);
  EXPECT_EQ(json["model"]["architecture"], "LlamaForCausalLM");
  EXPECT_EQ(json["model"]["linears"], 14);
  for (const auto& preset : json["presets"]) {
    EXPECT_NE(preset["name"], "stbllm-released");  // has no packed form
    EXPECT_GT(preset["file_bytes"], 0);
    EXPECT_GT(preset["peak_memory_bytes"], preset["file_bytes"]);
  }
  EXPECT_EQ(json["presets"].size(), 8u);
}

TEST_F(Cli, MinutesBecomeTrainingThatCanBeHadAgain) {
  const Outcome first = run_program(quantize("timed", {"--minutes", "0.2"}));
  ASSERT_EQ(first.status, 0) << first.err;
  // "--minutes 0.2: as --nsamples 8 --seqlen 48 --distill-nsamples 70 --set training.distill.epochs=4"
  const std::string said = first.err.substr(first.err.find("--distill-nsamples"));
  Args again;
  std::istringstream words(said.substr(0, said.find('\n')));
  for (std::string word; words >> word;) again.push_back(word);
  ASSERT_EQ(again.size(), 4u) << first.err;
  ASSERT_EQ(run_program(quantize("again", again)).status, 0);
  EXPECT_EQ(read_all(results_ / "again"), read_all(results_ / "timed"));

  // Time for more windows than the model has written becomes epochs over those.
  const Outcome own = run_program(quantize("own", {"--minutes", "0.2", "--calib", "self"}));
  ASSERT_EQ(own.status, 0) << own.err;
  EXPECT_THAT(own.err, HasSubstr("--distill-nsamples 8 "));

  const Outcome fast = run_program(quantize("fast", {"--minutes", "0.0001"}));
  EXPECT_EQ(fast.status, 0);
  EXPECT_NE(fast.err.find("no time to train"), std::string::npos) << fast.err;
}

TEST_F(Cli, ATrainingThatGainsNothingSaysSo) {
  // Rates so small that nothing moves.
  const Outcome trained = run_program(
      quantize("still", {"--set", "training.distill.epochs=1", "--set", "training.distill.lr=1e-12", "--set",
                         "training.distill.code_lr=1e-12"}));
  ASSERT_EQ(trained.status, 0) << trained.err;
  EXPECT_THAT(trained.out, HasSubstr("training gained nothing"));
}

// --- faults -----------------------------------------------------------------------------------------------

TEST_F(Cli, UsageFaults) {
  expect_fault({"quantize"}, ErrorCode::kUsage, "checkpoint");
  expect_fault({"frobnicate"}, ErrorCode::kUsage, "--help");
  expect_fault(quantize("packed", {"--frobnicate"}), ErrorCode::kUsage, "--frobnicate");
  expect_fault(quantize("packed", {"--threads", "many"}), ErrorCode::kUsage, "--threads");
  expect_fault(quantize("packed", {"--log-level", "loud"}), ErrorCode::kUsage, "--log-level loud");
  expect_fault(quantize("packed", {"--recipe", "magic"}), ErrorCode::kUsage, "--recipe magic: expected");
  expect_fault(quantize("packed", {"--nm", "9:8"}), ErrorCode::kUsage, "9:8");
  expect_fault(quantize("packed", {"--nm", "3:5"}), ErrorCode::kUsage, "3:5");
  expect_fault(quantize("packed", {"--set", "frobnicate=1"}), ErrorCode::kUsage, "frobnicate");
  expect_fault(quantize("packed", {"--set", "model.levels=many"}), ErrorCode::kUsage, "model.levels");
  expect_fault(quantize("packed", {"--set", "model.levels=7"}), ErrorCode::kUsage, "model.levels");
  for (const char* value : {"2.7", "true", "4294967298"})  // none of them becomes a number that fits
    expect_fault(quantize("packed", {"--recipe", "stbllm", "--set", std::string("model.levels=") + value}),
                 ErrorCode::kUsage, value);
  expect_fault(quantize("packed", {"--set", "=1"}), ErrorCode::kUsage, "FIELD=VALUE");
  expect_fault(quantize("packed", {"--set", "refit=2"}), ErrorCode::kUsage, "is now 'method.refit'");
}

TEST_F(Cli, NumbersOutOfRange) {
  for (const char* minutes : {"0", "-3", "abc"})
    expect_fault(quantize("packed", {"--minutes", minutes}), ErrorCode::kUsage, "expected a number above 0");
  expect_fault(quantize("packed", {"--target-size", "0"}), ErrorCode::kUsage, "expected a number above 0");
  expect_fault(quantize("packed", {"--distill-nsamples", "-1"}), ErrorCode::kUsage, "of at least 0");
  expect_fault(quantize("packed", {"--blocks", "99"}), ErrorCode::kUsage, "--blocks 99: the model has");
  for (const char* bytes : {"16g", "16 GiB", "0.016T", "16000000kb"})
    EXPECT_EQ(run_program(quantize("packed", {"--max-memory", bytes, "--dry-run"})).status, 0) << bytes;
  for (const char* bytes : {"1.5X", "-3M", "M", "1e99", "1 0"})
    expect_fault(quantize("packed", {"--max-memory", bytes}), ErrorCode::kUsage, "expected bytes like");
}

TEST_F(Cli, ACodeThatTheMethodHasNoLevelsFor) {
  expect_fault(quantize("packed", {"--recipe", "rtn", "--code", "*.down_proj=3:4x2"}), ErrorCode::kUsage,
               "down_proj: code 3:4x2 has 2 levels");
  expect_fault(quantize("packed", {"--recipe", "gguf-ternary", "--target-bpw", "2"}), ErrorCode::kUsage,
               "do not go with recipe gguf-ternary");
}

TEST_F(Cli, OptionsThatDoNotGoTogether) {
  expect_fault(quantize("packed", {"--blocks", "0"}), ErrorCode::kUsage, "--blocks");
  expect_fault(quantize("packed", {"--blocks", "1", "--target-size", "60M"}), ErrorCode::kUsage,
               "--target-size");
  expect_fault(quantize("packed", {"--dense", "--target-size", "60M"}), ErrorCode::kUsage, "--target-size");
  expect_fault({"generate", checkpoint_.string(), "--prompt", "a", "--top-p", "0.5"}, ErrorCode::kUsage,
               "--temperature");
}

TEST_F(Cli, PathsThatAreNotThere) {
  const std::string nowhere = (scratch_ / "nowhere").string();
  Args args = quantize("packed");
  args[1] = nowhere;
  expect_fault(args, ErrorCode::kNotFound, nowhere);
  expect_fault(quantize("packed", {"--recipe", nowhere + ".json"}), ErrorCode::kNotFound, nowhere);
  expect_fault(quantize("packed", {"--resume"}), ErrorCode::kNotFound, "no unfinished run");
  expect_fault({"eval-ppl", nowhere, "--data", text_}, ErrorCode::kNotFound, nowhere);
  expect_fault({"eval-ppl", checkpoint_.string(), "--data", nowhere}, ErrorCode::kNotFound, nowhere);
  expect_fault({"inspect", nowhere}, ErrorCode::kNotFound, nowhere);
  expect_fault({"generate", nowhere, "-p", "the"}, ErrorCode::kNotFound, nowhere);
  text_ = nowhere;
  expect_fault(quantize("packed"), ErrorCode::kNotFound, nowhere);
}

TEST_F(Cli, ATruncatedShard) {
  model_.shards = 2;
  fs::remove_all(checkpoint_);
  write_checkpoint(checkpoint_, model_);
  const fs::path shard = checkpoint_ / "model-00002-of-00002.safetensors";
  fs::resize_file(shard, fs::file_size(shard) - 100);
  expect_fault(quantize("packed"), ErrorCode::kCorrupt, shard.string());
}

TEST_F(Cli, AMissingTensor) {
  nlohmann::json config = nlohmann::json::parse(read_all(checkpoint_ / "config.json"));
  config["num_hidden_layers"] = 3;
  write_text(checkpoint_ / "config.json", config.dump());
  expect_fault(quantize("packed"), ErrorCode::kMismatch, "model.layers.2.");
}

TEST_F(Cli, AWrongShape) {
  nlohmann::json config = nlohmann::json::parse(read_all(checkpoint_ / "config.json"));
  config["intermediate_size"] = 160;
  write_text(checkpoint_ / "config.json", config.dump());
  expect_fault(quantize("packed"), ErrorCode::kMismatch,
               "model.layers.0.mlp.gate_proj.weight has shape [168, 64], but config.json asks for [160, 64]");
}

TEST_F(Cli, AnUnknownArchitecture) {
  model_.config["architectures"] = {"MambaForCausalLM"};
  write_text(checkpoint_ / "config.json", model_.config.dump());
  expect_fault(quantize("packed"), ErrorCode::kUnsupported, "MambaForCausalLM");
}

TEST_F(Cli, AnUnknownRopeScaling) {
  model_.config["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}};
  write_text(checkpoint_ / "config.json", model_.config.dump());
  expect_fault(quantize("packed"), ErrorCode::kUnsupported, "yarn");
}

TEST_F(Cli, ATextTooShort) {
  text_ = (scratch_ / "short.txt").string();
  write_text(text_, "the cat");
  expect_fault(quantize("packed"), ErrorCode::kTooLittleText, "short.txt");
  expect_fault({"eval-ppl", checkpoint_.string(), "--data", text_, "--seqlen", "48"},
               ErrorCode::kTooLittleText, "short.txt");
}

TEST_F(Cli, AnOutputThatIsThere) {
  write_text(results_ / "packed", "mine");
  expect_fault(quantize("packed"), ErrorCode::kExists, "--force");
  EXPECT_EQ(read_all(results_ / "packed"), "mine");
  EXPECT_EQ(run_program(quantize("packed", {"--force"})).status, 0);
  EXPECT_EQ(run_program({"inspect", (results_ / "packed").string()}).status, 0);
}

TEST_F(Cli, AReportInPlaceOfTheOutput) {
  expect_fault(quantize("packed", {"--report", (results_ / "." / "packed").string()}), ErrorCode::kUsage,
               "the output itself");
}

TEST_F(Cli, WhatARunReadsIsNotOverwrittenEvenWithForce) {
  const std::string weights = (checkpoint_ / "model.safetensors").string(), before = read_all(weights),
                    text = read_all(text_);
  expect_fault(quantize("packed", {"--force", "--report", weights}), ErrorCode::kUsage,
               "the checkpoint itself");
  expect_fault(quantize("packed", {"--force", "--report", text_}), ErrorCode::kUsage, "this run reads it");
  fs::create_hard_link(text_, results_ / "packed");
  expect_fault(quantize("packed", {"--force"}), ErrorCode::kUsage, "this run reads it");
  EXPECT_EQ(read_all(weights), before);
  EXPECT_EQ(read_all(text_), text);
}

TEST_F(Cli, APathThatIsNotUtf8) {
  const Outcome outcome = run_program(quantize("lat\xe9in", {"--json"}));
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_THAT(nlohmann::json::parse(outcome.out)["output"].get<std::string>(), HasSubstr("lat\uFFFDin"));
  expect_fault(quantize("packed", {"--set", "name=\xff"}), ErrorCode::kUsage, "UTF-8");
}

TEST_F(Cli, APathThatLeadsInACircle) {
  fs::create_symlink("circle", results_ / "circle");
  expect_fault({"inspect", (results_ / "circle").string()}, ErrorCode::kNotFound, "circle");
}

TEST_F(Cli, AWeightThatIsNotANumber) {
  std::string bytes = read_all(checkpoint_ / "model.safetensors");
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof header);
  bytes.replace(8 + header, 4, 4, '\xff');  // in every float type
  test::write_all(checkpoint_ / "model.safetensors", bytes);
  expect_fault(quantize("packed"), ErrorCode::kCorrupt, "values that are not finite");
  expect_fault({"eval-ppl", checkpoint_.string(), "--data", text_}, ErrorCode::kCorrupt,
               "values that are not finite");
}

TEST_F(Cli, AnOutputInsideAFile) {
  write_text(results_ / "file", "mine");
  expect_fault(quantize("file/packed"), ErrorCode::kWriteFailed, "file/packed");
}

TEST_F(Cli, AnOutputWithoutAName) { expect_fault(quantize("new/"), ErrorCode::kUsage, "write its name"); }

TEST_F(Cli, ADirectoryForADenseCheckpointMayEndInASlash) {
  EXPECT_EQ(run_program(quantize("dense/", {"--dense"})).status, 0);
  EXPECT_TRUE(fs::exists(results_ / "dense" / "model.safetensors"));
  EXPECT_EQ(list(results_), Args{"dense"});
}

TEST_F(Cli, AReportThatCannotBeWrittenIsRefusedBeforeTheRun) {
  expect_fault(quantize("packed", {"--report", (results_ / "nowhere" / "run.json").string()}),
               ErrorCode::kWriteFailed, "run.json");
}

TEST_F(Cli, ATextOnStdoutIsTheOneInJson) {
  const auto generate = [&](int seed, const Args& more) {
    Args args = {"generate", checkpoint_.string(), "--prompt", "a",      "--tokens",
                 "60",       "--temperature",      "3",        "--seed", std::to_string(seed)};
    args.insert(args.end(), more.begin(), more.end());
    return run_program(args).out;
  };
  // Random weights give bytes in the middle of characters, too, unless the text ends early.
  int seed = 0;
  std::string text;
  while (text.find("\uFFFD") == std::string::npos) {
    ASSERT_LT(++seed, 20);
    text = nlohmann::json::parse(generate(seed, {"--json"}))["text"].get<std::string>();
  }
  EXPECT_THAT(generate(seed, {}), HasSubstr(text));
}

TEST_F(Cli, ARecipeWithoutPackedForm) {
  expect_fault(quantize("packed", {"--recipe", "stbllm-released"}), ErrorCode::kUnsupported, "--dense");
}

TEST_F(Cli, ADamagedPackedFile) {
  const fs::path packed = results_ / "packed";
  ASSERT_EQ(run_program(quantize("packed")).status, 0);
  std::string bytes = read_all(packed);
  bytes[bytes.size() - 1] ^= 1;
  write_text(packed, bytes);
  expect_fault({"inspect", packed.string(), "--verify"}, ErrorCode::kCorrupt, packed.string());
  write_text(packed, bytes.substr(0, bytes.size() / 2));
  expect_fault({"inspect", packed.string()}, ErrorCode::kCorrupt, packed.string());
  expect_fault({"eval-ppl", packed.string(), "--data", text_, "--seqlen", "48"}, ErrorCode::kCorrupt,
               packed.string());
}

TEST_F(Cli, AChangedBitOfAnyTensorIsNamed) {
  const fs::path packed = results_ / "packed";
  // Six of the planes, quantized rows and dense tensors.
  ASSERT_EQ(run_program(quantize("packed", {"--recipe", "stbllm"})).status, 0);
  const std::string whole = read_all(packed);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, whole.data(), sizeof header_bytes);
  const auto header = nlohmann::json::parse(whole.substr(sizeof header_bytes, header_bytes));
  std::map<std::string, std::pair<std::string, size_t>> first_of;  // suffix -> tensor, its last byte
  for (const auto& [name, tensor] : header.items())
    if (name != "__metadata__" && tensor["data_offsets"][1] > tensor["data_offsets"][0])
      first_of.try_emplace(name.substr(name.rfind('.')), name,
                           sizeof header_bytes + header_bytes + tensor["data_offsets"][1].get<size_t>() - 1);
  ASSERT_GE(first_of.size(), 5u);
  for (const auto& [suffix, tensor] : first_of) {
    const auto& [name, byte] = tensor;
    std::string damaged = whole;
    damaged[byte] ^= 1;
    write_text(packed, damaged);
    const std::string linear = name.substr(0, name.rfind('.'));  // what the checks of its values name
    for (const Args& args : {Args{"inspect", packed.string(), "--verify"},
                             Args{"eval-ppl", packed.string(), "--data", text_, "--seqlen", "48"},
                             Args{"generate", packed.string(), "--prompt", "the", "-n", "1"},
                             Args{"export", packed.string(), (results_ / "hf").string(), "--to", "hf"}})
      expect_fault(args, ErrorCode::kCorrupt, linear);
  }
}

TEST_F(Cli, NothingIsPrintedBeforeARefusal) {
  auto tokenizer = nlohmann::json::parse(read_all(checkpoint_ / "tokenizer.json"));
  tokenizer["model"]["vocab"]["zz"] = 300;
  tokenizer["model"]["merges"].push_back("z z");
  write_text(checkpoint_ / "tokenizer.json", tokenizer.dump());
  expect_fault({"generate", checkpoint_.string(), "--prompt", "the zz"}, ErrorCode::kMismatch,
               "token id 300");
}

TEST_F(Cli, ValuesThatAreNotFinite) {
  const fs::path weights = checkpoint_ / "model.safetensors";
  const std::string whole = read_all(weights);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, whole.data(), sizeof header_bytes);
  const auto header = nlohmann::json::parse(whole.substr(sizeof header_bytes, header_bytes));
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  const size_t begin = sizeof header_bytes + header_bytes + header[name]["data_offsets"][0].get<size_t>();
  const auto cols = header[name]["shape"][1].get<size_t>();
  const auto with = [&](float value, size_t from, size_t count) {
    std::string changed = whole;
    for (size_t i = from; i < from + count; ++i)
      std::memcpy(changed.data() + begin + i * sizeof value, &value, sizeof value);
    write_text(weights, changed);
  };
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    with(value, 3 * cols + 5, 1);
    expect_fault(quantize("packed"), ErrorCode::kCorrupt,
                 name + " holds values that are not finite, 1 of them, the first at [3, 5]");
  }
  with(3e38f, 0, cols);  // finite weights, but products beyond float32
  expect_fault({"eval-ppl", checkpoint_.string(), "--data", text_, "--seqlen", "48"}, ErrorCode::kCorrupt,
               "the logits are not finite");
  expect_fault({"generate", checkpoint_.string(), "--prompt", "the"}, ErrorCode::kCorrupt,
               "the logits are not finite");
}

TEST_F(Cli, AFileThatIsNoPackedModel) {
  expect_fault({"inspect", (checkpoint_ / "model.safetensors").string()}, ErrorCode::kUnsupported,
               "model.safetensors");
  expect_fault({"inspect", checkpoint_.string()}, ErrorCode::kUsage, "quantize it first");
}

TEST_F(Cli, AFullDiskLeavesNothingOfTheFirstBlock) {
  const auto quantize_uniformly = [&](const std::string& output, Args more) {
    more.insert(more.end(), {"--recipe", "stbllm"});  // there is no plan to be kept
    return quantize(output, more);
  };
  expect_fault(quantize_uniformly("packed", {}), ErrorCode::kWriteFailed, "packed",
               /*largest_file=*/8 << 10);
  expect_fault(quantize_uniformly("dense", {"--dense"}), ErrorCode::kWriteFailed, "dense",
               /*largest_file=*/8 << 10);
}

TEST_F(Cli, AFullDiskAtTheEndKeepsTheFinishedBlocks) {
  // The embedding alone has 272 x 64 floats = 68 KiB, a block's planes have less than 32.
  for (const Args& dense : {Args{}, Args{"--dense"}}) {
    const Outcome failed = run_program(quantize("packed", dense), /*largest_file=*/48 << 10);
    EXPECT_EQ(failed.status, static_cast<int>(ErrorCode::kWriteFailed)) << failed.err;
    EXPECT_EQ(list(results_), Args{"packed.work"});
    Args resume = dense;
    resume.push_back("--resume");
    const Outcome resumed = run_program(quantize("packed", resume));
    EXPECT_EQ(resumed.status, 0) << resumed.err;
    EXPECT_EQ(list(results_), Args{"packed"});
    fs::remove_all(results_ / "packed");
  }
}

// --- interruptions
// ------------------------------------------------------------------------------------------

/// A model that takes long enough to be caught in the middle.
class Interrupted : public Cli {
 protected:
  Interrupted() { model_.config["num_hidden_layers"] = 24; }

  /// Runs until block 2 is finished, sends `signal`, and expects the run to end with `status`.
  Outcome interrupt(int signal) {
    ChildProcess child(quantize("packed"));
    EXPECT_TRUE(child.appears(results_ / "packed.work" / "block_002.safetensors"));
    EXPECT_FALSE(fs::exists(results_ / "packed"));  // the result appears whole, at the end
    child.send(signal);
    return child.wait();
  }
  void expect_resume_gives_the_same_bytes() {
    EXPECT_TRUE(fs::exists(results_ / "packed.work" / "block_002.safetensors"));
    EXPECT_FALSE(fs::exists(results_ / "packed"));
    const Outcome resumed = run_program(quantize("packed", {"--resume"}));
    ASSERT_EQ(resumed.status, 0) << resumed.err;
    ASSERT_EQ(run_program(quantize("undisturbed")).status, 0);
    EXPECT_TRUE(read_all(results_ / "packed") == read_all(results_ / "undisturbed"));
    EXPECT_EQ(list(results_), (Args{"packed", "undisturbed"}));
  }
};

TEST_F(Interrupted, ByKillResumesToTheSameBytes) {
  EXPECT_EQ(interrupt(SIGKILL).status, -SIGKILL);
  expect_fault(quantize("packed"), ErrorCode::kExists, "--resume");
  expect_fault(quantize("packed", {"--resume", "--seed", "9"}), ErrorCode::kMismatch,
               "seed: 0 there, 9 here");
  expect_resume_gives_the_same_bytes();
}

TEST_F(Interrupted, ByCtrlCSaysHowToGoOn) {
  const Outcome outcome = interrupt(SIGINT);
  EXPECT_EQ(outcome.status, static_cast<int>(ErrorCode::kInterrupted)) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  ASSERT_FALSE(lines_of(outcome.err).empty());
  EXPECT_THAT(lines_of(outcome.err).back(), HasSubstr("--resume"));
  expect_resume_gives_the_same_bytes();
}

TEST(LoadModel, RefusesADtypeThatItDoesNotKnow) {
  for (const std::string dtype : {"float16", "bf16", ""})
    expect_error(ErrorCode::kUsage, "expected float32 or bfloat16",
                 [&] { load_model("no such model", "cpu", dtype); });
}

}  // namespace
}  // namespace stbllm::test

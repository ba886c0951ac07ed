// `stbllm report`: JSON in, one self-contained page out.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "browser.h"
#include "stbllm/base/error.h"
#include "support/files.h"
#include "support/scratch_directory.h"

namespace stbllm {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

nlohmann::json sample_run() {
  nlohmann::json linears = nlohmann::json::array(), blocks = nlohmann::json::array();
  for (int block = 0; block < 3; ++block) {
    for (const char* role : {"self_attn.q_proj", "mlp.down_proj"})
      linears.push_back({{"name", "model.layers." + std::to_string(block) + "." + role},
                         {"nm", block == 1 ? "5:8" : "4:8"},
                         {"rows", 64},
                         {"cols", 128},
                         {"salient_count", {3}},
                         {"threshold", {0.25}},
                         {"output_error", 0.125 + 0.01 * block},
                         {"holdout_error", -1.0},
                         {"shrink", 0.1},
                         {"damping", 0.01},
                         {"seconds", 0.5}});
    blocks.push_back({{"cosine", 0.99 - 0.01 * block}, {"relative_error", 0.02 * (block + 1)}});
  }
  return {{"output", "a<b>&\"c\".safetensors"},
          {"recipe", {{"name", "<script>alert(1)</script>"}}},
          {"calibration", {{"corpus", "text"}, {"nsamples", 4}, {"seqlen", 64}}},
          {"nominal_bits", 0.55},
          {"distill",
           {{"divergence_before", 1.25}, {"divergence_after", 0.875}, {"changed", 0.01}, {"epochs", 1}}},
          {"seconds", 2.0},
          {"peak_memory_bytes", 1000000},
          {"linears", linears},
          {"blocks", blocks},
          {"ledger",
           {{"stored_bits", 0.8},
            {"file_bits", 2.5},
            {"file_bytes", 100000},
            {"linear_bytes", 60000},
            {"dense_bytes", 30000},
            {"linear_weights", 49152},
            {"plane_bytes", {{"codes", 50000}, {"scales", 10000}}},
            {"linears", nlohmann::json::array()}}},
          {"stages", {{{"name", "statistics"}, {"seconds", 1.0}, {"flops", 2e9}, {"calls", 3}}}}};
}

class ReportCommand : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::string(STBLLM_BINARY).empty()) GTEST_SKIP() << "the executable is not built";
  }
  int run(const std::string& arguments) {
    const std::string command = std::string(STBLLM_BINARY) + " report " + arguments + " > " +
                                (scratch_ / "out").string() + " 2> " + (scratch_ / "err").string();
    return WEXITSTATUS(std::system(command.c_str()));
  }
  void write(const std::string& name, const std::string& text) { std::ofstream(scratch_ / name) << text; }
  std::string read(const std::string& name) { return test::read_all(scratch_ / name); }
  std::string paths() { return (scratch_ / "run.json").string() + " -o " + (scratch_ / "run.html").string(); }

  /// The report as it stands in run.html.
  std::string embedded_report() {
    const std::string page = read("run.html"), before = "type=\"application/json\">";
    const size_t begin = page.find(before) + before.size();
    return page.substr(begin, page.find("</script>", begin) - begin);
  }
  test::ScratchDirectory scratch_;
};

TEST_F(ReportCommand, WritesAPageThatLoadsNothing) {
  write("run.json", sample_run().dump());
  ASSERT_EQ(run(paths()), 0) << read("err");
  const std::string page = read("run.html");
  EXPECT_THAT(page, HasSubstr("content=\"default-src 'none'"));
  for (const char* reference : {"src=", "href=", "<link", "@import", "url(", "fetch(", "import("})
    EXPECT_THAT(page, Not(HasSubstr(reference)));
}

TEST_F(ReportCommand, EmbedsTheWholeReport) {
  write("run.json", sample_run().dump());
  ASSERT_EQ(run(paths()), 0) << read("err");
  EXPECT_EQ(nlohmann::json::parse(embedded_report()), sample_run());
}

TEST_F(ReportCommand, LetsNoTextOfTheReportEndItsElement) {
  nlohmann::json json = sample_run();
  json["output"] = "</script><script>alert(1)</script><!--";
  write("run.json", json.dump());
  ASSERT_EQ(run(paths()), 0) << read("err");
  EXPECT_THAT(read("run.html"), Not(HasSubstr("alert(1)</script>")));
  EXPECT_EQ(nlohmann::json::parse(embedded_report()), json);
}

TEST_F(ReportCommand, ThePageDrawsWhatTheReportSays) {
  write("run.json", sample_run().dump());
  ASSERT_EQ(run(paths()), 0) << read("err");
  const std::string browser = test::find_browser();
  if (browser.empty()) GTEST_SKIP() << test::kNoBrowser;
  const std::string page = test::rendered(browser, scratch_ / "run.html");
  EXPECT_THAT(page, HasSubstr("<svg"));
  for (const char* shown : {"<title>q_proj, block 0", "<th>held out</th>", "<td>0.1350</td>", "5:8",
                            "1.250 → 0.875", "Hidden states after each block", "Bit ledger",
                            "50.0 kB  50.0 %  8.138 bits/weight", "Time by stage", "1.00 s  2.0 GFLOP/s"})
    EXPECT_THAT(page, HasSubstr(shown));
  EXPECT_THAT(page, HasSubstr("<h1>a&lt;b&gt;&amp;\"c\".safetensors</h1>"));
  EXPECT_THAT(page, HasSubstr("recipe &lt;script&gt;alert(1)&lt;/script&gt;"));
}

TEST_F(ReportCommand, ThePageDrawsAReportWithoutBlocksLedgerAndStages) {
  nlohmann::json json = sample_run();
  for (const char* key : {"blocks", "ledger", "stages", "calibration", "distill"}) json.erase(key);
  write("run.json", json.dump());
  ASSERT_EQ(run(paths()), 0) << read("err");
  const std::string browser = test::find_browser();
  if (browser.empty()) GTEST_SKIP() << test::kNoBrowser;
  const std::string page = test::rendered(browser, scratch_ / "run.html");
  EXPECT_THAT(page, HasSubstr("<td>0.1350</td>"));
  for (const char* absent : {"<h2>Bit ledger", "<h2>Hidden states", "<h2>Time by stage"})
    EXPECT_THAT(page, Not(HasSubstr(absent)));
}

TEST_F(ReportCommand, RefusesToOverwriteUnlessForced) {
  write("run.json", sample_run().dump());
  write("run.html", "mine");
  EXPECT_EQ(run(paths()), static_cast<int>(ErrorCode::kExists));
  EXPECT_EQ(read("run.html"), "mine");
  EXPECT_EQ(run(paths() + " --force"), 0);
  EXPECT_THAT(read("run.html"), HasSubstr("</html>"));
}

TEST_F(ReportCommand, SaysWhatIsWrongWithTheInput) {
  EXPECT_EQ(run(paths()), static_cast<int>(ErrorCode::kNotFound));
  write("run.json", "{\"output\": 1");
  EXPECT_EQ(run(paths()), static_cast<int>(ErrorCode::kCorrupt));
  write("run.json", "{\"linears\": []}");
  EXPECT_EQ(run(paths()), static_cast<int>(ErrorCode::kCorrupt));
  EXPECT_THAT(read("err"), HasSubstr("run.json"));
  EXPECT_FALSE(std::filesystem::exists(scratch_ / "run.html"));
}

TEST_F(ReportCommand, NeverOverwritesWhatItReads) {
  write("run.json", sample_run().dump());
  const std::string path = (scratch_ / "run.json").string();
  EXPECT_EQ(run(path + " -o " + path + " --force"), static_cast<int>(ErrorCode::kUsage));
  EXPECT_EQ(nlohmann::json::parse(read("run.json")), sample_run());
}

// --- sweeps -----------------------------------------------------------------------------------------------

/// A line of scripts/sweep.sh.
nlohmann::json sample_line(const std::string& checkpoint, const std::string& label, double bits) {
  const nlohmann::json evaluation = {{"data", "text (7 rows)"}, {"perplexity", 100 / bits},
                                     {"standard_error", 1.5},   {"windows", 8},
                                     {"seqlen", 512},           {"second_half", false}};
  nlohmann::json longer = evaluation;
  longer.update({{"seqlen", 2048}, {"kl", 0.5}, {"reference_perplexity", 12.5}});
  return {{"options",
           {{"checkpoint", checkpoint},
            {"label", label},
            {"quantize", nlohmann::json::array()},
            {"eval", {{"--data", "x"}, {"--data", "x", "--kl", checkpoint}}}}},
          {"stored_bits", bits},
          {"nominal_bits", bits / 2},
          {"file_bytes", 1e6 * bits},
          {"evaluations", {evaluation, longer}},
          {"seconds", 6.0},
          {"peak_memory_bytes", 1000000}};
}

class ReportOfSweeps : public ReportCommand {
 protected:
  void write_sweep(const std::string& name, const std::vector<nlohmann::json>& lines) {
    std::filesystem::create_directory(scratch_ / name);
    std::string text;
    for (const nlohmann::json& line : lines) text += line.dump() + "\n";
    write(name + "/sweep.jsonl", text);
  }
  std::string page(const std::string& inputs) {
    return inputs + " -o " + (scratch_ / "run.html").string() + " --force";
  }
  std::string directory(const std::string& name) { return (scratch_ / name).string(); }
};

TEST_F(ReportOfSweeps, TakesModelsFromSeveralDirectoriesAndNamesWhatDiffers) {
  write_sweep("a", {sample_line("models/one", "2:4", 1.5), sample_line("models/one", "4:8", 1.75)});
  write_sweep("b", {sample_line("models/two", "2:4", 1.5)});
  ASSERT_EQ(run(page(directory("a") + " " + directory("b"))), 0) << read("err");
  const nlohmann::json sweep = nlohmann::json::parse(embedded_report())["sweep"];
  EXPECT_EQ(sweep["title"], "Sweep of 2 models");
  std::vector<std::string> models;
  for (const nlohmann::json& point : sweep["points"]) models.push_back(point["model"]);
  EXPECT_EQ(models, (std::vector<std::string>{"one", "one", "two"}));
  EXPECT_EQ(sweep["texts"],
            nlohmann::json::parse(R"([{"name": "at 512", "about": "text, 8 windows of 512 tokens"},
                                      {"name": "at 2048", "about": "text, 8 windows of 2048 tokens"}])"));
  EXPECT_EQ(sweep["points"][1]["results"][1],
            (nlohmann::json{{"text", 1}, {"perplexity", 100 / 1.75}, {"standard_error", 1.5}, {"kl", 0.5}}));
  // The model behind --kl, once for each checkpoint.
  EXPECT_EQ(sweep["levels"], nlohmann::json::parse(R"([{"label": "one", "text": 1, "perplexity": 12.5},
                                      {"label": "two", "text": 1, "perplexity": 12.5}])"));
}

TEST_F(ReportOfSweeps, TellsModelsOfOneNameByTheirPaths) {
  write_sweep("a", {sample_line("here/one", "2:4", 1.5), sample_line("there/one", "2:4", 1.5)});
  ASSERT_EQ(run(page(directory("a"))), 0) << read("err");
  const nlohmann::json points = nlohmann::json::parse(embedded_report())["sweep"]["points"];
  EXPECT_EQ(points[0]["model"], "here/one");
  EXPECT_EQ(points[1]["model"], "there/one");
}

TEST_F(ReportOfSweeps, ReadsPointsOfOtherTools) {
  write_sweep("a", {sample_line("one", "2:4", 1.5)});
  write("other.csv",
        "text, perplexity, tool, label, file_bytes\r\n\r\n"
        "at 2048, 50.5, \"a \"\"b\"\"\", \"x, y\", 1000\r\n"
        ",20,checkpoint,bf16,");
  ASSERT_EQ(run(page(directory("a") + " --points " + directory("other.csv"))), 0) << read("err");
  const nlohmann::json sweep = nlohmann::json::parse(embedded_report())["sweep"];
  EXPECT_EQ(sweep["title"], "Sweep of one");
  const nlohmann::json& point = sweep["points"][1];
  EXPECT_EQ(point["tool"], "a \"b\"");
  EXPECT_EQ(point["label"], "x, y");
  EXPECT_EQ(point["file_bytes"], 1000);
  EXPECT_TRUE(point["bits"].is_null());
  EXPECT_EQ(point["results"][0]["text"], 1);
  EXPECT_EQ(sweep["levels"].back(),
            (nlohmann::json{{"label", "checkpoint bf16"}, {"text", 0}, {"perplexity", 20}}));
}

TEST_F(ReportOfSweeps, SaysWhereACsvIsWrong) {
  write_sweep("a", {sample_line("one", "2:4", 1.5)});
  const std::string head = "tool,label,bits,perplexity,text\n";
  for (const auto& [text, part] :
       std::map<std::string, std::string>{{"tool,size\n", "other.csv:1: expected columns among"},
                                          {head + "a,b,1\n", "other.csv:2: expected 5 fields"},
                                          {head + "a,b,x,2,\n", "bits: expected a number above 0, found 'x'"},
                                          {head + "a,b,1,-2,\n", "perplexity: expected a number above 0"},
                                          {head + "a,b,1,inf,\n", "perplexity: expected a number above 0"},
                                          {head + "a,b,1,,\n", "expected a tool and a perplexity"},
                                          {head + "a,\"b,1,2,\n", "a quote is not closed"},
                                          {head + "a,b,1,2,else\n", "(at 512; at 2048), found 'else'"}}) {
    write("other.csv", text);
    EXPECT_EQ(run(page(directory("a") + " --points " + directory("other.csv"))),
              static_cast<int>(ErrorCode::kCorrupt))
        << text;
    EXPECT_THAT(read("err"), HasSubstr(part));
  }
  EXPECT_FALSE(std::filesystem::exists(scratch_ / "run.html"));
}

TEST_F(ReportOfSweeps, SaysWhatIsWrongWithASweep) {
  std::filesystem::create_directory(scratch_ / "empty");
  EXPECT_EQ(run(page(directory("empty"))), static_cast<int>(ErrorCode::kNotFound));
  EXPECT_THAT(read("err"), HasSubstr("sweep.jsonl"));
  write_sweep("none", {});
  EXPECT_EQ(run(page(directory("none"))), static_cast<int>(ErrorCode::kNotFound));
  write_sweep("bad", {sample_line("one", "2:4", 1.5), {{"options", 1}}});
  EXPECT_EQ(run(page(directory("bad"))), static_cast<int>(ErrorCode::kCorrupt));
  EXPECT_THAT(read("err"), HasSubstr("sweep.jsonl:2:"));
  nlohmann::json line = sample_line("one", "2:4", 1.5);
  line["report"] = "../bad/run.json";  // a name is looked for in the sweep itself
  write_sweep("bad", {line});
  write("bad/run.json", "{}");
  EXPECT_EQ(run(page(directory("bad"))), static_cast<int>(ErrorCode::kCorrupt));
  EXPECT_THAT(read("err"), HasSubstr("run.json: not a report"));
  EXPECT_EQ(run(page(directory("bad") + " " + directory("none") + " --linear x")),
            static_cast<int>(ErrorCode::kUsage));
}

}  // namespace
}  // namespace stbllm

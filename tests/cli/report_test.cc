// `stbllm report`: JSON in, one self-contained page out.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

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
  /// run.html after its script has run; empty without a browser.
  std::string rendered() {
    const std::string command =
        "chromium --headless --no-sandbox --disable-gpu --virtual-time-budget=10000 --user-data-dir=" +
        (scratch_ / "browser").string() + " --dump-dom file://" + (scratch_ / "run.html").string() +
        " 2> /dev/null > " + (scratch_ / "rendered.html").string();
    return std::system(command.c_str()) == 0 ? read("rendered.html") : "";
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
  const std::string page = rendered();
  if (page.empty()) GTEST_SKIP() << "no browser: chromium is not installed or does not start";
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
  const std::string page = rendered();
  if (page.empty()) GTEST_SKIP() << "no browser: chromium is not installed or does not start";
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

}  // namespace
}  // namespace stbllm

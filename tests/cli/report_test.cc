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

  test::ScratchDirectory scratch_;
};

TEST_F(ReportCommand, WritesAPageThatNeedsNothingElse) {
  write("run.json", sample_run().dump());
  ASSERT_EQ(run(paths()), 0) << read("err");
  const std::string page = read("run.html");
  for (const char* needed :
       {"<svg", "q_proj", "down_proj", "5:8", "0.1350", "codes", "statistics", "Hidden states", "</html>"})
    EXPECT_THAT(page, HasSubstr(needed));
  for (const char* reference : {"<script", "http", "src=", "<link", "@import", "url("})
    EXPECT_THAT(page, Not(HasSubstr(reference)));
}

TEST_F(ReportCommand, EscapesWhatTheReportSays) {
  write("run.json", sample_run().dump());
  ASSERT_EQ(run(paths()), 0) << read("err");
  EXPECT_THAT(read("run.html"), HasSubstr("1.250 → 0.875"));
  EXPECT_THAT(read("run.html"), HasSubstr("&lt;script&gt;alert(1)"));
  EXPECT_THAT(read("run.html"), HasSubstr("a&lt;b&gt;&amp;&quot;c&quot;.safetensors"));
}

TEST_F(ReportCommand, DrawsAReportWithoutBlocksLedgerAndStages) {
  nlohmann::json json = sample_run();
  for (const char* key : {"blocks", "ledger", "stages", "calibration"}) json.erase(key);
  write("run.json", json.dump());
  ASSERT_EQ(run(paths()), 0) << read("err");
  EXPECT_THAT(read("run.html"), Not(HasSubstr("Bit ledger")));
}

TEST_F(ReportCommand, RefusesToOverwriteUnlessForced) {
  write("run.json", sample_run().dump());
  write("run.html", "mine");
  EXPECT_EQ(run(paths()), static_cast<int>(ErrorCode::kExists));
  EXPECT_EQ(read("run.html"), "mine");
  EXPECT_EQ(run(paths() + " --force"), 0);
  EXPECT_THAT(read("run.html"), HasSubstr("<svg"));
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

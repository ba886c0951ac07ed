// scripts/sweep.sh on a tiny checkpoint, and the page that `stbllm report` makes of it, in a real browser.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "browser.h"
#include "child_process.h"
#include "stbllm/base/error.h"
#include "support/calibration_text.h"
#include "support/files.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::HasSubstr;

class SweepPage : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::string(STBLLM_BINARY).empty()) GTEST_SKIP() << "the program was not built";
    write_checkpoint(scratch_ / "tiny", tiny_llama());
    text_ = write_calibration_text(scratch_.path());
    other_text_ = write_calibration_text(scratch_.path(), 2000, /*seed=*/2);
  }

  /// scripts/sweep.sh with `arguments` behind the model; its exit status.
  int sweep(const std::string& model, const std::string& arguments) {
    const std::string command = "STBLLM=" STBLLM_BINARY " OMP_WAIT_POLICY=passive " STBLLM_SOURCE_DIR
                                "/scripts/sweep.sh " +
                                (scratch_ / model).string() + " " + arguments + " > " +
                                (scratch_ / "table").string() + " 2> " + (scratch_ / "log").string();
    return WEXITSTATUS(std::system(command.c_str()));
  }
  /// Three points, evaluated on two texts.
  int sweep_patterns() {
    return sweep("tiny", "--nm '2:4 4:8 6:8' --calib " + text_ + " --nsamples 4 --seqlen 32 --data " + text_ +
                             " --data " + other_text_ + " --windows 8 -o " + path("sweep"));
  }
  std::string path(const std::string& name) const { return (scratch_ / name).string(); }
  /// What the page holds.
  json embedded() const {
    const std::string page = read_all(scratch_ / "page.html"), before = "type=\"application/json\">";
    const size_t begin = page.find(before) + before.size();
    return json::parse(page.substr(begin, page.find("</script>", begin) - begin));
  }
  /// What judge.html sees of page.html.
  json judged(const std::string& browser, int width, bool is_dark) const {
    std::string judge = read_all(STBLLM_SOURCE_DIR "/tests/cli/judge.html");
    judge.replace(judge.find("WIDTHpx"), 5, std::to_string(width));
    write_all(scratch_ / "judge.html", judge);
    const std::string html = rendered(browser, scratch_ / "judge.html", is_dark), before = "id=\"result\">";
    const size_t begin = html.find(before) + before.size();
    return json::parse(html.substr(begin, html.find("</pre>", begin) - begin));
  }

  ScratchDirectory scratch_;
  std::string text_, other_text_;
};

TEST_F(SweepPage, DrawsEveryRunSortsAndFitsANarrowScreenInLightAndDark) {
  ASSERT_EQ(sweep_patterns(), 0) << read_all(scratch_ / "log");
  write_all(scratch_ / "other.csv",
            "tool,label,bits,perplexity,standard_error,text\n"
            "other,\"Q, small\",2.5,900.5,20,text-1.txt\nother,Q,4.5,500,,text-1.txt\ncheckpoint,,,450,,\n");
  const Outcome made =
      run_program({"report", path("sweep"), "--points", path("other.csv"), "-o", path("page.html")});
  ASSERT_EQ(made.status, 0) << made.err;
  const json sweep = embedded()["sweep"];
  ASSERT_EQ(sweep["points"].size(), 5u);
  for (const json& point : sweep["points"]) {
    EXPECT_EQ(point["results"].size(), point["tool"] == "" ? 2u : 1u);
    EXPECT_EQ(point["run"].is_object(), point["tool"] == "");
  }
  EXPECT_EQ(sweep["levels"].size(), 1u);

  const std::string browser = find_browser();
  if (browser.empty()) GTEST_SKIP() << kNoBrowser;
  // The script that hears errors stands in front of the page's own.
  std::string page = read_all(scratch_ / "page.html");
  page.insert(page.find("<head>") + 6,
              "<script>for (const kind of ['error', 'unhandledrejection', 'securitypolicyviolation'])"
              "addEventListener(kind, (event) => parent.errors.push(kind + ' ' + event.message));</script>");
  write_all(scratch_ / "page.html", page);
  std::string backgrounds[2];
  for (const bool is_dark : {false, true})
    for (const int width : {360, 1000}) {
      SCOPED_TRACE(testing::Message() << width << (is_dark ? " dark" : " light"));
      const json seen = judged(browser, width, is_dark);
      ASSERT_FALSE(seen.contains("failure")) << seen["failure"];
      EXPECT_EQ(seen["errors"], json::array());
      // Three runs on two texts, and two points of the other tool, which have no size.
      for (const char* view : {"overview", "back"}) EXPECT_EQ(seen[view]["points"], (json{8, 6})) << view;
      EXPECT_EQ(seen["overview"]["untold"], 0);
      for (const char* view : {"overview", "run"}) EXPECT_LE(seen[view]["width"], width) << view;
      EXPECT_EQ(seen["overview"]["badTexts"], json::array());
      EXPECT_EQ(seen["run"]["title"], sweep["points"][0]["run"]["output"]);
      std::vector<std::string> rising = seen["rising"], falling = seen["falling"], labels = seen["labels"];
      EXPECT_EQ(rising.size(), 5u);
      EXPECT_TRUE(
          std::ranges::is_sorted(rising, {}, [](const std::string& bits) { return std::stod(bits); }));
      EXPECT_EQ(falling, std::vector(rising.rbegin(), rising.rend()));
      EXPECT_EQ(labels, (std::vector<std::string>{"2:4", "4:8", "6:8", "Q", "Q, small"}));
      backgrounds[is_dark] = seen["overview"]["background"];
    }
  EXPECT_NE(backgrounds[0], backgrounds[1]);
}

TEST_F(SweepPage, SkipsFinishedPointsAndDrawsSweepsWithoutReports) {
  ASSERT_EQ(sweep_patterns(), 0) << read_all(scratch_ / "log");
  ASSERT_EQ(sweep_patterns(), 0) << read_all(scratch_ / "log");
  EXPECT_THAT(read_all(scratch_ / "log"), HasSubstr("3/3  6:8: done before"));
  const std::string finished = read_all(scratch_ / "sweep" / "sweep.jsonl");
  EXPECT_EQ(lines_of(finished).size(), 3u);

  for (const auto& entry : fs::directory_iterator(scratch_ / "sweep"))
    if (entry.path().extension() == ".json") fs::remove(entry.path());
  write_all(scratch_ / "sweep" / "sweep.jsonl", finished + "{\"options\": {\"che");  // cut off by a crash
  ASSERT_EQ(run_program({"report", path("sweep"), "-o", path("page.html")}).status, 0);
  for (const json& point : embedded()["sweep"]["points"]) EXPECT_TRUE(point["run"].is_null());
}

TEST_F(SweepPage, FlipsSignsOfAPackedFile) {
  ASSERT_EQ(run_program({"quantize", path("tiny"), "-o", path("packed"), "--calib", text_, "--nsamples", "4",
                         "--seqlen", "32"})
                .status,
            0);
  ASSERT_EQ(sweep("packed",
                  "--flip-signs '0 0.5' --data " + text_ + " --seqlen 32 --windows 8 -o " + path("flips")),
            0)
      << read_all(scratch_ / "log");
  ASSERT_EQ(run_program({"report", path("flips"), "-o", path("page.html")}).status, 0);
  const json points = embedded()["sweep"]["points"];
  ASSERT_EQ(points.size(), 2u);
  EXPECT_EQ(points[0]["flipped_signs"], 0);
  EXPECT_NEAR(points[1]["flipped_signs"].get<double>(), 0.5, 0.05);  // about ten standard deviations
  const Outcome plain = run_program(
      {"eval-ppl", path("packed"), "--data", text_, "--seqlen", "32", "--windows", "8", "--json"});
  EXPECT_EQ(points[0]["results"][0]["perplexity"], json::parse(plain.out)["perplexity"]);
  EXPECT_NE(points[1]["results"][0]["perplexity"], points[0]["results"][0]["perplexity"]);
  EXPECT_NE(sweep("packed", "--flip-signs '0 2' -o " + path("flips")), 0);
  EXPECT_THAT(read_all(scratch_ / "log"), HasSubstr("shares from 0 to 1"));
}

TEST_F(SweepPage, DrawsTheWeightsOfALinear) {
  const std::string linear = "model.layers.0.mlp.down_proj";
  ASSERT_EQ(run_program({"quantize", path("tiny"), "-o", path("packed"), "--recipe", "stbllm-paper",
                         "--calib", text_, "--nsamples", "4", "--seqlen", "32"})
                .status,
            0);
  const Outcome made = run_program(
      {"report", path("packed"), "--checkpoint", path("tiny"), "--linear", linear, "-o", path("page.html")});
  ASSERT_EQ(made.status, 0) << made.err;
  const json weights = embedded()["weights"];
  int64_t drawn = weights["outside"], counted = 0;
  for (const json& each : weights["classes"]) {
    for (const int64_t count : each["counts"]) drawn += count;
    counted += each["weights"].get<int64_t>();
    EXPECT_EQ(each["name"] == "not kept", each["packed_mean"] == 0);
  }
  const int64_t size = weights["rows"].get<int64_t>() * weights["cols"].get<int64_t>();
  EXPECT_EQ(counted, size);
  EXPECT_EQ(drawn, size);

  const Outcome unknown = run_program(
      {"report", path("packed"), "--checkpoint", path("tiny"), "--linear", "lm", "-o", path("other.html")});
  EXPECT_EQ(unknown.status, static_cast<int>(ErrorCode::kUsage));
  EXPECT_THAT(unknown.err, HasSubstr("no packed linear 'lm'"));
  const std::string browser = find_browser();
  if (browser.empty()) GTEST_SKIP() << kNoBrowser;
  const std::string page = rendered(browser, scratch_ / "page.html");
  EXPECT_THAT(page, HasSubstr("<h1>" + linear + "</h1>"));
  EXPECT_THAT(page, HasSubstr("class=\"weights\""));
}

}  // namespace
}  // namespace stbllm::test

#include "stbllm/text/questions.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/expect_error.h"
#include "support/files.h"
#include "support/scratch_directory.h"

namespace stbllm {
namespace {

using testing::ElementsAre;

class Questions : public testing::Test {
 protected:
  QuestionSet read(const std::string& lines, const std::string& name = "quiz.jsonl", int64_t limit = 0) {
    test::write_all(directory_ / name, lines);
    return read_questions(directory_ / name, limit);
  }
  std::vector<int64_t> gold(const std::string& line) { return read(line).questions.at(0).gold; }
  void refuses(const std::string& line, ErrorCode code, const std::string& part) {
    test::expect_error(code, part, [&] { read(line); });
  }

  test::ScratchDirectory directory_;
};

TEST_F(Questions, ReadWhatTheHarnessLogs) {
  const QuestionSet set =
      read(R"({"doc_id": 0, "doc": {"q": "Sky?"}, "target": "1", "acc": 1.0, "arguments": {)"
           R"("gen_args_0": {"arg_0": "Sky?", "arg_1": " red"}, )"
           R"("gen_args_1": {"arg_0": "Sky?", "arg_1": " blue"}}})"
           "\n\n"
           R"({"doc_id": 1, "target": "0", "arguments": [["Sun?", " hot"], ["Sun?", " cold"]]})"
           "\n",
           "samples_piqa_mini_2026-01-02T03-04-05.678901.jsonl");
  EXPECT_EQ(set.task, "piqa_mini");
  ASSERT_EQ(set.questions.size(), 2u);
  EXPECT_EQ(set.questions[0].choices[1].context, "Sky?");
  EXPECT_EQ(set.questions[0].choices[1].continuation, " blue");
  EXPECT_THAT(set.questions[0].gold, ElementsAre(1));
  EXPECT_EQ(set.questions[1].choices[0].continuation, " hot");
  EXPECT_THAT(set.questions[1].gold, ElementsAre(0));
}

TEST_F(Questions, TakeChoicesByTheirNumber) {
  std::string line = R"({"gold": 10, "arguments": {)";
  for (int i = 0; i < 11; ++i)
    line += fmt::format(R"({}"gen_args_{}": {{"arg_0": "Q", "arg_1": " {}"}})", i ? ", " : "", i, i);
  const QuestionSet set = read(line + "}}");
  EXPECT_EQ(set.questions[0].choices[10].continuation, " 10");
  EXPECT_EQ(set.questions[0].choices[2].continuation, " 2");
}

TEST_F(Questions, FindTheRightChoice) {
  const std::string two = R"("arguments": [["Q", " yes"], ["Q", " no"]])";
  EXPECT_THAT(gold("{" + two + R"(, "gold": 1, "target": "0"})"), ElementsAre(1));
  EXPECT_THAT(gold("{" + two + R"(, "target": 0})"), ElementsAre(0));
  EXPECT_THAT(gold("{" + two + R"(, "target": "no"})"), ElementsAre(1));
  EXPECT_THAT(gold("{" + two + R"(, "target": "[0, 1]"})"), ElementsAre(0, 1));
  // WinoGrande: the contexts differ, and "target" is what all of them go on with.
  const std::string fill = R"("arguments": [["Ann", " left."], ["Bob", " left."]], "target": "left.")";
  EXPECT_THAT(gold("{" + fill + R"(, "doc": {"answer": "2"}})"), ElementsAre(1));
  refuses("{" + fill + "}", ErrorCode::kUnsupported, "go on alike");
  refuses("{" + two + R"(, "target": "maybe"})", ErrorCode::kUnsupported, "neither the number");
  refuses("{" + two + R"(, "target": "2"})", ErrorCode::kCorrupt, "expected 0 to 1");
}

TEST_F(Questions, KeepTheNameOfTheirTaskAndTheFirstSoMany) {
  const std::string line = R"({"task": "mine", "gold": 0, "arguments": [["Q", " a"], ["Q", " b"]]})"
                           "\n";
  EXPECT_EQ(read(line).task, "mine");
  EXPECT_EQ(read(line + line + line, "x.jsonl", 2).questions.size(), 2u);
  EXPECT_EQ(read(R"({"gold": 0, "arguments": [["Q", " a"], ["Q", " b"]]})").task, "quiz");
  const std::string other = R"({"task": "yours", "gold": 0, "arguments": [["Q", " a"], ["Q", " b"]]})";
  refuses(line + other, ErrorCode::kUnsupported, "line 2: a question of task yours behind those of mine");
}

TEST_F(Questions, RefuseWhatIsNoMultipleChoice) {
  refuses("\n[1]\n", ErrorCode::kCorrupt, "line 2: expected a JSON object");
  refuses(R"({"gold": 0, "arguments": [["Q", " a"]]})", ErrorCode::kUnsupported, "two or more choices");
  refuses(R"({"gold": 0, "arguments": [["Q", {"until": ["\n"]}], ["Q", " b"]]})", ErrorCode::kUnsupported,
          "pairs of context and continuation");
  refuses(R"({"gold": 0, "arguments": [["Q", ""], ["Q", " b"]]})", ErrorCode::kCorrupt, "empty");
  refuses(R"({"gold": 0, "acc_mutual_info": 1, "arguments": [["Q", " a"], ["Q", " b"]]})",
          ErrorCode::kUnsupported, "acc_mutual_info");
  refuses("\n", ErrorCode::kTooLittleText, "holds no question");
}

}  // namespace
}  // namespace stbllm

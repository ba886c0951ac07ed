// What the shell and the reader of a manual get from the program's options: completion and manual pages.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <regex>

#include "child_process.h"

namespace stbllm::test {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::IsSupersetOf;
using testing::UnorderedElementsAre;
using Words = std::vector<std::string>;

/// The first group of every line of the program's help that `pattern` matches.
Words in_help(const Words& command, const std::string& pattern) {
  Words args = command, found;
  args.emplace_back("--help");
  const std::regex regex(pattern);
  for (const std::string& line : lines_of(run_program(args).out))
    if (std::smatch match; std::regex_search(line, match, regex)) found.push_back(match[1]);
  return found;
}

class Shell : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::string(STBLLM_BINARY).empty()) GTEST_SKIP() << "the program was not built";
    subcommands_ = in_help({}, "^  ([a-z]+(-[a-z]+)*)  +[A-Z]");
    ASSERT_THAT(subcommands_, Contains("quantize"));
  }

  static Words options(const std::string& subcommand) {
    const Words found = in_help({subcommand}, "^  (?:-[a-z],)?(--[a-z-]+)");
    EXPECT_THAT(found, Contains("--help")) << subcommand;
    return found;
  }

  std::string script(const std::string& shell) const {
    const Outcome outcome = run_program({"completion", shell});
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    std::string path = scratch_ / ("completion." + shell);
    write_all(path, outcome.out);
    return path;
  }

  /// What bash offers behind these words, of which the last one is being typed.
  Words bash_offers(const std::string& words) const {
    const std::string path = script("bash");
    return lines_of(output_of("bash -c 'source " + path + "; COMP_WORDS=(stbllm " + words +
                              "); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _stbllm; printf \"%s\\n\" "
                              "\"${COMPREPLY[@]}\"' 2>/dev/null"));
  }

  ScratchDirectory scratch_;
  Words subcommands_;
};

TEST_F(Shell, BashCompletesEverySubcommandAndItsOptions) {
  EXPECT_THAT(bash_offers("\"\""), testing::UnorderedElementsAreArray(subcommands_));
  EXPECT_THAT(bash_offers("quan"), UnorderedElementsAre("quantize"));
  for (const std::string& subcommand : subcommands_) {
    EXPECT_THAT(bash_offers(subcommand + " --"), IsSupersetOf(options(subcommand))) << subcommand;
    EXPECT_THAT(bash_offers(subcommand + " --log"), UnorderedElementsAre("--log-level")) << subcommand;
  }
}

TEST_F(Shell, BashCompletesValues) {
  EXPECT_THAT(bash_offers("quantize model --recipe stbllm-"), IsSupersetOf({"stbllm-1bit", "stbllm-2bit"}));
  EXPECT_THAT(bash_offers("quantize model --recipe = stbllm-2"), UnorderedElementsAre("stbllm-2bit"));
  EXPECT_THAT(bash_offers("export --to \"\""), UnorderedElementsAre("gguf", "hf", "packed"));
  EXPECT_THAT(bash_offers("--log-level w"), UnorderedElementsAre("warning"));
  EXPECT_THAT(bash_offers("completion \"\""), UnorderedElementsAre("bash", "fish", "zsh"));
}

TEST_F(Shell, ZshAndFishKnowEverySubcommandAndItsOptions) {
  for (const std::string shell : {"zsh", "fish"}) {
    const std::string path = script(shell), text = read_all(path);
    for (const std::string& subcommand : subcommands_) {
      // Up to the next subcommand a script speaks of this one.
      const std::string begin = shell == "zsh" ? "\n        " + subcommand + ") _arguments"
                                               : "'__fish_seen_subcommand_from " + subcommand + "'";
      const std::string end = shell == "zsh" ? " ;;\n" : "'__fish_use_subcommand'";
      const size_t from = text.find(begin);
      ASSERT_NE(from, std::string::npos) << shell << " " << subcommand;
      const std::string part = text.substr(from, text.find(end, from) - from);
      for (const std::string& option : options(subcommand))
        EXPECT_THAT(part, HasSubstr(shell == "zsh" ? option : "-l " + option.substr(2)))
            << shell << " " << subcommand;
    }
    const std::string parses =
        "command -v " + shell + " >/dev/null || exit 0; " + shell + " -n " + path + " 2>&1";
    EXPECT_EQ(output_of(parses), "");
  }
}

TEST_F(Shell, ManualPagesExplainEveryOption) {
  const std::string pages = scratch_ / "man";
  ASSERT_EQ(run_program({"man", pages}).status, 0);
  EXPECT_THAT(read_all(pages + "/stbllm.1"), HasSubstr("130 interrupted"));
  for (const std::string& subcommand : subcommands_) {
    const Words lines = lines_of(read_all(pages + "/stbllm-" + subcommand + ".1"));
    for (std::string option : options(subcommand)) {
      option = "\\fB" + std::regex_replace(option, std::regex("-"), "\\-") + "\\fR";
      const auto found = std::ranges::find_if(lines, [&](const std::string& line) {
        return line.starts_with("\\fB") && line.find(option) != line.npos;
      });
      ASSERT_LT(found, lines.end() - 1) << subcommand << " " << option;
      EXPECT_THAT(found[1], testing::MatchesRegex("[A-Za-z0-9$'\\].*[a-z)].*"))
          << subcommand << " " << option;
    }
  }
  const std::string warnings =
      "command -v mandoc >/dev/null || exit 0; mandoc -T lint -W error " + pages + "/*.1 2>&1";
  EXPECT_EQ(output_of(warnings), "");
}

}  // namespace
}  // namespace stbllm::test

#pragma once
// The program's options as CLI11 knows them, in the form that completion scripts and manual pages need.

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace stbllm {

/// An option or a positional argument.
struct OptionFacts {
  std::vector<std::string> names;   ///< "-o", "--output"; empty for a positional
  std::string positional;           ///< its name; empty for an option
  std::string value;                ///< the kind of its value ("TEXT", "INT"); empty for a flag
  std::vector<std::string> values;  ///< what it may be, or what is often meant (see suggest())
  bool files = false;               ///< it may be a path
  bool required = false;
  bool repeatable = false;  ///< it may be given several times
  std::string standard;     ///< the value without it; empty where there is none
  std::vector<std::string> excludes;
  std::string description;
};

/// Its options first, then its positionals, each in the order of the help; hidden ones are left out.
std::vector<OptionFacts> options_of(const CLI::App& command);

/// The subcommands in the order of the help.
std::vector<const CLI::App*> subcommands_of(const CLI::App& app);

/// For CLI::Option::check(): shows `values` in the help and in completions and accepts anything, such as the
/// presets beside files of one's own. "FILE" among them stands for any path.
CLI::Validator suggest(const std::vector<std::string>& values);

/// For CLI::Option::check(), with a sentence where CLI11's own print the largest double.
CLI::Validator above_zero();
CLI::Validator zero_or_more();

/// For CLI::Option::transform() to whole bytes: a number, maybe with a fraction, and one of k, M, G and T,
/// which stand for powers of 1000, or of 1024 with an i behind them; small letters do as well.
CLI::Validator byte_count();

}  // namespace stbllm

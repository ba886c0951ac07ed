// Manual pages, from the same descriptions as the help.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <filesystem>
#include <sstream>

#include "command_tree.h"
#include "commands.h"
#include "stbllm/base/text_file.h"

namespace stbllm {
namespace {

struct Options {
  std::string directory;
};

/// `text` without what troff reads as commands.
std::string troff(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '\\')
      escaped += "\\e";
    else if (c == '-')
      escaped += "\\-";  // a plain one is set as a hyphen, which cannot be pasted into a shell
    else if ((c == '.' || c == '\'') && (escaped.empty() || escaped.back() == '\n'))
      escaped += std::string("\\&") + c;
    else
      escaped += c;
  }
  return escaped;
}

/// Paragraphs as they are; lines that begin with two spaces are examples, which keep their line breaks.
std::string troff_paragraphs(const std::string& text) {
  std::string page;
  std::istringstream lines(text);
  bool example = false;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("  ") != example) page += example ? ".fi\n" : ".nf\n";
    example = line.starts_with("  ");
    page += line.empty() ? ".PP\n" : troff(line) + '\n';
  }
  return page + (example ? ".fi\n" : "");
}

std::string entry(const OptionFacts& option) {
  std::string page = ".TP\n";
  if (option.names.empty()) page += fmt::format("\\fI{}\\fR", troff(option.positional));
  for (const std::string& name : option.names)
    page += fmt::format("{}\\fB{}\\fR", &name == option.names.data() ? "" : ", ", troff(name));
  if (!option.names.empty() && !option.value.empty()) page += fmt::format(" \\fI{}\\fR", option.value);
  page += '\n' + troff(option.description) + (option.description.ends_with('.') ? "" : ".");
  if (!option.values.empty())
    page += troff(fmt::format("\n({}{})", fmt::join(option.values, ", "), option.files ? ", or a file" : ""));
  if (!option.standard.empty()) page += troff(fmt::format("\nDefault: {}.", option.standard));
  if (option.required && !option.names.empty()) page += "\nRequired.";
  if (!option.excludes.empty())
    page += troff(fmt::format("\nNot together with {}.", fmt::join(option.excludes, ", ")));
  return page + '\n';
}

/// The page of the program (`app` itself) or of one of its subcommands.
std::string manual_page(const CLI::App& app, const CLI::App& command) {
  const bool whole = &command == &app;
  const std::string words = whole ? "stbllm" : "stbllm " + command.get_name();
  const std::string page_name = whole ? "stbllm" : "stbllm-" + command.get_name();
  const std::string description = command.get_description();
  const std::string first_line = description.substr(0, description.find('\n'));
  const std::vector<OptionFacts> options = options_of(command);

  std::string page =
      fmt::format(".TH {} 1 \"\" \"stbllm {}\" \"stbllm\"\n", troff(page_name), STBLLM_VERSION);
  page += fmt::format(".SH NAME\n{} \\- {}\n", troff(page_name), troff(first_line));
  page += fmt::format(".SH SYNOPSIS\n\\fB{}\\fR [\\fIoptions\\fR]{}", troff(words),
                      whole ? " \\fIsubcommand\\fR ..." : "");
  for (const OptionFacts& option : options) {
    if (!option.positional.empty()) page += fmt::format(" \\fI{}\\fR", troff(option.positional));
  }
  page += '\n';
  if (description != first_line)
    page += ".SH DESCRIPTION\n" + troff_paragraphs(description.substr(first_line.size() + 1));
  if (whole) {
    page += ".SH SUBCOMMANDS\n";
    for (const CLI::App* other : subcommands_of(app))
      page += fmt::format(".TP\n\\fBstbllm\\-{}\\fR(1)\n{}\n", troff(other->get_name()),
                          troff(other->get_description()));
  }
  page += ".SH OPTIONS\n";
  for (const OptionFacts& option : options) page += entry(option);
  page += (whole ? ".SH EXIT STATUS\n" : ".SH NOTES\n") + troff_paragraphs(command.get_footer());
  if (!whole) page += ".SH SEE ALSO\n\\fBstbllm\\fR(1), whose options these commands take too\n";
  return page;
}

void run(const CLI::App& app, const Options& options) {
  const std::filesystem::path directory = options.directory;
  std::filesystem::create_directories(directory);
  write_text(directory / "stbllm.1", manual_page(app, app));
  for (const CLI::App* command : subcommands_of(app))
    write_text(directory / fmt::format("stbllm-{}.1", command->get_name()), manual_page(app, *command));
}

}  // namespace

void add_man(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("man", "Write the manual pages");
  command->add_option("directory", options->directory, "Where stbllm.1 and a page per subcommand go")
      ->required();
  command->callback([&app, options] { run(app, *options); });
}

}  // namespace stbllm

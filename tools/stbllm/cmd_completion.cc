// Completion scripts for bash, zsh and fish, from the same descriptions as the help. A script is complete in
// itself: a shell completes without starting the program, whose libraries take a tenth of a second to load.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdio>

#include "command_tree.h"
#include "commands.h"

namespace stbllm {
namespace {

struct Options {
  std::string shell;
};

/// A subcommand as the scripts need it, or the program itself (no name): what may follow its name.
struct Command {
  std::string name, description;
  std::vector<OptionFacts> options;  ///< those of the program too, which all subcommands take
  bool takes_files = false;          ///< some positional is a path
  std::vector<std::string> words;    ///< what the positionals may be instead
};

Command command_facts(const CLI::App& app, const CLI::App* command) {
  Command facts;
  if (command != nullptr) {
    facts.name = command->get_name();
    facts.description = command->get_description();
    for (const OptionFacts& option : options_of(*command)) {
      if (option.positional.empty()) {
        facts.options.push_back(option);
      } else {
        facts.takes_files |= option.files;
        facts.words.insert(facts.words.end(), option.values.begin(), option.values.end());
      }
    }
  }
  for (const OptionFacts& option : options_of(app)) {
    const bool is_help = option.names.back() == "--help" || option.names.back() == "--version";
    if (command == nullptr || !is_help) facts.options.push_back(option);
  }
  return facts;
}

std::vector<Command> all_commands(const CLI::App& app) {
  std::vector<Command> commands;
  for (const CLI::App* command : subcommands_of(app)) commands.push_back(command_facts(app, command));
  return commands;
}

std::vector<std::string> option_names(const std::vector<OptionFacts>& options) {
  std::vector<std::string> names;
  for (const OptionFacts& option : options)
    names.insert(names.end(), option.names.begin(), option.names.end());
  return names;
}

/// `text` with a backslash before each character of `special`.
std::string escaped(const std::string& text, std::string_view special) {
  std::string result;
  for (const char c : text) {
    if (special.find(c) != std::string_view::npos) result += '\\';
    result += c;
  }
  return result;
}

/// For a string between single quotes of bash and zsh, which know no escapes there.
std::string in_quotes(const std::string& text) {
  std::string result;
  for (const char c : text) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return "'" + result + "'";
}

// --- bash ---------------------------------------------------------------------------------------------

/// The `case` of one command: what follows its options that take a value, then what else may follow it.
std::string bash_command(const Command& command, const std::vector<std::string>& words) {
  std::string script = fmt::format("    {})\n      case $previous in\n", in_quotes(command.name));
  for (const OptionFacts& option : command.options) {
    if (option.value.empty()) continue;
    script += fmt::format("        {}) values='{}' files={} ;;\n", fmt::join(option.names, " | "),
                          fmt::join(option.values, " "), option.files ? 1 : 0);
  }
  return script + fmt::format(
                      "        *) values='{}' names='{}' files={} ;;\n"
                      "      esac ;;\n",
                      fmt::join(words, " "), fmt::join(option_names(command.options), " "),
                      command.takes_files ? 1 : 0);
}

std::string bash_script(const CLI::App& app) {
  const std::vector<Command> commands = all_commands(app);
  std::vector<std::string> names;
  for (const Command& command : commands) names.push_back(command.name);
  std::string script = fmt::format(
      "# Completion for bash, made by 'stbllm completion bash'. To use it: source it.\n"
      "_stbllm() {{\n"
      "  local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}}\n"
      "  local command='' values='' names='' files=0 i\n"
      "  # Readline takes the = of --option=value for a word.\n"
      "  [ \"$word\" != = ] || word=''\n"
      "  [ \"$previous\" != = ] || previous=${{COMP_WORDS[COMP_CWORD - 2]}}\n"
      "  for ((i = 1; i < COMP_CWORD; ++i)); do\n"
      "    case ${{COMP_WORDS[i]}} in\n"
      "      {}) command=${{COMP_WORDS[i]}}; break ;;\n"
      "    esac\n"
      "  done\n"
      "  case $command in\n",
      fmt::join(names, " | "));
  script += bash_command(command_facts(app, nullptr), names);
  for (const Command& command : commands) script += bash_command(command, command.words);
  return script +
         "  esac\n"
         "  case $word in -*) values=$names ;; esac\n"
         "  COMPREPLY=($(compgen -W \"$values\" -- \"$word\"))\n"
         "  [ \"$files\" = 1 ] || compopt +o default\n"
         "}\n"
         "complete -o default -F _stbllm stbllm\n";
}

// --- zsh ----------------------------------------------------------------------------------------------

/// What completes a value or a positional, in the form of an action of _arguments.
std::string zsh_action(const std::vector<std::string>& values, bool files) {
  if (values.empty()) return files ? "_files" : " ";
  return files ? fmt::format(" _stbllm_or_files {}", fmt::join(values, " "))
               : fmt::format("({})", fmt::join(values, " "));
}

std::string zsh_arguments(const std::vector<OptionFacts>& options) {
  std::string script;
  for (const OptionFacts& option : options) {
    const std::string value =
        option.value.empty() ? "" : ":" + option.value + ":" + zsh_action(option.values, option.files);
    const std::string once =
        option.repeatable ? "*" : fmt::format("({})", fmt::join(option.names, " "));  // it excludes itself
    for (const std::string& name : option.names) {
      // Behind = and + the value may be in the same word, --option=value and -ovalue.
      const char* joint = option.value.empty() ? "" : name.starts_with("--") ? "=" : "+";
      script += fmt::format(" \\\n          {}",
                            in_quotes(fmt::format("{}{}{}[{}]{}", once, name, joint,
                                                  escaped(option.description, "\\[]:"), value)));
    }
  }
  return script;
}

std::string zsh_script(const CLI::App& app) {
  const std::vector<Command> commands = all_commands(app);
  std::string script =
      "#compdef stbllm\n"
      "# Completion for zsh, made by 'stbllm completion zsh'. To use it: save it as _stbllm in a folder of "
      "$fpath.\n"
      "_stbllm_or_files() { _alternative \"values:value:(${(j: :)@})\" 'files:file:_files' }\n"
      "_stbllm() {\n"
      "  local -a commands=(\n";
  for (const Command& command : commands)
    script += fmt::format("    {}\n", in_quotes(escaped(command.name, ":") + ":" + command.description));
  script +=
      "  )\n"
      "  local context state state_descr line\n"
      "  typeset -A opt_args\n"
      "  _arguments -C" +
      zsh_arguments(command_facts(app, nullptr).options) +
      " \\\n          '1:subcommand:->command' '*::argument:->arguments'\n"
      "  case $state in\n"
      "    command) _describe subcommand commands ;;\n"
      "    arguments)\n"
      "      case $words[1] in\n";
  for (const Command& command : commands)
    script += fmt::format("        {}) _arguments{} \\\n          {} ;;\n", command.name,
                          zsh_arguments(command.options),
                          in_quotes("*:argument:" + zsh_action(command.words, command.takes_files)));
  return script +
         "      esac ;;\n"
         "  esac\n"
         "}\n"
         "if [ \"$funcstack[1]\" = _stbllm ]; then _stbllm \"$@\"; else compdef _stbllm stbllm; fi\n";
}

// --- fish ---------------------------------------------------------------------------------------------

std::string fish_line(const std::string& condition, const std::string& rest) {
  return fmt::format("complete -c stbllm -n '{}' {}\n", condition, rest);
}

std::string fish_option(const OptionFacts& option) {
  std::string line;
  for (const std::string& name : option.names)
    line += name.starts_with("--") ? "-l " + name.substr(2) + " " : "-s " + name.substr(1) + " ";
  if (!option.value.empty()) line += option.files ? "-r -F " : "-x ";
  if (!option.values.empty()) line += fmt::format("-a '{}' ", fmt::join(option.values, " "));
  return line + fmt::format("-d '{}'", escaped(option.description, "\\'"));
}

std::string fish_script(const CLI::App& app) {
  std::string script =
      "# Completion for fish, made by 'stbllm completion fish'. To use it: save it as\n"
      "# ~/.config/fish/completions/stbllm.fish.\n"
      "complete -c stbllm -f\n";
  for (const OptionFacts& option : command_facts(app, nullptr).options)
    script += fish_line("__fish_use_subcommand", fish_option(option));
  for (const Command& command : all_commands(app)) {
    const std::string follows = "__fish_seen_subcommand_from " + command.name;
    script += fish_line("__fish_use_subcommand",
                        fmt::format("-a {} -d '{}'", command.name, escaped(command.description, "\\'")));
    for (const OptionFacts& option : command.options) script += fish_line(follows, fish_option(option));
    if (command.takes_files) script += fish_line(follows, "-F");
    if (!command.words.empty())
      script += fish_line(follows, fmt::format("-a '{}'", fmt::join(command.words, " ")));
  }
  return script;
}

void run(const CLI::App& app, const Options& options) {
  const std::string script = options.shell == "bash"  ? bash_script(app)
                             : options.shell == "zsh" ? zsh_script(app)
                                                      : fish_script(app);
  fmt::print("{}", script);
}

}  // namespace

void add_completion(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("completion", "Print the completion script of a shell");
  command->add_option("shell", options->shell, "The shell that will read it")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  command->callback([&app, options] { run(app, *options); });
}

}  // namespace stbllm

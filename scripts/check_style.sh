#!/usr/bin/env bash
# Checks how the sources are written. The exit status is 77 where a tool is missing, so that a test is skipped.
#
#   scripts/check_style.sh format           clang-format 14.0.6 changes nothing, and no line is over 110 columns
#   scripts/check_style.sh warnings BUILD   clang 14 has no warning about the sources that BUILD compiles
#   scripts/check_style.sh tidy BUILD       clang-tidy 14 has none of those that .clang-tidy lists: half an hour, no test
set -euo pipefail
cd "$(dirname "$0")/.."

# Other versions decide some lines differently.
format_version=14.0.6
columns=110

skip() { printf 'skipped: %s\n' "$*" >&2; exit 77; }

sources() { git ls-files -z -- '*.cc' '*.h' '*.cu' '*.cuh'; }

find_clang_format() {
  local tool
  for tool in clang-format-14 clang-format .deps/clang-format; do
    if [[ $("$tool" --version 2>/dev/null || true) == *" version $format_version"* ]]; then
      printf '%s' "$tool"
      return
    fi
  done
}

check_format() {
  git rev-parse --is-inside-work-tree >/dev/null 2>&1 || skip "this is no git checkout, which lists the sources"
  local tool failed=0
  tool=$(find_clang_format)
  [ -n "$tool" ] || skip "there is no clang-format $format_version; scripts/setup.sh tests fetches it"
  sources | xargs -0 -n 16 -P "$(nproc)" "$tool" --dry-run --Werror || failed=1
  if sources | LC_ALL=C.UTF-8 xargs -0 grep -HnE "^.{$((columns + 1)),}"; then
    printf 'the lines above have more than %d columns\n' "$columns" >&2
    failed=1
  fi
  ((failed == 0)) || printf 'to format a file: %s -i FILE\n' "$tool" >&2
  return "$failed"
}

check_warnings() {  # build directory
  local tool
  for tool in clang++-14 clang++; do
    [[ $("$tool" --version 2>/dev/null || true) == *"clang version 14."* ]] || continue
    exec python3 scripts/clang_warnings.py "$tool" "$1"
  done
  skip "there is no clang 14; scripts/setup.sh tests installs it where the system has it"
}

check_tidy() {  # build directory
  command -v clang-tidy-14 >/dev/null || skip "there is no clang-tidy-14 (package clang-tidy-14)"
  sed -n 's/^ *"file": "\(.*\.cc\)".*/\1/p' "$1/compile_commands.json" | grep -v "^$(realpath "$1")/" | sort -u |
    xargs -d '\n' -n 1 -P "$(nproc)" clang-tidy-14 -p "$1" --quiet 2>/dev/null
}

case ${1:-} in
  format) check_format ;;
  warnings) check_warnings "${2:?the build directory is missing}" ;;
  tidy) check_tidy "${2:?the build directory is missing}" ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

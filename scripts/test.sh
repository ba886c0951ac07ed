#!/usr/bin/env bash
# Sets the machine up, builds everything and runs the tests.
#
#   scripts/test.sh [--all] [ctest options]
#
# --all also runs the tests labelled `slow`. Everything else goes to ctest: scripts/test.sh -R checkpoint
set -euo pipefail
cd "$(dirname "$0")/.."

which=(-LE slow)
if [ "${1:-}" = --all ]; then
  which=()
  shift
fi
bash scripts/build.sh
printf '[test] ctest %s\n' "${which[*]} $*" >&2
ctest --test-dir build --output-on-failure --no-tests=error --parallel 2 ${which[@]+"${which[@]}"} "$@"

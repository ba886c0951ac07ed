#!/usr/bin/env bash
# Sets the machine up, builds everything and runs the tests.
#
#   scripts/test.sh [ctest options], such as -R checkpoint
#
# The last line says how many tests passed, failed and were skipped; lines above it say why.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh tests
bash scripts/build.sh
results=$(mktemp) && trap 'rm -f "$results"' EXIT
printf '[test] ctest %s\n' "$*" >&2
status=0
ctest --test-dir build --output-on-failure --no-tests=error --parallel 2 --output-junit "$results" "$@" || status=$?
[ ! -s "$results" ] || python3 scripts/summarize_tests.py "$results"
exit "$status"

#!/usr/bin/env bash
# Sets the machine up, builds everything and runs the tests.
#
#   scripts/test.sh [ctest options], such as -R checkpoint
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/build.sh
printf '[test] ctest %s\n' "$*" >&2
ctest --test-dir build --output-on-failure --no-tests=error --parallel 2 "$@"

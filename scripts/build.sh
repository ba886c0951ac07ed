#!/usr/bin/env bash
# Sets the machine up and builds the release into build/.
#
#   scripts/build.sh [target...]      default: everything
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
printf '[build] configuring build/\n' >&2
cmake --preset release >/dev/null
printf '[build] building %s\n' "${*:-everything}" >&2
cmake --build --preset release --parallel "$(nproc)" ${1+--target "$@"}

#!/usr/bin/env bash
# Quantizes random models by random recipes and checks all that must hold of them (tests/soak).
#
#   scripts/soak.sh [COUNT [FIRST]]      default: 300 cases from number 1 on
#
# A case depends on its number alone: `scripts/soak.sh 1 217` repeats case 217. The first failed check of a case
# prints the model and the recipe. The exit status is 1 when a case failed.
set -euo pipefail
cd "$(dirname "$0")/.."

count=${1:-300} first=${2:-1}
cmake --build build --parallel "${STBLLM_JOBS:-$(nproc)}" --target stbllm soak_test >&2
STBLLM_SOAK="$first $count" exec build/soak_test --gtest_brief=1

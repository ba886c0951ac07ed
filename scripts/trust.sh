#!/usr/bin/env bash
# All that tests/SECURITY.md speaks of in its long form, one after the other: some hours on two cores. The test
# command runs the short forms.
#
#   scripts/trust.sh
#
# Stops at the first finding, whose script says how to repeat it.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '[trust] %s\n' "$*" >&2; "$@"; }
bash scripts/build.sh
step scripts/soak.sh 300
step scripts/faults.sh --times 30
step scripts/sanitize.sh
step scripts/check_style.sh tidy build
step scripts/fuzz.sh --runs 10000000

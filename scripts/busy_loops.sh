#!/usr/bin/env bash
# How long a command takes alone, and with two busy loops on the same machine: whether threads that wait give way.
#
#   scripts/busy_loops.sh COMMAND [ARGUMENT...]
set -euo pipefail
(($#)) || { printf 'usage: scripts/busy_loops.sh COMMAND [ARGUMENT...]\n' >&2; exit 2; }

timed() { TIMEFORMAT="$1 %R s"; shift; { time "$@" >/dev/null 2>&1; }; }

timed alone "$@"
loops=()
trap 'kill "${loops[@]}" 2>/dev/null || true' EXIT
for _ in 1 2; do (while :; do :; done) & loops+=($!); done
timed 'beside two busy loops' "$@"

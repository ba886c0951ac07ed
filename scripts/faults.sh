#!/usr/bin/env bash
# What the program does when the machine fails it: about five minutes with build/stbllm and a tiny checkpoint.
#
#   scripts/faults.sh [SEED [CHECK...]]      default: a new seed, which the first line names, and all checks
#
# It uses ../shared/models/stories260K where that is there, else a checkpoint of tests/golden. Checks, each of
# which ends the script with status 1 when it fails:
#   kill       kill -9 at random moments of a plain, a tuned and a distilled run; --resume gives the same bytes
#   disk       files that may not grow, from nothing up to the whole result: exit 9, and then the same bytes
#   directory  an output directory that cannot be written: exit 9 before any work
#   truncate   a checkpoint that is cut off while it is evaluated: exit 4 and one sentence
#   bits       one bit changed in every tensor of a packed file: each command exits with 4 and names it
#   memory     limits on address space: exit 0 or 11
exec python3 "$(dirname "$0")/faults.py" "$@"

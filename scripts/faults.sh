#!/usr/bin/env bash
# What the program does when the machine fails it, with build/stbllm and a tiny checkpoint.
#
#   scripts/faults.sh [--times N] [SEED [CHECK...]]      default: 4 times, a new seed, which the first line names, and
#                                                        all checks
#
# It uses ../shared/models/stories260K where that is there, else a checkpoint of tests/golden. Checks, each of
# which ends the script with status 1 when it fails:
#   kill       kill -9 at N random moments of a plain, a tuned, a distilled and a two-process run, resumed each time:
#              the same bytes as undisturbed, and nothing else is left
#   terminate  SIGTERM at N random moments: exit 130, a sentence on how to go on, and then the same bytes
#   lost       one of two processes is killed N times: the other ends with 130 and says so, and then the same bytes
#   twice      two runs into one output N times: at most one is refused, with exit 8
#   sweep      kill -9 at N random moments of scripts/sweep.sh: started again it has the same points
#   disk       files that may not grow, from nothing up to the whole result: exit 9, and then the same bytes
#   directory  an output directory that cannot be written: exit 9 before any work
#   truncate   a checkpoint that is cut off while it is evaluated: exit 4 and one sentence
#   bits       one bit changed in every tensor of a packed file: each command exits with 4 and names it
#   memory     limits on address space: exit 0 or 11
exec python3 "$(dirname "$0")/faults.py" "$@"

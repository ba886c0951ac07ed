#!/usr/bin/env bash
# Quantizes and evaluates a checkpoint once per point; scripts/sweep.sh --help says how.
exec python3 "$(dirname "$0")/sweep.py" "$@"

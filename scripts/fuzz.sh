#!/usr/bin/env bash
# Builds the fuzz targets of tests/fuzz into build-fuzz/ (clang, libFuzzer, address and undefined-behaviour
# sanitizers) and runs them, as many at a time as there are cores.
#
#   scripts/fuzz.sh [SECONDS | --runs N] [TARGET...]      default: 60 seconds for each target, all targets
#
# It ends after the first input that crashes, hangs for ten seconds or takes too much memory (more than 256 MiB
# at once, or 2.5 GiB with what the sanitizers and libtorch hold themselves), prints the path of that input,
# and exits with 1. Repeat it with build-fuzz/fuzz_TARGET PATH; when it is mended, keep the input in
# tests/fuzz/regressions/TARGET/. Inputs that reach new code stay in build-fuzz/found/TARGET for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."

export limit=-max_total_time=60 failed=build-fuzz/failed
if [[ ${1:-} =~ ^[0-9]+$ ]]; then limit=-max_total_time=$1; shift; fi
if [[ ${1:-} == --runs ]]; then limit=-runs=${2:?--runs needs a number}; shift 2; fi
mapfile -t all < <(cd tests/fuzz && for source in *_fuzz.cc; do printf '%s\n' "${source%_fuzz.cc}"; done)
targets=("${@:-${all[@]}}")
for target in "${targets[@]}"; do
  [ -e "tests/fuzz/${target}_fuzz.cc" ] || { printf 'no target %s; there are: %s\n' "$target" "${all[*]}" >&2; exit 2; }
done

jobs=${STBLLM_JOBS:-$(nproc)}
cmake --preset fuzz >/dev/null
cmake --build build-fuzz --parallel "$jobs" --target "${targets[@]/#/fuzz_}"

fuzz() {  # target
  local target=$1 found=build-fuzz/found/$1 seeds=() folder
  mkdir -p "$found" "$failed"
  for folder in tests/fuzz/corpus/$target tests/fuzz/regressions/$target; do
    if [ -d "$folder" ]; then seeds+=("$folder"); fi
  done
  local options=("$limit" -timeout=10 -rss_limit_mb=2560 -malloc_limit_mb=256 -max_len=65536
                 -print_final_stats=1 -artifact_prefix="$failed/$target-")
  local dictionary=tests/fuzz/dictionaries/$target.dict
  if [ -e "$dictionary" ]; then options+=(-dict="$dictionary"); fi
  # libtorch's zip reader leaks when it finds a damaged archive, 18 KB for each. That is no failure of a run, a
  # search for leaks after every input takes a hundred times as long as reading it, and the process that reads
  # them must be replaced from time to time, by a parent.
  local leaks=1
  if [ "$target" = torch_zip ]; then leaks=0; options+=(-detect_leaks=0 -fork=1); fi
  # More threads than one only make a run hard to repeat.
  if ! ASAN_OPTIONS=detect_leaks=$leaks OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive "build-fuzz/fuzz_$target" \
      "${options[@]}" "$found" "${seeds[@]}" >"build-fuzz/$target.log" 2>&1; then
    tail -n 40 "build-fuzz/$target.log" >&2
    grep -o "$failed/$target-[^ ]*" "build-fuzz/$target.log" | tail -n 1 |
      sed 's/^/failing input: /' >&2
    return 1
  fi
  # What a child ran out of memory or time at may be the fault of leaks before it: alone an input shows its own.
  local input
  for input in "$failed/$target"-{oom,timeout}-*; do
    if [ "$leaks" = 1 ] || [ ! -e "$input" ]; then continue; fi
    if ! ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 "build-fuzz/fuzz_$target" -detect_leaks=0 -timeout=10 \
        -rss_limit_mb=2560 -malloc_limit_mb=256 "$input" >>"build-fuzz/$target.log" 2>&1; then
      printf 'failing input: %s\n' "$input" >&2
      return 1
    fi
    rm "$input"
  done
  local runs
  runs=$(sed -nE 's/^(stat::number_of_executed_units: *([0-9]+)|#([0-9]+): cov.*)/\2\3/p' "build-fuzz/$target.log" | tail -n 1)
  printf '%-16s %9s runs  %s\n' "$target" "$runs" "$(grep -oE 'DONE.*|cov: .*' "build-fuzz/$target.log" | tail -n 1)"
}

export -f fuzz
printf '%s\n' "${targets[@]}" | xargs -P "$jobs" -I{} bash -c 'fuzz {} || exit 255' || exit 1

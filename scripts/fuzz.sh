#!/usr/bin/env bash
# Builds the fuzz targets of tests/fuzz into build-fuzz/ (clang, libFuzzer, address and undefined-behaviour
# sanitizers) and runs them one after the other.
#
#   scripts/fuzz.sh [SECONDS] [TARGET...]      default: 60 seconds, all targets
#
# It stops at the first input that crashes, hangs for ten seconds or takes too much memory (more than 256 MiB
# at once, or 2.5 GiB with what the sanitizers and libtorch hold themselves), prints the path of that input,
# and exits with 1. Repeat it with build-fuzz/fuzz_TARGET PATH; when it is mended, keep the input in
# tests/fuzz/regressions/TARGET/. Inputs that reach new code stay in build-fuzz/found/TARGET for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=60
if [[ ${1:-} =~ ^[0-9]+$ ]]; then seconds=$1; shift; fi
mapfile -t all < <(cd tests/fuzz && for source in *_fuzz.cc; do printf '%s\n' "${source%_fuzz.cc}"; done)
targets=("${@:-${all[@]}}")
for target in "${targets[@]}"; do
  [ -e "tests/fuzz/${target}_fuzz.cc" ] || { printf 'no target %s; there are: %s\n' "$target" "${all[*]}" >&2; exit 2; }
done

cmake --preset fuzz >/dev/null
cmake --build build-fuzz --parallel "${STBLLM_JOBS:-$(nproc)}" --target "${targets[@]/#/fuzz_}"

for target in "${targets[@]}"; do
  found=build-fuzz/found/$target failed=build-fuzz/failed
  mkdir -p "$found" "$failed"
  seeds=()
  for folder in tests/fuzz/corpus/$target tests/fuzz/regressions/$target; do
    if [ -d "$folder" ]; then seeds+=("$folder"); fi
  done
  options=(-max_total_time="$seconds" -timeout=10 -rss_limit_mb=2560 -malloc_limit_mb=256 -max_len=65536
           -print_final_stats=1 -artifact_prefix="$failed/$target-")
  dictionary=tests/fuzz/dictionaries/$target.dict
  if [ -e "$dictionary" ]; then options+=(-dict="$dictionary"); fi
  # More threads than one only make a run hard to repeat.
  if ! OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive "build-fuzz/fuzz_$target" "${options[@]}" "$found" "${seeds[@]}" \
      >"build-fuzz/$target.log" 2>&1; then
    tail -n 40 "build-fuzz/$target.log" >&2
    grep -o "$failed/$target-[^ ]*" "build-fuzz/$target.log" | tail -n 1 |
      sed 's/^/failing input: /' >&2
    exit 1
  fi
  printf '%-16s %s\n' "$target" "$(grep -o 'DONE.*' "build-fuzz/$target.log" | tail -n 1)"
done

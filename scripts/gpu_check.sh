#!/usr/bin/env bash
# The packed products on a GPU, in one command and less than 8 minutes, without a network:
# builds it alone (CUDA toolkit, CMake >= 3.24, a C++20 compiler, and the fmt headers that PyTorch bundles), then
#   1. probe      the fragment layouts of mma and mma.sp: every lane, register and metadata value
#   2. compare    results equal to the packed file's decode rule, to the last bit, over all layouts and kernels
#   3. bench      against cublasGemmEx fp16: a table on stdout, JSON in the output directory
#   4. sass       the machine code has the intended instructions                        (skipped when missing)
#   5. sanitizer  compute-sanitizer on a few shapes: memcheck, racecheck, synccheck      (skipped when missing)
#
#   bash scripts/gpu_check.sh [output directory]        default: $OUT, else gpu-check/
#
# It stops where 1 or 2 fail; the others run whatever became of those before them. The exit status is that of the first
# that failed.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-${OUT:-$PWD/gpu-check}}
build=${STBLLM_GPU_BUILD:-/tmp/stbllm-gpu-check}
mkdir -p "$out"
started=$SECONDS
say() { printf '[gpu_check %3ds] %s\n' $((SECONDS - started)) "$*"; }
die() { say "error: $*"; exit 1; }

command -v nvcc >/dev/null || PATH=/usr/local/cuda/bin:$PATH
command -v nvcc >/dev/null || die "nvcc is not on PATH"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || die "no NVIDIA driver here"

# --- the fmt headers ------------------------------------------------------------------------------------------
fmt_include=
for candidate in "${TORCH_ROOT:-}/include" .deps/torch/include .deps/include /usr/include \
  "$(python3 -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("torch").origin))' 2>/dev/null || true)/include"; do
  if [ -f "$candidate/fmt/format.h" ]; then fmt_include=$(cd "$candidate" && pwd); break; fi
done
[ -n "$fmt_include" ] || die "fmt/format.h not found: set TORCH_ROOT, or unpack the fmt headers into .deps/include"
if [ "$fmt_include" = /usr/include ]; then fmt_argument=(); else fmt_argument=(-DFMT_INCLUDE="$fmt_include"); fi

# --- build ----------------------------------------------------------------------------------------------------
generator=(); command -v ninja >/dev/null && generator=(-G Ninja)
say "building in $build"
cmake -S tools/bench_cuda -B "$build" "${generator[@]}" -DCMAKE_CUDA_ARCHITECTURES=native "${fmt_argument[@]}" >"$out/build.log" 2>&1 &&
  timeout 240 cmake --build "$build" -j "$(nproc)" >>"$out/build.log" 2>&1 || { tail -30 "$out/build.log"; die "the build failed"; }
check=$build/stbllm-cuda-check

# --- correctness ----------------------------------------------------------------------------------------------
say "probe";   timeout 60 "$check" probe
say "compare"; timeout 100 "$check" compare

# --- the rest -------------------------------------------------------------------------------------------------
failed=0
# step NAME SECONDS COMMAND...: at most SECONDS, and what is left of the 465 for all.
step() {
  local name=$1 limit=$2 left=$((465 - (SECONDS - started))) status=0
  shift 2
  if ((left < 10)); then say "$name: skipped: no time left"; return; fi
  say "$name"
  timeout $((limit < left ? limit : left)) "$@" || status=$?
  if ((status != 0)); then
    say "$name: exit status $status"
    if ((failed == 0)); then failed=$status; fi
  fi
}
bench() { "$check" bench "$out/cuda_bench.json" | tee "$out/cuda_bench.txt"; }
export -f bench
export check out
step bench 240 bash -o pipefail -c bench
step sass 30 bash scripts/check_sass.sh "$check"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "compute-sanitizer $tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$check" compare few
  done
else
  say "compute-sanitizer: skipped: not on PATH"
fi
say "done; JSON in $out/cuda_bench.json"
exit $failed

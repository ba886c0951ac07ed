#!/usr/bin/env bash
# Builds and runs the tests under clang's and g++'s sanitizers. The first finding is a failed test.
#
#   scripts/sanitize.sh [address|thread] [ctest options]      default: both, all tests
#
#   address   address and undefined behaviour, the whole suite (build-asan/, g++)
#   thread    data races, in what is built without libtorch: base, text, pack, kernels, backend (build-tsan/, clang
#             with its own OpenMP and Archer, package libomp-14-dev). libtorch is linked to libgomp, whose barriers
#             ThreadSanitizer does not see; our own parallel loops are in these folders, or use the same parallel_for.
set -euo pipefail
cd "$(dirname "$0")/.."

jobs=${STBLLM_JOBS:-$(nproc)}
kinds=(address thread)
case ${1:-} in address | thread) kinds=("$1"); shift ;; esac

run_address() {
  cmake --preset asan >/dev/null
  cmake --build build-asan --parallel "$jobs"
  # libtorch keeps what it allocates for the whole process, and its zip reader leaks; what our own code leaks shows in
  # the tests that are built without it. A request that is refused for its size must come back as std::bad_alloc.
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    ctest --test-dir build-asan --output-on-failure --no-tests=error --parallel "$jobs" -E '^style' "$@"
}

run_thread() {
  local archer
  archer=$(ls /usr/lib/llvm-*/lib/libarcher.so 2>/dev/null | tail -n 1)
  [ -n "$archer" ] || { printf 'libarcher.so is missing: install libomp-14-dev\n' >&2; exit 2; }
  local folders=(base text pack kernels backend)
  cmake --preset tsan >/dev/null
  cmake --build build-tsan --parallel "$jobs" --target "${folders[@]/%/_test}"
  local pattern
  pattern=$(IFS='|'; printf '^(%s)\\.' "${folders[*]}")
  OMP_TOOL_LIBRARIES=$archer TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 \
    ctest --test-dir build-tsan --output-on-failure --no-tests=error --parallel "$jobs" -R "$pattern" "$@"
}

for kind in "${kinds[@]}"; do "run_$kind" "$@"; done

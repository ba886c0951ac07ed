#!/usr/bin/env bash
# Compiles for 64-bit ARM what needs no libtorch (base, pack, kernels, backend) into build-aarch64/ and runs its tests
# in an emulator, with the kernels of NEON. The exit status is 77 where a tool is missing, so that a test is skipped.
#
#   scripts/check_aarch64.sh [gtest options]
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { printf 'skipped: %s\n' "$*" >&2; exit 77; }
[ "$(uname -m)" != aarch64 ] || skip "this machine is one: its own build has these tests"
command -v aarch64-linux-gnu-g++ >/dev/null || skip "there is no aarch64-linux-gnu-g++ (package g++-aarch64-linux-gnu)"
command -v qemu-aarch64 >/dev/null || skip "there is no qemu-aarch64 (package qemu-user)"

folders=(base pack kernels backend)
cmake --preset aarch64 >/dev/null
cmake --build build-aarch64 --parallel "${STBLLM_JOBS:-$(nproc)}" --target "${folders[@]/%/_test}"
for folder in "${folders[@]}"; do
  filter=*
  if [ "$folder" = kernels ]; then filter='*neon*'; fi  # all others are for this machine too
  qemu-aarch64 -L /usr/aarch64-linux-gnu "build-aarch64/${folder}_test" --gtest_brief=1 --gtest_filter="$filter" "$@"
done

#!/usr/bin/env bash
# Checks that the CUDA kernels became the machine code they were written for:
#   - the sparse kernels use HMMA.SP, the dense ones HMMA.16816;
#   - weights and staged activations travel in 16-byte asynchronous copies, B fragments in 16-byte loads;
#   - no product kernel keeps anything in local memory (no spills).
#
#   bash scripts/check_sass.sh FILE...      object files, libraries or programs that hold the kernels
#
# Needs cuobjdump and nvdisasm (CUDA toolkit); without them it says so and succeeds. Set STBLLM_SASS_REQUIRED=1 to
# fail instead.
set -euo pipefail

(($#)) || { echo "usage: check_sass.sh FILE..." >&2; exit 2; }
for tool in cuobjdump nvdisasm; do
  if ! command -v "$tool" >/dev/null; then
    echo "check_sass: skipped: $tool is not on PATH"
    exit "${STBLLM_SASS_REQUIRED:-0}"
  fi
done

for file in "$@"; do cuobjdump -sass "$file"; done | awk '
  function check(found, what) {
    ++checks
    if (!found) { print "check_sass: sm_" arch ": " name ": " what; ++faults }
  }
  function finish() {
    if (kind == "") return
    ++kernels
    if (sparse) check(seen["HMMA.SP.16832"], "no HMMA.SP.16832")
    else check(seen["HMMA.16816"], "no HMMA.16816")
    check(seen["copy16"], "no 16-byte asynchronous copy")
    check(kind == "gemm" ? seen["LDSM"] : seen["LDS.128"], kind == "gemm" ? "no LDSM" : "no LDS.128")
    check(!seen["local"], seen["local"] " local-memory instructions")
    kind = ""
  }
  /arch = sm_/ { arch = $3; sub("sm_", "", arch) }
  /Function : / {
    finish(); name = $3; delete seen
    kind = name ~ /gemm_kernel/ ? "gemm" : name ~ /gemv_kernel/ ? "gemv" : ""
    sparse = name ~ /kernelILb1/
  }
  /HMMA\.SP\.16832/ { ++seen["HMMA.SP.16832"] }
  /HMMA\.16816/ { ++seen["HMMA.16816"] }
  /LDGSTS.*\.128/ { ++seen["copy16"] }
  /LDSM\.16/ { ++seen["LDSM"] }
  /LDS\.128/ { ++seen["LDS.128"] }
  / (STL|LDL)[. ]/ { ++seen["local"] }
  END {
    finish()
    if (kernels == 0) { print "check_sass: no gemm or gemv kernel found"; exit 1 }
    printf "check_sass: %d kernels, %d checks, %d faults\n", kernels, checks, faults
    exit faults > 0
  }'

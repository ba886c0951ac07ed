#!/usr/bin/env bash
# Installs a build twice: the library, against which the example beside this script is built and run, and the program.
# libtorch (half a gigabyte) is not copied; the program is told where it is.
#
#   tests/install/check.sh BUILD TORCH_LIBRARIES [--config NAME]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=${1:?the build directory is missing} torch=${2:?the directory of libtorch.so is missing}
prefix=$(mktemp -d) && trap 'rm -rf "$prefix"' EXIT
failed=0
complain() { printf 'failed: %s\n' "$*" >&2; failed=1; }

for component in library program; do
  cmake --install "$build" --prefix "$prefix/first" --component "$component" >/dev/null
done
mv "$prefix/first" "$prefix/moved"  # an installed tree may be moved
tree=$prefix/moved

# --- what was written for other builds names no folder of this one -----------------------------------
source=$(cd "$here/../.." && pwd)
for folder in "$source" "$(cd "$build" && pwd)" "$torch" "$prefix/first"; do
  ! grep -rIlF "$folder" "$tree" || complain "the files above name $folder"
done

# --- the library --------------------------------------------------------------------------------------
cmake -S "$here" -B "$prefix/multiply" -DCMAKE_PREFIX_PATH="$tree" -DCMAKE_CXX_COMPILER_LAUNCHER= >/dev/null
cmake --build "$prefix/multiply" >/dev/null
# The sums of the rows that packed_v1.json lists for this matrix.
expected=$(printf '%s\n' 0.1660 -0.6157 -1.3105 2.4756 -1.5293)
sums=$("$prefix/multiply/multiply" "$here/../golden/packed_v1.safetensors" binary)
[ "$sums" = "$expected" ] || complain "the example printed $sums instead of $expected"
if readelf -d "$prefix/multiply/multiply" | grep -qE 'NEEDED.*(torch|c10)'; then complain "the example needs libtorch"; fi

# --- the program --------------------------------------------------------------------------------------
run_path=$(readelf -d "$tree/bin/stbllm" | sed -nE 's/.*(RPATH|RUNPATH).*\[(.*)\]/\2/p')
[[ $run_path = '$ORIGIN/'* && $run_path != *:* ]] || complain "the program looks for libraries in '$run_path'"
LD_LIBRARY_PATH=$torch${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$tree/bin/stbllm" --version | grep -q '^stbllm ' || complain "the program does not start"
for file in man/man1/stbllm-quantize.1 bash-completion/completions/stbllm zsh/site-functions/_stbllm fish/vendor_completions.d/stbllm.fish; do
  [ -s "$tree/share/$file" ] || complain "share/$file is missing"
done
exit "$failed"

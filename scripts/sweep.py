#!/usr/bin/env python3
"""Quantizes and evaluates a checkpoint once per N:M pattern.

    scripts/sweep.sh CHECKPOINT --nm "2:8 4:8 2:4 6:8" -o DIR [options of `stbllm quantize` and `stbllm eval-ppl`]

--data, --windows and --backend go to eval-ppl; --seqlen, --threads and --device to both; --eval-seqlen holds for
eval-ppl alone; every other option goes to quantize. DIR gets the packed file and the log of each point, and one line
per finished point in sweep.jsonl. Finished points are skipped: start an interrupted sweep again, or add patterns and
options to it. The exit status is 1 when a point failed. $STBLLM names another program than build/stbllm.
"""

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.environ.get("STBLLM", os.path.join(ROOT, "build", "stbllm"))


def say(message):
    print(f"[sweep] {message}", file=sys.stderr, flush=True)


def die(message):
    say(f"error: {message}")
    sys.exit(2)


def parse_arguments(arguments):
    """(checkpoint, patterns, directory, options of quantize, options of eval-ppl)."""
    parser = argparse.ArgumentParser(usage="scripts/sweep.sh CHECKPOINT --nm PATTERNS -o DIR [options]", add_help=False, allow_abbrev=False)
    parser.add_argument("--nm", required=True)
    parser.add_argument("-o", "--output", required=True)
    evaluate_only, both = ["--data", "--windows", "--backend"], ["--seqlen", "--threads", "--device"]
    for option in evaluate_only + both + ["--eval-seqlen"]:
        parser.add_argument(option)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if arguments else 2)
    checkpoint = arguments[0].rstrip("/")
    parsed, quantize = parser.parse_known_args(arguments[1:])
    evaluate = []
    for option in evaluate_only + both:
        value = getattr(parsed, option[2:])
        if option in both and value is not None:
            quantize += [option, value]
        if option == "--seqlen" and parsed.eval_seqlen is not None:
            value = parsed.eval_seqlen
        if value is not None:
            evaluate += [option, value]
    if parsed.data is None:
        evaluate += ["--data", "wikitext2"]
    return checkpoint, parsed.nm.replace(",", " ").split(), parsed.output, quantize, evaluate


class Point:
    """One N:M pattern under one set of options."""

    def __init__(self, directory, checkpoint, pattern, quantize, evaluate):
        self.pattern = pattern
        self.options = {"checkpoint": checkpoint, "nm": pattern, "quantize": quantize, "eval": evaluate}
        digest = hashlib.sha256(json.dumps(self.options).encode()).hexdigest()[:8]
        self.stem = os.path.join(directory, f"{pattern.replace(':', '-')}-{digest}")

    def run(self):
        """The point's line; raises CalledProcessError when a command failed."""
        packed = self.stem + ".safetensors"
        with open(self.stem + ".log", "w", encoding="utf-8") as log:

            def call(*command):
                command = [PROGRAM, *command, "--json"]
                log.write(" ".join(command) + "\n")
                log.flush()
                return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=log).stdout)

            options = self.options
            quantized = call("quantize", options["checkpoint"], "-o", packed, "--force", "--nm", options["nm"],
                             *options["quantize"])
            inspected = call("inspect", packed)
            evaluated = call("eval-ppl", packed, *options["eval"])
        return {
            "options": options,
            "file": os.path.basename(packed),
            "nominal_bits": inspected["nominal_bits"],
            "stored_bits": inspected["stored_bits"],
            "file_bytes": inspected["file_bytes"],
            "perplexity": evaluated["perplexity"],
            "standard_error": evaluated["standard_error"],
            "windows": evaluated["windows"],
            "seqlen": evaluated["seqlen"],
            "seconds": quantized["seconds"],
            "eval_seconds": evaluated["seconds"],
            "peak_memory_bytes": quantized["peak_memory_bytes"],
        }


def read_lines(path):
    """The finished points. A last line that was cut off by a crash does not count and is removed."""
    if not os.path.exists(path):
        return []
    with open(path, "r+b") as file:
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        file.truncate(len(whole))
    return [json.loads(line) for line in whole.decode().splitlines()]


def print_table(lines):
    print(f"{'N:M':>6} {'nominal':>8} {'stored':>7} {'file MB':>8} {'perplexity':>20} {'minutes':>8} {'peak GB':>8}")
    for line in lines:
        perplexity = f"{line['perplexity']:.2f} +- {line['standard_error']:.2f}"
        print(f"{line['options']['nm']:>6} {line['nominal_bits']:8.3f} {line['stored_bits']:7.3f} "
              f"{line['file_bytes'] / 1e6:8.1f} {perplexity:>20} {line['seconds'] / 60:8.1f} "
              f"{line['peak_memory_bytes'] / 1e9:8.2f}")


def main():
    checkpoint, patterns, directory, quantize, evaluate = parse_arguments(sys.argv[1:])
    if not os.access(PROGRAM, os.X_OK):
        die(f"{PROGRAM} is not there; build it with scripts/build.sh")
    if not os.path.isdir(checkpoint):
        die(f"{checkpoint}: expected the directory of a checkpoint")
    os.makedirs(directory, exist_ok=True)
    lock = open(os.path.join(directory, ".lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        die(f"another sweep is at work in {directory}")

    path = os.path.join(directory, "sweep.jsonl")
    done = {json.dumps(line["options"]): line for line in read_lines(path)}
    lines, failed = [], []
    for number, pattern in enumerate(patterns, 1):
        point = Point(directory, checkpoint, pattern, quantize, evaluate)
        key = json.dumps(point.options)
        if key in done:
            say(f"{number}/{len(patterns)}  {pattern}: done before")
        else:
            say(f"{number}/{len(patterns)}  {pattern}: log in {point.stem}.log")
            try:
                done[key] = point.run()
            except (subprocess.CalledProcessError, json.JSONDecodeError, KeyError) as error:
                if isinstance(error, subprocess.CalledProcessError):
                    with open(point.stem + ".log", encoding="utf-8", errors="replace") as log:
                        error = f"exit status {error.returncode}: {log.read().splitlines()[-1]}"
                say(f"{pattern} failed: {error}")
                failed.append(pattern)
                continue
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[key]) + "\n")
        lines.append(done[key])
    if lines:
        print_table(lines)
    if failed:
        say(f"failed: {' '.join(failed)}; start the same command again to retry")
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; start the same command again to go on")
        sys.exit(130)

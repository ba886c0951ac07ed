#!/usr/bin/env python3
"""Quantizes and evaluates a checkpoint once per point.

    scripts/sweep.sh CHECKPOINT --nm "2:8 4:8 2:4 6:8" -o DIR [options of `stbllm quantize` and `stbllm eval-ppl`]
    scripts/sweep.sh CHECKPOINT --points FILE -o DIR [options ...]
    scripts/sweep.sh MODEL.safetensors --flip-signs "0 0.01 0.03 0.1" -o DIR [options of `stbllm eval-ppl`]

A point is an N:M pattern, or a line `label | options of stbllm quantize` of FILE (# opens a comment). --data (again
for each further text), --windows, --protocol, --backend and --kl go to eval-ppl; --seqlen and --threads to both;
--eval-seqlen "512 2048" holds for eval-ppl alone; every text at every length is an evaluation; every other option goes
to quantize. DIR gets the packed file, the report and the log of each point, and one line per finished point in
sweep.jsonl, of which `stbllm report DIR -o page.html` makes a page. Finished points are skipped: start an interrupted
sweep again, or add points and options to it. The exit status is 1 when a point failed. $STBLLM names another program
than build/stbllm.

--flip-signs evaluates a packed file with these shares of the signs of its kept weights flipped, a point each.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.environ.get("STBLLM", os.path.join(ROOT, "build", "stbllm"))


def say(message):
    print(f"[sweep] {message}", file=sys.stderr, flush=True)


def die(message):
    say(f"error: {message}")
    sys.exit(2)


def read_points(path):
    """[(label, options of quantize)] of a file of points."""
    points = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                line = line.split("#")[0].strip()
                if not line:
                    continue
                label, separator, options = line.partition("|")
                if not separator:
                    die(f"{path}:{number}: expected `label | options of stbllm quantize`, found `{line}`")
                points.append((label.strip(), shlex.split(options)))
    except (OSError, ValueError) as error:  # no such file, not UTF-8, a quote that is not closed
        die(f"{path}: {getattr(error, 'strerror', None) or error}")
    if not points:
        die(f"{path}: it holds no point")
    return points


def parse_arguments(arguments):
    """(model, [Point.options without "eval"], directory, [options of one eval-ppl])."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="scripts/sweep.sh MODEL --nm PATTERNS | "
                                     "--points FILE | --flip-signs SHARES -o DIR [options]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--nm")
    what.add_argument("--points")
    what.add_argument("--flip-signs")
    parser.add_argument("-o", "--output", required=True)
    evaluate_only, both = ["--windows", "--protocol", "--backend", "--kl"], ["--seqlen", "--threads"]
    for option in evaluate_only + both + ["--eval-seqlen"]:
        parser.add_argument(option)
    parser.add_argument("--data", action="append")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if arguments else 2)
    model = arguments[0].rstrip("/")
    parsed, quantize = parser.parse_known_args(arguments[1:])
    evaluate = []
    for option in evaluate_only + both:
        value = getattr(parsed, option[2:])
        if value is None:
            continue
        if option in both:
            quantize += [option, value]
        if option != "--seqlen":
            evaluate += [option, value]
    lengths = (parsed.eval_seqlen or parsed.seqlen or "").replace(",", " ").split()
    evaluations = [["--data", text, *evaluate, *length] for text in parsed.data or ["wikitext2"]
                   for length in ([["--seqlen", length] for length in lengths] or [[]])]
    if parsed.flip_signs:
        points = flip_points(parsed.flip_signs, quantize)
    else:
        points = read_points(parsed.points) if parsed.points else [
            (pattern, ["--nm", pattern]) for pattern in parsed.nm.replace(",", " ").split()]
        if not points:
            die("--nm: name at least one pattern, such as 4:8")
        points = [{"label": label, "quantize": own + quantize} for label, own in points]
    return model, [{"checkpoint": model, **point} for point in points], parsed.output, evaluations


def flip_points(shares, rest):
    """The points of --flip-signs; options of quantize have no place beside them."""
    unknown = [option for option in rest if option not in ("--seqlen", "--threads") and option.startswith("-")]
    if unknown:
        die(f"{unknown[0]}: --flip-signs quantizes nothing; name options of eval-ppl only")
    try:
        shares = [float(share) for share in shares.replace(",", " ").split()]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        die("--flip-signs: expected shares from 0 to 1, such as \"0 0.01 0.1\"")
    return [{"label": f"{100 * share:g} %", "flip_signs": share} for share in shares]


class Point:
    """One way to make a packed file, and how it is evaluated."""

    def __init__(self, directory, options, evaluations):
        self.label = options["label"]
        self.options = {**options, "eval": evaluations}
        digest = hashlib.sha256(json.dumps(self.options).encode()).hexdigest()[:8]
        self.stem = os.path.join(directory, re.sub(r"[^A-Za-z0-9.]+", "-", self.label) + "-" + digest)

    def make(self, call, packed):
        """Writes the packed file; returns what the point's line says of that."""
        model = self.options["checkpoint"]
        if "flip_signs" in self.options:
            share = str(self.options["flip_signs"])
            made = call("export", model, packed, "--to", "packed", "--flip-signs", share, "--force")
            return {"flipped_signs": made["flipped"] / made["signs"]}
        report = self.stem + ".json"
        made = call("quantize", model, "-o", packed, "--report", report, "--force", *self.options["quantize"])
        return {
            "report": os.path.basename(report),
            "seconds": made["seconds"],
            "peak_memory_bytes": made["peak_memory_bytes"],
        }

    def run(self):
        """The point's line; raises CalledProcessError when a command failed."""
        packed = self.stem + ".safetensors"
        with open(self.stem + ".log", "w", encoding="utf-8") as log:

            def call(*command):
                command = [PROGRAM, *command, "--json"]
                log.write(" ".join(command) + "\n")
                log.flush()
                return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=log).stdout)

            facts = self.make(call, packed)
            inspected = call("inspect", packed)
            evaluated = [call("eval-ppl", packed, *options) for options in self.options["eval"]]
        if any(result["perplexity"] is None for result in evaluated):
            raise ValueError("its perplexity is not a finite number")
        wanted = ("perplexity", "standard_error", "kl", "reference_perplexity", "windows", "seqlen", "second_half",
                  "tokens", "seconds", "data")
        return {
            "options": self.options,
            "file": os.path.basename(packed),
            "nominal_bits": inspected["nominal_bits"],
            "stored_bits": inspected["stored_bits"],
            "file_bytes": inspected["file_bytes"],
            "evaluations": [{key: result[key] for key in wanted if key in result} for result in evaluated],
            **facts,
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
    width = max(len("point"), *(len(line["options"]["label"]) for line in lines))
    results = lines[0]["evaluations"]
    several = len({result["data"] for result in results}) > 1
    names = [result["data"].split(" (")[0] if several else "perplexity" for result in results]
    heads = [f"{name} at {result['seqlen']}" for name, result in zip(names, results)]
    widths = [max(22, len(head)) + 2 for head in heads]
    divergence = any("kl" in result for line in lines for result in line["evaluations"])
    head = "".join(f"{name:>{size}}" + (f"{'KL':>8}" if divergence else "") for name, size in zip(heads, widths))
    cost = "seconds" in lines[0]
    print(f"{'point':>{width}} {'nominal':>8} {'stored':>7} {'file MB':>8}{head}" +
          (f" {'minutes':>8} {'peak GB':>8}" if cost else ""))
    for line in lines:
        cells = ""
        for result, size in zip(line["evaluations"], widths):
            cells += f"{result['perplexity']:.2f} +- {result['standard_error']:.2f}".rjust(size)
            if divergence:
                cells += f"{result['kl']:8.3f}" if "kl" in result else " " * 8
        print(f"{line['options']['label']:>{width}} {line['nominal_bits']:8.3f} {line['stored_bits']:7.3f} "
              f"{line['file_bytes'] / 1e6:8.1f}{cells}" +
              (f" {line['seconds'] / 60:8.1f} {line['peak_memory_bytes'] / 1e9:8.2f}" if cost else ""))


def main():
    model, points, directory, evaluations = parse_arguments(sys.argv[1:])
    if not os.path.isfile(PROGRAM) or not os.access(PROGRAM, os.X_OK):
        die(f"{PROGRAM} is not there; build it with scripts/build.sh")
    if "quantize" in points[0] and not os.path.isdir(model):
        die(f"{model}: expected the directory of a checkpoint")
    if "flip_signs" in points[0] and not os.path.isfile(model):
        die(f"{model}: expected a packed file")
    try:
        os.makedirs(directory, exist_ok=True)
        lock = open(os.path.join(directory, ".lock"), "w")
    except OSError as error:
        die(f"{directory}: {error.strerror}; choose another -o")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        die(f"another sweep is at work in {directory}")

    path = os.path.join(directory, "sweep.jsonl")
    done = {json.dumps(line["options"]): line for line in read_lines(path)}
    lines, failed = [], []
    for number, options in enumerate(points, 1):
        point, label = Point(directory, options, evaluations), options["label"]
        key = json.dumps(point.options)
        if key in done:
            say(f"{number}/{len(points)}  {label}: done before")
        else:
            say(f"{number}/{len(points)}  {label}: log in {point.stem}.log")
            try:
                done[key] = point.run()
            except (subprocess.CalledProcessError, ValueError, KeyError) as error:
                if isinstance(error, subprocess.CalledProcessError):
                    with open(point.stem + ".log", encoding="utf-8", errors="replace") as log:
                        error = f"exit status {error.returncode}: {log.read().splitlines()[-1]}"
                say(f"{label} failed: {error}")
                failed.append(label)
                continue
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[key]) + "\n")
        lines.append(done[key])
    if lines:
        print_table(lines)
    if failed:
        say(f"failed: {', '.join(failed)}; start the same command again to retry")
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is killed on the way out
    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; start the same command again to go on")
        sys.exit(130)

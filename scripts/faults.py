"""The checks of scripts/faults.sh, which says what they are."""

import argparse
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import string
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "build/stbllm"
SWEEP = ROOT / "scripts/sweep.sh"
STORIES = ROOT.parent / "shared/models/stories260K"
STAGES = {
    "plain": [],
    "tuned": ["--set", "training.tune.epochs=2"],
    "distilled": ["--set", "training.distill.epochs=4", "--distill-nsamples", "32"],
    "two processes": [],
}
PROCESSES = {"two processes": 2}  # of one run; else 1
WRITE_FAILED, CORRUPT, EXISTS, OUT_OF_MEMORY, INTERRUPTED = 9, 4, 8, 11, 130
PATIENCE = 300  # seconds: what takes longer hangs


def start(args, largest_file=None, address_space=6 << 30, user=None, environment=None, program=PROGRAM, **popen):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if user is not None:
            os.setgid(user)
            os.setuid(user)

    environment = dict(os.environ, OMP_WAIT_POLICY="passive", **(environment or {}))
    return subprocess.Popen([program, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment, preexec_fn=limit, **popen)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_run(args, processes=1):
    """The processes of one run."""
    if processes == 1:
        return [start(args)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes),
              "STBLLM_PROCESS_TIMEOUT": "60"}
    return [start([*args, "--threads", 1], environment=dict(shared, RANK=str(rank))) for rank in range(processes)]


def wait(processes):
    """Exit status and stderr of each."""
    errs = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    return [(process.returncode, err.decode(errors="replace")) for process, err in zip(processes, errs)]


def run(args, **limits):
    """Exit status and stderr."""
    return wait([start(args, **limits)])[0]


def expect(condition, what, err=""):
    if not condition:
        sys.exit(f"FAILED: {what}\n{err}")


def expect_fault(args, code, part, **limits):
    status, err = run(args, **limits)
    said = [line for line in err.splitlines() if " E] " in line or line.startswith("error: ")]
    expect(status == code, f"{args[0]}: expected exit {code}, found {status}", err)
    expect(len(said) == 1 and part in said[0], f"{args[0]}: expected one sentence with {part!r}", err)


class Place:
    """A directory with a checkpoint and a text."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        os.chmod(directory, 0o755)
        self.checkpoint = self.directory / "checkpoint"
        if STORIES.is_dir():
            shutil.copytree(STORIES, self.checkpoint)
        else:
            shutil.copytree(ROOT / "tests/golden/checkpoints/llama", self.checkpoint)
            letters = string.ascii_letters + ".,\u0120\u010a"  # with the byte symbols of space and line end
            byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
            (self.checkpoint / "tokenizer.json").write_text(json.dumps({
                "pre_tokenizer": byte_level, "decoder": byte_level,
                "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(letters)}, "merges": []}}))
        for path in self.checkpoint.rglob("*"):
            path.chmod(0o644)
        self.text = self.directory / "text.txt"
        text = (ROOT / "README.md").read_text()
        self.text.write_text("".join(c for c in text if c.isalpha() or c in " .,\n"))

    def quantize(self, output, *more):
        return ["quantize", self.checkpoint, "-o", output, "--calib", self.text, "--nsamples", 16, "--seqlen", 64,
                *more]


def resume_option(output):
    return ["--resume"] if pathlib.Path(f"{output}.work/fingerprint.json").exists() else ["--force"]


class Kind:
    """A kind of run, what it gives undisturbed, and how long that takes."""

    def __init__(self, place, name):
        self.place, self.name, self.processes = place, name, PROCESSES.get(name, 1)
        self.stage = STAGES[name]
        stem = name.replace(" ", "-")
        whole, self.output = place.directory / f"{stem}.whole", place.directory / f"{stem}.out"
        began = time.monotonic()
        self.finish(whole)
        self.seconds = time.monotonic() - began
        self.bytes = whole.read_bytes()

    def command(self, output):
        return self.place.quantize(output, *self.stage, *resume_option(output))

    def start(self):
        return start_run(self.command(self.output), self.processes)

    def finish(self, output):
        for status, err in wait(start_run(self.command(output), self.processes)):
            expect(status == 0, f"a {self.name} run exits with {status}", err)

    def collect(self, disturbed):
        """Compares the output where there is one and makes room for the next; nothing half-written is taken for it."""
        if self.output.exists():
            expect(self.output.read_bytes() == self.bytes, f"{self.name}: other bytes {disturbed}")
            self.output.unlink()

    def close(self, disturbed):
        self.finish(self.output)
        self.collect(disturbed)
        left = [path.name for path in self.place.directory.glob(self.output.name + "*")]
        expect(not left, f"{self.name}: {left} is left {disturbed}")


def check_kill(place, _, times):
    for name in STAGES:
        kind, killed = Kind(place, name), 0
        while killed < times:
            processes = kind.start()
            time.sleep(random.uniform(0, kind.seconds))
            for process in processes:
                process.kill()
            killed += any(status == -signal.SIGKILL for status, _ in wait(processes))
            kind.collect(f"after {killed} kills")
        kind.close(f"after {killed} kills")
        print(f"kill: {name}, {kind.seconds:.1f} s, killed {killed} times: the same bytes", flush=True)


def check_terminate(place, _, times):
    for name in ("plain", "distilled"):
        kind, stopped = Kind(place, name), 0
        while stopped < times:
            processes = kind.start()
            time.sleep(random.uniform(0, kind.seconds))
            processes[0].terminate()
            (status, err), = wait(processes)
            # Before the run itself begins there is nothing to keep, and the signal ends the process at once.
            expect(status in (0, INTERRUPTED, -signal.SIGTERM), f"{name}: exit {status} by SIGTERM", err)
            if status == INTERRUPTED:
                stopped += 1
                expect("--resume" in err or "nothing is left" in err, f"{name}: does not say how to go on", err)
                expect(not kind.output.exists(), f"{name}: an interrupted run has written its output")
            kind.collect(f"after {stopped} times SIGTERM")
        kind.close(f"after {stopped} times SIGTERM")
        print(f"terminate: {name}, stopped {stopped} times: the same bytes", flush=True)


def check_lost(place, _, times):
    """One of two processes is lost once they have met, which is when the first has its work directory."""
    kind, longest, lost = Kind(place, "two processes"), 0.0, 0
    work = pathlib.Path(f"{kind.output}.work")
    while lost < times:
        processes = kind.start()
        while not work.exists() and processes[0].poll() is None:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.5 * kind.seconds))
        victim = random.randrange(2)
        processes[victim].kill()
        began = time.monotonic()
        ends = wait(processes)
        status, err = ends[1 - victim]
        if ends[victim][0] == -signal.SIGKILL and status != 0:
            lost += 1
            longest = max(longest, time.monotonic() - began)
            expect(status == INTERRUPTED and "another process ended" in err,
                   f"process {1 - victim} exits with {status} when the other is lost", err)
        if not kind.output.exists():
            kind.finish(kind.output)
        kind.collect(f"after {lost} lost processes")
    print(f"lost: one of two processes {lost} times, the other ended within {longest:.1f} s: the same bytes", flush=True)


def check_twice(place, whole, times):
    """Two runs into one output, started together."""
    refused = 0
    for _ in range(times):
        output = place.directory / "twice"
        ends = wait([start(place.quantize(output, "--force")) for _ in range(2)])
        statuses = sorted(status for status, _ in ends)
        expect(statuses in ([0, 0], [0, EXISTS]), f"two runs into one output: exits {statuses}",
               "\n".join(err for _, err in ends))
        for status, err in ends:
            expect(status == 0 or "another run is at work" in err, "two runs into one output", err)
        refused += statuses[1] == EXISTS
        expect(output.read_bytes() == whole.read_bytes(), "two runs into one output: other bytes")
        output.unlink()
    print(f"twice: {times} times two runs into one output, one refused {refused} times: the same bytes", flush=True)


def check_sweep(place, _, times):
    def sweep(directory):
        return [SWEEP, place.checkpoint, "--nm", "2:8 4:8 2:4", "-o", directory,
                "--recipe", "stbllm-1bit", "--calib", place.text, "--nsamples", 8, "--seqlen", 64, "--data", place.text,
                "--windows", 8]

    def points(directory):
        lines = [json.loads(line) for line in (directory / "sweep.jsonl").read_text().splitlines()]
        expect(len(lines) == 3, f"sweep: {len(lines)} lines of 3 points")
        return [(line["evaluations"][0]["perplexity"], (directory / line["file"]).read_bytes()) for line in lines]

    def finished(directory):
        status, err = run(sweep(directory), program="bash", environment={"STBLLM": str(PROGRAM)})
        expect(status == 0, f"a sweep exits with {status}", err)

    whole, killed = place.directory / "sweep-whole", 0
    began = time.monotonic()
    finished(whole)
    seconds, expected = time.monotonic() - began, points(whole)
    directory = place.directory / "sweep"
    while killed < times:
        process = start(sweep(directory), program="bash", environment={"STBLLM": str(PROGRAM)}, start_new_session=True)
        time.sleep(random.uniform(0, seconds))
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        (status, err), = wait([process])
        expect(status in (0, -signal.SIGKILL), f"a sweep exits with {status}", err)
        killed += status == -signal.SIGKILL
        if status == 0:
            expect(points(directory) == expected, f"sweep: another result after {killed} kills")
            shutil.rmtree(directory)
    finished(directory)
    expect(points(directory) == expected, f"sweep: another result after {killed} kills")
    print(f"sweep: {seconds:.1f} s, killed {killed} times: the same points", flush=True)


def check_disk(place, whole, _):
    size, refused = whole.stat().st_size, 0
    output = place.directory / "disk"
    for largest in [0, 100, 4096, *(size * k // 8 for k in range(1, 9))]:
        status, err = run(place.quantize(output, *resume_option(output)), largest_file=largest)
        expect(status in (0, WRITE_FAILED), f"files of at most {largest} bytes: exit {status}", err)
        if status == 0:
            break
        refused += 1
        expect(not output.exists(), f"files of at most {largest} bytes: half a result is there")
    if not output.exists():
        status, err = run(place.quantize(output, *resume_option(output)))
        expect(status == 0, "a run after the disk was full", err)
    expect(output.read_bytes() == whole.read_bytes(), "other bytes after the disk was full")
    print(f"disk: refused {refused} times, then the same bytes", flush=True)


def check_directory(place, *_):
    locked = place.directory / "locked"
    locked.mkdir(mode=0o555)
    nobody = 65534 if os.getuid() == 0 else None  # root may write anywhere
    if nobody is not None and not os.access(PROGRAM, os.X_OK):
        return
    expect_fault(place.quantize(locked / "out"), WRITE_FAILED, "locked", user=nobody)
    expect(not any(locked.iterdir()), "something is in a directory that cannot be written")
    print("directory: refused", flush=True)


def check_truncate(place, *_):
    checkpoint = place.directory / "cut"
    shutil.copytree(place.checkpoint, checkpoint)
    weights = checkpoint / "model.safetensors"
    process = start(["eval-ppl", checkpoint, "--data", place.text, "--seqlen", 32, "--threads", 1])
    mapped = False
    while process.poll() is None and not mapped:
        try:
            mapped = str(weights) in pathlib.Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            pass
        time.sleep(0.001)
    os.truncate(weights, 4096)
    _, err = process.communicate()
    err = err.decode(errors="replace")
    expect(process.returncode == CORRUPT, f"a truncated mapping: exit {process.returncode}", err)
    expect("model.safetensors" in err, "a truncated mapping: the file is not named", err)
    print("truncate: " + err.splitlines()[-1], flush=True)


def check_bits(place, whole, _):
    content = whole.read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + header_bytes])
    damaged, tried = place.directory / "damaged", set()
    for name, tensor in header.items():
        kind = name.rpartition(".")[2]
        if name == "__metadata__" or kind in tried or tensor["data_offsets"][0] == tensor["data_offsets"][1]:
            continue
        tried.add(kind)
        at = 8 + header_bytes + random.randrange(*tensor["data_offsets"])
        changed = bytearray(content)
        changed[at] ^= 1 << random.randrange(8)
        damaged.write_bytes(changed)
        linear = name.rpartition(".")[0]
        for args in (["inspect", damaged, "--verify"],
                     ["eval-ppl", damaged, "--data", place.text, "--seqlen", 32, "--windows", 1],
                     ["generate", damaged, "--prompt", "the", "-n", 1],
                     ["export", damaged, place.directory / "exported", "--to", "hf"]):
            expect_fault(args, CORRUPT, linear)
    print(f"bits: {', '.join(sorted(tried))}: named by each command", flush=True)


def check_memory(place, *_):
    found = {}
    for megabytes in (100, 300, 500, 700, 1000, 1500, 3000):
        status, err = run(place.quantize(place.directory / "memory", "--force"), address_space=megabytes << 20)
        # Below some 500 MB the loader cannot map libtorch and ends the process with 127 before main().
        expect(status in (0, OUT_OF_MEMORY, 127), f"{megabytes} MB of address space: exit {status}", err)
        found[megabytes] = status
    print("memory: " + ", ".join(f"{size} MB: exit {status}" for size, status in found.items()), flush=True)


CHECKS = {"kill": check_kill, "terminate": check_terminate, "lost": check_lost, "twice": check_twice,
          "sweep": check_sweep, "disk": check_disk, "directory": check_directory, "truncate": check_truncate,
          "bits": check_bits, "memory": check_memory}


def main():
    parser = argparse.ArgumentParser(usage="scripts/faults.sh [--times N] [SEED [CHECK...]]")
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("seed", nargs="?", default=str(random.randrange(10**6)))
    parser.add_argument("checks", nargs="*", metavar="CHECK")
    options = parser.parse_args()
    expect(set(options.checks) <= set(CHECKS), f"the checks are {', '.join(CHECKS)}")
    random.seed(options.seed)
    print(f"seed {options.seed}", flush=True)
    expect(PROGRAM.exists(), f"{PROGRAM} is missing; run scripts/build.sh")
    with tempfile.TemporaryDirectory(prefix="stbllm-faults-") as directory:
        place = Place(directory)
        whole = place.directory / "whole"
        status, err = run(place.quantize(whole))
        expect(status == 0, "an undisturbed run", err)
        for name in options.checks or CHECKS:
            CHECKS[name](place, whole, options.times)
    print("all faults were met", flush=True)


main()

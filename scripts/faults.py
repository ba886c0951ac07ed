"""The checks of scripts/faults.sh, which says what they are."""

import json
import os
import pathlib
import random
import resource
import shutil
import signal
import string
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "build/stbllm"
STORIES = ROOT.parent / "shared/models/stories260K"
KILLS = 4  # of each of the three kinds of run, before it may finish
STAGES = {
    "plain": [],
    "tuned": ["--set", "training.tune.epochs=1"],
    "distilled": ["--set", "training.distill.epochs=1", "--distill-nsamples", "16"],
}
WRITE_FAILED, CORRUPT, OUT_OF_MEMORY = 9, 4, 11


def start(args, largest_file=None, address_space=6 << 30, user=None):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if user is not None:
            os.setgid(user)
            os.setuid(user)

    environment = dict(os.environ, OMP_WAIT_POLICY="passive")
    return subprocess.Popen([PROGRAM, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment, preexec_fn=limit)


def run(args, **limits):
    """Exit status and stderr."""
    process = start(args, **limits)
    _, err = process.communicate(timeout=300)
    return process.returncode, err.decode(errors="replace")


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


def check_kill(place, _):
    for name, stage in STAGES.items():
        whole = place.directory / f"{name}.whole"
        began = time.monotonic()
        status, err = run(place.quantize(whole, *stage))
        seconds = time.monotonic() - began
        expect(status == 0, f"an undisturbed {name} run", err)
        output, killed = place.directory / f"{name}.killed", 0
        for _ in range(KILLS):
            if output.exists():
                break
            process = start(place.quantize(output, *stage, *resume_option(output)))
            time.sleep(random.uniform(0.05, 1.0) * seconds)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
        if not output.exists():
            status, err = run(place.quantize(output, *stage, *resume_option(output)))
            expect(status == 0, f"a {name} run after {killed} kills", err)
        expect(output.read_bytes() == whole.read_bytes(), f"{name}: other bytes after {killed} kills")
        print(f"kill: {name}, {seconds:.1f} s, killed {killed} times: the same bytes", flush=True)


def check_disk(place, whole):
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


def check_directory(place, _):
    locked = place.directory / "locked"
    locked.mkdir(mode=0o555)
    nobody = 65534 if os.getuid() == 0 else None  # root may write anywhere
    if nobody is not None and not os.access(PROGRAM, os.X_OK):
        return
    expect_fault(place.quantize(locked / "out"), WRITE_FAILED, "locked", user=nobody)
    expect(not any(locked.iterdir()), "something is in a directory that cannot be written")
    print("directory: refused", flush=True)


def check_truncate(place, _):
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


def check_bits(place, whole):
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


def check_memory(place, _):
    found = {}
    for megabytes in (100, 300, 500, 700, 1000, 1500, 3000):
        status, err = run(place.quantize(place.directory / "memory", "--force"), address_space=megabytes << 20)
        # Below some 500 MB the loader cannot map libtorch and ends the process with 127 before main().
        expect(status in (0, OUT_OF_MEMORY, 127), f"{megabytes} MB of address space: exit {status}", err)
        found[megabytes] = status
    print("memory: " + ", ".join(f"{size} MB: exit {status}" for size, status in found.items()), flush=True)


CHECKS = {"kill": check_kill, "disk": check_disk, "directory": check_directory, "truncate": check_truncate,
          "bits": check_bits, "memory": check_memory}


def main():
    seed = sys.argv[1] if len(sys.argv) > 1 else str(random.randrange(10**6))
    names = sys.argv[2:] or list(CHECKS)
    expect(set(names) <= set(CHECKS), f"the checks are {', '.join(CHECKS)}")
    random.seed(seed)
    print(f"seed {seed}", flush=True)
    expect(PROGRAM.exists(), f"{PROGRAM} is missing; run scripts/build.sh")
    with tempfile.TemporaryDirectory(prefix="stbllm-faults-") as directory:
        place = Place(directory)
        whole = place.directory / "whole"
        status, err = run(place.quantize(whole))
        expect(status == 0, "an undisturbed run", err)
        for name in names:
            CHECKS[name](place, whole)
    print("all faults were met", flush=True)


main()

"""Compiles every C++ source of a build directory with clang, for its warnings only.

    python3 scripts/clang_warnings.py clang++-14 build

The flags are those of compile_commands.json. Sources with the same flags share a precompiled header of the libraries
that most of them use, which would take most of the time otherwise. A source that passed is not compiled again before
it, a header of ours that it includes, its flags or clang change: its list of headers, which is kept under
BUILD/clang_warnings, is the mark of that.
"""

import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

WARNINGS = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-fno-caret-diagnostics"]
# These say nothing to clang, or nothing about warnings. What code is generated for (-O3, -fPIC, -fPIE) must
# not differ between a precompiled header and those who include it, so that it is left out everywhere.
DROPPED = {"-fpch-preprocess", "-Winvalid-pch", "-O3", "-O2", "-g", "-fPIC", "-fPIE", "-c",
           "-Wno-stringop-overflow"}
DROPPED_WITH_VALUE = {"-o", "-include"}
NOT_SHARED = ("-I", "-DSTBLLM", "-Wno-psabi", "-fsyntax-only")
WORTH_A_HEADER = 3  # sources: making the header takes about as long as one of them without it


def flags_of(command):
    """The compiler of a command and its flags, without the source."""
    words = shlex.split(command)
    first_flag = next(i for i, word in enumerate(words) if word.startswith("-"))
    flags, dropped = [], False
    for word in words[first_flag:-1]:
        if not dropped and word not in DROPPED and word not in DROPPED_WITH_VALUE:
            flags.append(word)
        dropped = word in DROPPED_WITH_VALUE
    return words[first_flag - 1], flags


def run(command, directory):
    result = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return result.returncode == 0, result.stdout


def name_of(*parts):
    return hashlib.sha1("\0".join(parts).encode()).hexdigest()


def is_fresh(mark):
    """Whether nothing in the list of headers `mark` is newer than it."""
    try:
        made = mark.stat().st_mtime
        files = mark.read_text().replace("\\\n", " ").split(":", 1)[1]
        return all(os.stat(file).st_mtime < made for file in shlex.split(files))
    except (OSError, IndexError):
        return False


class Checker:
    def __init__(self, clang, build):
        self.clang = clang
        self.version = subprocess.check_output([clang, "--version"], text=True)
        self.marks = build / "clang_warnings"
        self.marks.mkdir(exist_ok=True)
        self.headers = {}  # compiler -> directory of its own headers

    def own_headers(self, compiler):
        # clang's package lacks omp.h, which g++ has; everything else is found in clang's own directory first.
        if compiler not in self.headers:
            self.headers[compiler] = subprocess.check_output([compiler, "-print-file-name=include"], text=True).strip()
        return self.headers[compiler]

    def command(self, entry):
        compiler, flags = flags_of(entry["command"])
        return [self.clang, *flags, *WARNINGS, "-idirafter", self.own_headers(compiler)]

    def precompile(self, shared):
        """A precompiled header for the sources that have the flags `shared` in common."""
        header = self.marks / f"{name_of(self.version, *shared)}.pch"
        if not header.exists():
            has = lambda flag: any(word.endswith(flag) for word in shared)
            names = [name for name, wanted in (("ATen/ATen.h", has("torch/include")),
                                               ("gmock/gmock.h", has("-DGTEST_HAS_PTHREAD=1")),
                                               ("fmt/ranges.h", True), ("nlohmann/json.hpp", True)) if wanted]
            source = header.with_suffix(".h")
            source.write_text("".join(f"#include <{name}>\n" for name in names))
            unfinished = header.with_suffix(".part")
            passed, output = run([self.clang, *shared, "-fpch-instantiate-templates", "-x", "c++-header", str(source),
                                  "-o", str(unfinished)], self.marks)
            if not passed:
                sys.exit(output)
            unfinished.rename(header)
        return header

    def check(self, entry, command):
        """None when the source had passed before, else whether it passed, and what clang said."""
        mark = self.marks / f"{name_of(self.version, entry['file'], *command)}.d"
        if is_fresh(mark):
            return None, ""
        started = time.time()
        unfinished = mark.with_suffix(".part")
        passed, output = run([*command, "-MMD", "-MF", str(unfinished), entry["file"]], entry["directory"])
        if passed:
            os.utime(unfinished, (started, started))  # what changes from now on has not been seen
            unfinished.rename(mark)
        else:
            unfinished.unlink(missing_ok=True)
        return passed, output


def main():
    clang, build = sys.argv[1], pathlib.Path(sys.argv[2]).resolve()
    entries = json.loads((build / "compile_commands.json").read_text())
    ours = {entry["file"]: entry for entry in entries
            if entry["file"].endswith(".cc") and not pathlib.Path(entry["file"]).is_relative_to(build)}
    checker = Checker(clang, build)
    commands = {file: checker.command(entry) for file, entry in ours.items()}
    sharing = collections.defaultdict(list)
    for file, command in commands.items():
        # The include directories and definitions of this project say nothing to the libraries' headers.
        sharing[tuple(word for word in command[1:] if not word.startswith(NOT_SHARED))].append(file)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        worthwhile = [shared for shared, files in sharing.items() if len(files) >= WORTH_A_HEADER]
        for shared, header in zip(worthwhile, pool.map(checker.precompile, worthwhile)):
            for file in sharing[shared]:
                commands[file] += ["-include-pch", str(header)]
    seen = failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for passed, output in pool.map(lambda file: checker.check(ours[file], commands[file]), ours):
            seen += passed is not None
            failed += passed is False
            print(output, end="")
    print(f"{len(ours)} sources, {seen} compiled, {failed} with warnings")
    sys.exit(failed > 0)


main()

#!/usr/bin/env python3
"""Fetches a text to evaluate and calibrate on.

    scripts/fetch_text.py wikitext2 DIRECTORY    wiki.test.raw and wiki.valid.raw of wikitext-2-raw-v1 (CC BY-SA 3.0)
    scripts/fetch_text.py debian DIRECTORY       the Jargon File (public domain) from the package jargon-text, in two
                                                 halves: jargon.first-half.txt and jargon.second-half.txt

Nothing is installed. The exit status is 1 when the text could not be had.
"""

import glob
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile

WIKITEXT = "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip"
SHA256 = {
    "wiki.test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    "wiki.valid.raw": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
}
SECONDS = 10  # without an answer for this long there is no network


def write(directory, name, data):
    os.makedirs(directory, exist_ok=True)
    part = os.path.join(directory, name + ".part")
    with open(part, "wb") as file:
        file.write(data)
    os.rename(part, os.path.join(directory, name))


def fetch_wikitext2(directory):
    try:
        with urllib.request.urlopen(WIKITEXT, timeout=SECONDS) as answer:
            archive = zipfile.ZipFile(io.BytesIO(answer.read()))
        files = {name: archive.read("wikitext-2-raw/" + name) for name in SHA256}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"[fetch] Wikitext-2 could not be downloaded: {error}")
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != SHA256[name]:
            sys.exit(f"[fetch] {name} from {WIKITEXT} is not the text expected")
        write(directory, name, data)


def paragraphs(text):
    """The running text: lines joined; titles, the table of contents and ruled lines left out."""
    for block in text.split("\n\n"):
        paragraph = " ".join(line.strip() for line in block.splitlines())
        if len(paragraph) >= 100 and "══" not in paragraph:
            yield paragraph


def fetch_debian(directory):
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)  # apt reads and writes as a user of its own
        for command in (["apt-get", "-qq", "download", "jargon-text"],
                        ["sh", "-c", "dpkg-deb -x jargon-text_*.deb ."]):
            if subprocess.run(command, cwd=scratch, stderr=subprocess.DEVNULL).returncode != 0:
                sys.exit("[fetch] the package jargon-text could not be downloaded; run apt-get update, or give a text")
        (path,) = glob.glob(os.path.join(scratch, "usr/share/doc/jargon-text/jargon.txt*"))
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            text = list(paragraphs(file.read()))
    middle = len(text) // 2
    for name, half in (("first", text[:middle]), ("second", text[middle:])):
        write(directory, f"jargon.{name}-half.txt", "\n\n".join(half).encode())


def main():
    sources = {"wikitext2": fetch_wikitext2, "debian": fetch_debian}
    if len(sys.argv) != 3 or sys.argv[1] not in sources:
        sys.exit(__doc__.strip())
    sources[sys.argv[1]](sys.argv[2])


if __name__ == "__main__":
    main()

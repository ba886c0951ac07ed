#!/usr/bin/env python3
"""Decodes a packed file, as src/pack/FORMAT.md says, with nothing but numpy.

    python3 scripts/read_packed.py model.safetensors                # names, shapes, shares of weights that are not zero
    python3 scripts/read_packed.py model.safetensors --npz all.npz  # all weights as float32
    python3 scripts/read_packed.py model.safetensors --compare weights.json

`read(path)` is for programs: it returns a dictionary of name -> float32 array (rows, cols) for linears and tables, and
of dense tensors under their own names.
"""

import argparse
import itertools
import json
import math
import sys

try:
    import numpy as np
except ImportError:
    print("read_packed.py: numpy is not installed; Debian's package is python3-numpy", file=sys.stderr)
    sys.exit(77)  # a test that is skipped

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "U8": "u1", "I8": "i1"}


def read_tensors(path):
    """Metadata and tensors of a safetensors file."""
    try:
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(data[8:start].tobytes())
        metadata = header.pop("__metadata__")
        metadata["linears"]
    except (OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        sys.exit(f"read_packed.py: {path}: no packed file ({type(error).__name__})")
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = data[start + begin : start + end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = values
    return metadata, tensors


def entries(rows, count, width):
    """The first `count` numbers of `width` bits of each row, a stream of bits."""
    bits = np.unpackbits(rows, axis=1, bitorder="little")[:, : count * width].reshape(len(rows), count, width)
    return bits.astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))


def decode_linear(layout, planes):
    rows, cols, levels, block = (layout[key] for key in ("rows", "cols", "levels", "column_block"))
    keep, group = map(int, layout["nm"].split(":"))
    supports = sorted(itertools.combinations(range(group), keep), key=lambda support: support[::-1])
    code_bits = (len(supports) * (2 * levels) ** keep - 1).bit_length()
    groups, blocks = math.ceil(cols / group), math.ceil(cols / block)

    codes, signs = np.divmod(entries(planes["codes"], groups, code_bits), 2**keep)
    ranks, digits = np.divmod(codes, levels**keep)
    k = np.arange(keep)
    positions = np.array(supports)[ranks] + group * np.arange(groups)[:, None]  # (rows, groups, keep)
    negative = signs[..., None] >> k & 1
    level = digits[..., None] // levels**k % levels
    if layout["scale_bits"] == 16:
        scales = planes["scales"].astype(np.float32)
    else:
        factor = np.exp2(-np.arange(2 ** layout["scale_bits"]) * 2.0 ** (2 - layout["scale_bits"])).astype(np.float32)
        factors = factor[entries(planes["scale_codes"], blocks, layout["scale_bits"])]
        scales = planes["row_scales"].astype(np.float32)[:, None] * factors
        scales = scales[..., None] * planes["levels"].astype(np.float32)  # (rows, column blocks, slots)

    row = np.arange(rows)[:, None, None]
    column_block = np.minimum(positions // block, blocks - 1)
    sign = 1 - 2 * negative.astype(np.float32)
    kept, weights = np.zeros((2, rows, groups * group), np.float32)  # signs of what is kept; virtual columns count
    kept[row, positions] = sign
    weights[row, positions] = sign * scales[row, column_block, level]
    weights = weights[:, :cols]
    if layout["salient"]:
        columns = planes["salient_columns"]
        first, second = (scales[:, columns // block, levels + i] for i in (0, 1))
        second_sign = 1 - 2 * entries(planes["salient_signs"], rows, 1).T.astype(np.float32)
        first_sign = kept[:, columns]
        weights[:, columns] = np.where(first_sign == 0, 0, first_sign * first + second_sign * second)
    if layout["outliers"]:
        weights[:, planes["outlier_columns"]] = planes["outlier_values"].T
    return weights


def decode_rows(layout, name, tensors):
    if layout["bits"] == 8:
        integers = tensors[name + ".q8"].astype(np.float32)
    else:
        integers = (entries(tensors[name + ".q4"], layout["cols"], 4) - 8).astype(np.float32)
    return integers * np.repeat(tensors[name + ".row_scales"].astype(np.float32), 64, axis=1)[:, : layout["cols"]]


def read(path):
    metadata, tensors = read_tensors(path)
    weights = {}
    for name, layout in json.loads(metadata["linears"]).items():
        planes = {key[len(name) + 1 :]: tensors.pop(key) for key in list(tensors) if key.rpartition(".")[0] == name}
        weights[name] = decode_linear(layout, planes)
    for name, layout in json.loads(metadata["quantized_rows"]).items():
        weights[name] = decode_rows(layout, name, tensors)
        for suffix in (".q8", ".q4", ".row_scales"):
            tensors.pop(name + suffix, None)
    return weights | tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--npz", help="write all weights to this file")
    parser.add_argument("--compare", help="a JSON object of name -> rows of weights that must be equal")
    options = parser.parse_args()
    weights = read(options.file)
    if options.compare:
        with open(options.compare, encoding="utf-8") as file:
            expected = json.load(file)
        wrong = [name for name in expected if not np.array_equal(np.float32(expected[name]), weights[name])]
        sys.exit(f"{options.file}: these weights differ: {', '.join(wrong)}" if wrong else 0)
    if options.npz:
        np.savez(options.npz, **weights)
        return
    for name, values in weights.items():
        print(f"{name:<56} {'x'.join(map(str, values.shape)):>14} {np.count_nonzero(values) / values.size:8.4f} not zero")


if __name__ == "__main__":
    main()

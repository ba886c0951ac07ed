#!/usr/bin/env python3
"""Writes packed_v1.safetensors and packed_v1.json beside this script, from src/pack/FORMAT.md alone.

Needs the Python packages numpy and xxhash. The files are committed; run it again only to see that it still makes the
same bytes.
"""

import itertools
import json
import pathlib
import random
import struct

import numpy as np
import xxhash

DTYPES = {"F32": "<f4", "I32": "<i4", "F16": "<f2", "U8": "u1", "I8": "i1"}


def dump(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def bit_stream(values, width):
    total = sum(value << (i * width) for i, value in enumerate(values))
    return np.frombuffer(total.to_bytes((len(values) * width + 7) // 8, "little"), np.uint8)


def make_linear(rng, rows, cols, nm, levels, column_block, scale_bits, salient, outliers):
    """Layout, planes and weights of a random linear."""
    keep, group = map(int, nm.split(":"))
    supports = sorted(itertools.combinations(range(group), keep), key=lambda p: p[::-1])  # colexicographic
    code_bits = (len(supports) * (2 * levels) ** keep - 1).bit_length()
    groups, blocks = -(-cols // group), -(-cols // column_block)
    slots = levels + (2 if salient else 0)
    chosen = rng.sample(range(cols), salient + outliers)
    salient_columns, outlier_columns = sorted(chosen[:salient]), sorted(chosen[salient:])

    planes = {}
    if scale_bits == 16:
        scales = np.array([rng.uniform(0.01, 1) for _ in range(rows * blocks * slots)], np.float16)
        planes["scales"] = scales = scales.reshape(rows, blocks, slots)
        scale = lambda r, b, slot: np.float32(scales[r, b, slot])
    else:
        codes = [[rng.randrange(1 << scale_bits) for _ in range(blocks)] for _ in range(rows)]
        planes["scale_codes"] = np.stack([bit_stream(row, scale_bits) for row in codes])
        planes["row_scales"] = base = np.array([rng.uniform(0.1, 2) for _ in range(rows)], np.float16)
        planes["levels"] = level = np.array([rng.uniform(0.1, 1) for _ in range(slots)], np.float16)
        factor = lambda code: np.float32(2.0 ** (-code * 2.0 ** (2 - scale_bits)))
        scale = lambda r, b, slot: np.float32(base[r]) * factor(codes[r][b]) * np.float32(level[slot])

    signs = np.array([[rng.randrange(2) for _ in range(rows)] for _ in range(salient)], int).reshape(salient, rows)
    outlier_values = np.array([rng.uniform(-2, 2) for _ in range(outliers * rows)], np.float16).reshape(outliers, rows)
    if salient:
        planes["salient_columns"] = np.array(salient_columns, np.int32)
        planes["salient_signs"] = np.stack([bit_stream(row.tolist(), 1) for row in signs])
    if outliers:
        planes["outlier_columns"] = np.array(outlier_columns, np.int32)
        planes["outlier_values"] = outlier_values

    weights = np.zeros((rows, cols), np.float32)
    code_rows = []
    for r in range(rows):
        row_codes = []
        for g in range(groups):
            real = min(group, cols - g * group)
            support = rng.choice([p for p in supports if sum(q < real for q in p) == min(real, keep)])
            code_level, code_signs = 0, 0
            for k, position in enumerate(support):
                c, b = g * group + position, (g * group + position) // column_block
                if position >= real:
                    continue
                sign, l = rng.randrange(2), 0 if c in salient_columns else rng.randrange(levels)
                code_signs += sign << k
                code_level += l * levels**k
                if c in salient_columns:
                    t = signs[salient_columns.index(c), r]
                    weights[r, c] = (-1) ** sign * scale(r, b, levels) + (-1) ** int(t) * scale(r, b, levels + 1)
                else:
                    weights[r, c] = (-1) ** sign * scale(r, b, l)
            row_codes.append((supports.index(support) * levels**keep + code_level) * 2**keep + code_signs)
        code_rows.append(bit_stream(row_codes, code_bits))
    planes["codes"] = np.stack(code_rows)
    for i, c in enumerate(outlier_columns):
        weights[:, c] = outlier_values[i]
    layout = dict(rows=rows, cols=cols, nm=nm, levels=levels, column_block=column_block, scale_bits=scale_bits,
                  salient=salient, outliers=outliers)
    return layout, planes, weights


def make_rows(rng, rows, cols, bits):
    """Layout, planes and weights of a random integer-coded matrix."""
    half = 1 << (bits - 1)
    q = np.array([rng.randrange(-half, half) for _ in range(rows * cols)]).reshape(rows, cols)
    blocks = -(-cols // 64)
    scales = np.array([rng.uniform(-0.1, 0.1) for _ in range(rows * blocks)], np.float16).reshape(rows, blocks)
    weights = np.repeat(scales.astype(np.float32), 64, axis=1)[:, :cols] * q.astype(np.float32)
    codes = q.astype(np.int8) if bits == 8 else np.stack([bit_stream((row + 8).tolist(), 4) for row in q])
    return dict(rows=rows, cols=cols, bits=bits), {f"q{bits}": codes, "row_scales": scales}, weights


def write(path, tensors, metadata):
    dtype_of = {np.dtype(numpy_name): name for name, numpy_name in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, data = {}, b""
    for name in order:
        tensor = np.ascontiguousarray(tensors[name])
        header[name] = dict(dtype=dtype_of[tensor.dtype], shape=tensor.shape,
                            data_offsets=[len(data), len(data) + tensor.nbytes])
        data += tensor.tobytes()
    checksums = {name: xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tensors[name]).tobytes()) for name in order}
    header["__metadata__"] = dict(metadata, checksums=dump(checksums), header_checksum="0" * 16)
    text = dump(header).encode()
    text += b" " * (-(8 + len(text)) % 256)
    start = struct.pack("<Q", len(text)) + text
    digits = xxhash.xxh3_64_hexdigest(start).encode()
    start = start.replace(b'"header_checksum":"' + b"0" * 16, b'"header_checksum":"' + digits)
    path.write_bytes(start + data)


def main():
    rng = random.Random(1)
    linears = {
        "binary": make_linear(rng, 5, 18, "2:4", 1, 8, 16, 0, 0),
        "trisection": make_linear(rng, 3, 40, "4:8", 3, 16, 5, 2, 1),
        "wide": make_linear(rng, 9, 21, "9:16", 2, 16, 16, 1, 0),
    }
    rows = {"embed": make_rows(rng, 2, 67, 8), "head": make_rows(rng, 2, 67, 4)}
    tensors = {"norm": np.array([1, 0.5, -2], np.float32)}
    for name, (_, planes, _) in (linears | rows).items():
        tensors |= {f"{name}.{plane}": array for plane, array in planes.items()}
    metadata = {
        "format": "stbllm-packed",
        "format_version": "1",
        "linears": dump({name: layout for name, (layout, _, _) in linears.items()}),
        "quantized_rows": dump({name: layout for name, (layout, _, _) in rows.items()}),
        "config": '{"model_type": "llama"}',
    }
    here = pathlib.Path(__file__).parent
    write(here / "packed_v1.safetensors", tensors, metadata)
    lines = []
    for name, (_, _, weights) in (linears | rows).items():
        text = ",\n  ".join("[" + ", ".join(f"{w:.9g}" for w in row) + "]" for row in weights.tolist())
        lines.append(f'"{name}": [\n  {text}]')
    (here / "packed_v1.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Widens a LLaMA model in GGUF until its rows are multiples of 256, without a change in what it computes.

    python3 scripts/pad_gguf.py IN.gguf OUT.gguf

llama.cpp's IQ and K types need such rows and fall back to larger types elsewhere, so that a file named after a type holds
little of it. Hidden dimensions and heads that are zero are added; norms see the same root mean square again through
their weights and their epsilon. IN.gguf holds F32, F16 and BF16 tensors. Only the standard library is used.
"""

import array
import math
import os
import struct
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import fetch_smollm2

MULTIPLE = 256
ITEM_BYTES = {0: 4, 1: 2, 30: 2}  # F32, F16, BF16
ALIGNMENT = 32


def widened(count):
    return (count + MULTIPLE - 1) // MULTIPLE * MULTIPLE


def main(source, target):
    with open(source, "rb") as file:
        data = bytearray(file.read())
    model = fetch_smollm2.Gguf(data)
    hidden = model.metadata["llama.embedding_length"]
    heads, kv_heads = (model.metadata[f"llama.attention.head_count{which}"] for which in ("", "_kv"))
    size = hidden // heads  # of a head
    new_hidden = widened(hidden)
    # As many groups of heads as it takes: each keeps its number of queries per key.
    new_kv_heads = kv_heads
    while new_kv_heads * (heads // kv_heads) * size < new_hidden:
        new_kv_heads += 1
    new_heads = new_kv_heads * (heads // kv_heads)
    if new_heads * size != new_hidden:
        raise SystemExit(f"{source}: heads of {size} do not fill {new_hidden} dimensions")

    def patch(key, layout, value):
        struct.pack_into("<" + layout, data, model.places[key], value)

    epsilon = "llama.attention.layer_norm_rms_epsilon"
    patch("llama.embedding_length", "I", new_hidden)
    patch("llama.attention.head_count", "I", new_heads)
    patch("llama.attention.head_count_kv", "I", new_kv_heads)
    patch(epsilon, "f", model.metadata[epsilon] * hidden / new_hidden)

    def rows_of(name, rows):
        if name.endswith("attn_q.weight"):
            return new_heads * size
        if name.endswith(("attn_k.weight", "attn_v.weight")):
            return new_kv_heads * size
        return new_hidden if rows == hidden and not name.startswith("token_embd") else rows

    infos, bodies, offset = [], [], 0
    for name, (shape, kind, begin) in model.tensors.items():
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        if kind not in ITEM_BYTES:
            raise SystemExit(f"{source}: tensor {name} is quantized; expected F32, F16 or BF16")
        new_cols = widened(cols)
        new_rows = rows_of(name, rows) if len(shape) == 2 else 1
        old_bytes, new_bytes = cols * ITEM_BYTES[kind], new_cols * ITEM_BYTES[kind]
        start = model.start + begin
        body = bytes(data[start : start + rows * old_bytes])
        if name.endswith("norm.weight"):
            values = array.array("f", body)
            body = array.array("f", [value * math.sqrt(hidden / new_hidden) for value in values]).tobytes()
        gap = bytes(new_bytes - old_bytes)
        body = b"".join(body[row * old_bytes : (row + 1) * old_bytes] + gap for row in range(rows))
        body += bytes((new_rows - rows) * new_bytes)
        dims = (new_cols, new_rows) if len(shape) == 2 else (new_cols,)
        encoded = name.encode("utf-8")
        infos.append(struct.pack(f"<Q{len(encoded)}sI{len(dims)}QIQ", len(encoded), encoded, len(dims), *dims, kind, offset))
        bodies.append(body + bytes(-len(body) % ALIGNMENT))
        offset += len(bodies[-1])
    header = bytes(data[: model.infos]) + b"".join(infos)
    with open(target, "wb") as file:
        file.write(header + bytes(-len(header) % ALIGNMENT))
        for body in bodies:
            file.write(body)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])

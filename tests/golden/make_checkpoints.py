"""Writes checkpoints/: small random models as HuggingFace transformers saves them, and what it computes with them.

    python3 make_checkpoints.py        # needs torch and transformers

Figures are those of transformers in float32 with its plain ("eager") attention: the mean negative log likelihood of
each window's predicted tokens, and the logits of a window's first, middle and last position. Weights are random but
lively: logits are far from equal, and every part (biases, norms, the window of attention, scaled rotary frequencies)
changes the figures in their first digits.
"""

import json
import pathlib
import shutil

import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB, WINDOWS, SEQLEN = 64, 3, 40
ROOT = pathlib.Path(__file__).parent / "checkpoints"

common = dict(vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=48, bos_token_id=1, eos_token_id=2)
opt = dict(common, hidden_size=24, ffn_dim=40, num_attention_heads=3, word_embed_proj_dim=24, dropout=0.0, pad_token_id=0)

# name: (class, configuration, dtype on disk, whether as pytorch_model.bin)
MODELS = {
    # Grouped queries, a head of its own, LLaMA-3's frequencies with a context that the windows exceed.
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            **common, hidden_size=40, intermediate_size=72, num_attention_heads=4, num_key_value_heads=2, rope_theta=500.0,
            rope_scaling=dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                              original_max_position_embeddings=24),
            tie_word_embeddings=False,
        ),
        torch.bfloat16,
        False,
    ),
    # Biases everywhere, frequencies divided by a factor, the head tied to the embedding.
    "llama_biased": (
        LlamaForCausalLM,
        LlamaConfig(
            **common, hidden_size=24, intermediate_size=56, num_attention_heads=2, num_key_value_heads=2,
            rope_scaling=dict(rope_type="linear", rope_theta=100.0, factor=2.5), attention_bias=True, mlp_bias=True,
            tie_word_embeddings=True,
        ),
        torch.float16,
        True,
    ),
    # Sees the last 12 tokens only, where windows have 40.
    "mistral": (
        MistralForCausalLM,
        MistralConfig(**common, hidden_size=32, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2,
                      head_dim=8, sliding_window=12, tie_word_embeddings=False),
        torch.bfloat16,
        False,
    ),
    "opt": (OPTForCausalLM, OPTConfig(**opt), torch.float16, True),
    # As opt-350m: the norm behind the residual, no final norm, a narrow embedding with projections.
    "opt_350m": (
        OPTForCausalLM,
        OPTConfig(**dict(opt, word_embed_proj_dim=16, do_layer_norm_before=False)),
        torch.float16,
        False,
    ),
    # Biases of queries, keys and values alone.
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**common, hidden_size=32, intermediate_size=56, num_attention_heads=4, num_key_value_heads=1,
                    tie_word_embeddings=True),
        torch.bfloat16,
        False,
    ),
    # Norms of queries and keys, heads of 12 where hidden / heads is 8.
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(**common, hidden_size=32, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2,
                    head_dim=12, tie_word_embeddings=True),
        torch.bfloat16,
        False,
    ),
}


def randomize(model, generator):
    """Linears of 1.5 / sqrt(inputs), embeddings and biases of 0.5, norms of 1 +- 0.3."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif "embed" in name or parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.5 / parameter.shape[1] ** 0.5 * noise)


def figures(directory, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits
    assert logits.dtype == torch.float32
    targets = torch.tensor(ids)[:, 1:]
    nll = -torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, targets[..., None])[..., 0].mean(1)
    positions = [0, SEQLEN // 2, SEQLEN - 1]
    print(f"{directory.name}: nll {nll.tolist()}, deviation of logits {logits.std():.2f}, largest {logits.abs().max():.2f}")
    return {
        "window_nll": [round(x, 7) for x in nll.tolist()],
        "positions": positions,
        "logits_of_last_window": [[round(x, 5) for x in logits[-1, p].tolist()] for p in positions],
    }


def main():
    torch.set_num_threads(1)
    shutil.rmtree(ROOT, ignore_errors=True)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (WINDOWS, SEQLEN), generator=generator).tolist()
    expected = {"transformers": transformers.__version__, "torch": torch.__version__, "ids": ids, "models": {}}
    for name, (model_class, config, dtype, pickled) in MODELS.items():
        model = model_class(config)
        randomize(model, generator)
        model = model.to(dtype)
        directory = ROOT / name
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        expected["models"][name] = figures(directory, ids)
        if pickled:  # the same tensors, in the form that older checkpoints have
            (directory / "model.safetensors").unlink()
            torch.save(model.state_dict(), directory / "pytorch_model.bin")
            assert figures(directory, ids) == expected["models"][name]
    (ROOT / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()

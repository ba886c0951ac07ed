"""The released arithmetic of STBLLM in numpy and torch: writes released/ (a synthetic layer and what becomes of it).

    python3 make_released.py                     # writes released/
    python3 make_released.py --check DIRECTORY   # compares with layers that the released code itself made

Written from the description of that arithmetic (STBLLM, ICLR 2025, and what its code does otherwise), for the test
of recipe "stbllm-released". The steps, for a weight W (rows, cols), H = 2/T X X^T and S_j^2 = sum_t x_tj^2:

 1. Prune once for all: score = (|W| / row sum + |W| / column sum) S^0.5, the N largest of every M columns stay.
    The mask is forgotten: pruned weights are zeros that take part in what follows.
 2. U = upper Cholesky factor of (H + 0.01 mean(diag H) I)^-1, d = diag U.
 3. Blocks of 128 columns from left to right, each on the weights as compensated so far. With saliency
    V = W^2 / d^2:
    - salient columns: in the order of their sums of V, the count of 1..49 that minimises the error of V itself, where
      the salient columns and all others are binarized with order 2, row by row;
    - p1: of 160 quantiles of V between 0.10 and 0.90 (salient columns count as zeros) the one that minimises the
      error of V in three regions, V < p1, p1 <= V < 2 p1 and 2 p1 <= V, each binarized row by row with order 1;
      p1 with 2 p1 above the 0.90 quantile are not tried;
    - W itself is binarized over these sets: order 1 in the regions, order 2 in the salient columns.
    - compensation: W[:, later] -= ((W - Q) / d) U[block, later].

Binarizing a set: m = mean, a = mean |w - m|, w becomes m + a sign(w - m); order 2 does it again on the residual.
Sums are float64, so that no decision depends on how a library orders them. V, p1 and the three steps to U are float32 as
in the released code: Hessians of real layers are so badly conditioned that float64 decides some close calls otherwise,
and checkpoints have many equal weights, so that a quantile often is one of the values that it is compared with.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

BLOCK, MAX_SALIENT, DAMPING = 128, 50, 0.01


def importance(weight, norm_sq):
    size = np.abs(weight)
    relative = size / size.sum(1, keepdims=True) + size / size.sum(0, keepdims=True)
    return relative * norm_sq**0.25


def nm_mask(score, keep, group):
    rows, cols = score.shape
    order = np.argsort(-score.reshape(rows, cols // group, group), axis=2, kind="stable")
    mask = np.zeros_like(order, dtype=bool)
    np.put_along_axis(mask, order[:, :, :keep], True, axis=2)
    return mask.reshape(rows, cols)


def binarize(values, mask, order=1):
    """The binarized values where `mask` is set, row by row; zero elsewhere."""
    count = np.maximum(mask.sum(1, keepdims=True), 1)
    values = values.astype(np.float64)
    total = np.zeros_like(values)
    for _ in range(order):
        residual = np.where(mask, values - total, 0)
        mean = residual.sum(1, keepdims=True) / count
        centred = np.where(mask, residual - mean, 0)
        scale = np.abs(centred).sum(1, keepdims=True) / count
        total += np.where(mask, mean + scale * np.sign(centred), 0)
    return total


def square_error(values, binarized):
    return ((values - binarized) ** 2).sum()


def choose_salient(saliency):
    order = np.argsort(-saliency.sum(0), kind="stable")
    best = (np.inf, None)
    for count in range(1, min(MAX_SALIENT - 1, saliency.shape[1]) + 1):
        salient = np.zeros(saliency.shape, dtype=bool)
        salient[:, order[:count]] = True
        found = binarize(saliency, salient, 2) + binarize(saliency, ~salient, 2)
        best = min(best, (square_error(saliency, found), count))
    return np.sort(order[: best[1]])


def regions(saliency, rest, p1):
    return [rest & (saliency < p1), rest & (saliency >= p1) & (saliency < 2 * p1), rest & (saliency >= 2 * p1)]


def choose_p1(saliency, salient):
    rest = ~salient
    candidates = np.quantile(np.where(rest, saliency, 0), np.linspace(0.10, 0.90, 160, dtype=np.float32))
    best = (np.inf, None)
    for p1 in candidates:
        if 2 * p1 > candidates[-1]:
            continue
        found = sum(binarize(saliency, region) for region in regions(saliency, rest, p1))
        best = min(best, (square_error(np.where(rest, saliency, 0), found), p1))
    return best[1]


def inverse_factor(hessian, dtype):
    h = torch.from_numpy(hessian).to(dtype)
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).double().numpy()


def quantize(pruned, hessian, dtype=torch.float32):
    """What the pruned weights become, and the salient columns and p1 of each block. `dtype` is that of the factor."""
    cols = pruned.shape[1]
    upper = inverse_factor(hessian, dtype)
    work, result, blocks = pruned.copy(), np.zeros_like(pruned), []
    for start in range(0, cols, BLOCK):
        end = min(start + BLOCK, cols)
        w, d = work[:, start:end], np.diag(upper)[start:end]
        saliency = (w**2 / d**2).astype(np.float32)
        columns = choose_salient(saliency)
        salient = np.zeros(w.shape, dtype=bool)
        salient[:, columns] = True
        p1 = choose_p1(saliency, salient)
        q = binarize(w, salient, 2) + sum(binarize(w, region) for region in regions(saliency, ~salient, p1))
        result[:, start:end] = q
        work[:, end:] -= ((w - q) / d) @ upper[start:end, end:]
        blocks.append({"columns": [start, end], "salient_columns": [int(start + c) for c in columns], "p1": float(p1)})
    return result, blocks


def synthetic_layer(rows=32, cols=192, tokens=768):
    """Gaussian weights and correlated inputs with a few loud columns, in values that float16 holds exactly."""
    random = np.random.default_rng(20)
    loudness = np.exp(0.5 * random.standard_normal(cols))
    loudness[random.choice(cols, 5, replace=False)] *= 6
    x = (random.standard_normal((tokens, cols)) + random.standard_normal((tokens, 12)) @ random.standard_normal((12, cols)) / 4)
    x *= loudness
    weight = (0.05 * random.standard_normal((rows, cols)) * np.exp(0.3 * random.standard_normal(cols))).astype(np.float16)
    return weight, (2 / tokens * x.T @ x).astype(np.float16), tokens


def write(directory, keep=4, group=8):
    weight, hessian, tokens = synthetic_layer()
    w, h = weight.astype(np.float64), hessian.astype(np.float64)
    norm_sq = (np.diag(h) * tokens / 2).astype(np.float32)
    score = importance(w, norm_sq.astype(np.float64))
    kept = nm_mask(score, keep, group)
    result, blocks = quantize(w * kept, h)
    # No close calls here: the test does not hang on the rounding of a library.
    exact, exact_blocks = quantize(w * kept, h, torch.float64)
    assert [b["salient_columns"] for b in blocks] == [b["salient_columns"] for b in exact_blocks]
    assert np.abs(result - exact).max() < 1e-5 * np.abs(result).mean()
    name = f"synthetic_{w.shape[0]}x{w.shape[1]}_{keep}of{group}"
    directory.mkdir(exist_ok=True)
    save_file(
        {
            "weight": weight,
            "hessian": hessian,
            "feature_norm_sq": norm_sq,
            "importance": score.astype(np.float32),
            "kept": kept.astype(np.uint8),
            "pruned_weight": (w * kept).astype(np.float16),
            "dequantized": result.astype(np.float32),
        },
        directory / f"{name}.safetensors",
    )
    (directory / "expected.json").write_text(json.dumps([{"name": name, "keep": keep, "group": group, "blocks": blocks}], indent=1) + "\n")
    print(name, [len(b["salient_columns"]) for b in blocks], "zeros after:", np.mean(result == 0))


def check(directory):
    for layer in json.loads((directory / "expected.json").read_text()):
        tensors = {name: value.astype(np.float64) for name, value in load_file(directory / f"{layer['name']}.safetensors").items()}
        score = importance(tensors["weight"], tensors["feature_norm_sq"])
        kept = nm_mask(score, layer["keep"], layer["group"])
        result, blocks = quantize(tensors["pruned_weight"], tensors["hessian"])
        wanted = tensors["dequantized"]
        print(
            layer["name"],
            "importance", np.abs(score / np.where(tensors["importance"] > 0, tensors["importance"], 1) - 1)[tensors["importance"] > 0].max(),
            "kept", bool(np.all((kept == tensors["kept"].astype(bool)) | (tensors["weight"] == 0))),
            "salient", [b["salient_columns"] for b in blocks] == [b["salient_columns"] for b in layer["blocks"]],
            "p1", max(abs(b["p1"] / e["p1"] - 1) for b, e in zip(blocks, layer["blocks"])),
            "weights", np.abs(result - wanted).max() / np.abs(wanted).mean(),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", type=pathlib.Path, help="a directory with expected.json and layers")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
    else:
        write(pathlib.Path(__file__).parent / "released")

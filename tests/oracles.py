"""Slow, obvious twins of what the packages compute: numpy and loops, one token at a time."""

from itertools import permutations

import numpy as np


def batch_top_k(pre: np.ndarray, n: int) -> np.ndarray:
    """Return a mask of the n largest positive entries of a batch, found by sorting them all."""
    order = sorted(np.ndindex(*pre.shape), key=lambda place: -pre[place])
    mask = np.zeros(pre.shape, dtype=bool)
    for place in order[:n]:
        mask[place] = pre[place] > 0
    return mask


def sae_forward(
    x, W_enc, b_enc, W_dec, b_dec, threshold, *, k=None, r_mag=None, b_mag=None
) -> tuple[np.ndarray, np.ndarray]:
    """Return reconstruction and latents of an SAE, token by token, in float64.

    With k of a top-k one, with r_mag and b_mag of a gated one, else of a jump-relu one.
    """
    x, W_enc, b_enc, W_dec, b_dec, threshold = (
        np.asarray(a, float) for a in (x, W_enc, b_enc, W_dec, b_dec, threshold)
    )
    latents = np.zeros((len(x), W_enc.shape[1]))
    for token, row in enumerate(x):
        pre = np.array([(row - b_dec) @ column for column in W_enc.T])
        for latent, value in enumerate(pre + b_enc):
            latents[token, latent] = value if value > threshold[latent] and value > 0 else 0.0
            if r_mag is not None:
                size = np.exp(float(r_mag[latent])) * pre[latent] + float(b_mag[latent])
                latents[token, latent] = max(size, 0.0) if value > 0 else 0.0
        if k is not None:
            for latent in np.argsort(-latents[token], kind="stable")[k:]:
                latents[token, latent] = 0.0
    return np.stack([sum(f * w for f, w in zip(code, W_dec, strict=True)) + b_dec for code in latents]), latents


def metrics(x: np.ndarray, recon: np.ndarray, latents: np.ndarray) -> dict[str, float]:
    """Return the metrics of an SAE by their printed definitions, from all tokens at once."""
    x, recon = np.asarray(x, float), np.asarray(recon, float)
    error = ((x - recon) ** 2).sum()
    fires = latents != 0
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(x, recon, strict=True)]
    return {
        "tokens": len(x),
        "l0": float(np.mean([row.sum() for row in fires])),
        "fve": float(1 - error / ((x - x.mean(0)) ** 2).sum()),
        "nmse": float(error / (x**2).sum()),
        "cosine": float(np.mean(cosines)),
        "relative_bias": float((recon**2).sum() / (x * recon).sum()),
        "l2_ratio": float(np.mean([np.linalg.norm(b) / np.linalg.norm(a) for a, b in zip(x, recon, strict=True)])),
        "dead": float(np.mean([not column.any() for column in fires.T])),
        "dense": float(np.mean([column.mean() > 0.1 for column in fires.T])),
    }


def best_matching(cosines: np.ndarray) -> float:
    """Return the largest mean of a one-to-one matching of rows to columns (square), by trying all of them."""
    n = len(cosines)
    return max(float(np.mean([cosines[i, p[i]] for i in range(n)])) for p in permutations(range(n)))


def firing_counts(latents: np.ndarray, codes: np.ndarray, match: np.ndarray) -> list[tuple[int, int, int]]:
    """Return for each latent the tokens on which it fires, on which its match does, and on which both do."""
    counts = [[0, 0, 0] for _ in match]
    for latent_row, code_row in zip(latents, codes, strict=True):
        for latent, feature in enumerate(match):
            fires, there = latent_row[latent] != 0, code_row[feature] != 0
            counts[latent][0] += int(fires)
            counts[latent][1] += int(there)
            counts[latent][2] += int(fires and there)
    return [(a, b, c) for a, b, c in counts]


def depth_in_forest(parents: np.ndarray, feature: int) -> int:
    """Return how many parents a feature has above it."""
    return 0 if parents[feature] < 0 else 1 + depth_in_forest(parents, parents[feature])

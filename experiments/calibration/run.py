"""Does the interval of a sweep say what it claims: 0.5 where there is nothing, not 0.5 where there is something?

    OMP_NUM_THREADS=1 python experiments/calibration/run.py            # all settings, 100 seeds each
    OMP_NUM_THREADS=1 python experiments/calibration/run.py --only noise-50 --seeds 20
    OMP_NUM_THREADS=1 python experiments/calibration/run.py --truth    # planted: does it hold what is true?

Every setting has 128 cells of width 128. Results go to result.json beside this file, a setting at a time.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from interp.acts.resampling import grouped_folds
from interp.concepts.reading.sweep import Sweep, sweep

HERE = Path(__file__).resolve().parent
CELLS, WIDTH, PERMUTATIONS = 128, 128, 100
Data = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]


def noise(n: int, effect: float, seed: int) -> Data:
    """Rows of noise, one cell of which holds label 1 `effect` deviations further along one axis."""
    rng = np.random.default_rng([seed, n])
    y = rng.permutation(np.arange(n) % 2)
    X = rng.normal(size=(CELLS, n, WIDTH)).astype(np.float32)
    X[CELLS // 2, :, 0] += effect * y
    return named(X), y, None


def templates(seed: int) -> Data:
    """10 templates of 20 rows with one label each; a template has an offset of deviation 1, its rows noise of 0.5."""
    rng = np.random.default_rng([seed, 10])
    groups = np.repeat(np.arange(10), 20)
    X = rng.normal(size=(CELLS, 10, WIDTH))[:, groups] + 0.5 * rng.normal(size=(CELLS, 200, WIDTH))
    return named(X.astype(np.float32)), rng.permutation(np.arange(10) % 2)[groups], groups


def pairs(seed: int) -> Data:
    """100 pairs of one row a label; a pair has an offset (its topic) of deviation 3, its rows noise of 1."""
    rng = np.random.default_rng([seed, 100])
    groups = np.repeat(np.arange(100), 2)
    X = 3 * rng.normal(size=(CELLS, 100, WIDTH))[:, groups] + rng.normal(size=(CELLS, 200, WIDTH))
    return named(X.astype(np.float32)), np.tile([0, 1], 100), groups


def named(X: np.ndarray) -> dict[str, np.ndarray]:
    return {f"resid_post.{i // 8} @ {i % 8}": x for i, x in enumerate(X)}


SETTINGS = {
    "noise-50": lambda seed: noise(50, 0.0, seed),
    "noise-100": lambda seed: noise(100, 0.0, seed),
    "noise-400": lambda seed: noise(400, 0.0, seed),
    "templates": templates,
    "pairs": pairs,
    "planted, read at 0.80": lambda seed: noise(400, 1.54, seed),  # what a mean difference of 320 rows reaches
    "planted, 0.80 at best": lambda seed: noise(400, 1.19, seed),  # what the true axis reaches: Phi(1.19 / sqrt 2)
}


def once(setting: str, seed: int) -> dict[str, Any]:
    """Return what one draw of a setting gives: nested, naive (the table's best) and, with groups, leaky."""
    X, y, groups = SETTINGS[setting](seed)
    options: dict[str, Any] = {"methods": ["mean_difference"], "seed": seed, "shares": (), "n_random": 1}
    found = sweep(X, y, groups=groups, n_permutations=PERMUTATIONS, **options)
    assert found.p_value is not None
    row = {**said(found), "p": found.p_value, "right": found.choice.cell == f"resid_post.{CELLS // 16} @ 0"}
    row["naive"], row["naive covers"] = found.table[0].auroc, covers(found.table[0].interval)
    row["in-sample"] = found.in_sample
    if groups is not None:
        leaky = said(sweep(X, y, n_permutations=0, **options))
        row["leaky"], row["leaky covers"] = leaky["auroc"], leaky["covers"]
    return row


def said(found: Sweep) -> dict[str, Any]:
    low, high = found.interval
    return {"auroc": found.auroc, "covers": covers(found.interval), "above": low > 0.5, "width": high - low}


def covers(interval: tuple[float, float]) -> bool:
    return interval[0] <= 0.5 <= interval[1]


def truth(effect: float, seed: int) -> dict[str, Any]:
    """Return whether the interval holds the true AUROC of the readers fitted without each fold, on endless new rows.

    Without permutations: the correction that they make fades out this far from chance.
    """
    X, y, _ = noise(400, effect, seed)
    found = sweep(X, y, methods=["mean_difference"], n_permutations=0, seed=seed, shares=(), n_random=1)
    true = []
    for (train, _), chosen in zip(grouped_folds(np.arange(400), 5, seed, y), found.chosen, strict=True):
        rows, labels = X[chosen.cell][train], y[train]
        w = rows[labels == 1].mean(0) - rows[labels == 0].mean(0)
        there = chosen.cell == f"resid_post.{CELLS // 16} @ 0"
        apart = effect * float(w[0]) / float(np.linalg.norm(w))  # of the classes along w, in deviations
        true.append(NormalDist().cdf(apart / 2**0.5) if there else 0.5)
    value = float(np.mean(true))
    low, high = found.interval
    return {"auroc": found.auroc, "truth": value, "holds the truth": low <= value <= high, "width": high - low}


def summary(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return counts for flags, means for figures, and the spread of the score."""
    out: dict[str, Any] = {"seeds": len(rows), "seconds a seed": round(seconds / len(rows), 2)}
    for key, first in rows[0].items():
        values = np.array([row[key] for row in rows], dtype=float)
        out[key] = int(values.sum()) if isinstance(first, bool) else round(float(values.mean()), 3)
    out["auroc sd"] = round(float(np.std([r["auroc"] for r in rows], ddof=1)), 3)
    out["width, largest"] = round(max(r["width"] for r in rows), 3)
    out["p <= 0.05"] = sum(r["p"] <= 0.05 for r in rows)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="seed of the first draw; others than 0 are only printed")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--truth", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.truth:
        for effect in (1.54, 1.19):
            rows = [truth(effect, seed) for seed in range(args.seeds)]
            print(effect, {k: round(float(np.mean([r[k] for r in rows])), 3) for k in rows[0]}, flush=True)
        return
    path = HERE / "result.json"
    results = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    for setting in args.only:
        start = time.perf_counter()
        rows = [once(setting, seed) for seed in range(args.first, args.first + args.seeds)]
        results[setting] = summary(rows, time.perf_counter() - start)
        print(setting, json.dumps(results[setting]), flush=True)
        if args.first == 0:
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()

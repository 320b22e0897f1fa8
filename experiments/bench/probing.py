"""Logistic probes of every layer and fold: the batched solver against scikit-learn looped over the same cells.

    experiments/bench/.venv/bin/python experiments/bench/probing.py          # 12 layers x 4,000 x 768 x 5 folds
    .venv/bin/python experiments/bench/probing.py --quick                    # small, to see that it runs

Both fit the same problem (C 1, rows standardised by the training fold, intercept free) in one process, by turns, layer
for layer. Before the timing each fit is compared with scikit-learn's at tol 1e-8: cosine of the coefficients on
standardised rows, and AUROC on the held-out fold. How many steps scikit-learn takes depends on the rows: theirs are
normal with deviations i ** -decay along turned axes, and classes 2 deviations apart. scikit-learn is timed converged
(float64, tol 1e-6) and as it comes (float32 rows, tol 1e-4).
"""

import argparse
import functools
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from timing import interleaved, machine, ratio, report

from interp.acts.resampling import aurocs, fold_numbers, grouped_folds
from interp.concepts.reading.nested import Cell, fit_columns
from interp.concepts.reading.solver import fit_logistic, training_sets

FOLDS = 5
DECAY = {"decay 1": 1.0, "decay 0.75": 0.75, "decay 0.5": 0.5, "white": 0.0}
APART = 2.0  # distance of the classes, in deviations: an AUROC of .92 at best


def layer(kind: str, n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 rows of one layer and their labels."""
    rng = np.random.default_rng(seed)
    turned = np.linalg.qr(rng.normal(size=(d, d)))[0]
    y = rng.permutation(np.arange(n) % 2)
    X = rng.normal(size=(n, d)) + np.outer(y, rng.normal(size=d) * APART / d**0.5)
    return ((X * np.arange(1, d + 1) ** -DECAY[kind]) @ turned).astype(np.float32), y


def scikit_learn(X: np.ndarray, y: np.ndarray, folds: np.ndarray, tol: float = 1e-4) -> np.ndarray:
    """Return coefficients on standardised rows [fold, d]."""
    found = []
    for k in range(FOLDS):
        train = X[folds != k]
        rows = (train - train.mean(0)) / train.std(0)
        found.append(LogisticRegression(C=1.0, max_iter=10_000, tol=tol).fit(rows, y[folds != k]).coef_[0])
    return np.stack(found)


def batched(X: np.ndarray, y: np.ndarray, folds: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """Return raw weights [fold, d]."""
    fits = fit_logistic(
        torch.from_numpy(X).to(device), torch.from_numpy(y)[:, None], torch.from_numpy(folds), training_sets(FOLDS)
    )
    return fits.weight[:, :, 0]


def closed(method: str, X: np.ndarray, y: np.ndarray, folds: np.ndarray) -> None:
    order = np.argsort(folds, kind="stable")
    cell = Cell.of(torch.from_numpy(X[order]))
    labels, number = torch.from_numpy(y[order])[None], torch.from_numpy(folds[order])
    fit_columns([cell], labels, number, training_sets(FOLDS), (method, 1.0))


def agreement(X: np.ndarray, y: np.ndarray, folds: np.ndarray) -> tuple[float, float]:
    """Return the smallest cosine of coefficients and the largest difference in held-out AUROC over the folds."""
    cosines, apart = [], []
    for k, (theirs, ours) in enumerate(
        zip(scikit_learn(X.astype(float), y, folds, 1e-8), batched(X, y, folds), strict=True)
    ):
        deviation = X[folds != k].std(0)
        own = ours.numpy() * deviation
        cosines.append(float(own @ theirs / np.linalg.norm(own) / np.linalg.norm(theirs)))
        test = X[folds == k]
        scores = np.stack([test @ (theirs / deviation), test @ ours.numpy()]).astype(np.float32)
        a, b = aurocs(scores, y[folds == k])
        apart.append(abs(float(a - b)))
    return min(cosines), max(apart)


def compare(kind: str, layers: int, n: int, d: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each contender: seconds for all layers, ratios to scikit-learn and to a Gram matrix."""
    data = [layer(kind, n, d, seed) for seed in range(layers)]
    folds = fold_numbers(grouped_folds(np.arange(n), FOLDS, 0, data[0][1]))
    checked = [agreement(X, y, folds) for X, y in data]
    calls: dict[str, Any] = {
        "scikit-learn, converged": lambda X, y: scikit_learn(X.astype(float), y, folds, 1e-6),
        "scikit-learn, as it comes": lambda X, y: scikit_learn(X, y, folds),
        "interp logistic": lambda X, y: batched(X, y, folds),
        "interp lda": lambda X, y: closed("lda", X, y, folds),
        "interp ridge": lambda X, y: closed("ridge", X, y, folds),
        "interp mean difference": lambda X, y: closed("mean_difference", X, y, folds),
        "one Gram matrix": lambda X, y: torch.from_numpy(X).T @ torch.from_numpy(X),
    }
    if torch.cuda.is_available():
        calls["interp logistic, CUDA"] = lambda X, y: batched(X, y, folds, "cuda")
    runs = {name: functools.partial(_all, call, data) for name, call in calls.items()}
    times = interleaved(runs, repeats)
    return [
        {
            "rows": kind,
            "contender": name,
            "s": times[name]["wall"],
            "CPU s": times[name]["cpu"],
            "faster than converged": ratio(times, "scikit-learn, converged", name),
            "faster than as it comes": ratio(times, "scikit-learn, as it comes", name),
            "Gram matrices": ratio(times, name, "one Gram matrix"),
            "least cosine": min(c for c, _ in checked) if name == "interp logistic" else "",
            "AUROC apart": max(a for _, a in checked) if name == "interp logistic" else "",
        }
        for name in runs
    ]


def _all(call: Any, data: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for X, y in data:
        call(X, y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=DECAY, default=list(DECAY))
    parser.add_argument("--quick", action="store_true", help="2 layers x 400 x 64, nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = machine(("torch", "scikit-learn", "numpy"))
    size = (2, 400, 64) if args.quick else (args.layers, 4000, 768)
    with threadpool_limits(args.threads):
        rows = [row for kind in args.only for row in compare(kind, *size, 1 if args.quick else args.repeats)]
    if args.quick:
        for row in rows:
            print(row)
        return
    report("probing", rows, machine=about, repeats=args.repeats, threads=args.threads, layers=args.layers)


if __name__ == "__main__":
    main()

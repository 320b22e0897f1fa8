"""Find concept directions: labelled rows, or an SAE's latent, in; a Direction out."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from interp.acts.direction import Direction, data_fingerprint, direction_from
from interp.acts.resampling import Labels, as_list
from interp.concepts.reading.regression import logistic, ridge, sparse, svm
from interp.concepts.reading.rows import DirectionWarning, Rows, labelled_rows, oriented, pair_rows, target_rows
from interp.concepts.reading.unsupervised import ccs, lat, pair_pca

__all__ = [
    "METHODS",
    "DirectionWarning",
    "Rows",
    "fit_direction",
    "labelled_direction",
    "labelled_rows",
    "latent_direction",
    "lda",
    "leace",
    "mean_difference",
]


def mean_difference(X: Rows, y: Labels, *, pairs: Labels | None = None) -> Float[Tensor, " d"]:
    """Return mean(positive rows) - mean(negative rows) in raw units, float64: what to steer with.

    Points towards label 1 by construction. With pairs it is the mean of their differences, the same number, and rows
    that are no pairs are refused. Raises ValueError for one class only, lengths that differ, values that are not
    finite, or class means that are equal.
    """
    rows, labels = labelled_rows(X, y)
    if pairs is not None:
        pair_rows(rows, labels, pairs, "mean_difference")
    positive = torch.from_numpy(labels == 1)
    means = [rows[chosen].mean(0, dtype=torch.float64) for chosen in (positive, ~positive)]  # fp32 sums drift
    difference = means[0] - means[1]
    if float(difference.norm()) <= 1e-10 * max(float(m.norm()) for m in means):
        raise ValueError("the class means are equal: these rows show no difference between the labels")
    return difference


def lda(X: Rows, y: Labels) -> Float[Tensor, " d"]:
    """Return the weight of linear discriminant analysis: log-odds of label 1 per raw unit. A direction to read with.

    Inverse within-class covariance times the mean difference. The covariance of the standardised rows is shrunk after
    Ledoit and Wolf (J. Multivar. Anal. 88:365, 2004), so that fewer rows than coordinates will do. Raises ValueError
    as mean_difference does, and where rows of a class do not vary.
    """
    rows, labels = labelled_rows(X, y)
    difference = mean_difference(rows, labels)
    centred = rows.double().clone()  # double() alone is the caller's own array where that is float64
    for c in (0, 1):
        chosen = torch.from_numpy(labels == c)
        centred[chosen] = centred[chosen] - centred[chosen].mean(0)
    return _shrunk_solve(centred, difference)


def leace(X: Rows, y: Labels, *, part: str = "removed") -> Float[Tensor, " d"]:
    """Return what LEACE's eraser (arXiv:2306.03819) takes away, or what it reads, for one concept, in raw units.

    The eraser of one concept z is x - s (w @ (x - mean x)). "removed" is s = cov(x, z) / var(z): all that it takes
    away lies along it. With labels 0 and 1 that is the mean difference; with a continuous target the mean difference's
    counterpart. "read" is w = inv(cov x) s, scaled so that w @ s = 1, with the covariance shrunk as in `lda`: it says
    how much of s a row holds. Raises ValueError for targets that are not finite or all equal, and where the rows do
    not move with them.
    """
    if part not in ("removed", "read"):
        raise ValueError(f"part is {part!r}; it is 'removed' (the direction taken away) or 'read' (how much of it)")
    rows, z = target_rows(X, y)
    centred = rows.double() - rows.double().mean(0)
    away = torch.from_numpy(z - z.mean())
    moved = centred.T @ away / (away @ away)
    if float(moved.norm()) * np.ptp(z) <= 1e-10 * float(rows.double().abs().max()):
        raise ValueError("the rows have no covariance with the labels: there is nothing to erase")
    if part == "removed":
        return moved
    weight = _shrunk_solve(centred, moved)
    return weight / (weight @ moved)


METHODS: dict[str, Callable[..., Tensor]] = {
    "mean_difference": mean_difference,
    "lda": lda,
    "logistic": logistic,
    "svm": svm,
    "ridge": ridge,
    "leace": leace,
    "sparse": sparse,
    "pair_pca": pair_pca,
    "lat": lat,
    "ccs": ccs,
}
CONTINUOUS = ("ridge", "leace")  # these take any number for y


def fit_direction(
    X: Rows,
    y: Labels,
    *,
    method: str = "mean_difference",
    groups: Labels | None = None,
    pairs: Labels | None = None,
    hook: str | None = None,
    model: Any = None,
    seed: int = 0,
    **options: Any,
) -> Direction:
    """Return the direction that leads from label 0 to label 1 (or up a continuous target), with its provenance.

    X holds one row an example, in raw activation units. Give the model (an interp Model or a Hugging Face model) and
    hook point that the rows come from: strengths are measured there, and other models refuse the direction. METHODS
    lists the methods; groups, pairs and seed go to those that use them, options to the method. Whatever the method,
    the scale is the distance between the class means along the direction (the step for y + 1 with a continuous
    target). Raises ValueError for an unknown method or option and as the method does.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; there are: {', '.join(METHODS)}")
    find = METHODS[method]
    known = list(inspect.signature(find).parameters)[2:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{method} has no option {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    shared = {"groups": groups, "pairs": pairs, "seed": seed}
    vector = find(X, y, **{k: v for k, v in shared.items() if k in known}, **options)
    name = f"{method}({', '.join(f'{k}={v}' for k, v in options.items() if k != 'sides')})" if options else method
    used = seed if "seed" in known else None
    if method in CONTINUOUS and not _two_class(y):
        rows, targets = target_rows(X, y)
        data = data_fingerprint(rows, np.frombuffer(targets.tobytes(), dtype=np.int8))
        step = oriented(vector, rows, targets)
        return direction_from(step, hook=hook, model=model, method=name, data=data, seed=used)
    rows, labels = labelled_rows(X, y)
    step = oriented(vector, rows, labels)
    return labelled_direction(step, rows, labels, method=name, hook=hook, model=model, seed=used)


def labelled_direction(
    vector: Shaped[Tensor, " d"],
    rows: Shaped[Tensor, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    method: str,
    hook: str | None,
    model: Any,
    seed: int | None = None,
) -> Direction:
    """Return a vector as a Direction whose sign is that of the data, with the mean projection of each class."""
    unit = vector.double() / vector.double().norm()
    along = (rows.double() @ unit).numpy()
    negative, positive = float(along[labels == 0].mean()), float(along[labels == 1].mean())
    if positive < negative:
        vector, negative, positive = -vector, -negative, -positive
    return direction_from(
        vector,
        hook=hook,
        model=model,
        method=method,
        negative=negative,
        positive=positive,
        data=data_fingerprint(rows, labels),
        seed=seed,
    )


def latent_direction(sae: Any, latent: int, hook: str, model: Any) -> Direction:
    """Return the decoder row of an SAE's latent as a Direction; its scale is the row's length.

    Raises ValueError where the SAE has no such latent or the row is zero, DirectionError where its width is not that
    of the hook point.
    """
    rows = sae.W_dec
    if not 0 <= latent < len(rows):
        raise ValueError(f"latent {latent} is not one of the {len(rows)} of this SAE")
    return direction_from(rows[latent], hook=hook, model=model, method=f"sae latent {latent}")


def _shrunk_solve(centred: Float[Tensor, "n d"], b: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return inv(S) b, S being the Ledoit-Wolf covariance of the rows, standardised for it and taken back.

    In the smaller of the two Gram matrices. With S = (1 - t) C + t mu I, mu = tr(C) / d, and t the share of
    |C - mu I|^2 that is sampling error.
    """
    n, d = centred.shape
    deviation = centred.square().mean(0).sqrt()
    largest = float(deviation.max())
    if not largest > 0:
        raise ValueError("the rows do not vary within the classes: there is no covariance; use mean_difference")
    deviation = torch.where(deviation <= 1e-12 * largest, torch.full_like(deviation, largest), deviation)
    Z, b = centred / deviation, b / deviation
    gram = (Z @ Z.T if n < d else Z.T @ Z) / n
    squares, norm2 = Z.square().sum(1), float(gram.square().sum())
    mu = float(squares.sum()) / (n * d)
    spread = norm2 / d - mu**2
    error = (float(squares.square().sum()) / n - norm2) / (n * d)
    t = min(error, spread) / spread if spread > 0 else 1.0
    ridge_part = t * mu
    if not ridge_part > 0:
        raise ValueError(f"{n} rows vary too little within the classes for a covariance; use mean_difference")
    inner = (1 - t) * gram + ridge_part * torch.eye(len(gram), dtype=torch.float64)
    if n >= d:
        return torch.linalg.solve(inner, b) / deviation
    return (b - (1 - t) / n * (Z.T @ torch.linalg.solve(inner, Z @ b))) / ridge_part / deviation


def _two_class(y: Labels) -> bool:
    return set(as_list(y)) <= {0, 1}

"""Directions of penalised regression: logistic, linear SVM, ridge, and logistic regression on few coordinates."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.acts.resampling import Labels, auroc, grouped_folds
from interp.concepts.reading.rows import Rows, joined_groups, labelled_rows, target_rows

__all__ = ["ALPHAS", "CS", "choose_C", "logistic", "ridge", "sparse", "svm"]

CS: tuple[float, ...] = tuple(10.0**k for k in range(-4, 3))  # inverse penalties on standardised rows
ALPHAS: tuple[float, ...] = tuple(10.0 ** (k / 2) for k in range(-4, 13))
SMALL = 800  # up to this many unknowns Newton's method is the quicker one


def logistic(
    X: Rows,
    y: Labels,
    *,
    C: float | int | None = None,
    Cs: Sequence[float | int] = CS,
    groups: Labels | None = None,
    pairs: Labels | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Float[Tensor, " d"]:
    """Return the weight of ridge-penalised logistic regression: log-odds of label 1 per raw unit of each coordinate.

    Fitted on standardised rows and divided by their deviation, since undivided weights point elsewhere wherever
    coordinates differ in variance. Without C the inverse penalty is chosen from Cs as choose_C does. Raises ValueError
    as labelled_rows and choose_C do.
    """
    return _at_best("logistic", X, y, C, Cs, groups, pairs, folds, seed)


def svm(
    X: Rows,
    y: Labels,
    *,
    C: float | int | None = None,
    Cs: Sequence[float | int] = CS,
    groups: Labels | None = None,
    pairs: Labels | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Float[Tensor, " d"]:
    """Return the weight of a linear support vector machine (squared hinge loss): margins per raw unit.

    Standardising, C and errors as in `logistic`; C is chosen by the held-out AUROC.
    """
    return _at_best("svm", X, y, C, Cs, groups, pairs, folds, seed)


def choose_C(
    X: Rows,
    y: Labels,
    *,
    kind: str = "logistic",
    Cs: Sequence[float | int] = CS,
    groups: Labels | None = None,
    pairs: Labels | None = None,
    folds: int = 5,
    seed: int = 0,
) -> float:
    """Return the inverse penalty with the best mean held-out log loss ("svm": AUROC), the smallest among equals.

    Neither a group nor a pair is split between folds; there are fewer folds where a class lies in fewer groups. Rows
    are standardised by each fold's training rows. Raises ValueError where a class lies in one group only, so that
    nothing can be held out: give C then.
    """
    rows, labels = labelled_rows(X, y)
    Cs = sorted(_positive("C", c) for c in Cs)
    number = joined_groups(groups, pairs, len(rows))
    fewest = min(len(np.unique(number[labels == c])) for c in (0, 1))
    if fewest < 2 or folds < 2:
        raise ValueError(
            f"C cannot be chosen by cross-validation with {folds} folds where a class lies in {fewest} groups (both "
            "must be at least 2): give C, such as C=1"
        )
    array, losses = rows.double().numpy(), np.zeros(len(Cs))
    for train, test in grouped_folds(number, min(folds, fewest), seed, labels):
        weights, biases = _path(kind, array[train], labels[train], Cs)
        held = array[test] @ weights.T + biases
        if kind == "svm":
            losses -= [auroc(held[:, i], labels[test]) for i in range(len(Cs))]
        else:
            losses += np.logaddexp(0, -held * (2 * labels[test] - 1)[:, None]).mean(0)
    return Cs[int(np.argmin(losses.round(9)))]


def ridge(
    X: Rows,
    y: Labels,
    *,
    alpha: float | int | None = None,
    alphas: Sequence[float | int] = ALPHAS,
    groups: Labels | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Float[Tensor, " d"]:
    """Return the weight of ridge regression on a continuous target: its units per raw unit of each coordinate.

    Penalty alpha |w|^2 on standardised rows, beside the sum of squared errors. Without alpha it is chosen from alphas
    by the mean squared error of leaving out each row (exact, from one decomposition), or with groups by that of folds
    of whole groups. Raises ValueError for targets that are not finite or all equal, or rows that never vary.
    """
    rows, targets = target_rows(X, y)
    array = rows.double().numpy()
    alphas = sorted(_positive("alpha", a) for a in (alphas if alpha is None else [alpha]))
    if len(alphas) == 1:
        return _weight(_ridge_path(array, targets, alphas)[0][0])
    if groups is None:
        weights, _, errors = _ridge_path(array, targets, alphas)
        return _weight(weights[int(np.argmin(errors))])
    errors = np.zeros(len(alphas))
    for train, test in grouped_folds(joined_groups(groups, None, len(rows)), folds, seed):
        weights, biases, _ = _ridge_path(array[train], targets[train], alphas)
        errors += ((array[test] @ weights.T + biases - targets[test][:, None]) ** 2).sum(0)
    return _weight(_ridge_path(array, targets, [alphas[int(np.argmin(errors))]])[0][0])


def sparse(X: Rows, y: Labels, *, k: int = 5, C: float | int = 1.0) -> Float[Tensor, " d"]:
    """Return logistic weights (log-odds per raw unit) on the k best coordinates, zero elsewhere.

    X holds activations or an autoencoder's latents. The coordinates with the largest |difference of class means| in
    within-class deviations are chosen on these very rows: give training rows alone, and score on others. After Gurnee
    et al. (arXiv:2305.01610). Raises ValueError where fewer than k coordinates differ between the classes.
    """
    rows, labels = labelled_rows(X, y)
    array = rows.double().numpy()
    sides = [array[labels == c] for c in (1, 0)]
    difference = sides[0].mean(0) - sides[1].mean(0)
    difference[np.abs(difference) <= 1e-10 * np.abs(array).max(0)] = 0.0
    differing = int((difference != 0).sum())
    if not 1 <= k <= differing:
        raise ValueError(f"k is {k}; of {array.shape[1]} coordinates {differing} differ between the classes")
    within = np.sqrt(sum(((side - side.mean(0)) ** 2).sum(0) for side in sides) / len(array))
    strength = np.abs(difference) / np.maximum(within, 1e-12 * np.abs(array).max(0).clip(min=1e-300))
    chosen = np.argsort(-strength, kind="stable")[:k]
    weight = np.zeros(array.shape[1])
    weight[chosen] = _path("logistic", array[:, chosen], labels, [_positive("C", C)])[0][0]
    return _weight(weight)


def _at_best(kind: str, X: Rows, y: Labels, C: Any, Cs: Any, groups: Any, pairs: Any, folds: int, seed: int) -> Tensor:
    rows, labels = labelled_rows(X, y)
    if C is None:
        C = choose_C(rows, labels, kind=kind, Cs=Cs, groups=groups, pairs=pairs, folds=folds, seed=seed)
    return _weight(_path(kind, rows.double().numpy(), labels, [_positive("C", C)])[0][0])


def _path(
    kind: str, X: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], Cs: Sequence[float]
) -> tuple[Float[np.ndarray, "k d"], Float[np.ndarray, " k"]]:
    """Return raw-unit weights and biases, one a C, each fit starting from the one before."""
    from threadpoolctl import threadpool_limits

    Z, mean, deviation = _standardised(X)
    basis = None
    if len(Z) < Z.shape[1]:  # the penalised weight lies in the span of the rows: the same fit in n unknowns
        left, sizes, basis = np.linalg.svd(Z, full_matrices=False)
        Z = left * sizes
    Z = np.column_stack([Z, np.ones(len(Z))])  # the last unknown is the bias, which is not penalised
    signs = 2.0 * labels - 1
    minimise = _newton if Z.shape[1] <= SMALL else _lbfgs
    at, found = np.zeros(Z.shape[1]), []
    with threadpool_limits(1, "blas"):  # many small products: threads wait for each other
        for C in Cs:
            at = minimise(Z, signs, C, _LOSSES[kind], at)
            found.append(at)
    lines = np.stack(found)
    weights = (lines[:, :-1] if basis is None else lines[:, :-1] @ basis) / deviation
    return weights, lines[:, -1] - weights @ mean


def _log_loss(margin: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from scipy.special import expit

    miss = expit(-margin)
    return np.logaddexp(0, -margin), -miss, miss * (1 - miss)


def _squared_hinge(margin: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    short = np.maximum(1 - margin, 0)
    return short**2, -2 * short, 2.0 * (short > 0)


_LOSSES: dict[str, Callable] = {"logistic": _log_loss, "svm": _squared_hinge}  # value, slope, curvature by margin


def _newton(Z: np.ndarray, signs: np.ndarray, C: float, loss: Callable, at: np.ndarray) -> np.ndarray:
    """Minimise |w|^2 / 2 + C * sum of losses by Newton's method with step halving, to rounding."""
    penalty = np.append(np.ones(Z.shape[1] - 1), 0.0)

    def objective(x: np.ndarray) -> float:
        return float(x @ (penalty * x) / 2 + C * loss(signs * (Z @ x))[0].sum())

    value = objective(at)
    for _ in range(200):
        _, slope, curvature = loss(signs * (Z @ at))
        gradient = penalty * at + C * (Z.T @ (signs * slope))
        hessian = C * (Z.T * curvature) @ Z
        hessian[np.diag_indices_from(hessian)] += penalty + 1e-12  # a hinge that all rows pass leaves the bias free
        step = np.linalg.solve(hessian, gradient)
        gain = float(gradient @ step)
        if gain <= 1e-16 * (1 + abs(value)):
            return at - step
        size = 1.0
        while (new := objective(at - size * step)) > value - 1e-4 * size * gain and size > 1e-8:
            size /= 2
        if size <= 1e-8:
            return at  # no step goes down any more: rounding
        at, value = at - size * step, new
    raise RuntimeError(f"Newton's method did not settle at C={C:g}; scale the rows or give a smaller C")


def _lbfgs(Z: np.ndarray, signs: np.ndarray, C: float, loss: Callable, at: np.ndarray) -> np.ndarray:
    """Minimise the same where the Hessian would be too large."""
    from scipy.optimize import minimize

    penalty = np.append(np.ones(Z.shape[1] - 1), 0.0)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope, _ = loss(signs * (Z @ x))
        return float(x @ (penalty * x) / 2 + C * value.sum()), penalty * x + C * (Z.T @ (signs * slope))

    options = {"maxiter": 5000, "maxfun": 10_000, "gtol": 1e-6 * C * len(Z) ** 0.5, "ftol": 1e-15}
    found = minimize(objective, at, jac=True, method="L-BFGS-B", options=options)
    if found.status == 1:
        raise RuntimeError(f"the fit did not settle at C={C:g} in {found.nit} steps; give a smaller C")
    return found.x


def _standardised(X: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, deviation = X.mean(0), X.std(0)
    flat = deviation <= 1e-12 * np.abs(mean).clip(min=1e-300)
    if flat.all():
        raise ValueError("no coordinate varies over these rows: there is nothing to fit")
    deviation[flat] = np.inf  # a constant coordinate gets weight 0
    return (X - mean) / deviation, mean, deviation


def _ridge_path(X: np.ndarray, targets: np.ndarray, alphas: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Return raw-unit weights and biases, and the mean squared leave-one-out error, one an alpha."""
    Z, mean, deviation = _standardised(X)
    left, sizes, basis = np.linalg.svd(Z, full_matrices=False)
    shrink = sizes**2 / (sizes**2 + np.array(alphas)[:, None])  # [k, r]
    projected = left.T @ (targets - targets.mean())
    fitted = targets.mean() + (shrink * projected) @ left.T
    leverage = 1 / len(X) + shrink @ (left**2).T
    errors = (((targets - fitted) / np.maximum(1 - leverage, 1e-12)) ** 2).mean(1)
    weights = ((projected * sizes / (sizes**2 + np.array(alphas)[:, None])) @ basis) / deviation
    return weights, targets.mean() - weights @ mean, errors


def _positive(name: str, value: float | int) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; it must be positive and finite")
    return float(value)


def _weight(weight: np.ndarray) -> Float[Tensor, " d"]:
    if not np.abs(weight).max() > 0:
        raise ValueError("the weight is zero: these rows show no difference between the labels")
    return torch.from_numpy(np.ascontiguousarray(weight))

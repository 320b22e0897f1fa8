"""Linear probes, and their held-out scores beside shuffled labels and random directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.direction import Direction, as_rows
from interp.acts.resampling import Labels, as_groups, as_list, auroc, auroc_interval, permute_labels, placebo_directions
from interp.concepts.reading.closed import CLOSED, Columns
from interp.concepts.reading.finders import Rows, labelled_direction, labelled_rows, mean_difference
from interp.concepts.reading.solver import ConvergenceError, fit_logistic
from sae.io import FormatError, load_tensors, save_tensors

__all__ = ["PROBES", "Probe", "ProbeResult", "evaluate_layers", "evaluate_probe", "fit_probe"]

_KIND = "interp probe"
Array: TypeAlias = Tensor | np.ndarray  # [n, d]; the hook points may differ in width


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A linear reader in raw activation units: `decision` is positive where label 1 is read.

    `fitted` is the same line as a Direction: the weight normalised, with hook point, model and data.
    """

    weight: Float[Tensor, " d"]  # float64
    bias: float
    method: str
    fitted: Direction

    def decision(self, X: Rows) -> Float[Tensor, " n"]:
        """Return X @ weight + bias a row: log-odds for a logistic probe, residual-stream units squared otherwise."""
        rows = as_rows(X)
        if rows.shape[1] != len(self.weight):
            raise ValueError(f"rows have width {rows.shape[1]}, the probe {len(self.weight)}")
        return rows.double() @ self.weight + self.bias

    def direction(self) -> Direction:
        """Return the direction in which the probe reads more of label 1, for steering."""
        return self.fitted

    def save(self, path: str | Path) -> None:
        """Write the probe as safetensors with JSON metadata, atomically."""
        meta = {"kind": _KIND, "bias": self.bias, "method": self.method, "direction": self.fitted.meta()}
        save_tensors(path, {"weight": self.weight, "vector": self.fitted.vector}, meta)

    @classmethod
    def load(cls, path: str | Path, model: Any = None, *, force: bool = False) -> "Probe":
        """Read a probe; with a model, refuse one of another model or hook point as Direction.for_model does.

        Raises MissingError, FormatError, DirectionError.
        """
        tensors, meta = load_tensors(path)
        bias, method, inner = meta.get("bias"), meta.get("method"), meta.get("direction")
        if meta.get("kind") != _KIND or set(tensors) != {"weight", "vector"} or not isinstance(inner, dict):
            raise FormatError(f"{path} holds no probe: kind {_KIND!r} with weight, vector and direction is expected")
        same = tensors["weight"].shape == tensors["vector"].shape
        if not (same and isinstance(bias, float) and isinstance(method, str)):
            raise FormatError(f"{path} holds no sound probe")
        fitted = Direction.from_meta(tensors["vector"], inner)
        fitted = fitted if model is None else fitted.for_model(model, force=force)
        return cls(weight=tensors["weight"].double(), bias=bias, method=method, fitted=fitted)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeResult:
    """Held-out scores of a probe, beside what shuffled labels and random directions reach on the same rows."""

    auroc: float
    interval: tuple[float, float]  # 95%, over the groups of the test rows
    accuracy: float
    control: float  # mean held-out AUROC of probes refit on shuffled training labels
    control_scores: tuple[float, ...]
    p_value: float  # (1 + shuffles that reach auroc) / (1 + shuffles)
    random_direction: float  # mean held-out AUROC of random directions, their sign taken from the training rows
    random_scores: tuple[float, ...]
    n_train: int
    n_test: int
    n_groups_train: int
    n_groups: int  # of the test rows: what the interval is drawn over
    method: str
    seed: int
    probe: Probe  # fitted on the training rows

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON holds them, without the probe."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "probe"}


def logistic(rows: Tensor, labels: np.ndarray, C: float) -> tuple[Tensor, float]:
    """Return weight and bias of L2-penalised logistic regression, in raw units: the optimum of scikit-learn's problem.

    Rows are standardised by their own mean and deviation, and the weights divided by the deviation afterwards: left
    undivided they point elsewhere whenever coordinates differ in variance. C is the inverse penalty of scikit-learn.
    """
    fit = fit_logistic(rows, torch.from_numpy(labels)[:, None], C=C, tol=1e-6, dtype=torch.float64)
    return fit.weight[0, :, 0], float(fit.bias[0, 0])


def mean_difference_line(rows: Tensor, labels: np.ndarray, C: float) -> tuple[Tensor, float]:
    """Return the mean difference as weight, and the bias that puts 0 half way between the class means."""
    weight = mean_difference(rows, labels)
    along = (rows.double() @ weight).numpy()
    return weight, -float(along[labels == 1].mean() + along[labels == 0].mean()) / 2


def lda_line(rows: Tensor, labels: np.ndarray, C: float) -> tuple[Tensor, float]:
    """Return the log-odds of linear discriminant analysis with Ledoit and Wolf's shrinkage (C unused)."""
    return _closed("lda", rows, labels, C)


def ridge_line(rows: Tensor, labels: np.ndarray, C: float) -> tuple[Tensor, float]:
    """Return ridge regression of -1 and 1 on standardised rows, penalty 1 / C."""
    return _closed("ridge", rows, labels, C)


def svm_line(rows: Tensor, labels: np.ndarray, C: float) -> tuple[Tensor, float]:
    """Return a linear support vector machine (squared hinge, on standardised rows), in raw units.

    Raises ConvergenceError where scikit-learn's solver does not converge.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    F, mean, deviation = _standardised(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            fit = LinearSVC(C=C, dual="auto", max_iter=100_000, random_state=0).fit(F.numpy(), labels)
        except ConvergenceWarning as warning:
            raise ConvergenceError(
                f"the support vector machine did not converge; take a smaller C than {C}"
            ) from warning
    weight = torch.from_numpy(fit.coef_.ravel()) / deviation
    return weight, float(np.ravel(fit.intercept_)[0] - weight @ mean)


def _standardised(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    X = rows.double()
    mean, deviation = X.mean(0), X.std(0, correction=0)
    deviation = torch.where(deviation <= 1e-12 * mean.abs().clamp_min(1e-30), 1.0, deviation)
    return (X - mean) / deviation, mean, deviation


def _closed(method: str, rows: Tensor, labels: np.ndarray, C: float) -> tuple[Tensor, float]:
    F, mean, deviation = _standardised(rows)
    data = Columns(
        F=F[None],
        deviation=deviation[None],
        Y=torch.from_numpy(labels)[None].double(),
        bounds=(0, len(rows)),
        left_out=((),),
    )
    weight, bias = CLOSED[method](data, C)
    raw = weight[0, 0, 0] / deviation
    return raw, float(bias[0, 0, 0] - raw @ mean)


PROBES: dict[str, Callable[[Tensor, np.ndarray, float], tuple[Tensor, float]]] = {
    "logistic": logistic,
    "mean_difference": mean_difference_line,
    "lda": lda_line,
    "ridge": ridge_line,
    "svm": svm_line,
}


def fit_probe(
    X: Rows, y: Labels, *, method: str = "logistic", C: float = 1.0, hook: str | None = None, model: Any = None
) -> Probe:
    """Return a probe of label 1 against label 0, weights in raw activation units.

    PROBES lists the methods: "logistic", "ridge" and "svm" take the inverse penalty C on standardised rows, "lda" and
    "mean_difference" need none. With model and hook point its direction can steer. Raises ValueError for one class
    only, values that are not finite, an unknown method, C <= 0.
    """
    rows, labels = labelled_rows(X, y)
    weight, bias = _line(method, rows, labels, C)
    fitted = labelled_direction(weight, rows, labels, method=method, hook=hook, model=model)
    return Probe(weight=weight, bias=bias, method=method, fitted=fitted)


def evaluate_probe(
    X_train: Float[Tensor, "train d"] | Float[np.ndarray, "train d"],
    y_train: Labels,
    X_test: Float[Tensor, "test d"] | Float[np.ndarray, "test d"],
    y_test: Labels,
    *,
    groups_train: Labels | None = None,
    groups_test: Labels | None = None,
    method: str = "logistic",
    C: float = 1.0,
    n_shuffles: int = 20,
    n_boot: int = 2000,
    seed: int = 0,
    hook: str | None = None,
    model: Any = None,
) -> ProbeResult:
    """Return the held-out score of a probe with its interval, control and null.

    Groups (templates, documents, pairs) belong on one side: one on both is refused with a ValueError, since a probe
    that knows the template would pass for one that knows the concept. Without groups every row is its own. The
    interval draws groups of the test rows; the control refits on training labels shuffled within groups (between whole
    groups where their label is constant) and scores against the true test labels.
    Raises ValueError also as fit_probe and auroc_interval do.
    """
    train, labels = labelled_rows(X_train, y_train)
    test, truth = labelled_rows(X_test, y_test)
    if n_shuffles < 1:
        raise ValueError(f"n_shuffles is {n_shuffles}; the control needs at least 1, better 20 or more")
    _refuse_leak(groups_train, groups_test)
    number, number_test = as_groups(groups_train, len(train)), as_groups(groups_test, len(test))
    probe = fit_probe(train, labels, method=method, C=C, hook=hook, model=model)
    scores = probe.decision(test)
    observed = auroc(scores, truth)
    rng = np.random.default_rng(seed)
    control = []
    for _ in range(n_shuffles):
        weight, _bias = _line(method, train, permute_labels(labels, number, rng), C)
        control.append(auroc(test.double() @ weight, truth))
    random = _random_scores(train, labels, test, truth, n_shuffles, seed)
    return ProbeResult(
        auroc=observed,
        interval=auroc_interval(scores, truth, number_test, n_boot=n_boot, seed=seed),
        accuracy=float(((scores > 0).numpy() == truth).mean()),
        control=float(np.mean(control)),
        control_scores=tuple(control),
        p_value=(1 + sum(c >= observed for c in control)) / (1 + n_shuffles),
        random_direction=float(np.mean(random)),
        random_scores=tuple(random),
        n_train=len(train),
        n_test=len(test),
        n_groups_train=int(number.max()) + 1,
        n_groups=int(number_test.max()) + 1,
        method=method,
        seed=seed,
        probe=probe,
    )


def evaluate_layers(
    X_train: Mapping[str, Array], y_train: Labels, X_test: Mapping[str, Array], y_test: Labels, **options: Any
) -> dict[str, ProbeResult]:
    """Return evaluate_probe's result for each hook point (the keys); options go to it.

    The best of these is chosen on the test rows, so its score is too high: report a layer chosen elsewhere.
    """
    if set(X_train) != set(X_test):
        raise ValueError(f"training and test rows are of other hook points: {sorted(set(X_train) ^ set(X_test))}")
    return {h: evaluate_probe(X_train[h], y_train, X_test[h], y_test, hook=h, **options) for h in X_train}


def _line(method: str, rows: Tensor, labels: np.ndarray, C: float) -> tuple[Tensor, float]:
    if method not in PROBES:
        raise ValueError(f"there is no probe {method!r}; there are: {', '.join(PROBES)}")
    if not C > 0:
        raise ValueError(f"C is {C}; the inverse penalty must be positive")
    return PROBES[method](rows, labels, C)


def _refuse_leak(groups_train: Labels | None, groups_test: Labels | None) -> None:
    if groups_train is None or groups_test is None:
        return
    both = sorted(set(as_list(groups_train)) & set(as_list(groups_test)), key=str)
    if both:
        shown = ", ".join(repr(g) for g in both[:3])
        raise ValueError(f"{len(both)} groups are in both training and test rows ({shown}): split by whole groups")


def _random_scores(
    train: Tensor, labels: np.ndarray, test: Tensor, truth: np.ndarray, n: int, seed: int
) -> list[float]:
    directions = placebo_directions(train.shape[1], n, seed).double()
    seen, held = train.double() @ directions.T, test.double() @ directions.T
    scores = []
    for i in range(n):
        area = auroc(held[:, i], truth)
        scores.append(area if auroc(seen[:, i], labels) >= 0.5 else 1 - area)
    return scores

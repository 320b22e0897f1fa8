"""What a few latents tell about a text: k-sparse probes beside a dense probe, shuffled labels and random directions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.capture import Acts, capture_acts, pool
from interp.acts.direction import as_rows
from interp.acts.resampling import (
    Labels,
    as_groups,
    as_labels,
    as_list,
    auroc,
    grouped_folds,
    permute_labels,
    placebo_directions,
)
from interp.concepts.reading.probes import logistic
from interp.data.generator import LABELLED, Labelled, labelled
from sae.archs.base import SAE
from sae.stats import bootstrap_interval

if TYPE_CHECKING:
    from interp.model.loading import Model

__all__ = [
    "DEFINITIONS",
    "ProbeScore",
    "SparseProbe",
    "SparseProbing",
    "choose_latents",
    "mean_latents",
    "sparse_probe",
    "sparse_probing",
]

DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "accuracy": "share of texts that a probe fitted without their group gets right; its null is the larger class",
        "auroc": "area under the ROC curve on the texts of a fold, mean over folds; guessing gives 0.5",
        "shuffled": "mean AUROC where latents are chosen, and the probe fitted, by shuffled training labels",
        "random_latents": "mean AUROC of k latents drawn at random from those that vary on the training texts",
        "random_directions": "mean AUROC of the k best, by the same rule, of d_sae random directions of the stream",
    }
)


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """Held-out figures of the probes on k latents, or of the dense probe (k None); DEFINITIONS defines them."""

    k: int | None
    accuracy: float
    interval: tuple[float, float]  # 95 % of the accuracy, bootstrap over groups
    auroc: float
    shuffled: float
    random_latents: float | None  # None for the dense probe
    random_directions: float | None  # None without dense rows, and for the dense probe
    latents: tuple[tuple[int, ...], ...]  # chosen in each fold, strongest first; () for the dense probe


@dataclass(frozen=True, kw_only=True)
class SparseProbe:
    """How well k latents tell one label from the rest on texts of unseen groups, and what chance reaches."""

    label: str
    scores: tuple[ProbeScore, ...]  # one for each k
    dense: ProbeScore | None
    majority: float  # share of the larger class: the accuracy of saying always the same
    n: int
    n_groups: int
    n_folds: int
    n_null: int  # draws of each null in a fold
    seed: int

    def __getitem__(self, k: int) -> ProbeScore:
        """Return the score of a k. Raises KeyError for one that was not measured."""
        for score in self.scores:
            if score.k == k:
                return score
        raise KeyError(f"no probe on {k} latents; there are: {', '.join(str(s.k) for s in self.scores)}")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def table(self) -> str:
        """Return one line of figures for each k, and the dense probe's."""
        head = f"{self.label}: {self.n} texts of {self.n_groups} groups, larger class {self.majority:.3f}"
        names = ("accuracy", "auroc", "shuffled", "random_latents", "random_directions")
        lines = [head, f"{'k':>6} " + " ".join(f"{name:>17}" for name in names)]
        for score in (*self.scores, *([self.dense] if self.dense else [])):
            cells = (getattr(score, name) for name in names)
            shown = " ".join(f"{'' if cell is None else format(cell, '.4f'):>17}" for cell in cells)
            lines.append(f"{score.k or 'dense':>6} {shown}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([self.table(), *_definitions()])


@dataclass(frozen=True, kw_only=True)
class SparseProbing:
    """Sparse probes of several labels, and their means."""

    hook: str
    probes: tuple[SparseProbe, ...]

    def mean(self, k: int | None, what: str = "auroc") -> float:
        """Return the mean over labels of a figure named in DEFINITIONS, of k latents or of the dense probe (None).

        Raises KeyError for a k that was not measured, ValueError for a figure that this probe has not.
        """
        found = [probe.dense if k is None else probe[k] for probe in self.probes]
        values = [getattr(score, what, None) if score is not None else None for score in found]
        if what not in DEFINITIONS or any(value is None for value in values):
            raise ValueError(f"{'the dense probe' if k is None else f'k = {k}'} has no {what!r}")
        return float(np.mean(np.array(values, dtype=float)))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([*(probe.table() for probe in self.probes), *_definitions()])


def sparse_probe(
    latents: Float[Tensor, "n m"] | Float[np.ndarray, "n m"],
    y: Labels,
    *,
    groups: Labels | None = None,
    ks: Sequence[int] = (1, 2, 5),
    dense: Float[Tensor, "_ d"] | Float[np.ndarray, "_ d"] | None = None,
    folds: int = 5,
    n_null: int = 10,
    C: float | int = 1.0,
    label: str = "label 1",
    seed: int = 0,
) -> SparseProbe:
    """Return how well the k best latents tell label 1 from label 0, cross-validated over whole groups, beside nulls.

    `latents` holds one row a text (mean_latents), `dense` the pooled activations of the same texts. In each fold the k
    latents with the largest |difference of class means| on the training rows are chosen, and a logistic regression
    (reading.probes, inverse penalty C) is fitted on them. No group (template, document) is on both sides.
    After Gurnee et al. (arXiv:2305.01610) and SAEBench. Raises ValueError for one class only, lengths that differ,
    k outside 1 to m, rows that are not finite, or latents of which none differs between the classes.
    """
    rows, labels = as_rows(latents), as_labels(y)
    below = None if dense is None else as_rows(dense)
    for what, held in (("labels", labels), ("dense rows", below)):
        if held is not None and len(held) != len(rows):
            raise ValueError(f"{len(held)} {what} were given for {len(rows)} rows of latents")
    m = rows.shape[1]
    if not ks or not all(1 <= k <= m for k in ks) or n_null < 1:
        raise ValueError(f"ks {tuple(ks)} must lie between 1 and {m} latents, and n_null {n_null} be at least 1")
    if not bool((_difference(rows, labels) != 0).any()):
        raise ValueError("no latent differs between the classes on these texts: there is nothing to probe")
    number = as_groups(groups, len(rows))
    trial = _Trial(labels, number, grouped_folds(number, folds, seed, labels), float(C), n_null, seed)
    return SparseProbe(
        label=label,
        scores=tuple(_score(trial, rows, below, k) for k in ks),
        dense=None if below is None else _dense_score(trial, below),
        majority=float(max(labels.mean(), 1 - labels.mean())),
        n=len(rows),
        n_groups=int(number.max()) + 1,
        n_folds=folds,
        n_null=n_null,
        seed=seed,
    )


def choose_latents(latents: Float[Tensor, "n m"], y: Labels, k: int, *, signed: bool = False) -> list[int]:
    """Return the k latents with the largest |mean over label 1 - mean over label 0|, largest first.

    `signed`: of the difference itself, so that a latent that falls where the label holds is not chosen.
    """
    difference = _difference(latents, as_labels(y))
    return (difference if signed else difference.abs()).argsort(descending=True, stable=True)[:k].tolist()


@torch.no_grad()
def mean_latents(sae: SAE, acts: Acts, hook: str, *, batch_size: int = 4096) -> Float[Tensor, "texts d_sae"]:
    """Return the mean of each latent over the rows of each document, on the CPU.

    Raises ValueError for a document without rows.
    """
    counts = torch.bincount(acts.documents, minlength=acts.n_documents)
    if bool((counts == 0).any()):
        empty = (counts == 0).nonzero().squeeze(1).tolist()
        raise ValueError(f"documents {empty[:5]} have no rows to pool; leave out empty texts")
    sums = torch.zeros(acts.n_documents, sae.d_sae)
    x = acts[hook]
    for at in range(0, len(x), batch_size):
        part = slice(at, at + batch_size)
        values, active = sae.encode_sparse(x[part].to(sae.W_dec))
        token = torch.div(active.flat, sae.d_sae, rounding_mode="floor").cpu()
        sums.index_put_((acts.documents[part][token], active.cols.cpu()), values.float().cpu(), accumulate=True)
    return sums / counts[:, None]


def sparse_probing(
    model: "Model",
    sae: SAE,
    hook: str,
    data: Any,
    *,
    n: int = 400,
    max_len: int | None = 128,
    ks: Sequence[int] = (1, 2, 5),
    folds: int = 5,
    n_null: int = 10,
    seed: int = 0,
) -> SparseProbing:
    """Return sparse probes on an SAE's latents, mean-pooled over each text, beside dense probes at the same hook point.

    `data`: a name of interp.data.generator.LABELLED (n sentences of it, grouped by template), a Labelled, or a tuple
    (texts, labels, groups) with groups None where each text stands for itself. Two labels are one probe; of more, each
    is told from the rest. Texts are cut at max_len tokens. Raises ValueError as sparse_probe does, or for other data.
    """
    texts, labels, groups = _data(data, n, seed)
    names = list(dict.fromkeys(labels))
    if len(names) < 2:
        raise ValueError(f"two labels or more are needed; all {len(labels)} texts have {names}")
    limit = None if max_len is None else min(max_len, model.n_ctx)
    acts = capture_acts(model, texts, [hook], max_len=limit)
    name = model.hook_point(hook).name
    latents, dense = mean_latents(sae, acts, name), pool(acts, name)
    probes = []
    for label in names[:1] if len(names) == 2 else names:
        title = f"{label} or {names[1]}" if len(names) == 2 else f"{label} or another"
        y = [int(given == label) for given in labels]
        probe = sparse_probe(
            latents, y, groups=groups, ks=ks, dense=dense, folds=folds, n_null=n_null, label=title, seed=seed
        )
        probes.append(probe)
    return SparseProbing(hook=name, probes=tuple(probes))


Pick = Callable[[np.ndarray, np.ndarray, int], Tensor]  # training rows, their labels, number of the draw -> columns


@dataclass(frozen=True)
class _Trial:
    """The labels, groups and folds that all probes of one call share."""

    labels: np.ndarray
    number: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray]]
    C: float
    n_null: int
    seed: int

    def run(self, pick: Pick, *, draws: int = 1, shuffle: bool = False) -> tuple[float, np.ndarray]:
        """Return the mean held-out AUROC of probes on the columns that `pick` chooses, and which rows were right."""
        rng = np.random.default_rng(self.seed)
        areas, right = [], np.zeros(len(self.labels), dtype=bool)
        for draw, (train, test) in product(range(draws), self.folds):
            y = self.labels[train]
            y = permute_labels(y, self.number[train], rng) if shuffle else y
            columns = pick(train, y, draw)
            weight, bias = logistic(columns[train], y, self.C)
            decision = columns[test].double() @ weight + bias
            areas.append(auroc(decision, self.labels[test]))
            right[test] = (decision > 0).numpy() == self.labels[test]
        return float(np.mean(areas)), right

    def figures(self, pick: Pick) -> dict[str, Any]:
        """Return accuracy, its interval, AUROC and the AUROC with shuffled labels."""
        area, right = self.run(pick)
        n_groups = int(self.number.max()) + 1
        table = np.stack([np.bincount(self.number, w, n_groups) for w in (right, np.ones(len(right)))], axis=1)
        interval = bootstrap_interval(table, statistic=lambda t: float(t[:, 0].sum() / t[:, 1].sum()), seed=self.seed)
        shuffled = self.run(pick, draws=self.n_null, shuffle=True)[0]
        return {"accuracy": float(right.mean()), "interval": interval, "auroc": area, "shuffled": shuffled}


def _score(trial: _Trial, rows: Tensor, dense: Tensor | None, k: int) -> ProbeScore:
    def best(train: np.ndarray, y: np.ndarray, draw: int) -> Tensor:
        return rows[:, choose_latents(rows[train], y, k)]

    def drawn(train: np.ndarray, y: np.ndarray, draw: int) -> Tensor:
        seen = rows[train]
        varying = np.flatnonzero((seen.amax(0) > seen.amin(0)).numpy())
        rng = np.random.default_rng([trial.seed, draw])
        return rows[:, rng.choice(varying, min(k, len(varying)), replace=False)]

    @lru_cache(maxsize=1)  # the folds of a draw share it
    def along(draw: int) -> Tensor:
        assert dense is not None
        seed = trial.seed * trial.n_null + draw
        return dense.float() @ placebo_directions(dense.shape[1], rows.shape[1], seed).T

    def directions(train: np.ndarray, y: np.ndarray, draw: int) -> Tensor:
        return along(draw)[:, choose_latents(along(draw)[train], y, k)]

    return ProbeScore(
        k=k,
        **trial.figures(best),
        random_latents=trial.run(drawn, draws=trial.n_null)[0],
        random_directions=None if dense is None else trial.run(directions, draws=trial.n_null)[0],
        latents=tuple(tuple(choose_latents(rows[train], trial.labels[train], k)) for train, _ in trial.folds),
    )


def _dense_score(trial: _Trial, dense: Tensor) -> ProbeScore:
    figures = trial.figures(lambda train, y, draw: dense)
    return ProbeScore(k=None, **figures, random_latents=None, random_directions=None, latents=())


def _definitions() -> list[str]:
    return [f"{name}: {text}" for name, text in DEFINITIONS.items()]


def _difference(rows: Tensor, labels: np.ndarray) -> Float[Tensor, "m"]:
    positive = torch.from_numpy(labels == 1)
    means = [rows[chosen].mean(0, dtype=torch.float64) for chosen in (positive, ~positive)]
    return means[0] - means[1]


def _data(data: Any, n: int, seed: int) -> tuple[list[str], list[Any], list[Any] | None]:
    """Return texts, labels and groups."""
    if isinstance(data, str):
        data = labelled(data, n=n, seed=seed)
    if isinstance(data, Labelled):
        return data.texts, data.labels, data.templates
    if not isinstance(data, tuple) or len(data) != 3:
        names = ", ".join(LABELLED)
        raise ValueError(
            f"data is a name ({names}), a Labelled or (texts, labels, groups); given: {type(data).__name__}"
        )
    texts, labels, groups = list(data[0]), as_list(data[1]), None if data[2] is None else as_list(data[2])
    if len(texts) != len(labels):
        raise ValueError(f"{len(labels)} labels were given for {len(texts)} texts")
    return texts, labels, groups

"""A classifier that reads generated text anew through the unsteered model, fitted on texts checked to be separate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.capture import capture_acts, pool
from interp.acts.direction import Direction, data_fingerprint
from interp.acts.resampling import Labels, as_groups, as_labels, as_list, auroc, auroc_interval, grouped_folds
from interp.concepts.labelled.examples import make_examples
from interp.concepts.labelled.token_choice import token_rows
from interp.concepts.reading.probes import Probe, fit_probe
from interp.model.loading import Model, as_model

__all__ = ["Reader", "fit_reader", "mean_rows", "refuse_overlap"]

FOLDS = 5
AT = ("mean", "last")  # where directions of whole texts are read
C = 0.05  # inverse penalty on standardised rows: a few hundred texts in a few hundred dimensions


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """A logistic classifier on the mean residual of a text, with what it reaches on texts it was not fitted on."""

    model: Model
    hook: str
    probe: Probe
    auroc: float  # held out: pooled over grouped folds
    interval: tuple[float, float]  # 95%, over groups
    n_texts: int
    n_groups: int

    def read(self, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
        """Return the probability that each text shows label 1; a text without a word says neither, and gets 0.5."""
        out = np.full(len(texts), 0.5)
        different = sorted({text for text in texts if text.strip()})
        if different:
            decided = self.probe.decision(mean_rows(self.model, different, self.hook))
            known = dict(zip(different, torch.sigmoid(decided).tolist(), strict=True))
            out = np.array([known.get(text, 0.5) for text in texts])
        return out


def fit_reader(
    model: Any,
    rows: Float[Tensor, "n d"],
    labels: Sequence | np.ndarray,
    *,
    hook: str,
    groups: Sequence | np.ndarray | None = None,
    seed: int = 0,
) -> Reader:
    """Return the classifier of the mean residual rows of labelled texts, scored on folds that keep groups whole.

    Raises ValueError where the held-out AUROC's interval reaches down to 0.5 (such a classifier reads nothing), for
    one class only, and for fewer than two groups a class.
    """
    model, y = as_model(model), as_labels(labels)
    number = as_groups(groups, len(y))
    n_groups = int(number.max()) + 1
    folds = grouped_folds(number, min(FOLDS, n_groups), seed, y)
    scores = np.zeros(len(y))
    for train, test in folds:
        scores[test] = fit_probe(rows[train], y[train], C=C).decision(rows[test]).numpy()
    reached, interval = auroc(scores, y), auroc_interval(scores, y, number, seed=seed)
    if interval[0] <= 0.5:
        raise ValueError(
            f"the classifier cannot read this concept: held-out AUROC {reached:.3f} [{interval[0]:.3f}, "
            f"{interval[1]:.3f}] of {len(y)} texts; give more or clearer labelled texts, or another hook point"
        )
    return Reader(
        model=model, hook=model.hook_point(hook).name, probe=fit_probe(rows, y, C=C), auroc=reached,
        interval=interval, n_texts=len(y), n_groups=n_groups,
    )  # fmt: skip


def mean_rows(model: Any, texts: Sequence[str], hook: str) -> Float[Tensor, "texts d"]:
    """Return the mean residual of each text at a hook point of the model as it is, BOS left out."""
    acts = capture_acts(model, list(texts), [hook])
    return pool(acts, hook, "mean")


def refuse_overlap(
    model: Any, direction: Direction, texts: Sequence[str], labels: Labels, fitting_texts: Sequence[str] | None = None
) -> str:
    """Return in words what was checked, refusing a classifier's texts that the direction was fitted on.

    Compared are the direction's data fingerprint with those of these texts and labels, in this order, at each way to
    read a text at one position (which tells the whole set alone), and, where the fitting texts are given, every text
    (letter case and white space aside). Raises ValueError for an overlap.
    """
    examples = make_examples(list(texts), labels)
    rows = token_rows(model, examples, [direction.hook], positions=AT).X.values()
    marks = {data_fingerprint(X, examples.labels) for X in (*rows, mean_rows(model, texts, direction.hook))}
    if direction.data in marks:
        raise ValueError("these labelled texts are the ones that the direction was fitted on: give others")
    if fitting_texts is None:
        known = "as a whole are not what the direction was fitted on" if direction.data else "could not be compared"
        return f"the labelled texts {known}; whether single ones are among them was not checked: no fitting texts given"
    fitted = {_plain(text) for text in fitting_texts}
    both = [text for text in texts if _plain(text) in fitted]
    if both:
        raise ValueError(
            f"{len(both)} of the {len(texts)} labelled texts are among those that the direction was fitted on, the "
            f"first is {both[0]!r}: leave them out"
        )
    return f"none of the {len(texts)} labelled texts is among the {len(fitting_texts)} that the direction was fitted on"


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def parts_of(labelled: Any) -> tuple[list[str], np.ndarray, list | None]:
    """Return texts, 0/1 labels and groups of labelled examples, or of a pair (texts, labels).

    Raises TypeError for anything else, ValueError for labels other than 0 and 1 or of another number.
    """
    if isinstance(labelled, (tuple, list)):
        given: list[Any] = [*labelled, None]
    else:
        given = [getattr(labelled, name, None) for name in ("texts", "labels", "groups")]
    if len(given) < 3 or given[0] is None or given[1] is None:
        raise TypeError(f"labelled texts have texts and labels, or are such a pair; a {type(labelled).__name__} is not")
    texts, labels, groups = given[:3]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a labelled text is a chat: the classifier reads plain text, so give it plain texts")
    y = as_labels(labels)
    if len(y) != len(texts):
        raise ValueError(f"{len(y)} labels were given for {len(texts)} texts")
    return list(texts), y, as_list(groups) if groups is not None and len(groups) > 0 else None

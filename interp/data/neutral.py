"""Neutral text that comes with the package: documents of the generator in which a concept hardly shows."""

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from interp.data.generator import documents

__all__ = ["neutral_texts"]

CANDIDATES = 8  # documents read for each one kept
SEED = 9_000  # away from the seeds of training and of the unit of strength


def neutral_texts(
    n: int = 12, *, seed: int = 0, evidence: Callable[[list[str]], Sequence[float]] | None = None
) -> list[str]:
    """Return n short documents, the same for the same seed.

    `evidence` (numbers around 0, one a text: log-odds of a concept) chooses, of eight times as many, those in which a
    concept shows the least either way. Raises ValueError for n < 1 or evidence of another number.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    found = list(islice(documents(SEED + seed), n if evidence is None else CANDIDATES * n))
    if evidence is None:
        return found
    size = np.abs(np.asarray(evidence(found), dtype=float))
    if size.shape != (len(found),) or not np.isfinite(size).all():
        raise ValueError(f"evidence must give {len(found)} finite numbers, one a text; it gave shape {size.shape}")
    return [found[i] for i in sorted(np.argsort(size, kind="stable")[:n])]

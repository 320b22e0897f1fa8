"""What a steering direction is held against: random ones, and ones fitted in its way to labels that mean nothing."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from interp.acts.direction import Direction
from interp.acts.resampling import permute_labels, placebo_directions
from interp.concepts.reading.finders import METHODS, mean_difference

__all__ = ["random_directions", "shuffled_directions"]

PAIRED = ("pair_pca", "ccs")  # a shuffled label leaves no pairs


def random_directions(direction: Direction, n: int, seed: int = 0) -> list[Direction]:
    """Return n random directions, uniform on the sphere, of the direction's hook point and unit of strength."""
    vectors = placebo_directions(len(direction.vector), n, seed)
    return [replace(direction, vector=v, method="placebo") for v in vectors]


def shuffled_directions(
    direction: Direction,
    rows: Float[Tensor, "n d"],
    labels: Int[np.ndarray, " n"],
    n: int,
    *,
    groups: Sequence | np.ndarray | None = None,
    seed: int = 0,
) -> list[Direction]:
    """Return n directions fitted to shuffled labels, of the direction's hook point and unit of strength.

    The method is the direction's own where METHODS has it and needs no pairs (others: mean difference). Labels are
    shuffled as `permute_labels` does: within groups that hold both classes, between whole groups otherwise.
    Brought to the direction's norm, they keep whatever surplus of the true labels a shuffle leaves, and lie where the
    data varies: a stricter null than random directions.
    """
    name = direction.method.split("(")[0]
    fit = mean_difference if name in PAIRED else METHODS.get(name, mean_difference)
    rng = np.random.default_rng([seed, 1])
    out = []
    for _ in range(n):
        vector = fit(rows, permute_labels(labels, groups, rng)).double()
        out.append(replace(direction, vector=(vector / vector.norm()).float(), method="shuffled labels"))
    return out

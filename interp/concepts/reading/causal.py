"""The causal inner product (arXiv:2311.03658): cosines in the geometry that the unembedding gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.direction import Direction
from interp.model.loading import as_model

__all__ = ["CausalInnerProduct", "HeldOutPairs", "causal_inner_product"]

Vector = Direction | Tensor | np.ndarray
SPACES = ("residual", "unembedding")


@dataclass(frozen=True, kw_only=True)
class HeldOutPairs:
    """How far each pair of tokens points along the mean of the other pairs, beside random pairs."""

    cosines: tuple[float, ...]  # causal cosine of each pair's difference with the mean of the others
    mean: float
    random_mean: float  # of random pairs of tokens, with the mean of all pairs
    random_high: float  # which 5 % of random pairs exceed
    p_value: float  # (1 + draws of as many random pairs whose mean cosine reaches `mean`) / (1 + draws)
    n_random: int
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalInnerProduct:
    """The inner product under which causally separable concepts are at right angles, if Cov(unembedding) says so.

    Two kinds of vectors have two forms of it. Differences of unembedding rows g: g @ inv(C) @ g'. Directions of the
    residual stream v, which act on logits through g @ v: v @ C @ v'. Both become plain products once whitened, and a
    concept's two vectors v = inv(C) g whiten to the same one. The form of the one is wrong for the other.
    """

    root: Float[Tensor, "d d"]  # C^(1/2), float64
    inverse_root: Float[Tensor, "d d"]
    unembedding: Float[Tensor, "v d"]  # as the model has it
    model: str  # fingerprint; "" where a matrix was given

    def whiten(self, vectors: Float[Tensor, "*n d"] | Float[np.ndarray, "*n d"], *, space: str = "residual") -> Tensor:
        """Return vectors in coordinates where the causal inner product is the plain one (float64).

        `space`: "residual" for directions of the stream, "unembedding" for differences of unembedding rows.
        """
        if space not in SPACES:
            raise ValueError(f"space is {space!r}; it is one of {', '.join(SPACES)}")
        given = torch.as_tensor(vectors).detach().cpu().double()
        if given.shape[-1] != len(self.root):
            raise ValueError(f"vectors have width {given.shape[-1]}, the unembedding {len(self.root)}")
        return given @ (self.root if space == "residual" else self.inverse_root)

    def cosine(self, a: Vector, b: Vector, *, space: str = "residual") -> float:
        """Return the cosine of two directions under the causal inner product. Raises ValueError as whiten does."""
        x, y = (self.whiten(as_vector(v, name), space=space) for v, name in ((a, "a"), (b, "b")))
        return float(x @ y / x.norm() / y.norm())

    def held_out_pairs(self, pairs: Sequence[tuple[int, int]], *, n_random: int = 1000, seed: int = 0) -> HeldOutPairs:
        """Return whether pairs of token ids (from, to) share a direction: each against the mean of the others.

        Differences of unembedding rows are whitened and brought to length 1. Random pairs are of two different tokens,
        drawn anew in sets as large as the one given, each pair against the mean of its own set's others. Raises
        ValueError for fewer than 3 pairs, ids outside the vocabulary, or a pair of one token or of two equal rows.
        """
        if len(pairs) < 3 or n_random < 1:
            raise ValueError(f"{len(pairs)} pairs and {n_random} draws were given; 3 and 1 are the least")
        cosines = self._agreement(torch.tensor([list(p) for p in pairs]))
        rng = np.random.default_rng(seed)
        v = len(self.unembedding)
        first = rng.integers(0, v, (n_random, len(pairs)))
        second = (first + rng.integers(1, v, first.shape)) % v
        drawn = np.stack([self._agreement(torch.from_numpy(np.stack(p, 1))) for p in zip(first, second, strict=True)])
        mean = float(cosines.mean())
        return HeldOutPairs(
            cosines=tuple(cosines.tolist()),
            mean=mean,
            random_mean=float(drawn.mean()),
            random_high=float(np.quantile(drawn, 0.95)),
            p_value=float(1 + (drawn.mean(1) >= mean).sum()) / (1 + n_random),
            n_random=n_random,
            seed=seed,
        )

    def _agreement(self, ids: Tensor) -> Float[np.ndarray, " pairs"]:
        if int(ids.min()) < 0 or int(ids.max()) >= len(self.unembedding):
            raise ValueError(f"a token id is outside the vocabulary of {len(self.unembedding)}")
        rows = self.unembedding.cpu()
        moves = self.whiten(rows[ids[:, 1]].double() - rows[ids[:, 0]].double(), space="unembedding")
        lengths = moves.norm(dim=1, keepdim=True)
        if not bool((lengths > 0).all()):
            raise ValueError(f"pair {ids[int(lengths.argmin())].tolist()} has two equal unembedding rows")
        unit = moves / lengths
        others = unit.sum(0) - unit
        return ((unit * others).sum(1) / others.norm(dim=1)).numpy()


def causal_inner_product(model: Any) -> CausalInnerProduct:
    """Return the causal inner product of a model's unembedding, or of a matrix [v, d] of unembedding rows.

    C is the covariance of the rows over the vocabulary, float64. The rows are taken as they are: for directions of the
    stream before the final norm, whose gain differs by coordinate, give the matrix with the gain multiplied in. Raises
    ValueError where the covariance has no inverse (fewer tokens than coordinates, or coordinates that never vary),
    AnatomyError for a model without a head.
    """
    if isinstance(model, Tensor | np.ndarray):
        matrix, fingerprint = torch.as_tensor(model).detach(), ""
    else:
        known = as_model(model)
        matrix, fingerprint = known.unembed_matrix(), known.fingerprint
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(f"unembedding rows are a float matrix [v, d], {matrix.dtype} {tuple(matrix.shape)} was given")
    values, vectors = torch.linalg.eigh(_covariance(matrix))
    rank = int((values > 1e-10 * float(values[-1])).sum())
    if rank < len(values):
        raise ValueError(
            f"the covariance of {len(matrix)} unembedding rows has rank {rank} of {len(values)}, and no inverse: "
            "the causal inner product is not defined"
        )
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    return CausalInnerProduct(root=root, inverse_root=inverse, unembedding=matrix, model=fingerprint)


def as_vector(given: Vector, name: str) -> Float[np.ndarray, " d"]:
    """Return a direction or vector as float64. Raises ValueError for another shape, nan, infinity or length 0."""
    vector = given.vector if isinstance(given, Direction) else torch.as_tensor(given)
    array = vector.detach().cpu().double().numpy()
    if array.ndim != 1 or not np.isfinite(array).all() or not np.linalg.norm(array) > 0:
        raise ValueError(f"{name} must be one finite vector that is not zero, shape {array.shape} was given")
    return array


def _covariance(matrix: Tensor) -> Float[Tensor, "d d"]:
    """In float64, in blocks: a vocabulary of 150,000 times 4,096 would take 5 GB at once."""
    v, d = matrix.shape
    mean = torch.stack([part.cpu().double().sum(0) for part in matrix.split(8192)]).sum(0) / v
    total = torch.zeros(d, d, dtype=torch.float64)
    for part in matrix.split(8192):
        centred = part.cpu().double() - mean
        total += centred.T @ centred
    if not bool(torch.isfinite(total).all()):
        raise ValueError("a value of the unembedding is nan or infinite")
    return total / v

"""Planted dictionaries: activations whose true features are known, and scores against that truth."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["Planted", "mcc", "mmcs", "planted"]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A world of sparse features: x = codes @ features + offset + noise, all in the data's units."""

    features: Float[Tensor, "n_features d_in"]
    """Unit directions."""
    rates: Float[Tensor, " n_features"]
    """Probability that a feature is active on a token."""
    offset: Float[Tensor, " d_in"]
    """Mean of what is not features."""
    unit: float
    """Length of an active feature is unit * (1 + |N(0, spread)|)."""
    spread: float
    noise: float
    """Standard deviation of the noise in each dimension."""

    def sample(self, n: int, *, seed: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_features"]]:
        """Return n tokens and their true codes, drawn from seed alone."""
        generator = torch.Generator().manual_seed(seed)
        active = torch.rand(n, len(self.rates), generator=generator) < self.rates
        lengths = 1 + self.spread * torch.randn(active.shape, generator=generator).abs()
        codes = active * lengths * self.unit
        noise = self.noise * torch.randn(n, self.features.shape[1], generator=generator)
        return codes @ self.features + self.offset + noise, codes

    def batches(self, batch_size: int, *, seed: int) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Yield fresh batches without end."""
        step = 0
        while True:
            # one seed a batch, spread so that two runs with neighbouring seeds share none
            yield self.sample(batch_size, seed=seed * 1_000_003 + step)[0]
            step += 1


def planted(
    *,
    d_in: int,
    n_features: int,
    active: int | float = 8.0,
    exponent: int | float = 0.5,
    spread: int | float = 0.5,
    offset: int | float = 0.3,
    noise: int | float = 0.02,
    seed: int,
) -> Planted:
    """Return a world of n_features random unit directions, `active` of them on a token on average.

    Feature i fires independently with a probability ~ i ** -exponent (so the count is near Poisson), coefficient
    1 + |N(0, spread)|, plus a fixed offset * N(0, 1) and noise * N(0, 1) in each dimension; then everything is scaled
    so that the mean squared norm is d_in. Give SAEs another seed than this one: equal draws would look like recovery.
    """
    # a stream of its own: the same integer may well be somebody's model seed
    generator = torch.Generator().manual_seed(seed * 7_919 + 104_729)
    features = F.normalize(torch.randn(n_features, d_in, generator=generator), dim=1)
    shares = torch.arange(1, n_features + 1).double() ** -exponent
    rates = (active * shares / shares.sum()).clamp_max(0.5).float()
    constant = offset * torch.randn(d_in, generator=generator)
    raw = Planted(features=features, rates=rates, offset=constant, unit=1.0, spread=spread, noise=noise)
    sample, _ = raw.sample(16_384, seed=seed + 1)
    unit = (d_in / float(sample.square().sum(1).mean())) ** 0.5
    return Planted(
        features=features, rates=rates, offset=constant * unit, unit=unit, spread=spread, noise=noise * unit
    )  # fmt: skip


def mmcs(directions: Float[Tensor, "n d_in"], features: Float[Tensor, "n_features d_in"]) -> float:
    """Return the mean over true features of the largest |cosine| with any learned direction."""
    return float(_cosines(directions, features).amax(0).mean())


def mcc(directions: Float[Tensor, "n d_in"], features: Float[Tensor, "n_features d_in"]) -> float:
    """Return the mean |cosine| of the best one-to-one matching of learned directions to true features (Hungarian).

    Where there are fewer directions than features, the features left over count 0.
    """
    from scipy.optimize import linear_sum_assignment

    cosines = _cosines(directions, features).numpy()
    rows, cols = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, cols].sum() / len(features))


def _cosines(directions: Tensor, features: Tensor) -> Tensor:
    left, right = (F.normalize(t.detach().double().cpu(), dim=1) for t in (directions, features))
    return (left @ right.t()).abs()

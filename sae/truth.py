"""Score an SAE against the planted features it should have found, beside an untrained one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.archs import build
from sae.archs.base import SAE
from sae.evaluation import DEFINITIONS, PART, Evaluation, Tally
from sae.kernels import Active
from sae.stats import Moments
from sae.synthetic import Planted, cosines, matched

__all__ = ["TRUTH_DEFINITIONS", "FiringCounts", "FiringTally", "TruthScores", "score_against_truth"]

_MEASURED = ("tokens", "fve", "l0", "dead", "relative_bias")

TRUTH_DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "mmcs": "mean over features of the largest |cos| with the direction of any latent (row of W_dec)",
        "mcc": "mean over features of |cos| in the best one-to-one matching to latents; 0 for features left over",
        "uniqueness": "different best matches / latents; the best match of a latent is the feature of largest |cos|",
        "precision": "mean over latents that fire: share of their tokens on which their best match fires too",
        "recall": "mean over latents whose best match fires: share of its tokens on which the latent fires too",
        "f1": "mean over latents: 2 x tokens of both / (tokens of the latent + of its best match), if either fires",
        **{name: DEFINITIONS[name] for name in _MEASURED},
    }
)


@dataclass(frozen=True, kw_only=True)
class FiringCounts:
    """How often latents and their best matches fire; int64 on the CPU. A share of nothing is nan."""

    latent: Int[Tensor, " d_sae"]
    """Tokens on which a latent fires."""
    feature: Int[Tensor, " d_sae"]
    """Tokens on which its best match fires."""
    both: Int[Tensor, " d_sae"]
    """Tokens on which both do."""

    @property
    def precision(self) -> Float[Tensor, " d_sae"]:
        """Share of a latent's tokens on which its best match fires; nan for a latent that never fires."""
        return self.both.double() / self.latent

    @property
    def recall(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens of its best match on which a latent fires; nan where that feature never does."""
        return self.both.double() / self.feature

    @property
    def f1(self) -> Float[Tensor, " d_sae"]:
        """Harmonic mean of the two, 0 where a latent and its match never meet; nan where neither ever fires."""
        return 2 * self.both.double() / (self.latent + self.feature)


class FiringTally:
    """Counts of firing, gathered batch by batch from the places of active latents and of true codes alone."""

    def __init__(self, match: Int[Tensor, " d_sae"], n_features: int) -> None:
        self.match = match
        self.latent, self.both = torch.zeros_like(match), torch.zeros_like(match)
        self.feature = match.new_zeros(n_features)

    def add(self, values: Float[Tensor, " n"], active: Active, codes: Active) -> "FiringTally":
        """Take in a batch: the active latents, of which those at value 0 do not count, and its true codes.

        Returns self; nothing on the device is waited for. Raises ValueError for patterns of other shapes.
        """
        wanted = (active.shape[0], len(self.feature))
        if active.shape[1] != len(self.match) or codes.shape != wanted:
            raise ValueError(
                f"latents {active.shape} and codes {codes.shape} must be of the same tokens, "
                f"with {len(self.match)} latents and {len(self.feature)} features"
            )
        fires = (values != 0).long()
        wanted_places = active.rows * len(self.feature) + self.match[active.cols]
        nearest = torch.searchsorted(codes.flat, wanted_places).clamp_max(max(0, len(codes.flat) - 1))
        meets = fires * (codes.flat[nearest] == wanted_places) if len(codes.flat) else torch.zeros_like(fires)
        self.latent.index_add_(0, active.cols, fires)
        self.both.index_add_(0, active.cols, meets)
        self.feature.index_add_(0, codes.cols, torch.ones_like(codes.cols))
        return self

    def merge(self, other: "FiringTally") -> "FiringTally":
        """Take in what another tally has seen; returns self. Raises ValueError for one of other matches."""
        if len(other.feature) != len(self.feature) or not torch.equal(self.match, other.match.to(self.match.device)):
            raise ValueError("the other tally counts other matches of latents to features")
        for own, theirs in ((self.latent, other.latent), (self.both, other.both), (self.feature, other.feature)):
            own += theirs.to(own.device)
        return self

    def value(self) -> FiringCounts:
        """Return the counts of every latent."""
        return FiringCounts(latent=self.latent.cpu(), feature=self.feature[self.match].cpu(), both=self.both.cpu())


@dataclass(frozen=True, kw_only=True)
class TruthScores:
    """How well an SAE found planted features. Each number is defined in TRUTH_DEFINITIONS, and printed beside it.

    Precision, recall and f1 are None where no latent has one.
    """

    mmcs: float
    mcc: float
    uniqueness: float
    precision: float | None
    recall: float | None
    f1: float | None
    evaluation: Evaluation
    """Every metric of `evaluate` on the same tokens."""
    match: Int[Tensor, " d_sae"]
    """Best match of each latent: the feature of largest |cos|."""
    cosine: Float[Tensor, " d_sae"]
    """|cos| with the best match."""
    counts: FiringCounts
    """Precision, recall and f1 of each latent follow from these."""
    null: "TruthScores | None"
    """The same of an untrained SAE of the same shape: random directions, its encoder their transpose, b_dec the mean of
    the data, one threshold for the same L0. It has no null itself."""

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers by name, JSON-able; those of the untrained SAE as a table under "null"."""
        table = {
            name: self.evaluation[name] if name in _MEASURED else getattr(self, name) for name in TRUTH_DEFINITIONS
        }
        return table if self.null is None else table | {"null": self.null.as_dict()}

    def __str__(self) -> str:
        table = self.as_dict()
        null = table.pop("null", {})
        rows = (
            f"{name:13} {_cell(value):>10} {_cell(null.get(name)):>10}  {TRUTH_DEFINITIONS[name]}"
            for name, value in table.items()
        )
        return "\n".join([f"{'':13} {'':>10} {'untrained':>10}", *rows])


@torch.no_grad()
def score_against_truth(sae: SAE, world: Planted, *, tokens: int = 65_536, seed: int) -> TruthScores:
    """Return how well an SAE found the features of a planted world, on fresh tokens of it, beside an untrained SAE.

    The tokens are drawn from a seed of their own: no training batch of the world with any seed from 0 on has it.
    Latents are matched to features by their directions, before any token is seen. Cosines are a table d_sae x
    n_features in float64 (4,096 x 16,384: 0.5 GiB), and the matching takes seconds at that size. Raises ValueError for
    a transcoder, another width than the world's, fewer than 2 tokens, or a seed below 0.
    """
    width = world.features.shape[1]
    if sae.config.transcoder or sae.d_in != width:
        raise ValueError(f"the world has width {width}; it needs an autoencoder of that d_in (this one: {sae.d_in})")
    if tokens < 2 or seed < 0:
        raise ValueError(f"tokens is {tokens} and seed {seed}; they must be at least 2 and 0")
    scores = _scores(sae, world, tokens, seed)
    return replace(scores, null=_scores(_untrained(sae, world, scores.evaluation.l0, seed), world, tokens, seed))


def _scores(sae: SAE, world: Planted, tokens: int, seed: int) -> TruthScores:
    table = cosines(sae.W_dec, world.features)
    cosine, match = table.max(1)
    tally = Tally(sae.d_sae, n_sites=sae.config.n_sites)
    firing = FiringTally(match.to(sae.enc.device), len(world.features))
    for i, begin in enumerate(range(0, tokens, PART)):
        acts, _, codes = world.sample_sparse(min(PART, tokens - begin), seed=_own_seed(seed, i))
        x = acts.to(sae.enc)
        values, active = sae.encode_sparse(x)
        before = firing.latent.clone()
        firing.add(values, active, _moved(codes, x.device))
        tally.add(acts.to(x.device), sae.reconstruct_sparse(values, active, x), firing.latent - before)
    counts = firing.value()
    return TruthScores(
        mmcs=float(table.amax(0).mean()),
        mcc=matched(table),
        uniqueness=len(match.unique()) / sae.d_sae,
        precision=_mean(counts.precision),
        recall=_mean(counts.recall),
        f1=_mean(counts.f1),
        evaluation=tally.value(),
        match=match,
        cosine=cosine,
        counts=counts,
        null=None,
    )


def _untrained(sae: SAE, world: Planted, l0: float, seed: int) -> SAE:
    """Return an SAE of random directions that is otherwise what it can be without training."""
    batches = [world.sample_sparse(PART, seed=_own_seed(seed, -1 - i))[0].to(sae.enc) for i in range(4)]
    moments = Moments()
    for batch in batches:
        moments.add(batch)
    # an SAE that never fires has no L0 to share: the true one stands in
    k = l0 if l0 > 0 else min(float(world.rates.sum()), sae.d_sae)
    null = build("batchtopk", d_in=sae.d_in, d_sae=sae.d_sae, k=k, seed=0x5EED0BAD + seed).to(sae.enc)
    null.dec_bias.copy_(moments.value().mean)
    null.calibrate(batches)
    return null


def _own_seed(seed: int, part: int) -> int:
    return -(seed * 1_000_003 + part + 1_000)  # below 0, where no training batch has its seed


def _moved(codes: Active, device: torch.device) -> Active:
    return Active(codes.flat.to(device), codes.cols.to(device), codes.row_start.to(device), codes.shape)


def _mean(values: Tensor) -> float | None:
    there = values[~values.isnan()]
    return float(there.mean()) if len(there) else None


def _cell(value: int | float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"

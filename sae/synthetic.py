"""Planted dictionaries: activations whose true features are known, and how well directions recover them."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import Active, above, active_from, decode_active

__all__ = ["PRESETS", "Batches", "Planted", "best_matches", "cosines", "matched", "mcc", "mmcs", "planted"]

DENSE = 2**27  # entries of a table tokens x features: 512 MiB. Above it, nothing of that shape is made
PIECE = 2**22  # entries that are drawn at a time

COEFFICIENTS = ("half_normal", "normal", "lognormal")
DIRECTIONS = ("random", "orthogonal")

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # After SynthSAEBench-16k: its width, number of features, Zipf exponent, L0, hierarchy and rank of correlations.
        # There a nominal rate runs from .4 to 5e-4 and is cut down by the parents; here rates are what features do.
        "bench_16k": MappingProxyType(
            {"d_in": 768, "n_features": 16_384, "active": 34, "exponent": 0.5, "hierarchy": (128, 4, 3),
             "correlation": 0.25, "rank": 25}
        ),
    }
)  # fmt: skip
"""Arguments of `planted` by name: planted(**PRESETS["bench_16k"], seed=0)."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A world of sparse features: x = codes @ features + offset + noise, all in the data's units."""

    features: Float[Tensor, "n_features d_in"]
    """Unit directions."""
    rates: Float[Tensor, " n_features"]
    """Probability that a feature is active on a token, whatever its parent does: correlations leave it as it is."""
    offset: Float[Tensor, " d_in"]
    """Mean of what is not features."""
    unit: float
    """Length of an active feature is unit times its coefficient."""
    spread: float
    """Width of the coefficients around 1."""
    noise: float
    """Standard deviation of the noise in each dimension."""
    coefficients: str = "half_normal"
    """half_normal: 1 + |N(0, spread)|; normal: |1 + N(0, spread)|; lognormal: exp(N(0, spread))."""
    parents: Int[Tensor, " n_features"] | None = None
    """The feature without which each one never fires, -1 for none; None: there is no hierarchy."""
    loadings: Float[Tensor, "n_features rank"] | None = None
    """What shared factors do to each feature's hidden normal variable (see `planted`); None: no correlations."""

    def __post_init__(self) -> None:
        if self.coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients are {self.coefficients!r}; they must be one of: {', '.join(COEFFICIENTS)}")
        if self.parents is not None and bool(
            (self.rates > self.rates[self.parents] * (1 + 1e-6))[self.parents >= 0].any()
        ):
            raise ValueError("a feature's rate exceeds that of its parent, without which it never fires")
        if self.loadings is not None and not float(self.loadings.square().sum(1).max()) < 1:
            raise ValueError("the squared loadings of a feature must sum to less than 1, the variance that they share")

    def sample(self, n: int, *, seed: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_features"]]:
        """Return n tokens and their true codes, drawn from seed alone.

        Raises ValueError where the codes would take more than 512 MiB; `sample_sparse` has no such bound.
        """
        if n * len(self.rates) > DENSE:
            raise ValueError(
                f"the codes of {n:,} tokens and {len(self.rates):,} features would take "
                f"{n * len(self.rates) / 2**28:.1f} GiB; draw fewer tokens, or use sample_sparse"
            )
        acts, values, active = self.sample_sparse(n, seed=seed)
        return acts, _dense(values, active)

    def sample_sparse(self, n: int, *, seed: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " entries"], Active]:
        """Return n tokens, and their true codes as values and places: the tokens that `sample` gives.

        On another device than the CPU the draws are others. Raises ValueError for n below 1.
        """
        if n < 1:
            raise ValueError(f"n is {n}; it must be at least 1 token")
        generator = torch.Generator(self.features.device).manual_seed(seed)
        plain = self.parents is None and self.loadings is None
        flat, normals = (_independent if plain else self._structure.draw)(n, self.rates, generator)
        active = active_from(flat, (n, len(self.rates)))
        values = self._lengths(normals) * self.unit
        if plain and n * len(self.rates) <= DENSE:  # as a dense product, so that old draws keep every bit
            written = _dense(values, active) @ self.features
        else:
            written = decode_active(values, active, self.features)
        noise = self.noise * _randn((n, self.features.shape[1]), generator)
        return written + self.offset + noise, values, active

    def batches(self, batch_size: int, *, seed: int) -> "Batches":
        """Return fresh batches [batch, d_in] without end: an iterator whose position can be kept and restored."""
        return Batches(self, batch_size, seed)

    def to(self, device: str | torch.device) -> "Planted":
        """Return the same world on a device, where it draws its tokens too."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: value.to(device) for name, value in moved.items()})

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ between two worlds."""
        digest = hashlib.sha256()
        for field in fields(self):
            value = getattr(self, field.name)
            digest.update(value.cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def _structure(self) -> "_Structure":
        return _Structure(self.rates, self.parents, self.loadings)

    def _lengths(self, normals: Tensor) -> Tensor:
        if self.coefficients == "lognormal":
            return (self.spread * normals).exp()
        return (
            1 + self.spread * normals.abs() if self.coefficients == "half_normal" else (1 + self.spread * normals).abs()
        )


class Batches(Iterator[Tensor]):
    """Batches of a planted world, each from a seed of its own, so that any of them can be drawn again."""

    def __init__(self, world: Planted, batch_size: int, seed: int) -> None:
        self.world, self.batch_size, self.seed = world, batch_size, seed
        self._position = 0

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        # one seed a batch, spread so that two runs with neighbouring seeds share none
        acts = self.world.sample_sparse(self.batch_size, seed=self.seed * 1_000_003 + self._position)[0]
        self._position += 1
        return acts

    def state(self) -> dict[str, int | str]:
        """Return what `restore` needs to go on behind the last batch handed out; JSON-able."""
        return {"batches": self._position, "batch_size": self.batch_size, "seed": self.seed,
                "world": self.world.fingerprint}  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a state, in no time. Raises ValueError for a state of other batches."""
        for name, own in self.state().items():
            if name not in state:
                raise ValueError(f"the state has no {name!r}; it holds: {', '.join(map(repr, state)) or 'nothing'}")
            if name != "batches" and state[name] != own:
                raise ValueError(
                    f"the state has {name} {state[name]}, these batches {own}: it belongs to other batches"
                )
        if type(state["batches"]) is not int or state["batches"] < 0:
            raise ValueError(f"the state has batches {state['batches']!r}; it must be a count")
        self._position = state["batches"]


def planted(
    *,
    d_in: int,
    n_features: int,
    active: int | float = 8.0,
    exponent: int | float = 0.5,
    spread: int | float = 0.5,
    offset: int | float = 0.3,
    noise: int | float = 0.02,
    coefficients: str = "half_normal",
    directions: str = "random",
    hierarchy: tuple[int, int, int] | None = None,
    correlation: int | float = 0.0,
    rank: int = 25,
    seed: int,
) -> Planted:
    """Return a world of n_features random unit directions, `active` of them on a token on average.

    Feature i fires with a probability ~ i ** -exponent, at most .5, and independently (so the count is near Poisson),
    coefficient 1 + |N(0, spread)| (others: see Planted), plus a fixed offset * N(0, 1) and noise * N(0, 1) in each
    dimension; then everything is scaled so that the mean squared norm is d_in. Give SAEs another seed than this one:
    equal draws would look like recovery.

    directions="orthogonal" draws one random orthonormal basis after the other: exactly orthogonal features while they
    fit into d_in, and beyond that orthogonal to all but the other bases.

    hierarchy=(roots, branching, depth): `roots` trees, `depth` levels below each root, `branching` children a feature;
    they take random ranks of the frequencies, parents before children, and what is left stands alone. A child fires
    only when its parent does, with probability rate / rate of the parent: the rates stay those of the Zipf law.

    correlation in [0, 1): features fire where a hidden normal variable exceeds a bound that gives them their rate
    (a Gaussian copula); this share of its variance comes from `rank` shared factors, through random loadings, so that
    two hidden variables correlate by correlation * cos(their loadings), both signs. Every level of a hierarchy has
    factors of its own: so given the parent the rate of a child is exact too. Raises ValueError for impossible sizes.
    """
    _check(n_features, hierarchy, correlation, rank, directions)
    # a stream of its own: the same integer may well be somebody's model seed
    generator = torch.Generator().manual_seed(seed * 7_919 + 104_729)
    if directions == "random":
        features = F.normalize(torch.randn(n_features, d_in, generator=generator), dim=1)
    else:
        bases = (torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q for _ in range(-(-n_features // d_in)))
        features = F.normalize(torch.cat(list(bases))[:n_features], dim=1)
    shares = torch.arange(1, n_features + 1).double() ** -exponent
    rates = (active * shares / shares.sum()).clamp_max(0.5).float()
    constant = offset * torch.randn(d_in, generator=generator)
    parents = None if hierarchy is None else _forest(n_features, *hierarchy, generator)
    loadings = None
    if correlation:
        loadings = correlation**0.5 * F.normalize(torch.randn(n_features, rank, generator=generator), dim=1)
    raw = Planted(
        features=features, rates=rates, offset=constant, unit=1.0, spread=float(spread), noise=float(noise),
        coefficients=coefficients, parents=parents, loadings=loadings,
    )  # fmt: skip
    sample = raw.sample_sparse(16_384, seed=seed + 1)[0]
    unit = (d_in / float(sample.square().sum(1).mean())) ** 0.5
    return replace(raw, offset=constant * unit, unit=unit, noise=noise * unit)


def mmcs(directions: Float[Tensor, "n d_in"], features: Float[Tensor, "n_features d_in"]) -> float:
    """Return the mean over true features of the largest |cosine| with any learned direction."""
    return float(best_matches(features, directions)[0].mean())


def mcc(directions: Float[Tensor, "n d_in"], features: Float[Tensor, "n_features d_in"]) -> float:
    """Return the mean |cosine| of the best one-to-one matching of learned directions to true features (Hungarian).

    Where there are fewer directions than features, the features left over count 0.
    """
    return matched(cosines(directions, features))


def cosines(
    directions: Float[Tensor, "n d_in"], features: Float[Tensor, "n_features d_in"]
) -> Float[Tensor, "n n_features"]:
    """Return |cosine| of every direction with every feature (float64, CPU)."""
    return (_unit_rows(directions) @ _unit_rows(features).t()).abs()


def matched(table: Float[Tensor, "n n_features"]) -> float:
    """Return the mean over the features of their |cosine| in the best one-to-one matching, 0 for those left over."""
    from scipy.optimize import linear_sum_assignment

    found = table.numpy()
    rows, cols = linear_sum_assignment(found, maximize=True)
    return float(found[rows, cols].sum() / found.shape[1])


def best_matches(
    directions: Float[Tensor, "n d_in"], features: Float[Tensor, "n_features d_in"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the largest |cosine| of each direction with any feature, and which feature that is (float64, CPU)."""
    left, right = _unit_rows(directions), _unit_rows(features)
    rows = max(1, PIECE // len(right))
    parts = [(part @ right.t()).abs().max(1) for part in left.split(rows)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _unit_rows(directions: Tensor) -> Tensor:
    return F.normalize(directions.detach().double().cpu(), dim=1)


def _check(
    n_features: int, hierarchy: tuple[int, int, int] | None, correlation: int | float, rank: int, directions: str
) -> None:
    if directions not in DIRECTIONS:
        raise ValueError(f"directions are {directions!r}; they must be one of: {', '.join(DIRECTIONS)}")
    if not 0 <= correlation < 1 or rank < 1:
        raise ValueError(f"correlation {correlation} must be at least 0 and below 1, and rank {rank} at least 1")
    if hierarchy is None:
        return
    roots, branching, depth = hierarchy
    if min(hierarchy) < 1:
        raise ValueError(f"hierarchy is {hierarchy}; roots, branching and depth must each be at least 1")
    needed = roots * sum(branching**level for level in range(depth + 1))
    if needed > n_features:
        raise ValueError(f"a hierarchy {hierarchy} has {needed:,} features; the world has {n_features:,}")


def _forest(n_features: int, roots: int, branching: int, depth: int, generator: torch.Generator) -> Tensor:
    """Return the parent of each feature: level by level over random ranks, the frequent ones first."""
    sizes = [roots * branching**level for level in range(depth + 1)]
    ranks = torch.randperm(n_features, generator=generator)[: sum(sizes)].sort().values
    parents = torch.full((n_features,), -1)
    for above_, below in zip((levels := ranks.split(sizes)), levels[1:], strict=False):
        parents[below] = above_.repeat_interleave(branching)
    return parents


def _dense(values: Tensor, active: Active) -> Tensor:
    codes = values.new_zeros(active.shape)
    codes.view(-1)[active.flat] = values
    return codes


def _rand(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=dtype)


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _independent(n: int, rates: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return where features fire that do not know of each other, and a normal draw for each place."""
    # In pieces of rows, yet number for number what one draw of the whole table would give: torch fills in blocks of
    # 16, so all pieces but the last are of 16 rows or a multiple, and the last one is not shorter
    rows = max(16, PIECE // len(rates) // 16 * 16)
    starts = list(range(0, max(1, n - 15), rows))
    sizes = [end - begin for begin, end in zip(starts, [*starts[1:], n], strict=True)]
    shapes = [(size, len(rates)) for size in sizes]
    places = [above(_rand(shape, generator).neg_(), -rates) for shape in shapes]  # -u > -rate: u below the rate
    normals = [_randn(shape, generator).view(-1)[at] for shape, at in zip(shapes, places, strict=True)]
    flat = [at + begin * len(rates) for at, begin in zip(places, starts, strict=True)]
    return torch.cat(flat), torch.cat(normals)


class _Structure:
    """How features with parents or correlations are drawn: the topmost ones first, then level by level."""

    def __init__(self, rates: Tensor, parents: Tensor | None, loadings: Tensor | None) -> None:
        self.parents = torch.full_like(rates, -1, dtype=torch.long) if parents is None else parents
        self.loadings = loadings
        self.top = (self.parents < 0).nonzero().squeeze(1)
        # children sorted by parent, and where those of each parent begin
        self.children = self.parents.argsort(stable=True)[len(self.top) :]
        self.n_children = torch.bincount(self.parents[self.children], minlength=len(rates))
        self.first_child = self.n_children.cumsum(0) - self.n_children
        given = torch.where(self.parents < 0, rates, rates / rates[self.parents])
        self.share = given.double().clamp_max(1)  # probability, given the parent
        if loadings is not None:
            own = (1 - loadings.double().square().sum(1)).sqrt()
            self.slope = (loadings / own[:, None]).float()
            self.bound = (torch.special.ndtri(self.share) / own).float()

    def draw(self, n: int, rates: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the flattened places, ascending, at which features fire on n tokens, and a normal draw for each."""
        found, width = [], len(rates)
        # where factors are shared, every topmost feature has a probability on every token: a table, drawn in pieces
        step = n if self.loadings is None else max(1, PIECE // len(self.top))
        for begin in range(0, n, step):
            rows, cols = self._topmost(min(step, n - begin), generator)
            while len(rows):
                found.append((rows + begin) * width + cols)
                rows, cols = self._below(rows, cols, min(step, n - begin), generator)
        flat = torch.cat(found).sort().values if found else self.top[:0]
        return flat, _randn((len(flat),), generator)

    def _topmost(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        top = self.top
        if self.loadings is None:
            # a Poisson process of rate -log(1 - p) a token leaves a token without event with probability 1 - p
            edges = -torch.log1p(-self.share[top]).cumsum(0)
            count = int(torch.poisson(edges[-1:] * n, generator=generator))
            events = edges[-1] * _rand((count,), generator, torch.float64)
            cols = torch.searchsorted(edges, events).clamp_max(len(top) - 1)
            rows = torch.randint(n, (count,), generator=generator, device=generator.device)
            flat = (rows * len(top) + cols).unique()
        else:
            factors = _randn((n, self.loadings.shape[1]), generator)
            chance = torch.special.ndtr(torch.addmm(self.bound[top], factors, self.slope[top].t()))
            flat = above(chance - _rand((n, len(top)), generator), torch.zeros_like(self.bound[top]))
        rows = torch.div(flat, len(top), rounding_mode="floor")
        return rows, top[flat - rows * len(top)]

    def _below(self, rows: Tensor, cols: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return where children of the features that fire do so themselves."""
        counts = self.n_children[cols]
        place = torch.arange(int(counts.sum()), device=rows.device)
        place = place - (counts.cumsum(0) - counts - self.first_child[cols]).repeat_interleave(counts)
        rows, cols = rows.repeat_interleave(counts), self.children[place]
        chance = self.share[cols].float()
        if self.loadings is not None:
            factors = _randn((n, self.loadings.shape[1]), generator)  # this level's own
            chance = torch.special.ndtr(self.bound[cols] + (factors[rows] * self.slope[cols]).sum(1))
        fires = _rand((len(rows),), generator) < chance
        return rows[fires], cols[fires]

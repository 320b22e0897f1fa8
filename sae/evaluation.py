"""Measure an SAE on activations: one table of metrics, each with its definition."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.archs.base import SAE
from sae.data import load_array
from sae.formats import load_sae
from sae.io import FormatError, load_tensors, read_json, save_tensors, write_json
from sae.stats import Moments

__all__ = ["DEFINITIONS", "Evaluation", "Tally", "evaluate", "evaluate_saved"]

PART = 2048  # tokens encoded at a time: bounds the table of pre-activations
EDGES = torch.arange(-10, 0.125, 0.25, dtype=torch.float64)  # of the histogram, log10 of a density

DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "tokens": "tokens measured",
        "l0": "mean number of latents other than 0 a token",
        "fve": "1 - sum |x - x_hat|^2 / sum |x - mean x|^2 over all tokens, one mean for all (0: that mean, always)",
        "sites": "fve of each site of a crosscoder by itself",
        "nmse": "sum |x - x_hat|^2 / sum |x|^2 over all tokens",
        "cosine": "mean over tokens of cos(x, x_hat), 0 where either is 0",
        "relative_bias": "sum |x_hat|^2 / sum x . x_hat over all tokens (below 1: x_hat is too short)",
        "l2_ratio": "mean over tokens other than 0 of |x_hat| / |x|",
        "dead": "share of latents that fired on none of these tokens",
        "dense": "share of latents that fired on more than 10 % of these tokens",
    }
)
"""x is what should come out: the activations, or for a transcoder its target."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured. Each number is defined in DEFINITIONS, and printed beside it.

    None stands where a number does not exist: the relative bias of a reconstruction that nowhere points along x
    (Rajamanoharan et al., arXiv:2404.16014, equation 10), the FVE of a site whose tokens are all equal.
    """

    tokens: int
    l0: float
    fve: float
    sites: tuple[float | None, ...]
    """Empty where there is one site."""
    nmse: float
    cosine: float
    relative_bias: float | None
    l2_ratio: float
    dead: float
    dense: float
    density: Float[Tensor, " d_sae"]
    """Share of tokens on which each latent fires (float64, CPU)."""

    def __getitem__(self, name: str) -> Any:
        """Return a metric by its name. Raises KeyError for another name."""
        if name != "density" and name not in DEFINITIONS:
            raise KeyError(f"there is no metric {name!r}; there are: {', '.join(DEFINITIONS)}, density")
        return getattr(self, name)

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics by name, JSON-able, without the density of each latent; sites only where several are."""
        table = {name: getattr(self, name) for name in DEFINITIONS if name != "sites"}
        return table | {"sites": list(self.sites)} if self.sites else table

    def histogram(self) -> tuple[Float[Tensor, " edges"], Int[Tensor, " bins"]]:
        """Return the edges of bins of log10 density, four a decade from -10 to 0, and how many latents are in each.

        A bin holds its lower edge, the last one both. Latents that never fired are in none.
        """
        fired = self.density[self.density > 0]
        # densities such as 1/10 lie on edges: what rounding leaves below one still counts as on it
        at = ((fired.log10() - EDGES[0]) * 4 + 1e-9).floor().long().clamp(0, len(EDGES) - 2)
        return EDGES.clone(), torch.bincount(at, minlength=len(EDGES) - 1)

    def __str__(self) -> str:
        shown = [name for name in DEFINITIONS if name != "sites" or self.sites]
        return "\n".join(f"{name:13} {_cell(self[name]):>12}  {DEFINITIONS[name]}" for name in shown)

    def save(self, folder: str | Path) -> None:
        """Write evaluation.json (the metrics) and density.safetensors into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "density.safetensors", {"density": self.density}, {"tokens": self.tokens})
        write_json(folder / "evaluation.json", self.as_dict())

    @classmethod
    def load(cls, folder: str | Path) -> "Evaluation":
        """Return what `save` wrote, bit for bit.

        Raises MissingError where a file is absent, FormatError where one is something else or they do not belong
        together.
        """
        folder = Path(folder)
        table, (tensors, meta) = read_json(folder / "evaluation.json"), load_tensors(folder / "density.safetensors")
        values = _checked(table, folder / "evaluation.json")
        density = tensors.get("density")
        if density is None or density.dtype != torch.float64 or density.ndim != 1:
            raise FormatError(f"{folder / 'density.safetensors'} does not hold the density of each latent")
        if meta.get("tokens") != values["tokens"] or not math.isclose(float(density.sum()), values["l0"], rel_tol=1e-9):
            raise FormatError(f"{folder}: evaluation.json and density.safetensors are of two evaluations")
        return cls(**values, density=density)


class Tally:
    """Sums over tokens, from which the metrics follow; float64 and whole numbers, so that cuts do not matter.

    They stay on the device of the first batch, and nothing is waited for until `value`.
    """

    def __init__(self, d_sae: int, *, n_sites: int = 1) -> None:
        self.tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.long)
        self.error = torch.zeros(n_sites, dtype=torch.float64)
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64)
        self.moments = [Moments() for _ in range(n_sites)]

    def add(
        self,
        x: Float[Tensor, "tok d_out"],
        recon: Float[Tensor, "tok d_out"],
        fired: Int[Tensor, " d_sae"],
    ) -> "Tally":
        """Take in a batch, fired being the number of its tokens on which each latent is active; returns self.

        Raises ValueError for a width that the sites do not share out.
        """
        n_sites = len(self.moments)
        if x.shape[1] % n_sites:
            raise ValueError(f"the width {x.shape[1]} is not a multiple of the {n_sites} sites")
        x, recon = x.detach().double(), recon.detach().double()
        error = (x - recon).square().sum(0).view(n_sites, x.shape[1] // n_sites).sum(1)
        power, written, along = x.square().sum(1), recon.square().sum(1), (x * recon).sum(1)
        some = power > 0
        ratio = torch.where(some, (written / torch.where(some, power, 1)).sqrt(), 0)
        parts = (power, written, along, F.cosine_similarity(x, recon, dim=1), ratio, some)
        self._join(len(x), fired, error, torch.stack([part.sum().double() for part in parts]))
        for moments, site in zip(self.moments, x.chunk(n_sites, 1), strict=True):
            moments.add(site)
        return self

    def merge(self, other: "Tally") -> "Tally":
        """Take in what another tally has seen; returns self. Raises ValueError for one of another number of sites."""
        if len(other.moments) != len(self.moments):
            raise ValueError(f"a tally of {len(other.moments)} sites cannot join one of {len(self.moments)}")
        self._join(other.tokens, other.fired, other.error, other.sums)
        for own, theirs in zip(self.moments, other.moments, strict=True):
            own.merge(theirs)
        return self

    def value(self) -> Evaluation:
        """Return the metrics.

        Raises ValueError where they do not exist: no tokens, values that are not finite, or all tokens equal.
        """
        if not self.tokens:
            raise ValueError("there are no tokens to evaluate on")
        error = self.error.cpu()
        power, written, along, cosine, ratio, some = self.sums.tolist()
        if not torch.isfinite(self.sums).all() or not torch.isfinite(error).all():
            raise ValueError("the activations or their reconstruction hold nan or infinity")
        totals = [moments.value().variance * self.tokens for moments in self.moments]
        # what the mean's own rounding leaves of equal tokens is no variance
        if not sum(totals) > 1e-28 * power:
            raise ValueError(f"all {self.tokens} tokens are equal: a share of their variance does not exist")
        density = self.fired.cpu().double() / self.tokens
        sites = tuple(1 - e / t if t > 1e-28 * power else None for e, t in zip(error.tolist(), totals, strict=True))
        return Evaluation(
            tokens=self.tokens,
            l0=float(density.sum()),
            fve=1 - float(error.sum()) / sum(totals),
            sites=sites if len(sites) > 1 else (),
            nmse=float(error.sum()) / power,
            cosine=cosine / self.tokens,
            relative_bias=written / along if along > 0 else None,
            l2_ratio=ratio / some,
            dead=float((density == 0).double().mean()),
            dense=float((density > 0.1).double().mean()),
            density=density,
        )

    def _join(self, tokens: int, fired: Tensor, error: Tensor, sums: Tensor) -> None:
        if not self.tokens:
            self.fired, self.error, self.sums = (t.to(error.device) for t in (self.fired, self.error, self.sums))
        device = self.error.device
        self.tokens += tokens
        self.fired = self.fired + fired.to(device)
        self.error, self.sums = self.error + error.to(device), self.sums + sums.to(device)


_SUMS = ("|x|^2", "|x_hat|^2", "x . x_hat", "cos", "|x_hat| / |x|", "x other than 0")


@torch.no_grad()
def evaluate(
    sae: SAE, batches: Tensor | tuple[Tensor, Tensor] | Iterable[Tensor | tuple[Tensor, Tensor]]
) -> Evaluation:
    """Return the metrics of an SAE on activations: one batch, or an iterable of them.

    A batch is [tok, d_in], for a crosscoder [tok, n_sites, d] too, and for a transcoder a pair: the input [tok, d_in]
    and what it should predict, [tok, d_out]. How the tokens are cut into batches does not matter. Raises ValueError for
    no tokens, values that are not finite, other shapes, or tokens that are all equal.
    """
    tally = Tally(sae.d_sae, n_sites=sae.config.n_sites)
    for x, target in _parts(sae, batches):
        x = x.to(sae.enc)
        values, active = sae.encode_sparse(x)
        recon = sae.reconstruct_sparse(values, active, x)
        fired = torch.zeros(sae.d_sae, dtype=torch.long, device=x.device)
        fired.index_add_(0, active.cols, (values != 0).long())
        tally.add(target.to(x.device), recon, fired)
    return tally.value()


def evaluate_saved(run: str | Path, data: str | Path) -> Evaluation:
    """Return the metrics of a saved SAE on a file of activations (.npy or .safetensors): `sae eval RUN DATA`."""
    return evaluate(load_sae(run), load_array(data))


def _parts(sae: SAE, batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what goes in and what should come out, flat, in parts of a bounded number of tokens."""
    pairs = sae.config.transcoder
    single = isinstance(batches, tuple) and len(batches) == 2 and all(isinstance(b, Tensor) for b in batches)
    for batch in [batches] if isinstance(batches, Tensor) or (pairs and single) else batches:
        if isinstance(batch, Tensor) == pairs:
            wanted = "pairs of input and target" if pairs else "tensors [tok, d_in]"
            raise ValueError(f"this SAE is evaluated on {wanted}; given: {type(batch).__name__}")
        x, target = (batch, batch) if isinstance(batch, Tensor) else batch
        if x.ndim != 2 and (sae.config.n_sites == 1 or x.ndim != 3):
            raise ValueError(f"a batch is [tok, d_in]; given: shape {tuple(x.shape)}")
        target = target.flatten(1)
        if pairs and target.shape != (len(x), sae.d_out):
            raise ValueError(f"the target is [{len(x)}, {sae.d_out}]; given: shape {tuple(target.shape)}")
        yield from zip(x.split(PART), target.split(PART), strict=True)


def _checked(table: Any, path: Path) -> dict[str, Any]:
    """Return the metrics in a file's table as an Evaluation holds them; raises FormatError for anything else."""
    names = set(DEFINITIONS) - {"sites"}
    if not isinstance(table, dict) or not names <= set(table) <= set(DEFINITIONS):
        raise FormatError(f"{path} does not hold the metrics {', '.join(DEFINITIONS)}")
    sites = table.get("sites", [])
    if not isinstance(sites, list):
        raise FormatError(f"{path}: sites is not a list")
    known = [table[name] for name in names - {"relative_bias", "tokens"}]
    known += [n for n in [table["relative_bias"], *sites] if n is not None]
    if type(table["tokens"]) is not int or not all(type(n) in (int, float) for n in known):
        raise FormatError(f"{path}: a metric is not a number")
    floats = {
        name: value if value is None or name == "tokens" else float(value)
        for name, value in table.items()
        if name != "sites"
    }
    return floats | {"sites": tuple(None if n is None else float(n) for n in sites)}


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_cell(v) for v in value)
    return "-" if value is None else f"{value:.6g}"

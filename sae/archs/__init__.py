"""The architectures: one file each, one line each in ARCHS."""

import difflib
from collections.abc import Sequence
from typing import Any

from sae.archs.abstopk import AbsTopK
from sae.archs.base import SAE
from sae.archs.batchtopk import BatchTopK
from sae.archs.gated import Gated
from sae.archs.jumprelu import JumpReLU
from sae.archs.matryoshka import Matryoshka, MatryoshkaTopK
from sae.archs.relu import ReLU
from sae.archs.topk import TopK
from sae.config import SAEConfig

__all__ = ["ARCHS", "build", "make"]

ARCHS: dict[str, type[SAE]] = {
    "relu": ReLU,
    "gated": Gated,
    "topk": TopK,
    "abstopk": AbsTopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "matryoshka": Matryoshka,
    "matryoshka_topk": MatryoshkaTopK,
}


def build(
    arch: str,
    *,
    d_in: int,
    d_sae: int,
    k: int | float,
    d_out: int | None = None,
    skip: bool = False,
    n_sites: int = 1,
    levels: Sequence[int] = (),
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
) -> SAE:
    """Return an untrained SAE on the CPU, its random directions drawn from seed alone.

    With d_out a transcoder, with a linear bypass where `skip`; with n_sites a crosscoder over d_in / n_sites wide
    sites; levels are the nested widths of a matryoshka architecture. Raises ValueError for an architecture that ARCHS
    does not hold, and for impossible sizes.
    """
    config = SAEConfig(
        arch=arch, d_in=d_in, d_sae=d_sae, k=k, d_out=d_out, skip=skip, n_sites=n_sites, levels=tuple(levels),
        metadata=metadata or {},
    )  # fmt: skip
    return make(config, seed=seed)


def make(config: SAEConfig, *, seed: int = 0) -> SAE:
    """Return an untrained SAE of a configuration. Raises ValueError for an architecture that ARCHS does not hold."""
    if config.arch not in ARCHS:
        close = difflib.get_close_matches(config.arch, ARCHS, n=1, cutoff=0.0)
        raise ValueError(f"there is no architecture {config.arch!r}; closest: {close[0]}; all: {', '.join(ARCHS)}")
    if config.levels and not config.arch.startswith("matryoshka"):
        raise ValueError(f"levels belong to the matryoshka architectures, not to {config.arch}")
    return ARCHS[config.arch](config, seed=seed)

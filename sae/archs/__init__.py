"""The architectures: one file each, one line each in ARCHS."""

import difflib
from typing import Any

from sae.archs.base import SAE
from sae.archs.batchtopk import BatchTopK
from sae.config import SAEConfig

__all__ = ["ARCHS", "build"]

ARCHS: dict[str, type[SAE]] = {"batchtopk": BatchTopK}


def build(
    arch: str, *, d_in: int, d_sae: int, k: int | float, seed: int = 0, metadata: dict[str, Any] | None = None
) -> SAE:
    """Return an untrained SAE on the CPU, its random directions drawn from seed alone.

    Raises ValueError for an architecture that ARCHS does not hold, and for impossible sizes.
    """
    if arch not in ARCHS:
        close = difflib.get_close_matches(arch, ARCHS, n=1, cutoff=0.0)
        raise ValueError(f"there is no architecture {arch!r}; closest: {close[0]}; all: {', '.join(ARCHS)}")
    return ARCHS[arch](SAEConfig(arch=arch, d_in=d_in, d_sae=d_sae, k=k, metadata=metadata or {}), seed=seed)

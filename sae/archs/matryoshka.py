"""Matryoshka (arXiv:2503.17547): the first latents must reconstruct alone, then more, then all."""

from dataclasses import replace

from sae.archs.batchtopk import BatchTopK
from sae.archs.topk import TopK
from sae.config import SAEConfig

__all__ = ["Matryoshka", "MatryoshkaTopK", "default_levels"]

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def default_levels(d_sae: int) -> tuple[int, ...]:
    """Return the nested widths used where none are given: a sixteenth of the latents, doubled up to all of them."""
    return tuple(dict.fromkeys(max(1, round(share * d_sae)) for share in SHARES))


class Matryoshka(BatchTopK):
    """BatchTopK whose loss is a weighted mean over nested prefixes of the latents; inference as BatchTopK."""

    def __init__(self, config: SAEConfig, *, seed: int = 0) -> None:
        super().__init__(_with_levels(config), seed=seed)


class MatryoshkaTopK(TopK):
    """TopK whose loss is a weighted mean over nested prefixes of the latents; inference as TopK."""

    def __init__(self, config: SAEConfig, *, seed: int = 0) -> None:
        super().__init__(_with_levels(config), seed=seed)


def _with_levels(config: SAEConfig) -> SAEConfig:
    return config if config.levels else replace(config, levels=default_levels(config.d_sae))

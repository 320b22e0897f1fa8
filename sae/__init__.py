"""Train, evaluate, save and load sparse autoencoders on tensors."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.archs import ARCHS, build
    from sae.archs.base import SAE
    from sae.config import TrainConfig
    from sae.evaluation import evaluate
    from sae.formats import load_sae, push_to_hub, save_sae
    from sae.runs import fit, grid, sweep, table
    from sae.training import train
    from sae.truth import score_against_truth

# Loaded on first use (PEP 562), so that `import sae` does not pay for torch.
_HOMES = {
    "ARCHS": "sae.archs",
    "SAE": "sae.archs.base",
    "TrainConfig": "sae.config",
    "build": "sae.archs",
    "evaluate": "sae.evaluation",
    "fit": "sae.runs",
    "grid": "sae.runs",
    "load_sae": "sae.formats",
    "push_to_hub": "sae.formats",
    "save_sae": "sae.formats",
    "score_against_truth": "sae.truth",
    "sweep": "sae.runs",
    "table": "sae.runs",
    "train": "sae.training",
}

__all__ = [
    "ARCHS",
    "SAE",
    "TrainConfig",
    "build",
    "evaluate",
    "fit",
    "grid",
    "load_sae",
    "push_to_hub",
    "save_sae",
    "score_against_truth",
    "sweep",
    "table",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

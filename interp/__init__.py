"""See and steer what a language model represents.

Names load when they are first used: `import interp` imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interp.acts.capture import Acts, capture_acts
    from interp.acts.direction import Direction
    from interp.concepts.effects.calls import effects
    from interp.concepts.erasing.erasure import fit_leace
    from interp.concepts.labelled.examples import read_examples
    from interp.concepts.labelled.token_choice import token_rows
    from interp.concepts.reading.files import open_direction
    from interp.concepts.reading.finders import fit_direction
    from interp.concepts.reading.probes import evaluate_probe, fit_probe
    from interp.concepts.reading.sweep import sweep
    from interp.concepts.steering.baking import bake
    from interp.concepts.steering.conditions import when
    from interp.concepts.steering.context import add, steer
    from interp.concepts.steering.operations import ablate, clamp, latents, low_rank, rotate
    from interp.concepts.steering.trained import train_direction
    from interp.features.evaluation import evaluate_on_model
    from interp.features.splice import ce_recovered, splice
    from interp.model.loading import Model, load_model
    from interp.report.pages import write_report
    from interp.space.neighbors import Space
    from interp.store.harvest import harvest_acts
    from interp.store.reader import ActivationStore, open_store
    from interp.store.stream import stream_acts

__version__ = "0.4.0"

_HOME = {
    "ActivationStore": "store.reader",
    "Acts": "acts.capture",
    "Direction": "acts.direction",
    "Model": "model.loading",
    "Space": "space.neighbors",
    "ablate": "concepts.steering.operations",
    "add": "concepts.steering.context",
    "bake": "concepts.steering.baking",
    "capture_acts": "acts.capture",
    "ce_recovered": "features.splice",
    "clamp": "concepts.steering.operations",
    "effects": "concepts.effects.calls",
    "evaluate_on_model": "features.evaluation",
    "evaluate_probe": "concepts.reading.probes",
    "fit_direction": "concepts.reading.finders",
    "fit_leace": "concepts.erasing.erasure",
    "fit_probe": "concepts.reading.probes",
    "harvest_acts": "store.harvest",
    "latents": "concepts.steering.operations",
    "load_model": "model.loading",
    "low_rank": "concepts.steering.operations",
    "open_direction": "concepts.reading.files",
    "open_store": "store.reader",
    "read_examples": "concepts.labelled.examples",
    "rotate": "concepts.steering.operations",
    "splice": "features.splice",
    "steer": "concepts.steering.context",
    "stream_acts": "store.stream",
    "sweep": "concepts.reading.sweep",
    "token_rows": "concepts.labelled.token_choice",
    "train_direction": "concepts.steering.trained",
    "when": "concepts.steering.conditions",
    "write_report": "report.pages",
}
__all__ = [
    "ActivationStore",
    "Acts",
    "Direction",
    "Model",
    "Space",
    "ablate",
    "add",
    "bake",
    "capture_acts",
    "ce_recovered",
    "clamp",
    "effects",
    "evaluate_on_model",
    "evaluate_probe",
    "fit_direction",
    "fit_leace",
    "fit_probe",
    "harvest_acts",
    "latents",
    "load_model",
    "low_rank",
    "open_direction",
    "open_store",
    "read_examples",
    "rotate",
    "splice",
    "steer",
    "stream_acts",
    "sweep",
    "token_rows",
    "train_direction",
    "when",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'interp' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(f"interp.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

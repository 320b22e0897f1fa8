"""See and steer what a language model represents.

Names load when they are first used: `import interp` imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interp.acts.capture import Acts, capture_acts
    from interp.acts.direction import Direction
    from interp.concepts.effects import effects
    from interp.concepts.finders import fit_direction
    from interp.concepts.probes import evaluate_probe, fit_probe
    from interp.concepts.steering import add, steer
    from interp.features.evaluation import evaluate_on_model
    from interp.features.splice import ce_recovered, splice
    from interp.model.loading import Model, load_model
    from interp.report.pages import write_report
    from interp.space.neighbors import Space
    from interp.store.harvest import harvest_acts
    from interp.store.reader import ActivationStore, open_store
    from interp.store.stream import stream_acts

__version__ = "0.3.0"

_HOME = {
    "ActivationStore": "store.reader",
    "Acts": "acts.capture",
    "Direction": "acts.direction",
    "Model": "model.loading",
    "Space": "space.neighbors",
    "add": "concepts.steering",
    "capture_acts": "acts.capture",
    "ce_recovered": "features.splice",
    "effects": "concepts.effects",
    "evaluate_on_model": "features.evaluation",
    "evaluate_probe": "concepts.probes",
    "fit_direction": "concepts.finders",
    "fit_probe": "concepts.probes",
    "harvest_acts": "store.harvest",
    "load_model": "model.loading",
    "open_store": "store.reader",
    "splice": "features.splice",
    "steer": "concepts.steering",
    "stream_acts": "store.stream",
    "write_report": "report.pages",
}
__all__ = [
    "ActivationStore",
    "Acts",
    "Direction",
    "Model",
    "Space",
    "add",
    "capture_acts",
    "ce_recovered",
    "effects",
    "evaluate_on_model",
    "evaluate_probe",
    "fit_direction",
    "fit_probe",
    "harvest_acts",
    "load_model",
    "open_store",
    "splice",
    "steer",
    "stream_acts",
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

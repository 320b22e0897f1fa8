"""What weights can do: the models and the steering operations that can be baked, each refusal with its reason."""

from interp.concepts.steering.baked import BakingError
from interp.concepts.steering.operations import Operation
from interp.model.core import Model

__all__ = ["refuse_model", "refuse_operation"]


def refuse_model(model: Model) -> None:
    """Raise BakingError for a model whose weights are not there to be changed."""
    hf = model.hf
    why = ""
    if len(model.stacks()) > 1:
        why = "it is an encoder-decoder, with two streams"
    elif model.bridge is not None:
        why = "it is a TransformerBridge; bake the Hugging Face model"
    elif hasattr(hf, "peft_config"):
        why = "it carries adapters; merge them first"
    elif getattr(hf, "is_quantized", False):
        why = "its weights are quantised; bake the unquantised model and quantise the result"
    elif model.offloaded or any(p.is_meta for p in hf.parameters()):
        why = "its weights are offloaded; load it whole"
    if why:
        raise BakingError(f"{model.name} cannot be baked: {why}")


def refuse_operation(model: Model, operation: Operation) -> None:
    """Raise BakingError for an operation that no change of weights amounts to."""
    why = ""
    if operation.kind not in ("add", "ablate"):
        why = "weights can add and ablate, nothing else"
    elif not (isinstance(operation.positions, str) and operation.positions == "all"):
        why = f"weights act at every position: positions='all', not {operation.positions!r}"
    elif operation.when is not None:
        why = "weights know no condition"
    elif len(operation.strengths) > 1:
        why = f"it has {len(operation.strengths)} strengths, one a row; weights are the same for all rows"
    elif operation.options.get("keep_norm"):
        why = "keeping each token's length is not linear"
    elif operation.kind == "add" and len(operation.directions) > 1:
        why = "it has one direction a row; weights are the same for all rows"
    elif operation.options.get("side", "both") != "both":
        why = "one-sided ablation is not linear"
    elif operation.kind == "ablate" and list(operation.strengths) != [1.0]:
        why = f"its strength is {min(operation.strengths)}; at every site in turn only a whole ablation is the same"
    elif operation.kind == "ablate":
        missing = _uncovered(model, {p.name for p in operation.points(model)})
        if missing:
            why = f"ablation by weights acts at every site: hooks=EVERYWHERE; {missing[0]} is left out"
    if why:
        raise BakingError(f"{operation.kind} cannot be baked into {model.name}: {why}; steer with hooks instead")


def _uncovered(model: Model, hooks: set[str]) -> list[str]:
    """Return the sites that an ablation leaves out: the first block's input, and what each block adds."""
    kinds = {p.name: p.kind for p in model.hook_points() if p.layer is not None}
    first = next(name for name, kind in kinds.items() if kind == "resid_pre")
    added = [name for name, kind in kinds.items() if kind in ("attn_out", "mlp_out")]
    return [name for name in [first, *added] if name not in hooks]

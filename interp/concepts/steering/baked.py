"""The result of baking: a steered model without hooks, how near it is to the hooked one, and its folder."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.model.core import Model
from interp.model.forward import eval_mode
from interp.model.hooks import reading
from interp.model.loading import as_model, load_model
from sae.io import write_json

__all__ = ["Baked", "BakingError"]

CLOSE = 1e-5  # of a hook's values in float32; other dtypes get 8 times their precision
RECORD = "interp_bake.json"


class BakingError(ValueError):
    """A steering operation that no change of this model's weights amounts to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Baked:
    """A copy of a model with steering in its weights, and how near it is to the same steering by hooks."""

    hf: Any  # the steered Hugging Face model; the one it was made of is unchanged
    tokenizer: Any
    edited: tuple[str, ...]  # the parameters that were changed
    component: float | None  # ablation: largest |component along the directions| / |values| at any hook point
    difference: float  # largest difference of outputs to hooks at the same places, relative to the largest output
    plain_difference: float | None  # ablation: the same to hooks on what is added to the stream, after any norm
    notes: tuple[str, ...]
    operations: tuple[dict[str, Any], ...]
    source: str  # fingerprint of the model it was made of

    def save(self, out: str | Path) -> Path:
        """Write the model, its tokenizer and interp_bake.json into a new folder; return it.

        The folder is written beside its place, loaded again and compared, and only then gets its name. Raises
        FileExistsError for a folder that holds something, BakingError where the model does not come back the same.
        """
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} holds something already; give a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.parent / f".baking-{folder.name}-{secrets.token_hex(4)}"
        try:
            ids = some_ids(as_model(self.hf))
            with _no_bars():
                self.hf.save_pretrained(beside)
                again = load_model(str(beside), dtype=next(self.hf.parameters()).dtype, device=ids.device).hf
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(beside)
            write_json(beside / RECORD, self.record())
            if not torch.equal(outputs(again, ids), outputs(self.hf, ids)):
                raise BakingError(f"{type(self.hf).__name__} does not come back from its folder as it was saved")
            if folder.exists():
                folder.rmdir()
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return folder

    def record(self) -> dict[str, Any]:
        """Return what the folder says of its making, as JSON holds it."""
        names = ("edited", "component", "difference", "plain_difference", "notes", "operations", "source")
        held = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in held.items()}


def tolerance(model: Model) -> float:
    """Return how far from hooks a baked model may be, relative to the largest value."""
    dtype = next(model.hf.parameters()).dtype
    return CLOSE if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps


def some_ids(model: Model) -> Int[Tensor, "3 t"]:
    """Return fixed pseudo-random token ids, specials left out."""
    allowed = torch.tensor([i for i in range(model.d_vocab) if i not in model.special_ids])
    draws = torch.randint(len(allowed), (3, min(12, model.n_ctx)), generator=torch.Generator().manual_seed(0))
    return allowed[draws].to(model.device)


def outputs(hf: nn.Module, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t _"]:
    """Return a model's logits, or its last hidden state where it has no head."""
    with torch.no_grad(), eval_mode(hf):
        out = hf(input_ids=ids)
    return (out.logits if getattr(out, "logits", None) is not None else out[0]).double()


def stream_values(model: Model, ids: Int[Tensor, "b t"]) -> dict[str, Tensor]:
    """Return the values at every hook point of the stream and of what is added to it."""
    kinds = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    held: dict[str, Tensor] = {}
    hooks = [p.name for p in model.hook_points() if p.kind in kinds]
    with reading(model, hooks, lambda name, value: held.__setitem__(name, value.detach().clone())):
        model.run(ids)
    return held


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

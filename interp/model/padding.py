"""How a model is given padded rows: found out once for each side, by rows that must not change for being padded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from interp.model.anatomy import AnatomyError
from interp.model.clock import quiet
from interp.model.forward import FAILURES, Probe, accepts, eval_mode, kept_rng, probe_ids, text_config

PADS = 3


def positions_of(mask: Tensor, offset: int) -> Tensor:
    """Return positions that count real tokens from `offset`."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0) + offset


def find_offset(
    hf: nn.Module, call: Callable[[dict[str, Any]], Any], last: nn.Module, side: str, named: bool
) -> int | None:
    """Return from where the positions given with padded rows count, or None for rows to be given without positions.

    `call` runs the stack whose final block is `last` on the arguments it gets; `named` tells whether it takes
    position_ids. Tried in turn on rows padded on `side`: positions from 0 (GPT-2 and GPT-Neo do not derive them from
    the mask), from behind the pad id (RoBERTa), none given. The first under which real tokens give what they give
    unpadded, to rounding, is taken. On the right nothing is given first. Raises AnatomyError where none does.
    """
    ids = probe_ids(hf)
    rows, width = ids.shape
    fill = torch.zeros(rows, PADS, dtype=ids.dtype, device=ids.device)
    padded = torch.cat([fill, ids] if side == "left" else [ids, fill], dim=1)
    mask = torch.ones_like(padded)
    real = slice(PADS, None) if side == "left" else slice(0, width)
    mask[:, :PADS] = 0 if side == "left" else 1
    mask[:, width:] = 1 if side == "left" else 0
    pad = getattr(text_config(hf), "pad_token_id", None)
    tries: list[int | None] = [0] if named else []
    if named and isinstance(pad, int) and pad >= 0:
        tries.append(pad + 1)
    tries = [*tries, None] if side == "left" else [None, *tries]

    def at_last(given: dict[str, Any]) -> Tensor:
        seen = Probe({"last": last})
        seen.run(lambda: call(given))
        return seen.outputs["last"].float()

    with torch.no_grad(), kept_rng(ids.device), eval_mode(hf), quiet(hf):
        alone = at_last({"input_ids": ids})
        bound = 32 * torch.finfo(next(hf.parameters()).dtype).eps * alone.abs().amax()
        for offset in tries:
            given = {"input_ids": padded, "attention_mask": mask}
            if offset is not None:
                given["position_ids"] = positions_of(mask, offset)
            try:
                found = at_last(given)[:, real]
            except FAILURES:  # positions beyond the table, a mask that this family does not take
                continue
            if found.shape == alone.shape and bool((found - alone).abs().max() <= bound):
                return offset
    other = "pad on the right instead, or " if side == "left" else ""
    raise AnatomyError(
        f"{type(hf).__name__} gives tokens other values in rows padded on the {side}; {other}give rows of one length"
    )


def takes_positions(hf: nn.Module, module: nn.Module) -> bool:
    """Whether both the whole model and what is called for its blocks name position_ids."""
    return accepts(hf, "position_ids") and accepts(module, "position_ids")

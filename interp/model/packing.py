"""Rows that several documents share without seeing each other: whether a model heeds positions that restart."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from interp.model.clock import quiet
from interp.model.forward import FAILURES, Probe, accepts, eval_mode, kept_rng, no_cache, probe_ids

FIRST, SECOND = 5, 6  # tokens of the two documents of the check: longer than the usual convolution of four


def restarts(positions: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None) -> Int[Tensor, "b t"]:
    """Return position ids that make transformers mask documents from each other: 0 at each start and at every pad.

    transformers 5 builds the block-diagonal mask itself, out of positions that do not go up by one, where it is given
    neither mask nor cache. Raises ValueError for pads that are not on the right, and for positions that do not count
    from 0 up by one in each document.
    """
    real = positions >= 0 if mask is None else mask.to(positions.device).bool()
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ValueError("rows of several documents are padded on the right alone; this mask has a pad before a token")
    counts = torch.where(real, positions, 0)
    steps = counts[:, 1:] - counts[:, :-1]
    if not bool(((counts[:, 1:] == 0) | (steps == 1)).all()) or bool((counts[:, :1] != 0).any()):
        raise ValueError("positions must count 0, 1, 2, ... from the first token of each document in the row")
    return counts.long()


def keeps_apart(hf: nn.Module, last: nn.Module) -> bool:
    """Whether two documents in one row give at the block `last` what each gives alone, and the first never leaks.

    What the second gives must not depend on the first in a single bit; to rounding where experts take tokens in
    groups, whose size rounds differently.
    """
    if not accepts(hf, "position_ids"):
        return False
    ids = probe_ids(hf).reshape(1, -1)
    ids = torch.cat([ids, ids.flip(1)], dim=1)[:, : FIRST + SECOND]
    other = ids.clone()
    other[:, :FIRST] = ids[:, 1 : FIRST + 1].flip(1)
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None].to(ids.device)

    def at_last(row: Tensor, at: Tensor) -> Tensor:
        seen = Probe({"last": last})
        seen.run(lambda: hf(input_ids=row, position_ids=at, **no_cache(hf)))
        return seen.outputs["last"].float()

    rows = [ids[:, :FIRST], ids[:, FIRST:]]
    with torch.no_grad(), kept_rng(ids.device), eval_mode(hf), quiet(hf):
        singles = [at_last(row, torch.arange(row.shape[1], device=row.device)[None]) for row in rows]
        try:
            together, changed = at_last(ids, positions), at_last(other, positions)
        except FAILURES:  # positions that restart are more than this family can take
            return False
    alone = torch.cat(singles, dim=1)
    if together.shape != alone.shape or not bool(together.isfinite().all()):
        return False
    eps = torch.finfo(next(hf.parameters()).dtype).eps
    bound = 32 * eps * together.abs().amax()
    leak = (together - changed)[:, FIRST:].abs().max()
    experts = any("expert" in name for name, _ in hf.named_modules())
    return bool((together - alone).abs().max() <= bound) and bool(leak <= (bound if experts else 0))

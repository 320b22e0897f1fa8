"""Write continuations under steering: many directions and strengths as rows of the same batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.acts.direction import Direction
from interp.concepts.steering.context import add, generate_ids, prompt_batch, steer
from interp.model.loading import Model
from interp.model.tokens import TokenBatch, need_tokenizer, pad_id

__all__ = ["Push", "Written", "rows_at_once", "until_end", "write"]

Push: TypeAlias = tuple[Direction, float | int]  # a direction and its strength, in median residual norms
Progress: TypeAlias = Callable[[str, int, int], None]  # what is under way, parts done, parts in all
ROWS = 256  # rows of one generate call


@dataclass(frozen=True, kw_only=True)
class Written:
    """Continuations of some prompts as ids (up to and with the end token) and texts, one a row."""

    batch: TokenBatch  # the prompts, left-padded
    ids: Int[Tensor, "rows new"]
    real: Bool[Tensor, "rows new"]
    texts: list[str]


def write(
    model: Model,
    prompts: Sequence[str],
    pushes: Sequence[Push],
    *,
    max_new_tokens: int = 20,
    positions: str = "all",
    progress: Progress | None = None,
) -> list[Written]:
    """Return what the model writes after every prompt under each push, greedily.

    All pushes and prompts are rows of common generate calls, of ROWS rows at most. A strength of 0 is the model as it
    is. Raises MissingError without a tokenizer, and as `add` and `generate_ids` do.
    """
    need_tokenizer(model.tokenizer)
    n, prompts = len(prompts), list(prompts)
    moved = [i for i, (_, strength) in enumerate(pushes) if strength]
    rows = [(pushes[i], prompt) for i in moved for prompt in prompts]
    ids = torch.zeros((0, max_new_tokens), dtype=torch.long)
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        steered = add([d for (d, _), _ in some], [s for (_, s), _ in some], positions)
        with steer(model, steered):
            new = generate_ids(model, [prompt for _, prompt in some], max_new_tokens)
        ids = torch.cat([ids, _filled(model, new, max_new_tokens)])
        if progress is not None:
            progress("writing", min(start + ROWS, len(rows)), len(rows))
    plain = None
    if len(moved) < len(pushes):
        plain = _written(model, prompts, _filled(model, generate_ids(model, prompts, max_new_tokens), max_new_tokens))
    found = {i: _written(model, prompts, ids[k * n : (k + 1) * n]) for k, i in enumerate(moved)}
    return [found.get(i) or _there(plain) for i in range(len(pushes))]


def _there(plain: Written | None) -> Written:
    assert plain is not None  # written whenever a strength is 0
    return plain


def _filled(model: Model, new: Int[Tensor, "rows some"], width: int) -> Int[Tensor, "rows new"]:
    """Return new tokens in `width` columns: generate stops where all its rows have ended."""
    fill = pad_id(model.tokenizer)
    return torch.cat([new, torch.full((len(new), width - new.shape[1]), fill, dtype=torch.long)], 1)


def _written(model: Model, prompts: list[str], ids: Int[Tensor, "rows new"]) -> Written:
    real = until_end(model, ids)
    kept = [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]
    texts = model.tokenizer.batch_decode(kept, skip_special_tokens=True)
    return Written(batch=prompt_batch(model, prompts), ids=ids, real=real, texts=texts)


def until_end(model: Model, ids: Int[Tensor, "rows new"]) -> Bool[Tensor, "rows new"]:
    """Return which new tokens are real: up to and with the first end token."""
    given = getattr(model.hf.generation_config, "eos_token_id", None)
    ends = given if isinstance(given, (list, tuple)) else [given]
    ended = torch.isin(ids, torch.tensor([i for i in ends if isinstance(i, int)], dtype=torch.long))
    return (ended.long().cumsum(1) - ended.long()) == 0


def rows_at_once(model: Model, width: int, most: int = 32) -> int:
    """Return how many rows' log-probabilities fit into some 64 MB, at most `most`."""
    return max(1, min(most, 2**24 // (model.d_vocab * width)))

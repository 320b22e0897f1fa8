"""What steering does to neutral text: how far the predictions move, and how much worse they get."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.direction import Direction
from interp.concepts.steering import add, steer
from interp.concepts.writing import Progress, Push, rows_at_once
from interp.model.loading import as_model
from interp.model.tokens import TokenBatch

__all__ = ["damage", "damages"]


def damage(
    model: Any, direction: Direction, strengths: Sequence[float | int], texts: Sequence[str], *, max_len: int = 64
) -> list[tuple[float, float]]:
    """Return (mean KL(base || steered) a token, growth of the mean next-token loss) for each strength, in nats.

    As `damages`, of one direction.
    """
    found = damages(model, [(direction, strength) for strength in strengths], texts, max_len=max_len)
    return [(float(kl), float(extra)) for kl, extra in found]


def damages(
    model: Any,
    pushes: Sequence[Push],
    texts: Sequence[str],
    *,
    max_len: int = 64,
    progress: Progress | None = None,
) -> Float[np.ndarray, "pushes 2"]:
    """Return mean KL(base || steered) a token and growth of the mean next-token loss, in nats, for each push.

    Measured on texts steered at every position; predictions at BOS and pads do not count, and a text is cut at
    `max_len` tokens. Several pushes are rows of one batch; a strength of 0 is 0 exactly.
    Raises ValueError for texts that leave nothing to predict.
    """
    model = as_model(model)
    active = [i for i, (_, strength) in enumerate(pushes) if strength]
    found, counts = np.zeros((len(pushes), 2)), np.zeros(2)
    limit = rows_at_once(model, max_len)
    for start in range(0, len(texts), limit):
        batch = model.tokenize(list(texts[start : start + limit]), max_len=min(max_len, model.n_ctx))
        keep = batch.mask & ~batch.special
        last = keep[:, :-1] & batch.mask[:, 1:]
        counts += [int(keep.sum()), int(last.sum())]
        base = model.logits(batch.ids, batch.mask).float().log_softmax(-1)
        step = max(1, limit // len(batch.ids))
        for at in range(0, len(active), step):
            some = active[at : at + step]
            found[some] += _moved(model, batch, base, [pushes[i] for i in some])
            if progress is not None:
                progress("neutral text", start * len(active) + (at + len(some)) * len(batch.ids),
                         len(texts) * len(active))  # fmt: skip
    if not (counts > 0).all():
        raise ValueError("the neutral texts leave nothing to predict: give texts of several tokens")
    return found / counts


def _moved(
    model: Any, batch: TokenBatch, base: Float[Tensor, "n t v"], pushes: list[Push]
) -> Float[np.ndarray, "pushes 2"]:
    """Return the sums over the tokens of one batch of KL and of extra loss, for each push."""
    n, k = len(batch.ids), len(pushes)
    keep = batch.mask & ~batch.special
    last = keep[:, :-1] & batch.mask[:, 1:]
    operation = add([d for d, _ in pushes for _ in range(n)], [s for _, s in pushes for _ in range(n)], "all")
    with steer(model, operation):
        steered = model.logits(batch.ids.repeat(k, 1), batch.mask.repeat(k, 1)).float().log_softmax(-1)
    steered = steered.unflatten(0, (k, n))
    kl = (base.exp() * (base - steered)).sum(-1).cpu().double()
    targets = batch.ids[:, 1:, None].to(base.device)
    extra = (base[:, :-1].gather(2, targets) - steered[:, :, :-1].gather(3, targets.expand(k, -1, -1, -1)))[..., 0]
    sums = [torch.where(keep, kl, 0.0).sum((1, 2)), torch.where(last, extra.cpu().double(), 0.0).sum((1, 2))]
    return torch.stack(sums, 1).numpy()

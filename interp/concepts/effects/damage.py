"""What steering does to neutral text: how far the predictions move, and how much worse they get."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from interp.acts.direction import Direction
from interp.concepts.effects.writing import Progress, Push, rows_at_once
from interp.concepts.steering.context import add, steer
from interp.model.loading import Model, as_model
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
        base = _Base(model, batch)
        counts += [int(base.keep.sum()), len(base.targets)]
        step = max(1, limit // len(batch.ids))
        for at in range(0, len(active), step):
            some = active[at : at + step]
            found[some] += base.moved(model, [pushes[i] for i in some])
            if progress is not None:
                done = start * len(active) + (at + len(some)) * len(batch.ids)
                progress("neutral text", done, len(texts) * len(active))
    if not (counts > 0).all():
        raise ValueError("the neutral texts leave nothing to predict: give texts of several tokens")
    return found / counts


class _Base:
    """A batch of texts with the predictions of the model as it is, at the tokens that count."""

    def __init__(self, model: Model, batch: TokenBatch):
        self.batch, self.keep = batch, batch.mask & ~batch.special
        follows = torch.cat([batch.mask[:, 1:], torch.zeros_like(batch.mask[:, :1])], 1)
        self.has_next = follows[self.keep]
        self.targets = torch.roll(batch.ids, -1, 1)[self.keep][self.has_next]
        self.logp = model.logits(batch.ids, batch.mask)[self.keep].float().log_softmax(-1)
        self.p = self.logp.exp()

    def moved(self, model: Model, pushes: list[Push]) -> Float[np.ndarray, "pushes 2"]:
        """Return the sums over the tokens of KL and of extra loss, for each push."""
        n, k = len(self.batch.ids), len(pushes)
        operation = add([d for d, _ in pushes for _ in range(n)], [s for _, s in pushes for _ in range(n)], "all")
        with steer(model, operation):
            logits = model.logits(self.batch.ids.repeat(k, 1), self.batch.mask.repeat(k, 1))
        gap = self.logp - logits.unflatten(0, (k, n))[:, self.keep].float().log_softmax(-1)
        kl = torch.einsum("tv,ktv->kt", self.p, gap).cpu().double().sum(1)
        at = self.targets.to(gap.device)[None, :, None].expand(k, -1, -1)
        extra = gap[:, self.has_next].gather(2, at)[..., 0].cpu().double().sum(1)
        return torch.stack([kl, extra], 1).numpy()

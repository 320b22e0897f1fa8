"""Trained steering vectors: gradient descent on a vector added at a hook point, the weights left as they are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.direction import Direction, direction_from, residual_norm
from interp.acts.resampling import grouped_folds, placebo_directions
from interp.concepts.labelled.examples import numbered
from interp.concepts.steering.descent import LR, OBJECTIVES, Descent, Settings
from interp.concepts.steering.targets import Item, as_items, prepare
from interp.model.anatomy import BLOCKS
from interp.model.loading import as_model

__all__ = ["OBJECTIVES", "TrainedDirection", "train_direction"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedDirection:
    """A trained direction, and its loss on texts that it never saw beside that of random ones of equal length.

    Losses are nats a target token ("lm", "reft") or nats a pair ("preference": log 2 without a direction).
    `before` is the model's own, `after` with the direction, `placebos` with random directions. On texts that surprise
    the model any noise lowers the loss, since it makes wrong guesses less sure: read `gain` beside `null_gains`.
    """

    direction: Direction  # its scale is the length trained
    objective: str
    before: float
    after: float
    placebos: Float[Tensor, " placebos"]
    curve: Float[Tensor, " steps"]  # the training loss of each step's batch
    n_train: int
    n_held_out: int

    @property
    def strength(self) -> float:
        """The strength at which steering.add does what was trained, in median residual norms."""
        assert self.direction.norm is not None  # measured on the model
        return self.direction.scale / self.direction.norm

    @property
    def gain(self) -> float:
        """How far the held-out loss falls, in nats; below 0 it rises."""
        return self.before - self.after

    @property
    def null_gains(self) -> Float[Tensor, " placebos"]:
        """How far it falls with each random direction."""
        return self.before - self.placebos

    @property
    def p_value(self) -> float:
        """The share of random directions, this one counted among them, that do at least as well."""
        return (1 + int((self.placebos <= self.after).sum())) / (1 + len(self.placebos))


def train_direction(
    model: Any,
    texts: Any,
    hook: str,
    *,
    objective: str = "lm",
    steps: int = 100,
    lr: float | int | None = None,
    batch_size: int = 16,
    positions: str = "target",
    max_norm: float | int | None = None,
    beta: float | int = 0.1,
    both_ways: bool = False,
    top_k: int = 8,
    l1: float | int = 0.005,
    held_out: float | Sequence = 0.25,
    groups: Sequence | None = None,
    n_placebos: int = 20,
    seed: int = 0,
) -> TrainedDirection:
    """Return a direction at a hook point, trained by gradient descent, with its loss on held-out texts and the null.

    Objectives and the `texts` that they take (Examples too: those of label 1, or their pairs):
    "lm": texts, or (prompt, target): the negative log-likelihood of the target's tokens with v added to the stream.
    "preference": (chosen, rejected) or (prompt, chosen, rejected): -log sigmoid(beta * margin), the margin being what v
    does to log p(chosen) - log p(rejected) (DPO, arXiv:2305.18290, with a vector in place of the weights); `both_ways`
    also asks -v for the contrary, a coin for each pair and step (BiPO, arXiv:2406.00045).
    "reft": as "lm", but what is added is read from the text: w times the mean of the `top_k` largest ReLU(h.w) over its
    tokens, w of unit length, `l1` times the mean of the other ReLU(h.w) in median residual norms put on top (after
    ReFT-r1, arXiv:2501.17148). The direction's scale is then the mean amount added to held-out texts.

    Prompts are texts, or chats that the template closes; a target goes on where its prompt ends, its own blank in
    front. `positions`: "target", from the prompt's last token on, or "all"; special tokens never. `lr` is the longest
    first step, in median residual norms (0.02) or, for "reft", in lengths of w (0.2); it falls to 0 in a line.
    `max_norm` limits the length, in median residual norms.
    `held_out`: a share (whole groups; items of one prompt form a group, or, where all share it, equal items) or items.
    The model's weights, requires_grad flags and modes stay as they are. Same seed, same vector.
    Raises ValueError for items that do not fit the objective, one longer than n_ctx, fewer than two groups, numbers out
    of range, a model of two streams; AnatomyError without a head; ArithmeticError for a loss that is not finite.
    """
    model = as_model(model)
    settings = Settings(
        objective=objective, steps=steps, lr=LR.get(objective, 1.0) if lr is None else lr, batch_size=batch_size,
        positions=positions, max_norm=max_norm, beta=beta, both_ways=both_ways, top_k=top_k, l1=l1,
        n_placebos=n_placebos, seed=seed,
    )  # fmt: skip
    place = model.place(hook)
    if place.stack != BLOCKS:
        raise ValueError(f"{place.point.name} lies in one of two streams; a direction is trained in a causal model")
    train, test = _split(*as_items(texts, objective, groups), held_out, objective, seed)
    data = [prepare(model, items) for items in (train, test)]
    run = Descent(model, place.point.name, residual_norm(model, hook), settings)
    with run.opened():
        references = [run.references(part) for part in data]
        vector, curve = run.train(data[0], references[0])
        before, after = (run.loss(data[1], references[1], v) for v in (torch.zeros_like(vector), vector))
        scale = run.amount(data[1], vector) if run.reads else 1.0
        run.reads = False  # what is random is added everywhere, in the amount that was added on average
        random = placebo_directions(len(vector), n_placebos, seed + 1) * vector.norm() * scale
        placebos = torch.tensor([run.loss(data[1], references[1], v) for v in random])
    direction = direction_from(
        vector * scale, hook=hook, model=model, method=f"trained {objective}", seed=seed, data=_fingerprint(train)
    )
    return TrainedDirection(
        direction=direction,
        objective=objective,
        before=before,
        after=after,
        placebos=placebos,
        curve=curve,
        n_train=len(train),
        n_held_out=len(test),
    )


def _split(
    items: list[Item], groups: list, held_out: float | Sequence, objective: str, seed: int
) -> tuple[list[Item], list[Item]]:
    """Return items to train on and items to measure on, no group in both."""
    if not isinstance(held_out, (int, float)):
        test = as_items(held_out, objective, None)[0]
        both = {repr(i) for i in items} & {repr(i) for i in test}
        if both:
            raise ValueError(f"{len(both)} items are both trained on and held out, first {min(both)[:80]}")
        return items, test
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out is {held_out}; it is a share above 0 and at most 0.5, or items")
    n_groups = len(set(numbered(groups)))
    if n_groups < 2:
        raise ValueError(f"{len(items)} items of {n_groups} group cannot be split; give held_out= items of their own")
    train, test = grouped_folds(groups, min(round(1 / held_out), n_groups), seed)[0]
    return [items[i] for i in train], [items[i] for i in test]


def _fingerprint(items: Sequence[Item]) -> str:
    return hashlib.sha256(repr(list(items)).encode()).hexdigest()[:16]

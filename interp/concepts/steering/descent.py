"""Gradient descent on one vector at a hook point of a frozen model: the losses, and the steps."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.resampling import placebo_directions
from interp.concepts.steering.targets import Prepared
from interp.model.forward import eval_mode, no_cache
from interp.model.hooks import Clock, editing
from interp.model.loading import Model

__all__ = ["LR", "OBJECTIVES", "POSITIONS", "Descent", "Settings"]

OBJECTIVES = ("lm", "preference", "reft")
LR = {"lm": 0.02, "preference": 0.02, "reft": 0.2}
POSITIONS = ("target", "all")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a vector is trained; `train_direction` says what each field means."""

    objective: str
    steps: int
    lr: float | int
    batch_size: int
    positions: str
    max_norm: float | int | None
    beta: float | int
    both_ways: bool
    top_k: int
    l1: float | int
    n_placebos: int
    seed: int

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES or self.positions not in POSITIONS:
            raise ValueError(
                f"objective is {self.objective!r}, one of {', '.join(OBJECTIVES)}; positions {self.positions!r}, one "
                f"of {', '.join(POSITIONS)}"
            )
        names = ("steps", "lr", "batch_size", "max_norm", "beta", "top_k", "n_placebos")
        given = {name: getattr(self, name) for name in names}
        wrong = {name: value for name, value in given.items() if value is not None and not 0 < value < math.inf}
        if wrong or not 0 <= self.l1 < math.inf:
            raise ValueError(f"{wrong or {'l1': self.l1}}: these must be positive and finite (l1 may be 0)")
        if self.both_ways and self.objective != "preference":
            raise ValueError(f"both_ways belongs to preferences, the objective is {self.objective!r}")
        if self.max_norm is not None and self.objective == "reft":
            raise ValueError('max_norm has no meaning for "reft", whose w has length 1 and reads its amount')


class Descent:
    """The model with a vector at its hook point, and the loss of batches of items."""

    def __init__(self, model: Model, hook: str, unit: float, settings: Settings):
        self.model, self.hook, self.unit, self.settings = model, hook, unit, settings
        self.reads = settings.objective == "reft"  # the amount from the text
        self._vector: Tensor | None = None  # what the open context adds; None leaves the model as it is
        self._batch: Prepared | None = None
        self._signs: Tensor | None = None
        self._amounts = self._penalty = torch.zeros(())

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Freeze the model in evaluation mode with the edit in place; everything is as before afterwards."""
        hf = self.model.hf
        learning = [p for p in hf.parameters() if p.requires_grad]
        try:
            for p in learning:
                p.requires_grad_(False)
            with eval_mode(hf), torch.enable_grad(), editing(self.model, {self.hook: self._edit}):
                yield
        finally:
            for p in learning:
                p.requires_grad_(True)

    def _edit(self, value: Tensor, clock: Clock) -> Tensor:
        if self._vector is None or self._batch is None:
            return value
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        vector = self._vector.to(wide)
        steered = self._batch.steered(self.settings.positions).to(value.device)
        if self.reads:
            vector = vector * self._read(wide, vector, self._batch.readable.to(value.device))[:, None, None]
        elif self._signs is not None:
            vector = vector * self._signs.to(value.device)[:, None, None]
        return torch.where(steered[..., None], wide + vector, wide).to(value.dtype)

    def _read(self, wide: Tensor, vector: Tensor, readable: Tensor) -> Float[Tensor, " rows"]:
        """Return the mean of the largest ReLU(h.w) of each row, and note it and the penalty on the rest."""
        found = torch.where(readable, torch.relu(wide @ vector), 0.0)
        largest = found.topk(min(self.settings.top_k, found.shape[1]), dim=1).values
        n = readable.sum(1)
        kept = n.clamp(max=self.settings.top_k)
        rest = (found.sum(1) - largest.sum(1)) / (n - kept).clamp(min=1)
        self._penalty = rest.mean() / self.unit
        self._amounts = largest.sum(1) / kept.clamp(min=1)
        return self._amounts

    def _log_probs(self, batch: Prepared, vector: Tensor | None, signs: Tensor | None = None) -> Float[Tensor, " rows"]:
        """Return the log-probability of each row's target tokens together."""
        self._vector, self._batch, self._signs = vector, batch, signs
        device, hf = self.model.device, self.model.hf
        out = hf(input_ids=batch.ids.to(device), attention_mask=batch.mask.long().to(device), **no_cache(hf)).logits
        aims = batch.targets[:, 1:].to(out.device)
        wanted = batch.ids[:, 1:].to(out.device)[aims]
        found = -torch.nn.functional.cross_entropy(out[:, :-1][aims].float(), wanted, reduction="none")
        rows = aims.nonzero()[:, 0]
        return torch.zeros(len(batch.ids), device=out.device).index_add(0, rows, found)

    def references(self, data: Prepared) -> Float[Tensor, " rows"]:
        """Return the unsteered log-probabilities of preferences; zeros for other objectives, which need none."""
        self.model._need_head()
        if self.settings.objective != "preference":
            return torch.zeros(len(data.ids))
        with torch.no_grad():
            return torch.cat([self._log_probs(part, None).cpu() for _, part in self._parts(data)])

    def _parts(self, data: Prepared) -> Iterator[tuple[Tensor, Prepared]]:
        for rows in torch.arange(len(data.ids)).view(-1, data.width).split(self.settings.batch_size):
            yield rows.flatten(), data.take(rows.flatten())

    def _losses(
        self, data: Prepared, reference: Tensor, vector: Tensor, signs: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Return the summed loss of a batch, and of how many tokens or pairs it is."""
        if self.settings.objective != "preference":
            return -self._log_probs(data, vector).sum(), int(data.targets.sum())
        each = None if signs is None else signs.repeat_interleave(2)
        change = self._log_probs(data, vector, each) - reference.to(self.model.device)
        margins = (change[0::2] - change[1::2]) * (1.0 if signs is None else signs.to(change.device))
        return -torch.nn.functional.logsigmoid(self.settings.beta * margins).sum(), len(margins)

    @torch.no_grad()
    def loss(self, data: Prepared, reference: Tensor, vector: Tensor) -> float:
        """Return the mean loss over all items."""
        parts = [self._losses(part, reference[rows], vector) for rows, part in self._parts(data)]
        return sum(float(total) for total, _ in parts) / sum(n for _, n in parts)

    @torch.no_grad()
    def amount(self, data: Prepared, vector: Tensor) -> float:
        """Return the mean amount that "reft" adds, in residual-stream units."""
        found = []
        for _, part in self._parts(data):
            self._log_probs(part, vector)
            found.append(self._amounts.cpu())
        return float(torch.cat(found).mean())

    def train(self, data: Prepared, reference: Tensor) -> tuple[Float[Tensor, " d"], Float[Tensor, " steps"]]:
        """Return the trained vector in residual-stream units (unit length for "reft") and the loss of each step."""
        d, reft, given = self.model.hook_point(self.hook).d, self.reads, self.settings
        size = 1.0 if reft else self.unit / d**0.5  # in units of it one Adam step is at most lr norms long
        start = placebo_directions(d, 1, given.seed)[0] if reft else torch.zeros(d)
        w, rate = start.to(self.model.device).requires_grad_(), given.lr / d**0.5 if reft else given.lr
        optimiser = torch.optim.Adam([w], lr=rate)
        curve = torch.zeros(given.steps)
        for step, (chosen, signs) in enumerate(self._draws(len(data.ids) // data.width)):
            rows = (chosen[:, None] * data.width + torch.arange(data.width)).flatten()
            total, n = self._losses(data.take(rows), reference[rows], w * size, signs)
            loss = total / n + (self.settings.l1 * self._penalty if reft else 0.0)
            curve[step] = loss.detach()
            if not bool(curve[step].isfinite()):
                raise ArithmeticError(
                    f"the loss is {curve[step]} at step {step}; lower lr ({given.lr}) or give max_norm"
                )
            (w.grad,) = torch.autograd.grad(loss, [w])  # backward() would fill .grad of whatever else can learn
            optimiser.param_groups[0]["lr"] = rate * (1 - step / given.steps)
            optimiser.step()
            with torch.no_grad():
                norms = float(w.norm()) / d**0.5
                if reft:
                    w /= w.norm()
                elif given.max_norm is not None and norms > given.max_norm:
                    w *= given.max_norm / norms
        return (w.detach() * size).cpu(), curve

    def _draws(self, n: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the items of each step, all of them once before any twice, and the sign asked of each."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        left = torch.zeros(0, dtype=torch.long)
        for _ in range(self.settings.steps):
            while len(left) < min(self.settings.batch_size, n):
                left = torch.cat([left, torch.randperm(n, generator=generator)])
            chosen, left = left[: self.settings.batch_size], left[self.settings.batch_size :]
            coins = torch.randint(2, (len(chosen),), generator=generator) * 2.0 - 1 if self.settings.both_ways else None
            yield chosen, coins

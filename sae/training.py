"""The training loop: one step of an SAE, and `train`, which yields after every one."""

import math
import sys
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.archs.base import PER_LATENT, SAE, Batch
from sae.config import TrainConfig
from sae.dist import ALONE, LatentParallel, World
from sae.kernels import Active, by_level, decode_active, encode_active
from sae.losses import aux_k_loss
from sae.normalize import geometric_median, statistics
from sae.optim import Optimiser

__all__ = ["Rows", "Step", "Trainer", "take", "train"]

Rows = Tensor | tuple[Tensor, Tensor]
"""A batch: activations [tok, d_in] or [tok, n_sites, d], or for a transcoder those and what to predict [tok, d_out]."""

REFRESH = 20  # steps between two looks at which latents are dead, where looking makes the host wait
RATE = 0.02  # of the controller that steers a penalty's coefficient: its logarithm's change a step, at most
START_L0, SETTLED = 8.0, 0.7  # L0 that it asks for at first, in k; share of the run after which it asks for k


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step. Numbers that live on the device are read from it when asked for, and only then."""

    step: int
    """Steps done, from 1."""
    tokens: int
    """Tokens seen, by all processes together."""
    lr: float
    """Learning rate of this step."""
    seconds: float
    """Wall time that training took until here, without what a resumed run has lost."""
    tensors: dict[str, Tensor]
    """loss, unexplained, active, dead: scalars on the device, before this step's update."""

    @property
    def loss(self) -> float:
        """Training loss: unexplained share of the variance plus AuxK and penalty, each times its weight."""
        return float(self.tensors["loss"])

    @property
    def fve(self) -> float:
        """Fraction of variance explained on this batch, its variance being that of the first init_tokens."""
        return 1.0 - float(self.tensors["unexplained"])

    @property
    def l0(self) -> float:
        """Mean number of active latents a token of this batch."""
        return float(self.tensors["active"])

    @property
    def dead(self) -> float:
        """Share of latents that have not fired in the last dead_after tokens."""
        return float(self.tensors["dead"])

    def as_dict(self) -> dict[str, int | float]:
        """Return every number of this step."""
        return {name: getattr(self, name) for name in ("step", "tokens", "loss", "fve", "l0", "dead", "lr", "seconds")}


def train(
    sae: SAE,
    batches: Iterable[Rows],
    cfg: TrainConfig,
    *,
    held_out: Rows | None = None,
    world: World = ALONE,
) -> Generator[Step, None, None]:
    """Train an SAE in place on batches, and yield a Step after every optimiser step.

    A batch is [tok, d_in] or [tok, n_sites, d]; for a transcoder the pair of input and target. Logging, saving and
    stopping belong to the caller. When the steps are done, or the caller stops, the threshold is calibrated so that the
    mean L0 at inference is k: on held_out, else on the first init_tokens. Tokens that have been trained on several
    times excite fewer latents than new ones do, so a source of several epochs wants held_out. With a world, each
    process brings its own batches, and all end with the same weights.
    Raises ValueError where there is nothing to learn from, FloatingPointError where loss or weights stop being finite.
    Formulas: Gao et al. (arXiv:2406.04093), Bussmann et al. (arXiv:2412.06410).
    """
    source = iter(batches)
    sample = take(source, -(-cfg.init_tokens // world.token_size))
    loop = Trainer(sae, cfg, sample, world)
    calibration = sample if held_out is None else [held_out]
    finalizing = sys.is_finalizing  # held here: when the interpreter goes down, globals may be gone before generators
    try:
        for batch in chain(list(sample), source):
            yield loop.advance(batch)
            if loop.step == cfg.steps:
                break
    except (GeneratorExit, KeyboardInterrupt):  # stopped from outside: leave an SAE that can be used
        if not finalizing():
            loop.finish(calibration)
        raise
    loop.finish(calibration)
    if loop.step < cfg.steps:
        warnings.warn(f"the source ended after {loop.step} of {cfg.steps} steps; training stopped there", stacklevel=2)


def take(source: Iterator[Rows], tokens: int) -> list[Rows]:
    """Return the first batches of a source, as many as hold that many tokens. Raises ValueError for fewer than 2."""
    sample: list[Rows] = []
    count = 0
    for batch in source:
        sample.append(batch)
        count += len(_input(batch))
        if count >= tokens:
            break
    if count < 2:
        raise ValueError(f"an SAE needs rows to learn from; the source gave {count}")
    return sample


def _input(batch: Rows) -> Tensor:
    return batch[0] if isinstance(batch, tuple) else batch


class Trainer:
    """An SAE while it is trained: everything that changes from step to step, and nothing else.

    `advance` does one step, `state` and `load` carry it over to another process bit for bit, `finish` ends it.
    """

    def __init__(self, sae: SAE, cfg: TrainConfig, sample: Sequence[Rows], world: World = ALONE) -> None:
        self.sae, self.world = sae, world
        self.cfg = cfg = cfg.resolve(sae.d_in, sae.d_sae)
        if sae.config.k is None:
            raise ValueError("training needs k, the number of active latents a token that is asked for")
        if cfg.level_weights is not None and len(cfg.level_weights) != max(1, len(sae.config.levels)):
            raise ValueError(f"level_weights {cfg.level_weights} must be one for each level of {sae.config.levels}")
        sae.shard(world)
        pairs = [self._split(batch) for batch in sample]
        self.variance = self._enter(pairs)
        device = sae.enc.device
        with torch.no_grad():
            first = sae._given(pairs[0][0][: 2048 // world.token_size])
            sae.begin(F.linear(first - sae.dec_bias if sae.config.centred else first, sae.enc, sae.enc_bias), cfg)
        levels = max(1, len(sae.config.levels))
        weights = torch.tensor(cfg.level_weights or [1.0] * levels, dtype=torch.float32, device=device)
        self.level_weights = weights / weights.sum()
        self.idle = torch.zeros(len(sae.enc), dtype=torch.long, device=device)  # tokens since a latent fired
        self.dead = torch.zeros(0, dtype=torch.long, device=device)
        start = 0.5 / math.sqrt(sae.config.k) if cfg.sparsity is None else cfg.sparsity
        self.pressure = torch.tensor(float(start), device=device)
        self.optimiser = Optimiser(list(sae.parameters()), sae.dec, cfg)
        self.step = self.tokens = 0
        self.spent, self._begun = 0.0, time.perf_counter()

    def advance(self, batch: Rows) -> Step:
        """Do one step. Nothing on the device is waited for, but for a look at dead latents now and then."""
        sae, cfg, world = self.sae, self.cfg, self.world
        x, y = self._split(batch)
        assert sae.inward is not None and sae.outward is not None
        z = sae.inward.into(x.to(sae.enc.dtype))
        target = z if y is x else sae.outward.into(y.to(sae.enc.dtype))
        tokens = len(x) * world.token_size
        bias = world.spread(sae.dec_bias) if sae.config.centred else None
        half = cfg.bf16 and z.device.type == "cuda"
        raw, active = encode_active(z, sae.enc, sae.enc_bias, bias, sae.select, half=half)
        whole = (lambda p: p) if active is None else (lambda p: p[active.cols])
        values = sae.values(raw, whole)
        error = self._error(z, target, values, active)
        unexplained = error.square().sum((0, 2)) / (tokens * self.variance)
        loss = (self.level_weights * unexplained).sum()
        fired = self._count(values.detach(), active, tokens)
        if cfg.aux_weight and self._any_dead():
            loss = loss + cfg.aux_weight * self._aux(z, error[:, -1])
        penalty = sae.penalty(
            Batch(raw=raw, values=values, active=active, target=target, n_tokens=tokens, variance=self.variance,
                  pressure=self._pressure(), world=world), cfg,
        )  # fmt: skip
        told = world.total(loss.detach())
        if penalty is not None:
            loss, told = loss + penalty, told + world.latent_total(world.total(penalty.detach()))
        loss.backward()
        lr = self.optimiser.step(self.step, world)
        sae.project()
        self.step += 1
        self.tokens += tokens
        active_mean = world.latent_total(fired.sum()) / tokens
        self._steer(active_mean)
        tensors = {
            "loss": told,
            "unexplained": world.total(unexplained.detach()[-1]),
            "active": active_mean,
            "dead": world.latent_total((self.idle >= (cfg.dead_after or 0)).sum()) / sae.d_sae,
        }
        if self.step % 100 == 1 and not math.isfinite(float(tensors["loss"])):
            raise FloatingPointError(f"the loss is {float(tensors['loss'])} at step {self.step}; lower the lr")
        return Step(step=self.step, tokens=self.tokens, lr=lr, seconds=self.seconds, tensors=tensors)

    def finish(self, calibration: Iterable[Rows]) -> None:
        """Leave the training space and calibrate the threshold. Raises FloatingPointError for weights not finite."""
        if not self.finite():
            raise FloatingPointError(f"the weights are no longer finite after {self.step} steps; lower the lr")
        self.sae.fold()
        self.sae.calibrate(self._split(batch)[0] for batch in calibration)
        self.sae.unshard()

    def finite(self) -> bool:
        """Return whether every weight is finite."""
        return all(bool(torch.isfinite(p).all()) for p in self.sae.parameters())

    @property
    def seconds(self) -> float:
        """Wall time of training, in all processes that it was resumed in."""
        return self.spent + time.perf_counter() - self._begun

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that changes, as tensors and as JSON-able numbers: what `load` needs to go on bit for bit."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        tensors |= {f"adam.{name}": value for name, value in self.optimiser.state().items()}
        tensors |= {"idle": self.idle, "pressure": self.pressure}
        if isinstance(self.world, LatentParallel):
            tensors = {name: self.world.whole(t) if self._shared_out(name) else t for name, t in tensors.items()}
        else:
            tensors["dead"] = self.dead
        numbers = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "variance": self.variance}
        return tensors, numbers

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from a state of a trainer that was made alike. Raises ValueError or KeyError for another's."""
        device = self.idle.device
        if isinstance(self.world, LatentParallel):
            part = self.world.rows(self.sae.d_sae)
            tensors = {name: t[part].clone() if self._shared_out(name) else t for name, t in tensors.items()}
        sae = {name.removeprefix("sae."): value for name, value in tensors.items() if name.startswith("sae.")}
        self.sae.load_state_dict(sae)
        adam = {name.removeprefix("adam."): value for name, value in tensors.items() if name.startswith("adam.")}
        self.optimiser.load(adam)
        self.idle = tensors["idle"].to(device).clone()
        self.dead = tensors["dead"].to(device).clone() if "dead" in tensors else self._idle_ones()
        self.pressure = tensors["pressure"].to(device).clone()
        self.step, self.tokens = int(numbers["step"]), int(numbers["tokens"])
        self.variance = float(numbers["variance"])
        self.spent, self._begun = float(numbers["seconds"]), time.perf_counter()

    def _shared_out(self, name: str) -> bool:
        """Return whether a tensor of the state has a row for each latent."""
        owner, _, rest = name.partition(".")
        if owner == "adam":
            number, _, moment = rest.partition(".")
            names = [n for n, _ in self.sae.named_parameters()]
            return moment != "step" and names[int(number)] in PER_LATENT
        return name == "idle" or (owner == "sae" and rest in PER_LATENT)

    def _split(self, batch: Rows) -> tuple[Tensor, Tensor]:
        """Return input [tok, d_in] and target [tok, d_out] of a batch, on the device of the weights."""
        config, device = self.sae.config, self.sae.enc.device
        x, y = batch if isinstance(batch, tuple) else (batch, batch)
        if config.n_sites > 1 and x.ndim == 3:
            x = x.flatten(1)
        if x.ndim != 2 or x.shape[1] != config.d_in:
            raise ValueError(f"this SAE learns from batches [tok, {config.d_in}]; given: shape {tuple(x.shape)}")
        if not config.transcoder:
            if isinstance(batch, tuple):
                raise ValueError(
                    "an autoencoder predicts what it reads; build with d_out for pairs of input and target"
                )
            x = x.to(device)
            return x, x
        if y is x or y.shape != (len(x), config.d_target):
            given = "no target" if y is x else f"a target of shape {tuple(y.shape)}"
            raise ValueError(f"a transcoder learns from pairs of input and target [tok, {config.d_target}]; {given}")
        return x.to(device), y.to(device)

    def _enter(self, pairs: list[tuple[Tensor, Tensor]]) -> float:
        """Choose the training space from the sample; return the target's variance a token in it."""
        sae, cfg, total = self.sae, self.cfg, self.world.total
        whiten = cfg.normalize == "whiten"
        read = statistics([x for x, _ in pairs], covariance=whiten, total=total)
        if not math.isfinite(float(read.squares.sum())):
            raise ValueError("the activations hold nan or infinity; drop those rows first")
        if sae.config.transcoder:
            inward = read.affine(cfg.normalize, 1, shift=True)
            written = statistics([y for _, y in pairs], total=total)
            outward = written.affine("none" if cfg.normalize == "none" else "sqrt_d", 1, shift=False)
        else:
            inward = outward = read.affine(cfg.normalize, sae.config.n_sites, shift=False)
            written = read
        b_dec = written.mean.float()
        if cfg.b_dec_start == "median":
            b_dec = geometric_median(torch.cat([y.float() for _, y in pairs]))
            b_dec = total(b_dec) / self.world.token_size
        sae.start(inward, outward, b_dec)
        return written.variance(outward)

    def _error(self, z: Tensor, target: Tensor, values: Tensor, active: Active | None) -> Float[Tensor, "tok levels d"]:
        """Return what each nested level leaves of the target; one level where there are none."""
        sae = self.sae
        rest = target - sae.dec_bias
        if sae.skip is not None:
            rest = rest - F.linear(z, sae.skip)
        if active is None:
            return (rest - self.world.joined(values @ sae.dec))[:, None]
        levels = sae.config.levels
        if not levels:
            return (rest - self.world.joined(decode_active(values, active, sae.dec)))[:, None]
        first = self.world.rank * len(sae.enc) if self.world.latent_size > 1 else 0
        parts = decode_active(values, by_level(active, levels, first), sae.dec).view(len(z), len(levels), -1)
        return rest[:, None] - self.world.joined(parts).cumsum(1)

    def _count(self, values: Tensor, active: Active | None, tokens: int) -> Int[Tensor, " d_sae"]:
        """Bring the idle counters and the list of dead latents up to date; return how often each latent fired."""
        fires = (values != 0).long()
        counts = fires.sum(0) if active is None else torch.zeros_like(self.idle).index_add_(0, active.cols, fires)
        counts = self.world.total(counts)
        self.idle = (self.idle + tokens).masked_fill_(counts > 0, 0)
        if self.idle.device.type == "cpu" or self.step % REFRESH == 0:
            self.dead = self._idle_ones()
        return counts

    def _idle_ones(self) -> Int[Tensor, " n_dead"]:
        assert self.cfg.dead_after is not None
        return (self.idle >= self.cfg.dead_after).nonzero().squeeze(1)

    def _any_dead(self) -> bool:
        if self.world.latent_size == 1:
            return len(self.dead) > 0
        return int(self.world.latent_total(torch.tensor(len(self.dead), device=self.idle.device))) > 0

    def _aux(self, z: Tensor, error: Tensor) -> Tensor:
        # dense over the dead columns alone: they are few, and all of them may speak
        sae, dead = self.sae, self.dead
        assert self.cfg.aux_k is not None
        centred = z - sae.dec_bias.detach() if sae.config.centred else z
        pre = F.linear(centred, sae.enc[dead], sae.enc_bias[dead])
        return aux_k_loss(error, pre, sae.dec[dead], self.cfg.aux_k, self.world)

    def _pressure(self) -> Tensor:
        if not self.sae.pressured or self.cfg.sparsity is None:
            return self.pressure
        return self.pressure * min(1.0, (self.step + 1) / max(1, round(self.cfg.warmup * self.cfg.steps)))

    def _steer(self, active: Tensor) -> None:
        """Raise the penalty's coefficient while more latents are active than wanted, and lower it while fewer are.

        What is wanted falls from START_L0 k to k: a dictionary that is not learned yet needs more latents, and forced
        to k it would learn to be silent instead.
        """
        if self.sae.pressured and self.cfg.sparsity is None:
            left = max(0.0, 1 - self.step / (SETTLED * self.cfg.steps))
            wanted = (self.sae.config.k or 1) * START_L0**left
            gap = (active / wanted).clamp_min(1e-3).log().clamp(-1, 1)
            self.pressure = self.pressure * (RATE * gap).exp()

"""The training loop: `train` yields after every step, `fit` is the batteries-included loop around it."""

import hashlib
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.archs import build
from sae.archs.base import SAE
from sae.config import TrainConfig
from sae.data import held_out_mask, load_array, rebatched, shuffled
from sae.formats import load_sae, save_sae
from sae.io import read_json, write_json
from sae.kernels import decode_active, encode_active
from sae.losses import aux_k_loss, reconstruction_loss
from sae.optim import Optimiser
from sae.stats import Moments

DEFAULT_STEPS = 600

__all__ = ["DEFAULT_STEPS", "Run", "Step", "describe", "fit", "train"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step. Numbers that live on the device are read from it when asked for, and only then."""

    step: int
    """Steps done, from 1."""
    tokens: int
    """Tokens seen."""
    lr: float
    """Learning rate of this step."""
    seconds: float
    """Wall time since training began."""
    tensors: dict[str, Tensor]
    """loss, unexplained, active, dead: scalars on the device, before this step's update."""

    @property
    def loss(self) -> float:
        """Training loss: unexplained share of the variance plus AuxK times its weight."""
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
    batches: Iterable[Float[Tensor, "_ d_in"]],
    cfg: TrainConfig,
    *,
    held_out: Float[Tensor, "held d_in"] | None = None,
) -> Generator[Step, None, None]:
    """Train an SAE in place on batches [tok, d_in], and yield a Step after every optimiser step.

    Logging, saving and stopping belong to the caller. When the steps are done, or the caller stops, the threshold is
    calibrated so that the mean L0 at inference is k: on held_out, else on the first init_tokens. Tokens that have been
    trained on several times excite fewer latents than new ones do, so a source of several epochs wants held_out.
    Raises ValueError where there is nothing to learn from, FloatingPointError where loss or weights stop being finite.
    Formulas: Gao et al. (arXiv:2406.04093), Bussmann et al. (arXiv:2412.06410).
    """
    cfg = cfg.resolve(sae.d_in, sae.d_sae)
    source = iter(batches)
    sample = _take(source, cfg.init_tokens, sae)
    loop = _Loop(sae, cfg, sample)
    calibration = sample if held_out is None else [held_out]
    finalizing = sys.is_finalizing  # held here: when the interpreter goes down, globals may be gone before generators
    try:
        for batch in chain(list(sample), source):
            yield loop.advance(batch.to(sae.enc))
            if loop.step == cfg.steps:
                break
    except (GeneratorExit, KeyboardInterrupt):  # stopped from outside: leave an SAE that can be used
        if not finalizing():
            loop.finish(calibration)
        raise
    loop.finish(calibration)
    if loop.step < cfg.steps:
        warnings.warn(f"the source ended after {loop.step} of {cfg.steps} steps; training stopped there", stacklevel=2)


def _take(source: Iterator[Tensor], tokens: int, sae: SAE) -> list[Tensor]:
    sample, count = [], 0
    for batch in source:
        if batch.ndim != 2 or batch.shape[1] != sae.d_in:
            raise ValueError(f"this SAE learns from batches [tok, {sae.d_in}]; given: shape {tuple(batch.shape)}")
        sample.append(batch.to(sae.enc))
        count += len(batch)
        if count >= tokens:
            break
    if count < 2:
        raise ValueError(f"an SAE needs rows to learn from; the source gave {count}")
    return sample


class _Loop:
    """What changes while an SAE is trained."""

    def __init__(self, sae: SAE, cfg: TrainConfig, sample: list[Tensor]) -> None:
        self.sae, self.cfg = sae, cfg
        moments = Moments()
        for batch in sample:
            moments.add(batch)
        value = moments.value()
        if not math.isfinite(value.variance):
            raise ValueError("the activations hold nan or infinity; drop those rows first")
        sae.centre(value.mean.float(), math.sqrt(value.variance))
        self.variance = value.variance * sae.scale.square()
        self.idle = torch.zeros(sae.d_sae, dtype=torch.long, device=sae.enc.device)  # tokens since a latent fired
        self.optimiser = Optimiser(list(sae.parameters()), sae.dec, cfg)
        self.step = self.tokens = 0
        self.start = time.perf_counter()

    def advance(self, batch: Float[Tensor, "tok d_in"]) -> Step:
        """Do one step; no host synchronisation but the one of the dead latents' list."""
        sae, cfg = self.sae, self.cfg
        z = batch * sae.scale
        values, active = encode_active(z, sae.enc, sae.enc_bias, sae.dec_bias, sae.select)
        error = z - sae.dec_bias - decode_active(values, active, sae.dec)
        unexplained = reconstruction_loss(error, self.variance)
        dead = self._count(values, active.cols, len(batch))
        loss = unexplained
        if cfg.aux_weight and len(dead):
            loss = loss + cfg.aux_weight * self._aux(z, error, dead)
        loss.backward()
        lr = self.optimiser.step(self.step)
        self.step += 1
        self.tokens += len(batch)
        tensors = {
            "loss": loss.detach(),
            "unexplained": unexplained.detach(),
            "active": (values.detach() > 0).sum() / len(batch),
            "dead": torch.as_tensor(len(dead) / sae.d_sae),
        }
        if self.step % 100 == 1 and not math.isfinite(float(tensors["loss"])):
            raise FloatingPointError(f"the loss is {float(tensors['loss'])} at step {self.step}; lower the lr")
        seconds = time.perf_counter() - self.start
        return Step(step=self.step, tokens=self.tokens, lr=lr, seconds=seconds, tensors=tensors)

    def _count(self, values: Tensor, cols: Tensor, tokens: int) -> Int[Tensor, " n_dead"]:
        """Bring the idle counters up to date; return the dead latents."""
        fired = torch.zeros_like(self.idle).index_add_(0, cols, (values.detach() > 0).long())
        self.idle = (self.idle + tokens).masked_fill_(fired > 0, 0)
        assert self.cfg.dead_after is not None
        return (self.idle >= self.cfg.dead_after).nonzero().squeeze(1)

    def _aux(self, z: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        # dense over the dead columns alone: they are few, and all of them may speak
        sae = self.sae
        assert self.cfg.aux_k is not None
        pre = (z - sae.dec_bias.detach()) @ sae.enc[dead].t() + sae.enc_bias[dead]
        return aux_k_loss(error, pre, sae.dec[dead], self.cfg.aux_k)

    def finish(self, calibration: list[Tensor]) -> None:
        """Fold the scale and calibrate the threshold. Raises FloatingPointError for weights that are not finite."""
        if not all(bool(torch.isfinite(p).all()) for p in self.sae.parameters()):
            raise FloatingPointError(f"the weights are no longer finite after {self.step} steps; lower the lr")
        self.sae.fold_scale()
        self.sae.calibrate(batch.to(self.sae.enc) for batch in calibration)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run and what came of it."""

    sae: SAE
    log: list[dict[str, int | float]]
    """Numbers of the logged steps, the last step always among them."""
    config: dict[str, Any]
    """Everything that was decided or used: what run.json holds."""


def fit(
    source: Tensor | np.ndarray | str | Path | Iterable[Tensor],
    arch: str = "batchtopk",
    width: int | str = "16x",
    k: int | float = 32,
    *,
    steps: int | None = None,
    tokens: int | None = None,
    batch_size: int = 2048,
    lr: int | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    metadata: dict[str, Any] | None = None,
    log_every: int = 20,
    progress: bool = False,
    on_step: Callable[[Step], object] | None = None,
) -> Run:
    """Train an SAE on activations and return it with its log.

    source: a tensor or array [tok, d_in], a .npy or .safetensors file of one, or an iterable of batches. Rows of an
    array are drawn in a fresh order each epoch, but for 5 % of them, in stripes, on which the threshold is calibrated.
    An iterable is read in its order, again and again if it can be.
    width: the number of latents, or a multiple of d_in such as "16x". The length is steps, or tokens (repeats counted),
    else DEFAULT_STEPS. With out, that folder gets the SAE, run.json and metrics.jsonl; an interrupt (Ctrl-C) saves what
    there is, and goes on upwards. Raises ValueError, MissingError or FormatError, before the first step, for what
    cannot be read or done.
    """
    if steps is not None and tokens is not None:
        raise ValueError("give steps or tokens, not both")
    if steps is None:
        steps = DEFAULT_STEPS if tokens is None else tokens // batch_size
    cfg = TrainConfig(steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    batches, held_out, data = _open(source, batch_size, seed, device)
    first = next(batches, None)
    if first is None:
        raise ValueError(f"the source gave less than one batch of {batch_size} tokens")
    place = device if device is not None else first.device
    d_in = first.shape[1]
    sae = build(arch, d_in=d_in, d_sae=_width(width, d_in), k=k, seed=seed, metadata=metadata).to(place)
    cfg = cfg.resolve(sae.d_in, sae.d_sae)
    log: list[dict[str, int | float]] = []
    config = {
        "sae": asdict(sae.config),
        "train": asdict(cfg),
        "data": data,
        "device": str(place),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    run = Run(sae=sae, log=log, config=config)
    stream = train(sae, chain([first], batches), cfg, held_out=held_out)
    try:
        _follow(stream, run, out, log_every, progress, on_step)
    finally:
        stream.close()
        if out is not None and log:
            _save(run, Path(out))
    return run


def describe(path: str | Path) -> dict[str, Any]:
    """Return what a saved SAE is: sizes, architecture, metadata, weights' norms, and run.json where there is one."""
    sae = load_sae(path)
    run = Path(path) / "run.json"
    return {
        "arch": sae.config.arch,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.config.k,
        "threshold": float(sae.threshold.max()),
        "parameters": sum(p.numel() for p in sae.parameters()),
        "b_dec_norm": float(sae.b_dec.detach().norm()),
        "encoder_decoder_cosine": float(F.cosine_similarity(sae.enc, sae.dec, dim=1).detach().mean()),
        "metadata": sae.config.metadata,
        "run": read_json(run) if run.is_file() else None,
    }


def _open(
    source: Any, batch_size: int, seed: int, device: str | torch.device | None
) -> tuple[Iterator[Tensor], Tensor | None, dict[str, Any]]:
    """Return the batches, the rows kept out of them, and what is known of the data."""
    if not isinstance(source, Tensor | np.ndarray | str | Path):
        return rebatched(source, batch_size), None, {"tokens": None, "held_out": 0, "dtype": None, "sha256": None}
    rows = load_array(source)
    held = held_out_mask(len(rows))
    data = {
        "tokens": len(rows),
        "held_out": int(held.sum()),
        "dtype": str(rows.dtype).removeprefix("torch."),
        "sha256": _fingerprint(rows),
    }
    rows, held = rows.to(device=device), held.to(rows.device if device is None else device)
    generator = torch.Generator().manual_seed(seed + 0x5AE)  # not the stream that draws the weights
    return shuffled(rows[~held], batch_size, generator), rows[held] if bool(held.any()) else None, data


def _fingerprint(rows: Tensor) -> str:
    return hashlib.sha256(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def _width(width: int | str, d_in: int) -> int:
    try:
        return round(float(width[:-1]) * d_in) if isinstance(width, str) and width.endswith("x") else int(width)
    except ValueError:
        raise ValueError(f"width is {width!r}; a number of latents, or a multiple of d_in such as '16x'") from None


def _follow(
    stream: Iterator[Step],
    run: Run,
    out: str | Path | None,
    log_every: int,
    progress: bool,
    on_step: Callable[[Step], object] | None,
) -> None:
    """Drive the training and keep its log."""
    from tqdm import tqdm

    steps = run.config["train"]["steps"]
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    target = os.devnull if out is None else Path(out) / "metrics.jsonl"
    with open(target, "w", encoding="utf-8") as file, tqdm(total=steps, unit="step", disable=not progress) as bar:
        for step in stream:
            if on_step is not None:
                on_step(step)
            bar.update()
            if step.step % log_every and step.step != steps:
                continue
            row = step.as_dict()
            run.log.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.set_postfix_str(f"fve {row['fve']:.3f}, L0 {row['l0']:.1f}, dead {row['dead']:.1%}")


def _save(run: Run, out: Path) -> None:
    save_sae(run.sae, out)
    write_json(out / "run.json", run.config | {"last": run.log[-1]})

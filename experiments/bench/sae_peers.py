"""One way to run any trainer: it pulls batches from a source, and the source stops it. Imports nothing until asked.

Each package runs in its own environment (sae_peers.sh) by its own loop and with its own defaults: SAELens by
`SAETrainer.fit`, sparsify by `Trainer.fit`, dictionary_learning by `trainSAE`. What a job leaves open is the package's.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PACKAGES = {
    "interp": "interp",
    "saelens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
}
ARCHS = {
    "interp": ("relu", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"),
    "saelens": ("relu", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"),
    "sparsify": ("topk",),
    "dictionary_learning": ("relu", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"),
}
DEEP = -20.0  # an encoder bias that no input of norm sqrt(d) overcomes


class Enough(Exception):
    """What a source raises when it wants no further step."""


@dataclass
class Job:
    """What is trained, and handles on it."""

    arch: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int
    """Length that schedules are made for."""
    lr: float | None = None
    """Adam's; None: the package's default. sparsify keeps its signum, whose rates are of another kind (2e-2 at 1,024
    latents): its Adam at 1e-3 ends far below it."""
    seed: int = 0
    late: bool = False
    """Begin as if the warm-ups of threshold and penalty were over: for timing a step in the middle of training."""
    deaden: Callable[[int], None] | None = field(default=None, repr=False)
    """Set by the trainer: makes the first n latents dead, in the weights and in the trainer's own books."""
    last: Any = field(default=None, repr=False)
    """interp: its newest Step, since its steps get cheaper as fewer latents are active."""

    @property
    def levels(self) -> list[int]:
        """Nested widths, for matryoshka."""
        return [self.d_sae // 16, self.d_sae // 4, self.d_sae]


def run(peer: str, job: Job, source: Iterator[Tensor]) -> dict[str, Any]:
    """Train until the source raises Enough; return the weights of the inference form, as arrays for `np.savez`.

    W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc, b_dec, kind ("relu", "gated", "topk", "threshold"), k, centred
    (whether b_dec is taken from the input), threshold (nan: the package has not set one yet), gated: b_mag, r_mag.
    """
    if job.arch not in ARCHS[peer]:
        raise ValueError(f"{peer} has no {job.arch!r}; it has {', '.join(ARCHS[peer])}")
    weights = {"interp": _interp, "saelens": _saelens, "sparsify": _sparsify, "dictionary_learning": _dictionary}
    result = weights[peer](job, source)
    result.setdefault("threshold", 0.0)
    result |= {"k": job.k, "peer": peer, "arch": job.arch}
    return {
        name: value.detach().float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for name, value in result.items()
    }


def versions(peer: str) -> dict[str, str]:
    """Return the versions that matter here."""
    return {peer: version(PACKAGES[peer]), "torch": torch.__version__}


def _saelens(job: Job, source: Iterator[Tensor]) -> dict[str, Any]:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}.get(job.arch, job.arch)
    more: dict[str, Any] = {}
    if job.arch in ("topk", "batchtopk", "matryoshka"):
        more["k"] = job.k
    if job.arch == "matryoshka":
        more["matryoshka_widths"] = job.levels
    torch.manual_seed(job.seed)
    sae_class, config_class = get_sae_training_class(name)
    sae = sae_class(config_class(d_in=job.d_in, d_sae=job.d_sae, device="cpu", **more))
    lr = 3e-4 if job.lr is None else job.lr
    config = SAETrainerConfig(
        total_training_samples=job.steps * job.batch, train_batch_size_samples=job.batch, lr=lr, lr_end=lr / 10
    )  # lr_end as its runner sets it; the constant schedule does not use it
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=source)

    def deaden(n: int) -> None:
        for bias in ("b_enc", "b_gate", "b_mag"):
            if isinstance(getattr(sae, bias, None), nn.Parameter):
                getattr(sae, bias).data[:n] = DEEP
        trainer.n_forward_passes_since_fired[:n] = config.dead_feature_window + 1

    job.deaden = deaden
    with contextlib.suppress(Enough):
        trainer.fit()
    with torch.no_grad():
        return _saelens_weights(job, sae)


def _saelens_weights(job: Job, sae: Any) -> dict[str, Any]:
    kinds = {"relu": "relu", "gated": "gated", "topk": "topk"}
    result = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, "centred": True}
    result["kind"] = kinds.get(job.arch, "threshold")
    if job.arch == "gated":
        return result | {"b_enc": sae.b_gate, "b_mag": sae.b_mag, "r_mag": sae.r_mag}
    result["b_enc"] = sae.b_enc
    if job.arch == "jumprelu":
        result["threshold"] = sae.threshold
    if job.arch in ("topk", "batchtopk", "matryoshka"):  # selection is by f * |W_dec|: folded in, as when it saves
        norms = sae.W_dec.norm(dim=1)
        result |= {"W_enc": sae.W_enc * norms, "b_enc": sae.b_enc * norms, "W_dec": sae.W_dec / norms[:, None]}
    if job.arch in ("batchtopk", "matryoshka"):
        result["threshold"] = float(sae.topk_threshold)
    return result


class _Site(nn.Module):
    """A language model of which sparsify reads one hook point: its output is the next batch."""

    def __init__(self, d_in: int, source: Iterator[Tensor]) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.base_model = self
        self.device = torch.device("cpu")
        self.source, self.d_in = source, d_in
        self.dummy_inputs = {"probe": torch.zeros(1, 1, d_in)}

    def forward(self, tokens: Tensor | None = None, probe: Tensor | None = None) -> SimpleNamespace:
        self.site(next(self.source)[None] if probe is None else probe)
        return SimpleNamespace()


class _Tokens:
    """A dataset of sequences, as long as a batch, whose tokens nobody looks at."""

    def __init__(self, steps: int, batch: int) -> None:
        self.steps, self.item = steps, {"input_ids": torch.zeros(batch, dtype=torch.long)}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.steps:
            raise IndexError(index)
        return self.item


def _sparsify(job: Job, source: Iterator[Tensor]) -> dict[str, Any]:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SaeConfig, TrainConfig, Trainer

    config = TrainConfig(
        SaeConfig(num_latents=job.d_sae, k=job.k),
        batch_size=1, hookpoints=["site"], init_seeds=[job.seed], log_to_wandb=False,
        save_every=job.steps + 2,
    )  # fmt: skip
    # two more than will be asked for: the source ends the run, before the trainer would write files
    trainer = Trainer(config, _Tokens(job.steps + 2, job.batch), _Site(job.d_in, source))
    sae = trainer.saes["site"]

    def deaden(n: int) -> None:
        sae.encoder.bias.data[:n] = DEEP
        trainer.num_tokens_since_fired["site"][:n] = config.dead_feature_threshold + 1

    job.deaden = deaden
    with contextlib.suppress(Enough):
        trainer.fit()
    for optimiser in trainer.optimizers:
        if hasattr(optimiser, "eval"):
            optimiser.eval()  # schedule-free: the weights to keep are the running average, as when it saves
    return {
        "W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec,
        "kind": "topk", "centred": True,
    }  # fmt: skip


def _dictionary(job: Job, source: Iterator[Tensor]) -> dict[str, Any]:
    from dictionary_learning import training
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

    trainer_class = {
        "relu": standard.StandardTrainer,
        "gated": gdm.GatedSAETrainer,
        "topk": top_k.TopKTrainer,
        "batchtopk": batch_top_k.BatchTopKTrainer,
        "jumprelu": jumprelu.JumpReluTrainer,
        "matryoshka": matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
    }[job.arch]
    config: dict[str, Any] = {
        "activation_dim": job.d_in, "dict_size": job.d_sae, "steps": job.steps, "device": "cpu", "layer": 0,
        "lm_name": "none", "seed": job.seed,
    }  # fmt: skip
    if job.lr is not None:
        config["lr"] = job.lr
    # Its defaults are counts of steps: 1,000 of warm-up, 1,000 without a threshold, 2,000 of growing penalty, and it
    # refuses runs that are shorter; so they become shares of the run where that is less.
    config["warmup_steps"] = min(1000, job.steps // 20)
    penalty, threshold = (0, 0) if job.late else (min(2000, job.steps // 10), min(1000, job.steps // 2))
    if job.arch in ("topk", "batchtopk", "matryoshka"):
        config |= {"k": job.k, "threshold_start_step": threshold}
    else:
        config["sparsity_warmup_steps"] = penalty
    if job.arch == "jumprelu":
        config["target_l0"] = float(job.k)
    if job.arch == "matryoshka":
        config["group_fractions"] = [1 / 16, 3 / 16, 3 / 4]
    made = []

    def make(**settings: Any) -> Any:
        torch.manual_seed(job.seed)  # JumpReLU and matryoshka do not do it themselves
        made.append(trainer_class(**settings))
        return made[0]

    def deaden(n: int) -> None:
        sae = made[0].ae
        for bias in ("b_enc", "gate_bias", "mag_bias"):
            if hasattr(sae, bias):
                getattr(sae, bias).data[:n] = DEEP
        if hasattr(sae, "encoder") and sae.encoder.bias is not None:
            sae.encoder.bias.data[:n] = DEEP
        if hasattr(made[0], "num_tokens_since_fired"):
            made[0].num_tokens_since_fired[:n] = made[0].dead_feature_threshold + 1

    job.deaden = deaden
    with contextlib.suppress(Enough):
        training.trainSAE(source, [{"trainer": make, **config}], steps=job.steps + 1, device="cpu")
    return _dictionary_weights(job, made[0].ae)


def _dictionary_weights(job: Job, sae: Any) -> dict[str, Any]:
    if hasattr(sae, "encoder"):
        result = {"W_enc": sae.encoder.weight.T, "W_dec": sae.decoder.weight.T, "b_enc": sae.encoder.bias}
    else:
        result = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc}
    biases = {"relu": "bias", "gated": "decoder_bias"}
    result["b_dec"] = getattr(sae, biases.get(job.arch, "b_dec"))
    result["centred"] = job.arch != "jumprelu"
    result["kind"] = {"relu": "relu", "gated": "gated", "topk": "topk"}.get(job.arch, "threshold")
    if job.arch == "gated":
        result |= {"b_enc": sae.gate_bias, "b_mag": sae.mag_bias, "r_mag": sae.r_mag}
    if job.arch == "jumprelu":
        result["threshold"] = sae.threshold
    if job.arch in ("batchtopk", "matryoshka"):
        result["threshold"] = float(sae.threshold) if float(sae.threshold) >= 0 else float("nan")
    return result


def _interp(job: Job, source: Iterator[Tensor]) -> dict[str, Any]:
    import sae as package
    from sae import TrainConfig

    levels = job.levels if job.arch == "matryoshka" else []
    sae = package.build(job.arch, d_in=job.d_in, d_sae=job.d_sae, k=job.k, levels=levels, seed=job.seed)
    more: dict[str, Any] = {"init_tokens": min(65_536, job.steps * job.batch)}
    if job.late:  # full learning rate; dead is what has not fired in five batches, and all that can fire do
        more = {"init_tokens": job.batch, "dead_after": 5 * job.batch, "warmup": 0.0, "decay": 0.0}
    config = TrainConfig(steps=job.steps, batch_size=job.batch, lr=job.lr, seed=job.seed, **more)

    @torch.no_grad()
    def deaden(n: int) -> None:
        sae.enc_bias[:n] = DEEP

    job.deaden = deaden
    with contextlib.suppress(Enough):
        for step in package.train(sae, source, config):
            job.last = step
    result = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    kind = job.arch if job.arch in ("gated", "topk") else "threshold"
    result |= {"kind": kind, "centred": sae.config.centred, "threshold": sae.threshold}
    return result | ({"b_mag": sae.b_mag, "r_mag": sae.r_mag} if job.arch == "gated" else {})

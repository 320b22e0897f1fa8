"""Runs: `fit` trains one SAE and `sweep` several on the same batches, with logs, checkpoints and exact resume."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sae.dist import ALONE, World
from sae.formats import load_sae
from sae.io import read_json
from sae.session import DEFAULT_STEPS, Run, Session
from sae.training import Step

__all__ = ["DEFAULT_STEPS", "Run", "describe", "fit", "grid", "sweep", "table"]


def fit(
    source: Any,
    arch: str = "batchtopk",
    width: int | str = "16x",
    k: int | float = 32,
    *,
    hook: str | Sequence[str] | None = None,
    target: str | None = None,
    skip: bool = False,
    levels: Sequence[int] = (),
    steps: int | None = None,
    tokens: int | None = None,
    batch_size: int = 2048,
    lr: int | float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    metadata: dict[str, Any] | None = None,
    log_every: int = 20,
    checkpoint_every: int | None = None,
    progress: bool = False,
    track: str | None = None,
    on_step: Callable[[Step], object] | None = None,
    world: World = ALONE,
    **options: Any,
) -> Run:
    """Train an SAE on activations and return it with its log.

    source: a tensor or array [tok, d_in] or [tok, n_sites, d], a .npy or .safetensors file of one, a store of
    activations or a model's stream of them, or an iterable of batches (pairs of input and target for a transcoder).
    Rows of an array are drawn in a fresh order each epoch, but for 5 % of them, in stripes, on which the threshold is
    calibrated. An iterable is read in its order, again and again if it can be.
    Of a store, `hook` names the hook point; several make a crosscoder, and `target` makes a transcoder.
    width: the number of latents, or a multiple of d_in such as "16x". The length is steps, or tokens (repeats counted),
    else DEFAULT_STEPS. `options` are fields of TrainConfig (normalize, sparsity, aux_weight, ...).

    With out, that folder gets the SAE, run.json, metrics.jsonl and, every `checkpoint_every` steps (None: 1,000 steps
    or 10 minutes), a checkpoint. The same call goes on from the last one after any kind of end, and its weights are bit
    for bit those of an undisturbed run (one process, same machine and versions; an iterable must give the same batches
    again). Ctrl-C saves at the next step, leaves a usable SAE, and goes on upwards. A run that is finished is returned
    as it is. Raises ValueError, MissingError or FormatError, before the first step, for what cannot be read or done,
    and where out holds another run.
    """
    one = {"arch": arch, "width": width, "k": k, "hook": hook, "target": target, "skip": skip, "levels": levels,
           "lr": lr, "seed": seed, **options}  # fmt: skip
    session = Session(
        source, {"": one}, steps=steps, tokens=tokens, batch_size=batch_size, data_seed=seed, out=out, device=device,
        metadata=metadata, world=world,
    )  # fmt: skip
    return session.run(log_every, checkpoint_every, progress, track, on_step)[0]


def sweep(
    source: Any,
    variants: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]],
    *,
    steps: int | None = None,
    tokens: int | None = None,
    batch_size: int = 2048,
    seed: int = 0,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    metadata: dict[str, Any] | None = None,
    log_every: int = 20,
    checkpoint_every: int | None = None,
    progress: bool = False,
    track: str | None = None,
    on_step: Callable[[Step], object] | None = None,
    world: World = ALONE,
) -> list[Run]:
    """Train several SAEs in one pass over the activations, each batch shared by all of them.

    variants: what differs, as arguments of `fit` (arch, width, k, hook, target, skip, levels, lr, seed and the fields
    of TrainConfig), by name or named by what differs; `grid` makes them. With out, each gets a folder of its name.
    Everything else is as in `fit`; `table` lays the results side by side.
    """
    named = variants if isinstance(variants, Mapping) else _named(variants)
    if not named:
        raise ValueError("a sweep needs at least one variant")
    session = Session(
        source, named, steps=steps, tokens=tokens, batch_size=batch_size, data_seed=seed, out=out, device=device,
        metadata=metadata, world=world,
    )  # fmt: skip
    return session.run(log_every, checkpoint_every, progress, track, on_step)


def grid(**values: Any) -> list[dict[str, Any]]:
    """Return every combination of the given values: grid(arch=["topk", "batchtopk"], k=[16, 32]) has four."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [dict(zip(lists, combination, strict=True)) for combination in itertools.product(*lists.values())]


def table(runs: Sequence[Run]) -> str:
    """Return the results of runs as lines of text, one run a line."""
    columns = ("fve", "l0", "dead", "dense", "nmse", "cosine")
    width = max(4, *(len(run.name) for run in runs))
    lines = [f"{'run':<{width}} " + " ".join(f"{name:>8}" for name in columns)]
    for run in runs:
        lines.append(f"{run.name:<{width}} " + " ".join(f"{run.result[name]:8.4g}" for name in columns))
    return "\n".join(lines)


def describe(path: str | Path) -> dict[str, Any]:
    """Return what a saved SAE is: sizes, architecture, metadata, weights' norms, and run.json where there is one."""
    sae = load_sae(path)
    run = Path(path) / "run.json"
    cosine = None
    if sae.d_in == sae.d_out:
        cosine = float(F.cosine_similarity(sae.W_enc.t(), sae.W_dec, dim=1).detach().mean())
    config = sae.config
    return {
        "arch": config.arch,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "d_out": config.d_out,
        "n_sites": config.n_sites,
        "levels": list(config.levels),
        "k": config.k,
        "threshold": float(sae.threshold.max()),
        "parameters": sum(p.numel() for p in sae.parameters()),
        "b_dec_norm": float(sae.b_dec.detach().norm()),
        "encoder_decoder_cosine": cosine,
        "metadata": config.metadata,
        "run": read_json(run) if run.is_file() else None,
    }


def _named(variants: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return variants by what differs between them."""
    keys = list(dict.fromkeys(key for variant in variants for key in variant))
    varied = [key for key in keys if len({str(variant.get(key)) for variant in variants}) > 1] or keys[:1]
    names = ["-".join(_label(key, variant[key]) for key in varied if key in variant) for variant in variants]
    if len(set(names)) < len(names):
        raise ValueError(f"two variants of the sweep are the same: {', '.join(names)}")
    return dict(zip(names, variants, strict=True))


def _label(key: str, value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if key in ("arch", "hook") else f"{key}{text}"

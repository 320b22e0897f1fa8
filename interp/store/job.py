"""What a harvest is, in every detail that makes two of them the same; and which part of it a process does."""

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

import interp
from interp.acts.rows import Exclude, keep_mask, parse_exclude
from interp.model import tokens as tok
from interp.model.hooks import expand
from interp.model.loading import Model
from interp.store.plan import Cut
from interp.store.writer import DTYPES
from sae.io import atomic_write

DEFAULT_CTX = 512


@dataclass(frozen=True)
class Job:
    """A harvest in every detail: `settings` is what makes two of them the same."""

    model: Model
    hooks: list[str]
    exclude: Exclude
    cut: Cut
    settings: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The type that values are stored in."""
        return DTYPES[self.settings["dtype"]]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the store, all hook points and columns together."""
        widths = sum(self.model.hook_point(h).d for h in self.hooks)
        return widths * self.dtype.itemsize + 4 * len(self.hooks) + 12


def describe(
    model: Model,
    hooks: str | Iterable[str],
    *,
    tokens: int | None,
    dtype: torch.dtype | str | None,
    ctx: int | None,
    batch_size: int,
    packing: str | None,
    exclude: Sequence[str],
    add_bos: bool,
    separate: bool,
    shard_mb: float | int,
    covariance: bool,
) -> Job:
    """Return the job that the options of harvest_acts describe; raises ValueError for one that cannot be."""
    names = expand(model, hooks)
    kept = parse_exclude(exclude)
    stored = str(dtype or model.dtype).removeprefix("torch.")
    ctx = min(model.n_ctx, DEFAULT_CTX) if ctx is None else ctx
    packing = packing or ("joined" if model.is_causal else "documents")
    if stored not in DTYPES:
        raise ValueError(f"dtype is {stored!r}; a store holds one of: {', '.join(DTYPES)}")
    if ctx > model.n_ctx:
        raise ValueError(f"ctx is {ctx}, {model.name} takes at most {model.n_ctx} tokens")
    for name, value in {"tokens": tokens, "ctx": ctx, "batch_size": batch_size, "shard_mb": shard_mb}.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if packing not in tok.PACKINGS:
        raise ValueError(f"packing is {packing!r}; it must be one of: {', '.join(tok.PACKINGS)}")
    points = [model.hook_point(name) for name in names]
    row = sum(p.d for p in points) * DTYPES[stored].itemsize
    settings = {
        "format": 1,
        **settings_now(model),
        "hooks": [{"name": p.name, "kind": p.kind, "layer": p.layer, "d": p.d} for p in points],
        "dtype": stored,
        "tokens": tokens,
        "ctx": ctx,
        "batch_size": batch_size,
        "batches_per_shard": max(1, round(shard_mb * 2**20 / (row * ctx * batch_size))),
        "packing": packing,
        "add_bos": add_bos,
        "separate": separate,
        "exclude": list(kept.names()),
        "covariance": covariance,
    }
    return job_of(model, settings)


def settings_now(model: Model) -> dict[str, Any]:
    """Return the settings that follow from model, tokenizer and machine alone."""
    return {
        "model": {
            "name": model.name,
            "class": type(model.hf).__name__,
            "fingerprint": model.fingerprint,
            "backend": model.backend,
            "dtype": str(model.dtype).removeprefix("torch."),
            "n_layers": model.n_layers,
        },
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "machine": _machine(model),
    }


def job_of(model: Model, settings: dict[str, Any]) -> Job:
    """Return the job of settings that a store holds."""
    exclude = parse_exclude(settings["exclude"])
    return Job(model, [h["name"] for h in settings["hooks"]], exclude, _cut(model, exclude, settings), settings)


def _cut(model: Model, exclude: Exclude, settings: dict[str, Any]) -> Cut:
    """Return how text is cut into windows by the settings."""
    masked, ctx = settings["packing"] == "masked", settings["ctx"]
    special, bos, fill = model.special_ids, model.bos_id, tok.pad_id(model.tokenizer)
    options = {name: settings[name] for name in ("packing", "add_bos", "separate")}

    def keep(batch: tok.Packed) -> Bool[Tensor, "b t"]:
        places = batch.positions if masked else None
        return keep_mask(batch.ids, batch.mask, exclude, special_ids=special, bos_id=bos, positions=places)

    return Cut(
        windows=lambda documents: tok.windows(model.tokenizer, documents, ctx, **options),
        collate=lambda rows: tok.collate(rows, ctx, fill=fill, special_ids=special, masked=masked),
        keep=keep,
        batch_size=settings["batch_size"],
        batches_per_shard=settings["batches_per_shard"],
        tokens=settings["tokens"],
    )


def _machine(model: Model) -> dict[str, Any]:
    """Return what may change the last bits of a value."""
    device = model.device
    packages = ["torch", "transformers", "tokenizers", *["transformer-lens"] * (model.backend == "transformer_lens")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} {name}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "attention": getattr(model.hf.config, "_attn_implementation", None),
        "interp": interp.__version__,
        **{package: version(package) for package in packages},
    }


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Return 16 hex digits that name what a tokenizer does (vocabulary, merges, rules, special tokens)."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    for passing in ("truncation", "padding"):  # of the last call, not of the tokenizer
        rules.pop(passing, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tok.special_ids_of(tokenizer))]
    return hashlib.sha256(json.dumps([rules, special], sort_keys=True).encode()).hexdigest()[:16]


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files, each atomically."""
    with TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            atomic_write(folder / path.name, path.read_bytes())


def who_am_i(rank: int | None = None, world_size: int | None = None) -> tuple[int, int, str]:
    """Return rank, number of processes, and where that is known from.

    What is given, else RANK and WORLD_SIZE (torchrun, accelerate), else SLURM_PROCID and SLURM_NTASKS, else the task of
    a SLURM array, else 0 of 1.
    """
    env = os.environ
    if rank is not None or world_size is not None:
        found = (rank or 0, world_size or 1, "given")
    elif "RANK" in env and "WORLD_SIZE" in env:
        found = (int(env["RANK"]), int(env["WORLD_SIZE"]), "RANK, WORLD_SIZE")
    elif int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        found = (int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), "SLURM_PROCID, SLURM_NTASKS")
    elif "SLURM_ARRAY_TASK_ID" in env and "SLURM_ARRAY_TASK_COUNT" in env:
        step = int(env.get("SLURM_ARRAY_TASK_STEP", "1"))
        first = int(env.get("SLURM_ARRAY_TASK_MIN", "0"))
        at = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // step
        found = (at, int(env["SLURM_ARRAY_TASK_COUNT"]), "SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT")
    else:
        found = (0, 1, "one process")
    if not 0 <= found[0] < found[1]:
        raise ValueError(f"rank {found[0]} of {found[1]} processes ({found[2]}): ranks count from 0 below world_size")
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return in words how two tables of settings differ."""
    found: list[str] = []
    for key in sorted(there.keys() | here.keys()):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} is {json.dumps(a)} there and {json.dumps(b)} here")
    return found


def local_device(device: str) -> str:
    """Return the device of this process: under a launcher, "auto" is the GPU of its LOCAL_RANK."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
    if device != "auto" or not local.isdigit() or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"

"""Direction: a unit vector at a hook point, its unit of strength, and where it came from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from interp.model.hooks import HookPointError, canonical_name, reading
from interp.model.loading import Model, as_model
from interp.model.tokens import TokenBatch, pad_rows
from sae.io import FormatError, load_tensors, save_tensors

__all__ = ["Direction", "DirectionError", "residual_norm"]

NORM_TEXTS, NORM_WIDTH = 64, 64  # texts and tokens a text that the unit of strength is measured on
FEW_TOKENS = 100  # below it a tokenizer does not know the bundled text, and random ids stand in
_NORMS: dict[tuple[str, str, bool], float] = {}
_KIND = "interp direction"


class DirectionError(ValueError):
    """A direction does not belong to the model or hook point that it is to be used on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """A unit vector in the space of one hook point, and where it came from.

    One fitted on arrays alone has model "" and norm None; `for_model(model, hook=..., force=True)` gives it both.
    """

    vector: Float[Tensor, " d"]  # unit length, float32, on the CPU
    hook: str  # TransformerLens alias; "" where it is not known
    method: str
    scale: float  # length before normalising, in residual-stream units
    norm: float | None  # median residual norm at the hook point, BOS excluded: the unit of strength
    model: str  # fingerprint of the model it belongs to; another refuses it unless forced
    negative: float | None = None  # mean projection of the two classes of the fitting data, in residual-stream units
    positive: float | None = None
    data: str = ""  # fingerprint of the fitting data
    seed: int | None = None
    forced_from: str = ""  # fingerprint of the model it was fitted on, where it was forced onto another
    versions: Mapping[str, str] = field(default_factory=lambda: versions())

    def __post_init__(self) -> None:
        vector = self.vector.detach().to("cpu", torch.float32, copy=True)
        length = float(vector.double().norm())
        if not abs(length - 1) < 1e-4:
            raise ValueError(f"a direction's vector has length 1, this one has {length:.6g}; divide by it")
        if self.norm is not None and not 0 < self.norm < float("inf"):
            raise ValueError(f"the residual norm is {self.norm}; it must be positive and finite")
        object.__setattr__(self, "vector", vector)
        object.__setattr__(self, "versions", MappingProxyType(dict(self.versions)))

    def project(self, X: Float[Tensor, "n d"] | Float[np.ndarray, "n d"]) -> Float[Tensor, " n"]:
        """Return the coordinate of each row along the direction, in residual-stream units (float64)."""
        return as_rows(X).double() @ self.vector.double()

    def for_model(self, model: Any, *, hook: str | None = None, force: bool = False) -> "Direction":
        """Return the direction for use on a model, refusing a model or hook point that it was not fitted on.

        With `force` it is taken over: the unit of strength is measured anew there, and `forced_from` keeps the origin.
        Raises DirectionError for another fingerprint or hook point (not when forced), and always for another width or
        a hook point that the model lacks.
        """
        model = as_model(model)
        wanted = hook or self.hook
        try:
            point = model.hook_point(wanted)
        except HookPointError as error:
            raise DirectionError(f"this direction cannot be used on {model.name}: {error}") from error
        if point.d != len(self.vector):
            raise DirectionError(
                f"this direction has width {len(self.vector)}, {point.name} of {model.name} has {point.d}: "
                "fit one on that hook point"
            )
        fingerprint = model.fingerprint
        wrong = []
        if self.model != fingerprint:
            origin = f"model {self.model}" if self.model else "arrays of no known model"
            wrong.append(f"it was fitted on {origin}, and {model.name} is {fingerprint}")
        if self.hook != point.name:
            wrong.append(f"it was fitted at {self.hook or 'no known hook point'}, not at {point.name}")
        if not wrong:
            return self
        if not force:
            raise DirectionError(f"this direction is refused: {' and '.join(wrong)}; force=True uses it all the same")
        origin = self.forced_from or self.model
        norm = residual_norm(model, point.name)
        return replace(self, model=fingerprint, hook=point.name, norm=norm, forced_from=origin)

    def meta(self) -> dict[str, Any]:
        """Return every field but the vector, as JSON holds them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "vector"} | {
            "versions": dict(self.versions)
        }

    @classmethod
    def from_meta(cls, vector: Shaped[Tensor, "..."], meta: Mapping[str, Any]) -> "Direction":
        """Return the direction of a file's vector and metadata. Raises FormatError where they make none."""
        if vector.ndim != 1 or not _sound(meta):
            raise FormatError("the vector or the metadata of a direction is not of the expected form")
        try:
            return cls(vector=vector.float(), **meta)
        except (TypeError, ValueError) as error:
            raise FormatError(f"this is no sound direction: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the direction as safetensors with JSON metadata, atomically."""
        save_tensors(path, {"vector": self.vector}, {"kind": _KIND, **self.meta()})

    @classmethod
    def load(cls, path: str | Path, model: Any = None, *, force: bool = False) -> "Direction":
        """Read a direction; with a model, refuse it as `for_model` does.

        Raises MissingError where the file is absent, FormatError where it is no sound direction, DirectionError.
        """
        tensors, meta = load_tensors(path)
        if meta.pop("kind", None) != _KIND or set(tensors) != {"vector"}:
            raise FormatError(f"{path} holds no direction: kind {_KIND!r} with one tensor 'vector' is expected")
        direction = cls.from_meta(tensors["vector"], meta)
        return direction if model is None else direction.for_model(model, force=force)


def direction_from(vector: Shaped[Tensor, " d"], *, hook: str | None, model: Any, **provenance: Any) -> Direction:
    """Return a raw vector as a Direction: normalised, its length kept as scale, its unit measured on the model.

    Without a model the unit is unknown. Raises ValueError for a model without a hook point, a zero vector, or one that
    is not finite; DirectionError for another width than the hook point's.
    """
    raw = vector.detach().to("cpu", torch.float64)
    length = float(raw.norm())
    if not 0 < length < float("inf"):
        raise ValueError(f"a vector of length {length} has no direction")
    given: dict[str, Any] = {"vector": (raw / length).float(), "scale": length, **provenance}
    if model is None:
        return Direction(hook=(canonical_name(hook) or hook) if hook else "", model="", norm=None, **given)
    if hook is None:
        raise ValueError("a direction of a model lies at a hook point: pass hook='resid_post.2' or the like")
    model = as_model(model)
    point = model.hook_point(hook)
    if point.d != len(raw):
        raise DirectionError(f"the vector has width {len(raw)}, {point.name} of {model.name} has {point.d}")
    return Direction(hook=point.name, model=model.fingerprint, norm=residual_norm(model, point.name), **given)


def residual_norm(model: Any, hook: str) -> float:
    """Return the median Euclidean norm of the values at a hook point: the unit of steering strength.

    Measured on bundled generated text, or on random ids where the model has no tokenizer or one that does not know
    that text. Pads, specials and the first token of each row (BOS, or the attention sink in its place) are left out.
    Kept in memory by fingerprint and hook point. Call it outside any steering context.
    """
    model = as_model(model)
    point = model.hook_point(hook)
    key = (model.fingerprint, point.name, model.tokenizer is None)
    if key not in _NORMS:
        batch = _norm_batch(model)
        keep = _counted(batch)
        norms: list[Tensor] = []
        for rows in torch.arange(len(keep)).split(16):

            def note(name: str, value: Tensor, rows: Tensor = rows) -> None:
                norms.append(value.detach().float().norm(dim=-1).cpu()[keep[rows]])

            with reading(model, [point.name], note):
                model.run(batch.ids[rows], batch.mask[rows])
        _NORMS[key] = float(np.median(torch.cat(norms).numpy()))
    return _NORMS[key]


def _norm_batch(model: Model) -> TokenBatch:
    width = min(NORM_WIDTH, model.n_ctx)
    if model.tokenizer is not None:
        from interp.data.generator import sample_texts

        batch = model.tokenize(sample_texts(NORM_TEXTS, 0), max_len=width)
        if int(_counted(batch).sum()) >= FEW_TOKENS:
            return batch
    special = model.special_ids
    allowed = torch.tensor([i for i in range(model.d_vocab) if i not in special])
    draws = torch.randint(len(allowed), (NORM_TEXTS, width), generator=torch.Generator().manual_seed(0))
    return pad_rows(allowed[draws].tolist(), special_ids=special)


def _counted(batch: TokenBatch) -> Tensor:
    keep = batch.mask & ~batch.special
    keep[:, 0] = False
    return keep


def as_rows(X: Tensor | np.ndarray) -> Tensor:
    """Return an array of rows as a tensor on the CPU. Raises ValueError unless it is finite and [n, d]."""
    rows = X.detach().cpu() if isinstance(X, Tensor) else torch.from_numpy(np.ascontiguousarray(X))
    if rows.ndim != 2 or not rows.is_floating_point() or 0 in rows.shape:
        raise ValueError(f"rows are a float array [n, d], {rows.dtype} {tuple(rows.shape)} was given")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("a value of the rows is nan or infinite")
    return rows


def data_fingerprint(X: Tensor, y: np.ndarray) -> str:
    """Return 16 hex digits that name rows (as float32) and labels."""
    digest = hashlib.sha256(f"{tuple(X.shape)}".encode())
    digest.update(X.float().contiguous().numpy().tobytes())
    digest.update(np.ascontiguousarray(y, dtype=np.int8).tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of what a result was computed with."""
    found = {"torch": str(torch.__version__), "numpy": np.__version__}
    try:
        return {"interp": version("interp"), **found}
    except PackageNotFoundError:  # run from a checkout that is not installed
        return found


def _sound(meta: Mapping[str, Any]) -> bool:
    """Whether the metadata of a file has the types of the fields (json gives any)."""

    def real(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    texts = [meta.get(k, "") for k in ("hook", "method", "model", "data", "forced_from")]
    numbers = [meta.get(k) for k in ("norm", "negative", "positive")]
    seed, seen = meta.get("seed"), meta.get("versions", {})
    return (
        all(isinstance(v, str) for v in texts)
        and real(meta.get("scale"))
        and all(v is None or real(v) for v in numbers)
        and (seed is None or type(seed) is int)
        and isinstance(seen, dict)
        and all(isinstance(v, str) for v in seen.values())
    )

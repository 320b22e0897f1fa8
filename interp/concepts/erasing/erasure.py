"""Erase a concept from rows: least-squares erasure (LEACE), its oracle form, orthogonal projection; frozen erasers."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from interp.acts.direction import Direction, DirectionError, as_rows, versions
from interp.concepts.erasing.moments import JointMoments, concept_columns, shrunk
from interp.concepts.steering.operations import Operation, low_rank
from interp.concepts.steering.positions import Positions
from interp.model.loading import as_model
from sae.io import FormatError, load_tensors, save_tensors

__all__ = [
    "Eraser",
    "LeaceFitter",
    "OracleEraser",
    "fit_leace",
    "fit_oracle",
    "fit_projection",
    "load_eraser",
    "project_out",
]

Rows: TypeAlias = Shaped[Tensor, "n d"] | Shaped[np.ndarray, "n d"]
Values: TypeAlias = Shaped[Tensor, "*rows d"] | Shaped[np.ndarray, "*rows d"]
_KIND = "interp eraser"
SVD_TOL = 0.01  # canonical correlations (about) below it are taken for noise


@dataclass(frozen=True, kw_only=True, eq=False)
class Eraser:
    """The affine map x - left right (x - centre), of low rank: what it takes out is linearly unreadable after.

    One fitted on arrays alone has model "" and is refused by every model unless forced.
    """

    form: ClassVar[str] = "affine"
    left: Float[Tensor, "d k"]  # float64; its columns span what is taken out
    right: Float[Tensor, "k d"]  # float64; right @ left is the identity
    centre: Float[Tensor, " d"]  # the mean of the fitting rows, which the map keeps; zero for a plain projection
    method: str
    hook: str = ""
    model: str = ""  # fingerprint of the model that the rows come from
    data: str = ""  # fingerprint of the fitting rows and concept
    n: int = 0  # fitting rows
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        _freeze(self, ("left", "right", "centre"))
        d, k = self.left.shape
        if self.right.shape != (k, d) or self.centre.shape != (d,):
            shapes = [tuple(t.shape) for t in (self.left, self.right, self.centre)]
            raise ValueError(f"left, right and centre of an eraser are [d, k], [k, d] and [d]; they are {shapes}")

    @property
    def rank(self) -> int:
        """The number of dimensions taken out."""
        return self.left.shape[1]

    @property
    def d(self) -> int:
        """The width of the rows."""
        return self.left.shape[0]

    def apply(self, X: Values) -> Shaped[Tensor, "*rows d"]:
        """Return erased rows, in the dtype and on the device of X (computed in float64)."""
        rows = _given(X, self.d)
        wide = rows.double()
        left, right, centre = (t.to(rows.device) for t in (self.left, self.right, self.centre))
        return (wide - (wide - centre) @ right.T @ left.T).to(rows.dtype)

    def operation(self, positions: Positions = "default", *, strength: float | int = 1.0) -> Operation:
        """Return the erasure as a steering operation at the eraser's hook point; refuse other models by for_model."""
        if not self.hook:
            raise ValueError("this eraser knows no hook point: for_model(model, hook='resid_post.6', force=True)")
        A, B, bias = -self.right.T.float(), self.left.T.float(), (self.right @ self.centre).float()
        return low_rank(A, B, self.hook, bias, strength, positions)

    def for_model(self, model: Any, *, hook: str | None = None, force: bool = False) -> "Eraser":
        """Return the eraser for use on a model; raises DirectionError for another model or hook unless forced."""
        model = as_model(model)
        point = model.hook_point(hook or self.hook)
        if point.d != self.d:
            raise DirectionError(f"the eraser has width {self.d}, {point.name} of {model.name} has {point.d}")
        if (self.model, self.hook) == (model.fingerprint, point.name):
            return self
        if not force:
            raise DirectionError(
                f"this eraser was fitted at {self.hook or 'no known hook point'} of model {self.model or 'unknown'}, "
                f"not at {point.name} of {model.fingerprint}; force=True uses it all the same"
            )
        return replace(self, model=model.fingerprint, hook=point.name)

    def save(self, path: str | Path) -> None:
        """Write the eraser as safetensors with JSON metadata, atomically."""
        _save(self, path, {"left": self.left, "right": self.right, "centre": self.centre})


@dataclass(frozen=True, kw_only=True, eq=False)
class OracleEraser:
    """The map x - left (z - centre), which needs the concept z of each row: the least change that erases at all.

    It takes out of each row what its label predicts of it (the residual of a regression on the label).
    """

    form: ClassVar[str] = "oracle"
    left: Float[Tensor, "d k"]  # float64; change of a row with each column of the concept
    centre: Float[Tensor, " k"]  # mean of the concept's columns
    classes: tuple[Any, ...] | None = None  # of labels that were turned into columns
    method: str = "oracle"
    hook: str = ""
    model: str = ""
    data: str = ""
    n: int = 0
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        _freeze(self, ("left", "centre"))
        object.__setattr__(self, "classes", None if self.classes is None else tuple(self.classes))
        if self.centre.shape != self.left.shape[1:]:
            shapes = [tuple(t.shape) for t in (self.left, self.centre)]
            raise ValueError(f"left and centre of an oracle eraser are [d, k] and [k]; they are {shapes}")

    @property
    def d(self) -> int:
        """The width of the rows."""
        return self.left.shape[0]

    def apply(self, X: Rows, z: Any) -> Shaped[Tensor, "n d"]:
        """Return erased rows, given the concept of each: labels or numbers as in the fit."""
        rows = _given(X, self.d)
        columns, _ = concept_columns(z, self.classes, len(rows))
        if columns.shape[1] != len(self.centre):
            raise ValueError(f"the concept has {columns.shape[1]} columns, the eraser was fitted on {len(self.centre)}")
        return (rows.double() - ((columns - self.centre) @ self.left.T).to(rows.device)).to(rows.dtype)

    def save(self, path: str | Path) -> None:
        """Write the eraser as safetensors with JSON metadata, atomically."""
        _save(self, path, {"left": self.left, "centre": self.centre})


class LeaceFitter:
    """Gather what LEACE needs, batch by batch in float64; `value()` is the frozen eraser (arXiv:2306.03819).

    `classes` names the labels of a concept that is given as labels. Without it the concept is given as numbers: one a
    row (0 and 1, or any real number), or [n, k].
    """

    def __init__(self, classes: Sequence | None = None):
        self.classes = None if classes is None else tuple(classes)
        self._moments = JointMoments()
        self._digests: list[str] = []

    def add(self, X: Rows, z: Any) -> "LeaceFitter":
        """Take in rows and their concept; returns self. Raises ValueError for other widths or values."""
        rows = as_rows(X)
        columns, _ = concept_columns(z, self.classes, len(rows))
        self._moments.add(rows, columns)
        self._digests.append(fingerprint(rows, columns))
        return self

    def merge(self, other: "LeaceFitter") -> "LeaceFitter":
        """Take in what another fitter has seen; returns self."""
        if self.classes != other.classes:
            raise ValueError(f"the fitters have classes {self.classes} and {other.classes}; they must be the same")
        self._moments.merge(other._moments)
        self._digests += other._digests
        return self

    def value(
        self,
        *,
        shrinkage: bool = True,
        svd_tol: float = SVD_TOL,
        constrain_trace: bool = True,
        hook: str | None = None,
        model: Any = None,
    ) -> Eraser:
        """Return the LEACE eraser of all rows seen: the least change, in every inner product, that guards the concept.

        Left singular vectors U of the whitened cross-covariance W S_xz (columns of z in units of their deviation) with
        singular values above `svd_tol` give left = W^-1 U and right = U' W. `shrinkage`: W from the covariance shrunk
        towards a sphere (Bodnar et al., arXiv:1308.2608), for few rows in many dimensions. `constrain_trace`: where
        the total variance of the fitting rows would grow, which only shrinkage can bring about, the map is mixed with
        the orthogonal projection off the same subspace, so that it stays and the guarantee holds.
        Raises ValueError for fewer than two rows or a concept that does not vary.
        """
        if not svd_tol > 0:
            raise ValueError(f"svd_tol is {svd_tol}; it must be positive: rounding leaves no singular value at 0")
        mean, xx, xz, _ = self._moments.value()
        n = self._moments.n
        covariance = shrunk(xx, n) if shrinkage else xx * (n / (n - 1))
        whiten, unwhiten = _roots(covariance)
        u, s, _ = torch.linalg.svd(whiten @ (xz * (n / (n - 1))), full_matrices=False)
        u = u[:, s > svd_tol]
        left, right = unwhiten @ u, u.T @ whiten
        if constrain_trace:
            right = _bounded(left, right, xx)
        options = {"shrinkage": shrinkage, "svd_tol": svd_tol, "constrain_trace": constrain_trace}
        return self._eraser(left, right, mean, "leace", options, hook, model)

    def projection(self, *, svd_tol: float = 1e-6, hook: str | None = None, model: Any = None) -> Eraser:
        """Return the orthogonal projection off the span of the cross-covariance: it guards too, and changes more.

        `svd_tol` is relative to the largest singular value.
        """
        mean, _, xz, _ = self._moments.value()
        u, s, _ = torch.linalg.svd(xz, full_matrices=False)
        u = u[:, s > svd_tol * s[0]]
        return self._eraser(u, u.T, mean, "projection", {"svd_tol": svd_tol}, hook, model)

    def oracle(self, *, hook: str | None = None, model: Any = None) -> OracleEraser:
        """Return the oracle eraser of all rows seen: S_xz S_zz^+ (z - mean) is taken out of each row."""
        _, _, xz, zz = self._moments.value()
        left = xz @ torch.linalg.pinv(zz, hermitian=True, rtol=1e-10) / self._moments.deviation
        return OracleEraser(left=left, centre=self._moments.mean_z, classes=self.classes, **self._past(hook, model))

    def _eraser(
        self, left: Tensor, right: Tensor, mean: Tensor, method: str, options: dict, hook: str | None, model: Any
    ) -> Eraser:
        past = self._past(hook, model)
        return Eraser(left=left, right=right, centre=mean, method=method, options=options, **past)

    def _past(self, hook: str | None, model: Any) -> dict[str, Any]:
        return {"n": self._moments.n, "data": self.fingerprint, **origin(hook, model)}

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the rows and concepts seen, in the order in which they came."""
        if len(self._digests) == 1:
            return self._digests[0]
        return hashlib.sha256(" ".join(self._digests).encode()).hexdigest()[:16]


def fit_leace(X: Rows, z: Any, *, hook: str | None = None, model: Any = None, **options: Any) -> Eraser:
    """Return the LEACE eraser of rows and their concept: labels of two or more classes, or numbers [n] or [n, k].

    Options as in LeaceFitter.value. What is guaranteed: on the fitting rows, classes have equal means, so that no
    linear reader beats the constant one. Judge it on other rows (see guardedness).
    """
    return _fitter(X, z).value(hook=hook, model=model, **options)


def fit_oracle(X: Rows, z: Any, *, hook: str | None = None, model: Any = None) -> OracleEraser:
    """Return the oracle eraser: its apply needs the concept of each row, and changes least."""
    return _fitter(X, z).oracle(hook=hook, model=model)


def fit_projection(X: Rows, z: Any, *, hook: str | None = None, model: Any = None) -> Eraser:
    """Return the orthogonal projection off the differences of the class means (off the cross-covariance with z)."""
    return _fitter(X, z).projection(hook=hook, model=model)


def project_out(
    directions: Direction | Sequence[Direction] | Shaped[Tensor, "k d"], *, centre: Shaped[Tensor, " d"] | None = None
) -> Eraser:
    """Return the orthogonal projection off given directions (through `centre`, else through the origin).

    They need be neither unit nor independent. Directions of one model and hook point give theirs to the eraser.
    Raises ValueError for none, for zero vectors, or for directions of several hook points or models.
    """
    given = [directions] if isinstance(directions, Direction) else directions
    origins = {("", "")} if isinstance(given, Tensor) else {(d.hook, d.model) for d in given}
    if not len(given):
        raise ValueError("no direction was given; at least one is needed")
    if len(origins) > 1:
        raise ValueError(f"the directions lie at several hook points or models: {sorted(origins)}")
    rows = given if isinstance(given, Tensor) else torch.stack([d.vector for d in given])
    basis = orthonormal(rows)
    hook, model = origins.pop()
    middle = torch.zeros(rows.shape[1]) if centre is None else centre
    return Eraser(left=basis.T, right=basis, centre=middle, method="project out", hook=hook, model=model)


def load_eraser(path: str | Path) -> Eraser | OracleEraser:
    """Read an eraser. Raises MissingError where the file is absent, FormatError where it is no sound eraser."""
    tensors, meta = load_tensors(path)
    kind, form = meta.pop("kind", None), meta.pop("form", None)
    made = OracleEraser if form == "oracle" else Eraser
    names = {"left", "centre"} if form == "oracle" else {"left", "right", "centre"}
    if kind != _KIND or form not in ("affine", "oracle") or set(tensors) != names:
        raise FormatError(f"{path} holds no eraser: kind {_KIND!r} with {', '.join(sorted(names))} is expected")
    texts = all(isinstance(meta.get(k, ""), str) for k in ("method", "hook", "model", "data"))
    tables = all(isinstance(meta.get(k, {}), dict) for k in ("options", "versions"))
    lists = isinstance(meta.get("classes"), list | None) and type(meta.get("n", 0)) is int
    shapes = [t.ndim for _, t in sorted(tensors.items())] == [1, 2, 2][: len(names)]
    if not (texts and tables and lists and shapes):
        raise FormatError(f"{path}: an eraser's tensors or metadata are not of the expected form")
    try:
        return made(**tensors, **meta)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path} is no sound eraser: {error}") from error


def fingerprint(rows: Tensor, columns: Tensor) -> str:
    """Return 16 hex digits that name rows (as float32) and the columns of a concept."""
    digest = hashlib.sha256(f"{tuple(rows.shape)} {tuple(columns.shape)}".encode())
    digest.update(rows.float().contiguous().numpy().tobytes())
    digest.update(columns.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def orthonormal(rows: Shaped[Tensor, "k d"], tol: float = 1e-6) -> Float[Tensor, "r d"]:
    """Return an orthonormal basis of the span of rows (float64), dependent ones dropped. Raises ValueError for zero."""
    lengths = rows.double().norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all() and torch.isfinite(lengths).all()):
        raise ValueError("a vector of length zero, or one that is not finite, has no direction")
    _, s, vh = torch.linalg.svd(rows.double() / lengths, full_matrices=False)
    return vh[s > tol * s[0]]


def origin(hook: str | None, model: Any) -> dict[str, str]:
    """Return hook point and fingerprint of the model that rows come from, as far as they are given."""
    if model is None:
        return {"hook": hook or ""}
    if hook is None:
        raise ValueError("rows of a model lie at a hook point: pass hook='resid_post.2' or the like")
    model = as_model(model)
    return {"hook": model.hook_point(hook).name, "model": model.fingerprint}


def _fitter(X: Rows, z: Any) -> LeaceFitter:
    rows = as_rows(X)
    _, classes = concept_columns(z, None, len(rows), find=True)
    return LeaceFitter(classes).add(rows, z)


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pseudo-inverse square root and the square root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = torch.where(kept, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(kept, 1 / root, 0.0)
    return (vectors * inverse) @ vectors.T, (vectors * root) @ vectors.T


def _bounded(left: Tensor, right: Tensor, covariance: Tensor) -> Tensor:
    """Return `right` mixed with the pseudo-inverse of `left` as far as keeps the total variance from growing.

    I - left (a right + (1 - a) left^+): every mixture has the same kernel. Its trace is a quadratic in a, at a = 0 at
    most that of the covariance; the larger root is taken.
    """
    eye = torch.eye(len(left), dtype=left.dtype)
    before = torch.trace(covariance)

    def trace(oblique: Tensor) -> Tensor:
        kept = eye - left @ oblique
        return torch.trace(kept @ covariance @ kept.T)

    if not left.shape[1] or bool(trace(right) <= before * (1 + 1e-12)):
        return right
    flat = torch.linalg.pinv(left)
    step, rest = left @ (flat - right), eye - left @ flat
    a = torch.trace(step @ covariance @ step.T)
    b = 2 * torch.trace(rest @ covariance @ step.T)
    c = trace(flat) - before
    share = (-b + (b * b - 4 * a * c).clamp_min(0).sqrt()) / (2 * a)
    return share * right + (1 - share) * flat


def _given(X: Values, d: int) -> Tensor:
    rows = X if isinstance(X, Tensor) else torch.from_numpy(np.ascontiguousarray(X))
    if not rows.is_floating_point() or rows.ndim < 1 or rows.shape[-1] != d:
        raise ValueError(f"the eraser takes floats of width {d}, {rows.dtype} {tuple(rows.shape)} was given")
    return rows


def _freeze(eraser: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(eraser, name).detach().to("cpu", torch.float64, copy=True)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} of the eraser holds nan or infinity")
        object.__setattr__(eraser, name, value)
    for name in ("options", "versions"):
        object.__setattr__(eraser, name, MappingProxyType(dict(getattr(eraser, name))))


def _save(eraser: Any, path: str | Path, tensors: dict[str, Tensor]) -> None:
    meta = {f.name: getattr(eraser, f.name) for f in fields(eraser) if f.name not in tensors}
    meta |= {"options": dict(eraser.options), "versions": dict(eraser.versions)}
    save_tensors(path, tensors, {"kind": _KIND, "form": eraser.form, **meta})

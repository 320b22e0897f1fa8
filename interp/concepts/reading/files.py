"""Directions in files: sets of them in one file of our own; gguf, .svec, .pt and safetensors of others."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from interp.acts.direction import Direction, DirectionError, direction_from
from interp.concepts.reading.gguf import MAGIC, read_gguf, write_gguf
from interp.model.hooks import canonical_name
from interp.model.loading import as_model
from sae.formats import files as weights
from sae.io import MAX_HEADER_BYTES, FormatError, load_tensors, parse_json, read_header, regular_file, save_tensors

__all__ = ["READERS", "load_directions", "open_direction", "open_directions", "save_directions", "save_gguf"]

_KIND, _SINGLE = "interp directions", "interp direction"
MAX_BYTES = 2**30
MAX_SVEC = 64 * 2**20  # texts of numbers: 80 layers of 8,192 are 14 MB
MAX_LAYERS = 4_096
MAX_WIDTH = 2**20
_LAYER = re.compile(r"(?:(?:.*[._])?(?:layers?|blocks?|direction|vector)[._]?)?(\d{1,4})")  # "vec_layer_12", "12"


def save_directions(path: str | Path, directions: Mapping[str, Direction] | Iterable[Direction]) -> None:
    """Write several directions as one safetensors file with JSON metadata, atomically.

    By name; an iterable goes by hook point. Raises ValueError for none, or for two at one hook point without names.
    """
    if isinstance(directions, Mapping):
        named = dict(directions)
    else:
        given = list(directions)
        named = {d.hook: d for d in given}
        if len(named) < len(given) or "" in named:
            raise ValueError("directions without names go by hook point, one each; give a table of names")
    if not named:
        raise ValueError("no direction was given; at least one is needed")
    tensors = {f"vector.{i}": d.vector for i, d in enumerate(named.values())}
    entries = [{"name": name, **d.meta()} for name, d in named.items()]
    save_tensors(path, tensors, {"kind": _KIND, "entries": entries})


def load_directions(path: str | Path, model: Any = None, *, force: bool = False) -> dict[str, Direction]:
    """Read a file of save_directions, or of Direction.save, by name; with a model, as Direction.for_model does.

    Raises MissingError, FormatError, DirectionError.
    """
    tensors, meta = load_tensors(path, max_bytes=MAX_BYTES)
    if meta.get("kind") == _SINGLE:
        one = Direction.load(path)
        found = {one.hook: one}
    else:
        entries = meta.get("entries")
        if meta.get("kind") != _KIND or not isinstance(entries, list) or not entries:
            raise FormatError(f"{path} holds no directions: kind {_KIND!r} with a list of entries is expected")
        if set(tensors) != {f"vector.{i}" for i in range(len(entries))}:
            raise FormatError(f"{path}: tensors vector.0 to vector.{len(entries) - 1} are expected")
        found = {}
        for i, entry in enumerate(entries):
            name = entry.pop("name", None) if isinstance(entry, dict) else None
            if not isinstance(name, str) or name in found:
                raise FormatError(f"{path}: entry {i} has no name of its own")
            found[name] = Direction.from_meta(tensors[f"vector.{i}"], entry)
    if model is None:
        return found
    return {name: d.for_model(model, force=force) for name, d in found.items()}


def open_directions(
    path: str | Path, model: Any = None, *, hook: str | None = None, force: bool = False, rows: str | None = None
) -> dict[str, Direction]:
    """Return the directions of a file of any format in READERS, recognised by its first bytes, by hook point.

    Those of other projects come with model "" and norm None, the length of their vectors as scale; their layers are
    named by the output of a block: direction.N of gguf, key N of .svec and a tensor "layer_N" are blocks.N.hook_
    resid_post. A vector that tells no layer needs `hook`. A matrix of .pt needs `rows`: "blocks" where row i is the
    output of block i, "hidden_states" where row 0 is the embedding (it is blocks.0.hook_resid_pre) and row i + 1 the
    output of block i.
    With a model they are made for it as Direction.for_model does: refused without `force`, since the file does not
    say whose they are. `hook` moves a single direction there, or picks one of several.
    Raises MissingError, FormatError, DirectionError; ValueError for another `rows`.
    """
    path = regular_file(path, MAX_BYTES)
    if rows not in (None, "blocks", "hidden_states"):
        raise ValueError(f"rows is {rows!r}; it is 'blocks' or 'hidden_states'")
    model = None if model is None else as_model(model)
    wanted = None
    if hook is not None:
        wanted = (canonical_name(hook) or hook) if model is None else model.hook_point(hook).name
    found = READERS[recognise(path)](path, wanted, rows)
    if wanted is not None and len(found) > 1:
        found = {wanted: _pick(path, found, wanted)}
    if model is None:
        for d in found.values():
            if wanted is not None and d.hook != wanted:
                raise DirectionError(f"{path} holds a direction at {d.hook}, not at {wanted}; move it with a model")
        return found
    moved = {name: d.for_model(model, hook=wanted, force=force) for name, d in found.items()}
    return {d.hook if name == found[name].hook else name: d for name, d in moved.items()}


def open_direction(
    path: str | Path, model: Any = None, *, hook: str | None = None, force: bool = False, rows: str | None = None
) -> Direction:
    """Return the one direction of a file of any format, or the one at `hook` of several (see open_directions).

    Raises ValueError where the file holds several and `hook` names none.
    """
    found = open_directions(path, model=None if hook is None else model, hook=hook, force=force, rows=rows)
    if len(found) > 1:
        names = ", ".join(sorted(found, key=_order))
        raise ValueError(f"{path} holds {len(found)} directions: hook= is one of {names}")
    (direction,) = found.values()
    return direction if model is None or hook is not None else direction.for_model(model, force=force)


def save_gguf(
    path: str | Path,
    directions: Iterable[Direction] | Mapping[str, Direction],
    *,
    strength: float | int | None = None,
    model_hint: str = "",
) -> None:
    """Write directions at resid_post as a gguf control vector for llama.cpp (--control-vector), repeng, EasySteer.

    `strength` None: vectors have the length that they were found with (their scale). A number: that many median
    residual norms, so that the file at scale 1 steers as add(direction, strength) does. `model_hint` is the name that
    readers compare with the model's type ("llama", "qwen2").
    Raises ValueError for hook points other than resid_post of blocks 1 and on (llama.cpp has no place for block 0),
    for two at one hook point or several widths, DirectionError for a strength without a unit.
    """
    given = list(directions.values() if isinstance(directions, Mapping) else directions)
    vectors: dict[int, Tensor] = {}
    for d in given:
        match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", d.hook)
        if match is None or int(match[1]) == 0:
            raise ValueError(
                f"{d.hook or 'no hook point'}: a control vector holds resid_post of blocks 1, 2, ... alone"
            )
        if int(match[1]) in vectors:
            raise ValueError(f"two directions lie at {d.hook}; a control vector holds one a layer")
        if strength is not None and d.norm is None:
            raise DirectionError("this direction has no unit of strength: give it one by for_model(model, force=True)")
        length = d.scale if strength is None else strength * (d.norm or 0.0)
        vectors[int(match[1])] = (d.vector.double() * length).float()
    if len({len(v) for v in vectors.values()}) != 1:
        raise ValueError(f"a control vector holds vectors of one width; {len(vectors)} were given")
    origins = sorted({d.model for d in given if d.model})
    past = {"controlvector.interp_model": " ".join(origins)} if origins else {}
    write_gguf(path, vectors, model_hint or "unknown", past)


def recognise(path: Path) -> str:
    """Return the format of a file by its first bytes, whatever its name; raises FormatError for none of READERS."""
    with path.open("rb") as file:
        start = file.read(64)
    if start[:4] == MAGIC:
        return "gguf"
    if start[:2] == b"PK":
        return "pt"
    if start.lstrip()[:1] == b"{":
        return "svec"
    size = int.from_bytes(start[:8], "little") if len(start) > 8 else 0
    if start[8:9] == b"{" and size <= MAX_HEADER_BYTES:
        return "native" if read_header(path)[1].get("kind") in (_KIND, _SINGLE) else "safetensors"
    raise FormatError(f"{path} is of no known format of directions ({', '.join(READERS)})")


def _read_native(path: Path, hook: str | None, rows: str | None) -> dict[str, Direction]:
    return load_directions(path)


def _read_gguf(path: Path, hook: str | None, rows: str | None) -> dict[str, Direction]:
    vectors, entries = read_gguf(path)
    words = [entries.get(f"controlvector.{key}") for key in ("method", "model_hint")]
    told = ", ".join(str(w)[:60] for w in words if w and w != "unknown")
    by_place = {_after(layer): vector for layer, vector in vectors.items()}
    return _by_place(path, by_place, f"gguf control vector ({told})" if told else "gguf control vector")


def _read_svec(path: Path, hook: str | None, rows: str | None) -> dict[str, Direction]:
    """Read IBM's activation-steering JSON. Its layers are fitted on the output of block N, which is the hook here.

    That package applies them at the input of block N, one block earlier than they were fitted.
    """
    held = parse_json(regular_file(path, MAX_SVEC).read_bytes(), path)
    table = held.get("directions") if isinstance(held, dict) else None
    if not isinstance(table, dict) or not 0 < len(table) <= MAX_LAYERS:
        raise FormatError(f"{path} is no .svec file: a table 'directions' of layers is expected")
    vectors: dict[str, Tensor] = {}
    for key, numbers in table.items():
        while isinstance(numbers, list) and len(numbers) == 1 and isinstance(numbers[0], list):
            numbers = numbers[0]
        sound = isinstance(numbers, list) and 0 < len(numbers) <= MAX_WIDTH
        if not re.fullmatch(r"\d{1,4}", key) or not sound or not all(type(v) in (int, float) for v in numbers):
            raise FormatError(f"{path}: 'directions' holds {key[:20]!r}, which is no layer with a list of numbers")
        try:
            vectors[_after(int(key))] = torch.tensor(numbers, dtype=torch.float32)
        except (OverflowError, RuntimeError, ValueError) as error:
            raise FormatError(f"{path}: layer {key} holds a number that is no float") from error
    kind = held.get("model_type")
    return _by_place(path, vectors, f"svec ({kind[:60]})" if isinstance(kind, str) else "svec")


def _read_pt(path: Path, hook: str | None, rows: str | None) -> dict[str, Direction]:
    """Read a tensor, or a table of tensors by layer; the pickle is inspected first, and loaded with weights_only."""
    weights._inspect(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle or archive makes of torch's loader
        raise FormatError(f"{path} is not a sound file of tensors: {str(error)[:200]}") from error
    for key in ("directions", "state_dict"):
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    return _from_tensors(path, held, hook, rows)


def _read_safetensors(path: Path, hook: str | None, rows: str | None) -> dict[str, Direction]:
    return _from_tensors(path, load_tensors(path, max_bytes=MAX_BYTES)[0], hook, rows)


def _from_tensors(path: Path, held: Any, hook: str | None, rows: str | None) -> dict[str, Direction]:
    if isinstance(held, dict) and len(held) == 1 and _place_of(next(iter(held))) is None:
        (held,) = held.values()
    if isinstance(held, Tensor):
        return _from_array(path, _plain(path, held, "its tensor"), hook, rows)
    if not isinstance(held, dict) or not 0 < len(held) <= MAX_LAYERS:
        raise FormatError(f"{path} holds a {type(held).__name__}; wanted: a vector, or vectors by layer")
    vectors: dict[str, Tensor] = {}
    for key, value in held.items():
        place = _place_of(key)
        if place is None or not isinstance(value, Tensor) or place in vectors:
            raise FormatError(f"{path} holds {str(key)[:60]!r}, which is no vector of one layer")
        vectors[place] = _plain(path, value, str(key)[:60]).squeeze()
    return _by_place(path, vectors, f"vectors of {path.name}")


def _from_array(path: Path, value: Tensor, hook: str | None, rows: str | None) -> dict[str, Direction]:
    vector = value.squeeze()
    if vector.ndim == 1 and rows is None:
        if hook is None:
            raise ValueError(
                f"{path} holds one vector and no layer: hook='resid_post.6' or the like says where it lies"
            )
        found = _direction(path, vector, canonical_name(hook) or hook, f"vector of {path.name}")
        return {found.hook: found}
    if value.ndim != 2 or len(value) > MAX_LAYERS:
        raise FormatError(f"{path} holds a tensor {list(value.shape)}; wanted: a vector, or one row a layer")
    if rows is None:
        raise ValueError(
            f"{path} holds {len(value)} rows: rows='blocks' (row i is the output of block i) or 'hidden_states' "
            "(row 0 is the embedding) says which"
        )
    names = [_after(i) for i in range(len(value))]
    if rows == "hidden_states":
        names = ["blocks.0.hook_resid_pre", *names[:-1]]
    return _by_place(path, dict(zip(names, value, strict=True)), f"row of {path.name}", skip_zero=True)


def _place_of(key: object) -> str | None:
    """Return the hook point that the name of a tensor tells, if it does: a number is the output of that block."""
    text = str(key)
    if canonical_name(text) is not None:
        return canonical_name(text)
    match = _LAYER.fullmatch(text) if isinstance(key, (str, int)) else None
    return _after(int(match[1])) if match else None


def _after(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def _plain(path: Path, value: Tensor, what: str) -> Tensor:
    claims = value.numel() * value.element_size()
    if value.layout != torch.strided or value.is_meta or claims > value.untyped_storage().nbytes():
        raise FormatError(f"{path}: {what} claims more numbers than the file holds")
    if not value.is_floating_point() or value.ndim > 4 or value.shape[-1:] > (MAX_WIDTH,):
        raise FormatError(f"{path}: {what} is {value.dtype} {list(value.shape)}; wanted: a vector of floats")
    return value.detach()


def _by_place(
    path: Path, vectors: Mapping[str, Shaped[Tensor, "..."]], method: str, *, skip_zero: bool = False
) -> dict[str, Direction]:
    widths = {tuple(v.shape) for v in vectors.values()}
    if len(widths) != 1:
        raise FormatError(f"{path} holds vectors of several shapes: {sorted(widths)[:4]}")
    found = {}
    for hook in sorted(vectors, key=_order):
        if not (skip_zero and not bool(vectors[hook].any())):  # matrices are often filled at single rows
            found[hook] = _direction(path, vectors[hook], hook, method)
    if not found:
        raise FormatError(f"{path} holds zeros alone")
    return found


def _direction(path: Path, vector: Tensor, hook: str, method: str) -> Direction:
    if vector.ndim != 1 or not 1 < len(vector) <= MAX_WIDTH:
        raise FormatError(f"{path}: {hook} holds a tensor {list(vector.shape)}; wanted: one vector")
    try:
        return direction_from(vector, hook=hook, model=None, method=method)
    except ValueError as error:
        raise FormatError(f"{path}: {hook} holds no direction: {error}") from error


def _pick(path: Path, found: Mapping[str, Direction], wanted: str) -> Direction:
    for name, d in found.items():
        if wanted in (name, d.hook):
            return d
    close = difflib.get_close_matches(wanted, found, n=3, cutoff=0.0)
    raise DirectionError(f"{path} holds {len(found)} directions, none at {wanted}; closest: {', '.join(close)}")


def _order(name: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


READERS: dict[str, Callable[[Path, str | None, str | None], dict[str, Direction]]] = {
    "native": _read_native,
    "safetensors": _read_safetensors,
    "gguf": _read_gguf,
    "svec": _read_svec,
    "pt": _read_pt,
}

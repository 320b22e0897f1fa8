"""Which tokens become rows: pads never, others by names (BOS, specials, first ones, outliers) or the user's mask."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model.tokens import special_mask

DEFAULT_EXCLUDE = ("pad", "bos", "special")
SAE_EXCLUDE = ("pad", "bos", "special", "outlier")
OUTLIER_MULTIPLE = 10.0  # of the median norm; attention sinks lie a hundred times above it, ordinary tokens below three
NAMES = "pad, bos, special, first:N (N at least 1), outlier, outlier:M (M above 1)"
NORM_CHUNK = 1 << 22  # values whose float32 copy is held at once


@dataclass(frozen=True, kw_only=True)
class Exclude:
    """Tokens that are no rows; pads never are.

    `bos` and `special` go by token id wherever it stands in the row, `first` leaves out that many tokens at the front
    of a document (BOS counted), `outlier` rows whose norm is above that many times the median.
    """

    bos: bool = False
    special: bool = False
    first: int = 0
    outlier: float | None = None

    def names(self) -> list[str]:
        """Return the canonical names, which parse_exclude reads back."""
        found = ["pad"] + ["bos"] * self.bos + ["special"] * self.special
        found += [f"first:{self.first}"] if self.first else []
        return found + ([] if self.outlier is None else [f"outlier:{self.outlier:g}"])


def parse_exclude(names: Sequence[str] | Exclude) -> Exclude:
    """Return the Exclude of a list of names: pad, bos, special, first:N, outlier, outlier:M (outlier: 10 medians).

    Raises ValueError for anything else, and for two different numbers of one kind.
    """
    if isinstance(names, Exclude):
        return names
    wrong = f"exclude is {names!r}; it must be a list of some of: {NAMES}"
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(wrong)
    found: dict[str, Any] = {}
    for name in names:
        kind, _, number = name.partition(":")
        if name in ("pad", "bos", "special"):
            value: Any = True
        elif kind == "first" and number.isdecimal() and int(number) > 0:
            value = int(number)
        elif kind == "outlier" and (number or name == kind):
            value = _multiple(number, wrong)
        else:
            raise ValueError(wrong)
        if found.setdefault(kind, value) != value:
            raise ValueError(f"{wrong}; {kind} is given twice with different numbers")
    found.pop("pad", None)
    return Exclude(**found)


def _multiple(number: str, wrong: str) -> float:
    try:
        value = float(number) if number else OUTLIER_MULTIPLE
    except ValueError:
        raise ValueError(wrong) from None
    if not 1 < value < float("inf"):
        raise ValueError(wrong)
    return value


def keep_mask(
    ids: Int[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    exclude: Exclude,
    *,
    special_ids: Iterable[int],
    bos_id: int | None,
    positions: Int[Tensor, "b t"] | None = None,
) -> Bool[Tensor, "b t"]:
    """Return which tokens become rows as far as ids and positions tell; outliers need values (see outlying).

    `mask` marks the real tokens, pads on either side. `positions`, for rows of several documents, count from 0 in each
    document; without them they count the real tokens of a row.
    """
    keep = mask.clone()
    if exclude.special:
        keep &= ~special_mask(ids, special_ids)
    if exclude.bos and bos_id is not None:
        keep &= ids != bos_id
    if exclude.first:
        counted = mask.long().cumsum(1) - 1 if positions is None else positions
        keep &= counted >= exclude.first
    return keep


def row_norms(values: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return the Euclidean norm of each row, computed in float32."""
    if values.dtype == torch.float32:
        return torch.linalg.vector_norm(values, dim=1)
    rows = max(1, NORM_CHUNK // max(1, values.shape[1]))
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in values.split(rows)])


def outlying(norms: Iterable[Float[Tensor, " n"]], multiple: float | int) -> Bool[Tensor, " n"]:
    """Return which rows have, at any hook point, a norm above `multiple` times the median there (nan left out)."""
    return torch.stack([n > multiple * n.nanmedian() if len(n) else n.bool() for n in norms]).any(0)


class Included:
    """The user's own choice of tokens: ids, one mask a document, or a function of a document's ids.

    Raises ValueError for anything else, for masks that are not one a document, and TypeError for no such thing.
    """

    def __init__(self, include: Any, n_documents: int):
        self.function: Callable[[Tensor], Any] | None = None
        self.masks: list[Any] = []
        self.ids: Tensor | None = None
        if callable(include):
            self.function = include
            return
        if not isinstance(include, (Sequence, Tensor, set, frozenset)) or isinstance(include, str):
            raise TypeError(f"include is a {type(include).__name__}; it must be {INCLUDES}")
        given = list(include)
        if all(_is_id(x) for x in given):
            self.ids = torch.tensor([int(x) for x in given], dtype=torch.long)
        elif len(given) != n_documents:
            raise ValueError(f"include has {len(given)} masks for {n_documents} documents; it must be {INCLUDES}")
        else:
            self.masks = given

    def mask(self, document: int, ids: Int[Tensor, " t"]) -> Bool[Tensor, " t"]:
        """Return which tokens of a document (BOS counted, before any cut) are wanted."""
        if self.ids is not None:
            return torch.isin(ids, self.ids)
        given = self.function(ids) if self.function is not None else self.masks[document]
        found = torch.as_tensor(given)
        if not found.numel():
            found = found.bool()
        if found.dtype != torch.bool or found.shape != ids.shape:
            got = f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}"
            raise ValueError(
                f"include gives {got} for document {document}, which has {len(ids)} tokens (BOS counted); "
                f"it must give one bool a token"
            )
        return found.to(ids.device)


INCLUDES = "a list of token ids, one list of bools a document, or a function of a document's ids that gives bools"


def _is_id(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not value.is_floating_point()
    return isinstance(value, int) and not isinstance(value, bool)


class NonFiniteError(ArithmeticError):
    """An activation is infinite or not a number."""


def nonfinite(hook: str, document: int, position: int, row: Float[Tensor, " d"], model: str = "") -> NonFiniteError:
    """Return the error for a row with inf or nan: hook point, document, position, how many values, and what to do."""
    nans, infs = int(row.isnan().sum()), int(row.isinf().sum())
    counts = " and ".join(f"{n} {kind}" for n, kind in ((infs, "infinite"), (nans, "nan")) if n)
    dtype = str(row.dtype).removeprefix("torch.")
    source = f" of {model}" if model else ""
    return NonFiniteError(
        f"{hook}{source}: {counts} of {len(row)} values at document {document}, position {position} ({dtype}); "
        "float16 ends at 65504: load the model, or store the rows, in bfloat16 or float32"
    )

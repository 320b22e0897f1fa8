"""Rows on their way from the model into one tensor a hook point: what is kept, its place, and whether it is sound."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.acts.documents import Documents
from interp.acts.rows import Exclude, keep_mask, nonfinite, outlying, parse_exclude, row_norms
from interp.model.loading import Model
from interp.model.tokens import Packed, TokenBatch, special_mask

CHUNK = 4096  # rows moved or looked at in one step


@dataclass(frozen=True)
class Chosen:
    """Tokens in the order of the result, and which of them become rows as far as ids and positions tell (`keep`).

    `removed` is how many tokens each exclusion took, each token under the first that names it.
    """

    ids: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    numbers: Int[Tensor, " n"]  # the document of each token
    special: Bool[Tensor, " n"]
    keep: Bool[Tensor, " n"]
    exclude: Exclude
    removed: dict[str, int]
    n_tokens: int  # without pads
    n_documents: int
    texts: tuple[str, ...] | None = None

    @cached_property
    def rows(self) -> Int[Tensor, " rows"]:
        """The token that each row is of, outliers counted."""
        return self.keep.nonzero().squeeze(1)


def choose(model: Model, documents: Documents, exclude: Exclude, wanted: Bool[Tensor, " n"] | None = None) -> Chosen:
    """Return which tokens of documents become rows; `wanted` is the user's own choice."""
    ids, positions = documents.ids, documents.positions
    keep, removed = _left(model, ids[None], torch.ones(1, len(ids), dtype=torch.bool), positions[None], exclude)
    keep = keep[0]
    if wanted is not None:
        removed["include"], keep = int((keep & ~wanted).sum()), keep & wanted
    special = special_mask(ids, model.special_ids)
    numbers, count = documents.numbers, len(documents)
    return Chosen(ids, positions, numbers, special, keep, exclude, removed, len(ids), count, documents.texts)


def choose_packed(model: Model, batch: TokenBatch, exclude: Exclude) -> Chosen:
    """Return which tokens of a batch become rows, row after row.

    Documents and positions are the batch's own; a plain TokenBatch has the numbers of its rows and columns.
    """
    packed = isinstance(batch, Packed)
    rows, columns = (
        x.expand_as(batch.ids) for x in (torch.arange(len(batch.ids))[:, None], torch.arange(batch.ids.shape[1]))
    )
    numbers, positions = (batch.documents, batch.positions) if packed else (rows, columns)
    keep, removed = _left(model, batch.ids, batch.mask, positions if packed else None, exclude)
    ids, positions, numbers, special, keep = (x.flatten() for x in (batch.ids, positions, numbers, batch.special, keep))
    count = int(numbers[keep].max()) + 1 if bool(keep.any()) else 0
    return Chosen(ids, positions, numbers, special, keep, exclude, removed, int(batch.mask.sum()), count)


def _left(
    model: Model, ids: Tensor, mask: Tensor, positions: Tensor | None, exclude: Exclude
) -> tuple[Bool[Tensor, "b t"], dict[str, int]]:
    """Return what the exclusions leave, and how many tokens each one took, one after the other."""
    special, bos = model.special_ids, model.bos_id
    removed, keep = {}, mask
    for name in exclude.names():
        if name == "pad" or name.startswith("outlier"):
            continue
        stays = keep_mask(ids, mask, parse_exclude([name]), special_ids=special, bos_id=bos, positions=positions)
        removed[name], keep = int((keep & ~stays).sum()), keep & stays
    return keep, removed


class Gather:
    """One tensor a hook point on the CPU, filled batch by batch; every row is looked at once for inf and nan."""

    def __init__(
        self, model: Model, widths: Mapping[str, int], chosen: Chosen, dtype: torch.dtype | None, keep_nonfinite: bool
    ):
        self.model, self.chosen, self.keep_nonfinite = model, chosen, keep_nonfinite
        self.tokens = chosen.rows  # the token that each row is of
        n = len(self.tokens)
        self.values = {name: torch.empty(n, d, dtype=dtype or model.dtype) for name, d in widths.items()}
        self.norms = {name: torch.empty(n) for name in widths} if chosen.exclude.outlier is not None else {}
        self.suspects: set[str] = set()

    def put(
        self, name: str, value: Float[Tensor, "*batch d"], where: Int[Tensor, " kept"], at: Int[Tensor, " kept"]
    ) -> None:
        """Copy the rows `where` of a value, flattened, to the rows `at` of the result."""
        target = self.values[name]
        rows = value.detach().reshape(-1, value.shape[-1]).index_select(0, where.to(value.device))
        if self.norms:
            self.norms[name][at] = row_norms(rows).to("cpu")
        rows = rows.to(target.dtype).to("cpu")
        target.index_copy_(0, at, rows)
        # one pass without a copy: inf and nan survive every sum, and a sum that overflows is looked at again
        if not bool(rows.sum(dtype=torch.float32).isfinite()):
            self._look(name, rows, at)

    def _look(self, name: str, rows: Tensor, at: Tensor) -> None:
        bad = (~rows.isfinite().all(1)).nonzero().squeeze(1)
        if not len(bad):
            return
        self.suspects.add(name)
        if not self.keep_nonfinite:
            # at has the order of the batch; the first in the documents is named
            worst = int(bad[at[bad].argmin()])
            token = int(self.tokens[at[worst]])
            document, position = int(self.chosen.numbers[token]), int(self.chosen.positions[token])
            raise nonfinite(name, document, position, rows[worst], self.model.name)

    def finish(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Take outliers out; return the shares removed, and the rows that are not finite by hook point."""
        multiple = self.chosen.exclude.outlier
        removed = dict(self.chosen.removed)
        if multiple is not None:
            keep = ~outlying(self.norms.values(), multiple)
            removed[f"outlier:{multiple:g}"] = int((~keep).sum())
            if not bool(keep.all()):
                self.tokens = self.tokens[keep]
                for values in self.values.values():
                    compact(values, keep)
        shares = {name: count / max(1, self.chosen.n_tokens) for name, count in removed.items()}
        return shares, {name: _nonfinite_rows(self.values[name]) for name in sorted(self.suspects)}


def compact(values: Tensor, keep: Bool[Tensor, " n"]) -> None:
    """Keep the rows told of [n, d] values, in place and without a second copy."""
    end = 0
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK][keep[start : start + CHUNK]]
        values[end : end + len(part)] = part
        end += len(part)
    values.resize_(end, values.shape[1])


def _nonfinite_rows(values: Float[Tensor, "n d"]) -> Int[Tensor, " bad"]:
    parts: Sequence[Tensor] = values.split(CHUNK)
    return (~torch.cat([part.isfinite().all(1) for part in parts])).nonzero().squeeze(1)


def shown(batches: Sequence[Any], progress: bool) -> Iterable[Any]:
    """Return the batches, with a bar on standard error where asked."""
    if not progress:
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc="capture", unit="batch")

"""Activations as data: rows at hook points, each with its token, position and document."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model import tokens
from interp.model.hooks import canonical_name, expand, reading, unknown_hook
from interp.model.loading import Model, as_model

EXCLUDABLE = ("pad", "bos", "special")
POOLS = ("mean", "last", "max")


@dataclass(frozen=True)
class Acts:
    """Values at hook points, one row a token; `acts[hook]` takes any spelling of the name.

    `positions` count from the first real token of the row (BOS included), `documents` index the texts given, and
    `is_special` marks the rows of BOS and its like, there only if they were kept. `texts` is None for token ids.
    """

    values: Mapping[str, Float[Tensor, "tok _"]]
    token_ids: Int[Tensor, " tok"]
    positions: Int[Tensor, " tok"]
    documents: Int[Tensor, " tok"]
    is_special: Bool[Tensor, " tok"]
    n_documents: int
    texts: tuple[str, ...] | None = None
    spellings: Mapping[str, str] = field(default_factory=dict)
    n_layers: int | None = None

    def __getitem__(self, hook: str) -> Float[Tensor, "tok d"]:
        name = self.spellings.get(hook) or canonical_name(hook, self.n_layers) or hook
        if name not in self.values:
            raise unknown_hook("this capture", hook, self.values)
        return self.values[name]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def hooks(self) -> list[str]:
        """The canonical names of the hook points captured."""
        return list(self.values)


def capture_batch(
    model: Model, ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None, hooks: str | Iterable[str]
) -> dict[str, Tensor]:
    """Return {canonical name: [b, t, d]} of one padded batch, pads included, on the device and in the dtype of each."""
    out: dict[str, Tensor] = {}
    with reading(model, hooks, lambda name, value: out.__setitem__(name, value.clone())):
        model.run(ids, mask)
    return out


def capture_acts(
    model: Any,
    texts: str | Iterable[Any],
    hooks: str | Iterable[str],
    *,
    batch_size: int = 32,
    max_len: int | None = None,
    exclude: Sequence[str] = EXCLUDABLE,
    add_bos: bool = True,
    dtype: torch.dtype | None = torch.float32,
    progress: bool = False,
) -> Acts:
    """Return the activations of texts (or of documents of token ids) at hook points, on the CPU, documents in order.

    `hooks`: names in any spelling, or globs. Texts get the tokenizer's BOS in front (`add_bos`); token ids are taken
    as they are. Documents are cut to `max_len` tokens where it is given. Rows named in `exclude` are left out: "bos",
    "special" (any special id, BOS too); pads are never rows. `dtype` None keeps the model's own. Batches are sorted by
    length; who shares a batch does not matter (1e-5 in float32).
    Raises HookPointError, MissingError for texts without a tokenizer, ValueError for a document longer than n_ctx.
    """
    model = as_model(model)
    _check(exclude, batch_size, max_len)
    given = [texts] if isinstance(texts, str) else list(texts)
    rows = [_row(model, i, document, add_bos, max_len) for i, document in enumerate(given)]
    kept = [_kept(model, row, exclude) for row in rows]
    ends = torch.tensor([0, *(int(k.sum()) for k in kept)]).cumsum(0).tolist()
    names = expand(model, hooks)
    values = {n: torch.empty(ends[-1], model.hook_point(n).d, dtype=dtype or model.dtype) for n in names}

    order = sorted((i for i in range(len(rows)) if bool(kept[i].any())), key=lambda i: len(rows[i]), reverse=True)
    for members in _shown([order[i : i + batch_size] for i in range(0, len(order), batch_size)], progress):
        batch = tokens.pad_rows([rows[i].tolist() for i in members])
        keep = tokens.pad_rows([kept[i].long().tolist() for i in members]).ids.bool()
        at = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in members])
        for name, value in capture_batch(model, batch.ids, batch.mask, names).items():
            values[name][at] = value[keep.to(value.device)].to("cpu", values[name].dtype)

    ids = torch.cat([row[k] for row, k in zip(rows, kept, strict=True)]) if rows else torch.zeros(0, dtype=torch.long)
    counts = torch.tensor([int(k.sum()) for k in kept], dtype=torch.long)
    positions = [k.nonzero().squeeze(1) for k in kept]
    return Acts(
        values=values,
        token_ids=ids,
        positions=torch.cat(positions) if positions else ids.clone(),
        documents=torch.arange(len(rows)).repeat_interleave(counts),
        is_special=tokens.special_mask(ids, model.special_ids),
        n_documents=len(rows),
        texts=tuple(given) if given and all(isinstance(t, str) for t in given) else None,
        spellings=_spellings(model, hooks, names),
        n_layers=model.n_layers,
    )


def capture_packed(
    model: Any,
    batches: Iterable[tokens.TokenBatch],
    hooks: str | Iterable[str],
    *,
    exclude: Sequence[str] = EXCLUDABLE,
    dtype: torch.dtype | None = torch.float32,
) -> Iterator[Acts]:
    """Yield the activations of each batch of packed windows (see tokens.pack) as they are computed.

    `documents` and `positions` are the batch's own; without them (a plain TokenBatch) they count rows and columns.
    """
    model = as_model(model)
    _check(exclude)
    names = expand(model, hooks)
    for batch in batches:
        keep = torch.stack([_kept(model, row, exclude) for row in batch.ids]) & batch.mask
        found = capture_batch(model, batch.ids, batch.mask, names)
        columns = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        rows = torch.arange(batch.ids.shape[0])[:, None].expand_as(batch.ids)
        documents = getattr(batch, "documents", rows)[keep]
        yield Acts(
            values={n: found[n][keep.to(found[n].device)].to("cpu", dtype or found[n].dtype) for n in names},
            token_ids=batch.ids[keep],
            positions=getattr(batch, "positions", columns)[keep],
            documents=documents,
            is_special=batch.special[keep],
            n_documents=int(documents.max()) + 1 if len(documents) else 0,
            spellings=_spellings(model, hooks, names),
            n_layers=model.n_layers,
        )


def pool(acts: Acts, hook: str, how: str = "mean") -> Float[Tensor, "texts d"]:
    """Return one vector a document: the mean, the last row or the elementwise maximum of its rows.

    Raises ValueError for a document without rows (an empty text), which has none of these.
    """
    if how not in POOLS:
        raise ValueError(f"how is {how!r}; it must be one of: {', '.join(POOLS)}")
    values = acts[hook]
    counts = torch.bincount(acts.documents, minlength=acts.n_documents)
    if bool((counts == 0).any()):
        empty = (counts == 0).nonzero().squeeze(1).tolist()
        raise ValueError(f"documents {empty[:5]} have no rows to pool; leave out empty texts")
    if how == "last":
        return values[counts.cumsum(0) - 1]
    if how == "max":
        return torch.stack([rows.amax(0) for rows in values.split(counts.tolist())])
    sums = torch.zeros(acts.n_documents, values.shape[1]).index_add_(0, acts.documents, values.float())
    return (sums / counts[:, None]).to(values.dtype)


def _check(exclude: Sequence[str], batch_size: int = 1, max_len: int | None = None) -> None:
    if isinstance(exclude, str) or any(e not in EXCLUDABLE for e in exclude):
        raise ValueError(f"exclude is {exclude!r}; it must be a list of some of: {', '.join(EXCLUDABLE)}")
    if batch_size < 1 or (max_len is not None and max_len < 1):
        raise ValueError(f"batch_size is {batch_size} and max_len {max_len}; both must be at least 1")


def _row(model: Model, number: int, document: Any, add_bos: bool, max_len: int | None) -> Tensor:
    """Return the token ids of one document, cut or refused by its length."""
    if isinstance(document, str):
        ids = tokens.encode(tokens.need_tokenizer(model.tokenizer), document, add_bos=add_bos)
    else:
        ids = [int(i) for i in document]
    if ids and not (min(ids) >= 0 and max(ids) < model.d_vocab):
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"document {number} has token id {bad}; {model.name} has ids 0 to {model.d_vocab - 1}")
    ids = ids[:max_len]
    limit = model.n_ctx
    if len(ids) > limit:
        raise ValueError(
            f"document {number} has {len(ids)} tokens, {model.name} takes {limit}; cut it with max_len={limit}"
        )
    return torch.tensor(ids, dtype=torch.long)


def _kept(model: Model, row: Int[Tensor, " t"], exclude: Sequence[str]) -> Bool[Tensor, " t"]:
    """Return which tokens of a document become rows."""
    keep = torch.ones(len(row), dtype=torch.bool)
    if "special" in exclude:
        keep &= ~tokens.special_mask(row, model.special_ids)
    if "bos" in exclude and model.bos_id is not None:
        keep &= row != model.bos_id
    return keep


def _spellings(model: Model, hooks: str | Iterable[str], names: list[str]) -> dict[str, str]:
    """Return the other names under which the captured hook points may be asked for."""
    given = [hooks] if isinstance(hooks, str) else list(hooks)
    plain = {h: model.hook_point(h).name for h in given if not any(c in h for c in "*?[")}
    return {a: n for a, n in model.aliases.items() if n in names} | plain


def _shown(batches: list[list[int]], progress: bool) -> Iterable[list[int]]:
    if not progress:
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc="capture", unit="batch")

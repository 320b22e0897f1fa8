"""Activations as data: rows at hook points, each with its token, position and document."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from interp.acts import documents as docs
from interp.acts.gather import Chosen, Gather, choose, choose_packed, shown
from interp.acts.generated import generate_rows
from interp.acts.rows import DEFAULT_EXCLUDE, Exclude, Included, parse_exclude
from interp.model import tokens
from interp.model.anatomy import DECODER, ENCODER
from interp.model.hooks import canonical_name, expand, reading, unknown_hook
from interp.model.loading import Model, as_model

POOLS = ("mean", "last", "max")
NONFINITE = ("raise", "keep")


class NearTie(NamedTuple):
    """A greedily chosen token that hardly beat the second: where it stands, and the difference of their logits."""

    document: int
    position: int
    margin: float


@dataclass(frozen=True)
class Acts:
    """Values at hook points, one row a token; `acts[hook]` takes any spelling of the name.

    `positions` count from the first real token of the document (BOS included), `documents` index the texts given, and
    `is_special` marks the rows of BOS and its like, there only if they were kept. `texts` is None for token ids.
    `removed` is the share of the tokens that each exclusion took (each token counted once, under the first that
    names it); `nonfinite` the rows with inf or nan at each hook point, where they were allowed.
    With `generate`: `is_new` marks the rows of new tokens, `generated` is the new text of each document (None without
    a tokenizer), `near_ties` lists the new tokens that rounding might have changed.
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
    removed: Mapping[str, float] = field(default_factory=dict)
    nonfinite: Mapping[str, Int[Tensor, " rows"]] = field(default_factory=dict)
    is_new: Bool[Tensor, " tok"] | None = None
    generated: tuple[str, ...] | None = None
    near_ties: tuple[NearTie, ...] = ()

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
    texts: Any,
    hooks: str | Iterable[str],
    *,
    batch_size: int = 32,
    max_len: int | None = None,
    exclude: Sequence[str] | Exclude = DEFAULT_EXCLUDE,
    include: Any = None,
    add_bos: bool = True,
    add_generation_prompt: bool | None = None,
    long: str | None = None,
    stride: int | None = None,
    targets: Any = None,
    generate: int | Mapping[str, Any] | None = None,
    nonfinite: str = "raise",
    dtype: torch.dtype | None = torch.float32,
    progress: bool = False,
) -> Acts:
    """Return the activations of documents at hook points, on the CPU, documents in order.

    A document is a text (the tokenizer's BOS goes in front: `add_bos`), a chat (a list of {"role", "content"}, read by
    the tokenizer's template, which says itself where BOS is) or token ids as they are. `hooks`: names in any spelling,
    or globs. `dtype` None keeps the model's own.

    Which tokens are rows: never pads; none of `exclude` (see rows.parse_exclude: "bos", "special" by id, "first:N",
    "outlier:M" by the norm at any of the hook points against its median here; `Acts.removed` tells the shares); of the
    rest those that `include` names (token ids, one list of bools a document, or a function from a document's ids to
    bools).

    `long` documents, of more than `max_len` (n_ctx where it is not given) tokens, are refused ("error"), cut to their
    first ones ("cut", the default where `max_len` is given), or read in overlapping "windows" of that length, `stride`
    (half the window) apart: a token is read once, in the window that shows most of what stands before it; windows
    after the first have the document's BOS (or CLS) in front too. Positions are always those in the document.

    Of an encoder-decoder model one stream is read in a call. Hook points of the encoder read the texts; those of the
    decoder read `targets`, one for each text (text, to which the decoder's start token is put in front, or ids), while
    the encoder reads the texts: rows, documents and positions are then those of the targets.

    `generate` (a number of new tokens, or options of Hugging Face's generate) goes on writing after each document, and
    returns the rows of its tokens and of the new ones, EOS included, the last too (it gets a forward of its own); see
    generated.generate_rows.

    Batches are sorted by length; who shares a batch does not matter (1e-5 in float32).
    Raises HookPointError, MissingError for texts without a tokenizer, ValueError for a document longer than n_ctx,
    NonFiniteError for inf or nan in a row, in the model's values or by conversion to `dtype`, unless `nonfinite` is
    "keep".
    """
    model = as_model(model)
    excluded = parse_exclude(exclude)
    _check(batch_size, max_len, long, nonfinite)
    names = expand(model, hooks)
    spellings = _spellings(model, hooks, names)
    prompt = generate is not None if add_generation_prompt is None else add_generation_prompt
    given = docs.read_documents(model, texts, add_bos=add_bos, add_generation_prompt=prompt)
    decoding = _decoding(model, names, targets, generate is not None)
    if generate is not None:
        if max_len is not None or long is not None:
            raise ValueError("max_len and long have no meaning beside generate: give prompts that leave room to go on")
        return _continued(
            model, given, names, excluded, include, options=generate, batch_size=batch_size, dtype=dtype,
            progress=progress, nonfinite=nonfinite, spellings=spellings,
        )  # fmt: skip
    limit = min(max_len or model.n_ctx, model.n_ctx)
    how = long or ("error" if max_len is None else "cut")
    sources = None
    if decoding:
        if how == "windows":
            raise ValueError('long="windows" cuts what a decoder has read; with targets give long="cut"')
        sources = docs.trim(given, limit)[0] if how == "cut" else docs.check_length(model, given, limit)
        given = docs.read_targets(model, targets, len(given), add_bos=add_bos)
    wanted = _wanted(include, given)
    if how == "cut":
        given, kept = docs.trim(given, limit)
        wanted = None if wanted is None else wanted[kept]
    elif how == "error":
        docs.check_length(model, given, limit)
    gather = _gather(model, names, choose(model, given, excluded, wanted), dtype, nonfinite)
    front = model.bos_id if model.bos_id is not None else getattr(model.tokenizer, "cls_token_id", None)
    pieces = docs.Pieces(given, gather.chosen.keep, limit, stride, front)
    _run(model, gather, pieces, batch_size, progress, sources)
    return _acts(model, gather, spellings)


def _gather(model: Model, names: list[str], chosen: Chosen, dtype: torch.dtype | None, nonfinite: str) -> Gather:
    return Gather(model, {name: model.hook_point(name).d for name in names}, chosen, dtype, nonfinite == "keep")


def _run(
    model: Model,
    gather: Gather,
    pieces: docs.Pieces,
    batch_size: int,
    progress: bool,
    sources: docs.Documents | None,
) -> None:
    """Run the model over all pieces, each batch's rows into their places; `sources` are what the encoder reads."""
    texts = None if sources is None else sources.rows()
    batch: docs.Batch | None = None

    def note(name: str, value: Tensor) -> None:
        if batch is not None:
            gather.put(name, value, batch.where, batch.at)

    with reading(model, gather.values, note):
        for members in shown(pieces.batches(batch_size), progress):
            batch = pieces.batch(members)
            if texts is None:
                model.run(batch.ids, batch.mask)
                continue
            held = [texts[i] for i in batch.numbers.tolist()]
            ids, mask = (pad_sequence(x, batch_first=True) for x in (held, [torch.ones_like(t) for t in held]))
            model.run(ids, mask.bool(), decoder_ids=batch.ids, decoder_mask=batch.mask)


def _decoding(model: Model, names: list[str], targets: Any, generating: bool) -> bool:
    """Return whether a decoder is read that needs targets; raises ValueError where the call does not fit the model."""
    stacks = {model.place(name).stack for name in names}
    if len(stacks) > 1:
        raise ValueError(
            f"the hook points lie in both streams of {model.name}, whose tokens differ; capture encoder and decoder in "
            "two calls"
        )
    decoding = stacks == {DECODER}
    if generating and stacks & {ENCODER, DECODER}:
        raise ValueError(
            f"{model.name} is an encoder-decoder: generate with it first, then capture with the new texts as targets="
        )
    if decoding and targets is None:
        raise ValueError(f"{names[0]} is in the decoder of {model.name}: give targets=, one for each text")
    if targets is not None and not decoding:
        raise ValueError(f"{names[0]} is in no decoder that is given targets; leave targets out")
    return decoding


def _continued(
    model: Model, given: docs.Documents, names: list[str], exclude: Exclude, include: Any, **options: Any
) -> Acts:
    """Return the rows of prompts and of what is written after them."""
    nonfinite, spellings = options.pop("nonfinite"), options.pop("spellings")
    written = generate_rows(model, given, names, **options)
    chosen = choose(model, written.documents, exclude, _wanted(include, written.documents))
    gather = _gather(model, names, chosen, options["dtype"], nonfinite)
    for name in names:
        gather.put(name, written.values.pop(name), chosen.rows, torch.arange(len(chosen.rows)))
    ties = tuple(NearTie(*tie) for tie in written.near_ties)
    acts = _acts(model, gather, spellings)
    return replace(acts, is_new=written.is_new[gather.tokens], generated=written.generated, near_ties=ties)


def capture_packed(
    model: Any,
    batches: Iterable[tokens.TokenBatch],
    hooks: str | Iterable[str],
    *,
    exclude: Sequence[str] | Exclude = DEFAULT_EXCLUDE,
    nonfinite: str = "raise",
    dtype: torch.dtype | None = torch.float32,
) -> Iterator[Acts]:
    """Yield the activations of each batch of packed windows (see tokens.pack) as they are computed.

    `documents` and `positions` are the batch's own; without them (a plain TokenBatch) they count rows and columns.
    Windows whose documents are `masked` from each other are run so. Of `exclude`, "outlier" goes by the median of each
    batch. Raises as capture_acts does.
    """
    model = as_model(model)
    excluded = parse_exclude(exclude)
    _check(1, None, None, nonfinite)
    names = expand(model, hooks)
    spellings = _spellings(model, hooks, names)
    for batch in batches:
        chosen = choose_packed(model, batch, excluded)
        gather = _gather(model, names, chosen, dtype, nonfinite)
        places = torch.arange(len(chosen.rows))
        positions = batch.positions if isinstance(batch, tokens.Packed) and batch.masked else None
        with reading(model, names, partial(gather.put, where=chosen.rows, at=places)):
            model.run(batch.ids, batch.mask, positions=positions)
        yield _acts(model, gather, spellings)


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


def _check(batch_size: int, max_len: int | None, long: str | None, nonfinite: str) -> None:
    if batch_size < 1 or (max_len is not None and max_len < 1):
        raise ValueError(f"batch_size is {batch_size} and max_len {max_len}; both must be at least 1")
    if long is not None and long not in docs.LONG:
        raise ValueError(f"long is {long!r}; it must be one of: {', '.join(docs.LONG)}")
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite is {nonfinite!r}; it must be one of: {', '.join(NONFINITE)}")


def _wanted(include: Any, given: docs.Documents) -> Bool[Tensor, " n"] | None:
    """Return which tokens the user's `include` names, None where all may stay."""
    if include is None:
        return None
    chosen = Included(include, len(given))
    masks = [chosen.mask(i, ids) for i, ids in enumerate(given.rows())]
    return torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool)


def _acts(model: Model, gather: Gather, spellings: Mapping[str, str]) -> Acts:
    removed, bad = gather.finish()
    chosen, rows = gather.chosen, gather.tokens
    return Acts(
        values=gather.values,
        token_ids=chosen.ids[rows],
        positions=chosen.positions[rows],
        documents=chosen.numbers[rows],
        is_special=chosen.special[rows],
        n_documents=chosen.n_documents,
        texts=chosen.texts,
        spellings=spellings,
        n_layers=model.n_layers,
        removed=removed,
        nonfinite=bad,
    )


def _spellings(model: Model, hooks: str | Iterable[str], names: list[str]) -> dict[str, str]:
    """Return the other names under which the captured hook points may be asked for."""
    given = [hooks] if isinstance(hooks, str) else list(hooks)
    plain = {h: model.hook_point(h).name for h in given if not any(c in h for c in "*?[")}
    return {a: n for a, n in model.aliases.items() if n in names} | plain

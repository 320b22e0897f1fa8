"""Rows of labelled examples: which tokens of a text speak for it, at every hook point, in one pass over the texts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from interp.acts import documents as docs
from interp.acts.capture import Acts, capture_acts
from interp.acts.gather import choose
from interp.acts.rows import Exclude, nonfinite
from interp.concepts.labelled.examples import Examples
from interp.concepts.labelled.spans import Offsets, span_mask, token_marks
from interp.model.hooks import expand
from interp.model.loading import Model, as_model

__all__ = ["POSITIONS", "LabelledRows", "cell_key", "max_over_tokens", "token_rows"]

POSITIONS = {
    "last": "the last token",
    "mean": "the mean over tokens",
    "span": "the mean over the tokens that overlap the span",
    "span_last": "the last token that overlaps the span",
    "every": "every token, each an example of its own with the label of its text (or its own)",
    "max": "every token, of which the highest score speaks for the text",
}
EACH = ("every", "max")  # one row a token
CHUNK_BYTES = 1 << 28  # of activations held at once beside the result


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledRows:
    """Rows of activations by cell, and for each row its label, its group, its pair and the example that it is of.

    A cell is a hook point, or "hook @ position" where there are several positions; all cells have the same rows.
    `positions` are those of the tokens chosen. `pairs` is None where the examples have none or a row is a token.
    """

    X: Mapping[str, Float[Tensor, "n _"]]
    y: Shaped[np.ndarray, " n"]  # 0 and 1, or float64 targets
    groups: list
    pairs: list | None = None
    documents: Int[np.ndarray, " n"]
    positions: tuple[str, ...] = ()
    model: str = ""  # fingerprint

    def __len__(self) -> int:
        return len(self.y)

    def example_scores(self, scores: Any) -> Float[Tensor, " examples"]:
        """Return one score an example from one a row: as they are, or with "max" the highest of its tokens.

        `example_labels` go with them. Raises ValueError for position "every", whose tokens are examples themselves.
        """
        if self.positions == ("every",):
            raise ValueError('with position "every" each token is an example; ask for "max" to have scores of texts')
        return max_over_tokens(scores, self.documents)

    @property
    def example_labels(self) -> Shaped[np.ndarray, " examples"]:
        """The label of each example (equal in all its rows, but for token labels)."""
        return self.y[np.unique(self.documents, return_index=True)[1]]


def cell_key(hook: str, position: str | None) -> str:
    """Return the name of a cell: the hook point, and the position where it is given."""
    return hook if position is None else f"{hook} @ {position}"


def max_over_tokens(scores: Any, documents: Any) -> Float[Tensor, " documents"]:
    """Return the highest score of each document, in the order of their numbers (float64).

    This is how a probe of tokens reads a text: it is scored on every token, and the highest score counts (AxBench,
    arXiv:2501.17148). No elementwise maximum of activations is meant. Raises ValueError for numbers that leave one of
    0 ... their largest out, lengths that differ, nan.
    """
    values = torch.as_tensor(scores).detach().cpu().double()
    numbers = torch.as_tensor(documents).cpu().long()
    if values.ndim != 1 or values.shape != numbers.shape or not len(values):
        raise ValueError(f"scores {tuple(values.shape)} and documents {tuple(numbers.shape)} must be one row, alike")
    if bool(values.isnan().any()):
        raise ValueError("a score is nan: there is no highest one")
    missing = (torch.bincount(numbers) == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(f"documents {missing[:5]} have no score")
    highest = torch.full((int(numbers.max()) + 1,), -torch.inf, dtype=torch.float64)
    return highest.scatter_reduce_(0, numbers, values, "amax")


def token_rows(
    model: Any,
    examples: Examples,
    hooks: str | Iterable[str],
    position: str = "mean",
    *,
    positions: Sequence[str] | None = None,
    batch_size: int = 32,
    max_len: int | None = None,
    long: str | None = None,
    skip_first: int = 0,
    add_bos: bool = True,
    add_generation_prompt: bool = False,
    progress: bool = False,
) -> LabelledRows:
    """Return the rows of labelled examples at hook points (names or globs), float32, every text run once.

    POSITIONS lists what speaks for a text; several of `positions` come from the same pass and then stand in the keys
    ("blocks.2.hook_resid_post @ last"). Pads and special tokens (BOS, EOS, chat marks) never count, nor the first
    `skip_first` tokens of a text (BOS counted; a model without BOS keeps its attention sink there). Examples with token
    labels are read at "every". Texts of more than n_ctx tokens are refused, cut to `max_len`, or read by
    long="windows" (see capture_acts). Chats go through the tokenizer's template.
    Raises ValueError, naming the example (or its file and row), for a text without such tokens, a span that no token
    overlaps, no span where one is asked for; NonFiniteError; HookPointError; MissingError without a tokenizer.
    """
    model = as_model(model)
    wanted = _check_positions([position] if positions is None else list(positions), examples)
    names = expand(model, hooks)
    given = docs.read_documents(
        model, list(examples.texts), add_bos=add_bos, add_generation_prompt=add_generation_prompt
    )
    given = _fitted(model, given, examples, max_len, long)
    keep = choose(model, given, Exclude(bos=True, special=True, first=skip_first)).keep
    _check_kept(keep, given, examples)
    offsets = Offsets(model, examples, given, add_bos, add_generation_prompt)
    masks = {where: _mask(where, keep, given, examples, offsets) for where in wanted}
    numbers, y = given.numbers, torch.from_numpy(examples.labels)
    each = wanted[0] in EACH
    rows = torch.arange(len(examples))
    if each:
        rows = numbers[masks[wanted[0]]]
        y = y[rows]
        if examples.token_labels is not None:
            marks = token_marks(examples, given, offsets, choose(model, given, Exclude(bos=True, special=True)).keep)
            masks[wanted[0]] = keep & (marks >= 0)
            rows, y = numbers[masks[wanted[0]]], marks[masks[wanted[0]]]
            if not len(rows):
                raise ValueError("no token has a label: with outside=None only tokens in spans do")
    union = torch.stack(list(masks.values())).any(0)
    parts = [
        _reduced(acts, union[part], numbers[part], {k: m[part] for k, m in masks.items()})
        for acts, part in _captured(model, given, names, union, batch_size, long, progress)
    ]
    X = {
        cell_key(name, where if len(wanted) > 1 else None): torch.cat([p[name, where] for p in parts])
        for name in names
        for where in wanted
    }
    index = rows.tolist()
    return LabelledRows(
        X=X,
        y=y.numpy(),
        groups=[examples.groups[i] for i in index],
        pairs=None if each or examples.pairs is None else list(examples.pairs),
        documents=rows.numpy(),
        positions=tuple(wanted),
        model=model.fingerprint,
    )


def _check_positions(wanted: list[str], examples: Examples) -> list[str]:
    unknown = [where for where in wanted if where not in POSITIONS]
    if unknown or not wanted:
        raise ValueError(f"positions are {wanted}; each must be one of: {', '.join(POSITIONS)}")
    if len(set(wanted)) < len(wanted) or (len(wanted) > 1 and any(where in EACH for where in wanted)):
        raise ValueError(
            f"positions are {wanted}; several give one row a text, each once: every and max stand alone, since they "
            "have other rows"
        )
    if examples.token_labels is not None and wanted != ["every"]:
        raise ValueError(f'the examples have token labels, which position "every" reads, not {wanted}')
    if any(where.startswith("span") for where in wanted):
        missing = [i for i, span in enumerate(examples.spans or [None] * len(examples)) if span is None]
        if missing:
            raise ValueError(f"{examples.place(missing[0])} has no span, and position {wanted} reads spans")
    return wanted


def _fitted(
    model: Model, given: docs.Documents, examples: Examples, max_len: int | None, long: str | None
) -> docs.Documents:
    """Return the documents, cut where that was asked for; raises ValueError for one that is too long."""
    if long not in (None, "windows") or (long and max_len is not None):
        raise ValueError(f'long is {long!r}; it is None or "windows", and max_len cuts instead')
    if max_len is not None:
        if max_len < 1:
            raise ValueError(f"max_len is {max_len}; it must be at least 1")
        given = docs.trim(given, max_len)[0]
    over = (given.counts > model.n_ctx).nonzero().flatten().tolist()
    if over and long is None:
        raise ValueError(
            f"{examples.place(over[0])} has {int(given.counts[over[0]])} tokens, {model.name} takes {model.n_ctx}; "
            f'cut it with max_len={model.n_ctx}, or read it by long="windows"'
        )
    return given


def _check_kept(keep: Bool[Tensor, " n"], given: docs.Documents, examples: Examples) -> None:
    counts = torch.bincount(given.numbers[keep], minlength=len(given))
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{examples.place(empty[0])} has no token but special ones ({len(empty)} such texts)")


def _mask(
    where: str, keep: Bool[Tensor, " n"], given: docs.Documents, examples: Examples, offsets: Offsets
) -> Bool[Tensor, " n"]:
    """Return which tokens a position reads."""
    mask = span_mask(examples, given, offsets, keep) if where.startswith("span") else keep
    if not where.endswith("last"):
        return mask
    held = mask.nonzero().flatten()
    ends = torch.bincount(given.numbers[held], minlength=len(given)).cumsum(0) - 1
    last = torch.zeros_like(mask)
    last[held[ends]] = True
    return last


def _captured(
    model: Model,
    given: docs.Documents,
    names: list[str],
    union: Bool[Tensor, " n"],
    batch_size: int,
    long: str | None,
    progress: bool,
) -> Iterator[tuple[Acts, slice]]:
    """Yield the rows wanted of some documents at a time, and the slice of all tokens that these have."""
    width = 4 * sum(model.hook_point(name).d for name in names)
    heavy = torch.bincount(given.numbers[union], minlength=len(given)).cumsum(0) * width
    rows, masks, starts = given.rows(), list(union.split(given.counts.tolist())), given.starts.tolist()
    chunk = (heavy - 1).div(CHUNK_BYTES, rounding_mode="floor").tolist()
    first = 0
    while first < len(rows):
        end = next((i for i in range(first, len(rows)) if chunk[i] != chunk[first]), len(rows))
        acts = capture_acts(
            model, rows[first:end], names, include=masks[first:end], exclude=(), batch_size=batch_size, long=long,
            nonfinite="keep", progress=progress,
        )  # fmt: skip
        for hook, bad in acts.nonfinite.items():
            row = int(bad[0])
            number, place = first + int(acts.documents[row]), int(acts.positions[row])
            raise nonfinite(hook, number, place, acts[hook][row], model.name)
        yield acts, slice(starts[first], starts[end] if end < len(rows) else len(union))
        first = end


def _reduced(
    acts: Acts, union: Bool[Tensor, " n"], numbers: Int[Tensor, " n"], masks: Mapping[str, Bool[Tensor, " n"]]
) -> dict[tuple[str, str], Float[Tensor, "_ _"]]:
    """Return the rows of each hook point and position, from those of all tokens that any position reads."""
    found = {}
    own = numbers[union] - numbers[0]
    for where, mask in masks.items():
        chosen = mask[union]
        document = own[chosen]
        counts = torch.bincount(document)
        for name in acts.hooks:
            rows = acts[name][chosen]
            if where not in EACH:
                sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64)
                rows = (sums.index_add_(0, document, rows.double()) / counts[:, None]).float()
            found[name, where] = rows
    return found

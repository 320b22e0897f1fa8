"""Prompts and what shall follow them: read from what a user gives, and as padded rows with their target tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.acts.documents import is_chat, read_documents
from interp.concepts.labelled.examples import Examples, Text, numbered
from interp.model import tokens
from interp.model.loading import Model

__all__ = ["Item", "Prepared", "as_items", "prepare"]

FORMS = {
    "lm": "a text or (prompt, target)",
    "reft": "a text or (prompt, target)",
    "preference": "(chosen, rejected) or (prompt, chosen, rejected)",
}


@dataclass(frozen=True)
class Item:
    """A prompt (a text, maybe empty, or a chat) and its answers: one to learn, or one to prefer to another."""

    prompt: Text
    answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Rows of prompt and answer padded on the right, `width` of them an item (chosen before rejected)."""

    ids: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    special: Bool[Tensor, "b t"]
    starts: Int[Tensor, " b"]  # the column of each row's first answer token
    width: int

    @property
    def readable(self) -> Bool[Tensor, "b t"]:
        """Which tokens are neither pads nor special."""
        return self.mask & ~self.special

    @property
    def targets(self) -> Bool[Tensor, "b t"]:
        """Which tokens are the answer's, those that something stands before."""
        columns = torch.arange(self.ids.shape[1])
        return self.mask & (columns >= self.starts.clamp(min=1)[:, None])

    def steered(self, positions: str) -> Bool[Tensor, "b t"]:
        """Return which tokens are steered: from the prompt's last one on ("target"), or all; special ones never."""
        if positions == "all":
            return self.readable
        return self.readable & (torch.arange(self.ids.shape[1]) >= self.starts[:, None] - 1)

    def take(self, rows: Int[Tensor, " r"]) -> "Prepared":
        """Return some rows, cut to the longest of them."""
        mask = self.mask[rows]
        t = int(mask.sum(1).max())
        return Prepared(self.ids[rows, :t], mask[:, :t], self.special[rows, :t], self.starts[rows], self.width)


def as_items(given: Any, objective: str, groups: Sequence | None) -> tuple[list[Item], list]:
    """Return items and their groups. Raises ValueError for what does not fit the objective, naming the item."""
    if isinstance(given, Examples):
        items, own = _of_examples(given, objective)
    else:
        if isinstance(given, str) or is_chat(given):
            raise ValueError(f"one text was given; give a list, each item {FORMS[objective]}")
        items = [_item(i, entry, objective) for i, entry in enumerate(given)]
        same = len({repr(item.prompt) for item in items}) < 2
        own = numbered([repr(item if same else item.prompt) for item in items])
    if not items:
        raise ValueError(f"there is nothing to train on; give a list, each item {FORMS[objective]}")
    for i, item in enumerate(items):
        if not all(answer.strip() for answer in item.answers) or len(set(item.answers)) < len(item.answers):
            raise ValueError(f"item {i} has an empty target, or two equal ones: {item.answers}")
    found = own if groups is None else list(groups)
    if len(found) != len(items):
        raise ValueError(f"{len(found)} groups were given for {len(items)} items")
    return items, found


def _item(i: int, entry: Any, objective: str) -> Item:
    two = objective == "preference"
    parts = [entry] if isinstance(entry, str) else list(entry)
    if len(parts) == 1 + two:
        parts = ["", *parts]
    if len(parts) != 2 + two or not all(isinstance(p, str) for p in parts[1:]):
        raise ValueError(f"item {i} is {str(entry)[:80]}; for {objective!r} it must be {FORMS[objective]}")
    if not isinstance(parts[0], str) and not is_chat(parts[0]):
        raise ValueError(f"item {i}: the prompt {str(parts[0])[:60]} is neither a text nor a chat")
    return Item(parts[0], tuple(parts[1:]))


def _of_examples(examples: Examples, objective: str) -> tuple[list[Item], list]:
    """Return the texts of label 1, or the pairs, of labelled examples with their groups."""
    if objective != "preference":
        chosen = [i for i in range(len(examples)) if examples.labels[i] == 1]
        halves = [_halves(examples.texts[i], examples.place(i)) for i in chosen]
        return [Item(prompt, (answer,)) for prompt, answer in halves], [examples.groups[i] for i in chosen]
    if examples.pairs is None:
        raise ValueError("preferences are pairs: give examples with pairs (contrast_pairs, or a pair column)")
    members: dict[Any, dict[int, int]] = {}
    for i, (pair, label) in enumerate(zip(examples.pairs, examples.labels.tolist(), strict=True)):
        if members.setdefault(pair, {}).setdefault(label, i) != i:
            raise ValueError(f"{examples.place(i)}: pair {pair!r} has two members of label {label}")
    items, groups = [], []
    for pair, held in members.items():
        if set(held) != {0, 1}:
            raise ValueError(f"pair {pair!r} has no member of label {1 - next(iter(held))}")
        (prompt, chosen), (other, rejected) = (
            _halves(examples.texts[held[k]], examples.place(held[k])) for k in (1, 0)
        )
        if prompt != other:
            raise ValueError(f"{examples.place(held[1])}: the members of pair {pair!r} have different prompts")
        items.append(Item(prompt, (chosen, rejected)))
        groups.append(examples.groups[held[1]])
    return items, groups


def _halves(text: Text, place: str) -> tuple[Text, str]:
    if isinstance(text, str):
        return "", text
    last: Mapping[str, Any] = text[-1]
    if last["role"] != "assistant" or len(text) < 2:
        raise ValueError(
            f"{place}: a chat to train on ends with the assistant's answer, this one with {last['role']!r}"
        )
    return tuple(text[:-1]), str(last["content"])


def prepare(model: Model, items: Sequence[Item]) -> Prepared:
    """Return items as rows. Raises ValueError for one longer than the model takes, or without a token to predict."""
    width = len(items[0].answers)
    prompts = read_documents(model, [item.prompt for item in items], add_generation_prompt=True).rows()
    answers = tokens.encode_many(
        tokens.need_tokenizer(model.tokenizer), [a for item in items for a in item.answers], add_bos=False
    )
    rows, starts = [], []
    for i, answer in enumerate(answers):
        prompt = prompts[i // width].tolist()
        rows.append(prompt + answer)
        starts.append(len(prompt))
        if len(rows[-1]) > model.n_ctx:
            raise ValueError(f"item {i // width} has {len(rows[-1])} tokens; {model.name} takes {model.n_ctx}")
        if len(rows[-1]) < 2 or not answer:
            raise ValueError(f"item {i // width} has no token to predict: {items[i // width].answers}")
    batch = tokens.pad_rows(rows, fill=tokens.pad_id(model.tokenizer), special_ids=model.special_ids)
    return Prepared(batch.ids, batch.mask, batch.special, torch.tensor(starts), width)

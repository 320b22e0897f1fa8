"""Contrast answers: how much more likely a model finds the answer that matches a concept than the other one."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.concepts.effects.writing import Progress, Push, rows_at_once
from interp.model.hooks import Clock, editing
from interp.model.loading import Model, as_model
from interp.model.tokens import encode_many, need_tokenizer, pad_id, pad_rows
from sae.extras import MissingError

__all__ = ["Contrast", "both_orders", "margins", "read_prompts", "slopes"]

FIELDS = ("prompt", "match", "other")
# which columns are steered, for columns [1, t] and the prompt's width [rows, 1]
STEERED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all": lambda columns, width: columns >= 0,
    "from_last_prompt_token": lambda columns, width: columns >= width - 1,
}
_CHOICES = re.compile(r"\(A\)\s*(?P<a>\S.*?)\s*\(B\)[^\S\n]*(?P<b>\S[^\n]*?)[^\S\n]*(?=\n|\Z)", re.DOTALL)
_LETTER = re.compile(r"(\s*\(?)([AB])(\)?\s*)")


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A prompt and two answers that go on from it as they stand (begin them with a space where one belongs)."""

    prompt: str
    match: str  # the answer that shows the concept
    other: str

    def __post_init__(self) -> None:
        empty = [name for name in FIELDS if not getattr(self, name).strip()]
        if empty or self.match == self.other:
            what = f"{empty[0]} is empty" if empty else f"match and other are the same ({self.match!r})"
            raise ValueError(f"{what}: give a prompt, the answer that matches the concept, and another one")


def read_prompts(path: str | Path) -> list[Contrast]:
    """Return the contrasts of a JSONL file, one object a line with the texts `prompt`, `match` and `other`.

    Raises MissingError where the file is absent, ValueError naming the row (from 1) that is no such object or repeats
    another's prompt, and for a file without rows.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"there is no file {path}")
    found: dict[str, int] = {}
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _contrast(line)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
        if row.prompt in found:
            raise ValueError(f"{path}, row {number}: the prompt of row {found[row.prompt]} again; give each once")
        found[row.prompt] = number
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no prompt; a row is {{{', '.join(repr(name) for name in FIELDS)}: texts}}")
    return rows


def _contrast(line: str) -> Contrast:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not an object with {', '.join(FIELDS)}")
    wrong = [name for name in FIELDS if not isinstance(record.get(name), str)]
    if wrong:
        given = ", ".join(record) or "nothing"
        raise ValueError(f"no text under {wrong[0]!r}; it has {given}, and needs {', '.join(FIELDS)}")
    return Contrast(**{name: record[name] for name in FIELDS})


def both_orders(contrast: Contrast) -> tuple[Contrast, ...]:
    """Return a contrast in both orders of its choices, or alone where it is a plain continuation.

    The choice form: the prompt holds "(A) ..." and "(B) ..." once each, the second up to its line's end, and the
    answers are the letters ("A", "(B)", " (A)"). In the other order the two options are exchanged and so are the
    answers, so that a liking for a letter cancels in the mean. Raises ValueError for letters with options in the
    prompt that cannot be told apart.
    """
    letters = [_LETTER.fullmatch(answer) for answer in (contrast.match, contrast.other)]
    prompt = contrast.prompt
    if not all(letters) or not ("(A)" in prompt or "(B)" in prompt):
        return (contrast,)
    found = _CHOICES.search(prompt)
    if found is None or prompt.count("(A)") != 1 or prompt.count("(B)") != 1:
        raise ValueError(
            f"the answers are letters, but the options of {prompt[-80:]!r} cannot be told: write '(A) ...' and '(B) "
            "...' once each, the second up to the end of its line"
        )
    swapped = "".join(
        [prompt[: found.start("a")], found["b"], prompt[found.end("a") : found.start("b")], found["a"],
         prompt[found.end("b") :]]
    )  # fmt: skip
    flipped = [_LETTER.sub(lambda m: f"{m[1]}{'AB'[m[2] == 'A']}{m[3]}", a) for a in (contrast.match, contrast.other)]
    return contrast, Contrast(prompt=swapped, match=flipped[0], other=flipped[1])


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What the model reads, and the tokens whose log-probabilities there make up a prompt's margin.

    An answer's last token is predicted, not read: two answers of one token each share a row.
    """

    ids: tuple[int, ...]  # what is read
    start: int  # the first column that the two answers and the prompt do not share
    prompt: int
    columns: tuple[int, ...]  # where each of the targets is predicted
    targets: tuple[int, ...]
    weights: tuple[float, ...]  # of the targets' log-probabilities in the margin


def margins(
    model: Any,
    prompts: Sequence[Contrast],
    pushes: Sequence[Push],
    *,
    positions: str = "all",
    per_token: bool = False,
    progress: Progress | None = None,
) -> Float[np.ndarray, "pushes prompts"]:
    """Return log p(match) - log p(other) after each prompt under each push, in nats.

    An answer's log-probability is the sum over its tokens; with `per_token` their mean, which takes the side of
    neither where the answers differ in length. A prompt with choices "(A) ... (B) ..." is read in both orders and the
    two margins averaged (see `both_orders`). Answers are tokenised together with their prompt, and read from the first
    token on that the prompt and both answers do not share. `positions`: "all", or "from_last_prompt_token" (where the
    first token of the answer is predicted, and the answer's own). A strength of 0 is the model as it is; pushes are
    rows of the same batches. Raises ValueError for other positions, and for an answer that adds no token.
    """
    model = as_model(model)
    if positions not in STEERED:
        raise ValueError(f"positions is {positions!r}; of contrast answers it is one of {', '.join(STEERED)}")
    rows = _rows(model, prompts, per_token)
    active = [i for i, (_, strength) in enumerate(pushes) if strength]
    moved: list[Push | None] = [pushes[i] for i in active]
    moved = [None, *moved] if len(active) < len(pushes) else moved
    jobs = [(k, r) for r in sorted(range(len(rows)), key=lambda r: len(rows[r].ids)) for k in range(len(moved))]
    out, done = np.zeros((len(moved), len(prompts))), 0
    while done < len(jobs):
        width = len(rows[jobs[min(done + 255, len(jobs) - 1)][1]].ids)
        some = jobs[done : done + rows_at_once(model, width, 256)]
        logp = _log_probs(model, [moved[k] for k, _ in some], [rows[r] for _, r in some], positions)
        for (k, r), found in zip(some, logp, strict=True):
            out[k, rows[r].prompt] += float(np.dot(rows[r].weights, found))
        done += len(some)
        if progress is not None:
            progress("contrast answers", done, len(jobs))
    at = {i: k + (len(active) < len(pushes)) for k, i in enumerate(active)}
    return out[[at.get(i, 0) for i in range(len(pushes))]]


def _rows(model: Model, prompts: Sequence[Contrast], per_token: bool) -> list[_Row]:
    if not prompts:
        raise ValueError("there is no prompt")
    tokenizer, rows = need_tokenizer(model.tokenizer), []
    for i, prompt in enumerate(prompts):
        orders = both_orders(prompt)
        for c in orders:
            alone, *both = encode_many(tokenizer, [c.prompt, c.prompt + c.match, c.prompt + c.other])
            start = next((k for k, (a, b, o) in enumerate(zip(alone, *both, strict=False)) if not a == b == o), None)
            start = min(map(len, (alone, *both))) if start is None else start
            if min(map(len, both)) <= start or not start:
                raise ValueError(
                    f"an answer to {c.prompt[-80:]!r} adds no token to its prompt: {c.match!r}, {c.other!r}"
                )
            if max(map(len, both)) > model.n_ctx:
                raise ValueError(
                    f"{max(map(len, both))} tokens of {c.prompt[:60]!r} exceed {model.n_ctx} of {model.name}"
                )
            rows += _row(i, start, [tuple(ids) for ids in both], per_token, 1 / len(orders))
    return rows


def _row(prompt: int, start: int, answers: list[tuple[int, ...]], per_token: bool, share: float) -> list[_Row]:
    """Return the rows of a match and an other: one where both are a single token."""
    parts: dict[tuple[int, ...], list[tuple[int, int, float]]] = {}
    for ids, sign in zip(answers, (1.0, -1.0), strict=True):
        weight = sign * share / (len(ids) - start if per_token else 1)
        parts.setdefault(ids[:-1], []).extend((t - 1, ids[t], weight) for t in range(start, len(ids)))
    out = []
    for ids, wanted in parts.items():
        columns, targets, weights = zip(*wanted, strict=True)
        out.append(_Row(ids=ids, start=start, prompt=prompt, columns=columns, targets=targets, weights=weights))
    return out


def _log_probs(model: Model, pushes: list[Push | None], rows: list[_Row], positions: str) -> list[np.ndarray]:
    """Return the log-probabilities of each row's targets."""
    batch = pad_rows([row.ids for row in rows], fill=pad_id(model.tokenizer), special_ids=model.special_ids)
    columns = torch.arange(batch.ids.shape[1])[None]
    width = torch.tensor([row.start for row in rows])[:, None]
    moved = torch.tensor([push is not None for push in pushes])[:, None]
    steered = STEERED[positions](columns, width) & batch.mask & ~batch.special & moved
    logits = _steered_logits(model, batch.ids, batch.mask, pushes, steered)
    counts = [len(row.targets) for row in rows]
    at_row = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
    at_column = torch.tensor([c for row in rows for c in row.columns])
    targets = torch.tensor([t for row in rows for t in row.targets])
    logp = logits[at_row, at_column].float().log_softmax(-1).cpu().gather(1, targets[:, None])[:, 0]
    return np.split(logp.double().numpy(), np.cumsum(counts)[:-1])


def _steered_logits(
    model: Model,
    ids: Int[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    pushes: list[Push | None],
    steered: Bool[Tensor, "b t"],
) -> Float[Tensor, "b t v"]:
    """Return the logits of rows that each carry their own push at their own columns.

    The rows are prompts with answers of several widths, which no selector of `add` can know in a plain forward.
    """
    given = next((push for push in pushes if push is not None), None)
    if given is None:
        return model.logits(ids, mask)
    direction = given[0]
    zero = torch.zeros_like(direction.vector)
    delta = torch.stack([zero if p is None else float(p[1]) * (p[0].norm or 0.0) * p[0].vector for p in pushes])

    def move(value: Tensor, clock: Clock) -> Tensor:
        wide = torch.promote_types(value.dtype, torch.float32)
        moved = (value.to(wide) + delta.to(value.device, wide)[:, None]).to(value.dtype)
        return torch.where(steered.to(value.device)[..., None], moved, value)

    with editing(model, {direction.hook: move}):
        return model.logits(ids, mask)


def slopes(
    strengths: Sequence[float | int], values: Float[np.ndarray, "*batch strengths prompts"]
) -> Float[np.ndarray, "*batch prompts"]:
    """Return each prompt's least-squares slope of a value over strength, in the value's unit a unit of strength.

    Their mean is the slope of the mean. Raises ValueError for fewer than two different strengths.
    """
    x = np.asarray(strengths, dtype=float)
    if len(Counter(x.tolist())) < 2:
        raise ValueError(f"a slope needs two different strengths, {x.tolist()} was given")
    centred = x - x.mean()
    return np.einsum("s,...sp->...p", centred, values) / (centred @ centred)

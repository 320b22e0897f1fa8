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

from interp.concepts.writing import Progress, Push, rows_at_once
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
    """One answer to be read: its tokens after the prompt's, where it begins, and its share in its prompt's margin."""

    ids: list[int]
    start: int  # the first column that the two answers and the prompt do not share
    prompt: int
    weight: float


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
    jobs: list[tuple[Push | None, _Row]] = [(None, row) for row in rows] if len(active) < len(pushes) else []
    jobs += [(pushes[i], row) for i in active for row in rows]
    order = sorted(range(len(jobs)), key=lambda j: len(jobs[j][1].ids))  # alike in length: few pads
    logp, done = np.zeros(len(jobs)), 0
    while done < len(jobs):
        width = max(len(jobs[j][1].ids) for j in order[done : done + 256])
        some = order[done : done + rows_at_once(model, width, 256)]
        logp[some] = _log_probs(model, [jobs[j] for j in some], positions)
        done += len(some)
        if progress is not None:
            progress("contrast answers", done, len(jobs))
    out = np.zeros((len(jobs) // len(rows), len(prompts)))
    for j, (_, row) in enumerate(jobs):
        out[j // len(rows), row.prompt] += row.weight * logp[j]
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
            for ids, sign in zip(both, (1.0, -1.0), strict=True):
                n = len(ids) - start if per_token else 1
                rows.append(_Row(ids=ids, start=start, prompt=i, weight=sign / len(orders) / n))
    return rows


def _log_probs(model: Model, jobs: list[tuple[Push | None, _Row]], positions: str) -> Float[np.ndarray, " jobs"]:
    """Return the summed log-probability of each answer."""
    batch = pad_rows([r.ids for _, r in jobs], fill=pad_id(model.tokenizer), special_ids=model.special_ids)
    columns = torch.arange(batch.ids.shape[1])[None]
    width = torch.tensor([row.start for _, row in jobs])[:, None]
    pushes = [push for push, _ in jobs]
    moved = torch.tensor([push is not None for push in pushes])[:, None]
    steered = STEERED[positions](columns, width) & batch.mask & ~batch.special & moved
    logits = _steered_logits(model, batch.ids, batch.mask, pushes, steered)
    logp = logits[:, :-1].float().log_softmax(-1).gather(2, batch.ids[:, 1:, None].to(logits.device))[..., 0].cpu()
    wanted = batch.mask[:, 1:] & (columns[:, 1:] >= width)
    return torch.where(wanted, logp.double(), 0.0).sum(1).numpy()


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

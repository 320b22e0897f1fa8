"""Activations of prompts and of what the model writes after them, read while it writes, with its cache on."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from interp.acts.documents import Documents
from interp.acts.gather import shown
from interp.model import tokens
from interp.model.anatomy import eval_mode
from interp.model.clock import Clock
from interp.model.hooks import editing
from interp.model.loading import Model

MAX_NEW = 20  # Hugging Face's own default
NEAR_TIE = 1e-4  # of the largest logit; float32 rounding moves logits by about a hundredth of this
OURS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "custom_generate", "past_key_values")
SPECULATIVE = ("assistant_model", "prompt_lookup_num_tokens")


@dataclass(frozen=True)
class Written:
    """Prompts with what was written after them, one document a returned sequence, and a row for every token."""

    documents: Documents
    is_new: Bool[Tensor, " n"]
    values: dict[str, Float[Tensor, "n _"]]
    generated: tuple[str, ...] | None
    near_ties: tuple[tuple[int, int, float], ...]  # document, position, difference of the two best logits


def generate_rows(
    model: Model,
    prompts: Documents,
    names: list[str],
    options: int | Mapping[str, Any],
    *,
    batch_size: int,
    dtype: torch.dtype | None,
    progress: bool = False,
) -> Written:
    """Return the activations of prompts and of the tokens that Hugging Face's generate writes after them.

    `options` are generate's own, greedy unless they say otherwise, or a number of new tokens (20 unless given).
    Prompts are padded on the left, in batches in the order given. A document ends where generation ended it (EOS
    included); each of `num_return_sequences` is a document. The last new token has no forward in generate: the loop is
    stopped one step later than it would, which gives it one, and what that step chose is dropped.
    A near tie is a greedy choice whose two best logits differ by at most 1e-4 of the largest (4 eps in half
    precision): there, another batch or cache may choose otherwise. Sampled choices have none.
    Raises ValueError for a model that cannot generate, for beams and speculative decoding, which reorder or take back
    what was read (generate first, then capture the texts), for a prompt of no token, and for more tokens than the
    model takes.
    """
    given = _options(model, options)
    _check_prompts(model, prompts, given)
    rows = prompts.rows()
    groups = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    found = [_write(model, group, names, given, dtype) for group in shown(groups, progress)]
    ids = [row for batch in found for row in batch.ids]
    new = [n for batch in found for n in batch.new]
    times = len(ids) // len(rows) if rows else 1
    texts = None if prompts.texts is None else tuple(t for text in prompts.texts for t in [text] * times)
    counts = torch.tensor([len(row) for row in ids], dtype=torch.long)
    documents = Documents(torch.cat(ids) if ids else prompts.ids, counts, texts)
    fronts = counts - torch.tensor(new, dtype=torch.long)
    values = {
        name: torch.cat([batch.values.pop(name) for batch in found])
        if found
        else torch.empty(0, model.hook_point(name).d, dtype=dtype or model.dtype)
        for name in names
    }
    tail = [row[len(row) - n :] for row, n in zip(ids, new, strict=True)]
    written = None if model.tokenizer is None else tuple(model.tokenizer.batch_decode(tail, skip_special_tokens=True))
    ties, first = [], 0
    for batch in found:
        ties += [(first + row, position, margin) for row, position, margin in batch.ties]
        first += len(batch.ids)
    is_new = documents.positions >= fronts.repeat_interleave(counts)
    return Written(documents, is_new, values, written, tuple(ties))


def _options(model: Model, options: int | Mapping[str, Any]) -> dict[str, Any]:
    if not hasattr(model.hf, "generate") or not getattr(model.hf, "can_generate", lambda: True)():
        raise ValueError(f"{model.name} ({type(model.hf).__name__}) cannot generate: it has no head for the next token")
    given = {"max_new_tokens": options} if isinstance(options, int) else dict(options)
    for name in OURS:
        if name in given:
            raise ValueError(f"generate has {name!r}, which capture_acts sets itself; leave it out")
    for name in SPECULATIVE:
        if given.get(name):
            raise ValueError(f"{name}: speculative decoding takes back tokens that were read; leave it out")
    if "static" in str(given.get("cache_implementation")):
        raise ValueError("a static cache has no room for the last token's forward; leave cache_implementation out")
    if not {"max_new_tokens", "max_length", "generation_config"} & given.keys():
        given["max_new_tokens"] = MAX_NEW
    if given.get("max_new_tokens", 1) < 1:
        raise ValueError(f"{given['max_new_tokens']} new tokens; generate needs at least 1")
    if given.get("stop_strings"):
        given.setdefault("tokenizer", tokens.need_tokenizer(model.tokenizer))
    defaults = {"do_sample": False, "disable_compile": True}  # hooks inside a compiled step would not run
    if "generation_config" in given:
        return given
    return {**defaults, "pad_token_id": tokens.pad_id(model.tokenizer), **given}


def _check_prompts(model: Model, prompts: Documents, given: Mapping[str, Any]) -> None:
    if bool((prompts.counts == 0).any()):
        number = int((prompts.counts == 0).nonzero()[0])
        raise ValueError(f"document {number} has no token, and nothing to start from; give some text, or BOS")
    width = int(prompts.counts.max()) if len(prompts) else 0
    new = given.get("max_new_tokens") or 1
    if width + new > model.n_ctx:
        raise ValueError(f"{width} prompt and {new} new tokens exceed the {model.n_ctx} of {model.name}")


@dataclass
class _Batch:
    ids: list[Tensor]
    new: list[int]
    values: dict[str, Tensor]
    ties: list[tuple[int, int, float]]


def _write(model: Model, rows: list[Tensor], names: list[str], given: dict[str, Any], dtype: Any) -> _Batch:
    """Write after one batch of prompts and read the hook points at every step."""
    batch = tokens.pad_rows([row.tolist() for row in rows], fill=tokens.pad_id(model.tokenizer), side="left")
    width = batch.ids.shape[1]
    reader, ties = _Reader(dtype), _Ties(width)
    stops: list[_Late] = []

    def loop(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **more: Any) -> Tensor:
        mode = more["generation_config"].get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            name = mode.name.lower().replace("_", " ")
            raise ValueError(
                f"{name} reorders or takes back rows that were read; generate first, then capture the texts"
            )
        ties.greedy = mode == GenerationMode.GREEDY_SEARCH
        stops.append(_Late(stopping_criteria))
        out = type(model)._sample(model, input_ids, LogitsProcessorList([*logits_processor, ties]), stops[0], **more)
        return getattr(out, "sequences", out)

    with eval_mode(model.hf), editing(model, {name: partial(reader.note, name) for name in names}):
        out = model.hf.generate(
            input_ids=batch.ids.to(model.device),
            attention_mask=batch.mask.long().to(model.device),
            custom_generate=loop,
            **given,
        )
    sequences, ends = out.cpu(), stops[0].ends.tolist()
    times = len(sequences) // len(rows)
    begins = [width - len(row) for row in rows for _ in range(times)]
    ids = [row[a:b] for row, a, b in zip(sequences, begins, ends, strict=True)]
    values = {}
    for name in names:
        whole = reader.whole(name)
        values[name] = torch.cat([row[a:b] for row, a, b in zip(whole, begins, ends, strict=True)])
    bound = max(NEAR_TIE, 4 * torch.finfo(model.dtype).eps) if model.dtype != torch.float32 else NEAR_TIE
    near = [(row, column - begins[row], margin) for row, column, margin in ties.near(bound) if column < ends[row]]
    return _Batch(ids, [end - width for end in ends], values, near)


class _Reader:
    """The values of each column of a generation, taken the first time that a forward reaches it."""

    def __init__(self, dtype: torch.dtype | None):
        self._dtype = dtype
        self._parts: dict[str, list[Tensor]] = {}
        self._filled: dict[str, int] = {}

    def note(self, name: str, value: Float[Tensor, "b q d"], clock: Clock) -> Tensor:
        """Take the columns not yet there (without a cache every forward begins again at the first); change nothing."""
        skip = max(0, self._filled.get(name, 0) - clock.past)
        new = value[:, skip:]
        if new.shape[1]:
            self._parts.setdefault(name, []).append(new.detach().to("cpu", self._dtype or value.dtype, copy=True))
            self._filled[name] = clock.past + value.shape[1]
        return value

    def whole(self, name: str) -> Float[Tensor, "b t d"]:
        """Return all columns, and forget them."""
        return torch.cat(self._parts.pop(name), dim=1)


class _Late(StoppingCriteriaList):
    """The same criteria one step later, so that a forward runs over the token at which they held; `ends` says where."""

    ends: Int[Tensor, " rows"]

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        held = input_ids.shape[1] - 1
        if not hasattr(self, "ends"):  # the first token has just been written: nothing could hold before it
            self.ends = torch.full((len(input_ids),), -1)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        done = super().__call__(input_ids[:, :-1], scores, **more)
        self.ends = torch.where(done.cpu() & (self.ends < 0), held, self.ends)
        return (self.ends >= 0).to(input_ids.device)


class _Ties(LogitsProcessor):
    """Looks at every choice: by how much the best logit wins. Changes nothing."""

    def __init__(self, width: int):
        self.width, self.greedy = width, False
        self._steps: list[tuple[int, Tensor]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.greedy:
            best = scores.topk(2, dim=-1).values.float()
            largest = scores.masked_fill(scores.isinf(), 0).abs().amax(-1).float()
            self._steps.append((input_ids.shape[1], torch.stack([best[:, 0] - best[:, 1], largest]).cpu()))
        return scores

    def near(self, bound: float) -> list[tuple[int, int, float]]:
        """Return (row, column, margin) of the choices won by at most `bound` times the largest logit, row by row."""
        found = [
            (int(row), column, float(margins[row]))
            for column, (margins, largest) in self._steps
            for row in (margins <= bound * largest).nonzero().squeeze(1)
        ]
        return sorted(found)

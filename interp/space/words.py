"""Words as vectors: what a language model holds at a word, layer by layer."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.model.hooks import expand, reading
from interp.model.tokens import need_tokenizer
from interp.space.neighbors import Space, SpaceError

if TYPE_CHECKING:
    from interp.model.loading import Model

MARKERS = ("Ġ", "▁")  # a leading space in byte-level BPE, in sentencepiece


class WordsError(SpaceError):
    """Words or templates that cannot be read off a model, or a vocabulary without marked words."""


def whole_words(tokenizer: Any) -> dict[str, int]:
    """Return the words that are one piece of the vocabulary, and their token ids, in the order of the ids.

    A word is a piece of a leading-space marker and letters alone ("Ġking", "▁king"); case is kept. Raises WordsError
    for a vocabulary without such pieces, MissingError without a tokenizer.
    """
    vocabulary: dict[str, int] = need_tokenizer(tokenizer).get_vocab()
    marker = _marker(vocabulary)
    to_bytes = {char: byte for byte, char in _byte_chars().items()} if marker == "Ġ" else {}
    words: dict[str, int] = {}
    for piece, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        if not piece.startswith(marker):
            continue
        word = piece[1:]
        if to_bytes and not word.isascii():  # byte-level pieces spell each byte of UTF-8 as a character of its own
            word = bytes(to_bytes.get(char, 0) for char in word).decode("utf-8", errors="replace")
        if word.isalpha():
            words[word] = number
    return words


def word_space(
    model: "Model", words: Iterable[str], hook: str, templates: Sequence[str] = ("{}",), *, batch_size: int = 256
) -> Space:
    """Return the residual of each word at its last sub-token at one hook point (see `layer_spaces`)."""
    spaces = layer_spaces(model, words, [hook], templates, batch_size=batch_size)
    return next(iter(spaces.values()))


def layer_spaces(
    model: "Model",
    words: Iterable[str],
    hooks: str | Iterable[str],
    templates: Sequence[str] = ("{}",),
    *,
    batch_size: int = 256,
) -> dict[str, Space]:
    """Return, a hook point (by its canonical name), the Space of the words' residuals, all in one pass.

    A word stands after BOS in each template, at "{}", and is read at its last sub-token; the mean over templates is
    kept, raw, in float32 on the CPU. A causal model cannot see what follows, so a template is cut after the word. Hook
    points: any spelling, globs ("resid_post.*"), "embed". Raises HookPointError, WordsError for templates or words that
    cannot be used, MissingError without a tokenizer.
    """
    tokenizer = need_tokenizer(model.tokenizer)
    names, items = expand(model, hooks), list(words)
    _check(items, templates)
    sums: dict[str, Tensor] = {}
    last = torch.zeros(0)
    rows = slice(0)

    def keep(name: str, value: Tensor) -> None:
        at_word = value[torch.arange(len(value), device=value.device), last.to(value.device)].float().cpu()
        sums.setdefault(name, torch.zeros(len(items), value.shape[-1]))[rows] += at_word

    lead = _lead(tokenizer)
    with reading(model, names, keep):
        for template in templates:
            before = template.partition("{}")[0] or lead
            for start in range(0, len(items), batch_size):
                rows = slice(start, start + batch_size)
                batch = model.tokenize([before + word for word in items[rows]])
                _check_ends(batch.mask & ~batch.special, items[rows], tokenizer)
                last = batch.mask.sum(dim=1) - 1
                model.run(batch.ids, batch.mask)
    return {name: Space(sums[name] / len(templates), items) for name in names}


def _marker(vocabulary: dict[str, int]) -> str:
    counts = {marker: sum(piece.startswith(marker) for piece in vocabulary) for marker in MARKERS}
    marker = max(MARKERS, key=lambda m: counts[m])
    if not counts[marker]:
        raise WordsError(
            f"none of the {len(vocabulary)} pieces begins with a leading-space marker ({' or '.join(MARKERS)}): "
            "whole words cannot be told from word ends; pass your own list of words instead"
        )
    return marker


def _byte_chars() -> dict[int, str]:
    """Return the character that stands for each byte in byte-level BPE: itself where printable, else from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _lead(tokenizer: Any) -> str:
    """Return what must stand before a bare word so that it is read as a word of its own, not as a word's start."""
    first = tokenizer.tokenize("a")[:1]
    return "" if first and first[0].startswith(MARKERS) else " "


def _check(items: list[str], templates: Sequence[str]) -> None:
    if isinstance(templates, str) or not templates:
        raise WordsError(f"templates must be a list of at least one text with '{{}}' in it, not {templates!r}")
    odd = [template for template in templates if template.count("{}") != 1]
    if odd:
        raise WordsError(f"a template must hold '{{}}' once, where the word goes; {odd[0]!r} does not")
    if not items or not all(word.strip() for word in items):
        raise WordsError("words must be a list of at least one text, none of them blank")
    if len(set(items)) != len(items):
        double = next(word for i, word in enumerate(items) if word in items[:i])
        raise WordsError(f"words must be unique, but {double!r} is there twice")


def _check_ends(real: Tensor, words: list[str], tokenizer: Any) -> None:
    """Raise where a row has no token of its own, so that BOS would be read in the word's place."""
    empty = (~real.any(dim=1)).nonzero()[:, 0].tolist()
    if empty:
        raise WordsError(f"{type(tokenizer).__name__} makes no token of {words[empty[0]]!r}; leave it out")

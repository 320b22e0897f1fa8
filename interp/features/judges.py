"""What explains a latent, and what judges an explanation: token lists offline, prompts for a language model."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from interp.features.examples import Context

__all__ = [
    "Explainer",
    "Judge",
    "LabelError",
    "PromptExplainer",
    "PromptJudge",
    "TokenListExplainer",
    "TokenListJudge",
    "detection_prompt",
    "explain_prompt",
    "fuzzing_prompt",
    "marked",
    "parse_answers",
]

_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters: no text holds them


class LabelError(ValueError):
    """Latents, answers or explanations from which no score follows."""


@runtime_checkable
class Explainer(Protocol):
    """What turns contexts in which a latent fires, strongest first, into a text that says what it fires on."""

    def __call__(self, examples: Sequence[Context]) -> str: ...


@runtime_checkable
class Judge(Protocol):
    """What tells, of each text, whether an explanation fits it: a bool, or a probability (0.5 and more is yes).

    A text with marked tokens (<<so>>) asks whether these are what the explanation describes; one without marks,
    whether anything in the text is.
    """

    def __call__(self, explanation: str, texts: Sequence[str]) -> Sequence[bool | float | int]: ...


def marked(context: Context, at: Sequence[int] = ()) -> str:
    """Return a context's text, the tokens at the given places in <<these>>, a leading space outside of them.

    Double brackets of the text itself are set apart (< <), so that only marks look like marks.
    """
    pieces = []
    for i, token in enumerate(context.tokens):
        space = " " if i in at and token.startswith(" ") else ""
        pieces.append(f"{space}{_OPEN}{token[len(space) :]}{_CLOSE}" if i in at else token)
    text = "".join(pieces).replace("<<", "< <").replace(">>", "> >")
    return text.replace(_OPEN, "<<").replace(_CLOSE, ">>")


@dataclass(frozen=True, kw_only=True)
class TokenListExplainer:
    """An explainer without a model: the tokens with the largest sum of activations, as a JSON list."""

    n: int = 10

    def __call__(self, examples: Sequence[Context]) -> str:
        """Return "fires on: [...]". Raises LabelError where nothing fires in the examples."""
        sums: dict[str, float] = defaultdict(float)
        for context in examples:
            for token, value in zip(context.tokens, context.activations, strict=True):
                sums[token] += abs(value)
        tokens = [token for token, value in sorted(sums.items(), key=lambda item: -item[1])[: self.n] if value > 0]
        if not tokens:
            raise LabelError("the latent fires in none of the examples: there is nothing to list")
        return f"fires on: {json.dumps(tokens, ensure_ascii=False)}"


class TokenListJudge:
    """The judge of TokenListExplainer: looks the tokens of the list up in the text, or among the marked tokens."""

    def __call__(self, explanation: str, texts: Sequence[str]) -> list[float]:
        """Return, of a text with marks, the share of them on the list; else 1.0 where one of the list is in the text.

        A token that ends in a letter must not go on in the text. Raises LabelError for an explanation without a list.
        """
        found = re.search(r"\[.*\]", explanation, re.DOTALL)
        try:
            tokens = json.loads(found.group()) if found else None
        except json.JSONDecodeError:
            tokens = None
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise LabelError(f"the explanation holds no JSON list of tokens: {explanation[:80]!r}")
        ends = {token: _NO_LETTER if token[-1:].isalpha() else "" for token in tokens if token}
        pattern = re.compile("|".join(re.escape(token) + end for token, end in ends.items()) or _NOTHING)
        answers = []
        for text in texts:
            marks = [space + inner for space, inner in _MARK.findall(text)]
            hits = [mark in tokens for mark in marks]
            answers.append(sum(hits) / len(hits) if marks else float(bool(pattern.search(text))))
        return answers


@dataclass(frozen=True)
class PromptExplainer:
    """An explainer that asks a language model: `complete` maps a prompt to the model's answer."""

    complete: Callable[[str], str]

    def __call__(self, examples: Sequence[Context]) -> str:
        """Return the answer, stripped."""
        return self.complete(explain_prompt(examples)).strip()


@dataclass(frozen=True)
class PromptJudge:
    """A judge that asks a language model about `batch` texts at a time."""

    complete: Callable[[str], str]
    batch: int = 10

    def __call__(self, explanation: str, texts: Sequence[str]) -> list[bool]:
        """Return one answer a text. Raises LabelError for an answer that parse_answers cannot read."""
        answers: list[bool] = []
        for at in range(0, len(texts), self.batch):
            part = texts[at : at + self.batch]
            prompt = fuzzing_prompt if any(_MARK.search(text) for text in part) else detection_prompt
            answers += parse_answers(self.complete(prompt(explanation, part)), len(part))
        return answers


def explain_prompt(examples: Sequence[Context]) -> str:
    """Return a prompt that asks what the marked tokens of the examples have in common."""
    lines = [
        "A unit of a language model fires on certain tokens. In each text below the tokens on which it fires stand in",
        "<<double brackets>>; behind the text is the strength of each, from 1 (weak) to 10 (its strongest).",
        "",
    ]
    top = max((abs(value) for context in examples for value in context.activations), default=0.0) or 1.0
    for number, context in enumerate(examples, 1):
        at = [i for i, value in enumerate(context.activations) if value]
        strengths = [f"{context.tokens[i].strip()} {max(1, round(10 * abs(context.activations[i]) / top))}" for i in at]
        lines.append(f"{number}. {_one_line(marked(context, at))}   ({', '.join(strengths)})")
    return "\n".join([*lines, "", "Say in one sentence what it fires on. Answer with that sentence alone."])


def detection_prompt(explanation: str, texts: Sequence[str]) -> str:
    """Return a prompt that asks in which of the texts the explained unit fires."""
    return _question(explanation, texts, "Does the unit fire on some token of the text?")


def fuzzing_prompt(explanation: str, texts: Sequence[str]) -> str:
    """Return a prompt that asks in which of the texts the marked tokens are those that the explanation describes."""
    return _question(explanation, texts, "Are the tokens in <<double brackets>> those on which the unit fires?")


def parse_answers(answer: str, n: int) -> list[bool]:
    """Return n answers out of a language model's text: a JSON list, numbered lines, or a row of yes and no.

    Reads 1 and 0, yes and no, true and false in any case, and probabilities. The last list of n wins, so that an
    answer may think aloud first. Raises LabelError where there are not exactly n, or one cannot be read.
    """
    for inner in reversed(re.findall(r"\[([^\[\]]*)\]", answer)):
        words = [_said(word) for word in inner.split(",")]
        if len(words) == n and None not in words:
            return [bool(word) for word in words]
    lines = re.findall(r"^\W*(?:text\s*)?(\d+)\s*[.):\-]+\s*\W*([\w.]+)", answer, re.IGNORECASE | re.MULTILINE)
    numbered = {int(number): _said(word) for number, word in lines}
    if sorted(int(number) for number, _ in lines) == list(range(1, n + 1)) and None not in numbered.values():
        return [bool(numbered[i]) for i in range(1, n + 1)]
    pieces = re.findall(r"[\w.]+", answer)
    words = [_said(piece) for piece in pieces if piece.strip(".").lower() in _WORDS]
    words = words or [said for piece in pieces if (said := _said(piece)) is not None]  # numbers, where they stand alone
    if len(words) == n and not lines:
        return [bool(word) for word in words]
    raise LabelError(f"{n} answers of yes or no were asked for, and cannot be read from: {answer[:200]!r}")


_NO_LETTER, _NOTHING = r"(?![^\W\d_])", r"(?!)"
_MARK = re.compile(r"( ?)<<(.+?)>>", re.DOTALL)
_WORDS = {"yes": True, "true": True, "y": True, "no": False, "false": False, "n": False}


def _one_line(text: str) -> str:
    return text.strip().replace("\n", "\\n")


def _said(word: str) -> bool | None:
    word = word.strip().strip("\"'`*.").lower()
    if word in _WORDS:
        return _WORDS[word]
    return float(word) >= 0.5 if re.fullmatch(r"[01]|0?\.\d+|1\.0*|0\.0*", word) else None


def _question(explanation: str, texts: Sequence[str], question: str) -> str:
    listed = [f"{number}. {_one_line(text)}" for number, text in enumerate(texts, 1)]
    head = [f"A unit of a language model: {explanation}", "", *listed, "", question]
    return "\n".join(
        [*head, f"Answer with a JSON list of {len(texts)} numbers, 1 for yes and 0 for no, and nothing else."]
    )

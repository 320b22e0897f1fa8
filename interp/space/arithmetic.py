"""Word arithmetic as people write it (king - man + woman), answered layer by layer on a model."""

import difflib
from typing import TYPE_CHECKING, Any

from interp.space.analogy import most_similar
from interp.space.neighbors import UnknownItemError
from interp.space.words import layer_spaces, whole_words

if TYPE_CHECKING:
    from interp.model.loading import Model


def expression(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the positive and the negative words of an expression given as words and signs, or as one text.

    Raises ValueError where signs and words do not alternate.
    """
    parts = " ".join(words).replace("+", " + ").replace("-", " - ").split()
    signed: dict[str, list[str]] = {"+": [], "-": []}
    sign, wanted = "+", "word"
    for part in parts:
        if part in signed:
            if wanted == "sign" or not (signed["+"] or signed["-"]):
                sign, wanted = part, "word"
                continue
        elif wanted == "word":
            signed[sign].append(part)
            wanted = "sign"
            continue
        raise ValueError(f"cannot read {' '.join(parts)!r} at {part!r}; write words with + or - between them")
    if wanted == "word" or not signed["+"]:
        raise ValueError(f"cannot read {' '.join(parts)!r}; write for example: king - man + woman")
    return signed["+"], signed["-"]


def in_vocabulary(words: list[str], vocabulary: dict[str, int]) -> list[str]:
    """Return the words as the vocabulary spells them (Paris for paris).

    Raises UnknownItemError naming the closest words for one that is not a single token in any case.
    """
    lower = {known.lower(): known for known in reversed(vocabulary)}
    found = []
    for word in words:
        spelled = word if word in vocabulary else lower.get(word.lower())
        if spelled is None:
            close = difflib.get_close_matches(word.lower(), lower, n=3)
            hint = f"closest: {', '.join(lower[w] for w in close)}" if close else "no word is close to it"
            raise UnknownItemError(f"{word!r} is not one token of this model's vocabulary; {hint}")
        found.append(spelled)
    return found


def layer_answers(model: "Model", positive: list[str], negative: list[str], *, top: int = 3) -> list[dict[str, Any]]:
    """Return, for the embedding and every block's output, the best answers of positive - negative words.

    Candidates are all whole words of the vocabulary, read alone after BOS and centred at each layer. `answers` leaves
    the query words out; `honest` is the best answer with nothing left out.
    Raises UnknownItemError for a word that is not one token.
    """
    vocabulary = whole_words(model.tokenizer)
    plus, minus = in_vocabulary(positive, vocabulary), in_vocabulary(negative, vocabulary)
    hooks = ["embed", *(f"resid_post.{layer}" for layer in range(model.n_layers))]
    spaces = layer_spaces(model, vocabulary, hooks)
    rows = []
    for hook, space in zip(hooks, spaces.values(), strict=True):
        centred = space.centred()
        found = most_similar(centred, plus, minus, topn=top)
        honest = most_similar(centred, plus, minus, topn=1, exclude=False)[0][0]
        rows.append({"layer": hook, "answers": [{"word": w, "cosine": c} for w, c in found], "honest": honest})
    return rows

"""The text that `tiny` learns from: stories, a little of some old books, and generated text with known concepts."""

import re
from collections import Counter
from pathlib import Path

from interp.data.generator import documents
from interp.data.lists import all_words

GAP = "\n\n"  # between paragraphs and between documents
STORIES = ("train_v1_head.txt", "train_v2_head.txt", "train_v1_head_lowercase_rest.txt")
BOOKS = ("bryant-stories.txt", "burgess-busterbrown.txt", "carroll-alice.txt")
STRAIGHT = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "…": "..."})


def clean(text: str) -> str:
    """Return the text with plain quotation marks and one blank line between paragraphs."""
    text = re.sub(r"<\|endoftext\|>", "\n", text.translate(STRAIGHT))
    return GAP.join(line.strip() for line in text.splitlines() if line.strip())


def proper_names(cased: str) -> set[str]:
    """Return the words that the text nearly always writes with a capital, sentence starts left aside."""
    inside = Counter(re.findall(r"(?<=[a-z,] )([A-Za-z][a-z]+)\b", cased))
    return {w.lower() for w, n in inside.items() if w[0].isupper() and n >= 3 and n > 9 * inside[w.lower()]}


def restore_case(text: str, names: set[str]) -> str:
    """Return lower-case text with capitals at sentence starts, in names and in "I" (one story file has lost them)."""
    text = re.sub(r"\bi\b", "I", text)
    text = re.sub(r"\b[a-z]+\b", lambda m: m[0].capitalize() if m[0] in names else m[0], text)
    start = r'(^|[.!?]["\']?\s+["\']?|[,:]\s"|\n["\']?)([a-z])'
    return re.sub(start, lambda m: m[1] + m[2].upper(), text)


def stories(folder: Path) -> str:
    """Return the training stories as one text in one style of case and quotation marks."""
    texts = {name: clean((folder / "tinystories" / name).read_text(encoding="utf8")) for name in STORIES}
    names = proper_names(texts[STORIES[0]] + texts[STORIES[1]])
    texts[STORIES[2]] = restore_case(texts[STORIES[2]], names)
    return GAP.join(texts.values())


def books(folder: Path) -> str:
    """Return the old books, paragraphs unwrapped."""
    raw = GAP.join((folder / "gutenberg" / name).read_text(encoding="utf8") for name in BOOKS)
    paragraphs = (" ".join(part.split()) for part in raw.translate(STRAIGHT).split("\n\n"))
    return GAP.join(part for part in paragraphs if part)


def generated(characters: int, seed: int) -> str:
    """Return about so many characters of generated documents."""
    parts, size = [], 0
    for document in documents(seed):
        parts.append(document)
        size += len(document)
        if size > characters:
            return GAP.join(parts)
    raise AssertionError("documents never ends")


def forced_words() -> list[str]:
    """Return the words that must be one token each: those of the bundled lists."""
    return [" " + word for word in all_words()]

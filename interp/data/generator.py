"""Write plain English with known concepts: labelled sentences, and documents to train or to test a model on.

Templates (`templates/*.txt`) have slots that word tables fill. Two kinds of sentence never enter `documents`, from
which the bundled model learnt: those of every fifth template, and one word-template pair in six. A probe tested on
them therefore cannot live on sentences that the model has seen.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from interp.data.lists import TOPICS, sentiment_words, table, topic_words

HELD_OUT_EVERY = 5
PAIR_HELD_OUT_EVERY = 6
NAMES = {
    "male": ("Tom", "Tim", "Ben", "Jack", "Max", "Sam"),
    "female": ("Lily", "Mia", "Anna", "Sue", "Lucy", "Sara"),
}
PRONOUNS = {
    "male": {"he": "he", "his": "his", "him": "him", "himself": "himself"},
    "female": {"he": "she", "his": "her", "him": "her", "himself": "herself"},
}
NEUTRAL_NOUNS = (
    "house", "party", "garden", "book", "song", "dinner", "school", "game", "room", "movie", "town", "meal", "picture",
    "hotel", "story", "place", "cake", "dream", "beach", "gift",
)  # fmt: skip
SENTIMENT = {
    "positive": {
        "feeling": ("happy", "glad", "good", "pleased"),
        "reaction": ("smiled", "laughed", "clapped", "cheered", "loved it", "said thank you"),
    },
    "negative": {
        "feeling": ("sad", "upset", "bad", "angry"),
        "reaction": ("cried", "frowned", "went away", "hated it", "sighed", "wanted to go home"),
    },
}
SCALE = {
    "low": {"number": ("one", "two", "three"), "degree": ("tiny", "slight", "minimal"), "end": ("bottom", "left")},
    "high": {"number": ("eight", "nine", "ten"), "degree": ("huge", "great", "enormous"), "end": ("top", "right")},
}
TENSE_CUES = {
    "past": ("Yesterday", "Last week", "Long ago", "Last night", "Two days ago"),
    "third": ("Every day", "Each week", "On most days", "Every night", "Nowadays"),
}
TOPIC_PLACES = {"finance": ("office", "exchange"), "sport": ("arena", "field"), "technology": ("lab", "workshop")}
FILLERS = (
    "One day, {name} woke up early.",
    "{name} and {other_name} were friends.",
    "{name} went home.",
    "It was a sunny day.",
    "Then {name} had an idea.",
    "{name} told {other_name} all about it.",
    "They sat down to rest.",
    "{name} said goodbye.",
    "The sun went down.",
    "{other_name} nodded.",
)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Sentences with a label each, and what they were made of (one entry a sentence)."""

    attribute: str
    texts: list[str]
    labels: list[str]
    templates: list[int]  # index of the template: the group of every split
    words: list[str]  # the word that carries the concept


@cache
def templates(attribute: str) -> tuple[str, ...]:
    """Return the attribute's sentence templates, training cues left out."""
    return tuple(line for line in _lines(attribute) if not line.startswith("+"))


@cache
def cues(attribute: str) -> tuple[str, ...]:
    """Return the lines that only training documents use (they give the concept away)."""
    return tuple(line[2:] for line in _lines(attribute) if line.startswith("+ "))


def is_held_out(template: int) -> bool:
    """Tell whether a template is absent from every training document."""
    return template % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _lines(attribute: str) -> list[str]:
    text = files("interp.data").joinpath("templates", f"{attribute}.txt").read_text(encoding="utf8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _pair_held_out(attribute: str, template: int, word: str) -> bool:
    return zlib.crc32(f"{attribute}|{template}|{word}".encode()) % PAIR_HELD_OUT_EVERY == 0


def _sentence(template: str, slots: dict[str, str], *, french: bool = False) -> str:
    text = template.format_map(slots)
    if not french:
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    for start, char in enumerate(text):
        if char.isalpha():  # a quotation mark may come first
            return text[:start] + char.upper() + text[start + 1 :]
    return text


def _names(rng: random.Random) -> dict[str, str]:
    name, other = rng.sample(NAMES["male"] + NAMES["female"], 2)
    return {"name": name, "other_name": other}


# A filler takes (rng, row of its table, label) and returns the slots; the concept's word is slots["word"].


def _capital(rng: random.Random, row: dict[str, str], label: str) -> dict[str, str]:
    return {**row, "word": row["country"]}


def _gender(rng: random.Random, row: dict[str, str], label: str) -> dict[str, str]:
    return {**row, **PRONOUNS[label], "word": row[label], "person": rng.choice(NAMES[label])}


def _tense(rng: random.Random, row: dict[str, str], label: str) -> dict[str, str]:
    form = "past" if label == "past" else "third"
    return {**row, "verb": row[form], "word": row[form], "cue": rng.choice(TENSE_CUES[form]) + ","}


def _plural(rng: random.Random, row: dict[str, str], label: str) -> dict[str, str]:
    return {**row, "noun": row[label], "word": row[label]}


def _comparative(rng: random.Random, row: dict[str, str], label: str) -> dict[str, str]:
    return {**row, "word": row["base"]}


def _scale(rng: random.Random, row: dict[str, str], label: str) -> dict[str, str]:
    return {**row, "word": row[label], **{slot: rng.choice(words) for slot, words in SCALE[label].items()}}


def _sentiment(rng: random.Random, row: dict[str, str], label: str) -> dict[str, str]:
    slots = {slot: rng.choice(words) for slot, words in SENTIMENT[label].items()}
    other = rng.choice(sentiment_words()[label])
    return {"word": row[label], "other": other, "noun": rng.choice(NEUTRAL_NOUNS), **slots}


def _topic(rng: random.Random, row: dict[str, str], label: str) -> dict[str, str]:
    b, c = rng.sample([word for word in topic_words()[label] if word != row[label]], 2)
    return {"word": row[label], "a": row[label], "b": b, "c": c, "place": rng.choice(TOPIC_PLACES[label])}


def _language(rng: random.Random, row: dict[str, str], label: str) -> dict[str, str]:
    return {
        **row,
        "en": row["singular"],
        "fr": row["french"],
        "word": row["french" if label == "french" else "singular"],
    }


def _plain(rng: random.Random, row: dict[str, str], label: str) -> dict[str, str]:
    return {**row, "word": next(iter(row.values()))}


@dataclass(frozen=True)
class _Attribute:
    table: str
    labels: tuple[str, ...]
    fill: Callable[[random.Random, dict[str, str], str], dict[str, str]]
    weight: float  # share of the training documents


ATTRIBUTES = {
    "capital": _Attribute("countries", ("country",), _capital, 2.0),
    "gender": _Attribute("gender", ("male", "female"), _gender, 1.5),
    "tense": _Attribute("verbs", ("past", "present"), _tense, 2.5),
    "plural": _Attribute("nouns", ("singular", "plural"), _plural, 1.2),
    "comparative": _Attribute("adjectives", ("base",), _comparative, 1.5),
    "scale": _Attribute("scales", ("low", "high"), _scale, 1.2),
    "sentiment": _Attribute("sentiment", ("positive", "negative"), _sentiment, 1.2),
    "topic": _Attribute("topics", TOPICS, _topic, 1.2),
    "language": _Attribute("nouns", ("english", "french"), _language, 2.0),
    "adverb": _Attribute("adverbs", ("adjective",), _plain, 0.8),
    "agent": _Attribute("agents", ("verb",), _plain, 0.8),
}
LABELLED = ("sentiment", "tense", "plural", "topic", "language")


def _choose(attribute: str, template: str, label: str) -> str:
    """A language template holds both sentences; the label says which is meant."""
    if "|" not in template:
        return template
    english, french = template.split(" | ")
    return french if label == "french" else english


def _word_half(table_name: str, half: str) -> list[dict[str, str]]:
    rows = list(table(table_name))
    random.Random(f"halves of {table_name}").shuffle(rows)
    middle = len(rows) // 2
    return {"all": rows, "a": rows[:middle], "b": rows[middle:]}[half]


def labelled(attribute: str, *, split: str = "train", words: str = "all", n: int = 400, seed: int = 0) -> Labelled:
    """Return `n` labelled sentences of one attribute, labels balanced within every template (but for the last).

    `split`: "train" uses the templates that training documents use, "held_out" those that they never use.
    `words`: "all", or one of the disjoint halves "a" and "b" of the concept's words.
    Raises ValueError for an attribute without labels or an unknown split.
    """
    if attribute not in LABELLED:
        raise ValueError(f"no labelled sentences for {attribute!r}; attributes: {', '.join(LABELLED)}")
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; it is 'train' or 'held_out'")
    rng = random.Random(f"{attribute} {split} {words} {seed}")
    spec, rows = ATTRIBUTES[attribute], _word_half(ATTRIBUTES[attribute].table, words)
    allowed = {row[label] for row in rows for label in spec.labels} if attribute == "topic" else set()
    choices = [i for i in range(len(templates(attribute))) if is_held_out(i) == (split == "held_out")]
    template = choices[0]
    out = Labelled(attribute=attribute, texts=[], labels=[], templates=[], words=[])
    for i in range(n):
        label = spec.labels[i % len(spec.labels)]
        if (
            label == spec.labels[0]
        ):  # every label once a template: labels shuffled within templates are then a fair null
            template = rng.choice(choices)
        slots = _names(rng) | spec.fill(rng, rng.choice(rows), label)
        if allowed:  # both words of a topic sentence come from the half asked for
            slots["b"] = rng.choice([w for w in topic_words()[label] if w in allowed and w != slots["a"]])
        out.texts.append(
            _sentence(_choose(attribute, templates(attribute)[template], label), slots, french=label == "french")
        )
        out.labels.append(label)
        out.templates.append(template)
        out.words.append(slots["word"])
    return out


def _document(rng: random.Random) -> str:
    attribute = rng.choices(list(ATTRIBUTES), [spec.weight for spec in ATTRIBUTES.values()])[0]
    spec = ATTRIBUTES[attribute]
    row, names, sentences = rng.choice(table(spec.table)), _names(rng), []
    label = rng.choice(spec.labels)
    plain = [i for i in range(len(templates(attribute))) if not is_held_out(i)]
    hints = list(cues(attribute))
    rng.shuffle(plain)
    rng.shuffle(hints)
    for _ in range(rng.randint(3, 6)):
        if rng.random() < 0.4:  # both ends of a pair in one document: they come to share their surroundings
            label = rng.choice(spec.labels)
            row = row if attribute not in ("sentiment", "topic") else rng.choice(table(spec.table))
        slots = names | spec.fill(rng, row, label)
        seen = [i for i in plain if not _pair_held_out(attribute, i, slots["word"])]
        if hints and (not seen or rng.random() < 0.4):
            sentences.append(_sentence(hints.pop(), slots))
        elif seen:
            plain.remove(seen[0])
            sentences.append(
                _sentence(_choose(attribute, templates(attribute)[seen[0]], label), slots, french=label == "french")
            )
    if rng.random() < 0.4:
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(FILLERS).format_map(names))
    return " ".join(sentences)


def documents(seed: int = 0) -> Iterator[str]:
    """Yield short documents without end: a few sentences each about one word or one pair of words."""
    rng = random.Random(f"documents {seed}")
    while True:
        yield _document(rng)


def sample_texts(n: int, seed: int = 0) -> list[str]:
    """Return the first `n` documents of a seed."""
    stream = documents(seed)
    return [next(stream) for _ in range(n)]

"""Facts about words: relations between pairs, words of known sentiment and topic (package data, `words/*.tsv`).

Every word is one token of the bundled model's vocabulary, so that a word is one residual vector.
"""

import csv
from functools import cache
from importlib.resources import files

# relation -> (table, column of the first word, column of the second)
RELATIONS = {
    "country_capital": ("countries", "country", "capital"),
    "country_language": ("countries", "country", "language"),
    "male_female": ("gender", "male", "female"),
    "base_past": ("verbs", "base", "past"),
    "base_participle": ("verbs", "base", "participle"),
    "base_third": ("verbs", "base", "third"),
    "singular_plural": ("nouns", "singular", "plural"),
    "english_french": ("nouns", "singular", "french"),
    "base_comparative": ("adjectives", "base", "comparative"),
    "base_superlative": ("adjectives", "base", "superlative"),
    "low_high": ("scales", "low", "high"),
    "adjective_adverb": ("adverbs", "adjective", "adverb"),
    "verb_agent": ("agents", "verb", "agent"),
}
TOPICS = ("finance", "sport", "technology")


@cache
def table(name: str) -> tuple[dict[str, str], ...]:
    """Return the rows of one word table, as dicts by column name."""
    text = files("interp.data").joinpath("words", f"{name}.tsv").read_text(encoding="utf8")
    return tuple(csv.DictReader(text.splitlines(), delimiter="\t"))


def relations() -> dict[str, list[tuple[str, str]]]:
    """Return every bundled relation as its list of word pairs (first word, second word)."""
    return {name: [(row[a], row[b]) for row in table(file)] for name, (file, a, b) in RELATIONS.items()}


def sentiment_words() -> dict[str, list[str]]:
    """Return the words by sentiment: `positive` and `negative`."""
    rows = table("sentiment")
    return {polarity: [row[polarity] for row in rows] for polarity in ("positive", "negative")}


def topic_words() -> dict[str, list[str]]:
    """Return the words by topic: finance, sport, technology."""
    rows = table("topics")
    return {topic: [row[topic] for row in rows] for topic in TOPICS}


def all_words() -> list[str]:
    """Return every listed word once, in the order of the tables."""
    words = [word for pairs in relations().values() for pair in pairs for word in pair]
    words += [word for group in (sentiment_words(), topic_words()) for listed in group.values() for word in listed]
    return list(dict.fromkeys(words))

"""The generated text is what it says it is: labels, held-out templates, word halves, one token a word."""

import re
from collections import Counter
from itertools import islice

import pytest

from interp.data import generator, lists


@pytest.fixture(scope="module")
def corpus() -> str:
    return "\n".join(islice(generator.documents(seed=3), 6000))


def test_every_relation_has_twenty_distinct_pairs():
    assert len(lists.relations()) >= 12
    for name, pairs in lists.relations().items():
        assert len(set(pairs)) == len(pairs) >= 20, name
        assert len({b for _, b in pairs}) == len(pairs), f"{name}: a target comes twice"


@pytest.mark.parametrize("attribute", [a for a in generator.ATTRIBUTES if a not in ("adverb", "agent")])
def test_every_attribute_has_fifty_templates(attribute: str):
    assert len(set(generator.templates(attribute))) >= 50


@pytest.mark.parametrize("attribute", generator.LABELLED)
def test_labels_are_balanced_and_say_which_word_was_used(attribute: str):
    data = generator.labelled(attribute, n=120)
    assert len(set(Counter(data.labels).values())) == 1
    for text, word in zip(data.texts, data.words, strict=True):
        assert word.lower() in text.lower()


@pytest.mark.parametrize("attribute", generator.LABELLED)
def test_labels_are_balanced_within_every_template(attribute: str):
    data = generator.labelled(attribute, n=300)
    for template in set(data.templates):
        counts = Counter(x for x, t in zip(data.labels, data.templates, strict=True) if t == template)
        assert len(counts) == len(set(data.labels)) and len(set(counts.values())) == 1


@pytest.mark.parametrize("attribute", generator.LABELLED)
def test_held_out_sentences_share_no_template_with_training(attribute: str):
    groups = [set(generator.labelled(attribute, split=split, n=300).templates) for split in ("train", "held_out")]
    assert groups[0] and groups[1] and not groups[0] & groups[1]


@pytest.mark.parametrize("attribute", generator.LABELLED)
def test_the_halves_of_the_words_are_disjoint(attribute: str):
    a, b = (generator.labelled(attribute, words=half, n=300) for half in "ab")
    assert not set(a.words) & set(b.words)
    if attribute == "topic":  # a sentence holds two words of its topic
        listed = {word for words in lists.topic_words().values() for word in words}
        tokens = [{t.strip(".,:?") for text in data.texts for t in text.split()} & listed for data in (a, b)]
        assert not tokens[0] & tokens[1]


@pytest.mark.parametrize("attribute", generator.LABELLED)
def test_documents_never_hold_a_held_out_sentence(attribute: str, corpus: str):
    held = set(generator.labelled(attribute, split="held_out", n=1500).texts)
    seen = set(generator.labelled(attribute, split="train", n=1500).texts)
    assert not [text for text in held if text in corpus]
    assert any(text in corpus for text in seen)  # else the line above would prove nothing


def written(template: int, word: str, text: str) -> bool:
    """Tell whether a sentiment template stands in the text with this word, whatever fills its other slots."""
    frame = re.escape(generator.templates("sentiment")[template].format(word=word, noun="NOUN", name="NAME"))
    return re.search(frame.replace("NOUN", "[a-z]+").replace("NAME", "[A-Z][a-z]+"), text, re.IGNORECASE) is not None


def test_documents_never_hold_a_held_out_pair_of_word_and_template():
    text = " ".join(islice(generator.documents(seed=4), 4000))
    words = lists.sentiment_words()["positive"]
    frames = generator.templates("sentiment")
    lines = [*frames, *generator.cues("sentiment")]
    # two short templates stand inside longer lines, which write them with every word
    nested = [i for i, frame in enumerate(frames) if sum(frame.lower() in line.lower() for line in lines) > 1]
    assert nested == [0, 2]
    used = [i for i in range(len(frames)) if not generator.is_held_out(i) and i not in nested]
    pairs = {withheld: [] for withheld in (True, False)}
    for i in used:
        for word in words:
            pairs[generator._pair_held_out("sentiment", i, word)].append((i, word))
    assert 0.1 < len(pairs[True]) / (len(used) * len(words)) < 0.25
    assert not [pair for pair in pairs[True] if written(*pair, text)]
    assert sum(written(*pair, text) for pair in pairs[False]) > 100  # else the line above would prove nothing


def test_a_seed_gives_the_same_text_and_another_gives_another():
    assert generator.sample_texts(20, seed=1) == generator.sample_texts(20, seed=1)
    assert generator.sample_texts(20, seed=1) != generator.sample_texts(20, seed=2)


def test_articles_fit_the_next_word(corpus: str):
    assert " a ant" not in corpus and " a elephant " not in corpus
    assert " an elephant" in corpus


def test_unknown_attributes_and_splits_are_refused():
    with pytest.raises(ValueError, match="sentiment"):
        generator.labelled("mood")
    with pytest.raises(ValueError, match="held_out"):
        generator.labelled("tense", split="test")

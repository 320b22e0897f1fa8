"""Analogy formulas and scores against slow twins, planted offsets and hand-computed answers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.space.analogy import (
    choose_and_score,
    complete,
    evaluate,
    evaluate_questions,
    most_similar,
    read_questions,
)
from interp.space.neighbors import Space, UnknownItemError
from interp.space.scores import AnalogyError, halves
from interp.space.solvers import METHODS


def slow_scores(method, unit, examples, b):
    """Every candidate in turn, straight from the formulas of the papers; examples: [(a, a')] rows."""
    a, a2 = examples[0]
    source, target = (np.mean([unit[p[i]] for p in examples], axis=0) for i in (0, 1))
    w = target - source
    scores = []
    for d in unit:
        cos = {name: float(d @ unit[row]) for name, row in (("a", a), ("a2", a2), ("b", b))}
        if method == "3cosadd":
            v = unit[a2] - unit[a] + unit[b]
            scores.append(d @ v / np.linalg.norm(v))
        elif method == "3cosmul":
            scores.append((1 + cos["a2"]) / 2 * (1 + cos["b"]) / 2 / ((1 + cos["a"]) / 2 + 0.001))
        elif method == "pair_direction":
            gap = d - unit[b]
            length = np.linalg.norm(gap)
            scores.append(gap @ (unit[a2] - unit[a]) / length if length > 1e-9 else -np.inf)
        elif method == "3cosavg":
            v = unit[b] + w
            scores.append(d @ v / np.linalg.norm(v))
        else:
            p = 1 / (1 + math.exp(-20 * (d @ w - (target + source) @ w / 2)))
            scores.append(p * cos["b"])
    return np.array(scores)


def slow_evaluate(method, space, relations):
    """Question by question: (accuracy, honest, only_b, n)."""
    unit = (space.vectors / space.vectors.norm(dim=1, keepdim=True)).double().numpy()
    right = []
    for pairs in relations.values():
        rows = [(space.index[a], space.index[b]) for a, b in pairs if a in space and b in space]
        for j, (b, answer) in enumerate(rows):
            others = [p for i, p in enumerate(rows) if i != j]
            if method in ("3cosavg", "lrcos"):
                sets = [[p for p in others if not set(p) & {b, answer}]]
            else:
                sets = [[p] for p in others if p[0] != b]
            for examples in sets:
                query = {b} if method in ("3cosavg", "lrcos") else {b, *examples[0]} if examples else {b}
                if not examples or answer in query:
                    continue
                scores = slow_scores(method, unit, examples, b)
                masked = [-np.inf if i in query else s for i, s in enumerate(scores)]
                near = [-np.inf if i == b else s for i, s in enumerate(unit @ unit[b])]
                right.append([np.argmax(s) == answer for s in (masked, scores, near)])
    return (*np.mean(right, axis=0), len(right))


def planted(n_pairs=8, d=24, length=0.6, noise=0.02, extra=40, seed=0):
    """A relation as an offset of given length between random words; its targets sit nearest to source + offset."""
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(n_pairs, d))
    source /= np.linalg.norm(source, axis=1, keepdims=True)
    offset = rng.normal(size=d)
    offset *= length / np.linalg.norm(offset)
    target = source + offset + rng.normal(size=(n_pairs, d)) * noise
    others = rng.normal(size=(extra, d))
    names = [f"a{i}" for i in range(n_pairs)] + [f"b{i}" for i in range(n_pairs)] + [f"x{i}" for i in range(extra)]
    space = Space(np.concatenate([source, target, others / np.linalg.norm(others, axis=1, keepdims=True)]), names)
    return space, {"offset": [(f"a{i}", f"b{i}") for i in range(n_pairs)]}


MESSY = [("a0", "b0"), ("a1", "b1"), ("a2", "b0"), ("a1", "b3"), ("a4", "a4"), ("b5", "a5"), ("a6", "b6"), ("no", "b1")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_score_equals_its_slow_twin(method, seed):
    space, relations = planted(length=0.9, noise=0.15, seed=seed)
    relations["messy"] = MESSY  # shared sources and targets, a word to itself, a reversed pair, a missing word
    result = evaluate(space, relations, method)
    accuracy, honest, only_b, n = slow_evaluate(method, space, relations)
    assert (result.accuracy, result.honest, result.only_b, result.n) == pytest.approx((accuracy, honest, only_b, n))
    assert 0 < result.accuracy < 1 or method == "lrcos"  # neither all right nor all wrong, which would show little


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_offset_is_found_and_a_shuffled_one_is_not(method):
    space, relations = planted(n_pairs=10, length=0.8)
    pairs = relations["offset"]
    assert evaluate(space, relations, method).accuracy > 0.95
    names = [b for _, b in pairs]
    shuffled = {"shuffled": [(a, names[(i + 1) % len(names)]) for i, (a, _) in enumerate(pairs)]}
    assert evaluate(space, shuffled, method).accuracy < 0.2


def test_the_honest_score_of_3cosadd_needs_a_long_offset_and_lrcos_does_not():
    # whether the noise of two targets, 0.12 sqrt(2 x 24), outweighs the offset with the noise of one
    short, relations = planted(n_pairs=10, length=0.4, noise=0.12)
    long, _ = planted(n_pairs=10, length=0.8, noise=0.04)
    assert evaluate(short, relations).accuracy > 0.9
    assert evaluate(short, relations).honest < 0.2
    assert evaluate(long, relations).honest > 0.9
    assert evaluate(short, relations, "lrcos").honest > 0.7  # the class score keeps the sources out by itself


def test_a_question_computed_by_hand():
    corner = {"man": (1, 0, 0), "woman": (1, 1, 0), "king": (1, 0, 1), "queen": (1, 1, 1), "table": (0, -1, 0)}
    space = Space(np.array(list(corner.values()), dtype=float), list(corner))
    # king - man + woman of the unit vectors: (r - 1 + r, r, r) with r = sqrt(1/2)
    r = math.sqrt(0.5)
    v = np.array([2 * r - 1, r, r])
    expected = v @ np.ones(3) / math.sqrt(3) / np.linalg.norm(v)
    [(word, score)] = most_similar(space, ["king", "woman"], ["man"], topn=1)
    assert (word, score) == ("queen", pytest.approx(expected, abs=1e-12))
    # 3CosMul at queen: c(woman) = c(king) = (1 + sqrt(2/3)) / 2, c(man) = (1 + sqrt(1/3)) / 2
    c, c_man = (1 + math.sqrt(2 / 3)) / 2, (1 + math.sqrt(1 / 3)) / 2
    [(word, score)] = most_similar(space, ["king", "woman"], ["man"], topn=1, method="3cosmul")
    assert (word, score) == ("queen", pytest.approx(c * c / (c_man + 0.001), abs=1e-12))
    assert complete(space, [("man", "woman")], "king", topn=1) == [(word, pytest.approx(score, abs=1e-12))]


def test_without_exclusion_the_query_words_may_answer():
    space, _ = planted(length=0.3, noise=0.12)
    [(with_exclusion, _)] = most_similar(space, ["a1", "b0"], ["a0"], topn=1)
    [(without, _)] = most_similar(space, ["a1", "b0"], ["a0"], topn=1, exclude=False)
    assert (with_exclusion, without) == ("b1", "a1")
    assert space.most_similar(["a1", "b0"], "a0", topn=1)[0][0] == "b1"


@pytest.mark.parametrize(("n_examples", "method"), [(1, "3cosmul"), (2, "3cosavg"), (5, "lrcos")])
def test_completing_picks_its_method_by_the_number_of_examples(n_examples, method):
    space, relations = planted(n_pairs=8)
    pairs = relations["offset"][:n_examples]
    assert complete(space, pairs, "a7", topn=3) == complete(space, pairs, "a7", topn=3, method=method)
    assert complete(space, pairs, "a7", topn=1)[0][0] == "b7"


@given(st.permutations(range(30)), st.sampled_from(METHODS))
@settings(max_examples=15, deadline=None)
def test_permuting_the_items_changes_no_score(order, method):
    space, relations = planted(n_pairs=6, noise=0.15, extra=18)
    mixed = Space(space.vectors[list(order)], [space.items[i] for i in order])
    ours, theirs = evaluate(space, relations, method, n_boot=20), evaluate(mixed, relations, method, n_boot=20)
    assert ours.total == theirs.total


def test_unanswerable_and_missing_words_are_reported_not_dropped():
    space, _ = planted()
    result = evaluate(space, {"messy": MESSY, "absent": [("no", "nope"), ("a0", "b0")]})
    assert result.given == 10
    assert result.covered == 8
    assert result.not_covered == {"messy": (("no", "b1"),), "absent": (("no", "nope"),)}
    assert result.missing == ("no", "nope")
    assert list(result.not_scored) == ["absent"]
    # 7 covered pairs make 42 ordered pairs of pairs; out go 2 with the source a1 twice, 2 with the target b0 twice,
    # and 6 that ask a4 : ?
    assert (result.n, result.unanswerable) == (32, 10)
    assert result.to_dict()["accuracy"] == result.accuracy == result.total.correct / result.n


def test_intervals_are_those_of_the_pairs_not_of_the_questions():
    space, relations = planted(n_pairs=12, length=0.9, noise=0.3, seed=3)
    result = evaluate(space, relations, n_boot=4000)
    p, n = result.accuracy, result.n
    low, high = result.interval
    naive = 2 * 1.96 * math.sqrt(p * (1 - p) / n)
    assert low < p < high
    assert high - low > 1.5 * naive  # 132 questions of 12 pairs are not 132 draws
    assert evaluate(space, relations, n_boot=4000).interval == (low, high)
    loo = evaluate(space, relations, "3cosavg", n_boot=4000)
    q = loo.accuracy
    width = 2 * 1.96 * math.sqrt(q * (1 - q) / 12)  # here a question is a pair
    assert loo.interval[1] - loo.interval[0] == pytest.approx(width, rel=0.25)


def test_question_files_are_read_by_section_and_answered_as_pairs_are(tmp_path):
    space, relations = planted(n_pairs=5, noise=0.2)
    pairs = relations["offset"]
    path = tmp_path / "questions.txt"
    lines = [f"{a.upper()} {b} {c} {d}" for a, b in pairs for c, d in pairs if a != c]
    path.write_text(": first\n" + "\n".join(lines) + "\n\n: second\nno b1 a2 b2\na0 b0 a1 b1\n")
    questions = read_questions(path, lower=True)
    assert {name: len(rows) for name, rows in questions.items()} == {"first": 20, "second": 2}
    for method in METHODS:
        result, twin = evaluate_questions(space, questions, method), evaluate(space, relations, method)
        assert result.by_relation["first"].accuracy == twin.accuracy
        assert result.by_relation["first"].honest == twin.honest
        assert result.by_relation["first"].accuracy_interval == pytest.approx(twin.interval)
        assert result.missing == ("no",)
    path.write_text("a b c\n")
    with pytest.raises(AnalogyError, match="line 1 comes before a section"):
        read_questions(path)
    path.write_text(": s\na b c\n")
    with pytest.raises(AnalogyError, match="line 2 has 3 words"):
        read_questions(path)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_halves_share_no_word_and_lose_no_pair(seed):
    pairs = [("a", "b"), ("a", "c"), ("d", "c"), ("e", "f"), ("g", "h"), ("i", "j"), ("k", "l")]
    one, other = halves({"r": pairs}, seed)
    assert sorted(one["r"] + other["r"]) == sorted(pairs)
    words = [{w for p in half["r"] for w in p} for half in (one, other)]
    assert not words[0] & words[1]
    assert {len(one["r"]), len(other["r"])} == {3, 4}


def test_the_layer_is_chosen_on_one_half_and_scored_on_the_other():
    good, relations = planted(n_pairs=12, length=0.8)
    bad = Space(torch.randn(len(good), 24, generator=torch.Generator().manual_seed(5)), good.items)
    relations["with a gap"] = [*relations["offset"][:6], ("zzz", "b0")]
    choice = choose_and_score({"bad": bad, "good": good}, relations)
    assert choice.layer == "good"
    assert choice.accuracy == choice.scoring["good"].accuracy > 0.9
    assert choice.scoring["bad"].accuracy < 0.3
    assert choice.not_covered == {"with a gap": (("zzz", "b0"),)}
    assert choice.chosen.n == 2 * 15 * 2 // 2 + 3 * 2  # 6 pairs: 30 questions; 3 pairs: 6
    assert set(choice.to_dict()["layers"]) == {"bad", "good"}


def test_choosing_among_noise_does_not_inflate_the_score():
    _, relations = planted(n_pairs=10)
    items = planted(n_pairs=10)[0].items
    gain, level = [], []
    for seed in range(12):
        draws = torch.randn(8, len(items), 4, generator=torch.Generator().manual_seed(seed))
        noise = {str(i): Space(draw, items) for i, draw in enumerate(draws)}
        choice = choose_and_score(noise, relations, seed=seed, n_boot=10)
        gain.append(choice.choosing[choice.layer].accuracy)
        level.append(choice.accuracy)
    assert np.mean(gain) > 2 * np.mean(level)  # the half that chose is flattered, the other is not


def test_refusals_say_what_to_do():
    space, relations = planted()
    with pytest.raises(UnknownItemError, match="closest: a1"):
        most_similar(space, "a11")
    with pytest.raises(AnalogyError, match="no analogy method 'cosadd'"):
        evaluate(space, relations, "cosadd")
    with pytest.raises(AnalogyError, match="missing, for one: no"):
        evaluate(space, {"r": [("no", "way"), ("not", "here")]})
    with pytest.raises(AnalogyError, match="two pairs that share no word"):
        evaluate(space, {"r": [("a0", "b0")]})
    with pytest.raises(AnalogyError, match="at least one positive"):
        most_similar(space)
    with pytest.raises(AnalogyError, match="takes one example pair, not 2"):
        complete(space, relations["offset"][:2], "a5", method="3cosadd")
    with pytest.raises(AnalogyError, match="'other' differs from 'one'"):
        choose_and_score({"one": space, "other": space.subset(space.items[1:])}, relations)


@pytest.mark.shared
def test_glove_answers_3967_of_the_6762_covered_google_questions(shared_data):
    folder = shared_data / "word_vectors"
    archive = np.load(folder / "glove6B_50d_10k" / "glove6B_50d_10k.npz")
    space = Space(archive["vectors"], archive["words"].tolist())
    result = evaluate_questions(space, read_questions(folder / "questions-words.txt", lower=True))
    assert (result.total.correct, result.n, result.covered, result.given) == (3967, 6762, 6762, 19544)
    assert (result.total.honest, result.only_b) == pytest.approx((2551 / 6762, 1563 / 6762))
    best = most_similar(space, ["king", "woman"], ["man"], topn=1)
    assert best == [("queen", pytest.approx(0.8524, abs=1e-4))]

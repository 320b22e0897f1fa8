"""The dose curve with its nulls: exact answers, laws, a planted effect, and no effect."""

import copy
import json
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from interp.acts.direction import data_fingerprint
from interp.concepts.effects import measuring, scoring, writing
from interp.concepts.effects.calls import effects
from interp.concepts.effects.damage import damages
from interp.concepts.effects.dosing import MEANINGS, Beside, DoseRow
from interp.concepts.effects.fluency import distinct2_rows, longest_repeat, nll_rows, zlib_ratio
from interp.concepts.effects.margins import Contrast, both_orders, margins, read_prompts, slopes
from interp.concepts.effects.measuring import measure_effects
from interp.concepts.effects.nulls import random_directions, shuffled_directions
from interp.concepts.effects.rereading import fit_reader, mean_rows, refuse_overlap
from interp.concepts.labelled.examples import make_examples
from interp.concepts.labelled.token_choice import token_rows
from interp.concepts.reading.finders import direction_from, fit_direction
from interp.concepts.steering.context import add, steer
from interp.data.neutral import neutral_texts
from interp.model.loading import load_model
from sae.extras import MissingError

HOOK = "resid_post.2"
PROMPTS = [
    Contrast(prompt=f"w{i} w{(7 * i) % 60} w{(3 * i + 5) % 60}", match=f" good{i % 10}", other=f" bad{(i * 3) % 10}")
    for i in range(12)
]
NEUTRAL = [" ".join(f"w{(i * j + 3 * j) % 75}" for j in range(12)) for i in range(6)]
SMALL = {"strengths": [0, 0.5, 1], "kl_budget": 5.0, "max_new_tokens": 6, "neutral_texts": NEUTRAL}


@pytest.fixture(scope="module")
def model(build, tokenizer):
    """A random model in whose last residual one axis makes the head say "good" words (ids 4 to 13).

    Another axis of the embedding tells them, so that a classifier can read them.
    """
    hf = build("llama", seed=5)
    with torch.no_grad():
        hf.model.norm.weight.fill_(1.0)
        hf.lm_head.weight.mul_(0.3)
        hf.lm_head.weight[:, 0] = 0.0
        hf.lm_head.weight[4:14, 0] = 1.0
        hf.lm_head.weight[:4] = 0.0
        hf.model.embed_tokens.weight[4:14, 1] += 6.0
    return load_model(hf, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def planted(model):
    return direction_from(torch.eye(32)[0], hook=HOOK, model=model, method="planted")


@pytest.fixture(scope="module")
def nothing(model):
    """A direction that the head does not read: orthogonal to every word's row that the answers need, and to axis 0."""
    rows = model.hf.lm_head.weight.detach()[:24]
    away = torch.randn(32, generator=torch.Generator().manual_seed(8))
    q = torch.linalg.qr(rows.T)[0]
    return direction_from(away - q @ (q.T @ away), hook=HOOK, model=model, method="away")


@pytest.fixture(scope="module")
def labelled():
    """Texts of good words, and of bad and other ones."""
    rng = np.random.default_rng(11)
    labels = [i % 2 for i in range(60)]
    others = [*(f"w{i}" for i in range(60)), *(f"bad{i}" for i in range(10))]
    words = [" ".join(rng.choice(others, 6) if not y else [f"good{i}" for i in rng.integers(0, 10, 6)]) for y in labels]
    return words, labels, [i // 2 for i in range(60)]


@pytest.fixture(scope="module")
def report(model, planted, labelled):
    return measure_effects(model, planted, PROMPTS, labelled=labelled, seed=2, **SMALL)


# margins


def by_hand(model, prompt, answer, direction=None, strength=0.0, positions="all"):
    """Sum the log-probabilities of an answer, one forward a token."""
    ids = model.tokenize([prompt]).ids[0].tolist()
    start, total = len(ids), 0.0
    for token in model.tokenize([answer], add_bos=False).ids[0].tolist():
        step = strength * direction.norm * direction.vector if direction is not None else torch.zeros(32)

        def move(module, args, output, step=step):
            first = 1 if positions == "all" else start - 1
            moved = output.clone()
            moved[:, first:] += step
            return moved

        handle = model.hf.model.layers[2].register_forward_hook(move)
        try:
            total += model.hf(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
        finally:
            handle.remove()
        ids.append(token)
    return total


@pytest.mark.parametrize("positions", ["all", "from_last_prompt_token"])
def test_a_margin_is_the_difference_of_two_sums_by_hand(model, planted, positions):
    prompts = [
        Contrast(prompt="w1 w2 w3", match=" good1", other=" bad1"),
        Contrast(prompt="w9", match=" good1 good2 w5", other=" bad3 w8"),
        Contrast(prompt="w4 w5 w6 w7", match=" w1 good2", other=" w1 bad2"),
    ]
    pushes = [(planted, 0.0), (planted, 0.6), (planted, -0.4)]
    found = margins(model, prompts, pushes, positions=positions)
    for (direction, strength), row in zip(pushes, found, strict=True):
        for c, value in zip(prompts, row, strict=True):
            both = [by_hand(model, c.prompt, a, direction, strength, positions) for a in (c.match, c.other)]
            assert value == pytest.approx(both[0] - both[1], abs=2e-4)
    assert np.ptp(found, axis=0).min() > 0.01


def test_positions_matter_where_the_prompt_is_steered_too(model, build, tokenizer):
    early = direction_from(torch.ones(32), hook="resid_post.0", model=model, method="early")
    a, b = (margins(model, PROMPTS, [(early, 1.0)], positions=p) for p in ("all", "from_last_prompt_token"))
    assert np.abs(a - b).max() > 1e-3
    with pytest.raises(ValueError, match="from_last_prompt_token"):
        margins(model, PROMPTS, [(early, 1.0)], positions="generated")


def test_with_per_token_an_answers_length_takes_no_side(model, planted):
    c = Contrast(prompt="w9", match=" good1 good2 w5", other=" bad3")
    total, mean = (margins(model, [c], [(planted, 0.0)], per_token=p)[0, 0] for p in (False, True))
    match, other = (by_hand(model, c.prompt, a) for a in (c.match, c.other))
    assert total == pytest.approx(match - other, abs=2e-4) and mean == pytest.approx(match / 3 - other, abs=2e-4)


def test_choices_are_read_in_both_orders():
    question = "Which?\nChoices:\n (A) the red one\n (B) the blue one\n\nAnswer:"
    first, second = both_orders(Contrast(prompt=question, match=" (B)", other=" (A)"))
    assert first.prompt == question and (first.match, first.other) == (" (B)", " (A)")
    assert second.prompt == "Which?\nChoices:\n (A) the blue one\n (B) the red one\n\nAnswer:"
    assert (second.match, second.other) == (" (A)", " (B)")
    again = both_orders(second)[1]
    assert again == first
    assert len(both_orders(Contrast(prompt="Tom was", match=" glad", other=" sad"))) == 1
    assert len(both_orders(Contrast(prompt=question, match=" red", other=" blue"))) == 1
    inline = Contrast(prompt="Is it (A) yes or (B) no", match="A", other="B")
    assert both_orders(inline)[1].prompt == "Is it (A) no (B) yes or" or "(A) no" in both_orders(inline)[1].prompt


@pytest.mark.parametrize("prompt", ["(A) x (B) y, so (A) or (B)?\nAnswer:", "(A) one and (B)", "only (B) here"])
def test_letters_whose_options_cannot_be_told_are_refused(prompt):
    with pytest.raises(ValueError, match="cannot be told"):
        both_orders(Contrast(prompt=prompt, match="A", other="B"))


def test_the_mean_over_both_orders_cancels_a_liking_for_a_letter(build, tokenizer):
    names = ["(A)", "(B)", "yes", "no", "ask"]
    assert tokenizer.convert_tokens_to_ids("(A)") == tokenizer.unk_token_id  # so the words stand for themselves
    known = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *names])}
    inner = Tokenizer(models.WordLevel(known, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                    pad_token="<pad>")  # fmt: skip
    hf = build("llama", seed=3)
    with torch.no_grad():
        hf.lm_head.weight.zero_()  # the head says nothing of the text
    hf.lm_head.bias = torch.nn.Parameter(torch.zeros(100))
    hf.lm_head.bias.data[4] = 3.0  # and likes (A), whatever it means
    model = load_model(hf, tokenizer=words)
    direction = direction_from(torch.ones(32), hook=HOOK, model=model, method="x")
    c = Contrast(prompt="ask\n(A) yes\n(B) no\n", match=" (A)", other=" (B)")
    assert margins(model, [c], [(direction, 0.0)])[0, 0] == pytest.approx(0, abs=1e-5)
    alone = Contrast(prompt="ask yes no", match=" (A)", other=" (B)")
    assert margins(model, [alone], [(direction, 0.0)])[0, 0] == pytest.approx(3, abs=1e-5)


def test_an_answer_without_a_token_or_beyond_the_context_is_refused(model, planted):
    deaf = copy.deepcopy(model.tokenizer)
    deaf.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(ValueError, match="adds no token"):
        margins(load_model(model.hf, tokenizer=deaf), [Contrast(prompt="w1", match="~", other=" w2")], [(planted, 0.0)])
    with pytest.raises(ValueError, match="exceed 64"):
        margins(model, [Contrast(prompt="w1 " * 70, match="w2", other="w3")], [(planted, 0.0)])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "row 2: no JSON"), ('["a"]', "row 2: a list"), ('{"prompt": "x", "match": "y"}', "no text under 'other'"),
        ('{"prompt": "x", "match": "y", "other": 3}', "no text under 'other'"),
        ('{"prompt": "x", "match": " ", "other": "z"}', "match is empty"),
        ('{"prompt": "x", "match": "y", "other": "y"}', "are the same"),
        ('{"prompt": "p", "match": "y", "other": "z"}', "row 2: the prompt of row 1 again"),
    ],
)  # fmt: skip
def test_a_wrong_row_of_prompts_is_named(tmp_path, line, says):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "p", "match": " a", "other": " b", "note": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=says):
        read_prompts(path)


def test_prompts_are_read_as_they_stand(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "é\\u2028 p", "match": " a", "other": " b"}\n\n', encoding="utf-8")
    assert read_prompts(path) == [Contrast(prompt="é\u2028 p", match=" a", other=" b")]
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(path)
    with pytest.raises(MissingError):
        read_prompts(tmp_path / "absent.jsonl")


def test_slopes_equal_a_least_squares_fit():
    rng = np.random.default_rng(0)
    x, values = [0, 0.1, 0.4, 1.0], rng.normal(size=(3, 4, 5))
    expected = [[np.polyfit(x, values[c, :, p], 1)[0] for p in range(5)] for c in range(3)]
    assert np.allclose(slopes(x, values), expected)
    with pytest.raises(ValueError, match="two different"):
        slopes([0.5, 0.5], values[:, :2])


# fluency


def slow_repeat(tokens):
    n = len(tokens)
    runs = [k for k in range(1, n) for i in range(n - k) for j in range(i + 1, n - k + 1)
            if tokens[i : i + k] == tokens[j : j + k]]  # fmt: skip
    return max(runs, default=0)


@given(st.lists(st.integers(0, 3), max_size=14))
@settings(max_examples=60, deadline=None)
def test_the_longest_repeat_is_the_longest_run_found_twice(tokens):
    assert longest_repeat(tokens) == slow_repeat(tokens)


def test_repetition_has_exact_answers():
    assert [longest_repeat(x) for x in ([], [1], [1, 2, 3], [7] * 5, [5, 6, 5, 6, 5], [1, 2, 9, 1, 2, 8])] == [
        0, 0, 0, 4, 3, 2,
    ]  # fmt: skip
    text = "the cat sat. " * 8
    assert zlib_ratio(text) == len(zlib.compress(text.encode(), 9)) / len(text.encode()) < 0.3
    with pytest.raises(ValueError, match="empty"):
        zlib_ratio("")
    ids = torch.tensor([[5, 6, 5, 6, 5], [3, 0, 0, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    assert distinct2_rows(ids, real).tolist() == [0.5, 1.0]


def test_a_row_without_a_new_token_has_no_loss(model):
    (w,) = writing.write(model, ["w1", "w2"], [(direction_from(torch.ones(32), hook=HOOK, model=model, method="x"), 0)])
    with pytest.raises(ValueError, match="no new token"):
        nll_rows(model, w.batch, w.ids, torch.zeros_like(w.real))


# damage


def test_kl_is_what_two_softmaxes_give_by_hand(model, planted):
    ids = model.tokenize([NEUTRAL[2]]).ids
    base = model.hf(ids).logits[0, 1:].double().softmax(-1)
    with steer(model, add(planted, 0.5, "all")):
        moved = model.hf(ids).logits[0, 1:].double().softmax(-1)
    kl = sum(p * math.log(p / q) for p, q in zip(base[3].tolist(), moved[3].tolist(), strict=True))
    mean = (base * (base / moved).log()).sum(-1)
    assert mean[3].item() == pytest.approx(kl, rel=1e-9)
    assert damages(model, [(planted, 0.5)], [NEUTRAL[2]])[0, 0] == pytest.approx(mean.mean().item(), rel=1e-4)


def test_damage_does_not_depend_on_the_batch_and_is_nothing_at_strength_0(model, planted, nothing, monkeypatch):
    pushes = [(planted, 0.0), (nothing, 0.7), (planted, 0.3), (nothing, 0.0), (planted, -1.0)]
    together = damages(model, pushes, NEUTRAL)
    assert together[[0, 3]].tolist() == [[0.0, 0.0], [0.0, 0.0]] and (together[[1, 2, 4], 0] > 1e-3).all()
    monkeypatch.setattr("interp.concepts.effects.damage.rows_at_once", lambda *_: 4)
    assert np.allclose(damages(model, pushes, NEUTRAL), together, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="nothing to predict"):
        damages(model, pushes, [""])


# scores


def test_the_harmonic_mean_is_0_where_one_score_is():
    a, b, c = np.array([0.5, 0.0, 1.0]), np.array([0.25, 1.0, 1.0]), np.array([1.0, 1.0, 1.0])
    assert scoring.harmonic_mean(a, b, c).tolist() == [pytest.approx(3 / 7), 0.0, 1.0]
    with pytest.raises(ValueError, match="lie in"):
        scoring.harmonic_mean(a, 2 * c)


def test_scores_follow_their_definitions():
    measured = {
        "reading": np.array([[[0.2], [0.6]]]), "margin": np.array([[[0.0], [math.log(3)]]]),
        "nll": np.array([[[1.0], [1.5]]]), "distinct2": np.array([[[0.8], [0.4]]]),
    }  # fmt: skip
    found = scoring.scores(measured, np.array([[0.0, 0.05]]), 0, 0.1)
    p = [(0.2 + 0.5) / 2, (0.6 + 0.75) / 2]
    assert found["gain"][0, :, 0] == pytest.approx([0, p[1] - p[0]])
    concept, fluency, damage = (p[1] - p[0]) / (1 - p[0]), math.exp(-0.5) * 0.5, math.exp(-0.05)
    assert [found[k][0, 1, 0] for k in ("concept", "fluency", "damage")] == pytest.approx([concept, fluency, damage])
    assert found["combined"][0, :, 0] == pytest.approx([0, 3 / (1 / concept + 1 / fluency + 1 / damage)])
    over = scoring.scores(measured, np.array([[0.0, 0.11]]), 0, 0.1)
    assert over["damage"][0, :, 0].tolist() == [1.0, 0.0] and over["combined"][0, 1, 0] == 0.0


def test_a_value_is_ranked_among_its_nulls():
    value = Beside(value=0.5, random=(0.1, 0.5, 0.2, 0.3), shuffled=(0.4, 0.49))
    assert value.p_random == 2 / 5 and value.beats_shuffled
    assert value.in_random_sd == pytest.approx((0.5 - 0.275) / np.std([0.1, 0.5, 0.2, 0.3], ddof=1))
    assert not Beside(value=0.4, random=(0.1,), shuffled=(0.4,)).beats_shuffled
    with pytest.raises(ValueError, match="no unit"):
        _ = Beside(value=0.4, random=(0.1, 0.1)).in_random_sd


def test_the_smaller_of_equal_strengths_is_chosen_and_none_of_zeros():
    assert scoring.choose([-0.5, 0.0, 0.25, 1.0], np.array([0.4, 0.0, 0.4, 0.1])) == 0.25
    assert scoring.choose([0.0, 0.5], np.zeros(2)) is None


def row_of(value, low, high, random, shuffled):
    gain = Beside(value=value, interval=(low, high), random=random, shuffled=shuffled)
    return DoseRow(strength=0.3, measures={"gain": gain, "kl": Beside(value=0.02)}, chosen_on=0.5)


@pytest.mark.parametrize(
    ("value", "low", "random", "shuffled", "says"),
    [
        (0.4, 0.1, (0.0,) * 20, (0.3,) * 5, "Use 0.3"),
        (0.4, 0.1, (0.0,) * 20, (), "Use 0.3"),
        (0.4, 0.0, (0.0,) * 20, (0.3,) * 5, "the interval reaches 0"),
        (0.4, 0.1, (0.4, *(0.0,) * 19), (0.3,) * 5, "1 of 20 random directions gain as much"),
        (0.4, 0.1, (0.0,) * 20, (0.5, 0.4, 0.1), "2 of 3 label-shuffled directions gain as much"),
    ],
)  # fmt: skip
def test_every_condition_of_a_recommendation_is_needed(value, low, random, shuffled, says):
    found, reason = scoring.verdict(row_of(value, low, 0.6, random, shuffled), 0.05, 0.1)
    assert says in reason and (found == 0.3) == says.startswith("Use")
    assert found is not None or reason.startswith("No usable strength")


# the whole


def test_a_planted_effect_is_recovered_and_recommended(report):
    assert report.recommended == report.chosen in (0.5, 1) and report.reason.startswith(f"Use {report.chosen:g}")
    row = report.dose(report.chosen)
    for name in ("margin", "reading", "gain"):
        assert row[name].interval[0] > 0 and row[name].p_random == 1 / 21 and row[name].beats_shuffled, name
    assert report.slopes["margin"].in_random_sd > 3 and report.slopes["margin"].p_random == 1 / 21
    assert len(row["kl"].random) == 20 and len(row["kl"].shuffled) == 10
    assert set(row.measures) == set(MEANINGS)
    assert report.reading.auroc > 0.95 and report.reading.n_texts == 60 and report.reading.n_groups == 30


def test_every_number_of_a_dose_equals_a_slow_sum_over_the_held_prompts(report, model, planted):
    held = [c for c in PROMPTS if c.prompt in report.prompts]
    assert len(held) == len(report.choosing_prompts) == 6 and not set(report.prompts) & set(report.choosing_prompts)
    zero, row = report.dose(0), report.dose(1)
    moved = []
    for c in held:
        match, other = (by_hand(model, c.prompt, a, planted, 1.0) for a in (c.match, c.other))
        moved.append(match - other - by_hand(model, c.prompt, c.match) + by_hand(model, c.prompt, c.other))
    assert row["margin"].value == pytest.approx(np.mean(moved), abs=1e-3)
    (w,) = writing.write(model, report.prompts, [(planted, 1.0)], max_new_tokens=6)
    assert row["nll"].value == pytest.approx(nll_rows(model, w.batch, w.ids, w.real).mean(), rel=1e-4)
    repeats = [longest_repeat(ids[real].tolist()) for ids, real in zip(w.ids, w.real, strict=True)]
    assert row["longest_repeat"].value == pytest.approx(np.mean(repeats))
    assert row["zlib"].value == pytest.approx(np.mean([zlib_ratio(t) for t in w.texts]))
    null = random_directions(planted, 20, 2)[7]
    assert row["kl"].random[7] == pytest.approx(damages(model, [(null, 1.0)], NEUTRAL)[0, 0], rel=1e-3)
    first, last = (margins(model, held, [(null, s)])[0] for s in (0, 1))
    assert row["margin"].random[7] == pytest.approx((last - first).mean(), abs=1e-3)
    assert zero["nll"].value == zero["nll"].random[3] == zero["nll"].shuffled[2]


def test_strength_0_has_no_effect_and_no_cost_exactly(report):
    zero = report.dose(0)
    for name in ("margin", "reading", "gain", "kl", "extra_nll", "concept", "combined"):
        assert zero[name].value == 0.0 and set(zero[name].random) == {0.0} and set(zero[name].shuffled) == {0.0}, name
    assert zero["fluency"].value == zero["damage"].value == 1.0


def test_the_report_does_not_depend_on_the_batch_or_on_when_it_is_made(report, model, planted, labelled, monkeypatch):
    again = measure_effects(model, planted, PROMPTS, labelled=labelled, seed=2, **SMALL)
    assert again.to_dict() == report.to_dict()
    monkeypatch.setattr(writing, "ROWS", 30)
    for module in ("damage", "margins", "fluency"):
        monkeypatch.setattr(f"interp.concepts.effects.{module}.rows_at_once", lambda *_: 7)
    small = measure_effects(model, planted, PROMPTS, labelled=labelled, seed=2, **SMALL)
    assert (small.chosen, small.sides) == (report.chosen, report.sides) or small.chosen == report.chosen
    for ours, theirs in zip(small.doses, report.doses, strict=True):
        for name in MEANINGS:
            assert ours[name].value == pytest.approx(theirs[name].value, rel=1e-3, abs=1e-5), name


def test_a_direction_without_effect_has_no_usable_strength(model, nothing, labelled):
    found = measure_effects(model, nothing, PROMPTS, labelled=labelled, seed=2, **SMALL)
    assert found.recommended is None and found.reason.startswith("No usable strength")
    assert abs(found.slopes["margin"].value) < 0.5 and len(found.sides) == 6


def test_a_budget_that_nothing_meets_leaves_no_strength(model, planted, labelled):
    found = measure_effects(model, planted, PROMPTS, labelled=labelled, seed=2, **SMALL | {"kl_budget": 1e-6})
    assert found.chosen is None and found.recommended is None and "KL budget of 1e-06" in found.reason
    assert found.shown == 0.5 and found.sides[0].steered != ""


def test_random_directions_are_recommended_no_more_often_than_the_level_says(model):
    """12 random directions in place of the planted one: 12 x 0.05 pass at most on average, 4 and more in 1 of 400."""
    passed = 0
    for i in range(12):
        vector = torch.randn(32, generator=torch.Generator().manual_seed(1000 + i))
        direction = direction_from(vector, hook=HOOK, model=model, method="random")
        found = measure_effects(model, direction, PROMPTS, seed=i, **SMALL | {"max_new_tokens": 2, "strengths": [1]})
        passed += found.recommended is not None
    assert passed <= 3


def test_prompts_without_answers_and_a_score_in_place_of_labelled_texts(model, planted):
    texts = [c.prompt for c in PROMPTS]

    def share(new):
        return [sum(w.startswith("good") for w in t.split()) / max(1, len(t.split())) for t in new]

    found = measure_effects(model, planted, texts, score=share, seed=2, **SMALL)
    assert "margin" not in found.dose(1).measures and found.dose(1)["reading"].value > 0.2
    assert found.reading is None and found.dose(1)["gain"].shuffled == () and found.recommended is not None
    side = found.sides[0]
    assert side.shuffled is None and side.probabilities == tuple(share([side.unsteered, side.steered, side.random]))
    with pytest.raises(ValueError, match="probabilities"):
        measure_effects(model, planted, texts, score=lambda new: [2.0] * len(new), **SMALL)
    with pytest.raises(ValueError, match="nothing reads the concept"):
        measure_effects(model, planted, texts, **SMALL)


def test_margins_alone_and_given_fitting_rows(model, planted, labelled):
    X, y = mean_rows(model, labelled[0], HOOK), labelled[1]
    found = measure_effects(model, planted, PROMPTS, fitting_rows=(X, y), seed=2, **SMALL)
    assert "reading" not in found.dose(1).measures and len(found.dose(1)["gain"].shuffled) == 10
    with pytest.raises(ValueError, match="width 31"):
        measure_effects(model, planted, PROMPTS, fitting_rows=(X[:, :31], y), **SMALL)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_random": 10}, "cannot show a p"), ({"n_shuffled": 3}, "at least 5"), ({"strengths": [0]}, "not 0"),
        ({"positions": "prompt"}, "positions is 'prompt'"), ({"kl_budget": 0}, "kl_budget"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(model, planted, labelled, change, says):
    with pytest.raises(ValueError, match=says):
        measure_effects(model, planted, PROMPTS, labelled=labelled, **SMALL | change)


def test_prompts_that_cannot_be_halved_or_differ_in_kind_are_refused(model, planted, labelled):
    for prompts, says in [(PROMPTS[:3], "at least 4"), ([*PROMPTS[:4], PROMPTS[0]], "each once"),
                          ([*PROMPTS[:4], "w1 w2"], "all do, or none")]:  # fmt: skip
        with pytest.raises(ValueError, match=says):
            measure_effects(model, planted, prompts, labelled=labelled, **SMALL)
    with pytest.raises(ValueError, match="both labelled texts and a score"):
        measure_effects(model, planted, PROMPTS, labelled=labelled, score=len, **SMALL)
    with pytest.raises(TypeError, match="texts and labels"):
        measure_effects(model, planted, PROMPTS, labelled="texts.csv", **SMALL)


def test_the_result_is_plain_json_and_effects_is_its_public_name(report, model, planted, labelled):
    table = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert table["recommended"] == report.recommended and table["meanings"] == MEANINGS
    row = next(r for r in table["doses"] if r["strength"] == 1)
    assert row["measures"]["margin"]["value"] == report.dose(1)["margin"].value
    assert effects(model, planted, PROMPTS, labelled=labelled, seed=2, **SMALL).to_dict() == report.to_dict()
    with pytest.raises(ValueError, match="none of the strengths 0, 0"):
        report.dose(0.7)


def test_neutral_text_comes_from_a_source_too(model, planted, tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("\n\n".join(NEUTRAL))
    a = measure_effects(model, planted, PROMPTS, **SMALL | {"neutral_texts": f"text:{path}"})
    b = measure_effects(model, planted, PROMPTS, **SMALL)
    assert a.n_neutral == len(NEUTRAL) and a.dose(1)["kl"] == b.dose(1)["kl"]


def test_progress_is_told_and_ends_at_the_whole(model, planted, labelled):
    seen = []
    measure_effects(model, planted, PROMPTS, labelled=labelled, seed=2, progress=lambda *x: seen.append(x), **SMALL)
    for stage in ("writing", "reading", "contrast answers", "neutral text"):
        told = [(done, whole) for name, done, whole in seen if name == stage]
        assert told and told[-1][0] == told[-1][1] and [d for d, _ in told] == sorted(d for d, _ in told), stage


# the classifier and what it is kept apart from


def test_the_reader_reads_new_text_and_refuses_what_it_cannot(model, labelled):
    rows = mean_rows(model, labelled[0], HOOK)
    reader = fit_reader(model, rows, labelled[1], hook=HOOK, groups=labelled[2])
    good, bad, none = reader.read(["good1 good4 good2", "bad0 bad7 bad2", "  "])
    assert good > 0.55 and bad < 0.45 and none == 0.5
    shuffled = np.random.default_rng(3).permutation(labelled[1])
    with pytest.raises(ValueError, match="cannot read this concept"):
        fit_reader(model, rows, shuffled, hook=HOOK)


def test_labelled_texts_that_the_direction_was_fitted_on_are_refused(model, labelled):
    texts, labels, _ = labelled
    rows = mean_rows(model, texts, HOOK)
    direction = fit_direction(rows, labels, hook=HOOK, model=model)
    assert direction.data == data_fingerprint(rows, np.array(labels))
    with pytest.raises(ValueError, match="are the ones"):
        measure_effects(model, direction, PROMPTS, labelled=labelled, **SMALL)
    for position in ("mean", "last"):  # as the command line fits them
        same = token_rows(model, make_examples(texts, labels), [HOOK], position)
        direction = fit_direction(next(iter(same.X.values())), same.y, hook=HOOK, model=model)
        with pytest.raises(ValueError, match="are the ones"):
            refuse_overlap(model, direction, texts, labels)
    other = fit_direction(rows[:40], labels[:40], hook=HOOK, model=model)
    assert "was not checked" in refuse_overlap(model, other, texts, labels)
    with pytest.raises(ValueError, match="2 of the 60"):
        known = [texts[3].upper() + " ", "  ".join(texts[9].split()), "w1"]
        refuse_overlap(model, other, texts, labels, known)
    assert "none of the 60" in refuse_overlap(model, other, texts, labels, ["w1 w2"])


def test_shuffled_directions_are_fitted_to_permuted_labels_in_the_directions_own_way(model, labelled):
    rows = mean_rows(model, labelled[0], HOOK)
    direction = fit_direction(rows, labelled[1], hook=HOOK, model=model)
    y, groups = np.array(labelled[1]), labelled[2]
    found = shuffled_directions(direction, rows, y, 8, groups=groups, seed=4)
    assert len({tuple(d.vector.tolist()) for d in found}) == 8
    assert all(d.norm == direction.norm and d.hook == direction.hook for d in found)
    again = np.random.default_rng([4, 1])
    from interp.acts.resampling import permute_labels

    shuffled = permute_labels(y, groups, again)
    by_hand = rows[shuffled == 1].double().mean(0) - rows[shuffled == 0].double().mean(0)
    assert torch.allclose(found[0].vector.double(), by_hand / by_hand.norm(), atol=1e-6)


def test_neutral_text_is_that_with_the_least_evidence_of_the_concept():
    assert neutral_texts(5, seed=1) == neutral_texts(5, seed=1) != neutral_texts(5, seed=2)
    chosen = neutral_texts(4, evidence=lambda texts: [float(len(t)) - 100 for t in texts])
    far = [abs(len(t) - 100) for t in chosen]
    everything = sorted(abs(len(t) - 100) for t in neutral_texts(32))
    assert sorted(far) == everything[:4]
    with pytest.raises(ValueError, match="finite numbers"):
        neutral_texts(4, evidence=lambda texts: [0.0])
    assert measuring.STRENGTHS[0] == 0

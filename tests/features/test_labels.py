"""Label scores with planted latents, perfect and useless judges, and answers of many shapes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.acts.capture import Acts, capture_acts
from interp.data.generator import sample_texts
from interp.features.examples import Context
from interp.features.labels import (
    ExampleSet,
    LabelError,
    PromptExplainer,
    PromptJudge,
    TokenListExplainer,
    TokenListJudge,
    detection_prompt,
    example_sets,
    explain_prompt,
    fuzzing_prompt,
    marked,
    parse_answers,
    score_labels,
)
from interp.model.loading import load_model
from sae.archs import build

WORDS = [" the", " cat", " dog", " sat", " ran", " red", " big", " old", " sun", " sky", " tea", " cup"]


def context(tokens, values):
    peak = int(np.argmax(values))
    return Context(tokens=tuple(tokens), activations=tuple(map(float, values)), peak=peak, document=0, position=peak)


def planted_set(latent, token, seed, n=12):
    """A latent that fires on one token alone; texts of eight other words."""
    rng = np.random.default_rng(seed)
    others = [word for word in WORDS if word != token]

    def text(fires):
        words = list(rng.choice(others, 8))
        if fires:
            words[int(rng.integers(8))] = token
        return context(words, [2.0 * (word == token) for word in words])

    parts = {name: tuple(text(name != "inactive") for _ in range(n)) for name in ("shown", "active", "inactive")}
    return ExampleSet(latent=latent, **parts, n_active=2 * n, n_windows=3 * n)


def planted_sets():
    return [planted_set(i, token, seed=i) for i, token in enumerate((" cat", " dog", " sky", " cup"))]


def test_a_token_list_explains_a_latent_of_one_token_and_no_other():
    found = score_labels(planted_sets(), TokenListExplainer(), TokenListJudge())
    assert found.detection == found.fuzzing == 1.0
    assert found.detection_interval == found.fuzzing_interval == (1.0, 1.0)
    assert [score.explanation for score in found.scores] == [
        f'fires on: ["{t}"]' for t in (" cat", " dog", " sky", " cup")
    ]
    assert 0.3 < found.shuffled_detection < 0.7
    assert found.shuffled_fuzzing < 0.6  # no marked token is on the list of another latent: always no
    assert found.random_detection == pytest.approx(0.5, abs=0.02)
    low, high = found.random_detection_range
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65
    assert "shuffled" in str(found)
    assert found.to_dict()["scores"][0]["latent"] == 0


def test_a_judge_that_always_says_the_same_scores_a_half():
    for answer in (True, False, 0.5, 0.49):
        found = score_labels(
            planted_sets(), TokenListExplainer(), lambda explanation, texts, a=answer: [a] * len(texts)
        )
        assert found.detection == found.fuzzing == found.shuffled_fuzzing == 0.5


def test_scores_are_balanced_where_there_are_more_texts_of_one_kind():
    sets = [
        ExampleSet(latent=s.latent, shown=s.shown, active=s.active[:3], inactive=s.inactive, n_active=24, n_windows=36)
        for s in planted_sets()
    ]
    found = score_labels(sets, TokenListExplainer(), lambda explanation, texts: [False] * len(texts))
    assert found.detection == 0.5  # plain accuracy would be 0.8


def test_the_judge_sees_texts_in_random_order_and_marks_in_equal_number():
    seen = []

    def judge(explanation, texts):
        seen.append(list(texts))
        return [True] * len(texts)

    sets = planted_sets()
    score_labels(sets, TokenListExplainer(), judge)
    detection = [texts for texts in seen if not any("<<" in t for t in texts)]
    fuzzing = [texts for texts in seen if any("<<" in t for t in texts)]
    assert len(detection) == len(fuzzing) == 2 * len(sets)
    fires = ["cat" in text for text in detection[0]]
    assert sum(fires) == 12 and fires != sorted(fires) and fires != sorted(fires, reverse=True)
    assert all(text.count("<<") == 1 for text in fuzzing[0])
    assert sum("<<cat>>" in text for text in fuzzing[0]) == 12 and len(fuzzing[0]) == 24


def test_wrong_marks_are_on_silent_tokens_and_as_many_as_right_ones():
    many = context([" a", " b", " c", " d", " e"], [3, 0, 2, 1, 0])
    quiet = context([" x", " y"], [0, 0])
    sets = [
        ExampleSet(latent=i, shown=(many,), active=(many,) * 4, inactive=(quiet,) * 4, n_active=5, n_windows=9)
        for i in range(2)
    ]
    seen = set()

    def judge(explanation, texts):
        seen.update(texts)
        return [True] * len(texts)

    score_labels(sets, TokenListExplainer(), judge)
    assert {text for text in seen if "<<" in text} == {" <<a>> b <<c>> d e", " a <<b>> c d <<e>>"}


def test_what_cannot_be_scored_is_refused():
    sets = planted_sets()
    with pytest.raises(LabelError, match="1 latents"):
        score_labels(sets[:1], TokenListExplainer(), TokenListJudge())
    for answers in ([True], [2.0] * 24, [float("nan")] * 24):
        with pytest.raises(LabelError, match="must answer 24"):
            score_labels(sets, TokenListExplainer(), lambda explanation, texts, a=answers: a)
    everywhere = context([" a", " b"], [1, 1])
    dense = ExampleSet(
        latent=9, shown=(everywhere,), active=(everywhere,) * 3, inactive=(everywhere,), n_active=4, n_windows=5
    )
    with pytest.raises(LabelError, match="latent 9 is silent somewhere in 0 texts"):
        score_labels([dense, dense], TokenListExplainer(), TokenListJudge())
    with pytest.raises(LabelError, match="nothing to list"):
        TokenListExplainer()([context([" a"], [0])])
    with pytest.raises(LabelError, match="holds no JSON list"):
        TokenListJudge()("it fires on cats", ["a cat"])


def test_the_token_list_holds_the_largest_sums_and_the_judge_keeps_to_whole_words():
    shown = [context([" cat", " dog", " sat"], [3, 0, 1]), context([" dog", " sat"], [1, 3])]
    assert TokenListExplainer(n=2)(shown) == 'fires on: [" sat", " cat"]'
    judge = TokenListJudge()
    texts = ["my cat sat", "my cats", "category", " <<cat>> sat", " cat <<sat>>", "<<cat>> in front", "a cat."]
    assert judge('fires on: [" cat"]', texts) == [1, 0, 0, 1, 0, 0, 1]
    assert judge("fires on: []", ["a cat"]) == [0]
    assert judge('fires on: ["*", "a+b"]', ["2*3", "aab", "a+b"]) == [1, 0, 1]


def test_marks_leave_the_space_outside_and_brackets_of_the_text_apart():
    text = context(["if", " x", " <<", " y"], [0, 1, 0, 2])
    assert marked(text, [1, 3]) == "if <<x>> < < <<y>>"
    assert marked(text) == "if x < < y"


@pytest.mark.parametrize(
    "answer",
    [
        "[1, 0, 1]",
        "I think [1, 1, 1] at first, but then:\n[true, False, YES]",
        "```json\n[0.9, 0.2, 0.5]\n```",
        "1. yes\n2. no\n3. yes",
        "Text 1: Yes, because\nText 2: No\nText 3: yes",
        "- 1) Yes\n- 2) no\n- 3) Yes",
        "yes no yes",
        "Yes, no, and yes.",
        '["yes", "no", "yes"]',
        "1 0 1",
    ],
)
def test_answers_of_many_shapes_are_read(answer):
    assert parse_answers(answer, 3) == [True, False, True]


@pytest.mark.parametrize(
    "answer", ["", "maybe", "[1, 0]", "1. yes\n2. no", "[1, 0, 7]", "yes yes yes yes", "1. yes\n1. no\n3. no"]
)
def test_answers_that_cannot_be_read_are_refused(answer):
    with pytest.raises(LabelError, match="3 answers"):
        parse_answers(answer, 3)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_a_json_list_of_answers_comes_back(answers):
    assert parse_answers(json.dumps([int(a) for a in answers]), len(answers)) == answers
    assert (
        parse_answers("\n".join(f"{i}. {'yes' if a else 'no'}" for i, a in enumerate(answers, 1)), len(answers))
        == answers
    )


def test_prompts_hold_what_is_asked_and_go_through_a_language_model():
    shown = [context([" the", " cat"], [0, 4]), context(["\n", " cat"], [0, 1])]
    prompt = explain_prompt(shown)
    assert "1. the <<cat>>   (cat 10)" in prompt and "(cat 2)" in prompt
    assert PromptExplainer(lambda text: f" cats {len(text)} \n")(shown) == f"cats {len(prompt)}"
    asked = []

    def complete(text):
        asked.append(text)
        return json.dumps([1] * (text.count("\n2. ") + 1))

    assert PromptJudge(complete, batch=2)("cats", ["a", "b", "c"]) == [True] * 3
    assert asked == [detection_prompt("cats", ["a", "b"]), detection_prompt("cats", ["c"])]
    assert PromptJudge(complete)("cats", ["a <<b>>"]) == [True]
    assert asked[-1] == fuzzing_prompt("cats", ["a <<b>>"]) != detection_prompt("cats", ["a <<b>>"])
    assert "1. x\\ny" in detection_prompt("cats", ["x\ny"])


def planted_acts(n_documents=60, length=32, d=6, seed=3):
    """Axis 0 in one window of eight in a third of the documents, axis 1 on every token, axis 2 nowhere."""
    rng = np.random.default_rng(seed)
    x = torch.zeros(n_documents, length, d)
    for document in range(0, n_documents, 3):
        x[document, int(rng.integers(length)), 0] = 1 + document / n_documents
    x[..., 1] = 1.0
    n = n_documents * length
    return Acts(
        values={"blocks.0.hook_resid_post": x.reshape(n, d)},
        token_ids=torch.arange(n) % 50 + 10,
        positions=torch.arange(n) % length,
        documents=torch.arange(n) // length,
        is_special=torch.zeros(n, dtype=torch.bool),
        n_documents=n_documents,
    )


def axis_sae(d=6):
    sae = build("batchtopk", d_in=d, d_sae=d, k=2.0, seed=4)
    with torch.no_grad():
        sae.enc.copy_(torch.eye(d))
        sae.dec.copy_(torch.eye(d))
        sae.cut.fill_(0.1)
    return sae


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


def named(model):
    """The model's tokenizer beside a hook point of the planted acts."""
    return SimpleNamespace(tokenizer=model.tokenizer, hook_point=lambda name: SimpleNamespace(name=name))


def test_contexts_come_from_every_quantile_and_from_no_window_twice(model):
    acts, options = planted_acts(), {"n_shown": 6, "n_active": 4, "n_inactive": 8, "n_quantiles": 5, "context": 8}
    [part] = example_sets(named(model), axis_sae(), acts, "blocks.0.hook_resid_post", latents=[0], **options)
    assert (len(part.shown), len(part.active), len(part.inactive)) == (6, 4, 8)
    assert (part.n_active, part.n_windows) == (20, 240)
    assert all(c.value > 0 and sum(v > 0 for v in c.activations) == 1 for c in (*part.shown, *part.active))
    assert all(not any(c.activations) and len(c.tokens) == 8 for c in part.inactive)
    documents = [c.document for c in (*part.shown, *part.active)]
    assert len(set(documents)) == 10
    assert sorted(document // 12 for document in documents) == [q for q in range(5) for _ in range(2)]
    values = [c.value for c in part.shown]
    assert values == sorted(values, reverse=True)
    x = acts["blocks.0.hook_resid_post"]
    for c in part.active:
        row = int(((acts.documents == c.document) & (acts.positions == c.position)).nonzero())
        assert x[row, 0] == pytest.approx(c.value)
        assert c.peak == c.position % 8
    assert {(c.document, c.position // 8) for c in part.shown}.isdisjoint(
        (c.document, c.position // 8) for c in part.active
    )


def test_latents_without_enough_windows_are_left_out_or_refused(model):
    acts, sae, hook = planted_acts(), axis_sae(), "blocks.0.hook_resid_post"
    options = {"n_shown": 6, "n_active": 4, "n_inactive": 8, "context": 8}
    assert [part.latent for part in example_sets(named(model), sae, acts, hook, **options)] == [0]
    with pytest.raises(LabelError, match="latent 1 fires in 240 of 240 windows"):
        example_sets(named(model), sae, acts, hook, latents=[1], **options)
    with pytest.raises(LabelError, match="latent 2 fires in 0 of 240"):
        example_sets(named(model), sae, acts, hook, latents=[2], **options)
    with pytest.raises(LabelError, match="latents 0 to 5, not 6"):
        example_sets(named(model), sae, acts, hook, latents=[6], **options)
    with pytest.raises(LabelError, match="none of 6 latents"):
        example_sets(named(model), sae, acts, hook, n_shown=100)
    with pytest.raises(LabelError, match="must be at least 1"):
        example_sets(named(model), sae, acts, hook, context=0)


def test_a_latent_that_reads_one_token_of_a_real_model_is_explained_by_it(model):
    acts = capture_acts(model, sample_texts(300, seed=5), ["resid_pre.0"])
    ids = [model.tokenizer.convert_tokens_to_ids(token) for token in ("Ġwas", "Ġto", "Ġand")]
    rows = model.embed_matrix()[ids].float()
    sae = build("batchtopk", d_in=model.d_model, d_sae=8, k=1.0, seed=6)
    with torch.no_grad():
        sae.enc.zero_()
        sae.enc[:3] = rows / rows.square().sum(1, keepdim=True)
        sae.cut.fill_(0.9)
    sets = example_sets(
        model, sae, acts, "resid_pre.0", latents=[0, 1, 2], context=16, n_shown=5, n_active=5, n_inactive=5
    )
    found = score_labels(sets, TokenListExplainer(n=1), TokenListJudge())
    assert [score.explanation for score in found.scores] == [f'fires on: ["{t}"]' for t in (" was", " to", " and")]
    assert found.detection == found.fuzzing == 1.0
    assert found.shuffled_fuzzing == 0.5 or found.shuffled_fuzzing < 0.55

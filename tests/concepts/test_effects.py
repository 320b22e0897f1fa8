import json

import numpy as np
import pytest
import torch

from interp.acts.direction import residual_norm
from interp.acts.resampling import placebo_directions
from interp.concepts.effects import writing
from interp.concepts.effects.calls import NoUsableStrengthError, effects
from interp.concepts.effects.damage import damage
from interp.concepts.effects.fluency import distinct2, fluency
from interp.concepts.reading.finders import direction_from
from interp.concepts.steering.context import add, prompt_batch, steer
from interp.model.loading import load_model
from sae.extras import MissingError

HOOK = "resid_post.2"
PROMPTS = [f"w{i} w{(7 * i) % 60} w{(3 * i + 5) % 60}" for i in range(8)]
DEV = ["w11 w2 w30", "w60 w61", "w9 w44 w45 w5"]
NEUTRAL = [" ".join(f"w{(i * j + 3 * j) % 75}" for j in range(12)) for i in range(6)]


def count_good(texts):
    return [sum(word.startswith("good") for word in text.split()) for text in texts]


@pytest.fixture(scope="module")
def model(build, tokenizer):
    """A random model in whose last residual one axis makes the head say "good" words (ids 4 to 13)."""
    hf = build("llama", seed=5)
    with torch.no_grad():
        hf.model.norm.weight.fill_(1.0)
        hf.lm_head.weight.mul_(0.3)
        hf.lm_head.weight[:, 0] = 0.0
        hf.lm_head.weight[4:14, 0] = 1.0
        hf.lm_head.weight[:4] = 0.0
    return load_model(hf, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def planted(model):
    return direction_from(torch.eye(32)[0], hook=HOOK, model=model, method="planted")


@pytest.fixture(scope="module")
def result(model, planted):
    return effects(
        model, planted, PROMPTS, score=count_good, strengths=[0, 0.25, 1, 2, 8], dev_prompts=DEV,
        neutral_texts=NEUTRAL, kl_budget=1.0, max_new_tokens=8, seed=3,
    )  # fmt: skip


def test_a_planted_direction_stands_out_from_random_ones_of_equal_norm(result):
    assert result.effect > 1 and result.interval[0] > 0.5
    assert result.in_placebo_sd > 3 and len(result.placebo_effects) == 20  # 32 axes: some placebos share in the concept
    assert result.interval[0] <= result.effect <= result.interval[1]
    assert abs(result.placebo_mean) < result.effect / 3


def test_a_random_direction_does_not_stand_out(model):
    away = placebo_directions(32, 1, seed=99)[0]
    away[0] = 0.0
    none = direction_from(away, hook=HOOK, model=model, method="random")
    found = effects(
        model, none, PROMPTS, score=count_good, strengths=[1.0], dev_prompts=DEV, neutral_texts=NEUTRAL,
        kl_budget=50.0, max_new_tokens=8, seed=4,
    )  # fmt: skip
    assert abs(found.in_placebo_sd) < 3


def test_the_strength_is_the_largest_within_the_budget_of_the_neutral_text(result, model, planted):
    table = {d.strength: d for d in result.doses}
    assert [d.strength for d in result.doses] == [0, 0.25, 1, 2, 8]
    assert table[0].kl == 0.0 and table[0].effect == 0.0 and table[0].extra_nll == 0.0 and not table[0].usable
    kls = [d.kl for d in result.doses]
    assert kls == sorted(kls) and kls[-1] > 1.0
    assert result.chosen == max(s for s, d in table.items() if d.kl <= 1.0) > 0
    assert damage(model, planted, [result.chosen], NEUTRAL)[0][0] == pytest.approx(table[result.chosen].kl, rel=1e-5)


def test_the_damage_equals_a_slow_sum_over_the_texts(model, planted):
    kls, extras = [], []
    for text in NEUTRAL:
        ids = model.tokenize([text]).ids
        base = model.hf(ids).logits[0].log_softmax(-1)
        with steer(model, add(planted, 0.7)):
            moved = model.hf(ids).logits[0].log_softmax(-1)
        for t in range(1, ids.shape[1]):  # BOS predicts too, but is not steered and not counted
            kls.append((base[t].exp() * (base[t] - moved[t])).sum().item())
            if t + 1 < ids.shape[1]:
                extras.append((base[t, ids[0, t + 1]] - moved[t, ids[0, t + 1]]).item())
    kl, extra = damage(model, planted, [0.7], NEUTRAL)[0]
    assert kl == pytest.approx(np.mean(kls), rel=1e-4) and extra == pytest.approx(np.mean(extras), rel=1e-4)


def test_every_condition_equals_prompting_one_by_one(result, model, planted):
    vectors = placebo_directions(32, 20, seed=3)
    for i in (0, 5):
        sample = result.samples[i]
        assert sample.prompt == PROMPTS[i]
        assert model.generate([sample.prompt], 8)[0] == sample.unsteered
        with steer(model, add(planted, result.chosen)):
            assert model.generate([sample.prompt], 8)[0] == sample.steered
        for j in (0, 19):
            placebo = direction_from(vectors[j], hook=HOOK, model=model, method="placebo")
            with steer(model, add(placebo, result.chosen)):
                assert model.generate([sample.prompt], 8)[0] == sample.placebos[j]
        assert [sample.steered_score] == count_good([sample.steered])
    gains = [x.steered_score - x.unsteered_score for x in result.samples]
    assert result.effect == pytest.approx(np.mean(gains))
    first = [x.placebo_scores[0] - x.unsteered_score for x in result.samples]
    assert result.placebo_effects[0] == pytest.approx(np.mean(first))


def test_every_dose_equals_steering_the_dev_prompts_one_by_one(result, model, planted):
    plain = count_good([model.generate([p], 8)[0] for p in DEV])
    seen = []
    for dose in result.doses:
        with steer(model, add(planted, dose.strength)):
            texts = [model.generate([p], 8)[0] for p in DEV]
        assert dose.effect == pytest.approx(np.mean(count_good(texts)) - np.mean(plain))
        seen.append(dose.effect)
    assert len(set(seen)) > 2, "equal doses would hide a wrong order"


def test_placebos_do_not_depend_on_how_many_share_a_batch(result, model, planted, monkeypatch):
    monkeypatch.setattr(writing, "ROWS", 20)
    again = effects(
        model, planted, PROMPTS, score=count_good, strengths=[result.chosen], dev_prompts=DEV, neutral_texts=NEUTRAL,
        kl_budget=1.0, max_new_tokens=8, seed=3,
    )  # fmt: skip
    assert again.placebo_effects == result.placebo_effects and again.samples == result.samples


def test_fluency_is_the_loss_of_the_new_tokens_alone_without_steering(model, result):
    sample = result.samples[2]
    prompt, whole = (model.tokenize([t]).ids for t in (sample.prompt, f"{sample.prompt} {sample.unsteered}"))
    new = whole[:, prompt.shape[1] :]
    logp = model.hf(whole).logits[0].log_softmax(-1)
    expected = [-float(logp[t - 1, whole[0, t]]) for t in range(prompt.shape[1], whole.shape[1])]
    real = torch.ones_like(new).bool()
    assert fluency(model, prompt_batch(model, [sample.prompt]), new, real) == pytest.approx(np.mean(expected), rel=1e-4)
    # a padded batch: the longer prompt's row must not change the shorter one's loss
    batch = prompt_batch(model, [sample.prompt, "w1 w2 w3 w4 w5 w6 w7"])
    only_first = torch.stack([real[0], torch.zeros_like(real[0])])
    together = fluency(model, batch, new.repeat(2, 1), only_first)
    assert together == pytest.approx(np.mean(expected), rel=1e-4)


def test_distinct2_counts_pairs_up_to_the_end():
    ids = torch.tensor([[5, 6, 5, 6, 5], [7, 8, 9, 0, 0], [3, 0, 0, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    assert distinct2(ids, real) == pytest.approx((2 / 4 + 2 / 2) / 2)
    with pytest.raises(ValueError, match="no pair"):
        distinct2(ids[2:], real[2:])


def test_new_tokens_end_with_the_first_end_token(model):
    ids = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 2, 5, 2]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert writing.until_end(model, ids).long().tolist() == expected


def test_a_budget_that_nothing_meets_says_so_and_keeps_the_curve(model, planted):
    with pytest.raises(NoUsableStrengthError, match="no strength stays within") as caught:
        effects(
            model, planted, PROMPTS, score=count_good, strengths=[0, 4, 8], dev_prompts=DEV, neutral_texts=NEUTRAL,
            kl_budget=1e-6, max_new_tokens=4,
        )  # fmt: skip
    assert [d.strength for d in caught.value.doses] == [0, 4, 8]


def test_prompts_are_halved_without_dev_prompts_and_refused_on_both_sides(model, planted):
    options = {"score": count_good, "strengths": [0.5], "kl_budget": 50.0, "max_new_tokens": 4, "n_placebo": 2}
    found = effects(model, planted, PROMPTS, **options)
    assert [s.prompt for s in found.samples] == PROMPTS[::2] and len(found.placebo_effects) == 2
    with pytest.raises(ValueError, match="1 of them the same"):
        effects(model, planted, PROMPTS, dev_prompts=[PROMPTS[0]], **options)
    with pytest.raises(ValueError, match="one a text"):
        effects(model, planted, PROMPTS, **options | {"score": lambda texts: [1.0]})
    with pytest.raises(ValueError, match="n_placebo 1"):
        effects(model, planted, PROMPTS, **options | {"n_placebo": 1})


def test_a_score_that_no_placebo_moves_has_no_unit(model, planted):
    options = {"strengths": [0.5], "kl_budget": 50.0, "max_new_tokens": 4, "n_placebo": 2, "dev_prompts": DEV}
    found = effects(model, planted, PROMPTS, score=lambda texts: [0.0] * len(texts), **options)
    with pytest.raises(ValueError, match="no unit"):
        _ = found.in_placebo_sd
    assert found.to_dict()["in_placebo_sd"] is None


def test_the_result_is_plain_json_and_deterministic(result, model, planted):
    table = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert table["effect"] == result.effect and table["direction"]["method"] == "planted"
    assert len(table["samples"]) == 8 and len(table["samples"][0]["placebos"]) == 20
    again = effects(
        model, planted, PROMPTS, score=count_good, strengths=[0, 0.25, 1, 2, 8], dev_prompts=DEV,
        neutral_texts=NEUTRAL, kl_budget=1.0, max_new_tokens=8, seed=3,
    )  # fmt: skip
    assert again.to_dict() == result.to_dict()
    assert planted.norm == residual_norm(model, HOOK)


def test_a_model_without_tokenizer_is_a_missing_thing(build, planted):
    with pytest.raises(MissingError):
        effects(build("llama", seed=5), planted, PROMPTS, score=count_good)

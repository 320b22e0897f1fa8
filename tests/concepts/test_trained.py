import math

import numpy as np
import pytest
import torch

import interp.concepts.steering.trained as module
from interp.concepts.labelled.examples import contrast_pairs, make_examples
from interp.concepts.steering.context import add, steer
from interp.concepts.steering.targets import Item, prepare
from interp.concepts.steering.trained import train_direction
from interp.data.generator import labelled
from interp.model.loading import load_model

HOOK = "resid_post.1"


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def words(build, tokenizer):
    """A random Llama whose tokens are words."""
    return load_model(build("llama"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def moods():
    data = labelled("sentiment", n=60)
    return [[t for t, y in zip(data.texts, data.labels, strict=True) if y == name] for name in ("positive", "negative")]


ITEMS = [(f"w{i} w{i + 1}", f"good{i % 10} w{i + 2}", f"bad{i % 10}") for i in range(8)]
TARGETS = [(prompt, chosen) for prompt, chosen, _ in ITEMS]


def log_prob(model, prompt, answer):
    """Return the log-probability of an answer, a word at a time."""
    before, after = (model.tokenize(t).ids for t in (prompt, f"{prompt} {answer}"))
    found = model.logits(after).log_softmax(-1)[0]
    return sum(float(found[i - 1, after[0, i]]) for i in range(before.shape[1], after.shape[1]))


@pytest.mark.parametrize("objective", ["lm", "preference", "reft"])
def test_training_lowers_the_held_out_loss_further_than_random_directions_do(tiny, moods, objective):
    texts = list(zip(*moods, strict=True)) if objective == "preference" else moods[0]
    found = train_direction(tiny, texts, "resid_post.3", objective=objective, steps=16, n_placebos=20)
    assert found.gain > 0.02 and found.gain > 2 * float(found.null_gains.max())
    assert found.p_value == pytest.approx(1 / 21)
    assert float(found.curve[-5:].mean()) < float(found.curve[:5].mean())
    assert found.direction.method == f"trained {objective}" and found.n_train + found.n_held_out == 30
    if objective == "preference":
        assert found.before == pytest.approx(math.log(2), abs=1e-6)


def test_what_is_steered_begins_at_the_prompts_last_token(words):
    batch = prepare(words, [Item("w1 w2", ("w3",)), Item("", ("w4 w5",)), Item("w1 w2 w3", ("w4 w5",))])
    # columns: <s> and words; the tokens of the answers are predicted from the columns before them
    assert batch.targets.long().tolist() == [[0, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert batch.steered("target").long().tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert batch.steered("all").long().tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]]


def test_a_model_in_training_mode_is_trained_on_without_dropout(build, tokenizer):
    model = load_model(build("gpt2"), tokenizer=tokenizer)
    quiet = train_direction(model, TARGETS, HOOK, steps=3, n_placebos=1)
    model.hf.train()
    loud = train_direction(model, TARGETS, HOOK, steps=3, n_placebos=1)
    assert model.hf.training and torch.equal(quiet.direction.vector, loud.direction.vector)


@pytest.mark.parametrize("positions", ["all", "target"])
def test_the_loss_is_that_of_steering_with_the_direction(words, positions):
    found = train_direction(
        words, TARGETS[:6], HOOK, steps=5, held_out=TARGETS[6:], n_placebos=1, positions=positions, batch_size=2
    )
    n = sum(len(target.split()) for _, target in TARGETS[6:])
    plain = -sum(log_prob(words, *item) for item in TARGETS[6:]) / n
    assert found.before == pytest.approx(plain, abs=1e-4)
    if positions == "target":
        return  # a plain forward of steering has no prompt to begin at the end of
    with steer(words, add(found.direction, found.strength, positions="all")):
        steered = -sum(log_prob(words, *item) for item in TARGETS[6:]) / n
    assert found.after == pytest.approx(steered, abs=1e-4) and abs(steered - plain) > 0.01


def test_the_preference_loss_is_that_of_the_margins(words):
    found = train_direction(
        words, ITEMS[:6], HOOK, objective="preference", steps=5, held_out=ITEMS[6:], n_placebos=1, positions="all",
        beta=0.5,
    )  # fmt: skip

    def margins():
        return np.array([log_prob(words, p, c) - log_prob(words, p, r) for p, c, r in ITEMS[6:]])

    before = margins()
    with steer(words, add(found.direction, found.strength, positions="all")):
        change = margins() - before
    assert found.after == pytest.approx(float(np.log1p(np.exp(-0.5 * change)).mean()), abs=1e-4)


def test_the_first_step_goes_down_the_slope(words):
    """Adam's first step is lr times the sign of the gradient, which differences of the loss give too."""
    found = train_direction(words, TARGETS, HOOK, steps=1, held_out=[("w9", "w8")], positions="all", n_placebos=1)
    raw = (found.direction.vector * found.direction.scale).double()
    n = sum(len(target.split()) for _, target in TARGETS)
    slopes = []
    for i in (0, 7, 20):
        step = 0.02 * torch.nn.functional.one_hot(torch.tensor(i), len(raw)).double()
        losses = []
        for sign in (1, -1):
            moved = words.place(HOOK).module.register_forward_hook(lambda m, a, o, s=sign * step: shifted(o, s))
            losses.append(-sum(log_prob(words, *item) for item in TARGETS) / n)
            moved.remove()
        slopes.append((losses[0] - losses[1]) / 0.04)
    assert [float(torch.sign(raw[i])) for i in (0, 7, 20)] == [-np.sign(s) for s in slopes]
    assert raw.norm() == pytest.approx(0.02 * found.direction.norm, rel=1e-3)


def shifted(output, step):
    """Add a vector to all tokens but the first, which is BOS."""
    value = output if isinstance(output, torch.Tensor) else output[0]
    return torch.cat([value[:, :1], value[:, 1:] + step.to(value.dtype)], dim=1)


def test_reft_adds_what_it_reads(words):
    found = train_direction(
        words, TARGETS[:6], HOOK, objective="reft", steps=3, held_out=[("w9 w3", "w8 w7")], top_k=2, positions="all",
        n_placebos=1,
    )  # fmt: skip
    unit, seen = found.direction.vector, []

    def read(module, args, output):
        value = output if isinstance(output, torch.Tensor) else output[0]
        amounts = (value[0, 1:] @ unit).relu().sort(descending=True).values
        seen.append(float(amounts[:2].mean()))
        return shifted(output, seen[-1] * unit)

    handle = words.place(HOOK).module.register_forward_hook(read)
    try:
        # the amount is read from the text as a whole, so the answer is scored in one pass
        loss = -log_prob(words, "w9 w3", "w8 w7") / 2
    finally:
        handle.remove()
    assert found.after == pytest.approx(loss, abs=1e-4)
    assert found.direction.scale == pytest.approx(seen[0], rel=1e-4) and seen[0] > 0


def state_of(model):
    hf = model.hf
    return (
        {k: v.clone() for k, v in hf.state_dict().items()},
        {k: (p.requires_grad, p.grad) for k, p in hf.named_parameters()},
        {k: m.training for k, m in hf.named_modules()},
        {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in hf.named_modules()},
    )


def test_the_model_is_left_as_it_was_by_success_and_by_failure(words, monkeypatch):
    parameters = dict(words.hf.named_parameters())
    frozen = next(iter(parameters))
    parameters[frozen].requires_grad_(False)
    words.hf.model.layers[1].train()
    logits = words.logits(torch.tensor([[1, 5, 6]]))
    before = state_of(words)
    try:
        train_direction(words, TARGETS, HOOK, steps=2, n_placebos=1)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the middle"):
            patch.setattr(torch.optim, "Adam", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("in the middle")))
            train_direction(words, TARGETS, HOOK, steps=2, n_placebos=1)
        after = state_of(words)
        assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
        assert before[1:] == after[1:] and before[1][frozen][0] is False
        assert any(flag for flag, _ in after[1].values())
        assert torch.equal(words.logits(torch.tensor([[1, 5, 6]])), logits)
    finally:
        parameters[frozen].requires_grad_(True)
        words.hf.eval()


def test_the_seed_decides_everything_and_the_users_own_draws_are_left_alone(words):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (
        train_direction(words, TARGETS, HOOK, steps=4, batch_size=2, n_placebos=2, seed=seed, held_out=[("w9", "w8")])
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.direction.vector, same.direction.vector) and torch.equal(one.placebos, same.placebos)
    assert not torch.equal(one.direction.vector, other.direction.vector)
    with torch.no_grad():
        quiet = train_direction(
            words, TARGETS, HOOK, steps=4, batch_size=2, n_placebos=2, seed=0, held_out=[("w9", "w8")]
        )
    assert torch.equal(one.direction.vector, quiet.direction.vector)


def test_who_shares_a_batch_does_not_matter_to_what_is_measured(words):
    long = [*TARGETS[:4], ("w1", "w2 w3 w4 w5 w6 w7 w8")]
    small, large = (
        train_direction(words, TARGETS[5:], HOOK, steps=1, batch_size=size, held_out=long, n_placebos=1).before
        for size in (1, 16)
    )
    assert small == pytest.approx(large, abs=1e-5)


def test_the_length_can_be_limited(words):
    free = train_direction(words, TARGETS, HOOK, steps=20, lr=0.1, n_placebos=1)
    held = train_direction(words, TARGETS, HOOK, steps=20, lr=0.1, max_norm=0.25, n_placebos=1)
    assert free.strength > 0.5 and held.strength == pytest.approx(0.25, rel=1e-3)


def test_trained_both_ways_the_reverse_undoes_it(words):
    found = train_direction(
        words, ITEMS[:6], HOOK, objective="preference", steps=30, held_out=ITEMS[6:], n_placebos=1, both_ways=True,
        positions="all",
    )  # fmt: skip

    def margin():
        return sum(log_prob(words, p, c) - log_prob(words, p, r) for p, c, r in ITEMS[:6])

    plain = margin()
    with steer(words, add(found.direction, found.strength, positions="all")):
        up = margin()
    with steer(words, add(found.direction, -found.strength, positions="all")):
        down = margin()
    assert down < plain < up


def test_labelled_examples_give_their_positive_texts_or_their_pairs(words):
    pairs = contrast_pairs([c for _, c, _ in ITEMS], [r for *_, r in ITEMS])
    by_pairs = train_direction(words, pairs, HOOK, objective="preference", steps=2, n_placebos=1)
    by_hand = train_direction(words, [(c, r) for _, c, r in ITEMS], HOOK, objective="preference", steps=2, n_placebos=1)
    assert torch.equal(by_pairs.direction.vector, by_hand.direction.vector)
    texts = [c for _, c, _ in ITEMS] + ["w1"]
    found = train_direction(words, make_examples(texts, [1] * 8 + [0]), HOOK, steps=2, n_placebos=1)
    assert torch.equal(
        found.direction.vector, train_direction(words, texts[:8], HOOK, steps=2, n_placebos=1).direction.vector
    )


def test_no_prompt_is_on_both_sides_of_the_split(words, monkeypatch):
    sides = []
    monkeypatch.setattr(module, "prepare", lambda m, items, f=module.prepare: sides.append(items) or f(m, items))
    train_direction(words, [*TARGETS, *((p, "w30") for p, _ in TARGETS)], HOOK, steps=1, n_placebos=1)
    train, test = ({item.prompt for item in side} for side in sides)
    assert train and test and not train & test and len(train | test) == 8


@pytest.mark.parametrize(
    ("items", "options", "says"),
    [
        (TARGETS, {"objective": "dpo"}, "objective is 'dpo'"),
        (TARGETS, {"positions": "last"}, "positions 'last'"),
        (TARGETS, {"steps": 0}, "steps"),
        (TARGETS, {"lr": math.inf}, "lr"),
        (TARGETS, {"max_norm": 0}, "max_norm"),
        (TARGETS, {"held_out": 0.9}, "held_out is 0.9"),
        (TARGETS, {"held_out": TARGETS[:1]}, "both trained on and held out"),
        (TARGETS, {"groups": [0] * 8}, "1 group cannot be split"),
        (TARGETS, {"groups": [0]}, "1 groups were given"),
        (["w1"], {"objective": "preference"}, "item 0 is"),
        (TARGETS, {"both_ways": True}, "both_ways belongs"),
        (TARGETS, {"objective": "reft", "max_norm": 1}, "max_norm has no meaning"),
        ([("a", "b", "c", "d")], {}, "item 0 is"),
        ([("w1", " ")], {}, "empty target"),
        ([("w1", "w2", "w2")] * 2, {"objective": "preference"}, "two equal ones"),
        ("w1 w2", {}, "one text was given"),
        ([], {}, "nothing to train on"),
        ([("w1", "w2 " * 70), ("w2", "w3")], {}, "tokens; .* takes 64"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(words, items, options, says):
    with pytest.raises(ValueError, match=says):
        train_direction(words, items, HOOK, **options)


def test_examples_that_are_no_pairs_make_no_preferences(words):
    with pytest.raises(ValueError, match="preferences are pairs"):
        train_direction(words, make_examples(["w1", "w2"], [1, 0]), HOOK, objective="preference")
    lone = make_examples(["w1", "w2", "w3"], [1, 0, 1], pairs=["a", "a", "b"])
    with pytest.raises(ValueError, match="pair 'b' has no member of label 0"):
        train_direction(words, lone, HOOK, objective="preference")

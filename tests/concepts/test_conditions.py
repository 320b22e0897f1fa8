"""Conditions fire for the rows that they should, once a generation or at each token, in every way to generate."""

import pytest
import torch

from interp.acts.direction import Direction, DirectionError, residual_norm
from interp.acts.resampling import placebo_directions
from interp.concepts.steering.conditions import when
from interp.concepts.steering.context import generate_ids, steer
from interp.concepts.steering.operations import ablate, add
from interp.model.hooks import reading
from interp.model.tokens import pad_rows

PROMPTS = [[1, 5, 9, 33, 71, 8, 40], [1, 17, 60], [1, 90, 12, 4, 77], [1, 44, 45, 46]]
READ, ACT = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def direction(model, seed=0, hook=ACT):
    return Direction(
        vector=placebo_directions(model.d_model, 1, seed)[0], hook=hook, method="", scale=1.0,
        norm=residual_norm(model, hook), model=model.fingerprint,
    )  # fmt: skip


def scores(model, reader, prompt):
    """Return the coordinate of each token of one prompt."""
    seen = []
    with reading(model, READ, lambda name, value: seen.append(value[0].clone())):
        model.run(torch.tensor([prompt]))
    return reader.project(seen[0])


def reduced(model, reader, prompt, read):
    values = scores(model, reader, prompt)
    return float({"last": values[-1], "mean": values[1:].mean(), "max": values[1:].max()}[read])


def halves(values):
    """Return a threshold that parts values in two, and which lie above it."""
    ordered = sorted(values)
    level = (ordered[1] + ordered[2]) / 2
    return level, [v > level for v in values]


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}, {"num_beams": 2}],
    ids=["cache", "no_cache", "chunks", "static", "beams"],
)
@pytest.mark.parametrize("read", ["last", "mean", "max"])
def test_each_row_decides_for_itself_on_its_prompt_and_keeps_to_it(llama, read, options):
    reader = direction(llama, 3, READ)
    level, fires = halves([reduced(llama, reader, p, read) for p in PROMPTS])
    act = direction(llama)
    plain = generate_ids(llama, PROMPTS, 6, **options)
    with steer(llama, add(act, 1.5)):
        steered = generate_ids(llama, PROMPTS, 6, **options)
    with steer(llama, add(act, 1.5, when=when(reader, level, read=read))):
        got = generate_ids(llama, PROMPTS, 6, **options)
        alone = torch.cat([generate_ids(llama, [p], 6, **options) for p in PROMPTS])
    assert sum(fires) == 2 and (plain != steered).any(1).all()
    assert torch.equal(got, torch.where(torch.tensor(fires)[:, None], steered, plain)) and torch.equal(got, alone)


def test_below_fires_for_the_other_rows(llama):
    reader, act = direction(llama, 3, READ), direction(llama)
    for read in ("last", "mean", "max"):
        level, fires = halves([reduced(llama, reader, p, read) for p in PROMPTS])
        with steer(llama, add(act, 1.5)):
            steered = generate_ids(llama, PROMPTS, 4)
        with steer(llama, add(act, 1.5, when=when(reader, level, read=read, below=True))):
            got = generate_ids(llama, PROMPTS, 4)
        assert torch.equal(got, torch.where(torch.tensor(fires)[:, None], generate_ids(llama, PROMPTS, 4), steered))


@pytest.mark.parametrize("read", ["last", "mean", "max", "token"])
def test_in_a_plain_forward_the_row_is_the_prompt(llama, read):
    reader, act = direction(llama, 3, READ), direction(llama)
    batch = pad_rows(PROMPTS, special_ids=llama.special_ids)
    if read == "token":
        level = float(torch.cat([scores(llama, reader, p)[1:] for p in PROMPTS]).median())
    else:
        level, fires = halves([reduced(llama, reader, p, read) for p in PROMPTS])
    seen = []
    for operations in ((), (add(act, 1.0, when=when(reader, level, read=read)),)):
        with steer(llama, *operations), reading(llama, ACT, lambda name, value: seen.append(value.clone())):
            llama.run(batch.ids, batch.mask)
    moved = (seen[0] != seen[1]).any(-1)
    for i, prompt in enumerate(PROMPTS):
        expected = (scores(llama, reader, prompt) > level).tolist() if read == "token" else [fires[i]] * len(prompt)
        assert moved[i, : len(prompt)].tolist() == [False, *expected[1:]] and not moved[i, len(prompt) :].any()


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}]
)
def test_a_decision_at_each_token_is_the_same_in_every_way_to_generate(llama, options):
    reader, act = direction(llama, 3, READ), direction(llama)
    level = float(torch.cat([scores(llama, reader, p)[1:] for p in PROMPTS]).median())
    plain = generate_ids(llama, PROMPTS, 8)
    for positions in ("default", "all", "prompt"):
        with steer(llama, add(act, 1.5, positions)):
            always = generate_ids(llama, PROMPTS, 8)
        with steer(llama, add(act, 1.5, positions, when=when(reader, level, read="token"))):
            got = generate_ids(llama, PROMPTS, 8)
            assert torch.equal(got, generate_ids(llama, PROMPTS, 8, **options))
            assert torch.equal(got, torch.cat([generate_ids(llama, [p], 8) for p in PROMPTS]))
        assert not torch.equal(got, plain) and not torch.equal(got, always)


def test_a_decision_is_made_anew_for_each_generation(llama):
    reader, act = direction(llama, 3, READ), direction(llama)
    level, fires = halves([reduced(llama, reader, p, "last") for p in PROMPTS])
    yes, no = PROMPTS[fires.index(True)], PROMPTS[fires.index(False)]
    with steer(llama, add(act, 1.5)):
        steered = generate_ids(llama, [yes], 4)
    with steer(llama, add(act, 1.5, when=when(reader, level))):
        for _ in range(2):
            assert torch.equal(generate_ids(llama, [yes], 4), steered)
            assert torch.equal(generate_ids(llama, [no], 4), generate_ids_unsteered(llama, no))


def generate_ids_unsteered(model, prompt):
    from interp.model.clock import unedited

    with unedited(model.hf):
        return generate_ids(model, [prompt], 4)


def test_what_is_read_where_an_operation_acts_is_read_before_it(llama):
    reader = direction(llama, 3, ACT)
    seen = []
    with reading(llama, ACT, lambda name, value: seen.append(value[0].clone())):
        llama.run(torch.tensor([PROMPTS[0]]))
    level = float(reader.project(seen[0])[-1])
    for threshold, moves in ((level - 1e-3 * abs(level), True), (level + 1e-3 * abs(level), False)):
        note = reading(llama, ACT, lambda name, value: seen.append(value[0].clone()))
        with steer(llama, ablate(reader, when=when(reader, threshold))), note:
            llama.run(torch.tensor([PROMPTS[0]]))
        assert torch.equal(seen[-1], seen[0]) != moves


def test_operations_share_what_a_condition_decides(llama):
    reader = direction(llama, 3, READ)
    level, fires = halves([reduced(llama, reader, p, "last") for p in PROMPTS])
    condition = when(reader, level)
    a, b = direction(llama), direction(llama, 2, "blocks.2.hook_resid_post")
    with steer(llama, add(a, 1.0), add(b, 1.0)):
        steered = generate_ids(llama, PROMPTS, 4)
    with steer(llama, add(a, 1.0, when=condition), add(b, 1.0, when=condition)):
        got = generate_ids(llama, PROMPTS, 4)
    assert torch.equal(got, torch.where(torch.tensor(fires)[:, None], steered, generate_ids(llama, PROMPTS, 4)))


def test_the_threshold_lets_at_most_the_share_of_negatives_through(llama):
    reader = direction(llama, 3, READ)
    rows = torch.randn(200, 32, generator=torch.Generator().manual_seed(6))
    along = reader.project(rows)
    for fpr in (0.0, 0.01, 0.05, 0.5):
        over = when(reader, fpr=fpr, negatives=rows).threshold
        assert int((along > over).sum()) == round(200 * fpr)
        under = when(reader, fpr=fpr, negatives=rows.numpy(), below=True).threshold
        assert int((along < under).sum()) == round(200 * fpr)
    ties = when(reader, fpr=0.5, negatives=torch.ones(10, 32)).threshold
    assert not (reader.project(torch.ones(1, 32)) > ties).any(), "equal scores fire together or not at all"
    with pytest.raises(ValueError, match="at least 1000"):
        when(reader, fpr=0.001, negatives=rows)


def test_a_probe_fires_where_its_decision_is_positive(llama):
    from interp.concepts.reading.probes import fit_probe

    rows = []
    with reading(llama, READ, lambda name, value: rows.append(value[0].clone())):
        llama.run(torch.arange(3, 63)[None])
    along = direction(llama, 3, READ).project(rows[0])
    probe = fit_probe(rows[0], (along > along.median()).numpy().astype(int), hook=READ, model=llama)
    condition = when(probe)
    assert condition.threshold == 0 and condition.hook == READ
    decided = set()
    for prompt in PROMPTS:
        seen = []
        with reading(llama, READ, lambda name, value, seen=seen: seen.append(value[0, -1:].clone())):
            llama.run(torch.tensor([prompt]))
        fires = bool(probe.decision(seen[0]) > 0)
        decided.add(fires)
        with steer(llama, add(direction(llama), 1.5, when=condition)):
            got = generate_ids(llama, [prompt], 3)
        assert torch.equal(got, generate_ids(llama, [prompt], 3)) != fires
    assert decided == {True, False}


def test_conditions_that_cannot_hold_are_refused(llama, build):
    from interp.model.loading import load_model

    reader, act = direction(llama, 3, READ), direction(llama)
    late = direction(llama, 3, "blocks.2.hook_resid_post")
    for make, message in (
        (lambda: when(reader), "says nothing of where"),
        (lambda: when(reader, 1.0, read="first"), "last, mean, max, token"),
        (lambda: when(reader, float("nan")), "finite"),
        (lambda: when(reader, fpr=0.1), "together with negatives"),
        (lambda: add(act, 1.0, "all", when=when(reader, 0.0)), "from the prompt's last token on"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="comes after"), steer(llama, add(act, 1.0, when=when(late, 0.0))):
        pass
    other = load_model(build("llama", seed=5))
    foreign = direction(other, 3, READ)
    with pytest.raises(DirectionError, match="force=True"), steer(llama, add(act, 1.0, when=when(foreign, 0.0))):
        pass

"""Which tokens are acted on, read off the stream itself."""

import pytest
import torch

from interp.acts.direction import Direction, residual_norm
from interp.acts.resampling import placebo_directions
from interp.concepts.steering.context import generate_ids, steer
from interp.concepts.steering.operations import add, clamp
from interp.concepts.steering.positions import POSITIONS, selector, window
from interp.model.hooks import editing

HOOK = "resid_post.1"
PROMPTS = torch.tensor([[7, 7, 1, 5, 9, 33], [1, 17, 60, 90, 12, 4]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
EVERY = [
    ("default", [[5], [5]], 1),
    ("all", [[3, 4, 5], [1, 2, 3, 4, 5]], 1),
    ("prompt", [[3, 4, 5], [1, 2, 3, 4, 5]], 0),
    ("last_prompt_token", [[5], [5]], 0),
    ("from_last_prompt_token", [[5], [5]], 1),
    ("generated", [[], []], 1),
]


def direction(model):
    return Direction(
        vector=placebo_directions(model.d_model, 1, 0)[0], hook=model.hook_point(HOOK).name, method="", scale=1.0,
        norm=residual_norm(model, HOOK), model=model.fingerprint,
    )  # fmt: skip


def touched(model, operation, run):
    """Return {(row, column)} where the stream differs after the operation from what it was before it."""
    seen = set()
    held = []

    def before(value, clock):
        held.append(value)
        return value

    def after(value, clock):
        for row, at in (held.pop() != value).any(-1).nonzero().tolist():
            seen.add((row, clock.past + at))
        return value

    with editing(model, {HOOK: before}), steer(model, operation), editing(model, {HOOK: after}):
        run()
    return seen


def expected(prompt_columns, later, rows=2, new=4):
    """Return the pairs; the last new token has no forward of its own."""
    found = {(row, column) for row in range(rows) for column in prompt_columns[row]}
    return found | {(row, 6 + i) for row in range(rows) for i in range(new - 1) if later}


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}]
)
@pytest.mark.parametrize(("positions", "columns", "later"), EVERY)
def test_each_name_chooses_the_same_tokens_whatever_the_cache(llama, positions, columns, later, options):
    def run():
        llama.hf.generate(PROMPTS, attention_mask=MASK, **GREEDY, **options)

    assert touched(llama, add(direction(llama), 1.0, positions), run) == expected(columns, later)
    assert sorted(POSITIONS) == sorted(name for name, _, _ in EVERY)


def test_in_a_plain_forward_the_default_is_every_ordinary_token(llama):
    def run():
        llama.hf(PROMPTS, attention_mask=MASK)

    wanted = expected([[3, 4, 5], [1, 2, 3, 4, 5]], 0)
    assert touched(llama, add(direction(llama), 1.0), run) == wanted
    assert touched(llama, add(direction(llama), 1.0, "all"), run) == wanted


@pytest.mark.parametrize("positions", sorted(set(POSITIONS) - {"default", "all"}))
def test_names_that_need_a_prompt_say_so_in_a_plain_forward(llama, positions):
    with steer(llama, add(direction(llama), 1.0, positions)), pytest.raises(ValueError, match="prompt's width"):
        llama.hf(PROMPTS)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}])
def test_a_window_counts_real_tokens_from_the_first_of_each_row(llama, options):
    def run():
        llama.hf.generate(PROMPTS, attention_mask=MASK, **GREEDY, **options)

    # the first row begins in column 2
    assert touched(llama, add(direction(llama), 1.0, window(2, 6)), run) == {(0, c) for c in range(4, 8)} | {
        (1, c) for c in range(2, 6)
    }
    assert touched(llama, add(direction(llama), 1.0, window(5)), run) == {(0, 7), (0, 8)} | {
        (1, c) for c in range(5, 9)
    }
    assert touched(llama, add(direction(llama), 1.0, window(0, 2)), run) == {(0, 3), (1, 1)}, "BOS is left alone"


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}])
def test_a_mask_covers_columns_and_specials_but_no_pads(llama, options):
    mask = torch.tensor([[1, 0, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1]]).bool()

    def run():
        llama.hf.generate(PROMPTS, attention_mask=MASK, **GREEDY, **options)

    wanted = {(0, 2), (0, 5), (0, 6), (1, 0), (1, 1), (1, 6)}
    assert touched(llama, add(direction(llama), 1.0, mask), run) == wanted
    assert touched(llama, add(direction(llama), 1.0, mask[0]), run) == {(0, 2), (0, 5), (0, 6)} | {
        (1, c) for c in (0, 2, 5, 6)
    }


def test_a_mask_of_a_row_a_prompt_follows_beams_and_is_refused_by_another_batch(llama):
    mask = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()

    def run():
        llama.hf.generate(PROMPTS, attention_mask=MASK, num_beams=3, **GREEDY)

    assert touched(llama, add(direction(llama), 1.0, mask), run) == {(row, 3) for row in range(3)}
    with steer(llama, add(direction(llama), 1.0, mask)), pytest.raises(ValueError, match="2 rows, the batch has 3"):
        llama.hf(torch.full((3, 4), 7))


def test_candidates_of_prompt_lookup_are_steered_as_new_tokens(llama):
    ids = [[7, 8, 9, 7, 8, 9, 7, 8]]
    for positions in ("default", "generated", "prompt", "all"):
        with steer(llama, add(direction(llama), 1.5, positions), clamp(direction(llama), 1.0, positions=positions)):
            plain = generate_ids(llama, ids, 10)
            assert torch.equal(generate_ids(llama, ids, 10, prompt_lookup_num_tokens=3), plain)


def test_an_assistant_model_drafts_and_the_steered_model_decides(llama, build):
    ids, helper = [[7, 8, 9, 7, 8, 9, 7, 8]], build("llama", seed=0)
    unsteered = generate_ids(llama, ids, 8)
    with steer(llama, add(direction(llama), 1.5)):
        plain = generate_ids(llama, ids, 8)
        assert torch.equal(generate_ids(llama, ids, 8, assistant_model=helper), plain)
    assert not torch.equal(plain, unsteered)


def test_the_answer_is_shared_by_operations_of_one_pass(llama):
    clocks = []
    with editing(llama, {HOOK: lambda value, clock: clocks.append(clock) or value}):
        llama.hf(PROMPTS, attention_mask=MASK)
    assert selector("all")(clocks[0]) is selector("all")(clocks[0])
    assert selector(window(1, 3))(clocks[0]) is selector(window(1, 3))(clocks[0])


@pytest.mark.parametrize("bad", ["everywhere", torch.ones(3), torch.ones(1, 2, 3).bool(), 7])
def test_positions_that_are_none_are_refused(llama, bad):
    with pytest.raises((ValueError, TypeError)) as caught:  # a wrong type is told by the checked signature first
        add(direction(llama), 1.0, bad)
    assert "positions" in str(caught.value)


def test_an_empty_window_is_refused():
    for bad in ((3, 3), (-1, 2), (4, 2)):
        with pytest.raises(ValueError, match="empty"):
            window(*bad)

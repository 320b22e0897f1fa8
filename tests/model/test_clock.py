"""The clock of edits: the same columns whatever the cache, the batch, the beams or the chunks."""

import pytest
import torch

from interp.model.clock import full_mask
from interp.model.hooks import editing
from interp.model.loading import load_model

PROMPT = torch.tensor([[0, 0, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
FAMILIES = ["gpt2", "llama", "gemma2", "gemma3_text", "opt", "bloom", "gpt_neox", "qwen3", "falcon", "mistral"]


def watch(model, run):
    """Return the clocks that one run shows, and its result."""
    clocks = []
    with editing(model, {"resid_post.1": lambda value, clock: clocks.append(clock) or value}):
        result = run()
    return clocks, result


def test_greedy_generation_shows_the_whole_prompt_and_then_one_column_at_a_time(build):
    hf = build("llama")
    clocks, _ = watch(load_model(hf), lambda: hf.generate(PROMPT, attention_mask=MASK, **GREEDY))
    assert [c.past for c in clocks] == [0, 6, 7, 8]
    assert [c.columns.tolist() for c in clocks] == [[0, 1, 2, 3, 4, 5], [6], [7], [8]]
    assert clocks[0].mask.tolist() == MASK.bool().tolist()
    assert clocks[0].positions.tolist() == [[-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert [c.positions.squeeze(1).tolist() for c in clocks[1:]] == [[4, 6], [5, 7], [6, 8]]
    assert {c.prompt_width for c in clocks} == {6}


@pytest.mark.parametrize(
    ("options", "pasts", "widths", "rows"),
    [
        ({"num_beams": 3}, [0, 6, 7, 8], [6, 1, 1, 1], 6),
        ({"num_return_sequences": 2, "do_sample": True}, [0, 6, 7, 8], [6, 1, 1, 1], 4),
        ({"cache_implementation": "static"}, [0, 6, 7, 8], [6, 1, 1, 1], 2),
        ({"cache_implementation": "static", "num_beams": 2}, [0, 6, 7, 8], [6, 1, 1, 1], 4),
        ({"use_cache": False}, [0, 0, 0, 0], [6, 7, 8, 9], 2),
        ({"prefill_chunk_size": 3}, [0, 3, 6, 7, 8], [3, 3, 1, 1, 1], 2),
    ],
    ids=["beams", "returned", "static", "static_beams", "no_cache", "chunked"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_every_way_to_generate_shows_the_same_columns(build, family, options, pasts, widths, rows):
    hf = build(family)
    clocks, _ = watch(load_model(hf), lambda: hf.generate(PROMPT, attention_mask=MASK, **{**GREEDY, **options}))
    assert [c.past for c in clocks] == pasts
    assert [len(c.columns) for c in clocks] == widths
    assert {c.prompt_width for c in clocks} == {6}
    real = MASK.bool().repeat_interleave(rows // 2, dim=0)
    for clock in clocks:
        in_prompt = clock.columns[clock.columns < 6]
        assert torch.equal(clock.mask[:, : len(in_prompt)], real[:, in_prompt])
        assert bool(clock.mask[:, len(in_prompt) :].all())
        expected = clock.columns[None] - torch.tensor([2, 0]).repeat_interleave(rows // 2)[:, None]
        assert torch.equal(clock.positions, torch.where(clock.mask, expected, -1))


def test_rejected_candidates_of_prompt_lookup_do_not_move_the_clock(build):
    hf = build("llama")
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    options = {**GREEDY, "prompt_lookup_num_tokens": 3}
    clocks, _ = watch(load_model(hf), lambda: hf.generate(ids, attention_mask=torch.ones_like(ids), **options))
    assert len(clocks[0].columns) > 8 and {c.prompt_width for c in clocks} == {8}
    assert clocks[1].past >= 8


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_uncached_and_single_generation_are_edited_alike(build, family, words):
    model = load_model(build(family), tokenizer=words)
    vector = 4 * torch.randn(32, generator=torch.Generator().manual_seed(8))

    def add(value, clock):
        return value + vector * (clock.mask & ~clock.special)[..., None]

    def later(value, clock):  # from the column that predicts the first new token
        return value + vector * (clock.mask & (clock.columns >= clock.prompt_width - 1))[..., None]

    texts = ["w7 w8", "w9 w10 w11 w12 w13"]
    plain = model.generate(texts, max_new_tokens=5)
    for fn in (add, later):
        with editing(model, {"resid_post.1": fn}):
            together = model.generate(texts, max_new_tokens=5)
            assert together == model.generate(texts, max_new_tokens=5, use_cache=False)
            assert together == [model.generate(text, max_new_tokens=5)[0] for text in texts]
        assert together != plain
    assert model.generate(texts, max_new_tokens=5) == plain


def test_a_static_cache_is_edited_as_a_dynamic_one(build):
    hf = build("llama")
    model = load_model(hf)
    vector = 4 * torch.randn(32, generator=torch.Generator().manual_seed(8))
    with editing(model, {"resid_post.0": lambda v, c: v + vector * c.mask[..., None]}):
        dynamic = hf.generate(PROMPT, attention_mask=MASK, **GREEDY)
        static = hf.generate(PROMPT, attention_mask=MASK, cache_implementation="static", **GREEDY)
    assert torch.equal(dynamic, static)


def test_special_tokens_are_told_by_id_also_in_the_middle_of_a_row(build, words):
    hf = build("llama")
    ids = torch.tensor([[1, 7, 2, 1, 8, 0]])
    clocks, _ = watch(load_model(hf, tokenizer=words), lambda: hf(ids))
    assert clocks[0].special.tolist() == [[True, False, True, True, False, True]]
    clocks, _ = watch(load_model(hf), lambda: hf(ids))  # without a tokenizer the configuration knows bos, eos, pad
    assert clocks[0].special.tolist() == [[True, False, True, True, False, True]]


def test_inputs_embeds_have_a_clock_but_no_specials(build):
    hf = build("llama")
    embeds = hf.get_input_embeddings()(PROMPT).detach()
    model = load_model(hf)
    clocks, _ = watch(model, lambda: hf.generate(inputs_embeds=embeds, attention_mask=MASK, **GREEDY))
    assert [c.past for c in clocks] == [0, 6, 7, 8] and {c.prompt_width for c in clocks} == {6}
    assert not bool(clocks[0].special.any()) and clocks[0].mask.tolist() == MASK.bool().tolist()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_calling_the_base_model_or_with_positional_arguments_has_a_clock_once_a_forward(build, family):
    hf = build(family)
    model = load_model(hf)
    for call in (lambda: hf.base_model(PROMPT, attention_mask=MASK), lambda: hf(input_ids=PROMPT, attention_mask=MASK)):
        clocks, _ = watch(model, call)
        assert len(clocks) == 1
        assert clocks[0].mask.tolist() == MASK.bool().tolist() and clocks[0].prompt_width is None


def test_a_failed_forward_does_not_stop_the_clock(build):
    hf = build("gpt2")
    model = load_model(hf)
    clocks = []
    with editing(model, {"resid_post.0": lambda v, c: clocks.append(c) or v}):
        with pytest.raises(IndexError):
            hf(torch.tensor([[5000]]))
        hf(PROMPT)
        with pytest.raises(TypeError, match="input_ids"):
            hf()
        hf(PROMPT[:, 2:])
    assert [c.mask.shape[1] for c in clocks] == [6, 4]


def test_a_cache_carried_over_by_hand_counts_as_past(build):
    hf = build("llama")
    model = load_model(hf)

    def two_calls():
        cache = hf(PROMPT, attention_mask=MASK, use_cache=True).past_key_values
        hf(PROMPT[:, :2] + 1, attention_mask=torch.cat([MASK, MASK[:, -2:]], 1), past_key_values=cache)

    clocks, _ = watch(model, two_calls)
    assert clocks[1].past == 6 and clocks[1].columns.tolist() == [6, 7]
    assert clocks[1].positions.tolist() == [[4, 5], [6, 7]]


def test_generate_is_shadowed_only_inside_and_nested_contexts_unwind(build):
    hf = build("llama")
    model, marks = load_model(hf), []
    outer = hf.generate
    with editing(model, {"resid_post.0": lambda v, c: marks.append(c.prompt_width) or v}):
        with editing(model, {"resid_post.1": lambda v, c: marks.append(c.prompt_width) or v}):
            hf.generate(PROMPT, attention_mask=MASK, **{**GREEDY, "max_new_tokens": 1, "min_new_tokens": 1})
        assert "generate" in vars(hf)
        hf.generate(PROMPT[:, 2:], **{**GREEDY, "max_new_tokens": 1, "min_new_tokens": 1})
        hf(PROMPT)
    assert marks == [6, 6, 4, None] and "generate" not in vars(hf) and hf.generate == outer


def test_a_generate_that_was_shadowed_before_is_put_back(build):
    hf = build("llama")
    own = hf.generate
    hf.generate = lambda *a, **k: own(*a, **k)
    mine = vars(hf)["generate"]
    with editing(load_model(hf), {"resid_post.0": lambda v, c: v}):
        assert vars(hf)["generate"] is not mine
    assert vars(hf)["generate"] is mine


def test_a_state_space_model_is_followed_through_generate(build):
    hf = build("mamba")
    clocks, _ = watch(load_model(hf), lambda: hf.generate(PROMPT, attention_mask=MASK, **GREEDY))
    assert [c.past for c in clocks] == [0, 6, 7, 8]


def test_a_square_mask_tells_pads_by_itself():
    past, q = 2, 3
    real = torch.tensor([[False, True, True, True, True]])
    allowed = torch.ones(q, past + q, dtype=torch.bool).tril(past)[None] & real[:, None]
    for mask in (allowed[:, None], torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]):
        assert torch.equal(full_mask(mask, None, 2, past, q, torch.device("cpu")), real.repeat(2, 1))
        assert torch.equal(full_mask({"full_attention": mask}, None, 1, past, q, torch.device("cpu")), real)

"""Rows of what a model writes: those of one forward over the whole text, in its order, to its end."""

import pytest
import torch

from interp.acts.capture import capture_acts
from interp.model.loading import load_model

PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 10, 11, 12, 13, 14, 15, 16]]
HOOKS = ["embed", "resid_pre.1", "resid_post.2"]


def assert_rows_are_those_of_one_forward(model, acts, hooks=HOOKS, bound=1e-5):
    """Capture each whole text again, alone and without a cache, and compare."""
    for document in range(acts.n_documents):
        mine = acts.documents == document
        ids = acts.token_ids[mine].tolist()
        assert acts.positions[mine].tolist() == list(range(len(ids)))
        whole = capture_acts(model, [ids], hooks, exclude=("pad",))
        for hook in hooks:
            assert (acts[hook][mine] - whole[hook]).abs().max() < bound


def texts_of(acts, new=None):
    chosen = torch.ones(len(acts), dtype=torch.bool) if new is None else acts.is_new == new
    return [acts.token_ids[chosen & (acts.documents == i)].tolist() for i in range(acts.n_documents)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gemma3_text", "opt", "bloom", "mamba"])
def test_rows_of_a_generation_are_those_of_one_uncached_forward(build, family):
    model = load_model(build(family))
    acts = capture_acts(model, PROMPTS, HOOKS, generate=24, exclude=("pad",), batch_size=2)
    assert texts_of(acts, new=False) == PROMPTS
    for prompt, new in zip(PROMPTS, texts_of(acts, new=True), strict=True):
        with torch.no_grad():
            alone = model.hf.eval().generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert new == alone[0, len(prompt) :].tolist()
        assert len(new) == 24 or new[-1] == 2
    assert_rows_are_those_of_one_forward(model, acts)


def test_rows_of_the_bundled_model_and_of_its_bridge(build):
    text = ["Once upon a time", "The king"]
    for backend in ("native", "transformer_lens"):
        model = load_model("tiny", backend=backend)
        acts = capture_acts(model, text, ["resid_post.2"], generate=12, exclude=("pad",))
        assert_rows_are_those_of_one_forward(model, acts, ["resid_post.2"], bound=1e-4)
        assert acts.generated == tuple(model.generate(text, max_new_tokens=12)) and acts.texts == tuple(text)


def ending(build, words, after):
    """Return a model that writes EOS after the tokens `after`, whatever came before, and never else."""
    hf = build("llama", tie_word_embeddings=False)
    model = load_model(hf, tokenizer=words)
    hook = hf.lm_head.register_forward_hook(
        lambda module, args, output: (
            output.index_fill(2, torch.tensor([2]), -1e3)
            + 1e4 * torch.nn.functional.one_hot(torch.tensor(2), 97) * torch.isin(seen["ids"], after)[:, -1:, None]
        )
    )
    seen = {}
    hf.register_forward_pre_hook(lambda m, a, k: seen.update(ids=k["input_ids"]), with_kwargs=True)
    return model, hook


def test_each_row_ends_with_its_own_eos_which_has_a_row_too(build, words):
    free = capture_acts(load_model(build("llama", tie_word_embeddings=False), tokenizer=words), PROMPTS, "embed",
                        generate=10, exclude=("pad",))  # fmt: skip
    first, second, third = texts_of(free, new=True)
    after = torch.tensor([first[2], second[6]])
    model, _ = ending(build, words, after)
    acts = capture_acts(model, PROMPTS, HOOKS, generate=10, exclude=("pad",))
    assert len({len(new) for new in texts_of(acts, new=True)}) > 1
    for new, old in zip(texts_of(acts, new=True), (first, second, third), strict=True):
        stop = next((i for i, token in enumerate(old) if token in after.tolist()), None)
        assert new == (old if stop is None else [*old[: stop + 1], 2])[:10]
    assert_rows_are_those_of_one_forward(model, acts)
    left_out = capture_acts(model, PROMPTS, HOOKS, generate=10)
    assert 2 not in left_out.token_ids.tolist() and 1 not in left_out.token_ids.tolist()
    assert left_out.generated == acts.generated and "</s>" not in acts.generated[0]


def test_all_rows_may_end_at_the_same_step(build, words):
    """The last step's EOS has a row although generate itself would have stopped before reading it."""
    model, _ = ending(build, words, torch.arange(97))
    acts = capture_acts(model, PROMPTS, HOOKS, generate=10, exclude=("pad",))
    assert texts_of(acts, new=True) == [[2]] * 3 and acts.generated == ("", "", "")
    assert_rows_are_those_of_one_forward(model, acts)


def test_pads_that_are_eos_do_not_become_rows(build, make_words):
    model, _ = ending(build, make_words(pad_token="</s>"), torch.arange(0, 97, 2))
    acts = capture_acts(model, PROMPTS, "resid_post.1", generate=10, exclude=("pad",))
    assert all(new.count(2) <= 1 and (2 not in new or new[-1] == 2) for new in texts_of(acts, new=True))
    assert_rows_are_those_of_one_forward(model, acts, ["resid_post.1"])


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 3}, {"min_new_tokens": 9}])
def test_how_generate_goes_about_it_does_not_matter(llama, options):
    plain = capture_acts(llama, PROMPTS, HOOKS, generate=12, exclude=("pad",))
    other = capture_acts(llama, PROMPTS, HOOKS, generate={"max_new_tokens": 12, **options}, exclude=("pad",))
    assert texts_of(plain) == texts_of(other)
    assert (plain["resid_post.2"] - other["resid_post.2"]).abs().max() < 1e-5


def test_each_returned_sequence_is_a_document(llama):
    torch.manual_seed(0)
    options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
    acts = capture_acts(llama, ["w5 w6", "w7"], HOOKS, generate=options, exclude=("pad",))
    assert acts.n_documents == 6 == len(acts.generated) and acts.texts == ("w5 w6",) * 3 + ("w7",) * 3
    assert [t[:2] for t in texts_of(acts)] == [[1, 5]] * 3 + [[1, 7]] * 3 and len(set(acts.generated)) > 2
    assert_rows_are_those_of_one_forward(llama, acts)


def with_twins(model):
    """Make w4 tie with w5, and so on to w95: the rows of the head are equal in pairs."""
    weight = model.hf.lm_head.weight.data
    weight[5::2] = weight[4:-1:2]
    return model


def test_greedy_near_ties_are_reported_where_they_were_chosen(build, words):
    clear = load_model(build("llama", tie_word_embeddings=False), tokenizer=words)
    assert len(capture_acts(clear, PROMPTS, "embed", generate=10).near_ties) < 3
    model = with_twins(load_model(build("llama", tie_word_embeddings=False), tokenizer=words))
    acts = capture_acts(model, PROMPTS, "embed", generate=10, exclude=("pad",), batch_size=2)  # left pads, two batches
    assert len({len(new) for new in texts_of(acts, new=True)}) > 1
    tied = acts.is_new & (acts.token_ids >= 4) & (acts.token_ids < 96)
    want = list(zip(acts.documents[tied].tolist(), acts.positions[tied].tolist(), strict=True))
    assert [(tie.document, tie.position) for tie in acts.near_ties] == want
    assert all(tie.margin < 1e-6 for tie in acts.near_ties)
    sampled = capture_acts(model, PROMPTS, "embed", generate={"max_new_tokens": 4, "do_sample": True})
    assert sampled.near_ties == ()  # no choice was greedy


def test_steering_reaches_every_new_row_as_one_forward_would(llama):
    from interp.model.hooks import editing

    push = torch.zeros(32).index_fill(0, torch.tensor([3]), 2.0)

    def edit(value, clock):  # new tokens alone, which only the clock of a generation can tell
        return value if clock.prompt_width is None else value + push * (clock.columns >= clock.prompt_width)[:, None]

    with editing(llama, {"resid_post.0": edit}):
        acts = capture_acts(llama, PROMPTS, ["resid_post.0"], generate=6, exclude=("pad",))
    plain = capture_acts(llama, texts_of(acts), ["resid_pre.0", "resid_post.0"], exclude=("pad",))
    moved = acts["resid_post.0"] - plain["resid_post.0"]
    assert (moved[acts.is_new] - push).abs().max() < 1e-5 and moved[~acts.is_new].abs().max() < 1e-5


def test_a_generation_leaves_no_trace(build, words):
    hf = build("gpt2")
    model = load_model(hf, tokenizer=words)
    random = torch.get_rng_state()
    acts = capture_acts(model, ["w5"], "resid_post.1", generate=3)
    assert hf.training and "generate" not in vars(hf) and torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    acts["resid_post.1"].requires_grad_()
    assert len(acts) == 4 and acts.is_new.tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "beam search reorders"),
        ({"prompt_lookup_num_tokens": 2}, "speculative"),
        ({"cache_implementation": "static"}, "static cache"),
        ({"attention_mask": None}, "sets itself"),
        (0, "at least 1"),
        (60, "exceed the 64"),
    ],
)
def test_what_cannot_be_followed_is_refused(llama, options, said):
    with pytest.raises(ValueError, match=said):
        capture_acts(llama, PROMPTS, HOOKS, generate=options)
    assert "generate" not in vars(llama.hf)


def test_prompts_need_a_token_and_no_cutting(build, llama):
    with pytest.raises(ValueError, match="document 1 has no token"):
        capture_acts(load_model(build("llama")), [[5], []], HOOKS, generate=2)
    with pytest.raises(ValueError, match="beside generate"):
        capture_acts(llama, PROMPTS, HOOKS, generate=2, max_len=3)
    assert len(capture_acts(llama, [""], HOOKS, generate=2, exclude=("pad",))) == 3  # BOS is enough
    assert len(capture_acts(llama, [], HOOKS, generate=2)) == 0


def test_include_chooses_among_new_rows_too(llama):
    acts = capture_acts(llama, PROMPTS, HOOKS, generate=6, exclude=("pad",))
    odd = capture_acts(llama, PROMPTS, HOOKS, generate=6, exclude=("pad",), include=lambda ids: ids % 2 == 1)
    chosen = acts.token_ids % 2 == 1
    assert torch.equal(odd.token_ids, acts.token_ids[chosen]) and torch.equal(odd.is_new, acts.is_new[chosen])
    assert (odd["resid_post.2"] - acts["resid_post.2"][chosen]).abs().max() < 1e-6

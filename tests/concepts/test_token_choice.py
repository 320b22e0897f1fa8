from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp.concepts.labelled.token_choice as module
from interp.acts.capture import capture_acts
from interp.acts.rows import NonFiniteError
from interp.concepts.labelled.examples import contrast_pairs, make_examples, read_examples
from interp.concepts.labelled.spans import overlapping
from interp.concepts.labelled.token_choice import POSITIONS, max_over_tokens, token_rows
from interp.concepts.labelled.token_labels import from_words, token_labelled
from interp.model.loading import load_model

# "<s> The| king| met| the| queen|." is how tiny's tokenizer cuts the first one
TEXTS = ["The king met the queen.", "Tom was happy.", "One day, Lily saw a big dog in the park and smiled."]
HOOK = "resid_post.2"
NAME = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def words(build, tokenizer):
    """A random Llama whose tokens are words."""
    return load_model(build("llama"), tokenizer=tokenizer)


def examples(**changes):
    return make_examples(TEXTS, [1, 0, 1], spans=[(4, 8), (8, 13), (14, 27)], **changes)


def embedded(model, *texts):
    """Return the embeddings of words."""
    ids = [model.tokenizer.convert_tokens_to_ids(t) for t in texts]
    return model.embed_matrix()[ids]


def test_every_position_reads_the_tokens_known_by_hand(words):
    data = make_examples(["good1 bad2 w3", "w4 w5"], [1, 0], spans=[(6, 13), (0, 2)])
    rows = token_rows(words, data, "embed", positions=["last", "mean", "span", "span_last"])
    first, second = embedded(words, "good1", "bad2", "w3"), embedded(words, "w4", "w5")
    assert torch.equal(rows.X["hook_embed @ last"], torch.stack([first[2], second[1]]))
    assert torch.equal(rows.X["hook_embed @ span_last"], torch.stack([first[2], second[0]]))
    assert torch.allclose(rows.X["hook_embed @ mean"], torch.stack([first.mean(0), second.mean(0)]), atol=1e-6)
    assert torch.allclose(rows.X["hook_embed @ span"], torch.stack([first[1:].mean(0), second[0]]), atol=1e-6)
    assert rows.y.tolist() == [1, 0] and rows.groups == [0, 1] and rows.documents.tolist() == [0, 1]


@pytest.mark.parametrize("position", ["every", "max"])
def test_every_token_is_a_row_but_pads_and_specials(words, position):
    data = make_examples(["good1 </s> bad2 w3", "w4"], [1, 0], groups=["g", "h"])
    rows = token_rows(words, data, "embed", position)
    assert torch.equal(rows.X["hook_embed"], embedded(words, "good1", "bad2", "w3", "w4"))
    assert rows.y.tolist() == [1, 1, 1, 0] and rows.groups == ["g", "g", "g", "h"]
    assert rows.documents.tolist() == [0, 0, 0, 1] and rows.example_labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("span", "tokens"),
    [
        ((4, 8), [" king"]),
        ((3, 9), [" king"]),  # blanks at its ends belong to no word
        ((0, 4), ["The"]),
        ((5, 6), [" king"]),  # part of a token
        ((6, 10), [" king", " met"]),
        ((17, 23), [" queen", "."]),
    ],
)
def test_a_span_is_the_tokens_that_share_a_character_with_it(tiny, span, tokens):
    data = make_examples([TEXTS[0], "no"], [1, 0], spans=[span, (0, 2)])
    found = token_rows(tiny, data, "embed", "span").X["hook_embed"][0]
    ids = [tiny.tokenizer.encode(t, add_special_tokens=False) for t in tokens]
    assert all(len(i) == 1 for i in ids)
    assert torch.allclose(found, tiny.embed_matrix()[[i[0] for i in ids]].mean(0), atol=1e-6)


def test_blanks_at_either_end_of_a_span_touch_no_token():
    offsets = torch.tensor([[0, 0], [0, 4], [4, 7], [7, 11]])  # "The ", "cat", " sat": a blank behind, none, in front
    assert overlapping(offsets, "The cat sat", (3, 8)).tolist() == [False, False, True, False]
    assert overlapping(offsets, "The cat sat", (2, 9), shift=0).tolist() == [False, True, True, True]
    assert overlapping(offsets + 5, "The cat sat", (3, 8), shift=5).tolist() == [False, False, True, False]


def test_a_character_of_several_tokens_is_all_of_them(tiny):
    text = "a \u2603 b"
    offsets = tiny.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    own = [i for i, (a, b) in zip(offsets["input_ids"], offsets["offset_mapping"], strict=True) if a < 3 and b > 2]
    assert len(own) > 1
    data = make_examples([text, "no"], [1, 0], spans=[(2, 3), (0, 2)])
    found = token_rows(tiny, data, "embed", "span").X["hook_embed"][0]
    assert torch.allclose(found, tiny.embed_matrix()[own].mean(0), atol=1e-6)


def test_the_rows_are_those_of_the_plain_capture(tiny):
    acts = capture_acts(tiny, TEXTS, hooks=[HOOK])
    rows = token_rows(tiny, examples(), HOOK, "every")
    assert torch.allclose(rows.X[NAME], acts[HOOK], atol=1e-5)
    assert np.array_equal(rows.documents, acts.documents.numpy())


def test_one_pass_gives_every_hook_and_position_and_they_equal_single_ones(tiny, monkeypatch):
    passes = []
    whole = module.capture_acts
    monkeypatch.setattr(module, "capture_acts", lambda *a, **k: passes.append(len(a[1])) or whole(*a, **k))
    several = token_rows(tiny, examples(), "resid_post.*", positions=["last", "mean", "span"])
    assert passes == [3] and len(several.X) == 3 * tiny.n_layers
    for position in ("last", "mean", "span"):
        one = token_rows(tiny, examples(), HOOK, position)
        assert torch.allclose(one.X[NAME], several.X[f"{NAME} @ {position}"], atol=1e-5)


@pytest.mark.parametrize("position", sorted(POSITIONS))
@given(order=st.permutations([0, 1, 2]), batch_size=st.integers(1, 4), side=st.sampled_from(["left", "right"]))
@settings(max_examples=8, deadline=None)
def test_order_batches_and_the_side_of_pads_do_not_matter(tiny, position, order, batch_size, side):
    plain = token_rows(tiny, examples(groups=["a", "b", "c"]), HOOK, position)
    turned = make_examples(
        [TEXTS[i] for i in order], [[1, 0, 1][i] for i in order], groups=["abc"[i] for i in order],
        spans=[[(4, 8), (8, 13), (14, 27)][i] for i in order],
    )  # fmt: skip
    before, tiny.tokenizer.padding_side = tiny.tokenizer.padding_side, side
    try:
        found = token_rows(tiny, turned, HOOK, position, batch_size=batch_size)
    finally:
        tiny.tokenizer.padding_side = before
    for i, original in enumerate(order):
        mine, theirs = found.documents == i, plain.documents == original
        assert torch.allclose(found.X[NAME][mine], plain.X[NAME][theirs], atol=1e-4)
        assert [found.groups[j] for j in np.flatnonzero(mine)] == ["abc"[original]] * mine.sum()


def test_what_is_held_at_once_does_not_matter(tiny, monkeypatch):
    whole = token_rows(tiny, examples(), HOOK, "mean").X[NAME]
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 192 * 3)
    assert torch.allclose(token_rows(tiny, examples(), HOOK, "mean").X[NAME], whole, atol=1e-5)


def test_pairs_come_out_with_their_rows(tiny):
    rows = token_rows(tiny, contrast_pairs(["hot", "big"], ["cold", "small"], template="It is {}."), HOOK)
    assert rows.pairs == [0, 0, 1, 1] and rows.groups == [0, 0, 1, 1] and rows.y.tolist() == [1, 0, 1, 0]
    assert rows.model == tiny.fingerprint


def test_the_first_tokens_can_be_left_out(words):
    data = make_examples(["good1 bad2 w3", "w4 w5"], [1, 0])
    rows = token_rows(words, data, "embed", "every", skip_first=2)  # BOS and one more
    assert torch.equal(rows.X["hook_embed"], embedded(words, "bad2", "w3", "w5"))
    with pytest.raises(ValueError, match="example 1 has no token"):
        token_rows(words, data, "embed", skip_first=3)


def test_long_texts_are_refused_cut_or_read_by_windows(words):
    data = make_examples(["w1 " * 80, "w4 w5"], [1, 0])
    with pytest.raises(ValueError, match=r"example 0 has 81 tokens, .* takes 64; cut it with max_len=64"):
        token_rows(words, data, "embed")
    assert token_rows(words, data, "embed", "every", max_len=10).documents.tolist() == [0] * 9 + [1] * 2
    assert token_rows(words, data, "embed", "every", long="windows").documents.tolist() == [0] * 80 + [1] * 2
    cut = make_examples(["w1 " * 20, "w4 w5"], [1, 0], spans=[(50, 53), (0, 2)])
    with pytest.raises(ValueError, match="example 0: no token overlaps the span 50 to 53"):
        token_rows(words, cut, "embed", "span", max_len=10)


def test_token_labels_are_those_of_the_characters(words):
    data = token_labelled(["w0 good1 bad2 w3", "w4 w5"], [[(3, 8, 1), (14, 16, 1)], []])
    rows = token_rows(words, data, "embed", "every")
    assert rows.y.tolist() == [0, 1, 0, 1, 0, 0] and rows.documents.tolist() == [0, 0, 0, 0, 1, 1]
    only = token_rows(words, replace(data, outside=None), "embed", "every")
    assert only.y.tolist() == [1, 1]
    assert torch.equal(only.X["hook_embed"], embedded(words, "good1", "w3"))


def test_labels_of_words_and_of_tokens_agree(words):
    by_word = token_rows(words, from_words([["good1", "w2", "w3"]], [[1, 0, 0]]), "embed", "every")
    by_token = token_rows(words, token_labelled(["good1 w2 w3"], [[1, 0, 0]]), "embed", "every")
    assert by_word.y.tolist() == by_token.y.tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="example 0 has 2 token labels for 3 tokens"):
        token_rows(words, token_labelled(["good1 w2 w3"], [[1, 0]]), "embed", "every")


def test_a_token_under_spans_of_both_labels_is_refused(words):
    data = token_labelled(["good1 w2"], [[(0, 2, 1), (2, 5, 0)]])
    with pytest.raises(ValueError, match="example 0: a token lies in spans of both labels"):
        token_rows(words, data, "embed", "every")


@pytest.fixture
def chatting(words):
    """The word model with a chat template that strips what it is given."""
    before = words.tokenizer.chat_template
    words.tokenizer.chat_template = (
        "<s> {% for m in messages %}w9{{ m['role'][:0] }} {{ m['content'].strip() }} </s> {% endfor %}"
        "{% if add_generation_prompt %}w8 good1{% endif %}"
    )
    yield words
    words.tokenizer.chat_template = before


def test_chats_are_read_by_their_template_and_spans_lie_in_the_last_message(chatting):
    chats = [[{"role": "user", "content": f" good1 {w} good1 "}] for w in ("w2", "w3")]
    data = make_examples(chats, [1, 0], spans=[(10, 15)] * 2)
    plain = token_rows(chatting, data, "embed", positions=["last", "span"])
    assert torch.equal(plain.X["hook_embed @ last"], embedded(chatting, "good1", "good1"))
    assert torch.equal(plain.X["hook_embed @ span"], embedded(chatting, "good1", "good1"))
    other = make_examples(chats, [1, 0], spans=[(7, 9)] * 2)
    asked = token_rows(chatting, other, "embed", positions=["mean", "span"], add_generation_prompt=True)
    assert torch.equal(asked.X["hook_embed @ span"], embedded(chatting, "w2", "w3"))
    told = embedded(chatting, "w9", "good1", "w2", "good1", "w8", "good1").mean(0)
    assert torch.allclose(asked.X["hook_embed @ mean"][0], told, atol=1e-6)


def test_a_template_that_changes_the_message_cannot_be_spanned(chatting):
    chatting.tokenizer.chat_template = "w1 {% for m in messages %}{{ m['content'].upper() }}{% endfor %}"
    chats = [[{"role": "user", "content": w}] for w in ("good1", "good2")]
    with pytest.raises(ValueError, match="example 0: the chat template does not show"):
        token_rows(chatting, make_examples(chats, [1, 0], spans=[(0, 5)] * 2), "embed", "span")


def test_a_slow_tokenizer_has_no_spans(tiny, monkeypatch):
    class Slow:
        def __getattr__(self, name):
            return getattr(tiny.tokenizer, name)

        def __call__(self, *args, **kwargs):
            return tiny.tokenizer(*args, **kwargs)

        is_fast = False

    with pytest.raises(ValueError, match="need a fast tokenizer"):
        token_rows(load_model(tiny.hf, tokenizer=Slow()), examples(), HOOK, "span")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"position": "first"}, "each must be one of"),
        ({"positions": []}, "each must be one of"),
        ({"positions": ["last", "every"]}, "stand alone"),
        ({"positions": ["last", "last"]}, "each once"),
        ({"long": "cut"}, "long is 'cut'"),
        ({"max_len": 0}, "max_len is 0"),
    ],
)
def test_what_cannot_be_read_is_refused(tiny, options, says):
    with pytest.raises(ValueError, match=says):
        token_rows(tiny, examples(), HOOK, **options)


def test_spans_and_token_labels_are_asked_for_where_they_are_missing(tiny):
    with pytest.raises(ValueError, match="example 1 has no span"):
        token_rows(tiny, make_examples(["a b", "c"], [1, 0], spans=[(0, 1), None]), HOOK, "span")
    with pytest.raises(ValueError, match='position "every" reads'):
        token_rows(tiny, token_labelled(["a b"], [[(0, 1, 1)]]), HOOK)


def test_inf_is_named_by_the_text_that_it_is_in(words, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 32 * 3)
    weight = words.hf.get_input_embeddings().weight
    row = words.tokenizer.convert_tokens_to_ids("bad7")
    before = weight.data[row].clone()
    weight.data[row, 0] = torch.inf
    try:
        with pytest.raises(NonFiniteError, match="document 2, position 2"):
            token_rows(words, make_examples(["w1 w2 w3", "w4", "w5 bad7"], [1, 0, 1]), "embed")
    finally:
        weight.data[row] = before


def test_the_highest_score_of_its_tokens_speaks_for_a_text():
    assert max_over_tokens([0.1, 3.0, -2.0, -5.0], [0, 0, 1, 1]).tolist() == [3.0, -2.0]
    for scores, numbers, says in (
        ([1.0], [1], "have no score"),
        ([1.0], [0, 0], "must be one row"),
        ([float("nan")], [0], "is nan"),
    ):
        with pytest.raises(ValueError, match=says):
            max_over_tokens(scores, numbers)


def test_scores_of_texts_are_asked_of_max_not_of_every(words):
    data = make_examples(["good1 bad2", "w4"], [1, 0])
    rows = token_rows(words, data, "embed", "max")
    assert rows.example_scores([1.0, 4.0, 2.0]).tolist() == [4.0, 2.0]
    with pytest.raises(ValueError, match="each token is an example"):
        token_rows(words, data, "embed", "every").example_scores([1.0, 4.0, 2.0])


@pytest.mark.shared
def test_real_files_are_read_whole(shared_data, tiny):
    path = shared_data / "concepts/geometry-of-truth/cities.csv"
    found = read_examples(path, text="statement", group="city")
    assert len(found) == 1496 and int(found.labels.sum()) == 748
    assert found.texts[1] == "The city of Krasnodar is in South Africa." and found.groups[0] == found.groups[1]
    rows = token_rows(tiny, first_of(found, 40), HOOK, "last")
    assert rows.X[NAME].shape == (40, 192) and rows.groups == found.groups[:40]


def first_of(data, n):
    return replace(data, texts=data.texts[:n], labels=data.labels[:n], groups=data.groups[:n])

"""Token batches: BOS once, masks that tell the truth, packing that loses nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.model.tokens import encode, pack, pad_id, pad_rows, special_ids_of, tokenize
from sae.extras import MissingError

SOME = ["w5 w6 w7", "", "w8"]


def test_bos_goes_in_front_once(words):
    assert encode(words, "w5 w6") == encode(words, "<s> w5 w6") == [1, 5, 6]
    assert encode(words, "w5 w6", add_bos=False) == [5, 6]
    assert encode(words, "") == [1]
    words.bos_token = None
    assert encode(words, "w5 w6") == [5, 6] and encode(words, "") == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_mark_real_tokens_and_specials_by_id(words, side):
    batch = tokenize(words, SOME, side=side)
    real = [[1, 5, 6, 7], [1], [1, 8]]
    for i, row in enumerate(real):
        assert batch.ids[i][batch.mask[i]].tolist() == row
        assert batch.special[i][batch.mask[i]].tolist() == [token < 4 for token in row]
        edge = batch.mask[i, -1] if side == "left" else batch.mask[i, 0]
        assert bool(edge)
    assert not bool((batch.special & ~batch.mask).any())


def test_special_tokens_added_without_a_role_are_special_too(words):
    from tokenizers import AddedToken

    words.add_tokens([AddedToken("<|header|>", special=True)], special_tokens=True)
    words.add_tokens(["plain"])
    header, plain = words.convert_tokens_to_ids(["<|header|>", "plain"])
    assert header not in words.all_special_ids  # else this shows nothing
    assert special_ids_of(words) == {0, 1, 2, 3, header} and plain != header
    batch = tokenize(words, "w5 <|header|> plain w6")
    assert batch.special[0].tolist() == [True, False, True, False, False]


def test_a_pad_token_that_is_eos_does_not_hide_a_real_eos(words):
    words.pad_token = words.eos_token
    batch = tokenize(words, ["w5 </s>", "w6"])
    assert batch.mask.tolist() == [[True] * 3, [True, True, False]]
    assert batch.special[0].tolist() == [True, False, True] and not bool(batch.special[1, 2])


def test_pads_are_filled_with_pad_or_eos_or_zero(words):
    assert pad_id(words) == 0
    words.pad_token = None
    assert pad_id(words) == 2
    words.eos_token = None
    assert pad_id(words) == 0 and pad_id(None) == 0


def test_rows_are_cut_only_when_asked(words):
    assert tokenize(words, "w5 w6 w7").ids.shape == (1, 4)
    assert tokenize(words, "w5 w6 w7", max_len=2).ids.tolist() == [[1, 5]]
    with pytest.raises(ValueError, match="at least 1"):
        tokenize(words, "w5", max_len=0)


def test_no_texts_make_an_empty_batch(words):
    assert tokenize(words, []).ids.shape == (0, 0)
    assert pad_rows([[], []]).mask.shape == (2, 0)
    with pytest.raises(ValueError, match="'left' or 'right'"):
        pad_rows([[1]], side="middle")


def test_text_without_a_tokenizer_says_what_to_pass():
    with pytest.raises(MissingError, match="tokenizer="):
        tokenize(None, "w5")


class Letters:
    """A tokenizer of letters, cheap enough for many random texts."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None
    all_special_ids = (1, 2)

    def __call__(self, text, **options):
        return {"input_ids": [ord(c) for c in text]}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abcdefgh", max_size=12), max_size=9),
    st.integers(2, 9),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_packing_loses_nothing_and_keeps_the_order(texts, ctx, batch_size, add_bos, separate):
    batches = list(pack(Letters(), texts, ctx, batch_size=batch_size, add_bos=add_bos, separate=separate))
    got = {name: [] for name in ("ids", "documents")}
    for batch in batches:
        assert batch.ids.shape[1] == ctx and batch.ids.shape[0] <= batch_size
        if add_bos:
            assert (batch.ids[:, 0] == 1).all() and (batch.documents[:, 0] == -1).all()
        assert (batch.ids[:, 1:][batch.mask[:, 1:]] != 1).all()
        content = batch.mask & (batch.documents >= 0)
        for name, found in got.items():
            found += getattr(batch, name)[content].tolist()
        columns = torch.arange(ctx).expand_as(batch.ids)
        assert torch.equal(batch.positions, torch.where(batch.mask, columns, -1))
        assert (batch.documents[~batch.mask] == -1).all()
    tail = [2] if separate else []
    assert got["ids"] == [i for text in texts for i in [*map(ord, text), *tail]]
    assert got["documents"] == [n for n, text in enumerate(texts) for _ in range(len(text) + len(tail))]
    assert all(bool(b.mask.all()) for b in batches[:-1])  # only the very last window may be padded
    assert not batches or bool(batches[-1].mask[:-1].all())


def test_packing_reads_its_texts_as_they_are_needed():
    taken = []

    def texts():
        for i in range(100):
            taken.append(i)
            yield "abcd"

    next(pack(Letters(), texts(), 5, batch_size=2))
    assert len(taken) < 5


def test_packing_needs_room_beside_bos():
    with pytest.raises(ValueError, match="ctx 1"):
        next(pack(Letters(), ["ab"], 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abcdefgh", max_size=12), max_size=9), st.integers(2, 9), st.sampled_from(["masked", "documents"])
)
def test_documents_kept_apart_each_begin_with_bos_and_lose_nothing(texts, ctx, packing):
    found = {n: [] for n in range(len(texts))}
    for batch in pack(Letters(), texts, ctx, batch_size=2, packing=packing):
        assert batch.masked == (packing == "masked") and batch.ids.shape[1] == ctx
        for ids, documents, positions, mask in zip(
            batch.ids, batch.documents, batch.positions, batch.mask, strict=True
        ):
            ids, documents, positions = (x[mask].tolist() for x in (ids, documents, positions))
            starts = [i for i in range(len(ids)) if i == 0 or documents[i] != documents[i - 1]]
            assert all(ids[i] == 1 for i in starts) and (packing == "masked" or len(starts) == 1)
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                assert positions[start:end] == list(range(end - start))
                found[documents[start]] += ids[start + 1 : end]
    assert found == {n: [*map(ord, text), 2] for n, text in enumerate(texts)}


def test_masked_windows_are_full_but_for_a_place_too_small():
    batches = list(pack(Letters(), ["abc", "de", "fghij"], 6, batch_size=9, packing="masked"))
    assert batches[0].mask.sum(1).tolist() == [5, 6, 6]  # one place is left, too small for BOS and a token
    with pytest.raises(ValueError, match="joined, masked, documents"):
        next(pack(Letters(), ["a"], 6, packing="loose"))


def test_an_encoders_template_is_kept(words):
    from tokenizers.processors import TemplateProcessing

    words.bos_token = None
    words.cls_token = "<s>"
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert encode(words, "w5 w6") == [1, 5, 6, 2] and encode(words, "w5 w6", add_bos=False) == [5, 6]
    rows = next(pack(words, ["w5 w6", "w7"], 8, packing="documents"))
    assert [r[m].tolist() for r, m in zip(rows.ids, rows.mask, strict=True)] == [[1, 5, 6, 2], [1, 7, 2]]

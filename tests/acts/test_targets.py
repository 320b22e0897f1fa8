"""Encoders, and models of two streams: texts in the encoder, targets in the decoder, rows of one at a time."""

import pytest
import torch

from interp.acts.capture import capture_acts
from interp.model.loading import load_model

TEXTS = ["w5 w6 w7 w8 w9", "w10", "w11 w12"]
TARGETS = ["w20 w21", "w22 w23 w24 w25", "w26"]
T5 = {"vocab_size": 97, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 48, "pad_token_id": 0}
SIDES = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("attention_heads", 4), ("ffn_dim", 48))}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None}
BART = {"vocab_size": 97, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "max_position_embeddings": 64}


def make(kind):
    import transformers

    sizes = (
        {**T5, "decoder_start_token_id": 0} if kind == "T5" else {**BART, **SIDES, **IDS, "decoder_start_token_id": 2}
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        config = getattr(transformers, f"{kind}Config")(**sizes)
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


@pytest.fixture(scope="module", params=["T5", "Bart"])
def pair(request, words):
    """Return an encoder-decoder with the word-level tokenizer, and its decoder's start token."""
    return load_model(make(request.param), tokenizer=words), 0 if request.param == "T5" else 2


def test_rows_of_a_decoder_are_those_of_its_targets_each_pair_alone(pair):
    model, start = pair
    acts = capture_acts(model, TEXTS, "decoder.resid_post.1", targets=TARGETS, batch_size=2, exclude=("pad",))
    sources = [[1, 5, 6, 7, 8, 9], [1, 10], [1, 11, 12]]
    targets = [[start, 1, 20, 21], [start, 1, 22, 23, 24, 25], [start, 1, 26]]
    assert acts.token_ids.tolist() == [t for row in targets for t in row] and acts.texts == tuple(TARGETS)
    assert acts.positions.tolist() == [i for row in targets for i in range(len(row))]
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        with torch.no_grad():
            out = model.hf.eval()(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target]), output_hidden_states=True
            )
        want = out.decoder_hidden_states[2][0]
        assert (acts["decoder.resid_post.1"][acts.documents == i] - want).abs().max() < 1e-5
    given = capture_acts(model, sources, "decoder.resid_post.1", targets=targets, exclude=("pad",))
    assert (given["decoder.resid_post.1"] - acts["decoder.resid_post.1"]).abs().max() < 1e-5
    plain = capture_acts(model, TEXTS, "decoder.resid_post.1", targets=TARGETS)
    assert plain.token_ids.tolist() == [20, 21, 22, 23, 24, 25, 26]
    other = capture_acts(model, TEXTS[::-1], "decoder.resid_post.1", targets=TARGETS)
    assert (other["decoder.resid_post.1"][:2] - plain["decoder.resid_post.1"][:2]).abs().max() > 1e-4  # texts matter


def test_rows_of_the_encoder_are_those_of_its_texts(pair):
    model, _ = pair
    acts = capture_acts(model, TEXTS, "encoder.resid_post.1", batch_size=2)
    assert acts.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12] and acts.texts == tuple(TEXTS)
    with torch.no_grad():
        whole = model.hf.eval().get_encoder()(torch.tensor([[1, 5, 6, 7, 8, 9]]), output_hidden_states=True)
    assert (acts["encoder.resid_post.1"][:5] - whole.hidden_states[2][0, 1:]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("hooks", "options", "said"),
    [
        (["encoder.resid_post.1", "decoder.resid_post.1"], {"targets": TARGETS}, "both streams"),
        ("decoder.resid_post.1", {}, "give targets="),
        ("encoder.resid_post.1", {"targets": TARGETS}, "leave targets out"),
        ("decoder.resid_post.1", {"targets": TARGETS[:2]}, "2 targets for 3 texts"),
        ("decoder.resid_post.1", {"targets": TARGETS, "long": "windows"}, 'long="cut"'),
        ("decoder.resid_post.1", {"generate": 3}, "generate with it first"),
    ],
)
def test_streams_are_not_mixed_and_targets_must_fit(pair, hooks, options, said):
    with pytest.raises(ValueError, match=said):
        capture_acts(pair[0], TEXTS, hooks, **options)


def test_targets_are_for_decoders_of_two_streams(llama):
    with pytest.raises(ValueError, match="leave targets out"):
        capture_acts(llama, TEXTS, "resid_post.1", targets=TARGETS)


def test_texts_and_targets_are_cut_alike(pair):
    model, start = pair
    acts = capture_acts(model, TEXTS, "decoder.resid_post.2", targets=TARGETS, max_len=3, exclude=("pad",))
    assert acts.token_ids.tolist() == [start, 1, 20, start, 1, 22, start, 1, 26]
    short = capture_acts(model, ["w5 w6"], "decoder.resid_post.2", targets=["w20"], exclude=("pad",))
    assert (acts["decoder.resid_post.2"][:3] - short["decoder.resid_post.2"]).abs().max() < 1e-5


def test_an_encoder_alone_takes_no_generation_and_long_texts_in_windows_with_cls(make_words):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        hf = BertForMaskedLM(BertConfig(vocab_size=97, max_position_embeddings=16, **sizes))
    model = load_model(hf, tokenizer=make_words(bos_token=None, cls_token="<s>", sep_token="</s>"))
    row = [1, *range(5, 29), 2]
    acts = capture_acts(model, [row], "resid_post.1", long="windows", exclude=("pad",))
    assert acts.token_ids.tolist() == row and acts.positions.tolist() == list(range(26))
    last = capture_acts(model, [[1, *row[-15:]]], "resid_post.1", exclude=("pad",))
    assert (acts["resid_post.1"][-1] - last["resid_post.1"][-1]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="cannot generate"):
        capture_acts(model, [row[:5]], "resid_post.1", generate=3)

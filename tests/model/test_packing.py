"""Documents that share a row see what they see alone, or the model is refused."""

import pytest
import torch

from interp.model import packing
from interp.model.anatomy import AnatomyError
from interp.model.hooks import editing, reading
from interp.model.loading import load_model

IDS = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(7))
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, -1, -1], [0, 0, 1, 2, 3, 4, 0, 1, 2]])
DOCUMENTS = [(0, 0, 3), (0, 3, 7), (1, 0, 1), (1, 1, 6), (1, 6, 9)]  # row, from, to


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "gpt_neox"])
def test_packed_documents_equal_the_documents_alone(build, family):
    model = load_model(build(family))
    got = {}
    with reading(model, "resid_post.1", lambda name, value: got.update(x=value.clone())):
        model.run(IDS, POSITIONS >= 0, positions=POSITIONS)
        packed = got["x"]
        for row, start, end in DOCUMENTS:
            model.run(IDS[row : row + 1, start:end])
            assert (packed[row, start:end] - got["x"][0]).abs().max() < 1e-5
    logits, joined = model.logits(IDS, POSITIONS >= 0, positions=POSITIONS), model.logits(IDS)
    for row, start, end in DOCUMENTS:
        alone = model.logits(IDS[row : row + 1, start:end])[0]
        assert (logits[row, start:end] - alone).abs().max() < 1e-5
        assert start == 0 or (joined[row, start:end] - alone).abs().max() > 1e-3  # else the test shows nothing


@pytest.mark.parametrize("family", ["bloom", "opt", "mamba"])
def test_a_model_that_cannot_keep_documents_apart_is_refused(build, family):
    model = load_model(build(family))
    for call in (model.run, model.logits):
        with pytest.raises(AnatomyError, match="one document a row"):
            call(IDS, POSITIONS >= 0, positions=POSITIONS)
    model.run(IDS)  # as before


def test_the_check_is_seen_by_no_hook(build):
    model = load_model(build("llama"))
    read, edited = [], []

    def edit(value, clock):
        edited.append(value.shape)
        return value

    with (
        editing(model, {"resid_post.0": edit}),
        reading(model, "resid_post.1", lambda name, value: read.append(value.shape)),
    ):
        model.run(IDS, positions=POSITIONS, mask=POSITIONS >= 0)
    assert read == edited == [(2, 9, 32)]


def test_the_check_finds_a_leak_that_positions_alone_would_hide(build):
    hf = build("llama").to(torch.bfloat16)
    last = hf.model.layers[-1]
    assert packing.keeps_apart(hf, last)
    for block in hf.model.layers:  # a model that counts right and masks nothing between documents
        attend = block.self_attn.forward
        block.self_attn.forward = lambda *a, attend=attend, **k: attend(*a, **{**k, "attention_mask": None})
    assert not packing.keeps_apart(hf, last)


@pytest.mark.parametrize(
    ("positions", "mask", "said"),
    [
        ([[0, 1, 2, 0]], [[0, 1, 1, 1]], "right alone"),
        ([[0, 1, 3, 0]], None, "count 0, 1, 2"),
        ([[1, 2, 3, 4]], None, "count 0, 1, 2"),
    ],
)
def test_wrong_positions_are_refused(build, positions, mask, said):
    model = load_model(build("llama"))
    mask = None if mask is None else torch.tensor(mask).bool()
    with pytest.raises(ValueError, match=said):
        model.run(IDS[:1, :4], mask, positions=torch.tensor(positions))

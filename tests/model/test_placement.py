"""Models that lie on several devices or nowhere, and a TransformerLens that is missing or unknown."""

import importlib.metadata
import sys

import pytest
import torch

from interp.model.anatomy import AnatomyError
from interp.model.hooks import reading
from interp.model.loading import load_model
from sae.extras import MissingError

IDS = torch.randint(4, 97, (2, 6), generator=torch.Generator().manual_seed(5))
HOOKS = ["resid_post.1", "attn_out.1", "resid_pre.1"]


@pytest.fixture(scope="module")
def folder(build, tmp_path_factory):
    path = tmp_path_factory.mktemp("placed") / "small-llama"
    build("llama").save_pretrained(path)
    return path


def on_meta(hf):
    return sum(p.is_meta for p in hf.parameters())


def read(model, hook):
    got = {}
    with reading(model, hook, lambda name, value: got.update(x=value.clone())):
        model.run(IDS)
    return got["x"]


def test_a_device_map_goes_to_from_pretrained(folder):
    plain, mapped = load_model(folder, device="cpu"), load_model(folder, device_map={"": "cpu"})
    assert torch.equal(plain.logits(IDS), mapped.logits(IDS)) and plain.fingerprint == mapped.fingerprint
    with pytest.raises(ValueError, match="give one of them"):
        load_model(folder, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="dispatch it before"):
        load_model(plain.hf, device_map="auto")


def test_blocks_on_the_disk_are_captured_and_go_back_there(folder):
    plain = load_model(folder, device="cpu")
    kept = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    model = load_model(folder, device_map=kept | {"model.layers.1": "disk", "model.layers.2": "disk"})
    away = on_meta(model.hf)
    assert away > 0 and model.offloaded and not plain.offloaded
    for hook in HOOKS:
        assert torch.equal(read(model, hook), read(plain, hook)), hook
        assert on_meta(model.hf) == away, hook
    assert torch.equal(model.logits(IDS), plain.logits(IDS)) and model.fingerprint == plain.fingerprint


def test_a_model_offloaded_by_the_user_is_taken_as_it_is(build):
    from accelerate import cpu_offload

    plain, hf = load_model(build("llama")), build("llama")
    cpu_offload(hf, execution_device=torch.device("cpu"))
    model = load_model(hf)
    away = on_meta(hf)
    assert away == len(list(hf.parameters()))
    for hook in HOOKS:
        assert torch.equal(read(model, hook), read(plain, hook))
    assert on_meta(hf) == away and model.device == torch.device("cpu")
    assert torch.equal(model.logits(IDS), plain.logits(IDS)) and model.fingerprint == plain.fingerprint
    assert torch.equal(model.unembed_matrix(), plain.unembed_matrix())
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        assert torch.equal(model.unembed(x), plain.unembed(x))


def test_a_reading_inside_a_block_stops_at_its_end_where_weights_are_offloaded(build):
    from accelerate import cpu_offload

    hf = build("llama")
    cpu_offload(hf, execution_device=torch.device("cpu"))
    model, ran = load_model(hf), []
    for i, block in enumerate(hf.model.layers):
        block.mlp.register_forward_hook(lambda *a, i=i: ran.append(i))
    read(model, "attn_out.1")
    assert ran == [0, 1]


def test_weights_that_are_nowhere_are_refused(build):
    hf = build("llama").to("meta")
    with pytest.raises(AnatomyError, match="on the meta device"):
        load_model(hf)


@pytest.mark.parametrize("broken", ["absent", "no bridge", "old", "new"])
def test_a_transformer_lens_that_interp_does_not_know_gives_one_error_and_breaks_nothing(build, monkeypatch, broken):
    hf = build("llama")
    bridged = load_model(hf, backend="transformer_lens")
    if broken == "absent":

        def version(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
    elif broken == "no bridge":
        monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    else:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: {"old": "4.2.1", "new": "5.0.0"}[broken])
    for call in (lambda: load_model(hf, backend="transformer_lens"), lambda: load_model(bridged.bridge)):
        with pytest.raises(MissingError, match=r"transformer-lens>=4\.3,<5"):
            call()
    assert load_model(hf).logits(IDS).shape == (2, 6, 97)

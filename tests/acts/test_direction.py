import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interp.acts import direction as module
from interp.acts.direction import Direction, DirectionError, residual_norm
from interp.concepts.reading.finders import fit_direction, latent_direction
from interp.model.loading import load_model
from sae.extras import MissingError
from sae.io import FormatError, load_tensors, save_tensors


def tiny(seed=0, d=32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=100, hidden_size=d, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return load_model(tiny())


@pytest.fixture
def fitted(model):
    rng = np.random.default_rng(7)
    y = np.tile([0, 1], 30)
    X = rng.normal(size=(60, 32)) + 2.0 * y[:, None] * np.eye(32)[3]
    return fit_direction(X, y, hook="resid_post.1", model=model)


def test_a_saved_direction_comes_back_bit_for_bit_with_its_past(tmp_path, model, fitted):
    fitted.save(tmp_path / "d.safetensors")
    back = Direction.load(tmp_path / "d.safetensors", model)
    assert torch.equal(back.vector, fitted.vector)
    assert back.meta() == fitted.meta()
    assert back.hook == "blocks.1.hook_resid_post" and back.model == model.fingerprint
    assert back.norm == residual_norm(model, "resid_post.1") and len(back.data) == 16
    assert back.versions["torch"] == str(torch.__version__)
    assert back.positive - back.negative == pytest.approx(back.scale, rel=1e-6)


def test_a_direction_is_a_frozen_value(fitted):
    with pytest.raises(AttributeError):
        fitted.norm = 3.0
    with pytest.raises(TypeError):
        fitted.versions["torch"] = "0"
    source = torch.eye(4)[0]
    kept = Direction(vector=source, hook="", method="by hand", scale=1.0, norm=None, model="")
    source[0] = 5.0
    assert float(kept.vector[0]) == 1.0


def test_another_model_refuses_the_direction_unless_forced(tmp_path, fitted, model):
    other = load_model(tiny(seed=1))
    fitted.save(tmp_path / "d.safetensors")
    with pytest.raises(DirectionError, match=f"{fitted.model}.*{other.fingerprint}.*force=True"):
        Direction.load(tmp_path / "d.safetensors", other)
    forced = Direction.load(tmp_path / "d.safetensors", other, force=True)
    assert forced.model == other.fingerprint and forced.forced_from == model.fingerprint
    assert forced.norm == residual_norm(other, fitted.hook) != fitted.norm
    assert torch.equal(forced.vector, fitted.vector)


def test_another_hook_point_refuses_the_direction_unless_forced(fitted, model):
    with pytest.raises(DirectionError, match=r"blocks.1.hook_resid_post, not at blocks.0.hook_resid_post"):
        fitted.for_model(model, hook="resid_post.0")
    moved = fitted.for_model(model, hook="resid_post.0", force=True)
    assert moved.hook == "blocks.0.hook_resid_post" and moved.norm == residual_norm(model, "resid_post.0")
    assert fitted.for_model(model) is fitted


def test_another_width_or_a_missing_hook_point_is_refused_even_when_forced(fitted):
    with pytest.raises(DirectionError, match=r"width 32.*has 64"):
        fitted.for_model(load_model(tiny(d=64)), force=True)
    far = Direction(vector=torch.eye(32)[0], hook="blocks.9.hook_resid_post", method="", scale=1.0, norm=1.0, model="")
    with pytest.raises(DirectionError, match="closest"):
        far.for_model(load_model(tiny()), force=True)


def test_a_direction_fitted_on_arrays_alone_belongs_to_no_model(model):
    y = np.tile([0, 1], 10)
    alone = fit_direction(np.random.default_rng(0).normal(size=(20, 32)), y, hook="resid_post.1")
    assert alone.model == "" and alone.norm is None and alone.hook == "blocks.1.hook_resid_post"
    with pytest.raises(DirectionError, match="no known model"):
        alone.for_model(model)
    assert alone.for_model(model, force=True).norm == residual_norm(model, "resid_post.1")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "else"}, {"norm": -1.0}, {"norm": "big"}, {"scale": None}, {"seed": 1.5}, {"hook": 3},
        {"versions": [1]}, {"surprise": 1}, {"method": None},
    ],
)  # fmt: skip
def test_a_malformed_file_is_a_format_error(tmp_path, fitted, change):
    fitted.save(tmp_path / "d.safetensors")
    tensors, meta = load_tensors(tmp_path / "d.safetensors")
    save_tensors(tmp_path / "bad.safetensors", tensors, meta | change)
    with pytest.raises(FormatError):
        Direction.load(tmp_path / "bad.safetensors")


def test_vectors_that_are_not_unit_rows_are_format_errors_and_absent_files_missing(tmp_path, fitted):
    for vector in (torch.ones(32), torch.zeros(32), torch.eye(4)):
        save_tensors(tmp_path / "v.safetensors", {"vector": vector}, {"kind": "interp direction", **fitted.meta()})
        with pytest.raises(FormatError):
            Direction.load(tmp_path / "v.safetensors")
    with pytest.raises(MissingError):
        Direction.load(tmp_path / "none.safetensors")


def test_the_metadata_is_plain_json(fitted):
    assert json.loads(json.dumps(fitted.meta())) == fitted.meta()


def test_the_residual_norm_leaves_out_bos_and_the_first_token():
    hf = tiny(seed=4)
    with torch.no_grad():
        table = hf.get_input_embeddings().weight
        table /= table.norm(dim=1, keepdim=True)
        table *= 3.0
        table[:3] = 1e6  # pad, BOS, EOS
    assert residual_norm(hf, "embed") == pytest.approx(3.0, rel=1e-5)


def test_the_residual_norm_is_the_median_over_the_tokens_that_count(model):
    batch = module._norm_batch(model)
    with torch.no_grad():
        states = model.hf(batch.ids, output_hidden_states=True).hidden_states[1]
    assert not set(batch.ids.unique().tolist()) & {0, 1, 2}
    expected = states[:, 1:].norm(dim=-1).flatten().median()
    assert residual_norm(model, "resid_post.0") == pytest.approx(float(expected), rel=1e-3)


def test_the_residual_norm_is_measured_once_a_model_and_hook_point(model, monkeypatch):
    first = residual_norm(model, "resid_post.1")
    monkeypatch.setattr(module, "reading", None)
    assert residual_norm(model, "blocks.1.hook_out") == first
    with pytest.raises(TypeError):
        residual_norm(load_model(tiny(seed=11)), "resid_post.1")


def test_a_latents_direction_is_its_decoder_row(model):
    class Sae:
        W_dec = torch.diag(torch.arange(1.0, 33.0))

    found = latent_direction(Sae(), 4, "resid_post.0", model)
    assert torch.equal(found.vector, torch.eye(32)[4])
    assert found.scale == 5.0 and found.method == "sae latent 4" and found.norm == residual_norm(model, "resid_post.0")
    with pytest.raises(ValueError, match="not one of the 32"):
        latent_direction(Sae(), 32, "resid_post.0", model)

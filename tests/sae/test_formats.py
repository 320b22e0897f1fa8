"""The saved folder: exact, atomic, in SAELens's layout, and refused when it is something else."""

import json

import pytest
import torch
from safetensors.torch import load_file

import sae
from sae.archs.base import SAE
from sae.extras import MissingError
from sae.formats import FORMATS, load_sae, save_sae
from sae.io import FormatError, load_tensors, save_tensors

META = {"hook_name": "blocks.2.hook_resid_post", "model_name": "tiny"}


@pytest.fixture
def trained(world) -> SAE:
    x = sae.build("batchtopk", d_in=24, d_sae=64, k=3, seed=5, metadata=META)
    acts = world.sample(2048, seed=7)[0] * 37  # a training scale other than 1
    for _ in sae.train(x, acts.split(256), sae.TrainConfig(steps=8, batch_size=256, lr=1e-2)):
        pass
    return x


def test_a_saved_sae_comes_back_bit_for_bit(tmp_path, trained, world):
    save_sae(trained, tmp_path / "new" / "folder")
    back = load_sae(tmp_path / "new" / "folder")
    assert back.config == trained.config and back.config.metadata == META and type(back) is type(trained)
    acts = world.sample(100, seed=8)[0] * 37
    for ours, theirs in zip(back(acts), trained(acts), strict=True):
        assert torch.equal(ours, theirs)
    assert float(back.threshold.max()) > 0 and torch.equal(back.threshold, trained.threshold)


def test_an_sae_saved_in_the_middle_of_training_is_the_same_function(tmp_path, world):
    x = sae.build("batchtopk", d_in=24, d_sae=64, k=3, seed=5)
    acts = world.sample(512, seed=7)[0] * 37
    for step in sae.train(x, acts.split(64), sae.TrainConfig(steps=8, lr=1e-2)):
        if step.step == 3:
            assert float(x.scale) != 1
            save_sae(x, tmp_path)
            before = x(acts)
            break
    for ours, theirs in zip(load_sae(tmp_path)(acts), before, strict=True):
        assert torch.equal(ours, theirs)


def test_the_folder_is_what_saelens_reads(tmp_path, trained):
    save_sae(trained, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert set(cfg) == {"architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input",
                        "normalize_activations", "reshape_activations", "metadata"}  # fmt: skip
    assert cfg["architecture"] == "jumprelu" and cfg["dtype"] == "float32" and cfg["apply_b_dec_to_input"] is True
    version = [int(part) for part in cfg["metadata"]["sae_lens_version"].split(".")]
    assert version >= [6, 0, 0] and META.items() <= cfg["metadata"].items()
    shapes = {name: tuple(value.shape) for name, value in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (24, 64), "b_enc": (64,), "W_dec": (64, 24), "b_dec": (24,), "threshold": (64,)}


def test_the_file_alone_gives_the_function_by_the_formula_of_saelens(tmp_path, trained, world, oracles):
    save_sae(trained, tmp_path)
    w = load_file(tmp_path / "sae_weights.safetensors")
    acts = world.sample(20, seed=9)[0] * 37
    recon, latents = oracles.sae_forward(acts, w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], w["threshold"])
    out = trained(acts)
    torch.testing.assert_close(out.recon.detach().double(), torch.from_numpy(recon), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(out.latents.detach().double(), torch.from_numpy(latents), rtol=1e-4, atol=1e-3)


def edit(folder, **changes):
    cfg = json.loads((folder / "cfg.json").read_text())
    for key, value in changes.items():
        (cfg["metadata"] if key in ("k", "training_architecture") else cfg)[key] = value
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "topk"},
        {"apply_b_dec_to_input": False},
        {"normalize_activations": "layer_norm"},
        {"d_in": 64, "d_sae": 24},
        {"d_in": "24"},
        {"d_in": -24},
        {"d_sae": 10**12},
        {"k": 0},
        {"k": "3"},
        {"k": 4},
        {"training_architecture": "__class__"},
        {"training_architecture": ["batchtopk"]},
        {"metadata": None},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_gives_a_format_error(tmp_path, trained, changes):
    save_sae(trained, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(FormatError):
        load_sae(tmp_path)


@pytest.mark.parametrize("kind", ["key missing", "key too many", "shape", "half precision", "cut short", "no meta"])
def test_weights_that_do_not_fit_give_a_format_error(tmp_path, trained, kind):
    save_sae(trained, tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    tensors, meta = load_tensors(path)
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        if kind == "key missing":
            del tensors["b_dec"]
        if kind == "key too many":
            tensors["b_gate"] = torch.zeros(64)
        if kind == "shape":
            tensors["W_enc"] = tensors["W_enc"].t()
        if kind == "half precision":
            tensors["W_dec"] = tensors["W_dec"].half()
        if kind == "no meta":
            meta, tensors["threshold"] = {}, torch.zeros(63)
        save_tensors(path, tensors, meta)
    with pytest.raises(FormatError, match="sae_weights"):
        load_sae(tmp_path)


def test_what_is_not_there_is_missing(tmp_path, trained):
    with pytest.raises(MissingError, match="no file"):
        load_sae(tmp_path / "nowhere")
    save_sae(trained, tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(MissingError, match="sae_weights"):
        load_sae(tmp_path)


def test_an_unknown_format_names_the_closest(tmp_path, trained):
    with pytest.raises(ValueError, match="closest: saelens"):
        save_sae(trained, tmp_path, format="sealens")
    assert sorted(FORMATS) == ["saelens"]

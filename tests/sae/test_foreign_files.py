"""Files of others: read as their own packages run them, or refused with the reason."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae
from sae.archs.base import SAE
from sae.formats import load_sae, recognise, save_sae
from sae.io import FormatError

GOLDEN = Path(__file__).parent / "golden"


def a_topk() -> SAE:
    x = sae.build("topk", d_in=24, d_sae=64, k=3, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for value in x.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.2)
    return x


def rows(n: int = 50, width: int = 24) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(7)) * 2 + 0.5


def same(a: SAE, b: SAE, x: torch.Tensor) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(a(x), b(x), strict=True))


def golden_cases() -> list[Path]:
    return sorted(path.parent for path in GOLDEN.glob("*/*/expected"))


def weights_of(folder: Path) -> Path:
    """Return what a user would name: the folder itself, or the file or folder in a published layout."""
    if any(folder.glob("*.json")):
        return folder
    file = next(p for p in sorted(folder.rglob("*")) if p.suffix in (".npz", ".pt", ".pth", ".safetensors"))
    if file.name == "final.safetensors":
        return file.parent.parent
    return file.parent if (file.parent / "config.json").exists() else file


@pytest.mark.parametrize("folder", golden_cases(), ids=lambda p: f"{p.parent.name}-{p.name}")
def test_what_a_package_saved_computes_here_what_it_computed_there(folder):
    expected = load_file(folder / "expected")
    out = load_sae(weights_of(folder))(expected["x"])
    assert torch.equal(out.latents != 0, expected["latents"] != 0)
    torch.testing.assert_close(out.latents, expected["latents"], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(out.recon, expected["recon"], rtol=1e-5, atol=5e-6)
    assert bool(expected["latents"].any()) and not bool((expected["latents"] != 0).all())


def test_there_is_a_golden_file_for_every_package_and_each_is_small():
    assert {path.parent.name for path in golden_cases()} == {"saelens", "sparsify", "dictionary_learning"}
    assert len(golden_cases()) > 40
    assert max(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 20_000


@pytest.mark.parametrize(
    ("name", "format", "hook"),
    [
        ("saelens/standard", "saelens", "blocks.1.hook_resid_post"),
        ("saelens/transcoder", "saelens", "blocks.1.hook_mlp_in"),
        ("saelens/gemma_scope", "gemma_scope", "blocks.3.hook_resid_post"),
        ("saelens/gemma_scope_2+affine", "gemma_scope_2", "blocks.3.hook_mlp_in"),
        ("saelens/llama_scope", "openmoss", "blocks.3.hook_resid_post"),
        ("saelens/llama_scope_r1", "openmoss", "blocks.3.hook_resid_post"),
        ("saelens/qwen_scope", "qwen_scope", "blocks.3.hook_resid_post"),
        ("saelens/goodfire", "linear", "blocks.19.hook_resid_post"),
        ("saelens/deepseek_r1", "linear", "blocks.19.hook_resid_post"),
        ("saelens/mwhanna", "mwhanna", "blocks.3.mlp.hook_in"),
        ("sparsify/transcode+skip", "sparsify", None),
        ("dictionary_learning/JumpReluAutoEncoder", "dictionary_learning", "blocks.1.hook_resid_post"),
    ],
)
def test_a_file_is_recognised_and_its_hook_point_kept(name, format, hook):
    place = weights_of(GOLDEN / name)
    assert recognise(place) == format
    assert load_sae(place).config.metadata.get("hook_name") == hook


def test_a_matryoshka_checkpoint_of_saelens_keeps_its_levels_and_k():
    config = load_sae(GOLDEN / "saelens" / "matryoshka_batchtopk+checkpoint").config
    assert (config.arch, config.k, config.levels) == ("matryoshka", 4, (12, 24, 48))
    config = load_sae(GOLDEN / "dictionary_learning" / "MatryoshkaBatchTopKSAE").config
    assert (config.arch, config.k, config.levels) == ("matryoshka", 4, (12, 24, 48))


def test_a_configuration_from_before_version_6_is_understood(tmp_path):
    x = a_topk()
    save_sae(x, tmp_path, format="saelens")
    weights = tmp_path / "sae_weights.safetensors"
    save_file(load_file(weights), weights)  # as SAELens writes it, without our note of what belongs together
    old = {"d_in": 24, "d_sae": 64, "hook_point": "blocks.0.attn.hook_z", "model_name": "gpt2", "dtype": "float32",
           "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "normalize_activations": False}  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    back = load_sae(tmp_path)
    assert same(back, x, rows()) and back.config.arch == "topk"
    assert back.config.metadata == {
        "hook_name": "blocks.0.attn.hook_z", "model_name": "gpt2", "reshape_activations": "hook_z"
    }  # fmt: skip
    save_sae(back, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    assert load_sae(tmp_path / "again").config == back.config


def edited(folder: Path, tmp_path: Path, **changes) -> Path:
    """Copy a golden folder with another configuration."""
    for path in folder.iterdir():
        if path.is_file() and path.name != "expected":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    cfg = json.loads((tmp_path / "cfg.json").read_text()) | changes
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    return tmp_path


def test_scaled_activations_need_their_factor(tmp_path):
    source = GOLDEN / "saelens" / "standard+scaled"
    scale = json.loads((source / "activation_scaler.json").read_text())["scaling_factor"]
    folder = edited(source, tmp_path)
    (folder / "activation_scaler.json").unlink()
    with pytest.raises(FormatError, match="scale="):
        load_sae(folder)
    assert same(load_sae(folder, scale=scale), load_sae(source), rows(width=16))
    assert not same(load_sae(folder, scale=2 * scale), load_sae(source), rows(width=16))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": "matching_pursuit"}, "procedure of its own"),
        ({"architecture": "temporal"}, "procedure of its own"),
        ({"architecture": "topk"}, "k is None"),
        ({"normalize_activations": "constant_norm_rescale"}, "each token's norm"),
        ({"architecture": "gated"}, "missing: b_gate"),
        ({"apply_b_dec_to_input": "yes"}, "true or false"),
    ],
)
def test_what_saelens_has_and_we_cannot_read_is_refused_with_a_reason(tmp_path, changes, match):
    with pytest.raises(FormatError, match=match):
        load_sae(edited(GOLDEN / "saelens" / "standard", tmp_path, **changes))


def test_other_kinds_that_cannot_be_read_are_refused_with_a_reason(tmp_path):
    with pytest.raises(FormatError, match="groupmax"):
        load_sae(edited(GOLDEN / "sparsify" / "topk", tmp_path, activation="groupmax"))
    clt = tmp_path / "clt"
    clt.mkdir()
    save_file({"W_enc_0": torch.zeros(2, 2)}, clt / "W_enc_0.safetensors")
    with pytest.raises(FormatError, match="cross-layer"):
        load_sae(clt)
    temporal = tmp_path / "temporal"
    temporal.mkdir()
    (temporal / "conf.yaml").touch()
    (temporal / "latest_ckpt.safetensors").touch()
    with pytest.raises(FormatError, match="earlier tokens"):
        load_sae(temporal)


def test_an_unfinished_batchtopk_of_dictionary_learning_is_refused(tmp_path):
    source = GOLDEN / "dictionary_learning" / "BatchTopKSAE"
    state = torch.load(source / "ae.pt", weights_only=True)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save(state | {"threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="before it was measured"):
        load_sae(tmp_path)
    (tmp_path / "config.json").unlink()
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="dict_class=AutoEncoderTopK or BatchTopKSAE"):
        load_sae(tmp_path / "ae.pt")
    assert load_sae(tmp_path / "ae.pt", dict_class="BatchTopKSAE").config.arch == "batchtopk"


@pytest.mark.parametrize("kind", ["ReLU", "TopK"])
def test_a_file_of_openai_is_read_as_its_paper_says(tmp_path, kind):
    g = torch.Generator().manual_seed(1)
    state = {"pre_bias": torch.randn(6, generator=g), "latent_bias": torch.randn(16, generator=g) * 0.1,
             "encoder.weight": torch.randn(16, 6, generator=g), "decoder.weight": torch.randn(6, 16, generator=g),
             "stats_last_nonzero": torch.zeros(16, dtype=torch.long), "activation": kind,
             "activation_state_dict": {"k": 3, "postact_fn": "ReLU"} if kind == "TopK" else {}}  # fmt: skip
    torch.save(state, tmp_path / "sae.pt")
    x = torch.randn(9, 6, generator=g) * 3 + 1
    mean, deviation = (x.mean(1, keepdim=True), x.std(1, keepdim=True)) if kind == "TopK" else (0, 1)
    inner = (x - mean) / (deviation + 1e-5) if kind == "TopK" else x
    pre = (inner - state["pre_bias"]) @ state["encoder.weight"].t() + state["latent_bias"]
    if kind == "TopK":
        pre = pre * (pre >= pre.topk(3, dim=1).values[:, -1:])
    latents = pre.relu()
    recon = (latents @ state["decoder.weight"].t() + state["pre_bias"]) * deviation + mean
    out = load_sae(tmp_path / "sae.pt")(x)
    torch.testing.assert_close(out.latents, latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.recon, recon, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighed", [False, True])
def test_a_transcoder_of_openmoss_is_read_as_its_trainer_runs_it(tmp_path, weighed):
    g = torch.Generator().manual_seed(4)
    w = {"W_E": torch.randn(6, 16, generator=g), "b_E": torch.randn(16, generator=g) * 0.1,
         "W_D": torch.randn(16, 6, generator=g), "b_D": torch.randn(6, generator=g),
         "activation_function.log_jumprelu_threshold": torch.randn(16, generator=g) * 0.2}  # fmt: skip
    norms = {"blocks.1.ln2": torch.tensor(3.0), "blocks.1.mlp_out": torch.tensor(0.5)}
    save_file(
        w | {f"dataset_average_activation_norm.{hook}": norm for hook, norm in norms.items()},
        tmp_path / "sae_weights.safetensors",
    )
    cfg = {"sae_type": "transcoder", "d_model": 6, "act_fn": "jumprelu", "norm_activation": "dataset-wise",
           "hook_point_in": "blocks.1.ln2", "hook_point_out": "blocks.1.mlp_out",
           "sparsity_include_decoder_norm": weighed}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    x = torch.randn(40, 6, generator=g)
    pre = x * (6**0.5 / 3.0) @ w["W_E"] + w["b_E"]
    score = pre * w["W_D"].norm(dim=1) if weighed else pre
    latents = pre * (score > w["activation_function.log_jumprelu_threshold"].exp())
    recon = (latents @ w["W_D"] + w["b_D"]) / (6**0.5 / 0.5)
    model = load_sae(tmp_path)
    out = model(x)
    torch.testing.assert_close(out.latents, latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.recon, recon, rtol=1e-5, atol=1e-5)
    assert model.config.metadata == {"hook_name": "blocks.1.ln2", "hook_name_out": "blocks.1.mlp_out"}
    for bad in (
        {"use_glu_encoder": True},
        {"norm_activation": "token-wise"},
        {"sae_type": "clt"},
        {"act_fn": "batchtopk"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(cfg | bad))
        with pytest.raises(FormatError, match="readable"):
            load_sae(tmp_path)


def test_a_fine_tuned_gain_of_early_saelens_goes_into_the_decoder(tmp_path):
    folder = edited(GOLDEN / "saelens" / "standard", tmp_path)
    weights = load_file(folder / "sae_weights.safetensors")
    before, gain = load_sae(folder), torch.linspace(0.5, 2, 48)
    save_file(weights | {"scaling_factor": torch.ones(48)}, folder / "sae_weights.safetensors")
    assert same(load_sae(folder), before, rows(width=16))
    save_file(weights | {"scaling_factor": gain}, folder / "sae_weights.safetensors")
    x = rows(width=16)
    out = load_sae(folder)(x)
    assert torch.equal(out.latents, before(x).latents)
    wanted = (before(x).latents * gain) @ before.W_dec + before.b_dec
    torch.testing.assert_close(out.recon, wanted, rtol=1e-5, atol=1e-5)


def test_signed_latents_of_early_sparsify_are_kept_by_magnitude(tmp_path):
    folder = edited(GOLDEN / "sparsify" / "topk", tmp_path, signed=True)
    x = rows(width=16)
    out = load_sae(folder)(x)
    assert bool((out.latents < 0).any()) and bool(((out.latents != 0).sum(1) == 4).all())
    pre = load_sae(folder).pre_activations(x)
    lowest = pre.abs().topk(4, dim=1).values[:, -1:]
    assert torch.equal(out.latents, pre * (pre.abs() >= lowest))


def test_a_plain_table_is_read_with_what_it_does_not_say(tmp_path):
    x = a_topk()
    held = {"encoder.weight": x.W_enc.t(), "encoder.bias": x.b_enc, "decoder_weights": x.W_dec, "pre_bias": x.b_dec}
    file = tmp_path / "mine.safetensors"
    save_file({name: value.detach().contiguous() for name, value in held.items()}, file)
    with pytest.raises(FormatError, match="arch='relu' or 'topk'"):
        load_sae(file)
    assert same(load_sae(file, arch="topk", k=3), x, rows())
    np.savez(
        tmp_path / "mine.npz", a=x.W_enc.detach().numpy(), b=x.W_dec.detach().numpy(), b_enc=x.b_enc.detach().numpy()
    )
    with pytest.raises(FormatError, match="W_enc or W_dec: say which"):
        load_sae(tmp_path / "mine.npz", arch="topk", k=3)
    back = load_sae(tmp_path / "mine.npz", arch="topk", k=3, names={"W_enc": "a", "W_dec": "b"})
    assert torch.equal(back.W_dec, x.W_dec) and not bool(back.b_dec.any())


def test_orientation_is_asked_for_only_where_the_shapes_do_not_tell_it(tmp_path):
    g = torch.Generator().manual_seed(2)
    held = {"W_enc": torch.randn(8, 8, generator=g), "W_dec": torch.randn(8, 8, generator=g), "b_enc": torch.zeros(8)}
    save_file(held, tmp_path / "square.safetensors")
    with pytest.raises(FormatError, match="transpose=True"):
        load_sae(tmp_path / "square.safetensors", arch="relu")
    as_is = load_sae(tmp_path / "square.safetensors", arch="relu", transpose=False)
    turned = load_sae(tmp_path / "square.safetensors", arch="relu", transpose=(True, False))
    assert torch.equal(as_is.W_enc, held["W_enc"]) and torch.equal(turned.W_enc, held["W_enc"].t())
    assert torch.equal(turned.W_dec, held["W_dec"])


@pytest.mark.shared
def test_saes_of_a_stranger_load_with_the_plain_hint(shared_data):
    for width in (128, 512, 1024):
        file = shared_data / "saes" / "prestoj_tinystories_sae" / f"sae_{width}_4.pt"
        x = load_sae(file, format="plain", arch="topk", k=4)
        state = torch.load(file, weights_only=True, map_location="cpu")
        acts = torch.randn(20, 64, generator=torch.Generator().manual_seed(3)) + state["pre_bias"]
        pre = (acts - state["pre_bias"]) @ state["encoder_weights"] + state["encoder_bias"]
        kept = pre.relu() * (pre >= pre.topk(4, dim=1).values[:, -1:])
        assert (x.d_in, x.d_sae) == (64, width)
        torch.testing.assert_close(
            x(acts).recon, kept @ state["decoder_weights"] + state["pre_bias"], rtol=1e-4, atol=1e-4
        )

"""The saved folder: exact, atomic, in SAELens's layout; other formats where they can express an SAE."""

import json

import pytest
import torch
from safetensors.torch import load_file

import sae
from sae.archs import ARCHS
from sae.archs.base import SAE
from sae.extras import MissingError
from sae.formats import FORMATS, load_sae, save_sae
from sae.formats.files import load_state
from sae.io import FormatError, load_tensors, save_tensors

META = {"hook_name": "blocks.2.hook_resid_post", "model_name": "tiny"}
SHAPES = {"sae": {}, "transcoder": {"d_out": 20}, "skip": {"d_out": 20, "skip": True}, "crosscoder": {"n_sites": 3}}
THRESHOLDED = ("batchtopk", "matryoshka", "jumprelu")


def untrained(arch: str, **options) -> SAE:
    """Return an SAE none of whose weights is zero, or like another, and whose threshold cuts."""
    levels = (8, 24, 64) if arch.startswith("matryoshka") else ()
    x = sae.build(arch, d_in=24, d_sae=64, k=3, seed=5, metadata=META, levels=levels, **options)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, value in x.named_parameters():
            if name != "cut":
                value.add_(torch.randn(value.shape, generator=generator) * 0.2)
        if arch in THRESHOLDED:
            x.cut.fill_(0.3)
    return x


def rows(n: int = 50, width: int = 24) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(7)) * 2 + 0.5


def same(a: SAE, b: SAE, x: torch.Tensor) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(a(x), b(x), strict=True))


@pytest.fixture
def trained(world) -> SAE:
    x = sae.build("batchtopk", d_in=24, d_sae=64, k=3, seed=5, metadata=META)
    acts = world.sample(2048, seed=7)[0] * 37  # a training scale other than 1
    for _ in sae.train(x, acts.split(256), sae.TrainConfig(steps=8, batch_size=256, lr=1e-2)):
        pass
    return x


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_every_sae_comes_back_bit_for_bit_from_our_format(tmp_path, arch, form):
    x = untrained(arch, **SHAPES[form])
    save_sae(x, tmp_path / "new" / "folder")
    back = load_sae(tmp_path / "new" / "folder")
    assert back.config == x.config and type(back) is type(x) and back.config.metadata == META
    assert same(back, x, rows())
    assert not any(value.is_meta or value.dtype != torch.float32 for value in back.state_dict().values())
    assert {n for n, _ in back.named_parameters()} == {n for n, _ in x.named_parameters()}  # trainable as before


@pytest.mark.parametrize(
    "options", [{"apply_b_dec_to_input": False}, {"input_norm": "layer_norm"}, {"k": None}], ids=str
)
def test_every_field_of_the_configuration_is_kept(tmp_path, options):
    config = sae.config.SAEConfig(
        **({"arch": "jumprelu", "d_in": 24, "d_sae": 64, "k": 2.5, "metadata": META} | options)
    )
    x = sae.archs.make(config, seed=3)
    save_sae(x, tmp_path)
    assert load_sae(tmp_path).config == config
    assert same(load_sae(tmp_path), x, rows())


def test_a_trained_sae_comes_back_with_its_threshold(tmp_path, trained, world):
    save_sae(trained, tmp_path)
    back = load_sae(tmp_path)
    assert float(back.threshold.max()) > 0 and torch.equal(back.threshold, trained.threshold)
    assert same(back, trained, world.sample(100, seed=8)[0] * 37)


@pytest.mark.parametrize("format", ["native", "saelens", "dictionary_learning"])
def test_an_sae_saved_in_the_middle_of_training_is_the_same_function(tmp_path, world, format):
    x = sae.build("batchtopk", d_in=24, d_sae=64, k=3, seed=5)
    acts = world.sample(512, seed=7)[0] * 37
    for step in sae.train(x, acts.split(64), sae.TrainConfig(steps=8, lr=1e-2)):
        if step.step == 3:
            assert x.outward is not None and float(x.outward.scale) != 1
            save_sae(x, tmp_path, format=format)
            before = x(acts)
            break
    for ours, theirs in zip(load_sae(tmp_path)(acts), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


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


EXPRESSED = {
    "saelens": {arch: {"sae"} for arch in ARCHS}
    | {arch: {"sae", "transcoder", "skip"} for arch in ("relu", *THRESHOLDED)},
    "sparsify": {"topk": {"sae", "square"}, "matryoshka_topk": {"sae", "square"}},
    "dictionary_learning": {arch: {"sae"} for arch in ARCHS if arch != "abstopk"},
}


@pytest.mark.parametrize("form", [*SHAPES, "square"])
@pytest.mark.parametrize("arch", sorted(ARCHS))
@pytest.mark.parametrize("format", EXPRESSED)
def test_a_format_expresses_an_sae_or_says_why_not_and_writes_nothing(tmp_path, format, arch, form):
    x = untrained(arch, **SHAPES.get(form, {"d_out": 24, "skip": True}))
    known = EXPRESSED[format].get(arch, set())
    if form not in known and not (form == "square" and "skip" in known):
        with pytest.raises(ValueError, match=r"SAELens|sparsify|dictionary_learning"):
            save_sae(x, tmp_path / "new", format=format)
        assert not (tmp_path / "new").exists()
        return
    save_sae(x, tmp_path, format=format)
    out, back = x(rows()), load_sae(tmp_path)(rows())
    torch.testing.assert_close(back.recon, out.recon, rtol=1e-5, atol=1e-5)  # biases may have been moved
    assert torch.equal(back.latents != 0, out.latents != 0)


def test_our_extension_is_kept_where_saelens_reads_the_file(tmp_path):
    x = untrained("matryoshka")
    save_sae(x, tmp_path, format="saelens")
    assert load_sae(tmp_path).config == x.config
    assert load_sae(tmp_path, format="saelens").config.arch == "batchtopk"  # what is left without our table


def test_a_batchtopk_with_thresholds_of_its_own_becomes_a_jumprelu(tmp_path):
    x = untrained("batchtopk")
    x.cut[3] = 0.5
    save_sae(x, tmp_path, format="dictionary_learning")
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    torch.testing.assert_close(load_sae(tmp_path)(rows()).recon, x(rows()).recon, rtol=1e-5, atol=1e-5)


def edit(folder, **changes):
    cfg = json.loads((folder / "cfg.json").read_text())
    for key, value in changes.items():
        (cfg["metadata"]["interp"]["config"] if key in ("k", "arch", "levels", "skip") else cfg)[key] = value
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
        {"arch": "__class__"},
        {"arch": ["batchtopk"]},
        {"arch": "jumprelu"},
        {"levels": [1, 64]},
        {"skip": 1},
        {"metadata": {"interp": None}},
        {"metadata": None},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_gives_a_format_error(tmp_path, trained, changes):
    save_sae(trained, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(FormatError):
        load_sae(tmp_path)


@pytest.mark.parametrize("kind", ["key missing", "key too many", "shape", "whole numbers", "cut short", "no meta"])
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
        if kind == "whole numbers":
            tensors["W_dec"] = tensors["W_dec"].long()
        if kind == "no meta":
            meta, tensors["threshold"] = {}, torch.zeros(63)
        save_tensors(path, tensors, meta)
    with pytest.raises(FormatError, match="sae_weights"):
        load_sae(tmp_path)


@pytest.mark.parametrize("format", ["native", "sparsify", "dictionary_learning"])
def test_an_sae_in_half_precision_is_saved_in_full(tmp_path, format):
    x = untrained("topk").to(torch.bfloat16)
    save_sae(x, tmp_path, format=format)
    back = load_sae(tmp_path)
    assert back.W_dec.dtype == torch.float32 and torch.equal(back.W_dec, x.W_dec.float())
    file = next(path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".pt"))
    assert {v.dtype for v in load_state(file).values() if v.is_floating_point()} == {torch.float32}


def test_metadata_that_could_not_be_read_back_is_not_written(tmp_path, trained):
    for bad, match in (
        ({"interp": 1}, "written by save_sae"),
        ({"a": float("nan")}, "JSON"),
        ({"a": "x" * 10**6}, "at most"),
    ):
        x = sae.build("relu", d_in=4, d_sae=8, k=2, metadata=bad)
        with pytest.raises(ValueError, match=match):
            save_sae(x, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_what_is_not_there_is_missing(tmp_path, trained):
    with pytest.raises(MissingError, match="no file"):
        load_sae(tmp_path / "nowhere")
    save_sae(trained, tmp_path / "run")
    assert same(load_sae(tmp_path, subfolder="run"), load_sae(tmp_path / "run" / "cfg.json"), rows())
    with pytest.raises(FormatError, match="subfolder='run'"):
        load_sae(tmp_path)
    with pytest.raises(ValueError, match="leads out"):
        load_sae(tmp_path / "run", subfolder="../..")
    (tmp_path / "run" / "sae_weights.safetensors").unlink()
    with pytest.raises(MissingError, match="sae_weights"):
        load_sae(tmp_path / "run")


def test_an_unknown_format_or_hint_names_what_there_is(tmp_path, trained):
    with pytest.raises(ValueError, match="closest: saelens"):
        save_sae(trained, tmp_path, format="sealens")
    with pytest.raises(ValueError, match="closest: openai"):
        load_sae(tmp_path, format="openapi")
    with pytest.raises(ValueError, match="writable: native, saelens, sparsify, dictionary_learning"):
        save_sae(trained, tmp_path, format="gemma_scope")
    save_sae(trained, tmp_path)
    with pytest.raises(ValueError, match="takes no hint 'kk'"):
        load_sae(tmp_path, kk=3)
    for name, module in FORMATS.items():
        assert callable(module.detect) and callable(module.load) and isinstance(module.FILES, tuple), name

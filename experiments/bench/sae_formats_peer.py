"""Runs in the environment of one SAE package: loads what we wrote and tells its outputs, or makes what we are to load.

python sae_formats_peer.py PEER JOBS.json: a list of {"do": "load" | "make" | "publish", "folder", "name"}. For each,
the package's own latents and reconstruction of the rows in x.safetensors beside JOBS.json go to
<folder>/peer.safetensors, and what went wrong instead to <folder>/peer_error.txt.
"""

import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.modules["torchvision"] = None  # built for another torch it breaks the import of transformers

D_IN, D_SAE, D_OUT, K, STEPS = 16, 48, 12, 4, 40
AVERAGE_NORM = 7.0  # of the activations, in files that say it


def saelens_load(folder):
    from sae_lens import SAE

    model = SAE.load_from_disk(str(folder))
    return lambda x: (model.encode(x), model(x))


def saelens_make(name, folder, x):
    """Train some steps (or, for what it cannot train, fill with random weights), and save as SAELens does."""
    from sae_lens.registry import get_sae_class, get_sae_training_class

    kind, _, variant = name.partition("+")
    options = {}
    if variant == "layer_norm":
        options["normalize_activations"] = "layer_norm"
    if variant == "scaled":
        options["normalize_activations"] = "expected_average_only_in"
    if variant == "whitened":
        options["normalize_activations"] = "covariance_whitening"
    if "transcoder" in kind:
        cls, cfg = get_sae_class(kind)
        model = cls(cfg(d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, apply_b_dec_to_input=False, **options))
        _randomise(model)
        model.cfg.metadata.hook_name = "blocks.1.hook_mlp_in"
        model.save_model(folder)
        return saelens_load(folder)
    if "topk" in kind:
        options |= {"k": K}
    if kind == "matryoshka_batchtopk":
        options["matryoshka_widths"] = [12, 24, D_SAE]
    if kind == "jumprelu":
        options["jumprelu_init_threshold"] = 0.05
    cls, cfg = get_sae_training_class(kind)
    config = cfg(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=variant != "no_b_dec", **options)
    config.metadata.hook_name, config.metadata.model_name = "blocks.1.hook_resid_post", "tiny"
    model = cls(config)
    scale = _scaler(variant, x, folder)
    _saelens_steps(model, scale(x))
    if variant in ("scaled", "whitened", "checkpoint"):
        model.save_model(folder)  # a training checkpoint, nothing folded
        _saelens_fold(model, folder, variant)
        inner = folder / "inference"
        model.save_inference_model(inner)
        return saelens_load(inner)
    model.save_inference_model(folder)
    return saelens_load(folder)


def _scaler(variant, x, folder):
    from sae_lens.training.activation_scaler import ActivationScaler

    scaler = ActivationScaler()
    if variant == "scaled":
        scaler.scaling_factor = float(D_IN**0.5 / x.norm(dim=-1).mean())
    if variant == "whitened":
        scaler.estimate_whitening(d_in=D_IN, data_provider=iter([x] * 8), n_batches_for_norm_estimate=4)
    if variant in ("scaled", "whitened"):
        folder.mkdir(parents=True, exist_ok=True)
        scaler.save(str(folder / "activation_scaler.json"))
    return scaler.scale


def _saelens_fold(model, folder, variant):
    if variant == "scaled":
        model.fold_activation_norm_scaling_factor(
            json.loads((folder / "activation_scaler.json").read_text())["scaling_factor"]
        )
    if variant == "whitened":
        held = load_file(folder / "activation_whitening.safetensors")
        model.fold_activation_whitening(held["mean"], held["matrix"], held["inverse_matrix"])


def _saelens_steps(model, x):
    from sae_lens.saes.sae import TrainStepInput

    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    names = model.get_coefficients()
    values = {name: getattr(value, "value", value) * 1.0 for name, value in names.items()}
    for step in range(STEPS):
        out = model.training_forward_pass(
            TrainStepInput(
                sae_in=x, coefficients=values, dead_neuron_mask=None, n_training_steps=step, is_logging_step=False
            )
        )
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()


def _randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        if hasattr(model, "threshold"):
            model.threshold.abs_()


def saelens_publish(name, folder, x):
    """Make a file in a publisher's layout, and run SAELens's own reader of it on the local copy."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.registry import get_sae_class

    repository, inside, loader, extra = PUBLISHED[name](folder)
    root = folder / repository
    loaders.hf_hub_download = lambda repo_id, filename, subfolder=None, **_: _local(root, filename, subfolder)
    loaders.get_safetensors_tensor_shapes = lambda repo_id, filename: {
        key: list(value.shape) for key, value in load_file(root / filename).items()
    }
    loaders.QWEN_SCOPE_MODEL_INFO["Qwen3-1.7B-Base"] = ("Qwen/Qwen3-1.7B-Base", D_IN)
    options = {"dtype": "float32", "d_in": D_IN, "d_sae": D_SAE}
    read = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader]
    cfg, state, _ = read(repository, inside, "cpu", False, options | extra)
    cfg = loaders.handle_config_defaulting(cfg)
    cls, config = get_sae_class(cfg["architecture"])
    model = cls(config.from_dict(cfg))
    model.load_state_dict({key: value.contiguous() for key, value in state.items()})
    if cfg["normalize_activations"] == "expected_average_only_in":
        model.fold_activation_norm_scaling_factor(D_IN**0.5 / AVERAGE_NORM)
    return lambda x: (model.encode(x), model(x))


def _local(root, filename, subfolder):
    from huggingface_hub.errors import EntryNotFoundError

    path = root / (subfolder or "") / filename
    if not path.exists():
        raise EntryNotFoundError(str(path))
    return str(path)


def _random(d_out=D_IN):
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, d_out), "b_enc": (D_SAE,), "b_dec": (d_out,)}
    weights = {key: torch.randn(shape) * 0.3 for key, shape in shapes.items()}
    return weights | {"threshold": torch.rand(D_SAE)}


def _save(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    if path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def _gemma(folder, repository="google/gemma-scope-2b-pt-res", inside="layer_3/width_4k/average_l0_10", kind="gemma_2"):
    _save(folder / repository / inside / "params.npz", _random())
    return repository, inside, kind, {"d_out": D_IN} if "transcoder" in kind else {}


def _gemma_3(folder, inside="resid_post/layer_3_width_16k_l0_small", d_out=D_IN, skip=False):
    repository = "google/gemma-scope-2-1b-pt"
    tensors = {key.replace("W_", "w_"): value for key, value in _random(d_out).items()}
    if skip:
        tensors["affine_skip_connection"] = torch.randn(D_IN, d_out) * 0.3
    _save(folder / repository / inside / "params.safetensors", tensors)
    table = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.3.output"}
    if d_out != D_IN:
        table |= {"affine_connection": skip, "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output"}
    (folder / repository / inside / "config.json").write_text(json.dumps(table))
    return repository, inside, "gemma_3", {}


def _linear(prefixes=("encoder", "decoder"), names=("weight", "bias")):
    held = _random()
    return {
        f"{prefixes[0]}.{names[0]}": held["W_enc"].t(),
        f"{prefixes[0]}.{names[1]}": held["b_enc"],
        f"{prefixes[1]}.{names[0]}": held["W_dec"].t(),
        f"{prefixes[1]}.{names[1]}": held["b_dec"],
    }


def _llama(folder):
    repository, inside = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L3R-8x"
    _save(folder / repository / inside / "checkpoints" / "final.safetensors", _linear())
    table = {"d_model": D_IN, "d_sae": D_SAE, "jump_relu_threshold": 0.4, "hook_point_in": "blocks.3.hook_resid_post"}
    table |= {"hook_point_out": "blocks.3.hook_resid_post", "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    table |= {"dataset_average_activation_norm": {"in": AVERAGE_NORM, "out": AVERAGE_NORM}}
    (folder / repository / inside / "hyperparams.json").write_text(json.dumps(table))
    return repository, inside, "llama_scope", {}


def _llama_r1(folder):
    repository, inside, hook = "fnlp/Llama-Scope-R1-Distill", "400M/L3R", "blocks.3.hook_resid_post"
    tensors = _linear() | {"log_jumprelu_threshold": torch.randn(D_SAE) * 0.3 - 1}
    norms = {f"dataset_average_activation_norm.{hook}": torch.tensor(AVERAGE_NORM)}
    _save(folder / repository / inside / "sae_weights.safetensors", tensors | norms)
    table = {"sae_type": "sae", "d_model": D_IN, "expansion_factor": 3, "act_fn": "jumprelu", "hook_point_in": hook}
    table |= {"hook_point_out": hook, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False}
    (folder / repository / inside / "config.json").write_text(json.dumps(table))
    return repository, inside, "llama_scope_r1_distill", {}


def _qwen(folder):
    repository, held = f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", _random()
    tensors = {key: held[key].t() if held[key].ndim == 2 else held[key] for key in ("W_enc", "W_dec", "b_enc", "b_dec")}
    _save(folder / repository / "layer3.sae.pt", tensors)
    return repository, "layer3.sae.pt", "qwen_scope", {}


def _file(folder, repository, inside, kind, tensors):
    _save(folder / repository / inside, tensors)
    return repository, inside, kind, {}


def _mwhanna(folder):
    held = _random()
    tensors = {"W_enc": held["W_enc"].t()} | {key: held[key] for key in ("W_dec", "b_enc", "b_dec")}
    repository = "mwhanna/qwen3-4b-transcoders"
    for file, table in (
        ("wandb-config.yaml", {"d_model": {"value": D_IN}, "d_feature": {"value": D_SAE}, "batch_size": {"value": 8}}),
        ("config.yaml", {"model_name": "Qwen/Qwen3-4B"}),
    ):
        _save(folder / repository / "layer_3.safetensors", tensors)
        (folder / repository / file).write_text(json.dumps(table))
    return repository, "layer_3.safetensors", "mwhanna_transcoder", {}


PUBLISHED = {
    "gemma_scope": _gemma,
    "gemma_scope+embedding": lambda f: _gemma(f, inside="embedding/width_4k/average_l0_10"),
    "gemma_scope+transcoder": lambda f: _gemma(f, "google/gemma-scope-2b-pt-transcoders", kind="gemma_2_transcoder"),
    "gemma_scope_2": _gemma_3,
    "gemma_scope_2+transcoder": lambda f: _gemma_3(f, "transcoder/layer_3_width_16k_l0_small", D_OUT),
    "gemma_scope_2+affine": lambda f: _gemma_3(f, "transcoder/layer_3_width_16k_l0_small_affine", D_OUT, True),
    "llama_scope": _llama,
    "llama_scope_r1": _llama_r1,
    "qwen_scope": _qwen,
    "goodfire": lambda f: _file(
        f,
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        "goodfire",
        _linear(("encoder_linear", "decoder_linear")),
    ),
    "deepseek_r1": lambda f: _file(f, "qresearch/R1-SAE-l19", "R1-SAE-l19.pt", "deepseek_r1", _linear()),
    "mwhanna": _mwhanna,
}


def sparsify_load(folder):
    from sparsify import SparseCoder

    model = SparseCoder.load_from_disk(folder)

    def run(x):
        top = model.encode(x)
        latents = torch.zeros(len(x), model.num_latents)
        latents.scatter_(1, top.top_indices, top.top_acts)
        return latents, model(x).sae_out

    return run


def sparsify_make(name, folder, x):
    from sparsify import SparseCoder, SparseCoderConfig

    transcode, skip = "transcode" in name, "skip" in name
    config = SparseCoderConfig(num_latents=D_SAE, k=K, transcode=transcode, skip_connection=skip)
    model = SparseCoder(D_IN, config)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    target = x.roll(1, dims=1) if transcode else x
    for _ in range(STEPS):
        optimiser.zero_grad()
        model(x, target).fvu.backward()
        optimiser.step()
    model.save_to_disk(folder)
    return sparsify_load(folder)


def dictionary_learning_load(folder):
    from dictionary_learning.utils import load_dictionary

    # its load_dictionary normalises the rows of an AutoEncoder; rows of ours have length one to rounding already
    model, _ = load_dictionary(str(folder), "cpu")
    return lambda x: (model.encode(x), model(x))


def dictionary_learning_make(name, folder, x):
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    base = {"steps": STEPS, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 1, "lm_name": "tiny", "device": "cpu"}
    base |= {"warmup_steps": 2, "lr": 1e-2}
    topk = {"k": K, "threshold_start_step": 5}
    if name == "AutoEncoderNew":  # no trainer of this version makes one
        trainer = SimpleNamespace(ae=AutoEncoderNew(D_IN, D_SAE), config={"dict_class": name, "layer": 1})
        _randomise(trainer.ae)
    else:
        makers = {
            "AutoEncoder": lambda: StandardTrainer(**base, sparsity_warmup_steps=2),
            "GatedAutoEncoder": lambda: GatedSAETrainer(**base, sparsity_warmup_steps=2),
            "AutoEncoderTopK": lambda: TopKTrainer(**base, **topk),
            "BatchTopKSAE": lambda: BatchTopKTrainer(**base, **topk),
            "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKTrainer(
                **base, **topk, group_fractions=[0.25, 0.25, 0.5]
            ),
            "JumpReluAutoEncoder": lambda: JumpReluTrainer(**base, sparsity_warmup_steps=2, target_l0=6.0),
        }
        trainer = makers[name]()
        for step in range(STEPS):
            trainer.update(step, x)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.cpu() for name, value in trainer.ae.state_dict().items()}, folder / "ae.pt")
    table = {"trainer": trainer.config, "buffer": {"d_submodule": D_IN, "io": "out", "ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(table, default=str))
    return lambda x: (trainer.ae.encode(x), trainer.ae(x))


def main(peer, jobs_file):
    torch.set_num_threads(1)
    jobs_file = Path(jobs_file)
    x = load_file(jobs_file.parent / "x.safetensors")["x"]
    for job in json.loads(jobs_file.read_text()):
        folder = Path(job["folder"])
        try:
            torch.manual_seed(3)
            if job["do"] == "load":
                run = globals()[f"{peer}_load"](folder)
            else:
                run = globals()[f"{peer}_{job['do']}"](job["name"], folder, x)
            with torch.no_grad():
                latents, recon = run(x)
            dense = latents.to_dense() if latents.is_sparse else latents
            save_file({"latents": dense.detach().clone(), "recon": recon.detach().clone()}, folder / "peer.safetensors")
        except Exception:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "peer_error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(*sys.argv[1:])

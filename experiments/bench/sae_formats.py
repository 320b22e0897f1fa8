"""Which SAEs pass between us and the real packages, and how exactly.

For each package and architecture: what we write, it loads and runs; what it trains (40 steps) and saves, we load and
run. The figure is the largest difference in latents and reconstruction on 256 rows, float32; environments are made by
sae_peers.sh.

python experiments/bench/sae_formats.py [--golden]: prints the table and writes sae_formats.json; with --golden the
files that the packages made, and their own outputs, become tests/sae/golden/.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import sae
from sae.archs import ARCHS
from sae.synthetic import planted

HERE = Path(__file__).resolve().parent
D_IN, D_SAE, D_OUT, K = 16, 48, 12, 4

MADE = {
    "saelens": [
        "standard", "gated", "topk", "abstopk", "jumprelu", "batchtopk", "matryoshka_batchtopk", "transcoder",
        "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", "standard+layer_norm",
        "standard+no_b_dec", "standard+scaled", "standard+whitened", "jumprelu+scaled", "topk+checkpoint",
        "batchtopk+checkpoint", "batchtopk+scaled", "matryoshka_batchtopk+checkpoint",
    ],
    "sparsify": ["topk", "topk+skip", "transcode", "transcode+skip"],
    "dictionary_learning": [
        "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder",
    ],
}  # fmt: skip
# layouts of published SAEs: SAELens's reader of them against ours, on files made for it
PUBLISHED = [
    "gemma_scope", "gemma_scope+embedding", "gemma_scope+transcoder", "gemma_scope_2", "gemma_scope_2+transcoder",
    "gemma_scope_2+affine", "llama_scope", "llama_scope_r1", "qwen_scope", "goodfire", "deepseek_r1", "mwhanna",
]  # fmt: skip


def rows() -> torch.Tensor:
    """Return 256 planted rows that are nowhere near the origin."""
    return planted(d_in=D_IN, n_features=32, active=3, seed=11).sample(256, seed=12)[0] * 2 + 0.5


def ours(x: torch.Tensor) -> dict[str, sae.SAE]:
    """Return one trained SAE of each architecture, and transcoders and a crosscoder."""
    made = {}
    cases = [(arch, arch, {}) for arch in ARCHS]
    cases += [(f"{arch} transcoder", arch, {"d_out": D_OUT}) for arch in ("relu", "jumprelu", "batchtopk", "topk")]
    cases += [(f"{arch} skip", arch, {"d_out": D_OUT, "skip": True}) for arch in ("relu", "batchtopk")]
    cases += [("topk square skip", "topk", {"d_out": D_IN, "skip": True}), ("crosscoder", "batchtopk", {"n_sites": 2})]
    for name, arch, options in cases:
        model = sae.build(arch, d_in=D_IN, d_sae=D_SAE, k=K, seed=21, metadata={"hook_name": "blocks.1.x"}, **options)
        made[name] = fill(model, x)
    return made


def fill(model: sae.SAE, x: torch.Tensor) -> sae.SAE:
    """Give an SAE weights that are none of them zero or alike, and a threshold that cuts."""
    generator = torch.Generator().manual_seed(31)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name != "cut":
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)
        model.dec.div_(model.dec.norm(dim=1, keepdim=True))
        if model.calibrated:
            model.calibrate([x])
    return model


def published(folder: Path) -> Path:
    """Return what a user would name in a published repository: a file of weights, or the folder around it."""
    kinds = (".npz", ".pt", ".pth", ".safetensors")
    weights = next(p for p in sorted(folder.rglob("*")) if p.suffix in kinds and p.name != "peer.safetensors")
    if weights.name == "final.safetensors":
        return weights.parent.parent
    return weights.parent if (weights.parent / "config.json").exists() else weights


def exchange(peer: str, jobs: list[dict], folder: Path) -> None:
    """Run jobs in the environment of a peer."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    python = HERE / ".venvs" / peer / "bin" / "python"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1"}
    command = [str(python), str(HERE / "sae_formats_peer.py"), peer, str(folder / "jobs.json")]
    subprocess.run(command, check=True, env=environment, cwd=folder)


def difference(model: sae.SAE, folder: Path, x: torch.Tensor) -> dict:
    """Return the largest differences between an SAE of ours and what the peer says of the same files."""
    if not (folder / "peer.safetensors").exists():
        return {"error": (folder / "peer_error.txt").read_text().strip().splitlines()[-1][:200]}
    theirs = load_file(folder / "peer.safetensors")
    with torch.no_grad():
        out = model(x)
    return {
        "latents": float((out.latents - theirs["latents"]).abs().max()),
        "recon": float((out.recon - theirs["recon"]).abs().max()),
        "l0": float((theirs["latents"] != 0).sum(1).float().mean()),
        "same_active": bool(((out.latents != 0) == (theirs["latents"] != 0)).all()),
    }


def compare(peer: str, folder: Path) -> tuple[dict, dict]:
    """Return, of a peer, how what we wrote and how what it made came over."""
    folder.mkdir(parents=True, exist_ok=True)
    x = rows()
    save_file({"x": x}, folder / "x.safetensors")
    models, written, jobs = ours(x), {}, []
    for name, model in models.items():
        place = folder / "ours" / name.replace(" ", "_")
        try:
            sae.save_sae(model, place, format=peer)
            jobs.append({"do": "load", "folder": str(place), "name": name})
        except ValueError as error:
            written[name] = {"refused": str(error)[:100]}
    jobs += [{"do": "make", "folder": str(folder / "theirs" / name), "name": name} for name in MADE[peer]]
    others = PUBLISHED if peer == "saelens" else []
    jobs += [{"do": "publish", "folder": str(folder / "theirs" / name), "name": name} for name in others]
    exchange(peer, jobs, folder)
    for job in jobs:
        if job["do"] == "load":
            written[job["name"]] = difference(models[job["name"]], Path(job["folder"]), x)
    made = {}
    for name in [*MADE[peer], *others]:
        place = folder / "theirs" / name
        if (place / "peer_error.txt").exists():
            made[name] = difference(next(iter(models.values())), place, x)
            continue
        model = sae.load_sae(place if name in MADE[peer] else published(place))
        made[name] = {"arch": model.config.arch} | difference(model, place, x)
    return written, made


def keep_golden(peer: str, folder: Path) -> None:
    """Keep what a peer made, small, as files for tests."""
    target = HERE.parents[1] / "tests" / "sae" / "golden" / peer
    shutil.rmtree(target, ignore_errors=True)
    x = load_file(folder / "x.safetensors")["x"][:8]
    for name in [*MADE[peer], *(PUBLISHED if peer == "saelens" else [])]:
        place = folder / "theirs" / name
        shutil.copytree(place, target / name, ignore=shutil.ignore_patterns("inference", "peer.safetensors"))
        theirs = load_file(place / "peer.safetensors")
        save_file({"x": x} | {key: value[:8].clone() for key, value in theirs.items()}, target / name / "expected")


def line(peer: str, title: str, name: str, cell: dict) -> str:
    """Return one line of the printed table."""
    if "latents" not in cell:
        return f"{peer:20} {title:14} {name:32} {cell.get('refused') or cell['error']}"
    note = "" if cell["same_active"] else "OTHER LATENTS ACTIVE"
    kind = cell.get("arch", "")
    numbers = f"{cell['latents']:9.2g} {cell['recon']:9.2g} {cell['l0']:7.2f}"
    return f"{peer:20} {title:14} {name:32} {numbers} {kind:12} {note}"


def main() -> None:
    torch.set_num_threads(1)
    result = {}
    print(f"{'package':20} {'direction':14} {'architecture':32} {'latents':>9} {'recon':>9} {'L0':>7} read as")
    with tempfile.TemporaryDirectory() as temporary:
        for peer in MADE:
            written, made = compare(peer, Path(temporary) / peer)
            result[peer] = {"written by us": written, "made by it": made}
            for title, table in result[peer].items():
                for name, cell in table.items():
                    print(line(peer, title, name, cell))
            if "--golden" in sys.argv:
                keep_golden(peer, Path(temporary) / peer)
    (HERE / "sae_formats.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

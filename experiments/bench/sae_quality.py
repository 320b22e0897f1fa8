"""Compare what trainers make of the same data with the same budget -> sae_quality.json.

Every contender is trained in its own environment (sae_peers.sh) on the same rows, with its own defaults but for what is
given here, and saves plain weights; one function then scores all of them on rows that none has seen. Two budgets: the
same number of steps, and (--wall) the seconds that interp took for them.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from scipy import stats
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import timing

from sae.synthetic import mcc, mmcs, planted

HERE = timing.HERE
CONTENDERS = [
    ("interp", "batchtopk"), ("interp", "topk"), ("sparsify", "topk"), ("dictionary_learning", "batchtopk"),
    ("dictionary_learning", "topk"), ("saelens", "batchtopk"), ("saelens", "topk"),
]  # fmt: skip
HELD_OUT = 16_384
SCORES = ("fve", "l0", "dead", "fve_at_k", "mmcs", "mcc", "seconds")


@dataclass(frozen=True, kw_only=True)
class Data:
    """A file of activations: the first `rows` are trained on, then come calibration and test rows."""

    path: Path
    rows: int
    calibration: Tensor
    test: Tensor
    features: Tensor | None
    """True directions, where they are known."""


def python(peer: str) -> str:
    """Return the interpreter of a contender's environment."""
    return sys.executable if peer == "interp" else str(HERE / ".venvs" / peer / "bin" / "python")


def child(peer: str, script: str, arguments: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Run a script in a contender's environment, and return the JSON that it prints last."""
    command = [python(peer), str(HERE / script), "--peer", peer]
    for name, value in arguments.items():
        command += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    quiet = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet}, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def planted_data(folder: Path, seed: int, tokens: int) -> Data:
    """Write planted activations to a file: 512 features in 128 dimensions, 8 of them on a token."""
    world = planted(d_in=128, n_features=512, active=8, exponent=0.5, spread=0.5, offset=0.3, noise=0.02, seed=seed)
    path = folder / f"planted{seed}.npy"
    rows = open_memmap(path, mode="w+", dtype=np.float32, shape=(tokens, 128))
    for start, batch in zip(range(0, tokens, 65_536), world.batches(65_536, seed=seed + 1), strict=False):
        rows[start : start + 65_536] = batch[: tokens - start].numpy()
    rows.flush()
    calibration, test = (world.sample(HELD_OUT, seed=seed + apart)[0] for apart in (500_001, 500_002))
    return Data(path=path, rows=tokens, calibration=calibration, test=test, features=world.features)


def file_data(path: Path) -> Data:
    """Take the last rows of a file for calibration and test, at most a tenth of it."""
    rows = np.load(path, mmap_mode="r")
    held = min(HELD_OUT, len(rows) // 20)
    parts = (rows[len(rows) - 2 * held : len(rows) - held], rows[len(rows) - held :])
    calibration, test = (torch.from_numpy(part.astype(np.float32)) for part in parts)
    return Data(path=path, rows=len(rows) - 2 * held, calibration=calibration, test=test, features=None)


class Weights:
    """The inference form of an SAE that any contender saved."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path))
        self.kind, self.k = str(self.arrays["kind"]), int(self.arrays["k"])
        self.threshold = torch.from_numpy(np.asarray(self.arrays["threshold"], dtype=np.float32))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name].astype(np.float32))

    def pre(self, x: Tensor) -> Tensor:
        """Return the pre-activations of the gate."""
        centred = x - self["b_dec"] if bool(self.arrays["centred"]) else x
        return centred @ self["W_enc"] + self["b_enc"]

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents."""
        pre = self.pre(x)
        if self.kind == "gated":
            size = self["r_mag"].exp() * (pre - self["b_enc"]) + self["b_mag"]
            return size.relu() * (pre > 0)
        if self.kind == "topk":
            top = pre.relu().topk(self.k, dim=1)
            return torch.zeros_like(pre).scatter_(1, top.indices, top.values)
        return pre.relu() * (pre > self.threshold) if self.kind == "threshold" else pre.relu()

    def calibrate(self, x: Tensor) -> None:
        """Set one threshold for all latents, so that k of them are active on a token of x on average."""
        values = torch.cat([part[part > 0] for part in map(self.pre, x.split(4096))])
        n_kept = self.k * len(x)
        self.threshold = torch.tensor(0.0)
        if len(values) > n_kept:
            self.threshold = torch.kthvalue(values, len(values) - n_kept).values


def score(weights: Weights, x: Tensor) -> dict[str, float]:
    """Return FVE (1 - summed squared error / summed squared distance from the mean), L0, share that never fires."""
    error, active = 0.0, 0
    fired = torch.zeros(weights["b_enc"].shape, dtype=torch.bool)
    for part in x.split(4096):
        latents = weights.encode(part)
        error += float((part - latents @ weights["W_dec"] - weights["b_dec"]).double().square().sum())
        active += int((latents > 0).sum())
        fired |= (latents > 0).any(0)
    total = float((x.double() - x.double().mean(0)).square().sum())
    return {"fve": 1 - error / total, "l0": active / len(x), "dead": 1 - float(fired.float().mean())}


def evaluate(path: Path, data: Data) -> dict[str, float]:
    """Score what a contender saved, as it would be used, and with a threshold made for L0 = k (fve_at_k).

    Where the package has set no threshold yet, the made one is all there is.
    """
    weights = Weights(path)
    unset = bool(weights.threshold.isnan().any())
    result = {} if unset else score(weights, data.test)
    one = weights.kind == "topk" or str(weights.arrays["arch"]) in ("batchtopk", "matryoshka")
    if one:  # those with a k and no threshold of their own for every latent
        if weights.kind == "threshold":
            weights.calibrate(data.calibration)
        matched = score(weights, data.test)
        result |= {"fve_at_k": matched["fve"]} if not unset else {**matched, "fve_at_k": matched["fve"]}
    if data.features is not None:
        # dead latents have a direction too: at a width of two, chance counts for little, and it does so for all
        result |= {"mmcs": mmcs(weights["W_dec"], data.features), "mcc": mcc(weights["W_dec"], data.features)}
    return result


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % t-interval (nan for one value)."""
    if len(values) < 2:
        return values[0], math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(half)


def contest(args: argparse.Namespace, data: Data, folder: Path, seed: int, k: int) -> list[dict[str, Any]]:
    """Train and score every contender once, for each budget."""
    runs, spent = [], {}
    for budget in ("steps", "wall") if args.wall else ("steps",):
        for peer, arch in args.contenders:
            steps = args.steps
            if budget == "wall":
                steps = max(20, round(args.steps * spent["interp", "batchtopk"] / spent[peer, arch]))
            out = folder / f"{peer}_{arch}.npz"
            # planted data and models never share a seed
            settings = {
                "arch": arch, "data": data.path, "rows": data.rows, "out": out, "d_sae": args.d_sae, "k": k,
                "steps": steps, "batch": args.batch, "lr": args.lr, "seed": 1000 + seed, "threads": args.threads,
            }  # fmt: skip
            report = child(peer, "sae_peer_train.py", settings, args.threads)
            spent.setdefault((peer, arch), report["seconds"])
            run = {"peer": peer, "arch": arch, "k": k, "budget": budget, "steps": steps, "seed": seed}
            run |= {"seconds": report["seconds"], **evaluate(out, data), "versions": report["versions"]}
            print({name: round(v, 4) if isinstance(v, float) else v for name, v in run.items()}, flush=True)
            runs.append(run)
    return runs


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a contender, k and budget: means over seeds and half intervals."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["budget"], run["k"], run["peer"], run["arch"]), []).append(run)
    rows = []
    for (budget, k, peer, arch), group in groups.items():
        row: dict[str, Any] = {"budget": budget, "k": k, "peer": peer, "arch": arch, "seeds": len(group)}
        row["steps"] = statistics.fmean(run["steps"] for run in group)
        for name in SCORES:
            if all(name in run for run in group):
                mean, half = interval([run[name] for run in group])
                row[name] = mean
                row[f"±{name}"] = None if math.isnan(half) else half
        rows.append(row)
    return rows


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with mean and interval in one cell, for a table."""
    out = []
    for row in rows:
        cells = {name: row[name] for name in ("budget", "k", "peer", "arch", "seeds", "steps")}
        for name in SCORES:
            if name in row:
                half = row[f"±{name}"]
                cells[name] = f"{row[name]:.3f}" + ("" if half is None else f" ± {half:.3f}")
            else:
                cells[name] = ""
        out.append(cells)
    return out


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", action="store_true", help="one seed, one k, planted data: the quick comparison")
    parser.add_argument("--data", default="planted", help='"planted", or an .npy file of activations [tok, d_in]')
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ks", default="8", help="comma-separated")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, help="for all contenders; default: each its own (1e-3 with --gate)")
    parser.add_argument("--wall", action="store_true", help="also train each for the seconds that interp took")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", default="interp,sparsify,dictionary_learning,saelens")
    parser.add_argument("--archs", default="batchtopk,topk")
    parser.add_argument("--name", help="of the result's file; default: sae_quality, or sae_quality_gate")
    args = parser.parse_args()
    if args.gate:
        args.seeds, args.ks, args.lr = 1, "8", args.lr or 1e-3
    chosen = args.peers.split(","), args.archs.split(",")
    args.contenders = [(peer, arch) for peer, arch in CONTENDERS if peer in chosen[0] and arch in chosen[1]]
    if args.wall and ("interp", "batchtopk") not in args.contenders:
        parser.error("--wall needs interp's batchtopk among the contenders: its time is the budget")
    return args


def main() -> None:
    """Run the comparison and write it down."""
    args = parse()
    machine = timing.machine()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(args.seeds):
            is_planted = args.data == "planted"
            data = planted_data(folder, seed, args.steps * args.batch) if is_planted else file_data(Path(args.data))
            for k in map(int, args.ks.split(",")):
                runs += contest(args, data, folder, seed, k)
            if is_planted:
                data.path.unlink()
    rows = summary(runs)
    settings = {name: value for name, value in vars(args).items() if name != "contenders"}
    file = args.name or ("sae_quality_gate" if args.gate else "sae_quality")
    timing.report(file, shown(rows), machine=machine, settings=settings, numbers=rows, runs=runs)


if __name__ == "__main__":
    main()

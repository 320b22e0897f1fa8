"""Steered against plain generate: one layer, all layers, a strength a row, and the peers.

python experiments/bench/steering.py            # 12 layers x 768, batch 8, 64 new tokens, 15 pairs
python experiments/bench/steering.py --quick    # a small model, 3 pairs: does it run
PEERS: experiments/bench/steering_peers.sh makes their environments; those that are not there are left out, and said so.

Each round runs every contender once, and each is compared with the plain generate of its own round. TransformerLens
runs the same weights in its bridge, through its own generate with a hook. repeng and steering-vectors run in
environments of their own, beside plain generate there: what they end with is told where they do not run.
"""

import argparse
import copy
import json
import subprocess
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from timing import HERE, interleaved, machine, report, table
from transformers import LlamaConfig, LlamaForCausalLM

from interp.acts.direction import Direction
from interp.acts.resampling import placebo_directions
from interp.concepts.steering.context import steer
from interp.concepts.steering.operations import EVERYWHERE, ablate, add
from interp.model.loading import Model, load_model

FULL = {"layers": 12, "width": 768, "vocab": 32_000, "new": 64}
QUICK = {"layers": 3, "width": 64, "vocab": 500, "new": 8}
BATCH, PROMPT = 8, 16


def config(size: dict[str, int]) -> dict[str, Any]:
    return {
        "hidden_size": size["width"],
        "intermediate_size": 4 * size["width"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["width"] // 64,
        "vocab_size": size["vocab"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def make(size: dict[str, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config(size))).eval()


def direction(model: Model, layer: int) -> Direction:
    return Direction(
        vector=placebo_directions(model.d_model, 1, layer)[0],
        hook=f"blocks.{layer}.hook_resid_post",
        method="random",
        scale=1.0,
        norm=1.0,  # of a random model the unit is as good as any
        model=model.fingerprint,
    )


def plans(model: Model) -> dict[str, list[Any]]:
    """Return what is steered, by contender."""
    layers = range(model.n_layers)
    each = [direction(model, i) for i in layers]
    middle = each[model.n_layers // 2]
    rows = [0.1 * (i + 1) for i in range(BATCH)]
    return {
        "plain": [],
        "one layer": [add(middle, 0.5)],
        "one layer, a strength a row": [add(middle, rows)],
        "all layers": [add(d, 0.5) for d in each],
        "all layers, a strength a row": [add(d, rows) for d in each],
        f"ablation at {3 * len(each)} sites": [ablate(middle, hooks=EVERYWHERE)],
    }


def ours(
    hf: Any, ids: torch.Tensor, new: int, stack: ExitStack
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Return the contenders, each a model of its own on the same weights and under its own context, and what entering
    each context took, in seconds."""
    options = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": new,
        "min_new_tokens": new,
    }
    contenders, entering = {}, {}
    for name, plan in plans(load_model(hf)).items():
        twin = copy.deepcopy(hf, {id(t): t for t in (*hf.parameters(), *hf.buffers())})
        model = load_model(twin)
        begun = time.perf_counter()
        stack.enter_context(steer(model, plan))
        entering[name] = time.perf_counter() - begun
        contenders[name] = lambda twin=twin: twin.generate(ids, **options)
    return contenders, entering


def lens(size: dict[str, int], ids: torch.Tensor, new: int) -> dict[str, Callable[[], Any]]:
    """Return TransformerLens's own generate, plain and with a hook that adds a vector."""
    bridge: Any = load_model(make(size), backend="transformer_lens").bridge
    vector = placebo_directions(size["width"], 1, 0)[0].float()
    hooks = [(f"blocks.{i}.hook_out", lambda value, hook: value + vector) for i in range(size["layers"])]
    options = {"max_new_tokens": new, "do_sample": False, "stop_at_eos": False, "verbose": False}

    def run(chosen: list[Any]) -> Any:
        with bridge.hooks(fwd_hooks=chosen), torch.no_grad():
            return bridge.generate(ids, return_type="tokens", **options)

    middle = size["layers"] // 2
    return {
        "TransformerLens: plain": lambda: run([]),
        "TransformerLens: one layer": lambda: run(hooks[middle : middle + 1]),
        "TransformerLens: all layers": lambda: run(hooks),
    }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its 95% interval, by order statistics (binomial)."""
    ordered, n = sorted(values), len(values)
    share, reach = 0.5**n, 0
    term = share
    while reach + 1 <= n // 2 and share < 0.025:
        term = term * (n - reach) / (reach + 1)
        if share + term >= 0.025:
            break
        share, reach = share + term, reach + 1
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return middle, ordered[reach], ordered[n - 1 - reach]


def row(name: str, walls: Sequence[float], plain: Sequence[float], tokens: int) -> dict[str, Any]:
    middle, low, high = interval([p / w for p, w in zip(plain, walls, strict=True)])
    return {
        "generate": name,
        "tokens/s": tokens / interval(walls)[0],
        "of plain": f"{middle:.3f}",
        "95%": f"{low:.3f} to {high:.3f}",
    }


def peers(size: dict[str, int], pairs: int) -> list[dict[str, Any]]:
    """Return the rows of the peers that run, and the errors of those that do not."""
    given = json.dumps({"config": config(size), "batch": BATCH, "prompt": PROMPT, "new": size["new"], "pairs": pairs})
    site, rows = sysconfig.get_paths()["purelib"], []
    for peer, pin in (("repeng", "numpy below 2"), ("steering_vectors", "transformers below 5")):
        python = HERE / ".venvs" / peer / "bin" / "python"
        if not python.exists():
            rows.append({"generate": peer, "95%": "left out: steering_peers.sh makes its environment"})
            continue
        for label, more in ((f"{peer}, {pin}", []), (f"{peer}, this project's packages", ["--site", site])):
            command = [str(python), str(HERE / "steering_peer.py"), peer, given, *more]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = done.stdout.strip().splitlines()
            found = json.loads(lines[-1]) if lines else {"error": done.stderr.strip()[-200:], "at": "start"}
            if "error" in found:
                rows.append({"generate": label, "95%": f"does not run: {found['error'][:160]} ({found['at']})"})
                continue
            tokens = BATCH * size["new"]
            walls = found["walls"]
            rows += [row(f"{label}: {name}", walls[name], walls["plain"], tokens) for name in walls]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few pairs")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--skip-peers", action="store_true")
    args = parser.parse_args()
    size, pairs = (QUICK, 3) if args.quick else (FULL, args.pairs)
    torch.set_num_threads(2)
    about = machine(("torch", "transformers", "transformer-lens"))
    hf = make(size)
    ids = torch.randint(3, size["vocab"], (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
    with ExitStack() as stack, torch.no_grad():
        contenders, entering = ours(hf, ids, size["new"], stack)
        if not args.skip_peers:
            contenders |= lens(size, ids, size["new"])
        outs = {name: run() for name, run in contenders.items()}
        if torch.equal(outs["plain"], outs["one layer"]) or torch.equal(outs["plain"], outs["all layers"]):
            raise RuntimeError("steering changes no token: nothing was measured")
        times = interleaved(contenders, pairs)
    tokens = BATCH * size["new"]
    rows = [row(name, times[name]["walls"], times["plain"]["walls"], tokens) for name in contenders]
    for found in rows:
        found["entering, ms"] = 1000 * entering[found["generate"]] if found["generate"] in entering else ""
    if not args.skip_peers:
        rows += peers(size, pairs)
    against = {}
    for name in ("one layer", "all layers"):
        if (other := f"TransformerLens: {name}") in times:
            pairs_of = zip(times[other]["walls"], times[name]["walls"], strict=True)
            middle, low, high = interval([theirs / own for theirs, own in pairs_of])
            against[name] = f"{middle:.2f} times TransformerLens's ({low:.2f} to {high:.2f})"
            print(f"{name}: {against[name]}")
    what = (
        f"{size['layers']} layers x {size['width']}, batch {BATCH}, prompt {PROMPT}, {size['new']} new, {pairs} pairs"
    )
    if args.quick:
        print(table(rows), what, about, sep="\n")
        return
    report("steering", rows, size=what, machine=about, against_lens=against)


if __name__ == "__main__":
    main()

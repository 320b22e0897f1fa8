"""Capture of one mid-depth hook point against a bare forward that stops there, TransformerLens and nnsight.

    experiments/bench/peers.sh && experiments/bench/.venv/bin/python experiments/bench/capture.py

All contenders run in one process, in turn, on the same random weights, and give the same values (checked before).
Where there is a GPU, a model of 100 M parameters in bfloat16 follows.
"""

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from timing import child, interleaved, machine, peak, ratio, report, reset_peak

import interp
from interp.acts.capture import capture_batch

HOOK, LAYER = "blocks.{}.hook_resid_post", 2
IDS = {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 1024},
    "llama": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 1024,
    },
}  # fmt: skip
LARGE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "max_position_embeddings": 1024, "vocab_size": 16384,
}  # fmt: skip
SHAPES = {"8x128": 12, "32x128": 3}  # calls a measurement
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once: else the peak is a matter of luck
CONTENDERS = ("bare", "interp", "transformer_lens", "nnsight")


class Stop(Exception):
    """Ends the bare forward."""


def build(family: str, **changes: Any) -> torch.nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**IDS, **FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def contender(name: str, hf: torch.nn.Module, ids: torch.Tensor, layer: int = LAYER) -> Callable[[], Any]:
    """Return a call that runs the model on ids up to a block and gives that block's output (bare: nothing)."""
    hook = HOOK.format(layer)
    if name == "interp":
        model = interp.load_model(hf)
        return lambda: capture_batch(model, ids, None, [hook])[hook]
    if name == "transformer_lens":
        bridge = interp.load_model(hf, backend="transformer_lens").bridge

        def run() -> torch.Tensor:
            with torch.no_grad():
                _, cache = bridge.run_with_cache(ids, names_filter=[hook], stop_at_layer=layer + 1)
            return cache[hook]

        return run
    if name == "nnsight":
        from nnsight import NNsight

        return _nnsight(NNsight(hf), hf, ids, layer)
    return _bare(hf, ids, layer)


def _blocks(hf: Any) -> Any:
    return hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers


def _bare(hf: Any, ids: torch.Tensor, layer: int) -> Callable[[], Any]:
    def stop(*_: Any) -> None:
        raise Stop

    block = _blocks(hf)[layer]

    def run() -> None:
        handle = block.register_forward_hook(stop)  # in every call: other contenders run the same modules
        try:
            with torch.no_grad():
                hf(input_ids=ids, use_cache=False)
        except Stop:
            pass
        finally:
            handle.remove()

    return run


def _nnsight(wrapped: Any, hf: Any, ids: torch.Tensor, layer: int) -> Callable[[], Any]:
    first = isinstance(_output(hf, ids, layer), tuple)

    def run() -> torch.Tensor:
        with torch.no_grad():  # noqa: SIM117 (nnsight reads the source of the block below its own `with`)
            with wrapped.trace(input_ids=ids, use_cache=False) as tracer:
                found = _blocks(wrapped)[layer].output.save()
                tracer.stop()
        return found[0] if first else found

    return run


def _output(hf: Any, ids: torch.Tensor, layer: int) -> Any:
    """Return what the block itself gives: a tensor, or a tuple that begins with it."""
    seen: list[Any] = []
    handle = _blocks(hf)[layer].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        hf(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0]


def compare(family: str, shape: str, names: list[str], repeats: int) -> list[dict[str, Any]]:
    """Return one row for each contender: tokens/s, and its times over the bare forward's."""
    rows_, columns = map(int, shape.split("x"))
    hf = build(family)
    ids = torch.randint(3, IDS["vocab_size"], (rows_, columns), generator=torch.Generator().manual_seed(1))
    calls = {name: contender(name, copy.deepcopy(hf), ids) for name in names}
    want = _output(hf, ids, LAYER)
    want = want[0] if isinstance(want, tuple) else want
    for name in names[1:]:
        worst = float((calls[name]() - want).abs().max())
        if worst > (1e-4 if name == "transformer_lens" else 0):
            raise SystemExit(f"{name} gives other values: {worst:.2e}")
    n = SHAPES[shape]
    times = interleaved(
        {k: lambda call=call: [call() for _ in range(n)] and None for k, call in calls.items()}, repeats
    )
    return [
        {
            "model": family,
            "batch": shape,
            "contender": name,
            "tokens/s": n * ids.numel() / times[name]["wall"],
            "wall": ratio(times, name, "bare"),
            "CPU": ratio(times, name, "bare", "cpus"),
            "speed of bare": 1 / ratio(times, name, "bare"),
        }
        for name in names
    ]


def memory(name: str, family: str) -> dict[str, float]:
    """Return MB by which the peak grows in one capture of 32 x 512 tokens, beside the size of what is captured."""
    hf = build(family)
    generator = torch.Generator().manual_seed(1)
    small, ids = (torch.randint(3, 1024, shape, generator=generator) for shape in ((2, 8), (32, 512)))
    call, warm = contender(name, hf, ids), contender(name, hf, small)
    warm()
    reset_peak()
    before = peak()
    kept = call()
    grown = peak() - before
    return {"grown": grown, "captured": 0.0 if kept is None else kept.nbytes / 1e6}


def memories(names: list[str], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for family in FAMILIES:
        found = {n: [child(["--memory-of", n, family], **EXACT) for _ in range(repeats)] for n in names}
        bare = statistics.median(f["grown"] for f in found["bare"])
        for name in names:
            grown, captured = (statistics.median(f[key] for f in found[name]) for key in ("grown", "captured"))
            extra = (grown - bare) / captured if captured else 0.0
            rows.append(
                {
                    "model": family,
                    "contender": name,
                    "peak MB": grown,
                    "captured MB": captured,
                    "extra / captured": extra,
                }
            )
    return rows


def on_gpu(names: list[str], repeats: int) -> list[dict[str, Any]]:
    """Return rows for a Llama of 100 M parameters in bfloat16 at 32 x 512, and for copying to the host as it computes.

    Written for a machine with CUDA and not yet run on one.
    """
    hf = build("llama", **LARGE).to("cuda", torch.bfloat16)
    ids = torch.randint(3, 1024, (32, 512), generator=torch.Generator().manual_seed(1)).cuda()
    calls = {name: contender(name, copy.deepcopy(hf), ids, layer=5) for name in names}
    tokens, batches = ids.numel(), 8
    stream = torch.cuda.Stream()

    def many(call: Callable[[], Any], copies: str) -> None:
        held = []
        for _ in range(batches):
            value = call()
            if copies == "waiting":
                held.append(value.cpu())
            elif copies == "overlapped":
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    out = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                    held.append(out.copy_(value, non_blocking=True))
                value.record_stream(stream)
        torch.cuda.synchronize()

    runs = {name: (lambda call=call: many(call, "none")) for name, call in calls.items()}
    runs |= {f"interp, copy {c}": (lambda c=c: many(calls["interp"], c)) for c in ("waiting", "overlapped")}
    times = interleaved(runs, repeats, warmup=2)
    return [
        {
            "model": "llama 100 M bf16",
            "batch": "32x512",
            "contender": name,
            "tokens/s": batches * tokens / times[name]["wall"],
            "wall": ratio(times, name, "bare"),
            "CPU": ratio(times, name, "bare", "cpus"),
            "speed of bare": 1 / ratio(times, name, "bare"),
        }
        for name in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS[1:], help="instead of all contenders")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(memory(*args.memory_of)))
        return
    about = machine(("torch", "transformers", "transformer-lens", "nnsight"))
    names = ["bare", *(args.only or CONTENDERS[1:])]
    rows = [row for family in FAMILIES for shape in SHAPES for row in compare(family, shape, names, args.repeats)]
    if torch.cuda.is_available():
        rows += on_gpu(names, args.repeats)
    used = memories(names, args.memory_repeats)
    report("capture", rows, machine=about, repeats=args.repeats, threads=args.threads, memory=used)
    print()
    for row in used:
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()

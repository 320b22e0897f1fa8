"""The commands `sae ...`: each a few lines that call the library."""

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.common import USAGE, Json, Quiet, Seed, application, count, emit, flat, say

app = application("sae", "Train and examine sparse autoencoders on activations.")

RunArg = Annotated[str, typer.Argument(help="folder or file of a saved autoencoder, or a hub id")]


@app.command(epilog="Example: sae train acts --hook resid_post.2 --width 16x --k 32 --tokens 2M --out runs/a")
def train(
    source: Annotated[str, typer.Argument(help="a store, a .npy or .safetensors file, or a model (with --dataset)")],
    out: Annotated[Path, typer.Option(help="folder of the run; the same command goes on with an interrupted one")],
    dataset: Annotated[str | None, typer.Option(help="with a model: text:FILE, jsonl:FILE, hf:NAME, ...")] = None,
    hook: Annotated[list[str] | None, typer.Option(help="hook point; repeat it for a crosscoder")] = None,
    target: Annotated[str | None, typer.Option(help="hook point to predict: a transcoder")] = None,
    skip: Annotated[bool, typer.Option("--skip", help="with --target: add a linear map of the input")] = False,
    arch: Annotated[str, typer.Option(help="relu, gated, topk, batchtopk, jumprelu, matryoshka, ...")] = "batchtopk",
    width: Annotated[str, typer.Option(help="latents, or a multiple of d_in such as 16x")] = "16x",
    k: Annotated[float, typer.Option(help="active latents a token")] = 32,
    sweep: Annotated[list[str] | None, typer.Option(help="values to try, such as k=16,32; repeat it")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps")] = None,
    tokens: Annotated[str | None, typer.Option(help="tokens to train on, such as 2M, repeats counted")] = None,
    batch_size: Annotated[int, typer.Option(help="tokens a step")] = 2048,
    lr: Annotated[float | None, typer.Option(help="peak learning rate; default: by width and length")] = None,
    option: Annotated[list[str] | None, typer.Option(help="another training option, such as aux_weight=0.1")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="steps; default: 1,000 steps or 10 minutes")] = None,
    track: Annotated[str | None, typer.Option(help="tensorboard, wandb or trackio, beside metrics.jsonl")] = None,
    share: Annotated[str, typer.Option(help="under torchrun, processes share: tokens, or latents")] = "tokens",
    ctx: Annotated[int | None, typer.Option(help="with a model: tokens a window")] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: where the data lie")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train autoencoders on a store, an array, or a model's activations; resumable, several at once with --sweep."""
    from sae.dist import join_world, leave_world
    from sae.runs import fit, grid, table
    from sae.runs import sweep as sweeping

    world = join_world(share)
    hooks: Any = hook[0] if hook and len(hook) == 1 else hook or None
    base: dict[str, Any] = {"arch": arch, "width": width, "k": _whole(k), "hook": hooks, "target": target, "skip": skip}
    base |= {"lr": lr, "seed": seed, **_pairs(option, "--option")}
    common: dict[str, Any] = {
        "steps": steps, "tokens": count(tokens, "--tokens"), "batch_size": batch_size, "out": out, "device": device,
        "checkpoint_every": checkpoint_every, "track": track, "progress": not quiet, "world": world,
    }  # fmt: skip
    opened = _source(source, dataset, [*(hook or []), *([target] if target else [])], ctx, device)
    if sweep:
        varied = _pairs(sweep, "--sweep")
        lists = {n: v if n in varied and isinstance(v, list) else [v] for n, v in (base | varied).items()}
        runs = sweeping(opened, grid(**lists), seed=seed, **common)
    else:
        runs = [fit(opened, **base, **common)]
    leave_world()
    if world.rank:
        return
    results = [
        {"name": run.name, "out": str(out / run.name), "step": run.log[-1]["step"], "seconds": run.log[-1]["seconds"],
         **run.result} for run in runs
    ]  # fmt: skip
    lines = [table(runs)] if sweep else [f"{out}: " + ", ".join(f"{n} {v:.4g}" for n, v in _shown(runs[0].result))]
    emit({"runs": results} if sweep else results[0], as_json, lines)


@app.command("eval", epilog="Example: sae eval runs/a --model tiny --dataset text:held-out.txt")
def evaluate(
    run: RunArg,
    data: Annotated[Path | None, typer.Argument(help="activations: a .npy or .safetensors file")] = None,
    model: Annotated[str | None, typer.Option(help="measure through this model: 'tiny', a folder, or a hub id")] = None,
    dataset: Annotated[str | None, typer.Option(help="with --model: text:FILE, jsonl:FILE, hf:NAME, ...")] = None,
    hook: Annotated[str | None, typer.Option(help="hook point; default: the one it was trained on")] = None,
    tokens: Annotated[str, typer.Option(help="tokens to measure on")] = "50k",
    probe: Annotated[list[str] | None, typer.Option(help="probe for a concept, such as sentiment; repeat it")] = None,
    absorption: Annotated[bool, typer.Option("--absorption", help="measure absorption of first letters")] = False,
    labels: Annotated[int, typer.Option(help="latents to explain by lists of tokens: detection, fuzzing")] = 0,
    format: Annotated[str | None, typer.Option(help="of the saved autoencoder; default: recognised")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure an autoencoder on activations, or through a model; every number with its definition and null."""
    from sae.formats import load_sae

    loaded = load_sae(run, format=format)  # a run that is not there is told before anything else
    if model is not None and dataset is not None:
        from interp.features.evaluation import evaluate_on_model
        from interp.model.loading import load_model

        found: Any = evaluate_on_model(
            load_model(model), loaded, hook, dataset, tokens=count(tokens, "--tokens") or 0, probing=probe or (),
            absorption=absorption, labels=labels, seed=seed,
        )  # fmt: skip
    elif data is not None and model is None and dataset is None:
        from sae.data import load_array
        from sae.evaluation import evaluate as measure

        found = measure(loaded, load_array(data))
    else:
        say("error: give a file of activations, or both --model and --dataset")
        raise typer.Exit(USAGE)
    emit(found.as_dict(), as_json, [str(found)])


@app.command(epilog="Example: sae convert runs/a exported --to saelens")
def convert(
    run: RunArg,
    out: Annotated[Path, typer.Argument(help="folder to write")],
    to: Annotated[str, typer.Option(help="native, saelens, sparsify or dictionary_learning")] = "saelens",
    format: Annotated[str | None, typer.Option(help="of the source; default: recognised")] = None,
    as_json: Json = False,
) -> None:
    """Write an autoencoder in another project's format."""
    from sae.formats import load_sae, save_sae

    loaded = load_sae(run, format=format)
    save_sae(loaded, out, format=to)
    config = loaded.config
    emit(
        {"out": str(out), "format": to, "arch": config.arch, "d_in": loaded.d_in, "d_sae": loaded.d_sae}, as_json,
        [f"{out}: {config.arch}, {loaded.d_in} to {loaded.d_sae}, as {to}"],
    )  # fmt: skip


@app.command(epilog="Example: sae push runs/a user/my-sae")
def push(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hugging Face hub")],
    public: Annotated[bool, typer.Option("--public", help="for everybody to see")] = False,
    as_json: Json = False,
) -> None:
    """Publish an autoencoder on the hub, with a model card."""
    from sae.formats import load_sae
    from sae.formats.hub import push_to_hub

    address = push_to_hub(load_sae(run), repo, run=run, private=not public)
    emit({"address": address}, as_json, [address])


@app.command(epilog="Example: sae info runs/a")
def info(run: RunArg, as_json: Json = False) -> None:
    """Say what a saved autoencoder is."""
    from sae.runs import describe

    found = describe(run)
    rows = flat(found)
    width = max(len(name) for name, _ in rows)
    emit(found, as_json, [f"{name:<{width}}  {value}" for name, value in rows])


def _source(source: str, dataset: str | None, hooks: list[str], ctx: int | None, device: str | None) -> Any:
    """Return what the first argument of `sae train` names."""
    if dataset is not None:
        from interp.model.loading import load_model
        from interp.store.stream import stream_acts

        if not hooks:
            say("error: with a model, name the hook point with --hook")
            raise typer.Exit(USAGE)
        return stream_acts(load_model(source, device=device or "auto"), dataset, hooks, ctx=ctx)
    if Path(source).is_dir():
        from interp.store.reader import open_store

        return open_store(source)
    return source


def _pairs(given: list[str] | None, flag: str) -> dict[str, Any]:
    """Return what "name=value" says; several values after commas are a list."""
    found = {}
    for text in given or []:
        name, sign, value = text.partition("=")
        if not sign or not value:
            raise typer.BadParameter(f"{flag} {text!r}: write name=value")
        values = [_value(part) for part in value.split(",")]
        found[name.replace("-", "_")] = values if len(values) > 1 else values[0]
    return found


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _shown(result: dict[str, Any]) -> list[tuple[str, int | float]]:
    return [(name, value) for name, value in result.items() if isinstance(value, int | float)]


if __name__ == "__main__":  # for torchrun, which starts Python itself
    from interp.cli import sae_main

    sae_main()

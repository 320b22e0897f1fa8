"""The commands `interp` and `sae`: each a few lines that call the library.

stdout carries results (with --json: one JSON document), stderr everything else. Exit codes: 0 done, 1 failed, 2 usage,
3 a model, file or extra is missing, 130 / 143 interrupted or terminated after saving. --debug anywhere shows the
traceback of an error.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

MISSING, FAILED, USAGE, INTERRUPTED, TERMINATED = 3, 1, 2, 130, 143

app = typer.Typer(
    name="interp", help="See and steer what a language model represents. Start with: interp demo", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
sae_app = typer.Typer(
    name="sae", help="Train and examine sparse autoencoders on activations.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

ModelArg = Annotated[str, typer.Argument(help="'tiny' (bundled), a folder, or a hub id")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, all else on stderr")]
Seed = Annotated[int, typer.Option(help="seed of every random choice")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _emit(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    print(json.dumps(result, ensure_ascii=False, allow_nan=False) if as_json else "\n".join(lines))


@app.command(epilog="Example: interp demo --out first-look")
def demo(
    model: Annotated[str, typer.Option(help="'tiny' (bundled), a folder, or a hub id")] = "tiny",
    dataset: Annotated[str | None, typer.Option(help="text:FILE or jsonl:FILE; default: bundled text")] = None,
    out: Annotated[Path, typer.Option(help="folder for report.html and run.json")] = Path("demo"),
    hook: Annotated[str | None, typer.Option(help="hook point; default: the middle block's resid_post")] = None,
    tokens: Annotated[int, typer.Option(help="tokens to train the autoencoder on")] = 200_000,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The whole job in two minutes: capture, autoencoder, probe, steering, analogies, a map, one report."""
    from interp.demo.job import run_demo

    result = run_demo(
        model, dataset=dataset, out=out, hook=hook, tokens=tokens, seed=seed, device=device,
        say=(lambda text: None) if quiet else _say,
    )  # fmt: skip
    _emit(result, as_json, [f"{out / 'report.html'}", f"{out / 'run.json'}"])


@app.command(epilog="Example: interp doctor")
def doctor(as_json: Json = False) -> None:
    """Versions, devices and extras, and the command that installs what is missing."""
    from interp.doctor import examine

    found = examine()
    _emit(found, as_json, [f"{name:<18} {value}" for name, value in found.items()])


@app.command(epilog="Example: interp harvest tiny --hook resid_post.2 --dataset text:a.txt --tokens 2M --out acts")
def harvest(
    model: ModelArg,
    hook: Annotated[list[str], typer.Option(help="hook point or glob; repeat it for several")],
    dataset: Annotated[str, typer.Option(help="text:FILE, jsonl:FILE, parquet:FILE or hf:NAME[:SPLIT]")],
    out: Annotated[Path, typer.Option(help="folder of the store; the same command goes on with an interrupted one")],
    tokens: Annotated[str | None, typer.Option(help="rows to harvest, such as 500000 or 2M; default: all")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16; default: the model's")] = None,
    ctx: Annotated[int | None, typer.Option(help="tokens a window; default: n_ctx, at most 512")] = None,
    batch_size: Annotated[int, typer.Option(help="windows a batch")] = 32,
    packing: Annotated[str | None, typer.Option(help="joined, masked or documents")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="pad, bos, special, first:N, outlier:M")] = None,
    field: Annotated[str, typer.Option(help="where records hold their text")] = "text",
    shard_mb: Annotated[float, typer.Option(help="size of a file")] = 64,
    covariance: Annotated[bool, typer.Option("--covariance", help="store each hook point's covariance too")] = False,
    rank: Annotated[int | None, typer.Option(help="which process this is; default: from torchrun or SLURM")] = None,
    world_size: Annotated[int | None, typer.Option(help="how many processes there are")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print rows, bytes and time; write nothing")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Store a text's activations on disk: resumable, checksummed, by one process or many."""
    from interp.acts.rows import SAE_EXCLUDE
    from interp.model.loading import load_model
    from interp.store.harvest import estimate, harvest_acts
    from interp.store.job import local_device, who_am_i

    wanted = _count(tokens, "--tokens")
    me, world, known = who_am_i(rank, world_size)
    if world > 1 and not quiet:
        _say(f"rank {me} of {world} ({known})")
    options: dict[str, Any] = {
        "tokens": wanted, "dtype": dtype, "ctx": ctx, "batch_size": batch_size, "packing": packing, "field": field,
        "exclude": exclude or SAE_EXCLUDE, "shard_mb": shard_mb, "covariance": covariance,
    }  # fmt: skip
    loaded = load_model(model, device=local_device(device))
    if dry_run:
        found = estimate(loaded, dataset, hook, **options)
        return _emit(found, as_json, [f"{name:<24} {value}" for name, value in found.items()])
    store = harvest_acts(
        loaded, dataset, hook, out=out, rank=me, world_size=world, progress=not quiet, say=_say, **options
    )
    state = "" if store.complete else " so far"
    found = {"out": str(out), "complete": store.complete, "rows": len(store), "shards": len(store.shards)}
    count = len(store.shards)
    _emit(found, as_json, [f"{out}: {len(store):,} rows in {count:,} shard{'s' * (count != 1)}{state}"])


@app.command(epilog="Example: interp info acts")
def info(store: Annotated[Path, typer.Argument(help="folder of a store")], as_json: Json = False) -> None:
    """Say what a store of activations holds."""
    from interp.store.reader import open_store

    found = open_store(store).describe()
    rows = _flat(found)
    width = max(len(name) for name, _ in rows)
    _emit(found, as_json, [f"{name:<{width}}  {value}" for name, value in rows])


@app.command(epilog="Example: interp verify acts --repair")
def verify(
    store: Annotated[Path, typer.Argument(help="folder of a store")],
    mend: Annotated[bool, typer.Option("--repair", help="set damaged files aside, make just those again")] = False,
    as_json: Json = False,
) -> None:
    """Compare every byte of a store with its checksums; exit code 1 names the damaged files."""
    from interp.store.verify import repair
    from interp.store.verify import verify as check

    verdict = repair(store, say=_say) if mend else check(store)
    _emit(verdict.as_dict(), as_json, verdict.lines())
    if not verdict.sound:
        raise typer.Exit(FAILED)


@app.command(epilog="Example: interp concept tiny --positive glad.txt --negative sad.txt --out glad.safetensors")
def concept(
    model: ModelArg,
    positive: Annotated[Path, typer.Option(help="one text a line that has the concept")],
    negative: Annotated[Path, typer.Option(help="one text a line that lacks it")],
    out: Annotated[Path, typer.Option(help="the direction's file (safetensors)")],
    hook: Annotated[str | None, typer.Option(help="hook point; default: the middle block's resid_post")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find a concept's direction: the difference between the mean residuals of two sets of texts."""
    from interp.acts.capture import capture_acts, pool
    from interp.concepts.finders import fit_direction
    from interp.model.loading import load_model

    texts = [_lines(positive), _lines(negative)]
    loaded = load_model(model, device=device)
    name = loaded.hook_point(hook or f"resid_post.{(loaded.n_layers - 1) // 2}").name
    rows = pool(capture_acts(loaded, texts[0] + texts[1], [name]), name, "mean")
    labels = [1] * len(texts[0]) + [0] * len(texts[1])
    direction = fit_direction(rows, labels, hook=name, model=loaded)
    direction.save(out)
    found = {"out": str(out), "hook": name, "scale": direction.scale, "norm": direction.norm, "n": len(labels)}
    _emit(found, as_json, [f"{out}: {name}, length {direction.scale:.3g}, median residual norm {direction.norm:.3g}"])


@app.command(epilog='Example: interp steer tiny --vector glad.safetensors --strength 0.5 "Tom said the cake was"')
def steer(
    model: ModelArg,
    prompts: Annotated[list[str], typer.Argument(help="texts to continue")],
    vector: Annotated[Path, typer.Option(help="a direction's file, from `interp concept`")],
    strength: Annotated[float, typer.Option(help="in units of the layer's median residual norm")],
    positions: Annotated[str, typer.Option(help="all, prompt, generated, from_last_prompt_token")] = "all",
    max_new_tokens: Annotated[int, typer.Option(help="tokens to add")] = 30,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue texts unsteered and steered along a direction."""
    from interp.acts.direction import Direction
    from interp.concepts.steering import add
    from interp.concepts.steering import steer as steering
    from interp.model.loading import load_model

    given = Direction.load(vector)  # a bad file is refused before a model is loaded
    loaded = load_model(model, device=device)
    operation = add(given.for_model(loaded), strength=strength, positions=positions)
    before = loaded.generate(prompts, max_new_tokens=max_new_tokens)
    with steering(loaded, operation):
        after = loaded.generate(prompts, max_new_tokens=max_new_tokens)
    rows = [{"prompt": p, "unsteered": b, "steered": a} for p, b, a in zip(prompts, before, after, strict=True)]
    shown = [
        line
        for r in rows
        for line in (f"prompt     {r['prompt']}", f"unsteered {r['unsteered']}", f"steered   {r['steered']}")
    ]
    _emit({"hook": given.hook, "strength": strength, "positions": positions, "texts": rows}, as_json, shown)


@app.command(
    epilog="Example: interp analogy tiny king - man + woman",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def analogy(
    model: ModelArg,
    words: Annotated[list[str], typer.Argument(help="an expression such as: king - man + woman")],
    top: Annotated[int, typer.Option(help="answers a layer")] = 3,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer an analogy at every layer, with the query words excluded and, beside it, with nothing excluded."""
    from interp.model.loading import load_model
    from interp.space.arithmetic import expression, layer_answers

    positive, negative = expression(words)
    rows = layer_answers(load_model(model, device=device), positive, negative, top=top)
    shown = [f"{'layer':<12} {'query words excluded':<44} nothing excluded"]
    for row in rows:
        answers = ", ".join(f"{a['word']} {a['cosine']:.2f}" for a in row["answers"])
        shown.append(f"{row['layer']:<12} {answers:<44} {row['honest']}")
    _emit({"positive": positive, "negative": negative, "layers": rows}, as_json, shown)


@sae_app.command("train", epilog="Example: sae train acts.npy --width 16x --k 32 --steps 1000 --out runs/a")
def sae_train(
    source: Annotated[str, typer.Argument(help="activations [tok, d_in]: a .npy or .safetensors file")],
    out: Annotated[Path, typer.Option(help="folder for the autoencoder, run.json and metrics.jsonl")],
    arch: Annotated[str, typer.Option(help="architecture")] = "batchtopk",
    width: Annotated[str, typer.Option(help="latents, or a multiple of d_in such as 16x")] = "16x",
    k: Annotated[float, typer.Option(help="active latents a token")] = 32,
    steps: Annotated[int | None, typer.Option(help="optimiser steps")] = None,
    tokens: Annotated[int | None, typer.Option(help="tokens to train on, repeats counted (instead of --steps)")] = None,
    batch_size: Annotated[int, typer.Option(help="tokens a step")] = 2048,
    lr: Annotated[float | None, typer.Option(help="peak learning rate; default: by width")] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: where the data lie")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a sparse autoencoder on an array of activations."""
    from sae.runs import fit

    run = fit(
        source, arch=arch, width=width, k=k, steps=steps, tokens=tokens, batch_size=batch_size, lr=lr, seed=seed,
        out=out, device=device, progress=not quiet,
    )  # fmt: skip
    last = run.log[-1]
    _emit({"out": str(out), **last}, as_json, [f"{out}: " + ", ".join(f"{k} {v:.4g}" for k, v in last.items())])


@sae_app.command("eval", epilog="Example: sae eval runs/a heldout.npy")
def sae_eval(
    run: Annotated[Path, typer.Argument(help="folder of a saved autoencoder")],
    data: Annotated[Path, typer.Argument(help="activations [tok, d_in]: a .npy or .safetensors file")],
    as_json: Json = False,
) -> None:
    """Measure an autoencoder on activations; every number with its definition."""
    from sae.evaluation import evaluate_saved

    result = evaluate_saved(run, data)
    _emit(result.as_dict(), as_json, [str(result)])


@sae_app.command("info", epilog="Example: sae info runs/a")
def sae_info(run: Annotated[Path, typer.Argument(help="folder of a saved autoencoder")], as_json: Json = False) -> None:
    """Say what a saved autoencoder is."""
    from sae.runs import describe

    found = describe(run)
    _emit(found, as_json, [f"{name:<24} {value}" for name, value in found.items()])


def _count(text: str | None, flag: str) -> int | None:
    """Return the number that "500000", "500k" or "2M" means."""
    if text is None:
        return None
    scale = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}.get(text[-1:].lower(), 1)
    try:
        return int(float(text.rstrip("kKmMbBgG").replace("_", "")) * scale)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{flag} {text!r} is no number; write 500000, 500k or 2M") from None


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return a nested table as (dotted name, value) pairs."""
    rows: list[tuple[str, Any]] = []
    for name, value in table.items():
        rows += _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows


def _lines(path: Path) -> list[str]:
    from sae.extras import MissingError

    if not path.is_file():
        raise MissingError(f"there is no file {path}")
    texts = [line for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text; it needs one text a line")
    return texts


class _Terminated(BaseException):
    """SIGTERM: leaves through every `finally`, as Ctrl-C does."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _run(application: typer.Typer) -> None:
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [arg for arg in sys.argv[1:] if arg != "--debug"]
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads that spin at barriers slow each other tenfold on a busy machine; read when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        application()
    except (KeyboardInterrupt, _Terminated) as stop:
        _say("interrupted: what was finished is kept" if isinstance(stop, KeyboardInterrupt) else "terminated")
        sys.exit(INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED)
    except Exception as error:
        if debug:
            raise
        _say(f"error: {_first_line(error)}")
        sys.exit(_exit_code(error))


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, (ValueError, LookupError, OSError, RuntimeError, TypeError, ArithmeticError, MemoryError))
    return text if known and text else f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


def _exit_code(error: Exception) -> int:
    if type(error).__name__ == "HookPointError":  # not imported: errors may come before torch is needed
        return USAGE
    return MISSING if isinstance(error, FileNotFoundError) else FAILED


def main() -> None:
    """Run the command `interp`."""
    _run(app)


def sae_main() -> None:
    """Run the command `sae`."""
    _run(sae_app)


if __name__ == "__main__":
    main()

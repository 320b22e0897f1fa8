"""The commands `interp ...`: each a few lines that call the library."""

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.common import FAILED, Device, Json, ModelArg, Quiet, Seed, application, count, emit, flat, say

app = application("interp", "See and steer what a language model represents. Start with: interp demo")


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
        say=(lambda text: None) if quiet else say,
    )  # fmt: skip
    emit(result, as_json, [f"{out / 'report.html'}", f"{out / 'run.json'}"])


@app.command(epilog="Example: interp doctor")
def doctor(as_json: Json = False) -> None:
    """Versions, devices and extras, and the command that installs what is missing."""
    from interp.doctor import examine

    found = examine()
    emit(found, as_json, [f"{name:<18} {value}" for name, value in found.items()])


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

    wanted = count(tokens, "--tokens")
    me, world, known = who_am_i(rank, world_size)
    if world > 1 and not quiet:
        say(f"rank {me} of {world} ({known})")
    options: dict[str, Any] = {
        "tokens": wanted, "dtype": dtype, "ctx": ctx, "batch_size": batch_size, "packing": packing, "field": field,
        "exclude": exclude or SAE_EXCLUDE, "shard_mb": shard_mb, "covariance": covariance,
    }  # fmt: skip
    loaded = load_model(model, device=local_device(device))
    if dry_run:
        found = estimate(loaded, dataset, hook, **options)
        return emit(found, as_json, [f"{name:<24} {value}" for name, value in found.items()])
    store = harvest_acts(
        loaded, dataset, hook, out=out, rank=me, world_size=world, progress=not quiet, say=say, **options
    )
    state = "" if store.complete else " so far"
    found = {"out": str(out), "complete": store.complete, "rows": len(store), "shards": len(store.shards)}
    shards = len(store.shards)
    emit(found, as_json, [f"{out}: {len(store):,} rows in {shards:,} shard{'s' * (shards != 1)}{state}"])


@app.command(epilog="Example: interp info acts")
def info(store: Annotated[Path, typer.Argument(help="folder of a store")], as_json: Json = False) -> None:
    """Say what a store of activations holds."""
    from interp.store.reader import open_store

    found = open_store(store).describe()
    rows = flat(found)
    width = max(len(name) for name, _ in rows)
    emit(found, as_json, [f"{name:<{width}}  {value}" for name, value in rows])


@app.command(epilog="Example: interp verify acts --repair")
def verify(
    store: Annotated[Path, typer.Argument(help="folder of a store")],
    mend: Annotated[bool, typer.Option("--repair", help="set damaged files aside, make just those again")] = False,
    as_json: Json = False,
) -> None:
    """Compare every byte of a store with its checksums; exit code 1 names the damaged files."""
    from interp.store.verify import repair
    from interp.store.verify import verify as check

    verdict = repair(store, say=say) if mend else check(store)
    emit(verdict.as_dict(), as_json, verdict.lines())
    if not verdict.sound:
        raise typer.Exit(FAILED)


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
    emit({"positive": positive, "negative": negative, "layers": rows}, as_json, shown)

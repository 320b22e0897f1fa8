"""The commands of concepts: find, read, steer along, measure and bake directions; each a few lines over the library."""

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.commands import app
from interp.cli.common import USAGE, Device, Json, ModelArg, Quiet, Seed, emit, lines, say, table_lines

Data = Annotated[Path | None, typer.Option(help="labelled texts: csv, jsonl or parquet with text,label[,group]")]
Pairs = Annotated[Path | None, typer.Option(help="contrast pairs: a file with positive,negative")]
Positive = Annotated[str | None, typer.Option("--label", help="the label that counts as positive, of several")]
Vector = Annotated[Path, typer.Option(help="a direction: our file, or gguf, .svec, .pt")]
At = Annotated[str | None, typer.Option("--hook", help="hook point, for files that name none")]
Force = Annotated[bool, typer.Option("--force", help="use a direction of another model or hook point")]


@app.command(epilog="Example: interp concept tiny --positive glad.txt --negative sad.txt --out glad.safetensors")
def concept(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="the direction's file (safetensors)")],
    positive: Annotated[Path | None, typer.Option(help="one text a line that has the concept")] = None,
    negative: Annotated[Path | None, typer.Option(help="one text a line that lacks it")] = None,
    data: Data = None,
    pairs: Pairs = None,
    label: Positive = None,
    method: Annotated[str, typer.Option(help="mean_difference, lda, logistic, pair_pca, ...")] = "mean_difference",
    position: Annotated[str, typer.Option(help="mean, last, span, every")] = "mean",
    hook: Annotated[str | None, typer.Option(help="hook point; default: the middle block's resid_post")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find a concept's direction from labelled texts, contrast pairs, or two files of texts."""
    from interp.concepts.labelled.token_choice import token_rows
    from interp.concepts.reading.finders import fit_direction
    from interp.model.loading import load_model

    examples = _examples(positive, negative, data, pairs, label)
    loaded = load_model(model, device=device)
    name = loaded.hook_point(hook or f"resid_post.{(loaded.n_layers - 1) // 2}").name
    rows = token_rows(loaded, examples, [name], position)
    (X,) = rows.X.values()
    direction = fit_direction(
        X, rows.y, method=method, groups=rows.groups, pairs=rows.pairs, hook=name, model=loaded, seed=seed
    )
    direction.save(out)
    found = {
        "out": str(out), "hook": name, "method": direction.method, "scale": direction.scale, "norm": direction.norm,
        "n": len(rows.y),
    }  # fmt: skip
    norm = f"median residual norm {direction.norm:.3g}"
    emit(found, as_json, [f"{out}: {name}, length {direction.scale:.3g}, {norm}, from {len(rows.y)} rows"])


@app.command(
    epilog="Example: interp probe tiny --data reviews.csv --hook 'resid_post.*' --position mean --position last"
)
def probe(
    model: ModelArg,
    hook: Annotated[list[str], typer.Option(help="hook point or glob, such as 'resid_post.*'; repeat it")],
    data: Data = None,
    pairs: Pairs = None,
    label: Positive = None,
    position: Annotated[list[str] | None, typer.Option(help="mean, last, span, every; repeat it")] = None,
    method: Annotated[list[str] | None, typer.Option(help="logistic, lda, mean_difference, ridge; repeat it")] = None,
    permutations: Annotated[int, typer.Option(help="shuffles of the labels, each with the whole choice")] = 200,
    folds: Annotated[int, typer.Option(help="folds of the outer cross-validation")] = 5,
    control: Annotated[bool, typer.Option("--untrained", help="read an untrained copy of the model too")] = False,
    out: Annotated[Path | None, typer.Option(help="save the best probe (safetensors)")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Read a concept at every hook point and position, honestly: the choice of the best is part of what is tested."""
    from interp.concepts.labelled.token_choice import token_rows
    from interp.concepts.reading.sweep import sweep
    from interp.model.loading import load_model, untrained

    examples = _examples(None, None, data, pairs, label)
    loaded = load_model(model, device=device)
    chosen: dict[str, Any] = {"positions": position or ["mean"]} if len(position or ()) > 1 else {
        "position": (position or ["mean"])[0]
    }  # fmt: skip
    rows = token_rows(loaded, examples, hook, **chosen)
    null = token_rows(untrained(loaded, seed), examples, hook, **chosen).X if control else None
    more: dict[str, Any] = {"methods": tuple(method)} if method else {}
    found = sweep(
        rows.X, rows.y, groups=rows.groups, pairs=rows.pairs, folds=folds, n_permutations=permutations, untrained=null,
        model=loaded, seed=seed, **more,
    )  # fmt: skip
    if out is not None:
        found.best.save(out)
    emit(found.to_dict(), as_json, str(found).splitlines())


@app.command(epilog='Example: interp steer tiny --vector glad.safetensors --strength 0.5 "Tom said the cake was"')
def steer(
    model: ModelArg,
    prompts: Annotated[list[str], typer.Argument(help="texts to continue")],
    vector: Vector,
    strength: Annotated[list[float], typer.Option(help="in median residual norms of the layer; repeat it")],
    operation: Annotated[
        str, typer.Option(help="add; or ablate, strength 0 to 1, at every site of every layer")
    ] = "add",
    positions: Annotated[
        str, typer.Option(help="default (from the prompt's last token), all, prompt, generated")
    ] = "default",
    max_new_tokens: Annotated[int, typer.Option(help="tokens to add")] = 30,
    hook: At = None,
    force: Force = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue texts unsteered and steered along a direction, all strengths in one batch."""
    from interp.concepts.reading.files import open_direction
    from interp.concepts.steering.context import steer as steering
    from interp.concepts.steering.operations import EVERYWHERE, ablate, add
    from interp.model.loading import load_model

    if operation not in ("add", "ablate"):
        raise typer.BadParameter(f"--operation {operation!r}: it is add or ablate")
    open_direction(vector, hook=hook, force=True)  # a bad file is refused before a model is loaded
    loaded = load_model(model, device=device)
    given = open_direction(vector, loaded, hook=hook, force=force)
    a_row = [s for s in strength for _ in prompts]
    doing = add(given, a_row, positions) if operation == "add" else ablate(given, a_row, positions, hooks=EVERYWHERE)
    before = loaded.generate(prompts, max_new_tokens=max_new_tokens)
    with steering(loaded, doing, force=force):
        after = loaded.generate(prompts * len(strength), max_new_tokens=max_new_tokens)
    n = len(prompts)
    rows = [
        {"prompt": p, "unsteered": before[i],
         "steered": [{"strength": s, "text": after[j * n + i]} for j, s in enumerate(strength)]}
        for i, p in enumerate(prompts)
    ]  # fmt: skip
    shown = []
    for row in rows:
        shown += [f"prompt     {row['prompt']}", f"unsteered {row['unsteered']}"]
        shown += [f"{part['strength']:<9g} {part['text']}" for part in row["steered"]]
    what = {"hook": given.hook, "operation": operation, "positions": positions}
    emit({**what, "texts": rows}, as_json, shown)


def _examples(
    positive: Path | None, negative: Path | None, data: Path | None, pairs: Path | None, label: str | None
) -> Any:
    """Return labelled examples from whichever of the three sources was given."""
    from interp.concepts.labelled.examples import make_examples, read_examples, read_pairs

    given = [data is not None, pairs is not None, positive is not None or negative is not None]
    if sum(given) != 1 or (positive is None) != (negative is None):
        say("error: give --data, or --pairs, or both --positive and --negative where the command has them")
        raise typer.Exit(USAGE)
    if data is not None:
        return read_examples(data, positive=label)
    if pairs is not None:
        return read_pairs(pairs)
    assert positive is not None and negative is not None
    texts = [lines(positive), lines(negative)]
    return make_examples(texts[0] + texts[1], [1] * len(texts[0]) + [0] * len(texts[1]))


@app.command(epilog="Example: interp effects tiny --vector glad.safetensors --labelled other.csv --prompts p.jsonl")
def effects(
    model: ModelArg,
    vector: Vector,
    prompts: Annotated[Path, typer.Option(help="jsonl with prompt, match and other: answers with and without it")],
    labelled: Annotated[
        Path | None, typer.Option(help="other labelled texts, for the classifier that re-reads")
    ] = None,
    label: Positive = None,
    fitted_on: Annotated[Path | None, typer.Option(help="the direction's own texts, to refuse any that recur")] = None,
    neutral: Annotated[str | None, typer.Option(help="text:FILE or jsonl:FILE to measure damage on (24 texts)")] = None,
    strength: Annotated[list[float] | None, typer.Option(help="in median residual norms; repeat it")] = None,
    placebos: Annotated[int, typer.Option(help="random directions of equal norm")] = 20,
    shuffled: Annotated[int, typer.Option(help="directions fitted to shuffled labels")] = 10,
    positions: Annotated[str, typer.Option(help="all, from_last_prompt_token")] = "all",
    max_new_tokens: Annotated[int, typer.Option(help="tokens to add")] = 20,
    kl_budget: Annotated[float, typer.Option(help="nats a token of neutral text")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="write a page, such as effects.html")] = None,
    hook: At = None,
    force: Force = False,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure what steering does and costs, at every strength beside its nulls; recommend one strength, or none."""
    from interp.concepts.effects.calls import measure_effects
    from interp.concepts.effects.margins import read_prompts
    from interp.concepts.labelled.examples import read_examples
    from interp.concepts.reading.files import open_direction
    from interp.model.loading import load_model
    from interp.report.effects import effects_page, effects_table
    from interp.report.pages import write_report

    asked = read_prompts(prompts)
    texts = None if labelled is None else read_examples(labelled, positive=label)
    own = None if fitted_on is None else [str(text) for text in read_examples(fitted_on, positive=label).texts]
    loaded = load_model(model, device=device)
    given = open_direction(vector, loaded, hook=hook, force=force)
    more: dict[str, Any] = {"strengths": strength} if strength else {}
    found = measure_effects(
        loaded, given, asked, labelled=texts, fitting_texts=own, neutral_texts=neutral, n_random=placebos,
        n_shuffled=shuffled, positions=positions, max_new_tokens=max_new_tokens, kl_budget=kl_budget, seed=seed,
        progress=None if quiet else _tick(), **more,
    )  # fmt: skip
    if out is not None:
        write_report(effects_page(found), out)
    table = effects_table(found)
    titles = [column if isinstance(column, str) else column.name for column in table.columns]
    shown = [*table_lines(titles, table.rows), found.reason]
    emit(found.to_dict(), as_json, shown if out is None else [*shown, str(out)])


@app.command(epilog="Example: interp bake tiny --vector glad.safetensors --ablate --out without-glad")
def bake(
    model: ModelArg,
    vector: Vector,
    out: Annotated[Path, typer.Option(help="a new folder, for transformers and serving engines")],
    strength: Annotated[float | None, typer.Option(help="add so much of it, in median residual norms")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="take it out of everything that writes the stream")] = False,
    approximate: Annotated[bool, typer.Option("--approximate", help="where norms stand behind the writers")] = False,
    hook: At = None,
    force: Force = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Put steering into the weights: an ordinary Hugging Face folder, checked against the same steering by hooks."""
    from interp.concepts.reading.files import open_direction
    from interp.concepts.steering.baking import bake as baking
    from interp.concepts.steering.operations import EVERYWHERE, add
    from interp.concepts.steering.operations import ablate as ablating
    from interp.model.loading import load_model

    if ablate == (strength is not None):
        say("error: give either --ablate or --strength")
        raise typer.Exit(USAGE)
    loaded = load_model(model, device=device)
    given = open_direction(vector, loaded, hook=hook, force=force)
    doing = add(given, strength, "all") if strength is not None else ablating(given, positions="all", hooks=EVERYWHERE)
    baked = baking(loaded, doing, out=out, force=force, approximate=approximate)
    found = baked.record()
    emit(
        found,
        as_json,
        [f"{out}: {len(baked.edited)} parameters changed, outputs within {baked.difference:.1e} of hooks"],
    )


def _tick() -> Any:
    """Return a function that keeps one line on stderr of what is under way."""
    import sys

    before: list[str] = []

    def note(what: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what} {done}/{total}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif before != [what]:
            before[:] = [what]
            say(what)

    return note

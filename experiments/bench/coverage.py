"""Which causal model types of transformers interp captures exactly: a table of all of them, built tiny and random.

    python experiments/bench/coverage.py                    # every type; writes coverage.md and coverage.json
    python experiments/bench/coverage.py llama mamba xlnet  # some types; prints, writes nothing

Each type runs in a process of its own with a time limit. What interp reads at resid_pre and resid_post is held, bit
for bit, against a recorder that shares no code with it (it wraps the blocks' forward methods in a plain call of the
model), and against the model's own hidden states where it returns one more of them than it has blocks.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import queue
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

from interp.model.anatomy import AnatomyError
from interp.model.hooks import reading
from interp.model.loading import load_model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
tiny_models: Any = importlib.import_module("tiny_models")
os.environ["HF_HUB_OFFLINE"] = "1"
IDS = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(3))
COLUMNS = (
    "type",
    "class",
    "blocks",
    "result",
    "hidden states",
    "attn and mlp",
    "left pads",
    "documents",
    "why not",
)


def record(hf: Any, blocks: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return what the blocks take and give in a plain forward, noted by wrapping their forward methods."""
    taken: list[Any] = [None] * len(blocks)
    given: list[Any] = [None] * len(blocks)
    for i, block in enumerate(blocks):

        def noted(*args: Any, _at: int = i, _inner: Any = block.forward, **kwargs: Any) -> Any:
            if taken[_at] is not None:
                raise RuntimeError(f"block {_at} runs more than once")
            stream = args[0] if args else kwargs["hidden_states"]
            taken[_at] = stream.detach().clone()
            out = _inner(*args, **kwargs)
            given[_at] = (out if torch.is_tensor(out) else out[0]).detach().clone()
            return out

        block.forward = noted
    try:
        with torch.no_grad():
            hf(input_ids=IDS, use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return taken, given


def compare(hf: Any, row: dict[str, str]) -> None:
    """Fill in the row of one model that interp has loaded."""
    model = load_model(hf)
    row["blocks"] = model.blocks_path
    kinds = Counter(p.kind for p in model.hook_points())
    row["attn and mlp"] = f"{kinds['attn_out']} of {model.n_layers}"
    if kinds["attn_out"] == 0:
        row["why not"] = model.hook_point("resid_post.0").meaning.rpartition(": ")[2]
    blocks = list(hf.get_submodule(model.blocks_path))
    taken, given = record(hf, blocks)
    got: dict[str, torch.Tensor] = {}
    with reading(model, ["resid_pre.*", "resid_post.*"], lambda name, value: got.__setitem__(name, value.clone())):
        model.run(IDS)
    same = all(
        torch.equal(got[f"blocks.{i}.hook_resid_pre"], taken[i])
        and torch.equal(got[f"blocks.{i}.hook_resid_post"], given[i])
        for i in range(len(blocks))
    )
    row["result"] = "exact" if same else "WRONG"
    with torch.no_grad():
        states = getattr(hf(input_ids=IDS, use_cache=False, output_hidden_states=True), "hidden_states", None)
    row["hidden states"] = against_states(states, taken, given)
    if row["hidden states"] == "differ":
        row["result"] = "WRONG"
    shared_rows(model, row)


def shared_rows(model: Any, row: dict[str, str]) -> None:
    """Fill in whether left-padded rows, and documents that share a row, give what they give alone (to 1e-5)."""
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[0, :4] = False
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    hook, got = f"resid_post.{model.n_layers - 1}", {}

    def last(*args: Any, **kwargs: Any) -> torch.Tensor:
        with reading(model, hook, lambda name, value: got.update(x=value.clone())):
            model.run(*args, **kwargs)
        return got["x"]

    alone = last(IDS[:1, 4:])[0]
    for column, call in (
        ("left pads", lambda: last(IDS, mask)),
        ("documents", lambda: last(IDS, positions=positions)),
    ):
        try:
            gap = (call()[0, 4:] - alone).abs().max() / alone.abs().max()
            row[column] = "equal" if gap < 1e-5 else "WRONG"
        except AnatomyError:
            row[column] = "refused"
        if row[column] == "WRONG":
            row["result"] = "WRONG"


def against_states(states: Any, taken: list[Any], given: list[Any]) -> str:
    """Say how the recorded values stand to the model's own hidden states."""
    n = len(taken)
    if states is None:
        return "none given"
    if len(states) != n + 1:
        return f"{len(states)} for {n} blocks"
    if all(torch.equal(states[i], taken[i]) for i in range(n)):
        return "equal"
    if all(torch.equal(states[i], given[i]) for i in range(n)):
        return "equal, counted from the first block's output"
    return "differ"


def job(model_type: str, answers: Any) -> None:
    """Put the row of one type on the queue."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row = dict.fromkeys(COLUMNS, "") | {"type": model_type, "class": TYPES[model_type]}
    try:
        hf = tiny_models.make_model(model_type, TYPES[model_type], tiny_models.CHANGES.get(model_type))
        with torch.no_grad():
            hf(input_ids=IDS, use_cache=False)
    except Exception as error:
        answers.put(row | {"result": "not built", "why not": _line(error)})
        return
    try:
        compare(hf, row)
    except (ValueError, TypeError) as error:
        row |= {"result": "refused" if not row["result"] else "WRONG", "why not": _line(error)}
    except Exception as error:
        row |= {"result": "CRASHED", "why not": _line(error)}
    answers.put(row)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:240]}"


def run_one(model_type: str, limit: float) -> dict[str, str]:
    """Return the row of one type, run in a forked process that may take `limit` seconds."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=job, args=(model_type, answers))
    process.start()
    try:
        return answers.get(timeout=limit)
    except queue.Empty:
        why = f"no answer in {limit:.0f} s" if process.is_alive() else f"ended with code {process.exitcode}"
        return dict.fromkeys(COLUMNS, "") | {
            "type": model_type,
            "class": TYPES[model_type],
            "result": "not built",
            "why not": why,
        }
    finally:
        process.kill()
        process.join()


def write(rows: list[dict[str, str]]) -> None:
    """Write coverage.json and coverage.md beside this file."""
    counts = dict(Counter(row["result"] for row in rows))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    paper = {"versions": versions, "counts": counts, "rows": rows}
    (HERE / "coverage.json").write_text(json.dumps(paper, indent=1) + "\n", encoding="utf-8")
    total = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    lines = [
        "# Causal model types: is what interp captures the model's own?",
        "",
        f"Made by `python experiments/bench/coverage.py` (transformers {versions['transformers']}, torch "
        f"{versions['torch']}, CPU, float32, random weights, 2 x 9 tokens). Of {len(rows)} types: {total}.",
        "",
        "*exact*: resid_pre and resid_post of every block equal, bit for bit, what a recorder without any of interp's "
        "code sees in a plain forward, and the model's hidden states where the column says so. *refused*: load_model "
        "raises the error shown. *not built*: no tiny model of the type could be made or run here. *attn and mlp*: "
        "blocks whose attn_out and mlp_out are established (their sum with resid_pre is resid_post). *left pads*, "
        "*documents*: rows padded on the left, documents that share a row: they give what they give alone, or are "
        "refused.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(row[c] for c in COLUMNS) + " |" for row in rows]
    (HERE / "coverage.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    """Run the types asked for; exit status 1 where one is wrong or crashed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types (all, and the table is written, where none is named)")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds a type may take (default 90)")
    options = parser.parse_args()
    unknown = [t for t in options.types if t not in TYPES]
    if unknown:
        parser.error(f"no causal model types: {', '.join(unknown)}")
    transformers.logging.set_verbosity_error()
    start, rows = time.monotonic(), []
    for model_type in options.types or TYPES:
        row = run_one(model_type, options.limit)
        rows.append(row)
        print(f"{time.monotonic() - start:5.0f} s", *(row[c] for c in COLUMNS if row[c]), sep=" | ", flush=True)
    if not options.types:
        write(rows)
    print(dict(Counter(row["result"] for row in rows)))
    return int(any(row["result"] in ("WRONG", "CRASHED") for row in rows))


if __name__ == "__main__":
    sys.exit(main())

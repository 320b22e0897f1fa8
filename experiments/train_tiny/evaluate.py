"""Measure the bundled model, each figure beside its null, and write result.json.

    python experiments/train_tiny/evaluate.py --text FOLDER [--model interp/data/tiny] [--peer FOLDER]

FOLDER holds tinystories/valid_v1_head.txt, which training never saw. --peer names another model folder whose bits per
character are measured on the same text.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

import interp
from interp.acts.capture import capture_acts, pool
from interp.acts.resampling import auroc, grouped_folds
from interp.concepts.reading.probes import evaluate_probe, fit_probe
from interp.data import generator, lists
from interp.model.loading import untrained
from interp.space.analogy import choose_and_score
from interp.space.words import layer_spaces, whole_words

HERE = Path(__file__).parent
CHARACTERS, WINDOW, BATCH = 300_000, 256, 16
PROMPTS = (
    "Once upon a time, there was a little girl named",
    "Tom and his dog went to the park.",
    "One day, the king said to the queen,",
    "The capital of France is",
    "It was raining, so the children",
)
PROBE_N, PROBE_CS = 1500, (0.003, 0.03)  # sentences; inverse penalties to choose from


def bits_per_character(model, text: str) -> float:
    """Return bits per character over windows of WINDOW tokens, each after one BOS."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    nats = 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            width = max(map(len, part))
            block = torch.full((len(part), width + 1), model.tokenizer.bos_token_id)
            mask = torch.zeros(len(part), width, dtype=torch.bool)
            for i, row in enumerate(part):
                block[i, 1 : len(row) + 1] = torch.tensor(row)
                mask[i, : len(row)] = True
            logits = model.hf(block[:, :-1], use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), block[:, 1:], reduction="none")
            nats += losses[mask].double().sum().item()
    return nats / math.log(2) / len(text)


def hooks_of(model) -> list[str]:
    return ["embed", *(f"resid_post.{i}" for i in range(model.n_layers))]


def analogies(model) -> dict:
    """Return scores over the bundled relations at the layer chosen on the other half of the pairs."""
    words = list(whole_words(model.tokenizer))
    spaces = {name: space.centred() for name, space in layer_spaces(model, words, hooks_of(model)).items()}
    out: dict = {"candidates": len(words)}
    for method, by in (("3cosadd", "accuracy"), ("3cosmul", "accuracy"), ("lrcos", "honest")):
        choice = choose_and_score(spaces, lists.relations(), method, by=by)
        scored = choice.chosen
        out[method] = {
            "layer": choice.layer, "accuracy": choice.accuracy, "honest": choice.honest, "only_b": choice.only_b,
            "n": scored.n, "interval": list(choice.interval),
            "by_relation": {k: [round(v.accuracy, 3), round(v.honest, 3)] for k, v in scored.by_relation.items()},
        }  # fmt: skip
    return out


def binary(data: generator.Labelled, label: str) -> list[int]:
    return [int(found == label) for found in data.labels]


def inner_score(x: torch.Tensor, data: generator.Labelled, classes: list[str], c: float) -> float:
    """Return the mean AUROC over folds of the training templates: what layer and penalty are chosen by."""
    scores = []
    for train, test in grouped_folds(data.templates, 5, seed=0):
        for label in classes:
            y = np.array(binary(data, label))
            probe = fit_probe(x[train], y[train], C=c)
            scores.append(auroc(probe.decision(x[test]), y[test]))
    return sum(scores) / len(scores)


def probes(model) -> dict:
    """Return AUROC on held-out templates, with words the probe has seen and with words it has not.

    Layer and penalty are chosen by folds of the training templates, so no test sentence has a part in it.
    """
    out = {}
    hooks = [f"resid_post.{layer}" for layer in range(model.n_layers)]
    for attribute in generator.LABELLED:
        train = generator.labelled(attribute, split="train", words="a", n=PROBE_N)
        acts = capture_acts(model, train.texts, hooks)
        kinds = sorted(set(train.labels))
        classes = kinds if len(kinds) > 2 else kinds[:1]
        pooled = {hook: pool(acts, hook) for hook in hooks}
        scores = {(h, c): inner_score(pooled[h], train, classes, c) for h in hooks for c in PROBE_CS}
        hook, strength = max(scores, key=lambda cell: scores[cell])
        out[attribute] = {"layer": hook, "C": strength}
        for name, half in (("seen_words", "a"), ("unseen_words", "b")):
            test = generator.labelled(attribute, split="held_out", words=half, n=PROBE_N, seed=1)
            x_test = pool(capture_acts(model, test.texts, [hook]), hook)
            results = [
                evaluate_probe(
                    pooled[hook], binary(train, k), x_test, binary(test, k), groups_train=train.templates,
                    groups_test=test.templates, C=strength, n_shuffles=100,
                )
                for k in classes
            ]  # fmt: skip
            out[attribute][name] = {
                key: sum(getattr(r, key) for r in results) / len(results)
                for key in ("auroc", "control", "random_direction")
            } | {"low": min(r.interval[0] for r in results)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--peer")
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    args = parser.parse_args()
    began = time.time()
    text = (args.text / "tinystories" / "valid_v1_head.txt").read_text(encoding="utf8")[:CHARACTERS]
    model = interp.load_model(args.model, dtype=torch.float32)
    null = untrained(model, 1)
    continued = model.generate(list(PROMPTS), max_new_tokens=50)
    result = {
        "parameters": sum(p.numel() for p in model.hf.parameters()),
        "bits_per_character": {"tiny": bits_per_character(model, text), "untrained": bits_per_character(null, text)},
        "greedy": dict(zip(PROMPTS, continued, strict=True)),
        "analogies": {"tiny": analogies(model), "untrained": analogies(null)},
        "probes": {"tiny": probes(model), "untrained": probes(null)},
        "versions": {"torch": torch.__version__},
    }
    if args.peer:
        AutoConfig.from_pretrained(args.peer)  # a missing folder fails here, not after the long part
        peer = interp.load_model(args.peer)
        result["bits_per_character"][Path(args.peer).name] = bits_per_character(peer, text)
    result["seconds"] = round(time.time() - began, 1)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

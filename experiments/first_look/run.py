"""Is sentiment a direction in small story models? Read it layer by layer, then steer with it.

    python experiments/first_look/run.py [--model FOLDER ...]

Runs on the bundled `tiny` and on every further model folder named; writes result.json and figure.svg beside itself.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import interp
from interp.acts.capture import capture_acts, pool
from interp.concepts.effects.calls import NoUsableStrengthError, effects
from interp.concepts.reading.probes import evaluate_probe
from interp.data import generator
from interp.demo.parts import DEV_PROMPTS, KL_BUDGET, STRENGTHS, TEST_PROMPTS
from interp.model.loading import untrained

HERE = Path(__file__).parent
N = 400
SEED = 0


def labels(data: generator.Labelled) -> list[int]:
    return [int(label == "positive") for label in data.labels]


def read(model: Any) -> list[dict[str, Any]]:
    """Return, a layer, the probe's AUROC on templates and words that its training never held, with its nulls."""
    train = generator.labelled("sentiment", split="train", words="a", n=N, seed=SEED)
    test = generator.labelled("sentiment", split="held_out", words="b", n=N, seed=SEED + 1)
    hooks = [f"resid_post.{layer}" for layer in range(model.n_layers)]
    acts = [capture_acts(model, data.texts, hooks) for data in (train, test)]
    rows = []
    for hook in hooks:
        x_train, x_test = (pool(a, hook, "mean") for a in acts)
        found = evaluate_probe(
            x_train, labels(train), x_test, labels(test), groups_train=train.templates, groups_test=test.templates,
            C=0.05, seed=SEED,
        )  # fmt: skip
        rows.append({"layer": hook, "auroc": found.auroc, "interval": list(found.interval), "control": found.control,
                     "random_direction": found.random_direction, "p_value": found.p_value})  # fmt: skip
    return rows


def steer(model: Any) -> dict[str, Any]:
    """Return the effect of the mean difference at the middle layer beside 20 random directions of equal norm."""
    hook = model.hook_point(f"resid_post.{(model.n_layers - 1) // 2}").name
    train = generator.labelled("sentiment", split="train", words="a", n=N, seed=SEED)
    rows = pool(capture_acts(model, train.texts, [hook]), hook, "mean")
    direction = interp.fit_direction(rows, labels(train), hook=hook, model=model)
    reader = interp.fit_probe(rows, labels(train), C=0.05)

    def score(texts: list[str]) -> list[float]:
        filled = [text if text.strip() else "." for text in texts]
        return torch.sigmoid(reader.decision(pool(capture_acts(model, filled, [hook]), hook, "mean"))).tolist()

    try:
        moved = effects(
            model, direction, TEST_PROMPTS, dev_prompts=DEV_PROMPTS, strengths=STRENGTHS, score=score,
            n_placebo=20, neutral_texts=generator.sample_texts(24, seed=9_000 + SEED), kl_budget=KL_BUDGET, seed=SEED,
        )  # fmt: skip
    except NoUsableStrengthError as error:
        return {"hook": hook, "none": str(error)}
    return {
        "hook": hook, "strength": moved.chosen, "effect": moved.effect, "interval": list(moved.interval),
        "placebo_mean": moved.placebo_mean, "placebo_sd": moved.placebo_sd, "in_placebo_sd": moved.in_placebo_sd,
        "placebo_effects": list(moved.placebo_effects),
        "texts": [[x.prompt, x.unsteered, x.steered] for x in moved.samples[:3]],
    }  # fmt: skip


def draw(results: dict[str, Any]) -> str:
    """Return an SVG: AUROC over layers for each model, trained (solid), untrained and shuffled labels (dashed)."""
    width, height, pad = 380, 260, 46
    parts = []
    for i, (name, found) in enumerate(results.items()):
        left = i * width

        def at(layer: int, value: float, n: int, left: int = left) -> str:
            x = left + pad + layer / max(1, n - 1) * (width - 2 * pad)
            return f"{x:.1f},{height - pad - (value - 0.4) / 0.6 * (height - 2 * pad):.1f}"

        parts.append(f'<text x="{left + pad}" y="24" font-weight="600">{name}</text>')
        for value in (0.4, 0.6, 0.8, 1.0):
            y = at(0, value, 2).split(",")[1]
            parts.append(f'<text x="{left + 8}" y="{y}" dy="4" font-size="11">{value:.1f}</text>')
            end = left + width - pad
            parts.append(f'<line x1="{left + pad}" x2="{end}" y1="{y}" y2="{y}" stroke="#d6dbe1"/>')
        series = {
            "trained": ([r["auroc"] for r in found["trained"]], "#0b6e4f", ""),
            "untrained": ([r["auroc"] for r in found["untrained"]], "#8a5a00", "6 3"),
            "shuffled labels": ([r["control"] for r in found["trained"]], "#6b7280", "2 3"),
        }
        for k, (label, (values, color, dash)) in enumerate(series.items()):
            points = " ".join(at(j, v, len(values)) for j, v in enumerate(values))
            line = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'
            parts.append(f'<polyline points="{points}" {line}/>')
            x, y = left + pad + 104 * k, height - 8
            parts.append(f'<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" {line}/>')
            parts.append(f'<text x="{x + 22}" y="{y}" font-size="11">{label}</text>')
        n = len(found["trained"])
        for j in range(n):
            x = at(j, 0.4, n).split(",")[0]
            parts.append(f'<text x="{x}" y="{height - pad + 16}" text-anchor="middle" font-size="11">{j}</text>')
    total = width * len(results)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" font-family="sans-serif" '
    title = "<title>Held-out AUROC of a sentiment probe by layer</title>"
    back = f'<rect width="{total}" height="{height}" fill="#ffffff"/>'
    return head + f'font-size="13" fill="#111827">{title}{back}{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="a further model folder; may be repeated")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for source in ["tiny", *args.model]:
        began = time.perf_counter()
        model = interp.load_model(source, dtype=torch.float32)
        name = Path(source).name
        results[name] = {
            "trained": read(model),
            "untrained": read(untrained(model, SEED + 1)),
            "steering": steer(model),
        }
        results[name]["seconds"] = round(time.perf_counter() - began, 1)
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    (HERE / "result.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    (HERE / "figure.svg").write_text(draw(results), encoding="utf8")


if __name__ == "__main__":
    main()

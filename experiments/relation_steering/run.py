"""Does a relation's offset, added while the model writes, turn a word into its relative? -> result.json.

    python experiments/relation_steering/run.py

On the bundled `tiny`. A prompt makes the model say a word again ("The song was about the dog. The song was about the"
-> "dog"). The offset of a relation is the mean residual of the answer words (dogs, ...) minus that of the query words
(dog, ...), each word alone, over half of the pairs. It is added at the hook point that it was read at, or, where it was
read at the embedding, at any later one. Where, at which tokens and how strongly (the weakest of the best) is chosen on
these pairs; the other half of the pairs is steered so.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import interp
from interp.acts.capture import capture_acts, pool
from interp.acts.direction import Direction, direction_from
from interp.concepts.effects.margins import Contrast, margins
from interp.concepts.effects.nulls import random_directions
from interp.concepts.effects.writing import write
from interp.data.lists import relations
from sae.stats import bootstrap_interval

HERE = Path(__file__).parent
SEED, N_NULL = 0, 20
POSITIONS = ("all", "from_last_prompt_token")
STRENGTHS = (0.4, 0.8, 1.2, 2.0)  # in median residual norms of the hook point
EMBED = "resid_pre.0"
PROMPTS = {
    "country_capital": (
        "The borders of {a} are wide. The borders of", "The flag of {a} flies over us. The flag of",
        "The president of {a} spoke. The president of", "The map shows {a}. The map shows",
    ),
    "capital_country": (
        "Tom flew to {a}. Then Lily flew to", "Everyone in {a} is happy. Everyone in",
        "Two friends met in {a}. They met again in", "Tom was born in {a}. Lily was born in",
    ),
    "singular_plural": (
        "The song was about the {a}. The song was about the", "Tom asked about the {a}. Lily asked about the",
        "The rain fell on the {a}. The sun shone on the", "Tom dreamed about the {a}. He dreamed about the",
    ),
    "male_female": (
        "The {a} said hello. We saw the", "The {a} sat down. The", "Tom met the {a}. Then Lily met the",
    ),
    "base_comparative": (
        "The box is {a}. The box is", "The box was very {a}. The tree was very", "How {a} it is! How",
    ),
    "low_high": (
        "They chose the {a} one. We chose the", "Tom wants something {a}. Lily wants something",
        "The box is {a}. The box is",
    ),
}  # fmt: skip


def halves(pairs: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the pairs that the offset is fitted on, and those that it is tried on."""
    order = np.random.default_rng(SEED).permutation(len(pairs))
    half = len(pairs) // 2
    return [pairs[i] for i in order[:half]], [pairs[i] for i in order[half:]]


def word_rows(model: Any, words: Sequence[str], hook: str) -> torch.Tensor:
    """Return the residual of each word, alone behind BOS."""
    return pool(capture_acts(model, [f" {word}" for word in words], [hook]), hook, "last").double()


def offset(
    model: Any, pairs: Sequence[tuple[str, str]], read: str, hook: str, flips: np.ndarray | None = None
) -> Direction:
    """Return the mean of answer - query over the pairs, read at one hook point, as a direction of another.

    With flips (+1, -1 or 0 a pair) some pairs go the other way round, or are left out.
    """
    a, b = (word_rows(model, words, read) for words in zip(*pairs, strict=True))
    signs = torch.ones(len(pairs)) if flips is None else torch.from_numpy(flips)
    return direction_from(((b - a) * signs[:, None]).mean(0), hook=hook, model=model, method="offset")


def ask(
    model: Any, pairs: Sequence[tuple[str, str]], relation: str, pushes: Sequence, positions: str
) -> dict[str, Any]:
    """Return margin [pushes, pairs] (nats) and share of right greedy answers [pushes, pairs], mean over the prompts."""
    frames = PROMPTS[relation]
    prompts = [Contrast(prompt=f.format(a=a), match=f" {b}", other=f" {a}") for a, b in pairs for f in frames]
    margin = margins(model, prompts, pushes, positions=positions)
    written = write(model, [p.prompt for p in prompts], pushes, max_new_tokens=1, positions=positions)
    right = np.array([[t.strip() == p.match.strip() for t, p in zip(w.texts, prompts, strict=True)] for w in written])
    shape = (len(pushes), len(pairs), len(frames))
    return {"margin": margin.reshape(shape).mean(2), "right": right.reshape(shape).astype(float).mean(2)}


def study(model: Any, relation: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return what the offset does on pairs it was not fitted on, beside random and flipped offsets of equal norm."""
    fitted, tried = halves(pairs)
    hooks = [EMBED, *(f"resid_post.{i}" for i in range(model.n_layers))]
    cells = [(hook, hook, positions) for hook in hooks for positions in POSITIONS]
    cells += [(EMBED, hook, "from_last_prompt_token") for hook in hooks[1:]]
    grid = []
    for read, hook, positions in cells:
        direction = offset(model, fitted, read, hook)
        found = ask(model, fitted, relation, [(direction, s) for s in STRENGTHS], positions)
        for i, s in enumerate(STRENGTHS):
            cell = {"read": read, "hook": hook, "positions": positions, "strength": s}
            grid.append(cell | {name: round(float(found[name][i].mean()), 4) for name in ("right", "margin")})
    best = max(grid, key=lambda c: (c["right"], -c["strength"], c["margin"]))
    return {"n_fitted": len(fitted), "n_tried": len(tried), "chosen": best, "grid": grid} | at_best(
        model, relation, fitted, tried, best
    )


def at_best(model: Any, relation: str, fitted: Sequence, tried: Sequence, best: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the chosen cell with their nulls, all at the same strength."""
    rng = np.random.default_rng(SEED + 1)
    read, hook, strength = best["read"], best["hook"], best["strength"]
    direction = offset(model, fitted, read, hook)
    # exactly half of the pairs turned round (one of an odd number left out): the least surplus one way, brought to the
    # offset's norm, is the offset again
    half = len(fitted) // 2
    flips = [rng.permutation([1.0] * half + [-1.0] * half + [0.0] * (len(fitted) % 2)) for _ in range(N_NULL)]
    flipped = [offset(model, fitted, read, hook, f) for f in flips]
    directions = [direction, *random_directions(direction, N_NULL, SEED), *flipped]
    pushes = [(direction, 0.0), *((d, strength) for d in directions)]
    found = ask(model, tried, relation, pushes, best["positions"])
    out: dict[str, Any] = {}
    for name, values in found.items():
        change = values[1:] - values[0]
        null, turned = change[1 : 1 + N_NULL].mean(1), change[1 + N_NULL :].mean(1)
        out[name] = {
            "unsteered": float(values[0].mean()), "steered": float(values[1].mean()),
            "change": float(change[0].mean()), "interval": list(bootstrap_interval(change[0], seed=SEED)),
            "random_mean": float(null.mean()), "random_sd": float(null.std(ddof=1)), "random_max": float(null.max()),
            "flipped_mean": float(turned.mean()), "flipped_max": float(turned.max()),
            "p_random": float((1 + (null >= change[0].mean()).sum()) / (1 + N_NULL)),
            "p_flipped": float((1 + (turned >= change[0].mean()).sum()) / (1 + N_NULL)),
        }  # fmt: skip
    return out


def main() -> None:
    torch.set_num_threads(1)
    model = interp.load_model("tiny")
    known = relations()
    result = {"model": model.name, "fingerprint": model.fingerprint, "seed": SEED, "n_null": N_NULL, "relations": {}}
    known["capital_country"] = [(capital, country) for country, capital in known["country_capital"]]
    for relation in PROMPTS:
        found = study(model, relation, known[relation])
        result["relations"][relation] = found
        c, r, m = found["chosen"], found["right"], found["margin"]
        print(
            f"{relation}: {c['read']} at {c['hook']}, {c['positions']}, strength {c['strength']:g}; right "
            f"{r['unsteered']:.2f} -> {r['steered']:.2f} (random at most +{r['random_max']:.2f}, flipped "
            f"+{r['flipped_max']:.2f}); margin {m['unsteered']:.2f} {m['change']:+.2f} {np.round(m['interval'], 2)} "
            f"(random {m['random_mean']:+.2f} sd {m['random_sd']:.2f}, flipped at most {m['flipped_max']:+.2f})",
            flush=True,
        )
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()

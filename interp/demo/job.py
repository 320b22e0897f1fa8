"""Run the main job: every part in turn, then report.html and run.json."""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from interp.concepts.effects.calls import Effects
from interp.demo import parts
from interp.demo.page import build_page
from interp.model.loading import load_model
from interp.report.pages import write_report
from sae.io import write_json

SAE_STEPS = 250
VERSIONS = ("interp", "torch", "transformers", "transformer-lens", "numpy", "scikit-learn", "plotly")


def run_demo(
    model: Any = "tiny",
    *,
    dataset: str | None = None,
    out: str | Path = "demo",
    hook: str | None = None,
    tokens: int = 200_000,
    seed: int = 0,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write report.html and run.json into `out` and return the figures, each beside its null.

    A part that the model or text cannot be asked for is listed under `left_out` with the reason.
    Raises MissingError for a model or file that is not there, ValueError for a text too short to learn from.
    """
    began = time.perf_counter()
    loaded = load_model(model, device=device)
    name = loaded.hook_point(hook or f"resid_post.{(loaded.n_layers - 1) // 2}").name
    job = parts.Job(model=loaded, hook=name, seed=seed, say=say)
    seconds: dict[str, float] = {"load": time.perf_counter() - began}
    left_out: dict[str, str] = {}
    found: dict[str, Any] = {}
    steps: list[tuple[str, str, Callable[[], Any]]] = [
        ("capture", f"capture {tokens:,} tokens at {name}", lambda: parts.capture(job, dataset, tokens)),
        ("sae", "train a sparse autoencoder", lambda: parts.decompose(job, found["capture"], steps=SAE_STEPS)),
        ("probe", "find and probe the sentiment direction", lambda: parts.probe(job)),
        ("steer", "steer generation", lambda: parts.steering(job, found["probe"], found.get("sae"))),
        ("analogy", "answer analogies at every layer", lambda: parts.analogies(job)),
        ("map", "map three topics", lambda: parts.topics(job)),
    ]
    for number, (key, text, run) in enumerate(steps, 1):
        say(f"[{number}/{len(steps) + 1}] {text}")
        started = time.perf_counter()
        try:
            found[key] = run()
        except parts.LeftOut as reason:
            left_out[key] = str(reason)
            say(f"      left out: {reason}")
        seconds[key] = time.perf_counter() - started
    say(f"[{len(steps) + 1}/{len(steps) + 1}] write the report")
    result = summary(found) | {"left_out": left_out}
    result["config"] = {
        "model": loaded.name, "fingerprint": loaded.fingerprint, "hook": name, "dataset": found["capture"].source,
        "tokens": len(found["capture"].train), "sae_steps": SAE_STEPS, "seed": seed, "device": str(loaded.device),
    }  # fmt: skip
    result["versions"] = {"python": platform.python_version()} | {package: version(package) for package in VERSIONS}
    result["made"] = datetime.now(UTC).isoformat(timespec="seconds")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(build_page(found, result), folder / "report.html")
    seconds["total"] = time.perf_counter() - began
    result |= {
        "timings": {key: round(value, 1) for key, value in seconds.items()},
        "seconds": round(seconds["total"], 1),
    }
    write_json(folder / "run.json", result)
    say(f"      {seconds['total']:.0f} s: {folder / 'report.html'}")
    return result


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the parts that ran, as JSON holds them."""
    out: dict[str, Any] = {}
    if made := found.get("sae"):
        out["sae"] = {
            "fve": made.evaluation.fve, "l0": made.evaluation.l0, "dead": made.dead,
            "tokens_seen": made.tokens_seen, "ce_recovered": made.splice.recovered,
            "ce_recovered_zero": made.splice.recovered_zero, "losses": made.splice.to_dict(),
            "d_sae": made.sae.d_sae, "held_out_tokens": made.evaluation.tokens, "train_seconds": round(made.seconds, 1),
        }  # fmt: skip
    if probed := found.get("probe"):
        out["probe"] = probed.result.to_dict() | {"unseen_words": probed.unseen.to_dict()}
    if steered := found.get("steer"):
        out["steer"] = steer_summary(steered.effects) | {
            "cached_equals_uncached": steered.cached_equals_uncached,
            "latent": steer_summary(steered.latent_effects) | {"index": steered.latent},
        }
    if asked := found.get("analogy"):
        out["analogy"] = asked.arithmetic.to_dict() | {
            "class_aware": asked.class_aware.to_dict(), "n_relations": asked.n_relations, "examples": asked.examples,
        }  # fmt: skip
    if drawn := found.get("map"):
        out["map"] = drawn.quality.to_dict() | {"explained": drawn.explained}
    return out


def steer_summary(measured: Effects) -> dict[str, Any]:
    """Return what matters of a dose curve: `effect` is in placebo standard deviations, `raw_effect` in score."""
    dose = next(d for d in measured.doses if d.strength == measured.chosen)
    return {
        "effect": measured.in_placebo_sd, "raw_effect": measured.effect, "interval": list(measured.interval),
        "placebo_mean": measured.placebo_mean, "placebo_sd": measured.placebo_sd,
        "n_placebo": len(measured.placebo_effects), "strength": measured.chosen, "kl": dose.kl,
        "kl_budget": measured.kl_budget, "nll": measured.nll, "unsteered_nll": measured.unsteered_nll,
        "distinct2": measured.distinct2, "unsteered_distinct2": measured.unsteered_distinct2,
        "doses": [asdict(d) for d in measured.doses],
        "texts": [{"prompt": x.prompt, "unsteered": x.unsteered, "steered": x.steered} for x in measured.samples],
    }  # fmt: skip

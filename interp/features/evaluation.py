"""One table of what an SAE does to a language model: tensor metrics, cross entropy, KL, probes, absorption, nulls."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.capture import Acts, capture_packed
from interp.data.generator import Labelled
from interp.features import absorption as absorbing
from interp.features import labels as labelling
from interp.features import probing as probes
from interp.features.splice import SpliceLoss, SpliceTally, check_fit
from interp.model.sources import read_source
from interp.model.tokens import TokenBatch, need_tokenizer, pack
from sae.archs import build
from sae.archs.base import SAE
from sae.evaluation import DEFINITIONS as TENSOR_DEFINITIONS
from sae.evaluation import Evaluation, evaluate
from sae.io import FormatError, read_json, write_json
from sae.stats import Moments

if TYPE_CHECKING:
    from interp.model.loading import Model

__all__ = ["DEFINITIONS", "Metric", "ModelEvaluation", "evaluate_on_model", "random_dictionary"]

_KIND = "interp model evaluation"
NULL_ROWS = 8192  # that a random dictionary is fitted on
MEAN, RANDOM = "mean", "random directions"

DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        **{name: text for name, text in TENSOR_DEFINITIONS.items() if name != "sites"},
        "ce_clean": "cross entropy of the model as it is, nats a token",
        "ce_spliced": "the same with the stream at the hook point replaced by the reconstruction (null: by its mean)",
        "ce_delta": "ce_spliced - ce_clean",
        "ce_zero": "cross entropy with the stream replaced by zero",
        "ce_recovered": "(ce_mean - ce_spliced) / (ce_mean - ce_clean), ce_mean with the stream replaced by its mean",
        "ce_recovered_zero": "the same against zero ablation",
        "kl": "KL(p_clean || p_spliced) over the vocabulary, nats, mean over the predicted tokens",
        "kl_score": "1 - kl / kl with the stream replaced by its mean",
        "kl_score_zero": "1 - kl / kl with the stream replaced by zero",
        "probe_accuracy": f"k latents that differ most between the classes: {probes.DEFINITIONS['accuracy']}",
        "probe_auroc": f"k latents that differ most between the classes: {probes.DEFINITIONS['auroc']}",
        "absorption_fraction": absorbing.DEFINITIONS["fraction"],
        "absorption_full": absorbing.DEFINITIONS["full"],
        "absorption_splits": absorbing.DEFINITIONS["splits"],
        "absorption_letters": "letters whose probe is good enough for absorption to be measured",
        "detection": labelling.DEFINITIONS["detection"],
        "fuzzing": labelling.DEFINITIONS["fuzzing"],
        "labelled_latents": "latents that were explained and scored",
    }
)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number, its definition, and what the nulls named reach."""

    name: str
    value: float | int | None  # None where it does not exist
    nulls: Mapping[str, float | int]
    definition: str


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """What was measured of an SAE at a hook point of a model, each metric with its nulls and its definition."""

    model: str
    fingerprint: str
    hook: str
    d_sae: int
    metadata: Mapping[str, Any]  # of the SAE
    dataset: str
    n_windows: int
    seed: int
    metrics: tuple[Metric, ...]
    left_out: Mapping[str, str]  # what could not be measured, and why

    def __getitem__(self, name: str) -> Metric:
        """Return a metric by its name. Raises KeyError for another name."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(f"there is no metric {name!r}; there are: {', '.join(metric.name for metric in self.metrics)}")

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; `metrics` by name, with value, nulls and definition."""
        metrics = {m.name: {"value": m.value, "nulls": dict(m.nulls), "definition": m.definition} for m in self.metrics}
        plain = {name: getattr(self, name) for name in _FIELDS}
        return {"kind": _KIND, **plain, "metadata": dict(self.metadata), "left_out": dict(self.left_out)} | {
            "metrics": metrics
        }

    def __str__(self) -> str:
        lines = [f"{self.d_sae} latents at {self.hook} of {self.model}, {self.n_windows} windows of {self.dataset}"]
        shown = [(m, ", ".join(f"{name} {_cell(value)}" for name, value in m.nulls.items())) for m in self.metrics]
        widths = max(len(m.name) for m, _ in shown), max(len(nulls) for _, nulls in shown)
        lines.append(f"{'metric':{widths[0]}} {'value':>11}  {'nulls':{widths[1]}}  definition")
        lines += [f"{m.name:{widths[0]}} {_cell(m.value):>11}  {n:{widths[1]}}  {m.definition}" for m, n in shown]
        return "\n".join([*lines, *(f"{what} left out: {reason}" for what, reason in self.left_out.items())])

    def save(self, path: str | Path) -> None:
        """Write the evaluation as JSON, atomically. Raises ValueError for nan or metadata that is not JSON."""
        write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: str | Path) -> "ModelEvaluation":
        """Return what `save` wrote. Raises MissingError where it is absent, FormatError where it is something else."""
        table = read_json(path)
        kinds = {**_FIELDS, "metadata": dict, "left_out": dict, "metrics": dict}
        if not isinstance(table, dict) or table.get("kind") != _KIND or set(table) != {"kind", *kinds}:
            raise FormatError(f"{path} holds no {_KIND}: {', '.join(kinds)} are expected")
        for name, kind in kinds.items():
            if type(table[name]) is not kind:
                raise FormatError(f"{path}: {name} is no {kind.__name__}")
        given = {name: table[name] for name in kinds if name != "metrics"}
        metrics = tuple(_metric_from(path, name, entry) for name, entry in table["metrics"].items())
        return cls(**given, metrics=metrics)


def evaluate_on_model(
    model: "Model",
    sae: SAE,
    hook: str | None,
    dataset: str | Iterable[Any],
    *,
    tokens: int = 50_000,
    ctx: int = 128,
    packing: str = "documents",
    batch_size: int = 16,
    probing: Sequence[str | Labelled] | Mapping[str, Any] = (),
    absorption: bool = False,
    labels: int = 0,
    explainer: labelling.Explainer | None = None,
    judge: labelling.Judge | None = None,
    ks: Sequence[int] = (1, 2, 5),
    random_null: bool = True,
    seed: int = 0,
) -> ModelEvaluation:
    """Return one table of metrics of an SAE at a hook point of a model, each with its nulls and its definition.

    `dataset` is a source of text ("text:FILE", "jsonl:FILE", "parquet:FILE", "hf:NAME", or any iterable of texts), cut
    into windows of at most ctx tokens (packing as in tokens.pack) until `tokens` tokens are read; BOS, specials and
    pads do not count and are not replaced. `hook` None: the SAE's own hook_name. Tensor metrics are those of
    sae.evaluate on the captured rows, losses those of splice.ce_recovered.
    Nulls: the stream's mean; `random_null`: a dictionary of as many random directions with the same L0, its threshold
    and one scale fitted, run through the same code; of probes, shuffled labels and random directions.
    `probing`: names of interp.data.generator.LABELLED, Labelled, or a mapping from names to what sparse_probing takes
    (texts, labels, groups). With `absorption`, a model that does not hold first letters has it left out, with the
    reason. `labels` latents are explained and scored by detection and fuzzing, left out with the reason where the text
    is too short: by default by lists of tokens, no language model; `explainer` and `judge` go together.
    Raises SpliceError for an SAE that does not fit, or where ablation costs nothing; MissingError without a tokenizer
    or a file; ValueError for a source without text.
    """
    name, concepts = _hook(model, sae, hook), _titled(probing)
    if (explainer is None) != (judge is None):
        raise ValueError("an explainer and a judge go together: a judge reads what its explainer writes")
    check_fit(model, sae, name)
    batches = _windows(model, dataset, tokens, ctx, packing, batch_size)
    measured, moments = _tensor(model, sae, name, batches)
    mean = moments.value().mean
    null = _null(model, sae, name, batches, measured.l0, mean, seed) if random_null and measured.l0 > 0 else None
    tally = SpliceTally(model, sae, name, mean, null=null)
    for batch in batches:
        tally.add(batch.ids, batch.mask)
    loss = tally.value()
    chance = None if null is None else (_tensor(model, null, name, batches)[0], tally.null_value())
    metrics = [*_tensor_metrics(measured, moments, chance), *_loss_metrics(loss, chance)]
    for title, data in concepts:
        metrics += _probe_metrics(model, sae, name, title, data, ks, seed)
    left_out: dict[str, str] = {}
    if absorption:
        try:
            metrics += _absorption_metrics(absorbing.first_letter_absorption(model, sae, name, seed=seed))
        except absorbing.AbsorptionError as reason:
            left_out["absorption"] = str(reason)
    if labels:
        try:
            metrics += _label_metrics(model, sae, name, batches, labels, explainer, judge, seed)
        except labelling.LabelError as reason:
            left_out["labels"] = str(reason)
    return ModelEvaluation(
        model=model.name,
        fingerprint=model.fingerprint,
        hook=name,
        d_sae=sae.d_sae,
        metadata=dict(sae.config.metadata),
        dataset=dataset if isinstance(dataset, str) else "texts given",
        n_windows=sum(len(batch.ids) for batch in batches),
        seed=seed,
        metrics=tuple(metrics),
        left_out=left_out,
    )


@torch.no_grad()
def random_dictionary(
    rows: Float[Tensor, "tok d"], d_sae: int, l0: float | int, *, mean: Float[Tensor, "d"], seed: int = 0
) -> SAE:
    """Return an autoencoder of d_sae random unit directions: what learning must beat.

    A latent is the projection of x - mean on its direction where that exceeds a threshold, set so that l0 latents a
    token are active on these rows; one scale of all of them makes the reconstruction of the rows best.
    """
    # 7919: the rows of an SAE that was built from the same seed are its start, not a null
    made = build("batchtopk", d_in=rows.shape[1], d_sae=d_sae, k=min(float(l0), float(d_sae)), seed=seed + 7919)
    made = made.to(rows.device)
    made.enc.copy_(made.W_dec)
    made.dec_bias.copy_(mean.to(made.dec_bias))
    made.calibrate([rows])
    recon = made(rows).recon.double() - mean.to(rows.device)
    power = float(recon.square().sum())
    scale = float((recon * (rows.double() - mean.to(rows.device))).sum()) / power if power else 1.0
    made.dec.mul_(scale)
    return made


_FIELDS = {"model": str, "fingerprint": str, "hook": str, "d_sae": int, "dataset": str, "n_windows": int, "seed": int}


def _hook(model: "Model", sae: SAE, hook: str | None) -> str:
    given = hook or sae.config.metadata.get("hook_name")
    if not isinstance(given, str):
        raise ValueError("the SAE does not say where it belongs (metadata hook_name): give the hook point")
    return model.hook_point(given).name


def _windows(
    model: "Model", dataset: str | Iterable[Any], tokens: int, ctx: int, packing: str, batch_size: int
) -> list[TokenBatch]:
    if tokens < 1 or packing == "masked":
        raise ValueError(f"tokens is {tokens}, it must be at least 1; packing {packing!r} must not be 'masked'")
    windows = pack(
        need_tokenizer(model.tokenizer),
        read_source(dataset),
        min(ctx, model.n_ctx),
        batch_size=batch_size,
        packing=packing,
    )
    kept, n = [], 0
    for batch in windows:
        width = int(batch.mask.sum(1).max())  # padded to ctx, which short documents do not need
        kept.append(TokenBatch(batch.ids[:, :width], batch.mask[:, :width], batch.special[:, :width]))
        n += int((kept[-1].mask & ~kept[-1].special).sum())
        if n >= tokens:
            break
    if not n:
        raise ValueError("the data set holds no text")
    return kept


def _tensor(model: "Model", sae: SAE, hook: str, batches: list[TokenBatch]) -> tuple[Evaluation, Moments]:
    """Return the tensor metrics and the moments of the stream, from one pass."""
    moments = Moments()

    def rows() -> Iterator[Tensor]:
        for acts in capture_packed(model, batches, [hook]):
            moments.add(acts[hook])
            yield acts[hook].to(sae.W_dec.device)

    return evaluate(sae, rows()), moments


def _null(model: "Model", sae: SAE, hook: str, batches: list[TokenBatch], l0: float, mean: Tensor, seed: int) -> SAE:
    """Return a dictionary of random directions that fits the first rows of the text."""
    rows, n = [], 0
    for acts in capture_packed(model, batches, [hook]):
        rows.append(acts[hook].to(sae.W_dec))
        n += len(rows[-1])
        if n >= NULL_ROWS:
            break
    return random_dictionary(torch.cat(rows), sae.d_sae, l0, mean=mean, seed=seed)


def _tensor_metrics(
    measured: Evaluation, moments: Moments, chance: tuple[Evaluation, SpliceLoss] | None
) -> list[Metric]:
    table, null = measured.as_dict(), {} if chance is None else chance[0].as_dict()
    spread = moments.value()
    of_mean = {"fve": 0.0, "nmse": spread.variance / (spread.variance + float(spread.mean.square().sum()))}
    found = []
    for name in ("tokens", "l0", "fve", "nmse", "cosine", "relative_bias", "l2_ratio", "dead", "dense"):
        nulls = {MEAN: of_mean[name]} if name in of_mean else {}
        if name in ("l0", "fve", "nmse", "cosine") and null:
            nulls[RANDOM] = null[name]
        found.append(_metric(name, table[name], nulls))
    return found


def _loss_metrics(loss: SpliceLoss, chance: tuple[Evaluation, SpliceLoss] | None) -> list[Metric]:
    def values(of: SpliceLoss) -> dict[str, float]:
        return {
            "ce_clean": of.ce_clean,
            "ce_spliced": of.ce_spliced,
            "ce_delta": of.delta,
            "ce_zero": of.ce_zero,
            "ce_recovered": of.recovered,
            "ce_recovered_zero": of.recovered_zero,
            "kl": of.kl_spliced,
            "kl_score": of.kl_score,
            "kl_score_zero": of.kl_score_zero,
        }

    of_mean = {
        "ce_spliced": loss.ce_mean,
        "ce_delta": loss.ce_mean - loss.ce_clean,
        "ce_recovered": 0.0,
        "kl": loss.kl_mean,
        "kl_score": 0.0,
    }
    of_mean["ce_recovered_zero"] = (loss.ce_zero - loss.ce_mean) / (loss.ce_zero - loss.ce_clean)
    of_mean["kl_score_zero"] = 1 - loss.kl_mean / loss.kl_zero
    null = {} if chance is None else values(chance[1])
    found = []
    for name, value in values(loss).items():
        nulls = {MEAN: of_mean[name]} if name in of_mean else {}
        if name in of_mean and null:
            nulls[RANDOM] = null[name]
        found.append(_metric(name, value, nulls))
    return found


def _titled(probing: Sequence[str | Labelled] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(probing, str):
        raise ValueError(f"probing is a list of names or a mapping, not {probing!r}; give [{probing!r}]")
    if isinstance(probing, Mapping):
        return list(probing.items())
    return [(data if isinstance(data, str) else data.attribute, data) for data in probing]


def _probe_metrics(
    model: "Model", sae: SAE, hook: str, title: str, data: Any, ks: Sequence[int], seed: int
) -> list[Metric]:
    measured = probes.sparse_probing(model, sae, hook, data, ks=ks, seed=seed)
    found = []
    for k in (*ks, None):
        nulls = {"shuffled labels": measured.mean(k, "shuffled")}
        if k is not None:
            nulls |= {
                "random latents": measured.mean(k, "random_latents"),
                RANDOM: measured.mean(k, "random_directions"),
            }
        majority = {"larger class": sum(probe.majority for probe in measured.probes) / len(measured.probes)}
        for what, chance in (("probe_accuracy", majority), ("probe_auroc", nulls)):
            figure = what.removeprefix("probe_")
            text = (
                f"dense probe: {probes.DEFINITIONS[figure]}"
                if k is None
                else f"k = {k} {DEFINITIONS[what].removeprefix('k ')}"
            )
            name = f"{what}_{title}_{'dense' if k is None else k}"
            value = measured.mean(k, figure)
            found.append(Metric(name=name, value=value, nulls=chance, definition=text))
    return found


def _absorption_metrics(measured: absorbing.Absorption) -> list[Metric]:
    dealt = "decoder rows dealt out anew"
    return [
        _metric("absorption_fraction", measured.fraction, {dealt: measured.null_fraction}),
        _metric("absorption_full", measured.full, {dealt: measured.null_full}),
        _metric("absorption_splits", measured.splits, {}),
        _metric("absorption_letters", len(measured.letters), {}),
    ]


def _label_metrics(
    model: "Model", sae: SAE, hook: str, batches: list[TokenBatch], n: int, explainer: Any, judge: Any, seed: int
) -> list[Metric]:
    """Return detection and fuzzing scores of n random latents, each row of a batch being a document of its own."""
    parts, rows = list(capture_packed(model, batches, [hook])), 0
    documents = []
    for batch, part in zip(batches, parts, strict=True):
        documents.append(part.documents + rows)
        rows += len(batch.ids)
    acts = Acts(
        values={hook: torch.cat([part[hook] for part in parts])}, token_ids=torch.cat([p.token_ids for p in parts]),
        positions=torch.cat([p.positions for p in parts]), documents=torch.cat(documents),
        is_special=torch.cat([p.is_special for p in parts]), n_documents=rows,
    )  # fmt: skip
    sets = labelling.example_sets(model, sae, acts, hook, n_latents=n, seed=seed)
    explainer, judge = explainer or labelling.TokenListExplainer(), judge or labelling.TokenListJudge()
    scores = labelling.score_labels(sets, explainer, judge, seed=seed)
    found = [_metric("labelled_latents", len(scores.scores), {})]
    for what in ("detection", "fuzzing"):
        nulls = {
            "another's explanation": getattr(scores, f"shuffled_{what}"),
            "tossed coins": getattr(scores, f"random_{what}"),
        }
        found.append(_metric(what, getattr(scores, what), nulls))
    return found


def _metric(name: str, value: float | int | None, nulls: Mapping[str, float | int]) -> Metric:
    return Metric(name=name, value=value, nulls=nulls, definition=DEFINITIONS[name])


def _metric_from(path: str | Path, name: str, entry: Any) -> Metric:
    if not isinstance(entry, dict) or set(entry) != {"value", "nulls", "definition"}:
        raise FormatError(f"{path}: metric {name!r} has no value, nulls and definition")
    value, nulls, text = entry["value"], entry["nulls"], entry["definition"]
    numbers = [value or 0, *nulls.values()] if isinstance(nulls, dict) else [""]
    if not isinstance(text, str) or not all(type(n) in (int, float) for n in numbers):
        raise FormatError(f"{path}: metric {name!r} has a value or null that is no number")
    return Metric(name=name, value=value, nulls=nulls, definition=text)


def _cell(value: float | int | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

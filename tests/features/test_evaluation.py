"""The table of an SAE on a model: SAEs whose figures are known, the same figures by other calls, files."""

import json
from itertools import islice

import pytest
import torch

from interp.acts.capture import capture_acts
from interp.data.generator import documents, labelled, sample_texts
from interp.features import evaluation as module
from interp.features import labels as labelling
from interp.features.absorption import Absorption, LetterAbsorption
from interp.features.evaluation import DEFINITIONS, ModelEvaluation, evaluate_on_model, random_dictionary
from interp.features.probing import sparse_probing
from interp.features.splice import SpliceError, SpliceTally, ce_recovered, stream_moments
from interp.model.loading import load_model
from sae.archs import build
from sae.evaluation import evaluate
from sae.extras import MissingError
from sae.io import FormatError

HOOK = "blocks.2.hook_resid_post"
TEXTS = sample_texts(12, seed=21)


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


def identity_sae(d):
    sae = build("batchtopk", d_in=d, d_sae=2 * d, k=float(d), seed=3)
    with torch.no_grad():
        both = torch.cat([torch.eye(d), -torch.eye(d)])
        sae.enc.copy_(both)
        sae.dec.copy_(both)
    return sae


def constant_sae(vector):
    sae = build("batchtopk", d_in=len(vector), d_sae=8, k=4.0, seed=4, metadata={"hook_name": HOOK})
    with torch.no_grad():
        sae.cut.fill_(torch.inf)
        sae.dec_bias.copy_(vector)
    return sae


@pytest.fixture(scope="module")
def measured(model):
    return evaluate_on_model(model, identity_sae(model.d_model), HOOK, TEXTS, tokens=10_000)


def test_an_identity_has_perfect_figures_and_the_null_does_not(measured):
    figures = {name: measured[name].value for name in ("fve", "cosine", "ce_recovered", "kl_score", "l2_ratio")}
    assert figures == pytest.approx(dict.fromkeys(figures, 1.0), abs=1e-5)
    assert measured["l0"].value == pytest.approx(192)
    for name in ("nmse", "ce_delta", "kl"):
        assert measured[name].value == pytest.approx(0, abs=1e-5)
        assert measured[name].nulls["random directions"] > 0.01
    assert 0 < measured["fve"].nulls["random directions"] < 0.95
    assert 0 < measured["kl_score"].nulls["random directions"] < 0.999
    assert measured["kl"].nulls["mean"] > 1
    assert measured["kl_score"].nulls["mean"] == measured["ce_recovered"].nulls["mean"] == 0


def test_the_mean_as_an_sae_has_the_figures_of_the_null_of_the_mean(model, measured):
    acts = capture_acts(model, TEXTS, [HOOK])
    sae = constant_sae(acts[HOOK].mean(0))
    found = evaluate_on_model(model, sae, None, TEXTS, tokens=10_000)
    assert found.hook == HOOK
    assert found["tokens"].value == len(acts)
    for name, metric in ((m.name, m) for m in found.metrics):
        if "mean" in metric.nulls:
            assert metric.value == pytest.approx(metric.nulls["mean"], abs=1e-4), name
            assert metric.nulls["mean"] == pytest.approx(measured[name].nulls["mean"], abs=1e-4), name
            assert "random directions" not in metric.nulls  # nothing fires: no dictionary has an L0 of 0


def test_figures_are_those_of_the_calls_that_each_belongs_to(model):
    sae = build("batchtopk", d_in=model.d_model, d_sae=400, k=16.0, seed=5)
    acts = capture_acts(model, TEXTS, [HOOK])
    sae.calibrate([acts[HOOK]])
    data = labelled("language", n=40)
    found = evaluate_on_model(
        model,
        sae,
        HOOK,
        TEXTS,
        tokens=10_000,
        batch_size=5,
        probing={"language": (data.texts, data.labels, data.templates)},
        ks=(2,),
        random_null=False,
    )
    alone = evaluate(sae, acts[HOOK])
    for name in ("l0", "fve", "nmse", "cosine", "dead", "dense", "l2_ratio"):
        assert found[name].value == pytest.approx(alone[name], abs=1e-5), name
    batch = model.tokenize(TEXTS)
    loss = ce_recovered(model, sae, HOOK, batch.ids, batch.mask)
    assert found["ce_recovered"].value == pytest.approx(loss.recovered, abs=1e-4)
    assert found["kl"].value == pytest.approx(loss.kl_spliced, abs=1e-4)
    assert found["kl"].nulls == {"mean": pytest.approx(loss.kl_mean, abs=1e-4)}
    probed = sparse_probing(model, sae, HOOK, data, ks=(2,))
    assert found["probe_auroc_language_2"].value == probed.mean(2)
    assert found["probe_auroc_language_2"].nulls["shuffled labels"] == probed.mean(2, "shuffled")
    assert found["probe_auroc_language_dense"].value == probed.mean(None)
    assert found["probe_accuracy_language_2"].nulls == {"larger class": 0.5}
    assert found["probe_auroc_language_2"].definition.startswith("k = 2 latents that differ most")


def test_every_number_is_printed_with_its_definition_and_nulls(measured):
    shown = str(measured).split("\n")
    for metric in measured.metrics:
        [line] = [line for line in shown if line.split()[0] == metric.name]
        assert line.endswith(metric.definition) and metric.definition == DEFINITIONS[metric.name]
        assert all(name in line for name in metric.nulls)
    assert HOOK in shown[0] and "tiny" in shown[0]
    with pytest.raises(KeyError, match="there are: tokens"):
        measured["accuracy"]


def test_what_is_saved_is_what_is_loaded(measured, tmp_path):
    path = tmp_path / "evaluation.json"
    measured.save(path)
    assert ModelEvaluation.load(path) == measured
    assert json.loads(path.read_text())["metrics"]["fve"]["value"] == measured["fve"].value
    with pytest.raises(MissingError):
        ModelEvaluation.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.pop("hook"),
        lambda t: t.update(kind="interp probe"),
        lambda t: t.update(extra=1),
        lambda t: t.update(seed="0"),
        lambda t: t.update(metrics=[]),
        lambda t: t["metrics"].update(fve=0.9),
        lambda t: t["metrics"]["fve"].update(value="0.9"),
        lambda t: t["metrics"]["fve"].update(value=True),
        lambda t: t["metrics"]["fve"]["nulls"].update(mean=None),
        lambda t: t["metrics"]["fve"].pop("definition"),
        lambda t: t["metrics"]["fve"].update(nulls=[]),
    ],
)
def test_a_file_of_another_kind_is_refused(measured, tmp_path, spoil):
    table = json.loads(json.dumps(measured.as_dict()))
    spoil(table)
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(table))
    with pytest.raises(FormatError):
        ModelEvaluation.load(path)


def test_text_is_read_until_there_are_enough_tokens(model, tmp_path):
    sae = constant_sae(torch.zeros(model.d_model))
    found = evaluate_on_model(model, sae, None, documents(22), tokens=300, batch_size=2)
    assert 300 <= found["tokens"].value < 300 + 2 * 127
    path = tmp_path / "stories.txt"
    path.write_text("\n\n".join(islice(documents(22), 40)))
    from_file = evaluate_on_model(model, sae, None, f"text:{path}", tokens=300, batch_size=2)
    assert from_file.metrics == found.metrics
    assert from_file.dataset == f"text:{path}"
    joined = evaluate_on_model(model, sae, None, documents(22), tokens=300, batch_size=2, packing="joined", ctx=64)
    assert joined["ce_clean"].value != found["ce_clean"].value
    assert joined.n_windows == pytest.approx(joined["tokens"].value / 63, abs=1)


def test_a_random_dictionary_has_the_density_asked_for_and_the_best_scale(model):
    rows = capture_acts(model, TEXTS, [HOOK])[HOOK]
    made = random_dictionary(rows, 500, 20, mean=rows.mean(0), seed=1)
    table = evaluate(made, rows)
    assert table.l0 == pytest.approx(20, abs=0.1)
    assert 0 < table.fve < 0.95
    for factor in (0.9, 1.1):
        with torch.no_grad():
            made.dec.mul_(factor)
        assert evaluate(made, rows).fve < table.fve
        with torch.no_grad():
            made.dec.div_(factor)
    assert not torch.allclose(made.enc, build("batchtopk", d_in=192, d_sae=500, k=20.0, seed=1).W_dec)


def test_a_null_beside_an_sae_has_the_losses_that_it_has_alone(model):
    batch = model.tokenize(TEXTS[:4])
    first, second = (build("batchtopk", d_in=192, d_sae=300, k=8.0, seed=seed) for seed in (6, 7))
    mean = stream_moments(model, HOOK, [batch]).value().mean
    both = SpliceTally(model, first, HOOK, mean, null=second).add(batch.ids, batch.mask)
    alone = SpliceTally(model, second, HOOK, mean).add(batch.ids, batch.mask)
    assert both.null_value() == alone.value()
    assert both.value() == SpliceTally(model, first, HOOK, mean).add(batch.ids, batch.mask).value() != alone.value()
    with pytest.raises(SpliceError, match="no null"):
        alone.null_value()
    with pytest.raises(SpliceError, match="do not merge"):
        both.merge(alone)


def test_absorption_is_left_out_with_its_reason_where_letters_cannot_be_read(model, monkeypatch):
    sae = constant_sae(torch.zeros(model.d_model))
    options = {"tokens": 200, "absorption": True}
    found = evaluate_on_model(model, sae, None, TEXTS, **options)
    assert "0 of 24 letters" in found.left_out["absorption"]
    assert "absorption left out: first letters cannot be read" in str(found)
    letters = [
        LetterAbsorption(
            letter=c, f1=0.9, n_words=9, main=(1, 2), fraction=f, full=0.25, null_fraction=0.125, null_full=0.0
        )
        for c, f in (("a", 0.5), ("b", 1.0))
    ]
    planted = Absorption(letters=tuple(letters), n_asked=24, n_train=9, n_test=3, min_f1=0.6, seed=0)
    monkeypatch.setattr(module.absorbing, "first_letter_absorption", lambda *given, **options: planted)
    found = evaluate_on_model(model, sae, None, TEXTS, **options)
    assert not found.left_out
    assert found["absorption_fraction"].value == 0.75
    assert found["absorption_fraction"].nulls == {"decoder rows dealt out anew": 0.125}
    assert found["absorption_full"].value == 0.25
    assert (found["absorption_splits"].value, found["absorption_letters"].value) == (2.0, 2)


def test_latents_are_labelled_as_by_calls_of_their_own(model):
    texts = sample_texts(160, seed=22)
    x = capture_acts(model, texts, [HOOK])
    sae = random_dictionary(x[HOOK], 64, 4.0, mean=x[HOOK].mean(0), seed=1)
    found = evaluate_on_model(model, sae, HOOK, texts, tokens=10**9, labels=3, ctx=model.n_ctx, seed=5)
    sets = labelling.example_sets(model, sae, x, HOOK, n_latents=3, seed=5)
    alone = labelling.score_labels(sets, labelling.TokenListExplainer(), labelling.TokenListJudge(), seed=5)
    assert found["labelled_latents"].value == 3
    assert found["detection"].value == alone.detection and found["fuzzing"].value == alone.fuzzing
    assert found["detection"].nulls["another's explanation"] == alone.shuffled_detection
    few = evaluate_on_model(model, sae, HOOK, texts[:3], tokens=200, labels=3)
    assert "windows" in few.left_out["labels"]
    with pytest.raises(ValueError, match="go together"):
        evaluate_on_model(model, sae, HOOK, texts[:3], labels=3, judge=labelling.TokenListJudge())


def test_what_does_not_fit_is_refused(model):
    d = model.d_model
    with pytest.raises(SpliceError, match="a transcoder"):
        evaluate_on_model(model, build("batchtopk", d_in=d, d_out=d, d_sae=8, k=2.0), HOOK, TEXTS)
    with pytest.raises(SpliceError, match="width 8, but"):
        evaluate_on_model(model, build("batchtopk", d_in=8, d_sae=8, k=2.0), HOOK, TEXTS)
    plain = build("batchtopk", d_in=d, d_sae=8, k=2.0)
    with pytest.raises(ValueError, match="give the hook point"):
        evaluate_on_model(model, plain, None, TEXTS)
    with pytest.raises(ValueError, match=r"give \['topic'\]"):
        evaluate_on_model(model, plain, HOOK, TEXTS, tokens=50, probing="topic")
    with pytest.raises(ValueError, match="must not be 'masked'"):
        evaluate_on_model(model, plain, HOOK, TEXTS, packing="masked")
    with pytest.raises(ValueError, match="holds no text"):
        evaluate_on_model(model, plain, HOOK, [])
    with pytest.raises(MissingError, match="no file"):
        evaluate_on_model(model, plain, HOOK, "text:nowhere.txt")

"""The main job end to end, small: every part gives figures with nulls, the page loads nothing from outside."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from interp.demo import job
from interp.model.loading import untrained


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "SAE_STEPS", 60)
        return job.run_demo("tiny", out=out, tokens=24_000, say=lambda text: None), out


def test_every_part_ran(ran: tuple[dict[str, Any], Path]):
    result, out = ran
    assert result["left_out"] == {}
    assert {"sae", "probe", "steer", "analogy", "map", "config", "versions", "timings"} <= set(result)
    assert json.loads((out / "run.json").read_text()) == json.loads(json.dumps(result))


def test_the_figures_stand_above_their_nulls(ran: tuple[dict[str, Any], Path]):
    result, _ = ran
    sae, probe, steer, analogy, drawn = (result[k] for k in ("sae", "probe", "steer", "analogy", "map"))
    assert sae["fve"] > 0.4 and 20 < sae["l0"] < 40 and sae["ce_recovered"] > 0.5
    assert sae["losses"]["ce_clean"] < sae["losses"]["ce_spliced"] < sae["losses"]["ce_mean"]
    assert probe["auroc"] > 0.9 and 0.4 < probe["control"] < 0.6 and len(probe["control_scores"]) >= 20
    assert steer["n_placebo"] == 20 and steer["effect"] > 3 and steer["cached_equals_uncached"] is True
    assert steer["kl"] <= steer["kl_budget"]
    assert analogy["accuracy"] > 0.6 > analogy["only_b"] and analogy["honest"] < analogy["accuracy"]
    assert drawn["purity_space"] > drawn["purity_null"] + 0.2


def test_the_page_is_one_offline_file(ran: tuple[dict[str, Any], Path]):
    page = (ran[1] / "report.html").read_text(encoding="utf8")
    assert "Content-Security-Policy" in page
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    for title in ("A sparse autoencoder", "The strongest latents", "Reading sentiment", "Steering", "Analogies"):
        assert title in page
    assert page.count('id="plot-') >= 8


@pytest.mark.browser
def test_the_page_draws_in_a_browser_in_silence(ran: tuple[dict[str, Any], Path], browser: Any):
    address = (ran[1] / "report.html").as_uri()
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    requests, said = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address, timeout=120_000)
    plots = page.evaluate("document.querySelectorAll('.plot').length")
    assert plots >= 8
    for _ in range(300):
        drawn = page.evaluate("document.querySelectorAll('.plot .main-svg .xtick').length > 0")
        if drawn and page.evaluate("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))"):
            break
        page.wait_for_timeout(100)
    else:
        raise AssertionError("a figure was not drawn")
    assert (requests, said) == ([address], [])


def test_an_untrained_model_has_nothing_to_show_and_the_job_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job, "SAE_STEPS", 10)
    fresh = untrained("tiny")
    result = job.run_demo(fresh, out=tmp_path, tokens=20_000, say=lambda text: None)
    assert set(result["left_out"]) == {"sae", "steer"}
    assert "means nothing" in result["left_out"]["sae"]
    assert result["analogy"]["accuracy"] < 0.02 and result["probe"]["unseen_words"]["auroc"] < 0.65


@pytest.mark.shared
def test_a_model_without_the_words_leaves_parts_out_and_says_so(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job, "SAE_STEPS", 30)
    text = shared_data / "text" / "tinystories" / "valid_v1_head.txt"
    result = job.run_demo(
        str(shared_data / "models" / "stories260K"), dataset=f"text:{text}", out=tmp_path, tokens=24_000,
        say=lambda text: None,
    )  # fmt: skip
    assert set(result["left_out"]) == {"analogy"} and "vocabulary" in result["left_out"]["analogy"]
    assert "Left out" in (tmp_path / "report.html").read_text(encoding="utf8")
    assert result["sae"]["fve"] > 0.3

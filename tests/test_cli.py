"""The commands: results on stdout, one clear line and the right exit code for bad input, never a traceback."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp import cli

CASES: list[tuple[str, int, list[str], str]] = [
    ("unknown flag", 2, ["interp", "demo", "--no-such-flag"], "--no-such-flag"),
    ("unknown command", 2, ["interp", "dmeo"], "dmeo"),
    ("no such model", 3, ["interp", "analogy", "no/such-model", "a", "-", "b", "+", "c"], "no/such-model"),
    ("unknown word", 1, ["interp", "analogy", "tiny", "qqqzzzxxq", "-", "man", "+", "woman"], "qqqzzzxxq"),
    ("no expression", 1, ["interp", "analogy", "tiny", "king", "-", "man", "woman"], "woman"),
    ("unknown hook point", 2, ["interp", "demo", "--hook", "resid_pst.1", "--out", "x"], "blocks.1.hook_resid_post"),
    ("layer too high", 2, ["interp", "demo", "--hook", "resid_post.99", "--out", "x"], "resid_post"),
    ("no such text", 3, ["interp", "demo", "--dataset", "text:no-such.txt", "--out", "x"], "no-such.txt"),
    ("empty text", 1, ["interp", "demo", "--dataset", "text:empty.txt", "--out", "x"], "empty.txt"),
    ("text too short", 1, ["interp", "demo", "--dataset", "text:short.txt", "--out", "x"], "documents"),
    ("too few tokens", 1, ["interp", "demo", "--tokens", "100", "--out", "x"], "20000"),
    ("no such vector", 3, ["interp", "steer", "tiny", "--vector", "no.safetensors", "--strength", "1", "hi"], "no.saf"),
    ("bad vector", 1, ["interp", "steer", "tiny", "--vector", "bad.safetensors", "--strength", "1", "hi"], "bad.saf"),
    ("no such data", 3, ["sae", "train", "no.npy", "--out", "x"], "no.npy"),
    ("not finite", 1, ["sae", "train", "nan.npy", "--out", "x", "--steps", "2", "--batch-size", "8"], "nan"),
    ("no such run", 3, ["sae", "eval", "no-run", "nan.npy"], "no-run"),
    ("k too large", 1, ["sae", "train", "ok.npy", "--out", "x", "--k", "99", "--width", "16"], "99"),
]  # fmt: skip


def call(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", list(argv))
    with pytest.raises(SystemExit) as end:
        (cli.main if argv[0] == "interp" else cli.sae_main)()
        raise SystemExit(0)
    return int(end.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Once upon a time.\n\nThe end.\n")
    (tmp_path / "bad.safetensors").write_text("not a tensor")
    rows = np.random.default_rng(0).normal(size=(256, 16)).astype(np.float32)
    np.save(tmp_path / "ok.npy", rows)
    rows[3, 3] = np.nan
    np.save(tmp_path / "nan.npy", rows)
    return tmp_path


@pytest.mark.parametrize(("argv", "code", "says"), [(a, c, s) for _, c, a, s in CASES], ids=[c[0] for c in CASES])
def test_bad_input_gets_its_exit_code_and_one_clear_line(
    argv: list[str], code: int, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    before = sorted(folder.iterdir())
    assert call(argv, monkeypatch) == code
    out, err = capsys.readouterr()
    assert says in err and "Traceback" not in err and not out
    last = err.strip().splitlines()[-1]
    assert code == 2 or last.startswith("error: ")
    assert sorted(folder.iterdir()) == before, "something was written"


def test_debug_shows_the_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["sae", "eval", "no-run", "nan.npy", "--debug"])
    with pytest.raises(FileNotFoundError):
        cli.sae_main()


def test_concept_then_steer_changes_the_text(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    (folder / "glad.txt").write_text("It was a lovely day.\nThe cake was wonderful.\nWhat a great party!\n")
    (folder / "sad.txt").write_text("It was a terrible day.\nThe cake was awful.\nWhat a horrible party!\n")
    argv = [
        "interp",
        "concept",
        "tiny",
        "--positive",
        "glad.txt",
        "--negative",
        "sad.txt",
        "--out",
        "d.safetensors",
        "--json",
    ]
    assert call(argv, monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 6 and found["hook"] == "blocks.2.hook_resid_post"
    texts = {}
    for strength in ("0", "0.8"):
        argv = ["interp", "steer", "tiny", "--vector", "d.safetensors", "--strength", strength, "--json"]
        assert call([*argv, "The day was"], monkeypatch) == 0
        texts[strength] = json.loads(capsys.readouterr().out)["texts"][0]
    assert texts["0"]["steered"] == texts["0"]["unsteered"]
    assert texts["0.8"]["steered"] != texts["0.8"]["unsteered"]


def test_analogy_answers_by_layer_in_any_case(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    assert call(["interp", "analogy", "tiny", "paris", "-", "france", "+", "germany", "--json"], monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["positive"] == ["paris", "germany"] and next(r["layer"] for r in found["layers"]) == "embed"
    assert "Berlin" in [a["word"] for a in found["layers"][0]["answers"]]


def test_sae_train_eval_info(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    train = [
        "sae",
        "train",
        "ok.npy",
        "--out",
        "run",
        "--width",
        "32",
        "--k",
        "4",
        "--steps",
        "20",
        "--batch-size",
        "64",
        "--quiet",
        "--json",
    ]
    assert call(train, monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 20
    assert call(["sae", "eval", "run", "ok.npy", "--json"], monkeypatch) == 0
    assert 3 < json.loads(capsys.readouterr().out)["l0"] < 5
    assert call(["sae", "info", "run", "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["d_sae"] == 32


def test_help_is_quick_and_loads_no_torch():
    code = "import sys, interp.cli as c; sys.argv = ['interp', '--help']\ntry: c.main()\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("False")
    assert "analogy" in done.stdout

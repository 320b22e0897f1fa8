"""The commands: results on stdout, one clear line and the right exit code for bad input, never a traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp import cli
from interp.data.generator import labelled
from interp.model.loading import load_model

SUFFIXES = {".json", ".jsonl", ".safetensors"}
HARVEST = ["interp", "harvest", "tiny", "--hook", "resid_post.1", "--dataset", "text:short.txt"]
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
    ("harvest: no model", 3, [*HARVEST[:2], "no/such-model", *HARVEST[3:], "--out", "x"], "no/such-model"),
    ("harvest: no hook point", 2, [*HARVEST, "--hook", "resid_pst.1", "--out", "x"], "blocks.1.hook_resid_post"),
    ("harvest: no layer", 2, [*HARVEST, "--hook", "resid_post.99", "--out", "x"], "resid_post"),
    ("harvest: no file", 3, [*HARVEST[:5], "--dataset", "text:no.txt", "--out", "x"], "no.txt"),
    ("harvest: empty file", 1, [*HARVEST[:5], "--dataset", "text:empty.txt", "--out", "x"], "empty.txt"),
    ("harvest: no kind", 1, [*HARVEST[:5], "--dataset", "short.txt", "--out", "x"], "hf:NAME"),
    ("harvest: no number", 2, [*HARVEST, "--tokens", "many", "--out", "x"], "2M"),
    ("harvest: no dtype", 1, [*HARVEST, "--dtype", "int4", "--out", "x"], "bfloat16"),
    ("harvest: too long", 1, [*HARVEST, "--ctx", "4096", "--out", "x"], "512"),
    ("harvest: bad mask", 1, [*HARVEST, "--exclude", "eos", "--out", "x"], "outlier:M"),
    ("harvest: bad rank", 1, [*HARVEST, "--rank", "3", "--world-size", "2", "--out", "x"], "rank 3 of 2"),
    ("harvest: a file", 1, [*HARVEST, "--out", "short.txt"], "is a file"),
    ("harvest: no room", 1, [*HARVEST, "--tokens", "90000000M", "--out", "x"], "GB are free"),
    ("verify: no store", 3, ["interp", "verify", "no-store"], "no-store"),
    ("info: no store", 3, ["interp", "info", "."], "interp harvest"),
    ("no such data", 3, ["sae", "train", "no.npy", "--out", "x"], "no.npy"),
    ("not finite", 1, ["sae", "train", "nan.npy", "--out", "x", "--steps", "2", "--batch-size", "8"], "nan"),
    ("no such run", 3, ["sae", "eval", "no-run", "nan.npy"], "no-run"),
    ("k too large", 1, ["sae", "train", "ok.npy", "--out", "x", "--k", "99", "--width", "16"], "99"),
    ("no such run alone", 3, ["sae", "eval", "no-run"], "no-run"),
    ("no such arch", 1, ["sae", "train", "ok.npy", "--out", "x", "--arch", "batchtop"], "closest: batchtopk"),
    ("no such option", 1, ["sae", "train", "ok.npy", "--out", "x", "--option", "aux=1", "--k", "2"], "TrainConfig"),
    ("bad sweep", 2, ["sae", "train", "ok.npy", "--out", "x", "--sweep", "k"], "name=value"),
    ("no hook point", 2, ["sae", "train", "tiny", "--dataset", "text:short.txt", "--out", "x"], "--hook"),
    ("folder, no store", 3, ["sae", "train", ".", "--out", "x"], "interp harvest"),
    ("nothing to convert", 3, ["sae", "convert", "no-run", "x"], "no-run"),
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
    assert texts["0"]["steered"] == [{"strength": 0.0, "text": texts["0"]["unsteered"]}]
    assert texts["0.8"]["steered"][0]["text"] != texts["0.8"]["unsteered"]


def labelled_file(path: Path, seed: int, words: str) -> None:
    data = labelled("sentiment", n=80, seed=seed, words=words)
    rows = zip(data.texts, data.labels, data.templates, strict=True)
    records = [{"text": t, "label": label, "group": g} for t, label, g in rows]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_concept_is_probed_measured_and_baked(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    labelled_file(folder / "train.jsonl", 0, "a")
    labelled_file(folder / "other.jsonl", 1, "b")
    beginnings = ("The cake was", "Tom said the movie was", "The town was", "It was a", "Lily felt", "The game was")
    asked = [{"prompt": p, "match": " good", "other": " bad"} for p in beginnings]
    (folder / "p.jsonl").write_text("".join(json.dumps(a) + "\n" for a in asked))
    data = ["--data", "train.jsonl", "--label", "positive"]
    argv = ["interp", "probe", "tiny", *data, "--hook", "resid_post.2", "--hook", "resid_post.3"]
    assert (
        call([*argv, "--permutations", "40", "--method", "mean_difference", "--out", "probe.safetensors"], monkeypatch)
        == 0
    )
    shown = capsys.readouterr().out
    assert float(shown.split()[1]) > 0.9 and "permuted labels 0." in shown and (folder / "probe.safetensors").is_file()
    argv = ["interp", "concept", "tiny", *data, "--hook", "resid_post.3", "--out", "d.safetensors"]
    assert call(argv, monkeypatch) == 0
    argv = ["interp", "effects", "tiny", "--vector", "d.safetensors", "--prompts", "p.jsonl", "--label", "positive"]
    argv += ["--labelled", "other.jsonl", "--fitted-on", "train.jsonl", "--strength", "0.3", "--shuffled", "5"]
    capsys.readouterr()
    assert call([*argv, "--max-new-tokens", "4", "--out", "e.html", "--json"], monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reason"] and len(found["doses"]) == 2 and len(found["doses"][1]["measures"]["gain"]["random"]) == 20
    assert (folder / "e.html").stat().st_size > 10_000
    argv[argv.index("other.jsonl")] = "train.jsonl"
    assert call(argv, monkeypatch) == 1 and "fitted on" in capsys.readouterr().err
    assert call(["interp", "bake", "tiny", "--vector", "d.safetensors", "--ablate", "--out", "baked"], monkeypatch) == 0
    assert load_model("baked").fingerprint != load_model("tiny").fingerprint


def test_analogy_answers_by_layer_in_any_case(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    assert call(["interp", "analogy", "tiny", "paris", "-", "france", "+", "germany", "--json"], monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["positive"] == ["paris", "germany"] and next(r["layer"] for r in found["layers"]) == "embed"
    assert "Berlin" in [a["word"] for a in found["layers"][0]["answers"]]


def test_harvest_info_verify_and_repair(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    line = [*HARVEST, "--tokens", "1k", "--out", "acts", "--quiet", "--json"]
    (folder / "short.txt").write_text("Tom and Sue went to the park.\n\n" * 300)
    assert call([*line, "--dry-run"], monkeypatch) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["rows"] == 1000 and not (folder / "acts").exists()
    assert call(line, monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == {"out": "acts", "complete": True, "rows": 1000, "shards": 1}
    assert call(["interp", "info", "acts", "--json"], monkeypatch) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["hooks"]["blocks.1.hook_resid_post"]["d"] == 192 and told["complete"]
    assert call(["interp", "info", "acts"], monkeypatch) == call(["interp", "verify", "acts"], monkeypatch) == 0
    assert "sound: 1 shard, 1,000 rows" in capsys.readouterr().out
    shard = folder / "acts" / "acts" / "00000000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + b"\0" + whole[5001:])
    assert call(["interp", "verify", "acts"], monkeypatch) == 1
    assert "acts/00000000.safetensors: the data are not what was written" in capsys.readouterr().out
    assert call(["interp", "verify", "acts", "--repair"], monkeypatch) == 0
    assert shard.read_bytes() == whole
    assert call([*line, "--dtype", "float16"], monkeypatch) == 1
    assert 'dtype is "float32" there and "float16" here' in capsys.readouterr().err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_harvest_that_is_stopped_keeps_what_it_finished(folder: Path, sent: int, code: int):
    (folder / "long.txt").write_text("Tom and Sue went to the park and saw a big red ball.\n\n" * 20_000)
    line = [
        "harvest",
        "tiny",
        "--hook",
        "resid_post.1",
        "--dataset",
        "text:long.txt",
        "--out",
        "acts",
        "--shard-mb",
        "4",
    ]
    run = [sys.executable, "-m", "interp.cli"]
    harvest = subprocess.Popen([*run, *line], cwd=folder, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("acts/acts/00000001*")):
        assert harvest.poll() is None, harvest.stderr and harvest.stderr.read()
        time.sleep(0.05)
    harvest.send_signal(sent)
    _, told = harvest.communicate(timeout=60)
    assert harvest.returncode == code and "Traceback" not in told
    checked = subprocess.run([*run, "verify", "acts"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0 and "sound so far, unfinished" in checked.stdout


def test_two_ranks_under_torchrun_make_the_store_of_one(folder: Path):
    (folder / "some.txt").write_text("Tom and Sue went to the park and saw a big red ball.\n\n" * 400)
    line = [
        "harvest",
        "tiny",
        "--hook",
        "resid_post.1",
        "--dataset",
        "text:some.txt",
        "--shard-mb",
        "0.5",
        "--ctx",
        "64",
    ]
    line += ["--batch-size", "4", "--quiet"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for launcher, out in ((launch, "two"), ([], "one")):
        command = [sys.executable, "-m", *launcher, "interp.cli", *line, "--out", out]
        subprocess.run(command, cwd=folder, env=alone, check=True, capture_output=True, timeout=300)
    stores = [
        {p.relative_to(folder / out): p.read_bytes() for p in (folder / out).rglob("*.*") if p.suffix in SUFFIXES}
        for out in ("two", "one")
    ]
    for log in ("two/rank-0.run.json", "two/rank-1.run.json", "one/run.json"):
        stores[log[0] == "o"].pop(Path(log).relative_to(Path(log).parent))
    assert stores[0] == stores[1] and len(stores[0]) > 8


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


def test_sae_sweep_convert_and_eval_through_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    (folder / "short.txt").write_text("Tom and Sue went to the park. They saw a red ball.\n\n" * 300)
    assert call([*HARVEST, "--tokens", "3k", "--out", "acts", "--quiet"], monkeypatch) == 0
    line = ["sae", "train", "acts", "--steps", "3", "--batch-size", "256", "--width", "64", "--k", "4", "--quiet"]
    capsys.readouterr()
    assert call([*line, "--sweep", "arch=topk,relu", "--out", "runs", "--json"], monkeypatch) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["topk", "relu"]
    model = ["sae", "train", "tiny", "--dataset", "text:short.txt", "--hook", "resid_post.1", *line[3:]]
    assert call([*model, "--target", "resid_post.2", "--out", "across"], monkeypatch) == 0
    capsys.readouterr()
    assert call(["sae", "info", "across"], monkeypatch) == 0
    assert "blocks.2.hook_resid_post" in capsys.readouterr().out
    assert call(["sae", "convert", "runs/relu", "exported", "--to", "dictionary_learning"], monkeypatch) == 0
    capsys.readouterr()
    through = ["--model", "tiny", "--dataset", "text:short.txt", "--tokens", "600", "--json"]
    assert call(["sae", "eval", "exported", "--hook", "resid_post.1", *through], monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert "ce_recovered" in json.dumps(found) and "kl" in json.dumps(found)
    assert call(["sae", "eval", "exported"], monkeypatch) == 2
    assert "--dataset" in capsys.readouterr().err


def test_a_training_that_is_stopped_says_so_and_goes_on(folder: Path):
    np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(4096, 32)).astype("float32"))
    line = [
        sys.executable,
        "-m",
        "interp.cli.sae",
        "train",
        "rows.npy",
        "--steps",
        "100000",
        "--width",
        "64",
        "--k",
        "4",
    ]
    run = subprocess.Popen([*line, "--out", "run"], cwd=folder, stderr=subprocess.PIPE, text=True)
    while not (folder / "run" / "metrics.jsonl").exists() or not (folder / "run" / "metrics.jsonl").stat().st_size:
        time.sleep(0.1)
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130 and "Traceback" not in run.stderr.read()
    assert list((folder / "run" / "checkpoints").glob("step-*")) and (folder / "run" / "cfg.json").exists()

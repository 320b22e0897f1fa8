"""Runs that are stopped in every way and go on bit for bit; sweeps; sources that are not arrays."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae
from sae import checkpoint
from sae.data import Lookahead, Shuffled
from sae.io import read_json
from sae.runs import fit, grid, sweep, table
from sae.training import Step

MORTAL = Path(__file__).with_name("mortal.py")
KIND = {"width": 64, "k": 3, "batch_size": 128, "lr": 1e-2}


class Mortal:
    """A process with torch in it that forks one training after another."""

    def __init__(self) -> None:
        given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(MORTAL.parents[2])}
        self.process = subprocess.Popen(
            [sys.executable, str(MORTAL)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=given
        )

    def run(self, out: Path, **orders) -> dict:
        """Train once; returns how it ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"out": str(out), **orders}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def mortal():
    running = Mortal()
    yield running
    running.process.stdin.close()
    running.process.wait(10)


def content(root: Path) -> dict[str, bytes]:
    """Return the weights and logs of a run; what they cost in seconds aside."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[str(path.relative_to(root))] = json.dumps([{**row, "seconds": 0} for row in rows]).encode()
        elif path.suffix == ".safetensors":
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def test_killed_before_any_durable_operation_a_run_ends_with_the_same_bits(mortal, tmp_path):
    whole = mortal.run(tmp_path / "whole")
    assert whole["status"] == 0, whole
    want, operations = content(tmp_path / "whole"), whole["operations"]
    assert operations > 30 and len(want) == 2
    steps = set()
    for op in range(0, operations, 3):
        root = tmp_path / "broken"
        assert mortal.run(root, op=op, deed="kill")["status"] == -9
        held, damaged = checkpoint.latest(root / "checkpoints")
        assert not damaged
        steps.add(None if held is None else held.step)
        assert mortal.run(root)["status"] == 0
        assert content(root) == want, f"killed before operation {op}"
        shutil.rmtree(root)
    assert {None, 4, 12} <= steps


def test_a_sweep_killed_again_and_again_ends_with_the_same_bits(mortal, tmp_path):
    assert mortal.run(tmp_path / "whole", sweep=True)["status"] == 0
    want, kills, pick, root = content(tmp_path / "whole"), 0, random.Random(3), tmp_path / "broken"
    assert set(want) == {f"{arch}/{name}" for arch in ("jumprelu", "matryoshka") for name in
                         ("metrics.jsonl", "sae_weights.safetensors")}  # fmt: skip
    while kills < 10:
        ended = mortal.run(root, sweep=True, delay=pick.uniform(0.02, 0.5))["status"]
        kills += ended == -9
        if ended == 0:
            assert content(root) == want
            shutil.rmtree(root)
    assert mortal.run(root, sweep=True)["status"] == 0
    assert content(root) == want


def test_a_full_disk_costs_no_checkpoint_that_is_there(mortal, tmp_path):
    ended = mortal.run(tmp_path / "x", op=12, deed="ENOSPC")
    assert ended["status"] == 1 and "No space" in ended["error"]
    held, damaged = checkpoint.latest(tmp_path / "x" / "checkpoints")
    assert held is not None and held.step == 4 and not damaged
    assert mortal.run(tmp_path / "x")["status"] == 0
    assert mortal.run(tmp_path / "whole")["status"] == 0
    assert content(tmp_path / "x") == content(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_and_told(mortal, tmp_path, world):
    assert mortal.run(tmp_path / "x", op=20, deed="kill")["status"] == -9
    newest = sorted((tmp_path / "x" / "checkpoints").glob("step-*[0-9]"))[-1]
    data = bytearray((newest / "0.safetensors").read_bytes())
    data[-100] ^= 1
    (newest / "0.safetensors").write_bytes(data)
    held, damaged = checkpoint.latest(tmp_path / "x" / "checkpoints")
    assert [d.path for d in damaged] == [newest] and held is not None and held.step < int(newest.name[5:])


def press(at: int):
    """Return a callback that presses Ctrl-C after a step."""

    def call(step: Step) -> None:
        if step.step == at:
            raise KeyboardInterrupt

    return call


@pytest.mark.parametrize("kind", ["array", "list", "generator", "planted"])
def test_any_source_goes_on_where_it_was(kind, tmp_path, world):
    rows = world.sample(128 * 24, seed=2)[0]
    sources = {
        "array": lambda: rows,
        "list": lambda: list(rows.split(100)),
        "generator": lambda: iter(rows.split(100)),
        "planted": lambda: world.batches(128, seed=3),
    }
    make = sources[kind]
    whole = fit(make(), "topk", **KIND, steps=20, init_tokens=512, out=tmp_path / "whole")
    for at in (1, 4, 13):  # within the rows that give mean and variance, at their end, and beyond
        with pytest.raises(KeyboardInterrupt):
            fit(make(), "topk", **KIND, steps=20, init_tokens=512, out=tmp_path / f"{at}", on_step=press(at))
        assert sae.evaluate(sae.load_sae(tmp_path / f"{at}"), rows).l0 <= 3  # usable at once
        assert read_json(tmp_path / f"{at}" / "run.json")["finished"] is False
        seen: list[int] = []
        again = fit(make(), "topk", **KIND, steps=20, init_tokens=512, out=tmp_path / f"{at}",
                    on_step=lambda step, seen=seen: seen.append(step.step))  # fmt: skip
        assert seen == list(range(at + 1, 21))
        for name, value in whole.sae.state_dict().items():
            assert torch.equal(value, again.sae.state_dict()[name]), (at, name)
        assert not (tmp_path / f"{at}" / "checkpoints").exists()


def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(tmp_path, world, monkeypatch):
    from sae import optim

    rows = world.sample(2048, seed=2)[0]
    whole = fit(rows, **KIND, steps=12)
    real, steps = optim.remove_parallel, []

    def during(grad, dec) -> None:
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        real(grad, dec)

    monkeypatch.setattr(optim, "remove_parallel", during)
    with pytest.raises(KeyboardInterrupt):
        fit(rows, **KIND, steps=12, out=tmp_path)
    assert len(steps) == 5 and (tmp_path / "checkpoints" / "step-000000000005").is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = fit(rows, **KIND, steps=12, out=tmp_path)
    assert torch.equal(again.sae.W_enc, whole.sae.W_enc)


def test_a_finished_run_is_returned_as_it_is_and_another_is_refused(tmp_path, world):
    rows = world.sample(2048, seed=2)[0]
    first = fit(rows, **KIND, steps=6, out=tmp_path)
    again = fit(rows, **KIND, steps=6, out=tmp_path, on_step=press(1))  # no step is done
    assert torch.equal(first.sae.W_dec, again.sae.W_dec) and first.result == again.result and first.log == again.log
    for words, changes in {
        "sae.k is 3 there, 4 here": {"k": 4},
        "train.steps is 6 there, 7 here": {"steps": 7},
    }.items():
        with pytest.raises(ValueError, match=words):
            fit(rows, **(KIND | {"steps": 6} | changes), out=tmp_path)
    with pytest.raises(ValueError, match="sha256"):
        fit(rows + 1, **KIND, steps=6, out=tmp_path)
    assert torch.equal(sae.load_sae(tmp_path).W_dec, first.sae.W_dec)


def test_two_processes_do_not_train_into_one_folder(tmp_path, world):
    rows = world.sample(2048, seed=2)[0]

    def meddle(step: Step) -> None:
        if step.step == 2:
            with pytest.raises(ValueError, match="another process"):
                fit(rows, **KIND, steps=6, out=tmp_path)

    fit(rows, **KIND, steps=6, out=tmp_path, on_step=meddle)


def test_a_sweep_shares_its_batches_and_equals_single_runs(tmp_path, world):
    rows = world.sample(4096, seed=2)[0]
    variants = grid(arch=["topk", "gated"], k=[2, 4], width=64, lr=1e-2)
    runs = sweep(rows, variants, steps=15, batch_size=128, out=tmp_path)
    assert [run.name for run in runs] == ["topk-k2", "topk-k4", "gated-k2", "gated-k4"]
    for run, variant in zip(runs, variants, strict=True):
        alone = fit(rows, **variant, steps=15, batch_size=128)
        assert torch.equal(run.sae.W_enc, alone.sae.W_enc)
        assert torch.equal(sae.load_sae(tmp_path / run.name).W_enc, alone.sae.W_enc)
        assert run.result == alone.result and run.result["l0"] > 0
    lines = table(runs).splitlines()
    assert len(lines) == 5 and lines[0].split()[:3] == ["run", "fve", "l0"] and lines[1].startswith("topk-k2")
    with pytest.raises(ValueError, match="the same"):
        sweep(rows, [{"k": 2}, {"k": 2}], steps=1)
    with pytest.raises(ValueError, match="at least one"):
        sweep(rows, [], steps=1)


class Shelf:
    """A store of two hook points, as `fit` sees one."""

    hooks = ["a.long", "b.long"]  # noqa: RUF012

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = {"a.long": rows, "b.long": rows[:, :20] * 3 + 1}

    def name(self, hook: str) -> str:
        return f"{hook}.long"

    def describe(self) -> dict:
        return {"fingerprint": "f", "model": {"name": "m"}, "rows": len(self.rows["a.long"])}

    def batches(self, batch_size: int, hook=None, *, seed: int = 0):
        if hook is None or isinstance(hook, str):
            return Shuffled(self.rows[hook or "a.long"], batch_size, seed)
        return Both({f"{name}.long": self.rows[f"{name}.long"] for name in hook}, batch_size, seed)


class Both(Shuffled):
    """Rows of several tables in one order."""

    def __init__(self, tables: dict, batch_size: int, seed: int) -> None:
        super().__init__(torch.arange(len(next(iter(tables.values()))))[:, None], batch_size, seed)
        self.tables = tables

    def __iter__(self):
        for rows in super().__iter__():
            yield {name: table[rows[:, 0]] for name, table in self.tables.items()}


def test_a_store_gives_autoencoders_transcoders_and_crosscoders(tmp_path, world):
    shelf = Shelf(world.sample(4096, seed=2)[0])
    one = fit(shelf, **KIND, steps=10, hook="a", out=tmp_path / "one")
    assert one.sae.config.metadata == {"model_name": "m", "hook_name": "a.long"} and one.sae.d_in == 24
    across = fit(shelf, **KIND, steps=150, hook="a", target="b", skip=True, out=tmp_path / "across")
    assert (across.sae.d_in, across.sae.d_out) == (24, 20) and across.sae.W_skip is not None
    assert across.result["fve"] > 0.5 and across.sae.config.metadata["hook_name_out"] == "b.long"
    assert torch.equal(sae.load_sae(tmp_path / "across").W_dec, across.sae.W_dec)
    crossed = fit(shelf, **(KIND | {"k": 4}), steps=5, hook=["a", "a"], out=tmp_path / "crossed")
    assert (
        crossed.sae.config.metadata["hook_name"] == ["a.long", "a.long"]
        and crossed.sae.config.n_sites == 2
        and crossed.sae.d_sae == 64
        and crossed.sae.d_in == 48
    )
    both = sweep(shelf, grid(hook=["a", "b"], width=64, k=3), steps=5, batch_size=128)
    assert [run.sae.d_in for run in both] == [24, 20] and [run.name for run in both] == ["a", "b"]
    with pytest.raises(ValueError, match="no hook points"):
        fit(world.sample(256, seed=2)[0], hook="a")


def test_what_is_looked_at_ahead_still_comes(world):
    rows = torch.arange(40.0)[:, None]
    feed = Lookahead(Shuffled(rows, 4, seed=1))
    plain = iter(Shuffled(rows, 4, seed=1))
    ahead = feed.peek(10)
    assert len(ahead) == 3 and feed.state()["rows"] == 0
    reading = iter(feed)
    for number in range(1, 6):
        assert torch.equal(next(reading), next(plain)) and feed.state()["rows"] == 4 * number


def test_options_that_do_not_exist_are_named(world):
    with pytest.raises(ValueError, match=r"aux_wait.*TrainConfig"):
        fit(world.sample(256, seed=2)[0], aux_wait=1, batch_size=64)


def test_metrics_go_to_a_tracker_only_when_asked_for(tmp_path, world, monkeypatch):
    sent: list[tuple[int, dict]] = []

    class Fake:
        def init(self, **kwargs):
            assert "config" in kwargs

        def log(self, row, step):
            sent.append((step, row))

        def finish(self):
            sent.append((-1, {}))

    monkeypatch.setattr("sae.tracking.require", lambda module, extra: Fake())
    rows = world.sample(2048, seed=2)[0]
    fit(rows, **KIND, steps=4, log_every=2, out=tmp_path / "a")
    assert sent == []
    fit(rows, **KIND, steps=4, log_every=2, out=tmp_path / "b", track="trackio")
    assert [step for step, _ in sent] == [2, 4, -1] and "fve" in sent[0][1]
    with pytest.raises(ValueError, match="tensorboard, wandb, trackio"):
        fit(rows, **KIND, steps=4, out=tmp_path / "c", track="mlflow")

"""Fixtures of the store's tests: a tiny model, a text, a store of them, and processes that die on command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import small_store
from small_store import HOOKS, SETTINGS


@pytest.fixture(scope="session")
def model():
    return small_store.make_model()


@pytest.fixture(scope="session")
def texts():
    return small_store.make_texts()


@pytest.fixture(scope="session")
def harvest(model, texts):
    """Return a harvest with small shards: harvest(out, **changes)."""
    from interp.store.harvest import harvest_acts

    def call(out, **changes):
        given = {"model": model, "source": texts, "hooks": HOOKS, "out": out, **SETTINGS, **changes}
        return harvest_acts(given.pop("model"), given.pop("source"), given.pop("hooks"), **given)

    return call


@pytest.fixture(scope="session")
def reference(harvest, tmp_path_factory):
    """Return the path of an undisturbed store."""
    root = tmp_path_factory.mktemp("reference") / "store"
    assert harvest(root).complete
    return root


SCRIPT = Path(small_store.__file__)


class Forker:
    """A process with torch and the model in it that forks one harvest after another."""

    def __init__(self):
        given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=given
        )

    def run(self, out, **orders):
        """Run one harvest; returns how it ended (see small_store.py)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"out": str(out), **orders}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="session")
def forker():
    running = Forker()
    yield running
    running.close()

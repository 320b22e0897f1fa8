"""What the SAE tests share: the slow oracles and one small planted world."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sae.synthetic import Planted, planted


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Run on one thread: these tensors are too small for two, which only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def oracles() -> ModuleType:
    """Return tests/oracles.py."""
    spec = importlib.util.spec_from_file_location("oracles", Path(__file__).parents[1] / "oracles.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def world() -> Planted:
    """Return 48 features in 24 dimensions, some 3 of them on a token."""
    return planted(d_in=24, n_features=48, active=3, seed=1)

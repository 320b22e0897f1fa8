"""Two processes against one: the same weights, whether they share tokens or latents."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae
from sae.dist import ALONE, join_world
from sae.io import load_tensors

RANKS = Path(__file__).with_name("ranks.py")


def launch(size: int, *arguments: str) -> None:
    """Run ranks.py in `size` processes that know each other as torchrun's do."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = [
        subprocess.Popen(
            [sys.executable, str(RANKS), *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for process in started:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error


ARCHES = ("batchtopk", "topk", "matryoshka", "jumprelu", "relu", "gated")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a folder of what one process and two made of every architecture."""
    folder = tmp_path_factory.mktemp("ranks")
    for size, share in ((1, "tokens"), (2, "tokens"), (2, "latents")):
        launch(size, share, ",".join(ARCHES), "20", str(folder / f"{size}-{share}"))
    return folder


@pytest.mark.parametrize("arch", ARCHES)
def test_two_processes_end_with_the_weights_of_one(arch, trained):
    alone, meta = load_tensors(trained / f"1-tokens-{arch}")
    assert meta == {"size": 1} and len(alone) > 15
    for share in ("tokens", "latents"):
        together, meta = load_tensors(trained / f"2-{share}-{arch}")
        assert meta == {"size": 2} and set(together) == set(alone)
        assert float((alone["20.enc"] - alone["1.enc"]).abs().max()) > 1e-3  # twenty steps do something
        for name, value in alone.items():
            atol = 1e-6 if name.startswith("1.") else 1e-4
            worst = float((together[name] - value).abs().max())
            assert worst <= atol * max(1.0, float(value.abs().max())), f"{share}: {name} differs by {worst}"


@pytest.mark.parametrize("share", ["tokens", "latents"])
def test_a_run_of_two_that_is_stopped_goes_on_as_if_it_had_not_been(share, tmp_path):
    launch(2, "fit", share, str(tmp_path / "whole"), "0")
    launch(2, "fit", share, str(tmp_path / "broken"), "17")
    assert [p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-000000000017"]
    launch(2, "fit", share, str(tmp_path / "broken"), "0")
    whole, broken = (sae.load_sae(tmp_path / name) for name in ("whole", "broken"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[name]), name


def test_without_torchrun_one_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_world() is ALONE and join_world("latents") is ALONE
    with pytest.raises(ValueError, match="tokens or latents"):
        join_world("layers")

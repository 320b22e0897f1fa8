"""Fixtures that every room's tests share."""

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data, or skip the test and say why."""
    folder = Path(os.environ.get("INTERP_SHARED") or ROOT.parent / "shared" / "data")
    if not (folder / "README.md").is_file():
        pytest.skip(f"no real data at {folder}: set INTERP_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def browser():
    """Yield a headless Chromium, or skip the test and say why."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    path = os.environ.get("INTERP_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium: install one, or set INTERP_CHROMIUM to its path")
    with playwright.sync_playwright() as p:
        # launch() makes a fresh profile folder of its own and removes it
        running = p.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield running
        running.close()

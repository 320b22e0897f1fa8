"""The public face of the package."""

import subprocess
import sys

import pytest

import sae


def test_importing_sae_imports_neither_torch_nor_numpy():
    code = (
        "import sys, sae, sae.extras, sae.io; print([m for m in ('torch', 'numpy', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_listed():
    assert set(sae.__all__) <= set(dir(sae))
    for name in sae.__all__:
        assert getattr(sae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        sae.nope  # noqa: B018

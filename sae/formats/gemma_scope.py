"""Gemma Scope (arXiv:2408.05147): params.npz with JumpReLU weights, b_dec not taken from the input."""

import os
import re
from pathlib import Path
from typing import Any

from sae.archs.base import SAE
from sae.extras import MissingError
from sae.formats.files import load_state, names_of
from sae.formats.weights import assemble, take
from sae.io import FormatError

__all__ = ["FILES", "detect", "load"]

FILES = (("params.npz",),)

_NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def detect(path: Path) -> bool:
    """Return whether a folder holds params.npz, or a file is an npz with these arrays."""
    file = path / "params.npz" if path.is_dir() else path
    return file.suffix == ".npz" and file.is_file() and set(_NAMES) == set(names_of(file))


def load(path: str | os.PathLike, *, transcoder: bool | None = None) -> SAE:
    """Return the SAE or transcoder of a params.npz, its hook point told from the folders' names where they say it.

    Files of transcoders look like those of SAEs: `transcoder` says which, None: by the word in the path. SAEs of the
    embedding (a folder named so) get the factor sqrt(d) that they were trained without. Raises MissingError or
    FormatError.
    """
    file = Path(path) / "params.npz" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise MissingError(f"there is no file {file}")
    weights = take(load_state(file), _NAMES, file)
    where = file.parent.absolute().as_posix()
    if transcoder is None:
        transcoder = "transcoder" in where
    if "embedding" in file.parts[-4:-1]:  # embedding/width_4k/average_l0_10/params.npz
        if weights["W_enc"].ndim != 2:
            raise FormatError(f"{file}: W_enc has shape {tuple(weights['W_enc'].shape)}")
        root = weights["W_enc"].shape[0] ** 0.5
        weights |= {"W_enc": weights["W_enc"] / root, "W_dec": weights["W_dec"] * root}
    return assemble(
        file, weights, transcoder=transcoder, arch="jumprelu",
        apply_b_dec_to_input=None if transcoder else False, metadata=_metadata(where, transcoder),
    )  # fmt: skip


def _metadata(where: str, transcoder: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    layer, l0 = re.search(r"layer_(\d+)", where), re.search(r"average_l0_(\d+)", where)
    # in a cache of the hub the repository is one folder: models--google--gemma-scope-2b-pt-res
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", where)
    if repository:
        found["model_name"] = f"gemma-2-{repository[1]}" + ("-it" if repository[2] == "it" else "")
    if layer and transcoder:
        found["hook_name"] = f"blocks.{layer[1]}.ln2.hook_normalized"
        found["hook_name_out"] = f"blocks.{layer[1]}.hook_mlp_out"
    elif layer and repository:
        found["hook_name"] = f"blocks.{layer[1]}.{_SITES[repository[3]]}"
    if l0:
        found["l0"] = int(l0[1])
    return found

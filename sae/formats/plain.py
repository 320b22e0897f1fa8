"""Tables of tensors of nobody's format: usual spellings are guessed, what cannot be guessed has to be said."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.archs.base import SAE
from sae.formats.files import SUFFIXES, load_state
from sae.formats.weights import assemble
from sae.io import FormatError

__all__ = ["FILES", "detect", "load"]

FILES: tuple[tuple[str, ...], ...] = ()  # of no fixed name: on a hub, the file is part of the id

# compared in lower case, without dots and underlines
_SPELLINGS = {
    "W_enc": "wenc we encoderweight encoderweights encoderw encw encweight encoder enc",
    "W_dec": "wdec wd decoderweight decoderweights decoderw decw decweight decoder dec dictionary",
    "b_enc": "benc be encoderbias encoderb encb encbias latentbias",
    "b_dec": "bdec bd decoderbias decoderb decb decbias prebias bpre bias outputbias inputbias",
    "threshold": "threshold thresholds theta jumpreluthreshold cut",
    "W_skip": "wskip skipweight skip",
    "r_mag": "rmag logrmag",
    "b_mag": "bmag magbias",
}
_GATES = ("bgate", "gatebias")


def detect(path: Path) -> bool:
    """Return whether a path is a file of tensors: the last resort."""
    return path.is_file() and path.suffix in SUFFIXES


def load(
    path: str | os.PathLike,
    *,
    arch: str | None = None,
    k: int | float | None = None,
    names: Mapping[str, str] | None = None,
    transpose: bool | Sequence[bool] | None = None,
    apply_b_dec_to_input: bool | None = None,
    transcoder: bool = False,
    input_norm: str = "none",
    metadata: Mapping[str, Any] | None = None,
) -> SAE:
    """Return the SAE that a table of tensors is, told what the table does not say.

    Args:
        path: a .safetensors, .pt, .pth, .bin or .npz file.
        arch: an architecture; needed, but where thresholds (jumprelu) or magnitude biases (gated) tell it.
        k: of topk; also of the others, where it is known.
        names: {public name: name in the file} for W_enc, W_dec, b_enc, b_dec, threshold, W_skip, r_mag, b_mag, as far
            as the usual spellings (encoder.weight, pre_bias...) do not find them. Biases may be absent.
        transpose: whether W_enc is stored as [d_sae, d_in] and W_dec as [d_out, d_sae], or a pair, one for each; None:
            from the shapes and b_enc, which fails where d_sae = d_in or there is no b_enc.
        apply_b_dec_to_input: whether b_dec is taken from the input; None: yes for an autoencoder.
        transcoder: whether what is predicted is not what is read.
        input_norm: "layer_norm" where each token is standardised first.
        metadata: what else is known, such as hook_name.

    Raises MissingError, FormatError; what has to be said is in its message.
    """
    file = Path(path)
    state = {name: value for name, value in load_state(file).items() if isinstance(value, Tensor)}
    found = _find(state, dict(names or {}), file)
    weights = {public: state[name] for public, name in found.items()}
    if arch is None:
        arch = "gated" if "b_mag" in weights else "jumprelu" if "threshold" in weights else None
    if arch is None:
        raise FormatError(
            f"{file} holds {', '.join(sorted(state)[:12])}, of no format that is known: say what it is, "
            "load_sae(path, format='plain', arch='relu' or 'topk' with k=...)"
        )
    weights |= _oriented(weights["W_enc"], weights["W_dec"], weights, transpose, file)
    d_sae, d_out = weights["W_dec"].shape
    for name, size in (("b_enc", d_sae), ("b_dec", d_out)):
        weights.setdefault(name, torch.zeros(size))
    cut = weights.get("threshold")
    if cut is not None and cut.numel() == 1:
        weights["threshold"] = cut.reshape(()).expand(d_sae)
    if arch == "gated":
        weights.setdefault("r_mag", torch.zeros(d_sae))
    return assemble(
        file, weights, transcoder=transcoder, arch=arch, k=k, apply_b_dec_to_input=apply_b_dec_to_input,
        input_norm=input_norm, metadata=dict(metadata or {}),
    )  # fmt: skip


def _find(state: dict[str, Tensor], names: dict[str, str], file: Path) -> dict[str, str]:
    """Return {public name: name in the file}."""
    unknown = set(names) - set(_SPELLINGS)
    if unknown:
        raise FormatError(f"names has {', '.join(sorted(unknown))}; it may have: {', '.join(_SPELLINGS)}")
    absent = sorted(set(names.values()) - set(state))
    if absent:
        raise FormatError(f"{file} holds no {absent[0]!r}; it holds: {', '.join(sorted(state)[:12])}")
    found, taken = dict(names), set(names.values())
    plain = {name: name.lower().replace(".", "").replace("_", "") for name in state}
    gated = any(word in _GATES for word in plain.values())
    for public, words in _SPELLINGS.items():
        if public in found:
            continue
        wanted = _GATES if public == "b_enc" and gated else words.split()
        fits = [name for name, word in plain.items() if word in wanted and name not in taken]
        if len(fits) > 1:
            raise FormatError(
                f"{file}: {' and '.join(fits)} could each be {public}: say which, names={{{public!r}: ...}}"
            )
        if fits:
            found[public] = fits[0]
            taken.add(fits[0])
    missing = [public for public in ("W_enc", "W_dec") if public not in found]
    if missing:
        raise FormatError(
            f"{file} holds {', '.join(sorted(state)[:12]) or 'no tensor'}, none of which is recognised as "
            f"{' or '.join(missing)}: say which, load_sae(path, format='plain', names={{'W_enc': ...}}, arch=...)"
        )
    spare = [name for name in state if name not in taken and state[name].ndim > 1]
    if spare:
        raise FormatError(f"{file} also holds {', '.join(spare[:6])}: what it is for is unknown, so it is not left out")
    return found


def _oriented(
    enc: Tensor, dec: Tensor, weights: dict[str, Tensor], transpose: bool | Sequence[bool] | None, file: Path
) -> dict[str, Tensor]:
    """Return W_enc [d_in, d_sae] and W_dec [d_sae, d_out]."""
    if enc.ndim != 2 or dec.ndim != 2:
        raise FormatError(f"{file}: W_enc {tuple(enc.shape)} and W_dec {tuple(dec.shape)} must be matrices")
    if transpose is None:
        bias = weights.get("b_enc")
        width = bias.shape[0] if bias is not None and bias.ndim == 1 else None
        if width is None or enc.shape[0] == enc.shape[1] or dec.shape[0] == dec.shape[1]:
            raise FormatError(
                f"{file}: W_enc {tuple(enc.shape)} and W_dec {tuple(dec.shape)} alone do not tell which side the "
                "latents are: say it, transpose=True where W_enc is [d_sae, d_in] and W_dec [d_out, d_sae], else False"
            )
        flips = (enc.shape[0] == width, dec.shape[1] == width)
    else:
        flips = (transpose, transpose) if isinstance(transpose, bool) else transpose
    enc, dec = enc.t() if flips[0] else enc, dec.t() if flips[1] else dec
    if enc.shape[1] != dec.shape[0]:
        raise FormatError(f"{file}: W_enc {tuple(enc.shape)} does not fit W_dec {tuple(dec.shape)}, each [in, out]")
    return {"W_enc": enc, "W_dec": dec}

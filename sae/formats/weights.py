"""Between an SAE and named tensors in the layout of this project: what every format's reader and writer end in."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae.archs.base import SAE
from sae.config import SAEConfig
from sae.io import FormatError

__all__ = ["assemble", "centring", "fold_norms", "fold_scale", "fold_whitening", "parts", "take"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def parts(sae: SAE) -> dict[str, Tensor]:
    """Return the weights in the data's units by their public names, at any time of the training."""
    names = ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"]
    names += [name for name in ("r_mag", "b_mag") if hasattr(sae, name)]
    found = {name: getattr(sae, name).detach() for name in names}
    return found if sae.W_skip is None else found | {"W_skip": sae.W_skip.detach()}


def take(tensors: dict[str, Any], names: dict[str, str], file: Path, *, spare: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return tensors under their public names, given {public name: name in the file}.

    Raises FormatError where one is absent, or where the file holds another that is not in `spare` either: what is
    not understood might change what the SAE computes.
    """
    missing = sorted(set(names.values()) - set(tensors))
    if missing:
        raise FormatError(f"{file} holds {_listed(tensors)}; missing: {', '.join(missing)}")
    unknown = sorted(set(tensors) - set(names.values()) - set(spare))
    if unknown:
        raise FormatError(f"{file} also holds {_listed(unknown)}, which is not part of what it seems to be")
    return {public: tensors[name] for public, name in names.items()}


def assemble(file: Path, weights: dict[str, Any], *, transcoder: bool = False, **config: Any) -> SAE:
    """Return an SAE made of tensors by their public names, on the CPU in float32; config goes to SAEConfig.

    Widths are read from the tensors. Raises FormatError, naming the file, for tensors that do not fit each other or
    the architecture, for numbers that are not finite, and for an impossible configuration.
    """
    from sae.archs import make

    own = {name: _float32(file, name, value) for name, value in weights.items() if value is not None}
    if own["W_enc"].ndim != 2 or own["W_dec"].ndim != 2:
        raise FormatError(f"{file}: W_enc {_shape(own['W_enc'])} and W_dec {_shape(own['W_dec'])} must be matrices")
    d_in, d_sae = own["W_enc"].shape
    d_out = own["W_dec"].shape[1]
    try:
        full = SAEConfig(
            d_in=d_in, d_sae=d_sae, d_out=d_out if transcoder else None, skip="W_skip" in own, **config
        )  # fmt: skip
        with torch.device("meta"):  # no random start of millions of weights that are replaced at once
            sae = make(full)
    except (ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"{file}: {error}") from error
    sizes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, full.d_target), "b_dec": (full.d_target,)}
    sizes |= {"W_skip": (full.d_target, d_in)}
    for name, value in own.items():
        wanted = sizes.get(name, (d_sae,))
        if tuple(value.shape) != wanted:
            raise FormatError(f"{file}: {name} has shape {_shape(value)}; wanted: {wanted}")
    _fill(sae, own)
    if any(value.is_meta for value in (*sae.parameters(), *sae.buffers())):
        raise FormatError(f"{file} holds {_listed(weights)}, which is not all of what {full.arch} has")
    return sae


def _fill(sae: SAE, own: dict[str, Tensor]) -> None:
    sae.enc = nn.Parameter(own["W_enc"].t().contiguous())
    own = {name: value.contiguous() for name, value in own.items() if name != "W_enc"}
    sae.dec = nn.Parameter(own["W_dec"])
    sae.enc_bias = nn.Parameter(own["b_enc"])
    sae.dec_bias = nn.Parameter(own["b_dec"])
    cut = own.get("threshold", torch.zeros(sae.d_sae))
    sae.cut = nn.Parameter(cut) if isinstance(sae.cut, nn.Parameter) else cut
    if sae.skip is not None:
        sae.skip = nn.Parameter(own["W_skip"])
    if "r_mag" in own and "b_mag" in own and hasattr(sae, "log_gain"):
        sae.log_gain, sae.mag_bias = nn.Parameter(own["r_mag"]), nn.Parameter(own["b_mag"])


def centring(weights: dict[str, Tensor], *, have: bool, want: bool) -> dict[str, Tensor]:
    """Return weights of the same function in which b_dec is taken from the input (want), or is not.

    Only the encoder biases change, by b_dec W_enc, in float64 before they are rounded.
    """
    if have == want:
        return weights
    shift = weights["b_dec"].double() @ weights["W_enc"].double() * (1 if want else -1)
    moved = {"b_enc": (weights["b_enc"].double() + shift).float()}
    if "b_mag" in weights:
        moved["b_mag"] = (weights["b_mag"].double() + weights["r_mag"].double().exp() * shift).float()
    return weights | moved


def fold_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with decoder rows of length one, for selections that weigh a latent by its row's length."""
    norm = weights["W_dec"].norm(dim=-1).clamp_min(1e-8)
    return weights | {
        "W_enc": weights["W_enc"] * norm,
        "b_enc": weights["b_enc"] * norm,
        "W_dec": weights["W_dec"] / norm[:, None],
    }


def fold_scale(weights: dict[str, Tensor], scale: float, *, keep_norms: bool) -> dict[str, Tensor]:
    """Return weights that read x where the given ones read scale * x.

    With keep_norms the decoder rows keep their length, and what is in the units of the latents is divided instead.
    """
    moved = {"b_dec": weights["b_dec"] / scale}
    if not keep_norms:
        return weights | moved | {"W_enc": weights["W_enc"] * scale, "W_dec": weights["W_dec"] / scale}
    inner = [name for name in ("b_enc", "threshold", "b_mag") if name in weights]
    return weights | moved | {name: weights[name] / scale for name in inner}


def fold_whitening(
    weights: dict[str, Tensor], mean: Tensor, matrix: Tensor, inverse: Tensor, *, centred: bool
) -> dict[str, Tensor]:
    """Return weights that read x where the given ones read (x - mean) matrix."""
    wide = {name: value.double() for name, value in weights.items()}
    mean, matrix, inverse = mean.double(), matrix.double(), inverse.double()
    enc = matrix @ wide["W_enc"]
    moved = {"W_enc": enc, "W_dec": wide["W_dec"] @ inverse, "b_dec": wide["b_dec"] @ inverse + mean}
    if not centred:
        shift = mean @ enc
        moved["b_enc"] = wide["b_enc"] - shift
        if "b_mag" in wide:
            moved["b_mag"] = wide["b_mag"] - wide["r_mag"].exp() * shift
    return {name: value.float() for name, value in (wide | moved).items()}


def _float32(file: Path, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise FormatError(f"{file}: {name} is {given}; wanted: floating point numbers")
    own = value.detach().float()
    # one nan or infinity makes the sum one, at a tenth of the time of asking every number
    if not bool(torch.isfinite(own.sum())) and not bool(torch.isfinite(own).all()):
        raise FormatError(f"{file}: {name} holds nan or infinity")
    return own


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _listed(names: Any) -> str:
    names = sorted(str(name) for name in names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"

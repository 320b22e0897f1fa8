"""The one forward pass of every sparse autoencoder. An architecture adds its activation."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.config import SAEConfig, TrainConfig
from sae.dist import ALONE, LatentParallel, World
from sae.kernels import Active, above, active_from, decode_active
from sae.normalize import Affine

__all__ = ["PER_LATENT", "SAE", "Batch", "Output", "Pick"]

Pick = Callable[[Tensor], Tensor]  # a parameter of every latent -> its value at the entries that are looked at


class Output(NamedTuple):
    """What an SAE makes of a batch."""

    recon: Float[Tensor, "*batch d_out"]
    latents: Float[Tensor, "*latent_batch d_sae"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a training step knows when an architecture adds its penalty; everything in training space."""

    raw: Tensor  # pre-activations at the pattern [n], or all of them [tok, d_sae]
    values: Tensor  # the latents there
    active: Active | None  # the pattern; None for all
    target: Float[Tensor, "tok d_out"]
    n_tokens: int  # of all processes
    variance: float  # of the target, a token
    pressure: Float[Tensor, ""]  # coefficient of the sparsity penalty
    world: World

    def pick(self, parameter: Tensor) -> Tensor:
        """Return a parameter of every latent at the entries of `raw`."""
        return parameter if self.active is None else parameter[self.active.cols]


class SAE(nn.Module):
    """A sparse autoencoder: x_hat = f(x) W_dec + b_dec, f(x) = jump((x - b_dec) W_enc + b_enc).

    Calling, encoding and decoding use the inference form: a latent is active where its pre-activation exceeds its
    threshold (strictly), whatever the other tokens of the batch are. W_enc, W_dec, b_enc, b_dec and threshold are in
    the units of the data at any time. Rows of W_dec have unit norm, but where that would change which latents win.

    With d_out it is a transcoder: it reads x and predicts a target, W_skip x added where config.skip. With n_sites it
    is a crosscoder: it reads [tok, n_sites, d], or the same flattened, and each latent writes to every site.

    A subclass defines `select` and, where it is not a rectified linear unit, `values`: the activation while training;
    and `active` with `gate` for the inference form where that is not a threshold.
    """

    # While training, the weights live in a training space: inward.into(x) is read, outward.back(...) is written, and
    # both are folded into the weights at the end. For powers of two that changes no bit.
    # The encoder is kept as [d_sae, d_in]: the gradient of a latent is then one contiguous row.

    calibrated = False  # whether a threshold is set at the end, so that L0 is k
    pressured = False  # whether a penalty's coefficient is steered so that L0 is k
    compares = False  # whether latents of one token compete at inference: rescaling one would change who wins
    biases: tuple[str, ...] = ("enc_bias", "cut")  # what scales with the latents
    world: World = ALONE  # the processes that train it

    def __init__(self, config: SAEConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        rows = F.normalize(torch.randn(config.d_sae, config.d_in, generator=generator), dim=1)
        # Encoder = decoder^T / 2: the first reconstructions overshoot less, and Adam turns shorter rows faster. Against
        # equal rows, at one learning rate, FVE after 500 steps rises from .937 to .949 on activations of a language
        # model, and from .61 to .77 on planted data.
        self.enc = nn.Parameter(rows / 2)
        if config.transcoder:
            rows = F.normalize(torch.randn(config.d_sae, config.d_target, generator=generator), dim=1)
        self.dec = nn.Parameter(rows)
        self.enc_bias = nn.Parameter(torch.zeros(config.d_sae))
        self.dec_bias = nn.Parameter(torch.zeros(config.d_target))
        self.skip = nn.Parameter(torch.zeros(config.d_target, config.d_in)) if config.skip else None
        self.register_buffer("cut", torch.zeros(config.d_sae))
        self.cut: Tensor
        self.inward: Affine | None = None
        self.outward: Affine | None = None

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_out(self) -> int:
        return self.config.d_target

    @property
    def d_sae(self) -> int:
        return self.config.d_sae

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Encoder weights; column i reads latent i."""
        return self.weights()["enc"].t()

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        """Decoder weights; row i is the direction that latent i writes."""
        return self.dec if self.outward is None else self.weights()["dec"]

    @property
    def W_skip(self) -> Float[Tensor, "d_out d_in"] | None:
        """Linear map from the input straight to the output of a transcoder that has one."""
        return self.weights().get("skip")

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """Encoder bias, in the data's units."""
        return self.weights()["enc_bias"]

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        """Decoder bias, in the data's units; also taken from the input of an autoencoder."""
        return self.weights()["dec_bias"]

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """Value that a pre-activation must exceed; 0 until training has calibrated it."""
        return self.weights()["cut"]

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*latent_batch d_sae"]:
        """Return (x - b_dec) W_enc + b_enc. Raises ValueError for another width than d_in."""
        return self._pre(self._given(x)) / self._unit()

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*latent_batch d_sae"]:
        """Return the latents of each token."""
        return self.gate(self._pre(self._given(x))) / self._unit()

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "tok ..."]) -> tuple[Float[Tensor, " n"], Active]:
        """Return the values of the active latents alone, and where they are: what `encode` gives, without the zeros."""
        pre = self._pre(self._given(x))
        flat = self.active(pre)
        active = active_from(flat, (pre.shape[0], pre.shape[1]))
        return self.values(pre.view(-1)[flat], lambda p: p[active.cols]) / self._unit(), active

    def decode(
        self, latents: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*given d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Return latents W_dec + b_dec: the reconstruction, flat where there are several sites.

        With a skip connection or an input norm the input x is needed too; raises ValueError without it.
        """
        return self._written((latents * self._unit()) @ self.dec, x)

    @torch.no_grad()
    def reconstruct_sparse(
        self, values: Float[Tensor, " n"], active: Active, x: Float[Tensor, "tok ..."] | None = None
    ) -> Float[Tensor, "tok d_out"]:
        """Return what `decode` gives, from the active latents alone."""
        return self._written(decode_active(values * self._unit(), active, self.dec), x)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Output:
        """Return the reconstruction (of a crosscoder in the shape of x) and the latents of each token."""
        latents = self.encode(x)
        recon = self.decode(latents, x)
        return Output(recon if self.config.transcoder else recon.view(x.shape), latents)

    # --- what an architecture is -------------------------------------------------------------------------------------

    def select(self, pre: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " n"] | None:
        """Return the flattened positions, ascending, of the latents that matter to a training batch; None for all."""
        raise NotImplementedError

    def values(self, raw: Float[Tensor, "*entries"], pick: Pick) -> Float[Tensor, "*entries"]:
        """Return the latents at the entries whose pre-activations are given."""
        return F.relu(raw)

    def active(self, pre: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " n"]:
        """Return the flattened positions, ascending, of the latents that are active at inference."""
        return above(pre, self.cut)

    def gate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Return all latents at inference."""
        return F.relu(pre) * (pre > self.cut)

    def penalty(self, batch: Batch, cfg: TrainConfig) -> Float[Tensor, ""] | None:
        """Return what is added to the training loss, as this process's share of it."""
        return None

    def begin(self, pre: Float[Tensor, "tok d_sae"], cfg: TrainConfig) -> None:
        """Set what depends on the data before the first step, from the pre-activations of some tokens."""

    def exceeded(self, pre: Float[Tensor, "tok d_sae"], k: int | float) -> float:
        """Return the value that k latents a token reach on average, over the tokens and latents of all processes."""
        kept = max(1, round(k * len(pre) * self.world.token_size))
        values = self.world.gather(pre.flatten().topk(min(kept, pre.numel()), sorted=False).values)
        return float(values.topk(min(kept, len(values)), sorted=False).values.min())

    def project(self) -> None:
        """Bring parameters back to where they must be, after each step."""

    # --- training space ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, inward: Affine, outward: Affine, b_dec: Float[Tensor, " d_out"]) -> None:
        """Enter the training space, b_dec starting at the given point of the data.

        Away from the mean most random directions would never win: starting there decides how many latents die
        (arXiv:2605.31518).
        """
        self.inward, self.outward = inward, outward
        self.dec_bias.copy_(outward.into(b_dec.to(outward.shift)))

    @torch.no_grad()
    def fold(self) -> None:
        """Leave the training space: nothing changes in what the SAE computes, not one bit for powers of two."""
        if self.outward is None:
            return
        weights = self.weights()
        plain = self.outward.scale.ndim == 0
        self.inward = self.outward = None
        for name, value in weights.items():
            getattr(self, name).copy_(value)
        if not plain and not self.compares:
            norm = self.dec.norm(dim=1).clamp_min(1e-12)
            self.dec.div_(norm[:, None])
            self.enc.mul_(norm[:, None])
            for name in self.biases:
                getattr(self, name).mul_(norm)

    @torch.no_grad()
    def shard(self, world: World) -> None:
        """Train in a world: where its processes share the latents out, keep those of this one alone."""
        self.world = world
        if isinstance(world, LatentParallel):
            self._replace(lambda tensor: tensor[world.rows(self.d_sae)].clone())

    @torch.no_grad()
    def unshard(self) -> None:
        """Be whole again, and alone."""
        if isinstance(self.world, LatentParallel):
            self._replace(self.world.whole)
        self.world = ALONE

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in PER_LATENT:
            held = getattr(self, name, None)
            if isinstance(held, nn.Parameter):
                setattr(self, name, nn.Parameter(change(held.detach())))
            elif held is not None:
                setattr(self, name, change(held))

    def weights(self) -> dict[str, Tensor]:
        """Return every weight by its attribute's name, in the data's units."""
        names = ["enc", "dec", "enc_bias", "dec_bias", "cut", *(name for name in self.biases if name not in _BASE)]
        own: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        if self.skip is not None:
            own["skip"] = self.skip
        if self.inward is None or self.outward is None:
            return own
        unit = self.outward.unit
        own["enc"] = self.inward.turned(self.enc) / unit
        own["dec"] = self.outward.unturn(self.dec * unit)
        own["dec_bias"] = self.outward.back(self.dec_bias)
        for name in self.biases:
            own[name] = own[name] / unit
        if not self.config.centred:
            self._take_off(own, own["enc"] @ self.inward.shift)
        if self.skip is not None:
            own["skip"] = self.outward.unturn(self.inward.turned(self.skip).t()).t()
            own["dec_bias"] = own["dec_bias"] - own["skip"] @ self.inward.shift
        return own

    def _take_off(self, weights: dict[str, Tensor], shift: Float[Tensor, " d_sae"]) -> None:
        """Move the shift of the input into the biases."""
        weights["enc_bias"] = weights["enc_bias"] - shift

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "_ ..."]]) -> None:
        """Set the threshold, such that on these tokens the mean number of active latents is k.

        Exact up to ties; where fewer than k latents a token are positive, the threshold is 0. An architecture without
        a threshold to set stays as it is.
        """
        if not self.calibrated or self.config.k is None:
            return
        low = 0.9 * float(self._level(self.cut).max())
        batches = list(batches)
        n_kept = round(self.config.k * sum(len(batch) for batch in batches))
        values = self._above(batches, low)
        if len(values) <= n_kept and low > 0:
            values = self._above(batches, 0.0)
        cut = 0.0 if len(values) <= n_kept else np.partition(values, len(values) - n_kept - 1)[-n_kept - 1]
        self._set_level(float(cut))

    def _level(self, pre: Tensor) -> Tensor:
        """Return pre-activations in units in which one number separates the active from the others."""
        return pre

    def _set_level(self, cut: float) -> None:
        self.cut.fill_(cut)

    def _above(self, batches: list[Tensor], low: float) -> np.ndarray:
        rows = (part for batch in batches for part in batch.split(4096))
        held = np.concatenate([_greater(self._level(self._pre(self._given(part))), low) for part in rows])
        if self.world.latent_size == 1:
            return held
        return self.world.gather(torch.from_numpy(held).to(self.enc.device)).cpu().numpy()

    def _unit(self) -> Tensor | float:
        return 1.0 if self.outward is None else self.outward.unit

    def _given(self, x: Tensor) -> Float[Tensor, "*batch d_in"]:
        """Return the input in the weights' dtype and flat, in training space while there is one."""
        sites = self.config.n_sites
        if sites > 1 and x.ndim > 1 and x.shape[-2:] == (sites, self.d_in // sites):
            x = x.flatten(-2)
        if x.shape[-1] != self.d_in:
            raise ValueError(f"this SAE reads activations of width {self.d_in}; the batch has width {x.shape[-1]}")
        x = x.to(self.enc.dtype)
        if self.config.input_norm == "layer_norm":
            mean, deviation = _row_moments(x)
            x = (x - mean) / (deviation + 1e-5)
        return x if self.inward is None else self.inward.into(x)

    def _pre(self, z: Tensor) -> Tensor:
        return F.linear(z - self.dec_bias if self.config.centred else z, self.enc, self.enc_bias)

    def _written(self, recon: Tensor, x: Tensor | None) -> Tensor:
        """Return a reconstruction in training space, still without bias, as one of the data."""
        recon = recon + self.dec_bias
        if x is None and (self.skip is not None or self.config.input_norm != "none"):
            raise ValueError("decoding needs the input too, for its skip connection or its norm: decode(latents, x)")
        if self.skip is not None and x is not None:
            recon = recon + F.linear(self._given(x), self.skip)
        if self.outward is not None:
            recon = self.outward.back(recon)
        if self.config.input_norm == "layer_norm" and x is not None:
            mean, deviation = _row_moments(x.to(self.enc.dtype))
            recon = recon * deviation + mean
        return recon


_BASE = ("enc_bias", "cut")
PER_LATENT = ("enc", "dec", "enc_bias", "cut", "log_gain", "mag_bias")  # what has a row for each latent


def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    # the small number that keeps a constant row finite goes into the input alone, as in OpenAI's and SAELens's code
    return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)


def _greater(pre: Tensor, low: float) -> np.ndarray:
    array = pre.flatten().cpu().numpy()
    return array[array > low]

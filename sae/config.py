"""What an SAE is and how it is trained: frozen values, every field with its meaning and unit."""

from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["INPUT_NORMS", "NORMALISATIONS", "SAEConfig", "TrainConfig"]

INPUT_NORMS = ("none", "layer_norm")
NORMALISATIONS = ("none", "sqrt_d", "whiten")


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The shape of a sparse autoencoder and where it belongs."""

    arch: str
    """A name in ARCHS."""

    d_in: int
    """Width of the activations that are read; of all sites together for a crosscoder."""

    d_sae: int
    """Number of latents."""

    k: int | float | None = None
    """Mean number of active latents a token (L0) that is asked for; None where weights came without one."""

    d_out: int | None = None
    """Width of what a transcoder predicts; None: an autoencoder, which predicts what it reads."""

    skip: bool = False
    """Whether a transcoder adds a linear map of its input, W_skip [d_out, d_in]."""

    n_sites: int = 1
    """Hook points or models stacked in d_in: more than one makes a crosscoder, read as [tok, n_sites, d]."""

    levels: tuple[int, ...] = ()
    """Matryoshka: rising numbers of latents that must reconstruct alone, the last d_sae; (): only all of them."""

    apply_b_dec_to_input: bool | None = None
    """Whether b_dec is taken from the input; None: for autoencoders, not for transcoders."""

    input_norm: str = "none"
    """"layer_norm": each token is standardised before reading, and the output put back (OpenAI's SAEs)."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """What the caller knows: hook_name, model_name, ...; JSON-able, saved with the weights."""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1 or (self.d_out is not None and self.d_out < 1):
            raise ValueError(f"d_in {self.d_in}, d_sae {self.d_sae} and d_out {self.d_out} must be at least 1")
        if self.k is not None and not 0 < self.k <= self.d_sae:
            raise ValueError(f"k is {self.k}; it must be above 0 and at most d_sae = {self.d_sae}")
        if self.n_sites < 1 or self.d_in % self.n_sites:
            raise ValueError(f"n_sites is {self.n_sites}; it must divide d_in = {self.d_in}")
        if self.transcoder and (self.n_sites > 1 or self.apply_b_dec_to_input or self.input_norm != "none"):
            raise ValueError("a transcoder has one site, no input normalisation, and no b_dec of its input to take off")
        if self.skip and not self.transcoder:
            raise ValueError("a skip connection belongs to a transcoder; give d_out")
        if self.input_norm not in INPUT_NORMS:
            raise ValueError(f"input_norm is {self.input_norm!r}; it must be one of: {', '.join(INPUT_NORMS)}")
        if self.levels:
            object.__setattr__(self, "levels", tuple(self.levels))
            rising = all(a < b for a, b in zip((0, *self.levels), self.levels, strict=False))
            if not rising or self.levels[-1] != self.d_sae:
                raise ValueError(f"levels are {self.levels}; they must rise from 1 or more to d_sae = {self.d_sae}")

    @property
    def transcoder(self) -> bool:
        """Whether what is predicted is not what is read."""
        return self.d_out is not None

    @property
    def d_target(self) -> int:
        """Width of what is predicted."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def centred(self) -> bool:
        """Whether b_dec is taken from the input."""
        return not self.transcoder if self.apply_b_dec_to_input is None else self.apply_b_dec_to_input


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How an SAE is trained. A field that is None is decided by `resolve`, and the resolved copy is saved."""

    steps: int
    """Optimiser steps."""

    batch_size: int = 2048
    """Tokens a step, of all processes together; the source gives the batches, this sizes what is counted in tokens."""

    lr: int | float | None = None
    """Peak learning rate of Adam; None: by length of the run and width, see resolve."""

    warmup: int | float = 0.02
    """Share of the steps in which the learning rate rises linearly from 0."""

    decay: int | float = 0.2
    """Share of the steps, at the end, in which it falls linearly to 0."""

    betas: tuple[int | float, int | float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment; a latent that fires rarely has long forgotten 0.999's past."""

    clip: int | float = 1.0
    """Largest norm of the whole gradient; the loss is scale-free, so this is too."""

    bf16: bool = True
    """On CUDA alone: choose the active latents by a product in bfloat16; their values and all weights stay float32."""

    normalize: str = "sqrt_d"
    """Of the input while training: "none", "sqrt_d" (mean norm about sqrt(d), each site by itself), "whiten"."""

    b_dec_start: str = "mean"
    """Where b_dec starts: "mean" of the data, or their geometric "median"."""

    sparsity: int | float | None = None
    """relu, gated: coefficient of the L1 penalty; None: steered so that L0 becomes k. jumprelu: of (L0 / k - 1)^2."""

    lp: int | float = 1
    """relu: power of the sparsity penalty, sum |f|^lp."""

    bandwidth: int | float = 0.5
    """jumprelu: width of the straight-through window around a threshold, where the input has norm sqrt(d).

    Wider windows keep more latents alive and cost more: 12, 6 and 0.4 % silent at 0.5, 1 and 2 after 300 steps, FVE
    .928, .927 and .926, a step 1.5, 2.2 and 10 times that of batchtopk.
    """

    level_weights: tuple[int | float, ...] | None = None
    """matryoshka: weight of each level's loss; None: all equal."""

    aux_weight: int | float = 1 / 32
    """Weight of AuxK: the share of the residual that the dead latents leave unexplained."""

    aux_k: int | None = None
    """Dead latents that may speak for one token in AuxK; None: half of d_in."""

    dead_after: int | None = None
    """Tokens without firing that make a latent dead; None: min(10 M, 5 % of the run), at least 10 batches."""

    init_tokens: int = 65_536
    """Tokens, from the start of the source, that give mean and variance, and calibrate the threshold at the end."""

    seed: int = 0
    """Seed of what the loop itself draws (the order of the rows of an array)."""

    def __post_init__(self) -> None:
        whole = {"steps": self.steps, "batch_size": self.batch_size, "init_tokens": self.init_tokens}
        for name, value in whole.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are shares of the run and sum to at most 1")
        for name, value in {"lr": self.lr, "bandwidth": self.bandwidth, "lp": self.lp, "clip": self.clip}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if self.sparsity is not None and self.sparsity < 0:
            raise ValueError(f"sparsity is {self.sparsity}; it must not be below 0")
        if self.normalize not in NORMALISATIONS:
            raise ValueError(f"normalize is {self.normalize!r}; it must be one of: {', '.join(NORMALISATIONS)}")
        if self.b_dec_start not in ("mean", "median"):
            raise ValueError(f"b_dec_start is {self.b_dec_start!r}; it must be mean or median")

    def resolve(self, d_in: int, d_sae: int) -> "TrainConfig":
        """Return a copy in which nothing is left open that the run needs, for an SAE of that shape.

        The learning rate is 2e-4 / sqrt(d_sae / 2^14) (Gao et al.) for runs of 60,000 steps and more; shorter ones get
        more, with the inverse root of their length, up to 6e-3: with 700 steps and 3,072 latents 3e-3 and 6e-3 reach
        FVE .963 and .967 on held-out activations of a language model, 1e-2 .958, and 1e-3 is far behind.
        """
        lr = min(6e-3, 2e-4 / (d_sae / 2**14) ** 0.5 * max(1.0, (60_000 / self.steps) ** 0.5))
        dead_after = max(10 * self.batch_size, min(10_000_000, self.steps * self.batch_size // 20))
        return replace(
            self,
            lr=self.lr if self.lr is not None else lr,
            aux_k=self.aux_k if self.aux_k is not None else max(1, d_in // 2),
            dead_after=self.dead_after if self.dead_after is not None else dead_after,
        )

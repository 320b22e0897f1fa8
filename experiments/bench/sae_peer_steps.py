"""Time the training steps of one trainer, in its own environment; prints JSON. `sae_speed.py` drives it.

The trainer's own loop runs on synthetic activations. A step is what passes between one batch handed over and the next
one asked for: forward, losses, backward, clipping, optimiser, books. By turns with the steps, in the same process, the
six dense products of a dense step are timed: x W_enc, f W_dec, f^T g, g W_dec^T, x^T dpre, dpre W_enc^T. A tenth of the
latents is dead.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sae_peers
import timing

LONG = 3_000  # steps that schedules are made for
MEMORY_STEPS = 2


def activations(d_in: int, batch: int, n: int) -> list[Tensor]:
    """Return n batches of sparse mixtures of 4 d_in directions, about 32 a token, with mean squared norm d_in."""
    generator = torch.Generator().manual_seed(1)
    directions = F.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    shares = torch.arange(1, 4 * d_in + 1).double() ** -0.5
    rates = (32 * shares / shares.sum()).clamp_max(0.5).float()
    rows = []
    for _ in range(n):
        codes = (torch.rand(batch, 4 * d_in, generator=generator) < rates) * (
            1 + torch.randn(batch, 4 * d_in, generator=generator).abs() / 2
        )
        rows.append(codes @ directions + 0.02 * torch.randn(batch, d_in, generator=generator))
    scale = (d_in / rows[0].square().sum(1).mean()).sqrt()
    return [batch * scale for batch in rows]


class Products:
    """The six products of a dense step."""

    def __init__(self, x: Tensor, d_sae: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.x, self.grad = x, torch.randn(x.shape, generator=generator)
        self.enc = torch.randn(x.shape[1], d_sae, generator=generator)
        self.dec = torch.randn(d_sae, x.shape[1], generator=generator)

    @torch.no_grad()
    def seconds(self) -> float:
        """Return the time of all six. What comes out of the first serves as latents: sparsity makes no difference."""
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # sparsify's loop asks for less
        start = time.perf_counter()
        latents = self.x @ self.enc
        _ = latents @ self.dec
        _ = latents.t() @ self.grad
        slopes = self.grad @ self.dec.t()
        _ = self.x.t() @ slopes
        _ = slopes @ self.enc.t()
        spent = time.perf_counter() - start
        torch.set_float32_matmul_precision(precision)
        return spent


class Meter:
    """A source of batches that takes the time between them, and memory in the last steps."""

    def __init__(self, job: sae_peers.Job, warmup: int, repeats: int) -> None:
        self.pool = activations(job.d_in, job.batch, 4)
        self.products = Products(self.pool[0], job.d_sae)
        self.job, self.warmup, self.repeats = job, warmup, repeats
        self.steps: list[float] = []
        self.units: list[float] = []
        self.memory: list[float] = []

    def batches(self) -> Iterator[Tensor]:
        """Yield batches; raise Enough after the last step."""
        for step in range(self.warmup):
            yield self.pool[step % len(self.pool)].clone()
            if step == 0 and self.job.deaden is not None:
                self.job.deaden(self.job.d_sae // 10)
        for step in range(self.repeats):
            batch = self.pool[step % len(self.pool)].clone()
            self.units.append(self.products.seconds())
            start = time.perf_counter()
            yield batch
            self.steps.append(time.perf_counter() - start)
        for step in range(MEMORY_STEPS):
            batch = self.pool[step % len(self.pool)].clone()
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps is not at rest but not in use either
            timing.reset_peak()
            before = timing.resident()
            yield batch
            self.memory.append(timing.peak() - before)
        raise sae_peers.Enough


def main() -> None:
    """Run one trainer and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=sae_peers.ARCHS, required=True)
    parser.add_argument("--arch", default="topk")
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--width", type=int, default=16, help="latents per input dimension")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=10, help="steps before the first that is timed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    job = sae_peers.Job(
        arch=args.arch, d_in=args.d_in, d_sae=args.width * args.d_in, k=args.k, batch=args.batch, steps=LONG, late=True
    )
    meter = Meter(job, args.warmup, args.repeats)
    sae_peers.run(args.peer, job, meter.batches())
    ratios = [step / unit for step, unit in zip(meter.steps, meter.units, strict=True)]
    result = vars(args) | {
        "steps": meter.steps,
        "products": meter.units,
        "ratio": statistics.median(ratios),
        "memory_mb": max(meter.memory),
        "versions": sae_peers.versions(args.peer),
    }
    if job.last is not None:
        result |= {"l0": job.last.l0, "dead": job.last.dead}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

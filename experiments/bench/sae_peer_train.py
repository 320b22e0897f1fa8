"""Train one SAE with one trainer on rows of an .npy file, in its own environment. `sae_quality.py` drives it.

Writes the weights of the inference form as .npz (`sae_peers.run` says what is in it), and prints JSON: seconds of
training without those that reading the data took, and versions.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sae_peers


class Source:
    """Batches of a file's first rows, drawn in a fresh order each epoch; keeps the time that this takes."""

    def __init__(self, path: str, rows: int, batch: int, steps: int, seed: int) -> None:
        self.rows = np.load(path, mmap_mode="r")[:rows]
        self.batch, self.steps = batch, steps
        self.random = np.random.default_rng(seed)
        self.began: float | None = None
        self.reading = 0.0

    def batches(self) -> Iterator[Tensor]:
        """Yield as many batches as there are steps, then raise Enough."""
        self.began = time.perf_counter()
        order = np.empty(0, dtype=np.int64)
        for _ in range(self.steps):
            start = time.perf_counter()
            while len(order) < self.batch:
                order = np.concatenate([order, self.random.permutation(len(self.rows))])
            picked, order = order[: self.batch], order[self.batch :]
            batch = torch.from_numpy(self.rows[picked].astype(np.float32))
            self.reading += time.perf_counter() - start
            yield batch
        raise sae_peers.Enough


def main() -> None:
    """Train, save, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=sae_peers.ARCHS, required=True)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, required=True, help="rows of the file to train on: the first")
    parser.add_argument("--out", required=True)
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, help="default: the package's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports half of torch: not training time
    source = Source(args.data, args.rows, args.batch, args.steps, args.seed)
    job = sae_peers.Job(
        arch=args.arch, d_in=source.rows.shape[1], d_sae=args.d_sae, k=args.k, batch=args.batch, steps=args.steps,
        lr=args.lr, seed=args.seed,
    )  # fmt: skip
    weights = sae_peers.run(args.peer, job, source.batches())
    assert source.began is not None
    seconds = time.perf_counter() - source.began - source.reading
    np.savez(args.out, **weights)
    print(json.dumps({"seconds": seconds, "versions": sae_peers.versions(args.peer)}))


if __name__ == "__main__":
    main()

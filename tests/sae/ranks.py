"""What each of several processes does in test_dist.py: train a while, and write what came of it."""

import contextlib
import sys
from pathlib import Path

import torch

from sae.archs import build
from sae.config import TrainConfig
from sae.dist import World, join_world, leave_world
from sae.io import save_tensors
from sae.runs import fit
from sae.synthetic import planted
from sae.training import Trainer


def main(share: str, archs: str, steps: int, out: str) -> None:
    """Train SAEs for some steps with the other processes; the first writes the weights after the first and the last."""
    torch.set_num_threads(1)
    world = join_world(share)
    for arch in archs.split(","):
        learn(world, arch, steps, f"{out}-{arch}")
    leave_world()


def learn(world: World, arch: str, steps: int, out: str) -> None:
    """Train one SAE."""
    rows = planted(d_in=24, n_features=48, active=3, seed=1).sample(8192, seed=11)[0]
    x = build(arch, d_in=24, d_sae=64, k=3, seed=5)
    with torch.no_grad():
        x.enc_bias[::5] -= 1e3  # dead from the beginning, in every process's part
    # many steps planned, few done: the learning rate is that of the middle of a run
    cfg = TrainConfig(steps=400, batch_size=256, lr=1e-3, warmup=0.0, dead_after=512, init_tokens=2048)
    batches = rows.split(256)
    mine = [batch.chunk(world.token_size)[world.rank if world.token_size > 1 else 0] for batch in batches]
    trainer = Trainer(x, cfg, mine[:8], world)
    seen = {}
    for number in range(steps):
        trainer.advance(mine[number])
        if number in (0, steps - 1):
            tensors, _ = trainer.state()
            seen |= {
                f"{number + 1}.{name.removeprefix('sae.')}": t.clone() for name, t in tensors.items() if "sae." in name
            }
    trainer.finish([rows[:2048]])
    seen |= {name: getattr(x, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if world.rank == 0:
        save_tensors(out, {name: t.detach().float() for name, t in seen.items()}, {"size": world.size})


def run(share: str, out: str, stop: int) -> None:
    """Call `fit` with the others, stopped after some steps if stop is not 0."""

    def press(step: object) -> None:
        if stop and step.step == stop:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    torch.set_num_threads(1)
    world = join_world(share)
    rows = planted(d_in=24, n_features=48, active=3, seed=1).sample(8192, seed=11)[0]
    with contextlib.suppress(KeyboardInterrupt):
        fit(rows, "batchtopk", 64, 3, steps=40, batch_size=256, lr=1e-2, out=out, on_step=press, world=world)
    leave_world()


if __name__ == "__main__":
    if sys.argv[1] == "fit":
        run(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), str(Path(sys.argv[4])))

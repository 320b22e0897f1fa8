"""Harvest with Ray: each worker of a `map_batches` is one rank of `interp.harvest_acts`, and the store is that of one.

    python experiments/ray_harvest/run.py tiny --hook resid_post.2 --dataset text:FILE --tokens 2M --out acts

The workers need the folder `--out` in common (a shared file system), and each loads the model once. Ray gives out the
ranks and starts a dead one again; which shards are whose, what is done already and the seal are the store's own affair.
Needs Ray (pip install 'ray[data]'), which is not a dependency of interp.
"""

import argparse
from pathlib import Path
from typing import Any


def harvest_rank(batch: dict[str, Any], *, model: str, world: int, options: dict[str, Any]) -> dict[str, Any]:
    """Harvest the shards of the ranks in a batch; returns how many rows the store had then."""
    import interp

    rows = []
    for rank in batch["id"]:
        store = interp.harvest_acts(model, rank=int(rank), world_size=world, **options)
        rows.append(len(store))
    return {"rank": batch["id"], "rows": rows}


def harvest(model: str, workers: int, gpus: float = 0, **options: Any) -> Any:
    """Run `workers` ranks, one a Ray task, and return the store; `options` are those of interp.harvest_acts."""
    import ray

    import interp

    options["out"] = str(Path(options["out"]).absolute())
    ranks = ray.data.range(workers, override_num_blocks=workers)
    given = {"model": model, "world": workers, "options": options}
    ranks.map_batches(harvest_rank, fn_kwargs=given, batch_size=1, num_gpus=gpus or None).materialize()
    return interp.open_store(options["out"])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Harvest activations with Ray.")
    parser.add_argument("model")
    parser.add_argument("--hook", action="append", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--tokens", type=lambda text: int(float(text.upper().replace("M", "e6"))))
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs a worker")
    given = parser.parse_args()
    print(
        harvest(
            given.model, given.workers, given.gpus, source=given.dataset, hooks=given.hook, tokens=given.tokens,
            out=given.out,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Compare the time and memory of a training step with three other trainers -> sae_speed.json.

One process a contender and round, in its own environment (sae_peers.sh), by turns and never two at once; every other
round goes backwards. The unit of time is the six dense products of a dense step, timed by turns with the steps in the
same process: a ratio of 1 is a step that costs what its products would if nothing were sparse and all else were free.
The peers run with their own defaults (sparsify has no AuxK by default), all with a tenth of the latents dead.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import timing
from sae_peers import ARCHS
from sae_quality import child


def measure(args: argparse.Namespace, arch: str, d_in: int, threads: int) -> list[dict[str, Any]]:
    """Return one row a contender that has the architecture."""
    peers = [peer for peer in args.peers if arch in ARCHS[peer]]
    reports: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    settings = {
        "arch": arch, "d_in": d_in, "width": args.width, "k": args.k, "batch": args.batch, "threads": threads,
        "repeats": args.repeats, "warmup": args.warmup,
    }  # fmt: skip
    for turn in range(args.rounds):
        for peer in peers if turn % 2 else reversed(peers):
            reports[peer].append(child(peer, "sae_peer_steps.py", settings, threads))
    rows = [row(arch, d_in, threads, peer, reports[peer]) for peer in peers]
    if "interp" in peers:
        ours = next(row["products"] for row in rows if row["peer"] == "interp")
        rows = [row | {"to interp": row["products"] / ours} for row in rows]
    for line in rows:
        print(line, flush=True)
    return rows


def row(arch: str, d_in: int, threads: int, peer: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of all rounds' steps, and the ratios' range from round to round."""
    ratios = [step / unit for report in reports for step, unit in zip(report["steps"], report["products"], strict=True)]
    by_round = [report["ratio"] for report in reports]
    return {
        "arch": arch,
        "d_in": d_in,
        "threads": threads,
        "peer": peer,
        "products": statistics.median(ratios),
        "lowest round": min(by_round),
        "highest round": max(by_round),
        "seconds": statistics.median(step for report in reports for step in report["steps"]),
        "unit seconds": statistics.median(unit for report in reports for unit in report["products"]),
        "memory MB": statistics.median(report["memory_mb"] for report in reports),
    }


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=",".join(ARCHS["interp"]))
    parser.add_argument("--d-in", default="256,768")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--peers", default=",".join(ARCHS))
    parser.add_argument("--width", type=int, default=16, help="latents per input dimension")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a process")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them")
    parser.add_argument("--name", help="of the result's file; default: sae_speed, or sae_speed_quick")
    parser.add_argument("--quick", action="store_true", help="a small shape once, to see that everything runs")
    args = parser.parse_args()
    if args.quick:
        args.d_in, args.threads, args.batch, args.rounds, args.repeats, args.warmup = "64", "1", 1024, 1, 3, 7
    args.peers = args.peers.split(",")
    machine = timing.machine()
    rows = []
    for arch in args.archs.split(","):
        for d_in in map(int, args.d_in.split(",")):
            for threads in map(int, args.threads.split(",")):
                rows += measure(args, arch, d_in, threads)
    timing.report(
        args.name or ("sae_speed_quick" if args.quick else "sae_speed"), rows, machine=machine, settings=vars(args)
    )


if __name__ == "__main__":
    main()

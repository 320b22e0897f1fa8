"""Kill a real training at random moments: are its weights those of an undisturbed run, bit for bit?

    python experiments/bench/sae_faults.py --source ACTS.npy --kills 20

Runs the command line, so that start, resume and the final save are those of a user; a sweep of three architectures, one
thread. Writes sae_faults.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SAE = [sys.executable, "-c", "from interp.cli import sae_main; sae_main()"]


def command(given: argparse.Namespace, out: Path) -> list[str]:
    """Return the training as a user would type it."""
    line = [*SAE, "train", given.source, "--out", str(out), "--steps", str(given.steps), "--width", given.width]
    return [*line, "--sweep", "arch=batchtopk,jumprelu,matryoshka", "--checkpoint-every", str(given.every), "--quiet"]


def content(root: Path) -> dict[str, Any]:
    """Return the weights, byte for byte, and the logged numbers without the seconds."""
    found: dict[str, Any] = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.safetensors")}
    for path in root.rglob("metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(root))] = [{**row, "seconds": 0} for row in rows]
    return found


def main() -> None:
    """Run undisturbed, run with kills and Ctrl-Cs by turns, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", required=True, help="a .npy file of activations, or a store")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", default="4x")
    parser.add_argument("--every", type=int, default=15)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    pick = random.Random(given.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        begun = time.perf_counter()
        subprocess.run(command(given, whole), check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        found: dict[str, Any] = {"steps": given.steps, "seconds": round(seconds, 1), "files": len(content(whole))}
        kills = rounds = 0
        codes: list[int] = []
        while kills < given.kills:
            process = subprocess.Popen(command(given, broken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(pick.uniform(3, max(5, seconds / 2)))
                rounds += 1
                subprocess.run(["rm", "-rf", str(broken)], check=True)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT if kills % 4 == 3 else signal.SIGKILL)
                codes.append(process.wait())
                kills += 1
        subprocess.run(command(given, broken), check=True, stdout=subprocess.DEVNULL)
        found |= {"kills": kills, "exit_codes": codes, "whole_runs_between": rounds}
        found["killed_equals_undisturbed"] = content(broken) == content(whole)
    print(json.dumps(found, indent=1))
    (HERE / "sae_faults.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Kill a real harvest at random moments, flip bits, run two ranks: is the store what an undisturbed run makes?

    python experiments/bench/faults.py --dataset text:FOLDER --tokens 2M --kills 20 --flips 200

Runs the command line, so that start, resume and seal are those of a user. Prints one table and writes faults.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from interp.store.verify import verify

INTERP = [sys.executable, "-m", "interp.cli"]


def command(given: argparse.Namespace, out: Path, *more: str) -> list[str]:
    line = [*INTERP, "harvest", given.model, "--hook", given.hook, "--dataset", given.dataset, "--tokens", given.tokens]
    return [*line, "--out", str(out), "--quiet", *more]


def content(root: Path) -> dict[str, bytes]:
    """Return the files that a store promises to keep the same."""
    files = [p for p in root.rglob("*") if p.is_file() and ".lock" not in p.name and "run.json" not in p.name]
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def killed(given: argparse.Namespace, out: Path, seconds: float, pick: random.Random) -> dict[str, Any]:
    """Kill the harvest `given.kills` times, each at a moment within what the whole takes, then let it finish."""
    kills = finished = 0
    while kills < given.kills:
        process = subprocess.Popen(command(given, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(pick.uniform(2, max(4, seconds / 4)))
            finished += 1
            shutil.rmtree(out)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run(command(given, out), check=True, stdout=subprocess.DEVNULL)
    return {"kills": kills, "finished_before_a_kill": finished}


def flipped(root: Path, flips: int, pick: random.Random) -> dict[str, int]:
    """Flip single bits of shards and papers, each undone after `verify` has judged it; count the misses."""
    files = sorted(p for p in root.rglob("*") if p.suffix in {".safetensors", ".json"} and "run.json" not in p.name)
    missed = wrong_file = 0
    for number in range(flips):
        path = files[number % len(files)] if number < 2 * len(files) else pick.choice(files)
        size = path.stat().st_size
        at, bit = pick.randrange(size), 1 << pick.randrange(8)
        flip(path, at, bit)
        judged = verify(root)
        flip(path, at, bit)
        missed += judged.sound
        wrong_file += not judged.sound and str(path.relative_to(root)) not in judged.problems
    return {"flips": flips, "files": len(files), "missed": missed, "named_wrongly": wrong_file}


def flip(path: Path, at: int, bit: int) -> None:
    """Flip one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def main() -> None:
    """Run all three and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--hook", default="resid_post.2")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--tokens", default="2M")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    pick = random.Random(given.seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share two cores; threads are part of the fingerprint
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        begun = time.perf_counter()
        subprocess.run(command(given, root / "a"), check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        want = content(root / "a")
        found: dict[str, Any] = {"tokens": given.tokens, "seconds": round(seconds, 1), "files": len(want)}
        found["bytes"] = sum(map(len, want.values()))
        found |= killed(given, root / "b", seconds, pick)
        found["killed_equals_undisturbed"] = content(root / "b") == want
        shutil.rmtree(root / "b")
        ranks = [
            subprocess.Popen(
                command(given, root / "c", "--rank", str(r), "--world-size", "2"), stdout=subprocess.DEVNULL
            )
            for r in (0, 1)
        ]
        found["two_ranks_equal_one"] = [r.wait() for r in ranks] == [0, 0] and content(root / "c") == want
        found |= flipped(root / "a", given.flips, pick)
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / "faults.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Timing of contenders side by side, and the machine it was done on."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def interleaved(
    contenders: Mapping[str, Callable[[], object]], repeats: int, *, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Return {name: {wall, cpu, walls, cpus}} in seconds, medians and every repeat: each round runs all, in turn.

    A disturbance of the machine so meets all of them. Every other round goes backwards, since who runs first after
    whom matters too. `cpu` is the time of all threads of this process.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name in contenders if turn % 2 else reversed(list(contenders)):
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= warmup:
                times[name].append(spent)
    return {
        name: {
            "wall": statistics.median(w for w, _ in spent),
            "cpu": statistics.median(c for _, c in spent),
            "walls": [w for w, _ in spent],
            "cpus": [c for _, c in spent],
        }
        for name, spent in times.items()
    }


def ratio(times: Mapping[str, Mapping[str, Any]], name: str, against: str, kind: str = "walls") -> float:
    """Return the median over rounds of time(name) / time(against): both of one round, so that drift cancels."""
    pairs = zip(times[name][kind], times[against][kind], strict=True)
    return statistics.median(a / b for a, b in pairs)


def machine(packages: Iterable[str] = ("torch", "numpy")) -> str:
    """Return one line: processor, cores, memory, kernel, versions, load when it began."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    load = os.getloadavg()[0]
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {versions}, load {load:.1f}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; numbers with three digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(_shown(row.get(name, "")) for name in names) + " |")
    return "\n".join(lines)


def report(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print a table and write it with everything else to `<name>.json` beside this file."""
    print(table(rows))
    print(f"\n{more.get('machine', '')}")
    text = json.dumps({"command": " ".join(["python", *sys.argv]), **more, "rows": rows}, indent=1)
    (HERE / f"{name}.json").write_text(text + "\n", encoding="utf8")


def child(arguments: list[str], **environment: str) -> dict[str, Any]:
    """Run this script again in a process of its own, and return the JSON that it prints last."""
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def resident(kind: str = "Rss") -> float:
    """Return MB of this process held in memory now: "Rss" with mapped files, "Anonymous" without."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{kind}:")) * 1024 / 1e6


def reset_peak() -> None:
    """Begin counting the peak of memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> float:
    """Return the highest MB of memory since `reset_peak`."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024 / 1e6


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _shown(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )

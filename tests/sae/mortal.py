"""Run as a script, it trains in forked processes that die on command: see test_runs.py.

Orders and outcomes are JSON lines. An order: {"out": folder, "op": n, "deed": "kill" | "ENOSPC"} does the deed just
before the n-th durable operation (fsync, rename), {"delay": seconds} kills after a time. The outcome: {"status": exit
code, negative for a signal; "operations": how many there were; "error": its text}.
"""

import errno
import json
import os
import signal
import sys
import threading
from contextlib import suppress

import torch

from sae.runs import fit, grid, sweep
from sae.synthetic import planted

REAL = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
STEPS = 16


def arm(order: dict, count: list[str]) -> None:
    """Count durable operations, and do the deed before the one that was named."""

    def wrapped(name):
        def call(*args, **kwargs):
            count.append(name)
            if order.get("op") is not None and len(count) - 1 >= order["op"] and order["deed"] != "kill":
                raise OSError(getattr(errno, order["deed"]), os.strerror(getattr(errno, order["deed"])))
            if len(count) - 1 == order.get("op"):
                os.kill(os.getpid(), signal.SIGKILL)
            return REAL[name](*args, **kwargs)

        return call

    for name in REAL:
        setattr(os, name, wrapped(name))


def work(order: dict, pipe: int) -> None:
    """Train as ordered and tell how it ended."""
    count: list[str] = []
    arm(order, count)
    found = {"status": 0, "error": ""}
    rows = planted(d_in=24, n_features=48, active=3, seed=1).sample(4096, seed=2)[0]
    common = {"steps": STEPS, "batch_size": 128, "out": order["out"], "checkpoint_every": 4, "log_every": 5}
    try:
        if order.get("sweep"):
            sweep(rows, grid(arch=["jumprelu", "matryoshka"], width=64, k=3, lr=1e-2), **common)
        else:
            fit(rows, "batchtopk", 64, 3, lr=1e-2, dead_after=256, **common)
    except Exception as error:
        found = {"status": 1, "error": f"{type(error).__name__}: {error}"}
    os.write(pipe, json.dumps({**found, "operations": len(count)}).encode())
    os._exit(found["status"])


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            work(order, writing)
        os.close(writing)
        if "delay" in order:
            threading.Timer(order["delay"], kill, [child]).start()
        told = os.read(reading, 65536)
        _, status = os.waitpid(child, 0)
        os.close(reading)
        found = json.loads(told) if told else {"operations": None, "error": ""}
        print(json.dumps({**found, "status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()

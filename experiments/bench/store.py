"""Harvest to disk against capture alone; writing with checksum and fsync against a raw write; tokenisation's share.

python experiments/bench/store.py
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from timing import interleaved, machine, ratio, report

import interp
from interp.data.generator import labelled
from interp.model.hooks import reading
from interp.model.sources import read_source
from interp.store.harvest import harvest_acts
from interp.store.job import Job, job_of
from interp.store.shards import write_shard

MIB = 1 << 20


def capture_alone(job: Job, shards: list[list[Any]]) -> None:
    """Capture the batches of a harvest, in its order and shapes, and drop each one."""
    size = job.cut.batch_size
    for windows in shards:
        for i in range(0, len(windows), size):
            batch = job.cut.collate(windows[i : i + size])
            held: dict[str, torch.Tensor] = {}
            with reading(job.model, job.hooks, lambda name, value, held=held: held.__setitem__(name, value.clone())):
                job.model.run(batch.ids, batch.mask, positions=batch.positions if batch.masked else None)


def harvests(folder: Path, source: Any, tokens: int, repeats: int, d_model: int | None) -> list[dict[str, Any]]:
    """Return one row for each dtype of the store; `d_model` None takes the bundled model, else a random GPT-2."""
    tiny = interp.load_model("tiny")
    model, label = (tiny, "tiny") if d_model is None else (random_gpt2(tiny, d_model), f"random gpt2, d {d_model}")
    hook = f"resid_post.{model.n_layers // 2}"
    rows = []
    for dtype in ("float16", "float32"):
        names = (folder / f"{label}-{dtype}-{i}" for i in count())
        options: dict[str, Any] = {"hooks": [hook], "tokens": tokens, "dtype": dtype}
        store = harvest_acts(model, source, out=next(names), **options)
        job = job_of(model, store.settings)
        shards = [windows for windows, _ in job.cut.shards(iter(source))]
        times = interleaved(
            {
                "harvest": lambda: harvest_acts(model, source, out=next(names), **options),  # noqa: B023
                "capture": lambda: capture_alone(job, shards),  # noqa: B023
                "tokenise": lambda: list(job.cut.shards(iter(source))),  # noqa: B023
            },
            repeats,
        )
        rows.append(
            {
                "what": f"harvest, {label}, {dtype}",
                "MB": len(store) * model.d_model * store.dtype.itemsize / 1e6,
                "per second": f"{len(store) / times['harvest']['wall']:,.0f} tokens",
                "against": "capture alone",
                "ratio": 1 / ratio(times, "harvest", "capture"),
                "CPU ratio": 1 / ratio(times, "harvest", "capture", "cpus"),
                "tokenisation's share": ratio(times, "tokenise", "harvest"),
            }
        )
    return rows


def random_gpt2(tiny: Any, d_model: int) -> Any:
    """Return a GPT-2 of six blocks with random weights and the bundled tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"n_embd": d_model, "n_layer": 6, "n_head": d_model // 32, "vocab_size": tiny.d_vocab}
    ids = {"bos_token_id": tiny.bos_id, "eos_token_id": tiny.bos_id}
    return interp.load_model(
        AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](**sizes, **ids)), tokenizer=tiny.tokenizer
    )


def raw_write(path: Path, data: memoryview) -> None:
    """Write bytes to a new file, and flush them and its folder to the disk."""
    with open(path, "wb", buffering=0) as file:
        at = 0
        while at < len(data):
            at += file.write(data[at:])
        os.fsync(file.fileno())


def writing(folder: Path, files: int, repeats: int) -> dict[str, Any]:
    """Return the row of shards of 64 MiB, as the store writes them, against the same bytes written raw."""
    rows = 64 * MIB // (768 * 2)
    values = torch.randint(-30000, 30000, (rows, 768), dtype=torch.int16).view(torch.float16)
    data = memoryview(values.view(torch.uint8).numpy()).cast("B")
    fresh: Iterator[int] = count()

    def ours() -> None:
        for _ in range(files):
            write_shard(folder, f"{next(fresh)}.safetensors", {"rows": values}, {"bench": True})

    def raw() -> None:
        for _ in range(files):
            raw_write(folder / f"{next(fresh)}.raw", data)

    times: dict[str, list[float]] = {"shards": [], "raw": []}
    for _ in range(repeats):  # the files of a round are removed outside the clock
        one = interleaved({"shards": ours, "raw": raw}, 1, warmup=0)
        for name, spent in one.items():
            times[name].append(spent["wall"])
        for path in folder.iterdir():
            path.unlink()
    measured = {name: {"walls": walls} for name, walls in times.items()}
    speed = files * data.nbytes / 1e9 / sorted(times["shards"])[repeats // 2]
    return {
        "what": "write, checksum, fsync, rename: 64 MiB shards",
        "MB": files * data.nbytes / 1e6,
        "per second": f"{speed:.2f} GB",
        "against": "raw write + fsync",
        "ratio": 1 / ratio(measured, "shards", "raw"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=8, help="shards written a repeat")
    parser.add_argument("--source", help="text:FILE or another source; default: generated sentences")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the temporary folder")
    parser.add_argument("--d-model", type=int, default=256, help="of the random model beside the bundled one")
    parser.add_argument("--skip-harvest", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    about = machine(("torch", "transformers", "xxhash"))
    base = Path(tempfile.mkdtemp(prefix="bench-", dir=args.folder))
    try:
        disk = base / "raw"
        disk.mkdir()
        rows = [writing(disk, args.files, args.repeats)]
        if not args.skip_harvest:
            source = list(read_source(args.source)) if args.source else sentences(args.tokens)
            for d_model in (None, args.d_model):
                rows += harvests(base, source, args.tokens, args.repeats, d_model)
        report("store", rows, machine=about, repeats=args.repeats, tokens=args.tokens)
    finally:
        shutil.rmtree(base)


def sentences(tokens: int) -> list[str]:
    """Return documents of 40 generated sentences, more than enough for so many tokens."""
    texts = labelled("sentiment", n=4000).texts
    need = max(1, tokens // 200)
    return [" ".join(texts[(i * 40 + j * 7) % len(texts)] for j in range(40)) for i in range(need)]


if __name__ == "__main__":
    main()

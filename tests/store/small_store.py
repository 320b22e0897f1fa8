"""A tiny model, a text and settings for stores; run as a script, it harvests in forked processes that die on command.

Orders and outcomes are JSON lines. An order: {"out": folder, "op": n, "deed": "kill" | "ENOSPC" | "EIO"} does the deed
just before the n-th durable operation (fsync, rename, unlink), {"delay": seconds} kills after a time; "rank", "world",
"texts" (a seed), "settings". The outcome: {"status": exit code, negative for a signal; "operations": how many there
were; "error": its text}.
"""

import errno
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch

SETTINGS = {"ctx": 16, "batch_size": 4, "shard_mb": 0.02, "exclude": ("pad", "bos", "special")}
HOOKS = ["resid_post.0", "resid_post.1"]


def make_model():
    """Return a Model: two llama blocks of width 16, words w4 ... w96; the same weights at every call."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from interp.model.loading import load_model

    torch.set_num_threads(1)
    known = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 97)}}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 32}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        hf = LlamaForCausalLM(LlamaConfig(**sizes, **ids)).eval()
    model = load_model(hf, tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner, **names))
    assert model.is_causal  # found out here, by forwards that no test counts
    return model


def make_texts(n=90, seed=3):
    """Return documents of 0 to 20 words."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 21, (n,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(4, 97, (c,), generator=generator).tolist()) for c in counts]


def content(root):
    """Return {name: bytes} of what a store promises to keep the same: not its log, not its locks."""
    files = [p for p in Path(root).rglob("*") if p.is_file() and ".lock" not in p.name and "run.json" not in p.name]
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


REAL = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}


def arm(order, count):
    """Count durable operations, and do the deed before the one that was named."""

    def wrapped(name):
        def call(*args, **kwargs):
            count.append(name)
            if len(count) - 1 == order.get("op"):
                if order["deed"] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                code = getattr(errno, order["deed"])
                raise OSError(code, os.strerror(code))
            return REAL[name](*args, **kwargs)

        return call

    for name in REAL:
        setattr(os, name, wrapped(name))


def work(model, order, pipe):
    from interp.store.harvest import harvest_acts

    count: list[str] = []
    arm(order, count)
    found = {"status": 0, "error": ""}
    try:
        given = {**SETTINGS, **order.get("settings", {})}
        harvest_acts(
            model, make_texts(seed=order.get("texts", 3)), HOOKS, out=order["out"],
            rank=order.get("rank", 0), world_size=order.get("world", 1), **given,
        )  # fmt: skip
    except Exception as error:
        found = {"status": 1, "error": f"{type(error).__name__}: {error}"}
    os.write(pipe, json.dumps({**found, "operations": len(count)}).encode())
    os._exit(found["status"])


def kill(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main():
    model = make_model()
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            work(model, order, writing)
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

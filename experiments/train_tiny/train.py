"""Train `tiny`, the language model that ships with interp.

    python experiments/train_tiny/train.py --text FOLDER --work WORKDIR --out interp/data/tiny --steps 4000

FOLDER holds tinystories/ and gutenberg/. Resumable: the same command goes on from WORKDIR/state.pt. The weights that
are written to --out are an exponential average, the best so far on stories held out from training.
Muon on the matrices, AdamW on embeddings and norms; constant rate, then a linear tail; bfloat16 products.
"""

import argparse
import copy
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from corpus import GAP, books, forced_words, generated, stories
from tokenizer import save, train_tokenizer
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CTX, BATCH, MICRO, DEV_ROWS = 256, 32, 8, 64  # windows: tokens, per step, per pass, for early stopping
SHARES = {"stories": 0.60, "generated": 0.37, "books": 0.03}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--tail", type=float, default=0.4, help="share of the steps with falling learning rate")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's; AdamW takes a sixth of it")
    parser.add_argument("--dropout", type=float, default=0.05, help="on what every block adds to the stream")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations and checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True, rope_theta=10000.0,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, rms_norm_eps=1e-5,
    )  # fmt: skip


def prepare(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, dict[str, np.ndarray]]:
    """Return the tokenizer and the token streams, made once and kept in the work folder."""
    kept = args.work / "tokens.npz"
    if kept.is_file():
        return PreTrainedTokenizerFast.from_pretrained(args.out), dict(np.load(kept))
    args.work.mkdir(parents=True, exist_ok=True)
    story_text = stories(args.text)
    cut = story_text.rfind(GAP, 0, int(len(story_text) * 0.985))  # the end is for early stopping
    texts = {
        "stories": story_text[:cut], "dev": story_text[cut + 2 :], "books": books(args.text),
        "generated": generated(16_000_000, args.seed),
    }  # fmt: skip
    tokenizer = train_tokenizer([texts["stories"], texts["generated"][:900_000]], forced_words(), 4096, 512)
    save(tokenizer, args.out)
    streams = {name: _encode(tokenizer, text) for name, text in texts.items()}
    np.savez(kept, **streams)
    return tokenizer, streams


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    paragraphs = text.split(GAP)
    parts = [GAP.join(paragraphs[i : i + 50]) + GAP for i in range(0, len(paragraphs), 50)]
    rows = tokenizer.backend_tokenizer.encode_batch(parts, add_special_tokens=False)
    return np.concatenate([np.array(row.ids, dtype=np.uint16) for row in rows])


def sample_rows(
    streams: dict[str, np.ndarray], starts: dict[str, np.ndarray], rng: np.random.Generator
) -> torch.Tensor:
    """Return a batch [BATCH, CTX + 1] of windows after one BOS; half of them begin where a paragraph does."""
    rows = np.zeros((BATCH, CTX + 1), dtype=np.int64)  # BOS has id 0
    for i, name in enumerate(rng.choice(list(SHARES), BATCH, p=list(SHARES.values()))):
        stream = streams[name]
        at = rng.integers(len(stream) - CTX) if rng.random() < 0.5 else rng.choice(starts[name])
        rows[i, 1:] = stream[at : at + CTX]
    return torch.from_numpy(rows)


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(others, lr=args.lr / 6, betas=(0.9, 0.98), weight_decay=0.02, fused=True),
    ]


def add_dropout(model: LlamaForCausalLM, p: float) -> None:
    """Drop values of what attention and MLP add to the stream, while training."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda m, _, out: F.dropout(out, p, m.training))
        layer.mlp.down_proj.register_forward_hook(lambda m, _, out: F.dropout(out, p, m.training))


@torch.compile  # on a CPU three times the speed: the many small operations are fused
def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def dev_loss(model: LlamaForCausalLM, stream: np.ndarray, device: str) -> float:
    model.eval()
    n = min(DEV_ROWS, len(stream) // CTX) // MICRO * MICRO
    rows = np.zeros((n, CTX + 1), dtype=np.int64)
    rows[:, 1:] = stream[: n * CTX].reshape(n, CTX)
    parts = torch.from_numpy(rows).to(device).split(MICRO)
    return sum(loss_of(model, part).item() * len(part) for part in parts) / n


@torch.no_grad()
def swap(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Exchange the weights of two models."""
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        held = x.clone()
        x.copy_(y)
        y.copy_(held)


def rate(step: int, args: argparse.Namespace) -> float:
    tail = args.steps * args.tail
    return min(1.0, (step + 1) / 60, max(0.0, (args.steps - step) / tail))


def export(model: LlamaForCausalLM, out: Path) -> None:
    """Write the model as a Hugging Face folder, half precision, in a way that never leaves half a file."""
    half = copy.deepcopy(model).half()
    half.save_pretrained(out / ".new", safe_serialization=True)
    for file in (out / ".new").iterdir():
        os.replace(file, out / file.name)
    (out / ".new").rmdir()


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer, streams = prepare(args)
    gap = tokenizer.backend_tokenizer.encode(GAP, add_special_tokens=False).ids
    starts = {}
    for name in SHARES:
        at = np.flatnonzero(np.isin(streams[name], gap)) + 1
        starts[name] = at[at < len(streams[name]) - CTX]
    print({name: len(stream) for name, stream in streams.items()}, "gap", gap, flush=True)

    model = LlamaForCausalLM(config()).to(args.device)
    add_dropout(model, args.dropout)
    average, opts = copy.deepcopy(model), optimizers(model, args)
    state = {"step": 0, "best": float("inf"), "seconds": 0.0}
    rng, kept = np.random.default_rng(args.seed + 1), args.work / "state.pt"
    if kept.is_file():
        held = torch.load(kept, weights_only=True)
        model.load_state_dict(held["model"])
        average.load_state_dict(held["average"])
        for opt, values in zip(opts, held["opts"], strict=True):
            opt.load_state_dict(values)
        rng.bit_generator.state, state = held["rng"], held["state"]
        torch.set_rng_state(held["torch_rng"])
    began = time.time() - state["seconds"]
    base = (args.lr, args.lr / 6)
    log = (args.work / "log.jsonl").open("a")
    while state["step"] < args.steps:
        model.train()
        for opt, lr in zip(opts, base, strict=True):
            opt.param_groups[0]["lr"] = lr * rate(state["step"], args)
        total = 0.0
        for rows in sample_rows(streams, starts, rng).to(args.device).split(MICRO):
            loss = loss_of(model, rows) * (MICRO / BATCH)
            loss.backward()
            total += loss.item()
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        with torch.no_grad():  # a fast average early on, a slow one later
            pull = max(1 / 150, 1 / (1 + state["step"]))
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, pull)
        state["step"] += 1
        if state["step"] % 10 == 0:
            print(state["step"], round(time.time() - began), round(total, 3), flush=True)
        if state["step"] % args.every and state["step"] < args.steps:
            continue
        state["seconds"] = time.time() - began
        swap(model, average)  # the compiled pass belongs to `model`
        dev = dev_loss(model, streams["dev"], args.device)
        swap(model, average)
        if dev < state["best"]:
            state["best"] = dev
            export(average, args.out)
        line = {**state, "loss": total, "dev": dev}
        print(line, flush=True)
        log.write(json.dumps(line) + "\n")
        log.flush()
        held = {"model": model.state_dict(), "average": average.state_dict(), "opts": [o.state_dict() for o in opts],
                "rng": rng.bit_generator.state, "torch_rng": torch.get_rng_state(), "state": state}  # fmt: skip
        torch.save(held, kept.with_suffix(".new"))
        os.replace(kept.with_suffix(".new"), kept)


if __name__ == "__main__":
    main()

"""What trains: SAEs that learn from the same batches, with the folder that their common state is kept in."""

import json
import platform
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from sae import checkpoint
from sae.archs import build
from sae.archs.base import SAE
from sae.config import TrainConfig
from sae.data import count, open_source
from sae.dist import World
from sae.evaluation import evaluate
from sae.formats import load_sae, save_sae
from sae.io import read_json, sweep_temporaries, write_json
from sae.papers import Papers, deferred, differences, keep_log, read_log
from sae.training import Rows, Trainer

__all__ = ["DEFAULT_STEPS", "Run", "Session"]

DEFAULT_STEPS = 600
CHECKPOINTS = "checkpoints"
CHECKPOINT_STEPS, CHECKPOINT_SECONDS = 1000, 600.0  # whichever comes first
REFUSALS = 3  # checkpoints in a row that a disk may refuse
MEASURED = 16_384  # rows that the numbers of a finished run are measured on


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run and what came of it."""

    name: str
    sae: SAE
    log: list[dict[str, int | float]]
    """Numbers of the logged steps, the last step always among them."""
    config: dict[str, Any]
    """Everything that was decided or used: what run.json holds."""
    result: dict[str, int | float]
    """Metrics of the finished SAE on rows that it was not trained on, where the source has such; else on its first."""


class Member:
    """One SAE of a session: what it learns from each batch, its trainer, its papers."""

    def __init__(self, name: str, options: Mapping[str, Any], out: Path | None) -> None:
        given = dict(options)
        self.name, self.out = name, out
        self.hook, self.target = given.pop("hook", None), given.pop("target", None)
        self.skip, self.levels = given.pop("skip", False), tuple(given.pop("levels", ()))
        self.arch, self.width = given.pop("arch", "batchtopk"), given.pop("width", "16x")
        self.k, self.seed = given.pop("k", 32), given.pop("seed", 0)
        self.options = given
        self.log: list[dict[str, int | float]] = []
        self.sae: SAE
        self.cfg: TrainConfig
        self.trainer: Trainer

    def hooks(self) -> list[str]:
        """Return the hook points that it reads."""
        read = [] if self.hook is None else [self.hook] if isinstance(self.hook, str) else list(self.hook)
        return [*read, self.target] if self.target is not None else read

    def look(self, batch: Any) -> Rows:
        """Return its part of a batch of several hook points."""
        if not isinstance(batch, Mapping):
            return batch
        if self.target is not None:
            return batch[self.hook], batch[self.target]
        return batch[self.hook] if isinstance(self.hook, str) else torch.stack([batch[h] for h in self.hook], 1)

    def build(
        self, batch: Any, cfg: TrainConfig, device: Any, metadata: dict[str, Any], names: Mapping[str, str]
    ) -> None:
        """Make the SAE that fits a batch. Raises ValueError for options that do not fit."""
        rows = self.look(batch)
        x, y = rows if isinstance(rows, tuple) else (rows, None)
        d_in = x[0].numel()
        try:
            cfg = replace(cfg, **self.options)
        except TypeError as error:
            raise ValueError(
                f"{str(error).split(') ')[-1]}: it is no option of fit and no field of TrainConfig"
            ) from None
        sites = x.shape[1] if x.ndim == 3 else 1
        named = dict(metadata)
        if self.hook is not None:
            full = [names[hook] for hook in self.hooks()]
            read = full[: len(full) - (self.target is not None)]
            named |= {"hook_name": read[0] if isinstance(self.hook, str) else read}
            named |= {"hook_name_out": full[-1]} if self.target is not None else {}
        sae = build(
            self.arch, d_in=d_in, d_sae=_width(self.width, d_in // sites), k=self.k, skip=self.skip, n_sites=sites,
            d_out=None if y is None else y.shape[1], levels=self.levels, seed=self.seed, metadata=named,
        )  # fmt: skip
        self.sae = sae.to(device if device is not None else x.device)
        self.cfg = cfg.resolve(sae.d_in, sae.d_sae)


class Session:
    """Members that learn from the same batches, and the folder that their common state is kept in."""

    def __init__(
        self, source: Any, variants: Mapping[str, Mapping[str, Any]], *, steps: int | None, tokens: int | None,
        batch_size: int, data_seed: int, out: str | Path | None, device: Any, metadata: dict[str, Any] | None,
        world: World,
    ) -> None:  # fmt: skip
        if steps is not None and tokens is not None:
            raise ValueError("give steps or tokens, not both")
        if steps is None:
            steps = DEFAULT_STEPS if tokens is None else tokens // batch_size
        if batch_size % world.token_size:
            raise ValueError(f"batch_size is {batch_size}; it must divide by the {world.token_size} processes")
        self.steps, self.world, self._refused = steps, world, 0
        self.out = None if out is None else Path(out)
        self.members = [
            Member(name, options, None if self.out is None else self.out / name) for name, options in variants.items()
        ]
        cfg = TrainConfig(steps=steps, batch_size=batch_size, seed=data_seed)
        opened = open_source(source, batch_size, data_seed, [h for m in self.members for h in m.hooks()], device)
        self.feed, self.held_out = opened.feed, opened.held_out
        self.looked_at = min(cfg.init_tokens, steps * batch_size)  # a short run waits for no more than it learns from
        self.sample = self.feed.peek(self.looked_at)
        if not self.sample:
            raise ValueError(f"the source gave less than one batch of {batch_size} tokens")
        for member in self.members:
            member.build(self.sample[0], cfg, device, opened.metadata | (metadata or {}), opened.names)
        self.config = {
            "data": opened.facts,
            "device": str(self.members[0].sae.enc.device),
            "processes": world.size,
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

    def run(self, log_every: int, every: int | None, progress: bool, track: str | None, on_step: Any) -> list[Run]:
        """Train to the end, or go on upwards with what stopped it after saving."""
        with ExitStack() as stack:
            if self.out is not None:
                self._claim(stack)
                if self._finished():
                    if self._first:  # a run that ended between its last file and this
                        checkpoint.clear(self.out / CHECKPOINTS)
                    return [self._loaded(member) for member in self.members]
            for member in self.members:
                sample = [self._part(member.look(batch)) for batch in self.sample]
                member.trainer = Trainer(member.sae, member.cfg, sample, self.world)
            self._resume()
            papers = stack.enter_context(Papers(self.members, log_every, progress and self._first, track))
            self._train(papers, every, on_step)
            return self._finish(papers)

    def _train(self, papers: Papers, every: int | None, on_step: Any) -> None:
        """Do the steps that are left."""
        lead = self.members[0].trainer
        saved, clock = lead.step, time.monotonic()
        with deferred() as pending:
            try:
                for batch in self.feed if lead.step < self.steps else ():
                    steps = [m.trainer.advance(self._part(m.look(batch))) for m in self.members]
                    papers.note(steps, last=lead.step == self.steps)
                    if on_step is not None:
                        on_step(steps[0] if len(steps) == 1 else steps)
                    pending.release()
                    if lead.step == self.steps:
                        break
                    due = lead.step - saved >= (every or CHECKPOINT_STEPS)
                    if due or (every is None and time.monotonic() - clock > CHECKPOINT_SECONDS):
                        self._try_checkpoint()
                        saved, clock = lead.step, time.monotonic()
                else:
                    warnings.warn(f"the source ended after {lead.step} of {self.steps} steps", stacklevel=4)
            except Exception:
                raise
            except BaseException:  # Ctrl-C, SIGTERM, a caller who stops: only ever between two steps
                if self.out is not None and lead.step:
                    self._checkpoint()
                    self._finish(papers, whole=False)
                raise

    def _finish(self, papers: Papers, *, whole: bool = True) -> list[Run]:
        """Calibrate, measure and save every member."""
        fresh = self.feed.peek(self.looked_at) if self.held_out is None and whole else []
        runs = []
        for member in self.members:
            rows = [self.held_out] if self.held_out is not None else fresh or self.sample
            looked = [member.look(batch) for batch in rows]
            member.trainer.finish(looked)
            result = evaluate(member.sae, _some(looked, MEASURED)).as_dict() if whole else {}  # type: ignore[arg-type]
            config = self._papers(member) | {"finished": whole, "result": result, "last": (member.log or [None])[-1]}
            runs.append(Run(name=member.name, sae=member.sae, log=member.log, config=config, result=result))
            if member.out is not None and self._first:
                save_sae(member.sae, member.out)
                write_json(member.out / "run.json", config)
        if whole and self.out is not None and self._first:
            checkpoint.clear(self.out / CHECKPOINTS)
        return runs

    @property
    def _first(self) -> bool:
        return self.world.rank == 0

    def _part(self, rows: Rows) -> Rows:
        """Return what this process works on: its share of a batch, in order."""
        size, rank = self.world.token_size, self.world.rank
        if size == 1:
            return rows
        if isinstance(rows, tuple):
            return rows[0].chunk(size)[rank], rows[1].chunk(size)[rank]
        return rows.chunk(size)[rank]

    def _papers(self, member: Member) -> dict[str, Any]:
        return {"sae": asdict(member.sae.config), "train": asdict(member.cfg), **self.config}

    def _job(self) -> dict[str, Any]:
        """Return what makes two runs the same."""
        members = {m.name: {"sae": asdict(m.sae.config), "train": asdict(m.cfg)} for m in self.members}
        return json.loads(json.dumps({"members": members, "data": self.config["data"]}))

    def _claim(self, stack: ExitStack) -> None:
        """Make the folder ours: nobody else writes into it. Raises ValueError where another process does."""
        assert self.out is not None
        self.out.mkdir(parents=True, exist_ok=True)
        if not self._first:
            return
        lock = FileLock(self.out / ".lock", timeout=0)
        try:
            stack.enter_context(lock)
        except Timeout:
            raise ValueError(f"another process trains into {self.out}; give another out, or wait") from None
        for member in self.members:
            assert member.out is not None
            member.out.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(member.out)

    def _finished(self) -> bool:
        """Return whether out holds this very run, finished. Raises ValueError where it holds another."""
        states = []
        for member in self.members:
            assert member.out is not None
            file = member.out / "run.json"
            if not file.exists():
                states.append(False)
                continue
            held = read_json(file)
            wanted = json.loads(json.dumps(self._papers(member)))
            parts = ("sae", "train", "data")
            differing = [d for part in parts for d in differences(held.get(part), wanted[part], part)]
            if differing:
                raise ValueError(f"{member.out} holds another run: {'; '.join(differing[:4])}; give another out")
            states.append(bool(held.get("finished")))
        return all(states)

    def _loaded(self, member: Member) -> Run:
        assert member.out is not None
        config = read_json(member.out / "run.json")
        log = read_log(member.out / "metrics.jsonl")
        sae = load_sae(member.out).to(member.sae.enc.device)
        return Run(name=member.name, sae=sae, log=log, config=config, result=config["result"])

    def _checkpoint(self) -> None:
        if self.out is None or (not self._first and self.world.latent_size == 1):
            return
        for member in self.members:
            if not member.trainer.finite():
                raise FloatingPointError(f"weights are no longer finite at step {member.trainer.step}; lower the lr")
        common = {"feed": self.feed.state(), "job": self._job(), "machine": self.config}
        parts = [member.trainer.state() for member in self.members]
        if self._first:
            checkpoint.write(self.out / CHECKPOINTS, self.members[0].trainer.step, parts, common)

    def _try_checkpoint(self) -> None:
        """Save a checkpoint; where the disk refuses, go on with the older ones, and stop at the third time."""
        try:
            self._checkpoint()
            self._refused = 0
        except OSError as error:
            self._refused += 1
            if self._refused == REFUSALS:
                raise
            warnings.warn(f"a checkpoint could not be written ({error}); older ones are whole", stacklevel=5)

    def _resume(self) -> None:
        """Go to the newest sound checkpoint, if there is one."""
        if self.out is None:
            return
        self.world.total(torch.zeros(1, device=self.members[0].sae.enc.device))  # all wait for the first
        found, damaged = checkpoint.latest(self.out / CHECKPOINTS)
        for path, reason in damaged:
            warnings.warn(f"checkpoint {path.name} is damaged and passed over: {reason}", stacklevel=4)
        if found is None:
            return
        differing = differences(found.common["job"], self._job(), "")
        if differing:
            raise ValueError(
                f"{self.out} holds checkpoints of another run: {'; '.join(differing[:4])}; give another out"
            )
        changed = differences(found.common["machine"], json.loads(json.dumps(self.config)), "")
        if changed:
            warnings.warn(
                f"resumed elsewhere ({'; '.join(changed[:4])}): not bit for bit the undisturbed run", stacklevel=4
            )
        for member, (tensors, numbers) in zip(self.members, found.parts, strict=True):
            member.trainer.load(tensors, numbers)
            if member.out is not None and self._first:
                member.log = keep_log(member.out / "metrics.jsonl", found.step)
        self.feed.restore(found.common["feed"])


def _some(rows: list[Rows], tokens: int) -> list[Rows]:
    """Return the first so many tokens of some batches."""
    out, left = [], tokens
    for batch in rows:
        part = tuple(t[:left] for t in batch) if isinstance(batch, tuple) else batch[:left]
        out.append(part)
        left -= count(part)
        if left <= 0:
            break
    return out


def _width(width: int | str, d: int) -> int:
    try:
        return round(float(width[:-1]) * d) if isinstance(width, str) and width.endswith("x") else int(width)
    except ValueError:
        raise ValueError(f"width is {width!r}; a number of latents, or a multiple of d_in such as '16x'") from None

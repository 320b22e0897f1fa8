"""Is a store what was written? Find every changed bit, name the file, and make just that again."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from interp.model.loading import as_model, load_model
from interp.model.sources import read_source
from interp.store.compute import Harvester
from interp.store.job import Job, differences, job_of, save_tokenizer, settings_now
from interp.store.ledger import (
    MANIFEST,
    PLAN,
    SETTINGS,
    Journal,
    ShardRecord,
    StoreError,
    journalled,
    read_sealed,
    write_sealed,
)
from interp.store.plan import Plan, publish, read_windows, token_file
from interp.store.shards import FileRecord, check_plain, check_shard, map_shard, self_record
from interp.store.writer import STATS, Rows, acts_file, seal, write_stats
from sae.extras import MissingError
from sae.io import FormatError, read_json

QUARANTINE = "quarantine"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check of a store found: `problems` says by file what is wrong, and is empty where it is sound."""

    path: str
    complete: bool
    shards: int
    planned: int | None
    rows: int
    bytes: int
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether every byte is as it was written (an unfinished store can be sound so far)."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict for machines."""
        return {"sound": self.sound, **asdict(self)}

    def lines(self) -> list[str]:
        """Return the verdict for people."""
        if self.problems:
            return [*self.problems.values(), f"damaged: mend it with: interp verify {self.path} --repair"]
        size = f"{self.shards:,} shard{'s' * (self.shards != 1)}, {self.rows:,} rows, {self.bytes:,} bytes"
        if self.complete:
            return [f"sound: {size}"]
        planned = "" if self.planned is None else f", of {self.planned:,} planned"
        return [f"sound so far, unfinished: {size}{planned}; the harvest's command, given again, goes on"]


def verify(path: str | os.PathLike, *, threads: int = 2) -> Verdict:
    """Read a store whole and compare every file with its checksum; raises MissingError where there is no store."""
    root = Path(path)
    if not root.is_dir() or not any((root / name).exists() for name in (SETTINGS, MANIFEST)):
        raise MissingError(f"{root} holds no store (no {SETTINGS})")
    problems: dict[str, str] = {}
    papers = {name: _paper(root, name, problems) for name in (SETTINGS, MANIFEST, PLAN)}
    manifest, plan = papers[MANIFEST], papers[PLAN]
    if manifest is not None:
        shards = [ShardRecord.read(record) for record in manifest["acts"]]
        tokens, plain = ([FileRecord(**r) for r in manifest[kind]] for kind in ("tokens", "plain"))
    else:
        tokens = [FileRecord(**record) for record in (plan["files"] if plan else [])]
        shards, plain = _unsealed(root, problems), []
    with ThreadPoolExecutor(threads) as pool:
        found = [pool.submit(check_shard, root, record) for record in (*shards, *tokens)]
        found += [pool.submit(check_plain, root, record) for record in plain]
        for record, checked in zip((*shards, *tokens, *plain), found, strict=True):
            if (what := checked.result()) is not None and record.file not in problems:
                problems[record.file] = what
    return Verdict(
        path=str(root), complete=(root / MANIFEST).exists(), shards=len(shards), rows=sum(r.rows for r in shards),
        planned=len(tokens) if plan or manifest else None, bytes=sum(r.bytes for r in (*shards, *tokens, *plain)),
        problems=problems,
    )  # fmt: skip


def _paper(root: Path, name: str, problems: dict[str, str]) -> Any:
    """Return a sealed paper, or None with a note where it is damaged, or just None where it is not there yet."""
    try:
        return read_sealed(root / name)
    except MissingError:
        if name == SETTINGS:
            problems[name] = f"{name}: missing"
        return None
    except StoreError as error:
        problems[name] = f"{name}: {error}"
        return None


def _unsealed(root: Path, problems: dict[str, str]) -> list[ShardRecord]:
    """Return the shards that writers have noted; with no manifest and no journal at all, something was taken away."""
    journals = list(root.glob("journal-*.jsonl"))
    if not journals and any((root / "acts").glob("*.safetensors")) and MANIFEST not in problems:
        problems[MANIFEST] = f"{MANIFEST}: missing"
    try:
        return list(journalled(root).values())
    except (StoreError, FormatError) as error:
        problems["journal"] = str(error)
        return []


def repair(
    path: str | os.PathLike, *, model: Any = None, source: Any = None, say: Callable[[str], None] | None = None
) -> Verdict:
    """Mend a store: set each damaged file aside in `quarantine/` and make just that one again; returns a new verdict.

    The model that made it is loaded again as the run noted it, unless given, and so is the text where windows of tokens
    are to be made again (a text that was an iterable must be given as `source`). Of an unfinished store damaged shards
    are set aside, and the next harvest makes them. Raises StoreError where model or text are other ones.
    """
    root, tell = Path(path), say or (lambda text: None)
    before = verify(root)
    if before.sound:
        return before
    _mend_papers(root, before, tell)
    _Mender(root, model, source, tell).mend(verify(root))
    return verify(root)


def _set_aside(root: Path, file: str) -> None:
    if (root / file).exists():
        target = root / QUARANTINE / file.replace("/", "-")
        target.parent.mkdir(exist_ok=True)
        number = sum(1 for _ in target.parent.glob(f"{target.name}*"))
        shutil.move(root / file, f"{target}.{number}")


def _mend_papers(root: Path, verdict: Verdict, tell: Callable[[str], None]) -> None:
    """Rebuild damaged settings from the manifest's copy, a damaged manifest or journal from shards that are sound."""
    damaged = [name for name in (SETTINGS, MANIFEST, "journal") if name in verdict.problems]
    if SETTINGS in damaged:
        if MANIFEST in damaged or not (root / MANIFEST).exists():
            raise StoreError(f"{root}: {SETTINGS} is damaged and no manifest holds a copy; this store is lost")
        _set_aside(root, SETTINGS)
        write_sealed(root / SETTINGS, read_sealed(root / MANIFEST)["settings"])
        tell(f"{SETTINGS}: written again from {MANIFEST}")
    if MANIFEST in damaged or "journal" in damaged:
        _set_aside(root, MANIFEST)
        for old in root.glob("journal-*.jsonl"):
            _set_aside(root, old.name)
        journal = Journal(root, 0, 1)
        journal.begin()
        records = [r for f in sorted((root / "acts").glob("*.safetensors")) if (r := _salvaged(root, f)) is not None]
        for record in records:
            journal.append(record)
        tell(f"{len(records):,} shards vouch for themselves")


def _salvaged(root: Path, file: Path) -> ShardRecord | None:
    """Return the record of a shard whose data agree with the checksum in its own header, None where they do not."""
    name = str(file.relative_to(root))
    try:
        record, meta = self_record(root, name)
        documents = map_shard(file)[0]["documents"]
        owned = documents[documents >= 0]
        bounds = (int(owned.min()), int(owned.max())) if len(owned) else (-1, -1)
        first, end = meta["sequences"]
        number = int(file.stem)
        return ShardRecord(
            **record.as_dict(), shard=number, sequences=(first, end), rows=len(documents), documents=bounds
        )
    except (FormatError, KeyError, ValueError, TypeError):
        return None


class _Mender:
    """Makes damaged files again, loading model and text only where they are needed."""

    def __init__(self, root: Path, model: Any, source: Any, tell: Callable[[str], None]):
        self.root, self.tell, self.source = root, tell, source
        self.settings: dict[str, Any] = read_sealed(root / SETTINGS)
        self._model = model
        self._job: Job | None = None
        self._log: dict[str, Any] = {}
        for log in sorted(root.glob("*run.json")):
            self._log = read_json(log)

    def mend(self, verdict: Verdict) -> None:
        """Make every damaged file again."""
        damaged = list(verdict.problems)
        tokens = [f for f in damaged if f.startswith("tokens/")]
        if tokens:
            self._tokens(tokens)
        if any(f.startswith("tokenizer/") for f in damaged):
            self._tokenizer([f for f in damaged if f.startswith("tokenizer/")])
        acts = [f for f in damaged if f.startswith("acts/")]
        sealed = (self.root / MANIFEST).exists()
        for file in acts:
            _set_aside(self.root, file)
        if not sealed:
            self._forget(acts)
        missing = self._missing()
        for shard in missing if sealed or self._planned() else []:
            self._shard(shard)
        if STATS in damaged:
            self._stats()
        if not sealed and self._planned():
            seal(self.root)

    def _planned(self) -> bool:
        return (self.root / PLAN).exists()

    def _missing(self) -> list[int]:
        if not self._planned():
            return []
        count = len(read_sealed(self.root / PLAN)["files"])
        held = None if (self.root / MANIFEST).exists() else journalled(self.root)
        there = [i for i in range(count) if (self.root / acts_file(i)).exists() and (held is None or i in held)]
        return sorted(set(range(count)) - set(there))

    def _forget(self, acts: list[str]) -> None:
        """Take damaged shards out of the journals: the next harvest, or this repair, makes them."""
        kept = [record for record in journalled(self.root).values() if record.file not in acts]
        for old in self.root.glob("journal-*.jsonl"):
            old.unlink()
        journal = Journal(self.root, 0, 1)
        journal.begin()
        for record in kept:
            journal.append(record)

    def _work(self) -> Job:
        """Return the job, with the model that made the store; raises StoreError for another one."""
        if self._job is None:
            made = self.settings["model"]
            name = self._log.get("model") or made["name"]
            given = self._model if self._model is not None else load_model(name, dtype=made["dtype"])
            model = as_model(given)
            now = settings_now(model)
            for part in ("model", "tokenizer"):
                if found := differences({part: self.settings[part]}, {part: now[part]}):
                    raise StoreError(f"{self.root} was made by another model: {'; '.join(found)}; give it as model=")
            if found := differences(self.settings["machine"], now["machine"]):
                self.tell(f"another machine than the store's, the last bits may differ: {'; '.join(found)}")
            self._job = job_of(model, self.settings)
        return self._job

    def _shard(self, number: int) -> None:
        job, made = self._work(), _Made()
        Harvester(job).shard(number, read_windows(self.root, number), made, lambda n: None)
        record = made.rows[0].write(self.root, self.settings["covariance"])
        self.tell(f"{record.file}: harvested again")
        if not (self.root / MANIFEST).exists():
            Journal(self.root, 0, 1).append(record)
            return
        manifest = read_sealed(self.root / MANIFEST)
        if manifest["acts"][number] != record.as_dict():
            self.tell(f"{record.file}: not the same bytes as before; the manifest takes the new ones")
            manifest["acts"][number] = record.as_dict()
            manifest["rows"] = sum(r["rows"] for r in manifest["acts"])
            write_sealed(self.root / MANIFEST, manifest)

    def _stats(self) -> None:
        shards = [ShardRecord.read(r) for r in read_sealed(self.root / MANIFEST)["acts"]]
        _set_aside(self.root, STATS)
        write_stats(self.root, [h["name"] for h in self.settings["hooks"]], shards, self.settings["covariance"])
        self.tell(f"{STATS}: computed again")

    def _tokenizer(self, files: list[str]) -> None:
        for file in files:
            _set_aside(self.root, file)
        save_tokenizer(self._work().model.tokenizer, self.root / "tokenizer")
        self.tell("tokenizer: written again")

    def _tokens(self, files: list[str]) -> None:
        """Cut the text into windows again; raises StoreError where it is not the text of the store."""
        source = self.source if self.source is not None else self._log.get("source", "")
        if isinstance(source, str) and ":" not in source:
            raise StoreError(f"{self.root}: windows of tokens are damaged; give the text again as source=")
        cut, documents = self._work().cut, read_source(source, field=self._log.get("field", "text"))
        for file in files:
            _set_aside(self.root, file)
        if PLAN in files:
            with Plan(self.root, cut, documents) as plan:
                number = 0
                while plan.shard(number) is not None:
                    number += 1
        else:
            for number, (windows, _) in enumerate(cut.shards(documents)):
                if token_file(number) in files:
                    publish(self.root, number, number * cut.per_shard, windows)
        self.tell(f"{', '.join(files)}: tokenised again")


class _Made:
    """Stands in for the writing thread: keeps the one shard."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []

    def put(self, rows: Rows, done: Callable[[], None]) -> None:
        """Keep a shard."""
        self.rows.append(rows)

"""Whatever stops a harvest, finished shards stay readable and the same command ends with the same bytes."""

import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from filelock import FileLock
from small_store import content, make_model

from interp.store.ledger import StoreError
from interp.store.reader import open_store
from interp.store.verify import verify
from sae.extras import MissingError
from sae.io import FormatError


def readable(root):
    """Check that what is there is sound so far; returns how many rows are finished."""
    try:
        verdict = verify(root)
    except MissingError:  # killed before the settings were there
        return 0
    assert verdict.sound, verdict.problems
    return len(open_store(root))


@pytest.fixture(scope="module")
def whole(forker, tmp_path_factory):
    """Return an undisturbed store of the forked kind, and its number of durable operations."""
    root = tmp_path_factory.mktemp("whole") / "s"
    found = forker.run(root)
    assert found["status"] == 0, found
    return root, found["operations"]


def test_killed_before_any_durable_operation_it_ends_with_the_same_bytes(forker, whole, tmp_path):
    want, operations = content(whole[0]), whole[1]
    assert operations > 60
    rows = []
    for op in range(operations):
        root = tmp_path / "s"
        assert forker.run(root, op=op, deed="kill")["status"] == -9
        rows.append(readable(root))
        assert forker.run(root)["status"] == 0
        assert content(root) == want, f"killed before operation {op}"
        shutil.rmtree(root)
    assert rows[0] == 0 and len(set(rows)) > 5 and max(rows) == len(open_store(whole[0]))


def test_killed_again_and_again_it_ends_with_the_same_bytes(forker, whole, tmp_path):
    want, kills, root = content(whole[0]), 0, tmp_path / "s"
    pick = random.Random(11)
    while kills < 20:
        ended = forker.run(root, delay=pick.uniform(0.005, 0.12))["status"]
        readable(root)
        kills += ended == -9
        if ended == 0:
            assert content(root) == want
            shutil.rmtree(root)
    assert forker.run(root)["status"] == 0 and content(root) == want


@pytest.mark.parametrize("deed", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_is_told_and_loses_nothing(forker, whole, tmp_path, deed):
    want, told = content(whole[0]), 0
    for op in range(0, whole[1] - 12, 3):  # the last ones tidy up after the seal
        root = tmp_path / "s"
        found = forker.run(root, op=op, deed=deed)
        if found["status"] == 0:  # the failure was in tidying what no longer matters
            continue
        assert found["error"].startswith("OSError"), found
        told += "the shards finished so far are kept" in found["error"]
        readable(root)
        assert forker.run(root)["status"] == 0
        assert content(root) == want, f"failed at operation {op}"
        shutil.rmtree(root)
    assert told > 5


def test_temporary_files_of_the_dead_are_swept(forker, whole, tmp_path):
    root = tmp_path / "s"
    op = 0
    while not list(root.rglob(".tmp-*")):
        shutil.rmtree(root, ignore_errors=True)
        forker.run(root, op=op, deed="kill")
        op += 1
    assert forker.run(root)["status"] == 0
    assert not list(root.rglob(".tmp-*"))


def test_a_second_writer_is_refused_and_readers_are_not(harvest, tmp_path, model, monkeypatch):
    root, seen = tmp_path / "s", []
    run = model.run

    def refused(given):
        with pytest.raises(StoreError) as found:
            harvest(root, **given)
        return str(found.value)

    def meddle(*args, **options):
        if not seen:
            with ThreadPoolExecutor(1) as pool:  # a lock is its thread's own
                seen.extend(pool.map(refused, [{}, {"rank": 1, "world_size": 2}]))
            seen.append(open_store(root))
        return run(*args, **options)

    monkeypatch.setattr(model, "run", meddle)
    assert harvest(root).complete
    assert "being written" in seen[0] and "0-of-1" in seen[1] and not seen[2].complete


def test_a_lock_of_the_dead_holds_nobody_up(forker, whole, tmp_path):
    root = tmp_path / "s"
    assert forker.run(root, op=30, deed="kill")["status"] == -9
    assert list(root.glob(".lock-0-of-1"))
    with FileLock(root / ".lock-0-of-1", timeout=0):
        found = forker.run(root)
    assert found["status"] == 1 and "StoreError" in found["error"]
    assert forker.run(root)["status"] == 0


def test_a_torn_journal_line_costs_one_shard_and_a_damaged_one_is_told(forker, whole, tmp_path, harvest):
    root = tmp_path / "s"
    assert forker.run(root, op=whole[1] - 25, deed="kill")["status"] == -9
    journal = root / "journal-0-of-1.jsonl"
    lines = journal.read_bytes()
    assert lines.count(b"\n") > 2
    journal.write_bytes(lines[:-20])
    assert len(open_store(root).shards) == lines.count(b"\n") - 1
    damaged = bytearray(lines)
    damaged[40] ^= 1
    journal.write_bytes(bytes(damaged))
    with pytest.raises((StoreError, FormatError), match="line 1"):
        open_store(root)
    assert not verify(root).sound
    journal.write_bytes(lines[:-20])
    assert forker.run(root)["status"] == 0 and content(root) == content(whole[0])


def test_another_text_is_refused_while_the_plan_is_being_made(forker, whole, tmp_path):
    root, op = tmp_path / "s", 0
    while not (list(root.glob("tokens/*.safetensors")) and not (root / "tokens" / "plan.json").exists()):
        shutil.rmtree(root, ignore_errors=True)
        assert forker.run(root, op=op, deed="kill")["status"] == -9
        op += 1
    before = content(root)
    found = forker.run(root, texts=4)
    assert found["status"] == 1 and "was begun with another text" in found["error"]
    assert not list(root.glob("acts/*")) and before.items() <= content(root).items()
    assert forker.run(root)["status"] == 0 and content(root) == content(whole[0])


def test_two_processes_make_the_store_of_one(whole, tmp_path, forker):
    from conftest import Forker

    root, other = tmp_path / "s", Forker()
    try:
        with ThreadPoolExecutor(2) as pool:
            ended = [pool.submit(f.run, root, rank=rank, world=2) for rank, f in enumerate((forker, other))]
            assert [e.result()["status"] for e in ended] == [0, 0]
    finally:
        other.close()
    assert content(root) == content(whole[0])
    assert {p.name for p in root.glob("*run.json")} == {"rank-0.run.json", "rank-1.run.json"}


@pytest.mark.parametrize("order", [[1, 0], [0, 1], [2, 0, 1]])
def test_ranks_come_in_any_order_die_and_come_back(forker, whole, tmp_path, order):
    root, world = tmp_path / "s", len(order)
    for rank in order:
        assert forker.run(root, rank=rank, world=world, op=12, deed="kill")["status"] == -9
    for rank in order[:-1]:
        assert forker.run(root, rank=rank, world=world)["status"] == 0
    assert not open_store(root).complete
    assert forker.run(root, rank=order[-1], world=world)["status"] == 0
    assert open_store(root).complete and content(root) == content(whole[0])


def test_a_rank_waits_for_the_text_that_another_cuts(harvest, reference, tmp_path, texts):
    """One rank is slow to read its text; the other takes the windows that it has published."""
    root, gate = tmp_path / "s", threading.Event()

    def slow():
        for number, text in enumerate(texts):
            if number == 40:
                assert gate.wait(20)
            yield text

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(harvest, root, rank=0, world_size=2, source=slow())
        while not list((root / "tokens").glob("*.safetensors")):
            assert not first.done()
        second = pool.submit(harvest, root, rank=1, world_size=2, model=make_model())
        gate.set()
        first.result(30), second.result(30)
    assert open_store(root).complete
    assert torch.equal(open_store(root)["resid_post.1"][:], open_store(reference)["resid_post.1"][:])

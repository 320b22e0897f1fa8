"""Every changed bit is found and its file named; a repair brings back the same bytes, and only those are made again."""

import random
import shutil

import pytest
import torch
from small_store import content, make_texts

from interp.store.ledger import StoreError
from interp.store.reader import open_store
from interp.store.verify import repair, verify
from sae.extras import MissingError


@pytest.fixture
def copy_of(reference, tmp_path):
    root = tmp_path / "s"
    shutil.copytree(reference, root)
    return root


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def test_a_sound_store_is_called_sound(reference):
    verdict = verify(reference)
    assert verdict.sound and verdict.complete and verdict.lines()[0].startswith("sound: 7 shards")
    assert verdict.rows == len(open_store(reference))


def test_single_bit_flips_are_all_found_in_the_right_file(copy_of):
    pick, want = random.Random(7), content(copy_of)
    names = sorted(want)
    chosen = names + pick.choices(names, weights=[len(want[n]) for n in names], k=200)
    for name in chosen:
        flip(copy_of / name, pick.randrange(8 * len(want[name])))
        verdict = verify(copy_of)
        assert not verdict.sound and name in verdict.problems, f"{name}: {verdict.problems}"
        (copy_of / name).write_bytes(want[name])
    assert verify(copy_of).sound


@pytest.mark.parametrize("name", ["acts/00000002.safetensors", "tokens/plan.json", "MANIFEST.json", "store.json"])
@pytest.mark.parametrize("damage", ["cut", "grown", "empty", "gone"])
def test_files_cut_short_grown_or_gone_are_found(copy_of, name, damage):
    path = copy_of / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-7], "grown": data + b"\0", "empty": b""}[damage])
    verdict = verify(copy_of)
    assert not verdict.sound and name in verdict.problems, verdict.problems


NAMES = [
    "acts/00000000.safetensors", "acts/00000006.safetensors", "tokens/00000003.safetensors", "tokens/plan.json",
    "MANIFEST.json", "store.json", "stats.safetensors", "tokenizer/tokenizer.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_set_aside_and_made_again(copy_of, reference, model, texts, name):
    flip(copy_of / name, 999)
    damaged = (copy_of / name).read_bytes()
    said = []
    verdict = repair(copy_of, model=model, source=texts, say=said.append)
    assert verdict.sound and verdict.complete, verdict.problems
    kept = {n: b for n, b in content(copy_of).items() if not n.startswith("quarantine/")}
    assert kept == content(reference)
    assert damaged in [p.read_bytes() for p in (copy_of / "quarantine").iterdir()]
    assert said


def test_only_the_damaged_shard_is_harvested_again(copy_of, model, monkeypatch):
    run, calls = model.run, []
    monkeypatch.setattr(model, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    flip(copy_of / "acts/00000001.safetensors", 90_000)
    assert repair(copy_of, model=model).sound
    assert len(calls) == open_store(copy_of).settings["batches_per_shard"]
    assert repair(copy_of).sound and len(calls) == open_store(copy_of).settings["batches_per_shard"]


def test_shards_vouch_for_themselves_where_the_manifest_is_gone(copy_of, reference, model, monkeypatch):
    run, calls = model.run, []
    monkeypatch.setattr(model, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    flip(copy_of / "MANIFEST.json", 500)
    flip(copy_of / "acts/00000004.safetensors", 90_000)
    verdict = repair(copy_of, model=model)
    assert verdict.sound and verdict.complete
    assert len(calls) == open_store(copy_of).settings["batches_per_shard"]
    kept = {n: b for n, b in content(copy_of).items() if not n.startswith("quarantine/")}
    assert kept == content(reference)


def test_another_model_or_text_is_not_taken_for_a_repair(copy_of, model):
    import copy

    from interp.model.loading import load_model

    other = copy.deepcopy(model.hf)
    other.lm_head.weight.data[0, 0] += 1
    flip(copy_of / "acts/00000001.safetensors", 90_000)
    with pytest.raises(StoreError, match="made by another model"):
        repair(copy_of, model=load_model(other, tokenizer=model.tokenizer))
    assert repair(copy_of, model=model).sound
    flip(copy_of / "tokens/00000001.safetensors", 9_000)
    assert not repair(copy_of, model=model, source=make_texts(seed=8)).sound
    with pytest.raises(StoreError, match="give the text again"):
        repair(copy_of, model=model)


def test_an_unfinished_store_is_sound_so_far_and_can_be_mended(harvest, model, reference, tmp_path, monkeypatch):
    root, calls, run = tmp_path / "s", [], model.run

    def stop(*args, **options):
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return run(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "run", stop)
        harvest(root)
    verdict = verify(root)
    assert verdict.sound and not verdict.complete and "unfinished" in verdict.lines()[0]
    flip(root / "acts/00000001.safetensors", 90_000)
    assert list(verify(root).problems) == ["acts/00000001.safetensors"]
    assert repair(root, model=model, source=make_texts()).sound
    harvest(root)
    kept = {n: b for n, b in content(root).items() if not n.startswith("quarantine/")}
    assert kept == content(reference)


def test_a_folder_that_is_no_store_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(MissingError, match="holds no store"):
            verify(path)


def test_the_repaired_store_reads_as_before(copy_of, reference, model):
    (copy_of / "acts/00000003.safetensors").unlink()
    assert repair(copy_of, model=model).sound
    assert torch.equal(open_store(copy_of)["resid_post.1"][:], open_store(reference)["resid_post.1"][:])

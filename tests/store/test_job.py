"""What makes two harvests the same, and which part of one a process does."""

import pytest
from small_store import HOOKS, make_texts

from interp.store.harvest import DEFAULTS
from interp.store.job import describe, differences, local_device, tokenizer_fingerprint, who_am_i

LAUNCHERS = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"]
ARRAY = [f"SLURM_ARRAY_TASK_{part}" for part in ("ID", "COUNT", "MIN", "STEP")]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1)),
        ({"SLURM_NTASKS": "4"}, (0, 1)),  # an allocation, not a task of it
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "6"}, (5, 6)),
        ({**dict(zip(ARRAY, ("12", "3", "10", "2"), strict=True))}, (1, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, (1, 2)),
    ],
)
def test_a_process_knows_its_rank_from_its_launcher(monkeypatch, given, found):
    for name in (*LAUNCHERS, *ARRAY):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert who_am_i()[:2] == found
    assert who_am_i(1, 4)[:2] == (1, 4)  # what is said counts first


@pytest.mark.parametrize("wrong", [(4, 4), (-1, 2), (1, None)])
def test_a_rank_outside_the_world_is_refused(wrong):
    with pytest.raises(ValueError, match="ranks count from 0"):
        who_am_i(*wrong)


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    import torch

    monkeypatch.setenv("LOCAL_RANK", "5")
    assert local_device("auto") == "auto"  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert local_device("auto") == "cuda:1" and local_device("cpu") == "cpu"


def test_a_tokenizers_name_is_what_it_does_and_not_how_it_was_last_called(model):
    import copy

    tokenizer = copy.deepcopy(model.tokenizer)
    name = tokenizer_fingerprint(tokenizer)
    tokenizer(["w5", "w6 w7"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == name == tokenizer_fingerprint(model.tokenizer)
    tokenizer.add_tokens(["w97"])
    assert tokenizer_fingerprint(tokenizer) != name


def test_differences_are_named_by_their_place():
    there = {"a": 1, "b": {"c": 2, "d": 3}, "gone": True}
    assert differences(there, {"a": 1, "b": {"c": 5, "d": 3}, "new": None}) == [
        "b.c is 2 there and 5 here",
        "gone is true there and null here",
    ]
    assert differences(there, there) == []


@pytest.mark.parametrize(("mb", "batches"), [(0.001, 1), (1, 128), (64, 8192)])
def test_a_shard_has_about_the_size_asked_for(model, mb, batches):
    options = {**DEFAULTS, "ctx": 16, "batch_size": 4, "shard_mb": mb}
    job = describe(model, HOOKS, **options)
    assert job.cut.batches_per_shard == batches
    windows, kept = next(job.cut.shards(make_texts()))
    assert len(windows) <= job.cut.per_shard and kept > 0

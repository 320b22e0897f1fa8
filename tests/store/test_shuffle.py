"""The shuffle: a permutation good enough to stand for chance, and batches that hold every row once and resume."""

import json
import math
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from interp.store import shuffle
from interp.store.shuffle import Batches, permute


def whole(n, key=(0, 0)):
    return permute(np.arange(n, dtype=np.uint64), n, key)


def table(n, d=4, dtype=torch.float32):
    """Rows that tell their number: [tok, d], exact in float16 up to 2,048 rows."""
    return (torch.arange(n)[:, None] + torch.arange(d) / 64).to(dtype)


def cut(rows, *sizes):
    return list(rows.split([*sizes, len(rows) - sum(sizes)]))


def numbers(batches):
    return [int(row) for batch in batches for row in batch[:, 0].round().tolist()]


def some(batches, n):
    return [batch for _, batch in zip(range(n), batches, strict=False)]


@given(st.integers(1, 5000), st.integers(-(2**70), 2**70), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_index_has_one_image_whatever_the_size_and_the_key(n, seed, epoch):
    assert sorted(whole(n, (seed, epoch)).tolist()) == list(range(n))


@given(st.integers(2, 2**62), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_images_of_a_huge_permutation_are_in_range_and_distinct(n, seed):
    index = np.unique(np.linspace(0, n - 1, 1000, dtype=np.uint64).clip(0, n - 1))
    images = permute(index, n, (seed,))
    assert int(images.max()) < n and len(np.unique(images)) == len(index)


def test_where_an_index_goes_does_not_depend_on_who_is_asked_for_with_it():
    n = 30_011
    order, pick = whole(n, (5, 2)), np.array([30_010, 0, 17, 8191, 8192, 17], dtype=np.uint64)
    assert permute(pick, n, (5, 2)).tolist() == order[pick].tolist()


def test_the_order_is_pinned_so_that_old_runs_resume_on_any_machine():
    # printed by the functions called here; they may never change again
    assert whole(10, (0, 0)).tolist() == [7, 1, 4, 6, 5, 2, 3, 9, 0, 8]
    assert whole(10, (0, 1)).tolist() == [8, 4, 3, 9, 5, 2, 0, 7, 6, 1]
    far = np.array([0, 1, 2, 10**12 - 1], dtype=np.uint64)
    assert permute(far, 10**12, (7, 3)).tolist() == [598523049852, 97561013508, 945342923499, 110484659485]


@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_arrangement_of_a_few_rows_is_as_likely(n):
    """Chi-square over all n! arrangements; 3 rounds instead of 24 give p = 0 at n = 4."""
    keys = 20 * math.factorial(n)
    seen = Counter(tuple(whole(n, (key, 0)).tolist()) for key in range(keys))
    counts = [*seen.values(), *[0] * (math.factorial(n) - len(seen))]
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("n", [2, 7, 10, 33, 100])
def test_small_orders_are_as_uniform_as_numpys(n):
    """Where rows go, and which row follows which: both statistics hold for NumPy's shuffle, the null, as well."""
    generator = np.random.default_rng(n)
    for draw in (lambda key: whole(n, (key, 1)).astype(int), lambda key: generator.permutation(n)):
        places, steps = np.zeros((n, n)), np.zeros(n)
        for key in range(1000):
            order = draw(key)
            places[np.arange(n), order] += 1
            steps += np.bincount(np.diff(order) % n, minlength=n)
        # rows and columns of `places` have fixed sums: n / (n - 1) times chi-square with (n - 1)^2 degrees of freedom
        statistic = ((places - 1000 / n) ** 2 / (1000 / n)).sum() * (n - 1) / n
        assert 1e-4 < stats.chi2.sf(statistic, (n - 1) ** 2) < 1 - 1e-4
        assert n == 2 or stats.chisquare(steps[1:]).pvalue > 1e-4


@pytest.mark.parametrize("n", [20_000, 100_003, 262_144])
def test_large_orders_keep_no_trace_of_neighbourhood(n):
    """Rows that were neighbours, or lie one row of the network's grid apart, end nowhere near each other."""
    order = whole(n, (11, 4)).astype(float)
    side = math.isqrt(n - 1) + 1
    for lag in (1, 2, side, -(-n // side)):
        counts = np.histogram((order[lag:] - order[:-lag]) % n, 64, (0, n))[0]
        assert stats.chisquare(counts).pvalue > 1e-4, lag
        pairs = (order[lag:] / n - 0.5) * (order[:-lag] / n - 0.5)
        assert abs(pairs.mean()) * 12 * math.sqrt(n - lag) < 4, lag
    squares = np.histogram2d(np.arange(n), order, 32)[0]
    assert stats.chi2.sf(((squares - n / 1024) ** 2 / (n / 1024)).sum(), 31**2) > 1e-4


def test_another_epoch_and_another_seed_give_unrelated_orders():
    n = 50_000
    base = whole(n, (3, 0))
    for key in ((3, 1), (4, 0), (0, 3), (30,)):
        assert (base == whole(n, key)).sum() < 10, key  # one is expected


@pytest.mark.parametrize(("index", "n"), [([0], 0), ([5], 5), ([0], 2**62 + 1)])
def test_a_permutation_refuses_what_it_cannot_place(index, n):
    with pytest.raises(ValueError, match="permutation"):
        permute(np.array(index, dtype=np.uint64), n, (0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 3, 4, 768])
def test_batches_are_the_rows_that_the_permutation_names_bit_for_bit(dtype, d):
    rows = torch.randn(1000, d).to(dtype)
    shards = cut(rows, 1, 0, 400, 307)  # of every size, one empty
    got = list(Batches(shards, 64, seed=9, epochs=3, drop_last=False))
    order = np.concatenate([whole(1000, (9, epoch)) for epoch in range(3)]).astype(np.int64)
    assert torch.equal(torch.cat(got), rows[torch.from_numpy(order)])
    assert {len(b) for b in got[:-1]} == {64} and got[0].dtype == dtype


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 3), st.lists(st.integers(0, 90), max_size=5))
@settings(max_examples=40, deadline=None)
def test_batch_size_shards_and_read_ahead_change_nothing_of_the_order(n, batch_size, prefetch, cuts):
    rows = table(n)
    ends = sorted({min(c, n) for c in cuts})
    shards = [rows[a:b].clone() for a, b in zip([0, *ends], [*ends, n], strict=True)]
    got = Batches(shards, batch_size, seed=1, epochs=2, drop_last=False, prefetch=prefetch)
    assert numbers(got) == numbers(Batches([rows], 7, seed=1, epochs=2, drop_last=False))


def test_each_epoch_holds_every_row_once_in_a_fresh_order():
    seen = numbers(Batches(cut(table(1000), 300), 100, epochs=2))
    first, second = seen[:1000], seen[1000:]
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first != second and first != sorted(first)


def test_batches_without_shuffling_are_in_order_and_run_over_the_seam():
    assert numbers(some(Batches(cut(table(10), 3), 4, shuffle=False), 6)) == [*range(10), *range(10), *range(4)]


def test_the_order_is_computed_in_pieces_that_fit_together(monkeypatch):
    long = numbers(Batches([table(500)], 33, epochs=3))
    monkeypatch.setattr(shuffle, "PIECE", 16)  # smaller than a batch: one batch spans several
    assert numbers(Batches([table(500)], 33, epochs=3)) == long


def test_a_rest_at_the_end_of_the_last_epoch_is_left_out_unless_asked_for():
    kept, dropped = (Batches([table(10)], 4, epochs=3, drop_last=drop) for drop in (False, True))
    assert [len(b) for b in kept] == [4] * 7 + [2] and len(kept) == 8
    assert [len(b) for b in dropped] == [4] * 7 and len(dropped) == 7
    with pytest.raises(TypeError, match="no length"):
        len(Batches([table(10)], 4))


def test_files_are_read_through_their_maps_and_never_written(tmp_path):
    rows = table(600, 8, torch.float16)
    np.save(tmp_path / "a.npy", rows[:200].numpy())
    np.save(tmp_path / "b.npy", rows[200:].numpy())
    maps = [np.load(tmp_path / name, mmap_mode="r") for name in ("a.npy", "b.npy")]
    odd = np.memmap(tmp_path / "c", dtype=np.float16, mode="w+", offset=2, shape=rows.shape)  # 2-byte alignment only
    odd[:] = rows.numpy()
    for shards in (maps, [odd]):
        batch = next(iter(Batches(shards, 600)))
        assert sorted(numbers([batch])) == list(range(600))
        batch.zero_()
    assert maps[1][399, 0] == 599


def test_several_hook_points_give_the_same_rows_together():
    wide, narrow = table(300, 8, torch.float16), table(300, 3)
    both = Batches({"a": cut(wide, 100, 50), "b": cut(narrow, 120)}, 50, epochs=1, seed=2)
    for batch in both:
        assert batch["a"].shape == (50, 8) and batch["b"].shape == (50, 3)
        assert numbers([batch["a"]]) == numbers([batch["b"]])
    assert sum(1 for _ in Batches({"a": [narrow]}, 50, epochs=1)) == 6


def test_values_are_converted_once_read():
    rows = torch.randn(50, 6).to(torch.bfloat16)
    batch = next(iter(Batches([rows], 50, shuffle=False, dtype=torch.float32)))
    assert batch.dtype == torch.float32 and torch.equal(batch, rows.float())


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_restored_reader_goes_on_with_the_batch_that_came_next(prefetch):
    make = lambda: Batches(cut(table(1000), 400), 48, seed=6, prefetch=prefetch)  # noqa: E731
    unbroken = numbers(some(make(), 60))
    reader = make()
    running = iter(reader)
    first = some(running, 37)
    time.sleep(0.05)  # let the thread run ahead of what was handed out
    state = json.loads(json.dumps(reader.state()))
    assert state["rows"] == 37 * 48
    again = make()
    assert numbers(some(again, 1)) == unbroken[:48]  # it did begin at the beginning
    again.restore(state)
    assert numbers(first) + numbers(some(again, 23)) == unbroken


def test_a_second_loop_goes_on_where_the_first_was_left():
    reader = Batches([table(100)], 10, shuffle=False, epochs=1)
    assert numbers(some(reader, 3)) + numbers(reader) == list(range(100))
    assert list(reader) == []


def test_restoring_a_reader_that_is_being_read_takes_effect_at_once():
    reader = Batches([table(100)], 10, shuffle=False, prefetch=3)
    running = iter(reader)
    next(running)
    reader.restore({**reader.state(), "rows": 70})
    assert numbers([next(running)]) == list(range(70, 80))
    assert numbers([next(running)]) == list(range(80, 90))


def test_a_position_far_away_costs_as_much_as_the_first(monkeypatch):
    asked = []
    real = permute
    monkeypatch.setattr(shuffle, "permute", lambda index, n, key: asked.append(len(index)) or real(index, n, key))
    reader = Batches([table(200_000, 2)], 10, prefetch=0)
    reader.restore({**reader.state(), "rows": 200_000 * 10**9 + 70_000})
    assert not asked
    batch = next(iter(reader))
    expected = real(np.arange(70_000, 70_010, dtype=np.uint64), 200_000, (0, 10**9))
    assert numbers([batch]) == expected.tolist() and sum(asked) <= shuffle.PIECE


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed 1"),
        ({"n_rows": 9}, "n_rows 9"),
        ({"shuffle": False}, "shuffle False"),
        ({"rows": -1}, "-1"),
        ({"rows": 2.5}, "2.5"),
    ],
)
def test_a_state_of_another_order_is_refused(change, told):
    reader = Batches([table(10)], 2)
    with pytest.raises(ValueError, match=told):
        reader.restore({**reader.state(), **change})
    with pytest.raises(ValueError, match="no 'seed'"):
        reader.restore({"rows": 3})


def test_no_more_is_read_ahead_than_the_buffer_holds():
    rows = table(5000, 250)  # 1 kB a row
    for buffer_mb, expected in ((0.1, 0), (4.75, 3), (100, 5)):
        reader = Batches([rows], 100, buffer_mb=buffer_mb, prefetch=5)
        started, real = [], reader._read
        reader._read = lambda start, count, started=started, real=real: started.append(start) or real(start, count)
        running = iter(reader)
        next(running)
        next(running)
        time.sleep(0.05)
        assert max(started) // 100 - 1 == expected
        running.close()


def test_memory_is_used_again_only_when_no_tensor_lies_on_it():
    reader = Batches([table(1000)], 10, shuffle=False, prefetch=0)
    running = iter(reader)
    kept = [next(running) for _ in range(20)]
    view = next(running)[2:3]  # the batch itself is gone
    rest = {next(running).data_ptr() for _ in range(20)}
    assert numbers(kept) == list(range(200)) and numbers([view]) == [202]
    assert len(rest) <= 2 and not rest & {batch.data_ptr() for batch in kept}


def test_the_reading_thread_ends_with_the_loop():
    names = lambda: [t.name for t in threading.enumerate() if t.name.startswith("batches")]  # noqa: E731
    before = len(names())
    running = iter(Batches([table(100)], 10))
    next(running)
    assert len(names()) == before + 1
    running.close()
    assert len(names()) == before


def test_asking_for_single_rows_changes_no_value(tmp_path):
    np.save(tmp_path / "a.npy", table(3000, 5).numpy())
    shards = [np.load(tmp_path / "a.npy", mmap_mode="r")]
    sparse = Batches(shards, 100, epochs=1, sparse_reads=True)
    assert numbers(sparse) == numbers(Batches([table(3000, 5)], 100, epochs=1, sparse_reads=False))


def test_shards_larger_than_memory_are_read_by_single_rows(monkeypatch):
    assert not Batches([table(100)], 10).sparse_reads
    monkeypatch.setattr(shuffle, "_memory", lambda: 1000)
    assert Batches([table(100)], 10).sparse_reads


@pytest.mark.parametrize(
    ("shards", "options", "told"),
    [
        ([], {}, "no shards"),
        ({}, {}, "empty mapping"),
        ([table(0)], {}, "no rows"),
        ([table(4), table(4, 5)], {}, r"shard 1 is \[tok, 5\]"),
        ([table(4), table(4).half()], {}, r"shard 1 is .*float16"),
        ([table(4)[0]], {}, r"shape \(4,\)"),
        ([table(4).T], {}, "one behind the other"),
        ([table(4)[:, 1:]], {}, "one behind the other"),
        ([table(4).long()], {}, "floating-point"),
        ([np.zeros((4, 2), ">f4")], {}, "floating-point"),
        ([torch.zeros(4, 2, device="meta")], {}, "in its memory"),
        ({"a": [table(4)], "b": [table(5)]}, {}, "'b': 5"),
        ({"a": [table(4)], "b": []}, {}, "no shards of b"),
        ([table(4)], {"batch_size": 0}, "batch_size is 0"),
        ([table(4)], {"epochs": 0}, "epochs 0"),
        ([table(4)], {"prefetch": -1}, "prefetch -1"),
        ([table(4)], {"buffer_mb": 1e-6}, "one batch takes"),
    ],
)
def test_what_cannot_be_read_is_refused_and_named(shards, options, told):
    with pytest.raises(ValueError, match=told):
        Batches(shards, **{"batch_size": 2, **options})

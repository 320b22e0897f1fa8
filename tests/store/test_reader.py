"""Reading a store: the right rows by any index, mapped and not copied, in batches that miss none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import HOOKS, content

from interp.model.hooks import HookPointError
from interp.store.ledger import StoreError
from interp.store.reader import open_store
from sae.extras import MissingError


@pytest.fixture(scope="module")
def store(reference):
    return open_store(reference)


@pytest.fixture(scope="module")
def rows(store):
    return torch.cat([store.shard(i)["blocks.1.hook_resid_post"] for i in range(len(store.shards))])


indices = st.one_of(
    st.slices(600),
    st.lists(st.integers(-400, 399), max_size=20),
    st.integers(-400, 399),
    st.builds(range, st.integers(0, 600), st.integers(0, 600), st.integers(1, 5)),
)


@settings(max_examples=200, deadline=None)
@given(key=indices)
def test_any_index_gives_the_rows_that_a_whole_array_gives(store, rows, key):
    if isinstance(key, range):
        key = [i for i in key if i < len(rows)]
    plain = np.array(key, dtype=int) if isinstance(key, list) else key
    want = torch.as_tensor(rows.numpy()[plain].copy())
    got = store["resid_post.1"][key]
    assert torch.equal(got, want)
    assert got.dtype == rows.dtype


def test_masks_arrays_and_tensors_are_indices_too(store, rows):
    mask = torch.arange(len(rows)) % 3 == 0
    assert torch.equal(store["resid_post.1"][mask], rows[mask])
    assert torch.equal(store["resid_post.1"][np.array([5, 300, 5])], rows[[5, 300, 5]])
    assert torch.equal(store.documents[torch.tensor([7, 8])], store.documents[:][7:9])
    for wrong in (len(rows), [len(rows)], torch.ones(3, dtype=torch.bool)):
        with pytest.raises(IndexError, match=r"of|for"):
            store["resid_post.1"][wrong]


def test_a_slice_within_a_shard_is_the_mapped_file_and_writing_never_reaches_it(reference):
    store = open_store(reference)
    before = content(reference)
    a, b = store["resid_post.1"][3:9], store["resid_post.1"][3:9]
    assert a.data_ptr() == b.data_ptr() == store.shard(0)["blocks.1.hook_resid_post"][3:9].data_ptr()
    a += 1
    assert torch.equal(store["resid_post.1"][3:9], a) and content(reference) == before
    first = store.shards[0].rows
    assert torch.equal(
        store["resid_post.0"][first - 2 : first + 2], store["resid_post.0"][list(range(first - 2, first + 2))]
    )


def test_documents_and_sequences_find_their_rows(store, texts):
    for document, text in enumerate(texts):
        found = store.where(document)
        assert [f"w{i}" for i in store.token_ids[found].tolist()] == text.split()
        assert (store.documents[found] == document).all()
    at = 0
    for number, window in enumerate(store.sequences()):
        assert window.index == number and window.rows.start == at
        at = window.rows.stop
        assert store.token_ids[window.rows].tolist() == [i for i in window.token_ids.tolist() if i > 2]
        assert window.text == store.tokenizer.decode(window.token_ids.tolist())
    assert at == len(store) and number + 1 == store.n_sequences


def test_an_epoch_of_batches_has_every_row_once(store, rows):
    seen = torch.cat(list(store.batches(64, "resid_post.1", epochs=1, drop_last=False, seed=5)))
    assert len(seen) == len(rows) and not torch.equal(seen, rows)
    order = lambda x: x[np.lexsort(x.numpy().T)]  # noqa: E731
    assert torch.equal(order(seen), order(rows))
    plain = torch.cat(list(store.batches(64, "resid_post.1", shuffle=False, epochs=1, drop_last=False)))
    assert torch.equal(plain, rows)


def test_batches_of_several_hook_points_are_of_the_same_rows(store):
    for batch in store.batches(50, HOOKS, epochs=1):
        assert list(batch) == store.hooks
        where = [int((store[HOOKS[0]][:] == row).all(1).nonzero()[0]) for row in batch[store.hooks[0]][:3]]
        assert torch.equal(store[HOOKS[1]][where], batch[store.hooks[1]][:3])
    with pytest.raises(ValueError, match="name one with hook="):
        store.batches(50)


def test_batches_resume_at_a_row(store):
    whole = list(store.batches(50, "resid_post.0", epochs=2, seed=1))
    batches = store.batches(50, "resid_post.0", epochs=2, seed=1)
    taken = iter(batches)
    for _ in range(5):
        next(taken)
    state = batches.state()
    again = store.batches(50, "resid_post.0", epochs=2, seed=1)
    again.restore(state)
    assert all(torch.equal(a, b) for a, b in zip(again, whole[5:], strict=True))


def test_what_is_not_there_is_told(store, tmp_path):
    with pytest.raises(HookPointError, match=r"closest: blocks\.1\.hook_resid_post"):
        store["resid_pots.1"]
    with pytest.raises(MissingError, match="holds no store"):
        open_store(tmp_path)
    assert torch.equal(store["resid_post.-1"][:5], store["resid_post.1"][:5])


def test_a_missing_or_short_shard_spoils_only_itself(harvest, tmp_path):
    store = harvest(tmp_path / "s")
    first, second = (store.path / r.file for r in store.shards[:2])
    rows = store["resid_post.0"][store.shards[0].rows + store.shards[1].rows :].clone()
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    again = open_store(tmp_path / "s")
    assert torch.equal(again["resid_post.0"][again.shards[0].rows + again.shards[1].rows :], rows)
    for row in (0, again.shards[0].rows):
        with pytest.raises(StoreError, match=r"interp verify .* --repair"):
            again["resid_post.0"][row]


def test_info_tells_what_a_store_is(store):
    told = store.describe()
    assert told["rows"] == len(store) and told["hooks"]["blocks.1.hook_resid_post"]["d"] == 16
    assert told["fingerprint"] == store.fingerprint
    assert f"{len(store):,} rows" in repr(store) and "unfinished" not in repr(store)

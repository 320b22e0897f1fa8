"""A stream gives a harvest's rows without the disk, goes on bit for bit anywhere, and leaves no thread behind."""

import copy
import gc
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import small_store
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import HOOKS, make_texts

import interp.model.tokens as tok
import sae
from interp.acts.capture import capture_acts
from interp.acts.rows import NonFiniteError
from interp.model.hooks import HookPointError, editing
from interp.model.loading import load_model
from interp.store.chunks import Passage
from interp.store.shuffle import permute
from interp.store.stream import stream_acts
from sae.data import Store
from sae.extras import MissingError

PLAIN = ("pad", "bos", "special")
SIZES = {"buffer_rows": 50, "mix_tokens": 128}  # blocks of 8 windows, about 110 rows, in chunks of about 40
PACKINGS = ("joined", "masked", "documents")
A, B = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture
def stream(model, texts):
    """Return a stream of about ten chunks: stream(dataset, **changes)."""

    def call(dataset=texts, **changes):
        chosen = {"hooks": HOOKS, "ctx": 16, "batch_size": 4, "exclude": PLAIN, **SIZES, **changes}
        return stream_acts(chosen.pop("model", model), dataset, chosen.pop("hooks"), **chosen)

    return call


def through_json(state):
    return json.loads(json.dumps(state))


def some(batches, n):
    return [batch for _, batch in zip(range(n), batches, strict=False)]


def equal(found, wanted):
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def running():
    return [t for t in threading.enumerate() if t.name == "interp-stream"]


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_in_order_is_the_store_bit_for_bit(stream, harvest, tmp_path, packing, prefetch):
    store = harvest(tmp_path / "s", packing=packing, dtype="float16")
    got = stream(packing=packing, dtype="float16", prefetch=prefetch)
    for hook in HOOKS:
        rows = torch.cat(list(got.batches(37, hook, shuffle=False, epochs=1, drop_last=False)))
        assert rows.dtype == torch.float16 and torch.equal(rows, store[hook][:])


def test_outliers_are_left_out_as_a_harvest_does(model, stream, harvest, tmp_path):
    hf = copy.deepcopy(model.hf)
    hf.get_input_embeddings().weight.data[9] *= 1000
    loud = load_model(hf, tokenizer=model.tokenizer)
    options = {"model": loud, "hooks": ["embed"], "exclude": (*PLAIN, "outlier:5")}
    store = harvest(tmp_path / "s", **options)
    rows = torch.cat(list(stream(**options).batches(50, shuffle=False, epochs=1, drop_last=False)))
    assert torch.equal(rows, store["embed"][:])
    assert len(rows) < sum(len(b) for b in stream(model=loud, hooks=["embed"]).batches(1, epochs=1))


def test_each_batch_has_a_median_of_its_own(stream, harvest, tmp_path):
    store = harvest(tmp_path / "s", exclude=(*PLAIN, "outlier:1.02"))  # so near that every median tells
    for hook in HOOKS:
        batches = stream(exclude=(*PLAIN, "outlier:1.02"), buffer_rows=500, mix_tokens=9999).batches(
            50, hook, shuffle=False, epochs=1, drop_last=False
        )
        assert torch.equal(torch.cat(list(batches)), store[hook][:])
    assert 100 < len(store) < 800


def in_order(values, key):
    order = permute(np.arange(len(values), dtype=np.uint64), len(values), key)
    return [values[i] for i in order.astype(int)]


def test_windows_of_a_block_and_rows_of_a_chunk_come_in_the_order_of_their_permutations(stream):
    """A slow twin: rows of each window from a pass in text order, arranged by hand."""
    plain = stream(exclude=("pad",))
    text = torch.cat(list(plain.batches(1, HOOKS[1], shuffle=False, epochs=1)))
    windows = list(text.split(16))  # nothing but pads is left out
    wanted = []
    for epoch in range(2):
        for block, at in enumerate(range(0, len(windows), 8)):
            own = in_order(windows[at : at + 8], (7, epoch, block, 0))
            batches = [torch.cat(own[i : i + 4]) for i in range(0, len(own), 4)]  # each is more than half of 50 rows
            for chunk, rows in enumerate(batches):
                wanted += in_order(rows, (7, epoch, block, 1 + chunk))
    got = torch.cat(list(stream(exclude=("pad",)).batches(64, HOOKS[1], seed=7, epochs=2, drop_last=False)))
    assert len(got) == len(wanted) == 2 * len(text)
    assert (got - torch.stack(wanted)).abs().max() < 1e-6  # other windows share a batch: another rounding
    other = torch.cat(list(stream(exclude=("pad",)).batches(64, HOOKS[1], seed=8, epochs=1, drop_last=False)))
    assert (got[: len(other)] - other).abs().max() > 0.1


def test_rows_travel_as_far_as_a_block_reaches(stream):
    """What the first tenth of the batches has of that of the text: nearly all in small blocks, not in a large one."""
    text = torch.cat(list(stream().batches(1, HOOKS[0], shuffle=False, epochs=1)))
    tenth = len(text) // 10
    for mix_tokens, low, high in ((128, 0.8, 1.0), (10**6, 0.0, 0.3)):
        rows = torch.cat(list(stream(mix_tokens=mix_tokens).batches(1, HOOKS[0], epochs=1)))
        share = (torch.cdist(rows[:tenth], text[:tenth]).amin(1) < 1e-4).float().mean()
        assert low <= share <= high, (mix_tokens, share)


def test_every_epoch_has_every_row_in_another_order(stream):
    batches = stream().batches(1, HOOKS[0], epochs=2)
    rows = torch.cat(list(batches))
    first, second = rows.chunk(2)
    assert not torch.allclose(first, second, atol=0.1)
    assert torch.allclose(first.sort(0).values, second.sort(0).values, atol=1e-6)


def test_several_hook_points_give_the_same_rows_together(stream):
    both = stream().batches(33, HOOKS, seed=3, epochs=1)
    alone = [stream().batches(33, hook, seed=3, epochs=1) for hook in HOOKS]
    for pair, a, b in zip(both, *alone, strict=True):
        assert list(pair) == [A, B] and torch.equal(pair[A], a) and torch.equal(pair[B], b)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_new_stream_goes_on_bit_for_bit_from_any_batch(stream, packing, prefetch):
    make = lambda: stream(packing=packing, prefetch=prefetch).batches(90, HOOKS[1], epochs=2)  # noqa: E731
    batches = make()
    states, full = [batches.state()], []
    for batch in batches:
        full.append(batch)
        states.append(through_json(batches.state()))
    for at in range(0, len(full), 3):
        again = make()
        again.restore(states[at])
        assert again.state() == states[at] and again.rows == 90 * at
        assert equal(some(again, 2), full[at : at + 2])
    assert equal(list(again), full[at + 2 :])  # and to the end, where it was left


def test_a_batch_may_span_several_chunks_and_be_of_another_size_after_a_restore(stream):
    batches = stream().batches(350, HOOKS[0], epochs=3)
    full = torch.cat(list(batches))
    batches = stream().batches(350, HOOKS[0], epochs=3)
    some(batches, 3)
    for size in (1, 17, 401):
        other = stream().batches(size, HOOKS[0], epochs=3, drop_last=False)
        other.restore(through_json(batches.state()))
        assert torch.equal(torch.cat(list(other))[: len(full) - 1050], full[1050:])


def test_another_process_goes_on_bit_for_bit(stream, tmp_path):
    batches = stream().batches(64, HOOKS[1], seed=2)
    some(batches, 11)
    (tmp_path / "state").write_text(json.dumps(batches.state()))
    code = f"""
import hashlib, json, pathlib, small_store
from interp.store.stream import stream_acts
stream = stream_acts(small_store.make_model(), small_store.make_texts(), {HOOKS}, ctx=16, batch_size=4,
                     exclude={PLAIN}, **{SIZES})
batches = stream.batches(64, {HOOKS[1]!r}, seed=2)
batches.restore(json.loads(pathlib.Path({str(tmp_path / "state")!r}).read_text()))
for _, batch in zip(range(30), batches):
    print(hashlib.sha256(batch.numpy().tobytes()).hexdigest())
kept = iter(batches)
next(kept)  # left open: the process must end all the same
"""
    folders = [str(Path(small_store.__file__).parent), str(Path(small_store.__file__).parents[2])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.split() == [hashlib.sha256(b.numpy().tobytes()).hexdigest() for b in some(batches, 30)]


@given(
    st.lists(st.one_of(st.just(0), st.integers(0, 60)), min_size=1, max_size=25), st.sampled_from(PACKINGS),
    st.integers(3, 20), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_blocks_from_any_place_are_those_of_an_unbroken_reading(model, counts, packing, ctx, size, bos, end, as_ids):
    ids = [[4 + (7 * i + j) % 90 for j in range(n)] for i, n in enumerate(counts)]
    text = ids if as_ids else [" ".join(f"w{i}" for i in row) for row in ids]
    options = {"ctx": ctx, "batch_size": 2, "packing": packing, "add_bos": bos, "separate": end}
    job = stream_acts(model, text, HOOKS, exclude=("pad",), **options).job

    def blocks(at=None):
        passage = Passage(job, iter(text), size, 0, at)
        return list(iter(lambda: passage.next(lambda: False), None))

    whole = blocks()
    shown = [[(w.ids.tolist(), w.documents.tolist()) for w in b.windows] for b in whole]
    windows = [(w.ids.tolist(), w.documents.tolist()) for w in job.cut.windows(text)]
    assert windows == [w for b in shown for w in b]
    for number, block in enumerate(whole):
        rest = blocks(block.place)
        assert [b.place for b in rest] == [b.place for b in whole[number:]]
        assert [[(w.ids.tolist(), w.documents.tolist()) for w in b.windows] for b in rest] == shown[number:]
        chunks = block.chunks(job, 30, None)
        assert [id(w) for c in chunks for w in c.windows] == [id(w) for w in block.windows]
        assert all(0 < c.rows <= 30 + 2 * ctx for c in chunks) and [c.place.chunk for c in chunks] == [
            *range(len(chunks))
        ]


def test_what_lies_before_a_restored_chunk_is_neither_tokenised_nor_run(stream, model, texts, monkeypatch):
    batches = stream(prefetch=False).batches(50, HOOKS[0], epochs=1)
    some(batches, 12)
    place = batches.state()["at"]
    assert place["document"] > 40
    read, ran = [], []
    real = tok.encode_many
    monkeypatch.setattr(tok, "encode_many", lambda t, rows, **kw: (read.extend(rows), real(t, rows, **kw))[1])
    handle = model.hf.model.register_forward_pre_hook(lambda *a: ran.append(1))
    again = stream(prefetch=False).batches(50, HOOKS[0], epochs=1)
    again.restore(batches.state())
    assert not ran and set(read) <= set(texts[place["document"] :])
    next(iter(again))
    handle.remove()
    assert len(ran) <= 2  # a chunk is one or two batches here, and fifty rows may lie in two of them


@pytest.mark.parametrize("change", ["early", "present", "shorter", "gone"])
def test_a_state_of_another_text_is_refused(stream, texts, change):
    batches = stream().batches(50, HOOKS[0])
    some(batches, 12)
    state = through_json(batches.state())
    document = state["at"]["document"]
    other = list(texts)
    if change == "early":
        other[3] += " w5"
    elif change == "present":
        other[document + 1] += " w5"
    else:
        del other[document - (change == "gone") * 5 :]
    with pytest.raises(ValueError, match="another text"):
        stream(other).batches(50, HOOKS[0]).restore(state)
    stream(texts).batches(50, HOOKS[0]).restore(state)


def test_a_state_of_the_first_chunk_tells_texts_apart_too(stream):
    batches = stream().batches(50, HOOKS[0])
    some(batches, 1)
    with pytest.raises(ValueError, match="another text"):
        stream(make_texts(seed=4)).batches(50, HOOKS[0]).restore(batches.state())


def test_a_state_of_another_stream_or_order_is_refused_by_name(stream):
    batches = stream().batches(50, HOOKS[0])
    some(batches, 2)
    state = batches.state()
    with pytest.raises(ValueError, match="ctx is 16 there and 12 here"):
        stream(ctx=12).batches(50, HOOKS[0]).restore(state)
    with pytest.raises(ValueError, match="buffer_rows"):
        stream(buffer_rows=200).batches(50, HOOKS[0]).restore(state)
    with pytest.raises(ValueError, match="seed"):
        stream().batches(50, HOOKS[0], seed=1).restore(state)
    with pytest.raises(ValueError, match="no 'at'"):
        stream().batches(50, HOOKS[0]).restore({k: v for k, v in state.items() if k != "at"})
    with pytest.raises(ValueError, match="place"):
        stream().batches(50, HOOKS[0]).restore({**state, "at": {"row": 1}})


def test_restoring_within_one_object_goes_back_and_forth(stream):
    batches = stream().batches(80, HOOKS[0])
    states, full = [batches.state()], []
    for batch in some(batches, 20):
        full.append(batch)
    again = stream().batches(80, HOOKS[0])
    it = iter(again)
    for _ in range(6):
        next(it)
        states.append(through_json(again.state()))
    for at in (0, 5, 2, 6, 6, 0):
        with pytest.raises(ValueError, match="another text"):
            again.restore({**states[3], "at": {**states[3]["at"], "windows": "0"}})  # and a refusal changes nothing
        assert len(some(again, at % 2)) == at % 2
        again.restore(states[at])
        assert torch.equal(next(it), full[at]), at  # an iteration that is under way follows
        assert equal(some(again, 2), full[at + 1 : at + 3])
        it = iter(again)


def test_an_iterator_is_read_once_and_forwards(stream, texts):
    full = list(stream().batches(60, HOOKS[0], epochs=1))
    one = stream(iter(texts))
    batches = one.batches(60, HOOKS[0])
    begin = batches.state()
    batches.restore(begin)
    states = []
    for found, wanted in zip(batches, full, strict=True):
        assert torch.equal(found, wanted)
        states.append(batches.state())
    with pytest.raises(ValueError, match="read once"):
        batches.restore(begin)
    with pytest.raises(ValueError, match="read once"):
        some(one.batches(60, HOOKS[0]), 1)
    with pytest.raises(ValueError, match="2 epochs of an iterator"):
        one.batches(60, HOOKS[0], epochs=2)
    later = stream(iter(texts)).batches(60, HOOKS[0])
    later.restore(states[7])  # a fresh iterator is skipped forwards
    assert equal(list(later), full[8:])
    begun = stream(iter(texts)).batches(60, HOOKS[0])
    some(begun, 1)
    begun.restore(begin)  # still in the first chunk
    assert equal(some(begun, 2), full[:2])
    begun.restore(states[9])  # as is one that was begun
    assert equal(list(begun), full[10:])
    with pytest.raises(ValueError, match="read once"):
        begun.restore(states[2])


@pytest.mark.parametrize("prefetch", [True, False])
def test_inf_and_nan_are_told_by_place_also_after_a_restore(stream, model, prefetch):
    hf = copy.deepcopy(model.hf)
    hf.get_input_embeddings().weight.data[9, 3] = float("nan")
    broken = load_model(hf, tokenizer=model.tokenizer)
    clean = [t.replace("w9 ", "").replace("w9", "w10") for t in make_texts()]
    spoilt = [*clean[:70], "w11 w9 w12", *clean[71:]]
    batches = stream(spoilt, model=broken, hooks=["embed"], prefetch=prefetch).batches(50)
    taken = 0
    with pytest.raises(NonFiniteError, match="document 70"):
        for _ in batches:
            taken += 1
    assert taken > 10 and not running()
    again = stream(spoilt, model=broken, hooks=["embed"], prefetch=prefetch).batches(50)
    again.restore(batches.state())
    with pytest.raises(NonFiniteError, match="document 70"):
        list(again)


def test_an_error_of_the_text_reaches_the_consumer_with_its_own_type(stream, texts):
    def failing():
        yield from texts[:60]
        raise OSError("the disk is gone")

    batches, taken = stream(failing()).batches(40, HOOKS[0]), 0
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in batches:
            taken += 1
    assert taken > 5 and not running()


def slow_after(texts, seconds, begun):
    yield from texts
    begun.set()
    while True:
        time.sleep(seconds)
        yield "w5"


@pytest.mark.parametrize("how", ["close", "break", "error", "collected"])
def test_leaving_an_iteration_stops_its_thread_at_once(stream, texts, how):
    begun = threading.Event()
    batches = stream(slow_after(texts, 0.02, begun), mix_tokens=900).batches(16, HOOKS[0])
    it = iter(batches)
    next(it)
    while not begun.wait(0.05):  # a chunk of quick texts may be there before the slow one is begun
        next(it)
    assert running()  # at a chunk that would take ten seconds and more
    before = time.perf_counter()
    if how == "close":
        it.close()
    elif how == "break":
        for _ in it:
            break
        del it
    elif how == "error":
        with pytest.raises(KeyboardInterrupt):
            it.throw(KeyboardInterrupt)
    else:
        del it, batches
        gc.collect()
    assert not running() and time.perf_counter() - before < 2


def test_a_stopped_chunk_is_begun_again_and_no_row_is_lost(stream):
    full = some(stream().batches(64, HOOKS[0]), 40)
    batches, found = stream().batches(64, HOOKS[0]), []
    while len(found) < 40:
        found += some(batches, 1)  # every iteration is left after a batch, wherever the thread is
        time.sleep(0.003 * (len(found) % 3))
    assert equal(found, full)


def test_the_model_can_be_used_and_edited_beside_the_stream(stream, model, texts):
    full = some(stream(prefetch=False).batches(64, HOOKS[1]), 25)
    alone = capture_acts(model, texts[:8], HOOKS)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.hf.modules()]
    model.hf.train()
    found = []
    for _, batch in zip(range(25), stream(prefetch=True).batches(64, HOOKS[1]), strict=False):
        found.append(batch)
        with editing(model, {HOOKS[0]: lambda value, clock: value + 5}):
            edited = capture_acts(model, texts[:8], HOOKS)
        assert torch.equal(capture_acts(model, texts[:8], HOOKS)[HOOKS[1]], alone[HOOKS[1]])
        assert not torch.allclose(edited[HOOKS[1]], alone[HOOKS[1]])
    assert model.hf.training
    model.hf.eval()
    assert equal(found, full)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.hf.modules()] == hooks


def test_the_thread_shares_every_weight_and_draws_no_random_number(stream, model):
    batches = stream(prefetch=True).batches(64, HOOKS[1])
    torch.manual_seed(1)
    wanted = torch.rand(5)
    torch.manual_seed(1)
    some(batches, 25)
    assert torch.equal(torch.rand(5), wanted)
    own = batches._producer.computer._harvester.job.model.hf
    assert own is not model.hf
    assert {p.data_ptr() for p in own.parameters()} == {p.data_ptr() for p in model.hf.parameters()}


def test_an_open_context_is_refused_ahead_and_followed_in_step(stream, model):
    plain = some(stream(prefetch=False).batches(64, HOOKS[1]), 2)
    with editing(model, {HOOKS[1]: lambda value, clock: value + 5}):
        with pytest.raises(ValueError, match="context"):
            some(stream(prefetch=True).batches(64, HOOKS[1]), 1)
        edited = some(stream(prefetch=False).batches(64, HOOKS[1]), 2)
    assert all(torch.allclose(a, b + 5, atol=1e-5) for a, b in zip(edited, plain, strict=True))


def test_a_model_that_cannot_be_copied_is_read_in_step(stream):
    placed = small_store.make_model()
    full = some(stream(model=placed).batches(64, HOOKS[1]), 12)
    placed.offloaded = True
    assert not stream(model=placed).prefetch
    batches = stream(model=placed).batches(64, HOOKS[1])
    it = iter(batches)
    assert torch.equal(next(it), full[0]) and not running()
    with pytest.raises(ValueError, match="prefetch=False"):
        stream(model=placed, prefetch=True)


def test_two_buffers_hold_every_chunk(stream):
    batches = stream().batches(20, HOOKS[0])
    memory = set()
    for _ in zip(range(150), batches, strict=False):
        if batches._loaded is not None:
            memory.add(batches._loaded.values[A].data_ptr())
    assert batches.state()["at"]["epoch"] >= 2 and len(memory) == 2


def test_a_buffer_of_so_many_megabytes_holds_two_chunks(stream):
    got = stream(buffer_mb=1)
    batches = got.batches(10, HOOKS[0])
    some(batches, 1)
    assert batches._loaded is not None
    one = sum(v.untyped_storage().nbytes() for v in batches._loaded.values.values())
    assert 0.3e6 < one <= 0.5e6  # room for a chunk, as large as it may get
    with pytest.raises(ValueError, match="buffer_mb"):
        stream(buffer_mb=0.001)


def test_an_autoencoder_learns_alike_from_a_stream_with_and_without_the_thread(stream):
    runs = []
    for prefetch in (True, False):
        learner = sae.build("batchtopk", d_in=16, d_sae=32, k=4, seed=3)
        batches = stream(prefetch=prefetch).batches(64, HOOKS[1])
        before = learner.W_dec.clone()
        list(sae.train(learner, batches, sae.TrainConfig(steps=20, init_tokens=128)))
        assert not torch.equal(learner.W_dec, before)
        runs.append(learner)
    assert torch.equal(runs[0].W_dec, runs[1].W_dec) and not running()


def test_fit_takes_a_stream_for_a_store(stream):
    source = stream(make_texts(2000, seed=6), buffer_rows=4000, mix_tokens=20_000)
    assert isinstance(source, Store)
    short = {"width": 32, "k": 4, "steps": 5, "batch_size": 128, "init_tokens": 256}
    assert sae.fit(source, hook="resid_post.1", **short).config["data"]["fingerprint"] == source.fingerprint
    assert sae.fit(source, hook=HOOKS, **short).sae.config.n_sites == 2
    assert sae.fit(source, hook=HOOKS[0], target=HOOKS[1], **short).sae.config.transcoder


def test_a_description_names_what_rows_depend_on(stream, texts):
    about = stream().describe()
    assert through_json(about) == about
    assert about["dataset"] == "list" and about["hooks"] == {A: {"d": 16}, B: {"d": 16}} and about["ctx"] == 16
    assert about["model"]["fingerprint"] and about["exclude"] == list(PLAIN)
    assert stream().fingerprint == about["fingerprint"] == stream(iter(texts), prefetch=False).fingerprint
    changes = [{"ctx": 12}, {"buffer_rows": 99}, {"mix_tokens": 999}, {"exclude": ("pad",)}, {"dtype": "float16"}]
    changes += [{}, {"hooks": HOOKS[:1]}]
    assert len({stream(**change).fingerprint for change in changes}) == 7


def test_what_cannot_be_is_refused_at_the_call(stream, texts):
    with pytest.raises(ValueError, match="name one with hook="):
        stream().batches(10)
    with pytest.raises(HookPointError, match=r"closest: blocks.1.hook_resid_post"):
        stream(hooks=HOOKS[1:]).batches(10, "resid_post.0")
    for wrong in ({"batch_size": 0}, {"batch_size": 5, "epochs": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            stream().batches(**wrong, hook=HOOKS[0])
    with pytest.raises(MissingError):
        stream("text:/nowhere/at/all.txt")
    with pytest.raises(TypeError, match="dataset is a Tensor"):
        stream(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="buffer_rows"):
        stream(buffer_rows=0)
    with pytest.raises(ValueError, match="no rows"):
        list(stream([""] * 5).batches(4, HOOKS[0]))


def test_progress_counts_the_rows(stream, capsys):
    list(stream(progress=True).batches(64, HOOKS[0], epochs=1))
    assert "stream:" in capsys.readouterr().err


@pytest.mark.shared
def test_real_text_resumes_bit_for_bit_on_the_bundled_model(shared_data):
    source = f"text:{shared_data / 'text' / 'tinystories' / 'valid_v1_head.txt'}"
    options = {"ctx": 64, "buffer_rows": 4096, "mix_tokens": 20_000}
    make = lambda: stream_acts("tiny", source, "resid_post.2", **options).batches(512, seed=1)  # noqa: E731
    batches = make()
    some(batches, 12)
    again = make()
    again.restore(through_json(batches.state()))
    assert equal(some(again, 12), some(batches, 12))

"""A harvest stores the model's own values for the right tokens, and refuses what is another one."""

import copy
import errno
import json

import pytest
import torch
from small_store import HOOKS, SETTINGS, content, make_texts

from interp.acts.capture import capture_acts
from interp.acts.rows import NonFiniteError
from interp.model.loading import load_model
from interp.store import harvest as harvest_module
from interp.store.harvest import estimate
from interp.store.ledger import StoreError
from interp.store.reader import open_store

BLOCKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


def windows_by_hand(model, texts, ctx):
    """Return [(ids, documents)] of joined windows, a token at a time."""
    stream = [(i, d) for d, t in enumerate(texts) for i in [*(int(w[1:]) for w in t.split()), 2]]
    room = ctx - 1
    return [stream[i : i + room] for i in range(0, len(stream), room)]


def test_rows_are_the_models_values_at_every_kept_token_of_the_joined_windows(harvest, model, texts, tmp_path):
    store = harvest(tmp_path / "s")
    rows, ids, documents, positions = [], [], [], []
    for window in windows_by_hand(model, texts, SETTINGS["ctx"]):
        given = torch.tensor([[1, *(i for i, _ in window)]])
        with torch.no_grad():
            hidden = model.hf.model(given, output_hidden_states=True).hidden_states[1][0]
        for column, (token, document) in enumerate(window, 1):
            if token > 2:
                rows.append(hidden[column])
                ids.append(token), documents.append(document), positions.append(column)
    assert store.token_ids[:].tolist() == ids and store.documents[:].tolist() == documents
    assert store.positions[:].tolist() == positions
    assert (store["resid_post.0"][:] - torch.stack(rows)).abs().max() < 1e-6
    assert store.hooks == BLOCKS and len(store.shards) > 4


def test_several_hook_points_come_from_one_pass(harvest, model, texts, tmp_path, monkeypatch):
    both = harvest(tmp_path / "both")
    calls = []
    run = model.run
    monkeypatch.setattr(model, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    again = harvest(tmp_path / "again")
    assert len(calls) == -(-again.n_sequences // SETTINGS["batch_size"])
    for hook in HOOKS:
        single = harvest(tmp_path / hook, hooks=[hook])
        assert torch.equal(single[hook][:], both[hook][:])


@pytest.mark.parametrize("packing", ["documents", "masked"])
def test_documents_that_do_not_see_each_other_equal_each_alone(harvest, model, texts, tmp_path, packing):
    store = harvest(tmp_path / "s", packing=packing, ctx=32)
    alone = capture_acts(model, [f"{t} </s>" if t else "" for t in texts], HOOKS)
    kept = [d for d, t in enumerate(texts) if len(t.split()) <= 30]
    cut = 0
    for document in kept:
        mine = store["resid_post.1"][store.where(document)]
        want = alone["resid_post.1"][alone.documents == document]
        if packing == "masked" and store.positions[store.where(document)].tolist() != list(range(1, len(want) + 1)):
            cut += 1  # its window ended within it, so that its end has less to look back on
            continue
        assert mine.shape == want.shape and (len(mine) == 0 or (mine - want).abs().max() < 1e-5)
    assert cut < len(kept) / 2


@pytest.mark.parametrize("wanted", [1, 15, 16, 100, 333])
def test_the_harvest_ends_at_exactly_the_rows_asked_for(harvest, reference, tmp_path, wanted):
    store = harvest(tmp_path / "s", tokens=wanted)
    whole = open_store(reference)
    assert len(store) == wanted
    assert store.token_ids[:].tolist() == whole.token_ids[:wanted].tolist()
    # the batch that the last window shares has other rows in it, hence another rounding
    assert (store["resid_post.1"][:] - whole["resid_post.1"][:wanted]).abs().max() < 1e-6


def test_a_text_that_ends_early_is_told(harvest, tmp_path):
    said = []
    store = harvest(tmp_path / "s", tokens=10**6, say=said.append)
    assert any("fewer than the 1,000,000" in line for line in said) and store.complete


def test_outliers_are_left_out_by_the_median_of_their_batch(model, texts, tmp_path, harvest):
    hf = copy.deepcopy(model.hf)
    hf.get_input_embeddings().weight.data[9] *= 1000
    loud = load_model(hf, tokenizer=model.tokenizer)
    whole = harvest(tmp_path / "all", model=loud, hooks=["embed"])
    clean = harvest(tmp_path / "clean", model=loud, hooks=["embed"], exclude=("pad", "bos", "special", "outlier"))
    ids = whole.token_ids[:]
    assert (ids == 9).sum() > 3
    assert torch.equal(clean.token_ids[:], ids[ids != 9])
    assert torch.equal(clean["embed"][:], whole["embed"][:][ids != 9])
    assert clean.describe()["outliers_removed"] == int((ids == 9).sum())
    spans = [(s.rows, (s.token_ids[s.token_ids > 2] != 9).sum()) for s in clean.sequences(text=False)]
    assert all(len(rows) == count for rows, count in spans)


def test_statistics_are_those_of_all_rows(harvest, tmp_path):
    store = harvest(tmp_path / "s", covariance=True)
    for hook in HOOKS:
        rows, stats = store[hook][:].double(), store.stats(hook)
        assert stats.rows == len(rows)
        assert torch.allclose(stats.mean, rows.mean(0), atol=1e-12)
        assert stats.covariance is not None and torch.allclose(stats.covariance, rows.T.cov(), atol=1e-9)
        assert stats.median_norm == pytest.approx(float(rows.norm(dim=1).quantile(0.5)), rel=1e-6)
        assert torch.allclose(store.norms(hook)[:].double(), rows.norm(dim=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_store_may_be_of_another_type(harvest, reference, tmp_path, dtype):
    store = harvest(tmp_path / "s", dtype=dtype)
    want = open_store(reference)["resid_post.1"][:].to(getattr(torch, dtype))
    assert store.dtype == want.dtype and torch.equal(store["resid_post.1"][:], want)


def test_a_value_too_large_for_float16_is_refused_with_its_place(model, texts, harvest, tmp_path):
    hf = copy.deepcopy(model.hf)
    hf.get_input_embeddings().weight.data[9] = 1e6
    loud = load_model(hf, tokenizer=model.tokenizer)
    document = next(d for d, t in enumerate(texts) if "w9" in t.split())
    with pytest.raises(NonFiniteError, match=rf"hook_embed.* document {document}, position \d+ .*float16"):
        harvest(tmp_path / "s", model=loud, hooks=["embed"], dtype="float16")
    assert len(harvest(tmp_path / "t", model=loud, hooks=["embed"])) > 0  # float32 holds it


def test_the_same_command_again_does_nothing_and_says_so(harvest, tmp_path):
    root = tmp_path / "s"
    harvest(root)
    before, said = content(root), []
    harvest(root, say=said.append)
    assert content(root) == before and said == [f"{root} is complete already"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "float16"}, 'dtype is "float32" there and "float16" here'),
        ({"ctx": 8}, "ctx is 16 there and 8 here"),
        ({"hooks": ["resid_post.0"]}, "hooks is"),
        ({"exclude": ("pad",)}, "exclude is"),
        ({"tokens": 50}, "tokens is null there and 50 here"),
        ({"texts": make_texts(seed=4)}, "was made from another text"),
        ({"texts": make_texts(n=50)}, "was made from another text"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_setting_or_text_is_refused_and_named(harvest, model, tmp_path, change, says, finished, monkeypatch):
    root = tmp_path / "s"
    if finished:
        harvest(root)
    else:
        interrupted(harvest, root, model, monkeypatch, after=3)
    before = content(root)
    change = dict(change)
    source = {"source": change.pop("texts")} if "texts" in change else {}
    if not finished and source:
        says = "another text"
    with pytest.raises(StoreError, match=says):
        harvest(root, **change, **source)
    assert {n: b for n, b in content(root).items() if n in before} == before


def test_another_model_is_refused(harvest, model, tmp_path):
    harvest(tmp_path / "s")
    hf = copy.deepcopy(model.hf)
    hf.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(StoreError, match=r"model\.fingerprint is"):
        harvest(tmp_path / "s", model=load_model(hf, tokenizer=model.tokenizer))


def interrupted(harvest, root, model, monkeypatch, after):
    """Start a harvest that Ctrl-C ends at the forward after so many."""
    run, calls = model.run, []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return run(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "run", stop)
        harvest(root)


def test_an_interrupted_harvest_goes_on_where_it_was(harvest, model, reference, tmp_path, monkeypatch):
    root = tmp_path / "s"
    interrupted(harvest, root, model, monkeypatch, after=5)
    half = open_store(root)
    assert not half.complete and 0 < len(half) < len(open_store(reference))
    assert torch.equal(half["resid_post.1"][:], open_store(reference)["resid_post.1"][: len(half)])
    run, calls = model.run, []
    monkeypatch.setattr(model, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    harvest(root)
    assert content(root) == content(reference)
    batches = -(-open_store(root).n_sequences // SETTINGS["batch_size"])
    assert len(calls) == batches - len(half.shards) * half.settings["batches_per_shard"]  # finished ones stay


def test_a_batch_that_ran_out_of_memory_is_tried_again_the_same(harvest, model, reference, tmp_path, monkeypatch):
    run, failed = model.run, []

    def tight(ids, mask, **options):
        if len(failed) < 1:
            failed.append(ids.shape)
            raise RuntimeError("CUDA out of memory")
        return run(ids, mask, **options)

    monkeypatch.setattr(model, "run", tight)
    harvest(tmp_path / "s")
    assert content(tmp_path / "s") == content(reference) and failed == [(4, 16)]
    monkeypatch.setattr(model, "run", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(MemoryError, match=r"a batch of 4 x 16 tokens .* smaller --batch-size"):
        harvest(tmp_path / "t")


def test_token_ids_need_no_tokenizer(model, tmp_path, harvest):
    bare = load_model(model.hf)
    store = harvest(tmp_path / "s", model=bare, source=[[5, 6, 7], [8, 9]], hooks=["resid_post.1"])
    assert store.token_ids[:].tolist() == [5, 6, 7, 8, 9] and store.documents[:].tolist() == [0, 0, 0, 1, 1]
    assert store.tokenizer is None and next(store.sequences()).text is None


def test_a_bridge_gives_the_store_that_the_native_model_gives(model, harvest, reference, tmp_path):
    bridged = load_model(model.hf, tokenizer=model.tokenizer, backend="transformer_lens")
    store, native = harvest(tmp_path / "s", model=bridged), open_store(reference)
    assert torch.equal(store.token_ids[:], native.token_ids[:])
    assert (store["resid_post.1"][:] - native["resid_post.1"][:]).abs().max() < 1e-5
    assert "transformer-lens" in store.settings["machine"]
    with pytest.raises(StoreError, match=r'model\.backend is "transformer_lens" there'):
        harvest(tmp_path / "s")


def test_an_encoder_reads_each_document_alone(tmp_path, harvest):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder = load_model(BertModel(BertConfig(vocab_size=97, max_position_embeddings=32, **sizes)).eval())
    rows = [[5, 6, 7, 8], [9], [10, 11, 12]]
    store = harvest(tmp_path / "s", model=encoder, source=rows, exclude=("pad",))
    assert store.settings["packing"] == "documents" and store.n_sequences == 3
    for document, row in enumerate(rows):
        with torch.no_grad():
            want = encoder.hf(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0]
        assert (store["resid_post.1"][store.where(document)] - want).abs().max() < 1e-5


def test_a_dry_run_tells_what_comes_and_writes_nothing(model, texts, harvest, tmp_path):
    before = sorted(tmp_path.iterdir())
    told = estimate(model, texts, HOOKS, **SETTINGS)
    assert sorted(tmp_path.iterdir()) == before
    store = harvest(tmp_path / "s")
    assert told["rows"] == len(store) and told["sequences"] == store.n_sequences
    assert told["shards"] == len(store.shards) and told["seconds"] > 0
    held = sum(p.stat().st_size for p in (tmp_path / "s").rglob("*.safetensors"))
    assert held / 2 < told["bytes"] < held


def test_a_folder_that_is_something_else_is_left_alone(harvest, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds 'notes\.txt' and no store"):
        harvest(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        harvest(tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"dtype": "int8"}, "float32, float16, bfloat16"),
        ({"ctx": 64}, "takes at most 32"),
        ({"ctx": 0}, "above 0"),
        ({"batch_size": 0}, "above 0"),
        ({"tokens": -1}, "above 0"),
        ({"packing": "tight"}, "joined, masked, documents"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"source": "file.txt"}, "no known kind"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(harvest, tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        harvest(tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()


def test_a_text_without_rows_is_refused(harvest, tmp_path):
    for number, source in enumerate(([], ["", ""])):
        with pytest.raises(ValueError, match="gives no rows"):
            harvest(tmp_path / str(number), source=source)


def test_a_disk_that_is_too_small_is_told_before_the_work(harvest, tmp_path):
    with pytest.raises(OSError, match=r"needs about .* GB more") as found:
        harvest(tmp_path / "s", tokens=10**13)
    assert found.value.errno == errno.ENOSPC and not (tmp_path / "s").exists()


def test_the_log_says_how_long_and_how_fast(harvest, tmp_path):
    harvest(tmp_path / "s")
    log = json.loads((tmp_path / "s" / "run.json").read_text())
    assert log["rows"] == len(open_store(tmp_path / "s")) and 0 < log["seconds_tokenisation"] < log["seconds"]
    assert harvest_module.DEFAULTS["exclude"][-1] == "outlier"  # the documented default of data for autoencoders

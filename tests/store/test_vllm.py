"""Hidden states that vLLM wrote become a store like any other."""

import pytest
import torch
from safetensors.torch import save_file
from small_store import content

from interp.store.reader import open_store
from interp.store.verify import verify
from interp.store.vllm import store_vllm
from sae.extras import MissingError
from sae.io import FormatError

HOOKS = ["blocks.3.hook_resid_post", "blocks.7.hook_resid_post"]


@pytest.fixture
def requests(tmp_path):
    folder, made = tmp_path / "requests", []
    folder.mkdir()
    for i, n in enumerate([5, 1, 9, 0, 30, 2]):
        states = torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16)
        ids = torch.cat([torch.ones(min(n, 1), dtype=torch.long), torch.arange(4, 4 + max(0, n - 1))])
        save_file({"hidden_states": states, "token_ids": ids}, folder / f"req-{i}.safetensors")
        made.append((ids, states))
    return folder, made


def test_each_request_is_a_document_of_the_store(requests, model, tmp_path):
    folder, made = requests
    store = store_vllm(folder, HOOKS, out=tmp_path / "s", model="org/name", tokenizer=model.tokenizer, shard_mb=0.0005)
    assert store.complete and store.hooks == HOOKS and store.dtype == torch.bfloat16 and len(store.shards) > 1
    for number, (ids, states) in enumerate(made):
        kept = ids != 1
        found = store.where(number)
        assert store.token_ids[found].tolist() == ids[kept].tolist()
        assert store.positions[found].tolist() == kept.nonzero().squeeze(1).tolist()
        for layer, hook in enumerate(HOOKS):
            assert torch.equal(store[hook][found], states[kept][:, layer])
    assert verify(tmp_path / "s").sound
    store_vllm(folder, HOOKS, out=tmp_path / "t", model="org/name", tokenizer=model.tokenizer, shard_mb=0.0005)
    assert content(tmp_path / "s") == content(tmp_path / "t")
    assert next(iter(open_store(tmp_path / "s").batches(4, HOOKS[0]))).shape == (4, 8)


def test_files_of_another_kind_are_told(requests, tmp_path):
    folder, _ = requests
    with pytest.raises(FormatError, match=r"wanted \[tokens, 3 layers, hidden\]"):
        store_vllm(folder, ["a", "b", "c"], out=tmp_path / "s", model="m")
    with pytest.raises(MissingError, match=r"no \.safetensors file"):
        store_vllm(tmp_path, HOOKS, out=tmp_path / "s", model="m")
    save_file({"x": torch.zeros(2)}, folder / "a.safetensors")
    with pytest.raises(FormatError, match="a request has hidden_states and token_ids"):
        store_vllm(folder, HOOKS, out=tmp_path / "s", model="m")
    assert not (tmp_path / "s").exists()


def test_nan_is_refused(requests, tmp_path):
    folder, _ = requests
    bad = {"hidden_states": torch.full((3, 2, 8), torch.nan), "token_ids": torch.tensor([4, 5, 6])}
    save_file(bad, folder / "z.safetensors")
    with pytest.raises(FormatError, match="nan or infinity"):
        store_vllm(folder, HOOKS, out=tmp_path / "s", model="m", dtype="float32")

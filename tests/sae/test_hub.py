"""The hub, played by a folder: what is asked for, what is not there, and what is published."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

import sae
from sae.extras import MissingError
from sae.formats import hub, load_sae, save_sae

GOLDEN = Path(__file__).parent / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def x() -> sae.SAE:
    return sae.build("topk", d_in=6, d_sae=12, k=2, seed=4, metadata={"hook_name": "blocks.0.hook_resid_post"})


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[tuple]:
    """Play the hub: org/repo is a folder below; return what is asked for."""
    calls = []

    def download(repo_id, filename, *, revision=None):
        calls.append((repo_id, filename, revision))
        if not (tmp_path / "hub" / repo_id).is_dir():
            raise errors.RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        path = tmp_path / "hub" / repo_id / filename
        if not path.is_file():
            raise errors.EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


def test_an_id_loads_what_a_folder_would_at_the_revision_that_is_asked_for(tmp_path, x, asked):
    save_sae(x, tmp_path / "hub" / "ann" / "saes" / "layer_3" / "k2")
    acts = torch.randn(5, 6)
    for path, inner in (("ann/saes/layer_3/k2", None), ("hf:ann/saes", "layer_3/k2"), ("ann/saes/layer_3", "k2")):
        back = load_sae(path, subfolder=inner, revision=COMMIT)
        assert back.config == x.config and torch.equal(back(acts).recon, x(acts).recon)
    assert {call[2] for call in asked} == {COMMIT}
    assert {call[1] for call in asked} == {"layer_3/k2/cfg.json", "layer_3/k2/sae_weights.safetensors"}


@pytest.mark.parametrize("name", ["saelens/standard+scaled", "sparsify/topk", "dictionary_learning/BatchTopKSAE"])
def test_the_files_of_every_format_are_asked_for_by_name(tmp_path, name, asked):
    folder = tmp_path / "hub" / "ann" / "saes" / "a"
    folder.mkdir(parents=True)
    for path in (GOLDEN / name).iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    acts = torch.randn(5, 16)
    assert torch.equal(load_sae("ann/saes", sae_id="a")(acts).recon, load_sae(GOLDEN / name)(acts).recon)
    assert not any("*" in call[1] for call in asked)


def test_published_layouts_load_by_their_id(tmp_path, asked):
    for name, path in (
        ("gemma_scope", "google/gemma-scope-2b-pt-res/layer_3/width_4k/average_l0_10"),
        ("gemma_scope_2+affine", "google/gemma-scope-2-1b-pt/transcoder/layer_3_width_16k_l0_small_affine"),
        ("llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L3R-8x"),
        ("qwen_scope", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_4/layer3.sae.pt"),
    ):
        (tmp_path / "hub").unlink(missing_ok=True)
        (tmp_path / "hub").symlink_to(GOLDEN / "saelens" / name)
        local = GOLDEN / "saelens" / name / path
        acts = torch.randn(5, 16)
        assert torch.equal(load_sae(path)(acts).recon, load_sae(local)(acts).recon), name


def test_what_is_not_on_the_hub_is_missing_and_says_so(tmp_path, x, asked, monkeypatch):
    save_sae(x, tmp_path / "hub" / "ann" / "saes" / "a")
    with pytest.raises(MissingError, match="no such repository"):
        load_sae("bob/saes")
    with pytest.raises(MissingError, match="Name the folder"):
        load_sae("ann/saes")
    with pytest.raises(MissingError, match=r"no file a/ae\.pt"):
        load_sae("ann/saes/a/ae.pt")
    asked.clear()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="no file or folder hub/nothing"):
        load_sae("hub/nothing")  # "hub" is a folder here: a mistyped path is not looked up elsewhere
    with pytest.raises(MissingError, match="no file or folder"):
        load_sae(Path("ann/saes/a"))
    assert not asked


def test_offline_the_cache_alone_is_looked_at_after_one_attempt(monkeypatch):
    attempts = []

    def offline(*_, local_files_only=False, **__):
        attempts.append(local_files_only)
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(MissingError, match="only its local cache"):
        load_sae("ann/saes")
    assert attempts[0] is False and all(attempts[1:]) and len(attempts) > 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ann/saes", {"revision": "../main"}),
        ("ann/saes", {"revision": "a b"}),
        ("ann/saes", {"subfolder": "../../etc"}),
        ("ann/saes", {"subfolder": "/etc"}),
    ],
)
def test_a_name_that_leads_elsewhere_asks_the_hub_nothing(name, options, asked):
    with pytest.raises(ValueError, match=r"no hub id|no revision"):
        load_sae(name, **options)
    assert not asked


@pytest.mark.parametrize("name", ["http://x/y", "ann", "../ann/saes", "ann//saes", "ann/saes/../b", "-a/b", "a/b\0"])
def test_what_is_no_id_is_no_id(name):
    assert not hub.is_hub_id(name)


class Api:
    """Records what would be published, and keeps the files."""

    def __init__(self):
        self.calls, self.files = [], {}

    def create_repo(self, **options):
        self.calls.append(("create_repo", options))
        return f"https://huggingface.co/{options['repo_id']}"

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload_folder", options))
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


def test_a_push_publishes_the_sae_and_its_card_privately(tmp_path, x, world):
    run = sae.fit(
        world.sample(4000, seed=3)[0], arch="batchtopk", width=48, k=3, steps=20, batch_size=128, out=tmp_path
    )
    for told in (run, tmp_path):
        api = Api()
        assert sae.formats.push_to_hub(run.sae, "ann/mine", run=told, api=api) == "https://huggingface.co/ann/mine"
        assert [call[0] for call in api.calls] == ["create_repo", "upload_folder"]
        assert api.calls[0][1]["private"] is True
        assert sorted(api.files) == ["README.md", "cfg.json", "sae_weights.safetensors"]
        card = api.files["README.md"].decode()
        assert card.startswith("---\nlibrary_name: interp\n") and 'sae.load_sae("ann/mine")' in card
        assert "| fve |" in card and "mean number of latents other than 0 a token" in card
    folder = tmp_path / "back"
    folder.mkdir()
    for name, data in api.files.items():
        (folder / name).write_bytes(data)
    acts = torch.randn(5, 24)
    assert torch.equal(load_sae(folder)(acts).recon, run.sae(acts).recon)


def test_a_card_tells_what_is_known_and_no_more(x):
    card = hub.model_card(x, "ann/mine")
    assert "blocks.0.hook_resid_post, 6 wide" in card and "## Metrics" not in card and "None" not in card
    assert json.loads(json.dumps(card)) == card


def test_nothing_that_looks_like_a_token_is_published():
    x = sae.build("relu", d_in=4, d_sae=8, k=2, metadata={"note": "hf_" + "a" * 30})
    api = Api()
    with pytest.raises(ValueError, match="access token"):
        hub.push_to_hub(x, "ann/mine", api=api)
    with pytest.raises(ValueError, match="user/name"):
        hub.push_to_hub(x, "mine", api=api)
    assert not api.calls

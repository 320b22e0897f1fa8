"""The Hugging Face hub: the few files that hold an SAE are fetched by name; a folder is pushed with a model card."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sae.archs.base import SAE
from sae.extras import MissingError
from sae.formats.files import SUFFIXES
from sae.io import FormatError, atomic_write, read_json

__all__ = ["fetch", "is_hub_id", "model_card", "push_to_hub"]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(rf"(?:hf:)?({_PART}/{_PART})((?:/[A-Za-z0-9_][A-Za-z0-9._=+ -]*)*)/?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_SECRET = re.compile(r"(?:hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{16,}")


def is_hub_id(name: str) -> bool:
    """Return whether a text could be org/repo, or org/repo/sub/folder, rather than a path on this machine."""
    return _ID.fullmatch(name) is not None and ".." not in name


def fetch(
    name: str, wanted: Iterable[tuple[str, ...]], *, revision: str | None = None, inner: str | None = None
) -> Path:
    """Return the folder of the local cache (or the file) that holds an SAE of the hub.

    Files are asked for by name, never by pattern: each of `wanted` lists what one format needs, a name that ends in "?"
    may be absent, and the first list that is there wins. Where the id ends in the name of a file of weights, only that
    file, and a config.json beside it, are fetched. Offline, what is in the cache is found. Raises MissingError where
    repository, revision or files are not there, ValueError for something that is no id.
    """
    found = _ID.fullmatch(name)
    if found is None or ".." in name or (inner is not None and not is_hub_id(f"a/b/{inner}")):
        raise ValueError(f"{name!r} with subfolder {inner!r} is no hub id; write org/repo or org/repo/sub/folder")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ValueError(f"{revision!r} is no revision; give a commit of 40 hex digits, a branch or a tag")
    place = "/".join(part.strip("/") for part in (found[2], inner or "") if part.strip("/"))
    hub = _Hub(found[1], revision)
    if place.endswith(SUFFIXES):
        folder = place.rpartition("/")[0]
        hub.get(f"{folder}/config.json".lstrip("/"))
        file = hub.get(place)
        if file is None:
            raise MissingError(f"{hub} has no file {place}{hub.offline}")
        return file
    tried = []
    for names in wanted:
        files = hub.all(names, place)
        if files is not None:
            return files
        tried.append(names[0])
    raise MissingError(
        f"{hub} has no SAE in {place or 'its top folder'}{hub.offline}: none of {', '.join(dict.fromkeys(tried))} with "
        "what belongs to it. Name the folder or the file of weights: org/repo/folder, org/repo/folder/file.pt"
    )


class _Hub:
    def __init__(self, repository: str, revision: str | None) -> None:
        self.repository, self.revision, self.offline = repository, revision, ""
        self.known: dict[str, Path | None] = {}
        import huggingface_hub
        from huggingface_hub import errors

        self.hub, self.errors = huggingface_hub, errors

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository} at {self.revision}"

    def all(self, names: tuple[str, ...], place: str) -> Path | None:
        """Return the folder with all of these files, None where one that is needed is absent."""
        folder = None
        for name in names:
            inside = f"{place}/{name.removesuffix('?')}".lstrip("/")
            file = self.get(inside)
            if file is None and not name.endswith("?"):
                return None
            if folder is None and file is not None:
                folder = file.parents[name.count("/")]
        return folder

    def get(self, name: str) -> Path | None:
        """Return a file of the repository in the local cache, None where it has no such file."""
        if name not in self.known:
            self.known[name] = self._get(name)
        return self.known[name]

    def _get(self, name: str) -> Path | None:
        errors = self.errors
        known = {"local_files_only": True} if self.offline else {}  # one vain attempt to connect is enough
        try:
            return Path(self.hub.hf_hub_download(self.repository, name, revision=self.revision, **known))
        except errors.LocalEntryNotFoundError:
            self.offline = (
                " (no such folder is here and the hub was not reached, so only its local cache was looked at)"
            )
            return None
        except errors.EntryNotFoundError:
            return None
        except errors.RevisionNotFoundError as error:
            raise MissingError(f"the hub's {self.repository} has no revision {self.revision}") from error
        except errors.GatedRepoError as error:
            raise MissingError(f"{self} is open to those alone who accepted its terms: do so, and log in") from error
        except errors.RepositoryNotFoundError as error:
            raise MissingError(
                f"there is no folder {self.repository} on this machine and no such repository on the hub (or it is "
                "private: log in)"
            ) from error
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            raise MissingError(f"{self}: {name} could not be fetched: {str(error)[:200]}") from error


def push_to_hub(
    sae: SAE, repo_id: str, *, run: Any = None, private: bool = True, message: str | None = None, api: Any = None
) -> str:
    """Publish an SAE on the hub with a model card, and return its address.

    Nothing else in this project publishes anything: this call is the confirmation. The repository is made where there
    is none, private unless told otherwise; cfg.json, sae_weights.safetensors and README.md are written to it. `run` is
    what sae.fit returned, or its folder: its configuration and metrics go into the card. `api` replaces
    huggingface_hub.HfApi(). Raises ValueError for no repository id, and where a text would publish what looks like an
    access token.
    """
    from sae.formats import native

    if not re.fullmatch(rf"{_PART}/{_PART}", repo_id):
        raise ValueError(f"{repo_id!r} is no repository; write user/name")
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        native.save(sae, folder)
        card = model_card(sae, repo_id, run=run)
        atomic_write(Path(folder) / "README.md", card.encode())
        for name in ("README.md", "cfg.json"):
            leak = _SECRET.search((Path(folder) / name).read_text(encoding="utf-8"))
            if leak:
                raise ValueError(
                    f"{name} holds {leak[0][:6]}..., which looks like an access token: nothing is published"
                )
        address = api.create_repo(repo_id=repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message or f"Add a {sae.config.arch} SAE",
            allow_patterns=["README.md", "cfg.json", "sae_weights.safetensors"],
        )
    return str(address)


def model_card(sae: SAE, repo_id: str, *, run: Any = None) -> str:
    """Return the README.md of a published SAE: what it is, what it was trained on, its metrics, how to load it."""
    config, told = sae.config, _told(run)
    metadata = config.metadata
    front = ["---", "library_name: interp", "tags: [sparse-autoencoder, interpretability]"]
    if isinstance(metadata.get("model_name"), str) and is_hub_id(metadata["model_name"]):
        front.append(f"base_model: {json.dumps(metadata['model_name'])}")
    facts = {
        "architecture": config.arch,
        "reads": f"{metadata.get('hook_name', 'unknown')}, {config.d_in} wide",
        "predicts": f"{metadata.get('hook_name_out', 'unknown')}, {config.d_out} wide" if config.transcoder else None,
        "model": metadata.get("model_name"),
        "latents": f"{config.d_sae:,}",
        "active latents a token, as asked for": config.k,
        "sites": config.n_sites if config.n_sites > 1 else None,
        "nested widths": ", ".join(map(str, config.levels)) or None,
        "skip connection": "yes" if config.skip else None,
        "each token standardised first": "yes" if config.input_norm == "layer_norm" else None,
    }
    lines = [*front, "---", "", f"# {repo_id.partition('/')[2]}", "", *_table(("", ""), _shown(facts)), ""]
    lines += ["## Load", "", "```python", "import sae", "", f'x = sae.load_sae("{repo_id}")']
    lines += ["out = x(acts)  # acts: [tok, d_in]; out.recon, out.latents", "```", ""]
    from sae.formats.saelens import architecture

    if architecture(sae)[1]:
        lines += ["SAELens reads it too: `SAE.from_pretrained` or `SAE.load_from_disk` on the folder.", ""]
    if told.get("result"):
        from sae.evaluation import DEFINITIONS

        rows = [(name, _number(value), DEFINITIONS.get(name, "")) for name, value in told["result"].items()]
        lines += ["## Metrics", "", *_table(("metric", "value", "definition"), rows), ""]
    for title, part in (("Trained on", told.get("data")), ("Training", told.get("train"))):
        if isinstance(part, Mapping) and part:
            lines += [f"## {title}", "", *_table(("", ""), _shown(part)), ""]
    return "\n".join(lines)


def _told(run: Any) -> dict[str, Any]:
    """Return what a run or its folder tells: result, data, train."""
    if run is None:
        return {}
    if isinstance(run, (str, os.PathLike)):
        table = read_json(Path(run) / "run.json")
        if not isinstance(table, dict):
            raise FormatError(f"{Path(run) / 'run.json'} does not describe a run")
        return table
    return dict(run.config) | {"result": run.result}


def _shown(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _number(value)) for name, value in facts.items() if value is not None]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

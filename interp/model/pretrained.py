"""Weights and tokenizers from the package, a folder or the hub; and a TransformerBridge around a model of our own."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.model.anatomy import kept_rng
from sae.extras import MissingError

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device meant: "auto" is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype given by object or name ("float32", "bfloat16"); None and "auto" are the checkpoint's own."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; it must be a floating point type such as 'float32' or 'bfloat16'")
    return found


def locate(source: str) -> str:
    """Return the folder or hub id that `source` names; raises MissingError for a folder that is not there or empty."""
    if source == "tiny":
        if not (TINY / "config.json").is_file():
            raise MissingError("the bundled model is not in this installation; reinstall with: pip install interp")
        return str(TINY)
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingError(f"{source} holds no config.json; give a folder that save_pretrained wrote")
        return str(path)
    if path.is_file():
        raise MissingError(f"{source} is a file; give the folder it lies in")
    if source.startswith((".", "/", "~")) or source.count("/") != source.strip("/").count("/") or source.count("/") > 1:
        raise MissingError(f"there is no folder {source}")
    return source


def load(source: str, dtype: Any, device: Any, trust_remote_code: bool) -> tuple[Any, str]:
    """Return the causal language model at `source` in evaluation mode, and the folder or hub id it came from."""
    wanted = resolve_dtype(dtype)
    target = resolve_device(device)
    name = locate(source)
    if source == "tiny" and wanted is None:
        wanted = torch.float32
    from transformers import AutoModelForCausalLM

    try:
        hf: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=wanted or "auto", trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise _missing(name, error) from error
    return hf.to(target).eval(), name


def _missing(name: str, error: Exception) -> Exception:
    """Return the error to raise for what could not be loaded from a folder or the hub."""
    if isinstance(error, MissingError):
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).is_dir():
        return MissingError(f"{name} cannot be loaded: {reason}")
    return MissingError(
        f"no folder {name!r} here, and the hub gave no such model ({reason}); "
        f"where there is a network, fetch it with: hf download {name}"
    )


def load_tokenizer(source: Any, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder or hub id, None for a folder without one; a tokenizer object as it is."""
    if not isinstance(source, (str, Path)):
        return source
    name = locate(str(source)) if str(source) == "tiny" else str(source)
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / f).is_file() for f in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise _missing(name, error) from error


def check_placement(hf: Any, dtype: Any, device: Any) -> None:
    """Raise ValueError where dtype or device are asked for that a model in memory does not have."""
    weight = next(hf.parameters())
    wanted = resolve_dtype(dtype)
    if wanted is not None and wanted != weight.dtype:
        raise ValueError(f"the model is {weight.dtype}; one in memory is never changed: convert it with .to({wanted})")
    if device != "auto" and torch.device(device).type != weight.device.type:
        raise ValueError(f"the model is on {weight.device}; one in memory is never moved: use .to({str(device)!r})")


def make_bridge(hf: nn.Module, tokenizer: Any, label: str) -> Any:
    """Return a TransformerBridge around `hf`, which it changes: give it a model that is nobody else's."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    config: Any = hf.config
    config.architectures = [type(hf).__name__]  # absent on models made from a config; TL chooses its adapter by it
    weight = next(hf.parameters())
    with tempfile.TemporaryDirectory() as folder:
        # TL reloads the tokenizer by its path with BOS switched on, so it needs one on disk
        (placeholder_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
        reloaded = AutoTokenizer.from_pretrained(folder)
        with kept_rng(weight.device):
            return TransformerBridge.boot_transformers(
                label, hf_model=hf, tokenizer=reloaded, dtype=weight.dtype, device=str(weight.device)
            )


def placeholder_tokenizer() -> Any:
    """Return a tokenizer of three tokens, for a bridge around a model that has none."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<pad>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )

"""Weights and tokenizers from the package, a folder or the hub; and a TransformerBridge around a model of our own."""

import importlib
import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.model.forward import kept_rng
from sae.extras import MissingError

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"
BRIDGES = "transformer-lens>=4.3,<5"
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


def load(source: str, dtype: Any, device: Any, trust_remote_code: bool, device_map: Any = None) -> tuple[Any, str]:
    """Return the language model at `source` in evaluation mode, and the folder or hub id it came from."""
    wanted = resolve_dtype(dtype)
    if device_map is not None and device != "auto":
        raise ValueError(f"device is {str(device)!r} and device_map {device_map!r}; give one of them")
    target = resolve_device(device)
    name = locate(source)
    if source == "tiny" and wanted is None:
        wanted = torch.float32
    options: dict[str, Any] = {"dtype": wanted or "auto", "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    try:
        hf: Any = _auto_class(name, trust_remote_code).from_pretrained(name, **options)
    except OSError as error:
        raise _missing(name, error) from error
    placed = device_map is not None or getattr(hf, "hf_device_map", None) or getattr(hf, "is_quantized", False)
    return (hf if placed else hf.to(target)).eval(), name


def _auto_class(name: str, trust_remote_code: bool) -> Any:
    """Return the class that loads a checkpoint: its own by config.architectures, else the first auto class that can.

    A causal language model goes through AutoModelForCausalLM, whatever was saved with it.
    """
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    named = (getattr(config, "architectures", None) or [""])[0]
    causal, own = transformers.AutoModelForCausalLM, getattr(transformers, named, None)
    if trust_remote_code and getattr(config, "auto_map", None):
        return causal if "AutoModelForCausalLM" in config.auto_map else transformers.AutoModel
    kinds = (causal, transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForMaskedLM)
    heads = [kind for kind in kinds if type(config) in kind._model_mapping]
    if own is not None and not any(_maps_to(kind, config, named) for kind in kinds):
        return own  # without a head (BertModel), or with one of another kind
    for kind in heads:
        if not named or _maps_to(kind, config, named):
            return kind
    return heads[0] if heads else transformers.AutoModel


def _maps_to(kind: Any, config: Any, class_name: str) -> bool:
    """Whether an auto class gives the class of this name for a configuration."""
    if type(config) not in kind._model_mapping:
        return False
    found = kind._model_mapping[type(config)]
    return class_name in [c.__name__ for c in (found if isinstance(found, tuple) else (found,))]


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


def need_bridges() -> Any:
    """Return the TransformerBridge class; raises MissingError where no TransformerLens that interp knows is there."""
    advice = f"install it with: pip install '{BRIDGES}' (everything but backend='transformer_lens' works without)"
    try:
        version = importlib.metadata.version("transformer-lens")
        found: Any = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingError(f"TransformerLens is not installed; {advice}") from error
    except (ImportError, AttributeError) as error:
        raise MissingError(f"this TransformerLens has no TransformerBridge ({error}); {advice}") from error
    major, minor = (int(part) for part in version.split(".")[:2])
    if not (4, 3) <= (major, minor) < (5, 0):
        raise MissingError(f"TransformerLens {version} is not one that interp knows; {advice}")
    return found


def make_bridge(hf: nn.Module, tokenizer: Any, label: str) -> Any:
    """Return a TransformerBridge around `hf`, which it changes: give it a model that is nobody else's."""
    bridge = need_bridges()
    from transformers import AutoTokenizer

    config: Any = hf.config
    config.architectures = [type(hf).__name__]  # absent on models made from a config; TL chooses its adapter by it
    weight = next(hf.parameters())
    with tempfile.TemporaryDirectory() as folder:
        # TL reloads the tokenizer by its path with BOS switched on, so it needs one on disk
        (placeholder_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
        reloaded = AutoTokenizer.from_pretrained(folder)
        with kept_rng(weight.device):
            return bridge.boot_transformers(
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

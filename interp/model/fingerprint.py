"""A short name for a model's class, configuration and weights."""

import hashlib
import json
import math
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 131_072  # values a tensor that the fingerprint looks at
_UNHASHED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "auto_map"}


def fingerprint(hf: nn.Module) -> str:
    """Return the digest behind Model.fingerprint.

    Weights that accelerate keeps elsewhere (offloaded to the CPU or the disk) are read from there, so that a model has
    one name wherever it lies. Raises ValueError for weights on the meta device that nothing holds.
    """
    config: dict[str, Any] = hf.config.to_dict()  # type: ignore[union-attr, operator]
    kept = {k: v for k, v in config.items() if k not in _UNHASHED}
    digest = hashlib.sha256(f"{type(hf).__name__} {json.dumps(kept, sort_keys=True, default=str)}".encode())
    for name, held in sorted(hf.state_dict().items()):
        value = offloaded(hf, name) if held.is_meta else held
        flat = value.detach().reshape(-1)
        step = max(1, math.ceil(flat.numel() / SAMPLE))
        while step > 1 and math.gcd(step, value.shape[-1]) > 1:  # else some columns would never be looked at
            step += 1
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(flat[::step].to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def offloaded(hf: nn.Module, name: str) -> Tensor:
    """Return a weight from where accelerate's hook on its module (or on one around it) holds it.

    Raises ValueError where nothing does.
    """
    owner, rest = name.rpartition(".")[0], name.rpartition(".")[2]
    while True:
        hook: Any = getattr(hf.get_submodule(owner), "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            held = getattr(one, "weights_map", None)
            if held is not None and rest in held:
                return held[rest]
        if not owner:
            raise ValueError(f"{name} is on the meta device and nothing holds its values; load weights")
        owner, _, inner = owner.rpartition(".")
        rest = f"{inner}.{rest}"

"""Times one peer's steered generate beside plain generate of the same model, in the peer's own environment.

Run by steering.py; prints one JSON line: the walls of each contender, or the error that it ends with.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any


def repeng(hf: Any, vectors: dict[int, Any]) -> Callable[[], Any]:
    """Return generate with repeng's control on the layers of `vectors`; the model is wrapped for good."""
    from repeng import ControlModel, ControlVector

    model = ControlModel(hf, list(vectors))
    arrays = {layer: v.numpy() for layer, v in vectors.items()}
    model.set_control(ControlVector(model_type="llama", directions=arrays), 1.0)
    return model.generate


def steering_vectors(hf: Any, vectors: dict[int, Any]) -> Callable[[], Any]:
    """Return generate with the hooks of steering-vectors on the layers of `vectors`."""
    from steering_vectors import SteeringVector

    SteeringVector(dict(vectors)).patch_activations(hf)
    return hf.generate


PEERS = {"repeng": repeng, "steering_vectors": steering_vectors}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return versions and walls."""
    import numpy
    import torch
    import transformers
    from timing import interleaved
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(2)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": numpy.__version__}
    size = json.loads(args.size)
    models = []
    for _ in range(3):
        torch.manual_seed(0)
        models.append(LlamaForCausalLM(LlamaConfig(**size["config"])).eval())
    draw = torch.Generator().manual_seed(1)
    n = size["config"]["num_hidden_layers"]
    vectors = {i: torch.randn(size["config"]["hidden_size"], generator=draw) for i in range(n)}
    ids = torch.randint(3, size["config"]["vocab_size"], (size["batch"], size["prompt"]), generator=draw)
    options = {
        "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0,
        "max_new_tokens": size["new"], "min_new_tokens": size["new"],
    }  # fmt: skip
    one = PEERS[args.peer](models[1], {n // 2: vectors[n // 2]})
    every = PEERS[args.peer](models[2], vectors)
    with torch.no_grad():
        plain = models[0].generate(ids, **options)
        if torch.equal(every(input_ids=ids, **options), plain):
            raise RuntimeError("steering all layers changes no token")
        times = interleaved(
            {
                "plain": lambda: models[0].generate(input_ids=ids, **options),
                "one layer": lambda: one(input_ids=ids, **options),
                "all layers": lambda: every(input_ids=ids, **options),
            },
            size["pairs"],
        )
    return {"versions": versions, "walls": {name: found["walls"] for name, found in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("size", help="JSON: config, batch, prompt, new, pairs")
    parser.add_argument("--site", help="a site-packages that goes before the environment's own")
    args = parser.parse_args()
    if args.site:
        sys.path.insert(0, args.site)
    try:
        found = measure(args)
    except Exception as error:  # what it ends with is the result
        last = traceback.extract_tb(error.__traceback__)[-1]
        found = {
            "error": f"{type(error).__name__}: {error}",
            "at": f"{last.name} in {last.filename.rsplit('/', 1)[-1]}",
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

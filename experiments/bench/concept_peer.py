"""Runs inside a peer's environment (concept_peers.sh): what its package makes of the same input.

erase FOLDER       concept-erasure on in.safetensors (x, z) with options.json; writes out.safetensors
read-gguf FILE     the gguf package's reading of a control vector, as JSON
write-gguf FILE    a control vector by the gguf package: direction.1 and direction.3 of width 6
"""

import json
import sys
from pathlib import Path


def erase(folder: Path) -> None:
    from concept_erasure import LeaceEraser, OracleEraser  # type: ignore[import-not-found]
    from safetensors.torch import load_file, save_file

    for case in sorted(folder.iterdir()):
        given, options = load_file(case / "in.safetensors"), json.loads((case / "options.json").read_text())
        x, z = given["x"], given["z"]
        leace, oracle = LeaceEraser.fit(x, z, **options), OracleEraser.fit(x, z)
        out = {"leace": leace(x), "taken": leace.proj_left @ leace.proj_right, "oracle": oracle(x, z)}
        save_file({k: v.contiguous() for k, v in out.items()}, case / "out.safetensors")


def read_gguf(path: Path) -> None:
    import gguf  # type: ignore[import-not-found]

    reader = gguf.GGUFReader(path)
    fields = {}
    for name, held in reader.fields.items():
        if name.startswith(("general.", "controlvector.")):
            fields[name] = held.contents()
    tensors = {t.name: {"shape": t.shape.tolist(), "values": t.data.tolist()} for t in reader.tensors}
    print(json.dumps({"fields": fields, "tensors": tensors}))


def write_gguf(path: Path) -> None:
    import gguf  # type: ignore[import-not-found]
    import numpy as np

    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 2)
    writer.add_array("controlvector.explained_variance", [0.5, 0.25])
    for layer in (1, 3):
        writer.add_tensor(f"direction.{layer}", (np.arange(6, dtype=np.float32) - 2) * layer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    {"erase": erase, "read-gguf": read_gguf, "write-gguf": write_gguf}[sys.argv[1]](Path(sys.argv[2]))

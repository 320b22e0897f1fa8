"""Files that are damaged or mean harm: one typed error, no code run, no memory asked for."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae.extras import MissingError
from sae.formats import FORMATS, load_sae
from sae.formats.files import load_state
from sae.io import FormatError

GOLDEN = Path(__file__).parent / "golden"
SOURCES = {
    "saelens": "saelens/jumprelu",
    "sparsify": "sparsify/transcode+skip",
    "dictionary_learning": "dictionary_learning/MatryoshkaBatchTopKSAE",
    "gated": "dictionary_learning/GatedAutoEncoder",
    "gemma_scope": "saelens/gemma_scope/google/gemma-scope-2b-pt-res/layer_3/width_4k/average_l0_10",
    "openmoss": "saelens/llama_scope_r1/fnlp/Llama-Scope-R1-Distill/400M/L3R",
    "scaled": "saelens/standard+scaled",
}


def files_of(source: str) -> list[Path]:
    return sorted(p for p in (GOLDEN / SOURCES[source]).iterdir() if p.is_file() and p.name != "expected")


def loads_or_tells(folder: Path) -> bool:
    """Return whether a folder loads; any error but the two typed ones fails the test."""
    try:
        load_sae(folder)
    except (FormatError, MissingError):
        return False
    return True


@pytest.mark.parametrize("source", SOURCES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_flipped_or_cut_off_give_an_sae_or_a_format_error(tmp_path, source, data):
    files = files_of(source)
    harmed = data.draw(st.sampled_from(files))
    for path in files:
        raw = bytearray(path.read_bytes())
        if path == harmed:
            # the structure is at both ends of these files; the middle is numbers
            near = st.integers(0, min(len(raw), 600) - 1)
            for at in data.draw(st.lists(near, min_size=1, max_size=4)):
                at = at if data.draw(st.booleans()) else len(raw) - 1 - at
                raw[at] ^= data.draw(st.integers(1, 255))
            raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.integers(0, 3)) == 0 else raw
        (tmp_path / path.name).write_bytes(bytes(raw))
    loads_or_tells(tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_cut_off_anywhere_is_never_an_sae(tmp_path, source):
    files = files_of(source)
    weights = max(files, key=lambda p: p.stat().st_size)
    for path in files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = weights.read_bytes()
    assert loads_or_tells(tmp_path)
    for size in [*range(0, len(raw), 997), len(raw) - 1]:
        (tmp_path / weights.name).write_bytes(raw[:size])
        assert not loads_or_tells(tmp_path), size


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("source", ["saelens", "sparsify", "dictionary_learning", "openmoss", "scaled"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_a_configuration_gives_an_sae_or_a_format_error(tmp_path, source, data):
    for path in files_of(source):
        raw = path.read_bytes()
        if path.suffix == ".json":
            table = json.loads(raw)
            inner = table if not data.draw(st.booleans()) else table.get("metadata", table.get("trainer", table))
            key = data.draw(st.sampled_from(sorted(inner)))
            inner[key] = data.draw(json_values)
            raw = json.dumps(table).encode()
        (tmp_path / path.name).write_bytes(raw)
    loads_or_tells(tmp_path)


class Call:
    """A pickle that calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def archive(path: Path, data: bytes, more: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        for name, value in (more or {}).items():
            file.writestr(name, value)
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "function", [os.system, os.mkdir, eval, __import__, getattr, torch.load, torch.hub.load], ids=str
)
def test_a_pickle_that_calls_something_runs_nothing(tmp_path, function, protocol):
    canary = tmp_path / "canary"
    argument = f"touch {canary}" if function is os.system else str(canary)
    data = pickle.dumps({"W_enc": Call(function, argument)}, protocol=protocol)
    for path in (archive(tmp_path / "a.pt", data), tmp_path / "b.pt"):
        if path.name == "b.pt":
            path.write_bytes(data)
        reason = "which no table of tensors needs" if path.name == "a.pt" else "wrote no zip"
        with pytest.raises(FormatError, match=reason):
            load_sae(path, format="plain", arch="relu")
    assert not canary.exists()


def test_a_torch_file_that_is_more_than_a_table_of_tensors_is_refused(tmp_path):
    good = tmp_path / "good.pt"
    torch.save({"a": torch.zeros(3), "k": 2, "cfg": {"lr": 0.1, "name": "x", "dtype": torch.float32}}, good)
    assert load_state(good)["k"] == 2
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({1: torch.zeros(3)}, tmp_path / "number.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"a": torch.zeros(3)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(2, 2).to_sparse()}, tmp_path / "sparse.pt")
    raw = good.read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw)) as source:
        parts = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, value in parts.items():
            file.writestr(name, value)
    archive(tmp_path / "script.pt", parts["good/data.pkl"], {"archive/constants.pkl": b"", "archive/code/a.py": b""})
    for name in ("tensor", "number", "module", "legacy", "sparse", "packed", "script"):
        with pytest.raises(FormatError):
            load_state(tmp_path / f"{name}.pt")


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    torch.save({"W_enc": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "wide.pt")  # a terabyte in a few bytes
    with pytest.raises(FormatError, match="more numbers than the file holds"):
        load_state(tmp_path / "wide.pt")


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_numbers_that_are_none_are_refused_and_huge_ones_are_not(tmp_path, suffix):
    def saved(value: float) -> Path:
        held = {"W_enc": torch.ones(4, 8), "W_dec": torch.ones(8, 4), "b_enc": torch.zeros(8), "b_dec": torch.zeros(4)}
        held["W_dec"][:] = 3e38 if value == 3e38 else 1.0  # finite, though their sum is not
        held["W_dec"][2, 3] = value
        path = tmp_path / f"a{suffix}"
        if suffix == ".npz":
            np.savez(path, **{name: v.numpy() for name, v in held.items()})
        elif suffix == ".pt":
            torch.save(held, path)
        else:
            save_file(held, path)
        return path

    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(FormatError, match="nan or infinity"):
            load_sae(saved(value), arch="relu")
    assert float(load_sae(saved(3e38), arch="relu").W_dec.detach()[2, 3]) == pytest.approx(3e38)


def npy(shape, dtype="<f4", data: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + (data if data is not None else bytes(int(np.prod(shape)) * 4))


@pytest.mark.parametrize(
    "members",
    [
        {"W_enc.npy": npy((2**40,), data=b"")},  # asks for 4 TiB
        {"W_enc.npy": npy((4,), data=bytes(12))},
        {"W_enc.npy": npy((4,), dtype="|O", data=bytes(32))},
        {"W_enc.npy": npy((4,), dtype=[("a", "<f4")])},
        {"W_enc.npy": npy((-4,), data=b"")},
        {"W_enc.txt": b"1 2 3"},
        {"W_enc.npy": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535},
        {f"a{i}.npy": npy((0,)) for i in range(5000)},
    ],
    ids=range(8),
)
def test_arrays_that_lie_about_themselves_are_refused(tmp_path, members):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    with pytest.raises(FormatError):
        load_state(tmp_path / "params.npz")


def test_a_bomb_and_a_pickle_in_an_npz_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("W_enc.npy", npy((10,), data=bytes(2**24)))
    np.savez(tmp_path / "object.npz", a=np.array([Call(os.system, "false")], dtype=object))
    for name in ("bomb", "object"):
        with pytest.raises(FormatError):
            load_state(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("kind", ["fifo", "folder as file", "loop", "long name", "nul"])
def test_a_path_that_is_no_file_is_told(tmp_path, kind):
    path: object = tmp_path / "a"
    if kind == "fifo":
        os.mkfifo(tmp_path / "ae.pt")
        path = tmp_path
    if kind == "folder as file":
        (tmp_path / "cfg.json").mkdir()
        path = tmp_path
    if kind == "loop":
        (tmp_path / "a").symlink_to(tmp_path / "a")
    if kind == "long name":
        path = tmp_path / ("a" * 5000)
    if kind == "nul":
        path = f"{tmp_path}/a\0b"
    with pytest.raises((FormatError, MissingError)):
        load_sae(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_format_claims_an_empty_folder_or_breaks_on_it(tmp_path, name):
    assert not FORMATS[name].detect(tmp_path)
    assert not FORMATS[name].detect(tmp_path / "absent.pt")
    with pytest.raises((FormatError, MissingError)):
        load_sae(tmp_path, format=name)

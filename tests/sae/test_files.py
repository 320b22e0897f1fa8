"""Atomic writes, and readers that give FormatError and nothing else."""

import json
import os
import struct

import numpy as np
import pytest
import torch

from sae.data import load_array
from sae.extras import MissingError, require
from sae.io import FormatError, atomic_write, load_tensors, read_json, save_tensors, write_json


def test_tensors_and_metadata_come_back_bit_for_bit(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).t(),  # not contiguous
        "folder/b.c": torch.arange(5),
        "half": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 3),
    }
    tensors["alias"] = tensors["a"]
    meta = {"name": "Zürich \u2028", "list": [1, 2.5, None, True], "deep": {"x": {}}}
    save_tensors(tmp_path / "x.safetensors", tensors, meta)
    back, meta_back = load_tensors(tmp_path / "x.safetensors")
    assert meta_back == meta and set(back) == set(tensors)
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    for name in ("fsync", "replace"):

        def full(*_args, **_kwargs):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                write_json(path, {"new": 2})
        assert read_json(path) == {"old": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    write_json(path, {"new": 2})
    assert read_json(path) == {"new": 2}


def test_a_written_file_has_the_umask_s_mode_and_a_link_stays_a_link(tmp_path):
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "real", b"1")
        (tmp_path / "link").symlink_to("real")
        atomic_write(tmp_path / "link", b"2")
    finally:
        os.umask(old)
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"2"


def test_what_json_cannot_hold_is_refused_before_the_old_file_is_touched(tmp_path):
    write_json(tmp_path / "x.json", [1])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", [float("nan")])
    assert read_json(tmp_path / "x.json") == [1]


def file_with(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: list, end: int = 4, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


HOSTILE = {
    "nothing": b"",
    "half a length": b"\x01\x02",
    "a header beyond the file": file_with(b"{}", length=10**6),
    "a header beyond all limits": file_with(b"{}", length=2**63),
    "no JSON": file_with(b"\x80\x04pickle"),
    "bad UTF-8": file_with(b'{"\xff": 1}'),
    "a list": file_with(b"[]"),
    "a key twice": file_with(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', b"0000"),
    "a path as name": file_with(json.dumps({"../../etc/passwd": entry([1])}).encode(), b"0000"),
    "no shape": file_with(json.dumps({"a": {"dtype": "F32", "data_offsets": [0, 4]}}).encode(), b"0000"),
    "a shape of words": file_with(json.dumps({"a": entry(["1"])}).encode(), b"0000"),
    "a negative shape": file_with(json.dumps({"a": entry([-1])}).encode(), b"0000"),
    "an endless empty shape": file_with(json.dumps({"a": entry([2**40, 0], 0)}).encode()),
    "nine dimensions": file_with(json.dumps({"a": entry([1] * 9)}).encode(), b"0000"),
    "a hole": file_with(json.dumps({"a": entry([1])}).encode(), b"00000000"),
    "too little data": file_with(json.dumps({"a": entry([4], 16)}).encode(), b"0000"),
    "a wrong type": file_with(json.dumps({"a": entry([1], dtype="F33")}).encode(), b"0000"),
    "nan": file_with(json.dumps({"a": entry([1])}).encode(), struct.pack("<f", float("nan"))),
    "infinity": file_with(json.dumps({"a": entry([1])}).encode(), struct.pack("<f", float("inf"))),
    "5,000 tensors": file_with(json.dumps({f"t{i}": entry([0], 0) for i in range(5000)}).encode()),
    "depth": file_with(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a long number": file_with(b'{"a":' + b"9" * 5000 + b"}"),
    "metadata of another kind": file_with(b'{"__metadata__":{"json":5}}'),
    "metadata that is no table": file_with(b'{"__metadata__":[]}'),
    "metadata that is no JSON": file_with(b'{"__metadata__":{"json":"{"}}'),
    "metadata that is a list": file_with(b'{"__metadata__":{"json":"[]"}}'),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_safetensors_file_gives_a_format_error(tmp_path, kind):
    (tmp_path / "x.safetensors").write_bytes(HOSTILE[kind])
    with pytest.raises(FormatError, match=r"x\.safetensors"):
        load_tensors(tmp_path / "x.safetensors")


def test_no_mutation_of_a_sound_file_gives_another_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.randn(3, 2), "b": torch.arange(4)}, {"k": 1})
    sound = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(generator.integers(1, 4)):
            data[generator.integers(len(data))] = generator.integers(256)
        cut = generator.integers(len(data)) if generator.random() < 0.3 else len(data)
        path.write_bytes(bytes(data[:cut]))
        try:
            load_tensors(path)
        except FormatError:
            refused += 1
    assert 100 < refused < 300  # a changed weight is a sound file


def test_a_folder_a_pipe_and_a_file_over_the_limit_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big").write_bytes(b"0" * 100)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FormatError, match="not a regular file"):
            load_tensors(path)
    with pytest.raises(FormatError, match="at most 99"):
        load_tensors(tmp_path / "big", max_bytes=99)


def test_what_is_not_there_is_missing_not_malformed(tmp_path):
    for read in (load_tensors, read_json, load_array):
        with pytest.raises(MissingError, match="there is no file"):
            read(tmp_path / "no.npy")
    with pytest.raises(MissingError, match=r"pip install 'interp\[maps\]'"):
        require("no_such_module_at_all", "maps")
    assert require("json", "maps") is json


@pytest.mark.parametrize("text", ['{"a":1,"a":2}', "[NaN]", "[Infinity]", "{", "[" * 10**5, "9" * 5000, "\udcff"])
def test_malformed_json_gives_a_format_error(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_arrays_are_read_from_every_kind_of_file(tmp_path):
    rows = torch.randn(6, 3)
    np.save(tmp_path / "x.npy", rows.numpy())
    save_tensors(tmp_path / "x.safetensors", {"acts": rows, "ids": torch.arange(6)}, {})
    for source in (rows, rows.numpy(), tmp_path / "x.npy", str(tmp_path / "x.safetensors")):
        assert torch.equal(load_array(source), rows)


def test_a_file_that_holds_no_activations_is_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "junk.npy").write_bytes(b"\x93NUMPY\x01\x00junk")
    save_tensors(tmp_path / "two.safetensors", {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, {})
    for name in ("objects.npy", "junk.npy", "two.safetensors"):
        with pytest.raises(FormatError, match=name):
            load_array(tmp_path / name)
    bad = {"shape": torch.ones(3), "int64": torch.ones(3, 3).long(), "nan": torch.full((3, 3), torch.nan)}
    for words, rows in bad.items():
        with pytest.raises(ValueError, match=words):
            load_array(rows)
    with pytest.raises(ValueError, match="neither"):
        load_array(tmp_path / "x.pt")

import json
import os
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from interp.acts.direction import Direction, DirectionError, direction_from, residual_norm
from interp.concepts.reading.files import load_directions, open_direction, open_directions, save_directions, save_gguf
from interp.concepts.reading.gguf import read_gguf
from interp.concepts.steering.context import steer
from interp.concepts.steering.operations import add
from sae.extras import MissingError
from sae.io import FormatError, load_tensors, save_tensors

BENCH = Path(__file__).parents[2] / "experiments" / "bench"
PEER = BENCH / ".venvs" / "gguf" / "bin" / "python"
POST = "blocks.{}.hook_resid_post"


def some(layer, d=32, seed=0, model=None):
    vector = torch.randn(d, generator=torch.Generator().manual_seed(seed + layer)) * (1 + layer)
    return direction_from(vector, hook=POST.format(layer), model=model, method="by hand")


def raw(direction):
    return direction.vector * direction.scale


def gguf_bytes(tensors, fields=(), *, version=3, n_tensors=None, n_fields=None, kind=0, align=32):
    """Write a gguf file as its specification says, wrongly where asked."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("controlvector"), *fields]
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack(
        "<QQ", len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_fields is None else n_fields
    )
    head += b"".join(pairs)
    offset, blobs = 0, []
    for name, values in tensors:
        head += text(name) + struct.pack("<IQIQ", 1, len(values), kind, offset)
        blob = np.asarray(values, dtype={0: "<f4", 1: "<f2", 28: "<f8"}.get(kind, "<f4")).tobytes()
        blobs.append(blob + b"\0" * (-len(blob) % align))
        offset += len(blobs[-1])
    return head + b"\0" * (-len(head) % align) + b"".join(blobs)


def test_a_set_of_directions_comes_back_bit_for_bit_with_its_past(tmp_path, llama):
    several = [some(layer, model=llama) for layer in range(3)]
    save_directions(tmp_path / "set.safetensors", several)
    back = load_directions(tmp_path / "set.safetensors", llama)
    assert list(back) == [POST.format(layer) for layer in range(3)]
    for d in several:
        assert torch.equal(back[d.hook].vector, d.vector) and back[d.hook].meta() == d.meta()
    named = {"mood": several[0], "tense": several[0]}
    save_directions(tmp_path / "named.safetensors", named)
    assert set(load_directions(tmp_path / "named.safetensors")) == {"mood", "tense"}
    with pytest.raises(ValueError, match="one each"):
        save_directions(tmp_path / "x.safetensors", [several[0], several[0]])
    with pytest.raises(ValueError, match="at least one"):
        save_directions(tmp_path / "x.safetensors", [])


def test_a_set_is_refused_by_another_model_unless_forced(tmp_path, llama, build):
    save_directions(tmp_path / "set.safetensors", [some(layer, model=llama) for layer in (0, 1)])
    other = build("llama", seed=4)
    with pytest.raises(DirectionError, match="force=True"):
        open_directions(tmp_path / "set.safetensors", other)
    forced = open_directions(tmp_path / "set.safetensors", other, force=True)
    assert {d.forced_from for d in forced.values()} == {llama.fingerprint}
    one = open_direction(tmp_path / "set.safetensors", llama, hook="resid_post.1")
    assert one.hook == POST.format(1) and one.model == llama.fingerprint
    with pytest.raises(DirectionError, match="none at"):
        open_direction(tmp_path / "set.safetensors", llama, hook="resid_post.2", force=True)


def test_a_single_direction_of_a_file_is_opened_and_moved_only_by_force(tmp_path, llama):
    d = some(1, model=llama)
    d.save(tmp_path / "one.safetensors")
    assert torch.equal(open_direction(tmp_path / "one.safetensors", llama).vector, d.vector)
    assert set(load_directions(tmp_path / "one.safetensors")) == {d.hook}
    for options in ({"model": llama}, {}):
        with pytest.raises(DirectionError, match=r"not at blocks\.0"):
            open_direction(tmp_path / "one.safetensors", hook="resid_post.0", **options)
    moved = open_direction(tmp_path / "one.safetensors", llama, hook="resid_post.0", force=True)
    assert moved.hook == POST.format(0) and moved.norm == residual_norm(llama, "resid_post.0")


@pytest.mark.parametrize(
    "change",
    [{"kind": "else"}, {"entries": []}, {"entries": [3]}, {"entries": [{"name": 4}]}, {"entries": "x"}],
)
def test_a_malformed_set_is_a_format_error(tmp_path, change):
    save_directions(tmp_path / "set.safetensors", [some(0)])
    tensors, meta = load_tensors(tmp_path / "set.safetensors")
    save_tensors(tmp_path / "bad.safetensors", tensors, meta | change)
    with pytest.raises(FormatError):
        load_directions(tmp_path / "bad.safetensors")
    save_tensors(tmp_path / "bad.safetensors", {"vector.1": tensors["vector.0"]}, meta)
    with pytest.raises(FormatError):
        load_directions(tmp_path / "bad.safetensors")


def test_gguf_is_written_and_read_back_with_its_lengths(tmp_path):
    several = [some(layer) for layer in (1, 2, 5)]
    save_gguf(tmp_path / "v.gguf", several, model_hint="llama")
    back = open_directions(tmp_path / "v.gguf")
    assert list(back) == [POST.format(layer) for layer in (1, 2, 5)]
    for d in several:
        torch.testing.assert_close(raw(back[d.hook]), raw(d), rtol=1e-6, atol=0)
        assert back[d.hook].model == "" and back[d.hook].norm is None and "llama" in back[d.hook].method
    save_gguf(tmp_path / "again.gguf", back, model_hint="llama")
    first, second = read_gguf(tmp_path / "v.gguf")[0], read_gguf(tmp_path / "again.gguf")[0]
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


@pytest.mark.parametrize("number", [1, 2])
def test_direction_n_of_gguf_is_what_llama_cpp_adds_after_the_block_of_index_n(tmp_path, build, number):
    from interp.model.loading import load_model

    hf, values = build("llama"), torch.randn(32, generator=torch.Generator().manual_seed(3)) * 5
    (tmp_path / "v.gguf").write_bytes(gguf_bytes([(f"direction.{number}", values.tolist())]))
    buffer = torch.zeros(2, 32)  # llama.cpp's buffer starts at layer 1
    buffer[number - 1] = values

    def after_block(index):
        return lambda module, args, out: out + buffer[index - 1]

    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    handles = [hf.model.layers[i].register_forward_hook(after_block(i)) for i in (1, 2)]
    expected = hf(ids).logits
    for handle in handles:
        handle.remove()
    model = load_model(hf)
    d = open_direction(tmp_path / "v.gguf", model, force=True)
    assert d.hook == POST.format(number) and d.norm is not None
    with steer(model, add(d, d.scale / d.norm, positions="all")):
        steered = hf(ids).logits
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(hf(ids).logits, expected, atol=1e-2)
    save_gguf(tmp_path / "out.gguf", [d], strength=d.scale / d.norm)
    torch.testing.assert_close(read_gguf(tmp_path / "out.gguf")[0][number], values, rtol=1e-5, atol=1e-5)


def test_what_a_control_vector_cannot_hold_is_refused(tmp_path):
    pre = direction_from(torch.ones(8), hook="resid_pre.2", model=None, method="")
    for several, why in (
        ([some(0)], "blocks 1, 2"),
        ([pre], "resid_post"),
        ([some(1), some(1)], "two"),
        ([], "0 were"),
    ):
        with pytest.raises(ValueError, match=why):
            save_gguf(tmp_path / "v.gguf", several)
    with pytest.raises(ValueError, match="one width"):
        save_gguf(tmp_path / "v.gguf", [some(1), some(2, d=16)])
    with pytest.raises(DirectionError, match="unit"):
        save_gguf(tmp_path / "v.gguf", [some(1)], strength=1.0)


@pytest.mark.parametrize("kind", [0, 1, 28])
def test_float_types_and_both_versions_are_read(tmp_path, kind):
    values = [0.5, -2.0, 3.0]
    for version in (2, 3):
        (tmp_path / "v.gguf").write_bytes(gguf_bytes([("direction.0", values)], version=version, kind=kind))
        assert read_gguf(tmp_path / "v.gguf")[0][0].tolist() == values


def pair(key, kind, data):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + data


HOSTILE = {
    "not gguf": b"GGML" + bytes(60),
    "short": b"GGUF" + bytes(10),
    "version 1": gguf_bytes([("direction.1", [1.0, 2.0])], version=1),
    "big-endian": gguf_bytes([("direction.1", [1.0, 2.0])], version=3 << 24),
    "2^60 tensors": gguf_bytes([("direction.1", [1.0, 2.0])], n_tensors=2**60),
    "2^60 pairs": gguf_bytes([("direction.1", [1.0, 2.0])], n_fields=2**60),
    "no tensors": gguf_bytes([]),
    "a long key": gguf_bytes([("direction.1", [1.0])], [struct.pack("<Q", 2**40) + b"x"]),
    "a huge array": gguf_bytes([("direction.1", [1.0])], [pair("a", 9, struct.pack("<IQ", 0, 2**50))]),
    "nested arrays": gguf_bytes([("direction.1", [1.0])], [pair("a", 9, struct.pack("<IQ", 9, 1))]),
    "an unknown type": gguf_bytes([("direction.1", [1.0])], [pair("a", 77, b"")]),
    "a key twice": gguf_bytes([("direction.1", [1.0])], [pair("a", 0, b"1"), pair("a", 0, b"1")]),
    "an odd alignment": gguf_bytes([("direction.1", [1.0])], [pair("general.alignment", 4, struct.pack("<I", 3))]),
    "quantised": gguf_bytes([("direction.1", [1.0, 2.0])], kind=2),
    "another tensor": gguf_bytes([("token_embd.weight", [1.0, 2.0])]),
    "the same layer twice": gguf_bytes([("direction.1", [1.0, 2.0]), ("direction.1", [1.0, 2.0])]),
    "several widths": gguf_bytes([("direction.1", [1.0, 2.0]), ("direction.2", [1.0, 2.0, 3.0])]),
    "zeros": gguf_bytes([("direction.1", [0.0, 0.0])]),
    "nan": gguf_bytes([("direction.1", [float("nan"), 0.0])]),
    "cut short": gguf_bytes([("direction.1", [1.0] * 64)])[:-80],
    "a model": gguf_bytes([("direction.1", [1.0, 2.0])]).replace(b"controlvector", b"llama3vectorx"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_gguf_is_a_format_error(tmp_path, name):
    (tmp_path / "v.gguf").write_bytes(HOSTILE[name])
    with pytest.raises(FormatError):
        open_directions(tmp_path / "v.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10_000), value=st.binary(min_size=1, max_size=8), cut=st.integers(0, 3))
def test_no_change_of_bytes_makes_another_error_than_a_typed_one(tmp_path, where, value, cut):
    svec = json.dumps({"model_type": "llama", "directions": {"3": [0.5, 1.0], "4": [1.5, 1.0]}}).encode()
    gguf = gguf_bytes(
        [("direction.1", [1.0, 2.0]), ("direction.2", [1.0, 2.0])], [pair("a", 9, struct.pack("<IQ", 4, 0))]
    )
    for name, data in (("gguf", gguf), ("svec", svec)):
        at = where % len(data)
        bad = data[:at] + value + data[at + len(value) :]
        (tmp_path / f"v.{name}").write_bytes(bad[: len(bad) - cut * 7])
        try:
            found = open_directions(tmp_path / f"v.{name}")
        except (FormatError, MissingError):
            continue
        assert all(isinstance(d, Direction) for d in found.values())


def test_svec_files_are_read_at_the_block_outputs_they_were_fitted_on(tmp_path):
    table = {"model_type": "mistral", "directions": {"10": [3.0, 4.0], "2": [[0.0, -2.0]]}, "explained_variances": {}}
    (tmp_path / "v.svec").write_text(json.dumps(table))
    found = open_directions(tmp_path / "v.svec")
    assert list(found) == [POST.format(2), POST.format(10)] and found[POST.format(10)].scale == 5.0
    assert raw(found[POST.format(2)]).tolist() == [0.0, -2.0] and "mistral" in found[POST.format(2)].method
    assert open_direction(tmp_path / "v.svec", hook="resid_post.10").scale == 5.0
    with pytest.raises(ValueError, match=r"2 directions.*hook_resid_post, blocks\.10"):
        open_direction(tmp_path / "v.svec")


@pytest.mark.parametrize(
    "text",
    [
        "{}", '{"directions": {}}', '{"directions": {"x": [1, 2]}}', '{"directions": {"1": [1, "a"]}}',
        '{"directions": {"1": [true, false]}}', '{"directions": {"1": [NaN, 1]}}', '{"directions": {"1": [1e999, 1]}}',
        '{"directions": {"1": [0, 0]}}', '{"directions": {"1": [[1, 2], [3, 4]]}}',
        '{"directions": {"1": ' + "[" * 9000,
        '{"directions": {"1": [1, 2], "1": [1, 2]}}', '{"directions": {"1": [1' + "0" * 400 + ", 2]}}",
    ],
)  # fmt: skip
def test_a_hostile_svec_is_a_format_error(tmp_path, text):
    (tmp_path / "v.svec").write_text(text)
    with pytest.raises(FormatError):
        open_directions(tmp_path / "v.svec")


@pytest.mark.parametrize(
    "table",
    [
        {3: torch.tensor([3.0, 4.0]), 7: torch.tensor([1.0, 0.0])},
        {"3": torch.tensor([3.0, 4.0]), "7": torch.tensor([1.0, 0.0])},
        {"layer_3": torch.tensor([[3.0, 4.0]]), "layer_7": torch.tensor([[1.0, 0.0]])},
        {"directions": {"vec_layer_3": torch.tensor([3.0, 4.0]), "vec_layer_7": torch.tensor([1.0, 0.0])}},
        {"resid_post.3": torch.tensor([3.0, 4.0]), "blocks.7.hook_resid_post": torch.tensor([1.0, 0.0])},
    ],
)
def test_tables_of_layers_in_pt_are_read(tmp_path, table):
    torch.save(table, tmp_path / "v.pt")
    found = open_directions(tmp_path / "v.pt")
    assert list(found) == [POST.format(3), POST.format(7)] and raw(found[POST.format(3)]).tolist() == pytest.approx(
        [3, 4]
    )


def test_names_of_other_hook_points_stay_theirs(tmp_path):
    save_file({"resid_pre.3": torch.ones(4), "mlp_out.1": torch.ones(4)}, tmp_path / "v.safetensors")
    assert set(open_directions(tmp_path / "v.safetensors")) == {"blocks.3.hook_resid_pre", "blocks.1.hook_mlp_out"}


def test_a_bare_vector_needs_its_hook_and_a_matrix_the_meaning_of_its_rows(tmp_path, llama):
    torch.save(torch.ones(32) * 2, tmp_path / "v.pt")
    with pytest.raises(ValueError, match="hook="):
        open_direction(tmp_path / "v.pt")
    assert open_direction(tmp_path / "v.pt", hook="resid_post.2").hook == POST.format(2)
    with pytest.raises(DirectionError, match="force=True"):
        open_direction(tmp_path / "v.pt", llama, hook="resid_post.-1")
    ours = open_direction(tmp_path / "v.pt", llama, hook="resid_post.-1", force=True)
    assert (ours.hook, ours.model) == (POST.format(2), llama.fingerprint)
    rows = torch.zeros(4, 32)
    rows[0, 0], rows[2, 1], rows[3, 2] = 1.0, 2.0, 3.0
    torch.save(rows, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="rows='blocks'"):
        open_directions(tmp_path / "m.pt")
    assert {k: d.scale for k, d in open_directions(tmp_path / "m.pt", rows="blocks").items()} == {
        POST.format(0): 1.0, POST.format(2): 2.0, POST.format(3): 3.0,
    }  # fmt: skip
    assert {k: d.scale for k, d in open_directions(tmp_path / "m.pt", rows="hidden_states").items()} == {
        "blocks.0.hook_resid_pre": 1.0, POST.format(1): 2.0, POST.format(2): 3.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="hidden_states"):
        open_directions(tmp_path / "m.pt", rows="layers")


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    "held",
    [
        Evil(), {"layer_1": Evil()}, {"layer_1": "text"}, {"weight": torch.ones(4), "bias": torch.ones(4)}, [1, 2],
        torch.ones(4, dtype=torch.long), torch.ones(2, 2, 2), torch.zeros(4), {"layer_1": torch.ones(2, 3)},
        torch.tensor([float("inf"), 1.0]), torch.tensor(3.0),
    ],
)  # fmt: skip
def test_a_hostile_pt_is_a_format_error_and_runs_nothing(tmp_path, monkeypatch, held):
    monkeypatch.chdir(tmp_path)
    torch.save(held, tmp_path / "v.pt")
    with pytest.raises(FormatError):
        open_directions(tmp_path / "v.pt", hook="resid_post.1")
    assert not (tmp_path / "pwned").exists()


def test_a_pt_is_inspected_before_torch_reads_it(tmp_path, monkeypatch):
    torch.save({1: torch.ones(4)}, tmp_path / "v.pt")
    with (
        zipfile.ZipFile(tmp_path / "v.pt") as old,
        zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(FormatError, match="compressed"):
        open_directions(tmp_path / "c.pt")


def test_a_file_is_known_by_its_bytes_not_its_name(tmp_path):
    save_gguf(tmp_path / "gguf.pt", [some(1)])
    save_directions(tmp_path / "native.gguf", [some(1)])
    torch.save({1: raw(some(1))}, tmp_path / "pt.json")
    (tmp_path / "svec.txt").write_text(json.dumps({"directions": {"1": raw(some(1)).tolist()}}))
    for path in sorted(tmp_path.iterdir()):
        found = open_direction(path)
        assert found.hook == POST.format(1)
        torch.testing.assert_close(raw(found), raw(some(1)), rtol=1e-6, atol=1e-6)
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text.txt", "empty"):
        with pytest.raises(FormatError, match="no known format"):
            open_directions(tmp_path / name)
    with pytest.raises(FormatError, match="regular"):
        open_directions(tmp_path)
    with pytest.raises(MissingError):
        open_directions(tmp_path / "none")


@pytest.mark.shared
def test_real_control_vectors_are_read(shared_data, build, tmp_path):
    folder = shared_data / "saes" / "steering_vectors_easysteer"
    files = sorted(folder.rglob("*.gguf"))
    assert len(files) >= 9
    for path in files:
        found = open_directions(path)
        assert list(found) == [POST.format(i) for i in range(28)]  # Qwen2.5-1.5B: 28 blocks of width 1,536
        assert {len(d.vector) for d in found.values()} == {1536}
        assert all(d.scale == pytest.approx(1.0, abs=1e-3) and d.norm is None for d in found.values())
    one = open_direction(files[0], hook="resid_post.14")
    with pytest.raises(DirectionError, match="width 1536"):
        one.for_model(build("llama"), hook="resid_post.1", force=True)
    save_gguf(tmp_path / "v.gguf", [d for name, d in found.items() if name != POST.format(0)])
    torch.testing.assert_close(
        read_gguf(tmp_path / "v.gguf")[0], {k: v for k, v in read_gguf(path)[0].items() if k}, rtol=1e-6, atol=1e-9
    )
    weights = next(folder.rglob("loreft/*.bin"))
    with pytest.raises(FormatError, match="no vector of one layer"):
        open_directions(weights)


@pytest.mark.parity
@pytest.mark.skipif(not PEER.exists(), reason="no environment of gguf: make it with experiments/bench/concept_peers.sh")
def test_the_gguf_package_reads_what_we_write_and_we_what_it_writes(tmp_path):
    script = [str(PEER), str(BENCH / "concept_peer.py")]
    save_gguf(tmp_path / "ours.gguf", [some(1), some(2), some(4)], model_hint="llama")
    done = subprocess.run(
        [*script, "read-gguf", str(tmp_path / "ours.gguf")], check=True, capture_output=True, timeout=120
    )
    seen = json.loads(done.stdout)
    assert (
        seen["fields"]["general.architecture"] == "controlvector" and seen["fields"]["controlvector.layer_count"] == 3
    )
    assert seen["fields"]["controlvector.model_hint"] == "llama"
    for layer in (1, 2, 4):
        tensor = seen["tensors"][f"direction.{layer}"]
        assert tensor["shape"] == [32]
        torch.testing.assert_close(torch.tensor(tensor["values"]), raw(some(layer)), rtol=1e-6, atol=1e-7)
    subprocess.run([*script, "write-gguf", str(tmp_path / "theirs.gguf")], check=True, capture_output=True, timeout=120)
    vectors, entries = read_gguf(tmp_path / "theirs.gguf")
    assert {k: v.tolist() for k, v in vectors.items()} == {1: [-2, -1, 0, 1, 2, 3], 3: [-6, -3, 0, 3, 6, 9]}
    assert entries["controlvector.explained_variance"] == [0.5, 0.25]

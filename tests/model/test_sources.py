"""Sources of text: what each file's documents are, and what is said of one that cannot be read."""

import json

import pytest

from interp.model.sources import read_source
from sae.extras import MissingError


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\nline\n<|endoftext|>\n\ntwo\n\nparts\n<|endoftext|>\n", ["one\nline", "two\n\nparts"]),
        ("one\nline\n\n\ntwo\n", ["one\nline", "two"]),
        ("alone", ["alone"]),
        ("  indented\n\n<|endoftext|>\n<|endoftext|>\nlast", ["  indented", "last"]),
    ],
)
def test_text_files_hold_documents_between_markers_or_blank_lines(tmp_path, content, documents):
    (tmp_path / "a.txt").write_text(content)
    assert list(read_source(f"text:{tmp_path / 'a.txt'}")) == documents


def test_jsonl_files_hold_one_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\n\\nparts", "label": 1}\n')
    assert list(read_source(f"jsonl:{path}")) == ["one", "two\n\nparts"]
    path.write_text(json.dumps({"text": "one"}) + '\n{"body": "two"}\n{"text": ')
    documents = read_source(f"jsonl:{path}")
    assert next(documents) == "one"
    with pytest.raises(ValueError, match=r"line 2 has no text under 'text'; it holds \['body'\]"):
        next(documents)
    path.write_text('{"body": "two"}')
    assert list(read_source(f"jsonl:{path}", field="body")) == ["two"]


def test_any_iterable_is_a_source():
    assert list(read_source(iter(["a", "b"]))) == ["a", "b"]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_missing_and_empty_files_are_told_at_once(tmp_path, kind):
    with pytest.raises(MissingError, match=r"nothing\.txt"):
        read_source(f"{kind}:{tmp_path / 'nothing.txt'}")
    (tmp_path / "empty").write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no text"):
        read_source(f"{kind}:{tmp_path / 'empty'}")
    with pytest.raises(ValueError, match="text:FILE"):
        read_source("stories.txt")


@pytest.fixture
def parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="no pyarrow: pip install 'interp[data]'")
    write_table = pytest.importorskip("pyarrow.parquet").write_table
    texts = [f"text {i}" for i in range(3000)]
    write_table(pyarrow.table({"text": texts, "n": list(range(3000))}), tmp_path / "a.parquet")
    return tmp_path / "a.parquet", texts


def test_parquet_files_hold_one_document_a_row(parquet):
    path, texts = parquet
    assert list(read_source(f"parquet:{path}")) == texts
    with pytest.raises(ValueError, match=r"has no column 'body'; it has \['text', 'n'\]"):
        read_source(f"parquet:{path}", field="body")
    with pytest.raises(ValueError, match="row 1 has no text under 'n'"):
        read_source(f"parquet:{path}", field="n")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a sound parquet file"):
        read_source(f"parquet:{path}")


def test_a_folder_is_its_files_in_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert list(read_source(f"jsonl:{tmp_path}")) == ["a", "b"]
    with pytest.raises(MissingError, match=r"no \.txt file"):
        read_source(f"text:{tmp_path}")


def test_a_hub_data_set_is_streamed(parquet):
    path, texts = parquet
    pytest.importorskip("datasets", reason="no datasets: pip install 'interp[data]'")
    documents = read_source(f"hf:{path.parent}")
    assert [next(documents) for _ in range(5)] == texts[:5]
    assert list(read_source(f"hf:{path.parent}:train")) == texts
    with pytest.raises(MissingError, match=r"split 'nope', cannot be opened"):
        read_source(f"hf:{path.parent}:nope")
    with pytest.raises(MissingError, match="no/such-data"):
        read_source("hf:no/such-data")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_files_that_are_not_text_are_told(tmp_path, kind):
    (tmp_path / "a").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_source(f"{kind}:{tmp_path / 'a'}")


def test_token_ids_are_documents_too():
    assert list(read_source([[5, 6], [7]])) == [[5, 6], [7]]

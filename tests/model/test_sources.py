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

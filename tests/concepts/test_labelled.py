import json

import numpy as np
import pytest

from interp.concepts.labelled.arrays import from_arrays
from interp.concepts.labelled.examples import contrast_pairs, make_examples, read_examples, read_pairs
from interp.concepts.labelled.token_labels import from_words, read_token_labels, token_labelled
from sae.extras import MissingError
from sae.io import FormatError

TEXTS = ["good, film", 'a "fine" one', "bad\nfilm", "ça va"]
LABELS = [1, 1, 0, 0]
GROUPS = ["a", "b", "a", "b"]


def write_csv(path, rows, separator=","):
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return path


def written(folder, kind):
    """Return a file of the four texts, with spans, in one of the formats."""
    path = folder / f"data.{kind}"
    records = [
        {"text": t, "label": y, "group": g, "start": 0, "end": 3} for t, y, g in zip(TEXTS, LABELS, GROUPS, strict=True)
    ]
    if kind in ("csv", "tsv"):
        return write_csv(path, [list(records[0]), *(list(r.values()) for r in records)], "\t" if kind == "tsv" else ",")
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(r) for r in records), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_examples_and_loses_nothing(tmp_path, kind):
    found = read_examples(written(tmp_path, kind))
    assert list(found.texts) == TEXTS and found.labels.tolist() == LABELS and found.groups == GROUPS
    assert found.spans == ((0, 3),) * 4 and not found.is_target and found.pairs is None


def test_other_column_names_names_of_labels_and_targets_are_read(tmp_path):
    rows = [["sentence", "mood", "score"], ["a", "glad", "0.5"], ["b", "sad", "-2"], ["c", "wild", "3e1"]]
    path = write_csv(tmp_path / "f.csv", rows)
    named = read_examples(path, text="sentence", label="mood", positive="glad")
    assert named.labels.tolist() == [1, 0, 0] and named.labels.dtype == np.int64
    targets = read_examples(path, text="sentence", label="score", target=True)
    assert targets.labels.tolist() == [0.5, -2.0, 30.0] and targets.is_target
    assert read_examples(path, text="sentence", label="score", group="mood", target=True).groups == [
        "glad",
        "sad",
        "wild",
    ]


@pytest.mark.parametrize("labels", [[0, 1], [0.0, 1.0], ["0", "1"], [False, True], ["False", "TRUE"], ["0.0", "1.0"]])
def test_labels_in_any_two_class_spelling_are_0_and_1(labels):
    assert make_examples(["a", "b"], labels).labels.tolist() == [0, 1]


def test_equal_texts_share_a_group_and_so_do_the_members_of_a_pair():
    assert make_examples(["a", "b", "a", "c"], [1, 0, 1, 0]).groups == [0, 1, 0, 2]
    assert make_examples(["a", "b", "c", "d"], [1, 0, 1, 0], pairs=["x", "x", "y", "y"]).groups == [0, 0, 1, 1]
    assert make_examples(["a", "b"], [1, 0], groups=["t", "t"]).groups == ["t", "t"]


def broken(folder, name, text, **options):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        read_examples(path, **options)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "options", "says"),
    [
        ("f.csv", "text,label\na,1\n ,0\n", {}, "row 2 (line 3) has no 'text'"),
        ("f.csv", "text,label\na,1\nb,\n", {}, "row 2 (line 3) has no 'label'"),
        ("f.csv", "text,lable\na,1\nb,0\n", {}, "no column 'label'; closest: 'lable'"),
        ("f.csv", "text,label\na,1\nb,0\n", {"group": "topic"}, "no column 'topic'"),
        ("f.csv", "text,label\na,1\nb,c,0\n", {}, "row 2 (line 3) has 3 cells for 2 columns"),
        ("f.csv", 'text,label\na,1\n"b,0\n', {}, "line 3 is no sound row"),
        ("f.csv", "text,text\na,1\n", {}, "each once"),
        ("f.csv", "text,label\n", {}, "holds no rows"),
        ("f.csv", "", {}, "first line of column names"),
        ("f.csv", "text,label\na,1\nb,0\na,0\n", {}, "row 3 (line 4) and"),
        ("f.csv", "text,label,start,end\nabc,1,0,4\nb,0,0,1\n", {}, "row 1 (line 2): the span 0 to 4 does not lie"),
        ("f.csv", "text,label,start,end\na c,1,1,2\nb,0,0,1\n", {}, "nothing but blanks"),
        ("f.csv", "text,label,start,end\nabc,1,0,\nb,0,0,1\n", {}, "must be whole numbers"),
        ("f.csv", "text,label\na,glad\nb,sad\n", {}, "say which is 1 with positive="),
        ("f.csv", "text,label\na,x\nb,y\nc,z\n", {}, "3 names (x, y, z; "),
        ("f.csv", "text,label\na,1\nb,high\n", {"target": True}, "row 2 (line 3): the target 'high'"),
        ("f.csv", "text,label\na,1\nb,inf\n", {"target": True}, "row 2 (line 3): the target 'inf'"),
        ("f.csv", "text,label\na,1\nb,1\n", {}, "both classes are needed"),
        ("f.csv", b"text,label\na,1\nb\xff,0\n", {}, "line 3 is not UTF-8"),
        ("f.csv", "text,label\na,1\n".encode("utf-16"), {}, "line 1 is not UTF-8"),
        ("f.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', {}, "row 2 (line 2) has no 'label'"),
        ("f.jsonl", '{"text": "a", "label": 1}\n{"text": 3, "label": 0}\n', {}, "row 2 (line 2): '3' is neither"),
        ("f.jsonl", '{"text": "a", "label": 1}\n\n{"text": \n', {}, "row 2 (line 3): malformed JSON"),
        ("f.jsonl", '{"text": "a", "label": 1}\n[1]\n', {}, "row 2 (line 2) is a list"),
        ("f.jsonl", '{"text": "\\ud800", "label": 1}\n{"text": "b", "label": 0}', {}, "half a surrogate pair"),
        ("f.json", '{"text": "a"}', {}, "must hold a list of objects"),
        ("f.parquet", "nothing", {}, "is not a sound parquet file"),
        ("f.txt", "text", {}, "of no known kind"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_with_its_row(tmp_path, name, text, options, says):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    assert says in broken(tmp_path, name, text, **options)


def test_a_positive_that_is_no_label_names_the_nearest():
    with pytest.raises(ValueError, match="closest: 'positive'"):
        make_examples(["a", "b"], ["positive", "negative"], positive="postive")


def test_a_missing_file_is_missing():
    with pytest.raises(MissingError):
        read_examples("nowhere.csv")


def test_one_text_with_other_spans_may_have_both_labels():
    found = make_examples(["king and queen"] * 2, [1, 0], spans=[(0, 4), (9, 14)])
    assert found.groups == [0, 0]


def test_contrast_pairs_stand_side_by_side_and_share_a_group_over_templates():
    found = contrast_pairs(["hot", "up"], ["cold", "down"], template=["It is {}.", "{} {{}".replace("{{}", "!")])
    assert list(found.texts[:4]) == ["It is hot.", "It is cold.", "It is up.", "It is down."]
    assert found.texts[4] == "hot !" and found.labels.tolist() == [1, 0] * 4
    assert found.pairs == [0, 0, 1, 1, 2, 2, 3, 3] and found.groups == [0, 0, 1, 1, 0, 0, 1, 1]
    by_template = contrast_pairs(["hot", "up"], ["cold", "down"], template=["a {}", "b {}"], group_by="template")
    assert by_template.groups == [0, 0, 0, 0, 1, 1, 1, 1]


def test_braces_in_texts_and_templates_are_only_characters():
    found = contrast_pairs(["{0}"], ["{x}"], template="f({}) {y}")
    assert found.texts == ("f({0}) {y}", "f({x}) {y}")


def test_pairs_become_chats_of_either_role():
    user = contrast_pairs(["hi"], ["go"], chat="user", system="Be brief.")
    assert user.texts[0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    answer = contrast_pairs(["yes"], ["no"], chat="assistant", prompts="Well?")
    assert answer.texts[1] == [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "no"}]


def test_pairs_are_read_from_a_file_with_their_groups(tmp_path):
    rows = [["positive", "negative", "group"], ["a", "b", "t1"], ["c", "d", "t2"]]
    found = read_pairs(write_csv(tmp_path / "p.csv", rows), template="so {}")
    assert found.texts == ("so a", "so b", "so c", "so d") and found.groups == ["t1", "t1", "t2", "t2"]
    with pytest.raises(ValueError, match=r"p\.csv has no column 'good'"):
        read_pairs(tmp_path / "p.csv", positive="good")
    with pytest.raises(ValueError, match=r"q\.csv row 2 \(line 3\): both members"):
        read_pairs(write_csv(tmp_path / "q.csv", [["positive", "negative"], ["a", "b"], ["c", "c"]]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template": "none"}, "exactly once"),
        ({"template": "{} {}"}, "exactly once"),
        ({"template": []}, "no pairs"),
        ({"chat": "assistant"}, "prompts belong"),
        ({"prompts": "Well?"}, "prompts belong"),
        ({"system": "Be"}, "system to a chat"),
        ({"chat": "assistant", "prompts": ["a", "b"]}, "2 prompts and 1 groups"),
        ({"group_by": "word"}, "group_by is 'word'"),
    ],
)
def test_pairs_that_cannot_be_made_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        contrast_pairs(["a"], ["b"], **options)


def test_token_labels_are_read_as_spans_and_as_words(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "Tom saw Mia", "spans": [[0, 3, 1], [8, 11, 1]]}\n{"text": "he ran", "spans": []}')
    found = read_token_labels(path)
    assert found.token_labels == ([(0, 3, 1), (8, 11, 1)], []) and found.labels.tolist() == [1, 0]
    words = from_words([["Tom", "ran"]], [[1, 0]])
    assert words.texts == ("Tom ran",) and words.token_labels == ([(0, 3, 1), (4, 7, 0)],) and words.outside is None
    path.write_text('{"words": ["Tom", "ran"], "labels": [1]}')
    with pytest.raises(ValueError, match=r"row 1 \(line 1\) has 1 labels for 2 words"):
        read_token_labels(path, words="words")


@pytest.mark.parametrize("entry", [[(0, 3, 2)], [(0, 9, 1)], [(0, 3)], [(0, 3, 1), 0], [2, 0]])
def test_token_labels_that_make_no_sense_are_refused(entry):
    with pytest.raises(ValueError, match="example 0"):
        token_labelled(["Tom ran"], [entry])


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "memory"])
def test_activations_from_anywhere_are_the_same_rows(tmp_path, kind):
    import torch

    from sae.io import save_tensors

    X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    y, groups = [0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2]
    path = tmp_path / f"acts.{kind}"
    if kind == "npy":
        np.save(path, X)
        found = from_arrays(path, y, groups)
    elif kind == "npz":
        np.savez(path, rows=X, labels=y, groups=groups)
        found = from_arrays(path)
    elif kind == "safetensors":
        save_tensors(path, {"rows": torch.from_numpy(X), "y": torch.tensor(y), "groups": torch.tensor(groups)}, {})
        found = from_arrays(str(path))
    else:
        found = from_arrays({"rows": torch.from_numpy(X).double()}, np.array(y), np.array(groups))
    assert list(found.X) == ["rows"] and np.array_equal(found.X["rows"].float().numpy(), X)
    assert found.y.tolist() == y and found.groups == groups and found.documents.tolist() == list(range(6))


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    X = np.ones((4, 2))
    with pytest.raises(ValueError, match="equally many"):
        from_arrays(X, [0, 1, 0])
    with pytest.raises(ValueError, match="no labels"):
        from_arrays(X)
    with pytest.raises(ValueError, match="nan or infinite"):
        from_arrays(X * np.nan, [0, 1, 0, 1])
    with pytest.raises(ValueError, match="row 0"):
        from_arrays(X, ["a", "b", "c", "a"])
    np.savez(tmp_path / "o.npz", rows=np.array([[object()]]), y=[0])
    with pytest.raises(FormatError, match="not a sound"):
        from_arrays(tmp_path / "o.npz")
    np.savez(tmp_path / "z.npz", rows=X, y=[0, 1, 0, 1], mean=np.ones(2))
    with pytest.raises(FormatError, match="holds mean"):
        from_arrays(tmp_path / "z.npz")
    assert from_arrays(X, [0, 1, 0, 1], pairs=["a", "a", "b", "b"]).groups == [0, 0, 1, 1]

"""Nearest neighbours against a slow twin, with ties, exclusions and refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.space.neighbors import METRICS, Space, SpaceError, UnknownItemError, nearest


def slow_neighbours(vectors, queries, k, metric, exclude):
    """One query at a time, one sort by (score, row)."""
    found = []
    for i, q in enumerate(queries):
        rows = []
        for row, x in enumerate(vectors):
            if row in exclude[i]:
                continue
            if metric == "euclidean":
                key = np.sqrt(((x - q) ** 2).sum())
            else:
                key = -(x @ q) if metric == "dot" else -(x @ q) / np.linalg.norm(x) / np.linalg.norm(q)
            rows.append((key, row))
        found.append([row for _, row in sorted(rows)[:k]])
    return np.array(found)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block", [None, 1, 7])
def test_neighbours_equal_the_slow_twin_whatever_the_block(metric, block):
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(3, 1, (60, 5)), rng.normal(3, 1, (20, 5))
    exclude = rng.integers(-1, 60, (20, 3))
    hits = nearest(vectors, queries, 6, metric=metric, exclude=torch.tensor(exclude), block=block)
    assert np.array_equal(hits.indices.numpy(), slow_neighbours(vectors, queries, 6, metric, exclude))


@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from(["dot", "euclidean"]))
@settings(max_examples=40, deadline=None)
def test_ties_go_to_the_lower_row(seed, k, metric):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(0, 2, (9, 2)).astype(float)  # so few different vectors that ties are everywhere
    queries = rng.integers(0, 2, (4, 2)).astype(float)
    hits = nearest(vectors, queries, k, metric=metric)
    assert np.array_equal(hits.indices.numpy(), slow_neighbours(vectors, queries, k, metric, [[]] * 4))


@given(st.permutations(range(12)))
@settings(max_examples=20, deadline=None)
def test_permuting_the_items_permutes_the_answers(order):
    vectors = np.random.default_rng(1).normal(size=(12, 4))
    names = [f"w{i}" for i in range(12)]
    plain = Space(vectors, names)
    mixed = Space(vectors[list(order)], [names[i] for i in order])
    for name in names[:3]:
        assert [w for w, _ in plain.nearest(name, 5)] == [w for w, _ in mixed.nearest(name, 5)]


def test_euclidean_distances_survive_a_large_common_mean():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(200, 16)).astype(np.float32) + np.float32(1000)
    hits = nearest(vectors, vectors[:50], 4, metric="euclidean")
    exact = np.sqrt(((vectors[:50, None].astype(float) - vectors[None].astype(float)) ** 2).sum(-1))
    assert np.array_equal(hits.indices.numpy(), np.argsort(exact, axis=1, kind="stable")[:, :4])
    assert np.allclose(hits.values.numpy(), np.sort(exact, axis=1)[:, :4], atol=1e-3)


def test_an_item_is_not_its_own_neighbour_but_its_vector_is():
    space = Space(np.array([[1.0, 0], [2, 0], [0, 1]]), ["a", "b", "c"])
    assert space.nearest("a", 1) == [("b", 1.0)]
    assert space.nearest(space["c"], 1) == [("c", 1.0)]
    assert space.nearest("a", 1, metric="euclidean") == [("b", 1.0)]
    assert space.nearest("a", 1, exclude=["b"]) == [("c", 0.0)]


def test_vectors_stay_raw_until_centring_is_asked_for():
    space = Space(np.array([[1.0, 5], [3, 5]]), ["a", "b"])
    assert torch.equal(space.vectors, torch.tensor([[1.0, 5], [3, 5]], dtype=torch.float64))
    assert torch.equal(space.centred().vectors, torch.tensor([[-1.0, 0], [1, 0]], dtype=torch.float64))
    assert space.subset(["b"]).items == ("b",)


def test_an_unknown_item_names_the_closest():
    space = Space(np.eye(2), ["queen", "king"])
    with pytest.raises(KeyError, match=r"has no 'quen'; closest: queen"):
        space.nearest("quen")
    with pytest.raises(UnknownItemError, match="holds, for one, 'queen'"):
        space["zzzz"]


@pytest.mark.parametrize(
    ("vectors", "items", "says"),
    [
        (np.zeros(3), ["a"], "must be a matrix"),
        (np.eye(2), ["a"], "1 items and 2 vectors"),
        (np.eye(2), ["a", "a"], "'a' is there twice"),
        (np.array([[1.0, np.nan]]), ["a"], "row 0 holds nan"),
    ],
)
def test_a_space_refuses_what_it_cannot_name_or_measure(vectors, items, says):
    with pytest.raises(SpaceError, match=says):
        Space(vectors, items)


def test_queries_that_cannot_be_answered_are_refused():
    space = Space(np.array([[1.0, 0], [0, 0], [0, 1]]), ["a", "zero", "c"])
    with pytest.raises(SpaceError, match=r"row 1 \('zero'\) has length 0"):
        _ = space.unit
    with pytest.raises(SpaceError, match="closest: cosine"):
        nearest(np.eye(3), np.eye(3), 1, metric="cosin")
    with pytest.raises(SpaceError, match="fewer than 3 of 3"):
        nearest(np.eye(3), np.eye(3)[:1], 3, exclude=torch.tensor([[0]]))
    with pytest.raises(SpaceError, match="between 1 and the 3 rows"):
        nearest(np.eye(3), np.eye(3), 4)
    with pytest.raises(SpaceError, match="2 columns"):
        nearest(np.eye(3), np.eye(2), 1)

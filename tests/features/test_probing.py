"""Sparse probes on latents whose concept is planted."""

import numpy as np
import pytest
import torch

from interp.acts.capture import capture_acts
from interp.data.generator import labelled
from interp.features.probing import choose_latents, mean_latents, sparse_probe, sparse_probing
from interp.model.loading import load_model
from sae.archs import build


def planted(n=240, m=40, seed=0, groups=24):
    """Latent 7 is the label, 3 a weaker copy, the rest noise of the same size; labels balanced in every group."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    rows = rng.exponential(1.0, (n, m))
    rows[:, 7] = 4 * y + rng.exponential(0.1, n)
    rows[:, 3] = 1.5 * y + rng.exponential(0.8, n)
    return torch.from_numpy(rows).float(), y, np.arange(n) // 2 % groups


def test_the_planted_latent_is_chosen_in_every_fold_and_tells_all():
    rows, y, groups = planted()
    result = sparse_probe(rows, y, groups=groups, ks=(1, 2), n_null=5)
    assert result[1].latents == ((7,),) * 5
    assert all(set(chosen) == {7, 3} and chosen[0] == 7 for chosen in result[2].latents)
    assert result[1].accuracy == result[1].auroc == 1.0
    assert result[1].interval == (1.0, 1.0)
    assert result.majority == 0.5
    assert 0.35 < result[1].shuffled < 0.65
    assert 0.35 < result[1].random_latents < 0.65
    assert result[1].random_directions is None
    assert result.n_groups == 24


def test_labels_without_a_latent_are_read_by_chance():
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.exponential(1.0, (240, 40))).float()
    y = np.arange(240) % 2
    result = sparse_probe(rows, y, groups=np.arange(240) // 2 % 24, ks=(1, 5), dense=rows, n_null=5)
    for score in (*result.scores, result.dense):
        assert 0.35 < score.auroc < 0.65
        assert 0.35 < score.accuracy < 0.65
        assert 0.35 < score.shuffled < 0.65


def test_a_latent_that_knows_the_group_alone_does_not_pass():
    """Labels constant in a group: a latent that names the group separates its rows, but not those of other groups."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(20), 10)
    y = groups % 2
    rows = torch.zeros(200, 20)
    rows[torch.arange(200), torch.from_numpy(groups)] = 1.0
    rows += torch.from_numpy(rng.normal(0, 0.01, rows.shape)).float()
    apart = sparse_probe(rows, y, groups=groups, ks=(20,), n_null=1)
    together = sparse_probe(rows, y, groups=None, ks=(20,), n_null=1)
    assert together[20].auroc > 0.95
    assert apart[20].auroc < 0.65


def test_the_choice_is_the_largest_difference_of_means():
    rows, y, _ = planted()
    gaps = [abs(rows[y == 1, i].double().mean() - rows[y == 0, i].double().mean()).item() for i in range(40)]
    assert choose_latents(rows, y, 5) == sorted(range(40), key=lambda i: -gaps[i])[:5]
    assert choose_latents(-rows, y, 1) == [7]  # one that falls counts as one that rises
    assert choose_latents(-rows, y, 1, signed=True) != [7]
    assert choose_latents(rows, y, 1, signed=True) == [7]


def test_the_null_of_random_directions_chooses_as_the_latents_are_chosen():
    """In a dense space whose first axis is the label, the best of many random directions reads it; one does not."""
    rng = np.random.default_rng(3)
    y = np.arange(200) % 2
    dense = torch.from_numpy(rng.normal(0, 1, (200, 10))).float()
    dense[:, 0] += 3 * torch.from_numpy(y).float()
    many = sparse_probe(torch.from_numpy(rng.normal(0, 1, (200, 400))).float(), y, ks=(1,), dense=dense, n_null=3)
    one = sparse_probe(torch.from_numpy(rng.normal(0, 1, (200, 1))).float(), y, ks=(1,), dense=dense, n_null=20)
    assert many[1].random_directions > 0.93
    assert one[1].random_directions < 0.85
    assert many.dense.auroc > 0.95


def test_the_same_seed_gives_the_same_figures_and_dicts_are_json():
    rows, y, groups = planted()
    first, second = (sparse_probe(rows, y, groups=groups, ks=(1,), dense=rows, n_null=2, seed=4) for _ in range(2))
    assert first == second
    assert first.to_dict()["scores"][0]["k"] == 1
    shown = str(first)
    assert "dense" in shown and "shuffled:" in shown and f"{first[1].auroc:.4f}" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [1] * 240}, "both classes"),
        ({"y": [0, 1] * 100}, "200 labels were given for 240 rows"),
        ({"ks": (0,)}, "must lie between 1 and 40"),
        ({"ks": (41,)}, "must lie between 1 and 40"),
        ({"dense": torch.zeros(3, 2)}, "3 dense rows"),
        ({"latents": torch.ones(240, 40)}, "no latent differs"),
        ({"groups": [0] * 240}, "as many folds as groups"),
    ],
)
def test_what_cannot_be_probed_is_refused(change, message):
    rows, y, groups = planted()
    given = {"latents": rows, "y": y, "groups": groups} | change
    with pytest.raises(ValueError, match=message):
        sparse_probe(given.pop("latents"), given.pop("y"), **given)
    with pytest.raises(KeyError, match="there are: 1"):
        sparse_probe(rows, y, ks=(1,), n_null=1)[9]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def axis_sae(model, d_sae=384, seed=9):
    """Latents that read random axes of the stream, some of them always off."""
    return build("batchtopk", d_in=model.d_model, d_sae=d_sae, k=8.0, seed=seed)


def test_pooled_latents_are_the_mean_over_each_text(tiny):
    data = labelled("sentiment", n=12)
    acts = capture_acts(tiny, data.texts, ["resid_post.1"])
    sae = axis_sae(tiny)
    pooled = mean_latents(sae, acts, "resid_post.1", batch_size=7)
    latents = sae.encode(acts["resid_post.1"]).detach()
    for text in range(12):
        assert torch.allclose(pooled[text], latents[acts.documents == text].mean(0), atol=1e-4)
    with pytest.raises(ValueError, match="documents \\[1\\] have no rows"):
        mean_latents(sae, capture_acts(tiny, ["a", ""], ["resid_post.1"]), "resid_post.1")


def test_a_named_concept_a_labelled_one_and_given_texts_are_the_same_data(tiny):
    sae, options = axis_sae(tiny), {"ks": (1,), "n_null": 1}
    data = labelled("language", n=60, seed=0)
    named = sparse_probing(tiny, sae, "resid_post.1", "language", n=60, **options)
    assert named == sparse_probing(tiny, sae, "resid_post.1", data, **options)
    assert named == sparse_probing(tiny, sae, "resid_post.1", (data.texts, data.labels, data.templates), **options)
    assert [probe.label for probe in named.probes] == ["english or french"]
    assert named.mean(None) == named.probes[0].dense.auroc > 0.9
    with pytest.raises(ValueError, match="has no 'random_latents'"):
        named.mean(None, "random_latents")


def test_of_three_labels_each_is_told_from_the_rest(tiny):
    found = sparse_probing(tiny, axis_sae(tiny), "resid_post.1", "topic", n=90, ks=(5,), n_null=1)
    assert [probe.label for probe in found.probes] == [f"{t} or another" for t in ("finance", "sport", "technology")]
    assert found.probes[0].majority == pytest.approx(2 / 3)
    assert found.mean(5) == pytest.approx(np.mean([probe[5].auroc for probe in found.probes]))
    assert str(found).count("auroc: area") == 1
    with pytest.raises(ValueError, match="two labels or more"):
        sparse_probing(tiny, axis_sae(tiny), "resid_post.1", (["a", "b"], [1, 1], None))
    with pytest.raises(ValueError, match="data is a name"):
        sparse_probing(tiny, axis_sae(tiny), "resid_post.1", ["a", "b"])

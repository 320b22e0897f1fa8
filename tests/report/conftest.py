"""A page with every block and every figure, filled with values such as a real run gives."""

import numpy as np
import plotly.graph_objects as go
import pytest

from interp.report import figures
from interp.report.pages import (
    Column,
    Contexts,
    Estimate,
    Example,
    Fact,
    Figure,
    Page,
    Reply,
    Section,
    SideBySide,
    Table,
    Text,
)

LAYERS = ["embed", 0, 1, 2, 3, 4, 5]
STORY = (
    " Once upon a time there was a little girl named Lily . She loved her old red ball and played with it all day ."
    " One morning the ball was gone and Lily felt very sad . She looked under the bed , but it was empty ."
)


def sample_figures() -> dict:
    """Return one of each figure by the name of its function."""
    g = np.random.default_rng(7)
    steps = np.arange(0, 1000, 10)
    density = np.concatenate([10 ** g.normal(-2.1, 0.6, 2977).clip(-4.9, -0.5), np.zeros(95)])
    strengths = np.array([-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1.0])
    effect = 0.9 * np.tanh(1.6 * strengths)
    shuffled = 0.5 + 0.03 * g.standard_normal(20)
    xy = np.concatenate([g.normal(c, 0.9, (80, 2)) for c in ((0, 0), (4, 1), (1.5, 4))])
    topics = [name for name in ("finance", "sport", "technology") for _ in range(80)]
    accuracy = np.array([0.62, 0.71, 0.83, 0.86, 0.84, 0.75, 0.6])
    spread = np.stack([accuracy - 0.06, accuracy + 0.05], 1)
    losses = {"ce_clean": 1.842, "ce_spliced": 1.911, "ce_mean": 4.213, "ce_zero": 5.871, "recovered_mean": 0.971}
    return {
        "training_curve": figures.training_curve(
            steps, 0.86 - 0.7 * np.exp(-steps / 120), 32 + 40 * np.exp(-steps / 60), target_l0=32
        ),
        "density_histogram": figures.density_histogram(density),
        "loss_bars": figures.loss_bars(losses),
        "probe_scores": figures.probe_scores(
            g.normal(2.4, 1.2, 240), g.normal(-2.1, 1.3, 236), auroc=0.983, interval=(0.970, 0.992)
        ),
        "probe_controls": figures.probe_controls(0.983, (0.970, 0.992), shuffled, 0.561, others={"untrained": 0.642}),
        "dose_curve": figures.dose_curve(
            strengths,
            effect,
            np.stack([effect - 0.07, effect + 0.07], 1),
            placebo=np.stack([-0.05 - 0.08 * abs(strengths), 0.05 + 0.08 * abs(strengths)], 1),
            kl=0.42 * strengths**2,
            kl_budget=0.15,
            chosen=0.5,
            effect_name="change in sentiment (0 to 1)",
        ),
        "placebo_strip": figures.placebo_strip(0.61, 0.05 * g.standard_normal(24), interval=(0.54, 0.68), z=12.3),
        "analogy_by_layer": figures.analogy_by_layer(
            LAYERS, accuracy, 0.7 * accuracy, 0.2 * accuracy, intervals={"accuracy": spread}
        ),
        "layer_curve": figures.layer_curve(
            LAYERS,
            {"sentiment": accuracy, "tense": accuracy - 0.05, "shuffled": np.full(7, 0.5)},
            y_title="AUROC",
            title="Sentiment is read best in the middle",
            nulls=("shuffled",),
            chance=0.5,
        ),
        "dot_rows": figures.dot_rows(
            ["capital of", "past tense", "female of", "plural", "comparative"],
            {"query words left out": [0.9, 0.95, 0.8, 1.0, 0.85], "only b (null)": [0.3, 0.1, 0.25, 0.4, 0.2]},
            x_title="share of analogies answered",
            title="Accuracy by relation",
            nulls=("only b (null)",),
        ),
        "map_2d": figures.map_2d(xy, topics, [f"a {t} <b>text</b> & more {i}" for i, t in enumerate(topics)]),
    }


def sample_contexts(seed: int, title: str) -> Contexts:
    """Return examples of an invented latent."""
    g = np.random.default_rng(seed)
    tokens = [f" {word}" for word in STORY.split()]
    examples = []
    for scale in (12.4, 9.1, 4.2, 1.3):
        values = np.where(g.random(len(tokens)) < 0.18, scale * g.random(len(tokens)) ** 1.5, 0)
        values[int(g.integers(len(tokens)))] = scale
        examples.append(Example(tokens, values.tolist()))
    return Contexts(
        title,
        examples,
        lead="" if seed > 1 else "Fires where somebody loses a thing, strongest on the word that says so.",
        facts={"density": "0.82 %", "maximum": 12.41, "examples": 4},
        raises=[(" sad", 1.42), (" lost", 1.21), (" gone", 0.98), (" cry", 0.91), (" missing", 0.85)],
        lowers=[(" happy", -1.12), (" found", -0.84), (" smiled", -0.71)],
    )


def build_sample() -> Page:
    """Return a page with every block and every figure."""
    drawn = sample_figures()
    captions = {
        "training_curve": "Share of variance explained (top) and active latents a token (bottom) on each batch.",
        "density_histogram": "Latents by how often they fire on 200,000 held-out tokens; dead ones never did.",
        "loss_bars": "Next-token loss on held-out documents. Hatched bars are nulls.",
        "probe_controls": "Diamond: held-out templates, 95 % interval over templates. Hollow grey: nulls.",
        "dose_curve": "Prompts that the strength was not chosen on. Grey band: 24 random directions of equal norm.",
    }

    def figure(name: str) -> Figure:
        return Figure(drawn[name], captions.get(name, "Held-out values; hollow grey marks are nulls."))

    # another's figure: bold text and a colour bar, which plotly styles by attributes, and no template of ours
    matrix = go.Figure(go.Heatmap(x=["a", "b"], y=["c", "d"], z=[[1, 0.5], [0.5, 1]]), {"height": 300})
    matrix.update_layout(xaxis_title="<b>first</b>", yaxis_title="second")
    foreign = Figure(matrix, "Cosines.", Table(["", "a", "b"], [["c", 1, 0.5], ["d", 0.5, 1]], "Cosines"), "Cosines")
    rows = [
        ["king − man + woman", "queen", 1, 1, 0.612, 0.281],
        ["paris − france + germany", "berlin", 1, 2, 0.583, 0.302],
        ["walked − walk + run", "ran", 1, 3, 0.549, None],
    ]
    columns = ["analogy", "answer", "rank", "rank, no word left out", "cosine", Column("cosine, only b", null=True)]
    return Page(
        title="What a small language model keeps in its residual stream",
        kicker="interp demo · tiny · blocks.3.hook_resid_post",
        lead="A sparse autoencoder, a probe, a steering direction and word analogies, all from one layer of one "
        "model, each held against what chance would give.",
        facts=[
            Fact("Variance explained", 0.862, "0 for the mean activation", "32 of 3,072 latents rebuild the layer."),
            Fact("Cross-entropy recovered", 0.971, "0 for mean ablation", "The model barely notices the rebuild."),
            Fact("Dead latents", "3.1 %", "", "Silent on 200,000 held-out tokens."),
            Fact(
                "Probe AUROC",
                Estimate(0.983, 0.970, 0.992),
                "0.502 with shuffled labels",
                "Sentiment is read off templates that the probe has never seen.",
            ),
            Fact("Steering effect", "12.3 sd", "random directions of equal norm", "One vector turns the mood."),
            Fact("Analogies", 0.86, "0.17 by nearest to b", "Relations are parallel in the middle layers."),
        ],
        sections=[
            Section(
                "Autoencoder",
                [
                    figure("training_curve"),
                    figure("density_histogram"),
                    figure("loss_bars"),
                    Table(
                        ["measure", "value", Column("mean ablation", null=True), "unit"],
                        [["cross-entropy", 1.911, 4.213, "nats / token"], ["L0", 31.9, None, "latents / token"]],
                        "The autoencoder on documents that it was not trained on",
                    ),
                ],
                lead="Trained on 200,000 tokens at `blocks.3.hook_resid_post`, tested on other documents.",
            ),
            Section("Latents", [sample_contexts(1, "Latent 417"), sample_contexts(2, "Latent 2,090")]),
            Section("Probe", [figure("probe_controls"), figure("probe_scores"), figure("layer_curve")]),
            Section(
                "Steering",
                [
                    figure("dose_curve"),
                    figure("placebo_strip"),
                    SideBySide(
                        ["unsteered", "steered, strength 0.5", "random direction"],
                        [
                            (
                                "The day at the park was",
                                Reply(" long, and the children went home to sleep.", "sentiment 0.51"),
                                Reply(" wonderful! They laughed and hugged and were so happy.", "sentiment 0.96"),
                                Reply(" long and they went to the house to eat.", "sentiment 0.49"),
                            ),
                            ("He opened the letter and", " read it twice.", " smiled at the lovely news.", " sat."),
                        ],
                        "Greedy continuations of the same prompts.",
                    ),
                    Text("The strength was chosen on other prompts, within a budget of 0.15 nats a token.", "note"),
                ],
            ),
            Section(
                "Analogies", [figure("analogy_by_layer"), figure("dot_rows"), Table(columns, rows, "Three of them")]
            ),
            Section("Map", [figure("map_2d"), foreign, Text("interp demo --seed 0 --out demo", "code")]),
        ],
        about={
            "model": "tiny",
            "hook point": "blocks.3.hook_resid_post",
            "seed": 0,
            "tokens": 200_000,
        },
    )


@pytest.fixture(scope="session")
def sample_page() -> Page:
    return build_sample()


@pytest.fixture(scope="session", name="sample_figures")
def sample_figures_fixture() -> dict:
    return sample_figures()

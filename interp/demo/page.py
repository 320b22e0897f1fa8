"""Lay out what the main job found as one page: each figure with its null, and what it means in a line."""

from typing import Any

from interp.concepts.effects.calls import Sample
from interp.demo.parts import EXPRESSIONS, KL_BUDGET, Analogies, Captured, Decomposed, Mapped, Probed, Steered
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

PAGE_EXAMPLES = 8  # latents shown


def build_page(found: dict[str, Any], result: dict[str, Any]) -> Page:
    """Return the page of the parts that ran; parts left out are named with their reason."""
    makers = {"sae": _autoencoder, "probe": _probing, "steer": _steering, "analogy": _analogies, "map": _topic_map}
    sections = [make(found[key]) for key, make in makers.items() if key in found]
    if "sae" in found:
        sections.insert(1, _latents(found["sae"]))
    if left := result["left_out"]:
        rows = [[name, reason] for name, reason in left.items()]
        table = Table(["part", "reason"], rows, "Parts that this model or this text cannot be asked for")
        sections.append(Section("Left out", [table]))
    config, captured = result["config"], found["capture"]
    return Page(
        title=f"What {config['model']} represents",
        kicker=f"{config['hook']}",
        lead=_lead(captured, config),
        facts=_facts(result, found),
        sections=[*sections, _numbers(result)],
        about=config | result["versions"] | {"made": result["made"]},
    )


def _lead(captured: Captured, config: dict[str, Any]) -> str:
    return (
        f"The residual stream at `{config['hook']}` on {len(captured.train):,} tokens of text ({captured.source}; the "
        "first token of every window, BOS, left out), taken apart by a sparse autoencoder, read by a probe, steered, "
        "and asked for analogies. Every score stands beside what it would be if there were nothing to find."
    )


def _facts(result: dict[str, Any], found: dict[str, Any]) -> list[Fact]:
    out = []
    if made := result.get("sae"):
        out += [
            Fact("Variance explained", made["fve"], "0 for the mean of the stream",
                 f"by {made['l0']:.1f} active latents a token, on unseen documents"),
            Fact("Cross entropy recovered", made["ce_recovered"], "0 for the mean of the stream",
                 "when the model runs through the autoencoder"),
        ]  # fmt: skip
    if read := result.get("probe"):
        out.append(
            Fact("Sentiment probe, AUROC", Estimate(read["auroc"], *read["interval"]),
                 f"{read['control']:.2f} with shuffled labels", "on sentence templates that nobody trained on")
        )  # fmt: skip
    if moved := result.get("steer"):
        out.append(
            Fact("Steering effect", f"{moved['effect']:.1f} sd", "sd of 20 random directions of equal norm",
                 f"at a cost of {moved['kl']:.2f} nats a token on neutral text")
        )  # fmt: skip
    if asked := result.get("analogy"):
        out.append(
            Fact("Analogies", Estimate(asked["accuracy"], *asked["accuracy_interval"]),
                 f"{asked['only_b']:.2f} for the neighbour of the query word",
                 f"{asked['honest']:.2f} with no word left out, {asked['class_aware']['honest']:.2f} class-aware")
        )  # fmt: skip
    if drawn := result.get("map"):
        out.append(
            Fact("Topic purity", drawn["purity_space"], f"{drawn['purity_null']:.2f} with shuffled labels",
                 "share of sentences whose nearest neighbour has their topic")
        )  # fmt: skip
    return out


def _autoencoder(made: Decomposed) -> Section:
    steps = [row["step"] for row in made.log]
    losses = made.splice.to_dict() | {"recovered_mean": made.splice.recovered}
    null = Column("mean ablation", null=True)
    rows = [
        ["variance explained (FVE)", made.evaluation.fve, 0.0],
        ["active latents a token (L0)", made.evaluation.l0, 0.0],
        ["cross entropy recovered", made.splice.recovered, 0.0],
        ["cross entropy recovered, against zero ablation", made.splice.recovered_zero, None],
        [f"latents that never fired in {made.tokens_seen:,} tokens", made.dead, None],
    ]
    return Section(
        "A sparse autoencoder",
        [
            Figure(
                figures.training_curve(steps, [r["fve"] for r in made.log], [r["l0"] for r in made.log]),
                "On training batches. The table below is on documents that training never saw.",
            ),
            Figure(figures.loss_bars(losses), f"Over {made.splice.n_tokens:,} next tokens of unseen documents."),
            Figure(figures.density_histogram(made.table.density.numpy()), "On the training text, one count a latent."),
            Table(["measure", Column("autoencoder", decimals=3), null], rows, "On unseen documents"),
        ],
        lead=f"{made.sae.d_sae:,} latents, about {made.sae.config.k:g} of them active on a token (BatchTopK). "
        "What it costs to let the model run on the reconstruction tells how much of what the layer does is kept.",
    )


def _latents(made: Decomposed) -> Section:
    blocks = []
    for shown in made.examples[:PAGE_EXAMPLES]:
        blocks.append(
            Contexts(
                f"Latent {shown.latent}",
                [Example(c.tokens, c.activations) for c in shown.contexts],
                facts={"density": f"{100 * shown.density:.2g} %", "maximum": f"{shown.max:.3g}"},
                raises=shown.top_logits[:6],
                lowers=shown.bottom_logits[:6],
            )
        )
    return Section(
        "The strongest latents",
        blocks,
        lead="Those that write most into the stream among the latents active on under 1 % of tokens, with the texts "
        "on which they fire most. The tokens that each raises and lowers are its direct effect on the logits: its "
        "decoder row through the final norm's gain and the unembedding, later layers left aside.",
    )


def _probing(read: Probed) -> Section:
    result, scores = read.result, read.scores.numpy()
    positive, negative = (scores[[label == wanted for label in read.labels]] for wanted in (1, 0))
    rows = [
        ["words that the probe has seen", _auroc(result), result.control, result.random_direction],
        ["words that it has not", _auroc(read.unseen), read.unseen.control, read.unseen.random_direction],
    ]
    return Section(
        "Reading sentiment",
        [
            Figure(
                figures.probe_scores(positive, negative, auroc=result.auroc, interval=result.interval),
                f"{result.n_test} sentences from {result.n_groups} templates that neither the probe nor the model's "
                "own training held.",
            ),
            Figure(
                figures.probe_controls(result.auroc, result.interval, result.control_scores, result.random_direction),
                "Each dot is the same probe trained on labels shuffled anew.",
            ),
            Table(
                [
                    "test sentences",
                    "AUROC",
                    Column("shuffled labels", null=True),
                    Column("random direction", null=True),
                ],
                rows,
                "Held-out sentence templates; intervals are drawn over templates",
            ),
        ],
        lead="A logistic probe on the mean residual of a sentence, trained on some sentence templates and tested on "
        "others.",
    )


def _auroc(result: Any) -> Estimate:
    return Estimate(result.auroc, *result.interval)


def _steering(moved: Steered) -> Section:
    shown = moved.effects
    doses = shown.doses
    samples = [
        (
            s.prompt,
            Reply(s.unsteered, f"score {s.unsteered_score:.1f}"),
            Reply(s.steered, f"score {s.steered_score:.1f}"),
        )
        for s in shown.samples
    ]
    by_latent = [
        (
            s.prompt,
            Reply(s.unsteered, f"score {s.unsteered_score:.1f}"),
            Reply(s.steered, f"score {s.steered_score:.1f}"),
        )
        for s in moved.latent_effects.samples[:3]
    ]
    rows = [_effect_row("mean difference", shown), _effect_row(f"latent {moved.latent}", moved.latent_effects)]
    columns = ["direction", "strength", "effect", Column("random: mean", null=True), Column("random: sd", null=True),
               "effect in sd"]  # fmt: skip
    return Section(
        "Steering generation",
        [
            Figure(
                figures.dose_curve(
                    [d.strength for d in doses], [d.effect for d in doses], kl=[d.kl for d in doses],
                    kl_budget=shown.kl_budget, chosen=shown.chosen, effect_name="change in the probability of positive",
                ),
                "On the prompts that the strength was chosen on; the cost is on neutral text.",
            ),
            Figure(
                figures.placebo_strip(
                    shown.effect, shown.placebo_effects, interval=shown.interval, z=shown.in_placebo_sd,
                    effect_name="change in the probability of positive",
                ),
                "On other prompts, at the chosen strength.",
            ),
            Table(columns, rows, "The direction, and the autoencoder's latent whose decoder row lies closest to it"),
            SideBySide(["unsteered", "steered"], samples[:8], "Greedy continuations, KV cache on"),
            SideBySide(["unsteered", "steered by the latent"], by_latent[:3], f"The same with latent {moved.latent}"),
        ],
        lead="The difference between the mean residuals of positive and negative sentences is added to the stream at "
        "every token of prompt and answer but BOS. The strength is the largest whose cost on neutral text stays within "
        f"{KL_BUDGET:g} nats a token, found on other prompts. The score is the probability of positive that the probe "
        "gives, reading the new text alone through the unsteered model.",
    )  # fmt: skip


def _texts(sample: Sample) -> tuple[str, Reply, Reply]:
    unsteered = Reply(sample.unsteered, f"positive: {sample.unsteered_score:.2f}")
    return sample.prompt, unsteered, Reply(sample.steered, f"positive: {sample.steered_score:.2f}")


def _effect_row(name: str, shown: Any) -> list[Any]:
    effect = Estimate(shown.effect, *shown.interval)
    return [name, shown.chosen, effect, shown.placebo_mean, shown.placebo_sd, shown.in_placebo_sd]


def _analogies(asked: Analogies) -> Section:
    scored = {name: result.total for name, result in asked.arithmetic.scoring.items()}
    aware = {name: result.total for name, result in asked.class_aware.scoring.items()}
    names = list(scored)
    keys = ("accuracy", "honest", "only_b")
    blocks: list[Any] = [
        Figure(
            figures.analogy_by_layer(
                names,
                *([getattr(s, key) for s in scored.values()] for key in keys),
                intervals={key: [getattr(s, f"{key}_interval") for s in scored.values()] for key in keys},
            ),
            f"3CosAdd over {asked.n_relations} relations, on the half of the pairs that did not choose the layer.",
        ),
        Figure(
            figures.dot_rows(
                list(asked.arithmetic.chosen.by_relation),
                {
                    "3CosAdd": [s.accuracy for s in asked.arithmetic.chosen.by_relation.values()],
                    "class-aware, no word left out": [
                        asked.class_aware.chosen.by_relation[n].honest for n in asked.arithmetic.chosen.by_relation
                    ],
                    "only b (null)": [s.only_b for s in asked.arithmetic.chosen.by_relation.values()],
                },
                x_title="share answered", title="Relation by relation", nulls=("only b (null)",),
            ),
            f"At {asked.arithmetic.layer} (3CosAdd) and {asked.class_aware.layer} (class-aware).",
        ),
        Table(
            ["layer", "3CosAdd", "nothing left out", "class-aware", "nothing left out", Column("only b", null=True)],
            [
                [n, scored[n].accuracy, scored[n].honest, aware[n].accuracy, aware[n].honest, scored[n].only_b]
                for n in names
            ],
            "By layer",
        ),
    ]  # fmt: skip
    for text in EXPRESSIONS:
        if rows := asked.examples.get(text):
            table = [
                [r["layer"], ", ".join(f"{a['word']} {a['cosine']:.2f}" for a in r["answers"]), r["honest"]]
                for r in rows
            ]
            columns = ["layer", "answers, with cosines", Column("nothing left out", null=True)]
            blocks.append(Table(columns, table, text))
    return Section(
        "Analogies",
        blocks,
        lead="A word alone after BOS is a vector at every layer. Nearly all that word arithmetic scores comes from "
        "leaving the query's own words out of the answers, so the score with nothing left out stands beside it, and "
        "the score of the query word's nearest neighbour (only b), which needs no relation. The class-aware score asks "
        "besides whether a word belongs to the class of the answers.",
    )


def _topic_map(drawn: Mapped) -> Section:
    q = drawn.quality
    rows = [
        ["nearest neighbour has the same topic, full space", q.purity_space, q.purity_null],
        ["the same on the map", q.purity_map, q.purity_null],
        [f"of {q.k} nearest neighbours kept on the map", q.kept, q.kept_null],
        ["trustworthiness", q.trustworthiness, q.trustworthiness_null],
        ["continuity", q.continuity, q.continuity_null],
    ]
    share = 100 * sum(drawn.explained)
    return Section(
        "Three topics",
        [
            Figure(
                figures.map_2d(drawn.points.numpy(), drawn.labels, drawn.texts, title="Sentences of three topics"),
                f"The two directions of largest variance, {share:.0f} % of it. Hover for the sentence.",
            ),
            Table(["measure", "value", Column("shuffled", null=True)], rows, "What the map keeps of the full space"),
        ],
        lead="The mean residual of sentences that differ in nothing but two words of finance, sport or technology.",
    )


def _numbers(result: dict[str, Any]) -> Section:
    rows: list[list[Any]] = []
    if made := result.get("sae"):
        rows += [["sae.fve", made["fve"], "mean of the stream", 0.0], ["sae.l0", made["l0"], "", None],
                 ["sae.dead", made["dead"], "", None],
                 ["sae.ce_recovered", made["ce_recovered"], "mean ablation", 0.0]]  # fmt: skip
    if read := result.get("probe"):
        rows += [["probe.auroc", read["auroc"], "shuffled labels", read["control"]],
                 ["probe, unseen words", read["unseen_words"]["auroc"], "shuffled labels",
                  read["unseen_words"]["control"]]]  # fmt: skip
    if moved := result.get("steer"):
        rows += [["steer, change in score", moved["raw_effect"], "random directions, mean", moved["placebo_mean"]],
                 ["steer by one latent", moved["latent"]["raw_effect"], "random directions, mean",
                  moved["latent"]["placebo_mean"]]]  # fmt: skip
    if asked := result.get("analogy"):
        rows += [["analogy.accuracy", asked["accuracy"], "only b", asked["only_b"]],
                 ["analogy.honest", asked["honest"], "guessing", asked["chance"]]]  # fmt: skip
    if drawn := result.get("map"):
        rows.append(["map, purity", drawn["purity_map"], "shuffled labels", drawn["purity_null"]])
    columns = ["figure", "value", "null", Column("its value", null=True)]
    blocks = [Table(columns, rows, "Every figure and its null; run.json holds them in full")]
    return Section("All figures", [*blocks, Text("run.json stands beside this page.", kind="note")])

"""The parts of the main job. Each takes the job and what earlier parts found, and returns a result with its nulls."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import sae
from interp.acts.capture import Acts, capture_acts, capture_packed, pool
from interp.acts.direction import Direction
from interp.concepts.effects.calls import Effects, NoUsableStrengthError, effects
from interp.concepts.reading.finders import fit_direction, latent_direction
from interp.concepts.reading.probes import ProbeResult, evaluate_probe
from interp.concepts.steering.context import add, cached_equals_uncached
from interp.data import generator, lists
from interp.features.examples import LatentExamples, LatentTable, scan_acts, top_examples
from interp.features.splice import SpliceError, SpliceLoss, ce_recovered
from interp.model.loading import Model
from interp.model.sources import read_source
from interp.model.tokens import Packed, pack
from interp.space.analogy import choose_and_score
from interp.space.arithmetic import expression, in_vocabulary, layer_answers
from interp.space.maps import MapQuality, map_quality, pca_map
from interp.space.neighbors import SpaceError, UnknownItemError
from interp.space.scores import LayerChoice
from interp.space.words import layer_spaces, whole_words

WINDOW = 128  # tokens a window of text, BOS included
HELD_OUT = 10  # every tenth document is kept from the autoencoder
GAP = "\n\n"  # between documents
LEAST_TOKENS = 20_000
EXPRESSIONS = ("king - man + woman", "paris - france + germany", "walked - walk + run")
SUBJECTS = ("movie", "party", "cake", "story", "song", "garden", "room", "game", "hotel", "dinner", "book", "trip")
# a sad beginning: left alone the model goes on sadly, so that there is something to change
FRAMES = (
    "{name} felt sad because the {noun} was",
    "{name} cried. The {noun} was",
    "The {noun} was bad, and everybody cried. {name} thought it was",
    "{name} went home and cried. {name} said that the {noun} was",
)
STEER_PROMPTS = tuple(
    frame.format(name=name, noun=noun)
    for frame in FRAMES
    for noun, name in zip(SUBJECTS, ("Tom", "Lily", "Ben", "Mia", "Max", "Sue") * 2, strict=True)
)
DEV_PROMPTS = STEER_PROMPTS[::3]  # the strength is chosen on these, and reported on the others
TEST_PROMPTS = tuple(prompt for prompt in STEER_PROMPTS if prompt not in DEV_PROMPTS)
STRENGTHS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
KL_BUDGET = 0.05  # nats a token, on neutral text
MIN_PAIRS = 6  # of a relation, both words one token each


class LeftOut(ValueError):
    """A part that this model or this text cannot be asked for; its message says why."""


@dataclass
class Job:
    """What every part needs."""

    model: Model
    hook: str
    seed: int = 0
    say: Callable[[str], None] = print


@dataclass(frozen=True, kw_only=True)
class Captured:
    """Activations of packed text at one hook point, BOS left out; every tenth document apart."""

    train: Acts
    held_out: Acts
    held_windows: Packed
    source: str


@dataclass(frozen=True, kw_only=True)
class Decomposed:
    """An autoencoder of the stream, and what it is worth on documents that it has not seen."""

    sae: Any
    log: list[dict[str, Any]]
    seconds: float
    evaluation: Any  # sae.Evaluation on held-out documents
    splice: SpliceLoss
    dead: float  # share of latents that fired on none of `tokens_seen` tokens
    tokens_seen: int
    table: LatentTable
    examples: list[LatentExamples]


@dataclass(frozen=True, kw_only=True)
class Probed:
    """The sentiment direction and its probe."""

    direction: Direction
    result: ProbeResult
    unseen: ProbeResult  # tested on words that the probe's training never held
    scores: Float[Tensor, " n"]
    labels: list[int]
    train: generator.Labelled
    rows: Float[Tensor, "n d"]  # of the training sentences


@dataclass(frozen=True, kw_only=True)
class Steered:
    """Generation steered by the sentiment direction, and by one latent of the autoencoder."""

    effects: Effects
    cached_equals_uncached: bool
    latent: int
    latent_effects: Effects


@dataclass(frozen=True, kw_only=True)
class Analogies:
    """Scores by layer of the bundled relations, and the answers to a few well-known questions."""

    arithmetic: LayerChoice  # 3CosAdd
    class_aware: LayerChoice  # LRCos, chosen by its honest score
    n_relations: int
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """Sentences of three topics on two axes."""

    points: Float[Tensor, "n 2"]
    explained: list[float]
    quality: MapQuality
    labels: list[str]
    texts: list[str]


def capture(job: Job, dataset: str | None, tokens: int) -> Captured:
    """Capture `tokens` tokens for training, and about a ninth as many of other documents."""
    if tokens < LEAST_TOKENS:
        raise ValueError(f"tokens is {tokens}; an autoencoder needs at least {LEAST_TOKENS}")
    texts = read_source(dataset) if dataset else generator.documents(seed=100 + job.seed)
    train, held = _split(job.model, texts, tokens)
    acts, windows = {}, list(pack(job.model.tokenizer, held, WINDOW, separate=False))
    for name, batches, limit in (
        ("train", pack(job.model.tokenizer, train, WINDOW, separate=False), tokens),
        ("held_out", windows, len(windows) * windows[0].ids.numel()),
    ):
        acts[name] = _joined(_until(capture_packed(job.model, batches, [job.hook]), limit, job.say))
    found = len(acts["train"])
    if found < LEAST_TOKENS:
        raise ValueError(f"{dataset} gives {found} tokens to train on; an autoencoder needs at least {LEAST_TOKENS}")
    ids, mask, special, documents, positions = (
        torch.cat([getattr(w, part) for w in windows]) for part in ("ids", "mask", "special", "documents", "positions")
    )
    joined = Packed(ids, mask, special, documents, positions)
    return Captured(**acts, held_windows=joined, source=dataset or "bundled generator")


def _split(model: Model, texts: Iterable[str], tokens: int) -> tuple[list[str], list[str]]:
    """Read documents until the training ones hold enough tokens; every tenth goes to the other list."""
    parts: tuple[list[str], list[str]] = ([], [])
    count = 0
    for i, text in enumerate(texts):
        held = i % HELD_OUT == HELD_OUT - 1
        parts[held].append(text + GAP)
        count += 0 if held else len(model.tokenizer(text + GAP, add_special_tokens=False)["input_ids"])
        if count > tokens + WINDOW and parts[1]:
            break
    if not parts[1]:
        raise ValueError(f"the text has {i + 1} documents; at least {HELD_OUT} are needed to hold one out")
    return parts


def _until(stream: Iterator[Acts], limit: int, say: Callable[[str], None]) -> Iterator[Acts]:
    count = 0
    for n, acts in enumerate(stream, 1):
        yield acts
        count += len(acts)
        if n % 20 == 0:
            say(f"      {count:,} tokens")
        if count >= limit:
            return


def _joined(parts: Iterable[Acts]) -> Acts:
    held = list(parts)
    first = held[0]
    cat = lambda name: torch.cat([getattr(p, name) for p in held])  # noqa: E731
    return Acts(
        values={h: torch.cat([p.values[h] for p in held]) for h in first.values},
        token_ids=cat("token_ids"), positions=cat("positions"), documents=cat("documents"),
        is_special=cat("is_special"), n_documents=len(cat("documents").unique()), spellings=first.spellings,
        n_layers=first.n_layers,
    )  # fmt: skip


def decompose(job: Job, captured: Captured, *, steps: int, k: float = 31.0, width: str = "16x") -> Decomposed:
    """Train a BatchTopK autoencoder and measure it on held-out documents."""
    import time

    began = time.perf_counter()
    rows = captured.train[job.hook]
    steps_said = max(1, steps // 5)

    def on_step(step: Any) -> None:
        if step.step % steps_said == 0:
            job.say(f"      step {step.step}/{steps}  FVE {step.fve:.3f}  L0 {step.l0:.1f}  dead {step.dead:.1%}")

    metadata = {"hook_name": job.model.hook_point(job.hook).name, "model_name": job.model.name}
    run = sae.fit(
        rows, arch="batchtopk", width=width, k=k, steps=steps, batch_size=2048, seed=job.seed, on_step=on_step,
        device=job.model.device, metadata=metadata,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    held = captured.held_out[job.hook]
    windows = captured.held_windows
    table = scan_acts(run.sae, captured.train, job.hook, k=6, window=WINDOW)
    evaluation = sae.evaluate(run.sae, held.to(job.model.device).split(8192))
    try:
        loss = ce_recovered(job.model, run.sae, job.hook, windows.ids, windows.mask)
    except SpliceError as error:  # an untrained model loses nothing by ablation
        raise LeftOut(str(error)) from error
    alive = (table.density.cpu() > 0) | (evaluation.density > 0)
    return Decomposed(
        sae=run.sae, log=run.log, seconds=seconds, evaluation=evaluation,
        splice=loss,
        dead=float((~alive).float().mean()), tokens_seen=len(rows) + len(held), table=table,
        examples=top_examples(job.model, run.sae, captured.train, job.hook, table=table, n_latents=12, n_examples=4,
                              max_density=0.01, window=WINDOW),
    )  # fmt: skip


def vectors(job: Job, texts: Sequence[str]) -> Float[Tensor, "n d"]:
    """Return the mean residual of each text at the job's hook point, BOS left out."""
    return pool(capture_acts(job.model, texts, [job.hook]), job.hook, "mean")


def probe(job: Job, n: int = 600) -> Probed:
    """Find the sentiment direction, and probe it on sentence templates that neither model nor probe has seen."""
    train = generator.labelled("sentiment", split="train", words="a", n=n, seed=job.seed)
    rows, labels = vectors(job, train.texts), [int(label == "positive") for label in train.labels]
    name = job.model.hook_point(job.hook).name
    results = {}
    for half in "ab":
        test = generator.labelled("sentiment", split="held_out", words=half, n=n, seed=job.seed + 1)
        truth = [int(label == "positive") for label in test.labels]
        x = vectors(job, test.texts)
        results[half] = evaluate_probe(
            rows, labels, x, truth, groups_train=train.templates, groups_test=test.templates, C=0.05, n_shuffles=50,
            seed=job.seed, hook=name, model=job.model,
        )  # fmt: skip
        if half == "a":
            scores, shown = results[half].probe.decision(x), truth
    return Probed(
        direction=fit_direction(rows, labels, hook=name, model=job.model), result=results["a"], unseen=results["b"],
        scores=scores, labels=shown, train=train, rows=rows,
    )  # fmt: skip


def steering(job: Job, probed: Probed, decomposed: Decomposed | None) -> Steered:
    """Steer generation by the sentiment direction and by a latent, strength chosen on other prompts within a budget."""
    if decomposed is None:
        raise LeftOut("there is no autoencoder to take a latent from")
    reader = probed.result.probe

    def read_sentiment(texts: Sequence[str]) -> list[float]:
        # a probe trained on labelled sentences reads the generated text through the unsteered model
        filled = [text if text.strip() else "." for text in texts]
        return torch.sigmoid(reader.decision(vectors(job, filled))).tolist()

    neutral = generator.sample_texts(24, seed=9_000 + job.seed)
    common: dict[str, Any] = {
        "prompts": TEST_PROMPTS, "dev_prompts": DEV_PROMPTS, "strengths": STRENGTHS,
        "score": read_sentiment, "n_placebo": 20, "neutral_texts": neutral, "kl_budget": KL_BUDGET, "seed": job.seed,
        "max_new_tokens": 16,
    }  # fmt: skip
    latent = sentiment_latent(decomposed, probed)
    by_latent = latent_direction(decomposed.sae, latent, probed.direction.hook, job.model)
    measured = []
    for text, direction in (("the direction", probed.direction), (f"latent {latent}", by_latent)):
        job.say(f"      by {text}, beside 20 random ones")
        try:
            measured.append(effects(job.model, direction, **common))
        except NoUsableStrengthError as error:
            raise LeftOut(str(error)) from error
        if not measured[-1].placebo_sd:
            raise LeftOut(
                "no random direction changes what the model writes: there is nothing to hold an effect against"
            )
    same = cached_equals_uncached(
        job.model, add(probed.direction, measured[0].chosen), STEER_PROMPTS[:4], max_new_tokens=16
    )
    return Steered(effects=measured[0], cached_equals_uncached=same, latent=latent, latent_effects=measured[1])


def sentiment_latent(decomposed: Decomposed, probed: Probed) -> int:
    """Return the latent whose decoder row lies closest to the sentiment direction, dead ones left aside."""
    rows = decomposed.sae.W_dec.detach().float().cpu()
    cosine = torch.nn.functional.cosine_similarity(rows, probed.direction.vector[None], dim=1)
    return int(cosine.masked_fill(decomposed.table.density.cpu() == 0, -1).argmax())


def analogies(job: Job) -> Analogies:
    """Score the bundled relations at every layer; the layer is chosen on one half of the pairs, scored on the other."""
    try:
        vocabulary = whole_words(job.model.tokenizer)
    except SpaceError as error:
        raise LeftOut(str(error)) from error
    relations = {}
    for name, pairs in lists.relations().items():
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        if len(known) >= MIN_PAIRS:
            relations[name] = known
    if len(relations) < 2:
        raise LeftOut(
            f"of {len(lists.RELATIONS)} bundled relations the vocabulary holds {len(relations)} "
            f"with {MIN_PAIRS} pairs or more of whole words"
        )
    hooks = ["embed", *(f"resid_post.{layer}" for layer in range(job.model.n_layers))]
    found = layer_spaces(job.model, vocabulary, hooks)
    spaces = {hook: space.centred() for hook, space in zip(hooks, found.values(), strict=True)}
    examples = {}
    for text in EXPRESSIONS:
        plus, minus = expression([text])
        try:
            in_vocabulary([*plus, *minus], vocabulary)
        except UnknownItemError:
            continue
        examples[text] = layer_answers(job.model, plus, minus)
    return Analogies(
        arithmetic=choose_and_score(spaces, relations, "3cosadd", seed=job.seed),
        class_aware=choose_and_score(spaces, relations, "lrcos", by="honest", seed=job.seed),
        n_relations=len(relations), examples=examples,
    )  # fmt: skip


def topics(job: Job, n: int = 240) -> Mapped:
    """Lay sentences of three topics on the two axes of largest variance, with what the map keeps."""
    data = generator.labelled("topic", split="held_out", n=n, seed=job.seed)
    texts = list(dict.fromkeys(zip(data.texts, data.labels, strict=True)))  # a sentence may come twice
    sentences, labels = (list(part) for part in zip(*texts, strict=True))
    x = vectors(job, sentences)
    drawn = pca_map(x)
    return Mapped(
        points=drawn.points, explained=drawn.explained.tolist(), labels=labels, texts=sentences,
        quality=map_quality(x, drawn.points, labels, seed=job.seed),
    )  # fmt: skip

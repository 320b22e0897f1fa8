"""Analogies: the answer to one, and honest scores over many.

The usual score leaves the query words out of the candidates, which does most of the work (Rogers et al. 2017). So every
score here comes three times: as usual (`accuracy`), with nothing left out (`honest`), and for the nearest neighbour of
b alone (`only_b`), which knows nothing of the relation.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.space.neighbors import BLOCK_FLOATS, Space, SpaceError, mask_rows, nearest, top, unit_rows
from interp.space.scores import AnalogyError, AnalogyResult, Asked, LayerChoice, Tally, halves, summarise
from interp.space.solvers import EPSILON, METHODS, PAIRS_METHODS, QUESTION_METHODS

Pairs = Sequence[tuple[str, str]]
Question = tuple[str, str, str, str]


def most_similar(
    space: Space,
    positive: str | Sequence[str] = (),
    negative: str | Sequence[str] = (),
    topn: int = 10,
    *,
    method: str = "3cosadd",
    exclude: bool = True,
) -> list[tuple[str, float]]:
    """Return the `topn` items nearest to sum(positive) - sum(negative) of unit vectors, with their scores.

    "3cosadd" scores with the cosine, "3cosmul" with the product of (1 + cos) / 2. `exclude=False` lets the query words
    themselves answer. Raises UnknownItemError for a word that is not there, AnalogyError where no word or another
    method is given.
    """
    plus, minus = ([words] if isinstance(words, str) else list(words) for words in (positive, negative))
    rows_plus, rows_minus = space.rows(plus), space.rows(minus)
    if not plus and not minus:
        raise AnalogyError("give at least one positive or negative word")
    if method == "3cosadd":
        wanted = space.unit[rows_plus].sum(dim=0) - space.unit[rows_minus].sum(dim=0)
        scores = unit_rows(wanted[None]) @ space.unit.T
    elif method == "3cosmul":
        c = (1 + space.unit[torch.cat([rows_plus, rows_minus])] @ space.unit.T) / 2
        scores = (c[: len(plus)].prod(dim=0) / (c[len(plus) :].prod(dim=0) + EPSILON * bool(minus)))[None]
    else:
        raise AnalogyError(f"most_similar knows '3cosadd' and '3cosmul', not {method!r}; see complete() for the others")
    return _answers(space, scores, torch.cat([rows_plus, rows_minus]), topn, exclude)


def complete(
    space: Space, pairs: Pairs, word: str, *, method: str | None = None, topn: int = 10, exclude: bool = True
) -> list[tuple[str, float]]:
    """Return the `topn` items that stand to `word` as the second of each pair to its first, with their scores.

    The method defaults to lrcos from five pairs on, 3cosavg from two, 3cosmul with one. `exclude=False` lets the words
    of the pairs and `word` itself answer. Raises UnknownItemError, and AnalogyError for a method unfit for the pairs.
    """
    if not pairs:
        raise AnalogyError("give at least one example pair")
    name = _known(method or ("lrcos" if len(pairs) >= 5 else "3cosavg" if len(pairs) > 1 else "3cosmul"))
    sources, targets, b = (space.rows(words) for words in (*zip(*pairs, strict=True), [word]))
    if name in PAIRS_METHODS:
        examples = torch.ones(1, len(pairs), dtype=torch.bool, device=b.device)
        scores = PAIRS_METHODS[name](space.unit, sources, targets, examples, b)
    elif len(pairs) == 1:
        scores = QUESTION_METHODS[name](space.unit, sources, targets, b)
    else:
        raise AnalogyError(f"{name} takes one example pair, not {len(pairs)}; for several: {', '.join(PAIRS_METHODS)}")
    return _answers(space, scores, torch.cat([sources, targets, b]), topn, exclude)


def evaluate(
    space: Space,
    relations: Mapping[str, Pairs],
    method: str = "3cosadd",
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> AnalogyResult:
    """Return accuracy, honest and only-b scores of word-pair relations, each and pooled, with intervals over pairs.

    3cosadd, 3cosmul and pair_direction ask every ordered pair of pairs of a relation. 3cosavg and lrcos ask every pair
    with the others as examples, those that share a word with it left out too; b alone is excluded there. Questions
    whose answer is among the excluded words, or whose two pairs share their source, are not asked but counted
    (`unanswerable`); pairs with a word that the space lacks are listed (`not_covered`). Raises AnalogyError for an
    unknown method, or where nothing could be asked.
    """
    _known(method)
    asked, tallies, reasons = Asked(), [], {}
    for name, pairs in relations.items():
        unique = list(dict.fromkeys((a, b) for a, b in pairs))
        covered = asked.cover(space, name, unique)
        tally = _ask_pairs(space, covered, method) if len(covered) > 1 else None
        if tally is None or not len(tally.hits):
            reasons[name] = f"{len(covered)} of {len(unique)} pairs are covered, of which no question can be made"
        if tally is not None:
            asked.unanswerable += tally.skipped
        if tally is not None and len(tally.hits):
            tallies.append((name, tally))
    protocol = "leave one out" if method in PAIRS_METHODS else "pairs of pairs"
    return summarise(tallies, asked, reasons, method, protocol, len(space), n_boot, seed)


def evaluate_questions(
    space: Space,
    questions: Mapping[str, Sequence[Question]],
    method: str = "3cosadd",
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> AnalogyResult:
    """Return accuracy, honest and only-b scores of ready-made questions a : a' :: b : b', by section and pooled.

    Intervals as in `evaluate`, over the pairs that make up a section. 3cosavg and lrcos answer each different b : b'
    of a section once, from the section's other pairs. Raises as `evaluate` does.
    """
    _known(method)
    if method in PAIRS_METHODS:
        sections = {name: [p for q in rows for p in (q[:2], q[2:])] for name, rows in questions.items()}
        return evaluate(space, sections, method, n_boot=n_boot, seed=seed)
    asked, tallies, reasons = Asked(), [], {}
    for name, rows in questions.items():
        covered = asked.cover(space, name, rows)
        table = space.rows(chain.from_iterable(covered)).reshape(-1, 4)
        answerable = (table[:, 3:] != table[:, :3]).all(dim=1)
        asked.unanswerable += int((~answerable).sum())
        table = table[answerable]
        if not len(table):
            reasons[name] = f"{len(covered)} of {len(rows)} questions are covered, of which none can be answered"
            continue
        pairs, place = table.reshape(-1, 2).unique(dim=0, return_inverse=True)
        first, second = place.reshape(-1, 2).T
        hits = _ask_questions(space, table, method)
        tallies.append((name, Tally(hits=hits.cpu(), first=first.cpu(), second=second.cpu(), n_pairs=len(pairs))))
    return summarise(tallies, asked, reasons, method, "question file", len(space), n_boot, seed)


def choose_and_score(
    spaces: Mapping[str, Space],
    relations: Mapping[str, Pairs],
    method: str = "3cosadd",
    *,
    by: str = "accuracy",
    n_boot: int = 1000,
    seed: int = 0,
) -> LayerChoice:
    """Return the layer that is best (`by` "accuracy" or "honest") on one half of each relation, scored on the other.

    The halves are drawn by `seed` and pairs that share a word stay in one half; questions are asked within a half.
    Every layer's scores on both halves come along. Raises AnalogyError where the layers' items differ, or where nothing
    could be asked.
    """
    layers = list(spaces)
    if not layers:
        raise AnalogyError("give at least one layer")
    if by not in ("accuracy", "honest"):
        raise AnalogyError(f"the layer is chosen by 'accuracy' or 'honest', not {by!r}")
    odd = [name for name in layers if spaces[name].items != spaces[layers[0]].items]
    if odd:
        raise AnalogyError(f"layers must hold the same items in one order, but {odd[0]!r} differs from {layers[0]!r}")
    items = spaces[layers[0]]
    covered = {name: [p for p in pairs if p[0] in items and p[1] in items] for name, pairs in relations.items()}
    missing = {name: tuple(p for p in map(tuple, pairs) if p not in covered[name]) for name, pairs in relations.items()}
    one, other = halves(covered, seed)
    choosing, scoring = (
        {name: evaluate(spaces[name], half, method, n_boot=n_boot, seed=seed) for name in layers}
        for half in (one, other)
    )
    best = max(layers, key=lambda name: getattr(choosing[name], by))
    return LayerChoice(
        layer=best, by=by, choosing=choosing, scoring=scoring, not_covered={k: v for k, v in missing.items() if v}
    )


def read_questions(path: str | Path, *, lower: bool = False) -> dict[str, list[Question]]:
    """Return the questions of a file in Google's format (`: section`, then four words a line) by section.

    Raises AnalogyError, with the line, for a line without four words or before the first section.
    """
    sections: dict[str, list[Question]] = {}
    current: list[Question] | None = None
    with open(path, encoding="utf-8") as lines:
        for number, raw in enumerate(lines, 1):
            line = raw.strip()
            if line.startswith(":"):
                current = sections.setdefault(line[1:].strip(), [])
                continue
            words = (line.lower() if lower else line).split()
            if not words:
                continue
            if len(words) != 4 or current is None:
                fault = "comes before a section" if current is None else f"has {len(words)} words where 4 are wanted"
                raise AnalogyError(f"{path}, line {number} {fault}: {line[:60]!r}")
            current.append((words[0], words[1], words[2], words[3]))
    if not any(sections.values()):
        raise AnalogyError(f"{path} holds no question: expected ': section' and then lines of four words")
    return sections


def _known(method: str) -> str:
    if method not in METHODS:
        raise AnalogyError(f"there is no analogy method {method!r}; there are {', '.join(METHODS)}")
    return method


def _answers(
    space: Space, scores: Float[Tensor, "1 n"], query: Int[Tensor, "e"], topn: int, exclude: bool
) -> list[tuple[str, float]]:
    left = len(space) - (len(query.unique()) if exclude else 0)
    if not 1 <= topn <= left:
        raise SpaceError(f"topn must lie between 1 and the {left} candidates, not {topn}")
    if exclude:
        mask_rows(scores, query[None])
    values, rows = top(scores, topn)
    return [(space.items[row], value) for row, value in zip(rows[0].tolist(), values[0].tolist(), strict=True)]


def _ask_pairs(space: Space, pairs: Pairs, method: str) -> Tally:
    """Ask one relation under the method's protocol."""
    rows = space.rows(chain.from_iterable(pairs)).reshape(-1, 2)
    source, target = rows.T
    if method in QUESTION_METHODS:
        first, second = (source[:, None] != source).nonzero(as_tuple=True)
        table = torch.cat([rows[first], rows[second]], dim=1)
        answerable = (table[:, 3:] != table[:, :3]).all(dim=1)
        n_all = len(pairs) * (len(pairs) - 1)
        table, first, second = table[answerable], first[answerable], second[answerable]
        hits = _ask_questions(space, table, method)
        return Tally(hits.cpu(), first.cpu(), second.cpu(), len(pairs), n_all - len(table))
    # a pair that shares any word with the question's would give its answer's class away or blur it
    examples = (rows[:, None, :, None] != rows[None, :, None, :]).all(dim=3).all(dim=2)
    asked = (examples.any(dim=1) & (source != target)).nonzero()[:, 0]
    hits = _ask_left_out(space, rows, examples, asked, method)
    return Tally(hits.cpu(), asked.cpu(), None, len(pairs), len(pairs) - len(asked))


def _ask_questions(space: Space, table: Int[Tensor, "q 4"], method: str) -> Bool[Tensor, "q 3"]:
    formula = QUESTION_METHODS[method]

    def score(part: Tensor) -> Tensor:
        return formula(space.unit, part[:, 0], part[:, 1], part[:, 2])

    hits = _right(score, table, table[:, :3], table[:, 3], len(space))
    return torch.cat([hits, _only_b(space, table[:, 2], table[:, 3])], dim=1)


def _ask_left_out(space: Space, rows: Tensor, examples: Tensor, asked: Tensor, method: str) -> Bool[Tensor, "q 3"]:
    formula, (source, target) = PAIRS_METHODS[method], rows.T

    def score(part: Tensor) -> Tensor:
        return formula(space.unit, source, target, examples[part], source[part])

    hits = _right(score, asked, source[asked][:, None], target[asked], len(space))
    return torch.cat([hits, _only_b(space, source[asked], target[asked])], dim=1)


def _right(
    score: Callable[[Tensor], Tensor], questions: Tensor, excluded: Tensor, answer: Tensor, n_candidates: int
) -> Bool[Tensor, "q 2"]:
    """Return whether each question is answered right with the excluded rows left out, and with nothing left out."""
    step = max(1, BLOCK_FLOATS // n_candidates)
    hits = torch.zeros(len(questions), 2, dtype=torch.bool, device=answer.device)
    for start in range(0, len(questions), step):
        part = slice(start, start + step)
        scores = score(questions[part])
        hits[part, 1] = scores.argmax(dim=1) == answer[part]
        mask_rows(scores, excluded[part])
        hits[part, 0] = scores.argmax(dim=1) == answer[part]
    return hits


def _only_b(space: Space, b: Int[Tensor, "q"], answer: Int[Tensor, "q"]) -> Bool[Tensor, "q 1"]:
    if not len(b):
        return torch.zeros(0, 1, dtype=torch.bool, device=b.device)
    words, place = b.unique(return_inverse=True)
    neighbour = nearest(space.unit, space.unit[words], 1, metric="dot", exclude=words[:, None]).indices[:, 0]
    return (neighbour[place] == answer)[:, None]

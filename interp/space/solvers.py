"""Analogy formulas: unit vectors and rows of words in, a score for every candidate out.

Notation of a : a' :: b : ?, candidates d, all vectors of length 1.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EPSILON = 0.001  # Levy & Goldberg 2014: keeps 3CosMul's denominator from zero
SLOPE = 20.0  # of the class score's logistic; untuned


def cos_add(
    unit: Float[Tensor, "n d"], a: Int[Tensor, "q"], a2: Int[Tensor, "q"], b: Int[Tensor, "q"]
) -> Float[Tensor, "q n"]:
    """Return cos(d, a' - a + b): 3CosAdd (Mikolov et al. 2013)."""
    return _toward(unit, unit[a2] - unit[a] + unit[b])


def cos_mul(
    unit: Float[Tensor, "n d"], a: Int[Tensor, "q"], a2: Int[Tensor, "q"], b: Int[Tensor, "q"]
) -> Float[Tensor, "q n"]:
    """Return c(d,a') c(d,b) / (c(d,a) + 0.001) with c = (1 + cos) / 2: 3CosMul (Levy & Goldberg 2014, eq. 5)."""
    words, place = torch.stack([a, a2, b]).unique(return_inverse=True)
    c = (unit[words] @ unit.T).add_(1).div_(2)  # one product for all words of the block, then looked up
    return c[place[1]].mul_(c[place[2]]).div_(c[place[0]] + EPSILON)


def pair_direction(
    unit: Float[Tensor, "n d"], a: Int[Tensor, "q"], a2: Int[Tensor, "q"], b: Int[Tensor, "q"]
) -> Float[Tensor, "q n"]:
    """Return cos(d - b, a' - a): PairDirection (Levy & Goldberg 2014, eq. 4); -inf at d = b, a zero offset."""
    direction = unit[a2] - unit[a]
    product = torch.cat([direction, unit[b]]) @ unit.T
    along, cosine = product.chunk(2)
    along = along - (direction * unit[b]).sum(dim=1, keepdim=True)
    length = (2 - 2 * cosine).clamp_min(1e-12).sqrt() * direction.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (along / length).scatter_(1, b[:, None], -torch.inf)


def cos_avg(
    unit: Float[Tensor, "n d"],
    sources: Int[Tensor, "p"],
    targets: Int[Tensor, "p"],
    examples: Bool[Tensor, "q p"],
    b: Int[Tensor, "q"],
) -> Float[Tensor, "q n"]:
    """Return cos(d, b + mean(a' - a)) over the example pairs of each question: 3CosAvg (Drozd et al. 2016)."""
    share = _shares(examples, unit)
    return _toward(unit, unit[b] + share @ (unit[targets] - unit[sources]))


def class_cos(
    unit: Float[Tensor, "n d"],
    sources: Int[Tensor, "p"],
    targets: Int[Tensor, "p"],
    examples: Bool[Tensor, "q p"],
    b: Int[Tensor, "q"],
) -> Float[Tensor, "q n"]:
    """Return P(d is a target) * cos(d, b), the idea of LRCos (Drozd et al. 2016).

    P is a one-line logistic: w = mean target - mean source, P = sigmoid(20 (d.w - (mean target + mean source).w / 2)).
    """
    share = _shares(examples, unit)
    source, target = share @ unit[sources], share @ unit[targets]
    w = target - source
    along, cosine = (torch.cat([w, unit[b]]) @ unit.T).chunk(2)
    midpoint = ((target + source) * w).sum(dim=1, keepdim=True) / 2
    return torch.sigmoid(SLOPE * (along - midpoint)) * cosine


QUESTION_METHODS = {"3cosadd": cos_add, "3cosmul": cos_mul, "pair_direction": pair_direction}
PAIRS_METHODS = {"3cosavg": cos_avg, "lrcos": class_cos}
METHODS = (*QUESTION_METHODS, *PAIRS_METHODS)


def _toward(unit: Tensor, wanted: Tensor) -> Tensor:
    """Return the cosine of every candidate with the wanted vector of each question."""
    return (wanted / wanted.norm(dim=1, keepdim=True).clamp_min(1e-12)) @ unit.T


def _shares(examples: Tensor, unit: Tensor) -> Tensor:
    """Return the weights that average over the example pairs of each question."""
    return examples.to(unit.dtype) / examples.sum(dim=1, keepdim=True)

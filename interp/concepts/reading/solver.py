"""Fit logistic regressions for many training sets and label columns of the same rows at once.

The estimator is that of scikit-learn: minimise w'w / 2 + C * sum log(1 + exp(-y f)) over rows standardised by the
training rows' own mean and deviation, intercept unpenalised. The sets differ in the folds that they leave out, so all
products with the rows are shared, and every Gram matrix is a sum over folds from which some are subtracted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["ConvergenceError", "LogisticFits", "fit_logistic", "training_sets"]

STALLED = 12  # steps without a new best decrement: float32 is exhausted
SLOW = 0.5  # a step that shrinks the decrement by less asks for the Hessian where the weights are now,
SHARED = 4  # rows a coordinate from which the Hessian of all rows serves every training set
WAIT = 4  # this many steps after the first at the soonest, then twice as many each time: one costs ten steps


class ConvergenceError(RuntimeError):
    """A fit did not reach its optimum in the number of steps allowed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LogisticFits:
    """Weights in the units of the rows given, one for each training set and label column."""

    weight: Float[Tensor, "sets d columns"]  # float64, on the CPU
    bias: Float[Tensor, "sets columns"]
    steps: int
    grams: int  # weighted Gram matrices of all rows that were computed
    decrement: float  # largest sqrt(g' H^-1 g) left, over its value at w = 0


def training_sets(n_folds: int, nested: bool = False) -> list[tuple[int, ...]]:
    """Return the folds that each training set leaves out: one each, then, where nested, each pair."""
    single = [(k,) for k in range(n_folds)]
    pairs = [(k, m) for k in range(n_folds) for m in range(k + 1, n_folds)]
    return single + pairs if nested else single


def fit_logistic(
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "n columns"] | Int[Tensor, "n columns"],
    folds: Int[Tensor, " n"] | None = None,
    left_out: Sequence[tuple[int, ...]] = ((),),
    *,
    C: float | int = 1.0,
    tol: float = 1e-4,
    max_steps: int = 1000,
    dtype: torch.dtype = torch.float32,
) -> LogisticFits:
    """Return the optimum for each training set (all folds but those left out) and each column of 0/1 labels.

    Preconditioned nonlinear conjugate gradients: the Hessian p(1 - p) of the rows, at first bounded by 1/4 (Boehning
    1988) and computed anew where the weights have moved so far that it misleads, is factorised: once for all sets where
    rows are many, else for each (as a matrix of the rows where these are fewer than d); a step costs two products with
    the rows. A fit has converged when the Newton decrement sqrt(g' H^-1 g), corrected by the curvature met on the way,
    is tol times that at w = 0. Where dtype float32 cannot reach it, the steps go on in float64. X's device is used.
    Raises ValueError where a training set holds one class only or an argument makes no sense, ConvergenceError.
    """
    if not C > 0:
        raise ValueError(f"C is {C}; the inverse penalty must be positive")
    weight: Tensor | None = None
    steps = grams = 0
    for kind in dict.fromkeys((dtype, torch.float64)):
        rows = _Rows.of(X, Y, folds, left_out, kind)
        solver = _Descent(rows, float(C))
        weight, reached = solver.run(weight, tol, max_steps - steps)
        steps, grams = steps + solver.steps, grams + solver.grams
        if reached <= tol:
            raw = weight[:, :, :-1].double() / rows.deviation
            bias = weight[:, :, -1].double() - raw @ rows.mean
            return LogisticFits(weight=raw.mT.cpu(), bias=bias.cpu(), steps=steps, grams=grams, decrement=reached)
    raise ConvergenceError(
        f"logistic regression stopped at {reached:.1e} of its first decrement after {steps} steps, {tol:.1e} is asked "
        f"for: take a smaller C than {C}, a larger tol or more steps"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """Rows in the order of their folds, standardised by the mean and deviation of all; the last column is 1."""

    F: Tensor  # [n, d + 1]
    Y: Tensor  # [columns, n]
    keep: Tensor  # [sets, 1, n]: 1 where a row is in a training set
    penalty: Tensor  # [sets, 1, d + 1]: variance in the training set, 0 for the intercept
    bounds: list[int]  # where folds begin, and n
    left_out: list[tuple[int, ...]]
    mean: Tensor  # float64
    deviation: Tensor

    @classmethod
    def of(
        cls, X: Tensor, Y: Tensor, folds: Tensor | None, left_out: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> "_Rows":
        number = torch.zeros(len(X), dtype=torch.long) if folds is None else folds.cpu()
        n_folds = int(number.max()) + 1
        if int(number.min()) < 0 or any(k not in range(n_folds) for out in left_out for k in out):
            raise ValueError(f"folds are numbered from 0, and those left out among {n_folds}: {list(left_out)} is not")
        order = torch.argsort(number, stable=True)
        number = number[order]
        Y = Y[order.to(Y.device)].to(X.device, dtype).T.contiguous()
        out = torch.tensor([[k in one for k in range(n_folds)] for one in left_out])
        keep = (~out[:, number]).to(X.device, dtype)
        _check_classes(Y, keep)
        F, mean, deviation = standardised(X[order.to(X.device)], dtype)
        bounds = [0, *torch.bincount(number, minlength=n_folds).cumsum(0).tolist()]
        sizes = keep.new_tensor(bounds).diff()
        squares = torch.stack([F[a:b].square().sum(0) for a, b in pairwise(bounds)])
        inside = (~out).to(keep) / ((~out).to(keep) @ sizes)[:, None]
        means = inside @ torch.stack([F[a:b].sum(0) for a, b in pairwise(bounds)])
        variance = inside @ squares - means.square()
        penalty = torch.where(variance > 1e-6, variance, 1.0)  # constant there: any penalty sets its weight to 0
        penalty[:, -1] = 0
        return cls(
            F=F,
            Y=Y,
            keep=keep[:, None],
            penalty=penalty[:, None],
            bounds=bounds,
            left_out=list(left_out),
            mean=mean,
            deviation=deviation,
        )


def standardised(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows standardised over all of them, a column of ones after them; and mean and deviation (float64).

    A constant coordinate is centred and left at that.
    """
    mean = X.mean(0, dtype=torch.float64)
    F = torch.empty(len(X), X.shape[1] + 1, dtype=dtype, device=X.device)
    torch.sub(X, mean.to(X.dtype), out=F[:, :-1])
    deviation = (F[:, :-1].square().sum(0, dtype=torch.float64) / len(X)).sqrt()
    deviation = torch.where(deviation <= 1e-12 * mean.abs().clamp_min(1e-30), 1.0, deviation)
    F[:, :-1] /= deviation.to(dtype)
    F[:, -1] = 1
    return F, mean.to(X.dtype).double(), deviation


def _check_classes(Y: Tensor, keep: Tensor) -> None:
    if not bool(((Y == 0) | (Y == 1)).all()):
        raise ValueError("labels of a logistic regression are 0 and 1")
    positive = keep @ Y.T
    if bool(((positive == 0) | (positive == keep.sum(1, keepdim=True))).any()):
        raise ValueError("a training set holds one class only: use fewer folds, or more groups of the rarer class")


class _Descent:
    """One run of preconditioned conjugate gradients; states are [set, column, d + 1], logits [set, column, n].

    In this layout both products with the rows run over contiguous memory: turned round they take ten times as long.
    """

    def __init__(self, rows: _Rows, C: float) -> None:
        self.F, self.Y, self.keep, self.penalty = rows.F, rows.Y, rows.keep, rows.penalty
        self.C, self.rows = C, rows
        self.tiny = torch.finfo(self.F.dtype).tiny
        self.steps = self.grams = 0

    def run(self, W: Tensor | None, tol: float, max_steps: int) -> tuple[Tensor, float]:
        """Return weights and the largest relative decrement; stops where it is below tol or falls no further."""
        zero = self.F.new_zeros(len(self.keep), len(self.Y), self.F.shape[1])
        solve = self._preconditioner(None)
        start = self._gradient(zero, self._residual(_times(zero, self.F.T)))
        first = self._decrement(start, solve(start)).clamp_min(self.tiny)
        W = zero if W is None else W.to(self.F.dtype)
        L = _times(W, self.F.T)
        G = self._gradient(W, self._residual(L))
        Z = solve(G)
        P, MP = -Z, -G  # MP: the factorised Hessian times P
        trust = torch.ones_like(first)  # least seen of p'Hp over p'Mp: M above H makes the decrement look small
        reached = best = float((self._decrement(G, Z) / first).max())
        since = waited = 0
        slow = False
        patience = STALLED if self.F.dtype == torch.float32 else max_steps
        while reached > tol and self.steps < max_steps and since < patience:
            W, L, R, curve = self._line_search(W, L, P, G)
            trust = torch.minimum(trust, curve / (P * MP).sum(2).clamp_min(self.tiny))
            old, G = G, self._gradient(W, R)
            waited += 1
            fresh = waited >= WAIT * 2 ** (self.grams - 1) and reached > tol * SLOW**WAIT and slow
            if fresh:
                solve, waited = self._preconditioner(R), 0
                trust = torch.ones_like(first)
            previous, Z = Z, solve(G)
            beta = ((G - old) * Z).sum(2) / (old * previous).sum(2).clamp_min(self.tiny)
            beta = torch.zeros_like(beta) if fresh else beta.clamp(0, 10)  # Polak-Ribiere, never negative
            P = beta[:, :, None] * P - Z
            uphill = (P * G).sum(2, keepdim=True) >= 0
            P, MP = torch.where(uphill, -Z, P), torch.where(uphill, -G, beta[:, :, None] * MP - G)
            before = reached
            reached = float((self._decrement(G, Z) / first / trust.clamp_min(1e-12).sqrt()).max())
            slow = reached > SLOW * before
            since = 0 if reached < best else since + 1
            best = min(best, reached)
            self.steps += 1
        return W, reached

    def _gradient(self, W: Tensor, R: Tensor) -> Tensor:
        return self.C * _times(R, self.F) + self.penalty * W

    def _residual(self, L: Tensor) -> Tensor:
        return (torch.sigmoid(L) - self.Y) * self.keep

    def _curvature(self, R: Tensor) -> Tensor:
        p = (R + self.Y) * self.keep
        return p * (1 - p)

    @staticmethod
    def _decrement(G: Tensor, Z: Tensor) -> Tensor:
        return (G * Z).sum(2).clamp_min(0).sqrt()

    def _line_search(self, W: Tensor, L: Tensor, P: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Go to where the slope along P is a tenth of what it was: cheap, since the logits are linear in the step.

        Returns weights, logits and residuals there, and the curvature along P at the start.
        """
        U = _times(P, self.F.T)
        here = (G * P).sum(2)
        linear, square = (self.penalty * W * P).sum(2), (self.penalty * P * P).sum(2)
        curve = start = square + self.C * (self._curvature(self._residual(L)) * U * U).sum(2)
        step = -here / curve.clamp_min(self.tiny)
        low, high = torch.zeros_like(step), torch.full_like(step, float("inf"))
        moved, R = L, L
        for turn in range(8):
            moved = torch.addcmul(L, U, step[:, :, None])
            R = self._residual(moved)
            slope = linear + step * square + self.C * (R * U).sum(2)
            if turn == 7 or bool((slope.abs() <= 0.1 * here.abs() + self.tiny).all()):
                break
            curve = square + self.C * (self._curvature(R) * U * U).sum(2)
            low, high = torch.where(slope < 0, step, low), torch.where(slope < 0, high, step)
            newton = step - slope / curve.clamp_min(self.tiny)
            inside = (newton > low) & (newton < high)
            step = torch.where(inside, newton, torch.where(high.isinf(), 2 * low, (low + high) / 2))
        return torch.addcmul(W, P, step[:, :, None]), moved, R, start

    def _preconditioner(self, R: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return the solution with the Hessian whose p(1 - p) is the mean over the sets and columns (None: 1/4)."""
        if R is None:
            weights = torch.full_like(self.F[:, 0], 0.25)
        else:
            weights = self._curvature(R).mean(1).sum(0) / self.keep.sum(0)[0].clamp_min(1)
        self.grams += 1
        return self._by_rows(weights) if int(self.keep.sum(2).max()) < self.F.shape[1] else self._by_columns(weights)

    def _by_columns(self, weights: Tensor) -> Callable[[Tensor], Tensor]:
        scaled = self.F * weights[:, None].sqrt()
        if len(self.F) >= SHARED * self.F.shape[1]:
            H = _gram(scaled).mul_(self.C * float(self.keep.mean()))
            inverse = torch.cholesky_inverse(_factor(H, self.penalty.mean(0)[0]))
            return lambda G: G @ inverse
        parts = [_gram(scaled[a:b]) for a, b in pairwise(self.rows.bounds)]
        total = torch.stack(parts).sum(0)
        inverses = torch.empty(len(self.keep), *total.shape, dtype=total.dtype, device=total.device)
        for i, out in enumerate(self.rows.left_out):
            H = torch.sub(total, sum((parts[k] for k in out), torch.zeros_like(total))).mul_(self.C)
            inverses[i] = torch.cholesky_inverse(_factor(H, self.penalty[i, 0]))
        return lambda G: G @ inverses

    def _by_rows(self, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """The Woodbury identity: (D + C A'A)^-1 = D^-1 - D^-1 A' (I / C + A D^-1 A')^-1 A D^-1, A = sqrt(weights) F."""
        inverse = torch.where(self.penalty > 0, 1 / self.penalty.clamp_min(1e-30), 10.0)  # a mild one for the intercept
        A = self.F * weights[:, None].sqrt()
        inner = A.new_empty(len(self.keep), len(A), len(A))
        for i, (keep, scale) in enumerate(zip(self.keep, inverse, strict=True)):
            half = A * keep.T * scale.sqrt()
            inner[i] = torch.cholesky_inverse(_factor(half @ half.T, torch.full_like(keep[0], 1 / self.C)))

        def solve(G: Tensor) -> Tensor:
            scaled = inverse * G
            seen = self.keep * (self.keep * _times(scaled, A.T) @ inner)
            return scaled - inverse * _times(seen, A)

        return solve


def _times(states: Tensor, A: Tensor) -> Tensor:
    return (states.flatten(0, 1) @ A).view(*states.shape[:2], A.shape[1])


def _gram(A: Tensor) -> Tensor:
    """A' A from the blocks on and above the diagonal."""
    G = A.new_empty(A.shape[1], A.shape[1])
    edges = [i * A.shape[1] // 3 for i in range(4)]
    for a, b in pairwise(edges):
        block = A[:, a:b].T @ A[:, a:]
        G[a:b, a:], G[a:, a:b] = block, block.T
    return G


def _factor(H: Tensor, diagonal: Tensor) -> Tensor:
    """Cholesky factor of H + diag; a little is added where rounding left it indefinite (it only guides the steps)."""
    H.diagonal().add_(diagonal)
    size, jitter = float(H.diagonal().mean()), 0.0
    while True:
        L, info = torch.linalg.cholesky_ex(H)
        if int(info) == 0 and bool(torch.isfinite(L.diagonal()).all()):
            return L
        if not jitter < 1:
            raise ConvergenceError("the Hessian of a logistic regression is not finite: are the rows?")
        H.diagonal().add_(size * ((more := max(10 * jitter, 1e-7)) - jitter))
        jitter = more

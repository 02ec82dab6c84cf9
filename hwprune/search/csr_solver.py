"""Joint sparse codes of several sensors: shared rows, class blocks, low-rank interference, sparse noise.

Sensors m = 1..M record one event. D^m [n_m, P] holds the same P training samples as sensor m saw them, Y^m [n_m, T_m]
the event's segments, and A = [A^1 .. A^M] [P, ΣT] says which samples make up the event. A row of A is kept by all
sensors or by none:

    minimise  ½ ‖Y - DA - L - E‖²  +  λ Σ_i r_i ‖a_i‖  +  λ_G Σ_c ‖A_c‖_F  +  λ_L ‖L‖_*  +  λ_E ‖E‖_1        noisy
    minimise  the same without the first term,  subject to  Y = DA + L + E                                  exact

Dao, Nguyen, Nasrabadi, Tran, "Collaborative Multi-sensor Classification via Sparsity-based Representation" (arXiv
1410.7876) has these classes of model, the classifier, and kernels. The equations, the steps below and their conditions
are a reconstruction, derived and checked by the tests. Three solvers, which share nothing but the proximal steps:

    ladmm   linearised alternating directions on the constraint; step below 1 / max σ(D^m)². (L, the noise, E) are one
            block, solved in closed form unless both L and E are there, so that two blocks alternate and it converges
    admm    copy-splitting: A is solved exactly with a factorisation made once, its copy is shrunk (noisy only)
    fista   accelerated gradient with L and E eliminated, restarted (O'Donoghue, Candès 2015): the oracle (noisy only)

Rows first, then class blocks, is the proximal step of both penalties together; the other order is not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from hwprune.errors import InvalidInput

Solver = Literal["fista", "admm", "ladmm"]

_CHECK_EVERY = 10  # iterations between looks at the optimality conditions
_INNER = 12  # alternations of L and E where both are there
_WATCH = 100  # iterations after which too large a step has to have made progress


@dataclass(frozen=True)
class Penalty:
    """Weights of the penalties. rows: λ. blocks: λ_G. low_rank: λ_L. noise: λ_E. Infinite: that part is zero."""

    rows: float
    blocks: float = 0.0
    low_rank: float = math.inf
    noise: float = math.inf

    def __post_init__(self) -> None:
        if not (self.rows >= 0 and self.blocks >= 0 and self.low_rank > 0 and self.noise > 0):
            raise InvalidInput(f"{self} must have rows and blocks of 0 or more, low_rank and noise above 0")
        if not (0 < self.rows + self.blocks < math.inf):
            raise InvalidInput(f"{self} must penalise rows or blocks, by a finite amount")


@dataclass(frozen=True)
class Code:
    """What a solver found.

    rows: A [P, ΣT]. low_rank, noise: L and E [n, ΣT], rows beyond a sensor's n_m zero. objective: of the model.
    residual: ‖Y - DA - L - E‖ / ‖Y‖; 0 is feasible for the exact model. kkt: largest violation of the optimality
    conditions, relative to the penalties. step: that the linearised solver ended with, relative to the bound.
    """

    rows: Tensor
    low_rank: Tensor
    noise: Tensor
    objective: float
    residual: float
    kkt: float
    iterations: int
    step: float

    @property
    def support(self) -> Tensor:
        """Indices of the rows that are not zero, ascending."""
        return torch.nonzero(self.rows.norm(dim=1) > 0)[:, 0]


def shrink(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Proximal step of ‖·‖_1, entry by entry."""
    return x.sign() * (x.abs() - threshold).clamp_min(0)


def shrink_rows(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Proximal step of Σ ‖row‖; ``threshold`` is a number or one per row. [P, T]"""
    norms = x.norm(dim=1)
    scale: Tensor = (1 - threshold / norms.clamp_min(torch.finfo(x.dtype).tiny)).clamp_min(0)
    return x * scale[:, None]


def shrink_blocks(x: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Proximal step of Σ ‖block‖_F over the rows that share a label. [P, T]"""
    squares = x.new_zeros(int(labels.max()) + 1).index_add_(0, labels, x.square().sum(1))
    scale = (1 - threshold / squares.sqrt().clamp_min(torch.finfo(x.dtype).tiny)).clamp_min(0)
    return x * scale[labels][:, None]


def shrink_singular_values(x: Tensor, threshold: float) -> Tensor:
    """Proximal step of the nuclear norm."""
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    shrunk: Tensor = (left * (values - threshold).clamp_min(0)) @ right
    return shrunk


def solve(
    dictionaries: Sequence[Tensor],
    signals: Sequence[Tensor],
    penalty: Penalty,
    *,
    labels: Tensor | None = None,
    row_weight: Tensor | None = None,
    sensor_weight: Sequence[float] | None = None,
    method: Solver = "fista",
    exact: bool = False,
    start: Tensor | None = None,
    rho: float | None = None,
    step: float = 0.99,
    iterations: int = 5000,
    tolerance: float = 1e-8,
) -> Code:
    """The joint code of all sensors.

    L is one matrix of low rank over all sensors where they have equally many features, and one per sensor otherwise.

    Args:
        dictionaries: D^m [n_m, P]. signals: Y^m [n_m, T_m]. Both in float64 where optimality is to be proven.
        labels: [P] class of each atom, for ``penalty.blocks``. row_weight: [P], r; ones by default.
        sensor_weight: [M], w; ones by default. What sensor m leaves unexplained counts w_m times, ½ w_m ‖·‖², as if
            D^m and Y^m were √w_m times as large; so do L^m and E^m within their penalties, which else would take in
            place of a heavy sensor's code what that sensor has to say.
        exact: the model with a constraint, which only ``ladmm`` solves.
        start: A to begin with.
        rho: penalty of the splitting; by default a tenth of max σ² for ``admm``, and 1 for ``ladmm``.
        step: of ``ladmm``, relative to 1 / max σ². From 1 on nothing guarantees that it converges: it is watched, and
            halved where the residual stops falling.
        tolerance: of the optimality conditions and, for the exact model, of the residual.

    Raises:
        InvalidInput: shapes that do not fit, an unknown method, or one that does not solve the model.
    """
    if method not in get_args(Solver):
        raise InvalidInput(f"method {method!r} is unknown; possible: {', '.join(get_args(Solver))}")
    if exact and method != "ladmm":
        raise InvalidInput(f"{method} solves the noisy model; the exact one needs method='ladmm'")
    if step <= 0 or iterations < 1 or (rho is not None and rho <= 0):
        raise InvalidInput(f"step={step}, iterations={iterations} and rho={rho} must be positive")
    problem = _Problem(dictionaries, signals, penalty, labels, row_weight, exact, sensor_weight)
    if start is not None and start.shape != (problem.atoms, problem.signal.shape[1]):
        raise InvalidInput(f"start has shape {tuple(start.shape)}; it needs {(problem.atoms, problem.signal.shape[1])}")
    rows = problem.zeros() if start is None else start.clone()
    if method == "fista":
        code = _fista(problem, rows, iterations, tolerance)
    elif method == "admm":
        code = _admm(problem, rows, rho or 0.1 * problem.lipschitz, iterations, tolerance)
    else:
        code = _ladmm(problem, rows, rho or 1.0, step, iterations, tolerance)
    return replace(code, low_rank=code.low_rank / problem.roots, noise=code.noise / problem.roots)


def largest_rows(dictionaries: Sequence[Tensor], signals: Sequence[Tensor], row_weight: Tensor | None = None) -> float:
    """The least λ at which no row is used, blocks, L and E aside: max_i ‖(D'Y)_i‖ / r_i."""
    gradient = torch.cat([d.T @ y for d, y in zip(dictionaries, signals, strict=True)], 1).norm(dim=1)
    return float((gradient if row_weight is None else gradient / row_weight).max())


def path(
    dictionaries: Sequence[Tensor],
    signals: Sequence[Tensor],
    *,
    count: int = 20,
    least: float = 0.01,
    row_weight: Tensor | None = None,
    low_rank: float = math.inf,
    tolerance: float = 1e-8,
    screen: bool = True,
) -> list[tuple[float, Code]]:
    """Codes for λ falling from the one that uses no row to ``least`` of it, in ``count`` equal ratios.

    Each starts from the one before. With ``screen``, rows that the sequential strong rule (Tibshirani et al. 2012)
    leaves out are not computed with, and taken back in where the optimality conditions say that the rule was wrong.
    """
    top = largest_rows(dictionaries, signals, row_weight)
    weight = torch.ones_like(dictionaries[0][0]) if row_weight is None else row_weight
    found: list[tuple[float, Code]] = []
    before = top
    code: Code | None = None
    for ratio in torch.logspace(0, math.log10(least), count, dtype=torch.float64).tolist():
        level = top * ratio
        problem = _Problem(dictionaries, signals, Penalty(level, low_rank=low_rank), None, row_weight, exact=False)
        rows = problem.zeros() if code is None else code.rows
        pull = problem.transposed(problem.eliminated(rows)[0]).norm(dim=1) / weight
        live = (pull >= 2 * level - before) | (rows.norm(dim=1) > 0) if screen else torch.ones_like(pull).bool()
        iterations = 0
        while True:
            rows = problem.zeros()
            if live.any():
                start = found[-1][1].rows[live] if found else None
                some = solve(
                    [d[:, live] for d in dictionaries],
                    signals,
                    Penalty(level, low_rank=low_rank),
                    row_weight=weight[live],
                    start=start,
                    tolerance=tolerance,
                )
                rows[live], iterations = some.rows, iterations + some.iterations
            pull = problem.transposed(problem.eliminated(rows)[0]).norm(dim=1) / weight
            missed = ~live & (pull > level * (1 + tolerance))
            if not missed.any():
                break
            live |= missed
        code = problem.finished(rows, *problem.others(rows), None, iterations)
        found.append((level, code))
        before = level
    return found


def from_gram(gram: Tensor, cross: Tensor, jitter: float = 1e-12) -> tuple[Tensor, Tensor]:
    """A dictionary and signals with D'D = ``gram`` [P, P] and D'Y = ``cross`` [P, T], at most P rows each.

    With a kernel's matrices in place of inner products this is the kernel form of every model here: D = K^½, Y =
    K^-½ K_DY up to a rotation, which nothing depends on. What Y has outside the atoms' span is lost, and constant.
    Eigenvalues below ``jitter`` of the largest count as zero.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = values > jitter * float(values[-1])
    roots, basis = values[kept].sqrt(), vectors[:, kept]
    return roots[:, None] * basis.T, (basis.T @ cross) / roots[:, None]


class Classifier:
    """The multi-sensor classifier: the class whose atoms alone leave the least of all sensors unexplained.

    ``ĉ = argmin_c Σ_m ‖Y^m - D^m_c A^m_c - L^m - E^m‖²``, where A, L and E are the joint code of the event.

    Args:
        dictionaries: D^m [n_m, P]. labels: [P] int64, classes from 0.
        penalty: the model; ``exact`` is its form with a constraint.
    """

    def __init__(
        self,
        dictionaries: Sequence[Tensor],
        labels: Tensor,
        penalty: Penalty,
        *,
        exact: bool = False,
        iterations: int = 500,
        tolerance: float = 1e-5,
    ) -> None:
        self.dictionaries, self.labels, self.penalty = list(dictionaries), labels, penalty
        self.exact, self.iterations, self.tolerance = exact, iterations, tolerance

    def residuals(self, signals: Sequence[Tensor]) -> Tensor:
        """What every class leaves unexplained of an event Y^m [n_m, T_m]. [classes]"""
        code = solve(
            self.dictionaries,
            signals,
            self.penalty,
            labels=self.labels,
            method="ladmm" if self.exact else "fista",
            exact=self.exact,
            iterations=self.iterations,
            tolerance=self.tolerance,
        )
        problem = _Problem(self.dictionaries, signals, self.penalty, self.labels, None, self.exact)
        clean = problem.signal - code.low_rank - code.noise
        classes = range(int(self.labels.max()) + 1)
        left = [clean - problem.reconstructed(code.rows * (self.labels == c)[:, None]) for c in classes]
        return torch.stack([part.square().sum() for part in left])

    def __call__(self, signals: Sequence[Tensor]) -> int:
        """The class of an event."""
        return int(self.residuals(signals).argmin())


class _Problem:
    """The data of one call, sensors padded to equally many features, and what all solvers need of them."""

    def __init__(
        self,
        dictionaries: Sequence[Tensor],
        signals: Sequence[Tensor],
        penalty: Penalty,
        labels: Tensor | None,
        row_weight: Tensor | None,
        exact: bool,
        sensor_weight: Sequence[float] | None = None,
    ) -> None:
        if not dictionaries or len(dictionaries) != len(signals):
            raise InvalidInput(f"{len(dictionaries)} dictionaries and {len(signals)} signals; give as many, at least 1")
        atoms = dictionaries[0].shape[1]
        for m, (d, y) in enumerate(zip(dictionaries, signals, strict=True)):
            if d.ndim != 2 or y.ndim != 2 or d.shape[1] != atoms or d.shape[0] != y.shape[0]:
                raise InvalidInput(
                    f"sensor {m} has a dictionary {tuple(d.shape)} and signals {tuple(y.shape)}; they need equally "
                    f"many rows, and every dictionary {atoms} columns"
                )
        if penalty.blocks and (labels is None or labels.shape != (atoms,)):
            raise InvalidInput(f"penalty.blocks needs labels of shape ({atoms},)")
        trust = [1.0] * len(signals) if sensor_weight is None else list(sensor_weight)
        if len(trust) != len(signals) or not all(0 < w < math.inf for w in trust):
            raise InvalidInput(f"sensor_weight={trust} needs a finite number above 0 for each of {len(signals)}")
        features = [d.shape[0] for d in dictionaries]
        self.penalty, self.labels, self.exact, self.atoms = penalty, labels, exact, atoms
        self.weight: Tensor | float = 1.0 if row_weight is None else row_weight
        self.segments = [y.shape[1] for y in signals]
        roots = torch.tensor(trust, dtype=signals[0].dtype, device=signals[0].device).sqrt()  # [M]
        self.roots = roots.repeat_interleave(torch.tensor(self.segments, device=roots.device))  # [ΣT]
        self.dictionaries = [root * _padded(d, max(features)) for root, d in zip(roots, dictionaries, strict=True)]
        self.signal = torch.cat([_padded(y, max(features)) for y in signals], 1) * self.roots  # [n, ΣT]
        self.joint = len(set(features)) == 1
        self.lipschitz = max(float(torch.linalg.matrix_norm(d, 2)) ** 2 for d in self.dictionaries)

    def zeros(self) -> Tensor:
        """A without any atom. [P, ΣT]"""
        return self.signal.new_zeros(self.atoms, self.signal.shape[1])

    def reconstructed(self, rows: Tensor) -> Tensor:
        """D A. [n, ΣT]"""
        return torch.cat(
            [d @ a for d, a in zip(self.dictionaries, torch.split(rows, self.segments, 1), strict=True)], 1
        )

    def transposed(self, residual: Tensor) -> Tensor:
        """D' R. [P, ΣT]"""
        parts = torch.split(residual, self.segments, 1)
        return torch.cat([d.T @ r for d, r in zip(self.dictionaries, parts, strict=True)], 1)

    def shrunk(self, rows: Tensor, step: float) -> Tensor:
        """Proximal step of both penalties of A: rows first, then blocks. [P, ΣT]"""
        rows = shrink_rows(rows, step * self.penalty.rows * self.weight)
        if self.penalty.blocks and self.labels is not None:
            rows = shrink_blocks(rows, self.labels, step * self.penalty.blocks)
        return rows

    def low_rank(self, x: Tensor, step: float) -> Tensor:
        """Proximal step of λ_L ‖·‖_*. [n, ΣT]"""
        if math.isinf(self.penalty.low_rank):
            return torch.zeros_like(x)
        threshold = step * self.penalty.low_rank
        if self.joint:
            return shrink_singular_values(x, threshold)
        return torch.cat([shrink_singular_values(part, threshold) for part in torch.split(x, self.segments, 1)], 1)

    def noise(self, x: Tensor, step: float) -> Tensor:
        """Proximal step of λ_E ‖·‖_1. [n, ΣT]"""
        return torch.zeros_like(x) if math.isinf(self.penalty.noise) else shrink(x, step * self.penalty.noise)

    def split(self, x: Tensor, step: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """L and E that minimise ½ ‖x - L - E‖² + step (λ_L ‖L‖_* + λ_E ‖E‖_1), starting from ``noise``."""
        noise = torch.zeros_like(x) if noise is None else noise
        both = not (math.isinf(self.penalty.low_rank) or math.isinf(self.penalty.noise))
        for _ in range(_INNER if both else 1):
            low = self.low_rank(x - noise, step)
            noise = self.noise(x - low, step)
        return low, noise

    def others(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """L and E that go with A in the noisy model."""
        return self.split(self.signal - self.reconstructed(rows), 1.0)

    def eliminated(self, rows: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What remains of the signal, minus the gradient of the eliminated loss by D A; L; E."""
        rest = self.signal - self.reconstructed(rows)
        low, noise = self.split(rest, 1.0, noise)
        return rest - low - noise, low, noise

    def finished(
        self, rows: Tensor, low: Tensor, noise: Tensor, dual: Tensor | None, iterations: int, step: float = 1.0
    ) -> Code:
        """The figures of an iterate; ``dual`` is the multiplier of the constraint, the residual itself without one."""
        rest = self.signal - self.reconstructed(rows) - low - noise
        dual = rest if dual is None else dual
        penalty, weight = self.penalty, self.weight
        objective = penalty.rows * float((weight * rows.norm(dim=1)).sum())
        if penalty.blocks and self.labels is not None:
            squares = rows.new_zeros(int(self.labels.max()) + 1).index_add_(0, self.labels, rows.square().sum(1))
            objective += penalty.blocks * float(squares.sqrt().sum())
        violation = [rows - self.shrunk(rows + self.transposed(dual) / self.lipschitz, 1 / self.lipschitz)]
        violations = [float(violation[0].norm(dim=1).max()) * self.lipschitz / (penalty.rows + penalty.blocks)]
        if not math.isinf(penalty.low_rank):
            parts = [low] if self.joint else list(torch.split(low, self.segments, 1))
            objective += penalty.low_rank * sum(float(torch.linalg.matrix_norm(part, "nuc")) for part in parts)
            violations.append(float((low - self.low_rank(low + dual, 1.0)).norm()) / penalty.low_rank)
        if not math.isinf(penalty.noise):
            objective += penalty.noise * float(noise.abs().sum())
            violations.append(float((noise - self.noise(noise + dual, 1.0)).abs().max()) / penalty.noise)
        if not self.exact:
            objective += 0.5 * float(rest.square().sum())
        scale = max(float(self.signal.norm()), torch.finfo(torch.float64).tiny)
        return Code(rows, low, noise, objective, float(rest.norm()) / scale, max(violations), iterations, step)

    def done(self, code: Code, tolerance: float) -> bool:
        """Whether an iterate is optimal, and feasible where it must be."""
        return code.kkt < tolerance and (not self.exact or code.residual < tolerance)


def _fista(problem: _Problem, rows: Tensor, iterations: int, tolerance: float) -> Code:
    step, momentum, point = 1 / problem.lipschitz, 1.0, rows
    noise: Tensor | None = None
    for iteration in range(1, iterations + 1):
        rest, low, noise = problem.eliminated(point, noise)
        moved = problem.shrunk(point + step * problem.transposed(rest), step)
        if float(((point - moved) * (moved - rows)).sum()) > 0:  # the momentum points uphill: begin anew
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        point = moved + (momentum - 1) / following * (moved - rows)
        rows, momentum = moved, following
        if iteration % _CHECK_EVERY == 0 or iteration == iterations:
            _, low, noise = problem.eliminated(rows, noise)
            code = problem.finished(rows, low, noise, None, iteration)
            if problem.done(code, tolerance):
                break
    return code


def _admm(problem: _Problem, rows: Tensor, rho: float, iterations: int, tolerance: float) -> Code:
    factors = [
        torch.linalg.cholesky(d.T @ d + rho * torch.eye(problem.atoms, dtype=d.dtype, device=d.device))
        for d in problem.dictionaries
    ]
    copy, scaled = rows, torch.zeros_like(rows)  # V and U
    low, noise = problem.others(rows)
    for iteration in range(1, iterations + 1):
        right = problem.transposed(problem.signal - low - noise) + rho * (copy - scaled)
        parts = zip(torch.split(right, problem.segments, 1), factors, strict=True)
        rows = torch.cat([torch.cholesky_solve(part, factor) for part, factor in parts], 1)
        copy = problem.shrunk(rows + scaled, 1 / rho)
        _, low, noise = problem.eliminated(rows, noise)
        scaled = scaled + rows - copy
        if iteration % _CHECK_EVERY == 0 or iteration == iterations:
            _, at_low, at_noise = problem.eliminated(copy, noise)
            code = problem.finished(copy, at_low, at_noise, None, iteration)
            if problem.done(code, tolerance):
                break
    return code


def _ladmm(problem: _Problem, rows: Tensor, rho: float, step: float, iterations: int, tolerance: float) -> Code:
    # With the loss ½ ‖N‖² in the constraint Y = DA + L + E + N, eliminating N leaves L and E a softer penalty.
    soft = 0.0 if problem.exact else rho / (1 + rho)
    dual = torch.zeros_like(problem.signal)
    low = noise = torch.zeros_like(dual)
    reference = math.inf
    since = 0
    for iteration in range(1, iterations + 1):
        target = problem.signal - problem.reconstructed(rows) + dual / rho
        low, noise = problem.split(target, 1 / soft if soft else 1 / rho, noise)
        dense = torch.zeros_like(target) if problem.exact else soft * (target - low - noise)
        gradient = problem.transposed(target - low - noise - dense)
        before = rows
        rows = problem.shrunk(rows + step / problem.lipschitz * gradient, step / problem.lipschitz / rho)
        rest = problem.signal - problem.reconstructed(rows) - low - noise - dense
        dual = dual + rho * rest
        since += 1
        if step >= 1:
            # Convergence is not promised: what both residuals come to has to fall.
            size = float(rest.norm() + (rows - before).norm() * problem.lipschitz**0.5)
            if since >= _WATCH or not math.isfinite(size) or size > 1e3 * float(problem.signal.norm()):
                if not size < 0.5 * reference:
                    step, reference = step / 2, math.inf
                    if not math.isfinite(size) or size > float(problem.signal.norm()):
                        rows, dual = torch.zeros_like(rows), torch.zeros_like(dual)
                        low = noise = torch.zeros_like(dual)
                else:
                    reference = size
                since = 0
        if iteration % _CHECK_EVERY == 0 or iteration == iterations:
            if problem.exact:
                code = problem.finished(rows, low, noise, dual, iteration, step)
            else:
                code = problem.finished(rows, *problem.others(rows), None, iteration, step)
            if problem.done(code, tolerance):
                break
    return code


def _padded(x: Tensor, count: int) -> Tensor:
    """With rows of zeros, ``count`` in all."""
    return torch.nn.functional.pad(x, (0, 0, 0, count - x.shape[0]))

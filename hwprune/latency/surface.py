"""Noisy times at scattered sizes in, a smooth-but-stepped surface out: what one kind of segment costs at every size.

The surface is a parametric trend times the exponential of a Gaussian process (Rasmussen and Williams, 2006, section
2.2) fitted to what the trend leaves. The trend is linear in the sizes, their product, and both rounded up to vector
blocks; it carries the staircase that blocked kernels show. The process is smooth in the logarithm of the sizes, plus
parts that see a size only through its number of blocks or its divisibility, so that steps stay steps.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]

BLOCKS = (16, 8)  # channels per vector register or tile in the kernels at hand, larger first
MOST_POINTS = 400  # cells the process is conditioned on
_SELECTION_POINTS = 160  # cells its hyper-parameters are chosen on
_LENGTHS = (0.4, 0.8, 1.6)  # in log size
_BLOCK_PARTS = (0.0, 0.5)
_DIVISIBILITY_PARTS = (0.0, 0.3)
_NOISE_RATIOS = np.array([0.01, 0.03, 0.1, 0.3, 1.0, 3.0])


@dataclass(frozen=True, eq=False)
class Surface:
    """A fitted cost in µs as a function of 0, 1 or 2 sizes."""

    trend: Floats  # [features] >= 0
    cells: Floats  # [M, axes] the sizes conditioned on
    parts: tuple[float, ...]  # length scale, block part, divisibility part of the kernel
    weights: Floats  # [M] kernel weights of the mean
    inverse: Floats  # [M, M] of the kernel with noise, for the spread
    variance: float
    noise: float  # relative standard deviation of one measurement

    def __call__(self, sizes: Floats) -> Floats:
        """µs at `sizes` [N, axes]. [N]"""
        trend = _features(sizes) @ self.trend
        if sizes.shape[1] == 0:
            return np.asarray(trend)
        return np.asarray(trend * np.exp(_kernel(sizes, self.cells, self.parts) @ self.weights))

    def spread(self, sizes: Floats) -> Floats:
        """Relative standard deviation of the surface itself at `sizes` [N, axes]. [N]"""
        if sizes.shape[1] == 0:
            return np.full(len(sizes), self.noise)
        cross = _kernel(sizes, self.cells, self.parts)
        prior = 1.0 + sum(self.parts[1:])
        explained = np.einsum("nm,mk,nk->n", cross, self.inverse, cross)
        return np.asarray(np.sqrt(self.variance * np.maximum(prior - explained, 0.0)))


def fit_surface(sizes: Floats, times_us: Floats, doubt: Floats, seed: int = 0) -> Surface:
    """Fit the surface to `times_us` [N] at `sizes` [N, axes].

    doubt [N]: how much larger than usual the error of a sample may be (1 = an undisturbed one). Samples at equal
    sizes are pooled by a weighted median first; outliers are doubted more after a first fit.
    """
    cells, times, doubt = _pool(sizes, times_us, doubt)
    trend = _fit_trend(cells, times, doubt)
    if cells.shape[1] == 0:
        relative = times_us / trend[0] - 1
        return Surface(trend, cells, (), np.zeros(0), np.zeros((0, 0)), 0.0, float(np.median(np.abs(relative))) * 1.5)
    if len(cells) > MOST_POINTS:
        chosen = np.random.default_rng(seed).permutation(len(cells))[:MOST_POINTS]
        cells, times, doubt = cells[chosen], times[chosen], doubt[chosen]
    residual = np.log(times / np.maximum(_features(cells) @ trend, 1e-9))
    parts, ratio = _select(cells, residual, doubt, seed)
    kernel = _kernel(cells, cells, parts)
    for _ in range(2):
        factor = torch.linalg.cholesky(torch.from_numpy(kernel + np.diag(ratio * doubt**2)))
        weights = torch.cholesky_solve(torch.from_numpy(residual)[:, None], factor)[:, 0].numpy()
        left = residual - kernel @ weights
        scale = 1.4826 * float(np.median(np.abs(left / doubt))) + 1e-6
        doubt = doubt * np.maximum(1.0, np.abs(left) / (3.0 * scale * doubt))
    variance = float(residual @ weights) / len(residual)
    inverse = torch.cholesky_inverse(factor).numpy()
    return Surface(trend, cells, parts, weights, inverse, variance, scale)


@dataclass(frozen=True, eq=False)
class Share:
    """What one segment adds to a whole that was only timed as a whole: rates times amounts of work.

    amounts [F] are the segment's when dense: multiply-accumulates, the same in whole blocks, elements written, and one
    for being launched. powers: how the multiply-accumulates grow with each axis.
    """

    amounts: Floats
    powers: tuple[int, ...]
    full: Floats  # [axes] sizes when dense
    rates: Floats  # [F] µs per unit

    def __call__(self, sizes: Floats) -> Floats:
        """µs at `sizes` [N, axes]. [N]"""
        return np.asarray(self.work(sizes) @ self.rates)

    def work(self, sizes: Floats) -> Floats:
        """The amounts at `sizes` [N, axes]. [N, F]"""
        ratio = sizes / self.full
        block = BLOCKS[0]
        blocked = np.minimum(np.ceil(sizes / block) * block, np.ceil(self.full / block) * block) / self.full
        powers = np.array(self.powers, dtype=np.float64)
        some = ratio.mean(1) if sizes.shape[1] else np.ones(len(sizes))
        grown = [np.prod(ratio**powers, axis=1), np.prod(blocked**powers, axis=1), some, np.ones(len(sizes))]
        return np.stack(grown, axis=1) * self.amounts


def fit_rates(work: Floats, times_us: Floats, doubt: Floats) -> Floats:
    """Non-negative rates [F] with `work` [N, F] @ rates = `times_us` [N] in relative error, outliers doubted."""
    return _solve_relative(work, times_us, doubt)


def _pool(sizes: Floats, times: Floats, doubt: Floats) -> tuple[Floats, Floats, Floats]:
    """One robust time per distinct cell; k samples of a cell are √k times less doubtful than one."""
    cells, owner = np.unique(sizes, axis=0, return_inverse=True)
    owner = owner.ravel()
    order = np.lexsort((times, owner))
    weight = 1.0 / doubt[order] ** 2
    totals = np.bincount(owner, weights=1.0 / doubt**2)
    running = np.cumsum(weight)
    starts = np.concatenate([[0.0], np.cumsum(totals)[:-1]])
    half = running - starts[owner[order]] >= 0.5 * totals[owner[order]] - 1e-12
    first = np.full(len(cells), -1)
    for_cell = owner[order][half]
    first[for_cell[::-1]] = np.flatnonzero(half)[::-1]  # the earliest position past half the weight wins
    return cells.astype(np.float64), times[order][first], 1.0 / np.sqrt(totals)


def _features(sizes: Floats) -> Floats:
    """Non-negative building blocks of a cost: constants, sizes, products, and the same in whole blocks. [N, F]"""
    one = np.ones(len(sizes))
    if sizes.shape[1] == 0:
        return one[:, None]
    block = BLOCKS[0]
    plain = [one, *sizes.T]
    blocked = [np.ceil(size / block) * block for size in sizes.T]
    if sizes.shape[1] == 2:
        x, y = sizes.T
        cx, cy = blocked
        return np.stack([*plain, x * y, cx, cy, cx * cy, x * cy, cx * y], axis=1)
    return np.stack([*plain, sizes[:, 0] ** 2, *blocked], axis=1)


def _fit_trend(cells: Floats, times: Floats, doubt: Floats) -> Floats:
    """Non-negative least squares in relative error, outliers doubted. [F]"""
    return _solve_relative(_features(cells), times, doubt)


def _solve_relative(features: Floats, times: Floats, doubt: Floats) -> Floats:
    features = features / times[:, None]
    scale = np.maximum(np.abs(features).max(0), 1e-30)
    weight = 1.0 / doubt
    for _ in range(3):
        coefficients, _ = nnls(features / scale * weight[:, None], weight)
        left = np.abs(features / scale @ coefficients - 1)
        typical = 1.5 * np.median(left) + 1e-4
        weight = 1.0 / (doubt * np.maximum(1.0, left / (2 * typical)))
    return np.asarray(coefficients / scale)


def _select(cells: Floats, residual: Floats, doubt: Floats, seed: int) -> tuple[tuple[float, ...], float]:
    """Kernel parts and noise ratio of highest marginal likelihood, the overall variance profiled out."""
    if len(cells) > _SELECTION_POINTS:
        chosen = np.random.default_rng(seed + 1).permutation(len(cells))[:_SELECTION_POINTS]
        cells, residual, doubt = cells[chosen], residual[chosen], doubt[chosen]
    best: tuple[float, tuple[float, ...], float] | None = None
    for parts in product(_LENGTHS, _BLOCK_PARTS, _DIVISIBILITY_PARTS):
        kernel = _kernel(cells, cells, parts) / np.outer(doubt, doubt)
        # by torch: numpy's own thread pool would fight for the cores with whatever else runs here
        values, vectors = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(kernel)))
        rotated = (vectors.T @ (residual / doubt)) ** 2
        spectrum = np.maximum(values, 0.0)[None] + _NOISE_RATIOS[:, None]  # [ratios, M]
        variance = np.maximum((rotated / spectrum).mean(1), 1e-12)
        likelihood = -0.5 * len(cells) * np.log(variance) - 0.5 * np.log(spectrum).sum(1)
        at = int(np.argmax(likelihood))
        if best is None or likelihood[at] > best[0]:
            best = (float(likelihood[at]), parts, float(_NOISE_RATIOS[at]))
    assert best is not None
    return best[1], best[2]


def _kernel(a: Floats, b: Floats, parts: tuple[float, ...]) -> Floats:
    """Covariance between sizes `a` [N, axes] and `b` [M, axes]. [N, M]"""
    length, blocks, divisibility = parts
    covariance = _squared_exponential(np.log(a), np.log(b), length)
    if blocks:
        for block in BLOCKS:
            part = blocks / len(BLOCKS)
            covariance += part * _squared_exponential(np.log(np.ceil(a / block)), np.log(np.ceil(b / block)), 0.5)
    if divisibility:
        flags = [np.concatenate([sizes % block == 0 for block in BLOCKS], axis=1) for sizes in (a, b)]
        covariance += divisibility * _squared_exponential(flags[0].astype(float), flags[1].astype(float), 1.0)
    return covariance


def _squared_exponential(a: Floats, b: Floats, length: float) -> Floats:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.asarray(np.exp(-0.5 * np.maximum(squared, 0.0) / length**2))

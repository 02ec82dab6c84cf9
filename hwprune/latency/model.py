"""What a set of widths costs: tables on knots, summed in one gather, with a gradient for the search.

A table holds a surface that was fitted to measured samples, on knots that were chosen where it bends; or a formula.
There are two readings of it. `value` is for gradients: monotone, without plateaus (knots that buy nothing are left out,
and the running maximum from small sizes is taken), linear in between. `price` is for decisions: the entry at the next
knot up, as it stands. Neither leaves the hull of what was measured.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwprune.errors import InvalidInput, UnknownWorkload
from hwprune.graph import Program, segments
from hwprune.ops import CostTables

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MOST_LEVELS = 16  # candidate widths per group
_PLATEAU = 0.004  # a step cheaper than this share of the cost is no step


@dataclass(frozen=True, eq=False)
class CostAxis:
    """A size the cost depends on, elements = offset + Σ weights · widths[groups], and where it is tabulated."""

    groups: Ints  # [k]
    weights: Ints  # [k]
    offset: int
    knots: Ints  # [K] ascending sizes; the first and the last bound what is known


@dataclass(frozen=True, eq=False)
class CostTerm:
    """The cost of one segment on the knots of its axes.

    left: what it still costs when one of its axes has no element, by index of that axis, on the knots of the other one
    ([] or [K]); where there is no entry, nothing.
    """

    name: str
    axes: tuple[int, ...]  # indices into CostModel.axes, 0 to 2 of them
    table: Floats  # [], [K1] or [K1, K2]
    left: Mapping[int, Floats] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CostModel:
    """Cost of a whole forward as a function of the groups' widths: scale · Σ terms + offset.

    unit: "ms" or "flops" (multiply-accumulates). full, minimum [G]: the widths of `dense` and `floor`.
    residual: relative standard deviation of the prediction, from forwards that the tables have not seen.
    exact: the terms are bilinear (a formula, not a measurement), so interpolation is the price.
    removable: [G] which groups may be left without a channel; implied: [G, G] which others then cost nothing either.
    Width 0 has a price in :attr:`removing` alone.
    facts: how the tables were measured, for reports.
    """

    unit: str
    full: Ints
    axes: tuple[CostAxis, ...]
    terms: tuple[CostTerm, ...]
    scale: float = 1.0
    offset: float = 0.0
    residual: float = 0.0
    exact: bool = False
    minimum: Ints | None = None
    removable: Bools | None = None
    implied: Bools | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    tabulated: "CostModel | None" = field(default=None, repr=False)  # the model without width 0 that this one extends

    # -- decisions

    def price(self, widths: Any) -> Any:
        """Cost at integer widths [G] or [N, G]: the next tabulated step up. float or [N]

        Raises UnknownWorkload outside the tables.
        """
        if self.exact:
            return self.predict(widths)
        sizes, single = self._sizes(widths)
        self._check_hull(sizes)
        return self._total(self._raw.step_up(sizes), single)

    def predict(self, widths: Any) -> Any:
        """Best estimate at widths [G] or [N, G], linear between knots and below `price` inside a step. float or [N]"""
        sizes, single = self._sizes(widths)
        self._check_hull(sizes)
        return self._total(self._raw.interpolate(sizes)[0], single)

    @cached_property
    def dense(self) -> float:
        """Price of the full widths."""
        return float(self.price(self.full))

    @cached_property
    def floor(self) -> float:
        """Price of the minimum widths: no budget below it can be met."""
        return float(self.price(self.least))

    @cached_property
    def removing(self) -> "CostModel":
        """The same costs for those who may leave removable groups without a channel; itself where there are none.

        The axes of such groups have one more knot, at 0: what is left of a segment there is all that it costs, so that
        the price of being launched at all goes with the last channel. Elsewhere every price is the same. `levels` have
        0 where the group is a block of its own; of groups that end together, all have to be asked for at once.
        """
        if self.tabulated is not None or self.removable is None or not self.removable.any():
            return self
        ends = self.removable if self.implied is None else self.removable | self.implied.any(0)
        extended = {
            index: replace(axis, knots=np.concatenate([[0], axis.knots]))
            for index, axis in enumerate(self.axes)
            if len(axis.groups) == 1 and axis.offset == 0 and ends[axis.groups[0]]
        }
        return replace(
            self,
            axes=tuple(extended.get(index, axis) for index, axis in enumerate(self.axes)),
            terms=tuple(_from_zero(term, extended.keys()) for term in self.terms),
            minimum=np.where(self.removable, 0, self.least),
            tabulated=self,
        )

    @property
    def groups(self) -> int:
        """G, the number of groups."""
        return len(self.full)

    @property
    def least(self) -> Ints:
        """[G] the minimum widths."""
        return np.ones_like(self.full) if self.minimum is None else self.minimum

    @property
    def launch_bound(self) -> bool:
        """Whether pruning widths hardly helps: the floor is above four fifths of the dense cost."""
        return self.floor > 0.8 * self.dense

    def levels(self, group: int) -> Ints:
        """Candidate widths of a group, ascending from its minimum to its full width: each the widest of its plateau."""
        return self._levels[group]

    def ended(self, widths: NDArray[Any]) -> Bools:
        """Which groups are not computed at `widths` [..., G]: without a channel, or in a block with such. [..., G]"""
        none = np.asarray(widths == 0)
        if self.removable is None or self.implied is None:
            return none
        return np.asarray(none | ((none & self.removable).astype(np.float64) @ self.implied > 0))

    # -- gradients

    def value(self, widths: Tensor) -> Tensor:
        """Monotone interpolated cost at real widths [G], differentiable. []"""
        result: Tensor = _Value.apply(widths, self)  # type: ignore[no-untyped-call]
        return result

    def value_and_grad(self, widths: Tensor) -> tuple[float, Tensor]:
        """Monotone interpolated cost at real widths [G] and its derivative per channel [G].

        Widths between 0 and the smallest tabulated size cost what that size costs and keep its slope, so that an
        optimiser is not stopped there; beyond the full width UnknownWorkload is raised.
        """
        flat = widths.detach().cpu().numpy().astype(np.float64)
        sizes, _ = self._sizes(flat)
        if (flat < 0).any() or (sizes > self._smooth.last + 1e-6).any() or not np.isfinite(sizes).all():
            self._check_hull(sizes)
            raise UnknownWorkload(f"widths {flat.min():.4g} to {flat.max():.4g}: a width is at least 0.")
        total, slopes = self._smooth.interpolate(sizes, slopes=True)
        gradient = self.scale * (slopes[0] @ self._matrix)
        value = float(self._total(total, True))
        return value, torch.from_numpy(gradient).to(widths.device, widths.dtype)

    def tables(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> CostTables:
        """The monotone cost as a share of `dense`, by keep ratios [G], for operators that look it up themselves."""
        gather, count = self._smooth, len(self.axes)
        matrix = np.zeros((count + 1, self.groups))  # [A + 1, G] elements per ratio; the last axis is that of no axis
        matrix[:count] = self._matrix * self.full
        counts = gather.counts[:, None]  # [A + 1, 1]
        inside = np.arange(gather.knots.shape[1])[None] < np.maximum(counts - 1, 1)  # intervals, but at least one start
        strides = np.stack([gather.stride, np.ones_like(gather.stride)], 1)  # [T, 2]
        # The model's offset is a term of its own, over no axis.
        pair = np.concatenate([gather.axes, [[count, count]]])
        flat = np.concatenate([self.scale * gather.flat, [self.offset]]) / self.dense
        members, weights = _padded(matrix)
        uses, use_weights = _padded(matrix[pair.ravel()].T)
        arrays = (
            members,
            weights,
            np.append(self._offsets, 0.0),
            np.where(inside, gather.knots, np.inf),
            np.where(inside, gather.per_step, 0.0),
            pair,
            np.append(gather.base, len(gather.flat)),
            np.concatenate([np.where(gather.counts[gather.axes] > 1, strides, 0), [[0, 0]]]),
            flat,
            uses,
            use_weights,
        )
        made = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        return CostTables(*(t.to(device, dtype if t.is_floating_point() else t.dtype) for t in made))

    # -- how

    @cached_property
    def _matrix(self) -> Floats:
        """[A, G] elements per channel."""
        matrix = np.zeros((len(self.axes), len(self.full)))
        for row, axis in zip(matrix, self.axes, strict=True):
            np.add.at(row, axis.groups, axis.weights)
        return matrix

    @cached_property
    def _offsets(self) -> Floats:
        return np.array([axis.offset for axis in self.axes], dtype=np.float64)

    def _sizes(self, widths: Any) -> tuple[Floats, bool]:
        """Axis sizes [N, A], and whether one vector was given."""
        if isinstance(widths, Tensor):
            widths = widths.detach().cpu().numpy()
        array = np.asarray(widths, dtype=np.float64)
        if array.ndim not in (1, 2) or array.shape[-1] != len(self.full):
            raise InvalidInput(f"widths have shape {array.shape}; the model has {len(self.full)} groups.")
        if self.tabulated is not None:
            array = np.where(self.ended(array), 0.0, array)
        return np.atleast_2d(array) @ self._matrix.T + self._offsets, array.ndim == 1

    def _check_hull(self, sizes: Floats) -> None:
        outside = (sizes < self._raw.first - 1e-6) | (sizes > self._raw.last + 1e-6) | ~np.isfinite(sizes)
        if outside.any():
            row, at = np.argwhere(outside)[0]
            axis = self.axes[at]
            raise UnknownWorkload(
                f"a size of {sizes[row, at]:g} (groups {axis.groups.tolist()}) is outside the tabulated "
                f"{axis.knots[0]} to {axis.knots[-1]}; choose widths inside, or profile that size."
            )

    def _total(self, sums: Floats, single: bool) -> Any:
        total = self.scale * sums + self.offset
        return float(total[0]) if single else total

    @cached_property
    def _raw(self) -> "_Gather":
        return _Gather(len(self.axes), [axis.knots for axis in self.axes], [(t.axes, t.table) for t in self.terms])

    @cached_property
    def _edges(self) -> list[NDArray[np.bool_]]:
        """Per axis, which knots are the last of their plateau: no larger size costs about the same. [K] each"""
        if self.exact:
            return [np.ones(len(axis.knots), dtype=np.bool_) for axis in self.axes]
        cost = [np.zeros(len(axis.knots)) for axis in self.axes]
        for term in self.terms:
            for dim, axis in enumerate(term.axes):
                other = tuple(d for d in range(term.table.ndim) if d != dim)
                cost[axis] += term.table.mean(other)
        found = []
        for line in cost:
            keep = np.zeros(len(line), dtype=np.bool_)
            cheapest = np.inf
            for at in range(len(line) - 1, -1, -1):
                if line[at] < cheapest * (1 - _PLATEAU) or at == 0:
                    keep[at] = True
                    cheapest = min(cheapest, float(line[at]))
            found.append(keep)
        if self.tabulated is not None:  # the edges above 0 are the same, with or without it
            pairs = zip(self.axes, self.tabulated.axes, self.tabulated._edges, strict=True)
            return [keep if axis is given else np.append(True, keep) for axis, given, keep in pairs]
        return found

    @cached_property
    def _smooth(self) -> "_Gather":
        knots = [axis.knots[keep] for axis, keep in zip(self.axes, self._edges, strict=True)]
        terms = []
        for term in self.terms:
            table = term.table
            for dim, axis in enumerate(term.axes):
                table = np.maximum.accumulate(np.compress(self._edges[axis], table, axis=dim), axis=dim)
            terms.append((term.axes, table))
        return _Gather(len(self.axes), knots, terms)

    @cached_property
    def _levels(self) -> list[Ints]:
        if self.tabulated is not None:
            assert self.removable is not None
            alone = self.removable if self.implied is None else self.removable & ~self.implied.any(1)
            lines = [self.tabulated.levels(group) for group in range(self.groups)]
            return [np.append(0, line) if ends else line for line, ends in zip(lines, alone, strict=True)]
        candidates: list[set[int]] = [set() for _ in self.full]
        for axis, keep in zip(self.axes, self._edges, strict=True):
            edges = axis.knots[keep]
            for group, weight in zip(axis.groups.tolist(), axis.weights.tolist(), strict=True):
                if len(axis.groups) == 1:
                    candidates[group].update(((edges - axis.offset) // weight).tolist())
                else:  # the others may stand on any edge themselves: what lies between two edges completes them
                    gaps = edges[:, None] - edges[None, :]
                    candidates[group].update((gaps[gaps > 0] // weight).tolist())
        found = []
        for full, least, options in zip(self.full.tolist(), self.least.tolist(), candidates, strict=True):
            inside = np.array(sorted({w for w in options if least < w < full} | {least, full}), dtype=np.int64)
            found.append(_thin(inside, MOST_LEVELS))
        return found


def _from_zero(term: CostTerm, extended: Collection[int]) -> CostTerm:
    """The term with one more row for every axis in `extended`, of what is left without any element of it."""
    table = term.table
    for dim, axis in enumerate(term.axes):
        if axis in extended:
            first = table.take(0, dim)
            row = np.asarray(term.left.get(axis, 0.0))
            if row.ndim and len(row) < first.size:  # without the other axis too, there is nothing at all
                row = np.concatenate([[0.0], row])
            table = np.concatenate([np.expand_dims(np.minimum(row, first), dim), table], dim)
    return replace(term, table=table, left={})


def _padded(matrix: Floats) -> tuple[Ints, Floats]:
    """The columns [N, M] where each row [N, ...] is not 0, and what stands there; short rows end in column 0 with 0."""
    used = matrix != 0
    most = max(1, int(used.sum(1).max(initial=0)))
    columns = np.argsort(~used, axis=1, kind="stable")[:, :most]
    values = np.take_along_axis(matrix, columns, 1)
    return np.where(values != 0, columns, 0), values


def _thin(levels: Ints, most: int) -> Ints:
    """At most `most` levels: both ends, and those nearest to even spacing."""
    if len(levels) <= most:
        return levels
    wanted = np.linspace(levels[0], levels[-1], most)
    return np.unique(levels[np.abs(levels[None, :] - wanted[:, None]).argmin(1)])


class _Gather:
    """All terms' tables in one flat array, so that a query is one gather of the corners around it."""

    def __init__(self, axes: int, knots: Sequence[Ints], terms: Sequence[tuple[tuple[int, ...], Floats]]) -> None:
        most = max((len(line) for line in knots), default=1)
        self.knots = np.full((axes + 1, most), np.inf)  # the last row is the axis of what has no axis: one knot at 0
        self.counts = np.ones(axes + 1, dtype=np.int64)
        for row, line in enumerate(knots):
            self.knots[row, : len(line)] = line
            self.counts[row] = len(line)
        self.knots[axes, 0] = 0.0
        self.first = self.knots[:axes, 0]
        self.last = self.knots[np.arange(axes), self.counts[:axes] - 1]
        padded = [(*used, *[axes] * (2 - len(used))) for used, _ in terms]
        self.axes = np.array(padded, dtype=np.int64).reshape(-1, 2)  # [T, 2]
        self.stride = self.counts[self.axes[:, 1]]  # [T] of the first axis; that of the second is 1
        self.flat = np.concatenate([np.asarray(table, dtype=np.float64).ravel() for _, table in terms] or [np.zeros(0)])
        sizes = [np.asarray(table).size for _, table in terms]
        self.base = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) if terms else np.zeros(0, np.int64)
        low = np.minimum(np.arange(most)[None], np.maximum(self.counts[:, None] - 2, 0))
        high = np.minimum(low + 1, self.counts[:, None] - 1)
        at_low, at_high = np.take_along_axis(self.knots, low, 1), np.take_along_axis(self.knots, high, 1)
        self.origin = at_low  # [A + 1, K] where the interval that begins at a knot begins
        step = at_high - at_low
        self.per_step = np.divide(1.0, step, out=np.zeros_like(step), where=step > 0)  # [A + 1, K]
        self.rows = np.arange(axes + 1)

    def interpolate(self, sizes: Floats, slopes: bool = False) -> tuple[Floats, Floats]:
        """Sum of all terms [N], and its derivative by each axis [N, A] where asked for. sizes: [N, A]"""
        padded = np.concatenate([sizes, np.zeros((len(sizes), 1))], axis=1)
        interval = (self.knots[None, :, 1:] <= padded[..., None]).sum(-1)  # [N, A + 1]
        interval = np.minimum(interval, np.maximum(self.counts - 2, 0))
        per_step = self.per_step[self.rows, interval]
        part = np.clip((padded - self.origin[self.rows, interval]) * per_step, 0.0, 1.0)
        a, b = self.axes.T
        u, v = part[:, a], part[:, b]
        corner = self.base + interval[:, a] * self.stride + interval[:, b]  # [N, T]
        right = np.where(self.counts[a] > 1, self.stride, 0)
        up = np.where(self.counts[b] > 1, 1, 0)
        t00, t10 = self.flat[corner], self.flat[corner + right]
        t01, t11 = self.flat[corner + up], self.flat[corner + right + up]
        low, high = t00 + u * (t10 - t00), t01 + u * (t11 - t01)
        total = (low + v * (high - low)).sum(1)
        if not slopes:
            return np.asarray(total), np.zeros(0)
        by_a = ((1 - v) * (t10 - t00) + v * (t11 - t01)) * per_step[:, a]
        by_b = (high - low) * per_step[:, b]
        count = len(self.rows)
        cells = (np.arange(len(sizes))[:, None] * count + np.concatenate([a, b])[None]).ravel()
        summed = np.bincount(cells, np.concatenate([by_a, by_b], axis=1).ravel(), len(sizes) * count)
        return np.asarray(total), np.asarray(summed.reshape(len(sizes), count)[:, :-1], dtype=np.float64)

    def step_up(self, sizes: Floats) -> Floats:
        """Sum of all terms at the next knots up. [N]"""
        padded = np.concatenate([sizes, np.zeros((len(sizes), 1))], axis=1)
        knot = np.minimum((self.knots[None] < padded[..., None] - 1e-6).sum(-1), self.counts - 1)
        a, b = self.axes.T
        return np.asarray(self.flat[self.base + knot[:, a] * self.stride + knot[:, b]].sum(1))


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, widths: Tensor, model: CostModel) -> Tensor:
        value, gradient = model.value_and_grad(widths)
        ctx.save_for_backward(gradient)
        return widths.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None


def flops_model(program: Program) -> CostModel:
    """Multiply-accumulates of a program's contractions as a cost model: an exact formula in the same clothes."""
    full = np.asarray(program.groups.widths, dtype=np.int64)
    axes: dict[Any, int] = {}
    knots: list[CostAxis] = []
    parts = [segment for segment in segments(program) if segment.macs]
    squared = {axis.key for s in parts for axis, power in zip(s.axes, s.powers, strict=True) if power > 1}
    terms = []
    for segment in parts:
        used = []
        table = np.array(segment.macs)
        for axis, power in zip(segment.axes, segment.powers, strict=True):
            if power == 0:
                continue
            if axis.key not in axes:
                axes[axis.key] = len(knots)
                least = axis.offset + int(axis.weights.sum())
                if axis.key in squared:
                    line = np.arange(least, axis.size + 1)
                else:
                    line = np.unique(np.linspace(least, axis.size, MOST_LEVELS).round().astype(np.int64))
                knots.append(CostAxis(axis.groups, axis.weights, axis.offset, line.astype(np.int64)))
            used.append(axes[axis.key])
            table = np.multiply.outer(table, (knots[used[-1]].knots / axis.size) ** power)
        terms.append(CostTerm(segment.name, tuple(used), table))
    removable, implied = program.groups.removable, program.blocks.implied
    return CostModel("flops", full, tuple(knots), tuple(terms), exact=True, removable=removable, implied=implied)

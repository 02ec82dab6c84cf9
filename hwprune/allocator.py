"""Integer widths under a budget: the most valuable network whose price, on measured plateaus, fits.

    maximise  Σ_g value_g[level_g]    subject to    price(widths) <= budget

A price is a sum of tables over knots of axes, and an axis counts the elements of one group or of several (a concat).
The problem is rewritten as a graph: a node per group, whose states are its candidate widths, and a node per axis of
several groups, whose states are the intervals between its knots; tables become costs of states and of pairs of states.
That is an energy of a Markov random field under one knapsack constraint.

`milp` solves it exactly: binaries choose a state per node, and every pair of states has a flow whose marginals are
those binaries (the local polytope of Schlesinger 1976; Wainwright and Jordan 2008, §4.1). The relaxation is tight
wherever the graph is a tree. `greedy` moves groups one at a time under a Lagrange multiplier (Everett 1963) that
bisection chooses, then trades widths in pairs; its bound comes from the duals of the same linear relaxation, made
rigorous in the floating-point sense of Neumaier and Shcherbina (2004).
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from hwprune.errors import InfeasibleBudget, InvalidInput, UnknownWorkload
from hwprune.graph import Groups
from hwprune.latency import CostAxis, CostModel

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Method = Literal["auto", "milp", "greedy"]

# Above this many pairs of states the exact solver rarely ends in time (benchmarks/bench_allocator.py). A sum over
# several groups is worse than its pairs: its relaxation is loose.
_AUTO_FLOWS = 60_000
_FLOWS_OF_A_FORM = 4_000
_VALUE_RANGE = 1e3  # values are scaled to this range, so that HiGHS's absolute gap of 1e-6 is a billionth of it
_TOLERANCE = 1e-9  # relative, of sums in another order than price()


@dataclass(frozen=True)
class Allocation:
    """The widths chosen, and how good they provably are.

    widths: [G] int64. cost: their price, at most the budget, in the cost model's unit. value: Σ of their values. bound:
    no widths within the budget are worth more. gap: (bound - value) / the range of Σ values, 0 where value is proven
    optimal.
    """

    widths: Ints
    cost: float
    value: float
    bound: float
    gap: float
    method: Literal["milp", "greedy"]
    wall_s: float

    def __str__(self) -> str:
        return f"cost {self.cost:.4g}, optimality gap {self.gap:.2%}, {self.method} in {self.wall_s:.2f} s"


def allocate(
    cost: CostModel,
    value: Sequence[ArrayLike],
    budget: float,
    *,
    minimum: ArrayLike | None = None,
    maximum: ArrayLike | None = None,
    multiple: ArrayLike = 1,
    pinned: Mapping[int, int] | None = None,
    method: Method = "auto",
    time_limit_s: float = 30.0,
    relative_gap: float = 1e-4,
) -> Allocation:
    """Chooses the widths of highest total value whose price is at most `budget`.

    value: per group, one number per entry of cost.levels(g). budget: in the unit of `cost`. minimum: least width of
    each group, [G] or one for all; by default its smallest level. maximum: the greatest, likewise; by default the full
    width. multiple: widths are multiples of it, [G] or one for all; the greatest width is always allowed, and values
    between two levels are interpolated. pinned: widths the user fixes, by group; they obey none of the three.
    time_limit_s: solver time, after which the best widths found are returned with their gap. relative_gap: the gap at
    which the exact solver may stop; 0 asks for a proof.

    Raises InfeasibleBudget with the lowest possible price where nothing fits, InvalidInput for arguments that do not
    fit together.
    """
    start = time.monotonic()
    deadline = start + time_limit_s
    if method not in get_args(Method):
        raise InvalidInput(f"method {method!r} is unknown; it is one of {', '.join(get_args(Method))}.")
    if not np.isfinite(budget):
        raise InvalidInput(f"budget {budget} must be a finite number of {cost.unit}.")
    candidates, values = _candidates(cost, value, minimum, maximum, multiple, pinned or {})
    problem = _Problem(cost, candidates, values)
    cheapest = _cheapest(problem, cost, budget, deadline)
    if method == "auto":
        size = problem.flows + _FLOWS_OF_A_FORM * len(problem.forms)
        method = "milp" if size <= _AUTO_FLOWS else "greedy"
    if method == "milp":
        states, bound = _solve_exactly(problem, cost, budget, cheapest, relative_gap, deadline)
    else:
        relaxed, bound = _relax(problem, budget, deadline)
        states = _Search(problem, cost, budget, deadline).run([cheapest, *relaxed])
    widths, worth = problem.widths(states), problem.value(states)
    spread = sum(float(np.ptp(v)) for v in values)
    bound = max(bound, worth)
    gap = (bound - worth) / spread if spread > 0 else 0.0
    return Allocation(widths, float(cost.price(widths)), worth, bound, gap, method, time.monotonic() - start)


def values_from_ranking(
    groups: Groups, ranking: ArrayLike | torch.Tensor, cost: CostModel, *, scale: Literal["log", "mass"] = "log"
) -> list[Floats]:
    """The worth of each level of each group when the channels of highest `ranking` [ΣC] are kept.

    With m the importance that is kept, as a fraction of the group's whole: "mass" is m itself, "log" is log m. Both
    rise and are concave in the width by construction, as the best channels come first. Both are per group, so rankings
    of different groups need no common unit. Σ log m is the log of the product of the fractions, as if groups were in
    series: it shrinks all of them a little before it closes one, where the sum of masses closes wide groups of equal
    channels. The logarithm is a reconstruction.

    Raises InvalidInput where the ranking has another length, or is negative or not finite.
    """
    scores = ranking.detach().cpu().numpy() if isinstance(ranking, torch.Tensor) else np.asarray(ranking)
    scores = scores.astype(np.float64)
    if scores.shape != (groups.total,):
        raise InvalidInput(f"ranking has shape {scores.shape}; it needs one score per channel, ({groups.total},).")
    if not (np.isfinite(scores).all() and (scores >= 0).all()):
        raise InvalidInput("ranking has a negative or infinite score; scores are amounts of importance, from 0 up.")
    owner = np.repeat(np.arange(len(groups)), groups.widths)
    mass = np.concatenate([[0.0], np.cumsum(scores[np.lexsort((-scores, owner))])])  # [ΣC + 1]
    values = []
    for g, (first, last) in enumerate(zip(groups.offsets, groups.offsets[1:], strict=False)):
        levels = np.asarray(cost.levels(g))
        total = mass[last] - mass[first]
        # A group without any importance is worth its width: nothing tells its channels apart.
        kept = (mass[first + levels] - mass[first]) / total if total > 0 else levels / groups.widths[g]
        values.append(np.log(np.maximum(kept, 1e-12)) if scale == "log" else kept)
    return values


def _candidates(
    cost: CostModel,
    value: Sequence[ArrayLike],
    minimum: ArrayLike | None,
    maximum: ArrayLike | None,
    multiple: ArrayLike,
    pinned: Mapping[int, int],
) -> tuple[list[Ints], list[Floats]]:
    """The widths each group may take, ascending, and their values."""
    count = len(cost.full)
    levels = [np.asarray(cost.levels(g), dtype=np.int64) for g in range(count)]
    if len(value) != count or any(np.shape(v) != own.shape for v, own in zip(value, levels, strict=False)):
        raise InvalidInput(f"value needs {count} arrays, one per group, each with one number per level of its group.")
    worth = [np.asarray(v, dtype=np.float64) for v in value]
    if not all(np.isfinite(v).all() for v in worth):
        raise InvalidInput("value holds a number that is not finite.")
    least = _per_group(0 if minimum is None else minimum, count, "minimum")
    most = np.asarray(cost.full) if maximum is None else _per_group(maximum, count, "maximum")
    step = _per_group(multiple, count, "multiple")
    if (step < 1).any():
        raise InvalidInput(f"multiple {step.min()} must be at least 1.")
    if unknown := [g for g in pinned if not 0 <= g < count]:
        raise InvalidInput(f"pinned names group {unknown[0]}; there are {count}, counted from 0.")
    candidates = []
    for g, own in enumerate(levels):
        full, floor = min(int(own[-1]), int(most[g])), max(int(own[0]), int(least[g]))
        if g in pinned:
            lowest = min(int(own[0]), int(cost.least[g]))
            if not lowest <= pinned[g] <= own[-1]:
                raise InvalidInput(
                    f"pinned[{g}]={pinned[g]} is outside {lowest}..{own[-1]}, the widths that have a price."
                )
            candidates.append(np.array([pinned[g]], dtype=np.int64))
            continue
        if floor > full:
            raise InvalidInput(f"minimum {floor} of group {g} is above its greatest width {full}.")
        # The best multiple on a plateau is the last before its edge; the least that is allowed may lie before them all.
        rounded = np.concatenate([own // step[g] * step[g], [-(-floor // step[g]) * step[g]]])
        candidates.append(np.union1d(rounded[(rounded >= floor) & (rounded <= full)], [full]))
    return candidates, [np.interp(c, own, v) for c, own, v in zip(candidates, levels, worth, strict=True)]


def _per_group(given: ArrayLike, count: int, name: str) -> Ints:
    array = np.asarray(given)
    if array.shape not in ((), (count,)) or array.dtype.kind not in "iu":
        raise InvalidInput(f"{name} must be one whole number or {count}, one per group.")
    return np.broadcast_to(array, count).astype(np.int64)


def _interpolation(knots: Ints, x: Ints) -> Floats:
    """The share of each knot in the linear interpolation at each x. [len(x), K]"""
    return np.stack([np.interp(x, knots, unit) for unit in np.eye(len(knots))], axis=1)


def _bilinear(knots: list[Ints], table: ArrayLike) -> Floats | None:
    """The factors [2, ...] of 1, x, y and xy where `table` is bilinear in the knots of its axes, otherwise None."""
    factors = np.asarray(table, dtype=np.float64)
    fitted = factors
    for dim, line in enumerate(knots):
        first, last = np.take(factors, 0, dim), np.take(factors, -1, dim)
        slope = (last - first) / max(int(line[-1] - line[0]), 1)
        factors = np.stack([first - slope * line[0], slope], axis=dim)
    again = factors
    for dim, line in enumerate(knots):
        again = np.moveaxis(np.tensordot(np.stack([np.ones(len(line)), line], axis=1), again, (1, dim)), 0, dim)
    return factors if np.allclose(again, fitted, rtol=0, atol=1e-9 * float(np.abs(fitted).max(initial=0))) else None


@dataclass(frozen=True, eq=False)
class _Form:
    """A node for a sum over several groups; its states are the intervals lower..upper of that sum."""

    groups: Ints
    weights: Ints
    lower: Ints
    upper: Ints


class _Problem:
    """The energy: cost = constant + Σ unary[node][state] + Σ pairs[a, b][state_a, state_b].

    Nodes 0..G-1 are groups, whose states are `candidates`; the following are `forms`. An assignment is an index of a
    candidate per group; the states of forms follow from it.
    """

    def __init__(self, cost: CostModel, candidates: list[Ints], values: list[Floats]) -> None:
        self.candidates = list(candidates)
        self.values = list(values)
        self.constant = float(cost.offset)
        self.forms: list[_Form] = []
        self.unary = [np.zeros(len(own)) for own in candidates]
        self.pairs: dict[tuple[int, int], Floats] = {}
        formulas = [
            _bilinear([cost.axes[a].knots for a in t.axes], t.table) if cost.exact else None for t in cost.terms
        ]
        tabulated = {
            a for term, formula in zip(cost.terms, formulas, strict=True) if formula is None for a in term.axes
        }
        places = self._place({a: cost.axes[a] for a in sorted(tabulated)}, cost.exact)
        for term, formula in zip(cost.terms, formulas, strict=True):
            if formula is None:
                self._add_table(cost.scale * np.asarray(term.table), [places[a] for a in term.axes])
            else:
                self._add_formula(cost.scale * formula, [cost.axes[a] for a in term.axes])
        self._drop_dominated()
        self._index()

    def _place(self, axes: dict[int, CostAxis], exact: bool) -> dict[int, tuple[int | None, Floats]]:
        """For each axis its node (None: constant), and the share of each knot in each state of the node. [states, K]"""
        least = np.array([own[0] for own in self.candidates], dtype=np.int64)
        fixed = np.array([len(own) == 1 for own in self.candidates])
        sums: dict[int, tuple[tuple[int, ...], tuple[int, ...], int]] = {}
        cuts: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Ints]] = {}
        for a, axis in axes.items():
            weight = np.zeros(len(least), dtype=np.int64)
            np.add.at(weight, axis.groups, axis.weights)
            free = np.flatnonzero((weight != 0) & ~fixed).tolist()
            shift = int(axis.offset + weight[fixed] @ least[fixed])
            sums[a] = (tuple(free), tuple(weight[free].tolist()), shift)
            if len(free) > 1:
                # What is interpolated changes with every element, what is stepped only at knots.
                line = np.arange(axis.knots[0], axis.knots[-1] + 1) if exact else axis.knots
                cuts.setdefault(sums[a][:2], []).append(line - shift)
        node_of = {}
        for (members, weights), lines in cuts.items():
            low = sum(w * int(self.candidates[g][0]) for g, w in zip(members, weights, strict=True))
            high = sum(w * int(self.candidates[g][-1]) for g, w in zip(members, weights, strict=True))
            inner = np.unique(np.concatenate(lines))
            upper = np.append(inner[(inner >= low) & (inner < high)], high)
            node_of[members, weights] = len(self.unary)
            self.forms.append(_Form(np.array(members), np.array(weights), np.append(low, upper[:-1] + 1), upper))
            self.unary.append(np.zeros(len(upper)))
        places: dict[int, tuple[int | None, Floats]] = {}
        for a, (members, weights, shift) in sums.items():
            node: int | None = None
            elements = np.array([shift])
            if len(members) == 1:
                node, elements = members[0], shift + weights[0] * self.candidates[members[0]]
            elif members:
                node = node_of[members, weights]
                elements = shift + self.forms[node - len(self.candidates)].upper
            knots = axes[a].knots
            if elements[0] < knots[0] or elements[-1] > knots[-1]:
                raise UnknownWorkload(
                    f"sizes {elements[0]} to {elements[-1]} are allowed and {knots[0]} to {knots[-1]} have a price; "
                    f"raise the minimum widths, or profile those sizes."
                )
            places[a] = (
                node,
                _interpolation(knots, elements) if exact else np.eye(len(knots))[knots.searchsorted(elements)],
            )
        return places

    def _add_table(self, table: Floats, places: list[tuple[int | None, Floats]]) -> None:
        if len(places) == 2 and places[0][0] == places[1][0]:
            diagonal = np.einsum("sk,kl,sl->s", places[0][1], table, places[1][1])
            self._add([places[0][0]], diagonal)
            return
        for dim, (_, share) in enumerate(places):
            table = np.moveaxis(np.tensordot(share, table, (1, dim)), 0, dim)
        self._add([node for node, _ in places], table)

    def _add_formula(self, factors: Floats, axes: list[CostAxis]) -> None:
        """Adds Σ factors[i, j] · x^i · y^j; multiplied out, it needs no node for the sums that x and y are."""
        # Each axis as constant + Σ linear in one group; pairs of those are the products.
        parts: list[list[tuple[int | None, Floats]]] = []
        for axis in axes:
            per_group = [
                (int(g), w * self.candidates[g].astype(np.float64))
                for g, w in zip(axis.groups, axis.weights, strict=True)
            ]
            parts.append([(None, np.array([float(axis.offset)])), *per_group])
        for powers, factor in np.ndenumerate(factors):
            chosen = [part if power else [(None, np.ones(1))] for part, power in zip(parts, powers, strict=True)]
            for product in itertools.product(*chosen):
                nodes = [node for node, _ in product]
                if len(nodes) == 2 and nodes[0] == nodes[1]:
                    self._add(nodes[:1], factor * product[0][1] * product[1][1])
                else:
                    table = np.array(factor)
                    for _, line in product:
                        table = np.multiply.outer(table, line)
                    self._add(nodes, table)

    def _add(self, nodes: list[int | None], table: Floats) -> None:
        """Adds a table [states of each node]; a node of None has one state."""
        table = table.reshape([size for size, node in zip(table.shape, nodes, strict=True) if node is not None])
        known = [node for node in nodes if node is not None]
        if not known:
            self.constant += float(table)
        elif len(known) == 1:
            self.unary[known[0]] = self.unary[known[0]] + table
        else:
            a, b = sorted(known)
            table = table if known == [a, b] else table.T
            self.pairs[a, b] = self.pairs[a, b] + table if (a, b) in self.pairs else table

    def _drop_dominated(self) -> None:
        """Removes candidates that are worth no more and cost no less than another, whatever the other groups do."""
        within_forms = {int(g) for form in self.forms for g in form.groups}
        for g in range(len(self.candidates)):
            if g in within_forms:
                continue
            tables = [table if a == g else table.T for (a, b), table in self.pairs.items() if g in (a, b)]
            price = np.concatenate([self.unary[g][:, None], *tables], axis=1)  # [S, all states of the neighbours]
            # Strictly better in value first; among equals the narrowest stays.
            keep: list[int] = []
            for s in np.lexsort((np.arange(len(price)), price.sum(1), -self.values[g])):
                if not any((price[k] <= price[s]).all() for k in keep):
                    keep.append(int(s))
            keep.sort()
            self.candidates[g], self.values[g] = self.candidates[g][keep], self.values[g][keep]
            self.unary[g] = self.unary[g][keep]
            for a, b in [pair for pair in self.pairs if g in pair]:
                self.pairs[a, b] = self.pairs[a, b][keep] if a == g else self.pairs[a, b][:, keep]

    def _index(self) -> None:
        """Which forms and pairs the width of each group touches."""
        count = len(self.candidates)
        self.forms_of: list[list[int]] = [[] for _ in range(count)]
        for f, form in enumerate(self.forms):
            for g in form.groups:
                self.forms_of[g].append(f)
        neighbours: list[list[tuple[int, int]]] = [[] for _ in self.unary]
        for pair in self.pairs:
            for node in pair:
                neighbours[node].append(pair)
        self.pairs_of = [
            sorted({pair for node in (g, *(count + f for f in self.forms_of[g])) for pair in neighbours[node]})
            for g in range(count)
        ]

    @property
    def flows(self) -> int:
        """How many pairs of states have a cost."""
        return sum(table.size for table in self.pairs.values())

    @property
    def rising(self) -> bool:
        """Whether no cost falls with a width, so that the narrowest network is the cheapest."""
        steps = [np.diff(unary) for unary in self.unary]
        steps += [np.diff(table, axis=axis) for table in self.pairs.values() for axis in (0, 1)]
        return all((step >= 0).all() for step in steps)

    def widths(self, states: Ints) -> Ints:
        """[G] of an assignment [G]."""
        return np.array([own[s] for own, s in zip(self.candidates, states, strict=True)], dtype=np.int64)

    def value(self, states: Ints) -> float:
        return float(sum(own[s] for own, s in zip(self.values, states, strict=True)))

    def sums(self, states: Ints) -> Ints:
        """The sum of each form. [F]"""
        widths = self.widths(states)
        return np.array([form.weights @ widths[form.groups] for form in self.forms], dtype=np.int64)

    def all_states(self, states: Ints) -> list[int]:
        """The states of all nodes at an assignment of the groups."""
        sums = self.sums(states)
        return [*states.tolist(), *(int(np.searchsorted(f.upper, s)) for f, s in zip(self.forms, sums, strict=True))]

    def cost(self, states: Ints) -> float:
        """The price of an assignment, up to the order of summation."""
        nodes = self.all_states(states)
        total = self.constant + sum(float(unary[s]) for unary, s in zip(self.unary, nodes, strict=True))
        return total + sum(float(table[nodes[a], nodes[b]]) for (a, b), table in self.pairs.items())

    def cost_along(self, g: int, nodes: list[int], sums: Ints) -> Floats:
        """What depends on group g, at each of its candidates while the others stay. [candidates of g]

        nodes, sums: the states of all nodes and the sums of all forms at present.
        """
        own = self.candidates[g]
        here: dict[int, Any] = {g: np.arange(len(own))}
        for f in self.forms_of[g]:
            form = self.forms[f]
            weight = int(form.weights[form.groups == g][0])
            here[len(self.candidates) + f] = np.searchsorted(form.upper, sums[f] + weight * (own - own[nodes[g]]))
        along = np.zeros(len(own))
        for node, s in here.items():
            along += self.unary[node][s]
        for a, b in self.pairs_of[g]:
            along += self.pairs[a, b][here.get(a, nodes[a]), here.get(b, nodes[b])]
        return along


class _Relaxation:
    """The linear program behind both methods.

    Columns, all within 0..1: one per state of every node, then one per pair of state classes of every pair. Rows: one
    state per node; flows sum to the states at both ends; sums of widths lie in their form's interval; the budget, last.
    """

    def __init__(self, problem: _Problem, budget: float) -> None:
        self.problem = problem
        sizes = [len(unary) for unary in problem.unary]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        unary = [row.copy() for row in problem.unary]
        rows: list[Ints] = [np.repeat(np.arange(len(sizes)), sizes)]
        columns: list[Ints] = [np.arange(self.starts[-1])]
        entries: list[Floats] = [np.ones(self.starts[-1])]
        flow_costs: list[Floats] = []
        row, column = len(sizes), int(self.starts[-1])
        for (a, b), table in problem.pairs.items():
            # What is additive goes to the nodes; of the rest, states that cost the same share their flows.
            unary[a] += table[:, 0]
            unary[b] += table[0] - table[0, 0]
            product = table - table[:, :1] - table[:1] + table[0, 0]
            if np.abs(product).max() <= 1e-14 * np.abs(table).max():
                continue
            classes, of_a = np.unique(product, axis=0, return_inverse=True)
            classes, of_b = np.unique(classes, axis=1, return_inverse=True)
            flow: NDArray[Any] = column + np.arange(classes.size).reshape(classes.shape)
            for node, of, ids in ((a, of_a, flow), (b, of_b, flow.T)):
                rows += [row + np.repeat(np.arange(len(ids)), ids.shape[1]), row + of.ravel()]
                columns += [ids.ravel(), self.starts[node] + np.arange(sizes[node])]
                entries += [np.ones(ids.size), -np.ones(sizes[node])]
                row += len(ids)
            flow_costs.append(classes.ravel())
            column += classes.size
        self.columns = column
        self.nodes = int(self.starts[-1])
        self.equal = _matrix(rows, columns, entries, row, column)
        self.equal_to = np.concatenate([np.ones(len(sizes)), np.zeros(row - len(sizes))])
        # The value of each column above the least of its group: a relative gap needs a zero.
        self.least = sum(float(v.min()) for v in problem.values)
        self.gain = np.zeros(column)
        self.gain[: sum(map(len, problem.values))] = np.concatenate([v - v.min() for v in problem.values])
        self.price = np.concatenate([*unary, *flow_costs])  # the cost of each column
        self.within, self.within_limit = self._intervals()
        # In units of the budget, so that the solver's absolute tolerances mean the same for ms and for FLOPs.
        self.unit = max(abs(budget), abs(problem.constant), np.finfo(float).tiny)
        self.limit = (budget - problem.constant) / self.unit

    def _intervals(self) -> tuple[sparse.csr_array, Floats]:
        """lower <= Σ weights · widths <= upper for the chosen state of every form, in units of the largest sum."""
        problem, rows, columns, entries = self.problem, [], [], []
        for f, form in enumerate(problem.forms):
            start, largest = self.starts[len(problem.candidates) + f], float(form.upper[-1])
            for sign, edge, row in ((1.0, form.upper, 2 * f), (-1.0, form.lower, 2 * f + 1)):
                ids = [self.starts[g] + np.arange(len(problem.candidates[g])) for g in form.groups]
                widths = [w * problem.candidates[g] for g, w in zip(form.groups, form.weights, strict=True)]
                columns += [*ids, start + np.arange(len(edge))]
                entries += [*(sign * w / largest for w in widths), -sign * edge / largest]
                rows.append(np.full(sum(map(len, ids)) + len(edge), row))
        count = 2 * len(problem.forms)
        return _matrix(rows, columns, entries, count, self.columns), np.zeros(count)

    def states(self, x: Floats) -> Ints:
        """The state of largest weight of every group. [G]"""
        parts = zip(self.starts, self.starts[1 : len(self.problem.candidates) + 1], strict=False)
        return np.array([int(np.argmax(x[a:b])) for a, b in parts], dtype=np.int64)

    def bound(self, multipliers: Floats, prices: Floats) -> float:
        """An upper bound of the value that holds for any duals, whatever the solver's tolerance.

        multipliers: of the equalities. prices: of the inequalities, budget last; negative ones count as 0.
        """
        prices = np.maximum(prices, 0)
        charged = self.equal.T @ multipliers + self.within.T @ prices[:-1] + self.price / self.unit * prices[-1]
        dual = self.equal_to @ multipliers + self.within_limit @ prices[:-1] + self.limit * prices[-1]
        return float(self.least + dual + np.maximum(self.gain - charged, 0).sum())


def _matrix(rows: Any, columns: Any, entries: Any, height: int, width: int) -> sparse.csr_array:
    if not rows:
        return sparse.csr_array((height, width))
    parts = (np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_array(sparse.coo_array(parts, shape=(height, width)))


def _remaining(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


def _relax(problem: _Problem, budget: float, deadline: float) -> tuple[list[Ints], float]:
    """Widths rounded from the linear relaxation, where it was solved in time, and the bound it proves."""
    program = _Relaxation(problem, budget)
    everything = sum(float(v.max()) for v in problem.values)
    found = linprog(
        -program.gain,
        A_ub=sparse.vstack([program.within, program.price[None] / program.unit], format="csr"),
        b_ub=np.append(program.within_limit, program.limit),
        A_eq=program.equal,
        b_eq=program.equal_to,
        bounds=(0, 1),
        method="highs",
        options={"time_limit": 0.8 * _remaining(deadline)},
    )
    if found.status != 0:
        return [], everything
    bound = program.bound(-found.eqlin.marginals, -found.ineqlin.marginals)
    return [program.states(found.x)], min(bound, everything)


def _integer_program(
    program: _Relaxation,
    objective: Floats,
    limit: float | None,  # of the budget row
    excluded: list[Ints],  # assignments that are forbidden
    relative_gap: float,
    time_s: float,
) -> Any:
    """scipy's result of minimising objective · x."""
    constraints = [LinearConstraint(program.equal, program.equal_to, program.equal_to)]
    if program.within.shape[0]:
        constraints.append(LinearConstraint(program.within, -np.inf, program.within_limit))
    if limit is not None:
        constraints.append(LinearConstraint(sparse.csr_array(program.price[None] / program.unit), -np.inf, limit))
    for states in excluded:
        row = np.zeros((1, program.columns))
        row[0, program.starts[: len(states)] + states] = 1
        constraints.append(LinearConstraint(sparse.csr_array(row), -np.inf, len(states) - 1))
    integral = np.zeros(program.columns)
    integral[: program.nodes] = 1
    options = {"time_limit": time_s, "mip_rel_gap": relative_gap}
    return milp(objective, integrality=integral, bounds=Bounds(0, 1), constraints=constraints, options=options)


def _solve_exactly(
    problem: _Problem, cost: CostModel, budget: float, cheapest: Ints, relative_gap: float, deadline: float
) -> tuple[Ints, float]:
    """The best assignment found, and the bound that was proven."""
    program = _Relaxation(problem, budget)
    best = _Search(problem, cost, budget, time.monotonic() + 0.2 * _remaining(deadline)).run([cheapest])
    spread = sum(float(np.ptp(v)) for v in problem.values)
    bound = sum(float(v.max()) for v in problem.values)
    if spread == 0 or problem.value(best) >= bound:
        return best, bound
    scale = _VALUE_RANGE / spread
    excluded: list[Ints] = []
    while True:
        limit = program.limit + _TOLERANCE
        found = _integer_program(program, -scale * program.gain, limit, excluded, relative_gap, _remaining(deadline))
        if found.mip_dual_bound is not None and np.isfinite(found.mip_dual_bound):
            bound = min(bound, program.least - found.mip_dual_bound / scale)
        if found.x is None:
            return best, bound
        states = program.states(found.x)
        if float(cost.price(problem.widths(states))) <= budget:
            return (states if problem.value(states) > problem.value(best) else best), bound
        # Within the solver's tolerance of the budget, and still above it.
        excluded.append(states)
        if time.monotonic() > deadline:
            return best, bound


def _cheapest(problem: _Problem, cost: CostModel, budget: float, deadline: float) -> Ints:
    """An assignment within the budget, or InfeasibleBudget with the lowest price there is."""
    search = _Search(problem, cost, budget, deadline)
    narrowest = np.zeros(len(problem.candidates), dtype=np.int64)
    states, proven = narrowest, problem.rising
    if not proven and not search.fits(states):
        states = search.descend(narrowest, np.inf)
    if search.fits(states):
        return states
    if not proven:
        program = _Relaxation(problem, budget)
        found = _integer_program(program, program.price / program.unit, None, [], 0.0, _remaining(deadline))
        if found.x is not None:
            states = min(states, program.states(found.x), key=lambda s: float(cost.price(problem.widths(s))))
            proven = found.status == 0
        if search.fits(states):
            return states
    floor = float(cost.price(problem.widths(states)))
    known = "the lowest price of any allowed widths" if proven else "the lowest price found"
    raise InfeasibleBudget(
        f"budget {budget:.4g} {cost.unit} is below {floor:.4g} {cost.unit}, {known}. "
        f"Give at least {floor:.4g} {cost.unit}, or lower the minimum widths, the multiples or the pinned widths."
    )


class _Search:
    """Local search: one group at a time under a multiplier, then single moves and trades of two groups."""

    def __init__(self, problem: _Problem, cost: CostModel, budget: float, deadline: float) -> None:
        self.problem = problem
        self.price = cost
        self.budget = budget
        self.deadline = deadline

    def fits(self, states: Ints) -> bool:
        return float(self.price.price(self.problem.widths(states))) <= self.budget

    def run(self, starts: list[Ints]) -> Ints:
        """The best assignment found; the first of `starts` fits the budget."""
        best = starts[0]
        for states in (*self.multipliers(starts[0]), *starts[1:]):
            polished = self.polish(states)
            if self.problem.value(polished) > self.problem.value(best) and self.fits(polished):
                best = polished
        return best

    def multipliers(self, cheapest: Ints) -> list[Ints]:
        """Bisects the multiplier; the assignments just below and just above the budget."""
        problem = self.problem
        dearest = np.array([len(own) - 1 for own in problem.candidates], dtype=np.int64)
        rise = problem.cost(dearest) - problem.cost(cheapest)
        spread = sum(float(np.ptp(v)) for v in problem.values)
        high = spread / (rise if rise > 0 else abs(self.budget) or 1.0)
        below, above, low = cheapest, dearest, 0.0
        for _ in range(60):
            states = self.descend(above, high)
            if self.fits(states):
                below = states
                break
            low, high = high, 4 * high
        for _ in range(24):
            if time.monotonic() > self.deadline:
                break
            middle = (low + high) / 2
            states = self.descend(above, middle)
            if self.fits(states):
                below, high = states, middle
            else:
                above, low = states, middle
        return [below, above]

    def descend(self, states: Ints, multiplier: float) -> Ints:
        """Sets each group in turn to its best candidate for value - multiplier · cost, until nothing changes.

        An infinite multiplier minimises the cost.
        """
        problem, states = self.problem, states.copy()
        for _ in range(50):
            before = states.copy()
            nodes, sums = problem.all_states(states), problem.sums(states)
            for g, worth in enumerate(problem.values):
                along = problem.cost_along(g, nodes, sums)
                score = -along if np.isinf(multiplier) else worth - multiplier * along
                s = int(np.argmax(score))
                if score[s] > score[states[g]]:
                    self._move(states, nodes, sums, g, s)
            if np.array_equal(states, before) or time.monotonic() > self.deadline:
                break
        return states

    def _move(self, states: Ints, nodes: list[int], sums: Ints, g: int, s: int) -> None:
        problem = self.problem
        step = problem.candidates[g][s] - problem.candidates[g][states[g]]
        states[g] = nodes[g] = s
        for f in problem.forms_of[g]:
            form = problem.forms[f]
            sums[f] += int(form.weights[form.groups == g][0]) * step
            nodes[len(problem.candidates) + f] = int(np.searchsorted(form.upper, sums[f]))

    def polish(self, states: Ints) -> Ints:
        """Shrinks until the budget holds, then takes the best single moves and trades that it allows."""
        problem, states = self.problem, states.copy()
        while time.monotonic() < self.deadline:
            slack = self.budget - problem.cost(states)
            group, state, gain, rise = self._single_moves(states)
            if slack < 0 and not self.fits(states):
                saving = np.minimum(-rise, -slack)
                useful = saving > _TOLERANCE * abs(self.budget)
                if not useful.any():
                    break
                best = int(np.argmax(np.where(useful, gain / np.where(useful, saving, 1), -np.inf)))
                states[group[best]] = state[best]
                continue
            single = np.flatnonzero((gain > 0) & (rise <= slack))
            # Free growth first, then the most value per cost.
            dearer = np.maximum(rise[single], 1e-12 * abs(self.budget))
            single = single[np.argsort(-gain[single] / dearer, kind="stable")]
            taken = self._take([[m] for m in single.tolist()], group, state, states)
            if not taken and not self._take(self._trades(group, gain, rise, slack), group, state, states):
                break
        return states

    def _take(self, moves: list[list[int]], group: Ints, state: Ints, states: Ints) -> bool:
        """Applies those of the first `moves` that fit, each group at most once; whether any did."""
        moved: set[int] = set()
        for move in moves[:64]:
            if moved.isdisjoint(group[move].tolist()):
                before = states[group[move]]
                states[group[move]] = state[move]
                if self.fits(states):
                    moved.update(group[move].tolist())
                else:
                    states[group[move]] = before
        return bool(moved)

    def _single_moves(self, states: Ints) -> tuple[Ints, Ints, Floats, Floats]:
        """All changes of one group: group, new state, gain of value, rise of cost. [Σ candidates] each"""
        problem = self.problem
        nodes, sums = problem.all_states(states), problem.sums(states)
        along = [problem.cost_along(g, nodes, sums) for g in range(len(states))]
        group = np.repeat(np.arange(len(states)), [len(a) for a in along])
        state = np.concatenate([np.arange(len(a)) for a in along])
        gain = np.concatenate([v - v[s] for v, s in zip(problem.values, states, strict=True)])
        rise = np.concatenate([a - a[s] for a, s in zip(along, states, strict=True)])
        return group, state, gain, rise

    @staticmethod
    def _trades(group: Ints, gain: Floats, rise: Floats, slack: float) -> list[list[int]]:
        """The most valuable pairs of changes, one that gains and one that pays, that fit if the two do not interact."""
        up, down = np.flatnonzero(gain > 0), np.flatnonzero((gain <= 0) & (rise < 0))
        up, down = up[np.argsort(-gain[up])[:1500]], down[np.argsort(-gain[down])[:1500]]
        net = gain[up][:, None] + gain[down][None]
        fits = (rise[up][:, None] + rise[down][None] <= slack) & (group[up][:, None] != group[down][None])
        a, b = np.nonzero((net > 0) & fits)
        best = np.argsort(-net[a, b], kind="stable")[:64]
        return [[int(up[i]), int(down[j])] for i, j in zip(a[best], b[best], strict=True)]

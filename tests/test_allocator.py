"""Widths under a budget: the exact solver against brute force, the greedy one against its own bound."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hwprune.allocator import _Problem, _relax, _Relaxation, allocate, values_from_ranking
from hwprune.errors import InfeasibleBudget, InvalidInput
from hwprune.graph import Group, Groups, cut, keep_top, segments, trace
from hwprune.importance import importance
from hwprune.latency import CostAxis, CostModel, CostTerm, flops_model


def instance(seed, groups=(2, 6)):
    """A random problem: concats, repeated groups, tables that rise, fall and stay, formulas; integer values.

    All choices come from the seed, so that most instances are as tangled as the largest ones.
    """
    rng = np.random.default_rng(seed)
    full = rng.integers(2, 11, rng.integers(*groups))
    exact = rng.random() < 0.3
    axes = []
    for _ in range(rng.integers(2, 9)):
        members = rng.integers(0, len(full), rng.choice([1, 1, 1, 2, 3]))  # one may come twice, as in cat([x, x])
        weights = rng.integers(1, 4, len(members))
        offset = int(rng.integers(0, 4))
        ends = [offset + int(weights.sum()), offset + int(weights @ full[members])]
        knots = np.union1d(rng.integers(ends[0], ends[1] + 1, rng.integers(1, 8)), ends)
        axes.append(CostAxis(members, weights, offset, knots))
    rising, terms = rng.random() < 0.5, []
    for _ in range(rng.integers(2, 13)):
        used = tuple(int(a) for a in rng.integers(0, len(axes), rng.choice([0, 1, 2, 2, 2])))
        table = rng.integers(0, 12, [len(axes[a].knots) for a in used]).astype(float)
        if rising or rng.random() < 0.3:
            for dim in range(table.ndim):
                table = np.cumsum(table, dim)
        if exact and rng.random() < 0.5:
            table = np.array(rng.integers(1, 4) / 4)
            for a in used:
                table = np.multiply.outer(table, axes[a].knots)
        terms.append(CostTerm("term", used, table))
    scale, offset = float(rng.choice([0.5, 1.0])), float(rng.integers(0, 5))
    cost = CostModel("ms", full, tuple(axes), tuple(terms), scale, offset, exact=exact)
    value = [rng.integers(0, 16, len(cost.levels(g))).astype(float) for g in range(len(full))]
    if rng.random() < 0.7:
        value = [np.sort(v) for v in value]
    return cost, value, rng


seeds = st.integers(0, 2**32 - 1)


def brute_force(cost, value, candidates):
    """(price, value, widths) of every allowed width vector; values between levels are interpolated."""
    widths = np.array(list(itertools.product(*candidates)))
    worth = sum(np.interp(widths[:, g], cost.levels(g), v) for g, v in enumerate(value))
    return np.atleast_1d(cost.price(widths)), worth, widths


def some_budget(prices, rng):
    low, high = np.quantile(prices, [0.01, 0.6])
    # Just below a price is within the solver's tolerance of it, and yet not enough.
    just_below = max(prices.min(), rng.choice(prices) * (1 - 1e-12))
    return float(rng.choice([prices.min(), rng.choice(prices), just_below, *rng.uniform(low, high, 6)]))


EXACT = {"method": "milp", "relative_gap": 0.0}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(seeds)
def test_milp_equals_brute_force_and_greedy_respects_its_bound(seed):
    cost, value, rng = instance(seed)
    prices, worth, _ = brute_force(cost, value, [cost.levels(g) for g in range(len(cost.full))])
    budget = some_budget(prices, rng)
    optimum = worth[prices <= budget].max()

    exact = allocate(cost, value, budget, **EXACT)
    assert exact.value == optimum
    assert exact.cost == cost.price(exact.widths) <= budget
    assert optimum <= exact.bound <= optimum + 1e-6 and exact.gap < 1e-6

    greedy = allocate(cost, value, budget, method="greedy")
    assert greedy.cost == cost.price(greedy.widths) <= budget
    assert greedy.value <= optimum <= greedy.bound + 1e-9
    assert greedy.value == sum(
        v[list(cost.levels(g)).index(w)] for g, (v, w) in enumerate(zip(value, greedy.widths, strict=True))
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seeds)
def test_minimum_multiple_and_pins_are_obeyed_exactly(seed):
    cost, value, rng = instance(seed, groups=(2, 4))
    full = np.array([cost.levels(g)[-1] for g in range(len(cost.full))])
    least = np.array([cost.levels(g)[0] for g in range(len(cost.full))])
    minimum, multiple = rng.integers(1, full + 1), rng.integers(1, 4, len(cost.full))
    pinned = {int(g): int(rng.integers(least[g], full[g] + 1)) for g in range(len(cost.full)) if rng.random() < 0.3}
    allowed = [
        [pinned[g]]
        if g in pinned
        else [w for w in range(max(least[g], minimum[g]), full[g] + 1) if w % multiple[g] == 0 or w == full[g]]
        for g in range(len(cost.full))
    ]
    prices, worth, widths = brute_force(cost, value, allowed)
    budget = some_budget(prices, rng)
    optimum = worth[prices <= budget].max()
    for method in ("milp", "greedy"):
        found = allocate(
            cost, value, budget, minimum=minimum, multiple=multiple, pinned=pinned, method=method, relative_gap=0.0
        )
        assert (widths == found.widths).all(1).any()
        assert found.cost <= budget
        assert found.value <= optimum + 1e-9


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seeds)
def test_the_bound_holds_for_the_duals_of_the_relaxation_and_for_any_other(seed):
    cost, value, rng = instance(seed)
    levels = [cost.levels(g) for g in range(len(cost.full))]
    prices, worth, _ = brute_force(cost, value, levels)
    budget = some_budget(prices, rng)
    optimum = worth[prices <= budget].max()
    problem = _Problem(cost, levels, value)
    _, bound = _relax(problem, budget, math.inf)
    assert optimum - 1e-9 <= bound <= sum(v.max() for v in value)
    program = _Relaxation(problem, budget)
    for size in (0.0, 0.3, 3.0):
        equal, unequal = (size * rng.standard_normal(rows.shape[0]) for rows in (program.equal, program.within))
        assert program.bound(equal, np.append(unequal, size)) >= optimum


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seeds)
def test_a_larger_budget_is_never_worth_less(seed):
    cost, value, _ = instance(seed)
    prices, _, _ = brute_force(cost, value, [cost.levels(g) for g in range(len(cost.full))])
    budgets = np.quantile(prices, [0, 0.2, 0.5, 0.8, 1], method="higher")
    exact = [allocate(cost, value, float(budget), **EXACT) for budget in budgets]
    assert all(a.value <= b.value for a, b in itertools.pairwise(exact))
    relaxed = [allocate(cost, value, float(budget), method="greedy").bound for budget in budgets]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(relaxed))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seeds, st.sampled_from(["milp", "greedy"]))
def test_an_infeasible_budget_names_the_true_floor(seed, method):
    cost, value, _ = instance(seed)
    floor = brute_force(cost, value, [cost.levels(g) for g in range(len(cost.full))])[0].min()
    given_budget = floor - 0.25
    with pytest.raises(InfeasibleBudget) as refusal:
        allocate(cost, value, given_budget, method=method)
    assert f"budget {given_budget:.4g} ms is below {floor:.4g} ms, the lowest price of any allowed" in str(
        refusal.value
    )
    assert "Give at least" in str(refusal.value)
    assert allocate(cost, value, float(floor), method=method).cost == floor


def chain(widths=(16, 32, 64), tile=8, **options):
    """A stack of layers of tiled cost: table[i, j] = ceil(i / tile) · ceil(j / tile), and a last one-sided layer."""
    full = np.array(widths)
    knots = [np.union1d([1], np.arange(tile, w + 1, tile)) for w in widths]
    axes = tuple(CostAxis(np.array([g]), np.array([1]), 0, k) for g, k in enumerate(knots))
    tiles = [np.ceil(k / tile) for k in knots]
    terms = [CostTerm("layer", (g, g + 1), np.multiply.outer(tiles[g], tiles[g + 1])) for g in range(len(widths) - 1)]
    return CostModel("ms", full, axes, (*terms, CostTerm("last", (len(widths) - 1,), tiles[-1])), **options)


def linear(cost):
    return [np.asarray(cost.levels(g)) / cost.full[g] for g in range(len(cost.full))]


@pytest.mark.parametrize("method", ["milp", "greedy", "auto"])
def test_the_dense_network_is_kept_when_it_fits(method):
    cost = chain()
    found = allocate(cost, linear(cost), cost.dense, method=method)
    assert found.widths.tolist() == [16, 32, 64]
    assert (found.gap, found.value, found.bound) == (0, 3, 3)


def test_widths_stand_on_plateau_edges_and_no_group_vanishes():
    cost = chain()
    for part in (0.2, 0.4, 0.6, 0.8):
        found = allocate(cost, linear(cost), part * cost.dense)
        assert (found.widths >= 1).all()
        wider = [
            allocate(cost, linear(cost), found.cost, pinned={g: int(w)}).widths[g] for g, w in enumerate(found.widths)
        ]
        assert wider == found.widths.tolist()
        for g, own in enumerate(found.widths):
            trial = found.widths.copy()
            trial[g] = min(own + 1, cost.full[g])
            assert own == cost.full[g] or cost.price(trial) > found.cost  # one channel more is never for free


def test_worthless_channels_leave_the_minimum():
    cost = chain()
    value = [np.zeros(len(v)) for v in linear(cost)]
    assert allocate(cost, value, 0.5 * cost.dense).widths.tolist() == [1, 1, 1]
    found = allocate(cost, value, 0.9 * cost.dense, minimum=[2, 3, 40])
    assert found.widths.tolist() == [2, 3, 40]


def test_multiples_go_to_the_last_multiple_before_each_edge():
    cost = chain(widths=(30, 30), tile=10)  # edges 1, 10, 20, 30
    for budget in np.linspace(cost.floor, cost.dense, 7)[1:]:
        widths = allocate(cost, linear(cost), float(budget), multiple=8).widths
        assert set(widths.tolist()) <= {8, 16, 30}
    wide = allocate(cost, linear(cost), 0.6 * cost.dense, multiple=[8, 64]).widths
    assert wide[1] == 30  # no multiple of 64 fits into 30 channels: the group stays whole


@pytest.mark.parametrize("multiple", [1, 4])
def test_greatest_widths_are_obeyed_and_kept_when_they_fit(multiple):
    """Though they are no level of the cost, and no multiple."""
    cost, most = chain(), [13, 32, 50]
    allowed = [[w for w in range(1, m + 1) if w % multiple == 0 or w == m] for m in most]
    prices, worth, _ = brute_force(cost, linear(cost), allowed)
    for budget in np.unique(prices):
        found = allocate(cost, linear(cost), budget, maximum=most, multiple=multiple, method="milp", relative_gap=0.0)
        assert found.value == pytest.approx(worth[prices <= budget].max()) and found.cost <= budget
    assert found.widths.tolist() == most
    assert allocate(cost, linear(cost), cost.dense, maximum=5, pinned={1: 30}).widths.tolist() == [5, 30, 5]


def test_pinned_groups_do_not_move():
    cost = chain()
    found = allocate(cost, linear(cost), 0.5 * cost.dense, pinned={1: 5}, multiple=8, minimum=8)
    assert found.widths[1] == 5
    with pytest.raises(InfeasibleBudget, match="pinned widths"):
        allocate(cost, linear(cost), 0.3 * cost.dense, pinned={0: 16, 1: 32, 2: 64})


def staircase_of(program, seed=0):
    """Tables of tiled cost with noise over the real segments of a network, non-monotone here and there."""
    rng = np.random.default_rng(seed)
    axes, index, terms = [], {}, []
    for segment in segments(program):
        used = []
        for axis in segment.axes:
            if axis.key not in index:
                index[axis.key] = len(axes)
                least = axis.offset + int(np.sum(axis.weights))
                knots = np.union1d(np.arange(max(least, 8), axis.size + 1, 8), [least, axis.size])
                axes.append(CostAxis(axis.groups, axis.weights, axis.offset, knots))
            used.append(index[axis.key])
        table = np.array(1.0 + segment.macs)
        for a in used:
            table = np.multiply.outer(table, np.ceil(axes[a].knots / 8))
        terms.append(CostTerm(segment.name, tuple(used), table * (1 + 0.1 * rng.random(table.shape))))
    return CostModel("ms", program.groups.widths, tuple(axes), tuple(terms))


class Fire(nn.Module):
    """Two branches concatenated, a residual, and a flattened head: sums over groups, shared groups, weights above 1."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 8, 1)
        self.right = nn.Conv2d(16, 24, 3, padding=1)
        self.join = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16 * 16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.join(torch.cat([self.left(x), self.right(x)], 1).relu())
        return self.head(x.relu().flatten(1))


@pytest.fixture(scope="module")
def fire():
    torch.manual_seed(0)
    model = Fire().eval()
    return model, trace(model, (torch.randn(1, 3, 4, 4),))


@pytest.mark.parametrize("model_of", [flops_model, staircase_of])
def test_a_traced_network_is_allocated_optimally(fire, model_of):
    model, program = fire
    cost = model_of(program)
    value = values_from_ranking(program.groups, importance(model, program.groups, "l2"), cost)
    prices, worth, _ = brute_force(cost, value, [cost.levels(g) for g in range(len(program.groups))])
    for part in (0.3, 0.6):
        budget = part * cost.dense
        found = allocate(cost, value, budget, **EXACT)
        assert found.cost <= budget
        assert found.value == pytest.approx(worth[prices <= budget].max(), abs=1e-9)
        greedy = allocate(cost, value, budget, method="greedy")
        assert greedy.value <= found.value + 1e-12 and greedy.bound >= found.value - 1e-12
        keep = keep_top(program.groups, found.widths, importance(model, program.groups, "l2"))
        assert cut(model, program, keep).module(torch.randn(1, 3, 4, 4)).shape == (1, 4)


def test_values_are_the_kept_part_of_the_importance(fire):
    _, program = fire
    cost = chain(widths=(4, 2), tile=1)
    groups = Groups((Group("a", 4, ()), Group("b", 2, ())), (), np.arange(1, 7))
    ranking = torch.tensor([1.0, 4.0, 3.0, 2.0, 0.0, 0.0])
    mass = values_from_ranking(groups, ranking, cost, scale="mass")
    np.testing.assert_allclose(mass[0], [0.4, 0.7, 0.9, 1.0])
    np.testing.assert_allclose(mass[1], [0.5, 1.0])  # nothing tells these channels apart
    np.testing.assert_allclose(values_from_ranking(groups, ranking, cost)[0], np.log([0.4, 0.7, 0.9, 1.0]))

    flat = np.random.default_rng(0).random(program.groups.total)
    for values in values_from_ranking(program.groups, flat, flops := flops_model(program)):
        assert (np.diff(values) > 0).all() and values[-1] == pytest.approx(0)
    for g, values in enumerate(values_from_ranking(program.groups, flat, flops, scale="mass")):
        slopes = np.diff(values) / np.diff(flops.levels(g))
        assert (np.diff(slopes) <= 1e-12).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": [[1.0]]}, "value needs 3 arrays"),
        ({"value": [[np.nan] * 3, [0] * 5, [0] * 9]}, "not finite"),
        ({"budget": float("nan")}, "finite number of ms"),
        ({"method": "magic"}, "one of auto, milp, greedy"),
        ({"minimum": [1, 2]}, "minimum must be one whole number or 3"),
        ({"minimum": 17}, "minimum 17 of group 0 is above its greatest width 16"),
        ({"minimum": 9, "maximum": 8}, "minimum 9 of group 0 is above its greatest width 8"),
        ({"maximum": [1, 2]}, "maximum must be one whole number or 3"),
        ({"multiple": 0}, "multiple 0 must be at least 1"),
        ({"multiple": 1.5}, "multiple must be one whole number"),
        ({"pinned": {3: 1}}, "pinned names group 3; there are 3"),
        ({"pinned": {0: 17}}, r"pinned\[0\]=17 is outside 1\.\.16"),
        ({"pinned": {0: 0}}, r"pinned\[0\]=0 is outside 1\.\.16"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    cost = chain()
    with pytest.raises(InvalidInput, match=message):
        allocate(**{"cost": cost, "value": linear(cost), "budget": 0.5 * cost.dense} | change)


@pytest.mark.parametrize("ranking", [[1.0], [-1.0] * 6, [np.inf] * 6])
def test_rankings_that_are_no_amounts_are_refused(ranking):
    groups = Groups((Group("a", 4, ()), Group("b", 2, ())), (), np.arange(1, 7))
    with pytest.raises(InvalidInput, match="ranking has"):
        values_from_ranking(groups, ranking, chain(widths=(4, 2), tile=1))


def test_the_bound_is_tight_where_groups_form_a_tree():
    rng = np.random.default_rng(0)
    cost = chain(widths=tuple(rng.choice([32, 64, 96], 16)), tile=8)
    value = [np.log(v) for v in linear(cost)]
    for part in (0.3, 0.5, 0.7):
        greedy = allocate(cost, value, part * cost.dense, method="greedy")
        exact = allocate(cost, value, part * cost.dense)
        assert exact.method == "milp" and exact.gap <= 1e-4
        assert exact.bound - 1e-9 <= greedy.bound and exact.value >= greedy.value
        assert greedy.gap < 0.005


def test_a_solver_without_time_still_answers_within_the_budget():
    cost = chain(widths=(64,) * 12, tile=4)
    value = [np.log(v) for v in linear(cost)]
    for method in ("milp", "greedy"):
        found = allocate(cost, value, 0.4 * cost.dense, method=method, time_limit_s=0.0)
        assert found.cost <= 0.4 * cost.dense
        assert found.bound >= found.value and 0 <= found.gap <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seeds)
def test_blocks_without_a_channel_are_chosen_exactly(seed):
    """Groups that may go altogether, with what is left of their segments, in the problems of above."""
    cost, _, rng = instance(seed, groups=(2, 5))
    shared = {int(g) for axis in cost.axes if len(axis.groups) > 1 or axis.offset for g in axis.groups}
    removable = np.array([g not in shared for g in range(len(cost.full))])
    sizes = [len(axis.knots) for axis in cost.axes]
    terms = []
    for term in cost.terms:
        left = {}
        if not cost.exact:
            for dim, axis in enumerate(term.axes):
                other = [sizes[a] for d, a in enumerate(term.axes) if d != dim]
                left[axis] = rng.integers(0, 4, other).astype(float)
        terms.append(replace(term, left=left))
    implied = np.zeros((len(cost.full), len(cost.full)), dtype=bool)
    cost = replace(cost, terms=tuple(terms), removable=removable, implied=implied).removing
    value = [rng.integers(0, 16, len(cost.levels(g))).astype(float) for g in range(len(cost.full))]
    assert all((0 in cost.levels(g)) == flag for g, flag in enumerate(removable))
    prices, worth, _ = brute_force(cost, value, [cost.levels(g) for g in range(len(cost.full))])
    budget = some_budget(prices, rng)
    optimum = worth[prices <= budget].max()
    exact = allocate(cost, value, budget, **EXACT)
    assert exact.value == optimum and exact.cost == cost.price(exact.widths) <= budget
    greedy = allocate(cost, value, budget, method="greedy")
    assert greedy.cost <= budget and greedy.value <= optimum <= greedy.bound + 1e-9
    rule = {"minimum": 1, **EXACT}
    kept = prices[(brute_force(cost, value, [cost.levels(g) for g in range(len(cost.full))])[2] > 0).all(1)]
    if (kept <= budget).any():
        assert (allocate(cost, value, budget, **rule).widths >= 1).all()
    gone = {int(g): 0 for g in np.flatnonzero(removable)}
    assert (allocate(cost, value, prices.max(), pinned=gone).widths[removable] == 0).all()

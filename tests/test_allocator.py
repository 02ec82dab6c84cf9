"""Widths under a budget: the exact solver against brute force, the greedy one against its own bound."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwprune.allocator import allocate, values_from_ranking, values_from_widths
from hwprune.errors import InfeasibleBudget, InvalidInput
from hwprune.latency import CostAxis, CostModel, CostTerm


@st.composite
def instances(draw, max_groups=4):
    """Small random problems: concats, repeated groups, tables that rise, fall and stay, formulas; integer values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    full = rng.integers(2, 10, draw(st.integers(1, max_groups)))
    exact = draw(st.booleans())
    axes = []
    for _ in range(draw(st.integers(1, 5))):
        members = rng.integers(0, len(full), rng.choice([1, 1, 2, 3]))  # a group may come twice, as in cat([x, x])
        weights = rng.integers(1, 4, len(members))
        offset = int(rng.integers(0, 4))
        ends = [offset + int(weights.sum()), offset + int(weights @ full[members])]
        axes.append(
            CostAxis(members, weights, offset, np.union1d(rng.integers(ends[0], ends[1] + 1, rng.integers(0, 5)), ends))
        )
    terms = []
    for _ in range(draw(st.integers(1, 6))):
        used = tuple(int(a) for a in rng.integers(0, len(axes), rng.integers(0, 3)))
        table = rng.integers(0, 12, [len(axes[a].knots) for a in used]).astype(float)
        if draw(st.booleans()):
            for dim in range(table.ndim):
                table = np.cumsum(table, dim)
        if exact and draw(st.booleans()):
            table = np.array(rng.integers(1, 4) / 4)
            for a in used:
                table = np.multiply.outer(table, axes[a].knots)
        terms.append(CostTerm("term", used, table))
    scale, offset = float(rng.choice([0.5, 1.0])), float(rng.integers(0, 5))
    cost = CostModel("ms", full, tuple(axes), tuple(terms), scale, offset, exact=exact)
    value = [rng.integers(0, 16, len(cost.levels(g))).astype(float) for g in range(len(full))]
    if draw(st.booleans()):
        value = [np.sort(v) for v in value]
    return cost, value, rng


def brute_force(cost, value, candidates):
    """(price, value, widths) of every allowed width vector; values between levels are interpolated."""
    widths = np.array(list(itertools.product(*candidates)))
    worth = sum(np.interp(widths[:, g], cost.levels(g), v) for g, v in enumerate(value))
    return np.atleast_1d(cost.price(widths)), worth, widths


def some_budget(prices, rng):
    return float(rng.choice([prices.min(), rng.choice(prices), np.median(prices), prices.max()]))


EXACT = {"method": "milp", "relative_gap": 0.0}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(instances())
def test_milp_equals_brute_force_and_greedy_respects_its_bound(instance):
    cost, value, rng = instance
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
@given(instances(max_groups=3))
def test_minimum_multiple_and_pins_are_obeyed_exactly(instance):
    cost, value, rng = instance
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

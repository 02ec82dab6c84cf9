"""How budgets are written, and that the controller drives a staircase cost onto one."""

import math

import pytest
import torch

from hwprune.budget import Budget, BudgetController
from hwprune.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "kind", "amount", "limit"),
    [
        ("2.4ms", "ms", 2.4, 2.4),
        ("  3 MS ", "ms", 3.0, 3.0),
        (".5ms", "ms", 0.5, 0.5),
        ("50%", "latency", 0.5, 2.0),
        ("12.5 %", "latency", 0.125, 0.5),
        ("100%", "latency", 1.0, 4.0),
        ("50%flops", "flops", 0.5, 2.0),
        ("50% FLOPs", "flops", 0.5, 2.0),
    ],
)
def test_a_budget_is_read_and_resolved(text, kind, amount, limit):
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, amount)
    assert budget.resolve(4.0) == limit
    assert Budget.parse(str(budget)) == budget
    assert budget.unit == ("flops" if kind == "flops" else "ms")


@pytest.mark.parametrize(
    "text",
    ["", "2.4", "ms", "-1ms", "0ms", "0%", "101%", "200%flops", "1e3ms", "50%params", "half", "2.4s", "nanms", "٣ms"],
)
def test_anything_else_is_refused_with_the_forms_that_are_possible(text):
    with pytest.raises(InvalidInput, match=r"2\.4ms.*50%.*50%flops"):
        Budget.parse(text)


def test_a_budget_above_the_dense_cost_is_refused():
    with pytest.raises(InvalidInput, match=r"5ms is above 4 ms.*nothing to prune"):
        Budget.parse("5ms").resolve(4.0)
    assert Budget.parse("4ms").resolve(4.0) == 4.0


def test_target_ramps_from_dense_to_budget():
    controller = BudgetController(2.0, 4.0, ramp_steps=10)
    assert [controller.target(step) for step in (0, 5, 10, 99)] == [4.0, 3.0, 2.0, 2.0]
    assert BudgetController(2.0, 4.0).target(0) == 2.0


@pytest.mark.parametrize("dual", [0.0, 0.3])
@pytest.mark.parametrize("cost", [1.0, 1.9, 2.5, 4.0])
def test_multiplier_is_the_slope_of_the_penalty(dual, cost):
    controller = BudgetController(2.0, 4.0, rho=0.7, ramp_steps=8)
    controller.dual = dual
    soft = torch.tensor(cost, dtype=torch.float64, requires_grad=True)
    controller.penalty(soft, 6).backward()
    assert float(soft.grad) == pytest.approx(controller.multiplier(cost, 6) / controller.dense, abs=1e-15)


def test_below_the_budget_nothing_is_charged():
    controller = BudgetController(2.0, 4.0)
    assert controller.multiplier(1.5, 0) == 0.0
    controller.update(1.5, 0)
    assert controller.dual == 0.0


def test_the_dual_moves_at_its_interval_only():
    controller = BudgetController(2.0, 4.0, update_every=5)
    controller.update(3.0, 4)
    assert controller.dual == 0.0
    controller.update(3.0, 5)
    assert controller.dual == 0.5


def staircase(width, step=8.0):
    """A tiled cost per unit width: rounds up to whole tiles."""
    return torch.ceil(width / step) * step


def descend(controller, ratios, steps, first=0):
    """Minimises Σ a (1 - α)² under a bilinear staircase cost; returns the raw cost after each step."""
    full, loss_weight = torch.tensor([64.0, 128.0, 96.0]), torch.tensor([0.3, 1.0, 0.6])
    dense = float(full[0] * full[1] + full[1] * full[2])
    trace = []
    for step in range(first, first + steps):
        alpha = ratios.clone().requires_grad_()
        widths = alpha * full
        soft = (widths[0] * widths[1] + widths[1] * widths[2]) / dense
        (slope,) = torch.autograd.grad(soft, alpha)
        rate = 2 * loss_weight * (alpha.detach() - 1) + controller.multiplier(soft.item(), step) * slope
        ratios = (ratios - 0.02 * rate).clamp(0.02, 1.0)
        hard = staircase((ratios * full).round())
        trace.append(float(hard[0] * hard[1] + hard[1] * hard[2]) / dense)
        controller.update(trace[-1], step)
    return ratios, trace


def test_a_staircase_cost_settles_on_the_budget():
    controller = BudgetController(0.5, 1.0, rho=0.05, ramp_steps=500)
    _, trace = descend(controller, torch.ones(3), 4000)
    tail = trace[-500:]
    # One tile of one group is the resolution of the cost: 8/64 of 64·128/20480 at most.
    resolution = 8 * 128 / (64 * 128 + 128 * 96)
    assert abs(sum(tail) / len(tail) - 0.5) <= resolution
    assert min(tail) <= 0.5
    assert trace[100] > 0.8  # the ramp has not crushed the ratios at the start
    assert math.isfinite(controller.dual) and controller.dual > 0


def test_a_resumed_controller_goes_on_as_if_uninterrupted():
    straight = BudgetController(0.4, 1.0, rho=0.05, ramp_steps=50)
    expected, trace = descend(straight, torch.ones(3), 200)

    before = BudgetController(0.4, 1.0, rho=0.05, ramp_steps=50)
    halfway, first = descend(before, torch.ones(3), 120)
    after = BudgetController(0.4, 1.0, rho=0.05, ramp_steps=50)
    after.load_state_dict(before.state_dict())
    ratios, second = descend(after, halfway, 80, first=120)
    assert torch.equal(ratios, expected)
    assert first + second == trace
    assert after.state_dict() == straight.state_dict()
    assert straight.dual > 0


@pytest.mark.parametrize("state", [{}, {"dual": -1.0}, {"dual": float("nan")}])
def test_a_broken_state_is_refused(state):
    with pytest.raises(InvalidInput, match="dual"):
        BudgetController(1.0, 2.0).load_state_dict(state)


@pytest.mark.parametrize(
    "arguments",
    [{"budget": 0.0}, {"budget": 3.0}, {"dense": math.inf}, {"rho": 0.0}, {"ramp_steps": -1}, {"update_every": 0}],
)
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(InvalidInput):
        BudgetController(**{"budget": 1.0, "dense": 2.0} | arguments)

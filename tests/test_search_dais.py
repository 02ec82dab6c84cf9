"""DAIS: indicators that anneal to what is left, learned on held-out batches, under a two-sided cost."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hwprune.budget import BudgetController
from hwprune.data import load_data
from hwprune.errors import InvalidInput
from hwprune.graph import cut, keep_top, trace
from hwprune.latency import CostModel, flops_model
from hwprune.latency.model import CostAxis, CostTerm
from hwprune.models import CifarResNet
from hwprune.search import Search, search
from hwprune.search.dais import DAIS
from hwprune.train import Recipe, evaluate, fit, recalibrate

WIDTHS = (8, 12)
STEPS = 100


def chain(widths=WIDTHS, seed=0):
    """Convolutions with batch norm and ReLU: one group each."""
    torch.manual_seed(seed)
    layers, channels = [], 2
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def batches(count, seed=0, size=16):
    """Bright rows, bright columns or a bright corner."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = 0.3 * torch.randn(size, 2, 6, 6, generator=generator)
        y = torch.randint(3, (size,), generator=generator)
        x[y == 0, 0, 2] += 1
        x[y == 1, 1, :, 3] += 1
        x[y == 2, :, :2, :2] += 1
        yield x, y


def staircase(widths=WIDTHS, tile=4, weights=(0.1, 0.1)):
    """Every group costs its width in tiles."""
    knots = [np.unique([1, *range(tile, width + 1, tile), width]) for width in widths]
    axes = tuple(CostAxis(np.array([g]), np.array([1]), 0, k) for g, k in enumerate(knots))
    return CostModel(
        "ms", np.array(widths), axes, tuple(CostTerm(f"t{g}", (g,), weights[g] * k) for g, k in enumerate(knots))
    )


def start(model=None, fraction=0.5, steps=STEPS, cost=None, held_out=True, ramp=None, seed=0, **kwargs):
    model = chain() if model is None else model
    program = trace(model.eval(), (torch.randn(2, 2, 6, 6),))
    cost = cost or flops_model(program)
    controller = BudgetController(fraction * cost.dense, cost.dense, ramp_steps=steps // 2 if ramp is None else ramp)
    beside = list(batches(5, seed=7)) if held_out is True else held_out or None
    return model, Search("dais", model, program.groups, cost, controller, steps, seed=seed, held_out=beside, **kwargs)


def train(model, run, data=None, start=0, until=None):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for step, (x, y) in enumerate(data or batches(run.context.steps)):
        if step < start:
            continue
        if step == until:
            break
        run.before_step(step)
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        run.after_backward(step)
        optimiser.step()
        run.after_step(step)
    return model


# -- the indicators


@pytest.mark.parametrize("fraction, met", [(0.5, True), (0.01, False)])
def test_temperature_is_held_until_the_budget_is_met_and_falls_log_linearly(fraction, met):
    model, run = start(fraction=fraction, options={"temperature": (2.0, 0.02)})
    method, settled, costs = run.method, 3 * STEPS // 5, []
    with run:
        for until in range(1, settled):
            costs.append(run.log()["cost_hard"])
            train(model, run, start=until - 1, until=until)
    first = next((step for step, cost in enumerate(costs) if cost <= run.context.controller.budget), None)
    begins, ends = 0.3 * (settled - 1), 0.9 * (settled - 1)
    assert (first is not None and first < begins) == met
    falls = first if met else math.ceil(begins)
    assert [method.temperature_at(step) for step in (0, falls)] == [2, 2] and method.temperature_at(falls + 1) < 2
    middle = (falls + ends) / 2
    assert method.temperature_at(middle) == pytest.approx(0.2)
    assert method.temperature_at(round(0.8 * STEPS)) == pytest.approx(0.02)
    method.anneal = False
    assert method.temperature_at(STEPS - 1) == 2


def test_prices_count_by_their_root_and_pull_as_hard_in_all():
    price = torch.tensor([1.0, 4.0, 9.0, 0.0, -1.0])
    curbed = start()[1].method._curbed(price)
    torch.testing.assert_close(curbed, torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]) * 14 / 6)
    torch.testing.assert_close(start(options={"curb": 1.0})[1].method._curbed(price), price.clamp_min(0))


@pytest.mark.parametrize("temperature, edge", [(1.0, 6.9), (0.5, 3.8), (0.1, 0.92), (0.02, 0.22)])
def test_a_channel_is_left_alone_where_its_indicator_is_flat(temperature, edge):
    _, run = start(options={"temperature": (temperature, temperature)}, ramp=0)
    method = run.method
    before = torch.tensor([0.9 * edge, 1.1 * edge, -0.9 * edge, -1.1 * edge] * 5)
    method.alpha = before.clone()
    run.before_step(0)
    run.after_step(0)
    moved = (method.alpha != before).view(5, 4)
    assert moved[:, [0, 2]].all() and not moved[:, [1, 3]].any()


def test_relaxed_and_hard_cost_meet_as_the_temperature_falls():
    """α ~ N(0.3, 0.8): the relaxed FLOPs of a chain are about 0.77 of the hard ones at T = 1, and 0.99 at 0.05."""
    _, run = start(chain((200, 200, 200)))
    method, gaps = run.method, []
    alpha = torch.randn(600) * 0.8 + 0.3
    for temperature in (1.0, 0.5, 0.2, 0.05, 0.02):
        method.alpha, method.temperature = alpha.clone(), (temperature, temperature)
        run.before_step(0)
        run.after_step(0)
        gaps.append(run.log()["gap"])
    assert gaps[0] == pytest.approx(-0.23, abs=0.06) and abs(gaps[3]) < 0.03 and abs(gaps[4]) < 0.02
    assert sorted(map(abs, gaps), reverse=True)[:3] == [abs(gap) for gap in gaps[:3]]


def test_indicators_fold_into_the_network_and_the_weights_see_no_other():
    model, run = start()
    mask = run.method.masks(0)
    assert not mask.requires_grad and torch.equal(mask, run.method.alpha.sigmoid())
    run.before_step(0)
    assert torch.allclose(model[1].weight, model[1]._parameters["weight"] * mask[:8])


def test_indicators_start_in_the_order_of_the_magnitudes():
    model = chain((200,))
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.1, 3, 200))
    alpha = start(copy.deepcopy(model))[1].method.alpha
    assert torch.corrcoef(torch.stack([alpha, torch.arange(200.0)]))[0, 1] > 0.8
    alpha = start(model, options={"spread": 0.0})[1].method.alpha
    assert alpha.min() >= 0.75 and alpha.max() <= 2.25


def test_channels_that_the_loss_hardly_depends_on_do_not_wander():
    """Adam with a second moment of each channel's own would move them as far as the others."""
    method = start(chain((8,)))[1].method
    before, generator = method.alpha.clone(), torch.Generator().manual_seed(0)
    for step in range(10):
        method._updates += 1
        gradient = torch.randn(8, generator=generator) * torch.tensor([1.0, 1e-3] * 4)
        method._adam(gradient, method.alpha.sigmoid(), 1.0, step)
    moved = (method.alpha - before).abs().view(4, 2)
    assert moved[:, 0].min() > 0.1 and moved[:, 1].max() < 0.01


# -- the two levels


def two_features(count, telling, seed=0):
    """The sign of one of two inputs is the class; the other is noise."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(32, 2, 2, 2, generator=generator)
        y = torch.randint(2, (32,), generator=generator)
        x[:, telling] += (4.0 * y - 2)[:, None, None]
        yield x, y


@pytest.mark.parametrize("held_out", [True, False])
def test_indicators_learn_what_matters_on_the_held_out_batches(held_out):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[:, :, None, None])
        model[4].weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    program = trace(model.eval(), (torch.randn(2, 2, 2, 2),))
    cost = flops_model(program)
    beside = list(two_features(4, telling=1)) if held_out else None
    controller = BudgetController(0.5 * cost.dense, cost.dense, ramp_steps=30)
    with Search("dais", model, program.groups, cost, controller, 60, held_out=beside) as run:
        for step, (x, y) in enumerate(two_features(60, telling=0, seed=1)):
            run.before_step(step)
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            run.after_backward(step)
            run.after_step(step)  # the weights stay: only the indicators learn
    assert run.method.alpha.argmax() == int(held_out)
    assert run.log()["held_out"] == held_out and ("loss_hard" in run.log()) == held_out


def test_a_step_of_the_indicators_leaves_weights_and_statistics_alone():
    model, run = start()
    before = copy.deepcopy(model.state_dict())
    run.before_step(0)
    alpha = run.method.alpha.clone()
    run.after_step(0)
    assert not torch.equal(run.method.alpha, alpha) and run.context.held_out.drawn == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_without_held_out_batches_a_loss_that_ignores_the_network_is_named():
    _, run = start(held_out=False)
    run.before_step(0)
    with pytest.raises(InvalidInput, match="does not depend on the masked channels"):
        run.after_backward(0)


# -- the cost


@pytest.mark.parametrize("counts, sign", [((8, 12), 1), ((4, 4), 0), ((1, 2), -1)])
def test_the_log_cost_has_three_branches_of_the_hard_counts(counts, sign):
    cost = staircase()
    _, run = start(cost=cost, ramp=0)  # dense 2.0, budget 1.0, tiles of 0.4
    method = run.method
    line = torch.cat([torch.where(torch.arange(w) < n, 0.01, -0.01) for w, n in zip(WIDTHS, counts, strict=True)])
    method.alpha = line.clone()
    run.before_step(0)  # at T = 1 the relaxed widths are half of the full ones whatever the counts are
    run.after_step(0)
    assert method.log()["cost_hard"] == pytest.approx(cost.price(np.array(counts)))
    assert np.sign(method.log()["multiplier"]) == sign


@pytest.mark.parametrize("tile", [2, 4, 8])
def test_the_dead_zone_can_be_entered_whatever_the_tiles_are(tile):
    """A single group in tiles: two neighbouring levels never lie one above and one below the zone."""
    model = chain((16,))
    cost = staircase((16,), tile)
    for fraction in (0.3, 0.5, 0.7, 0.9):
        run = start(model, fraction, cost=cost, ramp=0)[1]
        forces = []
        for count in range(1, 17):
            run.method.alpha = torch.where(torch.arange(16) < count, 0.01, -0.01)
            run.before_step(0)
            run.after_step(0)
            forces.append(np.sign(run.method.log()["multiplier"]))
        run.close()
        assert (np.diff(forces) >= 0).all() and np.diff(forces).max() <= 1, forces


def test_symmetry_is_the_gradient_of_the_spread_of_rates():
    model = chain((6, 10, 6, 6))
    method = start(model, options={"symmetry": 1.0})[1].method
    full = torch.tensor([6.0, 10, 6, 6], dtype=torch.float64)
    soft = torch.tensor([2.0, 3.0, 4.0, 5.5], dtype=torch.float64, requires_grad=True)
    rate = soft / full
    alike = torch.tensor([0, 2, 3])
    ((rate[alike] - rate[alike].mean()).abs().sum()).backward()
    torch.testing.assert_close(method._asymmetry(soft.detach()), (soft.grad * full)[method._owner])
    assert method._asymmetry(full)[6:16].eq(0).all()


def test_lasso_alone_pushes_every_indicator_down():
    _, run = start(options={"lasso": 1e6}, ramp=0)
    before = run.method.alpha.clone()
    run.before_step(0)
    run.after_step(0)
    assert (run.method.alpha < before).all()


# -- the search


def test_useless_channels_go_first_and_the_budget_is_met():
    model = chain()
    model[6 + 2].weight.data[:, 4:] = 0  # two thirds of the second group reach no output, and cost the same
    model[6 + 2].weight.register_hook(lambda g: torch.cat([g[:, :4], torch.zeros_like(g[:, 4:])], 1))
    model, run = start(model, 0.5, options={"balance": 0.3})
    with run:
        train(model, run)
    context = run.context
    kept = (run.method.alpha > 0).float()
    assert kept[8:12].mean() > 1.5 * kept[12:].mean()
    assert context.cost.price(context.rounded(run.widths())) < 0.65 * context.cost.dense
    chosen = DAIS.allocate(context.groups, context.cost, run.widths(), run.ranking(), 0.5 * context.cost.dense)
    assert chosen.cost <= 0.5 * context.cost.dense
    assert (run.ranking() > 0).all() and run.ranking()[8:].topk(2).indices.max() < 4


@pytest.mark.parametrize("steps", [60, 120])
def test_the_budget_is_met_while_the_indicators_can_still_be_undone(steps):
    """Not by cutting, at the end, what annealing had decided to keep: that was four tenths of the cost."""
    model, run = start(chain((16,) * 4), fraction=0.3, steps=steps)
    with run:
        train(model, run, until=run.method._settled_from - 1)
    assert 0.8 < run.log()["cost_hard"] / run.context.controller.budget < 1.05


def test_found_widths_that_fit_are_allocated_as_they_are():
    cost = staircase((8, 8), tile=1)
    _, run = start(chain((8, 8)), cost=cost)
    found, groups = torch.tensor([5.0, 3.0]), run.context.groups
    exactly = DAIS.allocate(groups, cost, found, run.ranking(), cost.price(np.array([5, 3])))
    more = DAIS.allocate(groups, cost, found, run.ranking(), cost.price(np.array([5, 4])))
    less = DAIS.allocate(groups, cost, found, run.ranking(), cost.price(np.array([5, 2])))
    assert exactly.widths.tolist() == [5, 3]
    assert (more.widths >= [5, 3]).all() and more.widths.sum() == 9
    assert (less.widths <= [5, 3]).all() and less.widths.sum() == 7


def test_annealing_closes_the_gap_between_relaxed_and_hard():
    rows = []
    for anneal in (True, False):
        model, run = start(chain((16,) * 4), fraction=0.15, options={"anneal": anneal})
        with run:
            train(model, run)
        rows.append(run.history[-1])
    annealed, constant = rows
    assert annealed["undecided"] < 0.5 * constant["undecided"]
    assert abs(annealed["gap"]) < 0.5 * abs(constant["gap"])
    assert abs(annealed["loss_hard"] - annealed["loss_soft"]) < 0.5 * abs(constant["loss_hard"] - constant["loss_soft"])


def test_in_the_end_the_indicators_are_the_network_that_is_left():
    model, run = start(options={"settle": 0.25, "temperature": (1.0, 0.3)})
    method, settled = run.method, 3 * STEPS // 4
    with run:
        train(model, run, until=settled)
        assert len(method.masks(settled - 1).unique()) > 2 and "loss_hard" in method.log()
        hard = method.masks(settled)
        assert hard.unique().tolist() == [0, 1]
        train(model, run, start=settled)
        assert torch.equal(method.masks(STEPS - 1), hard)
    assert torch.equal(run.widths(), torch.stack([part.sum() for part in hard.double().split(list(WIDTHS))]))


@pytest.mark.parametrize("held_out", [True, False])
def test_a_resumed_search_ends_the_same(held_out, tmp_path):
    options = {"interval": 3, "symmetry": 0.1}
    model, whole = start(steps=40, held_out=held_out, options=options)
    with whole:
        train(model, whole)
    other, first = start(steps=40, held_out=held_out, options=options)
    train(other, first, until=20)
    torch.save({"model": other.state_dict(), "search": first.state_dict()}, tmp_path / "checkpoint.pt")
    resumed, second = start(steps=40, held_out=held_out, options=options, seed=5)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["search"])
    with second:
        train(resumed, second, start=20)
    assert torch.equal(second.method.alpha, whole.method.alpha) and second.history == whole.history
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(InvalidInput, match="channels"):
        start(chain((8, 9)))[1].load_state_dict(saved["search"])


def test_pinned_and_least_widths_are_kept():
    model, run = start(fraction=0.3, minimum=np.array([1, 5]), pinned={0: 3}, steps=60)
    with run:
        train(model, run)
    assert run.widths().tolist()[0] == 3 and run.widths()[1] >= 5
    model, run = start(fraction=0.6, pinned={1: 12}, steps=60)
    with run:
        train(model, run)
    assert run.widths()[1] == 12


def test_no_steps_keep_every_channel():
    _, run = start(steps=0)
    assert run.result().widths.tolist() == list(WIDTHS) and (run.ranking() > 0).all()


def test_a_step_takes_the_same_operations_however_many_groups():
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for depth in (2, 5):
        model, run = start(chain((8,) * depth), held_out=False)
        x, y = next(batches(1))
        mask = run.method.masks(0)
        run.context.masked.set(mask)
        F.cross_entropy(model.train()(x), y).backward()
        with Count() as count:
            run.after_backward(0)
            run.method.after_step(0)
        counts.append(count.calls)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": (0.1, 1.0)}, "must fall"),
        ({"init": 0.0}, "must be positive"),
        ({"interval": 0}, "at least 1"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"pull": 0.0}, "pull"),
        ({"lasso": -1.0}, "not be negative"),
        ({"curb": 2.0}, "must lie in"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InvalidInput, match=message):
        DAIS(**options)


def test_a_real_network_keeps_its_accuracy_at_half_of_its_flops():
    torch.manual_seed(0)
    data = load_data("digits", validation=0.2)
    model = CifarResNet(8, 10, 1)
    fit(model, data.train, Recipe(epochs=15, lr=0.1, seed=0), progress=False)
    program = trace(model.eval(), (next(iter(data.test))[0][:8],))
    cost = flops_model(program)
    budget = 0.5 * cost.dense
    recipe = Recipe(epochs=15, lr=0.02, seed=0)
    found = search(
        "dais",
        model,
        program.groups,
        cost,
        budget,
        data.train,
        recipe,
        options={"balance": 1.0},
        held_out=data.validation,
        progress=False,
    )
    chosen = DAIS.allocate(program.groups, cost, found.widths, found.ranking, budget)
    smaller = cut(model, program, keep_top(program.groups, chosen.widths, found.ranking)).module
    recalibrate(smaller, data.calibration)
    assert chosen.cost <= budget and evaluate(smaller, data.test).accuracy > 0.93  # uniform: 0.73
    fit(smaller, data.train, Recipe(epochs=2, lr=0.02, seed=0), progress=False)
    assert evaluate(smaller, data.test).accuracy > 0.93

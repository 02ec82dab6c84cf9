"""GDP: gates that polarise to exact zeros at the budget, and are absorbed without a jump."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hwprune.budget import BudgetController
from hwprune.data import load_data
from hwprune.errors import InfeasibleBudget, InvalidInput, UnsupportedModel
from hwprune.graph import cut, keep_top, trace
from hwprune.latency import CostModel, flops_model
from hwprune.latency.model import CostAxis, CostTerm
from hwprune.models import CifarResNet
from hwprune.search import Search, search
from hwprune.search.gdp import GDP
from hwprune.train import Recipe, evaluate, fit

WIDTHS = (8, 12)
STEPS = 100


def chain(widths=WIDTHS, activation=nn.ReLU, **norm):
    """Convolutions with batch norm and an activation: one group each."""
    torch.manual_seed(0)
    layers, channels = [], 2
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width, **norm), activation()]
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


def linear_cost(widths, weights=None, knots=None):
    """Every channel of a group costs the same."""
    axes, terms = [], []
    for g, width in enumerate(widths):
        line = np.arange(1, width + 1) if knots is None else knots[g]
        axes.append(CostAxis(np.array([g]), np.array([1]), 0, line))
        terms.append(CostTerm(f"t{g}", (g,), line * (1.0 if weights is None else weights[g])))
    return CostModel("ms", np.array(widths), tuple(axes), tuple(terms), exact=knots is None)


def start(model=None, fraction=0.5, steps=STEPS, cost=None, ramp=None, **kwargs):
    model = chain() if model is None else model
    program = trace(model.eval(), (torch.randn(2, 2, 6, 6),))
    cost = cost or flops_model(program)
    controller = BudgetController(fraction * cost.dense, cost.dense, ramp_steps=steps // 2 if ramp is None else ramp)
    return model, Search("gdp", model, program.groups, cost, controller, steps, **kwargs)


def train(model, run, start=0, until=None):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for step, (x, y) in enumerate(batches(run.context.steps)):
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


def drive(method, steps, gradient, start=0):
    """The method alone: dL/dm of every step is given."""
    for step in range(start, start + steps):
        method.masks(step).grad = gradient(step)
        method.after_backward(step)
        method.after_step(step)
    return method


# -- the gate


def test_the_gate_is_the_smoothed_count():
    method = start()[1].method
    method._epsilon = 0.25
    method.x = torch.tensor([0.0, 0.5, 50.0] + [1.0] * 17)
    torch.testing.assert_close(method.gates()[:4], torch.tensor([0.0, 0.5, 0.9999, 0.8]), rtol=1e-6, atol=1e-6)


def test_a_step_follows_the_gradient_of_the_gate():
    method = start(fraction=1.0, options={"momentum": 0.0, "lr": 1e-3, "balance": 1.0})[1].method  # nothing is charged
    method.x, method._epsilon = torch.linspace(0.3, 3, 20), 0.25
    x = method.x.double().requires_grad_()
    (x.square() / (x.square() + method._epsilon)).sum().backward()
    before = method.x.clone()
    drive(method, 1, lambda step: torch.full((20,), 5.0))
    torch.testing.assert_close(before - method.x, 1e-3 * 0.25 * x.grad.float(), rtol=1e-2, atol=1e-6)


def test_the_search_starts_at_the_network_it_was_given():
    model = chain()
    x, _ = next(batches(1))
    expected = model.eval()(x)
    _, run = start(model)
    run.before_step(0)
    torch.testing.assert_close(model(x), expected)


def test_gates_polarise_on_the_right_side_of_their_price():
    """64 gates of utility 0 to 1 and one price: at half of the cost, the upper half survives and nothing is between."""
    cost = linear_cost((64,))
    utility = torch.linspace(0, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    generator = torch.Generator().manual_seed(2)
    run = start(chain((64,)), 0.5, 400, cost)[1]
    method = drive(run.method, 400, lambda step: -utility + 0.1 * torch.randn(64, generator=generator))
    gates = method.gates()
    right = (gates > 0.5) == (utility > 0.5)
    assert method._counts().tolist() <= [32] and right.float().mean() > 0.95
    assert ((gates == 0) | (gates > 0.99)).all() and run.log()["between"] == 0


def test_epsilon_is_held_and_falls_once_the_budget_is_met():
    model, run = start()
    with run:
        train(model, run)
    epsilons = [(row["step"], row["epsilon"]) for row in run.history]
    assert all(epsilon == 1 for step, epsilon in epsilons if step < 0.6 * STEPS)
    assert epsilons[-1][1] == pytest.approx(1e-4)
    late = start(chain(), 0.1, ramp=0, options={"lr": 1e-9})[1]  # gates that cannot move never meet the budget
    drive(late.method, STEPS, lambda step: torch.zeros(20))
    assert late.method._falls_from == 85


def test_zero_is_absorbing_unless_there_is_room_in_the_budget():
    cost = linear_cost(WIDTHS)
    run = start(cost=cost, ramp=0, options={"reseed": 0.0})[1]
    run.method.x[:6] = 0
    method = drive(run.method, 20, lambda step: torch.full((20,), -1.0))
    assert (method.x[:6] == 0).all()
    run = start(cost=cost, ramp=0)[1]
    method = run.method
    method.x[:14] = 0  # 6 of at most 10 are left, and a twentieth of 20 is seeded at once
    method._score[:14] = torch.arange(14.0)
    method.reseed = 0.1
    method._cost_hard = 6.0
    method._set_price()
    method._seed(0)
    assert method.x[:14].nonzero().ravel().tolist() == [12, 13]
    method._cost_hard = 9.9
    method._seed(0)
    assert (method.x > 0).sum() == 8


# -- the price


def test_a_dear_channel_pays_more_and_within_the_budget_none_pays():
    cost = linear_cost(WIDTHS, (3.0, 1.0))
    for curb in (0.5, 1.0):
        run = start(cost=cost, ramp=0, options={"curb": curb})[1]
        method = drive(run.method, 1, lambda step: torch.zeros(20))
        price = method._price
        assert price[0] == pytest.approx(3**curb * float(price[8])) and price.square().mean().item() == pytest.approx(1)
        assert (method.x[:8] < method.x[8:].min()).all() and method.log()["multiplier"] > 0
    run = start(cost=cost, fraction=1.0)[1]
    method = drive(run.method, 5, lambda step: torch.zeros(20))
    assert (method.x == 1).all() and method.log()["multiplier"] == 0


def test_the_ratio_of_prices_is_bounded_and_they_are_held():
    run = start(cost=linear_cost(WIDTHS, (1000.0, 1.0)), ramp=0, options={"curb": 1.0})[1]
    method = drive(run.method, 1, lambda step: torch.zeros(20))
    assert method._price.max() / method._price.min() == pytest.approx(10)
    run = start(ramp=0, options={"refresh": 3})[1]  # FLOPs are bilinear: fewer channels here are cheaper ones there
    method = drive(run.method, 1, lambda step: torch.zeros(20))
    first = method._price.clone()
    method.x[:4] = 0
    drive(method, 2, lambda step: torch.zeros(20), start=1)
    assert torch.equal(method._price, first)
    drive(method, 1, lambda step: torch.zeros(20), start=3)
    assert not torch.equal(method._price, first)


# -- removal


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_are_absorbed_without_a_jump_and_zeros_cut_without_one(activation, dtype):
    model = chain(activation=activation).to(dtype)
    x = next(batches(1))[0].to(dtype)
    program = trace(model.eval(), (x,))
    cost = flops_model(program)
    with Search("gdp", model, program.groups, cost, BudgetController(0.5 * cost.dense, cost.dense), 10) as run:
        run.method.x = torch.rand(20) + 0.1
        run.method.x[[1, 4, 9, 10, 17]] = 0
        run.method._score[1] = 100.0  # whatever it once was, it is gone
        run.before_step(0)
        gated = model(x)
        assert not torch.allclose(gated, program(x), rtol=1e-3)
    assert torch.equal(model(x), gated)
    assert run.method.masks(1) is None, "a gate must not count twice"
    found = run.result()
    assert found.widths.tolist() == [6, 9]
    keep = keep_top(program.groups, found.widths.numpy(), found.ranking)
    assert torch.equal(torch.from_numpy(keep), run.method.x > 0)
    smaller = cut(model, program, keep)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(smaller.module(x), gated, rtol=tolerance, atol=tolerance)


def test_a_norm_that_cannot_absorb_is_named_before_the_search():
    with pytest.raises(UnsupportedModel, match="affine=True"):
        start(chain(affine=False))


def test_found_widths_that_fit_are_kept_and_otherwise_only_shrink():
    _, run = start()
    groups, cost = run.context.groups, linear_cost(WIDTHS)
    found, ranking = torch.tensor([5.0, 7.0]), torch.rand(20)

    def allocate(budget, **kwargs):
        return GDP.allocate(groups, cost, found, ranking, budget, **kwargs).widths

    assert allocate(12.0).tolist() == [5, 7] and allocate(19.0).tolist() == [5, 7]
    assert (allocate(9.0) <= [5, 7]).all() and allocate(9.0).sum() == 9
    assert allocate(19.0, multiple=4).tolist() == [8, 8]
    assert allocate(19.0, pinned={0: 8}).tolist() == [8, 7]
    assert allocate(19.0, minimum=np.array([1, 11])).tolist() == [5, 11]
    with pytest.raises(InfeasibleBudget):
        allocate(1.0)
    cost = linear_cost(WIDTHS, (4.0, 1.0))
    assert allocate(24.0).tolist() == [4, 7], "[4, 8] would fit, but nothing is behind the eighth channel"


# -- the search


def test_useless_channels_go_first_and_the_budget_is_met_exactly():
    model = chain()
    model[8].weight.data[:, 4:] = 0  # two thirds of the second group reach no output, and cost the same
    model[8].weight.register_hook(lambda g: torch.cat([g[:, :4], torch.zeros_like(g[:, 4:])], 1))
    model, run = start(model, 0.5)
    with run:
        train(model, run)
    alive = (run.method.x > 0).float()
    assert alive[8:12].mean() > 2 * alive[12:].mean()
    assert run.context.cost.price(run.widths().numpy()) <= 0.5 * run.context.cost.dense
    assert run.history[-1]["between"] == 0


def test_a_resumed_search_ends_the_same(tmp_path):
    model, whole = start(steps=60)
    with whole:
        train(model, whole)
    other, first = start(steps=60)
    train(other, first, until=40)
    assert first.method._falls_from is not None
    torch.save({"model": other.state_dict(), "search": first.state_dict()}, tmp_path / "checkpoint.pt")
    resumed, second = start(steps=60, seed=5)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["search"])
    with second:
        train(resumed, second, start=40)
    assert torch.equal(second.method.x, whole.method.x) and second.history == whole.history
    assert torch.equal(second.ranking(), whole.ranking())
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(InvalidInput, match="channels"):
        start(chain((8, 9)))[1].load_state_dict(saved["search"])


def test_pinned_and_least_widths_are_kept():
    model, run = start(fraction=0.3, minimum=np.array([1, 5]), pinned={0: 3}, steps=60)
    with run:
        train(model, run)
    assert run.widths()[0] == 3 and run.widths()[1] >= 5
    model, run = start(fraction=0.6, pinned={1: 12}, steps=60)
    with run:
        train(model, run)
    assert run.widths()[1] == 12


def test_no_steps_keep_every_channel_and_the_weights():
    model = chain()
    before = copy.deepcopy(model.state_dict())
    with start(model, steps=0)[1] as run:
        pass
    assert run.result().widths.tolist() == list(WIDTHS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_overflowing_step_and_a_loss_that_ignores_the_network():
    _, run = start()
    method = drive(run.method, 1, lambda step: torch.full((20,), torch.inf))
    assert method.x.isfinite().all()
    run.before_step(1)
    with pytest.raises(InvalidInput, match="does not depend on the masked channels"):
        run.after_backward(1)


def test_a_step_takes_the_same_operations_however_many_groups():
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for depth in (2, 5):
        _, run = start(chain((8,) * depth))
        with Count() as count:
            drive(run.method, 2, lambda step, total=8 * depth: torch.ones(total))
        counts.append(count.calls)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.0}, "must be positive"),
        ({"momentum": 1.0}, "momentum"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"hold": 0.9}, "hold"),
        ({"least": 0.5}, "least"),
        ({"reseed": 2.0}, "reseed"),
        ({"few": -0.1}, "few"),
        ({"curb": 2.0}, "curb"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InvalidInput, match=message):
        GDP(**options)


def trained(epochs):
    """The digits, a residual network that was trained on them, and its program."""
    torch.manual_seed(0)
    data = load_data("digits")
    model = CifarResNet(8, 10, 1)
    fit(model, data.train, Recipe(epochs=epochs, lr=0.1, seed=0), progress=False)
    return data, model, trace(model.eval(), (next(iter(data.test))[0][:8],))


def test_a_real_network_needs_no_fine_tuning_at_half_of_its_flops():
    data, model, program = trained(epochs=12)
    cost = flops_model(program)
    budget = 0.5 * cost.dense
    recipe = Recipe(epochs=15, lr=0.02, seed=0)
    found = search("gdp", model, program.groups, cost, budget, data.train, recipe, progress=False)
    chosen = GDP.allocate(program.groups, cost, found.widths, found.ranking, budget)
    smaller = cut(model, program, keep_top(program.groups, chosen.widths, found.ranking)).module
    whole, pruned = (evaluate(network, data.test).accuracy for network in (model, smaller))
    assert chosen.cost <= budget and pruned == whole and pruned > 0.93


# -- blocks


class Blocks(nn.Module):
    """A stream of 8 channels and three residual blocks, the last with two groups inside that end together."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.branches = nn.ModuleList(self.branch(*widths) for widths in ((6,), (6,), (5, 4)))
        self.head = nn.Linear(8, 3)

    def branch(self, *widths):
        layers = []
        for a, b in itertools.pairwise((8, *widths, 8)):
            layers += [nn.Conv2d(a, b, 1 if b == 8 else 3, padding=int(b != 8)), nn.BatchNorm2d(b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = F.relu(x + branch(x))
        return self.head(x.mean((2, 3)))


def launched(program, overhead=0.3):
    """FLOPs, and as a share of all of them what launching a contraction costs: the floor is high, unless blocks end."""
    flops = flops_model(program)
    terms = tuple(replace(term, table=term.table / flops.dense + overhead) for term in flops.terms)
    return replace(flops, unit="ms", exact=False, terms=terms)


def test_an_ended_block_is_cut_without_a_jump_and_takes_what_is_inside_along():
    model = Blocks()
    x = next(batches(1))[0]
    _, run = start(model, 0.5)
    groups = run.context.groups
    first, second = groups.names.index("branches.0.0"), groups.names.index("branches.2.0")
    assert groups.removable.sum() == 4 and (run.context.minimum == np.where(groups.removable, 0, 1)).all()
    with run:
        owner = run.method._owner
        run.method.x[(owner == first) | (owner == second)] = 0
        run.method._end_blocks()
        run.before_step(0)
        gated = model(x)
    assert torch.equal(model(x), gated)
    found = run.result()
    inside = groups.names.index("branches.2.3")
    assert found.removes_blocks and found.widths[[first, second, inside]].tolist() == [0, 0, 0]
    assert (found.widths > 0).sum() == 2
    chosen = GDP.allocate(groups, run.context.cost, found.widths, found.ranking, run.context.cost.dense)
    assert (chosen.widths == found.widths.numpy()).all()
    program = trace(model.eval(), (x,))
    smaller = cut(model, program, keep_top(groups, chosen.widths, found.ranking))
    assert smaller.kind == "program" and "branches.0.0" in smaller.reason
    torch.testing.assert_close(smaller.module(x), gated)
    assert sum("conv" in node.name for node in smaller.module.graph.nodes) == 3
    tight = GDP.allocate(groups, run.context.cost, found.widths, found.ranking, 0.5 * chosen.cost)
    assert tight.cost <= 0.5 * chosen.cost and (tight.widths <= chosen.widths).all()
    assert (tight.widths[[first, second, inside]] == 0).all()


def test_the_last_gates_of_a_block_pay_for_its_launches():
    program = trace(Blocks().eval(), (torch.randn(2, 2, 6, 6),))
    run = start(Blocks(), 0.5, cost=launched(program), options={"few": 0.4})[1]
    method, groups = run.method, run.context.groups
    g = groups.names.index("branches.0.0")
    of_block = method._owner == g
    prices = []
    for left in (6, 3, 2, 1):
        method.x[of_block] = torch.arange(6).lt(left).float()
        method._set_price()
        prices.append(float(method._cost_price[of_block][0]))
    counts = method._counts()
    saved = run.context.cost.price(counts) - run.context.cost.price(np.where(np.arange(len(counts)) == g, 0, counts))
    assert prices[0] == pytest.approx(prices[1], rel=0.2)  # three of six are not few
    assert prices[3] == pytest.approx(saved, rel=1e-6) and saved > 0.6  # two launches
    assert prices[3] > 1.5 * prices[2] > 3 * prices[1]
    method.x[of_block] = 0
    method._set_price()
    assert (method._cost_price[of_block] == 0).all()
    method._score[of_block] = 100.0
    method._cost_hard, method.reseed = 0.0, 1.0
    method._seed(0)
    assert (method.x[of_block] == 0).all(), "a block that is gone is not seeded again"


def test_blocks_end_when_launches_are_what_costs_and_stay_where_told():
    program = trace(Blocks().eval(), (torch.randn(2, 2, 6, 6),))
    cost = launched(program)
    floor = cost.floor / cost.dense
    model, run = start(Blocks(), floor, cost=cost)
    with run:
        train(model, run)
    widths = run.widths().numpy()
    removed = run.context.groups.removable & (widths == 0)
    assert removed.any() and run.context.cost.price(widths) <= floor * cost.dense
    assert (widths[~run.context.groups.removable] >= 1).all()
    for told in ({"options": {"blocks": False}}, {"minimum": np.ones(len(widths), np.int64)}):
        model, run = start(Blocks(), floor, cost=cost, **told)
        with run:
            train(model, run)
        assert (run.widths() >= 1).all()
    assert not run.method.context.pinned
    g = run.context.groups.names.index("branches.1.0")
    model, run = start(Blocks(), floor, cost=cost, pinned={g: 0}, steps=20)
    with run:
        train(model, run)
    assert run.widths()[g] == 0
    with pytest.raises(InvalidInput, match="cannot be pinned to 0"):
        start(Blocks(), floor, cost=cost, pinned={g: 0}, options={"blocks": False})


def test_a_residual_network_bound_by_launches_is_better_without_a_block():
    data, model, program = trained(epochs=8)
    cost = launched(program, 0.1)
    budget = 0.5 * cost.dense
    accuracies = {}
    for blocks in (True, False):
        gated = copy.deepcopy(model)
        recipe = Recipe(epochs=10, lr=0.02, seed=0)
        options = {"blocks": blocks}
        found = search("gdp", gated, program.groups, cost, budget, data.train, recipe, options=options, progress=False)
        known = cost.removing if found.removes_blocks else cost
        chosen = GDP.allocate(program.groups, known, found.widths, found.ranking, budget)
        assert chosen.cost <= budget and (chosen.widths == 0).any() == blocks
        smaller = cut(gated, program, keep_top(program.groups, chosen.widths, found.ranking)).module
        accuracies[blocks] = evaluate(smaller, data.test).accuracy
        assert (
            accuracies[blocks] == evaluate(gated, data.test).accuracy
            or not (chosen.widths == found.widths.numpy()).all()
        )
    assert accuracies[True] > 0.85 and accuracies[True] > accuracies[False] + 0.03

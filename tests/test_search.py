"""The methods find what is known to be there, meet their budget, and continue exactly where they were stopped."""

import copy
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hwprune import ops
from hwprune.allocator import allocate
from hwprune.budget import BudgetController
from hwprune.errors import InfeasibleBudget, InvalidInput
from hwprune.graph import keep_top, resize, trace
from hwprune.importance import LiveImportance
from hwprune.latency import CostModel, flops_model
from hwprune.latency.model import CostAxis, CostTerm
from hwprune.search import METHODS, Search, create, method_class, search
from hwprune.search.base import HeldOut, _fits, refilled, worth
from hwprune.search.dsa import DSA
from hwprune.train import Recipe

STEPS = 150
WIDTHS = (16, 24, 16)


class Chain(nn.Sequential):
    """Three convolutions with batch norm and ReLU, so three groups in a row."""

    def __init__(self, widths=WIDTHS, classes=4):
        layers, channels = [], 1
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def batches(count, size=32, classes=4, seed=0):
    """Images of one bright stripe each, whose orientation and sign is the class."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        y = torch.randint(classes, (size,), generator=generator)
        x = torch.randn(size, 1, 6, 6, generator=generator) * 0.5
        place = torch.randint(6, (size,), generator=generator)
        stripe = F.one_hot(place, 6).float()[:, None, None, :] * (1 - 2 * (y // 2).float())[:, None, None, None] * 2
        x += torch.where((y % 2 == 0)[:, None, None, None], stripe, stripe.mT)
        yield x, y


def train(model, steps, hooks=None, start=0, until=None, lr=0.02):
    """A user's own loop, in a few lines; the data of a step depend on nothing but the step."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.0)
    model.train()
    for step, (x, y) in enumerate(batches(steps)):
        if step < start:
            continue
        if step == until:
            break
        if hooks:
            hooks.before_step(step)
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if hooks:
            hooks.after_backward(step)
        optimiser.step()
        if hooks:
            hooks.after_step(step)
    return model


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return np.mean([(model(x).argmax(1) == y).float().mean().item() for x, y in batches(8, seed=99)])


def staircase(widths, weights, tile=4):
    """Each group costs its weight times its width, in tiles: a made table with a known optimum."""
    knots = [np.unique([1, *range(tile, width + 1, tile), width]) for width in widths]
    axes = [CostAxis(np.array([g]), np.array([1]), 0, k) for g, k in enumerate(knots)]
    terms = [
        CostTerm(f"t{g}", (g,), weight * k / k[-1]) for g, (weight, k) in enumerate(zip(weights, knots, strict=True))
    ]
    return CostModel("ms", np.asarray(widths), tuple(axes), tuple(terms), offset=0.1)


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(0)
    model = train(Chain(), 200, lr=0.1)
    assert accuracy(model) > 0.9
    return model, trace(model.eval(), (torch.randn(2, 1, 6, 6),))


def start(pretrained, fraction=0.5, method="dsa", steps=STEPS, cost=None, **kwargs):
    """A search on a copy of the trained network; the ramp takes half of the steps."""
    model, program = pretrained
    model = copy.deepcopy(model)
    cost = cost or staircase(WIDTHS, (1.0, 1.0, 1.0))
    controller = BudgetController(fraction * cost.dense, cost.dense, ramp_steps=steps // 2)
    return model, Search(method, model, program.groups, cost, controller, steps, program=program, **kwargs)


# -- the ratio, its threshold and its gradient


@pytest.mark.parametrize("temperature", [2.0, 20.0, 100.0])
def test_probabilities_average_to_the_ratio(pretrained, temperature):
    run = start(pretrained, options={"temperature": (temperature, temperature)})[1]
    method = run.method
    method.theta.copy_(torch.tensor([-1.0, 0.3, 2.0]))
    run.before_step(0)
    means = [part.mean() for part in method._p.split(list(WIDTHS))]
    # A tile of the widest group is a sixth of it: a hundredth of a channel is far below anything that is priced.
    torch.testing.assert_close(torch.stack(means) * torch.tensor(WIDTHS), method.widths(), rtol=0, atol=0.01)


@pytest.mark.parametrize("temperature", [1.0, 5.0, 20.0])
def test_implicit_gradient_matches_finite_differences(temperature):
    offsets = torch.tensor([0, 9, 40])
    importance = torch.randn(40, dtype=torch.float64).mul(0.5).exp()
    theta = torch.tensor([0.4, -0.7], dtype=torch.float64)
    pull = torch.randn(40, dtype=torch.float64)  # dL/dm of a linear loss
    uniforms = torch.zeros(40, dtype=torch.float64)

    def loss(alpha):
        _, p, _ = ops.ratio_forward(alpha.logit(), importance, offsets, temperature, uniforms)
        return torch.stack([part.sum() for part in (p * pull).split([9, 31])])

    alpha, shift = theta.sigmoid(), 1e-5
    expected = (loss(alpha + shift) - loss(alpha - shift)) / (2 * shift)
    _, p, _ = ops.ratio_forward(theta, importance, offsets, temperature, uniforms)
    state = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    found = ops.ratio_step(
        theta, pull, p, offsets, torch.zeros(2, dtype=torch.float64), 0.0, *state, step=1, lr=0.0, cut=0.0
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_annealing_shrinks_the_spread_of_counts(pretrained):
    _, run = start(pretrained)
    method = run.method
    method.theta.zero_()
    assert method.temperature_at(0) == 2 and method.temperature_at(STEPS - 1) == pytest.approx(100)
    deviations = []
    for step in (0, STEPS // 3, 2 * STEPS // 3, STEPS - 1):
        method.masks(step)
        deviations.append(method.log()["count_std"])
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[-1] < deviations[0] / 2


def test_masks_are_as_likely_as_their_probabilities(pretrained):
    _, run = start(pretrained)
    run.method.theta.zero_()
    draws = torch.stack([run.method.masks(0).detach() for _ in range(2000)]).round()
    torch.testing.assert_close(draws.mean(0), run.method._p, rtol=0, atol=0.05)


def test_a_dropped_channel_behind_a_relu_still_learns_that_it_is_missed(pretrained):
    x, y = next(batches(1))
    for off, learns in ((1e-5, True), (0.0, False)):
        model, run = start(pretrained, options={"off": off})
        run.method.theta.fill_(-0.5)
        run.before_step(0)
        mask = run.method._mask
        F.cross_entropy(model.train()(x), y).backward()
        dropped = mask.detach() < 0.5
        assert dropped.any() and mask.grad[~dropped].any()
        assert bool(mask.grad[dropped].any()) == learns


def test_systematic_draws_keep_their_probabilities_and_hold_the_count(pretrained):
    _, run = start(pretrained, options={"skip": 5000})
    run.method.theta.copy_(torch.tensor([-0.5, 0.4, 1.0]))
    draws = torch.stack([run.method.masks(step).detach() for step in range(1, 2001)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(draws.mean(0), run.method._p, rtol=0, atol=0.05)
    for drawn, p in zip(draws.split(list(WIDTHS), dim=1), run.method._p.split(list(WIDTHS)), strict=True):
        assert (drawn.sum(1) - p.sum()).abs().max() < 1


def test_skipped_channels_count_for_the_steps_in_which_they_were_not_computed(pretrained):
    """Over three steps that draw the same mask, every channel counts three times."""
    model, run = start(pretrained, options={"skip": 3, "interval": 5})
    method, (x, y) = run.method, next(batches(1))
    method.theta.fill_(-0.5)
    drawn = (torch.rand(sum(WIDTHS)) < 0.5).float()
    drawn[torch.tensor([0, WIDTHS[0], WIDTHS[0] + WIDTHS[1]])] = 1
    method._systematic = lambda uniforms: drawn.clone()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()  # the same loss at every step
    for step in range(3):
        run.before_step(step)
        F.cross_entropy(model(x), y).backward()
        if step == 0:
            once = method._mask.grad.clone()
        run.after_backward(step)
    torch.testing.assert_close(method._accumulated, 3 * once, rtol=1e-3, atol=1e-4 * float(once.abs().max()))
    assert once[drawn == 0].any()
    assert torch.equal(method._seen, torch.where(drawn == 1, 3.0, 1.0))


def test_skipping_needs_the_program(pretrained):
    model, program = pretrained
    cost = staircase(WIDTHS, (1.0, 1.0, 1.0))
    controller = BudgetController(0.5 * cost.dense, cost.dense, ramp_steps=1)
    with pytest.raises(InvalidInput, match="give Search the program"):
        Search("dsa", copy.deepcopy(model), program.groups, cost, controller, 10, {"skip": 4})
    with pytest.raises(InvalidInput, match="skip=1 must be 0"):
        Search("dsa", copy.deepcopy(model), program.groups, cost, controller, 10, {"skip": 1}, program=program)


# -- importance


def test_live_importance_follows_gamma_and_does_not_depend_on_its_scale(pretrained):
    model, program = copy.deepcopy(pretrained[0]), pretrained[1]
    live = LiveImportance(model, program.groups, torch.device("cpu"), tie_break=0.0, spread=0.0)
    before = live()
    with torch.no_grad():
        model[1].weight *= 7
    torch.testing.assert_close(live(), before)
    with torch.no_grad():
        model[1].weight[3] = 100.0
        model[1].weight[5] = 0.0
    after = live()[: WIDTHS[0]]
    assert after.argmax() == 3 and after.argmin() == 5 and (live() > 0).all()


def test_every_member_of_a_group_votes():
    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.na = nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6)
            self.b, self.nb = nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6)
            self.out = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.out(torch.relu(self.na(self.a(x)) + self.nb(self.b(x))))

    model = Twin()
    with torch.no_grad():
        model.na.weight.copy_(torch.tensor([1.0, 1, 1, 1, 1, 7]))
        model.nb.weight.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1, 0.1, 0.1]))
    groups = trace(model.eval(), (torch.randn(1, 1, 2, 2),)).groups
    scores = LiveImportance(model, groups, torch.device("cpu"), tie_break=0.0, spread=0.0)()
    assert set(scores.topk(2).indices.tolist()) == {0, 5}


def test_groups_without_a_norm_are_scored_by_their_weights():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[2] *= 100
    groups = trace(model, (torch.randn(2, 3),)).groups
    live = LiveImportance(model, groups, torch.device("cpu"), tie_break=0.05, spread=0.3)
    assert live.deviation() == math.inf and live().argmax() == 2


def test_taylor_scores_follow_the_gradient_of_the_masks(pretrained):
    model, run = start(pretrained, options={"scores": "taylor"})
    run.method._start = 0
    for step in range(10):
        run.method.masks(step)
        pull = torch.ones(sum(WIDTHS))
        pull[7], pull[20] = 9.0, 0.01
        run.method._mask.grad = pull * (-1) ** step
        run.after_backward(step)
    ranking = run.ranking()
    assert ranking[: WIDTHS[0]].argmax() == 7 and ranking[WIDTHS[0] :].argmin() == 20 - WIDTHS[0]
    run.method.scores = "gamma"
    live = LiveImportance(model, run.context.groups, torch.device("cpu"), run.method.tie_break, run.method.spread)
    torch.testing.assert_close(run.ranking(), live())


# -- the search


def test_the_budget_is_met(pretrained):
    model, run = start(pretrained, 0.5)
    with run:
        train(model, STEPS, run)
    context = run.context
    assert run.history[0]["cost_soft"] > 0.9 * context.cost.dense
    assert 0.4 < context.cost.price(context.rounded(run.widths())) / context.cost.dense < 0.56
    chosen = DSA.allocate(context.groups, context.cost, run.widths(), run.ranking(), 0.5 * context.cost.dense)
    assert chosen.cost <= 0.5 * context.cost.dense
    smaller = resize(pretrained[1], keep_top(context.groups, chosen.widths, run.ranking().numpy()))
    assert next(smaller.parameters()).shape[0] == chosen.widths[0]


def test_useless_channels_go_first():
    """Of the middle group only a sixth is connected to the output, and it costs the same: the search must find out."""
    torch.manual_seed(0)
    model = Chain()
    model[6].weight.data[:, 4:] = 0
    model[6].weight.register_hook(lambda g: torch.cat([g[:, :4], torch.zeros_like(g[:, 4:])], 1))
    train(model, 200, lr=0.1)
    program = trace(model.eval(), (torch.randn(2, 1, 6, 6),))
    cost = staircase(WIDTHS, (1.0, 1.0, 1.0))
    controller = BudgetController(0.7 * cost.dense, cost.dense, ramp_steps=100)
    with Search("dsa", model, program.groups, cost, controller, 200) as run:
        train(model, 200, run)
    ratios = run.widths() / torch.tensor(WIDTHS)
    assert ratios[1] < 0.6 * ratios[[0, 2]].min()


def test_an_expensive_group_shrinks_more(pretrained):
    found = []
    for weights in ((4.0, 1.0, 1.0), (1.0, 1.0, 4.0)):
        model, run = start(pretrained, 0.5, cost=staircase(WIDTHS, weights))
        with run:
            train(model, STEPS, run)
        found.append(run.widths() / torch.tensor(WIDTHS))
    assert found[0][0] < found[1][0] and found[1][2] < found[0][2]


def test_flops_are_a_budget_too(pretrained):
    cost = flops_model(pretrained[1])
    model, run = start(pretrained, 0.5, cost=cost)
    with run:
        train(model, STEPS, run)
    assert 0.42 < cost.price(run.context.rounded(run.widths())) / cost.dense < 0.56


@pytest.mark.parametrize(
    "options",
    [{}, {"interval": 4, "scores": "gamma"}, {"skip": 3}],
    ids=["defaults", "gamma-interval-4", "skip-3"],
)
def test_a_resumed_search_ends_the_same(pretrained, options, tmp_path):
    model, whole = start(pretrained, options=options, seed=3)
    with whole:
        train(model, 60, whole)

    other, first = start(pretrained, options=options, seed=3)
    train(other, 60, first, until=30)
    torch.save({"model": other.state_dict(), "search": first.state_dict()}, tmp_path / "checkpoint.pt")
    first.close()

    resumed, second = start(pretrained, options=options, seed=4)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["search"])
    with second:
        train(resumed, 60, second, start=30)
    assert torch.equal(second.widths(), whole.widths())
    assert torch.equal(second.ranking(), whole.ranking())
    assert second.history == whole.history
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_a_checkpoint_of_another_network_is_refused(pretrained):
    _, run = start(pretrained)
    state = run.state_dict()
    state["method"]["theta"] = torch.zeros(7)
    with pytest.raises(InvalidInput, match="7 groups"):
        run.load_state_dict(state)


def test_a_fresh_network_is_warmed_up_and_a_trained_one_is_not(pretrained):
    _, trained = start(pretrained)
    assert trained.method.masks(0) is not None

    torch.manual_seed(0)
    model = Chain()
    program = trace(model.eval(), (torch.randn(2, 1, 6, 6),))
    cost = staircase(WIDTHS, (1.0, 1.0, 1.0))
    run = Search("dsa", model, program.groups, cost, BudgetController(0.5 * cost.dense, cost.dense), STEPS)
    assert run.method.masks(0) is None
    assert run.method.masks(int(0.2 * STEPS) - 1) is None
    assert run.method.masks(int(0.2 * STEPS)) is not None, "the warm-up is bounded"

    model = Chain()
    with Search("dsa", model, program.groups, cost, BudgetController(0.5 * cost.dense, cost.dense), STEPS) as run:
        theta = run.method.theta.clone()
        train(model, STEPS, run, until=2)
        assert torch.equal(run.method.theta, theta)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
        assert run.method.masks(2) is not None, "the warm-up ends as soon as importances differ"


def test_pinned_and_least_widths_are_kept(pretrained):
    minimum = np.array([1, 1, 12])
    model, run = start(pretrained, 0.4, minimum=minimum, pinned={0: 16})
    with run:
        train(model, STEPS, run)
    widths = run.context.rounded(run.widths())
    assert widths[0] == 16 and widths[2] >= 12 and widths[1] < 12


def test_a_training_step_takes_the_same_operations_however_many_groups():
    """Vector code: networks of 2 and of 6 groups run the same number of torch calls outside forward and backward."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for depth in (2, 6):
        torch.manual_seed(0)
        model = train(Chain((8,) * depth), 2)
        program = trace(model.eval(), (torch.randn(2, 1, 6, 6),))
        cost = staircase((8,) * depth, (1.0,) * depth)
        run = Search("dsa", model, program.groups, cost, BudgetController(0.5 * cost.dense, cost.dense), STEPS)
        x, y = next(batches(1))
        for step in (0, 1):  # the first also looks at the weight norms
            with Count() as before:
                run.before_step(step)
            F.cross_entropy(model.train()(x), y).backward()
            with Count() as after:
                run.after_backward(step)
                run.method.after_step(step)
        views = 2 * depth  # a detached, flattened view of each γ is what there is per group
        counts.append(before.calls + after.calls - views)
    assert counts[0] == counts[1]


def test_an_overflowing_step_moves_no_ratio_by_its_loss(pretrained):
    model, run = start(pretrained)
    run.before_step(0)
    x, y = next(batches(1))
    (F.cross_entropy(model.train()(x), y) * float("inf")).backward()
    run.after_backward(0)
    run.after_step(0)
    assert run.method.theta.isfinite().all()


def test_a_loss_that_ignores_the_network_is_named(pretrained):
    _, run = start(pretrained)
    run.before_step(0)
    with pytest.raises(InvalidInput, match="does not depend on the masked channels"):
        run.after_backward(0)


def test_search_drives_the_training_loop(pretrained, tmp_path):
    model, program = copy.deepcopy(pretrained[0]), pretrained[1]
    cost = staircase(WIDTHS, (1.0, 1.0, 1.0))
    loader = list(batches(20))
    recipe = Recipe(epochs=5, lr=0.02, seed=0)
    types = [type(module) for module in model.modules()]
    found = search("dsa", model, program.groups, cost, 0.6 * cost.dense, loader, recipe, progress=False)
    assert [type(module) for module in model.modules()] == types
    assert found.widths.shape == (3,) and found.ranking.shape == (sum(WIDTHS),) and found.log[-1]["step"] == 99
    assert found.log[-1]["cost_soft"] < 0.75 * cost.dense


# -- from learned widths to integers


@pytest.mark.parametrize("tiles", [True, False], ids=["staircase", "flops"])
@pytest.mark.parametrize("method", ["gdp", "increg", "ss_auto"])
def test_no_channel_that_was_zeroed_is_deployed(pretrained, method, tiles):
    """Whatever the measurement allows: more than the search was told, or less."""
    cost = staircase(WIDTHS, (1.0, 1.0, 1.0)) if tiles else flops_model(pretrained[1])
    model, run = start(pretrained, 0.5, method, cost=cost)
    with run:
        train(model, STEPS, run)
    found, groups = run.result(), run.context.groups
    zeroed = torch.cat([model[layer].weight == 0 for layer in (1, 4, 7)])
    widths = run.context.rounded(found.widths)
    assert zeroed.sum() == groups.total - widths.sum() > 0
    price = cost.price(widths)
    assert price <= run.context.controller.budget
    assert price > 0.9 * run.context.controller.budget or method == "gdp"  # whose zeros come in its own time
    for part in np.linspace(0.8, 1.2, 9):
        chosen = run.method.allocate(groups, cost, found.widths, found.ranking, part * price, value=found.value)
        assert not keep_top(groups, chosen.widths, found.ranking)[zeroed].any()
        assert 0.6 * price < chosen.cost <= part * price
        assert chosen.widths.tolist() == widths.tolist() or part < 1


def test_what_is_left_of_a_limit_is_refilled_level_by_level():
    """Free channels of a plateau, then the most urgent step that fits; never past what may be had."""
    cost = staircase(WIDTHS, (1.0, 2.0, 1.0))  # a tile is a fourth, a third and a fourth of a ms

    def fill(limit, most=WIDTHS, urgency=(1.0, 2.0, 3.0)):
        widths = np.array([5, 9, 16])
        return refilled(cost, widths, np.array(most), limit, lambda at: np.array(urgency)).tolist()

    price = cost.price([5, 9, 16])
    assert fill(price) == [8, 12, 16] and fill(0.9 * price) == [5, 9, 16]
    assert fill(price, most=(7, 24, 16)) == [7, 12, 16]
    assert fill(price + 0.34) == [8, 16, 16]
    assert fill(price + 0.34, urgency=(3.0, 2.0, 1.0)) == [12, 12, 16]
    assert fill(2 * price) == list(WIDTHS)


def test_allocating_with_the_learned_budget_reproduces_the_learned_widths(pretrained):
    cost = flops_model(pretrained[1])
    learned = torch.tensor([9.0, 12.0, 11.0])
    chosen = DSA.allocate(pretrained[1].groups, cost, learned, torch.ones(sum(WIDTHS)), cost.price(learned.numpy()))
    # Levels are one to two channels apart.
    np.testing.assert_allclose(chosen.widths, learned.numpy(), atol=2)


def test_worth_rises_with_the_width_even_where_the_cost_is_flat():
    cost = staircase((8, 8), (1.0, 0.0))
    values = worth(cost, torch.tensor([4.0, 4.0]))
    assert all((np.diff(value) > 0).all() for value in values)


def test_a_group_kept_whole_on_a_plateau_is_not_crushed():
    """Where the search stands, group 0 costs nothing more above width 8: its local slope is 0, its mean one is not."""
    knots = np.arange(1, 17)
    axes = tuple(CostAxis(np.array([g]), np.array([1]), 0, knots) for g in (0, 1))
    x, y = np.meshgrid(knots.astype(float), knots.astype(float), indexing="ij")
    table = np.where(y <= 8, np.minimum(x, 8), x) + 0.5 * y
    cost = CostModel("ms", np.array([16, 16]), axes, (CostTerm("pair", (0, 1), table),))
    learned = torch.tensor([15.0, 4.0])
    assert cost.value_and_grad(learned)[1][0] == 0
    assert allocate(cost, worth(cost, learned), 11.0).widths[0] == 16


# -- uniform


@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.35])
def test_uniform_is_the_largest_ratio_that_fits(pretrained, fraction):
    cost = staircase(WIDTHS, (1.0, 2.0, 3.0))
    budget = fraction * cost.dense
    chosen = method_class("uniform").allocate(pretrained[1].groups, cost, None, None, budget)
    assert cost.price(chosen.widths) <= budget
    full = np.array(WIDTHS)
    larger = [np.maximum(1, np.rint(r * full)).astype(int) for r in np.linspace(0, 1, 5001)]
    best = max((w.tolist() for w in larger if cost.price(w) <= budget), key=sum)
    assert chosen.widths.tolist() == best
    assert np.ptp(chosen.widths / full) <= 1 / full.min()


def test_uniform_respects_multiples_pins_and_minimum(pretrained):
    cost = staircase(WIDTHS, (1.0, 1.0, 1.0))
    chosen = method_class("uniform").allocate(
        pretrained[1].groups,
        cost,
        None,
        None,
        0.6 * cost.dense,
        multiple=4,
        pinned={0: 15},
        minimum=np.array([1, 12, 1]),
    )
    assert chosen.widths[0] == 15 and chosen.widths[1] >= 12 and (chosen.widths[1:] % 4 == 0).all()


def test_uniform_says_when_nothing_fits(pretrained):
    cost = staircase(WIDTHS, (1.0, 1.0, 1.0))
    with pytest.raises(InfeasibleBudget, match="cheapest"):
        method_class("uniform").allocate(pretrained[1].groups, cost, None, None, 0.05)


def test_uniform_trains_nothing_but_the_weights(pretrained):
    model, run = start(pretrained, method="uniform", options={"kind": "l1"})
    with run:
        train(model, 5, run)
    assert (run.widths() / torch.tensor(WIDTHS)).std() < 0.1
    assert run.ranking().shape == (sum(WIDTHS),)


# -- the registry


@pytest.mark.parametrize("name", sorted(METHODS))
def test_registered_methods_describe_themselves(name):
    method = create(name)
    assert method.name == name and method.summary and method.source


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: create("dsaa"), "unknown; possible: csr, dais, .*uniform"),
        (lambda: create("dsa", learning_rate=1), "'dsa' does not take learning_rate; its options: lr, theta"),
        (lambda: create("uniform", name="x"), "does not take name; its options: kind"),
        (lambda: create("dsa", theta="high"), r"cannot use theta='high'; it takes theta: float = 3\.0"),
        (
            lambda: create("dsa", temperature=[2.0]),
            r"cannot use temperature=\[2\.0\]; it takes .*tuple\[float, float\]",
        ),
        (lambda: create("ddpnas", around="dsa", around_options={"x": 1}), "'dsa' does not take x"),
        (lambda: create("dsa", temperature=(5.0, 1.0)), "must rise"),
        (lambda: create("dsa", interval=0), "interval"),
        (lambda: create("dsa", scores="l2"), "gamma, taylor"),
        (lambda: create("uniform", kind="random"), "one of bn"),
    ],
    ids=["method", "option", "name", "theta", "pair", "inner", "temperature", "interval", "scores", "kind"],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


@pytest.mark.parametrize(
    "kind, fitting, unfit",
    [
        (float, [1, 0.5, np.float32(1)], ["1", True, None, [1.0]]),
        (int, [1, np.int64(2)], [1.0, "1", False]),
        (bool, [True], [1, "true"]),
        (float | None, [None, 2], ["none"]),
        (tuple[float, float], [[1, 0.5], (1.0, 2.0)], [[1.0], [1.0, "x"], 1.0]),
        (str | Sequence[int] | None, ["dsa", [1, 2], np.array([3, 4])], [1, [1.5]]),
        (Mapping[str, Any] | None, [{"a": 1}, None], ["a"]),
        (Literal["l1", "l2"], ["l1", "l3"], [2]),
        (inspect.Parameter.empty, ["anything"], []),
    ],
    ids=str,
)
def test_values_fit_the_annotations_of_options(kind, fitting, unfit):
    assert [_fits(value, kind) for value in fitting] == [True] * len(fitting)
    assert [_fits(value, kind) for value in unfit] == [False] * len(unfit)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_defaults_fit_their_own_annotations(name):
    options = {key: p.default for key, p in inspect.signature(method_class(name)).parameters.items()}
    assert isinstance(create(name, **options), method_class(name))


def test_a_mistake_inside_a_method_is_not_blamed_on_its_options(monkeypatch):
    class Broken(DSA):
        def __init__(self, theta: float = 3.0) -> None:
            super().__init__(nosuch=theta)

    monkeypatch.setitem(METHODS, "broken", f"{__name__}:Broken")
    monkeypatch.setattr(sys.modules[__name__], "Broken", Broken, raising=False)
    with pytest.raises(TypeError, match="nosuch"):
        create("broken", theta=1.0)


def test_bounds_are_checked_and_leave_the_network_unmasked(pretrained):
    for wrong in ({"minimum": np.array([1, 1, 17])}, {"pinned": {3: 1}}, {"pinned": {0: 17}}):
        with pytest.raises(InvalidInput):
            start(pretrained, **wrong)


class Told(list):
    """Batches, and the epochs that were announced."""

    def __init__(self, batches):
        super().__init__(batches)
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_held_out_batches_begin_again_as_the_next_epoch(pretrained):
    loader = Told(batches(3, seed=5))
    _, run = start(pretrained, method="iterative", held_out=loader, steps=0)
    held_out = HeldOut(run._masked, loader)
    loader.epochs.clear()
    drawn = [held_out.batch()[0] for _ in range(7)]
    assert loader.epochs == [0, 1, 2]
    assert torch.equal(drawn[0], drawn[3]) and not torch.equal(drawn[0], drawn[1])
    resumed = HeldOut(run._masked, Told(loader))
    resumed.skip_to(7)
    assert resumed._loader.epochs == [0, 1, 2] and torch.equal(resumed.batch()[0], held_out.batch()[0])
    run.close()


def test_the_log_says_whether_a_method_that_wants_held_out_images_has_them(pretrained):
    images = list(batches(3, seed=5))
    for name, given, expected in (
        ("iterative", {"held_out": images, "calibration": images}, {"held_out": 1.0}),
        ("iterative", {"calibration": images}, {"held_out": 0.0}),
        ("dais", {}, {"held_out": 0.0}),
        ("dsa", {"held_out": images}, {}),
    ):
        _, run = start(pretrained, method=name, steps=10, **given)
        assert {key: value for key, value in run.log().items() if key == "held_out"} == expected
        run.close()
    wanting = {name for name in METHODS if create(name).wants_held_out}
    assert wanting == {"dais", "ddpnas", "iterative"} and create("increg", floor=0.5).wants_held_out

"""Sampling, credit and deletion find what is known to be best, and the expected cost is exact."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hwprune.budget import BudgetController
from hwprune.data import load_data
from hwprune.errors import InvalidInput
from hwprune.graph import trace
from hwprune.latency import CostModel, flops_model
from hwprune.latency.model import CostAxis, CostTerm
from hwprune.models import load_model
from hwprune.search import Search, method_class, search
from hwprune.search.ddpnas import DDPNAS, Distribution, ExpectedCost, worth_of_widths
from hwprune.train import Recipe

WIDTHS = (12, 16, 12)


class Chain(nn.Sequential):
    """Three convolutions with batch norm and ReLU, so three groups in a row."""

    def __init__(self, widths=WIDTHS, classes=4):
        layers, channels = [], 1
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (32,), generator=generator)
    return torch.randn(32, 1, 6, 6, generator=generator) + (y.float() - 1.5)[:, None, None, None], y


def network():
    torch.manual_seed(0)
    model = Chain()
    return model, trace(model.eval(), (torch.randn(2, 1, 6, 6),))


def start(model, program, fraction=0.5, steps=60, cost=None, held_out=True, seed=0, bounds=None, **options):
    cost = cost or flops_model(program)
    controller = BudgetController(fraction * cost.dense, cost.dense, ramp_steps=steps // 2)
    return Search(
        "ddpnas",
        model,
        program.groups,
        cost,
        controller,
        steps,
        options,
        seed,
        held_out=[batch(1000 + i) for i in range(3)] if held_out else None,
        **(bounds or {}),
    )


def train(model, run, begin=0, stop=60):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    model.train()
    for step in range(begin, stop):
        x, y = batch(step)
        run.before_step(step)
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        run.after_backward(step)
        optimiser.step()
        run.after_step(step)


# -- the distribution


def test_a_sweep_uses_every_option_that_is_alive_equally_often():
    choices = Distribution(np.array([6, 3, 6, 1]))
    choices.alive[0, 2] = choices.alive[2, 5] = False
    drawn = choices.sweep(torch.Generator().manual_seed(0))
    assert drawn.shape == (5, 4)
    for column, alive in zip(drawn.T, choices.alive, strict=True):
        counts = np.bincount(column, minlength=6)
        assert not counts[~alive].any() and np.ptp(counts[alive]) <= 1
    other = choices.sweep(torch.Generator().manual_seed(1))
    assert not np.array_equal(drawn, other)


def test_credit_by_softmax_is_the_formula_of_the_paper():
    choices = Distribution(np.array([3, 3]), "softmax")
    rounds = [([[0, 1], [1, 2], [2, 0]], [0.5, 0.51, 0.5]), ([[0, 0], [1, 1], [2, 2]], [0.52, 0.5, 0.5])]
    expected = np.zeros((2, 3))
    for networks, scores in rounds:
        for network, score in zip(networks, scores, strict=True):
            choices.record(np.array(network), score)
        known = np.stack([np.ones(len(choices.scores)), np.linspace(-1, 1, len(choices.scores))], 1)
        slope = np.linalg.lstsq(known, np.array(choices.scores), rcond=None)[0][1]
        detrended = np.array(choices.scores)[-3:] - slope * known[-3:, 1]
        table = np.zeros((2, 3))
        for network, score in zip(networks, detrended, strict=True):
            table[[0, 1], network] = score
        theta = np.exp(100 * table) / np.exp(100 * table).sum(1, keepdims=True)
        expected = theta + 0.5 * expected
        choices.judge(1)
        np.testing.assert_allclose(np.exp(choices.merit), expected)
    odds = choices.odds(np.zeros((2, 3)))
    np.testing.assert_allclose(odds, expected / expected.sum(1, keepdims=True))


def found(credit, groups, options=8, repeats=3, noise=0.0, trend=0.0, seed=0):
    """Additive accuracy, options apart by a point: (choices of the best option, share of the attainable gain)."""
    random = np.random.default_rng(seed)
    worth = random.normal(0, 0.01, (groups, options))
    choices = Distribution(np.full(groups, options), credit)
    generator = torch.Generator().manual_seed(seed)
    clock = 0
    for alive in range(options, 1, -1):
        for _ in range(repeats):
            for drawn in choices.sweep(generator):
                accuracy = 0.5 + worth[np.arange(groups), drawn].sum() + noise * random.normal() + trend * clock
                choices.record(drawn, accuracy)
                clock += 1
        choices.judge(repeats)
        odds = choices.odds(np.zeros_like(choices.merit))
        choices.alive[np.arange(groups), np.where(choices.alive, odds, np.inf).argmin(1)] = False
        assert (choices.alive.sum(1) == alive - 1).all()
    # The ridge remembers what it deleted; the odds of the softmax are those of the survivor.
    merit = choices.merit if credit == "ridge" else np.where(choices.alive, choices.merit, -np.inf)
    picked = worth[np.arange(groups), merit.argmax(1)]
    gain = (picked - worth.mean(1)).sum() / (worth.max(1) - worth.mean(1)).sum()
    return (picked == worth.max(1)).mean(), gain


def test_ridge_credits_better_than_softmax_with_and_without_noise():
    for noise in (0.0, 0.01):
        ridge, softmax = (
            np.mean([found(credit, 14, noise=noise, seed=seed) for seed in range(6)], 0)
            for credit in ("ridge", "softmax")
        )
        assert ridge[0] > softmax[0] + 0.1 and ridge[1] > softmax[1] + 0.05
    assert np.mean([found("ridge", 14, seed=seed) for seed in range(6)], 0)[1] > 0.9


@pytest.mark.parametrize("credit", ["ridge", "softmax"])
def test_a_network_that_learns_meanwhile_does_not_favour_what_was_drawn_late(credit):
    with_trend = np.mean([found(credit, 6, options=5, trend=0.005, seed=seed) for seed in range(6)], 0)
    without = np.mean([found(credit, 6, options=5, seed=seed) for seed in range(6)], 0)
    assert with_trend[1] > without[1] - 0.1


def test_noise_alone_leaves_the_common_slope_of_the_widths():
    random = np.random.default_rng(0)
    sizes = np.log(np.tile([0.25, 0.5, 1.0], (8, 1)))
    choices = Distribution(np.full(8, 3), "ridge", sizes)
    for seed in range(10):
        for drawn in choices.sweep(torch.Generator().manual_seed(seed)):
            choices.record(drawn, 0.8 + 0.01 * sizes[np.arange(8), drawn].sum() + 0.002 * random.normal())
    choices.judge()
    assert (np.diff(choices.merit, axis=1) > 0).all()
    np.testing.assert_allclose(choices.merit - choices.merit[:, -1:], sizes, atol=0.25)


# -- the expected cost


def table_model(exact=False):
    """Four groups: a chain, a layer from a group to itself, and one that reads a concatenation of three."""
    random = np.random.default_rng(0)

    def axis(groups, weights, offset, last):
        first = offset + sum(weights)
        return CostAxis(np.array(groups), np.array(weights), offset, np.unique([first, *range(4, last, 4), last]))

    axes = (
        axis([0], [1], 0, 8),
        axis([1], [1], 0, 12),
        axis([2], [2], 1, 17),
        axis([0, 1, 2], [1, 1, 1], 0, 28),
        axis([3], [1], 0, 8),
    )

    def term(name, *used):
        sizes = [axes[a].knots for a in used]
        if exact:
            return CostTerm(name, used, np.multiply.outer(*sizes).astype(float) if len(used) == 2 else sizes[0] * 1.0)
        return CostTerm(name, used, random.uniform(0.5, 2.0, [len(s) for s in sizes]))

    terms = (term("01", 0, 1), term("11", 1, 1), term("2", 2), term("cat", 3, 4), term("own", 3, 0))
    fixed = CostTerm("fixed", (), np.array(0.3))
    return CostModel("ms", np.array([8, 12, 8, 8]), axes, (*terms, fixed), scale=1.5, offset=0.2, exact=exact)


@pytest.mark.parametrize("exact", [False, True], ids=["staircase", "formula"])
def test_the_expected_cost_is_the_mean_price_of_all_networks(exact):
    cost = table_model(exact)
    options = np.array([[2, 5, 8], [3, 12, 12], [1, 4, 8], [3, 6, 8]])
    odds = np.random.default_rng(1).dirichlet(np.ones(3), 4)
    odds[1] = [0.25, 0.75, 0.0]
    networks = np.array(list(itertools.product(range(3), repeat=4)))
    chances = odds[np.arange(4), networks].prod(1)
    prices = cost.price(options[np.arange(4), networks])
    mean, gradient = ExpectedCost(cost, options).value_and_grad(odds)
    assert mean == pytest.approx(chances @ prices, rel=1e-12)
    for group, option in ((0, 1), (1, 0), (2, 2)):
        conditional = []
        for which in (option, 0 if option else 1):
            sure = odds.copy()
            sure[group] = np.eye(3)[which]
            conditional.append(ExpectedCost(cost, options).value_and_grad(sure)[0])
        difference = gradient[group, option] - gradient[group, 0 if option else 1]
        assert difference == pytest.approx(conditional[0] - conditional[1], rel=1e-9)


def test_one_certain_network_costs_its_price():
    _, program = network()
    cost = flops_model(program)
    options = np.array([[3, 12], [8, 16], [6, 12]])
    sure = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert ExpectedCost(cost, options).value_and_grad(sure)[0] == pytest.approx(cost.price(np.array([3, 16, 6])))


# -- deletion, and the pick


def test_the_odds_are_pulled_until_the_expected_cost_meets_the_budget():
    model, program = network()
    run = start(model, program, 0.5)
    method, cost = run.method, run.context.cost
    method._choices.merit = np.where(np.isfinite(method._choices.merit), np.log(method._table), -np.inf)
    free = method._expected.value_and_grad(method._choices.odds(np.zeros_like(method._choices.merit)))[0]
    odds, expected = method._odds()
    assert free > 0.5 * cost.dense and 0.49 * cost.dense < expected <= 0.5 * cost.dense
    np.testing.assert_allclose(odds.sum(1), 1)


def test_an_option_without_which_no_network_fits_is_not_deleted():
    model, program = network()
    run = start(model, program, 0.3, options=5)
    method, context = run.method, run.context
    # Accuracy says that the smaller the worse, by far more than any budget can pull.
    merit = 1e9 * np.arange(method._table.shape[1], dtype=float) * np.ones((3, 1))
    for limit in (4, 3, 2, 1):
        method._choices.merit = merit
        method._delete(limit)
        assert (method._choices.alive.sum(1) == limit).all()
        cheapest = method._table[np.arange(3), method._choices.alive.argmax(1)]
        assert context.cost.price(cheapest) <= context.controller.budget
    assert method._choices.alive[:, 1:].any()  # where the budget has room, accuracy had its way


def test_small_widths_survive_by_what_they_cost():
    model, program = network()
    run = start(model, program, 0.4)
    method = run.method
    method._choices.merit = np.where(method._choices.alive, 0.05 * np.log(method._table), -np.inf)
    method._delete(int(method._choices.alive.sum(1).max()) - 1)
    assert method._choices.alive[:, 0].all() and not method._choices.alive[:, -1].all()


def test_the_worth_of_a_width_is_known_between_the_options_only():
    options, merit = np.array([[4, 8, 10, 16], [5, 6, 6, 6]]), np.array([[0.0, 1.0, 0.9, 2.0], [0.0, 0.3, 0.0, 0.0]])
    wide, narrow = np.split(worth_of_widths(options, np.array([4, 2]), merit, np.array([20, 8]), np.ones(2)), [20])
    for part in (wide, narrow):
        assert (np.diff(part) > 0).all()
    inside = wide[3:16]
    assert (np.diff(inside, n=2) <= 1e-9).all() and inside[-1] - inside[0] == pytest.approx(2.0, abs=0.2)
    assert wide[-1] - wide[15] < 0.05 and narrow[-1] - narrow[5] < 0.05
    # A channel below the least option costs more than any that may be gained elsewhere, per e-fold of the width.
    assert narrow[4] - narrow[3] > (inside[-1] - inside[-2]) * 2


def test_the_pick_is_the_best_network_within_the_budget():
    model, program = network()
    run = start(model, program, 0.5)
    method, cost = run.method, run.context.cost
    wish = np.array([1.0, 4.0, 0.3])
    method._choices.merit = np.where(method._choices.alive, wish[:, None] * np.log(method._table), -np.inf)
    method._pick()
    widths = method.widths().numpy()
    assert cost.price(widths) <= 0.5 * cost.dense
    value = method.values().numpy().reshape(-1)
    parts = np.split(value, np.cumsum(WIDTHS)[:-1])
    best = max(
        sum(part[n - 1] for part, n in zip(parts, w, strict=True))
        for w in itertools.product(*[cost.levels(g).tolist() for g in range(3)])
        if cost.price(np.array(w)) <= 0.5 * cost.dense
    )
    picked = sum(part[int(n) - 1] for part, n in zip(parts, widths, strict=True))
    assert picked == pytest.approx(best, rel=1e-3)
    ratios = widths / np.array(WIDTHS)
    assert ratios[1] > ratios[2]


def test_the_pick_among_the_options_is_the_best_of_their_enumeration():
    model, program = network()
    run = start(model, program, 0.5, pick="options", options=4, last=2)
    method, cost = run.method, run.context.cost
    wish = np.array([1.0, 4.0, 0.3])
    method._choices.merit = np.where(method._choices.alive, wish[:, None] * np.log(method._table), -np.inf)
    for limit in (3, 2):
        method._delete(limit)
    method._pick()
    left = [np.flatnonzero(row) for row in method._choices.alive]
    worth = {
        tuple(method._table[g, k] for g, k in enumerate(network)): sum(
            method._choices.merit[g, k] for g, k in enumerate(network)
        )
        for network in itertools.product(*left)
    }
    fits = {widths: value for widths, value in worth.items() if cost.price(np.array(widths)) <= 0.5 * cost.dense}
    assert len(worth) == 8 and tuple(method.widths().int().tolist()) == max(fits, key=fits.get)


# -- the search


def test_masks_are_the_best_channels_of_the_sampled_widths():
    model, program = network()
    run = start(model, program)
    kept = run.method.masks(0).split(list(WIDTHS))
    assert [int(part.sum()) for part in kept] == run.widths().int().tolist()
    scores = run.method._ranks[: WIDTHS[0]]
    assert set(np.flatnonzero(kept[0].numpy())) == set(np.argsort(scores)[: int(kept[0].sum())])


def test_every_network_gets_its_slice_and_the_pick_the_rest():
    model, program = network()
    run = start(model, program, 0.5, steps=60, options=3, repeats=2, last=1, part=0.5)
    method = run.method
    assert method._slice == 3  # 30 steps for 2 · (3 + 2) networks
    with run:
        seen = []
        for step in range(60):
            train(model, run, step, step + 1)
            seen.append(len(method._choices.scores))
    assert seen[:30] == [(step + 1) // 3 for step in range(30)] and seen[-1] == 10
    assert method._picked and run.context.cost.price(method.widths().numpy()) <= 0.5 * run.context.cost.dense


def test_a_search_without_steps_judges_the_network_as_it_is():
    model, program = network()
    before = copy.deepcopy(model.state_dict())
    with start(model, program, 0.5, steps=0, options=3) as run:
        assert run.context.cost.price(run.widths().numpy()) <= 0.5 * run.context.cost.dense
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_search_too_short_for_its_networks_still_picks():
    model, program = network()
    with start(model, program, 0.5, steps=6) as run:
        train(model, run, stop=6)
    assert run.method._picked and run.context.cost.price(run.widths().numpy()) <= 0.5 * run.context.cost.dense


def test_pinned_and_least_widths_are_kept():
    model, program = network()
    with start(model, program, 0.5, bounds={"minimum": np.array([1, 1, 8]), "pinned": {0: 10}}, options=3) as run:
        train(model, run)
    drawn = run.method._table
    assert (drawn[0] == 10).all() and (drawn[2] >= 8).all()
    widths = run.widths()
    assert widths[0] == 10 and widths[2] >= 8


@pytest.mark.parametrize("credit", ["ridge", "softmax"])
@pytest.mark.parametrize("around, stop", [(None, 17), ("uniform", 20), ("uniform", 41), ("dsa", 11)])
def test_a_resumed_search_ends_the_same(credit, around, stop, tmp_path):
    options = {"options": 4, "credit": credit, "around": around}
    model, program = network()
    other, resumed = copy.deepcopy(model), copy.deepcopy(model)
    with start(model, program, **options) as whole:
        train(model, whole)
    first = start(other, program, **options)
    train(other, first, stop=stop)
    torch.save({"model": other.state_dict(), "search": first.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = start(resumed, program, **options, seed=4)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["search"])
    with second:
        train(resumed, second, begin=stop)
    assert torch.equal(second.widths(), whole.widths()) and torch.equal(second.ranking(), whole.ranking())
    assert torch.equal(second.method.values(), whole.method.values())
    assert second.history == whole.history
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_options_lie_around_given_widths():
    model, program = network()
    run = start(model, program, 0.6, around=[6, 9, 12], reach=1)
    method, cost = run.method, run.context.cost
    for g, (width, row, count) in enumerate(zip((6, 9, 12), method._table, method._choices.counts, strict=True)):
        levels = cost.levels(g)
        expected = {width, *levels[levels < width][-1:].tolist(), *levels[levels > width][:1].tolist()}
        assert set(row[:count].tolist()) == expected


def test_another_method_goes_before_and_its_solution_is_refined():
    model, program = network()
    with start(model, program, 0.5, around="dsa", first=0.5, reach=1, around_options={"lr": 0.1}) as run:
        train(model, run, stop=30)
        assert run.method._choices is None and run.method._inner.lr == 0.1
        theirs = run.method._inner.widths()
        train(model, run, begin=30)
    context = run.context
    assert context.cost.price(run.widths().numpy()) <= 0.5 * context.cost.dense
    assert (np.abs(np.log(run.method._table / theirs.numpy()[:, None])).min(1) < 0.7).all()


def test_a_real_network_is_pruned_within_its_budget():
    data = load_data("digits", batch_size=128, validation=0.2, seed=0)
    torch.manual_seed(0)
    model = load_model("resnet8", classes=10, in_channels=1)
    program = trace(model.eval(), (torch.randn(2, 1, 8, 8),))
    cost = flops_model(program)
    recipe = Recipe(epochs=10, lr=0.1, batch_size=128)
    result = search(
        "ddpnas", model, program.groups, cost, 0.4 * cost.dense, data.train, recipe,
        held_out=data.validation, options={"options": 4, "repeats": 1}, progress=False,
    )  # fmt: skip
    chosen = method_class("ddpnas").allocate(
        program.groups, cost, result.widths, result.ranking, 0.4 * cost.dense, value=result.value
    )
    assert chosen.widths.tolist() == result.widths.tolist() and chosen.cost <= 0.4 * cost.dense
    assert result.log[-1]["held_out_accuracy"] > 0.5


def test_without_held_out_images_it_says_what_to_give():
    model, program = network()
    with pytest.raises(InvalidInput, match="give a held_out loader"):
        start(model, program, held_out=False)


def test_a_checkpoint_of_another_network_is_refused():
    model, program = network()
    run = start(model, program)
    state = run.state_dict()
    state["method"]["ranks"] = torch.zeros(7)
    with pytest.raises(InvalidInput, match="7 channels"):
        run.load_state_dict(state)


@pytest.mark.parametrize(
    "option",
    [{"options": 1}, {"repeats": 0}, {"part": 0.0}, {"credit": "lasso"}, {"kind": "x"}, {"around": "ddpnas"},
     {"reach": 0}, {"first": 1.0}],
)  # fmt: skip
def test_wrong_options_are_named(option):
    with pytest.raises(InvalidInput, match=next(iter(option))):
        DDPNAS(**option)


def test_widths_to_refine_must_fit_the_network():
    model, program = network()
    with pytest.raises(InvalidInput, match="one width per group"):
        start(model, program, around=[4, 4])

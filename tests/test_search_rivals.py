"""The rivals that learned allocations have to beat: each does what its paper says, and meets the budget."""

import copy
import itertools

import numpy as np
import pytest
import torch
from test_search import WIDTHS, Chain, accuracy, batches, staircase, train

from hwprune.budget import BudgetController
from hwprune.errors import InfeasibleBudget, InvalidInput
from hwprune.graph import cut, keep_top, trace
from hwprune.importance import importance
from hwprune.latency import flops_model
from hwprune.search import Search, create, method_class
from hwprune.search.base import at_levels
from hwprune.search.knapsack import summed_from_the_top
from hwprune.train import recalibrate

RIVALS = ("knapsack", "magnitude", "iterative")
STEPS = 60


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(0)
    model = train(Chain(), 200, lr=0.1)
    assert accuracy(model) > 0.9
    return model, trace(model.eval(), (torch.randn(2, 1, 6, 6),))


def start(pretrained, method, fraction=0.5, steps=STEPS, cost=None, images=True, **kwargs):
    model, program = pretrained
    model = copy.deepcopy(model)
    cost = cost or flops_model(program)
    controller = BudgetController(fraction * cost.dense, cost.dense, ramp_steps=steps // 2)
    held_out = list(batches(6, seed=5)) if images else None
    return model, Search(method, model, program.groups, cost, controller, steps, held_out=held_out, **kwargs)


def allocated(run, fraction):
    found, context = run.result(), run.context
    chosen = type(run.method).allocate(
        context.groups,
        context.cost,
        found.widths,
        found.ranking,
        fraction * context.cost.dense,
        value=found.value,
        minimum=context.minimum,
        pinned=context.pinned,
    )
    return chosen.widths, found.ranking


def cut_accuracy(model, program, widths, ranking):
    smaller = cut(model, program, keep_top(program.groups, widths, ranking)).module
    recalibrate(smaller, list(batches(8)), batches=8)
    return accuracy(smaller)


# -- what all of them owe


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("steps", [0, STEPS])
def test_the_budget_is_met_with_and_without_steps_and_the_network_still_works(pretrained, name, steps):
    model, run = start(pretrained, name, 0.6, steps)
    with run:
        train(model, steps, run)
    widths, ranking = allocated(run, 0.6)
    cost = run.context.cost
    assert cost.price(widths) <= 0.6 * cost.dense
    assert cost.price(run.widths().numpy()) <= 0.6 * cost.dense * 1.001
    assert cut_accuracy(model, pretrained[1], widths, ranking) > (0.85 if steps else 0.5)


@pytest.mark.parametrize("name", RIVALS)
def test_pinned_and_least_widths_are_kept(pretrained, name):
    model, run = start(pretrained, name, 0.5, minimum=np.array([1, 1, 12]), pinned={0: 15})
    with run:
        train(model, STEPS, run)
    for widths in (run.widths().numpy(), allocated(run, 0.5)[0]):
        assert widths[0] == 15 and widths[2] >= 12 and widths[1] < 24


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("stop", [7, 31])
def test_a_resumed_search_ends_the_same(pretrained, name, stop, tmp_path):
    model, whole = start(pretrained, name, seed=3)
    with whole:
        train(model, STEPS, whole)

    other, first = start(pretrained, name, seed=3)
    train(other, STEPS, first, until=stop)
    torch.save({"model": other.state_dict(), "search": first.state_dict()}, tmp_path / "checkpoint.pt")
    first.close()

    resumed, second = start(pretrained, name, seed=4)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["search"])
    with second:
        train(resumed, STEPS, second, start=stop)
    assert torch.equal(second.widths(), whole.widths()) and torch.equal(second.ranking(), whole.ranking())
    assert second.history == whole.history
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: create("knapsack", batches=0), "batches=0"),
        (lambda: create("magnitude", kind="random"), "one of bn"),
        (lambda: create("iterative", share=0.0), "share=0.0"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


@pytest.mark.parametrize("name, steps", [("knapsack", 0), ("iterative", STEPS)])
def test_missing_held_out_images_are_asked_for(pretrained, name, steps):
    with pytest.raises(InvalidInput, match="give held-out images"):
        start(pretrained, name, steps=steps, images=False)


@pytest.mark.parametrize("name", ["knapsack", "iterative"])
def test_a_checkpoint_of_another_network_is_refused(pretrained, name):
    _, run = start(pretrained, name)
    state = run.state_dict()
    state["method"][{"knapsack": "saliency", "iterative": "kept"}[name]] = torch.zeros(7)
    with pytest.raises(InvalidInput, match="7 channels"):
        run.load_state_dict(state)


# -- knapsack


def test_saliencies_are_the_first_order_of_what_removing_a_channel_changes(pretrained):
    """|γ dL/dγ + β dL/dβ| of the batch norms, summed over the steps."""
    model, run = start(pretrained, "knapsack")
    expected = torch.zeros(sum(WIDTHS))
    model.train()
    for step, (x, y) in enumerate(batches(3)):
        run.before_step(step)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        run.after_backward(step)
        norms = [module for module in model if isinstance(module, torch.nn.BatchNorm2d)]
        parts = [n._parameters["weight"] * n._parameters["weight"].grad for n in norms]
        parts = [p + n._parameters["bias"] * n._parameters["bias"].grad for p, n in zip(parts, norms, strict=True)]
        expected += torch.cat(parts).detach().abs()
    torch.testing.assert_close(run.ranking(), expected / 3, rtol=1e-4, atol=1e-7)


def test_a_level_is_worth_the_sum_of_its_best_channels():
    scores = torch.tensor([3.0, 1.0, 2.0, 0.5, 10.0])
    assert summed_from_the_top(scores, np.array([3, 2])).tolist() == [3, 5, 6, 10, 10.5]


def test_the_knapsack_is_solved_exactly(pretrained):
    cost = staircase(WIDTHS, (1.0, 2.0, 3.0))
    model, run = start(pretrained, "knapsack", cost=cost)
    with run:
        train(model, 10, run)
    values = at_levels(run.context.groups, cost, run.result().value)
    options = [[*zip(cost.levels(g).tolist(), v, strict=True)] for g, v in enumerate(values)]
    for fraction in (0.8, 0.5, 0.3):
        widths, _ = allocated(run, fraction)
        found = sum(dict(option)[w] for option, w in zip(options, widths.tolist(), strict=True))
        best = max(
            sum(worth for _, worth in pick)
            for pick in itertools.product(*options)
            if cost.price(np.array([width for width, _ in pick])) <= fraction * cost.dense
        )
        assert found >= best - 1e-4 * sum(float(np.ptp(v)) for v in values)


def test_what_a_round_leaves_out_stays_out_and_the_last_round_fits_the_budget(pretrained):
    model, run = start(pretrained, "knapsack", options={"rounds": 4})
    left = [run.method._alive.clone()]
    with run:
        for start_ in range(0, STEPS, 5):
            train(model, STEPS, run, start=start_, until=start_ + 5)
            left.append(run.method._alive.clone())
    assert all((after <= before).all() for before, after in itertools.pairwise(left))
    assert [int(after.sum()) for after in left] == sorted((int(after.sum()) for after in left), reverse=True)
    assert left[0].all() and 0 < left[-1].mean() < 1
    widths = np.array([int(part.sum()) for part in left[-1].split(list(WIDTHS))])
    assert run.context.cost.price(widths) <= run.context.controller.budget


def test_an_overflowing_step_leaves_no_trace_in_the_saliencies(pretrained):
    _, run = start(pretrained, "knapsack")
    run.before_step(0)
    run.method._mask.grad = torch.full((sum(WIDTHS),), float("nan"))
    run.after_backward(0)
    assert (run.ranking() == run.ranking()[0]).all() and run.method._draws == 0


def test_the_value_of_another_network_is_refused(pretrained):
    with pytest.raises(InvalidInput, match=r"value has shape \(7,\)"):
        at_levels(pretrained[1].groups, flops_model(pretrained[1]), torch.zeros(7))


# -- magnitude


@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.3])
def test_one_threshold_decides_in_all_groups(pretrained, fraction):
    model, program = pretrained
    cost = flops_model(program)
    scores = importance(model, program.groups, "l2").numpy()
    budget = fraction * cost.dense
    chosen = method_class("magnitude").allocate(program.groups, cost, None, torch.from_numpy(scores), budget)
    keep = keep_top(program.groups, chosen.widths, scores)
    floors = np.ceil(0.1 * program.groups.widths)
    free = np.repeat(chosen.widths > floors, program.groups.widths)
    assert scores[keep & free].min() > scores[~keep & free].max()
    # The next channel does not fit any more.
    threshold = scores[~keep].max()
    wider = np.add.reduceat((scores >= threshold).astype(int), program.groups.offsets[:-1])
    assert cost.price(np.maximum(wider, floors.astype(int))) > budget


def test_a_group_of_small_weights_keeps_a_tenth(pretrained):
    program = pretrained[1]
    cost = flops_model(program)
    scores = torch.ones(sum(WIDTHS))
    scores[: WIDTHS[0]] = 1e-3
    budget = 0.9 * cost.dense
    chosen = method_class("magnitude").allocate(program.groups, cost, None, scores, budget)
    assert chosen.widths.tolist() == [2, 24, 16]
    tight = float(cost.price(np.array([1, 2, 1])))
    chosen = method_class("magnitude").allocate(program.groups, cost, None, scores + torch.rand(len(scores)), tight)
    assert cost.price(chosen.widths) <= tight, "a budget below the floors is met without them"
    with pytest.raises(InfeasibleBudget, match="no threshold"):
        method_class("magnitude").allocate(program.groups, cost, None, scores, 0.5 * cost.floor)


def test_magnitude_respects_multiples(pretrained):
    program = pretrained[1]
    cost = flops_model(program)
    scores = importance(pretrained[0], program.groups, "l2")
    chosen = method_class("magnitude").allocate(program.groups, cost, None, scores, 0.5 * cost.dense, multiple=4)
    assert (chosen.widths % 4 == 0).all() and cost.price(chosen.widths) <= 0.5 * cost.dense


# -- iterative


def test_a_round_narrows_the_group_that_matters_least():
    """Of the middle group, twenty of 24 channels are read by nothing: judged as it stands, it is the one to narrow."""
    torch.manual_seed(0)
    model = Chain()
    model[6].weight.data[:, 4:] = 0
    model[6].weight.register_hook(lambda g: torch.cat([g[:, :4], torch.zeros_like(g[:, 4:])], 1))
    train(model, 200, lr=0.1)
    program = trace(model.eval(), (torch.randn(2, 1, 6, 6),))
    cost = staircase(WIDTHS, (1.0, 1.0, 1.0))
    _, run = start((model, program), "iterative", 0.75, steps=0, cost=cost, options={"rounds": 3, "batches": 6})
    with run:
        pass
    assert run.widths().tolist() == [16, 4, 16]


def test_every_candidate_starts_from_the_same_weights_and_the_winner_goes_on(pretrained):
    model, run = start(pretrained, "iterative", options={"rounds": 2, "least": 4})
    method = run.method
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, STEPS, run, until=method._slice)
    assert method._at == 1, "the first candidate is done"
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    trained = [tensor.clone() for tensor in method._after]
    method._judges = [(x, (y + 1) % 4) for x, y in method._judges]  # the others are judged by wrong labels
    for _ in range(1, len(method._candidates)):
        method._advance()
    assert method._round == 2
    assert all(torch.equal(a, b) for a, b in zip(method._tensors(), trained, strict=True))


def test_the_price_falls_step_by_step_to_the_budget(pretrained):
    model, run = start(pretrained, "iterative", 0.4, log_every=1)
    with run:
        train(model, STEPS, run)
    costs = [row["cost_hard"] for row in run.history]
    assert costs == sorted(costs, reverse=True) and costs[-1] <= 0.4 * run.context.cost.dense
    assert len(set(costs)) == run.history[-1]["rounds"] + 1
    assert run.history[-1]["round"] == run.history[-1]["rounds"]
    # The last steps train the network that was found.
    done = costs.index(costs[-1])
    assert done < 0.85 * STEPS
    assert int(run.method.masks(STEPS).sum()) == int(run.widths().sum())


@pytest.mark.parametrize(
    "steps, options, plan",
    [
        (400, {}, (8, 3, 13)),  # rounds, candidates, slice: all groups in all rounds
        (60, {}, (8, 1, 6)),  # a third of the groups in every round
        (20, {}, (3, 1, 5)),  # and fewer rounds
        (2, {}, (1, 1, 1)),
    ],
)
def test_few_steps_mean_fewer_candidates_and_then_fewer_rounds(pretrained, steps, options, plan):
    _, run = start(pretrained, "iterative", steps=steps, options=options)
    log = run.log()
    assert (log["rounds"], log["candidates"], log["slice"]) == plan
    assert log["rounds"] * log["candidates"] * log["slice"] <= max(1, 0.8 * steps)


def test_where_no_single_group_saves_a_step_all_of_them_give(pretrained):
    _, run = start(pretrained, "iterative", 0.05, steps=0, options={"rounds": 1})
    rows = run.method._candidates
    assert len(rows) == 1 and (rows[0] < np.array(WIDTHS)).all()
    assert run.context.cost.price(rows[0]) <= 0.05 * run.context.cost.dense
    run.method.finish()
    run.close()

"""Increments press the least channels and let the others go, what is removed stays removed, and both tasks are met."""

import copy
import math

import numpy as np
import pytest
import torch
from test_search import Chain, batches, staircase, train
from torch import nn

from hwprune.budget import BudgetController
from hwprune.data import load_data
from hwprune.errors import InvalidInput
from hwprune.graph import cut, keep_top, trace
from hwprune.latency import flops_model
from hwprune.models import load_model
from hwprune.search import Search, search
from hwprune.search.increg import IncReg, Slices, Steps, increments, mass_worth
from hwprune.train import Recipe, evaluate, fit, recalibrate

WIDTHS = (16, 24, 16)


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(0)
    model = train(Chain(), 200, lr=0.1)
    return model, trace(model.eval(), (torch.randn(2, 1, 6, 6),))


def start(pretrained, fraction=0.5, steps=100, weights=(1.0, 1.0, 1.0), **kwargs):
    model, program = copy.deepcopy(pretrained[0]), pretrained[1]
    cost = staircase(WIDTHS, weights)
    controller = BudgetController(fraction * cost.dense, cost.dense, ramp_steps=steps // 2)
    return model, Search("increg", model, program.groups, cost, controller, steps, **kwargs)


# -- the increments


@pytest.mark.parametrize("due", [1, 8, 33])
@pytest.mark.parametrize("turn", [0.25, 0.6])
def test_increments_have_their_closed_form(due, turn):
    def at(place):
        return float(
            increments(torch.tensor([place], dtype=torch.float64), torch.tensor([due]), torch.tensor(3.0), turn)
        )

    middle = due * math.log(1 / turn) / math.log(2 / turn)
    assert turn != 0.25 or middle == pytest.approx(2 / 3 * due)
    assert at(0.0) == pytest.approx(3)
    assert at(due) == pytest.approx(0, abs=1e-12)
    assert at(middle - 1e-9) == pytest.approx(3 * turn) == at(middle + 1e-9)
    for place in np.linspace(0, 2 * middle, 9):
        assert at(2 * middle - place) == pytest.approx(2 * turn * 3 - at(place))
    assert at(due - 0.5) > 0 > at(due + 0.5)
    assert at(1e6) < -1e3 and math.isfinite(at(1e6))


def test_increments_depend_on_the_place_relative_to_the_quota_only():
    places = torch.arange(20.0)
    once = increments(places, torch.full((20,), 7), torch.ones(20))
    twice = increments(2 * places, torch.full((20,), 14), torch.ones(20))
    torch.testing.assert_close(once, twice)
    assert (increments(places, torch.zeros(20, dtype=torch.int64), torch.ones(20)) == -1).all()


# -- slices and worth


def test_slices_reach_every_member_of_a_channel(pretrained):
    model, program = pretrained
    slices = Slices(model, program.groups, torch.device("cpu"))
    flat = torch.rand(program.groups.total)
    spread = dict(zip([id(p) for p in slices.parameters], slices.spread(flat), strict=True))
    middle = flat[16:40]
    expected = middle[:, None, None, None] + flat[None, :16, None, None]
    torch.testing.assert_close(spread[id(model[3].weight)].expand(24, 16, 3, 3), expected.expand(24, 16, 3, 3))
    torch.testing.assert_close(spread[id(model[4].bias)], middle)
    torch.testing.assert_close(spread[id(model[11].weight)], flat[40:])

    scores = slices.gather([p.detach().abs() for p in slices.parameters])
    for channel in (0, 9, 23):
        members = (
            model[3].weight[channel],
            model[4].weight[channel],
            model[4].bias[channel],
            model[6].weight[:, channel],
        )
        assert float(scores[16 + channel]) == pytest.approx(
            sum(float(m.detach().abs().sum()) for m in members), rel=1e-5
        )


def test_worth_is_that_of_the_mass_of_the_best():
    scores, owner = torch.tensor([1.0, 3.0, 4.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 1, 1])
    expected = 1 - 1 / torch.tensor([0.25, 7 / 16, 0.5, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(mass_worth(scores, torch.tensor([16.0, 0.0]), owner, torch.tensor([0, 3])), expected)


def test_the_steps_use_the_budget_and_leave_no_step_that_fits(pretrained):
    """The cheap group of equal worth goes last, and what the last step left over is given back."""
    _, run = start(pretrained, weights=(1.0, 4.0, 1.0))
    context, values = run.context, run.method.values()
    for fraction in (0.9, 0.6, 0.3):
        limit = fraction * context.cost.dense
        widths, prices = Steps(context).within(limit, values, run.widths())
        assert context.cost.price(widths) <= limit and prices.argmax() == 1
        for g in range(3):
            above = [n for n in context.cost.levels(g) if n > widths[g]]
            wider = np.where(np.arange(3) == g, above[0], widths) if above else None
            assert wider is None or context.cost.price(wider) > limit
        assert widths[1] / 24 <= min(widths[0], widths[2]) / 16
    assert (Steps(context).within(0.0, values, run.widths())[0] == 1).all()
    run.close()


# -- a quadratic loss, whose minimum under λ is known: w = w0 / (1 + wd + λ)

WD = 0.1


class Quadratic:
    """½ ‖w - w0‖² over all parameters of a network with one group of 8 channels."""

    def __init__(self, fraction=0.5, steps=2000, magnitudes=None, **options):
        self.model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        self.magnitudes = torch.randperm(8) + 1.0 if magnitudes is None else magnitudes
        signs = [(torch.rand_like(parameter) < 0.5) * 2.0 - 1 for parameter in self.model.parameters()]
        with torch.no_grad():
            for parameter, sign in zip(self.model.parameters(), signs, strict=True):
                shape = {(8, 3): (8, 1), (8,): (8,), (2, 8): (1, 8), (2,): None}[tuple(parameter.shape)]
                parameter.copy_(sign * (1.0 if shape is None else self.magnitudes.view(shape)))
        self.goal = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.0, weight_decay=WD)
        cost = staircase((8,), (1.0,), tile=1)
        controller = BudgetController(fraction * cost.dense, cost.dense)
        groups = trace(self.model, (torch.randn(1, 3),)).groups
        self.run = Search("increg", self.model, groups, cost, controller, steps, options)
        self.steps = steps

    def descend(self, count, first=0, hooked=True):
        for step in range(first, first + count):
            loss = sum((p - w).square().sum() / 2 for p, w in zip(self.model.parameters(), self.goal, strict=True))
            self.optimiser.zero_grad()
            loss.backward()
            if hooked:
                self.run.after_backward(step)
            self.optimiser.step()
            if hooked:
                self.run.after_step(step)

    def expected(self, factors):
        return self.goal[0] / (1 + WD + factors[:, None])


def test_weights_follow_their_factor():
    toy = Quadratic(constant=0.7)
    toy.descend(200)
    torch.testing.assert_close(toy.model[0].weight.detach(), toy.expected(torch.full((8,), 0.7)))
    assert not toy.run.method.removed.any()

    toy = Quadratic(steps=4000)
    toy.descend(150)
    factors = toy.run.method.factors
    assert factors.max() > 0.2 and (factors == 0).any()
    torch.testing.assert_close(toy.model[0].weight.detach(), toy.expected(factors), rtol=0.02, atol=0)


def test_the_least_are_removed_in_order_and_the_others_return():
    toy = Quadratic(fraction=0.5)
    method, order = toy.run.method, []
    for step in range(toy.steps):
        toy.descend(1, step)
        fresh = set(method.removed.nonzero().flatten().tolist()) - set(order)
        order += sorted(fresh, key=toy.magnitudes.tolist().__getitem__)
        assert not fresh or step < 0.75 * toy.steps, "the schedule ends before the deadline"
    cost = toy.run.context.cost
    quota = 8 - max(n for n in range(1, 9) if cost.price([n]) <= 0.5 * cost.dense)
    assert [toy.magnitudes[c] for c in order] == list(range(1, quota + 1))
    assert cost.price(toy.run.context.rounded(toy.run.widths())) <= 0.5 * cost.dense
    with toy.run:
        pass
    assert not method.factors.any()
    toy.descend(100, hooked=False)
    gone = torch.zeros(8).index_fill_(0, torch.tensor(order), 1).bool()
    torch.testing.assert_close(toy.model[0].weight[~gone].detach(), (toy.goal[0] / (1 + WD))[~gone])


def test_a_dip_of_one_step_does_not_cost_a_channel():
    """The largest channel is the smallest for one step in five; its mean rank keeps it."""
    toy = Quadratic(fraction=0.5, steps=500)
    largest = int(toy.magnitudes.argmax())
    for step in range(toy.steps):
        with torch.no_grad():
            whole = toy.model[0].weight[largest].clone()
            if step % 5 == 3:
                toy.model[0].weight[largest] *= 0.01
                toy.model[2].weight[:, largest] *= 0.01
        toy.descend(1, step)
        with torch.no_grad():
            toy.model[0].weight[largest] = whole
    method = toy.run.method
    assert 5 < method._mean_rank[largest] < 6.9
    assert method.removed.sum() >= 3 and not method.removed[largest] and method.factors[largest] < 0.1


# -- on networks


def test_what_is_removed_stays_zero_whatever_momentum_says(pretrained):
    model, run = start(pretrained, steps=60)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    first = None
    model.train()
    for step, (x, y) in enumerate(batches(60)):
        run.before_step(step)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        run.after_backward(step)
        assert not model[0].weight.grad[run.method.removed[:16]].any()
        optimiser.step()
        run.after_step(step)
        removed = run.method.removed
        if first is None and removed[:16].any():
            first = (step, int(removed[:16].nonzero()[0]))
        if first is not None:
            channel = first[1]
            assert removed[channel]
            members = (
                model[0].weight[channel],
                model[1].weight[channel],
                model[1].bias[channel],
                model[3].weight[:, channel],
            )
            assert not any(member.any() for member in members)
        counts = torch.stack([part.sum() for part in removed.split(list(WIDTHS))])
        assert (counts <= run.method._quota).all()
    assert first is not None and first[0] < 40
    momentum = optimiser.state[model[0].weight]["momentum_buffer"]
    assert momentum[first[1]].abs().max() < 0.9 ** (60 - first[0] - 1) * 10
    masked = model.eval()(x)
    keep = keep_top(run.context.groups, run.context.rounded(run.widths()), run.ranking())
    assert not keep[run.method.removed.numpy()].any()
    run.close()
    torch.testing.assert_close(cut(model, pretrained[1], keep).module.eval()(x), masked, rtol=1e-4, atol=1e-4)


def test_the_budget_is_met_and_bounds_are_kept(pretrained):
    minimum = np.array([1, 1, 12])
    model, run = start(pretrained, 0.75, minimum=minimum, pinned={0: 14})
    with run:
        train(model, 100, run)
    context, widths = run.context, run.context.rounded(run.widths())
    assert context.cost.price(widths) <= context.controller.budget
    assert widths[0] == 14 and widths[2] >= 12 and widths[1] < 12
    assert run.method.removed.sum() == 56 - widths.sum(), "everything due is removed by the deadline"
    found = run.result()
    chosen = IncReg.allocate(
        context.groups, context.cost, found.widths, found.ranking, context.controller.budget, value=found.value,
        minimum=minimum, pinned={0: 14},
    )  # fmt: skip
    assert chosen.widths.tolist() == widths.tolist()


def test_expensive_groups_are_pressed_harder(pretrained):
    found = []
    for weights in ((4.0, 1.0, 1.0), (1.0, 1.0, 4.0)):
        model, run = start(pretrained, 0.6, weights=weights)
        with run:
            train(model, 100, run)
        found.append(run.widths())
        pressure = run.method._pressure
        assert pressure.argmax() == np.argmax(weights)
    assert found[0][0] < found[1][0] and found[1][2] < found[0][2]


def test_increments_are_scaled_by_price(pretrained):
    _, run = start(pretrained)
    method = run.method
    method._quota.fill_(4)
    method._pressure.copy_(torch.tensor([4.0, 1.0, 0.5]))
    run.after_step(1)  # no step that looks at the quota
    most = torch.stack([part.max() for part in method.factors.split(list(WIDTHS))])
    torch.testing.assert_close(most, method._unit() * method._pressure)
    run.close()


def test_removed_channels_get_no_gradient(pretrained):
    model, run = start(pretrained)
    run.method.removed[[2, 20]] = True
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.after_backward(0)
    assert not model[0].weight.grad[2].any() and not model[3].weight.grad[:, 2].any() and not model[4].bias.grad[4]
    assert model[0].weight.grad[3].all() and model[3].weight.grad[5, 3].all()
    run.close()


def test_without_steps_the_least_channels_go(pretrained):
    _, run = start(pretrained, steps=0)
    with run:
        pass
    context = run.context
    assert context.cost.price(context.rounded(run.widths())) <= context.controller.budget
    assert run.ranking().shape == (56,) and (run.ranking() > 0).all()


def held_out(count=4):
    return list(batches(count, seed=77))


@pytest.mark.parametrize("options", [{}, {"constant": 0.01}, {"floor": 0.7, "stages": 3, "batches": 2}])
def test_a_resumed_search_ends_the_same(pretrained, options, tmp_path):
    beside = held_out() if "floor" in options else None
    model, whole = start(pretrained, options=options, seed=3, steps=60, held_out=beside)
    with whole:
        train(model, 60, whole)
    other, first = start(pretrained, options=options, seed=3, steps=60, held_out=beside)
    train(other, 60, first, until=20)
    torch.save({"model": other.state_dict(), "search": first.state_dict()}, tmp_path / "checkpoint.pt")
    first.close()
    resumed, second = start(pretrained, options=options, seed=4, steps=60, held_out=beside)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["search"])
    with second:
        train(resumed, 60, second, start=20)
    assert torch.equal(second.widths(), whole.widths()) and torch.equal(second.ranking(), whole.ranking())
    assert second.history == whole.history
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_the_accuracy_mode_goes_down_as_far_as_the_floor_allows(pretrained):
    costs = {}
    for floor in (0.6, 0.99):
        options = {"floor": floor, "stages": 3, "batches": 4}
        model, run = start(pretrained, 0.999, steps=120, options=options, held_out=held_out())
        with run:
            train(model, 120, run)
        method = run.method
        assert method._accuracy() >= floor - 0.03, "training went on after the last judgement"
        assert run.log()["held_out_accuracy"] >= floor - 5e-4
        costs[floor] = run.context.cost.price(run.context.rounded(run.widths()))
        assert costs[floor] == pytest.approx(run.log()["cost_feasible"])
    assert costs[0.6] < 0.5 * run.context.cost.dense
    assert costs[0.6] < costs[0.99]


def test_all_stages_are_judged_by_the_same_images(pretrained):
    images = list(batches(12, seed=77))
    model, run = start(pretrained, steps=60, options={"floor": 0.5, "stages": 6, "batches": 2}, held_out=images)
    with run:
        train(model, 60, run)
    assert run.context.held_out.drawn == 2 and run.method._stage.start > 10
    accuracy = run.method._accuracy()
    assert accuracy == run.method._accuracy()


def test_a_stage_below_the_floor_is_taken_back_and_interpolated(pretrained):
    model, run = start(pretrained, steps=80, options={"floor": 0.5, "stages": 8}, held_out=held_out())
    method = run.method
    stage = method._stage
    assert stage.length == 10 and stage.goal == pytest.approx(0.8 * run.context.cost.dense)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stage.accuracy, method._accuracy = 0.9, lambda: 0.1  # of the network as given, and of what the stage left
    with torch.no_grad():
        model[0].weight += 1
    method.removed[:4] = True
    method._end_of_stage(9, stage)
    assert stage.increment == pytest.approx(0.2 * 0.4 / 0.8) and not stage.done and not method.removed.any()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    method._accuracy = lambda: 0.505
    method._end_of_stage(19, stage)
    assert stage.increment == pytest.approx(0.05) and stage.accuracy == 0.505 and not stage.done
    method._accuracy = lambda: 0.4
    method._end_of_stage(29, stage)
    assert stage.increment < 0.01 and stage.done
    run.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ceiling": 0.0}, "ceiling=0"),
        ({"turn": 1.0}, "turn=1"),
        ({"deadline": 1.5}, "deadline=1.5"),
        ({"interval": 0}, "interval=0"),
        ({"constant": -1.0}, "constant=-1"),
        ({"floor": 1.5}, "floor=1.5"),
        ({"floor": 0.9, "constant": 1.0}, "excludes"),
        ({"floor": 0.9}, "held_out"),
        ({"floor": 0.999999}, "before anything is pruned"),
    ],
)
def test_wrong_options_are_named(pretrained, options, message):
    beside = (
        [(torch.randn(32, 1, 6, 6), torch.zeros(32, dtype=torch.int64))] if options.get("floor", 0) > 0.99 else None
    )
    with pytest.raises(InvalidInput, match=message):
        start(pretrained, options=options, held_out=beside)


def test_a_checkpoint_of_another_network_is_refused(pretrained):
    _, run = start(pretrained)
    state = run.state_dict()
    state["method"]["factors"] = torch.zeros(7)
    with pytest.raises(InvalidInput, match="7 channels"):
        run.load_state_dict(state)


def test_digits_survive_at_half_of_the_flops():
    data = load_data("digits", batch_size=64)
    model = load_model("resnet8", classes=10, in_channels=1)
    fit(model, data.train, Recipe(epochs=3, lr=0.1), progress=False)
    program = trace(copy.deepcopy(model).eval(), (torch.randn(2, 1, 8, 8),))
    cost = flops_model(program)
    found = search("increg", model, program.groups, cost, 0.5 * cost.dense, data.train, Recipe(epochs=4, lr=0.05),
                   progress=False)  # fmt: skip
    chosen = IncReg.allocate(program.groups, cost, found.widths, found.ranking, 0.5 * cost.dense, value=found.value)
    assert 0.4 * cost.dense < chosen.cost <= 0.5 * cost.dense
    smaller = cut(model, program, keep_top(program.groups, chosen.widths, found.ranking)).module
    recalibrate(smaller, data.calibration)
    assert evaluate(smaller, data.test).accuracy > 0.9

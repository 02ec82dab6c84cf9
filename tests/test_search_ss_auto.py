"""The proximal forms minimise what they say, one run finds a planted pattern, and pruned columns are really zero."""

import copy
import math

import numpy as np
import pytest
import torch
from test_search import Chain, staircase, train
from torch import nn

from hwprune.budget import BudgetController
from hwprune.data import load_data
from hwprune.errors import InvalidInput
from hwprune.graph import cut, keep_top, trace
from hwprune.latency import Target, flops_model
from hwprune.models import load_model
from hwprune.nn import prune_columns_
from hwprune.search import Search, search
from hwprune.search.ss_auto import SSAuto, column_times, shrink
from hwprune.train import Recipe, evaluate, fit, recalibrate

WIDTHS = (16, 24, 16)
GAMMA = 3.0


# -- the proximal forms


def penalty(kind, norm, weight, rho):
    """Of the norm of a copy. The firm one is the minimax concave penalty in units of ρ."""
    if kind == "hard":
        return weight * (norm > 0)
    if kind == "l21":
        return weight * norm
    tau = weight / rho
    inside = tau * norm - norm**2 / (2 * GAMMA)
    return rho * np.where(norm < GAMMA * tau, inside, GAMMA * tau**2 / 2)


def limit(kind, weight, rho):
    return math.sqrt(2 * weight / rho) if kind == "hard" else weight / rho


@pytest.mark.parametrize("kind", ["l21", "hard", "firm"])
@pytest.mark.parametrize("norm", [0.3, 0.9, 1.7, 2.5, 6.0])
def test_copies_minimise_their_objective(kind, norm):
    weight, rho = 0.8, 0.7
    candidates = np.linspace(0, 2 * norm, 200_001)
    best = candidates[np.argmin(penalty(kind, candidates, weight, rho) + rho / 2 * (norm - candidates) ** 2)]
    scale = shrink(torch.tensor(norm), torch.tensor(limit(kind, weight, rho)), kind, GAMMA)
    assert float(scale) * norm == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("kind", ["l21", "hard", "firm", "reweighted"])
def test_copies_are_zero_up_to_the_threshold(kind):
    norms = torch.tensor([0.0, 0.5, 1.0, 1.001, 4.0], dtype=torch.float64)
    scale = shrink(norms, torch.ones(5, dtype=torch.float64), kind)
    assert (scale[:3] == 0).all() and (scale[3:] > 0).all() and (scale <= 1).all()
    assert scale[4] == (0.75 if kind in ("l21", "reweighted") else 1)


def test_the_firm_form_lies_between_the_others():
    norms = torch.linspace(0.1, 4, 40, dtype=torch.float64)
    limits = torch.ones_like(norms)
    torch.testing.assert_close(shrink(norms, limits, "firm", 1e9), shrink(norms, limits, "l21"))
    torch.testing.assert_close(shrink(norms, limits, "firm", 1 + 1e-9), shrink(norms, limits, "hard"))


@pytest.mark.parametrize("kind", ["l21", "firm"])
@pytest.mark.parametrize("norm", [0.4, 1.6, 5.0])
def test_the_pull_is_the_gradient_of_the_envelope(kind, norm):
    weight, rho, shift = 0.8, 0.7, 1e-4

    def envelope(at):
        copy_ = float(shrink(torch.tensor(at, dtype=torch.float64), torch.tensor(weight / rho), kind, GAMMA)) * at
        return float(penalty(kind, copy_, weight, rho)) + rho / 2 * (at - copy_) ** 2

    slope = (envelope(norm + shift) - envelope(norm - shift)) / (2 * shift)
    scale = float(shrink(torch.tensor(norm, dtype=torch.float64), torch.tensor(weight / rho), kind, GAMMA))
    assert rho * (1 - scale) * norm == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("rho", [0.2, 1.0, 50.0])
def test_fixed_points_of_a_quadratic_are_those_of_the_theory(rho):
    """Rows of f = ½ ‖M - M0‖²: R is 0 iff ‖M0‖ <= w (1 + ρ) / ρ, and then M = M0 / (1 + ρ), else M0 (1 - w / ‖M0‖)."""
    w, start = 1.0, torch.tensor([0.5, 0.9, 1.5, 2.5, 4.0, 7.0], dtype=torch.float64)
    m = start.clone()
    for _ in range(4000):
        m -= 0.5 / (1 + rho) * (m - start + rho * (1 - shrink(m, torch.full_like(m, w / rho))) * m)
    gone = start <= w * (1 + rho) / rho
    torch.testing.assert_close(m, torch.where(gone, start / (1 + rho), start - w), rtol=1e-6, atol=1e-6)
    assert torch.equal(shrink(m, torch.full_like(m, w / rho)) == 0, gone)


# -- a planted pattern of rows and columns


@pytest.mark.parametrize("kind", ["l21", "hard", "firm", "reweighted"])
def test_one_run_finds_a_planted_pattern_of_rows_and_columns(kind):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False))
    rows, columns = torch.rand(8) < 0.5, [torch.rand(4 * 9) < 0.4, torch.rand(8 * 9) < 0.4]
    rows[0], rows[1] = True, False  # dead, and kept
    first, second = model[0].weight, model[2].weight
    with torch.no_grad():
        for weight in (first, second):
            weight.copy_((1 + torch.rand_like(weight)) * torch.where(torch.rand_like(weight) < 0.5, -1, 1))
        first[rows] *= 0.02
        second[:, rows] *= 0.02
        for weight, dead in zip((first, second), columns, strict=True):
            weight *= torch.where(dead.view(3, 3, -1).permute(2, 0, 1), 0.02, 1.0)
    goal = [first.detach().clone(), second.detach().clone()]
    x = torch.randn(1, 4, 7, 7)
    program = trace(model, (x,))
    cost = flops_model(program)
    inside = [~columns[0], (~columns[1]).view(9, 8)[:, ~rows].flatten()]
    kept = int((~rows).sum())
    macs = kept * 25 * float(inside[0].sum()) + 6 * 9 * float(inside[1].sum())
    controller = BudgetController(macs * (1 + 1e-5), cost.dense)
    with Search("ss_auto", model, program.groups, cost, controller, 300, {"prox": kind, "columns": "on"}) as run:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
        for step in range(300):
            optimiser.zero_grad()
            model(x)
            sum((w - g).square().sum() / 2 for w, g in zip((first, second), goal, strict=True)).backward()
            run.after_backward(step)
            optimiser.step()
            run.after_step(step)
    assert torch.equal(run.method.rows, ~rows)
    found = run.result().columns
    for name, weight, dead in (("0.weight", first, columns[0]), ("2.weight", second, columns[1])):
        read = torch.ones(4, dtype=torch.bool) if name == "0.weight" else ~rows
        assert torch.equal(found[name].view(9, -1)[:, read], ~dead.view(9, -1)[:, read])
        flat = weight.detach().permute(0, 2, 3, 1).reshape(len(weight), -1)
        assert not flat[:, ~found[name]].any()
    assert not first[rows].any() and not second[:, rows].any()
    survivors = first[~rows][:, :, 0, 0] != 0
    if kind in ("hard", "firm"):  # unbiased
        torch.testing.assert_close(first[~rows][:, :, 0, 0][survivors], goal[0][~rows][:, :, 0, 0][survivors])


def test_gradients_gain_the_pull_to_every_copy():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
    x = torch.randn(1, 4, 7, 7)
    program = trace(model, (x,))
    cost = flops_model(program)
    options = {"prox": "l21", "columns": "on", "rho": (0.3, 0.3), "interval": 100}
    with Search(
        "ss_auto", model, program.groups, cost, BudgetController(0.5 * cost.dense, cost.dense), 100, options
    ) as run:
        method = run.method
        model(x).sum().mul(0).backward()
        method._row_limits.copy_(torch.rand(8) * 2)
        method._column_limits.copy_(torch.rand(36 + 72) * 2)
        rows, columns = method._norms()
        run.after_backward(1)
        of_rows, of_columns = (
            1 - (1 - limits / norms).clamp_min(0)
            for limits, norms in ((method._row_limits, rows), (method._column_limits, columns))
        )
        first, second = model[0].weight, model[2].weight
        pull = of_rows[:, None, None, None] + of_columns[:36].view(3, 3, 4).permute(2, 0, 1)
        torch.testing.assert_close(first.grad, 0.3 * pull * first.detach())
        pull = of_rows[:, None, None] + of_columns[36:].view(3, 3, 8).permute(2, 0, 1)
        torch.testing.assert_close(second.grad, 0.3 * pull * second.detach())
        torch.testing.assert_close(model[0].bias.grad, 0.3 * of_rows * model[0].bias.detach())
        by_hand = second.detach().square().sum(0).permute(1, 2, 0).flatten()
        torch.testing.assert_close(columns[36:], (by_hand / by_hand.mean()).sqrt())


# -- on networks


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(0)
    model = train(Chain(), 200, lr=0.1)
    return model, trace(model.eval(), (torch.randn(2, 1, 6, 6),))


def start(pretrained, fraction=0.5, steps=100, weights=(1.0, 1.0, 1.0), **kwargs):
    model, program = copy.deepcopy(pretrained[0]), pretrained[1]
    cost = staircase(WIDTHS, weights)
    controller = BudgetController(fraction * cost.dense, cost.dense, ramp_steps=steps // 2)
    return model, Search("ss_auto", model, program.groups, cost, controller, steps, **kwargs)


def test_decisions_do_not_depend_on_the_scale_of_a_layer(pretrained):
    """Ten times the weights before a batch norm is the same network, and gets the same thresholds."""
    found = []
    for scale in (1.0, 10.0):
        model, run = start(pretrained, options={"columns": "on"})
        with torch.no_grad():
            model[0].weight *= scale
            model[3].weight *= scale
        run.method._set_limits(0.6 * run.context.cost.dense)
        rows, _ = run.method._norms()
        found.append(shrink(rows, run.method._row_limits, "hard"))
        run.close()
    assert torch.equal(*found) and 0 < found[0].mean() < 1


def test_the_budget_is_met_and_bounds_are_kept(pretrained):
    minimum = np.array([1, 1, 12])
    model, run = start(pretrained, 0.75, minimum=minimum, pinned={0: 14}, options={"columns": "off"})
    with run:
        train(model, 100, run)
    context, widths = run.context, run.context.rounded(run.widths())
    assert context.cost.price(widths) <= context.controller.budget
    assert widths[0] == 14 and widths[2] >= 12 and widths[1] < 12
    assert torch.equal(run.widths(), torch.from_numpy(widths).double())
    assert run.method.columns() is None
    for channel in (~run.method.rows[:16]).nonzero().flatten():
        assert not model[0].weight[channel].any() and not model[1].bias[channel].any()
        assert not model[3].weight[:, channel].any()


def test_a_cut_network_computes_what_the_masked_one_did(pretrained):
    model, run = start(pretrained, 0.5, options={"columns": "on"})
    with run:
        train(model, 100, run)
    x = torch.randn(8, 1, 6, 6)
    expected = model.eval()(x)
    found, groups = run.result(), run.context.groups
    keep = keep_top(groups, run.context.rounded(found.widths), found.ranking)
    assert keep.tolist() == run.method.rows.tolist()
    smaller = cut(model, pretrained[1], keep).module.eval()
    torch.testing.assert_close(smaller(x), expected, rtol=1e-4, atol=1e-4)
    assert found.columns and prune_columns_(smaller, found.columns, groups, keep) == len(found.columns)
    torch.testing.assert_close(smaller(x), expected, rtol=1e-4, atol=1e-4)
    last = run.history[-1]
    assert last["cost_columns"] <= 0.5 * run.context.cost.dense and last["cost_columns"] < last["cost_hard"]
    assert last["kept_columns"] < 1


def test_expensive_groups_are_pruned_more(pretrained):
    found = []
    for weights in ((4.0, 1.0, 1.0), (1.0, 1.0, 4.0)):
        model, run = start(pretrained, 0.6, weights=weights, options={"columns": "off"})
        with run:
            train(model, 100, run)
        found.append(run.widths())
    assert found[0][0] < found[1][0] and found[1][2] < found[0][2]


def test_a_dear_group_is_narrowed_at_once_but_not_emptied(pretrained):
    """Channels of one norm: with one price for all of a group, the dearest group went down to its last channel."""
    model, run = start(pretrained, weights=(1.0, 30.0, 1.0), options={"columns": "off"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    method, cost = run.method, run.context.cost
    method._set_limits(0.5 * cost.dense)
    rows, _ = method._norms()
    left = method._counts(shrink(rows, method._row_limits, "hard") > 0).tolist()
    assert left == [16, 8, 16]  # the next step of the staircase is beyond the budget
    run.close()


@pytest.mark.parametrize("effect", [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
def test_columns_are_pruned_only_where_they_were_measured_to_pay(pretrained, effect):
    model, run = start(pretrained, 0.6)
    state = run.state_dict()
    state["method"]["convolutions"] |= {
        "share": torch.tensor([0.02, 0.08, 0.9]), "effect": torch.tensor(effect),
        "times": torch.tensor([[1.1, 1.2], [1.0, 1.1], [0.6, 0.8]]), "timed": True, "priced": True,
    }  # fmt: skip
    run.load_state_dict(state)
    with run:
        train(model, 100, run)
    log = run.log()
    assert log["columns_pay"] == sum(e > 0 for e in effect)
    assert log["half_columns_time"] == pytest.approx(1.0) and log["most_columns_time"] == pytest.approx(1.1)
    assert set(run.method.columns() or ()) == ({"6.weight"} if effect[2] else set())


def test_the_first_batch_shows_whether_columns_pay(pretrained):
    model, run = start(pretrained, 0.6, steps=20)
    assert any(module._forward_pre_hooks for module in model.modules())
    with run:
        train(model, 20, run)
    log, method = run.log(), run.method
    assert log["half_columns_time"] > 0 and 0 <= log["columns_pay"] <= 3
    assert log["columns_pay"] == (method._convs._times[:, 0] <= 0.95).sum()
    assert log["columns_pay"] or method.columns() is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_probe_times_a_convolution():
    plain_ms, half, most = column_times(nn.Conv2d(8, 8, 3, 2, padding=1), (64, 8, 9, 9), Target(), rounds=2)
    assert plain_ms > 0 and half > 0 and most > 0


@pytest.mark.parametrize(
    "half, verdict", [(1.2, "pay in no convolution, and are tied"), (0.6, "pay in 3 of 3 convolutions")]
)
def test_columns_are_timed_for_the_target_and_the_report_is_told(pretrained, monkeypatch, half, verdict):
    asked = []

    def answer(conv, shape, target, rounds=5):
        asked.append((shape[0], target))
        return 1.0, half, half

    monkeypatch.setattr("hwprune.search.ss_auto.column_times", answer)
    target = Target(threads=2)
    model, run = start(pretrained, 0.6, steps=20, program=pretrained[1], target=target)
    with run:
        train(model, 20, run)
    batch = pretrained[1].example_inputs[0].shape[0]
    assert asked and all(each == (batch, target) for each in asked)
    (note,) = run.result().notes
    assert verdict in note and "2 threads" in note and f"{half:.2f} times" in note


def test_without_steps_the_least_channels_go(pretrained):
    _, run = start(pretrained, steps=0)
    with run:
        pass
    context = run.context
    assert context.cost.price(context.rounded(run.widths())) <= context.controller.budget
    assert (run.ranking() > 0).all() and run.method.columns() is None


@pytest.mark.parametrize("options", [{"columns": "on"}, {"columns": "on", "prox": "reweighted", "interval": 7}])
def test_a_resumed_search_ends_the_same(pretrained, options, tmp_path):
    model, whole = start(pretrained, options=options, seed=3, steps=60)
    with whole:
        train(model, 60, whole)
    other, first = start(pretrained, options=options, seed=3, steps=60)
    train(other, 60, first, until=25)
    torch.save({"model": other.state_dict(), "search": first.state_dict()}, tmp_path / "checkpoint.pt")
    first.close()
    resumed, second = start(pretrained, options=options, seed=4, steps=60)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["search"])
    with second:
        train(resumed, 60, second, start=25)
    assert torch.equal(second.widths(), whole.widths()) and torch.equal(second.ranking(), whole.ranking())
    assert second.history == whole.history
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prox": "l1"}, "l21, hard, firm, reweighted"),
        ({"columns": "yes"}, "auto, on, off"),
        ({"rho": (1.0, 0.1)}, "rho="),
        ({"deadline": 0.0}, "deadline=0"),
        ({"interval": 0}, "interval=0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InvalidInput, match=message):
        SSAuto(**options)


def test_a_checkpoint_of_another_network_is_refused(pretrained):
    _, run = start(pretrained)
    state = run.state_dict()
    state["method"]["rows"] = torch.zeros(7, dtype=torch.bool)
    with pytest.raises(InvalidInput, match="7 channels"):
        run.load_state_dict(state)


def test_digits_survive_at_half_of_the_flops():
    data = load_data("digits", batch_size=64)
    model = load_model("resnet8", classes=10, in_channels=1)
    fit(model, data.train, Recipe(epochs=3, lr=0.1), progress=False)
    program = trace(copy.deepcopy(model).eval(), (torch.randn(2, 1, 8, 8),))
    cost = flops_model(program)
    found = search(
        "ss_auto", model, program.groups, cost, 0.5 * cost.dense, data.train, Recipe(epochs=4, lr=0.05),
        options={"columns": "off"}, progress=False,
    )  # fmt: skip
    chosen = SSAuto.allocate(program.groups, cost, found.widths, found.ranking, 0.5 * cost.dense)
    assert 0.4 * cost.dense < chosen.cost <= 0.5 * cost.dense
    smaller = cut(model, program, keep_top(program.groups, chosen.widths, found.ranking)).module
    recalibrate(smaller, data.calibration)
    assert evaluate(smaller, data.test).accuracy > 0.9

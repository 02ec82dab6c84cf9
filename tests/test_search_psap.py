"""Self-adaptive ratios follow each group's own sparsity, and what was cut by mistake comes back as it was."""

import copy

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
from hwprune.search.psap import PSAP, WeightSparsity
from hwprune.train import Recipe

WIDTHS = (12, 16, 12)


class Chain(nn.Sequential):
    """Three convolutions, so three groups in a row."""

    def __init__(self, widths=WIDTHS, norm=True, relu=True, classes=4):
        layers, channels = [], 1
        for width in widths:
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(width)] * norm + [nn.ReLU()] * relu
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def network(seed=0, **options):
    """A chain whose batch norms look trained, and its program."""
    torch.manual_seed(seed)
    model = Chain(**options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model, trace(model.eval(), (torch.randn(2, 1, 6, 6),))


def staircase(widths, weights=None, tile=4):
    """Each group costs its weight times its width, in tiles."""
    knots = [np.unique([1, *range(tile, width + 1, tile), width]) for width in widths]
    axes = [CostAxis(np.array([g]), np.array([1]), 0, k) for g, k in enumerate(knots)]
    weights = weights or [1.0] * len(widths)
    terms = [CostTerm(f"t{g}", (g,), w * k / k[-1]) for g, (w, k) in enumerate(zip(weights, knots, strict=True))]
    return CostModel("ms", np.asarray(widths), tuple(axes), tuple(terms), offset=0.1)


def start(model, program, fraction=0.5, steps=60, cost=None, minimum=None, pinned=None, seed=0, **options):
    cost = cost or staircase(program.groups.widths.tolist())
    controller = BudgetController(fraction * cost.dense, cost.dense, ramp_steps=steps // 2)
    return Search("psap", model, program.groups, cost, controller, steps, options, seed, minimum=minimum, pinned=pinned)


def train(model, run, start=0, stop=60, lr=0.02):
    """Batches of a step depend on nothing but the step."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=1e-3)
    model.train()
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        y = torch.randint(4, (32,), generator=generator)
        x = torch.randn(32, 1, 6, 6, generator=generator) + (y.float() - 1.5)[:, None, None, None]
        run.before_step(step)
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        run.after_backward(step)
        optimiser.step()
        run.after_step(step)


# -- the weight sparsity ratio


@pytest.mark.parametrize("threshold", ["scaled", "shape", "raw"])
def test_sparsity_is_a_share_of_the_weights(threshold):
    model, program = network()
    ratio = WeightSparsity(model, program.groups, threshold)
    tau = ratio.quantile(0.4)
    found = ratio(torch.ones(program.groups.total), tau)
    assert ((found >= 0) & (found <= 1)).all()
    if threshold != "shape":
        counts = np.array([model[0].weight.numel(), model[3].weight.numel(), model[6].weight.numel()])
        assert found @ counts / counts.sum() == pytest.approx(0.4, abs=2 / counts.sum())


def test_sparsity_is_counted_as_the_formula_says():
    model, program = network()
    found = WeightSparsity(model, program.groups, "scaled")(torch.ones(program.groups.total), 0.7)
    for group, (conv, norm) in enumerate([(0, 1), (3, 4), (6, 7)]):
        weight, norm = model[conv].weight, model[norm]
        folded = weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
        small = folded.abs() * weight[0].numel() ** 0.5 < 0.7
        assert found[group] == pytest.approx(small.float().mean().item(), abs=1e-6)


def test_only_channels_that_are_still_there_count():
    model, program = network()
    with torch.no_grad():
        model[0].weight[:6] = 0
    mask = torch.ones(program.groups.total)
    ratio = WeightSparsity(model, program.groups, "scaled")
    with_zeros = ratio(mask, 0.3)[0]
    mask[:6] = 0
    assert with_zeros > 0.5 and ratio(mask, 0.3)[0] < with_zeros - 0.3


def test_folding_the_norm_takes_out_the_scale_of_the_filters():
    """A filter twice as large with a variance four times as large makes the same channel."""
    model, program = network()
    ratio, ones = WeightSparsity(model, program.groups, "scaled"), torch.ones(program.groups.total)
    before = ratio(ones, 0.7)
    with torch.no_grad():
        model[3].weight *= 2
        model[4].running_var.copy_((model[4].running_var + model[4].eps) * 4 - model[4].eps)
    np.testing.assert_allclose(ratio(ones, 0.7), before, atol=1e-6)


def test_thresholds_differ_in_what_they_ignore():
    torch.manual_seed(0)
    model = Chain((8, 64, 256), norm=False)
    for conv in (model[0], model[2], model[4]):
        nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)  # the scale of an initialisation
    groups = trace(model.eval(), (torch.randn(2, 1, 6, 6),)).groups
    ones = torch.ones(groups.total)
    found = {}
    for threshold in ("scaled", "shape", "raw"):
        ratio = WeightSparsity(model, groups, threshold)
        found[threshold] = ratio(ones, ratio.quantile(0.4))
    assert np.ptp(found["scaled"][1:]) < 0.03  # the first has 72 weights only
    assert np.ptp(found["shape"][1:]) < 0.03 and found["shape"][1:].mean() == pytest.approx(0.35, abs=0.02)
    assert found["raw"][2] > found["raw"][1] + 0.1 > found["raw"][0]
    with torch.no_grad():
        model[2].weight *= 3
    scaled = WeightSparsity(model, groups, "shape")
    np.testing.assert_allclose(scaled(ones, 0.0), found["shape"], atol=1e-6)


# -- ratios for a budget


@pytest.mark.parametrize("fraction", [0.85, 0.5, 0.3])
def test_bisection_meets_the_budget_within_a_step_of_the_table(fraction):
    model, program = network()
    run = start(model, program, cost=staircase(WIDTHS, [1.0, 2.0, 3.0]), most=1.0)
    cost = run.context.cost
    ratios = np.array([0.2, 0.5, 0.3])
    found = run.method._widths_within(ratios, fraction * cost.dense)
    price = cost.price(run.context.rounded(torch.from_numpy(found)))
    largest_step = 3 * 4 / 12
    assert fraction * cost.dense - largest_step < price <= fraction * cost.dense
    inside = found > 1
    scale = ((1 - found / WIDTHS) / ratios)[inside]
    np.testing.assert_allclose(scale, scale[0])  # one s for all


def test_ratios_grow_with_the_pull_of_the_budget():
    model, program = network()
    run = start(model, program)
    budgets = np.linspace(1.0, 0.2, 9) * run.context.cost.dense
    found = np.stack([run.method._widths_within(np.array([0.2, 0.5, 0.3]), budget) for budget in budgets])
    assert (np.diff(found, axis=0) <= 1e-9).all()


def test_the_largest_cut_yields_to_a_budget_that_needs_more():
    model, program = network()
    run = start(model, program, most=0.5)
    cost = run.context.cost
    assert run.method._widths_within(np.ones(3), 0.65 * cost.dense).min() >= 6
    tight = run.method._widths_within(np.ones(3), 0.2 * cost.dense)
    assert cost.price(run.context.rounded(torch.from_numpy(tight))) <= 0.2 * cost.dense


def test_an_expensive_group_shrinks_more_unless_prices_are_left_out():
    found = {}
    for price in (0.0, 0.5):
        model, program = network()
        run = start(model, program, cost=staircase(WIDTHS, [4.0, 1.0, 1.0], tile=1), steps=0, price=price)
        found[price] = run.widths() / torch.tensor(WIDTHS)
    assert found[0.5][0] < found[0.0][0] - 0.05


def test_a_shrunken_duplicate_layer_is_cut_most():
    """Half of the middle group does what the other half does, and weight decay has shrunk it."""
    model, program = network()
    with torch.no_grad():
        model[3].weight[8:] = 0.02 * model[3].weight[:8]
    run = start(model, program, 0.75, cost=staircase(WIDTHS, tile=1), steps=0, price=0)
    cuts = 1 - run.widths() / torch.tensor(WIDTHS)
    assert cuts.argmax() == 1 and cuts[1] > 1.5 * cuts[[0, 2]].max()


def test_the_budget_falls_along_a_cubic_and_is_met_when_masks_freeze():
    model, program = network()
    run = start(model, program, rounds=6)
    method, cost = run.method, run.context.cost
    lows = [method.target(k) / cost.dense for k in range(6)]
    np.testing.assert_allclose(lows, [1 - 0.5 * (1 - (1 - (k + 1) / 6) ** 3) for k in range(6)])
    with run:
        train(model, run, stop=36)
        frozen = method.masks(36).clone()
        assert set(frozen.tolist()) == {0.0, 1.0} and not method.straight_through
        train(model, run, start=36)
        assert torch.equal(method.masks(59), frozen)
    assert cost.price(run.context.rounded(run.widths())) <= 0.5 * cost.dense
    assert frozen.split(list(WIDTHS))[1].sum() == run.context.rounded(run.widths())[1]


def test_monotone_groups_never_grow():
    for monotone in (True, False):
        model, program = network()
        run = start(model, program, monotone=monotone)
        widths = []
        for ratios, fraction in (([0.8, 0.1, 0.1], 0.7), ([0.1, 0.8, 0.1], 0.65)):
            run.method._widths = run.method._widths_within(np.array(ratios), fraction * run.context.cost.dense)
            widths.append(run.method._widths)
        assert bool(widths[1][0] > widths[0][0]) != monotone


# -- protective reconstruction


def gate_slope(model, run, channel, x, y):
    """-dL/dm of the closed gate of one channel, and the loss as a function of the gate."""
    mask = torch.ones(run.context.groups.total)
    mask[channel] = 0

    def loss(value):
        gates = mask.clone()
        gates[channel] = value
        run._masked.set(gates.requires_grad_())
        found = F.cross_entropy(model(x), y)
        return found, gates

    found, gates = loss(1e-5)
    found.backward()
    return -gates.grad[channel].item(), lambda value: loss(value)[0].item()


@pytest.mark.parametrize("norm", [True, False], ids=["batch-norm", "plain"])
def test_the_gate_gradient_is_the_first_order_change_of_the_loss(norm):
    model, program = network(norm=norm)
    model.double().eval()
    run = start(model, program)
    x, y = torch.randn(64, 1, 6, 6, dtype=torch.float64), torch.randint(4, (64,))
    slope, loss = gate_slope(model, run, 14, x, y)
    step = 1e-3
    assert slope != 0 and slope == pytest.approx((loss(0.0) - loss(step)) / step, rel=0.02)
    run.close()


def test_a_zeroed_filter_has_a_gradient_that_the_norm_amplifies_and_a_closed_gate_has_not():
    """d BN/dz = γ/√eps where the batch variance is 0: the smaller eps, the larger the gradient, whatever the loss."""
    found = {}
    for eps in (1e-5, 1e-3):
        model, program = network(relu=False)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = eps
        run = start(model, program)
        x, y = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 4
        gate = abs(gate_slope(model, run, 14, x, y)[0])
        run.close()
        with torch.no_grad():
            model[2].weight[2] = 0
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found[eps] = gate, model[2].weight.grad[2].norm().item()
    assert found[1e-5][1] / found[1e-3][1] == pytest.approx(10, rel=0.05)  # √(1e-3 / 1e-5)
    assert found[1e-5][0] == pytest.approx(found[1e-3][0], rel=0.05)


def mistaken(seed=0):
    """Channel 3 of the first group has the smallest scale, and all that follows hangs on it."""
    model, program = network(seed)
    with torch.no_grad():
        model[0].weight *= torch.linspace(0.6, 1.5, 12)[:, None, None, None]
        model[1].weight.copy_(torch.linspace(0.6, 1.5, 12))
        model[0].weight[3] *= 0.2
        model[1].weight[3] *= 0.2
        model[3].weight *= 0.1
        model[3].weight[:, 3] = 2.0
    return model, program


def test_a_mistaken_cut_is_restored_to_the_bit_and_the_quota_still_met():
    model, program = mistaken()
    run = start(model, program, rounds=3, watch=5, outlier=1.0, protect=2, kind="bn", threshold="shape")
    method, before = run.method, copy.deepcopy(model.state_dict())
    with run:
        run.before_step(0)
        cut = method._mask == 0
        assert cut[3] and cut[:12].sum() >= 3
        train(model, run, stop=4, lr=0.05)
        assert method._left == 1 and model.state_dict()["1.weight"][3] != before["1.weight"][3]
        # The last watched step without an optimiser: what is read afterwards is what was written back.
        run.before_step(4)
        x, y = torch.randn(32, 1, 6, 6), torch.arange(32) % 4
        F.cross_entropy(model(x), y).backward()
        method._pulse[3], method._utility[3] = 100.0, 100.0
        run.after_backward(4)
        run.after_step(4)
        assert method._mask[3] == 1 and method._protected[3] == 3
        after = model.state_dict()
        for key in ("0.weight", "1.weight", "1.bias"):
            assert torch.equal(after[key][3], before[key][3])
        assert torch.equal(after["3.weight"][:, 3], before["3.weight"][:, 3])
        assert not torch.equal(after["3.weight"][:, :3], before["3.weight"][:, :3])
        kept = [int(part.sum()) for part in method._mask.split(list(WIDTHS))]
        assert kept == run.context.rounded(run.widths()).tolist()
        swapped = (method._mask == 0) & ~cut
        assert swapped[:12].sum() == 1


def test_the_gates_themselves_find_the_mistake_and_leave_the_harmless_alone():
    model, program = mistaken()
    run = start(model, program, rounds=3, watch=10, restore=0.5, kind="bn", threshold="shape", regrow=False, price=0.5)
    with run:
        run.before_step(0)
        cut = run.method._mask == 0
        train(model, run, stop=10, lr=1e-4)
    restored = cut & (run.method._mask == 1)
    assert restored[3] and restored[:12].sum() == 1
    assert run.log()["restored"] >= 1


def test_protected_channels_survive_their_prune_steps_and_no_longer():
    model, program = mistaken()
    run = start(model, program, rounds=12, protect=2, restore=0.0, kind="bn")
    method = run.method
    method._protected[3] = 3
    method._prune(0.8 * run.context.cost.dense)
    method._prune(0.7 * run.context.cost.dense)
    assert method._mask[3] == 1
    method._prune(0.7 * run.context.cost.dense)
    assert method._mask[3] == 0


def test_what_regrows_is_what_the_loss_wants():
    """γ of a closed gate learns on between prune steps, and is still until then where regrowth is off."""
    for regrow in (True, False):
        model, program = network()
        run = start(model, program, rounds=2, watch=2, restore=0.0, regrow=regrow)
        with run:
            run.before_step(0)
            closed = run.method._mask[:12] == 0
            assert closed.any()
            before = model.state_dict()["1.weight"].clone()
            train(model, run, stop=8)
            moved = (model.state_dict()["1.weight"] - before * (1 - 0.02 * 1e-3) ** 8)[closed].abs().max().item()
        assert (moved > 1e-5) == regrow


# -- the search


def test_a_fresh_network_trains_first():
    torch.manual_seed(0)
    model = Chain()
    program = trace(model.eval(), (torch.randn(2, 1, 6, 6),))
    with start(model, program, warmup=0.2) as run:
        assert run.method.masks(11) is None and run.method.masks(12) is not None


def test_pinned_and_least_widths_are_kept():
    model, program = network()
    with start(model, program, 0.4, minimum=np.array([1, 1, 8]), pinned={0: 12}) as run:
        train(model, run)
    widths = run.context.rounded(run.widths())
    assert widths[0] == 12 and widths[2] >= 8 and widths[1] < 12


@pytest.mark.parametrize("stop", [3, 27], ids=["watching", "regrowing"])
def test_a_resumed_search_ends_the_same(stop, tmp_path):
    options = {"rounds": 4, "watch": 5}
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
        train(resumed, second, start=stop)
    assert torch.equal(second.widths(), whole.widths()) and torch.equal(second.ranking(), whole.ranking())
    assert second.history == whole.history
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_a_checkpoint_of_another_network_is_refused():
    model, program = network()
    run = start(model, program)
    state = run.state_dict()
    state["method"]["mask"] = torch.zeros(7)
    with pytest.raises(InvalidInput, match="7 channels"):
        run.load_state_dict(state)


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.25])
def test_the_allocation_keeps_the_proportions_and_spends_the_budget(fraction):
    _, program = network()
    cost = flops_model(program)
    widths = torch.tensor([9.0, 6.0, 11.0])
    chosen = PSAP.allocate(program.groups, cost, widths, torch.ones(40), fraction * cost.dense)
    assert 0.93 * fraction * cost.dense < chosen.cost <= fraction * cost.dense
    same = PSAP.allocate(program.groups, cost, widths, torch.ones(40), cost.price(widths.numpy()))
    np.testing.assert_array_equal(same.widths, widths.numpy())
    tiled = PSAP.allocate(program.groups, cost, widths, torch.ones(40), 0.6 * cost.dense, multiple=4, pinned={0: 11})
    assert tiled.widths[0] == 11 and (tiled.widths[1:] % 4 == 0).all() and tiled.cost <= 0.6 * cost.dense


def test_a_trained_and_a_fresh_network_are_pruned_on_real_images():
    data = load_data("digits", batch_size=128, seed=0)
    recipe = Recipe(epochs=8, lr=0.1, batch_size=128)
    torch.manual_seed(0)
    model = load_model("resnet8", classes=10, in_channels=1)
    program = trace(model.eval(), (torch.randn(2, 1, 8, 8),))
    cost = flops_model(program)
    budget = 0.3 * cost.dense
    for _ in range(2):  # from scratch, and then what came of it again
        found = search("psap", model, program.groups, cost, budget, data.train, recipe, progress=False)
        chosen = method_class("psap").allocate(program.groups, cost, found.widths, found.ranking, budget)
        assert chosen.cost <= budget and found.log[-1]["cost_hard"] <= budget
        assert found.log[-1]["restored"] > 0


@pytest.mark.parametrize(
    "option", [{"threshold": "l2"}, {"quantile": 1.0}, {"warmup": 0.7}, {"rounds": 0}, {"restore": 2.0}, {"kind": "x"}]
)
def test_wrong_options_are_named(option):
    with pytest.raises(InvalidInput, match=next(iter(option))):
        PSAP(**option)

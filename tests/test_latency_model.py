"""The cost model against plain loops, finite differences, and operations counted in networks that were really cut."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hwprune.errors import InvalidInput, UnknownWorkload
from hwprune.graph import keep_first, resize, trace
from hwprune.latency import CostAxis, CostModel, CostTerm, flops_model
from hwprune.models import load_model


def model_of(seed: int = 0, **changes) -> CostModel:
    """Four groups; a plain axis, a wide one, a concatenation; terms with 0, 1 and 2 axes; tables with dips."""
    random = np.random.default_rng(seed)
    axes = (
        CostAxis(np.array([0]), np.array([1]), 0, np.array([1, 3, 4, 8])),
        CostAxis(np.array([1]), np.array([2]), 3, np.array([5, 9, 15, 19])),
        CostAxis(np.array([2, 3]), np.array([1, 1]), 0, np.array([2, 5, 8, 12])),
    )

    def rising(*shape: int) -> np.ndarray:
        table = random.random(shape) + 0.3
        for dim in range(len(shape)):
            table = np.cumsum(table, axis=dim)
        return table

    terms = (
        CostTerm("stem", (0,), rising(4)),
        CostTerm("a", (0, 1), rising(4, 4)),
        CostTerm("b", (1, 2), rising(4, 4)),
        CostTerm("c", (2, 0), rising(4, 4)),
        CostTerm("fixed", (), np.array(2.5)),
    )
    options = {"scale": 0.7, "offset": 0.2, **changes}
    return CostModel("ms", np.array([8, 8, 6, 6]), axes, terms, **options)


def sizes_at(model: CostModel, widths) -> list[float]:
    return [axis.offset + float((axis.weights * np.asarray(widths)[axis.groups]).sum()) for axis in model.axes]


def every_width(model: CostModel) -> np.ndarray:
    return np.array(list(itertools.product(*[range(1, int(full) + 1, 2) for full in model.full])))


def test_price_is_the_raw_entry_at_the_next_knot_up():
    model = model_of()
    widths = every_width(model)
    prices = model.price(widths)
    for row, price in zip(widths, prices, strict=True):
        total = 0.0
        for term in model.terms:
            sizes = sizes_at(model, row)
            at = tuple(int(np.searchsorted(model.axes[a].knots, sizes[a])) for a in term.axes)
            total += float(term.table[at])
        assert price == pytest.approx(0.7 * total + 0.2, rel=1e-12)
        assert model.price(row) == pytest.approx(price, rel=1e-12)
    assert (prices >= model.predict(widths) - 1e-12).all()  # rising tables: a step up is never cheaper


def test_prediction_is_bilinear_between_knots():
    from scipy.interpolate import RegularGridInterpolator

    model = model_of()
    widths = every_width(model)
    expected = np.full(len(widths), 0.2 + 0.7 * 2.5)
    for term in model.terms[:-1]:
        surface = RegularGridInterpolator([model.axes[a].knots for a in term.axes], term.table)
        points = np.array([[sizes_at(model, row)[a] for a in term.axes] for row in widths])
        expected += 0.7 * surface(points)
    np.testing.assert_allclose(model.predict(widths), expected, rtol=1e-12)


def test_value_and_gradient_agree_with_finite_differences_and_autograd():
    model = model_of()
    for seed in range(20):
        widths = 1.0 + torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 5
        value, gradient = model.value_and_grad(widths)
        assert value == pytest.approx(float(model.predict(widths)), rel=1e-12)  # rising tables are their own envelope
        step = 1e-6 * torch.eye(4, dtype=torch.float64)
        numeric = [(model.value(widths + d) - model.value(widths - d)) / 2e-6 for d in step]
        assert torch.allclose(gradient, torch.stack(numeric), rtol=1e-5), (gradient, numeric)
        leaf = widths.clone().requires_grad_()
        (3.0 * model.value(leaf)).backward()
        assert torch.allclose(leaf.grad, 3.0 * gradient)


def test_the_value_rises_where_the_raw_table_dips_and_the_price_does_not_hide_it():
    table = np.array([1.0, 4.0, 2.0, 5.0])
    axis = CostAxis(np.array([0]), np.array([1]), 0, np.array([1, 2, 4, 8]))
    model = CostModel("ms", np.array([8]), (axis,), (CostTerm("t", (0,), table),))
    assert model.price(np.array([2])) == 4.0 and model.price(np.array([3])) == 2.0
    values = [model.value_and_grad(torch.tensor([w]))[0] for w in np.linspace(1, 8, 50)]
    assert (np.diff(values) >= 0).all()
    assert model.levels(0).tolist() == [1, 4, 8]  # 2 costs more than 4


def test_a_staircase_has_levels_at_its_edges_and_no_flat_gradient():
    knots = np.array([1, 8, 16, 17, 24, 32, 33, 48, 49, 64])
    table = np.ceil(knots / 16) * 10.0
    axis = CostAxis(np.array([0]), np.array([1]), 0, knots)
    model = CostModel("ms", np.array([64]), (axis,), (CostTerm("t", (0,), table),))
    assert model.levels(0).tolist() == [1, 16, 32, 48, 64]
    assert model.price(np.array([17])) == 20.0 and model.price(np.array([40])) == 30.0
    for width in (16.5, 20.0, 40.0, 63.0):
        value, slope = model.value_and_grad(torch.tensor([width], dtype=torch.float64))
        assert slope.item() == pytest.approx(10 / 16)
        assert value == pytest.approx(10 * width / 16)


def test_levels_hold_minimum_and_full_width_and_are_few():
    model = model_of(minimum=np.array([2, 1, 1, 3]))
    for group, (least, full) in enumerate(zip([2, 1, 1, 3], model.full, strict=True)):
        levels = model.levels(group)
        assert levels[0] == least and levels[-1] == full and (np.diff(levels) > 0).all()
    wide = CostAxis(np.array([0]), np.array([1]), 0, np.arange(1, 513))
    many = CostModel("ms", np.array([512]), (wide,), (CostTerm("t", (0,), np.arange(1.0, 513.0)),))
    assert len(many.levels(0)) <= 16 and many.levels(0)[-1] == 512


def test_beyond_what_was_measured_is_an_error():
    model = model_of()
    for wrong in ([9, 8, 6, 6], [0, 8, 6, 6], [8, 8, 0.5, 1], [8, 8, np.nan, 6]):
        with pytest.raises(UnknownWorkload, match="outside the tabulated"):
            model.price(np.array(wrong, dtype=float))
    with pytest.raises(UnknownWorkload, match="outside the tabulated 1 to 8"):
        model.value_and_grad(torch.tensor([8.5, 8, 6, 6]))
    with pytest.raises(UnknownWorkload):
        model.value_and_grad(torch.tensor([-1.0, 8, 6, 6]))
    with pytest.raises(InvalidInput, match="the model has 4 groups"):
        model.price(np.array([1, 2, 3]))


def test_below_the_least_width_the_value_stays_and_still_pulls():
    model = model_of()
    inside, slope = model.value_and_grad(torch.tensor([1.0, 1, 1, 1], dtype=torch.float64))
    value, gradient = model.value_and_grad(torch.tensor([0.4, 1, 1, 1], dtype=torch.float64))
    assert value == pytest.approx(inside) and gradient[0] == pytest.approx(slope[0]) and gradient[0] > 0


def test_dense_and_floor_are_prices_and_launch_bound_is_their_ratio():
    model = model_of()
    assert model.dense == model.price(model.full) and model.floor == model.price(np.ones(4))
    assert not model.launch_bound
    assert model_of(offset=10 * model.dense).launch_bound


class Branches(nn.Module):
    """A concatenation, a depthwise and a grouped convolution, a convolution from a group to itself, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 10, 1)
        self.mix, self.depth = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.same = nn.Conv2d(12, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 8, 3, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.mix(torch.cat([self.a(x), self.b(x)], 1)))
        x = torch.relu(self.depth(x))
        x = x + self.same(x)
        return self.head(self.grouped(x).mean((2, 3)))


def multiply_accumulates(module: torch.fx.GraphModule, inputs) -> float:
    """Counted from the shapes that a run really sees."""
    total = 0.0

    class Count(torch.fx.Interpreter):
        def run_node(self, n):
            nonlocal total
            out = super().run_node(n)
            if n.op == "call_function" and ("conv" in str(n.target) or "linear" in str(n.target)):
                total += out.numel() * self.env_shape(n.args[1])[1:].numel()
            return out

        def env_shape(self, node):
            return self.env[node].shape

    Count(module).run(*inputs)
    return total


@pytest.mark.parametrize("name", ["branches", "resnet8", "mobilenet_v2", "vgg16_bn"])
def test_flops_are_those_of_the_network_that_is_left(name):
    network = Branches() if name == "branches" else load_model(name)
    program = trace(network, (torch.randn(2, 3, 32, 32),))
    cost = flops_model(program)
    assert cost.unit == "flops"
    random = np.random.default_rng(0)
    full = program.groups.widths
    for widths in (full, np.ones_like(full), *[random.integers(1, full + 1) for _ in range(3)]):
        small = resize(program, keep_first(program.groups, widths)).eval()
        counted = multiply_accumulates(small, program.example_inputs)
        assert cost.price(widths) == pytest.approx(counted, rel=1e-9)
    assert cost.dense == pytest.approx(multiply_accumulates(program.module, program.example_inputs), rel=1e-9)


# -- width 0


class Bottlenecks(nn.Module):
    """Two blocks of three convolutions each, whose two inner groups end together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))
            for _ in range(2)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["bottlenecks", "resnet8", "mobilenet_v2"])
def test_flops_without_blocks_are_those_of_the_network_that_is_left(name):
    network = Bottlenecks() if name == "bottlenecks" else load_model(name)
    program = trace(network, (torch.randn(2, 3, 32, 32),))
    base = flops_model(program)
    cost, removable = base.removing, program.groups.removable
    random = np.random.default_rng(0)
    for draw in range(4):
        widths = random.integers(1, program.groups.widths + 1)
        assert cost.price(widths) == base.price(widths)
        chosen = removable & (random.random(len(widths)) < (1.0 if draw == 0 else 0.5))
        gone = np.where(chosen, 0, widths)
        small = resize(program, keep_first(program.groups, gone)).eval()
        counted = multiply_accumulates(small, program.example_inputs)
        assert cost.price(gone) == cost.predict(gone) == pytest.approx(counted, rel=1e-9)
        assert (gone == 0).any() == (cost.price(gone) < base.price(widths))
    assert cost.floor == cost.price(np.where(removable, 0, 1)) < base.floor
    with pytest.raises(UnknownWorkload, match="outside the tabulated"):
        base.price(np.where(removable, 0, 1))


def test_widths_of_zero_are_offered_only_where_asked_for_and_possible():
    program = trace(Bottlenecks(), (torch.randn(1, 3, 8, 8),))
    base, single = flops_model(program), flops_model(trace(load_model("resnet8"), (torch.randn(1, 3, 8, 8),)))
    for cost in (base, single):
        assert all(cost.levels(g)[0] == 1 for g in range(cost.groups)) and (cost.least == 1).all()
        assert (cost.removing.least == np.where(cost.removable, 0, 1)).all() and cost.removing.removing is cost.removing
        for g in range(cost.groups):
            alone = int(cost.removable[g] and not cost.implied[g].any())
            assert cost.removing.levels(g).tolist() == [0] * alone + cost.levels(g).tolist()
    assert not any(0 in base.removing.levels(g) for g in range(base.groups))  # inner groups end together
    assert sum(0 in single.removing.levels(g) for g in range(single.groups)) == 3
    widths = base.full.copy()
    widths[1] = 0
    assert base.ended(widths).tolist() == [False, True, True, False, False]
    vgg = model_of()
    assert vgg.removing is vgg


def test_the_last_channel_takes_the_launch_along_and_what_is_left_is_charged():
    """A stream of 4 (group 0) and a block inside it (group 1): a segment into it, one out of it with an addition."""
    stream = CostAxis(np.array([0]), np.array([1]), 0, np.array([1, 4]))
    inner = CostAxis(np.array([1]), np.array([1]), 0, np.array([1, 2, 8]))
    enter = CostTerm("enter", (0, 1), np.array([[5.0, 6, 9], [7, 8, 12]]))
    leave = CostTerm("leave", (1, 0), np.array([[4.0, 5], [4, 6], [6, 9]]), {1: np.array([1.0, 3])})
    ends = {"removable": np.array([False, True]), "implied": np.zeros((2, 2), dtype=bool)}
    base = CostModel("ms", np.array([4, 8]), (stream, inner), (enter, leave), **ends)
    cost = base.removing
    assert [cost.price(np.array([4, n])) for n in (0, 1, 2, 8)] == [3, 12, 14, 21]
    assert [cost.price(np.array([1, n])) for n in (0, 1)] == [1, 9]
    for n in (1, 2, 3, 8):
        for reading in ("price", "predict"):
            assert getattr(cost, reading)(np.array([3, n])) == getattr(base, reading)(np.array([3, n]))
        assert cost.value_and_grad(torch.tensor([2.0, n]))[0] == base.value_and_grad(torch.tensor([2.0, n]))[0]
    assert cost.value_and_grad(torch.tensor([4.0, 0.5]))[1][1] == pytest.approx(12 - 3)
    dear = CostModel(
        "ms", np.array([4, 8]), (stream, inner), (enter, replace(leave, left={1: np.array([99.0, 99])})), **ends
    )
    assert dear.removing.price(np.array([4, 0])) == 5  # a rest is never dearer than the narrowest whole
    assert CostModel("ms", base.full, base.axes, (enter, replace(leave, left={})), **ends).removing.floor == 0

"""A refit makes the kept channels stand in for the pruned ones: exactly where they can, least-squares where not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hwprune.errors import InvalidInput
from hwprune.graph import cut, trace
from hwprune.models import load_model
from hwprune.refit import consumers, observed, refit_
from hwprune.train import recalibrate

RIDGE = 1e-9  # where what is asked for is exactness


def images(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def jitter(model):
    """Norms away from ones and zeros, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.3, 0.3)
    return model.eval()


def chain(bias=True, kernel=3, **conv):
    """One group of eight channels between two convolutions; no norm."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, kernel, bias=bias, **conv)).eval()


def duplicate(model, first, second):
    """Make two channels of the group equal."""
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[second] = tensor[first]


def without(program, *channels):
    keep = torch.ones(program.groups.total, dtype=torch.bool)
    keep[list(channels)] = False
    return keep


def refitted(model, x, channels, **options):
    program = trace(model, (x[:2],))
    keep = without(program, *channels)
    changed = copy.deepcopy(model)
    report = refit_(changed, program.groups, keep, [(x, None)], **options)
    return cut(changed, program, keep).module.eval(), report


# -- what can be made up for is made up for


@pytest.mark.parametrize(
    "conv",
    [
        {"padding": 1},
        {"kernel": 1},
        {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)},
        {"padding": "same", "kernel": 4},
        {"padding": "valid", "bias": False},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "circular", "stride": 3},
    ],
    ids=str,
)
def test_one_of_two_equal_channels_goes_and_nothing_changes(conv):
    model = chain(**conv)
    duplicate(model, 1, 6)
    x = images(20, 3, 9, 11)
    small, report = refitted(model, x, [6], ridge=RIDGE)
    y = images(4, 3, 9, 11, seed=1)
    before, after = report.errors["2"]
    assert before > 1e-3 and after < 1e-6
    torch.testing.assert_close(small(y), model(y), rtol=0, atol=1e-5)
    assert small[0].out_channels == 7


def test_a_constant_channel_becomes_a_bias():
    model = chain()
    with torch.no_grad():
        model[0].weight[4] = 0
        model[0].bias[4] = 1.7
    x = images(20, 3, 9, 9)
    model[2].padding = (0, 0)  # at a padded border nothing is constant
    small, _ = refitted(model, x, [4], ridge=RIDGE)
    y = images(4, 3, 9, 9, seed=1)
    torch.testing.assert_close(small(y), model(y), rtol=0, atol=1e-5)
    torch.testing.assert_close(small[2].weight, model[2].weight[:, [0, 1, 2, 3, 5, 6, 7]], rtol=0, atol=1e-5)


def test_a_dead_channel_changes_no_weight():
    model = chain()
    with torch.no_grad():
        model[0].weight[4] = 0
        model[0].bias[4] = -1
    x = images(20, 3, 9, 9)
    small, report = refitted(model, x, [4])
    torch.testing.assert_close(small[2].weight, model[2].weight[:, [0, 1, 2, 3, 5, 6, 7]], rtol=0, atol=1e-6)
    assert report.errors["2"][0] < 1e-12


def test_all_consumers_of_a_stream_are_refitted():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
            self.c, self.d = nn.Conv2d(8, 4, 1), nn.Linear(8, 3)

        def forward(self, x):
            x = F.relu(self.a(x))
            x = x + F.relu(self.b(x))
            return self.c(x).mean((2, 3)), self.d(x.mean((2, 3)))

    model = Stream().eval()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[5], layer.bias[5] = layer.weight[2], layer.bias[2]
    x = images(40, 3, 8, 8)
    small, report = refitted(model, x, [5], ridge=RIDGE)
    assert set(report.errors) == {"b", "c", "d"} and report.left == ()
    for mine, dense in zip(small(x), model(x), strict=True):
        torch.testing.assert_close(mine, dense, rtol=0, atol=2e-5)


def test_flattened_and_concatenated_channels_are_found():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3), nn.Linear(10 * 16, 7)

        def forward(self, x):
            return self.out(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1).flatten(1))

    model = Two().eval()
    with torch.no_grad():
        model.b.weight[3], model.b.bias[3] = model.a.weight[1], model.a.bias[1]
    x = images(600, 3, 6, 6)
    small, report = refitted(model, x, [4 + 3], ridge=RIDGE, images=600)
    torch.testing.assert_close(small(x[:8]), model(x[:8]), rtol=0, atol=1e-4)
    assert small.out.in_features == 9 * 16 and report.errors["out"][1] < 1e-6


# -- and what cannot, least-squares


@pytest.mark.parametrize("bias", [True, False])
def test_the_refit_is_the_least_squares_solution(bias):
    """Against numpy's lstsq on the unfolded input that torch makes."""
    model = chain(bias=bias, padding=1).double()
    x = images(12, 3, 7, 7).double()
    program = trace(model, (x[:2],))
    keep = without(program, 2, 3)
    hidden, wanted = model[:2](x), model(x)
    changed = copy.deepcopy(model)
    refit_(changed, program.groups, keep, [(x, None)], ridge=1e-12)
    unfolded = F.unfold(hidden[:, keep], 3, padding=1).transpose(1, 2).flatten(0, 1)
    target = wanted.permute(0, 2, 3, 1).flatten(0, 2)
    if bias:
        unfolded = torch.cat([unfolded, torch.ones(len(unfolded), 1)], 1)
    expected = torch.linalg.lstsq(unfolded, target).solution
    found = changed[2].weight[:, keep].flatten(1).T
    if bias:
        found = torch.cat([found, changed[2].bias[None]])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_errors_are_those_of_the_outputs():
    model = chain(padding=1)
    x = images(12, 3, 7, 7)
    dense = model(x)
    program = trace(model, (x[:2],))
    keep = without(program, 2, 3)
    small, report = refitted(model, x, [2, 3])
    spread = (dense - dense.mean((0, 2, 3), keepdim=True)).square().sum()
    after = float((small(x) - dense).square().sum() / spread)
    masked = cut(model, program, keep).module(x) - dense
    before = float((masked - masked.mean((0, 2, 3), keepdim=True)).square().sum() / spread)
    assert report.errors["2"][0] == pytest.approx(before, rel=1e-3)
    assert after <= report.errors["2"][1] * 1.001 and report.errors["2"][1] == pytest.approx(after, rel=0.05)
    assert after < before


def test_a_later_layer_makes_up_for_what_an_earlier_one_could_not():
    """The second consumer sees the inputs of the pruned network, not those of the dense one."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    x = images(3000, 6)
    program = trace(model, (x[:2],))
    keep = without(program, *range(4), *range(12, 16))
    changed = copy.deepcopy(model)
    refit_(changed, program.groups, keep, [(x, None)], ridge=RIDGE, images=3000)
    pruned = copy.deepcopy(changed)
    hidden = F.relu(changed[0](x))[:, 4:]
    hidden = F.relu(F.linear(hidden, changed[2].weight[4:, 4:], changed[2].bias[4:]))
    design = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    best = torch.linalg.lstsq(design, model(x).double()).solution
    found = torch.cat([pruned[4].weight[:, 4:].T, pruned[4].bias[None]]).double()
    torch.testing.assert_close(found, best, rtol=1e-2, atol=1e-3)


def test_a_strong_ridge_leaves_the_weights_as_they_are():
    model = chain(padding=1)
    x = images(12, 3, 7, 7)
    small, _ = refitted(model, x, [2], ridge=1e9)
    torch.testing.assert_close(small[2].weight, model[2].weight[:, [0, 1, 3, 4, 5, 6, 7]], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_residual_network_gains_from_it():
    model = jitter(load_model("resnet8", classes=10))
    x = images(96, 3, 16, 16)
    program = trace(model, (x[:2],))
    keep = torch.rand(program.groups.total, generator=torch.Generator().manual_seed(0)) < 0.75
    distance = []
    for changed, refit in ((copy.deepcopy(model), False), (copy.deepcopy(model), True)):
        before = {key: value.clone() for key, value in changed.state_dict().items()}
        if refit:
            report = refit_(changed, program.groups, keep, [(x, None)])
            assert all(after < before for before, after in report.errors.values()) and report.left == ()
            assert len(report.errors) == 7
            for key, value in changed.state_dict().items():
                same = torch.equal(value, before[key])
                assert same or key.rpartition(".")[0] in report.errors, f"{key} is no consumer's"
        small = cut(changed, program, keep).module
        recalibrate(small, [(x, None)])
        distance.append(float((small.eval()(x) - model(x)).square().mean()))
    assert distance[1] < 0.5 * distance[0]


# -- what is left alone, and what is refused


def test_what_cannot_be_refitted_is_left_alone_and_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
            self.twice, self.end = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
            self.up = nn.ConvTranspose2d(8, 2, 2)

        def forward(self, x):
            x = F.relu(self.depthwise(self.a(x)))
            x = F.relu(self.twice(x))
            x = F.relu(self.twice(x))
            return self.end(x), self.up(x)

    model = Odd().eval()
    x = images(10, 3, 8, 8)
    program = trace(model, (x[:2],))
    keep = without(program, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = refit_(model, program.groups, keep, [(x, None)])
    assert set(report.left) == {"twice", "up"} and set(report.errors) == {"end"}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"end.weight", "end.bias"}


def test_readers_of_layer_normed_channels_are_left_alone():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)).eval()
    x = images(50, 6)
    program = trace(model, (x[:2],))
    report = refit_(model, program.groups, without(program, 1), [(x, None)])
    assert report.left == ("2",) and not report.errors


def test_nothing_pruned_changes_nothing():
    model = chain(padding=1)
    x = images(4, 3, 7, 7)
    program = trace(model, (x[:2],))
    before = copy.deepcopy(model.state_dict())
    report = refit_(model, program.groups, without(program), [(x, None)])
    assert not report.errors and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_modes_hooks_and_statistics_are_as_before():
    model = jitter(load_model("resnet8", classes=10)).train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    statistics = {key: value.clone() for key, value in model.named_buffers()}
    x = images(8, 3, 16, 16)
    program = trace(copy.deepcopy(model).eval(), (x[:2],))
    refit_(model, program.groups, without(program, 0), [(x, None)])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, statistics[key]) for key, value in model.named_buffers())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(type(module).__name__.startswith("Masked") for module in model.modules())


@pytest.mark.parametrize(
    "change, message",
    [({"ridge": 0.0}, "must be positive"), ({"batches": []}, "no batch"), ({"keep": [False] * 8}, "without a channel")],
    ids=["ridge", "batches", "keep"],
)
def test_wrong_arguments_are_named(change, message):
    model = chain(padding=1)
    x = images(4, 3, 7, 7)
    program = trace(model, (x[:2],))
    arguments = {"keep": without(program, 1), "batches": [(x, None)], **change}
    with pytest.raises(InvalidInput, match=message):
        refit_(model, program.groups, **arguments)


@pytest.mark.parametrize("kernel, stride, padding, dilation", [(3, 1, 1, 1), ((2, 3), (2, 1), (0, 2), 1), (3, 2, 0, 2)])
def test_rows_are_those_of_the_unfolded_input(kernel, stride, padding, dilation):
    model = chain(kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    x = images(3, 3, 9, 8)
    (consumer,), _ = consumers(model, trace(model, (x[:2],)).groups)
    seen = {}

    def look(consumer, x, y):
        rows = torch.tensor([0, 5, 11, len(consumer.flat_output(y)) - 1])
        seen["mine"], seen["out"] = consumer.unfolded(x, rows), consumer.flat_output(y)[rows]
        seen["all"] = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)[rows]

    with torch.no_grad(), observed([consumer], after=look):
        model(x)
    torch.testing.assert_close(seen["mine"], seen["all"].double())
    bias = consumer.module.bias.detach().double()
    torch.testing.assert_close(seen["mine"] @ consumer.matrix.T + bias, seen["out"].double(), rtol=0, atol=1e-5)

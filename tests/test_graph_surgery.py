"""The user's own module made smaller: what it keeps, what follows, and when the program is returned instead."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_law import check_law, outputs, prepare, random_keep
from torch import Tensor, nn

from hwprune.errors import InvalidInput
from hwprune.graph import cut, keep_first, resize, trace
from hwprune.models import load_model


def halves(program):
    return keep_first(program.groups, (program.groups.widths + 1) // 2)


@pytest.fixture
def resnet():
    model = prepare(load_model("resnet8"))
    return model, trace(model, (torch.randn(2, 3, 8, 8, dtype=torch.float64),))


def test_the_model_itself_is_left_as_it_is(resnet):
    model, program = resnet
    state, objects = copy.deepcopy(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    generator = torch.get_rng_state()
    result = cut(model, program, halves(program))
    assert result.kind == "module" and result.module is not model
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert not shared & {parameter.data_ptr() for parameter in result.module.parameters()}


def test_kept_slices_are_the_values_the_model_has_now(resnet):
    model, program = resnet
    keep = random_keep(program)
    with torch.no_grad():
        model.conv1.weight.mul_(3.0)
    small = cut(model, program, keep).module
    group = next(i for i, group in enumerate(program.groups) if group.name == "conv1")
    kept = torch.from_numpy(keep[program.groups.offsets[group] : program.groups.offsets[group + 1]])
    assert torch.equal(small.conv1.weight, model.conv1.weight[kept])
    assert torch.equal(small.bn1.running_var, model.bn1.running_var[kept])


@pytest.mark.parametrize("chunked", [False, True])
def test_values_come_from_the_model_that_is_given(chunked):
    """A copy of the traced model, trained further, is cut with its own values."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(torch.cat([part.relu() for part in x.chunk(3, -1)], -1) if chunked else x.relu())

    traced = prepare(Halves())
    program = trace(traced, (torch.randn(3, 4, dtype=torch.float64),))
    later = prepare(copy.deepcopy(traced))
    keep = np.ones(program.groups.total, dtype=bool)
    keep[[1, 2, 11]] = False
    found = outputs(cut(later, program, keep).module, program.example_inputs)
    expected = outputs(resize(trace(later, program.example_inputs), keep), program.example_inputs)
    assert torch.allclose(found[0], expected[0], rtol=1e-12)


def test_flags_are_preserved(resnet):
    model, program = resnet
    model.train()
    model.layer2.eval()
    model.layer1[0].conv1.weight.requires_grad_(False)
    for keep in (halves(program), np.ones(program.groups.total, dtype=bool)):
        small = cut(model, program, keep).module
        assert [part.training for part in small.modules()] == [part.training for part in model.modules()]
        trained = {name for name, parameter in small.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in model.named_parameters()} - {"layer1.0.conv1.weight"}


def test_flags_are_preserved_in_a_program():
    model = prepare(Numbers()).train()
    model.first.weight.requires_grad_(False)
    program = trace(model, (torch.randn(2, 4, dtype=torch.float64),))
    result = cut(model, program, halves(program))
    assert result.kind == "program" and result.module.training
    assert {name for name, p in result.module.named_parameters() if not p.requires_grad} == {"first.weight"}


def test_no_hook_is_left(resnet):
    model, program = resnet
    for part in [*model.modules(), *cut(model, program, halves(program)).module.modules()]:
        assert not part._forward_hooks and not part._forward_pre_hooks and not part._backward_hooks


def test_a_cut_module_trains_and_takes_any_batch(resnet):
    model, program = resnet
    small = cut(model, program, halves(program)).module.train()
    small(torch.randn(5, 3, 12, 12, dtype=torch.float64)).square().mean().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in small.parameters())


def test_state_dict_loads_into_another_cut(resnet):
    model, program = resnet
    keep = random_keep(program)
    small, other = cut(model, program, keep).module, cut(prepare(load_model("resnet8")), program, keep).module
    other.load_state_dict(small.state_dict())
    assert torch.equal(*(net(program.example_inputs[0]) for net in (small, other)))


def test_a_cut_module_can_be_traced_and_cut_again(resnet):
    model, program = resnet
    once = cut(model, program, halves(program)).module
    again = trace(once, program.example_inputs)
    assert again.groups.widths.tolist() == ((program.groups.widths + 1) // 2).tolist()
    assert check_law(again, once, random_keep(again, seed=3)).kind == "module"


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.depthwise = nn.Conv2d(12, 24, 3, groups=12)
        self.norm = nn.GroupNorm(3, 24)
        self.act = nn.PReLU(24)
        self.up = nn.ConvTranspose2d(24, 10, 2, groups=2)
        self.plain = nn.BatchNorm2d(10, affine=False)
        self.bare = nn.LayerNorm(10, elementwise_affine=False)
        self.fc = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.depthwise(self.grouped(self.conv(x)))))
        return self.fc(self.bare(self.plain(self.up(x)).mean((2, 3))))


def test_attributes_of_layers_follow():
    model = prepare(Layers())
    program = trace(model, (torch.randn(2, 3, 8, 8, dtype=torch.float64),))
    result = check_law(program, model, halves(program))
    small = result.module
    assert result.kind == "module", result.reason
    assert (small.conv.in_channels, small.conv.out_channels) == (3, small.conv.weight.shape[0])
    for conv in (small.grouped, small.depthwise):
        assert (conv.out_channels, conv.in_channels) == (conv.weight.shape[0], conv.weight.shape[1] * conv.groups)
    assert (small.grouped.groups, small.depthwise.groups) == (2, small.depthwise.in_channels)
    assert (small.up.in_channels, small.up.out_channels) == (small.up.weight.shape[0], small.up.weight.shape[1] * 2)
    assert small.norm.num_channels == small.act.num_parameters == small.up.in_channels
    assert small.plain.num_features == small.bare.normalized_shape[0] == small.fc.in_features == small.up.out_channels
    assert small.fc.out_features == 2
    repr_of = repr(small)
    assert f"Linear(in_features={small.fc.in_features}," in repr_of


class Numbers(nn.Module):
    """A size in the forward that no attribute holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).view(-1, 6))


def test_a_forward_that_cannot_follow_is_named_by_its_line():
    model = prepare(Numbers())
    program = trace(model, (torch.randn(2, 4, dtype=torch.float64),))
    result = cut(model, program, keep_first(program.groups, [4]))
    assert result.kind == "program"
    assert "test_graph_surgery.py" in result.reason
    assert "`return self.last(self.first(x).view(-1, 6))`" in result.reason
    assert result.reason.endswith(".") and "\n" not in result.reason
    assert torch.equal(result.module(*program.example_inputs), resize(program, keep_first(program.groups, [4]))(
        *program.example_inputs
    ))  # fmt: skip


class Scaled(nn.Module):
    """Follows without an error, and computes something else: the mean's divisor shrinks with the channels."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x) + self.gain * x.square().mean(-1, keepdim=True)


@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_a_module_that_computes_something_else_is_not_accepted(gain):
    """Not even where a factor that starts at zero hides the difference."""
    model = Scaled(gain)
    program = trace(model, (torch.randn(2, 4),))
    result = cut(model, program, keep_first(program.groups, [4]))
    assert result.kind == "program"
    assert "differs from the resized program's by" in result.reason
    assert result.module.gain.item() == gain  # the comparison moves parameters, and puts them back


def test_parameters_are_put_back_after_the_comparison(resnet):
    model, program = resnet
    small = cut(model, program, np.ones(program.groups.total, dtype=bool)).module
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), model.state_dict().values(), strict=True))


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))

    def __deepcopy__(self, memo):
        raise TypeError("holds a lock")


def test_a_module_that_cannot_be_copied_becomes_a_program():
    model = Stubborn()
    program = trace(model, (torch.randn(2, 4),))
    result = cut(model, program, keep_first(program.groups, [3]))
    assert result.kind == "program" and "holds a lock" in result.reason


def test_unregistered_tensors_and_lists_of_shared_parameters_follow():
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
            self.gain = torch.rand(6, dtype=torch.float64)
            self.shared = [self.first.weight]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(x, self.shared[0]) * self.gain + self.first(x))

    model = prepare(Loose())
    program = trace(model, (torch.randn(2, 4, dtype=torch.float64),))
    result = check_law(program, model, random_keep(program))
    assert result.kind == "module", result.reason
    assert result.module.shared[0] is result.module.first.weight
    assert result.module.gain.shape == (result.module.first.out_features,)


def test_a_program_of_another_model_is_refused(resnet):
    _, program = resnet
    other = load_model("resnet8", classes=7)
    with pytest.raises(InvalidInput, match=r"linear\.weight .* trace this model"):
        cut(other, program, halves(program))

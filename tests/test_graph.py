"""What a traced model says of itself: groups, what is frozen and why, and what happens to wrong input."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_law import law
from torch import Tensor, nn

from hwprune.errors import InvalidInput, UnsupportedModel
from hwprune.graph import keep_first, keep_top, resize, trace
from hwprune.models import load_model


class Between(nn.Module):
    """`first`, then an operator, then `last`."""

    def __init__(self, operator) -> None:
        super().__init__()
        self.first, self.last, self.operator = nn.Linear(6, 10), nn.Linear(10, 4), operator

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operator(self.first(x)))


@pytest.fixture(scope="module")
def resnet():
    model = load_model("resnet8")
    return model, trace(model, (torch.randn(2, 3, 8, 8),))


def test_groups_of_a_residual_network(resnet):
    _, program = resnet
    widths = dict(zip(program.groups.names, program.groups.widths.tolist(), strict=True))
    assert widths == {
        "conv1": 16,  # the stem, which the padded shortcuts carry on to the wider stages
        "layer1.0.conv1": 16,
        "layer2.0.conv1": 32,
        "layer3.0.conv1": 64,
        "layer2.0.conv2": 16,  # the channels that a shortcut pads to
        "layer3.0.conv2": 32,
    }
    assert program.groups.total == sum(widths.values())
    assert program.groups.offsets.tolist() == np.concatenate([[0], np.cumsum(list(widths.values()))]).tolist()


def test_slots_name_every_slice_of_a_channel(resnet):
    _, program = resnet
    group = next(group for group in program.groups if group.name == "layer1.0.conv1")
    slots = {(slot.parameter, slot.dim): slot.role for slot in group.slots}
    assert slots == {
        ("layer1.0.conv1.weight", 0): "out",
        ("layer1.0.bn1.weight", 0): "norm",
        ("layer1.0.bn1.bias", 0): "norm",
        ("layer1.0.bn1.running_mean", 0): "norm",
        ("layer1.0.bn1.running_var", 0): "norm",
        ("layer1.0.conv2.weight", 1): "in",
    }
    assert all(slot.positions.tolist() == [[i] for i in range(16)] for slot in group.slots)
    assert {slot.folded for slot in group.slots if slot.role == "out"} == {True}


def test_a_producer_read_by_more_than_its_norm_is_not_folded():
    class Peek(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc((x + self.norm(x)).mean((2, 3)))

    program, _ = law(Peek(), (torch.randn(2, 3, 5, 5),))
    assert [slot.folded for slot in program.groups[0].slots if slot.role == "out"] == [False, False]


def test_a_channel_of_a_flattened_map_owns_all_its_pixels():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 2))
    program, _ = law(model, (torch.randn(2, 3, 6, 6),))
    (slot,) = [slot for slot in program.groups[0].slots if slot.role == "in"]
    assert slot.positions.tolist() == np.arange(80).reshape(5, 16).tolist()


def test_tracing_changes_nothing_and_shares_the_parameters():
    model = load_model("resnet8").train()
    model.bn1.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    program = trace(model, (torch.randn(2, 3, 8, 8),))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert model.training and model.layer1.training and not model.bn1.training
    shared = dict(program.module.named_parameters())
    assert all(shared[key] is parameter for key, parameter in model.named_parameters())


def test_example_batch_is_not_baked_in():
    model = load_model("resnet8").eval()
    program = trace(model, (torch.randn(2, 3, 8, 8),))
    small = resize(program, keep_first(program.groups, (program.groups.widths + 1) // 2)).eval()
    images = torch.randn(5, 3, 8, 8)
    assert torch.allclose(small(images)[:2], small(images[:2]), atol=1e-6)


# An operator between two linear layers, and how much of the first layer can be pruned nevertheless.
FREEZING = {
    "softmax": lambda x: x.softmax(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "sort": lambda x: x.sort(-1).values,
    "linalg_qr": lambda x: torch.linalg.qr(x).Q @ x.new_ones(6, 10),
    "fft_fft": lambda x: torch.fft.fft(x).real,
    "flip": lambda x: x.flip(-1),
    "amax": lambda x: x - x.amax(-1, keepdim=True),
    "bilinear": lambda x: F.bilinear(x, x, x.new_ones(10, 10, 10)),
}


@pytest.mark.parametrize("operator", FREEZING)
def test_what_cannot_be_pruned_is_named_with_its_operator(operator):
    program, result = law(Between(FREEZING[operator]), (torch.randn(3, 6, 6),))
    frozen = {entry.parameter: entry for entry in program.groups.frozen}
    assert frozen["first.weight"].operator == operator
    assert frozen["first.weight"].dim == 0 and frozen["first.weight"].reason
    assert frozen["last.weight"].operator == "output"
    assert len(program.groups) == 0 and result.kind == "module"


FOLLOWING = {
    "softmax over tokens": lambda x: x.softmax(1),
    "two halves": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "maximum of two": lambda x: torch.maximum(x, -x),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "clamp": lambda x: x.clamp(-1, 1),
    "in place": lambda x: x.mul_(2).add_(1).relu_(),
    "einops": lambda x: x.unflatten(-1, (5, 2)).transpose(-1, -2).flatten(-2),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "squeeze": lambda x: x[None].squeeze(0),
    "stack": lambda x: torch.stack([x, 2 * x]).sum(0),
    "unbind": lambda x: torch.stack(x.unbind(1), 1),
}


@pytest.mark.parametrize("operator", FOLLOWING)
def test_what_moves_or_mixes_channels_by_the_way_follows(operator):
    program, _ = law(Between(FOLLOWING[operator]), (torch.randn(3, 6, 6),))
    assert {frozen.parameter for frozen in program.groups.frozen} == {"last.weight"}


def test_the_rest_stays_prunable_behind_an_unknown_operator():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.GRU(8, 9, batch_first=True))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.cell, self.hidden, self.leave = model[0], model[2], nn.Linear(9, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.hidden(self.cell(self.enter(x))[0]).relu())

    program, result = law(Recurrent(), (torch.randn(2, 4, 6),))
    assert program.groups.names == ["hidden"]
    frozen = {entry.parameter: entry.operator for entry in program.groups.frozen}
    assert frozen["enter.weight"] == frozen["cell.weight_ih_l0"] == "gru"
    assert result.kind == "module"


def test_a_weight_made_in_the_forward_is_named():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 6), nn.Linear(6, 2))
    program, _ = law(model, (torch.randn(2, 4),))
    frozen = {entry.parameter: entry.operator for entry in program.groups.frozen}
    assert frozen["0.parametrizations.weight.original1"] == "_weight_norm"
    assert program.groups.names == ["1"]


def test_several_inputs_and_nested_outputs():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.up, self.down = (nn.Linear(*size) for size in ((4, 6), (5, 6), (6, 3), (6, 2)))

        def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
            z = (self.left(x) + self.right(y)).relu()
            return {"up": self.up(z), "rest": [self.down(z), x]}

    program, result = law(Nested(), (torch.randn(2, 4), torch.randn(2, 5)))
    assert program.groups.widths.tolist() == [6]
    assert result.kind == "module"
    assert set(result.module(*program.example_inputs)) == {"up", "rest"}


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 0:
            x = x.relu()
        return self.last(x)


def test_a_model_that_cannot_be_exported_says_where_and_what_to_do(capfd):
    with pytest.raises(UnsupportedModel) as caught:
        trace(DataDependent(), (torch.randn(2, 4),))
    message = str(caught.value)
    assert "DataDependent" in message
    assert "if x.sum() > 0" in message or "test_graph.py" in message
    assert "torch.export.export(" in message
    assert "\n" not in message
    assert capfd.readouterr().err == ""  # the exporter's own prints


def test_inputs_that_the_model_does_not_take_are_said():
    with pytest.raises(InvalidInput, match=r"does not take 1 input of 1x4x5: its forward raised RuntimeError"):
        trace(load_model("resnet8"), torch.randn(1, 4, 5))


def test_keep_first_and_keep_top(resnet):
    _, program = resnet
    groups = program.groups
    widths = np.maximum(1, groups.widths // 3)
    ranking = torch.randn(groups.total)
    first, top = keep_first(groups, widths), keep_top(groups, widths, ranking)
    for a, b, width in zip(groups.offsets[:-1], groups.offsets[1:], widths, strict=True):
        assert first[a:b].tolist() == [True] * width + [False] * (b - a - width)
        assert np.flatnonzero(top[a:b]).tolist() == sorted(ranking[a:b].argsort(descending=True)[:width].tolist())
    ties = keep_top(groups, widths, np.ones(groups.total))
    assert (ties == first).all()


@pytest.mark.parametrize("make", [resize, lambda program, keep: program.groups.check_keep(keep)])
def test_a_keep_of_another_length_or_with_an_empty_group_is_refused(resnet, make):
    _, program = resnet
    with pytest.raises(InvalidInput, match=rf"\({program.groups.total},\)"):
        make(program, np.ones(program.groups.total + 1, dtype=bool))
    keep = np.ones(program.groups.total, dtype=bool)
    keep[: program.groups.offsets[1]] = False  # the stream; what is inside a block may go
    with pytest.raises(InvalidInput, match=f"group {program.groups.names[0]} without a channel"):
        make(program, keep)


def test_resized_keys_and_node_names_are_those_of_the_dense_program(resnet):
    model, program = resnet
    small = resize(program, keep_first(program.groups, (program.groups.widths + 1) // 2))
    dense = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
    assert {key for key in small.state_dict() if not key.endswith("num_batches_tracked")} == dense
    calls = [node.name for node in program.module.graph.nodes if node.op.startswith("call")]
    assert [node.name for node in small.graph.nodes if node.op.startswith("call")] == calls


def test_a_resized_program_trains(resnet):
    _, program = resnet
    small = resize(program, keep_first(program.groups, (program.groups.widths + 1) // 2)).train()
    before = small.get_submodule("bn1").running_mean.clone()
    small(torch.randn(4, 3, 8, 8)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert not torch.equal(before, small.get_submodule("bn1").running_mean)

"""Residual blocks that lose all their channels: which groups may, and that nothing but a constant is left of them."""

import itertools
import re

import numpy as np
import pytest
import torch
from graph_law import assert_same, masked, outputs, prepare, random_keep
from torch import Tensor, nn

from hwprune.errors import InvalidInput
from hwprune.graph import cut, resize, trace
from hwprune.models import load_model

IMAGE = (2, 3, 16, 16)


class Branch(nn.Module):
    """A stream of 8 channels, and what is added to it (or otherwise done with it)."""

    def __init__(self, branch: nn.Module, join=torch.add) -> None:
        super().__init__()
        self.stem, self.branch, self.join = nn.Conv2d(3, 8, 3, padding=1), branch, join
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.join(x, self.branch(x)).relu().mean((2, 3)))


class Excite(nn.Module):
    """Squeeze and excitation, with a scale of its own that is reshaped on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.scale = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * gate * self.scale.view(1, -1, 1, 1)


def conv(*channels: int, **options) -> nn.Sequential:
    convs = [nn.Conv2d(a, b, 3, padding=1, **options) for a, b in itertools.pairwise(channels)]
    return nn.Sequential(*[part for one in convs for part in (one, nn.BatchNorm2d(one.out_channels), nn.ReLU())][:-1])


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(12, 3, 20, dropout=0.1, batch_first=True, norm_first=True)


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(8, 5, 8), conv(8, 6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


# a network, its input, and which of its groups can go
NETWORKS = {
    "resnet20": (lambda: load_model("resnet20"), IMAGE, r"layer\d\.\d\.conv1"),
    "resnet18": (lambda: load_model("torchvision:resnet18"), IMAGE, r"layer\d\.\d\.conv1"),
    "resnet50": (lambda: load_model("torchvision:resnet50"), IMAGE, r"layer\d\.\d\.conv[12]"),
    "mobilenet_v2": (lambda: load_model("mobilenet_v2"), IMAGE, r"features\.([578]|1[0-24578])\.conv\.0"),
    "vgg16_bn": (lambda: load_model("vgg16_bn"), (1, 3, 32, 32), None),
    "convolution without a norm": (lambda: Branch(nn.Conv2d(8, 8, 3, padding=1)), IMAGE, None),
    "one inside": (lambda: Branch(conv(8, 6, 8)), IMAGE, r"branch\.0"),
    "squeeze and excitation": (
        lambda: Branch(nn.Sequential(conv(8, 6, 8), Excite())), IMAGE, r"branch\.0\.0"
    ),
    "gate": (lambda: Branch(conv(8, 6, 8), torch.mul), IMAGE, None),
    "concatenation": (lambda: Branch(conv(8, 6, 8), lambda x, y: torch.cat([x, y], 1)[:, :8]), IMAGE, None),
    "no shortcut": (lambda: Branch(conv(8, 6, 8), lambda x, y: y), IMAGE, None),
    "a padded convolution of a constant": (lambda: Branch(conv(8, 6, 5, 8)), IMAGE, r"branch\.3"),
    "and an unpadded one": (
        lambda: Branch(nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 8, 3, padding=2))),
        IMAGE, r"branch\.1",
    ),
    "nothing but zeros": (
        lambda: Branch(nn.Sequential(*[nn.Conv2d(*io, 3, padding=1, bias=False) for io in ((8, 6), (6, 5), (5, 8))])),
        IMAGE, r"branch\.[01]",
    ),
    "two branches and no shortcut": (lambda: Branch(Parallel(), lambda x, y: y), IMAGE, r"branch\.left\.0"),
    "transformer": (transformer, (2, 7, 12), "linear1"),  # the heads leave through views
}  # fmt: skip


@pytest.fixture(scope="module")
def traced():
    """Every network is traced once. name -> program"""
    programs: dict = {}

    def make(name: str):
        if name not in programs:
            torch.manual_seed(0)
            model, shape, _ = NETWORKS[name]
            model = prepare(model())
            programs[name] = model, trace(model, (torch.randn(shape).double(),))
        return programs[name]

    return make


@pytest.mark.parametrize("name", NETWORKS)
def test_exactly_the_insides_of_residual_blocks_are_removable(traced, name):
    _, program = traced(name)
    expected = NETWORKS[name][2]
    for group in program.groups:
        assert group.removable == bool(expected and re.fullmatch(expected, group.name)), group.name
    assert program.groups.removable.any() == bool(expected)


def without(program, groups, seed: int = 0) -> np.ndarray:
    """A random keep that leaves these groups no channel."""
    keep = random_keep(program, seed)
    for g in groups:
        keep[program.groups.offsets[g] : program.groups.offsets[g + 1]] = False
    return keep


@pytest.mark.parametrize("name", [name for name, (_, _, removable) in NETWORKS.items() if removable])
def test_masked_and_resized_agree_whatever_is_removed(traced, name):
    model, program = traced(name)
    inputs = program.example_inputs
    removable = np.flatnonzero(program.groups.removable)
    random = np.random.default_rng(0)
    dense = set(program.module.graph.nodes)
    for seed in range(3):
        chosen = removable if seed == 0 else random.choice(removable, max(1, len(removable) // 2), replace=False)
        keep = without(program, chosen, seed)
        small = resize(program, keep).eval()
        expected = outputs(masked(program, keep), inputs)
        assert_same(outputs(small, inputs), expected)
        names = {node.name for node in small.graph.nodes}
        assert all(node.name not in names for node in program.blocks.without(chosen).dead)
        assert len(names) < len(dense)
        for group in (program.groups[g] for g in chosen):
            assert not any(slot.parameter in dict(small.named_parameters()) for slot in group.slots)
        found = cut(model, program, keep)
        assert found.kind == "program" and program.groups.names[chosen.min()] in found.reason
        assert_same(outputs(found.module.eval(), inputs), expected)


def test_another_batch_and_another_size_pass_a_removed_block(traced):
    _, program = traced("resnet20")
    keep = without(program, np.flatnonzero(program.groups.removable))
    x = torch.randn(3, 3, 20, 20).double()
    assert_same(outputs(resize(program, keep).eval(), (x,)), outputs(masked(program, keep), (x,)))


def test_a_block_without_biases_and_norms_leaves_nothing_at_all(traced):
    _, program = traced("nothing but zeros")
    small = resize(program, without(program, np.flatnonzero(program.groups.removable)))
    assert not any("add" in node.name or "constant" in node.name for node in small.graph.nodes)
    assert set(small.state_dict()) == {"stem.weight", "stem.bias", "head.weight", "head.bias"}


def test_the_cut_has_the_values_of_the_model_and_trains(traced):
    _, program = traced("one inside")
    model = prepare(NETWORKS["one inside"][0]())  # other values than those of the program
    keep = without(program, np.flatnonzero(program.groups.removable))
    found = cut(model, program, keep)
    own = trace(model, program.example_inputs)
    assert_same(outputs(found.module.eval(), own.example_inputs), outputs(resize(own, keep).eval(), own.example_inputs))
    small = found.module.train()
    constant = small.get_parameter("batch_norm_1_constant")
    assert constant.shape == (1, small.get_parameter("stem.weight").shape[0], 1, 1)
    small(*program.example_inputs).square().mean().backward()
    assert constant.grad is not None and constant.grad.abs().max() > 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in cut(model, program, keep).module.parameters())


def test_a_masked_block_returns_the_shift_in_training_and_the_constant_once_statistics_have_followed(traced):
    _, program = traced("one inside")
    model = prepare(NETWORKS["one inside"][0]())
    for name in ("branch.0.weight", "branch.0.bias", "branch.1.weight", "branch.1.bias"):
        model.get_parameter(name).data.zero_()
    keep = np.repeat(~program.groups.removable, program.groups.widths)
    shift, x = model.branch[4].bias.detach(), program.example_inputs[0]

    def constant() -> Tensor:
        return cut(model, program, keep).module.get_parameter("batch_norm_1_constant").detach().flatten()

    assert (constant() - shift).abs().max() > 1e-3
    model.train()
    for _ in range(300):
        model(x)
    torch.testing.assert_close(constant(), shift, rtol=0, atol=1e-9)


def test_what_is_left_empty_and_must_not_is_named(traced):
    _, program = traced("two branches and no shortcut")
    index = program.groups.names.index("branch.right.0")
    with pytest.raises(InvalidInput, match=r"branch\.right\.0 without a channel; every group keeps at least one"):
        resize(program, without(program, [index]))
    with pytest.raises(InvalidInput, match=r"branch\.right\.0 the network falls apart"):
        program.blocks.without([index, program.groups.names.index("branch.left.0")])


def test_what_dies_with_a_group(traced):
    _, program = traced("resnet50")
    names, implied = program.groups.names, program.blocks.implied
    first, second = names.index("layer1.0.conv1"), names.index("layer1.0.conv2")
    assert np.flatnonzero(implied[first]).tolist() == [second]
    assert np.flatnonzero(implied[second]).tolist() == [first]
    assert not implied[~program.groups.removable].any()
    _, program = traced("squeeze and excitation")
    block, squeeze = program.groups.names.index("branch.0.0"), program.groups.names.index("branch.1.down")
    assert program.blocks.implied[block, squeeze] and not program.groups[squeeze].removable

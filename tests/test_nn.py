"""Masks fold exactly, reach the flat mask with their gradients, and leave no trace when they are taken out."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tolerance import assert_as_accurate
from torch import nn
from torch.nn import functional as F

from hwprune.errors import InvalidInput, UnsupportedModel
from hwprune.graph import Follower, cut, keep_top, resize, trace
from hwprune.models import load_model
from hwprune.nn import ColumnPrunedConv2d, Masked, MaskedConv2d, mask_, match_scales_, prune_columns_, unmask_


class Residual(nn.Module):
    """Batch norms, a conv without one, a depthwise conv, a residual add, a bias, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.plain = nn.Conv2d(8, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.back = nn.Conv2d(12, 8, 1, bias=False)
        self.back_norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 10)
        self.classifier = nn.Linear(10, 5)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.norm(self.depthwise(torch.relu(self.plain(x)))))
        x = torch.relu(x + self.back_norm(self.back(y)))
        return self.classifier(torch.relu(self.hidden(x.mean((2, 3)))))


@dataclass
class SlotStub:
    parameter: str
    dim: int
    positions: np.ndarray
    role: str
    folded: bool = False


@dataclass
class GroupsStub:
    """Groups drawn by hand, for layouts that a small network does not show."""

    slots: list[list[SlotStub]]
    widths: list[int]

    @property
    def offsets(self):
        return np.concatenate([[0], np.cumsum(self.widths)])

    def __iter__(self):
        return iter([type("Group", (), {"slots": slots}) for slots in self.slots])


def varied(model):
    """Random batch norm parameters and statistics, so that a wrong fold shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def traced(model, *shape):
    x = torch.randn(shape)
    return trace(model.eval(), (x,)).groups, x


def multiply_parameters(model, groups, mask):
    """The definition, by hand: every masked parameter multiplied in place."""
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for group, first in zip(groups, groups.offsets, strict=False):
            for slot in group.slots:
                if slot.role == "in" or slot.folded or "running" in slot.parameter:
                    continue
                parameter = state[slot.parameter].movedim(slot.dim, 0)
                for channel, positions in enumerate(slot.positions):
                    parameter[positions] *= mask[first + channel]
    return model


@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_masked_is_the_network_with_multiplied_parameters(soft, train):
    model, reference = varied(Residual()), Residual()
    groups, x = traced(model, 4, 3, 6, 6)
    reference.load_state_dict(model.state_dict())
    mask = torch.rand(groups.total) if soft else (torch.rand(groups.total) < 0.6).float()
    expected = multiply_parameters(reference, groups, mask).train(train)(x)
    masked = mask_(model, groups)
    masked.set(mask)
    rounding = {} if train else {"rtol": 0, "atol": 0}  # norms train by an operator of ours
    torch.testing.assert_close(model.train(train)(x), expected, **rounding)


def test_off_channels_are_exactly_zero_after_the_norm():
    model = varied(Residual())
    groups, x = traced(model, 2, 3, 6, 6)
    names = {
        slot.parameter: first for group, first in zip(groups, groups.offsets, strict=False) for slot in group.slots
    }
    mask = torch.ones(groups.total)
    mask[names["norm.weight"] + 3] = 0
    seen = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    mask_(model, groups).set(mask)
    model(x)
    assert not seen[0][:, 3].any() and seen[0][:, 2].all()


def test_masked_equals_resized():
    model = varied(Residual())
    x = torch.randn(4, 3, 6, 6)
    program = trace(model.eval(), (x,))
    keep = keep_top(
        program.groups, np.ceil(program.groups.widths * 0.6).astype(int), np.random.rand(program.groups.total)
    )
    mask_(model, program.groups).set(torch.from_numpy(keep).float())
    torch.testing.assert_close(model(x), resize(program, keep).eval()(x), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_flat_mask():
    model = varied(Residual()).double()
    groups, x = traced(model.float(), 2, 3, 4, 4)
    model.double()
    masked, x = mask_(model, groups), x.double()

    def loss(mask):
        masked.set(mask)
        return model(x)

    assert torch.autograd.gradcheck(loss, torch.rand(groups.total, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("straight_through", [False, True])
def test_parameters_of_a_channel_that_is_off_learn_only_straight_through(straight_through):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    slots = [SlotStub(f"0.{name}", 0, np.arange(2)[:, None], "out") for name in ("weight", "bias")]
    mask = torch.tensor([0.0, 0.5], requires_grad=True)
    mask_(model, GroupsStub([slots], [2])).set(mask, straight_through=straight_through)
    x = torch.randn(5, 3)
    model(x).sum().backward()
    gradient = 5 * model[1].weight.detach()[0]  # [2] of the outputs of the first layer, summed over the batch
    factor = torch.ones(2) if straight_through else mask.detach()
    torch.testing.assert_close(dict(model.named_parameters())["0.bias"].grad, gradient * factor)
    unmask_(model)
    torch.testing.assert_close(mask.grad, (model[0](x) * gradient / 5).sum(0))


def skipping(model, x):
    """The program, and a handle on the model that can leave channels out."""
    program = trace(model.eval(), (x,))
    return program, mask_(model, program.groups, Follower(model, program))


@pytest.mark.parametrize("build", [Residual, lambda: load_model("resnet8")], ids=["residual", "option_a"])
@pytest.mark.parametrize("straight_through", [False, True])
def test_skipped_channels_leave_what_multiplied_masks_compute(build, straight_through):
    """Two steps with different masks: outputs, and gradients of masks and parameters."""
    torch.manual_seed(1)
    x = torch.randn(4, 3, 8, 8)
    skipped, multiplied = varied(build()), build()
    multiplied.load_state_dict(skipped.state_dict())
    program, leaves_out = skipping(skipped, x)
    multiplies = mask_(multiplied, program.groups)
    for _ in range(2):
        mask = torch.rand(program.groups.total) * (torch.rand(program.groups.total) < 0.5)
        mask[torch.from_numpy(program.groups.offsets[:-1])] = 0.5
        found = []
        for model, handle, options in ((skipped, leaves_out, {"skip": True}), (multiplied, multiplies, {})):
            leaf = mask.clone().requires_grad_()
            handle.set(leaf, straight_through=straight_through, **options)
            model.train().zero_grad()
            y = model(x)
            y.square().sum().backward()
            found.append((y.detach(), leaf.grad, [parameter.grad for parameter in model.parameters()]))
        (y, mask_grad, grads), (expected, expected_mask_grad, expected_grads) = found
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        on = mask > 0
        scale = float(expected_mask_grad.abs().max())
        torch.testing.assert_close(mask_grad[on], expected_mask_grad[on], rtol=1e-3, atol=1e-4 * scale)
        assert mask_grad[~on].eq(0).all()
        for ours, theirs in zip(grads, expected_grads, strict=True):
            mine = ours != 0  # what a skipped channel would have learned, it does not
            torch.testing.assert_close(ours[mine], theirs[mine], rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_statistics_of_kept_channels_are_written_back_and_others_stay():
    model, twin = varied(Residual()), Residual()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 6, 6)
    program, masked = skipping(model, x)
    group = next(i for i, group in enumerate(program.groups) if any(s.parameter == "norm.weight" for s in group.slots))
    first = program.groups.offsets[group]
    mask = torch.ones(program.groups.total)
    mask[first : first + 12 : 2] = 0
    before = model.norm._buffers["running_mean"].clone()
    mask_(twin, program.groups).set(mask)
    masked.set(mask, skip=True)
    model.train()(x), twin.train()(x)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(model.norm._buffers[name][1::2], twin.norm._buffers[name][1::2])
    assert torch.equal(model.norm._buffers["running_mean"][::2], before[::2])
    assert model.norm.num_batches_tracked == 1


def test_skipped_channels_are_really_not_computed():
    model = load_model("resnet8")
    x = torch.randn(2, 3, 8, 8)
    program, masked = skipping(model, x)
    shapes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, y, name=name: shapes.update({name: y.shape}))
    padding = model.layer2[0].padding
    mask = torch.zeros(program.groups.total)
    for first in program.groups.offsets[:-1]:
        mask[first : first + 3] = 1
    mask[program.groups.offsets[0] : program.groups.offsets[1]] = 0  # keeps its first, which counts nothing
    masked.set(mask, skip=True)
    model(x)
    assert shapes["layer2.0.conv1"][1] == 3
    masked.set(mask)
    model(x)
    assert shapes["layer2.0.conv1"][1] == 32 and model.layer2[0].padding == padding
    masked.set(mask, skip=True)
    masked.unmask_()
    assert model.layer2[0].padding == padding and model(x).shape == (2, 10)


class HardCoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(64, 5)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).view(-1, 64))


def test_skipping_needs_a_forward_that_follows():
    model, x = HardCoded(), torch.randn(2, 3, 4, 4)
    program = trace(model.eval(), (x,))
    with pytest.raises(UnsupportedModel, match=r"cannot leave channels out while it trains.*view"):
        Follower(model, program)
    with pytest.raises(InvalidInput, match="give mask_ its sizes"):
        mask_(model, program.groups).set(torch.ones(program.groups.total), skip=True)


def test_unmasking_leaves_no_trace():
    model = varied(Residual())
    groups, x = traced(model, 2, 3, 6, 6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    types = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    expected = model(x)

    masked = mask_(model, groups)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    masked.set(torch.rand(groups.total))
    assert list(model.state_dict()) == list(before)
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert not torch.equal(model(x), expected)

    assert masked.unmask_() is model
    assert [type(module) for module in model.modules()] == types
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [id(parameter) for parameter in model.parameters()] == identities
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_the_optimiser_and_checkpoints_do_not_notice():
    model = varied(Residual())
    groups, x = traced(model, 4, 3, 6, 6)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    masked = mask_(model, groups)
    masked.set((torch.rand(groups.total) < 0.7).float())
    model.train()(x).square().sum().backward()
    before = model.stem_norm._parameters["weight"].clone()
    optimiser.step()
    assert not torch.equal(model.stem_norm._parameters["weight"], before)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.stem_norm._parameters["weight"].zero_()
    model.load_state_dict(saved)
    unmask_(model)
    assert torch.equal(model.stem_norm.weight, saved["stem_norm.weight"])


def test_positions_outside_every_group_are_not_masked():
    model = nn.Sequential(nn.BatchNorm2d(6))
    slots = [SlotStub(f"0.{name}", 0, np.array([[1], [4]]), "norm") for name in ("weight", "bias", "running_mean")]
    mask_(model, GroupsStub([slots], [2])).set(torch.tensor([0.0, 0.5]))
    assert model[0].weight.tolist() == [1, 0, 1, 1, 0.5, 1]


def test_a_channel_may_own_several_positions_and_a_parameter_several_groups():
    model = nn.Sequential(nn.Linear(3, 6, bias=False))
    first = SlotStub("0.weight", 0, np.array([[0, 5], [1, 4]]), "out")
    second = SlotStub("0.weight", 0, np.array([[2], [3]]), "out")
    consumed = SlotStub("0.weight", 1, np.arange(3)[:, None], "in")
    weight = model[0].weight.detach().clone()
    mask_(model, GroupsStub([[first], [second, consumed]], [2, 2])).set(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.2, 0.1])
    torch.testing.assert_close(model[0].weight, weight * scale[:, None])


def test_tied_parameters_are_masked_wherever_they_are_read():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    slot = SlotStub("0.weight", 0, np.arange(4)[:, None], "out")
    mask_(model, GroupsStub([[slot]], [4])).set(torch.zeros(4))
    assert not model[0].weight.any() and not model[1].weight.any()


def test_a_norm_without_parameters_is_masked_at_its_output():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 3, 1)).eval()
    model[1].running_mean += 1  # so that zeroing the convolution would not zero the channel
    groups, x = traced(model, 2, 2, 3, 3)
    masked = mask_(model, groups)
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    masked.set(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    model(x)
    assert not seen[0][:, 1].any() and seen[0][:, 0].all()


def test_masks_work_under_compile():
    model = varied(Residual())
    groups, x = traced(model, 2, 3, 6, 6)
    masked = mask_(model, groups)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        masked.set((torch.rand(groups.total) < 0.5).float())
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    "message, wrong",
    [
        ("masked already", lambda model, groups: mask_(model, groups)),
        ("shape", lambda model, groups: Masked.set(mask_(unmask_(model), groups), torch.ones(3))),
        ("no parameter 'lost.weight'", lambda model, groups: mask_(unmask_(model), LOST)),
    ],
    ids=["twice", "shape", "parameter"],
)
def test_wrong_use_says_so(message, wrong):
    model = Residual()
    groups, _ = traced(model, 2, 3, 6, 6)
    mask_(model, groups)
    with pytest.raises(InvalidInput, match=message):
        wrong(model, groups)


LOST = GroupsStub([[SlotStub("lost.weight", 0, np.arange(4)[:, None], "out")]], [4])


@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_masked_conv_matches_conv_of_masked_input(padding):
    conv = nn.Conv2d(6, 8, 3, padding=padding, groups=2)
    x = torch.randn(2, 6, 5, 7)
    masked = MaskedConv2d.from_conv(conv)
    assert masked.weight is conv.weight
    torch.testing.assert_close(masked(x), conv(x))
    masked.in_mask, masked.out_mask = torch.rand(6), (torch.rand(8) < 0.5).float()
    expected = conv(x * masked.in_mask[:, None, None]) * masked.out_mask[:, None, None]
    torch.testing.assert_close(masked(x), expected)


def test_column_pruned_conv_uses_only_its_columns():
    conv = nn.Conv2d(4, 5, 3, stride=2, padding=1)
    x = torch.randn(2, 4, 6, 6)
    columns = torch.randperm(36)[:10].sort().values
    pruned = ColumnPrunedConv2d.from_conv(conv, columns)
    weight = conv.weight.permute(0, 2, 3, 1).reshape(5, 36)
    kept = torch.zeros_like(weight).index_copy(1, columns, weight[:, columns]).view(5, 3, 3, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(pruned(x), F.conv2d(x, kept, conv.bias, stride=2, padding=1))
    assert torch.equal(pruned.state_dict()["columns"], columns)


def autocast_run(dtype, build):
    """y and the gradients of x and of all parameters, from what `build` makes of a convolution, under autocast to
    bfloat16 (which leaves float64 alone)."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(24, 16, 3, padding=1).to(dtype), torch.randn(2, 24, 9, 7).to(dtype).requires_grad_()
    run = build(conv)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x)
    upstream = torch.randn(y.shape).to(torch.bfloat16).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, conv.weight, conv.bias], upstream)]


@pytest.mark.parametrize("kind", ["masks", "columns"])
def test_convolutions_follow_autocast_as_torchs_own_do(kind):
    columns = torch.arange(0, 24 * 9, 2)
    in_mask, out_mask = (torch.arange(24) % 3 != 0).float() / 2, (torch.arange(16) % 4 != 0).float()

    def ours(conv):
        if kind == "columns":
            return ColumnPrunedConv2d.from_conv(conv, columns)
        masked = MaskedConv2d.from_conv(conv)
        masked.in_mask, masked.out_mask = in_mask, out_mask
        return masked

    def torchs(conv):
        listed = torch.zeros(24 * 9).index_fill(0, columns, 1).view(3, 3, 24).permute(2, 0, 1).to(conv.weight.dtype)
        inner, outer = in_mask.to(listed.dtype).view(-1, 1, 1), out_mask.to(listed.dtype).view(-1, 1, 1)
        if kind == "columns":
            return lambda x: F.conv2d(x, conv.weight * listed, conv.bias, padding=1)
        return lambda x: F.conv2d(x * inner, conv.weight, conv.bias, padding=1) * outer

    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64
    actual, plain, truth = autocast_run(f32, ours), autocast_run(f32, torchs), autocast_run(f64, torchs)
    assert [tensor.dtype for tensor in actual] == [bf16, f32, f32, f32]
    assert autocast_run(f64, ours)[0].dtype == f64
    for found, expected, exact in zip(actual, plain, truth, strict=True):
        # Every gradient is rounded to bfloat16 on its way.
        assert_as_accurate(found.to(bf16), expected.to(bf16), exact)


def test_columns_of_a_cut_network_are_numbered_as_in_the_dense_one():
    model, x = load_model("resnet8", classes=10).eval(), torch.randn(2, 3, 16, 16)
    program = trace(model, (x,))
    groups = program.groups
    names = ("layer1.0.conv2.weight", "layer2.0.conv1.weight", "layer3.0.conv2.weight", "conv1.weight")
    columns = {}
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            kept = torch.rand(weight[0].numel()) < (1.0 if name == "conv1.weight" else 0.6)
            weight.mul_(kept.view(*weight.shape[2:], -1).permute(2, 0, 1))
            columns[name] = kept
        model.layer1[0].conv2.weight.zero_()
    columns["layer1.0.conv2.weight"] = torch.zeros(16 * 9, dtype=torch.bool)
    keep = keep_top(groups, np.ceil(groups.widths * 0.7), torch.rand(groups.total))
    smaller = cut(model, program, keep).module.eval()
    expected = smaller(x)
    assert prune_columns_(smaller, columns, groups, keep) == 3
    torch.testing.assert_close(smaller(x), expected)
    assert type(smaller.conv1) is nn.Conv2d and len(smaller.layer1[0].conv2.columns) == 1
    assert len(smaller.layer3[0].conv2.columns) < 0.75 * smaller.layer3[0].conv2.weight[0].numel()

    with pytest.raises(InvalidInput, match="not the weight of a convolution"):
        prune_columns_(smaller, {"linear.weight": torch.ones(64, dtype=torch.bool)}, groups, keep)
    with pytest.raises(InvalidInput, match="columns leave"):
        prune_columns_(smaller, {"layer3.0.conv2.weight": torch.ones(99, dtype=torch.bool)}, groups, keep)


def test_convolutions_name_what_they_cannot_do():
    with pytest.raises(UnsupportedModel, match="reflect"):
        MaskedConv2d.from_conv(nn.Conv2d(3, 3, 3, padding_mode="reflect"))
    with pytest.raises(UnsupportedModel, match="unevenly"):
        MaskedConv2d.from_conv(nn.Conv2d(3, 3, 2, padding="same"))
    with pytest.raises(UnsupportedModel, match="groups"):
        ColumnPrunedConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2), torch.arange(3))
    for columns in ([0, 36], [3, 2], [1, 1], [-1, 4]):
        with pytest.raises(InvalidInput, match="ascending"):
            ColumnPrunedConv2d.from_conv(nn.Conv2d(4, 4, 3), torch.tensor(columns))


def test_absorbed_masks_leave_the_output_and_free_the_network():
    """Gates multiplied into the parameters for good compute what the mask did."""
    model, x = load_model("resnet8", classes=10).eval(), torch.randn(2, 3, 32, 32)
    groups = trace(model, (x,)).groups
    masked, mask = mask_(model, groups), torch.rand(groups.total).round(decimals=1)
    masked.set(mask)
    before = model(x)
    masked.absorb_(mask)
    assert torch.equal(model(x), before)
    assert torch.equal(masked.unmask_()(x), before)


def test_scales_that_nothing_depends_on_are_those_of_the_reference_again():
    reference, x = load_model("resnet8", classes=10), torch.randn(8, 3, 32, 32)
    groups = trace(reference.eval(), (x,)).groups
    model = copy.deepcopy(reference).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter[::2] = 0  # what is pruned does not count
                parameter *= 0.3
        model.conv1.weight *= 10  # larger than the reference: left alone
    linear, first = model.linear.weight.clone(), model.conv1.weight.clone()
    before = model(x)
    match_scales_(model, reference, groups)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)  # up to the eps of the norms
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4 and name != "conv1.weight":
            kept, dense = parameter.detach()[1::2], reference.get_parameter(name).detach()
            torch.testing.assert_close(kept.square().mean().sqrt(), dense.square().mean().sqrt(), rtol=1e-4, atol=0)
    assert torch.equal(model.linear.weight, linear) and torch.equal(model.conv1.weight, first)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"track_running_stats": False}], ids=["usual", "average", "untracked"]
)
@pytest.mark.parametrize("channels", [5, 16])
def test_masked_norms_train_as_those_of_torch(channels, options, form):
    """The operator takes their training on the CPU; with a mask of ones nothing else differs."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels, eps=1e-3, **options), nn.ReLU())
    nn.init.uniform_(plain[1].weight)
    masked = copy.deepcopy(plain)
    slots = [SlotStub(f"1.{name}", 0, np.arange(channels)[:, None], "norm") for name in ("weight", "bias")]
    mask_(masked, GroupsStub([slots], [channels])).set(torch.ones(channels))
    for _ in range(2):
        x = torch.randn(4, 3, 9, 8).contiguous(memory_format=form) + 1
        outputs = [network(x) for network in (plain, masked)]
        upstream = torch.randn_like(outputs[0])
        grads = [
            torch.autograd.grad(y, list(network.parameters()), upstream)
            for y, network in zip(outputs, (plain, masked), strict=True)
        ]
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    if "track_running_stats" not in options:
        assert outputs[1].grad_fn is not None and masked[1]._buffers["num_batches_tracked"] == 2
    torch.testing.assert_close(masked.state_dict(), plain.state_dict())

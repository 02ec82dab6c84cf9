"""The Triton convolution against float64, in the interpreter where there is no CUDA device."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conv_backend_law import COLUMN_CASES, check_column_gradient, check_column_limit
from tolerance import assert_as_accurate

from hwprune.ops import reference

pytest.importorskip("triton")
from hwprune.kernels import masked_conv as kernels

pytestmark = pytest.mark.usefixtures("poisoned")

POINTWISE = (1, 1), (0, 0), (1, 1), 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUM_SLACK = 1e-6  # of a sum over pixels, whose terms partly cancel, in another order than torch's
# The interpreter cuts bfloat16 off instead of rounding it, which shifts the mean of what is written.
CUT_OFF = 2.0**-7 if DEVICE == "cpu" else 0.0


class Case(NamedTuple):
    """A convolution of x [batch, groups * cin, height, width]; masks as (active, channels) patterns."""

    batch: int = 2
    cin: int = 5
    cout: int = 7
    size: tuple[int, int] = (6, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    in_keep: float | None = None
    out_keep: float | None = None
    affine: bool = False
    residual: bool = False
    act: str = "none"
    column_keep: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation, self.groups


CASES = {
    "plain": Case(),
    "plain-wide": Case(cin=20, cout=37, size=(5, 4), batch=1),
    "pointwise": Case(cin=19, cout=18, kernel=(1, 1), padding=(0, 0), affine=True, act="relu"),
    "pointwise-masked": Case(
        cin=40, cout=35, kernel=(1, 1), padding=(0, 0), in_keep=0.5, out_keep=0.5, residual=True, act="relu"
    ),
    "pointwise-strided": Case(cin=17, cout=6, kernel=(1, 1), stride=(2, 2), padding=(0, 0), in_keep=0.5),
    "masked": Case(cin=35, cout=37, size=(5, 4), batch=1, in_keep=0.5, out_keep=0.5, affine=True, residual=True),
    "masked-strided": Case(in_keep=0.6, out_keep=0.6, stride=(2, 2), affine=True, act="silu"),
    "in-mask": Case(cin=9, in_keep=0.5, act="gelu", affine=True),
    "out-mask": Case(cin=18, cout=20, size=(3, 5), out_keep=0.4, act="relu6", affine=True, residual=True),
    "strides-differ": Case(stride=(3, 2), padding=(2, 0), size=(8, 7), kernel=(3, 2), in_keep=0.5),
    "stride-beyond-kernel": Case(stride=(3, 3), padding=(0, 0), size=(8, 1), kernel=(2, 1), out_keep=0.5),
    "dilated": Case(dilation=(2, 3), padding=(2, 3), size=(7, 8), out_keep=0.6),
    "dilated-strided": Case(dilation=(2, 3), stride=(2, 2), padding=(1, 3), size=(7, 8), in_keep=0.6),
    "grouped": Case(cin=3, cout=5, groups=3, in_keep=0.6, out_keep=0.6, affine=True, residual=True, act="relu"),
    "grouped-dense": Case(cin=17, cout=3, groups=2, size=(4, 3), batch=1),
    "depthwise": Case(cin=1, cout=1, groups=19, in_keep=0.6, out_keep=0.6, affine=True, residual=True, act="silu"),
    "depthwise-strided": Case(cin=1, cout=1, groups=6, stride=(2, 2), dilation=(1, 2), padding=(1, 2), kernel=(3, 2)),
    "depthwise-multiplied": Case(cin=1, cout=2, groups=5, in_keep=0.6, out_keep=0.7),
    "nothing-in": Case(in_keep=0.0, affine=True, residual=True, act="gelu"),
    "nothing-out": Case(out_keep=0.0, affine=True, residual=True, act="relu6"),
    "everything": Case(in_keep=1.0, out_keep=1.0, affine=True),
    "one-channel": Case(cin=1, cout=1, in_keep=1.0, out_keep=1.0, affine=True),
    "one-pixel": Case(batch=1, size=(1, 1)),
    "empty-batch": Case(batch=0, in_keep=0.5, out_keep=0.5, affine=True, residual=True, act="relu"),
    "columns": Case(column_keep=0.4, out_keep=0.7, affine=True, residual=True, act="relu"),
    "columns-strided": Case(cin=18, column_keep=0.2, stride=(2, 2), size=(5, 4)),
    "no-columns": Case(column_keep=0.0, affine=True),
    "half": Case(cin=18, cout=17, size=(4, 3), in_keep=0.5, out_keep=0.5, affine=True, act="gelu", dtype=torch.float16),
    "bfloat16": Case(cin=20, size=(4, 3), in_keep=0.5, affine=True, residual=True, act="silu", dtype=torch.bfloat16),
    "bfloat16-dense": Case(cin=20, size=(4, 3), affine=True, dtype=torch.bfloat16),
    "bfloat16-columns": Case(column_keep=0.5, dtype=torch.bfloat16),
    "bfloat16-depthwise": Case(cin=1, cout=1, groups=9, out_keep=0.5, dtype=torch.bfloat16),
}
cases = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def soft_mask(channels, keep):
    """Zeros but for a random share of the channels; about a third of those at 1."""
    if keep is None:
        return None
    mask = torch.where(torch.rand(channels) < 0.3, 1.0, torch.rand(channels) * 0.9 + 0.1)
    active = torch.randperm(channels)[: round(keep * channels)]
    return mask * torch.zeros(channels).index_fill_(0, active, 1.0)


def inputs(case):
    """x, weight, in_mask, out_mask, scale, shift, residual and columns, in the case's dtype and layout."""
    channels, out = case.cin * case.groups, case.cout * case.groups
    x = torch.randn(case.batch, channels, *case.size)
    weight = torch.randn(out, case.cin, *case.kernel) / math.sqrt(case.cin * math.prod(case.kernel))
    shape = reference.F.conv2d(x, weight, None, *case.geometry).shape
    residual = torch.randn(shape).to(case.dtype) if case.residual else None
    scale, shift = (torch.randn(out), torch.randn(out)) if case.affine else (None, None)
    columns = None
    if case.column_keep is not None:
        count = weight[0].numel()
        columns = torch.randperm(count)[: round(case.column_keep * count)].sort().values
    masks = soft_mask(channels, case.in_keep), soft_mask(out, case.out_keep)
    tensors = x.to(case.dtype), weight.to(case.dtype), *masks, scale, shift, residual, columns
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def poison(tensor, mask):
    """A copy of [N, C, ...] whose masked channels are NaN."""
    if mask is None:
        return tensor
    return torch.where((mask == 0).view(1, -1, 1, 1), math.nan, tensor)


def forward(case, x, weight, in_mask, out_mask, scale, shift, residual, columns):
    poisoned = weight if out_mask is None else torch.where((out_mask == 0).view(-1, 1, 1, 1), math.nan, weight)
    arguments = poison(x, in_mask), poisoned, in_mask, out_mask, scale, shift, residual, case.act, case.geometry
    return kernels.forward(*arguments, columns, True, False)


def expected(case, dtype, tensors, epilogue=True):
    """Plain torch at dtype: the leaves that need gradients, and y."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = []
    for tensor in tensors[:-1]:
        per_channel = tensor is not None and tensor.dim() == 1
        leaves.append(None if tensor is None else tensor.to(wide if per_channel else dtype).requires_grad_())
    if epilogue:
        return leaves, reference.masked_conv2d(*leaves, case.act, *case.geometry, tensors[-1])
    return leaves, reference.masked_conv2d(*leaves[:3], None, None, None, None, "none", *case.geometry, tensors[-1])


@cases
def test_forward(case):
    tensors = inputs(case)
    y, raw = forward(case, *tensors)
    assert y.is_contiguous(memory_format=torch.channels_last) and raw.shape == y.shape
    truth, plain = (expected(case, dtype, tensors)[1].detach() for dtype in (torch.float64, case.dtype))
    assert_as_accurate(y, plain.to(case.dtype), truth)
    truth, plain = (
        reference.channel_sums(expected(case, dtype, tensors, False)[1].detach(), tensors[3])[0]
        for dtype in (torch.float64, case.dtype)
    )
    assert_as_accurate(raw, plain, truth)


def raw_convolution(case, dtype, tensors):
    """The reference's convolution before the epilogue, zeros where out_mask is 0, with its sums; and its leaves."""
    leaves, raw = expected(case, dtype, tensors, epilogue=False)
    return leaves, reference.channel_sums(raw, tensors[3])


@cases
def test_forward_stats(case):
    tensors = inputs(case)
    x, weight, in_mask, out_mask, *_, columns = tensors
    actual = kernels.forward_stats(poison(x, in_mask), weight, in_mask, out_mask, case.geometry, columns, False)
    truths, plains = (raw_convolution(case, dtype, tensors)[1] for dtype in (torch.float64, case.dtype))
    slack = SUM_SLACK + (CUT_OFF if case.dtype == torch.bfloat16 else 0)
    for ours, truth, plain in zip(actual, truths, plains, strict=True):
        assert_as_accurate(ours, plain.detach(), truth.detach(), slack=slack if ours.dim() == 1 else 0)


@cases
def test_convolution_gradients(case):
    """Of x, the input's mask and the weight, from the gradient of the raw convolution."""
    tensors = inputs(case)
    x, weight, in_mask, out_mask, *_, columns = tensors
    gradients = {}
    for dtype in (torch.float64, case.dtype):
        leaves, (raw, *_) = raw_convolution(case, dtype, tensors)
        torch.manual_seed(1)
        upstream = torch.randn(raw.shape).to(DEVICE, case.dtype)
        chosen = [leaf for leaf in (leaves[0], leaves[2], leaves[1]) if leaf is not None]
        gradients[dtype] = torch.autograd.grad(raw, chosen, upstream.to(dtype))
    poisoned = poison(x, in_mask)
    upstream = poison(upstream, out_mask)
    grad_x, grad_in_mask = kernels.backward_input(
        upstream, poisoned, weight, in_mask, out_mask, case.geometry, columns, False
    )
    grad_weight = kernels.backward_weight(
        upstream, poisoned, weight.shape, in_mask, out_mask, case.geometry, columns, False
    )
    assert (grad_in_mask is None) == (in_mask is None)
    actual = [grad for grad in (grad_x, grad_in_mask, grad_weight) if grad is not None]
    for ours, plain, truth in zip(actual, gradients[case.dtype], gradients[torch.float64], strict=True):
        assert_as_accurate(ours, plain, truth, slack=0 if ours is grad_x else SUM_SLACK)
        assert (ours[truth == 0] == 0).all()


EPILOGUES = {
    "none": ("none", 5, 0.6, False),
    "relu": ("relu", 16, 0.5, True),
    "relu6": ("relu6", 3, None, True),
    "silu": ("silu", 19, 0.5, True),
    "gelu": ("gelu", 1, 1.0, False),
    "gelu-residual": ("gelu", 7, 0.0, True),
}
epilogues = pytest.mark.parametrize(
    "act, channels, keep, with_residual", [pytest.param(*epilogue, id=name) for name, epilogue in EPILOGUES.items()]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def pixels(channels, dtype, batch=3):
    return (3 * torch.randn(batch, channels, 7, 9)).to(DEVICE, dtype)


def gradients_of(function, arguments, upstream, dtype):
    """Of every tensor among the arguments, computed at dtype, with float32 at least for those per channel."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [
        tensor if tensor is None else tensor.to(wide if tensor.dim() == 1 else dtype).requires_grad_()
        for tensor in arguments
    ]
    chosen = [leaf for leaf in leaves if leaf is not None]
    y = function(*leaves)
    found = iter(torch.autograd.grad(y, chosen, upstream.to(y.dtype)))
    return [None if leaf is None else next(found) for leaf in leaves]


def assert_all_as_accurate(actual, plains, truths):
    for ours, plain, truth in zip(actual, plains, truths, strict=True):
        assert (ours is None) == (truth is None)
        if ours is not None:
            assert_as_accurate(ours, plain, truth, slack=SUM_SLACK if ours.dim() == 1 else 0)


@dtypes
@epilogues
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_epilogue_gradients(act, channels, keep, with_residual, affine, dtype):
    mask = soft_mask(channels, keep)
    mask = None if mask is None else mask.to(DEVICE)
    scale, shift = (torch.randn(2, channels, device=DEVICE)) if affine else (None, None)
    raw, upstream = pixels(channels, dtype), pixels(channels, dtype)
    residual = pixels(channels, dtype) if with_residual else None

    def epilogue(raw, residual, mask, scale, shift):
        identity = torch.eye(channels, device=DEVICE, dtype=raw.dtype)[:, :, None, None]
        return reference.masked_conv2d(raw, identity, None, mask, scale, shift, residual, act, *POINTWISE, None)

    arguments = raw, residual, mask, scale, shift
    plain, truth = (gradients_of(epilogue, arguments, upstream, kind) for kind in (dtype, torch.float64))
    actual = kernels.backward_epilogue(upstream, poison(raw, mask), mask, scale, shift, residual, act)
    assert_all_as_accurate(actual, plain, truth)
    if mask is not None:
        for grad in (actual[0], actual[2], actual[3], actual[4]):
            assert grad is None or (grad.transpose(0, -1 if grad.dim() == 1 else 1)[mask == 0] == 0).all()


@dtypes
@epilogues
def test_batch_norm(act, channels, keep, with_residual, dtype):
    mask = soft_mask(channels, keep)
    mask = None if mask is None else mask.to(DEVICE)
    x, upstream = pixels(channels, dtype) + 2, pixels(channels, dtype)
    residual = pixels(channels, dtype) if with_residual else None
    weight, bias = torch.randn(2, channels, device=DEVICE)
    _, sums, squares = reference.channel_sums(x, None)
    arguments = x, sums, squares, weight, bias, mask, residual

    def normalise(*arguments):
        return reference.masked_bn_act(*arguments, act, 1e-3)

    truth, plain = (
        normalise(*[tensor if tensor is None or kind == dtype else tensor.double() for tensor in arguments])
        for kind in (torch.float64, dtype)
    )
    poisoned = poison(x, mask), *arguments[1:], act, 1e-3
    assert_all_as_accurate(kernels.bn_act(*poisoned), plain, truth)

    plain, truth = (
        gradients_of(lambda *leaves: normalise(*leaves)[0], arguments, upstream, kind)
        for kind in (dtype, torch.float64)
    )
    actual = kernels.bn_act_backward(upstream, *poisoned)
    assert_all_as_accurate(actual, plain, truth)
    if mask is not None:
        assert all((grad[mask == 0] == 0).all() for grad in (*actual[1:5], actual[5]))


@pytest.mark.parametrize("case", COLUMN_CASES, ids=str)
def test_input_gradient_of_few_columns_and_of_many(case, monkeypatch):
    check_column_gradient(kernels, case, monkeypatch, DEVICE)


def test_a_third_of_the_columns_is_few(monkeypatch):
    check_column_limit(kernels, monkeypatch, DEVICE)


def everything(case, layout=lambda tensor: tensor):
    """What the backend's functions return of the same inputs every time, put into memory as `layout` does."""
    torch.manual_seed(0)
    x, *tensors = inputs(case)
    x = layout(poison(x, tensors[1]))
    *tensors, columns = tensors
    weight, in_mask, out_mask, scale, shift, residual = (t if t is None else layout(t) for t in tensors)
    masks = in_mask, out_mask
    arguments = *masks, case.geometry, columns, False
    y, raw = kernels.forward(x, weight, *masks, scale, shift, residual, case.act, case.geometry, columns, True, False)
    statistics = kernels.forward_stats(x, weight, *arguments)
    upstream = layout(poison(torch.randn(raw.shape).to(DEVICE, case.dtype), out_mask))
    grads = (
        *kernels.backward_input(upstream, x, weight, *arguments),
        kernels.backward_weight(upstream, x, weight.shape, *arguments),
    )
    raw, upstream = layout(raw), layout(torch.randn(raw.shape).to(DEVICE, case.dtype))
    grads += kernels.backward_epilogue(upstream, raw, out_mask, scale, shift, residual, case.act)
    second = ()
    if case.affine:
        norm = raw, *map(layout, statistics[1:]), scale, shift, out_mask, residual, case.act, 1e-3
        second = *kernels.bn_act(*norm), *kernels.bn_act_backward(upstream, *norm)
    return [tensor for tensor in (y, raw, *statistics, *grads, *second) if tensor is not None]


def spaced(tensor):
    """Every second element of a larger tensor along each of its axes, NaN between them."""
    between = math.nan if tensor.is_floating_point() else 0
    larger = tensor.new_full([size * 2 for size in tensor.shape], between)
    return larger[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def columns_first(tensor):
    return tensor.mT.contiguous().mT if tensor.dim() == 4 else tensor


@pytest.mark.parametrize("name", ["masked-strided", "depthwise", "columns-strided", "bfloat16"])
def test_layouts_do_not_matter(name):
    expected = everything(CASES[name])
    for layout in (spaced, channels_last, columns_first):
        assert all(map(torch.equal, everything(CASES[name], layout), expected)), layout


WIDE_CASES = ["masked-strided", "dilated-strided", "depthwise-strided", "columns", "columns-strided", "one-pixel"]


@pytest.mark.parametrize("name", WIDE_CASES)
def test_addresses_of_64_bits_change_nothing(name, monkeypatch):
    narrow = everything(CASES[name])
    monkeypatch.setattr(kernels, "_NARROW", 0)
    assert all(map(torch.equal, everything(CASES[name]), narrow))


def test_padding_counts_where_addresses_may_need_64_bits(monkeypatch):
    """One channel of 16 takes the memory of 16 once it is packed."""
    asked = []
    ask = kernels._is_wide
    monkeypatch.setattr(kernels, "_is_wide", lambda *tensors: asked.append(ask(*tensors)) or asked[-1])
    case = Case(cin=1, cout=2, in_keep=1.0, out_keep=1.0)
    everything(case)
    assert asked and not any(asked)
    monkeypatch.setattr(kernels, "_NARROW", 4 * math.prod(inputs(case)[0].shape))
    asked.clear()
    everything(case)
    assert all(asked)


def test_pixels_beyond_32_bits_are_read_where_they_lie():
    """An image of 2^31 elements and more; what is not looked at takes no memory on the CPU."""
    height, width, channels = 2**14 + 1, 2**13 + 1, 16
    try:
        whole = torch.from_numpy(np.zeros((1, height, width, channels), np.float16))
    except MemoryError:
        pytest.skip("the system does not give out memory that may never be used")
    x = whole.to(DEVICE).permute(0, 3, 1, 2)
    assert x.stride(2) * (height - 1) >= 2**31
    corners = torch.randn(1, channels, 2, 2, device=DEVICE).half()
    x[:, :, :: height - 1, :: width - 1] = corners
    weight, geometry = (
        torch.randn(3, channels, 1, 1, device=DEVICE).half(),
        ((height - 1, width - 1), (0, 0), (1, 1), 1),
    )
    arguments = None, None, geometry, None, False
    y, *_ = kernels.forward_stats(x, weight, *arguments)
    torch.testing.assert_close(y, reference.F.conv2d(corners, weight))
    upstream = torch.randn_like(y)
    grad = kernels.backward_weight(upstream, x, weight.shape, *arguments)
    expected = kernels.backward_weight(upstream, corners, weight.shape, None, None, POINTWISE, None, False)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", ["plain-wide", "masked", "columns"])
def test_tf32_is_as_accurate_as_its_factors(name):
    case = CASES[name]
    tensors = inputs(case)
    y, _ = kernels.forward(*tensors[:7], case.act, case.geometry, tensors[7], False, True)
    truth, plain = (expected(case, dtype, tensors)[1].detach() for dtype in (torch.float64, torch.float32))
    assert_as_accurate(y, plain, truth, slack=2.0**-10)


def test_empty_batch_has_no_gradient():
    case = CASES["empty-batch"]
    x, weight, in_mask, out_mask, *_ = inputs(case)
    upstream = torch.empty(reference.F.conv2d(x, weight, None, *case.geometry).shape, device=DEVICE)
    arguments = in_mask, out_mask, case.geometry, None, False
    assert not kernels.backward_weight(upstream, x, weight.shape, *arguments).any()
    grad_x, grad_mask = kernels.backward_input(upstream, x, weight, *arguments)
    assert grad_x.shape == x.shape and not grad_mask.any()


@pytest.mark.parametrize("name", ["plain", "columns", "masked", "depthwise"])
def test_results_do_not_vary(name):
    """Sums are added in a fixed order."""
    case = CASES[name]
    x, weight, in_mask, out_mask, *_, columns = inputs(case)
    arguments = in_mask, out_mask, case.geometry, columns, False
    runs = []
    for _ in range(2):
        raw, sums, squares = kernels.forward_stats(x, weight, *arguments)
        runs.append((raw, sums, squares, kernels.backward_weight(raw, x, weight.shape, *arguments)))
    assert all(map(torch.equal, *runs))


def test_refusals_name_what_is_possible():
    x, weight = torch.randn(1, 2, 3, 3, device=DEVICE), torch.randn(2, 2, 1, 1, device=DEVICE)
    assert kernels.refusal(x, weight, POINTWISE, None) is None
    assert "fp32, fp16, bf16" in kernels.refusal(x.double(), weight.double(), POINTWISE, None)
    assert "float16" in kernels.refusal(x.half(), weight, POINTWISE, None)
    wide = torch.zeros((), device=DEVICE).expand(2**10, 2**17, 4, 4)
    assert "2^31 weights" in kernels.refusal(wide[:1], wide, POINTWISE, None)

"""The Triton convolution against float64, in the interpreter where there is no CUDA device."""

import math
from typing import NamedTuple

import pytest
import torch
from tolerance import assert_as_accurate

from hwprune.ops import reference

pytest.importorskip("triton")
from hwprune.kernels import masked_conv as kernels

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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

"""The plain-torch backend of masked_conv2d: dense convolutions, masked before and after.

A backend supplies these functions, over plain tensors; `hwprune.ops.masked_conv` checks their arguments and gives them
their gradients. Masks, scale and shift are [C] in float32 (float64 for float64); `geometry` is stride, padding and
dilation, two numbers each, and groups. A channel whose mask is exactly 0 is inactive: nothing of it counts, and its
part of every result but the residual's gradient is 0.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hwprune.ops import reference

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]


def layout(x: Tensor) -> torch.memory_format:
    """The memory format of everything that is computed from x: NHWC on a device, and that of x on the CPU."""
    last = x.is_cuda or (x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
    return torch.channels_last if last else torch.contiguous_format


def output_shape(x: Tensor, weight_shape: Sequence[int], geometry: Geometry) -> tuple[int, int, int, int]:
    """[N, Cout, Ho, Wo]"""
    stride, padding, dilation, _ = geometry
    _, _, height, width = x.shape
    height = (height + 2 * padding[0] - dilation[0] * (weight_shape[2] - 1) - 1) // stride[0] + 1
    width = (width + 2 * padding[1] - dilation[1] * (weight_shape[3] - 1) - 1) // stride[1] + 1
    return x.shape[0], weight_shape[0], height, width


def refusal(x: Tensor, weight: Tensor, geometry: Geometry, columns: Tensor | None) -> str | None:
    """Why this backend cannot take these tensors; None: it can."""
    return None


def forward(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin / groups, kH, kW]
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,  # [N, Cout, Ho, Wo]
    act: str,
    geometry: Geometry,
    columns: Tensor | None,
    save_raw: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor | None]:
    """The operator's result and, if asked for, the convolution before its epilogue. [N, Cout, Ho, Wo] each."""
    raw = _convolve(x, weight, in_mask, out_mask, geometry, columns, allow_tf32)
    return reference.epilogue(raw, out_mask, scale, shift, residual, act), raw if save_raw else None


def forward_stats(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    geometry: Geometry,
    columns: Tensor | None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution [N, Cout, Ho, Wo], its sums and sums of squares [Cout]."""
    return reference.channel_sums(_convolve(x, weight, in_mask, None, geometry, columns, allow_tf32), out_mask)


def backward_epilogue(
    grad_y: Tensor,
    raw: Tensor,
    out_mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of raw, residual, out_mask, scale and shift; None for what was None."""
    inner = wide = reference.widened(raw)
    if scale is not None:
        inner = inner * scale.view(1, -1, 1, 1)
    if shift is not None:
        inner = inner + shift.view(1, -1, 1, 1)
    z = reference.apply_mask(inner, out_mask)
    z = z if residual is None else z + residual
    grad = through_activation(act, reference.widened(grad_y), z)
    grad_residual = None if residual is None else grad.to(residual.dtype)
    per_output = grad if scale is None else grad * scale.view(1, -1, 1, 1)
    grad_raw = reference.apply_mask(per_output, out_mask).to(raw.dtype)
    active = torch.ones((), dtype=torch.bool, device=raw.device) if out_mask is None else out_mask != 0

    def summed(values: Tensor, factor: Tensor | None) -> Tensor:
        total = values.sum((0, 2, 3))
        return torch.where(active, total if factor is None else total * factor, 0)

    return (
        grad_raw,
        grad_residual,
        None if out_mask is None else summed(grad * inner, None),
        None if scale is None else summed(grad * wide, out_mask),
        None if shift is None else summed(grad, out_mask),
    )


def backward_input(
    grad_raw: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    geometry: Geometry,
    columns: Tensor | None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of in_mask; None without one."""
    weight = reference.columns_only(_active_rows(weight, out_mask), columns)
    grad = convolution_backward(grad_raw, x, weight, geometry, allow_tf32, wants=0)
    if in_mask is None:
        return grad, None
    dots = (reference.widened(grad) * x).sum((0, 2, 3))
    return reference.apply_mask(grad, in_mask), torch.where(in_mask != 0, dots, 0).to(in_mask.dtype)


def backward_weight(
    grad_raw: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    geometry: Geometry,
    columns: Tensor | None,
    allow_tf32: bool,
) -> Tensor:
    """Gradient of the weight."""
    x = reference.apply_mask(x, in_mask)
    grad = convolution_backward(grad_raw, x, x.new_empty(tuple(weight_shape)), geometry, allow_tf32, wants=1)
    return reference.columns_only(_active_rows(grad, out_mask), columns)


def bn_act(
    x: Tensor,
    sums: Tensor,
    squares: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(mask ⊙ bn(x) + residual), mean and variance."""
    return reference.masked_bn_act(x, sums, squares, weight, bias, mask, residual, act, eps)


def bn_act_backward_through(
    backward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]],
    grad_y: Tensor,
    x: Tensor,
    sums: Tensor,
    squares: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, sums, squares, weight, bias, mask and residual, from a backend's backward_epilogue."""
    count = x.numel() // x.shape[1]
    scale, shift, _, _ = reference.bn_affine(sums, squares, weight, bias, count, eps)
    grad_x, grad_residual, grad_mask, grad_scale, grad_shift = backward(grad_y, x, mask, scale, shift, residual, act)
    assert grad_scale is not None and grad_shift is not None
    affine = reference.bn_affine_backward(grad_scale, grad_shift, sums, squares, weight, count, eps)
    return grad_x, *affine, grad_mask, grad_residual


bn_act_backward = partial(bn_act_backward_through, backward_epilogue)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, allow_tf32: bool, wants: int
) -> Tensor:
    """The gradient of x (wants=0) or of the weight (1), of which only the shape is looked at then."""
    stride, padding, dilation, groups = geometry
    mask = [wants == 0, wants == 1, False]
    with _precision(x, allow_tf32):
        grads: list[Tensor] = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
    return grads[wants]


def _convolve(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    geometry: Geometry,
    columns: Tensor | None,
    allow_tf32: bool,
) -> Tensor:
    weight = reference.columns_only(weight, columns)
    with _precision(x, allow_tf32):
        raw = F.conv2d(reference.apply_mask(x, in_mask), weight, None, *geometry)
    return raw if out_mask is None else torch.where((out_mask != 0).view(1, -1, 1, 1), raw, 0)


def _active_rows(weight: Tensor, out_mask: Tensor | None) -> Tensor:
    return weight if out_mask is None else torch.where((out_mask != 0).view(-1, 1, 1, 1), weight, 0)


def _precision(x: Tensor, allow_tf32: bool) -> AbstractContextManager[object]:
    if not x.is_cuda:
        return nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, allow_tf32=allow_tf32)


def through_activation(act: str, grad: Tensor, z: Tensor) -> Tensor:
    """The gradient of z from that of act(z)."""
    if act == "relu":
        return torch.where(z > 0, grad, 0)
    if act == "relu6":
        return torch.where((z > 0) & (z < 6), grad, 0)
    if act in ("silu", "gelu"):
        backward = torch.ops.aten.silu_backward if act == "silu" else torch.ops.aten.gelu_backward
        grad = backward(grad, z)
    return grad

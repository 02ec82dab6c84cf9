"""Convolution that computes only the channels, or the weight columns, that masks leave active."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hwprune.errors import InvalidInput
from hwprune.ops import _native, reference
from hwprune.ops._reference_conv import Geometry, layout, output_shape

_MODULES = {
    "reference": "hwprune.ops._reference_conv",
    "cpp": "hwprune.ops._cpp_conv",
    "triton": "hwprune.kernels.masked_conv",
    "cuda": "hwprune.ops._cuda_conv",
}
_POINTWISE: Geometry = (1, 1), (0, 0), (1, 1), 1
# Activations whose gradients do without their inputs.
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_, "relu6": partial(F.relu6, inplace=True)}
# Behind what was measured to be the fastest for such a call (_native.fastest).
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}
# With groups and fewer multiplications (counted at stride 1), picking channels costs more than it saves: plain torch's
# time over ours, half of the channels masked on both sides, groups of 16 and 32 channels, one thread of an AMD EPYC, is
# 1.1 at 58 million and 1.6 at 116 where all groups keep the same number, 0.6 and 0.9 where they do not. Without groups
# it is 1.1 and more at 2 million. benchmarks/bench_ops.py times shapes without groups.
_FEW_GROUPED_PRODUCTS = 100_000_000


def masked_conv2d(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin / groups, kH, kW]
    *,
    in_mask: Tensor | None = None,  # [Cin]
    out_mask: Tensor | None = None,  # [Cout]
    scale: Tensor | None = None,  # [Cout]
    shift: Tensor | None = None,  # [Cout]
    residual: Tensor | None = None,  # [N, Cout, Ho, Wo]
    act: str = "none",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    columns: Tensor | None = None,  # [K]
    stats: bool = False,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """act(out_mask ⊙ (scale ⊙ conv2d(in_mask ⊙ x, weight) + shift) + residual), skipping what is masked.

    Masks are real in [0, 1]. A channel whose mask is exactly 0 is not read, its output is written as zeros or as the
    residual alone, and no gradient flows through it, into its mask included. Sums are taken in float32 at least.
    Results are channels_last on a CUDA device, and in the memory format of x on the CPU. Under autocast x, weight and
    residual are taken in its dtype, as by torch's own convolutions.

    Args:
        columns: [K] int64, strictly increasing; the weight columns that are computed, numbered
            (row * kW + column) * Cin + channel. Instead of an input mask, with groups=1.
        act: "none", "relu", "relu6", "silu" or "gelu" (the exact one).
        stats: return what BatchNorm's training needs instead: the raw convolution (out_mask decides which channels are
            skipped, and does not scale), and its sum and sum of squares per channel. Excludes the epilogue's arguments.
        allow_tf32: let a CUDA device round float32 operands to tf32.
        backend: "auto", "reference", "cpp" (float32 on the CPU), "triton" or "cuda".

    Returns:
        [N, Cout, Ho, Wo]; with stats the raw convolution [N, Cout, Ho, Wo], sums [Cout] and squares [Cout].

    Raises:
        InvalidInput: shapes or dtypes do not fit, or arguments exclude one another.
        BackendUnavailable: the backend asked for is absent or does not take these tensors.
    """
    if x.dim() != 4 or weight.dim() != 4 or groups < 1 or x.shape[1] != weight.shape[1] * groups:
        raise InvalidInput(
            f"x {list(x.shape)} and weight {list(weight.shape)} with groups={groups} do not fit: "
            "x must be [N, Cin, H, W] and weight [Cout, Cin / groups, kH, kW]"
        )
    if (cast := _autocast_dtype(x.device)) is not None:
        x, weight = _cast(x, cast), _cast(weight, cast)
        residual = None if residual is None else _cast(residual, cast)
    if not x.is_floating_point() or weight.dtype != x.dtype or weight.device != x.device:
        raise InvalidInput(
            f"weight is {weight.dtype} on {weight.device}; it must be floating and like x, {x.dtype} on {x.device}"
        )
    ins, outs = x.shape[1], weight.shape[0]
    _check_channels(x, (("in_mask", in_mask, ins), ("out_mask", out_mask, outs)))
    _check_channels(x, (("scale", scale, outs), ("shift", shift, outs)))
    _check_act(act)
    if columns is not None:
        _check_columns(columns, x.device, weight[0].numel(), in_mask is not None or groups != 1)
        columns = columns.contiguous()  # backends read on from its address
    geometry = _pair(stride), _pair(padding), _pair(dilation), groups
    shape = output_shape(x, weight.shape, geometry)
    if min(shape[2:]) < 1:
        raise InvalidInput(f"the output of x {list(x.shape)} and weight {list(weight.shape)} would be {list(shape)}")
    _check_residual(residual, shape, x)
    in_mask, out_mask, scale, shift = (_accurate(values, x) for values in (in_mask, out_mask, scale, shift))
    if stats:
        if act != "none" or any(extra is not None for extra in (scale, shift, residual)):
            raise InvalidInput("stats=True excludes scale, shift, residual and act: masked_bn_act takes them")
        statistics: tuple[Tensor, Tensor, Tensor] = _stats(
            x, weight, in_mask, out_mask, columns, *geometry, allow_tf32, backend
        )
        return statistics
    tensors = x, weight, in_mask, out_mask, scale, shift, residual
    nothing_masked = columns is None and in_mask is None and out_mask is None
    recorded = _native.recorded(*tensors)
    if nothing_masked and _is_plain(x, weight, groups, backend, recorded):
        return _plain(x, weight, scale, shift, residual, act, geometry)
    if not recorded:
        return _forward(tensors, columns, act, geometry, False, allow_tf32, backend)[0]
    saved = act != "none" or scale is not None or out_mask is not None  # else no gradient needs the raw convolution
    save_raw = saved and _native.learning(*tensors)
    y: Tensor = _conv(*tensors, columns, act, *geometry, save_raw, allow_tf32, backend)[0]
    return y


def masked_bn_act(
    x: Tensor,  # [N, C, H, W]
    sums: Tensor | None,  # [C]
    squares: Tensor | None,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    *,
    mask: Tensor | None = None,  # [C]
    residual: Tensor | None = None,  # [N, C, H, W]
    act: str = "none",
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm in training from the statistics of masked_conv2d(stats=True): act(mask ⊙ bn(x) + residual).

    Args:
        x, sums, squares: what masked_conv2d(..., stats=True) returned; gradients flow into all three. Sums and squares
            of None are taken from x: its gradient counts them, and mean and variance give none.
        weight, bias: [C], BatchNorm's.
        mask: [C] in [0, 1]; exact zeros are skipped.
        act, backend: see masked_conv2d. Under autocast the residual is taken in the dtype of x.

    Returns:
        [N, C, H, W], the batch's mean [C] and its biased variance [C].

    Raises:
        InvalidInput: shapes or dtypes do not fit, or the batch holds no element.
        BackendUnavailable: the backend asked for is absent or does not take these tensors.
    """
    if x.dim() != 4 or x.numel() == 0 or not x.is_floating_point():
        raise InvalidInput(f"x {list(x.shape)} must be floating [N, C, H, W] with at least one element per channel")
    named = ("sums", sums), ("squares", squares), ("weight", weight), ("bias", bias), ("mask", mask)
    _check_channels(x, [(name, given, x.shape[1]) for name, given in named])
    _check_act(act)
    if residual is not None and _autocast_dtype(x.device) is not None:
        residual = _cast(residual, x.dtype)
    _check_residual(residual, x.shape, x)
    weight, bias = weight.to(_wide(x)), bias.to(_wide(x))
    own = sums is None and squares is None
    if own:
        functions = None if torch.compiler.is_compiling() else _pointwise_backend("masked_bn_act", x, mask, backend)
        if hasattr(functions, "batch_norm_act"):  # the statistics, too
            whole: tuple[Tensor, Tensor, Tensor] = _BatchNorm.apply(  # type: ignore[no-untyped-call]
                x, weight, bias, _accurate(mask, x), residual, act, eps, functions
            )
            return whole
        _, sums, squares = reference.channel_sums(x, None)
    if sums is None or squares is None:
        raise InvalidInput("give both sums and squares, or neither of them")
    sums, squares = sums.to(_wide(x)), squares.to(_wide(x))
    y: Tensor = _bn(x, sums, squares, weight, bias, _accurate(mask, x), residual, act, eps, backend)
    mean = sums / (x.numel() // x.shape[1])
    var = (squares / (x.numel() // x.shape[1]) - mean.square()).clamp_min(0)
    return (y, mean.detach(), var.detach()) if own else (y, mean, var)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast has convolutions on this device computed in, or None where it is off."""
    if device.type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device.type):
        return None
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as autocast hands it on: float64, and what does not float, it leaves alone."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _accurate(values: Tensor | None, x: Tensor) -> Tensor | None:
    return None if values is None else values.to(_wide(x))


def _check_act(act: str) -> None:
    if act not in reference.ACTIVATIONS:
        raise InvalidInput(f"act={act!r} is unknown; there are {', '.join(reference.ACTIVATIONS)}")


def _check_channels(x: Tensor, given: Iterable[tuple[str, Tensor | None, int]]) -> None:
    """Of name, tensor and channels."""
    for name, tensor, channels in given:
        if tensor is None:
            continue
        if tensor.dim() != 1 or len(tensor) != channels:
            raise InvalidInput(f"{name} has shape {list(tensor.shape)}; it must be [{channels}], one per channel")
        if tensor.device != x.device or not tensor.is_floating_point():
            raise InvalidInput(f"{name} is {tensor.dtype} on {tensor.device}; it must be floating, on {x.device}")


def _check_residual(residual: Tensor | None, shape: Sequence[int], x: Tensor) -> None:
    if residual is None:
        return
    if tuple(residual.shape) != tuple(shape) or residual.dtype != x.dtype or residual.device != x.device:
        raise InvalidInput(
            f"residual is {residual.dtype} {list(residual.shape)} on {residual.device}; "
            f"it must be {x.dtype} {list(shape)} on {x.device}"
        )


def _check_columns(columns: Tensor, device: torch.device, count: int, excluded: bool) -> None:
    if excluded:
        raise InvalidInput("columns replace an input mask and need groups=1: give one or the other")
    if columns.dim() != 1 or columns.dtype != torch.int64 or columns.device != device:
        raise InvalidInput(
            f"columns is {columns.dtype} {list(columns.shape)} on {columns.device}; it must be int64 [K] on {device}"
        )
    if columns.device.type != "cpu" or columns.numel() == 0 or torch.compiler.is_compiling():
        return  # looking at the values would wait for the device
    if int(columns[0]) < 0 or int(columns[-1]) >= count or not bool((columns.diff() > 0).all()):
        raise InvalidInput(f"columns must increase strictly within 0 to {count - 1}, the columns of the weight")


def _is_plain(x: Tensor, weight: Tensor, groups: int, backend: str, recorded: bool) -> bool:
    """Whether a convolution with nothing masked is left to torch: on a device where that was faster, and on the CPU.

    There, without groups and in NHWC, ours takes 0.5 to 1.05 of its time, if nothing is recorded; in NCHW 0.8 to 1.4. A
    compiler sees one operator on a device, whose backend is chosen when it runs.
    """
    if backend != "auto" or os.environ.get("HWPRUNE_BACKEND", "auto") != "auto":
        return False
    if x.device.type == "cpu":
        ours = groups == 1 and layout(x) == torch.channels_last and not recorded
        return x.dtype == torch.float64 or (x.dtype == torch.float32 and not (ours and _native.missing("cpp") is None))
    if torch.compiler.is_compiling() or x.dtype not in (torch.float16, torch.bfloat16):
        return False  # torch has switches of its own for tf32
    return _native.fastest("masked_conv2d", x, _kind(x, weight, groups, None), False) == "torch"


def _plain(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    geometry: Geometry,
) -> Tensor:
    """Nothing is masked: torch's convolution, with scale and shift folded into its weight and bias."""
    if scale is not None:
        weight = (weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
    y = F.conv2d(x, weight, None if shift is None else shift.to(x.dtype), *geometry)
    y = y if residual is None else y + residual
    y = _IN_PLACE[act](y) if act in _IN_PLACE else reference.ACTIVATIONS[act](y)
    return y.contiguous(memory_format=layout(x))


def _kind(x: Tensor, weight: Tensor, groups: int, columns: Tensor | None) -> str:
    """The kind of a convolution, of which each has its own fastest backend: "columns", "3x3", "depthwise", ..."""
    if columns is not None:
        return "columns"
    if groups > 1:
        return "depthwise" if groups == x.shape[1] else "grouped"
    return "x".join(map(str, weight.shape[2:]))


def _preference(op: str, x: Tensor, kind: str, masked: bool) -> tuple[str, ...]:
    """The backends in the order in which they are asked."""
    found: tuple[str, ...] = _PREFERENCE.get(x.device.type, ("reference",))
    measured = _native.fastest(op, x, kind, masked)
    return (measured, *found) if measured in _MODULES else found


def _backend(
    op: str,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    geometry: Geometry,
    columns: Tensor | None,
    requested: str,
) -> Any:
    """The module of functions that runs the convolution `op` on these tensors."""
    preference = _preference(op, x, _kind(x, weight, geometry[3], columns), in_mask is not None or out_mask is not None)
    products = x.shape[0] * x.shape[2] * x.shape[3] * weight.numel()
    if x.device.type == "cpu" and geometry[3] > 1 and products < _FEW_GROUPED_PRODUCTS:
        preference = ("reference",)
    chosen = _native.choose(op, requested, lambda name: _refusal(name, x, weight, geometry, columns), preference)
    return import_module(_MODULES[chosen])


def _pointwise_backend(op: str, x: Tensor, mask: Tensor | None, requested: str) -> Any:
    """The module of functions that runs what follows a convolution, `op`, on its result."""
    weight = x.new_empty(x.shape[1], 1, 1, 1)  # backends ask for one
    preference = _preference("masked_bn_act", x, "any", mask is not None)
    chosen = _native.choose(op, requested, lambda name: _refusal(name, x, weight, _POINTWISE, None), preference)
    return import_module(_MODULES[chosen])


def _refusal(backend: str, x: Tensor, weight: Tensor, geometry: Geometry, columns: Tensor | None) -> str | None:
    if _native.away(backend, x.device):
        return f"it runs on {_native.HOMES[backend]}, and x is on {x.device}"
    if backend != "reference" and (cause := _native.missing(backend)) is not None:
        return cause
    refusal: str | None = import_module(_MODULES[backend]).refusal(x, weight, geometry, columns)
    return refusal


def _or_empty(tensor: Tensor | None, x: Tensor) -> Tensor:
    """What an operator returns for None, which torch.library has no place for."""
    return x.new_empty(0) if tensor is None else tensor


def _empty(shape: Sequence[int], x: Tensor, form: torch.memory_format) -> Tensor:
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=form)


def _forward(
    tensors: Sequence[Tensor | None],  # x, weight, in_mask, out_mask, scale, shift, residual
    columns: Tensor | None,
    act: str,
    geometry: Geometry,
    save_raw: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    x, weight, in_mask, out_mask = tensors[:4]
    assert x is not None and weight is not None
    functions = _backend("masked_conv2d", x, weight, in_mask, out_mask, geometry, columns, backend)
    y, raw = functions.forward(*tensors, act, geometry, columns, save_raw, allow_tf32)
    form = layout(x)
    return y.contiguous(memory_format=form), None if raw is None else raw.contiguous(memory_format=form)


@torch.library.custom_op("hwprune::masked_conv2d", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    columns: Tensor | None,
    act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    save_raw: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = x, weight, in_mask, out_mask, scale, shift, residual
    geometry = stride, padding, dilation, groups
    y, raw = _forward(tensors, columns, act, geometry, save_raw, allow_tf32, backend)
    return y, _or_empty(raw, x)


@_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    columns: Tensor | None,
    act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    save_raw: bool,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = output_shape(x, weight.shape, (stride, padding, dilation, groups))
    form = layout(x)
    return _empty(shape, x, form), _empty(shape, x, form) if save_raw else x.new_empty(0)


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, in_mask, out_mask, scale, shift, residual, columns, act, *geometry, _, allow_tf32, backend = inputs
    ctx.set_materialize_grads(False)
    saved = residual if act != "none" else None
    ctx.save_for_backward(x, weight, in_mask, out_mask, scale, shift, saved, columns, output[1])
    ctx.act, ctx.geometry, ctx.allow_tf32, ctx.backend = act, geometry, allow_tf32, backend


def _conv_backward(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 16
    x, weight, in_mask, out_mask, scale, shift, residual, columns, raw = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_raw, grad_residual = grad_y, grad_y
    grad_out_mask = grad_scale = grad_shift = None
    if ctx.act != "none" or scale is not None or out_mask is not None:
        grad_raw, *rest = _epilogue_backward(grad_y, raw, out_mask, scale, shift, residual, ctx.act, ctx.backend)
        grad_residual = grad_y if ctx.act == "none" else grad_raw if out_mask is None and scale is None else rest[0]
        grad_out_mask, grad_scale, grad_shift = rest[1:]
    elif needs[5]:
        grad_shift = grad_y.sum((0, 2, 3), dtype=_wide(x))
    how = (*ctx.geometry, ctx.allow_tf32, ctx.backend)
    grad_x = grad_in_mask = grad_weight = None
    if needs[0] or needs[2]:
        grad_x, grad_in_mask = _input_backward(grad_raw, x, weight, in_mask, out_mask, columns, *how)
    if needs[1]:
        grad_weight = _weight_backward(grad_raw, x, weight.shape, in_mask, out_mask, columns, *how)
    grads = (grad_x, grad_weight, grad_in_mask, grad_out_mask, grad_scale, grad_shift, grad_residual)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=False)), *(None,) * 9)


_conv.register_autograd(_conv_backward, setup_context=_save_conv)


@torch.library.custom_op("hwprune::masked_conv2d_stats", mutates_args=())
def _stats(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    columns: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = stride, padding, dilation, groups
    functions = _backend("masked_conv2d", x, weight, in_mask, out_mask, geometry, columns, backend)
    raw, sums, squares = functions.forward_stats(x, weight, in_mask, out_mask, geometry, columns, allow_tf32)
    return raw.contiguous(memory_format=layout(x)), sums, squares


@_stats.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    columns: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = output_shape(x, weight.shape, (stride, padding, dilation, groups))
    sums = torch.empty(weight.shape[0], dtype=_wide(x), device=x.device)
    return _empty(shape, x, layout(x)), sums, torch.empty_like(sums)


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, in_mask, out_mask, columns, *how = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, in_mask, out_mask, columns, output[0])
    ctx.how = how


def _stats_backward(
    ctx: Any, grad_raw: Tensor | None, grad_sums: Tensor | None, grad_squares: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, in_mask, out_mask, columns, raw = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad = torch.zeros_like(raw) if grad_raw is None else grad_raw
    if grad_squares is not None:
        grad = grad + raw * (2 * grad_squares).view(1, -1, 1, 1)
    if grad_sums is not None:
        grad = grad + grad_sums.view(1, -1, 1, 1)
    grad = reference.apply_mask(grad, None if out_mask is None else (out_mask != 0).to(_wide(x))).to(x.dtype)
    grad_x = grad_in_mask = grad_weight = None
    if needs[0] or needs[2]:
        grad_x, grad_in_mask = _input_backward(grad, x, weight, in_mask, out_mask, columns, *ctx.how)
    if needs[1]:
        grad_weight = _weight_backward(grad, x, weight.shape, in_mask, out_mask, columns, *ctx.how)
    return grad_x, grad_weight, grad_in_mask if needs[2] else None, *(None,) * 8


_stats.register_autograd(_stats_backward, setup_context=_save_stats)


def _has_no_own_gradient(act: str, out_mask: Tensor | None, scale: Tensor | None) -> bool:
    """Whether the residual's gradient is that of y, or of the raw convolution: operators must not return it twice."""
    return act == "none" or (out_mask is None and scale is None)


@torch.library.custom_op("hwprune::masked_conv2d_epilogue_backward", mutates_args=())
def _epilogue_backward(
    grad_y: Tensor,
    raw: Tensor,
    out_mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    functions = _pointwise_backend("masked_conv2d", raw, out_mask, backend)
    grad_raw, grad_residual, *per_channel = functions.backward_epilogue(
        grad_y, raw, out_mask, scale, shift, residual, act
    )
    form = layout(raw)
    if grad_residual is None or _has_no_own_gradient(act, out_mask, scale):
        grad_residual = raw.new_empty(0)
    else:
        grad_residual = grad_residual.contiguous(memory_format=form)
    grads = [_or_empty(grad, raw) for grad in per_channel]
    return grad_raw.contiguous(memory_format=form), grad_residual, grads[0], grads[1], grads[2]


@_epilogue_backward.register_fake
def _(
    grad_y: Tensor,
    raw: Tensor,
    out_mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    form = layout(raw)
    none = residual is None or _has_no_own_gradient(act, out_mask, scale)
    grad_residual = raw.new_empty(0) if none else _empty(raw.shape, raw, form)
    grads = [raw.new_empty(0) if given is None else torch.empty_like(given) for given in (out_mask, scale, shift)]
    return _empty(raw.shape, raw, form), grad_residual, grads[0], grads[1], grads[2]


@torch.library.custom_op("hwprune::masked_conv2d_input_backward", mutates_args=())
def _input_backward(
    grad_raw: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    columns: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    geometry = stride, padding, dilation, groups
    functions = _backend("masked_conv2d_input_backward", x, weight, in_mask, out_mask, geometry, columns, backend)
    grad_x, grad_in_mask = functions.backward_input(
        grad_raw, x, weight, in_mask, out_mask, geometry, columns, allow_tf32
    )
    return grad_x.contiguous(memory_format=layout(x)), _or_empty(grad_in_mask, x)


@_input_backward.register_fake
def _(
    grad_raw: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    columns: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    allow_tf32: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty(x.shape, x, layout(x)), x.new_empty(0) if in_mask is None else torch.empty_like(in_mask)


@torch.library.custom_op("hwprune::masked_conv2d_weight_backward", mutates_args=())
def _weight_backward(
    grad_raw: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    columns: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    allow_tf32: bool,
    backend: str,
) -> Tensor:
    weight = x.new_empty(()).expand(list(weight_shape))
    geometry = stride, padding, dilation, groups
    functions = _backend("masked_conv2d_weight_backward", x, weight, in_mask, out_mask, geometry, columns, backend)
    grad: Tensor = functions.backward_weight(
        grad_raw, x, weight_shape, in_mask, out_mask, geometry, columns, allow_tf32
    )
    return grad.contiguous()


@_weight_backward.register_fake
def _(
    grad_raw: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    columns: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    allow_tf32: bool,
    backend: str,
) -> Tensor:
    return x.new_empty(list(weight_shape))


@torch.library.custom_op("hwprune::masked_bn_act", mutates_args=())
def _bn(
    x: Tensor,
    sums: Tensor,
    squares: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    act: str,
    eps: float,
    backend: str,
) -> Tensor:
    functions = _pointwise_backend("masked_bn_act", x, mask, backend)
    y: Tensor = functions.bn_act(x, sums, squares, weight, bias, mask, residual, act, eps)[0]
    return y.contiguous(memory_format=layout(x))


@_bn.register_fake
def _(
    x: Tensor,
    sums: Tensor,
    squares: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    act: str,
    eps: float,
    backend: str,
) -> Tensor:
    return _empty(x.shape, x, layout(x))


@torch.library.custom_op("hwprune::masked_bn_act_backward", mutates_args=())
def _bn_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    functions = _pointwise_backend("masked_bn_act", x, mask, backend)
    grad_x, *affine, grad_mask, grad_residual = functions.bn_act_backward(
        grad_y, x, sums, squares, weight, bias, mask, residual, act, eps
    )
    form = layout(x)
    if act == "none" or grad_residual is None:  # it would be grad_y itself
        grad_residual = x.new_empty(0)
    else:
        grad_residual = grad_residual.contiguous(memory_format=form)
    return grad_x.contiguous(memory_format=form), *affine, _or_empty(grad_mask, x), grad_residual


@_bn_backward.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    form = layout(x)
    grad_mask = x.new_empty(0) if mask is None else torch.empty_like(mask)
    grad_residual = x.new_empty(0) if act == "none" or residual is None else _empty(x.shape, x, form)
    per_channel = [torch.empty_like(given) for given in (sums, squares, weight, bias)]
    return (
        _empty(x.shape, x, form),
        per_channel[0],
        per_channel[1],
        per_channel[2],
        per_channel[3],
        grad_mask,
        grad_residual,
    )


def _save_bn(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, sums, squares, weight, bias, mask, residual, act, eps, backend = inputs
    ctx.save_for_backward(x, sums, squares, weight, bias, mask, residual if act != "none" else None)
    ctx.act, ctx.eps, ctx.backend = act, eps, backend


def _bn_gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    found = _bn_backward(grad_y, *ctx.saved_tensors, ctx.act, ctx.eps, ctx.backend)
    grads = (*found[:6], grad_y if ctx.act == "none" else found[6])
    needs = ctx.needs_input_grad
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=False)), None, None, None)


_bn.register_autograd(_bn_gradients, setup_context=_save_bn)


class _BatchNorm(torch.autograd.Function):
    """masked_bn_act with the statistics of x itself: y, mean and variance."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
        act: str,
        eps: float,
        functions: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = functions.batch_norm_act(x, weight, bias, mask, residual, act, eps)
        ctx.save_for_backward(x, mean, var, weight, bias, mask, residual if act != "none" else None)
        ctx.act, ctx.eps, ctx.functions = act, eps, functions
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *grads, grad_residual = ctx.functions.batch_norm_act_backward(grad_y, *ctx.saved_tensors, ctx.act, ctx.eps)
        found = *grads, grad_y if ctx.act == "none" else grad_residual
        needs = ctx.needs_input_grad
        return (*(grad if needed else None for grad, needed in zip(found, needs, strict=False)), None, None, None)

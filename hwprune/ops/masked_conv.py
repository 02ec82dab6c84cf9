"""Convolution that computes only the channels, or the weight columns, that masks leave active."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hwprune.errors import InvalidInput
from hwprune.ops import _native, reference


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """act(out_mask ⊙ (scale ⊙ conv2d(in_mask ⊙ x, weight) + shift) + residual), skipping what is masked.

    Masks are real in [0, 1]. A channel whose mask is exactly 0 is not read, its output is written as zeros or as the
    residual alone, and no gradient flows through it, into its mask included.

    Args:
        columns: [K] int64, strictly increasing; the weight columns that are computed, numbered
            (row * kW + column) * Cin + channel. Instead of an input mask, with groups=1.
        act: "none", "relu", "relu6", "silu" or "gelu".
        stats: return what BatchNorm's training needs instead: the raw convolution (out_mask decides which channels are
            skipped, and does not scale), and its sum and sum of squares per channel. Excludes the epilogue's arguments.
        backend: "auto" or "reference".

    Returns:
        [N, Cout, Ho, Wo]; with stats the raw convolution [N, Cout, Ho, Wo], sums [Cout] and squares [Cout].

    Raises:
        InvalidInput: shapes do not fit, or arguments exclude one another.
        BackendUnavailable: the backend asked for is absent.
    """
    if x.dim() != 4 or weight.dim() != 4 or groups < 1 or x.shape[1] != weight.shape[1] * groups:
        raise InvalidInput(
            f"x {list(x.shape)} and weight {list(weight.shape)} with groups={groups} do not fit: "
            "x must be [N, Cin, H, W] and weight [Cout, Cin / groups, kH, kW]"
        )
    _check_channels(x.shape[1], in_mask=in_mask)
    _check_channels(weight.shape[0], out_mask=out_mask, scale=scale, shift=shift)
    _check_act(act)
    if columns is not None:
        _check_columns(columns, weight[0].numel(), in_mask is not None or groups != 1)
    _native.choose("masked_conv2d", backend, {"reference": None}, ("reference",))
    geometry = _pair(stride), _pair(padding), _pair(dilation), groups, columns
    if stats:
        if act != "none" or any(extra is not None for extra in (scale, shift, residual)):
            raise InvalidInput("stats=True excludes scale, shift, residual and act: masked_bn_act takes them")
        raw = reference.masked_conv2d(x, weight, in_mask, None, None, None, None, "none", *geometry)
        return reference.channel_sums(raw, out_mask)
    return reference.masked_conv2d(x, weight, in_mask, out_mask, scale, shift, residual, act, *geometry)


def masked_bn_act(
    x: Tensor,  # [N, C, H, W]
    sums: Tensor,  # [C]
    squares: Tensor,  # [C]
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
        x, sums, squares: what masked_conv2d(..., stats=True) returned; gradients flow into all three.
        weight, bias: [C], BatchNorm's.
        mask: [C] in [0, 1]; exact zeros are skipped.
        backend: "auto" or "reference".

    Returns:
        [N, C, H, W], the batch's mean [C] and its biased variance [C].

    Raises:
        InvalidInput: shapes do not fit, or the batch holds no element.
        BackendUnavailable: the backend asked for is absent.
    """
    if x.dim() != 4 or x.numel() == 0:
        raise InvalidInput(f"x {list(x.shape)} must be [N, C, H, W] with at least one element per channel")
    _check_channels(x.shape[1], sums=sums, squares=squares, weight=weight, bias=bias, mask=mask)
    _check_act(act)
    _native.choose("masked_bn_act", backend, {"reference": None}, ("reference",))
    return reference.masked_bn_act(x, sums, squares, weight, bias, mask, residual, act, eps)


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value


def _check_act(act: str) -> None:
    if act not in reference.ACTIVATIONS:
        raise InvalidInput(f"act={act!r} is unknown; there are {', '.join(reference.ACTIVATIONS)}")


def _check_channels(channels: int, **per_channel: Tensor | None) -> None:
    for name, tensor in per_channel.items():
        if tensor is not None and tensor.shape != (channels,):
            raise InvalidInput(f"{name} has shape {list(tensor.shape)}; it must be [{channels}], one per channel")


def _check_columns(columns: Tensor, count: int, excluded: bool) -> None:
    if excluded:
        raise InvalidInput("columns replace an input mask and need groups=1: give one or the other")
    if columns.dim() != 1 or columns.dtype != torch.int64:
        raise InvalidInput(f"columns is {columns.dtype} {list(columns.shape)}; it must be int64 [K]")
    if columns.device.type != "cpu" or columns.numel() == 0 or torch.compiler.is_compiling():
        return  # looking at the values would wait for the device
    if int(columns[0]) < 0 or int(columns[-1]) >= count or not bool((columns.diff() > 0).all()):
        raise InvalidInput(f"columns must increase strictly within 0 to {count - 1}, the columns of the weight")

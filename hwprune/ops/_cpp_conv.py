"""The C++ backend of masked_conv2d: a product over what is active, without groups.

With groups, and for gradients of strided or column-pruned convolutions, active channels are picked, torch multiplies
what is left, and one pass ends it. The functions are those of `hwprune.ops._reference_conv`. "Compact" tensors hold the
active channels only.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hwprune.ops import _native, reference
from hwprune.ops._reference_conv import (
    Geometry,
    bn_act_backward_through,
    convolution_backward,
    layout,
    output_shape,
    through_activation,
)

_CLAMPS = {"none": (-torch.inf, torch.inf), "relu": (0.0, torch.inf), "relu6": (0.0, 6.0)}
_LANES = 16  # floats in a register, at most; the processor may have fewer
_PACKED_FLOATS = 1 << 18  # of weight columns at a time: they are to stay in the second-level cache


def refusal(x: Tensor, weight: Tensor, geometry: Geometry, columns: Tensor | None) -> str | None:
    """Why this backend cannot take these tensors; None: it can."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"it takes float32 on cpu, and x is {x.dtype} on {x.device}, weight {weight.dtype}"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    geometry: Geometry,
    columns: Tensor | None,
    save_raw: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor | None]:
    shape, form = output_shape(x, weight.shape, geometry), layout(x)
    if geometry[3] == 1:
        y = torch.empty(shape, memory_format=form)
        raw = torch.empty_like(y) if save_raw else None
        _product(x, weight, in_mask, out_mask, geometry, columns, (scale, shift, residual, act), y, raw)
        return y, raw
    picks = _picks(in_mask, out_mask, weight.shape, geometry[3])
    outs = picks.outs
    if save_raw:
        compact = _convolve(x, weight, in_mask, out_mask, picks, None, None, geometry)
        a, b = _affine(x, shape[1], out_mask, scale, shift)
        return _finish(compact, outs, a, b, out_mask, residual, act, shape, form, keep_raw=True)
    factor, offset = _at(out_mask, scale, outs), None if shift is None else _at(out_mask, shift, outs)
    compact = _convolve(x, weight, in_mask, out_mask, picks, factor, offset, geometry)
    if residual is None:  # all activations leave zeros as they are
        compact = _activate_(compact, act)
        return (compact if outs is None else _scatter(compact, outs, None, None, shape, form)[0]), None
    ones, zeros = x.new_ones(shape[1]), x.new_zeros(shape[1])
    return _finish(compact, outs, ones, zeros, out_mask, residual, act, shape, form, keep_raw=False)


def forward_stats(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    geometry: Geometry,
    columns: Tensor | None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    form = layout(x)
    if geometry[3] == 1:
        raw = torch.empty(output_shape(x, weight.shape, geometry), memory_format=form)
        sums, squares = x.new_empty(len(weight)), x.new_empty(len(weight))
        _product(x, weight, in_mask, out_mask, geometry, columns, (None, None, None, "none"), None, raw, sums, squares)
        return raw, sums, squares
    picks = _picks(in_mask, out_mask, weight.shape, geometry[3])
    outs = picks.outs
    compact = _convolve(x, weight, in_mask, out_mask, picks, None, None, geometry)
    sums, squares = x.new_empty(compact.shape[1]), x.new_empty(compact.shape[1])
    _native.module("cpp").channel_sums(compact.data_ptr(), _batch(compact, form), sums.data_ptr(), squares.data_ptr())
    if outs is None:
        return compact, sums, squares
    zeros = x.new_zeros(weight.shape[0])
    raw, _ = _scatter(compact, outs, None, None, output_shape(x, weight.shape, geometry), form)
    return raw, zeros.index_copy(0, outs, sums), zeros.index_copy(0, outs, squares)


def backward_epilogue(
    grad_y: Tensor,
    raw: Tensor,
    out_mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    channels, form = raw.shape[1], layout(raw)
    raw = raw.contiguous(memory_format=form)
    a, b = _affine(raw, channels, out_mask, scale, shift)
    given = residual
    if act not in _CLAMPS:  # their derivatives are torch's
        z, _ = _finish(raw, None, a, b, out_mask, residual, "none", raw.shape, form, keep_raw=False)
        grad_y, given, act = through_activation(act, grad_y, z), None, "none"
    grad_y = grad_y.contiguous(memory_format=form)
    given = _like(given, form)
    grad_raw = torch.empty_like(raw)
    grad_residual = None if residual is None else torch.empty_like(raw)
    total, total_raw = raw.new_empty(channels), raw.new_empty(channels)
    cpp = _native.module("cpp")
    args = cpp.Epilogue(*map(_address, (a, b, out_mask, given)), *_CLAMPS[act])
    outputs = map(_address, (grad_raw, grad_residual, total, total_raw))
    cpp.epilogue_backward(grad_y.data_ptr(), raw.data_ptr(), _batch(raw, form), args, *outputs)
    grad_mask = total_raw if scale is None else _weighted(total_raw, scale, out_mask)
    if shift is not None:
        grad_mask = grad_mask + _weighted(total, shift, out_mask)
    return (
        grad_raw,
        grad_residual,
        None if out_mask is None else grad_mask,
        None if scale is None else total_raw if out_mask is None else total_raw * out_mask,
        None if shift is None else total if out_mask is None else total * out_mask,
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
    form = layout(x)
    if geometry[3] == 1 and tuple(geometry[0]) == (1, 1) and columns is None:
        given, x = (tensor.contiguous(memory_format=form) for tensor in (grad_raw, x))
        weight, in_mask, out_mask = _in_one_piece(weight), _contiguous(in_mask), _contiguous(out_mask)
        grad, grad_mask = torch.empty_like(x), None if in_mask is None else torch.empty_like(in_mask)
        args = _product_args(x, weight, in_mask, out_mask, geometry, None, form)
        addresses = map(_address, (given, x, weight))
        _native.module("cpp").input_gradient(*addresses, args, grad.data_ptr(), _address(grad_mask))
        return grad, grad_mask
    picks, channels = _picks(in_mask, out_mask, weight.shape, geometry[3]), x.shape[1]
    ins = picks.ins
    compact = _gather(grad_raw, picks.outs, None, form)
    if columns is not None:
        return _columns_backward_input(compact, x, weight, picks.outs, geometry, columns), None
    shape = (x.shape[0], channels if ins is None else len(ins), *x.shape[2:])
    if 0 in shape or 0 in compact.shape:
        zeros = torch.zeros_like(x.contiguous(memory_format=form))
        return zeros, None if in_mask is None else torch.zeros_like(in_mask)
    like = torch.empty(shape, dtype=x.dtype, device="cpu").contiguous(memory_format=form)
    small = _picked_weight(weight, in_mask, out_mask, picks)
    grad = convolution_backward(compact, like, small, (*geometry[:3], picks.groups), False, wants=0)
    grad = grad.contiguous(memory_format=form)
    if in_mask is None and ins is None:
        return grad, None
    index = torch.arange(channels) if ins is None else ins
    factor = None if in_mask is None else in_mask.index_select(0, index)
    grad_x, dots = _scatter(grad, index, factor, None if in_mask is None else x, x.shape, form)
    if in_mask is None or dots is None:
        return grad_x, None
    return grad_x, torch.where(in_mask != 0, torch.zeros_like(in_mask).index_copy(0, index, dots), 0)


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
    form = layout(x)
    if geometry[3] == 1 and columns is None:
        grad = torch.empty(tuple(weight_shape))
        given, x = (tensor.contiguous(memory_format=form) for tensor in (grad_raw, x))
        in_mask, out_mask = _contiguous(in_mask), _contiguous(out_mask)
        args = _product_args(x, grad, in_mask, out_mask, geometry, None, form)
        _native.module("cpp").weight_gradient(given.data_ptr(), x.data_ptr(), args, grad.data_ptr())
        return grad
    picks = _picks(in_mask, out_mask, weight_shape, geometry[3])
    compact = _gather(grad_raw, picks.outs, None, form)
    if columns is not None:
        return _columns_backward_weight(compact, x, weight_shape, picks.outs, geometry, columns)
    small = _gather_inputs(x, in_mask, picks, form)
    if small.numel() == 0 or compact.numel() == 0:
        return x.new_zeros(tuple(weight_shape))
    shape = compact.shape[1], small.shape[1] // picks.groups, *weight_shape[2:]
    grad = convolution_backward(
        compact, small, x.new_empty(shape), (*geometry[:3], picks.groups), False, wants=1
    ).contiguous()
    if in_mask is not None:
        grad = _times_inputs(grad, in_mask, picks)
    if picks.ins is None and picks.outs is None:
        return grad
    offsets = _offsets(picks, weight_shape, last=False)
    return _spread_part(grad.flatten(1), weight_shape, picks.outs, offsets, picks.groups)


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
    form = layout(x)
    scale, shift, mean, var = reference.bn_affine(sums, squares, weight, bias, x.numel() // x.shape[1], eps)
    a, b = _affine(x, x.shape[1], mask, scale, shift)
    dense = x.contiguous(memory_format=form)
    y, _ = _finish(dense, None, a, b, mask, residual, act, x.shape, form, keep_raw=False)
    return y, mean, var


bn_act_backward = partial(bn_act_backward_through, backward_epilogue)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """bn_act with the statistics of x, in one call; no other backend has it, nor its gradient."""
    form = layout(x)
    x, residual = x.contiguous(memory_format=form), _like(residual, form)
    y, mean, var = torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    per_channel = tuple(map(_contiguous, (weight, bias, mask)))
    norm = _norm_args(per_channel, residual, act, eps)
    _native.module("cpp").norm_forward(x.data_ptr(), _batch(x, form), norm, *map(_address, (y, mean, var)))
    return (y if act in _CLAMPS else _activate_(y, act)), mean, var


def batch_norm_act_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, mask and residual."""
    form, has_residual = layout(x), residual is not None
    x, residual = x.contiguous(memory_format=form), _like(residual, form)
    if act not in _CLAMPS:  # their derivatives are torch's
        z, _, _ = batch_norm_act(x, weight, bias, mask, residual, "none", eps)
        grad_y, residual, act = through_activation(act, grad_y, z), None, "none"
    grad_y = grad_y.contiguous(memory_format=form)
    grads = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    grad_mask = None if mask is None else torch.empty_like(mask)
    grad_residual = torch.empty_like(x) if has_residual else None
    per_channel = tuple(map(_contiguous, (weight, bias, mask)))
    norm = _norm_args(per_channel, residual, act, eps)
    addresses = map(_address, (mean, var, *grads, grad_mask, grad_residual))
    _native.module("cpp").norm_backward(grad_y.data_ptr(), x.data_ptr(), _batch(x, form), norm, *addresses)
    return *grads, grad_mask, grad_residual


def _norm_args(per_channel: Sequence[Tensor | None], residual: Tensor | None, act: str, eps: float) -> Any:
    clamp = _CLAMPS.get(act, _CLAMPS["none"])
    return _native.module("cpp").Norm(*map(_address, (*per_channel, residual)), eps, *clamp)


def _like(residual: Tensor | None, form: torch.memory_format) -> Tensor | None:
    return None if residual is None else residual.contiguous(memory_format=form)


def _product(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    geometry: Geometry,
    columns: Tensor | None,
    after: tuple[Tensor | None, Tensor | None, Tensor | None, str],  # scale, shift, residual, act
    y: Tensor | None,  # like all outputs, overwritten, as are those that follow
    raw: Tensor | None,
    sums: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    """The convolution without groups in one call: what is listed is walked, and every block of pixels gets its end."""
    scale, shift, residual, act = after
    form = layout(x)
    x, weight = x.contiguous(memory_format=form), _in_one_piece(weight)
    residual = _like(residual, form)
    a, b = _at(out_mask, scale, None), None if shift is None else _at(out_mask, shift, None)
    a, b, in_mask, mask = map(_contiguous, (a, b, in_mask, out_mask))
    cpp = _native.module("cpp")
    args = _product_args(x, weight, in_mask, mask, geometry, columns, form)
    epilogue = cpp.Epilogue(*map(_address, (a, b, mask, residual)), *_CLAMPS.get(act, _CLAMPS["none"]))
    cpp.convolve(x.data_ptr(), weight.data_ptr(), args, epilogue, *map(_address, (y, raw, sums, squares)))
    if y is not None and act not in _CLAMPS:
        _activate_(y, act)


def _product_args(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    geometry: Geometry,
    columns: Tensor | None,
    form: torch.memory_format,
) -> Any:
    stride, padding, dilation, _ = geometry
    return _native.module("cpp").Convolution(
        len(x),
        x.shape[1:],
        output_shape(x, weight.shape, geometry)[1:],
        weight.shape[2:],
        stride,
        padding,
        dilation,
        *map(_address, (in_mask, out_mask, columns)),
        -1 if columns is None else len(columns),
        form == torch.channels_last,
        not weight.is_contiguous(),
        torch.get_num_threads(),
        _LANES,
    )


def _in_one_piece(weight: Tensor) -> Tensor:
    """The weight as it is where it is dense, with its channels in front of its kernel or behind it."""
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


class _Picks(NamedTuple):
    """The channels that are computed: the active ones and, where groups keep different counts, some that are not."""

    groups: int
    ins: Tensor | None  # [groups * n], increasing; None: all
    outs: Tensor | None  # [groups * m], increasing; None: all
    filled: bool  # masked channels are among them


def _picks(in_mask: Tensor | None, out_mask: Tensor | None, weight_shape: Sequence[int], groups: int) -> _Picks:
    """Groups without an active output are left out; the others take as many channels as the fullest of them needs.

    oneDNN convolves 4, 8, 16, 24... channels per group in a half of the time, or less, that it takes for the numbers
    in between: counts are rounded up to them.
    """
    ins, outs = _active(in_mask), _active(out_mask)
    if groups == 1 or (ins is None and outs is None):
        return _Picks(groups, ins, outs, False)
    sizes = weight_shape[1], weight_shape[0] // groups
    active = [
        torch.ones(groups, size, dtype=torch.bool) if mask is None else (mask != 0).view(groups, size)
        for mask, size in zip((in_mask, out_mask), sizes, strict=True)
    ]
    groups_left = active[1].any(1).nonzero()
    if len(groups_left) == 0:
        return _Picks(0, groups_left[:, 0], groups_left[:, 0], False)
    picked: list[Tensor | None] = []
    filled = False
    for here, size in zip(active, sizes, strict=True):
        here = here[groups_left[:, 0]]
        most = int(here.sum(1).max())
        count = min(size, 4 if most <= 4 else -(-most // 8) * 8)
        order = torch.sort(here.int(), dim=1, descending=True, stable=True).indices
        first = order[:, :count].sort(1).values
        filled = filled or not bool(here.gather(1, first).all())
        picked.append(None if first.numel() == groups * size else (groups_left * size + first).flatten())
    return _Picks(len(groups_left), picked[0], picked[1], filled)


def _convolve(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    picks: _Picks,
    a: Tensor | None,  # [len(outs)]
    b: Tensor | None,  # [len(outs)]
    geometry: Geometry,
) -> Tensor:
    """a ⊙ conv2d(in_mask ⊙ x, weight) + b in the picked output channels. [N, len(outs), Ho, Wo]

    a, b and in_mask are folded into the weight, so that they cost nothing.
    """
    form, outs, (stride, padding, dilation, _) = layout(x), picks.outs, geometry
    shape = (x.shape[0], weight.shape[0] if outs is None else len(outs), *output_shape(x, weight.shape, geometry)[2:])
    width = weight[0].numel() if picks.ins is None else len(picks.ins)
    if 0 in (*shape, *x.shape, width):
        y = torch.empty(shape, memory_format=form)
        return y.zero_() if b is None else y.copy_(b.view(1, -1, 1, 1))
    x = x.contiguous(memory_format=form)
    small = _folded_weight(weight, in_mask, out_mask, picks, a)
    x = _gather_inputs(x, in_mask, picks, form)
    return F.conv2d(x, small, b, stride, padding, dilation, picks.groups).contiguous(memory_format=form)


def _gather_inputs(x: Tensor, in_mask: Tensor | None, picks: _Picks, form: torch.memory_format) -> Tensor:
    """The picked channels of x, zeros in those that are masked."""
    if not picks.filled or in_mask is None:
        return _gather(x, picks.ins, None, form)
    index = torch.arange(x.shape[1]) if picks.ins is None else picks.ins
    return _gather(x, index, (in_mask.index_select(0, index) != 0).float(), form)


def _folded_weight(
    weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None, picks: _Picks, a: Tensor | None
) -> Tensor:
    """a ⊙ weight ⊙ in_mask between the picked channels, in one pass where some are left out. [len(outs), n, kH, kW]"""
    if not picks.filled and (picks.ins is not None or picks.outs is not None):
        return _part_of_weight(weight, picks, a, in_mask)
    small = _picked_weight(weight, in_mask, out_mask, picks)
    if in_mask is not None:
        small = _times_inputs(small, in_mask, picks)
    return small if a is None else _times(small, a.view(-1, 1, 1, 1))


def _picked_weight(weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None, picks: _Picks) -> Tensor:
    """The weight between the picked channels, zeros where one of them is masked. [len(outs), n, kH, kW]"""
    some = picks.ins is not None or picks.outs is not None
    small = _part_of_weight(weight, picks, None, None) if some else weight
    return _without_masked(small, in_mask, out_mask, picks) if picks.filled else small


def _part_of_weight(weight: Tensor, picks: _Picks, a: Tensor | None, in_mask: Tensor | None) -> Tensor:
    """a ⊙ weight ⊙ in_mask in the picked channels, none of which is masked. [len(outs), n, kH, kW]"""
    matrix, last = _flat(weight)
    height, width = weight.shape[2:]
    factors = None
    if in_mask is not None:
        per_input = _select(in_mask, picks.ins).view(picks.groups, -1)
        factors = per_input.repeat(1, height * width) if last else per_input.repeat_interleave(height * width, dim=1)
    part = _pick_part(matrix, picks.outs, _offsets(picks, weight.shape, last), picks.groups, a, factors)
    if last:
        return part.view(len(part), height, width, -1).permute(0, 3, 1, 2)
    return part.view(len(part), -1, height, width)


def _offsets(picks: _Picks, weight_shape: Sequence[int], last: bool) -> Tensor | None:
    """Where the picked inputs lie in a row of the flat weight, group by group; None: everywhere."""
    if picks.ins is None:
        return None
    channels, taps = weight_shape[1], torch.arange(weight_shape[2] * weight_shape[3])
    ins = (picks.ins % channels).view(picks.groups, -1)
    if last:
        return (taps.view(1, -1, 1) * channels + ins.unsqueeze(1)).flatten()
    return (ins.unsqueeze(2) * len(taps) + taps).flatten()


def _without_masked(weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None, picks: _Picks) -> Tensor:
    """The picked weight with zeros where a channel is masked, whatever it holds there."""
    groups = weight.reshape(picks.groups, -1, *weight.shape[1:])
    if out_mask is not None:
        outs = _select(out_mask, picks.outs).view(picks.groups, -1, 1, 1, 1)
        groups = torch.where(outs != 0, groups, 0)
    if in_mask is not None:
        ins = _select(in_mask, picks.ins).view(picks.groups, 1, -1, 1, 1)
        groups = torch.where(ins != 0, groups, 0)
    return groups.flatten(0, 1)


def _times_inputs(weight: Tensor, in_mask: Tensor, picks: _Picks) -> Tensor:
    """in_mask ⊙ the picked weight."""
    factors = _select(in_mask, picks.ins).view(picks.groups, 1, -1, 1, 1)
    return _times(weight.reshape(picks.groups, -1, *weight.shape[1:]), factors).flatten(0, 1)


def _columns_backward_weight(
    grad: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    outs: Tensor | None,
    geometry: Geometry,
    columns: Tensor,
) -> Tensor:
    total, form = grad.new_zeros(grad.shape[1], len(columns)), layout(x)
    if grad.numel() and len(columns):
        for part, packed in _packed(x.contiguous(memory_format=form), weight_shape, geometry, columns, form):
            if form == torch.channels_last:
                total.addmm_(grad[part].permute(0, 2, 3, 1).reshape(-1, len(total)).t(), packed)
            else:
                total.addmm_(grad[part].transpose(0, 1).reshape(len(total), -1), packed.t())
    return _spread_part(total, weight_shape, outs, _column_offsets(columns, weight_shape, last=False), 1)


def _columns_backward_input(
    grad: Tensor, x: Tensor, weight: Tensor, outs: Tensor | None, geometry: Geometry, columns: Tensor
) -> Tensor:
    form = layout(x)
    grad_x = torch.empty(x.shape, memory_format=form)
    if grad.numel() == 0 or len(columns) == 0:
        return grad_x.zero_()
    listed = _listed(weight, outs, columns)
    args = _columns_args(x, weight.shape, geometry, columns, form)
    for part in _parts(len(x), len(columns) * grad.shape[2] * grad.shape[3]):
        if form == torch.channels_last:
            packed = torch.mm(grad[part].permute(0, 2, 3, 1).reshape(-1, len(listed)), listed)
        else:
            packed = torch.mm(listed.t(), grad[part].transpose(0, 1).reshape(len(listed), -1))
        mine = grad_x[part]
        _native.module("cpp").unpack_columns(packed.data_ptr(), len(mine), args, mine.data_ptr())
    return grad_x


def _listed(weight: Tensor, outs: Tensor | None, columns: Tensor) -> Tensor:
    """The listed columns of the rows `outs`. [len(outs), K]"""
    matrix, last = _flat(weight)
    return _pick_part(matrix, outs, _column_offsets(columns, weight.shape, last), 1)


def _column_offsets(columns: Tensor, weight_shape: Sequence[int], last: bool) -> Tensor:
    """Where the listed columns lie in a row of the flat weight."""
    channels, taps = weight_shape[1], weight_shape[2] * weight_shape[3]
    return columns if last else columns % channels * taps + columns // channels


def _flat(weight: Tensor) -> tuple[Tensor, bool]:
    """The weight as a matrix of rows of memory, and whether its input channels lie side by side in them."""
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return (weight.permute(0, 2, 3, 1) if last else weight.contiguous()).view(len(weight), -1), last


def _part_args(width: int, rows: Tensor | None, columns: Tensor | None, shape: Sequence[int], groups: int) -> Any:
    arguments = _address(rows), shape[0], _address(columns), shape[1], groups, torch.get_num_threads()
    return _native.module("cpp").Part(width, *arguments)


def _pick_part(
    matrix: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    groups: int,
    row_factors: Tensor | None = None,  # one per row of the part
    column_factors: Tensor | None = None,  # [groups, columns of the part]
) -> Tensor:
    """The listed rows and, of those of each group, the columns listed for it, times what is given for each."""
    height, width = matrix.shape
    part = matrix.new_empty(
        height if rows is None else len(rows), width if columns is None else columns.numel() // groups
    )
    args = _part_args(width, rows, columns, part.shape, groups)
    factors = [None if given is None else given.contiguous() for given in (row_factors, column_factors)]
    _native.module("cpp").pick_part(matrix.data_ptr(), args, *map(_address, factors), part.data_ptr())
    return part


def _spread_part(
    part: Tensor, weight_shape: Sequence[int], rows: Tensor | None, columns: Tensor | None, groups: int
) -> Tensor:
    """The reverse, as a weight: zeros elsewhere."""
    weight = part.new_empty(tuple(weight_shape))
    args = _part_args(weight[0].numel(), rows, columns, part.shape, groups)
    _native.module("cpp").spread_part(part.data_ptr(), len(weight), args, weight.data_ptr())
    return weight


def _packed(
    x: Tensor, weight_shape: Sequence[int], geometry: Geometry, columns: Tensor, form: torch.memory_format
) -> Iterator[tuple[slice, Tensor]]:
    """Images, and their listed columns: [images * Ho * Wo, K] in NHWC, else transposed."""
    _, _, height, width = output_shape(x, weight_shape, geometry)
    args = _columns_args(x, weight_shape, geometry, columns, form)
    for part in _parts(len(x), len(columns) * height * width):
        rows = (part.stop - part.start) * height * width
        shape = (rows, len(columns)) if form == torch.channels_last else (len(columns), rows)
        packed = x.new_empty(shape)
        _native.module("cpp").pack_columns(x[part].data_ptr(), part.stop - part.start, args, packed.data_ptr())
        yield part, packed


def _parts(images: int, floats_per_image: int) -> Iterator[slice]:
    step = max(1, _PACKED_FLOATS // max(1, floats_per_image))
    for first in range(0, images, step):
        yield slice(first, min(images, first + step))


def _columns_args(
    x: Tensor, weight_shape: Sequence[int], geometry: Geometry, columns: Tensor, form: torch.memory_format
) -> Any:
    stride, padding, dilation, _ = geometry
    return _native.module("cpp").Columns(
        *x.shape[1:],
        *output_shape(x, weight_shape, geometry)[2:],
        weight_shape[3],
        *stride,
        *padding,
        *dilation,
        columns.data_ptr(),
        len(columns),
        form == torch.channels_last,
        torch.get_num_threads(),
    )


def _active(mask: Tensor | None) -> Tensor | None:
    """The channels that are not masked, where some are; None: all are active."""
    if mask is None:
        return None
    index = mask.nonzero()[:, 0]
    return None if len(index) == len(mask) else index


def _select(values: Tensor, index: Tensor | None) -> Tensor:
    """Values in the listed channels; in all of them without a list."""
    return values if index is None else values.index_select(0, index)


def _times(weight: Tensor, factors: Tensor) -> Tensor:
    """weight ⊙ factors, which are often all 1: a weight may be larger than what it is multiplied with."""
    return weight if bool((factors == 1).all()) else weight * factors


def _weighted(sums: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """sums ⊙ values, 0 in masked channels whatever values hold there."""
    return sums * values if mask is None else torch.where(mask != 0, sums * values, 0)


def _affine(
    x: Tensor, channels: int, mask: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """mask ⊙ scale and mask ⊙ shift, 0 in masked channels. [C] each"""
    a = x.new_ones(channels) if scale is None else scale.contiguous()
    b = x.new_zeros(channels) if shift is None else shift.contiguous()
    if mask is None:
        return a, b
    return torch.where(mask != 0, a * mask, 0), torch.where(mask != 0, b * mask, 0)


def _at(mask: Tensor | None, values: Tensor | None, index: Tensor | None) -> Tensor | None:
    """mask ⊙ values in the listed channels, 0 in masked ones; either may be absent, both: None."""
    mask, values = (None if given is None else _select(given, index) for given in (mask, values))
    if mask is None or values is None:
        return mask if values is None else values
    return torch.where(mask != 0, values * mask, 0)


def _activate_(x: Tensor, act: str) -> Tensor:
    if act == "gelu":
        torch.ops.aten.gelu_(x)
        return x
    if act == "silu":
        return F.silu(x, inplace=True)
    if act == "none":
        return x
    low, high = _CLAMPS[act]
    return x.clamp_(low, high)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _batch(x: Tensor, form: torch.memory_format) -> Any:
    pixels = x.shape[2] * x.shape[3]
    last = form == torch.channels_last
    return _native.module("cpp").Batch(x.shape[0], x.shape[1], pixels, last, torch.get_num_threads())


def _gather(x: Tensor, index: Tensor | None, factor: Tensor | None, form: torch.memory_format) -> Tensor:
    """factor ⊙ x in the listed channels; all of x without a list."""
    x = x.contiguous(memory_format=form)
    if index is None:
        return x
    out = torch.empty((x.shape[0], len(index), *x.shape[2:]), memory_format=form)
    arguments = map(_address, (index, factor))
    _native.module("cpp").gather_channels(x.data_ptr(), _batch(x, form), *arguments, len(index), out.data_ptr())
    return out


def _scatter(
    compact: Tensor,
    index: Tensor,
    factor: Tensor | None,
    x: Tensor | None,
    shape: Sequence[int],
    form: torch.memory_format,
) -> tuple[Tensor, Tensor | None]:
    """factor ⊙ compact in the listed channels of `shape`, zeros elsewhere; and the sums of compact ⊙ x."""
    out = torch.empty(tuple(shape), memory_format=form)
    x = None if x is None else x.contiguous(memory_format=form)
    dots = None if x is None else compact.new_empty(len(index))
    arguments = (*map(_address, (index, factor)), len(index), *map(_address, (x, out, dots)))
    _native.module("cpp").scatter_channels(compact.data_ptr(), _batch(out, form), *arguments)
    return out, dots


def _finish(
    compact: Tensor,
    outs: Tensor | None,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    act: str,
    shape: Sequence[int],
    form: torch.memory_format,
    keep_raw: bool,
) -> tuple[Tensor, Tensor | None]:
    """The epilogue over all channels, and the compact tensor spread over them if it is to be kept."""
    y = torch.empty(tuple(shape), memory_format=form)
    spread = torch.empty_like(y) if keep_raw and outs is not None else None
    residual = _like(residual, form)
    cpp = _native.module("cpp")
    args = cpp.Epilogue(*map(_address, (a, b, mask, residual)), *_CLAMPS.get(act, _CLAMPS["none"]))
    cpp.epilogue(
        compact.data_ptr(), _batch(y, form), _address(outs), compact.shape[1], args, y.data_ptr(), _address(spread)
    )
    if act not in _CLAMPS:
        _activate_(y, act)
    return y, (compact if spread is None else spread) if keep_raw else None

"""Masked convolution as an implicit GEMM over NHWC memory, forward and backward, and BatchNorm's second pass.

    y = act(out_mask ⊙ (scale ⊙ conv2d(in_mask ⊙ x, weight) + shift) + residual)

How zeros are skipped. A small kernel orders the channels of each group, active ones first, and counts them; the host
never learns the count. *Summed* channels are packed: one pass copies the active ones side by side (and applies the
input mask), after which the main loop reads contiguous 16-byte vectors, as it does where nothing is masked, and ends
at the count. *Produced* channels are walked in that order: blocks of active channels compute, and the blocks after the
last active channel skip the main loop and only write zeros, or the residual, so every output is written once and by one
launch. Depthwise convolutions are bound by memory, of which a random mask saves no sector: they read in dense order,
drop what is masked, and skip blocks of channels that are masked throughout.

Columns, given by a list, and dense convolutions of fewer than 16 channels per group, walk (kh, kw, c) element by
element instead. Their input's gradient is that of a pointwise convolution whose channels are the listed columns, which
a second kernel sums where those columns stand in the input; more than a third of the columns make more such products
than are worth writing down, and the gradient is computed densely.

Sums over pixels are written as one partial per program and added in a fixed order, so results do not vary from run to
run. Nothing is checked here: hwprune.ops does.
"""

import json
import os
from collections.abc import Callable
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair, int]  # stride, padding, dilation, groups

_POINTWISE: Geometry = (1, 1), (0, 0), (1, 1), 1
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_PAD = tl.constexpr(16)  # packed channels are zero-filled to a multiple of this: 16-byte vectors in every dtype


@triton.jit
def _activate(v, ACT: tl.constexpr):
    if ACT == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACT == "relu6":
        v = tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v))
    elif ACT == "silu":
        v = v * tl.sigmoid(v)
    elif ACT == "gelu":
        v = v * 0.5 * (1 + tl.erf(v * 0.7071067811865476))
    return v


@triton.jit
def _slope(v, ACT: tl.constexpr):
    """The activation's derivative at v."""
    if ACT == "relu":
        slope = tl.where(v > 0, 1.0, 0.0)
    elif ACT == "relu6":
        slope = tl.where((v > 0) & (v < 6), 1.0, 0.0)
    elif ACT == "silu":
        gate = tl.sigmoid(v)
        slope = gate * (1 + v * (1 - gate))
    elif ACT == "gelu":
        slope = 0.5 * (1 + tl.erf(v * 0.7071067811865476)) + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
    else:
        slope = tl.full(v.shape, 1.0, tl.float32)
    return slope


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":  # the interpreter multiplies bfloat16 as if its bits were integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _widen(value, WIDE: tl.constexpr):
    """An index, in 64 bits where 32 do not reach. It may be a constexpr: Triton makes one of every argument of 1."""
    if WIDE:
        return tl.cast(value, tl.int64)
    else:
        return value


@triton.jit
def compact_kernel(mask, order, counts, width, BLOCK: tl.constexpr):
    """order[g] = the channels of group g, those with a mask other than 0 first, both parts increasing."""
    group = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    active = (tl.load(mask + group * width + i, mask=i < width, other=0.0) != 0).to(tl.int32)
    rank = tl.cumsum(active, 0)
    count = tl.sum(active, 0)
    position = tl.where(active != 0, rank - 1, count + i - rank)
    tl.store(order + group * width + position, i, mask=i < width)
    tl.store(counts + group, count)


@triton.jit
def pack_kernel(
    source,
    target,
    order,  # [G, width] or None: all
    counts,  # [G] or None: width
    scale,  # [G * width] or None
    rows,
    inner,
    width,
    outer_stride,
    inner_stride,
    group_stride,
    channel_stride,
    target_row_parts,  # of _PAD elements
    target_group_parts,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """target[row, g, k] = scale ⊙ source[row, g, order[g, k]] for k below the count, zeros up to a multiple of _PAD."""
    group = tl.program_id(2)
    count = width
    if counts is not None:
        count = tl.load(counts + group)
    if tl.program_id(1) * BLOCK >= count:
        return
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = k
    if order is not None:
        channel = tl.load(order + group * width + k, mask=k < count, other=0)
    offset = row // inner * outer_stride + row % inner * inner_stride + group.to(tl.int64) * group_stride
    read = (row < rows)[:, None] & (k < count)[None, :]
    value = tl.load(source + offset[:, None] + channel[None, :].to(tl.int64) * channel_stride, mask=read, other=0.0)
    if scale is not None:
        factor = tl.load(scale + group * width + channel, mask=k < count, other=0.0)
        value = value.to(tl.float32) * factor[None, :]
    written = row * (target_row_parts * _PAD) + group.to(tl.int64) * (target_group_parts * _PAD)
    padded = (count + _PAD - 1) // _PAD * _PAD
    write = (row < rows)[:, None] & (k < padded)[None, :]
    tl.store(target + written[:, None] + k[None, :], value.to(target.dtype.element_ty), mask=write)


@triton.jit
def _finish(
    acc,  # [BM, BN] float32
    y,
    raw,
    residual,
    factor,
    scale,
    shift,
    mask,
    partials,
    tile,
    row,  # [BM] of y
    channel,  # [BN] of y
    row_ok,
    channel_ok,
    active,  # [BN]
    channels,
    ACT: tl.constexpr,
):
    """Writes a tile of the output: the epilogue, with its partial sums.

    With `factor` [rows, channels] (the input, in its gradient) partials [tiles, 1, channels] get the sums of
    acc ⊙ factor; else, where partials is given, [tiles, 2, channels] get the sums and sums of squares of raw.
    """
    inside = row_ok[:, None] & channel_ok[None, :]
    live = row_ok[:, None] & (channel_ok & active)[None, :]
    offset = row[:, None] * channels + channel[None, :]
    acc = tl.where(live, acc, 0.0)
    if factor is not None:
        other = tl.load(factor + offset, mask=live, other=0.0).to(tl.float32)
        tl.store(partials + tile * channels + channel, tl.sum(acc * other, 0), mask=channel_ok)
    elif partials is not None:
        rounded = acc.to(raw.dtype.element_ty).to(tl.float32)
        sums = partials + tile * (2 * channels) + channel
        tl.store(sums, tl.sum(rounded, 0), mask=channel_ok)
        tl.store(sums + channels, tl.sum(rounded * rounded, 0), mask=channel_ok)
    if raw is not None:
        tl.store(raw + offset, acc.to(raw.dtype.element_ty), mask=inside)
    if y is not None:
        if scale is not None:
            acc = acc * tl.load(scale + channel, mask=channel_ok, other=0.0)[None, :]
        if shift is not None:
            acc = acc + tl.load(shift + channel, mask=channel_ok, other=0.0)[None, :]
        if mask is not None:
            acc = acc * tl.load(mask + channel, mask=channel_ok, other=0.0)[None, :]
            acc = tl.where(active[None, :], acc, 0.0)
        if residual is not None:
            acc = acc + tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + offset, _activate(acc, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _finish_parts(
    acc,
    start,
    order,
    group,
    n_channels,
    n_active,
    y,
    raw,
    residual,
    factor,
    scale,
    shift,
    mask,
    partials,
    tile,
    row,
    row_ok,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """_finish for the BN channels from place `start` in their group's order, in PARTS turns."""
    if PARTS == 1:
        n = start + tl.arange(0, BN)
        n_ok = n < n_channels
        channel = n
        if order is not None:
            channel = tl.load(order + group * n_channels + n, mask=n_ok, other=0)
        _finish(acc, y, raw, residual, factor, scale, shift, mask, partials, tile, row, group * n_channels + channel,
                row_ok, n_ok, n < n_active, tl.num_programs(1) * n_channels, ACT)  # fmt: skip
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, [BM, 2, BN // 2]), [0, 2, 1]))
        _finish_parts(left, start, order, group, n_channels, n_active, y, raw, residual, factor, scale, shift, mask,
                      partials, tile, row, row_ok, ACT, BM, BN // 2, PARTS // 2)  # fmt: skip
        _finish_parts(right, start + BN // 2, order, group, n_channels, n_active, y, raw, residual, factor, scale,
                      shift, mask, partials, tile, row, row_ok, ACT, BM, BN // 2, PARTS // 2)  # fmt: skip


@triton.jit
def _first_tap(at, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr):
    """The first kernel position that meets an output when the input stands at `at` (padding counted); KERNEL: none."""
    first = KERNEL
    for back in tl.static_range(1, STEP + 1):  # the last one found is the first
        if STEP - back < KERNEL:
            away = at + (STRIDE * KERNEL - STEP + back) * DILATION  # a multiple of STRIDE added: it is not negative
            first = tl.where(away % STRIDE == 0, STEP - back, first)
    return first


@triton.jit
def conv_kernel(
    a,  # [batch, a_height, a_width, G, K]
    b,  # [G, N, taps, K]; not K_MAJOR: [G, K, taps, N]; GATHER: [G, N, K rounded up to _PAD]
    y,  # [batch, y_height, y_width, G, N] or None
    raw,  # as y
    residual,  # as y
    factor,  # as y
    scale,  # [G * N] or None
    shift,
    mask,
    order,  # [G, N] or None
    n_counts,  # [G] or None
    k_counts,  # [G] or None
    columns,  # [column_count] or None
    partials,
    batch,
    a_height,
    a_width,
    y_height,
    y_width,
    n_parts,  # N = n_parts * N_ALIGN
    k_parts,
    column_count,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    STEP_H: tl.constexpr,  # SH / gcd(SH, DH): taps that meet one input position lie this far apart
    STEP_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the gradient of the input: every stride phase is a convolution of its own
    K_MAJOR: tl.constexpr,
    GATHER: tl.constexpr,
    BOUNDED: tl.constexpr,  # taps may lie outside a
    EVEN_K: tl.constexpr,
    N_ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,  # of the epilogue, one after another: fewer registers
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y[m, n] = finish(Σ_tap Σ_k a[position(m, tap), k] b[n, tap, k]), blocks of n fastest so that a stays in L2."""
    n_channels = n_parts * N_ALIGN
    k_channels = k_parts * K_ALIGN
    groups = tl.num_programs(1)
    group = tl.program_id(1)
    tiles_n = tl.cdiv(n_channels, BN)
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n
    m = _widen(tile_m, WIDE) * BM + tl.arange(0, BM)
    batch = _widen(batch, WIDE)
    pixel = _widen(groups * k_channels, WIDE)  # elements of a

    n = tile_n * BN + tl.arange(0, BN)
    n_ok = n < n_channels
    n_active = n_channels
    if n_counts is not None:
        n_active = tl.load(n_counts + group)
    channel = n
    if order is not None:
        channel = tl.load(order + group * n_channels + n, mask=n_ok, other=0)

    taps_h = KH
    taps_w = KW
    first_h = 0
    first_w = 0
    step_h = DH  # how far apart in a the taps lie
    step_w = DW
    if TRANSPOSED:
        phase_h = tl.program_id(2) // SW
        phase_w = tl.program_id(2) % SW
        rows_h = tl.maximum((y_height - phase_h + SH - 1) // SH, 0)
        rows_w = tl.maximum((y_width - phase_w + SW - 1) // SW, 0)
        rest = m % tl.maximum(rows_h * rows_w, 1)
        image = m // tl.maximum(rows_h * rows_w, 1)
        at_h = rest // tl.maximum(rows_w, 1) * SH + phase_h
        at_w = rest % tl.maximum(rows_w, 1) * SW + phase_w
        row_ok = m < batch * rows_h * rows_w
        row = (image * y_height + at_h) * y_width + at_w
        first_h = _first_tap(phase_h + PH, KH, SH, DH, STEP_H)
        first_w = _first_tap(phase_w + PW, KW, SW, DW, STEP_W)
        taps_h = (KH - first_h + STEP_H - 1) // STEP_H
        taps_w = (KW - first_w + STEP_W - 1) // STEP_W
        step_h = -(STEP_H * DH // SH)
        step_w = -(STEP_W * DW // SW)
        # The phase is split off, for the division to be exact, where the sum may be negative too.
        a_h = at_h // SH + (phase_h + PH - first_h * DH) // SH
        a_w = at_w // SW + (phase_w + PW - first_w * DW) // SW
    else:
        row = m
        row_ok = m < batch * y_height * y_width
        image = m // (y_height * y_width)
        rest = m % (y_height * y_width)
        a_h = rest // y_width * SH - PH
        a_w = rest % y_width * SW - PW
    a_row = (image * a_height + a_h) * a_width + a_w
    if SH * SW == 1:
        row = m
    if KH * KW * SH * SW == 1 and PH + PW == 0:
        a_row = m
    if not BOUNDED:
        a_row = tl.where(row_ok, a_row, 0)
    a_rows = a + a_row * pixel + group * k_channels  # [BM]

    k_active = k_channels
    if k_counts is not None:
        k_active = (tl.load(k_counts + group) + _PAD - 1) // _PAD * _PAD
    blocks_k = tl.cdiv(k_active, BK)
    steps = taps_h * taps_w * blocks_k
    if GATHER:
        b_width = (column_count + _PAD - 1) // _PAD * _PAD
        steps = tl.cdiv(column_count, BK)
    steps = tl.where(tile_n * BN < n_active, steps, 0)

    # What the rows of b beyond the active ones yield is dropped at the end: they repeat a row, to need no mask.
    b_n = tl.where(n < n_active, channel, 0)
    acc = tl.zeros([BM, BN], tl.float32)
    if GATHER:
        b_rows = b + (group * n_channels + b_n) * b_width  # [BN]
        for step in range(steps):
            k = step * BK + tl.arange(0, BK)
            column = k
            if columns is not None:
                column = tl.load(columns + k, mask=k < column_count, other=0).to(tl.int32)
            tap = column // k_channels
            tap_h = tap // KW * DH
            tap_w = tap % KW * DW
            inside = row_ok[:, None] & (k < column_count)[None, :]
            if BOUNDED:
                h = a_h[:, None] + tap_h[None, :]
                w = a_w[:, None] + tap_w[None, :]
                inside = inside & (h >= 0) & (h < a_height) & (w >= 0) & (w < a_width)
            away = (tap_h * a_width + tap_w) * pixel + column % k_channels
            a_tile = tl.load(a_rows[:, None] + away[None, :], mask=inside, other=0.0)
            b_tile = tl.load(b_rows[None, :] + k[:, None], mask=(k < b_width)[:, None], other=0.0)
            acc = _dot(a_tile, b_tile, acc, PRECISION)
    else:
        if K_MAJOR:
            b_rows = b + (group * n_channels + b_n) * (KH * KW * k_channels)  # [BN]
        else:
            b_rows = b + group * k_channels * (KH * KW * n_channels) + n
        for step in range(steps):
            tap = step // blocks_k
            tap_h = tap // taps_w
            tap_w = tap % taps_w
            k = step % blocks_k * BK + tl.arange(0, BK)
            away = (tap_h * step_h * a_width + tap_w * step_w) * pixel
            a_tile_at = a_rows[:, None] + (away + k)[None, :]
            if BOUNDED:
                h = a_h + tap_h * step_h
                w = a_w + tap_w * step_w
                inside = (row_ok & (h >= 0) & (h < a_height) & (w >= 0) & (w < a_width))[:, None]
                if not EVEN_K:
                    inside = inside & (k < k_active)[None, :]
                a_tile = tl.load(a_tile_at, mask=inside, other=0.0)
            elif EVEN_K:
                a_tile = tl.load(a_tile_at)
            else:
                a_tile = tl.load(a_tile_at, mask=(k < k_active)[None, :], other=0.0)
            b_tap = (first_h + tap_h * STEP_H) * KW + first_w + tap_w * STEP_W
            if not K_MAJOR:
                b_tile_at = b_rows[None, :] + ((k * (KH * KW) + b_tap) * n_channels)[:, None]
                b_tile = tl.load(b_tile_at, mask=(k < k_active)[:, None] & n_ok[None, :], other=0.0)
            elif EVEN_K:
                b_tile = tl.load(b_rows[None, :] + (b_tap * k_channels + k)[:, None])
            else:
                b_tile_at = b_rows[None, :] + (b_tap * k_channels + k)[:, None]
                b_tile = tl.load(b_tile_at, mask=(k < k_active)[:, None], other=0.0)
            acc = _dot(a_tile, b_tile, acc, PRECISION)

    tile = (tl.program_id(2) * (tl.num_programs(0) // tiles_n) + tile_m).to(tl.int64)
    _finish_parts(acc, tile_n * BN, order, group, n_channels, n_active, y, raw, residual, factor, scale, shift, mask,
                  partials, tile, row, row_ok, ACT, BM, BN, PARTS)  # fmt: skip


@triton.jit
def weight_grad_kernel(
    grad,  # [batch, y_height, y_width, G, O]
    x,  # [batch, height, width, G, C]
    partials,  # [splits, G, O, taps, C]; GATHER: [splits, G, O, column_count]
    o_order,  # [G, O unpacked] or None
    c_order,
    o_counts,  # [G] or None
    c_counts,
    columns,
    batch,
    height,
    width,
    y_height,
    y_width,
    o_width,  # channels per group of the result, where grad and x are packed to more
    c_width,
    o_parts,  # O = o_parts * O_ALIGN
    c_parts,
    column_count,
    rows_per_split,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    GATHER: tl.constexpr,
    O_ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """partials[split, o, tap, c] = Σ over the split's pixels of grad[m, o] x[position(m, tap), c]."""
    o_channels = o_parts * O_ALIGN
    c_channels = c_parts * C_ALIGN
    groups = tl.num_programs(2)
    group = tl.program_id(2)
    split = tl.program_id(1)
    tiles_o = tl.cdiv(o_width, BM)
    tile_o = tl.program_id(0) % tiles_o
    if GATHER:
        tile_c = tl.program_id(0) // tiles_o
        tap = 0
    else:
        tiles_c = tl.cdiv(c_width, BN)
        tile_c = tl.program_id(0) // tiles_o % tiles_c
        tap = tl.program_id(0) // tiles_o // tiles_c

    o_active = o_width
    if o_counts is not None:
        o_active = tl.load(o_counts + group)
    c_active = c_width
    if GATHER:
        c_active = column_count
    elif c_counts is not None:
        c_active = tl.load(c_counts + group)
    if (tile_o * BM >= o_active) | (tile_c * BN >= c_active):
        return  # masked throughout: the sum of the partials knows

    pixel = _widen(groups * c_channels, WIDE)  # elements of x
    o = tile_o * BM + tl.arange(0, BM)
    c = tile_c * BN + tl.arange(0, BN)
    # Reading packed zeros, or what lies between the active count and O, is harmless and keeps the vectors whole.
    o_read = o_channels
    if o_counts is not None:
        o_read = (o_active + _PAD - 1) // _PAD * _PAD
    c_read = c_channels
    if GATHER:
        c_read = column_count
        column = c
        if columns is not None:
            column = tl.load(columns + c, mask=c < column_count, other=0).to(tl.int32)
        tap_h = column // c_channels // KW * DH
        tap_w = column // c_channels % KW * DW
        away = (tap_h * width + tap_w) * pixel + column % c_channels
    else:
        if c_counts is not None:
            c_read = (c_active + _PAD - 1) // _PAD * _PAD
        tap_h = tap // KW * DH
        tap_w = tap % KW * DW
        away = (tap_h * width + tap_w) * pixel + c

    start = _widen(split, WIDE) * rows_per_split
    rows = _widen(batch, WIDE) * y_height * y_width
    stop = tl.minimum(start + rows_per_split, rows)
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(start, stop, BK):
        m = first + tl.arange(0, BK)
        m_ok = m < stop
        g_at = grad + (m * (groups * o_channels) + group * o_channels)[None, :] + o[:, None]
        g_tile = tl.load(g_at, mask=m_ok[None, :] & (o < o_read)[:, None], other=0.0)
        if KH * KW * SH * SW == 1 and PH + PW == 0:
            x_row = m
            inside = m_ok[:, None] & (c < c_read)[None, :]
        else:
            rest = m % (y_height * y_width)
            h = rest // y_width * SH - PH
            w = rest % y_width * SW - PW
            x_row = (m // (y_height * y_width) * height + h) * width + w
            if GATHER:
                tap_rows_h = h[:, None] + tap_h[None, :]
                tap_rows_w = w[:, None] + tap_w[None, :]
                inside = m_ok[:, None] & (c < c_read)[None, :] & (tap_rows_h >= 0) & (tap_rows_h < height)
                inside = inside & (tap_rows_w >= 0) & (tap_rows_w < width)
            else:
                h += tap_h
                w += tap_w
                inside = (m_ok & (h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None] & (c < c_read)[None, :]
        x_at = x + (x_row * pixel + group * c_channels)[:, None] + away[None, :]
        x_tile = tl.load(x_at, mask=inside, other=0.0)
        acc = _dot(g_tile, x_tile, acc, PRECISION)

    o_channel = o
    if o_order is not None:
        o_channel = tl.load(o_order + group * o_width + o, mask=o < o_active, other=0)
    if GATHER:
        result_width = column_count
        place = c
    else:
        c_channel = c
        if c_order is not None:
            c_channel = tl.load(c_order + group * c_width + c, mask=c < c_active, other=0)
        result_width = KH * KW * c_width
        place = tap * c_width + c_channel
    written = (o < o_active)[:, None] & (c < c_active)[None, :]
    partials += split.to(tl.int64) * (groups * o_width * result_width)
    at = ((group * o_width + o_channel) * result_width)[:, None] + place[None, :]
    tl.store(partials + at, acc, mask=written)


@triton.jit
def weight_grad_sum_kernel(
    partials,  # [splits, size] float32, unwritten where masked
    grad,  # [size] = [G, O, width, C]
    out_mask,  # [G * O] or None
    in_mask,  # [G * C] or None
    size,
    splits,
    o_width,
    width,  # taps * C, or the number of columns
    c_width,
    BLOCK: tl.constexpr,
):
    """grad = Σ_split partials, and zero where a mask is."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = i < size
    row = i // width
    if out_mask is not None:
        active = active & (tl.load(out_mask + row, mask=active, other=0.0) != 0)
    if in_mask is not None:
        c = row // o_width * c_width + i % c_width
        active = active & (tl.load(in_mask + c, mask=active, other=0.0) != 0)
    acc = tl.zeros([BLOCK], tl.float32)
    partial = partials + i
    for _ in range(splits):
        acc += tl.load(partial, mask=active, other=0.0)
        partial += size
    tl.store(grad + i, acc.to(grad.dtype.element_ty), mask=i < size)


@triton.jit
def _meeting(at, tap, size, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """Along one axis, which of `size` outputs an input at `at` meets at a kernel position, and whether there is one."""
    away = at + PADDING - tap * DILATION
    return away // STRIDE, (away >= 0) & (away % STRIDE == 0) & (away // STRIDE < size)


@triton.jit
def column_sum_kernel(
    products,  # [batch, y_height, y_width, column_count]
    places,  # [taps, C]: a column's place in the list, or -1
    grad_x,  # [batch, height, width, C]
    batch,
    y_height,
    y_width,
    height,
    width,
    parts,  # C = parts * ALIGN
    column_count,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """grad_x[m, c] = Σ_tap products[the output that m meets at the tap, places[tap, c]], one tap after the other."""
    channels = parts * ALIGN
    tiles_n = tl.cdiv(channels, BN)
    m = _widen(tl.program_id(0) // tiles_n, WIDE) * BM + tl.arange(0, BM)
    c = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    c_ok = c < channels
    row_ok = m < _widen(batch, WIDE) * height * width
    image = m // (height * width)
    at_h = m % (height * width) // width
    at_w = m % width
    acc = tl.zeros([BM, BN], tl.float32)
    for tap in range(KH * KW):
        h, met_h = _meeting(at_h, tap // KW, y_height, SH, PH, DH)
        w, met_w = _meeting(at_w, tap % KW, y_width, SW, PW, DW)
        place = tl.load(places + tap * channels + c, mask=c_ok, other=-1)
        at = ((image * y_height + h) * y_width + w)[:, None] * column_count + place[None, :]
        acc += tl.load(products + at, mask=(row_ok & met_h & met_w)[:, None] & (place >= 0)[None, :], other=0.0)
    at = m[:, None] * channels + c[None, :]
    tl.store(grad_x + at, acc.to(grad_x.dtype.element_ty), mask=row_ok[:, None] & c_ok[None, :])


@triton.jit
def depthwise_kernel(
    a,  # [batch, a_height, a_width, C]
    weight,  # [C, taps]
    y,  # [batch, y_height, y_width, C] or None
    raw,
    residual,
    factor,
    scale,
    shift,
    in_mask,  # [C] or None
    out_mask,
    mask,  # whichever the epilogue applies
    partials,
    batch,
    a_height,
    a_width,
    y_height,
    y_width,
    parts,  # C = parts * ALIGN
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGN: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One channel in, one out. In the gradient of the input (TRANSPOSED) the input's mask is left to the epilogue."""
    channels = parts * ALIGN
    tiles_n = tl.cdiv(channels, BN)
    tile_m = tl.program_id(0) // tiles_n
    m = _widen(tile_m, WIDE) * BM + tl.arange(0, BM)
    batch = _widen(batch, WIDE)
    c = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    c_ok = c < channels
    summed = c_ok
    active = c_ok
    if in_mask is not None:
        factors = tl.load(in_mask + c, mask=c_ok, other=0.0)
        summed = summed & (factors != 0)
        if TRANSPOSED:
            active = active & (factors != 0)
    if out_mask is not None:
        out_active = tl.load(out_mask + c, mask=c_ok, other=0.0) != 0
        summed = summed & out_active
        if not TRANSPOSED:
            active = active & out_active

    row_ok = m < batch * y_height * y_width
    image = m // (y_height * y_width)
    at_h = m % (y_height * y_width) // y_width
    at_w = m % y_width
    acc = tl.zeros([BM, BN], tl.float32)
    taps = tl.where(tl.max(summed.to(tl.int32), 0) > 0, KH * KW, 0)
    for tap in range(taps):
        if TRANSPOSED:
            h, met_h = _meeting(at_h, tap // KW, a_height, SH, PH, DH)
            w, met_w = _meeting(at_w, tap % KW, a_width, SW, PW, DW)
            inside = row_ok & met_h & met_w
        else:
            h = at_h * SH - PH + tap // KW * DH
            w = at_w * SW - PW + tap % KW * DW
            inside = row_ok & (h >= 0) & (h < a_height) & (w >= 0) & (w < a_width)
        a_row = (image * a_height + h) * a_width + w
        # Masked channels are dropped after the load: a mask that varies within 16 bytes would split the vectors.
        value = tl.load(a + a_row[:, None] * channels + c[None, :], mask=inside[:, None] & c_ok[None, :], other=0.0)
        value = value.to(tl.float32)
        if in_mask is not None and not TRANSPOSED:
            value = value * factors[None, :]
        weights = tl.load(weight + c * (KH * KW) + tap, mask=summed, other=0.0).to(tl.float32)
        acc += tl.where(summed[None, :], value * weights[None, :], 0.0)
    _finish(acc, y, raw, residual, factor, scale, shift, mask, partials, tile_m.to(tl.int64), m, c, row_ok, c_ok,
            active, channels, ACT)  # fmt: skip


@triton.jit
def depthwise_weight_grad_kernel(
    grad,  # [batch, y_height, y_width, C]
    x,  # [batch, height, width, C]
    partials,  # [splits, C, taps]
    in_mask,  # [C] or None
    out_mask,
    batch,
    height,
    width,
    y_height,
    y_width,
    parts,  # C = parts * ALIGN
    rows_per_split,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """partials[split, c, tap] = Σ over the split's pixels of grad[m, c] in_mask[c] x[position(m, tap), c]."""
    channels = parts * ALIGN
    tap = tl.program_id(1)
    split = tl.program_id(2)
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    c_ok = c < channels
    active = c_ok
    factors = tl.full([BN], 1.0, tl.float32)
    if in_mask is not None:
        factors = tl.load(in_mask + c, mask=c_ok, other=0.0)
        active = active & (factors != 0)
    if out_mask is not None:
        active = active & (tl.load(out_mask + c, mask=c_ok, other=0.0) != 0)
    if tl.max(active.to(tl.int32), 0) == 0:
        return
    start = _widen(split, WIDE) * rows_per_split
    rows = _widen(batch, WIDE) * y_height * y_width
    stop = tl.minimum(start + rows_per_split, rows)
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(start, stop, BM):
        m = first + tl.arange(0, BM)
        rest = m % (y_height * y_width)
        h = rest // y_width * SH - PH + tap // KW * DH
        w = rest % y_width * SW - PW + tap % KW * DW
        inside = (m < stop) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        x_row = (m // (y_height * y_width) * height + h) * width + w
        read = inside[:, None] & c_ok[None, :]
        value = tl.load(x + x_row[:, None] * channels + c[None, :], mask=read, other=0.0).to(tl.float32)
        acc += value * tl.load(grad + m[:, None] * channels + c[None, :], mask=read, other=0.0).to(tl.float32)
    at = (split.to(tl.int64) * channels + c) * (tl.num_programs(1)) + tap
    tl.store(partials + at, tl.sum(acc, 0) * factors, mask=active)


@triton.jit
def _normalisation(sums, squares, weight, bias, c, c_ok, count, eps):
    """BatchNorm as (x - centre) * scale + shift; with the batch's variance."""
    mean = tl.load(sums + c, mask=c_ok, other=0.0) / count
    var = tl.maximum(tl.load(squares + c, mask=c_ok, other=0.0) / count - mean * mean, 0.0)
    gain = 1 / tl.sqrt(var + eps)
    scale = tl.load(weight + c, mask=c_ok, other=0.0).to(tl.float32) * gain
    return mean, var, gain, scale, tl.load(bias + c, mask=c_ok, other=0.0).to(tl.float32)


@triton.jit
def bn_act_kernel(
    x,  # [rows, C]
    y,
    residual,
    sums,  # [C]
    squares,
    weight,
    bias,
    mask,  # [C] or None
    mean_out,  # [C]
    var_out,
    rows,
    parts,  # C = parts * ALIGN
    eps,
    ALIGN: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y = act(mask ⊙ bn(x) + residual)."""
    channels = parts * ALIGN
    tiles_n = tl.cdiv(channels, BN)
    m = (tl.program_id(0) // tiles_n).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    c_ok = c < channels
    mean, var, _, scale, shift = _normalisation(sums, squares, weight, bias, c, c_ok, rows, eps)
    if tl.program_id(0) < tiles_n:
        tl.store(mean_out + c, mean, mask=c_ok)
        tl.store(var_out + c, var, mask=c_ok)
    inside = (m < rows)[:, None] & c_ok[None, :]
    offset = m[:, None] * channels + c[None, :]
    if mask is not None:
        factors = tl.load(mask + c, mask=c_ok, other=0.0)
        rows_read = tl.where(tl.max((factors != 0).to(tl.int32), 0) > 0, rows, 0)  # none where all is masked
        read = (m < rows_read)[:, None] & c_ok[None, :]
        v = (tl.load(x + offset, mask=read, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
        v = tl.where((factors != 0)[None, :], (v + shift[None, :]) * factors[None, :], 0.0)
    else:
        v = (tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
        v = v + shift[None, :]
    if residual is not None:
        v += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + offset, _activate(v, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit
def epilogue_grad_kernel(
    grad_y,  # [rows, C]
    x,  # the raw convolution
    residual,
    grad_x,
    grad_residual,
    sums,  # [C], for BatchNorm, or None
    squares,
    scale,  # [C] or None; BatchNorm's weight
    shift,  # BatchNorm's bias
    mask,  # [C] or None
    partials,  # [programs of rows, 2, C]
    rows,
    parts,  # C = parts * ALIGN
    rows_per_program,
    eps,
    ALIGN: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """With v = mask ⊙ ((x - centre) ⊙ scale + shift) + residual and δ = grad_y ⊙ act'(v): grad_residual = δ,
    grad_x = mask ⊙ scale ⊙ δ, and the partial sums of δ and of δ ⊙ (x - centre), of which all gradients per channel
    are made."""
    channels = parts * ALIGN
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    c_ok = c < channels
    centre = tl.zeros([BN], tl.float32)
    gain = tl.full([BN], 1.0, tl.float32)
    offsets = tl.zeros([BN], tl.float32)
    if sums is not None:
        centre, _, _, gain, offsets = _normalisation(sums, squares, scale, shift, c, c_ok, rows, eps)
    else:
        if scale is not None:
            gain = tl.load(scale + c, mask=c_ok, other=0.0)
        if shift is not None:
            offsets = tl.load(shift + c, mask=c_ok, other=0.0)
    active = c_ok
    factors = tl.full([BN], 1.0, tl.float32)
    if mask is not None:
        factors = tl.load(mask + c, mask=c_ok, other=0.0)
        active = factors != 0
    rows_read = tl.where(tl.max(active.to(tl.int32), 0) > 0, rows, 0)  # none where all is masked
    sum_grad = tl.zeros([BM, BN], tl.float32)
    sum_product = tl.zeros([BM, BN], tl.float32)
    start = tl.program_id(0).to(tl.int64) * rows_per_program
    for first in range(start, tl.minimum(start + rows_per_program, rows), BM):
        m = first + tl.arange(0, BM)
        inside = (m < rows)[:, None] & c_ok[None, :]
        offset = m[:, None] * channels + c[None, :]
        read = (m < rows_read)[:, None] & c_ok[None, :]
        centred = tl.load(x + offset, mask=read, other=0.0).to(tl.float32) - centre[None, :]
        centred = tl.where(active[None, :] & inside, centred, 0.0)
        v = tl.where(active[None, :], (centred * gain[None, :] + offsets[None, :]) * factors[None, :], 0.0)
        if residual is not None:
            v += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        delta = tl.load(grad_y + offset, mask=inside, other=0.0).to(tl.float32) * _slope(v, ACT)
        if grad_residual is not None:
            tl.store(grad_residual + offset, delta.to(grad_residual.dtype.element_ty), mask=inside)
        delta = tl.where(active[None, :], delta, 0.0)
        result = tl.where(active[None, :], delta * (factors * gain)[None, :], 0.0)
        tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=inside)
        sum_grad += delta
        sum_product += delta * centred
    at = partials + tl.program_id(0).to(tl.int64) * (2 * channels) + c
    tl.store(at, tl.sum(sum_grad, 0), mask=c_ok)
    tl.store(at + channels, tl.sum(sum_product, 0), mask=c_ok)


@triton.jit
def epilogue_grad_sum_kernel(
    partials,  # [programs, 2, C]
    scale,  # as epilogue_grad_kernel
    shift,
    mask,
    sums,
    squares,
    grad_mask,  # [C], or None where there is no mask, scale or shift
    grad_scale,
    grad_shift,
    grad_sums,  # with sums alone
    grad_squares,
    channels,
    rows,
    programs,
    eps,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The gradients per channel from the sums D of δ and E of δ ⊙ (x - centre)."""
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    c_ok = c < channels
    total_grad = tl.zeros([BM, BN], tl.float32)
    total_product = tl.zeros([BM, BN], tl.float32)
    for first in range(0, programs, BM):
        program = first + tl.arange(0, BM)
        inside = (program < programs)[:, None] & c_ok[None, :]
        at = partials + program[:, None] * (2 * channels) + c[None, :]
        total_grad += tl.load(at, mask=inside, other=0.0)
        total_product += tl.load(at + channels, mask=inside, other=0.0)
    d = tl.sum(total_grad, 0)
    e = tl.sum(total_product, 0)
    factors = tl.full([BN], 1.0, tl.float32)
    if mask is not None:
        factors = tl.load(mask + c, mask=c_ok, other=0.0)
    if sums is not None:
        mean, _, root, gain, offsets = _normalisation(sums, squares, scale, shift, c, c_ok, rows, eps)
        weight = tl.load(scale + c, mask=c_ok, other=0.0).to(tl.float32)
        # var = max(squares / rows - mean², 0), whose gradient stops where it is clamped
        unclamped = tl.load(squares + c, mask=c_ok, other=0.0) / rows >= mean * mean
        grad_var = tl.where(unclamped & (factors != 0), -0.5 * factors * e * weight * root * root * root, 0.0)
        through_mean = tl.where(factors != 0, -gain * factors * d, 0.0)
        tl.store(grad_sums + c, (through_mean - 2 * mean * grad_var) / rows, mask=c_ok)
        tl.store(grad_squares + c, grad_var / rows, mask=c_ok)
        grad_gain = factors * e * root
    else:
        gain = tl.full([BN], 1.0, tl.float32)
        if scale is not None:
            gain = tl.load(scale + c, mask=c_ok, other=0.0)
        offsets = tl.zeros([BN], tl.float32)
        if shift is not None:
            offsets = tl.load(shift + c, mask=c_ok, other=0.0)
        grad_gain = factors * e
    if grad_mask is not None:
        tl.store(grad_mask + c, tl.where(factors != 0, gain * e + offsets * d, 0.0), mask=c_ok)
    if grad_scale is not None:
        tl.store(grad_scale + c, tl.where(factors != 0, grad_gain, 0.0), mask=c_ok)
    if grad_shift is not None:
        tl.store(grad_shift + c, tl.where(factors != 0, factors * d, 0.0), mask=c_ok)


INTERPRETED = not isinstance(conv_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET was set at import


class Config(NamedTuple):
    """Tile sizes of a GEMM [rows, cols] that sums `depth` at a time, and how it is scheduled."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


_CONFIGS = {
    "half": (
        Config(128, 128, 64, 8, 3),
        Config(128, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
        Config(64, 128, 64, 4, 4),
        Config(128, 256, 64, 8, 3),
        Config(128, 32, 64, 4, 4),
    ),
    "weight half": (
        Config(128, 128, 32, 8, 4),
        Config(64, 128, 64, 4, 4),
        Config(128, 64, 32, 4, 4),
        Config(64, 64, 64, 4, 4),
        Config(128, 32, 64, 4, 4),
    ),
    "tf32": (
        Config(128, 128, 32, 8, 3),
        Config(128, 64, 32, 4, 4),
        Config(64, 64, 32, 4, 4),
        Config(64, 128, 32, 4, 4),
        Config(128, 32, 32, 4, 4),
    ),
    "ieee": (Config(64, 64, 16, 8, 3), Config(64, 32, 16, 4, 3), Config(128, 64, 16, 8, 3)),
    # Element by element: the tile of addresses fills the registers.
    "gather": (
        Config(128, 128, 32, 8, 2),
        Config(128, 64, 32, 8, 2),
        Config(64, 64, 32, 4, 2),
        Config(128, 32, 32, 8, 2),
    ),
}
_NARROW = 2**31 - 2**16  # elements that 32 bits count, with room for what a last tile has beyond them
# Where at most one column in so many is listed, the input's gradient is summed from their products: docs/kernels.md.
_FEW_COLUMNS = 3
_MOST_PRODUCTS = 2**26  # that are kept at a time, 256 MiB: fewer would be as many launches for little work each
_INTERPRETER_CONFIG = Config(32, 32, 16, 1, 1)
_CHOSEN: dict[tuple[object, ...], Config] = {}  # by shape class; measured once per process


def _tuned(key: tuple[object, ...], configs: list[Config], launch: Callable[[Config], Any]) -> Any:
    """What `launch` returns with the fastest configuration, measured on the first call with this key.

    The first configuration serves where nothing can be measured, while a CUDA graph is being captured, and where
    nothing shall be: with HWPRUNE_AUTOTUNE=0. HWPRUNE_AUTOTUNE_CACHE=FILE keeps what was measured for later processes.
    """
    chosen = configs[0] if len(configs) == 1 else _CHOSEN.get(key)
    if chosen is None and os.environ.get("HWPRUNE_AUTOTUNE") == "0":
        chosen = configs[0]
    if chosen is None:
        stored = _stored_choices().get(_stored_name(key))
        if stored in configs:  # else it is of other sources than these
            chosen = _CHOSEN[key] = stored
    if chosen is None and torch.cuda.is_current_stream_capturing():
        chosen = configs[0]
    if chosen is None:
        chosen = _CHOSEN[key] = min(configs, key=lambda config: _time_ms(config, launch))
        _store_choice(key, chosen)
    return launch(chosen)


def _stored_name(key: tuple[object, ...]) -> str:
    """A device by its name, for its index may be another's in a later process, and the compiler by its version."""
    named = (torch.cuda.get_device_name(part) if isinstance(part, torch.device) else part for part in key)
    return " ".join(map(str, (f"triton {triton.__version__}", *named)))


def _stored_choices() -> dict[str, Config]:
    path = os.environ.get("HWPRUNE_AUTOTUNE_CACHE")
    if not path or not os.path.exists(path):
        return {}
    with open(path) as file:
        return {name: Config(*sizes) for name, sizes in json.load(file).items()}


def _store_choice(key: tuple[object, ...], chosen: Config) -> None:
    """Adds one choice to the file, which is never seen half written; of two processes at once one may lose its own."""
    path = os.environ.get("HWPRUNE_AUTOTUNE_CACHE")
    if not path:
        return
    partial = f"{path}.{os.getpid()}"
    with open(partial, "w") as file:
        json.dump(_stored_choices() | {_stored_name(key): chosen}, file, indent=0)
    os.replace(partial, path)


def _time_ms(config: Config, launch: Callable[[Config], Any]) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(config), warmup=5, rep=20, return_mode="median")
    except triton.runtime.errors.OutOfResources:  # this device has less shared memory
        return float("inf")


def _configs(kind: str, cols: int, depth: int, scattered: bool = False) -> list[Config]:
    """The configurations worth trying, with tiles cut to the problem."""
    if INTERPRETED:
        return [_INTERPRETER_CONFIG]
    cols, depth = (max(16, triton.next_power_of_2(size)) for size in (cols, depth))
    fitting = [config for config in _CONFIGS[kind] if config.cols <= max(cols, 32)]
    if scattered:
        fitting = [config for config in fitting if config.rows * config.cols <= 2048 * config.warps]
    cut = [config._replace(cols=min(config.cols, cols), depth=min(config.depth, depth)) for config in fitting]
    return list(dict.fromkeys(cut))


def _parts(config: Config, scattered: bool) -> int:
    """In how many turns the epilogue is run: an address for every element takes registers, and so does a large tile."""
    per_thread = config.rows * config.cols // (32 * config.warps)
    return max(1, per_thread // (16 if scattered else 64))


def _precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    if INTERPRETED:
        return "interpreted"
    return "ieee" if dtype == torch.float32 and not allow_tf32 else "tf32"


def _align(channels: int) -> int:
    """The power of two that kernels may take `channels` to be a multiple of."""
    return gcd(channels, 16)


def _round_up(size: int) -> int:
    return triton.cdiv(size, 16) * 16


def _is_wide(*tensors: Tensor) -> bool:
    """Whether 32 bits do not address these. Of tensors as kernels see them: packing pads."""
    return any(tensor.numel() >= _NARROW for tensor in tensors)


def _nhwc(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def _flat(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def _vector(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


class _Order(NamedTuple):
    """The channels of each group, active ones first [G * width], and how many are active [G]; int32."""

    order: Tensor | None
    counts: Tensor | None


def _compact(mask: Tensor | None, groups: int) -> _Order:
    if mask is None:
        return _Order(None, None)
    order = _vector(mask, mask.numel(), dtype=torch.int32)
    counts = _vector(mask, groups, dtype=torch.int32)
    width = mask.numel() // groups
    compact_kernel[(groups,)](mask, order, counts, width, BLOCK=triton.next_power_of_2(width))
    return _Order(order, counts)


class _Walk(NamedTuple):
    """How pack_kernel reads: row r of group g starts at r // inner * outer + r % inner * inside + g * group."""

    inner: int
    outer: int
    inside: int
    group: int
    channel: int


def _pack(
    source: Tensor,
    target: Tensor,
    rows: int,
    width: int,
    groups: int,
    walk: _Walk,
    target_row: int,
    target_group: int,
    chosen: _Order,
    scale: Tensor | None = None,
) -> Tensor:
    block = max(16, min(64, triton.next_power_of_2(width)))
    block_rows = 2048 // block
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(width, block), groups)
    pack_kernel[grid](
        source, target, chosen.order, chosen.counts, scale, rows, walk.inner, width, walk.outer, walk.inside,
        walk.group, walk.channel, target_row // 16, target_group // 16, BLOCK_ROWS=block_rows, BLOCK=block,
    )  # fmt: skip
    return target


def _pack_pixels(x: Tensor, chosen: _Order, groups: int, scale: Tensor | None) -> Tensor:
    """x [N, G * width, H, W] as [N * H * W, G, padded width], active channels first."""
    width = x.shape[1] // groups
    padded = _round_up(width)
    rows = x.numel() // x.shape[1]
    target = torch.empty((rows, groups, padded), dtype=x.dtype, device=x.device)
    walk = _Walk(1, groups * width, 0, width, 1)
    return _pack(x, target, rows, width, groups, walk, groups * padded, padded, chosen, scale)


def _pack_weight(weight: Tensor, chosen: _Order, groups: int, transposed: bool) -> Tensor:
    """weight [G * O, C, kH, kW] as [G, O, taps, padded C], active first; transposed, as [G, C, taps, padded O]."""
    out, width, taps = weight.shape[0] // groups, weight.shape[1], weight.shape[2] * weight.shape[3]
    group = out * taps * width
    if transposed:
        rows, width, walk = width * taps, out, _Walk(taps, 1, width, group, taps * width)
    else:
        rows, walk = out * taps, _Walk(1, width, 0, group, 1)
    padded = _round_up(width)
    target = torch.empty((groups, rows, padded), dtype=weight.dtype, device=weight.device)
    return _pack(weight, target, rows, width, groups, walk, padded, rows * padded, chosen)


def _pack_columns(weight: Tensor, columns: Tensor | None, count: int, groups: int) -> Tensor:
    """weight [G * O, C, kH, kW] as [G, O, padded count], the columns chosen."""
    out, width = weight.shape[0] // groups, weight[0].numel()
    padded = _round_up(count)
    target = torch.empty((groups, out, padded), dtype=weight.dtype, device=weight.device)
    walk = _Walk(1, width, 0, out * width, 1)
    return _pack(weight, target, out, count, groups, walk, padded, out * padded, _Order(columns, None))


def _taps(geometry: Geometry, weight_shape: tuple[int, ...]) -> dict[str, int]:
    (sh, sw), (ph, pw), (dh, dw), _ = geometry
    kh, kw = weight_shape[2:]
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw, "DH": dh, "DW": dw}


def _is_depthwise(channels: int, weight_shape: tuple[int, ...], groups: int) -> bool:
    return groups == channels == weight_shape[0]


def _is_gathered(weight_shape: tuple[int, ...], in_mask: Tensor | None, columns: Tensor | None) -> bool:
    few = in_mask is None and weight_shape[1] < 16 and weight_shape[2] * weight_shape[3] > 1
    return columns is not None or few


def _convolve(
    a: Tensor,  # [N, G * K, ...]: the input, or in its gradient that of the output
    weight: Tensor,
    k_mask: Tensor | None,  # [G * K]
    n_mask: Tensor | None,  # [G * N]
    geometry: Geometry,
    columns: Tensor | None,
    allow_tf32: bool,
    y: Tensor | None,
    raw: Tensor | None,
    *,
    transposed: bool = False,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "none",
    sums: int = 0,
) -> Tensor | None:
    """Launches the convolution that writes y and raw; returns `sums` sums per channel [sums, G * N] float32."""
    out = raw if y is None else y
    assert out is not None
    groups = geometry[3]
    batch, channels, height, width = out.shape
    if out.numel() == 0:
        return torch.zeros((sums, channels), device=out.device) if sums else None
    a, weight, residual, factor = _nhwc(a), _nhwc(weight), _nhwc(residual), _nhwc(factor)
    k_mask, n_mask, scale, shift = _flat(k_mask), _flat(n_mask), _flat(scale), _flat(shift)
    a_height, a_width = a.shape[2:]
    taps = _taps(geometry, weight.shape)
    stride = taps["SH"], taps["SW"]
    fixed = {**taps, "TRANSPOSED": transposed, "ACT": act}
    sizes = batch, a_height, a_width, height, width

    if _is_depthwise(a.shape[1], weight.shape, groups):
        in_mask, out_mask = (n_mask, k_mask) if transposed else (k_mask, n_mask)
        block, block_rows = _elementwise_tile(channels)
        tiles = triton.cdiv(batch * height * width, block_rows)
        partials = _vector(a, tiles, sums, channels) if sums else None
        depthwise_kernel[(tiles * triton.cdiv(channels, block),)](
            a, weight, y, raw, residual, factor, scale, shift, in_mask, out_mask, n_mask, partials, *sizes,
            channels // _align(channels), **fixed, ALIGN=_align(channels), WIDE=_is_wide(a, out), BM=block_rows,
            BN=block,
        )  # fmt: skip
        return partials.sum(0) if sums else None

    k_channels, n_channels = a.shape[1] // groups, channels // groups
    gather = not transposed and _is_gathered(weight.shape, k_mask, columns)
    k_major, k_order, n_order = True, _compact(k_mask, groups), _compact(n_mask, groups)
    count = columns.numel() if columns is not None else k_channels * taps["KH"] * taps["KW"]
    if gather:
        b = _pack_columns(weight, columns, count, groups)
    elif transposed and k_mask is None and n_mask is None and a.dtype != torch.float32:
        b, k_major = weight, False
    elif transposed or k_mask is not None:
        b = _pack_weight(weight, k_order, groups, transposed)
    else:
        b = weight
    if k_mask is not None:
        a = _pack_pixels(a, k_order, groups, None if transposed else k_mask)
    k_stored = _round_up(k_channels) if k_mask is not None or (k_major and transposed) else k_channels
    if k_mask is None and k_stored != k_channels:
        a = _pack_pixels(a, k_order, groups, None)

    precision = _precision(a.dtype, allow_tf32)
    phases = stride[0] * stride[1] if transposed else 1
    rows = batch * (triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1]) if transposed else height * width)
    pointwise = all(value == 1 for name, value in taps.items() if name[0] in "KS")
    bounded = taps["PH"] + taps["PW"] > 0 or (transposed and not pointwise)
    steps = tuple(s // gcd(s, taps[name]) if transposed else 1 for s, name in zip(stride, ("DH", "DW"), strict=True))

    def launch(config: Config) -> Tensor | None:
        tiles = triton.cdiv(rows, config.rows)
        partials = _vector(out, tiles * phases, sums, channels) if sums else None
        conv_kernel[(tiles * triton.cdiv(n_channels, config.cols), groups, phases)](
            a, b, y, raw, residual, factor, scale, shift, n_mask, n_order.order, n_order.counts, k_order.counts,
            columns, partials, *sizes, n_channels // _align(n_channels), k_stored // _align(k_stored), count, **fixed,
            STEP_H=steps[0], STEP_W=steps[1], K_MAJOR=k_major, GATHER=gather, BOUNDED=bounded,
            EVEN_K=k_mask is None and k_stored % config.depth == 0, N_ALIGN=_align(n_channels),
            K_ALIGN=_align(k_stored), PRECISION=precision, WIDE=_is_wide(a, out),
            PARTS=_parts(config, n_mask is not None),
            BM=config.rows, BN=config.cols, BK=config.depth,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return partials

    optional = (y, raw, residual, factor, scale, shift, n_mask, k_mask)
    shape_class = (rows.bit_length(), n_channels, k_channels, groups, count if gather else None, *taps.values())
    key = ("conv", a.device, a.dtype, precision, transposed, shape_class, act, sums, *(t is None for t in optional))
    depth = count if gather else k_stored
    kind = "half" if a.dtype != torch.float32 else precision
    configs = _configs("gather" if gather and kind != "ieee" else kind, n_channels, depth, n_mask is not None)
    partials = _tuned(key, configs, launch)
    return None if partials is None else partials.sum(0)


def _output_shape(x: Tensor, weight_shape: tuple[int, ...], geometry: Geometry) -> tuple[int, int, int, int]:
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(x.shape[2:], weight_shape[2:], *geometry[:3], strict=True)
    ]
    return x.shape[0], weight_shape[0], sizes[0], sizes[1]


def _elementwise_tile(channels: int) -> tuple[int, int]:
    """Channels and rows of a tile of 4096 elements: 16 bytes for each of 256 threads, twice, in half precision."""
    block = min(128, triton.next_power_of_2(channels))
    return block, (256 if INTERPRETED else 4096) // block


def _processors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def refusal(x: Tensor, weight: Tensor, geometry: Geometry, columns: Tensor | None) -> str | None:
    """Why these kernels cannot take the tensors, or None."""
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return f"it takes {', '.join(_DTYPES.values())}, the same for x and weight: not {x.dtype} and {weight.dtype}"
    groups = geometry[3]
    out, width, taps = weight.shape[0] // groups, weight.shape[1], weight.shape[2] * weight.shape[3]
    if groups * taps * max(out * _round_up(width), width * _round_up(out)) >= _NARROW:
        return "it takes fewer than 2^31 weights, channels rounded up to a multiple of 16"
    if not INTERPRETED and not x.is_cuda:
        return f"x is on {x.device}, and it needs a CUDA device, or TRITON_INTERPRET=1 before the first import"
    return None


def forward(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin / groups, kH, kW]
    in_mask: Tensor | None,  # [Cin] float32
    out_mask: Tensor | None,  # [Cout] float32
    scale: Tensor | None,  # [Cout] float32
    shift: Tensor | None,  # [Cout] float32
    residual: Tensor | None,  # [N, Cout, Ho, Wo]
    act: str,
    geometry: Geometry,
    columns: Tensor | None,  # [K] int64
    save_raw: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and with save_raw the convolution before the scale, zeros where out_mask is 0. Both are channels_last."""
    with torch.cuda.device_of(x):
        y = _empty(x, _output_shape(x, weight.shape, geometry))
        raw = _empty(x, y.shape) if save_raw else None
        _convolve(x, weight, in_mask, out_mask, geometry, columns, allow_tf32, y, raw,
                  residual=residual, scale=scale, shift=shift, act=act)  # fmt: skip
    return y, raw


def forward_stats(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin / groups, kH, kW]
    in_mask: Tensor | None,  # [Cin]
    out_mask: Tensor | None,  # [Cout]
    geometry: Geometry,
    columns: Tensor | None,  # [K]
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution [N, Cout, Ho, Wo], zeros where out_mask is 0, and its sums and sums of squares [Cout] float32."""
    with torch.cuda.device_of(x):
        raw = _empty(x, _output_shape(x, weight.shape, geometry))
        sums = _convolve(x, weight, in_mask, out_mask, geometry, columns, allow_tf32, None, raw, sums=2)
    assert sums is not None
    return raw, sums[0].clone(), sums[1].clone()  # the outputs of an operator must not share memory


def backward_input(
    grad_raw: Tensor,  # [N, Cout, Ho, Wo]
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,
    in_mask: Tensor | None,  # [Cin]
    out_mask: Tensor | None,  # [Cout]
    geometry: Geometry,
    columns: Tensor | None,  # [K]
    allow_tf32: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x [N, Cin, H, W] and of in_mask [Cin] float32, zeros where in_mask is 0."""
    with torch.cuda.device_of(x):
        if columns is not None and _FEW_COLUMNS * columns.numel() <= weight[0].numel():
            return _column_input_grad(grad_raw, x, weight, out_mask, geometry, columns, allow_tf32), None
        if columns is not None:
            flat = weight.permute(0, 2, 3, 1).flatten(1)  # [Cout, kH * kW * Cin]
            flat = torch.zeros_like(flat).index_copy_(1, columns, flat.index_select(1, columns))
            weight = flat.unflatten(1, (*weight.shape[2:], -1)).permute(0, 3, 1, 2)
        grad_x = _empty(x, x.shape)
        masked = in_mask is not None
        sums = _convolve(grad_raw, weight, out_mask, in_mask, geometry, None, allow_tf32, grad_x, None,
                         transposed=True, factor=x if masked else None, sums=int(masked))  # fmt: skip
    return grad_x, None if sums is None else sums[0]


def _column_input_grad(
    grad_raw: Tensor,  # [N, Cout, Ho, Wo]
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,
    out_mask: Tensor | None,  # [Cout]
    geometry: Geometry,
    columns: Tensor,  # [K]
    allow_tf32: bool,
) -> Tensor:
    """The gradient of x [N, Cin, H, W] from the products of every listed column with every output pixel, in float32."""
    grad_x, grad_raw, count = _empty(x, x.shape), _nhwc(grad_raw), columns.numel()
    flat = weight.permute(0, 2, 3, 1).flatten(1)  # [Cout, kH * kW * Cin]
    listed = flat.index_select(1, columns)[:, :, None, None]  # [Cout, K, 1, 1]
    order = torch.arange(count, dtype=torch.int32, device=x.device)
    places = torch.full_like(flat[0], -1, dtype=torch.int32).index_copy_(0, columns, order)
    y_height, y_width = grad_raw.shape[2:]
    channels, height, width = x.shape[1:]
    block, block_rows = _elementwise_tile(channels)
    images = max(1, _MOST_PRODUCTS // max(1, y_height * y_width * count))
    for upstream, target in zip(grad_raw.split(images), grad_x.split(images), strict=True):
        batch = len(target)
        products = _empty(x, (batch, count, y_height, y_width), torch.float32)
        _convolve(upstream, listed, out_mask, None, _POINTWISE, None, allow_tf32, products, None, transposed=True)
        tiles = triton.cdiv(batch * height * width, block_rows)
        column_sum_kernel[(tiles * triton.cdiv(channels, block),)](
            products, places, target, batch, y_height, y_width, height, width, channels // _align(channels), count,
            **_taps(geometry, weight.shape), ALIGN=_align(channels), WIDE=_is_wide(products, target), BM=block_rows,
            BN=block,
        )  # fmt: skip
    return grad_x


def backward_weight(
    grad_raw: Tensor,  # [N, Cout, Ho, Wo]
    x: Tensor,  # [N, Cin, H, W]
    weight_shape: tuple[int, ...],
    in_mask: Tensor | None,  # [Cin]
    out_mask: Tensor | None,  # [Cout]
    geometry: Geometry,
    columns: Tensor | None,  # [K]
    allow_tf32: bool,
) -> Tensor:
    """The gradient of the weight, channels_last, zeros where a mask is 0 or a column is not listed."""
    grad = _empty(x, tuple(weight_shape))
    if x.numel() == 0 or grad_raw.numel() == 0 or (columns is not None and columns.numel() == 0):
        return grad.zero_()
    with torch.cuda.device_of(x):
        grad_raw, x, in_mask, out_mask = _nhwc(grad_raw), _nhwc(x), _flat(in_mask), _flat(out_mask)
        taps, groups = _taps(geometry, tuple(weight_shape)), geometry[3]
        batch, _, height, width = x.shape
        y_height, y_width = grad_raw.shape[2:]
        sizes = batch, height, width, y_height, y_width
        rows = batch * y_height * y_width
        out, per_group, positions = weight_shape[0] // groups, weight_shape[1], weight_shape[2] * weight_shape[3]
        gather = _is_gathered(tuple(weight_shape), in_mask, columns)
        count = columns.numel() if columns is not None else per_group * positions
        if _is_depthwise(x.shape[1], tuple(weight_shape), groups):
            partials = _depthwise_weight_grad(grad_raw, x, in_mask, out_mask, sizes, taps)
        else:
            o_order, c_order = _compact(out_mask, groups), _compact(in_mask, groups)
            if out_mask is not None:
                grad_raw = _pack_pixels(grad_raw, o_order, groups, None)
            if in_mask is not None:
                x = _pack_pixels(x, c_order, groups, in_mask)
            o_stored = out if out_mask is None else _round_up(out)
            c_stored = per_group if in_mask is None else _round_up(per_group)
            precision = _precision(x.dtype, allow_tf32)

            def launch(config: Config) -> Tensor:
                tiles = triton.cdiv(out, config.rows)
                tiles *= triton.cdiv(count, config.cols) if gather else triton.cdiv(per_group, config.cols) * positions
                # Four programs per processor, each with at least four blocks of pixels.
                splits = triton.cdiv(4 * _processors(x), tiles * groups)
                splits = max(1, min(splits, rows // (4 * config.depth)))
                partials = _vector(x, splits, weight_shape[0] * count)
                weight_grad_kernel[(tiles, splits, groups)](
                    grad_raw, x, partials, o_order.order, c_order.order, o_order.counts, c_order.counts, columns,
                    *sizes, out, per_group, o_stored // _align(o_stored), c_stored // _align(c_stored), count,
                    triton.cdiv(rows, splits), **taps, GATHER=gather, O_ALIGN=_align(o_stored),
                    C_ALIGN=_align(c_stored), PRECISION=precision, WIDE=_is_wide(x, grad_raw), BM=config.rows,
                    BN=config.cols, BK=config.depth, num_warps=config.warps, num_stages=config.stages,
                )  # fmt: skip
                return partials

            shape_class = (rows.bit_length(), out, per_group, groups, count if gather else None, *taps.values())
            masked = out_mask is None, in_mask is None
            kind = "weight half" if x.dtype != torch.float32 else precision
            kind = "gather" if gather and kind != "ieee" else kind
            configs = _configs(kind, count if gather else c_stored, rows)
            rows_cut = max(16, triton.next_power_of_2(out))
            configs = list(dict.fromkeys(config._replace(rows=min(config.rows, rows_cut)) for config in configs))
            partials = _tuned(("weight", x.device, x.dtype, precision, shape_class, masked), configs, launch)
        summed = grad if columns is None else _vector(x, weight_shape[0], count, dtype=x.dtype)
        weight_grad_sum_kernel[(triton.cdiv(summed.numel(), 256),)](
            partials, summed, out_mask, in_mask, summed.numel(), partials.shape[0], out, count, per_group, BLOCK=256
        )
        if columns is not None:
            grad.zero_().permute(0, 2, 3, 1).flatten(1).index_copy_(1, columns, summed)
    return grad


def _depthwise_weight_grad(
    grad_raw: Tensor,
    x: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    sizes: tuple[int, ...],
    taps: dict[str, int],
) -> Tensor:  # [splits, C * taps]
    channels = x.shape[1]
    rows = grad_raw.numel() // channels
    positions = taps["KH"] * taps["KW"]
    block, block_rows = _elementwise_tile(channels)
    tiles = triton.cdiv(channels, block)
    splits = triton.cdiv(8 * _processors(x), tiles * positions)
    splits = max(1, min(splits, rows // (4 * block_rows)))
    partials = _vector(x, splits, channels * positions)
    taps = {name: value for name, value in taps.items() if name != "KH"}
    depthwise_weight_grad_kernel[(tiles, positions, splits)](
        grad_raw, x, partials, in_mask, out_mask, *sizes, channels // _align(channels), triton.cdiv(rows, splits),
        **taps, ALIGN=_align(channels), WIDE=_is_wide(x, grad_raw), BM=block_rows, BN=block,
    )  # fmt: skip
    return partials


def bn_act(
    x: Tensor,  # [N, C, H, W]
    sums: Tensor,  # [C] float32
    squares: Tensor,  # [C] float32
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mask: Tensor | None,  # [C] float32
    residual: Tensor | None,  # [N, C, H, W]
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(mask ⊙ bn(x) + residual), the batch's mean and its biased variance [C] float32."""
    with torch.cuda.device_of(x):
        x, residual = _nhwc(x), _nhwc(residual)
        sums, squares, weight, bias, mask = map(_flat, (sums, squares, weight, bias, mask))
        channels = x.shape[1]
        rows = x.numel() // channels
        y, mean, var = _empty(x, x.shape), _vector(x, channels), _vector(x, channels)
        block, block_rows = _elementwise_tile(channels)
        bn_act_kernel[(triton.cdiv(rows, block_rows) * triton.cdiv(channels, block),)](
            x, y, residual, sums, squares, weight, bias, mask, mean, var, rows, channels // _align(channels), eps,
            ALIGN=_align(channels), ACT=act, BM=block_rows, BN=block, num_warps=8,
        )  # fmt: skip
    return y, mean, var


def bn_act_backward(
    grad_y: Tensor,  # [N, C, H, W]
    x: Tensor,
    sums: Tensor,  # [C]
    squares: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, with sums and squares held, and of sums, squares, weight, bias, mask and residual."""
    with torch.cuda.device_of(x):
        grad_x, grad_residual, grads = _epilogue_grad(grad_y, x, mask, weight, bias, residual, act, sums, squares, eps)
    grad_mask, grad_weight, grad_bias, grad_sums, grad_squares = grads
    assert grad_weight is not None and grad_bias is not None and grad_sums is not None and grad_squares is not None
    grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
    return grad_x, grad_sums, grad_squares, grad_weight, grad_bias, grad_mask, grad_residual


def backward_epilogue(
    grad_y: Tensor,  # [N, Cout, Ho, Wo]
    raw: Tensor,  # [N, Cout, Ho, Wo]
    out_mask: Tensor | None,  # [Cout]
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,  # [N, Cout, Ho, Wo]
    act: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of raw, residual, out_mask, scale and shift; zeros where out_mask is 0, but in the residual's."""
    with torch.cuda.device_of(raw):
        grad_raw, grad_residual, grads = _epilogue_grad(
            grad_y, raw, out_mask, scale, shift, residual, act, None, None, 0.0
        )
    return grad_raw, grad_residual, *grads[:3]


def _epilogue_grad(
    grad_y: Tensor,
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    sums: Tensor | None,
    squares: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """The gradients of x, of residual, and those per channel: of mask, scale, shift, sums and squares."""
    x, grad_y, residual = _nhwc(x), _nhwc(grad_y), _nhwc(residual)
    mask, scale, shift, sums, squares = map(_flat, (mask, scale, shift, sums, squares))
    channels = x.shape[1]
    rows = x.numel() // channels
    grad_x = _empty(x, x.shape)
    grad_residual = None if residual is None else _empty(residual, residual.shape)
    grads = [None if vector is None else _vector(x, channels) for vector in (mask, scale, shift, sums, squares)]
    block, block_rows = _elementwise_tile(channels)
    tiles = triton.cdiv(channels, block)
    programs = max(1, min(triton.cdiv(rows, block_rows), triton.cdiv(8 * _processors(x), tiles)))
    rows_per_program = triton.cdiv(triton.cdiv(rows, programs), block_rows) * block_rows
    partials = _vector(x, programs, 2, channels)
    epilogue_grad_kernel[(programs, tiles)](
        grad_y, x, residual, grad_x, grad_residual, sums, squares, scale, shift, mask, partials, rows,
        channels // _align(channels), rows_per_program, eps, ALIGN=_align(channels), ACT=act, BM=block_rows, BN=block,
        num_warps=8,
    )  # fmt: skip
    block = min(32, triton.next_power_of_2(channels))
    epilogue_grad_sum_kernel[(triton.cdiv(channels, block),)](
        partials, scale, shift, mask, sums, squares, *grads, channels, rows, programs, eps, BM=64, BN=block
    )
    return grad_x, grad_residual, grads


_POINTERS = {
    **dict.fromkeys(("order", "n_counts", "k_counts", "o_order", "c_order", "o_counts", "c_counts", "counts"), "*i32"),
    **dict.fromkeys(("scale", "shift", "mask", "in_mask", "out_mask", "partials", "sums", "squares"), "*fp32"),
    **dict.fromkeys(("mean_out", "var_out", "grad_mask", "grad_scale", "grad_shift"), "*fp32"),
    **dict.fromkeys(("grad_sums", "grad_squares", "products"), "*fp32"),
    "columns": "*i64",
    "places": "*i32",
}
_TENSORS = (
    *("a", "b", "x", "y", "raw", "weight", "bias", "residual", "factor", "grad", "grad_x", "grad_y", "grad_residual"),
    *("source", "target"),
)


def _static_case(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    absent: tuple[str, ...],
    constants: dict[str, Any],
    *,
    exact: tuple[str, ...] = (),  # the tensors that are float32 whatever the others are
    warps: int = 4,
    stages: int = 3,
    tensor_cores: bool = False,
    vectors: bool = True,
) -> dict[str, Any]:
    types = _POINTERS | dict.fromkeys(_TENSORS, f"*{_DTYPES[dtype]}") | dict.fromkeys(exact, "*fp32") | {"eps": "fp32"}
    constexprs = constants | dict.fromkeys(absent)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in names}
    pointers = [(i,) for i, name in enumerate(names) if signature[name].startswith("*")]
    return {
        "name": f"{name} {_DTYPES[dtype]}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": {pointer: [["tt.divisibility", 16]] for pointer in pointers},
        "num_warps": warps,
        "num_stages": stages,
        "expects": {"tensor_cores": tensor_cores, "loads_128": vectors},
    }


def static_cases() -> list[dict[str, Any]]:
    """What the compiler is asked about: every kernel in each class of call, every configuration of the main ones.

    A case has name, kernel, signature, constexprs, attrs (all pointers divisible by 16), num_warps, num_stages and
    expects: whether its code holds tensor-core instructions and 16-byte loads from global memory.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    three = {"KH": 3, "KW": 3, "SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1}
    two = three | {"SH": 2, "SW": 2}
    one = three | {"KH": 1, "KW": 1, "PH": 0, "PW": 0}
    conv = {
        "STEP_H": 1,
        "STEP_W": 1,
        "TRANSPOSED": False,
        "K_MAJOR": True,
        "GATHER": False,
        "BOUNDED": True,
        "EVEN_K": True,
        "N_ALIGN": 16,
        "K_ALIGN": 16,
        "ACT": "relu",
        "PRECISION": "tf32",
        "WIDE": False,
    }
    masked = {"EVEN_K": False}
    transposed = {"TRANSPOSED": True, "ACT": "none"}
    dense_absent = ("raw", "factor", "mask", "order", "n_counts", "k_counts", "columns", "partials")
    masked_absent = ("raw", "factor", "columns", "partials")
    bare = ("residual", "scale", "shift")
    grad_absent = (*dense_absent, *bare)
    masked_grad_absent = ("raw", "columns", *bare)
    columns_absent = ("raw", "factor", "mask", "order", "n_counts", "k_counts", "partials")
    columns_masked_absent = ("raw", "factor", "k_counts", "partials")
    stats_absent = ("y", "factor", "columns", *bare)

    def convolution(
        name: str,
        config: Config,
        absent: tuple[str, ...],
        changes: dict[str, Any],
        dtype: torch.dtype = bf16,
        exact: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        constants = three | conv | changes | {"BM": config.rows, "BN": config.cols, "BK": config.depth}
        constants["PARTS"] = _parts(config, "order" not in absent)
        name = f"conv {name} {config.rows}x{config.cols}x{config.depth}"
        return _static_case(
            name, conv_kernel, dtype, absent, constants, exact=exact, warps=config.warps, stages=config.stages,
            tensor_cores=constants["PRECISION"] != "ieee",
        )  # fmt: skip

    def weight_grad(
        name: str,
        config: Config,
        absent: tuple[str, ...],
        changes: dict[str, Any],
        dtype: torch.dtype = bf16,
        vectors: bool = True,
    ) -> dict[str, Any]:
        constants = three | {"GATHER": False, "O_ALIGN": 16, "C_ALIGN": 16, "PRECISION": "tf32", "WIDE": False}
        constants |= changes | {"BM": config.rows, "BN": config.cols, "BK": config.depth}
        name = f"weight grad {name} {config.rows}x{config.cols}x{config.depth}"
        return _static_case(
            name, weight_grad_kernel, dtype, absent, constants, warps=config.warps, stages=config.stages,
            tensor_cores=constants["PRECISION"] != "ieee", vectors=vectors,
        )  # fmt: skip

    half, weight_half, gather, tf32, ieee = (
        _CONFIGS[kind] for kind in ("half", "weight half", "gather", "tf32", "ieee")
    )
    scattered = _configs("half", 256, 256, True)
    pointwise = one | {"BOUNDED": False}
    unpacked = ("o_order", "c_order", "o_counts", "c_counts")
    precise = {"PRECISION": "ieee"}
    wide = {"WIDE": True, "batch": 1}  # which is a constant in the code, as every argument of 1
    cases = [convolution("3x3", config, dense_absent, {}) for config in half]
    cases += [convolution("3x3 masked", config, masked_absent, masked) for config in scattered]
    cases += [
        convolution("3x3 masked input grad", config, masked_grad_absent, masked | transposed) for config in scattered
    ]
    cases += [convolution("3x3 tf32", config, dense_absent, {}, fp32) for config in tf32]
    cases += [convolution("3x3 ieee", config, dense_absent, precise, fp32) for config in ieee]
    cases += [convolution("columns", config, columns_absent, {"GATHER": True}) for config in gather]
    cases += [weight_grad("3x3", config, (*unpacked, "columns"), {}) for config in weight_half]
    strided = two | transposed | {"K_MAJOR": False, "STEP_H": 2, "STEP_W": 2}
    cases += [
        convolution("3x3", half[0], dense_absent, {}, fp16),
        convolution("3x3 stride 2", half[0], dense_absent, two),
        convolution("3x3 int64", half[0], dense_absent, wide),
        convolution("3x3 masked input grad int64", scattered[0], masked_grad_absent, masked | transposed | wide),
        convolution("columns int64", gather[0], columns_absent, {"GATHER": True} | wide),
        convolution("3x3 gelu, raw kept", half[0], dense_absent[1:], {"ACT": "gelu"}),
        convolution("3x3 stats", half[0], (*stats_absent, "mask", "order", "n_counts", "k_counts"), {"ACT": "none"}),
        convolution("3x3 masked stats", half[0], stats_absent, masked | {"ACT": "none"}),
        convolution("3x3 masked, raw kept", half[0], masked_absent[1:], masked),
        convolution("3x3 masked tf32", tf32[0], masked_absent, masked, fp32),
        convolution("3x3 masked ieee", ieee[0], masked_absent, masked | precise, fp32),
        convolution("3x3 masked input grad tf32", tf32[0], masked_grad_absent, masked | transposed, fp32),
        convolution("3x3 input grad", half[0], grad_absent, transposed | {"K_MAJOR": False}),
        convolution("3x3 input grad stride 2", half[0], grad_absent, strided),
        convolution("3x3 input grad tf32", tf32[0], grad_absent, transposed, fp32),
        convolution("1x1", half[0], dense_absent, pointwise),
        convolution("1x1 masked", half[0], masked_absent, pointwise | masked),
        convolution("columns masked", gather[0], columns_masked_absent, {"GATHER": True}),
        convolution("products", half[0], grad_absent, pointwise | transposed | {"K_MAJOR": False}, exact=("y",)),
        weight_grad("1x1", weight_half[0], (*unpacked, "columns"), one),
        weight_grad("3x3 masked", weight_half[0], ("columns",), {}),
        weight_grad("columns", gather[0], unpacked, {"GATHER": True}),
        weight_grad("3x3 int64", weight_half[0], (*unpacked, "columns"), wide),
        weight_grad("3x3 ieee", ieee[0], (*unpacked, "columns"), precise, fp32),
        # The tensor cores want tf32 with the pixels side by side, so the copies are of 4 bytes.
        weight_grad("3x3 tf32", tf32[0], (*unpacked, "columns"), {}, fp32, vectors=False),
    ]
    tile = {"ALIGN": 16, "BM": 32, "BN": 128}
    depthwise = three | tile | {"TRANSPOSED": False, "ACT": "relu", "WIDE": False}
    weight_tile = {name: value for name, value in three.items() if name != "KH"} | tile | {"WIDE": False}
    packed = {"BLOCK_ROWS": 32, "BLOCK": 64}
    for dtype in (bf16, fp32):
        cases += [
            _static_case("depthwise 3x3", depthwise_kernel, dtype, ("raw", "factor", "partials"), depthwise),
            _static_case("depthwise 3x3 input grad", depthwise_kernel, dtype, ("raw", *bare), depthwise | transposed),
            _static_case("depthwise 3x3 weight grad", depthwise_weight_grad_kernel, dtype, (), weight_tile),
            _static_case("batch norm", bn_act_kernel, dtype, (), tile | {"ACT": "relu"}, warps=8),
            _static_case("batch norm grad", epilogue_grad_kernel, dtype, (), tile | {"ACT": "relu"}, warps=8),
            _static_case(
                "epilogue grad", epilogue_grad_kernel, dtype, ("sums", "squares"), tile | {"ACT": "gelu"}, warps=8
            ),
            _static_case("pack", pack_kernel, dtype, (), packed, vectors=False),
            _static_case("column sum", column_sum_kernel, dtype, (), three | tile | {"WIDE": False}, vectors=False),
        ]
    reduction = {"BM": 64, "BN": 32}
    cases += [
        _static_case("depthwise 3x3 int64", depthwise_kernel, bf16, ("raw", "factor", "partials"), depthwise | wide),
        _static_case("depthwise 3x3 weight grad int64", depthwise_weight_grad_kernel, bf16, (), weight_tile | wide),
        _static_case("epilogue grad sum", epilogue_grad_sum_kernel, fp32, (), reduction, vectors=False),
        _static_case("weight grad sum", weight_grad_sum_kernel, bf16, (), {"BLOCK": 256}, vectors=False),
        _static_case("compact", compact_kernel, fp32, (), {"BLOCK": 1024}, vectors=False),
    ]
    return cases

"""Keep ratios to masks, and mask gradients back to keep ratios: one program per group, one launch each way.

The forward keeps a group's first 2048 channels in registers while it looks for the threshold; what a wider group has
beyond them is read again in every evaluation, of which Newton's method needs about four. The step sums its group's mask
gradients, and every program looks the whole cost up for itself: the tables of a network are a few thousand numbers, and
reading them 64 times from the cache is cheaper than a second launch.

Formulas: hwprune.ops.reference. Nothing is checked here: hwprune.ops does.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_CLIP = tl.constexpr(20.0)
_FLOOR = tl.constexpr(0.01)
_TOLERANCE = tl.constexpr(2.0**-16)
_LAST_STEP = tl.constexpr(2.0**-10)  # csrc/include/soft_threshold.h says why this is small enough
_SMALLEST_IMPORTANCE = tl.constexpr(1.17549435e-38)
_MAX_ITERATIONS = tl.constexpr(64)

_FORWARD_BLOCK, _FORWARD_WARPS = 2048, 8
_STEP_BLOCK, _STEP_WARPS = 1024, 4
_TERMS = 32  # of the cost, at a time
_MOST_REGISTERS = 128  # said, because unasked the compiler stays below 64 and spills


@triton.jit
def _scaled(importance, at, end, temperature, largest):
    """z of channels at threshold 0, whose largest is 0. What lies beyond the group's end is not read."""
    value = tl.load(importance + at, mask=at < end, other=1.0)
    return temperature * (tl.log(tl.maximum(value, _SMALLEST_IMPORTANCE)) - largest)


@triton.jit
def _soft(z):
    return 1 / (1 + tl.exp(-tl.minimum(tl.maximum(z, -_CLIP), _CLIP)))


@triton.jit
def _mass(z, inside, s):
    """The sum of p over the channels inside, and how fast it falls with s."""
    soft = _soft(z - s)
    total = tl.sum(tl.where(inside, tl.minimum(soft + _FLOOR, 1.0), 0.0), 0)
    slope = tl.sum(tl.where(inside & (soft + _FLOOR < 1), soft * (1 - soft), 0.0), 0)
    return total, slope


@triton.jit
def _uniforms(seed, at):
    """Numbers `at` of the seed: word at % 4 of block at // 4."""
    w0, w1, w2, w3 = tl.randint4x(seed, at // 4)
    word = at % 4
    bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 2.0**-24


@triton.jit
def _draw(z, at, end, s, uniforms, seed, probability, mask, SEEDED: tl.constexpr):
    inside = at < end
    p = tl.minimum(_soft(z - s) + _FLOOR, 1.0)
    uniform = _uniforms(seed, at) if SEEDED else tl.load(uniforms + at, mask=inside, other=1.0)
    tl.store(probability + at, p, mask=inside)
    tl.store(mask + at, (uniform < p).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def ratio_forward_kernel(
    theta,
    importance,
    offsets,
    uniforms,
    seed,
    temperature,
    log_threshold,
    probability,
    mask,
    SEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    start = tl.load(offsets + group)  # int64, and so is all that is counted from it
    end = tl.load(offsets + group + 1)
    lanes = tl.arange(0, BLOCK)
    at = start + lanes
    inside = at < end
    width = (end - start).to(tl.float32)

    log_b = _scaled(importance, at, end, 1.0, 0.0)
    largest = tl.max(tl.where(inside, log_b, -float("inf")), 0)
    least = tl.min(tl.where(inside, log_b, float("inf")), 0)
    for base in range(start + BLOCK, end, BLOCK):
        rest = _scaled(importance, base + lanes, end, 1.0, 0.0)
        largest = tl.maximum(largest, tl.max(tl.where(base + lanes < end, rest, -float("inf")), 0))
        least = tl.minimum(least, tl.min(tl.where(base + lanes < end, rest, float("inf")), 0))

    z = temperature * (log_b - largest)
    mean = tl.sum(tl.where(inside, z, 0.0), 0)
    square = tl.sum(tl.where(inside, z * z, 0.0), 0)
    for base in range(start + BLOCK, end, BLOCK):
        rest = _scaled(importance, base + lanes, end, temperature, largest)
        mean += tl.sum(tl.where(base + lanes < end, rest, 0.0), 0)
        square += tl.sum(tl.where(base + lanes < end, rest * rest, 0.0), 0)
    mean /= width
    variance = tl.maximum(square / width - mean * mean, 0.0)

    # Newton's method inside a bracket, as Threshold of csrc/include/soft_threshold.h.
    ratio = tl.sigmoid(tl.load(theta + group))
    wanted = ratio * width
    low = temperature * (least - largest) - _CLIP
    high = low * 0 + _CLIP
    last_width = 2 * (high - low)
    soft = tl.minimum(tl.maximum(ratio - _FLOOR, 1e-3), 1 - 1e-3)
    s = mean - tl.sqrt(1 + 0.3926991 * variance) * tl.log(soft / (1 - soft))
    s = tl.minimum(tl.maximum(s, low), high)
    iteration = 0
    moving = 1
    while (moving == 1) & (iteration < _MAX_ITERATIONS):
        total, slope = _mass(z, inside, s)
        for base in range(start + BLOCK, end, BLOCK):
            rest = _scaled(importance, base + lanes, end, temperature, largest)
            more, steeper = _mass(rest, base + lanes < end, s)
            total += more
            slope += steeper
        low = tl.where(total > wanted, s, low)
        high = tl.where(total > wanted, high, s)
        shrinking = high - low <= 0.5 * last_width
        last_width = high - low
        step = (total - wanted) / tl.maximum(slope, 1e-30)
        newton = (s + step >= low) & (s + step <= high) & (shrinking | (tl.abs(step) < 0.25 * last_width))
        done = tl.where(newton, tl.abs(step) <= _LAST_STEP, last_width <= _TOLERANCE)
        s = tl.where(newton, s + step, 0.5 * (low + high))
        moving = tl.where(done, 0, 1)
        iteration += 1

    _draw(z, at, end, s, uniforms, seed, probability, mask, SEEDED)
    for base in range(start + BLOCK, end, BLOCK):
        rest = _scaled(importance, base + lanes, end, temperature, largest)
        _draw(rest, base + lanes, end, s, uniforms, seed, probability, mask, SEEDED)
    tl.store(log_threshold + group, largest + s / temperature)


@triton.jit
def _places(
    axis, before, members, weights, origin, starts, per_step, most, intervals, M: tl.constexpr, K: tl.constexpr
):
    """Where axes [B] stand at the ratios sigmoid(before): interval, position in it, and 1 / its length."""
    member = tl.arange(0, M)[None, :]
    row = axis[:, None] * most + member
    group = tl.load(members + row, mask=member < most, other=0)
    ratio = tl.sigmoid(tl.load(before + group))
    weight = tl.load(weights + row, mask=member < most, other=0.0)
    size = tl.load(origin + axis) + tl.sum(weight * ratio, 1)

    knot = tl.arange(0, K)[None, :]
    begins = tl.load(starts + axis[:, None] * intervals + knot, mask=knot < intervals, other=float("inf"))
    interval = tl.sum(((knot > 0) & (begins <= size[:, None])).to(tl.int32), 1)
    cell = axis * intervals + interval
    rate = tl.load(per_step + cell)
    part = tl.minimum(tl.maximum((size - tl.load(starts + cell)) * rate, 0.0), 1.0)
    return interval, part, rate


@triton.jit
def _terms(
    term,
    before,
    members,
    weights,
    origin,
    starts,
    per_step,
    pair,
    base,
    strides,
    flat,
    most,
    intervals,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """Values of terms [B], and their slopes along both axes."""
    place_a, u, rate_a = _places(
        tl.load(pair + 2 * term), before, members, weights, origin, starts, per_step, most, intervals, M, K
    )
    place_b, v, rate_b = _places(
        tl.load(pair + 2 * term + 1), before, members, weights, origin, starts, per_step, most, intervals, M, K
    )
    right = tl.load(strides + 2 * term)
    up = tl.load(strides + 2 * term + 1)
    corner = flat + tl.load(base + term) + place_a * right + place_b * up
    t00 = tl.load(corner)
    t10 = tl.load(corner + right)
    t01 = tl.load(corner + up)
    t11 = tl.load(corner + right + up)
    low = t00 + u * (t10 - t00)
    high = t01 + u * (t11 - t01)
    by_a = ((1 - v) * (t10 - t00) + v * (t11 - t01)) * rate_a
    return low + v * (high - low), by_a, (high - low) * rate_b


@triton.jit
def ratio_step_kernel(
    grad_mask,
    probability,
    offsets,
    before,
    members,
    weights,
    origin,
    starts,
    per_step,
    pair,
    base,
    strides,
    flat,
    uses,
    use_weights,
    theta,
    exp_avg,
    exp_avg_sq,
    ratio_grad,
    cost,
    cost_grad,
    most_members,
    intervals,
    terms,
    most_uses,
    multiplier,
    penalty,
    cut,
    rate,
    keep1,
    take1,
    keep2,
    take2,
    correction2,
    eps,
    PRICED: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group's step. `rate` is lr / (1 - β₁^step), `correction2` 1 / (1 - β₂^step); keep is β and take 1 - β."""
    group = tl.program_id(0)
    start = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        p = tl.load(probability + at, mask=at < end, other=1.0)
        soft = p - _FLOOR
        spread = tl.where(p < 1, soft * (1 - soft), 0.0)  # at the cap p no longer moves
        near = spread > cut
        # Only what is near is read.
        total += tl.where(near, spread, 0.0)
        weighted += tl.where(near, spread * tl.load(grad_mask + at, mask=near & (at < end), other=0.0), 0.0)
    mass = tl.sum(total, 0)
    width = (end - start).to(tl.float32)
    mask_grad = tl.where(mass > 0, width * tl.sum(weighted, 0) / tl.where(mass > 0, mass, 1.0), 0.0)

    pull = multiplier
    if PRICED:
        lanes = tl.arange(0, TERMS)
        value = tl.zeros([TERMS], tl.float32)
        for first in range(0, terms, TERMS):
            term = first + lanes
            safe = tl.where(term < terms, term, 0)
            here, _, _ = _terms(
                safe, before, members, weights, origin, starts, per_step, pair, base, strides, flat,
                most_members, intervals, M, K,
            )  # fmt: skip
            value += tl.where(term < terms, here, 0.0)
        slope = tl.zeros([TERMS], tl.float32)
        for first in range(0, most_uses, TERMS):
            use = first + lanes
            moved = tl.load(uses + group * most_uses + use, mask=use < most_uses, other=0)
            weight = tl.load(use_weights + group * most_uses + use, mask=use < most_uses, other=0.0)
            _, by_a, by_b = _terms(
                moved // 2, before, members, weights, origin, starts, per_step, pair, base, strides, flat,
                most_members, intervals, M, K,
            )  # fmt: skip
            slope += weight * tl.where(moved % 2 == 0, by_a, by_b)
        price = tl.sum(value, 0)
        group_cost_grad = tl.sum(slope, 0)
        tl.store(cost_grad + group, group_cost_grad)
        tl.store(cost, price, mask=group == 0)
        pull += penalty * price
    else:
        group_cost_grad = tl.load(cost_grad + group)

    whole = mask_grad + pull * group_cost_grad
    old = tl.load(before + group)
    ratio = tl.sigmoid(old)
    grad = whole * ratio * (1 - ratio)
    mean = keep1 * tl.load(exp_avg + group) + take1 * grad
    square = keep2 * tl.load(exp_avg_sq + group) + take2 * grad * grad
    tl.store(exp_avg + group, mean)
    tl.store(exp_avg_sq + group, square)
    tl.store(theta + group, old - rate * mean / (tl.sqrt(square * correction2) + eps))
    tl.store(ratio_grad + group, whole)


def ratio_forward(
    theta: Tensor,  # [G]
    importance: Tensor,  # [ΣC]
    offsets: Tensor,  # [G+1]
    uniforms: Tensor | None,  # [ΣC]
    seed: int,
    temperature: float,
    log_threshold: Tensor,  # [G], written
    probability: Tensor,  # [ΣC], written
    mask: Tensor,  # [ΣC], written
) -> None:
    if len(theta):
        ratio_forward_kernel[(len(theta),)](
            theta,
            importance,
            offsets,
            importance if uniforms is None else uniforms,
            seed,
            temperature,
            log_threshold,
            probability,
            mask,
            SEEDED=uniforms is None,
            BLOCK=_FORWARD_BLOCK,
            num_warps=_FORWARD_WARPS,
            maxnreg=_MOST_REGISTERS,
        )


def ratio_step(
    grad_mask: Tensor,  # [ΣC]
    probability: Tensor,  # [ΣC]
    offsets: Tensor,  # [G+1]
    cost_grad: Tensor,  # [G]
    theta: Tensor,  # [G], updated
    exp_avg: Tensor,  # [G], updated
    exp_avg_sq: Tensor,  # [G], updated
    ratio_grad: Tensor,  # [G], written
    *scalars: float,  # multiplier, cut, lr, beta1, beta2, eps, step
) -> None:
    multiplier, *rest = scalars
    tables = (theta,) * 11  # not looked at
    state = theta, exp_avg, exp_avg_sq, ratio_grad, ratio_grad, cost_grad
    _launch_step((grad_mask, probability, offsets, theta, *tables, *state), (0, 0, 0, 0), multiplier, 0.0, *rest)


def ratio_step_priced(
    grad_mask: Tensor,  # [ΣC]
    probability: Tensor,  # [ΣC]
    offsets: Tensor,  # [G+1]
    tables: tuple[Tensor, ...],  # hwprune.ops.CostTables
    theta: Tensor,  # [G], updated
    exp_avg: Tensor,  # [G], updated
    exp_avg_sq: Tensor,  # [G], updated
    ratio_grad: Tensor,  # [G], written
    cost: Tensor,  # [], written
    cost_grad: Tensor,  # [G], written
    *scalars: float,  # multiplier, penalty, cut, lr, beta1, beta2, eps, step
) -> None:
    before = theta.clone()  # every program reads all ratios, and no program waits for another
    state = theta, exp_avg, exp_avg_sq, ratio_grad, cost, cost_grad
    sizes = tables[0].shape[1], tables[3].shape[1], tables[6].shape[0], tables[9].shape[1]
    _launch_step((grad_mask, probability, offsets, before, *tables, *state), sizes, *scalars)


def _launch_step(
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, int, int, int],  # most members, intervals, terms, most uses; all 0 where cost_grad is given
    multiplier: float,
    penalty: float,
    cut: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: float,
) -> None:
    groups = len(tensors[3])
    if groups:
        adam = lr / (1 - beta1**step), beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta2**step), eps
        ratio_step_kernel[(groups,)](
            *tensors,
            *sizes,
            multiplier,
            penalty,
            cut,
            *adam,
            PRICED=sizes[2] > 0,
            M=triton.next_power_of_2(max(sizes[0], 1)),
            K=triton.next_power_of_2(max(sizes[1], 1)),
            TERMS=_TERMS,
            BLOCK=_STEP_BLOCK,
            num_warps=_STEP_WARPS,
            maxnreg=_MOST_REGISTERS,
        )


def static_cases() -> list[dict[str, Any]]:
    """What the compiler is asked about; see hwprune.ops.static. Groups begin anywhere, so no load is 16 bytes wide."""
    return [
        _static_case(
            f"ratio_forward {'seed' if seeded else 'uniforms'}", ratio_forward_kernel, _FORWARD_WARPS,
            SEEDED=seeded, BLOCK=_FORWARD_BLOCK,
        )
        for seeded in (False, True)
    ] + [
        _static_case(
            f"ratio_step {'priced' if priced else 'given'}", ratio_step_kernel, _STEP_WARPS,
            PRICED=priced, M=4, K=16, TERMS=_TERMS, BLOCK=_STEP_BLOCK,
        )
        for priced in (False, True)
    ]  # fmt: skip


def _static_case(name: str, kernel: Any, warps: int, **constexprs: int) -> dict[str, Any]:
    types = dict.fromkeys(("offsets", "members", "pair", "base", "strides", "uses"), "*i64")
    types |= dict.fromkeys(("most_members", "intervals", "terms", "most_uses"), "i32") | {"seed": "i64"}
    scalars = ("multiplier", "penalty", "cut", "rate", "keep1", "take1", "keep2", "take2", "correction2", "eps")
    types |= dict.fromkeys((*scalars, "temperature"), "fp32") | dict.fromkeys(constexprs, "constexpr")
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    return {
        "name": name,
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"},
        "num_warps": warps,
        "num_stages": 1,
        "maxnreg": _MOST_REGISTERS,
        "expects": {"tensor_cores": False, "loads_128": False},
    }

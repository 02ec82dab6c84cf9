"""Every operator in plain torch: the truth that the other backends are tested against, in float64 where asked."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 20.0
FLOOR = 0.01  # every channel keeps at least one chance in a hundred
# How closely the threshold is solved, in units of the sigmoid's argument.
_TOLERANCE = {torch.float32: 2.0**-16, torch.float64: 2.0**-40}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
}


def group_index(offsets: Tensor) -> Tensor:
    """The group that each channel belongs to: int64 [ΣC] from offsets [G+1]."""
    groups = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(groups, offsets.diff())


def group_sum(values: Tensor, index: Tensor, groups: int) -> Tensor:
    """Sums a flat ragged array [ΣC] over each group: [G]."""
    return values.new_zeros(groups).index_add_(0, index, values)


def spread(p: Tensor) -> Tensor:
    """σ(1-σ) of the sigmoid σ behind a keep probability p, and 0 where p is capped at 1 and no longer moves."""
    soft = p - FLOOR
    return torch.where(p < 1, soft * (1 - soft), 0)


class CostTables(NamedTuple):
    """A cost as a sum of terms, each tabulated over the sizes of two axes and bilinear in between.

    An axis has the size origin + Σ weights · ratio[members], in elements. Below its first start an axis costs what that
    costs and keeps the slope; likewise above its last interval. What takes no axis takes one of one knot, without
    weights. Floats have the dtype and all have the device of the ratios.
    `hwprune.latency.CostModel.tables` makes them from a measured model.
    """

    members: Tensor  # [A, M] int64, groups
    weights: Tensor  # [A, M], elements per unit of the ratio; 0 where there are fewer members
    origin: Tensor  # [A], elements that no group moves
    starts: Tensor  # [A, K], where the intervals begin, ascending; infinite where there are fewer
    per_step: Tensor  # [A, K], 1 / the interval's length; 0 where there is none
    pair: Tensor  # [T, 2] int64, the axes of a term
    base: Tensor  # [T] int64, its table's first entry in `flat`
    strides: Tensor  # [T, 2] int64, entries from knot to knot; 0 along an axis of one knot
    flat: Tensor  # [F], the tables end to end
    uses: Tensor  # [G, U] int64, slopes that a group moves: 2 · term + (0 or 1)
    use_weights: Tensor  # [G, U], as `weights`


_PHILOX_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_PHILOX_INCREMENTS = 0x9E3779B9, 0xBB67AE85


def philox_uniforms(seed: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The first `count` uniform numbers of a seed, in [0, 1): [count] float32, the same bits in every backend.

    Philox4x32-10 of Salmon et al. (SC 2011): number i is the upper 24 bits of word i % 4 of the block whose 128-bit
    counter is i // 4 and whose 64-bit key is the seed.
    """
    low = 0xFFFFFFFF
    counter = torch.arange((count + 3) // 4, device=device)
    words = [counter & low, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    keys = [seed & low, seed >> 32 & low]
    for _ in range(10):
        # The product of two words wraps around int64, whose bits are still those of the product.
        even, odd = (words[2 * i] * multiplier for i, multiplier in enumerate(_PHILOX_MULTIPLIERS))
        words = [
            (odd >> 32 & low) ^ words[1] ^ keys[0],
            odd & low,
            (even >> 32 & low) ^ words[3] ^ keys[1],
            even & low,
        ]
        keys = [(key + increment) & low for key, increment in zip(keys, _PHILOX_INCREMENTS, strict=True)]
    return (torch.stack(words, 1).flatten()[:count] >> 8).float() * 2.0**-24


def ratio_forward(
    theta: Tensor,  # [G]
    importance: Tensor,  # [ΣC]
    offsets: Tensor,  # [G+1]
    temperature: float,
    uniforms: Tensor,  # [ΣC]
) -> tuple[Tensor, Tensor, Tensor]:
    """See hwprune.ops.ratio_forward. Bisects all groups at once."""
    groups, index = len(theta), group_index(offsets)
    widths = offsets.diff().to(theta.dtype)
    log_importance = importance.clamp_min(torch.finfo(torch.float32).tiny).log()
    largest = torch.full_like(theta, -math.inf).scatter_reduce_(0, index, log_importance, "amax")
    smallest = torch.full_like(theta, math.inf).scatter_reduce_(0, index, log_importance, "amin")
    # In s = temperature * (log threshold - log largest importance) the tolerance is a constant, hence proportional to
    # 1 / temperature in the log threshold.
    scaled = temperature * (log_importance - largest[index])  # [ΣC]

    def keep_probability(s: Tensor) -> Tensor:
        return ((scaled - s[index]).clamp(-CLIP, CLIP).sigmoid() + FLOOR).clamp_max(1)

    wanted = theta.sigmoid() * widths
    low, high = temperature * (smallest - largest) - CLIP, torch.full_like(theta, CLIP)
    for _ in range(math.ceil(math.log2(float((high - low).max()) / _TOLERANCE[theta.dtype])) if groups else 0):
        middle = (low + high) / 2
        too_many = group_sum(keep_probability(middle), index, groups) > wanted
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    s = (low + high) / 2
    p = keep_probability(s)
    return largest + s / temperature, p, (uniforms < p).to(p.dtype)


def ratio_step(
    theta: Tensor,  # [G], updated
    grad_mask: Tensor,  # [ΣC]
    p: Tensor,  # [ΣC]
    offsets: Tensor,  # [G+1]
    cost_grad: Tensor,  # [G]
    multiplier: float,
    exp_avg: Tensor,  # [G], updated
    exp_avg_sq: Tensor,  # [G], updated
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    cut: float,
) -> Tensor:  # [G]
    """See hwprune.ops.ratio_step."""
    groups, index = len(theta), group_index(offsets)
    weight = spread(p)
    near = weight > cut
    total = group_sum(torch.where(near, weight, 0), index, groups)
    weighted = group_sum(torch.where(near, weight * grad_mask, 0), index, groups)
    mask_grad = torch.where(total > 0, offsets.diff() * weighted / total.where(total > 0, 1), 0)
    ratio_grad = mask_grad + multiplier * cost_grad
    ratio = theta.sigmoid()
    grad = ratio_grad * ratio * (1 - ratio)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    root = (exp_avg_sq / (1 - betas[1] ** step)).sqrt_().add_(eps)
    theta.addcdiv_(exp_avg, root, value=-lr / (1 - betas[0] ** step))
    return ratio_grad


def table_cost(ratio: Tensor, tables: CostTables) -> tuple[Tensor, Tensor]:
    """The cost at ratios [G] and its gradient by them: [] and [G]."""
    sizes = tables.origin + (tables.weights * ratio[tables.members]).sum(1)  # [A]
    interval = (tables.starts[:, 1:] <= sizes[:, None]).sum(1, keepdim=True)  # [A, 1]
    start, per_step = (line.gather(1, interval)[:, 0] for line in (tables.starts, tables.per_step))
    part = ((sizes - start) * per_step).clamp(0, 1)
    (a, b), (right, up) = tables.pair.T, tables.strides.T  # [T] each
    u, v = part[a], part[b]
    corner = tables.base + interval[a, 0] * right + interval[b, 0] * up
    t00, t10 = tables.flat[corner], tables.flat[corner + right]
    t01, t11 = tables.flat[corner + up], tables.flat[corner + right + up]
    low, high = t00 + u * (t10 - t00), t01 + u * (t11 - t01)
    by_a = ((1 - v) * (t10 - t00) + v * (t11 - t01)) * per_step[a]
    by_b = (high - low) * per_step[b]
    slopes = torch.stack([by_a, by_b], 1).flatten()  # [T * 2]
    return (low + v * (high - low)).sum(), (tables.use_weights * slopes[tables.uses]).sum(1)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def apply_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [N, C, H, W] times mask [C]. Where the mask is exactly 0 nothing is read, not even a NaN, and no gradient flows
    to x or to the mask."""
    if mask is None:
        return x
    mask = _per_channel(mask.to(x.dtype))
    return torch.where(mask != 0, x, 0) * mask


def widened(x: Tensor) -> Tensor:
    """x in the dtype in which sums are taken: float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def columns_only(weight: Tensor, columns: Tensor | None) -> Tensor:
    """weight [Cout, Cin, kH, kW] with zeros in the columns that are not listed."""
    if columns is None:
        return weight
    cout, cin, height, width = weight.shape
    flat = weight.permute(0, 2, 3, 1).reshape(cout, -1)  # [Cout, kH * kW * Cin]
    flat = torch.zeros_like(flat).index_copy(1, columns, flat.index_select(1, columns))
    return flat.view(cout, height, width, cin).permute(0, 3, 1, 2)


def masked_conv2d(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin / groups, kH, kW]
    in_mask: Tensor | None,  # [Cin]
    out_mask: Tensor | None,  # [Cout]
    scale: Tensor | None,  # [Cout]
    shift: Tensor | None,  # [Cout]
    residual: Tensor | None,  # [N, Cout, Ho, Wo]
    act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    columns: Tensor | None,  # [K]
) -> Tensor:  # [N, Cout, Ho, Wo]
    """See hwprune.ops.masked_conv2d."""
    weight = columns_only(weight, columns)
    raw = F.conv2d(apply_mask(x, in_mask), weight, None, stride, padding, dilation, groups)
    return epilogue(raw, out_mask, scale, shift, residual, act)


def epilogue(
    raw: Tensor,  # [N, C, H, W]
    mask: Tensor | None,  # [C]
    scale: Tensor | None,  # [C]
    shift: Tensor | None,  # [C]
    residual: Tensor | None,  # [N, C, H, W]
    act: str,
) -> Tensor:  # [N, C, H, W]
    """act(mask ⊙ (scale ⊙ raw + shift) + residual), in float32 at least, rounded once to the dtype of raw."""
    y = widened(raw)
    if scale is not None:
        y = y * _per_channel(scale)
    if shift is not None:
        y = y + _per_channel(shift)
    y = apply_mask(y, mask)
    return ACTIVATIONS[act](y if residual is None else y + residual).to(raw.dtype)


def channel_sums(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C, H, W] with the channels whose mask is exactly 0 zeroed; its sums and sums of squares [C], accumulated in
    float32 at least."""
    if mask is not None:
        x = torch.where(_per_channel(mask) != 0, x, 0)
    wide = widened(x)
    return x, wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))


def bn_affine(
    sums: Tensor, squares: Tensor, weight: Tensor, bias: Tensor, count: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """BatchNorm over `count` elements per channel as scale and shift; and the mean and biased variance. All [C]."""
    mean = sums / count
    var = (squares / count - mean.square()).clamp_min(0)
    scale = weight * (var + eps).rsqrt()
    return scale, bias - mean * scale, mean, var


def bn_affine_backward(
    grad_scale: Tensor,
    grad_shift: Tensor,
    sums: Tensor,
    squares: Tensor,
    weight: Tensor,
    count: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `bn_affine`'s sums, squares, weight and bias from those of its scale and shift. All [C]."""
    mean = sums / count
    var = squares / count - mean.square()
    inverse = (var.clamp_min(0) + eps).rsqrt()
    grad_scale = grad_scale - grad_shift * mean  # the shift holds the scale, too
    grad_var = torch.where(var > 0, grad_scale * weight * inverse.pow(3) / -2, 0)
    grad_mean = -grad_shift * weight * inverse - 2 * mean * grad_var
    return grad_mean / count, grad_var / count, grad_scale * inverse, grad_shift


def masked_bn_act(
    x: Tensor,  # [N, C, H, W]
    sums: Tensor,  # [C]
    squares: Tensor,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mask: Tensor | None,  # [C]
    residual: Tensor | None,  # [N, C, H, W]
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See hwprune.ops.masked_bn_act."""
    scale, shift, mean, var = bn_affine(sums, squares, weight, bias, x.numel() // x.shape[1], eps)
    return epilogue(x, mask, scale, shift, residual, act), mean, var

"""Keep ratios to channel masks and mask gradients back to keep ratios, for all groups at once.

The differentiable sparsity allocation of Ning et al. (ECCV 2020, arXiv 2004.02164), on flat ragged arrays: group g
owns the channels offsets[g] to offsets[g + 1]. Which channels a ratio keeps is decided by their importance b; how
sharply, by the temperature:

    p_i = min(sigmoid(clip(temperature * (log b_i - log threshold), ±20)) + 0.01, 1),    mean of p over a group = α

Differentiating that condition gives dp_i/dα = C q_i / Σ_j q_j with q = σ(1-σ): the channels near the threshold carry
the gradient of the ratio. The authors' code ignores the floor of 0.01 and the cap at 1 in this derivative; here both
are differentiated, so that it agrees with finite differences.
"""

import torch
from torch import Tensor

from hwprune.errors import InvalidInput
from hwprune.ops import _native, reference


def ratio_forward(
    theta: Tensor,  # [G]
    importance: Tensor,  # [ΣC]
    offsets: Tensor,  # [G+1]
    temperature: float,
    uniforms: Tensor,  # [ΣC]
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Solves every group's threshold for its keep ratio α = sigmoid(theta), and draws Bernoulli masks.

    Args:
        theta: [G], float32 or float64; gives the dtype and device of the others.
        importance: [ΣC], at least 0. No gradient flows into it.
        offsets: [G+1] int64, strictly increasing from 0 to ΣC.
        temperature: sharpness, above 0; the tolerance on the log threshold is proportional to its inverse.
        uniforms: [ΣC] in [0, 1), the randomness of the masks.
        backend: "auto", "reference", "cpp" (float32 on the CPU) or "cuda" (float32 on a CUDA device).

    Returns:
        log_threshold [G], p [ΣC] and m [ΣC], which is 1 where uniforms < p and else 0. Gradients reach theta from the
        first two by implicit differentiation, from m as if it were p (straight through). A ratio below 0.01, where no
        threshold exists, leaves every channel at p = 0.01.

    Raises:
        InvalidInput: shapes, dtypes or values do not fit.
        BackendUnavailable: the backend asked for is absent or does not take these tensors.
    """
    _check_flat(theta, offsets, importance=importance, uniforms=uniforms)
    if not temperature > 0:
        raise InvalidInput(f"temperature={temperature} must be above 0")
    log_threshold, p, m = _forward(theta, importance, offsets, temperature, uniforms, backend)
    return log_threshold, p, m


def ratio_step(
    theta: Tensor,  # [G], updated
    grad_mask: Tensor,  # [ΣC]
    p: Tensor,  # [ΣC]
    offsets: Tensor,  # [G+1]
    cost_grad: Tensor,  # [G]
    multiplier: float,
    exp_avg: Tensor,  # [G], updated
    exp_avg_sq: Tensor,  # [G], updated
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    cut: float = 1e-4,
    backend: str = "auto",
) -> Tensor:
    """Turns mask gradients into ratio gradients, adds the gradient of the cost, and lets Adam move theta in place.

    Args:
        theta: [G], the logits of the keep ratios; updated.
        grad_mask: [ΣC], dL/dm.
        p: [ΣC], the keep probabilities that `ratio_forward` returned.
        offsets: [G+1] int64, strictly increasing from 0 to ΣC.
        cost_grad: [G], d cost / dα.
        multiplier: weight of cost_grad against the loss.
        exp_avg, exp_avg_sq: [G], Adam's state, zero before the first step; updated.
        step: number of this step, counted from 1.
        lr, betas, eps: Adam's.
        cut: channels with σ(1-σ) at most this are left out; a group with no other takes no gradient from its masks.
        backend: "auto", "reference" or "cpp" (float32 on the CPU).

    Returns:
        [G], dL/dα + multiplier * cost_grad.

    Raises:
        InvalidInput: shapes or dtypes do not fit, or step is below 1.
        BackendUnavailable: the backend asked for is absent or does not take these tensors.
    """
    _check_flat(theta, offsets, grad_mask=grad_mask, p=p)
    for name, tensor in (("cost_grad", cost_grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_like(name, tensor, theta, len(theta))
    if step < 1:
        raise InvalidInput(f"step={step} must be at least 1: Adam's bias correction counts from there")
    state = exp_avg, exp_avg_sq
    with torch.no_grad():
        ratio_grad: Tensor = _step(
            theta, grad_mask, p, offsets, cost_grad, multiplier, *state, step, lr, *betas, eps, cut, backend
        )
    return ratio_grad


def _check_like(name: str, tensor: Tensor, theta: Tensor, length: int) -> None:
    if tensor.shape != (length,) or tensor.dtype != theta.dtype or tensor.device != theta.device:
        raise InvalidInput(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
            f"it must be {theta.dtype} [{length}] on {theta.device}"
        )


def _check_flat(theta: Tensor, offsets: Tensor, **flat: Tensor) -> None:
    """Shapes, dtypes and devices of the ragged arrays."""
    if theta.dim() != 1 or theta.dtype not in (torch.float32, torch.float64):
        raise InvalidInput(f"theta is {theta.dtype} {list(theta.shape)}; it must be float32 or float64 [groups]")
    if offsets.shape != (len(theta) + 1,) or offsets.dtype != torch.int64 or offsets.device != theta.device:
        raise InvalidInput(
            f"offsets is {offsets.dtype} {list(offsets.shape)} on {offsets.device}; "
            f"it must be int64 [{len(theta) + 1}] on {theta.device}"
        )
    channels = len(next(iter(flat.values())))
    for name, tensor in flat.items():
        _check_like(name, tensor, theta, channels)


def _check_offsets(offsets: Tensor, channels: int) -> None:
    """Values of the offsets. On a device they are not looked at: that would wait for it."""
    if offsets.device.type != "cpu":
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != channels or not bool((offsets.diff() > 0).all()):
        raise InvalidInput(f"offsets must increase strictly from 0 to {channels}, the number of channels")


def _refusals(theta: Tensor, native: tuple[str, ...]) -> dict[str, str | None]:
    """Backends of an operator on theta's device and dtype, each with the reason why it cannot run."""
    refusals: dict[str, str | None] = {"reference": None}
    for backend in native:
        device = {"cpp": "cpu", "cuda": "cuda"}[backend]
        if theta.device.type != device or theta.dtype != torch.float32:
            refusals[backend] = f"it takes float32 on {device}, and theta is {theta.dtype} on {theta.device}"
        else:
            refusals[backend] = _native.missing(backend)
    return refusals


@torch.library.custom_op("hwprune::ratio_forward", mutates_args=())
def _forward(
    theta: Tensor, importance: Tensor, offsets: Tensor, temperature: float, uniforms: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check_offsets(offsets, len(importance))
    if importance.device.type == "cpu" and len(importance):
        least, most = importance.aminmax()
        if not (least >= 0 and most < float("inf")):
            raise InvalidInput("importance holds negative, infinite or NaN values; it must be finite and at least 0")
    chosen = _native.choose("ratio_forward", backend, _refusals(theta, ("cpp", "cuda")), ("cpp", "reference"))
    if chosen == "reference":
        return reference.ratio_forward(theta, importance, offsets, temperature, uniforms)
    inputs = [tensor.contiguous() for tensor in (theta, importance, offsets, uniforms)]
    outputs = torch.empty_like(inputs[0]), torch.empty_like(inputs[1]), torch.empty_like(inputs[1])
    addresses = [tensor.data_ptr() for tensor in (*inputs, *outputs)]
    if chosen == "cpp":
        _native.module("cpp").ratio_forward(*addresses, len(theta), temperature)
    else:
        with torch.cuda.device(theta.device):
            stream = torch.cuda.current_stream().cuda_stream
            _native.module("cuda").ratio_forward(*addresses, len(theta), temperature, stream)
    return outputs


@_forward.register_fake
def _(
    theta: Tensor, importance: Tensor, offsets: Tensor, temperature: float, uniforms: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return theta.new_empty(theta.shape), theta.new_empty(importance.shape), theta.new_empty(importance.shape)


def _save_for_theta(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, float, Tensor, str],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    theta, _, offsets, temperature, _, _ = inputs
    ctx.save_for_backward(theta, offsets, output[1])
    ctx.temperature = temperature  # type: ignore[attr-defined]


def _grad_theta(
    ctx: torch.autograd.function.FunctionCtx, grad_log_threshold: Tensor, grad_p: Tensor, grad_m: Tensor
) -> tuple[Tensor | None, ...]:
    theta, offsets, p = ctx.saved_tensors  # type: ignore[attr-defined]
    groups, index = len(theta), reference.group_index(offsets)
    spread = reference.spread(p)
    total = reference.group_sum(spread, index, groups)
    weighted = reference.group_sum(spread * (grad_p + grad_m), index, groups)
    numerator = weighted - grad_log_threshold / ctx.temperature  # type: ignore[attr-defined]
    grad_ratio = torch.where(total > 0, offsets.diff() * numerator / total.where(total > 0, 1), 0)
    ratio = theta.sigmoid()
    return grad_ratio * ratio * (1 - ratio), None, None, None, None, None


_forward.register_autograd(_grad_theta, setup_context=_save_for_theta)


@torch.library.custom_op("hwprune::ratio_step", mutates_args=("theta", "exp_avg", "exp_avg_sq"))
def _step(
    theta: Tensor,
    grad_mask: Tensor,
    p: Tensor,
    offsets: Tensor,
    cost_grad: Tensor,
    multiplier: float,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    cut: float,
    backend: str,
) -> Tensor:
    _check_offsets(offsets, len(p))
    refusals = _refusals(theta, ("cpp",))
    if not (theta.is_contiguous() and exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()):
        refusals["cpp"] = "theta, exp_avg and exp_avg_sq must be contiguous, for they are updated in place"
    if _native.choose("ratio_step", backend, refusals, ("cpp", "reference")) == "reference":
        return reference.ratio_step(
            theta, grad_mask, p, offsets, cost_grad, multiplier, exp_avg, exp_avg_sq, step, lr, (beta1, beta2), eps, cut
        )
    inputs = [tensor.contiguous() for tensor in (grad_mask, p, offsets, cost_grad)]
    ratio_grad = torch.empty_like(theta)
    addresses = [tensor.data_ptr() for tensor in (*inputs, theta, exp_avg, exp_avg_sq, ratio_grad)]
    _native.module("cpp").ratio_step(*addresses, len(theta), multiplier, cut, lr, beta1, beta2, eps, step)
    return ratio_grad


@_step.register_fake
def _(
    theta: Tensor,
    grad_mask: Tensor,
    p: Tensor,
    offsets: Tensor,
    cost_grad: Tensor,
    multiplier: float,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    cut: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(theta)

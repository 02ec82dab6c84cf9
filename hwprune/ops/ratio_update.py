"""Keep ratios to channel masks and mask gradients back to keep ratios, for all groups at once.

The differentiable sparsity allocation of Ning et al. (ECCV 2020, arXiv 2004.02164), on flat ragged arrays: group g
owns the channels offsets[g] to offsets[g + 1]. Which channels a ratio keeps is decided by their importance b; how
sharply, by the temperature:

    p_i = min(sigmoid(clip(temperature * (log b_i - log threshold), ±20)) + 0.01, 1),    mean of p over a group = α

Differentiating that condition gives dp_i/dα = C q_i / Σ_j q_j with q = σ(1-σ): the channels near the threshold carry
the gradient of the ratio. The authors' code ignores the floor of 0.01 and the cap at 1 in this derivative; here both
are differentiated, so that it agrees with finite differences.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from hwprune.errors import InvalidInput
from hwprune.ops import _native, reference
from hwprune.ops.reference import CostTables as CostTables  # part of this interface


def ratio_forward(
    theta: Tensor,  # [G]
    importance: Tensor,  # [ΣC]
    offsets: Tensor,  # [G+1]
    temperature: float,
    uniforms: Tensor | None = None,  # [ΣC]
    *,
    seed: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Solves every group's threshold for its keep ratio α = sigmoid(theta), and draws Bernoulli masks.

    Args:
        theta: [G], float32 or float64; gives the dtype and device of the others.
        importance: [ΣC], at least 0. No gradient flows into it.
        offsets: [G+1] int64, strictly increasing from 0 to ΣC.
        temperature: sharpness, above 0; the tolerance on the log threshold is proportional to its inverse.
        uniforms: [ΣC] in [0, 1), the randomness of the masks; or
        seed: 64 bits, instead of uniforms: those of `philox_uniforms`, made where they are used. Equal seeds draw equal
            masks in every backend wherever p is the same.
        backend: "auto", "reference", "cpp" (float32 on the CPU), "cuda" (float32 on a CUDA device) or "triton" (the
            same; on the CPU under TRITON_INTERPRET=1).

    Returns:
        log_threshold [G], p [ΣC] and m [ΣC], which is 1 where uniforms < p and else 0. Gradients reach theta from the
        first two by implicit differentiation, from m as if it were p (straight through). A ratio below 0.01, where no
        threshold exists, leaves every channel at p = 0.01.

    Raises:
        InvalidInput: shapes, dtypes or values do not fit.
        BackendUnavailable: the backend asked for is absent or does not take these tensors.
    """
    if (uniforms is None) == (seed is None):
        raise InvalidInput("ratio_forward takes either uniforms or a seed: give one of them")
    flat = {"importance": importance} if uniforms is None else {"importance": importance, "uniforms": uniforms}
    _check_flat(theta, offsets, **flat)
    if not temperature > 0:
        raise InvalidInput(f"temperature={temperature} must be above 0")
    key = _signed(seed or 0)
    call = _forward if _native.recorded(theta) else _run_forward
    log_threshold, p, m = call(theta, importance, offsets, temperature, uniforms, backend, key)
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
        backend: as for `ratio_forward`.

    Returns:
        [G], dL/dα + multiplier * cost_grad.

    Raises:
        InvalidInput: shapes or dtypes do not fit, or step is below 1.
        BackendUnavailable: the backend asked for is absent or does not take these tensors.
    """
    _check_step(theta, grad_mask, p, offsets, step, cost_grad=cost_grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    state = exp_avg, exp_avg_sq
    call = _step if _native.recorded() else _run_step
    with torch.no_grad():
        ratio_grad: Tensor = call(
            theta, grad_mask, p, offsets, cost_grad, multiplier, *state, step, lr, *betas, eps, cut, backend
        )
    return ratio_grad


def ratio_step_priced(
    theta: Tensor,  # [G], updated
    grad_mask: Tensor,  # [ΣC]
    p: Tensor,  # [ΣC]
    offsets: Tensor,  # [G+1]
    tables: CostTables,
    multiplier: float,
    penalty: float,
    exp_avg: Tensor,  # [G], updated
    exp_avg_sq: Tensor,  # [G], updated
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    cut: float = 1e-4,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`ratio_step` that looks the cost and its gradient up itself, so that nothing waits for a device.

    Args:
        tables: the cost as a function of the ratios; `hwprune.latency.CostModel.tables`.
        multiplier, penalty: the cost's gradient is weighted by multiplier + penalty · cost, which is what an augmented
            Lagrangian asks for.

    Returns:
        [G], dL/dα + (multiplier + penalty · cost) · d cost / dα; [], the cost at the ratios before the step; and [G],
        d cost / dα.

    Raises:
        InvalidInput: shapes or dtypes do not fit, or step is below 1.
        BackendUnavailable: the backend asked for is absent or does not take these tensors.
    """
    _check_step(theta, grad_mask, p, offsets, step, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_tables(theta, tables)
    state = exp_avg, exp_avg_sq
    call = _step_priced if _native.recorded() else _run_step_priced
    with torch.no_grad():
        ratio_grad, cost, cost_grad = call(
            theta, grad_mask, p, offsets, list(tables), multiplier, penalty, *state, step, lr, *betas, eps, cut, backend
        )
    return ratio_grad, cost, cost_grad


def philox_uniforms(seed: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The uniform numbers that `ratio_forward` makes from a seed, in [0, 1): [count] float32.

    Philox4x32-10 (Salmon et al., SC 2011): number i is the upper 24 bits of word i % 4 of the block whose counter is
    i // 4 and whose 64-bit key is the seed.
    """
    return reference.philox_uniforms(_signed(seed), count, device)


def _signed(seed: int) -> int:
    """The seed's 64 bits as the int64 that operators take. Raises InvalidInput where there are more."""
    if not -(2**63) <= seed < 2**64:
        raise InvalidInput(f"seed={seed} must fit in 64 bits")
    return seed if seed < 2**63 else seed - 2**64


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


def _check_step(theta: Tensor, grad_mask: Tensor, p: Tensor, offsets: Tensor, step: int, **per_group: Tensor) -> None:
    _check_flat(theta, offsets, grad_mask=grad_mask, p=p)
    for name, tensor in per_group.items():
        _check_like(name, tensor, theta, len(theta))
    if step < 1:
        raise InvalidInput(f"step={step} must be at least 1: Adam's bias correction counts from there")


def _check_tables(theta: Tensor, tables: CostTables) -> None:
    """Shapes, dtypes and devices of the tables; what their indices say is CostModel's business."""
    axes, members = tables.members.shape
    intervals, terms, uses = tables.starts.shape[1], len(tables.base), tables.uses.shape[1]
    shapes: list[tuple[int, ...]] = [
        *[(axes, members)] * 2,
        (axes,),
        *[(axes, intervals)] * 2,
        *[(terms, 2), (terms,), (terms, 2)],
        (len(tables.flat),),
        *[(len(theta), uses)] * 2,
    ]
    for name, tensor, shape in zip(CostTables._fields, tables, shapes, strict=True):
        dtype = torch.int64 if name in ("members", "pair", "base", "strides", "uses") else theta.dtype
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != theta.device:
            raise InvalidInput(
                f"tables.{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                f"it must be {dtype} {list(shape)} on {theta.device}"
            )
        if not tensor.is_contiguous():
            raise InvalidInput(f"tables.{name} must be contiguous; take tables from CostModel.tables")


def _check_offsets(offsets: Tensor, channels: int) -> None:
    """Values of the offsets. On a device they are not looked at: that would wait for it."""
    if offsets.device.type != "cpu":
        return
    values = offsets.numpy()
    if values[0] != 0 or values[-1] != channels or not (values[1:] > values[:-1]).all():
        raise InvalidInput(f"offsets must increase strictly from 0 to {channels}, the number of channels")


def _choose(
    op: str, backend: str, theta: Tensor, updated: Sequence[Tensor] = (), tables: CostTables | None = None
) -> str:
    """The backend that runs `op` on theta's device and dtype, updates these in place, and looks these tables up."""

    def refusal(name: str) -> str | None:
        if name == "reference":
            return None
        if theta.dtype != torch.float32 or _native.away(name, theta.device):
            return f"it takes float32 on {_native.HOMES[name]}, and theta is {theta.dtype} on {theta.device}"
        if not all(tensor.is_contiguous() for tensor in updated):
            return "theta, exp_avg and exp_avg_sq must be contiguous, for they are updated in place"
        if (cause := _native.missing(name)) is not None or name != "cuda" or tables is None:
            return cause
        needed = _native.module("cuda").ratio_step_shared(len(tables.members), len(tables.base))
        most = _native.shared_memory(theta.device)
        return None if needed <= most else f"a block needs {needed} bytes of shared memory for these tables, of {most}"

    # Of the two on a device the native one comes first by assumption where neither has been timed.
    preference: tuple[str, ...] = ("cpp", "cuda", "triton", "reference")
    measured = _native.fastest(op, theta, "any", False)
    return _native.choose(op, backend, refusal, (measured, *preference) if measured else preference)


def _kernels() -> ModuleType:
    """The Triton kernels, imported where they are used: they cost a second."""
    return import_module("hwprune.kernels.ratio_update")


def _run_forward(
    theta: Tensor,
    importance: Tensor,
    offsets: Tensor,
    temperature: float,
    uniforms: Tensor | None,
    backend: str,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_offsets(offsets, len(importance))
    if importance.device.type == "cpu" and len(importance):
        least, most = importance.aminmax()
        if not (least >= 0 and most < float("inf")):
            raise InvalidInput("importance holds negative, infinite or NaN values; it must be finite and at least 0")
    chosen = _choose("ratio_forward", backend, theta)
    if chosen == "reference":
        if uniforms is None:
            uniforms = reference.philox_uniforms(seed, len(importance), theta.device).to(theta.dtype)
        return reference.ratio_forward(theta, importance, offsets, temperature, uniforms)
    theta, importance, offsets = theta.contiguous(), importance.contiguous(), offsets.contiguous()
    uniforms = None if uniforms is None else uniforms.contiguous()
    outputs = torch.empty_like(theta), torch.empty_like(importance), torch.empty_like(importance)
    if chosen == "triton":
        _kernels().ratio_forward(theta, importance, offsets, uniforms, seed, temperature, *outputs)
        return outputs
    drawn = 0 if uniforms is None else uniforms.data_ptr()
    addresses = theta.data_ptr(), importance.data_ptr(), offsets.data_ptr(), drawn, *(o.data_ptr() for o in outputs)
    call = *addresses, len(theta), temperature, seed % 2**64
    if chosen == "cpp":
        _native.module("cpp").ratio_forward(*call, torch.get_num_threads())
    else:
        with torch.cuda.device(theta.device):
            _native.module("cuda").ratio_forward(*call, torch.cuda.current_stream().cuda_stream)
    return outputs


_forward = torch.library.custom_op("hwprune::ratio_forward", _run_forward, mutates_args=())


@_forward.register_fake
def _(
    theta: Tensor,
    importance: Tensor,
    offsets: Tensor,
    temperature: float,
    uniforms: Tensor | None,
    backend: str,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    return theta.new_empty(theta.shape), theta.new_empty(importance.shape), theta.new_empty(importance.shape)


def _save_for_theta(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, float, Tensor | None, str, int],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    theta, _, offsets, temperature, *_ = inputs
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
    return grad_ratio * ratio * (1 - ratio), None, None, None, None, None, None


_forward.register_autograd(_grad_theta, setup_context=_save_for_theta)


def _run_step(
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
    state = theta, exp_avg, exp_avg_sq
    chosen = _choose("ratio_step", backend, theta, state)
    if chosen == "reference":
        return reference.ratio_step(
            theta, grad_mask, p, offsets, cost_grad, multiplier, exp_avg, exp_avg_sq, step, lr, (beta1, beta2), eps, cut
        )
    torch.autograd.graph.increment_version(state)  # torch does not see what native code writes
    inputs = [tensor.contiguous() for tensor in (grad_mask, p, offsets, cost_grad)]
    ratio_grad = torch.empty_like(theta)
    scalars = multiplier, cut, lr, beta1, beta2, eps, step
    if chosen == "triton":
        _kernels().ratio_step(*inputs, *state, ratio_grad, *scalars)
        return ratio_grad
    call = *(tensor.data_ptr() for tensor in (*inputs, *state, ratio_grad)), len(theta), *scalars
    if chosen == "cpp":
        _native.module("cpp").ratio_step(*call, torch.get_num_threads())
    else:
        with torch.cuda.device(theta.device):
            _native.module("cuda").ratio_step(*call, torch.cuda.current_stream().cuda_stream)
    return ratio_grad


_UPDATED = ("theta", "exp_avg", "exp_avg_sq")
_step = torch.library.custom_op("hwprune::ratio_step", _run_step, mutates_args=_UPDATED)


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


def _run_step_priced(
    theta: Tensor,
    grad_mask: Tensor,
    p: Tensor,
    offsets: Tensor,
    tables: Sequence[Tensor],
    multiplier: float,
    penalty: float,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    cut: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_offsets(offsets, len(p))
    state = theta, exp_avg, exp_avg_sq
    parts = CostTables(*tables)
    chosen = _choose("ratio_step_priced", backend, theta, state, parts)
    if chosen == "reference":
        cost, cost_grad = reference.table_cost(theta.sigmoid(), parts)
        weighted = (multiplier + penalty * cost) * cost_grad
        adam = step, lr, (beta1, beta2), eps
        ratio_grad = reference.ratio_step(theta, grad_mask, p, offsets, weighted, 1.0, exp_avg, exp_avg_sq, *adam, cut)
        return ratio_grad, cost, cost_grad
    torch.autograd.graph.increment_version(state)  # torch does not see what native code writes
    inputs = [tensor.contiguous() for tensor in (grad_mask, p, offsets)]
    outputs = torch.empty_like(theta), theta.new_empty(()), torch.empty_like(theta)
    scalars = multiplier, penalty, cut, lr, beta1, beta2, eps, step
    if chosen == "triton":
        _kernels().ratio_step_priced(*inputs, parts, *state, *outputs, *scalars)
        return outputs
    sizes = [*parts.members.shape, parts.starts.shape[1], len(parts.base), parts.uses.shape[1]]
    addresses = [tensor.data_ptr() for tensor in (*state, *outputs)]
    fixed = *(tensor.data_ptr() for tensor in inputs), [tensor.data_ptr() for tensor in tables], sizes
    if chosen == "cpp":
        native = _native.module("cpp")
        native.ratio_step_priced(*fixed, *addresses, len(theta), *scalars, torch.get_num_threads())
    else:
        before = theta.clone()  # every block reads all ratios, and no block waits for another
        with torch.cuda.device(theta.device):
            stream = torch.cuda.current_stream().cuda_stream
            native = _native.module("cuda")
            native.ratio_step_priced(*fixed, before.data_ptr(), *addresses, len(theta), *scalars, stream)
    return outputs


_step_priced = torch.library.custom_op("hwprune::ratio_step_priced", _run_step_priced, mutates_args=_UPDATED)


@_step_priced.register_fake
def _(
    theta: Tensor,
    grad_mask: Tensor,
    p: Tensor,
    offsets: Tensor,
    tables: Sequence[Tensor],
    multiplier: float,
    penalty: float,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    cut: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(theta), theta.new_empty(()), torch.empty_like(theta)

"""Differentiable sparsity allocation (Ning et al., ECCV 2020, arXiv 2004.02164) on a measured latency.

Every group has a keep ratio α = sigmoid(θ). Each step, the threshold is solved at which the channels' keep
probabilities p_i = σ(β₂ (log b_i - log β₁)) average to α; masks m_i ~ Bernoulli(p_i) are drawn and folded into the
network. The gradient of the loss with respect to the masks is straight-through, and reaches the ratio by implicit
differentiation of that condition: dL/dα = C Σ w_i dL/dm_i with w = softmax(log p(1-p)), the mean over the channels near
the threshold. β₂ is annealed, so that the choice of channels hardens.

From the authors' released code: p and its floor of 1 %, Bernoulli masks after the batch norm, b = |γ|, β₂ as a
schedule. Reconstruction, where no source states it: the budget on milliseconds by an augmented
Lagrangian, Adam's step size and its decay, the range of β₂, the warm-up. Different on purpose: every member of a group
votes on b (the authors take the first); dropped channels are masked by a small number (see ``off``); and the loss
gradient is put on the scale of the cost gradient, so that one step size and one penalty fit all networks.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hwprune import ops
from hwprune.budget import BudgetController
from hwprune.errors import InvalidInput
from hwprune.importance import LiveImportance
from hwprune.search.base import Context, Method, expect_network, mask_gradient

_SIZE_DECAY = 0.99  # of the running size of the loss gradient
_SQUARES_DECAY, _LEAST_DRAWS = 0.98, 5  # of the running squares behind Taylor scores, and how many they need
_BETAS = (0.9, 0.99)  # Adam's; the size of the gradients changes with the pull of the budget
_EQUAL, _DIFFERENT = 1e-3, 0.03  # standard deviation of log γ: below, never trained; above, fit to choose channels by
_LEAST = 1e-12


class DSA(Method):
    """Learns one keep ratio per group by gradient, beside the weights.

    Args:
        lr: Adam's step on θ. ``None``: ``25 / steps``, at most 0.1, so that a short search can travel as far as a long
            one; it falls by a cosine to a tenth.
        theta: initial θ; α starts at sigmoid(theta). The authors' 5 spends a tenth of a short search where the sigmoid
            is flat.
        temperature: β₂ at the start and at the end; log-linear in between, and held over the last tenth.
        warmup: greatest part of the steps spent without masks, waiting for importances to differ. A network whose
            importances differ from the start (a trained one) is not warmed up.
        interval: training steps per step of the ratios; mask gradients are averaged in between.
        balance: size of the loss gradient beside that of the cost gradient, over time. Most of the former is noise of
            batches and masks, which Adam averages out, so it may be small.
        scores: what orders the channels of a group. "gamma" is the paper's |γ|. "taylor" is the root mean square of
            dL/dm over the last steps, the first-order Taylor criterion of Molchanov et al. 2019, which the masks give
            for free; it begins with |γ|.
        tie_break: exponent of the weight norm beside |γ|, to order channels whose γ are equal.
        spread: least standard deviation of log b within a group: one that is flatter is stretched, tenfold at most, so
            that every group hardens at the same temperature.
        off: the mask of a dropped channel. With the 0 of the paper, the derivative of a ReLU behind it is 0 too, and a
            dropped channel would never learn that it is missed; any small number lets the sign of its input decide.
        straight_through: γ and β of a dropped channel learn as if it had been kept.
        skip: 0, all channels are computed at every step. k of at least 2: dropped channels are computed at every k-th
            step, where the gradients of their masks count k times, and cost nothing in between. The number of channels
            kept then stays next to its mean (systematic instead of independent draws; p is the same). Two
            seeds of resnet20 at 30 % of the FLOPs (2 + 2 epochs of 8,100 images of CIFAR-10-q75) ended at 79.6 and
            78.9 % without it, at 78.7 and 79.0 % with skip=8.
    """

    name = "dsa"
    summary = "differentiable sparsity allocation: one learned keep ratio per group"
    source = "Ning et al., ECCV 2020 (arXiv 2004.02164), with a latency budget"

    def __init__(
        self,
        lr: float | None = None,
        theta: float = 3.0,
        temperature: tuple[float, float] = (2.0, 100.0),
        warmup: float = 0.2,
        interval: int = 1,
        balance: float = 0.1,
        scores: Literal["gamma", "taylor"] = "taylor",
        tie_break: float = 0.05,
        spread: float = 0.3,
        off: float = 1e-5,
        straight_through: bool = False,
        skip: int = 0,
    ) -> None:
        if not 0 < temperature[0] <= temperature[1]:
            raise InvalidInput(f"temperature={temperature} must rise from one positive number to another")
        if not 0 <= warmup < 1 or interval < 1 or (lr is not None and lr <= 0):
            raise InvalidInput(f"warmup={warmup} must lie in [0, 1), interval={interval} be >= 1, lr={lr} be positive")
        if scores not in ("gamma", "taylor"):
            raise InvalidInput(f"scores={scores!r} is unknown; possible: gamma, taylor")
        if skip == 1 or skip < 0:
            raise InvalidInput(f"skip={skip} must be 0, or the number of steps, at least 2, of which one computes all")
        self.lr = lr
        self.initial_theta = theta
        self.temperature = temperature
        self.warmup = warmup
        self.interval = interval
        self.balance = balance
        self.scores = scores
        self.tie_break = tie_break
        self.spread = spread
        self.off = off
        self.straight_through = straight_through
        self.skip = skip
        self.skips = skip > 0

    def setup(self, context: Context) -> None:
        super().setup(context)
        groups, device = context.groups, context.device
        self._live = LiveImportance(context.model, groups, device, self.tie_break, self.spread)
        self._offsets = torch.from_numpy(groups.offsets).to(device)
        self._full = torch.from_numpy(groups.widths).to(device, torch.float32)  # [G]
        # At α = 1 the sigmoid would need an infinite θ; a quarter channel below the minimum still rounds up to it.
        lowest = torch.from_numpy(context.minimum).to(device, torch.float32).sub(0.25).div(self._full)
        highest = torch.from_numpy(context.maximum).to(device, torch.float32).div(self._full).clamp_max(0.9995)
        self._least, self._most = lowest.minimum(highest).logit(), highest.logit()  # [G]
        self.theta = torch.full_like(self._full, self.initial_theta).clamp_(self._least, self._most)
        self._exp_avg = torch.zeros_like(self.theta)
        self._exp_avg_sq = torch.zeros_like(self.theta)
        self._accumulated = torch.zeros(groups.total, device=device)  # Σ dL/dm since the last step of the ratios
        self._squares = torch.zeros_like(self._accumulated)  # running mean of (dL/dm)², biased as Adam's
        self._draws = 0  # masks that have been differentiated
        self._seen = torch.zeros_like(self._accumulated)  # those among them in which a channel was computed
        self._updates = 0
        self._loss_size = self._loss_weight = 0.0  # running mean of ‖dL/dα‖, and the weights summed in it
        self._mask: Tensor | None = None
        self._p = torch.ones(groups.total, device=device)
        self._cost_soft = self._cost_hard = float(context.cost.dense)
        self._multiplier = 0.0
        self._start = None if self._live.deviation() < _EQUAL else 0  # first step with masks
        # The multiplier integrates the excess. Ten updates in a search keep it slower than the ratios that it steers;
        # with more, the two chase each other around the budget.
        self._dual_interval = max(1, context.steps // (10 * self.interval))

    def temperature_at(self, step: int) -> float:
        """β₂: log-linear over the first nine tenths of the masked steps, then constant."""
        low, high = self.temperature
        return low * math.pow(high / low, min(1.0, self._progress(step) / 0.9))

    def masks(self, step: int) -> Tensor | None:
        if self._start is None and (step >= self.warmup * self.context.steps or self._live.deviation() > _DIFFERENT):
            self._start = step
        if self._start is None:
            return None
        uniforms = torch.rand(len(self._p), generator=self.context.generator, device=self.context.device)
        scores = self._ordered(self._live())
        _, self._p, mask = ops.ratio_forward(self.theta, scores, self._offsets, self.temperature_at(step), uniforms)
        if self.skips:
            mask = self._systematic(uniforms)
        if self._computes_all(step):
            mask.clamp_min_(self.off)
        self._mask = mask.requires_grad_()
        return self._mask

    def _computes_all(self, step: int) -> bool:
        return not self.skips or (step - (self._start or 0)) % self.skip == 0

    def _systematic(self, uniforms: Tensor) -> Tensor:
        """Masks that are 1 with probability p, and whose sum over a group is within 1 of the sum of p. [ΣC]

        The p of a group are laid end to end, in random order, on a line; channels that a grid of unit steps hits are
        kept. The start of the grid is uniform.
        """
        owner, generator = self._live.owner, self.context.generator
        order = (owner + uniforms.double()).argsort()  # [ΣC] groups stay together
        p = self._p[order].double()
        ends = p.cumsum(0)
        first = torch.cat([ends.new_zeros(1), ends])[self._offsets[:-1]]  # [G]
        first -= torch.rand(first.shape, generator=generator, device=first.device, dtype=first.dtype)
        ends -= first[owner]
        kept = (ends.floor() > (ends - p).floor()).to(self._p.dtype)
        return torch.empty_like(kept).scatter_(0, order, kept)

    def after_backward(self, step: int) -> None:
        if self._mask is None:
            return
        gradient = mask_gradient(self._mask)
        squares = self._squares.lerp(gradient.square(), 1 - _SQUARES_DECAY)
        if self.skips:
            dropped = self._mask.detach() < 1
            gradient = torch.where(dropped, self.skip * gradient, gradient)  # they are computed once in `skip` steps
            seen = ~dropped | self._computes_all(step)
            self._squares = torch.where(seen, squares, self._squares)
            self._seen += seen
        else:
            self._squares = squares
            self._seen += 1
        self._accumulated += gradient
        self._draws += 1
        self._mask = None

    def after_step(self, step: int) -> None:
        if self._start is None or (step - self._start + 1) % self.interval:
            return
        context, since = self.context, step - self._start
        widths = self.widths()
        cost, slope = context.cost.value_and_grad(widths)
        slope = slope.to(self.theta) / context.cost.dense  # [G] d (cost / dense) / d width
        self._cost_soft = float(cost)
        self._cost_hard = float(context.cost.price(context.rounded(widths)))
        self._multiplier = _pull(context.controller, self._cost_soft, since)
        if self._updates % self._dual_interval == 0:
            context.controller.update(self._cost_hard, since)

        self._updates += 1
        cost_grad = slope * self._full  # [G] d (cost / dense) / dα
        size = self._loss_size / self._loss_weight if self._loss_weight else 0.0
        scale = self.balance * float(cost_grad.norm()) / size if size > 0 else 1.0
        ratio_grad = ops.ratio_step(
            self.theta,
            self._accumulated * (scale / self.interval),
            self._p,
            self._offsets,
            cost_grad,
            self._multiplier,
            self._exp_avg,
            self._exp_avg_sq,
            step=self._updates,
            lr=self._lr_at(step),
            betas=_BETAS,
        )
        loss_grad = (ratio_grad - self._multiplier * cost_grad) / scale  # [G] dL / dα
        self._loss_size = _SIZE_DECAY * self._loss_size + (1 - _SIZE_DECAY) * float(loss_grad.norm())
        self._loss_weight = _SIZE_DECAY * self._loss_weight + (1 - _SIZE_DECAY)
        self.theta.clamp_(self._least, self._most)
        self._accumulated.zero_()

    def widths(self) -> Tensor:
        return self.theta.sigmoid() * self._full

    def ranking(self) -> Tensor:
        return self._ordered(self._live.now())

    def state_dict(self) -> dict[str, Any]:
        return {
            "theta": self.theta.clone(),
            "exp_avg": self._exp_avg.clone(),
            "exp_avg_sq": self._exp_avg_sq.clone(),
            "accumulated": self._accumulated.clone(),
            "p": self._p.clone(),
            "squares": self._squares.clone(),
            "draws": self._draws,
            "seen": self._seen.clone(),
            "updates": self._updates,
            "loss_size": self._loss_size,
            "loss_weight": self._loss_weight,
            "start": self._start,
            "costs": [self._cost_soft, self._cost_hard, self._multiplier],
            "live": self._live.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expect_network(groups=(len(state["theta"]), len(self.theta)), channels=(len(state["p"]), len(self._p)))
        self.theta.copy_(state["theta"])
        self._exp_avg.copy_(state["exp_avg"])
        self._exp_avg_sq.copy_(state["exp_avg_sq"])
        self._accumulated.copy_(state["accumulated"])
        self._p.copy_(state["p"])
        self._squares.copy_(state["squares"])
        self._draws, self._updates = state["draws"], state["updates"]
        self._seen.copy_(state["seen"])
        self._loss_size, self._loss_weight = state["loss_size"], state["loss_weight"]
        self._start = state["start"]
        self._cost_soft, self._cost_hard, self._multiplier = state["costs"]
        self._live.load_state_dict(state["live"])

    def log(self) -> dict[str, float]:
        """Kept share of channels, soft and hard cost, multiplier, and the largest std(count) / C over groups."""
        widths = self.widths()
        variance = torch.zeros_like(widths).index_add_(0, self._live.owner, self._p * (1 - self._p))
        return {
            "kept": float(widths.sum() / self._full.sum()),
            "cost_soft": self._cost_soft,
            "cost_hard": self._cost_hard,
            "multiplier": self._multiplier,
            "count_std": float((variance.sqrt() / self._full).max()),
        }

    def _ordered(self, scores: Tensor) -> Tensor:
        """The scores by which channels are kept, from those of the weights [ΣC]: the same, or Taylor's. [ΣC]"""
        if self.scores == "gamma" or self._draws < _LEAST_DRAWS:
            return scores
        squares = self._squares / (1 - _SQUARES_DECAY**self._seen)
        return self._live.stretched(squares.clamp_min(_LEAST**2).log() / 2)

    def _progress(self, step: int) -> float:
        start = self._start or 0
        return min(1.0, (step - start) / max(1, self.context.steps - 1 - start))

    def _lr_at(self, step: int) -> float:
        start = self._start or 0
        peak = min(0.1, 25 * self.interval / max(1, self.context.steps - start)) if self.lr is None else self.lr
        return peak * (0.55 + 0.45 * math.cos(math.pi * self._progress(step)))


def _pull(controller: BudgetController, cost: float, step: int) -> float:
    """The controller's multiplier, but negative below the budget, where the controller would let go.

    A budget that is not used is accuracy given away, and the loss alone wins it back slowly: its gradient is mostly
    noise. Where the budget binds, which is where anything is to be pruned, both have the same solution.
    """
    slope = controller.dual + controller.rho * controller.excess(cost, step)
    return slope * controller.dense / controller.target(step)

"""Differentiable annealing indicator search (Guan et al., TNNLS 2023, arXiv 2011.02166) on a measured latency.

Every coupled channel has one real number α, and the mask of a step is its annealed indicator I = sigmoid(α / T); as T
falls, the indicators become the step function of α, and a channel is kept if α > 0. The problem is bi-level: weights
train on training batches under the indicators as they are, and indicators on the loss of held-out batches, first-order,
one step of either in turn. The loss of the indicators is

    L_val + lasso · ‖I‖₁ + pull · (± log E) + symmetry · Σ_g |r_g - mean r|

with E the cost of the widths Σ I and r_g = mean I of group g. The log cost is two-sided: + where the network is dearer
than the budget, - where it is cheaper than the dead zone below it, and nothing within.

From the paper's abstract and from third parties' notes and code of its equations 7-11: I, the alternation, the lasso,
the three branches of the log cost, and a regulariser that equalises the keep rates of layers whose outputs are added.
Reconstruction, where no source states it: all coefficients; α from the magnitudes of the weights at the start; Adam
with one second moment per group, and a step proportional to T, so that α / T moves equally fast at all temperatures; α
left where it is once the slope of its indicator is below ``window``; the loss gradient put on the scale of the cost's,
so that one set of coefficients fits all networks; the form of the symmetry term; the last steps on the network that the
allocation within the budget leaves. The budget is in force from the first step, unlike in the other methods: the
relaxation is the ramp, and at the end of another one T would be too low to undo anything. Different on purpose: the
branch is decided by hard counts, as at high T the relaxed cost is far from that of the network which is left (by a
quarter, of α ~ N(0.3, 0.8) at T = 1); and the dead zone is at least one step of the cost's table, as a narrower one
between two plateaus could never be entered. The layers that are added share one indicator per coupled channel, so that
their rates are equal as they stand.

How many channels a group keeps is decided while T is high. A batch norm behind the next convolution undoes what all
indicators of a group lose together: the gradients of the loss to them, times the indicators, add up to 0 in every
group inside a block. So the loss says which of a group's channels matter, but of how many says little, and whatever
else moves a group moves it unopposed. Three things follow, different from the sources on purpose, too:

* Indicators start open, and T is held until the budget is met, or for three tenths of the steps. Then log T falls
  linearly, where a third party has 1/T rise linearly to 50 from the first step.
* Prices count by their root (``curb``), as in GDP: dear groups, the streams of which all that follows is part, are else
  the first to shrink, and indicators between 0 and 1 are left where they are needed.
* Adam's momentum is that of DARTS. With more of it the widths swing beyond the budget, and return as others.

Without them (resnet20, 2 + 2 short epochs, one run each) the relaxed loss was .83 and the hard one 1.46 at 30 % of the
FLOPs, and the network ended at 76.4 %; at half of the latency, .79 and 1.80, and 71.3 %.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwprune.errors import InvalidInput
from hwprune.graph import keep_top
from hwprune.importance import LiveImportance
from hwprune.ops.reference import group_sum
from hwprune.search.base import Context, Method, expect_network, finite, group_places, mask_gradient

_BETAS = (0.5, 0.99)  # Adam's
_SIZE_DECAY = 0.99  # of the running size of the loss gradient
_FALLEN = 0.9  # share of the steps before the indicators settle at which T has fallen
_LATEST = 0.3  # share of the same at which T falls whether the budget is met or not
_REACH = 6.0  # |α| / T that a search can undo: Adam's step over the fall of log T
_BESIDE = 3.0  # |α| / T, at the end, of a channel that a minimum or maximum width keeps on its side
_LEAST = 1e-12


class DAIS(Method):
    """Learns an annealed indicator per coupled channel on held-out batches, beside the weights.

    Without held-out batches the indicators learn from the gradient of the training loss, which the masks give for free.

    Args:
        lr: Adam's step on α / T. ``None``: six times what log T falls by in a step, at most 0.2. Annealing drives α / T
            apart exponentially, and what is further from 0 than that multiple can no longer be undone. It falls by a
            cosine to a tenth, so that annealing wins in the end.
        init: mean of α at the start; uniform between half and one and a half of it, as equal ones would stay equal.
            Near 0 the search starts with about half of the channels of every group, and finds little else.
        spread: least standard deviation within a group of what the logarithm of the magnitudes, |γ| √‖w‖, adds to α / T
            at the start; 0 starts all alike. Searches of some dozen steps keep to the budget better with it; accuracy
            did not need it (resnet20, 30 % of its FLOPs, two seeds, a short schedule: 76.7 % with it, 77.5 % without).
        temperature: T at the start and at the end; held until the budget is met, log-linear in between, and held before
            the indicators settle.
        anneal: ``False`` keeps T at its start, to see what annealing is worth: the log's ``cost_soft`` against
            ``cost_hard`` and, when they have settled, ``loss_soft`` against ``loss_hard`` on one held-out batch.
        pull: weight of the log cost, beside a loss gradient of size ``balance``. Above the budget the dual variable of
            the controller is added to it, so that any budget is reached in the end.
        tolerance: least width of the dead zone below the budget, relative; it is never narrower than the largest step
            of the cost between two levels of one group.
        lasso: weight of ‖I‖₁, in units of the mean gradient of the log cost. The cost already pulls all indicators
            down; this drains the groups that are cheap, which the cost hardly fills up again (resnet20, one run each:
            78.0 % with 0.05 and 78.5 % without at 30 % of the FLOPs, 63.8 and 64.9 % at 12 %); hence 0.
        symmetry: weight of the term that equalises keep rates, in the same unit, over the groups of one full width: the
            insides of the blocks of a stage. The layers that the paper ties so, those whose outputs are added, are one
            group here, which makes the term redundant for them; hence 0.
        balance: size of the loss gradient beside that of the log cost's, over channels and time. With too little of it
            the price alone decides, and wide groups, whose channels have the smallest gradients each, are crushed
            (resnet20, 30 % of its FLOPs, one seed and a short schedule: 76.7 % with 1, 77.1 % with 3; resnet8 on digits
            did better with 1).
        curb: exponent of the prices: at 1 they weigh as they are, at 0 all channels weigh the same.
        window: slope dI / dα below which a channel is decided and left alone.
        settle: part of the steps, the last, in which the indicators are those of the network that will be cut, and the
            weights adapt to it; none without annealing. The learning rate usually falls to 0 in a search, so that a
            short part at its end would teach the weights nothing.
        interval: training steps per step of the indicators.
    """

    name = "dais"
    summary = "annealed indicators per channel, learned on held-out batches"
    source = "Guan et al., TNNLS 2023 (arXiv 2011.02166), with a latency budget"
    wants_held_out = True

    def __init__(
        self,
        lr: float | None = None,
        init: float = 1.5,
        spread: float = 1.0,
        temperature: tuple[float, float] = (1.0, 0.002),
        anneal: bool = True,
        pull: float = 1.0,
        tolerance: float = 0.01,
        lasso: float = 0.0,
        symmetry: float = 0.0,
        balance: float = 3.0,
        curb: float = 0.5,
        window: float = 1e-3,
        settle: float = 0.4,
        interval: int = 1,
    ) -> None:
        if not 0 < temperature[1] <= temperature[0]:
            raise InvalidInput(f"temperature={temperature} must fall from one positive number to another")
        if init <= 0 or interval < 1 or (lr is not None and lr <= 0):
            raise InvalidInput(f"init={init} and lr={lr} must be positive, and interval={interval} at least 1")
        if pull <= 0 or balance <= 0 or not 0 < tolerance < 1:
            raise InvalidInput(f"pull={pull} and balance={balance} must be positive, tolerance={tolerance} in (0, 1)")
        if not 0 <= settle < 1:
            raise InvalidInput(f"settle={settle} is a part of the steps: 0 or more, and less than 1")
        if min(spread, lasso, symmetry, window) < 0:
            raise InvalidInput(f"{spread=}, {lasso=}, {symmetry=} and {window=} must not be negative")
        if not 0 <= curb <= 1:
            raise InvalidInput(f"curb={curb} must lie in [0, 1]")
        self.lr = lr
        self.init = init
        self.spread = spread
        self.temperature = temperature
        self.anneal = anneal
        self.pull = pull
        self.tolerance = tolerance
        self.lasso = lasso
        self.symmetry = symmetry
        self.balance = balance
        self.curb = curb
        self.window = window
        self.settle = settle if anneal else 0.0
        self.interval = interval

    def setup(self, context: Context) -> None:
        super().setup(context)
        groups, device = context.groups, context.device
        self._full = torch.from_numpy(groups.widths).to(device)  # [G]
        self._owner = torch.repeat_interleave(self._full)  # [ΣC] group of each channel
        self._minimum, self._maximum = (
            torch.from_numpy(bound).to(device)[self._owner] for bound in (context.minimum, context.maximum)
        )  # [ΣC]
        self._alike = torch.from_numpy(np.unique(groups.widths, return_inverse=True)[1]).to(device)  # [G]
        self._zone = self._largest_step()
        self._settled_from = math.ceil((1 - self.settle) * context.steps)
        jitter = torch.rand(groups.total, generator=context.generator, device=device) + 0.5
        ordered = torch.zeros(groups.total, device=device)
        if self.spread:
            live = LiveImportance(context.model, groups, device, tie_break=0.5, spread=self.spread)
            ordered = self.temperature[0] * live.now().log()
        if not context.steps:
            ordered -= ordered.min()  # nothing will be decided, but the order stands
        self.alpha = self._bounded(self.init * jitter + ordered)  # [ΣC]
        self._exp_avg = torch.zeros_like(self.alpha)
        self._exp_avg_sq = torch.zeros(len(groups), device=device)  # of a group: see `_adam`
        self._updates = 0
        self._loss_size = self._loss_weight = 0.0  # running mean square of dL/dI, and the weights summed in it
        self._mask: Tensor | None = None
        self._gradient = torch.zeros_like(self.alpha)  # of the training loss, where it stands in for the held-out one
        self._cost_soft = self._cost_hard = float(context.cost.dense)
        self._falls_from: int | None = None  # the step at which T begins to fall
        self._force = 0.0
        self._now = self.temperature[0]
        self._losses: dict[str, float] = {}
        # The dual variable integrates the excess; more than ten updates in a search would chase the indicators.
        self._dual_interval = max(1, self._settled_from // (10 * self.interval))

    def temperature_at(self, step: int) -> float:
        """T: held until the budget is met, then log-linear, and held in the last tenth before the indicators settle."""
        first, last = self.temperature
        if not self.anneal or self._falls_from is None:
            return first
        done = (step - self._falls_from) / max(1.0, _FALLEN * (self._settled_from - 1) - self._falls_from)
        return first * math.pow(last / first, min(1.0, max(0.0, done)))

    def masks(self, step: int) -> Tensor:
        if self._falls_from is None and (
            self._cost_hard <= self.context.controller.budget or step >= _LATEST * (self._settled_from - 1)
        ):
            self._falls_from = step
        self._now = self.temperature_at(step)
        if step >= self._settled_from:
            return (self.alpha > 0).to(self.alpha)
        mask = (self.alpha / self._now).sigmoid()
        if self.context.held_out is None:
            self._mask = mask.requires_grad_()
        return mask

    def after_backward(self, step: int) -> None:
        if self._mask is None:
            return
        self._gradient += mask_gradient(self._mask)
        self._mask = None

    def after_step(self, step: int) -> None:
        if step < self._settled_from and (step + 1) % self.interval == 0:
            self._move(step)
        if step == self._settled_from - 1:
            self._compare(self._now)
            if self.settle:
                self._decide()

    def _move(self, step: int) -> None:
        """One step of the indicators."""
        context, temperature = self.context, self.temperature_at(step)
        indicators = (self.alpha / temperature).sigmoid()
        loss_grad = self._loss_gradient(indicators)
        soft = group_sum(indicators, self._owner, len(self._full))  # [G]
        cost, slope = context.cost.value_and_grad(soft)
        self._cost_soft, self._cost_hard = float(cost), float(context.cost.price(self._counts()))
        price = self._curbed((slope.to(indicators) / self._cost_soft)[self._owner])  # [ΣC] d log E / dI
        self._force = self._branch()

        self._updates += 1
        square = float(loss_grad.square().mean())
        self._loss_size = _SIZE_DECAY * self._loss_size + (1 - _SIZE_DECAY) * square
        self._loss_weight = _SIZE_DECAY * self._loss_weight + (1 - _SIZE_DECAY)
        size = math.sqrt(self._loss_size / self._loss_weight)
        unit = float(price.square().mean().sqrt())
        scale = self.balance * unit / size if size > 0 else 0.0
        total = scale * loss_grad + self._force * price + self.lasso * unit
        if self.symmetry:
            total += self.symmetry * unit * self._asymmetry(soft)
        self._adam(total * indicators * (1 - indicators) / temperature, indicators, temperature, step)

    def _loss_gradient(self, indicators: Tensor) -> Tensor:
        """dL / dI, on the next held-out batch where there are such. [ΣC]"""
        if self.context.held_out is None:
            gradient, self._gradient = self._gradient, torch.zeros_like(self._gradient)
            return gradient / self.interval
        with torch.enable_grad():
            mask = indicators.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.context.held_out.loss(mask), mask)
        self.context.masked.set(indicators)
        return finite(gradient)

    def _curbed(self, price: Tensor) -> Tensor:
        """Prices to the power of ``curb``, with their sum as it was, so that the cost is pulled as hard. [ΣC]"""
        price = price.clamp_min(0)
        powers = price**self.curb
        return powers * (price.sum() / powers.sum().clamp_min(_LEAST))

    def _branch(self) -> float:
        """What the log cost is multiplied by, from the price of the hard counts: above, below or within the zone.

        Always of the whole budget: the relaxation itself is the ramp, and whatever closes only when T is low is too
        late to be weighed against what it competes with.
        """
        controller = self.context.controller
        if self._updates % self._dual_interval == 0:
            controller.update(self._cost_hard, self.context.steps)
        target = controller.budget
        if self._cost_hard > target:
            return self.pull + controller.dual
        return -self.pull if self._cost_hard < (1 - max(self.tolerance, self._zone / target)) * target else 0.0

    def _asymmetry(self, soft: Tensor) -> Tensor:
        """d / dI of Σ_g |r_g - the mean of r over the groups as wide as g|, times the width. [ΣC]"""
        count = int(self._alike.max()) + 1
        members = group_sum(torch.ones_like(soft), self._alike, count)
        rate = soft / self._full
        sign = (rate - (group_sum(rate, self._alike, count) / members)[self._alike]).sign()
        return (sign - (group_sum(sign, self._alike, count) / members)[self._alike])[self._owner]

    def _adam(self, gradient: Tensor, indicators: Tensor, temperature: float, step: int) -> None:
        """Adam's step, with the second moment of the group.

        With one of their own all channels would move alike: those that the loss hardly depends on by their noise.
        """
        first, second = _BETAS
        self._exp_avg.lerp_(gradient, 1 - first)
        squares = group_sum(gradient.square(), self._owner, len(self._full)) / self._full  # [G]
        self._exp_avg_sq.lerp_(squares.to(self._exp_avg_sq), 1 - second)
        mean = self._exp_avg / (1 - first**self._updates)
        deviation = (self._exp_avg_sq / (1 - second**self._updates)).sqrt()[self._owner]
        move = self._lr_at(step) * temperature * mean / deviation.clamp_min(_LEAST)
        decided = indicators * (1 - indicators) / temperature < self.window
        self.alpha = self._bounded(torch.where(decided, self.alpha, self.alpha - move))

    def _lr_at(self, step: int) -> float:
        """The step on α / T: a multiple of what log T falls by in one, or annealing would outrun what is to be undone.

        It then falls to a tenth, so that annealing wins in the end.
        """
        first, last = self.temperature
        falls = self.interval * math.log(first / last) / max(1.0, _FALLEN * (self._settled_from - 1))
        peak = min(0.2, _REACH * falls or 0.2) if self.lr is None else self.lr
        return peak * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / max(1, self._settled_from))))

    def _bounded(self, alpha: Tensor) -> Tensor:
        """α with the best of every group on the side on which its least and greatest width put them. [ΣC]"""
        place = group_places(alpha, self._owner)
        side = _BESIDE * self.temperature[1]
        alpha = torch.where(place < self._minimum, alpha.clamp_min(side), alpha)
        return torch.where(place >= self._maximum, alpha.clamp_max(-side), alpha)

    def _counts(self) -> np.ndarray:
        counts: np.ndarray = self.widths().cpu().numpy().astype(np.int64)
        return counts

    def _largest_step(self) -> float:
        """The largest rise of the price from one level of a group to the next, near the budget, in the cost's unit."""
        context, cost = self.context, self.context.cost
        ratio = math.sqrt(context.controller.budget / context.controller.dense)
        others = np.rint(ratio * context.groups.widths).astype(np.int64).clip(context.minimum, context.maximum)
        steps = [0.0]
        for group in range(len(others)):
            levels = cost.levels(group)
            widths = np.repeat(others[None], len(levels), 0)
            widths[:, group] = levels
            steps.extend(np.abs(np.diff(np.asarray(cost.price(widths)))).tolist())
        return float(max(steps))

    def _decide(self) -> None:
        """Put every α on the side on which the allocation within the budget puts its channel."""
        context, ranking = self.context, self.ranking()
        chosen = self.allocate(
            context.groups,
            context.cost,
            self.widths(),
            ranking,
            context.controller.budget,
            minimum=context.minimum,
            pinned=context.pinned,
        )
        keep = torch.from_numpy(keep_top(context.groups, chosen.widths, ranking)).to(self.alpha.device)
        side = _BESIDE * self.temperature[1]
        self.alpha = torch.where(keep, self.alpha.clamp_min(side), self.alpha.clamp_max(-side))

    @torch.no_grad()
    def _compare(self, temperature: float) -> None:
        """The loss under the relaxed and under the hard indicators, on one held-out batch."""
        if self.context.held_out is None:
            return
        batch = self.context.held_out.batch()
        soft, hard = (self.alpha / temperature).sigmoid(), (self.alpha > 0).to(self.alpha)
        losses = [float(self.context.held_out.loss(mask, batch)) for mask in (soft, hard)]
        self._losses = dict(zip(("loss_soft", "loss_hard"), losses, strict=True))

    def widths(self) -> Tensor:
        return group_sum((self.alpha > 0).double(), self._owner, len(self._full))

    def ranking(self) -> Tensor:
        return self.alpha.sigmoid()  # α / T would round to 0 and 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha.clone(),
            "exp_avg": self._exp_avg.clone(),
            "exp_avg_sq": self._exp_avg_sq.clone(),
            "gradient": self._gradient.clone(),
            "updates": self._updates,
            "falls_from": self._falls_from,
            "loss_size": [self._loss_size, self._loss_weight],
            "costs": [self._cost_soft, self._cost_hard, self._force, self._now],
            "losses": dict(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expect_network(channels=(len(state["alpha"]), len(self.alpha)))
        self.alpha.copy_(state["alpha"])
        self._exp_avg.copy_(state["exp_avg"])
        self._exp_avg_sq.copy_(state["exp_avg_sq"])
        self._gradient.copy_(state["gradient"])
        self._updates = state["updates"]
        self._falls_from = state["falls_from"]
        self._loss_size, self._loss_weight = state["loss_size"]
        self._cost_soft, self._cost_hard, self._force, self._now = state["costs"]
        self._losses = dict(state["losses"])

    def log(self) -> dict[str, float]:
        """How far the relaxation is from what will be left, beside the usual figures.

        kept: share of channels, hard. cost_soft, cost_hard: of Σ I and of the counts of α > 0; gap: their relative
        difference. undecided: share of indicators between 5 % and 95 %. Once settled, with held-out batches,
        loss_soft and loss_hard of before.
        """
        indicators = (self.alpha / self._now).sigmoid()
        return {
            "kept": float((self.alpha > 0).float().mean()),
            "cost_soft": self._cost_soft,
            "cost_hard": self._cost_hard,
            "gap": self._cost_soft / self._cost_hard - 1,
            "multiplier": self._force,
            "temperature": self._now,
            "undecided": float(((indicators > 0.05) & (indicators < 0.95)).float().mean()),
            **self._losses,
        }

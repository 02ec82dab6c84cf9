"""Gates with differentiable polarisation (Guo et al., ICCV 2021, arXiv 2109.02220) on a measured latency.

Every coupled channel has one real number x >= 0, and its gate is the smoothed L0 norm of x:

    g(x) = x² / (x² + ε)        dg/dx = 2 x ε / (x² + ε)²        g(0) = 0, g(√ε) = ½, g -> 1 for x >> √ε

All gradients reach x through dg/dx, which vanishes at 0 and far from it, so gates polarise: where the loss gains less
than the channel's price, x decays geometrically, and 0 is absorbing; where it gains more, g rises towards 1 and stays.
At the end the channels at 0 are gone and the other gates are multiplied into the weights, so that the network which is
cut out computes what the gated one did.

From the paper's abstract and a digest of its figure 2: gates that polarise, one gate vector for convolutions tied by a
skip connection, a cost that is bilinear in the gates of neighbouring layers, zeros removed, other gates absorbed. The
gate's formula is recalled, not checked. Reconstruction, where no source states it:

* ε is held, then decayed. Decayed from the start it runs ahead of x, and every gate hardens at 1. It starts at the
  median of x², where gates are mobile, and falls in the second part of the search, once the budget is met and used.
* Of a bilinear cost one factor at a time is relaxed: each gate pays λ · (d cost / d width at the present counts of
  gates that are not 0), a price that is held for ``refresh`` steps. While the counts are within the budget, λ is 0.
* Gates below ``least`` are set to 0 (a proximal step). While the network is cheaper than the budget and ε is held, some
  of the most useful zeros are seeded again, since early noise kills for good.
* Gates are divided by their first value, so that the search starts at the network it was given; the loss gradient is
  put on the scale of the prices, whose ratio is bounded; steps of x are in units of √ε.
* Prices count by their root (``curb``). A batch norm behind the next convolution undoes what all gates of a group lose
  together, so until few are left the loss does not speak for a group as a whole, and prices alone decided: dear
  ones of narrow layers and streams shrank to a few channels, cheap ones stayed whole (resnet20 at 30 % of its FLOPs,
  two epochs each of search and fine-tuning: 74.9 %, and 78.0 with the root).

The paper's gates stand before a convolution. Here they stand where the channel is made, behind its batch norm, where
every consumer sees them: the same for all activations with f(g z) = g f(z), such as ReLU. For others the function is
another one, but the absorption, into γ and β, is exact for all of them.

Whole residual blocks go when the last gate inside them does (``blocks``). Where few gates are left, each pays a share
of what the block would save by ending, if that is more than the slope says: launching its layers at all goes with the
last channel only. That is not curbed. A block that is gone is not seeded again, and takes the other groups inside it
along. What a removed block returns is a constant, which is added to the stream: in inference mode exactly what the
gated network computes. While that trains, the last batch norm of the block sees zeros and returns its β: the same as
soon as its running mean has come down to 0, at the usual momentum within some hundred steps. (Paper: a block goes with
its inner gate vector, but for the bias of the norm. Reconstruction: the price.)
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwprune.errors import InvalidInput
from hwprune.ops.reference import group_sum
from hwprune.search.base import Context, Method, expect_network, group_places, mask_gradient

_SIZE_DECAY = 0.99  # of the running size of the loss gradient
_SCORE_DECAY = 0.95  # of the running usefulness of a channel
_LATEST = 0.85  # share of the steps at which ε falls whether the budget is met or not
_SETTLED = 0.97  # share of the steps at which ε has fallen
_PRICE_RATIO = 10.0  # of the dearest and the cheapest channel to the median one
_TINY = 1e-12


class GDP(Method):
    """Learns polarised gates beside the weights; what survives is absorbed, and needs no fine-tuning for it.

    Args:
        lr: step of x / √ε under a gradient of the size of the mean price. ``None``: ``20 / steps``, at most 0.2.
        momentum: of these steps.
        epsilon: the last ε, as a share of the first.
        hold: share of the steps over which ε is held.
        pull: λ above the budget; the dual variable of the controller is added to it.
        balance: size of the loss gradient beside that of the prices, over channels and time.
        least: a gate below it is set to 0.
        refresh: steps for which prices are held. ``None``: a fortieth of the steps.
        reseed: greatest share of all channels that is seeded again at once.
        tolerance: share of the budget that must be unused for that.
        curb: exponent of the prices: at 1 they weigh as they are, at 0 all channels weigh the same.
        blocks: whether residual blocks may lose all their gates.
        few: share of a group's channels from which on downwards its gates share what the end of their block saves.
    """

    name = "gdp"
    summary = "gates that polarise to exact zeros and are absorbed"
    source = "Guo et al., ICCV 2021 (arXiv 2109.02220), with a latency budget"
    fills_budget = False

    def __init__(
        self,
        lr: float | None = None,
        momentum: float = 0.9,
        epsilon: float = 1e-4,
        hold: float = 0.6,
        pull: float = 1.0,
        balance: float = 1.0,
        least: float = 0.02,
        refresh: int | None = None,
        reseed: float = 0.02,
        tolerance: float = 0.02,
        curb: float = 0.5,
        blocks: bool = True,
        few: float = 0.25,
    ) -> None:
        if (lr is not None and lr <= 0) or not 0 <= momentum < 1 or (refresh is not None and refresh < 1):
            raise InvalidInput(f"lr={lr} must be positive, momentum={momentum} in [0, 1), refresh={refresh} at least 1")
        if not 0 < epsilon <= 1 or not 0 <= hold <= _LATEST:
            raise InvalidInput(f"epsilon={epsilon} must lie in (0, 1], hold={hold} in [0, {_LATEST}]")
        if not 0 < least < 0.5 or pull <= 0 or balance <= 0:
            raise InvalidInput(f"least={least} must lie in (0, 0.5), pull={pull} and balance={balance} be positive")
        if not 0 <= reseed <= 1 or not 0 <= tolerance < 1 or min(few, curb) < 0 or max(few, curb) > 1:
            raise InvalidInput(
                f"reseed={reseed}, tolerance={tolerance}, curb={curb} and few={few} must all lie in [0, 1]"
            )
        self.lr = lr
        self.momentum = momentum
        self.epsilon = epsilon
        self.hold = hold
        self.pull = pull
        self.balance = balance
        self.least = least
        self.refresh = refresh
        self.reseed = reseed
        self.tolerance = tolerance
        self.curb = curb
        self.removes_blocks = blocks
        self.few = few

    def setup(self, context: Context) -> None:
        super().setup(context)
        context.masked.absorb_(torch.ones(context.groups.total, device=context.device))  # fails now or never
        groups, device = context.groups, context.device
        self._full = torch.from_numpy(groups.widths).to(device)  # [G]
        self._owner = torch.repeat_interleave(self._full)  # [ΣC] group of each channel
        self._minimum, self._maximum = (
            torch.from_numpy(bound).to(device)[self._owner] for bound in (context.minimum, context.maximum)
        )  # [ΣC]
        self.x = torch.ones(groups.total, device=device)  # [ΣC]
        self._start = self._epsilon = float(self.x.square().median()) if groups.total else 1.0
        self._falls_from: int | None = None  # the step from which ε falls
        self._seeding = False  # whether the last refresh gave zeros another chance
        self._scale = 1 + self._start  # 1 / g at the start
        self._velocity = torch.zeros_like(self.x)
        self._gradient = torch.zeros_like(self.x)
        self._score = torch.zeros_like(self.x)  # running |g dL/dg|, the first-order loss of a channel's removal
        self._price = torch.ones_like(self.x)  # mean square 1
        self._cost_price = torch.zeros_like(self.x)  # in the cost's unit per channel
        self._loss_size = self._loss_weight = 0.0
        self._multiplier = 0.0
        self._cost_hard = self._cost_soft = float(context.cost.dense)
        self._mask: Tensor | None = None
        self._absorbed = False
        self._interval = max(1, context.steps // 40) if self.refresh is None else self.refresh
        # The dual variable integrates the excess; more than ten updates in a search would chase the gates.
        self._dual_interval = max(1, context.steps // 10)
        self.x = self._bounded(self.x)

    def gates(self) -> Tensor:
        """g of every channel, in [0, 1]. [ΣC]"""
        square = self.x.square()
        return square / (square + self._epsilon)

    def masks(self, step: int) -> Tensor | None:
        if self._absorbed:
            return None
        self._mask = (self.gates() * self._scale).requires_grad_()
        return self._mask

    def after_backward(self, step: int) -> None:
        if self._mask is None:
            return
        self._gradient = mask_gradient(self._mask)
        # Behind a ReLU the gradient of a mask of 0 is 0: a removed channel keeps the usefulness that it had.
        seen = (self._mask.detach() * self._gradient).abs()
        self._score = torch.where(self.x > 0, self._score.lerp(seen, 1 - _SCORE_DECAY), self._score)
        self._mask = None

    def after_step(self, step: int) -> None:
        if self._absorbed:
            return
        context = self.context
        self._cost_hard = float(context.cost.price(self._end_blocks()))
        if step % self._interval == 0:
            self._set_price()
            if self._falls_from is None:
                self._seed(step)
        target = context.controller.target(step)
        if step % self._dual_interval == 0:
            context.controller.update(self._cost_hard, step)
        self._multiplier = self.pull + context.controller.dual if self._cost_hard > target else 0.0
        self._move(step)
        self._harden(step)

    def _end_blocks(self) -> NDArray[np.int64]:
        """Where one group of a residual block has no gate left, the others inside it have none either.

        Returns the number of gates that are not 0 then. [G]
        """
        counts = self._counts()
        ending = self.context.cost.ended(counts) & (self.context.minimum == 0) & (counts > 0)  # [G]
        if ending.any():
            self.x = torch.where(torch.from_numpy(ending).to(self.x.device)[self._owner], 0.0, self.x)
            counts[ending] = 0
        return counts

    def _set_price(self) -> None:
        """What a channel costs, at the widths of the gates that are not 0."""
        context, counts = self.context, self._counts()
        ended = context.cost.ended(counts)  # [G]
        cost, slope = context.cost.value_and_grad(self.widths().float())
        self._cost_soft = float(cost)
        per_group = np.where(ended, 0.0, slope.double().cpu().numpy())  # [G] in the cost's unit per channel
        exponent = np.full(len(counts), self.curb)
        few = np.flatnonzero((context.minimum == 0) & ~ended & (counts <= self.few * context.groups.widths))
        if len(few):
            without = np.repeat(counts[None], len(few), 0)
            without[np.arange(len(few)), few] = 0
            saved = context.cost.price(counts) - np.asarray(context.cost.price(without))
            exponent[few] = np.where(saved / counts[few] > per_group[few], 1.0, self.curb)
            per_group[few] = np.maximum(per_group[few], saved / counts[few])
        price = torch.from_numpy(per_group).to(self.x)[self._owner]
        relative = (price / price.median().clamp_min(_TINY)).clamp(1 / _PRICE_RATIO, _PRICE_RATIO)
        bounded = relative ** torch.from_numpy(exponent).to(self.x)[self._owner]
        self._cost_price, self._price = price, bounded / bounded.square().mean().sqrt()

    def _move(self, step: int) -> None:
        """A step of x against loss and price, and the proximal zeros."""
        square = float(self._gradient.square().mean())
        self._loss_size = _SIZE_DECAY * self._loss_size + (1 - _SIZE_DECAY) * square
        self._loss_weight = _SIZE_DECAY * self._loss_weight + (1 - _SIZE_DECAY)
        size = math.sqrt(self._loss_size / self._loss_weight)
        scale = self.balance / size if size > 0 else 0.0
        pressure = scale * self._gradient + self._multiplier * self._price  # [ΣC] per gate
        slope = 2 * self.x * self._epsilon / (self.x.square() + self._epsilon).square()  # dg/dx
        # Moving x / √ε by dg / d(x / √ε) moves x by ε dg / dx.
        self._velocity.lerp_(pressure * slope * self._epsilon, 1 - self.momentum)
        lr = min(0.2, 20 / max(1, self.context.steps)) if self.lr is None else self.lr
        x = (self.x - lr * self._velocity).clamp_min(0)
        self.x = self._bounded(torch.where(x < self._nearest_zero(), 0.0, x))
        self._velocity = torch.where(self.x > 0, self._velocity, 0.0)

    def _harden(self, step: int) -> None:
        """Let ε fall, once it has been held long enough and the budget is met, and no zeros fit into it."""
        steps = max(1, self.context.steps)
        met = self._cost_hard <= self.context.controller.target(step) and not self._seeding
        if self._falls_from is None and step >= (self.hold if met else _LATEST) * steps:
            self._falls_from = step
        if self._falls_from is not None:
            done = (step - self._falls_from + 1) / max(1.0, _SETTLED * steps - self._falls_from)
            self._epsilon = self._start * math.pow(self.epsilon, min(1.0, done))

    def _seed(self, step: int) -> None:
        """Give the most useful zeros another chance, as far as the budget has room for them."""
        target = self.context.controller.target(step)
        slack = target - self._cost_hard
        self._seeding = False
        if slack < self.tolerance * target or self.reseed == 0:
            return
        stays = torch.from_numpy(~self.context.cost.ended(self._counts())).to(self.x.device)  # [G]
        allowed = (self.x == 0) & (self._maximum == self._full[self._owner]) & stays[self._owner]
        order = torch.argsort(torch.where(allowed, self._score / self._price, -1.0), descending=True, stable=True)
        order = order[: math.ceil(self.reseed * len(order))]
        chosen = allowed[order] & (self._cost_price[order].cumsum(0) <= slack)
        self.x[order] = torch.where(chosen, math.sqrt(self._epsilon), self.x[order])
        self._seeding = bool(chosen.any())

    def _bounded(self, x: Tensor) -> Tensor:
        """x with as many of every group away from 0, or at 0, as its least and greatest width ask for. [ΣC]"""
        place = group_places(x, self._owner)
        x = torch.where(place < self._minimum, x.clamp_min(self._nearest_zero()), x)
        return torch.where(place >= self._maximum, 0.0, x)

    def _nearest_zero(self) -> float:
        """x where g is ``least``."""
        return math.sqrt(self.least / (1 - self.least) * self._epsilon)

    def _counts(self) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = self.widths().cpu().numpy().astype(np.int64)
        return counts

    def finish(self) -> None:
        """Multiply the gates into the weights; the network computes what it did, and needs no mask any more."""
        self.context.masked.absorb_(self.gates() * self._scale)
        self._absorbed = True

    def widths(self) -> Tensor:
        """The number of gates that are not 0. [G]"""
        return group_sum((self.x > 0).double(), self._owner, len(self._full))

    def ranking(self) -> Tensor:
        """Above 1 for what is left, by x; below for zeros, by the usefulness they had. [ΣC]"""
        square = self.x.square()
        score = self._score / self._score.mean().clamp_min(_TINY)
        return torch.where(self.x > 0, 1 + square / (square + self._start), (score + _TINY) / (1 + score))

    def state_dict(self) -> dict[str, Any]:
        return {
            "x": self.x.clone(),
            "velocity": self._velocity.clone(),
            "gradient": self._gradient.clone(),
            "score": self._score.clone(),
            "price": [self._price.clone(), self._cost_price.clone()],
            "epsilon": self._epsilon,
            "falls_from": self._falls_from,
            "seeding": self._seeding,
            "loss_size": [self._loss_size, self._loss_weight],
            "costs": [self._cost_soft, self._cost_hard, self._multiplier],
            "absorbed": self._absorbed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expect_network(channels=(len(state["x"]), len(self.x)))
        self.x.copy_(state["x"])
        self._velocity.copy_(state["velocity"])
        self._gradient.copy_(state["gradient"])
        self._score.copy_(state["score"])
        self._price, self._cost_price = (price.to(self.x) for price in state["price"])
        self._epsilon, self._falls_from, self._seeding = state["epsilon"], state["falls_from"], state["seeding"]
        self._loss_size, self._loss_weight = state["loss_size"]
        self._cost_soft, self._cost_hard, self._multiplier = state["costs"]
        self._absorbed = state["absorbed"]

    def log(self) -> dict[str, float]:
        """kept: share of gates that are not 0. between: share of gates from 1 % to 99 %. The usual figures beside."""
        gates = self.gates()
        return {
            "kept": float((gates > 0).float().mean()),
            "between": float(((gates > 0.01) & (gates < 0.99)).float().mean()),
            "epsilon": self._epsilon,
            "cost_soft": self._cost_soft,
            "cost_hard": self._cost_hard,
            "multiplier": self._multiplier,
        }

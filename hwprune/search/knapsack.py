"""Latency-saliency knapsack: HALP (Shen et al., NeurIPS 2022, arXiv 2110.10811) with an exact solver.

While the dense network trains, every channel's saliency is accumulated: |g_γ γ + g_β β| of its batch norms, the first
order of what the loss changes when the channel goes. A mask of ones gives that for free, as |dL/dm|. Channels of a
group are sorted by it, and keeping n of them is worth the sum of the n largest. The most valuable widths whose price
fits the budget are then a knapsack, whose items are ordered within a group.

It is solved in rounds, under a budget that falls from the dense latency to the one asked for: what a round leaves out
is off from then on, and the saliencies of what is left are taken anew.

From the paper: saliency, ordering, the objective, and the rounds. Different on purpose: members of a coupled group are
summed with their signs, as one mask acts on all of them; the price is that of whole networks on the measured table,
where the paper adds a latency per channel; and the problem is solved exactly, where the paper has a dynamic programme.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwprune.errors import InvalidInput
from hwprune.graph import keep_top
from hwprune.search.base import Context, Method, expect_network

_LEAST = 1e-12


class Knapsack(Method):
    """Keeps the channels of most first-order Taylor saliency that fit the budget.

    Args:
        rounds: how often the knapsack is solved while the budget falls, over the first half of the steps; the
            saliencies behind the allocation are those since the last round. 0: once, at the end.
        batches: held-out batches that give the saliencies of a search without steps.
    """

    name = "knapsack"
    summary = "latency-saliency knapsack: most Taylor saliency within the budget"
    source = "HALP, Shen et al., NeurIPS 2022 (arXiv 2110.10811), solved exactly"

    def __init__(self, rounds: int = 8, batches: int = 16) -> None:
        if batches < 1 or rounds < 0:
            raise InvalidInput(f"batches={batches} must be at least 1, and rounds={rounds} at least 0")
        self.rounds = rounds
        self.batches = batches

    def setup(self, context: Context) -> None:
        super().setup(context)
        if not context.steps and context.held_out is None:
            raise InvalidInput("the saliencies need gradients: search for one step at least, or give held-out images")
        self._saliency = torch.zeros(context.groups.total, device=context.device)
        self._draws = 0
        self._alive = torch.ones_like(self._saliency)  # 0 for what a round left out
        self._mask: Tensor | None = None
        self._interval = max(1, -(-context.steps // (2 * self.rounds))) if self.rounds else 0

    def masks(self, step: int) -> Tensor:
        self._mask = self._alive.clone().requires_grad_()
        return self._mask

    def after_backward(self, step: int) -> None:
        if self._mask is None or self._mask.grad is None:
            raise InvalidInput("the loss does not depend on the masked channels; call before_step before the forward")
        self._add(self._mask.grad)

    def after_step(self, step: int) -> None:
        done = step + 1
        last = min(self.rounds * self._interval, self.context.steps - 1)  # a draw has to follow
        if self._interval and done % self._interval == 0 and done <= last:
            self._leave_out(self.context.controller.target(done))

    def _leave_out(self, budget: float) -> None:
        """Solve the knapsack for what is left, and turn off what it leaves out."""
        widths = self.within_budget(budget).long().numpy()
        keep = keep_top(self.context.groups, widths, self.ranking().cpu().numpy())
        self._alive *= torch.from_numpy(keep).to(self._alive)
        self._saliency.zero_()
        self._draws = 0

    def finish(self) -> None:
        held_out = self.context.held_out
        if self._draws or held_out is None:
            return
        for _ in range(self.batches):
            mask = self.masks(0)
            self._add(torch.autograd.grad(held_out.loss(mask), mask)[0])

    def widths(self) -> Tensor:
        return self.within_budget()

    def ranking(self) -> Tensor:
        return (self._alive * self._saliency / max(1, self._draws)).clamp_min(_LEAST)

    def values(self) -> Tensor:
        return summed_from_the_top(self.ranking(), self.context.groups.widths)

    def state_dict(self) -> dict[str, Any]:
        return {"saliency": self._saliency.clone(), "alive": self._alive.clone(), "draws": self._draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expect_network(channels=(len(state["saliency"]), len(self._saliency)))
        self._saliency.copy_(state["saliency"])
        self._alive.copy_(state["alive"])
        self._draws = state["draws"]

    def log(self) -> dict[str, float]:
        """Mean saliency of all channels, in the unit of the loss, and the share of them that is left."""
        return {"saliency": float(self.ranking().mean()), "kept": float(self._alive.mean())}

    def _add(self, gradient: Tensor) -> None:
        if bool(gradient.isfinite().all()):  # a step that overflowed says nothing
            self._saliency += gradient.detach().abs()
            self._draws += 1


def summed_from_the_top(scores: Tensor, widths: np.ndarray) -> Tensor:
    """For every group, the sum of its n largest scores, n = 1 to C, laid end to end; float64. [ΣC]"""
    flat = scores.detach().double().cpu().numpy()
    owner = np.repeat(np.arange(len(widths)), widths)
    summed = np.cumsum(flat[np.lexsort((-flat, owner))])
    before = np.concatenate([[0.0], summed])[np.cumsum(widths) - widths]  # [G] what the groups ahead hold
    return torch.from_numpy(summed - np.repeat(before, widths))

"""Prune, train a little, measure, repeat: NetAdapt (Yang et al., ECCV 2018, arXiv 1804.03230) inside a search.

In every round, each group alone is narrowed until the price of the network has fallen by one step. Every such
candidate trains for a few steps under its hard mask, starting from the same weights; the one that is best on held-out
images goes on, with the weights that it has now. After the last round the price is within the budget, and the steps
that are left train the network that was found.

From the paper: rounds, one group per candidate, the widest width that saves enough, channels by their l2 norm, a short
fine-tuning before the choice. Different on purpose: steps of equal size and few of them, because the whole loop has to
fit into the steps of one search, where the paper spends forty thousand per candidate; and the optimiser is the training
loop's, so that its momentum passes from one candidate to the next.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwprune.errors import InvalidInput
from hwprune.graph import keep_top
from hwprune.importance import importance
from hwprune.search.base import Context, HeldOut, Method, expect_network

_REMOVED = 1e-6  # what the score of a channel that is out already is multiplied by
_LEAST_SHARE = 1 / 3  # of the groups are tried in every round, before there are fewer rounds


class Iterative(Method):
    """Narrows one group per round, by trial.

    Where the steps of the search are too few for all groups in all rounds, fewer groups are drawn in every round; where
    a third of them is still too many, there are fewer and larger rounds. The log says what it came to.

    Args:
        rounds: in which the price falls from that of the dense network to the budget.
        share: of the search's steps that the rounds take; the others train the result.
        least: training steps of a candidate, at least.
        batches: held-out batches that candidates are judged by; the same ones for all candidates of a round.
    """

    name = "iterative"
    summary = "prune, train, measure, repeat: one group narrowed per round, chosen by held-out accuracy"
    source = "NetAdapt, Yang et al., ECCV 2018 (arXiv 1804.03230)"
    wants_held_out = True

    def __init__(self, rounds: int = 8, share: float = 0.8, least: int = 5, batches: int = 2) -> None:
        if rounds < 1 or least < 1 or batches < 1 or not 0 < share <= 1:
            raise InvalidInput(
                f"rounds={rounds}, least={least} and batches={batches} must be at least 1, share={share} in (0, 1]"
            )
        self.rounds, self.share, self.least, self.batches = rounds, share, least, batches

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.held_out is None:
            raise InvalidInput("candidates are compared on images beside the training ones: give held-out images")
        self._held_out: HeldOut = context.held_out
        self._plan()
        self._widths = context.maximum.copy()  # [G] of the network so far
        self._kept = torch.ones(context.groups.total, device=context.device)
        self._mask = self._kept
        self._round = 0
        self._candidates = np.empty((0, len(context.groups)), np.int64)  # [K, G] widths; none: all rounds are done
        self._at = self._left = 0  # candidate that is training, and the steps it has left
        self._best: tuple[float, float, int] | None = None  # accuracy, -loss, candidate
        self._before: list[Tensor] = []  # the state that every candidate of the round starts from
        self._after: list[Tensor] = []  # the state of the best candidate
        self._judges: list[tuple[Tensor, Tensor]] = []
        self._scores = torch.ones(context.groups.total)
        self._begin_round()

    def _plan(self) -> None:
        """Candidates per round, rounds, and steps per candidate, such that the steps suffice."""
        context = self.context
        groups = max(1, int((context.minimum < context.maximum).sum()))
        steps = int(self.share * context.steps)
        self._most, self._rounds, self._slice = groups, self.rounds, 0
        if context.steps:
            slices = max(1, steps // self.least)
            fewest = int(np.ceil(_LEAST_SHARE * groups))
            self._most = min(groups, max(fewest, slices // self.rounds))
            self._rounds = max(1, min(self.rounds, slices // self._most))
            self._slice = max(1, steps // (self._rounds * self._most))

    def masks(self, step: int) -> Tensor:
        return self._mask

    def after_step(self, step: int) -> None:
        if len(self._candidates):
            self._left -= 1
            if self._left <= 0:
                self._advance()

    def finish(self) -> None:
        while len(self._candidates):  # without steps, or with fewer than were announced: judged as they are
            self._advance()

    def widths(self) -> Tensor:
        return torch.from_numpy(self._widths).double()

    @torch.no_grad()
    def ranking(self) -> Tensor:
        scores = importance(self.context.model, self.context.groups, "l2")
        return torch.where(self._kept > 0, scores, scores * _REMOVED)

    def state_dict(self) -> dict[str, Any]:
        return {
            "widths": torch.from_numpy(self._widths),
            "candidates": torch.from_numpy(self._candidates),
            "kept": self._kept.clone(),
            "mask": self._mask.clone(),
            "counts": [self._round, self._at, self._left],
            "best": None if self._best is None else list(self._best),
            "before": list(self._before),
            "after": list(self._after),
            "scores": self._scores.clone(),
            "judges": [list(pair) for pair in self._judges],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expect_network(channels=(len(state["kept"]), len(self._kept)))
        device = self.context.device
        self._widths, self._candidates = state["widths"].numpy(), state["candidates"].numpy()
        self._kept, self._mask = state["kept"].to(device), state["mask"].to(device)
        self._round, self._at, self._left = state["counts"]
        self._best = None if state["best"] is None else (state["best"][0], state["best"][1], int(state["best"][2]))
        self._scores = state["scores"].cpu()
        self._before = [tensor.to(device) for tensor in state["before"]]
        self._after = [tensor.to(device) for tensor in state["after"]]
        self._judges = [(inputs.to(device), targets.to(device)) for inputs, targets in state["judges"]]

    def log(self) -> dict[str, float]:
        """Cost so far, the round, and the plan: rounds, candidates in each, training steps of each."""
        return {
            "cost_hard": float(self.context.cost.price(self._widths)),
            "round": float(self._round),
            "rounds": float(self._rounds),
            "candidates": float(self._most),
            "slice": float(self._slice),
        }

    def _begin_round(self) -> None:
        """Line up the candidates of the next round that has something to do; none where the budget is reached."""
        context, cost = self.context, self.context.cost
        first = float(cost.price(context.maximum))
        budget = min(context.controller.budget, first)
        price = float(cost.price(self._widths))
        while self._round < self._rounds:
            self._round += 1
            limit = first - (first - budget) * self._round / self._rounds
            if price > limit + 1e-9 * first:
                break
        else:
            self._candidates, self._mask = self._candidates[:0], self._kept
            self._before, self._after, self._judges = [], [], []
            return
        rows = self._narrowed(limit)
        if len(rows) > self._most:
            device = context.generator.device
            order = torch.randperm(len(rows), generator=context.generator, device=device)[: self._most]
            rows = rows[order.sort().values.cpu().numpy()]
        self._candidates, self._at, self._best = rows, 0, None
        self._before = self._copy()
        self._scores = self.ranking().cpu()
        self._judges = [self._held_out.batch() for _ in range(self.batches)]
        self._begin_candidate()

    def _narrowed(self, limit: float) -> NDArray[np.int64]:
        """The widest networks within ``limit`` that narrow one group; without any, one that narrows all. [K, G]"""
        context, cost = self.context, self.context.cost
        found = []
        for g, (width, least) in enumerate(zip(self._widths.tolist(), context.minimum.tolist(), strict=True)):
            levels = np.asarray(cost.levels(g))
            levels = np.union1d(levels[(levels >= least) & (levels < width)], [least] if least < width else [])
            rows = np.repeat(self._widths[None], len(levels), 0)
            rows[:, g] = levels
            fitting = np.flatnonzero(np.asarray(cost.price(rows)) <= limit) if len(rows) else np.empty(0, np.int64)
            if len(fitting):
                found.append(rows[fitting[-1]])
        if not found:
            shares = np.linspace(1, 0, 201)[1:, None]
            rows = np.rint(shares * self._widths).astype(np.int64).clip(context.minimum, self._widths)
            prices = np.asarray(cost.price(rows))
            fitting = np.flatnonzero(prices <= limit)
            found.append(rows[fitting[0] if len(fitting) else int(prices.argmin())])
        return np.stack(found)

    def _begin_candidate(self) -> None:
        """Put the mask of the candidate in; its steps begin."""
        keep = keep_top(self.context.groups, self._candidates[self._at], self._scores)
        self._mask = torch.from_numpy(keep).to(self._kept)
        self._left = self._slice

    def _advance(self) -> None:
        """Judge the candidate that has trained; go on to the next, or with the best to the next round."""
        accuracy, loss = self._held_out.judged(self._mask, self._judges)
        score = (accuracy, -loss, self._at)  # the loss decides between equals
        if self._best is None or score[:2] > self._best[:2]:
            self._best, self._after = score, self._copy()
        self._at += 1
        if self._at < len(self._candidates):
            self._restore(self._before)
            self._begin_candidate()
            return
        self._restore(self._after)
        self._widths = self._candidates[self._best[2]].copy()
        keep = keep_top(self.context.groups, self._widths, self._scores)
        self._kept = torch.from_numpy(keep).to(self._kept)
        self._begin_round()

    @torch.no_grad()
    def _copy(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors()]

    @torch.no_grad()
    def _restore(self, state: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors(), state, strict=True):
            tensor.copy_(value)

    def _tensors(self) -> list[Tensor]:
        """Looked up every time: a loop that changes the memory format replaces buffers."""
        return [*self.context.model.parameters(), *self.context.model.buffers()]

"""Incremental regularisation (Wang et al., NeurIPS-W 2018, arXiv 1811.08390; IJCNN 2019, arXiv 1804.09461).

Every coupled channel c has its own L2 factor λ_c over all its slices W_c, E(W) = L(W) + ½ Σ_c λ_c ‖W_c‖², which moves
every step by an increment that depends on the channel's place in its group:

    score s_c = ‖W_c‖₁, rank r_c of s_c in the group (0 is least), running mean r̄_c ← ((n - 1) r̄_c + r_c) / n
    ρ_c: place by r̄ among the channels not removed yet; N of them are still to go
    Δλ(ρ) = A e^(-αρ) below N₁, and 2uA - A e^(-α (2 N₁ - ρ)) from there on, α = ln(2/u) / N, N₁ = -ln(u) / α, u = ¼
    λ_c ← max(λ_c + Δλ, 0); a channel whose λ_c reaches the ceiling is removed for good

Δλ is A at 0, point-symmetric about (N₁, uA), and exactly 0 at N, so the N least channels are pressed and the others let
go. From the authors' code (github.com/MingSun-Tse/Caffe_IncReg): all of the above, the ceiling, the reset of what is
left at the end, and the interpolation of the accuracy mode. Reconstruction: one λ per coupled channel (theirs is per
column of one layer); the quota N from a ranking by importance per millisecond, in the steps of the cost model, where
importance is what a channel adds to 1 - 1/m for the part m of its group's score that is kept (log m, tried first,
emptied the groups of large images); A by price; A from the length of the search; and the deadline, at which what is
due is removed outright. The authors halve the weight decay meanwhile, which is the recipe's business here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwprune.errors import InvalidInput
from hwprune.graph import Groups
from hwprune.ops.reference import group_sum
from hwprune.search.base import Context, Method, best_first, expect_network, group_places, refilled, shares

_TO_FINISH = 9  # times ceiling / A that a group's quota takes with frozen ranks: 5 to 9, by simulation
_DEAREST = 4.0  # bounds of the price of a group's channels beside the mean one, when it scales A
_LEAST, _LEAST_PART = 1e-12, 1e-6
_TOLERANCE = 5e-4  # below the floor that still counts as reaching it; the authors' code
_RAMP = 0.4  # of a stage of the accuracy mode over which its limit falls


class IncReg(Method):
    """Regularises the least channels away, a little more every step.

    A removed channel's weights are zeroed after every step and its gradients before, so they are zero in every forward.
    Its momentum lies in the optimiser, out of reach: it gets no new gradient and decays by itself.

    Given ``floor``, the search looks for the lowest cost at that accuracy instead of the best accuracy at a cost. It
    goes down in stages. One that keeps the floor is followed by one of 10 times the spare accuracy, as a part of the
    dense cost (1 % to 20 %); one that does not is taken back, and the next goes to where the line between the two meets
    the floor. The budget is then an upper limit only. (The optimiser's momentum is not taken back.)

    Args:
        ceiling: of λ. The authors' 2.5; the learning rate times it should stay well below 1.
        turn: u, the part of A at which the increment has its turning point.
        deadline: part of the steps (or of a stage) after which what is still due is removed outright. A is chosen so
            that little is.
        interval: steps between two looks at the quota; ``None``: a fiftieth of the steps.
        constant: a λ for every channel from the first step to the last, in place of all increments: what the method is
            to be compared with. Nothing is removed before the end.
        floor: accuracy on held-out images to keep, 0 to 1. stages: how many there may be. batches: held-out batches
            that they are judged by, all by the same.
    """

    name = "increg"
    summary = "incremental regularisation: rank-driven L2 factors per channel"
    source = "Wang et al., NeurIPS-W 2018 (arXiv 1811.08390), with a latency budget"
    fills_budget = False

    def __init__(
        self,
        ceiling: float = 2.5,
        turn: float = 0.25,
        deadline: float = 0.75,
        interval: int | None = None,
        constant: float | None = None,
        floor: float | None = None,
        stages: int = 8,
        batches: int = 8,
    ) -> None:
        if not 0 < ceiling < math.inf or not 0 < turn < 1 or not 0 < deadline <= 1:
            raise InvalidInput(
                f"ceiling={ceiling} must be positive, turn={turn} lie between 0 and 1, deadline={deadline} in (0, 1]"
            )
        if (interval is not None and interval < 1) or stages < 1 or batches < 1:
            raise InvalidInput(f"interval={interval}, stages={stages} and batches={batches} must be 1 or more")
        if constant is not None and not 0 <= constant < math.inf:
            raise InvalidInput(f"constant={constant} must be a finite number, 0 or more")
        if floor is not None and (not 0 < floor < 1 or constant is not None):
            raise InvalidInput(f"floor={floor} must lie between 0 and 1, and excludes constant={constant}")
        self.ceiling, self.turn, self.deadline, self.interval = ceiling, turn, deadline, interval
        self.constant, self.accuracy_floor, self.stages, self.batches = constant, floor, stages, batches
        self.wants_held_out = floor is not None

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.accuracy_floor is not None and context.held_out is None:
            raise InvalidInput(f"floor={self.accuracy_floor} is judged on held-out images: give held_out")
        groups, device = context.groups, context.device
        self._slices = Slices(context.model, groups, device)
        self._owner = torch.from_numpy(np.repeat(np.arange(len(groups)), groups.widths)).to(device)  # [ΣC]
        self._first = torch.from_numpy(groups.offsets[:-1]).to(device)  # [G]
        self._steps = Steps(context)
        share = torch.from_numpy(shares(context.cost, groups.widths.astype(np.float64))).to(device)
        self._weight = share / share.mean()  # [G]
        # [G] how many to remove, the removed included
        self._quota = torch.from_numpy(groups.widths - context.maximum).to(device)
        self._pressure = torch.ones(len(groups), device=device)  # [G] A of each group, as a part of the mean
        self.factors = torch.full((groups.total,), self.constant or 0.0, device=device)  # λ
        self._mean_rank = torch.zeros(groups.total, device=device)
        self._seen = 0  # scores in the mean
        self.removed = torch.zeros(groups.total, dtype=torch.bool, device=device)
        self._unpressed = self._score()  # [ΣC] the scores, those of pressed channels as of before
        self._interval = self.interval or max(1, context.steps // 50)
        self._stage: _Stage | None = None
        self._judges: list[tuple[Any, Any]] = []
        if self.accuracy_floor is not None and context.held_out is not None:
            self._judges = [context.held_out.batch() for _ in range(self.batches)]
            self._stage = self._first_stage(self.accuracy_floor)

    # -- every step

    def after_backward(self, step: int) -> None:
        """Adds λ_c W_c to the gradients, and takes those of removed channels away."""
        factors, dead = self._slices.spread(self.factors), self._slices.spread(self.removed.float())
        for parameter, factor, gone in zip(self._slices.parameters, factors, dead, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_((parameter.detach() * factor).to(parameter.grad)).masked_fill_(gone > 0, 0)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self._stage is not None and self._stage.done:
            self._slices.zero_(self.removed)
            return
        scores = self._score()
        self._seen += 1
        self._mean_rank += (self._rank(scores) - self._mean_rank) / self._seen
        if self.constant is None:
            pressed = (self.factors > 0) | self.removed
            self._unpressed = torch.where(pressed, self._unpressed, scores)
        else:
            self._unpressed = scores
        late = self._progress(step) >= self.deadline
        limit = self._limit(step)
        if step % self._interval == 0 and (not late or self._price() > limit):
            self._set_quota(limit)
        if self.constant is None:
            ranks = self._mean_rank.masked_fill(self.removed, math.inf)
            places = self._rank(ranks)  # [ΣC] ρ; what is removed comes last
            due = (self._quota - self._count(self.removed))[self._owner]  # [ΣC] N
            unit = self._unit() * self._pressure[self._owner]
            self.factors += increments(places, due, unit, self.turn)
            self.factors.clamp_(0, self.ceiling)
            self.removed |= (places < due) & ((self.factors >= self.ceiling) | late)
        self._slices.zero_(self.removed)  # its momentum is not
        if self._stage is not None:
            self._end_of_stage(step, self._stage)

    def finish(self) -> None:
        """Look at the quota for the last time, and let go of whatever is still pressed."""
        if self._stage is None and self._price() > self.context.controller.budget:
            self._set_quota(self.context.controller.budget)
        self.factors.zero_()
        self._slices.zero_(self.removed)

    # -- what was found

    def widths(self) -> Tensor:
        return torch.from_numpy(self.context.groups.widths).to(self._quota) - self._quota.double()

    def ranking(self) -> Tensor:
        return self._share(self._score()).clamp_min(_LEAST)

    def values(self) -> Tensor:
        """By the part of the group's score that is kept, see :func:`mass_worth`, times what the whole group costs.

        Scores can be compared within a group only. Were all groups weighed alike, those that many layers share would
        be the dearest for the same part, and be crushed.

        A channel counts with the score that it had before it was pressed. With the present one, a group that loses
        channels would be worth as much as a whole one to what is left, and be pressed on and on.
        """
        whole = group_sum(self._unpressed, self._owner, len(self._first))
        left = self._unpressed.masked_fill(self.removed, 0)
        return mass_worth(left, whole, self._owner, self._first) * self._weight[self._owner]

    def state_dict(self) -> dict[str, Any]:
        return {
            "factors": self.factors.clone(),
            "mean_rank": self._mean_rank.clone(),
            "seen": self._seen,
            "unpressed": self._unpressed.clone(),
            "removed": self.removed.clone(),
            "quota": self._quota.clone(),
            "pressure": self._pressure.clone(),
            "stage": None if self._stage is None else self._stage.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expect_network(
            groups=(len(state["quota"]), len(self._quota)), channels=(len(state["factors"]), len(self.factors))
        )
        self.factors.copy_(state["factors"])
        self._mean_rank.copy_(state["mean_rank"])
        self._seen = state["seen"]
        self._unpressed.copy_(state["unpressed"])
        self.removed.copy_(state["removed"])
        self._quota.copy_(state["quota"])
        self._pressure.copy_(state["pressure"])
        if self._stage is not None:
            self._stage = _Stage(**state["stage"])

    def log(self) -> dict[str, float]:
        """Shares of channels not removed, and meant to be kept; largest λ; price of what is meant to be kept.

        In the accuracy mode also the accuracy of the last stage that kept the floor, and its cost.
        """
        widths = self.widths()
        row = {
            "kept": 1 - float(self.removed.float().mean()),
            "meant": float(widths.sum()) / self.context.groups.total,
            "factor": float(self.factors.max()),
            "cost_hard": self._price(),
        }
        if self._stage is not None:
            row |= {"held_out_accuracy": self._stage.accuracy, "cost_feasible": self._stage.origin}
        return row

    # -- how

    def _score(self) -> Tensor:
        """‖W_c‖₁ over all slices; 0 for what is removed. [ΣC]"""
        return self._slices.gather([parameter.detach().abs() for parameter in self._slices.parameters])

    def _rank(self, values: Tensor) -> Tensor:
        """Place of each value in its group, ascending from 0. [ΣC] float32"""
        return group_places(-values, self._owner).float()

    def _count(self, flags: Tensor) -> Tensor:
        """How many channels of each group are flagged. [G] int64"""
        return group_sum(flags.to(torch.int64), self._owner, len(self._quota))

    def _share(self, scores: Tensor) -> Tensor:
        """Scores as parts of their group's sum. [ΣC]"""
        total = group_sum(scores, self._owner, len(self._quota))
        return scores / total[self._owner].clamp_min(_LEAST)

    def _set_quota(self, limit: float) -> None:
        widths, prices = self._steps.within(limit, self.values(), self.widths())
        full = self.context.groups.widths
        quota = torch.from_numpy(full - widths).to(self._quota)
        self._quota = quota.maximum(self._count(self.removed))  # what is removed does not come back
        pressure = prices / prices.mean()
        self._pressure = torch.from_numpy(pressure.clip(1 / _DEAREST, _DEAREST)).to(self._pressure)

    def _unit(self) -> float:
        """A: the whole quota is to be gone by the deadline."""
        length = self.context.steps if self._stage is None else self._stage.length
        return _TO_FINISH * self.ceiling / max(1.0, self.deadline * length)

    def _price(self) -> float:
        """Cost of what is meant to be kept."""
        return float(self.context.cost.price(self.context.rounded(self.widths())))

    def _limit(self, step: int) -> float:
        """The cost that the quota aims at."""
        if self._stage is None:
            return self.context.controller.target(step)
        done = min(1.0, self._progress(step) / _RAMP)
        return self._stage.origin + done * (self._stage.goal - self._stage.origin)

    def _progress(self, step: int) -> float:
        """Part of the search, or of the stage, that is done."""
        if self._stage is None:
            return (step + 1) / max(1, self.context.steps)
        return (step + 1 - self._stage.start) / self._stage.length

    # -- the accuracy mode

    def _first_stage(self, floor: float) -> "_Stage":
        context = self.context
        origin = float(context.cost.price(context.maximum))
        accuracy = self._accuracy()
        if accuracy < floor - _TOLERANCE:
            raise InvalidInput(
                f"held-out accuracy is {accuracy:.4f} before anything is pruned, below floor={floor}; give a lower "
                "floor, or train the network first"
            )
        length = max(1, context.steps // self.stages)
        return self._descend(_Stage(0, length, origin, origin, accuracy, _LARGEST, self._snapshot()))

    def _accuracy(self) -> float:
        assert self.context.held_out is not None
        return self.context.held_out.judged(None, self._judges)[0]

    def _descend(self, stage: "_Stage") -> "_Stage":
        """Set the goal of a stage from its increment; it is done where there is nowhere to go."""
        context = self.context
        least = float(context.cost.price(context.minimum))
        stage.goal = max(least, stage.origin - stage.increment * context.cost.dense)
        exhausted = stage.start + stage.length > context.steps
        stage.done = exhausted or stage.increment < _SMALLEST or stage.origin <= least
        return stage

    def _end_of_stage(self, step: int, stage: "_Stage") -> None:
        """Judge the stage when its last step is done, and begin the next."""
        assert self.accuracy_floor is not None
        if stage.done or step + 1 < stage.start + stage.length:
            return
        accuracy = self._accuracy()
        self.factors.zero_()
        stage.start = step + 1
        if accuracy >= self.accuracy_floor - _TOLERANCE:
            stage.origin = self._price()
            stage.accuracy = accuracy
            stage.increment = min(max(10 * (accuracy - self.accuracy_floor), _SMALLEST), _LARGEST)
            stage.feasible = self._snapshot()
        else:
            spare, lost = stage.accuracy - self.accuracy_floor, stage.accuracy - accuracy
            stage.increment = max(0.0, stage.increment * spare / lost)
            self._restore(stage.feasible)
        self._descend(stage)

    def _snapshot(self) -> dict[str, Any]:
        """Weights, statistics, and what is removed."""
        model = {key: value.detach().clone() for key, value in self.context.model.state_dict().items()}
        return {"model": model, "removed": self.removed.clone(), "quota": self._quota.clone()}

    @torch.no_grad()
    def _restore(self, feasible: Mapping[str, Any]) -> None:
        for key, value in self.context.model.state_dict().items():
            value.copy_(feasible["model"][key])
        self.removed.copy_(feasible["removed"])
        self._quota.copy_(feasible["quota"])
        self._mean_rank.zero_()
        self._seen = 0


_SMALLEST, _LARGEST = 0.01, 0.2  # of the dense cost, by which a stage of the accuracy mode goes down; the authors' code


class _Stage:
    """Where the accuracy mode stands.

    start: first step of the stage. length: in steps. origin: cost of the last network that kept the floor. goal: cost
    aimed at. accuracy: of that network. increment: part of the dense cost between the two. feasible: the network.
    """

    def __init__(
        self,
        start: int,
        length: int,
        origin: float,
        goal: float,
        accuracy: float,
        increment: float,
        feasible: Mapping[str, Any],
        done: bool = False,
    ) -> None:
        self.start, self.length, self.origin, self.goal = start, length, origin, goal
        self.accuracy, self.increment, self.feasible, self.done = accuracy, increment, feasible, done

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def increments(places: Tensor, due: Tensor, unit: Tensor, turn: float = 0.25) -> Tensor:
    """Δλ of "scheme 1". places: ρ. due: N, of each one's group. unit: A. turn: u. All [ΣC]; returns [ΣC].

    Where nothing is due, everything is let go at the rate A (the limit of the formula is -∞).
    """
    alpha = math.log(2 / turn) / due.clamp_min(1).to(places)
    middle = math.log(1 / turn) / alpha
    near = torch.exp(-alpha * places)
    far = 2 * turn - torch.exp((alpha * (places - 2 * middle)).clamp_max(50))  # the floor of λ is met long before
    return unit * torch.where(due > 0, torch.where(places < middle, near, far), -1.0)


def mass_worth(scores: Tensor, whole: Tensor, owner: Tensor, first: Tensor) -> Tensor:
    """1 - 1/m for the part m of ``whole`` that the best n channels of a group hold, n = 1 to C of all. [ΣC] float64

    scores: [ΣC], 0 or more. whole: [G], the score of all channels. owner: [ΣC] group of each. first: [G] where each
    group begins. A group without any score is worth its width: nothing tells its channels apart.
    """
    order = best_first(scores, owner)
    held = scores.double()[order].cumsum(0)
    before = torch.cat([held.new_zeros(1), held])[first]  # [G]
    count = torch.arange(1, len(owner) + 1, device=owner.device) - first[owner]
    width = torch.bincount(owner, minlength=len(first))
    total = whole.double()[owner]
    part = torch.where(total > 0, (held - before[owner]) / total.clamp_min(_LEAST), count / width[owner])
    return 1 - 1 / part.clamp(_LEAST_PART, 1)


class Steps:
    """The steps in which widths go down: one ranking over all groups, by worth per price."""

    def __init__(self, context: Context) -> None:
        cost, groups = context.cost, range(len(context.groups))
        bounds = [(int(context.minimum[g]), int(context.maximum[g])) for g in groups]
        levels = [
            np.unique([low, high, *(n for n in cost.levels(g) if low <= n <= high)])[::-1]
            for g, (low, high) in zip(groups, bounds, strict=True)
        ]
        most = max((len(line) for line in levels), default=1)
        # Shorter lines end in steps of no width, which are left out of the ranking.
        table = np.array([np.pad(line, (0, most - len(line)), "edge") for line in levels]).reshape(len(levels), most)
        self._cost, self._first = cost, context.groups.offsets[:-1, None]
        self._start = table[:, 0]  # [G]
        self._above, self._below = table[:, :-1], table[:, 1:]  # [G, L] widths before and after each step

    def within(self, limit: float, values: Tensor, widths: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Widths [G] that cost at most ``limit`` (or the least there are), and the price of a channel [G].

        values: [ΣC], see :meth:`Method.values`. widths: [G], where prices are looked at.
        """
        slopes = self._cost.value_and_grad(widths.cpu())[1].numpy()
        prices: NDArray[np.float64] = np.maximum(slopes, 1e-3 * slopes.mean()) + _LEAST
        if not self._above.size:
            return self._start, prices
        worths = values.cpu().numpy()
        lost = worths[self._first + self._above - 1] - worths[self._first + self._below - 1]  # [G, L]
        size = self._above - self._below
        with np.errstate(divide="ignore", invalid="ignore"):
            keys = np.where(size > 0, lost / (size * prices[:, None]), np.inf)
        keys = np.maximum.accumulate(keys, axis=1)  # a later step of a group never comes before an earlier one
        order = np.argsort(keys.ravel(), kind="stable")
        order = order[size.ravel()[order] > 0]
        group = order // size.shape[1]
        downs = np.zeros((len(order) + 1, len(size)), dtype=np.int64)  # [steps + 1, G]
        downs[np.arange(1, len(downs)), group] = size.ravel()[order]
        candidates = self._start - downs.cumsum(0)
        fitting = np.flatnonzero(np.asarray(self._cost.price(candidates)) <= limit)
        if not len(fitting):
            return candidates[-1], prices

        def urgency(widths: NDArray[np.int64]) -> NDArray[np.float64]:
            taken = (self._above > widths[:, None]).sum(1)  # steps down to where each group stands
            found: NDArray[np.float64] = keys[np.arange(len(keys)), taken - 1]
            return found

        return refilled(self._cost, candidates[fitting[0]], self._start, limit, urgency), prices


class Slices:
    """Where the channels' slices lie in the network's parameters, so that [ΣC] numbers reach them at once.

    parameters: those that hold any, each once.
    """

    def __init__(self, model: nn.Module, groups: Groups, device: torch.device) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        total = groups.total
        maps: dict[tuple[int, int], NDArray[np.int64]] = {}  # (parameter, dim) -> channel of each index; ΣC for none
        parameters: dict[int, nn.Parameter] = {}
        for group, first in zip(groups, groups.offsets[:-1].tolist(), strict=True):
            for slot in group.slots:
                parameter = named.get(slot.parameter)
                if parameter is None:  # a buffer
                    continue
                parameters[id(parameter)] = parameter
                line = maps.setdefault((id(parameter), slot.dim), np.full(parameter.shape[slot.dim], total))
                line[slot.positions.ravel()] = np.repeat(
                    first + np.arange(len(slot.positions)), slot.positions.shape[1]
                )
        self.parameters = list(parameters.values())
        number = {key: index for index, key in enumerate(parameters)}
        keys = sorted(maps, key=lambda key: (number[key[0]], key[1]))
        self._sites = [(number[parameter], dim) for parameter, dim in keys]
        self._sizes = [len(maps[key]) for key in keys]
        joined = np.concatenate([maps[key] for key in keys]) if keys else np.empty(0, np.int64)
        self._index = torch.from_numpy(joined).to(device)
        self._site = torch.repeat_interleave(torch.tensor(self._sizes, dtype=torch.int64)).to(device)
        self._total = total

    def spread(self, flat: Tensor) -> list[Tensor]:
        """Per parameter the sum of ``flat`` [ΣC] over the channels that an element belongs to, to be broadcast."""
        padded = torch.cat([flat, flat.new_zeros(1)])
        found: list[Any] = [0] * len(self.parameters)
        for (number, dim), part in zip(self._sites, torch.split(padded[self._index], self._sizes), strict=True):
            found[number] = found[number] + part.view(-1, *(1,) * (self.parameters[number].ndim - 1 - dim))
        return found

    def gather(self, values: Sequence[Tensor | None], *, relative: bool = False) -> Tensor:
        """Sums elements of tensors like ``parameters`` into the channels that they belong to; None is left out. [ΣC]

        relative: what a channel gets from one dim of one parameter is divided by the mean over that dim's channels.
        """
        parts = []
        for (number, dim), size in zip(self._sites, self._sizes, strict=True):
            value = values[number]
            if value is None:
                parts.append(torch.zeros(size, device=self._index.device))
                continue
            others = [d for d in range(value.ndim) if d != dim]
            parts.append((value.sum(others) if others else value).float())
        sums = torch.zeros(self._total + 1, device=self._index.device)
        if not parts:
            return sums[:-1]
        flat = torch.cat(parts)
        if relative:
            owned = (self._index < self._total).float()
            means = torch.zeros(2, len(parts), device=flat.device)
            means.index_add_(1, self._site, torch.stack([flat * owned, owned]))
            flat = flat / (means[0] / means[1].clamp_min(1)).clamp_min(_LEAST)[self._site]
        return sums.index_add_(0, self._index, flat)[:-1]

    @torch.no_grad()
    def zero_(self, flags: Tensor) -> None:
        """Zero every slice of the channels that are flagged [ΣC]."""
        for parameter, flagged in zip(self.parameters, self.spread(flags.float()), strict=True):
            parameter.masked_fill_(flagged > 0, 0)

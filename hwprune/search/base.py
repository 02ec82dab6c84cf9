"""The protocol of a search method, and the session that runs one inside any training loop.

A method decides, while the weights train, how many channels every group should keep and which. All of them share the
masks, the cost model and the budget controller, so that they can be compared at equal measured milliseconds.
"""

import importlib
import inspect
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwprune.allocator import Allocation, allocate
from hwprune.budget import BudgetController
from hwprune.errors import InvalidInput
from hwprune.graph import Follower, Groups, Program
from hwprune.latency import CostModel, Target
from hwprune.nn import Masked, batch_statistics, mask_
from hwprune.train import LossFn, Recipe, begin_epoch, fit

METHODS: dict[str, str] = {
    "csr": "hwprune.search.csr:CSR",
    "dais": "hwprune.search.dais:DAIS",
    "ddpnas": "hwprune.search.ddpnas:DDPNAS",
    "dsa": "hwprune.search.dsa:DSA",
    "gdp": "hwprune.search.gdp:GDP",
    "increg": "hwprune.search.increg:IncReg",
    "iterative": "hwprune.search.iterative:Iterative",
    "knapsack": "hwprune.search.knapsack:Knapsack",
    "magnitude": "hwprune.search.magnitude:Magnitude",
    "psap": "hwprune.search.psap:PSAP",
    "ss_auto": "hwprune.search.ss_auto:SSAuto",
    "uniform": "hwprune.search.uniform:Uniform",
}
DEFAULT_METHOD = "dsa"


class HeldOut:
    """Images that the weights are not trained on, for methods that learn or choose on others than the weights do.

    Args:
        masked: the network under its masks. loader: ``(inputs, targets)`` batches, begun again when they run out, as
        the next epoch. loss_fn: ``(output, targets) -> scalar``; cross entropy by default. apart: False where these are
        training images all the same, because there are no others.
    """

    def __init__(
        self, masked: Masked, loader: Iterable[Any], loss_fn: LossFn | None = None, *, apart: bool = True
    ) -> None:
        self._masked, self._loader, self.apart = masked, loader, apart
        self._epoch = 0
        self._loss_fn = loss_fn or nn.functional.cross_entropy
        self._batches: Iterator[Any] | None = None
        self.drawn = 0  # batches given so far: what a checkpoint needs

    def batch(self) -> tuple[Any, Any]:
        """The next batch, on the device of the network."""
        device = next((parameter.device for parameter in self._masked.model.parameters()), torch.device("cpu"))
        for _ in range(2):
            if self._batches is None:
                begin_epoch(self._loader, self._epoch)
                self._batches = iter(self._loader)
                self._epoch += 1
            for inputs, targets in self._batches:
                self.drawn += 1
                return inputs.to(device), targets.to(device)
            self._batches = None
        raise InvalidInput("the held-out loader yields no batch; give one with images, or a smaller batch size")

    def loss(self, mask: Tensor | None, batch: tuple[Any, Any] | None = None) -> Tensor:
        """The loss on the next batch, or the one given, under a mask [ΣC], differentiable to it. []

        Batch norms use the batch's statistics and leave their running ones alone.
        """
        inputs, targets = batch or self.batch()
        self._masked.set(mask)
        with batch_statistics(self._masked.model):
            return self._loss_fn(self._masked.model(inputs), targets)

    @torch.no_grad()
    def judged(self, mask: Tensor | None, batches: Iterable[tuple[Any, Any]]) -> tuple[float, float]:
        """Accuracy, 0 to 1, and mean loss on ``batches`` under a mask [ΣC]; see :meth:`loss` about batch norms.

        Networks that are compared are better judged by the same images: what the draw decides is left out.
        """
        right = total = 0
        losses = []
        self._masked.set(mask)
        with batch_statistics(self._masked.model):
            for inputs, targets in batches:
                output = self._masked.model(inputs)
                right += int((output.argmax(-1) == targets).sum())
                total += targets.numel()
                losses.append(float(self._loss_fn(output, targets)))
        return right / total, float(np.mean(losses))

    def skip_to(self, drawn: int) -> None:
        """Draw batches until ``drawn`` have been given, as a resumed search must."""
        while self.drawn < drawn:
            self.batch()


@dataclass
class Context:
    """What a method is given to work with.

    Attributes:
        model: the network, with masks in place; its parameters are the user's own. masked: the handle of the masks.
        groups: the coupled channels. G groups, ΣC channels.
        cost: prices widths; milliseconds or FLOPs.
        controller: says how strongly the budget pulls.
        steps: optimiser steps the search will take; 0 when nothing is trained.
        generator: the only source of randomness; its state is part of a checkpoint.
        device: where flat arrays live.
        minimum: [G] int64, the least width of each group; 0 only where the method removes blocks and the group may go.
        maximum: [G] int64, the greatest; equal to ``minimum`` for groups pinned by the user.
        held_out: batches beside those that train the weights; of training images where the user gave no others, and
            ``None`` where there are none either.
        program: what ``groups`` come from, with example inputs of the batch that counts; ``None`` where none was given.
        target: where the network will run.
    """

    model: nn.Module
    masked: Masked
    groups: Groups
    cost: CostModel
    controller: BudgetController
    steps: int
    generator: torch.Generator
    device: torch.device
    minimum: NDArray[np.int64]
    maximum: NDArray[np.int64]
    held_out: HeldOut | None = None
    program: Program | None = None
    target: Target = field(default_factory=Target)

    @property
    def pinned(self) -> dict[int, int]:
        """Group -> the only width that it may have."""
        return {int(g): int(self.maximum[g]) for g in np.flatnonzero(self.minimum == self.maximum)}

    def rounded(self, widths: Tensor) -> NDArray[np.int64]:
        """Integer widths next to the real ones, within [minimum, maximum]. [G]"""
        nearest: NDArray[np.int64] = np.rint(widths.detach().double().cpu().numpy()).astype(np.int64)
        return nearest.clip(self.minimum, self.maximum)


class Method(ABC):
    """One way to find widths. A subclass is one file in ``hwprune/search`` and one line in ``METHODS``.

    Order of calls: ``setup`` once; for every training step ``masks``, forward, backward, ``after_backward``, optimiser,
    ``after_step``; at the end ``finish``, ``widths`` and ``ranking``. Constructor arguments are the options that a user
    may give.

    Attributes:
        name: key in ``METHODS``. summary: one line for the help. source: the paper, or "reconstruction".
        straight_through: masked parameters get the gradient that they would have unmasked.
        skips: channels whose mask is exactly 0 are not computed, which needs the program.
        fills_budget: the allocation may keep any channel; otherwise nothing is left of those beyond ``widths``, which
            are an upper limit of their own.
        removes_blocks: width 0 has a price where a residual block can do without a group (:attr:`CostModel.removing`),
            and the method may choose it.
        wants_held_out: it learns or chooses on images, and would be flattered by those that the weights train on.
        accuracy_floor: 0 to 1, where it looks for the least cost at that accuracy, with the budget as an upper limit.
        searches: the search's steps train weights; otherwise it is over at once, and they are better spent afterwards.
        refits: before the cut, the consumers of the kept channels are refitted by least squares to make up for the
            others (see :mod:`hwprune.refit`), unless the user says otherwise.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    searches: ClassVar[bool] = True
    refits: ClassVar[bool] = False
    fills_budget: ClassVar[bool] = True
    straight_through: bool = False
    skips: bool = False
    removes_blocks: bool = False
    wants_held_out: bool = False
    accuracy_floor: float | None = None
    context: Context

    def setup(self, context: Context) -> None:
        """Look at the network before the first step."""
        self.context = context

    def masks(self, step: int) -> Tensor | None:
        """The flat mask [ΣC] of this step, ``None`` for none. If it requires grad, the loss is differentiated to it."""
        return None

    def after_backward(self, step: int) -> None:  # noqa: B027  a method may have nothing to do here, as below
        """Gradients of parameters and mask are there; the optimiser has not stepped yet."""

    def after_step(self, step: int) -> None:  # noqa: B027
        """The optimiser has stepped."""

    def finish(self) -> None:  # noqa: B027
        """The last step is done, and the masks are still in: weights may be changed for good."""

    @abstractmethod
    def widths(self) -> Tensor:
        """Real-valued widths found so far. [G]"""

    @abstractmethod
    def ranking(self) -> Tensor:
        """How much each channel matters, above 0; the best of every group are kept. [ΣC]"""

    def values(self) -> Tensor | None:
        """What the best n channels of a group are worth, n = 1 to C of every group, laid end to end. [ΣC]

        ``None`` where the widths say it all. Differences within a group count; their unit is the same in all groups.
        """
        return None

    def columns(self) -> Mapping[str, Tensor] | None:
        """Which (kh, kw, c) columns of single convolutions are left: weight name -> bool [kH·kW·Cin].

        Channels are numbered as in the dense network. The weights of the other columns are zero, so that nothing
        depends on :func:`hwprune.nn.prune_columns_` being used. ``None`` where columns are not pruned.
        """
        return None

    def notes(self) -> list[str]:
        """Sentences for the report: what a user should know of the search beside its figures."""
        return []

    def within_budget(self, budget: float | None = None) -> Tensor:
        """What :meth:`allocate` makes of :meth:`ranking` and :meth:`values` at a budget, by default the search's. [G]

        For methods that find no widths of their own.
        """
        context = self.context
        full = torch.from_numpy(context.groups.widths)
        chosen = self.allocate(
            context.groups,
            context.cost,
            full,
            self.ranking(),
            context.controller.budget if budget is None else budget,
            value=self.values(),
            minimum=context.minimum,
            pinned=context.pinned,
        )
        return torch.from_numpy(chosen.widths).double()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed search needs: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore :meth:`state_dict`; called after :meth:`setup`."""

    def log(self) -> dict[str, float]:
        """Figures for the history of the search."""
        return {}

    @classmethod
    def allocate(
        cls,
        groups: Groups,
        cost: CostModel,
        widths: Tensor,
        ranking: Tensor,
        budget: float,
        *,
        value: Tensor | None = None,
        minimum: NDArray[np.int64] | None = None,
        multiple: int | NDArray[np.int64] = 1,
        pinned: Mapping[int, int] | None = None,
    ) -> Allocation:
        """Integer widths within ``budget`` (unit of ``cost``) from what was found.

        That is ``widths`` [G], ``ranking`` [ΣC], and ``value`` [ΣC] where the method has :meth:`values`. Nothing else
        is needed, so that it can be repeated with a tighter budget long after the search. Where the method does not
        fill the budget, the widths are those that were found if they fit, else the nearest narrower ones.

        Raises:
            InfeasibleBudget: no widths are that cheap.
        """
        most: NDArray[np.int64] | None = None
        if not cls.fills_budget:
            lowest, highest = bounds(groups, cost, minimum, pinned or {})
            found = np.rint(widths.detach().cpu().numpy()).astype(np.int64)
            most = (-(-found // multiple) * multiple).clip(lowest, highest)
            price = float(cost.price(most))
            if price <= budget:
                return Allocation(most, price, value=0.0, bound=0.0, gap=0.0, method="greedy", wall_s=0.0)
            pinned = {**{int(g): 0 for g in np.flatnonzero(found == 0)}, **(pinned or {})}  # what has ended stays so
        if value is not None:
            levels = at_levels(groups, cost, value)
        else:
            levels = worth(cost, scaled(cost, widths, budget) if most is None else widths)
        return allocate(cost, levels, budget, minimum=minimum, maximum=most, multiple=multiple, pinned=pinned)


def mask_gradient(mask: Tensor) -> Tensor:
    """dL/dm of the mask of a step [ΣC]; zeros where the step overflowed: mixed precision skips it, and it says nothing.

    Raises InvalidInput where the loss was not differentiated to the mask.
    """
    if mask.grad is None:
        raise InvalidInput("the loss does not depend on the masked channels; train the network that was traced")
    return finite(mask.grad)


def finite(gradient: Tensor) -> Tensor:
    """The gradient, or zeros where any of it is infinite or NaN."""
    return torch.where(gradient.isfinite().all(), gradient, 0.0)


def expect_network(**counts: tuple[int, int]) -> None:
    """Refuse the checkpoint of another network: counts are noun -> (the checkpoint's, this search's).

    Raises InvalidInput, with the counts, unless they agree.
    """
    if any(found != own for found, own in counts.values()):
        theirs = " and ".join(f"{found} {noun}" for noun, (found, _) in counts.items())
        ours = " and ".join(str(own) for _, own in counts.values())
        raise InvalidInput(
            f"the checkpoint's search has {theirs}; this one has {ours}. Resume with the network and options it was "
            "made with"
        )


def best_first(values: Tensor, owner: Tensor) -> Tensor:
    """Where the values of every group stand, one group after the other, each from its largest on. [ΣC] int64

    values: [ΣC]; equal ones keep their order. owner: [ΣC], the group of each, never falling.
    """
    order = torch.argsort(values, descending=True, stable=True)
    return order[torch.argsort(owner[order], stable=True)]


def group_places(values: Tensor, owner: Tensor) -> Tensor:
    """Place of each value in its group, 0 for the largest; the arguments of :func:`best_first`. [ΣC] int64"""
    order = best_first(values, owner)
    widths = torch.bincount(owner)
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order), device=order.device) - (widths.cumsum(0) - widths)[owner]
    return found


def at_levels(groups: Groups, cost: CostModel, value: Tensor) -> list[NDArray[np.float64]]:
    """The worth of each level of each group, of the worths of all widths ``value`` [ΣC]; see :meth:`Method.values`."""
    flat = value.detach().double().cpu().numpy()
    if flat.shape != (groups.total,):
        raise InvalidInput(f"value has shape {flat.shape}; it needs one number per channel, ({groups.total},)")
    return [flat[first + np.maximum(cost.levels(g), 1) - 1] for g, first in enumerate(groups.offsets[:-1])]


_CURVATURE = 4.0  # of the worth, in the logarithm of the width
_BEYOND = 0.1  # the least slope of the worth, relative to that at the learned width


def worth(cost: CostModel, widths: Tensor) -> list[NDArray[np.float64]]:
    """What each level of each group is worth, when a search has settled at the real-valued ``widths`` w [G].

    There, one channel more is worth what it costs: λ d cost / dw. The concave utility w (d cost / dw) (r - 2 r²) of
    r = log(n / w) has that slope at n = w in every group, λ aside, so maximising it under the same budget reproduces
    the learned widths; plateaus, rounding and another budget bend all of them in proportion. Far above w it goes on
    rising at a tenth of the slope. (Reconstruction. Without the quadratic term nothing but the curvature of the cost
    held the widths where they were learned: resnet20, batch 1, half of its latency, right after the cut, 63.8 % and
    with it 66.6 %.)

    The slope is the mean one, from the least to the full width of the group. The local one is 0 on a plateau: groups
    that a search had kept whole, because nothing is gained by thinning them, then counted as worthless and were crushed
    first (resnet20, batch 32, half of its latency: 67 % after two epochs of fine-tuning, and 77 % so after one).

    Width 0, where it is a level, counts as half a channel, and as no better than what a learned width loses per unit of
    cost when it has been narrowed by a factor of e: a block that the search has kept goes last.
    """
    learned = widths.detach().double().cpu().numpy()  # [G]
    learned = np.where(learned > 0, learned, 1.0)  # a group that is gone stays so, whatever it would be worth
    knee = (1 - _BEYOND) / _CURVATURE  # where the slope has fallen to the least one
    levels = []
    for g, (part, w) in enumerate(zip(shares(cost, learned), learned, strict=True)):
        own = cost.levels(g)
        r = np.log(np.maximum(own, 0.5) / w)
        bent = np.minimum(r, knee)
        levels.append(part * (bent - _CURVATURE / 2 * bent**2 + _BEYOND * (r - bent)))
        if own[0] == 0:
            levels[g][0] = min(levels[g][0], -(1 + _CURVATURE) * part * own[-1] / w)
    return levels


def shares(cost: CostModel, widths: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each group's width costs at ``widths`` w [G]: w times the mean slope from its least to its full width. [G]

    In the unit of the cost, and at least a tenth of the mean over the groups. A group whose accuracy gains this much
    per e-fold of its width is settled at w: with no evidence but this, all groups are narrowed alike.
    """
    groups = np.arange(cost.groups)
    least, full = _ends(cost)
    rounded = np.clip(np.round(widths).astype(np.int64), least, full)
    low, high = np.repeat(rounded[None], 2 * len(groups), 0).reshape(2, len(groups), len(groups))  # [G, G] each
    low[groups, groups], high[groups, groups] = least, full
    rise = np.maximum(np.asarray(cost.price(high)) - np.asarray(cost.price(low)), 0.0)
    share = rise / np.maximum(full - least, 1) * widths
    return np.maximum(share, 0.1 * share.mean()) if share.any() else np.ones_like(share)


def scaled(cost: CostModel, widths: Tensor, budget: float) -> Tensor:
    """``widths`` [G] times the one number that makes their rounded price fill ``budget``, within what is possible."""
    learned = widths.detach().double().cpu().numpy()
    least, full = _ends(cost)
    factors = np.geomspace(1 / 8, 8, 385)  # priced, not bisected for: measured prices are not monotone
    candidates = np.clip(factors[:, None] * learned, least, full)  # [N, G]
    fitting = np.flatnonzero(np.asarray(cost.price(np.rint(candidates).astype(np.int64))) <= budget)
    return torch.from_numpy(candidates[fitting[-1] if len(fitting) else 0])


def refilled(
    cost: CostModel,
    widths: NDArray[np.int64],
    most: NDArray[np.int64],
    limit: float,
    urgency: Callable[[NDArray[np.int64]], NDArray[np.float64]],
) -> NDArray[np.int64]:
    """``widths`` [G] with single groups raised to their next level, up to ``most`` [G], while ``limit`` has room.

    The last step down may have been a large one, and up to the end of a plateau channels are free. Of the groups that
    fit, the one comes first whose next step has the greatest ``urgency(widths)`` [G].
    """
    lines = [cost.levels(g) for g in range(cost.groups)]
    length = max(map(len, lines), default=0)
    padded = np.array([np.pad(line, (0, length - len(line)), "edge") for line in lines]).reshape(-1, length)
    levels = np.minimum(padded, most[:, None])  # [G, L]
    groups = np.arange(len(lines))
    while True:
        above = np.where(levels > widths[:, None], levels, most[:, None]).min(1)
        wider = np.repeat(widths[None], len(groups), 0)
        wider[groups, groups] = above
        fits = (above > widths) & (np.asarray(cost.price(wider)) <= limit)
        if not fits.any():
            return widths
        widths = wider[int(np.argmax(np.where(fits, urgency(widths), -np.inf)))]


def _ends(cost: CostModel) -> NDArray[np.int64]:
    """The least and the full width of every group. [2, G]"""
    return np.array([[cost.levels(g)[at] for g in range(cost.groups)] for at in (0, -1)], dtype=np.int64)


def method_class(name: str) -> type[Method]:
    """The class behind a name in ``METHODS``. Raises InvalidInput for an unknown one."""
    if name not in METHODS:
        raise InvalidInput(f"search method {name!r} is unknown; possible: {', '.join(sorted(METHODS))}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found


def create(name: str, /, **options: Any) -> Method:
    """A method by name. Raises InvalidInput for an unknown name or option, or a value of the wrong kind."""
    cls = method_class(name)
    accepted = inspect.signature(cls).parameters
    unknown = [key for key in options if key not in accepted]
    if unknown:
        raise InvalidInput(
            f"search method {name!r} does not take {', '.join(unknown)}; its options: {', '.join(accepted) or 'none'}"
        )
    unfit = [key for key, value in options.items() if not _fits(value, accepted[key].annotation)]
    if unfit:
        given = ", ".join(f"{key}={options[key]!r}" for key in unfit)
        wanted = ", ".join(str(accepted[key]) for key in unfit)
        raise InvalidInput(f"search method {name!r} cannot use {given}; it takes {wanted}")
    return cls(**options)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value, of JSON or of a program, is of the kind that an annotation says; what it does not know fits."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:  # which of them there are is the method's to say
        return any(isinstance(value, type(part)) for part in parts)
    if origin is tuple:
        same = isinstance(value, list | tuple) and len(value) == len(parts)
        return same and all(_fits(item, part) for item, part in zip(value, parts, strict=True))
    if origin is Sequence:
        return isinstance(value, Iterable) and not isinstance(value, str) and all(_fits(x, parts[0]) for x in value)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    found = origin or kind
    return not isinstance(found, type) or found is inspect.Parameter.empty or isinstance(value, found)


@dataclass(frozen=True)
class SearchResult:
    """What a search found, for ``method_class(name).allocate``.

    widths: [G] float64, before rounding. ranking: [ΣC] float32, see :meth:`Method.ranking`. log: the history, one dict
    per recorded step. value: [ΣC] float64 or None, see :meth:`Method.values`. columns: see :meth:`Method.columns`.
    removes_blocks, accuracy_floor: see :class:`Method`. notes: see :meth:`Method.notes`.
    """

    widths: Tensor
    ranking: Tensor
    log: list[dict[str, float]] = field(repr=False)
    value: Tensor | None = None
    columns: Mapping[str, Tensor] | None = None
    removes_blocks: bool = False
    accuracy_floor: float | None = None
    notes: tuple[str, ...] = ()


class Search:
    """A method at work on a network, as step hooks for any training loop.

    The network is masked from construction to :meth:`close` (or the end of a ``with`` block)::

        with Search("dsa", model, groups, cost, controller, steps=1000) as search:
            for step, (x, y) in enumerate(batches):
                search.before_step(step)
                loss_fn(model(x), y).backward()
                search.after_backward(step)
                optimiser.step(); optimiser.zero_grad()
                search.after_step(step)
        found = search.result()

    Args:
        method: a name in ``METHODS``, or an object.
        steps: optimiser steps that will be taken; steps count from 0.
        options: arguments of the method, when it is given by name.
        seed: of everything random in the search.
        minimum: [G] least widths, at least one each; by default that, or 0 where the method removes blocks and one may
            go. pinned: group index -> width that it must have.
        held_out: batches ``(inputs, targets)`` that the weights do not train on, for methods that use such; ``loss_fn``
            is their loss. calibration: batches of training images that stand in for them.
        program: what ``groups`` come from, for methods that leave masked channels out of the computation, or time parts
            of it on ``target``.
        log_every: a row of ``history`` is recorded at multiples of this step.
    """

    def __init__(
        self,
        method: str | Method,
        model: nn.Module,
        groups: Groups,
        cost: CostModel,
        controller: BudgetController,
        steps: int,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        *,
        minimum: NDArray[np.int64] | None = None,
        pinned: Mapping[int, int] | None = None,
        held_out: Iterable[Any] | None = None,
        calibration: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        program: Program | None = None,
        target: Target | None = None,
        log_every: int = 20,
    ) -> None:
        self.method = create(method, **(options or {})) if isinstance(method, str) else method
        self.history: list[dict[str, float]] = []
        self._log_every = log_every
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        generator = torch.Generator(device)
        generator.manual_seed(seed)
        cost = cost.removing if self.method.removes_blocks else cost
        lowest, highest = bounds(groups, cost, minimum, pinned or {})
        if self.method.skips and program is None:
            raise InvalidInput(
                f"{self.method.name} was asked to skip channels; give Search the program that was traced"
            )
        follower = Follower(model, program) if self.method.skips and program is not None else None
        self._masked = mask_(model, groups, follower)
        images = calibration if held_out is None else held_out
        beside = None if images is None else HeldOut(self._masked, images, loss_fn, apart=held_out is not None)
        self.context = Context(
            model,
            self._masked,
            groups,
            cost,
            controller,
            steps,
            generator,
            device,
            lowest,
            highest,
            beside,
            program,
            target or Target(),
        )
        try:
            self.method.setup(self.context)
        except BaseException:
            self.close()
            raise

    def before_step(self, step: int) -> None:
        """Put the masks of this step in."""
        method = self.method
        self._masked.set(method.masks(step), straight_through=method.straight_through, skip=method.skips)

    def after_backward(self, step: int) -> None:
        """Hand the gradients to the method."""
        self.method.after_backward(step)

    def after_step(self, step: int) -> None:
        """Let the method move, and record how it stands."""
        self.method.after_step(step)
        if step % self._log_every == 0 or step == self.context.steps - 1:
            self.history.append({"step": float(step), **self.log()})

    def state_dict(self) -> dict[str, Any]:
        """Everything but the network and its optimiser."""
        return {
            "method": self.method.state_dict(),
            "controller": dict(self.context.controller.state_dict()),
            "generator": self.context.generator.get_state(),
            "held_out": self.context.held_out.drawn if self.context.held_out else 0,
            "history": [dict(row) for row in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.method.load_state_dict(state["method"])
        self.context.controller.load_state_dict(state["controller"])
        self.context.generator.set_state(state["generator"].cpu())
        if self.context.held_out:
            self.context.held_out.skip_to(state["held_out"])
        self.history = [dict(row) for row in state["history"]]

    def widths(self) -> Tensor:
        """See :meth:`Method.widths`."""
        return self.method.widths()

    def ranking(self) -> Tensor:
        """See :meth:`Method.ranking`."""
        return self.method.ranking()

    def log(self) -> dict[str, float]:
        """See :meth:`Method.log`. Where the method wants held-out images, ``held_out`` is 1, or 0 without them."""
        row = self.method.log()
        if self.method.wants_held_out:
            images = self.context.held_out
            row["held_out"] = float(images is not None and images.apart)
        return row

    def result(self) -> SearchResult:
        """What has been found so far."""
        widths, ranking = self.widths().detach().double().cpu(), self.ranking().detach().float().cpu()
        value = self.method.values()
        return SearchResult(
            widths,
            ranking,
            [dict(row) for row in self.history],
            None if value is None else value.detach().double().cpu(),
            self.method.columns(),
            self.method.removes_blocks,
            self.method.accuracy_floor,
            tuple(self.method.notes()),
        )

    def close(self) -> None:
        """Take the masks out of the network; the search can still be asked for its result."""
        self._masked.unmask_()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.method.finish()
        finally:
            self.close()


def search(
    method: str | Method,
    model: nn.Module,
    groups: Groups,
    cost: CostModel,
    budget: float,
    loader: Iterable[Any],
    recipe: Recipe,
    *,
    loss_fn: LossFn | None = None,
    options: Mapping[str, Any] | None = None,
    minimum: NDArray[np.int64] | None = None,
    pinned: Mapping[int, int] | None = None,
    held_out: Iterable[Any] | None = None,
    program: Program | None = None,
    target: Target | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> SearchResult:
    """Train ``model`` by ``recipe`` with a method deciding the widths on the way; the weights change in place.

    Args:
        budget: in the unit of ``cost``; it is approached linearly over the first half of the steps.
        loader: batches as :func:`hwprune.train.fit` takes them; it must have a length. held_out, program, target: see
            :class:`Search`.
        checkpoint, resume: a file that continues an interrupted search, weights and optimiser included.

    Raises:
        InvalidInput: unknown method or options, or a budget outside (0, dense].
    """
    steps = recipe.epochs * len(loader)  # type: ignore[arg-type]
    controller = BudgetController(budget, cost.dense, ramp_steps=steps // 2)
    with Search(
        method,
        model,
        groups,
        cost,
        controller,
        steps,
        options,
        recipe.seed,
        minimum=minimum,
        pinned=pinned,
        held_out=held_out,
        loss_fn=loss_fn,
        program=program,
        target=target,
    ) as session:
        fit(
            model,
            loader,
            recipe,
            loss_fn=loss_fn,
            hooks=session,
            checkpoint=checkpoint,
            resume=resume,
            progress=progress,
            description=f"search ({session.method.name})",
        )
    return session.result()


def bounds(
    groups: Groups, cost: CostModel, minimum: NDArray[np.int64] | None, pinned: Mapping[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Least and greatest width of every group; never less than what the cost model knows. [G], [G]"""
    highest = np.array(groups.widths, np.int64)
    known = np.array(cost.least, np.int64)
    lowest = np.ones_like(highest) if minimum is None else np.array(minimum, np.int64)
    if lowest.shape != highest.shape or (lowest < 1).any() or (lowest > highest).any():
        raise InvalidInput(f"minimum={lowest.tolist()} must lie between 1 and the full widths {highest.tolist()}")
    lowest = known if minimum is None else np.maximum(lowest, known)
    for group, width in pinned.items():
        if not (0 <= group < len(highest) and min(1, known[group]) <= width <= highest[group]):
            raise InvalidInput(f"group {group} cannot be pinned to {width}; widths are {highest.tolist()}")
        lowest[group] = highest[group] = width
    return lowest, highest

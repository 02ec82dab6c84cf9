"""How much each channel matters: one score per coupled channel, aggregated over every parameter it owns a slice of.

A coupled channel is a slice of several parameters at once, its members. A score that looks at one of them only lets
that one decide for all (DSA takes the first convolution of a group), so here every member votes:

    bn       mean over members of |γ| (Liu et al. 2017, "network slimming"); groups without a scale fall back to l2
    l1, l2   mean over members of the norm of the slice (Li et al. 2017; members as in Fang et al. 2023, "DepGraph")
    taylor   |Σ over members of w · dL/dw|: to first order, the change of the loss when the channel is removed, so
             |dL/dm| of a mask m on the channel (Molchanov et al. 2017, 2019)
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from hwprune.errors import InvalidInput
from hwprune.graph import Group, Groups, Slot

Kind = Literal["bn", "l1", "l2", "taylor"]

SHIFTS = ("bias", "beta")  # what a norm adds; only what it multiplies by says how much a channel carries
_SHIFT_OR_STATISTIC = {*SHIFTS, "running_mean", "running_var", "num_batches_tracked"}
_TIE = 1e-4  # scores closer than this part of their group's mean may be reordered by the weight norm
_LEAST = 1e-12  # scores are positive, so that their logarithm is finite


def importance(model: nn.Module, groups: Groups, kind: Kind = "bn", normalise: bool = True) -> Tensor:
    """Scores all channels of all groups. [ΣC] float32, positive, on the device of the parameters.

    normalise: divide by the mean, so that every member counts the same whatever its size and scores have mean 1 in
    every group; otherwise raw units. The members of taylor share the unit of the loss: they are summed with their signs
    first and divided afterwards. Equal scores are ordered by the l2 norm of the weights.

    Raises InvalidInput for an unknown kind, for a model that does not own the groups' parameters, and for taylor where
    a gradient is missing: run a backward pass of the loss before.
    """
    if kind not in get_args(Kind):
        raise InvalidInput(f"importance {kind!r} is unknown; it is one of {', '.join(get_args(Kind))}.")
    state = _State.of(model)
    flat = _Flat(groups, state.device)
    if not groups.total:
        return torch.zeros(0, device=state.device)
    norm = _norms(groups, state, flat, "l2", normalise)
    if kind == "l2":
        score = norm
    elif kind == "taylor":
        score = _taylor(groups, state, flat)
    else:
        score = _norms(groups, state, flat, kind, normalise)
    mean = flat.mean(score)
    if normalise:
        score, mean = _ratio(score, mean), (mean > 0).to(mean.dtype)
    tie = _TIE * mean.clamp_min(_LEAST) * _ratio(norm, flat.largest(norm))
    return (score + tie).clamp_min(_LEAST)


class LiveImportance:
    """The scores b [ΣC] from the weights as they are now, cheap enough for every step.

    Every norm's |γ| is divided by its mean over the group, and a channel's score is the mean over the norms that scale
    it, times a power of the weight norm. Groups without a norm are scored by the weight norm alone. The weight norm is
    looked at again every ``refresh`` calls; γ at every call.
    """

    def __init__(
        self, model: nn.Module, groups: Groups, device: torch.device, tie_break: float, spread: float, refresh: int = 50
    ) -> None:
        self._model, self._groups = model, groups
        self._tie_break, self._spread, self._refresh = tie_break, spread, refresh
        widths = torch.from_numpy(groups.widths).to(device)
        self.owner = torch.repeat_interleave(widths)  # [ΣC] group of each channel
        self._widths = widths.to(torch.float32)

        scales: dict[str, int] = {}  # name of γ -> where it starts among all of them, laid end to end
        index, channel, member = [], [], []
        sizes: list[int] = []
        parameters = dict(model.named_parameters(remove_duplicate=False))
        base = 0
        for name, positions, first in _scales(groups, parameters):
            if name not in scales:
                scales[name] = base
                base += parameters[name].numel()
            index.append(scales[name] + positions.ravel())
            channel.append(np.repeat(first + np.arange(len(positions)), positions.shape[1]))
            member.append(np.full(positions.size, len(sizes)))
            sizes.append(positions.size)
        self._parameters = [parameters[name] for name in scales]
        joined = [np.concatenate([*part, np.empty(0, np.int64)]).astype(np.int64) for part in (index, channel, member)]
        self._index, self._channel, self._member = (torch.from_numpy(part).to(device) for part in joined)  # [N] each
        self._sizes = torch.tensor(sizes, device=device, dtype=torch.float32)
        self._votes = torch.zeros(groups.total, device=device).index_add_(
            0, self._channel, torch.ones(len(self._channel), device=device)
        )
        self._calls = 0
        self._norms = torch.ones(groups.total, device=device)

    @torch.no_grad()
    def scales(self) -> Tensor:
        """The mean normalised |γ| of every channel; 1 where no norm scales it. [ΣC]"""
        if not self._parameters:
            return torch.ones_like(self._votes)
        entries = torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters])
        entries = entries.float().abs()[self._index]  # [N]
        mean = torch.zeros_like(self._sizes).index_add_(0, self._member, entries) / self._sizes
        entries = entries / mean.clamp_min(_LEAST)[self._member]
        total = torch.zeros_like(self._votes).index_add_(0, self._channel, entries)
        return torch.where(self._votes > 0, total / self._votes.clamp_min(1), 1.0)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Scores of this step, positive, with mean logarithm 0 in every group. [ΣC]"""
        if self._calls % self._refresh == 0:
            self._norms = self._weight_norms()
        self._calls += 1
        return self._combine(self._norms)

    @torch.no_grad()
    def now(self) -> Tensor:
        """Scores with weight norms as they are now; leaves no trace. [ΣC]"""
        return self._combine(self._weight_norms())

    def _weight_norms(self) -> Tensor:
        return importance(self._model, self._groups, "l2").clamp_min(_LEAST)

    def _combine(self, norms: Tensor) -> Tensor:
        exponent = torch.where(self._votes > 0, self._tie_break, 1.0)
        return self.stretched(self.scales().clamp_min(_LEAST).log() + exponent * norms.log())

    def stretched(self, logs: Tensor) -> Tensor:
        """Scores from their logarithms [ΣC], centred in every group and given the least spread. [ΣC]"""
        # Outliers are pulled in: a dead channel is as good as one whose score is a hundredth.
        logs = (logs - self._mean(logs)).clamp(-5, 5)
        logs = logs - self._mean(logs)
        deviation = self._mean(logs.square()).sqrt()
        return (logs * (self._spread / deviation.clamp_min(_LEAST)).clamp(1, 10)).exp()

    def deviation(self) -> float:
        """How much importances say: the standard deviation of log γ in the median group; infinite without any γ."""
        if not self._parameters:
            return math.inf
        logs = self.scales().clamp_min(1e-6).log()
        deviation = self._mean((logs - self._mean(logs)).square()).sqrt()  # [ΣC]
        return float(deviation[self._votes > 0].median())

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self._calls, "norms": self._norms.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._calls = state["calls"]
        self._norms.copy_(state["norms"])

    def _mean(self, flat: Tensor) -> Tensor:
        """The mean over each channel's group. [ΣC]"""
        return (torch.zeros_like(self._widths).index_add_(0, self.owner, flat) / self._widths)[self.owner]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, 0)


@dataclass(frozen=True)
class _State:
    """Parameters and buffers of a model by the names that slots use."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "_State":
        parameters = dict(model.named_parameters(remove_duplicate=False))  # tied weights under all their names
        return cls({**parameters, **dict(model.named_buffers(remove_duplicate=False))})

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.tensors.values()), torch.device("cpu"))

    def tensor(self, slot: Slot) -> Tensor:
        found = self.tensors.get(slot.parameter)
        if found is None or found.dim() <= slot.dim or found.shape[slot.dim] <= slot.positions.max():
            shape = "no such parameter" if found is None else f"shape {tuple(found.shape)}"
            raise InvalidInput(
                f"the groups slice {slot.parameter} along dim {slot.dim}, but the model has {shape}; "
                f"trace this model, not another one."
            )
        return found

    def rows(self, slot: Slot) -> Tensor:
        """The slot's parameter with its dim first. [indices, rest]"""
        tensor = self.tensor(slot).detach().float()
        return tensor.movedim(slot.dim, 0).reshape(tensor.shape[slot.dim], -1)

    def gradient_rows(self, slot: Slot) -> Tensor:
        """The gradient, likewise. [indices, rest]"""
        gradient = self.tensor(slot).grad
        if gradient is None:
            raise InvalidInput(
                f"importance taylor needs gradients and {slot.parameter} has none: "
                f"call backward() on the loss of some batches first, with requires_grad on."
            )
        gradient = gradient.detach().float()
        return gradient.movedim(slot.dim, 0).reshape(gradient.shape[slot.dim], -1)


class _Flat:
    """Reductions over the flat ragged array of channels."""

    def __init__(self, groups: Groups, device: torch.device) -> None:
        self.offsets = groups.offsets
        self.widths = torch.from_numpy(groups.widths).to(device)  # [G]
        self.owner = torch.repeat_interleave(self.widths)  # [ΣC]

    def mean(self, flat: Tensor) -> Tensor:
        """The mean of each channel's group. [ΣC]"""
        total = flat.new_zeros(len(self.widths)).index_add_(0, self.owner, flat)
        return (total / self.widths)[self.owner]

    def largest(self, flat: Tensor) -> Tensor:
        """The maximum of each channel's group. [ΣC]"""
        highest = flat.new_zeros(len(self.widths)).scatter_reduce_(0, self.owner, flat, "amax")
        return highest[self.owner]


class _Members:
    """The slots that vote, laid end to end: member m owns one entry per channel of its group. [ΣM]"""

    def __init__(self, members: Iterable[tuple[int, Slot]], groups: Groups, flat: _Flat, state: _State) -> None:
        self.slots = [slot for _, slot in members]
        owners = [group for group, _ in members]
        device = state.device
        sizes = [state.tensor(slot).shape[slot.dim] for slot in self.slots]
        bases = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        widths = groups.widths[owners]
        starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
        index = [base + slot.positions.ravel() for base, slot in zip(bases, self.slots, strict=True)]
        entry = [
            np.repeat(start + np.arange(len(slot.positions)), slot.positions.shape[1])
            for start, slot in zip(starts, self.slots, strict=True)
        ]
        channel = [flat.offsets[group] + np.arange(width) for group, width in zip(owners, widths, strict=True)]
        self.index = torch.from_numpy(np.concatenate(index)).to(device)  # into the concatenated indices of the slots
        self.entry = torch.from_numpy(np.concatenate(entry)).to(device)  # into [ΣM], beside `index`
        self.channel = torch.from_numpy(np.concatenate(channel)).to(device)  # [ΣM] into [ΣC]
        self.widths = torch.from_numpy(widths).to(device)
        self.member = torch.repeat_interleave(self.widths)  # [ΣM]
        self.total = groups.total

    def gather(self, per_index: list[Tensor]) -> Tensor:
        """Sums what each slot has at each of its indices into its channels. [ΣM]"""
        values = torch.cat(per_index)[self.index]
        return values.new_zeros(len(self.channel)).index_add_(0, self.entry, values)

    def mean(self, entries: Tensor) -> Tensor:
        """The mean over the channels of each entry's member. [ΣM]"""
        total = entries.new_zeros(len(self.widths)).index_add_(0, self.member, entries)
        return (total / self.widths)[self.member]

    def sum_to_channels(self, entries: Tensor) -> Tensor:
        """[ΣC]"""
        return entries.new_zeros(self.total).index_add_(0, self.channel, entries)


def _norms(groups: Groups, state: _State, flat: _Flat, kind: Kind, normalise: bool) -> Tensor:
    """The mean over members of the norm of their slices. [ΣC]"""
    chosen = [(g, slot, power) for g, group in enumerate(groups) for slot, power in _voters(group, kind, state)]
    members = _Members([(g, slot) for g, slot, _ in chosen], groups, flat, state)
    entries = members.gather([state.rows(slot).abs().pow(power).sum(1) for _, slot, power in chosen])
    squared = torch.tensor([power == 2 for _, _, power in chosen], device=entries.device)[members.member]
    entries = torch.where(squared, entries.sqrt(), entries)
    if normalise:
        entries = _ratio(entries, members.mean(entries))
    return members.sum_to_channels(entries) / members.sum_to_channels(torch.ones_like(entries))


def _voters(group: Group, kind: Kind, state: _State) -> list[tuple[Slot, int]]:
    """The slots whose norms are averaged, and the power of the norm."""
    norms = [slot for slot in group.slots if slot.role == "norm"]
    scales = [slot for slot in norms if slot.parameter.rpartition(".")[2] not in _SHIFT_OR_STATISTIC]
    if kind == "bn" and scales:
        return [(slot, 1) for slot in scales]
    # Biases are left out: they say where a channel is centred, not how much it carries.
    weights = [
        slot for slot in group.slots if slot.role == "data" or (slot.role != "norm" and state.tensor(slot).dim() > 1)
    ]
    return [(slot, 1 if kind == "l1" else 2) for slot in weights + scales]


def _taylor(groups: Groups, state: _State, flat: _Flat) -> Tensor:
    """|Σ w · dL/dw| over the places where a mask on the channel would act. [ΣC]

    Consumers are left out: their slices see the same removal a second time.
    """
    chosen = [
        (g, slot)
        for g, group in enumerate(groups)
        for slot in group.slots
        if (slot.role in ("norm", "data") or (slot.role == "out" and not slot.folded))
        and isinstance(state.tensor(slot), nn.Parameter)
    ]
    members = _Members(chosen, groups, flat, state)
    entries = members.gather([(state.rows(slot) * state.gradient_rows(slot)).sum(1) for _, slot in chosen])
    return members.sum_to_channels(entries).abs()


def _scales(groups: Groups, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray, int]]:
    """The γ of norms: (parameter, positions [width, r], first channel of the group)."""
    for group, first in zip(groups, groups.offsets[:-1].tolist(), strict=True):
        for slot in group.slots:
            shifts = slot.parameter.rpartition(".")[2] in SHIFTS
            if slot.role == "norm" and slot.parameter in parameters and not shifts:
                yield slot.parameter, slot.positions, first

"""Coupled channels: parameter slices that live and die together, gathered into groups the search gives a width."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from hwprune.errors import InvalidInput
from hwprune.graph.labels import Labels, operator_of

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Slot:
    """One dim of one parameter, and which of its indices belong to which channel of a group.

    role: "out" (a producer's weight or bias), "norm" (scale, shift and statistics of a normalisation), "in" (a
    consumer's weight) or "data" (a parameter used as plain data).
    folded: an "out" slot whose result only a batch norm reads, so that a mask on the norm is a mask on it.
    """

    parameter: str
    dim: int
    positions: Ints  # [width, indices per channel]
    role: str
    folded: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """Channels with the same slots; the search chooses how many of them to keep.

    normalised: the operator that normalises over these channels (layer_norm), or None. Removing a channel changes
    such a norm's statistics, so the law "masked equals resized" does not hold for the group.
    removable: without any of these channels the network is still connected: they are the inside of a residual block.
    """

    name: str
    width: int
    slots: tuple[Slot, ...]
    normalised: str | None = None
    removable: bool = False


@dataclass(frozen=True)
class Frozen:
    """A parameter dim that cannot be pruned, and the operator that is the reason."""

    parameter: str
    dim: int
    operator: str
    reason: str


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of a program over one flat ragged array of channels: group g owns offsets[g]:offsets[g + 1]."""

    items: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    components: Ints = field(repr=False)  # [ΣC] the label that stands for each channel

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Group:
        return self.items[index]

    @property
    def names(self) -> list[str]:
        """[G] unique names, after the first producer of each group."""
        return [group.name for group in self.items]

    @property
    def widths(self) -> Ints:
        """[G] full widths in channels."""
        return np.array([group.width for group in self.items], dtype=np.int64)

    @property
    def offsets(self) -> Ints:
        """[G + 1] where each group begins in the flat array."""
        return np.concatenate([[0], np.cumsum(self.widths)]).astype(np.int64)

    @property
    def total(self) -> int:
        """ΣC, the length of every flat array."""
        return int(self.widths.sum())

    @property
    def removable(self) -> Bools:
        """[G] which groups may be left without a channel."""
        return np.array([group.removable for group in self.items], dtype=np.bool_)

    def kept(self, keep: Bools) -> Ints:
        """How many channels of every group `keep` [ΣC] leaves. [G]"""
        running = np.concatenate([[0], np.cumsum(keep)])
        return np.asarray(np.diff(running[self.offsets]), dtype=np.int64)

    def check_keep(self, keep: Any) -> Bools:
        """`keep` as a bool array [ΣC]; raises InvalidInput on another length or a group left empty that has to stay."""
        flat = keep.detach().cpu().numpy() if isinstance(keep, Tensor) else np.asarray(keep)
        if flat.shape != (self.total,):
            raise InvalidInput(f"keep has shape {flat.shape}; it needs one value per channel, ({self.total},).")
        flat = flat.astype(np.bool_)
        empty = np.flatnonzero((self.kept(flat) == 0) & ~self.removable)
        if len(empty):
            name = self.names[int(empty[0])]
            raise InvalidInput(f"keep leaves group {name} without a channel; every group keeps at least one.")
        return flat


def keep_first(groups: Groups, widths: Any) -> Bools:
    """Keep the first widths[g] channels of every group. [ΣC]"""
    return _rank_within(groups) < np.repeat(np.asarray(widths, dtype=np.int64), groups.widths)


def keep_top(groups: Groups, widths: Any, ranking: Any) -> Bools:
    """Keep the widths[g] channels of every group with the highest `ranking` [ΣC]; earlier channels win ties. [ΣC]"""
    scores = ranking.detach().double().cpu().numpy() if isinstance(ranking, Tensor) else np.asarray(ranking, float)
    owner = np.repeat(np.arange(len(groups)), groups.widths)
    order = np.lexsort((np.arange(groups.total), -scores, owner))
    keep = np.zeros(groups.total, dtype=np.bool_)
    keep[order] = keep_first(groups, widths)
    return keep


def _rank_within(groups: Groups) -> Ints:
    return np.arange(groups.total) - np.repeat(groups.offsets[:-1], groups.widths)


def find_groups(labels: Labels, constants: frozenset[str] = frozenset()) -> Groups:
    """Gather the components of a labelled program into groups.

    Channels of a group are interchangeable: they touch the same parameter dims, equally often, and pass through the
    same tensors. `constants` are attributes that are not state of the model; they follow, but name no group.
    """
    slots = _parameter_slots(labels, constants)
    canon = [labels.canon(line).numpy() for _, _, _, line in slots]
    folded = _folded_producers(labels)
    frozen = _frozen(labels, slots, canon)
    if not slots:
        return Groups((), frozen, np.zeros(0, dtype=np.int64))
    component = np.concatenate(canon)
    owner = np.concatenate([np.full(len(line), index) for index, line in enumerate(canon)])
    position = np.concatenate([np.arange(len(line)) for line in canon])
    producing = np.isin(owner, [i for i, slot in enumerate(slots) if slot[2] in ("out", "data")])
    prunable = np.setdiff1d(np.intersect1d(component, component[producing]), [0])
    signature = _signatures(labels, canon, prunable)

    live = np.isin(component, prunable)
    component, owner, position = component[live], owner[live], position[live]
    if not len(component):
        return Groups((), frozen, np.zeros(0, dtype=np.int64))
    _, first, channel = np.unique(component, return_index=True, return_inverse=True)  # `prunable` is sorted: aligned
    kind = np.unique(signature, return_inverse=True)[1]
    order_of_kind = np.full(kind.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(order_of_kind, kind, first)
    number = np.argsort(np.argsort(order_of_kind))[kind]  # [prunable] the group of each component
    members = np.lexsort((first, number))  # [ΣC] components by group, then by where they are met first
    widths = np.bincount(number)
    rank = np.empty_like(members)  # [prunable] place in the flat array
    rank[members] = np.arange(len(members))

    order = np.lexsort((position, rank[channel], owner, number[channel]))
    owner, position, group_of = owner[order], position[order], number[channel][order]
    ends = np.flatnonzero((np.diff(owner) != 0) | (np.diff(group_of) != 0)) + 1
    slots_of: list[list[Slot]] = [[] for _ in widths]
    for begin, here in zip([0, *ends], np.split(position, ends), strict=True):
        parameter, dim, role, _ = slots[owner[begin]]
        positions = here.reshape(widths[group_of[begin]], -1)
        slots_of[group_of[begin]].append(Slot(parameter, dim, positions, role, role == "out" and parameter in folded))

    normalised = _normalised(labels)
    components = prunable[members].astype(np.int64)
    groups = []
    names: dict[str, int] = {}
    for mine, labels_of in zip(slots_of, np.split(components, np.cumsum(widths)[:-1]), strict=True):
        lead = min(mine, key=lambda slot: ("out", "data", "norm", "in").index(slot.role))
        name = lead.parameter.rpartition(".")[0] or lead.parameter
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        operator = next((normalised[label] for label in labels_of.tolist() if label in normalised), None)
        groups.append(Group(name, len(labels_of), tuple(mine), operator))
    return Groups(tuple(groups), frozen, components)


def _parameter_slots(labels: Labels, constants: frozenset[str]) -> list[tuple[str, int, str, Tensor]]:
    """(parameter, dim, role, labels along the dim) in the order of the graph."""
    order = {str(node.target): i for i, node in enumerate(labels.module.graph.nodes) if node.op == "get_attr"}
    found = [(parameter, dim, labels.roles[parameter, dim], line) for (parameter, dim), line in labels.slots.items()]
    for parameter, box in labels.data.items():
        found += [(parameter, dim, "data", labels.line(box, dim)) for dim in labels.varying(box)]
    found = [slot for slot in found if slot[0] not in constants]
    return sorted(found, key=lambda slot: (order[slot[0]], slot[1]))


def _signatures(labels: Labels, canon: list[Ints], prunable: Ints) -> NDArray[np.uint64]:
    """A hash per prunable component of the slots and tensors it touches, with multiplicity. [len(prunable)]"""
    table = np.full(len(labels.coupling.root), -1)
    table[prunable] = np.arange(len(prunable))
    random = np.random.default_rng(0)
    signature = np.zeros(len(prunable), dtype=np.uint64)

    def touch(line: Ints) -> None:
        which = table[line]
        which = which[which >= 0]
        key = random.integers(1, 2**63, dtype=np.uint64)
        if len(which):
            counts = np.bincount(which, minlength=len(prunable)).astype(np.uint64)
            signature[:] += key * counts * (counts + np.uint64(1))

    for line in canon:
        touch(line)
    for value in labels.values.values():
        for box in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(box, Tensor):
                for dim in labels.varying(box):
                    touch(labels.canon(labels.line(box, dim)).numpy())
    return signature


def _folded_producers(labels: Labels) -> set[str]:
    """Parameters of producers whose result is read by batch norms only."""
    folded: set[str] = set()
    exposed: set[str] = set()
    for node in labels.module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        parameters = {str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr"}
        followed = bool(node.users) and all(
            isinstance(user, fx.Node) and operator_of(user) == "batch_norm" and user.args[0] is node
            for user in node.users
        )
        (folded if followed else exposed).update(parameters)
    return folded - exposed


def _frozen(labels: Labels, slots: list[tuple[str, int, str, Tensor]], canon: list[Any]) -> tuple[Frozen, ...]:
    trained = dict(labels.module.named_parameters())
    found = []
    for (parameter, dim, role, line), here in zip(slots, canon, strict=True):
        if role in ("out", "data") and len(line) > 1 and (here == 0).any() and parameter.rpartition(".")[2] != "bias":
            cause = labels.coupling.why(int(line[int(np.argmax(here == 0))]))
            found.append(Frozen(parameter, dim, cause.operator, cause.reason))
    for parameter, box in labels.data.items():
        if parameter in trained and box.numel() > 1 and not bool(labels.canon(box).any()):  # as a whole
            cause = labels.coupling.why(int(box.reshape(-1)[0]))
            found.append(Frozen(parameter, int(np.argmax(box.shape)), cause.operator, cause.reason))
    return tuple(found)


def _normalised(labels: Labels) -> dict[int, str]:
    found: dict[int, str] = {}
    for box, operator in labels.normalised:
        found.update(dict.fromkeys(np.unique(labels.canon(box).numpy()).tolist(), operator))
    return found

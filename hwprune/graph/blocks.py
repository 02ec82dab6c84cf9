"""Whole residual blocks: which groups may lose every channel, and what is left of a program when they do.

A tensor without a channel left is *gone*. A convolution or linear layer that reads only such channels returns its bias
wherever one looks: a *constant*, and what element-wise operations, norms in inference mode, means and further unpadded
contractions make of a constant is one too. Where it is added to what still depends on the input, it came through a
residual block, the network stays connected, and nothing of the block needs to be computed. A group all of whose paths
end like that is removable; one whose constant reaches anything else is not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from hwprune.errors import InvalidInput
from hwprune.graph.groups import Bools, Groups
from hwprune.graph.labels import (
    CONVS,
    MOVEMENT,
    SAME,
    Labels,
    bound_arguments,
    core_of,
    mutates,
    operator_of,
    shape_of,
)

# Beside element-wise operators: what gives on a value that is stored once the same as on all its copies.
_PASS_CONSTANTS = SAME | {
    "batch_norm", "layer_norm", "group_norm", "mean", "permute", "transpose", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on the input.

    shape: dense, but 1 along dims in which the value is the same. zero: it is 0 whatever the parameters are.
    """

    shape: tuple[int, ...]
    zero: bool


@dataclass(frozen=True, eq=False)
class Remains:
    """What becomes of a program without the channels of some groups.

    constants: by node. bypassed: additions of nothing, each with the operand that it returns. dead: all nodes that are
    not computed any more, those among them; empty where no group is.
    """

    gone: frozenset[fx.Node] = frozenset()
    constants: dict[fx.Node, Constant] = field(default_factory=dict)
    bypassed: dict[fx.Node, fx.Node] = field(default_factory=dict)
    dead: frozenset[fx.Node] = frozenset()


class _Disconnected(Exception):
    """A node is left with nothing to compute from."""


@dataclass(frozen=True, eq=False)
class _Step:
    node: fx.Node
    operands: tuple[fx.Node, ...]
    parts: tuple[frozenset[int], ...]  # per tensor of the result, the groups without which it is gone


class Blocks:
    """The residual blocks of a labelled program."""

    def __init__(self, labels: Labels, groups: Groups) -> None:
        self._labels = labels
        self._groups = groups
        self.owner = np.full(len(labels.coupling.root), -1)  # [labels] group of a component
        self.owner[groups.components] = np.repeat(np.arange(len(groups)), groups.widths)
        self._readers: list[set[fx.Node]] = [set() for _ in range(len(groups))]  # nodes with a size that follows
        self._static = _without_input(labels.module)
        self._mixed: set[int] = {g for g, group in enumerate(groups) if group.width == 1}
        self._steps = [self._step(node) for node in labels.module.graph.nodes if node.op != "placeholder"]
        self._output = self._steps[-1].node

    def _step(self, node: fx.Node) -> _Step:
        value = self._labels.values.get(node)
        parts = tuple(self._groups_of(node, box) for box in _flat(value))
        return _Step(node, tuple(node.all_input_nodes), parts)

    def _groups_of(self, node: fx.Node, box: Tensor) -> frozenset[int]:
        """The groups that have a dim of a label tensor to themselves; others that it carries are mixed."""
        carried = self._owners(core_of(box))
        alone: set[int] = set()
        for dim in range(box.ndim) if carried else ():
            if box.stride(dim) != 0 and box.shape[dim] > 1:
                line = self._owners(self._labels.line(box, dim))
                alone |= line if len(line) == 1 else set()
        alone.discard(-1)
        for g in carried - {-1}:
            self._readers[g].add(node)
        self._mixed |= carried - {-1} - alone
        return frozenset(alone)

    def _owners(self, box: Tensor) -> set[int]:
        found: set[int] = set(np.unique(self.owner[self._labels.canon(box).numpy()]).tolist())
        return found if found != {-1} else set()

    # -- which groups

    @cached_property
    def groups(self) -> Groups:
        """The groups, each told whether it is removable."""
        flags = self.removable
        items = [replace(group, removable=bool(flag)) for group, flag in zip(self._groups, flags, strict=True)]
        return replace(self._groups, items=tuple(items))

    @cached_property
    def removable(self) -> Bools:
        """Which groups may lose all their channels, each alone and all of them at once. [G]"""
        single = [g for g in range(len(self._groups)) if g not in self._mixed and self._connected({g})]
        chosen = set(single)
        if not self._connected(chosen):
            chosen = set()
            for g in single:
                chosen |= {g} if self._connected(chosen | {g}) else set()
        return np.isin(np.arange(len(self._groups)), sorted(chosen))

    @cached_property
    def implied(self) -> Bools:
        """[G, G] whether the channels of the second group are not computed any more once the first has none."""
        found = np.zeros((len(self._groups), len(self._groups)), dtype=np.bool_)
        for g, remains in self.alone.items():
            for h, readers in enumerate(self._readers):
                found[g, h] = h != g and h not in self._mixed and bool(readers) and readers <= remains.dead
        return found

    def _connected(self, empty: set[int]) -> bool:
        try:
            self._fates(empty)
        except _Disconnected:
            return False
        return True

    # -- what is left

    @cached_property
    def alone(self) -> dict[int, Remains]:
        """What is left without one removable group: by group."""
        return {g: self.without([g]) for g in np.flatnonzero(self.removable).tolist()}

    def without(self, empty: Iterable[int]) -> Remains:
        """What is left when these groups have no channels. Raises InvalidInput where the network falls apart."""
        removed = set(empty)
        if not removed:
            return Remains()
        try:
            gone, constants, bypassed = self._fates(removed)
        except _Disconnected as error:
            names = ", ".join(self._groups.names[g] for g in sorted(removed))
            raise InvalidInput(f"without any channel of {names} the network falls apart: {error}.") from None
        return Remains(frozenset(gone), constants, bypassed, self._dead(constants, bypassed))

    def _fates(self, empty: set[int]) -> tuple[set[fx.Node], dict[fx.Node, Constant], dict[fx.Node, fx.Node]]:
        gone: set[fx.Node] = set()
        constants: dict[fx.Node, Constant] = {}
        bypassed: dict[fx.Node, fx.Node] = {}
        for step in self._steps:
            node = step.node
            if step.parts and all(not part.isdisjoint(empty) for part in step.parts):
                gone.add(node)
                continue
            missing = [operand for operand in step.operands if operand in gone]
            fixed = [operand for operand in step.operands if operand in constants]
            if not missing and not fixed:
                continue
            live = [o for o in step.operands if o not in self._static and o not in constants and o not in gone]
            if missing:
                constants[node] = _bias(node, missing)
            elif not live and node not in self._labels.pinned:
                constants[node] = _constant(node, constants)
            elif live and operator_of(node) == "add" and shape_of(live[0]) == shape_of(node):
                if constants[fixed[0]].zero and node.kwargs.get("alpha", 1) == 1:
                    bypassed[node] = live[0]
            else:
                raise _Disconnected(f"{node.name} would have to do with a constant")
        return gone, constants, bypassed

    def _dead(self, constants: dict[fx.Node, Constant], bypassed: dict[fx.Node, fx.Node]) -> frozenset[fx.Node]:
        """The nodes that nothing which stays depends on."""
        needed: set[fx.Node] = set()
        writers = [step.node for step in self._steps if mutates(step.node)]
        reached = [self._output]
        while reached:
            while reached:
                node = reached.pop()
                if node not in needed:
                    needed.add(node)
                    read = [bypassed[node]] if node in bypassed else node.all_input_nodes
                    reached += [operand for operand in read if operand not in constants]
            reached = [node for node in writers if node not in needed and _base(node) in needed]
        return frozenset(step.node for step in self._steps if step.node not in needed - bypassed.keys())


def _without_input(module: fx.GraphModule) -> set[fx.Node]:
    """Parameters, and what is computed from them alone."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        operands = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and operands and found.issuperset(operands)):
            found.add(node)
    return found


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for part in value if isinstance(part, Tensor)] if isinstance(value, (tuple, list)) else []


def _base(writer: fx.Node) -> fx.Node | None:
    """Whose memory a call writes to that changes its first argument in place: what a chain of views begins with."""
    node = writer.args[0]
    views = 0
    while isinstance(node, fx.Node) and operator_of(node) in MOVEMENT and node.op == "call_function":
        node, views = node.args[0], views + 1
    # without a view between, all that reads the result names the writing call itself
    return node if views and isinstance(node, fx.Node) else None


def _is_parameter(operand: Any) -> bool:
    return operand is None or (isinstance(operand, fx.Node) and operand.op == "get_attr")


def channel_of(node: fx.Node) -> int:
    """The dim of the channels in the result of a convolution or linear layer."""
    name, rank = operator_of(node), len(shape_of(node))
    return rank - CONVS[name] - 1 if name in CONVS else rank - 1


def _bias(node: fx.Node, missing: list[fx.Node]) -> Constant:
    """What a contraction returns that has nothing to read."""
    if operator_of(node) not in (*CONVS, "linear") or missing != [node.args[0]]:
        raise _Disconnected(f"{node.name} would have nothing to read")
    given = bound_arguments(node)
    if not (_is_parameter(given["weight"]) and _is_parameter(given["bias"])):
        raise _Disconnected(f"the weight of {node.name} is computed in the forward")
    shape = [1] * len(shape_of(node))
    shape[channel_of(node)] = shape_of(node)[channel_of(node)]
    return Constant(tuple(shape), given["bias"] is None)


def _constant(node: fx.Node, constants: dict[fx.Node, Constant]) -> Constant:
    """What a call makes of constants, or _Disconnected where that would not be one."""
    name = operator_of(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        raise _Disconnected(f"{node.name} would have to do with a constant")
    operands = [constants[operand] for operand in node.all_input_nodes if operand in constants]
    zero = all(operand.zero for operand in operands)
    given = bound_arguments(node)
    if name in (*CONVS, "linear"):
        return _contracted(node, name, given, operands[0])
    pointwise = torch.Tag.pointwise in node.target.tags
    if not (pointwise or name in _PASS_CONSTANTS):
        raise _Disconnected(f"{node.name} would have to do with a constant")

    def stored(operand: fx.Node, zeros: bool = False) -> Tensor:
        shape = constants[operand].shape if operand in constants else shape_of(operand)
        dtype = operand.meta["val"].dtype
        return torch.zeros(shape, dtype=dtype) if zeros else torch.empty(shape, dtype=dtype, device="meta")

    def run(zeros: bool) -> Any:
        args = fx.node.map_arg(node.args, lambda operand: stored(operand, zeros))
        kwargs = fx.node.map_arg(node.kwargs, lambda operand: stored(operand, zeros))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    try:
        result = run(False)
    except Exception as error:  # whatever an operator raises on sizes that it was not called with
        raise _Disconnected(f"{node.name} cannot follow: {error}") from None
    if name == "mul":
        zero = any(operand.zero for operand in operands)
    elif pointwise and len(node.all_input_nodes) == 1:
        zero = zero and not bool(run(True).any())
    elif pointwise and name != "add":
        zero = False
    elif name == "add" or name.endswith("norm"):
        zero = zero and len(operands) == len(node.all_input_nodes)
    return Constant(tuple(result.shape), zero)


def _contracted(node: fx.Node, name: str, given: dict[str, Any], x: Constant) -> Constant:
    channel, dense = channel_of(node), shape_of(given["input"])
    plain = given["input"].op != "get_attr" and _is_parameter(given["weight"]) and _is_parameter(given["bias"])
    whole = x.shape[channel] == dense[channel] and all(s == 1 for s in x.shape[channel + 1 :])
    padding = given.get("padding", 0)
    unpadded = padding == "valid" or not np.any(padding if not isinstance(padding, str) else 1)
    if not plain or not whole or "transpose" in name or not (unpadded or x.zero):
        raise _Disconnected(f"{node.name} would have to do with a constant")
    shape = list(x.shape)
    shape[channel] = shape_of(node)[channel]
    return Constant(tuple(shape), x.zero and given["bias"] is None)

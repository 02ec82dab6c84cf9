"""The program cut before every contraction: a convolution carries the norm, activation, add and pooling after it.

A segment's time depends on at most two sizes (channels read, channels written); equal segments share one signature,
and so one latency table. Every call of the program is in exactly one segment: nothing is left uncounted.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from hwprune.graph.groups import Groups, Ints
from hwprune.graph.labels import CONTRACTIONS, CONVS, Labels, bound_arguments, operator_of, shape_of
from hwprune.graph.trace import Program

MOST_AXES = 2
# operators whose remaining arguments follow from the sizes
_SIZED = {"view", "reshape", "_unsafe_view", "expand", "unflatten", "slice", "split_with_sizes", "split"}


@dataclass(frozen=True, eq=False)
class Axis:
    """A size that pruning changes: elements = offset + Σ weights · widths[groups]."""

    groups: Ints  # [k] which groups it counts; more than one after a concatenation
    weights: Ints  # [k] elements per channel
    offset: int  # elements that always stay
    size: int  # elements when nothing is pruned

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """What makes two axes the same one."""
        return tuple(self.groups.tolist()), tuple(self.weights.tolist()), self.offset

    def elements(self, widths: Any) -> Any:
        """The size at `widths` [..., G]; numpy or torch."""
        return self.offset + (widths[..., self.groups] * self.weights).sum(-1)


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive calls of the program that are timed as one.

    macs: multiply-accumulates when dense; at sizes x they are macs · Π (x_i / axes[i].size) ** powers[i].
    """

    name: str
    nodes: tuple[str, ...]
    axes: tuple[Axis, ...]
    signature: str
    description: str
    macs: float = 0.0
    powers: tuple[int, ...] = field(default=())


def segments(program: Program) -> tuple[Segment, ...]:
    """The segments of `program` in the order of execution."""
    return _Cutter(program).run()


def leftovers(program: Program, parts: tuple[Segment, ...]) -> dict[tuple[int, int], Segment]:
    """What is still run of a segment when a group it depends on has no channel: by index of the segment, and group.

    A segment of its own, such as the addition of a constant and the activation after it. Where nothing is run any more
    there is no entry. Groups are the removable ones, and those that are not computed once one of these is removed.
    """
    blocks, found = program.blocks, {}
    nodes = {node.name: node for node in program.module.graph.nodes}
    for g in np.flatnonzero(blocks.removable | blocks.implied.any(0)).tolist():
        remains = blocks.alone[g if blocks.removable[g] else int(np.argmax(blocks.implied[:, g]))]
        cutter = _Cutter(program, frozenset(remains.constants))
        for index, part in enumerate(parts):
            if any(g in axis.groups for axis in part.axes):
                left = [nodes[name] for name in part.nodes if nodes[name] not in remains.dead]
                if left:
                    axes = {axis.key: axis for node in left for axis in cutter.axes_of(node)}
                    others = {axis.key: axis for axis in part.axes if g not in axis.groups and axis.key in axes}
                    found[index, g] = cutter.segment(left, others)
    return found


class _Cutter:
    def __init__(self, program: Program, constants: frozenset[fx.Node] = frozenset()) -> None:
        self.constants = constants  # calls in whose place stands a parameter
        self.labels: Labels = program.labels
        self.groups: Groups = program.groups
        self.owner = program.blocks.owner  # [labels] group of a component

    def run(self) -> tuple[Segment, ...]:
        found: list[Segment] = []
        nodes: list[fx.Node] = []
        axes: dict[Any, Axis] = {}
        for node in self.labels.module.graph.nodes:
            if node.op != "call_function":
                continue
            entering = {axis.key: axis for axis in self.axes_of(node)}
            starts = operator_of(node) in CONTRACTIONS or len(axes | entering) > MOST_AXES
            if nodes and starts:
                found.append(self.segment(nodes, axes))
                nodes, axes = [], {}
            nodes.append(node)
            axes |= entering
        if nodes:
            found.append(self.segment(nodes, axes))
        return tuple(found)

    def axis(self, labels: Tensor, dim: int) -> Axis | None:
        """What the size of one dim depends on, or None where pruning cannot change it."""
        size = labels.shape[dim]
        if labels.stride(dim) == 0 or size == 1:
            return None
        owners = self.owner[self.labels.canon(self.labels.line(labels, dim)).numpy()]
        counted = Counter(owners[owners >= 0].tolist())
        if not counted:
            return None
        groups = np.array(sorted(counted), dtype=np.int64)
        weights = np.array([counted[int(g)] // self.groups[int(g)].width for g in groups], dtype=np.int64)
        return Axis(groups, weights, int(size - (weights * self.groups.widths[groups]).sum()), size)

    def axes_of(self, node: fx.Node) -> list[Axis]:
        """The sizes a call's time depends on: those of its result, and of what a contraction or reduction consumes."""
        boxes = [self.labels.values[node]]
        if operator_of(node) != "cat":
            operands = [operand for operand in node.all_input_nodes if operand.op != "get_attr"]
            boxes = [self.labels.values[operand] for operand in operands] + boxes
        axes: dict[Any, Axis] = {}
        for box in boxes:
            for part in box if isinstance(box, (tuple, list)) else (box,):
                for dim in range(part.ndim) if isinstance(part, Tensor) else ():
                    axis = self.axis(part, dim)
                    if axis is not None:
                        axes[axis.key] = axis
        if len(axes) <= MOST_AXES:
            return list(axes.values())
        # a call with more sizes than a table has (a fuse of many branches) is priced by the largest two
        return sorted(axes.values(), key=lambda axis: -axis.size)[:MOST_AXES]

    def segment(self, nodes: list[fx.Node], axes: dict[Any, Axis]) -> Segment:
        kept = tuple(axes.values())
        macs, powers = self.macs(nodes[0], kept)
        text = json.dumps(self.canonical(nodes, axes), sort_keys=True, default=str)
        signature = hashlib.sha256(text.encode()).hexdigest()[:12]
        names = tuple(node.name for node in nodes)
        return Segment(names[0], names, kept, signature, self.describe(nodes), macs, powers)

    # -- what makes two segments equal

    def symbols(self, box: Any, axes: dict[Any, Axis]) -> Any:
        """A shape in which prunable sizes are named by the axis they follow."""
        if isinstance(box, (tuple, list)):
            return [self.symbols(part, axes) for part in box]
        if not isinstance(box, Tensor):
            return None
        order = {key: index for index, key in enumerate(axes)}
        shape: list[Any] = []
        for dim in range(box.ndim):
            axis = self.axis(box, dim)
            named = None if axis is None else order.get(axis.key)
            shape.append(int(box.shape[dim]) if named is None else f"axis{named}:{box.shape[dim]}")
        return shape

    def canonical(self, nodes: list[fx.Node], axes: dict[Any, Axis]) -> list[Any]:
        index = {node: i for i, node in enumerate(nodes)}

        def argument(value: Any) -> Any:
            if isinstance(value, fx.Node):
                if value in index:
                    return f"%{index[value]}"
                if value in self.constants:
                    return "constant"
                kind = "parameter" if value.op == "get_attr" else "input"
                box = self.labels.values[value]
                if kind == "parameter":
                    return [kind, self.parameter_shape(value, axes)]
                return [kind, self.symbols(box, axes)]
            if isinstance(value, (tuple, list)):
                return [argument(part) for part in value]
            return str(value) if isinstance(value, (torch.dtype, torch.device, torch.layout)) else value

        lines = []
        for node in nodes:
            name = operator_of(node)
            given = [argument(value) for value in (node.args[:1] if name in _SIZED else node.args)]
            options = {key: argument(value) for key, value in node.kwargs.items()}
            lines.append([name, given, options, self.symbols(self.labels.values[node], axes)])
        return lines

    def parameter_shape(self, node: fx.Node, axes: dict[Any, Axis]) -> list[Any]:
        order = {key: index for index, key in enumerate(axes)}
        shape: list[Any] = []
        for dim, size in enumerate(shape_of(node)):
            line = self.labels.slots.get((str(node.target), dim))
            axis = None if line is None else self.axis(line, 0)
            named = None if axis is None else order.get(axis.key)
            shape.append(size if named is None else f"axis{named}:{size}")
        return shape

    def describe(self, nodes: list[fx.Node]) -> str:
        first, name = nodes[0], operator_of(nodes[0])
        text = name
        if name in CONVS:
            given = bound_arguments(first)
            weight = shape_of(given["weight"])
            text += f" {'x'.join(map(str, weight[2:]))}"
            if any(step != 1 for step in given["stride"]):
                text += f" stride {given['stride'][0]}"
            if given["groups"] > 1:
                text += " depthwise" if weight[1] == 1 else f" groups {given['groups']}"
        if isinstance(first.meta.get("val"), Tensor):
            text += f" -> {'x'.join(map(str, shape_of(first)))}"
        rest = dict.fromkeys(operator_of(node) for node in nodes[1:])
        return text + "".join(f" + {name}" for name in rest if name not in ("getitem", "batch_norm", "dropout"))

    # -- operations

    def macs(self, node: fx.Node, axes: tuple[Axis, ...]) -> tuple[float, tuple[int, ...]]:
        """Multiply-accumulates of the contraction a segment begins with, and how they grow with its axes."""
        name = operator_of(node)
        if name not in CONTRACTIONS or name == "embedding":
            return 0.0, (0,) * len(axes)
        given = bound_arguments(node)
        out = shape_of(node)
        values = self.labels.values
        if name in CONVS or name in ("linear", "addmm"):
            x = values[given["input"] if "input" in given else given["mat1"]]
            weight = given.get("weight", given.get("mat2"))
            channel = x.ndim - CONVS[name] - 1 if name in CONVS else x.ndim - 1
            groups = given.get("groups", 1)
            spatial = math.prod(shape_of(weight)[2:])
            pixels = math.prod(x.shape[channel + 1 :] if "transpose" in name else out[channel + 1 :])
            lead = math.prod(out[:channel])
            total = float(lead * pixels * spatial) * x.shape[channel] * out[channel] / groups
            sized = [self.axis(values[node], channel)]
            if not (groups > 1 and x.shape[channel] == groups):
                sized.append(self.axis(x, channel))
        elif name == "scaled_dot_product_attention":
            query, key, value = (shape_of(given[part]) for part in ("query", "key", "value"))
            total = float(math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
            q = values[given["query"]]
            sized = [self.axis(q, dim) for dim in range(q.ndim)]
        else:
            a = next(iter(given.values()))
            rank, box = len(shape_of(a)), values[node]
            total = float(math.prod(out) * shape_of(a)[-1])
            sized = [self.axis(box, dim) for dim in range(box.ndim)] + [self.axis(values[a], rank - 1)]
        keys = Counter(axis.key for axis in sized if axis is not None)
        return total, tuple(keys[axis.key] for axis in axes)

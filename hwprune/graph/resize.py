"""A smaller program: parameters sliced along every labelled dim, sizes in the graph counted anew from what is kept.

A residual block whose inner channels are all gone is replaced by the constant that it returns, a parameter of its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from hwprune.graph.blocks import channel_of
from hwprune.graph.labels import (
    CONVS,
    Labels,
    bound_arguments,
    core_of,
    operator_attribute,
    operator_of,
    shape_of,
)
from hwprune.graph.trace import Program, get_tensor, set_tensor

_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_ATEN = torch.ops.aten


def resize(program: Program, keep: Any) -> fx.GraphModule:
    """The program without the channels whose `keep` [ΣC] is false, as a module that owns copies of its tensors.

    Node names and the keys of `state_dict()` are those of the dense program. Batch norms and dropouts are modules,
    so that `.train()` means what it means in the model. Raises InvalidInput if a group would be left empty that is not
    removable.

    Without a channel of a removable group, the calls of its residual block are left out, and what the block returns in
    inference mode is added in their place: `<call>_constant`, a parameter, or nothing where the block has neither
    biases nor norms. That is exactly what the masked block computes in inference mode with the present parameters and
    running statistics. In training mode the masked block's last norm sees zeros and returns its shift: the same once
    its running mean has followed.
    """
    return Resizer(program, keep).run()


class Resizer:
    """One walk over the dense graph; `alive` [labels] says which components stay."""

    def __init__(self, program: Program, keep: Any) -> None:
        flat = program.groups.check_keep(keep)
        self.removed = np.flatnonzero(program.groups.kept(flat) == 0)  # groups without a channel
        self.remains = program.blocks.without(self.removed.tolist())
        self.labels: Labels = program.labels
        self.alive = torch.ones(len(self.labels.coupling.root), dtype=torch.bool)
        self.alive[torch.from_numpy(program.groups.components[~flat])] = False
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.map: dict[fx.Node, fx.Node] = {}
        self.constants: dict[str, fx.Node] = {}  # parameters that stand for a block, and the call whose value they have

    def run(self) -> fx.GraphModule:
        for node in self.labels.module.graph.nodes:
            if node.op == "placeholder":
                self.map[node] = self.graph.placeholder(str(node.target))
            elif node in self.remains.bypassed:
                self.map[node] = self.map[self.remains.bypassed[node]]
            elif node in self.remains.dead:
                continue
            elif node.op == "get_attr":
                self.map[node] = self.attribute(node)
            elif node.op == "output":
                self.graph.output(fx.node.map_arg(node.args[0], self.map.__getitem__))
            else:
                for operand in node.all_input_nodes:
                    if operand in self.remains.constants and operand not in self.map:
                        self.map[operand] = self.constant(operand)
                self.map[node] = self.call(node)
        modules_for_training(self.root, self.graph)
        return fx.GraphModule(self.root, self.graph)

    # -- counting

    def kept_line(self, labels: Tensor, dim: int) -> Tensor:
        """Which positions along `dim` stay. bool [size of dim]"""
        core = core_of(labels)
        dim %= core.ndim
        alive = self.alive[self.labels.canon(core)]
        if alive.shape[dim] == 1:
            return torch.ones(labels.shape[dim], dtype=torch.bool)
        others = [d for d in range(core.ndim) if d != dim]
        return alive.amax(others) if others else alive

    def kept(self, labels: Tensor) -> list[int]:
        """The shape that is left."""
        return [int(self.kept_line(labels, dim).sum()) for dim in range(labels.ndim)]

    def before(self, labels: Tensor, dim: int, position: int) -> int:
        """How many positions before `position` stay along `dim`."""
        return int(self.kept_line(labels, dim)[:position].sum())

    def varies(self, labels: Tensor, dim: int) -> bool:
        return not bool(self.kept_line(labels, dim).all())

    # -- nodes

    def attribute(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        source = self.labels.module.get_submodule(name.rpartition(".")[0])
        dense = getattr(source, name.rpartition(".")[2])
        tensor = self.thin(name, dense.detach()).clone()
        self.hang(name, tensor, isinstance(dense, nn.Parameter), source)
        return self.graph.create_node("get_attr", name, name=node.name)

    def thin(self, name: str, tensor: Tensor) -> Tensor:
        """The kept slices of `tensor`, which has the dense shape of the attribute called `name`."""
        for dim in range(tensor.ndim):
            if (name, dim) in self.labels.slots:
                stays = self.alive[self.labels.canon(self.labels.slots[name, dim])]
            elif name in self.labels.data:
                stays = self.kept_line(self.labels.data[name], dim)
            else:
                continue
            if not bool(stays.all()):
                tensor = tensor.index_select(dim, stays.nonzero()[:, 0].to(tensor.device))
        return tensor

    def hang(self, name: str, tensor: Tensor, trained: bool, source: nn.Module | None = None) -> None:
        if trained:
            tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        leaf = name.rpartition(".")[2]
        set_tensor(self.root, name, tensor, source is None or leaf not in source._non_persistent_buffers_set)

    def constant(self, node: fx.Node) -> fx.Node:
        """The parameter in place of a call that does not depend on the input any more."""
        name = f"{node.name}_constant"
        with torch.enable_grad():
            value = self.value_of(node, lambda key: get_tensor(self.labels.module, key))
        set_tensor(self.root, name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
        self.constants[name] = node
        return self.graph.get_attr(name)

    def value_of(self, node: fx.Node, tensor_of: Callable[[str], Tensor]) -> Tensor:
        """What a constant is, with the dense parameters and buffers that `tensor_of` gives by name."""
        constants = self.remains.constants
        if node.op == "get_attr":
            return self.thin(str(node.target), tensor_of(str(node.target)))
        given = bound_arguments(node)
        name = operator_of(node)

        def value(operand: fx.Node) -> Tensor:
            return self.value_of(operand, tensor_of)

        if name in CONVS or name == "linear":
            bias = None if given["bias"] is None else value(given["bias"])
            if given["input"] not in constants:  # it reads nothing
                weight = value(given["weight"])
                channel = channel_of(node)
                size = self.kept(self.labels.values[node])[channel]
                bias = weight.new_zeros(size) if bias is None else bias
                return bias.view([-1 if d == channel else 1 for d in range(len(shape_of(node)))])
            weight = value(given["weight"])
            if name == "linear":
                return nn.functional.linear(value(given["input"]), weight, bias)
            spatial = list(range(2, weight.ndim))  # all pixels are alike, and none is padding unless they are 0
            groups = self.changes(node, name, given).get("groups", given["groups"])
            options = {"bias": bias, "groups": groups}
            conv: Callable[..., Tensor] = node.target  # type: ignore[assignment]
            return conv(value(given["input"]), weight.sum(spatial, keepdim=True), **options)
        args = list(fx.node.map_arg(node.args, value))
        kwargs = dict(fx.node.map_arg(node.kwargs, value))
        target = _out_of_place(node.target)
        args, kwargs = _replace(target, args, kwargs, self.changes(node, name, given))
        result: Tensor = target(*args, **kwargs)
        return result

    def call(self, node: fx.Node) -> fx.Node:
        args = list(fx.node.map_arg(node.args, self.map.__getitem__))
        kwargs = dict(fx.node.map_arg(node.kwargs, self.map.__getitem__))
        target = node.target
        changes: dict[str, Any] = {}
        if isinstance(target, torch._ops.OpOverload):
            given = bound_arguments(node)
            changes = self.changes(node, operator_of(node), given)
            if "as_split" in changes:
                target, args, kwargs = _ATEN.split_with_sizes.default, [args[0], changes["as_split"], given["dim"]], {}
                changes = {}
            args, kwargs = _replace(target, args, kwargs, changes)
            if node.args and node.args[0] in self.remains.constants:
                target = _out_of_place(target)  # the parameter must not be written to
        new = self.graph.create_node("call_function", target, tuple(args), kwargs, name=node.name)
        new.meta["dense_shape"] = shape_of(node) if isinstance(node.meta.get("val"), Tensor) else ()
        if node in self.labels.pinned and operator_of(node) == "mean":
            given = bound_arguments(node)
            dense, x = self.labels.pinned[node], self.labels.values[given["self"]]
            over = given.get("dim") or range(x.ndim)
            kept = math.prod(self.kept(x)[dim] for dim in over)
            return self.graph.call_function(_ATEN.mul.Tensor, (new, kept / dense))
        return new

    def changes(self, node: fx.Node, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments that name a size, an offset or a count, as they are in the smaller program."""
        out = self.labels.values[node]
        first = next(iter(given.values()), None)
        x: Any = self.labels.values[first] if isinstance(first, fx.Node) else None
        if name in ("view", "reshape", "_unsafe_view"):
            key = "size" if "size" in given else "shape"
            return {key: _any_batch(self.kept(out))}
        if name == "unflatten":
            rank = len(given["sizes"])
            first = given["dim"] % x.ndim
            return {"sizes": self.kept(out)[first : first + rank]}
        if name in ("expand", "broadcast_to"):
            lead = out.ndim - x.ndim
            sizes = self.kept(out)
            return {
                "size": [
                    -1 if d >= lead and x.shape[d - lead] == out.shape[d] else size for d, size in enumerate(sizes)
                ]
            }
        if name in ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"):
            return {"size": self.kept(out)}
        if name == "slice" and self.varies(x, given["dim"]):
            size = x.shape[given["dim"]]
            start, stop, _ = slice(given["start"], given["end"]).indices(size)
            return {"start": self.before(x, given["dim"], start), "end": self.before(x, given["dim"], stop)}
        if name == "narrow" and self.varies(x, given["dim"]):
            start = given["start"] % x.shape[given["dim"]]
            stop = self.before(x, given["dim"], start + given["length"])
            start = self.before(x, given["dim"], start)
            return {"start": start, "length": stop - start}
        if name in ("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split"):
            if self.varies(x, given["dim"]):
                return {"as_split": [self.kept(part)[given["dim"]] for part in out]}
            return {}
        if name in ("pad", "constant_pad_nd"):
            pads = list(given["pad"])
            for dim in range(out.ndim):
                i = 2 * (out.ndim - 1 - dim)
                if i < len(pads) and self.varies(out, dim):
                    line = self.kept_line(out, dim)
                    pads[i] = int(line[: pads[i]].sum())
                    pads[i + 1] = int(line[len(line) - pads[i + 1] :].sum())
            return {"pad": pads}
        if name in ("layer_norm", "rms_norm"):
            return {"normalized_shape": self.kept(x)[-len(given["normalized_shape"]) :]}
        if name == "group_norm" and node in self.labels.pinned:
            return {"num_groups": self.kept(x)[1]}
        if name in CONVS and given["groups"] > 1:
            weight, rank = shape_of(given["weight"]), CONVS[name]
            channel = x.ndim - rank - 1
            if x.shape[channel] == given["groups"] and (weight[1] == 1):
                return {"groups": int(self.kept_line(x, channel).sum())}
            return {}
        if name == "scaled_dot_product_attention" and node in self.labels.pinned:
            return {"scale": self.labels.pinned[node] ** -0.5}
        if name in ("index", "index_select"):
            return self.reindex(node, name, given, x, out)
        return {}

    def reindex(self, node: fx.Node, name: str, given: dict[str, Any], x: Tensor, out: Tensor) -> dict[str, Any]:
        """A constant list of channels, thinned to the kept ones and renumbered."""
        indices = list(given["indices"]) if name == "index" else [None] * given["dim"] + [given["index"]]
        for dim, index in enumerate(indices):
            if index is None:
                continue
            if not self.varies(x, dim):
                indices[dim] = self.map[index]
                continue
            line = self.kept_line(x, dim)
            old = operator_attribute(self.labels.module, index)
            new = (line.cumsum(0) - 1)[old[line[old]]]
            attribute = f"{node.name}_index"
            self.hang(attribute, new, trained=False)
            indices[dim] = self.graph.get_attr(attribute)
        return {"indices": indices} if name == "index" else {"index": indices[-1]}


def _out_of_place(target: Any) -> Any:
    """The operator that returns a new tensor where `target` changes its first argument."""
    packet, _, overload = str(target).removeprefix("aten.").partition(".")
    return getattr(getattr(_ATEN, packet.removesuffix("_")), overload) if target._schema.is_mutable else target


def _any_batch(sizes: Sequence[int]) -> list[int]:
    """A view's sizes with the leading one left to be inferred, so that any batch size passes."""
    return [-1, *sizes[1:]] if sizes and all(sizes) else list(sizes)


def _replace(
    target: torch._ops.OpOverload, args: list[Any], kwargs: dict[str, Any], changes: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    names = [argument.name for argument in target._schema.arguments]
    for name, value in changes.items():
        index = names.index(name)
        if index < len(args):
            args[index] = value
        else:
            kwargs[name] = value
    return args, kwargs


def modules_for_training(root: nn.Module, graph: fx.Graph) -> None:
    """Turn inference-mode batch norms and dropouts into modules that know training from inference, in place."""
    for node in list(graph.nodes):
        name = operator_of(node) if node.op == "call_function" else ""
        if name == "dropout":
            path = f"{node.name}_module"
            root.add_module(path, nn.Dropout(float(node.args[1])))
            _call_module(graph, node, path)
        elif name == "batch_norm":
            given = bound_arguments(node)
            tensors = [given[key] for key in ("weight", "bias", "running_mean", "running_var")]
            read = [t for t in tensors if isinstance(t, fx.Node) and t.op == "get_attr"]
            owners = {str(t.target).rpartition(".")[0] for t in read}
            shared = any(isinstance(t, fx.Node) and (t.op != "get_attr" or len(t.users) > 1) for t in tensors)
            if len(owners) != 1 or shared or given["running_mean"] is None:
                continue
            path = owners.pop()
            source = root.get_submodule(path)
            norm = _batch_norm(source, given, len(node.meta["dense_shape"]))
            parent, _, leaf = path.rpartition(".")
            root.get_submodule(parent)._modules[leaf] = norm
            _call_module(graph, node, path)
            for tensor in tensors:
                if isinstance(tensor, fx.Node):
                    graph.erase_node(tensor)


def _batch_norm(source: nn.Module, given: dict[str, Any], rank: int) -> nn.Module:
    mean = source.running_mean
    assert isinstance(mean, Tensor)
    affine = given["weight"] is not None
    options = {"eps": given["eps"], "momentum": given["momentum"], "affine": affine, "device": mean.device}
    norm = _BATCH_NORMS[rank](len(mean), **options)
    norm.running_mean, norm.running_var = mean, source.running_var  # type: ignore[assignment]
    if affine:
        norm.weight, norm.bias = source.weight, source.bias  # type: ignore[assignment]
    return norm


def _call_module(graph: fx.Graph, node: fx.Node, path: str) -> None:
    """Replace an ATen call by the module under `path`, applied to the call's first argument."""
    with graph.inserting_before(node):
        name = node.name
        node.name = f"{name}_functional"
        new = graph.create_node("call_module", path, (node.args[0],), name=name)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if new.name != name:
        new.name = name

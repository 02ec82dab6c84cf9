"""Run a program on channel labels instead of numbers, and unite the labels that must live and die together.

Every output channel of every weight gets a fresh integer. Data movement runs as it is, on label tensors; element-wise
operations unite their operands; contractions, normalisations and reductions have one rule each. A label tensor has
the shape of the value it stands for and stride 0 along every dim in which the label does not change, so that a
feature map costs its channels and not its pixels.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

NEVER = 2**62  # the cause of what is not frozen
MOST_DATA = 2**20  # elements; parameters used as data need a label for each, and beyond this many they are left whole


@dataclass(frozen=True)
class Cause:
    """Why a label cannot be pruned."""

    operator: str
    reason: str


class Coupling:
    """Union-find over labels, vectorised. Label 0 is frozen: what is united with it cannot be pruned."""

    def __init__(self) -> None:
        self.root = torch.zeros(1, dtype=torch.int64)  # [labels] representative: the smallest label of the component
        self.cause = torch.zeros(1, dtype=torch.int64)  # [labels] index into `causes`, valid at representatives
        self.canon = torch.zeros(1, dtype=torch.int64)  # [labels] representative, and 0 for everything frozen
        self.causes: list[Cause] = [Cause("input", "given to the model")]
        self.changes = 0

    def fresh(self, count: int) -> Tensor:
        """`count` labels that never were. [count]"""
        first = len(self.root)
        labels = torch.arange(first, first + count)
        self.root = torch.cat([self.root, labels])
        self.cause = torch.cat([self.cause, torch.full((count,), NEVER)])
        self.canon = torch.cat([self.canon, labels])
        return labels

    def unite(self, a: Tensor, b: Tensor, cause: Cause) -> None:
        """Couple `a` and `b` element by element; a pair with label 0 freezes the other side."""
        a, b = self.canon[a.reshape(-1)], self.canon[b.reshape(-1)]
        differ = a != b
        if not bool(differ.any()):
            return
        a, b = a[differ], b[differ]
        zero = (a == 0) | (b == 0)
        if bool(zero.any()):
            self.freeze((a + b)[zero], cause)
            a, b = self.canon[a[~zero]], self.canon[b[~zero]]
        while len(a):
            self.changes += 1
            low, high = torch.minimum(a, b), torch.maximum(a, b)
            self.root.scatter_reduce_(0, high, low, "amin")
            self._compress(high)
            a, b = self.root[low], self.root[high]
            differ = a != b
            a, b = a[differ], b[differ]
        self.canon = torch.where(self.canon == 0, 0, self.root)  # none of these is frozen, so no cause has changed

    def freeze(self, labels: Tensor, cause: Cause) -> None:
        """Take `labels` (any shape) and all that is coupled to them out of the pruning."""
        labels = labels.reshape(-1)
        labels = labels[self.canon[labels] != 0]
        if not len(labels):
            return
        self.changes += 1
        self.causes.append(cause)
        roots = self.root[labels]
        self.cause[roots] = torch.minimum(self.cause[roots], torch.tensor(len(self.causes) - 1))
        self._refresh()

    def why(self, label: int) -> Cause:
        """The cause of a frozen label."""
        return self.causes[int(self.cause[self.root[label]])]

    def _compress(self, moved: Tensor) -> None:
        """Point every label at its representative again, after the representatives `moved` were given others."""
        while True:
            up = self.root[self.root[moved]]
            if torch.equal(up, self.root[moved]):
                break
            self.root[moved] = up
        self.root = self.root[self.root]

    def _refresh(self) -> None:
        cause = torch.full_like(self.cause, NEVER).scatter_reduce_(0, self.root, self.cause, "amin")
        self.cause = cause[self.root]
        self.canon = torch.where(self.cause == NEVER, self.root, 0)


@dataclass
class Labels:
    """What the labelled run leaves behind.

    values: the label tensor of every node (a tuple of them where the node returns several).
    slots: for parameters used as weights, the labels along each dim; `roles` says which side of the weight that is.
    data: parameters and constants used as plain data, one label per element.
    """

    module: fx.GraphModule
    attention: str
    coupling: Coupling = field(default_factory=Coupling)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    slots: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    data: dict[str, Tensor] = field(default_factory=dict)
    normalised: list[tuple[Tensor, str]] = field(default_factory=list)  # labels that an operator normalises over
    pinned: dict[fx.Node, int] = field(default_factory=dict)  # nodes that depend on a dense size without naming it
    born: dict[tuple[fx.Node | str, object], Tensor] = field(default_factory=dict)

    def canon(self, labels: Tensor) -> Tensor:
        """Labels by component: equal numbers live and die together, 0 is frozen."""
        return self.coupling.canon[labels]

    def varying(self, labels: Tensor) -> list[int]:
        """The dims along which the component changes."""
        return _varying(self.canon(core_of(labels)))

    def line(self, labels: Tensor, dim: int) -> Tensor:
        """The labels along one dim, the others taken at 0. [size of dim]"""
        return labels[tuple(slice(None) if d == dim % labels.ndim else 0 for d in range(labels.ndim))]


def propagate(module: fx.GraphModule, attention: str = "heads") -> Labels:
    """Label every tensor of `module`.

    A tensor is a box: what is removed from it must be whole slabs. Wherever labels vary along several dims at once
    (heads and head dims after a view) and no operator has said which one is to stay free, all but the longest are
    united and the program is run again, until nothing more is united.
    """
    coupling, born = Coupling(), {}  # type: ignore[var-annotated]
    while True:
        run = _Run(Labels(module, attention, coupling, born=born))
        run.all()
        before = coupling.changes
        run.square()
        if coupling.changes == before:
            return run.labels


def core_of(labels: Tensor) -> Tensor:
    """The label tensor with every stride-0 dim narrowed to length 1."""
    for dim in range(labels.ndim):
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _varying(canon: Tensor) -> list[int]:
    if canon.numel() <= 1:
        return []
    return [
        dim
        for dim in range(canon.ndim)
        if canon.shape[dim] > 1 and not torch.equal(canon.narrow(dim, 1, canon.shape[dim] - 1),
                                                    canon.narrow(dim, 0, canon.shape[dim] - 1))
    ]  # fmt: skip


def operator_of(node: fx.Node) -> str:
    """The bare name of the ATen operator: `aten.add_.Tensor` is `add`, and so is `aten.add.Tensor`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1].removesuffix("_")
    return getattr(node.target, "__name__", str(node.target))


def mutates(node: fx.Node) -> bool:
    """Whether a call changes one of its arguments in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by schema name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload), node
    bound: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def shape_of(value: Any) -> tuple[int, ...]:
    """The dense shape of a node's (or fake tensor's) value."""
    meta = value.meta["val"] if isinstance(value, fx.Node) else value
    return tuple(int(size) for size in meta.shape)


# Operators that move elements about and run unchanged on label tensors. Those of `_VIEWS` keep strides, so stride-0
# dims survive them; the others would write out every pixel and have a lazy twin in _Run.
_VIEWS = {
    "permute", "transpose", "t", "numpy_T", "mT", "unsqueeze", "squeeze", "expand", "slice", "select", "narrow",
    "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_chunk", "unsafe_split",
    "unsafe_split_with_sizes", "movedim", "swapaxes", "swapdims", "unfold", "diagonal", "adjoint", "getitem",
    "expand_as", "broadcast_to",
}  # fmt: skip
SAME = {
    "contiguous", "clone", "alias", "detach", "to", "_to_copy", "dropout", "feature_dropout", "alpha_dropout",
    "lift_fresh_copy", "hardswish", "type_as",
}  # fmt: skip
RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "reshape_as", "view_as"}
MOVEMENT = _VIEWS | SAME - {"dropout", "feature_dropout", "alpha_dropout", "hardswish"} | RESHAPES
_POOLS = {
    "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3,
    "adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3, "adaptive_max_pool1d": 1,
    "adaptive_max_pool2d": 2, "max_pool2d_with_indices": 2, "upsample_nearest1d": 1, "upsample_nearest2d": 2,
    "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_linear1d": 1, "_upsample_nearest_exact2d": 2,
    "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2, "grid_sampler": 2, "grid_sampler_2d": 2,
    "lp_pool2d": 2,
}  # fmt: skip
_SUMS = {"sum", "mean", "linalg_vector_norm", "norm"}  # reductions to which a removed channel contributes nothing
_REDUCTIONS = _SUMS | {"amax", "amin", "max", "min", "prod", "var", "std", "logsumexp"} | {
    "any", "all", "median", "nansum",
}  # fmt: skip
_ALONG = {"softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "flip", "roll"}
_BORN = {
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like",
    "full_like", "empty_like", "rand_like", "randn_like", "scalar_tensor",
}  # fmt: skip
CONVS = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}

# Where a parameter stands as a weight: operator -> argument names. Anywhere else it is data.
_WEIGHTS = {
    **dict.fromkeys(CONVS, ("weight", "bias")),
    "linear": ("weight", "bias"),
    "batch_norm": ("weight", "bias", "running_mean", "running_var"),
    "instance_norm": ("weight", "bias", "running_mean", "running_var"),
    "layer_norm": ("weight", "bias"),
    "rms_norm": ("weight",),
    "group_norm": ("weight", "bias"),
    "embedding": ("weight",),
    "prelu": ("weight",),
    "matmul": ("other",),
    "mm": ("mat2",),
    "addmm": ("mat2",),
}

CONTRACTIONS = set(CONVS) | {
    "linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "scaled_dot_product_attention", "embedding",
}  # fmt: skip


class _Run:
    """One labelled execution. Every rule takes the node and its arguments by name and returns the output's labels."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.coupling = labels.coupling
        self.boxes: list[Tensor] = []  # label tensors that may vary along several dims
        self.weights = _weight_parameters(labels.module)
        self.data_left = MOST_DATA
        self.rules: dict[str, Callable[[fx.Node, dict[str, Any]], Any]] = {
            **dict.fromkeys(CONVS, self.convolution),
            **dict.fromkeys(_POOLS, self.pool),
            **dict.fromkeys(_REDUCTIONS, self.reduction),
            **dict.fromkeys(_ALONG, self.along),
            **dict.fromkeys(RESHAPES, self.reshape),
            **dict.fromkeys(_BORN, self.birth),
            "linear": self.linear,
            "matmul": self.matmul,
            "bmm": self.matmul,
            "mm": self.matmul,
            "scaled_dot_product_attention": self.attention,
            "embedding": self.embedding,
            "batch_norm": self.batch_norm,
            "instance_norm": self.batch_norm,
            "layer_norm": self.layer_norm,
            "rms_norm": self.layer_norm,
            "group_norm": self.group_norm,
            "prelu": self.prelu,
            "cat": self.concatenate,
            "stack": self.concatenate,
            "pad": self.pad,
            "constant_pad_nd": self.pad,
            "pixel_shuffle": self.pixel_shuffle,
            "pixel_unshuffle": self.pixel_unshuffle,
            "channel_shuffle": self.channel_shuffle,
            "index": self.index,
            "index_select": self.index_select,
            "repeat": self.repeat,
            "expand": self.expand,
            "expand_as": self.expand,
            "broadcast_to": self.expand,
            "copy": self.copy,
            "glu": self.glu,
        }

    # -- the walk

    def all(self) -> None:
        for node in self.labels.module.graph.nodes:
            if node.op == "placeholder":
                self.labels.values[node] = torch.zeros((), dtype=torch.int64).expand(shape_of(node))
            elif node.op == "get_attr":
                self.labels.values[node] = self.attribute(node)
            elif node.op == "output":
                for result in node.all_input_nodes:
                    for value in _tensors(self.labels.values[result]):
                        self.coupling.freeze(core_of(value), Cause("output", "it is what the model returns"))
            else:
                self.labels.values[node] = self.call(node)

    def call(self, node: fx.Node) -> Any:
        name = operator_of(node)
        if node.op == "call_function" and name == "getitem":
            result: Any = self.labels.values[node.args[0]][node.args[1]]  # type: ignore[index]
        elif not isinstance(node.target, torch._ops.OpOverload):
            result = self.unknown(node)
        else:
            arguments = bound_arguments(node)
            if name in self.rules:
                result = self.rules[name](node, arguments)
            elif name in SAME:
                result = self.value(next(iter(arguments.values())))
            elif name in _VIEWS:
                result = self.move(node)
            elif torch.Tag.pointwise in node.target.tags:
                result = self.pointwise(node, list(node.all_input_nodes))
            else:
                result = self.unknown(node)
        self.freeze_weights(node, Cause(name, "it uses a weight of another operator as data"))
        if isinstance(result, Tensor):
            result = self.lazy(result)
            assert result.shape == shape_of(node), f"{node}: labels {tuple(result.shape)}, value {shape_of(node)}"
            if sum(size > 1 for size in core_of(result).shape) > 1:
                self.boxes.append(result)
        elif isinstance(result, (list, tuple)):
            self.boxes.extend(part for part in result if isinstance(part, Tensor))
        return result

    def square(self) -> None:
        """Unite along all varying dims of every box but the longest."""
        for box in self.boxes:
            dims = self.labels.varying(box)
            if len(dims) > 1:
                free = max(dims, key=lambda dim: box.shape[dim])
                self.unite_along(box, [dim for dim in dims if dim != free], Cause("view", "a tensor is a box"))

    def value(self, operand: Any) -> Tensor:
        """The labels of an operand (of one that returns several, a tuple)."""
        labels: Tensor = self.labels.values[operand]
        return labels

    def lazy(self, labels: Tensor) -> Tensor:
        """Dims in which the component does not change, back to stride 0."""
        core = core_of(labels)
        varying = self.labels.varying(core) if core.numel() > 1 else []
        for dim in range(core.ndim):
            if dim not in varying and core.shape[dim] > 1:
                core = core.narrow(dim, 0, 1)
        return core.expand(labels.shape)

    def fresh(self, owner: fx.Node | str, tag: object, count: int) -> Tensor:
        """Labels born at `owner`; the same ones every time the program is run. [count]"""
        key = (owner, (tag, count))
        if key not in self.labels.born:
            self.labels.born[key] = self.coupling.fresh(count)
        return self.labels.born[key]

    def unite_along(self, labels: Tensor, dims: Iterable[int], cause: Cause) -> Tensor:
        """Make the labels constant along `dims`; returns them so."""
        core = core_of(labels)
        for dim in dims:
            if core.shape[dim] > 1:
                first = core.narrow(dim, 0, 1)
                self.coupling.unite(first.expand_as(core), core, cause)
                core = first
        return core.expand(labels.shape)

    def unite_line(self, labels: Tensor, dim: int, cause: Cause) -> Tensor:
        """Unite along every dim but one and return that line. [size of dim]"""
        dim %= labels.ndim
        return self.labels.line(self.unite_along(labels, [d for d in range(labels.ndim) if d != dim], cause), dim)

    def frozen(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros((), dtype=torch.int64).expand(tuple(shape))

    # -- parameters

    def attribute(self, node: fx.Node) -> Tensor:
        name, shape = str(node.target), shape_of(node)
        if not node.meta["val"].is_floating_point():
            return self.frozen(shape)  # indices and flags are never thinned as data; who reads them says what to do
        if name in self.weights:
            return self.frozen(shape)  # labelled dim by dim where it is used as a weight
        if name not in self.labels.data:
            self.data_left -= math.prod(shape)
            if self.data_left < 0:
                return self.frozen(shape)
        labels = self.fresh(name, "element", max(1, math.prod(shape))).view(shape)
        self.labels.data[name] = labels
        self.boxes.append(labels)
        return labels

    def weight(self, operand: Any, dim: int, size: int, role: str, met: Tensor | None = None) -> Tensor | None:
        """The labels of a weight along one dim, or None where there is none or it is computed. [size]

        A weight met for the first time may take the labels that it meets, which saves a union.
        """
        if not isinstance(operand, fx.Node) or operand.op != "get_attr" or str(operand.target) not in self.weights:
            return None
        key = (str(operand.target), dim)
        if key not in self.labels.slots:
            self.labels.slots[key] = self.fresh(str(operand.target), dim, size) if met is None else met
            self.labels.roles[key] = role
        return self.labels.slots[key]

    def vector(self, operand: Any, line: Tensor, role: str, cause: Cause) -> None:
        """Tie a one-dimensional parameter (bias, scale, running statistic) to the channels it belongs to."""
        if not isinstance(operand, fx.Node):
            return
        labels = self.weight(operand, 0, len(line), role, met=line)
        self.coupling.unite(line, self.value(operand).reshape(-1) if labels is None else labels, cause)

    # -- contractions

    def convolution(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        cause, rank = Cause(operator_of(node), "its weight is computed in the forward"), CONVS[operator_of(node)]
        transposed, groups = "transpose" in operator_of(node), given["groups"]
        x = self.value(given["input"])
        out_shape, weight_shape = shape_of(node), shape_of(given["weight"])
        channel = x.ndim - rank - 1
        consumed = self.unite_line(x, channel, Cause(operator_of(node), "it convolves whole channels"))
        cin, cout = len(consumed), out_shape[channel]
        per_in, per_out = cin // groups, cout // groups
        out_dim, in_dim = (1, 0) if transposed else (0, 1)
        produced = self.weight(given["weight"], out_dim, weight_shape[out_dim], "out")
        channelwise = transposed and groups == cin and weight_shape[1] == 1
        depthwise = not transposed and groups > 1 and per_in == 1
        met = None if depthwise else consumed if transposed else consumed[:per_in]
        entering = self.weight(given["weight"], in_dim, weight_shape[in_dim], "out" if channelwise else "in", met)
        if produced is None or entering is None:
            return self.give_up(node, cause)
        coupled = Cause(operator_of(node), "it reads or writes channels that are frozen")
        if transposed:
            # weight [Cin, Cout / groups, ...]: the i-th output of each group reads the same slice of dim 1
            self.coupling.unite(consumed, entering, coupled)
            if channelwise:
                produced_all = consumed
                self.coupling.freeze(produced, coupled)
            else:
                produced_all = produced.repeat(groups)
                self.unite_along(consumed.view(groups, per_in), [0], coupled)
        elif depthwise:
            self.coupling.unite(consumed[:, None].expand(groups, per_out), produced.view(groups, per_out), coupled)
            self.coupling.freeze(entering, coupled)
            produced_all = produced
        else:
            self.coupling.unite(consumed.view(groups, per_in), entering.expand(groups, per_in), coupled)
            self.unite_along(produced.view(groups, per_out), [0], coupled)
            produced_all = produced
        self.vector(given["bias"], produced_all, "out", coupled)
        shape = [1] * len(out_shape)
        shape[channel] = cout
        return produced_all.view(shape).expand(out_shape)

    def linear(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        cause = Cause("linear", "its weight is computed in the forward")
        return self.project(node, given["input"], given["weight"], given["bias"], out_dim=0, cause=cause)

    def project(self, node: fx.Node, x: Any, weight: Any, bias: Any, out_dim: int, cause: Cause) -> Tensor:
        """x [..., K] times a weight [N, K] (out_dim 0) or [K, N] (out_dim 1)."""
        labels, out_shape = self.value(x), shape_of(node)
        size = shape_of(weight)
        consumed = self.unite_line(labels, -1, Cause(operator_of(node), "it reads the last dim"))
        produced = self.weight(weight, out_dim, size[out_dim], "out")
        entering = self.weight(weight, 1 - out_dim, size[1 - out_dim], "in", met=consumed)
        if produced is None or entering is None:
            return self.give_up(node, cause)
        coupled = Cause(operator_of(node), "it reads or writes channels that are frozen")
        self.coupling.unite(consumed, entering, coupled)
        self.vector(bias, produced, "out", coupled)
        return produced.expand(out_shape)

    def matmul(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        a, b = list(given.values())[:2]
        cause = Cause(operator_of(node), "both of its sides carry channels")
        if isinstance(b, fx.Node) and b.op == "get_attr" and str(b.target) in self.weights:
            return self.project(node, a, b, None, out_dim=1, cause=cause)
        if min(len(shape_of(a)), len(shape_of(b))) < 2:
            return self.give_up(node, cause)
        return self.contract(self.value(a), self.value(b), cause)

    def contract(self, a: Tensor, b: Tensor, cause: Cause) -> Tensor:
        """Labels of a [..., M, K] @ b [..., K, N]. What is free in both a batch dim (heads) and an inner one is the
        choice between whole heads and the dims inside every head."""
        a, b = self.choose(a, cause), self.choose(b, cause)
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
        m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
        row_a, row_b = a[..., 0, :], b[..., :, 0]  # [..., K]
        self.pair(row_a.expand(*batch, k), row_b.expand(*batch, k), cause)
        rows, columns = self.labels.varying(a[..., :, 0]), self.labels.varying(b[..., 0, :])
        m_varies, n_varies = a.ndim - 2 in rows, b.ndim - 2 in columns
        if m_varies and n_varies:
            self.coupling.freeze(core_of(a), cause)
            self.coupling.freeze(core_of(b), cause)
            return self.frozen((*batch, m, n))
        if m_varies:
            return a[..., :, :1].expand(*batch, m, n)
        if n_varies:
            return b[..., :1, :].expand(*batch, m, n)
        heads = a[..., :1, :1].expand(*batch, 1, 1)
        other = b[..., :1, :1].expand(*batch, 1, 1)
        heads = heads if self.labels.varying(heads) else other
        return heads.expand(*batch, m, n) if self.labels.varying(heads) else self.frozen((*batch, m, n))

    def choose(self, labels: Tensor, cause: Cause) -> Tensor:
        varying = self.labels.varying(labels)
        inner = [dim for dim in varying if dim >= labels.ndim - 2]
        outer = [dim for dim in varying if dim < labels.ndim - 2]
        if inner and outer:
            drop = inner if self.labels.attention == "heads" else outer
            return self.unite_along(labels, drop, Cause(cause.operator, "heads or their dims are pruned as one"))
        return labels

    def pair(self, a: Tensor, b: Tensor, cause: Cause) -> None:
        """Unite two label tensors of one shape without writing out what both leave constant."""
        for dim in range(a.ndim):
            if a.shape[dim] > 1 and a.stride(dim) == 0 and b.stride(dim) == 0:
                a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
        if self.labels.varying(a) or self.labels.varying(b):
            self.coupling.unite(a, b, cause)

    def attention(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        cause = Cause("scaled_dot_product_attention", "its queries, keys and values must agree")
        query, key, value = (self.value(given[name]) for name in ("query", "key", "value"))
        if given.get("enable_gqa"):
            return self.give_up(node, Cause(cause.operator, "its queries share keys in groups"))
        scores = self.contract(query, key.transpose(-1, -2), cause)
        if isinstance(given["attn_mask"], fx.Node):
            self.broadcast([scores, self.value(given["attn_mask"])], scores.shape, cause)
        if given.get("scale") is None:
            self.labels.pinned[node] = query.shape[-1]
        return self.contract(scores, value, cause)

    def embedding(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        produced = self.weight(given["weight"], 1, shape_of(given["weight"])[1], "out")
        if produced is None:
            return self.give_up(node, Cause("embedding", "its table is computed in the forward"))
        return produced.expand(shape_of(node))

    # -- normalisations

    def batch_norm(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x, cause = self.value(given["input"]), Cause(operator_of(node), "one scale per channel")
        line = self.unite_line(x, 1, cause)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.vector(given[name], line, "norm", cause)
        return self.labels.line(x, 1).view([-1 if d == 1 else 1 for d in range(x.ndim)]).expand(x.shape)

    def layer_norm(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x, rank = self.value(given["input"]), len(given["normalized_shape"])
        cause = Cause(operator_of(node), "it normalises over the last dims")
        inner = [dim for dim in self.labels.varying(x) if dim >= x.ndim - rank]
        outer = [dim for dim in self.labels.varying(x) if dim < x.ndim - rank]
        if inner and len(outer) == 1 and x.ndim > 3 and self.labels.attention == "heads":
            x = self.unite_along(x, inner, cause)  # queries or keys of every head, which stay whole
            inner = []
        if not inner:
            return x
        self.labels.normalised.append((core_of(x), operator_of(node)))
        for name in ("weight", "bias"):
            if isinstance(given.get(name), fx.Node):
                if rank == 1:
                    self.vector(given[name], self.unite_line(x, -1, cause), "norm", cause)
                else:
                    self.coupling.freeze(core_of(x), cause)
        return x

    def group_norm(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x, cause = self.value(given["input"]), Cause("group_norm", "its groups are thinned alike")
        line = self.unite_line(x, 1, cause)
        groups = given["num_groups"]
        if len(line) == groups:
            self.labels.pinned[node] = groups  # one group a channel: the count follows the channels
        else:
            self.unite_along(line.view(groups, -1), [0], cause)
            self.labels.normalised.append((line, "group_norm"))
        for name in ("weight", "bias"):
            self.vector(given[name], line, "norm", cause)
        return x

    def prelu(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x, slopes = self.value(given["self"]), shape_of(given["weight"])
        if math.prod(slopes) > 1:
            cause = Cause("prelu", "one slope per channel")
            self.vector(given["weight"], self.unite_line(x, 1, cause), "norm", cause)
        return x

    # -- element by element

    def pointwise(self, node: fx.Node, operands: Sequence[fx.Node]) -> Tensor:
        cause = Cause(operator_of(node), "its operands are added or multiplied element by element")
        return self.broadcast([self.value(operand) for operand in operands], shape_of(node), cause)

    def broadcast(self, operands: Sequence[Tensor], shape: Sequence[int], cause: Cause) -> Tensor:
        """Unite operands element by element, broadcasting; the labels of the one that varies most."""
        shape = tuple(shape)
        padded = [operand.reshape((1,) * (len(shape) - operand.ndim) + operand.shape) for operand in operands]
        padded.sort(key=lambda labels: -len(self.labels.varying(labels)))
        lead = padded[0]
        for other in padded[1:]:
            lead = self.meet(lead, other, shape, cause)
        return lead.expand(shape)

    def meet(self, a: Tensor, b: Tensor, shape: tuple[int, ...], cause: Cause) -> Tensor:
        varies_a, varies_b = set(self.labels.varying(a)), set(self.labels.varying(b))
        small_a = {dim for dim, size in enumerate(shape) if a.shape[dim] == 1 < size}
        small_b = {dim for dim, size in enumerate(shape) if b.shape[dim] == 1 < size}
        both = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        if varies_a & varies_b:
            self.pair(a.expand(both), b.expand(both), cause)
            return a.expand(both)
        # no dim is shared: one may shrink along what the other merely broadcasts, and only if that one does not
        a_free, b_free = varies_a <= small_b, varies_b <= small_a
        if varies_a and (not a_free or (varies_b and b_free)):
            self.coupling.freeze(core_of(a), cause)
        if varies_b and (not b_free or (varies_a and a_free)):
            self.coupling.freeze(core_of(b), cause)
        return (a if self.labels.varying(a) else b).expand(both)

    def copy(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        return self.broadcast(
            [self.value(given["self"]), self.value(given["src"])], shape_of(node), Cause("copy_", "written over")
        )

    def glu(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        first, second = self.value(given["self"]).chunk(2, given["dim"])
        return self.broadcast([first, second], shape_of(node), Cause("glu", "its halves are multiplied"))

    # -- reductions

    def reduction(self, node: fx.Node, given: dict[str, Any]) -> Any:
        name = operator_of(node)
        x = self.value(next(iter(given.values())))
        if name in ("max", "min") and "other" in given:
            return self.pointwise(node, node.all_input_nodes)
        dims = given.get("dim")
        over = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        over = [dim % x.ndim for dim in over]
        varying = self.labels.varying(x)
        cause = Cause(name, "it reduces over channels")
        reduced = x
        if any(dim not in over for dim in varying):
            reduced = self.unite_along(x, over, cause)
        elif varying and name not in _SUMS:
            self.coupling.freeze(core_of(x), cause)
        elif varying and name == "mean":
            self.labels.pinned[node] = math.prod(x.shape[dim] for dim in over)
        elif varying and name in ("linalg_vector_norm", "norm") and given.get("ord", given.get("p", 2)) not in (1, 2):
            self.coupling.freeze(core_of(x), cause)
        if varying and all(dim in over for dim in varying):
            reduced = self.frozen(x.shape)
        kept = reduced[tuple(slice(0, 1) if dim in over else slice(None) for dim in range(x.ndim))]
        result = kept if given.get("keepdim") else kept.reshape([s for d, s in enumerate(kept.shape) if d not in over])
        several = node.meta["val"]
        return (result, self.frozen(result.shape)) if isinstance(several, (tuple, list)) else result

    def along(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        """softmax, cumsum, flip, roll: position matters along the dims they name."""
        x, name = self.value(given["self"]), operator_of(node)
        dims = given["dims"] if "dims" in given else [given["dim"]]
        over = [dim % x.ndim for dim in (dims or range(x.ndim))]
        varying = self.labels.varying(x)
        cause = Cause(name, "it depends on every position along its dim")
        if any(dim not in over for dim in varying):
            return self.unite_along(x, over, cause)
        if varying:
            self.coupling.freeze(core_of(x), cause)
        return x

    def pool(self, node: fx.Node, given: dict[str, Any]) -> Any:
        x, rank = self.value(next(iter(given.values()))), _POOLS[operator_of(node)]
        cause = Cause(operator_of(node), "it pools positions of one channel")
        united = self.unite_along(x, range(x.ndim - rank, x.ndim), cause)
        several = node.meta["val"]
        shape = shape_of(several[0] if isinstance(several, (tuple, list)) else several)
        index = [slice(None)] * (x.ndim - rank) + [slice(0, 1)] * rank
        result = united[tuple(index)].expand(shape)
        return (result, self.frozen(shape)) if isinstance(several, (tuple, list)) else result

    # -- data movement

    def move(self, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, self.value)
        kwargs = fx.node.map_arg(node.kwargs, self.value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def expand(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        """What carries no channel may be spread over any number of them: the copies live as what they are joined to."""
        x, shape = self.value(given["self"]), shape_of(node)
        lead = len(shape) - x.ndim
        spread = [dim for dim, size in enumerate(shape) if size > 1 and (dim < lead or x.shape[dim - lead] == 1)]
        result: Tensor = x.expand(shape)
        if len(spread) == 1 and spread[0] > 0 and not bool(self.labels.canon(core_of(x)).any()):
            line = self.fresh(node, "copies", shape[spread[0]])
            result = line.view([-1 if dim == spread[0] else 1 for dim in range(len(shape))]).expand(shape)
            other = given.get("other")
            if isinstance(other, fx.Node):
                self.broadcast([result, self.value(other)], shape, Cause(operator_of(node), "it takes another's shape"))
        return result

    def reshape(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x = self.value(next(iter(given.values())))
        return lazy_reshape(x, shape_of(node))

    def concatenate(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        operands = given["tensors"]
        assert isinstance(operands, (list, tuple))
        parts = [self.value(operand) for operand in operands]
        if operator_of(node) == "stack":
            dim = given["dim"] % (parts[0].ndim + 1)
            parts = [part.unsqueeze(dim) for part in parts]
        else:
            parts = [part for part in parts if part.ndim > 1 or part.numel()]
            dim = given["dim"] % parts[0].ndim
        shape = shape_of(node)
        for other in range(len(shape)):
            if other != dim and all(part.stride(other) == 0 or part.shape[other] == 1 for part in parts):
                parts = [part.narrow(other, 0, 1) for part in parts]
        return torch.cat(parts, dim).expand(shape)

    def pad(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x, shape, pads = self.value(given["self"]), shape_of(node), list(given["pad"])
        varying = self.labels.varying(x)
        padded = {x.ndim - 1 - i // 2 for i, amount in enumerate(pads) if amount}
        along = [dim for dim in varying if dim in padded]
        mirrors = given.get("mode", "constant") != "constant"
        if along and (mirrors or any(amount < 0 for amount in pads)):
            self.coupling.freeze(core_of(x), Cause(operator_of(node), "it mirrors or crops channels"))
            return self.frozen(shape)
        if not along:
            return core_of(self.unite_along(x, padded, Cause("pad", "positions of one channel"))).expand(shape)
        for dim in along:  # channels of the fill are born here, and live as long as what they are added to
            before, after = pads[2 * (x.ndim - 1 - dim)], pads[2 * (x.ndim - 1 - dim) + 1]
            x = core_of(x)
            sides = []
            for side, amount in (("before", before), ("after", after)):
                line = self.fresh(node, (dim, side), amount).view([-1 if d == dim else 1 for d in range(x.ndim)])
                sides.append(line.expand([amount if d == dim else size for d, size in enumerate(x.shape)]))
            x = torch.cat([sides[0], x, sides[1]], dim)
        return core_of(x).expand(shape)

    def birth(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        shape = shape_of(node)
        return self.fresh(node, "birth", max(1, math.prod(shape))).view(shape)

    def pixel_shuffle(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x, factor = self.value(given["self"]), given["upscale_factor"]
        cause = Cause("pixel_shuffle", "the channels of one block become the pixels of one channel")
        line = self.unite_line(x, x.ndim - 3, cause)
        blocks = self.unite_along(line.view(-1, factor * factor), [1], cause)[:, 0]
        return blocks.view([-1 if d == x.ndim - 3 else 1 for d in range(x.ndim)]).expand(shape_of(node))

    def pixel_unshuffle(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x, factor = self.value(given["self"]), given["downscale_factor"]
        line = self.unite_line(x, x.ndim - 3, Cause("pixel_unshuffle", "pixels of one channel become a block"))
        line = line.repeat_interleave(factor * factor)
        return line.view([-1 if d == x.ndim - 3 else 1 for d in range(x.ndim)]).expand(shape_of(node))

    def channel_shuffle(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x = self.value(given["self"])
        line = self.unite_line(x, 1, Cause("channel_shuffle", "it moves whole channels"))
        line = self.unite_along(line.view(given["groups"], -1), [0], Cause("channel_shuffle", "its groups are even"))
        return line.t().reshape([-1 if d == 1 else 1 for d in range(x.ndim)]).expand(shape_of(node))

    def index(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x = self.value(given["self"])
        if any(not self.is_constant(index) for index in given["indices"] if index is not None):
            self.coupling.freeze(core_of(x), Cause("index", "where it reads is known only at run time"))
            return self.frozen(shape_of(node))
        indices = [None if index is None else self.constant(index) for index in given["indices"]]
        dims = [dim for dim, index in enumerate(indices) if index is not None]
        if any(dim in self.labels.varying(x) for dim in dims) and (len(dims) > 1 or indices[dims[0]].ndim > 1):  # type: ignore[union-attr]
            x = self.unite_along(x, dims, Cause("index", "it gathers single elements"))
        result: Tensor = torch.ops.aten.index.Tensor(x, indices)
        return result

    def index_select(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x = self.value(given["self"])
        if not self.is_constant(given["index"]):
            self.coupling.freeze(core_of(x), Cause("index_select", "where it reads is known only at run time"))
            return self.frozen(shape_of(node))
        return x.index_select(given["dim"], self.constant(given["index"]))

    def is_constant(self, operand: Any) -> bool:
        return isinstance(operand, fx.Node) and operand.op == "get_attr"

    def constant(self, operand: fx.Node) -> Tensor:
        value: Tensor = operator_attribute(self.labels.module, operand)
        return value

    def repeat(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        x, shape = self.value(given["self"]), shape_of(node)
        x = x.reshape((1,) * (len(shape) - x.ndim) + tuple(x.shape))
        times = list(given["repeats"])
        for dim in range(len(shape)):
            if dim not in self.labels.varying(x):
                x, times[dim] = x.narrow(dim, 0, 1), 1
        return x.repeat(times).expand(shape)

    # -- what nobody knows

    def unknown(self, node: fx.Node) -> Any:
        self.freeze_operands(node, Cause(operator_of(node), "no rule is known for it"))
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return tuple(self.frozen(shape_of(part)) if isinstance(part, Tensor) else None for part in value)
        return self.frozen(shape_of(node)) if isinstance(value, Tensor) else None

    def give_up(self, node: fx.Node, cause: Cause) -> Tensor:
        self.freeze_operands(node, cause)
        return self.frozen(shape_of(node))

    def freeze_operands(self, node: fx.Node, cause: Cause) -> None:
        for operand in node.all_input_nodes:
            for labels in _tensors(self.value(operand)):
                self.coupling.freeze(core_of(labels), cause)
        self.freeze_weights(node, cause, everywhere=True)

    def freeze_weights(self, node: fx.Node, cause: Cause, everywhere: bool = False) -> None:
        """Freeze parameters that are weights elsewhere and stand here as data (or, `everywhere`, as anything)."""
        names = () if everywhere or node.op != "call_function" else _WEIGHTS.get(operator_of(node), ())
        proper = {bound_arguments(node).get(name) for name in names} if names else set()
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and str(operand.target) in self.weights and operand not in proper:
                for dim, size in enumerate(shape_of(operand)):
                    labels = self.weight(operand, dim, size, "out")
                    assert labels is not None
                    self.coupling.freeze(labels, cause)


def lazy_reshape(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """`labels.reshape(shape)` that keeps stride-0 dims wherever old and new dims can be matched up."""
    blocks = _matching_blocks(labels.shape, shape)
    core_in, core_out, expand_to = labels, [], []
    for old, new in blocks:
        constant = all(labels.stride(dim) == 0 or labels.shape[dim] == 1 for dim in old)
        for dim in old if constant else ():
            core_in = core_in.narrow(dim, 0, 1)
        core_out += [1 if constant else shape[dim] for dim in new]
        expand_to += [shape[dim] for dim in new]
    return core_in.reshape(core_out).expand(expand_to)


def _matching_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes of equal element count into the shortest runs of dims with equal products."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        product_old = product_new = 1
        if i < len(old):
            left, product_old, i = [i], old[i], i + 1
        if j < len(new):
            right, product_new, j = [j], new[j], j + 1
        while product_old != product_new:
            if product_old < product_new:
                left.append(i)
                product_old, i = product_old * old[i], i + 1
            else:
                right.append(j)
                product_new, j = product_new * new[j], j + 1
        blocks.append((left, right))
    return blocks


def operator_attribute(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor a `get_attr` node reads."""
    parent, _, leaf = str(node.target).rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(parent), leaf)
    return tensor.detach()


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _weight_parameters(module: fx.GraphModule) -> set[str]:
    """Attributes that stand somewhere as the weight of a contraction or normalisation."""
    weights: set[str] = set()
    for node in module.graph.nodes:
        names = _WEIGHTS.get(operator_of(node), ()) if node.op == "call_function" else ()
        if names:
            given = bound_arguments(node)
            for name in names:
                operand = given.get(name)
                if isinstance(operand, fx.Node) and operand.op == "get_attr":
                    matrix = operator_of(node) not in ("matmul", "mm", "addmm") or len(shape_of(operand)) == 2
                    if matrix and operand.meta["val"].is_floating_point():
                        weights.add(str(operand.target))
    return weights

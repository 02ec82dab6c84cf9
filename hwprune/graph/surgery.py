"""The user's own module, physically smaller, where its forward can follow; the resized program where it cannot."""

import copy
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from hwprune.errors import InvalidInput, UnsupportedModel
from hwprune.graph.groups import keep_top
from hwprune.graph.labels import CONVS, MOVEMENT, RESHAPES, bound_arguments, operator_of, shape_of
from hwprune.graph.resize import Resizer
from hwprune.graph.trace import Program, get_tensor, inference_mode_of

_SLACK = 200  # roundings by which two runs of one network may differ: kernels choose their order by size and layout
_JITTER = 0.05  # how far parameters are moved for the comparison, so that a branch that starts at zero is compared too


@dataclass(frozen=True)
class Cut:
    """A smaller network.

    kind: "module" is a copy of the user's module with smaller tensors; "program" is the resized program, where the
    module's forward cannot follow. `reason` says in one sentence why, and is empty for a module.
    """

    module: nn.Module
    kind: Literal["module", "program"]
    reason: str = ""


def cut(model: nn.Module, program: Program, keep: Any) -> Cut:
    """Make `model` smaller: keep the channels whose `keep` [ΣC] is true, with the values `model` has now.

    The module is accepted only if it computes what `resize(program, keep)` computes, on the example inputs and with
    parameters moved at random; `model` itself is left as it is. Training flags and `requires_grad` carry over.
    Where residual blocks lose all their channels, the network is the resized program: a forward of the user's names
    the layers of its blocks and would go on to call them, or what stands in their place.
    Raises InvalidInput if a group would be left empty that is not removable, or if `program` was traced from another
    model.
    """
    resizer = Resizer(program, keep)
    resized = resizer.run()
    _take_values(model, program, resized, resizer)
    if len(resizer.removed):
        names = ", ".join(program.groups.names[g] for g in resizer.removed)
        reason = f"Its own forward would go on to run the residual blocks that lost all their channels ({names})."
        return Cut(_as_trained(resized, model), "program", reason)
    rescaling = _rescaling(program, resizer, resized)
    try:
        module = _shrink(model, program, resized)
    except Exception as error:  # a user's __deepcopy__ may do anything
        return Cut(_as_trained(resized, model), "program", f"The module cannot be copied: {error}.")
    reason = _deviation(module, resized, program, rescaling)
    if reason:
        return Cut(_as_trained(resized, model), "program", reason)
    _rescale(rescaling)
    return Cut(module, "module")


def _take_values(model: nn.Module, program: Program, resized: fx.GraphModule, resizer: Resizer) -> None:
    """Give the resized program the model's present values and `requires_grad`, should they not be shared any more."""
    for key in dict(resized.named_parameters()) | dict(resized.named_buffers()):
        mine, traced = _find(model, key), _find(program.module, key)
        if mine is None or traced is None:
            continue
        if mine.shape != traced.shape:
            raise InvalidInput(
                f"{key} is {tuple(mine.shape)} in the model and {tuple(traced.shape)} in the program; trace this model."
            )
        small = get_tensor(resized, key)
        if mine is not traced:
            with torch.no_grad():
                small.copy_(resizer.thin(key, mine.detach()))
        small.requires_grad_(mine.requires_grad)

    def present(key: str) -> Tensor:
        mine = _find(model, key)
        return get_tensor(program.module, key) if mine is None else mine

    for key, node in resizer.constants.items():
        with torch.enable_grad():
            value = resizer.value_of(node, present)
        small = get_tensor(resized, key).requires_grad_(value.requires_grad)
        with torch.no_grad():
            small.copy_(value)


def _find(root: nn.Module, key: str) -> Tensor | None:
    try:
        return get_tensor(root, key)
    except AttributeError:
        return None


def _shrink(model: nn.Module, program: Program, resized: fx.GraphModule) -> nn.Module:
    """A deep copy in which every tensor the program knows is the resized program's, wherever and however it is held."""
    memo: dict[int, Any] = {}
    for node in program.module.graph.nodes:
        mine = _find(model, str(node.target)) if node.op == "get_attr" else None
        if mine is not None:
            memo[id(mine)] = get_tensor(resized, str(node.target))
    module = copy.deepcopy(model, memo)
    for part in module.modules():
        _follow_tensors(part)
    _follow_program(module, program, resized)
    return module


def _follow_tensors(module: nn.Module) -> None:
    """Set the sizes that torch's own layers keep beside their tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        produced, consumed = (1, 0) if module.transposed else (0, 1)
        inner = module.weight.shape[1] * module.groups
        module.out_channels = inner if produced else module.weight.shape[0]
        module.in_channels = inner if consumed else module.weight.shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        known = module.running_mean if module.running_mean is not None else weight
        module.num_features = module.num_features if known is None else len(known)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()


@dataclass(frozen=True)
class _Figure:
    """A size (or tuple of sizes) among the arguments of a call, as it was and as it is in the smaller program."""

    dense: Any
    now: Any
    inner: bool  # the last dim of a view or the parts of a split, hence rather a head's dims than the number of heads


def _follow_program(module: nn.Module, program: Program, resized: fx.GraphModule) -> None:
    """Carry the sizes that changed in the graph to the attributes they came from.

    A call belongs to the module in whose forward it was made. Wherever that module has an integer (or a list of them)
    equal to a size that the call was given, that is taken to be its source.
    """
    small = {node.name: node for node in resized.graph.nodes}
    figures: dict[str, list[_Figure]] = defaultdict(list)
    for node in program.module.graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if node.op == "call_function" and stack:
            figures[stack[-1][0]].extend(_figures(node, small[node.name]))
    for path, found in figures.items():
        part = module.get_submodule(path)
        if all(figure.dense == figure.now for figure in found):
            continue
        if isinstance(part, nn.modules.conv._ConvNd):
            part.groups = next(figure.now for figure in found if figure.dense == part.groups)
            _follow_tensors(part)
            continue
        for name, value in list(_sizes(part)):
            now = _follow(name, tuple(value) if isinstance(value, list) else value, found)
            setattr(part, name, now if isinstance(value, int) else type(value)(now))


def _follow(name: str, value: Any, figures: list[_Figure]) -> Any:
    """What an attribute becomes. Heads and their dims are told apart by the name where both have the same figure."""
    equal = [figure for figure in figures if figure.dense == value]
    counts_heads = "head" in name and "dim" not in name
    likely = [figure for figure in equal if figure.inner != counts_heads] or equal
    changed = [figure.now for figure in likely if figure.now != value]
    return max(changed, key=changed.count) if changed else value


def _figures(dense: fx.Node, small: fx.Node) -> list[_Figure]:
    """The sizes that the two calls of one node were given."""
    if not isinstance(dense.target, torch._ops.OpOverload) or not isinstance(small.target, torch._ops.OpOverload):
        return []
    after = bound_arguments(small)
    if dense.target is not small.target:
        return _split_figures(dense, list(after["split_sizes"]))
    return _argument_figures(operator_of(dense), bound_arguments(dense), after)


def _argument_figures(name: str, before: dict[str, Any], after: dict[str, Any]) -> list[_Figure]:
    """The sizes among the arguments of an operator called `name`."""
    if name in CONVS:
        return [_Figure(before["groups"], after["groups"], inner=False)]
    found = []
    for key, old in before.items():
        new = after[key]
        if isinstance(old, int) and isinstance(new, int):
            found.append(_Figure(old, new, inner=True))
        elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
            last = len(old) - 1
            found.append(_Figure(tuple(old), tuple(new), inner=True))
            pairs = enumerate(zip(old, new, strict=True))
            found += [_Figure(a, b, i == last or name.startswith("split")) for i, (a, b) in pairs]
            if name in ("pad", "constant_pad_nd"):
                sides = [slice(i, i + 2) for i in range(0, len(old), 2)]
                found += [_Figure(tuple(old[side]), tuple(new[side]), inner=True) for side in sides]
    return [figure for figure in found if _is_size(figure.dense) and _is_size(figure.now)]


def _split_figures(dense: fx.Node, parts: list[int]) -> list[_Figure]:
    """Those of a split into equal parts, which may be unequal now: `split` takes a list where it took a number."""
    before = bound_arguments(dense)
    if "split_size" not in before:
        return []
    assert isinstance(dense.args[0], fx.Node)
    whole = _Figure(shape_of(dense.args[0])[before["dim"]], sum(parts), inner=True)
    return [_Figure(before["split_size"], parts[0] if len(set(parts)) == 1 else parts, inner=True), whole]


class Follower:
    """The sizes that a module keeps in attributes, for any keep, without cutting it: cheap enough for every step.

    Made for a module that is to compute with fewer channels for a while. Raises UnsupportedModel, with the reason, if
    the module's own forward cannot follow, or if what remains would depend on how many channels are gone.
    """

    def __init__(self, model: nn.Module, program: Program) -> None:
        normalised = [group.name for group in program.groups if group.normalised]
        if normalised or program.labels.pinned:
            where = normalised or [node.name for node in program.labels.pinned]
            raise UnsupportedModel(f"{', '.join(where)} would see that channels are missing; masks must be multiplied")
        self._program = program
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(program.groups.total, generator=generator)
        probe = keep_top(program.groups, (program.groups.widths + 1) // 2, scores)
        made = cut(model, program, probe)
        if made.kind != "module":
            raise UnsupportedModel(f"the network cannot leave channels out while it trains: {made.reason}")
        nodes: dict[str, list[fx.Node]] = defaultdict(list)
        for node in program.module.graph.nodes:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            movable = isinstance(node.target, torch._ops.OpOverload) and "index" not in operator_of(node)
            if node.op == "call_function" and stack and movable:
                nodes[stack[-1][0]].append(node)
        resizer = Resizer(program, probe)
        self._nodes = {
            path: mine
            for path, mine in nodes.items()
            if any(figure.dense != figure.now for figure in _figures_of(mine, resizer))
        }
        parts = {path: model.get_submodule(path) for path in self._nodes}
        self._dense = {path: (part, dict(_sizes(part))) for path, part in parts.items()}

    def __call__(self, keep: Any) -> list[tuple[nn.Module, str, Any]]:
        """What to set: (module, attribute, value) for the channels `keep` [ΣC]."""
        resizer = Resizer(self._program, keep)
        found: list[tuple[nn.Module, str, Any]] = []
        for path, nodes in self._nodes.items():
            figures = _figures_of(nodes, resizer)
            part, dense = self._dense[path]
            for name, value in dense.items():
                if isinstance(part, nn.modules.conv._ConvNd):
                    if name == "groups":
                        now = next(figure.now for figure in figures if figure.dense == value)
                        found.append((part, name, now))
                    continue
                now = _follow(name, tuple(value) if isinstance(value, list) else value, figures)
                found.append((part, name, now if isinstance(value, int) else type(value)(now)))
        return found


def _sizes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes that may hold sizes."""
    for name, value in vars(module).items():
        if isinstance(value, (int, list, tuple)) and not isinstance(value, bool):
            yield name, value


def _figures_of(nodes: list[fx.Node], resizer: Resizer) -> list[_Figure]:
    """The sizes that the calls would be given with the channels that `resizer` keeps."""
    found = []
    for node in nodes:
        name, before = operator_of(node), bound_arguments(node)
        changes = resizer.changes(node, name, before)
        if "as_split" in changes:
            found += _split_figures(node, changes["as_split"])
        else:
            found += _argument_figures(name, before, before | changes)
    return found


def _rescaling(program: Program, resizer: Resizer, resized: fx.GraphModule) -> list[tuple[Tensor, Tensor]]:
    """Parameters of the queries, and what to multiply them by, where a forward derives 1/√d from the dims it has left.

    The scale is to stay that of the dense head dim D; with d dims left, queries times √(d / D) make up for it.
    """
    found = []
    for node in resizer.labels.pinned:
        if operator_of(node) != "scaled_dot_product_attention":
            continue
        query = bound_arguments(node)["query"]
        dense = shape_of(query)[-1]
        factor = (resizer.kept(resizer.labels.values[query])[-1] / dense) ** 0.5
        producer, rows = _producer(query)
        if factor == 1.0 or producer is None:
            continue
        for name in ("weight", "bias"):
            parameter = bound_arguments(producer).get(name)
            if isinstance(parameter, fx.Node) and parameter.op == "get_attr":
                factors = torch.ones(shape_of(parameter), dtype=torch.float64)
                factors[rows.reshape(-1)] = factor
                target = str(parameter.target)
                found.append((get_tensor(resized, target), resizer.thin(target, factors)))
    return found


def _producer(node: fx.Node) -> tuple[fx.Node | None, Tensor]:
    """The projection or norm whose output `node` rearranges, and the row of its weight behind every element."""
    name = operator_of(node)
    if name in ("linear", "layer_norm", "rms_norm"):
        return node, torch.arange(shape_of(node)[-1]).expand(shape_of(node))
    if name in MOVEMENT and isinstance(node.args[0], fx.Node):
        producer, rows = _producer(node.args[0])
        if producer is not None and name in RESHAPES:
            return producer, rows.reshape(shape_of(node))
        if producer is not None:
            return producer, node.target(rows, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return None, torch.empty(0)


@torch.no_grad()
def _rescale(rescaling: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, factors in rescaling:
        parameter *= factors.to(parameter)


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_size, value))
    return isinstance(value, int) and value >= 0


def _deviation(
    module: nn.Module, resized: fx.GraphModule, program: Program, rescaling: list[tuple[Tensor, Tensor]]
) -> str:
    """Empty if both compute the same on the example inputs, else a sentence that names the place or the difference."""
    parameters = [parameter for parameter in resized.parameters() if parameter.is_floating_point()]
    given = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    with inference_mode_of(module), inference_mode_of(resized), torch.no_grad():
        try:
            for parameter in parameters:  # the two share their tensors
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise, alpha=_JITTER * (_spread(parameter) or 1.0))
            expected = [leaf for leaf in tree_leaves(resized(*program.example_inputs)) if isinstance(leaf, Tensor)]
            _rescale(rescaling)
            try:
                found = [leaf for leaf in tree_leaves(module(*program.example_inputs)) if isinstance(leaf, Tensor)]
            except Exception as error:  # whatever a forward raises on sizes that it did not expect
                return _place(error)
        finally:
            for parameter, value in zip(parameters, given, strict=True):
                parameter.copy_(value)
    if [leaf.shape for leaf in found] != [leaf.shape for leaf in expected]:
        return f"The module returns {_shapes(found)} where the resized program returns {_shapes(expected)}."
    for a, b in zip(found, expected, strict=True):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return "An integer output of the module differs from the resized program's."
            continue
        error_now = float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
        if not error_now <= _SLACK * torch.finfo(b.dtype).eps:
            return f"The module's output differs from the resized program's by {error_now:.1e} of its largest value."
    return ""


def _spread(parameter: Tensor) -> float:
    return float(parameter.std()) if parameter.numel() > 1 else 0.0


def _place(error: Exception) -> str:
    """One sentence: which line of the user's forward cannot follow, and what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "/torch/" not in frame.filename and frame.filename != __file__] or frames
    message = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    frame = inside[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, `{frame.line}`, cannot follow: {message}."


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors) or "nothing"


def _as_trained(resized: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """The resized program with the training flags of the model."""
    resized.train(model.training)
    flags = {path: part.training for path, part in model.named_modules()}
    for path, part in resized.named_modules():
        part.training = flags.get(path, model.training)
    return resized

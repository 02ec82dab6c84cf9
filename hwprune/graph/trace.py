"""Model in, labelled program out: `torch.export` at the inference level, flattened to one graph of ATen calls."""

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from hwprune.errors import InvalidInput, UnsupportedModel
from hwprune.graph.blocks import Blocks
from hwprune.graph.groups import Groups, find_groups
from hwprune.graph.labels import Labels, mutates, propagate

Attention = Literal["heads", "dims"]

_NO_EFFECT = {"aten._assert_tensor_metadata.default", "aten.sym_constrain_range_for_size.default"}
_STATE = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


@dataclass(eq=False)
class Program:
    """A model as a flat graph of ATen calls with a channel label on every element of every tensor.

    `module` shares the model's tensors: what is trained in the model is seen here and by everything cut from it.
    Its placeholders are the model's inputs; parameters, buffers and constants are `get_attr` nodes whose targets
    are the keys of `model.state_dict()`.
    """

    name: str
    module: fx.GraphModule
    example_inputs: tuple[Tensor, ...]
    attention: Attention = "heads"
    constants: frozenset[str] = field(default_factory=frozenset)  # get_attr targets that are not state of the model

    def __call__(self, *inputs: Tensor) -> Any:
        """The dense forward, in inference semantics."""
        return self.module(*inputs)

    @cached_property
    def labels(self) -> Labels:
        """The channel labels of every tensor (computed once, on first use)."""
        return propagate(self.module, self.attention)

    @cached_property
    def blocks(self) -> Blocks:
        """Which groups may lose every channel, and what is left of the program then."""
        return Blocks(self.labels, find_groups(self.labels, self.constants))

    @cached_property
    def groups(self) -> Groups:
        """The coupled channels, and what is frozen and by which operator."""
        return self.blocks.groups


def trace(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...] | Tensor,
    attention: Attention = "heads",
    name: str | None = None,
) -> Program:
    """Export `model` on `example_inputs` and label its channels.

    attention: what stays free in an attention, whole heads or the dims inside every head.
    Raises InvalidInput where the forward itself does not take the inputs, and UnsupportedModel, with the place, where
    `torch.export` cannot follow it.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    with inference_mode_of(model):
        try:
            with _silence():
                exported = torch.export.export(model, inputs)
        except Exception as error:
            _try_forward(model, inputs)
            raise UnsupportedModel(_export_failure(model, error)) from error
    module, constants = _flatten(exported)
    return Program(name or type(model).__name__, module, inputs, attention, constants)


@contextmanager
def _silence() -> Iterator[None]:
    """Exporters warn of their own internals, and print graphs before they fail: nothing a user can act on."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _try_forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise InvalidInput where the forward fails without an exporter, too."""
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        given = ", ".join("x".join(map(str, x.shape)) or "a scalar" for x in inputs)
        raise InvalidInput(
            f"{type(model).__name__} does not take {len(inputs)} input{'s' * (len(inputs) != 1)} of {given}: its "
            f"forward raised {type(error).__name__}: {_first_line(error)}; give the shapes that it is made for."
        ) from error


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the block, every module's own training flag restored after it."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def set_tensor(root: nn.Module, path: str, tensor: Tensor, persistent: bool = True) -> None:
    """Hang `tensor` into a tree of plain modules under its dotted path, as parameter or buffer after its type."""
    *parents, leaf = path.split(".")
    module = root
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor, persistent=persistent)


def get_tensor(root: nn.Module, path: str) -> Tensor:
    """The tensor under a dotted path."""
    parent, _, leaf = path.rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(parent), leaf)
    return tensor


def _flatten(exported: torch.export.ExportedProgram) -> tuple[fx.GraphModule, frozenset[str]]:
    """The exported graph with its state as attributes instead of inputs, and what depends on neither folded away."""
    graph = copy.deepcopy(exported.graph)
    root = nn.Module()
    constants: set[str] = set()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    read = [spec.target for spec in exported.graph_signature.input_specs if spec.target in exported.state_dict]
    names = {_memory(exported.state_dict[name]): name for name in read}
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind not in _STATE:
            continue
        assert spec.target is not None
        target = spec.target
        if spec.kind is InputKind.CONSTANT_TENSOR:  # a parameter held in a plain list comes as a constant
            target = names.get(_memory(exported.constants[target]), target)
        in_state = target in exported.state_dict
        tensor = exported.state_dict[target] if in_state else exported.constants[target]
        if not in_state and spec.kind is InputKind.CONSTANT_TENSOR:
            constants.add(target)
        set_tensor(root, target, tensor, persistent=in_state)
        with graph.inserting_before(node):
            attribute = graph.create_node("get_attr", target, name=node.name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    _unwrap_output(graph, exported)
    for node in list(graph.nodes):
        if str(node.target) in _NO_EFFECT and not node.users:
            graph.erase_node(node)
    module = fx.GraphModule(root, graph)
    constants |= _fold_constants(module)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or mutates(node))
    module.recompile()
    return module, frozenset(constants)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _unwrap_output(graph: fx.Graph, exported: torch.export.ExportedProgram) -> None:
    """Return what the model returned: a bare tensor, or a tuple; dictionaries and nests become a flat tuple."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    values = tuple(output.args[0])
    mutated = sum(spec.kind.name != "USER_OUTPUT" for spec in exported.graph_signature.output_specs)
    values = values[mutated:]
    spec = exported.call_spec.out_spec
    output.args = (values[0] if spec is not None and spec.is_leaf() else values,)


def _fold_constants(module: fx.GraphModule) -> set[str]:
    """Evaluate what depends on no input and no parameter (position grids, masks); returns the new attributes' names."""
    constant: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and not node.meta["val"].is_floating_point():
            constant[node] = get_tensor(module, str(node.target))  # index tables: never trained, never masked
        foldable = node.op == "call_function" and all(operand in constant for operand in node.all_input_nodes)
        if foldable and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            args = fx.node.map_arg(node.args, constant.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, constant.__getitem__)
            constant[node] = node.target(*args, **kwargs)
    if any(mutates(node) and node.args[0] in constant for node in module.graph.nodes):
        return set()  # written into during the forward: must be born anew each time
    names: set[str] = set()
    for node, value in constant.items():
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        if any(user not in constant for user in node.users):
            name = f"constant_{len(names)}"
            set_tensor(module, name, value, persistent=False)
            with module.graph.inserting_before(node):
                attribute = module.graph.create_node("get_attr", name)
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            names.add(name)
    return names


def _export_failure(model: nn.Module, error: Exception) -> str:
    frames = [line.strip() for line in str(error).splitlines() if line.strip().startswith("File ")]
    place = f" at {frames[-1]}" if frames else ""
    return (
        f"{type(model).__name__} cannot be exported{place}: {_first_line(error)}. "
        f"Rewrite that line without data-dependent control flow, or prune the part of the model that exports: "
        f"torch.export.export(part, inputs) must succeed."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

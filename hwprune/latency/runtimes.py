"""The deployed form of a network for a target, and the same form with a clock at chosen nodes."""

import copy
import itertools
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from hwprune.errors import BackendUnavailable, UnsupportedModel
from hwprune.graph import trace
from hwprune.graph.labels import bound_arguments
from hwprune.latency.target import RUNTIMES, Target
from hwprune.latency.timing import undisturbed

_ATEN = torch.ops.aten
_CONVS = {_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default}
_TRANSPOSED = {_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input}
_LINEAR = {_ATEN.linear.default}

Runnable = Callable[..., Any]


def available_runtimes() -> dict[str, str]:
    """Every runtime, with the reason why it cannot be used here, or "" where it can."""
    found = {}
    for runtime in RUNTIMES:
        device = "cuda" if runtime == "cudagraph" else "cpu"
        try:
            Target(device=device, runtime=runtime).require()
            found[runtime] = ""
        except BackendUnavailable as error:
            found[runtime] = str(error)
    if not found["compile"] and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        found["compile"] = "runtime compile needs a C++ compiler: install g++ or clang++."
    return found


def build(target: Target, module: nn.Module) -> Runnable:
    """A callable with the inputs of `module` that runs it as `target` would deploy it.

    The module is copied: inference semantics, batch norms folded, weights in the target's dtype, layout and device;
    inputs are converted on the way in. A module that is not a graph of ATen calls is traced at the first call, so
    that a cut module and a resized program are timed alike; one that cannot be traced runs as it is.
    """
    target.require()
    if not isinstance(module, fx.GraphModule):
        return _Traced(target, module)
    graph_module = deploy(target, module)
    if target.runtime == "onnxruntime":
        return _OnnxRuntime(graph_module, target)
    if target.runtime == "compile":
        return _Converted(target, _Compiled(graph_module))
    run = _Converted(target, as_function(graph_module))
    return _CudaGraph(target, run) if target.runtime == "cudagraph" else run


def deploy(target: Target, module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph of ATen calls in inference mode on the target, batch norms folded where asked for."""
    graph_module = copy.deepcopy(module).eval().requires_grad_(False)
    if target.fold_batch_norm:
        fold_batch_norms(graph_module)
    graph_module.to(device=target.device)
    if target.torch_dtype is not torch.float32:
        graph_module.to(dtype=target.torch_dtype)
    graph_module.to(memory_format=target.torch_memory_format)  # type: ignore[call-overload]
    return graph_module


def fold_batch_norms(module: fx.GraphModule) -> fx.GraphModule:
    """Merge each inference-mode batch norm into the convolution or linear layer that alone feeds it, in place.

    W' = W · γ / √(σ² + ε), b' = (b - μ) · γ / √(σ² + ε) + β. Every other node keeps its name.
    """
    for node in list(module.graph.nodes):
        statistics = _batch_norm_of(module, node)
        if statistics is None:
            continue
        producer = node.args[0]
        if not _can_absorb(producer):
            continue
        scale, shift = statistics
        weight_node, bias_node = producer.args[1], _argument(producer, 2, "bias")
        weight = _tensor(module, weight_node)
        dim = 1 if producer.target in _TRANSPOSED else 0
        shape = [1] * weight.ndim
        shape[dim] = -1
        groups = len(scale) // weight.shape[1] if dim == 1 else 1
        if groups > 1:  # a transposed weight is [in, out / groups, ...]: every group of inputs has scales of its own
            per_input = scale.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
            folded = weight * per_input.view(*per_input.shape, *[1] * (weight.ndim - 2))
        else:
            folded = weight * scale.view(shape)
        bias = shift if bias_node is None else shift + _tensor(module, bias_node) * scale
        with module.graph.inserting_before(producer):
            new_weight = _attribute(module, f"{producer.name}_folded_weight", folded)
            new_bias = _attribute(module, f"{producer.name}_folded_bias", bias)
        producer.args = (producer.args[0], new_weight, new_bias, *producer.args[3:])
        producer.kwargs = {key: value for key, value in producer.kwargs.items() if key != "bias"}
        node.replace_all_uses_with(producer)
        module.graph.erase_node(node)
    for node in reversed(list(module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _batch_norm_of(module: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) [C] of a batch norm in inference mode, else None."""
    if node.op == "call_module":
        norm = module.get_submodule(str(node.target))
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
            return None
        assert norm.running_mean is not None
        gamma: Tensor | None = norm.weight
        beta: Tensor | None = norm.bias
        mean, var, eps = norm.running_mean, norm.running_var, norm.eps
    elif node.target is _ATEN.batch_norm.default:
        given = bound_arguments(node)
        if given["training"] or given["running_mean"] is None:
            return None
        gamma, beta = (None if given[key] is None else _tensor(module, given[key]) for key in ("weight", "bias"))
        mean, var = _tensor(module, given["running_mean"]), _tensor(module, given["running_var"])
        eps = float(given["eps"])
    else:
        return None
    with torch.no_grad():
        scale = (var.double() + eps).rsqrt()
        if gamma is not None:
            scale = scale * gamma.double()
        shift = -mean.double() * scale
        if beta is not None:
            shift = shift + beta.double()
    return scale.to(mean.dtype), shift.to(mean.dtype)


def _can_absorb(producer: Any) -> bool:
    if not isinstance(producer, fx.Node) or producer.op != "call_function" or len(producer.users) != 1:
        return False
    if producer.target in _LINEAR:  # over [N, L, C] a batch norm normalises dim 1, which is not the linear's output
        shape: Any = producer.meta.get("dense_shape") or getattr(producer.meta.get("val"), "shape", ())
        if len(shape) != 2:
            return False
    elif producer.target not in _CONVS | _TRANSPOSED:
        return False
    bias = _argument(producer, 2, "bias")
    return all(part.op == "get_attr" for part in (producer.args[1], bias) if isinstance(part, fx.Node))


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _tensor(module: fx.GraphModule, node: Any) -> Tensor:
    parent, _, leaf = str(node.target).rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(parent), leaf)
    return tensor.detach()


def _attribute(module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    module.register_buffer(name, tensor.contiguous())
    return module.graph.get_attr(name)


# -- plain functions


def as_function(module: fx.GraphModule) -> Runnable:
    """The graph as one Python function over plain attributes.

    `nn.Module` attribute look-ups cost a small network several percent of its time, so each weight is fetched from a
    plain namespace, next to its first use.
    """
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    if output is not None:
        graph.output(output)
    return _compile_python(graph, module)


def clocked(module: fx.GraphModule, at: Sequence[str], tick: Callable[[], Any]) -> Runnable:
    """Like :func:`as_function`, with `tick()` called before each node named in `at` and once before returning.

    Returns (output, ticks); names are in order of execution.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copied)
    by_name = {old.name: new for old, new in copied.items()}
    ticks = []
    for name in at:
        with graph.inserting_before(by_name[name]):
            ticks.append(graph.call_function(tick))
    ticks.append(graph.call_function(tick))
    graph.output((output, tuple(ticks)))
    return _compile_python(graph, module)


def _compile_python(graph: fx.Graph, module: fx.GraphModule) -> Runnable:
    state = SimpleNamespace()
    for index, node in enumerate(list(graph.nodes)):
        if node.op not in ("get_attr", "call_module"):
            continue
        value: Any = _tensor(module, node) if node.op == "get_attr" else module.get_submodule(str(node.target))
        if isinstance(value, nn.modules.batchnorm._BatchNorm):
            value = _inference_norm(value)  # without its module's bookkeeping
        flat = f"{node.op}_{index}"
        setattr(state, flat, value)
        if node.op == "get_attr" and node.users:
            order = {user: place for place, user in enumerate(graph.nodes)}
            with graph.inserting_before(min(node.users, key=order.__getitem__)):
                sunk = graph.create_node("get_attr", flat)
            node.replace_all_uses_with(sunk)
            graph.erase_node(node)
        else:
            node.target = flat
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<deployed graph>", "exec"), namespace)
    forward = namespace["forward"]
    return lambda *inputs: forward(state, *inputs)


def _inference_norm(norm: nn.modules.batchnorm._BatchNorm) -> Runnable:
    mean, var, weight, bias, eps = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    enabled = torch.backends.cudnn.enabled
    return lambda x: torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, enabled)


# -- runtimes


class _Converted:
    """Converts inputs to the target's device, dtype and layout where they are not there yet, then runs."""

    def __init__(self, target: Target, run: Runnable) -> None:
        self.target = target
        self.run = run
        self.plain = target == target.with_(device="cpu", dtype="float32", memory_format="contiguous")

    def __call__(self, *inputs: Tensor) -> Any:
        with torch.inference_mode():
            return self.run(*inputs) if self.plain else self.run(*convert(self.target, inputs))


def convert(target: Target, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Inputs on the target's device; floating ones in its dtype, 4-d ones in its layout."""
    moved = []
    for value in inputs:
        dtype = target.torch_dtype if value.is_floating_point() else value.dtype
        layout = target.torch_memory_format if value.ndim == 4 else torch.contiguous_format
        moved.append(value.to(target.device, dtype).contiguous(memory_format=layout))
    return tuple(moved)


class _Traced:
    """A user's module, traced on the inputs of its first call."""

    def __init__(self, target: Target, module: nn.Module) -> None:
        self.target = target
        self.module = module
        self.run: Runnable | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.run is None:
            self.run = self.trace(inputs)
        return self.run(*inputs)

    def trace(self, inputs: tuple[Tensor, ...]) -> Runnable:
        with torch.inference_mode(False):
            examples = tuple(value.detach().clone() for value in inputs)
            try:
                return build(self.target, trace(self.module, examples).module)
            except UnsupportedModel:
                if self.target.runtime == "onnxruntime":
                    raise
                module = copy.deepcopy(self.module).eval().requires_grad_(False)
                module.to(device=self.target.device, dtype=self.target.torch_dtype)
                return _Converted(self.target, _Compiled(module) if self.target.runtime == "compile" else module)


class _Compiled:
    """A module under `torch.compile`, for the shapes of its inputs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.run: Runnable | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.run is not None:
            return self.run(*inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler deprecates its own internals
            self.run = torch.compile(self.module, dynamic=False)
            return self.run(*inputs)


class _CudaGraph:
    """One captured graph, replayed: what the host adds per launch is gone. Inputs are copied into its own buffers."""

    def __init__(self, target: Target, run: Runnable) -> None:
        self.target = target
        self.run = run
        self.graph: torch.cuda.CUDAGraph | None = None
        self.buffers: tuple[Tensor, ...] = ()
        self.output: Any = None

    def capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.buffers = tuple(value.clone() for value in convert(self.target, inputs))
        side = torch.cuda.Stream(self.target.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.target.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run(*self.buffers)
        torch.cuda.current_stream(self.target.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.run(*self.buffers)

    def __call__(self, *inputs: Tensor) -> Any:
        with torch.inference_mode(), torch.cuda.device(self.target.device):
            if self.graph is None:
                self.capture(inputs)
            assert self.graph is not None
            for buffer, value in zip(self.buffers, inputs, strict=True):
                buffer.copy_(value, non_blocking=True)
            self.graph.replay()
        return self.output


class _OnnxRuntime:
    """An onnxruntime session on the CPU, exported at the first call (the export needs inputs)."""

    def __init__(self, module: fx.GraphModule, target: Target) -> None:
        self.module = module
        self.target = target
        self.session: Any = None

    def open(self, inputs: tuple[Tensor, ...]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.target.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            with torch.inference_mode(False), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the exporter deprecates its own internals
                examples = tuple(value.detach().clone() for value in inputs)
                torch.onnx.export(self.module, examples, str(path), dynamo=True, external_data=False, verbose=False)
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: Tensor) -> Any:
        if self.session is None:
            self.open(convert(self.target, inputs))
        names = [entry.name for entry in self.session.get_inputs()]
        feed = {name: value.detach().numpy() for name, value in zip(names, inputs, strict=True)}
        outputs = [torch.from_numpy(value) for value in self.session.run(None, feed)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


# -- clocks inside a forward


class Clocked:
    """A deployed network that tells how long each of its segments took, within one ordinary forward.

    starts: per segment, the node names it consists of; a segment whose nodes were all folded away takes no time.
    """

    def __init__(self, target: Target, module: fx.GraphModule, segments: Sequence[Sequence[str]]) -> None:
        self.target = target
        deployed = deploy(target, module)
        present = {node.name for node in deployed.graph.nodes}
        firsts = [next((name for name in nodes if name in present), None) for nodes in segments]
        self.timed = np.array([first is not None for first in firsts])  # bool [segments]
        names = [first for first in firsts if first is not None]
        tick: Callable[[], Any] = _record_event if target.is_cuda else time.perf_counter_ns
        self.forward = clocked(deployed, names, tick)
        self.plain = _Converted(target, as_function(deployed))

    def __call__(self, *inputs: Tensor) -> Any:
        """The same forward without clocks."""
        return self.plain(*inputs)

    def times_us(self, inputs: Sequence[Tensor], count: int, *, warmup: int = 0) -> NDArray[np.float64]:
        """Microseconds of every segment in consecutive forwards, disturbed ones left out. [count or fewer, segments]"""
        inputs = convert(self.target, inputs)
        for _ in range(warmup):
            self.plain(*inputs)
        times = np.zeros((count, len(self.timed)))
        runs, cpu = [], np.empty(count)
        with torch.inference_mode():
            for i in range(count):
                busy = time.process_time_ns()
                runs.append(self.forward(*inputs)[1])
                cpu[i] = time.process_time_ns() - busy
        if self.target.is_cuda:
            torch.cuda.synchronize(self.target.device)
            for row, events in zip(times, runs, strict=True):
                row[self.timed] = [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]
            return times
        times[:, self.timed] = np.diff(np.array(runs, dtype=np.int64), axis=1) / 1e3
        return times[undisturbed(1e3 * times.sum(1), cpu)]


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def isolated(target: Target, module: fx.GraphModule, nodes: Sequence[str], inputs: Sequence[Tensor]) -> "Isolated":
    """One segment of a network cut out and fed with the values it sees inside it."""
    deployed = deploy(target, module)
    present = {node.name for node in deployed.graph.nodes}
    return Isolated(target, deployed, [name for name in nodes if name in present], inputs)


class Isolated:
    """A segment on its own. `cold` copies of its weights and inputs are rotated, so that none is still in cache."""

    def __init__(
        self, target: Target, deployed: fx.GraphModule, nodes: Sequence[str], inputs: Sequence[Tensor], cold: int = 8
    ) -> None:
        values = _Recorder(deployed)
        with torch.inference_mode():
            values.run(*convert(target, inputs))
        chosen = set(nodes)
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        feeds: list[Any] = []

        def operand(node: fx.Node) -> fx.Node:
            if node not in copied:
                if node.op == "get_attr":
                    copied[node] = graph.create_node("get_attr", str(node.target), name=node.name)
                else:
                    copied[node] = graph.placeholder(node.name)
                    feeds.append(values.seen[node])
            return copied[node]

        members = [node for node in deployed.graph.nodes if node.name in chosen]
        for node in members:  # placeholders must come first in the generated function
            for other in node.all_input_nodes:
                if other not in members:
                    operand(other)
        for node in members:
            copied[node] = graph.node_copy(node, operand)
        used = [copied[node] for node in members if any(user not in members for user in node.users)]
        graph.output(tuple(used))
        self.copies = []
        for _ in range(cold):
            run = _compile_python(copy.deepcopy(graph), copy.deepcopy(deployed))
            self.copies.append((run, [v.clone() if isinstance(v, Tensor) else v for v in feeds]))

    def times_us(self, count: int) -> NDArray[np.float64]:
        """Microseconds of `count` runs on the CPU, each with the copy that was used longest ago. [count]"""
        times = np.empty(count)
        clock = time.perf_counter_ns
        with torch.inference_mode():
            for i in range(count):
                run, feeds = self.copies[i % len(self.copies)]
                begin = clock()
                run(*feeds)
                times[i] = clock() - begin
        return times / 1e3


class _Recorder(fx.Interpreter):
    """Runs a graph and remembers every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]

"""The masked convolution and one step of a search, against what one would write without them.

    python benchmarks/bench_ops.py [--threads 1 2] [--rounds 9] [--only conv columns norm search curve ...] [--resume]
    python benchmarks/bench_ops.py --table hwprune/ops/measured.json

Every operator is checked against its rival on the tensors that are then timed. The two run in turns, one call each, so
that a slow spell of the machine meets both, and take turns in going first; medians are compared. `spread` is the
distance between the 20 % and the 80 % quantile of our time, over its median. Rows go to
`results/<environment>/ops.json`; `ratio` is the rival's time over ours. On a CUDA device what is timed are captured
graphs of calls, as measuring.py says, and `captured` tells it of ours and of the rival; there each of our backends is
timed by name, beside what is chosen by itself, and all rivals of a call together. Rivals:

    dense-then-mask  out_mask * conv2d(in_mask * x), or the gradients of that
    gather-scatter   conv2d of the active channels of x and weight, by index_select, put into zeros by index_copy
    torch            conv2d with scale and shift folded into its weight and bias, then the activation
    cudnn graph      convolution, scale, shift and ReLU as one graph of cuDNN's, the fastest of its first plans, through
                     the package nvidia-cudnn-frontend; the context says where that is missing
    dense            conv2d with all columns
    batch_norm       F.batch_norm, mask, activation; forward and backward
    training step    forward, backward and SGD of the network without masks. A search step that computes all channels
                     once in `skip` steps is timed as the mean over as many steps, and so is its rival.
    masked step      forward and backward of the masked network that computes all channels
    compiled         torch.compile with convolution templates: of convolution, scale, shift and ReLU, and of the step of
                     the network without any mask; on a CUDA device only
    compiled masked step  torch.compile of the masked step

`roofline` is the share of what the device could do: the larger of the time that the bytes take at its copy bandwidth
and that which the products take at its rate for large matrices, both measured in the same run, over our time. Counted
are the active channels of input and weight, the whole output, and the products between active channels.

--table writes the fastest backend of every kind of call from such rows, for `backend="auto"`, and measures nothing.
--compile fills Triton's cache with what the sections will need, on many cores, which takes most of a first run else.
--dry-run goes through all that a CUDA device would be given, in small on the CPU, and stores nothing.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from measuring import RESULTS, Results, in_turns, means, place_of, sets_for, step_us
from torch import Tensor

from hwprune import ops
from hwprune.budget import BudgetController
from hwprune.graph import Follower, trace
from hwprune.latency import Target, fingerprint, flops_model
from hwprune.latency.timing import settings
from hwprune.models import load_model
from hwprune.nn import mask_
from hwprune.search import Search

SKIP = 8  # one search step in so many computes all channels
PLANS = 4  # of a cuDNN graph that are tried
SHIPPED_TABLE = Path(__file__).resolve().parent.parent / "hwprune" / "ops" / "measured.json"
Row = dict[str, Any]


class Shape(NamedTuple):
    cin: int
    cout: int
    kernel: int
    stride: int
    pixels: int
    groups: int = 1

    @property
    def out_pixels(self) -> int:
        return (self.pixels + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def kind(self) -> str:
        """As the table of backends calls it."""
        if self.groups > 1:
            return "depthwise" if self.groups == self.cin else "grouped"
        return f"{self.kernel}x{self.kernel}"


# The distinct 3x3 and 1x1 convolutions of each network, without those of its first input.
WIDTHS = ((64, 56), (128, 28), (256, 14), (512, 7))
NETWORKS = {
    "resnet50": [
        *(Shape(width, width, 3, 1, pixels) for width, pixels in WIDTHS),
        *(Shape(width, width, 3, 2, 2 * pixels) for width, pixels in WIDTHS[1:]),
        *(Shape(4 * width, width, 1, 1, pixels) for width, pixels in WIDTHS),
        *(Shape(width, 4 * width, 1, 1, pixels) for width, pixels in WIDTHS),
        *(Shape(2 * width, 4 * width, 1, 2, 2 * pixels) for width, pixels in WIDTHS[1:]),
        *(Shape(2 * width, width, 1, 1, 2 * pixels) for width, pixels in WIDTHS[1:]),
        Shape(64, 64, 1, 1, 56),
    ],
    "vgg16": [
        Shape(64, 64, 3, 1, 32),
        Shape(64, 128, 3, 1, 16),
        Shape(128, 128, 3, 1, 16),
        Shape(128, 256, 3, 1, 8),
        Shape(256, 256, 3, 1, 8),
        Shape(256, 512, 3, 1, 4),
        Shape(512, 512, 3, 1, 4),
        Shape(512, 512, 3, 1, 2),
    ],
    "resnet56": [
        Shape(16, 16, 3, 1, 32),
        Shape(16, 32, 3, 2, 32),
        Shape(32, 32, 3, 1, 16),
        Shape(32, 64, 3, 2, 16),
        Shape(64, 64, 3, 1, 8),
    ],
    "mobilenet_v2": [
        Shape(width, width, 3, stride, pixels, width)
        for width, stride, pixels in ((96, 2, 112), (144, 1, 56), (192, 1, 28), (384, 1, 14), (960, 1, 7))
    ],
    "resnext50": [Shape(2 * width, 2 * width, 3, 1, pixels, 32) for width, pixels in WIDTHS],
}
CPU_BATCHES = {"resnet50": (4,), "vgg16": (16,)}
GPU_BATCHES = {"resnet50": (32, 256), "vgg16": (256,), "resnet56": (256,), "mobilenet_v2": (32,), "resnext50": (32,)}


@dataclass(frozen=True)
class Case:
    """A convolution with its tensors."""

    shape: Shape
    batch: int
    form: torch.memory_format
    dtype: torch.dtype
    device: str

    @property
    def name(self) -> str:
        cin, cout, kernel, stride, pixels, groups = self.shape
        layout = "nhwc" if self.form == torch.channels_last else "nchw"
        grouped = f", {groups} groups" if groups > 1 else ""
        return f"{self.batch}x{cin}x{pixels}x{pixels} -> {cout}, {kernel}x{kernel} stride {stride}{grouped}, {layout}"

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.shape.stride, "padding": self.shape.kernel // 2, "groups": self.shape.groups}

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device, dtype=self.dtype)

    @cached_property
    def sets(self) -> list[tuple[Tensor, Tensor]]:
        """x and weight, as often as they are rotated."""
        cin, cout, kernel, _, pixels, groups = self.shape
        size = self.batch * (cin * pixels**2 + cout * self.shape.out_pixels**2) + cout * cin // groups * kernel**2
        sets = []
        for _ in range(sets_for(size * self.dtype.itemsize, self.device)):
            x = self.random(self.batch, cin, pixels, pixels).contiguous(memory_format=self.form)
            weight = self.random(cout, cin // groups, kernel, kernel) / (cin // groups * kernel * kernel) ** 0.5
            if self.device == "cuda":  # else every call would copy it
                weight = weight.contiguous(memory_format=torch.channels_last)
            sets.append((x, weight))
        return sets

    def counts(self, ins: float, outs: float, columns: float = 1.0) -> dict[str, float]:
        """Bytes and operations with these shares of channels and columns."""
        cin, cout, kernel, _, pixels, groups = self.shape
        y = self.batch * cout * self.shape.out_pixels**2
        per_output = cin // groups * kernel**2 * ins * columns
        floats = self.batch * cin * pixels**2 * ins + cout * outs * per_output + y
        return {"bytes": floats * self.dtype.itemsize, "operations": 2 * y * outs * per_output}


class Sides(NamedTuple):
    """What is compared. All are called with the tensors of a set, and held to what the first rival returns."""

    sets: Sequence[tuple[Tensor, ...]]
    ours: Callable[[str], Callable[..., Tensor]]  # by backend
    rivals: dict[str, Callable[..., Tensor]]
    counts: dict[str, float]
    unlike: tuple[str, ...] = ()  # rivals that compute something else on purpose


@dataclass
class Bench:
    """A run: what is asked for, what is there already, and what went wrong."""

    device: str
    backends: list[str]
    rounds: int
    results: Results
    dry: bool = False
    networks: Sequence[str] | None = None
    kernels: Sequence[int] | None = None
    batches: Sequence[int] | None = None
    keeps: Sequence[float] | None = None
    threads: int = 1
    rates: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    share: tuple[int, int] | None = None  # number and count of processes that compile what is compared, and no more
    met: int = 0  # comparisons so far

    @property
    def gpu(self) -> bool:
        """Whether the comparisons are a device's, which a dry run goes through as well."""
        return self.device == "cuda" or self.dry

    def cases(self) -> Iterator[Case]:
        """Every convolution that was asked for; in a dry run one of every kind."""
        forms = [torch.channels_last] if self.gpu else [torch.contiguous_format, torch.channels_last]
        dtype = torch.bfloat16 if self.gpu else torch.float32
        seen = set()
        for network, batches in (GPU_BATCHES if self.gpu else CPU_BATCHES).items():
            if self.networks and network not in self.networks:
                continue
            for shape in NETWORKS[network]:
                if self.kernels and shape.kernel not in self.kernels:
                    continue
                for batch in batches:
                    if self.batches and batch not in self.batches:
                        continue
                    if self.dry:
                        shape, batch = shrunk(shape), 2
                        if (shape.kind, shape.stride) in seen:
                            continue
                        seen.add((shape.kind, shape.stride))
                    yield from (Case(shape, batch, form, dtype, self.device) for form in forms)

    def compile(self, function: Any, **options: Any) -> Any:
        if self.dry:
            return torch.compile(function, backend="eager")
        return torch.compile(function, **options)

    def row(self, op: str, backend: str, rival: str, shape: str, dtype: torch.dtype, keep: float) -> Row:
        """What a row is known by."""
        names = {"op": op, "backend": backend, "rival": rival, "shape": shape}
        return names | {"dtype": str(dtype).removeprefix("torch."), "keep": keep, "threads": self.threads}

    def compare(
        self,
        op: str,
        shape: str,
        dtype: torch.dtype,
        keep: float,
        rivals: Sequence[str],
        make: Callable[[], Sides],
        *,
        facts: dict[str, str] | None = None,
        tolerance: float = 0.0,
        rounds: int = 0,
    ) -> Iterator[Row]:
        """Check, then time in turns, whatever is not there yet.

        make: builds the tensors. facts: go into the rows. tolerance: of relative errors, and that it is a comparison
        with gradients; 0 is that of a convolution.
        """
        pairs = [(backend, rival) for rival in rivals for backend in self.backends]
        pairs = [pair for pair in pairs if not self.results.has(self.row(op, *pair, shape, dtype, keep))]
        if not pairs:
            return
        if self.share is not None:
            self.met += 1
            if self.met % self.share[1] == self.share[0]:
                sides = make()
                with torch.set_grad_enabled(tolerance > 0), suppress(Exception):  # it is met again when it is timed
                    sides.ours("triton" if self.device == "cuda" else "reference")(*sides.sets[0])
            return
        sides = make()
        calls = {name: sides.rivals[name] for name in rivals if any(name == rival for _, rival in pairs)}
        calls = {rivals[0]: sides.rivals[rivals[0]]} | calls
        calls |= {name: sides.ours(name) for name in self.backends if any(name == backend for backend, _ in pairs)}
        with torch.set_grad_enabled(tolerance > 0):
            allowed = tolerance or (1e-3 if dtype == torch.float32 else 1e-2)
            for name in self.wrong(calls, sides, allowed, f"{op}, {shape}, keep {keep}"):
                del calls[name]
            pairs = [(backend, rival) for backend, rival in pairs if backend in calls and rival in calls]
            together = [pairs] if self.gpu else [[pair] for pair in pairs]
            for group in together:
                names = list(dict.fromkeys(name for pair in group for name in pair))
                bound = [partial(call_with, calls[name], sides.sets) for name in names]
                times, captured = in_turns(bound, len(sides.sets), self.device, rounds or self.rounds)
                for pair in group:
                    ours, rival = (names.index(name) for name in pair)
                    row = self.row(op, *pair, shape, dtype, keep) | timed(times[:, ours], times[:, rival])
                    if sides.counts:
                        row["roofline"] = share_of_roofline(sides.counts, self.rates, row["median_us"])
                    if self.gpu:
                        row |= {"captured": [captured[ours], captured[rival]]} | (facts or {})
                    yield row
        if self.device == "cuda":
            torch.cuda.empty_cache()  # graphs do not share their memory

    def wrong(self, calls: dict[str, Callable[..., Tensor]], sides: Sides, allowed: float, where: str) -> list[str]:
        """The names of what cannot run or is wrong. A rival that cannot is left out, and said; else it is a failure."""
        found = []
        expected: Tensor | None = None
        for name, call in calls.items():
            try:
                actual = call(*sides.sets[0]).detach().float()
                if expected is None:
                    expected = actual
                error = float((actual - expected).norm() / expected.norm().clamp_min(1e-20))
                assert error < allowed or name in sides.unlike, f"relative error {error:.2e}"
            except Exception as error:
                cause = f"{where}, {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                print(cause, flush=True)
                if name in self.backends or isinstance(error, AssertionError):
                    self.failures.append(cause)
                found.append(name)
        return found


def call_with(call: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]], number: int) -> Any:
    return call(*sets[number])


def shrunk(shape: Shape) -> Shape:
    """As small as a shape of its kind can be."""
    groups = {1: 1, shape.cin: 8}.get(shape.groups, 2)
    return Shape(8, 8, shape.kernel, shape.stride, 6, groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on the CPU")
    parser.add_argument("--rounds", type=int, default=9, help="calls of each side per row")
    parser.add_argument("--backends", nargs="+", help="default: auto, and on a CUDA device each that is there")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS))
    parser.add_argument("--kernels", type=int, nargs="+", help="sizes of kernels")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--keeps", type=float, nargs="+", help="of the curve")
    parser.add_argument("--resume", action="store_true", help="measure only what is not there at this commit")
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results/<environment>")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing, and write the fastest backends")
    parser.add_argument("--compile", type=int, metavar="WORKERS", help="time nothing, compile Triton's kernels")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.dry_run else "cpu"
    out = args.out or RESULTS / place_of(device)
    if args.table:
        write_table(args.table, [out / "ops.json", out / "ratio_update.json"])
        return
    if args.compile:
        with ProcessPoolExecutor(args.compile, get_context("spawn")) as pool:
            list(pool.map(partial(compile_share, args, device, out), range(args.compile)))
        return
    targets = [Target(device=device)] if device == "cuda" else [Target(threads=count) for count in args.threads]
    bench = bench_of(args, device, out, targets[0])
    for target in targets[:1] if args.dry_run else targets:
        with settings(target):
            bench.threads = target.threads
            bench.rates = device_rates(bench)
            bench.results.context.setdefault("rates", {})[str(target.threads)] = bench.rates
            for section in args.only:
                for row in SECTIONS[section](bench):
                    bench.results.add(row)
    print(*means(bench.results.rows.values()), sep="\n")
    if bench.failures:
        sys.exit("\n".join(["These were not timed:", *bench.failures]))


def bench_of(args: argparse.Namespace, device: str, out: Path, target: Target) -> Bench:
    torch.manual_seed(0)
    context: dict[str, Any] = {**fingerprint(target), "rounds": args.rounds}
    backends = ["auto", "reference"] if args.dry_run else ["auto"]
    if device == "cuda":
        backends += [name for name in ("triton", "cuda") if ops.backends()[name] is None]
        torch.backends.cudnn.benchmark = True  # the rivals' best
        context |= {"cudnn_benchmark": True, "cudnn_graph": "timed" if find_spec("cudnn") else "no module named cudnn"}
    results = Results(None if args.dry_run else out / "ops.json", context, resume=args.resume)
    return Bench(
        device, args.backends or backends, 1 if args.dry_run else args.rounds, results, args.dry_run,
        args.networks, args.kernels, args.batches, args.keeps,
    )  # fmt: skip


def compile_share(args: argparse.Namespace, device: str, out: Path, rank: int) -> None:
    """Calls what Triton has to compile for one comparison in so many; what is tuned beside others is forgotten."""
    os.environ.pop("HWPRUNE_AUTOTUNE_CACHE", None)
    bench = bench_of(args, device, out, Target(device=device))
    bench.share = rank, args.compile
    for section in args.only:
        for _ in SECTIONS[section](bench):
            pass


def device_rates(bench: Bench) -> dict[str, float]:
    """Copy bandwidth in GB/s and the rate of large matrix products in Gop/s, in the type that is timed."""
    dtype, scale = (torch.bfloat16, 8) if bench.device == "cuda" else (torch.float32, 1)
    source = torch.randn(scale * 2**24, device=bench.device)  # 64 MiB on the CPU
    target = torch.empty_like(source)
    a, b = (torch.randn(scale * 1024, scale * 1024, device=bench.device, dtype=dtype) for _ in range(2))
    times, _ = in_turns([lambda _: target.copy_(source), lambda _: torch.mm(a, b)], 1, bench.device, 10)
    copy_us, product_us = times.min(axis=0)
    return {
        "copy_gb_per_s": round(2 * source.numel() * 4 / copy_us / 1e3, 1),
        "product_gop_per_s": round(2 * len(a) ** 3 / product_us / 1e3, 1),
    }


def share_of_roofline(counts: dict[str, float], rates: dict[str, float], median_us: float) -> float:
    copy_us = counts["bytes"] / rates["copy_gb_per_s"] / 1e3
    product_us = counts["operations"] / rates["product_gop_per_s"] / 1e3
    return round(max(copy_us, product_us) / median_us, 3)


def timed(ours: np.ndarray, rival: np.ndarray) -> Row:
    """What two sides' microseconds by round make of a row."""
    low, high = np.quantile(ours, [0.2, 0.8])
    return figures(float(np.median(ours)), float(np.median(rival)), float((high - low) / np.median(ours)))


def figures(median_us: float, rival_us: float, spread: float) -> Row:
    return {
        "median_us": round(median_us, 1),
        "rival_median_us": round(rival_us, 1),
        "ratio": round(rival_us / median_us, 3),
        "spread": round(spread, 3),
    }


def convolutions(bench: Bench) -> Iterator[Row]:
    """Half of the channels masked on both sides; masks of ones; no masks but an epilogue."""
    for case in bench.cases():
        for keep in (0.5, 1.0):
            rivals = ["dense-then-mask", *(["gather-scatter"] if keep < 1 and case.shape.groups == 1 else [])]
            facts = {"kind": case.shape.kind, "masks": "masked"}
            make = partial(masked_sides, bench, case, keep)
            yield from bench.compare("masked_conv2d", case.name, case.dtype, keep, rivals, make, facts=facts)
        fused = bench.device == "cuda" and case.shape.groups == 1 and find_spec("cudnn") is not None
        rivals = ["torch", *(["cudnn graph"] if fused else [])]
        facts = {"kind": case.shape.kind, "masks": "dense"}
        make = partial(epilogue_sides, case)
        yield from bench.compare("masked_conv2d", case.name, case.dtype, 1.0, rivals, make, facts=facts)


def masked_sides(bench: Bench, case: Case, keep: float) -> Sides:
    in_mask, out_mask = (hard_mask(channels, keep, case.device) for channels in case.shape[:2])
    i, o = (mask.to(case.dtype).view(1, -1, 1, 1) for mask in (in_mask, out_mask))
    ins, outs = (mask.nonzero()[:, 0] for mask in (in_mask, out_mask))

    def ours(backend: str) -> Callable[..., Tensor]:
        return partial(ops.masked_conv2d, in_mask=in_mask, out_mask=out_mask, backend=backend, **case.geometry)

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x * i, weight, **case.geometry) * o

    def gathered(x: Tensor, weight: Tensor) -> Tensor:
        small = weight.index_select(0, outs).index_select(1, ins)
        y = F.conv2d(x.index_select(1, ins).contiguous(memory_format=case.form), small, **case.geometry)
        full = torch.zeros(len(y), len(weight), *y.shape[2:], dtype=y.dtype, device=y.device)
        return full.contiguous(memory_format=case.form).index_copy_(1, outs, y)

    def gathered_nhwc(x: Tensor, weight: Tensor) -> Tensor:
        """Picks along the last dim of what is NHWC in memory, so that nothing is copied but what is picked."""
        x, weight = (tensor.permute(0, 2, 3, 1).index_select(3, ins) for tensor in (x, weight))
        y = F.conv2d(x.permute(0, 3, 1, 2), weight.index_select(0, outs).permute(0, 3, 1, 2), **case.geometry)
        full = torch.zeros(len(y), *y.shape[2:], case.shape.cout, dtype=y.dtype, device=y.device)
        return full.index_copy_(3, outs, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    rivals = {"dense-then-mask": dense, "gather-scatter": gathered_nhwc if bench.gpu else gathered}
    return Sides(case.sets, ours, rivals, case.counts(keep, keep))


def epilogue_sides(case: Case) -> Sides:
    """Nothing masked, but scale, shift and ReLU."""
    cout = case.shape.cout
    scale, shift = torch.rand(cout, device=case.device) + 0.5, torch.randn(cout, device=case.device)

    def ours(backend: str) -> Callable[..., Tensor]:
        return partial(ops.masked_conv2d, scale=scale, shift=shift, act="relu", backend=backend, **case.geometry)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        weight = weight * scale.view(-1, 1, 1, 1).to(x.dtype)
        return F.conv2d(x, weight, shift.to(x.dtype), **case.geometry).relu()

    rivals = {"torch": plain, "cudnn graph": CudnnGraph(case, scale, shift)}
    return Sides(case.sets, ours, rivals, case.counts(1.0, 1.0))


class CudnnGraph:
    """act(scale ⊙ conv(x) + shift) as one graph of cuDNN's, through the package nvidia-cudnn-frontend."""

    def __init__(self, case: Case, scale: Tensor, shift: Tensor) -> None:
        self.case, self.vectors = case, (scale, shift)
        self.plan: int | None = None

    def build(self, x: Tensor, weight: Tensor) -> None:
        """Describes the graph and chooses the fastest of its first plans. Raises where there is none."""
        self.cudnn = import_module("cudnn")
        self.handle = self.cudnn.create_handle()
        number, single = self.cudnn.data_type.BFLOAT16, self.cudnn.data_type.FLOAT
        graph = self.graph = self.cudnn.pygraph(
            handle=self.handle, io_data_type=number, intermediate_data_type=single, compute_data_type=single
        )

        def tensor(shape: Sequence[int], kind: Any) -> Any:
            """Dense NHWC, which the strides of a 1x1 kernel do not show."""
            _, channels, height, width = shape
            stride = [channels * height * width, 1, width * channels, channels]
            return graph.tensor(dim=list(shape), stride=stride, data_type=kind)

        inputs = [tensor(x.shape, number), tensor(weight.shape, number)]
        scale, shift = (tensor((1, self.case.shape.cout, 1, 1), single) for _ in self.vectors)
        stride, padding = self.case.geometry["stride"], self.case.geometry["padding"]
        y = graph.conv_fprop(
            image=inputs[0], weight=inputs[1], padding=[padding] * 2, stride=[stride] * 2, dilation=[1, 1]
        )
        y = graph.relu(input=graph.bias(input=graph.scale(input=y, scale=scale), bias=shift))
        y.set_output(True).set_data_type(number)
        self.tensors = (*inputs, scale, shift, y)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        graph.check_support()
        times: dict[int, float] = {}
        for plan in range(min(PLANS, graph.get_execution_plan_count())):
            with suppress(RuntimeError, self.cudnn.cudnnGraphNotSupportedError):  # not every plan is for this device
                graph.build_plan_at_index(plan)
                self.plan, self.workspace = plan, self.room_for(plan)
                times[plan] = min(step_us(partial(self, x, weight), "cuda") for _ in range(5))
        if not times:
            raise RuntimeError("no plan of this graph runs here")
        self.plan = min(times, key=times.__getitem__)
        self.workspace = self.room_for(self.plan)

    def room_for(self, plan: int) -> Tensor:
        return torch.empty(self.graph.get_workspace_size_plan_at_index(plan), dtype=torch.uint8, device="cuda")

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.plan is None:
            self.build(x, weight)
        shape = self.case.shape
        y = torch.empty(
            (len(x), shape.cout, shape.out_pixels, shape.out_pixels),
            dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
        )  # fmt: skip
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        named = dict(zip(self.tensors, (x, weight, *self.vectors, y), strict=True))
        self.graph.execute_plan_at_index(named, self.workspace, self.plan, self.handle)
        return y


def pruned_columns(bench: Bench) -> Iterator[Row]:
    """3x3 convolutions without 50, 75 and 90 % of their columns, chosen at random or in blocks of 16 channels."""
    for case in bench.cases():
        if case.shape.kernel == 1 or case.shape.groups > 1:
            continue
        for keep in (0.5, 0.25, 0.1):
            for name in ("random", "blocks"):
                facts = {"kind": "columns", "masks": "dense"}
                make = partial(column_sides, case, keep, name == "blocks")
                op = f"columns ({name})"
                yield from bench.compare(op, case.name, case.dtype, keep, ["dense"], make, facts=facts)


def column_sides(case: Case, keep: float, in_blocks: bool) -> Sides:
    cin, _, kernel, stride, *_ = case.shape
    count = cin * kernel * kernel
    if in_blocks:
        blocks = torch.randperm(count // 16)[: max(1, round(keep * count / 16))].sort().values
        columns = (16 * blocks[:, None] + torch.arange(16)).flatten().to(case.device)
    else:
        columns = torch.randperm(count)[: round(keep * count)].sort().values.to(case.device)
    kept = torch.zeros(count, dtype=torch.bool, device=case.device).index_fill(0, columns, True)
    pattern = kept.view(kernel, kernel, cin).permute(2, 0, 1)
    sets = [(x, weight, weight * pattern) for x, weight in case.sets]

    def ours(backend: str) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
            y = ops.masked_conv2d(x, weight, columns=columns, stride=stride, padding=kernel // 2, backend=backend)
            assert isinstance(y, Tensor)
            return y

        return run

    def dense(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, stride=stride, padding=kernel // 2)

    return Sides(sets, ours, {"dense": dense}, case.counts(1.0, 1.0, keep))


def gradients(bench: Bench) -> Iterator[Row]:
    """The gradients by input and weight, with half of the channels masked on both sides and with nothing masked."""
    if not bench.gpu:
        return
    for case in bench.cases():
        for keep in (0.5, 1.0):
            for op, wants in (("masked_conv2d_input_backward", 0), ("masked_conv2d_weight_backward", 1)):
                rival = "dense-then-mask" if keep < 1 else "torch"
                facts = {"kind": case.shape.kind, "masks": "masked" if keep < 1 else "dense"}
                make = partial(gradient_sides, case, keep, wants, rival)
                yield from bench.compare(op, case.name, case.dtype, keep, [rival], make, facts=facts)


def gradient_sides(case: Case, keep: float, wants: int, rival: str) -> Sides:
    """wants: 0 the gradient of x, 1 that of the weight."""
    shape, geometry = case.shape, case.geometry
    how = [geometry["stride"]] * 2, [geometry["padding"]] * 2, [1, 1]
    masks = [None if keep == 1 else hard_mask(channels, keep, case.device) for channels in shape[:2]]
    i, o = (
        torch.ones((), device=case.device, dtype=case.dtype) if mask is None else mask.to(case.dtype).view(1, -1, 1, 1)
        for mask in masks
    )
    sets = []
    for x, weight in case.sets:
        upstream = case.random(case.batch, shape.cout, shape.out_pixels, shape.out_pixels)
        sets.append((x, weight, upstream.contiguous(memory_format=case.form)))

    def ours(backend: str) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, upstream: Tensor) -> Tensor:
            operators = torch.ops.hwprune
            rest = *masks, None, *how, shape.groups, False, backend
            if wants == 0:
                return operators.masked_conv2d_input_backward(upstream, x, weight, *rest)[0]
            return operators.masked_conv2d_weight_backward(upstream, x, list(weight.shape), *rest)

        return run

    def plain(x: Tensor, weight: Tensor, upstream: Tensor) -> Tensor:
        if keep < 1:
            upstream = upstream * o
            x = x if wants == 0 else x * i
        wanted = [wants == 0, wants == 1, False]
        found = torch.ops.aten.convolution_backward(
            upstream, x, weight, None, *how, False, [0, 0], shape.groups, wanted
        )
        return found[wants] * i if keep < 1 and wants == 0 else found[wants]

    return Sides(sets, ours, {rival: plain}, case.counts(keep, keep))


def norms(bench: Bench) -> Iterator[Row]:
    """BatchNorm in training, mask and ReLU: forward and backward; statistics are among what is timed on both sides."""
    for case in bench.cases():
        if case.shape.kernel == 3 or case.shape.stride > 1:
            continue
        # Of a sum over pixels, one that rounds to the other side of the ReLU's kink is a part in some hundreds.
        tolerance = 5e-2 if bench.gpu else 2e-2
        facts = {"kind": "any", "masks": "masked"}
        yield from bench.compare(
            "masked_bn_act", case.name, case.dtype, 0.5, ["batch_norm"], partial(norm_sides, case),
            facts=facts, tolerance=tolerance,
        )  # fmt: skip


def norm_sides(case: Case) -> Sides:
    cout, pixels = case.shape.cout, case.shape.pixels
    identity = torch.eye(cout, device=case.device, dtype=case.dtype).view(cout, cout, 1, 1)
    mask, weight = hard_mask(cout, 0.5, case.device), torch.rand(cout, device=case.device) + 0.5
    bias = torch.randn(cout, device=case.device).requires_grad_()
    weight.requires_grad_()
    sets = []
    for _ in range(sets_for(4 * case.batch * cout * pixels**2 * case.dtype.itemsize, case.device)):
        x, upstream = (
            case.random(case.batch, cout, pixels, pixels).contiguous(memory_format=case.form) for _ in range(2)
        )
        raw, sums, squares = ops.masked_conv2d(x, identity, stats=True)
        sets.append((raw.requires_grad_(), sums, squares, upstream))

    def ours(backend: str) -> Callable[..., Tensor]:
        def run(x: Tensor, sums: Tensor, squares: Tensor, upstream: Tensor) -> Tensor:
            y, _, _ = ops.masked_bn_act(x, sums, squares, weight, bias, mask=mask, act="relu", backend=backend)
            return torch.autograd.grad(y, (weight, bias, x), upstream)[0]

        return run

    def rival(x: Tensor, _: Tensor, __: Tensor, upstream: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, weight.to(x.dtype), bias.to(x.dtype), training=True)
        y = (y * mask.to(x.dtype).view(1, -1, 1, 1)).relu()
        return torch.autograd.grad(y, (weight, bias, x), upstream)[0]

    return Sides(sets, ours, {"batch_norm": rival}, {})


def search_steps(bench: Bench) -> Iterator[Row]:
    """One step of the default method on resnet56, batch 128, 32 px, at fixed keep ratios; by the clock everywhere."""
    device = bench.device
    name, batch = ("resnet8", 4) if bench.dry else ("resnet56", 128)
    shape = f"{name} batch {batch} 32 px"
    keeps = (1.0, 0.5)
    rows = {keep: bench.row("search step", "auto", "training step", shape, torch.float32, keep) for keep in keeps}
    if all(map(bench.results.has, rows.values())):
        return
    x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), device=device)

    def network() -> tuple[Any, Callable[[], None]]:
        model = load_model(name).to(device, memory_format=torch.channels_last)
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def finish() -> None:
            optimiser.step()
            optimiser.zero_grad()

        return model, finish

    plain, finish_plain = network()
    plain.train()

    def training() -> None:
        F.cross_entropy(plain(x), y).backward()
        finish_plain()

    runs: dict[float, Callable[[], None]] = {}
    for keep in keeps:
        model, finish = network()
        program = trace(model.eval(), (x[:2],))
        cost = flops_model(program)
        theta = 9.0 if keep == 1.0 else float(np.log(keep / (1 - keep)))
        options = {"theta": theta, "warmup": 0.0, "lr": 1e-9, "skip": SKIP}
        controller = BudgetController(0.5 * cost.dense, cost.dense, ramp_steps=1)
        session = Search("dsa", model.train(), program.groups, cost, controller, 1 << 20, options, program=program)
        counter = iter(range(1 << 20))

        def searching(model=model, finish=finish, session=session, counter=counter) -> None:
            step = next(counter)
            session.before_step(step)
            F.cross_entropy(model(x), y).backward()
            session.after_backward(step)
            finish()
            session.after_step(step)

        runs[keep] = searching
    times: dict[float | None, list[float]] = {None: [], **{keep: [] for keep in runs}}
    for run in (training, *runs.values()):
        run()
    for _ in range(SKIP):
        for key, run in ((None, training), *runs.items()):
            times[key].append(step_us(run, device))  # a search counts its steps, and none of a second is left alone
    rival_us = float(np.mean(times[None]))  # as ours, or a slow spell would count on one side only
    low, high = np.quantile(times[None], [0.2, 0.8])
    for keep, row in rows.items():
        captured = {"captured": [False, False]} if bench.gpu else {}
        yield row | figures(float(np.mean(times[keep])), rival_us, float(high - low) / rival_us) | captured


def training_curve(bench: Bench) -> Iterator[Row]:
    """Forward and backward of resnet56, 32 px, with fewer and fewer channels, which are skipped or multiplied by 0."""
    device = bench.device
    name, batch = ("resnet8", 4) if bench.dry else ("resnet56", 256 if bench.gpu else 32)
    dtype = torch.bfloat16 if bench.gpu else torch.float32
    keeps = bench.keeps or ((1.0, 0.5) if bench.dry else (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1))
    x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), device=device)
    networks = [load_model(name).to(device, memory_format=torch.channels_last) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    program = trace(networks[0].eval(), (x[:2],))
    handles = [mask_(network.train(), program.groups, Follower(network, program)) for network in networks]

    def step(network: Callable[[Tensor], Tensor], backend: str = "auto") -> Callable[[], Tensor]:
        def run() -> Tensor:
            with forced(backend), torch.autocast(device, dtype, enabled=bench.gpu):
                loss = F.cross_entropy(network(x), y)
                loss.backward()
            return loss.detach()

        return run

    rivals = {"masked step": step(networks[1])}
    if bench.gpu:
        plain = load_model(name).to(device, memory_format=torch.channels_last)
        rivals["compiled masked step"] = step(bench.compile(networks[1]))
        rivals["compiled"] = step(bench.compile(plain.train()))

    def sides(keep: float) -> Sides:
        mask = torch.cat([hard_mask(group.width, keep, device) for group in program.groups])
        handles[0].set(mask, skip=True)
        handles[1].set(mask)
        return Sides([()], partial(step, networks[0]), rivals, {}, unlike=("compiled",))

    for keep in keeps:
        yield from bench.compare(
            "training step", f"{name} batch {batch} 32 px", dtype, keep, list(rivals), partial(sides, keep),
            tolerance=5e-2, rounds=max(3, bench.rounds // 2),
        )  # fmt: skip


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """A network's operators run in this backend, whatever they choose."""
    before = os.environ.get("HWPRUNE_BACKEND", "auto")
    os.environ["HWPRUNE_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ["HWPRUNE_BACKEND"] = before


def compiled_convolutions(bench: Bench) -> Iterator[Row]:
    """3x3 convolutions with an epilogue and nothing masked, against torch.compile's templates."""
    for case in bench.cases():
        if bench.gpu and case.shape.kind == "3x3":
            facts = {"kind": "3x3", "masks": "dense"}
            make = partial(compiled_sides, bench, case)
            yield from bench.compare("masked_conv2d", case.name, case.dtype, 1.0, ["compiled"], make, facts=facts)


def compiled_sides(bench: Bench, case: Case) -> Sides:
    cout = case.shape.cout
    scale, shift = torch.rand(cout, device=case.device) + 0.5, torch.randn(cout, device=case.device)

    def ours(backend: str) -> Callable[..., Tensor]:
        return partial(ops.masked_conv2d, scale=scale, shift=shift, act="relu", backend=backend, **case.geometry)

    def expression(x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(x, weight, **case.geometry)
        return (y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).relu().to(x.dtype)

    torch.compiler.reset()  # else sizes that change become symbols, and the code is not made for this shape
    rival = bench.compile(expression, mode="max-autotune-no-cudagraphs", dynamic=False)
    return Sides(case.sets, ours, {"compiled": rival}, case.counts(1.0, 1.0))


def hard_mask(channels: int, keep: float, device: str) -> Tensor:
    mask = torch.zeros(channels, device=device)
    mask[torch.randperm(channels)[: round(keep * channels)]] = 1
    return mask


def write_table(path: Path, sources: Sequence[Path]) -> None:
    """Write for every kind of call on these results' device what was fastest on all of its shapes together.

    Candidates are the backends timed by name, and where nothing was masked torch's own convolution, which stands for
    the reference in the gradients. What the file, or else the shipped one, says of other chips stays.
    """
    medians: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}  # by entry, candidate, and what was called
    for stored in (json.loads(source.read_text()) for source in sources if source.exists()):
        chip = "sm_" + stored["context"].get("capability", "").replace(".", "")
        for row in stored["rows"]:
            op = "masked_conv2d" if row["op"].startswith("columns") else row["op"].removesuffix("_seed")
            if chip == "sm_" or row["backend"] == "auto" or ("kind" not in row and not op.startswith("ratio")):
                continue
            entry = op, chip, row["dtype"], row.get("kind", "any"), row.get("masks", "dense")
            call = f"{row['op']}, {row['shape']}, {row['keep']}"
            candidates = medians.setdefault(entry, {})
            candidates.setdefault(row["backend"], {})[call] = row["median_us"]
            if row["rival"] == "torch":
                plain = "torch" if op == "masked_conv2d" else "reference"
                candidates.setdefault(plain, {})[call] = row["rival_median_us"]
    if not medians:
        sys.exit(f"there are no rows of a CUDA device's backends in {' or '.join(map(str, sources))}")
    chips = {entry[1] for entry in medians}
    table = json.loads((path if path.exists() else SHIPPED_TABLE).read_text())
    rows = [row for row in table["rows"] if row["chip"] not in chips]
    for entry, candidates in medians.items():
        calls = set.intersection(*(set(times) for times in candidates.values()))
        if calls:
            fastest = {name: sum(math.log(times[call]) for call in calls) for name, times in candidates.items()}
            names = dict(zip(("op", "chip", "dtype", "kind", "masks"), entry, strict=True))
            rows.append({**names, "backend": min(fastest, key=fastest.__getitem__)})
    lines = ",\n  ".join(map(json.dumps, rows))
    path.write_text(f'{{"rows": [\n  {lines}\n]}}\n')


SECTIONS = {
    "conv": convolutions,
    "columns": pruned_columns,
    "norm": norms,
    "search": search_steps,
    "curve": training_curve,
    "compiled": compiled_convolutions,
    "gradients": gradients,
}

if __name__ == "__main__":
    main()

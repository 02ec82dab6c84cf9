"""The masked convolution and one step of a search, against what one would write without them.

    python benchmarks/bench_ops.py [--threads 1 2] [--rounds 9] [--only conv columns norm search curve compiled]

Every operator is checked against its rival on the tensors that are then timed. The two run in turns, one call each, so
that a slow spell of the machine meets both, and take turns in going first; medians are compared. `spread` is the
distance between the 20 % and the 80 % quantile of our time, over its median. Rows go to
`results/<environment>/ops.json`; `ratio` is the rival's time over ours. Rivals:

    dense-then-mask  out_mask * conv2d(in_mask * x)
    gather-scatter   conv2d of the active channels of x and weight, by index_select, put into zeros by index_copy
    torch            conv2d with scale and shift folded into its weight and bias, then the activation
    dense            conv2d with all columns
    batch_norm       F.batch_norm, mask, activation; forward and backward
    training step    forward, backward and SGD of the network without masks. A search step that computes all channels
                     once in `skip` steps is timed as the mean over as many steps.
    masked step      forward and backward of the masked network that computes all channels
    compiled         torch.compile with convolution templates: of convolution, scale, shift and ReLU, and of the step of
                     the network without any mask; on a CUDA device only

`roofline` is the share of what the device could do: the larger of the time that the bytes take at its copy bandwidth
and that which the products take at its rate for large matrices, both measured in the same run, over our time. Counted
are the active channels of input and weight, the whole output, and the products between active channels.
"""

import argparse
import json
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_ratio_update import RESULTS, place_of
from numpy.typing import NDArray
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

# Cin, Cout, kernel, stride, pixels: the distinct 3x3 and 1x1 convolutions of each network.
RESNET50 = [
    *((width, width, 3, 1, pixels) for width, pixels in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *((width, width, 3, 2, pixels) for width, pixels in ((128, 56), (256, 28), (512, 14))),
    *((4 * width, width, 1, 1, pixels) for width, pixels in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *((width, 4 * width, 1, 1, pixels) for width, pixels in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *((2 * width, 4 * width, 1, 2, pixels) for width, pixels in ((128, 56), (256, 28), (512, 14))),
]
VGG16 = [
    (64, 64, 3, 1, 32),
    (64, 128, 3, 1, 16),
    (128, 128, 3, 1, 16),
    (128, 256, 3, 1, 8),
    (256, 256, 3, 1, 8),
    (256, 512, 3, 1, 4),
    (512, 512, 3, 1, 4),
    (512, 512, 3, 1, 2),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="on the CPU")
    parser.add_argument("--rounds", type=int, default=9, help="calls of each side per row")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    targets = [Target(device=device)] if device == "cuda" else [Target(threads=count) for count in args.threads]
    rows: list[dict[str, Any]] = []
    rates: dict[str, dict[str, float]] = {}  # by the number of threads
    for target in targets:
        with settings(target):
            rates[str(target.threads)] = device_rates(device)
            for section in args.only:
                for row in SECTIONS[section](device, args):
                    if "bytes" in row:
                        row["roofline"] = share_of_roofline(row, rates[str(target.threads)])
                    rows.append({**row, "threads": target.threads})
                    print(json.dumps(rows[-1]), flush=True)
                store(rows, targets, rates, args, device)
    kinds = [(row["op"], row["rival"], row["keep"], row["threads"]) for row in rows]
    for key in dict.fromkeys(kinds):
        ratios = [row["ratio"] for row, kind in zip(rows, kinds, strict=True) if kind == key]
        print(f"{key}: geometric mean {np.exp(np.mean(np.log(ratios))):.2f}, least {min(ratios):.2f}")


def store(
    rows: list[dict[str, Any]],
    targets: list[Target],
    rates: dict[str, dict[str, float]],
    args: argparse.Namespace,
    device: str,
) -> None:
    """Write what there is so far, beside what other runs of this commit have measured of other operators."""
    context = {
        **fingerprint(targets[0]),
        "threads": [target.threads for target in targets],
        "rates": rates,
        "rounds": args.rounds,
        "python": platform.python_version(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    path = RESULTS / place_of(device) / "ops.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(path.read_text()) if path.exists() else {"context": {"commit": None}, "rows": []}
    if stored["context"]["commit"] == context["commit"]:
        measured = {(row["op"], row["rival"], row["threads"]) for row in rows}
        others = [row for row in stored["rows"] if (row["op"], row["rival"], row["threads"]) not in measured]
        rows = others + rows
        context["rates"] = stored["context"]["rates"] | rates
        context["threads"] = sorted({row["threads"] for row in rows})
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"context": {json.dumps(context)},\n "rows": [\n  {lines}\n]}}\n')


def device_rates(device: str) -> dict[str, float]:
    """Copy bandwidth in GB/s and the rate of large matrix products in Gop/s, in the type that is timed."""
    dtype, scale = (torch.bfloat16, 8) if device == "cuda" else (torch.float32, 1)
    source = torch.zeros(scale * 2**24, device=device)  # 64 MiB on the CPU
    target = torch.empty_like(source)
    a, b = (torch.randn(scale * 1024, scale * 1024, device=device, dtype=dtype) for _ in range(2))
    copy_us = min(step_us(lambda: target.copy_(source), device) for _ in range(10))
    product_us = min(step_us(lambda: torch.mm(a, b), device) for _ in range(10))
    return {
        "copy_gb_per_s": round(2 * source.numel() * 4 / copy_us / 1e3, 1),
        "product_gop_per_s": round(2 * len(a) ** 3 / product_us / 1e3, 1),
    }


def share_of_roofline(row: dict[str, Any], rates: dict[str, float]) -> float:
    """Takes the counts out of the row."""
    copy_us = row.pop("bytes") / rates["copy_gb_per_s"] / 1e3
    product_us = row.pop("operations") / rates["product_gop_per_s"] / 1e3
    return round(max(copy_us, product_us) / row["median_us"], 3)


def convolutions(device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Half of the channels masked on both sides; masks of ones; no masks but an epilogue."""
    for shape, batch, form, dtype in cases(device):
        cin, cout, kernel, stride, _ = shape
        x, weight = tensors(shape, batch, form, dtype, device)
        geometry = {"stride": stride, "padding": kernel // 2}
        for keep in (0.5, 1.0):
            in_mask, out_mask = hard_mask(cin, keep, device), hard_mask(cout, keep, device)
            i, o = in_mask.to(dtype).view(1, -1, 1, 1), out_mask.to(dtype).view(1, -1, 1, 1)

            def ours(x=x, weight=weight, in_mask=in_mask, out_mask=out_mask, geometry=geometry) -> Tensor:
                return ops.masked_conv2d(
                    x, weight, in_mask=in_mask, out_mask=out_mask, backend=args.backend, **geometry
                )

            def rival(x=x, weight=weight, i=i, o=o, geometry=geometry) -> Tensor:
                return F.conv2d(x * i, weight, **geometry) * o

            yield timed("masked_conv2d", "dense-then-mask", ours, rival, shape, batch, form, dtype, keep, args)
            if keep == 1.0:
                continue
            ins, outs = in_mask.nonzero()[:, 0], out_mask.nonzero()[:, 0]

            def gathered(x=x, weight=weight, ins=ins, outs=outs, geometry=geometry, form=form) -> Tensor:
                small = weight.index_select(0, outs).index_select(1, ins)
                y = F.conv2d(x.index_select(1, ins).contiguous(memory_format=form), small, **geometry)
                full = torch.zeros(len(y), len(weight), *y.shape[2:], dtype=y.dtype, device=y.device)
                return full.contiguous(memory_format=form).index_copy_(1, outs, y)

            yield timed("masked_conv2d", "gather-scatter", ours, gathered, shape, batch, form, dtype, keep, args)
        scale, shift = torch.rand(cout, device=device) + 0.5, torch.randn(cout, device=device)

        def fused(x=x, weight=weight, scale=scale, shift=shift, geometry=geometry) -> Tensor:
            return ops.masked_conv2d(x, weight, scale=scale, shift=shift, act="relu", backend=args.backend, **geometry)

        def plain(x=x, weight=weight, scale=scale, shift=shift, geometry=geometry) -> Tensor:
            return F.conv2d(x, weight * scale.view(-1, 1, 1, 1).to(x.dtype), shift.to(x.dtype), **geometry).relu()

        yield timed("masked_conv2d", "torch", fused, plain, shape, batch, form, dtype, 1.0, args)


def pruned_columns(device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """3x3 convolutions without 50, 75 and 90 % of their columns, chosen at random or in blocks of 16 channels."""
    for shape, batch, form, dtype in cases(device):
        cin, _, kernel, stride, _ = shape
        if kernel == 1:
            continue
        x, weight = tensors(shape, batch, form, dtype, device)
        count = cin * kernel * kernel
        for keep in (0.5, 0.25, 0.1):
            columns = torch.randperm(count)[: round(keep * count)].sort().values.to(device)
            blocks = torch.randperm(count // 16)[: max(1, round(keep * count / 16))].sort().values
            aligned = (16 * blocks[:, None] + torch.arange(16)).flatten().to(device)
            for name, listed in (("random", columns), ("blocks", aligned)):
                kept = torch.zeros(count, dtype=torch.bool, device=device).index_fill(0, listed, True)
                small = weight * kept.view(kernel, kernel, cin).permute(2, 0, 1)

                def ours(x=x, weight=weight, listed=listed, stride=stride, kernel=kernel) -> Tensor:
                    return ops.masked_conv2d(
                        x, weight, columns=listed, stride=stride, padding=kernel // 2, backend=args.backend
                    )

                def rival(x=x, small=small, stride=stride, kernel=kernel) -> Tensor:
                    return F.conv2d(x, small, stride=stride, padding=kernel // 2)

                yield timed(f"columns ({name})", "dense", ours, rival, shape, batch, form, dtype, keep, args)


def norms(device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """BatchNorm in training, mask and ReLU: forward and backward; statistics are among what is timed on both sides."""
    for shape, batch, form, dtype in cases(device):
        _, cout, kernel, stride, pixels = shape
        if kernel == 3 or stride > 1:
            continue
        x = torch.randn(batch, cout, pixels, pixels, device=device, dtype=dtype).contiguous(memory_format=form)
        identity = torch.eye(cout, device=device, dtype=dtype).view(cout, cout, 1, 1)
        mask, weight = hard_mask(cout, 0.5, device), torch.rand(cout, device=device) + 0.5
        bias, upstream = torch.randn(cout, device=device), torch.randn_like(x)
        leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        raw, sums, squares = ops.masked_conv2d(x.detach(), identity, stats=True, backend=args.backend)

        def ours(raw=raw, sums=sums, squares=squares, mask=mask, upstream=upstream, leaves=leaves) -> Tensor:
            x = raw.requires_grad_()
            y, _, _ = ops.masked_bn_act(
                x, sums, squares, leaves[1], leaves[2], mask=mask, act="relu", backend=args.backend
            )
            return torch.autograd.grad(y, (leaves[1], leaves[2], x), upstream)[0]

        def rival(mask=mask, upstream=upstream, leaves=leaves) -> Tensor:
            x, weight, bias = leaves
            y = F.batch_norm(x, None, None, weight.to(x.dtype), bias.to(x.dtype), training=True)
            y = (y * mask.to(x.dtype).view(1, -1, 1, 1)).relu()
            return torch.autograd.grad(y, (weight, bias, x), upstream)[0]

        yield timed("masked_bn_act", "batch_norm", ours, rival, shape, batch, form, dtype, 0.5, args)


def search_steps(device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One step of the default method on resnet56, batch 128, 32 px, at fixed keep ratios."""
    batch = 128
    x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), device=device)

    def network() -> tuple[Any, Callable[[], None]]:
        model = load_model("resnet56").to(device, memory_format=torch.channels_last)
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
    for keep in (1.0, 0.5):
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
            times[key].append(step_us(run, device))
    rival_us = float(np.median(times[None]))
    low, high = np.quantile(times[None], [0.2, 0.8])
    names = "search step", "training step", f"resnet56 batch {batch} 32 px"
    for keep in runs:
        mean_us = float(np.mean(times[keep]))
        yield row_of(*names, torch.float32, keep, mean_us, rival_us, float(high - low) / rival_us, args)


def training_curve(device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Forward and backward of resnet56, 32 px, with fewer and fewer channels, which are skipped or multiplied by 0."""
    batch = 256 if device == "cuda" else 32
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), device=device)
    networks = [load_model("resnet56").to(device, memory_format=torch.channels_last) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    program = trace(networks[0].eval(), (x[:2],))
    handles = [mask_(network.train(), program.groups, Follower(network, program)) for network in networks]

    def step(network: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast(device, dtype, enabled=device == "cuda"):
                loss = F.cross_entropy(network(x), y)
            loss.backward()
            return loss.detach()

        return run

    rivals = {"masked step": step(networks[1])}
    if device == "cuda":
        plain = load_model("resnet56").to(device, memory_format=torch.channels_last)
        rivals["compiled"] = step(torch.compile(plain.train()))
    shape = f"resnet56 batch {batch} 32 px"
    for keep in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
        mask = torch.cat([hard_mask(group.width, keep, device) for group in program.groups])
        handles[0].set(mask, skip=True)
        handles[1].set(mask)
        ours = step(networks[0])
        torch.testing.assert_close(ours(), rivals["masked step"](), rtol=5e-2, atol=5e-2)
        for name, rival in rivals.items():
            times = in_turns(ours, rival, device, max(3, args.rounds // 2))
            yield summary("training step", name, shape, dtype, keep, times, args)


def compiled_convolutions(device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """3x3 convolutions of ResNet-50 with an epilogue and nothing masked, against torch.compile's templates."""
    for shape, batch, form, dtype in cases(device):
        _, cout, kernel, stride, _ = shape
        if device != "cuda" or kernel == 1 or shape not in RESNET50 or batch != 32:
            continue
        x, weight = tensors(shape, batch, form, dtype, device)
        scale, shift = torch.rand(cout, device=device) + 0.5, torch.randn(cout, device=device)

        def ours(x=x, weight=weight, scale=scale, shift=shift, stride=stride) -> Tensor:
            return ops.masked_conv2d(
                x, weight, scale=scale, shift=shift, act="relu", stride=stride, padding=1, backend=args.backend
            )

        @partial(torch.compile, mode="max-autotune-no-cudagraphs")
        def expression(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int) -> Tensor:
            y = F.conv2d(x, weight, stride=stride, padding=1)
            return (y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).relu().to(x.dtype)

        rival = partial(expression, x, weight, scale, shift, stride)
        yield timed("masked_conv2d", "compiled", ours, rival, shape, batch, form, dtype, 1.0, args)


def cases(device: str) -> Iterator[tuple[tuple[int, ...], int, torch.memory_format, torch.dtype]]:
    """Shape, batch, layout and dtype of every convolution."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for network, batches in (
        (RESNET50, (32, 256) if device == "cuda" else (4,)),
        (VGG16, (256,) if device == "cuda" else (16,)),
    ):
        for shape in network:
            for batch in batches:
                for form in (
                    (torch.channels_last,) if device == "cuda" else (torch.contiguous_format, torch.channels_last)
                ):
                    yield shape, batch, form, dtype


def tensors(
    shape: tuple[int, ...], batch: int, form: torch.memory_format, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    cin, cout, kernel, _, pixels = shape
    x = torch.randn(batch, cin, pixels, pixels, device=device, dtype=dtype).contiguous(memory_format=form)
    weight = torch.randn(cout, cin, kernel, kernel, device=device, dtype=dtype) / (cin * kernel * kernel) ** 0.5
    return x, weight


def hard_mask(channels: int, keep: float, device: str) -> Tensor:
    mask = torch.zeros(channels, device=device)
    mask[torch.randperm(channels)[: round(keep * channels)]] = 1
    return mask


def timed(
    op: str,
    rival_name: str,
    ours: Callable[[], Tensor],
    rival: Callable[[], Tensor],
    shape: tuple[int, ...],
    batch: int,
    form: torch.memory_format,
    dtype: torch.dtype,
    keep: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Check, then time in turns."""
    with torch.set_grad_enabled(op == "masked_bn_act"):
        found, expected = ours(), rival()
        # Of a sum over pixels, one that rounds to the other side of the ReLU's kink is a part in some hundreds.
        tolerance = 5e-2 if dtype != torch.float32 else 2e-2 if op == "masked_bn_act" else 1e-3
        error = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))
        assert error < tolerance, f"{op} {shape}: relative error {error:.2e}"
        times = in_turns(ours, rival, found.device.type, args.rounds)
    cin, cout, kernel, stride, pixels = shape
    layout = "nhwc" if form == torch.channels_last else "nchw"
    name = f"{batch}x{cin}x{pixels}x{pixels} -> {cout}, {kernel}x{kernel} stride {stride}, {layout}"
    row = summary(op, rival_name, name, dtype, keep, times, args)
    if op != "masked_bn_act":
        ins, outs, columns = (1.0, 1.0, keep) if op.startswith("columns") else (keep, keep, keep)
        products = found.numel() * outs * cin * kernel**2 * columns
        floats = batch * cin * pixels**2 * ins + cout * outs * cin * kernel**2 * columns + found.numel()
        row |= {"bytes": floats * dtype.itemsize, "operations": 2 * products}
    return row


def in_turns(ours: Callable[[], Any], rival: Callable[[], Any], device: str, rounds: int) -> NDArray[np.float64]:
    """Microseconds a call, ours and the rival's. [rounds, 2]"""
    times = np.empty((rounds, 2))
    for first in range(rounds):  # who comes second finds what the first has left in the caches
        for side in (first % 2, 1 - first % 2):
            times[first, side] = clock_us((ours, rival)[side], device)
    return times


def summary(
    op: str,
    rival: str,
    shape: str,
    dtype: torch.dtype,
    keep: float,
    times: NDArray[np.float64],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """A row of what :func:`in_turns` measured."""
    median_us, rival_us = np.median(times, axis=0)
    low, high = np.quantile(times[:, 0], [0.2, 0.8])
    return row_of(op, rival, shape, dtype, keep, median_us, rival_us, (high - low) / median_us, args)


def row_of(
    op: str,
    rival: str,
    shape: str,
    dtype: torch.dtype,
    keep: float,
    median_us: float,
    rival_us: float,
    spread: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    return {
        "op": op,
        "backend": args.backend,
        "rival": rival,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "keep": keep,
        "median_us": round(float(median_us), 1),
        "rival_median_us": round(float(rival_us), 1),
        "ratio": round(float(rival_us / median_us), 3),
        "spread": round(float(spread), 3),
    }


def step_us(run: Callable[[], Any], device: str) -> float:
    """One call, whatever else runs: a search counts its steps, and none of a second is left alone."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter_ns()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - begin) / 1e3


def clock_us(run: Callable[[], Any], device: str) -> float:
    """One call. On the CPU, one during which another process was given the core is repeated, up to 20 times."""
    for _ in range(20):
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        took_us = step_us(run, device)
        if device == "cuda" or resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == switches:
            break
    return took_us


SECTIONS = {
    "conv": convolutions,
    "columns": pruned_columns,
    "norm": norms,
    "search": search_steps,
    "curve": training_curve,
    "compiled": compiled_convolutions,
}

if __name__ == "__main__":
    main()

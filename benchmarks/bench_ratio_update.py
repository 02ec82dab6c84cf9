"""What keep ratios cost per training step: 64 groups, against one root solve per group and against plain torch.

    python benchmarks/bench_ratio_update.py

Writes `results/cpu/ratio_update.json`, or `results/<device>/` where torch sees a CUDA device. `rival` is

* `per-group`: what the authors of DSA publish (github.com/walkerning/differentiable-sparsity-allocation,
  models/op.py): for every group scipy's bracketed root solve over numpy to 0.02 of the log threshold, torch for the
  probabilities and a Bernoulli sample, scipy's softmax for the gradient of a ratio, and one Adam over a parameter per
  group;
* `reference`: all groups at once in plain torch, to the tolerance of the kernels.

Outputs are compared before anything is timed, per-group's after solving as closely as the others. All candidates take
turns; a row has medians over the rounds, and `spread` is the interquartile range of the rounds' ratios over their
median. On a CUDA device the kernels' times are those of replayed CUDA graphs; the rivals wait for results on the way,
and theirs are wall times.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

from hwprune import ops
from hwprune.latency import CostAxis, CostModel, CostTerm, Target, fingerprint

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "64 groups, 64 to 2048 channels": [64, 128, 256, 512, 1024, 2048] * 10 + [64, 128, 256, 512],
    "64 groups of 2048 channels": [2048] * 64,
    "64 groups, 16 to 64 channels": [16, 32, 64, 16] * 16,
}
TEMPERATURE = 5.0
ADAM = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    backends = ["cpp"] if args.device == "cpu" else [b for b in ("cuda", "triton") if ops.backends()[b] is None]
    rows = []
    for threads in args.threads if args.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        for shape, widths in SHAPES.items():
            for backend in backends:
                found = bench(widths, backend, args.device, args.rounds)
                rows += [{"shape": shape, "threads": threads, **row} for row in found]
                for row in rows[-len(found) :]:
                    print(json.dumps(row), flush=True)
    store(rows, args.device)


def bench(widths: list[int], backend: str, device: str, rounds: int) -> list[dict[str, Any]]:
    ours, reference = Problem(widths, backend, device), Problem(widths, "reference", device)
    per_group = PerGroup(reference)
    check(ours, reference, per_group)
    rows = []
    for op in ("ratio_forward", "ratio_forward_seed", "ratio_step", "ratio_step_priced"):
        candidates: dict[str, Callable[[], Any]] = {
            backend: captured(getattr(ours, op), backend),
            "reference": getattr(reference, op),
        }
        if hasattr(per_group, op):
            candidates["per-group"] = getattr(per_group, op)
        times = take_turns(candidates, rounds, device)
        for rival in list(candidates)[1:]:
            rows.append({"op": op, "backend": backend, "rival": rival, "dtype": "float32", "keep": 0.5})
            rows[-1] |= compare(times[backend], times[rival])
    return rows


class Problem:
    """Inputs of one step of the ratios, and the four operators over them in one backend."""

    def __init__(self, widths: list[int], backend: str, device: str) -> None:
        torch.manual_seed(0)
        self.backend = backend
        self.offsets = torch.tensor([0, *widths]).cumsum(0).to(device)
        self.importance = (0.35 * torch.randn(sum(widths))).exp().to(device)
        self.uniforms = torch.rand(sum(widths)).to(device)
        self.theta = torch.randn(len(widths)).to(device)
        self.grad_mask = torch.randn(sum(widths)).to(device)
        self.tables = cost_of(widths).tables(device)
        self.cost_grad = torch.rand(len(widths)).to(device)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.p = self.ratio_forward()[1]

    def ratio_forward(self) -> tuple[Tensor, ...]:
        return ops.ratio_forward(
            self.theta, self.importance, self.offsets, TEMPERATURE, self.uniforms, backend=self.backend
        )

    def ratio_forward_seed(self) -> tuple[Tensor, ...]:
        return ops.ratio_forward(self.theta, self.importance, self.offsets, TEMPERATURE, seed=7, backend=self.backend)

    def ratio_step(self) -> Tensor:
        return ops.ratio_step(
            self.theta, self.grad_mask, self.p, self.offsets, self.cost_grad, 0.5, self.exp_avg, self.exp_avg_sq,
            step=1, backend=self.backend, **ADAM,
        )  # fmt: skip

    def ratio_step_priced(self) -> tuple[Tensor, ...]:
        return ops.ratio_step_priced(
            self.theta, self.grad_mask, self.p, self.offsets, self.tables, 0.5, 0.1, self.exp_avg, self.exp_avg_sq,
            step=1, backend=self.backend, **ADAM,
        )  # fmt: skip


class PerGroup:
    """The authors' way with the same numbers: a loop over groups, through numpy and scipy."""

    def __init__(self, problem: Problem) -> None:
        spans = list(zip(problem.offsets.tolist()[:-1], problem.offsets.tolist()[1:], strict=True))
        self.importance = [problem.importance[start:end] for start, end in spans]
        self.grad_mask = [problem.grad_mask[start:end] for start, end in spans]
        self.theta = [theta.clone().reshape(1).requires_grad_() for theta in problem.theta]
        self.cost_grad = [float(slope) for slope in problem.cost_grad]
        self.optimizer = torch.optim.Adam(self.theta, **ADAM)
        self.log_threshold = [float("nan")] * len(spans)
        self.tolerance = 0.02

    def ratio_forward(self) -> tuple[list[Tensor], list[Tensor]]:
        probabilities, masks = [], []
        for group, (b, theta) in enumerate(zip(self.importance, self.theta, strict=True)):
            log_b = np.log(b.detach().cpu().numpy() + 1e-8)
            alpha = torch.sigmoid(theta).detach().cpu().numpy()

            def excess(log_threshold: float, log_b=log_b, alpha=alpha) -> float:
                z = np.clip((log_threshold - log_b) * TEMPERATURE, -20.0, 20.0)
                return float((np.minimum(1.0 / (1 + np.exp(z)) + 0.01, 1.0).mean() - alpha)[0])

            root = scipy.optimize.root_scalar(excess, bracket=[-500.0, 500.0], xtol=self.tolerance)
            self.log_threshold[group] = root.root
            z = torch.clamp((theta.new([root.root]) - torch.log(b + 1e-8)) * TEMPERATURE, min=-20.0, max=20.0)
            p = torch.clamp(1.0 / (1 + torch.exp(z)) + 0.01, min=0.0, max=1.0).detach()
            probabilities.append(p)
            masks.append(torch.distributions.Bernoulli(p).sample())
        return probabilities, masks

    def gradients(self) -> list[Tensor]:
        gradients = []
        for group, (b, grad) in enumerate(zip(self.importance, self.grad_mask, strict=True)):
            z = TEMPERATURE * (self.log_threshold[group] - np.log(b.detach().cpu().numpy() + 1e-8))
            log_slope = z - 2 * (np.log(1 + np.exp(-np.minimum(np.abs(z), 50.0))) + np.maximum(z, 0))
            weights = grad.new(scipy.special.softmax(np.maximum(log_slope - log_slope.max(), -50.0)))
            gradients.append((grad * weights).sum(dim=0, keepdim=True) * len(b) + 0.5 * self.cost_grad[group])
        return gradients

    def ratio_step(self) -> None:
        for theta, gradient in zip(self.theta, self.gradients(), strict=True):
            ratio = torch.sigmoid(theta.detach())
            theta.grad = gradient * ratio * (1 - ratio)
        self.optimizer.step()


def check(ours: Problem, reference: Problem, per_group: PerGroup) -> None:
    """The same outputs from the same inputs; then per-group goes back to its authors' tolerance."""
    for op in ("ratio_forward", "ratio_forward_seed"):
        for actual, expected in zip(getattr(ours, op)()[:2], getattr(reference, op)()[:2], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    per_group.tolerance = 1e-7
    rival = torch.cat(per_group.ratio_forward()[0])
    torch.testing.assert_close(rival, reference.p, rtol=1e-3, atol=1e-3)
    rival = torch.cat(per_group.gradients())
    torch.testing.assert_close(rival, uncapped_gradients(reference), rtol=1e-2, atol=1e-2)
    ours.p = reference.p  # of a channel at the cap, the last bit of p decides whether it counts
    for op in ("ratio_step", "ratio_step_priced"):
        for problem in (ours, reference):
            problem.theta = reference.theta.clone()
            problem.exp_avg, problem.exp_avg_sq = (torch.zeros_like(problem.theta) for _ in range(2))
        actual, expected = getattr(ours, op)(), getattr(reference, op)()
        if op == "ratio_step":
            actual, expected = (actual,), (expected,)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.theta, reference.theta, rtol=1e-3, atol=1e-3)
    per_group.tolerance = 0.02
    per_group.ratio_forward()


def uncapped_gradients(problem: Problem) -> Tensor:
    """dL/dα as the authors have it: the cap of p at 1 is not differentiated, where the operators do. [G]"""
    log_threshold = problem.ratio_forward()[0].repeat_interleave(problem.offsets.diff())
    soft = (TEMPERATURE * (problem.importance.log() - log_threshold)).sigmoid()
    spread = soft * (1 - soft)

    def sums(values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", offsets=problem.offsets)

    return problem.offsets.diff() * sums(spread * problem.grad_mask) / sums(spread) + 0.5 * problem.cost_grad


def captured(call: Callable[[], Any], backend: str) -> Callable[[], Any]:
    """The call itself, or where it launches kernels the replay of a CUDA graph of it."""
    if backend == "cpp":
        return call
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def take_turns(candidates: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Microseconds a call, by round. Within a round a candidate is called for about a millisecond."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)

    def timed(call: Callable[[], Any], calls: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return 1e6 * (time.perf_counter() - begin) / calls

    calls = {name: max(1, int(2000 / timed(call, 3))) for name, call in candidates.items()}  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(timed(call, calls[name]))
    return times


def compare(ours: list[float], rivals: list[float]) -> dict[str, float]:
    ratios = [theirs / mine for mine, theirs in zip(ours, rivals, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "median_us": round(statistics.median(ours), 2),
        "rival_median_us": round(statistics.median(rivals), 2),
        "ratio": round(statistics.median(rivals) / statistics.median(ours), 2),
        "spread": round((high - low) / middle, 3),
    }


def cost_of(widths: list[int]) -> CostModel:
    """A chain: every group is written by one segment and read by the next, tabulated at 16 widths each."""
    full = np.array(widths)
    axes = tuple(
        CostAxis(np.array([g]), np.array([1]), 0, np.unique(np.linspace(1, c, 16).astype(int)))
        for g, c in enumerate(full)
    )
    terms = []
    for g in range(len(full)):
        pair = (g,) if g == 0 else (g - 1, g)
        terms.append(CostTerm(f"segment {g}", pair, np.multiply.outer(*(axes[a].knots / full[a] for a in pair)))
                     if len(pair) == 2 else CostTerm("segment 0", pair, axes[0].knots / full[0]))  # fmt: skip
    return CostModel("ms", full, axes, tuple(terms))


def place_of(device: str) -> str:
    """The folder of results for an environment: cpu, or the device's own name, such as h200."""
    if not device.startswith("cuda"):
        return "cpu"
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def store(rows: list[dict[str, Any]], device: str) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    context = {
        **fingerprint(Target(device=device)),
        "python": platform.python_version(),
        "scipy": scipy.__version__,
        "commit": commit.stdout.strip(),
        "temperature": TEMPERATURE,
    }
    path = RESULTS / place_of(device) / "ratio_update.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"context": {json.dumps(context)},\n "rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()

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
median. On a CUDA device graphs of calls are timed, as measuring.py says; `captured` tells it of ours and of the rival.
The rivals wait for results on the way and cannot be captured; `called_us` is ours called as they are.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.optimize
import scipy.special
import torch
from measuring import RESULTS, Results, in_turns, place_of, sets_for
from torch import Tensor

from hwprune import ops
from hwprune.latency import CostAxis, CostModel, CostTerm, Target, fingerprint

SHAPES = {
    "64 groups, 64 to 2048 channels": [64, 128, 256, 512, 1024, 2048] * 10 + [64, 128, 256, 512],
    "64 groups of 2048 channels": [2048] * 64,
    "64 groups, 16 to 64 channels": [16, 32, 64, 16] * 16,
}
OPERATORS = ("ratio_forward", "ratio_forward_seed", "ratio_step", "ratio_step_priced")
TEMPERATURE = 5.0
ADAM = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on the CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="measure only what is not there at this commit")
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results/<environment>")
    args = parser.parse_args()
    backends = ["cpp"] if args.device == "cpu" else [b for b in ("cuda", "triton") if ops.backends()[b] is None]
    path = (args.out or RESULTS / place_of(args.device)) / "ratio_update.json"
    context = {**fingerprint(Target(device=args.device)), "scipy": scipy.__version__, "temperature": TEMPERATURE}
    results = Results(path, context, resume=args.resume)
    for threads in args.threads if args.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            bench(shape, threads, backends, args.device, args.rounds, results)


def bench(shape: str, threads: int, backends: Sequence[str], device: str, rounds: int, results: Results) -> None:
    known = {"shape": shape, "threads": threads, "dtype": "float32", "keep": 0.5}
    wanted = {}
    for op in OPERATORS:
        rivals = ["reference", *(["per-group"] if hasattr(PerGroup, op) else [])]
        rows = [known | {"op": op, "backend": backend, "rival": rival} for backend in backends for rival in rivals]
        wanted[op] = [row for row in rows if not results.has(row)]
    if not any(wanted.values()):
        return
    problems = {name: Problem(SHAPES[shape], name, device) for name in (*backends, "reference")}
    per_group = PerGroup(problems["reference"])
    for backend in backends:
        check(problems[backend], problems["reference"], per_group)
    sets = sets_for(problems["reference"].size, device)
    copies = {name: [copy.deepcopy(problem) for _ in range(sets)] for name, problem in problems.items()}
    for op, rows in wanted.items():
        if not rows:
            continue
        candidates: dict[str, Callable[[int], Any]] = {
            name: partial(lambda number, rotated, op: getattr(rotated[number], op)(), rotated=rotated, op=op)
            for name, rotated in copies.items()
        }
        if hasattr(per_group, op):
            candidates["per-group"] = lambda _, op=op: getattr(per_group, op)()
        if device == "cuda":
            candidates |= {f"{backend} called": candidates[backend] for backend in backends}
        times, captured = take_turns(candidates, backends, sets, rounds, device)
        for row in rows:
            names = row["backend"], row["rival"]
            row |= compare(*(times[name] for name in names))
            if device == "cuda":
                row["called_us"] = round(statistics.median(times[f"{row['backend']} called"]), 2)
                row["captured"] = [captured[name] for name in names]
            results.add(row)


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

    @property
    def size(self) -> int:
        """Bytes of what one call reads and writes."""
        return 16 * self.importance.numel()

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


def take_turns(
    candidates: dict[str, Callable[[int], Any]], ours: Sequence[str], sets: int, rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """Microseconds a call, by round, and what was captured; on the CPU each is called for a millisecond a round."""
    if device == "cuda":
        waiting = [place for place, name in enumerate(candidates) if name not in ours]
        found, captured = in_turns(list(candidates.values()), sets, device, rounds, waiting)
        return dict(zip(candidates, found.T.tolist(), strict=True)), dict(zip(candidates, captured, strict=True))

    def timed(call: Callable[[int], Any], calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call(0)
        return 1e6 * (time.perf_counter() - begin) / calls

    calls = {name: max(1, int(2000 / timed(call, 3))) for name, call in candidates.items()}  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(timed(call, calls[name]))
    return times, dict.fromkeys(candidates, False)


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


if __name__ == "__main__":
    main()

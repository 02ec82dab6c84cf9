"""How long allocating widths takes, and how far from optimal the result can be.

    python benchmarks/bench_allocator.py

Each row of `results/allocator_cpu.json` is one network, kind of cost, budget and method. The networks are real; "tiled"
costs are made up for them: multiply-accumulates rounded up to tiles of 8 channels, with 3 % noise, so that they rise in
steps and fall here and there as measured ones do. "flops" is the exact formula. Values come from the L2 norms of the
untrained weights. Every allocation is priced again and compared with the budget before its time counts.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import numpy as np
import scipy
import torch
from bench_latency import load_program
from measuring import commit

from hwprune.allocator import Allocation, _Problem, allocate, values_from_ranking
from hwprune.graph import Program, segments
from hwprune.importance import importance
from hwprune.latency import CostAxis, CostModel, CostTerm, Target, fingerprint, flops_model

RESULTS = Path(__file__).parent / "results" / "allocator_cpu.json"
NETWORKS = [
    ("resnet8", 32),
    ("resnet20", 32),
    ("resnet56", 32),
    ("vgg16_bn", 32),
    ("mobilenet_v2", 32),
    ("torchvision:resnet50", 64),
    ("torchvision:densenet121", 64),
]
BUDGETS = (0.35, 0.5, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds given to each allocation")
    parser.add_argument("--repeats", type=int, default=3, help="of allocations that take less than a second")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, pixels in NETWORKS:
        program = load_program(name, 1, pixels)
        for kind, cost in (("tiled", tiled_model(program)), ("flops", flops_model(program))):
            value = values_from_ranking(program.groups, importance(program.module, program.groups, "l2"), cost)
            problem = _Problem(cost, [cost.levels(g) for g in range(len(cost.full))], value)
            size = {
                "groups": len(cost.full),
                "levels": sum(map(len, problem.candidates)),
                "pairs_of_levels": problem.flows,
                "sums": len(problem.forms),
            }
            for part in BUDGETS:
                for method in ("greedy", "milp"):
                    rows.append({"model": name, "cost": kind, **size, "budget": part, "method": method})
                    rows[-1] |= timed(cost, value, part * cost.dense, method, args)
                    print(json.dumps(rows[-1]), flush=True)
    context = {
        **fingerprint(Target()),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "commit": commit(),
        "time_limit_s": args.time_limit,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    RESULTS.write_text(f'{{"context": {json.dumps(context)},\n "rows": [\n  {lines}\n]}}\n')


def tiled_model(program: Program, tile: int = 8, most_knots: int = 16) -> CostModel:
    """A staircase over the program's segments in place of a measured table."""
    rng = np.random.default_rng(0)
    axes: list[CostAxis] = []
    index = {}
    terms = []
    for segment in segments(program):
        used = []
        for axis in segment.axes:
            if axis.key not in index:
                index[axis.key] = len(axes)
                least = axis.offset + int(np.sum(axis.weights))
                edges = np.linspace(least, axis.size, most_knots) // tile * tile
                knots = np.union1d(edges[edges > least], [least, axis.size]).astype(np.int64)
                axes.append(CostAxis(axis.groups, axis.weights, axis.offset, knots))
            used.append(index[axis.key])
        table = np.array(segment.macs)
        for a, power in zip(used, segment.powers, strict=True):
            steps = np.ceil(axes[a].knots / tile) / np.ceil(axes[a].knots[-1] / tile)
            table = np.multiply.outer(table, steps**power)
        terms.append(CostTerm(segment.name, tuple(used), table * (1 + 0.03 * rng.standard_normal(table.shape))))
    return CostModel("ms", np.asarray(program.groups.widths), tuple(axes), tuple(terms), scale=1e-7)


def timed(cost: CostModel, value: list, budget: float, method: str, args: argparse.Namespace) -> dict:
    """Solver time, and what was found and proven."""
    found: list[Allocation] = []
    while not found or (len(found) < args.repeats and found[0].wall_s < 1):
        found.append(allocate(cost, value, budget, method=method, time_limit_s=args.time_limit))
        assert found[-1].cost == cost.price(found[-1].widths) <= budget, "an allocation is above its budget"
    seconds = [allocation.wall_s for allocation in found]
    return {
        "wall_s": round(statistics.median(seconds), 4),
        "wall_s_min": round(min(seconds), 4),
        "wall_s_max": round(max(seconds), 4),
        "count": len(found),
        "gap": round(found[0].gap, 8),
        "value": round(found[0].value, 6),
        "bound": round(found[0].bound, 6),
        "budget_used": round(found[0].cost / budget, 5),
    }


if __name__ == "__main__":
    main()

"""How long a network takes to be understood, beside Torch-Pruning's dependency graph.

    python benchmarks/bench_graph.py --rounds 15

Each row of `results/graph_cpu.json` is one network on one thread. A round times, in random order: the labelled run and
the gathering of groups on an exported program (`analyse`), the export itself (every third round: it is torch's time),
and Torch-Pruning's `build_dependency` and `get_all_groups` on the same module. `speedup` is the sum of these two
over `analyse`. Before anything is timed, the resized program of a random keep is compared with the masked one.
"""

import argparse
import copy
import random
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_latency import declare_torchvision_operators, store
from torch import nn

from hwprune.graph import Program, resize, trace
from hwprune.graph.groups import find_groups
from hwprune.graph.labels import propagate
from hwprune.graph.trace import get_tensor
from hwprune.models import load_model

NETWORKS = [
    ("torchvision:resnet50", 224),
    ("torchvision:mobilenet_v2", 224),
    ("torchvision:densenet121", 224),
    ("torchvision:convnext_tiny", 224),
    ("resnet56", 32),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    declare_torchvision_operators()
    rows = []
    for name, pixels in NETWORKS:
        torch.manual_seed(0)
        model = load_model(name).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # a scale of 1e-6 would hide a branch from the check
                parameter += 0.02 * torch.randn_like(parameter)
        rows.append({"name": name, "pixels": pixels, **bench(model, torch.randn(1, 3, pixels, pixels), args.rounds)})
        print(rows[-1])
    store("graph_cpu.json", rows)


def bench(model: nn.Module, image: torch.Tensor, rounds: int) -> dict[str, Any]:
    import torch_pruning

    warnings.filterwarnings("ignore", "Unwrapped parameters", UserWarning)
    program = trace(model, (image,))
    deviation = check(program)
    counts = {"hwprune": len(program.groups), "channels": program.groups.total}
    kinds = (torch_pruning.ops.TORCH_CONV, torch_pruning.ops.TORCH_LINEAR)
    peer = torch_pruning.DependencyGraph().build_dependency(model, image)
    counts["torch_pruning"] = len(list(peer.get_all_groups(root_module_types=kinds)))

    def analyse() -> None:
        find_groups(propagate(program.module), program.constants)

    def export() -> None:
        trace(model, (image,))

    def dependency() -> None:
        torch_pruning.DependencyGraph().build_dependency(model, image)

    def all_groups() -> None:
        list(peer.get_all_groups(root_module_types=kinds))

    times: dict[str, list[float]] = defaultdict(list)
    order = random.Random(0)
    for index in range(rounds):
        steps: list[Callable[[], None]] = [analyse, dependency, all_groups]
        steps += [export] if index % 3 == 0 else []
        order.shuffle(steps)
        for step in steps:
            start = time.perf_counter()
            step()
            times[step.__name__].append(time.perf_counter() - start)
        times["torch_pruning"].append(times["dependency"][-1] + times["all_groups"][-1])
    return {
        "rounds": rounds,
        "groups": counts,
        "largest_deviation": deviation,
        "speedup": round(statistics.median(times["torch_pruning"]) / statistics.median(times["analyse"]), 2),
        **{f"{what}_ms": spread(values) for what, values in times.items()},
    }


def spread(seconds: list[float]) -> dict[str, float]:
    values = np.quantile(np.array(seconds) * 1e3, [0.2, 0.5, 0.8])
    return dict(zip(("p20", "median", "p80"), values.round(1).tolist(), strict=True))


def check(program: Program) -> float:
    """Largest difference between masked and resized program for a random keep, relative to the largest output."""
    groups = program.groups
    keep = np.random.default_rng(0).random(groups.total) < 0.6
    keep[groups.offsets[:-1]] = True
    masked = copy.deepcopy(program.module)
    for group, first in zip(groups, groups.offsets, strict=False):
        here = slice(first, first + group.width)
        keep[here] |= group.normalised is not None  # removing these changes a layer norm's statistics
        for slot in group.slots:
            if "running_" not in slot.parameter:
                gone = torch.from_numpy(slot.positions[~keep[here]].reshape(-1))
                get_tensor(masked, slot.parameter).detach().index_fill_(slot.dim, gone, 0)
    with torch.no_grad():
        expected, found = masked(*program.example_inputs), resize(program, keep).eval()(*program.example_inputs)
    deviation = float((found - expected).abs().max() / expected.abs().max())
    if not deviation < 1e-4:
        raise SystemExit(f"{program.name}: the resized program differs from the masked one by {deviation:.1e}")
    return deviation


if __name__ == "__main__":
    main()

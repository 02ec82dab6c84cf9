"""Accuracy at equal measured milliseconds on CIFAR-10: hwprune beside what a user would pick instead.

    python benchmarks/bench_cifar10.py --data cifar10:FOLDER --weights WEIGHTS --model resnet20 --batch 32 \
        --budget 50% --method dsa --note q75

Every row trains on the same images for the same number of epochs in all, with the dense model as teacher, and ends with
a measurement of the finished network beside the dense one. Rows are kept in `results/cifar10_cpu.json` as they finish;
one that is there already is not run again, and a run that was killed continues. Methods: those of `hwprune
methods`, guided by ms; with `-flops` behind the name, guided by FLOPs and cut to the same ms; `torch-pruning` (global
group norm, rounded to 8, cut to the same ms).
"""

import argparse
import copy
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import commit
from torch import nn

from hwprune.data import Data, load_data
from hwprune.latency import Target, fingerprint
from hwprune.models import load_model
from hwprune.pipeline import BudgetMissed, measure, prune
from hwprune.train import Recipe, evaluate, fit, recalibrate

RESULTS = Path(__file__).parent / "results" / "cifar10_cpu.json"


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.train_threads)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"context": {}, "rows": []}
    name = f"{args.model}-b{args.batch}-{args.budget}-{args.method}-s{args.seed}-e{args.search_epochs}+{args.epochs}"
    if any(row["name"] == name for row in results["rows"]):
        print(f"{name} is in {RESULTS.name} already")
        return
    data = load_data(args.data, batch_size=args.batch_size, subset=args.subset, seed=args.seed)
    model = load_model(args.model, classes=data.classes, weights=args.weights)
    example = torch.randn(args.batch, *data.shape, generator=torch.Generator().manual_seed(0))
    target = Target(threads=1)
    recipe = Recipe(
        epochs=args.epochs, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, distill=0.5, seed=args.seed,
        batch_size=args.batch_size,
    )  # fmt: skip
    start = time.perf_counter()
    run = torch_pruning if args.method == "torch-pruning" else ours
    row = run(args, model, example, data, target, recipe)
    flow_s = time.perf_counter() - start
    row = {
        "wall_s": {"total": flow_s},
        "name": name,
        "data": args.note or args.data.split(":")[0],
        "images_per_epoch": args.subset or 50000,
        "total_epochs": args.search_epochs + args.epochs,
        "batch": args.batch,
        **row,
        "method": args.method,
        "model": args.model,
        "seed": args.seed,
        "budget": args.budget,
        "flow_s": flow_s,
        "commit": commit(),
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else results
    results["context"] = {**fingerprint(target), "machine": platform.machine()}
    results["rows"].append(row)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: row.get(key) for key in ("name", "accuracy", "measured_ms", "budget_ms", "flow_s")}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--note", help="what the data are called in the results")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=32, help="of the latency target")
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--method", default="dsa")
    parser.add_argument("--search-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--subset", type=int, default=10000, help="images per epoch, the same for all methods")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"))
    return parser.parse_args()


def ours(
    args: argparse.Namespace, model: nn.Module, example: torch.Tensor, data: Data, target: Target, recipe: Recipe
) -> dict[str, Any]:
    """hwprune itself."""
    method, _, guide = args.method.partition("-")
    try:
        result = prune(
            model, example, train_loader=data.train, test_loader=data.test, budget=args.budget, target=target,
            method=method, guide=guide or "ms", recipe=recipe,
            search_epochs=args.search_epochs, epochs=args.epochs,
            out=args.runs / f"{args.model}-b{args.batch}-{args.budget.rstrip('%')}-{args.method}-s{args.seed}",
            table=args.runs / f"{args.model}-b{args.batch}.jsonl", resume=True, seed=args.seed, name=args.model,
        ).result  # fmt: skip
    except BudgetMissed as missed:
        result = missed.result  # a miss is a row as well: "met" says it
    return {key: value for key, value in result.items() if key not in ("settings", "versions")}


def torch_pruning(
    args: argparse.Namespace, model: nn.Module, example: torch.Tensor, data: Data, target: Target, recipe: Recipe
) -> dict[str, Any]:
    """Torch-Pruning's global group norm at the ratio whose measured latency is the nearest below the budget.

    Rounded to 8, or not rounded where no ratio fits so: its rounding leaves a layer whole that would round to nothing,
    so that beyond some ratio the networks grow again.
    """
    import torch_pruning as tp

    fraction = float(args.budget.rstrip("%")) / 100

    def pruned_at(ratio: float, round_to: int | None) -> nn.Module:
        copied = copy.deepcopy(model)
        pruner = tp.pruner.BasePruner(
            copied, example[:1], importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
            pruning_ratio=ratio, max_pruning_ratio=0.9, round_to=round_to, ignored_layers=[copied.linear],
        )  # fmt: skip
        pruner.step()
        return copied

    def share(at: tuple[float, int | None], turns: int) -> float:
        """Of the budget."""
        dense_ms, pruned_ms = beside(model, pruned_at(*at), example, target, turns)
        return pruned_ms / dense_ms / fraction

    best = None
    for round_to in (8, None):
        scan = [] if best else [(share((ratio, round_to), 3), ratio) for ratio in np.arange(0.05, 0.96, 0.03).tolist()]
        for roughly, ratio in sorted(scan, reverse=True):  # a scan is too short to decide on
            if roughly <= 1.03 and share((ratio, round_to), 9) <= 0.985:
                best = (ratio, round_to)
                break
    if best is None:
        raise SystemExit("torch-pruning: no ratio meets the budget")
    module = pruned_at(*best)
    recalibrate(module, data.train, batches=50)
    total = replace(recipe, epochs=args.search_epochs + args.epochs)
    fit(module, data.train, total, teacher=copy.deepcopy(model), description="torch-pruning")
    row = finished(model, module, example, data, target, fraction)
    return row | {"epochs": total.epochs, "pruning_ratio": best[0], "round_to": best[1]}


def beside(
    dense: nn.Module, module: nn.Module, example: torch.Tensor, target: Target, turns: int
) -> tuple[float, float]:
    """Median ms of two networks measured in turns."""
    rows = [[measure(m, example, target=target, rounds=1).median_ms for m in (dense, module)] for _ in range(turns)]
    dense_ms, pruned_ms = np.median(rows, axis=0).tolist()
    return dense_ms, pruned_ms


def finished(
    dense: nn.Module, module: nn.Module, example: torch.Tensor, data: Data, target: Target, fraction: float
) -> dict[str, Any]:
    """The last measurement, dense and pruned in turns, and both accuracies."""
    dense_ms, measured_ms = beside(dense, module, example, target, turns=9)
    return {
        "dense_ms": dense_ms,
        "budget_ms": dense_ms * fraction,
        "predicted_ms": None,
        "measured_ms": measured_ms,
        "met": measured_ms <= dense_ms * fraction,
        "dense_accuracy": evaluate(dense, data.test).accuracy,
        "accuracy": evaluate(module, data.test).accuracy,
        "dense_parameters": sum(p.numel() for p in dense.parameters()),
        "parameters": sum(p.numel() for p in module.parameters()),
        "target": {"description": target.describe(), **fingerprint(target)},
    }


if __name__ == "__main__":
    main()

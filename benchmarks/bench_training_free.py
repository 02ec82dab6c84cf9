"""Accuracy of a pretrained network that was pruned to a measured latency without one training step.

    python benchmarks/bench_training_free.py --data cifar10:FOLDER --weights WEIGHTS --model resnet20 --note original

Every row chooses channels, cuts to the budget as measured, recalibrates the batch norms and is done. With `refit`, the
readers of pruned channels were first solved anew by least squares on unaugmented training images. Rows are kept in
`results/training_free_cpu.json` as they finish; one that is there already is not run again, and the latency table is
continued where a run was killed. About five minutes for resnet20.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from measuring import commit

from hwprune.data import load_data
from hwprune.latency import Target, fingerprint
from hwprune.models import load_model
from hwprune.pipeline import BudgetMissed, prune
from hwprune.train import Recipe

RESULTS = Path(__file__).parent / "results" / "training_free_cpu.json"
KEYS = (
    "accuracy", "dense_accuracy", "measured_ms", "measured_p20_ms", "measured_p80_ms", "measurements", "dense_ms",
    "budget_ms", "met", "predicted_ms", "parameters", "dense_parameters", "flops", "dense_flops", "widths", "wall_s",
)  # fmt: skip


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    data = load_data(args.data, batch_size=128, seed=args.seed)
    example = torch.randn(args.batch, *data.shape, generator=torch.Generator().manual_seed(0))
    for budget in args.budgets.split(","):
        for choice in args.methods.split(","):
            name = f"{args.model}-b{args.batch}-{budget}-{choice}-s{args.seed}"
            if name in {row["name"] for row in stored()["rows"]}:
                print(f"{name} is in {RESULTS.name} already")
                continue
            keep(name, args, budget, choice, run(args, data, example, budget, choice))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--note", help="what the data are called in the results")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=32, help="of the latency target")
    parser.add_argument("--budgets", default="80%,70%,60%")
    parser.add_argument("--methods", default="magnitude,magnitude+refit,csr", help="NAME, or NAME+refit")
    parser.add_argument("--profile-seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the selection; the target has one")
    parser.add_argument("--runs", type=Path, default=Path("runs/training_free"))
    return parser.parse_args()


def run(args: argparse.Namespace, data: Any, example: torch.Tensor, budget: str, choice: str) -> dict[str, Any]:
    """One row: `hwprune prune` without an epoch."""
    method, _, refit = choice.partition("+")
    start = time.perf_counter()
    try:
        result = prune(
            load_model(args.model, classes=data.classes, weights=args.weights), example,
            train_loader=data.train, test_loader=data.test, calibration_loader=data.calibration,
            budget=budget, target=Target(threads=1), method=method,
            refit=True if refit else None if method == "csr" else False, recipe=Recipe(seed=args.seed),
            search_epochs=0, epochs=0, table=args.runs / f"{args.model}-b{args.batch}.jsonl",
            profile_seconds=args.profile_seconds, seed=args.seed, name=args.model, progress=False,
        ).result  # fmt: skip
    except BudgetMissed as missed:  # on a machine that is not quiet; the row says so
        result = missed.result
    return {**{key: result[key] for key in KEYS}, "flow_s": time.perf_counter() - start}


def stored() -> dict[str, Any]:
    """What is in the file of results."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"context": {}, "rows": []}
    return found


def keep(name: str, args: argparse.Namespace, budget: str, choice: str, row: dict[str, Any]) -> None:
    """Add a row to the file of results."""
    results = stored()
    results["context"] = {**fingerprint(Target(threads=1)), "machine": platform.machine(), "commit": commit()}
    given = {"model": args.model, "batch": args.batch, "budget": budget, "method": choice, "seed": args.seed}
    results["rows"].append({"name": name, "data": args.note or args.data.split(":")[0], **given, **row})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(
        json.dumps(
            {"name": name, **{key: row[key] for key in ("accuracy", "measured_ms", "budget_ms", "met", "flow_s")}}
        )
    )


if __name__ == "__main__":
    main()

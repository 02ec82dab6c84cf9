"""How well the latency model predicts networks it has not seen, and how fast it answers.

    python benchmarks/bench_latency.py --model resnet20 --batch 1 32 --threads 1 2
    python benchmarks/bench_latency.py --model torchvision:resnet18 --pixels 128 --batch 1 --sampling context isolated
    python benchmarks/bench_latency.py --model resnet20 --runtime onnxruntime
    python benchmarks/bench_latency.py --speed

Each row of `results/latency_accuracy.json` is one model, batch, thread count and way of sampling: the program is
profiled, then random width vectors that the profile did not see are measured end to end, twice, in different random
orders, the dense network beside each as the reference, whose level during the profile is the level of both. Errors are
of the prediction against the mean of both measurements; the difference between the two is the machine's own.
`machine_drift` is the dense network's time during the check over that during the profile: where it is not 1, the
machine was slower or faster, and `median_error_undivided` is the error that is left when nothing is divided out. Where
several ways of sampling are asked for, all are profiled before the check, the first the furthest from it in time; such
rows are named apart. A row replaces the one of the same name.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import commit
from torch import Tensor

from hwprune.graph import Program, keep_first, resize, trace
from hwprune.latency import CostModel, LatencyTable, Reference, Target, build, fingerprint, measure, profile
from hwprune.latency.profiler import Plan, random_widths
from hwprune.models import load_model

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    if args.speed:
        store("latency_speed.json", [speed(load_program(name, 1, args.pixels)) for name in args.model])
        return
    for name in args.model:
        for batch in args.batch:
            program = load_program(name, batch, args.pixels)
            for threads in args.threads:
                target = Target(threads=threads, runtime=args.runtime, memory_format=args.memory_format)
                store("latency_accuracy.json", accuracy(args, name, program, target))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["resnet20"])
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--runtime", default="eager", choices=["eager", "compile", "onnxruntime"])
    parser.add_argument("--memory-format", default="contiguous")
    parser.add_argument("--sampling", nargs="+", default=["context"], choices=["context", "isolated"])
    parser.add_argument("--seconds", type=float, help="time to profile; the default of hwprune.latency.profile")
    parser.add_argument("--vectors", type=int, default=50)
    parser.add_argument("--tables", type=Path, help="folder to keep the tables in (a kept table is not measured again)")
    parser.add_argument("--speed", action="store_true", help="time value_and_grad instead")
    return parser.parse_args()


def load_program(name: str, batch: int, pixels: int) -> Program:
    if name.startswith("torchvision:"):
        declare_torchvision_operators()
    torch.manual_seed(0)
    model = load_model(name, classes=10)
    return trace(model, (torch.randn(batch, 3, pixels, pixels),), name=name)


def declare_torchvision_operators() -> None:
    """A torchvision built for CUDA imports beside a CPU torch once the operators it looks up are declared."""
    if not hasattr(declare_torchvision_operators, "library"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declare_torchvision_operators.library = library  # the declarations live as long as this object


def accuracy(args: argparse.Namespace, name: str, program: Program, target: Target) -> list[dict[str, Any]]:
    """Profile in every way asked for, then measure unseen networks once for all of them."""
    models: dict[str, CostModel] = {}
    walls: dict[str, float] = {}
    batch, pixels = program.example_inputs[0].shape[0], program.example_inputs[0].shape[-1]
    stem = f"{name.replace(':', '_')}-{pixels}px-b{batch}-t{target.threads}"
    stem += "" if target.runtime == "eager" else f"-{target.runtime}"
    folder = args.tables or Path(tempfile.mkdtemp())
    for sampling in args.sampling:
        begin = time.perf_counter()
        table = LatencyTable.open(folder / f"{stem}-{sampling}.jsonl", target)
        models[sampling] = profile(program, target, table, seconds=args.seconds, sampling=sampling)
        walls[sampling] = time.perf_counter() - begin
    widths = np.stack(list(random_widths(program, args.vectors, seed=7)))
    begin = time.perf_counter()
    level_ms = models[args.sampling[0]].facts["reference_ms"]
    measured, contention, drift = measure_twice(program, target, widths, level_ms)
    wall_s = time.perf_counter() - begin
    repeat = np.abs(measured[0] / measured[1] - 1)
    truth = measured.mean(0)
    rows = []
    for sampling, model in models.items():
        level = level_ms / model.facts["reference_ms"]  # profiles have seen the reference at levels of their own
        predicted = model.predict(widths) * level
        error = np.abs(predicted / truth - 1)
        uncalibrated = (predicted / level - model.offset) / model.scale * 1e-3 * level / truth
        row = {
            "name": f"{stem}-{sampling}" + ("-in-one-run" if len(models) > 1 else ""),
            "model": name, "pixels": pixels, "batch": batch, "threads": target.threads, "sampling": sampling,
            "target": target.as_dict(),
            "median_error": quantile(error, 0.5), "p95_error": quantile(error, 0.95), "max_error": quantile(error, 1),
            "within_10_percent": round(float((error <= 0.1).mean()), 4),
            "machine_drift": round(drift, 4),
            "median_error_undivided": quantile(np.abs(predicted / (truth * drift) - 1), 0.5),
            "median_repeat": quantile(repeat, 0.5), "p95_repeat": quantile(repeat, 0.95),
            "sum_over_whole": quantile(uncalibrated, 0.5),
            "scale": round(model.scale * 1e3, 4), "offset_ms": round(model.offset, 5),
            "residual": round(model.residual, 4),
            "dense_ms": round(model.dense, 4), "floor_ms": round(model.floor, 4),
            **model.facts,
            "cell_share": round(model.facts["cells_measured"] / model.facts["cells_of_full_grid"], 4),
            "profile_wall_s": round(walls[sampling], 1), "check_wall_s": round(wall_s, 1),
            "check_contention_median": round(float(np.median(contention)), 3),
            "widths": widths.tolist(),
            "measured_ms": np.round(measured, 5).tolist(), "predicted_ms": np.round(predicted, 5).tolist(),
        }  # fmt: skip
        print(
            f"{row['name']}: median error {row['median_error']:.2%}, 95 % within {row['p95_error']:.2%}, "
            f"{row['within_10_percent']:.0%} within 10 %; repeat {row['median_repeat']:.2%} / {row['p95_repeat']:.2%}; "
            f"sum/whole {row['sum_over_whole']:.3f}; drift {drift:.3f}; "
            f"dense {row['dense_ms']} ms, floor {row['floor_ms']} ms; "
            f"{row['forwards']} forwards, {row['cell_share']:.1%} of cells, {row['profile_wall_s']} s",
            flush=True,
        )
        rows.append(row)
    return rows


def measure_twice(
    program: Program, target: Target, widths: np.ndarray, level_ms: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """(ms [2, N], contention [2, N], drift) of every width vector, in two passes of different order."""
    inputs = program.example_inputs
    dense = build(target, resize(program, keep_first(program.groups, program.groups.widths)))
    reference = Reference.start(dense, inputs, target, level_ms=level_ms)
    long = reference.quiet_ms > 60  # one forward averages over what takes several short ones
    seconds, blocks = (3e-3 * reference.quiet_ms, 3) if long else (0.25, 5)
    found, contention = np.zeros((2, len(widths))), np.zeros((2, len(widths)))
    for turn in range(2):
        for at in np.random.default_rng(turn).permutation(len(widths)):
            network = build(target, resize(program, keep_first(program.groups, widths[at])))
            sample = measure(network, inputs, target, seconds=seconds, min_blocks=blocks, reference=reference)
            found[turn, at], contention[turn, at] = sample.median_ms, sample.contention
    return found, contention, float(np.median(reference.history_ms)) / level_ms


def speed(program: Program) -> dict[str, Any]:
    """One gather over all terms against a Python loop of bilinear look-ups over the same tables, checked to agree."""
    plan = Plan.of(program)
    model = synthetic_model(plan)
    widths = torch.from_numpy(plan.program.groups.widths * 0.61).clamp(min=1.0)
    value, gradient = model.value_and_grad(widths)
    loop_value, loop_gradient = loop_value_and_grad(model, widths)
    assert abs(value - loop_value) <= 1e-9 * value, (value, loop_value)
    assert torch.allclose(gradient, loop_gradient, rtol=1e-9), (gradient - loop_gradient).abs().max()
    times = {
        "gather_us": best_us(lambda: model.value_and_grad(widths)),
        "loop_us": best_us(lambda: loop_value_and_grad(model, widths)),
    }
    row = {"name": program.name, "terms": len(model.terms), "axes": len(model.axes), "groups": len(model.full), **times}
    row["ratio"] = round(times["loop_us"] / times["gather_us"], 2)
    print(row)
    return row


def synthetic_model(plan: Plan) -> CostModel:
    """Tables of the program's shape with a rising cost on 12 knots an axis."""
    from hwprune.latency.model import CostAxis, CostTerm

    places: dict[Any, int] = {}
    axes, terms = [], []
    for segment in plan.segments:
        for axis in segment.axes:
            if axis.key not in places:
                places[axis.key] = len(axes)
                least = axis.offset + int(axis.weights.sum())
                knots = np.unique(np.linspace(least, axis.size, 12).round().astype(np.int64))
                axes.append(CostAxis(axis.groups, axis.weights, axis.offset, knots))
        used = tuple(places[axis.key] for axis in segment.axes)
        table = np.array(1.0)
        for at in used:
            table = np.add.outer(table, np.sqrt(axes[at].knots)) * 1.1
        terms.append(CostTerm(segment.name, used, table))
    return CostModel("ms", plan.program.groups.widths, tuple(axes), tuple(terms))


def loop_value_and_grad(model: CostModel, widths: Tensor) -> tuple[float, Tensor]:
    """The same number, one term at a time."""
    flat = widths.numpy()
    gradient, value = np.zeros(len(flat)), model.offset
    for term in model.terms:
        table, slopes, used = term.table, [], [model.axes[at] for at in term.axes]
        parts = []
        for axis in used:
            size = axis.offset + float((axis.weights * flat[axis.groups]).sum())
            low = min(max(int(np.searchsorted(axis.knots, size, side="right")) - 1, 0), len(axis.knots) - 2)
            step = float(axis.knots[low + 1] - axis.knots[low])
            parts.append((low, (size - axis.knots[low]) / step, step))
        if len(used) == 2:
            (i, u, du), (j, v, dv) = parts
            a, b, c, d = table[i, j], table[i + 1, j], table[i, j + 1], table[i + 1, j + 1]
            value += model.scale * ((1 - u) * (1 - v) * a + u * (1 - v) * b + (1 - u) * v * c + u * v * d)
            slopes = [((1 - v) * (b - a) + v * (d - c)) / du, ((1 - u) * (c - a) + u * (d - b)) / dv]
        elif len(used) == 1:
            ((i, u, du),) = parts
            value += model.scale * ((1 - u) * table[i] + u * table[i + 1])
            slopes = [(table[i + 1] - table[i]) / du]
        else:
            value += model.scale * float(table)
        for axis, slope in zip(used, slopes, strict=True):
            gradient[axis.groups] += model.scale * slope * axis.weights
    return float(value), torch.from_numpy(gradient)


def best_us(call: Any, rounds: int = 7, count: int = 50) -> float:
    """Median over rounds of the mean of `count` calls."""
    means = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(count):
            call()
        means.append((time.perf_counter() - begin) / count * 1e6)
    return round(float(np.median(means)), 1)


def quantile(values: np.ndarray, q: float) -> float:
    return round(float(np.quantile(values, q)), 5)


def store(file: str, rows: list[dict[str, Any]]) -> None:
    """Merge rows by name into a results file."""
    path = RESULTS / file
    stored = json.loads(path.read_text()) if path.exists() else {"context": {}, "rows": []}
    names = {row["name"] for row in rows}
    made_by = commit()
    context = {
        **fingerprint(Target()),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": made_by,
    }
    for row in rows:
        row["commit"] = made_by
    kept = [row for row in stored["rows"] if row["name"] not in names]
    path.parent.mkdir(exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in sorted([*kept, *rows], key=lambda row: row["name"]))
    path.write_text(f'{{"context": {json.dumps(context)},\n "rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()

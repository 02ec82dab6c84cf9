"""Draw what the benchmarks measured. Reads `results/*.json`, measures nothing.

    python benchmarks/plot.py
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from hwprune import comparison

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"svg.hashsalt": "hwprune", "svg.fonttype": "none"})  # the same data give the same, small file
    latency = RESULTS / "latency_accuracy.json"
    if latency.exists():
        rows = json.loads(latency.read_text())["rows"]
        eager = (row for row in rows if row["target"]["runtime"] == "eager")
        shown = [row for row in eager if row["name"].endswith("-context")]
        draw_predictions(shown, RESULTS / "latency_accuracy.svg")
    for operators in RESULTS.glob("*/ops.json"):
        draw_operators(json.loads(operators.read_text())["rows"], operators.with_suffix(".svg"))
    cifar = RESULTS / "cifar10_cpu.json"
    if cifar.exists():
        draw_accuracy(json.loads(cifar.read_text())["rows"], RESULTS / "cifar10_cpu.svg")
    leaderboard = RESULTS / "leaderboard_cpu.json"
    if leaderboard.exists():
        comparison.draw(json.loads(leaderboard.read_text())["rows"], leaderboard.with_suffix(".svg"))


def draw_operators(rows: list[dict[str, Any]], path: Path) -> None:
    """Rivals' times over ours, a dot a shape and a line at the geometric mean; the cost of a step by what is kept."""
    whole = ("training step", "search step")
    kinds = list(dict.fromkeys(kind_of(row) for row in rows if row["op"] not in whole))
    steps = sorted((row for row in rows if row["op"] == "training step"), key=lambda row: -row["keep"])
    series = sorted({(row["backend"], row["threads"]) for row in rows})  # threads on the CPU, backends on a device
    width = 0.72 / len(series)
    size = (9.5, 0.6 + 0.3 * len(kinds))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=(3, 2), layout="constrained")
    for place, kind in enumerate(kinds):
        for shift, member in enumerate(series):
            mine = [row for row in rows if kind_of(row) == kind and (row["backend"], row["threads"]) == member]
            if not mine:
                continue
            ratios = [row["ratio"] for row in mine]
            at = place + width * (shift - (len(series) - 1) / 2)
            left.plot(ratios, [at] * len(ratios), ".", color=f"C{shift}", markersize=3, alpha=0.6)
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            half = 0.17 * width / 0.36
            left.plot([mean, mean], [at - half, at + half], color=f"C{shift}", linewidth=2)
    left.axvline(1, color="#7a8896", linewidth=0.8)
    names = [f"{kind}, {keep:.0%} kept, over {rival}" for kind, rival, keep in kinds]
    left.set(xscale="log", yticks=range(len(kinds)), yticklabels=names, xlabel="times as fast as the rival")
    left.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    left.xaxis.set_minor_formatter(NullFormatter())
    left.invert_yaxis()
    named = len({backend for backend, _ in series}) > 1
    for shift, (backend, count) in enumerate(series):
        if named:
            left.plot([], [], color=f"C{shift}", label=backend)
            left.legend(fontsize=7, frameon=False)
        if backend != "auto":
            continue
        for rival, marker in zip(dict.fromkeys(row["rival"] for row in steps), ".x+", strict=False):
            mine = [row for row in steps if (row["backend"], row["threads"], row["rival"]) == (backend, count, rival)]
            cost = [row["median_us"] / row["rival_median_us"] for row in mine]
            label = f"over {rival}" if named else f"{count} thread{'s' * (count > 1)}, over {rival}"
            right.plot([row["keep"] for row in mine], cost, f"{marker}-", color=f"C{shift}", label=label)
    right.plot([0, 1], [0, 1], ":", color="#7a8896", linewidth=0.8)
    parts = [index / 50 for index in range(51)]
    right.plot(parts, [part**2 for part in parts], "--", color="#7a8896", linewidth=0.8, label="squared: all products")
    right.set(xlabel="part of the channels kept", ylabel="cost of a step, rival's = 1", ylim=(0, None))
    right.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def kind_of(row: dict[str, Any]) -> tuple[str, str, float]:
    """What is drawn in one line: operator, with the kind of convolution where it is told, rival and kept part."""
    kind = row.get("kind", "any")
    return row["op"] if kind in ("any", "columns") else f"{row['op']} {kind}", row["rival"], row["keep"]


def draw_accuracy(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against measured latency, one panel a model and batch with something to compare, one line a method."""
    counts = Counter((row["model"], row["batch"]) for row in rows)
    panels = sorted(panel for panel, count in counts.items() if count > 1)
    rows = [row for row in rows if (row["model"], row["batch"]) in panels]
    if not rows:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.2), squeeze=False, layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axis, (model, batch) in zip(axes.flat, panels, strict=True):
        mine = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        axis.axhline(100 * mine[0]["dense_accuracy"], color="#7a8896", linewidth=0.8, linestyle=":")
        for method in methods:
            chosen = [row for row in mine if row["method"] == method]
            points = sorted((row["measured_ms"] / row["dense_ms"], row["accuracy"]) for row in chosen)
            if points:
                style = {"color": f"C{methods.index(method)}", "label": method, "marker": "o", "markersize": 4}
                axis.plot([100 * x for x, _ in points], [100 * y for _, y in points], linewidth=1.2, **style)
        axis.set(xlabel="measured latency, % of dense", ylabel="accuracy, %", title=f"{model}, batch {batch}")
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_predictions(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured ms of networks the profile had not seen, one panel a model, batch and thread count."""
    if not rows:
        return
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    size = (3.1 * columns, 3.2 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, rows, strict=False):
        pairs = list(zip(*row["measured_ms"], row["predicted_ms"], strict=True))
        low = 0.9 * min(min(triple) for triple in pairs)
        high = 1.1 * max(max(triple) for triple in pairs)
        axis.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high], color="#dfe7ef", linewidth=0)
        axis.plot([low, high], [low, high], color="#7a8896", linewidth=0.8)
        for first, second, predicted in pairs:  # the bar joins the two measurements of one network
            axis.plot([first, second], [predicted, predicted], color="#c0562f", linewidth=1.0, alpha=0.6)
            axis.plot((first + second) / 2, predicted, "o", color="#c0562f", markersize=2.6)
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="measured ms")
        axis.set_aspect("equal")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter(NullFormatter())
        axis.set_title(
            f"{row['model'].split(':')[-1]}, {row['pixels']} px, batch {row['batch']}, {row['threads']} thread"
            f"{'s' * (row['threads'] > 1)}\n"
            f"median error {row['median_error']:.1%}, {row['within_10_percent']:.0%} within 10 %\n"
            f"same network measured twice: {row['median_repeat']:.1%}",
            fontsize=7.5,
        )
    for axis in axes[:, 0]:
        axis.set_ylabel("predicted ms")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()

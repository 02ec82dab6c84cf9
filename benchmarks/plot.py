"""Draw what the benchmarks measured. Reads `results/*.json`, measures nothing.

    python benchmarks/plot.py
"""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["svg.hashsalt"] = "hwprune"  # the same data give the same file
    latency = RESULTS / "latency_accuracy.json"
    if latency.exists():
        rows = json.loads(latency.read_text())["rows"]
        draw_predictions([row for row in rows if row["sampling"] == "context"], RESULTS / "latency_accuracy.svg")


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

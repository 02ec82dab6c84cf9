"""What a pruning run did, as one HTML page that needs nothing but a browser.

The page holds its styles and figures (SVG) itself, loads nothing, runs no script, and follows the reader's light or
dark setting. :func:`explain` takes the figures' numbers from a cost model; :func:`render` only draws.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwprune.files import write_file
from hwprune.graph import Groups
from hwprune.latency import CostModel

Row = Mapping[str, Any]


@dataclass(frozen=True)
class GroupShare:
    """One coupled group: how much of it stays, and the milliseconds that hang on it."""

    name: str
    full: int  # channels
    width: int  # channels kept
    dense_ms: float  # its share of the dense model's latency
    ms: float  # its share of the pruned model's latency

    @property
    def ratio(self) -> float:
        return self.width / self.full


@dataclass(frozen=True)
class Staircase:
    """Latency of one segment against one of its widths, the other held where it was chosen."""

    name: str
    axis: str
    elements: Sequence[float]  # measured widths, ascending
    ms: Sequence[float]  # latency at those widths
    chosen: float
    full: float


@dataclass(frozen=True)
class Report:
    """Everything that the page shows. ``result`` has the keys of ``result.json``."""

    result: Mapping[str, Any]
    groups: Sequence[GroupShare] = ()
    staircases: Sequence[Staircase] = ()
    search: Sequence[Row] = ()  # rows with step, cost and target, as fractions of dense
    training: Sequence[Row] = ()  # rows with phase, epoch, and accuracy or loss
    rounds: Sequence[Row] = ()  # rows with predicted_ms, measured_ms, budget_ms
    notes: Sequence[str] = field(default_factory=tuple)


def explain(
    cost: CostModel,
    groups: Groups,
    widths: NDArray[np.int64],  # [G]
    *,
    titles: Mapping[str, str] | None = None,
    top: int = 6,
) -> tuple[list[GroupShare], list[Staircase]]:
    """Share the model's latency out among its groups, and pick the staircases of the heaviest segments.

    A segment's milliseconds are shared equally by its axes, an axis' by its groups in proportion to their elements;
    what depends on no group belongs to none. The shares therefore sum to at most the whole. ``titles`` says more of a
    segment than its name.
    """
    full = groups.widths.astype(np.int64)
    dense_ms, ms = np.zeros(len(groups)), np.zeros(len(groups))  # [G]
    heaviest: list[tuple[float, Staircase]] = []
    for term in cost.terms:
        axes = [cost.axes[a] for a in term.axes]
        if not axes:
            continue
        at = {}
        for chosen, share_ms in ((full, dense_ms), (widths, ms)):
            sizes = [float(axis.offset + np.dot(axis.weights, chosen[axis.groups])) for axis in axes]
            value = cost.scale * _interpolate(term.table, [axis.knots for axis in axes], sizes)
            for axis in axes:
                parts = np.asarray(axis.weights * chosen[axis.groups], dtype=np.float64)
                np.add.at(share_ms, axis.groups, value / len(axes) * parts / max(parts.sum(), 1.0))
            at[id(chosen)] = (sizes, value)
        heaviest.append((at[id(full)][1], _staircase(term, axes, at[id(widths)][0], at[id(full)][0], cost, groups)))
    shares = [
        GroupShare(name, int(f), int(w), float(d), float(m))
        for name, f, w, d, m in zip(groups.names, full, widths, dense_ms, ms, strict=True)
    ]
    heaviest.sort(key=lambda pair: -pair[0])
    named = titles or {}
    return shares, [replace(s, name=named.get(s.name, s.name)) for _, s in heaviest[:top]]


def _interpolate(table: NDArray[np.float64], knots: Sequence[NDArray[np.int64]], sizes: Sequence[float]) -> float:
    """Multilinear value of a table on its knots, held constant outside them."""
    for axis_knots, size in zip(knots, sizes, strict=True):
        position = float(np.interp(size, axis_knots, np.arange(len(axis_knots))))
        low = min(int(position), max(len(axis_knots) - 2, 0))
        high = min(low + 1, len(axis_knots) - 1)
        table = table[low] + (position - low) * (table[high] - table[low])
    return float(table)


def _staircase(
    term: Any, axes: Sequence[Any], chosen: Sequence[float], full: Sequence[float], cost: CostModel, groups: Groups
) -> Staircase:
    """The slice of a segment's table through the chosen widths, along the axis with more to gain."""

    def along(i: int) -> list[float]:
        knots = [axis.knots for axis in axes]
        return [cost.scale * _interpolate(term.table, knots, [*chosen[:i], k, *chosen[i + 1 :]]) for k in axes[i].knots]

    curves = [along(i) for i in range(len(axes))]
    best = int(np.argmax([max(curve) - min(curve) for curve in curves]))
    names = [groups.names[g] for g in axes[best].groups]
    label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return Staircase(term.name, label, [float(k) for k in axes[best].knots], curves[best], chosen[best], full[best])


def write(path: str | Path, report: Report) -> Path:
    """Render the report into a file. Raises InvalidInput where it cannot be written."""
    path = Path(path)
    write_file(path, render(report).encode())
    return path


def render(report: Report) -> str:
    """The page as HTML."""
    result = report.result
    title = f"{result.get('model', 'model')} pruned by {result.get('method', 'hwprune')}"
    body = [
        _header(title, result),
        _table(result),
        _latency(result, report.rounds),
        _groups(report.groups),
        _staircases(report.staircases),
        _progress(report.search, report.training),
        _provenance(result, report.notes),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def figure(result: Row) -> str:
    """The latency and the widths of one ``result.json`` as an SVG file of its own, for a page that shows images."""
    bars = _latency_figure(result)
    widths = _groups_figure([GroupShare(**group) for group in result["groups"]])
    parts, top = [], 0
    for part in (bars, widths):
        height = int(part.split('viewBox="0 0 900 ')[1].split('"')[0])
        parts.append(part.replace("<svg ", f'<svg x="20" y="{top + 20}" width="900" height="{height}" ', 1))
        top += height + 30
    frame = f'<rect width="940" height="{top + 20}" rx="10" class="card"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 {top + 20}" width="940" height="{top + 20}">'
        f"<style>{_COLOURS}{_MARKS}.card{{fill:var(--card)}}svg{{font-family:system-ui,sans-serif}}</style>"
        f"{frame}{''.join(parts)}</svg>\n"
    )


def _header(title: str, result: Row) -> str:
    tiles = []
    dense_ms, measured_ms = result.get("dense_ms"), result.get("measured_ms")
    if dense_ms and measured_ms:
        tiles.append(("measured latency", _ms(measured_ms), f"{dense_ms / measured_ms:.2f}× faster than dense"))
    if result.get("budget_ms") and measured_ms:
        used = measured_ms / result["budget_ms"]
        note = f"{used:.1%} used" if used <= 1 else f"missed by {used - 1:.1%}"
        tiles.append(("budget", _ms(result["budget_ms"]), note))
    if result.get("accuracy") is not None:
        change = result["accuracy"] - result["dense_accuracy"] if result.get("dense_accuracy") is not None else None
        note = "" if change is None else f"{100 * change:+.2f} points against dense"
        tiles.append(("accuracy", f"{result['accuracy']:.2%}", note))
    if result.get("parameters") and result.get("dense_parameters"):
        left = result["parameters"] / result["dense_parameters"]
        tiles.append(("parameters", _count(result["parameters"]), f"{left:.1%} of dense"))
    cells = "".join(
        f'<div class="tile"><div class="what">{_text(what)}</div><div class="number">{_text(number)}</div>'
        f'<div class="note">{_text(note)}</div></div>'
        for what, number, note in tiles
    )
    return (
        f'<header><h1>{_text(title)}</h1><p class="sub">{_text(_describe(result.get("target")))}</p></header>'
        f'<section class="tiles">{cells}</section>'
    )


def _table(result: Row) -> str:
    def change(dense: float | None, pruned: float | None) -> str:
        return "" if not dense or pruned is None else f"{pruned / dense - 1:+.1%}"

    rows = []
    for label, before, after, show in (
        ("measured latency, median", "dense_ms", "measured_ms", _ms),
        ("predicted latency", "predicted_dense_ms", "predicted_ms", _ms),
        ("parameters", "dense_parameters", "parameters", lambda n: f"{n:,}"),
        ("multiply-accumulates", "dense_flops", "flops", lambda n: f"{int(n):,}"),
    ):
        if result.get(after) is not None:
            shown = show(result[before]) if result.get(before) is not None else ""
            rows.append((label, shown, show(result[after]), change(result.get(before), result[after])))
    if result.get("accuracy") is not None:
        dense = result.get("dense_accuracy")
        points = "" if dense is None else f"{100 * (result['accuracy'] - dense):+.2f} points"
        rows.insert(0, ("accuracy", "" if dense is None else f"{dense:.2%}", f"{result['accuracy']:.2%}", points))
    if not rows:
        return ""
    lines = "".join(
        f"<tr><th>{_text(label)}</th>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
        for label, *cells in rows
    )
    return (
        "<section><h2>Before and after</h2><table><thead><tr><th></th><th>dense</th><th>pruned</th><th>change</th></tr>"
        f"</thead><tbody>{lines}</tbody></table></section>"
    )


def _latency(result: Row, rounds: Sequence[Row]) -> str:
    """Bars against the budget line, and the rounds that led there."""
    figure = _latency_figure(result)
    said = []
    if len(rounds) > 1:
        steps = ", ".join(f"{_ms(r['measured_ms'])} ({r['measured_ms'] / r['budget_ms']:.1%})" for r in rounds)
        said.append(f"Measured after each allocation: {steps} of the budget.")
    if rounds and "optimality_gap" in rounds[-1]:
        gap, solver = rounds[-1]["optimality_gap"], rounds[-1]["allocator"]
        said.append(f"Optimality gap of the last allocation, by {solver}: {gap:.2%} of the range of values.")
    if "prediction_residual" in result:
        said.append(f"Where the latency model was calibrated it was off by {result['prediction_residual']:.1%}.")
    trail = f'<p class="caption">{" ".join(said)}</p>' if said else ""
    return f"<section><h2>Latency</h2>{figure}{trail}</section>" if figure else ""


def _latency_figure(result: Row) -> str:
    """Bars of dense, predicted and measured against the budget line."""
    bars = [
        (label, result[key], css, result.get(low), result.get(high))
        for label, key, css, low, high in (
            ("dense, measured", "dense_ms", "faint", "dense_p20_ms", "dense_p80_ms"),
            ("pruned, predicted", "predicted_ms", "second", "", ""),
            ("pruned, measured", "measured_ms", "first", "measured_p20_ms", "measured_p80_ms"),
        )
        if result.get(key)
    ]
    if len(bars) < 2:
        return ""
    width, left, right, row = 900, 150, 90, 34
    longest = max(max(high or 0.0, value) for _, value, _, _, high in bars)
    scale = (width - left - right) / longest
    height = row * len(bars) + 34
    parts = []
    for i, (label, value, css, low, high) in enumerate(bars):
        y = 24 + i * row
        parts.append(f'<text x="{left - 10}" y="{y + 16}" class="end">{_text(label)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="22" rx="3" class="{css}"/>')
        if low and high:
            parts.append(
                f'<path d="M{left + low * scale:.1f} {y + 11}H{left + high * scale:.1f}" class="spread">'
                f"<title>20 % to 80 % quantile: {_ms(low)} to {_ms(high)}</title></path>"
            )
        parts.append(f'<text x="{left + max(value, high or 0) * scale + 8:.1f}" y="{y + 16}">{_ms(value)}</text>')
    if result.get("budget_ms"):
        x = left + result["budget_ms"] * scale
        parts.append(f'<path d="M{x:.1f} 18V{height - 8}" class="limit"/>')
        parts.append(f'<text x="{x:.1f}" y="12" class="middle limit-text">budget {_ms(result["budget_ms"])}</text>')
    return _svg(width, height, parts, "Latency of the dense and the pruned model against the budget")


def _groups(groups: Sequence[GroupShare], most: int = 48) -> str:
    """The groups' figure with its caption; of many groups the heaviest."""
    if not groups:
        return ""
    shown = list(groups)
    if len(shown) > most:  # in the model's order, without the lightest
        light = sorted(range(len(shown)), key=lambda i: -shown[i].dense_ms)[:most]
        shown = [shown[i] for i in sorted(light)]
    rest = f" The {len(groups) - len(shown)} lightest groups are left out." if len(shown) < len(groups) else ""
    return (
        f"<section><h2>Where the channels went</h2>{_groups_figure(shown)}<p class='caption'>Each row is one set of "
        "coupled channels. A segment's milliseconds are shared equally between the widths that it depends on; what no "
        f"width changes is in no row.{rest}</p></section>"
    )


def _groups_figure(shown: Sequence[GroupShare]) -> str:
    """Two bars a group: the keep ratio, and the milliseconds that it costs and saves."""
    width, left, middle, row = 900, 270, 560, 22
    ratio_width, ms_width = middle - left - 90, width - middle - 70
    longest = max(group.dense_ms for group in shown) or 1.0
    parts = [
        f'<text x="{left}" y="14" class="head">channels kept</text>',
        f'<text x="{middle}" y="14" class="head">milliseconds, dense and pruned</text>',
    ]
    for i, group in enumerate(shown):
        y, kept_width = 24 + i * row, max(ratio_width * group.ratio, 1.5)
        dense_width, pruned_width = (max(ms_width * ms / longest, 0.5) for ms in (group.dense_ms, group.ms))
        name = group.name if len(group.name) <= 40 else "…" + group.name[-39:]
        parts += [
            f'<text x="{left - 10}" y="{y + 12}" class="end small">{_text(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{ratio_width}" height="15" rx="2" class="track"/>',
            f'<rect x="{left}" y="{y}" width="{kept_width:.1f}" height="15" rx="2" class="first">'
            f"<title>{_text(group.name)}: {group.width} of {group.full} channels, {group.ratio:.1%}</title></rect>",
            f'<text x="{left + ratio_width + 8}" y="{y + 12}" class="small">{group.width}/{group.full}</text>',
            f'<rect x="{middle}" y="{y}" width="{dense_width:.1f}" height="15" rx="2" class="faint"/>',
            f'<rect x="{middle}" y="{y}" width="{pruned_width:.1f}" height="15" rx="2" class="second">'
            f"<title>{_text(group.name)}: {_ms(group.dense_ms)} dense, {_ms(group.ms)} pruned</title></rect>",
            f'<text x="{middle + max(dense_width, pruned_width) + 8:.1f}" y="{y + 12}" class="small">'
            f"{_ms(group.ms)}</text>",
        ]
    return _svg(width, 30 + row * len(shown), parts, "Keep ratio and milliseconds of every group")


def _staircases(staircases: Sequence[Staircase]) -> str:
    figures = "".join(
        "<figure>"
        + _plot(
            [(list(s.elements), list(s.ms), "first", "")],
            x_label=f"width of {s.axis}",
            y_label="ms",
            size=(430, 230),
            marks=[(s.full, _at(s, s.full), "dense", "mark-faint"), (s.chosen, _at(s, s.chosen), "chosen", "mark")],
            dots=True,
            from_zero=True,
            title=f"Latency of {s.name} against its width",
        )
        + f"<figcaption>{_text(s.name)}</figcaption></figure>"
        for s in staircases
    )
    if not figures:
        return ""
    return (
        f'<section><h2>Staircases of the heaviest segments</h2><div class="grid">{figures}</div>'
        '<p class="caption">Dots are tabulated widths; the segment\'s other width, where it has one, is held at its '
        "chosen value.</p></section>"
    )


def _at(staircase: Staircase, width: float) -> float:
    return float(np.interp(width, staircase.elements, staircase.ms))


def _progress(search: Sequence[Row], training: Sequence[Row]) -> str:
    figures = []
    if len(search) > 1 and all("target" in row for row in search):
        steps = [float(row["step"]) for row in search]
        curves = [
            (steps, [100 * float(row[key]) for row in search], css, label)
            for key, css, label in (("target", "limit-line", "budget"), ("cost", "second", "network being searched"))
            if all(key in row for row in search)
        ]
        figures.append(
            "<figure>"
            + _plot(curves, x_label="search step", y_label="% of dense", title="Budget over the search")
            + "<figcaption>Cost against the ramped budget during the search</figcaption></figure>"
        )
    phases = list(dict.fromkeys(str(row.get("phase", "training")) for row in training))
    for key, label, factor in (("accuracy", "accuracy, %", 100.0), ("loss", "loss", 1.0)):
        curves, start, seams = [], 0, []
        for phase, css in zip(phases, ("first", "second", "third", "first"), strict=False):
            rows = [row for row in training if str(row.get("phase", "training")) == phase and row.get(key) is not None]
            if rows:
                xs = [float(start + i + 1) for i in range(len(rows))]
                curves.append((xs, [factor * float(row[key]) for row in rows], css, phase))
                start += len(rows)
                seams.append(start)
        if curves and start > 1:
            figures.append(
                "<figure>"
                + _plot(curves, x_label="epoch", y_label=label, dots=True, title=f"{label} over training")
                + f"<figcaption>{_text(label.split(',')[0].capitalize())} over training</figcaption></figure>"
            )
    return f'<section><h2>Training</h2><div class="grid">{"".join(figures)}</div></section>' if figures else ""


def _provenance(result: Row, notes: Sequence[str]) -> str:
    shown = "".join(
        f"<tr><th>{_text(key)}</th><td class='left'>{_text(_plain(value))}</td></tr>" for key, value in result.items()
    )
    listed = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return (
        f"<section><h2>Notes</h2><ul>{listed}</ul></section>" if listed else ""
    ) + f"<section><details><summary>Every value of result.json</summary><table>{shown}</table></details></section>"


def _plot(
    curves: Sequence[tuple[Sequence[float], Sequence[float], str, str]],  # (x, y, css class, label)
    *,
    x_label: str,
    y_label: str,
    title: str,
    size: tuple[int, int] = (430, 260),
    marks: Sequence[tuple[float, float, str, str]] = (),  # (x, y, label, css class)
    dots: bool = False,
    from_zero: bool = False,
) -> str:
    """A line plot with axes, grid and a legend."""
    width, height = size
    left, right, top, bottom = 60, 14, 26 if any(label for *_, label in curves) else 12, 40
    xs = [x for curve in curves for x in curve[0]] + [mark[0] for mark in marks]
    ys = [y for curve in curves for y in curve[1]] + [mark[1] for mark in marks]
    finite = [y for y in ys if math.isfinite(y)]
    x_ticks = _ticks(min(xs), max(xs), 5)
    y_ticks = _ticks(0.0 if from_zero else min(finite, default=0.0), max(finite, default=1.0), 5)
    x_low, x_high = min(xs[0], min(xs)), max(xs)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return left + (x - x_low) / ((x_high - x_low) or 1.0) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y_low) / ((y_high - y_low) or 1.0) * (height - top - bottom)

    parts = [f'<path d="M{left} {py(y):.1f}H{width - right}" class="grid-line"/>' for y in y_ticks]
    parts += [f'<text x="{left - 7}" y="{py(y) + 4:.1f}" class="end small">{_number(y)}</text>' for y in y_ticks]
    parts += [
        f'<text x="{px(x):.1f}" y="{height - bottom + 16}" class="middle small">{_number(x)}</text>'
        for x in x_ticks
        if x_low <= x <= x_high
    ]
    x_middle, y_middle = (left + width - right) / 2, (top + height - bottom) / 2
    parts.append(f'<text x="{x_middle}" y="{height - 6}" class="middle small">{_text(x_label)}</text>')
    parts.append(
        f'<text x="10" y="{y_middle}" class="middle small" transform="rotate(-90 10 {y_middle})">'
        f"{_text(y_label)}</text>"
    )
    legend = left
    for x, y, css, label in curves:
        points = [(px(a), py(b)) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
        if points:
            parts.append(f'<path d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in points)}" class="line {css}-line"/>')
        if dots and len(points) <= 60:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" class="{css}"/>' for a, b in points]
        if label:
            parts.append(f'<path d="M{legend} 11h18" class="line {css}-line"/>')
            parts.append(f'<text x="{legend + 24}" y="15" class="small">{_text(label)}</text>')
            legend += 44 + int(6.4 * len(label))
    for at, value, label, css in marks:
        mx, my = px(at), py(value)
        # Curves rise: above is clear to the left of a mark, below to its right.
        place = f'x="{mx - 10:.1f}" y="{my - 9:.1f}" class="small end"' if mx > width - 90 else None
        place = place or f'x="{mx + 10:.1f}" y="{my + 17:.1f}" class="small"'
        told = f"{label}: {_number(at)}, {_ms(value)}"
        parts.append(f'<circle cx="{mx:.1f}" cy="{my:.1f}" r="6" class="{css}"><title>{_text(told)}</title></circle>')
        parts.append(f"<text {place}>{_text(label)} {_number(at)}</text>")
    return _svg(width, height, parts, title)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that enclose an interval."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _svg(width: int, height: int, parts: Iterable[str], title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(title)}">' + "".join(parts) + "</svg>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _count(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _describe(target: object) -> str:
    if isinstance(target, Mapping):
        return str(target.get("description") or ", ".join(f"{k} {v}" for k, v in target.items()))
    return "" if target is None else str(target)


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    return str(value)


_COLOURS = """
:root{color-scheme:light dark;--page:#fafaf8;--card:#fff;--ink:#1d2228;--soft:#667079;--line:#e3e5e8;--track:#eceef0;
--first:#2f6fbd;--second:#d9822b;--third:#3f8f5f;--faint:#c3cbd4;--limit:#c2374a}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--card:#1c2024;--ink:#e6e9ec;--soft:#98a2ac;--line:#30363c;
--track:#2a2f35;--first:#6aa5ea;--second:#f0a457;--third:#6fc593;--faint:#4b545d;--limit:#f07685}}
"""

_MARKS = """
svg text{paint-order:stroke;stroke:var(--card);stroke-width:3px;fill:var(--ink);font-size:13px;font-family:inherit}
svg .small{font-size:12px;fill:var(--soft)}
svg .head{font-size:12px;fill:var(--soft);font-weight:600}svg .end{text-anchor:end}svg .middle{text-anchor:middle}
.first{fill:var(--first)}.second{fill:var(--second)}.third{fill:var(--third)}.faint{fill:var(--faint)}.track{fill:var(--track)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.first-line{stroke:var(--first)}.second-line{stroke:var(--second)}
.third-line{stroke:var(--third)}.limit-line-line{stroke:var(--limit);stroke-dasharray:5 4}
.limit{stroke:var(--limit);stroke-width:2;stroke-dasharray:5 4}svg .limit-text{fill:var(--limit);font-weight:600}
.spread{stroke:var(--ink);stroke-width:2;opacity:.7}.grid-line{stroke:var(--line)}
.mark{fill:var(--card);stroke:var(--second);stroke-width:3}.mark-faint{fill:var(--card);stroke:var(--soft);stroke-width:2}
"""

_STYLE = (
    _COLOURS
    + _MARKS
    + """
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:980px;margin:0 auto;padding:36px 20px 60px}h1{font-size:28px;line-height:1.2;margin:0}
h2{font-size:17px;margin:0 0 14px}.sub{color:var(--soft);margin:6px 0 22px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:0 0 18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:14px;padding:0;border:0;background:none}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px}
.what{color:var(--soft);font-size:13px}.number{font-size:26px;font-weight:650;font-variant-numeric:tabular-nums}
.note,.caption,figcaption{color:var(--soft);font-size:13px}.caption{margin:10px 0 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;border-bottom:1px solid var(--line);text-align:right;overflow-wrap:anywhere}
th:first-child{text-align:left;font-weight:500}thead th{color:var(--soft);font-weight:500}
tr:last-child>*{border-bottom:0}
td.left{text-align:left}summary{cursor:pointer}details table{margin-top:12px;font-size:13px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(380px,100%),1fr));gap:20px}figure{margin:0}
figcaption{text-align:center;overflow-wrap:anywhere}svg{display:block;width:100%;height:auto;overflow:visible}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""
)

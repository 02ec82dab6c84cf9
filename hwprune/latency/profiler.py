"""Measure a program in context: whole forwards at random widths, a clock at every segment's start.

One forward gives a sample of every segment with the caches and the allocator as in life, and the samples add up to the
whole by construction. Every sample goes to the table at once; the surfaces, the knots and the calibration are computed
from the table, so an interrupted profile continues and a finished one costs nothing.
"""

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from hwprune.errors import InvalidInput, UnknownWorkload
from hwprune.graph import Axis, Program, Segment, keep_first, leftovers, resize, segments
from hwprune.latency.model import CostAxis, CostModel, CostTerm
from hwprune.latency.runtimes import Clocked, build, isolated
from hwprune.latency.surface import Share, Surface, fit_rates, fit_surface
from hwprune.latency.table import LatencyTable
from hwprune.latency.target import Target
from hwprune.latency.timing import Reference, block_count, measure, settings, watch
from hwprune.latency.turns import alone

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Sampling = Literal["context", "isolated"]

DEFAULT_SECONDS = 75.0
CELL_SHARE = 0.1  # of the cells of all segments' full grids, at most so many are measured
MOST_FORWARDS = 200  # width vectors whose segments are sampled
CALIBRATIONS = 28  # width vectors measured only as a whole
LEAST_FORWARDS = 40  # even where the time is over: fewer say nothing about a plane
LEAST_CALIBRATIONS = 10
LEAST_WHOLE_FORWARDS = 24  # where a runtime hides its segments: rates of a few kinds of work are fitted, not planes
REMOVALS = 16  # width vectors without some residual blocks, for what is left of their segments
LEAST_REMOVALS = 3  # samples of such a rest; with fewer, what the narrowest block took stands for it
CORNERS = 8  # the first vectors: dense, least, and random halves of the groups at either end
CANDIDATES = 6  # of so many random vectors, the one the surfaces know least about is measured
FIRST_FIT = 60  # vectors before the surfaces are asked
REFIT_EVERY = 50
SETTLED = 0.007  # two fits in a row that differ by less at the median need no third
BLOCKS_PER_VECTOR = 3
RETRY_DRIFT = 0.1  # a vector next to which the reference drifted further is measured again
MOST_RETRIES = 0.25  # of all vectors
MOST_KNOTS = 24
_BASE_KNOTS = 9
_KNOT_ERROR = 0.004  # of the summed cost along an axis, by which linear interpolation may miss the surface


@dataclass(frozen=True, eq=False)
class Plan:
    """What there is to measure of one program."""

    program: Program
    segments: tuple[Segment, ...]
    key: str  # identifies the program in a table that several share
    grid_cells: int  # integer sizes of all planes, one plane per signature
    ladders: tuple[Ints, ...]  # widths each group is measured at
    left: dict[tuple[int, int], Segment]  # of a segment when a group has no channel, see `leftovers`

    @classmethod
    def of(cls, program: Program) -> "Plan":
        """Cut the program and choose the widths to measure."""
        parts = segments(program)
        text = json.dumps([[s.signature, [axis.key for axis in s.axes]] for s in parts])
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        planes = {segment.signature: segment.axes for segment in parts}
        cells = sum(int(np.prod([_reachable(axis, program) for axis in axes])) for axes in planes.values())
        ladders = tuple(_ladder(int(width)) for width in program.groups.widths)
        return cls(program, parts, key, cells, ladders, leftovers(program, parts))

    def sizes(self, widths: Ints) -> list[tuple[int, ...]]:
        """The sizes of every segment at `widths` [G]."""
        return [tuple(_sizes(segment, widths)) for segment in self.segments]

    def random(self, rng: np.random.Generator, on_ladder: bool) -> Ints:
        """A random reachable vector [G]: half of them with a common level, so that small and large networks occur."""
        full = self.program.groups.widths
        if rng.random() < 0.5:
            ratio = rng.random(len(full))
        else:
            ratio = np.clip(rng.random() + 0.5 * (rng.random(len(full)) - 0.5), 0.0, 1.0)
        wanted = np.maximum(1, np.ceil(ratio * full)).astype(np.int64)
        if not on_ladder:
            return wanted
        return np.array([line[np.abs(line - w).argmin()] for line, w in zip(self.ladders, wanted, strict=True)])

    def removal(self, rng: np.random.Generator) -> Ints:
        """A random vector [G] in which half of the residual blocks have no channel."""
        removable = self.program.groups.removable
        removed = removable & (rng.random(len(removable)) < 0.5)
        return np.where(removed | (self.program.blocks.implied[removed].any(0) & removable), 0, self.random(rng, True))

    def rests(self, widths: Ints) -> list[tuple[int, Segment]]:
        """What is left of segments at `widths` [G], those that have lost calls: index and segment."""
        return [(index, rest) for (index, group), rest in self.left.items() if widths[group] == 0]

    def corner(self, index: int) -> Ints:
        """Dense, least, then halves of the groups at either end, each with its complement."""
        full = self.program.groups.widths
        if index < 2:
            return full if index == 0 else np.ones_like(full)
        pair = np.random.default_rng([17, index // 2])
        ends = pair.random(len(full)) < 0.5
        return np.where(ends ^ bool(index % 2), full, np.ones_like(full))


def _reachable(axis: Axis, program: Program) -> int:
    """How many different sizes an axis can have."""
    step = int(np.gcd.reduce(axis.weights))
    most = int((axis.weights * program.groups.widths[axis.groups]).sum())
    return (most - int(axis.weights.sum())) // step + 1


def _ladder(width: int) -> Ints:
    """The widths a group is measured at: about √(1/10) of all, block edges first, some off them, both ends."""
    count = int(np.clip(round(np.sqrt(CELL_SHARE) * width), 4, 32))
    if width <= count:
        return np.arange(1, width + 1)
    step = next((s for s in (64, 32, 16, 8, 4, 2, 1) if width / s <= 0.67 * count or s == 1), 1)
    while width / step > 0.67 * count:
        step *= 2
    edges = np.unique(np.concatenate([[1, width], np.arange(step, width, step)]))
    others = np.setdiff1d(np.arange(2, width), edges)
    spread = np.random.default_rng(width).permutation(others)[: max(count - len(edges), 1)]
    return np.unique(np.concatenate([edges, spread])).astype(np.int64)


@dataclass
class _Progress:
    """A bar with the time left on a terminal, one line elsewhere, nothing when not asked for."""

    shown: bool
    total_s: float
    _bar: Any = field(default=None)

    def __enter__(self) -> "_Progress":
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task("profiling", total=1.0, note="")
        elif self.shown:
            print(f"profiling for about {self.total_s:.0f} s", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: float, note: str) -> None:
        """done: share of the whole, 0..1."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=min(done, 1.0), note=note)


def profile(
    program: Program,
    target: Target,
    table: LatencyTable,
    *,
    seconds: float | None = None,
    progress: bool = True,
    seed: int = 0,
    sampling: Sampling = "context",
) -> CostModel:
    """Measure what the program's widths cost on `target` until `seconds` are spent or enough is known.

    Samples already in `table` count, with the time they took; a table that holds enough is only read. Returns the
    latency model in ms. `sampling="isolated"` times every segment alone with cold weights instead of in context, for
    comparison.
    """
    target.require()
    if seconds is not None and seconds <= 0:
        raise InvalidInput(f"profile was given {seconds} seconds; give a positive number.")
    plan = Plan.of(program)
    _Profiler(plan, target, table, seconds or DEFAULT_SECONDS, seed, sampling).run(progress)
    return latency_model(program, table, plan=plan)


class _Profiler:
    def __init__(
        self, plan: Plan, target: Target, table: LatencyTable, seconds: float, seed: int, sampling: Sampling
    ) -> None:
        self.plan = plan
        self.target = target
        self.table = table
        self.seconds = seconds
        self.seed = seed
        self.sampling = sampling
        self.clocked = target.runtime == "eager"
        self.cells: set[tuple[str, tuple[int, ...]]] = set()
        self.vectors: list[Ints] = []
        self.calibrations = self.removals = 0
        self.spent_s = 0.0
        self.retries = 0
        self.surfaces: dict[str, Surface] = {}
        self.refit_at = 0
        self.settled = False
        for record in table.of_program(plan.key):
            self.note(np.array(record["widths"], dtype=np.int64), record["role"], record.get("took_s", 0.0))
            self.settled |= record.get("settled", False)

    def note(self, widths: Ints, role: str, took_s: float) -> None:
        """Count a measured vector."""
        self.spent_s += took_s
        if role == "fit":
            self.vectors.append(widths)
            self.cells.update(self.new_cells(widths))
        elif role == "removal":
            self.removals += 1
        else:
            self.calibrations += 1

    def new_cells(self, widths: Ints) -> set[tuple[str, tuple[int, ...]]]:
        cells = zip(self.plan.segments, self.plan.sizes(widths), strict=True)
        return {(segment.signature, size) for segment, size in cells if segment.axes} - self.cells

    @property
    def finished(self) -> bool:
        fits, calibrations = len(self.vectors), self.calibrations
        if self.settled or (fits >= MOST_FORWARDS and calibrations >= CALIBRATIONS):
            return True
        least = LEAST_FORWARDS if self.clocked else LEAST_WHOLE_FORWARDS
        return self.spent_s >= self.seconds and fits >= least and calibrations >= least // 4

    def run(self, progress: bool) -> None:
        if self.finished:
            return
        self.counted_to = time.monotonic()
        dense = resize(self.plan.program, np.ones(self.plan.program.groups.total, dtype=np.bool_))
        inputs = self.plan.program.example_inputs
        self.reference = Reference.start(build(self.target, dense), inputs, self.target)
        again: list[tuple[Ints, str]] = []
        with _Progress(progress, self.seconds - self.spent_s) as bar:
            while not self.finished:
                widths, role = self.next_vector()
                self.sample(widths, role, again)
                if len(again) >= 8:
                    self.repeat(again)
                done = max(self.spent_s / self.seconds, len(self.vectors) / MOST_FORWARDS)
                bar.show(done, f"{len(self.vectors)} networks, {len(self.cells)} cells")
            self.repeat(again)

    def next_vector(self) -> tuple[Ints, str]:
        """The next vector by how many there are, so that a continued profile goes on where it stopped."""
        fits, calibrations = len(self.vectors), self.calibrations
        rng = np.random.default_rng([self.seed, fits, calibrations])
        wanted = np.interp(fits, [CORNERS, LEAST_FORWARDS, MOST_FORWARDS], [0, LEAST_CALIBRATIONS, CALIBRATIONS])
        if calibrations < wanted:  # both ends first: an intercept is not to be extrapolated
            ends = calibrations < 2
            return self.plan.corner(calibrations) if ends else self.plan.random(rng, False), "calibration"
        if fits < CORNERS:
            return self.plan.corner(fits), "fit"
        wanted = np.interp(fits, [CORNERS, MOST_FORWARDS / 2], [1, REMOVALS])
        if self.clocked and self.plan.left and self.removals < wanted:
            return self.plan.removal(np.random.default_rng([self.seed, self.removals, 29])), "removal"
        allowed = CELL_SHARE * self.plan.grid_cells - len(self.cells)
        candidates = [self.plan.random(rng, on_ladder=True) for _ in range(CANDIDATES)]
        candidates = [widths for widths in candidates if len(self.new_cells(widths)) <= allowed]
        if not candidates:
            return self.vectors[int(rng.integers(len(self.vectors)))], "fit"
        return candidates[int(np.argmax(self.ignorance(np.stack(candidates))))], "fit"

    def ignorance(self, candidates: Ints) -> Floats:
        """What measuring each of `candidates` [N, G] would teach: the doubt of its prediction in µs, relative. [N]

        While there are no surfaces yet, the number of cells that were not seen.
        """
        fits = len(self.vectors)
        if not self.clocked or fits < FIRST_FIT:
            return np.array([len(self.new_cells(widths)) for widths in candidates], dtype=np.float64)
        if fits >= self.refit_at:
            self.refit()
        cost, doubt = self.estimate(candidates)
        return doubt / cost

    def refit(self) -> None:
        """Fit all samples so far, and see whether that still changes what is predicted."""
        rng = np.random.default_rng(self.seed)
        probes = np.stack([self.plan.random(rng, on_ladder=False) for _ in range(64)])
        before = self.estimate(probes)[0] if self.surfaces else None
        self.surfaces, self.refit_at = fit_surfaces(self.plan, self.table), len(self.vectors) + REFIT_EVERY
        if before is not None and self.calibrations >= LEAST_CALIBRATIONS:
            change = np.abs(self.estimate(probes)[0] / before - 1)
            self.settled = bool(np.median(change) < SETTLED)

    def estimate(self, candidates: Ints) -> tuple[Floats, Floats]:
        """(µs, its standard deviation) of whole forwards at `candidates` [N, G], segment errors added up. [N] each"""
        sizes: dict[str, list[Floats]] = defaultdict(list)
        for segment in self.plan.segments:
            if segment.signature in self.surfaces:
                elements = [axis.elements(candidates) for axis in segment.axes]
                sizes[segment.signature].append(np.stack(elements, 1) if elements else np.zeros((len(candidates), 0)))
        cost, doubt = np.zeros(len(candidates)), np.zeros(len(candidates))
        for signature, parts in sizes.items():
            points = np.concatenate(parts).astype(np.float64)
            times = self.surfaces[signature](points)
            cost += times.reshape(len(parts), -1).sum(0)
            doubt += (times * self.surfaces[signature].spread(points)).reshape(len(parts), -1).sum(0)
        return cost, doubt

    def repeat(self, again: list[tuple[Ints, str]]) -> None:
        """Measure once more what was measured in a slow spell."""
        todo, again[:] = list(again), []
        for widths, role in todo:
            self.retries += 1
            self.sample(widths, role, None)

    def sample(self, widths: Ints, role: str, again: list[tuple[Ints, str]] | None) -> None:
        graph_module = resize(self.plan.program, keep_first(self.plan.program.groups, widths))
        with alone(), settings(self.target), watch() as usage:
            if role != "calibration" and self.clocked:
                times, totals, reference_us = self.clocked_blocks(graph_module)
                summary = _summary(totals)
            else:
                summary, reference_us = self.whole(graph_module)
                times = None
        drift = reference_us / (self.reference.quiet_ms * 1e3)
        now = time.monotonic()
        took_s, self.counted_to = now - self.counted_to, now
        forward = len(self.vectors) + self.calibrations + self.removals
        common = {
            "program": self.plan.key,
            "forward": forward,
            "reference_us": round(reference_us, 3),
            "contention": round(usage.contention, 4),
        }
        records = [] if times is None else self.segment_records(widths, times, common)
        whole = {"kind": "whole", **common, "widths": widths.tolist(), "role": role, **summary}
        whole |= {"took_s": round(took_s, 4), "sampling": self.sampling if self.clocked else "whole"}
        whole |= {"settled": True} if self.settled else {}
        self.table.extend([*records, whole])
        self.note(widths, role, took_s)
        wanted = MOST_RETRIES * MOST_FORWARDS
        if again is not None and abs(drift - 1) > RETRY_DRIFT and self.retries + len(again) < wanted:
            again.append((widths, role))

    def segment_records(self, widths: Ints, times: Floats, common: dict[str, Any]) -> list[dict[str, Any]]:
        timed = [*enumerate(self.plan.segments)] if widths.all() else self.plan.rests(widths)
        return [
            {"kind": "segment", "signature": segment.signature, "sizes": _sizes(segment, widths)}
            | common
            | _summary(times[:, index])
            for index, segment in timed
            if times[:, index].any()
        ]

    def clocked_blocks(self, graph_module: torch.fx.GraphModule) -> tuple[Floats, Floats, float]:
        """Segment times [runs, segments] and totals [runs] in µs at the level of the returned reference time."""
        inputs = self.plan.program.example_inputs
        nodes = [segment.nodes for segment in self.plan.segments]
        network = Clocked(self.target, graph_module, nodes)
        known = [float(network.times_us(inputs, 1, warmup=3).sum()) / 1e3]
        blocks, references = [], []
        for _ in range(BLOCKS_PER_VECTOR):
            references.append(self.reference.block_ms(self.target) * 1e3)
            blocks.append(network.times_us(inputs, block_count(known), warmup=1))
        level = float(np.median(references))
        times = np.concatenate([block * (level / us) for block, us in zip(blocks, references, strict=True)])
        totals = times.sum(1)
        if self.sampling == "isolated":
            times = self.isolated_times(graph_module)
        return times, totals, level

    def isolated_times(self, graph_module: torch.fx.GraphModule) -> Floats:
        """The same segments one at a time, weights cold. [runs, segments]"""
        columns = []
        for segment in self.plan.segments:
            cut_out = isolated(self.target, graph_module, segment.nodes, self.plan.program.example_inputs)
            cut_out.times_us(8)
            columns.append(cut_out.times_us(16))
        return np.stack(columns, axis=1)

    def whole(self, graph_module: torch.fx.GraphModule) -> tuple[dict[str, Any], float]:
        """(end-to-end times in µs, reference time in µs): measured as every finished network is."""
        run = build(self.target, graph_module)
        found = measure(
            run, self.plan.program.example_inputs, self.target, seconds=0.1, min_blocks=4, reference=self.reference
        )
        level = found.drift * 1e3
        quantiles = {"median_us": found.median_ms, "p20_us": found.p20_ms, "p80_us": found.p80_ms}
        summary = {name: round(ms * level, 4) for name, ms in quantiles.items()}
        return {**summary, "count": found.count}, self.reference.quiet_ms * level


def _sizes(segment: Segment, widths: Ints) -> list[int]:
    return [int(axis.elements(widths)) for axis in segment.axes]


def _summary(times_us: Floats) -> dict[str, Any]:
    p20, median, p80 = np.quantile(times_us, [0.2, 0.5, 0.8])
    return {
        "median_us": round(float(median), 4),
        "p20_us": round(float(p20), 4),
        "p80_us": round(float(p80), 4),
        "count": len(times_us),
    }


# -- from the table to the model


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples of one signature, drift divided out."""

    sizes: Floats  # [N, axes]
    times_us: Floats  # [N]
    doubt: Floats  # [N] >= 1, larger where the machine drifted


def samples_of(table: LatencyTable) -> dict[str, Samples]:
    """The table's segment samples by signature, each divided by the drift of its program's reference."""
    quiet = quiet_levels_us(table)
    rows: dict[str, list[tuple[Any, float, float]]] = defaultdict(list)
    for record in table.records:
        if record["kind"] == "segment" and record["program"] in quiet:
            drift = record["reference_us"] / quiet[record["program"]]
            rows[record["signature"]].append((record["sizes"], record["median_us"] / drift, _doubt(drift)))
    found = {}
    for signature, samples in rows.items():
        sizes, times, doubt = zip(*samples, strict=True)
        axes = len(sizes[0])
        found[signature] = Samples(
            np.array(sizes, dtype=np.float64).reshape(len(times), axes), np.array(times), np.array(doubt)
        )
    return found


def quiet_levels_us(table: LatencyTable) -> dict[str, float]:
    """Per program the reference's time on the quiet machine: the 20 % quantile of what was seen."""
    seen: dict[str, list[float]] = defaultdict(list)
    for record in table.records:
        if record["kind"] == "whole":
            seen[record["program"]].append(record["reference_us"])
    return {program: float(np.quantile(times, 0.2)) for program, times in seen.items()}


def _doubt(drift: float) -> float:
    """A division by the drift repairs a slow spell only in part: memory-bound segments slow down more."""
    return float(np.hypot(1.0, (drift - 1.0) / 0.05))


def latency_model(program: Program, table: LatencyTable, *, plan: Plan | None = None) -> CostModel:
    """Fit the table's samples: surfaces per signature, knots where they bend, and the whole-model calibration.

    Raises UnknownWorkload if the table lacks a segment of the program.
    """
    plan = plan or Plan.of(program)
    wholes = table.of_program(plan.key)
    if not wholes:
        raise UnknownWorkload(f"the table holds no forward of {program.name} at this batch; profile it first.")
    clocked = table.target.runtime == "eager"
    surfaces: Mapping[str, Surface | Share] = fit_surfaces(plan, table) if clocked else fit_shares(plan, table)
    axes, terms = tabulate(plan, surfaces)
    full = np.asarray(program.groups.widths, dtype=np.int64)
    model = CostModel("ms", full, axes, terms, scale=1e-3)
    scale, offset, residual = calibrate(model, plan, table)
    cells = {(r["signature"], tuple(r["sizes"])) for r in table.records if r["kind"] == "segment" and r["sizes"]}
    ours = {segment.signature for segment in plan.segments}
    quiet_us = quiet_levels_us(table)[plan.key]
    noises = [surface.noise for surface in surfaces.values() if isinstance(surface, Surface)]
    facts = {
        "forwards": sum(r["role"] == "fit" for r in wholes),
        "calibrations": sum(r["role"] == "calibration" for r in wholes),
        "cells_measured": sum(signature in ours for signature, _ in cells),
        "cells_of_full_grid": plan.grid_cells,
        "measuring_s": round(sum(r.get("took_s", 0.0) for r in wholes), 2),
        "reference_ms": round(quiet_us / 1e3, 5),
        "drift_p90": round(float(np.quantile([r["reference_us"] for r in wholes], 0.9)) / quiet_us, 4),
        "contention_median": round(float(np.median([r.get("contention", 0.0) for r in wholes])), 4),
        "sample_noise": round(float(np.median(noises)), 4) if noises else None,
        "dense_measured_ms": _measured_ms(wholes, full, quiet_us),
    }
    removable, implied = program.groups.removable, program.blocks.implied
    return CostModel(
        "ms", full, axes, terms, scale, offset, residual, removable=removable, implied=implied, facts=facts
    )


def _measured_ms(wholes: Sequence[dict[str, Any]], widths: Ints, quiet_us: float) -> float | None:
    times = [r["median_us"] / r["reference_us"] for r in wholes if r["widths"] == widths.tolist()]
    return round(float(np.median(times)) * quiet_us / 1e3, 5) if times else None


def fit_shares(plan: Plan, table: LatencyTable) -> dict[str, Share]:
    """One share of the whole per signature, where the runtime lets only whole forwards be timed."""
    shares: dict[str, Share] = {}
    kinds: dict[str, int] = {}
    kind_of: dict[str, int] = {}
    values = {node.name: node.meta.get("val") for node in plan.program.module.graph.nodes}
    for segment in plan.segments:
        outputs = [values.get(name) for name in segment.nodes]
        written = float(sum(value.numel() for value in outputs if isinstance(value, torch.Tensor)))
        amounts = np.array([segment.macs, segment.macs, written, 1.0])
        full = np.array([axis.size for axis in segment.axes], dtype=np.float64)
        shares[segment.signature] = Share(amounts, segment.powers, full, np.zeros(4))
        kind = segment.description.split("->")[0].strip()
        kind_of[segment.signature] = kinds.setdefault(kind, len(kinds))
    quiet = quiet_levels_us(table)[plan.key]
    wholes = [r for r in table.of_program(plan.key) if r["role"] == "fit"]
    widths = np.array([r["widths"] for r in wholes], dtype=np.int64)
    work = np.zeros((len(wholes), len(kinds), 4))
    for segment in plan.segments:
        sizes = [axis.elements(widths) for axis in segment.axes]
        points = np.stack(sizes, 1).astype(np.float64) if sizes else np.zeros((len(wholes), 0))
        work[:, kind_of[segment.signature]] += shares[segment.signature].work(points)
    drift = np.array([r["reference_us"] for r in wholes]) / quiet
    times = np.array([r["median_us"] for r in wholes]) / drift
    doubt = np.array([_doubt(d) for d in drift])
    rates = fit_rates(work.reshape(len(wholes), -1), times, doubt).reshape(len(kinds), 4)
    return {signature: replace(share, rates=rates[kind_of[signature]]) for signature, share in shares.items()}


def fit_surfaces(plan: Plan, table: LatencyTable) -> dict[str, Surface]:
    """One surface per signature of the program."""
    samples = samples_of(table)
    surfaces: dict[str, Surface] = {}
    for segment in plan.segments:
        signature = segment.signature
        if signature in surfaces or signature not in samples:
            continue
        found = samples[signature]
        surfaces[signature] = fit_surface(found.sizes, found.times_us, found.doubt)
    missing = [segment for segment in plan.segments if segment.signature not in surfaces]
    if missing and not _folded_away(missing, plan, samples):
        raise UnknownWorkload(
            f"the table holds no measurement of {missing[0].description} ({missing[0].name}); profile this program."
        )
    for rest in plan.left.values():
        own = samples.get(rest.signature)
        if own is not None and len(own.times_us) >= LEAST_REMOVALS and rest.signature not in surfaces:
            surfaces[rest.signature] = fit_surface(own.sizes, own.times_us, own.doubt)
    return surfaces


def _folded_away(missing: Sequence[Segment], plan: Plan, samples: dict[str, Samples]) -> bool:
    """Whether the segments without samples have nothing left to run: only what deployment merges into others."""
    modules = {node.name: node for node in plan.program.module.graph.nodes}
    merged = ("batch_norm", "dropout", "getitem")
    return all(any(part in str(modules[name].target) for part in merged) for s in missing for name in s.nodes)


def tabulate(plan: Plan, surfaces: Mapping[str, Surface | Share]) -> tuple[tuple[CostAxis, ...], tuple[CostTerm, ...]]:
    """Evaluate the surfaces on knots: few and even where they are straight, more where they bend or step."""
    places: dict[Any, int] = {}
    lines: list[Axis] = []
    for segment in plan.segments:
        for axis in segment.axes:
            if axis.key not in places:
                places[axis.key] = len(lines)
                lines.append(axis)
    profiles: list[list[Floats]] = [[] for _ in lines]
    candidates = [_candidate_sizes(axis) for axis in lines]
    for segment in plan.segments:
        if segment.signature not in surfaces:
            continue
        for dim, axis in enumerate(segment.axes):
            at = places[axis.key]
            others = [_spaced(candidates[places[other.key]], 5) for d, other in enumerate(segment.axes) if d != dim]
            grid = np.meshgrid(candidates[at], *others, indexing="ij")
            points = np.stack([part.ravel() for part in (grid if dim == 0 else grid[::-1])], axis=1)
            profiles[at].append(surfaces[segment.signature](points).reshape(len(candidates[at]), -1))
    axes = tuple(
        CostAxis(line.groups, line.weights, line.offset, _knots(sizes, columns))
        for line, sizes, columns in zip(lines, candidates, profiles, strict=True)
    )
    terms = []
    for segment in plan.segments:
        if segment.signature not in surfaces:
            continue
        used = tuple(places[axis.key] for axis in segment.axes)
        grid = np.meshgrid(*[axes[at].knots for at in used], indexing="ij")
        points = np.stack([part.ravel() for part in grid], axis=1) if used else np.zeros((1, 0))
        values = surfaces[segment.signature](points.astype(np.float64)).reshape([len(axes[at].knots) for at in used])
        left = {}
        for (index, group), rest in plan.left.items():
            if plan.segments[index] is segment:
                dim = next(d for d, axis in enumerate(segment.axes) if group in axis.groups)
                knots = axes[used[1 - dim]].knots if values.ndim > 1 else None
                left[used[dim]] = _of_rest(rest, values, dim, knots, surfaces)
        terms.append(CostTerm(segment.name, used, values, left))
    return axes, tuple(terms)


def _of_rest(
    rest: Segment, values: Floats, dim: int, knots: Ints | None, surfaces: Mapping[str, Surface | Share]
) -> Floats:
    """What is left of a segment without its axis `dim`, on the knots of the other one, if there is one. [] or [K]

    Where it was not measured, what the segment takes at the least size of the axis: never too little.
    """
    if rest.signature not in surfaces:
        return np.asarray(values.take(0, dim))
    if not rest.axes:
        return np.asarray(surfaces[rest.signature](np.zeros((1, 0)))[0])
    assert knots is not None
    return surfaces[rest.signature](knots[:, None].astype(np.float64))


def _candidate_sizes(axis: Axis) -> Floats:
    """Sizes where a knot may stand: all of a short axis, block edges and the first size after them of a long one."""
    least = axis.offset + int(axis.weights.sum())
    step = int(np.gcd.reduce(axis.weights))
    every = np.arange(least, axis.size + 1, step)
    if len(every) <= 160:
        return every.astype(np.float64)
    block = 16 if axis.size <= 1024 else 32
    edges = np.arange(block, axis.size, block)
    wanted = np.unique(np.concatenate([[least, axis.size], edges, edges + 1]))
    wanted = least + np.ceil((wanted - least) / step).astype(np.int64) * step
    return np.unique(wanted[(wanted >= least) & (wanted <= axis.size)]).astype(np.float64)


def _spaced(sizes: Floats, count: int) -> Floats:
    return np.asarray(sizes[np.unique(np.linspace(0, len(sizes) - 1, count).round().astype(int))])


def _knots(sizes: Floats, curves: Sequence[Floats]) -> Ints:
    """Even, round sizes, then one more at a time where linear interpolation of `curves` [sizes, any] misses most."""
    block = next((b for b in (64, 32, 16, 8, 4, 2) if sizes[-1] / b >= _BASE_KNOTS - 1), 1)
    even = np.intersect1d(np.arange(block, sizes[-1] + 1, block), sizes)  # a block's edge is where a step ends
    chosen = {float(sizes[0]), float(sizes[-1])} | set(_spaced(even, 2 * _BASE_KNOTS).tolist() if len(even) else [])
    if not curves:
        return np.array(sorted(chosen), dtype=np.int64)
    columns = np.concatenate(curves, axis=1)
    weight = columns.sum(1)
    while len(chosen) < min(MOST_KNOTS, len(sizes)):
        at = np.searchsorted(sizes, sorted(chosen))
        position = np.interp(sizes, sizes[at], np.arange(len(at)))
        low = np.minimum(position.astype(int), len(at) - 2)
        part = (position - low)[:, None]
        guess = columns[at[low]] * (1 - part) + columns[at[low + 1]] * part
        miss = np.abs(guess - columns).sum(1) / weight
        worst = int(miss.argmax())
        if miss[worst] < _KNOT_ERROR:
            break
        chosen.add(float(sizes[worst]))
    return np.array(sorted(chosen), dtype=np.int64)


def calibrate(model: CostModel, plan: Plan, table: LatencyTable) -> tuple[float, float, float]:
    """(scale, offset, residual) of ms = scale · Σ terms + offset, fitted to forwards the tables have not seen.

    Relative errors, outliers and slow spells doubted. Samples in context add up to the whole by construction, so their
    sums at the dense and the least widths stand as one observation each: few or disturbed forwards tilt no line. What
    is added up are medians, which lie below the median of the sums where times are skewed; clocked forwards tell by how
    much. residual: robust relative standard deviation left.
    """
    quiet = quiet_levels_us(table)[plan.key]
    records = table.of_program(plan.key)

    def observed(role: str) -> tuple[Floats, Floats, Floats]:
        """Sums [N] in the terms' unit, measured ms [N] and doubt [N] of the forwards of a role."""
        wholes = [r for r in records if r["role"] == role]
        drift = np.array([r["reference_us"] for r in wholes]) / quiet
        widths = np.array([r["widths"] for r in wholes], dtype=np.int64).reshape(-1, len(model.full))
        sums = model.predict(widths) / model.scale
        return sums, np.array([r["median_us"] for r in wholes]) / drift / 1e3, np.array([_doubt(d) for d in drift])

    role = "calibration" if any(r["role"] == "calibration" for r in records) else "fit"
    sums, measured, doubt = observed(role)
    if any(r.get("sampling") == "context" for r in records):
        clocked_sums, clocked, _ = observed("fit")
        ends = model.predict(np.stack([model.full, model.least])) / model.scale
        whole_per_sum = np.median(clocked / clocked_sums) if len(clocked) else 1e-3
        sums, doubt = np.append(sums, ends), np.append(doubt, [1.0, 1.0])
        measured = np.append(measured, ends * whole_per_sum)
    weight = 1.0 / doubt
    for _ in range(4):
        design = np.stack([sums / measured, 1.0 / measured], axis=1) * weight[:, None]
        # what no segment's clock sees can only add time, and a network never costs nothing: no negative intercept
        (scale, offset), _ = nnls(design, weight)
        error = (scale * sums + offset) / measured - 1
        typical = 1.4826 * float(np.median(np.abs(error / doubt))) + 1e-4
        weight = 1.0 / (doubt * np.maximum(1.0, np.abs(error / doubt) / (2 * typical)))
    return float(scale), float(offset), typical


def random_widths(program: Program, count: int, seed: int) -> Iterator[Ints]:
    """Random reachable width vectors [G], any integer width, for checking a model against measurements."""
    plan = Plan.of(program)
    rng = np.random.default_rng([seed, 991])
    for _ in range(count):
        yield plan.random(rng, on_ladder=False)

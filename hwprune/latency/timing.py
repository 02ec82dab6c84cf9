"""How a time is taken: blocks that alternate with a fixed reference workload, medians, and a watch on the neighbours.

A machine drifts: clocks, caches and memory are shared with other processes, and a slow spell lasts seconds. So the
candidate never runs alone. Each block of its runs is preceded by runs of a reference (the dense network), and is
divided by the reference's drift from its own quiet level; blocks in which it drifted far are taken again.
"""

import ctypes
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hwprune.latency.target import Target
from hwprune.latency.turns import alone

Floats = NDArray[np.float64]
Runnable = Callable[..., Any]

QUIET_DRIFT = 0.05  # a block counts as quiet while the reference is within this of its usual level
USUAL_BLOCKS = 60  # the reference's last ones, whose median is its usual level
BLOCK_MS = 12.0  # long against the clock and the caches' refill, short against a slow spell


@dataclass(frozen=True)
class Sample:
    """One measurement of one whole forward.

    median_ms and the quantiles are divided by `drift`, the reference's slowdown while they were taken (1.0 without a
    reference). contention: share of the machine's CPU time that others used or the hypervisor withheld, 0..1.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    count: int
    contention: float
    drift: float = 1.0


@dataclass
class Reference:
    """A fixed workload and the time it takes when the machine is quiet.

    That is `level_ms` where an earlier session established it (``facts["reference_ms"]`` of a latency model, so that
    what is measured now compares with the table), else the lower fifth of the blocks so far.
    """

    run: Runnable
    inputs: Sequence[torch.Tensor]
    history_ms: list[float]
    level_ms: float | None = None

    @classmethod
    def start(
        cls,
        run: Runnable,
        inputs: Sequence[torch.Tensor],
        target: Target,
        blocks: int = 20,
        level_ms: float | None = None,
    ) -> "Reference":
        """Warm the workload up and find its quiet level."""
        reference = cls(run, inputs, [], level_ms)
        with alone(), settings(target):
            for _ in range(3):
                time_runs(run, inputs, target, 1)
            for _ in range(blocks):
                reference.block_ms(target)
        return reference

    @property
    def quiet_ms(self) -> float:
        """The given level, or the 20 % quantile of the blocks seen."""
        return self.seen_ms if self.level_ms is None else self.level_ms

    @property
    def seen_ms(self) -> float:
        """The 20 % quantile of the blocks seen."""
        return float(np.quantile(self.history_ms, 0.2))

    @property
    def usual_ms(self) -> float:
        """The median of the last blocks seen."""
        return float(np.median(self.history_ms[-USUAL_BLOCKS:]))

    def block_ms(self, target: Target) -> float:
        """Run it a few times; the first run refills the caches and is not counted."""
        block = time_runs(self.run, self.inputs, target, block_count(self.history_ms), warmup=1)
        median = float(np.median(block))
        self.history_ms.append(median)
        return median


def block_count(known_ms: Sequence[float], block_ms: float = BLOCK_MS, most: int = 8) -> int:
    """Runs that fill a block, given times of the same workload; 2 while nothing is known."""
    return int(np.clip(block_ms / max(np.median(known_ms), 1e-3), 1, most)) if len(known_ms) else 2


def measure(
    run: Runnable,
    inputs: Sequence[torch.Tensor],
    target: Target,
    *,
    seconds: float = 1.0,
    min_blocks: int = 5,
    reference: Reference | None = None,
) -> Sample:
    """Time `run(*inputs)` on `target`.

    Blocks of runs alternate with `reference` until `seconds` have passed and `min_blocks` of them were quiet; after
    three times that the quietest ones are taken as they are. Without a reference every block counts. Quiet is what is
    near the reference's usual level of these seconds: choosing by nearness to its quiet level would choose the blocks
    in which the reference was lucky, and divide by too little.
    """
    blocks: list[Floats] = []
    drifts: list[float] = []
    with alone(), settings(target), watch() as usage:
        warm = [float(time_runs(run, inputs, target, 1)[0]) for _ in range(3)]
        known = warm[-1:]
        begin = time.monotonic()
        while True:
            drift = reference.block_ms(target) / reference.quiet_ms if reference else 1.0
            usual = reference.usual_ms / reference.quiet_ms if reference else 1.0
            block = time_runs(run, inputs, target, block_count(known, BLOCK_MS, 10), warmup=1)
            known.append(float(np.median(block)))
            blocks.append(block)
            drifts.append(drift)
            spent = time.monotonic() - begin
            quiet = sum(abs(d / usual - 1) <= QUIET_DRIFT for d in drifts)
            if (spent >= seconds and quiet >= min_blocks) or (spent >= 3 * seconds and len(blocks) >= min_blocks):
                break
    keep = np.argsort(np.abs(np.array(drifts) / usual - 1), kind="stable")[: max(quiet, min_blocks)]
    times = np.concatenate([blocks[i] / drifts[i] for i in keep])
    p20, median, p80 = np.quantile(times, [0.2, 0.5, 0.8])
    drift = float(np.median([drifts[i] for i in keep]))
    return Sample(float(median), float(p20), float(p80), len(times), usage.contention, drift)


def time_runs(run: Runnable, inputs: Sequence[torch.Tensor], target: Target, count: int, *, warmup: int = 0) -> Floats:
    """Milliseconds of consecutive forwards, those left out in which the CPU was taken away. [count or fewer]"""
    for _ in range(warmup):
        run(*inputs)
    if target.is_cuda:
        return _time_runs_cuda(run, inputs, target, count)
    clock, used = time.perf_counter_ns, time.process_time_ns
    wall, cpu = np.empty(count), np.empty(count)
    with torch.inference_mode():
        for i in range(count):
            busy, begin = used(), clock()
            run(*inputs)
            wall[i], cpu[i] = clock() - begin, used() - busy
    return wall[undisturbed(wall, cpu)] / 1e6


def undisturbed(wall: Floats, cpu: Floats) -> NDArray[np.bool_]:
    """Which runs kept their CPU: own time per wall time within 3 % of the best run's, and at least a third. [count]

    A run that was preempted measures the scheduler. More than one thread makes the ratio larger than 1, not different.
    """
    presence = cpu / np.maximum(wall, 1.0)
    enough = -(-len(presence) // 3)
    limit = min(0.97 * float(presence.max()), float(np.sort(presence)[-enough]))
    return np.asarray(presence >= limit)


def _time_runs_cuda(run: Runnable, inputs: Sequence[torch.Tensor], target: Target, count: int) -> Floats:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    with torch.inference_mode(), torch.cuda.device(target.device):
        events[0].record()
        for event in events[1:]:
            run(*inputs)
            event.record()
        events[-1].synchronize()
    return np.array([a.elapsed_time(b) for a, b in itertools.pairwise(events)])


@contextmanager
def settings(target: Target) -> Iterator[None]:
    """The target's threads, and denormals flushed as a deployment would; both restored afterwards.

    Pruned and decayed weights reach denormal range, where a multiply takes a hundred times longer.
    """
    if target.allocator == "retain" and not target.is_cuda:
        _retain_memory()
    threads = torch.get_num_threads()
    flushed = _denormals_are_flushed()
    torch.set_num_threads(target.threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)


@cache
def _retain_memory() -> None:
    """Tell glibc's malloc to keep what is freed, for the life of the process; elsewhere nothing changes.

    By default tensors of some hundred kB are mapped and unmapped in every forward, and zeroing their pages again took
    up to half of it: resnet20 at batch 32 measured 25 to 50 ms so, and 19.5 with its memory retained.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc, most = ctypes.CDLL(None), 2**31 - 1
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_* of malloc.h
    for option, value in ((trim_threshold, most), (top_pad, 2**26), (mmap_threshold, most)):
        libc.mallopt(option, value)


def _denormals_are_flushed() -> bool:
    tiny = torch.finfo(torch.float32).tiny
    return float(torch.tensor([tiny]) * 0.5) == 0.0


@dataclass
class Usage:
    """contention: share of the machine's CPU time in the watched span that went elsewhere, 0..1."""

    contention: float = 0.0


@contextmanager
def watch() -> Iterator[Usage]:
    """Compare the machine's busy time (/proc/stat, stolen time included) with this process's own over the block.

    Where /proc/stat is missing, the share of the span in which this process did not run on any CPU.
    """
    usage = Usage()
    busy, own, wall = _machine_busy_s(), time.process_time(), time.monotonic()
    try:
        yield usage
    finally:
        own, wall = time.process_time() - own, max(time.monotonic() - wall, 1e-9)
        now = _machine_busy_s()
        if busy is None or now is None:
            usage.contention = float(np.clip(1 - own / wall, 0, 1))
        else:
            usage.contention = float(np.clip((now[0] - busy[0] - own) / max(now[1] - busy[1], 0.01), 0, 1))


def _machine_busy_s() -> tuple[float, float] | None:
    """(busy, total) CPU seconds of all cores since boot: user, nice, system, irq, softirq and steal are busy."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = np.array(stat.read_text().splitlines()[0].split()[1:9], dtype=float) / 100
    idle = float(ticks[3] + ticks[4])
    return float(ticks.sum()) - idle, float(ticks.sum())

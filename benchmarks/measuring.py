"""What the operators' benchmarks share: where results go, which of them are there already, and how a call is timed.

On the CPU a call is timed by the clock. On a CUDA device that would time Python: there a call is captured, once for
every set of inputs, into a CUDA graph, and events are read around its replays. There are as many sets as it takes to
find none of a call's inputs in the L2 cache, and outputs have memory of their own. What cannot be captured is called
instead, and its row says so.
"""

import json
import math
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results"
IDENTITY = ("op", "backend", "rival", "shape", "dtype", "keep", "threads")  # of a row
MOST_SETS = 64
LEAST_US = 1000.0  # of work between two events, beside which they cost nothing


def place_of(device: str) -> str:
    """The folder of results for an environment: cpu, or the device's own name, such as h200."""
    if not device.startswith("cuda"):
        return "cpu"
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def commit() -> str:
    """The commit of this tree, or HWPRUNE_COMMIT where there is no git or no repository; "" if neither says."""
    try:
        git = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
        found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or os.environ.get("HWPRUNE_COMMIT", "")


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in IDENTITY)


class Results:
    """Rows and their context in a file that is written after every row: a run that is stopped loses none.

    Rows of the same commit and device that are there already stay until they are measured again. `path` None: no file.
    """

    def __init__(self, path: Path | None, context: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.context = {**context, "python": platform.python_version(), "commit": commit()}
        stored = json.loads(path.read_text()) if path is not None and path.exists() else {"context": {}, "rows": []}
        same = self.context["commit"] and all(
            stored["context"].get(name) == self.context.get(name) for name in ("commit", "gpu")
        )
        self.rows = {identity(row): row for row in stored["rows"]} if same else {}
        if same and "rates" in stored["context"]:  # of other numbers of threads
            self.context["rates"] = stored["context"]["rates"]
        self._done = set(self.rows) if resume else set()

    def has(self, row: dict[str, Any]) -> bool:
        """Whether the row need not be measured: it is there, and the run was told to go on."""
        return identity(row) in self._done

    def add(self, row: dict[str, Any]) -> None:
        self.rows[identity(row)] = row
        print(json.dumps(row), flush=True)
        if self.path is None:
            return
        context = self.context | {"threads": sorted({row["threads"] for row in self.rows.values()})}
        lines = ",\n  ".join(json.dumps(row) for row in self.rows.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = self.path.with_suffix(".partial")
        partial_file.write_text(f'{{"context": {json.dumps(context)},\n "rows": [\n  {lines}\n]}}\n')
        partial_file.replace(self.path)


def means(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Of every kind of comparison the geometric mean of its ratios and the least, a line each."""
    kinds: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        names = ("op", "kind", "backend", "rival", "keep", "threads")
        kinds.setdefault(tuple(row[name] for name in names if name in row), []).append(row["ratio"])
    for kind, ratios in kinds.items():
        yield f"{kind}: geometric mean {np.exp(np.mean(np.log(ratios))):.2f}, least {min(ratios):.2f}"


def in_turns(
    sides: Sequence[Callable[[int], Any]], sets: int, device: str, rounds: int, waiting: Sequence[int] = ()
) -> tuple[NDArray[np.float64], list[bool]]:
    """Microseconds a call by round and side, [rounds, sides], and which sides were captured.

    A side is called with the number of its set of inputs. waiting: sides that wait for results, so are not captured.
    """
    timers = [
        DeviceTimer(side, sets, place not in waiting) if device == "cuda" else partial(clock_us, partial(side, 0))
        for place, side in enumerate(sides)
    ]
    times = np.empty((rounds, len(sides)))
    for turn in range(rounds):
        for offset in range(len(sides)):  # who comes second finds what the first has left in the caches
            side = (turn + offset) % len(sides)
            times[turn, side] = timers[side]()
    return times, [isinstance(timer, DeviceTimer) and timer.graph is not None for timer in timers]


def sets_for(size: int, device: str) -> int:
    """How many sets of inputs of `size` bytes go well beyond the L2 cache."""
    if device != "cuda":
        return 1
    beyond = 3 * torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, math.ceil(beyond / max(1, size))))


class DeviceTimer:
    """Microseconds of one call on the device, of `sets` calls in a row."""

    def __init__(self, call: Callable[[int], Any], sets: int, capture: bool) -> None:
        self.call, self.count, self.repeats = call, sets, 1
        self.graph: torch.cuda.CUDAGraph | None = None
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # tunes, compiles and allocates what lasts
            for number in range(3):
                call(number % sets)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        if capture:
            self.capture()
        if self.graph is None:
            self.count = 1
            self.count = max(1, min(sets, int(LEAST_US / self())))
        self.repeats = max(1, min(20, int(LEAST_US / (self.count * self()))))

    def capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.outputs = [self.call(number) for number in range(self.count)]  # else they would share their memory
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"called, not captured: {str(error).splitlines()[0]}", flush=True)

    def __call__(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _spill().zero_()  # fills the cache with something else, and lets the host get ahead
        begin.record()
        for _ in range(self.repeats):
            if self.graph is not None:
                self.graph.replay()
                continue
            for number in range(self.count):
                self.call(number)
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / (self.repeats * self.count)


@cache
def _spill() -> torch.Tensor:
    size = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def step_us(run: Callable[[], Any], device: str) -> float:
    """One call by the clock, whatever else runs."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter_ns()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - begin) / 1e3


def clock_us(run: Callable[[], Any]) -> float:
    """One call on the CPU. One during which another process was given the core is repeated, up to 20 times."""
    for _ in range(20):
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        took_us = step_us(run, "cpu")
        if resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == switches:
            break
    return took_us

"""Measured latencies as text: JSON Lines, one header and one measurement a line, appended and flushed as taken.

Kinds of record:

* ``segment``: signature, sizes [axes], median_us, p20_us, p80_us, count, and the forward it was part of;
* ``whole``: program, forward, widths [G], median_us of one end-to-end forward, its role (fit or calibration).

Both carry ``reference_us`` (the reference workload's time next to it, for drift), ``contention`` and ``time`` (seconds
since 1970).
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hwprune.errors import CorruptTable, DeviceMismatch, HwpruneError, InvalidInput
from hwprune.latency.target import Target, differences, fingerprint

VERSION = 1
_REQUIRED = {
    "segment": ("signature", "sizes", "median_us", "count", "program", "forward", "reference_us"),
    "whole": ("widths", "median_us", "count", "program", "forward", "role", "reference_us"),
}


class LatencyTable:
    """The measurements of one target on one machine."""

    def __init__(
        self,
        path: Path | None,
        target: Target,
        machine: Mapping[str, str | int],
        records: list[dict[str, Any]] | None = None,
    ) -> None:
        self.path = path
        self.target = target
        self.fingerprint = dict(machine)
        self.records: list[dict[str, Any]] = records or []

    @classmethod
    def open(cls, path: str | Path | None, target: Target, force: bool = False) -> "LatencyTable":
        """The table at `path` to extend, created if absent; None keeps it in memory.

        A last line without its line break was torn by an interruption and is dropped from the file. Raises
        DeviceMismatch if it was measured on another machine or for another target (unless `force`), CorruptTable if
        a line is broken.
        """
        present = fingerprint(target)
        if path is None:
            return cls(None, target, present)
        path = Path(path)
        if not path.exists() or path.stat().st_size == 0:
            table = cls(path, target, present)
            table._create()
            return table
        table = cls.read(path)
        changed = differences(table.fingerprint, present) + differences(table.target.as_dict(), target.as_dict())
        if changed and not force:
            raise DeviceMismatch(
                f"{path} was measured elsewhere (stored | present): {'; '.join(changed)}. "
                f"Profile into another file, or use --force to trust it here."
            )
        _drop_torn_line(path)
        return table

    @classmethod
    def read(cls, path: str | Path) -> "LatencyTable":
        """Load a table of any machine without touching the file. Raises InvalidInput or CorruptTable."""
        path = Path(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"cannot read the latency table {path}: {error.strerror}.") from error
        complete, _, torn = raw.rpartition(b"\n")
        if not complete:
            raise CorruptTable(f"{path} has no complete line ({len(torn)} bytes); delete it and profile again.")
        lines = complete.split(b"\n")
        header = _parse(path, 1, lines[0])
        if header.get("hwprune_latency_table") != VERSION:
            found = header.get("hwprune_latency_table")
            raise CorruptTable(f"{path} line 1: this is not a latency table of version {VERSION} (found {found!r}).")
        try:
            target, machine = Target.from_dict(header["target"]), dict(header["fingerprint"])
        except (KeyError, TypeError, ValueError, HwpruneError) as error:
            raise CorruptTable(f"{path} line 1: the header lacks a valid target or fingerprint ({error}).") from error
        records = [_check(path, number, _parse(path, number, line)) for number, line in enumerate(lines[1:], 2)]
        return cls(path, target, machine, records)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one measurement and flush it to the disk's cache; an interruption tears at most this line."""
        self.extend([record])

    def extend(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add several measurements with one write."""
        now = round(time.time(), 3)
        new = [_check(self.path, None, {**record, "time": record.get("time", now)}) for record in records]
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(record, separators=(",", ":")) + "\n" for record in new))
            except OSError as error:
                raise InvalidInput(
                    f"cannot add to the latency table {self.path}: {error.strerror}; what it holds already stays good."
                ) from error
        self.records.extend(new)

    def of_program(self, program: str) -> list[dict[str, Any]]:
        """The whole-model records of one program, in the order measured."""
        return [r for r in self.records if r["kind"] == "whole" and r["program"] == program]

    def merge(self, paths: Iterable[str | Path], force: bool = False) -> int:
        """Append what other tables of the same machine and target hold and this one does not; returns how many."""
        known = {json.dumps(record, sort_keys=True) for record in self.records}
        added = []
        for path in paths:
            other = LatencyTable.read(path)
            changed = differences(self.fingerprint, other.fingerprint)
            changed += differences(self.target.as_dict(), other.target.as_dict())
            if changed and not force:
                raise DeviceMismatch(f"{path} and {self.path} differ (this | other): {'; '.join(changed)}.")
            for record in other.records:
                text = json.dumps(record, sort_keys=True)
                if text not in known:
                    known.add(text)
                    added.append(record)
        self.extend(added)
        return len(added)

    def _create(self) -> None:
        assert self.path is not None
        header = {
            "hwprune_latency_table": VERSION,
            "target": self.target.as_dict(),
            "fingerprint": self.fingerprint,
            "created": round(time.time(), 3),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"cannot write the latency table {self.path}: {error.strerror}.") from error


def merge(paths: Iterable[str | Path], out: str | Path, force: bool = False) -> LatencyTable:
    """Write the union of several tables of one machine and target to `out`, and return it."""
    sources = [Path(path) for path in paths]
    if not sources:
        raise InvalidInput("no latency tables to merge were given.")
    first = LatencyTable.read(sources[0])
    table = LatencyTable(Path(out), first.target, first.fingerprint)
    table._create()
    table.merge(sources, force)
    return table


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CorruptTable(f"{path} line {number} is not JSON ({error}); delete that line to keep the rest.") from error
    if not isinstance(value, dict):
        raise CorruptTable(f"{path} line {number} is not a JSON object; delete that line to keep the rest.")
    return value


def _check(path: Path | None, number: int | None, record: dict[str, Any]) -> dict[str, Any]:
    where = f"{path} line {number}" if number else "a new record"
    kind = record.get("kind")
    if kind not in _REQUIRED:
        raise CorruptTable(f"{where} has kind {kind!r}; known are {', '.join(_REQUIRED)}.")
    missing = [key for key in _REQUIRED[kind] if key not in record]
    if missing:
        raise CorruptTable(f"{where} ({kind}) lacks {', '.join(missing)}.")
    if not all(isinstance(record[key], (int, float)) and record[key] > 0 for key in ("median_us", "reference_us")):
        raise CorruptTable(f"{where} ({kind}) has a time that is not positive.")
    return record


def _drop_torn_line(path: Path) -> None:
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        os.truncate(path, whole)

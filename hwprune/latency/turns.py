"""Processes on one machine take turns: who measures has the machine to itself, who trains shares it.

Two locks in the system's temporary folder do it, the kernel's own, so that a killed process leaves none behind. The
gate keeps those who train from overtaking one who waits to measure. Where files cannot be locked nobody waits.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_held = 0  # how many blocks of this process hold the machine alone


@contextmanager
def alone() -> Iterator[None]:
    """Keep every other process's `together` blocks off this machine for the block. May be nested."""
    global _held
    gate, machine = (None, None) if _held else (_open("gate"), _open("machine"))
    if gate and machine:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX)
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        for file in (machine, gate):
            if file:
                file.close()


@contextmanager
def together() -> Iterator[None]:
    """Work that may run beside other such work, but not beside a measurement: one training step, one test batch."""
    gate, machine = (None, None) if _held else (_open("gate"), _open("machine"))
    if gate and machine:
        fcntl.flock(gate, fcntl.LOCK_EX)
        gate.close()
        fcntl.flock(machine, fcntl.LOCK_SH)
    try:
        yield
    finally:
        if machine:
            machine.close()


def _open(name: str) -> IO[bytes] | None:
    if fcntl is None:
        return None
    try:
        return open(Path(tempfile.gettempdir()) / f"hwprune-{os.getuid()}.{name}", "ab")
    except OSError:
        return None

"""Files that a reader finds whole, as they were or as they are now, whenever the writer was killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hwprune.errors import InvalidInput


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` for writing, which takes its place once the block ends; makes folders as needed.

    Raises InvalidInput where that cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}; make room, or choose another folder") from error


def write_file(path: Path, data: bytes) -> None:
    """Replace what stands in a file, or create it. Raises InvalidInput where it cannot be written."""
    with replacing(path) as file:
        file.write(data)

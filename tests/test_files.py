"""Files that are whole at any moment."""

import subprocess
import sys

import pytest

from hwprune.errors import InvalidInput
from hwprune.files import replacing, write_file


def test_what_is_written_replaces_what_stood_there(tmp_path):
    path = tmp_path / "new" / "folder" / "file.json"
    for content in (b"first", b"second"):
        write_file(path, content)
        assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_a_writer_that_fails_leaves_what_stood_there(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"whole")
    with pytest.raises(RuntimeError, match="in between"), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError("in between")
    assert path.read_bytes() == b"whole"


def test_a_killed_writer_leaves_what_stood_there(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"whole")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom hwprune.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n    file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)])
    assert killed.returncode != 0 and path.read_bytes() == b"whole"
    write_file(path, b"after")  # what the killed one left is in nobody's way
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"after"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", tmp_path):
        with pytest.raises(InvalidInput, match=f"cannot write {path}: .*choose another folder"):
            write_file(path, b"")

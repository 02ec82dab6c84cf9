"""What is installed, and that a second build compiles only what has changed."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points, metadata, requires, version
from importlib.resources import files
from pathlib import Path

import pytest

import hwprune

ROOT = Path(__file__).resolve().parent.parent


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_public_names_are_few_and_importable():
    assert len(hwprune.__all__) <= 12
    for name in hwprune.__all__:
        assert getattr(hwprune, name) is not None
        assert name in dir(hwprune)


def test_an_unknown_public_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'prun'; it has Budget, .*, prune, trace"):
        _ = hwprune.prun


def test_versions_agree():
    assert version("hwprune") == hwprune.__version__


def test_the_package_carries_its_data():
    assert (files("hwprune") / "py.typed").is_file()
    assert (files("hwprune.ops") / "measured.json").is_file()
    assert (files("hwprune.kernels") / "__init__.py").is_file()
    assert (files("hwprune.latency_tables") / "__init__.py").is_file()
    assert metadata("hwprune")["License-Expression"] == "Apache-2.0"


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="hwprune")
    assert callable(command.load())


@pytest.mark.source_tree
def test_constraints_pin_every_requirement():
    pinned = {canonical(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    required = {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requires("hwprune")}
    assert "torch" in required and required <= pinned


@pytest.mark.source_tree
def test_the_source_tree_says_that_it_is_not_installed():
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hwprune"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "is a source tree that is not installed: run `pip install -e .`" in result.stderr


@pytest.mark.source_tree
def test_a_second_build_compiles_what_changed(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "hwprune").mkdir()
    (tmp_path / "hwprune" / "__init__.py").write_text('__version__ = "0"\n')
    for package in ("kernels", "latency_tables"):
        (tmp_path / package).mkdir()

    def build():
        """The sources that the build compiles, in order of their names."""
        environment = {**os.environ, "HWPRUNE_CUDA": "0", "CXXFLAGS": "-O0", "NINJA_STATUS": ""}
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return sorted(re.findall(r"^CXX (\S+)", result.stdout, re.MULTILINE))

    def edit(name):
        with (tmp_path / "csrc" / name).open("a") as file:
            file.write("// edited\n")

    assert build() == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    assert build() == []
    edit("cpu/ratio_update.cpp")
    assert build() == ["csrc/cpu/ratio_update.cpp"]
    edit("include/soft_threshold.h")
    assert build() == ["csrc/cpu/ratio_update.cpp"]
    edit("cpu/ratio_update.hpp")
    assert build() == ["csrc/cpu/bindings.cpp", "csrc/cpu/ratio_update.cpp"]
    assert list((tmp_path / "lib" / "hwprune").glob("_cpp.*"))
    assert "ratio_update.cpp" in (tmp_path / "build" / "compile_commands.json").read_text()

"""The layering rule, and what importing hwprune may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hwprune
import hwprune.kernels

LAYERS = [  # bottom first; a module imports only from the layers before its own
    {"errors"},
    {"files"},
    {"kernels", "latency_tables", "_cpp", "_cuda"},
    {"ops"},
    {"nn"},
    {"graph"},
    {"latency"},
    {"models"},
    {"data"},
    {"train", "budget", "allocator", "importance", "refit"},
    {"search"},
    {"artifact", "report"},
    {"pipeline"},
    {"comparison"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
PACKAGES = {("hwprune",): Path(hwprune.__path__[0]), ("hwprune", "kernels"): Path(hwprune.kernels.__path__[0])}
HEAVY = ("matplotlib", "onnx", "onnxruntime", "sklearn", "timm", "torchvision", "triton")


def find_sources():
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            name = (*package, *path.relative_to(folder).with_suffix("").parts)
            yield pytest.param(path, name, id=".".join(name))


SOURCES = list(find_sources())


def imported(tree, module):
    """Dotted names that the module's code imports, split at the dots; relative imports resolved."""
    package = module[:-1]  # an __init__ is a module named "__init__" of its package
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ([*base, alias.name] for alias in node.names)


@pytest.mark.parametrize("path, module", SOURCES)
def test_imports_point_down(path, module):
    layer = module[1]
    if layer == "__init__":  # the public names, imported on first use
        return
    for name in imported(ast.parse(path.read_text()), module):
        assert name[0] not in ("kernels", "latency_tables"), f"import hwprune.{name[0]}, not the bare folder"
        if name[0] == "hwprune" and len(name) > 1 and name[1] not in (layer, "__version__"):
            lower = RANK.get(name[1])
            assert lower is not None, f"{'.'.join(module)} imports {'.'.join(name)}: name the submodule"
            assert lower < RANK[layer], f"{'.'.join(module)} imports {'.'.join(name)}, which is not below it"


@pytest.mark.parametrize("path, module", SOURCES)
def test_native_modules_are_imported_in_one_place(path, module):
    names = {part for name in imported(ast.parse(path.read_text()), module) for part in name}
    assert not names & {"_cpp", "_cuda"}  # hwprune.ops._native loads them by name, on first use


def method_names():
    """Search methods by their file, without those that are everyday words or formats as well."""
    files = (PACKAGES["hwprune",] / "search").glob("*.py")
    return {file.stem for file in files} - {"__init__", "base", "uniform", "knapsack", "csr"}


def words(tree):
    """Every identifier's parts between underscores, and every string that is one word and not a docstring."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg"):
            if isinstance(identifier := getattr(node, field, None), str):
                yield from identifier.lower().split("_")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value.lower()


@pytest.mark.parametrize("path, module", SOURCES)
def test_methods_are_named_only_in_search(path, module):
    if module[1] != "search":
        found = method_names() & set(words(ast.parse(path.read_text())))
        assert not found, f"{'.'.join(module)} knows the search method {', '.join(found)}: ask hwprune.search for it"


def modules_after(statement):
    code = f"{statement}; import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_hwprune_is_light():
    loaded = modules_after("import hwprune")
    assert "hwprune.errors" in loaded and not loaded & {*HEAVY, "torch", "numpy", "hwprune._cpp", "hwprune._cuda"}


def test_importing_everything_loads_no_optional_library():
    loaded = modules_after("import hwprune.cli, hwprune.pipeline")
    assert "hwprune.search" in loaded and not loaded & {*HEAVY, "hwprune._cpp", "hwprune._cuda"}


@pytest.mark.parametrize("path, module", SOURCES)
def test_devices_are_named_where_they_are_timed_or_computed_on(path, module):
    if module[1] not in ("latency", "ops", "kernels", "cli"):  # the command line names them in its help
        assert "cuda" not in path.read_text().lower()

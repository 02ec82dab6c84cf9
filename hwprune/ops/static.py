"""What the compiler made of the kernels, seen without a GPU: registers, spills, shared memory, instructions.

Every Triton kernel is compiled ahead of time in the classes of call that its module lists (`static_cases`); the CUDA
kernels are read from the built library. Both are looked at with the tools that Triton's package carries.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hwprune.errors import BackendUnavailable, InvalidInput
from hwprune.ops import _native

MODULES = ("masked_conv", "ratio_update")
Job = tuple[str, int, int]  # module, case, architecture

CLASSES = "*"  # in place of a name's beginning: the first case of every class of call, whatever its tile
# Bytes that a block may have, if it asks for them.
_MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)\b")
_LOADS_128 = re.compile(r"\b(?:LDG|LDGSTS)\.\S*\b128\b|\bUTMALDG\b|\bUBLKCP\b")
_SPILLS = re.compile(r"\bSTL\b")
_RESOURCES = re.compile(r"Function (\S+?):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def examine_triton(wanted: Mapping[int, Sequence[str] | None]) -> list[dict[str, Any]]:
    """Compiles Triton kernels, on all cores, and says what came out: one row for each case and architecture.

    wanted: for each architecture, such as 90, beginnings of names, each for the first case that it fits, or CLASSES;
        None for all.

    A row has kernel, backend, arch, registers, spills (stores to local memory), stack_bytes, shared_bytes,
    tensor_cores and loads_128 (instructions), and expects: which of the last two must not be 0.

    Raises BackendUnavailable where there is no Triton.
    """
    _native.module("triton")
    # A process in which Triton interprets can neither compile nor say what would be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hwprune.ops.static"]
    done = subprocess.run(command, input=json.dumps(wanted), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the kernels did not compile:\n{done.stderr}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def examine_cuda() -> list[dict[str, Any]]:
    """Rows as `examine_triton`'s for every kernel in hwprune._cuda and every architecture that it was built for.

    Shared memory is the static part and what launches add to it, but for the tables of ratio_step, whose size differs.
    Raises BackendUnavailable without the library.
    """
    _native.module("triton")
    dynamic: dict[tuple[str, int], int] = _native.module("cuda").dynamic_shared
    spec = find_spec("hwprune._cuda")
    if spec is None or spec.origin is None:
        raise BackendUnavailable("hwprune._cuda has no file")
    resources = _tool("cuobjdump", "--dump-resource-usage", spec.origin)
    code = _tool("cuobjdump", "-sass", spec.origin)
    texts: dict[tuple[int, str], str] = {}
    for part in _by_arch(code):
        arch, body = part
        for name, text in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", body, re.DOTALL):
            texts[arch, name] = text
    rows = []
    for arch, body in _by_arch(resources):
        for found in _RESOURCES.finditer(body):
            text = texts.get((arch, found[1]), "")
            rows.append({"kernel": found[1], "backend": "cuda", **_row(arch, found, text), "expects": {}})
    for row, name in zip(rows, _demangled([row["kernel"] for row in rows]), strict=True):
        row["kernel"] = name
        if (tiled := re.fullmatch(r"(\w+)<.*, (\d+)>", name)) is not None:
            row["shared_bytes"] += dynamic.get((tiled[1], int(tiled[2])), 0)
    return rows


def complaints(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What is not as it must be: spills, more shared memory than a block may have, or no instruction of a kind that a
    kernel is expected to have."""
    found = []
    for row in rows:
        where = f"{row['kernel']} ({row['backend']}, sm_{row['arch']})"
        if row["spills"]:
            found.append(f"{where} spills {row['spills']} times")
        if row["shared_bytes"] > (most := _MOST_SHARED.get(row["arch"], row["shared_bytes"])):
            found.append(f"{where} takes {row['shared_bytes']} bytes of shared memory, of {most}")
        for kind in ("tensor_cores", "loads_128"):
            if row["expects"].get(kind) and not row[kind]:
                found.append(f"{where} has no {kind.replace('_', ' ')} instruction")
    return found


def _jobs(wanted: Mapping[int, Sequence[str] | None]) -> list[Job]:
    named = [(module, index, case["name"]) for module in MODULES for index, case in enumerate(_cases(module))]
    classes = {re.sub(r" \d+x\d+x\d+", "", name): (module, index) for module, index, name in reversed(named)}
    jobs: list[Job] = []
    for arch, beginnings in wanted.items():
        if beginnings is None:
            jobs += [(module, index, arch) for module, index, _ in named]
            continue
        for beginning in beginnings:
            fitting = [(module, index) for module, index, name in named if name.startswith(beginning)][:1]
            if beginning == CLASSES:
                fitting = list(classes.values())
            if not fitting:
                raise InvalidInput(f"no case begins with {beginning!r}; there are {', '.join(n for _, _, n in named)}")
            jobs += [(module, index, arch) for module, index in fitting]
    return jobs


def _cases(module: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = import_module(f"hwprune.kernels.{module}").static_cases()
    return cases


def _compile(job: Job) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, index, arch = job
    case = _cases(module)[index]
    source = ASTSource(case["kernel"], case["signature"], case["constexprs"], case.get("attrs"))
    options = {name: case[name] for name in ("num_warps", "num_stages", "maxnreg") if name in case}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = next(_RESOURCES.finditer(resources))
    row = _row(arch, found, code) | {"shared_bytes": compiled.metadata.shared}
    return {"kernel": case["name"], "backend": "triton", **row, "expects": case["expects"]}


def _row(arch: int, found: re.Match[str], code: str) -> dict[str, Any]:
    _, registers, stack, shared, _ = found.groups()
    return {
        "arch": arch,
        "registers": int(registers),
        "spills": len(_SPILLS.findall(code)),
        "stack_bytes": int(stack),
        "shared_bytes": int(shared),
        "tensor_cores": len(_TENSOR_CORES.findall(code)),
        "loads_128": len(_LOADS_128.findall(code)),
    }


def _by_arch(dump: str) -> list[tuple[int, str]]:
    """The parts of a cuobjdump that begin with "arch = sm_90"."""
    parts = re.split(r"arch = sm_(\d+)\w*", dump)[1:]
    return [(int(arch), body) for arch, body in zip(parts[::2], parts[1::2], strict=True)]


def _tool(name: str, *arguments: str) -> str:
    folder = Path(str(_native.module("triton").__file__)).parent / "backends" / "nvidia" / "bin"
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}  # cuobjdump asks nvdisasm
    done = subprocess.run([folder / name, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def _demangled(names: list[str]) -> list[str]:
    """C++ names as people write them, without what is in parentheses, where c++filt is at hand."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    drop = re.compile(r"\(anonymous namespace\)::|hwprune::|^void |\(.*$")
    return [drop.sub("", name) for name in done.stdout.split("\n")]


if __name__ == "__main__":
    asked = {int(arch): beginnings for arch, beginnings in json.load(sys.stdin).items()}
    with ProcessPoolExecutor() as pool:
        json.dump(list(pool.map(_compile, _jobs(asked))), sys.stdout)

"""Everything that needs a GPU, in parts: a build, tests of the kernels, sanitizers, benchmarks, the table of backends.

    python benchmarks/gpu_check.py                 what is not done yet at this commit, the most important first
    python benchmarks/gpu_check.py tests conv      the parts that begin so, done or not
    python benchmarks/gpu_check.py --dry-run       every part in small on the CPU, as far as it goes there

The interpreter needs torch, triton, numpy, scipy and pytest, and for the build setuptools, pybind11, ninja and nvcc; no
network. The package is built for this interpreter and this chip into build/gpu-check and taken from there, whatever is
installed. A part that needs a package or a tool that is missing is said to have not run, and does not count as passed.

A call ends within --within seconds. What has passed is noted with the commit in `gpu_check.json` of the folder of
results, and called again the script goes on with the rest; benchmarks go on with the first row that is not there. On a
machine that starts bare, `--out` is the folder that outlives it, and `--carry FILE` keeps there what was compiled.
HWPRUNE_COMMIT names the commit where git cannot.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from measuring import RESULTS, commit, means, place_of

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-check"
SITE = WORK / "site"
KEPT = ("*.so", "*.cubin", "*.json", "built")  # of what was compiled; Triton does without the rest up to 3.6
BUILD_S = 300
LEAST_S = 30  # that a benchmark is started for: it goes on where it was stopped
CORES = os.cpu_count() or 1
WORKERS = min(8, CORES)  # of tests
OPS = ("benchmarks/bench_ops.py", "--out", "{out}")


@dataclass(frozen=True)
class Part:
    """Arguments of the interpreter, where {out} is the folder of results, and a time limit.

    sanitizer: the tool of compute-sanitizer that watches. tuned: kernels are tuned, not only compiled. resumes: stopped
    anywhere, it has lost nothing. cache: Triton's; what torch.compile tries is a lot, and has one of its own. dry: what
    is added for a dry run; None: there is nothing to try without a device.
    """

    arguments: tuple[str, ...]
    limit_s: int
    sanitizer: str = ""
    tuned: bool = False
    resumes: bool = False
    cache: str = "triton"
    dry: tuple[str, ...] | None = ("--dry-run",)

    @property
    def is_test(self) -> bool:
        return "pytest" in self.arguments


def tests(file: str, limit_s: int, *options: str, tuned: bool = False) -> Part:
    """-P, or the source tree would come before what was built."""
    side_by_side = ("-n", str(WORKERS)) if find_spec("xdist") else ()
    # Another machine's versions warn of other things than those that the suite is kept free of.
    options = ("-q", "-rs", "-W", "default", "-p", "no:cacheprovider", *side_by_side, *options)
    return Part(
        ("-P", "-m", "pytest", *options, f"tests/test_{file}.py"), limit_s, tuned=tuned, dry=("--collect-only",)
    )


def ops(section: str, limit_s: int, *options: str) -> Part:
    cache = "inductor" if section in ("compiled", "curve") else "triton"
    return Part((*OPS, "--resume", "--only", section, *options), limit_s, tuned=True, resumes=True, cache=cache)


def exercise(limit_s: int, *options: str, sanitizer: str = "") -> Part:
    return Part(("benchmarks/exercise.py", *options), limit_s, sanitizer)


TIMED_BY_SHAPE = ("conv", "columns", "gradients", "norm")
RESNET50, RESNET56 = ("--networks", "resnet50"), ("--networks", "resnet56")
PARTS = {
    "tests_cuda": tests("ops_cuda", 120),
    "tests_triton": tests("kernels_masked_conv", 240),
    "tests_ratio": tests("kernels_ratio_update", 100),
    "tests_solver": tests("ops", 60, "-k", "cuda"),
    "tests_dispatch": tests("ops_dispatch", 60),
    "tests_autotune": tests("autotune", 60, tuned=True),
    "compile": Part((*OPS, "--compile", str(CORES), "--resume", "--only", *TIMED_BY_SHAPE), 200, tuned=True),
    "conv_resnet50_3x3_32": ops("conv", 200, *RESNET50, "--kernels", "3", "--batches", "32"),
    "ratio_update": Part(
        ("benchmarks/bench_ratio_update.py", "--resume", "--out", "{out}"),
        120,
        tuned=True,
        resumes=True,
        dry=("--device", "cpu", "--threads", "1", "--rounds", "2"),
    ),
    "columns_resnet50_32": ops("columns", 100, *RESNET50, "--batches", "32"),
    "curve_half": ops("curve", 180, "--keeps", "0.5"),
    "exercise": exercise(150, "--workers", str(WORKERS)),
    "memcheck_cuda": exercise(100, "--backends", "cuda", sanitizer="memcheck"),
    "racecheck_cuda": exercise(100, "--backends", "cuda", sanitizer="racecheck"),
    "memcheck_triton": exercise(150, "--backends", "triton", sanitizer="memcheck"),
    "racecheck_triton": exercise(150, "--backends", "triton", sanitizer="racecheck"),
    "conv_resnet50_1x1_32": ops("conv", 120, *RESNET50, "--kernels", "1", "--batches", "32"),
    "compiled_resnet50_32": ops("compiled", 150, *RESNET50, "--batches", "32"),
    "conv_resnet56": ops("conv", 60, *RESNET56),
    "conv_vgg16": ops("conv", 60, "--networks", "vgg16"),
    "conv_resnet50_3x3_256": ops("conv", 100, *RESNET50, "--kernels", "3", "--batches", "256"),
    "conv_resnet50_1x1_256": ops("conv", 120, *RESNET50, "--kernels", "1", "--batches", "256"),
    "curve": ops("curve", 150),
    "gradients_resnet56": ops("gradients", 60, *RESNET56),
    "gradients_resnet50_32": ops("gradients", 120, *RESNET50, "--batches", "32"),
    "conv_grouped": ops("conv", 90, "--networks", "mobilenet_v2", "resnext50"),
    "norm": ops("norm", 60, *RESNET50),
    "search": ops("search", 60),
    "table": Part((*OPS, "--table", "{out}/measured.json"), 30, dry=None),
    "columns": ops("columns", 150),
    "compiled_resnet50_256": ops("compiled", 180, *RESNET50, "--batches", "256"),
    "compiled": ops("compiled", 180),
    "gradients": ops("gradients", 150),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results/<device>")
    parser.add_argument("--carry", type=Path, metavar="FILE", help="archive of what is compiled, read and written")
    parser.add_argument("--within", type=float, default=540, metavar="SECONDS")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    begin = time.monotonic()
    names = [name for name in PARTS if not args.parts or name.startswith(tuple(args.parts))]
    if not names:
        parser.error(f"no part begins with {' or '.join(args.parts)}; there are {', '.join(PARTS)}")
    if args.dry_run:
        sys.exit(dry_run(names))
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs a CUDA device, and torch sees none here.")
    if not commit():
        sys.exit("Results need a commit: git does not know it here; set HWPRUNE_COMMIT.")
    out = (args.out or RESULTS / place_of("cuda")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    state = State(out)
    if args.carry and args.carry.exists() and not WORK.exists():
        with tarfile.open(args.carry) as archive:
            archive.extractall(WORK, filter="data")
    try:
        state.note("build", *build(out))
        if not state.passed("build"):
            sys.exit(f"gpu_check needs both backends of the device; see {out / 'gpu_check.log'}")
        if not args.parts:
            names = sorted((name for name in names if not state.passed(name)), key=state.was_in_the_way)
        for name in names:
            left_s = args.within - (time.monotonic() - begin)
            if left_s >= (LEAST_S if PARTS[name].resumes else PARTS[name].limit_s):
                state.note(name, *run(PARTS[name], out, min(left_s, PARTS[name].limit_s)))
    finally:
        if args.carry:
            pack(args.carry)
    if (out / "ops.json").exists():
        rows = json.loads((out / "ops.json").read_text())["rows"]
        print(*means(row for row in rows if row["backend"] == "auto"), sep="\n")
    state.report(names)


class State:
    """What has been done at this commit on this device, in a file that is written after every part."""

    def __init__(self, out: Path) -> None:
        self.path = out / "gpu_check.json"
        self.head = {"commit": commit(), "device": torch.cuda.get_device_name()}
        stored = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = {name: stored.get(name) for name in self.head} == self.head
        self.parts: dict[str, dict[str, str]] = stored["parts"] if same else {}

    def note(self, name: str, result: str, text: str) -> None:
        """result: passed, failed, "not run", unfinished (for want of time) or stopped (and got nowhere)."""
        self.parts[name] = {"result": result, "note": text}
        self.path.write_text(json.dumps({**self.head, "parts": self.parts}, indent=1) + "\n")
        print(f"{name}: {result}{', ' * bool(text)}{text}", flush=True)

    def passed(self, name: str) -> bool:
        return self.parts.get(name, {}).get("result") == "passed"

    def was_in_the_way(self, name: str) -> bool:
        """Whether others that have not had their turn go first."""
        return self.parts.get(name, {}).get("result") in ("failed", "not run", "stopped")

    def report(self, names: Sequence[str]) -> None:
        """Says what is left of these parts, and exits with 1 where that is anything."""
        open_parts = {name: self.parts.get(name, {}).get("result", "not started") for name in names}
        rest = [f"{name} ({result})" for name, result in open_parts.items() if result != "passed"]
        if rest:
            sys.exit(f"Not passed: {', '.join(rest)}. Called again, gpu_check goes on.")
        print("All parts have passed.")


def build(out: Path) -> tuple[str, str]:
    """The package with its native code for this interpreter and this chip; what is compiled already stays."""
    chip = "{}{}".format(*torch.cuda.get_device_capability())
    settings = {"HWPRUNE_CUDA": "1", "HWPRUNE_CUDA_ARCHS": os.environ.get("HWPRUNE_CUDA_ARCHS", chip)}
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    digest = hashlib.sha256(json.dumps([sysconfig.get_config_var("EXT_SUFFIX"), settings]).encode())
    for source in (ROOT / "setup.py", *sources):
        digest.update(source.read_bytes())
    built, wanted = SITE / "built", digest.hexdigest()
    done = built.exists() and built.read_text() == wanted
    commands = ["build_py", "--force", "--build-lib", str(SITE)]
    commands += [] if done else ["build_ext", "--build-lib", str(SITE)]
    begin = time.monotonic()
    code, output = execute([sys.executable, "setup.py", *commands], os.environ | settings, out, BUILD_S)
    if code:
        return "failed", said(code, output)
    built.write_text(wanted)
    question = "import json, hwprune.ops; print(json.dumps(hwprune.ops.backends()))"
    code, output = execute([sys.executable, "-P", "-c", question], environment(out), out, 60)
    if code:
        return "failed", said(code, output)
    causes = json.loads(output.strip().splitlines()[-1])
    if missing := {name: cause for name, cause in causes.items() if name in ("triton", "cuda") and cause}:
        return "failed", json.dumps(missing)
    return "passed", f"{'kept' if done else f'{time.monotonic() - begin:.0f} s'}, sm_{chip}"


def environment(out: Path) -> dict[str, str]:
    """Of every part: the package that was built, and what is compiled or tuned kept for the next."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PYTHONUNBUFFERED": "1",
        "HWPRUNE_COMMIT": commit(),
        "HWPRUNE_AUTOTUNE_CACHE": str(out / "autotune.json"),
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
    }


def run(part: Part, out: Path, limit_s: float) -> tuple[str, str]:
    """A part's result and a note."""
    command = [sys.executable, *(argument.format(out=out) for argument in part.arguments)]
    variables = environment(out) | {"TRITON_CACHE_DIR": str(WORK / part.cache)}
    if not part.tuned:
        variables["HWPRUNE_AUTOTUNE"] = "0"
    if part.sanitizer:
        tool = sanitizer()
        if tool is None:
            return "not run", "there is no compute-sanitizer on PATH or under CUDA_HOME"
        # Without torch's cache every tensor is an allocation of its own, beyond which a write is seen.
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        quiet = ["--report-api-errors", "no"] if part.sanitizer == "memcheck" else []  # torch tries what may fail
        command = [tool, "--tool", part.sanitizer, *quiet, *command]
    begin, rows = time.monotonic(), rows_in(out)
    code, output = execute(command, variables, out, limit_s)
    seconds = f"{time.monotonic() - begin:.0f} s"
    if code is None:
        stuck = limit_s >= part.limit_s and rows_in(out) == rows
        return "stopped" if stuck else "unfinished", f"after {seconds}"
    result, text = verdict(part, code, output)
    return result, f"{text}, {seconds}" if text else seconds


def rows_in(out: Path) -> int:
    found = [out / name for name in ("ops.json", "ratio_update.json")]
    return sum(len(json.loads(path.read_text())["rows"]) for path in found if path.exists())


def verdict(part: Part, code: int, output: str) -> tuple[str, str]:
    """What the exit status and the output of a part mean."""
    if part.sanitizer:
        if "Device not supported" in output:
            return "not run", "compute-sanitizer does not support this device here"
        found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
        whole = " jobs in " in output  # whether their results are right is asked without a sanitizer
        clean = whole and bool(found) and not any(int(number) for pair in found for number in pair if number)
        return ("passed" if clean else "failed"), "" if clean else said(code, output)
    if code:
        absent = re.search(r"No module named '(?!hwprune)([\w.]+)'", output)
        return ("not run", f"{absent[1]} is not importable") if absent else ("failed", said(code, output))
    if part.is_test:
        counts = {kind: number for number, kind in re.findall(r"(\d+) (passed|skipped)", output)}
        return ("passed" if "passed" in counts else "not run"), ", ".join(f"{n} {kind}" for kind, n in counts.items())
    return "passed", ""


def said(code: int | None, output: str) -> str:
    """The exit status and the end of the output, which goes to the screen."""
    print("\n".join(output.splitlines()[-25:]), flush=True)
    return f"exit status {code}"


def execute(command: Sequence[str], variables: dict[str, str], out: Path, limit_s: float) -> tuple[int | None, str]:
    """Exit status, None at the time limit, and output, which is added to the log. Ends what the command has started."""
    log = out / "gpu_check.log"
    with log.open("a") as file:
        print(f"\n$ {' '.join(command)}", file=file, flush=True)
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log.open() as file:
        file.seek(start)
        return code, file.read()


def sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(str(Path(home, "bin", "compute-sanitizer")))


def pack(path: Path) -> None:
    """Native code and Triton's kernels, for a machine that starts bare."""
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w:gz", compresslevel=5) as archive:
        for file in sorted({file for pattern in KEPT for file in WORK.rglob(pattern)}):
            if "inductor" not in file.parts:
                archive.add(file, file.relative_to(WORK))
    partial.replace(path)


def dry_run(names: Sequence[str]) -> int:
    """Every part without a device: benchmarks and exercises in small on the CPU, tests collected. The failures."""
    WORK.mkdir(parents=True, exist_ok=True)
    failures = 0
    for name, part in ((name, PARTS[name]) for name in names):
        if part.dry is None:
            continue
        command = [sys.executable, *(argument.format(out=WORK) for argument in part.arguments), *part.dry]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(f"{name}: {said(done.returncode, done.stdout + done.stderr) if done.returncode else 'ok'}", flush=True)
        failures += done.returncode != 0
    return failures


if __name__ == "__main__":
    main()

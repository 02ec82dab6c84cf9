"""Everything that needs a GPU, in parts: tests of the kernels, sanitizers, benchmarks.

    python benchmarks/gpu_check.py            what is not done yet, in order
    python benchmarks/gpu_check.py tests      these parts, done or not

Parts that passed are noted in `results/<device>/gpu_check.json` with the commit; called again at the same commit, the
script goes on with the others. The parts' time limits add up to less than ten minutes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_ratio_update import RESULTS, place_of

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    f"tests/test_{name}.py"
    for name in ("ops", "ops_masked_conv", "ops_cuda", "kernels_ratio_update", "kernels_masked_conv")
]
LIMITS_S = {"tests": 150, "memcheck": 70, "racecheck": 70, "ratio_update": 60}
OPS_LIMITS_S = {"conv": 80, "columns": 50, "norm": 20, "search": 20, "curve": 40, "compiled": 40}  # of bench_ops.py
LIMITS_S |= OPS_LIMITS_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(LIMITS_S))
    args = parser.parse_args()
    if unknown := set(args.parts) - {*LIMITS_S, "exercise"}:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(LIMITS_S)}")
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs a CUDA device, and torch sees none here.")
    if args.parts == ["exercise"]:
        exercise()
        return
    path = RESULTS / place_of("cuda") / "gpu_check.json"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    state = {"commit": commit.stdout.strip(), "parts": {}}
    if path.exists() and (stored := json.loads(path.read_text()))["commit"] == state["commit"]:
        state = stored
    failed = []
    for part in args.parts or [name for name in LIMITS_S if not state["parts"].get(name, {}).get("passed")]:
        begin = time.monotonic()
        passed, note = run(part)
        seconds = round(time.monotonic() - begin, 1)
        state["parts"][part] = {"passed": passed, "seconds": seconds, "note": note}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(state, indent=1) + "\n")
        print(f"{part}: {note} ({seconds} s)", flush=True)
        if not passed:
            failed.append(part)
    if failed:
        sys.exit(f"gpu_check failed in {', '.join(failed)}; repeat with: python benchmarks/gpu_check.py {failed[0]}")


def run(part: str) -> tuple[bool, str]:
    """Runs one part in a process of its own: whether it passed, and a note."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if part == "tests":
        command = [sys.executable, "-m", "pytest", "-q", *TESTS]
    elif part in ("memcheck", "racecheck"):
        tool = sanitizer()
        if tool is None:
            return True, "skipped: there is no compute-sanitizer on PATH or under CUDA_HOME"
        # Without torch's cache, every tensor is an allocation of its own, beyond which a write is seen.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        command = [tool, "--tool", part, "--error-exitcode", "9", sys.executable, __file__, "exercise"]
    else:
        name, options = ("ops", ["--only", part]) if part in OPS_LIMITS_S else (part, [])
        command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), *options]
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMITS_S[part], check=False).returncode
    except subprocess.TimeoutExpired:
        return False, f"stopped after {LIMITS_S[part]} s"
    return code == 0, "passed" if code == 0 else f"exit status {code}"


def sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(str(Path(home, "bin", "compute-sanitizer")))


def exercise() -> None:
    """Every operator once, forward and backward, on odd small shapes, in both device backends."""
    from bench_ratio_update import Problem

    from hwprune import ops

    backends = [name for name in ("triton", "cuda") if ops.backends()[name] is None]
    if not backends:
        sys.exit(f"no backend runs on this device: {ops.backends()}")
    for backend in backends:
        problem = Problem([1, 3, 70, 2051], backend, "cuda")
        for op in ("ratio_forward", "ratio_forward_seed", "ratio_step", "ratio_step_priced"):
            getattr(problem, op)()
        for dtype in (torch.float32, torch.bfloat16):
            for kernel, groups in ((1, 1), (3, 1), (3, 2)):
                x = torch.randn(2, 18, 7, 5, device="cuda", dtype=dtype, requires_grad=True)
                weight = torch.randn(22, 18 // groups, kernel, kernel, device="cuda", dtype=dtype, requires_grad=True)
                ins, outs = (torch.rand(count, device="cuda").round().requires_grad_() for count in (18, 22))
                y = ops.masked_conv2d(
                    x, weight, in_mask=ins, out_mask=outs, act="relu", padding=kernel // 2, groups=groups,
                    backend=backend,
                )  # fmt: skip
                assert isinstance(y, torch.Tensor)
                y.float().square().sum().backward()
    torch.cuda.synchronize()
    print(f"exercised {', '.join(backends)}")


if __name__ == "__main__":
    main()

"""Every operator, forward and backward, on small odd shapes: what compute-sanitizer looks at, and a check by itself.

    python benchmarks/exercise.py [--backends triton cuda] [--workers 8]

The shapes are those of tests/conv_backend_law.py in every form that a kernel has: statistics and the pass behind
them, columns, depthwise and grouped convolutions, epilogues, strides, dilation, all formats of numbers; and the ratios'
forward and steps. Results are held to float64, and masked channels hold NaN. Workers compile Triton's kernels side
by side.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from bench_ratio_update import OPERATORS, Problem
from conv_backend_law import BATCH_NORMS, CASES, Case, check_batch_norm, check_convolution, check_statistics

from hwprune import ops
from hwprune.ops.masked_conv import _MODULES

Job = tuple[str, str, int]  # backend, what, which


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"])
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: this one")
    parser.add_argument("--dry-run", action="store_true", help="one job of each kind, by the reference on the CPU")
    args = parser.parse_args()
    device = "cpu" if args.dry_run else "cuda"
    backends = ["reference"] if args.dry_run else args.backends
    if missing := [f"{name}: {ops.backends()[name]}" for name in backends if ops.backends()[name] is not None]:
        sys.exit(f"cannot run here: {'; '.join(missing)}")
    found = [job for name in backends for job in jobs(name)]
    if args.dry_run:
        found = list({what: (name, what, which) for name, what, which in found}.values())
    if args.workers and not args.dry_run:
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            problems = [problem for problem in pool.map(partial(run, device=device), found) if problem]
    else:
        problems = [problem for job in found if (problem := run(job, device))]
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(found)} jobs in {', '.join(backends)}, {len(problems)} wrong", *problems, sep="\n")
    sys.exit(bool(problems))


def jobs(backend: str) -> Iterator[Job]:
    for which, case in enumerate(CASES):
        if is_a_form(case):
            yield backend, "convolution", which
            if case.dtype != torch.float16 and case.stride == (1, 1):
                yield backend, "statistics", which
    for what, count in (("batch norm", len(BATCH_NORMS)), ("ratios", len(OPERATORS))):
        yield from ((backend, what, which) for which in range(count))


def is_a_form(case: Case) -> bool:
    """The law's other cases differ from these in the activation, in how tensors lie, or in what is masked."""
    kinds = {"absent", "some", "runs"}
    return case.memory == "nhwc" and case.act == "silu" and {case.in_mask, case.out_mask, case.columns} <= kinds


def run(job: Job, device: str) -> str:
    """What is wrong; "" if nothing."""
    backend, what, which = job
    torch.manual_seed(0)
    functions = import_module(_MODULES[backend])
    try:
        if what == "convolution":
            check_convolution(functions, CASES[which], device)
        elif what == "statistics":
            check_statistics(functions, CASES[which], device)
        elif what == "batch norm":
            check_batch_norm(functions, *BATCH_NORMS[which], device=device)
        else:
            getattr(Problem([1, 3, 70, 2051], backend, device), OPERATORS[which])()
    except AssertionError as error:
        return f"{backend}, {what} {which}: {error}"
    return ""


if __name__ == "__main__":
    main()

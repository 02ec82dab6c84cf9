"""Micro-benchmarks by pytest-benchmark, kept out of the test suite: pytest benchmarks/test_ratio_update.py"""

import pytest
import torch
from bench_ratio_update import SHAPES, Problem

from hwprune import ops

DEVICES = {"reference": "cpu", "cpp": "cpu", "triton": "cuda", "cuda": "cuda"}
READY = [name for name, cause in ops.backends().items() if cause is None and name != "triton"]
if torch.cuda.is_available():
    READY += ["triton"]


@pytest.mark.parametrize("op", ["ratio_forward", "ratio_forward_seed", "ratio_step", "ratio_step_priced"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", READY)
def test_ratio_update(benchmark, backend, shape, op):
    torch.set_num_threads(1)
    problem = Problem(SHAPES[shape], backend, DEVICES[backend])
    wait = torch.cuda.synchronize if DEVICES[backend] == "cuda" else lambda: None

    def call():
        getattr(problem, op)()
        wait()

    benchmark(call)

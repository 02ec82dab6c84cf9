"""The CUDA kernels without a device: the same sources, compiled for the CPU against tests/cuda_host.

There, fibers stand for threads, and plain loops for what one warp does together. That shows wrong indices, fragments,
barriers left out and copies not waited for; it cannot show that the chip's instructions do what the loops do.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch
from conv_backend_law import (
    BATCH_NORMS,
    CASES,
    COLUMN_CASES,
    LARGE,
    check_batch_norm,
    check_column_gradient,
    check_column_limit,
    check_convolution,
    check_statistics,
)
from ratio_update_law import (
    SLICED_WIDTHS,
    STEP_WIDTHS,
    WIDTHS,
    check_forward,
    check_seed,
    check_slices,
    check_step,
    step_arguments,
)

from hwprune import ops
from hwprune.errors import BackendUnavailable
from hwprune.ops import _cuda_conv, _native
from hwprune.ops.ratio_update import _choose

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX", "c++")
# A misaligned vector load, on which a chip faults, ends the process here; the compiler's own library is not needed.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
SOURCES = [
    ("csrc/cuda/masked_conv.cu", "-O1"),
    ("csrc/cuda/masked_affine.cu", "-O1"),
    ("csrc/cuda/ratio_update.cu", "-O1"),
    ("tests/cuda_host/fibers.cpp", "-O1"),
    ("tests/cuda_host/module.cpp", "-O0"),
]

pytestmark = [
    pytest.mark.source_tree,
    pytest.mark.skipif(sys.platform != "linux", reason="the fibers are made for Linux"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no C++ compiler {COMPILER}"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """_cuda_conv over the kernels on the CPU."""
    folder = tmp_path_factory.mktemp("cuda_host")
    includes = [f"-I{ROOT / path}" for path in ("tests/cuda_host", "csrc", "csrc/include")]
    includes += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    objects = [folder / f"{Path(source).name}.o" for source, _ in SOURCES]
    for (source, level), target in zip(SOURCES, objects, strict=True):
        command = [COMPILER, *FLAGS, level, *includes, "-x", "c++"]
        subprocess.run([*command, "-c", str(ROOT / source), "-o", str(target)], check=True)
    subprocess.run([COMPILER, "-shared", *map(str, objects), "-o", str(folder / "cuda_host.so")], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(_native._MODULES, "cuda", "cuda_host")
        _native._import.cache_clear()
        yield _cuda_conv
    _native._import.cache_clear()


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_convolution_is_as_accurate_as_plain_torch(backend, case):
    check_convolution(backend, case)


@pytest.mark.parametrize("case", [*CASES[::2], LARGE[0]], ids=str)
def test_statistics_come_with_the_convolution(backend, case):
    check_statistics(backend, case)


@pytest.mark.parametrize("case", COLUMN_CASES, ids=str)
def test_input_gradient_of_few_columns_and_of_many(backend, case, monkeypatch):
    check_column_gradient(backend, case, monkeypatch)


def test_a_third_of_the_columns_is_few(backend, monkeypatch):
    check_column_limit(backend, monkeypatch)


@pytest.mark.parametrize("case", BATCH_NORMS, ids=lambda case: "-".join(map(str, case)))
def test_batch_norm_is_as_accurate_as_plain_torch(backend, case):
    check_batch_norm(backend, *case)


def ratio_forward(theta, importance, offsets, temperature, uniforms=None, *, seed=0):
    outputs = torch.empty_like(theta), torch.empty_like(importance), torch.empty_like(importance)
    inputs = [tensor.data_ptr() for tensor in (theta, importance, offsets)]
    drawn = 0 if uniforms is None else uniforms.data_ptr()
    addresses = *inputs, drawn, *(tensor.data_ptr() for tensor in outputs)
    _native.module("cuda").ratio_forward(*addresses, len(theta), temperature, seed, 0)
    return outputs


def ratio_step_priced(theta, grad_mask, p, offsets, tables, multiplier, penalty, *state, step, lr):
    outputs = torch.empty_like(theta), theta.new_empty(()), torch.empty_like(theta)
    before = theta.clone()
    written = [tensor.data_ptr() for tensor in (before, theta, *state, *outputs)]
    sizes = [*tables.members.shape, tables.starts.shape[1], len(tables.base), tables.uses.shape[1]]
    read = *(tensor.data_ptr() for tensor in (grad_mask, p, offsets)), [tensor.data_ptr() for tensor in tables], sizes
    adam = lr, 0.9, 0.999, 1e-8, step
    _native.module("cuda").ratio_step_priced(*read, *written, len(theta), multiplier, penalty, 1e-4, *adam, 0)
    return outputs


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_ratios_become_masks_as_accurately_as_in_plain_torch(backend, widths):
    check_forward(ratio_forward, widths, 1.0)
    check_forward(ratio_forward, widths, 100.0)


@pytest.mark.parametrize("widths", SLICED_WIDTHS, ids=str)
def test_ratios_may_begin_at_any_address(backend, widths):
    check_slices(ratio_forward, ratio_step_priced, widths)


def test_tables_beyond_the_shared_memory_of_a_block_are_refused(backend, monkeypatch):
    theta, grad_mask, p, offsets, tables, *state = step_arguments([3, 8])
    needed = _native.module("cuda").ratio_step_shared(len(tables.members), len(tables.base))
    assert needed > 4 * (3 * len(tables.members) + 2 * len(tables.base))  # what is chosen at launch, and what is not
    monkeypatch.setitem(_native.HOMES, "cuda", "cpu")
    for most, cause in ((needed, None), (needed - 1, f"needs {needed} bytes of shared memory for these tables")):
        monkeypatch.setattr(_native, "shared_memory", lambda device, most=most: most)
        if cause is None:
            assert _choose("ratio_step_priced", "cuda", theta, state, tables) == "cuda"
            continue
        with pytest.raises(BackendUnavailable, match=cause):
            ops.ratio_step_priced(theta, grad_mask, p, offsets, tables, 0, 0, *state, step=1, lr=0.1, backend="cuda")
    ops.ratio_step_priced(theta, grad_mask, p, offsets, tables, 0.0, 0.0, *state, step=1, lr=0.1)


@pytest.mark.parametrize("seed", [0, 2**40 + 7, 2**64 - 1])
def test_a_seed_draws_the_same_bits(backend, seed):
    check_seed(ratio_forward, seed)


@pytest.mark.parametrize("widths", STEP_WIDTHS, ids=str)
def test_ratios_step_as_accurately_as_in_plain_torch(backend, widths):
    check_step(ratio_step_priced, widths)

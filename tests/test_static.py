"""What the compiler makes of the kernels, where no GPU is needed to ask it."""

import re
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")

import hwprune
from hwprune.cli import main
from hwprune.ops import _native, static

IN_TREE = Path(hwprune.__file__).resolve().parent.with_name("benchmarks").exists()  # not installed from a wheel
# Every class of call on Hopper; on its neighbours the largest tiles and what differs most: a compilation takes seconds.
NEIGHBOURS = (
    *(
        "conv 3x3 128x256x64",
        "conv 3x3 masked input grad 128x128x64",
        "conv 3x3 tf32 128x128x32",
        "conv columns masked",
    ),
    *("weight grad 3x3 128x128x32", "weight grad 3x3 int64", "depthwise 3x3 input grad", "epilogue grad", "column sum"),
    *("ratio_forward seed", "ratio_step priced"),
)
SAMPLE = {90: (static.CLASSES, "conv 3x3 128x256x64"), 80: NEIGHBOURS, 100: NEIGHBOURS}


def test_triton_kernels_compile_without_spills_to_the_instructions_expected():
    rows = static.examine_triton(SAMPLE)
    assert static.complaints(rows) == []
    assert all(0 < row["registers"] <= 255 and row["stack_bytes"] == 0 for row in rows)
    convolutions = [row for row in rows if row["kernel"].startswith("conv ") and "ieee" not in row["kernel"]]
    assert convolutions and all(row["tensor_cores"] for row in convolutions)
    assert sum(row["arch"] == 90 for row in rows) > 50
    assert [row["arch"] for row in rows if row["arch"] != 90] == [80] * len(NEIGHBOURS) + [100] * len(NEIGHBOURS)


@pytest.mark.parametrize("module", static.MODULES)
def test_every_kernel_is_in_a_static_case(module):
    """What is launched and not compiled here would be compiled for the first time at a user's."""
    kernels = import_module(f"hwprune.kernels.{module}")
    compiled = {case["kernel"].fn.__name__ for case in kernels.static_cases()}
    launched = set(re.findall(r"(\w+_kernel)\[", Path(kernels.__file__).read_text()))
    assert launched and launched == compiled


def test_complaints_name_what_is_wrong():
    row = {"kernel": "k", "backend": "triton", "arch": 90, "spills": 0, "tensor_cores": 4, "loads_128": 0}
    row |= {"shared_bytes": 200 * 1024, "expects": {}}
    bad = [
        row | {"expects": {"tensor_cores": True, "loads_128": True}},
        row | {"spills": 3},
        row | {"arch": 80},
        row | {"expects": {"tensor_cores": True, "loads_128": False}},
    ]
    assert static.complaints(bad) == [
        "k (triton, sm_90) has no loads 128 instruction",
        "k (triton, sm_90) spills 3 times",
        "k (triton, sm_80) takes 204800 bytes of shared memory, of 166912",
    ]


@pytest.mark.skipif(_native.missing("cuda") is not None, reason="hwprune._cuda is not built: there was no nvcc")
def test_cuda_kernels_multiply_on_tensor_cores_and_load_16_bytes():
    rows = static.examine_cuda()
    assert static.complaints(rows) == []
    assert [row for row in rows if row["stack_bytes"]] == []
    for kernel, tile in _native.module("cuda").dynamic_shared:
        found = [row for row in rows if re.fullmatch(rf"{kernel}<.*, {tile}>", row["kernel"])]
        assert found and all(row["shared_bytes"] >= 32 * 1024 for row in found), kernel
    products = [row for row in rows if row["kernel"].startswith(("product_kernel<Tensor", "weight_kernel<Tensor"))]
    assert products and all(row["tensor_cores"] and row["loads_128"] for row in products)
    for kernel in ("ratio_forward_kernel", "ratio_step_kernel<true>", "ratio_step_kernel<false>"):
        found = [row for row in rows if row["kernel"] == kernel]
        assert found and all(row["loads_128"] for row in found), kernel
    assert {row["arch"] for row in rows} >= {90}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fortran"], "there is no benchmark 'fortran'; there are .*ratio_update" if IN_TREE else "in .* source tree"),
        (["--static", "--archs", "hopper"], "--archs 'hopper' is not understood; write numbers with commas"),
    ],
)
def test_bench_says_what_is_wrong(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)

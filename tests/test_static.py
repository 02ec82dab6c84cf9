"""What the compiler makes of the kernels, where no GPU is needed to ask it."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

import hwprune
from hwprune.cli import main
from hwprune.ops import _native, static

IN_TREE = Path(hwprune.__file__).resolve().parent.with_name("benchmarks").exists()  # not installed from a wheel
# One configuration of every kernel on Hopper, and a few on its neighbours: a compilation takes seconds.
CONVOLUTIONS = ("conv 3x3 64x64", "conv 3x3 masked", "conv 1x1", "conv columns", "conv 3x3 tf32", "weight grad 3x3")
OTHERS = ("depthwise 3x3", "batch norm", "epilogue grad", "pack")
RATIOS = ("ratio_forward uniforms", "ratio_forward seed", "ratio_step given", "ratio_step priced")
SAMPLE = {
    90: (*CONVOLUTIONS, *OTHERS, *RATIOS),
    80: ("conv 3x3 masked", "ratio_forward seed"),
    100: ("conv 3x3 masked", "ratio_step priced"),
}


def test_triton_kernels_compile_without_spills_to_the_instructions_expected():
    rows = static.examine_triton(SAMPLE)
    assert len(rows) == sum(map(len, SAMPLE.values()))
    assert static.complaints(rows) == []
    assert all(0 < row["registers"] <= 255 and row["stack_bytes"] == 0 for row in rows)
    convolutions = [row for row in rows if row["kernel"].startswith("conv ")]
    assert convolutions and all(row["tensor_cores"] for row in convolutions)


def test_complaints_name_what_is_wrong():
    row = {"kernel": "k", "backend": "triton", "arch": 90, "spills": 0, "tensor_cores": 4, "loads_128": 0}
    bad = [
        row | {"expects": {"tensor_cores": True, "loads_128": True}},
        row | {"spills": 3, "expects": {}},
        row | {"expects": {"tensor_cores": True, "loads_128": False}},
    ]
    assert static.complaints(bad) == [
        "k (triton, sm_90) has no loads 128 instruction",
        "k (triton, sm_90) spills 3 times",
    ]


@pytest.mark.skipif(_native.missing("cuda") is not None, reason="hwprune._cuda is not built: there was no nvcc")
def test_cuda_kernels_multiply_on_tensor_cores_and_load_16_bytes():
    rows = static.examine_cuda()
    spilling = {f"{row['kernel']} sm_{row['arch']}" for row in rows if row["spills"] or row["stack_bytes"]}
    assert spilling <= {"weight_kernel<TensorCores<float>, 128> sm_80"}  # 8 bytes, for a second block in place
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

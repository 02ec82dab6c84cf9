"""masked_conv2d's CUDA kernels on a device, against float64."""

import pytest
import torch
from conv_backend_law import (
    BATCH_NORMS,
    CASES,
    COLUMN_CASES,
    LARGE,
    check_batch_norm,
    check_column_gradient,
    check_convolution,
    check_statistics,
)

from hwprune import ops
from hwprune.ops import _cuda_conv

POINTWISE = (1, 1), (0, 0), (1, 1), 1
CAUSE = ops.backends()["cuda"]
pytestmark = [pytest.mark.skipif(CAUSE is not None, reason=str(CAUSE)), pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_convolution_is_as_accurate_as_plain_torch(case):
    check_convolution(_cuda_conv, case, "cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics_come_with_the_convolution(case):
    check_statistics(_cuda_conv, case, "cuda")


@pytest.mark.parametrize("case", COLUMN_CASES, ids=str)
def test_input_gradient_of_few_columns_and_of_many(case, monkeypatch):
    check_column_gradient(_cuda_conv, case, monkeypatch, "cuda")


@pytest.mark.parametrize("case", BATCH_NORMS, ids=lambda case: "-".join(map(str, case)))
def test_batch_norm_is_as_accurate_as_plain_torch(case):
    check_batch_norm(_cuda_conv, *case, device="cuda")


def test_refusals_name_what_is_taken():
    x, weight = torch.zeros(1, 2, 3, 3, device="cuda"), torch.zeros(2, 2, 1, 1, device="cuda")
    assert _cuda_conv.refusal(x, weight, POINTWISE, None) is None
    assert "not torch.float64" in _cuda_conv.refusal(x.double(), weight.double(), POINTWISE, None)
    assert "not on cpu" in _cuda_conv.refusal(x.cpu(), weight, POINTWISE, None)

"""Which configuration a Triton kernel runs with, and what of that outlives a process."""

import json

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate

pytest.importorskip("triton")
from hwprune.kernels import masked_conv as kernels
from hwprune.kernels.masked_conv import Config, _store_choice, _stored_choices, _stored_name, _tuned

CONFIGS = [Config(64, 64, 32, 4, 3), Config(128, 64, 32, 4, 4)]
on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device to measure on")


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "choices.json"
    monkeypatch.setenv("HWPRUNE_AUTOTUNE_CACHE", str(path))
    monkeypatch.delenv("HWPRUNE_AUTOTUNE", raising=False)
    monkeypatch.setattr(kernels, "_CHOSEN", {})
    return path


def test_a_stored_choice_serves_without_measuring(file):
    """Measuring would launch what cannot be launched here."""
    _store_choice(("conv", "first"), CONFIGS[0])
    _store_choice(("conv", "second"), CONFIGS[1])
    assert json.loads(file.read_text()) == {
        _stored_name(("conv", "first")): list(CONFIGS[0]),
        _stored_name(("conv", "second")): list(CONFIGS[1]),
    }
    assert _tuned(("conv", "second"), CONFIGS, lambda config: config) == CONFIGS[1]
    assert _tuned(("conv", "first"), CONFIGS, lambda config: config) == CONFIGS[0]
    assert list(kernels._CHOSEN.values()) == [CONFIGS[1], CONFIGS[0]]


def test_without_tuning_the_first_configuration_serves_and_is_not_remembered(file, monkeypatch):
    _store_choice(("conv",), CONFIGS[1])
    monkeypatch.setenv("HWPRUNE_AUTOTUNE", "0")
    assert _tuned(("conv",), CONFIGS, lambda config: config) == CONFIGS[0]
    assert kernels._CHOSEN == {}


def test_another_compiler_measures_anew(file, monkeypatch):
    _store_choice(("conv",), CONFIGS[1])
    monkeypatch.setattr(kernels.triton, "__version__", "0.0.0")
    assert _stored_choices().get(_stored_name(("conv",))) is None


@on_device
@pytest.mark.parametrize("masked", [False, True])
def test_the_fastest_configuration_is_found_and_kept(file, monkeypatch, masked):
    x = torch.randn(4, 128, 28, 28, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(192, 128, 3, 3, device="cuda", dtype=torch.bfloat16) / 34
    masks = [(torch.rand(channels, device="cuda") < 0.5).float() if masked else None for channels in (128, 192)]
    geometry = (1, 1), (1, 1), (1, 1), 1

    def forward():
        return kernels.forward(x, weight, *masks, None, None, None, "relu", geometry, None, False, False)[0]

    tuned = forward()
    (key,) = kernels._CHOSEN
    assert json.loads(file.read_text()) == {_stored_name(key): list(kernels._CHOSEN[key])}
    monkeypatch.setenv("HWPRUNE_AUTOTUNE", "0")
    kernels._CHOSEN.clear()
    ones = [torch.ones(1, device="cuda") if mask is None else mask for mask in masks]
    truth, plain = (
        (F.conv2d(x.to(dtype) * ins, weight.to(dtype), padding=1) * outs).relu()
        for dtype in (torch.float64, torch.bfloat16)
        for ins, outs in [[mask.to(dtype).view(1, -1, 1, 1) for mask in ones]]
    )
    for y in (tuned, forward()):
        assert_as_accurate(y, plain, truth)

"""Which backend "auto" takes: what was measured to be the fastest, or else the first that runs."""

import json
import re

import pytest
import torch

from hwprune import ops
from hwprune.ops import _cpp_conv, _native, _reference_conv, masked_conv, ratio_update

OPERATORS = {
    *("masked_conv2d", "masked_conv2d_input_backward", "masked_conv2d_weight_backward", "masked_bn_act"),
    *("ratio_forward", "ratio_step", "ratio_step_priced"),
}
KINDS = {"3x3", "1x1", "depthwise", "grouped", "columns", "any"}


def row(op="masked_conv2d", kind="3x3", masks="masked", backend="reference", **changes):
    return {"op": op, "chip": "cpu", "dtype": "float32", "kind": kind, "masks": masks, "backend": backend} | changes


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Sets the rows of the table."""

    def write(*rows):
        path = tmp_path / "measured.json"
        path.write_text(json.dumps({"rows": rows}))
        monkeypatch.setattr(_native, "_MEASURED", path)
        _native._measured.cache_clear()

    yield write
    _native._measured.cache_clear()


def chosen(op="masked_conv2d", kernel=3, groups=1, masked=True, columns=None):
    """The backend's module; enough products that the C++ one is not passed over for a small problem."""
    x, weight = torch.empty(64, 64, 32, 32), torch.empty(64, 64 // groups, kernel, kernel)
    mask = torch.ones(64) if masked else None
    geometry = (1, 1), (0, 0), (1, 1), groups
    return masked_conv._backend(op, x, weight, mask, None, geometry, columns, "auto")


def test_an_entry_changes_the_choice_of_its_calls_only(measure, monkeypatch):
    monkeypatch.delenv("HWPRUNE_BACKEND", raising=False)
    measure()
    assert chosen() is _cpp_conv
    measure(row())
    assert chosen() is _reference_conv
    others = [{"op": "masked_conv2d_input_backward"}, {"kernel": 1}, {"groups": 4}, {"masked": False}]
    for other in (*others, {"groups": 64, "kernel": 9}, {"columns": torch.arange(9)}):
        assert chosen(**other) is _cpp_conv, other
    measure(row(dtype="bfloat16"), row(chip="sm_90"))
    assert chosen() is _cpp_conv


@pytest.mark.parametrize(
    "entry, call",
    [
        (row("masked_conv2d_weight_backward"), {"op": "masked_conv2d_weight_backward"}),
        (row(kind="1x1"), {"kernel": 1}),
        (row(kind="grouped"), {"groups": 4}),
        (row(kind="depthwise"), {"groups": 64, "kernel": 9}),
        (row(kind="columns", masks="dense"), {"columns": torch.arange(9), "masked": False}),
    ],
)
def test_every_kind_of_call_has_an_entry_of_its_own(measure, monkeypatch, entry, call):
    monkeypatch.delenv("HWPRUNE_BACKEND", raising=False)
    measure()
    assert chosen(**call) is _cpp_conv
    measure(entry)
    assert chosen(**call) is _reference_conv


def test_what_cannot_run_is_passed_over_and_a_forced_backend_outranks_the_table(measure, monkeypatch):
    monkeypatch.delenv("HWPRUNE_BACKEND", raising=False)
    measure(row(backend="cuda"))
    assert chosen() is _cpp_conv
    measure(row(backend="torch"))  # no backend where masks are given
    assert chosen() is _cpp_conv
    measure(row())
    monkeypatch.setenv("HWPRUNE_BACKEND", "cpp")
    assert chosen() is _cpp_conv


def test_second_passes_and_ratios_have_entries(measure, monkeypatch):
    monkeypatch.delenv("HWPRUNE_BACKEND", raising=False)
    measure(row("masked_bn_act", "any", "dense"), row("ratio_step", "any", "dense"))
    x = torch.empty(2, 8, 4, 4)
    assert masked_conv._pointwise_backend("masked_bn_act", x, None, "auto") is _reference_conv
    assert masked_conv._pointwise_backend("masked_bn_act", x, torch.ones(8), "auto") is _cpp_conv
    assert ratio_update._choose("ratio_step", "auto", torch.empty(3)) == "reference"
    assert ratio_update._choose("ratio_forward", "auto", torch.empty(3)) == "cpp"


def test_the_shipped_table_is_valid():
    rows = json.loads(_native._MEASURED.read_text())["rows"]
    for entry in rows:
        assert entry["op"] in OPERATORS and entry["kind"] in KINDS and entry["masks"] in ("masked", "dense")
        assert re.fullmatch(r"sm_\d+|cpu", entry["chip"]) and isinstance(getattr(torch, entry["dtype"]), torch.dtype)
        plain = entry["op"] == "masked_conv2d" and entry["masks"] == "dense"
        assert entry["backend"] in {*_native.BACKENDS, *(["torch"] if plain else [])}
    assert len({tuple(entry[name] for name in row() if name != "backend") for entry in rows}) == len(rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_device_a_plain_convolution_is_left_to_torch_where_that_was_faster(measure, monkeypatch):
    monkeypatch.delenv("HWPRUNE_BACKEND", raising=False)
    chip = "sm_{}{}".format(*torch.cuda.get_device_capability())
    x, weight = torch.randn(2, 16, 9, 9), torch.randn(24, 16, 3, 3) / 12
    tensors = {"scale": torch.rand(24) + 0.5, "shift": torch.randn(24), "residual": torch.randn(2, 24, 9, 9)}
    given = {name: each.cuda().bfloat16() for name, each in ({"x": x, "weight": weight} | tensors).items()}
    expected = ops.masked_conv2d(**given, padding=1, act="relu", backend="reference")
    measure(row(chip=chip, dtype="bfloat16", masks="dense", backend="torch"))
    monkeypatch.setattr(masked_conv, "_forward", None)  # no backend is asked
    y = ops.masked_conv2d(**given, padding=1, act="relu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)

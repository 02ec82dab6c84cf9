"""The benchmarks' own machinery: what a device would be given, what is kept of a run, and what counts as passed."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.source_tree


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


def test_every_comparison_of_a_device_can_be_built_and_agrees():
    """In small, by the reference on the CPU: each section, each rival but cuDNN's graph, each kind of convolution."""
    command = [sys.executable, str(BENCHMARKS / "bench_ops.py"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rivals = {(row["op"], row["rival"]) for row in rows}
    assert rivals == {
        *(("masked_conv2d", rival) for rival in ("dense-then-mask", "gather-scatter", "torch", "compiled")),
        *((f"columns ({name})", "dense") for name in ("random", "blocks")),
        *(
            (f"masked_conv2d_{what}_backward", rival)
            for what in ("input", "weight")
            for rival in ("dense-then-mask", "torch")
        ),
        *(("training step", rival) for rival in ("masked step", "compiled", "compiled masked step")),
        ("masked_bn_act", "batch_norm"),
        ("search step", "training step"),
    }
    kinds = {row["kind"] for row in rows if row["op"] == "masked_conv2d"}
    assert kinds == {"3x3", "1x1", "depthwise", "grouped"}


def test_the_convolutions_are_all_of_their_networks(load):
    """Distinct 3x3 and 1x1 convolutions of ResNet-50, counted from the network itself."""
    torchvision = pytest.importorskip("torchvision")
    shape = load("bench_ops").Shape
    found, sizes = set(), {}
    network = torchvision.models.resnet50()
    for module in network.modules():
        if type(module).__name__ == "Conv2d":
            module.register_forward_hook(lambda module, given, _: sizes.update({module: given[0].shape[-1]}))
    import torch

    network.eval()(torch.zeros(1, 3, 224, 224))
    for conv, pixels in sizes.items():
        if conv.kernel_size[0] < 7:
            found.add(shape(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], pixels))
    assert set(load("bench_ops").NETWORKS["resnet50"]) == found


def test_rows_are_kept_as_they_come_and_not_measured_twice(load, monkeypatch, tmp_path):
    measuring = load("measuring")
    monkeypatch.setattr(measuring, "commit", lambda: "abc")
    row = dict.fromkeys(measuring.IDENTITY, "x") | {"threads": 1, "ratio": 1.0}
    path = tmp_path / "results" / "ops.json"
    measuring.Results(path, {}, resume=False).add(row)
    assert json.loads(path.read_text())["rows"] == [row]
    assert measuring.Results(path, {}, resume=True).has(row)
    assert not measuring.Results(path, {}, resume=True).has(row | {"keep": 0.5})
    assert not measuring.Results(path, {}, resume=False).has(row)
    measuring.Results(path, {}, resume=False).add(row | {"ratio": 2.0})
    measuring.Results(path, {}, resume=True).add(row | {"keep": 0.5})
    assert [kept["ratio"] for kept in json.loads(path.read_text())["rows"]] == [2.0, 1.0]
    assert not measuring.Results(path, {"gpu": "another"}, resume=True).has(row)
    monkeypatch.setattr(measuring, "commit", lambda: "def")
    assert not measuring.Results(path, {}, resume=True).has(row)


def test_the_table_takes_the_fastest_over_all_shapes(load, tmp_path):
    def row(backend, median_us, shape="a", rival="dense-then-mask", **changes):
        known = {"op": "masked_conv2d", "dtype": "bfloat16", "keep": 0.5, "kind": "3x3", "masks": "masked"}
        return known | {"backend": backend, "rival": rival, "shape": shape, "median_us": median_us} | changes

    dense = {"masks": "dense", "keep": 1.0, "rival": "torch", "rival_median_us": 3.0}
    rows = [
        *(row("auto", 1.0), row("triton", 4.0), row("triton", 9.0, "b"), row("cuda", 9.0), row("cuda", 3.0, "b")),
        row("cuda", 0.1, "c"),  # of a shape that the other was not timed on
        *(row("triton", 5.0, **dense), row("cuda", 4.0, **dense)),
        *(row(name, us, op="columns (random)", kind="columns") for name, us in (("triton", 2.0), ("cuda", 3.0))),
        *(row(n, us, op="masked_conv2d_weight_backward", **dense) for n, us in (("triton", 5.0), ("cuda", 4.0))),
        {"op": "training step", "backend": "cuda", "rival": "compiled", "shape": "a", "keep": 0.5, "dtype": "bfloat16"},
    ]
    source, table = tmp_path / "ops.json", tmp_path / "measured.json"
    source.write_text(json.dumps({"context": {"capability": "9.0"}, "rows": rows}))
    other = {"op": "masked_conv2d", "chip": "sm_80", "dtype": "bfloat16", "kind": "3x3", "masks": "masked"}
    old = other | {"chip": "sm_90", "kind": "1x1", "backend": "cuda"}
    table.write_text(json.dumps({"rows": [other | {"backend": "triton"}, old]}))
    load("bench_ops").write_table(table, [source, tmp_path / "absent.json"])
    written = json.loads(table.read_text())["rows"]
    assert written[0] == other | {"backend": "triton"}
    found = {(entry["op"], entry["kind"], entry["masks"]): entry["backend"] for entry in written[1:]}
    assert {entry["chip"] for entry in written[1:]} == {"sm_90"}
    assert found == {
        ("masked_conv2d", "3x3", "masked"): "cuda",
        ("masked_conv2d", "3x3", "dense"): "torch",
        ("masked_conv2d", "columns", "masked"): "triton",
        ("masked_conv2d_weight_backward", "3x3", "dense"): "reference",
    }


@pytest.mark.parametrize(
    "part, code, output, result",
    [
        ("tests_cuda", 0, "3 passed in 2s", "passed"),
        ("tests_cuda", 0, "114 skipped in 2s", "not run"),
        ("tests_cuda", 1, "1 failed, 3 passed", "failed"),
        ("tests_solver", 2, "ModuleNotFoundError: No module named 'hypothesis'", "not run"),
        ("search", 1, "ModuleNotFoundError: No module named 'rich.console'", "not run"),
        ("search", 1, "ModuleNotFoundError: No module named 'hwprune.kernels'", "failed"),
        ("conv_resnet56", 0, "", "passed"),
        ("memcheck_cuda", 0, "67 jobs in cuda, 0 wrong\n========= ERROR SUMMARY: 0 errors", "passed"),
        ("memcheck_cuda", 0, "67 jobs in cuda, 0 wrong\n========= ERROR SUMMARY: 2 errors", "failed"),
        ("memcheck_cuda", 1, "Traceback\n========= ERROR SUMMARY: 0 errors", "failed"),
        ("memcheck_cuda", 0, "67 jobs in cuda, 0 wrong", "failed"),
        (
            "racecheck_cuda",
            0,
            "67 jobs in cuda, 0 wrong\n== RACECHECK SUMMARY: 0 hazards displayed (0 errors)",
            "passed",
        ),
        ("racecheck_cuda", 0, "67 jobs in cuda, 0 wrong\n== RACECHECK SUMMARY: 7 hazards displayed", "failed"),
        ("racecheck_cuda", 1, "========= Error: Device not supported", "not run"),
    ],
)
def test_only_what_has_run_and_found_nothing_has_passed(load, part, code, output, result):
    gpu_check = load("gpu_check")
    assert gpu_check.verdict(gpu_check.PARTS[part], code, output)[0] == result


def test_every_part_of_the_check_fits_one_call_and_names_what_there_is(load):
    gpu_check = load("gpu_check")
    for name, part in gpu_check.PARTS.items():
        assert part.limit_s + gpu_check.BUILD_S <= 540, name
        files = [argument for argument in part.arguments if argument.endswith(".py")]
        assert files and all((BENCHMARKS.parent / file).exists() for file in files), name

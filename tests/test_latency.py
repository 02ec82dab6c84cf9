"""Targets, deployed forms, clocks, surfaces, and a real profile of a real (small) network on this machine."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from graph_law import prepare
from torch import nn

from hwprune.errors import BackendUnavailable, InvalidInput, UnknownWorkload
from hwprune.graph import keep_first, resize, segments, trace
from hwprune.latency import (
    LatencyTable,
    Reference,
    Target,
    available_runtimes,
    build,
    fingerprint,
    latency_model,
    measure,
    profile,
    random_widths,
)
from hwprune.latency.profiler import CELL_SHARE, Plan, calibrate
from hwprune.latency.runtimes import Clocked, deploy, isolated
from hwprune.latency.surface import fit_surface
from hwprune.latency.timing import settings, time_runs, undisturbed, watch
from hwprune.models import load_model

# -- target


@pytest.mark.parametrize(
    "target",
    [
        Target(),
        Target(threads=2, memory_format="channels_last", fold_batch_norm=False),
        Target(device="cuda:1", runtime="cudagraph", dtype="float16"),
        Target(runtime="onnxruntime", allocator="system"),
    ],
)
def test_a_target_survives_text_and_json(target):
    assert Target.parse(str(target)) == target
    assert Target.from_dict(target.as_dict()) == target
    assert target.runtime in target.describe() and target.device in target.describe()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tpu", "give cpu, cuda or cuda:INDEX"),
        ("cpu,runtime=tensorrt", "choose one of eager, cudagraph, compile, onnxruntime"),
        ("cpu,dtype=int3", "choose one of float32"),
        ("cpu,threads=0", "give at least 1"),
        ("cpu,threads=two", "give a whole number"),
        ("cpu,fold_batch_norm=yes", "give true or false"),
        ("cpu,speed=9", "write key=value with a key of device, runtime"),
        ("cpu,eager", "write key=value"),
        ("cpu,runtime=cudagraph", "needs a cuda device"),
        ("cuda,runtime=onnxruntime", "runs on the cpu here"),
    ],
)
def test_a_wrong_target_says_what_is_possible(text, complaint):
    with pytest.raises(InvalidInput) as caught:
        Target.parse(text)
    assert complaint in str(caught.value)


def test_the_fingerprint_names_machine_and_libraries():
    here = fingerprint(Target(threads=2))
    assert here["torch"] == str(torch.__version__) and here["threads"] == 2 and here["cpu"]
    assert here == fingerprint(Target(threads=2)) != fingerprint(Target(threads=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_a_missing_device_is_unavailable():
    with pytest.raises(BackendUnavailable, match="needs a CUDA device"):
        build(Target(device="cuda"), nn.Linear(2, 2))
    assert available_runtimes()["cudagraph"] and available_runtimes()["eager"] == ""


# -- deployed forms


class Norms(nn.Module):
    """Every producer a batch norm can be folded into, and norms that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)  # nothing before it
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn_depth = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, affine=False)
        self.up, self.bn_up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), nn.BatchNorm2d(12)
        self.shared, self.bn_shared = nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4)  # read by more than its norm
        self.linear, self.bn_linear = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.tokens, self.bn_tokens = nn.Linear(6, 6), nn.BatchNorm1d(5)  # normalises dim 1, not the linear's output

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(self.first(x))))
        x = self.bn_up(self.up(self.bn_depth(self.depth(x))))
        y = self.shared(x)
        x = self.bn_linear(self.linear((y + self.bn_shared(y)).mean((2, 3))))
        return self.bn_tokens(self.tokens(x[:, None].expand(-1, 5, -1)))


@pytest.mark.parametrize("resized", [False, True])
def test_folding_changes_nothing_but_the_number_of_norms(resized):
    program = trace(prepare(Norms()), (torch.randn(2, 3, 8, 8, dtype=torch.float64),))
    module = resize(program, keep_first(program.groups, program.groups.widths - 1)) if resized else program.module
    folded, kept = deploy(Target(), module), deploy(Target(fold_batch_norm=False), module)
    expected = module.eval()(*program.example_inputs)
    for form in (folded, kept):
        assert (form(*program.example_inputs) - expected).abs().max() < 1e-12 * expected.abs().max()

    def norms(form):
        modules = dict(form.named_modules())
        kinds = [str(n.target) for n in form.graph.nodes if n.op == "call_function"]
        kinds += [type(modules[n.target]).__name__ for n in form.graph.nodes if n.op == "call_module"]
        return sum("batch_norm" in kind or "BatchNorm" in kind for kind in kinds)

    assert norms(kept) == 7 and norms(folded) == 3  # the first, the shared one and the one over tokens stay
    names = {node.name for node in module.graph.nodes if node.op == "call_function"}
    assert names - {node.name for node in folded.graph.nodes} <= {n for n in names if "batch_norm" in n}


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["program", "module"])
def test_the_deployed_form_computes_what_the_model_does(memory_format, kind):
    network = load_model("resnet8").eval()
    program = trace(network, (torch.randn(2, 3, 32, 32),))
    expected = network(*program.example_inputs).detach()
    run = build(Target(memory_format=memory_format), program.module if kind == "program" else network)
    assert torch.allclose(run(*program.example_inputs), expected, atol=1e-5)
    assert network.conv1.weight.grad is None and network.conv1.weight.is_contiguous()  # the user's own is left alone


def test_a_module_that_cannot_be_traced_runs_as_it_is():
    class Picky(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    x = torch.ones(3)
    assert torch.equal(build(Target(), Picky())(x), 2 * x)


@pytest.mark.parametrize("runtime", ["onnxruntime", "compile"])
def test_other_runtimes_compute_the_same(runtime):
    if reason := available_runtimes()[runtime]:
        pytest.skip(reason)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)).eval()
    x = torch.randn(2, 3, 8, 8)
    run = build(Target(runtime=runtime), network)
    assert torch.allclose(run(x), network(x), atol=1e-5)
    assert time_runs(run, (x,), Target(runtime=runtime), 3).min() > 0


def test_clocks_change_no_result_and_add_up_to_the_forward():
    program = trace(prepare(load_model("resnet8")).float(), (torch.randn(2, 3, 32, 32),))
    parts = segments(program)
    small = resize(program, keep_first(program.groups, program.groups.widths // 2))
    network = Clocked(Target(), small, [segment.nodes for segment in parts])
    output, ticks = network.forward(*program.example_inputs)
    assert torch.equal(output, network(*program.example_inputs))
    assert torch.allclose(output, small.eval()(*program.example_inputs), atol=1e-5)
    assert list(ticks) == sorted(ticks) and len(ticks) == network.timed.sum() + 1
    times = network.times_us(program.example_inputs, 6)
    assert times.shape[1] == len(parts) and (times[:, network.timed] > 0).all()
    assert (times[:, ~network.timed] == 0).all()


def test_an_isolated_segment_computes_what_it_does_inside():
    program = trace(prepare(load_model("resnet8")).float(), (torch.randn(2, 3, 32, 32),))
    last = segments(program)[-1]
    alone = isolated(Target(), program.module, last.nodes, program.example_inputs)
    run, feeds = alone.copies[0]
    assert torch.allclose(run(*feeds)[0], program(*program.example_inputs), atol=1e-5)
    assert alone.times_us(4).min() > 0


# -- timing


def test_settings_are_restored_even_after_an_error():
    torch.set_flush_denormal(False)
    with pytest.raises(RuntimeError), settings(Target(threads=2)):
        assert torch.get_num_threads() == 2
        assert float(torch.tensor([1e-38]) * 1e-2) == 0.0
        raise RuntimeError
    assert torch.get_num_threads() == 1 and float(torch.tensor([1e-38]) * 1e-2) != 0.0


def test_runs_that_lost_their_cpu_are_left_out():
    wall = np.array([100.0, 100, 300, 101, 500, 102])
    cpu = np.array([99.0, 100, 100, 101, 100, 102])
    assert undisturbed(wall, cpu).tolist() == [True, True, False, True, False, True]
    assert undisturbed(wall, 2 * cpu).tolist() == [True, True, False, True, False, True]  # two busy threads
    always = np.array([150.0, 200, 400])
    assert undisturbed(always, np.full(3, 100.0)).sum() == 1


def test_a_measurement_has_quantiles_in_order_and_every_unit_in_ms():
    def work(x):
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.002:
            pass
        return x

    x = (torch.zeros(1),)
    sample = measure(work, x, Target(), seconds=0.1)
    assert 2.0 <= sample.p20_ms <= sample.median_ms <= sample.p80_ms and sample.count >= 5 and sample.drift == 1.0
    assert 0.0 <= sample.contention <= 1.0
    reference = Reference.start(work, x, Target(), blocks=3)
    assert reference.quiet_ms >= 2.0
    beside = measure(work, x, Target(), seconds=0.1, reference=reference)
    assert beside.median_ms * beside.drift >= 2.0 * 0.9 and len(reference.history_ms) > 3


def test_the_watch_notices_neighbours():
    with watch() as usage, subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        time.sleep(0.6)
        neighbour.kill()
    assert 0.0 < usage.contention <= 1.0


# -- surfaces


def staircase(sizes):
    x, y = sizes.T
    return 5.0 + 0.02 * x * np.ceil(y / 16) * 16


def test_a_surface_pools_noisy_samples_of_a_staircase():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 65, (240, 2)).astype(float)
    noise = np.exp(0.05 * random.standard_normal(240))
    doubt = np.ones(240)
    doubt[:20] = 10.0
    noise[:20] *= 2.5  # a slow spell, known as such
    noise[20:24] *= 3.0  # outliers, not known
    surface = fit_surface(sizes, staircase(sizes) * noise, doubt)
    unseen = random.integers(1, 65, (400, 2)).astype(float)
    error = np.abs(surface(unseen) / staircase(unseen) - 1)
    assert np.median(error) < 0.03 and np.quantile(error, 0.95) < 0.12  # of noise with 5 % deviation
    assert surface.noise < 0.12
    assert (surface.spread(unseen) > 0).all()


def test_a_surface_of_one_size_and_of_none():
    x = np.arange(1, 33, dtype=float)[:, None]
    line = fit_surface(x, 3.0 + 0.5 * x[:, 0], np.ones(32))
    np.testing.assert_allclose(line(x), 3.0 + 0.5 * x[:, 0], rtol=0.02)
    fixed = fit_surface(np.zeros((5, 0)), np.array([4.0, 4.1, 3.9, 4.0, 40.0]), np.ones(5))
    assert fixed(np.zeros((2, 0))).tolist() == [4.0, 4.0]


def test_repeated_cells_are_pooled_by_a_weighted_median():
    sizes = np.array([[4.0]] * 3 + [[8.0]] * 3 + [[16.0]] * 3)
    times = np.array([10.0, 10, 90, 20, 20, 20, 40, 40, 40])
    surface = fit_surface(sizes, times, np.ones(9))
    assert surface.cells.ravel().tolist() == [4.0, 8.0, 16.0]
    np.testing.assert_allclose(surface(np.array([[4.0], [8.0], [16.0]])), [10, 20, 40], rtol=0.05)


# -- a profile


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return trace(prepare(load_model("resnet8")).float(), (torch.randn(1, 3, 32, 32),))


@pytest.fixture(scope="module")
def profiled(program, tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("latency") / "table.jsonl"
    table = LatencyTable.open(path, Target())
    return profile(program, Target(), table, seconds=0.5, progress=False), path


def test_a_profile_knows_dense_floor_and_everything_between(program, profiled):
    model, _ = profiled
    assert model.unit == "ms" and 0 < model.floor < model.dense
    assert model.facts["forwards"] >= 40 and model.facts["calibrations"] >= 10
    assert model.facts["cells_measured"] <= CELL_SHARE * model.facts["cells_of_full_grid"]
    assert 0 < model.residual < 0.5
    widths = np.stack(list(random_widths(program, 64, seed=3)))
    predicted = model.predict(widths)
    assert np.isfinite(predicted).all() and (predicted > 0).all() and np.isfinite(model.price(widths)).all()
    value, gradient = model.value_and_grad(torch.from_numpy(program.groups.widths * 0.7))
    assert value > 0 and (gradient >= 0).all() and (gradient > 0).any()
    for group, full in enumerate(program.groups.widths):
        assert model.levels(group)[0] == 1 and model.levels(group)[-1] == full


def test_samples_of_one_forward_add_up_to_it(profiled):
    table = LatencyTable.read(profiled[1])
    parts: dict[int, float] = {}
    for record in table.records:
        if record["kind"] == "segment":
            parts[record["forward"]] = parts.get(record["forward"], 0.0) + record["median_us"]
    wholes = {r["forward"]: r["median_us"] for r in table.records if r["kind"] == "whole" and r["role"] == "fit"}
    ratios = [parts[forward] / whole for forward, whole in wholes.items()]
    assert len(ratios) >= 40 and 0.9 < np.median(ratios) < 1.02  # medians of parts, not of their sum


def test_a_finished_profile_is_only_read(program, profiled):
    model, path = profiled
    before = path.read_bytes()
    again = profile(program, Target(), LatencyTable.open(path, Target()), seconds=0.5, progress=False)
    assert path.read_bytes() == before
    assert again.dense == model.dense and again.residual == model.residual


def test_the_table_prices_another_program_of_the_same_segments_only_after_its_own_calibration(program, profiled):
    table = LatencyTable.read(profiled[1])
    deeper = trace(load_model("resnet14"), (torch.randn(1, 3, 32, 32),))
    with pytest.raises(UnknownWorkload, match="profile it first"):
        latency_model(deeper, table)
    assert {s.signature for s in Plan.of(deeper).segments} & {s.signature for s in Plan.of(program).segments}


def test_a_killed_profile_continues(program, tmp_path):
    path = tmp_path / "table.jsonl"
    script = f"""
import torch
from hwprune.graph import trace
from hwprune.latency import LatencyTable, Target, profile
from hwprune.models import load_model
torch.manual_seed(0)
torch.set_num_threads(1)
program = trace(load_model("resnet8"), (torch.randn(1, 3, 32, 32),))
profile(program, Target(), LatencyTable.open({str(path)!r}, Target()), seconds=1000, progress=False)
"""
    with subprocess.Popen([sys.executable, "-c", script]) as child:
        while child.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 40):
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
    killed = LatencyTable.open(path, Target())
    kept = len(killed.records)
    assert kept >= 30
    model = profile(program, Target(), killed, seconds=0.5, progress=False)
    assert model.dense > 0
    assert LatencyTable.open(path, Target()).records[:kept] == killed.records[:kept]
    forwards = [r["forward"] for r in killed.records if r["kind"] == "whole"]
    assert forwards == list(range(len(forwards)))  # the second run went on where the first was killed


def test_a_profile_needs_time(program):
    with pytest.raises(InvalidInput, match="give a positive number"):
        profile(program, Target(), LatencyTable.open(None, Target()), seconds=0, progress=False)


def test_the_calibration_recovers_scale_and_overhead_and_never_a_negative_one(program, profiled):
    table = LatencyTable.read(profiled[1])
    plan = Plan.of(program)
    bare = replace(profiled[0], scale=1e-3, offset=0.0)
    rows = [r for r in table.records if r["kind"] == "whole" and r["role"] != "removal"]
    widths = np.array([r["widths"] for r in rows])
    for overhead, expected in ((0.05, 0.05), (-0.05, 0.0)):
        table.records = [
            {**r, "role": "calibration", "reference_us": 100.0, "median_us": 1e3 * (1.2 * ms + overhead)}
            for r, ms in zip(rows, bare.predict(widths), strict=True)
            if 1.2 * ms + overhead > 0
        ]
        scale, offset, residual = calibrate(bare, plan, table)
        assert offset == pytest.approx(expected, abs=1e-3)
        if overhead > 0:
            assert scale == pytest.approx(1.2e-3, rel=1e-2) and residual < 1e-2


def test_the_calibration_believes_clocked_forwards_about_what_medians_lose(program, profiled):
    """The sums at both ends are raised by as much as whole forwards exceed the sums of their segments' medians."""
    table = LatencyTable.read(profiled[1])
    bare = replace(profiled[0], scale=1e-3, offset=0.0)
    rows = [r for r in table.records if r["kind"] == "whole" and r["role"] == "fit"]
    totals = bare.predict(np.array([r["widths"] for r in rows]))
    table.records = [
        {**r, "role": "fit" if i % 4 else "calibration", "reference_us": 100.0, "median_us": 1e3 * 1.1 * ms}
        for i, (r, ms) in enumerate(zip(rows, totals, strict=True))
    ]
    scale, offset, residual = calibrate(bare, Plan.of(program), table)
    assert scale == pytest.approx(1.1e-3, rel=1e-6) and offset < 1e-6 and residual < 1e-3


def test_what_is_left_of_a_removed_block_is_measured_and_costs_less_than_its_last_channel(program, profiled):
    base, path = profiled
    plan, table = Plan.of(program), LatencyTable.read(path)
    removals = [r for r in table.records if r["kind"] == "whole" and r["role"] == "removal"]
    assert removals and all(0 in r["widths"] for r in removals if r["median_us"] < 0.5 * 1e3 * base.dense)
    rests = {rest.signature for rest in plan.left.values()}
    seen = [r for r in table.records if r["kind"] == "segment" and r["signature"] in rests]
    assert rests and {r["signature"] for r in seen} == rests
    assert rests.isdisjoint(segment.signature for segment in plan.segments)
    cost, removable = base.removing, program.groups.removable
    for g in np.flatnonzero(removable):
        narrow = np.where(np.arange(len(removable)) == g, 1, base.full)
        assert 0 < cost.price(np.where(narrow == 1, 0, narrow)) < cost.price(narrow) == base.price(narrow)
    assert all(term.left for term in base.terms if any(name.startswith("add") for name in term_nodes(plan, term.name)))
    # without those samples the narrowest block stands for what is left of it
    table.records = [r for r in table.records if r.get("signature") not in rests]
    bounded = latency_model(program, table).removing
    gone = np.where(removable, 0, base.full)
    assert cost.price(gone) < bounded.price(gone) < base.price(np.where(removable, 1, base.full))


def term_nodes(plan, name):
    """The calls of a segment that carries on a block's stream."""
    indices = {index for index, _ in plan.left}
    return [
        node
        for i, segment in enumerate(plan.segments)
        if i in indices and segment.name == name
        for node in segment.nodes
    ]

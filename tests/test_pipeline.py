"""The whole line on a small network: budgets, refusals, interruptions, and the user's own loop."""

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_search import Chain
from torch import nn

import hwprune
from hwprune import pipeline
from hwprune.data import load_data
from hwprune.errors import HwpruneError, InfeasibleBudget, InvalidInput, TrainingDiverged, UnsupportedModel
from hwprune.models import load_model
from hwprune.pipeline import AIM, LEAST_USE, MOST_USE, BudgetMissed, Pruning, _Allowance
from hwprune.search import METHODS
from hwprune.train import Recipe

pytestmark = pytest.mark.usefixtures("short_turns")

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = {"dense_epochs": 1, "search_epochs": 2, "epochs": 1}


@pytest.fixture(scope="module")
def data():
    return load_data("digits", batch_size=64, subset=320)


@pytest.fixture(scope="module")
def example(data):
    return torch.randn((64, *data.shape), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, example):
    """A latency table of resnet8 that holds enough."""
    path = tmp_path_factory.mktemp("tables") / "table.jsonl"
    torch.set_num_threads(1)
    hwprune.profile(dense(), example, table=path, profile_seconds=1, progress=False)
    return path


@pytest.fixture
def table(profiled, tmp_path):
    return shutil.copy(profiled, tmp_path / "table.jsonl")


def dense():
    torch.manual_seed(0)
    return load_model("resnet8", classes=10, in_channels=1)


def prune(data, example, table, **changes):
    arguments = {
        "train_loader": data.train, "test_loader": data.test, "budget": "50%flops", "table": table, "name": "resnet8",
        "recipe": Recipe(lr=0.05, batch_size=64), "profile_seconds": 1, "progress": False, **EPOCHS,
        **changes,
    }  # fmt: skip
    return hwprune.prune(arguments.pop("model", None) or dense(), example, **arguments)


def test_flops_budget_end_to_end(data, example, table, tmp_path):
    model = dense()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = prune(data, example, table, model=model, out=tmp_path / "run")
    result = pruned.result
    assert result["flops"] <= 0.5 * result["dense_flops"]
    assert result["parameters"] == sum(p.numel() for p in pruned.module.parameters()) < result["dense_parameters"]
    wanted = (
        "method model seed epochs dense_ms budget_ms predicted_ms measured_ms dense_accuracy accuracy dense_parameters "
        "parameters wall_s target"
    )
    assert set(wanted.split()) <= set(result)
    assert (result["method"], result["seed"], result["epochs"], result["budget_ms"]) == ("dsa", 0, 1, None)
    assert {"profile", "search", "fine-tune", "total"} <= set(result["wall_s"])
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert "<h2>Training</h2>" in (tmp_path / "run" / "report.html").read_text()
    torch.testing.assert_close(dict(model.state_dict()), before)  # the user's model is left as it was

    with torch.no_grad():
        expected = pruned.module.eval()(example)
        torch.testing.assert_close(hwprune.load(tmp_path / "run")(example), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hwprune.load(tmp_path / "run", dense)(example), expected, rtol=1e-4, atol=1e-5)


def test_latency_budget_ends_in_a_measurement(data, example, table, tmp_path):
    out = tmp_path / "run"
    try:
        result = prune(data, example, table, budget="70%", out=out).result
    except BudgetMissed as missed:  # a busy machine may say so; then everything is kept all the same
        result = missed.result
        assert str(out) in str(missed)
    assert result["budget_ms"] == pytest.approx(0.7 * result["dense_ms"])
    assert result["met"] == (result["measured_ms"] <= result["budget_ms"])
    assert result["prediction_residual"] > 0
    assert 1 <= len(result["rounds"]) <= 6
    assert all(0 <= row["optimality_gap"] <= 1 and row["allocator"] in ("milp", "greedy") for row in result["rounds"])
    assert "Optimality gap of the last allocation" in (out / "report.html").read_text()
    assert json.loads((out / "result.json").read_text()) == result
    assert hwprune.load(out)(example).shape == (64, 10)


def test_a_budget_in_milliseconds(data, example, table):
    goal = Pruning(dense(), example, budget="50%flops", table=table, profile_seconds=1, progress=False).goal
    budget_ms = (goal.dense_ms + goal.floor_ms) / 2  # far from what is refused, whatever the machine does next
    try:
        result = prune(data, example, table, budget=None, budget_ms=budget_ms).result
    except BudgetMissed as missed:
        result = missed.result
    assert (result["budget"], result["budget_ms"]) == (f"{budget_ms:g}ms", budget_ms)
    assert result["met"] == (result["measured_ms"] <= budget_ms)
    assert result["parameters"] < result["dense_parameters"]


@pytest.mark.parametrize("method", ["dsa", "magnitude", "uniform"])
def test_widths_keep_to_what_the_user_binds_them_to(data, example, table, method):
    said = []
    run = {"method": method, "dense_epochs": 0, "search_epochs": 1, "epochs": 0, "say": said.append}
    bound = {"minimum": 6, "multiple": 4, "pinned": {"conv1": 10}}
    pruned = prune(data, example, table, budget="60%flops", **bound, **run)
    widths, full = pruned.result["widths"], dict(zip(*groups_of(dense(), example), strict=True))
    assert widths.pop("conv1") == 10
    assert all(width >= 8 and (width % 4 == 0 or width == full[name]) for name, width in widths.items())
    assert any(width < full[name] for name, width in widths.items())
    assert any("optimality gap" in line for line in said)
    with pytest.raises(InfeasibleBudget, match="below the floor"):
        prune(data, example, table, budget="60%flops", minimum=64, **run)


def groups_of(model, example):
    groups = hwprune.trace(model, example).groups
    return groups.names, groups.widths.tolist()


def test_what_a_method_has_to_say_stands_in_result_and_report(data, example, table, tmp_path):
    run = {"method": "ss_auto", "dense_epochs": 0, "search_epochs": 1, "epochs": 0, "out": tmp_path}
    first = prune(data, example, table, **run).result
    assert first["notes"] and first["notes"][0].startswith("columns pay in ")
    assert first["notes"][0] in (tmp_path / "report.html").read_text()
    assert prune(data, example, table, resume=True, **run).result["notes"] == first["notes"]


class Untouchable:
    """Training data that nobody may ask for."""

    def __len__(self):
        return 5

    def __iter__(self):
        raise AssertionError("this run must not train")


class Interrupted:
    """Training data during which Ctrl-C is pressed after so many batches."""

    def __init__(self, loader, after):
        self.loader, self.left = loader, after

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch):
        self.loader.set_epoch(epoch)

    def __iter__(self):
        for batch in self.loader:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_run_continues_to_the_same_weights(data, example, table, tmp_path):
    calibrated = {"calibration_loader": data.calibration}
    whole = prune(data, example, table, out=tmp_path / "whole", **calibrated)
    run = {"out": tmp_path / "run", "resume": True, **calibrated}
    epoch = len(data.train)
    # Batches until the next Ctrl-C; a phase begins again at the start of the epoch in which it was interrupted.
    for after, phase in ((3, "dense"), (epoch + 3, "search"), (2 * epoch + 3, "fine-tune")):
        with pytest.raises(KeyboardInterrupt) as interrupt:
            prune(data, example, table, train_loader=Interrupted(data.train, after), **run)
        assert interrupt.value.__notes__ == [phase]
        assert phase not in json.loads((tmp_path / "run" / "state" / "run.json").read_text())["done"]
    continued = prune(data, example, table, **run)
    assert continued.result["widths"] == whole.result["widths"]
    torch.testing.assert_close(dict(continued.module.state_dict()), dict(whole.module.state_dict()))


LINE = {
    "trace": pipeline,
    "profile_program": pipeline,
    "_goal": Pruning,
    "_allocate": Pruning,
    "refit_": pipeline,
    "cut": pipeline,
    "recalibrate": pipeline,
    "evaluate": pipeline,
    "_race": Pruning,
    "write": pipeline.report,
}
REFITTED = {"dense_epochs": 0, "search_epochs": 1, "epochs": 1, "refit": True}


@pytest.fixture(scope="module")
def left_alone(data, example, profiled):
    return prune(data, example, profiled, calibration_loader=data.calibration, **REFITTED)


@pytest.mark.parametrize("step", LINE)
def test_an_interruption_anywhere_loses_nothing(data, example, table, tmp_path, monkeypatch, left_alone, step):
    """Ctrl-C as each step of the line begins: the run goes on, and ends with the weights of one that was left alone."""
    run = {"out": tmp_path / "run", "resume": True, "calibration_loader": data.calibration, **REFITTED}
    before = table.read_text()

    def interrupted(*args, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LINE[step], step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(data, example, table, **run)
    assert table.read_text() == before
    continued = prune(data, example, table, **run)
    assert continued.result["widths"] == left_alone.result["widths"]
    torch.testing.assert_close(dict(continued.module.state_dict()), dict(left_alone.module.state_dict()))


def test_what_a_search_has_found_is_kept_with_the_curve_of_its_training(data, example, table, tmp_path, monkeypatch):
    run = {"out": tmp_path / "run", "resume": True, **REFITTED, "epochs": 0}
    kept = Pruning._keep_found

    def then_killed(*args):
        kept(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Pruning, "_keep_found", then_killed)
        prune(data, example, table, **run)
    prune(data, example, table, **run)
    rows = json.loads((tmp_path / "run" / "state" / "run.json").read_text())["done"]["search"]["history"]
    assert [row["phase"] for row in rows] == ["search"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Three layers, data of four steps an epoch, and a latency table: what a search of any method is quick on."""
    torch.manual_seed(0)
    model, inputs = Chain((8, 12, 8), classes=10), torch.randn(32, 1, 8, 8)
    path = tmp_path_factory.mktemp("chain") / "table.jsonl"
    hwprune.profile(model, inputs, table=path, profile_seconds=1, progress=False)
    return model, inputs, path, load_data("digits", batch_size=32, subset=160, validation=0.2)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_goes_on_where_it_was_interrupted(chain, tmp_path, method):
    model, inputs, table, loaded = chain

    def run(train, out):
        return hwprune.prune(
            model,
            inputs,
            train_loader=train,
            validation_loader=loaded.validation,
            calibration_loader=loaded.calibration,
            budget="50%flops",
            method=method,
            recipe=Recipe(lr=0.05, batch_size=32),
            search_epochs=4,
            epochs=1,
            table=table,
            out=out,
            resume=True,
            progress=False,
        )

    whole = run(loaded.train, None)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(loaded.train, 10), tmp_path / "run")
    kept = torch.load(next((tmp_path / "run" / "state").glob("*.checkpoint")), weights_only=True)
    assert kept["step"] == 8  # half of the search: the end of the epoch before
    resumed = run(loaded.train, tmp_path / "run")
    assert resumed.result["widths"] == whole.result["widths"]
    assert min(resumed.result["widths"].values()) < 8
    torch.testing.assert_close(dict(resumed.module.state_dict()), dict(whole.module.state_dict()))


def test_a_search_says_where_its_held_out_images_are_training_images(chain, tmp_path):
    model, inputs, table, loaded = chain
    for validation, held_out in ((loaded.validation, 1.0), (None, 0.0)):
        out, said = tmp_path / str(held_out), []
        hwprune.prune(
            model,
            inputs,
            train_loader=loaded.train,
            validation_loader=validation,
            calibration_loader=loaded.calibration,
            budget="50%flops",
            method="iterative",
            recipe=Recipe(lr=0.05, batch_size=32),
            search_epochs=1,
            epochs=0,
            table=table,
            out=out,
            progress=False,
            say=said.append,
        )
        log = json.loads((out / "state" / "run.json").read_text())["done"]["search"]["log"]
        assert [row["held_out"] for row in log] == [held_out] * len(log) and log
        line = "no images are held out: iterative judges on images that the weights are trained on"
        assert (line in said) == (not held_out)


def test_a_floor_is_judged_on_test_data_or_else_on_held_out_images(chain, tmp_path):
    model, inputs, table, loaded = chain
    arguments = {"budget": "50%flops", "table": table, "out": tmp_path, "progress": False}
    work = Pruning(model, inputs, **arguments)
    with work.search("increg", steps=0, options={"floor": 0.01}, held_out=loaded.validation):
        pass  # nothing was trained, and a floor this low is kept all the same
    module = work.cut()
    for accuracy, held_out, expected in ((0.5, 0.0, True), (0.0, 0.5, False), (None, 0.5, True), (None, None, None)):
        result = work.finish(module, accuracy, held_out)
        assert (result["accuracy_floor"], result["floor_met"]) == (0.01, expected)
    resumed = Pruning(model, inputs, resume=True, **arguments)
    assert resumed.restore_search("increg") and resumed.found.accuracy_floor == 0.01
    pruned = hwprune.prune(
        model,
        inputs,
        train_loader=loaded.train,
        validation_loader=loaded.validation,
        budget="50%flops",
        method="increg",
        options={"floor": 0.01},
        search_epochs=0,
        epochs=0,
        table=table,
        progress=False,
    )
    assert pruned.result["accuracy"] is None and pruned.result["floor_met"] is True


@pytest.mark.parametrize("method, spent", [("uniform", (0, 3)), ("csr", (0, 3)), ("dsa", (2, 1))])
def test_epochs_that_a_method_does_not_search_in_go_to_fine_tuning(chain, method, spent):
    model, inputs, table, loaded = chain
    said = []
    pruned = hwprune.prune(
        model,
        inputs,
        train_loader=loaded.train,
        calibration_loader=loaded.calibration,
        budget="50%flops",
        method=method,
        recipe=Recipe(lr=0.05, batch_size=32),
        search_epochs=2,
        epochs=1,
        table=table,
        progress=False,
        say=said.append,
    )
    settings = pruned.result["settings"]
    assert (settings["search_epochs"], settings["epochs"]) == spent
    line = f"{method} trains nothing while it searches: the search's epochs go to fine-tuning, 3 in all"
    assert (line in said) == (spent[0] == 0)


def test_a_finished_run_resumes_without_training(data, example, table, tmp_path):
    first = prune(data, example, table, out=tmp_path)
    again = prune(data, example, table, out=tmp_path, resume=True, train_loader=Untouchable())
    torch.testing.assert_close(dict(again.module.state_dict()), dict(first.module.state_dict()))


def test_resuming_with_other_settings_is_refused(data, example, table, tmp_path):
    prune(data, example, table, out=tmp_path, dense_epochs=0, search_epochs=0, epochs=0, method="uniform")
    with pytest.raises(InvalidInput, match=r"with method 'uniform', epochs 0, not method 'uniform', epochs 3|epochs"):
        prune(
            data, example, table, out=tmp_path, dense_epochs=0, search_epochs=0, epochs=3, method="uniform", resume=True
        )
    settings = {"dense_epochs": 0, "search_epochs": 0, "epochs": 0, "method": "uniform", "resume": True}
    with pytest.raises(InvalidInput, match=r"inputs \['64x1x8x8 float32'\], not inputs \['32x1x8x8 float32'\]"):
        prune(data, example[:32], table, out=tmp_path, **settings)
    with pytest.raises(InvalidInput, match="multiple 1, not multiple 4"):
        prune(data, example, table, out=tmp_path, multiple=4, **settings)
    (tmp_path / "state" / "run.json").write_text('{"settings": ')
    with pytest.raises(HwpruneError, match="start again without --resume"):
        prune(data, example, table, out=tmp_path, resume=True)


def test_what_is_refused_leaves_the_run_that_was_there(data, example, table, tmp_path):
    prune(data, example, table, out=tmp_path, dense_epochs=0, search_epochs=0, epochs=0, method="uniform")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for refused in ({"budget": "1%"}, {"budget": "0.01%flops"}, {"model": Branching()}, {"pinned": {"conv9": 1}}):
        with pytest.raises(HwpruneError):
            prune(data, example, table, out=tmp_path, **refused)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    hwprune.load(tmp_path)


@pytest.mark.parametrize(
    "budget, kind, message",
    [
        (
            {"budget": "1%"},
            InfeasibleBudget,
            r"below the floor: .* still takes [\d.]+ of its [\d.]+ ms; give at least \d+%",
        ),
        ({"budget": "0.01%flops"}, InfeasibleBudget, "below the floor: .* of the FLOPs remain"),
        ({"budget": None, "budget_ms": 1e5}, InvalidInput, "above .* ms, the cost of the network as it is"),
        ({"budget": None}, InvalidInput, "give either budget_ms"),
        ({"budget": "fast"}, InvalidInput, "not understood"),
        ({"guide": "parameters"}, InvalidInput, "guided by 'ms' or 'flops'"),
    ],
)
def test_what_cannot_be_met_is_refused_before_training(data, example, table, budget, kind, message):
    with pytest.raises(kind, match=message):
        prune(data, example, table, train_loader=Untouchable(), **budget)


class Overhead(nn.Module):
    """Two small layers behind forty operators that have no channels to prune."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        for _ in range(40):
            x = x.softmax(-1)
        return self.layers(x)


def test_a_launch_bound_model_is_refused_with_numbers():
    with pytest.raises(InfeasibleBudget, match=r"bound by launches, .* [\d.]+ of its [\d.]+ ms"):
        hwprune.prune(
            Overhead(),
            torch.randn(1, 1, 8, 8),
            budget="95%",
            train_loader=Untouchable(),
            profile_seconds=0.5,
            progress=False,
        )


@pytest.mark.parametrize(("loader", "message"), [([], "the training loader is empty"), (iter([]), "no length")])
def test_a_loader_that_cannot_be_trained_on_is_refused_before_the_profile(data, example, tmp_path, loader, message):
    with pytest.raises(InvalidInput, match=message):
        prune(data, example, tmp_path / "none.jsonl", train_loader=loader)
    assert not list(tmp_path.iterdir())


def test_the_numbers_are_said_before_training(data, example, table):
    said = []
    with pytest.raises(AssertionError, match="must not train"):
        prune(data, example, table, train_loader=Untouchable(), budget="70%", say=said.append)
    assert re.search(r"dense [\d.]+ ms, floor [\d.]+ ms", said[0])
    assert any(re.search(r"within\s+90% \([\d.]+ ms\): at most \d+% of the channels", line) for line in said)


def test_a_loss_that_becomes_nan_stops_the_run(data, example, table, tmp_path):
    with pytest.raises(TrainingDiverged, match="NaN"):
        prune(data, example, table, out=tmp_path, loss_fn=lambda y, t: y.sum() * math.nan)
    good = torch.load(tmp_path / "state" / "dense.checkpoint", weights_only=True)
    assert good is not None


class Branching(nn.Module):
    """A forward that torch.export cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_exported_is_named(data, example, table):
    with pytest.raises(UnsupportedModel) as error:
        prune(data, example, table, model=Branching())
    assert "test_pipeline.py" in str(error.value)


def test_check_holds_and_notices(example):
    found = pipeline.check(dense(), example)
    assert found.holds
    assert found.kind == "module"
    assert len(found.program.groups) == 6
    assert found.masked_error < 1e-5
    strict = pipeline.check(dense(), example, tolerance=-1.0)
    assert not strict.holds


class Returns(nn.Module):
    """Two convolutions, and whatever `shape_output` makes of what they return."""

    def __init__(self, shape_output):
        super().__init__()
        self.shape_output = shape_output
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def forward(self, x):
        return self.shape_output(self.layers(x))


@pytest.mark.parametrize(
    "shape_output", [lambda y: (y, None), lambda y: {"y": y, "n": 3}, lambda y: [y, [y.sum(), y > 0]]]
)
def test_check_takes_outputs_that_are_not_all_tensors(shape_output, example):
    assert pipeline.check(Returns(shape_output), example).holds


def test_check_does_not_hold_where_the_output_is_not_a_number(example):
    found = pipeline.check(Returns(lambda y: y / (y - y)), example)
    assert len(found.program.groups) == 1
    assert not found.holds


def test_check_jitters_what_would_hide_a_wrong_channel():
    model = pipeline._jittered(dense(), seed=0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((norm.running_var >= 1).all() and norm.bias.abs().min() > 0 for norm in norms)
    assert len({norm.bias[0].item() for norm in norms}) == len(norms)


def test_before_a_search_there_is_nothing_to_cut(example, table):
    work = Pruning(dense(), example, budget="50%flops", table=table, profile_seconds=1, progress=False)
    with pytest.raises(InvalidInput, match="run `search` first"):
        work.cut()


@pytest.mark.parametrize("response", [0.6, 0.8, 1.0, 1.25, 1.7], ids=lambda r: f"measures x{r}")
@pytest.mark.parametrize("power", [0.7, 1.0, 1.4])
def test_allowance_finds_the_budget(response, power):
    """Whatever smooth bias the prediction has, a handful of corrections end within the budget's upper part."""
    dense_ms, floor_ms, limit = 10.0, 1.0, 5.0

    def measured(allowance):
        return response * limit * (allowance / limit) ** power

    allowance = _Allowance(limit, floor_ms, dense_ms)
    used = [measured(allowance.now) / limit]
    while allowance.correct(used[-1]) and len(used) < 7:
        used.append(measured(allowance.now) / limit)
    assert len(used) <= 5
    assert LEAST_USE < used[-1] <= MOST_USE


def test_allowance_stops_at_the_ends():
    allowance = _Allowance(5.0, 1.0, 10.0)
    while allowance.correct(0.1):
        pass
    assert allowance.now == 10.0
    allowance = _Allowance(5.0, 1.0, 10.0)
    while allowance.correct(9.0):
        pass
    assert allowance.now == 1.0


def test_allowance_bisects_a_step():
    """Where latency jumps, proportional steps would leap to and fro."""
    allowance = _Allowance(5.0, 1.0, 10.0)
    visited = []
    for _ in range(8):
        visited.append(allowance.now)
        if not allowance.correct(0.5 if allowance.now < 6.5 else 1.5):
            break
    assert abs(visited[-1] - 6.5) < 0.5
    assert all(1.0 <= now <= 10.0 for now in visited)
    assert AIM < MOST_USE


def test_measure_gives_quantiles(example):
    sample = hwprune.measure(dense(), example, rounds=2)
    assert 0 < sample.p20_ms <= sample.median_ms <= sample.p80_ms
    assert sample.count >= 2


@pytest.mark.source_tree
def test_own_loop_example(tmp_path, monkeypatch):
    source = importlib.util.spec_from_file_location("own_loop", ROOT / "examples" / "own_loop.py")
    own_loop = importlib.util.module_from_spec(source)
    source.loader.exec_module(own_loop)
    result = own_loop.main(budget="60%flops", epochs=1, out=str(tmp_path), profile_seconds=1.0)
    assert result["flops"] <= 0.6 * result["dense_flops"]
    assert 0 <= result["accuracy"] <= 1
    assert np.isfinite(result["measured_ms"])
    assert (tmp_path / "spec.json").is_file()


@pytest.mark.source_tree
def test_readme_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    try:
        exec(compile(code, "README.md", "exec"), names)
    except BudgetMissed:  # a busy machine
        assert (tmp_path / "runs" / "readme" / "report.html").is_file()
    else:
        assert names["pruned"].result["met"]
        assert isinstance(names["module"], nn.Module)


@pytest.mark.parametrize("refit", [False, True])
def test_a_network_that_lost_blocks_is_trained_measured_saved_and_loaded(data, example, table, tmp_path, refit):
    folder = tmp_path / "run"
    work = Pruning(
        dense(), example, budget="50%flops", table=table, profile_seconds=1, out=folder, progress=False, name="resnet8"
    )
    removed = [name for name in work.program.groups.names if name in ("layer1.0.conv1", "layer3.0.conv1")]
    with work.search("gdp", steps=2) as search:
        for name in removed:
            search.method.x[search.method._owner == work.program.groups.names.index(name)] = 0
    assert work.found.removes_blocks
    module = work.cut(calibration=data.calibration, refit=refit)
    assert work.pruned.kind == "program" and all(name in work.pruned.reason for name in removed)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    constant = module.get_parameter("batch_norm_2_constant")
    before = constant.detach().clone()
    for (x, y), _ in zip(data.train, range(3), strict=False):
        optimiser.zero_grad()
        nn.functional.cross_entropy(module.train()(x), y).backward()
        optimiser.step()
    assert not torch.equal(constant, before)
    result = work.finish(module.eval(), accuracy=0.5)
    assert [result["widths"][name] for name in removed] == [0, 0]
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["flops"] <= 0.5 * result["dense_flops"] and result["parameters"] < result["dense_parameters"]
    assert 0 < result["predicted_ms"] < result["predicted_dense_ms"]
    assert "layer1.0.conv1: 0 of 16 channels" in (folder / "report.html").read_text()
    with torch.no_grad():
        expected = module(example)
        torch.testing.assert_close(hwprune.load(folder)(example), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hwprune.load(folder, dense)(example), expected, rtol=1e-4, atol=1e-5)
    resumed = Pruning(
        dense(), example, budget="50%flops", table=table, profile_seconds=1, out=folder, resume=True, progress=False,
        name="resnet8",
    )  # fmt: skip
    assert resumed.restore_search("gdp") and resumed.found.removes_blocks
    assert (resumed._allocate(float(resumed.flops.dense)).widths == 0).sum() == 2

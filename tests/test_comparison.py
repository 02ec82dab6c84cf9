"""Comparisons: equal epochs, rows that survive a kill, several processes at one comparison, honest summaries."""

import json
import multiprocessing
import shutil
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from hwprune import artifact, comparison
from hwprune.cli import main
from hwprune.data import load_data
from hwprune.errors import CorruptArtifact, InvalidInput
from hwprune.latency import Target
from hwprune.models import load_model
from hwprune.train import Recipe

pytestmark = pytest.mark.usefixtures("short_turns")

ROOT = Path(__file__).resolve().parent.parent
BUDGET = "50%flops"  # what no clock decides


def run(out, methods="uniform,dsa", budget=BUDGET, seeds=(0,), **changes):
    torch.manual_seed(0)
    settings = {
        "search_epochs": 1, "epochs": 1, "dense_epochs": 2, "recipe": Recipe(batch_size=64, lr=0.05),
        "name": "resnet8", "profile_seconds": 1, "provenance": {"subset": 320}, **changes,
    }  # fmt: skip
    return comparison.compare(
        load_model("resnet8", classes=10, in_channels=1),
        torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        [comparison.Entry.parse(text) for text in methods.split(",") if text],
        [budget],
        seeds,
        lambda seed: load_data("digits", batch_size=64, subset=320, validation=0.2, seed=seed),
        out=out,
        progress=False,
        say=lambda line: None,
        **settings,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return out, run(out)


def test_entries_name_method_guide_and_options():
    entry = comparison.Entry.parse("dsa@flops:theta=2.5:scores=gamma")
    assert (entry.name, entry.guide, entry.options) == ("dsa", "flops", {"theta": 2.5, "scores": "gamma"})
    for text, cause in (("nosuch", "unknown"), ("dsa@joule", "guide"), ("dsa:theta", "no option"), ("dsa:x=1", "take")):
        with pytest.raises(InvalidInput, match=cause):
            comparison.Entry.parse(text)


def test_values_of_options_may_hold_commas_and_colons():
    text = 'dais:temperature=[1.0,0.01]:anneal=false, ddpnas:around=dsa:around_options={"theta":2.5,"lr":0.1},uniform'
    first, second, third = comparison.Entry.parse_all(text)
    assert (first.name, first.options) == ("dais", {"temperature": [1.0, 0.01], "anneal": False})
    assert second.options == {"around": "dsa", "around_options": {"theta": 2.5, "lr": 0.1}}
    assert third.text == "uniform"
    assert comparison._parts(r'a:b="x:\":y":c=[{"k":1},2]', ":") == ["a", r'b="x:\":y"', 'c=[{"k":1},2]']
    for broken in ("dais:temperature=[1.0,0.01", 'dsa:scores="gamma', "dais:temperature=1.0],uniform"):
        with pytest.raises(InvalidInput, match="without its other half"):
            comparison.Entry.parse_all(broken)


def test_every_method_trains_for_the_same_epochs(finished):
    _, rows = finished
    epochs = {row["method"]: (row["search"], row["fine_tune"]) for row in rows}
    assert epochs == {"dsa": (1, 1), "uniform": (0, 2)}
    assert len({row["dense_accuracy"] for row in rows}) == 1  # trained once, for all
    assert all(row["lr"] == 0.05 and row["epochs"] == row["fine_tune"] for row in rows)


def test_rows_and_figure_are_written(finished):
    out, rows = finished
    stored = json.loads((out / "compare.json").read_text())
    assert stored["rows"] == rows and {"torch", "hwprune"} <= set(stored["context"])
    assert all(row["met"] and row["budget"] == BUDGET and row["cut_accuracy"] is not None for row in rows)
    assert all(row["versions"] == artifact.versions() for row in rows)
    assert len(lines_drawn((out / "compare.svg").read_text())) == 2


def lines_drawn(svg):
    """Method -> (points, points with an error bar in both directions) of a figure."""
    points, bars = {}, defaultdict(list)
    for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        kind, _, name = group.get("id", "").partition(" ")
        if kind == "line":
            points[name] = sum(1 for _ in group.iter("{http://www.w3.org/2000/svg}use"))
        elif kind == "spread":
            _, name = name.split(" ", 1)
            drawn = (path.get("d", "").strip() for path in group.iter("{http://www.w3.org/2000/svg}path"))
            bars[name].append(sum(map(bool, drawn)))
    return {name: (count, min(bars[name])) for name, count in points.items()}


def made_rows(
    seeds, methods=("dsa", 'dsa:temperature=[1.0,0.01],"x"', "uniform"), budgets=("70%", "50%"), dense_ms=2.0
):
    """Rows of made figures: every network takes nine tenths of its budget, on a machine that drifts by a tenth."""
    rows = []
    for place, method in enumerate(methods):
        for budget in budgets:
            for seed in range(seeds):
                dense = dense_ms * (1 + 0.1 * seed)
                limit = float(budget.rstrip("%")) / 100 * dense
                rows.append(
                    {
                        "method": method, "budget": budget, "seed": seed, "accuracy": 0.8 - 0.01 * (place + seed),
                        "dense_accuracy": 0.9, "dense_ms": dense, "budget_ms": limit, "met": True,
                        "measured_ms": (0.9 + 0.01 * seed) * limit, "wall_s": {"total": 10.0},
                    }
                )  # fmt: skip
    return rows


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_figure_has_a_line_per_method_and_spreads_over_seeds(tmp_path, seeds):
    rows = made_rows(seeds)
    comparison.draw(rows, tmp_path / "figure.svg")
    bars = 2 if seeds > 1 else 0
    assert lines_drawn((tmp_path / "figure.svg").read_text()) == {row["method"]: (2, bars) for row in rows}


def test_a_figure_is_in_ms_where_all_rows_have_one_dense_latency(tmp_path):
    comparison.draw(made_rows(2), tmp_path / "one.svg")
    comparison.draw([*made_rows(1), *made_rows(1, methods=("psap",), dense_ms=4.0)], tmp_path / "two.svg")
    one, two = ((tmp_path / name).read_text() for name in ("one.svg", "two.svg"))
    assert "measured latency, ms" in one and "% of dense, 2.1 ms" in one
    assert "measured latency, % of dense" in two and "latency, ms" not in two


def test_what_is_used_of_a_budget_is_of_its_own_unit(finished):
    (line,) = comparison.summary(made_rows(2, methods=("dsa",), budgets=("50%",)))
    assert line["share_of_budget"] == pytest.approx(0.905) and line["share_of_dense"] == pytest.approx(0.4525)
    assert comparison.cells(line)[comparison.COLUMNS.index("of budget")] == "90.5%"
    for line in comparison.summary(finished[1]):  # held to half of the FLOPs
        (row,) = (row for row in finished[1] if row["method"] == line["method"])
        assert line["share_of_budget"] == pytest.approx(2 * row["flops"] / row["dense_flops"]) and line["met"] == 1


@pytest.mark.source_tree
def test_the_readme_shows_the_stored_comparison():
    rows = json.loads((ROOT / "benchmarks" / "results" / "leaderboard_cpu.json").read_text())["rows"]
    table = comparison.table(comparison.summary(rows))
    assert table in (ROOT / "README.md").read_text(), f"README.md should show this table:\n{table}"
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    for row in rows:
        used = f"{row['method']} with seed {row['seed']}, at {row['measured_ms'] / row['budget_ms']:.1%}"
        assert row["met"] or used.replace("%", " %") in page, f"benchmarks/README.md does not say that {used} was kept"
    drawn = lines_drawn((ROOT / "benchmarks" / "results" / "leaderboard_cpu.svg").read_text())
    counts = Counter(line["method"] for line in comparison.summary(rows))
    assert drawn == {method: (count, count) for method, count in counts.items()}, "run benchmarks/plot.py"


def test_what_is_finished_is_not_run_again(finished):
    out, rows = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/row.json")}
    assert run(out) == rows
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/row.json")} == before


OTHERS = {
    "lr": ({"recipe": Recipe(batch_size=64, lr=0.02)}, r"lr 0\.05, not lr 0\.02"),
    "train batch": ({"recipe": Recipe(batch_size=32, lr=0.05)}, "batch_size 64, not batch_size 32"),
    "epochs": ({"epochs": 3}, "epochs 1, not epochs 3"),
    "search epochs": ({"search_epochs": 3}, "search_epochs 1, not search_epochs 3"),
    "dense epochs": ({"dense_epochs": 0}, "dense_epochs 2, not dense_epochs 0"),
    "model": ({"name": "resnet20"}, "model 'resnet8', not model 'resnet20'"),
    "target": ({"target": Target(threads=2)}, "target .*1 thread.*, not target .*2 threads.*"),
    "data": ({"provenance": {"subset": 640, "weights": "w"}}, "subset 320, weights None, not subset 640, weights 'w'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_settings_are_refused_by_name(finished, case):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"}
    changes, difference = OTHERS[case]
    with pytest.raises(InvalidInput, match=f"holds a comparison with {difference}, and .* choose another folder"):
        run(out, methods="magnitude", **changes)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"} == before


def test_a_method_a_budget_and_a_seed_are_added(finished, tmp_path):
    out, rows = finished
    shutil.copytree(out, tmp_path / "more")
    more = run(tmp_path / "more", methods="magnitude", budget="60%flops", seeds=(1,))
    (added,) = (row for row in more if row not in rows)
    assert len(more) == len(rows) + 1
    assert (added["method"], added["budget"], added["seed"]) == ("magnitude", "60%flops", 1)


def test_a_folder_without_settings_is_taken_as_it_is(finished, tmp_path):
    out, rows = finished
    shutil.copytree(out, tmp_path / "old")
    settings = tmp_path / "old" / "settings.json"
    settings.unlink()
    assert run(tmp_path / "old", recipe=Recipe(batch_size=64, lr=0.02)) == rows
    assert json.loads(settings.read_text())["lr"] == 0.02
    with pytest.raises(InvalidInput, match="lr"):
        run(tmp_path / "old")
    settings.write_text("{")
    with pytest.raises(CorruptArtifact, match=r"settings\.json cannot be read"):
        run(tmp_path / "old")


def test_of_several_calls_at_once_one_decides(tmp_path):
    def call(place):
        try:
            run(tmp_path, methods="", dense_epochs=0, recipe=Recipe(lr=(place + 1) / 100))
        except InvalidInput:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        went_on = list(pool.map(call, range(8)))
    assert sum(went_on) == 1
    assert json.loads((tmp_path / "settings.json").read_text())["lr"] == (went_on.index(True) + 1) / 100


def test_a_run_that_another_process_holds_is_passed_over(finished, tmp_path):
    held = comparison._stem(comparison.Entry.parse("dsa"), BUDGET, 0)
    with comparison._claimed(tmp_path / held) as ours:
        assert ours
        process = multiprocessing.get_context("spawn").Process(target=run, args=(tmp_path,))
        process.start()
        process.join()
    assert process.exitcode == 0
    assert [path.parent.name for path in tmp_path.glob("*/row.json")] == [held.replace("dsa", "uniform")]


def test_a_summary_has_means_and_deviations(finished):
    _, rows = finished
    second = [{**row, "seed": 1, "accuracy": row["accuracy"] + 0.1} for row in rows]
    lines = comparison.summary([*rows, *second])
    assert [line["seeds"] for line in lines] == [2, 2]
    for line in lines:
        (own,) = (row["accuracy"] for row in rows if row["method"] == line["method"])
        assert line["accuracy"] == pytest.approx(own + 0.05) and line["accuracy_std"] == pytest.approx(0.1 / 2**0.5)
    assert lines[0]["accuracy"] >= lines[1]["accuracy"]


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    common = ["compare", "resnet8", "--data", "digits", "--out", str(tmp_path), "--profile-seconds", "1"]
    for arguments, cause in (
        (["--methods", "nosuch"], "unknown"),
        (["--budgets", "fast"], "not understood"),
        (["--methods", "uniform", "--budgets", "0.01%flops"], "below the floor"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*common, *arguments])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and cause in error and "Traceback" not in error

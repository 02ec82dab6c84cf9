"""The command line: one sentence for whatever is wrong, one JSON document where asked for, and honest exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hwprune
from hwprune import pipeline
from hwprune.cli import main
from hwprune.models import load_model

pytestmark = pytest.mark.usefixtures("short_turns")

SMALL = {"subset": 320, "train-batch": 64, "batch": 64, "lr": 0.05, "profile-seconds": 1}
SHORT = {"dense-epochs": 1, "search-epochs": 1, "epochs": 1}
OPTIONS = {"model": "resnet8", "data": "digits", **SMALL, **SHORT}
PRUNE = ["prune", *(text for name, value in OPTIONS.items() for text in (f"--{name}", str(value)))]


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of the command in this process."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return exit_.value.code, out.out, out.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in FLOPs, whose outcome no clock decides, with its latency table beside it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(SystemExit) as exit_:
        main(
            [*PRUNE, "--budget", "50%flops", "--out", str(folder / "run"), "--table", str(folder / "t.jsonl"), "--json"]
        )
    assert exit_.value.code == 0
    return folder


@pytest.fixture
def table(finished, tmp_path):
    return shutil.copy(finished / "t.jsonl", tmp_path / "table.jsonl")


def changed_table(table, **fingerprint):
    lines = Path(table).read_text().splitlines()
    header = json.loads(lines[0])
    header["fingerprint"].update(fingerprint)
    Path(table).write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    return table


def broken_table(table):
    lines = Path(table).read_text().splitlines()
    lines[4] = lines[4][:20]
    Path(table).write_text("\n".join(lines) + "\n")
    return table


def other_weights(folder):
    save_file(load_model("resnet20", classes=10).state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def damaged_artifact(folder, finished):
    copy = Path(shutil.copytree(finished / "run", folder / "copy"))
    data = bytearray((copy / "program.pt2").read_bytes())
    data[100] ^= 255
    (copy / "program.pt2").write_bytes(data)
    return copy


def taken(folder):
    (folder / "taken").write_text("")
    return folder / "taken" / "out"


def nan_weights(folder):
    state = load_model("resnet8", classes=10, in_channels=1).state_dict()
    state["linear.weight"].fill_(float("nan"))
    save_file(state, folder / "nan.safetensors")
    return folder / "nan.safetensors"


WRONG = {
    "unknown model": (lambda f: ["check", "resnet9"], "no model is called 'resnet9'"),
    "unknown torchvision model": (lambda f: ["check", "torchvision:resnet1"], "resnet1"),
    "unknown function": (lambda f: ["check", "json:absent"], "absent"),
    "unknown data": (lambda f: ["prune", "--model", "resnet8", "--data", "cats"], "no data set is called 'cats'"),
    "absent data": (lambda f: ["prune", "--model", "resnet8", "--data", f"cifar10:{f.tmp / 'none'}"], "none"),
    "empty data": (lambda f: ["prune", "--model", "resnet8", "--data", f"cifar10:{f.tmp}"], "cifar"),
    "empty image folder": (
        lambda f: ["prune", "--model", "resnet8", "--data", f"folder:{f.tmp}"],
        "gives no training images",
    ),
    "unknown method": (lambda f: [*PRUNE, "--method", "magic", "--table", f.table], "'magic' is unknown; possible: "),
    "unknown option": (lambda f: [*PRUNE, "--option", "x=1", "--table", f.table], "does not take"),
    "option without value": (lambda f: [*PRUNE, "--option", "x"], "write NAME=VALUE"),
    "budget in words": (lambda f: [*PRUNE, "--budget", "fast"], "budget 'fast' is not understood"),
    "budget of nothing": (lambda f: [*PRUNE, "--budget", "0ms"], "out of range"),
    "budget below the floor": (lambda f: [*PRUNE, "--budget", "1%", "--table", f.table], "below the floor"),
    "budget above dense": (lambda f: [*PRUNE, "--budget", "9999ms", "--table", f.table], "nothing to prune"),
    "guide": (lambda f: [*PRUNE, "--guide", "joules"], "guided by 'ms' or 'flops'"),
    "weights of another model": (lambda f: [*PRUNE, "--weights", other_weights(f.tmp)], "weights"),
    "absent weights": (lambda f: [*PRUNE, "--weights", f.tmp / "none.safetensors"], "none.safetensors"),
    "weights that are NaN": (lambda f: [*PRUNE, "--weights", nan_weights(f.tmp), "--table", f.table], "NaN"),
    "table of another machine": (
        lambda f: [*PRUNE, "--table", changed_table(f.table, cpu="abacus")],
        "was measured elsewhere (stored | present): cpu: abacus",
    ),
    "corrupt table": (lambda f: [*PRUNE, "--table", broken_table(f.table)], "line 5"),
    "table that is none": (lambda f: ["tables", f.tmp / "none.jsonl"], "is no file"),
    "output under a file": (lambda f: [*PRUNE, "--out", taken(f.tmp)], "cannot write to"),
    "corrupt artifact": (lambda f: ["measure", damaged_artifact(f.tmp, f.finished)], "SHA-256"),
    "folder that is no artifact": (lambda f: ["measure", f.tmp], "has no spec.json"),
    "export of nothing": (lambda f: ["export", f.tmp / "none", f.tmp / "x.onnx"], "is not a folder"),
    "input in words": (lambda f: ["check", "resnet8", "--input", "big"], "write the sizes with commas"),
    "model that cannot be exported": (lambda f: ["check", "test_cli:Branching", "--input", "1,3,8,8"], "test_cli.py"),
    "input that does not fit": (lambda f: ["check", "resnet8", "--input", "1,3"], "does not take 1 input of 1x3"),
    "pin without width": (lambda f: [*PRUNE, "--pin", "conv1"], "write GROUP=WIDTH"),
    "pin of no group": (
        lambda f: [*PRUNE, "--pin", "conv9=4", "--table", f.table],
        "no group 'conv9'; there are conv1, ",
    ),
    "pin above the width": (lambda f: [*PRUNE, "--pin", "conv1=99", "--table", f.table], "conv1 can have 1 to 16"),
    "merge into a table that is there": (lambda f: ["tables", f.table, "--merge", f.table], "exists; name a file"),
    "merge of nothing": (lambda f: ["tables", "--merge", f.tmp / "m.jsonl"], "no latency tables to merge"),
    "recipe of nothing": (lambda f: [*PRUNE, "--recipe", "speed=1"], "there are optimizer, momentum"),
    "recipe out of range": (lambda f: [*PRUNE, "--recipe", "label_smoothing=2"], "0 or more and below 1"),
    "recipe of the wrong kind": (lambda f: [*PRUNE, "--recipe", "momentum=much"], "of the wrong kind"),
    "json of timings": (lambda f: ["bench", "--json"], "--json goes with --static"),
    "runtime": (lambda f: ["measure", "resnet8", "--runtime", "steam"], "runtime='steam'"),
    "device": (lambda f: ["measure", "resnet8", "--device", "tpu"], "device='tpu'"),
    "threads": (lambda f: ["measure", "resnet8", "--threads", "0"], "--threads"),
    "lr": (lambda f: [*PRUNE, "--lr", "-1"], "lr is -1.0; it must be positive"),
    "batch that is no number": (lambda f: ["prune", "--batch", "many"], "--batch"),
    "missing option": (lambda f: ["prune", "--model", "resnet8"], "--data"),
    "unknown command": (lambda f: ["prun"], "prun"),
}


class Branching(torch.nn.Module):
    """A forward that torch.export cannot follow."""

    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(capsys, monkeypatch, finished, tmp_path, table, case):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.chdir(tmp_path)
    given = type("Given", (), {"tmp": tmp_path, "table": table, "finished": finished})
    arguments, message = WRONG[case]
    code, out, err = run(capsys, *arguments(given))
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert out == ""
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in err


def test_a_finished_run_is_one_document(finished):
    result = json.loads((finished / "run" / "result.json").read_text())
    assert result["budget"] == "50%flops"
    assert result["settings"]["data"] == "digits"


def test_images_are_held_out_for_methods_that_judge_on_them(capsys, finished, table, tmp_path):
    short = [*PRUNE, "--dense-epochs", 0, "--epochs", 0, "--budget", "50%flops", "--table", table, "--out", tmp_path]
    for arguments, share, line in (
        ([], 0.1, "iterative judges on images held out of training: 10% of the training images, or those"),
        (
            ["--validation", 0],
            0.0,
            "no images are held out: iterative judges on images that the weights are trained on",
        ),
    ):
        code, _, err = run(capsys, *short, "--method", "iterative", *arguments)
        assert code == 0 and line in err
        assert json.loads((tmp_path / "result.json").read_text())["settings"]["validation"] == share
    assert json.loads((finished / "run" / "result.json").read_text())["settings"]["validation"] == 0.0


def test_the_fewest_milliseconds_at_an_accuracy(capsys, table, tmp_path):
    """A budget of 100 % leaves the time to the floor, which a stage of the search is judged by and so is the end."""
    common = [*PRUNE, "--table", table, "--out", tmp_path, "--budget", "100%", "--method", "increg"]
    lengths = {"subset": 1280, "dense-epochs": 4, "search-epochs": 4, "epochs": 1, "lr": 0.1}
    changed = [text for name, value in lengths.items() for text in (f"--{name}", value)]
    code, out, _ = run(capsys, *common, *changed, "--option", "floor=0.7", "--option", "stages=4")
    result = json.loads((tmp_path / "result.json").read_text())
    assert code == 0 and result["measured_ms"] < 0.9 * result["dense_ms"]
    assert (result["accuracy_floor"], result["floor_met"]) == (0.7, True) and result["accuracy"] >= 0.7
    assert any("accuracy floor (70.00%)" in line and "kept" in line for line in out.splitlines())
    log = json.loads((tmp_path / "state" / "run.json").read_text())["done"]["search"]["log"]
    assert all(row["held_out_accuracy"] >= 0.6995 and row["held_out"] == 1 for row in log)


@pytest.mark.parametrize(
    "arguments, keys",
    [
        (["doctor"], {"hwprune", "torch", "runtimes", "backends", "repeatability"}),
        (["check", "resnet8", "--input", "2,3,16,16"], {"holds", "groups", "frozen", "masked_error"}),
        (["measure", "resnet8", "--input", "4,3,16,16", "--rounds", "1"], {"median_ms", "p20_ms", "p80_ms", "target"}),
        (["measure", "FINISHED/run", "--rounds", "1"], {"median_ms", "recorded_ms"}),
        (["tables", "FINISHED/t.jsonl"], {"path", "target", "measurements", "this_machine"}),
        (["methods"], {"name", "summary", "source"}),
    ],
    ids=lambda value: value[0] + " " + value[-1].split("/")[0] if isinstance(value, list) else "",
)
def test_json_for_machines_and_a_table_for_people(capsys, finished, arguments, keys):
    arguments = [argument.replace("FINISHED", str(finished)) for argument in arguments]
    code, out, err = run(capsys, *arguments, "--json")
    document = json.loads(out)
    assert code == 0
    assert err == ""
    assert keys <= set(document[0] if isinstance(document, list) else document)
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert len(out.splitlines()) > 3


def test_profile_writes_a_table_that_tables_reads(capsys, tmp_path):
    path = tmp_path / "t.jsonl"
    arguments = ["profile", "resnet8", "--input", "4,1,8,8", "--profile-seconds", "1", "--table", path, "--json"]
    code, out, _ = run(capsys, *arguments)
    facts = json.loads(out)
    assert code == 0
    assert 0 < facts["floor_ms"] < facts["dense_ms"]
    _, out, _ = run(capsys, "tables", path, "--json")
    assert json.loads(out)[0]["this_machine"] is True
    assert json.loads(out)[0]["measurements"] > 0


def test_tables_are_merged(capsys, finished, tmp_path):
    other = tmp_path / "other.jsonl"
    header, *records = (finished / "t.jsonl").read_text().splitlines()
    other.write_text("\n".join([header, *records[: len(records) // 2]]) + "\n")
    code, out, _ = run(capsys, "tables", other, finished / "t.jsonl", "--merge", tmp_path / "all.jsonl", "--json")
    assert code == 0
    assert json.loads(out)[0]["measurements"] == len(records)


def test_a_network_is_measured_as_it_was_pruned_for(capsys, finished):
    code, out, _ = run(capsys, "measure", finished / "run", "--rounds", "1", "--json")
    assert code == 0
    assert (
        json.loads(out)["target"] == json.loads((finished / "run" / "result.json").read_text())["target"]["description"]
    )
    _, out, _ = run(capsys, "measure", finished / "run", "--rounds", "1", "--threads", "2", "--json")
    assert "2 threads" in json.loads(out)["target"]


def test_shipped_tables_are_listed(capsys):
    code, out, _ = run(capsys, "tables", "--json")
    assert code == 0
    assert isinstance(json.loads(out), list)


def test_export_writes_onnx(capsys, finished, tmp_path):
    pytest.importorskip("onnxscript")
    code, out, _ = run(capsys, "export", finished / "run", tmp_path / "model.onnx", "--json")
    assert code == 0
    assert Path(json.loads(out)["onnx"]).stat().st_size > 0


def test_check_fails_where_nothing_can_be_pruned(capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    code, _, err = run(capsys, "check", "test_cli:nothing_to_prune", "--input", "1,3,8,8")
    assert code == 1
    assert "no channels that can be pruned" in err


def nothing_to_prune():
    return torch.nn.Conv2d(3, 4, 1)


def test_a_missed_budget_exits_with_3_and_keeps_the_artifact(capsys, tmp_path, table, monkeypatch):
    """A budget that no allocation aims at: the rounds are told to use twice of what there is."""
    for name in ("AIM", "LEAST_USE", "MOST_USE"):
        monkeypatch.setattr(pipeline, name, {"AIM": 1.7, "LEAST_USE": 1.5, "MOST_USE": 2.0}[name])
    code, out, err = run(capsys, *PRUNE, "--budget", "50%", "--out", tmp_path / "run", "--table", table, "--json")
    result = json.loads(out)
    assert code == 3
    assert result["met"] is False
    assert result["measured_ms"] > result["budget_ms"]
    assert err.startswith("error: the finished network runs in ")
    assert hwprune.load(tmp_path / "run")(torch.randn(64, 1, 8, 8)).shape == (64, 10)


@pytest.mark.parametrize("phase, sign", [("profile", "table.jsonl"), ("dense", "state/dense.checkpoint")])
def test_ctrl_c_says_how_to_continue(capsys, tmp_path, phase, sign):
    out = tmp_path / "run"
    command = [*PRUNE, "--budget", "50%flops", "--out", str(out)]
    command[command.index("--dense-epochs") + 1] = "500"  # still training when the signal comes
    program = "import sys; from hwprune.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wanted = out / sign
    while process.poll() is None and not (wanted.is_file() and wanted.stat().st_size > 500):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"interrupted during {phase}: what was measured and trained is kept; continue with: hwprune")
    assert last.endswith("--resume")
    assert "Traceback" not in err
    if phase == "profile":  # nothing is accepted yet, but the table is good: what comes next reads it
        assert not (out / "state").exists()
        code, listed, _ = run(capsys, "tables", out / "table.jsonl", "--json")
        assert code == 0
        assert json.loads(listed)[0]["measurements"] > 0
    else:
        assert phase not in json.loads((out / "state" / "run.json").read_text())["done"]
        assert torch.load(out / "state" / "dense.checkpoint", weights_only=True)


def test_the_package_is_the_command_line():
    command = [sys.executable, "-m", "hwprune", "methods", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {"dsa", "uniform"} <= {row["name"] for row in rows} and all(row["source"] for row in rows)

"""Saving and loading: both forms compute what was saved, and whatever is broken is named."""

import hashlib
import io
import json
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hwprune
from hwprune import artifact
from hwprune.errors import CorruptArtifact, InvalidInput
from hwprune.graph import cut, keep_top, trace
from hwprune.models import load_model
from hwprune.nn import ColumnPrunedConv2d, prune_columns_


def dense(seed=0):
    torch.manual_seed(seed)
    return load_model("resnet8", classes=10, in_channels=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A cut resnet8 with statistics of its own, and the folder that it was saved in."""
    model = dense().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    program = trace(model, (x,))
    groups = program.groups
    ranking = np.random.default_rng(0).permutation(groups.total)
    keep = keep_top(groups, np.maximum(1, groups.widths // 3), ranking)
    smaller = cut(model, program, keep)
    folder = artifact.save(
        tmp_path_factory.mktemp("artifact") / "saved",
        smaller.module,
        program=program,
        keep=keep,
        kind=smaller.kind,
        model="resnet8",
        target={"description": "cpu"},
        result={"measured_ms": 1.5},
    )
    return folder, smaller.module.eval(), x, keep


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the saved folder that a test may damage."""
    for path in saved[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_both_forms_compute_what_was_saved(saved):
    folder, module, x, _ = saved
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(hwprune.load(folder)(x), expected)
        rebuilt = hwprune.load(folder, lambda: dense(seed=5))
        torch.testing.assert_close(rebuilt(x), expected)
    assert type(rebuilt) is type(dense())
    assert not rebuilt.training
    assert sum(p.numel() for p in rebuilt.parameters()) < sum(p.numel() for p in dense().parameters())


def test_pruned_columns_survive_in_both_forms(tmp_path):
    """Convolutions that compute only some columns are built again, and run in a process that knows no model."""
    model = dense().eval()
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    program = trace(model, (x,))
    groups = program.groups
    keep = keep_top(groups, np.maximum(1, groups.widths // 2), np.arange(groups.total))
    smaller = cut(model, program, keep)
    name = "layer2.0.conv1.weight"
    columns = torch.rand(model.get_parameter(name)[0].numel(), generator=torch.Generator().manual_seed(2)) < 0.5
    assert prune_columns_(smaller.module, {name: columns}, groups, keep) == 1
    module = smaller.module.eval()
    artifact.save(tmp_path, module, program=program, keep=keep, kind=smaller.kind, model="resnet8")
    with torch.no_grad():
        expected = module(x)
        rebuilt = hwprune.load(tmp_path, lambda: dense(seed=5))
        assert isinstance(rebuilt.layer2[0].conv1, ColumnPrunedConv2d)
        torch.testing.assert_close(rebuilt(x), expected)
    torch.save(x, tmp_path / "x.pt")
    code = """if True:
        import sys, torch, hwprune
        y = hwprune.load(sys.argv[1])(torch.load(sys.argv[1] + "/x.pt"))
        torch.save(y, sys.argv[1] + "/y.pt")
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt").detach(), expected)


def test_spec_tells_the_story(saved):
    folder, _, x, keep = saved
    spec = artifact.read_spec(folder)
    assert np.array_equal(spec.keep, keep)
    assert spec.model == "resnet8"
    assert spec.result["measured_ms"] == 1.5
    assert spec.provenance["torch"] == torch.__version__
    assert [tuple(t.shape) for t in spec.example_inputs()] == [tuple(x.shape)]
    assert set(load_file(folder / "weights.safetensors")) == set(dense().state_dict())


def test_no_file_is_a_pickle_of_weights(saved):
    folder = saved[0]
    for path in folder.iterdir():
        with pytest.raises(Exception, match=r"."):
            pickle.loads(path.read_bytes())
    names = zipfile.ZipFile(folder / "program.pt2").namelist()
    assert all("sample_inputs" in name for name in names if name.endswith(".pt"))


@pytest.mark.parametrize("name", ["weights.safetensors", "program.pt2"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named(copy, name, damage):
    path = copy / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-10])
    else:
        path.unlink()
    with pytest.raises(CorruptArtifact, match=name):
        hwprune.load(copy, dense if name.startswith("weights") else None)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update(schema=99), "schema 99; this hwprune reads schema 1"),
        (lambda s: s.pop("groups"), "KeyError: 'groups'"),
        (lambda s: s["groups"][0].update(keep=[0, 99]), "not among its 16"),
        (lambda s: s["groups"][0].update(keep=[]), "not among its 16"),
        (lambda s: s["inputs"][0].update(dtype="Tensor"), "'Tensor' is no dtype"),
        (lambda s: s.update(inputs=3), "TypeError"),
    ],
)
def test_a_wrong_spec_is_named(copy, change, message):
    spec = json.loads((copy / "spec.json").read_text())
    change(spec)
    (copy / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(CorruptArtifact, match=message):
        artifact.read_spec(copy)


def test_a_torn_spec_and_a_torn_save_do_not_load(copy):
    text = (copy / "spec.json").read_text()
    (copy / "spec.json").write_text(text[: len(text) // 2])
    with pytest.raises(CorruptArtifact, match=r"spec\.json cannot be read"):
        hwprune.load(copy)
    (copy / "spec.json").unlink()  # what an interrupted save leaves: spec.json is written last
    with pytest.raises(CorruptArtifact, match="its saving was interrupted"):
        hwprune.load(copy)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(InvalidInput, match="is not a folder"):
        hwprune.load(tmp_path / "absent")


def test_a_factory_of_another_network_is_refused(saved):
    folder = saved[0]
    with pytest.raises(InvalidInput, match="another network than the one"):
        hwprune.load(folder, lambda: load_model("resnet20", classes=10, in_channels=1))
    with pytest.raises(InvalidInput, match=r"returned Tensor; it must return the dense nn\.Module"):
        hwprune.load(folder, lambda: torch.zeros(1))
    with pytest.raises(InvalidInput, match="do not fit the model"):
        hwprune.load(folder, lambda: load_model("resnet8", classes=7, in_channels=1))


class Explosive:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was executed')",)


@pytest.mark.parametrize("where", ["weight", "sample", "object"])
def test_pickles_in_the_program_are_not_executed(copy, where):
    hostile = io.BytesIO()
    torch.save(Explosive(), hostile)
    source = zipfile.ZipFile(io.BytesIO((copy / "program.pt2").read_bytes()))
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as out:
        for name in source.namelist():
            data = source.read(name)
            root = name.split("/")[0]
            if where == "weight" and name.endswith("model_weights_config.json"):
                config = json.loads(data)
                next(iter(config["config"].values()))["use_pickle"] = True
                data = json.dumps(config).encode()
            if (where == "weight" and name.endswith("weights/weight_0")) or (
                where == "sample" and name.endswith(".pt")
            ):
                data = hostile.getvalue()
            out.writestr(name, data)
        if where == "object":
            out.writestr(f"{root}/data/constants/opaque_obj_0", hostile.getvalue())
    (copy / "program.pt2").write_bytes(changed.getvalue())
    spec = json.loads((copy / "spec.json").read_text())
    spec["files"]["program.pt2"]["sha256"] = hashlib.sha256(changed.getvalue()).hexdigest()
    (copy / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(CorruptArtifact, match=r"program\.pt2"):
        hwprune.load(copy)


def test_saving_over_a_file_is_refused(saved, tmp_path):
    _, module, x, keep = saved
    (tmp_path / "taken").write_text("")
    program = trace(dense(), (x,))
    with pytest.raises(InvalidInput, match="cannot write the artifact"):
        artifact.save(tmp_path / "taken", module, program=program, keep=keep, kind="module", model="resnet8")


def test_onnx_computes_the_same(saved, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, module, x, _ = saved
    path = artifact.export_onnx(folder, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(y, module(x).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match="cannot write"):
        artifact.export_onnx(folder, tmp_path / "absent" / "model.onnx")


def test_the_commit_is_that_of_the_checkout_and_of_no_repository_around_it(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert artifact.commit_of.__wrapped__(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "installed").mkdir()
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    assert artifact.commit_of.__wrapped__(tmp_path) == git("rev-parse", "--short", "HEAD")
    assert artifact.commit_of.__wrapped__(tmp_path / "installed") is None
    (tmp_path / "file").write_text("2")
    assert artifact.commit_of.__wrapped__(tmp_path) == git("rev-parse", "--short", "HEAD") + "-dirty"


def test_settings_that_differ_are_named():
    assert artifact.difference({"lr": 0.1, "seed": 0}, {"lr": 0.1, "seed": 0}) == ""
    assert artifact.difference({"lr": 0.1, "old": 1}, {"lr": 0.2, "new": "x"}) == (
        "lr 0.1, old 1, new None, not lr 0.2, old None, new 'x'"
    )

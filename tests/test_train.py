"""The training loop: what it learns, what it leaves behind when it is stopped, and what it refuses."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hwprune.data import load_data
from hwprune.errors import CorruptArtifact, InvalidInput, TrainingDiverged
from hwprune.models import load_model, load_weights
from hwprune.train import Recipe, distillation, evaluate, fit, recalibrate

RECIPE = Recipe(epochs=2, lr=0.05, batch_size=64, amp="off")


def digits(subset=None, batch_size=64):
    return load_data("digits", batch_size=batch_size, subset=subset)


def resnet8():
    torch.manual_seed(3)
    return load_model("resnet8", classes=10, in_channels=1)


def small_net():
    """Batch norm and dropout: statistics and random numbers that a checkpoint must not lose."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 10)
    )


def batches(count=4, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, size, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (count, size), generator=generator)
    return list(zip(images, labels, strict=True))


class Counter:
    """Hooks with a state of their own; ``act`` is called with the name of the point and the step."""

    def __init__(self, act=lambda point, step: None):
        self.seen = []
        self.total = torch.zeros(())
        self.act = act

    def before_step(self, step):
        self._note("before_step", step)

    def after_backward(self, step):
        self._note("after_backward", step)

    def after_step(self, step):
        self.total = self.total * 0.5 + step
        self._note("after_step", step)

    def _note(self, point, step):
        self.seen.append((point, step))
        self.act(point, step)

    def state_dict(self):
        self.act("state_dict", len(self.seen) // 3)
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]

    def log(self):
        return {"total": float(self.total)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_learning_rate_rises_and_falls_along_a_cosine():
    recipe = Recipe(epochs=10, lr=0.4, warmup_epochs=2)
    rates = [recipe.lr_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.4 / 20) and rates[19] == pytest.approx(0.4) and rates[20] == pytest.approx(0.4)
    assert rates[60] == pytest.approx(0.2) and 0 < rates[99] < 1e-3
    assert Recipe(epochs=1, lr=0.4).lr_at(0, 100) == 0.4


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "adamw", "lr": 0.01}, {"memory_format": "contiguous"}, {"amp": "bfloat16"}]
)
def test_learns_digits(changes):
    data = digits(subset=512)
    model = resnet8().eval()
    history = fit(model, data.train, replace(RECIPE, epochs=5, **changes), progress=False)
    assert evaluate(model, data.test).accuracy > 0.8
    assert [row["epoch"] for row in history.rows] == [1, 2, 3, 4, 5] and history.rows[-1]["step"] == 5 * len(data.train)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"] and history.rows[-1]["accuracy"] > 0.5
    assert not any(module.training for module in model.modules())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_same_seed_same_weights_and_another_seed_others():
    weights = []
    for seed in (0, 0, 1):
        model = small_net()
        fit(model, digits(subset=128).train, replace(RECIPE, seed=seed), progress=False)
        weights.append(model[1].weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


class Viewing(nn.Module):
    """A view across channels and pixels, which channels-last activations do not allow."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 64, 10)
        self.formats = set()

    def forward(self, x):
        x = self.conv(x)
        self.formats.add((self.training, x.is_contiguous()))
        return self.linear(x.view(len(x), -1))


def test_channels_last_is_taken_where_the_forward_pass_allows_it():
    model = Viewing()
    fit(model, batches(), RECIPE, progress=False)
    assert model.formats == {(False, False), (True, True)}  # tried, and left
    teacher = Viewing()
    fit(resnet8(), batches(), RECIPE, teacher=teacher, progress=False)
    assert (False, False) in teacher.formats and (False, True) in teacher.formats
    seen = []
    model = resnet8()
    model.layer1.register_forward_hook(
        lambda m, i, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    fit(model, batches(), replace(RECIPE, epochs=1), progress=False)
    assert seen == [True] * 5
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_hooks_are_called_in_order_and_see_unclipped_gradients():
    model, norms = small_net(), []

    def look(point, step):
        if point == "after_backward":
            norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))

    hooks = Counter(look)
    history = fit(model, batches(), replace(RECIPE, epochs=1, clip_norm=1e-3), hooks=hooks, progress=False, log_every=3)
    assert hooks.seen == [(p, s) for s in range(4) for p in ("before_step", "after_backward", "after_step")]
    assert min(norms) > 1e-2
    assert [(row["step"], row["total"]) for row in history.rows] == [(3, 2.5), (4, 4.25)]


def test_clip_norm_bounds_the_step():
    model = small_net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    recipe = Recipe(epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.01)
    fit(model, batches(count=1), recipe, progress=False)
    moved = sum(float((a.detach() - b).square().sum()) for a, b in zip(model.parameters(), before, strict=True)) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_label_smoothing_and_adamw_are_those_of_torch():
    recipe = Recipe(epochs=1, optimizer="adamw", lr=0.01, momentum=0.8, weight_decay=0.1, label_smoothing=0.3)
    model, expected = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    fit(model, batches(count=1), recipe, progress=False)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01, betas=(0.8, 0.999), weight_decay=0.1)
    for x, y in batches(count=1):
        torch.nn.functional.cross_entropy(expected(x), y, label_smoothing=0.3).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_distillation_is_the_softened_divergence():
    student, teacher, temperature = torch.randn(5, 7), torch.randn(5, 7), 3.0
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    expected = (p * (p / q).log()).sum(1).mean() * temperature**2
    assert torch.allclose(distillation(student, teacher, temperature), expected, atol=1e-6)
    assert float(distillation(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


def test_a_student_follows_its_teacher_not_the_targets():
    data = digits(subset=512)
    teacher = resnet8()
    fit(teacher, data.train, replace(RECIPE, epochs=8), progress=False)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    wrong = [(x, (y + 1) % 10) for x, y in data.train]  # a network that learned from these would be wrong everywhere
    student = resnet8()
    fit(student, wrong, replace(RECIPE, epochs=8, distill=1.0), teacher=teacher, progress=False)
    assert evaluate(student, data.test).accuracy > 0.6
    assert_same(before, teacher.state_dict())
    assert teacher.training


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_train import killed_run
killed_run({loader!r}, {point!r}, {step}, {path!r})
"""


def loader_named(name):
    data = digits(subset=200, batch_size=32)
    if name == "images":
        return data.train
    dataset = TensorDataset(data.train.images.float().flatten(1) / 255, data.train.labels)
    return DataLoader(dataset, 32, shuffle=True)  # draws its order from torch's global generator


def killed_run(loader, point, step, path, resume=False):
    """Train with a checkpoint after every step; ``point`` of ``step`` is where the process kills itself."""

    def act(here, at):
        if (here, at) == (point, step):
            os.kill(os.getpid(), signal.SIGKILL)

    model = small_net()
    history = fit(
        model,
        loader_named(loader),
        replace(RECIPE, epochs=3, batch_size=32),
        hooks=Counter(act),
        checkpoint=Path(path),
        resume=resume,
        checkpoint_seconds=0,
        log_every=4,
        progress=False,
    )
    return model, history


@pytest.mark.parametrize(
    "loader, point, step",
    [
        ("images", "after_step", 8),  # within the second epoch
        ("images", "state_dict", 6),  # while the checkpoint at the end of an epoch is made
        ("torch", "after_backward", 10),
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, loader, point, step):
    path = tmp_path / "checkpoint.pt"
    script = SCRIPT.format(tests=str(Path(__file__).parent), loader=loader, point=point, step=step, path=str(path))
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    stopped_at = torch.load(path, weights_only=True)["step"]
    assert stopped_at == step - (point == "state_dict")  # the checkpoint before the one that was being made
    path.with_name("checkpoint.pt.partial").write_bytes(b"torn")  # what a kill while writing leaves

    resumed, resumed_history = killed_run(loader, None, None, path, resume=True)
    whole, whole_history = killed_run(loader, None, None, tmp_path / "other.pt")
    assert_same(resumed.state_dict(), whole.state_dict())
    assert resumed_history.rows == whole_history.rows
    a, b = (torch.load(p, weights_only=True) for p in (path, tmp_path / "other.pt"))
    assert a["step"] == b["step"] == whole_history.rows[-1]["step"] and torch.equal(
        a["hooks"]["total"], b["hooks"]["total"]
    )
    for i, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"])


def test_a_finished_run_resumes_to_its_end(tmp_path):
    path = tmp_path / "checkpoint.pt"
    model, data = small_net(), batches()
    first = fit(model, data, RECIPE, checkpoint=path, progress=False)
    again = small_net()
    second = fit(again, data, RECIPE, checkpoint=path, resume=True, progress=False)
    assert_same(model.state_dict(), again.state_dict())
    assert first.rows == second.rows
    fresh = small_net()
    load_weights(fresh, path)  # a checkpoint is a weights file, too
    assert_same(model.state_dict(), fresh.state_dict())


def test_ctrl_c_leaves_a_good_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"

    def interrupt(point, step):
        if (point, step) == ("after_backward", 5):
            signal.raise_signal(signal.SIGINT)

    data, whole, model = batches(), small_net(), small_net()
    fit(whole, data, RECIPE, hooks=Counter(), progress=False)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, RECIPE, hooks=Counter(interrupt), checkpoint=path, checkpoint_seconds=0, progress=False)
    resumed = small_net()
    fit(resumed, data, RECIPE, hooks=Counter(), checkpoint=path, resume=True, progress=False)
    assert_same(whole.state_dict(), resumed.state_dict())


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    data = batches()
    good = small_net()
    state = {}

    def keep(point, step):
        if (point, step) == ("after_step", 1):
            state.update({key: value.clone() for key, value in good.state_dict().items()})

    fit(good, data, RECIPE, hooks=Counter(keep), progress=False)
    data[2][0][0, 0, 0, 0] = math.nan
    with pytest.raises(TrainingDiverged, match=r"step 2 of 8 \(epoch 1 of 2.*last good state, after 2 steps.*lower lr"):
        fit(small_net(), data, RECIPE, hooks=Counter(), checkpoint=path, checkpoint_seconds=0, progress=False)
    assert_same(torch.load(path, weights_only=True)["model"], state)


def test_infinite_weights_are_never_saved(tmp_path):
    path, model = tmp_path / "checkpoint.pt", small_net()

    def overflow(point, step):
        if point == "after_backward":
            model[1].weight.grad[0, 0] = math.inf

    with pytest.raises(TrainingDiverged, match="a weight became infinite or NaN at step 0"):
        fit(model, batches(count=1), RECIPE, hooks=Counter(overflow), checkpoint=path, progress=False)
    assert_same(torch.load(path, weights_only=True)["model"], small_net().state_dict())


def test_a_loss_of_the_users_own_and_inputs_of_several_tensors():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    x, y = torch.randn(64, 3), torch.randn(64, 4)
    targets = torch.stack((x.sum(1), y.sum(1)), 1)
    data = [((x, y), targets)]
    model = Sum()
    fit(model, data, Recipe(epochs=200, lr=0.1, weight_decay=0), loss_fn=F.mse_loss, progress=False)
    metrics = evaluate(model, data, F.mse_loss)
    assert metrics.loss < 0.01 and math.isnan(metrics.accuracy) and metrics.count == 64


def test_evaluate_counts_every_item_once_and_restores_modes():
    class Table(nn.Module):  # logits are the input itself
        def __init__(self):
            super().__init__()
            self.frozen = nn.BatchNorm1d(3).eval()

        def forward(self, x):
            return x

    data = [(torch.eye(3), torch.tensor([0, 1, 1])), (torch.eye(3)[:1], torch.tensor([0]))]
    model = Table()
    metrics = evaluate(model, data)
    assert metrics.count == 4 and metrics.accuracy == 0.75
    right, wrong = -math.log(math.e / (math.e + 2)), -math.log(1 / (math.e + 2))
    assert metrics.loss == pytest.approx((3 * right + wrong) / 4)
    assert model.training and not model.frozen.training


def test_recalibration_averages_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.Dropout(0.5), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    model[0].running_mean.fill_(9)
    data = [(torch.randn(4, 2, 5, 5) + i, torch.zeros(4)) for i in range(4)]
    weights = model[2].weight.detach().clone()
    recalibrate(model, data, batches=3)
    assert torch.allclose(model[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x, _ in data[:3]]).mean(0))
    assert torch.allclose(model[0].running_var, torch.stack([x.var((0, 2, 3)) for x, _ in data[:3]]).mean(0))
    normed = [F.batch_norm(x, None, None, training=True) for x, _ in data[:3]]  # dropout must not act between
    second = torch.stack([model[2](x).mean((0, 2, 3)) for x in normed]).mean(0)
    assert torch.allclose(model[3].running_mean, second, atol=1e-5)
    assert model[0].momentum == 0.3 and model.training and model[0].training
    assert torch.equal(model[2].weight, weights)


class Endless:
    def __iter__(self):
        return iter(batches())


class Short(Endless):
    def __len__(self):
        return 9


@pytest.mark.parametrize(
    "loader, message",
    [
        ([], "the training loader is empty"),
        (Endless(), "no length"),
        (Short(), "promised 9 batches and epoch 1 ended after 4"),
        ([torch.zeros(3)], r"must be \(inputs, targets\), not Tensor"),
    ],
)
def test_wrong_loaders(loader, message):
    with pytest.raises(InvalidInput, match=message):
        fit(small_net(), loader, RECIPE, progress=False)


@pytest.mark.parametrize(
    "name, value",
    [("epochs", -1), ("lr", math.nan), ("optimizer", "lamb"), ("clip_norm", 0), ("distill", 1.5), ("amp", "fp8")],
)
def test_wrong_recipes_name_the_field_and_what_it_may_be(name, value):
    with pytest.raises(InvalidInput, match=rf"{name} is {value!r}; it must be \w+"):
        Recipe(**{name: value})


def test_what_cannot_be_trained_or_scaled():
    with pytest.raises(InvalidInput, match="no parameters that require a gradient"):
        fit(nn.ReLU(), batches(), RECIPE, progress=False)
    with pytest.raises(InvalidInput, match="use bfloat16 or off"):
        fit(small_net(), batches(), replace(RECIPE, amp="float16"), hooks=Counter(), progress=False)
    with pytest.raises(InvalidInput, match=r"shape \(8,\); it must return a scalar"):
        fit(
            small_net(), batches(), RECIPE, loss_fn=lambda o, t: F.cross_entropy(o, t, reduction="none"), progress=False
        )
    with pytest.raises(InvalidInput, match="the loader to evaluate on is empty"):
        evaluate(small_net(), [])
    with pytest.raises(InvalidInput, match="the loader to calibrate on is empty"):
        recalibrate(small_net(), [])


def test_checkpoints_that_do_not_fit(tmp_path):
    path = tmp_path / "checkpoint.pt"
    fit(small_net(), batches(), RECIPE, checkpoint=path, progress=False)

    def resume(model=None, recipe=RECIPE, **keywords):
        fit(model or small_net(), batches(), recipe, checkpoint=path, resume=True, progress=False, **keywords)

    with pytest.raises(InvalidInput, match=r"another run \(lr 0.05 there and 0.1 here\)"):
        resume(recipe=replace(RECIPE, lr=0.1))
    with pytest.raises(InvalidInput, match="another phase"):
        resume(hooks=Counter())
    with pytest.raises(InvalidInput, match="another network than the CifarResNet"):
        resume(resnet8())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptArtifact, match="cannot be read as a checkpoint"):
        resume()
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(CorruptArtifact, match="no checkpoint of version 1"):
        resume()


def test_a_checkpoint_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    hooks = Counter()
    with pytest.raises(InvalidInput, match=r"cannot write .*file/checkpoint.pt"):
        fit(small_net(), batches(), RECIPE, hooks=hooks, checkpoint=tmp_path / "file" / "checkpoint.pt", progress=False)
    assert not hooks.seen


DISTRIBUTED = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_train import plain_run
plain_run({path!r})
"""


def plain_run(path):
    """Without batch norm, whose statistics each process has to itself, two processes make the step of one."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    history = fit(model, digits(subset=256).train, RECIPE, checkpoint=Path(path), progress=False)
    return model, history


def test_two_processes_train_the_model_of_one(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "two.pt")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    process = subprocess.run(torchrun, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr[-2000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    model, history = plain_run(tmp_path / "one.pt")
    assert two["run"]["processes"] == 2
    for key, value in model.state_dict().items():
        assert torch.allclose(two["model"][key], value, atol=1e-5), key
    assert two["history"]["rows"][-1]["loss"] == pytest.approx(history.rows[-1]["loss"], rel=1e-4)

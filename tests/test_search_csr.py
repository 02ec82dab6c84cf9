"""The training-free pruner: its errors are those of a refit, what is spare goes first, and a network survives it."""

import copy
import itertools

import numpy as np
import pytest
import torch
from test_search import WIDTHS, Chain, accuracy, batches, train
from torch import nn

from hwprune.budget import BudgetController
from hwprune.errors import InvalidInput
from hwprune.graph import cut, keep_top, trace
from hwprune.latency import flops_model
from hwprune.refit import Consumer, refit_
from hwprune.search import Search, create, method_class
from hwprune.search.csr import _along, _eliminated, _entered, _Sensor
from hwprune.train import recalibrate

RIDGE = 1e-10


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sensor(x, outputs, seed=0, taps=1, ridge=RIDGE):
    """A linear consumer of inputs x [S, C · taps], relative errors and all."""
    module = nn.Linear(x.shape[1], outputs).double()
    with torch.no_grad():
        module.weight.copy_(normal(outputs, x.shape[1], seed=seed))
    consumer = Consumer("it", module, np.repeat(np.arange(x.shape[1] // taps), taps), centred=True)
    mean = x.mean(0)
    gram = (x - mean).T @ (x - mean) / len(x)
    y = x @ module.weight.detach().T
    return _Sensor(consumer, gram, mean, 1 / float(y.var(0, correction=0).sum().sqrt()), ridge)


def refitted_error(sensors, xs, kept, taps):
    """Σ over sensors of the relative error after a refit on the samples, with numpy's least squares."""
    total = 0.0
    columns = [c * taps + t for c in kept for t in range(taps)]
    for one, x in zip(sensors, xs, strict=True):
        y = x @ one.consumer.matrix.T
        design = torch.cat([x[:, columns], torch.ones(len(x), 1)], 1)
        rest = y - design @ torch.linalg.lstsq(design, y).solution
        total += float(rest.square().sum() / (y - y.mean(0)).square().sum())
    return total


# -- selection


@pytest.mark.parametrize("taps", [1, 3])
def test_errors_from_grams_are_those_of_a_refit_on_the_samples(taps):
    xs = [normal(200, 6 * taps, seed=m) @ normal(6 * taps, 6 * taps, seed=9) + 0.5 for m in range(2)]
    sensors = [sensor(x, 4, seed=m, taps=taps) for m, x in enumerate(xs)]
    order, errors, stages = _eliminated(sensors, 0, 6, None, [3])
    assert sorted(order.tolist()) == list(range(6)) and errors[-1] == 0
    for n in range(1, 6):
        kept = sorted(order[6 - n :].tolist())
        assert float(errors[n - 1]) == pytest.approx(refitted_error(sensors, xs, kept, taps), rel=1e-5)
        # Of all ways to give up one channel more, this was the cheapest.
        before = order[6 - n - 1 :].tolist()
        others = [refitted_error(sensors, xs, [c for c in before if c != out], taps) for out in before]
        assert float(errors[n - 1]) <= min(others) * (1 + 1e-5)
    # Weights on the way are those of the refit, and exactly zero for what is gone.
    kept = sorted(order[3:].tolist())
    columns = [c * taps + t for c in kept for t in range(taps)]
    for one, x, weights in zip(sensors, xs, stages[3], strict=True):
        centred = x - x.mean(0)
        expected = torch.linalg.lstsq(centred[:, columns], centred @ one.consumer.matrix.T).solution
        torch.testing.assert_close(weights[columns] / one.scale, expected, rtol=1e-5, atol=1e-6)
        gone = torch.ones(len(weights), dtype=torch.bool)
        gone[columns] = False
        assert not weights[gone].any()


def test_a_given_order_is_followed_and_priced():
    x = normal(100, 5)
    one = sensor(x, 3)
    given = torch.tensor([4, 2, 0, 1, 3])
    order, errors, _ = _eliminated([one], 0, 5, given, [])
    assert order.tolist() == given.tolist()
    assert float(errors[1]) == pytest.approx(refitted_error([one], [x], [1, 3], 1), rel=1e-6)
    assert (errors.diff() <= 0).all()


def latent(channels=64, latents=24, consumers=3, outputs=48, seed=0):
    """Channels driven by fewer latents, read by several consumers."""
    x = normal(2000, latents, seed=seed) @ normal(latents, channels, seed=seed + 1)
    x = x * torch.rand(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).add(0.2)
    x = x + 1e-2 * normal(2000, channels, seed=seed + 2)
    return [sensor(x, outputs, seed=10 + m, ridge=1e-8) for m in range(consumers)]


def test_channels_that_others_can_stand_in_for_go_and_data_decide_better_than_weights():
    """64 channels of 24 latents: 24 of them carry nearly everything, for both orders and not for the norms' order."""
    sensors = latent()
    norms = sum(s.weights.square().sum(1) for s in sensors)
    curves = {
        "eliminate": _eliminated(sensors, 0, 64, None, [])[1] / 3,
        "lasso": _eliminated(sensors, 0, 64, _entered(sensors, 0, 64).flip(0), [])[1] / 3,
        "norms": _eliminated(sensors, 0, 64, norms.argsort(), [])[1] / 3,
    }
    assert curves["eliminate"][23] < 1e-4 and curves["lasso"][23] < 2e-4
    assert curves["norms"][23] > 10 * curves["eliminate"][23]
    for n in (20, 16, 12):
        assert curves["norms"][n - 1] > 1.5 * max(curves["eliminate"][n - 1], curves["lasso"][n - 1])
    unfitted = torch.stack([_unfitted(s, norms.argsort()[:40]) for s in sensors]).mean()
    assert unfitted > 0.5, "most of the gain is the refit's"


def _unfitted(one, gone):
    weights = torch.zeros_like(one.weights)
    weights[gone] = one.weights[gone]
    return (weights * (one.gram @ weights)).sum()


def test_distances_are_interpolated_along_the_errors():
    errors = torch.tensor([0.8, 0.4, 0.2, 0.1, 0.0], dtype=torch.float64)  # of n = 1 to 5 channels
    found = _along(errors, [0.4, 0.1], [3.0, 1.0])  # known at n = 2 and n = 4
    np.testing.assert_allclose(found, [3 + 0.4 * 2 / 0.3, 3.0, 1 + 2 / 3, 1.0, 0.0])
    assert _along(errors, [], []).tolist() == errors.tolist()


# -- the method


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(0)
    model = train(Chain(), 200, lr=0.1)
    assert accuracy(model) > 0.9
    return model, trace(model.eval(), (torch.randn(2, 1, 6, 6),))


def start(pretrained, fraction=0.5, steps=0, images=True, **kwargs):
    model, program = pretrained
    model = copy.deepcopy(model)
    cost = flops_model(program)
    controller = BudgetController(fraction * cost.dense, cost.dense)
    held_out = list(batches(8, seed=5)) if images else None
    return model, Search("csr", model, program.groups, cost, controller, steps, held_out=held_out, **kwargs)


def finished(pretrained, widths, ranking, refit=True):
    """The cut network; without a refit only its batch norms are recalibrated."""
    model, program = copy.deepcopy(pretrained[0]), pretrained[1]
    keep = keep_top(program.groups, widths, ranking)
    if refit:
        refit_(model, program.groups, keep, list(batches(8, seed=5)))
    small = cut(model, program, keep).module
    recalibrate(small, list(batches(8, seed=5)))
    return small


def test_a_network_survives_without_a_training_step(pretrained):
    model, run = start(pretrained, 0.4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with run:
        pass
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing was changed"
    found, cost = run.result(), run.context.cost
    chosen = method_class("csr").allocate(
        run.context.groups, cost, found.widths, found.ranking, 0.4 * cost.dense, value=found.value
    )
    assert cost.price(chosen.widths) <= 0.4 * cost.dense
    assert torch.equal(found.widths, torch.from_numpy(chosen.widths).double())
    mine = accuracy(finished(pretrained, chosen.widths, found.ranking))
    other = method_class("magnitude").allocate(
        run.context.groups, cost, found.widths, torch.ones(sum(WIDTHS)), 0.4 * cost.dense
    )
    rival = accuracy(finished(pretrained, other.widths, torch.ones(sum(WIDTHS)), refit=False))
    assert mine > 0.85 and mine > rival


def test_few_images_judge_every_width_that_is_looked_at(pretrained):
    """Whole forwards are what the choice takes its time for: one of all images for the Grams, the others of few."""
    model, run = start(pretrained)
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    with run:
        pass
    grams, *judged = sizes
    assert grams == 512
    assert judged == [32] * (1 + 4 * len(WIDTHS))  # the dense network, and four widths of every group


def test_values_rise_to_zero_and_the_ranking_is_the_order(pretrained):
    _, run = start(pretrained)
    with run:
        pass
    found = run.result()
    for first, last in itertools.pairwise(run.context.groups.offsets.tolist()):
        value = found.value[first:last]
        assert (value.diff() >= 0).all() and value[-1] == 0 and value[0] < 0
        ranks = (found.ranking[first:last] * (last - first)).round().long()
        assert sorted(ranks.tolist()) == list(range(1, last - first + 1))


def test_a_dead_channel_goes_first_and_one_of_two_equals_next(pretrained):
    model = copy.deepcopy(pretrained[0])
    with torch.no_grad():
        norm = model[4]
        norm.weight[7] = norm.bias[7] = 0
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[11] = tensor[5]
        model[3].weight[11] = model[3].weight[5]
    x, y = (torch.cat(part) for part in zip(*batches(32, seed=5), strict=True))
    recalibrate(model, [(x, y)])  # so that the statistics of the dense network are those of the calibration images
    program = trace(model.eval(), (torch.randn(2, 1, 6, 6),))
    _, run = start((model, program))
    with run:
        pass
    ranking = run.ranking()[WIDTHS[0] : WIDTHS[0] + WIDTHS[1]]
    first, second = ranking.argsort()[:2].tolist()
    assert first == 7 and second in (5, 11)
    keep = np.ones(sum(WIDTHS), bool)
    keep[[WIDTHS[0] + first, WIDTHS[0] + second]] = False
    changed = copy.deepcopy(model)
    refit_(changed, program.groups, keep, [(x, y)], ridge=1e-9, images=len(x))
    small = cut(changed, program, keep).module.eval()
    recalibrate(small, [(x, y)])
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=2e-3)


@pytest.mark.parametrize("options", [{"order": "lasso"}, {"images": 64, "judges": 32}], ids=str)
def test_options_lead_to_networks_that_work(pretrained, options):
    _, run = start(pretrained, 0.5, options=options)
    with run:
        pass
    widths, ranking = run.widths().numpy().astype(int), run.ranking()
    assert accuracy(finished(pretrained, widths, ranking)) > 0.8


def test_pinned_and_least_widths_are_kept(pretrained):
    _, run = start(pretrained, 0.5, minimum=np.array([1, 1, 12]), pinned={0: 15})
    with run:
        pass
    widths = run.widths()
    assert widths[0] == 15 and widths[2] >= 12


def test_steps_train_the_dense_network_and_a_resumed_search_ends_the_same(pretrained, tmp_path):
    model, whole = start(pretrained, steps=6)
    with whole:
        train(model, 6, whole)
    other, first = start(pretrained, steps=6)
    train(other, 6, first, until=3)
    torch.save({"model": other.state_dict(), "search": first.state_dict()}, tmp_path / "checkpoint.pt")
    first.close()
    resumed, second = start(pretrained, steps=6)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["search"])
    with second:
        train(resumed, 6, second, start=3)
    assert torch.equal(second.ranking(), whole.ranking())
    assert torch.equal(second.result().value, whole.result().value)


def test_a_group_that_no_reader_can_be_refitted_for_is_judged_by_masks():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.up = nn.Conv2d(1, 8, 3), nn.ConvTranspose2d(8, 4, 2)
            self.b, self.out = nn.Conv2d(4, 6, 1), nn.Linear(6, 4)

        def forward(self, x):
            x = torch.relu(self.up(torch.relu(self.a(x))))
            return self.out(torch.relu(self.b(x)).mean((2, 3)))

    model = Odd().eval()
    program = trace(model, (torch.randn(2, 1, 6, 6),))
    model, run = start((model, program), 0.5)
    with run:
        pass
    value = run.result().value
    assert run.context.groups.names[0] == "a" and (value[:8].diff() >= 0).all() and value[0] < 0 == value[7]
    assert run.context.cost.price(run.widths().numpy()) <= 0.5 * run.context.cost.dense


def test_what_is_missing_or_wrong_is_named(pretrained):
    with pytest.raises(InvalidInput, match="give held-out images"):
        start(pretrained, images=False)
    for options, message in (
        ({"order": "random"}, "eliminate, lasso"),
        ({"judges": 0}, "judges=0"),
        ({"ridge": 0.0}, "ridge"),
    ):
        with pytest.raises(InvalidInput, match=message):
            create("csr", **options)

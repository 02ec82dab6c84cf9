"""Channel scores: hand-computed tables, every member votes, and Taylor scores equal the gradient of a real mask."""

import numpy as np
import pytest
import torch
from torch import nn

from hwprune.errors import InvalidInput
from hwprune.graph import Group, Groups, Slot, trace
from hwprune.importance import importance
from hwprune.nn import mask_, unmask_

TIE = 2e-4  # the part of a score that the order of ties may take


class Residual(nn.Module):
    """stem + branch share one group; the branch's inner convolution owns another."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.outer = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = (x + self.bn2(self.outer(self.bn1(self.inner(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    """No normalisation; the second convolution's channels are flattened 4 × 4 into the head."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu().flatten(1))


def build(kind):
    torch.manual_seed(0)
    model = kind()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(8, 3, 4, 4)
    return model.eval(), x, trace(model, (x,)).groups


def by_name(groups, flat):
    return {group.name: flat[a:b] for group, a, b in zip(groups, groups.offsets, groups.offsets[1:], strict=False)}


def unit_mean(x):
    return x / x.mean()


def assert_scores(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=TIE, atol=TIE * float(expected.mean()))


def test_bn_averages_the_scales_of_all_members():
    model, _, groups = build(Residual)
    score = by_name(groups, importance(model, groups, "bn"))
    assert_scores(score["stem"], (unit_mean(model.bn.weight.abs()) + unit_mean(model.bn2.weight.abs())).detach() / 2)
    assert_scores(score["inner"], unit_mean(model.bn1.weight.abs()).detach())
    raw = by_name(groups, importance(model, groups, "bn", normalise=False))
    assert_scores(raw["stem"], (model.bn.weight.abs() + model.bn2.weight.abs()).detach() / 2)


def test_bn_falls_back_to_l2_without_a_norm():
    model, _, groups = build(Plain)
    assert torch.equal(importance(model, groups, "bn").argsort(), importance(model, groups, "l2").argsort())


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_weight_norms_average_producers_consumers_and_scales(kind, power):
    model, _, groups = build(Residual)

    def norm(weight, dim):
        return unit_mean(weight.detach().movedim(dim, 0).flatten(1).norm(power, dim=1))

    score = by_name(groups, importance(model, groups, kind))
    scales = [unit_mean(bn.weight.detach().abs()) for bn in (model.bn, model.bn2)]
    weights = [
        norm(model.stem.weight, 0),
        norm(model.outer.weight, 0),
        norm(model.inner.weight, 1),
        norm(model.head.weight, 1),
    ]
    assert_scores(score["stem"], torch.stack(weights + scales).mean(0))
    inner = [norm(model.inner.weight, 0), norm(model.outer.weight, 1), unit_mean(model.bn1.weight.detach().abs())]
    assert_scores(score["inner"], torch.stack(inner).mean(0))


def test_a_channel_owns_all_its_flattened_columns():
    model, _, groups = build(Plain)
    columns = model.head.weight.detach().reshape(5, 4, 16).movedim(1, 0).flatten(1)
    expected = (unit_mean(model.two.weight.detach().flatten(1).norm(dim=1)) + unit_mean(columns.norm(dim=1))) / 2
    assert_scores(by_name(groups, importance(model, groups, "l2"))["two"], expected)


@pytest.mark.parametrize("kind", [Residual, Plain])
def test_taylor_is_the_gradient_of_a_mask_on_the_channel(kind):
    model, x, groups = build(kind)
    target = torch.arange(8) % 5
    nn.functional.cross_entropy(model(x), target).backward()
    score = importance(model, groups, "taylor", normalise=False)
    masked = mask_(model, groups)
    mask = torch.ones(groups.total, requires_grad=True)
    masked.set(mask)
    nn.functional.cross_entropy(model(x), target).backward()
    unmask_(model)
    torch.testing.assert_close(score, mask.grad.abs(), rtol=1e-3, atol=TIE * float(mask.grad.abs().max()))
    for group in by_name(groups, importance(model, groups, "taylor")).values():
        assert float(group.mean()) == pytest.approx(1, abs=TIE)


def test_taylor_without_gradients_says_what_to_do():
    model, _, groups = build(Residual)
    with pytest.raises(InvalidInput, match=r"has none: call backward\(\)"):
        importance(model, groups, "taylor")


def test_equal_scales_are_ordered_by_weight_norm():
    model, _, groups = build(Residual)
    for bn in (model.bn, model.bn1, model.bn2):
        nn.init.ones_(bn.weight)
    score, norm = (by_name(groups, importance(model, groups, kind)) for kind in ("bn", "l2"))
    for name in score:
        assert torch.equal(score[name].argsort(), norm[name].argsort())
        assert float(score[name].max() / score[name].min()) < 1 + TIE


def test_dead_channels_score_above_zero_and_below_the_living():
    model, _, groups = build(Residual)
    for bn in (model.bn, model.bn2):
        bn.weight.data[2] = 0
    model.bn1.weight.data.zero_()
    score = by_name(groups, importance(model, groups, "bn"))
    assert int(score["stem"].argmin()) == 2
    assert all(bool((values > 0).all()) and bool(values.isfinite().all()) for values in score.values())
    assert float(score["inner"].max()) < TIE


def test_large_members_do_not_drown_small_ones():
    model, _, groups = build(Residual)
    before = importance(model, groups, "l2")
    model.stem.weight.data *= 1e4
    torch.testing.assert_close(importance(model, groups, "l2"), before, rtol=1e-4, atol=1e-6)


def hand_made(positions):
    slot = Slot("weight", 0, np.asarray(positions), "out")
    return Groups((Group("hand", len(positions), (slot,)),), (), np.arange(1, len(positions) + 1))


def test_positions_are_summed_whatever_their_order():
    model = nn.Linear(1, 6, bias=False)
    model.weight.data[:, 0] = torch.tensor([1.0, 2, 4, 8, 16, 32])
    score = importance(model, hand_made([[5, 0], [3, 1], [2, 4]]), "l1", normalise=False)
    assert_scores(score, torch.tensor([33.0, 10, 20]))


def test_no_groups_give_no_scores():
    assert importance(nn.Linear(2, 2), Groups((), (), np.zeros(0, dtype=np.int64))).shape == (0,)


def test_wrong_kind_and_wrong_model_are_refused():
    model, _, groups = build(Residual)
    with pytest.raises(InvalidInput, match=r"'l3' is unknown; it is one of bn, l1, l2, taylor"):
        importance(model, groups, "l3")
    with pytest.raises(InvalidInput, match=r"stem\.weight.*no such parameter"):
        importance(Plain(), groups)
    with pytest.raises(InvalidInput, match=r"has shape \(4, 1\)"):
        importance(nn.Linear(1, 4), hand_made([[5], [0]]))

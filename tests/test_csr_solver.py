"""The joint sparse coder: proximal steps, solvers that agree, exact recovery of what was planted, the classifier."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from hwprune.errors import InvalidInput
from hwprune.search.csr_solver import (
    Classifier,
    Penalty,
    from_gram,
    largest_rows,
    path,
    shrink,
    shrink_blocks,
    shrink_rows,
    shrink_singular_values,
    solve,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(n=30, atoms=60, sensors=3, segments=12, rows=5, rank=2, noise=0.0, seed=0):
    """Dictionaries, signals, the planted rows, the code and the interference. The interference is shared."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    support = torch.randperm(atoms, generator=generator)[:rows].sort().values
    dictionaries = [draw(n, atoms) / math.sqrt(n) for _ in range(sensors)]
    code = torch.zeros(atoms, sensors * segments, dtype=torch.float64)
    code[support] = draw(rows, sensors * segments)
    low = draw(n, rank) @ draw(rank, sensors * segments) / math.sqrt(n) if rank else 0.0
    clean = torch.cat([d @ a for d, a in zip(dictionaries, code.split(segments, 1), strict=True)], 1)
    signals = (clean + low + noise * draw(n, sensors * segments)).split(segments, 1)
    return dictionaries, list(signals), support, code, low


def found_rows(code, count):
    return set(code.rows.norm(dim=1).topk(count).indices.tolist())


# -- proximal steps


def minimised(x, penalty, start):
    """argmin ½ ‖z - x‖² + penalty(z), numerically."""

    def objective(flat):
        z = torch.from_numpy(flat.reshape(x.shape)).requires_grad_()
        value = 0.5 * (z - x).square().sum() + penalty(z)
        (gradient,) = torch.autograd.grad(value, z)
        return float(value.detach()), gradient.numpy().ravel()

    result = minimize(objective, start.numpy().ravel(), jac=True, method="BFGS", options={"gtol": 1e-10})
    return float(result.fun)


LABELS = torch.tensor([0, 0, 1, 1, 1, 2])


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.5])
def test_proximal_steps_minimise(threshold):
    x = normal(6, 4)
    cases = [
        (shrink(x, threshold), lambda z: threshold * z.abs().sum()),
        (shrink_rows(x, threshold), lambda z: threshold * z.norm(dim=1).sum()),
        (
            shrink_blocks(x, LABELS, threshold),
            lambda z: threshold * sum(z[c == LABELS].norm() for c in range(3)),
        ),
        (shrink_singular_values(x, threshold), lambda z: threshold * torch.linalg.matrix_norm(z, "nuc")),
    ]
    for found, penalty in cases:
        value = float(0.5 * (found - x).square().sum() + penalty(found))
        # Any descent that starts there, or at x, ends no lower.
        for start in (found + 1e-3 * normal(6, 4, seed=1), x):
            assert value <= minimised(x, penalty, start) + 1e-9


def test_rows_are_shrunk_before_blocks():
    """The nested step is exact in this order, and above the optimum in the other."""
    x = normal(6, 4, seed=2) * 1.5

    def objective(z):
        blocks = sum(float(z[c == LABELS].norm()) for c in range(3))
        return 0.5 * float((z - x).square().sum()) + 0.9 * float(z.norm(dim=1).sum()) + 1.1 * blocks

    right = shrink_blocks(shrink_rows(x, 0.9), LABELS, 1.1)
    wrong = shrink_rows(shrink_blocks(x, LABELS, 1.1), 0.9)
    best = minimised(
        x,
        lambda z: 0.9 * z.norm(dim=1).sum() + 1.1 * sum(z[c == LABELS].norm() for c in range(3)),
        right + 1e-4 * normal(6, 4, seed=3),
    )
    assert objective(right) <= best + 1e-8 and objective(wrong) > objective(right) + 1e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 3.0))
def test_a_row_goes_if_and_only_if_its_norm_is_below_the_threshold(seed, threshold):
    x = normal(8, 3, seed=seed)
    assert torch.equal(shrink_rows(x, threshold).norm(dim=1) > 0, x.norm(dim=1) > threshold)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 3.0))
def test_shrinking_singular_values_is_nonexpansive(seed, threshold):
    x, y = normal(5, 7, seed=seed), normal(5, 7, seed=seed + 1)
    distance = (shrink_singular_values(x, threshold) - shrink_singular_values(y, threshold)).norm()
    assert distance <= (x - y).norm() * (1 + 1e-12)


# -- three solvers, one answer

MODELS = {
    "rows": Penalty(0.5),
    "low-rank": Penalty(0.5, low_rank=1.0),
    "noise": Penalty(0.5, noise=0.4),
    "blocks": Penalty(0.3, blocks=0.5),
    "all": Penalty(0.3, blocks=0.3, low_rank=1.0, noise=0.3),
}


@pytest.mark.parametrize("name", MODELS)
def test_three_solvers_agree_and_are_optimal(name):
    dictionaries, signals, *_ = planted(noise=0.05)
    labels = torch.arange(60) // 10
    codes = [
        solve(dictionaries, signals, MODELS[name], labels=labels, method=method, iterations=6000)
        for method in ("fista", "admm", "ladmm")
    ]
    oracle = codes[0].objective
    for code in codes:
        assert code.kkt < 1e-6, code.iterations
        assert code.objective == pytest.approx(oracle, rel=1e-8)
        assert torch.equal(code.support, codes[0].support)


def test_optimality_conditions_hold_as_they_are_written_down():
    """Rows: D'R = λ a / ‖a‖ on the support and ‖·‖ <= λ off it; L: R = λ_L (U V' + W) with ‖W‖ <= 1."""
    dictionaries, signals, *_ = planted(noise=0.05)
    code = solve(dictionaries, signals, Penalty(0.5, low_rank=1.0), tolerance=1e-10)
    parts = zip(dictionaries, code.rows.split(12, 1), strict=True)
    rest = torch.cat(signals, 1) - torch.cat([d @ a for d, a in parts], 1) - code.low_rank
    pull = torch.cat([d.T @ r for d, r in zip(dictionaries, rest.split(12, 1), strict=True)], 1)
    live = code.support
    assert 0 < len(live) < 60
    direction = code.rows[live] / code.rows[live].norm(dim=1, keepdim=True)
    torch.testing.assert_close(pull[live], 0.5 * direction, rtol=0, atol=1e-7)
    assert (pull.norm(dim=1) <= 0.5 + 1e-7).all()
    left, values, right = torch.linalg.svd(code.low_rank, full_matrices=False)
    used = values > 1e-9
    assert used.any()
    outside = rest / 1.0 - left[:, used] @ right[used]
    assert float((left[:, used].T @ outside).norm()) < 1e-7 and float((outside @ right[used].T).norm()) < 1e-7
    assert float(torch.linalg.matrix_norm(outside, 2)) <= 1 + 1e-7


# -- special cases


def test_one_sensor_and_one_segment_is_the_lasso():
    from sklearn.linear_model import Lasso

    (d,), (y,), *_ = planted(sensors=1, segments=1, rank=0, noise=0.1)
    code = solve([d], [y], Penalty(0.2), tolerance=1e-11)
    lasso = Lasso(alpha=0.2 / 30, fit_intercept=False, tol=1e-12, max_iter=100000).fit(d.numpy(), y[:, 0].numpy())
    np.testing.assert_allclose(code.rows[:, 0].numpy(), lasso.coef_, atol=1e-7)


def test_an_orthonormal_dictionary_is_solved_in_one_step():
    dictionaries = [torch.linalg.qr(normal(30, 20, seed=m))[0] for m in range(2)]
    signals = [normal(30, 5, seed=9), normal(30, 7, seed=8)]
    code = solve(dictionaries, signals, Penalty(1.3))
    expected = torch.cat([d.T @ y for d, y in zip(dictionaries, signals, strict=True)], 1)
    torch.testing.assert_close(code.rows, shrink_rows(expected, 1.3), rtol=0, atol=1e-10)


def test_infinite_penalties_and_large_ones_switch_parts_off():
    dictionaries, signals, *_ = planted(noise=0.05)
    plain = solve(dictionaries, signals, Penalty(0.5))
    assert not plain.low_rank.any() and not plain.noise.any()
    large = solve(dictionaries, signals, Penalty(0.5, low_rank=1e3, noise=1e3))
    torch.testing.assert_close(large.rows, plain.rows, rtol=0, atol=1e-7)
    top = largest_rows(dictionaries, signals)
    assert not solve(dictionaries, signals, Penalty(top * 1.0001)).rows.any()
    assert len(solve(dictionaries, signals, Penalty(top * 0.999)).support) == 1
    blocks = Penalty(0.5, blocks=1e-12)
    labels = torch.arange(60) // 10
    torch.testing.assert_close(solve(dictionaries, signals, blocks, labels=labels).rows, plain.rows, rtol=0, atol=1e-6)


def test_blocks_leave_whole_classes_out():
    dictionaries, signals, *_ = planted(noise=0.05)
    labels = torch.arange(60) // 10
    code = solve(dictionaries, signals, Penalty(0.05, blocks=10.0), labels=labels)
    live = set(labels[code.support].tolist())
    assert 0 < len(live) < 3
    inside = [int((labels[code.support] == c).sum()) for c in live]
    assert max(inside) > 1


def test_a_linear_kernel_is_the_linear_model():
    dictionaries, signals, *_ = planted(n=30, atoms=20, rank=0, noise=0.05)
    pairs = [from_gram(d.T @ d, d.T @ y) for d, y in zip(dictionaries, signals, strict=True)]
    kernel = solve([d for d, _ in pairs], [y for _, y in pairs], Penalty(0.4))
    linear = solve(dictionaries, signals, Penalty(0.4))
    torch.testing.assert_close(kernel.rows, linear.rows, rtol=0, atol=1e-7)

    # With a low-rank part that holds where the signals lie in the range of the dictionary, and only there.
    signals = [d @ normal(20, 12, seed=m) for m, d in enumerate(dictionaries)]
    for inside in (True, False):
        given = signals if inside else [y + normal(30, 12, seed=50) for y in signals]
        # The same dictionary for all sensors, so that the rotations of the factors are the same as well.
        first = dictionaries[0]
        given = [first @ torch.linalg.lstsq(first, y).solution if inside else y for y in given]
        factors = [from_gram(first.T @ first, first.T @ y) for y in given]
        penalty = Penalty(0.4, low_rank=2.0)
        kernel = solve([d for d, _ in factors], [y for _, y in factors], penalty)
        linear = solve([first] * 3, given, penalty)
        distance = float((kernel.rows - linear.rows).abs().max())
        assert distance < 1e-6 if inside else distance > 1e-3


def test_row_weights_are_prices():
    dictionaries, signals, support, *_ = planted(rank=0, noise=0.05)
    weight = torch.ones(60, dtype=torch.float64)
    weight[support[0]] = 100.0
    code = solve(dictionaries, signals, Penalty(0.3), row_weight=weight)
    assert support[0] not in code.support and support[1] in code.support


# -- symmetries


@pytest.mark.parametrize("method", ["fista", "admm", "ladmm"])
@pytest.mark.parametrize("penalty", [Penalty(0.3), Penalty(0.3, low_rank=0.7, noise=0.2)], ids=["rows", "all"])
def test_a_weight_of_a_sensor_scales_it_by_its_root(method, penalty):
    """And for rows alone the optimality conditions hold as they are written down for ½ Σ w ‖Y - DA‖²."""
    dictionaries, signals, *_ = planted(6, 8, segments=2, rows=3, noise=0.05)
    weight = [0.25, 1.0, 9.0]
    found = solve(dictionaries, signals, penalty, sensor_weight=weight, method=method, iterations=20_000)
    larger = [[math.sqrt(w) * x for w, x in zip(weight, each, strict=True)] for each in (dictionaries, signals)]
    by_hand = solve(*larger, penalty, method=method, iterations=20_000)
    roots = torch.tensor(weight, dtype=torch.float64).sqrt().repeat_interleave(2)
    torch.testing.assert_close(found.rows, by_hand.rows)
    torch.testing.assert_close(found.low_rank * roots, by_hand.low_rank)
    torch.testing.assert_close(found.noise * roots, by_hand.noise)
    plain = solve(dictionaries, signals, penalty, iterations=20_000)
    assert (found.rows - plain.rows).norm() > 0.1 * plain.rows.norm()
    if penalty.low_rank == math.inf:
        parts = zip(weight, dictionaries, signals, found.rows.split(2, 1), strict=True)
        pull = torch.cat([w * d.T @ (y - d @ a) for w, d, y, a in parts], 1)
        on = found.support
        torch.testing.assert_close(pull[on], 0.3 * found.rows[on] / found.rows[on].norm(dim=1, keepdim=True))
        assert (pull.norm(dim=1) <= 0.3 * (1 + 1e-6)).all()


def test_a_sensor_that_is_not_trusted_does_not_mislead():
    dictionaries, signals, support, *_ = planted(rank=0, noise=0.01)
    signals[0] = signals[0] + 5 * normal(*signals[0].shape, seed=9)
    trusted, misled = (
        solve(dictionaries, signals, Penalty(0.5), sensor_weight=weight) for weight in ([1e-4, 1, 1], [1, 1, 1])
    )
    assert found_rows(trusted, 5) == set(support.tolist()) != found_rows(misled, 5)


def test_permutations_scalings_and_rotations_carry_over():
    dictionaries, signals, *_ = planted(noise=0.05)
    penalty = Penalty(0.5, low_rank=1.0)
    base = solve(dictionaries, signals, penalty)
    parts = list(base.rows.split(12, 1))

    order = [2, 0, 1]
    code = solve([dictionaries[m] for m in order], [signals[m] for m in order], penalty)
    torch.testing.assert_close(code.rows, torch.cat([parts[m] for m in order], 1), rtol=0, atol=1e-7)

    segments = torch.randperm(12)
    code = solve(dictionaries, [y[:, segments] for y in signals], penalty)
    torch.testing.assert_close(code.rows, torch.cat([a[:, segments] for a in parts], 1), rtol=0, atol=1e-7)

    atoms = torch.randperm(60)
    code = solve([d[:, atoms] for d in dictionaries], signals, penalty)
    torch.testing.assert_close(code.rows, base.rows[atoms], rtol=0, atol=1e-7)

    code = solve(dictionaries, [3 * y for y in signals], Penalty(1.5, low_rank=3.0))
    torch.testing.assert_close(code.rows, 3 * base.rows, rtol=0, atol=1e-6)
    torch.testing.assert_close(code.low_rank, 3 * base.low_rank, rtol=0, atol=1e-6)

    rotation = torch.linalg.qr(normal(30, 30, seed=7))[0]
    code = solve([rotation @ d for d in dictionaries], [rotation @ y for y in signals], penalty)
    torch.testing.assert_close(code.rows, base.rows, rtol=0, atol=1e-7)
    torch.testing.assert_close(code.low_rank, rotation @ base.low_rank, rtol=0, atol=1e-7)


def test_sensors_may_have_different_numbers_of_features_and_segments():
    generator = torch.Generator().manual_seed(0)
    dictionaries = [torch.randn(n, 40, generator=generator, dtype=torch.float64) for n in (20, 33)]
    signals = [torch.randn(n, t, generator=generator, dtype=torch.float64) for n, t in ((20, 3), (33, 5))]
    code = solve(dictionaries, signals, Penalty(4.0, low_rank=2.0))
    assert code.kkt < 1e-6 and code.rows.shape == (40, 8) and 0 < len(code.support) < 40
    assert not code.low_rank[20:, :3].any() and code.low_rank[20:, 3:].any()
    apart = code.low_rank[:, :3]
    assert torch.equal(apart.norm(dim=0) > 0, torch.ones(3, dtype=torch.bool)) or not apart.any()


# -- what was planted comes back


@pytest.mark.parametrize(
    "n, atoms, segments, rows, rank", [(80, 60, 10, 4, 1), (80, 100, 10, 4, 1), (100, 150, 20, 5, 2)]
)
@pytest.mark.parametrize("ratio, seed", [(1.5, 0), (3.0, 1)])
def test_planted_rows_and_interference_are_recovered_exactly(n, atoms, segments, rows, rank, ratio, seed):
    dictionaries, signals, support, truth, low = planted(n, atoms, 3, segments, rows, rank, seed=seed)
    code = solve(
        dictionaries, signals, Penalty(1.0, low_rank=ratio), method="ladmm", exact=True, tolerance=1e-9, iterations=1000
    )
    assert found_rows(code, rows) == set(support.tolist())
    assert float((code.rows - truth).norm() / truth.norm()) < 1e-7
    assert float((code.low_rank - low).norm() / low.norm()) < 1e-7
    assert code.residual < 1e-8 and code.iterations < 500 and code.kkt < 1e-6


def test_the_hard_case_is_not_claimed_to_be_exact():
    dictionaries, signals, _, truth, _ = planted(30, 60, 3, 4, 5, 2)
    code = solve(dictionaries, signals, Penalty(1.0, low_rank=2.0), method="ladmm", exact=True, iterations=2000)
    low = torch.cat(signals, 1) - _clean(dictionaries, truth, 4)
    nuclear = float(torch.linalg.matrix_norm(low, "nuc"))
    assert code.residual < 1e-6 and code.objective <= (float(truth.norm(dim=1).sum()) + 2 * nuclear) * (1 + 1e-7)


def _clean(dictionaries, code, segments):
    return torch.cat([d @ a for d, a in zip(dictionaries, code.split(segments, 1), strict=True)], 1)


def test_sparse_noise_is_told_apart():
    dictionaries, signals, support, truth, _ = planted(80, 60, 3, 10, 4, 0)
    joined = torch.cat(signals, 1)
    spikes = torch.zeros_like(joined)
    where = torch.randperm(joined.numel(), generator=torch.Generator().manual_seed(1))[: joined.numel() // 20]
    spikes.view(-1)[where] = 3 * normal(len(where), seed=2)
    dirty = list((joined + spikes).split(10, 1))
    code = solve(dictionaries, dirty, Penalty(1.0, noise=0.35), method="ladmm", exact=True, iterations=2000)
    assert found_rows(code, 4) == set(support.tolist())
    assert float((code.rows - truth).norm() / truth.norm()) < 1e-5
    assert float((code.noise - spikes).norm() / spikes.norm()) < 1e-5


def test_a_low_rank_part_finds_rows_that_interference_hides():
    """Strong interference in few segments: with L the planted rows lead, without L they do not."""
    hits = {math.inf: 0, 0.6: 0}
    for seed in range(3):
        dictionaries, signals, support, _, low = planted(30, 60, 3, 4, 5, 2, noise=0.01, seed=seed)
        signals = list((torch.cat(signals, 1) + 6 * low).split(4, 1))
        for low_rank in hits:
            code = solve(dictionaries, signals, Penalty(0.3, low_rank=low_rank), tolerance=1e-6)
            hits[low_rank] += len(found_rows(code, 5) & set(support.tolist()))
    assert hits[0.6] >= 13 and hits[math.inf] <= 6


def test_sensors_together_find_more_than_each_alone():
    joint, alone = {}, {}
    for sensors in (1, 3, 8):
        joint[sensors] = alone[sensors] = 0.0
        for seed in range(10):
            dictionaries, signals, support, *_ = planted(20, 60, sensors, 1, 8, 0, noise=0.05, seed=100 + seed)
            truth = set(support.tolist())
            joint[sensors] += (
                len(found_rows(solve(dictionaries, signals, Penalty(0.1), tolerance=1e-4), 8) & truth) / 10
            )
            each = [
                len(found_rows(solve([d], [y], Penalty(0.1), tolerance=1e-4), 8) & truth)
                for d, y in zip(dictionaries, signals, strict=True)
            ]
            alone[sensors] += np.mean(each) / 10
    assert joint[1] == pytest.approx(alone[1]) and joint[1] < joint[3] - 1 < joint[8] - 0.8
    assert joint[8] > 7.8 and joint[3] > alone[3] + 1.5 and joint[8] > alone[8] + 2


def test_too_large_a_step_is_noticed_and_halved():
    dictionaries, signals, *_ = planted(80, 60, 3, 10, 4, 1)
    penalty = Penalty(1.0, low_rank=2.0)
    sound = solve(dictionaries, signals, penalty, method="ladmm", exact=True, iterations=3000)
    assert sound.step == 0.99 and sound.residual < 1e-8
    for step in (8.0, 20.0):
        code = solve(dictionaries, signals, penalty, method="ladmm", exact=True, step=step, iterations=6000)
        assert code.step < step / 2 and code.residual < 1e-7
        torch.testing.assert_close(code.rows, sound.rows, rtol=0, atol=1e-5)


# -- the path


@pytest.mark.parametrize("low_rank", [math.inf, 2.0])
def test_the_path_is_what_cold_starts_find_and_screening_loses_nothing(low_rank):
    dictionaries, signals, *_ = planted(rank=1, noise=0.05)
    warm = path(dictionaries, signals, count=8, least=0.05, low_rank=low_rank)
    whole = path(dictionaries, signals, count=8, least=0.05, low_rank=low_rank, screen=False)
    assert not warm[0][1].rows.any() or low_rank == math.inf
    for (level, code), (_, other) in zip(warm, whole, strict=True):
        cold = solve(dictionaries, signals, Penalty(level, low_rank=low_rank))
        torch.testing.assert_close(code.rows, cold.rows, rtol=0, atol=1e-6)
        torch.testing.assert_close(code.rows, other.rows, rtol=0, atol=1e-6)
    counts = [len(code.support) for _, code in warm]
    assert counts[0] <= 1 and counts[-1] > 10 and [level for level, _ in warm] == sorted((v for v, _ in warm))[::-1]


# -- the classifier


def events(classes, sensors, interference, seed, n=24, per_class=10, tests=24, segments=4):
    """Class subspaces seen by every sensor, and events under a common random interference of rank 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bases = [[draw(n, 4) for _ in range(classes)] for _ in range(sensors)]
    weights = [draw(4, per_class) for _ in range(classes)]
    dictionaries = []
    for m in range(sensors):
        d = torch.cat([bases[m][c] @ weights[c] for c in range(classes)], 1)
        dictionaries.append(d / d.norm(dim=0))
    labels = torch.arange(classes).repeat_interleave(per_class)
    found = []
    for t in range(tests):
        c = t % classes
        low = interference * draw(n, 1) @ draw(1, sensors * segments)
        parts = [bases[m][c] @ draw(4, segments) / 2 + 0.3 * draw(n, segments) for m in range(sensors)]
        found.append((c, [p + part for p, part in zip(parts, low.split(segments, 1), strict=True)]))
    return dictionaries, labels, found


def share(classifier, found):
    return float(np.mean([classifier(signals) == c for c, signals in found]))


def test_the_residual_rule_classifies_and_gains_from_the_low_rank_part():
    dictionaries, labels, found = events(4, 3, interference=6.0, seed=0, tests=12, segments=2)
    read = {}
    for name, penalty, exact in (
        ("rows", Penalty(0.5), False),
        ("rows and L", Penalty(0.5, low_rank=1.5), False),
        ("blocks and L", Penalty(0.3, blocks=0.5, low_rank=1.5), False),
        ("exact", Penalty(1.0, blocks=1.0, low_rank=1.5), True),
    ):
        classifier = Classifier(dictionaries, labels, penalty, exact=exact, iterations=200, tolerance=1e-4)
        read[name] = share(classifier, found)
    assert read.pop("rows") < 0.7 and min(read.values()) > 0.9


def test_two_views_of_real_digits_are_read_better_than_one():
    """Upper and lower halves of scikit-learn's digits as two sensors."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).double() / 16, torch.from_numpy(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train = torch.cat([order[y[order] == c][:8] for c in range(10)])
    test = order[~torch.isin(order, train)][:100]
    views = [x[:, :32].T, x[:, 32:].T]
    dictionaries = [nn.functional.normalize(view[:, train], dim=0) for view in views]
    signals = [nn.functional.normalize(view[:, test], dim=0) for view in views]
    penalty = Penalty(0.05)
    read = {}
    for name, use in (("both", [0, 1]), ("upper", [0]), ("lower", [1])):
        classifier = Classifier([dictionaries[m] for m in use], y[train], penalty, iterations=60, tolerance=1e-2)
        hits = [classifier([signals[m][:, t : t + 1] for m in use]) == int(y[test[t]]) for t in range(len(test))]
        read[name] = float(np.mean(hits))
    assert read["both"] > 0.88 and read["both"] > max(read["upper"], read["lower"]) + 0.08


# -- refusals


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d, y: solve(d, y, Penalty(0.1), method="newton"), "possible: fista, admm, ladmm"),
        (lambda d, y: solve(d, y, Penalty(0.1), exact=True), "needs method='ladmm'"),
        (lambda d, y: solve(d, y, Penalty(0.1, blocks=1.0)), "needs labels"),
        (lambda d, y: solve(d, y[:1], Penalty(0.1)), "3 dictionaries and 1 signals"),
        (lambda d, y: solve(d, [y[0][:5], *y[1:]], Penalty(0.1)), "sensor 0"),
        (lambda d, y: solve(d, y, Penalty(0.1), start=torch.zeros(3, 3)), "start has shape"),
        (lambda d, y: solve(d, y, Penalty(0.1), step=0), "must be positive"),
        (lambda d, y: solve(d, y, Penalty(0.1), sensor_weight=[1, 2]), "above 0 for each of 3"),
        (lambda d, y: solve(d, y, Penalty(0.1), sensor_weight=[1, 2, 0]), "above 0"),
        (lambda d, y: Penalty(0.0), "must penalise"),
        (lambda d, y: Penalty(-1.0), "0 or more"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    dictionaries, signals, *_ = planted()
    with pytest.raises(InvalidInput, match=message):
        call(dictionaries, signals)

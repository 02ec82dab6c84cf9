"""The operators against float64, independent formulas and finite differences, in every backend that is built."""

import math
import os
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from hwprune import ops
from hwprune.errors import BackendUnavailable, InvalidInput
from hwprune.ops import _native

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = ["reference", "cpp"]
CUDA = torch.cuda.is_available() and ops.backends()["cuda"] is None
TOLERANCE = 2.0**-16  # of the solver, in units of the sigmoid's argument
property_test = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def ragged(widths, seed=0, dtype=torch.float32, ties=False):
    """theta, importance, offsets and uniforms of groups with these widths."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *widths]).cumsum(0)
    channels = int(offsets[-1])
    theta = 6 * torch.rand(len(widths), generator=generator, dtype=torch.float64) - 3
    importance = torch.randn(channels, generator=generator, dtype=torch.float64).exp()
    if ties:
        importance = importance.round() / 2  # many equal, some zero
    uniforms = torch.rand(channels, generator=generator, dtype=torch.float64)
    # float32 first, so that every dtype sees the same numbers.
    return theta.float().to(dtype), importance.float().to(dtype), offsets, uniforms.float().to(dtype)


@st.composite
def problems(draw):
    widths = draw(st.lists(st.sampled_from([1, 2, 7, 16, 31, 64, 65, 257]), min_size=1, max_size=6))
    temperature = draw(st.sampled_from([0.5, 2.0, 5.0, 20.0, 100.0]))
    return widths, temperature, draw(st.integers(0, 99)), draw(st.booleans())


def forward(problem, backend, dtype=torch.float32):
    widths, temperature, seed, ties = problem
    theta, importance, offsets, uniforms = ragged(widths, seed, dtype, ties)
    return ops.ratio_forward(theta, importance, offsets, temperature, uniforms, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@property_test
@given(problem=problems())
def test_mean_keep_probability_is_the_ratio(backend, problem):
    theta, importance, offsets, uniforms = ragged(problem[0], problem[2], ties=problem[3])
    log_threshold, p, m = ops.ratio_forward(theta, importance, offsets, problem[1], uniforms, backend=backend)
    for group, (start, end) in enumerate(offsets.unfold(0, 2, 1).tolist()):
        # p moves by at most a quarter per unit of the sigmoid's argument, whose rounding grows with its size.
        rounding = 4e-7 * problem[1] * (1 + importance[start:end].clamp_min(1e-38).log().abs().max())
        assert p[start:end].double().mean().sub(theta[group].double().sigmoid()).abs() < TOLERANCE + rounding
    assert log_threshold.isfinite().all()
    assert p.min() >= 0.01 and p.max() <= 1
    assert torch.equal(m, (uniforms < p).float())


@property_test
@given(problem=problems())
def test_cpp_solves_as_accurately_as_plain_torch(problem):
    truth = forward(problem, "reference", torch.float64)
    plain, actual = forward(problem, "reference"), forward(problem, "cpp")
    assert_as_accurate(actual[1], plain[1], truth[1], slack=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keep_probabilities_follow_from_the_threshold(backend):
    theta, importance, offsets, uniforms = ragged([64, 3, 100])
    log_threshold, p, _ = ops.ratio_forward(theta, importance, offsets, 5.0, uniforms, backend=backend)
    per_channel = log_threshold.double().repeat_interleave(offsets.diff())
    expected = 1 / (1 + (per_channel.exp() / importance.double()) ** 5) + 0.01  # as the paper writes it
    torch.testing.assert_close(p.double(), expected.clamp_max(1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tolerance_shrinks_with_the_temperature(backend):
    """A fixed tolerance on the log threshold would miss the ratio by ever more as the sigmoid sharpens."""
    theta, importance, offsets, uniforms = ragged([512] * 8)
    for temperature in (1.0, 10.0, 100.0, 1000.0):
        _, p, _ = ops.ratio_forward(theta, importance, offsets, temperature, uniforms, backend=backend)
        assert (p.view(8, 512).mean(1) - theta.sigmoid()).abs().max() < 3e-5 + 1e-6 * temperature


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_drawn_with_their_probability(backend):
    theta, importance, offsets, _ = ragged([50])
    draws = [ops.ratio_forward(theta, importance, offsets, 2.0, torch.rand(50), backend=backend) for _ in range(2000)]
    frequency = torch.stack([m for _, _, m in draws]).mean(0)
    p = draws[0][1]
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 2000).sqrt() + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_importances_share_the_ratio(backend):
    theta, offsets = torch.tensor([0.3]), torch.tensor([0, 9])
    _, p, _ = ops.ratio_forward(theta, torch.ones(9), offsets, 50.0, torch.rand(9), backend=backend)
    torch.testing.assert_close(p, theta.sigmoid().expand(9), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratios_that_cannot_be_met_stop_at_the_floor(backend):
    theta, offsets = torch.tensor([-9.0, 40.0]), torch.tensor([0, 5, 10])
    _, p, _ = ops.ratio_forward(theta, torch.rand(10), offsets, 8.0, torch.rand(10), backend=backend)
    torch.testing.assert_close(p, torch.tensor([0.01] * 5 + [1.0] * 5), rtol=0, atol=1e-6)


def test_ratio_gradients_agree_with_finite_differences():
    theta, importance, offsets, uniforms = ragged([1, 5, 12], dtype=torch.float64)
    theta.requires_grad_()

    def log_threshold_and_p(theta):
        return ops.ratio_forward(theta, importance, offsets, 3.0, uniforms)[:2]

    assert torch.autograd.gradcheck(log_threshold_and_p, theta, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_gradient_reaches_theta_straight_through(backend):
    theta, importance, offsets, uniforms = ragged([8, 20])
    theta.requires_grad_()
    _, p, m = ops.ratio_forward(theta, importance, offsets, 3.0, uniforms, backend=backend)
    weights = torch.randn_like(p)
    (through_p,) = torch.autograd.grad((weights * p).sum(), theta, retain_graph=True)
    (through_m,) = torch.autograd.grad((weights * m).sum(), theta)
    assert torch.equal(through_p, through_m) and through_p.abs().min() > 0


def step_arguments(widths, temperature=4.0, seed=0, dtype=torch.float32, ties=False):
    """theta, grad_mask, p, offsets, cost_grad, multiplier, exp_avg and exp_avg_sq of a first step."""
    theta, importance, offsets, uniforms = ragged(widths, seed, torch.float32, ties)
    p = ops.ratio_forward(theta, importance, offsets, temperature, uniforms, backend="reference")[1]
    torch.manual_seed(seed)
    grad_mask, cost_grad = torch.randn_like(p), torch.rand_like(theta)
    tensors = [tensor.to(dtype) for tensor in (theta, grad_mask, p, cost_grad, torch.zeros_like(theta))]
    theta, grad_mask, p, cost_grad, zeros = tensors
    return [theta, grad_mask, p, offsets, cost_grad, 0.7, zeros, zeros.clone()]


@property_test
@given(problem=problems())
def test_cpp_steps_as_accurately_as_plain_torch(problem):
    def run(backend, dtype):
        arguments = step_arguments(*problem[:3], dtype=dtype, ties=problem[3])
        grads = [ops.ratio_step(*arguments, step=step, lr=0.05, backend=backend) for step in (1, 2, 3)]
        return [torch.cat(grads), arguments[0], arguments[6], arguments[7]]

    truth, plain, actual = run("reference", torch.float64), run("reference", torch.float32), run("cpp", torch.float32)
    for ours, torchs, exact in zip(actual, plain, truth, strict=True):
        assert_as_accurate(ours, torchs, exact, slack=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratio_gradient_agrees_with_finite_differences(backend):
    """dL/dα of L = Σ c_i p_i(α), by moving every ratio a little and solving again in float64."""
    widths, temperature, small = [4, 33, 7], 6.0, 1e-5
    theta, importance, offsets, uniforms = ragged(widths, seed=3, dtype=torch.float64)
    coefficients = torch.randn(sum(widths), dtype=torch.float64)

    def keep(ratio):
        return ops.ratio_forward(ratio.logit(), importance, offsets, temperature, uniforms)[1]

    ratio = theta.sigmoid()
    change = coefficients * (keep(ratio + small) - keep(ratio - small)) / (2 * small)
    expected = torch.stack([part.sum() for part in change.split(widths)])
    dtype = torch.float32 if backend == "cpp" else torch.float64
    zeros = [torch.zeros(3, dtype=dtype) for _ in range(3)]
    arguments = [tensor.to(dtype) for tensor in (theta, coefficients, keep(ratio))]
    actual = ops.ratio_step(*arguments, offsets, zeros[0], 0.0, *zeros[1:], step=1, lr=0.0, cut=0.0, backend=backend)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_is_torch_adam_on_theta(backend):
    arguments = step_arguments([5, 9, 2])
    twin = arguments[0].clone().requires_grad_()
    adam = torch.optim.Adam([twin], lr=0.03, betas=(0.8, 0.95), eps=1e-6)
    for step in range(1, 6):
        ratio = arguments[0].sigmoid()
        ratio_grad = ops.ratio_step(*arguments, step=step, lr=0.03, betas=(0.8, 0.95), eps=1e-6, backend=backend)
        twin.grad = ratio_grad * ratio * (1 - ratio)
        adam.step()
    torch.testing.assert_close(arguments[0], twin.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_adds_the_gradient_of_the_cost(backend):
    arguments = step_arguments([5, 9, 2])
    with_cost = ops.ratio_step(*arguments, step=1, lr=0.0, backend=backend)
    without = ops.ratio_step(*arguments[:5], 0.0, *arguments[6:], step=1, lr=0.0, backend=backend)
    torch.testing.assert_close(with_cost - without, 0.7 * arguments[4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_below_the_cut_are_not_read(backend):
    arguments = step_arguments([200], temperature=60.0)
    soft = arguments[2] - 0.01
    far = (soft * (1 - soft) <= 1e-3) | (arguments[2] >= 1)
    assert 100 < far.sum() < 200
    before = ops.ratio_step(*arguments, step=1, lr=0.0, cut=1e-3, backend=backend)
    arguments[1][far] = math.nan
    assert torch.equal(ops.ratio_step(*arguments, step=1, lr=0.0, cut=1e-3, backend=backend), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratio_operators_obey_the_rules_of_torch_library(backend):
    theta, importance, offsets, uniforms = ragged([3, 8])
    theta.requires_grad_()
    torch.library.opcheck(torch.ops.hwprune.ratio_forward, (theta, importance, offsets, 2.0, uniforms, backend))
    arguments = (*step_arguments([3, 8]), 1, 0.1, 0.9, 0.999, 1e-8, 1e-4, backend)
    torch.library.opcheck(torch.ops.hwprune.ratio_step, arguments)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_share_the_groups_without_a_trace(threads):
    """Every group is one thread's, so not a bit depends on their number."""
    widths, found = [1, 60_000, 3, 90_000, 9, 50_000], []
    for count in (1, threads):
        torch.set_num_threads(count)
        outputs = forward((widths, 5.0, 0, False), "cpp")
        arguments = step_arguments(widths)
        found.append([*outputs, ops.ratio_step(*arguments, step=1, lr=0.1, backend="cpp"), arguments[0]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_native_loops_run_on_the_threads_that_torch_has():
    """Threads of their own would wait for a core while torch's still spin on it."""
    torch.set_num_threads(2)
    torch.mm(torch.randn(512, 512), torch.randn(512, 512))  # has them started
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.add(len(os.listdir("/proc/self/task")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    while not seen:
        pass
    before = max(seen)
    try:
        for _ in range(50):
            forward(([60_000] * 4, 5.0, 0, False), "cpp")
    finally:
        done.set()
        watcher.join()
    assert max(seen) == before


def test_ratio_operators_compile_into_one_graph():
    def search_step(theta, importance, offsets, uniforms, grad_mask, cost_grad, exp_avg, exp_avg_sq):
        _, p, m = ops.ratio_forward(theta, importance, offsets, 2.0, uniforms)
        grad = ops.ratio_step(theta, grad_mask, p, offsets, cost_grad, 0.5, exp_avg, exp_avg_sq, step=1, lr=0.1)
        return m, grad

    def inputs():
        theta, grad_mask, _, offsets, cost_grad, _, *state = step_arguments([3, 8])
        _, importance, _, uniforms = ragged([3, 8])
        return theta, importance, offsets, uniforms, grad_mask, cost_grad, *state

    eager, compiled = inputs(), inputs()
    expected = search_step(*eager)
    actual = torch.compile(search_step, fullgraph=True, backend="aot_eager")(*compiled)
    for ours, theirs in zip((*actual, *compiled), (*expected, *eager), strict=True):
        assert torch.equal(ours, theirs)


def test_strided_inputs_are_read_by_their_strides():
    theta, importance, offsets, uniforms = ragged([6, 10])
    spaced = torch.full((16, 3), math.nan)
    spaced[:, 1] = importance
    expected = ops.ratio_forward(theta, importance, offsets, 2.0, uniforms, backend="cpp")
    actual = ops.ratio_forward(theta, spaced[:, 1], offsets, 2.0, uniforms, backend="cpp")
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offsets": torch.tensor([0, 3, 12])}, "increase strictly from 0 to 11"),
        ({"offsets": torch.tensor([0, 11, 11])}, "increase strictly from 0 to 11"),
        ({"offsets": torch.tensor([0, 3, 11], dtype=torch.int32)}, r"must be int64 \[3\]"),
        ({"uniforms": torch.rand(10)}, r"uniforms is torch.float32 \[10\]"),
        ({"importance": torch.rand(11, dtype=torch.float64)}, "importance is torch.float64"),
        ({"importance": torch.full((11,), math.nan)}, "finite and at least 0"),
        ({"importance": torch.full((11,), -1.0)}, "finite and at least 0"),
        ({"theta": torch.zeros(2, 1)}, r"theta is torch.float32 \[2, 1\]"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"backend": "fortran"}, "auto, reference, cpp, triton, cuda"),
    ],
)
def test_ratio_forward_says_what_is_wrong(change, message):
    theta, importance, offsets, uniforms = ragged([3, 8])
    arguments = {
        "theta": theta, "importance": importance, "offsets": offsets, "temperature": 2.0, "uniforms": uniforms,
    }  # fmt: skip
    with pytest.raises(InvalidInput, match=message):
        ops.ratio_forward(**(arguments | change))


def test_steps_count_from_one():
    with pytest.raises(InvalidInput, match="step=0 must be at least 1"):
        ops.ratio_step(*step_arguments([3]), step=0, lr=0.1)


def test_a_forced_backend_refuses_with_its_cause(monkeypatch):
    theta, importance, offsets, uniforms = ragged([3], dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="backend=cpp cannot run ratio_forward: it takes float32 on cpu"):
        ops.ratio_forward(theta, importance, offsets, 2.0, uniforms, backend="cpp")
    monkeypatch.setenv("HWPRUNE_BACKEND", "cpp")
    with pytest.raises(BackendUnavailable, match="HWPRUNE_BACKEND=cpp cannot run ratio_forward"):
        ops.ratio_forward(theta, importance, offsets, 2.0, uniforms)
    ops.ratio_forward(theta, importance, offsets, 2.0, uniforms, backend="reference")  # an argument outranks it


def test_backends_are_listed_with_their_cause():
    found = ops.backends()
    assert list(found) == ["reference", "cpp", "triton", "cuda"]
    assert found["reference"] is None and found["cpp"] is None
    assert CUDA or found["cuda"]


@pytest.mark.skipif(_native.missing("cuda") is not None, reason="hwprune._cuda is not built: there was no nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to launch on")
def test_a_launch_without_a_device_raises():
    with pytest.raises(RuntimeError, match="ratio_forward with 1 groups: "):
        _native.module("cuda").ratio_forward(0, 0, 0, 0, 0, 0, 0, groups=1, temperature=1.0, seed=0, stream=0)


@pytest.mark.skipif(not CUDA, reason="no CUDA device, or hwprune._cuda is not built")
@pytest.mark.parametrize("widths", [[1], [7, 1, 300], [2048] * 4, [16, 32, 64] * 20])
@pytest.mark.parametrize("temperature", [1.0, 20.0, 100.0])
def test_cuda_solves_as_accurately_as_plain_torch(widths, temperature):
    truth = forward((widths, temperature, 0, False), "reference", torch.float64)
    plain = forward((widths, temperature, 0, False), "reference")
    theta, importance, offsets, uniforms = (tensor.cuda() for tensor in ragged(widths))
    _, p, m = ops.ratio_forward(theta, importance, offsets, temperature, uniforms, backend="cuda")
    assert_as_accurate(p.cpu(), plain[1], truth[1], slack=TOLERANCE)
    assert torch.equal(m, (uniforms < p).float())

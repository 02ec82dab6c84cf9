"""The keep-ratio operators in every backend: C++, Triton (interpreted where there is no device) and CUDA."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ratio_update_law import (
    SLICED_WIDTHS,
    STEP_WIDTHS,
    WIDTHS,
    check_forward,
    check_seed,
    check_slices,
    check_step,
    model_of,
    ragged,
    step_arguments,
)
from tolerance import assert_as_accurate

from hwprune import ops
from hwprune.errors import InvalidInput
from hwprune.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")

AVAILABLE = [name for name, cause in ops.backends().items() if cause is None and name != "reference"]
DEVICE = {"cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu", "cuda": "cuda"}
property_test = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_philox_gives_its_published_numbers():
    """The first known answers of Random123: counter and key 0, and all bits set in the low half of the key's space."""
    first = (ops.philox_uniforms(0, 4).double() * 2**24).long().tolist()
    assert first == [0x6627E8D5 >> 8, 0xE169C58D >> 8, 0xBC57AC4C >> 8, 0x9B00DBD8 >> 8]
    long = ops.philox_uniforms(2**64 - 1, 40_000)
    assert torch.equal(long[:10], ops.philox_uniforms(-1, 10))  # the same 64 bits
    assert long.min() >= 0 and long.max() < 1 and (long.mean() - 0.5).abs() < 0.01
    assert not torch.equal(long[:8], ops.philox_uniforms(2**32 - 1, 8))  # the upper half of the key counts


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**40 + 7, 2**64 - 1])
def test_a_seed_draws_the_same_bits_in_every_backend(backend, seed):
    check_seed(partial(ops.ratio_forward, backend=backend), seed, DEVICE[backend])


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_forward_is_as_accurate_as_plain_torch(backend, widths, temperature):
    check_forward(partial(ops.ratio_forward, backend=backend), widths, temperature, DEVICE[backend])


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("widths", STEP_WIDTHS, ids=str)
def test_priced_step_is_as_accurate_as_plain_torch(backend, widths):
    check_step(partial(ops.ratio_step_priced, backend=backend), widths, device=DEVICE[backend])


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("widths", SLICED_WIDTHS, ids=str)
def test_arrays_may_begin_at_any_address(backend, widths):
    operators = (partial(operator, backend=backend) for operator in (ops.ratio_forward, ops.ratio_step_priced))
    check_slices(*operators, widths, DEVICE[backend])


@property_test
@given(st.lists(st.integers(1, 70), min_size=2, max_size=6), st.integers(0, 99))
def test_cpp_steps_as_accurately_on_any_cost(widths, seed):
    check_step(partial(ops.ratio_step_priced, backend="cpp"), widths, seed)


@pytest.mark.parametrize("backend", ["reference", *AVAILABLE])
def test_a_priced_step_is_the_step_with_that_gradient(backend):
    theta, grad_mask, p, offsets, tables, *state = step_arguments([5, 64, 9], device=DEVICE.get(backend, "cpu"))
    other = theta.clone(), *(tensor.clone() for tensor in state)
    options = {"step": 4, "lr": 0.1, "cut": 1e-3, "backend": backend}
    ratio_grad, cost, cost_grad = ops.ratio_step_priced(
        theta, grad_mask, p, offsets, tables, 0.5, 2.0, *state, **options
    )
    weight = 0.5 + 2.0 * float(cost)
    expected = ops.ratio_step(other[0], grad_mask, p, offsets, cost_grad, weight, *other[1:], **options)
    torch.testing.assert_close(ratio_grad, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theta, other[0], rtol=1e-5, atol=1e-5)
    assert cost_grad.abs().min() > 0


@property_test
@given(st.integers(2, 5), st.integers(0, 99))
def test_tables_are_the_cost_model(groups, seed):
    model = model_of(groups, seed)
    ratio = torch.rand(groups, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    value, gradient = model.value_and_grad(ratio * torch.from_numpy(model.full))
    cost, by_ratio = reference.table_cost(ratio, model.tables(dtype=torch.float64))
    torch.testing.assert_close(cost * model.dense, torch.tensor(value, dtype=torch.float64))
    torch.testing.assert_close(by_ratio * model.dense, gradient * torch.from_numpy(model.full))


def test_the_gradient_of_the_cost_is_its_derivative():
    tables = model_of(4).tables(dtype=torch.float64)
    ratio = torch.tensor([0.9, 0.6, 0.7, 0.8], dtype=torch.float64, requires_grad=True)
    cost, gradient = reference.table_cost(ratio, tables)
    torch.testing.assert_close(torch.autograd.grad(cost, ratio)[0], gradient.detach())


@pytest.mark.parametrize("backend", ["reference", *AVAILABLE])
def test_seeded_and_priced_operators_obey_the_rules_of_torch_library(backend):
    device = DEVICE.get(backend, "cpu")
    theta, importance, offsets, _ = (tensor.to(device) for tensor in ragged([3, 8]))
    theta.requires_grad_()
    torch.library.opcheck(torch.ops.hwprune.ratio_forward, (theta, importance, offsets, 2.0, None, backend, 7))
    theta, grad_mask, p, offsets, tables, *state = step_arguments([3, 8], device=device)
    adam = 1, 0.1, 0.9, 0.999, 1e-8, 1e-4, backend
    arguments = (theta, grad_mask, p, offsets, list(tables), 0.5, 0.1, *state, *adam)
    torch.library.opcheck(torch.ops.hwprune.ratio_step_priced, arguments)
    arguments = (theta, grad_mask, p, offsets, torch.rand_like(theta), 0.5, *state, *adam)
    torch.library.opcheck(torch.ops.hwprune.ratio_step, arguments)


@pytest.mark.parametrize("backend", ["reference", *AVAILABLE])
def test_gradients_reach_theta_through_every_backend(backend):
    device = DEVICE.get(backend, "cpu")
    upstream = torch.randn(33, device=device)

    def gradient(backend, dtype):
        theta, importance, offsets, uniforms = ragged([8, 25])
        leaf = theta.to(device, dtype).requires_grad_()
        flat = importance.to(device, dtype), offsets.to(device), 3.0, uniforms.to(device, dtype)
        log_threshold, p, mask = ops.ratio_forward(leaf, *flat, backend=backend)
        loss = (upstream.to(dtype) * (p + mask)).sum() + log_threshold.sum()
        return torch.autograd.grad(loss, leaf)[0].cpu()

    plain, truth = (gradient("reference", dtype) for dtype in (torch.float32, torch.float64))
    assert_as_accurate(gradient(backend, torch.float32), plain, truth, slack=1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference", *AVAILABLE])
def test_seeded_and_priced_operators_compile_into_one_graph(backend):
    device, adam = DEVICE.get(backend, "cpu"), {"step": 1, "lr": 0.1, "backend": backend}

    def search_step(theta, importance, offsets, grad_mask, tables, *state):
        _, p, mask = ops.ratio_forward(theta, importance, offsets, 2.0, seed=11, backend=backend)
        return mask, *ops.ratio_step_priced(theta, grad_mask, p, offsets, tables, 0.3, 0.5, *state, **adam)

    def inputs():
        theta, grad_mask, _, offsets, tables, *state = step_arguments([3, 8], device=device)
        return theta, ragged([3, 8])[1].to(device), offsets, grad_mask, tables, *state

    eager, compiled = inputs(), inputs()
    expected = search_step(*eager)
    actual = torch.compile(search_step, fullgraph=True, backend="aot_eager")(*compiled)
    updated = zip((compiled[0], *compiled[5:]), (eager[0], *eager[5:]), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in (*zip(actual, expected, strict=True), *updated))


@pytest.mark.parametrize("uniforms, seed", [(None, None), (torch.rand(4), 3)])
def test_masks_need_one_source_of_randomness(uniforms, seed):
    theta, importance, offsets, _ = ragged([4])
    with pytest.raises(InvalidInput, match="either uniforms or a seed"):
        ops.ratio_forward(theta, importance, offsets, 2.0, uniforms, seed=seed)


def test_a_seed_has_64_bits():
    theta, importance, offsets, _ = ragged([4])
    with pytest.raises(InvalidInput, match="must fit in 64 bits"):
        ops.ratio_forward(theta, importance, offsets, 2.0, seed=2**64)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("flat", lambda t: t.double(), r"tables.flat is torch.float64 \[\d+\] on cpu; it must be torch.float32"),
        ("uses", lambda t: t[:1], r"tables.uses is torch.int64 \[1, \d+\] on cpu; it must be torch.int64 \[3, "),
        ("pair", lambda t: t.T.contiguous().T, r"tables.pair must be contiguous"),
    ],
)
def test_tables_that_do_not_fit_are_named(name, change, message):
    theta, grad_mask, p, offsets, tables, *state = step_arguments([5, 6, 7])
    tables = tables._replace(**{name: change(getattr(tables, name))})
    with pytest.raises(InvalidInput, match=message):
        ops.ratio_step_priced(theta, grad_mask, p, offsets, tables, 0.0, 0.0, *state, step=1, lr=0.1)

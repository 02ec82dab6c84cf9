"""Inputs and checks that every backend of the keep-ratio operators shares."""

import numpy as np
import torch
from tolerance import assert_as_accurate

from hwprune import ops
from hwprune.latency.model import CostAxis, CostModel, CostTerm

TOLERANCE = 2.0**-16  # of the solver, in units of the sigmoid's argument
# Beyond 2048 channels the kernels leave their registers; groups begin at multiples of 4 or not.
WIDTHS = [[1], [3, 5, 1, 7], [64] * 3, [2048, 16], [2049, 300], [5003, 2, 4096]]
STEP_WIDTHS = [[1, 2], [3, 5, 1, 7], [5003, 2, 1024], [16, 24] * 20]
SLICED_WIDTHS = [[4, 8], [2048, 16]]  # multiples of four, so that only the arrays' own addresses are odd


def ragged(widths, seed=0):
    """theta, importance, offsets and uniforms of groups with these widths, in float32; some importances are 0."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *widths]).cumsum(0)
    importance = torch.randn(int(offsets[-1]), generator=generator).exp()
    importance[torch.rand(importance.shape, generator=generator) < 0.02] = 0
    theta = 6 * torch.rand(len(widths), generator=generator) - 3
    return theta, importance, offsets, torch.rand(importance.shape, generator=generator)


def model_of(groups, seed=0):
    """A cost over single groups, a pair and a concatenation of all, with terms of no axis, one axis and two."""
    draw = np.random.default_rng(seed)
    full = draw.integers(4, 40, groups)
    members = [[g] for g in range(groups)] + [[0, groups - 1], list(range(groups))]
    axes = []
    for used in members:
        weights = draw.integers(1, 4, len(used))
        offset, most = int(draw.integers(0, 9)), int(weights @ full[used])
        knots = np.unique(np.append(draw.integers(1, most, 5), [1, most])) + offset
        axes.append(CostAxis(np.array(used), weights, offset, knots))
    pairs = [(), (0,), (groups + 1,), *((a, (a + 1) % len(axes)) for a in range(len(axes)))]
    terms = []
    for pair in pairs:
        shape = tuple(len(axes[a].knots) for a in pair)
        table = draw.random(shape) + 0.1
        for dim in range(len(shape)):
            table = table.cumsum(dim)
        terms.append(CostTerm("term", pair, table))
    return CostModel("ms", full, tuple(axes), tuple(terms), scale=1.1, offset=0.3)


def step_arguments(widths, seed=0, dtype=torch.float32, device="cpu"):
    """theta, grad_mask, p, offsets, the tables of a cost, and Adam's two states."""
    theta, importance, offsets, uniforms = ragged(widths, seed)
    p = ops.ratio_forward(theta, importance, offsets, 5.0, uniforms, backend="reference")[1]
    generator = torch.Generator().manual_seed(seed)
    grad_mask = torch.randn(p.shape, generator=generator)
    tensors = [t.to(device, dtype) for t in (theta, grad_mask, p, torch.zeros_like(theta), torch.zeros_like(theta))]
    # float32 first, so that every dtype sees the same numbers.
    tables = model_of(len(widths), seed).tables()
    tables = ops.CostTables(*(t.to(device, dtype if t.is_floating_point() else t.dtype) for t in tables))
    return [*tensors[:3], offsets.to(device), tables, *tensors[3:]]


def three_steps(step, widths, seed=0, dtype=torch.float32, device="cpu"):
    """What `step`, called as ops.ratio_step_priced, returns in three steps and what it leaves in theta and Adam's."""
    theta, grad_mask, p, offsets, tables, *state = step_arguments(widths, seed, dtype, device)
    outputs = []
    for number in (1, 2, 3):
        outputs += step(theta, grad_mask, p, offsets, tables, 0.4, 0.7, *state, step=number, lr=0.05)
    joined = [torch.cat([out.reshape(-1) for out in outputs[i::3]]) for i in range(3)]
    return [tensor.cpu() for tensor in (*joined, theta, *state)]


def check_forward(forward, widths, temperature, device="cpu"):
    """`forward`, called as ops.ratio_forward, is as accurate as plain torch."""
    inputs = ragged(widths)
    theta, importance, offsets, uniforms = inputs
    truth = ops.ratio_forward(
        theta.double(), importance.double(), offsets, temperature, uniforms.double(), backend="reference"
    )
    plain = ops.ratio_forward(theta, importance, offsets, temperature, uniforms, backend="reference")
    theta, importance, offsets, uniforms = (tensor.to(device) for tensor in inputs)
    log_threshold, p, mask = forward(theta, importance, offsets, temperature, uniforms)
    assert_as_accurate(p.cpu(), plain[1], truth[1], slack=TOLERANCE)
    # Where no channel is between kept and dropped, every threshold of an interval solves; p says which are the same.
    assert log_threshold.isfinite().all()
    assert torch.equal(mask, (uniforms < p).float())


def check_seed(forward, seed, device="cpu"):
    """The masks of a seed are those of its uniform numbers."""
    theta, importance, offsets, _ = (tensor.to(device) for tensor in ragged([3, 2050, 7, 18, 4]))
    _, p, mask = forward(theta, importance, offsets, 3.0, seed=seed)
    assert torch.equal(mask.cpu(), (ops.philox_uniforms(seed, len(p)) < p.cpu()).float())


def check_step(step, widths, seed=0, device="cpu"):
    """`step`, called as ops.ratio_step_priced, is as accurate as plain torch."""

    def reference(*arguments, **options):
        return ops.ratio_step_priced(*arguments, **options, backend="reference")

    truth = three_steps(reference, widths, seed, torch.float64)
    plain, actual = three_steps(reference, widths, seed), three_steps(step, widths, seed, device=device)
    for ours, torchs, exact in zip(actual, plain, truth, strict=True):
        assert_as_accurate(ours, torchs, exact, slack=1e-6)


def check_slices(forward, step, widths, device="cpu"):
    """Arrays that begin one number past an aligned address give what others give."""

    def sliced(tensor):
        return torch.cat([tensor.new_full((1,), torch.nan), tensor])[1:]

    theta, importance, offsets, uniforms = (tensor.to(device) for tensor in ragged(widths))
    expected = forward(theta, importance, offsets, 5.0, uniforms)
    found = forward(theta, sliced(importance), offsets, 5.0, sliced(uniforms))
    assert all(map(torch.equal, found, expected))

    theta, grad_mask, p, offsets, tables, *state = step_arguments(widths, device=device)
    twin, *twins = (tensor.clone() for tensor in (theta, *state))
    expected = step(theta, grad_mask, p, offsets, tables, 0.4, 0.7, *state, step=1, lr=0.1)
    found = step(twin, sliced(grad_mask), sliced(p), offsets, tables, 0.4, 0.7, *twins, step=1, lr=0.1)
    assert all(map(torch.equal, (*found, twin, *twins), (*expected, theta, *state)))

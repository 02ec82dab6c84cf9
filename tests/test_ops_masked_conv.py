"""The masked convolution and its BatchNorm against float64, torch's own formulas and finite differences."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate, relative_rms
from torch import nn

from hwprune import ops
from hwprune.errors import BackendUnavailable, InvalidInput
from hwprune.ops import _cpp_conv, _cuda_conv

pytestmark = pytest.mark.usefixtures("poisoned")

AVAILABLE = [name for name, cause in ops.backends().items() if cause is None]
DEVICE = dict.fromkeys(("triton", "cuda"), "cuda" if torch.cuda.is_available() else "cpu")  # of others, the CPU
ACTIVATIONS = ["none", "relu", "relu6", "silu", "gelu"]
SUM_SLACK = 1e-4  # of sums over pixels, which may cancel to next to nothing, in another order than torch's
SLACK = 1e-6  # of scale and shift applied in another order
property_test = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def convolution(dtype=torch.float64, groups=1, seed=0):
    """x, weight and the epilogue's tensors of a small convolution; masks hold zeros, ones and what lies between."""
    torch.manual_seed(seed)
    options = {"dtype": dtype}
    x, weight = torch.randn(2, 6, 5, 7, **options), torch.randn(8, 6 // groups, 3, 3, **options)
    epilogue = {
        "in_mask": torch.tensor([1, 0, 0.5, 1, 0, 0.25], **options),
        "out_mask": torch.tensor([0, 1, 1, 0.5, 0, 1, 0.75, 1], **options),
        "scale": torch.randn(8, **options),
        "shift": torch.randn(8, **options),
        "residual": torch.randn(2, 8, 3, 4, **options),
    }
    return x, weight, epilogue, {"stride": 2, "padding": 1, "groups": groups}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu", "gelu"])
def test_masked_conv2d_is_its_formula(act, groups):
    x, weight, given, geometry = convolution(groups=groups)
    actual = ops.masked_conv2d(x, weight, **given, act=act, **geometry)
    per_channel = {name: value.view(1, -1, 1, 1) for name, value in given.items() if name != "residual"}
    y = F.conv2d(x * per_channel["in_mask"], weight, **geometry) * per_channel["scale"] + per_channel["shift"]
    y = y * per_channel["out_mask"] + given["residual"]
    torch.testing.assert_close(actual, y if act == "none" else getattr(F, act)(y))


def test_masked_conv2d_of_zeros_and_ones_is_the_smaller_convolution():
    x, weight, _, _ = convolution()
    ins, outs = torch.tensor([0, 3, 5]), torch.tensor([1, 2, 7])
    in_mask, out_mask = torch.zeros(6).index_fill(0, ins, 1), torch.zeros(8).index_fill(0, outs, 1)
    y = ops.masked_conv2d(x, weight, in_mask=in_mask, out_mask=out_mask, padding=(1, 0), dilation=(1, 2))
    small = F.conv2d(x[:, ins], weight[outs][:, ins], padding=(1, 0), dilation=(1, 2))
    torch.testing.assert_close(y[:, outs], small)
    assert y[:, out_mask == 0].eq(0).all()


def test_masked_channels_are_neither_read_nor_given_gradients():
    x, weight, given, geometry = convolution()
    x[:, given["in_mask"] == 0] = math.nan
    given["shift"][given["out_mask"] == 0] = math.nan
    leaves = [x, weight, *given.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    y = ops.masked_conv2d(x, weight, **given, act="relu", **geometry)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert y.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    grad_x, _, grad_in_mask, grad_out_mask, *_ = grads
    assert grad_x[:, given["in_mask"] == 0].eq(0).all()
    assert grad_in_mask[given["in_mask"] == 0].eq(0).all() and grad_out_mask[given["out_mask"] == 0].eq(0).all()


def assert_gradients_are_differences(operator, tensors, **options):
    """Of `operator` at float64 tensors, given by name."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]
    assert all(leaf.dtype == torch.float64 for leaf in leaves)

    def positional(*leaves):
        return operator(**dict(zip(tensors, leaves, strict=True)), **options)

    assert torch.autograd.gradcheck(positional, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", ["masks", "groups", "columns", "statistics", "statistics of columns"])
def test_masked_conv2d_gradients_agree_with_finite_differences(kind):
    x, weight, given, geometry = convolution(groups=2 if kind == "groups" else 1)
    for name in ("in_mask", "out_mask"):
        given[name] = given[name].clamp_min(0.125)  # at 0 the operator skips, on purpose
    given["residual"] = given["residual"][:1, :, :2, :2]
    if "columns" in kind:
        del given["in_mask"]
        geometry["columns"] = torch.arange(0, 54, 4)
    if "statistics" in kind:
        given = {name: mask for name, mask in given.items() if name == "in_mask"}  # out_mask does not scale
    options = {"stats": True} if "statistics" in kind else {"act": "silu"}
    tensors = {"x": x[:1, :, :3, :3], "weight": weight, **given}
    assert_gradients_are_differences(ops.masked_conv2d, tensors, **geometry, **options)


@pytest.mark.parametrize("act", ["none", "silu"])
def test_batch_norms_gradients_agree_with_finite_differences(act):
    _, _, given, _ = convolution()
    y = torch.randn_like(given["residual"]) + 0.5
    tensors = {"x": y, "sums": y.sum((0, 2, 3)), "squares": y.square().sum((0, 2, 3)), "weight": given["scale"]}
    tensors |= {"bias": given["shift"], "mask": given["out_mask"].clamp_min(0.125), "residual": given["residual"]}
    assert_gradients_are_differences(ops.masked_bn_act, tensors, act=act)


def test_columns_are_numbered_by_row_column_channel():
    x, weight, _, _ = convolution()
    kept = [(0, 0, 0), (0, 2, 4), (1, 1, 1), (2, 0, 5), (2, 2, 3)]
    columns = torch.tensor([(row * 3 + column) * 6 + channel for row, column, channel in kept])
    sparse = torch.zeros_like(weight)
    for row, column, channel in kept:
        sparse[:, channel, row, column] = weight[:, channel, row, column]
    torch.testing.assert_close(ops.masked_conv2d(x, weight, columns=columns), F.conv2d(x, sparse))


def test_empty_batches_and_single_channels_pass():
    assert ops.masked_conv2d(torch.rand(0, 3, 4, 4), torch.rand(5, 3, 3, 3)).shape == (0, 5, 2, 2)
    y = ops.masked_conv2d(torch.rand(1, 1, 1, 1), torch.rand(1, 1, 1, 1), out_mask=torch.zeros(1))
    assert y.eq(0).all()


@pytest.mark.parametrize("act", ["none", "relu"])
def test_statistics_and_second_pass_are_batch_norm(act):
    x, weight, given, geometry = convolution()
    gamma, beta, mask, residual = (given[name] for name in ("scale", "shift", "out_mask", "residual"))
    for leaf in (x, weight, gamma, beta, mask, residual):
        leaf.requires_grad_()
    stats = ops.masked_conv2d(x, weight, out_mask=mask, stats=True, **geometry)
    actual, mean, var = ops.masked_bn_act(*stats, gamma, beta, mask=mask, residual=residual, act=act)

    raw = F.conv2d(x, weight, **geometry)
    normalised = F.batch_norm(raw, None, None, gamma, beta, training=True)
    expected = mask.view(1, -1, 1, 1) * normalised + residual
    expected = expected.relu() if act == "relu" else expected
    torch.testing.assert_close(actual, expected)
    active = mask != 0
    torch.testing.assert_close(mean[active], raw.mean((0, 2, 3))[active])
    torch.testing.assert_close(var[active], raw.var((0, 2, 3), correction=0)[active])
    upstream = torch.randn_like(actual)
    leaves = (x, weight, gamma, beta, residual)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, upstream, retain_graph=True),
        torch.autograd.grad(expected, leaves, upstream, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    (grad_mask,) = torch.autograd.grad(actual, mask, upstream)
    (grad_expected,) = torch.autograd.grad(expected, mask, upstream)
    torch.testing.assert_close(grad_mask, torch.where(active, grad_expected, 0))


def test_statistics_are_summed_in_float32():
    x = torch.full((1, 1, 64, 64), 7.0, dtype=torch.bfloat16)
    raw, sums, squares = ops.masked_conv2d(x, torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), stats=True)
    assert raw.dtype == torch.bfloat16 and sums.item() == 7 * 4096 and squares.item() == 49 * 4096


@pytest.mark.parametrize(
    "change, message",
    [
        ({"groups": 2}, r"x \[2, 6, 5, 7\] and weight \[8, 6, 3, 3\] with groups=2 do not fit"),
        ({"in_mask": torch.ones(5)}, r"in_mask has shape \[5\]; it must be \[6\]"),
        ({"act": "tanh"}, "act='tanh' is unknown; there are none, relu, relu6, silu, gelu"),
        ({"columns": torch.tensor([3, 2])}, "increase strictly within 0 to 53"),
        ({"columns": torch.tensor([54])}, "increase strictly within 0 to 53"),
        ({"columns": torch.tensor([1]), "in_mask": torch.ones(6)}, "columns replace an input mask"),
        ({"columns": torch.tensor([1], device="meta")}, r"\[1\] on meta; it must be int64 \[K\] on cpu"),
        ({"stats": True, "act": "relu"}, "stats=True excludes"),
        ({"weight": torch.rand(8, 6, 3, 3)}, "weight is torch.float32"),
        ({"residual": torch.rand(2, 8, 3, 1)}, r"it must be torch.float64 \[2, 8, 3, 5\]"),
        ({"dilation": 9}, r"would be \[2, 8, -13, -11\]"),
    ],
)
def test_masked_conv2d_says_what_is_wrong(change, message):
    x, weight, _, _ = convolution()
    with pytest.raises(InvalidInput, match=message):
        ops.masked_conv2d(**({"x": x, "weight": weight} | change))


@st.composite
def problems(draw):
    """Tensors and options of a masked convolution, in float32; sizes small, odd, empty; masks of all kinds."""
    torch.manual_seed(draw(st.integers(0, 999)))
    groups, by_columns = draw(st.sampled_from([1, 1, 2, 3, "depthwise"])), draw(st.booleans())
    cin, cout = draw(st.sampled_from([1, 2, 5, 16, 17])), draw(st.sampled_from([1, 3, 16, 19]))
    if groups == "depthwise":
        groups = cout = cin
    elif groups > 1:  # widths around those that kept counts are rounded up to
        cin, cout = groups * draw(st.sampled_from([1, 3, 10, 18])), groups * draw(st.sampled_from([1, 2, 9, 17]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3)]))
    geometry = {
        "stride": draw(st.sampled_from([1, 2, (2, 1)])),
        "padding": draw(st.sampled_from([0, 1, (2, 0)])),
        "dilation": draw(st.sampled_from([1, (2, 1)])),
        "groups": groups,
    }
    batch, height, width = draw(st.sampled_from([0, 1, 3])), draw(st.integers(5, 9)), draw(st.integers(4, 70))
    x = torch.randn(batch, cin, height, width)
    layout = draw(st.sampled_from(["nchw", "nhwc", "sliced"]))
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn(batch, cin + 2, height, width + 1)[:, 1:-1, :, 1:]
    weight = torch.randn(cout, cin // groups, *kernel)
    weight = weight.contiguous(memory_format=draw(st.sampled_from([torch.contiguous_format, torch.channels_last])))
    tensors = {"x": x, "weight": weight}

    def mask(channels):
        kind = draw(st.sampled_from(["absent", "zeros", "ones", "soft", "hard", "mixed", "run"]))
        soft, hard = torch.rand(channels) * 0.9 + 0.1, (torch.rand(channels) < 0.5).float()
        run = (torch.arange(channels) < channels // 3).float()  # with groups, some of them whole
        kinds = {"zeros": 0 * soft, "ones": torch.ones(channels), "soft": soft, "hard": hard, "mixed": soft * hard}
        kinds["run"] = run
        return kinds.get(kind)

    if by_columns and groups == 1:
        count = cin * kernel[0] * kernel[1]
        geometry["columns"] = torch.randperm(count)[: draw(st.integers(0, count))].sort().values
    else:
        tensors["in_mask"] = mask(cin)
    tensors["out_mask"] = mask(cout)
    y = F.conv2d(x, tensors["weight"], None, *list(geometry.values())[:4])
    extras = {"scale": torch.randn(cout), "shift": torch.randn(cout), "residual": torch.randn_like(y)}
    tensors |= {name: value for name, value in extras.items() if draw(st.booleans())}
    given = {name: value for name, value in tensors.items() if value is not None}
    return given, geometry | {"act": draw(st.sampled_from(ACTIVATIONS))}


def results(operator, tensors, dtype, *, backend, **options):
    """What an operator returns and the gradients of all its tensors, by name."""
    device = DEVICE.get(backend, "cpu")
    leaves = {name: value.to(device, dtype, copy=True).requires_grad_() for name, value in tensors.items()}
    options = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    outputs = operator(**leaves, **options, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    differentiable = [out for out in outputs if out.requires_grad]
    upstream = [
        (1.5 + torch.linspace(1, 7, out.numel(), dtype=dtype).cos()).view(out.shape).to(device)
        for out in differentiable
    ]
    grads = torch.autograd.grad(differentiable, list(leaves.values()), upstream, allow_unused=True)
    named = {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {name: out.detach().cpu() for name, out in {**dict(zip("012", outputs, strict=False)), **named}.items()}


def assert_backend_accurate(operator, tensors, backend, **options):
    truth = results(operator, tensors, torch.float64, backend="reference", **options)
    plain = results(operator, tensors, torch.float32, backend="reference", **options)
    actual = results(operator, tensors, torch.float32, backend=backend, **options)
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        assert value.shape == truth[name].shape, name
        assert_as_accurate(value, plain[name], truth[name], slack=SLACK if name == "0" else SUM_SLACK)


@property_test
@given(problem=problems())
def test_cpp_is_as_accurate_as_plain_torch(problem):
    tensors, options = problem
    assert_backend_accurate(ops.masked_conv2d, tensors, "cpp", **options)
    with torch.no_grad():  # folds scale and shift into the weight
        truth, plain, actual = (
            ops.masked_conv2d(**{name: value.to(dtype) for name, value in tensors.items()}, **options, backend=backend)
            for dtype, backend in (
                (torch.float64, "reference"),
                (torch.float32, "reference"),
                (torch.float32, "cpp"),
            )
        )
    assert_as_accurate(actual, plain, truth, slack=SLACK)


@property_test
@given(problem=problems())
def test_cpp_statistics_and_second_pass_are_as_accurate_as_plain_torch(problem):
    tensors, options = problem
    kept = {name: value for name, value in tensors.items() if name in ("x", "weight", "in_mask", "out_mask")}
    act = options.pop("act")
    assert_backend_accurate(ops.masked_conv2d, kept, "cpp", stats=True, **options)
    x = ops.masked_conv2d(**kept, **options, backend="reference")
    if x.numel() == 0:
        return
    wide = x.double()
    second = {
        "x": x,
        "sums": wide.sum((0, 2, 3)).float(),
        "squares": (wide.square().sum((0, 2, 3)) + x[:, 0].numel()).float(),  # no variance near 0, where all is noise
        "weight": torch.randn(x.shape[1]),
        "bias": torch.randn(x.shape[1]),
    }
    second |= {"mask": kept["out_mask"]} if "out_mask" in kept else {}
    second |= {"residual": tensors["residual"]} if "residual" in tensors else {}
    assert_backend_accurate(ops.masked_bn_act, second, "cpp", act=act)


@pytest.mark.parametrize("kind", ["masks", "groups", "depthwise", "few columns", "many columns"])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_every_backend_differentiates_as_accurately_as_plain_torch(backend, kind):
    groups = {"groups": 2, "depthwise": 6}.get(kind, 1)
    x, weight, given, geometry = convolution(torch.float32, groups)
    if groups == 6:
        weight = weight[:6]
        given = {name: value[:, :6] if value.dim() == 4 else value[:6] for name, value in given.items()}
    if "columns" in kind:
        del given["in_mask"]
        geometry["columns"] = torch.arange(54)[:: 5 if kind == "few columns" else 2]  # a view with gaps
    tensors = {"x": x, "weight": weight}
    assert_backend_accurate(ops.masked_conv2d, tensors | given, backend, act="silu", **geometry)
    masks = {name: value for name, value in given.items() if name.endswith("mask")}
    assert_backend_accurate(ops.masked_conv2d, tensors | masks, backend, stats=True, **geometry)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_every_backend_differentiates_batch_norm_as_accurately_as_plain_torch(backend):
    _, _, given, _ = convolution(torch.float32)
    y = torch.randn_like(given["residual"])
    tensors = {"x": y, "sums": y.sum((0, 2, 3)), "squares": y.square().sum((0, 2, 3)), "weight": given["scale"]}
    tensors |= {"bias": given["shift"], "mask": given["out_mask"], "residual": given["residual"]}
    assert_backend_accurate(ops.masked_bn_act, tensors, backend, act="gelu")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_threads_share_the_work_without_a_trace(threads, form):
    """Large enough that every native loop starts threads."""
    x, weight = torch.randn(7, 40, 37, 31).contiguous(memory_format=form), torch.randn(48, 40, 3, 3)
    masks = {"in_mask": (torch.rand(40) < 0.5) * torch.rand(40), "out_mask": (torch.rand(48) < 0.5) * torch.rand(48)}
    torch.set_num_threads(threads)
    for extra in ({"act": "relu", **masks}, {"columns": torch.randperm(360)[:90].sort().values}):
        tensors = {"x": x, "weight": weight, "scale": torch.randn(48), "shift": torch.randn(48)}
        tensors |= {name: value for name, value in extra.items() if name.endswith("mask")}
        options = {name: value for name, value in extra.items() if not name.endswith("mask")}
        assert_backend_accurate(ops.masked_conv2d, tensors, "cpp", padding=1, **options)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_registers_of_every_width_give_the_same(lanes, form, monkeypatch):
    """And so do odd sizes beyond a block of pixels, a panel of outputs and a piece of the weight's rows."""
    monkeypatch.setattr(_cpp_conv, "_LANES", lanes)  # a processor without so many has the widest of its own
    ins, outs = 109, 77
    x = torch.randn(3, ins, 9, 11).contiguous(memory_format=form)
    weight = torch.randn(outs, ins, 3, 3).contiguous(memory_format=form)
    residual = torch.randn(3, outs, 9, 11).contiguous(memory_format=form)
    masks = {"in_mask": (torch.rand(ins) < 0.7).float(), "out_mask": (torch.rand(outs) < 0.7) * torch.rand(outs)}
    tensors = {"x": x, "weight": weight, "residual": residual, "scale": torch.randn(outs)}
    assert_backend_accurate(ops.masked_conv2d, tensors | masks, "cpp", padding=1, act="relu")
    columns = torch.cat([torch.randperm(4 * ins)[:150], 8 * ins + torch.randperm(40)[:7]]).sort().values
    assert_backend_accurate(ops.masked_conv2d, tensors, "cpp", padding=1, columns=columns)
    assert_backend_accurate(ops.masked_conv2d, {"x": x, "weight": weight}, "cpp", padding=1, stats=True)


@pytest.mark.parametrize("kept", [1, 9, 15, 16, 25, 31])
def test_channels_left_that_round_up_to_all_are_still_picked(kept):
    """In NHWC, rows are read where they lie only if all of their channels are active."""
    ins = 16 if kept <= 16 else 32
    x = torch.randn(2, ins, 5, 6).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(ins).index_fill(0, torch.randperm(ins)[:kept], 1.0)
    tensors = {"x": x, "weight": torch.randn(10, ins, 3, 3), "in_mask": mask}
    assert_backend_accurate(ops.masked_conv2d, tensors, "cpp", padding=1)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [4, 13, 37])
def test_the_same_pixels_of_several_images_are_taken_together(batch, form):
    """Which is how zeros around small images are left out; batches fill tiles and parts of 16 images or do not."""
    x = torch.randn(batch, 21, 4, 5).contiguous(memory_format=form)
    weight = torch.randn(18, 21, 3, 3).contiguous(memory_format=form)
    masks = {"in_mask": (torch.rand(21) < 0.7).float(), "out_mask": (torch.rand(18) < 0.7) * torch.rand(18)}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for geometry in ({"padding": 1}, {"padding": (2, 1), "dilation": (2, 1)}, {"padding": 1, "stride": 2}):
            residual = torch.randn_like(F.conv2d(x, weight, **geometry))
            tensors = {"x": x, "weight": weight, "residual": residual, **masks}
            assert_backend_accurate(ops.masked_conv2d, tensors, "cpp", act="relu", **geometry)
            assert_backend_accurate(ops.masked_conv2d, {"x": x, "weight": weight}, "cpp", stats=True, **geometry)


def test_more_weights_than_a_panel_holds_of_all_vectors():
    x, weight = torch.randn(2, 400, 3, 4), torch.randn(70, 400, 3, 3)
    masks = {"in_mask": torch.rand(400), "out_mask": torch.rand(70)}
    assert_backend_accurate(ops.masked_conv2d, {"x": x, "weight": weight, **masks}, "cpp", padding=(1, 0))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3, 16, 150])
@pytest.mark.parametrize("act", ["none", "relu6", "silu"])
def test_batch_norm_with_the_statistics_of_its_input(act, channels, form):
    torch.manual_seed(channels)
    x = 3 * torch.randn(5, channels, 7, 9).contiguous(memory_format=form) + 2
    mask = torch.rand(channels) * (torch.rand(channels) < 0.7)
    tensors = {"x": x, "weight": torch.randn(channels), "bias": torch.randn(channels), "mask": mask}
    for extra in ({}, {"residual": torch.randn_like(x)}):
        found = [
            results(partial(ops.masked_bn_act, sums=None, squares=None), tensors | extra, dtype, backend=name, act=act)
            for dtype, name in (
                (torch.float64, "reference"),
                (torch.float32, "reference"),
                (torch.float32, "cpp"),
            )
        ]
        truth, plain, actual = (
            {name: value for name, value in each.items() if name not in ("1", "2")} for each in found
        )
        for name, value in actual.items():
            assert_as_accurate(value, plain[name], truth[name], slack=SLACK if name == "0" else SUM_SLACK)
        for place, moment in (("1", x.double().mean((0, 2, 3))), ("2", x.double().var((0, 2, 3), correction=0))):
            torch.testing.assert_close(found[2][place].double(), moment, rtol=1e-5, atol=1e-6)


def test_batch_norm_takes_both_sums_or_none():
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(InvalidInput, match="give both sums and squares, or neither"):
        ops.masked_bn_act(x, torch.rand(3), None, torch.ones(3), torch.zeros(3))


def test_batch_norm_with_the_statistics_of_its_input_is_compiled_whole():
    x, weight, bias = torch.rand(2, 3, 4, 4), torch.rand(3), torch.rand(3)
    compiled = torch.compile(ops.masked_bn_act, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        compiled(x, None, None, weight, bias), ops.masked_bn_act(x, None, None, weight, bias), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_masked_channels_are_not_read_by_any_backend(backend, groups, form):
    x, weight, given, geometry = convolution(torch.float32, groups)
    x, weight = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
    x[:, given["in_mask"] == 0] = math.nan
    weight[given["out_mask"] == 0] = math.nan
    for name in ("scale", "shift"):
        given[name][given["out_mask"] == 0] = math.nan
    actual = results(
        ops.masked_conv2d, {"x": x, "weight": weight, **given}, torch.float32, act="silu", backend=backend, **geometry
    )
    assert all(value.isfinite().all() for value in actual.values())
    assert actual["grad of weight"][given["out_mask"] == 0].eq(0).all()
    assert actual["grad of scale"][given["out_mask"] == 0].eq(0).all()


def test_results_keep_the_memory_format_of_the_input():
    x, weight, given, geometry = convolution(torch.float32)
    for form in (torch.contiguous_format, torch.channels_last):
        for backend in ("auto", "reference", "cpp"):
            y = ops.masked_conv2d(x.contiguous(memory_format=form), weight, **given, **geometry, backend=backend)
            assert y.is_contiguous(memory_format=form)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_operators_obey_the_rules_of_torch_library(backend):
    x, weight, given, _ = convolution(torch.float32)
    device = DEVICE.get(backend, "cpu")
    tensors = [tensor.to(device).requires_grad_() for tensor in (x, weight, *given.values())]
    how = [[2, 2], [1, 1], [1, 1], 1]
    operators = torch.ops.hwprune
    torch.library.opcheck(operators.masked_conv2d, (*tensors, None, "relu", *how, True, False, backend))
    x, weight, in_mask, out_mask, *_ = tensors
    torch.library.opcheck(operators.masked_conv2d_stats, (x, weight, in_mask, out_mask, None, *how, False, backend))
    columns = torch.arange(0, 54, 5, device=device)
    torch.library.opcheck(
        operators.masked_conv2d, (x, weight, None, None, None, None, None, columns, "none", *how, False, False, backend)
    )
    y = torch.randn(2, 8, 3, 4, device=device, requires_grad=True)
    statistics = y.detach().sum((0, 2, 3)).requires_grad_(), y.detach().square().sum((0, 2, 3)).requires_grad_()
    _, _, scale, shift, residual = tensors[2:]
    arguments = y, *statistics, scale, shift, out_mask, residual, "relu", 1e-5, backend
    torch.library.opcheck(operators.masked_bn_act, arguments)


class Network(nn.Module):
    """Masked, column-pruned, plain and normalised convolutions, as a search strings them together."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.first, self.second, self.third = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.Conv2d(8, 4, 1),
        )
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("columns", torch.arange(0, 72, 3))

    def forward(self, x, mask, residual=None):
        how = {"backend": self.backend}
        x = ops.masked_conv2d(x, self.first.weight, out_mask=mask, shift=self.first.bias, act="relu", padding=1, **how)
        stats = ops.masked_conv2d(x, self.second.weight, in_mask=mask, out_mask=mask, padding=1, stats=True, **how)
        norm = self.norm.weight, self.norm.bias
        residual = x if residual is None else residual
        x, _, _ = ops.masked_bn_act(*stats, *norm, mask=mask, residual=residual, act="silu", **how)
        x = ops.masked_conv2d(x, self.second.weight, columns=self.columns, padding=1, **how)
        return ops.masked_conv2d(x, self.third.weight, shift=self.third.bias, act="gelu", **how)


def test_a_network_follows_autocast_compiled_or_not():
    """The residual, in float32 as a sum would leave it, is taken in the dtype of what it is added to."""
    x, mask = torch.randn(2, 3, 6, 5), torch.tensor([1, 0, 0.5, 1, 0, 0, 1, 0.25], requires_grad=True)
    residual = torch.randn(2, 8, 6, 5)
    network = Network("auto")
    exact = network(x, mask, residual)
    leaves = [mask, *network.parameters()]
    exact_grads = torch.autograd.grad(exact.square().sum(), leaves)
    for run in (network, torch.compile(network, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x, mask, residual)
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().square().sum(), leaves)
        for ours, theirs in zip([y.detach().float(), *grads], [exact.detach(), *exact_grads], strict=True):
            assert ours.dtype == torch.float32
            assert relative_rms(ours, theirs.double()) < 0.03


@pytest.mark.parametrize("backend", ["auto", *AVAILABLE])
def test_a_network_compiles_into_one_graph(backend):
    device = DEVICE.get(backend, "cpu")
    network, x = Network(backend).to(device), torch.randn(2, 3, 6, 5, device=device)
    mask = torch.tensor([1, 0, 0.5, 1, 0, 0, 1, 0.25], device=device, requires_grad=True)
    leaves = [mask, *network.parameters()]
    expected = network(x, mask)
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    actual = compiled(x, mask)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(torch.autograd.grad(actual.square().sum(), leaves), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cuda_counts_what_it_writes_in_32_bits_too():
    x, weight = torch.zeros(()).expand(1, 1, 2**14, 2**14), torch.zeros(3, 1, 1, 1)
    assert "not on cpu" in _cuda_conv.refusal(x, weight, ((1, 1), (0, 0), (1, 1), 1), None)
    for geometry in [((1, 1), (2**14, 2**14), (1, 1), 1), ((1, 1), (2**13, 2**13), (1, 1), 1)]:  # pixels, elements
        assert "2^31 pixels, elements in an image" in _cuda_conv.refusal(x, weight, geometry, None)


def test_backends_say_what_they_do_not_take(monkeypatch):
    x, weight, _, _ = convolution()
    with pytest.raises(BackendUnavailable, match="cpp cannot run masked_conv2d: it takes float32 on cpu"):
        ops.masked_conv2d(x, weight, backend="cpp")
    with pytest.raises(BackendUnavailable, match="backend=cuda cannot run masked_conv2d: it runs on cuda"):
        ops.masked_conv2d(x, weight, backend="cuda")
    monkeypatch.setenv("HWPRUNE_BACKEND", "cpp")
    with pytest.raises(BackendUnavailable, match="HWPRUNE_BACKEND=cpp cannot run masked_bn_act"):
        ops.masked_bn_act(x, *torch.rand(4, 6).double())
    ops.masked_conv2d(x, weight, backend="reference")  # an argument outranks it

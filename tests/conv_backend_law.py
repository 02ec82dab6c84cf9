"""What every backend of masked_conv2d owes, asked of its six functions directly: float64 decides."""

from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_as_accurate, relative_rms

from hwprune.ops import reference

TF32_SLACK = 2.0**-10  # the relative error of a product of two rounded factors


@dataclass(frozen=True)
class Case:
    channels: tuple[int, int]  # in, out
    image: tuple[int, int, int] = (2, 9, 7)  # batch, height, width
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    in_mask: str = "absent"  # or "some", "runs" (aligned octets), "shifted" (others), "nothing" or "all"
    out_mask: str = "absent"
    columns: str = "absent"  # or "some", "few", "runs", "shifted", "nothing"
    epilogue: bool = True
    act: str = "silu"
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    memory: str = "nhwc"  # or "nchw", "sliced" or "unaligned"

    def __str__(self):
        numbers = [f"{name}{'x'.join(map(str, value))}" for name, value in self._shape().items()]
        words = [f"{name}-{getattr(self, name)}" for name in ("in_mask", "out_mask", "columns")]
        kept = [word for word in words if not word.endswith("absent")]
        return "_".join([*numbers, *kept, self.act, str(self.dtype)[6:] + "-tf32" * self.tf32, self.memory])

    def _shape(self):
        shape = {"c": self.channels, "n": self.image, "k": self.kernel, "s": self.stride, "p": self.padding}
        return {**shape, "d": self.dilation, "g": (self.groups,)}

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def slack(self):
        return TF32_SLACK if self.tf32 else 0.0


F32, F16 = torch.float32, torch.float16
FORMATS = [{"dtype": torch.bfloat16}, {"dtype": F16}, {"dtype": F32, "tf32": True}, {"dtype": F32}]
MASKS = {"in_mask": "some", "out_mask": "some"}
CASES = [
    *(Case((16, 24), **options) for options in FORMATS),
    *(Case((24, 40), **MASKS, **options) for options in FORMATS),
    *(Case((32, 48), in_mask="runs", out_mask="runs", **options) for options in FORMATS),
    *(Case((19, 21), columns="some", out_mask="some", **options) for options in FORMATS),
    *(Case((8, 8), act=act, dtype=F32) for act in ("none", "relu", "relu6", "gelu")),
    *(Case((8, 12), memory=memory, in_mask="some") for memory in ("nchw", "sliced", "unaligned")),
    *(Case((8, 16), memory="unaligned", dtype=dtype) for dtype in (torch.bfloat16, F32)),
    *(Case((8, 16), epilogue=False, act="none", dtype=dtype, **MASKS) for dtype in (torch.bfloat16, F32)),
    *(Case((16, 16), in_mask=i, out_mask=o) for i, o in [("nothing", "absent"), ("absent", "nothing"), ("all", "all")]),
    *(Case((16, 16), columns=kind) for kind in ("runs", "shifted", "nothing")),
    Case((32, 32), in_mask="shifted", out_mask="shifted"),
    Case((1, 1), image=(1, 1, 1)),
    Case((3, 5), image=(1, 11, 13)),
    Case((65, 33), image=(1, 5, 6), kernel=(1, 1), padding=(0, 0), **MASKS),
    Case((64, 96), image=(1, 3, 3), **MASKS),
    Case((16, 200), image=(1, 3, 4), out_mask="some"),
    Case((16, 8), image=(0, 5, 5)),
    Case((16, 8), kernel=(5, 3), padding=(2, 0), stride=(2, 1), **MASKS),
    Case((16, 8), kernel=(1, 1), padding=(0, 0), stride=(2, 3)),
    Case((16, 8), kernel=(1, 7), padding=(0, 3), stride=(1, 2), columns="some"),
    Case((8, 8), stride=(2, 3), dilation=(2, 1), padding=(3, 2), in_mask="runs", dtype=F32),
    Case((8, 8), kernel=(2, 2), stride=(3, 3), padding=(0, 0), dtype=F32, **MASKS),
    *(Case((16, 16), groups=16, stride=(2, 1), **MASKS, **options) for options in FORMATS),
    Case((12, 18), groups=3, dilation=(1, 2), **MASKS),
    Case((40, 40), groups=2, kernel=(1, 1), padding=(0, 0), dtype=F32),
]
SMALL = {"image": (2, 7, 6)}
COLUMN_CASES = [
    *(
        Case((11, 13), columns="some", out_mask="some", **SMALL, **options)
        for options in FORMATS
        if options["dtype"] != F16
    ),
    *(Case((16, 8), columns="runs", memory=memory, **SMALL) for memory in ("nhwc", "sliced", "unaligned")),
    *(Case((12, 9), columns="few", stride=stride, **SMALL) for stride in ((2, 2), (1, 3), (4, 1))),
    *(Case((6, 9), columns="some", padding=padding, **SMALL) for padding in ((0, 0), (3, 2))),
    *(
        Case((7, 9), columns="few", dilation=(2, 3), padding=(2, 3), stride=stride)
        for stride in ((1, 1), (2, 2), (3, 2))
    ),
    Case((6, 9), kernel=(2, 5), columns="some", out_mask="some", dilation=(3, 1), stride=(2, 1), dtype=F32, **SMALL),
    Case((70, 20), kernel=(1, 1), padding=(0, 0), columns="some", **SMALL),
    Case((16, 8), kernel=(1, 1), padding=(0, 0), columns="few", stride=(2, 3), dtype=F32),
    Case((16, 16), columns="nothing", **SMALL),
    Case((6, 16), columns="some", out_mask="nothing", **SMALL),
    Case((1, 1), image=(1, 1, 1), columns="some"),
    Case((8, 80), image=(3, 4, 5), columns="some"),
]
# Enough pixels and channels for the largest tiles.
LARGE = [
    Case((8, 100), image=(4, 64, 64), kernel=(1, 1), padding=(0, 0), **options)
    for options in FORMATS
    if options["dtype"] != F16
]
BATCH_NORMS = [
    ((2, 16, 5, 7), "absent", False, "none", torch.bfloat16, "nhwc"),
    ((2, 16, 5, 7), "some", True, "silu", torch.bfloat16, "nhwc"),
    ((2, 24, 9, 9), "runs", True, "gelu", torch.float16, "nhwc"),
    ((3, 13, 5, 7), "some", True, "relu", torch.float32, "nchw"),
    ((1, 300, 3, 3), "some", False, "relu6", torch.float32, "nhwc"),
    ((4, 1, 20, 20), "absent", True, "gelu", torch.float32, "sliced"),
    ((4, 8, 20, 20), "absent", True, "none", torch.float32, "unaligned"),
    ((2, 8, 3, 3), "nothing", True, "silu", torch.float32, "nhwc"),
]


def mask(kind, channels):
    if kind == "absent":
        return None
    soft = torch.rand(channels).clamp_min(0.1)
    keep = {
        "some": torch.rand(channels) < 0.5,
        "runs": (torch.arange(channels) // 8) % 2 == 1,
        "shifted": (torch.arange(channels) + 4) // 8 % 2 == 1,
        "nothing": torch.zeros(channels, dtype=torch.bool),
        "all": torch.ones(channels, dtype=torch.bool),
    }[kind]
    return torch.where(keep, soft, 0)


def columns(kind, count):
    if kind == "absent":
        return None
    if kind in ("runs", "shifted"):
        octets = torch.arange(count).view(-1, 8)[::3].flatten()
        return octets if kind == "runs" else octets + 4
    return torch.arange(count)[torch.rand(count) < {"some": 0.3, "few": 0.15, "nothing": -1}[kind]]


def place(tensor, memory):
    """The same values in another layout, NaN all around."""
    if tensor is None or memory == "nchw":
        return tensor
    if memory == "nhwc":
        return tensor.contiguous(memory_format=torch.channels_last)
    n, c, h, w = tensor.shape
    if memory == "sliced":
        whole = torch.full((n, c + 3, h + 2, w + 1), torch.nan, dtype=tensor.dtype, device=tensor.device)
        view = whole[:, 2 : 2 + c, 1 : 1 + h, :w]
    else:  # dense NHWC that starts one element past an aligned address
        whole = torch.full((tensor.numel() + 2,), torch.nan, dtype=tensor.dtype, device=tensor.device)
        view = whole[1 : 1 + tensor.numel()].view(n, h, w, c).permute(0, 3, 1, 2)
    return view.copy_(tensor)


def problem(case):
    """The tensors of a case in its dtype, on the CPU."""
    (cin, cout), (batch, height, width) = case.channels, case.image
    x, weight = torch.randn(batch, cin, height, width), torch.randn(cout, cin // case.groups, *case.kernel)
    weight /= weight[0].numel() ** 0.5
    walked = columns(case.columns, weight[0].numel())
    y = torch.nn.functional.conv2d(x, weight, None, *case.geometry)
    tensors = {"x": x, "weight": weight, "in_mask": mask(case.in_mask, cin), "out_mask": mask(case.out_mask, cout)}
    if case.epilogue:
        tensors |= {"scale": torch.rand(cout) + 0.5, "shift": torch.randn(cout), "residual": torch.randn_like(y)}
    else:
        tensors |= {"scale": None, "shift": None, "residual": None}
    tensors["grad_y"] = torch.randn_like(y)
    return {name: None if each is None else each.to(case.dtype) for name, each in tensors.items()} | {"columns": walked}


def reference_run(case, tensors, dtype):
    """y and the gradients of all that has one, by autograd through the reference at this dtype."""
    leaves = {
        name: each.to(dtype).clone().requires_grad_()
        for name, each in tensors.items()
        if each is not None and name not in ("columns", "grad_y")
    }
    arguments = [leaves.get(name) for name in ("x", "weight", "in_mask", "out_mask", "scale", "shift", "residual")]
    y = reference.masked_conv2d(*arguments, case.act, *case.geometry, tensors["columns"])
    gradients = torch.autograd.grad(y, leaves.values(), tensors["grad_y"].to(dtype), allow_unused=True)
    zeros = (
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), gradients, strict=True)
    )
    return {"y": y.detach()} | dict(zip(leaves, zeros, strict=True))


def backend_run(backend, case, tensors, device):
    """The same through a backend's functions, the values of masked channels NaN."""
    on = {name: None if each is None else each.to(device) for name, each in tensors.items()}
    vectors = {
        name: on[name] if on[name] is None else on[name].float() for name in ("in_mask", "out_mask", "scale", "shift")
    }
    in_mask, out_mask, scale, shift = vectors.values()
    x, weight, residual, grad_y = on["x"].clone(), on["weight"].clone(), on["residual"], on["grad_y"]
    if in_mask is not None:
        x[:, in_mask == 0] = torch.nan
    if out_mask is not None:
        weight[out_mask == 0] = torch.nan
    x, weight, residual, grad_y = (place(each, case.memory) for each in (x, weight, residual, grad_y))
    masks = in_mask, out_mask
    walk = case.geometry, on["columns"]
    y, raw = backend.forward(x, weight, *masks, scale, shift, residual, case.act, *walk, True, case.tf32)
    alone, none = backend.forward(x, weight, *masks, scale, shift, residual, case.act, *walk, False, case.tf32)
    assert none is None and torch.equal(y, alone)
    grad_raw, *per_channel = backend.backward_epilogue(grad_y, raw, out_mask, scale, shift, residual, case.act)
    grad_x, grad_in_mask = backend.backward_input(grad_raw, x, weight, *masks, *walk, case.tf32)
    grad_weight = backend.backward_weight(grad_raw, x, weight.shape, *masks, *walk, case.tf32)
    for inactive in (raw, grad_raw):
        assert out_mask is None or not inactive[:, out_mask == 0].any()
    assert y.is_contiguous(memory_format=torch.channels_last)
    names = "y", "residual", "out_mask", "scale", "shift", "x", "in_mask", "weight"
    return dict(zip(names, (y, *per_channel, grad_x, grad_in_mask, grad_weight), strict=True))


def check_convolution(backend, case, device="cpu"):
    """The forward pass and every gradient."""
    tensors = problem(case)
    truth, plain = (reference_run(case, tensors, dtype) for dtype in (torch.float64, case.dtype))
    found = backend_run(backend, case, tensors, device)
    for name, exact in truth.items():
        actual = found[name].cpu()
        wanted = torch.float32 if exact.dim() == 1 else case.dtype
        assert actual.dtype == wanted and actual.shape == exact.shape, name
        assert not actual[exact == 0].any() or case.act.startswith("relu"), name
        try:
            assert_as_accurate(actual.to(case.dtype), plain[name], exact, slack=case.slack)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def check_column_gradient(backend, case, monkeypatch, device="cpu"):
    """The input's gradient with listed columns: from their products, a few images at a time too, and densely."""
    tensors = problem(case)
    gate = None if tensors["out_mask"] is None else (tensors["out_mask"] != 0).to(case.dtype)
    x, weight, grad_y, walked = (tensors[name] for name in ("x", "weight", "grad_y", "columns"))

    def gradient(dtype):
        leaf, outer = x.to(dtype, copy=True).requires_grad_(), None if gate is None else gate.to(dtype)
        arguments = leaf, weight.to(dtype), None, outer, None, None, None, "none", *case.geometry, walked
        return torch.autograd.grad(reference.masked_conv2d(*arguments), leaf, grad_y.to(dtype))[0]

    upstream = grad_y if gate is None else torch.where(gate.view(1, -1, 1, 1) != 0, grad_y, torch.nan)
    x, weight, upstream = (place(each.to(device), case.memory) for each in (x, weight, upstream))
    gate, walked = None if gate is None else gate.float().to(device), walked.to(device)
    found = {}
    for one_in, products in ((1, 2**26), (1, 1), (2**40, 2**26)):
        monkeypatch.setattr(backend, "_FEW_COLUMNS", one_in)
        monkeypatch.setattr(backend, "_MOST_PRODUCTS", products)
        grad, none = backend.backward_input(upstream, x, weight, None, gate, case.geometry, walked, case.tf32)
        assert none is None and grad.is_contiguous(memory_format=torch.channels_last)
        found[one_in, products] = grad.cpu()
    whole, in_parts, dense = found.values()
    assert torch.equal(whole, in_parts)
    for grad in (whole, dense):
        assert_as_accurate(grad, gradient(case.dtype), gradient(torch.float64), slack=case.slack)


def check_column_limit(backend, monkeypatch, device="cpu"):
    """A third of the columns is few, and one more is not: how many products may be kept is not asked then."""
    x, weight, grad = (torch.randn(shape, device=device) for shape in ((1, 6, 4, 4), (5, 6, 3, 3), (1, 5, 2, 2)))
    monkeypatch.setattr(backend, "_MOST_PRODUCTS", None)

    def run(count):
        columns = torch.arange(count, device=device)
        backend.backward_input(grad, x, weight, None, None, ((1, 1), (0, 0), (1, 1), 1), columns, False)

    run(19)
    with pytest.raises(TypeError, match="NoneType"):
        run(18)


def check_statistics(backend, case, device="cpu"):
    """The raw convolution and its sums per channel."""
    tensors = problem(case)
    on = {name: None if each is None else each.to(device) for name, each in tensors.items()}
    masks = [on[name] if on[name] is None else on[name].float() for name in ("in_mask", "out_mask")]
    x, weight = place(on["x"], case.memory), place(on["weight"], case.memory)
    found = backend.forward_stats(x, weight, *masks, case.geometry, on["columns"], case.tf32)

    def stats(dtype):
        x, weight, in_mask = (None if tensors[n] is None else tensors[n].to(dtype) for n in ("x", "weight", "in_mask"))
        raw = reference.masked_conv2d(
            x, weight, in_mask, None, None, None, None, "none", *case.geometry, tensors["columns"]
        )
        return reference.channel_sums(raw, tensors["out_mask"])

    # A backend may round weights times mask, once for all pixels: that error does not average out in the sums.
    slack = case.slack if case.in_mask == "absent" else max(case.slack, torch.finfo(case.dtype).eps / 8)
    for actual, plain, truth in zip(found, stats(case.dtype), stats(torch.float64), strict=True):
        assert not actual.cpu()[truth == 0].any()
        assert_as_accurate(actual.cpu(), plain, truth, slack=slack)


def check_batch_norm(backend, shape, kind, residual, act, dtype, memory="nhwc", device="cpu"):
    """BatchNorm with mask, residual and activation, and every gradient."""
    channels = shape[1]
    raw = torch.randn(shape).to(dtype) * 2 + 1
    wide = raw.double()
    # Statistics are inputs of their own: rounded once, so that all compute the same function.
    sums, squares = wide.sum((0, 2, 3)).float(), wide.square().sum((0, 2, 3)).float()
    tensors = {"x": raw, "sums": sums, "squares": squares, "weight": torch.rand(channels) + 0.5}
    tensors |= {"bias": torch.randn(channels), "mask": mask(kind, channels)}
    tensors["residual"] = torch.randn(shape).to(dtype) if residual else None
    grad_y = torch.randn(shape).to(dtype)

    def run(wanted):
        leaves = {n: t.clone().to(wanted(t.dtype)).requires_grad_() for n, t in tensors.items() if t is not None}
        y, mean, var = reference.masked_bn_act(*(leaves.get(name) for name in tensors), act, 1e-5)
        gradients = torch.autograd.grad(y, leaves.values(), grad_y.to(y.dtype), allow_unused=True)
        zeros = (
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves.values(), gradients, strict=True)
        )
        return {"y": y.detach(), "mean": mean.detach(), "var": var.detach()} | dict(zip(leaves, zeros, strict=True))

    truth, plain = run(lambda _: torch.float64), run(lambda dtype: dtype)
    on = {name: None if each is None else each.to(device) for name, each in tensors.items()}
    if on["mask"] is not None:
        on["x"][:, on["mask"] == 0] = torch.nan
    on |= {name: place(on[name], memory) for name in ("x", "residual")}
    arguments = *on.values(), act, 1e-5
    y, mean, var = backend.bn_act(*arguments)
    gradients = backend.bn_act_backward(place(grad_y.to(device), memory), *arguments)
    found = {"y": y, "mean": mean, "var": var} | dict(zip(on, gradients, strict=True))
    for name, exact in truth.items():
        actual, rough = found[name].cpu(), plain[name]
        if on["mask"] is not None and exact.shape == (channels,) and name in ("mean", "var"):
            actual, rough, exact = (each[tensors["mask"] != 0] for each in (actual, rough, exact))
        assert not actual[exact == 0].any(), name
        try:
            assert_as_accurate(actual.to(rough.dtype), rough, exact, slack=1e-6)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}; {relative_rms(rough, exact):.3g} in torch") from error

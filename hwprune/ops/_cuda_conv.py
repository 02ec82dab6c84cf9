"""masked_conv2d and masked_bn_act in CUDA C++: allocates what the kernels of hwprune._cuda write, and launches them.

The kernels take dense NHWC tensors; others are copied. Nothing here checks its arguments or knows autograd.
"""

from typing import Any, overload

import torch
from torch import Tensor

from hwprune.ops import _native
from hwprune.ops._reference_conv import Geometry, output_shape
from hwprune.ops.reference import ACTIVATIONS

_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTS = {name: number for number, name in enumerate(ACTIVATIONS)}
# Where at most one column in so many is listed, the input's gradient is summed from their products: docs/kernels.md.
_FEW_COLUMNS = 3
_MOST_PRODUCTS = 2**26  # that are kept at a time, 256 MiB; fewer would be many launches for little work each
_LIMIT = 2**31  # pixels, and elements of one image, are counted in 32 bits


def refusal(x: Tensor, weight: Tensor, geometry: Geometry, columns: Tensor | None) -> str | None:
    """Why these tensors cannot be convolved here, or None."""
    if x.dtype not in _NUMBERS or weight.dtype != x.dtype:
        return f"it takes float32, float16 and bfloat16 alike for x and weight, not {x.dtype} and {weight.dtype}"
    for batch, channels, height, width in (x.shape, output_shape(x, weight.shape, geometry)):
        if max(batch, channels) * height * width >= _LIMIT or weight.numel() >= _LIMIT:
            return "it takes fewer than 2^31 pixels, elements in an image and weights, of what it reads and writes"
    if not x.is_cuda or weight.device != x.device:
        return f"it takes tensors on one CUDA device, not on {x.device} and {weight.device}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it is built for compute capability 8.0 and later"
    return _native.missing("cuda")


def forward(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin / groups, kH, kW]
    in_mask: Tensor | None,  # [Cin]
    out_mask: Tensor | None,  # [Cout]
    scale: Tensor | None,  # [Cout]
    shift: Tensor | None,  # [Cout]
    residual: Tensor | None,  # [N, Cout, Ho, Wo]
    act: str,
    geometry: Geometry,
    columns: Tensor | None,  # [K]
    save_raw: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor | None]:
    """act(out_mask ⊙ (scale ⊙ conv(in_mask ⊙ x, weight) + shift) + residual), and the convolution alone if wanted."""
    launch = _Convolution(x, weight.shape, in_mask, out_mask, geometry, columns, allow_tf32)
    x, weight, residual = _nhwc(x), _nhwc(weight), _nhwc(residual)
    scale, shift = _vector(scale), _vector(shift)
    y = launch.empty_output()
    raw = torch.empty_like(y) if save_raw else None
    if y.numel():
        epilogue = _address(scale), _address(shift), _address(residual), _ACTS[act], _address(y), _address(raw)
        launch("masked_conv_forward", _address(x), _address(weight), *epilogue)
    return y, raw


def forward_stats(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin / groups, kH, kW]
    in_mask: Tensor | None,  # [Cin]
    out_mask: Tensor | None,  # [Cout]
    geometry: Geometry,
    columns: Tensor | None,  # [K]
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution alone, and per output channel its sum and sum of squares, before rounding to x's dtype."""
    launch = _Convolution(x, weight.shape, in_mask, out_mask, geometry, columns, allow_tf32)
    x, weight = _nhwc(x), _nhwc(weight)
    raw = launch.empty_output()
    sums, squares = torch.zeros(2, weight.shape[0], device=x.device).unbind()
    if raw.numel():
        outputs = _address(raw), _address(sums), _address(squares)
        launch("masked_conv_forward_stats", _address(x), _address(weight), *outputs)
    return raw, sums, squares


def backward_input(
    grad_raw: Tensor,  # [N, Cout, Ho, Wo]
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin / groups, kH, kW]
    in_mask: Tensor | None,  # [Cin]
    out_mask: Tensor | None,  # [Cout]
    geometry: Geometry,
    columns: Tensor | None,  # [K]
    allow_tf32: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of in_mask."""
    launch = _Convolution(x, weight.shape, in_mask, out_mask, geometry, columns, allow_tf32)
    x, weight, grad_raw = _nhwc(x), _nhwc(weight), _nhwc(grad_raw)
    grad_x = torch.empty_like(x)
    grad_in_mask = None if in_mask is None else torch.zeros_like(in_mask, dtype=torch.float32)
    if grad_x.numel():
        if grad_raw.numel():
            tensors = grad_raw, x, weight, grad_x, grad_in_mask
            launch("masked_conv_backward_input", *(_address(tensor) for tensor in tensors))
        else:
            grad_x.zero_()
    return grad_x, grad_in_mask


def backward_weight(
    grad_raw: Tensor,  # [N, Cout, Ho, Wo]
    x: Tensor,  # [N, Cin, H, W]
    weight_shape: torch.Size,  # (Cout, Cin / groups, kH, kW)
    in_mask: Tensor | None,  # [Cin]
    out_mask: Tensor | None,  # [Cout]
    geometry: Geometry,
    columns: Tensor | None,  # [K]
    allow_tf32: bool,
) -> Tensor:
    """The gradient of the weight, in channels_last memory; exactly 0 where masked."""
    launch = _Convolution(x, weight_shape, in_mask, out_mask, geometry, columns, allow_tf32)
    x, grad_raw = _nhwc(x), _nhwc(grad_raw)
    grad_weight = _nhwc(torch.empty(weight_shape, dtype=x.dtype, device=x.device))
    if grad_raw.numel() and x.numel():
        launch("masked_conv_backward_weight", _address(grad_raw), _address(x), _address(grad_weight))
    else:
        grad_weight.zero_()
    return grad_weight


def backward_epilogue(
    grad_y: Tensor,  # [N, Cout, Ho, Wo]
    raw: Tensor,  # [N, Cout, Ho, Wo]
    out_mask: Tensor | None,  # [Cout]
    scale: Tensor | None,  # [Cout]
    shift: Tensor | None,  # [Cout]
    residual: Tensor | None,  # [N, Cout, Ho, Wo]
    act: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of raw, residual, out_mask, scale and shift; None where there was no argument."""
    grad_mask, grad_scale, grad_shift = (
        None if each is None else torch.zeros_like(each) for each in (out_mask, scale, shift)
    )
    affine = _Affine(raw, residual, act, 0.0, out_mask, scale, shift, None, None)
    grad_raw, grad_residual = affine.backward(grad_y, grad_mask, grad_scale, grad_shift, None, None)
    return grad_raw, grad_residual, grad_mask, grad_scale, grad_shift


def bn_act(
    x: Tensor,  # [N, C, H, W]
    sums: Tensor,  # [C]
    squares: Tensor,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mask: Tensor | None,  # [C]
    residual: Tensor | None,  # [N, C, H, W]
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(mask ⊙ bn(x) + residual), the batch's mean and its biased variance."""
    affine = _Affine(x, residual, act, eps, mask, weight, bias, sums, squares)
    y = torch.empty_like(affine.x)
    mean, var = torch.empty(2, x.shape[1], device=x.device).unbind()
    affine.launch("masked_affine_forward", _address(y), _address(mean), _address(var))
    return y, mean, var


def bn_act_backward(
    grad_y: Tensor,  # [N, C, H, W]
    x: Tensor,  # [N, C, H, W]
    sums: Tensor,  # [C]
    squares: Tensor,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mask: Tensor | None,  # [C]
    residual: Tensor | None,  # [N, C, H, W]
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x (through the normalised values alone), sums, squares, weight, bias, mask and residual."""
    affine = _Affine(x, residual, act, eps, mask, weight, bias, sums, squares)
    grad_weight, grad_bias, grad_sums, grad_squares = torch.empty(4, x.shape[1], device=x.device).unbind()
    grad_mask = None if mask is None else torch.empty_like(mask)
    grad_x, grad_residual = affine.backward(grad_y, grad_mask, grad_weight, grad_bias, grad_sums, grad_squares)
    return grad_x, grad_sums, grad_squares, grad_weight, grad_bias, grad_mask, grad_residual


class _Convolution:
    """One convolution as the kernels know it. Keeps its masks alive until they are launched."""

    def __init__(
        self,
        x: Tensor,
        weight_shape: torch.Size,
        in_mask: Tensor | None,
        out_mask: Tensor | None,
        geometry: Geometry,
        columns: Tensor | None,
        allow_tf32: bool,
    ):
        stride, padding, dilation, groups = geometry
        batch, in_channels, height, width = x.shape
        out_channels, per_group, kernel_height, kernel_width = weight_shape
        self.x = x
        self.out_shape = output_shape(x, weight_shape, geometry)
        self.masks = _vector(in_mask), _vector(out_mask)
        self.columns, product_images = columns, 0
        if columns is not None and _FEW_COLUMNS * len(columns) <= per_group * kernel_height * kernel_width:
            products = self.out_shape[2] * self.out_shape[3] * len(columns)  # of one image
            product_images = max(1, _MOST_PRODUCTS // max(1, products))
        self.conv = _native.module("cuda").Convolution(
            batch=batch,
            in_channels=in_channels,
            height=height,
            width=width,
            out_channels=out_channels,
            out_height=self.out_shape[2],
            out_width=self.out_shape[3],
            kernel_height=kernel_height,
            kernel_width=kernel_width,
            stride_height=stride[0],
            stride_width=stride[1],
            padding_height=padding[0],
            padding_width=padding[1],
            dilation_height=dilation[0],
            dilation_width=dilation[1],
            groups=groups,
            number=_NUMBERS[x.dtype],
            tf32=allow_tf32,
            in_mask=_address(self.masks[0]),
            out_mask=_address(self.masks[1]),
            columns=_address(self.columns),
            column_count=-1 if self.columns is None else len(self.columns),
            product_images=product_images,
        )

    def empty_output(self) -> Tensor:
        return _nhwc(torch.empty(self.out_shape, dtype=self.x.dtype, device=self.x.device))

    def __call__(self, name: str, *arguments: int) -> None:
        workspace = torch.empty(self.conv.workspace(), dtype=torch.uint8, device=self.x.device)
        _launch(name, self.x.device, self.conv, *arguments, _address(workspace))


class _Affine:
    """act(mask ⊙ (scale ⊙ x + shift) + residual) as the kernels know it; BatchNorm with sums and squares."""

    def __init__(
        self,
        x: Tensor,
        residual: Tensor | None,
        act: str,
        eps: float,
        mask: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        sums: Tensor | None,
        squares: Tensor | None,
    ):
        self.x, self.residual = _nhwc(x), _nhwc(residual)
        vectors = {"mask": mask, "scale": scale, "shift": shift, "sums": sums, "squares": squares}
        self.vectors = {name: _vector(vector) for name, vector in vectors.items()}
        self.affine = _native.module("cuda").ChannelAffine(
            pixels=x.numel() // x.shape[1],
            channels=x.shape[1],
            number=_NUMBERS[x.dtype],
            act=_ACTS[act],
            eps=eps,
            x=_address(self.x),
            residual=_address(self.residual),
            **{name: _address(vector) for name, vector in self.vectors.items()},
        )

    def launch(self, name: str, *arguments: int) -> None:
        _launch(name, self.x.device, self.affine, *arguments)

    def backward(
        self,
        grad_y: Tensor,
        grad_mask: Tensor | None,
        grad_scale: Tensor | None,
        grad_shift: Tensor | None,
        grad_sums: Tensor | None,
        grad_squares: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients of x and of the residual, and fills those given."""
        grad_y, grad_x = _nhwc(grad_y), torch.empty_like(self.x)
        grad_residual = None if self.residual is None else torch.empty_like(self.residual)
        if grad_x.numel():
            workspace = torch.empty(self.affine.workspace(), dtype=torch.uint8, device=self.x.device)
            per_channel = grad_mask, grad_scale, grad_shift, grad_sums, grad_squares
            tensors = grad_y, grad_x, grad_residual, *per_channel, workspace
            self.launch("masked_affine_backward", *(_address(tensor) for tensor in tensors))
        return grad_x, grad_residual


def _launch(name: str, device: torch.device, problem: Any, *arguments: int) -> None:
    launch = getattr(_native.module("cuda"), name)
    if device.type != "cuda":  # the tests' kernels, compiled for the CPU
        launch(problem, *arguments, 0)
        return
    with torch.cuda.device(device):
        launch(problem, *arguments, torch.cuda.current_stream(device).cuda_stream)


@overload
def _nhwc(tensor: Tensor) -> Tensor: ...
@overload
def _nhwc(tensor: Tensor | None) -> Tensor | None: ...
def _nhwc(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

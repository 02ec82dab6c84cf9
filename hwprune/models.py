"""Networks by name: the CIFAR classics built here, torchvision's, timm's, or a function of the user's own."""

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwprune.errors import InvalidInput


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (He et al., arXiv 1512.03385, section 4.2, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        added = channels - in_channels
        self.padding = (added // 2, added - added // 2)  # channels before and after; pruned apart, hence two numbers

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, channels, H / stride, W / stride]
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: three stages of n blocks, 16, 32 and 64 channels wide.

    He et al., arXiv 1512.03385, section 4.2. Keys: ``conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear``,
    those of akamaster/pytorch_resnet_cifar10, whose weights load.
    """

    def __init__(self, depth: int = 20, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InvalidInput(f"a CIFAR ResNet has depth 6n + 2 (8, 20, 32, 44, 56, 110, ...), not {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)
        _kaiming(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, classes]
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class Vgg16Bn(nn.Module):
    """VGG-16 with batch normalisation for 32 px images: thirteen convolutions and one linear layer.

    Simonyan and Zisserman, arXiv 1409.1556, configuration D; the head is the single layer customary on CIFAR.
    """

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in self.STAGES:
            for channels in stage:
                layers += [
                    nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                ]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, 32, 32] -> [N, classes]
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project; with a shortcut where the shape stays (Sandler et al., arXiv 1801.04381)."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers = [*_conv_bn_relu6(in_channels, hidden, 1)] if expansion > 1 else []
        layers += [
            *_conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 for 32 px images: the strides of the stem and of the second stage are 1 instead of 2.

    Sandler et al., arXiv 1801.04381, table 2. For 96 px and more take ``torchvision:mobilenet_v2``.
    """

    STAGES = (  # expansion, channels, blocks, stride of the first
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers = _conv_bn_relu6(in_channels, 32, 3)
        width = 32
        for expansion, channels, blocks, stride in self.STAGES:
            for i in range(blocks):
                layers.append(InvertedResidual(width, channels, stride if i == 0 else 1, expansion))
                width = channels
        self.features = nn.Sequential(*layers, *_conv_bn_relu6(width, 1280, 1))
        self.classifier = nn.Linear(1280, classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, 32, 32] -> [N, classes]
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def _conv_bn_relu6(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True)]


def _kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


_BUILT_IN: dict[str, Callable[[int, int], nn.Module]] = {
    "vgg16_bn": Vgg16Bn,
    "mobilenet_v2": MobileNetV2,
}
_NAMES = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", *_BUILT_IN)


def load_model(spec: str, classes: int = 10, in_channels: int = 3, weights: str | Path | None = None) -> nn.Module:
    """Build the network that ``spec`` names, in training mode, on the CPU.

    Args:
        spec: ``resnet20`` (any depth 6n + 2), ``vgg16_bn``, ``mobilenet_v2``, ``torchvision:NAME``, ``timm:NAME`` or
            ``package.module:function``. The last three take keyword arguments for the constructor, as in
            ``timm:vit_tiny_patch16_224?img_size=64``. A function of the user's own is given ``classes`` (or
            ``num_classes``) and ``in_channels`` (or ``in_chans``) if it has parameters of these names.
        classes: number of logits.
        in_channels: channels of the input images.
        weights: a ``.safetensors`` file, or a file that ``torch.load(weights_only=True)`` reads.

    Raises:
        InvalidInput: the name is unknown, the constructor fails, or the weights do not fit.
    """
    model = _build(spec, classes, in_channels)
    if weights is not None:
        load_weights(model, weights)
    return model


def _build(spec: str, classes: int, in_channels: int) -> nn.Module:
    if ":" not in spec:
        depth = re.fullmatch(r"resnet(\d+)", spec)
        if depth and int(depth[1]) >= 8 and (int(depth[1]) - 2) % 6 == 0:
            return CifarResNet(int(depth[1]), classes, in_channels)
        if spec in _BUILT_IN:
            return _BUILT_IN[spec](classes, in_channels)
        raise InvalidInput(
            f"no model is called {spec!r}; built in are {', '.join(_NAMES)}, others are reached as "
            f"torchvision:{spec}, timm:{spec} or package.module:function"
        )
    source, options = split_spec(spec)
    library, _, name = source.partition(":")
    if library == "torchvision":
        return _torchvision(name, classes, in_channels, options)
    if library == "timm":
        return _timm(name, classes, in_channels, options)
    offered = {"classes": classes, "num_classes": classes, "in_channels": in_channels, "in_chans": in_channels}
    model = call(source, offered, options)
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{source} returned {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _torchvision(name: str, classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    models = _import("torchvision.models", f"torchvision:{name}")
    if name not in models.list_models():
        raise InvalidInput(f"torchvision has no model {name!r}{_near(name, models.list_models())}")
    if in_channels != 3:
        raise InvalidInput(
            f"torchvision:{name} takes images of 3 channels and the data have {in_channels}; "
            f"use timm:{name} or a function of your own"
        )
    if name in ("inception_v3", "googlenet"):
        # Left to its default this argument warns, and the truncated normal that it asks for takes half a minute.
        options = {"init_weights": False} | options
    return _construct(f"torchvision:{name}", models.get_model, name, weights=None, num_classes=classes, **options)


def _timm(name: str, classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    timm = _import("timm", f"timm:{name}")
    if not timm.is_model(name):
        raise InvalidInput(f"timm {timm.__version__} has no model {name!r}{_near(name, timm.list_models())}")
    keywords = {"pretrained": False, "num_classes": classes, "in_chans": in_channels} | options
    return _construct(f"timm:{name}", timm.create_model, name, **keywords)


def _construct(spec: str, build: Callable[..., Any], *args: Any, **keywords: Any) -> nn.Module:
    try:
        model = build(*args, **keywords)
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
        raise InvalidInput(f"{spec} cannot be built with {given}: {error}") from error
    assert isinstance(model, nn.Module)
    return model


def _import(module: str, spec: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside a torch it was not built for
        package = module.partition(".")[0]
        raise InvalidInput(
            f"{spec} needs {package}, which cannot be imported ({error}); pip install {package}, "
            f"in the version that belongs to torch {torch.__version__}"
        ) from error


def _near(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=3)
    return f"; near it are {', '.join(matches)}" if matches else f"; it has {len(known)} others"


def split_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """``"a:b?size=64&crop=true"`` -> ``("a:b", {"size": 64, "crop": True})``: numbers and truth values are read so."""
    source, _, query = spec.partition("?")
    try:
        pairs = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if query else []
    except ValueError as error:
        raise InvalidInput(f"{spec!r}: options are written ?name=value&name=value, not ?{query}") from error
    return source, {key: _value(text) for key, text in pairs}


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def call(source: str, offered: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Import ``package.module:function``, also from the current folder, and call it.

    Args:
        source: where the function is.
        offered: keyword arguments passed only if the function has parameters of these names.
        options: keyword arguments passed in any case.

    Raises:
        InvalidInput: the module or the function is missing, or does not take the options. Errors of the function's
            own body pass through.
    """
    module_name, _, name = source.partition(":")
    if not module_name or not name:
        raise InvalidInput(f"{source!r} is not of the form package.module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # An installed command does not look into the current folder, where the user's file mostly lies.
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"{source}: there is no module {error.name!r} to import from {Path.cwd()}; "
            "run from the folder that holds it, or install it"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        public = ", ".join(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise InvalidInput(f"{module_name} has no function {name!r}; it has {public or 'none'}")
    signature = inspect.signature(function)
    keywords = {key: value for key, value in offered.items() if key in signature.parameters} | dict(options)
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise InvalidInput(f"{source}{signature} cannot be called: {error}; options are written ?name=value") from error
    return function(**keywords)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict from ``path`` into ``model``, in place.

    Missing ``num_batches_tracked`` counters are tolerated: old files lack them and nothing is computed from them. A
    state dict inside ``{"state_dict": ...}`` or ``{"model": ...}`` is found, and the ``module.`` of data-parallel
    wrappers is dropped.

    Raises:
        InvalidInput: the file is missing or unreadable, or keys or shapes differ; the model is then left as it was.
    """
    path = Path(path)
    state = _read_state(path)
    expected = model.state_dict()
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {_shape(state[key])} in the file and {_shape(expected[key])} in the model"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    faults = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, what in ((missing, "keys are missing"), (unexpected, "keys are unknown"), (shapes, "shapes differ"))
        if keys
    ]
    if faults:
        raise InvalidInput(
            f"{path} does not fit {type(model).__name__}: of {len(expected)} keys {'; '.join(faults)}; "
            "check the model's name, classes and input channels against the network that the file was saved from"
        )
    model.load_state_dict(state, strict=False)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InvalidInput(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle, zipfile and torch each have their own
        reason = str(error).partition("\n")[0]
        raise InvalidInput(
            f"{path} cannot be read as weights ({reason}); write it with torch.save(model.state_dict(), path) "
            "or safetensors.torch.save_file"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InvalidInput(f"{path} holds no state dict (tensors by name); save model.state_dict()")
    return {str(key).removeprefix("module."): value for key, value in content.items()}

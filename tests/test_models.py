"""Networks by name, and weights that must fit."""

import re
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hwprune.errors import InvalidInput
from hwprune.models import CifarResNet, load_model, load_weights, split_spec


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    # The resnets: He et al., table 6 (0.27M, 0.85M). VGG-16: torchvision's features without the biases that the
    # norms make superfluous, and the head. MobileNetV2: as torchvision's, whose strides differ.
    "spec, parameters",
    [("resnet20", 269722), ("resnet56", 853018), ("vgg16_bn", 14723136 - 4224 + 5130), ("mobilenet_v2", 2236682)],
)
def test_built_in_networks_have_the_published_sizes(spec, parameters):
    model = load_model(spec).eval()
    assert count(model) == parameters
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_resnet_keys_are_those_of_the_published_weights():
    blocks = [f"layer{stage}.{i}.{part}" for stage in (1, 2, 3) for i in range(3) for part in ("conv1", "conv2")]
    norms = ["bn1", *(name.replace("conv", "bn") for name in blocks)]
    expected = {f"{name}.weight" for name in ("conv1", *blocks, *norms, "linear")} | {"linear.bias"}
    expected |= {f"{norm}.{part}" for norm in norms for part in ("bias", "running_mean", "running_var")}
    keys = {key for key in load_model("resnet20").state_dict() if not key.endswith("num_batches_tracked")}
    assert keys == expected


def test_option_a_shortcut_takes_every_other_pixel_and_pads_channels_on_both_sides():
    block = CifarResNet(8).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    with torch.no_grad():
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("spec", ["resnet8", "vgg16_bn", "mobilenet_v2"])
def test_classes_and_input_channels_follow(spec):
    size = 32 if spec == "vgg16_bn" else 8
    model = load_model(spec, classes=7, in_channels=1)
    model(torch.randn(2, 1, size, size)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(torch.randn(1, 1, size, size)).shape == (1, 7)


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "torchvision:mobilenet_v2", "timm:resnet10t"])
def test_libraries_networks(spec):
    pytest.importorskip(spec.partition(":")[0])
    model = load_model(spec, classes=5).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_options_reach_the_constructor():
    pytest.importorskip("timm")
    model = load_model("timm:vit_tiny_patch16_224?img_size=64&depth=2", classes=5, in_channels=1).eval()
    assert len(model.blocks) == 2 and model(torch.randn(1, 1, 64, 64)).shape == (1, 5)
    with pytest.raises(InvalidInput, match=r"timm:resnet10t cannot be built with .*depht=2"):
        load_model("timm:resnet10t?depht=2")


def test_inception_of_torchvision_builds_without_a_warning():
    pytest.importorskip("torchvision")
    assert load_model("torchvision:inception_v3?aux_logits=false", classes=3).fc.out_features == 3


def test_spec_options_are_read_as_numbers_and_truth_values():
    options = {"a": 1, "b": 0.5, "c": True, "d": "gelu", "e": ""}
    assert split_spec("x:y?a=1&b=0.5&c=true&d=gelu&e=") == ("x:y", options)
    with pytest.raises(InvalidInput, match="options are written"):
        split_spec("x:y?a")


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    """Writes a module into the current folder and returns its name, a new one for every test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def write(code):
        name = "users_" + re.sub(r"\W", "_", tmp_path.name)
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


def test_a_function_in_the_current_folder(users_module):
    name = users_module(
        "from torch import nn\n"
        "def net(num_classes, in_chans, hidden=4):\n"
        "    return nn.Sequential(nn.Linear(in_chans, hidden), nn.Linear(hidden, num_classes))\n"
        "def plain(): return nn.Linear(2, 3)\n"
        "def number(): return 7\n"
    )
    model = load_model(f"{name}:net?hidden=6", classes=5, in_channels=2)
    assert model(torch.zeros(1, 2)).shape == (1, 5) and model[0].out_features == 6
    assert load_model(f"{name}:plain", classes=5).out_features == 3
    for spec, message in (
        (f"{name}:number", "returned int; it must return a torch.nn.Module"),
        (f"{name}:nett", r"has no function 'nett'; it has net, plain, number"),
        (f"{name}:net?width=3", r"net\(num_classes, in_chans, hidden=4\) cannot be called.*'width'"),
        (f"{name}.sub:net", "there is no module"),
        ("users_absent:net", "there is no module 'users_absent' to import from"),
        (f"{name}:", "is not of the form package.module:function"),
    ):
        with pytest.raises(InvalidInput, match=message):
            load_model(spec)


def test_errors_in_the_users_own_code_are_not_hidden(users_module):
    name = users_module("def net(): return [][0]\n")
    with pytest.raises(IndexError):
        load_model(f"{name}:net")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("resnet18", r"no model is called 'resnet18'; built in are resnet8, resnet20.*torchvision:resnet18"),
        ("lenet", "no model is called 'lenet'"),
        ("torchvision:resnet19", "torchvision has no model 'resnet19'; near it are .*resnet18"),
        ("timm:resnet19", "has no model 'resnet19'; near it are .*resnet18"),
    ],
)
def test_unknown_names_come_with_what_there_is(spec, message):
    if ":" in spec:
        pytest.importorskip(spec.partition(":")[0])
    with pytest.raises(InvalidInput, match=message):
        load_model(spec)


def test_torchvision_takes_colour_images_only():
    pytest.importorskip("torchvision")
    with pytest.raises(InvalidInput, match="3 channels and the data have 1; use timm:resnet18"):
        load_model("torchvision:resnet18", in_channels=1)


@pytest.fixture(scope="module")
def trained():
    model = load_model("resnet8")
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape) * 9)
    return model


@pytest.mark.parametrize("form", ["safetensors", "plain", "wrapped", "parallel", "uncounted"])
def test_weights_come_back(tmp_path, trained, form):
    state = trained.state_dict()
    path = tmp_path / ("weights.safetensors" if form in ("safetensors", "uncounted") else "weights.pt")
    if form == "uncounted":
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    if path.suffix == ".safetensors":
        save_file(dict(state), path)
    elif form == "wrapped":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        torch.save({f"module.{key}": value for key, value in state.items()} if form == "parallel" else state, path)
    loaded = load_model("resnet8", weights=path).state_dict()
    for key, value in state.items():
        assert torch.equal(loaded[key], value), key


def test_weights_of_another_network_are_refused_in_one_sentence(tmp_path, trained):
    path = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), path)
    with pytest.raises(InvalidInput) as raised:
        load_model("resnet20", weights=path)
    assert "does not fit CifarResNet" in str(raised.value) and "layer1.1.conv1.weight, " in str(raised.value)
    assert "\n" not in str(raised.value)
    model = load_model("resnet8", classes=100, in_channels=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        InvalidInput, match=r"conv1.weight is 16x3x3x3 in the file and 16x1x3x3 in the model.*check the"
    ):
        load_weights(model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    save_file({**trained.state_dict(), "extra": torch.zeros(1)}, path)
    with pytest.raises(InvalidInput, match=r"1 keys are unknown \(extra\)"):
        load_model("resnet8", weights=path)


class Foreign:
    pass


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(InvalidInput, match="there is no weights file"):
        load_model("resnet8", weights=tmp_path / "absent.pt")
    for name in ("broken.safetensors", "broken.pt"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(InvalidInput, match=rf"{name} cannot be read as weights"):
            load_model("resnet8", weights=tmp_path / name)
    torch.save(Foreign(), tmp_path / "module.pt")  # torch.save(model) is a common mistake, and unsafe to load
    with pytest.raises(InvalidInput, match=r"write it with torch.save\(model.state_dict\(\), path\)"):
        load_model("resnet8", weights=tmp_path / "module.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(InvalidInput, match="holds no state dict"):
        load_model("resnet8", weights=tmp_path / "list.pt")

"""The law over the families of networks that people prune, at random weights, random keeps and small inputs."""

import pytest
import torch
from graph_law import law, prepare

from hwprune.graph import cut, keep_first, trace
from hwprune.models import load_model

# name, pixels, attention, what the user gets for unrelated keeps
FAMILIES = [
    ("resnet20", 32, "heads", "module"),
    ("vgg16_bn", 32, "heads", "module"),
    ("mobilenet_v2", 32, "heads", "module"),
    ("torchvision:resnet18", 32, "heads", "module"),
    ("torchvision:resnet50", 32, "heads", "module"),
    ("torchvision:densenet121", 32, "heads", "module"),
    ("torchvision:inception_v3", 75, "heads", "module"),
    ("torchvision:shufflenet_v2_x0_5", 32, "heads", "program"),  # chunk(2): the halves are not equal any more
    ("timm:mobilenetv3_small_100", 32, "heads", "module"),
    ("timm:regnety_002", 32, "heads", "module"),
    ("timm:convnext_atto", 32, "heads", "module"),
    ("timm:efficientnet_b0", 32, "heads", "module"),
    ("timm:ghostnet_100", 32, "heads", "module"),
    ("timm:hrnet_w18_small", 32, "heads", "module"),
    ("timm:dla34", 32, "heads", "module"),
    ("timm:res2net50_26w_4s", 32, "heads", "module"),
    ("timm:mixnet_s", 32, "heads", "module"),
    ("timm:skresnet18", 32, "heads", "program"),  # split(channels // 2)
    ("timm:resnest14d", 32, "heads", "module"),
    ("timm:cspresnet50", 32, "heads", "program"),  # split(channels // 2)
    ("timm:ese_vovnet19b_dw", 32, "heads", "module"),
    ("timm:mobileone_s0", 32, "heads", "module"),
    ("timm:repvgg_a0", 32, "heads", "module"),
    ("timm:levit_128s", 224, "heads", "module"),
    ("timm:edgenext_xx_small", 32, "heads", "program"),  # chunk, and reshape to the width of the input
    ("timm:mobilevit_xxs", 32, "heads", "module"),
    ("timm:vit_tiny_patch16_224?img_size=32", 32, "heads", "module"),
    ("timm:vit_tiny_patch16_224?img_size=32", 32, "dims", "module"),
    ("timm:swin_tiny_patch4_window7_224?img_size=56", 56, "heads", "module"),
    ("timm:swin_tiny_patch4_window7_224?img_size=56", 56, "dims", "module"),
]


def build(spec: str) -> torch.nn.Module:
    if ":" in spec:
        pytest.importorskip(spec.partition(":")[0], reason=f"{spec} comes from a package that is not installed")
    return load_model(spec, classes=7)


@pytest.mark.parametrize(("spec", "pixels", "attention", "kind"), FAMILIES)
def test_family(spec, pixels, attention, kind):
    program, result = law(build(spec), (torch.randn(2, 3, pixels, pixels),), attention)
    frozen = {frozen.operator for frozen in program.groups.frozen if "relative_position_bias" not in frozen.parameter}
    assert frozen == {"output"}  # a table with a column per head has nothing to lose where only dims may go
    assert result.kind == kind, result.reason


@pytest.mark.parametrize("spec", ["timm:skresnet18", "timm:cspresnet50"])
def test_equal_parts_let_the_module_follow(spec):
    model = prepare(build(spec))
    program = trace(model, (torch.randn(2, 3, 32, 32, dtype=torch.float64),))
    halves = keep_first(program.groups, (program.groups.widths + 1) // 2)
    assert cut(model, program, halves).kind == "module"


@pytest.mark.parametrize(("attention", "free"), [("heads", 3), ("dims", 64)])
def test_vision_transformer_has_embedding_attention_and_hidden_groups(attention, free):
    program = trace(build("timm:vit_tiny_patch16_224?img_size=32"), (torch.randn(1, 3, 32, 32),), attention)
    widths = sorted(program.groups.widths.tolist())
    assert widths == [free] * 12 + [192] + [768] * 12  # queries, keys and values are packed in one tensor: one group
    assert [group.name for group in program.groups if group.normalised == "layer_norm"] == ["patch_embed.proj"]

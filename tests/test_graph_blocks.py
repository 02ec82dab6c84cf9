"""The law on hand-written blocks: each is the smallest network in which one way of wiring channels can go wrong."""

import pytest
import torch
import torch.nn.functional as F
from graph_law import law
from torch import Tensor, nn


def conv_bn(cin: int, cout: int, kernel: int = 3, **options) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **options), nn.BatchNorm2d(cout), nn.SiLU())


class Head(nn.Module):
    """A stem before the block and a classifier behind it, so that the block's own ends are free."""

    def __init__(self, block: nn.Module, cin: int = 12, cout: int = 12) -> None:
        super().__init__()
        self.stem, self.block, self.classifier = conv_bn(3, cin), block, nn.Linear(cout, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.block(self.stem(x)).mean((2, 3)))


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = conv_bn(width, width), conv_bn(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class C2f(nn.Module):
    """Split in two, a chain of bottlenecks on the second half, everything concatenated (YOLOv8)."""

    def __init__(self, sizes: bool) -> None:
        super().__init__()
        self.hidden, self.sizes = 10, sizes
        self.enter, self.leave = conv_bn(12, 20, 1), conv_bn(40, 12, 1)
        self.chain = nn.ModuleList(Bottleneck(10) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        halves = self.enter(x).split((self.hidden, self.hidden), 1) if self.sizes else self.enter(x).chunk(2, 1)
        parts = list(halves)
        for block in self.chain:
            parts.append(block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Sppf(nn.Module):
    """One pooled again and again, all stages concatenated (YOLOv5)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = conv_bn(12, 6, 1), conv_bn(24, 12, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Twice(nn.Module):
    """The same tensor concatenated with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([x, x], 1))


class Upsample(nn.Module):
    """Sub-pixel convolution up, and pixel unshuffle down again."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.between, self.leave = conv_bn(12, 32), conv_bn(8, 6), conv_bn(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.pixel_unshuffle(self.between(F.pixel_shuffle(self.enter(x), 2)), 2))


class Shuffle(nn.Module):
    """Grouped, shuffled by view and transpose, depthwise, grouped again (ShuffleNet)."""

    def __init__(self, native: bool = False) -> None:
        super().__init__()
        self.native = native
        self.first, self.last = conv_bn(12, 24, 1, groups=3), conv_bn(24, 12, 1, groups=3)
        self.depthwise = conv_bn(24, 24, groups=24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.channel_shuffle(x, 3) if self.native else x.unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2)
        return self.last(self.depthwise(x))


class Multiplied(nn.Module):
    """A depthwise convolution with several outputs per channel, and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(12, 36, 3, padding=2, dilation=2, groups=12)
        self.leave = conv_bn(36, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.wide(x))


class Decoder(nn.Module):
    """A vector, viewed as a small feature map, upsampled by transposed convolutions: dense, grouped, depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 8 * 4 * 4)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 12, 2, 2), nn.BatchNorm2d(12), nn.ReLU())
        self.grouped = nn.ConvTranspose2d(12, 16, 2, 2, groups=2)
        self.depthwise = nn.ConvTranspose2d(16, 16, 2, 2, groups=16)
        self.leave = conv_bn(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x.mean((2, 3))).view(-1, 8, 4, 4)
        return self.leave(self.depthwise(self.grouped(self.up(x))))


class SharedParameter(nn.Module):
    """Two convolutions that hold one Parameter, and one whose weight is read a second time as another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x)) + self.third(x)
        return self.norm(self.second(y)) + F.conv2d(x, self.third.weight, padding=1)


class TiedEmbedding(nn.Module):
    """A language model's input table used again as its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.position = nn.Parameter(torch.randn(7, 16))
        self.mix = nn.Linear(16, 16)
        self.logits = nn.Linear(16, 11, bias=False)
        self.logits.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(F.gelu(self.mix(self.table(tokens) + self.position)))


class UsedTwice(nn.Module):
    """One convolution applied to its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.leave = nn.Conv2d(12, 12, 3, padding=1), conv_bn(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.relu(self.conv(F.relu(self.conv(x)))))


class BakedIn(nn.Module):
    """Sizes written into the forward as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.leave = conv_bn(12, 64), nn.Linear(64, 64), conv_bn(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).view(-1, 64, 64)
        y = self.mix(y.transpose(1, 2)).transpose(1, 2)
        return self.leave(y.reshape(-1, 64, 8, 8))


class Attributes(nn.Module):
    """The same with the sizes as attributes, which follow."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.side = 20, 8
        self.conv, self.mix, self.leave = conv_bn(12, 20), nn.Linear(20, 20), conv_bn(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).view(-1, self.width, 64)
        y = y + self.mix(y.transpose(1, 2)).transpose(1, 2)
        return self.leave(y.reshape(-1, self.width, self.side, self.side))


class Gated(nn.Module):
    """A gated linear unit: two halves multiplied."""

    def __init__(self, native: bool) -> None:
        super().__init__()
        self.native = native
        self.enter, self.leave = nn.Conv2d(12, 20, 1), conv_bn(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.native:
            return self.leave(F.glu(x, 1))
        value, gate = x.chunk(2, 1)
        return self.leave(value * gate.sigmoid())


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = conv_bn(12, 16), conv_bn(16, 12)
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        gate = F.adaptive_avg_pool2d(x, 1)
        return self.leave(x * self.up(F.relu(self.down(gate))).sigmoid())


class Normalised(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Conv2d(12, 24, 3, padding=1), nn.GroupNorm(groups, 24), conv_bn(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.relu(self.norm(self.enter(x))))


class Slopes(nn.Module):
    """PReLU with a slope per channel, layer scale, and a buffer that `state_dict` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.act, self.leave = nn.Conv2d(12, 10, 3), nn.PReLU(10), conv_bn(10, 12)
        self.scale = nn.Parameter(torch.randn(10, 1, 1))
        self.register_buffer("shift", torch.randn(10, 1, 1, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.act(self.enter(x)) * self.scale + self.shift)


class Sliced(nn.Module):
    """Partial convolution (FasterNet): the first channels are convolved, the rest pass."""

    def __init__(self) -> None:
        super().__init__()
        self.part = 4
        self.conv, self.leave = nn.Conv2d(4, 4, 3, padding=1), conv_bn(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.cat([self.conv(x[:, : self.part]), x[:, self.part :]], 1))


class Spread(nn.Module):
    """Mean over channels (spatial attention): its divisor stays the dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.leave = nn.Conv2d(1, 1, 3, padding=1), conv_bn(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(x * self.conv(x.mean(1, keepdim=True)).sigmoid())


class Permuted(nn.Module):
    """Channels picked by a constant index, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 10, 0]))
        self.leave = conv_bn(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(x[:, self.order])


class Attention(nn.Module):
    """Multi-head attention over pixels, its projections apart, with or without normalised queries."""

    def __init__(self, fused: bool, norm: bool = False) -> None:
        super().__init__()
        self.fused, self.num_heads, self.head_dim = fused, 5, 6
        self.query, self.key, self.value = (nn.Linear(12, 30) for _ in range(3))
        self.q_norm = nn.LayerNorm(6) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(6) if norm else nn.Identity()
        self.proj = nn.Linear(30, 12)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)
        q, k, v = (
            self.q_norm(self.heads(self.query(x))),
            self.k_norm(self.heads(self.key(x))),
            self.heads(self.value(x)),
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) / 6**0.5).softmax(-1) @ v
        y = x + self.proj(y.transpose(1, 2).flatten(2))
        return y.transpose(1, 2).reshape(shape)


class ChannelAttention(nn.Module):
    """Attention between the channels of a head (XCiT): queries and keys of unit length, a temperature per head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(12, 72), nn.Linear(24, 12)
        self.temperature = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(n, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1)
        q, k, v = F.normalize(qkv[0], dim=-1), F.normalize(qkv[1], dim=-1), qkv[2]
        y = ((q @ k.transpose(-1, -2)) * self.temperature).softmax(-1) @ v
        y = self.proj(y.permute(0, 3, 1, 2).flatten(2))
        return x + y.transpose(1, 2).reshape(n, -1, h, w)


class UnitLength(nn.Module):
    """Channels divided by their length."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = conv_bn(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.normalize(x, dim=1))


class Detector(nn.Module):
    """Two scales, an upsampled path between them, and a head that decodes boxes from distributions (YOLOv8)."""

    BINS = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Sequential(conv_bn(3, 12), C2f(sizes=True)), conv_bn(12, 16, stride=2)
        self.pool, self.up = nn.Sequential(conv_bn(16, 12, 1), Sppf()), nn.Upsample(scale_factor=2)
        self.merge = conv_bn(24, 14)
        self.boxes = nn.ModuleList(nn.Sequential(conv_bn(c, 8), nn.Conv2d(8, 4 * self.BINS, 1)) for c in (14, 12))
        self.classes = nn.ModuleList(nn.Sequential(conv_bn(c, 6), nn.Conv2d(6, 3, 1)) for c in (14, 12))
        self.register_buffer("bins", torch.arange(self.BINS, dtype=torch.float64).view(1, 1, -1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stem(x)
        coarse = self.pool(self.down(fine))
        scales = self.merge(torch.cat([fine, self.up(coarse)], 1)), coarse
        boxes = torch.cat([head(scale).flatten(2) for head, scale in zip(self.boxes, scales, strict=True)], 2)
        logits = torch.cat([head(scale).flatten(2) for head, scale in zip(self.classes, scales, strict=True)], 2)
        n, _, anchors = boxes.shape
        return (boxes.view(n, 4, self.BINS, anchors).softmax(2) * self.bins).sum(2), logits.sigmoid()


BLOCKS = {
    "c2f by chunk": (lambda: C2f(sizes=False), "program"),
    "c2f by sizes": (lambda: C2f(sizes=True), "program"),
    "sppf": (Sppf, "module"),
    "same tensor concatenated twice": (Twice, "module"),
    "pixel shuffle": (Upsample, "module"),
    "channel shuffle by view": (Shuffle, "module"),
    "channel shuffle": (lambda: Shuffle(native=True), "module"),
    "depthwise multiplier": (Multiplied, "module"),
    "transposed convolution after a view": (Decoder, "program"),
    "shared parameter": (SharedParameter, "module"),
    "convolution used twice": (UsedTwice, "module"),
    "shapes in the forward": (BakedIn, "program"),
    "shapes in attributes": (Attributes, "module"),
    "glu": (lambda: Gated(native=True), "module"),
    "glu by chunk": (lambda: Gated(native=False), "module"),
    "squeeze and excite": (SqueezeExcite, "module"),
    "group norm": (lambda: Normalised(4), "module"),
    "instance-like group norm": (lambda: Normalised(24), "module"),
    "slopes, scale and buffer": (Slopes, "module"),
    "partial convolution": (Sliced, "module"),
    "mean over channels": (Spread, "program"),
    "indexed channels": (Permuted, "program"),
    "unit length": (UnitLength, "module"),
    "channel attention": (ChannelAttention, "module"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    build, kind = BLOCKS[name]
    program, result = law(Head(build()), (torch.randn(2, 3, 8, 8),))
    assert {frozen.operator for frozen in program.groups.frozen} == {"output"}
    assert result.kind == kind, result.reason
    assert bool(result.reason) == (kind == "program")


def test_tied_embedding():
    program, result = law(TiedEmbedding(), (torch.randint(0, 11, (2, 7)),))
    assert result.kind == "module", result.reason
    assert result.module.logits.weight is result.module.table.weight
    assert list(program.groups.widths) == [16]  # the layer's output is read by the table that feeds the layer


ATTENTIONS = {"fused": (True, False), "by hand": (False, False), "normalised queries": (True, True)}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_whole_heads(name):
    program, result = law(Head(Attention(*ATTENTIONS[name])), (torch.randn(2, 3, 4, 4),), "heads")
    assert 5 in program.groups.widths and 6 not in program.groups.widths
    assert result.kind == "module", result.reason


@pytest.mark.parametrize("name", ATTENTIONS)
def test_dims_of_heads(name):
    program, result = law(Head(Attention(*ATTENTIONS[name])), (torch.randn(2, 3, 4, 4),), "dims")
    assert list(program.groups.widths).count(6) == 2  # queries with keys, and values
    assert 5 not in program.groups.widths
    assert result.kind == "program"  # one head_dim for queries and values alike: the forward cannot follow two


def test_detector():
    program, _ = law(Detector(), (torch.randn(1, 3, 8, 8),))
    frozen = {entry.parameter for entry in program.groups.frozen}
    assert frozen == {f"{head}.{scale}.1.weight" for head in ("boxes", "classes") for scale in (0, 1)}

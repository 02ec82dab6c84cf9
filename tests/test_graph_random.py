"""The law on networks nobody drew: random compositions of the ways in which tensors are wired."""

import numpy as np
import torch
import torch.nn.functional as F
from graph_law import assert_same, law, masked, outputs, random_keep
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hwprune.graph import resize

STEPS = (
    "conv",
    "grouped",
    "depthwise",
    "norm",
    "relu",
    "add",
    "mul",
    "cat",
    "chunk",
    "slice",
    "pad",
    "shuffle",
    "gate",
)


class Wired(nn.Module):
    """Every step reads the tensors `i` and `j` so far (modulo their number) and appends its result."""

    def __init__(self, steps: list[tuple[str, int, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict()
        widths = [4, 4]
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        for index, (name, i, j, size) in enumerate(steps):
            a, b = widths[i % len(widths)], widths[j % len(widths)]
            key = str(index)
            width = a
            if name == "conv":
                self.layers[key] = nn.Conv2d(a, size, 3, padding=1)
                width = size
            elif name == "grouped":
                self.layers[key] = nn.Conv2d(a, 2 * size, 1, groups=2 if a % 2 == 0 else 1)
                width = 2 * size
            elif name == "depthwise":
                self.layers[key] = nn.Conv2d(a, a, 3, padding=1, groups=a)
            elif name == "norm":
                self.layers[key] = nn.BatchNorm2d(a)
            elif name == "gate" or (name in ("add", "mul") and a != b):
                self.layers[key] = nn.Conv2d(b, a, 1)
            elif name == "cat":
                width = a + b
            elif name == "chunk":
                width = (a + 1) // 2
            elif name == "slice":
                width = max(1, a - size % a)
            elif name == "pad":
                width = a + size
            widths.append(width)
        self.classifier = nn.Linear(widths[-1] + widths[-2], 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        values = [first, first.relu()]
        for index, (name, i, j, size) in enumerate(self.steps):
            a, b = values[i % len(values)], values[j % len(values)]
            layer = self.layers[str(index)] if str(index) in self.layers else nn.Identity()
            values.append(self.step(name, layer, a, b, size))
        return self.classifier(torch.cat(values[-2:], 1).mean((2, 3)))

    def step(self, name: str, layer: nn.Module, a: Tensor, b: Tensor, size: int) -> Tensor:
        width = a.shape[1]
        if name in ("add", "mul"):
            return a + layer(b) if name == "add" else a * layer(b)
        if name == "gate":
            return a * F.adaptive_avg_pool2d(layer(b), 1).sigmoid()
        if name == "cat":
            return torch.cat([a, b], 1)
        if name == "chunk":
            return a.chunk(2, 1)[0]
        if name == "slice":
            return a[:, size % width :]
        if name == "pad":
            return F.pad(a, (0, 0, 0, 0, size // 2, size - size // 2))
        if name == "shuffle":
            return a.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) if width % 2 == 0 else a
        return a.relu() if name == "relu" else layer(a)


step = st.tuples(st.sampled_from(STEPS), st.integers(0, 7), st.integers(0, 7), st.integers(1, 5))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(steps=st.lists(step, min_size=2, max_size=9), seed=st.integers(0, 99))
def test_random_wirings_obey_the_law(steps, seed):
    torch.manual_seed(seed)
    program, _ = law(Wired(steps), (torch.randn(2, 3, 4, 4),), seed=seed)
    assert {frozen.operator for frozen in program.groups.frozen} <= {"output"}
    removable = np.flatnonzero(program.groups.removable)
    for removed in (removable, np.random.default_rng(seed).choice(removable, len(removable) // 2, replace=False)):
        stays = ~np.isin(np.arange(len(program.groups)), removed)
        keep = random_keep(program, seed) & np.repeat(stays, program.groups.widths)
        small = outputs(resize(program, keep).eval(), program.example_inputs)
        assert_same(small, outputs(masked(program, keep), program.example_inputs))

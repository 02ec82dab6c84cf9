"""The law of the graph room: masked model = resized program = cut module, to floating-point tolerance."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hwprune.graph import Cut, Program, cut, resize, trace
from hwprune.graph.trace import get_tensor

TOLERANCE = 1e-9  # of the largest output value; everything here runs in float64


def prepare(model: nn.Module) -> nn.Module:
    """In float64 and inference mode, with nothing left at an initial zero behind which a mistake could hide."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.std() if parameter.numel() > 1 else torch.zeros(())
            parameter += 0.1 * torch.randn_like(parameter) * (spread if spread > 1e-6 else 1.0)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.2)
    return model


def random_keep(program: Program, seed: int = 0, fraction: float = 0.6, normalised: bool = False) -> np.ndarray:
    """Every channel stays with this probability, one at least in a group; normalised groups stay whole unless asked."""
    groups = program.groups
    random = np.random.default_rng(seed)
    keep = random.random(groups.total) < fraction
    for group, first, width in zip(groups, groups.offsets, groups.widths, strict=False):
        keep[first + random.integers(width)] = True
        if group.normalised and not normalised:
            keep[first : first + width] = True
    return keep


def masked(program: Program, keep: np.ndarray) -> nn.Module:
    """The dense program with every slice of the removed channels at zero."""
    module = copy.deepcopy(program.module)
    groups = program.groups
    for group, first, width in zip(groups, groups.offsets, groups.widths, strict=False):
        dead = np.flatnonzero(~keep[first : first + width])
        for slot in group.slots:
            if "running_" not in slot.parameter:
                gone = torch.from_numpy(slot.positions[dead].reshape(-1))
                get_tensor(module, slot.parameter).detach().index_fill_(slot.dim, gone, 0)
    return module


def outputs(module: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(module(*inputs)) if isinstance(leaf, Tensor)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [leaf.shape for leaf in found] == [leaf.shape for leaf in expected]
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0, "an output of zeros shows nothing"
        assert (a - b).abs().max() <= TOLERANCE * b.abs().max()


def check_law(program: Program, model: nn.Module, keep: np.ndarray) -> Cut:
    """Assert the law for one keep vector, on the example inputs; returns the cut."""
    inputs = program.example_inputs
    small = resize(program, keep).eval()
    exact = all(
        group.normalised is None or keep[first : first + group.width].all()
        for group, first in zip(program.groups, program.groups.offsets, strict=False)
    )
    expected = outputs(small, inputs)
    if exact:
        assert_same(expected, outputs(masked(program, keep), inputs))
    result = cut(model, program, keep)
    assert_same(outputs(result.module.eval(), inputs), expected)
    removed = not keep.all()
    counts = [sum(p.numel() for p in m.parameters()) for m in (result.module, model)]
    assert counts[0] < counts[1] if removed else counts[0] == counts[1]
    return result


def law(model: nn.Module, inputs: tuple[Tensor, ...], attention: str = "heads", seed: int = 0) -> tuple[Program, Cut]:
    """Trace a prepared copy of `model` and hold it to the law; returns the program and the cut of the exact keep."""
    model = prepare(model)
    program = trace(model, tuple(x.double() if x.is_floating_point() else x for x in inputs), attention)
    assert_same(outputs(program, program.example_inputs), outputs(model, program.example_inputs))
    exact = check_law(program, model, random_keep(program, seed))
    if any(group.normalised for group in program.groups):
        check_law(program, model, random_keep(program, seed, normalised=True))
    return program, exact

"""Least-squares refit: what is left of a layer's inputs is made to stand in for what is pruned, without training.

A consumer is a convolution or linear layer that reads pruned channels. As a matrix product over unfolded inputs its
pre-activations are y = x W, of which the pruned network has only the kept columns x_S. In the order in which the
network runs them, every consumer gets the weights A and the shift b of

    minimise   Σ over rows ‖y - x̃_S A - b‖²  +  ridge · tr(G) / K · ‖A - W_S‖²,        G = Σ x̃_S' x̃_S, centred

with y of the dense network and x̃ of the pruned one, in which all consumers before have been refitted already: what one
layer could not make up for, the next ones see and can. He et al. 2017 ("channel pruning", arXiv 1707.06168, section
3.1) refit one layer at a time so; the ridge towards the weights as they are, in place of zero, is a choice made here.

Batch norms of the pruned network normalise by the batch meanwhile, as they will once their statistics are measured
anew, which is left to :func:`hwprune.train.recalibrate`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hwprune.errors import InvalidInput
from hwprune.graph import Groups
from hwprune.nn import ColumnPrunedConv2d, batch_statistics, mask_

IMAGES = 512  # that calibrate
_ROWS_PER_COLUMN, _LEAST_ROWS = 8, 4096  # rows of the unfolded input that are looked at
_CHUNK = 4096  # rows in memory at a time


@dataclass(frozen=True, eq=False)
class Consumer:
    """A convolution or linear layer that reads channels of groups; its weight is a matrix [O, K] over unfolded inputs.

    channels: [K] int64, the flat channel that each column reads, -1 where it cannot be pruned. centred: a constant
    added to its output does no harm, because it has a bias or a batch norm follows.
    """

    name: str
    module: nn.Conv2d | nn.Linear
    channels: NDArray[np.int64]
    centred: bool

    @property
    def matrix(self) -> Tensor:
        """The weight, unmasked. [O, K] float64"""
        return self._weight.detach().double().flatten(1)

    @torch.no_grad()
    def set_matrix(self, matrix: Tensor) -> None:
        """Replace the weight, in place."""
        self._weight.copy_(matrix.view_as(self._weight))

    @property
    def _weight(self) -> Tensor:
        found = self.module._parameters["weight"]
        assert found is not None
        return found

    def unfolded(self, x: Tensor, rows: Tensor) -> Tensor:
        """Some rows of the unfolded input ``x``, counted over batch and output positions. [R, K] float64"""
        module = self.module
        if isinstance(module, nn.Linear):
            return x.flatten(0, -2)[rows].double()
        x = F.pad(x, _padding(module), mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
        height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        image, row, column = rows // (height * width), rows // width % height * sh, rows % width * sw
        down = row[:, None] + torch.arange(kh, device=x.device) * dh  # [R, kh]
        right = column[:, None] + torch.arange(kw, device=x.device) * dw
        patches = x.permute(0, 2, 3, 1)[image[:, None, None], down[:, :, None], right[:, None, :]]  # [R, kh, kw, C]
        return patches.permute(0, 3, 1, 2).flatten(1).double()

    def flat_output(self, y: Tensor) -> Tensor:
        """The output as rows. [R, O]"""
        return y.flatten(0, -2) if isinstance(self.module, nn.Linear) else y.permute(0, 2, 3, 1).flatten(0, 2)


@dataclass(frozen=True)
class Refit:
    """What a refit did.

    errors: consumer -> squared error of its pre-activations on the calibration rows, before and after, as parts of
    their variance. left: modules that read pruned channels and were left alone.
    """

    errors: Mapping[str, tuple[float, float]]
    left: tuple[str, ...]


@torch.no_grad()
def refit_(
    model: nn.Module,
    groups: Groups,
    keep: Any,
    batches: Iterable[Any],
    *,
    ridge: float = 1e-4,
    images: int = IMAGES,
) -> Refit:
    """Change the weights of all consumers of pruned channels, in place, so that they make up for what is pruned.

    The network has to be cut to ``keep`` afterwards, and its batch norms recalibrated; as a dense one it is worse than
    before. Left alone and named in the answer are grouped convolutions, layers that run more than once or share their
    weight, whatever is neither ``Conv2d`` nor ``Linear``, and readers of channels that a layer norm normalises over,
    where masking is not cutting. Depthwise convolutions do not mix channels, and readers of a residual block's channels
    that are all removed read none: there is nothing to refit.

    Args:
        keep: [ΣC] bool, the channels that stay. batches: ``(inputs, targets)``; targets are not looked at.
        ridge: pull towards the weights as they are, as a part of the inputs' mean variance.
        images: of the batches to calibrate on, all at once; they decide how much memory it takes.

    Raises:
        InvalidInput: an empty group, no batch, or a ridge that is not positive; the network is masked already.
    """
    if not ridge > 0:
        raise InvalidInput(f"ridge={ridge} must be positive: with fewer rows than columns nothing else holds")
    kept = groups.check_keep(keep)
    found, others = consumers(model, groups)
    pruned = np.append(~kept, False)  # [-1] is what cannot be pruned
    wanted = [c for c in found if pruned[c.channels].any() and not pruned[c.channels].all()]  # some is left to refit
    left = [name for name, channels in others.items() if pruned[channels].any()]
    inputs = first_images(batches, images, next(model.parameters()).device)
    rows: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    errors: dict[str, tuple[float, float]] = {}
    runs: Counter[str] = Counter()

    def remember(consumer: Consumer, x: Tensor, y: Tensor) -> None:
        runs[consumer.name] += 1
        flat = consumer.flat_output(y)
        rows[consumer.name] = sample_rows(len(flat), len(consumer.channels), flat.device)
        dense[consumer.name] = flat[rows[consumer.name]]

    def solve(consumer: Consumer, x: Tensor) -> None:
        if runs[consumer.name] == 1:
            columns = torch.from_numpy(np.flatnonzero(~pruned[consumer.channels])).to(x.device)
            name = consumer.name
            errors[name] = _refitted(consumer, x, rows[name], dense.pop(name), columns, ridge)

    with evaluated(model), observed(wanted, after=remember):
        model(*inputs)
    masked = mask_(model, groups)
    try:
        masked.set(torch.from_numpy(kept).to(next(model.parameters())))
        with batch_statistics(model), observed(wanted, before=solve):
            model(*inputs)
    finally:
        masked.unmask_()
    left += [consumer.name for consumer in wanted if consumer.name not in errors]
    return Refit(errors, tuple(left))


def consumers(model: nn.Module, groups: Groups) -> tuple[list[Consumer], dict[str, NDArray[np.int64]]]:
    """The layers that a refit can change; and the others that read channels of groups, by name, with the channels."""
    holders = Counter(
        id(tensor) for module in model.modules() for tensor in module._parameters.values() if tensor is not None
    )
    channels: dict[tuple[str, int], NDArray[np.int64]] = {}
    folded: set[str] = set()
    normalised: set[int] = set()
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for group, first in zip(groups, groups.offsets[:-1].tolist(), strict=True):
        flat = first + np.arange(group.width)
        if group.normalised is not None:
            normalised.update(flat.tolist())
        for slot in group.slots:
            if slot.role == "out" and slot.folded:
                folded.add(slot.parameter)
            if slot.role != "in" or slot.parameter not in tensors:
                continue
            key = (slot.parameter, slot.dim)
            line = channels.setdefault(key, np.full(tensors[slot.parameter].shape[slot.dim], -1, np.int64))
            line[slot.positions] = flat[:, None]
    found, left = [], {}
    for (parameter, dim), line in channels.items():
        path, _, name = parameter.rpartition(".")
        module = model.get_submodule(path)
        plain = isinstance(module, nn.Conv2d) and module.groups == 1 and not isinstance(module, ColumnPrunedConv2d)
        once = holders[id(tensors[parameter])] == 1 and normalised.isdisjoint(line.tolist())
        if not ((plain or isinstance(module, nn.Linear)) and name == "weight" and dim == 1 and once):
            left[path] = line[line >= 0]
            continue
        assert isinstance(module, nn.Conv2d | nn.Linear)
        taps = module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else 1
        centred = module.bias is not None or parameter in folded
        found.append(Consumer(path, module, np.repeat(line, taps), centred))
    return found, left


def first_images(batches: Iterable[Any], images: int, device: torch.device) -> tuple[Tensor, ...]:
    """The inputs of the first batches, joined, at most ``images`` of them. Raises InvalidInput without any batch."""
    parts: list[tuple[Tensor, ...]] = []
    count = 0
    for inputs, _ in batches:
        parts.append(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,))
        count += len(parts[-1][0])
        if count >= images:
            break
    if not count:
        raise InvalidInput("there is no batch to calibrate on; give at least one")
    return tuple(torch.cat(column)[:images].to(device) for column in zip(*parts, strict=True))


def sample_rows(total: int, columns: int, device: torch.device) -> Tensor:
    """Which of ``total`` rows to look at, ascending, the same ones every time: enough for so many columns. [R]"""
    count = min(total, max(_LEAST_ROWS, _ROWS_PER_COLUMN * columns))
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(total))[:count]
    return chosen.sort().values.to(device)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def observed(
    wanted: Iterable[Consumer],
    *,
    before: Callable[[Consumer, Tensor], None] | None = None,
    after: Callable[[Consumer, Tensor, Tensor], None] | None = None,
) -> Iterator[None]:
    """Calls ``before(consumer, input)`` and ``after(consumer, input, output)`` around the run of every consumer."""
    handles = []
    for consumer in wanted:
        if before is not None:
            handles.append(consumer.module.register_forward_pre_hook(lambda _, args, c=consumer: before(c, args[0])))
        if after is not None:
            handles.append(consumer.module.register_forward_hook(lambda _, args, y, c=consumer: after(c, args[0], y)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refitted(
    consumer: Consumer, x: Tensor, rows: Tensor, wanted: Tensor, columns: Tensor, ridge: float
) -> tuple[float, float]:
    """Change a consumer so that ``columns`` of its input give ``wanted`` [R, O]; the errors before and after."""
    matrix, bias = consumer.matrix, consumer.module._parameters["bias"]
    mine = matrix[:, columns].T  # [K, O]
    gram = mine.new_zeros(len(columns), len(columns))
    cross = torch.zeros_like(mine)
    mean_x, mean_r, mean_y = mine.new_zeros(len(columns)), mine.new_zeros(mine.shape[1]), mine.new_zeros(mine.shape[1])
    square_r = square_y = 0.0
    for some, y in zip(torch.split(rows, _CHUNK), torch.split(wanted, _CHUNK), strict=True):
        part, y = consumer.unfolded(x, some)[:, columns], y.double()
        residual = y - part @ mine
        if bias is not None:
            residual -= bias
        gram += part.T @ part
        cross += part.T @ residual
        mean_x += part.sum(0) / len(rows)
        mean_r += residual.sum(0) / len(rows)
        mean_y += y.sum(0) / len(rows)
        square_r += float(residual.square().sum())
        square_y += float(y.square().sum())
    if consumer.centred:
        gram -= len(rows) * torch.outer(mean_x, mean_x)
        cross -= len(rows) * torch.outer(mean_x, mean_r)
        square_r -= len(rows) * float(mean_r.square().sum())
    spread = max(square_y - len(rows) * float(mean_y.square().sum()), torch.finfo(torch.float64).tiny)
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny)
    change = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))  # [K, O]
    matrix[:, columns] += change.T
    consumer.set_matrix(matrix)
    if bias is not None:
        bias.add_(mean_r - mean_x @ change)
    # With the ridge in the Gram this bounds the error from above, by as much as the ridge costs.
    after = square_r - 2 * float((change * cross).sum()) + float((change * (gram @ change)).sum())
    return max(square_r, 0.0) / spread, max(after, 0.0) / spread


def _padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Left, right, top, bottom."""
    if not isinstance(conv.padding, str):
        (top, left) = conv.padding
        return left, left, top, top
    if conv.padding == "valid":
        return 0, 0, 0, 0
    down, right = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return right // 2, right - right // 2, down // 2, down - down // 2

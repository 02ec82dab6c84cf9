"""Training-free pruning by joint sparse representation: which channels can the readers of a stream do without?

The model of Dao et al. (arXiv 1410.7876; see :mod:`hwprune.search.csr_solver`) turned to pruning, all of it a
reconstruction. The event is a batch of calibration images; the sensors are the consumers of one coupled group, layers
whose weights W^m read the same channels out of their unfolded inputs X^m; the atoms are the channels. Rows of A = [A^m]
that belong to one channel are kept for every consumer or for none:

    minimise   Σ_m s_m ‖X^m W^m - X^m A^m‖²      with A^m zero in the rows of all channels but n

Only Grams X'X enter, so that images are read once. Two ways to choose the n channels:

    eliminate   from all channels down, each time the one whose removal costs least when all others are refitted. With
                H = (X'X + ridge)^-1 the price of channel b is tr(W_b' H_bb^-1 W_b), and H and W are updated by Schur
                complements: the optimal brain surgeon (Hassibi and Stork 1993) for blocks of columns in several layers
    lasso       by where a channel enters the path of the joint lasso ½ Σ_m s_m ‖X^m W^m - Σ_i β_i^m X_i^m W_i^m‖² + λ
                Σ_i ‖β_i‖, one coefficient per channel and consumer, and the same refit

Either gives e_g(n), the error with n channels and refitted consumers, in one pass; s_m makes it relative to the
variance of each consumer's output. How far such errors move the output of the whole network differs from group to
group, and is measured: each group alone is brought to a few widths, its consumers refitted, and the squared distance of
the outputs from those of the dense network, relative to their variance and interpolated along e_g, is what the widths
of the group cost. (Without that, the Fisher information as the weight of errors crushed the last layers of resnet20.)
The exact allocator minimises the sum over groups within the budget. The consumers of the network that is cut are
refitted at the end, by :func:`hwprune.refit.refit_`.
"""

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hwprune.errors import InvalidInput
from hwprune.importance import importance
from hwprune.nn import batch_statistics
from hwprune.refit import IMAGES, Consumer, consumers, evaluated, first_images, observed, sample_rows
from hwprune.search.base import Context, Method
from hwprune.search.csr_solver import from_gram, path

Order = Literal["eliminate", "lasso"]

_CHUNK = 4096  # rows of unfolded inputs in memory at a time
_SHARES = (0.75, 0.5, 0.25, 0.1)  # of the channels of a group at which the output of the network is looked at


class CSR(Method):
    """Chooses channels by how well the others can stand in for them. Nothing is masked and nothing trained.

    Args:
        order: how channels of a group are ordered, see above.
        images: held-out images that the Grams come from; the first ``judges`` of them also judge the outputs. Every
            width that is looked at takes a forward of the whole network on those, so that they decide how long the
            choice takes; more of them made no better networks (resnet20 and resnet56 at 80, 70, 60 and 50 % of their
            FLOPs: within seven of 1,017 test images of what 256 gave, above it in six cases, below in two).
        ridge: added to a Gram's diagonal, as a part of its mean.
    """

    name = "csr"
    summary = "training-free: joint selection over all readers of a channel, errors after a least-squares refit"
    source = "reconstruction on the model of Dao et al. (arXiv 1410.7876)"
    searches = False
    refits = True

    def __init__(
        self,
        order: Order = "eliminate",
        images: int = IMAGES,
        judges: int = 32,
        ridge: float = 1e-4,
    ) -> None:
        if order not in get_args(Order):
            raise InvalidInput(f"order={order!r} is unknown; possible: {', '.join(get_args(Order))}")
        if not 1 <= judges <= images or not ridge > 0:
            raise InvalidInput(f"judges={judges} must lie between 1 and images={images}, and ridge={ridge} be positive")
        self.order, self.images, self.judges, self.ridge = order, images, judges, ridge

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.held_out is None:
            raise InvalidInput("channels are chosen by what they carry on images: give held-out images")
        self._found: tuple[Tensor, Tensor] | None = None

    def finish(self) -> None:
        self._solved()

    def widths(self) -> Tensor:
        return self.within_budget()

    def ranking(self) -> Tensor:
        """How late each channel is given up, from 1 / C to 1."""
        return self._solved()[0]

    def values(self) -> Tensor:
        """Minus how far n channels and refitted consumers move the output of the network."""
        return self._solved()[1]

    def log(self) -> dict[str, float]:
        """The cost of the dense network, which is what trains."""
        return {"cost_hard": float(self.context.cost.dense)}

    def _solved(self) -> tuple[Tensor, Tensor]:
        """Ranking and values, found once."""
        if self._found is None:
            self._found = self._solve()
        return self._found

    @torch.no_grad()
    def _solve(self) -> tuple[Tensor, Tensor]:
        context, groups = self.context, self.context.groups
        held_out = context.held_out
        assert held_out is not None
        context.masked.set(None)
        endless = iter(held_out.batch, None)
        inputs = first_images(endless, self.images, context.device)
        sensors = _sensors(context, inputs, self.ridge)
        judge = _Judge(context, tuple(part[: self.judges] for part in inputs))
        ranking = importance(context.model, groups, "l2").double().cpu()
        value = torch.zeros(groups.total, dtype=torch.float64)
        for g, (first, last) in enumerate(zip(groups.offsets[:-1].tolist(), groups.offsets[1:].tolist(), strict=True)):
            mine = [sensor for sensor in sensors if sensor.reads(first, last)]
            stops = sorted({max(1, round(share * (last - first))) for share in _SHARES} - {last - first})
            if mine:
                given = _entered(mine, first, last).flip(0) if self.order == "lasso" else None
                order, errors, stages = _eliminated(mine, first, last, given, stops)
                moved = [judge.refitted(mine, stages[stop]) for stop in stops]
            else:  # nobody can make up for anything: by the norms of the weights
                rising = ranking[first:last].sort()
                order, lost = rising.indices, rising.values.cumsum(0) / rising.values.sum()
                errors = torch.cat([lost[:-1].flip(0), lost.new_zeros(1)])
                moved = [judge.masked(first + order[: last - first - stop]) for stop in stops]
            value[first:last] = -_along(errors, [float(errors[stop - 1]) for stop in stops], moved)
            ranking[first:last][order] = torch.arange(1, groups.widths[g] + 1, dtype=torch.float64) / (last - first)
        return ranking.float(), value


class _Sensor:
    """A consumer and what its inputs are like.

    gram: with the ridge; inverse: its inverse. [K, K] mean: of the inputs. [K] scale: s^½, one over the standard
    deviation of the outputs. channels: [K] the flat channel of each column.
    """

    def __init__(self, consumer: Consumer, gram: Tensor, mean: Tensor, scale: float, ridge: float) -> None:
        gram.diagonal().add_(ridge * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny)
        self.consumer, self.gram, self.mean, self.scale = consumer, gram, mean, scale
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.channels = consumer.channels

    @property
    def weights(self) -> Tensor:
        """[K, O], scaled."""
        return (self.scale * self.consumer.matrix.T).contiguous()

    def reads(self, first: int, last: int) -> bool:
        return bool(((self.channels >= first) & (self.channels < last)).any())

    def blocks(self, first: int, last: int) -> Tensor:
        """The columns of every channel of a group, padded with -1. [C, b]"""
        owner = self.channels - first
        inside = np.flatnonzero((owner >= 0) & (owner < last - first))
        inside = inside[np.argsort(owner[inside], kind="stable")]
        counts = np.bincount(owner[inside], minlength=last - first)
        place = np.arange(len(inside)) - np.repeat(np.cumsum(counts) - counts, counts)
        found = np.full((last - first, int(counts.max())), -1)
        found[owner[inside], place] = inside
        return torch.from_numpy(found).to(self.gram.device)


def _sensors(context: Context, inputs: tuple[Tensor, ...], ridge: float) -> list[_Sensor]:
    """All consumers that run once, with Grams of their inputs in the dense network."""
    found, _ = consumers(context.model, context.groups)
    sensors: dict[str, _Sensor] = {}
    often: set[str] = set()

    def look(consumer: Consumer, x: Tensor, y: Tensor) -> None:
        if consumer.name in sensors:
            often.add(consumer.name)
            return
        flat = consumer.flat_output(y)
        rows = sample_rows(len(flat), len(consumer.channels), y.device)
        gram = y.new_zeros((len(consumer.channels),) * 2, dtype=torch.float64)
        mean = gram.new_zeros(len(gram))
        for some in torch.split(rows, _CHUNK):
            part = consumer.unfolded(x, some)
            gram += part.T @ part / len(rows)
            mean += part.sum(0) / len(rows)
        if consumer.centred:
            gram -= torch.outer(mean, mean)
        deviation = float(flat[rows].double().var(0, correction=0).sum().sqrt())
        scale = 1 / deviation if deviation > 0 else 0.0
        sensors[consumer.name] = _Sensor(consumer, gram, mean, scale, ridge)

    with evaluated(context.model), observed(found, after=look):
        context.model(*inputs)
    return [sensor for name, sensor in sensors.items() if name not in often]


class _Judge:
    """How far the output of the whole network moves, on fixed images, when a group's consumers are changed."""

    def __init__(self, context: Context, inputs: tuple[Tensor, ...]) -> None:
        self._context, self._inputs = context, inputs
        self._dense = self._output()

    def refitted(self, sensors: list[_Sensor], weights: list[Tensor]) -> float:
        """With other ``weights`` [K, O] (scaled) in some consumers, shifted to keep their mean."""
        before = []
        for sensor, changed in zip(sensors, weights, strict=True):
            consumer, bias = sensor.consumer, sensor.consumer.module._parameters["bias"]
            before.append((consumer.matrix, None if bias is None else bias.clone()))
            matrix = changed.T / sensor.scale if sensor.scale else consumer.matrix
            if bias is not None:
                bias.add_((consumer.matrix - matrix) @ sensor.mean)
            consumer.set_matrix(matrix)
        moved = self._moved()
        for sensor, (matrix, shift) in zip(sensors, before, strict=True):
            sensor.consumer.set_matrix(matrix)
            if shift is not None:
                sensor.consumer.module._parameters["bias"].copy_(shift)  # type: ignore[union-attr]
        return moved

    def masked(self, channels: Tensor) -> float:
        """Without some channels, and nothing refitted."""
        mask = torch.ones(self._context.groups.total, device=self._context.device)
        mask[channels.to(mask.device)] = 0
        self._context.masked.set(mask)
        moved = self._moved()
        self._context.masked.set(None)
        return moved

    def _output(self) -> Tensor:
        with batch_statistics(self._context.model):
            output = self._context.model(*self._inputs)
        parts = output if isinstance(output, tuple | list) else [output]
        return torch.cat([part.double().flatten(1) for part in parts], 1)

    def _moved(self) -> float:
        output = self._output()
        spread = (self._dense - self._dense.mean(0)).square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        return float((output - self._dense).square().sum() / spread)


def _along(errors: Tensor, known: list[float], moved: list[float]) -> Tensor:
    """The distance at every error, linear through 0 and the known pairs, and beyond them at the last slope. [C]

    ``known`` falls, as the widths rise.
    """
    x = np.array([0.0, *known[::-1]])
    y = np.maximum.accumulate([0.0, *moved[::-1]])
    e = errors.numpy()
    beyond = (y[-1] - y[-2]) / max(x[-1] - x[-2], 1e-12) if len(x) > 1 else 1.0
    return torch.from_numpy(np.interp(e, x, y) + beyond * np.maximum(e - x[-1], 0))


def _eliminated(
    sensors: list[_Sensor], first: int, last: int, given: Tensor | None, stops: list[int]
) -> tuple[Tensor, Tensor, dict[int, list[Tensor]]]:
    """Remove channel after channel, the cheapest first or as ``given`` [C], refitting all others of all sensors.

    Returns the channels in that order, the last one left at the end [C]; the error with n = 1 to C of them [C]; and
    the weights of all sensors [K, O] at the counts ``stops``.
    """
    count = last - first
    states = [(s.inverse.clone(), s.weights, s.blocks(first, last)) for s in sensors]
    device = states[0][0].device
    gone = torch.zeros(count, dtype=torch.bool, device=device)
    order: list[int] = []
    errors: list[float] = []
    stages: dict[int, list[Tensor]] = {}
    for at in range(count - 1):
        price = torch.zeros(count, dtype=torch.float64, device=device)
        for inverse, weights, blocks in states:
            price += _prices(inverse, weights, blocks, gone)
        price[gone] = torch.inf
        chosen = int(price.argmin()) if given is None else int(given[at])
        order.append(chosen)
        errors.append((errors[-1] if errors else 0.0) + float(price[chosen]))
        gone[chosen] = True
        for inverse, weights, blocks in states:
            columns = blocks[chosen][blocks[chosen] >= 0]
            part = inverse[:, columns].clone()  # [K, b]
            factor = torch.linalg.solve(part[columns], part.T)  # [b, K]
            weights -= factor.T @ weights[columns]
            inverse -= part @ factor
            weights[columns] = inverse[columns] = 0  # exactly
            inverse[:, columns] = 0
        if count - at - 1 in stops:
            stages[count - at - 1] = [weights.clone() for _, weights, _ in states]
    order.append(int((~gone).nonzero()[0]))
    return torch.tensor(order), torch.tensor([*errors[::-1], 0.0], dtype=torch.float64), stages


def _prices(inverse: Tensor, weights: Tensor, blocks: Tensor, gone: Tensor) -> Tensor:
    """What removing each channel would add to the error, the others refitted. [C]"""
    there = (blocks >= 0) & ~gone[:, None]  # [C, b]
    both = there[:, :, None] & there[:, None, :]
    square = torch.where(both, inverse[blocks[:, :, None], blocks[:, None, :]], 0.0)  # [C, b, b]
    square.diagonal(dim1=1, dim2=2).add_((~there).to(square))
    rows = torch.where(there[..., None], weights[blocks], 0.0)  # [C, b, O]
    prices: Tensor = (rows * torch.linalg.solve(square, rows)).sum((1, 2))
    return prices


def _entered(sensors: list[_Sensor], first: int, last: int) -> Tensor:
    """Channels in the order in which they enter the joint row-lasso's path; ties by their norm at its end. [C]

    The columns of one channel in one sensor are laid side by side as one row: an atom is the channel's contribution to
    the outputs, X_i W_i, which is scaled as a whole by each output's coefficient.
    """
    dictionaries, signals = [], []
    for sensor in sensors:
        blocks = sensor.blocks(first, last)
        there = (blocks >= 0).to(sensor.weights)
        # Contributions of channels to an output o: atoms D_o [S, C] = X W_·o by channel; D_o' D_o in closed form.
        weights = sensor.weights[blocks] * there[..., None]  # [C, b, O]
        flat = sensor.gram[blocks.clamp_min(0)[:, :, None, None], blocks.clamp_min(0)[None, None]]  # [C, b, C, b]
        gram = torch.einsum("ibo,ibjd,jdo->ij", weights, flat, weights)
        dictionary, signal = from_gram(gram, gram.sum(1, keepdim=True))
        dictionaries.append(dictionary)
        signals.append(signal)
    found = path(dictionaries, signals, count=40, least=1e-3, tolerance=1e-4)
    entered = torch.full((last - first,), float(len(found)), dtype=torch.float64)
    for at, (_, code) in reversed(list(enumerate(found))):
        entered[code.support] = at
    norm = found[-1][1].rows.norm(dim=1)
    return torch.from_numpy(np.lexsort((-norm.numpy(), entered.numpy())))

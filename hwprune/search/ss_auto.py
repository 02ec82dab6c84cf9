"""Row and column pruning at once, with soft constraints, on milliseconds (SS-Auto: Li et al., arXiv 2001.08839).

Seen as a matrix multiplication, a convolution has rows (its filters) and columns: the positions (kh, kw, c) of all
filters. Rows are coupled channels here, over all slices of all members; columns belong to single convolutions. With the
weights M, one copy R whose channels are sparse and one copy C whose columns are, the objective is

    f(M) + Σ w ‖R_c‖ + Σ v ‖C_q‖ + ρ/2 ‖M - R‖² + ρ/2 ‖M - C‖²

The copies have a closed form given M, R_c = s(‖M_c‖) M_c, and are updated before every step, so that they need not be
stored: a step adds ρ (2M - R - C) to the gradient. A channel with R_c = 0 is pulled to 0 at the full rate ρ; a strong
one is hardly touched. That R_c is exactly 0, or C_q, is the decision to prune. (An element lies in two channels, by its
row and by its input; R has a part for either, or the norms of coupled channels would overlap.)

From the paper's abstract: rows and columns at once in one run, soft instead of hard constraints, a primal-proximal
scheme, ratios of layers found automatically. Reconstruction, as its formulas could not be had: all of the above, the
forms of s in :func:`shrink`, and what follows. Norms are relative to the root mean square over their layer, because a
batch norm makes the scale of a layer's weights arbitrary. There is one multiplier: thresholds are τ times a price, and
τ is set to where the cost of what the copies leave meets the budget of the moment, which is the fixed point of dual
ascent. A channel's price is what its group would cost if it ended there: the slope of the cost model times the
channel's place among the norms of its group. So a group becomes cheaper as it shrinks, and is not emptied at once; the
same for the columns of a convolution. (With one price for all of a group, given by its width, a group that was dear for
a moment lost all channels but one, and their weights before the price had fallen: resnet20 at 12 % of the FLOPs, 32 %
with a price per group, 63 % so.) A price is divided by the root of the number of the channel's slices: of what k layers
share, the norm is but √k times that of one layer's, the price k times. ρ rises geometrically. Channels below τ that
the budget has room for, because the last step down was a large one or within their step of the table they are free, are
not pulled at all. Late in the search the decision is fixed; what is pruned stays zero. By then it is past keeping: the
slices of half of the pruned channels are at a fiftieth of their layer's scale or less, those of the best at a tenth (a
hundred steps on digits). So the widths that were found are a limit for what is deployed, and have to fill the budget.

Columns save time only where a kernel that skips them does. ``columns="auto"`` times one on the convolutions of the
first training batch; where it does not pay, the columns of an input are tied together, which is channels alone.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hwprune.errors import InvalidInput
from hwprune.graph import Groups
from hwprune.importance import SHIFTS
from hwprune.latency import Target
from hwprune.latency.timing import settings, time_runs
from hwprune.nn import ColumnPrunedConv2d
from hwprune.ops.reference import group_sum
from hwprune.search.base import Context, Method, best_first, expect_network, group_places, refilled
from hwprune.search.increg import Slices

Kind = Literal["l21", "hard", "firm", "reweighted"]
Columns = Literal["auto", "on", "off"]

_GAMMA = 2.0  # of the firm threshold: from γτ on, a norm is left alone
_EPSILON = 0.1  # beside the squared norm in the weights of the reweighted form, for norms around 1
_LEAST = 1e-12
_PAYS = 0.95  # of the plain time, which half of the columns may take at most


class SSAuto(Method):
    """Pulls weak channels and weak columns to zero, as many as the budget asks for.

    Args:
        prox: the form of :func:`shrink`.
        rho: ρ at the first and at the last step before the deadline. The learning rate times three times the latter
            should stay below 1.
        columns: "auto" prunes columns of those convolutions on whose shapes half of the columns were measured to take
            less time; "on" of all that are not grouped, as if time followed the number of columns; "off" of none.
        deadline: part of the steps after which the decision is fixed.
        interval: steps between two looks at prices and threshold; ``None``: a fiftieth of the steps.
    """

    name = "ss_auto"
    summary = "rows and columns at once, by soft constraints and proximal copies"
    source = "reconstruction of Li et al., arXiv 2001.08839, with a latency budget"
    fills_budget = False

    def __init__(
        self,
        prox: Kind = "firm",
        rho: tuple[float, float] = (0.05, 2.5),
        columns: Columns = "auto",
        deadline: float = 0.75,
        interval: int | None = None,
    ) -> None:
        if prox not in get_args(Kind) or columns not in get_args(Columns):
            raise InvalidInput(
                f"prox={prox!r} must be one of {', '.join(get_args(Kind))}, columns={columns!r} one of "
                f"{', '.join(get_args(Columns))}"
            )
        if not 0 < rho[0] <= rho[1] < math.inf:
            raise InvalidInput(f"rho={rho} must rise from one positive number to another")
        if not 0 < deadline <= 1 or (interval is not None and interval < 1):
            raise InvalidInput(f"deadline={deadline} must lie in (0, 1], interval={interval} be 1 or more")
        self.prox, self.rho, self.column_choice = prox, rho, columns
        self.deadline, self.interval = deadline, interval

    def setup(self, context: Context) -> None:
        super().setup(context)
        groups, device = context.groups, context.device
        self._slices = Slices(context.model, groups, device)
        names = {id(parameter): name for name, parameter in context.model.named_parameters()}
        # What a norm adds says nothing about how much a channel carries; it is pulled along all the same.
        self._voting = [names[id(parameter)].rpartition(".")[2] not in SHIFTS for parameter in self._slices.parameters]
        self._owner = torch.from_numpy(np.repeat(np.arange(len(groups)), groups.widths)).to(device)  # [ΣC]
        self._least = torch.from_numpy(context.minimum).to(device)  # [G]
        self._most = torch.from_numpy(context.maximum).to(device)
        self._convs = _Convolutions(context, enabled=self.column_choice != "off")
        self._row_limits = torch.zeros(groups.total, device=device)  # [ΣC] thresholds of the norms
        self._column_limits = torch.zeros(self._convs.total, device=device)  # [ΣK]
        self.rows = torch.ones(groups.total, dtype=torch.bool, device=device)  # R_c is not 0
        self.kept_columns = torch.ones(self._convs.total, dtype=torch.bool, device=device)  # C_q is not 0
        self._roots = self._relative([torch.ones_like(p) for p in self._slices.parameters])  # [ΣC] of their slices
        self._interval = self.interval or max(1, context.steps // 50)
        self._threshold = 0.0  # τ
        self._fixed = False

    # -- every step

    def after_backward(self, step: int) -> None:
        """Adds the pull to the copies to the gradients: ρ (1 - s) M for each copy."""
        if not self._convs.priced:
            self._convs.measure(self.column_choice)
        if self._fixed:
            return
        if step % self._interval == 0:
            self._set_limits(self.context.controller.target(step))
        rows, columns = self._norms()
        pull = 1 - shrink(rows, self._row_limits, self.prox)
        column_pull = 1 - shrink(columns, self._column_limits, self.prox)
        self.rows, self.kept_columns = pull < 1, column_pull < 1
        rho = self._rho(step)
        of_columns = self._convs.spread(column_pull)
        for parameter, factor in zip(self._slices.parameters, self._slices.spread(pull), strict=True):
            if parameter.grad is not None:
                factor = factor + of_columns.get(id(parameter), 0.0)
                parameter.grad.add_((parameter.detach() * factor).to(parameter.grad), alpha=rho)

    def after_step(self, step: int) -> None:
        if not self._fixed and step + 1 >= self.deadline * self.context.steps:
            self._fix()
        if self._fixed:
            self._project()

    def finish(self) -> None:
        """Zero what is pruned."""
        self._convs.forget()
        if not self._fixed:
            self._fix()
        self._project()

    # -- what was found

    def widths(self) -> Tensor:
        return self._counts(self.rows).double()

    def ranking(self) -> Tensor:
        return (self._norms()[0] * torch.where(self.rows, 1.0, 1e-3)).clamp_min(_LEAST)

    def columns(self) -> Mapping[str, Tensor] | None:
        kept = self.kept_columns | ~self._convs.read(self.rows)  # a channel that is gone takes its columns along
        found = {name: part.cpu() for name, part in self._convs.by_name(kept) if not bool(part.all())}
        return found or None

    def notes(self) -> list[str]:
        return self._convs.notes()

    def state_dict(self) -> dict[str, Any]:
        return {
            "row_limits": self._row_limits.clone(),
            "column_limits": self._column_limits.clone(),
            "rows": self.rows.clone(),
            "kept_columns": self.kept_columns.clone(),
            "threshold": self._threshold,
            "fixed": self._fixed,
            "convolutions": self._convs.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expect_network(
            channels=(len(state["rows"]), len(self.rows)),
            columns=(len(state["kept_columns"]), len(self.kept_columns)),
        )
        self._row_limits.copy_(state["row_limits"])
        self._column_limits.copy_(state["column_limits"])
        self.rows.copy_(state["rows"])
        self.kept_columns.copy_(state["kept_columns"])
        self._threshold, self._fixed = state["threshold"], state["fixed"]
        self._convs.load_state_dict(state["convolutions"])

    def log(self) -> dict[str, float]:
        """Shares kept of the channels and of their columns, τ, and the cost without and with what columns should save.

        Where columns were timed: how many convolutions have a shape for which they pay, and the median time of half and
        of three quarters of the columns beside the plain convolution.
        """
        widths = self.context.rounded(self.widths())
        columns = self.kept_columns[self._convs.read(self.rows)]
        return {
            "kept": float(self.rows.float().mean()),
            "kept_columns": float(columns.float().mean()) if len(columns) else 1.0,
            "threshold": self._threshold,
            "cost_hard": float(self.context.cost.price(widths)),
            "cost_columns": self._cost(self.rows, self.kept_columns),
            **self._convs.verdict(),
        }

    # -- how

    def _rho(self, step: int) -> float:
        """ρ: geometric up to the deadline."""
        low, high = self.rho
        return low * math.pow(high / low, min(1.0, step / max(1.0, self.deadline * self.context.steps - 1)))

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Norms of channels [ΣC] and columns [ΣK], relative to their layers."""
        return self._relative([p.detach().square() for p in self._slices.parameters]), self._convs.norms()

    def _relative(self, squares: list[Tensor]) -> Tensor:
        """Roots of what tensors like the parameters sum up to per channel, relative to their layers. [ΣC]"""
        voting = [square if votes else None for square, votes in zip(squares, self._voting, strict=True)]
        return self._slices.gather(voting, relative=True).sqrt()

    def _counts(self, flags: Tensor) -> Tensor:
        """How many channels of each group are flagged. [G] int64"""
        return group_sum(flags.to(torch.int64), self._owner, len(self._least))

    def _cost(self, rows: Tensor, columns: Tensor) -> float:
        """Cost of the channels [ΣC] that are left, less what missing columns [ΣK] save."""
        context = self.context
        widths = self._counts(rows).cpu().numpy().clip(context.minimum, context.maximum)
        return float(context.cost.price(widths)) - context.cost.dense * self._convs.saved(rows, columns)

    def _set_limits(self, target: float) -> None:
        """Prices as things stand, and the least τ at which the copies cost no more than ``target``."""
        context = self.context
        rows, columns = self._norms()
        widths = self._counts(self.rows)
        slope = context.cost.value_and_grad(widths.double().cpu())[1].to(rows)  # [G]
        place = group_places(rows, self._owner)
        spent = slope[self._owner] * (place + 1) / context.cost.dense
        row_prices = (spent + 1e-3 * spent.mean()) / self._roots.clamp_min(1)  # [ΣC]
        column_prices = self._convs.prices(self.rows, columns)  # [ΣK]
        if self.prox == "reweighted":
            row_prices, column_prices = row_prices / (rows**2 + _EPSILON), column_prices / (columns**2 + _EPSILON)

        row_keys = rows / row_prices.clamp_min(_LEAST)  # the τ from which on a channel is gone
        row_keys = row_keys.masked_fill(place < self._least[self._owner], math.inf)
        row_keys = row_keys.masked_fill(place >= self._most[self._owner], -1.0)
        column_keys = torch.where(column_prices > 0, columns / column_prices.clamp_min(_LEAST), math.inf)
        column_keys = column_keys.masked_fill(self._convs.best(columns), math.inf)

        keys = torch.cat([row_keys, column_keys])
        steps = torch.cat([keys.new_zeros(1), keys[keys.isfinite()].clamp_min(0)]).sort().values
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            if self._cost(row_keys > steps[middle], column_keys > steps[middle]) <= target:
                high = middle
            else:
                low = middle + 1
        self._threshold = float(steps[low])
        row_keys = self._refilled(row_keys, column_keys > self._threshold, target)
        self._row_limits = _limits(row_keys, row_prices, self._threshold)
        self._column_limits = _limits(column_keys, column_prices, self._threshold)

    def _refilled(self, keys: Tensor, columns: Tensor, target: float) -> Tensor:
        """The keys of channels [ΣC], infinite for those below τ that ``target`` has room for after all.

        columns: [ΣK], those that are kept.
        """
        cost, rows = self.context.cost, keys > self._threshold
        first, ordered = self.context.groups.offsets[:-1], keys[best_first(keys, self._owner)].cpu().numpy()
        counts = refilled(
            cost,
            self._counts(rows).cpu().numpy(),
            self._counts(keys > 0).cpu().numpy(),
            target + cost.dense * self._convs.saved(rows, columns),
            lambda widths: ordered[np.minimum(first + widths, len(ordered) - 1)],
        )
        kept = group_places(keys, self._owner) < torch.from_numpy(counts).to(keys.device)[self._owner]
        fits = self._cost(kept, columns) <= target  # what missing columns save depends on the channels
        return keys.masked_fill(kept & ~rows, math.inf) if fits else keys

    def _fix(self) -> None:
        """Decide for good, at the whole budget."""
        self._set_limits(self.context.controller.budget)
        rows, columns = self._norms()
        self.rows = shrink(rows, self._row_limits, self.prox) > 0
        self.kept_columns = shrink(columns, self._column_limits, self.prox) > 0
        self._fixed = True

    @torch.no_grad()
    def _project(self) -> None:
        """Zero what is pruned, whatever momentum has made of it."""
        self._slices.zero_(~self.rows)
        for parameter, gone in self._convs.mapped(~self.kept_columns):
            parameter.masked_fill_(gone, 0)


def shrink(norms: Tensor, limits: Tensor, kind: Kind = "l21", gamma: float = _GAMMA) -> Tensor:
    """The s of the copy s · M that minimises penalty(copy) + ρ/2 ‖M - copy‖², from ‖M‖ and a threshold, of one shape.

    "l21": the penalty w ‖R‖, threshold w / ρ (group lasso). "hard": w where R is not 0, threshold √(2w / ρ).
    "firm": the minimax concave penalty of slope w at 0 (Zhang 2010), threshold w / ρ: 0 below it, whole from ``gamma``
    times it, continuous in between. "reweighted" is "l21" with w / (‖M‖² + ε) for w, which is the caller's to give.
    """
    ratio = limits / norms.clamp_min(_LEAST)
    if kind == "hard":
        return (ratio < 1).to(norms.dtype)
    if kind == "firm":
        return (gamma / (gamma - 1) * (1 - ratio)).clamp(0, 1)
    return (1 - ratio).clamp_min(0)


def _limits(keys: Tensor, prices: Tensor, threshold: float) -> Tensor:
    """τ times the price; 0 for what must stay, infinite for what must go, and just above the key at τ itself."""
    # Rounding must not let a key that is τ pass: what costs are counted without is pruned.
    limits = threshold * prices * (1 + 1e-6)
    return torch.where(keys.isinf(), 0.0, torch.where(keys < 0, math.inf, limits))


class _Convolutions:
    """The columns of all convolutions whose columns may be pruned, laid end to end in (kh, kw, c) order. [ΣK]

    ``total`` is ΣK. ``priced`` says whether it is known what columns save.
    """

    def __init__(self, context: Context, enabled: bool) -> None:
        model, groups, device = context.model, context.groups, context.device
        self._target = context.target
        # The batch whose latency counts; without a program, that of the first training step.
        self._batch = None if context.program is None else context.program.example_inputs[0].shape[0]
        found: dict[str, nn.Conv2d] = {}
        for path, module in model.named_modules():
            numeric = isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
            if enabled and numeric and module.groups == 1 and module.padding_mode == "zeros":
                found[f"{path}.weight" if path else "weight"] = module
        self.names = list(found)
        parameters = dict(model.named_parameters())
        self.parameters = [parameters[name] for name in found]
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the input, from the first forward
        self._modules = list(found.values())
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._look(name)) for name, module in found.items()
        ]
        self._device = device
        count = len(found)
        sizes = [parameter[0].numel() for parameter in self.parameters]
        self.sizes, self.total = sizes, sum(sizes)
        outs = _channels(groups, self.names, self.parameters, 0)
        ins = _channels(groups, self.names, self.parameters, 1)
        per_column = [np.tile(line, size // max(1, len(line))) for line, size in zip(ins, sizes, strict=True)]
        self._in_channel, self._conv_of_column = _joined(per_column, device)  # [ΣK] each
        self._out_channel, self._conv_of_out = _joined(outs, device)  # [ΣF] each
        self._share = torch.zeros(count, device=device)  # of the dense cost that a convolution takes
        self._effect = torch.zeros(count, device=device)  # part of its time saved, per part of the columns missing
        self._times = torch.zeros(count, 2, device=device)  # of half and of three quarters of the columns; plain is 1
        self._timed = False
        self.priced = not count

    def _look(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._shapes.setdefault(name, tuple(inputs[0].shape))

        return hook

    def forget(self) -> None:
        """Take the hooks out again."""
        while self._handles:
            self._handles.pop().remove()

    def measure(self, choice: Columns) -> None:
        """Find out what columns save, on the input shapes of the forward that was just made."""
        self.forget()
        self.priced = True
        work = torch.zeros(len(self.names), device=self._device)
        known: dict[Any, tuple[float, float, float]] = {}
        for index, (name, conv) in enumerate(zip(self.names, self._modules, strict=True)):
            shape = self._shapes.get(name)
            if shape is None or len(shape) != 4:  # not part of the forward
                continue
            if choice == "on":
                area = math.prod(size // stride for size, stride in zip(shape[2:], conv.stride, strict=True))
                work[index] = float(area * self.parameters[index].numel())
                self._effect[index] = 1.0
                continue
            key = (shape, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
            if key not in known:
                known[key] = column_times(conv, (self._batch or shape[0], *shape[1:]), self._target)
            plain_ms, half, most = known[key]
            work[index] = plain_ms
            self._times[index] = torch.tensor([half, most], device=self._device)
            self._effect[index] = 2 * (1 - half) if half <= _PAYS else 0.0
        self._timed = choice == "auto" and bool(work.any())
        self._share = work / work.sum().clamp_min(_LEAST)

    def notes(self) -> list[str]:
        """What was found of columns, where they were timed."""
        if not self._timed:
            return []
        pay, (half, most) = int((self._effect > 0).sum()), self._times.median(0).values.tolist()
        verdict = (
            f"pay in {pay} of {len(self.names)} convolutions"
            if pay
            else "pay in no convolution, and are tied to channels"
        )
        return [
            f"columns {verdict} on {self._target.describe()}: half of them take {half:.2f} times what the plain "
            f"convolution takes, three quarters {most:.2f} times (medians)"
        ]

    def norms(self) -> Tensor:
        """Norms relative to the root mean square over the convolution. [ΣK]"""
        if not self.parameters:
            return torch.zeros(0, device=self._device)
        flat = torch.cat(
            [p.detach().float().square().sum(0).permute(1, 2, 0).reshape(-1) for p in self.parameters]
        )  # [ΣK]
        return (flat / self._of_convs(flat, mean=True)[self._conv_of_column].clamp_min(_LEAST)).sqrt()

    def best(self, norms: Tensor) -> Tensor:
        """Which column is the largest of its convolution: it has to read something. [ΣK] bool"""
        largest = norms.new_zeros(len(self.names)).scatter_reduce_(0, self._conv_of_column, norms, "amax")
        return norms >= largest[self._conv_of_column]

    def prices(self, rows: Tensor, norms: Tensor) -> Tensor:
        """What a convolution would cost if its columns ended at each one, as a part of the dense network; 0 where
        columns save nothing. [ΣK]
        """
        reading = self.read(rows)
        left, read = self._left(rows, reading)
        per_column = self._share * self._effect * left / read.clamp_min(1)
        return per_column[self._conv_of_column] * (group_places(norms * reading, self._conv_of_column) + 1)

    def saved(self, rows: Tensor, columns: Tensor) -> float:
        """What the missing columns save, as a part of the dense cost."""
        reading = self.read(rows)
        left, read = self._left(rows, reading)
        kept = self._of_convs((reading & columns).float()) / read.clamp_min(1)
        return float((self._share * self._effect * left * (1 - kept)).sum())

    def read(self, rows: Tensor) -> Tensor:
        """Which columns read a channel that is left. [ΣK] bool"""
        return torch.cat([rows, rows.new_ones(1)])[self._in_channel]

    def _left(self, rows: Tensor, reading: Tensor) -> tuple[Tensor, Tensor]:
        """The part of each convolution's work that the channels leave, and how many columns read one. [L] each"""
        outs = torch.cat([rows, rows.new_ones(1)]).float()[self._out_channel]
        produced = torch.zeros_like(self._share).index_add_(0, self._conv_of_out, outs)
        produced /= torch.bincount(self._conv_of_out, minlength=len(self._share)).clamp_min(1)
        read = self._of_convs(reading.float())
        consumed = read / torch.bincount(self._conv_of_column, minlength=len(self._share)).clamp_min(1)
        return produced * consumed, read

    def _of_convs(self, flat: Tensor, mean: bool = False) -> Tensor:
        """Sums (or means) over the columns of each convolution. [L]"""
        sums = torch.zeros_like(self._share).index_add_(0, self._conv_of_column, flat)
        return sums / torch.bincount(self._conv_of_column, minlength=len(sums)) if mean else sums

    def by_name(self, flat: Tensor) -> list[tuple[str, Tensor]]:
        """A flat [ΣK] by weight name, in (kh, kw, c) order."""
        return list(zip(self.names, torch.split(flat, self.sizes), strict=True))

    def mapped(self, flat: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """A flat [ΣK] beside the weights, in their order of dims: [1, C, kh, kw]."""
        parts = zip(self.parameters, torch.split(flat, self.sizes), strict=True)
        return [(p, part.view(*p.shape[2:], p.shape[1]).permute(2, 0, 1)[None]) for p, part in parts]

    def spread(self, flat: Tensor) -> dict[int, Tensor]:
        """Like :meth:`mapped`, by the identity of the weight."""
        return {id(parameter): part for parameter, part in self.mapped(flat)}

    def verdict(self) -> dict[str, float]:
        """What the probe found."""
        if not self._timed:
            return {}
        half, most = self._times.median(0).values.tolist()
        return {"columns_pay": float((self._effect > 0).sum()), "half_columns_time": half, "most_columns_time": most}

    def state_dict(self) -> dict[str, Any]:
        return {
            "share": self._share.clone(),
            "effect": self._effect.clone(),
            "times": self._times.clone(),
            "timed": self._timed,
            "priced": self.priced,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._share.copy_(state["share"])
        self._effect.copy_(state["effect"])
        self._times.copy_(state["times"])
        self._timed, self.priced = state["timed"], state["priced"]
        if self.priced:
            self.forget()


def column_times(
    conv: nn.Conv2d, shape: tuple[int, ...], target: Target, rounds: int = 5
) -> tuple[float, float, float]:
    """Milliseconds of a convolution on an input of ``shape`` [N, Cin, H, W], and the time that half and that three
    quarters of its columns take beside it: on the target's device, threads, number format and layout, called eagerly.

    The three take turns, so that a busy machine slows all of them alike.
    """
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        device=target.device,
        dtype=target.torch_dtype,
    ).requires_grad_(False)
    count = plain.weight[0].numel()
    order = np.random.default_rng(0).permutation(count)
    parts = [np.sort(order[: max(1, round(part * count))]) for part in (0.5, 0.75)]
    contenders = [plain, *(ColumnPrunedConv2d.from_conv(plain, torch.from_numpy(part)) for part in parts)]
    layout = torch.channels_last if target.memory_format == "channels_last" else torch.contiguous_format
    x = torch.zeros(shape, device=target.device, dtype=target.torch_dtype).contiguous(memory_format=layout)
    with torch.no_grad(), settings(target):
        blocks = [[np.median(time_runs(run, (x,), target, 3, warmup=1)) for run in contenders] for _ in range(rounds)]
    times: NDArray[np.float64] = np.array(blocks)  # [rounds, 3]
    plain_ms = float(np.median(times[:, 0]))
    half, most = np.median(times[:, 1:] / times[:, :1], axis=0).tolist()
    return plain_ms, half, most


def _channels(groups: Groups, names: list[str], parameters: list[nn.Parameter], dim: int) -> list[NDArray[np.int64]]:
    """Per weight, the channel of each index along a dim; ΣC where it belongs to none."""
    found = {name: np.full(p.shape[dim], groups.total) for name, p in zip(names, parameters, strict=True)}
    for group, first in zip(groups, groups.offsets[:-1].tolist(), strict=True):
        for slot in group.slots:
            if slot.dim == dim and slot.parameter in found:
                own = np.repeat(first + np.arange(group.width), slot.positions.shape[1])
                found[slot.parameter][slot.positions.ravel()] = own
    return [found[name] for name in names]


def _joined(lines: list[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lines end to end, and the number of the line of each entry."""
    flat = np.concatenate([np.empty(0, np.int64), *lines])
    number = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
    return torch.from_numpy(flat).to(device), torch.from_numpy(number).to(device)

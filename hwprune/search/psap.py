"""Protective self-adaptive pruning (Li and Zhao 2023, arXiv 2303.11881) on a measured latency.

Between prune steps the weights train on, and what training does to them says how much of a group is wanted. With
w' the weights of a group's producers, the batch norm folded in, and τ one threshold for the whole network,

    r_g = #{ |w'| √fan_in < τ } / #w'      p_g = s r_g^a (ms_g / mean ms)^b      price(round(C_g (1 - p_g))) <= B(t)

r_g is the sparsity of the channels that are still there, ms_g what one of its channels costs, s the least number that
meets the budget of the moment, found by bisection on the raw table. B(t) falls from the dense cost to the budget along
a cubic. What was cut is watched for a few batches by the gradient of its closed gate: U = -dL/dm at m = 0 (from the
right; behind a ReLU the left has none) is, to first order, what opening it would gain. Channels whose gate gradient
stands out are restored to the very weights that they had, protected for some prune steps, and others are cut in their
place. The masks are frozen for the rest of the steps.

The paper's, from its abstract: the layer's own weight sparsity ratio sets its pruning ratio before every prune step,
only weights and gradients are looked at, weights that were cut reconstruct themselves in training, and a protective
reconstruction supervises gradients so that important filters come back. Its formulas and tables could not be obtained:
everything that is written as a formula here is a reconstruction. With b = 0, the default, the table decides how much is
cut and sparsity alone where. Prices in the ratios, tried first with b = 0.5, crushed the residual stream, whose
channels are the dearest because many layers share them: resnet20 from random weights, half of its latency, went down to
2 of 16 channels there, and to 44 % after 8 short epochs where it is at 50 % without prices.

A gate multiplies the batch norm's γ and β, so its gradient lacks the factor 1/√eps that the gradient of a zeroed
filter has. Step hooks see no optimiser, so the momentum of what is cut is not reset to zero: a closed gate gives no
gradient, so that it fades on its own, and what it moved meanwhile is undone by the restoration.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwprune.allocator import Allocation, allocate
from hwprune.errors import InvalidInput
from hwprune.graph import Groups, Slot, keep_top
from hwprune.importance import Kind, LiveImportance, importance
from hwprune.latency import CostModel
from hwprune.search.base import Context, Method, bounds, expect_network, mask_gradient, worth

Threshold = Literal["scaled", "shape", "raw"]

_AJAR = 1e-5  # of a closed gate, until the masks are frozen: exactly 0 is where a ReLU has no gradient
_FRESH = 1e-3  # standard deviation of log γ below which a network was never trained
_SHAPE = 0.57  # threshold of "shape" in means of |w|: a Gaussian layer is then as sparse as the default quantile says
_LEAST_RATIO = 0.01  # of the largest group weight: without it a group of no sparsity could never be thinned
_BISECTIONS = 50
_SCALES = 2000  # of the cuts that are tried when allocating


class PSAP(Method):
    """Cuts in rounds, each group by its own sparsity, and takes back what the loss asks for.

    Args:
        threshold: what a weight must stay below to count as sparse. "scaled": one τ for |w'| √fan_in, which takes out
            the scale of the initialisation. "shape": 0.57 times the layer's mean |w'|, which only sees the shape of the
            distribution. "raw": one τ for |w'|, which favours wide layers.
        quantile: τ is this quantile of all weights where pruning begins, and fixed from there.
        exponent, price: a and b of the formula above; with b above 0 dear groups are cut more.
        most: largest part of a group that is cut, unless the budget cannot be met so.
        monotone: a group never gets channels back when its sparsity falls.
        warmup: part of the steps before the first cut, for a network that was never trained; others begin at once.
        ramp: part of the steps until the budget is reached. rounds: prune steps in it.
        watch: batches after a prune step in which gate gradients are taken, at most half of those until the next one.
        outlier: standard deviations by which a gate gradient must exceed the mean of what is cut in its group.
        restore: largest part of a round's cuts that is taken back; one channel may always be.
        protect: prune steps for which a restored channel is not cut again.
        regrow: γ and β of closed gates learn on, as if open, until the next prune step scores them again.
        kind: importance that orders the channels of a group, see :mod:`hwprune.importance`.
    """

    name = "psap"
    summary = "self-adaptive pruning: each group's own weight sparsity sets its ratio; gate gradients restore"
    source = "Li and Zhao 2023 (arXiv 2303.11881), formulas reconstructed from its abstract"

    def __init__(
        self,
        threshold: Threshold = "scaled",
        quantile: float = 0.4,
        exponent: float = 1.0,
        price: float = 0.0,
        most: float = 0.9,
        monotone: bool = False,
        warmup: float = 0.1,
        ramp: float = 0.6,
        rounds: int = 12,
        watch: int = 8,
        outlier: float = 1.0,
        restore: float = 0.25,
        protect: int = 3,
        regrow: bool = True,
        kind: Kind = "l2",
    ) -> None:
        allowed = {
            "threshold": (threshold, threshold in get_args(Threshold), f"one of {', '.join(get_args(Threshold))}"),
            "quantile": (quantile, 0 < quantile < 1, "between 0 and 1"),
            "exponent": (exponent, exponent >= 0, "0 or more"),
            "most": (most, 0 < most <= 1, "above 0 and at most 1"),
            "warmup": (warmup, 0 <= warmup < ramp, "0 or more and below ramp"),
            "ramp": (ramp, 0 < ramp <= 1, "above 0 and at most 1"),
            "rounds": (rounds, rounds >= 1, "1 or more"),
            "watch": (watch, watch >= 0, "0 or more"),
            "restore": (restore, 0 <= restore <= 1, "between 0 and 1"),
            "protect": (protect, protect >= 0, "0 or more"),
            "kind": (kind, kind in get_args(Kind), f"one of {', '.join(get_args(Kind))}"),
        }
        for name, (given, good, text) in allowed.items():
            if not good:
                raise InvalidInput(f"{name} is {given!r}; it must be {text}")
        self.threshold: Threshold = threshold
        self.quantile, self.exponent, self.price, self.most, self.monotone = quantile, exponent, price, most, monotone
        self.warmup, self.ramp, self.rounds, self.watch = warmup, ramp, rounds, watch
        self.outlier, self.restore, self.protect, self.regrow, self.kind = outlier, restore, protect, regrow, kind

    def setup(self, context: Context) -> None:
        super().setup(context)
        groups, device = context.groups, context.device
        self._sparsity = WeightSparsity(context.model, groups, self.threshold)
        self._owner = torch.repeat_interleave(torch.from_numpy(groups.widths)).to(device)  # [ΣC]
        self._slopes = _ms_per_channel(context)  # [G]
        fresh = LiveImportance(context.model, groups, device, 0.0, 0.0).deviation() < _FRESH
        self._schedule(int(self.warmup * context.steps) if fresh else 0)
        self._done = 0  # prune steps so far
        self._tau: float | None = None
        self._widths: NDArray[np.float64] = context.maximum.astype(np.float64)  # [G]
        self._mask = torch.ones(groups.total, device=device)
        self._scores = torch.ones(groups.total, device=device)  # of the last prune step
        self._protected = torch.zeros(groups.total, dtype=torch.int64, device=device)  # prune steps left
        self._watched = torch.zeros(groups.total, dtype=torch.bool, device=device)  # cut in this round
        self._pulse, self._utility = torch.zeros_like(self._mask), torch.zeros_like(self._mask)  # Σ |dL/dm|, Σ -dL/dm
        self._left = 0  # batches still to be watched
        self._gate: Tensor | None = None
        self._saved: dict[str, Tensor] = {}  # parameters as they were at the prune step, while it is watched
        self._restored = 0  # channels, in all rounds
        if context.steps == 0:
            self._prune(context.controller.budget)

    def _schedule(self, start: int) -> None:
        """Spread the prune steps from ``start`` to the end of the ramp."""
        self._start = start
        span = max(1, int(self.ramp * self.context.steps) - start)
        self._rounds = min(self.rounds, span)
        self._interval = span // self._rounds

    def masks(self, step: int) -> Tensor | None:
        if self._done < self._rounds and step >= self._start + self._done * self._interval:
            self._prune(self.target(self._done))
        frozen = self._done == self._rounds and not self._left
        self.straight_through = self.regrow and not frozen and not self._left
        if not self._done:
            return None
        if frozen:
            return self._mask
        ajar = self._mask.clamp_min(_AJAR)
        self._gate = ajar.requires_grad_() if self._left else None
        return ajar

    def target(self, done: int) -> float:
        """The limit of the prune step after ``done`` others: a cubic from the dense cost to the budget."""
        controller = self.context.controller
        left = 1 - (done + 1) / self._rounds
        return controller.dense - (controller.dense - controller.budget) * (1 - left**3)

    def after_backward(self, step: int) -> None:
        if self._gate is None:
            return
        gradient = mask_gradient(self._gate)
        self._pulse += gradient.abs()
        self._utility -= gradient
        self._gate = None

    def after_step(self, step: int) -> None:
        if self._left:
            self._left -= 1
            if not self._left:
                self._take_back()

    @torch.no_grad()
    def _prune(self, budget: float) -> None:
        """Set the widths for a budget and close the gates of the channels that score lowest."""
        context = self.context
        if self._tau is None:
            self._tau = self._sparsity.quantile(self.quantile)
        ratios = self._sparsity(self._mask, self._tau)  # [G]
        prices = self._slopes / self._slopes.mean()
        weights = np.maximum(ratios, 1e-6) ** self.exponent * prices**self.price
        self._widths = self._widths_within(weights, budget)
        self._scores = importance(context.model, context.groups, self.kind)
        self._protected = (self._protected - 1).clamp_min(0)
        before = self._mask
        self._mask = self._select()
        self._watched = (self._mask == 0) & (before == 1)
        self._pulse.zero_()
        self._utility.zero_()
        self._done += 1
        watched = context.steps and self.restore and self._watched.any()
        self._left = min(self.watch, max(1, self._interval // 2)) if watched else 0
        self._saved = {name: parameter.clone() for name, parameter in self._parameters()} if self._left else {}

    def _widths_within(self, weights: NDArray[np.float64], budget: float) -> NDArray[np.float64]:
        """Real widths C (1 - s w) for the least s at which their integers fit the budget. [G]"""
        context = self.context
        full = context.groups.widths.astype(np.float64)
        highest = np.minimum(self._widths, context.maximum) if self.monotone else context.maximum.astype(np.float64)
        weights = np.maximum(weights, _LEAST_RATIO * weights.max())

        def fits(found: NDArray[np.float64]) -> bool:
            return bool(context.cost.price(context.rounded(torch.from_numpy(found))) <= budget)

        least = np.minimum(context.minimum, highest)
        capped = np.clip(np.ceil(full * (1 - self.most) - 1e-9), least, highest)

        def widths(s: float) -> NDArray[np.float64]:
            """To 1: cuts in proportion to the weights. From there to 2: from the largest cuts to the least widths."""
            if s > 1:
                return np.asarray(capped + (s - 1) * (least - capped))
            return np.asarray(np.clip(full * (1 - s * weights / weights.min()), capped, highest))

        low, high = 0.0, 2.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(widths(middle)) else (middle, high)
        return widths(high)

    def _select(self) -> Tensor:
        """1 for the channels to keep: the protected ones, then the best. [ΣC]"""
        ranking = self._scores / self._scores.max() + 2 * (self._protected > 0)
        widths = self.context.rounded(torch.from_numpy(self._widths))
        return torch.from_numpy(keep_top(self.context.groups, widths, ranking)).to(self._mask)

    @torch.no_grad()
    def _take_back(self) -> None:
        """Restore the cuts whose gates ask for it, and cut the next lowest channels instead."""
        closed = self._mask == 0
        mean, deviation = self._moments(self._pulse, closed)
        asking = self._watched & (self._pulse > mean + self.outlier * deviation) & (self._utility > 0)
        slopes = torch.from_numpy(self._slopes).to(self._utility)[self._owner]
        gain = torch.where(asking, self._utility / slopes, 0.0)  # loss per ms
        most = max(1, int(self.restore * int(self._watched.sum())))
        chosen = gain.topk(min(most, int(asking.sum()))).indices
        if len(chosen):
            self._protected[chosen] = self.protect + 1  # this round is over before the next one counts down
            self._mask = self._select()
            self._write_back(chosen[self._mask[chosen] == 1])
            self._restored += int((self._mask[chosen] == 1).sum())
        self._saved = {}

    def _write_back(self, channels: Tensor) -> None:
        """Give channels all the weights that they had at the prune step."""
        chosen = np.zeros(self.context.groups.total, dtype=np.bool_)
        chosen[channels.cpu().numpy()] = True
        parameters = dict(self._parameters())
        for slot, mine in _by_slot(self.context.groups, chosen):
            if slot.parameter in parameters and mine.any():
                index = torch.from_numpy(slot.positions[mine].ravel()).to(self._mask.device)
                old = self._saved[slot.parameter].index_select(slot.dim, index)
                parameters[slot.parameter].index_copy_(slot.dim, index, old)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters that channels own slices of."""
        sliced = {slot.parameter for group in self.context.groups for slot in group.slots}
        named = self.context.model.named_parameters(remove_duplicate=False)
        return ((name, parameter) for name, parameter in named if name in sliced)

    def _moments(self, flat: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the chosen channels of each channel's group. [ΣC], [ΣC]"""
        zeros = flat.new_zeros(len(self.context.groups))
        count = zeros.index_add(0, self._owner, among.to(flat)).clamp_min(1)
        mean = (zeros.index_add(0, self._owner, flat * among) / count)[self._owner]
        variance = zeros.index_add(0, self._owner, (flat - mean).square() * among) / count
        return mean, variance.sqrt()[self._owner]

    def widths(self) -> Tensor:
        return torch.from_numpy(self._widths)

    def ranking(self) -> Tensor:
        """Those that are kept first, in the order of their importance now."""
        scores = importance(self.context.model, self.context.groups, self.kind)
        return scores / scores.max() + self._mask

    @classmethod
    def allocate(
        cls,
        groups: Groups,
        cost: CostModel,
        widths: Tensor,
        ranking: Tensor,
        budget: float,
        *,
        value: Tensor | None = None,
        minimum: NDArray[np.int64] | None = None,
        multiple: int | NDArray[np.int64] = 1,
        pinned: Mapping[int, int] | None = None,
    ) -> Allocation:
        """The same proportions between what is cut, s scaled to the budget; the exact allocator spends what is left."""
        lowest, highest = bounds(groups, cost, minimum, pinned or {})
        full = groups.widths
        cuts = 1 - widths.detach().double().cpu().numpy() / full  # [G]
        cuts = np.maximum(cuts, _LEAST_RATIO * max(cuts.max(), _LEAST_RATIO))
        scales = np.concatenate([[0.0], np.geomspace(0.1, 1 / cuts.min(), _SCALES)])
        rounded = np.floor(full * (1 - scales[:, None] * cuts) / multiple + 0.5).astype(np.int64) * multiple
        candidates = np.clip(rounded, lowest, highest)  # [N, G]
        fitting = np.asarray(cost.price(candidates)) <= budget
        if fitting.any():  # otherwise the allocator says what is possible
            minimum = np.where(np.isin(np.arange(len(full)), list(pinned or {})), lowest, candidates[fitting.argmax()])
        return allocate(cost, worth(cost, widths), budget, minimum=minimum, multiple=multiple, pinned=pinned)

    def state_dict(self) -> dict[str, Any]:
        return {
            "start": self._start,
            "done": self._done,
            "tau": self._tau,
            "widths": torch.from_numpy(self._widths.copy()),
            "mask": self._mask.clone(),
            "scores": self._scores.clone(),
            "protected": self._protected.clone(),
            "watched": self._watched.clone(),
            "pulse": self._pulse.clone(),
            "utility": self._utility.clone(),
            "left": self._left,
            "saved": dict(self._saved),
            "restored": self._restored,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expect_network(groups=(len(state["widths"]), len(self._widths)), channels=(len(state["mask"]), len(self._mask)))
        self._schedule(state["start"])
        self._done, self._tau = state["done"], state["tau"]
        self._widths = state["widths"].cpu().numpy().copy()
        for name in ("mask", "scores", "protected", "watched", "pulse", "utility"):
            setattr(self, f"_{name}", state[name].to(self._mask.device).clone())
        self._left, self._restored = state["left"], state["restored"]
        self._saved = {name: tensor.to(self._mask.device).clone() for name, tensor in state["saved"].items()}

    def log(self) -> dict[str, float]:
        """Kept share of channels, cost at integer widths, and channels restored so far."""
        cost = self.context.cost.price(self.context.rounded(self.widths()))
        kept = float(self._widths.sum() / self.context.groups.total)
        return {"kept": kept, "cost_hard": float(cost), "restored": float(self._restored)}


class WeightSparsity:
    """r_g: which part of the weights that make a group's channels is small.

    Producers are the weights of role "out". Where a batch norm folds one, its rows are multiplied by |γ| / σ, with the
    running variance as σ².
    """

    def __init__(self, model: torch.nn.Module, groups: Groups, threshold: Threshold) -> None:
        self._model, self._groups, self._threshold = model, groups, threshold
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._members: list[tuple[int, Slot, Slot | None]] = []  # first channel, producer, γ of the norm behind it
        for group, first in zip(groups, groups.offsets[:-1].tolist(), strict=True):
            # Slots stand in the order of the graph: the norm of a folded producer is the next that has no other.
            norms = [(at, s) for at, s in enumerate(group.slots) if s.role == "norm" and s.parameter.endswith("weight")]
            for at, slot in enumerate(group.slots):
                if slot.role != "out" or slot.parameter not in parameters or parameters[slot.parameter].ndim < 2:
                    continue
                behind = next(((place, s) for place, s in norms if place > at), None) if slot.folded else None
                if behind is not None:
                    norms.remove(behind)
                self._members.append((first, slot, behind[1] if behind else None))

    def quantile(self, q: float) -> float:
        """The q-quantile of all magnitudes of all producers; 0 where there is none."""
        parts = [magnitudes.reshape(-1) for _, magnitudes in self._magnitudes()]
        if not parts:
            return 0.0
        joined = torch.cat(parts)
        return float(joined.kthvalue(max(1, round(q * len(joined)))).values)

    def __call__(self, mask: Tensor, tau: float) -> NDArray[np.float64]:
        """The sparsity of the channels whose mask [ΣC] is 1; that of all weights for a group without producers. [G]"""
        below, count = torch.zeros_like(mask), torch.zeros_like(mask)  # [ΣC]
        for first, magnitudes in self._magnitudes():
            own = slice(first, first + len(magnitudes))
            limit = tau
            if self._threshold == "shape":
                kept = mask[own] == 1
                limit = _SHAPE * float(magnitudes[kept].mean())
            below[own] += (magnitudes < limit).sum(1)
            count[own] += magnitudes.shape[1]
        firsts = self._groups.offsets[:-1]
        small, whole = (np.add.reduceat((x * mask).double().cpu().numpy(), firsts) for x in (below, count))
        mean = small.sum() / max(whole.sum(), 1.0)
        ratios: NDArray[np.float64] = np.where(whole > 0, small / np.maximum(whole, 1.0), mean)
        return ratios

    def _magnitudes(self) -> Iterator[tuple[int, Tensor]]:
        """First channel of the group, and what is compared with the threshold. [width, weights per channel]"""
        tensors = {**dict(self._model.named_parameters(remove_duplicate=False)), **dict(self._model.named_buffers())}
        for first, slot, norm in self._members:
            weight = tensors[slot.parameter].detach().float()
            rows = weight.movedim(slot.dim, 0).reshape(weight.shape[slot.dim], -1).abs()
            fan_in = rows.shape[1]
            variance = tensors.get(f"{norm.parameter.removesuffix('weight')}running_var") if norm else None
            rows = rows[torch.from_numpy(slot.positions).to(rows.device)]  # [width, r, fan_in]
            if norm is not None and variance is not None and norm.positions.shape == slot.positions.shape:
                eps = float(cast(Any, self._model.get_submodule(norm.parameter.rpartition(".")[0])).eps)
                scale = tensors[norm.parameter].detach().float().abs() / (variance.float() + eps).sqrt()
                rows = rows * scale[torch.from_numpy(norm.positions).to(rows.device)][..., None]
            if self._threshold == "scaled":
                rows = rows * fan_in**0.5
            yield first, rows.flatten(1)


def _by_slot(groups: Groups, chosen: NDArray[np.bool_]) -> Iterator[tuple[Slot, NDArray[np.bool_]]]:
    """Every slot, and which of its group's channels are chosen [width]."""
    for group, first in zip(groups, groups.offsets[:-1].tolist(), strict=True):
        mine = chosen[first : first + group.width]
        for slot in group.slots:
            yield slot, mine


def _ms_per_channel(context: Context) -> NDArray[np.float64]:
    """What a channel of each group costs on average between its least width and the full one, others full. [G]

    The local slope would be 0 on a plateau.
    """
    cost = context.cost
    full, least = cost.full, cost.least
    thinned = np.where(np.eye(cost.groups, dtype=np.bool_), least, full)  # [G, G]
    slopes = np.maximum(cost.dense - np.asarray(cost.price(thinned)), 0.0) / np.maximum(full - least, 1)
    floor = 0.01 * slopes.mean()
    return np.maximum(slopes, floor) if floor > 0 else np.ones_like(slopes)

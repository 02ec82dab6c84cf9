"""Global magnitude pruning: one threshold on the norms of all channels of the network.

Norms are divided by their mean over the group, so that one threshold means the same everywhere, and no group falls
below a tenth of its channels: without either, the layers with the smallest weights are removed whole, whatever they do
(the usual remedies, as in Torch-Pruning's `max_pruning_ratio`). The budget alone sets the threshold; what a channel
costs plays no part, which is what the measured methods are compared with.
"""

import time
from collections.abc import Mapping
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hwprune.allocator import Allocation
from hwprune.errors import InfeasibleBudget, InvalidInput
from hwprune.graph import Groups
from hwprune.importance import Kind, importance
from hwprune.latency import CostModel
from hwprune.search.base import Method, bounds

_FLOOR = 0.1  # of every group stays
_MOST_THRESHOLDS = 4096  # that are priced


class Magnitude(Method):
    """The lowest threshold whose widths fit the budget. Nothing is masked; given steps train the dense network.

    Args:
        kind: importance that is compared with the threshold, see :mod:`hwprune.importance`.
    """

    name = "magnitude"
    summary = "one global threshold on normalised channel norms, found on the cost model"
    source = "common baseline"
    searches = False

    def __init__(self, kind: Kind = "l2") -> None:
        if kind not in get_args(Kind):
            raise InvalidInput(f"importance {kind!r} is unknown; it is one of {', '.join(get_args(Kind))}")
        self.kind = kind

    def widths(self) -> Tensor:
        return self.within_budget()

    def ranking(self) -> Tensor:
        return importance(self.context.model, self.context.groups, self.kind)

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
        """The widths of the lowest threshold on ``ranking`` within ``budget``; their value is the share of channels."""
        started_s = time.perf_counter()
        lowest, highest = bounds(groups, cost, minimum, pinned or {})
        floor = np.maximum(lowest, np.ceil(_FLOOR * groups.widths).astype(np.int64)).clip(max=highest)
        scores = ranking.detach().double().cpu().numpy()
        chosen = _most(groups, scores, cost, budget, floor, highest, multiple)
        if chosen is None:  # the floor is a precaution, the budget is not
            chosen = _most(groups, scores, cost, budget, lowest, highest, multiple)
        if chosen is None:
            raise InfeasibleBudget(
                f"no threshold fits {budget:.4g} {cost.unit}; give a larger budget or lower minimum widths"
            )
        share = float(chosen.sum() / groups.total)
        wall_s = time.perf_counter() - started_s
        return Allocation(chosen, float(cost.price(chosen)), share, share, 0.0, "greedy", wall_s)


def _most(
    groups: Groups,
    scores: NDArray[np.float64],  # [ΣC]
    cost: CostModel,
    budget: float,
    lowest: NDArray[np.int64],  # [G]
    highest: NDArray[np.int64],  # [G]
    multiple: int | NDArray[np.int64],
) -> NDArray[np.int64] | None:
    """The widths of the lowest threshold that fits, None where none does. [G]

    Thresholds are priced rather than bisected for: measured prices are not monotone.
    """
    thresholds = np.unique(scores)
    if len(thresholds) > _MOST_THRESHOLDS:
        thresholds = np.quantile(thresholds, np.linspace(0, 1, _MOST_THRESHOLDS))
    thresholds = np.append(thresholds, np.inf)  # [N], all channels to none
    full = groups.widths
    counts = np.stack(
        [
            full[g] - np.searchsorted(np.sort(scores[first : first + full[g]]), thresholds)
            for g, first in enumerate(groups.offsets[:-1])
        ],
        axis=1,
    )  # [N, G]
    step = np.broadcast_to(np.asarray(multiple, np.int64), full.shape)
    candidates = np.where(counts == full, full, counts // step * step).clip(lowest, highest)
    fitting = np.flatnonzero(np.asarray(cost.price(candidates)) <= budget)
    return candidates[fitting[0]].astype(np.int64) if len(fitting) else None

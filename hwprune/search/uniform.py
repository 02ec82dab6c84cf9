"""One keep ratio for all groups: the rival that every learned allocation has to beat."""

import time
from collections.abc import Mapping
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwprune.allocator import Allocation
from hwprune.errors import InfeasibleBudget, InvalidInput
from hwprune.graph import Groups
from hwprune.importance import Kind, importance
from hwprune.latency import CostModel
from hwprune.search.base import Context, Method, bounds


class Uniform(Method):
    """The largest ratio whose widths fit the budget; which channels stay is decided by their importance.

    Nothing is masked. If the search is given steps all the same, they train the dense network, so that a comparison can
    spend the same on every method.

    Args:
        kind: importance that orders the channels of a group, see :mod:`hwprune.importance`.
    """

    name = "uniform"
    summary = "one keep ratio for all groups, found on the cost model"
    source = "common baseline"
    searches = False

    def __init__(self, kind: Kind = "bn") -> None:
        if kind not in get_args(Kind):
            raise InvalidInput(f"importance {kind!r} is unknown; it is one of {', '.join(get_args(Kind))}")
        self.kind = kind

    def setup(self, context: Context) -> None:
        super().setup(context)
        found = _widest(
            context.groups.widths, context.cost, context.controller.budget, context.minimum, context.maximum
        )
        self._widths = torch.from_numpy(found[0]).double()

    def widths(self) -> Tensor:
        return self._widths

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
        """The widths of the largest ratio within ``budget``, whatever was found before; its value is the ratio."""
        started_s = time.perf_counter()
        lowest, highest = bounds(groups, cost, minimum, pinned or {})
        chosen, ratio, price = _widest(groups.widths, cost, budget, lowest, highest, multiple)
        wall_s = time.perf_counter() - started_s
        return Allocation(chosen, price, ratio, bound=ratio, gap=0.0, method="greedy", wall_s=wall_s)


def _widest(
    full: NDArray[np.int64],  # [G]
    cost: CostModel,
    budget: float,
    lowest: NDArray[np.int64],  # [G]
    highest: NDArray[np.int64],  # [G]
    multiple: int | NDArray[np.int64] = 1,
) -> tuple[NDArray[np.int64], float, float]:
    """The widths of the largest ratio that fits, the ratio, and their price. Raises InfeasibleBudget if none does.

    Every ratio at which some width changes is priced, rather than bisected for: measured prices are not monotone.
    """
    multiple = np.broadcast_to(np.asarray(multiple, np.int64), full.shape)
    kinds = set(zip(full.tolist(), multiple.tolist(), strict=True))
    turns = [(np.arange(1, c // m + 1) - 0.5) * m / c for c, m in kinds]  # where ratio · c rounds to another multiple
    ratios = np.unique(np.concatenate([*turns, [0.0, 1.0]]))
    rounded = np.floor(ratios[:, None] * full / multiple + 0.5 + 1e-9).astype(np.int64) * multiple
    candidates = np.clip(np.where(ratios[:, None] == 1.0, full, rounded), lowest, highest)  # [N, G]
    prices = np.asarray(cost.price(candidates))  # [N]
    fitting = np.flatnonzero(prices <= budget)
    if not len(fitting):
        raise InfeasibleBudget(
            f"no uniform ratio fits {budget:.4g} {cost.unit}: the cheapest takes {prices.min():.4g} {cost.unit}; "
            "give a larger budget or lower minimum widths"
        )
    best = fitting[-1]
    return candidates[best], float(ratios[best]), float(prices[best])

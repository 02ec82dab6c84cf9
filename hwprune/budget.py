"""The budget: how a user writes it, and the controller that makes a search respect it.

The controller is the inequality augmented Lagrangian (Hestenes 1969, Powell 1969; Rockafellar 1973 for inequalities)
on the relative excess r = cost / budget - 1:

    penalty(r) = (max(0, u + ρ r)² - u²) / 2ρ        d penalty / d r = max(0, u + ρ r)        u <- max(0, u + ρ r)

Costs measured on a device are staircases, with zero slope almost everywhere. So two costs meet here: the smooth cost at
real-valued widths gives the gradient, and the raw cost at rounded widths gives the dual update.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hwprune.errors import InvalidInput

_FORM = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>ms|%\s*flops|%)\s*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Budget:
    """An upper limit on the cost of the pruned network.

    kind: "ms" (milliseconds of one forward), "latency" (a fraction of the dense latency) or "flops" (a fraction of the
    dense FLOPs). amount: milliseconds for "ms", otherwise a fraction in (0, 1].
    """

    kind: Literal["ms", "latency", "flops"]
    amount: float

    def __post_init__(self) -> None:
        limit = float("inf") if self.kind == "ms" else 1.0
        if not (0 < self.amount <= limit and self.amount < float("inf")):
            raise InvalidInput(f"budget {self} is out of range; {_POSSIBLE}.")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads "2.4ms", "50%" (of the dense latency) or "50%flops"; raises InvalidInput on anything else."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise InvalidInput(f"budget {text!r} is not understood; {_POSSIBLE}.")
        number, unit = float(found["number"]), "".join(found["unit"].lower().split())
        if unit == "ms":
            return cls("ms", number)
        return cls("latency" if unit == "%" else "flops", number / 100)

    @property
    def unit(self) -> Literal["ms", "flops"]:
        """The unit of the cost model that this budget limits."""
        return "flops" if self.kind == "flops" else "ms"

    def resolve(self, dense: float) -> float:
        """The limit in the cost model's unit, given the cost of the dense network in that unit.

        Raises InvalidInput where the limit is above the dense cost, so that nothing would be pruned.
        """
        limit = self.amount if self.kind == "ms" else self.amount * dense
        if limit > dense:
            raise InvalidInput(
                f"budget {self} is above {dense:.4g} {self.unit}, the cost of the network as it is: there is nothing "
                f"to prune. Give less, for example 50%."
            )
        return limit

    def __str__(self) -> str:
        if self.kind == "ms":
            return f"{self.amount:g}ms"
        return f"{100 * self.amount:g}%" + ("flops" if self.kind == "flops" else "")


_POSSIBLE = "write milliseconds (2.4ms), a part of the dense latency (50%) or of the dense FLOPs (50%flops), up to 100%"


class BudgetController:
    """Turns a budget into the weight of the cost's gradient, step by step.

    budget, dense: the limit and the cost of the dense network, in the same unit. rho: the penalty ρ, dimensionless.
    ramp_steps: the limit falls linearly from `dense` to `budget` over these first steps, so that ratios are not crushed
    before the weights have had a say. update_every: `update` changes the dual variable at multiples of this step only.

    The linear ramp and the defaults are a reconstruction: the papers that use such a controller do not state theirs.
    """

    def __init__(
        self, budget: float, dense: float, *, rho: float = 1.0, ramp_steps: int = 0, update_every: int = 1
    ) -> None:
        if not 0 < budget <= dense < float("inf"):
            raise InvalidInput(f"budget {budget:g} must be above 0 and at most {dense:g}, the cost of the dense one.")
        if not 0 < rho < float("inf"):
            raise InvalidInput(f"rho is {rho:g}; the penalty must be a finite number above 0.")
        if ramp_steps < 0 or update_every < 1:
            raise InvalidInput(f"ramp_steps={ramp_steps} must be >= 0 and update_every={update_every} >= 1.")
        self.budget = budget
        self.dense = dense
        self.rho = rho
        self.ramp_steps = ramp_steps
        self.update_every = update_every
        self.dual = 0.0  # u, never below 0

    def target(self, step: int) -> float:
        """The limit in force at this step, in the unit of the cost."""
        done = min(1.0, step / self.ramp_steps) if self.ramp_steps else 1.0
        return self.dense + done * (self.budget - self.dense)

    def excess(self, cost: float, step: int) -> float:
        """r = cost / target - 1; positive where the limit is broken."""
        return cost / self.target(step) - 1

    def multiplier(self, cost_soft: float, step: int) -> float:
        """The weight on d(cost / dense)/d(width) to add to the gradient of the loss.

        It is max(0, u + ρ r) dense / target: the slope of the penalty along r, times d r / d(cost / dense).
        """
        slope = max(0.0, self.dual + self.rho * self.excess(cost_soft, step))
        return slope * self.dense / self.target(step)

    def penalty(self, cost_soft: Tensor, step: int) -> Tensor:
        """The penalty itself, a differentiable scalar; its gradient is `multiplier` times that of cost / dense."""
        slope = torch.clamp(self.dual + self.rho * (cost_soft / self.target(step) - 1), min=0)
        return (slope**2 - self.dual**2) / (2 * self.rho)

    def update(self, cost_hard: float, step: int) -> None:
        """Moves the dual variable by the residual of the raw cost at rounded widths."""
        if step % self.update_every == 0:
            self.dual = max(0.0, self.dual + self.rho * self.excess(cost_hard, step))

    def state_dict(self) -> dict[str, float]:
        """What a resumed search needs beside the constructor's arguments."""
        return {"dual": self.dual}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores `state_dict`; raises InvalidInput where it does not come from a controller."""
        dual = state.get("dual")
        if dual is None or not 0 <= dual < float("inf"):
            raise InvalidInput(f"budget state {dict(state)} has no finite dual; resume from another checkpoint.")
        self.dual = float(dual)

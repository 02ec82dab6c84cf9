"""Dynamic distribution pruning (Zheng et al., arXiv 1905.13543) over the widths that a latency table distinguishes.

Every group is a choice among a few widths, and the network's widths follow a product of categorical distributions θ.
Sampled networks train for a slice of the steps, with the best channels of each width shared between them; each is then
scored by its accuracy on held-out images, and the score is credited to the options that it used. A round is a few
sweeps; in one, every option that is still there is used exactly once, so all are trained and judged equally often.
After a round every group loses its least probable option.

The expected latency needs no interpolation: with independent choices it is the table summed with weights,

    E[ms] = fixed + Σ_l Σ_ab θ_i(l)[a] θ_o(l)[b] T_l[a, b],    Σ_a θ[a] T_l[a, a] where both sides are one group,

so every term is a measured point and dE/dθ_g[a] is what the network costs, on average, with option a. The odds are
θ ∝ exp(100 accuracy - μ dE/dθ / budget), with the least μ at which E[ms] meets the budget: without it the widest option
would win every comparison. An option is not deleted if the rest could no longer meet the budget; the next worst goes.

From the paper and the authors' code: sampling without replacement with θ left out of it, credit by softmax(100 V) of
the accuracies V in 0..1 averaged over the repeats, θ <- E + θ/2, one deletion per choice and round, a last step that
maximises an additive score under constraints. Theirs there is an enumeration of the options that are left; here it is
the exact allocator over all widths, between the options by a fit, unless the paper's is asked for.
Reconstruction, as no code for it was released: latency in the odds, the guard, the slices of steps. Different on
purpose: the trend of accuracies while the weights train is taken out; and credit is given by ridge regression unless
the paper's is asked for. On made additive accuracies, options a point apart, 8 of them and 3 repeats (mean of 20), the
best option is found in 86 % of 14 choices and 98 % of the attainable gain is had by ridge, 39 % and 66 % by softmax;
with a point of noise 63 % and 89 %, 40 % and 65 %; of 50 choices 38 % and 61 %, 27 % and 38 %. Of 9 choices among 6
options in 2 repeats it is 59 % and 81 %, 44 % and 61 % with a point of noise; with three, both find as much.

What no score tells is filled in by the logarithm of the width, times the group's share of the cost: with nothing else
to go by, all groups are narrowed alike. (With the same weight for every group, the dearest were crushed, which are the
ones that many layers share: resnet20, half of its latency, 64.9 % after fine-tuning, and 74.8 % so.)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from torch import Tensor

from hwprune.budget import BudgetController
from hwprune.errors import InvalidInput
from hwprune.importance import Kind, importance
from hwprune.latency import CostModel
from hwprune.latency.model import CostAxis, CostTerm
from hwprune.search.base import Context, Method, create, expect_network, shares

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Credit = Literal["ridge", "softmax"]
Pick = Literal["widths", "options"]

_SHARPNESS = 100.0  # one point of accuracy is a factor e in the odds
_DECAY = 0.5  # of the odds of earlier rounds, with credit by softmax
_PENALTIES = np.geomspace(1e-4, 1e2, 25)  # of the ridge, in units of the largest squared singular value
_SLACK = 0.75  # of the budget: the smallest options together cost at most that
_ABSENT = 100.0  # times the range of all merits: what a width loses that may not be picked
_LEAST_SLOPE = 0.1  # of merit by the logarithm of the width, in a group of mean cost: at equal scores, wider is better


class DDPNAS(Method):
    """Samples networks of measured widths, scores them on held-out images, and narrows the choice down.

    It needs held-out images; without steps it judges the network as it is.

    Args:
        options: widths to choose from in a group, at most.
        repeats: sweeps in a round. last: options per group at which deletion stops.
        part: part of the steps in which networks are sampled; in the rest, the one that was picked trains.
        batches: held-out batches by which every network is scored, the same for all.
        credit: how accuracies are credited to options. "softmax" is the paper's. "ridge" is a regression on one-hot
            choices, a trend and the logarithm of the widths, over all rounds, its penalty by generalised cross
            validation.
        pick: what the network that is handed over is chosen from: all "widths", or the "options" that are left in every
            group, the paper's. (The latter may leave some of the budget unused.)
        kind: importance that decides which channels a width consists of, see :mod:`hwprune.importance`.
        around: refine this solution: the options are its widths and the ``reach`` next levels on either side. Integer
            widths, one per group, or the name of a search method, which is then given the ``first`` part of the steps
            and ``around_options``, and whose ranking decides which channels a width consists of.
    """

    name = "ddpnas"
    summary = "dynamic distribution pruning: sampled networks are scored, and the least likely widths deleted"
    source = "Zheng et al. 2019 (arXiv 1905.13543) and the authors' code, over measured widths"
    wants_held_out = True

    def __init__(
        self,
        options: int = 6,
        repeats: int = 2,
        last: int = 2,
        part: float = 0.7,
        batches: int = 4,
        credit: Credit = "ridge",
        pick: Pick = "widths",
        kind: Kind = "l2",
        around: str | Sequence[int] | None = None,
        reach: int = 2,
        first: float = 0.5,
        around_options: Mapping[str, Any] | None = None,
    ) -> None:
        allowed = {
            "options": (options, options >= 2, "2 or more"),
            "repeats": (repeats, repeats >= 1, "1 or more"),
            "last": (last, last >= 1, "1 or more"),
            "part": (part, 0 < part <= 1, "above 0 and at most 1"),
            "batches": (batches, batches >= 1, "1 or more"),
            "credit": (credit, credit in get_args(Credit), f"one of {', '.join(get_args(Credit))}"),
            "pick": (pick, pick in get_args(Pick), f"one of {', '.join(get_args(Pick))}"),
            "kind": (kind, kind in get_args(Kind), f"one of {', '.join(get_args(Kind))}"),
            "around": (around, around != self.name, "widths, or the name of another method"),
            "reach": (reach, reach >= 1, "1 or more"),
            "first": (first, 0 <= first < 1, "0 or more and below 1"),
        }
        for name, (given, good, text) in allowed.items():
            if not good:
                raise InvalidInput(f"{name} is {given!r}; it must be {text}")
        self.options, self.repeats, self.last, self.part = options, repeats, last, part
        self.batches, self.credit, self.pick, self.kind, self.reach = batches, credit, pick, kind, reach
        self.around, self.first = around, first
        self._inner = create(around, **(around_options or {})) if isinstance(around, str) else None

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.held_out is None:
            raise InvalidInput(
                f"{self.name} scores networks on images that the weights are not trained on; give a held_out loader"
            )
        groups, controller = context.groups, context.controller
        self._widths: Ints = context.maximum.copy()  # [G] of the network that is in place
        self._owner = np.repeat(np.arange(len(groups)), groups.widths)  # [ΣC]
        self._ranks = np.zeros(groups.total, np.int64)  # place of each channel in its group, best first
        self._order: Tensor | None = None  # ranking [ΣC] of the method that went before
        self._worth: Floats = np.zeros(groups.total)  # of the best n channels of each group, once there is a pick
        self._mask: Tensor | None = None
        self._queue: Ints = np.zeros((0, len(groups)), np.int64)  # [networks of this round, G] options
        self._at = self._left = 0  # place in the queue, and steps that this network still has
        self._picked = False
        self._pulled = float(context.cost.dense)  # expected cost under the odds
        self._choices: Distribution | None = None
        self._judges: list[tuple[Any, Any]] = []  # the held-out batches by which all networks are compared
        self._handed_over = 0  # first step after the other method's
        if self._inner is not None:
            self._handed_over = int(self.first * context.steps)
            ramp = BudgetController(
                controller.budget,
                controller.dense,
                rho=controller.rho,
                ramp_steps=self._handed_over // 2,
                update_every=controller.update_every,
            )
            self._inner_context = dataclasses.replace(context, steps=self._handed_over, controller=ramp)
            self._inner.setup(self._inner_context)
        if not self._handed_over:
            self._begin()
        if not context.steps:
            while not self._picked:
                self._score()

    def masks(self, step: int) -> Tensor | None:
        if self._inner is not None and step < self._handed_over:
            mask = self._inner.masks(step)
            self.straight_through = self._inner.straight_through
            return mask
        self.straight_through = False
        if self._choices is None:
            self._begin()
        return self._mask

    def after_backward(self, step: int) -> None:
        if self._inner is not None and step < self._handed_over:
            self._inner.after_backward(step)

    def after_step(self, step: int) -> None:
        if self._inner is not None and step < self._handed_over:
            self._inner.after_step(step)
        elif not self._picked:
            self._left -= 1
            if not self._left:
                self._score()
            if step + 1 >= self._deadline and not self._picked:
                self._pick()

    def finish(self) -> None:
        if not self._picked:
            raise InvalidInput(
                f"the search was told of {self.context.steps} steps and ended before its networks were scored; let it "
                "take all of them"
            )

    # -- the options, and which networks are tried

    def _begin(self) -> None:
        """Lay out the options of every group, and draw the first networks."""
        context, centre = self.context, None
        if self._inner is not None:
            self._inner.finish()
            self._order = self._inner.ranking().detach().clone()
            pinned = self._pinned()
            found = self._inner.allocate(
                context.groups,
                context.cost,
                self._inner.widths(),
                self._order,
                context.controller.budget,
                value=self._inner.values(),
                minimum=context.minimum,
                pinned=pinned,
            )
            centre = found.widths
        elif self.around is not None:
            centre = np.asarray(self.around, np.int64)
            if centre.shape != (len(context.groups),) or (centre < 1).any() or (centre > context.groups.widths).any():
                raise InvalidInput(
                    f"around={centre.tolist()} must hold one width per group, at most {context.groups.widths.tolist()}"
                )
        levels = self._levels(context.controller.budget) if centre is None else self._levels_around(centre)
        counts = np.array([len(own) for own in levels])
        table = np.stack([np.pad(own, (0, counts.max() - len(own)), mode="edge") for own in levels])  # [G, K]
        self._lay_out(table, counts)
        self._draw()

    def _lay_out(self, table: Ints, counts: Ints) -> None:
        full, cost = self.context.groups.widths, self.context.cost
        share = shares(cost, full.astype(np.float64))
        self._share = share / share.mean()  # [G]
        self._choices = Distribution(counts, self.credit, self._share[:, None] * np.log(table / full[:, None]))
        self._table = table
        self._expected = ExpectedCost(cost, table)
        most = int(counts.max())
        networks = self.repeats * max(sum(range(self.last + 1, most + 1)), most)
        span = int(self.part * (self.context.steps - self._handed_over))
        self._deadline = self._handed_over + max(1, span)
        self._slice = max(1, span // networks)

    def _levels(self, budget: float) -> list[Ints]:
        """Levels of every group, evenly spread from the largest part of full width at which all together are cheap."""
        context = self.context
        allowed = [self._allowed(g) for g in range(len(context.groups))]
        lowest = np.array([own[0] for own in allowed])
        for part in 0.5 ** np.arange(1, 8):
            wanted = np.array([own[np.abs(own - part * own[-1]).argmin()] for own in allowed])
            if context.cost.price(wanted) <= _SLACK * budget:
                lowest = wanted
                break
        spread = [np.linspace(low, own[-1], self.options) for low, own in zip(lowest, allowed, strict=True)]
        return [own[np.unique(np.abs(own - x[:, None]).argmin(1))] for own, x in zip(allowed, spread, strict=True)]

    def _levels_around(self, centre: Ints) -> list[Ints]:
        """The width itself and the next ``reach`` levels on either side."""
        found = []
        for g, width in enumerate(np.clip(centre, self.context.minimum, self.context.maximum)):
            own = self._allowed(g)
            below, above = own[own < width], own[own > width]
            found.append(np.concatenate([below[-self.reach :], [width], above[: self.reach]]))
        return found

    def _allowed(self, group: int) -> Ints:
        low, high = int(self.context.minimum[group]), int(self.context.maximum[group])
        own = self.context.cost.levels(group)
        return np.union1d(own[(own >= low) & (own <= high)], [low, high]).astype(np.int64)

    def _draw(self) -> None:
        """The networks of a round, one sweep after the other."""
        assert self._choices is not None
        self._queue = np.concatenate([self._choices.sweep(self.context.generator) for _ in range(self.repeats)])
        self._at = 0
        self._next()

    def _next(self) -> None:
        """Put the next network of the queue in."""
        if self._at % (len(self._queue) // self.repeats) == 0:  # a sweep compares networks of the same channels
            self._rank()
        self._put(self._table[np.arange(len(self._table)), self._queue[self._at]])
        self._left = self._slice

    def _rank(self) -> None:
        scores = self._order
        if scores is None:
            scores = importance(self.context.model, self.context.groups, self.kind)
        order = np.lexsort((-scores.detach().double().cpu().numpy(), self._owner))
        self._ranks[order] = np.arange(len(order)) - self.context.groups.offsets[:-1][self._owner]

    def _put(self, widths: Ints) -> None:
        self._widths = widths
        kept = self._ranks < widths[self._owner]
        self._mask = torch.from_numpy(kept).to(self.context.device, torch.float32)

    # -- what they are worth

    def _score(self) -> None:
        """Take the accuracy of the network that is in place, and go on to the next."""
        assert self._choices is not None and self.context.held_out is not None
        if not self._judges:
            self._judges = [self.context.held_out.batch() for _ in range(self.batches)]
        accuracy, _ = self.context.held_out.judged(self._mask, self._judges)
        self._choices.record(self._queue[self._at], accuracy)
        self._at += 1
        if self._at < len(self._queue):
            self._next()
            return
        self._choices.judge(self.repeats)
        most = int(self._choices.alive.sum(1).max())
        if most > self.last:
            self._delete(most - 1)
        if most - 1 > self.last:
            self._draw()
        else:
            self._pick()

    def _delete(self, limit: int) -> None:
        """Delete the least probable option of every group that has more than ``limit``, within the budget."""
        assert self._choices is not None
        choices, context = self._choices, self.context
        odds, self._pulled = self._odds()
        alive = choices.alive
        due = alive.sum(1) > limit
        worst = np.where(alive, odds, np.inf).argmin(1)
        smallest = alive.argmax(1)  # options ascend
        rows = np.arange(len(alive))
        without = alive.copy()
        without[rows, smallest] = False
        next_smallest = without.argmax(1)
        risky = np.flatnonzero(due & (worst == smallest))
        risky = risky[np.argsort(odds[risky, worst[risky]])]
        cheapest = np.repeat(self._table[rows, smallest][None], len(risky) + 1, 0)
        for place, group in enumerate(risky, start=1):
            cheapest[place:, group] = self._table[group, next_smallest[group]]
        fits = np.asarray(context.cost.price(cheapest)) <= context.controller.budget
        allowed = max(0, int(np.argmin(fits)) - 1 if not fits.all() else len(risky))
        guarded = risky[allowed:]
        worst[guarded] = np.where(without, odds, np.inf).argmin(1)[guarded]
        alive[rows[due], worst[due]] = False

    def _odds(self) -> tuple[Floats, float]:
        """θ with the least pull of the budget at which the expected cost meets it, and that cost. [G, K]"""
        assert self._choices is not None
        choices, budget = self._choices, self.context.controller.budget
        _, cost_of = self._expected.value_and_grad(choices.odds(np.zeros_like(choices.merit)))
        cost_of = cost_of / budget

        def at(pull: float) -> tuple[Floats, float]:
            odds = choices.odds(pull * cost_of)
            return odds, self._expected.value_and_grad(odds)[0]

        found = at(0.0)
        if found[1] <= budget:
            return found
        low, high = 0.0, 1.0
        while (found := at(high))[1] > budget and high < 1e6:
            low, high = high, 4 * high
        for _ in range(20):
            middle = (low + high) / 2
            trial = at(middle)
            if trial[1] <= budget:
                high, found = middle, trial
            else:
                low = middle
        return found

    def _pick(self) -> None:
        """The network of highest summed worth within the budget, for the rest of the steps."""
        assert self._choices is not None
        self._choices.judge(self.repeats)
        groups, choices = self.context.groups, self._choices
        if self.pick == "widths":
            self._worth = worth_of_widths(self._table, choices.counts, choices.merit, groups.widths, self._share)
        else:
            self._worth = worth_of_options(self._table, choices.alive, choices.merit, groups.offsets)
        self._rank()
        self._picked = True
        found = self.allocate(
            groups,
            self.context.cost,
            torch.from_numpy(self._widths),
            self.ranking(),
            self.context.controller.budget,
            value=self.values(),
            minimum=self.context.minimum,
            pinned=self._pinned(),
        )
        self._put(found.widths)

    def _pinned(self) -> dict[int, int]:
        context = self.context
        fixed = np.flatnonzero(context.minimum == context.maximum)
        return {int(g): int(context.minimum[g]) for g in fixed}

    # -- what is handed over

    def widths(self) -> Tensor:
        if self._choices is None and self._inner is not None:
            return self._inner.widths()
        return torch.from_numpy(self._widths).double()

    def ranking(self) -> Tensor:
        if not self._picked:
            return importance(self.context.model, self.context.groups, self.kind)
        # The order in which the picked network was trained; positive, as a place is less than ΣC.
        return torch.from_numpy(1.0 - self._ranks / len(self._ranks)).to(self.context.device, torch.float32)

    def values(self) -> Tensor | None:
        """The merit of every width, see :func:`worth_of_widths` and :func:`worth_of_options`; None until the pick."""
        return torch.from_numpy(self._worth) if self._picked else None

    # -- resuming

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"inner": None, "choices": None}
        if self._inner is not None:
            state["inner"] = self._inner.state_dict()
            state["inner_controller"] = dict(self._inner_context.controller.state_dict())
        if self._choices is not None:
            state["choices"] = self._choices.state_dict()
            state["table"] = torch.from_numpy(self._table.copy())
            state["order"] = self._order
            state["judges"] = [list(pair) for pair in self._judges]
        arrays = ("widths", "ranks", "worth", "queue")
        state |= {name: torch.from_numpy(getattr(self, f"_{name}").copy()) for name in arrays}
        return state | {"at": self._at, "left": self._left, "picked": self._picked, "pulled": self._pulled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expect_network(
            groups=(len(state["widths"]), len(self._widths)), channels=(len(state["ranks"]), len(self._ranks))
        )
        if self._inner is not None:
            self._inner.load_state_dict(state["inner"])
            self._inner_context.controller.load_state_dict(state["inner_controller"])
        self._choices = None
        for name in ("widths", "ranks", "worth", "queue"):
            setattr(self, f"_{name}", state[name].cpu().numpy().copy())
        self._at, self._left = state["at"], state["left"]
        self._picked, self._pulled = state["picked"], state["pulled"]
        if state["choices"] is not None:
            self._order = None if state["order"] is None else state["order"].to(self.context.device)
            self._lay_out(state["table"].cpu().numpy(), state["choices"]["counts"].cpu().numpy())
            assert self._choices is not None
            self._choices.load_state_dict(state["choices"])
            device = self.context.device
            self._judges = [(inputs.to(device), targets.to(device)) for inputs, targets in state["judges"]]
            self._put(self._widths)

    def log(self) -> dict[str, float]:
        """While another method is at work, its figures. Then: the kept share and the cost of the network in place, the
        last accuracy, the most options that a group still has, and the expected cost under the odds."""
        if self._choices is None:
            return {} if self._inner is None else self._inner.log()
        found = {
            "kept": float(self._widths.sum() / self.context.groups.total),
            "cost_hard": float(self.context.cost.price(self._widths)),
            "options": float(self._choices.alive.sum(1).max()),
            "cost_expected": self._pulled,
        }
        return found | ({"held_out_accuracy": self._choices.scores[-1]} if self._choices.scores else {})


class Distribution:
    """G independent choices, what was drawn from them, and what their options are worth.

    Args:
        counts: [G] options of each choice; K is the most.
        sizes: [G, K] a property of the options that scores are expected to rise with, if there is one.

    Attributes:
        alive: [G, K] options that were not deleted. merit: [G, K] logarithms of the odds, the budget left out.
        choices, scores: the option of each choice, and the score, of each network so far. [N, G], [N]
    """

    def __init__(self, counts: Ints, credit: Credit = "ridge", sizes: Floats | None = None) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.alive = np.arange(self.counts.max()) < self.counts[:, None]
        self.merit: Floats = np.where(self.alive, 0.0, -np.inf)
        self.choices: list[Ints] = []
        self.scores: list[float] = []
        self._credit, self._sizes = credit, sizes
        self._judged = 0  # networks whose credit was given

    def sweep(self, generator: torch.Generator) -> Ints:
        """As many networks as the widest choice has options; in them, each option that is alive is used equally often.

        A choice of fewer options uses them in turn. [networks, G]
        """
        keys = torch.rand(self.alive.shape, generator=generator, device=generator.device).cpu().numpy()
        order = np.where(self.alive, keys, 2.0).argsort(1)  # [G, K], those alive first
        left = self.alive.sum(1)
        turns = np.arange(left.max())[:, None] % left  # [networks, G]
        return np.asarray(order[np.arange(len(order)), turns], dtype=np.int64)

    def record(self, choice: Ints, score: float) -> None:
        """A network's options [G] and its accuracy, 0 to 1."""
        self.choices.append(np.asarray(choice, np.int64))
        self.scores.append(float(score))

    def judge(self, repeats: int = 1) -> None:
        """Credit the networks recorded since the last call, the sweeps of one round."""
        new = len(self.scores) - self._judged
        if not new:
            return
        drawn, scores = np.stack(self.choices), np.array(self.scores)
        known = self._known(drawn)
        if self._credit == "ridge":
            self.merit = np.where(np.isfinite(self.merit), _SHARPNESS * self._ridge(drawn, scores, known), -np.inf)
        else:
            trend = np.linalg.lstsq(known, scores, rcond=None)[0][1] * known[:, 1] if len(scores) > 2 else 0.0
            detrended = (scores - trend)[self._judged :]
            sweeps = np.array_split(np.arange(new), min(repeats, new))
            odds = np.mean([self._softmax(drawn[self._judged + at], detrended[at]) for at in sweeps], 0)
            earlier = np.exp(self.merit) if self._judged else np.zeros_like(odds)
            with np.errstate(divide="ignore"):
                self.merit = np.where(self.alive, np.log(np.maximum(odds + _DECAY * earlier, 1e-30)), self.merit)
        self._judged = len(self.scores)

    def odds(self, pull: Floats) -> Floats:
        """θ ∝ exp(merit - pull) over the options that are alive. [G, K]"""
        logits = np.where(self.alive, self.merit - pull, -np.inf)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(odds / odds.sum(1, keepdims=True))

    def _known(self, drawn: Ints) -> Floats:
        """What is regressed on without a penalty: 1, the time, and the summed sizes. [N, 2 or 3]"""
        columns = [np.ones(len(drawn)), np.linspace(-1, 1, len(drawn))]
        if self._sizes is not None:
            columns.append(self._sizes[np.arange(drawn.shape[1]), drawn].sum(1))
        return np.stack(columns, 1)

    def _ridge(self, drawn: Ints, scores: Floats, known: Floats) -> Floats:
        """The worth of every option, in accuracy; the penalty minimises the generalised cross validation. [G, K]"""
        count, choices = drawn.shape
        onehot = np.zeros((count, *self.alive.shape))
        onehot[np.arange(count)[:, None], np.arange(choices), drawn] = 1.0
        onehot = onehot.reshape(count, -1)
        left, sizes, _ = np.linalg.svd(known, full_matrices=False)
        basis = left[:, sizes > 1e-9 * sizes.max()]
        x, y = onehot - basis @ (basis.T @ onehot), scores - basis @ (basis.T @ scores)
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        along = u.T @ y
        worth = np.zeros(onehot.shape[1])
        if s[0] > 1e-9:
            shrunk = s**2 / (s**2 + _PENALTIES[:, None] * s[0] ** 2)  # [penalties, rank]
            rest = y @ y - along @ along + (((1 - shrunk) * along) ** 2).sum(1)
            free = np.maximum(count - basis.shape[1] - shrunk.sum(1), 1e-6)
            best = shrunk[np.argmin(rest / free**2)]
            worth = vt.T @ (best * along / np.maximum(s, 1e-9 * s[0]))
        found = worth.reshape(self.alive.shape)
        if self._sizes is not None:
            slope = np.linalg.lstsq(known, scores - onehot @ worth, rcond=None)[0][2]
            found = found + max(0.0, float(slope)) * self._sizes
        return np.asarray(found)

    def _softmax(self, drawn: Ints, scores: Floats) -> Floats:
        """The paper's credit for one sweep: softmax(100 V), V the mean accuracy of the networks with an option."""
        total, count = np.zeros_like(self.merit), np.zeros_like(self.merit)
        rows = np.broadcast_to(np.arange(drawn.shape[1]), drawn.shape)
        np.add.at(total, (rows, drawn), scores[:, None])
        np.add.at(count, (rows, drawn), 1.0)
        used = self.alive & (count > 0)
        logits = np.where(used, _SHARPNESS * total / np.maximum(count, 1.0), -np.inf)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(odds / odds.sum(1, keepdims=True))

    def state_dict(self) -> dict[str, Any]:
        drawn = np.stack(self.choices) if self.choices else np.zeros((0, len(self.counts)), np.int64)
        arrays = {"counts": self.counts, "alive": self.alive, "merit": self.merit, "choices": drawn}
        state: dict[str, Any] = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return state | {"scores": list(self.scores), "judged": self._judged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.alive, self.merit = state["alive"].cpu().numpy().copy(), state["merit"].cpu().numpy().copy()
        self.choices = list(state["choices"].cpu().numpy())
        self.scores, self._judged = list(state["scores"]), state["judged"]


class ExpectedCost:
    """The mean cost of networks whose widths are drawn independently per group; exact for the table.

    Args:
        options: [G, K] widths to draw from; those past a group's last must have no odds.
    """

    def __init__(self, cost: CostModel, options: Ints) -> None:
        self._cost = cost
        self._terms = [self._plan(term, [cost.axes[a] for a in term.axes], options) for term in cost.terms]

    def _plan(
        self, term: CostTerm, axes: list[CostAxis], options: Ints
    ) -> tuple[list[tuple[int, Tensor, int]], Tensor]:
        """How the joint distribution of a term's sizes is built up, group by group, and its cost at each of them.

        A stage is (group, place of every (size so far, option) among the new sizes, their number).
        """
        points = np.array([[axis.offset for axis in axes]], dtype=np.int64)  # [1, axes]
        stages = []
        for g in sorted({int(g) for axis in axes for g in axis.groups}):
            weight = np.array([int(axis.weights[axis.groups == g].sum()) for axis in axes])
            joined = points[:, None] + options[g][None, :, None] * weight  # [sizes, K, axes]
            points, place = np.unique(joined.reshape(-1, len(axes)), axis=0, return_inverse=True)
            stages.append((g, torch.from_numpy(place.reshape(-1).astype(np.int64)), len(points)))
        table = np.asarray(term.table, dtype=np.float64)
        shares = [_shares(axis.knots, points[:, dim], self._cost.exact) for dim, axis in enumerate(axes)]
        if len(axes) == 2:
            value = np.einsum("na,nb,ab->n", *shares, table)
        else:
            value = shares[0] @ table if axes else table.reshape(1)
        return stages, torch.from_numpy(value)

    def value_and_grad(self, odds: Floats) -> tuple[float, Floats]:
        """E[cost] for the odds [G, K], and its derivative: the mean cost, given an option, of what it has a part in."""
        theta = torch.tensor(odds, dtype=torch.float64, requires_grad=True)
        total = theta.new_tensor(self._cost.offset)
        for stages, value in self._terms:
            density = theta.new_ones(1)
            for g, place, count in stages:
                joint = (density[:, None] * theta[g]).reshape(-1)
                density = density.new_zeros(count).index_add(0, place, joint)
            total = total + self._cost.scale * (density @ value)
        (gradient,) = torch.autograd.grad(total, theta, allow_unused=True)
        return float(total.detach()), np.zeros_like(odds) if gradient is None else gradient.numpy()


def _shares(knots: Ints, sizes: Ints, exact: bool) -> Floats:
    """The share of each knot in the price at each size: the next one up, or a line between two. [sizes, K]"""
    if exact:
        return np.stack([np.interp(sizes, knots, unit) for unit in np.eye(len(knots))], axis=1)
    return np.asarray(np.eye(len(knots))[np.minimum(np.searchsorted(knots, sizes), len(knots) - 1)])


def worth_of_widths(options: Ints, counts: Ints, merit: Floats, full: Ints, share: Floats) -> Floats:
    """What n channels of a group are worth, n = 1 to C of every group, laid end to end. [ΣC]

    Between the options [G, K] it is a fit to their merits [G, K] that rises ever more slowly. Nothing is known beyond
    them: above the widest it does not rise, and below the least it falls like the logarithm of the width, for its
    ``share`` [G] of the cost as fast as any group's does anywhere, so that no group pays for what others may gain.
    """
    fits = []
    steepest = _LEAST_SLOPE
    for row, count, values, part in zip(options, counts, merit, share, strict=True):
        widths = row[:count][np.isfinite(values[:count])]
        values = values[:count][np.isfinite(values[:count])]
        steps = np.diff(widths)
        if len(steps):
            rises = isotonic_regression(np.diff(values) / steps, weights=steps, increasing=False).x.clip(min=0) * steps
            steepest = max(steepest, float((rises / np.log(widths[1:] / widths[:-1])).max()) / part)
            values = np.concatenate([[0.0], np.cumsum(rises)])
        fits.append((widths, values))
    parts = []
    for (widths, values), width, part in zip(fits, full, share, strict=True):
        place = np.arange(1, width + 1)
        inside = np.interp(place, widths, values)
        below = steepest * np.log(np.minimum(place, widths[0]) / widths[0])
        parts.append(inside + part * (below + _LEAST_SLOPE * np.log(place / width)))
    return np.concatenate(parts)


def worth_of_options(options: Ints, alive: NDArray[np.bool_], merit: Floats, offsets: Ints) -> Floats:
    """The merits [G, K] of those ``options`` [G, K] that are ``alive``, at their widths; the others far below. [ΣC]"""
    group, _ = np.nonzero(alive)
    values = merit[alive]
    worth = np.full(int(offsets[-1]), values.min() - _ABSENT * max(1.0, float(np.ptp(values))))
    worth[offsets[group] + options[alive] - 1] = values
    return worth

"""The straight line: trace, profile, search, allocate, cut, measure, fine-tune, measure again.

:func:`prune` is that line for networks that :func:`hwprune.train.fit` can train. :class:`Pruning` holds the same
steps one by one, for a training loop of your own. Every phase leaves its result in the run's folder, so that a run
killed at any moment continues where it was.
"""

import copy
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hwprune import artifact, report
from hwprune.allocator import Allocation, allocate, values_from_ranking
from hwprune.budget import Budget, BudgetController
from hwprune.errors import CorruptArtifact, InfeasibleBudget, InvalidInput
from hwprune.files import write_file
from hwprune.graph import Groups, Program, cut, keep_first, keep_top, resize, segments, trace
from hwprune.latency import CostModel, LatencyTable, Reference, Sample, Target, build, fingerprint, flops_model
from hwprune.latency import measure as measure_callable
from hwprune.latency import profile as profile_program
from hwprune.nn import mask_, match_scales_, prune_columns_
from hwprune.refit import refit_
from hwprune.search import DEFAULT_METHOD, Method, Search, SearchResult, create, method_class
from hwprune.train import LossFn, Recipe, epoch_length, evaluate, fit, recalibrate

LAUNCH_BOUND = 0.8  # floor / dense above which widths no longer buy time
LEAST_USE = 0.93  # of the budget; a network that measures less is grown again
MOST_USE = 0.985  # of the budget while allocating, so that noise in the last measurement does not break it
COLUMNS_PAY = 0.98  # of the time without them; below it, column kernels are deployed
AIM = 0.965  # where the next allocation aims, in the middle of the two
TURN_S = 0.1  # that a network is measured for before another has its turn

Attention = Literal["heads", "dims"]
Say = Callable[[str], None]


class BudgetMissed(InfeasibleBudget):
    """The finished network measured above its budget; ``result`` says by how much, and the run's folder keeps it."""

    def __init__(self, message: str, result: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Goal:
    """A budget in numbers, checked against the dense model and the floor."""

    budget: Budget
    dense_ms: float  # measured, whole forward
    floor_ms: float  # measured, every group at its least width
    frontier: tuple[Mapping[str, float], ...]  # rows of budget, channels and flops, as fractions of dense

    def limit_ms(self, dense_ms: float) -> float | None:
        """The budget in ms, given the dense latency of the same window; None for a budget in FLOPs."""
        if self.budget.unit != "ms":
            return None
        return self.budget.amount if self.budget.kind == "ms" else self.budget.amount * dense_ms


@dataclass(frozen=True)
class Plan:
    """Integer widths, and what the network of those widths measured. Times are medians of whole forwards."""

    widths: NDArray[np.int64]  # [G]
    predicted_ms: float
    measured_ms: float | None  # None for a budget in FLOPs
    limit_ms: float | None  # the budget, by the dense model in the same window
    rounds: tuple[Mapping[str, Any], ...]  # every allocation that was tried: predicted, measured, budget, its gap
    columns: Mapping[str, float] | None = None  # where some were pruned: ms at equal widths, without and with them

    @property
    def used(self) -> float:
        """Measured latency as a fraction of the budget; 0 for a budget in FLOPs."""
        return 0.0 if self.measured_ms is None or self.limit_ms is None else self.measured_ms / self.limit_ms

    @property
    def met(self) -> bool:
        return self.used <= 1

    @property
    def deploys_columns(self) -> bool:
        """Whether convolutions that compute only their kept columns were measured to be faster here."""
        return self.columns is not None and _pays(self.columns)


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` returns: the smaller module, the contents of ``result.json``, and where they were saved."""

    module: nn.Module
    result: Mapping[str, Any]
    folder: Path | None  # None when no folder was asked for


def prune(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    train_loader: Iterable[Any],
    budget: str | Budget | None = None,
    budget_ms: float | None = None,
    test_loader: Iterable[Any] | None = None,
    validation_loader: Iterable[Any] | None = None,
    calibration_loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    target: Target | None = None,
    method: str = DEFAULT_METHOD,
    options: Mapping[str, Any] | None = None,
    refit: bool | None = None,
    guide: str = "ms",
    minimum: int | Mapping[str, int] | None = None,
    multiple: int = 1,
    pinned: Mapping[str, int] | None = None,
    recipe: Recipe | None = None,
    epochs: int = 10,
    search_epochs: int = 10,
    dense_epochs: int = 0,
    out: str | Path | None = None,
    table: str | Path | None = None,
    profile_seconds: float | None = None,
    force: bool = False,
    resume: bool = False,
    seed: int = 0,
    name: str | None = None,
    attention: Attention = "heads",
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
    say: Say | None = None,
) -> Pruned:
    """Prune a network until it was measured to run within a budget on a device, and train what is left.

    ``example_inputs`` fix the batch whose latency counts: [N, ...]. The budget is ``budget_ms``, or a text: "2.4ms",
    "50%" of the dense latency, or "50%flops". ``model`` is left as it is. The loaders give (inputs, labels);
    ``loss_fn(outputs, labels)`` is cross-entropy by default. Methods that learn or choose on images beside those that
    train the weights take them from ``validation_loader``, or, without one, which is said, from ``calibration_loader``,
    which gives training images without augmentation. ``refit`` solves the layers behind the cut for what was cut away,
    by least squares on the calibration images; None leaves that to the method. ``dense_epochs`` train the dense model
    first, ``search_epochs`` are spent with masks, ``epochs`` on fine-tuning with the dense model as teacher. ``guide``
    is the cost that steers the search and the allocation, "ms" or "flops"; what is checked is always the budget. Where
    the method trains nothing while it searches, the epochs of the search are spent on fine-tuning. ``minimum`` (for all
    groups, or by group name), ``multiple`` and ``pinned`` (by name) bind the widths; a full width is always allowed,
    and a group that they name is never removed.

    With ``out``, the folder keeps the artifact, ``report.html``, ``result.json`` and the state from which ``resume``
    continues. ``table`` is the latency table to use and extend (by default the one in ``out``), in about
    ``profile_seconds`` where it does not hold enough yet; ``provenance`` is kept with the settings.

    Raises InvalidInput or InfeasibleBudget before any training when the budget cannot be met, UnsupportedModel when
    the model cannot be traced, TrainingDiverged, and BudgetMissed when the finished network measured above the budget.
    """
    # What cannot be searched with, or trained on, is said before anything is measured.
    chosen = create(method, **(options or {}))
    epoch_length(train_loader)
    moved = 0 if chosen.searches else search_epochs
    search_epochs, epochs = search_epochs - moved, epochs + moved
    recipe = replace(recipe or Recipe(), seed=seed)
    work = Pruning(
        model,
        example_inputs,
        budget=budget,
        budget_ms=budget_ms,
        target=target,
        guide=guide,
        minimum=minimum,
        multiple=multiple,
        pinned=pinned,
        out=out,
        table=table,
        profile_seconds=profile_seconds,
        force=force,
        resume=resume,
        name=name,
        attention=attention,
        settings={
            "method": method,
            "options": dict(options or {}),
            "refit": refit,
            "search_epochs": search_epochs,
            "dense_epochs": dense_epochs,
            **asdict(replace(recipe, epochs=epochs)),
            **(provenance or {}),
        },
        progress=progress,
        say=say,
    )
    if moved:
        work.say(f"{method} trains nothing while it searches: the search's epochs go to fine-tuning, {epochs} in all")
    if chosen.wants_held_out and validation_loader is None:
        work.say(f"no images are held out: {method} judges on images that the weights are trained on")
    calibration = calibration_loader or train_loader
    train = _Trainer(work, train_loader, test_loader, validation_loader, calibration, recipe, loss_fn)
    train.dense(dense_epochs)
    train.search(method, search_epochs, options or {}, seed)
    module = work.cut(calibration=calibration, refit=refit)
    train.fine_tune(module, epochs)
    result = work.finish(module, accuracy=train.accuracy(module), held_out_accuracy=train.held_out_accuracy(module))
    return Pruned(module, result, work.folder)


class Pruning:
    """The steps of :func:`prune`, for a training loop of your own.

    Making one traces the model, profiles it on the target, and refuses a budget that no width meets. Then::

        work = Pruning(model, example_inputs, budget_ms=2.0)
        with work.search("dsa", steps=1000) as hooks:      # work.model has masks; train it, calling hooks every step
            ...
        module = work.cut()                                # measured to be within the budget; train it as you like
        result = work.finish(module)                       # measured again, saved where ``out`` says

    ``model`` is a copy; ``dense`` is what was given, a teacher for the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | Sequence[Tensor],
        *,
        budget: str | Budget | None = None,
        budget_ms: float | None = None,
        target: Target | None = None,
        guide: str = "ms",
        minimum: int | Mapping[str, int] | None = None,
        multiple: int = 1,
        pinned: Mapping[str, int] | None = None,
        out: str | Path | None = None,
        table: str | Path | None = None,
        profile_seconds: float | None = None,
        force: bool = False,
        resume: bool = False,
        name: str | None = None,
        attention: Attention = "heads",
        settings: Mapping[str, Any] | None = None,
        progress: bool = True,
        say: Say | None = None,
    ) -> None:
        if guide not in ("ms", "flops"):
            raise InvalidInput(f"guide {guide!r} is not known; the search is guided by 'ms' or 'flops'")
        self.budget = _parse_budget(budget, budget_ms)
        self.target = target or Target()
        self.name = name or type(model).__name__
        self.attention = attention
        self.progress = progress
        self.say = say or (_to_stderr if progress else _to_nowhere)
        self.folder = Path(out) if out is not None else None
        inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        described = {
            "model": self.name,
            "inputs": [f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}" for x in inputs],
            "attention": attention,
            "budget": str(self.budget),
            "guide": guide,
            "minimum": minimum,
            "multiple": multiple,
            "pinned": pinned,
            "target": str(self.target),
        }
        self.run = _Run(self.folder, {**described, **(settings or {})}, resume=resume)

        self.model = copy.deepcopy(model)
        with self.run.phase("trace"):
            self.program = trace(self.model, inputs, attention=attention, name=self.name)
        with self.run.phase("profile"):
            self.latency = self._profile(table, force, profile_seconds)
        widths = _Widths(self.program.groups, minimum, multiple, pinned or {})
        self.latency, self.flops = widths.bound(self.latency), widths.bound(flops_model(self.program))
        self._fixed: dict[str, Any] = {"multiple": widths.multiple, "pinned": widths.pinned}
        self.cost = self.flops if "flops" in (self.budget.unit, guide) else self.latency
        with self.run.phase("frontier"):
            self.goal = self._goal()
        self.dense: nn.Module | None = None
        self.method: type[Method] | None = None
        self.found: SearchResult | None = None
        self.history: list[Mapping[str, Any]] = []  # rows of the loop that trained the search, for the report

    @contextmanager
    def search(
        self,
        method: str | Method = DEFAULT_METHOD,
        *,
        steps: int,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        held_out: Iterable[Any] | None = None,
        calibration: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
    ) -> Iterator[Search]:
        """Masks on ``work.model``: the step hooks to call around every one of ``steps`` optimiser steps.

        Leaving the block takes the masks off and keeps what the method found for :meth:`cut`. ``held_out`` yields
        (inputs, labels) beside those that train the weights, for methods that use such; ``calibration`` yields training
        images, which stand in for them; ``loss_fn`` is their loss.
        """
        controller = BudgetController(self._cost_limit(), float(self.cost.dense), ramp_steps=steps // 2)
        self.dense = copy.deepcopy(self.model)
        self.method = method_class(method) if isinstance(method, str) else type(method)
        with Search(
            method,
            self.model,
            self.program.groups,
            self.cost,
            controller,
            steps,
            options,
            seed,
            pinned=self._fixed["pinned"],
            held_out=held_out,
            calibration=calibration,
            loss_fn=loss_fn,
            program=self.program,
            target=self.target,
        ) as search:
            yield search
        self._keep_found(search, controller)

    def cut(self, *, rounds: int = 6, calibration: Iterable[Any] | None = None, refit: bool | None = None) -> nn.Module:
        """Allocate integer widths, cut, measure, and correct until the measured latency fits the budget.

        Over budget, the allowance is tightened; below 93 % of it, grown. When no round fits, the nearest is kept, and
        :meth:`finish` says so. With ``refit`` (None: where the method wants it) the layers that read what is cut are
        solved anew on the batches of ``calibration``. Raises InvalidInput before a search, and for a refit without
        batches.
        """
        if self.found is None or self.method is None:
            raise InvalidInput("there is nothing to cut yet: run `search` first")
        refit = self.method.refits if refit is None else refit
        if refit and calibration is None:
            raise InvalidInput("a refit needs batches: give cut(calibration=...), or refit=False")
        stored = self.run.tensors("cut")
        if stored is not None:
            self.plan = _plan_from(self.run.done["cut"])
            self.keep = stored["keep"].numpy().astype(bool)
        else:
            with self.run.phase("cut"):
                self.plan = self._fit_budget(rounds)
                self.keep = keep_top(self.program.groups, self.plan.widths, self.found.ranking.numpy())
                self.run.finish("cut", {"keep": torch.from_numpy(self.keep)}, **_plan_to(self.plan))
        if refit and calibration is not None:
            with self.run.phase("refit"):
                refit_(self.model, self.program.groups, self.keep, calibration)
        self.pruned = cut(self.model, self.program, self.keep)
        if self.plan.deploys_columns:
            prune_columns_(self.pruned.module, self.found.columns or {}, self.program.groups, self.keep)
        if self.pruned.kind == "program":
            self.say(f"the model's own forward cannot follow the cut ({self.pruned.reason}); the graph is used instead")
        return self.pruned.module

    def finish(
        self, module: nn.Module, accuracy: float | None = None, held_out_accuracy: float | None = None
    ) -> dict[str, Any]:
        """Measure the finished module beside the dense one; save artifact, report and ``result.json``.

        Accuracies are fractions: on test data, and on held-out images, which decide on a floor where there are no test
        data.

        Returns the contents of ``result.json``. Raises BudgetMissed when the module measured above the budget, after
        everything was saved.
        """
        with self.run.phase("measure"):
            dense, pruned = self._race([self.program.module, module])
        limit = self.goal.limit_ms(dense.median_ms)
        if limit is not None and pruned.median_ms > limit and self.plan.met:
            with self.run.phase("measure"):  # it fitted a moment ago: look longer before saying that it does not
                dense, pruned = self._race([self.program.module, module], rounds=32)
            limit = self.goal.limit_ms(dense.median_ms)
        floor = None if self.found is None else self.found.accuracy_floor
        judged = held_out_accuracy if accuracy is None else accuracy
        widths = self.plan.widths
        titles = {segment.name: f"{segment.name}: {segment.description}" for segment in segments(self.program)}
        latency = self._of_method(self.latency)
        shares, staircases = report.explain(latency, self.program.groups, widths, titles=titles)
        result: dict[str, Any] = {
            "model": self.name,
            **{key: self.run.settings[key] for key in ("method", "seed", "epochs") if key in self.run.settings},
            "budget": str(self.budget),
            "guide": self.cost.unit,
            "met": limit is None or pruned.median_ms <= limit,
            "dense_ms": dense.median_ms,
            "budget_ms": limit,
            "floor_ms": self.goal.floor_ms * dense.median_ms / self.goal.dense_ms,
            "predicted_ms": float(latency.predict(widths)),
            "predicted_dense_ms": float(self.latency.predict(self.latency.full)),
            "prediction_residual": float(self.latency.residual),
            "measured_ms": pruned.median_ms,
            "dense_p20_ms": dense.p20_ms,
            "dense_p80_ms": dense.p80_ms,
            "measured_p20_ms": pruned.p20_ms,
            "measured_p80_ms": pruned.p80_ms,
            "measurements": pruned.count,
            "dense_accuracy": self.run.done.get("dense", {}).get("accuracy"),
            "cut_accuracy": self.run.done.get("fine-tune", {}).get("cut_accuracy"),
            "accuracy": accuracy,
            "accuracy_floor": floor,
            "floor_met": None if floor is None or judged is None else judged >= floor,
            "dense_parameters": _parameters(self.model),
            "parameters": _parameters(module),
            "dense_flops": float(self.flops.dense),
            "flops": float(self._of_method(self.flops).price(widths)),
            "widths": dict(zip(self.program.groups.names, widths.tolist(), strict=True)),
            "groups": [asdict(share) for share in shares],
            "frontier": [dict(row) for row in self.goal.frontier],
            "rounds": [dict(row) for row in self.plan.rounds],
            "columns": self.plan.columns and {**self.plan.columns, "deployed": self.plan.deploys_columns},
            "notes": [*(self.found.notes if self.found else ()), *self._column_note()],
            "wall_s": self.run.wall(),
            "target": {
                "description": self.target.describe(),
                "options": str(self.target),
                **fingerprint(self.target),
            },
            "settings": self.run.settings,
            "versions": artifact.versions(),
        }
        if self.folder is not None:
            self._save(module, result, shares, staircases)
        if not result["met"]:
            raise BudgetMissed(
                f"the finished network runs in {pruned.median_ms:.4g} ms, above the budget of {limit:.4g} ms"
                + (f"; it is kept in {self.folder}" if self.folder else ""),
                result,
            )
        return result

    def _save(
        self,
        module: nn.Module,
        result: Mapping[str, Any],
        shares: Sequence[report.GroupShare],
        staircases: Sequence[report.Staircase],
    ) -> None:
        assert self.folder is not None
        artifact.save(
            self.folder,
            module,
            program=self.program,
            keep=self.keep,
            kind=self.pruned.kind,
            model=self.name,
            attention=self.attention,
            target=result["target"],
            provenance={"settings": self.run.settings},
            result=result,
        )
        page = report.Report(
            result,
            shares,
            staircases,
            search=self.run.done.get("search", {}).get("log", []),
            training=self.run.history(),
            rounds=self.plan.rounds,
            notes=[
                *([f"{f.parameter} dim {f.dim} stays whole: {f.reason}" for f in self.program.groups.frozen]),
                *result["notes"],
            ],
        )
        report.write(self.folder / "report.html", page)
        write_file(self.folder / "result.json", json.dumps(result, indent=1).encode())
        self.run.finish("finish")

    def _column_note(self) -> Iterator[str]:
        if self.plan.columns is not None:
            verdict = "are deployed" if self.plan.deploys_columns else "do not pay here, and channels alone were cut"
            used, unused = self.plan.columns["with_ms"], self.plan.columns["without_ms"]
            yield f"pruned columns {verdict}: at equal widths {used:.4g} ms with them and {unused:.4g} ms without"

    def _profile(self, table: str | Path | None, force: bool, seconds: float | None) -> CostModel:
        path = Path(table) if table is not None else self.folder and self.folder / "table.jsonl"
        opened = LatencyTable.open(path, self.target, force=force)  # without a path, in memory
        return profile_program(self.program, self.target, opened, seconds=seconds, progress=self.progress)

    def _goal(self) -> Goal:
        """Measure dense and floor, print what budgets buy, and refuse what cannot be met.

        A resumed run keeps the numbers that it began with, so that its search goes on under the same pull.
        """
        stored = self.run.done.get("frontier")
        if stored is not None:
            return Goal(self.budget, stored["dense_ms"], stored["floor_ms"], tuple(stored["frontier"]))
        groups = self.program.groups
        floor = resize(self.program, keep_first(groups, self.latency.least))
        dense_sample, floor_sample = self._race([self.program.module, floor], rounds=4)
        goal = Goal(
            self.budget,
            dense_sample.median_ms,
            floor_sample.median_ms,
            tuple(self._frontier(floor_sample.median_ms / dense_sample.median_ms)),
        )
        self.say(
            f"{self.name} on {self.target.describe()}: dense {goal.dense_ms:.4g} ms, "
            f"floor {goal.floor_ms:.4g} ms (every group at its least width)"
        )
        for row in goal.frontier:
            self.say(
                f"  within {row['budget']:4.0%} ({row['budget'] * goal.dense_ms:.4g} ms): at most "
                f"{row['channels']:.0%} of the channels, {row['flops']:.0%} of the FLOPs"
            )
        limit = goal.limit_ms(goal.dense_ms)
        if limit is None:
            self.budget.resolve(float(self.flops.dense))
            if self.budget.amount * self.flops.dense < self.flops.floor:
                raise InfeasibleBudget(
                    f"budget {self.budget} is below the floor: with every group at its least width "
                    f"{self.flops.floor / self.flops.dense:.1%} of the FLOPs remain; give at least that"
                )
            self._keep_goal(goal)
            return goal
        self.budget.resolve(goal.dense_ms)
        if goal.floor_ms > LAUNCH_BOUND * goal.dense_ms:
            raise InfeasibleBudget(
                "the model is bound by launches, not by its widths: with every group at its least width it still takes "
                f"{goal.floor_ms:.4g} of its {goal.dense_ms:.4g} ms; prune it for a larger batch or input, or for a "
                "runtime with less overhead"
            )
        if limit < goal.floor_ms:
            raise InfeasibleBudget(
                f"budget {self.budget} ({limit:.4g} ms) is below the floor: with every group at its least width the "
                f"model still takes {goal.floor_ms:.4g} of its {goal.dense_ms:.4g} ms; give at least "
                f"{math.ceil(100 * goal.floor_ms / goal.dense_ms)}%"
            )
        self._keep_goal(goal)
        return goal

    def _keep_goal(self, goal: Goal) -> None:
        self.run.begin()
        frontier = [dict(row) for row in goal.frontier]
        self.run.finish("frontier", dense_ms=goal.dense_ms, floor_ms=goal.floor_ms, frontier=frontier)

    def _frontier(self, floor: float) -> Iterator[dict[str, float]]:
        """The most channels that fit into each budget, by the prediction alone."""
        groups = self.program.groups
        values = values_from_ranking(groups, torch.ones(groups.total), self.latency)
        for budget in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
            if budget <= floor or budget * self.latency.dense < self.latency.floor:
                return
            limit = budget * self.latency.dense
            widths = allocate(self.latency, values, limit, time_limit_s=1, relative_gap=1e-2, **self._fixed).widths
            yield {
                "budget": budget,
                "channels": float(widths.sum() / groups.widths.sum()),
                "flops": float(self.flops.price(widths) / self.flops.dense),
            }

    def _cost_limit(self) -> float:
        """The budget in the unit of the cost that guides the search."""
        limit = self.goal.limit_ms(self.goal.dense_ms)
        fraction = self.budget.amount if limit is None else limit / self.goal.dense_ms
        return max(fraction * float(self.cost.dense), float(self.cost.floor))

    def _fit_budget(self, rounds: int) -> Plan:
        """Allocate, cut and measure until the measured median lies in (93 %, 98.5 %] of the budget."""
        assert self.found is not None and self.method is not None
        groups, found = self.program.groups, self.found
        cost, latency = self._of_method(self.cost), self._of_method(self.latency)
        if self.budget.unit == "flops":  # exact as allocated: nothing to correct
            chosen = self._allocate(self._cost_limit())
            self.say(f"allocated: {chosen}")
            keep = keep_top(groups, chosen.widths, found.ranking.numpy())
            smaller = self._with_columns(keep)
            raced = self._column_times(*self._race([resize(self.program, keep), *smaller])) if smaller else None
            predicted = float(latency.predict(chosen.widths))
            return Plan(chosen.widths, predicted, None, None, (_proof(chosen),), raced)
        most = float(cost.dense)
        if not self.method.fills_budget:  # what the search found is a limit as well
            rounded = np.rint(found.widths.numpy()).astype(np.int64).clip(cost.least, groups.widths)
            most = max(float(cost.price(rounded)), float(cost.floor))
        allowance = _Allowance(min(self._cost_limit(), most), float(cost.floor), most)
        tried: list[Plan] = []
        seen: set[bytes] = set()
        columns: dict[str, float] | None = None
        for _ in range(rounds):
            chosen = self._allocate(allowance.now)
            widths = chosen.widths
            if widths.tobytes() in seen:
                break  # no level lies between the allowances that are left
            seen.add(widths.tobytes())
            keep = keep_top(groups, widths, found.ranking.numpy())
            modules: list[nn.Module] = [self.program.module, resize(self.program, keep)]
            if columns is None or _pays(columns):
                modules += self._with_columns(keep)
            dense, pruned, *others = self._race(modules)
            if others:
                columns = columns or self._column_times(pruned, others[0])
                pruned = others[0] if _pays(columns) else pruned
            limit = self.goal.limit_ms(dense.median_ms)
            assert limit is not None
            used, predicted = pruned.median_ms / limit, float(latency.predict(widths))
            self.say(
                f"allocated: {chosen}; predicted {predicted:.4g} ms, measured {pruned.median_ms:.4g} ms, "
                f"{used:.1%} of the budget"
            )
            row = {"predicted_ms": predicted, "measured_ms": pruned.median_ms, "budget_ms": limit, **_proof(chosen)}
            history = (*(tried[-1].rounds if tried else ()), {**row, "dense_ms": dense.median_ms})
            tried.append(Plan(widths, predicted, pruned.median_ms, limit, history, columns))
            if not allowance.correct(used):
                break
        sound = [plan for plan in tried if plan.used <= MOST_USE] or [plan for plan in tried if plan.met]
        best = max(sound, key=lambda plan: plan.used) if sound else min(tried, key=lambda plan: plan.used)
        return replace(best, rounds=tried[-1].rounds, columns=columns)

    def _with_columns(self, keep: NDArray[np.bool_]) -> list[nn.Module]:
        """The cut network whose convolutions compute only the columns that the search has left; none where it has left
        all, the runtime does not know such convolutions, or the module's own forward cannot follow the cut."""
        assert self.found is not None
        if not self.found.columns or not self.target.runs_own_operators:
            return []
        smaller = cut(self.model, self.program, keep)
        if smaller.kind != "module":
            return []
        prune_columns_(smaller.module, self.found.columns, self.program.groups, keep)
        return [smaller.module.eval()]

    def _column_times(self, without: Sample, used: Sample) -> dict[str, float]:
        """What pruned columns were measured to save at equal widths, said where that is too little."""
        columns = {"without_ms": without.median_ms, "with_ms": used.median_ms}
        if not _pays(columns):
            self.say(
                f"pruned columns do not pay on {self.target.describe()}: {columns['with_ms']:.4g} ms with them and "
                f"{columns['without_ms']:.4g} ms without; channels alone are cut"
            )
        return columns

    def _allocate(self, limit: float) -> Allocation:
        """Widths within `limit`, in the unit of the cost that guides the search, from what was found."""
        assert self.found is not None and self.method is not None
        found = self.found
        cost = self._of_method(self.cost)
        return self.method.allocate(
            self.program.groups, cost, found.widths, found.ranking, limit, value=found.value, **self._fixed
        )

    def _of_method(self, cost: CostModel) -> CostModel:
        """A cost with a price for width 0 where the search was free to remove blocks."""
        return cost.removing if self.found is not None and self.found.removes_blocks else cost

    def _race(self, modules: Sequence[nn.Module], rounds: int = 8) -> list[Sample]:
        """Measure modules in turns against the first, so that a drifting machine treats them alike.

        Turns are short; every block of runs is divided by the drift of the first module's blocks around it.
        """
        deployed, inputs = [build(self.target, module) for module in modules], self.program.example_inputs
        reference = Reference.start(deployed[0], inputs, self.target)
        turns = [
            [
                measure_callable(run, inputs, self.target, seconds=TURN_S, min_blocks=3, reference=reference)
                for run in deployed
            ]
            for _ in range(rounds)
        ]
        return [_pool(samples) for samples in zip(*turns, strict=True)]

    def restore_search(self, method: str) -> bool:
        """Take the result of a finished search from the run's folder; False where there is none."""
        stored = self.run.tensors("search")
        if stored is None:
            return False
        self.dense = copy.deepcopy(self.model)
        self.method = method_class(method)
        record = self.run.done["search"]
        columns = {key.removeprefix("columns."): kept for key, kept in stored.items() if key.startswith("columns.")}
        self.found = SearchResult(
            stored["widths"],
            stored["ranking"],
            record["log"],
            stored.get("value"),
            columns or None,
            record.get("removes_blocks", False),
            record.get("accuracy_floor"),
            tuple(record.get("notes", ())),
        )
        weights = {key.removeprefix("model."): value for key, value in stored.items() if key.startswith("model.")}
        self.model.load_state_dict(weights)
        return True

    def _keep_found(self, search: Search, controller: BudgetController) -> None:
        """Record what the search found; its log gains cost and target as fractions of dense."""
        found = search.result()
        log = [{**row, "target": controller.target(int(row["step"])) / controller.dense} for row in found.log]
        for row in log:
            spent = row.get("cost_hard", row.get("cost_soft"))
            if spent is not None:
                row["cost"] = spent / controller.dense
        self.found = replace(found, log=log)
        state = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        state |= {"widths": found.widths, "ranking": found.ranking}
        if found.value is not None:
            state["value"] = found.value
        state |= {f"columns.{name}": kept for name, kept in (found.columns or {}).items()}
        kind = {"removes_blocks": found.removes_blocks, "accuracy_floor": found.accuracy_floor}
        rows = list(self.history)
        self.run.finish("search", state, log=_thin(log), history=rows, notes=list(found.notes), **kind)


class _Widths:
    """What the user binds the widths to, by index of the group."""

    def __init__(
        self, groups: Groups, minimum: int | Mapping[str, int] | None, multiple: int, pinned: Mapping[str, int]
    ) -> None:
        index = {name: g for g, name in enumerate(groups.names)}
        if isinstance(minimum, Mapping):
            by_name = dict(minimum)
        else:
            by_name = {group.name: min(minimum, group.width) for group in groups} if minimum is not None else {}
        if unknown := [name for name in (*by_name, *pinned) if name not in index]:
            raise InvalidInput(f"there is no group {unknown[0]!r}; there are {', '.join(groups.names)}")
        if multiple < 1:
            raise InvalidInput(f"multiple={multiple} must be at least 1")
        self.multiple = multiple
        self.pinned = {index[name]: int(width) for name, width in pinned.items()}
        self._full = np.asarray(groups.widths, dtype=np.int64)
        self._minimum = {index[name]: int(width) for name, width in by_name.items()}
        for g, width in (*self._minimum.items(), *self.pinned.items()):
            if not 1 <= width <= self._full[g]:
                raise InvalidInput(f"{groups.names[g]} can have 1 to {self._full[g]} channels, not {width}")

    def bound(self, cost: CostModel) -> CostModel:
        """The same costs, with what the user allows as the least widths."""
        if self.multiple == 1 and not self._minimum and not self.pinned:
            return cost
        least = cost.least.copy()
        for g, width in self._minimum.items():
            least[g] = max(least[g], width)
        least = np.minimum(-(-least // self.multiple) * self.multiple, self._full)
        least[list(self.pinned)] = list(self.pinned.values())
        removable = None if cost.removable is None else cost.removable.copy()
        if removable is not None:
            removable[[*self._minimum, *self.pinned]] = False
        return replace(cost, minimum=least, removable=removable)


class _Allowance:
    """How much an allocation may cost, corrected by what the last one measured.

    The prediction is never exact, so the allowance is scaled by how far the measurement missed, and bisected once it is
    known between which allowances the answer lies.
    """

    def __init__(self, start: float, floor: float, most: float) -> None:
        self.now, self._floor, self._most = start, floor, most
        self._fits, self._breaks = 0.0, math.inf  # largest allowance that measured below, smallest that measured above

    def correct(self, used: float) -> bool:
        """Take measured / budget of the present allowance; False where it is good, or cannot be better."""
        if LEAST_USE < used <= MOST_USE:
            return False
        if used > MOST_USE:
            self._breaks = min(self._breaks, self.now)
        else:
            self._fits = max(self._fits, self.now)
        proposal = self.now * AIM / used
        if not self._fits < proposal < self._breaks:
            proposal = (self._fits + self._breaks) / 2
        proposal = min(max(proposal, self._floor), self._most)
        before, self.now = self.now, proposal
        return proposal != before


class _Trainer:
    """The training phases of :func:`prune`, each skipped where the run has it already."""

    def __init__(
        self,
        work: Pruning,
        train_loader: Iterable[Any],
        test_loader: Iterable[Any] | None,
        validation_loader: Iterable[Any] | None,
        calibration_loader: Iterable[Any],
        recipe: Recipe,
        loss_fn: LossFn | None,
    ) -> None:
        self.work, self.run = work, work.run
        self.train_loader, self.test_loader = train_loader, test_loader
        self.validation_loader, self.calibration_loader = validation_loader, calibration_loader
        self.recipe, self.loss_fn = recipe, loss_fn

    def dense(self, epochs: int) -> None:
        """Train the dense model where asked, and take its accuracy."""
        work = self.work
        stored = self.run.tensors("dense")
        if stored is not None:
            work.model.load_state_dict(stored)
            return
        with self.run.phase("dense"):
            rows = self._fit("dense", work.model, epochs, distill=0.0) if epochs else []
            self.run.finish("dense", work.model.state_dict(), accuracy=self.accuracy(work.model), history=rows)

    def search(self, method: str, epochs: int, options: Mapping[str, Any], seed: int) -> None:
        """Train with masks until the method has settled on widths and a ranking."""
        work = self.work
        if work.restore_search(method):
            return
        steps = epochs * epoch_length(self.train_loader)
        with (
            self.run.phase("search"),
            work.search(
                method,
                steps=steps,
                options=options,
                seed=seed,
                held_out=self.validation_loader,
                calibration=self.calibration_loader,
                loss_fn=self.loss_fn,
            ) as hooks,
        ):
            work.history = self._fit("search", work.model, epochs, hooks=hooks, distill=0.0) if epochs else []

    def fine_tune(self, module: nn.Module, epochs: int) -> None:
        """Adapt the BatchNorm statistics to the cut, then train with the dense model as teacher."""
        stored = self.run.tensors("fine-tune")
        if stored is not None:
            module.load_state_dict(stored)
            return
        with self.run.phase("fine-tune"):
            if self.work.dense is not None:
                match_scales_(module, self.work.dense, self.work.program.groups)
            recalibrate(module, self.calibration_loader, batches=50)
            cut_accuracy = self.accuracy(module)
            rows = self._fit("fine-tune", module, epochs, teacher=self.work.dense) if epochs else []
            self.run.finish("fine-tune", module.state_dict(), history=rows, cut_accuracy=cut_accuracy)

    def accuracy(self, module: nn.Module) -> float | None:
        """Accuracy on the test data, a fraction; None without test data."""
        return None if self.test_loader is None else evaluate(module, self.test_loader).accuracy

    def held_out_accuracy(self, module: nn.Module) -> float | None:
        """Accuracy on the held-out images, for a floor without test data; None where it is not asked for."""
        assert self.work.found is not None
        if self.test_loader is not None or self.validation_loader is None or self.work.found.accuracy_floor is None:
            return None
        return evaluate(module, self.validation_loader).accuracy

    def _fit(
        self, phase: str, model: nn.Module, epochs: int, *, distill: float | None = None, **extra: Any
    ) -> list[Mapping[str, Any]]:
        """One call of the training loop, checkpointed in the run's folder; its rows carry the phase."""
        recipe = replace(self.recipe, epochs=epochs)
        if distill is not None:
            recipe = replace(recipe, distill=distill)
        history = fit(
            model,
            self.train_loader,
            recipe,
            loss_fn=self.loss_fn,
            checkpoint=self.run.checkpoint(phase),
            resume=self.run.resumed,
            progress=self.work.progress,
            description=phase,
            **extra,
        )
        return [{"phase": phase, **row} for row in history.rows]


class _Run:
    """What a run has done so far, in ``state/`` of its folder: the phases' results, weights and seconds.

    Without a folder everything stays in memory. Files are replaced whole, so a kill at any moment leaves them good.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.done: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.resumed = resume and folder is not None
        self._memory: dict[str, Mapping[str, Tensor]] = {}
        self._state = folder / "state" if folder is not None else None
        self._begun = False
        if folder is None or self._state is None:
            return
        path = self._state / "run.json"
        if self.resumed and path.is_file():
            self._read(path)
            self._begun = True
            return
        if any(self._state.glob("*.checkpoint")) and not (folder / "result.json").is_file():
            raise InvalidInput(
                f"{folder} holds a run that was not finished; continue it with --resume, choose another folder, or "
                "delete it"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InvalidInput(f"cannot write to {folder}: {error.strerror}; choose another folder") from error

    def begin(self) -> None:
        """Clear away the run that the folder held before: what was asked for can be done, and is about to be."""
        if self._state is None or self._begun:
            return
        shutil.rmtree(self._state, ignore_errors=True)
        self._state.mkdir(parents=True)
        for stale in (artifact.SPEC, "result.json", "report.html"):
            (self._state.parent / stale).unlink(missing_ok=True)
        self._begun = True

    def _read(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text())
            settings, self.done, self.seconds = stored["settings"], stored["done"], stored["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptArtifact(f"{path} cannot be read ({error}); start again without --resume") from error
        differs = artifact.difference(settings, self.settings)
        if differs:
            raise InvalidInput(
                f"{path.parent.parent} holds a run with {differs}; resume with the same, or start again without "
                "--resume"
            )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a phase, over all its interruptions, and tell an interruption where it struck."""
        start = time.perf_counter()
        try:
            yield
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(name)
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._write()

    def finish(self, name: str, tensors: Mapping[str, Tensor] | None = None, **values: Any) -> None:
        """Record the result of a phase: tensors first, so that what is recorded as done can be read."""
        if tensors is not None:
            if self._state is None:
                self._memory[name] = {key: tensor.detach().clone() for key, tensor in tensors.items()}
            else:
                from safetensors.torch import save as to_safetensors

                plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
                write_file(self._state / f"{name}.safetensors", to_safetensors(plain))
        self.done[name] = values
        self._write()

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """What a finished phase left, or None where it is not finished."""
        if name not in self.done:
            return None
        if self._state is None:
            return dict(self._memory[name])
        from safetensors.torch import load_file

        path = self._state / f"{name}.safetensors"
        try:
            return dict(load_file(path))
        except Exception as error:  # safetensors' own errors share no base class
            raise CorruptArtifact(f"{path} cannot be read ({error}); start again without --resume") from error

    def checkpoint(self, name: str) -> Path | None:
        """Where the training loop keeps a phase that is not finished."""
        return None if self._state is None else self._state / f"{name}.checkpoint"

    def history(self) -> list[Mapping[str, Any]]:
        """Rows of every training phase, in order."""
        return [row for values in self.done.values() for row in values.get("history", [])]

    def wall(self) -> dict[str, float]:
        """Seconds by phase, and their total."""
        return {**self.seconds, "total": sum(self.seconds.values())}

    def _write(self) -> None:
        if self._state is not None and self._begun:
            stored = {"settings": self.settings, "done": self.done, "seconds": self.seconds}
            write_file(self._state / "run.json", json.dumps(stored).encode())


def profile(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    target: Target | None = None,
    table: str | Path | None = None,
    profile_seconds: float | None = None,
    force: bool = False,
    progress: bool = True,
) -> CostModel:
    """Measure what a model's widths cost on a target, into a table (JSON Lines) that an interrupted call continues.

    Returns the cost model in ms of one forward at the batch of ``example_inputs``. Raises UnsupportedModel,
    DeviceMismatch or CorruptTable.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    program = trace(copy.deepcopy(model), inputs)
    target = target or Target()
    opened = LatencyTable.open(table, target, force=force)
    return profile_program(program, target, opened, seconds=profile_seconds, progress=progress)


def repeatability(target: Target | None = None) -> float:
    """Relative difference between two measurements of one small network on this machine, a second apart."""
    target = target or Target()
    x = torch.randn(1, 16, 32, 32)
    deployed = build(target, trace(nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(8))), (x,)).module)
    first, second = (measure_callable(deployed, (x,), target, seconds=1.0).median_ms for _ in range(2))
    return abs(first - second) / min(first, second)


def measure(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, target: Target | None = None, rounds: int = 5
) -> Sample:
    """Measure one forward of a model in a target's runtime: median and quantiles in ms."""
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    target = target or Target()
    deployed = build(target, model)
    return _pool([measure_callable(deployed, inputs, target) for _ in range(rounds)])


@dataclass(frozen=True)
class Check:
    """Whether a model can be pruned here: its program, and how far the smaller networks were from the masked ones."""

    program: Program
    kind: str  # of the cut: "module" or "program"
    reason: str  # why the model's own forward cannot follow, or ""
    masked_error: float  # resized program against masked model, relative to the largest output
    cut_error: float  # cut module against resized program
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether masked model, resized program and cut module agreed for every random keep."""
        return self.masked_error <= self.tolerance and self.cut_error <= self.tolerance  # and neither is NaN


def check(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    attention: Attention = "heads",
    draws: int = 3,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> Check:
    """Test "masked model = resized program = cut module" on random keeps of a model.

    Groups that a layer norm normalises over are kept whole in the comparison with the mask, which such a norm makes
    impossible, and pruned in the comparison of the program with the module. Raises UnsupportedModel.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    model = _jittered(copy.deepcopy(model).eval(), seed)
    program = trace(model, inputs, attention=attention)
    groups = program.groups
    generator = np.random.default_rng(seed)
    exempt = np.array([group.normalised is not None for group in groups], dtype=bool)
    masked_errors, cut_errors = [0.0], [0.0]
    smaller = None
    with torch.no_grad():
        for _ in range(draws if len(groups) else 0):
            widths = np.maximum(1, np.round(groups.widths * generator.uniform(0.3, 0.9, len(groups)))).astype(np.int64)
            ranking = generator.permutation(groups.total).astype(np.float64)
            keep = keep_top(groups, widths, ranking)
            smaller = cut(model, program, keep)
            resized = resize(program, keep).eval()(*inputs)
            cut_errors.append(_distance(smaller.module.eval()(*inputs), resized))
            keep = keep_top(groups, np.where(exempt, groups.widths, widths), ranking)
            masked = mask_(copy.deepcopy(model), groups)
            masked.set(torch.from_numpy(keep).to(torch.float32))
            masked_errors.append(_distance(masked.model(*inputs), resize(program, keep).eval()(*inputs)))
    kind, reason = (smaller.kind, smaller.reason or "") if smaller is not None else ("module", "")
    return Check(program, kind, reason, float(np.max(masked_errors)), float(np.max(cut_errors)), tolerance)


def _jittered(model: nn.Module, seed: int) -> nn.Module:
    """Norms away from their initial ones and zeros, with which a wrong channel could go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.ndim == 1 and tensor.is_floating_point():
                    noise = 0.2 * torch.rand(tensor.shape, generator=generator)
                    tensor.add_(noise.to(tensor) if name != "running_mean" else noise.to(tensor) - 0.1)
    return model


def _distance(a: Any, b: Any) -> float:
    """Largest difference between two outputs, relative to the largest value of either; NaN where one holds such."""
    first, second = (
        torch.cat([leaf.double().flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
        for output in (a, b)
    )
    largest = torch.maximum(first.abs().max(), second.abs().max())
    return float((first - second).abs().max() / largest.clamp_min(torch.finfo(torch.float64).tiny))


def _parse_budget(budget: str | Budget | None, budget_ms: float | None) -> Budget:
    if (budget is None) == (budget_ms is None):
        raise InvalidInput('give either budget_ms (a number of ms) or budget ("2.4ms", "50%", "50%flops")')
    if budget_ms is not None:
        return Budget("ms", float(budget_ms))
    return Budget.parse(budget) if isinstance(budget, str) else budget  # type: ignore[return-value]


def _pays(columns: Mapping[str, float]) -> bool:
    """Whether column kernels were measured to be worth it."""
    return columns["with_ms"] < COLUMNS_PAY * columns["without_ms"]


def _proof(chosen: Allocation) -> dict[str, Any]:
    """How far an allocation may be from the best one, and who found it."""
    return {"optimality_gap": chosen.gap, "allocator": chosen.method}


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _pool(samples: Sequence[Sample]) -> Sample:
    """One sample from several of the same network: the median of the medians and of the quantiles."""
    return replace(
        samples[0],
        median_ms=float(np.median([s.median_ms for s in samples])),
        p20_ms=float(np.median([s.p20_ms for s in samples])),
        p80_ms=float(np.median([s.p80_ms for s in samples])),
        count=sum(s.count for s in samples),
        contention=max(s.contention for s in samples),
    )


def _plan_to(plan: Plan) -> dict[str, Any]:
    return {**asdict(plan), "widths": plan.widths.tolist()}


def _plan_from(stored: Mapping[str, Any]) -> Plan:
    return Plan(**{**stored, "widths": np.asarray(stored["widths"], dtype=np.int64), "rounds": tuple(stored["rounds"])})


def _thin(rows: Sequence[Mapping[str, Any]], most: int = 400) -> list[Mapping[str, Any]]:
    """At most so many rows of a long log, evenly spaced, the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, most).round().astype(int)]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _to_nowhere(line: str) -> None:
    del line

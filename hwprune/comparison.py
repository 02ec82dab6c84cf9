"""Methods beside one another at equal measured milliseconds: same images, same epochs, same table, several seeds.

Every run is one call of :func:`hwprune.pipeline.prune` in its own folder, so that a comparison killed at any moment
continues where it was, and several processes may work on one comparison: a run that another one holds is passed over.
``settings.json`` keeps what all runs share, so that rows of other epochs, data or weights never stand beside them. What
is finished is gathered in ``compare.json`` (a ``context`` and ``rows``), tabulated in ``compare.md`` and drawn in
``compare.svg``.
"""

import copy
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hwprune import artifact
from hwprune.budget import Budget
from hwprune.data import Data
from hwprune.errors import CorruptArtifact, InvalidInput
from hwprune.files import write_file
from hwprune.latency import Target, fingerprint
from hwprune.models import load_weights
from hwprune.pipeline import BudgetMissed, prune
from hwprune.search import create
from hwprune.train import Recipe, fit

try:
    import fcntl
except ImportError:  # not a POSIX system: one process at a time
    fcntl = None  # type: ignore[assignment]

Row = Mapping[str, Any]
_ONE_LEVEL = 1.25  # dense latencies further apart than by this factor are no drift
_LEFT_OUT = ("settings", "groups", "target", "rounds", "frontier")  # of result.json; the run's folder keeps them


@dataclass(frozen=True)
class Entry:
    """A method as a comparison writes it, with ``text`` as the name of its rows.

    ``NAME``, ``NAME@flops`` (guided by FLOPs, held to the same milliseconds), ``NAME:key=value:key=value`` for options,
    whose values are JSON or plain words.
    """

    text: str
    name: str
    guide: str = "ms"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Raises InvalidInput for an unknown method, guide or option."""
        head, *pairs = _parts(text.strip(), ":")
        name, _, guide = head.partition("@")
        if guide not in ("", "ms", "flops"):
            raise InvalidInput(f"method {text!r} asks for the guide {guide!r}; possible: ms, flops")
        options: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise InvalidInput(f"method {text!r} has {pair!r}, which is no option; write NAME:key=value")
            try:
                options[key] = json.loads(value)
            except ValueError:
                options[key] = value
        create(name, **options)
        return cls(text.strip(), name, guide or "ms", options)

    @classmethod
    def parse_all(cls, text: str) -> "list[Entry]":
        """Entries with commas between; see :meth:`parse`."""
        return [cls.parse(part) for part in _parts(text, ",")]


def compare(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    entries: Sequence[Entry],
    budgets: Sequence[str],
    seeds: Sequence[int],
    data: Callable[[int], Data],
    *,
    search_epochs: int,
    epochs: int,
    recipe: Recipe,
    out: Path,
    dense_epochs: int = 0,
    target: Target | None = None,
    name: str = "model",
    provenance: Mapping[str, Any] | None = None,
    latency_table: Path | None = None,
    profile_seconds: float | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run every method at every budget with every seed, and return the rows of all that is finished.

    ``data(seed)`` gives what is trained on; ``out`` keeps everything. With ``dense_epochs`` the dense model is trained
    first, once for all; ``search_epochs`` and ``epochs`` are as in :func:`hwprune.pipeline.prune`, the same sum for all
    methods. A run that misses its budget is a row all the same, and says so. A folder takes more methods, budgets and
    seeds later, and no other settings. Raises InvalidInput for such, InvalidInput or InfeasibleBudget where a run
    cannot be begun.
    """
    target = target or Target()
    inputs = [example] if isinstance(example, Tensor) else example
    settings = {
        "model": name,
        "inputs": [list(x.shape) for x in inputs],
        "target": target.describe(),
        "search_epochs": search_epochs,
        "epochs": epochs,
        "dense_epochs": dense_epochs,
        **{key: value for key, value in asdict(recipe).items() if key not in ("epochs", "seed")},
        "latency_table": None if latency_table is None else str(latency_table),
        "profile_seconds": profile_seconds,
        **(provenance or {}),
    }
    with _claimed(out, wait=True):
        _agree(out, settings)
        model = _dense(model, data(seeds[0]), replace(recipe, epochs=dense_epochs, seed=seeds[0]), out, progress)
    plan = [(budget, seed, entry) for budget in budgets for seed in seeds for entry in entries]
    for at, (budget, seed, entry) in enumerate(plan):
        folder = out / _stem(entry, budget, seed)
        with _claimed(folder) as ours:
            if not ours or (folder / "row.json").is_file():
                continue
            say(f"{at + 1} of {len(plan)}: {entry.text} at {budget}, seed {seed}")
            loaded = data(seed)
            try:
                result = prune(
                    model,
                    example,
                    train_loader=loaded.train,
                    test_loader=loaded.test,
                    validation_loader=loaded.validation,
                    calibration_loader=loaded.calibration,
                    budget=budget,
                    target=target,
                    method=entry.name,
                    options=entry.options,
                    guide=entry.guide,
                    recipe=recipe,
                    epochs=epochs,
                    search_epochs=search_epochs,
                    out=folder,
                    table=latency_table or out / "table.jsonl",
                    profile_seconds=profile_seconds,
                    resume=True,
                    seed=seed,
                    name=name,
                    provenance=provenance,
                    progress=progress,
                ).result
            except BudgetMissed as missed:
                result = missed.result
            found = {key: value for key, value in result.items() if key not in _LEFT_OUT}
            used = result["settings"]  # epochs that a method has no use for while it searches were spent afterwards
            spent = {"search": used["search_epochs"], "fine_tune": used["epochs"], "lr": used["lr"]}
            row = {**found, "method": entry.text, "budget": budget, "seed": seed, **spent}
            write_file(folder / "row.json", json.dumps(row, indent=1).encode())
        gather(out, target, provenance)
    return gather(out, target, provenance)


def gather(out: Path, target: Target, provenance: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Write ``compare.json``, ``.md`` and ``.svg`` from the finished runs in a folder; returns the rows."""
    with _claimed(out, wait=True):  # two writers of one file would take it away from each other
        rows = [json.loads(path.read_text()) for path in sorted(out.glob("*/row.json"))]
        context = {**fingerprint(target), **artifact.versions(), **(provenance or {})}
        write_file(out / "compare.json", json.dumps({"context": context, "rows": rows}, indent=1).encode())
        write_file(out / "compare.md", table(summary(rows)).encode())
        if rows:
            draw(rows, out / "compare.svg")
    return rows


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line per budget and method, the best accuracy first: means over seeds, and their standard deviations."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["budget"], row["method"]), []).append(row)
    lines = []
    for (budget, method), runs in groups.items():
        accuracy = [run["accuracy"] for run in runs]
        share = [run["measured_ms"] / run["dense_ms"] for run in runs]
        lines.append(
            {
                "budget": budget,
                "method": method,
                "seeds": len(runs),
                "dense_accuracy": statistics.fmean(run["dense_accuracy"] for run in runs),
                "cut_accuracy": _mean([run.get("cut_accuracy") for run in runs]),
                "accuracy": statistics.fmean(accuracy),
                "accuracy_std": statistics.stdev(accuracy) if len(runs) > 1 else None,
                "measured_ms": statistics.fmean(run["measured_ms"] for run in runs),
                "share_of_dense": statistics.fmean(share),
                "share_std": statistics.stdev(share) if len(runs) > 1 else None,
                "share_of_budget": statistics.fmean(map(_used, runs)),
                "met": sum(bool(run["met"]) for run in runs),
                "wall_s": statistics.fmean(run["wall_s"]["total"] for run in runs),
            }
        )
    return sorted(lines, key=lambda line: (-Budget.parse(line["budget"]).amount, -line["accuracy"]))


COLUMNS = (
    "budget",
    "method",
    "right after the cut",
    "accuracy",
    "measured",
    "of dense",
    "of budget",
    "met",
    "wall time",
)


def cells(line: Row) -> tuple[str, ...]:
    """What is shown of a line of :func:`summary`, in the order of ``COLUMNS``."""
    spread = "" if line["accuracy_std"] is None else f" ± {100 * line['accuracy_std']:.2f}"
    return (
        line["budget"],
        line["method"],
        "" if line["cut_accuracy"] is None else f"{line['cut_accuracy']:.2%}",
        f"{100 * line['accuracy']:.2f}{spread} %",
        f"{line['measured_ms']:.4g} ms",
        f"{line['share_of_dense']:.1%}",
        f"{line['share_of_budget']:.1%}",
        f"{line['met']}/{line['seeds']}",
        f"{line['wall_s']:.0f} s",
    )


def table(lines: Sequence[Row]) -> str:
    """The lines of :func:`summary` in Markdown."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *map(cells, lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against measured latency with standard deviations over seeds, and the wall time of each whole flow.

    Latencies are parts of the dense one of the same window, in which a drifting machine takes no part; where all rows
    have about one dense latency they are given in ms of its median, with the parts on top.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = summary(rows)
    dense_ms = _dense_level(rows)
    unit = dense_ms or 100.0  # of the axis, for the whole dense latency
    methods = sorted({line["method"] for line in lines})
    colours = {method: f"C{at}" if at < 10 else plt.get_cmap("tab20b")(at) for at, method in enumerate(methods)}
    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with plt.rc_context({**style, "svg.hashsalt": "hwprune", "svg.fonttype": "none"}):
        height = 1.2 + 0.28 * max(len(methods), 8)
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, height), layout="constrained", width_ratios=(3, 2))
        for method in methods:
            mine = sorted((line for line in lines if line["method"] == method), key=lambda line: line["share_of_dense"])
            bars = left.errorbar(
                [unit * line["share_of_dense"] for line in mine],
                [100 * line["accuracy"] for line in mine],
                xerr=[math.nan if line["share_std"] is None else unit * line["share_std"] for line in mine],
                yerr=[math.nan if line["accuracy_std"] is None else 100 * line["accuracy_std"] for line in mine],
                marker="o",
                markersize=4,
                linewidth=1,
                capsize=2,
                color=colours[method],
                label=method,
            )
            # Names in the file, by which its lines are told apart.
            bars.lines[0].set_gid(f"line {method}")
            for direction, spread in zip("xy", bars.lines[2], strict=True):
                spread.set_gid(f"spread {direction} {method}")
        dense = 100 * statistics.fmean(line["dense_accuracy"] for line in lines)
        left.axhline(dense, color="#7a8896", linewidth=0.8, linestyle=":")
        left.set(xlabel=f"measured latency, {'% of dense' if dense_ms is None else 'ms'}", ylabel="accuracy, %")
        if dense_ms is not None:
            top = left.secondary_xaxis(
                "top", functions=(lambda ms: 100 * ms / dense_ms, lambda part: part * dense_ms / 100)
            )
            top.set_xlabel(f"% of dense, {dense_ms:.3g} ms")
        left.legend(fontsize=7, frameon=False)
        walls = {m: statistics.fmean(line["wall_s"] for line in lines if line["method"] == m) for m in methods}
        order = sorted(methods, key=lambda method: walls[method])
        right.barh(order, [walls[method] for method in order], color=[colours[method] for method in order], height=0.6)
        right.set(xlabel="wall time of one whole flow, s")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _parts(text: str, separator: str) -> list[str]:
    """Text split at the separators that stand in no bracket and in no JSON string. Raises InvalidInput."""
    parts, depth, start, quoted, escaped = [], 0, 0, False, False
    for at, character in enumerate(text):
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            quoted = True
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == separator and not depth:
            parts.append(text[start:at])
            start = at + 1
    if depth or quoted:
        raise InvalidInput(
            f"method {text!r} has a bracket or a quotation mark without its other half; write JSON values"
        )
    return [*parts, text[start:]]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _used(row: Row) -> float:
    """The part of its budget, in ms or in FLOPs, that the network of a row takes."""
    if row["budget_ms"] is not None:
        return float(row["measured_ms"] / row["budget_ms"])
    return float(row["flops"] / (Budget.parse(row["budget"]).amount * row["dense_flops"]))


def _dense_level(rows: Sequence[Row]) -> float | None:
    """The median dense latency in ms; None where some row's is another: its machine or its batch was."""
    every = [row["dense_ms"] for row in rows]
    level = statistics.median(every)
    return level if max(every) <= _ONE_LEVEL * level and level <= _ONE_LEVEL * min(every) else None


def _stem(entry: Entry, budget: str, seed: int) -> str:
    safe = "".join(character if character.isalnum() or character in "._=@-" else "_" for character in entry.text)
    return f"{safe}-{budget.replace('%', 'pct')}-s{seed}"


def _agree(out: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings of a comparison in its folder, once, or refuse others than those; the folder is held.

    Rows of a version that kept none are taken for rows of these settings.
    """
    path = out / "settings.json"
    if not path.is_file():
        write_file(path, json.dumps(settings, indent=1).encode())
        return
    try:
        stored = dict(json.loads(path.read_text()))
    except ValueError as error:
        raise CorruptArtifact(f"{path} cannot be read ({error}); choose another folder") from error
    differs = artifact.difference(stored, json.loads(json.dumps(settings)))
    if differs:
        raise InvalidInput(
            f"{out} holds a comparison with {differs}, and rows of both cannot be compared; give the settings that it "
            "has, or choose another folder"
        )


def _dense(model: nn.Module, data: Data, recipe: Recipe, out: Path, progress: bool) -> nn.Module:
    """What every run starts from: a copy of the model, trained where epochs are asked for."""
    from safetensors.torch import save as to_safetensors

    model = copy.deepcopy(model)
    path = out / "dense.safetensors"
    if path.is_file():
        load_weights(model, path)
        return model
    if recipe.epochs:
        fit(
            model,
            data.train,
            replace(recipe, distill=0.0),
            checkpoint=out / "dense.checkpoint",
            resume=True,
            progress=progress,
            description="dense",
        )
    state = {key: tensor.detach().cpu().clone() for key, tensor in model.state_dict().items()}
    write_file(path, to_safetensors(state))
    return model


@contextmanager
def _claimed(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds a folder, for the block; a killed process holds nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "ab")  # noqa: SIM115  closed below
    except OSError as error:
        raise InvalidInput(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
        yield True

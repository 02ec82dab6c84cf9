"""Commands: ``hwprune doctor | check | profile | prune | compare | measure | export | tables | methods | bench``.

Every command prints a table for people, or with ``--json`` one JSON document on stdout. Errors are one sentence on
stderr. Exit status: 0 done, 1 the check failed, 2 wrong input, 3 the finished network missed its budget,
130 interrupted.
"""

import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn

from hwprune import __version__, artifact, comparison, ops, pipeline
from hwprune.budget import Budget
from hwprune.data import HELD_OUT, Data, load_data
from hwprune.errors import BackendUnavailable, HwpruneError, InvalidInput
from hwprune.graph import trace
from hwprune.latency import LatencyTable, Target, available_runtimes, fingerprint
from hwprune.latency import merge as merge_tables
from hwprune.models import load_model
from hwprune.search import DEFAULT_METHOD, METHODS, create, method_class
from hwprune.train import Recipe

app = typer.Typer(
    name="hwprune",
    help="Prune PyTorch networks to a latency budget, measured on the device that will run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_MODELS = "resnet20, vgg16_bn, torchvision:NAME, timm:NAME or package.module:function"

ModelSpec = Annotated[str, typer.Argument(metavar="MODEL", help=_MODELS)]
DataSpec = Annotated[
    str,
    typer.Option(
        help="digits, cifar10:PATH, cifar100:PATH, fashion-mnist:PATH, folder:PATH or package.module:function"
    ),
]
Weights = Annotated[Path | None, typer.Option(help="A safetensors file, or one that torch.load(weights_only) reads.")]
Classes = Annotated[int, typer.Option(help="Number of logits.")]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", metavar="SHAPE", help="Input shape, such as 1,3,224,224; once per input.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Table = Annotated[Path | None, typer.Option(help="Latency table to use and extend (JSON Lines).")]
ProfileSeconds = Annotated[
    float | None, typer.Option("--profile-seconds", help="Measure for about so long where the table holds too little.")
]
Force = Annotated[bool, typer.Option("--force", help="Use a table that was measured on another machine.")]
_DEVICE = typer.Option(help="Device whose latency counts: cpu, cuda, cuda:1.")
_RUNTIME = typer.Option(help="What runs the network: eager, compile, onnxruntime or cudagraph.")
_DTYPE = typer.Option(help="float32, float16 or bfloat16.")
_MEMORY_FORMAT = typer.Option(help="contiguous or channels_last.")
_THREADS = typer.Option(help="CPU threads of the deployed network.", min=1)
Device = Annotated[str, _DEVICE]
Runtime = Annotated[str, _RUNTIME]
Dtype = Annotated[str, _DTYPE]
MemoryFormat = Annotated[str, _MEMORY_FORMAT]
Threads = Annotated[int, _THREADS]
KeepBatchNorm = Annotated[
    bool, typer.Option("--keep-batch-norm", help="Time batch norms as they are; by default they are folded.")
]
Minimum = Annotated[int | None, typer.Option(help="Least width of every group.", min=1)]
Multiple = Annotated[int, typer.Option(help="Widths are multiples of it, or whole.", min=1)]
Pin = Annotated[
    list[str] | None, typer.Option(metavar="GROUP=WIDTH", help="A group's width; `hwprune check` names the groups.")
]
Attention = Annotated[
    Literal["heads", "dims"],
    typer.Option(help="What is pruned of an attention: whole heads, or the dims of every head."),
]


def _command(function: Callable[..., int | None]) -> Callable[..., None]:
    """Register a command: its errors become one sentence and an exit status."""

    @wraps(function)
    def run(*args: Any, **keywords: Any) -> None:
        try:
            code = function(*args, **keywords) or 0
        except pipeline.BudgetMissed as error:
            code = _fail(error, 3)
        except HwpruneError as error:
            code = _fail(error, 2)
        except KeyboardInterrupt as interrupt:
            code = _interrupted(interrupt)
        raise typer.Exit(code)

    return app.command(name=function.__name__.rstrip("_"))(run)


def _fail(error: BaseException | str, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    phase = next(iter(getattr(interrupt, "__notes__", [])), None)
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    if arguments[:1] == ["prune"]:
        arguments.append("--resume")
    where = f" during {phase}" if phase else ""
    again = shlex.join(["hwprune", *arguments])
    print(f"\ninterrupted{where}: what was measured and trained is kept; continue with: {again}", file=sys.stderr)
    return 130


@_command
def doctor(as_json: Json = False) -> None:
    """What this machine offers: software, runtimes, operator backends, and how steady its clock is."""
    sample = pipeline.repeatability()
    facts = {
        "hwprune": __version__,
        **fingerprint(Target()),
        "runtimes": {name: reason or "ready" for name, reason in available_runtimes().items()},
        "backends": {name: reason or "ready" for name, reason in ops.backends().items()},
        "repeatability": sample,
    }
    if as_json:
        _print_json(facts)
        return
    rows = [(key, str(value)) for key, value in facts.items() if not isinstance(value, Mapping | float)]
    for kind in ("runtimes", "backends"):
        rows += [(f"{kind[:-1]} {name}", state) for name, state in facts[kind].items()]  # type: ignore[union-attr]
    rows.append(("repeatability", f"{sample:.1%} between two measurements of one network"))
    _print_table("This machine", ("", ""), rows)
    if sample > 0.05:
        print("The machine is not quiet: close what else runs on it before profiling.", file=sys.stderr)


@_command
def check(
    model: ModelSpec,
    inputs: Inputs = None,
    weights: Weights = None,
    classes: Classes = 10,
    attention: Attention = "heads",
    as_json: Json = False,
) -> int:
    """Will it work on my model? Groups, what stays whole and why, and the law tested with random keeps."""
    shapes = _shapes(inputs, model)
    network = load_model(model, classes=classes, in_channels=_channels(shapes), weights=weights)
    found = pipeline.check(network, _example(shapes), attention=attention)
    groups = found.program.groups
    if as_json:
        _print_json(
            {
                "model": model,
                "holds": found.holds,
                "groups": [
                    {"name": g.name, "width": g.width, "parameters": len(g.slots), "normalised": g.normalised}
                    for g in groups
                ],
                "frozen": [
                    {"parameter": f.parameter, "dim": f.dim, "operator": f.operator, "reason": f.reason}
                    for f in groups.frozen
                ],
                "cut": found.kind,
                "reason": found.reason,
                "masked_error": found.masked_error,
                "cut_error": found.cut_error,
                "tolerance": found.tolerance,
            }
        )
    else:
        rows = [(g.name, str(g.width), str(len(g.slots)), g.normalised or "") for g in groups]
        _print_table("Groups of coupled channels", ("group", "width", "parameters", "normalised by"), rows)
        stays = [(f"{f.parameter} dim {f.dim}", f.operator, f.reason) for f in groups.frozen]
        _print_table("What stays whole", ("parameter", "operator", "reason"), stays)
        cut = "the module itself" if found.kind == "module" else f"the resized graph, because {found.reason}"
        verdict = "holds" if found.holds else "DOES NOT HOLD"
        print(
            f"masked model = resized program = cut module {verdict} for random keeps: largest relative differences "
            f"{found.masked_error:.1e} and {found.cut_error:.1e}; cutting gives {cut}."
        )
    if not len(groups):
        return _fail(f"{model} has no channels that can be pruned", 1)
    return 0 if found.holds else 1


@_command
def profile(
    model: ModelSpec,
    inputs: Inputs = None,
    weights: Weights = None,
    classes: Classes = 10,
    table: Table = None,
    profile_seconds: ProfileSeconds = None,
    force: Force = False,
    device: Device = "cpu",
    runtime: Runtime = "eager",
    dtype: Dtype = "float32",
    memory_format: MemoryFormat = "contiguous",
    threads: Threads = 1,
    keep_batch_norm: KeepBatchNorm = False,
    as_json: Json = False,
) -> None:
    """Measure what a model's widths cost on this machine, into a table that an interrupted profile continues."""
    target = _target(device, runtime, dtype, memory_format, threads, keep_batch_norm)
    shapes = _shapes(inputs, model)
    network = load_model(model, classes=classes, in_channels=_channels(shapes), weights=weights)
    path = table or Path(f"{model.replace(':', '_').replace('/', '_')}.table.jsonl")
    cost = pipeline.profile(
        network,
        _example(shapes),
        target=target,
        table=path,
        force=force,
        profile_seconds=profile_seconds,
        progress=not as_json,
    )
    facts = {
        "model": model,
        "table": str(path),
        "target": target.describe(),
        "dense_ms": float(cost.dense),
        "floor_ms": float(cost.floor),
        "residual": float(cost.residual),
        "groups": cost.groups,
        "segments": len(cost.terms),
    }
    if as_json:
        _print_json(facts)
    else:
        _print_table("Latency model", ("", ""), [(key, _show(value)) for key, value in facts.items()])


@_command
def prune(
    model: Annotated[str, typer.Option(help=_MODELS)],
    data: DataSpec,
    budget: Annotated[str, typer.Option(help="2.4ms, 50% (of the dense latency) or 50%flops")] = "50%",
    weights: Weights = None,
    method: Annotated[
        str, typer.Option(help="How keep ratios are learned; `hwprune methods` lists them.")
    ] = DEFAULT_METHOD,
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the method.")] = None,
    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="Solve layers for what was cut away; by default the method decides."),
    ] = None,
    guide: Annotated[str, typer.Option(help="What steers the search: ms or flops.")] = "ms",
    minimum: Minimum = None,
    multiple: Multiple = 1,
    pin: Pin = None,
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning.", min=0)] = 10,
    search_epochs: Annotated[int, typer.Option(help="Epochs with masks.", min=0)] = 10,
    dense_epochs: Annotated[int, typer.Option(help="Epochs of training the dense model first.", min=0)] = 0,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of every phase; 0.1 by default.")] = None,
    train_batch: Annotated[int, typer.Option(help="Images per training step.", min=2)] = 128,
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Anything else of hwprune.train.Recipe, such as label_smoothing=0.1."),
    ] = None,
    subset: Annotated[int | None, typer.Option(help="Train on so many images only.")] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            help="Part of the training images held out; by default a tenth for methods that judge on such.", min=0
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    batch: Annotated[int, typer.Option(help="Batch whose latency counts.", min=1)] = 1,
    device: Device = "cpu",
    runtime: Runtime = "eager",
    dtype: Dtype = "float32",
    memory_format: MemoryFormat = "contiguous",
    threads: Threads = 1,
    keep_batch_norm: KeepBatchNorm = False,
    attention: Attention = "heads",
    out: Annotated[Path, typer.Option(help="Folder of the artifact, the report and the run's state.")] = Path(
        "runs/prune"
    ),
    table: Table = None,
    profile_seconds: ProfileSeconds = None,
    force: Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx too.")] = False,
    as_json: Json = False,
) -> int:
    """Prune a network to a budget measured on this machine, and train what is left."""
    target = _target(device, runtime, dtype, memory_format, threads, keep_batch_norm)
    options = _options(option)
    wanted = validation is None and create(method, **options).wants_held_out
    share = None if wanted else validation or 0.0
    loaded = load_data(data, batch_size=train_batch, subset=subset, validation=share, seed=seed)
    if share is None:
        share = 0.0 if loaded.validation is None else HELD_OUT
        if share and not as_json:
            whose = f"{share:.0%} of the training images, or those that the data bring"
            print(f"{method} judges on images held out of training: {whose} (--validation)", file=sys.stderr)
    torch.manual_seed(seed)
    network = load_model(model, classes=loaded.classes, in_channels=loaded.shape[0], weights=weights)
    example = torch.randn((batch, *loaded.shape), generator=torch.Generator().manual_seed(seed))
    training = _recipe(recipe, lr, train_batch)
    missed: pipeline.BudgetMissed | None = None
    try:
        pruned = pipeline.prune(
            network,
            example,
            train_loader=loaded.train,
            test_loader=loaded.test,
            validation_loader=loaded.validation,
            calibration_loader=loaded.calibration,
            budget=budget,
            target=target,
            method=method,
            options=options,
            refit=refit,
            guide=guide,
            minimum=minimum,
            multiple=multiple,
            pinned=_pins(pin),
            recipe=training,
            epochs=epochs,
            search_epochs=search_epochs,
            dense_epochs=dense_epochs,
            out=out,
            table=table,
            profile_seconds=profile_seconds,
            force=force,
            resume=resume,
            seed=seed,
            name=model,
            attention=attention,
            provenance={
                "data": data,
                "subset": subset,
                "validation": share,
                "weights": str(weights) if weights else None,
            },
            progress=not as_json,
        )
        result: Mapping[str, Any] = pruned.result
    except pipeline.BudgetMissed as error:
        missed, result = error, error.result
    if onnx:
        artifact.export_onnx(out, out / "model.onnx")
    if as_json:
        _print_json(result)
    else:
        _print_result(result)
        print(f"Saved in {out}: artifact, result.json, report.html", file=sys.stderr)
    if missed is not None:
        raise missed
    return 0


@_command
def compare(
    model: ModelSpec,
    data: DataSpec,
    methods: Annotated[
        str,
        typer.Option(
            help="Names with commas between; NAME@flops is guided by FLOPs, NAME:key=value sets an option (a word, or "
            "JSON). All by default."
        ),
    ] = ",".join(METHODS),
    budgets: Annotated[str, typer.Option(help="Budgets with commas between, such as 70%,50%,35%.")] = "50%",
    seeds: Annotated[int, typer.Option(help="Runs of each, with the seeds 0, 1, ...", min=1)] = 3,
    weights: Weights = None,
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning.", min=0)] = 10,
    search_epochs: Annotated[int, typer.Option(help="Epochs with masks.", min=0)] = 10,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of every phase; 0.1 by default.")] = None,
    train_batch: Annotated[int, typer.Option(help="Images per training step.", min=2)] = 128,
    subset: Annotated[int | None, typer.Option(help="Train on so many images only.")] = None,
    validation: Annotated[
        float, typer.Option(help="Part of the training images held out, for methods that search on others.", min=0)
    ] = 0.1,
    dense_epochs: Annotated[int, typer.Option(help="Epochs of training the dense model first, once.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Batch whose latency counts.", min=1)] = 1,
    device: Device = "cpu",
    runtime: Runtime = "eager",
    dtype: Dtype = "float32",
    memory_format: MemoryFormat = "contiguous",
    threads: Threads = 1,
    keep_batch_norm: KeepBatchNorm = False,
    note: Annotated[str | None, typer.Option(help="What the data are called in compare.json.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs, compare.json, .md and .svg.")] = Path("runs/compare"),
    table: Table = None,
    profile_seconds: ProfileSeconds = None,
    as_json: Json = False,
) -> None:
    """Compare methods at equal measured milliseconds; called again, it goes on with what is not finished.

    Methods, budgets and seeds may be added to a folder; whatever else differs from its first call is refused.
    """
    target = _target(device, runtime, dtype, memory_format, threads, keep_batch_norm)
    entries = comparison.Entry.parse_all(methods)
    limits = [str(Budget.parse(text)) for text in budgets.split(",")]

    def load(seed: int) -> Data:
        return load_data(data, batch_size=train_batch, subset=subset, validation=validation, seed=seed)

    first = load(0)
    torch.manual_seed(0)
    network = load_model(model, classes=first.classes, in_channels=first.shape[0], weights=weights)
    rows = comparison.compare(
        network,
        torch.randn((batch, *first.shape), generator=torch.Generator().manual_seed(0)),
        entries,
        limits,
        range(seeds),
        load,
        search_epochs=search_epochs,
        epochs=epochs,
        recipe=Recipe(batch_size=train_batch) if lr is None else Recipe(batch_size=train_batch, lr=lr),
        out=out,
        dense_epochs=dense_epochs,
        target=target,
        name=model,
        provenance={
            "data": note or data,
            "subset": subset,
            "validation": validation,
            "batch": batch,
            "weights": None if weights is None else _named_content(weights),
        },
        latency_table=table,
        profile_seconds=profile_seconds,
        progress=not as_json,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    lines = comparison.summary(rows)
    if as_json:
        _print_json(lines)
        return
    title = f"{model} on {target.describe()}"
    _print_table(title, comparison.COLUMNS, [comparison.cells(line) for line in lines])
    print(f"Saved in {out}: compare.json, compare.svg, and every run", file=sys.stderr)


@_command
def measure(
    model: Annotated[str, typer.Argument(metavar="MODEL|FOLDER", help="A model's name, or a folder that prune wrote.")],
    inputs: Inputs = None,
    weights: Weights = None,
    classes: Classes = 10,
    device: Annotated[str | None, _DEVICE] = None,
    runtime: Annotated[str | None, _RUNTIME] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
    memory_format: Annotated[str | None, _MEMORY_FORMAT] = None,
    threads: Annotated[int | None, _THREADS] = None,
    keep_batch_norm: Annotated[bool | None, typer.Option("--keep-batch-norm/--fold-batch-norm")] = None,
    rounds: Annotated[int, typer.Option(help="Measurements, of which the median is given.", min=1)] = 5,
    as_json: Json = False,
) -> None:
    """Measure one forward of a model, or of a pruned one as it was pruned for, on this machine."""
    network: nn.Module
    spec = artifact.read_spec(model) if Path(model).is_dir() else None
    given: dict[str, Any] = {
        "device": device,
        "runtime": runtime,
        "dtype": dtype,
        "memory_format": memory_format,
        "threads": threads,
        "fold_batch_norm": None if keep_batch_norm is None else not keep_batch_norm,
    }
    target = replace(
        Target.parse(spec.target.get("options", "cpu")) if spec is not None else Target(),
        **{key: value for key, value in given.items() if value is not None},
    )
    if spec is not None:
        example = spec.example_inputs()
        network = trace(artifact.load(model), example).module
    else:
        shapes = _shapes(inputs, model)
        network = load_model(model, classes=classes, in_channels=_channels(shapes), weights=weights)
        example = _example(shapes)
    sample = pipeline.measure(network, example, target=target, rounds=rounds)
    facts: dict[str, Any] = {
        "model": model,
        "target": target.describe(),
        "median_ms": sample.median_ms,
        "p20_ms": sample.p20_ms,
        "p80_ms": sample.p80_ms,
        "count": sample.count,
    }
    if spec is not None:
        facts |= {"recorded_ms": spec.result.get("measured_ms"), "recorded_on": spec.target.get("description")}
    if as_json:
        _print_json(facts)
    else:
        _print_table("One forward", ("", ""), [(key, _show(value)) for key, value in facts.items()])


@_command
def export(
    folder: Annotated[Path, typer.Argument(help="A folder that prune wrote.")],
    to: Annotated[Path, typer.Argument(help="The ONNX file to write.")],
    as_json: Json = False,
) -> None:
    """Write a pruned model as ONNX."""
    artifact.export_onnx(folder, to)
    _print_json({"onnx": str(to)}) if as_json else print(to)


@_command
def tables(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Table files; by default those shipped with hwprune.")
    ] = None,
    merge: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write the union of the tables, of one machine, to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Latency tables: what they were measured on, how much they hold, and whether they are of this machine."""
    if merge is not None:
        if merge.exists():
            raise InvalidInput(f"{merge} exists; name a file that does not, for the union of the tables")
        merge_tables(paths or [], merge)
        paths = [merge]
    shipped = [Path(str(p)) for p in resources.files("hwprune.latency_tables").iterdir() if p.name.endswith(".jsonl")]
    rows = [_describe_table(path) for path in (paths or shipped)]
    if as_json:
        _print_json(rows)
    elif rows:
        columns = ("path", "target", "measurements", "this machine")
        cells = [tuple(_show(row[column.replace(" ", "_")]) for column in columns) for row in rows]
        _print_table("Latency tables", columns, cells)
    else:
        print("hwprune ships no tables; `hwprune profile MODEL` measures one on this machine.")


@_command
def methods(as_json: Json = False) -> None:
    """How keep ratios can be learned."""
    rows = [{"name": name, "summary": m.summary, "source": m.source} for name in METHODS for m in [method_class(name)]]
    if as_json:
        _print_json(rows)
    else:
        _print_table("Search methods", ("name", "summary", "source"), [tuple(row.values()) for row in rows])


@_command
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Benchmarks of the source tree; by default the operators'."),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Time nothing: compile every kernel and show what the compiler made of it.")
    ] = False,
    archs: Annotated[str, typer.Option(help="Architectures for --static, with commas between.")] = "80,90,100",
    as_json: Json = False,
) -> int:
    """Time the operators on this machine, or look at their compiled code without a GPU."""
    if not static:
        if as_json:
            raise InvalidInput("benchmarks write their own JSON, under benchmarks/results; --json goes with --static")
        return _run_benchmarks(names)
    if not re.fullmatch(r"\d+(,\d+)*", archs):
        raise InvalidInput(f"--archs {archs!r} is not understood; write numbers with commas, such as 80,90")
    from hwprune.ops import static as compiled

    rows = compiled.examine_triton(dict.fromkeys(map(int, archs.split(","))))
    try:
        rows += compiled.examine_cuda()
    except BackendUnavailable as error:
        print(f"CUDA kernels are left out: {error}", file=sys.stderr)
    complaints = compiled.complaints(rows)
    if as_json:
        _print_json({"rows": rows, "complaints": complaints})
        return 1 if complaints else 0
    columns = ("registers", "spills", "stack_bytes", "shared_bytes", "tensor_cores", "loads_128")
    cells = [(row["kernel"], row["backend"], f"sm_{row['arch']}", *(str(row[c]) for c in columns)) for row in rows]
    _print_table("Compiled kernels", ("kernel", "backend", "chip", *(c.replace("_", " ") for c in columns)), cells)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def _run_benchmarks(names: Sequence[str] | None) -> int:
    """Runs benchmarks/bench_NAME.py of the source tree that hwprune is installed from; they write their own results."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    if not known:
        raise InvalidInput(
            "the benchmarks are in hwprune's source tree: clone it, and install it with pip install -e ."
        )
    names = names or ["ratio_update", "ops"]
    for name in names:
        if name not in known:
            raise InvalidInput(f"there is no benchmark {name!r}; there are {', '.join(known)}")
    for name in names:
        code = subprocess.run([sys.executable, str(folder / f"bench_{name}.py")], check=False).returncode
        if code:
            return _fail(f"benchmark {name} ended with exit status {code}", 1)
    return 0


def _named_content(path: Path) -> str:
    """A file by its name and what is in it, wherever it lies."""
    return f"{path.name} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"


def _target(device: str, runtime: str, dtype: str, memory_format: str, threads: int, keep_batch_norm: bool) -> Target:
    return Target(device, runtime, dtype, memory_format, threads, fold_batch_norm=not keep_batch_norm)


def _shapes(inputs: Sequence[str] | None, model: str) -> list[tuple[int, ...]]:
    """Shapes of the example inputs: as given, else one image of the size that the model's family is made for."""
    if not inputs:
        return [(1, 3, 32, 32) if ":" not in model else (1, 3, 224, 224)]
    shapes = []
    for text in inputs:
        try:
            shape = tuple(int(n) for n in text.split(","))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            raise InvalidInput(f"input {text!r} is not understood; write the sizes with commas, such as 1,3,224,224")
        shapes.append(shape)
    return shapes


def _channels(shapes: Sequence[tuple[int, ...]]) -> int:
    return shapes[0][1] if len(shapes[0]) > 1 else 3


def _example(shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _options(pairs: Sequence[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs or ():
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise InvalidInput(f"option {pair!r} is not understood; write NAME=VALUE")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


def _recipe(pairs: Sequence[str] | None, lr: float | None, batch_size: int) -> Recipe:
    values = _options(pairs)
    elsewhere = {"epochs", "batch_size", "seed", "lr"}  # options of their own
    known = [name for name in Recipe.__dataclass_fields__ if name not in elsewhere]
    if unknown := [name for name in values if name not in known]:
        raise InvalidInput(f"--recipe {unknown[0]} is not known; there are {', '.join(known)}")
    values |= {"batch_size": batch_size, **({} if lr is None else {"lr": lr})}
    try:
        return Recipe(**values)
    except TypeError as error:
        raise InvalidInput(f"--recipe {' '.join(pairs or ())} has a value of the wrong kind: {error}") from error


def _pins(pairs: Sequence[str] | None) -> dict[str, int] | None:
    pins = {}
    for pair in pairs or ():
        name, _, width = pair.rpartition("=")
        if not name or not width.isdecimal():
            raise InvalidInput(f"--pin {pair!r} is not understood; write GROUP=WIDTH, such as layer1.0.conv1=16")
        pins[name] = int(width)
    return pins or None


def _describe_table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidInput(f"{path} is no file; give a latency table, such as table.jsonl in a run's folder")
    table = LatencyTable.read(path)
    return {
        "path": str(path),
        "target": table.target.describe(),
        "measurements": len(table.records),
        "this_machine": table.fingerprint == fingerprint(table.target),
    }


def _print_result(result: Mapping[str, Any]) -> None:
    """The one table that a run ends in."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    def ms(value: float | None) -> str:
        return "" if value is None else f"{value:.4g} ms"

    rows = [
        ("accuracy", percent(result["dense_accuracy"]), percent(result["accuracy"])),
        *_floor_row(result),
        ("latency, predicted", ms(result["predicted_dense_ms"]), ms(result["predicted_ms"])),
        ("latency, measured", ms(result["dense_ms"]), ms(result["measured_ms"])),
        (f"budget ({result['budget']})", "", ms(result["budget_ms"])),
        ("parameters", f"{result['dense_parameters']:,}", f"{result['parameters']:,}"),
        ("FLOPs", f"{result['dense_flops']:,.0f}", f"{result['flops']:,.0f}"),
    ]
    wall_s, target = result["wall_s"]["total"], result["target"]["description"]
    title = f"{result['model']} by {result['method']} on {target}, {wall_s:.0f} s"
    _print_table(title, ("", "dense", "pruned"), rows)


def _floor_row(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Whether the accuracy that a search was to keep is kept; nothing where there was none to keep."""
    if result["accuracy_floor"] is None:
        return []
    kept = {True: "kept", False: "MISSED", None: "not judged: no images"}[result["floor_met"]]
    return [(f"accuracy floor ({result['accuracy_floor']:.2%})", "", kept)]


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(*columns, title=title, title_justify="left", box=box.SIMPLE, show_header=any(columns))
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console().print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=1))


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what marks wrong usage in every version of typer
            raise
        code = _fail(error.format_message(), 2)
    sys.exit(code or 0)

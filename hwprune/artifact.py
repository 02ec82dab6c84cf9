"""A pruned model on disk: a folder that rebuilds the user's module, or runs without the user's code.

============================ =================================================================================
``spec.json``                schema, channels kept per group, target, provenance, result, checksum of every file
``weights.safetensors``      the state dict of the pruned module
``program.pt2``              the finished network as ``torch.export`` writes it
============================ =================================================================================

Nothing here is written or read as a pickle of ours, and a ``program.pt2`` that asks torch to unpickle anything but
plain tensors is refused. ``spec.json`` is written last, so a folder whose saving was interrupted does not load.
"""

import hashlib
import io
import json
import platform
import re
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwprune.errors import BackendUnavailable, CorruptArtifact, InvalidInput, UnsupportedModel
from hwprune.files import write_file
from hwprune.graph import Program, cut, trace
from hwprune.nn import ColumnPrunedConv2d

SCHEMA = 1
SPEC, WEIGHTS, PROGRAM = "spec.json", "weights.safetensors", "program.pt2"

# What torch.export.save writes for a network of plain tensors. Everything else in the archive (torchbind and opaque
# objects, legacy weight files) is a pickle that torch.export.load would execute.
_PLAIN_MEMBERS = re.compile(
    r"[^/]+/("
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/[^/]+\.json"
    r"|data/(weights/weight_\d+|constants/tensor_\d+|sample_inputs/[^/]+\.pt)"
    r"|data/(weights|constants)/[^/]+_config\.json)"
)


@dataclass(frozen=True)
class Spec:
    """What ``spec.json`` says about a pruned model."""

    model: str
    kind: str  # "module": the user's own class, smaller; "program": the resized graph
    attention: Literal["heads", "dims"]
    inputs: tuple[tuple[tuple[int, ...], str], ...]  # (shape, dtype name) of every example input
    groups: tuple[tuple[str, int, tuple[int, ...]], ...]  # (name, dense width, channels kept)
    target: Mapping[str, Any]
    provenance: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def keep(self) -> NDArray[np.bool_]:
        """Channels kept, flat over all groups: [ΣC]."""
        flat = np.zeros(sum(width for _, width, _ in self.groups), dtype=bool)
        start = 0
        for _, width, kept in self.groups:
            flat[start + np.asarray(kept, dtype=np.int64)] = True
            start += width
        return flat

    def example_inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of the shapes and dtypes that the model was traced with (normal floats, zero integers)."""
        generator = torch.Generator().manual_seed(seed)
        dtypes = [getattr(torch, name) for _, name in self.inputs]
        return tuple(
            torch.randn(shape, generator=generator).to(dtype)
            if dtype.is_floating_point
            else torch.zeros(shape, dtype=dtype)
            for (shape, _), dtype in zip(self.inputs, dtypes, strict=True)
        )


def save(
    folder: str | Path,
    module: nn.Module,
    *,
    program: Program,
    keep: NDArray[np.bool_],  # [ΣC]
    kind: str,
    model: str,
    attention: Literal["heads", "dims"] = "heads",
    target: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
) -> Path:
    """Write a pruned module to a folder, which is made where it is missing; returns the folder.

    ``module`` is what :func:`hwprune.graph.cut` gave for ``program`` and ``keep``, trained or not.
    Raises InvalidInput when the folder cannot be written.
    """
    from safetensors.torch import save as to_safetensors

    folder = Path(folder)
    groups, start = [], 0
    for name, width in zip(program.groups.names, program.groups.widths.tolist(), strict=True):
        kept = np.flatnonzero(keep[start : start + width]).tolist()
        groups.append({"name": name, "width": width, "keep": kept, **({} if kept else {"removed": True})})
        start += width
    inputs = [{"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for x in program.example_inputs]
    state = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in module.state_dict().items()}
    files = {
        WEIGHTS: to_safetensors(state, metadata={"format": "pt"}),
        PROGRAM: _export(module, program.example_inputs),
    }
    spec = {
        "schema": SCHEMA,
        "model": model,
        "kind": kind,
        "attention": attention,
        "inputs": inputs,
        "groups": groups,
        "target": dict(target or {}),
        "provenance": {**versions(), **(provenance or {})},
        "result": dict(result or {}),
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SPEC).unlink(missing_ok=True)  # old spec beside new weights would look whole
        for name, data in {**files, SPEC: json.dumps(spec, indent=1).encode()}.items():
            write_file(folder / name, data)
    except OSError as error:
        raise InvalidInput(f"cannot write the artifact to {folder}: {error.strerror}; choose another folder") from error
    return folder


def load(folder: str | Path, model_factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Load a pruned model, in evaluation mode.

    With ``model_factory``, a callable that returns the *dense* model (its weights do not matter), the result is the
    user's own module, cut to the stored channels, with the stored weights. Without it, the result is the exported
    program, which needs no code of the user's and takes the batch that it was exported with.
    Raises CorruptArtifact, or InvalidInput when the factory builds another network than the one that was pruned.
    """
    folder = Path(folder)
    spec, files = _read(folder)
    if model_factory is None:
        module: nn.Module = _exported(folder, files).module()
        for name in ("train", "eval"):  # they raise, also for the mode that the program is in
            module.__dict__.pop(name, None)
        return module
    from safetensors.torch import load as from_safetensors

    state = from_safetensors(_checked(folder, WEIGHTS, files))
    dense = model_factory()
    if not isinstance(dense, nn.Module):
        raise InvalidInput(f"model_factory returned {type(dense).__name__}; it must return the dense nn.Module")
    program = trace(dense.eval(), spec.example_inputs(), attention=spec.attention)
    found = list(zip(program.groups.names, program.groups.widths.tolist(), strict=True))
    stored = [(name, width) for name, width, _ in spec.groups]
    if found != stored:
        differs = next(iter(set(stored) ^ set(found)))
        raise InvalidInput(
            f"model_factory built another network than the one in {folder}, a pruned {spec.model}: channel group "
            f"{differs[0]} of width {differs[1]} is in only one of the two; build the dense model with the arguments "
            "that it was pruned with"
        )
    module = cut(dense, program, spec.keep).module
    for path in [key.removesuffix(".columns") for key in state if key.endswith(".columns")]:
        conv = module.get_submodule(path)
        if isinstance(conv, nn.Conv2d):
            module.set_submodule(path, ColumnPrunedConv2d.from_conv(conv, state[f"{path}.columns"]))
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InvalidInput(f"the weights in {folder} do not fit the model that was built: {reason}") from error
    return module.eval()


def read_spec(folder: str | Path) -> Spec:
    """What the artifact says of itself, without loading any weights. Raises CorruptArtifact."""
    return _read(Path(folder))[0]


def export_onnx(folder: str | Path, path: str | Path) -> Path:
    """Write the program of an artifact as ONNX, with the shapes that it was saved with; returns the path.

    Raises CorruptArtifact, InvalidInput where the path cannot be written, BackendUnavailable without onnxscript, and
    UnsupportedModel where an operator has no ONNX form.
    """
    import warnings

    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise BackendUnavailable(f"ONNX export needs {package}; install it with: pip install onnx onnxscript")
    path, folder = Path(path), Path(folder)
    exported = _exported(folder, _read(folder)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        try:
            onnx = torch.onnx.export(exported, dynamo=True, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().partition("\n")[0]
            raise UnsupportedModel(f"the program in {folder} has no ONNX form ({reason}); deploy {PROGRAM}") from error
    assert onnx is not None
    try:
        onnx.save(str(path))
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}; choose another path") from error
    return path


def versions() -> dict[str, str]:
    """The software that made a result: hwprune, torch, Python; and the commit, where hwprune runs from a checkout."""
    try:
        own = version("hwprune")
    except PackageNotFoundError:
        own = "uninstalled"
    commit = commit_of(Path(__file__).resolve().parent.parent)
    made_by = {"hwprune": own, "torch": str(torch.__version__), "python": platform.python_version()}
    return made_by | ({"commit": commit} if commit else {})


@cache  # the code in memory is that of the first call, whatever is checked out later
def commit_of(root: Path) -> str | None:
    """The commit that is checked out in a folder, with "-dirty" where tracked files differ from it; None for others."""
    if not (root / ".git").exists():  # git would answer for whatever repository lies around an installed package
        return None
    git = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # there is no git
        return None


def difference(stored: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """What differs between two sets of settings, such as "lr 0.1, not lr 0.05"; "" where they are equal."""
    keys = [key for key in {**stored, **present} if stored.get(key) != present.get(key)]
    was, now = (", ".join(f"{key} {settings.get(key)!r}" for key in keys) for settings in (stored, present))
    return f"{was}, not {now}" if keys else ""


def _export(module: nn.Module, example_inputs: tuple[Tensor, ...]) -> bytes:
    """``torch.export.save`` of the module in evaluation mode."""
    was_training = module.training
    try:
        exported = torch.export.export(module.eval(), example_inputs)
    finally:
        module.train(was_training)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(folder: Path) -> tuple[Spec, Mapping[str, Any]]:
    path = folder / SPEC
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder; give the folder that `hwprune prune --out` wrote")
    if not path.is_file():
        raise CorruptArtifact(f"{folder} has no {SPEC}: it is not an artifact, or its saving was interrupted")
    try:
        raw = json.loads(path.read_text())
        schema = raw["schema"]
        if schema != SCHEMA:
            raise CorruptArtifact(f"{path} has schema {schema!r}; this hwprune reads schema {SCHEMA}")
        groups = tuple((g["name"], int(g["width"]), tuple(int(i) for i in g["keep"])) for g in raw["groups"])
        removed = {g["name"] for g in raw["groups"] if g.get("removed")}  # with the residual block around them
        for name, width, kept in groups:
            if name in removed and not kept:
                continue
            if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= width:
                raise CorruptArtifact(f"{path}: the channels kept of group {name} are not among its {width}")
        inputs = tuple((tuple(int(n) for n in x["shape"]), str(x["dtype"])) for x in raw["inputs"])
        for _, dtype in inputs:
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise CorruptArtifact(f"{path}: {dtype!r} is no dtype")
        spec = Spec(
            model=str(raw["model"]),
            kind=str(raw["kind"]),
            attention="dims" if raw["attention"] == "dims" else "heads",
            inputs=inputs,
            groups=groups,
            target=raw["target"],
            provenance=raw["provenance"],
            result=raw["result"],
        )
        return spec, raw["files"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CorruptArtifact(f"{path} cannot be read ({reason}); save the model again") from error


def _checked(folder: Path, name: str, files: Mapping[str, Any]) -> bytes:
    """The content of one file, equal to what was saved."""
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise CorruptArtifact(f"{folder / name} cannot be read: {error.strerror}") from error
    if files.get(name, {}).get("sha256") != _sha256(data):
        raise CorruptArtifact(f"{folder / name} is not the file that {SPEC} describes (SHA-256 differs)")
    return data


def _exported(folder: Path, files: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """The program of an artifact. Raises CorruptArtifact."""
    path, data = folder / PROGRAM, _checked(folder, PROGRAM, files)
    try:
        _refuse_pickles(data)
        return torch.export.load(io.BytesIO(data))
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{path} {error}") from None
    except Exception as error:  # torch names no kinds here: zip, JSON, schema and operator errors all come through
        raise CorruptArtifact(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error


def _refuse_pickles(data: bytes) -> None:
    """Raise CorruptArtifact unless torch.export.load will find plain tensors only."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.namelist():
            if not _PLAIN_MEMBERS.fullmatch(member):
                raise CorruptArtifact(f"holds {member}, which is not part of a network of plain tensors")
            if member.endswith("_config.json") and any(
                entry.get("use_pickle") for entry in json.loads(archive.read(member))["config"].values()
            ):
                raise CorruptArtifact(f"stores a tensor of {member} as a pickle, which is not loaded")
            if member.endswith(".pt"):  # torch falls back to full unpickling where this fails
                torch.load(io.BytesIO(archive.read(member)), weights_only=True)

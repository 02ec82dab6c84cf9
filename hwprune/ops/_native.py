"""The one module that imports the native extensions and Triton, and the choice between backends."""

import json
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from hwprune.errors import BackendUnavailable, InvalidInput

BACKENDS = ("reference", "cpp", "triton", "cuda")
HOMES = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}  # the type of device that each runs on; the reference on any
_MODULES = {"cpp": "hwprune._cpp", "triton": "triton", "cuda": "hwprune._cuda"}
_REMEDIES = {
    "cpp": "reinstall with a C++17 compiler on PATH",
    "triton": "install triton, which there is for Linux",
    "cuda": "reinstall with nvcc on PATH, or with CUDA_HOME set, and HWPRUNE_CUDA=1",
}

_MEASURED = Path(__file__).with_name("measured.json")  # written by benchmarks/bench_ops.py --table


@cache
def _import(backend: str) -> ModuleType | str:
    """The module behind a backend, or why it cannot be imported."""
    try:
        return import_module(_MODULES[backend])
    except ImportError as error:
        return f"{_MODULES[backend]} cannot be imported ({error}); {_REMEDIES[backend]}"


def missing(backend: str) -> str | None:
    """Why the module behind a backend cannot be had here, or None when it can."""
    module = _import(backend)
    return module if isinstance(module, str) else None


def module(backend: str) -> ModuleType:
    """The module behind a backend. Raises BackendUnavailable with the cause."""
    found = _import(backend)
    if isinstance(found, str):
        raise BackendUnavailable(found)
    return found


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on the CPU too, instead of compiling them for a device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def away(backend: str, device: torch.device) -> bool:
    """Whether the backend runs on other devices only."""
    anywhere = backend == "reference" or (backend == "triton" and interpreted())
    return not anywhere and device.type != HOMES[backend]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a CUDA device, if it asks for them."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # not in torch's stubs


def learning(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient may be asked for with respect to one of these."""
    return torch.is_grad_enabled() and any(given is not None and given.requires_grad for given in tensors)


def recorded(*differentiable: torch.Tensor | None) -> bool:
    """Whether a call must go through torch's dispatcher: for a gradient, or for something that looks on.

    The dispatcher's care for an operator written in Python costs 100 us, which may be more than the operator.
    """
    if torch.compiler.is_compiling():
        return True
    traced = torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
    return traced or learning(*differentiable)


def backends() -> dict[str, str | None]:
    """Every backend by name: None where it works on this machine, else the cause and the remedy."""
    no_device = None if torch.cuda.is_available() else "torch sees no CUDA device"
    return {
        "reference": None,
        "cpp": missing("cpp"),
        "triton": missing("triton") or (None if interpreted() else no_device),
        "cuda": missing("cuda") or no_device,
    }


@cache
def _measured() -> dict[tuple[str, ...], str]:
    """The fastest by operator, chip, dtype, kind of call and "masked" or "dense": a backend, or plain "torch"."""
    rows = json.loads(_MEASURED.read_text())["rows"]
    return {(row["op"], row["chip"], row["dtype"], row["kind"], row["masks"]): row["backend"] for row in rows}


@cache
def _chip(device: torch.device) -> str:
    """cpu, or the compute capability of a CUDA device, such as sm_90."""
    if device.type != "cuda":
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def fastest(op: str, x: torch.Tensor, kind: str, masked: bool) -> str | None:
    """What ran `op` fastest on such a device in x's dtype, of what was measured; None where nothing was."""
    key = op, _chip(x.device), str(x.dtype).removeprefix("torch."), kind, "masked" if masked else "dense"
    return _measured().get(key)


def choose(op: str, requested: str, refusal: Callable[[str], str | None], preference: tuple[str, ...]) -> str:
    """The backend that runs `op`.

    `refusal` says of a backend why it cannot take the tensors at hand, or None. "auto"
    yields to the environment variable HWPRUNE_BACKEND where that is set, and else takes the first of `preference`
    that does not refuse. Raises InvalidInput for an unknown name and BackendUnavailable, with the cause, where the
    backend asked for refuses.
    """
    wanted, source = requested, "backend"
    if requested == "auto" and os.environ.get("HWPRUNE_BACKEND", "auto") != "auto":
        wanted, source = os.environ["HWPRUNE_BACKEND"], "HWPRUNE_BACKEND"
    if wanted == "auto":
        return next(name for name in preference if refusal(name) is None)
    if wanted not in BACKENDS:
        raise InvalidInput(f"{source}={wanted!r} is not a backend; there are auto, {', '.join(BACKENDS)}")
    if (cause := refusal(wanted)) is not None:
        raise BackendUnavailable(f"{source}={wanted} cannot run {op}: {cause}")
    return wanted

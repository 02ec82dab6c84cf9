"""What a latency is a latency of: device, runtime, number format, layout and threads, and the machine's identity."""

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hwprune.errors import BackendUnavailable, InvalidInput

RUNTIMES = ("eager", "cudagraph", "compile", "onnxruntime")
MEMORY_FORMATS = ("contiguous", "channels_last")
ALLOCATORS = ("retain", "system")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Target:
    """Where and how a network is deployed. The batch is that of the example inputs.

    threads: intra-op threads of the CPU. fold_batch_norm: merge each batch norm into the weights before it, as a
    deployment would. allocator: "retain" keeps freed memory in the process, as a tuned server does, so that a forward
    does not pay for page faults that come and go with the sizes of its tensors; "system" leaves malloc as it is.
    """

    device: str = "cpu"
    runtime: str = "eager"
    dtype: str = "float32"
    memory_format: str = "contiguous"
    threads: int = 1
    fold_batch_norm: bool = True
    allocator: str = "retain"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("runtime", self.runtime, RUNTIMES),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("memory_format", self.memory_format, MEMORY_FORMATS),
            ("allocator", self.allocator, ALLOCATORS),
        ):
            if value not in allowed:
                raise InvalidInput(f"target has {name}={value!r}; choose one of {', '.join(allowed)}.")
        if self.threads < 1:
            raise InvalidInput(f"target has threads={self.threads}; give at least 1.")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise InvalidInput(f"target has device={self.device!r}; give cpu, cuda or cuda:INDEX.")
        if self.runtime == "cudagraph" and self.device == "cpu":
            raise InvalidInput("runtime cudagraph needs a cuda device; on the cpu use eager, compile or onnxruntime.")
        if self.runtime == "onnxruntime" and self.device != "cpu":
            raise InvalidInput("runtime onnxruntime runs on the cpu here; on a cuda device choose eager or cudagraph.")

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read ``cpu`` or ``cuda:0,runtime=cudagraph,dtype=float16,threads=2``; the inverse of ``str(target)``."""
        device, *pairs = [part.strip() for part in text.split(",")]
        values: dict[str, Any] = {"device": device.removeprefix("device=")}
        kinds = {field.name: field.type for field in fields(cls)}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or key not in kinds:
                raise InvalidInput(f"target {text!r} has {pair!r}; write key=value with a key of {', '.join(kinds)}.")
            if kinds[key] is bool:
                if value not in ("true", "false"):
                    raise InvalidInput(f"target has {key}={value!r}; give true or false.")
                values[key] = value == "true"
            elif kinds[key] is int:
                if not value.isdecimal():
                    raise InvalidInput(f"target has {key}={value!r}; give a whole number.")
                values[key] = int(value)
            else:
                values[key] = value
        return cls(**values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Target":
        """The inverse of :meth:`as_dict`; unknown keys are an error."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise InvalidInput(f"target has unknown keys {', '.join(sorted(unknown))}.")
        return cls(**values)

    def as_dict(self) -> dict[str, str | int | bool]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        default = asdict(Target())
        changed = {k: v for k, v in asdict(self).items() if k != "device" and v != default[k]}
        return ",".join([self.device, *(f"{k}={str(v).lower()}" for k, v in changed.items())])

    def describe(self) -> str:
        """One line for people."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""
        norms = "batch norms folded" if self.fold_batch_norm else "batch norms kept"
        return f"{self.device} {self.runtime} {self.dtype} {self.memory_format}{threads}, {norms}"

    @property
    def is_cuda(self) -> bool:
        """Whether times come from CUDA events."""
        return self.device.startswith("cuda")

    @property
    def runs_own_operators(self) -> bool:
        """Whether the runtime calls operators of this package; an exported graph has those of its format alone."""
        return self.runtime != "onnxruntime"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and floating inputs."""
        return DTYPES[self.dtype]

    @property
    def torch_memory_format(self) -> torch.memory_format:
        """The layout of 4-d weights and inputs."""
        return torch.channels_last if self.memory_format == "channels_last" else torch.contiguous_format

    def with_(self, **changes: Any) -> "Target":
        """A copy with some fields changed."""
        return replace(self, **changes)

    def require(self) -> None:
        """Raise BackendUnavailable if this machine cannot run the target."""
        if self.is_cuda and not torch.cuda.is_available():
            raise BackendUnavailable(f"target {self} needs a CUDA device and torch sees none; use device cpu.")
        if self.is_cuda and torch.device(self.device).index not in (None, *range(torch.cuda.device_count())):
            raise BackendUnavailable(f"target {self} names a device beyond the {torch.cuda.device_count()} present.")
        if self.runtime == "onnxruntime":
            missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if _version(name) is None]
            if missing:
                names = " ".join(missing)
                raise BackendUnavailable(f"runtime onnxruntime needs what is not installed: pip install {names}.")


def fingerprint(target: Target) -> dict[str, str | int]:
    """Everything that, when changed, makes a stored latency another machine's: hardware, libraries, threads."""
    found: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "onednn": _onednn_version(),
        "threads": target.threads,
        "allocator": target.allocator,
    }
    if (limit := _cpu_limit_mhz()) is not None:
        found["cpu_limit_mhz"] = limit
    if target.runtime == "onnxruntime":
        found["onnxruntime"] = _version("onnxruntime") or "absent"
    if target.is_cuda:
        target.require()
        index = torch.device(target.device).index or 0
        properties = torch.cuda.get_device_properties(index)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": str(torch.version.cuda),
            "cudnn": int(torch.backends.cudnn.version() or 0),  # type: ignore[no-untyped-call]
            "driver": _driver_version(),
            "tf32": f"matmul={torch.backends.cuda.matmul.allow_tf32} cudnn={torch.backends.cudnn.allow_tf32}",
        }
    return found


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """``key: stored | present`` for every key whose value differs."""
    keys = sorted(set(stored) | set(present))
    return [f"{key}: {stored.get(key)} | {present.get(key)}" for key in keys if stored.get(key) != present.get(key)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """Model name with the family numbers: a hypervisor may report a name shared by several generations."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields_ = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", info.read_text(), re.MULTILINE))
    name: str = fields_.get("model name", platform.machine())
    if "cpu family" in fields_:
        name += f" (family {fields_['cpu family']} model {fields_.get('model', '?')})"
    return name


def _cpu_limit_mhz() -> int | None:
    limit = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    return int(limit.read_text()) // 1000 if limit.exists() else None


def _onednn_version() -> str:
    match = re.search(r"(?:MKL-DNN|oneDNN)\s+v?([\d.]+)", torch.__config__.show())
    return str(match[1]) if match else "absent"


def _driver_version() -> str:
    version = Path("/proc/driver/nvidia/version")
    match = re.search(r"Kernel Module\D*?([\d.]{5,})", version.read_text()) if version.exists() else None
    return match[1] if match else "unknown"

"""hwprune prunes PyTorch networks to a latency budget, measured on the device that will run them."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hwprune.errors import HwpruneError

if TYPE_CHECKING:
    from hwprune.artifact import load
    from hwprune.budget import Budget
    from hwprune.graph import trace
    from hwprune.latency import LatencyTable, Target
    from hwprune.pipeline import Pruning, measure, profile, prune

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "HwpruneError",
    "LatencyTable",
    "Pruning",
    "Target",
    "load",
    "measure",
    "profile",
    "prune",
    "trace",
]

_HOMES = {
    "Budget": "hwprune.budget",
    "LatencyTable": "hwprune.latency",
    "Pruning": "hwprune.pipeline",
    "Target": "hwprune.latency",
    "load": "hwprune.artifact",
    "measure": "hwprune.pipeline",
    "profile": "hwprune.pipeline",
    "prune": "hwprune.pipeline",
    "trace": "hwprune.graph",
}

if find_spec("hwprune.kernels") is None:  # kernels/ lies beside hwprune/ and is mapped into it by the installation
    raise ImportError(f"{__path__[0]} is a source tree that is not installed: run `pip install -e .` beside it")


def __getattr__(name: str) -> object:
    """Imports a public name on first use, so that `import hwprune` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hwprune' has no attribute {name!r}; it has {', '.join(__all__)}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

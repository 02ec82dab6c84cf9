"""What widths cost on a device: how it is timed, stored, and turned into a function with a gradient."""

from hwprune.latency.model import CostAxis, CostModel, CostTerm, flops_model
from hwprune.latency.profiler import latency_model, profile, random_widths
from hwprune.latency.runtimes import available_runtimes, build
from hwprune.latency.table import LatencyTable, merge
from hwprune.latency.target import Target, fingerprint
from hwprune.latency.timing import Reference, Sample, measure

LatencyModel = CostModel

__all__ = [
    "CostAxis",
    "CostModel",
    "CostTerm",
    "LatencyModel",
    "LatencyTable",
    "Reference",
    "Sample",
    "Target",
    "available_runtimes",
    "build",
    "fingerprint",
    "flops_model",
    "latency_model",
    "measure",
    "merge",
    "profile",
    "random_widths",
]

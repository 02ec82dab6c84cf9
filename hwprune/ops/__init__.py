"""The operators of the search: checked, dispatched to a backend, each beside a plain-torch reference."""

from hwprune.ops._native import backends
from hwprune.ops.masked_conv import masked_bn_act, masked_conv2d
from hwprune.ops.ratio_update import CostTables, philox_uniforms, ratio_forward, ratio_step, ratio_step_priced

__all__ = [
    "CostTables",
    "backends",
    "masked_bn_act",
    "masked_conv2d",
    "philox_uniforms",
    "ratio_forward",
    "ratio_step",
    "ratio_step_priced",
]

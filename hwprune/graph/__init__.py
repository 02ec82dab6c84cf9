"""What the model is: the labelled program, its groups and segments, and how to make it smaller."""

from hwprune.graph.groups import Frozen, Group, Groups, Slot, keep_first, keep_top
from hwprune.graph.resize import resize
from hwprune.graph.segments import Axis, Segment, leftovers, segments
from hwprune.graph.surgery import Cut, Follower, cut
from hwprune.graph.trace import Program, trace

__all__ = [
    "Axis",
    "Cut",
    "Follower",
    "Frozen",
    "Group",
    "Groups",
    "Program",
    "Segment",
    "Slot",
    "cut",
    "keep_first",
    "keep_top",
    "leftovers",
    "resize",
    "segments",
    "trace",
]

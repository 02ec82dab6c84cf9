"""The kinds of failure a user of hwprune can meet.

Every message says what was given, what is possible, and what to do next. The command line prints it after
``error:`` and exits with status 2.
"""


class HwpruneError(Exception):
    """Base of everything hwprune raises on purpose."""


class InfeasibleBudget(HwpruneError):
    """The budget is below the cost of the smallest network that the constraints allow, or was missed."""


class UnknownWorkload(HwpruneError):
    """The latency table holds no measurement for a layer that has to be priced."""


class DeviceMismatch(HwpruneError):
    """A latency table was measured on another device or runtime than the one at hand."""


class UnsupportedModel(HwpruneError):
    """The network cannot be traced, or holds an operator whose channels cannot be followed."""


class BackendUnavailable(HwpruneError):
    """A backend was asked for by name and is not built, not installed, or does not take these tensors."""


class CorruptTable(HwpruneError):
    """A latency table cannot be read: wrong version, broken line, or missing fields."""


class CorruptArtifact(HwpruneError):
    """A saved model fails its checks: wrong version, checksum, or missing parts."""


class InvalidInput(HwpruneError):
    """An argument or an input file is wrong."""


class TrainingDiverged(HwpruneError):
    """The loss became infinite or NaN."""

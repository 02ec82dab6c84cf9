"""What all tests share: seeds, one thread, memory that starts as NaN, and a torchvision that imports."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where a kernel is defined

torch.backends.cudnn.allow_tf32 = False  # what float32 is compared with is float32

# A shell starts what it puts in the background with Ctrl-C ignored; tests that press it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _torchvision_schemas() -> torch.library.Library | None:
    """Declares the operators that `import torchvision` looks up, where its own library does not fit this torch.

    That is so for the wheel of the package index beside a CPU build of torch. The models need none of the operators.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_TORCHVISION = _torchvision_schemas()  # the declarations last as long as this object


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "source_tree: needs the sources beside the tests, which an installed wheel lacks"
    )


def pytest_collection_modifyitems(items):
    if not (Path(__file__).parents[1] / "setup.py").exists():
        skipped = pytest.mark.skip(reason="the tests lie outside the source tree")
        for item in items:
            if item.get_closest_marker("source_tree"):
                item.add_marker(skipped)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def short_turns():
    """Networks take short turns where a pipeline measures them: no test of one is decided by a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwprune.pipeline.TURN_S", 0.01)
        yield


@pytest.fixture
def poisoned():
    """torch.empty and its kin return NaN: an operator that leaves an element unwritten is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

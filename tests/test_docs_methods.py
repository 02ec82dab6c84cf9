"""The page on search methods: its example is a method like any other, and its table names all that there are."""

import copy
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hwprune.budget import BudgetController
from hwprune.data import load_data
from hwprune.graph import trace
from hwprune.latency import flops_model
from hwprune.models import load_model
from hwprune.search import METHODS, Search, create, method_class

PATH = Path(__file__).parents[1] / "docs" / "methods.md"
if not PATH.exists():
    pytest.skip("the tests lie outside the source tree", allow_module_level=True)
PAGE = PATH.read_text(encoding="utf-8")
EXAMPLE, LINE, USE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def slimming(tmp_path_factory):
    """The page's file, and its registry line."""
    path = tmp_path_factory.mktemp("docs") / "slimming_of_the_page.py"
    path.write_text(EXAMPLE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        ((name, place),) = eval("{" + LINE + "}").items()
        assert place == "hwprune.search.slimming:Slimming"
        patch.setitem(METHODS, name, f"{path.stem}:{place.partition(':')[2]}")
        yield module.Slimming
    del sys.modules[path.stem]


def test_the_table_has_a_row_for_every_method():
    rows = {row.split("`")[1]: row for row in re.findall(r"^\| `\w+` \|.*$", PAGE, re.MULTILINE)}
    assert sorted(rows) == sorted(METHODS)
    assert list(rows) == sorted(rows)
    for name, row in rows.items():
        method = method_class(name)
        wanted = f"| `{name}` | {method.summary} | {method.source} | "
        assert row.startswith(wanted), f"docs/methods.md: this row should begin with\n{wanted}"
        assert len(row) > len(wanted) + 2, f"docs/methods.md does not say what is reconstructed in {name}"


def test_the_line_makes_it_a_method_like_any_other(slimming):
    method = create("slimming", strength=1e-4)
    assert isinstance(method, slimming) and method.name == "slimming" and method.summary and method.source


def test_the_use_on_the_page_runs_and_meets_its_budget(slimming, capsys):
    space = {"Slimming": slimming}
    exec(USE, space)
    assert 0.4 < space["chosen"].cost / space["cost"].dense <= 0.5
    assert space["found"].log[-1]["step"] > 0 and str(space["chosen"].widths[0]) in capsys.readouterr().out


def test_the_example_resumes_to_the_bit(slimming):
    batches = list(load_data("digits", batch_size=64).train)[:12]
    torch.manual_seed(0)
    dense = load_model("resnet8", classes=10, in_channels=1)
    program = trace(dense.eval(), (torch.randn(2, 1, 8, 8),))
    cost = flops_model(program)

    def start():
        model = copy.deepcopy(dense)
        controller = BudgetController(0.5 * cost.dense, cost.dense, ramp_steps=6)
        return model, Search("slimming", model, program.groups, cost, controller, 12, {"rounds": 4})

    def train(model, run, begin, end):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        model.train()
        for step in range(begin, end):
            run.before_step(step)
            optimiser.zero_grad()
            F.cross_entropy(model(batches[step][0]), batches[step][1]).backward()
            run.after_backward(step)
            optimiser.step()
            run.after_step(step)

    model, whole = start()
    train(model, whole, 0, 12)
    other, first = start()
    train(other, first, 0, 5)
    resumed, second = start()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(other.state_dict())
    train(resumed, second, 5, 12)
    assert torch.equal(whole.ranking(), second.ranking()) and torch.equal(whole.widths(), second.widths())
    assert cost.price(whole.context.rounded(whole.widths())) < cost.dense

"""The report: one page that needs nothing else, whose figures are well-formed and whose shares add up."""

import re
from dataclasses import asdict
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from hwprune import report
from hwprune.errors import InvalidInput
from hwprune.graph import trace
from hwprune.latency import flops_model
from hwprune.models import load_model

RESULT = {
    "model": "resnet8", "method": "dsa", "dense_ms": 2.0, "budget_ms": 1.0, "predicted_ms": 0.98, "measured_ms": 0.97,
    "predicted_dense_ms": 2.1, "dense_p20_ms": 1.9, "dense_p80_ms": 2.2, "measured_p20_ms": 0.96,
    "measured_p80_ms": 0.99, "dense_accuracy": 0.98, "accuracy": 0.975, "dense_parameters": 1000, "parameters": 400,
    "target": {"description": "cpu eager float32"},
}  # fmt: skip


@pytest.fixture(scope="module")
def explained():
    model = load_model("resnet8", classes=10, in_channels=1).eval()
    program = trace(model, (torch.randn(2, 1, 8, 8),))
    cost = flops_model(program)
    widths = np.maximum(1, program.groups.widths // 2)
    return (
        cost,
        program.groups,
        widths,
        *report.explain(cost, program.groups, widths, titles={"conv2d_1": "first block"}),
    )


def whole_page(explained):
    _, _, _, shares, staircases = explained
    return report.render(
        report.Report(
            RESULT,
            shares,
            staircases,
            search=[{"step": i, "cost": 1 - i / 100, "target": 1 - i / 90} for i in range(40)],
            training=[
                {"phase": p, "epoch": e, "accuracy": 0.5 + 0.1 * e, "loss": 1 / (e + 1)}
                for p in ("dense", "search", "fine-tune")
                for e in range(3)
            ],
            rounds=[{"measured_ms": 1.1, "budget_ms": 1.0}, {"measured_ms": 0.97, "budget_ms": 1.0}],
            notes=["linear.weight stays whole"],
        )
    )


def test_shares_add_up(explained):
    cost, groups, widths, shares, _ = explained
    assert [share.name for share in shares] == groups.names
    assert [share.width for share in shares] == widths.tolist()
    assert sum(share.dense_ms for share in shares) == pytest.approx(cost.dense)  # every segment here has a width
    assert sum(share.ms for share in shares) == pytest.approx(cost.price(widths))


def test_staircases_are_slices_of_the_heaviest_segments(explained):
    cost, _, _, _, staircases = explained
    heaviest = sorted((float(term.table.max()) for term in cost.terms), reverse=True)
    assert [max(s.ms) for s in staircases] == sorted((max(s.ms) for s in staircases), reverse=True)[: len(staircases)]
    assert len(staircases) == 6
    assert all(np.all(np.diff(s.elements) > 0) and s.elements[0] <= s.chosen <= s.full for s in staircases)
    assert max(staircases[0].ms) <= heaviest[0]
    assert "first block" in [s.name for s in staircases]


class Balance(HTMLParser):
    """Checks that tags close in order, and collects attributes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(explained):
    page = whole_page(explained)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)
    assert not {"src", "href"} & {name for name, _ in parser.attributes}
    assert not re.search(r"https?:|url\(|@import", page)
    for title in ("Before and after", "Latency", "Where the channels went", "Staircases", "Training", "Notes"):
        assert f"<h2>{title}" in page
    assert "0.97 ms" in page
    assert "97.0% used" in page


def test_figures_are_xml_without_nan(explained):
    figures = re.findall(r"<svg.*?</svg>", whole_page(explained), re.DOTALL)
    assert len(figures) == 1 + 1 + 6 + 3
    for figure in figures:
        ElementTree.fromstring(figure)
        assert "nan" not in figure
        assert "inf" not in re.sub(r"aria-label=\"[^\"]*\"", "", figure)


def test_the_figure_stands_alone(explained):
    shares = explained[3]
    figure = report.figure({**RESULT, "groups": [asdict(share) for share in shares]})
    root = ElementTree.fromstring(figure)
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert {"budget 1 ms", "2 ms", "0.97 ms", shares[0].name} <= set(texts)


def test_names_are_escaped():
    page = report.render(report.Report({**RESULT, "model": "<script>alert(1)</script>"}))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("rows", [[], [{"step": 0, "cost": 1.0, "target": 1.0}], [{"step": 0}, {"step": 1}]])
def test_little_is_enough(rows):
    page = report.render(report.Report({"model": "m"}, search=rows))
    assert "<h1>m pruned by hwprune</h1>" in page


def test_a_missed_budget_is_said():
    assert "missed by 20.0%" in report.render(report.Report({**RESULT, "measured_ms": 1.2}))


def test_many_groups_show_the_heaviest(explained):
    groups = [report.GroupShare(f"g{i}", 16, 8, float(i), 0.5 * i) for i in range(100)]
    page = report.render(report.Report(RESULT, groups))
    assert "The 52 lightest groups are left out." in page
    assert ">g99<" in page
    assert ">g1<" not in page


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (3.0, 3.0), (0.013, 0.0191), (-2.0, 250.0), (0.0, 0.0)])
def test_ticks_enclose(low, high):
    ticks = report._ticks(low, high, 5)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 8


def test_unwritable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match=r"cannot write .*report\.html"):
        report.write(tmp_path / "file" / "report.html", report.Report(RESULT))

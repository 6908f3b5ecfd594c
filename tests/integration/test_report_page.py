"""The report as a person sees it, in a real browser."""

from __future__ import annotations

import re

import pytest
from browser import Visit, visit
from made_up_runs import lines_of_a_run, make_run

from dpo_scale.operations.report import write_report

LOOK = """
document.body.dataset.resources = performance.getEntriesByType("resource").length;
document.body.dataset.text = getComputedStyle(document.querySelector("#loss .xtick text")).fill;
document.body.dataset.page = getComputedStyle(document.body).backgroundColor;
"""
CHANGE_AXIS = """
document.querySelector('button[data-axis="hours"]').click();
document.querySelector('input[data-run="1"]').click();
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    folder = tmp_path_factory.mktemp("one")
    run = make_run(folder / "run_of_one", lines_of_a_run())
    return visit(write_report([run]), folder, script=LOOK, dark=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    folder = tmp_path_factory.mktemp("two")
    runs = [make_run(folder / f"beta{beta}", lines_of_a_run(120, seed=beta)) for beta in (1, 2)]
    return visit(write_report(runs, folder / "both.html"), folder, script=CHANGE_AXIS + LOOK)


def curves(dom: str, figure: str) -> int:
    """Curves and marks that are drawn in a figure, from its SVG."""
    start = dom.index(f'id="{figure}"')
    end = dom.find('<div class="card">', start)
    return dom[start:end].count('class="trace scatter')


@pytest.mark.parametrize("page", ["one", "two"])
def test_the_page_asks_no_network_and_its_console_stays_silent(page: str, request: pytest.FixtureRequest) -> None:
    found: Visit = request.getfixturevalue(page)
    assert found.console == ()
    assert 'data-resources="0"' in found.dom


def test_every_figure_of_a_run_is_drawn(one: Visit) -> None:
    assert 'data-drawn="10"' in one.dom  # nine over the steps, and the lengths
    # training raw and smoothed, held out, resumes, skips
    assert curves(one.dom, "loss") == 5
    assert curves(one.dom, "lengths") == 3
    assert "finished" in one.dom


def test_dark_pages_have_light_text(one: Visit, two: Visit) -> None:
    def brightness(dom: str, name: str) -> float:
        return sum(map(int, re.search(rf'data-{name}="rgb\((\d+), (\d+), (\d+)\)"', dom).groups())) / 3

    assert brightness(one.dom, "page") < 60 < 120 < brightness(one.dom, "text")
    assert brightness(two.dom, "text") < 130 < 200 < brightness(two.dom, "page")


def test_the_axis_changes_and_a_run_can_be_taken_out(two: Visit) -> None:
    assert "hours since the first start" in two.dom
    assert "optimizer steps" not in two.dom
    assert curves(two.dom, "loss") == 5  # of two runs, one is hidden

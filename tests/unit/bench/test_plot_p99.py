"""The plot in the README is the one that its figures give."""

import re
import xml.etree.ElementTree as ElementTree

from tests.bench.plot_p99 import GROUPS, RESULTS, draw, read, rows

FIGURES = read("simulate_upstream.json"), read("upstream_h200.json")


def test_the_committed_plot_shows_the_committed_figures() -> None:
    assert (RESULTS / "p99.svg").read_text() == draw(*FIGURES)


def test_each_figure_is_a_dot_within_the_drawing() -> None:
    drawing = ElementTree.fromstring(draw(*FIGURES))
    dots = drawing.findall("{http://www.w3.org/2000/svg}circle")
    assert len(dots) == sum(len(list(rows(table, *FIGURES))) for table in GROUPS)
    width = float(drawing.attrib["width"])
    assert all(0 < float(dot.attrib["cx"]) < width for dot in dots)


def test_a_longer_wait_lies_further_right() -> None:
    drawing = draw(*FIGURES)
    values = [value for table in GROUPS for _, _, value in rows(table, *FIGURES)]
    places = [float(x) for x in re.findall(r'cx="([\d.]+)"', drawing)]
    assert sorted(places) == [x for _, x in sorted(zip(values, places, strict=True))]

from __future__ import annotations

import re
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.studies.page.charts import (
    Point,
    Series,
    draw_dot_rows,
    draw_heat_map,
    draw_lines,
    draw_scatter,
    spread_heights,
)
from normtune.studies.page.drawing import Axis, Level

LINEAR = Axis("score (%)", "{:g}".format)
LOG = Axis("share", "{:g}".format, log=True)


@given(st.lists(st.floats(0, 300), min_size=1, max_size=15))
def test_spread_heights_keep_their_order_and_distance(preferred: list[float]) -> None:
    result = spread_heights(preferred, 0.0, 300.0, 14.0)
    heights = [result[index] for index in sorted(range(len(preferred)), key=lambda index: preferred[index])]
    assert all(after - before >= 13.9 for before, after in pairwise(heights))
    assert min(heights) >= -1e-6 and max(heights) <= 300 + 1e-6


def mark(name: str, x: float, y: float, reach: float = 1.0) -> Series:
    return Series(name, "ln", (Point(x, y, y - reach, y + reach, f"{name}: {y}"),))


def texts(svg: str) -> dict[str, tuple[float, float]]:
    """Each text of a drawing with its position."""
    matches = re.findall(r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', svg)
    return {text: (float(x), float(y)) for x, y, text in matches}


def test_names_of_coinciding_marks_do_not_overlap() -> None:
    svg = draw_scatter("label", [mark(name, 1.0, 5.0) for name in ("one", "two", "six")], LOG, LINEAR)
    positions = [texts(svg)[name] for name in ("one", "two", "six")]
    for (x, y), (other_x, other_y) in combinations(positions, 2):
        assert abs(x - other_x) > 8 or abs(y - other_y) > 10


def test_a_name_at_the_right_edge_stays_inside_the_drawing() -> None:
    svg = draw_scatter("label", [mark("first", 0.1, 1.0), mark("a-very-long-name", 1.0, 2.0)], LOG, LINEAR)
    assert re.search(r"text-anchor:end[^>]*>a-very-long-name<", svg)


def test_every_point_has_a_name_and_a_tooltip() -> None:
    marks = [mark("first", 0.1, 1.0), mark("second", 1.0, 2.0)]
    svg = draw_scatter("label", marks, LOG, LINEAR, Level("frozen base", 1.5, -9.0, 9.0))
    assert {"first", "second", "frozen base"} <= texts(svg).keys()
    assert svg.count("<title>") == 2 and "<title>first: 1.0</title>" in svg


@pytest.mark.parametrize(("reach", "arrowheads"), [(0.5, 0), (50.0, 2)])
def test_an_interval_that_the_axis_cuts_off_ends_in_an_arrowhead(reach: float, arrowheads: int) -> None:
    svg = draw_scatter("label", [mark("a", 0.1, 1.0, reach), mark("b", 1.0, 2.0)], LOG, LINEAR)
    assert len(re.findall(r'<path style="fill:var\(--ln\)|<path [^>]*style="fill:var\(--ln\)', svg)) == arrowheads


def test_ticks_are_round_and_formatted() -> None:
    percent = Axis("score", lambda value: f"{round(100 * value)}%")
    svg = draw_scatter("label", [mark("a", 0.01, 0.27, 0.0), mark("b", 1.0, 0.41, 0.0)], LOG, percent)
    assert [text for text in texts(svg) if text.endswith("%")] == ["30%", "35%", "40%"]
    assert {"0.01", "0.1", "1"} <= texts(svg).keys()


def test_text_is_text_and_is_escaped() -> None:
    svg = draw_dot_rows("a & b", [Series("<b> $x$", "full", (Point(1.0, 0.0, 0.5, 1.5, "<i>"),))], LINEAR)
    assert "&lt;b&gt; $x$</text>" in svg and "<title>&lt;i&gt;</title>" in svg and 'aria-label="a &amp; b"' in svg


def test_a_drawing_has_no_ids_and_the_colours_of_the_page() -> None:
    points = (Point(1, 2, 1, 3), Point(2, 3, 2, 4, style="hollow"))
    lines = [Series("ln", "ln", points), Series("full", "full", (Point(1, 4, 3, 5),))]
    for label_solid in (False, True):
        svg = draw_lines("label", lines, LINEAR, LINEAR, label_solid=label_solid)
        assert not re.search(r"\bid=|url\(|href|xmlns|#[0-9a-f]{6}", svg)
        assert "stroke:var(--ln)" in svg and "fill:var(--full)" in svg
        assert svg == draw_lines("label", lines, LINEAR, LINEAR, label_solid=label_solid)


@pytest.mark.parametrize(("layers", "is_wider"), [(6, False), (80, True)])
def test_a_heat_map_has_a_cell_for_each_value(layers: int, is_wider: bool) -> None:
    columns = [*map(str, range(layers)), "other"]
    values = {("before attention", column): float(at) for at, column in enumerate(columns)}
    svg = draw_heat_map("label", values, {cell: cell[1] for cell in values}, columns, "layer")
    assert svg.count("<title>") == layers + 1
    assert {"before attention", "0", "other", "layer"} <= texts(svg).keys()
    assert ("min-width" in svg) == is_wider  # a wide drawing scrolls


def test_names_of_recipes_are_in_a_font_where_l_and_i_differ() -> None:
    for svg in (
        draw_scatter("label", [mark("ln", 1.0, 5.0)], LOG, LINEAR),
        draw_lines("label", [mark("ln", 1.0, 5.0)], LINEAR, LINEAR),
        draw_dot_rows("label", [mark("ln", 1.0, 5.0)], LINEAR),
    ):
        assert re.search(r'<text [^>]*class="name"[^>]*>ln</text>', svg)
        assert not re.search(r'<text [^>]*class="name"[^>]*>score', svg)


def test_the_seeds_of_a_row_are_small_marks_and_a_level_has_a_band() -> None:
    dots = (Point(1.0, 0.0, 0.5, 1.5, "mean"), Point(0.9, 0.0, 0.9, 0.9, "seed 0", "small"))
    level = Level("no difference", 1.0, 0.8, 1.2)
    svg = draw_dot_rows("label", [Series("ln", "ln", dots)], LINEAR, level)
    radii = [float(radius) for radius in re.findall(r' r="([\d.]+)"', svg)]
    assert len(radii) == 2 and radii[1] < radii[0]
    assert "opacity:0.13" in svg

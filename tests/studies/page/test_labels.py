from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from normtune.studies.page.labels import Box, place_labels, spread_heights


@given(st.lists(st.floats(0, 300), min_size=1, max_size=15))
def test_spread_heights_keep_their_order_and_distance(preferred: list[float]) -> None:
    result = spread_heights(preferred, 0.0, 300.0)
    order = sorted(range(len(preferred)), key=lambda index: preferred[index])
    heights = [result[index] for index in order]
    assert all(after - before >= 13.9 for before, after in pairwise(heights))
    assert min(heights) >= -1e-6 and max(heights) <= 300 + 1e-6


def test_a_single_label_is_right_of_its_mark() -> None:
    (position,) = place_labels(["ln"], [(100.0, 100.0)], [], Box(0, 0, 400, 300))
    assert position.x > 100 and position.anchor == "start" and not position.leader


def test_a_label_at_the_right_edge_is_left_of_its_mark() -> None:
    (position,) = place_labels(["encoder"], [(395.0, 100.0)], [], Box(0, 0, 400, 300))
    assert position.anchor == "end"


def test_labels_of_coinciding_marks_do_not_overlap() -> None:
    positions = place_labels(["one", "two", "six"], [(100.0, 100.0)] * 3, [], Box(0, 0, 400, 300))
    assert len({(position.x, position.y) for position in positions}) == 3
    heights = [position.y for position in positions if position.anchor == "start"]
    assert len(set(heights)) == len(heights)

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from normtune.studies.page.labels import Box, beside, spread


@given(st.lists(st.floats(0, 300), min_size=1, max_size=15))
def test_spread_heights_keep_their_order_and_distance(wanted: list[float]) -> None:
    found = spread(wanted, 0.0, 300.0)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    heights = [found[index] for index in order]
    assert all(after - before >= 13.9 for before, after in pairwise(heights))
    assert min(heights) >= -1e-6 and max(heights) <= 300 + 1e-6


def test_a_name_alone_stands_right_of_its_mark() -> None:
    (place,) = beside(["ln"], [(100.0, 100.0)], [], Box(0, 0, 400, 300))
    assert place.x > 100 and place.anchor == "start" and not place.leader


def test_a_name_at_the_right_edge_goes_left() -> None:
    (place,) = beside(["encoder"], [(395.0, 100.0)], [], Box(0, 0, 400, 300))
    assert place.anchor == "end"


def test_names_of_marks_that_coincide_do_not_lie_on_each_other() -> None:
    places = beside(["one", "two", "six"], [(100.0, 100.0)] * 3, [], Box(0, 0, 400, 300))
    assert len({(place.x, place.y) for place in places}) == 3
    heights = [place.y for place in places if place.anchor == "start"]
    assert len(set(heights)) == len(heights)

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from normtune.studies.page.axes import Axis, scale

LINEAR = Axis("score (%)", str)
LOG = Axis("share", str, log=True)
values = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=8)


@given(values, st.sampled_from([LINEAR, LOG]))
def test_every_value_lies_within_and_in_order(found: list[float], axis: Axis) -> None:
    made = scale(axis, found, [], 300.0, 10.0)
    places = [made(value) for value in sorted(found)]
    assert all(10.0 <= place <= 300.0 for place in places)
    assert places == sorted(places, reverse=True)


@given(values, st.sampled_from([LINEAR, LOG]))
def test_ticks_lie_within_and_are_few(found: list[float], axis: Axis) -> None:
    made = scale(axis, found, [], 0.0, 400.0)
    ticks = made.ticks()
    assert len(ticks) <= 12
    assert all(made.low * 0.999 <= tick <= made.high * 1.001 for tick in ticks)


def test_ticks_are_round() -> None:
    assert [round(tick, 6) for tick in scale(LINEAR, [0.27, 0.41], [], 0, 1).ticks()] == [0.3, 0.35, 0.4]
    assert scale(LOG, [0.0007, 1.0], [], 0, 1).ticks() == [0.001, 0.01, 0.1, 1.0]


def test_an_interval_that_dwarfs_the_differences_does_not_set_the_axis() -> None:
    made = scale(LINEAR, [0.30, 0.35], [-2.0, 3.0], 0, 1)
    assert made.low > 0.2 and made.high < 0.45
    assert scale(LINEAR, [0.30, 0.35], [0.28, 0.37], 0, 1).high > 0.37


def test_equal_values_still_have_an_axis() -> None:
    made = scale(Axis("score", str, least=0.02, bound=(0.0, 1.0)), [0.0, 0.0], [], 0, 1)
    assert made.low == 0.0 and math.isclose(made.high, 0.0112, rel_tol=0.2)


def test_an_axis_from_zero_holds_it() -> None:
    assert scale(Axis("points", str, zero=True), [5.0, 9.0], [], 0, 1).low == 0.0

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from normtune.studies.page.drawing import Axis, axis_limits

LINEAR = Axis("score (%)", "{:g}".format)
LOG = Axis("share", "{:g}".format, log=True)
numbers = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=8)


@given(numbers, st.sampled_from([LINEAR, LOG]))
def test_an_axis_includes_all_values(values: list[float], axis: Axis) -> None:
    low, high = axis_limits(axis, values, [])
    assert low < min(values) and max(values) < high


def test_an_interval_much_wider_than_the_differences_does_not_set_the_axis() -> None:
    low, high = axis_limits(LINEAR, [0.30, 0.35], [-2.0, 3.0])
    assert low > 0.2 and high < 0.45
    assert axis_limits(LINEAR, [0.30, 0.35], [0.28, 0.37])[1] > 0.37


def test_equal_values_still_have_an_axis() -> None:
    low, high = axis_limits(Axis("score", str, min_span=0.02, bounds=(0.0, 1.0)), [0.0, 0.0], [])
    assert low == 0.0 and 0.009 < high < 0.014  # half of the least span, and a margin


def test_an_axis_from_zero_includes_zero() -> None:
    assert axis_limits(Axis("points", str, from_zero=True), [5.0, 9.0], [])[0] == 0.0

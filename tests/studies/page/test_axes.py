from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from normtune.studies.page.axes import Axis, make_scale

LINEAR = Axis("score (%)", str)
LOG = Axis("share", str, log=True)
values = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=8)


@given(values, st.sampled_from([LINEAR, LOG]))
def test_positions_are_within_the_axis_and_in_order(numbers: list[float], axis: Axis) -> None:
    result = make_scale(axis, numbers, [], 300.0, 10.0)
    positions = [result(value) for value in sorted(numbers)]
    assert all(10.0 <= position <= 300.0 for position in positions)
    assert positions == sorted(positions, reverse=True)


@given(values, st.sampled_from([LINEAR, LOG]))
def test_ticks_are_within_the_axis_and_few(numbers: list[float], axis: Axis) -> None:
    result = make_scale(axis, numbers, [], 0.0, 400.0)
    ticks = result.ticks()
    assert len(ticks) <= 12
    assert all(result.low * 0.999 <= tick <= result.high * 1.001 for tick in ticks)


def test_ticks_are_round() -> None:
    assert [round(tick, 6) for tick in make_scale(LINEAR, [0.27, 0.41], [], 0, 1).ticks()] == [0.3, 0.35, 0.4]
    assert make_scale(LOG, [0.0007, 1.0], [], 0, 1).ticks() == [0.001, 0.01, 0.1, 1.0]


def test_an_interval_much_wider_than_the_differences_does_not_set_the_axis() -> None:
    result = make_scale(LINEAR, [0.30, 0.35], [-2.0, 3.0], 0, 1)
    assert result.low > 0.2 and result.high < 0.45
    assert make_scale(LINEAR, [0.30, 0.35], [0.28, 0.37], 0, 1).high > 0.37


def test_equal_values_still_have_an_axis() -> None:
    result = make_scale(Axis("score", str, min_span=0.02, bounds=(0.0, 1.0)), [0.0, 0.0], [], 0, 1)
    assert result.low == 0.0 and 0.009 < result.high < 0.014  # the next tick after 0.0112


def test_an_axis_from_zero_includes_zero() -> None:
    assert make_scale(Axis("points", str, from_zero=True), [5.0, 9.0], [], 0, 1).low == 0.0

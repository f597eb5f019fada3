from __future__ import annotations

import pytest

from normtune.runtime import number_format


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number_format.format_percent(0.4712), "47.1"),
        (number_format.format_percent(-0.0004), "0.0"),  # no minus before a zero
        (number_format.format_percent(None), "–"),
        (number_format.format_points(0.028), "+2.8"),
        (number_format.format_points(-0.028), "\u22122.8"),
        (number_format.format_points(0.0), "0.0"),
        (number_format.format_share(0.0029), "0.29%"),
        (number_format.format_share(0.000035), "0.0035%"),
        (number_format.format_share(0.2388), "23.9%"),
        (number_format.format_share(0.05), "5%"),
        (number_format.format_share(1.0), "100%"),
        (number_format.format_bytes(412 * 2**20), "412 MiB"),
        (number_format.format_bytes(5.2 * 2**30), "5.2 GiB"),
        (number_format.format_duration(25.49), "25 s"),
        (number_format.format_duration(3.14159), "3.1 s"),
        (number_format.format_duration(150), "2.50 min"),
        (number_format.format_duration(8568), "2.38 h"),
        (number_format.format_p_value(0.0002), "p < 0.001"),
        (number_format.format_p_value(None), "p –"),
        (number_format.format_p_number(0.0002), "< 0.001"),
        (number_format.format_p_number(0.034), "0.034"),
        (number_format.format_p_value(0.034), "p = 0.034"),
        (number_format.format_significant(0), "0"),
        (number_format.format_significant(float("nan")), "–"),
        (number_format.format_significant(1234.5), "1,234"),
        (number_format.format_tick(-0.5), "\u22120.5"),
        (number_format.join_names(["a", "b", "c"]), "a, b and c"),
        (number_format.join_names([]), "none"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected


def test_a_score_with_its_interval_as_commands_print_it() -> None:
    score = {"value": 0.4712, "low": 0.45, "high": 0.5}
    assert number_format.format_interval(score) == "47.1 [45.0, 50.0]"
    assert number_format.format_interval(score, scale=1, digits=2, sign="+") == "+0.47 [+0.45, +0.50]"

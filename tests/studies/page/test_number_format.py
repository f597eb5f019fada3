from __future__ import annotations

import pytest

from normtune.report import numbers


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (numbers.percent(0.4712), "47.1"),
        (numbers.percent(-0.0004), "0.0"),  # no minus before a zero
        (numbers.percent(None), "–"),
        (numbers.points(0.028), "+2.8"),
        (numbers.points(-0.028), "\u22122.8"),
        (numbers.points(0.0), "0.0"),
        (numbers.share(0.0029), "0.29%"),
        (numbers.share(0.000035), "0.0035%"),
        (numbers.share(0.2388), "23.9%"),
        (numbers.share(0.05), "5%"),
        (numbers.share(1.0), "100%"),
        (numbers.memory(412_000_000), "412 MB"),
        (numbers.memory(5_230_000_000), "5.2 GB"),
        (numbers.duration(25.49), "25 s"),
        (numbers.duration(3.14159), "3.1 s"),
        (numbers.duration(150), "2.50 min"),
        (numbers.duration(8568), "2.38 h"),
        (numbers.p_value(0.0002), "p < 0.001"),
        (numbers.p_value(0.034), "p = 0.034"),
        (numbers.significant(0), "0"),
        (numbers.significant(float("nan")), "–"),
        (numbers.significant(1234.5), "1,234"),
        (numbers.tick(-0.5), "\u22120.5"),
        (numbers.several(["a", "b", "c"]), "a, b and c"),
        (numbers.several([]), "none"),
    ],
)
def test_numbers_have_the_digits_they_are_worth(found: str, expected: str) -> None:
    assert found == expected

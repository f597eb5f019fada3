from __future__ import annotations

import pytest

from normtune.studies.page import number_format


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (number_format.percent(0.4712), "47.1"),
        (number_format.percent(-0.0004), "0.0"),  # no minus before a zero
        (number_format.percent(None), "–"),
        (number_format.points(0.028), "+2.8"),
        (number_format.points(-0.028), "\u22122.8"),
        (number_format.points(0.0), "0.0"),
        (number_format.share(0.0029), "0.29%"),
        (number_format.share(0.000035), "0.0035%"),
        (number_format.share(0.2388), "23.9%"),
        (number_format.share(0.05), "5%"),
        (number_format.share(1.0), "100%"),
        (number_format.memory(412_000_000), "412 MB"),
        (number_format.memory(5_230_000_000), "5.2 GB"),
        (number_format.duration(25.49), "25 s"),
        (number_format.duration(3.14159), "3.1 s"),
        (number_format.duration(150), "2.50 min"),
        (number_format.duration(8568), "2.38 h"),
        (number_format.p_value(0.0002), "p < 0.001"),
        (number_format.p_value(0.034), "p = 0.034"),
        (number_format.significant(0), "0"),
        (number_format.significant(float("nan")), "–"),
        (number_format.significant(1234.5), "1,234"),
        (number_format.tick(-0.5), "\u22120.5"),
        (number_format.several(["a", "b", "c"]), "a, b and c"),
        (number_format.several([]), "none"),
    ],
)
def test_numbers_have_the_digits_they_are_worth(found: str, expected: str) -> None:
    assert found == expected

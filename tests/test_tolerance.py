"""All numeric tolerances come from `tests.support.tolerance`, and hold for sums in any order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.support.tolerance import approx, assert_close, assert_gradients_close, differ, relative_bound

TESTS = Path(__file__).parent
LITERAL = re.compile(r"\b(?:atol|rtol|abs|rel|abs_tol|rel_tol)\s*=\s*(?!0[,)])[0-9.]+(?:e-?[0-9]+)?\s*[,)]")


def test_no_test_states_a_tolerance_of_its_own() -> None:
    """`rtol=0, atol=0`, bitwise equality, is allowed."""
    literal = {
        f"{path.relative_to(TESTS)}:{number}: {line.strip()}"
        for path in TESTS.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if LITERAL.search(line)
    }
    assert not literal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("terms", [10, 1_000, 100_000])
def test_sums_in_another_order_are_close_and_other_sums_are_not(terms: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(terms)
    values = torch.randn(20, terms, generator=generator, dtype=torch.float64).to(dtype)
    total = values.sum(1)
    # one term after the other, which is the worst order
    shuffled = values[:, torch.randperm(terms, generator=generator)].cumsum(1)[:, -1]
    magnitude = float(values.double().cumsum(1).abs().max())
    assert_close(shuffled, total, terms=terms, magnitude=magnitude)
    with pytest.raises(AssertionError):
        assert_close(
            total + 2 * relative_bound(dtype, terms=terms) * magnitude, total, terms=terms, magnitude=magnitude
        )


def test_two_results_differ_where_rounding_does_not_explain_it() -> None:
    values = torch.linspace(1, 2, 9)
    assert not differ(values * (1 + relative_bound()), values)
    assert differ(values * 1.01, values)


def test_gradients_of_rounding_alone_need_no_relative_error() -> None:
    expected = {"weight": torch.ones(3), "key.bias": torch.full((3,), 1e-9)}
    assert_gradients_close({"weight": torch.ones(3), "key.bias": torch.full((3,), -1e-9)}, expected)
    with pytest.raises(AssertionError, match=r"key\.bias"):
        assert_gradients_close({"weight": torch.ones(3), "key.bias": torch.full((3,), 1e-3)}, expected)


def test_numbers_are_compared_by_the_dtype_they_were_computed_in() -> None:
    assert approx(1.0) == 1 + 1e-6
    assert approx(1.0, dtype=torch.float64) != 1 + 1e-6

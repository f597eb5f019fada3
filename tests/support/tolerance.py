"""Numeric tolerances, derived from the dtype, the length of the sums and the magnitude of the values.

Two correct programs may add the same numbers in another order, and another processor does. One rounding
changes a value by at most eps / 2 of its size. The errors of a sum of n terms have either sign, so that they
grow like sqrt(n); the worst case, n, does not occur in practice (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, section 2.8 and chapter 4). Two results of the same sum then differ by about

    eps * sqrt(terms) * magnitude

where the magnitude is that of the largest value, since small results are often differences of large ones.
`SAFETY` covers several such operations in a row: a network normalises its states again and again, so that
errors of earlier layers do not add up without a limit.

No test has its own number as a tolerance: a bound that was measured on one machine fails on another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

SAFETY = 4
# The longest sum in the tiny test models: their vocabulary has about 400 words, their rows up to 100 tokens
# of width 64. In fp32 the relative bound is then 4 * 2^-23 * sqrt(400) = 9.5e-6.
MODEL_TERMS = 400
DISTINCT = 10  # a difference of this many bounds is no rounding error: two results that must differ do


def relative_bound(dtype: torch.dtype = torch.float32, *, terms: int = MODEL_TERMS) -> float:
    """The largest rounding error of a sum of `terms` terms, relative to the largest value."""
    return SAFETY * torch.finfo(dtype).eps * math.sqrt(terms)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    terms: int = MODEL_TERMS,
    dtype: torch.dtype | None = None,
    magnitude: float | None = None,
    msg: str | None = None,
) -> None:
    """Check that two tensors agree up to rounding.

    Args:
        actual, expected: tensors of one shape and dtype.
        terms: length of the longest sum behind a value.
        dtype: the least precise dtype that the computation uses; by default that of the tensors.
        magnitude: size of the largest value in the computation; by default the largest expected value.
    """
    if magnitude is None:
        magnitude = float(expected.detach().abs().max()) if expected.numel() else 0.0
    bound = relative_bound(dtype or expected.dtype, terms=terms) * magnitude
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound, msg=msg)


def differ(actual: Tensor, expected: Tensor, *, terms: int = MODEL_TERMS) -> bool:
    """Whether two tensors differ somewhere by more than any rounding error explains."""
    bound = relative_bound(expected.dtype, terms=terms) * float(expected.detach().abs().max())
    return bool((actual - expected).abs().max() > DISTINCT * bound)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of the expected tensor; 0 where both are zero."""
    difference = (actual - expected).norm()
    return float(difference / expected.norm()) if difference else 0.0


def assert_gradients_close(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    *,
    terms: int = MODEL_TERMS,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check every gradient, by the norm of its error relative to its own norm.

    A gradient that is zero except for rounding (below the bound of the largest gradient) has no relative
    error; it must be as small on the other side (a key's bias, for example, moves no softmax).
    """
    assert actual.keys() == expected.keys()
    bound = relative_bound(dtype, terms=terms)
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient.norm() < bound * scale:
            assert actual[name].norm() < 2 * bound * scale, name
        else:
            assert relative_error(actual[name], gradient) < bound, name


def approx(
    expected: float | Sequence[float] | dict[Any, float],
    *,
    terms: int = MODEL_TERMS,
    dtype: torch.dtype = torch.float32,
    magnitude: float = 1.0,
) -> Any:
    """`pytest.approx` for numbers that were computed in `dtype`; `magnitude` is the scale of their terms."""
    bound = relative_bound(dtype, terms=terms)
    return pytest.approx(expected, rel=bound, abs=bound * magnitude)


def sampling_error(standard_deviation: float, samples: int) -> float:
    """Four standard errors of a mean over random samples: two correct estimates differ by less."""
    return 4 * standard_deviation / math.sqrt(samples)


def quantile_error(standard_deviation: float, samples: int) -> float:
    """The same for the 2.5% or 97.5% quantile of a nearly normal sample.

    Its standard error is sqrt(p (1 - p) / samples) over the density there, 0.0584 / standard_deviation.
    """
    return sampling_error(math.sqrt(0.025 * 0.975) / 0.0584 * standard_deviation, samples)

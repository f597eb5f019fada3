"""The package's public names."""

from __future__ import annotations

import pkgutil

import pytest

import normtune


@pytest.mark.parametrize("name", normtune.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(normtune, name).__doc__


def test_no_public_name_is_that_of_a_module() -> None:
    """Importing such a module would replace the name."""
    assert not set(normtune.__all__) & {module.name for module in pkgutil.iter_modules(normtune.__path__)}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'adaptt'"):
        _ = normtune.adaptt


@pytest.mark.parametrize(("old", "new"), normtune._RENAMED.items())
def test_an_old_name_still_works_with_a_warning(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"normtune.{new}"):
        assert getattr(normtune, old) is getattr(normtune, new)

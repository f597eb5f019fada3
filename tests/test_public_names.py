"""The package's public names."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

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


def test_the_stub_declares_every_public_name_from_its_module() -> None:
    stub = ast.parse(Path(normtune.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {name.asname: node.module for node in imports for name in node.names} == normtune._MODULES


def test_importing_the_package_imports_neither_torch_nor_pydantic() -> None:
    code = "import normtune, sys; print(sorted({'torch', 'pydantic', 'numpy', 'transformers'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"

"""The examples in the docs run: `bash` blocks of normtune commands and `python` blocks, in order.

Commands in `console` blocks need data or much time; of these only the options are parsed.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from normtune import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    return [block for block in _BLOCK.findall(page.read_text(encoding="utf-8")) if block[0] in languages]


def commands(text: str) -> list[list[str]]:
    """The normtune commands of a block, without comments; lines end with a backslash if they continue."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("normtune ")]


def run(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(sys, "argv", ["normtune", *arguments])
        cli.main()
    assert exit_info.value.code == 0, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for language, text in blocks(page, "bash", "python"):
        with contextlib.redirect_stdout(io.StringIO()):
            if language == "python":
                exec(compile(text, page.name, "exec"), {"__name__": "example"})
            else:
                assert all(line.startswith(("normtune ", " ", "#")) or not line for line in text.splitlines()), text
                for arguments in commands(text):
                    run(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_that_are_not_run_parse(page: Path) -> None:
    root: Any = typer.main.get_command(cli.app)
    for _, text in blocks(page, "console"):
        for name, *arguments in commands(text):
            root.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_of_the_project_hold(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    for path in re.findall(
        r"`((?:benchmarks|scripts|docs|src|tests)/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8")
    ):
        assert "NAME" in path or (ROOT / path).exists(), f"{page.name}: {path}"


def test_commands_of_a_block_are_found() -> None:
    assert commands("normtune data x \\\n  --root y  # why\nmake demo\n") == [["data", "x", "--root", "y"]]

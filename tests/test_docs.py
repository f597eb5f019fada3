"""The examples in the docs run: `bash` blocks of normtune commands and `python` blocks, in order.

Commands in `console` blocks need data or much time; of these only the options are parsed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

import normtune
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


@pytest.fixture
def write_docs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that writes parts of the docs."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("write_docs")


def test_the_readme_is_what_its_sources_say(write_docs: ModuleType) -> None:
    """Its example and its GPU table; it fits on a few screens. Run scripts/write_docs.py after a change."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page == write_docs.readme(page)
    assert page.count("\n") <= 120
    (_, example), *_ = blocks(ROOT / "README.md", "python")
    assert example.count("\n") <= 12


def test_the_page_of_gpus_is_what_its_sources_say(write_docs: ModuleType) -> None:
    """Run scripts/write_docs.py after a change. Every command fits on the GPU under whose heading it is."""
    text = (ROOT / "docs" / "which-gpu.md").read_text(encoding="utf-8")
    assert text == write_docs.which_gpu(text)
    plans = write_docs.plans
    rows = json.loads(write_docs.PLANS.read_text(encoding="utf-8"))["rows"]
    for size in plans.GPU_SIZES:
        options = list(plans.best_options(rows, size))
        assert options and all(row["peak"] <= plans.usable_bytes(size) for row in options)
        assert all(plans.command(row) in text for row in options)


def test_plans_agree_with_the_measurements_on_a_gpu(write_docs: ModuleType) -> None:
    rows, gpu = (json.loads(path.read_text(encoding="utf-8")) for path in (write_docs.PLANS, write_docs.GPU_RECORD))
    compared = write_docs.plans.comparison(rows["rows"], gpu)
    assert len(compared) == len(write_docs.plans.MEASURED)
    assert all(0.9 * measured < planned < 1.1 * measured for _, _, planned, measured in compared)


def test_the_results_page_is_written_from_the_study(write_docs: ModuleType) -> None:
    """Every table and every conclusion. Run scripts/write_docs.py after a new study."""
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == write_docs.results()
    assert (ROOT / "docs" / "small-methods.md").read_text(encoding="utf-8") == write_docs.small_methods()
    assert (ROOT / "docs" / "when-norms.md").read_text(encoding="utf-8") == write_docs.when_norms()


@pytest.mark.parametrize(
    ("p", "difference", "equivalent", "supports", "expected"),
    [
        (0.01, 0.05, False, "equal", "does not hold"),  # the other recipe is better
        (0.01, -0.05, False, "equal", "holds"),
        (0.50, 0.00, True, "equal", "holds"),
        (0.50, 0.00, True, "above", "does not hold"),  # equivalent, so not better
        (0.50, 0.01, False, "above", "undecided"),
        (0.50, 0.01, False, "equal", "undecided"),
    ],
)
def test_a_claim_holds_only_by_a_test(
    write_docs: ModuleType, p: float, difference: float, equivalent: bool, supports: str, expected: str
) -> None:
    test = {"p_holm": p, "difference": difference, "equivalent": equivalent}
    assert write_docs.results_page.verdict([test], supports) == expected
    assert write_docs.results_page.verdict([], supports) == "undecided"


def test_the_page_of_commands_is_that_of_the_commands(write_docs: ModuleType) -> None:
    """Run scripts/write_docs.py after a change."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == write_docs.commands_page()
    assert "| `--tune` | `ln` | Recipe: " in page and "## normtune doctor" in page


def navigation(entries: list[Any]) -> list[str]:
    """The pages of mkdocs.yml's nav, all levels."""
    pages: list[str] = []
    for entry in entries:
        for target in entry.values():
            pages += navigation(target) if isinstance(target, list) else [target]
    return pages


def test_every_page_is_in_the_navigation_and_on_the_front_page() -> None:
    """So that an answer is two clicks away."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    names = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    assert sorted(navigation(config["nav"])) == names
    front = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [name for name in names if name != "index.md" and f"]({name})" not in front] == []


def test_the_api_page_has_every_public_name() -> None:
    """Each under its module, except the two configs, which the page of commands describes."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name, module in normtune._MODULES.items():
        if name not in ("TrainConfig", "EvaluateConfig"):
            assert f"::: {module}.{name}\n" in page, name
    for target in re.findall(r"^::: ([\w.]+)\.(\w+)$", page, re.MULTILINE):
        assert getattr(importlib.import_module(target[0]), target[1]).__doc__

"""The benchmarks of a source checkout by name: what there is, and one of them run.

A benchmark is a script of `benchmarks/` with a `main`; it parses its own options, prints a table, and writes
its record where `--out` says.
"""

from __future__ import annotations

import argparse
import ast
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NoReturn

import typer

from normtune.commands.app import Json, app, emit
from normtune.errors import InputError, did_you_mean
from normtune.runtime.files import read_json

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"  # of a checkout, whose package is in src/normtune
RECORD = "results.json"  # of a benchmark that writes a folder


@dataclass(frozen=True)
class Benchmark:
    """One script and the first line of its docstring."""

    name: str
    summary: str
    path: Path


def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by its name; the scripts are parsed, none is imported.

    Raises:
        InputError: the package is installed without its source.
    """
    scripts = sorted(FOLDER.glob("*.py"))
    if not scripts:
        raise InputError(
            f"there are no benchmarks at {FOLDER}: they come with the source, not with the installed "
            "package. git clone https://github.com/normtune/normtune, install it with pip install -e "
            "normtune, and run normtune bench again."
        )
    found = {}
    for path in scripts:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            summary = (ast.get_docstring(tree) or path.stem).splitlines()[0]
            found[path.stem] = Benchmark(path.stem, summary, path)
    return found


def listing(found: dict[str, Benchmark]) -> str:
    """The benchmarks, a line each."""
    width = max(map(len, found))
    return "\n".join(f"{one.name:<{width}}  {one.summary}" for one in found.values())


def run_benchmark(name: str, arguments: Sequence[str]) -> None:
    """Run a benchmark in this process with its own options; its table goes to stdout as it comes.

    Raises:
        InputError: there is no such benchmark, or it does not take these options.
    """
    known = benchmarks()
    if name not in known:
        raise InputError(
            f"no benchmark '{name}'{did_you_mean(name, known) or '.'} Known are {', '.join(known)}."
        )
    path, argv = known[name].path, sys.argv
    sys.path.insert(0, str(path.parent))  # scripts import their neighbours
    sys.argv = [str(path), *arguments]
    try:
        with _one_line_refusals(name):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:  # argparse ends so after --help; a script's own message is an error
        if ended.code:
            raise
    finally:
        sys.argv = argv
        sys.path.remove(str(path.parent))


def recorded(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a benchmark and give the JSON record that it writes; what it prints goes to stderr.

    Raises:
        InputError: see `run_benchmark`; or it wrote no record.
    """
    with TemporaryDirectory() as folder:
        given = _given_out(arguments)
        out = given or Path(folder) / "record.json"
        with redirect_stdout(sys.stderr):
            run_benchmark(name, arguments if given else [*arguments, "--out", str(out)])
        record = out / RECORD if out.is_dir() else out
        if not record.is_file():
            raise InputError(f"benchmark {name} wrote no record to {out}. Run it without --json.")
        held: dict[str, Any] = read_json(record)
        return held


def _given_out(arguments: Sequence[str]) -> Path | None:
    for place, word in enumerate(arguments):
        if word == "--out" and place + 1 < len(arguments):
            return Path(arguments[place + 1])
        if word.startswith("--out="):
            return Path(word.removeprefix("--out="))
    return None


@contextmanager
def _one_line_refusals(name: str) -> Iterator[None]:
    """Inside, argparse's refusals are InputErrors: one line, as every command's."""

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise InputError(f"bench {name}: {message}. Its options: normtune bench {name} --help")

    own = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = refuse  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = own  # type: ignore[method-assign]


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def bench(
    name: Annotated[str | None, typer.Argument(help="A benchmark; none lists them.")] = None,
    options: Annotated[
        list[str] | None, typer.Argument(help="Its own options: normtune bench NAME --help.")
    ] = None,
    json: Json = False,
) -> None:
    """The benchmarks of the source checkout: list them, or run one and print its table."""

    given = [option for option in options or () if option != "--json"]
    if name is None:
        found = benchmarks()
        rows = [{"name": one.name, "summary": one.summary} for one in found.values()]
        emit(json, {"benchmarks": rows}, listing(found))
    elif json or len(given) < len(options or ()):
        emit(True, recorded(name, given), "")
    else:
        run_benchmark(name, given)

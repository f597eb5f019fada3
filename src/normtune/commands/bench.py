"""Lists and runs the benchmarks of a source checkout.

A benchmark is a script in `benchmarks/` with a `main` function. It parses its own options, prints a table,
and writes its record to `--out`.
"""

from __future__ import annotations

import argparse
import ast
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NoReturn

import typer

from normtune.commands.app import Json, app, emit
from normtune.errors import InputError, did_you_mean
from normtune.runtime.files import read_json
from normtune.runtime.text_table import text_table

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"  # only a source checkout has it
RECORD_FILE = "results.json"  # the record of a benchmark with a folder as its --out


def find_benchmarks() -> dict[str, str]:
    """Return the name of every benchmark of a source checkout, with the first line of its docstring.

    The scripts are parsed, but not imported.
    """
    scripts = sorted(FOLDER.glob("*.py"))
    if not scripts:
        raise InputError(
            f"there are no benchmarks at {FOLDER}: only the source has them, not the installed "
            "package. git clone https://github.com/normtune/normtune, install it with pip install -e "
            "normtune, and run normtune bench again."
        )
    benchmarks = {}
    for path in scripts:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            benchmarks[path.stem] = (ast.get_docstring(tree) or path.stem).splitlines()[0]
    return benchmarks


def run_benchmark(name: str, arguments: Sequence[str]) -> None:
    """Run a benchmark in this process, which prints its table; an `InputError` for unknown names and options."""
    benchmarks = find_benchmarks()
    if name not in benchmarks:
        raise InputError(
            f"no benchmark '{name}'{did_you_mean(name, benchmarks) or '.'} Known are {', '.join(benchmarks)}."
        )
    path, argv = FOLDER / f"{name}.py", sys.argv
    sys.path.insert(0, str(path.parent))  # scripts import other modules of their folder
    sys.argv = [str(path), *arguments]
    try:
        with _argparse_errors_as_input_errors(name):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:  # argparse exits with 0 after --help; any other status is a failure
        if error.code:
            raise
    finally:
        sys.argv = argv
        sys.path.remove(str(path.parent))


def benchmark_record(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a benchmark and return the JSON record that it must write. Its printed output goes to stderr."""
    with TemporaryDirectory() as folder:
        out_option = _out_option(arguments)
        out = out_option or Path(folder) / "record.json"
        with redirect_stdout(sys.stderr):
            run_benchmark(name, arguments if out_option else [*arguments, "--out", str(out)])
        record_file = out / RECORD_FILE if out.is_dir() else out
        if not record_file.is_file():
            raise InputError(f"benchmark {name} wrote no record to {out}. Run it without --json.")
        return read_json(record_file)


def _out_option(arguments: Sequence[str]) -> Path | None:
    for index, argument in enumerate(arguments):
        if argument == "--out" and index + 1 < len(arguments):
            return Path(arguments[index + 1])
        if argument.startswith("--out="):
            return Path(argument.removeprefix("--out="))
    return None


@contextmanager
def _argparse_errors_as_input_errors(name: str) -> Iterator[None]:
    """Within the context, errors of argparse are raised as InputErrors, which print one line."""

    def raise_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise InputError(f"bench {name}: {message}. See normtune bench {name} --help")

    original = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = raise_error  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = original  # type: ignore[method-assign]


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def bench(
    name: Annotated[str | None, typer.Argument(help="Name of a benchmark; without it, all are listed.")] = None,
    options: Annotated[
        list[str] | None, typer.Argument(help="The benchmark's own options; see normtune bench NAME --help.")
    ] = None,
    json: Json = False,
) -> None:
    """List or run the benchmarks of a source checkout."""
    own_options = [option for option in options or () if option != "--json"]
    if name is None:
        benchmarks = find_benchmarks()
        rows = [{"name": name, "summary": summary} for name, summary in benchmarks.items()]
        emit(json, {"benchmarks": rows}, "\n".join(text_table(benchmarks.items(), "l")))
    elif json or len(own_options) < len(options or ()):  # --json before or after NAME
        emit(True, benchmark_record(name, own_options), "")
    else:
        run_benchmark(name, own_options)

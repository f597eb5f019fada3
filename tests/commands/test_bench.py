"""`normtune bench`: lists benchmarks, runs them with their own options, and prints tables or records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from normtune import cli
from normtune.commands import bench

SCRIPT = '''"""Counts to a number.

More of it.
"""

import argparse, json
from pathlib import Path

from neighbour import WORD


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", type=int, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(WORD, options.to)
    if options.out:
        options.out.write_text(json.dumps({"benchmark": "count", "rows": list(range(options.to))}))


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks: one script, and a module that it imports."""
    (tmp_path / "count.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "neighbour.py").write_text('"""Not a benchmark."""\nWORD = "up to"\n', encoding="utf-8")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return tmp_path


def run(*arguments: object) -> int:
    """Run `normtune bench ...` in this process and return its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["normtune", "bench", *map(str, arguments)])
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


Captured = pytest.CaptureFixture[str]


def test_without_a_name_the_benchmarks_are_listed(folder: Path, capsys: Captured) -> None:
    assert run() == 0
    assert capsys.readouterr().out == "count  Counts to a number.\n"
    assert run("--json") == 0
    rows = [{"name": "count", "summary": "Counts to a number."}]
    assert json.loads(capsys.readouterr().out) == {"benchmarks": rows}


def test_all_benchmarks_of_the_checkout_have_a_summary() -> None:
    benchmarks = bench.find_benchmarks()
    assert {"throughput", "answering", "scaling", "gpu", "demo"} <= set(benchmarks)
    assert "record" not in benchmarks and "workload" not in benchmarks
    assert all(summary.endswith((".", "?", ":")) for summary in benchmarks.values())


def test_a_benchmark_takes_its_own_options_and_prints_its_table(folder: Path, capsys: Captured) -> None:
    argv_before, path_before = list(sys.argv), list(sys.path)
    assert run("count", "--to", 3) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("up to 3\n", "")
    assert (sys.argv, sys.path) == (argv_before, path_before)


@pytest.mark.parametrize("position", ["before", "after"])
def test_json_prints_only_the_record(folder: Path, capsys: Captured, position: str) -> None:
    arguments = ("--json", "count", "--to", 2) if position == "before" else ("count", "--to", 2, "--json")
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"benchmark": "count", "rows": [0, 1]}
    assert printed.err == "up to 2\n"


@pytest.mark.parametrize("written", ["--out {}", "--out={}"])
def test_json_with_out_also_writes_the_file(folder: Path, capsys: Captured, written: str) -> None:
    out = folder / "record.json"
    assert run("count", "--to", 1, *written.format(out).split(" "), "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())


def test_help_after_a_name_is_the_help_of_the_benchmark(folder: Path, capsys: Captured) -> None:
    assert run("count", "--help") == 0
    assert "--to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("coun",), "normtune: no benchmark 'coun', did you mean 'count'? Known are count.\n"),
        (("zzz",), "normtune: no benchmark 'zzz'. Known are count.\n"),
        (
            ("count",),
            "normtune: bench count: the following arguments are required: --to. See normtune bench count --help\n",
        ),
        (
            ("count", "--to", "x", "--json"),
            "normtune: bench count: argument --to: invalid int value: 'x'. See normtune bench count --help\n",
        ),
    ],
)
def test_bad_input_prints_one_line(folder: Path, capsys: Captured, arguments: tuple[str, ...], error: str) -> None:
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", error)


def test_a_failing_benchmark_sets_the_exit_status(folder: Path) -> None:
    (folder / "fail.py").write_text('"""Fails."""\ndef main() -> None: ...\nraise SystemExit(3)\n')
    assert run("fail") == 3


def test_without_the_source_the_error_explains_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "benchmarks")
    for arguments in ((), ("throughput",)):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert "git clone https://github.com/normtune/normtune" in error and error.count("\n") == 1

"""`normtune bench`: the benchmarks of a checkout by name, their own options, their tables and records."""

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
    """A checkout's benchmarks: one script, and a module that it imports."""
    (tmp_path / "count.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "neighbour.py").write_text('"""Not a benchmark."""\nWORD = "up to"\n', encoding="utf-8")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return tmp_path


def run(*arguments: object) -> int:
    """`normtune bench ...` in this process: its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["normtune", "bench", *map(str, arguments)])
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


Captured = pytest.CaptureFixture[str]


def test_without_a_name_it_lists_the_benchmarks_a_line_each(folder: Path, capsys: Captured) -> None:
    assert run() == 0
    assert capsys.readouterr().out == "count  Counts to a number.\n"
    assert run("--json") == 0
    rows = [{"name": "count", "summary": "Counts to a number."}]
    assert json.loads(capsys.readouterr().out) == {"benchmarks": rows}


def test_every_script_of_the_checkout_is_listed_with_its_first_line() -> None:
    found = bench.benchmarks()
    assert {"throughput", "answering", "scaling", "gpu_llava_med_7b", "demo"} <= set(found)
    assert "record" not in found and "workload" not in found
    assert all(one.summary.endswith((".", "?", ":")) for one in found.values())
    assert all(name in bench.listing(found) for name in found)


def test_a_benchmark_takes_its_own_options_and_prints_its_table(folder: Path, capsys: Captured) -> None:
    before, path = list(sys.argv), list(sys.path)
    assert run("count", "--to", 3) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("up to 3\n", "")
    assert (sys.argv, sys.path) == (before, path)


@pytest.mark.parametrize("place", ["before", "after"])
def test_json_is_the_record_alone(folder: Path, capsys: Captured, place: str) -> None:
    arguments = ("--json", "count", "--to", 2) if place == "before" else ("count", "--to", 2, "--json")
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"benchmark": "count", "rows": [0, 1]}
    assert printed.err == "up to 2\n"


@pytest.mark.parametrize("written", ["--out {}", "--out={}"])
def test_json_and_a_file_of_ones_own(folder: Path, capsys: Captured, written: str) -> None:
    out = folder / "record.json"
    assert run("count", "--to", 1, *written.format(out).split(" "), "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())


def test_help_after_a_name_is_the_benchmarks_own(folder: Path, capsys: Captured) -> None:
    assert run("count", "--help") == 0
    assert "--to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("coun",), "normtune: no benchmark 'coun', did you mean 'count'? Known are count.\n"),
        (("zzz",), "normtune: no benchmark 'zzz'. Known are count.\n"),
        (
            ("count",),
            "normtune: bench count: the following arguments are required: --to. Its options: "
            "normtune bench count --help\n",
        ),
        (
            ("count", "--to", "x", "--json"),
            "normtune: bench count: argument --to: invalid int value: 'x'. Its options: "
            "normtune bench count --help\n",
        ),
    ],
)
def test_bad_input_is_one_line(folder: Path, capsys: Captured, arguments: tuple[str, ...], told: str) -> None:
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", told)


def test_a_benchmark_that_fails_fails_the_command(folder: Path) -> None:
    (folder / "fail.py").write_text('"""Fails."""\ndef main() -> None: ...\nraise SystemExit(3)\n')
    assert run("fail") == 3


def test_a_package_without_its_source_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "benchmarks")
    for arguments in ((), ("throughput",)):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert "git clone https://github.com/normtune/normtune" in error and error.count("\n") == 1

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
import torch

from normtune.errors import InputError
from normtune.metrics.meteor import meteor15
from normtune.metrics.reports import report_table
from tests.support.tolerance import approx

PAIRS = {
    "a": ("the heart is enlarged . no effusion .", "the heart is enlarged . there is no pleural effusion ."),
    "b": ("no acute disease", "no acute disease"),
    "c": ("the cardiac silhouette is large", "heart size is enlarged ."),
}
# What meteor-1.5.jar answers to `SCORE ||| reference ||| prediction` and to `EVAL ||| ...`
COUNTS = {
    "a": "8 11 5 7 3 3 5 5" + " 0" * 12 + " 3 8 8",
    "b": "3 3 1 1 2 2 1 1" + " 0" * 12 + " 1 3 3",
    "c": "5 5 2 2 0 0 1 1" + " 0" * 8 + " 1 1 0 0 2 2 2",
}
SCORES = {"a": 0.3888351953987754, "b": 1.0, "c": 0.10181818181818181}
WORDS = {id: (prediction.split(), reference.split()) for id, (prediction, reference) in PAIRS.items()}


@pytest.fixture
def jar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of the program, and a stub of `java` that answers with the counts."""
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    answers = "\n".join(f"echo '{counts}'" for counts in COUNTS.values())
    java.write_text(f"#!/bin/sh\ncat > {tmp_path}/input\n{answers}\n")
    java.chmod(java.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{java.parent}:/usr/bin:/bin")
    (tmp_path / "meteor-1.5.jar").touch()
    return tmp_path / "meteor-1.5.jar"


def test_rows_have_the_scores_of_the_program(jar: Path) -> None:
    metric = meteor15(WORDS, jar)
    assert metric.by_row() == approx(SCORES, dtype=torch.float64)
    lines = (jar.parent / "input").read_text().splitlines()
    assert lines[1] == "SCORE ||| no acute disease ||| no acute disease"


def test_the_table_of_reports_has_it_under_its_own_name(jar: Path) -> None:
    table = report_table(PAIRS, normalisations=["none"], findings=False, meteor15=jar)
    assert "meteor15/none" in table and any(name.startswith("meteor_") for name in table)


def test_a_missing_program_or_java_is_an_input_error(jar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no such file. Download METEOR 1\.5"):
        meteor15(WORDS, jar.parent / "other.jar")
    with pytest.raises(InputError, match="METEOR failed"):
        meteor15(dict(list(WORDS.items())[:2]), jar)
    monkeypatch.setenv("PATH", str(jar.parent / "none"))
    with pytest.raises(InputError, match="Install Java"):
        meteor15(WORDS, jar)


def test_the_program_agrees() -> None:
    """On the corpus and on each row, if the reference implementation is here."""
    package = pytest.importorskip("pycocoevalcap")
    jar = Path(package.__path__[0]) / "meteor" / "meteor-1.5.jar"
    if shutil.which("java") is None or not jar.is_file():
        pytest.skip("needs java and meteor-1.5.jar")
    from pycocoevalcap.meteor.meteor import Meteor

    reference = Meteor()
    try:
        corpus, rows = reference.compute_score(
            {id: [reference_text] for id, (_, reference_text) in PAIRS.items()},
            {id: [prediction] for id, (prediction, _) in PAIRS.items()},
        )
    finally:
        process = reference.meteor_p
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
    metric = meteor15(WORDS, jar)
    assert metric.overall() == approx(corpus, dtype=torch.float64, terms=1000)
    assert list(metric.by_row().values()) == approx(rows, dtype=torch.float64, terms=1000)

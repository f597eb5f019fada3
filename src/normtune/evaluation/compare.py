"""Evaluations of the same questions side by side: checked to be so, then every metric paired by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normtune.data.records import Example
from normtune.errors import InputError
from normtune.evaluation.results import read_run, split_hash
from normtune.metrics.statistics import holm
from normtune.metrics.sum_metrics import SumMetric, paired
from normtune.metrics.table import metric_table
from normtune.runtime.files import read_json, write_text


@dataclass(frozen=True)
class EvaluationRun:
    """One evaluation as its files hold it: examples, answers by id, and metrics.json."""

    name: str  # the shortest end of its path that no other run has
    directory: Path
    examples: list[Example]
    texts: dict[str, str]
    about: dict[str, Any]

    @property
    def is_report(self) -> bool:
        """Whether reports were written rather than questions answered."""
        return self.examples[0].kind == "report"


@dataclass(frozen=True)
class MetricDifference:
    """One metric of two runs on the same rows; `difference` is the second less the first."""

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float  # corrected for all metrics of all runs that were compared
    rows: int
    images: int
    method: str


@dataclass(frozen=True)
class Comparison:
    """Runs against the first of them: run -> metric -> the two values and their difference."""

    baseline: EvaluationRun
    others: list[EvaluationRun]
    differences: dict[str, dict[str, MetricDifference]]

    @property
    def comparisons(self) -> int:
        """How many differences were tested, and their p-values corrected for."""
        return sum(len(found) for found in self.differences.values())

    def to_json(self) -> dict[str, Any]:
        """What `normtune compare --json` prints."""
        about = self.baseline.about
        return {
            "dataset": about["dataset"],
            "rows": about["rows"],
            "images": about["images"],
            "split_hash": about["split_hash"],
            "normalisation": about["normalisation"],
            "baseline": self.baseline.name,
            "runs": {run.name: str(run.directory) for run in (self.baseline, *self.others)},
            "comparisons": self.comparisons,
            "differences": {
                run: {name: asdict(one) for name, one in found.items()}
                for run, found in self.differences.items()
            },
        }


def compare(run_a: Path | str, run_b: Path | str) -> dict[str, MetricDifference]:
    """Two evaluations of the same rows, paired by id: difference, interval and p-value of every metric.

    Raises:
        InputError: as `read_runs`.
    """
    (found,) = compare_runs([run_a, run_b]).differences.values()
    return found


def compare_runs(directories: Sequence[Path | str]) -> Comparison:
    """Every metric of each run against the first, paired by image, p-values corrected over all (Holm).

    Raises:
        InputError: as `read_runs`.
    """
    baseline, *others = read_runs(directories)
    if not others:
        raise InputError("one run alone has nothing to be compared with. Name two result folders or more.")
    cluster = {example.id: example.images for example in baseline.examples}
    first = metric_rows(baseline)
    tables = {run.name: metric_rows(run) for run in others}
    pairs = {
        (run, name): paired(metric, table[name], cluster)
        for run, table in tables.items()
        for name, metric in first.items()
    }
    corrected = holm({key: pair.p for key, pair in pairs.items()})
    differences: dict[str, dict[str, MetricDifference]] = {run: {} for run in tables}
    for (run, name), pair in pairs.items():
        differences[run][name] = MetricDifference(
            first=first[name].overall(),
            second=tables[run][name].overall(),
            p_holm=corrected[run, name],
            **asdict(pair),
        )
    return Comparison(baseline, others, differences)


def read_runs(directories: Sequence[Path | str]) -> list[EvaluationRun]:
    """Evaluations of one split, checked to hold the same questions of the same images.

    Raises:
        InputError: a file is missing or damaged, a folder stands twice, or a run has other rows, questions,
            references or normalisations than the first; the message counts them and names where they are.
    """
    paths = [Path(directory) for directory in directories]
    resolved = [path.resolve() for path in paths]
    for path, whole in zip(paths, resolved, strict=True):
        if resolved.count(whole) > 1:
            raise InputError(f"{path} is named twice. Name each result folder once.")
    names = _names(resolved)
    runs = [_read(path, name) for path, name in zip(paths, names, strict=True)]
    for run in runs[1:]:
        _check_same(runs[0], run)
    return runs


def _read(path: Path, name: str) -> EvaluationRun:
    examples, texts, about = read_run(path)
    manifest = read_json(path / "manifest.json")
    ids = manifest.get("ids") if isinstance(manifest, dict) else None
    if not isinstance(ids, list) or manifest.get("split_hash") != about["split_hash"]:
        raise InputError(f"{path / 'manifest.json'} is not of the predictions beside it. Evaluate again.")
    if split_hash([str(id) for id in ids]) != about["split_hash"]:
        raise InputError(f"{path / 'manifest.json'}: its ids do not have its hash. Evaluate again.")
    return EvaluationRun(name, path, examples, texts, about)


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, in whole folders, that tell them apart."""
    names = []
    for path in paths:
        deep = len(path.parts)
        ends = (d for d in range(1, deep) if sum(p.parts[-d:] == path.parts[-d:] for p in paths) == 1)
        names.append(str(Path(*path.parts[-next(ends, deep) :])))
    return names


def _check_same(first: EvaluationRun, other: EvaluationRun) -> None:
    """That both hold the same rows, with the same words, scored alike."""
    a, b = first.directory, other.directory
    if first.about["split_hash"] != other.about["split_hash"]:
        odd = [
            f"{len(alone)} stand in {run} alone, first '{min(alone)}'"
            for run, alone in ((a, first.texts.keys() - other.texts), (b, other.texts.keys() - first.texts))
            if alone
        ]
        raise InputError(
            f"{a} and {b} evaluate different rows: {'; '.join(odd)}. Evaluate both on one split."
        )
    held = {example.id: example for example in other.examples}
    for what, field in (
        ("questions", "question"),
        ("references", "answer"),
        ("images", "images"),
        ("kinds of question", "kind"),
    ):
        changed = [e.id for e in first.examples if getattr(e, field) != getattr(held[e.id], field)]
        if changed:
            raise InputError(
                f"{a} and {b} differ in {len(changed)} {what}, first that of '{changed[0]}'. "
                "Evaluate both on one version of the data."
            )
    if first.about["normalisation"] != other.about["normalisation"]:
        raise InputError(
            f"{a} and {b} were scored under different normalisations: {_named(first)} and {_named(other)}. "
            "Evaluate both with one --normalisation."
        )


def _named(run: EvaluationRun) -> str:
    """The run's normalisation, or normalisations."""
    given = run.about["normalisation"]
    return given if isinstance(given, str) else ", ".join(given)


def metric_rows(run: EvaluationRun) -> dict[str, SumMetric]:
    """Every metric of the run's task, row by row."""
    return metric_table(run.examples, run.texts, run.about["normalisation"])


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    """One row a run and metric: both values, the difference with its interval, p and rows; times 100."""
    rows = []
    for run, metrics in found["differences"].items():
        for name, one in metrics.items():
            first, second = 100 * one["first"], 100 * one["second"]
            value, low, high = (100 * one[end] for end in ("difference", "low", "high"))
            interval = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
            p = [f"{one[which]:.4f}" for which in ("p", "p_holm")]
            rows.append([run, name, f"{first:.2f}", f"{second:.2f}", interval, *p, str(one["rows"])])
    return rows


_HEAD = ["run", "metric", "baseline", "value", "difference", "p", "p (Holm)", "rows"]
_LEFT = 2  # columns of text; the others are numbers


def _caption(found: Mapping[str, Any]) -> tuple[str, str]:
    """The line above the table, and the one below it."""
    return (
        f"{found['dataset']}: {found['rows']} rows, {found['images']} images; baseline: {found['baseline']}",
        f"Values times 100; intervals 95%, paired bootstrap over images; p-values corrected for all "
        f"{found['comparisons']} comparisons (Holm).",
    )


def comparison_text(found: Mapping[str, Any]) -> str:
    """`Comparison.to_json` as an aligned table."""
    rows = [_HEAD, *_rows(found)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEAD))]
    lines = [
        "  ".join(
            cell.ljust(width) if at < _LEFT else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    above, below = _caption(found)
    return "\n".join([above, *lines, below])


def comparison_markdown(found: Mapping[str, Any]) -> str:
    """`Comparison.to_json` as a Markdown table."""
    above, below = _caption(found)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (_HEAD, *_rows(found))]
    head, *lines = ["| " + " | ".join(row) + " |" for row in cells]
    rule = "|" + "---|" * _LEFT + "--:|" * (len(_HEAD) - _LEFT)
    return "\n".join([above.replace("|", "\\|"), "", head, rule, *lines, "", below]) + "\n"


def write_comparison(found: Mapping[str, Any], path: Path) -> None:
    """Write the Markdown table, whole or not at all."""
    write_text(path, comparison_markdown(found))

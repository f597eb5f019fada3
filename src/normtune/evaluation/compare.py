"""Compares evaluations of the same questions: checks that they match, then pairs every metric by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normtune.data.records import Example
from normtune.errors import InputError
from normtune.evaluation.results import read_run, split_hash
from normtune.metrics.statistics import holm_correction
from normtune.metrics.sum_metrics import SumMetric, paired_difference
from normtune.metrics.table import metric_table
from normtune.runtime.files import read_json, write_text
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table, text_table


@dataclass(frozen=True)
class EvaluationRun:
    """One evaluation, read from its files."""

    name: str  # the shortest end of its path that no other run has
    directory: Path
    examples: list[Example]
    texts: dict[str, str]  # example id -> predicted text
    record: dict[str, Any]  # contents of metrics.json

    @property
    def is_report(self) -> bool:
        """Whether the predictions are reports rather than answers."""
        return self.examples[0].kind == "report"


@dataclass(frozen=True)
class MetricDifference:
    """One metric of two runs on the same rows. `difference` is the second minus the first."""

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float  # corrected for all metrics of all compared runs (Holm 1979)
    rows: int
    images: int
    method: str


@dataclass(frozen=True)
class Comparison:
    """Several runs compared with the first of them, the baseline."""

    baseline: EvaluationRun
    others: list[EvaluationRun]
    differences: dict[str, dict[str, MetricDifference]]  # run -> metric -> difference from the baseline

    @property
    def comparisons(self) -> int:
        """The number of tested differences, for which p-values are corrected."""
        return sum(len(metrics) for metrics in self.differences.values())

    def to_json(self) -> dict[str, Any]:
        """Build the dictionary that `normtune compare --json` prints."""
        about = self.baseline.record
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
                run: {name: asdict(difference) for name, difference in metrics.items()}
                for run, metrics in self.differences.items()
            },
        }


def compare(run_a: Path | str, run_b: Path | str) -> dict[str, MetricDifference]:
    """Compare two evaluations of the same rows, paired by id.

    Args:
        run_a: result folder of the first evaluation.
        run_b: result folder of the second.

    Returns:
        Metric name -> both values, the difference (second minus first), its 95% interval and p-values.

    Raises:
        InputError: as `read_runs`.
    """
    (differences,) = compare_runs([run_a, run_b]).differences.values()
    return differences


def compare_runs(directories: Sequence[Path | str]) -> Comparison:
    """Compare every metric of each run with the first run, paired by image.

    The p-values are corrected for all metrics of all runs (Holm 1979).

    Raises:
        InputError: as `read_runs`, or if there is only one run.
    """
    baseline, *others = read_runs(directories)
    if not others:
        raise InputError("a comparison needs at least two runs. Name two or more result folders.")
    cluster = {example.id: example.images for example in baseline.examples}
    first = compute_metrics(baseline)
    tables = {run.name: compute_metrics(run) for run in others}
    pairs = {
        (run, name): paired_difference(metric, table[name], cluster)
        for run, table in tables.items()
        for name, metric in first.items()
    }
    corrected = holm_correction({key: pair.p for key, pair in pairs.items()})
    differences: dict[str, dict[str, MetricDifference]] = {run: {} for run in tables}
    for (run, name), pair in pairs.items():
        differences[run][name] = MetricDifference(
            first=first[name].overall(), second=tables[run][name].overall(), p_holm=corrected[run, name], **asdict(pair)
        )
    return Comparison(baseline, others, differences)


def read_runs(directories: Sequence[Path | str]) -> list[EvaluationRun]:
    """Read evaluations of one split and check that they have the same questions about the same images.

    Raises:
        InputError: if a file is missing or damaged, a folder is named twice, or a run differs from the first
            in rows, questions, references, images, kinds or normalisation. The message states how many differ
            and in which folder.
    """
    paths = [Path(directory) for directory in directories]
    resolved = [path.resolve() for path in paths]
    for path, absolute in zip(paths, resolved, strict=True):
        if resolved.count(absolute) > 1:
            raise InputError(f"{path} is named twice. Name each result folder once.")
    names = _short_names(resolved)
    runs = [_read_run(path, name) for path, name in zip(paths, names, strict=True)]
    for run in runs[1:]:
        _check_same_rows(runs[0], run)
    return runs


def _read_run(path: Path, name: str) -> EvaluationRun:
    """Read one evaluation and check its manifest."""
    examples, texts, record = read_run(path)
    manifest = read_json(path / "manifest.json")
    ids = manifest.get("ids") if isinstance(manifest, dict) else None
    if not isinstance(ids, list) or manifest.get("split_hash") != record["split_hash"]:
        raise InputError(f"{path / 'manifest.json'} does not match predictions.jsonl. Evaluate again.")
    if split_hash([str(id) for id in ids]) != record["split_hash"]:
        raise InputError(f"{path / 'manifest.json'}: its ids do not match its hash. Evaluate again.")
    return EvaluationRun(name, path, examples, texts, record)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Name each path by its shortest end, in whole folders, that no other path has."""
    names = []
    for path in paths:
        depth = len(path.parts)
        unique = (n for n in range(1, depth) if sum(p.parts[-n:] == path.parts[-n:] for p in paths) == 1)
        names.append(str(Path(*path.parts[-next(unique, depth) :])))
    return names


def _check_same_rows(first: EvaluationRun, other: EvaluationRun) -> None:
    """Check that both runs have the same rows with the same texts, and the same normalisation."""
    a, b = first.directory, other.directory
    if first.record["split_hash"] != other.record["split_hash"]:
        unmatched = [
            f"{len(ids)} are only in {run}, first '{min(ids)}'"
            for run, ids in ((a, first.texts.keys() - other.texts), (b, other.texts.keys() - first.texts))
            if ids
        ]
        raise InputError(f"{a} and {b} evaluate different rows: {'; '.join(unmatched)}. Evaluate both on one split.")
    by_id = {example.id: example for example in other.examples}
    for what, field in (
        ("questions", "question"),
        ("references", "answer"),
        ("images", "images"),
        ("kinds of question", "kind"),
    ):
        changed = [e.id for e in first.examples if getattr(e, field) != getattr(by_id[e.id], field)]
        if changed:
            raise InputError(
                f"{a} and {b} differ in {len(changed)} {what}, first that of '{changed[0]}'. "
                "Evaluate both on one version of the data."
            )
    if first.record["normalisation"] != other.record["normalisation"]:
        raise InputError(
            f"{a} and {b} were scored under different normalisations: "
            f"{_normalisation_text(first)} and {_normalisation_text(other)}. "
            "Evaluate both with one --normalisation."
        )


def _normalisation_text(run: EvaluationRun) -> str:
    """Format the run's normalisation (answers) or normalisations (reports)."""
    normalisation = run.record["normalisation"]
    return normalisation if isinstance(normalisation, str) else ", ".join(normalisation)


def compute_metrics(run: EvaluationRun) -> dict[str, SumMetric]:
    """Compute every metric of the run's task, row by row."""
    return metric_table(run.examples, run.texts, run.record["normalisation"])


def _table_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Format one row per run and metric: both values, the difference with its interval, p-values and rows.

    Values are multiplied by 100.
    """
    rows = []
    for run, metrics in comparison["differences"].items():
        for name, metric in metrics.items():
            first, second = 100 * metric["first"], 100 * metric["second"]
            interval = format_interval({**metric, "value": metric["difference"]}, digits=2, sign="+")
            p = [f"{metric[key]:.4f}" for key in ("p", "p_holm")]
            rows.append([run, name, f"{first:.2f}", f"{second:.2f}", interval, *p, str(metric["rows"])])
    return rows


_HEAD = ["run", "metric", "baseline", "value", "difference", "p", "p (Holm)", "rows"]
_ALIGN = "llr"  # text is aligned left, numbers right


def _caption(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """Format the line before the table and the line after it."""
    return (
        f"{comparison['dataset']}: {comparison['rows']} rows, {comparison['images']} images; "
        f"baseline: {comparison['baseline']}",
        f"Values times 100; intervals 95%, paired bootstrap over images; p-values corrected for all "
        f"{comparison['comparisons']} comparisons (Holm).",
    )


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Format the result of `Comparison.to_json` as an aligned table."""
    title, note = _caption(comparison)
    return "\n".join([title, *text_table([_HEAD, *_table_rows(comparison)], _ALIGN), note])


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """Format the result of `Comparison.to_json` as a Markdown table."""
    title, note = _caption(comparison)
    table = markdown_table(_HEAD, _table_rows(comparison), _ALIGN)
    return "\n".join([title.replace("|", "\\|"), "", *table, "", note]) + "\n"


def write_comparison(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the Markdown table to a file, atomically."""
    write_text(path, comparison_markdown(comparison))

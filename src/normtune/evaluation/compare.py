"""Compares evaluations of the same questions: checks that they match, then pairs every metric by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.errors import InputError
from normtune.evaluation.results import Evaluation, read_evaluation, trained_rows_text
from normtune.metrics.statistics import holm_correction
from normtune.metrics.sum_metrics import SumMetric, paired_difference
from normtune.metrics.table import metric_table
from normtune.runtime.files import write_text
from normtune.runtime.notebook import Result, axes_or_new, data_frame
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table, text_table

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

Runs = Sequence[Path | str | Evaluation] | Mapping[str, Path | str | Evaluation]


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


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Several runs compared with the first of them, the baseline. `print` and Jupyter show it as a table."""

    baseline: Evaluation
    others: list[Evaluation]
    differences: dict[str, dict[str, MetricDifference]]  # run -> metric -> difference from the baseline

    @property
    def comparisons(self) -> int:
        """The number of tested differences, for which p-values are corrected."""
        return sum(len(metrics) for metrics in self.differences.values())

    def to_dict(self) -> dict[str, Any]:
        """Return what `normtune compare --json` prints."""
        about = self.baseline.record
        return {
            **{name: about[name] for name in ("dataset", "rows", "images", "split_hash", "normalisation")},
            "baseline": self.baseline.name,
            "runs": {run.name: _place(run) for run in (self.baseline, *self.others)},
            "trained_rows": {run.name: run.record.get("trained_rows") for run in (self.baseline, *self.others)},
            "comparisons": self.comparisons,
            "differences": {
                run: {name: asdict(difference) for name, difference in metrics.items()}
                for run, metrics in self.differences.items()
            },
        }

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with one row for each run and metric."""
        return data_frame(
            {"run": run, "metric": name, **asdict(difference)}
            for run, metrics in self.differences.items()
            for name, difference in metrics.items()
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw every difference from the baseline with its 95% interval, times 100."""
        ax = axes_or_new(ax)
        names = list(reversed(next(iter(self.differences.values()))))
        for number, (run, metrics) in enumerate(self.differences.items()):
            rows = [metrics[name] for name in names]
            values = [100 * row.difference for row in rows]
            errors = [
                [100 * (row.difference - row.low) for row in rows],
                [100 * (row.high - row.difference) for row in rows],
            ]
            heights = [place - 0.6 * number / len(self.differences) for place in range(len(names))]
            ax.errorbar(values, heights, xerr=errors, fmt="o", capsize=3, label=run)
        ax.axvline(0, color="0.5", linewidth=1)
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel(f"difference from {self.baseline.name} x 100, with 95% interval")
        ax.legend()
        ax.grid(alpha=0.3)
        return ax

    def __str__(self) -> str:
        title, note = self._caption()
        return "\n".join([title, *text_table([_HEAD, *self._cells()], _ALIGN), note])

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.differences)} with {self.baseline.name}>"

    def markdown(self) -> str:
        """Format the comparison as a Markdown table."""
        title, note = self._caption()
        table = markdown_table(_HEAD, self._cells(), _ALIGN)
        return "\n".join([title.replace("|", "\\|"), "", *table, "", note]) + "\n"

    def save(self, path: Path | str) -> None:
        """Write the Markdown table to a file, atomically."""
        write_text(Path(path), self.markdown())

    def _cells(self) -> list[list[str]]:
        """Format one row per run and metric; values are multiplied by 100."""
        rows = []
        for run, metrics in self.differences.items():
            for name, metric in metrics.items():
                difference = {"value": metric.difference, "low": metric.low, "high": metric.high}
                interval = format_interval(difference, digits=2, sign="+")
                values = [f"{100 * metric.first:.2f}", f"{100 * metric.second:.2f}"]
                rows.append([run, name, *values, interval, f"{metric.p:.4f}", f"{metric.p_holm:.4f}", str(metric.rows)])
        return rows

    def _caption(self) -> tuple[str, str]:
        """Format the line before the table and the line after it."""
        about = self.baseline.record
        trained = [
            f" {run.name}: {text}." for run in (self.baseline, *self.others) for text in trained_rows_text(run.record)
        ]
        return (
            f"{about['dataset']}: {about['rows']} rows, {about['images']} images; baseline: {self.baseline.name}",
            f"Values times 100; intervals 95%, paired bootstrap over images; p-values corrected for all "
            f"{self.comparisons} comparisons (Holm).{''.join(trained)}",
        )


_HEAD = ["run", "metric", "baseline", "value", "difference", "p", "p (Holm)", "rows"]
_ALIGN = "llr"  # the first two columns are text and aligned left; the others are numbers


def compare(runs: Runs) -> Comparison:
    """Compare every metric of each evaluation with the first one, paired by image.

    ```python
    normtune.compare([frozen, tuned])
    normtune.compare({"frozen": frozen, "ln": "runs/ln-scores"})
    ```

    The p-values are corrected for all metrics of all runs (Holm 1979).

    Args:
        runs: results of `evaluate`, or their folders; with names, or named after their folders or adapters.

    Raises:
        InputError: as `read_runs`, or if there is only one run.
    """
    baseline, *others = read_runs(runs)
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


def read_runs(runs: Runs) -> list[Evaluation]:
    """Read evaluations of one split and check that they have the same questions about the same images.

    Raises:
        InputError: if a file is missing or damaged, a folder is named twice, or a run differs from the first
            in rows, questions, references, images, kinds or normalisation. The message states how many differ
            and in which folder.
    """
    evaluations = [
        run if isinstance(run, Evaluation) else read_evaluation(run)
        for run in (runs.values() if isinstance(runs, Mapping) else runs)
    ]
    paths = [Path(_place(evaluation)) for evaluation in evaluations]
    resolved = [path.resolve() for path in paths]
    for evaluation, path in zip(evaluations, resolved, strict=True):
        if resolved.count(path) > 1:
            place = _place(evaluation)
            raise InputError(f"{place} is named twice. Name each result once: compare({{'name': result, ...}}).")
    names = (
        list(runs) if isinstance(runs, Mapping) else _short_names([path.absolute() for path in paths])
    )  # not what links lead to
    named = [replace(evaluation, name=name) for evaluation, name in zip(evaluations, names, strict=True)]
    for evaluation in named[1:]:
        _check_same_rows(named[0], evaluation)
    return named


def _place(run: Evaluation) -> str:
    """The folder of an evaluation; one in memory is named after its baseline, adapter or base."""
    return str(run.out or run.record.get("baseline") or run.record["adapter"] or run.record["base"])


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Name each path by its shortest end, in whole folders, that no other path has."""
    names = []
    for path in paths:
        depth = len(path.parts)
        unique = (n for n in range(1, depth) if sum(p.parts[-n:] == path.parts[-n:] for p in paths) == 1)
        names.append(str(Path(*path.parts[-next(unique, depth) :])))
    return names


def _check_same_rows(first: Evaluation, other: Evaluation) -> None:
    """Check that both runs have the same rows with the same texts, and the same normalisation."""
    a, b = _place(first), _place(other)
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


def _normalisation_text(run: Evaluation) -> str:
    """Format the run's normalisation (answers) or normalisations (reports)."""
    normalisation = run.record["normalisation"]
    return normalisation if isinstance(normalisation, str) else ", ".join(normalisation)


def compute_metrics(run: Evaluation) -> dict[str, SumMetric]:
    """Compute every metric of the run's task, row by row."""
    return metric_table(run.examples, run.texts, run.record["normalisation"])

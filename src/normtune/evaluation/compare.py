"""Compares evaluations of the same questions: checks that they match, then compares every metric.

Two trained models are paired by image. Two recipes, each with the results of several seeds, are compared over seeds
and images; see `normtune.evaluation.recipe_differences`.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from normtune.errors import InputError
from normtune.evaluation.recipe_differences import (
    QUESTIONS,
    Group,
    MetricDifference,
    check_margin,
    compare_metric,
    correct_p_values,
)
from normtune.evaluation.results import Evaluation, read_evaluation, trained_rows_text
from normtune.metrics.statistics.comparisons import MIN_SEEDS
from normtune.metrics.sum_metrics import SumMetric, mean_metric
from normtune.metrics.table import metric_table
from normtune.runtime.files import write_text
from normtune.runtime.notebook import Result, axes_or_new, data_frame
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table, text_table

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

Run = Path | str | Evaluation
Runs = Sequence[Run] | Mapping[str, Run]


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Several runs or recipes compared with the first of them, the baseline. `print` and Jupyter show it as a table.

    Attributes:
        baseline: the first run; of a recipe with several seeds, the first seed under the recipe's name.
        others: the same of the others.
        differences: run -> metric -> difference from the baseline.
        seeds: name -> the evaluations of all seeds, for recipes.
        not_compared: metrics that only some of the runs have, or for other rows.
    """

    baseline: Evaluation
    others: list[Evaluation]
    differences: dict[str, dict[str, MetricDifference]]
    seeds: dict[str, list[Evaluation]] = field(default_factory=dict)
    not_compared: tuple[str, ...] = ()

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
            "runs": {
                run.name: [_place(seed) for seed in self.seeds[run.name]] if self.seeds else _place(run)
                for run in (self.baseline, *self.others)
            },
            "trained_rows": {run.name: run.record.get("trained_rows") for run in (self.baseline, *self.others)},
            "comparisons": self.comparisons,
            "not_compared": list(self.not_compared),
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
        return "\n".join([title, *text_table([self._head, *self._cells()], _ALIGN), note])

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.differences)} with {self.baseline.name}>"

    def markdown(self) -> str:
        """Format the comparison as a Markdown table."""
        title, note = self._caption()
        table = markdown_table(self._head, self._cells(), _ALIGN)
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
                cells = [run, name, *values, interval, f"{metric.p:.4f}", f"{metric.p_holm:.4f}", str(metric.rows)]
                cells.append(f"{100 * metric.smallest_difference:.1f}")
                if metric.margin is not None:
                    cells.append("equivalent" if metric.equivalent else "no worse" if metric.no_worse else "not shown")
                rows.append(cells)
        return rows

    @property
    def _head(self) -> list[str]:
        metric = next(iter(next(iter(self.differences.values())).values()))
        return [*_HEAD, *([] if metric.margin is None else [f"margin {100 * metric.margin:g}"])]

    def _caption(self) -> tuple[str, str]:
        """Format the line before the table and the lines after it."""
        about = self.baseline.record
        metrics = [metric for run in self.differences.values() for metric in run.values()]
        lines = [
            f"Values times 100; intervals 95%, clustered by image; p-values corrected for all {self.comparisons} "
            'comparisons (Holm). "can show": the true difference that is found in 80% of such comparisons.'
        ]
        for question in dict.fromkeys(metric.question for metric in metrics):
            same_question = [metric for metric in metrics if metric.question == question]
            methods = "; ".join(dict.fromkeys(metric.method for metric in same_question))
            lines.append(f"A small p says: {QUESTIONS[question]} ({methods}).")
        if self.seeds and any(metric.question != "recipes" for metric in metrics):
            lines.append(
                f"Recipes are compared from {MIN_SEEDS} seeds of each, better 5; the rows above have fewer, so that "
                "they compare the trained models."
            )
        if metrics[0].margin is not None:
            lines.append(
                f"Margin of {100 * metrics[0].margin:g} points, each at 5% and not corrected: equivalent (TOST), "
                "or no worse than the baseline by more than the margin."
            )
        runs = (self.baseline, *self.others)
        for run in runs:
            lines += [f"{run.name}: {text}." for text in trained_rows_text(run.record)]
        if self.not_compared:
            lines.append(f"Not compared, since only some of the runs have them: {', '.join(self.not_compared)}.")
        choices = {run.name: _choice_settings(run) for run in runs}
        if len({*choices.values()}) > 1:
            texts = "; ".join(f"{name}: {text}" for name, text in choices.items())
            lines.append(f"The runs read and select options differently: {texts}.")
        title = f"{about['dataset']}: {about['rows']} rows, {about['images']} images; baseline: {self.baseline.name}"
        if self.seeds:
            title += "; seeds: " + ", ".join(f"{name} {len(runs)}" for name, runs in self.seeds.items())
        return title, "\n".join(lines)


_HEAD = ["run", "metric", "baseline", "value", "difference", "p", "p (Holm)", "rows", "can show"]
_ALIGN = "llr"  # the first two columns are text and aligned left; the others are numbers


def _choice_settings(run: Evaluation) -> str:
    """How a run reads options, and how it selects the one of its prediction."""
    settings = run.record.get("settings") or {}
    if "choice_prompt" not in settings:
        return "no prompt"
    return f"prompt {settings['choice_prompt']}, by {settings['choice_scoring'][0]}"


def compare(runs: Runs | Mapping[str, Sequence[Run]], *, margin: float | None = None) -> Comparison:
    """Compare every metric of each evaluation, or of each recipe with several seeds, with the first one.

    ```python
    normtune.compare([frozen, tuned])
    normtune.compare({"frozen": frozen, "ln": "runs/ln-scores"})
    normtune.compare({"lora": ["lora-0", "lora-1", "lora-2"], "ln": ["ln-0", "ln-1", "ln-2"]}, margin=2)
    ```

    The p-values are corrected for all metrics of all runs (Holm 1979).

    Args:
        runs: results of `evaluate`, or their folders; with names, or named after their folders or adapters. A list
            of results under one name are the seeds of one recipe.
        margin: the largest difference that does not matter, in points; adds tests of equivalence.

    Raises:
        InputError: as `read_runs`, if there is only one run, or the margin is not above 0.
    """
    check_margin(margin)
    groups, has_seeds = _read_groups(runs)
    if len(groups) < 2:
        raise InputError("a comparison needs at least two runs. Name two or more result folders.")
    tables = {
        # no seed decides a group of one base without an adapter, or of one baseline
        name: Group(
            [compute_metrics(run) for run in seeds],
            fixed=has_seeds and len(seeds) == 1 and not seeds[0].record.get("adapter"),
        )
        for name, seeds in groups.items()
    }
    all_metrics = [table for group in tables.values() for table in group.metrics]
    metrics = list(dict.fromkeys(name for table in all_metrics for name in table))
    partial = tuple(name for name in metrics if not _have_same_rows(name, all_metrics))
    baseline, *others = [replace(seeds[0], name=name) for name, seeds in groups.items()]
    corrected = correct_p_values(
        {
            (run.name, metric): compare_metric(
                metric, tables[baseline.name], tables[run.name], baseline.examples, margin=margin
            )
            for run in others
            for metric in metrics
            if metric not in partial
        }
    )
    differences: dict[str, dict[str, MetricDifference]] = {run.name: {} for run in others}
    for (name, metric), difference in corrected.items():
        differences[name][metric] = difference
    return Comparison(baseline, others, differences, dict(groups) if has_seeds else {}, partial)


def _have_same_rows(name: str, tables: Sequence[Mapping[str, SumMetric]]) -> bool:
    """Whether all runs have the metric, for the same rows."""
    rows = [frozenset(table[name].row_statistics) if name in table else None for table in tables]
    return None not in rows and len(set(rows)) == 1


def _read_groups(runs: Runs | Mapping[str, Sequence[Run]]) -> tuple[dict[str, list[Evaluation]], bool]:
    """Read the runs of each name, and whether a name has several seeds."""
    if isinstance(runs, Mapping) and any(_is_list(group) for group in runs.values()):
        lists: dict[str, list[Run]] = {
            name: list(group) if _is_list(group) else [cast(Run, group)] for name, group in runs.items()
        }
        if empty := [name for name, group in lists.items() if not group]:
            raise InputError(f"'{empty[0]}' has no results. Name at least one result folder of it.")
        evaluations = iter(read_runs([run for group in lists.values() for run in group]))
        return {name: [next(evaluations) for _ in group] for name, group in lists.items()}, True
    return {run.name: [run] for run in read_runs(runs)}, False  # type: ignore[arg-type]


def _is_list(group: object) -> TypeGuard[Sequence[Run]]:
    return isinstance(group, Sequence) and not isinstance(group, str)


def parse_groups(texts: Sequence[str]) -> list[str] | dict[str, list[Run]]:
    """Parse the runs of the command line: folders, or `NAME=FOLDER,FOLDER,...` for the seeds of one recipe.

    A folder may be a pattern such as `runs/ln-*`. A text that is the path of a folder is not split.

    Raises:
        InputError: only some texts have a name, a name is given twice, or a pattern matches no folder.
    """
    named = {text: text.partition("=") for text in texts if "=" in text and not Path(text).is_dir()}
    if not named:
        return list(texts)
    groups: dict[str, list[Run]] = {}
    for text in texts:
        name, _, pattern_list = named.get(text, (text, "", text))
        if name in groups or not name:
            raise InputError(f"'{text}': write each recipe once, as NAME=FOLDER,FOLDER, ... with its seeds' folders.")
        paths: list[Run] = []
        for folder in filter(None, pattern_list.split(",")):
            matches = sorted(glob.glob(folder)) if glob.has_magic(folder) else [folder]
            if not matches:
                raise InputError(f"'{text}': no folder matches {folder}. Check the path.")
            paths += matches
        groups[name] = paths
    return groups


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
    for what, name in (
        ("questions", "question"),
        ("references", "answer"),
        ("images", "images"),
        ("kinds of question", "kind"),
        ("lists of options", "options"),
    ):
        changed = [e.id for e in first.examples if getattr(e, name) != getattr(by_id[e.id], name)]
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
    """Compute every metric of the run's task, row by row, except for those that needed a model: these are recorded."""
    recorded = {name: mean_metric(scores) for name, scores in run.row_scores.items()}
    return metric_table(run.examples, run.predictions, run.record["normalisation"]) | recorded

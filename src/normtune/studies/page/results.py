"""Lookups in `results.json` for the page of a study.

A setting is a grid, a model and its training data. An arm is the runs of one recipe in a setting, over seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean
from typing import Any

from normtune.runtime.number_format import format_share
from normtune.studies.page.palette import parts_of, recipe_family
from normtune.studies.pooling import group_by
from normtune.studies.recipe_names import FROZEN
from normtune.studies.spec import SEARCH
from normtune.studies.statistics import format_rates

SIGNIFICANT = 0.05  # p-values below this are significant
Record = Mapping[str, Any]
TABLES = ("cells", "evaluations", "metrics", "forgetting", "norms", "losses", "curves", "seeds", "tests")

# Names of metrics on the page; another metric is written as it is.
_METRIC_LABELS = {
    "global_exact": "all answers exact",
    "choice_accuracy": "choices right",
    "choice_accuracy_letter": "choices right, by letter",
    "choice_accuracy_text": "choices right, by text",
    "choice_accuracy_text_normalized": "choices right, by text and its length",
    "choice_accuracy_generated": "choices right, generated",
    "closed_label": "closed exact",
    "closed_yes_no": "yes/no exact",
    "closed_substring": "closed by substring",
    "open_exact": "open exact",
    "open_not_yes_no": "not yes/no exact",
    "open_recall": "open recall",
    "open_f1": "open F1",
    "open_recall_llava_med": "open recall (LLaVA-Med's)",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "rouge_l_f1": "ROUGE-L F1",
    "meteor_nltk": "METEOR (nltk)",
    "meteor_exact_stem": "METEOR (exact, stem)",
    "cider_d": "CIDEr-D",
    "cider": "CIDEr",
    "sacrebleu": "sacreBLEU",
    "bertscore_f1": "BERTScore F1",
}
# Candidates for the primary metric of questions and of reports, best first.
_PRIMARY_VQA = ("global_exact",)
_PRIMARY_REPORT = ("rouge_l/none", "rouge_l", "bleu_4/none", "bleu_4")
# Metrics that the tables show for questions and for reports.
_TABLE_VQA = ("choice_accuracy", "closed_label", "open_exact", "open_recall", "global_exact")
_TABLE_REPORT = ("bleu_1", "bleu_4", "rouge_l", "meteor_nltk", "meteor_exact_stem", "cider_d", "findings_f1")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval; with one seed, the run's own interval."""

    value: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, row: Record) -> Estimate:
        """From a row of the table `seeds`; a missing end of the interval is replaced by the mean."""
        value = float(row["mean"])
        low, high = (value if row.get(end) is None else float(row[end]) for end in ("low", "high"))
        return cls(value, low, high, int(row.get("seeds") or 1))


@dataclass(frozen=True)
class Setting:
    """The runs of one table: they differ only in recipe, rate, share and seed."""

    grid: str
    model: str
    trained_on: str

    @property
    def description(self) -> str:
        """The setting in words."""
        return f"{self.model} trained on {self.trained_on}"


@dataclass(frozen=True)
class Arm:
    """The runs of one recipe in a setting, over seeds."""

    setting: Setting
    share: float
    recipe: str
    rate: str | None  # the learning rate, if the setting has the recipe at several rates; else None
    cells: tuple[Record, ...]  # the rows of the table `cells`, one for each seed, or for each fold of each seed

    @property
    def name(self) -> str:
        """The recipe, with its learning rate if there are several."""
        return self.recipe if self.rate is None else f"{self.recipe} @ {self.rate.rpartition(' ')[2]}"

    @property
    def family(self) -> str:
        """The family of methods; see `palette.recipe_family`."""
        return recipe_family(self._text)

    @property
    def parts(self) -> dict[str, str]:
        """The methods of each part."""
        return parts_of(self._text)

    @property
    def _text(self) -> str:
        texts = [cell.get("resolved") or cell.get("recipe_text") or "" for cell in self.cells]
        return texts[0] if texts else ""

    @property
    def seeds(self) -> int:
        """The number of seeds."""
        return len({cell.get("seed") for cell in self.cells})

    @property
    def folds(self) -> int:
        """The number of folds; 0 without folds."""
        return len({cell.get("fold") for cell in self.cells} - {None})

    def mean(self, column: str) -> float | None:
        """The mean of a column of `cells` over the seeds; None if no cell has a value."""
        values = [float(cell[column]) for cell in self.cells if cell.get(column) is not None]
        return fmean(values) if values else None


class Results:
    """The contents of `results.json` with lookups.

    A missing table counts as empty, so that a study that has just been started has a page too.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.study: str = str(results.get("study") or "study")
        self.about: str = str(results.get("about") or "")
        self.spec: Record = results.get("spec") or {}
        self.tables: dict[str, list[Record]] = {name: list(results.get(name) or ()) for name in TABLES}
        self.cells = self.tables["cells"]
        self.finished = {cell["key"]: cell for cell in self.cells if cell.get("status", "done") == "done"}
        self._arms: dict[Setting, list[Arm]] = {}
        self._seeds = group_by(self.tables["seeds"], _seed_key)
        self._tests = {_seed_key(row): row for row in self.tables["tests"]}
        self.tasks = {row["dataset"]: row["task"] for row in self.tables["evaluations"]}
        self.images = {row["dataset"]: row["images"] for row in self.tables["evaluations"] if row["role"] != "validate"}
        # a row of `evaluations` counts the images of one fold, a row of `seeds` the images of all folds
        self.images |= {row["dataset"]: row["images"] for row in self.tables["seeds"] if self.has_folds(row["dataset"])}
        rows_of = group_by(self.tables["metrics"], itemgetter("dataset"))
        self.metrics_of = {name: distinct_values(rows, "metric") for name, rows in rows_of.items()}
        tested = [row for row in self.tables["metrics"] if row.get("role") != "validate"]
        self._metrics = group_by(tested, itemgetter("dataset", "metric"))

    def has_folds(self, dataset: str) -> bool:
        """Whether the study divides a data set into folds."""
        return bool(((self.spec.get("datasets") or {}).get(dataset) or {}).get("folds"))

    def settings(self, *, curves: bool | None = None) -> list[Setting]:
        """The settings of all cells but trials, in the study's order; `curves`: those that (do not) compare shares."""
        settings: dict[Setting, None] = {}
        for cell in self.finished.values():
            for grid in cell.get("grids") or ():
                if cell.get("trained_on") is not None and grid != SEARCH:
                    settings[Setting(grid, cell["model"], cell["trained_on"])] = None
        grids, models, datasets = (list(self.spec.get(name) or ()) for name in ("grids", "models", "datasets"))
        selected = [setting for setting in settings if curves in (None, self.is_curve(setting))]
        return sorted(
            selected, key=lambda s: (_index(grids, s.grid), _index(models, s.model), _index(datasets, s.trained_on))
        )

    def arms(self, setting: Setting) -> list[Arm]:
        """The arms of a setting in the study's order; larger shares of the data first."""
        if setting not in self._arms:
            self._arms[setting] = self._group_arms(setting)
        return self._arms[setting]

    def _group_arms(self, setting: Setting) -> list[Arm]:
        same = [
            cell
            for cell in self.finished.values()
            if setting.grid in (cell.get("grids") or ())
            and (cell["model"], cell.get("trained_on")) == (setting.model, setting.trained_on)
        ]
        arms = []
        for (share, recipe), cells in group_by(same, lambda c: (float(c.get("share") or 1), c["recipe"])).items():
            by_rate = group_by(cells, lambda cell: format_rates(cell.get("rates") or {}))
            arms += [
                Arm(setting, share, recipe, rate if len(by_rate) > 1 else None, tuple(of_rate))
                for rate, of_rate in by_rate.items()
            ]
        order = self.recipe_order()
        return sorted(arms, key=lambda arm: (-arm.share, _index(order, arm.recipe)))

    def full_data_arms(self, setting: Setting) -> list[Arm]:
        """The arms that are trained on the largest share of the data."""
        arms = self.arms(setting)
        return [arm for arm in arms if arm.share == arms[0].share]

    def is_curve(self, setting: Setting) -> bool:
        """Whether the setting compares shares of the training data."""
        grid = (self.spec.get("grids") or {}).get(setting.grid) or {}
        # an unfinished study may not have runs of every share yet, so the file counts too
        return max(len(grid.get("shares") or ()), len({arm.share for arm in self.arms(setting)})) > 1

    def recipe_order(self) -> list[str]:
        """The recipes in the order of the table `cells`."""
        return list(dict.fromkeys(cell["recipe"] for cell in self.cells))

    def estimate(self, arm: Arm, dataset: str, metric: str) -> Estimate | None:
        """An arm's mean score over seeds on a data set; None if it was not evaluated there."""
        setting = arm.setting
        rows = self._seeds.get(
            (setting.grid, setting.model, setting.trained_on, _rounded(arm.share), arm.recipe, dataset, metric), []
        )
        if arm.rate is not None:
            rows = [row for row in rows if row.get("rate") == arm.rate]
        return Estimate.of(rows[0]) if rows else None

    def frozen_estimate(self, model: str, dataset: str, metric: str) -> Estimate | None:
        """The frozen base's score on a data set; None if it was not evaluated there."""
        for row in self.tables["seeds"]:
            is_same = (row["model"], row["dataset"], row["metric"]) == (model, dataset, metric)
            if is_same and row.get("trained_on") is None:
                return Estimate.of(row)
        keys = {key for key, cell in self.finished.items() if cell["model"] == model and cell.get("trained_on") is None}
        for row in self.tables["metrics"]:
            if row["key"] in keys and row["dataset"] == dataset and row["metric"] == metric:
                return Estimate(row["value"], row["low"], row["high"], 1)
        return None

    def title(self, setting: Setting) -> str:
        """A setting's description, with its grid if the study has several settings of this model and data."""
        same = [s for s in self.settings() if s.description == setting.description]
        return setting.description if len(same) == 1 else f"{setting.description} ({setting.grid})"

    def label(self, arm: Arm) -> str:
        """An arm's name, with its share of the data if its setting compares shares."""
        return f"{arm.name}, {format_share(arm.share)}" if self.is_curve(arm.setting) else arm.name

    def run_values(self, arm: Arm, dataset: str, metric: str) -> list[tuple[str, float]]:
        """The name (its seed, and fold if there are folds) and the score of each cell of an arm on a data set."""
        cells = {cell["key"]: (cell.get("seed"), cell.get("fold")) for cell in arm.cells}
        rows = self._metrics.get((dataset, metric), [])
        values = sorted((*cells[row["key"]], float(row["value"])) for row in rows if row["key"] in cells)
        return [(f"seed {s}" + (f", fold {fold}" if arm.folds else ""), value) for s, fold, value in values]

    def counts(self, dataset: str | None, arms: Iterable[Arm]) -> str:
        """The images and seeds behind some scores: `96 images, 3 seeds`, or `1 to 3 seeds`."""
        arms = list(arms)
        seeds, folds = sorted({arm.seeds for arm in arms}), max((arm.folds for arm in arms), default=0)
        texts = [counted(self.images[dataset], "image")] if dataset in self.images else []
        if seeds:
            texts.append(counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds")
        texts += [f"{folds} folds"] if folds else []
        return ", ".join(texts)

    def reference_recipe(self, setting: Setting) -> str | None:
        """The recipe that others are compared with: from the setting's tests, else from the file."""
        key = (setting.grid, setting.model, setting.trained_on)
        for row in self.tables["tests"]:
            if (row["grid"], row["model"], row["trained_on"]) == key:
                return str(row["against"])
        return (self.spec.get("compare") or {}).get("against")

    def test_of_arm(self, arm: Arm, dataset: str, metric: str) -> Record | None:
        """The paired test of an arm against the reference; None for a recipe at several rates."""
        return None if arm.rate else self.test_of_recipe(arm.setting, arm.share, arm.recipe, dataset, metric)

    def test_of_recipe(self, setting: Setting, share: float, recipe: str, dataset: str, metric: str) -> Record | None:
        """The paired test of a recipe (`frozen` for the base) against the setting's reference."""
        key = (setting.grid, setting.model, setting.trained_on, _rounded(share))
        return self._tests.get((*key, recipe, dataset, metric))

    def tests_of(self, setting: Setting, share: float, dataset: str, metric: str) -> list[Record]:
        """The paired tests of a setting's recipes against its reference, the frozen base first."""
        recipes = [FROZEN, *(arm.recipe for arm in self.arms(setting) if arm.rate is None)]
        tests = [self.test_of_recipe(setting, share, recipe, dataset, metric) for recipe in dict.fromkeys(recipes)]
        return [test for test in tests if test is not None]

    def datasets(self, setting: Setting, role: str) -> list[str]:
        """The data sets on which a setting's runs were evaluated in the given role."""
        keys = {cell["key"] for arm in self.arms(setting) for cell in arm.cells}
        rows = [row for row in self.tables["evaluations"] if row["key"] in keys and row["role"] == role]
        return distinct_values(rows, "dataset")

    def primary_metric(self, dataset: str) -> str:
        """The metric to show if there is room for only one."""
        metrics = self.metrics_of.get(dataset, [])
        ranked = _PRIMARY_REPORT if self.tasks.get(dataset) == "report" else _PRIMARY_VQA
        return next((name for name in ranked if name in metrics), metrics[0] if metrics else ranked[0])

    def table_metrics(self, dataset: str) -> list[str]:
        """The metrics of a data set that tables show; reports with one normalisation only."""
        metrics = self.metrics_of.get(dataset, [])
        if self.tasks.get(dataset) != "report":
            return [name for name in _TABLE_VQA if name in metrics]
        normalisations = list(dict.fromkeys(name.partition("/")[2] for name in metrics if "/" in name)) or [""]
        normalisation = "none" if "none" in normalisations else normalisations[0]
        names = [name for name in metrics if "/" not in name or name.endswith(f"/{normalisation}")]
        return [name for metric in _TABLE_REPORT for name in names if name.partition("/")[0] == metric]


def is_significant(test: Record) -> bool:
    """Whether a paired test is significant after the correction."""
    return test.get("p_holm") is not None and test["p_holm"] < SIGNIFICANT


def is_about_recipes(test: Record) -> bool:
    """Whether a test compares recipes, for new seeds too; else it compares their trained models."""
    return test.get("question") == "recipes"


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 seed`, `96 images`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def metric_name(metric: str) -> str:
    """A metric's name on the page; the normalisation of texts is added unless it is `none`."""
    name, _, normalisation = metric.partition("/")
    label = _METRIC_LABELS.get(name, name.replace("_", " "))
    return f"{label}, {normalisation}" if normalisation and normalisation != "none" else label


def is_fraction(metric: str) -> bool:
    """Whether the metric is between 0 and 1; CIDEr is between 0 and 10."""
    return not metric.startswith("cider")


def distinct_values(rows: Iterable[Record], column: str) -> list[str]:
    """The different values of a column as text, in order of appearance."""
    return list(dict.fromkeys(str(row[column]) for row in rows if row.get(column) not in (None, "")))


def _seed_key(row: Record) -> tuple[Any, ...]:
    """What identifies a row of `seeds` or `tests`, except for the learning rate."""
    run = row["grid"], row["model"], row["trained_on"], _rounded(row.get("share") or 1)
    return (*run, row["recipe"], row["dataset"], row["metric"])


def _rounded(share: float) -> float:
    return round(float(share), 6)


def _index(order: Sequence[str], name: str) -> int:
    """The index of a name, or the length of the list if it is not there."""
    return order.index(name) if name in order else len(order)

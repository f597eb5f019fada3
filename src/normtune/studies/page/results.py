"""The tables of a study's results, as the page asks for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normtune.studies.page.palette import family, parts_of

Record = Mapping[str, Any]
SEARCH = "search"  # the grid of trials of learning rates
TABLES = ("cells", "evaluations", "metrics", "forgetting", "norms", "losses", "seeds", "tests")
FROZEN = "frozen"

_TOLD = {
    "global_exact": "all answers exact",
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
_VQA = ("global_exact",)
_REPORT = ("rouge_l/none", "rouge_l", "bleu_4/none", "bleu_4")
_SHOWN = ("closed_label", "open_exact", "open_recall", "global_exact")
_SHOWN_OF_REPORTS = (
    "bleu_1",
    "bleu_4",
    "rouge_l",
    "meteor_nltk",
    "meteor_exact_stem",
    "cider_d",
    "findings_f1",
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval; of one seed, that run's own."""

    value: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, row: Record) -> Estimate:
        """From a row of `seeds`; an interval that is not there is the value alone."""
        value = float(row["mean"])
        low, high = (value if row.get(end) is None else float(row[end]) for end in ("low", "high"))
        return cls(value, low, high, int(row.get("seeds") or 1))


@dataclass(frozen=True)
class Setting:
    """One table's worth of runs: what differs within it is the recipe, its rate, and the seed."""

    grid: str
    model: str
    trained_on: str

    @property
    def told(self) -> str:
        return f"{self.model} trained on {self.trained_on}"


@dataclass(frozen=True)
class Arm:
    """The runs of one recipe (and rate, where several are compared) of a setting, over seeds."""

    setting: Setting
    share: float
    recipe: str
    rate: str | None  # where one recipe stands with several
    cells: tuple[Record, ...]

    @property
    def name(self) -> str:
        return self.recipe if self.rate is None else f"{self.recipe} @ {self.rate.rpartition(' ')[2]}"

    @property
    def family(self) -> str:
        return family(self._text)

    @property
    def parts(self) -> dict[str, str]:
        return parts_of(self._text)

    @property
    def _text(self) -> str:
        texts = [cell.get("resolved") or cell.get("recipe_text") or "" for cell in self.cells]
        return texts[0] if texts else ""

    def mean(self, column: str) -> float | None:
        """The mean of a column of its cells."""
        values = [float(cell[column]) for cell in self.cells if cell.get(column) is not None]
        return math.fsum(values) / len(values) if values else None


class Results:
    """`results.json` with its rows found by what they are about.

    A table that is missing counts as empty, so that the page of a study that has just begun can be drawn.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.study: str = str(results.get("study") or "study")
        self.about: str = str(results.get("about") or "")
        self.spec: Record = results.get("spec") or {}
        self.tables: dict[str, list[Record]] = {name: list(results.get(name) or ()) for name in TABLES}
        self.cells = self.tables["cells"]
        self.done = {cell["key"]: cell for cell in self.cells if cell.get("status", "done") == "done"}
        self._arms: dict[Setting, list[Arm]] = {}
        self._seeds: dict[tuple[Any, ...], list[Record]] = {}
        for row in self.tables["seeds"]:
            self._seeds.setdefault(_seed_key(row), []).append(row)
        self._tests = {_seed_key(row): row for row in self.tables["tests"]}
        self.tasks = {row["dataset"]: row["task"] for row in self.tables["evaluations"]}
        self.metrics_of: dict[str, list[str]] = {}
        for row in self.tables["metrics"]:
            names = self.metrics_of.setdefault(row["dataset"], [])
            if row["metric"] not in names:
                names.append(row["metric"])

    def settings(self) -> list[Setting]:
        """Grid, model and training data of all trained cells but the search's, in the study's order."""
        found: dict[Setting, None] = {}
        for cell in self.done.values():
            for grid in cell.get("grids") or ():
                if cell.get("trained_on") is not None and grid != SEARCH:
                    found[Setting(grid, cell["model"], cell["trained_on"])] = None
        grids, models, datasets = (
            list(self.spec.get(name) or ()) for name in ("grids", "models", "datasets")
        )
        return sorted(
            found, key=lambda s: (_at(grids, s.grid), _at(models, s.model), _at(datasets, s.trained_on))
        )

    def arms(self, setting: Setting) -> list[Arm]:
        """The setting's recipes in the study's order, larger shares of the data first."""
        if setting not in self._arms:
            self._arms[setting] = self._found_arms(setting)
        return self._arms[setting]

    def _found_arms(self, setting: Setting) -> list[Arm]:
        groups: dict[tuple[float, str], dict[str, list[Record]]] = {}
        for cell in self.done.values():
            inside = setting.grid in (cell.get("grids") or ()) and cell["model"] == setting.model
            if inside and cell.get("trained_on") == setting.trained_on:
                by_rate = groups.setdefault((float(cell.get("share") or 1), cell["recipe"]), {})
                by_rate.setdefault(rate_words(cell), []).append(cell)
        arms = [
            Arm(setting, share, recipe, rate if len(by_rate) > 1 else None, tuple(cells))
            for (share, recipe), by_rate in groups.items()
            for rate, cells in by_rate.items()
        ]
        order = self.recipe_order()
        return sorted(arms, key=lambda arm: (-arm.share, _at(order, arm.recipe)))

    def full_data(self, setting: Setting) -> list[Arm]:
        """The arms of the largest share."""
        arms = self.arms(setting)
        return [arm for arm in arms if arm.share == arms[0].share]

    def is_curve(self, setting: Setting) -> bool:
        """Whether the setting compares shares of the training data."""
        asked = (self.spec.get("grids") or {}).get(
            setting.grid
        ) or {}  # a study half done has not all of them
        return max(len(asked.get("shares") or ()), len({arm.share for arm in self.arms(setting)})) > 1

    def recipe_order(self) -> list[str]:
        """Recipes as they first stand among the cells."""
        return list(dict.fromkeys(cell["recipe"] for cell in self.cells))

    def estimate(self, arm: Arm, dataset: str, metric: str) -> Estimate | None:
        """An arm's mean over seeds on a data set."""
        setting = arm.setting
        rows = self._seeds.get(
            (setting.grid, setting.model, setting.trained_on, _round(arm.share), arm.recipe, dataset, metric),
            [],
        )
        if arm.rate is not None:
            rows = [row for row in rows if row.get("rate") == arm.rate]
        return Estimate.of(rows[0]) if rows else None

    def frozen(self, model: str, dataset: str, metric: str) -> Estimate | None:
        """The frozen base on a data set."""
        for row in self.tables["seeds"]:
            same = (row["model"], row["dataset"], row["metric"]) == (model, dataset, metric)
            if same and row.get("trained_on") is None:
                return Estimate.of(row)
        keys = {key for key, c in self.done.items() if c["model"] == model and c.get("trained_on") is None}
        for row in self.tables["metrics"]:
            if row["key"] in keys and row["dataset"] == dataset and row["metric"] == metric:
                return Estimate(row["value"], row["low"], row["high"], 1)
        return None

    def reference(self, setting: Setting) -> str | None:
        """The recipe that a setting's others are held against: that of its tests, else that of the file."""
        where = (setting.grid, setting.model, setting.trained_on)
        for row in self.tables["tests"]:
            if (row["grid"], row["model"], row["trained_on"]) == where:
                return str(row["against"])
        named: str | None = (self.spec.get("compare") or {}).get("against")
        return named

    def test(self, arm: Arm, dataset: str, metric: str) -> Record | None:
        """The paired test of an arm against its setting's reference; none of a recipe at several rates."""
        return None if arm.rate else self.tested(arm.setting, arm.share, arm.recipe, dataset, metric)

    def tested(self, setting: Setting, share: float, recipe: str, dataset: str, metric: str) -> Record | None:
        """The paired test of a recipe, `frozen` for the base, against the setting's reference."""
        where = (setting.grid, setting.model, setting.trained_on, _round(share))
        return self._tests.get((*where, recipe, dataset, metric))

    def datasets(self, setting: Setting, role: str) -> list[str]:
        """The data sets on which a setting's runs were evaluated in a role."""
        keys = {cell["key"] for arm in self.arms(setting) for cell in arm.cells}
        return list(
            dict.fromkeys(
                row["dataset"]
                for row in self.tables["evaluations"]
                if row["key"] in keys and row["role"] == role
            )
        )

    def primary(self, dataset: str) -> str:
        """The metric that stands for a data set where there is room for one."""
        found = self.metrics_of.get(dataset, [])
        wanted = _REPORT if self.tasks.get(dataset) == "report" else _VQA
        return next((name for name in wanted if name in found), found[0] if found else wanted[0])

    def shown(self, dataset: str) -> list[str]:
        """The metrics of a data set that a paper's table holds."""
        found = self.metrics_of.get(dataset, [])
        if self.tasks.get(dataset) != "report":
            return [name for name in _SHOWN if name in found]
        normalisations = list(dict.fromkeys(name.partition("/")[2] for name in found if "/" in name)) or [""]
        kept = "none" if "none" in normalisations else normalisations[0]
        plain = [name for name in found if "/" not in name or name.endswith(f"/{kept}")]
        return [name for wanted in _SHOWN_OF_REPORTS for name in plain if name.partition("/")[0] == wanted]


def metric_name(metric: str) -> str:
    """A metric as people write it; texts' normalisation is named where there is one."""
    name, _, normalised = metric.partition("/")
    told = _TOLD.get(name, name.replace("_", " "))
    return f"{told}, {normalised}" if normalised and normalised != "none" else told


def is_fraction(metric: str) -> bool:
    """Whether 1 is the metric's most; CIDEr's is 10."""
    return not metric.startswith("cider")


def rate_words(cell: Record) -> str:
    """A cell's learning rates by method: `ln 0.03`, as the table `seeds` has them."""
    return ", ".join(f"{method} {rate:g}" for method, rate in sorted((cell.get("rates") or {}).items()))


def values_of(rows: Iterable[Record], column: str) -> list[Any]:
    """The different values of a column, in order of appearance."""
    return list(dict.fromkeys(str(row[column]) for row in rows if row.get(column) not in (None, "")))


def _seed_key(row: Record) -> tuple[Any, ...]:
    return (
        row["grid"],
        row["model"],
        row["trained_on"],
        _round(row.get("share") or 1),
        row["recipe"],
        row["dataset"],
        row["metric"],
    )


def _round(share: float) -> float:
    return round(float(share), 6)


def _at(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)

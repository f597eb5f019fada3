"""Plans a study: turns its file into cells, one for each training, with all of its evaluations.

Each cell has a key, a hash of everything that decides its result. Results are stored under the key, so a
changed or extended study finds its finished cells again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from normtune.evaluation.config import EvaluateConfig
from normtune.methods.recipe import parse
from normtune.studies.folds import each_fold, fold_options, splits_identity
from normtune.studies.recipe_names import FROZEN, default_rates, recipe_methods
from normtune.studies.spec import SEARCH, Budget, Grid, Study
from normtune.training.config import TrainConfig

# How an evaluated data set relates to the cell: trained on it; trained on another; the base's own task; the
# frozen base, not trained; the validation split of a learning-rate trial.
Role = Literal["in", "out", "home", "zero-shot", "validate"]
# Where a learning rate is from: the method's default, the study's file, or a search.
Source = Literal["default", "given", "search"]

FORMAT = 1  # part of every key: increase it when the same options give another result
_UNSET_PATH = Path(".")  # a placeholder: the run sets the output folder
# Options that are not part of a key, because they decide no result: paths (`splits_identity` is part of it), devices,
_PATH_FIELDS = {"out", "root", "adapter", "cache", "device", "splits"}
# options of how the run is carried out (all memory tiers give exactly the same result),
_MEANS_FIELDS = {"resume", "overwrite", "tracker", "save_every", "memory", "compile", "workers"}
# and options that are in the key already, as the cell's rates and budget.
_LENGTH_FIELDS = {"lr", "epochs", "max_steps", "limit"}
# Fields of a data set that are options of its evaluations.
_EVALUATION_FIELDS = {
    *("limit", "batch", "max_new_tokens", "candidates", "normalisation"),
    *("choice_prompt", "choice_scoring", "choice_rotations"),
}
_LOADING_FIELDS = {"dtype", "quantize", "max_pixels", "device"}  # options of a model that its cells share


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a cell; `config` has neither the adapter nor the output folder yet."""

    dataset: str
    role: Role
    config: EvaluateConfig
    splits: str | None = None  # from `splits_identity`
    planned_folder: str | None = None  # the folder's name, where a run has changed the paths in `config`

    @property
    def folder(self) -> str:
        """The folder's name, unique among the evaluations of the cell."""
        return self.planned_folder or f"{self.dataset}-{_digest(_identity(self.config, self.splits), 8)}"


Rates = dict[str, float]  # the learning rate of each method


@dataclass(frozen=True)
class Cell:
    """One training, or the frozen base (`train` is None), and its evaluations."""

    key: str  # the hash of everything that decides the trained values: 16 hexadecimal digits
    grids: tuple[str, ...]  # the grids that contain the cell; trials of a learning rate belong to the grid `search`
    model: str  # the model's name in the file; `model_path` is its directory or hub name
    model_path: str
    recipe: str  # the recipe's name in the file, or of a preset; `recipe_text` is its text as parsed
    recipe_text: str
    evaluations: tuple[Evaluation, ...]
    # the training; the frozen base has the default of each field
    trained_on: str | None = None  # the data set's name in the file
    share: float = 1.0  # the share of the training images, 0 to 1
    seed: int | None = None
    fold: int | None = None  # the fold that is the test split of `trained_on`, if the data set has folds
    rate_source: Source = "default"  # where the learning rates are from: the methods' defaults, the file, or a search
    rates: Rates = field(default_factory=dict)
    # the length of the training, in one of epochs, pairs and minutes, or the fields of `until: plateau`
    budget: dict[str, Any] | None = None
    train: TrainConfig | None = None  # the options of the training, without output folder and length

    @property
    def passes(self) -> float | None:
        """The passes over its training data, or the most for a plateau; None: its budget is in pairs or minutes."""
        budget = self.budget or {}
        return budget.get("epochs") or budget.get("max_epochs")

    def directory(self, out: Path) -> Path:
        """The folder of the cell's files, in a study's folder."""
        return out / "cells" / self.key

    def __str__(self) -> str:
        if self.train is None:
            return f"{self.model} {self.recipe}"
        rates = sorted(set(self.rates.values()))
        return (
            f"{self.model} {self.recipe} on {self.trained_on}"
            + (f" {100 * self.share:g}%" if self.share < 1 else "")
            + f" seed {self.seed}"
            + (f" fold {self.fold}" if self.fold is not None else "")
            + (f" lr {'/'.join(f'{rate:g}' for rate in rates)}" if self.rate_source != "default" else "")
        )


@dataclass(frozen=True)
class RateSearch:
    """A learning-rate search: one cell for each rate, evaluated on the validation split.

    The grids' cells that use the searched rate are planned when the search has finished.
    """

    cells: tuple[Cell, ...]  # in ascending order of their rates

    @property
    def id(self) -> str:
        """The search's identity: a hash of its cells' keys."""
        return _digest([cell.key for cell in self.cells], 16)


@dataclass(frozen=True)
class Plan:
    """The cells that can be run now, the learning-rate searches, and how many cells wait for a search."""

    cells: tuple[Cell, ...]  # all cells, with the trials of the searches
    searches: tuple[RateSearch, ...]
    waiting: int  # the number of cells that are planned when their search has finished


def plan(study: Study, search_rates: Mapping[str, Rates] | None = None) -> Plan:
    """The cells of a study.

    Args:
        search_rates: the learning rate of each method that a finished search has chosen, by `RateSearch.id`.

    Raises:
        InputError: options contradict each other.
    """
    search_rates = search_rates or {}
    cells: dict[str, Cell] = {}
    searches: dict[str, RateSearch] = {}
    waiting = 0
    for name, grid in study.grids.items():
        for planned in _grid_cells(study, name, grid, search_rates, searches):
            if planned is None:
                waiting += 1
            else:
                _add_cell(cells, planned)
    for search in searches.values():
        for cell in search.cells:
            _add_cell(cells, cell)
    for base_cell in _home_base_cells(study, cells.values()):
        _add_cell(cells, base_cell)
    return Plan(tuple(cells.values()), tuple(searches.values()), waiting)


def _add_cell(cells: dict[str, Cell], cell: Cell) -> None:
    """Add a cell; if there is one with the same key, add its grids and evaluations to that one."""
    if (existing := cells.get(cell.key)) is None:
        cells[cell.key] = cell
        return
    evaluations = {
        (evaluation.folder, evaluation.role): evaluation for evaluation in (*existing.evaluations, *cell.evaluations)
    }
    source = existing.rate_source if existing.grids != (SEARCH,) else cell.rate_source
    cells[cell.key] = replace(
        existing,
        grids=tuple(dict.fromkeys((*existing.grids, *cell.grids))),
        rate_source=source,
        evaluations=tuple(evaluations.values()),
    )


@dataclass(frozen=True)
class _Run:
    """What is trained on what: a model, a recipe and its text, and a data set, by their names in the study's file."""

    study: Study
    model: str
    recipe: str
    text: str
    data: str


def _grid_cells(
    study: Study, name: str, grid: Grid, search_rates: Mapping[str, Rates], searches: dict[str, RateSearch]
) -> Iterator[Cell | None]:
    """The cells of a grid; None for a cell with an unfinished learning-rate search. Adds to `searches`."""
    recipes = study.recipes_of(grid)
    for model, (recipe, text), data in product(grid.models or study.models, recipes.items(), grid.train):
        targets = grid.evaluate or [data]
        if not recipe_methods(parse(text)):
            yield _base_cell(study, model, (name,), dict.fromkeys([*targets, data]))
            continue
        run = _Run(study, model, recipe, text, data)
        for source, rates in _grid_rates(run, grid, search_rates, searches):
            for share, seed, fold in product(grid.shares, grid.seeds, each_fold(study.datasets[data])):
                if rates is None:
                    yield None
                else:
                    yield _training_cell(run, name, share, seed, source, rates, grid.budget, targets, fold)


def _grid_rates(
    run: _Run, grid: Grid, search_rates: Mapping[str, Rates], searches: dict[str, RateSearch]
) -> Iterator[tuple[Source, Rates | None]]:
    """The learning rates of a recipe by method, with their source; None if the search is unfinished.

    The recipe is trained once with each. A search that the grid needs is added to `searches`.
    """
    defaults = default_rates(run.text)
    if isinstance(grid.learning_rates, list):
        yield from (("given", dict.fromkeys(defaults, rate)) for rate in grid.learning_rates)
    elif grid.learning_rates == "default":
        yield "default", defaults
    else:
        options = run.study.search
        # Methods that are mixed get the same rate, near the lowest of their defaults, as with --lr.
        method = min(defaults, key=lambda name: defaults[name])
        values = sorted(options.rates.get(method) or _neighbouring_rates(defaults[method]))
        budget = grid.search_budget or options.budget or grid.budget
        trials = [dict.fromkeys(defaults, value) for value in values]
        cells = [_training_cell(run, SEARCH, 100.0, options.seed, "given", trial, budget, None) for trial in trials]
        search = RateSearch(tuple(cells))
        searches[search.id] = search
        yield "search", search_rates.get(search.id)


def _neighbouring_rates(rate: float) -> list[float]:
    """The rate and its neighbours among 1, 3, 10, 30, ...: the rates that a search tries by default."""
    first = f"{rate:e}"[0] in "12"
    steps = (0.3, 1.0, 3.0) if first else (1 / 3, 1.0, 10 / 3)
    return [float(f"{step * rate:.0e}") for step in steps]


def _training_cell(
    run: _Run,
    grid: str,
    share: float,
    seed: int,
    source: Source,
    rates: dict[str, float],
    budget: Budget,
    targets: Sequence[str] | None,
    fold: int | None = None,
) -> Cell:
    """A cell that trains; without `targets` it is evaluated on the validation split of its training data."""
    study, model, data = run.study, run.model, run.data
    base, options = study.model(model), study.datasets[data]
    train_options = study.train.model_dump(exclude_none=True)
    if base.train is not None:
        # a model's own options take precedence over the study's
        train_options |= base.train.model_dump(exclude_none=True)
    train = TrainConfig.checked(
        model=base.path,
        out=_UNSET_PATH,
        tune=run.text,
        split=options.train_split,
        choice_prompt=options.choice_prompt,
        share=share / 100 if share < 100 else None,
        seed=seed,
        **base.model_dump(include=_LOADING_FIELDS),
        **fold_options(options, fold),
        **budget.train_options(options.validate_split),
        **train_options,
    )
    length = budget.model_dump(exclude_none=True)
    identity = {"format": FORMAT, "train": _identity(train, splits_identity(options)), "rates": rates, "budget": length}
    if targets is None:
        evaluations = [_evaluation(study, model, data, "validate")]
    else:
        home = [base.home] if base.home and base.home not in targets else []
        evaluations = [
            _evaluation(study, model, target, "in" if target == data else "home" if target == base.home else "out", k)
            for target in (*targets, *home)
            for k in ([fold] if target == data else each_fold(study.datasets[target]))
        ]
    return Cell(
        key=_digest(identity, 16),
        grids=(grid,),
        model=model,
        model_path=base.path,
        recipe=run.recipe,
        recipe_text=run.text,
        evaluations=tuple(evaluations),
        trained_on=data,
        share=share / 100,
        seed=seed,
        fold=fold,
        rate_source=source,
        rates=rates,
        budget=length,
        train=train,
    )


def _base_cell(study: Study, model: str, grids: tuple[str, ...], targets: Sequence[str] | dict[str, None]) -> Cell:
    """The frozen base, evaluated on the test splits of `targets` and of its own task."""
    base = study.model(model)
    identity = {"format": FORMAT, "base": base.path, "dtype": base.dtype, "quantize": base.quantize}
    if base.max_pixels is not None:
        identity["max_pixels"] = base.max_pixels
    evaluations = [
        _evaluation(study, model, target, "home" if target == base.home else "zero-shot", fold)
        for target in dict.fromkeys((*targets, *([base.home] if base.home else [])))
        for fold in each_fold(study.datasets[target])
    ]
    return Cell(
        key=_digest(identity, 16),
        grids=grids,
        model=model,
        model_path=base.path,
        recipe=FROZEN,
        recipe_text=str(parse(FROZEN)),
        evaluations=tuple(evaluations),
    )


def _home_base_cells(study: Study, cells: Any) -> Iterator[Cell]:
    """The frozen base of each model with a `home`, evaluated on every test set of the model's cells."""
    for model in study.models:
        if study.model(model).home is None:
            continue
        model_cells = [cell for cell in cells if cell.model == model]
        targets = dict.fromkeys(
            evaluation.dataset
            for cell in model_cells
            for evaluation in cell.evaluations
            if evaluation.role != "validate"
        )
        grids = dict.fromkeys(name for cell in model_cells for name in cell.grids if name != SEARCH)
        if model_cells:
            yield _base_cell(study, model, tuple(grids), targets)


def _evaluation(study: Study, model: str, data: str, role: Role, fold: int | None = None) -> Evaluation:
    """The evaluation of a model on a data set's test split, or for `validate` its validation split."""
    base, options = study.model(model), study.datasets[data]
    config = EvaluateConfig.checked(
        model=base.path,
        out=_UNSET_PATH,
        split=options.validate_split if role == "validate" else options.test_split,
        **options.model_dump(include=_EVALUATION_FIELDS),
        **base.model_dump(include={"beams", *_LOADING_FIELDS}),
        **fold_options(options, fold),
    )
    return Evaluation(data, role, config, splits_identity(options))


def single_cell(name: str, train: Mapping[str, Any] | None, *evaluations: Mapping[str, Any]) -> Cell:
    """A cell that no study's file describes: one of the demo or of a benchmark.

    Args:
        name: the cell's name, unique among its neighbours; it is the recipe that progress bars show.
        train: options of `TrainConfig` without `out`; None for the base as it is.
        evaluations: options of `EvaluateConfig` without `out` and `adapter`; each is evaluated after the training.
    """
    config = None if train is None else TrainConfig.checked(out=_UNSET_PATH, **train)
    configs = [EvaluateConfig.checked(out=_UNSET_PATH, **options) for options in evaluations]
    role: Role = "zero-shot" if config is None else "in"
    made = tuple(Evaluation(c.data.partition(":")[0], role, c, splits_identity(c)) for c in configs)
    identity: dict[str, Any] = {"format": FORMAT, "name": name}
    rates: dict[str, float] = {}
    if config is not None:
        rates = {method: config.lr or rate for method, rate in default_rates(config.tune).items()}
        length = config.model_dump(mode="json", include=_LENGTH_FIELDS)
        identity |= {"train": _identity(config, splits_identity(config)), **length}
    return Cell(
        key=f"{quote(name, safe='@+')}-{_digest(identity, 8)}",
        grids=(),
        model=configs[0].model,
        model_path=configs[0].model,
        recipe=name,
        recipe_text=str(parse(config.tune if config else FROZEN)),
        trained_on=config.data.partition(":")[0] if config else None,
        seed=config.seed if config else None,
        rate_source="given" if config and config.lr else "default",
        rates=rates,
        budget={"epochs": config.epochs} if config else None,
        train=config,
        evaluations=made,
    )


def _identity(config: TrainConfig | EvaluateConfig, splits: str | None) -> dict[str, Any]:
    """The options that decide a result, for the cell's key.

    Options that are off are left out, so that a later version may add an option without changing any key.
    """
    values = config.model_dump(mode="json", exclude=_PATH_FIELDS | _MEANS_FIELDS | _LENGTH_FIELDS)
    if isinstance(config, EvaluateConfig):
        values["limit"] = config.limit
    values["splits"] = splits
    return {name: value for name, value in values.items() if value is not None and value is not False}


def _digest(value: Any, length: int) -> str:
    """The first `length` hexadecimal digits of the SHA-256 of a value as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]

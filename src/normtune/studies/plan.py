"""A study's file -> its cells: each training once, with a key and all evaluations that grids ask of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from normtune.data.records import Dataset
from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.methods.recipe import parse
from normtune.studies.recipe_names import FROZEN, default_rates, methods
from normtune.studies.spec import SEARCH, Budget, Data, Grid, Study
from normtune.training.config import TrainConfig

Role = Literal["in", "out", "home", "zero-shot", "validate"]
Source = Literal["default", "given", "search"]

FORMAT = 1  # of keys: raise it where the same options come to mean something else
_NOWHERE = Path(".")  # stands for folders that the run decides
_PLACES = {"out", "root", "adapter", "cache", "device"}  # where things are decides no result
_NO_RESULT = {
    "resume",
    "tracker",
    "save_every",
    "memory",
    "compile",
}  # nor how a run is made; tiers are exact
_IN_BUDGET = {"lr", "epochs", "max_steps", "limit"}  # told by the cell's rates and budget


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a cell; `config` lacks the adapter and the folder."""

    dataset: str
    role: Role
    config: EvaluateConfig

    @property
    def folder(self) -> str:
        """A name that tells it from any other evaluation of the cell."""
        return f"{self.dataset}-{_digest(_identity(self.config), 8)}"


@dataclass(frozen=True)
class Cell:
    """One training, or the frozen base (`train` is None), and its evaluations.

    Attributes:
        key: the hash of all that decides its trained values: 16 hexadecimal digits.
        grids: those that ask for it; trials of a learning rate stand under `search`.
        recipe: its name in the file, or of a preset; `recipe_text` is it as parsed.
        trained_on: the data set's name in the file.
        share: of the training images, 0 to 1.
        rates: method -> learning rate.
        train: the run without its folder and length; `budget` is its length.
    """

    key: str
    grids: tuple[str, ...]
    model: str
    model_path: str
    recipe: str
    recipe_text: str
    trained_on: str | None
    share: float
    seed: int | None
    rate_source: Source
    rates: dict[str, float]
    budget: dict[str, float] | None
    train: TrainConfig | None
    evaluations: tuple[Evaluation, ...]

    def __str__(self) -> str:
        if self.train is None:
            return f"{self.model} {self.recipe}"
        rates = sorted(set(self.rates.values()))
        return (
            f"{self.model} {self.recipe} on {self.trained_on}"
            + (f" {100 * self.share:g}%" if self.share < 1 else "")
            + f" seed {self.seed}"
            + (f" lr {'/'.join(f'{rate:g}' for rate in rates)}" if self.rate_source != "default" else "")
        )


@dataclass(frozen=True)
class RateSearch:
    """A search that some cells wait for: its cells, one a rate, are evaluated on the validation split."""

    model: str
    recipe: str
    trained_on: str
    budget: tuple[tuple[str, float], ...]
    cells: tuple[Cell, ...]  # in order of the rates, which rise

    @property
    def id(self) -> str:
        return _digest([cell.key for cell in self.cells], 16)


@dataclass(frozen=True)
class Plan:
    """What can be run now (`cells`, trials among them), the searches, and how many cells wait for one."""

    cells: tuple[Cell, ...]
    trials: tuple[RateSearch, ...]
    waiting: int


def plan(study: Study, found: Mapping[str, float] | None = None) -> Plan:
    """The cells of a study; `found` are the rates that searches came to, by `Trial.id`.

    Raises:
        InputError: options that do not go together.
    """
    found = found or {}
    cells: dict[str, Cell] = {}
    trials: dict[str, RateSearch] = {}
    waiting = 0
    for name, grid in study.grids.items():
        for made in _cells_of(study, name, grid, found, trials):
            if made is None:
                waiting += 1
            else:
                _merge(cells, made)
    for trial in trials.values():
        for cell in trial.cells:
            _merge(cells, cell)
    for frozen in _frozen(study, cells.values()):
        _merge(cells, frozen)
    return Plan(tuple(cells.values()), tuple(trials.values()), waiting)


def _merge(cells: dict[str, Cell], cell: Cell) -> None:
    """Add a cell, or its grids and evaluations to the one of the same key."""
    if (held := cells.get(cell.key)) is None:
        cells[cell.key] = cell
        return
    evaluations = {(one.folder, one.role): one for one in (*held.evaluations, *cell.evaluations)}
    source = held.rate_source if held.grids != (SEARCH,) else cell.rate_source
    cells[cell.key] = replace(
        held,
        grids=tuple(dict.fromkeys((*held.grids, *cell.grids))),
        rate_source=source,
        evaluations=tuple(evaluations.values()),
    )


def _cells_of(
    study: Study, name: str, grid: Grid, found: Mapping[str, float], trials: dict[str, RateSearch]
) -> Iterator[Cell | None]:
    """The cells of a grid; None for one whose learning rate is still looked for."""
    recipes = study.recipes_of(grid)
    for model, (recipe, text), data in product(grid.models or study.models, recipes.items(), grid.train):
        targets = grid.evaluate or [data]
        if not methods(parse(text)):
            yield _base_cell(study, model, (name,), dict.fromkeys([*targets, data]))
            continue
        for source, rates in _rates(study, grid, model, recipe, text, data, found, trials):
            for share, seed in product(grid.shares, grid.seeds):
                yield (
                    None
                    if rates is None
                    else _cell(
                        study,
                        (name,),
                        model,
                        recipe,
                        text,
                        data,
                        share,
                        seed,
                        source,
                        rates,
                        grid.budget,
                        targets,
                    )
                )


def _rates(
    study: Study,
    grid: Grid,
    model: str,
    recipe: str,
    text: str,
    data: str,
    found: Mapping[str, float],
    trials: dict[str, RateSearch],
) -> Iterator[tuple[Source, dict[str, float] | None]]:
    """The learning rates of a grid for one recipe, by method; None where a search has not ended."""
    defaults = default_rates(text)
    if isinstance(grid.learning_rates, list):
        yield from (("given", dict.fromkeys(defaults, rate)) for rate in grid.learning_rates)
    elif grid.learning_rates == "default" or len(defaults) > 1:
        yield "default", defaults
    else:
        (method,) = defaults
        tried = sorted(study.search.rates.get(method) or _around(defaults[method]))
        budget = study.search.budget or grid.budget
        trial = RateSearch(
            model,
            recipe,
            data,
            tuple(_given(budget).items()),
            tuple(
                _cell(
                    study,
                    (SEARCH,),
                    model,
                    recipe,
                    text,
                    data,
                    100.0,
                    study.search.seed,
                    "given",
                    {method: rate},
                    budget,
                    None,
                )
                for rate in tried
            ),
        )
        trials[trial.id] = trial
        yield "search", {method: found[trial.id]} if trial.id in found else None


def _around(rate: float) -> list[float]:
    """The rate and its neighbours among 1, 3, 10, 30, ...: what a search tries by default."""
    first = f"{rate:e}"[0] in "12"
    steps = (0.3, 1.0, 3.0) if first else (1 / 3, 1.0, 10 / 3)
    return [float(f"{step * rate:.0e}") for step in steps]


def _cell(
    study: Study,
    grids: tuple[str, ...],
    model: str,
    recipe: str,
    text: str,
    data: str,
    share: float,
    seed: int,
    source: Source,
    rates: dict[str, float],
    budget: Budget,
    targets: Sequence[str] | None,
) -> Cell:
    """A cell that trains; without `targets` it is evaluated on the validation split of its own data."""
    base, options = study.model(model), study.datasets[data]
    given = study.train.model_dump(exclude_none=True)
    if base.train is not None:
        given |= base.train.model_dump(exclude_none=True)
    train = TrainConfig.checked(
        model=base.path,
        out=_NOWHERE,
        tune=text,
        split=options.train_split,
        share=share / 100 if share < 100 else None,
        seed=seed,
        dtype=base.dtype,
        quantize=base.quantize,
        device=base.device,
        **_data_options(options),
        **given,
    )
    length = _given(budget)
    identity = {"format": FORMAT, "train": _identity(train), "rates": rates, "budget": length}
    if targets is None:
        evaluations = [_evaluation(study, model, data, "validate")]
    else:
        home = [base.home] if base.home and base.home not in targets else []
        evaluations = [
            _evaluation(study, model, one, "in" if one == data else "home" if one == base.home else "out")
            for one in (*targets, *home)
        ]
    return Cell(
        _digest(identity, 16), grids, model, base.path, recipe, text, data, share / 100, seed, source, rates,
        length, train, tuple(evaluations),
    )  # fmt: skip


def _base_cell(
    study: Study, model: str, grids: tuple[str, ...], targets: Sequence[str] | dict[str, None]
) -> Cell:
    """The frozen base, evaluated on the test splits of `targets` and of its own task."""
    base = study.model(model)
    identity = {"format": FORMAT, "base": base.path, "dtype": base.dtype, "quantize": base.quantize}
    evaluations = [
        _evaluation(study, model, one, "home" if one == base.home else "zero-shot")
        for one in dict.fromkeys((*targets, *([base.home] if base.home else [])))
    ]
    return Cell(
        _digest(identity, 16), grids, model, base.path, FROZEN, str(parse(FROZEN)), None, 1.0, None,
        "default", {}, None, None, tuple(evaluations),
    )  # fmt: skip


def _frozen(study: Study, cells: Any) -> Iterator[Cell]:
    """The frozen base of each model that has a task of its own, on all that its cells are tested on."""
    for model in study.models:
        if study.model(model).home is None:
            continue
        own = [cell for cell in cells if cell.model == model]
        targets = dict.fromkeys(
            one.dataset for cell in own for one in cell.evaluations if one.role != "validate"
        )
        grids = dict.fromkeys(name for cell in own for name in cell.grids if name != SEARCH)
        if own:
            yield _base_cell(study, model, tuple(grids), targets)


def _evaluation(study: Study, model: str, data: str, role: Role) -> Evaluation:
    base, options = study.model(model), study.datasets[data]
    config = EvaluateConfig.checked(
        model=base.path,
        out=_NOWHERE,
        split=options.validate_split if role == "validate" else options.test_split,
        limit=options.limit,
        batch=options.batch,
        beams=base.beams,
        max_new_tokens=options.max_new_tokens,
        candidates=options.candidates,
        normalisation=options.normalisation,
        dtype=base.dtype,
        quantize=base.quantize,
        device=base.device,
        **_data_options(options),
    )
    return Evaluation(data, role, config)


def _data_options(options: Data) -> dict[str, Any]:
    return options.model_dump(
        include={"data", "root", "language", "image_disjoint", "task", "sections", "text_only"}
    )


def _given(budget: Budget) -> dict[str, float]:
    return budget.model_dump(exclude_none=True)


def _identity(config: TrainConfig | EvaluateConfig) -> dict[str, Any]:
    """What of a config decides a result. What is off is left out: an option to come then changes no key."""
    values = config.model_dump(mode="json", exclude=_PLACES | _NO_RESULT | _IN_BUDGET)
    if isinstance(config, EvaluateConfig):
        values["limit"] = config.limit
    return {name: value for name, value in values.items() if value is not None and value is not False}


def _digest(value: Any, length: int) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass
class Sizes:
    """How many pairs the data sets hold, each opened once; None where one cannot be opened here."""

    study: Study

    def __post_init__(self) -> None:
        self._opened: dict[str, Dataset | None] = {}

    def training(self, cell: Cell) -> int | None:
        """The pairs that a cell will have seen: exact but for the last step; 0 of the frozen base."""
        if cell.train is None or cell.budget is None:
            return 0
        if "pairs" in cell.budget:
            return int(cell.budget["pairs"])
        assert cell.trained_on is not None
        dataset = self._open(cell.trained_on)
        if dataset is None or "epochs" not in cell.budget:
            return None
        return round(cell.budget["epochs"] * len(cell.train.select(dataset.split(cell.train.split))))

    def answering(self, cell: Cell) -> int | None:
        """The pairs that a cell answers."""
        total = 0
        for one in cell.evaluations:
            if (dataset := self._open(one.dataset)) is None:
                return None
            total += len(dataset.split(one.config.split)[: one.config.limit])
        return total

    def _open(self, name: str) -> Dataset | None:
        if name not in self._opened:
            try:
                self._opened[name] = open_configured(self.study.datasets[name])
            except InputError:
                self._opened[name] = None
        return self._opened[name]

"""The study's YAML file as pydantic models; errors name the line and the field.

Every class below is a section of the file, and its fields are the fields of the section. docs/study.md has an
example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from normtune.data.choices import ChoicePrompt, ChoiceTarget
from normtune.data.options import DataOptions
from normtune.errors import InputError, did_you_mean
from normtune.methods.registry import LEARNING_RATES
from normtune.runtime.yaml_file import FieldError, FieldPath, field_errors, read_yaml
from normtune.studies.recipe_names import expand_recipes
from normtune.training.config import Interval

SEARCH = "search"  # the name of the grid that learning-rate trials belong to

T = TypeVar("T")


def _as_list(value: Any) -> Any:
    """Turn a single value into a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def _distinct(values: list[T]) -> list[T]:
    """Check that no value is repeated."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"'{value}' appears twice")
    return values


def _names_as_mapping(value: Any) -> Any:
    """Turn a list of names into a mapping from each name to None."""
    return dict.fromkeys(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _plain_name(name: str) -> str:
    """Check that a name can be part of a file name."""
    if not name or name.startswith(".") or any(not (c.isalnum() or c in "._+-") for c in name):
        raise ValueError("a name may have only letters, digits and . _ + -")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
OneOrMore = Annotated[list[T], BeforeValidator(_as_list), AfterValidator(_distinct), Field(min_length=1)]
Rate = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    """A section of the file; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Model(_Section):
    """A base model and how it is loaded."""

    path: str = Field("", description="A local directory, a hub name, or 'nano'; by default its name.")
    home: str | None = Field(None, description="The data set of the base's own task, to measure forgetting.")
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["int8", "nf4"] | None = None
    max_pixels: int | None = Field(None, gt=0, description="Most pixels of an image that the model reads.")
    device: str | None = None
    beams: int = Field(1, gt=0)
    train: Training | None = Field(None, description="Options of training for this model only.")


class Data(DataOptions):
    """A data set: which examples it has, and how its questions are answered and scored."""

    train_split: str = "train"
    validate_split: str = "validate"
    test_split: str = "test"
    limit: int | None = Field(None, gt=0, description="Evaluate only this many pairs, the first ones.")
    batch: int = Field(128, gt=0, description="Questions answered at once.")
    max_new_tokens: int | None = Field(None, gt=0)
    candidates: str | None = None
    choice_prompt: ChoicePrompt | None = Field(None, description="Wording of questions with options, in training too.")
    choice_scoring: str | None = Field(None, description="How options are selected, as in normtune evaluate.")
    choice_rotations: bool = False
    normalisation: Literal["vqa", "unicode", "none"] = "vqa"
    folds: int | None = Field(None, ge=3, description="Cross-validate: every fold in turn is the test split.")

    @model_validator(mode="after")
    def _has_one_way_to_split(self) -> Data:
        others = {"image_disjoint", "split_ratio", "split_column", "splits", "fold"}
        if self.folds and (given := self.model_fields_set & others):
            raise ValueError(f"folds makes new splits: remove {', '.join(sorted(given))}")
        return self


class Training(_Section):
    """Options of `normtune train`; an option that is not set has the default of that command."""

    batch: int | None = Field(None, gt=0)
    accumulate: int | None = Field(None, gt=0)
    group: bool | None = None
    cap: int | None = Field(None, gt=0)
    balance: Literal["pairs", "tokens"] | None = None
    sample: Literal["balanced"] | None = None
    memory: Literal["fast", "balanced", "tight"] | None = None
    weight_decay: float | None = Field(None, ge=0)
    warmup: float | None = Field(None, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] | None = None
    label_smoothing: float | None = Field(None, ge=0, lt=1)
    max_grad_norm: float | None = Field(None, gt=0)
    choice_target: ChoiceTarget | None = None


class Budget(_Section):
    """The length of a training: passes over the data, pairs trained on, minutes, or until its score rises no more.

    `until: plateau` trains until the score on the validation split has not risen in `patience` validations, for at
    most `max_epochs` passes. The other fields belong to it, and have defaults if it is set.
    """

    epochs: float | None = Field(None, gt=0)
    pairs: int | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0)
    until: Literal["plateau"] | None = None
    max_epochs: float | None = Field(None, gt=0, description="Most passes over the data; default: 20.")
    patience: int | None = Field(None, gt=0, description="Validations without a better score; default: 5.")
    validate_every: Interval = Field(None, description="Steps between validations, or epoch; default: epoch.")
    validation_limit: int | None = Field(None, gt=0, description="Pairs to validate on; default: 200.")
    metric: str | None = Field(None, description="loss or a score; default: global_exact, or rouge_l for reports.")

    @model_validator(mode="after")
    def _has_one_unit(self) -> Budget:
        units = [name for name in ("epochs", "pairs", "minutes", "until") if getattr(self, name) is not None]
        if len(units) != 1:
            raise ValueError(f"give one of epochs, pairs, minutes and until (got {', '.join(units) or 'none'})")
        if self.until is None and (others := self.model_fields_set - set(units)):
            raise ValueError(f"{', '.join(sorted(others))}: these need until: plateau")
        if self.until is not None:
            self.max_epochs = self.max_epochs or 20
            self.patience = self.patience or 5
            self.validate_every = self.validate_every or "epoch"
            self.validation_limit = self.validation_limit or 200
        return self

    def train_options(self, validation_split: str) -> dict[str, Any]:
        """The options of `normtune train` that validate and stop a training; none for a fixed length."""
        if self.until is None:
            return {}
        options = self.model_dump(include={"patience", "validate_every", "validation_limit"})
        return options | {"metric_for_best": self.metric, "validation_split": validation_split}


class Search(_Section):
    """How a learning rate is searched: with one seed, by the score on the validation split."""

    rates: dict[str, OneOrMore[Rate]] = Field({}, description="The rates to try for each method.")
    seed: int = 0
    budget: Budget | None = Field(None, description="The length of a trial; by default the grid's budget.")
    metric: str | None = Field(
        None, description="Higher must be better; by default global_exact, or rouge_l for reports."
    )
    choose: Literal["within-error", "best"] = Field(
        "within-error", description="The lowest rate within one standard error of the best trial, or that of the best."
    )


class Grid(_Section):
    """Trains every combination of the listed models, recipes, data sets, shares, seeds and learning rates."""

    models: OneOrMore[str] | None = Field(None, description="By default all models.")
    recipes: OneOrMore[str]
    train: OneOrMore[str]
    evaluate: OneOrMore[str] | None = Field(None, description="By default the data set trained on.")
    seeds: OneOrMore[int] = [0]
    shares: OneOrMore[Annotated[float, Field(gt=0, le=100)]] = Field([100.0], description="% of the images.")
    learning_rates: Literal["default", "search"] | OneOrMore[Rate] = "default"
    budget: Budget = Budget(epochs=10)
    search_budget: Budget | None = Field(None, description="The length of a trial, if not that of the search.")


class Compare(_Section):
    """Options of the tests in the tables."""

    against: str | None = Field(None, description="The recipe that the others are compared with.")
    metrics: OneOrMore[str] | None = None
    margin: float | None = Field(
        None, gt=0, description="The largest difference that does not matter, in points: adds tests of equivalence."
    )


class Study(_Section):
    """A study's file."""

    study: Name
    about: str = ""
    models: Annotated[dict[Name, Model | None], BeforeValidator(_names_as_mapping), Field(min_length=1)]
    datasets: Annotated[dict[Name, Data], Field(min_length=1)]
    recipes: dict[Name, str] = {}
    train: Training = Training()
    search: Search = Search()
    grids: Annotated[dict[Name, Grid], Field(min_length=1)]
    compare: Compare = Compare()

    def model(self, name: str) -> Model:
        """The options of a model; its path is set to its name if the file has none."""
        model = self.models[name] or Model()
        return model.model_copy(update={"path": model.path or name})

    def recipes_of(self, grid: Grid) -> dict[str, str]:
        """The recipes of a grid, wildcards expanded: name -> recipe text."""
        return expand_recipes(grid.recipes, self.recipes)


def read_study(path: Path | str, roots: Sequence[str] = ()) -> Study:
    """Read and check a study's file.

    Args:
        roots: NAME=DIR for each data set that is in another folder than the file says.

    Raises:
        InputError: the file is not valid; one line has all errors, each with its line in the file and its
            field.
    """
    file = read_yaml(Path(path), "study", "study, models, datasets and grids")
    try:
        study = Study.model_validate(file.values)
        errors = list(_cross_field_errors(study))
    except ValidationError as error:
        errors = field_errors(error, _known_fields)
    if errors:
        raise file.input_error(errors)
    return _with_roots(study, roots)


_NAMED_SECTIONS: dict[str, type[BaseModel]] = {"models": Model, "datasets": Data, "grids": Grid}
_SECTIONS: dict[str, type[BaseModel]] = {
    "train": Training,
    "search": Search,
    "compare": Compare,
    "budget": Budget,
    "search_budget": Budget,
}


def _known_fields(path: FieldPath) -> list[str]:
    """The fields that the file may have in the section at `path`."""
    section: type[BaseModel] = Study
    if path and path[0] in _NAMED_SECTIONS:
        section = _NAMED_SECTIONS[str(path[0])]
        path = path[2:]
    for part in path:
        section = _SECTIONS.get(str(part), section)
    return list(section.model_fields)


def _cross_field_errors(study: Study) -> Iterator[FieldError]:
    """Errors between fields: undefined names, recipes that are not valid, budgets with two units."""

    def unknown(path: FieldPath, name: str, known: Sequence[str], kind: str) -> Iterator[FieldError]:
        if name not in known:
            yield path, f"no {kind} '{name}'{did_you_mean(name, known)} ({kind}s: {', '.join(known)})"

    models, datasets = list(study.models), list(study.datasets)
    for name in models:
        if home := study.model(name).home:
            yield from unknown(("models", name, "home"), home, datasets, "data set")
            if home in study.datasets and study.datasets[home].folds:
                yield ("models", name, "home"), "forgetting is measured on one test split: use a data set without folds"
    for name, text in study.recipes.items():
        yield from _recipe_errors(("recipes", name), [text], {})
    if SEARCH in study.grids:
        yield ("grids", SEARCH), "this name is reserved for learning-rate trials: use another"
    for method in study.search.rates:
        yield from unknown(("search", "rates", method), method, list(LEARNING_RATES), "method")
    all_recipes: set[str] = set()
    for name, grid in study.grids.items():
        grid_path: FieldPath = ("grids", name)
        if grid.learning_rates == "search" and any(study.datasets[n].folds for n in grid.train if n in datasets):
            text = "a search would see rows that other folds test on: give rates, or use a data set without folds"
            yield (*grid_path, "learning_rates"), text
        for field, known, kind in (
            ("models", models, "model"),
            ("train", datasets, "data set"),
            ("evaluate", datasets, "data set"),
        ):
            for index, value in enumerate(getattr(grid, field) or ()):
                yield from unknown((*grid_path, field, index), value, known, kind)
        recipe_errors = [
            error
            for index, recipe in enumerate(grid.recipes)
            for error in _recipe_errors((*grid_path, "recipes", index), [recipe], study.recipes)
        ]
        # each recipe alone is valid, but two of them may be the same
        recipe_errors = recipe_errors or [*_recipe_errors((*grid_path, "recipes"), grid.recipes, study.recipes)]
        yield from recipe_errors
        if not recipe_errors:
            all_recipes.update(study.recipes_of(grid))
    if study.compare.against is not None and all_recipes:
        yield from unknown(("compare", "against"), study.compare.against, sorted(all_recipes), "recipe")


def _recipe_errors(path: FieldPath, names: Sequence[str], study_recipes: Mapping[str, str]) -> Iterator[FieldError]:
    """The error of a list of recipes, if there is one."""
    try:
        expand_recipes(names, study_recipes)
    except InputError as error:
        yield path, str(error)


def _with_roots(study: Study, roots: Sequence[str]) -> Study:
    """The study with the data folders of the command line."""
    datasets = dict(study.datasets)
    for option in roots:
        name, equals, root = option.partition("=")
        if not equals or not root:
            raise InputError(f"--root {option}: write NAME=DIR, such as slake=data/slake.")
        if name not in datasets:
            raise InputError(
                f"--root {option}: the study has no data set '{name}'{did_you_mean(name, datasets) or '.'} "
                f"It has {', '.join(datasets)}."
            )
        datasets[name] = datasets[name].model_copy(update={"root": Path(root)})
    return study.model_copy(update={"datasets": datasets})

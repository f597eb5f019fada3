"""The file of a study, checked when it is read; faults name the field and the line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from normtune.data.options import DataOptions
from normtune.errors import InputError, did_you_mean
from normtune.methods.registry import LEARNING_RATES
from normtune.studies.recipe_names import expanded

SEARCH = "search"  # the grid that trials of learning rates stand under

Where = tuple[str | int, ...]  # the way to a field from the top of the file
T = TypeVar("T")


def _several(value: Any) -> Any:
    """One value stands for a list of it."""
    return value if isinstance(value, list | tuple) else [value]


def _distinct(values: list[T]) -> list[T]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"'{value}' is given twice")
    return values


def _named(value: Any) -> Any:
    """A list of names stands for a mapping of each to itself."""
    return (
        dict.fromkeys(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
    )


def _plain_name(name: str) -> str:
    if not name or name.startswith(".") or any(not (c.isalnum() or c in "._+-") for c in name):
        raise ValueError("a name holds letters, digits, and . _ + - only")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
Several = Annotated[list[T], BeforeValidator(_several), AfterValidator(_distinct), Field(min_length=1)]
Rate = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Model(_Part):
    """A base, and how it is held."""

    path: str = Field("", description="A local directory, a hub name, or 'nano'; by default the name itself.")
    home: str | None = Field(
        None, description="The data set of its own task, on which forgetting is measured."
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["int8", "nf4"] | None = None
    device: str | None = None
    beams: int = Field(1, gt=0)
    train: Training | None = Field(None, description="Options of training for this model alone.")


class Data(DataOptions):
    """A data set: which examples, and how its answers are made and scored."""

    train_split: str = "train"
    validate_split: str = "validate"
    test_split: str = "test"
    limit: int | None = Field(None, gt=0, description="Evaluate the first so many pairs only.")
    batch: int = Field(128, gt=0, description="Questions answered at once.")
    max_new_tokens: int | None = Field(None, gt=0)
    candidates: str | None = None
    normalisation: Literal["vqa", "none"] = "vqa"


class Training(_Part):
    """Options of `normtune train`; what is not given has its default there."""

    batch: int | None = Field(None, gt=0)
    accumulate: int | None = Field(None, gt=0)
    group: bool | None = None
    cap: int | None = Field(None, gt=0)
    balance: Literal["pairs", "tokens"] | None = None
    memory: Literal["fast", "balanced", "tight"] | None = None
    weight_decay: float | None = Field(None, ge=0)
    warmup: float | None = Field(None, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] | None = None
    label_smoothing: float | None = Field(None, ge=0, lt=1)
    max_grad_norm: float | None = Field(None, gt=0)


class Budget(_Part):
    """How long a run trains: passes over its data, pairs seen, or minutes. One of them."""

    epochs: float | None = Field(None, gt=0)
    pairs: int | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0)


class Search(_Part):
    """How a learning rate is looked for: on the validation split, with one seed."""

    rates: dict[str, Several[Rate]] = Field({}, description="Method to the rates to try.")
    seed: int = 0
    budget: Budget | None = Field(None, description="Of a trial; by default that of the grid.")
    metric: str | None = Field(
        None, description="The higher the better; global_exact, or rouge_l of reports."
    )


class Grid(_Part):
    """Every model x recipe x data x share x seed x rate of what is listed."""

    models: Several[str] | None = Field(None, description="By default all.")
    recipes: Several[str]
    train: Several[str]
    evaluate: Several[str] | None = Field(None, description="By default what a run was trained on.")
    seeds: Several[int] = [0]
    shares: Several[Annotated[float, Field(gt=0, le=100)]] = Field([100.0], description="% of the images.")
    learning_rates: Literal["default", "search"] | Several[Rate] = "default"
    budget: Budget = Budget(epochs=10)


class Compare(_Part):
    """The paired tests of the tables."""

    against: str | None = Field(None, description="The recipe that the others are held against.")
    metrics: Several[str] | None = None


class Study(_Part):
    """A study as its file gives it."""

    study: Name
    about: str = ""
    models: Annotated[dict[Name, Model | None], BeforeValidator(_named), Field(min_length=1)]
    datasets: Annotated[dict[Name, Data], Field(min_length=1)]
    recipes: dict[Name, str] = {}
    train: Training = Training()
    search: Search = Search()
    grids: Annotated[dict[Name, Grid], Field(min_length=1)]
    compare: Compare = Compare()

    def model(self, name: str) -> Model:
        """A model with its path."""
        found = self.models[name] or Model()
        return found.model_copy(update={"path": found.path or name})

    def recipes_of(self, grid: Grid) -> dict[str, str]:
        """The recipes of a grid by name, wildcards spelled out: name -> text."""
        return expanded(grid.recipes, self.recipes)


def read_study(path: Path | str, roots: Sequence[str] = ()) -> Study:
    """Read and check a study's file; `roots` are NAME=DIR, in place of the file's own.

    Raises:
        InputError: all faults in one line, each with its line in the file and the field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read the study {path}: {reason}. Check the path.") from error
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        lines = dict(_lines(node, ())) if node is not None else {}
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(
            f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error})."
        ) from error
    except _Twice as error:
        raise InputError(f"{path}, line {error.line}: '{error.name}' is given twice. Keep one.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a study is a mapping of study, models, datasets and grids.")
    try:
        study = Study.model_validate(values)
        faults = list(_faults(study))
    except ValidationError as error:
        faults = [_fault(fault) for fault in error.errors()]
    if faults:
        raise InputError("; ".join(f"{path}, {_line(where, lines)}: {what}" for where, what in faults))
    return _rooted(study, roots)


class _Twice(Exception):
    def __init__(self, name: str, line: int) -> None:
        self.name, self.line = name, line


def _lines(node: yaml.Node, where: Where) -> Iterator[tuple[Where, int]]:
    """The line of each field."""
    yield where, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise _Twice(key.value, key.start_mark.line + 1)
            seen.add(key.value)
            yield from _lines(value, (*where, key.value))
            yield (*where, key.value), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*where, index))


def _line(where: Where, lines: dict[Where, int]) -> str:
    """`line 7: grids.main.seeds`; the line of the nearest field around it where it has none itself."""
    known = next(where[:end] for end in range(len(where), -1, -1) if where[:end] in lines or not end)
    shown = where if len(where) <= len(known) + 1 else known
    field = ".".join(str(part) for part in shown)
    return f"line {lines.get(known, 1)}" + (f": {field}" if field else "")


def _fault(fault: Any) -> tuple[Where, str]:
    """A fault that pydantic found: where, and a sentence."""
    where = tuple(part for part in fault["loc"] if not _internal(part))
    if fault["type"] == "extra_forbidden":
        fields = _fields(where[:-1])
        return where, f"unknown{did_you_mean(str(where[-1]), fields)} (known: {', '.join(fields)})"
    if fault["type"] == "missing":
        return where, "is missing"
    what = fault["msg"].removeprefix("Value error, ")
    given = fault["input"]
    plain = isinstance(given, str | int | float) and not isinstance(
        fault.get("ctx", {}).get("error"), ValueError
    )
    return where, f"{what[:1].lower()}{what[1:]}" + (f" (got {given!r})" if plain else "")


def _internal(part: str | int) -> bool:
    """Whether a step of pydantic's way is no field of the file: a member of a union, the key of a mapping."""
    return isinstance(part, str) and (part == "[key]" or part.startswith(("literal[", "function-", "list[")))


_PARTS: dict[str, type[BaseModel]] = {"models": Model, "datasets": Data, "grids": Grid}
_FIXED: dict[str, type[BaseModel]] = {
    "train": Training,
    "search": Search,
    "compare": Compare,
    "budget": Budget,
}


def _fields(where: Where) -> list[str]:
    """The fields that stand at a place of the file."""
    kind: type[BaseModel] = Study
    if where and where[0] in _PARTS:
        kind = _PARTS[str(where[0])]
        where = where[2:]
    for part in where:
        kind = _FIXED.get(str(part), kind)
    return list(kind.model_fields)


def _faults(study: Study) -> Iterator[tuple[Where, str]]:
    """What one field says against another."""

    def unknown(where: Where, name: str, known: Sequence[str], what: str) -> Iterator[tuple[Where, str]]:
        if name not in known:
            yield where, f"no {what} '{name}'{did_you_mean(name, known)} ({what}s: {', '.join(known)})"

    models, datasets = list(study.models), list(study.datasets)
    for name in models:
        if home := study.model(name).home:
            yield from unknown(("models", name, "home"), home, datasets, "data set")
    for name, text in study.recipes.items():
        yield from _unread(("recipes", name), [text], {})
    if SEARCH in study.grids:
        yield ("grids", SEARCH), "this name is kept for trials of learning rates: choose another"
    if study.search.budget is not None:
        yield from _one_budget(("search", "budget"), study.search.budget)
    for method in study.search.rates:
        yield from unknown(("search", "rates", method), method, list(LEARNING_RATES), "method")
    every: set[str] = set()
    for name, grid in study.grids.items():
        at: Where = ("grids", name)
        for field, known, what in (
            ("models", models, "model"),
            ("train", datasets, "data set"),
            ("evaluate", datasets, "data set"),
        ):
            for index, value in enumerate(getattr(grid, field) or ()):
                yield from unknown((*at, field, index), value, known, what)
        yield from _one_budget((*at, "budget"), grid.budget)
        alone = [
            fault
            for index, recipe in enumerate(grid.recipes)
            for fault in _unread((*at, "recipes", index), [recipe], study.recipes)
        ]
        yield from alone or _unread((*at, "recipes"), grid.recipes, study.recipes)
        if not alone:
            every.update(_known(study, grid))
    if study.compare.against is not None and every:
        yield from unknown(("compare", "against"), study.compare.against, sorted(every), "recipe")


def _known(study: Study, grid: Grid) -> list[str]:
    try:
        return list(study.recipes_of(grid))
    except InputError:
        return []


def _unread(where: Where, names: Sequence[str], own: Mapping[str, str]) -> Iterator[tuple[Where, str]]:
    """Why recipes cannot be read, if so."""
    try:
        expanded(names, own)
    except InputError as error:
        yield where, str(error)


def _one_budget(where: Where, budget: Budget) -> Iterator[tuple[Where, str]]:
    given = [name for name, value in budget if value is not None]
    if len(given) != 1:
        yield where, f"give one of epochs, pairs and minutes (got {', '.join(given) or 'none'})"


def _rooted(study: Study, roots: Sequence[str]) -> Study:
    """The study with other roots."""
    datasets = dict(study.datasets)
    for given in roots:
        name, sign, root = given.partition("=")
        if not sign or not root:
            raise InputError(f"--root {given}: write NAME=DIR, such as slake=data/slake.")
        if name not in datasets:
            raise InputError(
                f"--root {given}: the study has no data set '{name}'{did_you_mean(name, datasets) or '.'} "
                f"It has {', '.join(datasets)}."
            )
        datasets[name] = datasets[name].model_copy(update={"root": Path(root)})
    return study.model_copy(update={"datasets": datasets})

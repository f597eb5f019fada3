"""The words of a recipe: parts of a model, methods that train them, and what each method may be told."""

from __future__ import annotations

from dataclasses import dataclass

from normtune.errors import InputError, did_you_mean

METHODS: dict[str, dict[str, int | float]] = {  # method -> its options with their defaults
    "frozen": {},
    "full": {},
    "ln": {"gain": True, "bias": True},
    "attention": {},
    "ffn": {},
    "bias": {},
    "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
    "prefix": {"n": 10},
    "ptuning": {"n": 10},
    "ia3": {},
    "adapter": {"width": 64},
}
INTRINSIC = ("full", "ln", "attention", "ffn", "bias")
ADDED = ("lora", "prefix", "ptuning", "ia3", "adapter")
TEXT_ONLY = ("prefix", "ptuning")  # `all` gives these to the text parts alone
_LARGEST = 1_000_000  # no rank, width or layer index is larger


class RecipeError(InputError):
    """A recipe that can't be read, or that doesn't fit the model."""


@dataclass(frozen=True)
class Method:
    """One method with its options and its layers.

    Options at their defaults are left out, so that `lora(r=8)` equals `lora`. `layers` is half-open and
    counts from the end where negative; None means the whole part, its tensors outside the layers included.
    """

    name: str
    options: tuple[tuple[str, int | float], ...] = ()
    layers: tuple[int | None, int | None] | None = None

    def __post_init__(self) -> None:
        if self.name == "frozen":
            raise RecipeError(
                "'frozen' takes no options, layers or other methods: a frozen part has no methods"
            )
        if self.name not in METHODS:
            raise RecipeError(f"unknown method '{self.name}'{did_you_mean(self.name, METHODS)}")
        given = dict(self.options)
        if len(given) != len(self.options):
            raise RecipeError(f"an option of '{self.name}' is given twice")
        defaults = METHODS[self.name]
        for option, value in given.items():
            check_option(self.name, option, value)
        kept = tuple((key, given[key]) for key in defaults if key in given and given[key] != defaults[key])
        object.__setattr__(self, "options", kept)
        if kept == (("gain", 0), ("bias", 0)):
            raise RecipeError(f"'{self}' trains neither gains nor biases: leave out one of the two")
        if self.layers == (None, None):
            object.__setattr__(self, "layers", None)
        if self.layers is not None:
            _check_layers(*self.layers)

    def option(self, name: str) -> int | float:
        """The option's value, or its default."""
        return dict(self.options).get(name, METHODS[self.name][name])

    def layer_range(self, depth: int) -> range:
        """The layers that the method covers in a part of `depth` layers."""
        start, stop = self.layers or (None, None)
        return range(depth)[start:stop]

    def __str__(self) -> str:
        text = self.name
        if self.options:
            text += "(" + ",".join(f"{key}={value!r}" for key, value in self.options) + ")"
        if self.layers is not None:
            text += "[" + ":".join("" if bound is None else str(bound) for bound in self.layers) + "]"
        return text


def check_option(method: str, option: str, value: int | float) -> None:
    """Whether a method takes an option of that name and value.

    Raises:
        RecipeError: it does not.
    """
    defaults = METHODS[method]
    if option not in defaults:
        takes = ", ".join(defaults) or "none"
        raise RecipeError(
            f"'{method}' has no option '{option_text(option)}'{did_you_mean(option, defaults)} (options: {takes})"
        )
    if isinstance(defaults[option], bool):
        if value not in (0, 1):
            raise RecipeError(f"{option} of '{method}' is {value}; it must be 0 or 1")
    elif isinstance(defaults[option], float):
        if not 0 <= value < 1:
            raise RecipeError(f"{option} of '{method}' is {value}; it must be at least 0 and below 1")
    elif not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise RecipeError(f"{option} of '{method}' is {value}; it must be a whole number, 1 or more")


def _check_layers(start: int | None, stop: int | None) -> None:
    if any(bound is not None and abs(bound) > _LARGEST for bound in (start, stop)):
        raise RecipeError(f"layer range [{start}:{stop}] is out of reach")
    if start is not None and stop is not None and (start < 0) == (stop < 0) and start >= stop:
        raise RecipeError(f"layer range [{start}:{stop}] is empty")
    if stop == 0:
        raise RecipeError("layer range [:0] is empty")


def option_text(text: str) -> str:
    """The text on one line, shortened for a message."""
    text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 160 else text[:157] + "..."


# Pairs seen being equal, the best of benchmarks/learning_rates.json, by method (tests hold the two together).
LEARNING_RATES: dict[str, float] = {
    "ln": 3e-2,
    "bias": 1e-1,
    "attention": 1e-3,
    "ffn": 1e-3,
    "full": 3e-4,
    "lora": 3e-3,
    "prefix": 3e-3,
    "ptuning": 3e-1,
    "ia3": 1e-1,
    "adapter": 3e-3,
}

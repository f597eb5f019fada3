"""The training methods: their options, defaults and learning rates. Importing this does not load torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from normtune.errors import InputError, did_you_mean

Value = int | float | str  # of an option
METHODS: dict[str, dict[str, Value]] = {  # method -> its options with their defaults
    "frozen": {},  # nothing
    "full": {},  # every parameter
    "ln": {"gain": True, "bias": True},  # the norms' gains and biases; bias=0 trains the gains only
    "attention": {},  # every parameter of the attentions
    "ffn": {},  # every parameter of the feed-forwards
    "bias": {},  # the biases of everything but the norms
    # rank, scale (the update is alpha / r * B A), dropout; DoRA; scale alpha / sqrt(r); names of linears ("": q and v)
    "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "dora": False, "rslora": False, "targets": ""},
    "prefix": {"n": 10},  # learned keys (and values) per layer
    "ptuning": {"n": 10},  # the same, without the projection network
    "ia3": {},  # scales of keys, values and the feed-forwards' inner activations
    "adapter": {"width": 64},  # size of the bottleneck
    "vera": {"r": 256},  # scales of shared random matrices
    "road": {},  # rotations and scales of pairs of outputs
    "miss": {"r": 2, "columns": 8},  # a small block of r x columns values, repeated over the weight
    "beft": {},  # biases of the value projections
    "ssf": {},  # a scale and a shift of every linear's outputs
    "gamma": {},  # DiffFit's scale of each attention's and feed-forward's output
}
INTRINSIC = ("full", "ln", "attention", "ffn", "bias")  # train parameters of the base
PEFT_VECTORS = ("vera", "road", "miss", "beft")  # PEFT's methods with about as few parameters as norms
OUTPUT_VECTORS = ("ssf", "gamma")  # vectors behind linears
# methods that add parameters to a frozen base -> (module of `normtune.methods`, function). The function
# (model, part, method, linears of the part) -> AddedLayers chooses among the linears and adds the layers
ADDED = {
    "lora": ("lora", "add_lora"),
    "prefix": ("prefix", "add_prefix"),
    "ptuning": ("prefix", "add_prefix"),
    "ia3": ("lora", "add_ia3"),
    "adapter": ("output_modules", "add_bottleneck"),
    **dict.fromkeys(PEFT_VECTORS, ("peft_vectors", "add_peft_vectors")),
    **dict.fromkeys(OUTPUT_VECTORS, ("output_modules", "add_output_vectors")),
}
TEXT_ONLY = ("prefix", "ptuning")  # `all` gives these to the text parts only
ALL_LINEAR = "all-linear"  # the value of `targets` for every linear, as in PEFT
_LARGEST = 1_000_000  # upper bound for ranks, widths and layer indices


class RecipeError(InputError):
    """A recipe that cannot be parsed, or that does not fit the model."""


@dataclass(frozen=True)
class Method:
    """One method with its options and its layers.

    Attributes:
        options: (name, value) of each option that differs from its default: `lora(r=8)` equals `lora`.
        layers: half-open range, negative bounds count from the end. None means the whole part, including its
            tensors outside the layers.
    """

    name: str
    options: tuple[tuple[str, Value], ...] = ()
    layers: tuple[int | None, int | None] | None = None

    def __post_init__(self) -> None:
        if self.name == "frozen":
            raise RecipeError("'frozen' takes no options, layers or other methods: a frozen part has no methods")
        if self.name not in METHODS:
            raise RecipeError(f"unknown method '{self.name}'{did_you_mean(self.name, METHODS)}")
        values = dict(self.options)
        if len(values) != len(self.options):
            raise RecipeError(f"an option of '{self.name}' is given twice")
        defaults = METHODS[self.name]
        for option, value in values.items():
            check_option(self.name, option, value)
        # one spelling for equal methods: options in the order of METHODS, without those at their defaults
        changed = tuple((key, values[key]) for key in defaults if key in values and values[key] != defaults[key])
        object.__setattr__(self, "options", changed)  # the class is frozen
        if changed == (("gain", 0), ("bias", 0)):
            raise RecipeError(f"'{self}' trains neither gains nor biases: leave out one of the two")
        if self.layers == (None, None):  # `ln[:]` equals `ln`
            object.__setattr__(self, "layers", None)
        if self.layers is not None:
            _check_layers(*self.layers)

    def option(self, name: str) -> Value:
        """The option's value, or its default."""
        return dict(self.options).get(name, METHODS[self.name][name])

    def layer_range(self, depth: int) -> range:
        """Indices of the layers that the method covers in a part of `depth` layers."""
        start, stop = self.layers or (None, None)
        return range(depth)[start:stop]

    def __str__(self) -> str:
        text = self.name
        if self.options:
            text += "(" + ",".join(f"{key}={value}" for key, value in self.options) + ")"
        if self.layers is not None:
            text += "[" + ":".join("" if bound is None else str(bound) for bound in self.layers) + "]"
        return text


def check_option(method: str, option: str, value: Value) -> None:
    """Check that a method has an option of this name and that the value is valid.

    Raises:
        RecipeError: the option or the value is not valid.
    """
    defaults = METHODS[method]
    if option not in defaults:
        names = ", ".join(defaults) or "none"
        raise RecipeError(
            f"'{method}' has no option '{shorten(option)}'{did_you_mean(option, defaults)} (options: {names})"
        )
    if isinstance(defaults[option], str):
        _check_targets(str(value).split("+"))
    elif isinstance(value, str):
        raise RecipeError(f"'{shorten(value)}' is not a number")
    elif isinstance(defaults[option], bool):  # before int: a bool is an int
        if value not in (0, 1):
            raise RecipeError(f"{option} of '{method}' is {value}; it must be 0 or 1")
    elif isinstance(defaults[option], float):
        if not 0 <= value < 1:
            raise RecipeError(f"{option} of '{method}' is {value}; it must be at least 0 and below 1")
    elif not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise RecipeError(f"{option} of '{method}' is {value}; it must be a whole number, 1 or more")


def _check_targets(names: list[str]) -> None:
    """Check the names of linears: words, each given once, `all-linear` alone."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.\-]*", name):
            raise RecipeError(f"target '{shorten(name)}' is not the name of a linear, such as q_proj, or {ALL_LINEAR}")
        if names.count(name) > 1:
            raise RecipeError(f"target '{name}' is given twice")
    if ALL_LINEAR in names and len(names) > 1:
        raise RecipeError(f"{ALL_LINEAR} covers the other targets: give it alone")


def _check_layers(start: int | None, stop: int | None) -> None:
    if any(bound is not None and abs(bound) > _LARGEST for bound in (start, stop)):
        raise RecipeError(f"layer range [{start}:{stop}] is out of reach")
    # bounds of different signs ([4:-4]) depend on the depth of the model, which is not known here
    if start is not None and stop is not None and (start < 0) == (stop < 0) and start >= stop:
        raise RecipeError(f"layer range [{start}:{stop}] is empty")
    if stop == 0:
        raise RecipeError("layer range [:0] is empty")


def shorten(text: str) -> str:
    """The text on one line of ASCII, at most 160 characters, for an error message."""
    # control characters and foreign scripts as escapes, so that a message is one line in any terminal
    text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 160 else text[:157] + "..."


# Default learning rate of each method: the best of benchmarks/learning_rates.json, which compares rates at
# equal numbers of image-question pairs. A test checks that the two agree.
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
    "vera": 1e-1,
    "road": 1e-1,
    "miss": 1e-3,
    "beft": 3e-1,
    "ssf": 3e-2,
    "gamma": 3e-1,
}

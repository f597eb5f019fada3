"""What to train, in words: `vision=frozen,connector=full,language=ln`, parsed, checked and printed.

A recipe gives each part of a model its methods. The grammar (blanks are free between words):

    recipe  := PRESET | methods | entry ("," entry)*          methods alone stand for all=methods
    entry   := part ("+" part)* "=" methods                   encoder+decoder=ln
    part    := ("all" | "vision" | "connector" | "encoder" | "decoder" | "language") ["?"]
    methods := method ("+" method)*                           ln+bias
    method  := NAME ["(" NAME "=" NUMBER ("," ...)* ")"] ["[" [INT] ":" [INT] "]"]

`ln[16:]` is layers 16 and up, `lora(r=4)[-8:]` the last eight: half-open, as Python slices. `part?` applies
where the model has such a part and the method finds something to train there; a plain `part` must exist and
be found. A part that is not named is frozen, and a named part wins over `language`, which wins over `all`.

Methods that train what is inside a part: full, ln (`ln(bias=0)`: the norms' gains alone, `ln(gain=0)`: their
biases alone), attention, ffn, bias (the biases outside norms). Methods
that add to it: lora (on the query and value projections of every self- and cross-attention, as MISS and
MILE do), prefix (with the two-layer projection, Li & Liang 2021), ptuning (P-Tuning v2: without it), ia3
(key, value and feed-forward output), adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from normtune.errors import InputError, did_you_mean

PARTS = ("vision", "connector", "encoder", "decoder", "language")

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

T = TypeVar("T")

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
            _check_option(self.name, option, value)
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


@dataclass(frozen=True)
class Recipe:
    """Each part's methods, in the order written; `()` is frozen.

    `optional` holds the parts written `part?`. `str(recipe)` parses back to an equal recipe.
    """

    parts: tuple[tuple[str, tuple[Method, ...]], ...]
    optional: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.parts:
            raise RecipeError("a recipe names at least one part")
        names = [part for part, _ in self.parts]
        for part, methods in self.parts:
            _check_part(part)
            if names.count(part) > 1:
                raise RecipeError(f"part '{part}' is given twice")
            _check_together(methods)
        assert self.optional <= set(names), "optional parts are parts of the recipe"

    def methods_of(self, part: str) -> tuple[Method, ...]:
        """The part's methods; `()` where it is frozen or not named. Ask it of a resolved recipe."""
        return dict(self.parts).get(part, ())

    def __str__(self) -> str:
        return ",".join(
            f"{part}{'?' if part in self.optional else ''}={'+'.join(map(str, methods)) or 'frozen'}"
            for part, methods in self.parts
        )


def parse(text: str) -> Recipe:
    """Read a preset's name, methods for all parts, or `part=methods,...` (see the module's grammar).

    Raises:
        RecipeError: naming the word and its column.
    """
    return _Reader(PRESETS.get(text.strip(), text)).recipe()


def resolve(recipe: Recipe, part_names: Sequence[str]) -> Recipe:
    """The recipe spelled out over a model's real parts, in the model's order.

    `all` becomes every part, as `part?`: it skips what a part has nothing of (a connector without norms).
    `language` means encoder and decoder on a model of the MISS and BLIP kind, `decoder` means language on one
    of the LLaVA kind.

    Raises:
        RecipeError: a part that the model lacks, or nothing left of the recipe on this model.
    """
    found: dict[str, tuple[Method, ...]] = {}
    optional: set[str] = set()
    breadth = {"all": 0, "language": 1}  # the broader is written first, the more particular over it
    for part, methods in sorted(recipe.parts, key=lambda entry: breadth.get(entry[0], 2)):
        for target in _targets(part, recipe, part_names):
            if part == "all" and target in ("vision", "connector"):
                found[target] = tuple(method for method in methods if method.name not in TEXT_ONLY)
            else:
                found[target] = methods
            optional.discard(target)
            if found[target] and (part == "all" or part in recipe.optional):
                optional.add(target)
    if any(methods for _, methods in recipe.parts) and not any(found.values()):
        raise RecipeError(
            f"recipe '{_shown(str(recipe))}' trains nothing on this model; its parts: {', '.join(part_names)}"
        )
    return Recipe(tuple((part, found.get(part, ())) for part in part_names), frozenset(optional))


def _targets(part: str, recipe: Recipe, part_names: Sequence[str]) -> list[str]:
    """The model's parts that one part of a recipe means."""
    if part == "all":
        return list(part_names)
    if part in part_names:
        return [part]
    if part == "language" and "decoder" in part_names:
        return [name for name in part_names if name in ("encoder", "decoder")]
    if part == "decoder" and "language" in part_names:
        if "language" in dict(recipe.parts):
            raise RecipeError("'language' and 'decoder' are one part of this model: give only one of them")
        return ["language"]
    if part in recipe.optional:
        return []
    raise RecipeError(
        f"this model has no part '{part}'; its parts: {', '.join(part_names)}. "
        f"Change the recipe, or write '{part}?' to skip a part that is not there"
    )


def _check_part(part: str) -> None:
    if part not in PARTS and part != "all":
        known = (*PARTS, "all")
        raise RecipeError(
            f"unknown part '{_shown(part)}'{did_you_mean(part.lower(), known)} (parts: {', '.join(known)})"
        )


def _check_option(method: str, option: str, value: int | float) -> None:
    defaults = METHODS[method]
    if option not in defaults:
        takes = ", ".join(defaults) or "none"
        raise RecipeError(
            f"'{method}' has no option '{_shown(option)}'{did_you_mean(option, defaults)} (options: {takes})"
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


def _check_together(methods: tuple[Method, ...]) -> None:
    """Refuse methods that can't stand in one part together."""
    names = [method.name for method in methods]
    for method in methods:
        if methods.count(method) > 1:
            raise RecipeError(f"'{method}' is given twice to one part")
        if method.name in ADDED and names.count(method.name) > 1:
            raise RecipeError(f"'{method.name}' can be given once to a part")
    if "prefix" in names and "ptuning" in names:
        raise RecipeError("'prefix' and 'ptuning' both add prefix tokens: give a part one of them")


def _shown(text: str) -> str:
    """The text on one line, shortened for a message."""
    text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 160 else text[:157] + "..."


class _Reader:
    """Reads one recipe from left to right; `at` is the index of the next character."""

    _WORD = re.compile(r"[A-Za-z0-9_.\-]+")
    _BLANK = re.compile(r"[ \t\r\n]*")
    _INT = re.compile(r"-?[0-9]{1,8}")
    _NUMBER = re.compile(r"-?[0-9]{1,32}(\.[0-9]{1,32})?([eE]-?[0-9]{1,4})?")

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def recipe(self) -> Recipe:
        if not self.text.strip():
            raise RecipeError(
                f"the recipe is empty; give a preset ({', '.join(METHODS)}, ...) or part=method"
            )
        parts: dict[str, tuple[Method, ...]] = {}
        optional: set[str] = set()
        if (mark := re.search(r"[=(\[]", self.text)) and mark.group() == "=":
            while True:
                for column, part, skippable in (names := self.part_names()):
                    if part in parts or [name for _, name, _ in names].count(part) > 1:
                        raise self.error(f"part '{part}' is given twice", column)
                    if skippable:
                        optional.add(part)
                self.expect("=", "after the part's name")
                methods = self.methods(())
                parts.update((part, methods) for _, part, _ in names)
                if not self.take(","):
                    break
        else:
            parts["all"] = self.methods(PRESETS)
        self.skip_blanks()
        if self.at < len(self.text):
            raise self.error(f"unexpected '{_shown(self.text[self.at])}'", self.at)
        return Recipe(tuple(parts.items()), frozenset(optional))

    def part_names(self) -> list[tuple[int, str, bool]]:
        """(column, part, whether it is written `part?`) of each part before one `=`."""
        names = []
        while True:
            column, word = self.word("a part")
            self.located(column, _check_part, word)
            names.append((column, word, self.take("?")))
            if not self.take("+"):
                return names

    def methods(self, also: Iterable[str]) -> tuple[Method, ...]:
        """Methods joined by `+`; `also` are more words to suggest where one is unknown."""
        first, frozen = self.at, False
        found: list[Method] = []
        while True:
            column, name = self.word("a method")
            if name not in METHODS:
                hint = did_you_mean(name.lower(), (*METHODS, *also)) or f" (methods: {', '.join(METHODS)})"
                if name in PARTS or name == "all":
                    hint = f": it is a part, write {name}=METHOD"
                raise self.error(f"unknown method '{_shown(name)}'{hint}", column)
            options, layers = self.options(name), self.layers()
            if name == "frozen" and not layers and not found:
                frozen = True
            else:
                found.append(self.located(column, Method, name, options, layers))
            if not self.take("+"):
                break
        if frozen and found:
            raise self.error("'frozen' can't be joined with other methods", first)
        self.located(first, _check_together, tuple(found))
        return tuple(found)

    def options(self, method: str) -> tuple[tuple[str, int | float], ...]:
        if not self.take("("):
            return ()
        options: list[tuple[str, int | float]] = []
        while True:
            column, name = self.word("an option")
            if name in dict(options):
                raise self.error(f"option '{_shown(name)}' is given twice", column)
            self.expect("=", "after the option's name")
            value_column, word = self.word("a number")
            if self._INT.fullmatch(word):
                value: int | float = int(word)
            elif self._NUMBER.fullmatch(word):
                value = float(word)
            else:
                raise self.error(f"'{_shown(word)}' is not a number", value_column)
            self.located(column, _check_option, method, name, value)
            options.append((name, value))
            if not self.take(","):
                self.expect(")", "at the end of the options")
                return tuple(options)

    def layers(self) -> tuple[int | None, int | None] | None:
        if not self.take("["):
            return None
        bounds: list[int | None] = []
        for end in (":", "]"):
            self.skip_blanks()
            if (match := self._INT.match(self.text, self.at)) is not None:
                self.at = match.end()
            bounds.append(int(match.group()) if match else None)
            self.expect(end, "in a layer range, written [16:], [:8] or [4:8]")
        return bounds[0], bounds[1]

    def skip_blanks(self) -> None:
        match = self._BLANK.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def word(self, wanted: str) -> tuple[int, str]:
        """(index, word) of the next word."""
        self.skip_blanks()
        match = self._WORD.match(self.text, self.at)
        if match is None:
            got = f"'{_shown(self.text[self.at])}'" if self.at < len(self.text) else "the end"
            raise self.error(f"expected {wanted}, got {got}", self.at)
        self.at = match.end()
        return match.start(), match.group()

    def take(self, mark: str) -> bool:
        self.skip_blanks()
        found = self.text.startswith(mark, self.at)
        self.at += len(mark) if found else 0
        return found

    def expect(self, mark: str, where: str) -> None:
        if not self.take(mark):
            got = f"'{_shown(self.text[self.at])}'" if self.at < len(self.text) else "the end"
            raise self.error(f"expected '{mark}' {where}, got {got}", self.at)

    def located(self, column: int, check: Callable[..., T], *values: object) -> T:
        """`check(*values)`, its error given the column."""
        try:
            return check(*values)
        except RecipeError as error:
            raise self.error(str(error), column) from None

    def error(self, what: str, column: int) -> RecipeError:
        return RecipeError(f"{what} (column {column + 1} of recipe '{_shown(self.text)}')")


def _presets() -> dict[str, str]:
    """The paradigms of the paper (2404.16385) and of MILE (2403.06407), by name."""
    lora = {f"lora{rank}": f"lora(r={rank},alpha=32,dropout=0.1)" for rank in (4, 8)}
    presets = {name: f"all={name}" for name in METHODS if name != "lora"}
    presets |= {
        "ln-vision": "vision=ln",
        "ln-language": "language=ln",
        "ln-encoder": "encoder=ln",
        "ln-decoder": "decoder=ln",
        "ln-encoder+decoder": "encoder=ln,decoder=ln",
        "ln-bias": "all=ln+bias",
        "ln-gain-only": "all=ln(bias=0)",
        "ln-bias-only": "all=ln(gain=0)",
        "ln-connector": "connector?=full,language=ln",
        "attention-vision": "vision=attention",
        "attention-language": "language=attention",
        "ffn-vision": "vision=ffn",
        "ffn-language": "language=ffn",
        "lora-4": f"all={lora['lora4']}",
        "lora-8": f"all={lora['lora8']}",
    }
    words = {name: name for name in METHODS if name not in ("lora", "frozen", "full")} | lora
    for (
        word,
        method,
    ) in words.items():  # vision-encoder-decoder, the rows of MILE: F-LoRA4-LoRA4, T-T-prefix ...
        for vision, encoder in (
            ("frozen", "frozen"),
            ("frozen", "full"),
            ("full", "frozen"),
            ("full", "full"),
            ("frozen", word),
            ("full", word),
            (word, word),
        ):
            if vision == word and word in TEXT_ONLY:
                continue
            text = {"frozen": "frozen", "full": "full", word: method}
            presets[f"{vision}-{encoder}-{word}"] = (
                f"vision={text[vision]},encoder?={text[encoder]},decoder={method}"
            )
    return presets


PRESETS: dict[str, str] = _presets()

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

from normtune.errors import did_you_mean
from normtune.methods.presets import PRESETS
from normtune.methods.registry import (
    ADDED,
    METHODS,
    TEXT_ONLY,
    Method,
    RecipeError,
    check_option,
    option_text,
)
from normtune.models.part_names import PARTS

T = TypeVar("T")


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
            f"recipe '{option_text(str(recipe))}' trains nothing on this model; its parts: {', '.join(part_names)}"
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
            f"unknown part '{option_text(part)}'{did_you_mean(part.lower(), known)} (parts: {', '.join(known)})"
        )


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
            raise self.error(f"unexpected '{option_text(self.text[self.at])}'", self.at)
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
                raise self.error(f"unknown method '{option_text(name)}'{hint}", column)
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
                raise self.error(f"option '{option_text(name)}' is given twice", column)
            self.expect("=", "after the option's name")
            value_column, word = self.word("a number")
            if self._INT.fullmatch(word):
                value: int | float = int(word)
            elif self._NUMBER.fullmatch(word):
                value = float(word)
            else:
                raise self.error(f"'{option_text(word)}' is not a number", value_column)
            self.located(column, check_option, method, name, value)
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
            got = f"'{option_text(self.text[self.at])}'" if self.at < len(self.text) else "the end"
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
            got = f"'{option_text(self.text[self.at])}'" if self.at < len(self.text) else "the end"
            raise self.error(f"expected '{mark}' {where}, got {got}", self.at)

    def located(self, column: int, check: Callable[..., T], *values: object) -> T:
        """`check(*values)`, its error given the column."""
        try:
            return check(*values)
        except RecipeError as error:
            raise self.error(str(error), column) from None

    def error(self, what: str, column: int) -> RecipeError:
        return RecipeError(f"{what} (column {column + 1} of recipe '{option_text(self.text)}')")

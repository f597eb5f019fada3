"""Parse, check and print recipes such as `vision=frozen,connector=full,language=ln`.

A recipe assigns methods to the parts of a model. The grammar (blanks between words are ignored):

    recipe  := PRESET | methods | entry ("," entry)*          methods alone mean all=methods
    entry   := part ("+" part)* "=" methods                   encoder+decoder=ln
    part    := ("all" | "vision" | "connector" | "encoder" | "decoder" | "language") ["?"]
    methods := method ("+" method)*                           ln+bias
    method  := NAME ["(" NAME "=" value ("," ...)* ")"] ["[" [INT] ":" [INT] "]"]
    value   := NUMBER | WORD ("+" WORD)*

Layer ranges are half-open, like Python slices: `ln[16:]` trains layers 16 and up, `lora(r=4)[-8:]` the last
eight. An optional part (`part?`) is skipped if the model has no such part, or if the method finds nothing to
train there; without `?` both are errors. A part without an entry is frozen. An entry for a part overrides the
entry `language`, which overrides `all`.

Methods that train parameters of the base:

    full             every parameter
    ln               the norms; ln(bias=0) only their gains, ln(gain=0) only their biases
    attention, ffn   every parameter of the attentions, of the feed-forwards
    bias             the biases of everything but the norms

Methods that add parameters:

    lora             on the query and value projections of every self- and cross-attention, as in MISS and MILE;
                     lora(targets=q_proj+o_proj) on the linears of these names, lora(targets=all-linear) on every linear
                     but the head; lora(dora=1) is DoRA, lora(rslora=1) is scaled by alpha / sqrt(r)
    prefix, ptuning  learned keys and values: with the two-layer projection (Li & Liang 2021), without it (P-Tuning v2)
    ia3              scales of keys, values and feed-forward outputs
    adapter          a bottleneck behind each feed-forward
    vera, road, miss, beft (as in PEFT), ssf, gamma (vectors behind linears): about as few parameters as norms have
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from normtune.errors import did_you_mean
from normtune.methods.presets import PRESETS
from normtune.methods.registry import ADDED, METHODS, TEXT_ONLY, Method, RecipeError, Value, check_option, shorten
from normtune.models.part_names import PARTS

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """The methods of each part. `str(recipe)` parses back to an equal recipe."""

    parts: tuple[tuple[str, tuple[Method, ...]], ...]  # (part, methods) in the order written; () is frozen
    optional: frozenset[str] = frozenset()  # the parts written `part?`

    def __post_init__(self) -> None:
        if not self.parts:
            raise RecipeError("a recipe names at least one part")
        names = [part for part, _ in self.parts]
        for part, methods in self.parts:
            _check_part(part)
            if names.count(part) > 1:
                raise RecipeError(f"part '{part}' is given twice")
            _check_combination(methods)
        assert self.optional <= set(names), "optional parts are parts of the recipe"

    def methods_of(self, part: str) -> tuple[Method, ...]:
        """The methods of the part's own entry, `()` if it is frozen or has no entry.

        Meant for resolved recipes: `all` and `language` are not expanded here.
        """
        return dict(self.parts).get(part, ())

    def __str__(self) -> str:
        return ",".join(
            f"{part}{'?' if part in self.optional else ''}={'+'.join(map(str, methods)) or 'frozen'}"
            for part, methods in self.parts
        )


def parse(text: str) -> Recipe:
    """Parse a preset's name, methods for all parts, or `part=methods,...` (see the grammar above).

    Raises:
        RecipeError: the text is not a recipe; the message names the word and its column.
    """
    return _Reader(PRESETS.get(text.strip(), text)).recipe()


def resolve(recipe: Recipe, part_names: Sequence[str]) -> Recipe:
    """Rewrite a recipe so that it has one entry for each part of a model, in the model's order.

    `all` becomes every part, as an optional part: it skips parts in which a method finds nothing (a connector
    without norms). `language` means encoder and decoder on a model like MISS or BLIP, and `decoder` means
    language on a model like LLaVA.

    Raises:
        RecipeError: the model lacks a part of the recipe, or the recipe trains nothing on this model.
    """
    methods_of: dict[str, tuple[Method, ...]] = {}
    optional: set[str] = set()
    # Broad entries first, so that a specific entry overwrites them: all, then language, then single parts.
    # Example on LLaVA: vision=full,all=ln -> vision=full,connector?=ln,language?=ln
    breadth = {"all": 0, "language": 1}
    for part, methods in sorted(recipe.parts, key=lambda entry: breadth.get(entry[0], 2)):
        for target in _matching_parts(part, recipe, part_names):
            # prefixes need tokens: `all` does not give them to the image parts
            if part == "all" and target in ("vision", "connector"):
                methods_of[target] = tuple(method for method in methods if method.name not in TEXT_ONLY)
            else:
                methods_of[target] = methods
            optional.discard(target)  # a specific entry also decides whether the part is optional
            if methods_of[target] and (part == "all" or part in recipe.optional):
                optional.add(target)
    if any(methods for _, methods in recipe.parts) and not any(methods_of.values()):
        raise RecipeError(
            f"recipe '{shorten(str(recipe))}' trains nothing on this model; its parts: {', '.join(part_names)}"
        )
    return Recipe(tuple((part, methods_of.get(part, ())) for part in part_names), frozenset(optional))


def _matching_parts(part: str, recipe: Recipe, part_names: Sequence[str]) -> list[str]:
    """The parts of the model to which a recipe's entry for `part` applies."""
    if part == "all":  # every part
        return list(part_names)
    if part in part_names:
        return [part]
    if part == "language" and "decoder" in part_names:  # MISS, BLIP
        return [name for name in part_names if name in ("encoder", "decoder")]
    if part == "decoder" and "language" in part_names:  # LLaVA
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
            f"unknown part '{shorten(part)}'{did_you_mean(part.lower(), known)} (parts: {', '.join(known)})"
        )


def _check_combination(methods: tuple[Method, ...]) -> None:
    """Raise RecipeError if a part cannot have these methods together."""
    names = [method.name for method in methods]
    for method in methods:
        if methods.count(method) > 1:
            raise RecipeError(f"'{method}' is given twice to one part")
        if method.name in ADDED and names.count(method.name) > 1:
            raise RecipeError(f"'{method.name}' can be given once to a part")
    if "prefix" in names and "ptuning" in names:
        raise RecipeError("'prefix' and 'ptuning' both add prefix tokens: give a part one of them")


class _Reader:
    """Recursive-descent parser of one recipe. A method reads its rule of the grammar and moves `position`.

    Attributes:
        position: index of the next character; a column in a message is one more.
    """

    _WORD = re.compile(r"[A-Za-z0-9_.\-]+")
    _BLANK = re.compile(r"[ \t\r\n]*")
    # numbers of bounded length: Python refuses to convert very long ones, and none is meaningful
    _INT = re.compile(r"-?[0-9]{1,8}")
    _NUMBER = re.compile(r"-?[0-9]{1,32}(\.[0-9]{1,32})?([eE]-?[0-9]{1,4})?")

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def recipe(self) -> Recipe:
        if not self.text.strip():
            raise RecipeError(f"the recipe is empty; give a preset ({', '.join(METHODS)}, ...) or part=method")
        parts: dict[str, tuple[Method, ...]] = {}
        optional: set[str] = set()
        # recipe := methods | entry ("," entry)*
        # The first mark decides which: an `=` before any bracket belongs to an entry (vision=ln), an `=`
        # inside brackets to an option (lora(r=4)). Presets were replaced by their text before.
        if (mark := re.search(r"[=(\[]", self.text)) and mark.group() == "=":
            while True:
                # entry := part ("+" part)* "=" methods
                for column, part, is_optional in (names := self.part_names()):
                    if part in parts or [name for _, name, _ in names].count(part) > 1:
                        raise self.error(f"part '{part}' is given twice", column)
                    if is_optional:
                        optional.add(part)
                self.expect("=", "after the part's name")
                methods = self.methods(())
                parts.update((part, methods) for _, part, _ in names)
                if not self.accept(","):
                    break
        else:
            parts["all"] = self.methods(PRESETS)
        self.skip_blanks()
        if self.position < len(self.text):
            raise self.error(f"unexpected '{shorten(self.text[self.position])}'", self.position)
        return Recipe(tuple(parts.items()), frozenset(optional))

    def part_names(self) -> list[tuple[int, str, bool]]:
        """(index, part, whether it is written `part?`) of each part in front of one `=`."""
        # part ["?"] ("+" part ["?"])*
        names = []
        while True:
            column, word = self.word("a part")
            self.call(column, _check_part, word)
            names.append((column, word, self.accept("?")))
            if not self.accept("+"):
                return names

    def methods(self, suggestions: Iterable[str]) -> tuple[Method, ...]:
        """Methods joined by `+`; `suggestions` are further words that an error may suggest."""
        # methods := method ("+" method)*
        first, frozen = self.position, False
        methods: list[Method] = []
        while True:
            # method := NAME options layers
            column, name = self.word("a method")
            if name not in METHODS:
                words = (*METHODS, *suggestions)
                hint = did_you_mean(name.lower(), words) or f" (methods: {', '.join(METHODS)})"
                if name in PARTS or name == "all":
                    hint = f": it is a part, write {name}=METHOD"
                raise self.error(f"unknown method '{shorten(name)}'{hint}", column)
            options, layers = self.options(name), self.layers()
            if name == "frozen" and not layers and not methods:
                frozen = True  # the absence of methods; `Method` refuses frozen anywhere else
            else:
                methods.append(self.call(column, Method, name, options, layers))
            if not self.accept("+"):
                break
        if frozen and methods:
            raise self.error("'frozen' can't be joined with other methods", first)
        self.call(first, _check_combination, tuple(methods))
        return tuple(methods)

    def options(self, method: str) -> tuple[tuple[str, Value], ...]:
        """`(name=value,...)`, or nothing."""
        # ["(" NAME "=" value ("," NAME "=" value)* ")"]
        if not self.accept("("):
            return ()
        options: list[tuple[str, Value]] = []
        while True:
            column, name = self.word("an option")
            if name in dict(options):
                raise self.error(f"option '{shorten(name)}' is given twice", column)
            self.expect("=", "after the option's name")
            # value := NUMBER | WORD ("+" WORD)*
            value_column, word = self.word("a value")
            value: Value = word
            if self._INT.fullmatch(word):
                value = int(word)
            elif self._NUMBER.fullmatch(word):
                value = float(word)
            while self.accept("+"):
                value = f"{value}+{self.word('a name')[1]}"
            self.call(value_column if isinstance(value, str) else column, check_option, method, name, value)
            options.append((name, value))
            if not self.accept(","):
                self.expect(")", "at the end of the options")
                return tuple(options)

    def layers(self) -> tuple[int | None, int | None] | None:
        """`[start:stop]`, or nothing."""
        # ["[" [INT] ":" [INT] "]"]
        if not self.accept("["):
            return None
        bounds: list[int | None] = []
        for end in (":", "]"):
            self.skip_blanks()
            if (match := self._INT.match(self.text, self.position)) is not None:
                self.position = match.end()
            bounds.append(int(match.group()) if match else None)
            self.expect(end, "in a layer range, written [16:], [:8] or [4:8]")
        return bounds[0], bounds[1]

    def skip_blanks(self) -> None:
        match = self._BLANK.match(self.text, self.position)
        assert match is not None
        self.position = match.end()

    def word(self, expected: str) -> tuple[int, str]:
        """(index, word) of the next word; `expected` describes it in an error."""
        self.skip_blanks()
        match = self._WORD.match(self.text, self.position)
        if match is None:
            got = f"'{shorten(self.text[self.position])}'" if self.position < len(self.text) else "the end"
            raise self.error(f"expected {expected}, got {got}", self.position)
        self.position = match.end()
        return match.start(), match.group()

    def accept(self, mark: str) -> bool:
        """Move past the mark if it comes next; returns whether it did."""
        self.skip_blanks()
        is_next = self.text.startswith(mark, self.position)
        self.position += len(mark) if is_next else 0
        return is_next

    def expect(self, mark: str, where: str) -> None:
        if not self.accept(mark):
            got = f"'{shorten(self.text[self.position])}'" if self.position < len(self.text) else "the end"
            raise self.error(f"expected '{mark}' {where}, got {got}", self.position)

    def call(self, column: int, function: Callable[..., T], *values: object) -> T:
        """Call a function; if it raises a RecipeError, add the column to its message."""
        try:
            return function(*values)
        except RecipeError as error:
            raise self.error(str(error), column) from None

    def error(self, what: str, column: int) -> RecipeError:
        return RecipeError(f"{what} (column {column + 1} of recipe '{shorten(self.text)}')")

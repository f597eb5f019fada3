"""The recipes that a grid names: presets, names of the study's own, texts, and `frozen-*-ln` for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from normtune.errors import InputError
from normtune.methods.presets import PRESETS
from normtune.methods.recipe import Recipe, parse
from normtune.methods.registry import LEARNING_RATES

FROZEN = "frozen"


def expanded(names: Sequence[str], own: Mapping[str, str]) -> dict[str, str]:
    """Name -> the recipe's text as parsed, in the order given; a wildcard stands for the presets that fit it.

    Raises:
        InputError: a recipe that cannot be read, a wildcard that fits none, or two names for one recipe.
    """
    found: dict[str, str] = {}
    for name in names:
        for one in _fitting(name):
            found[one] = str(parse(own.get(one, one)))
    by_text: dict[str, str] = {}
    for name, text in found.items():
        if (other := by_text.setdefault(text, name)) != name:
            raise InputError(f"'{other}' and '{name}' are one recipe ({text}): name it once")
    return found


def _fitting(name: str) -> list[str]:
    if "*" not in name:
        return [name]
    found = [preset for preset in PRESETS if fnmatchcase(preset, name)]
    if not found:
        raise InputError(f"no preset fits '{name}'")
    return found


def methods(recipe: Recipe) -> list[str]:
    """The methods of a recipe, each once, in its order; none of the frozen base."""
    return list(dict.fromkeys(method.name for _, several in recipe.parts for method in several))


def default_rates(text: str) -> dict[str, float]:
    """Each method's default learning rate."""
    return {method: LEARNING_RATES[method] for method in methods(parse(text))}

"""The recipes that a grid names: presets, names that the study's file defines, recipe texts, and wildcards.

A wildcard such as `frozen-*-ln` names every preset that matches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from normtune.errors import InputError
from normtune.methods.presets import PRESETS
from normtune.methods.recipe import Recipe, parse
from normtune.methods.registry import LEARNING_RATES

FROZEN = "frozen"  # the recipe that trains nothing


def expand_recipes(names: Sequence[str], study_recipes: Mapping[str, str]) -> dict[str, str]:
    """The text of each recipe as parsed, by name, in the order of `names`; wildcards are expanded to presets.

    Args:
        names: what a grid lists under `recipes`.
        study_recipes: the recipes that the study's file defines, by name.

    Raises:
        InputError: a recipe is not valid, a wildcard matches no preset, or two names mean the same recipe.
    """
    texts: dict[str, str] = {}
    for name in names:
        for recipe in _matching_presets(name):
            texts[recipe] = str(parse(study_recipes.get(recipe, recipe)))
    by_text: dict[str, str] = {}
    for name, text in texts.items():
        if (other := by_text.setdefault(text, name)) != name:
            raise InputError(f"'{other}' and '{name}' are the same recipe ({text}): keep one")
    return texts


def _matching_presets(name: str) -> list[str]:
    """The presets that match a wildcard; a name without `*` is returned as it is."""
    if "*" not in name:
        return [name]
    presets = [preset for preset in PRESETS if fnmatchcase(preset, name)]
    if not presets:
        raise InputError(f"no preset matches '{name}'")
    return presets


def recipe_methods(recipe: Recipe) -> list[str]:
    """The methods of a recipe in its order, without repetition; an empty list for the frozen base."""
    return list(dict.fromkeys(method.name for _, methods in recipe.parts for method in methods))


def default_rates(text: str) -> dict[str, float]:
    """The default learning rate of each method of a recipe."""
    return {method: LEARNING_RATES[method] for method in recipe_methods(parse(text))}

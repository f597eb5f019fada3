"""Which of a model's own tensors a recipe trains."""

from __future__ import annotations

from normtune.anatomy import Anatomy, Place
from normtune.methods import INTRINSIC, Method, RecipeError
from normtune.recipe import Recipe


def trainable(base: Anatomy, recipe: Recipe) -> list[str]:
    """Names of the parameters that the intrinsic methods of a resolved recipe train, in the model's order.

    Raises:
        RecipeError: a method finds nothing in a part that is not optional.
    """
    chosen: set[str] = set()
    for part, methods in recipe.parts:
        for method in methods:
            if method.name not in INTRINSIC:
                continue
            found = [
                place.name for place in base.places if place.part == part and _takes(method, place, base)
            ]
            if not found and part not in recipe.optional:
                raise RecipeError(_nothing(base, part, method))
            chosen.update(found)
    return [place.name for place in base.places if place.name in chosen]


def _takes(method: Method, place: Place, base: Anatomy) -> bool:
    if method.layers is not None and place.layer not in method.layer_range(base.depth(place.part)):
        return False
    if method.name == "bias":
        return place.is_bias
    if method.name == "ln":
        return place.role == "norm" and bool(method.option("bias" if place.name.endswith("bias") else "gain"))
    return method.name == "full" or place.role == method.name


def _nothing(base: Anatomy, part: str, method: Method) -> str:
    """What was asked, what there is, and what to do."""
    alone = Method(method.name, method.options)
    elsewhere = [
        other
        for other in base.parts
        if any(place.part == other and _takes(alone, place, base) for place in base.places)
    ]
    if method.layers is not None and part in elsewhere:
        return f"'{method}' finds nothing: part '{part}' has {base.depth(part)} layers. Change the range"
    having = f"parts that have some: {', '.join(elsewhere)}" if elsewhere else "no part of this model has any"
    return (
        f"'{method}' finds nothing in part '{part}'; {having}. "
        f"Change the recipe, write '{part}?' to skip it, or run normtune inspect"
    )

from __future__ import annotations

import pytest

from normtune.methods.recipe import parse, resolve
from normtune.methods.registry import METHODS
from normtune.studies.page.palette import COLOURS, FAMILIES, parts_of, recipe_family

PARTS = ("vision", "encoder", "decoder")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_family_with_a_mark(method: str) -> None:
    family = recipe_family(str(resolve(parse(f"all={method}"), PARTS)))
    assert family in FAMILIES and family != "mixed"


def test_every_family_has_its_own_colour_and_shape() -> None:
    for shape in ("marker", "character", "label"):
        assert (
            len({getattr(family, shape) for name, family in FAMILIES.items() if name != "frozen"}) == len(FAMILIES) - 1
        )
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_a_recipe_of_several_methods_is_mixed() -> None:
    assert recipe_family("vision=ln,decoder=lora(r=4,alpha=32)") == "mixed"
    assert recipe_family("vision=frozen,decoder=prefix") == "prefix"
    assert recipe_family("") == "frozen"


def test_the_parts_of_a_recipe_keep_their_options() -> None:
    parts = parts_of("vision=frozen,encoder?=lora(r=4,alpha=32)[2:]+ln,decoder=ffn")
    assert parts == {"vision": "frozen", "encoder": "lora(r=4,alpha=32)[2:]+ln", "decoder": "ffn"}


def _luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize(("theme", "page"), [(0, "#fcfcfb"), (1, "#16181b")])
def test_colours_contrast_with_the_page(name: str, theme: int, page: str) -> None:
    """WCAG 2.2, criterion 1.4.11: a contrast of at least 3:1 for graphics."""
    light, dark = sorted((_luminance(COLOURS[name][theme]), _luminance(page)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3

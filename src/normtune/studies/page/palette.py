"""Colours and shapes of marks: one for each family of methods, the same in all figures and themes.

The hues differ for the common kinds of colour blindness (after Okabe and Ito 2008) and have a contrast of at
least 3:1 against the page. Each family also has its own shape, so that no figure depends on colour only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from normtune.methods.registry import OUTPUT_VECTORS, PEFT_VECTORS


class Family(NamedTuple):
    """How the methods of a family are drawn."""

    label: str  # in the legend
    light: str  # colour in the light theme
    dark: str
    marker: str  # matplotlib's
    character: str  # the mark in the legend


FAMILIES = {
    "ln": Family("norms", "#0a5fa5", "#5fb0f0", "o", "●"),
    "full": Family("full", "#c24a00", "#ff8f52", "s", "■"),
    "lora": Family("LoRA", "#00795a", "#3cc79c", "^", "▲"),
    "attention": Family("attention", "#a33c7c", "#e48fc2", "D", "◆"),
    "ffn": Family("feed-forward", "#8c6a00", "#e0b84a", "v", "▼"),
    "prefix": Family("prefix, P-Tuning", "#2c8db8", "#9fdcf5", "<", "◄"),
    "other": Family("vectors, adapter, bias", "#75604f", "#c4ac97", ">", "►"),
    "mixed": Family("several methods", "#3b3b40", "#d8d8dc", "P", "✚"),
    "frozen": Family("frozen base", "#77777d", "#97979e", "o", "●"),
}
THEME = {  # the page's other colours, in the light and in the dark theme
    "page": ("#fcfcfb", "#16181b"),
    "ink": ("#1b1c1f", "#e9eaec"),
    "quiet": ("#5d6068", "#a5a9b1"),
    "rule": ("#d9dade", "#3a3d43"),
    "grid": ("#e7e8ea", "#2a2d32"),
    "wash": ("#f2f3f4", "#202328"),
    "shade": ("#0a5fa4", "#6fbcf7"),
    "edge": ("#8a8f98", "#7d828b"),
    "alert": ("#a02c1c", "#ff9b86"),
}
COLOURS = {name: (family.light, family.dark) for name, family in FAMILIES.items()}
# Methods that share a family; any other method is a family of its own.
_FAMILY_OF = {"ptuning": "prefix", "ia3": "other", "adapter": "other", "bias": "other"}
_FAMILY_OF |= dict.fromkeys((*PEFT_VECTORS, *OUTPUT_VECTORS), "other")
_METHODS = re.compile(r"(?:^|\+) *([a-z_0-9]+)")  # the names of methods in a text such as `attention+lora(r=4)`


def parts_of(resolved: str) -> dict[str, str]:
    """The methods of each part of a resolved recipe: `vision=frozen,language=lora(r=4)` as a dict by part."""
    return dict(re.findall(r"([a-z]+)\??=((?:[^,(]|\([^)]*\))*)", resolved))


def recipe_family(resolved: str) -> str:
    """The family of a resolved recipe's method; `mixed` if it has methods of several families."""
    methods = {method for text in parts_of(resolved).values() for method in _METHODS.findall(text)} - {"frozen"}
    families = {_FAMILY_OF.get(method, method) for method in methods}
    if not families:
        return "frozen"
    family_name = families.pop() if len(families) == 1 else "mixed"
    return family_name if family_name in COLOURS else "other"


def css_variables(theme: int) -> str:
    """The colours of the light (0) or dark (1) theme as CSS declarations."""
    return "".join(f"--{name}:{pair[theme]};" for name, pair in {**THEME, **COLOURS}.items())

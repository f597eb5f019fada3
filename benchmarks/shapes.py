"""The shapes that the benchmarks can measure, by name."""

from __future__ import annotations

from shape import Shape
from shape_llava import LlavaShape
from shape_miss import MissShape

SHAPES: dict[str, Shape] = {"miss": MissShape(), "llava": LlavaShape()}

"""Processors for images alone: transformers' video processors need torchvision, which nothing here does."""

from __future__ import annotations

from typing import Any


def image_only(processor_class: Any, source: str) -> Any:
    """The processor of a checkpoint without its video processor; it is saved under its own name."""

    class ImageOnly(processor_class):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

    ImageOnly.__name__ = processor_class.__name__
    return ImageOnly.from_pretrained(source)

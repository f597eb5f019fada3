"""Processors without their video part, which needs torchvision, and a check of what tokenizers need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.errors import InputError


def load_processor(source: str, processor_class: Any, image_processor_class: Any) -> Any:
    """Load a checkpoint's processor without its video part.

    Args:
        source: a local directory or a hub name.
        processor_class: the class of the processor; None: transformers chooses it, with its video part.
        image_processor_class: a class that needs no torchvision, in place of the processor's own; None: its own.
    """
    from transformers import AutoProcessor, AutoTokenizer

    if processor_class is None:
        return AutoProcessor.from_pretrained(source)
    if image_processor_class is None:
        return without_videos(processor_class).from_pretrained(source)
    settings, _ = processor_class.get_processor_dict(source)
    parts = [image_processor_class.from_pretrained(source), AutoTokenizer.from_pretrained(source)]
    return processor_class.from_args_and_dict(parts, settings)


def without_videos(processor_class: Any) -> Any:
    """A subclass without video processor. It has the same name, so that saved files refer to transformers' class."""

    class ImageOnly(processor_class):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

    ImageOnly.__name__ = processor_class.__name__
    return ImageOnly


def check_sentencepiece(directory: Path, advice: str) -> None:
    """Check that transformers can read a tokenizer that consists of sentencepiece's file only.

    Args:
        directory: the checkpoint's directory.
        advice: a sentence for the error message: what to do instead of installing the packages.

    Raises:
        InputError: the tokenizer needs packages that are not installed.
    """
    file = directory / "tokenizer.model"
    if (directory / "tokenizer.json").is_file() or not file.is_file():
        return
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise InputError(f"{file} needs two packages: pip install sentencepiece protobuf. {advice}")

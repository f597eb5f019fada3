from __future__ import annotations

from PIL import Image

from normtune.data.records import Dataset, Example
from normtune.models.types import Pixels
from normtune.training.collator import count_tokens
from tests.support.tiny_miss import SIZE, tiny_miss


def test_tokens_are_counted_from_image_sizes_and_segments() -> None:
    family = tiny_miss()
    sizes = {"a": (50, 40), "b": (50, 40), "c": (30, 60)}
    views = {"1": ("a",), "2": ("a",), "3": ("b",), "4": ("a", "c"), "5": ("c", "b")}
    examples = [Example(id, keys, "is it left ?", "yes", "closed", "train") for id, keys in views.items()]
    opened: list[str] = []
    processed: list[tuple[int, int]] = []
    pixels = family.preprocess_image

    def open_image(key: str) -> Image.Image:
        opened.append(key)
        return Image.new("RGB", sizes[key])

    def counting(image: Image.Image) -> Pixels:
        processed.append(image.size)
        return pixels(image)

    family.preprocess_image = counting  # type: ignore[method-assign]
    segment = family.tokenize("0", "is it left ?", "yes")
    dataset = Dataset("views", examples, open_image)
    counts = count_tokens(family, dataset, examples, lambda example: segment)
    states = 1 + (SIZE // 16) ** 2
    assert counts.prefixes == {keys: states * len(keys) for keys in views.values()}
    assert counts.segments == dict.fromkeys(views, len(segment))
    assert counts.cost_of(examples[:2]) == states + 2 * len(segment)
    assert opened == ["a", "b", "a", "c", "c", "b"] and len(processed) == 1 + 2 + 2
    family.shares_prefix = False  # type: ignore[misc]
    separate = count_tokens(family, dataset, examples, lambda example: segment)
    assert separate.cost_of(examples[:2]) == 2 * (states + len(segment))

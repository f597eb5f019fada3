"""Images of the next batches are read in the background, in the same order and with the same results."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from normtune.data.batches import EpochBatches
from normtune.data.records import Dataset
from normtune.data.registry import open_dataset
from normtune.errors import InputError
from normtune.models import image_cache
from normtune.models.image_cache import ImageCache
from normtune.runtime import distributed
from normtune.training.objective import LookaheadBatches, worker_count
from normtune.training.train import train
from tests.training.test_train import config, equal_adapters

EXAMPLES = open_dataset("phantom-b:8").split("train")


class SizeFamily:
    """Preprocesses an image to its size, and notes the thread."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.threads: list[str] = []

    def preprocess_image(self, image: Image.Image) -> dict[str, Tensor]:
        self.threads.append(threading.current_thread().name)
        return {"size": torch.tensor(image.size)}


def picture(key: str) -> Image.Image:
    if key == "bad":
        raise OSError("broken")
    return Image.new("RGB", (int(key), 1))


def cache(**options: Any) -> ImageCache:
    family: Any = SizeFamily()
    return ImageCache(family, Dataset("sizes", [], picture), **options)


def test_batches_are_the_same_and_prepared_in_advance() -> None:
    plain = EpochBatches(EXAMPLES, 8, None, 0)
    prepared: list[Any] = []
    ahead: list[int] = []
    batches = LookaheadBatches(plain, prepared.append)
    taken = []
    for groups in batches:
        taken.append(groups)
        ahead.append(len(prepared) - len(taken))
    assert taken == prepared == list(plain) and len(batches) == len(plain) == len(taken) > 3
    assert ahead[0] == 2 and ahead[-1] == 0
    assert batches.ranks == 1


def test_each_process_prepares_its_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EpochBatches(EXAMPLES, 4, None, 0, ranks=2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    prepared: list[Any] = []
    assert list(LookaheadBatches(plain, prepared.append)) == list(plain)
    assert prepared == list(plain)[1::2]


def test_prefetched_images_are_read_once_in_another_thread() -> None:
    images = cache()
    images.prefetch(["3", "4"], workers=1)
    assert [int(images(key)["size"][0]) for key in ("3", "4", "5", "3")] == [3, 4, 5, 3]
    threads: list[str] = images.family.threads  # type: ignore[attr-defined]
    assert [name.startswith("images") for name in threads] == [True, True, False]


def test_a_broken_image_is_reported_when_it_is_needed() -> None:
    images = cache()
    images.prefetch(["bad", "3"], workers=1)
    assert int(images("3")["size"][0]) == 3
    with pytest.raises(InputError, match="cannot read image bad of dataset sizes"):
        images("bad")


def test_images_that_are_never_needed_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "PENDING_IMAGES", 2)
    images = cache()
    images.prefetch(map(str, range(1, 9)), workers=1)
    assert len(images._pending) == 2 and int(images("1")["size"][0]) == 1


def test_workers_change_no_value(base: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        train(config(base, tmp_path / str(workers), workers=workers, epochs=1))
    equal_adapters(tmp_path / "0", tmp_path / "2")


def test_the_default_is_none_on_a_cpu() -> None:
    assert (worker_count(None, "cpu"), worker_count(None, "cuda")) == (0, 2)
    assert (worker_count(3, "cpu"), worker_count(0, "cuda")) == (3, 0)

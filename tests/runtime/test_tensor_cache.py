"""Cache entries are complete, can be shared between processes, and never stop a run."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from normtune.errors import InputError
from normtune.runtime import files
from normtune.runtime.tensor_cache import TensorCache, digest

ENTRY = {
    "states": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "grid": torch.tensor([1, 2, 3]),
    "count": torch.tensor(4),
    "nothing": torch.empty(5, 0),
}


def equal(tensors: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    return (
        tensors is not None
        and tensors.keys() == expected.keys()
        and all(
            tensors[name].dtype == expected[name].dtype and torch.equal(tensors[name], expected[name])
            for name in expected
        )
    )


def test_an_entry_is_read_bit_for_bit_by_another_cache_of_the_folder(tmp_path: Path) -> None:
    TensorCache(tmp_path / "cache").write("a", ENTRY)
    cache = TensorCache(tmp_path / "cache")
    assert equal(cache.read("a"), ENTRY) and cache.read("b") is None
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.safetensors"]


def test_views_and_transposed_tensors_are_written_with_their_values(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    entry = {"row": matrix[1], "same": matrix[1], "turned": matrix.T}
    cache = TensorCache(tmp_path)
    cache.write("a", entry)
    assert equal(cache.read("a"), entry)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty", "text"])
def test_a_damaged_entry_is_missing_and_can_be_written_again(tmp_path: Path, damage: str) -> None:
    cache = TensorCache(tmp_path)
    cache.write("a", ENTRY)
    path = tmp_path / "a.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-1] ^= 1
    path.write_bytes({"cut short": content[:-4], "one bit": content, "empty": b"", "text": b"not tensors"}[damage])
    assert cache.read("a") is None
    cache.write("a", ENTRY)
    assert equal(cache.read("a"), ENTRY)


def test_an_interrupted_write_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache(tmp_path)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "replace", killed)
        cache.write("a", ENTRY)
    assert cache.read("a") is None and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_logged_once_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path)
    cache.write("before", ENTRY)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", full)
        cache.write("a", ENTRY)
        cache.write("b", ENTRY)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no more entries are written" in caplog.text and "No space left" in caplog.text
    assert equal(cache.read("before"), ENTRY) and cache.read("a") is None


def test_a_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot create the cache .* Choose another --cache"):
        TensorCache(tmp_path / "file" / "cache")


def _write_often(folder: Path) -> None:
    torch.set_num_threads(1)
    cache = TensorCache(folder)
    for _ in range(20):
        cache.write("a", ENTRY)


def test_a_reader_reads_complete_entries_while_another_process_writes(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.write("a", ENTRY)
    other = multiprocessing.get_context("spawn").Process(target=_write_often, args=(tmp_path,))
    other.start()
    while other.is_alive():
        assert equal(cache.read("a"), ENTRY)
        cache.write("a", ENTRY)
    assert other.exitcode == 0 and equal(cache.read("a"), ENTRY)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_digest_depends_on_names_shapes_dtypes_and_every_value() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    changed = torch.zeros(2, 3)
    changed[1, 2] = 1e-30
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(2, 3).to(torch.int32), "b": torch.ones(2)},
        {"a": changed, "b": torch.ones(2)},
        {"b": torch.ones(2)},
    ]
    digests = {digest(base), digest(base, "word"), digest(base, "wor", "d"), *map(digest, others)}
    assert len(digests) == len(others) + 3 and digest(base) == digest({k: v.clone() for k, v in base.items()})

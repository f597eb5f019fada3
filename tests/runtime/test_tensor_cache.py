"""Entries on disk: whole, shared, and never fatal."""

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


def equal(found: dict[str, Tensor] | None, wanted: dict[str, Tensor]) -> bool:
    return (
        found is not None
        and found.keys() == wanted.keys()
        and all(
            found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name])
            for name in wanted
        )
    )


def test_an_entry_comes_back_to_the_bit_from_another_store_of_the_folder(tmp_path: Path) -> None:
    TensorCache(tmp_path / "cache").write("a", ENTRY)
    store = TensorCache(tmp_path / "cache")
    assert equal(store.read("a"), ENTRY) and store.read("b") is None
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.safetensors"]


def test_views_and_transposed_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    entry = {"row": whole[1], "same": whole[1], "turned": whole.T}
    store = TensorCache(tmp_path)
    store.write("a", entry)
    assert equal(store.read("a"), entry)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty", "text"])
def test_a_damaged_entry_is_absent_and_is_written_anew(tmp_path: Path, damage: str) -> None:
    store = TensorCache(tmp_path)
    store.write("a", ENTRY)
    path = tmp_path / "a.safetensors"
    held = bytearray(path.read_bytes())
    if damage == "one bit":
        held[-1] ^= 1
    path.write_bytes({"cut short": held[:-4], "one bit": held, "empty": b"", "text": b"not tensors"}[damage])
    assert store.read("a") is None
    store.write("a", ENTRY)
    assert equal(store.read("a"), ENTRY)


def test_an_interrupted_write_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TensorCache(tmp_path)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "replace", killed)
        store.write("a", ENTRY)
    assert store.read("a") is None and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = TensorCache(tmp_path)
    store.write("before", ENTRY)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", full)
        store.write("a", ENTRY)
        store.write("b", ENTRY)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "takes no more" in caplog.text and "No space left" in caplog.text
    assert equal(store.read("before"), ENTRY) and store.read("a") is None


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot make the cache .* Choose another --cache"):
        TensorCache(tmp_path / "file" / "cache")


def _write_often(folder: Path) -> None:
    torch.set_num_threads(1)
    store = TensorCache(folder)
    for _ in range(20):
        store.write("a", ENTRY)


def test_a_reader_sees_whole_entries_while_another_process_writes(tmp_path: Path) -> None:
    store = TensorCache(tmp_path)
    store.write("a", ENTRY)
    other = multiprocessing.get_context("spawn").Process(target=_write_often, args=(tmp_path,))
    other.start()
    while other.is_alive():
        assert equal(store.read("a"), ENTRY)
        store.write("a", ENTRY)
    assert other.exitcode == 0 and equal(store.read("a"), ENTRY)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_digest_tells_names_shapes_dtypes_and_single_values_apart() -> None:
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
    found = {digest(base), digest(base, "word"), digest(base, "wor", "d"), *map(digest, others)}
    assert len(found) == len(others) + 3 and digest(base) == digest({k: v.clone() for k, v in base.items()})

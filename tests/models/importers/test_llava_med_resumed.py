"""An interrupted import of LLaVA-Med resumes and writes the same files; one tensor is in memory at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from normtune.errors import InputError
from normtune.models.checkpoints.reader import OriginalCheckpoint
from normtune.models.checkpoints.writer import PlannedTensor, plan_shards, write_safetensors
from normtune.models.importers.llava_med.importer import import_llava_med
from tests.support.llava_med_original import HEADS, OriginalModel, make_original, write_original


@pytest.fixture(scope="module")
def original() -> OriginalModel:
    return make_original()


SMALL = 20_000  # bytes a shard: about ten of them


def contents(out: Path) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in out.iterdir()}
    report = json.loads(files.pop("import_report.json"))
    return {**files, "import_report.json": json.dumps({**report, "out": ""}).encode()}


@pytest.fixture(scope="module")
def complete(original: OriginalModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """(a checkpoint, the files of an import without interruption)."""
    folder = tmp_path_factory.mktemp("complete")
    source = write_original(folder / "src", original)
    report = import_llava_med(str(source), folder / "out", shard_bytes=SMALL, **HEADS)
    assert len(report.shards) > 8 and report.kept == 0
    return source, contents(folder / "out")


@pytest.mark.parametrize("after", [0, 1, 30, 60, 200])
def test_an_interrupted_import_resumes_and_writes_the_same_files(
    complete: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    source, expected = complete
    count, read = 0, OriginalCheckpoint.get_tensor

    def interrupted(self: OriginalCheckpoint, name: str) -> Tensor:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(OriginalCheckpoint, "get_tensor", interrupted)
    options: dict[str, Any] = {"shard_bytes": SMALL, **HEADS}
    if after < 100:
        with pytest.raises(KeyboardInterrupt):
            import_llava_med(str(source), tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    report = import_llava_med(str(source), tmp_path / "out", **options)
    assert contents(tmp_path / "out") == expected and not (tmp_path / "out.partial").exists()
    assert (report.kept > 0) is (after in (30, 60))


KILLED = """
import os, signal, sys
from pathlib import Path
from normtune.models.importers.llava_med import importer

def tick(done, total):
    if done > total // 2:
        open(Path(sys.argv[2] + ".partial") / ".model-00009.safetensors.1.tmp", "wb").close()
        os.kill(os.getpid(), signal.SIGKILL)

source, out, size = sys.argv[1:]
importer.import_llava_med(source, Path(out), vision_heads=2, shard_bytes=int(size), on_progress=tick)
"""


def test_a_killed_import_keeps_complete_shards_and_rewrites_damaged_ones(
    complete: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, expected = complete
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, source, out, str(SMALL)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    shards = sorted((tmp_path / "out.partial").glob("model-*"))
    assert 3 < len(shards) < len(expected)
    damaged = bytearray(shards[1].read_bytes())
    damaged[-1] ^= 1
    shards[1].write_bytes(damaged)
    before = shards[0].stat().st_ino
    report = import_llava_med(str(source), out, shard_bytes=SMALL, **HEADS)
    assert contents(out) == expected and report.kept == len(shards) - 1
    assert (out / shards[0].name).stat().st_ino == before, "a complete shard is not written again"


def test_a_partial_import_of_another_checkpoint_is_refused(
    complete: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = complete
    monkeypatch.setattr(os, "replace", stop_at_the_end(os.replace))
    with pytest.raises(KeyboardInterrupt):
        import_llava_med(str(source), tmp_path / "out", shard_bytes=SMALL, **HEADS)
    monkeypatch.undo()
    with pytest.raises(InputError, match="holds part of an import of another checkpoint, or with other options"):
        import_llava_med(str(source), tmp_path / "out", shard_bytes=2 * SMALL, **HEADS)
    changed = source.parent / "changed"
    if not changed.exists():
        write_original(changed, make_original())
    with pytest.raises(InputError, match="holds part of an import of another checkpoint"):
        import_llava_med(str(changed), tmp_path / "out", shard_bytes=SMALL, **HEADS)


def stop_at_the_end(replace: Callable[..., None]) -> Callable[..., None]:
    """`os.replace`, interrupted at the fourth shard."""

    def stopping(source: Any, target: Any) -> None:
        if "model-00004" in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    return stopping


def test_one_tensor_is_in_memory_at_a_time(
    original: OriginalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_original(tmp_path / "src", original, form="bin")
    alive: list[weakref.ref[Tensor]] = []
    most, read = 0, OriginalCheckpoint.get_tensor

    def watched(self: OriginalCheckpoint, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(OriginalCheckpoint, "get_tensor", watched)
    import_llava_med(str(source), tmp_path / "out", **HEADS)
    assert len(alive) > 40 and most == 1


def test_a_full_disk_is_reported_before_anything_is_written(
    original: OriginalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    source = write_original(tmp_path / "src", original)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"needs 0\.0 GB, but only 0\.0 GB are free"):
        import_llava_med(str(source), tmp_path / "out", **HEADS)
    assert not list((tmp_path / "out.partial").glob("model*"))


def test_a_shard_can_be_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(3, dtype=torch.int64),
        "half": torch.randn(3, 5).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "bytes": torch.arange(3, dtype=torch.uint8),
        "yes": torch.tensor([True, False]),
    }
    planned = [
        PlannedTensor(name, tensor.dtype, tuple(tensor.shape), "", lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in tensors.items()
    ]
    (shard,) = plan_shards([planned], 10**6)
    sha = write_safetensors(tmp_path / shard.file, shard.tensors)
    loaded = load_file(tmp_path / shard.file)
    assert loaded.keys() == tensors.keys() and len(sha) == 64
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    shards = plan_shards([planned, planned[:1], []], 40)
    assert [[tensor.name for tensor in shard.tensors] for shard in shards] == [
        ["number", "empty", "half"],
        ["turned"],
        ["bytes", "yes"],
        ["empty"],
    ]

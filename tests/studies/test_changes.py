"""Data or a base that changes after a study has run: what has changed runs again, the former files stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from normtune.errors import InputError
from normtune.studies import run as running
from normtune.studies.plan import plan
from normtune.studies.run import run_study, study_status
from normtune.studies.spec import Study, read_study
from tests.studies.test_run import run_in_this_process
from tests.support.tiny_miss import save_tiny_miss


def write_rows(folder: Path, split: str, answer: str) -> None:
    rows = [{"id": f"{split}{at}", "image": "a.png", "question": "Is it bright?", "answer": answer} for at in range(2)]
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of one recipe and the frozen base, which has run once."""
    monkeypatch.setattr(running, "get_executor", lambda on: run_in_this_process)
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (32, 32)).save(data / "a.png")
    for split in ("train", "validate", "test"):
        write_rows(data, split, "yes")
    save_tiny_miss(tmp_path / "base")
    (tmp_path / "study.yaml").write_text(
        f"study: tiny\nmodels: {{tiny: {{path: '{tmp_path / 'base'}'}}}}\n"
        f"datasets: {{own: {{data: jsonl, root: '{data}'}}}}\n"
        "grids: {main: {recipes: [frozen, ln], train: own, budget: {epochs: 1}}}\n",
        encoding="utf-8",
    )
    study = read_study(tmp_path / "study.yaml")
    assert run_study(study, tmp_path / "out", workers=1).ran == 2
    return study


def moved_folders(out: Path) -> set[str]:
    """The folders of cells and evaluations that were moved aside."""
    return {path.name.partition(".changed-")[0] for path in out.rglob("*.changed-1")}


def test_nothing_runs_again_if_nothing_has_changed(study: Study, tmp_path: Path) -> None:
    summary = run_study(study, tmp_path / "out", workers=1)
    assert (summary.ran, summary.changed, moved_folders(tmp_path / "out")) == (0, {}, set())


def test_other_training_rows_train_again(study: Study, tmp_path: Path) -> None:
    _, trained = plan(study).cells
    write_rows(tmp_path / "data", "train", "no")
    assert list(study_status(study, tmp_path / "out").changed) == [str(trained)]
    summary = run_study(study, tmp_path / "out", workers=1)
    assert summary.ran == 1 and "the rows of own (train)" in summary.changed[str(trained)]
    assert moved_folders(tmp_path / "out") == {trained.key}  # with its adapter
    assert run_study(study, tmp_path / "out", workers=1).ran == 0


def test_other_test_rows_are_answered_again_without_training(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = plan(study).cells
    write_rows(tmp_path / "data", "test", "no")
    monkeypatch.setattr("normtune.training.train.train", None)  # a call would fail
    summary = run_study(study, tmp_path / "out", workers=1)
    assert (summary.ran, summary.failed) == (2, {})
    assert list(summary.changed) == [str(cell) for cell in cells]
    assert moved_folders(tmp_path / "out") == {cell.evaluations[0].folder for cell in cells}
    rows = (tmp_path / "out" / "cells" / cells[1].key / "evaluations" / cells[1].evaluations[0].folder).glob("*.jsonl")
    assert json.loads(next(rows).read_text().splitlines()[0])["reference"] == "no"


def test_another_base_at_the_same_path_runs_everything_again(study: Study, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, {"format": "pt"})  # the same values in a newer file
    _age_results(tmp_path / "out")
    assert run_study(study, tmp_path / "out", workers=1).changed == {}
    save_file({name: tensor + torch.ones_like(tensor) for name, tensor in tensors.items()}, file, {"format": "pt"})
    summary = run_study(study, tmp_path / "out", workers=1)
    assert summary.ran == 2 and all("the base" in what for what in summary.changed.values())
    assert moved_folders(tmp_path / "out") == {cell.key for cell in plan(study).cells}


def _age_results(out: Path) -> None:
    """Let results be of yesterday: their times have whole seconds."""
    for path in out.glob("cells/*/result.json"):
        result: dict[str, Any] = json.loads(path.read_text())
        path.write_text(json.dumps({**result, "started": "2020-01-01T00:00:00+00:00"}))


def test_a_study_without_digests_is_kept(study: Study, tmp_path: Path) -> None:
    for path in (tmp_path / "out").glob("cells/*/inputs.json"):
        path.unlink()
    write_rows(tmp_path / "data", "train", "no")
    assert run_study(study, tmp_path / "out", workers=1).ran == 0


def test_data_that_cannot_be_opened_counts_as_unchanged(study: Study, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert run_study(study, tmp_path / "out", workers=1).ran == 0


def test_an_empty_result_says_the_way_out(study: Study, tmp_path: Path) -> None:
    for cell in plan(study).cells[::-1]:
        for damage in ("", "[]", "{}"):
            (tmp_path / "out" / "cells" / cell.key / "result.json").write_text(damage)
            with pytest.raises(InputError, match=r"result\.json.*Remove this file: the cell then runs again"):
                run_study(study, tmp_path / "out", workers=1)

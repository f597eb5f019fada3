"""Adapters are uploaded to a hub without texts, paths or hashes of rows, and loaded from it by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import normtune
from normtune.adapters.hub import local_folder, push
from normtune.adapters.storage import read_adapter_info
from tests.support.base_models import input_error
from tests.support.hub import Hub, hub_server

SECRET = "Mrs Example, born 1950"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield server


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter in `ln` and its scores in `scores`."""
    folder = tmp_path_factory.mktemp("run")
    data = {"data": "phantom-b:6", "progress": False}
    normtune.train(base, tune="ln", epochs=1, out=folder / "ln", **data)
    normtune.evaluate(base, split="train", adapter=folder / "ln", out=folder / "scores", **data)
    return folder


def test_what_is_uploaded_loads_by_name_and_has_no_texts_paths_or_hashes(
    run: Path, base: Path, hub: Hub, tmp_path: Path
) -> None:
    shutil.copytree(run / "ln", tmp_path / "ln")
    (tmp_path / "ln" / "predictions.jsonl").write_text(SECRET)
    uploaded = push(tmp_path / "ln", "user/ln", scores=[run / "scores"])
    files = hub.files["user/ln"]
    assert set(files) == {"adapter.json", "adapter.safetensors", "README.md", "scores.json"} == set(uploaded.files)
    assert hub.private["user/ln"] and uploaded.private and uploaded.url
    assert {"predictions.jsonl", "training_rows.json", "run.yaml", "train_config.json"} <= set(uploaded.left_out)
    rows = [json.loads(line) for line in (run / "scores" / "predictions.jsonl").read_text().splitlines()]
    everything = b"".join(files[name] for name in files if name != "adapter.safetensors").decode()
    for text in (SECRET, str(base.parent), str(run), *(row["question"] for row in rows)):
        assert text not in everything
    scores = json.loads(files["scores.json"])["scores"]
    assert scores["metrics"]["global_exact"]["rows"] == len(rows) and "data" not in scores and "strata" not in scores
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "library_name: normtune" in card and "global_exact" in card
    assert f"`{base.name}`" in card

    loaded = normtune.load_adapter(base, "user/ln")
    direct = normtune.load_adapter(base, run / "ln")
    assert all(torch.equal(loaded.trained[name], direct.trained[name]) for name in direct.trained)
    result = normtune.evaluate(base, "phantom-b:6", split="train", adapter="user/ln", progress=False)
    assert [prediction.text for prediction in result.predictions] == [row["prediction"] for row in rows]


def test_a_dry_run_uploads_nothing(run: Path, hub: Hub) -> None:
    listed = push(run / "ln", "user/ln", dry_run=True)
    assert hub.files == {} and listed.url is None and "nothing was uploaded" in str(listed)


def test_a_public_repository_is_used_only_with_public(run: Path, hub: Hub) -> None:
    push(run / "ln", "user/open", public=True)
    assert not hub.private["user/open"]
    assert "exists and is public" in input_error(lambda: push(run / "ln", "user/open"))
    assert not push(run / "ln", "user/open", public=True).private


def test_a_missing_adapter_and_a_wrong_name_are_input_errors(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no folder user/none" in input_error(lambda: local_folder("user/none"))
    assert "Give owner/name" in input_error(lambda: push(run / "ln", "ln"))
    assert "holds no scores" in input_error(lambda: push(run / "ln", "user/ln", scores=[write_json(tmp_path)]))
    (tmp_path / "runs").mkdir()
    assert local_folder("runs/lm") == Path("runs/lm")  # a misspelt folder is not looked up on the hub
    assert "is not a complete adapter" in input_error(lambda: read_adapter_info(local_folder("runs/lm")))


def write_json(folder: Path) -> Path:
    (folder / "metrics.json").write_text("{}")
    return folder

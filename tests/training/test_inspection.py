"""`inspect_model` counts a model from its config; the report is JSON and text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from normtune.errors import InputError
from normtune.training.inspection import inspect_model, inspect_text
from tests.support.base_models import save_base
from tests.support.base_models import tiny_base as tiny


@pytest.fixture(scope="module")
def miss(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_base("miss", tmp_path_factory.mktemp("inspected")))


def test_report_is_json_and_adds_up(miss: str) -> None:
    report = json.loads(json.dumps(inspect_model(miss)))
    assert report["total"] == sum(parameter.numel() for parameter in tiny("miss").parameters())
    assert sum(row["parameters"] for row in report["table"]) == report["total"]
    assert sum(row["percent"] for row in report["table"]) == pytest.approx(100)
    assert list(report["parts"]) == ["vision", "encoder", "decoder"]
    assert sum(report["parts"].values()) == report["total"]
    assert set(report["table"][0]) == {"part", "role", "tensors", "parameters", "percent"}
    assert "recipe" not in report


def test_recipe_is_counted_by_method(miss: str) -> None:
    recipe = inspect_model(miss, "encoder=ln,decoder=ln+lora(r=2)")["recipe"]
    assert recipe["by_method"] == {"ln": 2 * 16 * (7 + 8), "lora": 2 * 4 * 2 * 2 * 16}
    assert recipe["trainable"] == sum(recipe["by_method"].values())
    assert recipe["share"] == pytest.approx(recipe["trainable"] / recipe["total"])
    assert recipe["resolved"] == "vision=frozen,encoder=ln,decoder=ln+lora(r=2)"
    assert inspect_model(miss, "frozen")["recipe"]["trainable"] == 0


def test_changed_linears_are_counted_by_name(miss: str) -> None:
    report = inspect_model(miss, "decoder=lora(targets=query+attention.output.dense)")
    # of self- and cross-attention in two layers; cross-attention's output is `crossattention.output.dense`
    assert report["recipe"]["linears"] == {"query": 4, "dense": 2}
    assert "changes 6 linears: query (4), dense (2)" in inspect_text(report)


def test_text_shows_every_part_and_the_recipe(miss: str) -> None:
    text = inspect_text(inspect_model(miss, "ln"))
    lines = text.splitlines()
    assert len({len(line) for line in lines[2 : lines.index("", 2)]}) == 1  # the table is aligned
    for word in ("vision", "encoder", "decoder", "norm", "attention", "ffn", "embedding", "head"):
        assert word in text
    trained = 2 * 16 * (5 + 7 + 8)
    assert f"trains {trained:,} of" in lines[-1]
    assert "recipe ln -> vision?=ln,encoder?=ln,decoder?=ln" in text
    assert not any(line.startswith("recipe") for line in inspect_text(inspect_model(miss)).splitlines())


def test_architecture_is_counted_without_weights() -> None:
    report = inspect_model("miss-base", "ln")
    assert report["total"] == 361_478_972
    assert report["recipe"]["trainable"] == 153_600
    assert "= 0.0425% in 200 tensors" in inspect_text(report)


def test_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        inspect_model(str(tmp_path))

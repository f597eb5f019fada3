"""Inspection counts a model from its config and prints it for people and programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from normtune.errors import InputError
from normtune.training.inspection import inspect_text, inspection
from tests.support.base_models import base as tiny
from tests.support.base_models import save_base


@pytest.fixture(scope="module")
def miss(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_base("miss", tmp_path_factory.mktemp("inspected")))


def test_an_inspection_is_json_that_adds_up(miss: str) -> None:
    found = json.loads(json.dumps(inspection(miss)))
    assert found["total"] == sum(parameter.numel() for parameter in tiny("miss").parameters())
    assert sum(row["parameters"] for row in found["table"]) == found["total"]
    assert sum(row["percent"] for row in found["table"]) == pytest.approx(100)
    assert list(found["parts"]) == ["vision", "encoder", "decoder"]
    assert sum(found["parts"].values()) == found["total"]
    assert set(found["table"][0]) == {"part", "role", "tensors", "parameters", "percent"}
    assert "recipe" not in found


def test_a_recipe_is_counted_by_method(miss: str) -> None:
    recipe = inspection(miss, "encoder=ln,decoder=ln+lora(r=2)")["recipe"]
    assert recipe["by_method"] == {"ln": 2 * 16 * (7 + 8), "lora": 2 * 4 * 2 * 2 * 16}
    assert recipe["trainable"] == sum(recipe["by_method"].values())
    assert recipe["share"] == pytest.approx(recipe["trainable"] / recipe["total"])
    assert recipe["resolved"] == "vision=frozen,encoder=ln,decoder=ln+lora(r=2)"
    assert inspection(miss, "frozen")["recipe"]["trainable"] == 0


def test_the_text_shows_every_part_and_what_would_train(miss: str) -> None:
    text = inspect_text(inspection(miss, "ln"))
    lines = text.splitlines()
    assert len({len(line) for line in lines[2 : lines.index("", 2)]}) == 1  # the table is aligned
    for word in ("vision", "encoder", "decoder", "norm", "attention", "ffn", "embedding", "head"):
        assert word in text
    trained = 2 * 16 * (5 + 7 + 8)
    assert f"trains {trained:,} of" in lines[-1]
    assert "recipe ln -> vision?=ln,encoder?=ln,decoder?=ln" in text
    assert not any(line.startswith("recipe") for line in inspect_text(inspection(miss)).splitlines())


def test_a_shape_is_counted_without_its_weights() -> None:
    found = inspection("miss-base", "ln")
    assert found["total"] == 361_478_972
    assert found["recipe"]["trainable"] == 153_600
    assert "= 0.0425% in 200 tensors" in inspect_text(found)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        inspection(str(tmp_path))

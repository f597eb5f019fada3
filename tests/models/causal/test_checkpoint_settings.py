"""Settings of generation_config.json change answers as they do in transformers' `generate()`."""

from __future__ import annotations

import logging
from itertools import chain
from typing import Any

import pytest
from transformers import GenerationConfig

from normtune.models.causal import checkpoint_settings
from normtune.models.causal.checkpoint_settings import active_settings
from normtune.models.causal.family import CausalFamily
from normtune.models.loading import load
from tests.models.families.test_families import GROUPINGS, grouped, transformers_answer
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import approx

SETTINGS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5},
    "n-grams": {"no_repeat_ngram_size": 2},
    "lengths": {"min_new_tokens": 3, "min_length": 4, "exponential_decay_length_penalty": (2, 1.5)},
    "forced": {"forced_eos_token_id": 5, "begin_suppress_tokens": [*range(40, 200)]},
    "words": {"suppress_tokens": [*range(100, 300)], "bad_words_ids": [[7], [72, 72]], "sequence_bias": [[[9], 2.5]]},
    "beams": {"length_penalty": -2.0, "early_stopping": True},
    "several": {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "length_penalty": 2.0},
}


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "gemma3", "paligemma"])
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> CausalFamily:
    loaded = load(str(make_tiny(request.param, tmp_path_factory.mktemp(request.param))))
    assert isinstance(loaded, CausalFamily)
    loaded.end_tokens = tuple(range(0, loaded.model.lm_head.out_features, 4))  # answers differ in length
    return loaded


def answers(family: CausalFamily, beams: int, grouping: str = "mixed order") -> list[tuple[int, ...]]:
    groups, pixels = grouped(family, GROUPINGS[grouping], answered=False)
    return [answer.tokens for answer in family.generate_tokens(groups, pixels, max_new_tokens=8, beams=beams)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_answers_equal_those_of_generate(
    family: CausalFamily, name: str, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = answers(family, beams)
    for setting, value in SETTINGS[name].items():
        monkeypatch.setattr(family.model.generation_config, setting, value)
    assert family.generation_settings().keys() == SETTINGS[name].keys()
    groups, pixels = grouped(family, GROUPINGS["mixed order"], answered=False)
    generated = family.generate_tokens(groups, pixels, max_new_tokens=8, beams=beams)
    for i, answer in zip(chain(*GROUPINGS["mixed order"]), generated, strict=True):
        tokens, score = transformers_answer(family, i, beams)
        assert answer.tokens == tokens
        if beams == 1:
            assert answer.score == approx(score)
    if name != "beams" and family.config.model_type == "llava":
        assert [answer.tokens for answer in generated] != plain
    monkeypatch.setattr(family, "uses_checkpoint_settings", False)
    assert family.generation_settings() == {} and answers(family, beams) == plain


def test_defaults_change_nothing() -> None:
    assert active_settings(GenerationConfig()) == {}
    neutral = GenerationConfig(
        repetition_penalty=1.0, no_repeat_ngram_size=0, min_new_tokens=0, do_sample=True, top_p=0.5
    )
    assert active_settings(neutral) == {}


def test_settings_that_are_ignored_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint_settings._warn_ignored.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert active_settings(GenerationConfig(guidance_scale=2.0, min_new_tokens=1)) == {"min_new_tokens": 1}
    (record,) = caplog.records
    assert "guidance_scale" in record.getMessage()

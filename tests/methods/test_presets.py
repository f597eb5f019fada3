"""Presets give the parameter counts of the papers, on models of real size on the meta device."""

from __future__ import annotations

import pytest

from normtune.methods.adapt import adapt
from normtune.methods.presets import PRESETS
from tests.support.architectures import build_on_meta
from tests.support.base_models import tiny_base

MISS_TOTAL = 361_478_972
ATTENTION = {"vision": 28_348_416, "encoder": 56_696_832, "decoder": 56_696_832}
FFN = 56_669_184  # of each part


@pytest.mark.parametrize(
    ("preset", "trainable", "percent", "digits"),
    [
        ("ln", 153_600, 0.0425, 4),  # all three parts
        ("ln-vision", 38_400, 0.0106, 4),
        ("ln-encoder", 56_832, 0.0157, 4),
        ("ln-decoder", 58_368, 0.0161, 4),
        ("frozen-lora4-lora4", 589_824, 0.163, 3),  # MILE's published shares
        ("frozen-ia3-ia3", 184_320, 0.051, 3),
        ("frozen-frozen-prefix", 14_772_480, 3.926, 3),
        ("attention", sum(ATTENTION.values()), 39.212, 3),
        ("ffn", 3 * FFN, 47.031, 3),
        ("full", MISS_TOTAL, 100.0, 3),
        ("frozen", 0, 0.0, 3),
    ],
)
def test_presets_on_miss_give_the_published_shares(preset: str, trainable: int, percent: float, digits: int) -> None:
    """MILE's denominator includes the added parameters: prefix is 3.926%, and would be 4.087% of the base."""
    tuned = adapt(build_on_meta("miss_base"), preset)
    assert tuned.trainable == trainable
    assert round(100 * tuned.share, digits) == percent
    assert tuned.base_total == MISS_TOTAL
    added = sum(p.numel() for addition in tuned.additions for p in addition.parameters.values())
    assert tuned.total == MISS_TOTAL + added


def test_added_methods_are_counted_by_hand() -> None:
    width, layers, inner = 768, 12, 3072
    lora = 2 * layers * 4 * (4 * 2 * width)  # two parts; query and value, of self and cross; rank 4
    assert lora == 589_824  # the number in the test above, as for those below
    assert adapt(build_on_meta("miss_base"), "frozen-lora8-lora8").trainable == 2 * lora
    ia3 = 2 * layers * (4 * width + 2 * width + inner)  # key and value, both outputs, the feed-forward's input
    assert ia3 == 184_320
    embedding, squash, outer = 10 * width, width * width + width, (width + 1) * layers * 2 * width
    assert embedding + squash + outer == 14_772_480
    assert adapt(build_on_meta("miss_base"), "frozen-frozen-ptuning").trainable == 10 * layers * 2 * width
    adapter = layers * (2 * 64 * width + 64 + width)
    assert adapt(build_on_meta("miss_base"), "frozen-frozen-adapter").trainable == adapter


def test_llava_med_norms_are_266240_of_7_566_billion() -> None:
    tuned = adapt(build_on_meta("llava_med"), "ln-language")
    assert tuned.trainable == 266_240
    assert round(tuned.total / 1e9, 3) == 7.567
    assert round(100 * tuned.share, 4) == 0.0035
    # of 102,400 and 368,640: the last layer of the image encoder and its final norm are never used
    assert adapt(build_on_meta("llava_med"), "ln-vision").trainable == 102_400 - 6_144
    ln = adapt(build_on_meta("llava_med"), "ln")
    assert (ln.trainable, ln.left_out) == (368_640 - 6_144, 6_144)
    assert (
        adapt(build_on_meta("llava_med"), "lora-8").trainable == 32 * 8 * (2 * 4096 + 4096 + 1024) + 23 * 8 * 4 * 1024
    )


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_fits_miss(preset: str) -> None:
    tuned = adapt(tiny_base("miss"), preset)
    assert (tuned.trainable == 0) == (preset == "frozen")
    assert all(parameter.requires_grad for parameter in tuned.trained.values())

"""A model with several norm adapters gives each row the answer of its adapter alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from normtune.adapters.multi.bank import build_bank
from normtune.adapters.multi.rows import RowAdapters
from normtune.data.groups import Group, group_by_image
from normtune.data.records import Example
from normtune.methods.adapt import adapt
from normtune.models.loading import load
from tests.models.families.test_families import PAIRS, image
from tests.support.base_models import input_error, tiny_base
from tests.support.tiny_miss import save_tiny_miss
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import approx

EXAMPLES = [Example(str(i), (name,), *pair, "open", "train") for i, (name, *pair) in enumerate(PAIRS)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["miss", "llava"])
def test_answers_of_a_batch_equal_those_of_each_adapter(kind: str, beams: int, tmp_path: Path) -> None:
    """Answers have different lengths, so that rows leave the batch."""
    family = load(str(save_tiny_miss(tmp_path) if kind == "miss" else make_tiny(kind, tmp_path)))
    tuned = adapt(family.model, "ln")
    bank = build_bank(tuned, 3)
    generator = torch.Generator().manual_seed(1)
    bank.values.add_(0.5 * torch.randn(bank.values.shape, generator=generator))
    questions = [Example(e.id, e.images, e.question, "", "open", "train") for e in EXAMPLES]
    groups, pixels, adapters = [], [], []
    for members in group_by_image(questions):
        processed = family.preprocess_image(image(members[0].images[0]))
        for adapter in (2, 0, 1):  # several adapters use the same image
            segments = tuple(family.tokenize(e.id, e.question, None) for e in members)
            groups.append(Group(members[0].images, segments))
            pixels.append([dict(processed)])
            adapters.append(adapter)
    family.active_text_rows = bank.text_rows
    rows = [len(group.segments) if kind == "miss" else 1 for group in groups]
    texts = [adapter for adapter, count in zip(adapters, rows, strict=True) for _ in range(count)]
    with bank.use(RowAdapters(adapters), RowAdapters(texts)):
        batch_answers = family.generate_answers(groups, pixels, max_new_tokens=8, beams=beams)
    for adapter in range(3):
        with bank.use(RowAdapters([adapter]), RowAdapters([adapter])):
            family.active_text_rows = None
            for group, images, adapter_of_group, answers in zip(groups, pixels, adapters, batch_answers, strict=True):
                if adapter_of_group == adapter:
                    single = family.generate_answers([group], [images], max_new_tokens=8, beams=beams)[0]
                    assert [a.text for a in single] == [a.text for a in answers]
                    assert [a.score for a in single] == approx([a.score for a in answers])
    assert len({answer.text for answers in batch_answers for answer in answers}) > 3


def test_recipes_that_train_more_than_norms_are_refused() -> None:
    tuned = adapt(tiny_base("miss"), "encoder=ln+lora(r=2)")
    assert "trains by lora, but only norm adapters can share a model" in input_error(lambda: build_bank(tuned, 2))

"""The loss of a MISS batch is the cross-entropy of the model's logits, also in chunks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normtune.data.groups import Group
from normtune.data.phantom import phantom_dataset
from normtune.errors import InputError
from normtune.models import family as families
from normtune.models.answer_loss import answer_loss
from normtune.models.families.miss import MissFamily
from normtune.models.types import Batch
from tests.support.tiny_miss import tiny_miss
from tests.support.tolerance import assert_close, assert_gradients_close


def batch_of(family: MissFamily) -> Batch:
    groups: dict[str, list] = {}
    for example in phantom_dataset("a", 12).examples:
        groups.setdefault(example.images[0], []).append(family.tokenize(example.id, example.question, example.answer))
    images = torch.rand(len(groups), 3, 48, 48, generator=torch.Generator().manual_seed(0))
    packed = [Group((key,), tuple(members)) for key, members in groups.items()]
    return family.collate(packed, [[{"pixel_values": image}] for image in images])


def gradients(family: MissFamily, loss: Tensor) -> dict[str, Tensor]:
    family.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in family.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_in_chunks_is_that_of_the_models_logits(label_smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients too, including those of the head's dense layer, its norm and the tied embedding."""
    family = tiny_miss()
    batch = batch_of(family)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "pairs", "logit_rows")}
    has_label = batch["labels"] != -100
    labels, logits = batch["labels"][has_label], family.model(**inputs).logits[has_label]  # [N], [N, vocabulary]
    whole = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    expected = gradients(family, whole)
    limit = 3 * 4 * family.config.vocab_size  # three rows of fp32 logits
    monkeypatch.setattr(families, "answer_loss", partial(answer_loss, limit_bytes=limit))
    loss, tokens = family.loss(batch, label_smoothing=label_smoothing)
    assert tokens == len(labels) > 6
    assert_close(loss, whole)
    result = gradients(family, loss)
    assert any("predictions.transform.LayerNorm" in name for name in result)
    assert_gradients_close(result, expected)


def test_earlier_turns_are_refused() -> None:
    with pytest.raises(InputError, match="example 7: it has earlier turns, but MissFamily reads one question"):
        tiny_miss().tokenize("7", "Where?", "left", history=(("What?", "A CT."),))

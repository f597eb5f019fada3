"""Questions that share an image give the loss, gradients and answers of separate ones, to fp32 rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normtune.models.miss.attention import QuerySlots
from normtune.models.miss.model import MissForQuestionAnswering
from tests.support.miss_batches import ANSWERS, QUESTIONS, answer_batch, question_batch, random_pixels, tiny_miss
from tests.support.tolerance import approx, assert_close, assert_gradients_close, differ


def summed_gradients(model: MissForQuestionAnswering, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: MissForQuestionAnswering, grouped: Callable[[], Tensor], separate: Callable[[], Tensor]) -> None:
    """Both give one loss (a sum over tokens) and, for every parameter, one gradient."""
    grouped_loss, separate_loss = grouped(), separate()
    assert_close(grouped_loss, separate_loss)
    gradients, expected = summed_gradients(model, grouped_loss), summed_gradients(model, separate_loss)
    assert len(expected) > 50
    assert_gradients_close(gradients, expected)


def token_sum(model: MissForQuestionAnswering, **batch: Tensor) -> Tensor:
    """The forward pass's mean loss times the number of labels."""
    return model(**batch).loss * (batch["labels"] != -100).sum()


def batch_of(picked: list[int], extra: int = 0) -> dict[str, Tensor]:
    return question_batch([QUESTIONS[i] for i in picked], extra) | answer_batch([ANSWERS[i] for i in picked])


def without_padding(model: MissForQuestionAnswering, images: Tensor, owner: list[int]) -> Tensor:
    """Every question on its own, in a batch of one."""
    losses = []
    for i, image in enumerate(owner):
        question = batch_of([i])
        del question["attention_mask"]
        losses.append(token_sum(model, pixel_values=images[image : image + 1], **question))
    return torch.stack(losses).sum()


@pytest.mark.parametrize(
    "owner",
    [
        [0, 0, 0, 0, 0],  # one group
        [0, 1, 2, 3, 4],  # groups of one
        [0, 0, 0, 1, 1],  # uneven groups
        [0, 1, 1, 1, 2],
    ],
)
@pytest.mark.parametrize("extra", [0, 8])
def test_questions_of_one_image_equal_separate_ones(owner: list[int], extra: int) -> None:
    model, images = tiny_miss(), random_pixels(owner[-1] + 1)
    assert_same(
        model,
        lambda: token_sum(model, pixel_values=images, image_index=torch.tensor(owner), **batch_of([*range(5)], extra)),
        lambda: without_padding(model, images, owner),
    )


def test_equal_groups_need_no_index() -> None:
    model, images = tiny_miss(), random_pixels(2)
    batch = batch_of([0, 1, 2, 3])
    indexed = model(pixel_values=images, image_index=torch.tensor([0, 0, 1, 1]), **batch)
    assert torch.equal(model(pixel_values=images, **batch).logits, indexed.logits)


def test_an_image_without_questions_changes_nothing() -> None:
    model, images = tiny_miss(), random_pixels(3)
    batch = batch_of([0, 1, 2])
    result = model(pixel_values=images, image_index=torch.tensor([0, 2, 2]), **batch)
    expected = model(pixel_values=images[[0, 2]], image_index=torch.tensor([0, 1, 1]), **batch)
    torch.testing.assert_close(result.logits, expected.logits)


def test_other_questions_of_an_image_are_not_seen() -> None:
    model, images = tiny_miss(), random_pixels(1)
    index = torch.tensor([0, 0])
    first = model(pixel_values=images, image_index=index, **batch_of([0, 1])).logits[0, 0]
    other = model(pixel_values=images, image_index=index, **batch_of([0, 3])).logits[0, 0]
    torch.testing.assert_close(first, other)


def test_image_states_take_the_place_of_pixels() -> None:
    model, images = tiny_miss(), random_pixels(2)
    batch = batch_of([*range(5)]) | {"image_index": torch.tensor([0, 0, 0, 1, 1])}
    first = model(pixel_values=images, **batch)
    assert torch.equal(model(image_states=first.image_states, **batch).logits, first.logits)


def test_a_question_sees_all_views_of_a_study() -> None:
    """Two studies, of two views and of one; the reference joins the views' states by hand, study by study."""
    model, images = tiny_miss(), random_pixels(3)
    owner, views = [0, 0, 0, 1, 1], [[0, 2], [1]]

    def separate() -> Tensor:
        losses = []
        for i, study in enumerate(owner):
            question = batch_of([i])
            del question["attention_mask"]
            states = torch.cat([model.visual_encoder(images[v : v + 1]) for v in views[study]], 1)
            losses.append(token_sum(model, image_states=states, **question))
        return torch.stack(losses).sum()

    assert_same(
        model,
        lambda: token_sum(
            model,
            pixel_values=images,
            view_index=[[0, 2], [1, -1]],
            image_index=torch.tensor(owner),
            **batch_of([*range(5)]),
        ),
        separate,
    )


def test_padding_of_questions_changes_nothing() -> None:
    model, images = tiny_miss(), random_pixels(5)
    losses = [model(pixel_values=images, **batch_of([*range(5)], extra)).loss for extra in (0, 8, 24)]
    assert_close(losses[1], losses[0])
    assert_close(losses[2], losses[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_in_groups_equal_separate_ones(beams: int) -> None:
    model, images, owner = tiny_miss(3), random_pixels(2), [0, 0, 0, 1, 1]
    grouped_answers = model.generate(
        pixel_values=images, image_index=torch.tensor(owner), beams=beams, **question_batch(QUESTIONS, extra=3)
    )
    for i, image in enumerate(owner):
        ids = torch.tensor([QUESTIONS[i]])
        (single,) = model.generate(ids, images[image : image + 1], beams=beams)
        assert single.tokens == grouped_answers[i].tokens
        assert single.score == approx(grouped_answers[i].score)


def test_slots_come_back_as_they_went() -> None:
    states = torch.randn(5, 4, 6)
    slots = QuerySlots.from_image_index([0, 0, 0, 2, 2], 5, 3, states.device)
    packed = slots.gather(states)
    assert packed.shape == (3, 12, 6)
    assert torch.equal(packed[2, 4:8], states[4]) and not packed[1].any() and not packed[2, 8:].any()
    assert torch.equal(slots.scatter(packed, 4), states)


# --- prefixes --------------------------------------------------------------------------------------------


class Prefix(nn.Module):
    def __init__(self, heads: int, width: int, n: int = 3) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.randn(heads, n, width // heads))
        self.value = nn.Parameter(torch.randn(heads, n, width // heads))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value


def prefixed(seed: int = 0) -> MissForQuestionAnswering:
    model = tiny_miss(seed)
    torch.manual_seed(7)
    for block in model.visual_encoder.blocks:
        block.attn.prefix = Prefix(4, 48)
    for part in (model.text_encoder, model.text_decoder.bert):
        for layer in part.encoder.layer:
            attention = layer.attention.self
            attention.prefix = Prefix(attention.heads, attention.query.out_features)
    return model


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    scores = (query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("causal", [True, False])
def test_every_query_sees_the_whole_prefix(causal: bool) -> None:
    attention = prefixed().text_decoder.bert.encoder.layer[0].attention.self
    hidden = torch.randn(2, 5, 40)
    prefix_key, prefix_value = attention.prefix()
    query, key, value = (
        linear(hidden).unflatten(2, (4, 10)).transpose(1, 2)
        for linear in (attention.query, attention.key, attention.value)
    )
    key = torch.cat((prefix_key.expand(2, -1, -1, -1), key), 2)
    value = torch.cat((prefix_value.expand(2, -1, -1, -1), value), 2)
    visible = torch.ones(5, 8, dtype=torch.bool)
    if causal:
        visible[:, 3:] = torch.ones(5, 5).tril().bool()
    expected = attention_by_hand(query, key, value, visible).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(hidden, None, causal, None), expected)


def test_questions_with_prefixes_share_an_image_exactly() -> None:
    model, images, owner = prefixed(), random_pixels(2), [0, 0, 0, 1, 1]
    plain = tiny_miss()(pixel_values=images, image_index=torch.tensor(owner), **batch_of([*range(5)])).loss
    batch = batch_of([*range(5)], extra=4)
    assert differ(model(pixel_values=images, image_index=torch.tensor(owner), **batch).loss, plain)
    assert_same(
        model,
        lambda: token_sum(model, pixel_values=images, image_index=torch.tensor(owner), **batch),
        lambda: without_padding(model, images, owner),
    )
    assert all(p.grad is not None for name, p in model.named_parameters() if ".prefix." in name)


@pytest.mark.parametrize("make", [tiny_miss, prefixed])
def test_stepwise_answers_equal_the_forward_pass(make: Callable[[int], MissForQuestionAnswering]) -> None:
    model, images = make(5), random_pixels(5)
    answers = model.generate(pixel_values=images, beams=1, max_new_tokens=6, **question_batch(QUESTIONS))
    for i, answer in enumerate(answers):
        ids = torch.tensor([[58, *answer.tokens[:-1]]])
        question = torch.tensor([QUESTIONS[i]])
        log_probs = model(question, images[i : i + 1], decoder_input_ids=ids).logits[0].log_softmax(-1)
        assert log_probs.argmax(-1).tolist() == list(answer.tokens)
        assert float(log_probs.detach().max(-1).values.mean()) == approx(answer.score)

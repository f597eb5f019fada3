"""MISS compared with transformers' BLIP with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipForQuestionAnswering

from normtune.errors import InputError
from normtune.models.importers.miss.from_blip import convert_blip_config, read_blip_weights
from normtune.models.importers.miss.importer import import_miss
from normtune.models.importers.miss.weights import build_model
from tests.support.miss_batches import (
    ANSWERS,
    END,
    QUESTIONS,
    START,
    VOCABULARY,
    answer_batch,
    question_batch,
    random_pixels,
    randomize,
)
from tests.support.tolerance import approx, assert_close, differ


def blip_config(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> BlipConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BlipConfig(
        vision_config=sizes | {"image_size": 32, "patch_size": 8} | (vision or {}),
        text_config=sizes
        | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_hidden_layers": 3}
        | {"bos_token_id": START, "sep_token_id": END, "pad_token_id": 0, "eos_token_id": END}
        | (text or {}),
    )


@pytest.fixture(scope="module")
def blip() -> BlipForQuestionAnswering:
    model = BlipForQuestionAnswering(blip_config()).eval()
    randomize(model)
    return model


def blip_logits(model: BlipForQuestionAnswering, images: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
    states = model.vision_model(pixel_values=images).last_hidden_state
    question = model.text_encoder(input_ids=ids, encoder_hidden_states=states).last_hidden_state
    return model.text_decoder(input_ids=answer, encoder_hidden_states=question).logits


def test_logits_of_unpadded_questions_equal_blips(blip: BlipForQuestionAnswering) -> None:
    model, images = build_model(read_blip_weights(blip)), random_pixels(5)
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        ids, decoded = torch.tensor([question]), torch.tensor([[START, *answer]])
        expected = blip_logits(blip, images[i : i + 1], ids, decoded)
        logits = model(ids, images[i : i + 1], decoder_input_ids=decoded).logits
        assert expected.std() > 0.1
        assert_close(logits, expected)


def test_the_epsilon_of_the_norms_is_blips(blip: BlipForQuestionAnswering) -> None:
    model = build_model(read_blip_weights(blip))
    assert model.visual_encoder.norm.eps == 1e-5 and model.config.vision().layer_norm_eps == 1e-5
    assert model.text_encoder.embeddings.LayerNorm.eps == 1e-12


def test_padding_reaches_the_decoder_of_blip_but_not_of_miss(blip: BlipForQuestionAnswering) -> None:
    """transformers ignores the cross-attention mask in the decoder: its loss depends on the padding."""
    model, images = build_model(read_blip_weights(blip)), random_pixels(1)
    target = answer_batch(ANSWERS[1:2])
    labels = torch.tensor([[START, *ANSWERS[1], END]])
    blip_losses, losses = [], []
    with torch.no_grad():
        for extra in (0, 8, 24):
            question = question_batch(QUESTIONS[1:2], extra)
            blip_losses.append(float(blip(pixel_values=images, labels=labels, **question).loss))
            losses.append(float(model(pixel_values=images, **target, **question).loss))
    assert max(losses) == approx(min(losses))
    assert losses[0] == approx(blip_losses[0])
    assert all(differ(torch.tensor(blip_losses[0]), torch.tensor(other)) for other in blip_losses[1:3])


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_equal_blips_token_by_token(blip: BlipForQuestionAnswering, beams: int) -> None:
    model, images = build_model(read_blip_weights(blip)), random_pixels(12)
    questions = torch.randint(4, START, (12, 6), generator=torch.Generator().manual_seed(0))
    blip_answers = blip.generate(questions, images, num_beams=beams, max_new_tokens=9, do_sample=False)
    answers = model.generate(questions, images, beams=beams)
    for row, answer in zip(blip_answers[:, 1:].tolist(), answers, strict=True):
        assert tuple(row[: len(answer.tokens)]) == answer.tokens
        assert set(row[len(answer.tokens) :]) <= {0, END}, "padding after the answer"
    assert len({answer.tokens for answer in answers}) > 3


def test_a_directory_can_be_imported(tmp_path: Path, blip: BlipForQuestionAnswering) -> None:
    blip.to(torch.bfloat16).save_pretrained(tmp_path / "blip")
    blip.float()
    model = build_model(read_blip_weights(tmp_path / "blip"))
    assert model.dtype == torch.bfloat16
    report = import_miss(tmp_path / "blip", tmp_path / "miss")
    assert report.mapped == read_blip_weights(blip).names and not report.left_over and not report.processor
    imported = type(model).from_pretrained(tmp_path / "miss")
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in imported.state_dict().items())


def test_the_models_share_no_memory(blip: BlipForQuestionAnswering) -> None:
    before = blip.vision_model.post_layernorm.weight.clone()
    model = build_model(read_blip_weights(blip))
    with torch.no_grad():
        model.visual_encoder.norm.weight.zero_()
    assert torch.equal(blip.vision_model.post_layernorm.weight, before)
    assert model.get_output_embeddings().weight is model.text_decoder.bert.embeddings.word_embeddings.weight


def test_every_tensor_of_blip_is_converted(blip: BlipForQuestionAnswering) -> None:
    weights = read_blip_weights(blip)
    assert set(weights.names) == set(build_model(read_blip_weights(blip)).state_dict())
    assert weights.dropped == ("text_decoder.cls.predictions.bias",)


def test_blip_vqa_base_has_the_size_of_miss_base_at_384_pixels() -> None:
    config = convert_blip_config(BlipConfig(text_config={"num_attention_heads": 12}))
    assert config.vision().image_size == 384 and config.text("decoder").hidden_dropout_prob == 0.0
    assert (config.bos_token_id, config.encode_token_id, config.eos_token_id) == (30522, 30523, 102)


def test_sizes_that_miss_does_not_support_are_refused() -> None:
    with pytest.raises(InputError, match=r"hidden_size is 48, text_config\.hidden_size 32"):
        convert_blip_config(blip_config(vision={"hidden_size": 48}))
    with pytest.raises(InputError, match=r"vision_config.image_size .*32, 40.*squares only"):
        convert_blip_config(blip_config(vision={"image_size": [32, 40]}))


def test_a_directory_without_blip_is_refused(tmp_path: Path) -> None:
    from tests.support.miss_batches import tiny_miss

    with pytest.raises(InputError, match="cannot read a BLIP model from"):
        build_model(read_blip_weights(tmp_path))
    tiny_miss().save_pretrained(tmp_path / "miss")
    with pytest.raises(InputError, match=r"'miss', not 'blip'|cannot read a BLIP model"):
        read_blip_weights(tmp_path / "miss")
    BlipForImageTextRetrieval(blip_config()).save_pretrained(tmp_path / "retrieval")
    with pytest.raises(InputError, match="no BLIP that answers questions"):
        read_blip_weights(tmp_path / "retrieval")

"""The MISS network: loss, masks, saved files, sizes and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normtune.errors import InputError
from normtune.models.miss.config import MissConfig
from normtune.models.miss.model import MissForQuestionAnswering, register
from normtune.models.miss.vision import resize_positions
from tests.support.miss_batches import (
    ANSWERS,
    QUESTIONS,
    VOCABULARY,
    answer_batch,
    question_batch,
    random_pixels,
    tiny_config,
    tiny_miss,
)
from tests.support.tolerance import assert_close

TIED = ("text_decoder.cls.predictions.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight")
BATCH = question_batch(QUESTIONS) | answer_batch(ANSWERS)


def is_tied(model: MissForQuestionAnswering) -> bool:
    return model.get_parameter(TIED[0]) is model.get_parameter(TIED[1])


def test_loss_is_the_mean_over_answer_tokens() -> None:
    output = tiny_miss()(pixel_values=random_pixels(5), **BATCH)
    assert output.logits.shape == (5, 4, VOCABULARY)
    tokens = [(i, j, t) for i, row in enumerate(ANSWERS) for j, t in enumerate([*row, 3])]
    losses = [-output.logits[i, j].log_softmax(-1)[t] for i, j, t in tokens]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_answer_tokens_do_not_attend_to_later_tokens() -> None:
    model, images = tiny_miss(), random_pixels(1)
    question = question_batch(QUESTIONS[:1])
    long, short = (model(pixel_values=images, decoder_input_ids=torch.tensor([ids]), **question).logits
                   for ids in ([58, 20, 21, 22], [58, 20]))  # fmt: skip
    torch.testing.assert_close(long[:, :2], short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_loaded_with_the_same_values(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_miss().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = MissForQuestionAnswering.from_pretrained(tmp_path)
    assert loaded.dtype == dtype and not loaded.training and is_tied(loaded)
    ignored = {"dtype": None, "_name_or_path": None}
    assert loaded.config.to_dict() | ignored == model.config.to_dict() | ignored
    state = model.state_dict()
    assert set(state) == set(loaded.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    images = random_pixels(5)
    assert torch.equal(loaded(pixel_values=images, **BATCH).logits, model(pixel_values=images, **BATCH).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32])
def test_a_model_is_loaded_in_the_requested_dtype(tmp_path: Path, dtype: str | torch.dtype) -> None:
    tiny_miss().save_pretrained(tmp_path)
    loaded = MissForQuestionAnswering.from_pretrained(tmp_path, dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected} and is_tied(loaded)


def test_a_tied_head_is_saved_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    tiny_miss().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(set(TIED) & set(file.keys())) == 1


def test_an_untied_head_stays_untied(tmp_path: Path) -> None:
    model = tiny_miss(tie_word_embeddings=False)
    assert not is_tied(model)
    model.save_pretrained(tmp_path)
    loaded = MissForQuestionAnswering.from_pretrained(tmp_path)
    for name in TIED:
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    assert not torch.equal(loaded.get_parameter(TIED[0]), loaded.get_parameter(TIED[1]))


def test_auto_classes_load_a_registered_model(tmp_path: Path) -> None:
    from transformers import AutoModelForVisualQuestionAnswering

    register()
    tiny_miss().save_pretrained(tmp_path)
    assert isinstance(AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path), MissForQuestionAnswering)


def test_miss_base_has_the_published_size() -> None:
    with torch.device("meta"):
        model = MissForQuestionAnswering(MissConfig())
    assert sum(p.numel() for p in model.parameters()) == 361_478_972
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sizes == {"visual_encoder": 86_339_328, "text_encoder": 137_258_496, "text_decoder": 137_881_148}


def gradients(model: MissForQuestionAnswering, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(pixel_values=images, **BATCH).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_parameter_gets_a_gradient_and_activation_checkpointing_changes_none() -> None:
    model, images = tiny_miss(), random_pixels(5)
    for module in model.modules():  # train mode switches checkpointing on; dropout would differ
        if hasattr(module, "p"):
            module.p = 0.0
        if hasattr(module, "rate"):
            module.rate = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    plain = gradients(model, images)
    assert set(plain) == {name for name, _ in model.named_parameters()}
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.24
    (enable or model.gradient_checkpointing_enable)()
    calls = []
    hook = model.text_encoder.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    recomputed = gradients(model, images)
    hook.remove()
    assert len(calls) == 2, "the layer ran again in the backward pass"
    for name, gradient in plain.items():
        assert_close(recomputed[name], gradient, msg=name)


def test_dropout_and_drop_path_act_in_training_only() -> None:
    model, images = tiny_miss(), random_pixels(5)
    first, second = (model(pixel_values=images, **BATCH).loss for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (model(pixel_values=images, **BATCH).loss for _ in range(2))
    assert not torch.equal(first, second)
    branch = torch.ones(2000, 1, 1)
    output = model.visual_encoder.blocks[1].drop_path(branch)
    assert set(output.unique().tolist()) == {0.0, branch.new_tensor(1 / 0.9).item()}
    assert abs(output.mean() - 1) < 0.05


@pytest.mark.parametrize(("height", "width"), [(48, 48), (16, 40), (32, 64), (8, 8)])
def test_other_image_sizes_resample_the_position_embeddings(height: int, width: int) -> None:
    model = tiny_miss()
    states = model.visual_encoder(random_pixels(1, size=(height, width)))
    rows, columns = height // 8, width // 8
    assert states.shape == (1, 1 + rows * columns, 48)
    grid = model.visual_encoder.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (rows, columns), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    resized = resize_positions(model.visual_encoder.pos_embed, rows, columns)
    torch.testing.assert_close(resized[:, 1:], expected)
    torch.testing.assert_close(resized[:, :1], model.visual_encoder.pos_embed[:, :1])


def test_a_column_of_the_grid_stays_a_column_when_the_image_is_wider() -> None:
    columns = torch.arange(4.0).repeat(4)  # every row reads 0 1 2 3
    positions = F.pad(columns, (1, 0))[None, :, None]
    resized = resize_positions(positions, 4, 8)[0, 1:, 0].view(4, 8)
    assert torch.allclose(resized, resized[:1].expand(4, 8)) and bool((resized[0].diff() > 0).all())


def test_the_configured_size_keeps_its_position_embeddings() -> None:
    positions = torch.randn(1, 17, 8)
    assert resize_positions(positions, 4, 4) is positions


def test_an_image_that_does_not_divide_into_patches_is_refused() -> None:
    with pytest.raises(InputError, match="33 x 32 pixels do not divide into patches of 8"):
        tiny_miss().visual_encoder(random_pixels(1, size=(32, 33)))


def test_bfloat16_gives_bfloat16_logits_near_those_of_float32() -> None:
    images = random_pixels(5)
    exact = tiny_miss()(pixel_values=images, **BATCH)
    rough = tiny_miss().to(torch.bfloat16)(pixel_values=images, **BATCH)
    assert rough.logits.dtype == torch.bfloat16 and rough.loss.dtype == torch.float32
    assert abs(rough.loss - exact.loss) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_dims": {"image_sizes": 32}}, r"vision_dims.image_sizes: unknown, did you mean 'image_size'\? Known"),
        ({"encoder_dims": {"zzz": 1}}, "encoder_dims.zzz: unknown. Known"),
        ({"decoder_dims": {"hidden_size": 30}}, "decoder_dims: hidden_size 30 is not a multiple"),
        ({"vision_dims": {"image_size": 30}}, "image_size 30 is not a multiple of patch_size 16"),
    ],
)
def test_impossible_dimensions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MissConfig(**changes)


def test_the_config_is_saved_and_loaded_unchanged(tmp_path: Path) -> None:
    config = tiny_config()
    config.save_pretrained(tmp_path)
    loaded = MissConfig.from_pretrained(tmp_path)
    assert loaded.vision() == config.vision() and loaded.text("decoder") == config.text("decoder")
    assert loaded.text("encoder") != loaded.text("decoder")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.encode_token_id) == (58, 3, 59)

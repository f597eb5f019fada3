"""MISS's original checkpoints are imported with the same logits; anything else is refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normtune.errors import InputError
from normtune.models.importers.miss.importer import ImportReport, import_miss
from normtune.models.importers.miss.original_checkpoint import infer_config
from normtune.models.miss.model import MissForQuestionAnswering
from normtune.models.miss.vision import resize_positions
from tests.support.miss_batches import (
    ANSWERS,
    QUESTIONS,
    VOCABULARY,
    answer_batch,
    question_batch,
    random_pixels,
    tiny_miss,
)

HEADS = {"vision_heads": 4, "text_heads": 4}
BATCH = question_batch(QUESTIONS) | answer_batch(ANSWERS)


def original_names() -> set[str]:
    """The tensor names of a MISS file with 2 image, 2 encoder and 3 decoder layers."""
    names = {f"visual_encoder.{name}" for name in ("cls_token", "pos_embed")}
    both = ("weight", "bias")
    modules = ["visual_encoder.patch_embed.proj", "visual_encoder.norm"]
    for i in range(2):
        modules += [f"visual_encoder.blocks.{i}.{m}" for m in ("norm1", "attn.qkv", "attn.proj")]
        modules += [f"visual_encoder.blocks.{i}.{m}" for m in ("norm2", "mlp.fc1", "mlp.fc2")]
    for part, layers in (("text_encoder", 2), ("text_decoder.bert", 3)):
        modules.append(f"{part}.embeddings.LayerNorm")
        names |= {f"{part}.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")}
        names.add(f"{part}.embeddings.position_ids")
        for i in range(layers):
            layer = f"{part}.encoder.layer.{i}"
            for attention in ("attention", "crossattention"):
                modules += [f"{layer}.{attention}.self.{m}" for m in ("query", "key", "value")]
                modules += [f"{layer}.{attention}.output.{m}" for m in ("dense", "LayerNorm")]
            modules += [f"{layer}.{m}" for m in ("intermediate.dense", "output.dense", "output.LayerNorm")]
    head = "text_decoder.cls.predictions"
    modules += [f"{head}.transform.dense", f"{head}.transform.LayerNorm", f"{head}.decoder"]
    return names | {f"{module}.{kind}" for module in modules for kind in both} | {f"{head}.bias"}


def original(model: MissForQuestionAnswering) -> dict[str, Tensor]:
    """The model's weights as MISS's code would save them after training for VQA."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["text_decoder.cls.predictions.bias"] = weights["text_decoder.cls.predictions.decoder.bias"]
    for part in ("text_encoder", "text_decoder.bert"):
        weights[f"{part}.embeddings.position_ids"] = torch.arange(64)[None]
    assert set(weights) == original_names()
    return weights


def pretraining(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other tensors of a pretraining file."""
    extra: dict[str, Tensor] = {"temp": torch.tensor(0.07), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    for name in ("image_queue", "text_queue"):
        extra[name] = torch.randn(8, 16)
    for name in ("vision_proj", "text_proj", "vision_proj_m", "text_proj_m", "itm_head"):
        extra[f"{name}.weight"], extra[f"{name}.bias"] = torch.randn(8, 32), torch.randn(8)
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        if part != "text_decoder":
            extra[f"{part}_m.{rest}"] = tensor + 1 if tensor.is_floating_point() else tensor
    return extra


def save(path: Path, weights: dict[str, Tensor], **others: Any) -> Path:
    torch.save({"model": weights, **others}, path)
    return path


def assert_same_logits(out: Path, model: MissForQuestionAnswering) -> None:
    imported = MissForQuestionAnswering.from_pretrained(out)
    images = random_pixels(5)
    expected = model(pixel_values=images, **BATCH).logits
    assert torch.equal(imported(pixel_values=images, **BATCH).logits, expected)


def test_an_imported_finetuned_file_gives_the_models_logits(tmp_path: Path) -> None:
    model = tiny_miss()
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-5}]}
    config = {"dataset": "slake", "image_size": 480}
    source = save(tmp_path / "best.pth", original(model), optimizer=optimizer, config=config, epoch=129)
    report = import_miss(source, tmp_path / "out", **HEADS)
    assert_same_logits(tmp_path / "out", model)
    assert set(report.mapped) == set(model.state_dict())
    assert all(name == original_name for name, original_name in report.mapped.items())
    assert set(report.dropped) == original_names() - set(report.mapped)
    assert report.missing == report.left_over == () and report.resized_from is None and not report.processor
    assert report.parameters == sum(p.numel() for p in model.parameters())
    for part in ("vision_dims", "encoder_dims", "decoder_dims"):
        assert report.config[part] == getattr(model.config, part)
    assert (report.config["bos_token_id"], report.config["encode_token_id"]) == (58, 59)


def test_tensors_that_only_pretraining_needs_are_dropped(tmp_path: Path) -> None:
    model = tiny_miss()
    weights = original(model)
    extra = pretraining(weights)
    source = save(tmp_path / "pretrained.pth", weights | extra)
    report = import_miss(source, tmp_path / "out", **HEADS)
    assert_same_logits(tmp_path / "out", model)
    assert set(extra) <= set(report.dropped) and not report.left_over


def test_unknown_tensors_are_named_and_not_used(tmp_path: Path) -> None:
    model = tiny_miss()
    weights = original(model) | {"text_encoder.pooler.dense.weight": torch.zeros(2), "other": torch.zeros(1)}
    report = import_miss(save(tmp_path / "a.pth", weights), tmp_path / "out", **HEADS)
    assert set(report.left_over) == {"text_encoder.pooler.dense.weight", "other"}
    assert "unknown, not used: " in str(report)
    assert_same_logits(tmp_path / "out", model)


def test_bare_and_distributed_state_dicts_are_supported(tmp_path: Path) -> None:
    model = tiny_miss()
    torch.save(original(model), tmp_path / "bare.pth")
    save(tmp_path / "ddp.pth", {f"module.{name}": tensor for name, tensor in original(model).items()})
    for name in ("bare", "ddp"):
        report = import_miss(tmp_path / f"{name}.pth", tmp_path / name, **HEADS)
        assert_same_logits(tmp_path / name, model)
    assert report.mapped["visual_encoder.cls_token"] == "module.visual_encoder.cls_token"


def test_a_tied_head_may_be_absent_and_its_bias_may_have_the_other_name(tmp_path: Path) -> None:
    model = tiny_miss()
    weights = original(model)
    del weights["text_decoder.cls.predictions.decoder.weight"]
    del weights["text_decoder.cls.predictions.decoder.bias"]
    report = import_miss(save(tmp_path / "a.pth", weights), tmp_path / "out", **HEADS)
    assert report.missing == ("text_decoder.cls.predictions.decoder.weight",)
    assert report.mapped["text_decoder.cls.predictions.decoder.bias"] == "text_decoder.cls.predictions.bias"
    assert "made from other tensors" in str(report)
    assert_same_logits(tmp_path / "out", model)


def test_an_untied_head_stays_untied(tmp_path: Path) -> None:
    model = tiny_miss(tie_word_embeddings=False)
    report = import_miss(save(tmp_path / "a.pth", original(model)), tmp_path / "out", **HEADS)
    assert report.config["tie_word_embeddings"] is False
    assert_same_logits(tmp_path / "out", model)


def test_half_precision_is_preserved(tmp_path: Path) -> None:
    model = tiny_miss().to(torch.bfloat16)
    import_miss(save(tmp_path / "a.pth", original(model)), tmp_path / "out", **HEADS)
    assert MissForQuestionAnswering.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert_same_logits(tmp_path / "out", model)


def test_position_embeddings_are_resampled_on_request(tmp_path: Path) -> None:
    model = tiny_miss()
    source = save(tmp_path / "a.pth", original(model))
    report = import_miss(source, tmp_path / "out", image_size=48, **HEADS)
    assert report.resized_from == 32 and "from 32 to 48 pixels" in str(report)
    imported = MissForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert imported.config.vision().image_size == 48
    expected = resize_positions(model.visual_encoder.pos_embed, 6, 6)
    torch.testing.assert_close(imported.visual_encoder.pos_embed, expected)
    images = random_pixels(1, size=(48, 48))
    torch.testing.assert_close(imported.visual_encoder(images), model.visual_encoder(images))
    with pytest.raises(InputError, match="image_size 50 is not a multiple of patch_size 8"):
        import_miss(source, tmp_path / "other", image_size=50, **HEADS)


def test_the_config_of_miss_base_is_inferred_from_its_tensors() -> None:
    from normtune.models.miss.config import MissConfig

    with torch.device("meta"):
        tensors = dict(MissForQuestionAnswering(MissConfig()).state_dict())
    del tensors["text_decoder.cls.predictions.decoder.weight"]  # comparing it needs values
    assert infer_config(tensors, "base").to_dict() == MissConfig().to_dict()


def vocabulary(path: Path, pieces: int) -> Path:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "this", "a", "lung", "yes", "?"]
    special += [f"word{i}" for i in range(pieces - len(special))]
    path.write_text("\n".join(special), encoding="utf-8")
    return path


def test_a_model_imported_with_a_vocabulary_is_loaded_by_the_family(tmp_path: Path) -> None:
    from PIL import Image

    from normtune.models.families.miss import MissFamily

    vocab = vocabulary(tmp_path / "vocab.txt", VOCABULARY - 2)
    source = save(tmp_path / "a.pth", original(tiny_miss()))
    report = import_miss(source, tmp_path / "out", vocab=vocab, divide_twice=True, **HEADS)
    assert report.processor
    family = MissFamily.load(tmp_path / "out", torch.float32)
    assert family.tokenize("1", "Is this a lung?", "yes").prompt == (59, 5, 6, 7, 8, 10, 3)
    assert family.tokenize("1", "Is this a lung?", "yes").answer == (9, 3)
    white = family.preprocess_image(Image.new("RGB", (40, 40), "white"))["pixel_values"]
    assert white.shape == (3, 32, 32)
    torch.testing.assert_close(white, torch.full_like(white, 1 / 255))


def refused(source: Path, out: Path, **options: Any) -> str:
    """The error message, which has one line; no file is left behind."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(InputError) as caught:
        import_miss(source, out, **options)
    assert sorted(source.parent.iterdir()) == before, "no file is left behind"
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def without(pattern: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if pattern not in name}


def misshapen(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: weights | {name: torch.zeros(shape)}


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "encoders alone": (
        without("text_decoder"),
        "has no answer decoder (text_decoder.*), only visual_encoder, text_encoder: it cannot answer",
    ),
    "no image encoder": (without("visual_encoder"), "has no image encoder (visual_encoder.*)"),
    "another model": (lambda weights: {"a.weight": torch.zeros(3)}, "none of the 1 tensors of"),
    "a layer without cross-attention": (
        without("text_encoder.encoder.layer.1.crossattention"),
        "lacks 10 of 174 tensors: text_encoder.encoder.layer.1.crossattention.self.query.weight, ",
    ),
    "no class token": (without("cls_token"), "lacks visual_encoder.cls_token"),
    "no word embeddings": (without("text_decoder.bert.embeddings.word"), "lacks text_decoder.bert.embeddings"),
    "a norm of another width": (
        misshapen("text_encoder.embeddings.LayerNorm.weight", (40,)),
        "text_encoder.embeddings.LayerNorm.weight is of shape [40], the other tensors require [32]",
    ),
    "another vocabulary in the decoder": (
        misshapen("text_decoder.bert.embeddings.word_embeddings.weight", (61, 40)),
        "is of shape [61, 40], the other tensors require [60, 40]",
    ),
    "positions that are no square": (misshapen("visual_encoder.pos_embed", (1, 13, 48)), "12 patches, not a square"),
    "positions without an axis": (
        misshapen("visual_encoder.pos_embed", (17, 48)),
        "visual_encoder.pos_embed is of shape [17, 48], not [1, any, 48]",
    ),
    "nothing": (lambda weights: {}, "holds no tensors"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused(tmp_path: Path, what: str) -> None:
    change, message = BROKEN[what]
    source = save(tmp_path / "a.pth", change(original(tiny_miss())))
    assert message in refused(source, tmp_path / "out", **HEADS)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02garbage", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "a.pth"
    source.write_bytes(content)
    assert "is not a checkpoint that opens safely" in refused(source, tmp_path / "out")


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pth", original(tiny_miss()))
    source.write_bytes(source.read_bytes()[:-2000])
    assert "is not a checkpoint that opens safely" in refused(source, tmp_path / "out")


def test_a_file_that_could_run_code_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pth", original(tiny_miss()), args=argparse.Namespace(lr=1))
    assert "holds more than tensors and plain values" in refused(source, tmp_path / "out")


def test_other_contents_are_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pth")
    assert "holds no tensors under 'model'" in refused(tmp_path / "a.pth", tmp_path / "out")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.pth", tmp_path / "out")


def test_a_width_that_is_no_multiple_of_64_needs_the_number_of_heads(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pth", original(tiny_miss()))
    message = refused(source, tmp_path / "out")
    assert "visual_encoder is 48 wide, not a multiple of 64. Give its number of attention heads" in message
    message = refused(source, tmp_path / "out", vision_heads=4, text_heads=5)
    assert "hidden_size 32 is not a multiple of num_attention_heads 5" in message


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pth", original(tiny_miss()))
    vocab = vocabulary(tmp_path / "vocab.txt", 20)
    assert "has 22 words with [DEC] and [ENC]" in refused(source, tmp_path / "out", vocab=vocab, **HEADS)


def test_a_full_directory_is_not_overwritten(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pth", original(tiny_miss()))
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    assert "is not an empty directory" in refused(source, out, **HEADS)
    assert "is not an empty directory" in refused(source, source, **HEADS)
    (out / "kept").unlink()
    assert isinstance(import_miss(source, out, **HEADS), ImportReport)
    assert (out / "config.json").is_file() and not list(tmp_path.glob(".*"))


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pth", original(tiny_miss()))
    assert "cannot write" in refused(source, source / "out", **HEADS)

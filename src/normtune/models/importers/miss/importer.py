"""Imports MISS's original `.pth` files and transformers' BLIP-VQA models as `MissForQuestionAnswering`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import BlipProcessor

from normtune.errors import InputError
from normtune.models.checkpoints.reader import first_names
from normtune.models.importers.miss.from_blip import read_blip_weights
from normtune.models.importers.miss.original_checkpoint import read_original_weights
from normtune.models.importers.miss.weights import EMBEDDING, HEAD, POSITIONS, MissWeights, build_model
from normtune.models.miss.config import VisionDims, validate_dims
from normtune.models.miss.vision import resize_positions
from normtune.runtime.files import atomic_directory, check_new_directory
from normtune.runtime.notebook import Result


@dataclass(frozen=True)
class ImportReport(Result):
    """How the tensors of a checkpoint were imported."""

    # the checkpoint, and the directory that was written
    source: str
    out: str
    mapped: dict[str, str]  # name in the model -> name in the checkpoint
    # names in the checkpoint that the model does not need: of pretraining, of position ids, a second name of a tensor
    dropped: tuple[str, ...]
    # names in the model that the checkpoint lacks and that were made from others (a tied head)
    missing: tuple[str, ...]
    left_over: tuple[str, ...]  # unknown names in the checkpoint; these tensors were not used
    config: dict[str, Any]  # the model's config
    parameters: int  # the model's number of parameters
    resized_from: int | None  # the checkpoint's image size if the position embeddings were resampled, else None
    processor: bool  # whether tokenizer and image processor were written

    def __str__(self) -> str:
        used, dropped, unknown = len(self.mapped), len(self.dropped), len(self.left_over)
        lines = [
            f"{self.source} -> {self.out}: {self.parameters:,} parameters",
            f"{used} tensors used, {dropped} dropped, {unknown} unknown",
        ]
        if self.missing:
            lines.append(f"made from other tensors: {first_names(self.missing)}")
        if self.left_over:
            lines.append(f"unknown, not used: {first_names(self.left_over)}")
        if self.resized_from is not None:
            size = self.config["vision_dims"]["image_size"]
            lines.append(f"position embeddings resampled from {self.resized_from} to {size} pixels")
        if not self.processor:
            lines.append("no tokenizer was written: give --vocab with the vocab.txt of bert-base-uncased")
        return "\n".join(lines)


def import_miss(
    source: Path,
    out: Path,
    *,
    vocab: Path | None = None,
    image_size: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    divide_twice: bool = False,
) -> ImportReport:
    """Convert a MISS or BLIP checkpoint to a directory for `MissForQuestionAnswering.from_pretrained`.

    The sizes of a `.pth` are inferred from the shapes of its tensors. What shapes do not show is taken from
    MISS: activations, epsilons, dropout, and [DEC] and [ENC] as the last two tokens of the vocabulary.

    Args:
        source: a `.pth` file of MISS or BLIP, loaded with `weights_only`, so that it cannot run code; or a
            BLIP-VQA directory.
        out: a new or empty directory; it is written completely or not at all.
        vocab: BERT's `vocab.txt`; with it, tokenizer and image processor are written too. None: the `vocab.txt` of
            a BLIP directory, if it has one.
        image_size: resample the position embeddings to this size (bicubic, as BLIP does); None: keep them.
        vision_heads, text_heads: attention heads of a `.pth`; None: width / 64.
        divide_twice: prepare images as MISS's released code does; see `miss_processor`.

    Raises:
        InputError: `source` is not such a checkpoint, tensors are missing or have wrong shapes, or `out`
            cannot be written.
    """
    check_new_directory(out)
    if source.is_dir():
        weights = read_blip_weights(source)
        if vocab is None and (source / "vocab.txt").is_file():
            vocab = source / "vocab.txt"
    else:
        weights = read_original_weights(source, vision_heads=vision_heads, text_heads=text_heads)
    missing = () if HEAD in weights.tensors else (HEAD,)  # a tied head may be absent
    weights.tensors.setdefault(HEAD, weights.tensors[EMBEDDING])
    original_size = weights.config.vision().image_size
    if image_size is not None and image_size != original_size:
        dims = {**weights.config.vision_dims, "image_size": image_size}
        vision = validate_dims(VisionDims, dims, "vision_dims")
        side = image_size // vision.patch_size
        weights.tensors[POSITIONS] = resize_positions(weights.tensors[POSITIONS], side, side)
        weights.config.vision_dims = asdict(vision)
    processor = None if vocab is None else _processor(vocab, weights, divide_twice)
    model = build_model(weights)
    with atomic_directory(out) as building:
        try:
            model.save_pretrained(building)
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error
        if processor is not None:
            processor.save_pretrained(building)

    model_names = model.state_dict()
    return ImportReport(
        source=str(source),
        out=str(out),
        mapped={name: old for name, old in weights.names.items() if name in model_names},
        dropped=weights.dropped,
        missing=missing,
        left_over=tuple(old for name, old in weights.names.items() if name not in model_names),
        config=model.config.to_dict(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        resized_from=original_size if weights.config.vision().image_size != original_size else None,
        processor=processor is not None,
    )


def _processor(vocab: Path, weights: MissWeights, divide_twice: bool) -> BlipProcessor:
    """Build tokenizer and image processor, and set the token ids of the config to the tokenizer's."""
    from normtune.models.families.miss import miss_processor
    from normtune.models.miss.tokenizer import ENCODE, build_bert_tokenizer

    tokenizer: Any = build_bert_tokenizer(vocab)
    config = weights.config
    if len(tokenizer) != config.vocab_size:
        raise InputError(
            f"{vocab} has {len(tokenizer)} words with [DEC] and [ENC], {weights.source} has "
            f"{config.vocab_size}. Give the vocab.txt that it was trained with."
        )
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.sep_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.encode_token_id = tokenizer.convert_tokens_to_ids(ENCODE)
    return miss_processor(tokenizer, config.vision().image_size, divide_twice=divide_twice)

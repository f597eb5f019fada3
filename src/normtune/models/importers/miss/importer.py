"""Weights of other layouts -> MISS: transformers' BLIP-VQA models, and MISS's own `.pth` files."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import BlipForQuestionAnswering, BlipProcessor

from normtune.errors import InputError
from normtune.models.importers.miss.from_blip import blip_weights
from normtune.models.importers.miss.original_checkpoint import original_weights
from normtune.models.importers.miss.weights import EMBEDDING, HEAD, POSITIONS, Weights, assemble, some
from normtune.models.miss.config import VisionDims, checked_dims
from normtune.models.miss.model import MissForQuestionAnswering
from normtune.models.miss.vision import resize_positions


@dataclass(frozen=True)
class ImportReport:
    """What became of the tensors of a checkpoint.

    Attributes:
        source, out: what was read and the directory that was written.
        mapped: name in the model -> name in the checkpoint.
        dropped: names in the checkpoint that belong to pretraining or hold no weights of their own.
        missing: names in the model that the checkpoint lacks and that were made from others (a tied head).
        left_over: names in the checkpoint that nothing here knows; they were not used.
        config: the sizes of the model.
        parameters: how many it has.
        resized_from: the checkpoint's image size where position embeddings were resampled, else None.
        processor: whether tokenizer and image processor were written.
    """

    source: str
    out: str
    mapped: dict[str, str]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    config: dict[str, Any]
    parameters: int
    resized_from: int | None
    processor: bool


def import_text(report: ImportReport) -> str:
    """The report as a few lines for people."""
    taken, dropped, unknown = len(report.mapped), len(report.dropped), len(report.left_over)
    lines = [
        f"{report.source} -> {report.out}: {report.parameters:,} parameters",
        f"{taken} tensors taken, {dropped} dropped, {unknown} unknown",
    ]
    if report.missing:
        lines.append(f"made from other tensors: {some(report.missing)}")
    if report.left_over:
        lines.append(f"unknown, not used: {some(report.left_over)}")
    if report.resized_from is not None:
        size = report.config["vision_dims"]["image_size"]
        lines.append(f"position embeddings resampled from {report.resized_from} to {size} pixels")
    if not report.processor:
        lines.append("no tokenizer was written: give --vocab with the vocab.txt of bert-base-uncased")
    return "\n".join(lines)


def from_blip(source: BlipForQuestionAnswering | str | Path) -> MissForQuestionAnswering:
    """A `BlipForQuestionAnswering`, or a directory that holds one, as MISS, in eval mode, in its dtype.

    On unpadded questions the logits are BLIP's. On padded ones they stay the same, whereas transformers' BLIP
    lets its decoder see the padding. [ENC], which transformers' processor leaves out, is taken to follow
    [DEC] in the vocabulary, as in BLIP's own tokenizer.

    Raises:
        InputError: the directory holds no such model, or one of a shape that MISS has not.
    """
    return assemble(blip_weights(source))


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
    """Write a MISS or BLIP `.pth`, or a BLIP-VQA directory, for `MissForQuestionAnswering.from_pretrained`.

    Sizes are read off a `.pth`'s tensors. What they don't show is MISS's: activations, epsilons, dropout, and
    [DEC] and [ENC] as the vocabulary's last two tokens.

    Args:
        source: a file, which is read with `weights_only`, so that it cannot run code; or a directory.
        out: a new or empty directory; it appears whole or not at all.
        vocab: BERT's `vocab.txt`, by default that of a BLIP directory; with it tokenizer and image processor
            are written beside the model.
        image_size: resample the position embeddings to this size (bicubic, as BLIP does); None: keep them.
        vision_heads, text_heads: attention heads of a `.pth`; None: width / 64.
        divide_twice: prepare images as MISS's released code does; see `miss_processor`.

    Raises:
        InputError: not a checkpoint, parts or tensors missing, wrong shapes, or `out` cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory. Choose another one.")
    if source.is_dir():
        weights = blip_weights(source)
        if vocab is None and (source / "vocab.txt").is_file():
            vocab = source / "vocab.txt"
    else:
        weights = original_weights(source, vision_heads=vision_heads, text_heads=text_heads)
    missing = () if HEAD in weights.tensors else (HEAD,)
    weights.tensors.setdefault(HEAD, weights.tensors[EMBEDDING])
    before = weights.config.vision().image_size
    if image_size is not None and image_size != before:
        resize_images(weights, image_size)
    processor = None if vocab is None else _processor(vocab, weights, divide_twice)
    model = assemble(weights)
    _write(model, processor, out.absolute())

    known = model.state_dict()
    return ImportReport(
        source=str(source),
        out=str(out),
        mapped={name: theirs for name, theirs in weights.names.items() if name in known},
        dropped=weights.dropped,
        missing=missing,
        left_over=tuple(theirs for name, theirs in weights.names.items() if name not in known),
        config=model.config.to_dict(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        resized_from=before if weights.config.vision().image_size != before else None,
        processor=processor is not None,
    )


def resize_images(weights: Weights, image_size: int) -> None:
    """Make the weights those of a model for images of `image_size` pixels a side, in place.

    Raises:
        InputError: the size is not a multiple of the patch.
    """
    config = weights.config
    dims = checked_dims(VisionDims, {**config.vision_dims, "image_size": image_size}, "vision_dims")
    side = image_size // dims.patch_size
    weights.tensors[POSITIONS] = resize_positions(weights.tensors[POSITIONS], side, side)
    config.vision_dims = asdict(dims)


def _processor(vocab: Path, weights: Weights, divide_twice: bool) -> BlipProcessor:
    """Tokenizer and image processor; the config takes the tokenizer's ids."""
    from normtune.models.families.miss import miss_processor
    from normtune.models.miss.tokenizer import ENCODE, bert_tokenizer

    tokenizer: Any = bert_tokenizer(vocab)
    config = weights.config
    if len(tokenizer) != config.vocab_size:
        raise InputError(
            f"{vocab} makes {len(tokenizer)} words with [DEC] and [ENC], {weights.source} has "
            f"{config.vocab_size}. Give the vocab.txt that it was trained with."
        )
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.sep_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.encode_token_id = tokenizer.convert_tokens_to_ids(ENCODE)
    return miss_processor(tokenizer, config.vision().image_size, divide_twice=divide_twice)


def _write(model: MissForQuestionAnswering, processor: BlipProcessor | None, out: Path) -> None:
    """Write a directory beside `out`, then rename it: `out` is whole or absent."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            made = Path(temporary) / out.name
            model.save_pretrained(made)
            if processor is not None:
                processor.save_pretrained(made)
            if out.exists():
                out.rmdir()  # it is empty
            made.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {out}: {reason}. Free some space or choose another one.") from error

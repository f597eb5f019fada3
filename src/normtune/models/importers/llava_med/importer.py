"""Imports LLaVA-Med in its original layout as a directory that transformers and normtune load.

Tensors are written one at a time to `OUT.partial`, which is renamed to `OUT` when it is complete. If the
import is killed and run again, it resumes at the first shard that is not complete.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, GenerationConfig, LlavaConfig, LlavaProcessor

from normtune.errors import InputError
from normtune.models.checkpoints.reader import OriginalCheckpoint, find_or_download, first_names
from normtune.models.checkpoints.writer import (
    PROGRESS_FILE,
    ImportProgress,
    ProgressCallback,
    hash_plan,
    plan_shards,
    write_shards,
)
from normtune.models.importers.llava_med.clip import VisionTower, infer_vision_config, open_vision_tower
from normtune.models.importers.llava_med.original_config import OriginalConfig, build_llava_config, read_original_config
from normtune.models.importers.llava_med.processor import Vocabulary, build_processor, read_vocabulary
from normtune.models.importers.llava_med.tensor_names import NORM, convert_name, has_tower
from normtune.models.importers.llava_med.tensor_plan import TensorPlan
from normtune.runtime.files import check_new_directory, write_errors_as_input_errors, write_json
from normtune.runtime.notebook import Result

REPORT_FILE = "import_report.json"  # the `ImportReport`, next to the imported weights
SHARD_BYTES = 2 * 10**9  # size of an imported shard
MAX_DELTA_GAIN = 0.1  # mean gain of the final norm: above 1 in LLaMA, below this in a delta


@dataclass(frozen=True)
class ImportReport(Result):
    """How the tensors of a checkpoint were imported."""

    # the checkpoint, and the directory that was written
    source: str
    out: str
    base: str | None  # the LLaMA that a delta was added to, or None
    version: str  # version of LLaVA-Med, "1.5" or "1.0"
    tower: str  # where the weights of the image encoder ("vision tower" in LLaVA) come from
    # number of its tensors that differ between checkpoint and --vision; None if only one of the two has an image
    # encoder
    tower_differs: int | None
    mapped: dict[str, str]  # name in the model -> name in the checkpoint
    added: tuple[str, ...]  # names in the model that are the sum of base and delta
    missing: dict[str, str]  # name in the model that the checkpoint lacks -> how it was made
    dropped: dict[str, str]  # names that hold no weights of the model -> the checkpoint or CLIP that has them
    left_over: tuple[str, ...]  # names of weights that were not used
    vocabulary: tuple[int, int]  # rows of the embedding, before and after
    tokens: tuple[str, ...]  # the tokens that were added
    dtypes: dict[str, int]  # dtype -> number of tensors
    parameters: int  # the model's number of parameters
    shards: dict[str, str]  # file -> SHA-256
    bytes: int  # size of all shards
    kept: int  # number of shards that an earlier, interrupted run had written

    def __str__(self) -> str:
        count = len(self.mapped)
        lines = [
            f"{self.source} (LLaVA-Med {self.version}) -> {self.out}: {self.parameters:,} parameters, "
            f"{self.bytes / 1e6:,.1f} MB in {len(self.shards)} shards"
            + (f", {self.kept} of them from an interrupted run" if self.kept else ""),
            f"{count} tensors used, {len(self.missing)} made, {len(self.dropped)} without weights dropped, "
            f"{len(self.left_over)} not used",
            f"image encoder: {self.tower}",
        ]
        if self.tower_differs is not None:
            lines.append(f"image encoder: {self.tower_differs} tensors differ between SRC and --vision")
        if self.base is not None:
            lines.append(f"{len(self.added)} tensors are {self.base} + {self.source}")
        lines += [f"made: {name} = {how}" for name, how in self.missing.items()]
        before, after = self.vocabulary
        if self.tokens:
            lines.append(f"vocabulary: {before:,} -> {after:,} rows, new tokens {', '.join(self.tokens)}")
        if self.left_over:
            lines.append(f"not used: {first_names(self.left_over)}")
        lines.append(f"every name: {Path(self.out) / REPORT_FILE}")
        return "\n".join(lines)


def import_llava_med(
    source: str,
    out: Path,
    *,
    vision: str | None = None,
    stock_tower: bool = False,
    vision_heads: int | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: ProgressCallback | None = None,
) -> ImportReport:
    """Convert a checkpoint of LLaVA-Med to a directory for `LlavaForConditionalGeneration.from_pretrained`.

    Every tensor keeps its dtype and its bits. If the vocabulary grows, the new rows are the mean of the old
    ones: the embedding of an image token is never read, and its logit, the mean of all logits, is never the
    largest, so that greedy answers stay the same.

    Args:
        source: directory or hub name of a checkpoint in the original layout, version 1.5 or 1.0.
        out: a new or empty directory; it is written completely or not at all, as `out.partial` until then.
        vision: directory or hub name of the CLIP image encoder, if the checkpoint contains none.
        stock_tower: use the weights of `vision` even if the checkpoint contains an image encoder, as
            LLaVA-Med's loader does.
        vision_heads: attention heads of the checkpoint's image encoder, if `vision` is not given and the
            number is not width / 64.
        base: directory or hub name of the LLaMA that `source` is a delta of.
        tokenizer: directory or hub name of the tokenizer, if `source` has none that can be read.
        shard_bytes: maximum size of a shard.
        on_progress: called with the number of tensors written and the number of all tensors.

    Raises:
        InputError: `source` is not such a checkpoint; names, shapes or the image encoder are missing or
            unknown; or `out` cannot be written.
    """
    check_new_directory(out)
    directory = find_or_download(source)
    original = read_original_config(directory)
    checkpoint = OriginalCheckpoint(directory)
    tower = _open_tower(source, checkpoint, original, vision, stock_tower)
    inside = has_tower(checkpoint.entries)
    vision_config = tower.config if tower else _infer_tower(checkpoint, original, source, vision_heads)
    base_checkpoint = None if base is None else OriginalCheckpoint(find_or_download(base))
    vocabulary = read_vocabulary(find_or_download(tokenizer) if tokenizer else directory, original)
    rows, image_id, pad_id = vocabulary.embedding_rows, vocabulary.image_id, vocabulary.pad_id
    config = build_llava_config(original, vision_config, vocab_size=rows, image_id=image_id, pad_id=pad_id)
    original_rows: int = original.text_config["vocab_size"]
    used_tower = tower if not inside or stock_tower else None
    plan = TensorPlan(source, checkpoint, used_tower, base_checkpoint, config, base, original_rows)
    _check_delta(source, checkpoint, base)
    preprocessor_config = tower.preprocessor_config if tower else {}
    processor = build_processor(original, vision_config, vocabulary, preprocessor_config)

    shards = plan_shards(plan.groups, shard_bytes)
    partial = out.absolute().with_name(out.name + ".partial")
    with write_errors_as_input_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
        for temporary in partial.glob(".*.tmp"):  # of a run that was killed while it wrote
            with suppress(OSError):
                temporary.unlink()
        checkpoints = [checkpoint, tower.checkpoint if tower else None, base_checkpoint]
        sources = [file for item in checkpoints if item for file in item.files]
        progress = ImportProgress(partial, hash_plan(shards, sources))
        kept_shards = len(progress.done)
        needed = sum(shard.bytes for shard in shards if shard.file not in progress.done)
        if needed > (free := shutil.disk_usage(partial).free):
            raise InputError(
                f"{partial} needs {needed / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB are free. "
                "Free some space or choose another directory."
            )
        digests = write_shards(progress, shards, on_progress)
        tensors = [tensor for shard in shards for tensor in shard.tensors]
        report = ImportReport(
            source=source,
            out=str(out),
            base=base,
            version=original.version,
            tower=_describe_tower(tower, inside, stock_tower),
            tower_differs=_count_differences(checkpoint, tower) if inside and tower else None,
            mapped=plan.mapped,
            added=tuple(plan.added),
            missing=plan.missing,
            dropped=plan.dropped,
            left_over=tuple(plan.left_over),
            vocabulary=(original_rows, rows),
            tokens=vocabulary.added_tokens,
            dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
            parameters=sum(tensor.numel for tensor in tensors),
            shards=digests,
            bytes=sum(shard.bytes for shard in shards),
            kept=kept_shards,
        )
        config.dtype = plan.dtype
        _write_configs(partial, config, vocabulary, processor, report)
        (partial / PROGRESS_FILE).unlink()
        os.replace(partial, out)
    return report


def _open_tower(
    source: str, checkpoint: OriginalCheckpoint, original: OriginalConfig, vision: str | None, stock: bool
) -> VisionTower | None:
    """The separate image encoder, or None if the checkpoint's own is to be used."""
    if vision is not None:
        return open_vision_tower(vision)
    if stock:
        raise InputError("--stock-tower needs --vision, the image encoder to use. Add it.")
    if not has_tower(checkpoint.entries):
        raise InputError(
            f"{source} holds no image encoder; its config names {original.tower_name}. "
            f"Give --vision {original.tower_name}, or the directory of a copy."
        )
    return None


def _infer_tower(
    checkpoint: OriginalCheckpoint, original: OriginalConfig, source: str, heads: int | None
) -> CLIPVisionConfig:
    """The config of the checkpoint's own image encoder, inferred from its tensors."""
    shapes = {convert_name(name) or name: entry.shape for name, entry in checkpoint.entries.items()}
    # OpenAI's CLIP has quick GELU, LAION's GELU, and no tensor shows which
    if "laion" in original.tower_name.lower() or "clip" not in original.tower_name.lower():
        raise InputError(
            f"{source} holds an image encoder named {original.tower_name}; its tensors do not show its "
            "activation function. Give --vision with its directory or hub name."
        )
    return infer_vision_config(shapes, source, heads=heads)


def _count_differences(checkpoint: OriginalCheckpoint, tower: VisionTower) -> int:
    """How many tensors differ between checkpoint and separate image encoder, in the checkpoint's dtype."""
    original_names = {convert_name(name): name for name in checkpoint.entries}
    count = 0
    for name, clip_name in tower.names.items():
        tensor = checkpoint.get_tensor(original_names[name]) if name in original_names else None
        other = tower.checkpoint.get_tensor(clip_name)
        if tensor is None or tensor.shape != other.shape or not torch.equal(tensor, other.to(tensor.dtype)):
            count += 1
    return count


def _check_delta(source: str, checkpoint: OriginalCheckpoint, base: str | None) -> None:
    """Check that `base` is given for a delta and only for a delta.

    The gains of the final norm distinguish the two: they are near zero in a delta.
    """
    norm = next((name for name in checkpoint.entries if convert_name(name) == NORM), None)
    assert norm is not None, "TensorPlan requires it"
    gain = checkpoint.get_tensor(norm).float().abs().mean().item()
    if base is None and gain < MAX_DELTA_GAIN:
        raise InputError(
            f"{source} looks like a delta: the gains of its final norm are near zero. "
            "Give --base with the LLaMA that it is a delta of."
        )
    if base is not None and gain >= MAX_DELTA_GAIN:
        raise InputError(f"{source} is no delta: the gains of its final norm are not near zero. Remove --base.")


def _describe_tower(tower: VisionTower | None, inside: bool, stock: bool) -> str:
    """Where the weights of the image encoder come from, as text."""
    if not inside:
        assert tower is not None
        return f"{tower.name} (the checkpoint holds none)"
    if stock:
        assert tower is not None
        return f"{tower.name}, as LLaVA-Med's loader uses it; the checkpoint's own was not used"
    config = f"its config is that of {tower.name}" if tower else "its config was inferred from its tensors"
    return f"the checkpoint's own, which LLaVA-Med's loader would replace; {config}"


def _write_configs(
    out: Path, config: LlavaConfig, vocabulary: Vocabulary, processor: LlavaProcessor, report: ImportReport
) -> None:
    """Write everything except the weights; the files do not depend on whether the import was interrupted."""
    config.save_pretrained(out)
    GenerationConfig(
        bos_token_id=vocabulary.tokenizer.bos_token_id,
        eos_token_id=list(vocabulary.end_ids) if len(vocabulary.end_ids) > 1 else vocabulary.end_ids[0],
        pad_token_id=vocabulary.pad_id,
    ).save_pretrained(out)
    processor.save_pretrained(out)
    content = asdict(report)
    del content["kept"]  # differs after an interruption
    write_json(out / REPORT_FILE, content)

"""LLaVA-Med in its original layout -> a directory that transformers and normtune load.

OriginalCheckpoint are written one tensor at a time into `OUT.partial`, which becomes `OUT` when all is there; run again
after a kill, the import goes on with the first shard that is not done.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, GenerationConfig, LlavaConfig, LlavaProcessor

from normtune.errors import InputError
from normtune.models.checkpoints.reader import OriginalCheckpoint, some
from normtune.models.checkpoints.writer import RECORD_FILE, Record, Tick, cut, plan_id, write_shards
from normtune.models.importers.llava_med.clip import Tower, inferred_config, open_tower
from normtune.models.importers.llava_med.hub import local_directory
from normtune.models.importers.llava_med.original_config import Original, llava_config, read_original
from normtune.models.importers.llava_med.processor import Vocabulary, build_processor, read_vocabulary
from normtune.models.importers.llava_med.tensor_names import NORM, holds_tower, new_name
from normtune.models.importers.llava_med.tensor_plan import Plan
from normtune.runtime.files import write_json

REPORT_FILE = "import_report.json"
SHARD_BYTES = 2 * 10**9
DELTA_NORM = 0.1  # the final norm's gains are above 1 in LLaMA; their differences are below this


@dataclass(frozen=True)
class ImportReport:
    """What became of the tensors of a checkpoint.

    Attributes:
        source, out, base: what was read, the directory that was written, what a delta was added to.
        version: of LLaVA-Med, "1.5" or "1.0".
        tower: where the image encoder's weights come from.
        tower_differs: how many of its tensors differ from those of --vision, where both are there; else None.
        mapped: name in the model -> name in the checkpoint.
        added: names in the model that are the sum of base and delta.
        missing: names in the model that the checkpoint lacks -> what they were made of.
        dropped: names that hold no weights of the model -> the file's directory or name that they are in.
        left_over: names of weights that were not used.
        vocabulary: rows of the embedding, before and after; `tokens` are those added.
        dtypes: type -> number of tensors.
        parameters: how many the model has.
        shards: file -> SHA-256.
        bytes: of all shards.
        kept: shards that an earlier, interrupted run had written.
    """

    source: str
    out: str
    base: str | None
    version: str
    tower: str
    tower_differs: int | None
    mapped: dict[str, str]
    added: tuple[str, ...]
    missing: dict[str, str]
    dropped: dict[str, str]
    left_over: tuple[str, ...]
    vocabulary: tuple[int, int]
    tokens: tuple[str, ...]
    dtypes: dict[str, int]
    parameters: int
    shards: dict[str, str]
    bytes: int
    kept: int


def import_text(report: ImportReport) -> str:
    """The report as a few lines for people."""
    count = len(report.mapped)
    lines = [
        f"{report.source} (LLaVA-Med {report.version}) -> {report.out}: {report.parameters:,} parameters, "
        f"{report.bytes / 1e6:,.1f} MB in {len(report.shards)} shards"
        + (f", {report.kept} of them kept from an interrupted run" if report.kept else ""),
        f"{count} tensors taken, {len(report.missing)} made, {len(report.dropped)} without weights dropped, "
        f"{len(report.left_over)} not used",
        f"image encoder: {report.tower}",
    ]
    if report.tower_differs is not None:
        lines.append(f"image encoder: {report.tower_differs} tensors differ between SRC and --vision")
    if report.base is not None:
        lines.append(f"{len(report.added)} tensors are {report.base} + {report.source}")
    lines += [f"made: {name} = {how}" for name, how in report.missing.items()]
    before, after = report.vocabulary
    if report.tokens:
        lines.append(f"vocabulary: {before:,} -> {after:,} rows, new tokens {', '.join(report.tokens)}")
    if report.left_over:
        lines.append(f"not used: {some(list(report.left_over))}")
    lines.append(f"every name: {Path(report.out) / REPORT_FILE}")
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
    tick: Tick | None = None,
) -> ImportReport:
    """Write a checkpoint of LLaVA-Med for `LlavaForConditionalGeneration.from_pretrained`.

    Every tensor keeps its type and its bits. Rows by which the vocabulary grows are the mean of the old ones:
    an image token's embedding is never read, and its logit, the mean of all, is never the largest, so that
    greedy answers stay the same.

    Args:
        source: directory or hub name of the original layout, version 1.5 or 1.0.
        out: a new or empty directory; it appears whole or not at all, `out.partial` until then.
        vision: the image encoder, where the checkpoint has none inside: directory or hub name of a CLIP.
        stock_tower: take the weights of `vision` though the checkpoint has its own, as LLaVA-Med's loader
            does.
        vision_heads: attention heads of an image encoder inside, where neither `vision` nor width / 64 tells.
        base: directory or hub name of the LLaMA that `source` is a delta of.
        tokenizer: directory or hub name, where `source` holds none that can be read.
        shard_bytes: of a file, at most.
        tick: called with the tensors written and their number.

    Raises:
        InputError: not such a checkpoint; names, shapes or the image encoder are missing or unknown; or `out`
            cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory. Choose another one.")
    directory = local_directory(source)
    original = read_original(directory)
    shards = OriginalCheckpoint(directory)
    tower = _tower(source, shards, original, vision, stock_tower)
    inside = holds_tower(shards.entries)
    config_of_tower = tower.config if tower else _inside_config(shards, original, source, vision_heads)
    under = None if base is None else OriginalCheckpoint(local_directory(base))
    words = read_vocabulary(local_directory(tokenizer) if tokenizer else directory, original)
    config = llava_config(
        original, config_of_tower, rows=words.rows, image_id=words.image_id, pad_id=words.pad_id
    )
    had: int = original.text["vocab_size"]
    plan = Plan(source, shards, tower if not inside or stock_tower else None, under, config, base, had)
    _check_delta(source, shards, base)
    processor = build_processor(original, config_of_tower, words, tower.preparation if tower else {})

    pieces = cut(plan.groups, shard_bytes)
    partial = out.absolute().with_name(out.name + ".partial")
    total = sum(piece.bytes for piece in pieces)
    with _building(partial):
        sources = [*shards.files, *(tower.shards.files if tower else ()), *(under.files if under else ())]
        record = Record(partial, plan_id(pieces, sources))
        kept = len(record.done)
        _check_space(partial, sum(piece.bytes for piece in pieces if piece.file not in record.done))
        digests = write_shards(record, pieces, tick)
        report = ImportReport(
            source=source,
            out=str(out),
            base=base,
            version=original.version,
            tower=_tower_text(tower, inside, stock_tower),
            tower_differs=_differing(shards, tower) if inside and tower else None,
            mapped=plan.mapped,
            added=tuple(plan.added),
            missing=plan.missing,
            dropped=plan.dropped,
            left_over=tuple(plan.left_over),
            vocabulary=(had, words.rows),
            tokens=words.added,
            dtypes=dict(Counter(str(one.dtype).removeprefix("torch.") for p in pieces for one in p.tensors)),
            parameters=sum(torch.Size(one.shape).numel() for p in pieces for one in p.tensors),
            shards=digests,
            bytes=total,
            kept=kept,
        )
        config.dtype = plan.dtype
        _write_small(partial, config, words, processor, report)
        (partial / RECORD_FILE).unlink()
        os.replace(partial, out)
    return report


def _tower(
    source: str, shards: OriginalCheckpoint, original: Original, vision: str | None, stock: bool
) -> Tower | None:
    """The image encoder apart, where one is given."""
    if vision is not None:
        return open_tower(vision)
    if stock:
        raise InputError("--stock-tower needs --vision, the image encoder that is to be taken. Add it.")
    if not holds_tower(shards.entries):
        raise InputError(
            f"{source} holds no image encoder; its config names {original.tower}. "
            f"Give --vision {original.tower}, or the directory of a copy."
        )
    return None


def _inside_config(
    shards: OriginalCheckpoint, original: Original, source: str, heads: int | None
) -> CLIPVisionConfig:
    shapes = {new_name(name) or name: entry.shape for name, entry in shards.entries.items()}
    if "laion" in original.tower.lower() or "clip" not in original.tower.lower():
        raise InputError(
            f"{source} holds an image encoder named {original.tower}, whose activation its tensors don't "
            "show. Give --vision with its directory or hub name."
        )
    return inferred_config(shapes, source, heads=heads)


def _differing(shards: OriginalCheckpoint, tower: Tower) -> int:
    """How many tensors of the image encoder inside differ from those apart, in the precision inside."""
    inside = {new_name(name): name for name in shards.entries}
    count = 0
    for ours, theirs in tower.names.items():
        mine = shards.tensor(inside[ours]) if ours in inside else None
        other = tower.shards.tensor(theirs)
        if mine is None or mine.shape != other.shape or not torch.equal(mine, other.to(mine.dtype)):
            count += 1
    return count


def _check_delta(source: str, shards: OriginalCheckpoint, base: str | None) -> None:
    """Tell a delta from a model by the gains of its final norm, which are near zero in a delta."""
    theirs = next((name for name in shards.entries if new_name(name) == NORM), None)
    assert theirs is not None, "the plan has found it"
    size = shards.tensor(theirs).float().abs().mean().item()
    if base is None and size < DELTA_NORM:
        raise InputError(
            f"{source} looks like a delta: the gains of its final norm are near zero. "
            "Give --base with the LLaMA that it is to be added to."
        )
    if base is not None and size >= DELTA_NORM:
        raise InputError(
            f"{source} is no delta: the gains of its final norm are not near zero. Leave --base out."
        )


def _tower_text(tower: Tower | None, inside: bool, stock: bool) -> str:
    """Where the image encoder's weights come from."""
    if not inside:
        assert tower is not None
        return f"{tower.name} (the checkpoint holds none)"
    if stock:
        assert tower is not None
        return f"{tower.name}, as LLaVA-Med's loader has it; the checkpoint's own was left out"
    config = f"its config is {tower.name}'s" if tower else "its config was read off its tensors"
    return f"the checkpoint's own, which LLaVA-Med's loader would replace; {config}"


@contextmanager
def _building(partial: Path) -> Iterator[None]:
    """Make the directory that becomes the model; what it holds outlives an interruption.

    Raises:
        InputError: something in it cannot be written.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for left in partial.glob(".*.tmp"):  # of a run that was killed while it wrote
            with suppress(OSError):
                left.unlink()
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {partial}: {error.strerror or error}. Free some space or choose another one."
        ) from error


def _check_space(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise InputError(
            f"{partial} needs {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free there. "
            "Free some space or choose another place."
        )


def _write_small(
    partial: Path, config: LlavaConfig, words: Vocabulary, processor: LlavaProcessor, report: ImportReport
) -> None:
    """All but the weights; the same bytes whether or not the import was interrupted."""
    config.save_pretrained(partial)
    GenerationConfig(
        bos_token_id=words.tokenizer.bos_token_id,
        eos_token_id=list(words.ends) if len(words.ends) > 1 else words.ends[0],
        pad_token_id=words.pad_id,
    ).save_pretrained(partial)
    processor.save_pretrained(partial)
    told = asdict(report)
    del told["kept"]
    write_json(partial / REPORT_FILE, told)

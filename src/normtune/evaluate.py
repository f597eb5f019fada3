"""A model and the examples of a split -> answers, scores, and their files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune import memory, processes
from normtune.config import REPORT_TOKENS
from normtune.data.records import Dataset, Example
from normtune.errors import InputError
from normtune.files import read_json
from normtune.metrics.report import normalisations_for, score_report
from normtune.metrics.text import normalise
from normtune.metrics.vqa import Metric, Prediction, only_once, score_vqa
from normtune.packing import Group, group_by_image, pair_batches, rank_shares
from normtune.results import write_results

if TYPE_CHECKING:
    from normtune.config import EvaluateConfig
    from normtune.image_cache import ImageCache
    from normtune.models.family import Family, Pixels

ANSWER_TOKENS = 16
Progress = Callable[[int, int], None]  # pairs done, pairs in all


@dataclass(frozen=True)
class Evaluation:
    """What a model answered, in the order of the examples, and how it scored.

    `seconds` holds reading the images and answering; `peak_memory_bytes` is that stretch's peak, the model
    included: allocated on the CUDA device, else resident on the host.
    """

    predictions: list[Prediction]
    metrics: dict[str, Metric]
    seconds: float
    pairs_per_second: float
    peak_memory_bytes: int


def evaluate(
    family: Family,
    dataset: Dataset,
    examples: Sequence[Example],
    out: Path | None = None,
    *,
    batch_pairs: int = 64,
    cap: int | None = None,
    beams: int = 1,
    max_new_tokens: int | None = None,
    candidates: str | None = None,
    normalisation: str = "vqa",
    names: Mapping[str, Any] | None = None,
    images: ImageCache | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer every example, score the answers, and write both under `out` where it is given.

    Examples are grouped by image, and each image is opened once (once more for its closed questions where
    `candidates` are given). Several processes deal the images out among them, each answers its share, and all
    return the whole; the first of them scores and writes.

    Args:
        family: the model, seen through `answer` (and `log_probs` with `candidates`).
        dataset: opens the images.
        examples: all questions, or all report requests; ids differ.
        out: directory for `predictions.jsonl` (id, images, kind, question, reference, prediction, score),
            `manifest.json` (ids and their hash) and `metrics.json`, written last.
        batch_pairs: questions answered at once, about.
        cap: at most so many questions of one image in a group.
        beams: of the search; 1 is greedy.
        max_new_tokens: longest answer; by default 16 for answers and 128 for reports.
        candidates: such as "yes/no": closed questions get the most probable of these instead of a
            generated answer.
        normalisation: of answers before they are scored, see `normtune.metrics.text`; reports are scored
            under those of `normtune.metrics.report.normalisations_for`.
        names: what to record of the run besides (base, adapter, ...).
        images: opens and holds the images; by default each is opened for its batch.
        progress: called with (pairs done, pairs in all) after each batch.

    Raises:
        InputError: no examples, an id twice, answers and reports mixed, an unreadable image, or no memory.
    """
    if not examples:
        raise InputError("there is nothing to evaluate: no examples. Choose another split.")
    only_once([example.id for example in examples], "examples")
    report = examples[0].kind == "report"
    if any((example.kind == "report") != report for example in examples):
        raise InputError("answers and reports cannot be evaluated together. Evaluate one task at a time.")
    normalise("", normalisation)  # a wrong name or an unwritable place is told before the hours of answering
    if out is not None:
        _make_directory(out)
    tokens = max_new_tokens or (REPORT_TOKENS if report else ANSWER_TOKENS)
    choices = _choices(candidates) if candidates else ()
    share = _share(examples, processes.rank(), processes.count())
    chosen = [example for example in share if choices and example.kind == "closed"]
    written = [example for example in share if not (choices and example.kind == "closed")]

    def counted(before: int) -> Progress | None:
        return progress and (lambda done, _: progress(before + done, len(share)))

    memory.reset_peak()
    started = time.perf_counter()
    found = answer_all(
        family,
        dataset,
        written,
        batch_pairs=batch_pairs,
        cap=cap,
        beams=beams,
        max_new_tokens=tokens,
        images=images,
        progress=counted(0),
    ) + score_closed_candidates(
        family,
        dataset,
        chosen,
        choices,
        batch_pairs=batch_pairs,
        cap=cap,
        images=images,
        progress=counted(len(written)),
    )
    with processes.losing_none():
        everything = processes.gathered((found, memory.peak_memory_bytes()))
    seconds = time.perf_counter() - started
    by_id = {prediction.id: prediction for predictions, _ in everything for prediction in predictions}
    predictions = [by_id[example.id] for example in examples]
    evaluation = Evaluation(
        predictions=predictions,
        metrics=processes.from_first(
            lambda: (
                score_report(examples, predictions, normalisations=normalisations_for(dataset.name))
                if report
                else score_vqa(examples, predictions, normalisation=normalisation)
            )
        ),
        seconds=seconds,
        pairs_per_second=len(examples) / seconds,
        peak_memory_bytes=max(peak for _, peak in everything),
    )
    if out is not None and processes.is_first():
        write_results(
            out,
            dataset,
            examples,
            predictions,
            evaluation.metrics,
            **(names or {}),
            normalisation=list(normalisations_for(dataset.name)) if report else normalisation,
            settings={
                "batch_pairs": batch_pairs,
                "cap": cap,
                "beams": beams,
                "max_new_tokens": tokens,
                "candidates": candidates,
            },
            seconds=seconds,
            pairs_per_second=evaluation.pairs_per_second,
            peak_memory_bytes=evaluation.peak_memory_bytes,
            device=str(family.device),
        )
    return evaluation


def _share(examples: Sequence[Example], rank: int, ranks: int) -> list[Example]:
    """The examples that process `rank` answers: those of whole images, about as many as each other has."""
    groups = group_by_image(examples)
    counts = [len(group) for group in groups]
    shares = rank_shares(counts, min(ranks, len(groups)))
    mine = shares[rank] if rank < len(shares) else []
    return [example for index in mine for example in groups[index]]


def _make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}. Choose another --out.") from error


def _choices(candidates: str) -> tuple[str, ...]:
    choices = tuple(dict.fromkeys(word.strip() for word in candidates.split("/") if word.strip()))
    if len(choices) < 2:
        raise InputError(f"candidates '{candidates}': give two or more answers, such as yes/no.")
    return choices


def answer_all(
    family: Family,
    dataset: Dataset,
    examples: Sequence[Example],
    *,
    batch_pairs: int = 64,
    cap: int | None = None,
    beams: int = 1,
    max_new_tokens: int = ANSWER_TOKENS,
    images: ImageCache | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """The model's own answer to every example; `score` is the mean log-probability of its tokens.

    Raises:
        InputError: an image cannot be read, or memory runs out.
    """
    predictions = []
    for members, pixels in _batches(images or _opener(family, dataset), examples, batch_pairs, cap):
        groups = [
            Group(
                group[0].images,
                tuple(family.encode(e.id, e.question, None, report=e.kind == "report") for e in group),
            )
            for group in members
        ]
        with _memory_for(batch_pairs):
            answers = family.answer(groups, pixels, max_new_tokens=max_new_tokens, beams=beams)
        for group, group_answers in zip(members, answers, strict=True):
            for example, answer in zip(group, group_answers, strict=True):
                predictions.append(Prediction(example.id, answer.text, _finite(answer.score)))
        if progress is not None:
            progress(len(predictions), len(examples))
    return predictions


def score_closed_candidates(
    family: Family,
    dataset: Dataset,
    examples: Sequence[Example],
    candidates: Sequence[str] = ("yes", "no"),
    *,
    batch_pairs: int = 64,
    cap: int | None = None,
    images: ImageCache | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """The most probable of `candidates` for every example, all scored in one forward pass a batch.

    A candidate's probability is that of its tokens with the end token, not divided by their number. `score`
    is the log of the chosen one's share among the candidates. Ties go to the candidate named first.

    Raises:
        InputError: an image cannot be read, or memory runs out.
    """
    import torch
    from accelerate.utils import send_to_device

    predictions = []
    pairs = max(1, batch_pairs // max(1, len(candidates)))
    for members, pixels in _batches(images or _opener(family, dataset), examples, pairs, cap):
        groups = [
            Group(
                group[0].images,
                tuple(
                    family.encode(f"{e.id}={word}", e.question, word) for e in group for word in candidates
                ),
            )
            for group in members
        ]
        with _memory_for(batch_pairs), torch.inference_mode():
            batch = send_to_device(family.collate(groups, pixels), family.device)
            sums = family.log_probs(batch).double().reshape(-1, len(candidates))  # [examples, candidates]
            shares = torch.log_softmax(sums, dim=1).cpu()
        for example, share in zip((e for group in members for e in group), shares.tolist(), strict=True):
            best = max(range(len(candidates)), key=share.__getitem__)
            predictions.append(Prediction(example.id, candidates[best], _finite(share[best])))
        if progress is not None:
            progress(len(predictions), len(examples))
    return predictions


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


class _memory_for:
    """Turns running out of memory on the device into an error that says what to lower."""

    def __init__(self, batch_pairs: int) -> None:
        self.batch_pairs = batch_pairs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise InputError(
                f"the device ran out of memory with {self.batch_pairs} questions at once. Lower --batch."
            ) from error


def _batches(
    opened: Callable[[str], Pixels], examples: Sequence[Example], pairs: int, cap: int | None
) -> Iterator[tuple[list[list[Example]], list[list[Pixels]]]]:
    """Groups of examples with the processed images of each; an image shared with the batch before is kept."""
    groups = group_by_image(examples, cap)
    held: dict[str, Pixels] = {}
    for batch in pair_batches([len(group) for group in groups], pairs):
        members = [groups[index] for index in batch]
        keys = dict.fromkeys(key for group in members for key in group[0].images)
        held = {key: held[key] if key in held else opened(key) for key in keys}
        yield members, [[held[key] for key in group[0].images] for group in members]


def _opener(family: Family, dataset: Dataset) -> Callable[[str], Pixels]:
    from normtune.image_cache import read_pixels

    return partial(read_pixels, family, dataset)


def evaluate_config(config: EvaluateConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Evaluate what `config` names; returns what metrics.json holds, with `out`.

    Raises:
        InputError: bad model, adapter, data or image.
    """
    from normtune.asking import open_model
    from normtune.catalog import open_from
    from normtune.image_cache import ImageCache, image_store

    processes.join(config.device)
    dataset = open_from(config)
    examples = dataset.split(config.split)[: config.limit]
    family = open_model(
        config.model, config.adapter, dtype=config.dtype, device=config.device, quantize=config.quantize
    )
    store = image_store(config.cache, family)
    images = None if store is None else ImageCache(family, dataset, frozen=True, store=store)
    evaluate(
        family,
        dataset,
        examples,
        config.out,
        batch_pairs=config.batch,
        beams=config.beams,
        max_new_tokens=config.max_new_tokens,
        candidates=config.candidates,
        normalisation=config.normalisation,
        images=images,
        progress=progress,
        names={"base": config.model, "adapter": str(config.adapter) if config.adapter else None},
    )
    found: dict[str, Any] = processes.from_first(lambda: read_json(config.out / "metrics.json"))
    return {**found, "out": str(config.out)}


def metrics_text(found: Mapping[str, Any]) -> str:
    """The metrics of one evaluation as an aligned table, in %, with what they rest on."""
    width = max(len(name) for name in found["metrics"])
    lines = [f"{found['dataset']}: {found['rows']} rows, {found['images']} images; {found['intervals']}"]
    for name, metric in found["metrics"].items():
        value, low, high = (100 * metric[end] for end in ("value", "low", "high"))
        basis = f"{metric['rows']} rows, {metric['images']} images"
        lines.append(f"{name:<{width}}  {value:6.2f}  [{low:.2f}, {high:.2f}]  {basis}")
    speed = f"{found['seconds']:.1f} s, {found['pairs_per_second']:.1f} pairs/s"
    return "\n".join([*lines, f"{speed}; {found['notice']}. Written: {found['out']}"])

"""Evaluates a model on the examples of a split: answers them, scores the answers and writes both to files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.data import tasks
from normtune.data.batches import split_across_ranks
from normtune.data.groups import group_by_image
from normtune.data.records import Dataset, Example, Prediction
from normtune.data.tasks import MAX_ANSWER_TOKENS
from normtune.errors import InputError
from normtune.evaluation import image_reliance
from normtune.evaluation.results import write_results
from normtune.evaluation.score_files import clinical_table
from normtune.inference.predict import Progress, answer_all, score_closed_candidates
from normtune.metrics.answers import Metric, check_unique_ids
from normtune.metrics.normalisation import normalise
from normtune.metrics.reports import normalisations_for, text_pairs
from normtune.metrics.strata import Strata, score_strata, strata_text
from normtune.metrics.table import metric_table, summarize_metrics
from normtune.runtime import distributed, memory
from normtune.runtime.files import make_directory, read_json
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import text_table

if TYPE_CHECKING:
    from normtune.evaluation.config import EvaluateConfig
    from normtune.evaluation.retrieval import Predictor
    from normtune.models.family import Family
    from normtune.models.image_cache import ImageCache

# Dataset names that are file formats: two datasets of the same name may have different data.
FILE_FORMATS = ("jsonl", "parquet", "messages")


@dataclass(frozen=True)
class Scores:
    """The scores of an evaluation: by metric, by stratum, by finding (reports) and by control image."""

    metrics: dict[str, Metric]
    strata: Strata  # see `normtune.metrics.strata.score_strata`
    # labeller -> finding -> precision, recall, f1 and counts; empty if no reference mentions a chest finding
    findings: dict[str, Any]
    reliance: dict[str, dict[str, Any]]  # see `normtune.evaluation.image_reliance.image_reliance`


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a model and their scores.

    `seconds` is the time to read the images and to answer. `peak_memory_bytes` is the peak during that time,
    the model included: memory allocated on the CUDA device, else resident memory of the process. Neither
    includes control images.
    """

    predictions: list[Prediction]  # in the order of the examples
    scores: Scores
    seconds: float
    pairs_per_second: float
    peak_memory_bytes: int
    controls: dict[str, list[Prediction]]  # control -> predictions for its images

    @property
    def metrics(self) -> dict[str, Metric]:
        """Metric name -> score over all rows."""
        return self.scores.metrics


def evaluate(
    family: Family | None,
    dataset: Dataset,
    examples: Sequence[Example],
    out: Path | None = None,
    *,
    batch_pairs: int = 64,
    max_group_size: int | None = None,
    beams: int = 1,
    max_new_tokens: int | None = None,
    candidates: str | None = None,
    controls: str | None = None,
    normalisation: str = "vqa",
    metadata: Mapping[str, Any] | None = None,
    image_cache: ImageCache | None = None,
    baseline: Predictor | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer every example, score the answers, and write both to `out` if it is given.

    Examples are grouped by image, and each image is opened once (a second time for its closed questions if
    `candidates` are given). Several processes divide the images among them; each answers its share, and all
    of them return all predictions. The first process scores and writes.

    Args:
        family: the model, which answers with `generate_answers` (and `log_probs` with `candidates`). None
            with a baseline.
        dataset: opens the images.
        examples: all questions, or all report requests; no id may occur more than once.
        out: directory for `predictions.jsonl` (id, images, kind, question, reference, prediction, score,
            strata), a file of the same form for each control (`predictions-blank.jsonl`), `manifest.json`
            (ids and their hash) and `metrics.json`, which is written last.
        batch_pairs: approximate number of questions answered at once.
        max_group_size: maximum number of questions about one image in a group; None has no limit.
        beams: width of the beam search; 1 is greedy decoding.
        max_new_tokens: maximum length of an answer; by default 16 for answers and 128 for reports.
        candidates: for example "yes/no": closed questions get the most probable of these instead of a
            generated answer.
        controls: for example "blank,noise,other": the questions are also answered with these images instead
            of the real ones, see `normtune.evaluation.image_reliance`.
        normalisation: applied to answers before they are scored, see `normtune.metrics.normalisation`.
            Reports are scored under the normalisations of `normtune.metrics.reports.normalisations_for`.
        metadata: further fields of metrics.json (base, adapter, ...).
        image_cache: opens the images and keeps their encoder outputs; by default each image is opened for its
            batch.
        baseline: predicts instead of the model, see `normtune.evaluation.retrieval.fit_baseline`.
        progress: called with (pairs done, pairs in all) after each batch.

    Raises:
        InputError: if there are no examples, an id occurs more than once, answers and reports are mixed, an
            image cannot be read, memory is exhausted, or there is no other image for a control.
    """
    if not examples:
        raise InputError("there is nothing to evaluate: no examples. Choose another split.")
    check_unique_ids([example.id for example in examples], "examples")
    is_report = examples[0].kind == "report"
    if any((example.kind == "report") != is_report for example in examples):
        raise InputError("answers and reports cannot be evaluated together. Evaluate one task at a time.")
    normalise("", normalisation)  # reports an unknown name (and below, an unwritable `out`) before hours of work
    control_datasets = {
        name: image_reliance.control_dataset(dataset, examples, name)
        for name in image_reliance.parse_controls(controls)
    }
    if out is not None:
        make_directory(out)
    tokens = max_new_tokens or (tasks.MAX_REPORT_TOKENS if is_report else MAX_ANSWER_TOKENS)
    choices = _parse_candidates(candidates) if candidates else ()
    share = _examples_of_rank(examples, distributed.rank(), distributed.world_size())
    closed = [example for example in share if choices and example.kind == "closed"]
    generated = [example for example in share if not (choices and example.kind == "closed")]

    def predict(source: Dataset, cache: ImageCache | None, before: int) -> tuple[list[Prediction], int]:
        """Predict with the images of `source`.

        Returns the predictions of all processes and the largest peak memory. `before` pairs are already done.
        """

        def progress_from(before: int) -> Progress | None:
            total = len(share) * (1 + len(control_datasets))
            return progress and (lambda done, _: progress(before + done, total))

        options: dict[str, Any] = {"batch_pairs": batch_pairs, "cap": max_group_size, "images": cache}
        if baseline is not None:
            share_predictions = baseline(source, share)
        else:
            assert family is not None, "without a baseline, there must be a model"
            share_predictions = answer_all(
                family, source, generated, beams=beams, max_new_tokens=tokens, progress=progress_from(before), **options
            ) + score_closed_candidates(
                family, source, closed, choices, progress=progress_from(before + len(generated)), **options
            )
        with distributed.lost_process_as_error():
            results = distributed.all_gather((share_predictions, memory.peak_memory_bytes()))
        by_id = {prediction.id: prediction for predictions, _ in results for prediction in predictions}
        return [by_id[example.id] for example in examples], max(peak for _, peak in results)

    memory.reset_peak()
    started = time.perf_counter()
    predictions, peak = predict(dataset, image_cache, 0)
    seconds = time.perf_counter() - started
    control_predictions = {
        name: predict(control, image_cache and image_cache.for_dataset(control), (1 + number) * len(share))[0]
        for number, (name, control) in enumerate(control_datasets.items())
    }
    # Reports are scored under several normalisations, answers under one.
    applied = normalisations_for(dataset.name) if is_report else normalisation
    evaluation = Evaluation(
        predictions=predictions,
        scores=distributed.broadcast_from_first(
            lambda: _compute_scores(examples, predictions, control_predictions, applied)
        ),
        seconds=seconds,
        pairs_per_second=len(examples) / seconds,
        peak_memory_bytes=peak,
        controls=control_predictions,
    )
    if out is not None and distributed.is_main_process():
        scores = evaluation.scores
        write_results(
            out,
            dataset,
            examples,
            predictions,
            scores.metrics,
            control_predictions,
            strata=scores.strata,
            **({"findings": scores.findings} if scores.findings else {}),
            **({"reliance": scores.reliance} if control_predictions else {}),
            **(metadata or {}),
            normalisation=list(applied) if is_report else normalisation,
            settings={
                "batch_pairs": batch_pairs,
                "cap": max_group_size,
                "beams": beams,
                "max_new_tokens": tokens,
                "candidates": candidates,
                "controls": list(control_predictions),
            },
            seconds=seconds,
            pairs_per_second=evaluation.pairs_per_second,
            peak_memory_bytes=evaluation.peak_memory_bytes,
            device="cpu" if family is None else str(family.device),
        )
    return evaluation


def _compute_scores(
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    controls: Mapping[str, Sequence[Prediction]],
    normalisation: str | Sequence[str],
) -> Scores:
    """Compute all scores of the predictions, and those of the control images if there are any."""
    table = metric_table(examples, predictions, normalisation)
    is_report = not isinstance(normalisation, str)
    control_tables = {name: metric_table(examples, rows, normalisation) for name, rows in controls.items()}
    return Scores(
        metrics=summarize_metrics(table, examples),
        strata=score_strata(examples, table),
        findings=clinical_table(text_pairs(examples, predictions))[1] if is_report else {},
        reliance=image_reliance.image_reliance(examples, table, control_tables),
    )


def _examples_of_rank(examples: Sequence[Example], rank: int, ranks: int) -> list[Example]:
    """Select the examples that process `rank` answers.

    All examples of an image go to the same process, and all processes get about the same number of examples.
    """
    groups = group_by_image(examples)
    counts = [len(group) for group in groups]
    shares = split_across_ranks(counts, min(ranks, len(groups)))
    group_indices = shares[rank] if rank < len(shares) else []
    return [example for index in group_indices for example in groups[index]]


def _parse_candidates(candidates: str) -> tuple[str, ...]:
    """Split "yes/no" into ("yes", "no"), without repetitions."""
    choices = tuple(dict.fromkeys(word.strip() for word in candidates.split("/") if word.strip()))
    if len(choices) < 2:
        raise InputError(f"candidates '{candidates}': give two or more answers, such as yes/no.")
    return choices


def evaluate_config(config: EvaluateConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Evaluate the model, adapter and data that `config` names.

    Returns:
        The contents of metrics.json, and `out`.

    Raises:
        InputError: if the model, the adapter, the data or an image is unusable.
    """
    from normtune.adapters.storage import load_model
    from normtune.data.registry import open_configured
    from normtune.evaluation.retrieval import fit_baseline
    from normtune.models.image_cache import ImageCache, image_store

    needs_model = config.baseline in (None, "retrieval")
    if config.baseline and (config.candidates or (config.adapter and not needs_model)):
        option = "candidates" if config.candidates else "adapter"
        raise InputError(
            f"--baseline {config.baseline} predicts texts of the training split and does not use --{option}. "
            f"Remove --{option}."
        )
    distributed.init_processes(config.device)
    dataset = open_configured(config)
    examples = dataset.split(config.split)[: config.limit]
    family = None
    if needs_model:
        family = load_model(
            config.model, config.adapter, dtype=config.dtype, device=config.device, quantize=config.quantize
        )
    baseline = None
    if config.baseline:
        baseline = fit_baseline(config.baseline, family, dataset, dataset.split("train"))
    # Baselines open images themselves and use no cache.
    store = None if family is None or baseline else image_store(config.cache, family)
    image_cache = None
    if family is not None and store is not None:
        image_cache = ImageCache(family, dataset, frozen=True, store=store)
    evaluate(
        family,
        dataset,
        examples,
        config.out,
        batch_pairs=config.batch,
        beams=config.beams,
        max_new_tokens=config.max_new_tokens,
        candidates=config.candidates,
        controls=config.controls,
        normalisation=config.normalisation,
        image_cache=image_cache,
        baseline=baseline,
        progress=progress,
        metadata={
            "base": config.model if needs_model else None,
            "adapter": str(config.adapter) if config.adapter else None,
            **({} if config.baseline else _setting(config.adapter, dataset.name)),
            "data": config.data_options(),
            **({"baseline": config.baseline} if config.baseline else {}),
        },
    )
    result: dict[str, Any] = distributed.broadcast_from_first(lambda: read_json(config.out / "metrics.json"))
    return {**result, "out": str(config.out)}


def _setting(adapter: Path | None, dataset: str) -> dict[str, str | None]:
    """Compare the training data that the adapter's file records with the evaluated dataset.

    Returns:
        `trained_on` (name of the dataset) and `setting`: zero-shot (no adapter), in-distribution (the same
        dataset), out-of-distribution (another dataset), or unknown.
    """
    from normtune.adapters.storage import read_adapter_info

    if adapter is None:
        return {"trained_on": None, "setting": "zero-shot"}
    name = (read_adapter_info(adapter).data or {}).get("name")
    if name is None or (name == dataset and name in FILE_FORMATS):
        return {"trained_on": name, "setting": "unknown"}
    return {"trained_on": name, "setting": "in-distribution" if name == dataset else "out-of-distribution"}


def metrics_text(result: Mapping[str, Any]) -> str:
    """Format the result of `evaluate_config` as aligned tables: metrics in %, with their rows and images."""
    lines = [f"{result['dataset']}: {result['rows']} rows, {result['images']} images; {result['intervals']}"]
    if result.get("setting") == "zero-shot":
        lines.append("zero-shot: no adapter")
    elif result.get("setting"):
        trained_on = result["trained_on"] or "data that its file does not name"
        lines.append(f"{result['setting']}: the adapter was trained on {trained_on}")
    lines += text_table(
        [name, format_interval(metric, digits=2), f"{metric['rows']} rows, {metric['images']} images"]
        for name, metric in result["metrics"].items()
    )
    lines += ["", strata_text(result["strata"])] if result.get("strata") else []
    lines += ["", image_reliance.reliance_text(result["reliance"])] if result.get("reliance") else []
    speed = f"{result['seconds']:.1f} s, {result['pairs_per_second']:.1f} pairs/s"
    return "\n".join([*lines, f"{speed}; {result['notice']}. Written: {result['out']}"])

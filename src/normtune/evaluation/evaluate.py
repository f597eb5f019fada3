"""A model and the examples of a split -> answers, scores, and their files."""

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
from normtune.metrics.strata import Strata, strata, strata_text
from normtune.metrics.table import metric_table, summarize_metrics
from normtune.runtime import distributed, memory
from normtune.runtime.files import read_json

if TYPE_CHECKING:
    from normtune.evaluation.config import EvaluateConfig
    from normtune.evaluation.retrieval import Answers
    from normtune.models.family import Family
    from normtune.models.image_cache import ImageCache

FILE_FORMATS = ("jsonl", "parquet", "messages")  # datasets whose name does not say whose data they are


@dataclass(frozen=True)
class Scores:
    """What an evaluation found: by metric, by stratum, by finding of reports, by control image.

    `strata` is described in `normtune.metrics.strata`, `reliance` in `normtune.evaluation.image_reliance.reliance`; `findings`
    holds labeller -> finding -> precision, recall, f1 and counts, where reports speak of any (chest images).
    """

    metrics: dict[str, Metric]
    strata: Strata
    findings: dict[str, Any]
    reliance: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What a model answered, in the order of the examples, and how it scored.

    `seconds` holds reading the images and answering; `peak_memory_bytes` is that stretch's peak, the model
    included: allocated on the CUDA device, else resident on the host. Control images are in neither.
    """

    predictions: list[Prediction]
    scores: Scores
    seconds: float
    pairs_per_second: float
    peak_memory_bytes: int
    controls: dict[str, list[Prediction]]  # what was answered to control images

    @property
    def metrics(self) -> dict[str, Metric]:
        """Every metric over all rows."""
        return self.scores.metrics


def evaluate(
    family: Family | None,
    dataset: Dataset,
    examples: Sequence[Example],
    out: Path | None = None,
    *,
    batch_pairs: int = 64,
    cap: int | None = None,
    beams: int = 1,
    max_new_tokens: int | None = None,
    candidates: str | None = None,
    controls: str | None = None,
    normalisation: str = "vqa",
    names: Mapping[str, Any] | None = None,
    images: ImageCache | None = None,
    baseline: Answers | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer every example, score the answers, and write both under `out` where it is given.

    Examples are grouped by image, and each image is opened once (once more for its closed questions where
    `candidates` are given). Several processes deal the images out among them, each answers its share, and all
    return the whole; the first of them scores and writes.

    Args:
        family: the model, seen through `answer` (and `log_probs` with `candidates`); None with a baseline.
        dataset: opens the images.
        examples: all questions, or all report requests; ids differ.
        out: directory for `predictions.jsonl` (id, images, kind, question, reference, prediction, score,
            strata), as much for each control (`predictions-blank.jsonl`), `manifest.json` (ids and their
            hash) and `metrics.json`, written last.
        batch_pairs: questions answered at once, about.
        cap: at most so many questions of one image in a group.
        beams: of the search; 1 is greedy.
        max_new_tokens: longest answer; by default 16 for answers and 128 for reports.
        candidates: such as "yes/no": closed questions get the most probable of these instead of a
            generated answer.
        controls: such as "blank,noise,other": the same is asked of these images in the place of the real
            ones, see `normtune.evaluation.image_reliance`.
        normalisation: of answers before they are scored, see `normtune.metrics.normalisation`; reports are scored
            under those of `normtune.metrics.reports.normalisations_for`.
        names: what to record of the run besides (base, adapter, ...).
        images: opens and holds the images; by default each is opened for its batch.
        baseline: predicts in the model's place, see `normtune.evaluation.retrieval.fitted`.
        progress: called with (pairs done, pairs in all) after each batch.

    Raises:
        InputError: no examples, an id twice, answers and reports mixed, an unreadable image, no memory, or no
            other image to show.
    """
    if not examples:
        raise InputError("there is nothing to evaluate: no examples. Choose another split.")
    check_unique_ids([example.id for example in examples], "examples")
    report = examples[0].kind == "report"
    if any((example.kind == "report") != report for example in examples):
        raise InputError("answers and reports cannot be evaluated together. Evaluate one task at a time.")
    normalise("", normalisation)  # a wrong name or an unwritable place is told before the hours of answering
    replaced = {
        name: image_reliance.control_dataset(dataset, examples, name)
        for name in image_reliance.controls_of(controls)
    }
    if out is not None:
        _make_directory(out)
    tokens = max_new_tokens or (tasks.MAX_REPORT_TOKENS if report else MAX_ANSWER_TOKENS)
    choices = _choices(candidates) if candidates else ()
    share = _share(examples, distributed.rank(), distributed.count())
    chosen = [example for example in share if choices and example.kind == "closed"]
    written = [example for example in share if not (choices and example.kind == "closed")]

    def answered(shown: Dataset, held: ImageCache | None, before: int) -> tuple[list[Prediction], int]:
        """What all processes answer to the images of `shown`, and their peak memory."""

        def counted(before: int) -> Progress | None:
            total = len(share) * (1 + len(replaced))
            return progress and (lambda done, _: progress(before + done, total))

        options: dict[str, Any] = {"batch_pairs": batch_pairs, "cap": cap, "images": held}
        if baseline is not None:
            found = baseline(shown, share)
        else:
            assert family is not None, "a model answers where no baseline does"
            found = answer_all(
                family,
                shown,
                written,
                beams=beams,
                max_new_tokens=tokens,
                progress=counted(before),
                **options,
            ) + score_closed_candidates(
                family, shown, chosen, choices, progress=counted(before + len(written)), **options
            )
        with distributed.lost_process_as_error():
            everything = distributed.all_gather((found, memory.peak_memory_bytes()))
        by_id = {prediction.id: prediction for predictions, _ in everything for prediction in predictions}
        return [by_id[example.id] for example in examples], max(peak for _, peak in everything)

    memory.reset_peak()
    started = time.perf_counter()
    predictions, peak = answered(dataset, images, 0)
    seconds = time.perf_counter() - started
    controlled = {
        name: answered(shown, images and images.of(shown), (1 + number) * len(share))[0]
        for number, (name, shown) in enumerate(replaced.items())
    }
    used = normalisations_for(dataset.name) if report else normalisation
    evaluation = Evaluation(
        predictions=predictions,
        scores=distributed.broadcast_from_first(lambda: _scores(examples, predictions, controlled, used)),
        seconds=seconds,
        pairs_per_second=len(examples) / seconds,
        peak_memory_bytes=peak,
        controls=controlled,
    )
    if out is not None and distributed.is_main_process():
        found = evaluation.scores
        write_results(
            out,
            dataset,
            examples,
            predictions,
            found.metrics,
            controlled,
            strata=found.strata,
            **({"findings": found.findings} if found.findings else {}),
            **({"reliance": found.reliance} if controlled else {}),
            **(names or {}),
            normalisation=list(used) if report else normalisation,
            settings={
                "batch_pairs": batch_pairs,
                "cap": cap,
                "beams": beams,
                "max_new_tokens": tokens,
                "candidates": candidates,
                "controls": list(controlled),
            },
            seconds=seconds,
            pairs_per_second=evaluation.pairs_per_second,
            peak_memory_bytes=evaluation.peak_memory_bytes,
            device="cpu" if family is None else str(family.device),
        )
    return evaluation


def _scores(
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    controlled: Mapping[str, Sequence[Prediction]],
    normalisation: str | Sequence[str],
) -> Scores:
    table = metric_table(examples, predictions, normalisation)
    report = not isinstance(normalisation, str)
    replaced = {name: metric_table(examples, found, normalisation) for name, found in controlled.items()}
    return Scores(
        metrics=summarize_metrics(table, examples),
        strata=strata(examples, table),
        findings=clinical_table(text_pairs(examples, predictions))[1] if report else {},
        reliance=image_reliance.image_reliance(examples, table, replaced),
    )


def _share(examples: Sequence[Example], rank: int, ranks: int) -> list[Example]:
    """The examples that process `rank` answers: those of whole images, about as many as each other has."""
    groups = group_by_image(examples)
    counts = [len(group) for group in groups]
    shares = split_across_ranks(counts, min(ranks, len(groups)))
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


def evaluate_config(config: EvaluateConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Evaluate what `config` names; returns what metrics.json holds, with `out`.

    Raises:
        InputError: bad model, adapter, data or image.
    """
    from normtune.adapters.storage import load_model
    from normtune.data.registry import open_configured
    from normtune.evaluation.retrieval import fitted
    from normtune.models.image_cache import ImageCache, image_store

    looks = config.baseline in (None, "retrieval")
    if config.baseline and (config.candidates or (config.adapter and not looks)):
        raise InputError(
            f"--baseline {config.baseline} takes no {'candidates' if config.candidates else 'adapter'}: "
            "it predicts texts of the training split. Leave it out."
        )
    distributed.init_processes(config.device)
    dataset = open_configured(config)
    examples = dataset.split(config.split)[: config.limit]
    family = None
    if looks:
        family = load_model(
            config.model, config.adapter, dtype=config.dtype, device=config.device, quantize=config.quantize
        )
    baseline = None
    if config.baseline:
        baseline = fitted(config.baseline, family, dataset, dataset.split("train"))
    store = None if family is None or baseline else image_store(config.cache, family)
    images = None
    if family is not None and store is not None:
        images = ImageCache(family, dataset, frozen=True, store=store)
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
        images=images,
        baseline=baseline,
        progress=progress,
        names={
            "base": config.model if looks else None,
            "adapter": str(config.adapter) if config.adapter else None,
            **({} if config.baseline else _setting(config.adapter, dataset.name)),
            "data": config.data_options(),
            **({"baseline": config.baseline} if config.baseline else {}),
        },
    )
    found: dict[str, Any] = distributed.broadcast_from_first(lambda: read_json(config.out / "metrics.json"))
    return {**found, "out": str(config.out)}


def _setting(adapter: Path | None, dataset: str) -> dict[str, str | None]:
    """What the adapter was trained on, by its own word, and what an evaluation on `dataset` is by it."""
    from normtune.adapters.storage import read_adapter_info

    if adapter is None:
        return {"trained_on": None, "setting": "zero-shot"}
    name = (read_adapter_info(adapter).data or {}).get("name")
    if name is None or (name == dataset and name in FILE_FORMATS):
        return {"trained_on": name, "setting": "unknown"}
    return {"trained_on": name, "setting": "in-distribution" if name == dataset else "out-of-distribution"}


def metrics_text(found: Mapping[str, Any]) -> str:
    """The metrics of one evaluation as an aligned table, in %, with what they rest on."""
    width = max(len(name) for name in found["metrics"])
    lines = [f"{found['dataset']}: {found['rows']} rows, {found['images']} images; {found['intervals']}"]
    if found.get("setting") == "zero-shot":
        lines.append("zero-shot: no adapter")
    elif found.get("setting"):
        lines.append(
            f"{found['setting']}: the adapter was trained on {found['trained_on'] or 'nothing it names'}"
        )
    for name, metric in found["metrics"].items():
        value, low, high = (100 * metric[end] for end in ("value", "low", "high"))
        basis = f"{metric['rows']} rows, {metric['images']} images"
        lines.append(f"{name:<{width}}  {value:6.2f}  [{low:.2f}, {high:.2f}]  {basis}")
    lines += ["", strata_text(found["strata"])] if found.get("strata") else []
    lines += ["", image_reliance.reliance_text(found["reliance"])] if found.get("reliance") else []
    speed = f"{found['seconds']:.1f} s, {found['pairs_per_second']:.1f} pairs/s"
    return "\n".join([*lines, f"{speed}; {found['notice']}. Written: {found['out']}"])

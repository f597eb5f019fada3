"""Evaluates a model on some examples: answers them, scores the answers and writes both to files."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.data import tasks
from normtune.data.batches import examples_of_rank
from normtune.data.choices import ChoiceFormat
from normtune.data.formats import FORMATS
from normtune.data.records import Dataset, Prediction, Split, is_abstained
from normtune.data.run_file import RUN_FILE, run_file_text
from normtune.errors import InputError
from normtune.evaluation import image_reliance
from normtune.evaluation.config import parse_scorings
from normtune.evaluation.conformal_sets import read_calibration
from normtune.evaluation.prediction_scores import compute_scores, describe_confidence
from normtune.evaluation.results import Evaluation, Predictions, make_record
from normtune.inference.choices import answer_choices
from normtune.inference.predict import Progress, answer_all, score_closed_candidates
from normtune.metrics.answers import check_unique_ids
from normtune.metrics.metric_models import MetricModel, parse_metric_models
from normtune.metrics.reports import normalisations_for
from normtune.runtime import distributed, memory
from normtune.runtime.files import make_directory, write_text

if TYPE_CHECKING:
    from normtune.data.preflight import Preflight
    from normtune.evaluation.config import EvaluateConfig
    from normtune.evaluation.retrieval import Predictor
    from normtune.models.family import Family
    from normtune.models.image_cache import ImageCache


def evaluate_config(
    config: EvaluateConfig,
    *,
    family: Family | None = None,
    dataset: Dataset | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Load the model, adapter and data that `config` names, and evaluate.

    Args:
        family: the loaded model, with its adapter; None: it is loaded.
        dataset: the opened dataset; None: it is opened.
        progress: called with (pairs done, pairs in all) after each batch.

    Raises:
        InputError: if the model, the adapter, the data or an image is unusable.
    """
    from normtune.adapters.storage import load_model
    from normtune.data.registry import open_configured
    from normtune.inference.limits import check_run

    needs_model = config.baseline in (None, "retrieval")
    if config.baseline and (config.candidates or (config.adapter and not needs_model)):
        option = "candidates" if config.candidates else "adapter"
        raise InputError(
            f"--baseline {config.baseline} predicts texts of the training split and does not use --{option}. "
            f"Remove --{option}."
        )
    distributed.init_processes(config.device)
    if dataset is None:
        dataset = open_configured(config)
    examples = dataset.split(config.split)[: config.limit]
    if not needs_model:
        family = None
    examples, preflight = check_run(
        config,
        examples,
        family or (config.model if needs_model else None),
        adapter=config.adapter,
        max_answer=config.max_new_tokens,
        normalisation=config.normalisation,
    )
    _metric_models(config, examples)  # checked before the model is loaded
    if needs_model and family is None:
        family = load_model(
            config.model, config.adapter, dtype=config.dtype, device=config.device, quantize=config.quantize
        )
    with nullcontext() if family is None else family.pixel_limit(config.max_pixels):
        return evaluate(family, examples, config, preflight=preflight, progress=progress)


def evaluate(
    family: Family | None,
    examples: Split,
    config: EvaluateConfig,
    *,
    preflight: Preflight | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer every example, score the answers, and write both to `config.out` if it is set.

    Examples are grouped by image, and each image is opened once (a second time for its closed questions if
    there are candidates). Several processes divide the images among them; each answers its share, and all of
    them return all predictions. The first process scores and writes.

    Args:
        family: the model, with the adapter that `config` names; None with a baseline that needs no model.
        examples: all questions, or all report requests; no id may occur more than once.
        config: how to answer and to score; which model and data it names is only recorded.
        preflight: the counts of the rows, to be recorded; see `normtune.inference.limits.check_run`.
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
    dataset = examples.dataset
    # reported before hours of work: an unknown control, and (below) an unwritable `out`
    control_datasets = {
        name: image_reliance.control_dataset(dataset, examples, name)
        for name in image_reliance.parse_controls(config.controls)
    }
    calibration = None if config.conformal is None else read_calibration(config.conformal, config, examples)
    models = _metric_models(config, examples)
    limit = config.max_new_tokens
    if limit is None and preflight is not None:
        limit = preflight.limits.get("answers", {}).get("limit")
    answerer = _Answerer(family, examples, config, limit, progress, rounds=1 + len(control_datasets))
    if config.out is not None:
        make_directory(config.out)
    baseline, cache = _baseline_and_cache(family, dataset, config)
    memory.reset_peak(family.device if family else None)
    started = time.perf_counter()
    predictions, peak = answerer.predict(dataset, baseline, cache)
    seconds = time.perf_counter() - started
    controls = {
        name: answerer.predict(control, baseline, cache and cache.for_dataset(control))[0]
        for name, control in control_datasets.items()
    }
    # Reports are scored under several normalisations, answers under one.
    applied = list(normalisations_for(dataset.name)) if is_report else config.normalisation
    record: dict[str, Any] = distributed.broadcast_from_first(
        lambda: make_record(
            examples,
            **compute_scores(examples, predictions, controls, applied, models),
            **describe_confidence(examples, predictions, applied, config.abstain_below, calibration),
            **_describe_model(family, config, examples),
            **({} if family is None else family.self_test_record()),
            data=config.data_options(),
            **({} if preflight is None else {"preflight": preflight.figures()}),
            normalisation=applied,
            prompt=None if family is None or config.baseline else family.prompt_template,
            settings={
                "batch_pairs": config.batch,
                "cap": None,
                "beams": config.beams,
                "max_new_tokens": answerer.max_new_tokens,
                **({} if family is None or config.baseline else {"generation": answerer.generation}),
                "candidates": config.candidates,
                **(answerer.choice_settings() if any(example.options for example in examples) else {}),
                "controls": list(controls),
                **({} if config.abstain_below is None else {"abstain_below": config.abstain_below}),
                **({} if config.conformal is None else {"conformal": str(config.conformal)}),
                **({} if config.metric_model is None else {"metric_model": config.metric_model}),
            },
            seconds=seconds,
            pairs_per_second=len(examples) / seconds,
            # while reading images and answering, with the model: memory allocated on the CUDA device,
            # else resident memory of the process
            peak_memory_bytes=peak,
            device="cpu" if family is None else str(family.device),
            dtype=None if family is None else str(family.dtype).removeprefix("torch."),
        )
    )
    row_scores = record.pop("row_scores", {})
    evaluation = Evaluation(examples, predictions, record, controls, config.out, row_scores=row_scores)
    if config.out is not None and distributed.is_main_process():
        if preflight is not None:
            preflight.save(config.out)
        resolved = {} if family is None else {"device": family.device.type}
        write_text(config.out / RUN_FILE, run_file_text("evaluate", config, resolved=resolved))
        evaluation.save(config.out)
    return evaluation


def _metric_models(config: EvaluateConfig, examples: Split) -> dict[str, MetricModel]:
    """Check and return the metrics that need a model.

    Raises:
        InputError: as `parse_metric_models`, or the examples are questions.
    """
    if config.metric_model and any(example.kind != "report" for example in examples):
        raise InputError("--metric-model scores reports, not answers. Remove it, or evaluate reports: --task report.")
    return parse_metric_models(config.metric_model)


def _baseline_and_cache(
    family: Family | None, dataset: Dataset, config: EvaluateConfig
) -> tuple[Predictor | None, ImageCache | None]:
    """Fit the baseline, or open the cache of encoded images; a baseline opens images itself and uses no cache."""
    if config.baseline is not None:
        from normtune.evaluation.retrieval import fit_baseline

        return fit_baseline(config.baseline, family, dataset, dataset.split("train")), None
    if config.cache is None or family is None:
        return None, None
    from normtune.models.image_cache import ImageCache, image_store

    return None, ImageCache(family, dataset, frozen=True, store=image_store(config.cache, family))


class _Answerer:
    """Answers the examples of this process, and collects the answers of all processes.

    Attributes:
        max_new_tokens: maximum length of an answer.
        generation: the settings of the checkpoint that answers follow; see `Family.generation_settings`.
    """

    def __init__(
        self,
        family: Family | None,
        examples: Split,
        config: EvaluateConfig,
        limit: int | None,
        progress: Progress | None,
        rounds: int,
    ) -> None:
        """Choose the examples of this process; they are answered `rounds` times, with other images each.

        Args:
            limit: `max_new_tokens` if it is known; None: it is derived from the model and the data.
        """
        self.family, self.examples, self.config = family, examples, config
        self.progress, self.rounds = progress, rounds
        is_report = examples[0].kind == "report"
        self.max_new_tokens = limit or (tasks.MAX_REPORT_TOKENS if is_report else tasks.MAX_ANSWER_TOKENS)
        self.generation = {} if family is None or config.generation == "greedy" else family.generation_settings()
        if limit is None and family is not None:
            from normtune.inference.limits import answer_limit  # torch takes seconds to import

            self.max_new_tokens = answer_limit(family, examples)
        self.candidates = _parse_candidates(config.candidates) if config.candidates else ()
        self.scorings = parse_scorings(config.choice_scoring)
        self.choices = ChoiceFormat() if family is None else family.choices.with_options(config)
        self.share = examples_of_rank(examples, distributed.rank(), distributed.world_size())
        self.done = 0  # pairs answered so far

    def predict(
        self, dataset: Dataset, baseline: Predictor | None, cache: ImageCache | None
    ) -> tuple[Predictions, int]:
        """Predict with the images of `dataset`.

        Returns:
            The predictions of all processes, and the largest peak memory of a process.
        """
        if baseline is not None:
            predictions = baseline(dataset, self.share)
        else:
            assert self.family is not None, "without a baseline, there must be a model"
            settings, choices = self.family.uses_checkpoint_settings, self.family.choices
            self.family.uses_checkpoint_settings = settings and self.config.generation != "greedy"
            self.family.choices = self.choices
            try:
                predictions = self._answer(self.family, dataset, cache)
            finally:
                self.family.uses_checkpoint_settings, self.family.choices = settings, choices
        peak = memory.peak_memory_bytes(self.family.device if self.family else None)
        with distributed.lost_process_as_error():
            results = distributed.all_gather((predictions, peak))
        threshold = self.config.abstain_below
        all_predictions = [
            replace(prediction, abstained=is_abstained(prediction.score, threshold))
            for predictions, _ in results
            for prediction in predictions
        ]
        return Predictions(self.examples, all_predictions), max(peak for _, peak in results)

    def _answer(self, family: Family, dataset: Dataset, cache: ImageCache | None) -> list[Prediction]:
        """Generate answers, choose among candidates of closed questions, and among the options of choices."""
        closed = [example for example in self.share if self.candidates and example.kind == "closed"]
        choices = [example for example in self.share if example.options]
        other = {example.id for example in (*closed, *choices)}
        generated = [example for example in self.share if example.id not in other]
        options: dict[str, Any] = {"batch_pairs": self.config.batch, "images": cache}
        generation: dict[str, Any] = {"beams": self.config.beams, "max_new_tokens": self.max_new_tokens}
        answers = answer_all(
            family, dataset, generated, progress=self._progress_from(self.done), **generation, **options
        )
        self.done += len(generated)
        answers += score_closed_candidates(
            family, dataset, closed, self.candidates, progress=self._progress_from(self.done), **options
        )
        self.done += len(closed)
        answers += answer_choices(
            family,
            dataset,
            choices,
            self.scorings,
            # the position of an option does not depend on the image
            rotations=self.config.choice_rotations and dataset is self.examples.dataset,
            progress=self._progress_from(self.done),
            **generation,
            **options,
        )
        self.done += len(choices)
        return answers

    def choice_settings(self) -> dict[str, Any]:
        """How options were written and selected, for `metrics.json`; a baseline chooses without a prompt."""
        if self.config.baseline is not None:
            return {}
        scorings = list(self.scorings)
        return {
            "choice_prompt": self.choices.prompt,
            "choice_scoring": scorings,
            "choice_rotations": self.config.choice_rotations,
        }

    def _progress_from(self, before: int) -> Progress | None:
        progress, total = self.progress, len(self.share) * self.rounds
        return progress and (lambda done, _: progress(before + done, total))


def _parse_candidates(candidates: str) -> tuple[str, ...]:
    """Split "yes/no" into ("yes", "no"), without repetitions."""
    choices = tuple(dict.fromkeys(word.strip() for word in candidates.split("/") if word.strip()))
    if len(choices) < 2:
        raise InputError(f"candidates '{candidates}': give two or more answers, such as yes/no.")
    return choices


def _describe_model(family: Family | None, config: EvaluateConfig, examples: Split) -> dict[str, Any]:
    """Describe what is evaluated, and compare the adapter's training data with the evaluated dataset.

    Returns:
        `base`, `adapter`, with a baseline its name, and without one `trained_on` (name of the dataset) and
        `setting`: zero-shot (no adapter), in-distribution (the same dataset), out-of-distribution (another
        dataset), or unknown; with an adapter `trained_rows`: how many of the examples and pictures it was trained
        on (see `normtune.adapters.training_rows.overlap`).
    """
    about: dict[str, Any] = {
        "base": None if family is None else config.model,
        "adapter": None if config.adapter is None else str(config.adapter),
    }
    if config.baseline:
        return {**about, "baseline": config.baseline}
    if config.adapter is None and family is not None and family.adapter is not None:
        recipe = f"{family.adapter.recipe} (in memory)"
        return {**about, "adapter": recipe, "trained_on": None, "setting": "unknown"}
    about |= _setting(config.adapter, examples.dataset.name)
    if config.adapter is None:
        return about
    from normtune.adapters.training_rows import overlap

    counts = overlap(config.adapter, examples.dataset, examples)
    return {**about, "trained_rows": None if counts is None else asdict(counts)}


def _setting(adapter: Path | None, dataset: str) -> dict[str, str | None]:
    from normtune.adapters.storage import read_adapter_info

    if adapter is None:
        return {"trained_on": None, "setting": "zero-shot"}
    data = read_adapter_info(adapter).data or {}
    name = data.get("name")
    trained_on = {name, *(part["name"] for part in data.get("mixture", {}).values())}
    # Two datasets that are named by their file format may have different data.
    if name is None or (dataset in trained_on and dataset in FORMATS):
        return {"trained_on": name, "setting": "unknown"}
    return {"trained_on": name, "setting": "in-distribution" if dataset in trained_on else "out-of-distribution"}

"""Measures how much a model relies on the image: it answers the same questions with control images.

A control image replaces the real one and cannot answer the question:

=========  ===================================================================================================
control    replaces the image by
=========  ===================================================================================================
`blank`    mid-grey (128) everywhere. The image's mean is not used, because it distinguishes an X-ray from a
           CT slice
`noise`    uniform grey values in cells of 1/64 of the longer side, seeded by the image's key. Finer noise
           would be averaged to grey when a processor scales the image
`other`    an image of another patient of the evaluated rows. Each image replaces exactly one other image if
           no patient has more than half of all images. One other study replaces all views of a study
=========  ===================================================================================================

`blank` and `noise` keep the image's size, so that a model gets the same number of image tokens. They keep no
other information. `other` may show another modality or organ and may happen to have the same answer, so its
score is higher than what is known without the image. Patients are identified by `meta` and by studies;
without them (SLAKE and VQA-RAD), each image counts as one patient.

The image's contribution to a metric (the field `earned`) is (real - replaced) / real: the share of the score
that is lost without the image. It is 0 for a model that ignores the image, 1 for a model that knows nothing
without it, and negative if the image misleads the model. It is undefined if the real score is 0.

With `other`, two scores of Zafar et al. (2026, arXiv 2603.03437, "shuffled images") follow under their names, by
`grounding_scores`. Their third, the Hallucinated Visual Reasoning Rate, counts answers that do not change although
their reasoning describes the image. It needs written reasoning and the authors' rule for what describes an image, so
it is not computed; it is at most 1 - Image Sensitivity.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from PIL import Image

from normtune.data.examples import Examples
from normtune.data.records import Dataset, Example, Prediction
from normtune.data.splits import group_columns, patient_of_image
from normtune.errors import InputError, did_you_mean
from normtune.evaluation.config import CONTROLS
from normtune.metrics.answers import is_exact, summarise_scores
from normtune.metrics.statistics.comparisons import holm_correction
from normtune.metrics.sum_metrics import SumMetric, cluster_rows, paired_difference, relative_drop, score_span
from normtune.metrics.table import headline_metrics, summarize_metrics
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import text_table

# Explains each control to readers of metrics.json.
CONTROL_DESCRIPTIONS = {
    "blank": "mid-grey (128) of the image's size",
    "noise": "uniform grey noise of the image's size in cells of 1/64 of its longer side, drawn by its key",
    "other": "an image of another patient among the same rows",
}
GREY = 128  # value of all pixels of `blank`
NOISE_CELLS = 64  # cells of `noise` along the longer side


def parse_controls(text: str | None) -> tuple[str, ...]:
    """Parse a list of controls such as "blank,noise,other"; the order is kept, repetitions are removed.

    Raises:
        InputError: if a name is unknown.
    """
    names = tuple(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))
    for name in names:
        if name not in CONTROLS:
            raise InputError(
                f"unknown control image '{name}'{did_you_mean(name, CONTROLS) or '.'} "
                f"Give one or several of {', '.join(CONTROLS)}, separated by commas."
            )
    return names


def control_dataset(dataset: Dataset, examples: Sequence[Example], name: str) -> Dataset:
    """Replace the images of a dataset by control images; the image keys stay the same.

    Raises:
        InputError: if `other` has no image to show, because all examples are of one patient.
    """
    open_real = dataset.open_image
    if name == "other":
        swapped = swapped_images(examples)
        return replace(dataset, open_image=lambda key: open_real(swapped[key]))
    if name == "noise":
        return replace(dataset, open_image=lambda key: noise_image(open_real(key).size, key))
    assert name == "blank", name
    return replace(dataset, open_image=lambda key: Image.new("RGB", open_real(key).size, (GREY, GREY, GREY)))


def noise_image(size: tuple[int, int], key: str) -> Image.Image:
    """Create an RGB image of random grey cells; it depends only on size and key. All channels are equal."""
    width, height = size
    cell = -(-max(size) // NOISE_CELLS)  # side of a cell in pixels, rounded up
    seed = int.from_bytes(_digest(key)[:8], "big")
    grid = np.random.default_rng(seed).integers(0, 256, size=(-(-height // cell), -(-width // cell)), dtype=np.uint8)
    pixels = grid.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]  # [height, width]
    return Image.fromarray(pixels).convert("RGB")


def swapped_images(examples: Sequence[Example]) -> dict[str, str]:
    """Assign to each image an image of another patient. The result does not depend on the order of the rows.

    The studies are sorted by patient, and patients by a hash of their keys. Each study then gets the study
    that is n places further, where n is the number of studies of the patient with the most studies. No study
    gets one of the same patient if no patient has more than half of all studies. Otherwise, a study for which
    this fails gets one of the other patients' studies in turn.

    Returns:
        Image key -> key of the image that replaces it.

    Raises:
        InputError: if all examples are of one patient.
    """
    patient = patient_of_image(examples)
    studies = sorted(
        {example.images for example in examples if example.images},
        key=lambda images: (_digest(patient[images[0]]), images),
    )
    patients = [patient[images[0]] for images in studies]
    counts = Counter(patients)
    if len(counts) < 2:
        raise InputError(
            "the evaluated rows are all of one patient or image, so there is no image of another patient. "
            "Remove 'other' from --controls, or evaluate more rows."
        )
    step = max(counts.values())
    swapped: dict[str, str] = {}
    for at, images in enumerate(studies):
        target = (at + step) % len(studies)
        if patients[target] == patients[at]:
            other_studies = [index for index, name in enumerate(patients) if name != patients[at]]
            target = other_studies[at % len(other_studies)]
        for view, key in enumerate(images):
            # A study with fewer views repeats its last view.
            swapped.setdefault(key, studies[target][min(view, len(studies[target]) - 1)])
    return swapped


def _digest(key: str) -> bytes:
    return hashlib.sha256(f"control:{key}".encode()).digest()


def image_reliance(
    examples: Sequence[Example], real: Mapping[str, SumMetric], replaced: Mapping[str, Mapping[str, SumMetric]]
) -> dict[str, dict[str, Any]]:
    """Compare the scores with real images to those with control images, for each of the `HEADLINE_METRICS`.

    Args:
        examples: the evaluated rows.
        real: `metric_table` of the predictions for the real images.
        replaced: control -> `metric_table` of its predictions.

    Returns:
        Control -> {image: description of the control, paired_by: "image", or "patient" where the data name patients,
        metrics: metric -> fields}. The fields are:

        - `real`, `replaced`: {value, low, high} of the two scores.
        - `difference`: real minus replaced, paired by image or patient, with its interval, `p`, and `p_holm`, which
          is corrected for all metrics and controls.
        - `earned`: the share of the real score that is lost without the image, {value, low, high};
          None if the real score is 0, or there is one image or patient.
        - `rows`, `images`, `patients`: what the metric is based on; `patients` only where the data name them.
    """
    cluster = cluster_rows(examples)
    images_of = {example.id: example.images for example in examples}
    paired_by = "patient" if group_columns(Examples(examples)) else "image"
    real_table = headline_metrics(real)
    if all(example.options for example in examples):
        del real_table["global_exact"]  # it is `choice_accuracy` then
    intervals = {"real": _summarize(real_table, examples)} | {
        control: _summarize(headline_metrics(table), examples) for control, table in replaced.items()
    }
    pairs = {
        (control, name): paired_difference(table[name], metric, cluster, maximum=score_span(name))
        for control, table in replaced.items()
        for name, metric in real_table.items()
    }
    corrected = holm_correction({key: pair.p for key, pair in pairs.items()})
    result: dict[str, dict[str, Any]] = {
        control: {"image": CONTROL_DESCRIPTIONS[control], "paired_by": paired_by, "metrics": {}} for control in replaced
    }
    for (control, name), pair in pairs.items():
        contribution = relative_drop(real_table[name], replaced[control][name], cluster, maximum=score_span(name))
        result[control]["metrics"][name] = {
            "real": intervals["real"][name],
            "replaced": intervals[control][name],
            "difference": {
                "value": pair.difference,
                "low": pair.low,
                "high": pair.high,
                "p": pair.p,
                "p_holm": corrected[control, name],
                "method": pair.method.replace("image", paired_by),
            },
            "earned": contribution and asdict(contribution),
            "rows": pair.rows,
            "images": len({images_of[id] for id in real_table[name].row_statistics}),
            **({"patients": pair.images} if paired_by == "patient" else {}),
        }
    return result


def grounding_scores(
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    shuffled: Sequence[Prediction],
    reliance: Mapping[str, Any],
    normalisation: str,
) -> dict[str, Any]:
    """Compute two scores of Zafar et al. (2026), for answers.

    Args:
        predictions: the answers, in the order of the examples.
        shuffled: those with images of other patients.
        reliance: the result of `image_reliance` for the control `other`.
        normalisation: applied before two answers are compared.

    Returns:
        `visual_reliance_score`: exact match with the image minus exact match with the other image; and
        `image_sensitivity`: the share of the answers that change with the image, right or wrong; with intervals.
    """
    pairs = zip(examples, predictions, shuffled, strict=True)
    changed = {e.id: float(not is_exact(real.text, other.text, normalisation)) for e, real, other in pairs}
    metrics = reliance["metrics"]  # if all questions have options, it has their accuracy instead
    difference = (metrics.get("global_exact") or metrics["choice_accuracy"])["difference"]
    return {
        "visual_reliance_score": {end: difference[end] for end in ("value", "low", "high")},
        "image_sensitivity": asdict(summarise_scores({"image_sensitivity": changed}, examples)["image_sensitivity"]),
        "definition": "Zafar et al. 2026, arXiv 2603.03437, with the images of --controls other",
    }


def grounding_text(grounding: Mapping[str, Any]) -> list[str]:
    """Format the result of `grounding_scores` as one line."""
    score, sensitivity = (format_interval(grounding[name]) for name in ("visual_reliance_score", "image_sensitivity"))
    return [f"Visual Reliance Score {score}, Image Sensitivity {sensitivity} (arXiv 2603.03437)"]


def _summarize(table: Mapping[str, SumMetric], examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Compute each metric with its interval, without the number of rows and images."""
    metrics = summarize_metrics(table, examples)
    return {name: {"value": m.value, "low": m.low, "high": m.high} for name, m in metrics.items()}


def reliance_text(reliance: Mapping[str, Any]) -> str:
    """Format the result of `image_reliance` as an aligned table, in %."""
    paired_by = next((result["paired_by"] for result in reliance.values() if "paired_by" in result), "image")
    difference_by = f"real - replaced, by {paired_by}"
    rows = [["control", "metric", "real", "replaced", difference_by, "p (Holm)", "image contribution %"]]
    for control, result in reliance.items():
        for name, metric in result["metrics"].items():
            difference = metric["difference"]
            rows.append(
                [
                    control,
                    name,
                    f"{100 * metric['real']['value']:.1f}",
                    f"{100 * metric['replaced']['value']:.1f}",
                    format_interval(difference, sign="+"),
                    f"{difference['p_holm']:.4f}",
                    "–" if metric["earned"] is None else format_interval(metric["earned"]),
                ]
            )
    return "\n".join(text_table(rows, "l"))

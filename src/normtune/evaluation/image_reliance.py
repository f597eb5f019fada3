"""Does the model look at the image? The same questions are asked of images that cannot answer them.

=========  ===================================================================================================
control    what is shown in the image's place
=========  ===================================================================================================
`blank`    the same mid-grey (128) everywhere: not the image's own mean, which tells an X-ray from a CT slice
`noise`    uniform grey values, in cells of 1/64 of the longer side, drawn by the image's key: finer noise
           would be averaged away to grey when a processor scales it
`other`    an image of another patient among the evaluated rows; each stands in for one other where no patient
           has more than half of them all. Two views of a study are replaced by those of one other study
=========  ===================================================================================================

Blank and noise keep the image's size, so that a model takes as many image tokens as before; that size is all
they tell. `other` may be of another modality or organ, and may happen to have the same answer, so what it
leaves is more than what is known without looking. Patients are told apart as far as `meta` and studies name
them, else each image counts as one (SLAKE and VQA-RAD name none).

What the image earns, of a metric, is (real - replaced) / real: the share of the score that goes when the
image does. It is 0 for a model that does not look, 1 for one that knows nothing without looking, and below 0
where the image misleads; where the real score is 0 there is none.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from PIL import Image

from normtune.data.records import Dataset, Example
from normtune.data.splits import patients
from normtune.errors import InputError, did_you_mean
from normtune.evaluation.config import CONTROLS
from normtune.metrics.statistics import RESAMPLES, holm
from normtune.metrics.sum_metrics import SumMetric, paired, relative_drop
from normtune.metrics.table import headline_metrics, summarize_metrics

CONTROL_DESCRIPTIONS = {  # by control, for people who read metrics.json
    "blank": "mid-grey (128) of the image's size",
    "noise": "uniform grey noise of the image's size in cells of 1/64 of its longer side, drawn by its key",
    "other": "an image of another patient among the same rows",
}
GREY = 128
CELLS = 64  # of noise, along the longer side


def controls_of(text: str | None) -> tuple[str, ...]:
    """The controls that "blank,noise,other" names, in the order given.

    Raises:
        InputError: there is none of such a name.
    """
    names = tuple(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))
    for name in names:
        if name not in CONTROLS:
            raise InputError(
                f"no control image '{name}'{did_you_mean(name, CONTROLS) or '.'} "
                f"Known are {', '.join(CONTROLS)}, one or several with commas."
            )
    return names


def control_dataset(dataset: Dataset, examples: Sequence[Example], name: str) -> Dataset:
    """The dataset with the images of a control under the keys of its own.

    Raises:
        InputError: all examples are of one patient, so that there is no other.
    """
    real = dataset.open_image
    if name == "other":
        other = swapped_images(examples)
        return replace(dataset, open_image=lambda key: real(other[key]))
    if name == "noise":
        return replace(dataset, open_image=lambda key: noise(real(key).size, key))
    assert name == "blank", name
    return replace(dataset, open_image=lambda key: Image.new("RGB", real(key).size, (GREY, GREY, GREY)))


def noise(size: tuple[int, int], key: str) -> Image.Image:
    """An RGB image (all channels alike) of uniform grey cells, a function of size and key alone."""
    width, height = size
    cell = -(-max(size) // CELLS)
    seed = int.from_bytes(_digest(key)[:8], "big")
    grid = np.random.default_rng(seed).integers(
        0, 256, size=(-(-height // cell), -(-width // cell)), dtype=np.uint8
    )
    pixels = grid.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]  # [height, width]
    return Image.fromarray(pixels).convert("RGB")


def swapped_images(examples: Sequence[Example]) -> dict[str, str]:
    """Image key -> key of an image of another patient; of the keys alone, whatever the order of the rows.

    The studies, those of a patient side by side and patients in an order drawn by their keys, are shifted by
    as many places as the patient of most studies has: that meets no patient's own where none has more than
    half. Otherwise a study that would is given one of the others' in turn.

    Raises:
        InputError: all examples are of one patient.
    """
    patient = patients(examples)
    studies = sorted(
        {example.images for example in examples if example.images},
        key=lambda images: (_digest(patient[images[0]]), images),
    )
    owners = [patient[images[0]] for images in studies]
    counts = Counter(owners)
    if len(counts) < 2:
        raise InputError(
            "the evaluated rows are of one patient or image, so that no other can be shown. "
            "Leave 'other' out of --controls, or evaluate more rows."
        )
    step = max(counts.values())
    found: dict[str, str] = {}
    for at, images in enumerate(studies):
        shown = (at + step) % len(studies)
        if owners[shown] == owners[at]:
            strangers = [index for index, owner in enumerate(owners) if owner != owners[at]]
            shown = strangers[at % len(strangers)]
        for view, key in enumerate(images):
            found.setdefault(key, studies[shown][min(view, len(studies[shown]) - 1)])
    return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(f"control:{key}".encode()).digest()


def image_reliance(
    examples: Sequence[Example],
    real: Mapping[str, SumMetric],
    replaced: Mapping[str, Mapping[str, SumMetric]],
    *,
    resamples: int = RESAMPLES,
) -> dict[str, dict[str, Any]]:
    """Control -> what was shown ("image") and, by metric of `HEADLINES`, what the image is worth.

    `real` and `replaced` hold value, low and high of the two scores; `difference` is real less replaced,
    paired by image, with p and with p_holm, corrected for all metrics and controls; `earned` is the share of
    the real score that the image earns, its interval from the same resamples, or None where there is none.

    Args:
        examples: the rows evaluated.
        real: `metric_table` of the predictions of the images themselves.
        replaced: control -> `metric_table` of its predictions.
        resamples: draws of the bootstrap.
    """
    cluster = {example.id: example.images for example in examples}
    table = headline_metrics(real)
    alone = {"real": _ends(table, examples, resamples)} | {
        control: _ends(headline_metrics(found), examples, resamples) for control, found in replaced.items()
    }
    pairs = {
        (control, name): paired(found[name], metric, cluster, resamples=resamples)
        for control, found in replaced.items()
        for name, metric in table.items()
    }
    corrected = holm({key: pair.p for key, pair in pairs.items()})
    result: dict[str, dict[str, Any]] = {
        control: {"image": CONTROL_DESCRIPTIONS[control], "metrics": {}} for control in replaced
    }
    for (control, name), pair in pairs.items():
        earned = relative_drop(table[name], replaced[control][name], cluster, resamples=resamples)
        result[control]["metrics"][name] = {
            "real": alone["real"][name],
            "replaced": alone[control][name],
            "difference": {
                "value": pair.difference,
                "low": pair.low,
                "high": pair.high,
                "p": pair.p,
                "p_holm": corrected[control, name],
                "method": pair.method,
            },
            "earned": earned and asdict(earned),
            "rows": pair.rows,
            "images": pair.images,
        }
    return result


def _ends(
    table: Mapping[str, SumMetric], examples: Sequence[Example], resamples: int
) -> dict[str, dict[str, float]]:
    found = summarize_metrics(table, examples, resamples=resamples)
    return {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in found.items()}


def reliance_text(found: Mapping[str, Any]) -> str:
    """The result of `reliance` as an aligned table, in %."""
    rows = [["without the image", "metric", "real", "replaced", "real - replaced", "p (Holm)", "earned %"]]
    for control, about in found.items():
        for name, one in about["metrics"].items():
            difference = one["difference"]
            rows.append(
                [
                    control,
                    name,
                    f"{100 * one['real']['value']:.1f}",
                    f"{100 * one['replaced']['value']:.1f}",
                    interval_text(difference, sign="+"),
                    f"{difference['p_holm']:.4f}",
                    "–" if one["earned"] is None else interval_text(one["earned"]),
                ]
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def interval_text(found: Mapping[str, float], sign: str = "") -> str:
    """value [low, high] in %, with one decimal."""
    value, low, high = (f"{100 * found[end]:{sign}.1f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"

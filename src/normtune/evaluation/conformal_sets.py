"""The calibration rows of an evaluation's prediction sets: another evaluation of the same model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normtune.data.records import Example
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.results import Evaluation, read_evaluation


def read_calibration(folder: Path, config: EvaluateConfig, examples: Sequence[Example]) -> Evaluation:
    """Read the evaluation that calibrates the prediction sets, and check that it fits.

    Args:
        folder: its result folder.
        config: the options of the evaluation that gets the sets.
        examples: the rows that get the sets.

    Raises:
        InputError: the folder is damaged, the model or the candidates differ, or an image is among both rows.
    """
    evaluation = read_evaluation(folder)
    record, settings = evaluation.record, evaluation.record["settings"]
    adapter = None if config.adapter is None else str(config.adapter)
    for name, expected, recorded in (
        ("model", config.model, record.get("base")),
        ("adapter", adapter, record.get("adapter")),
        ("candidates", config.candidates, settings.get("candidates")),
    ):
        if expected != recorded:
            raise InputError(
                f"--conformal {folder} was evaluated with the {name} {recorded}, this evaluation has {expected}. "
                "Evaluate the same model with the same candidates on other images, for example with --split validate."
            )
    images = {key for example in evaluation.examples for key in example.images}
    if shared := sorted(images.intersection(key for example in examples for key in example.images)):
        raise InputError(
            f"--conformal {folder} has {len(shared)} of the evaluated images, first '{shared[0]}'. The sets would "
            "contain the answer too seldom for new images. Calibrate on other images."
        )
    return evaluation

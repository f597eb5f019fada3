"""The options of a training run: fields that are checked when set, each an option of `normtune train`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer, field_validator

from normtune.data.choices import ChoicePrompt, ChoiceTarget
from normtune.data.examples import Example, Examples, as_examples
from normtune.data.options import DataOptions
from normtune.data.splits import share_of_images
from normtune.methods.registry import LEARNING_RATES
from normtune.models.part_names import PARTS


def _interval(value: Any) -> Any:
    """Check an interval of validations: a number of steps, or the word epoch."""
    if value is None or value == "epoch" or (str(value).isdecimal() and int(value) > 0):
        return None if value is None else str(value)
    raise ValueError("give a number of steps, or epoch")


Interval = Annotated[str | None, BeforeValidator(_interval)]


class TrainConfig(DataOptions):
    """Everything that determines a training run, besides the dataset options that it inherits.

    The descriptions are the help texts of `normtune train --help`.
    """

    # what is trained, and on which examples
    model: str = Field(description="Base model: a local directory, a hub name, or 'nano'.")
    out: Path = Field(description="Folder for the adapter, the resolved options and the checkpoints.")
    tune: str = Field("ln", description="Recipe: a preset name, or PART=METHOD[,PART=METHOD...].")
    split: str = Field("train", description="Split of the dataset to train on.")
    limit: int | None = Field(None, gt=0, description="Train on the first LIMIT question-answer pairs only.")
    share: float | None = Field(
        None, gt=0, le=1, description="Train on a random share (0 to 1) of the images; --seed decides which."
    )
    choice_prompt: ChoicePrompt | None = Field(
        None,
        description="How questions with options are written: llava ('A. text' lines; the default), mmmu or inline.",
    )
    choice_target: ChoiceTarget | None = Field(
        None, description="What is trained on questions with options: the letter (default) or the text of the answer."
    )
    # steps and batches
    lr: float | None = Field(None, gt=0, description="Learning rate; default: one rate per method.")
    part_lr: str | None = Field(
        None, description="Learning rates of single parts, such as vision=1e-3,decoder=3e-4; other parts have --lr."
    )
    epochs: float = Field(10, gt=0, description="Number of passes over the training pairs.")
    max_steps: int | None = Field(None, gt=0, description="Number of optimiser steps; overrides --epochs.")
    batch: int = Field(24, gt=0, description="Question-answer pairs per batch and process.")
    accumulate: int = Field(1, gt=0, description="Batches per optimiser step; their gradients are added.")
    group: bool = Field(True, description="Compute each image once for all of its questions in a batch.")
    cap: int | None = Field(None, gt=0, description="Maximum number of questions per image in a group; default: all.")
    balance: Literal["pairs", "tokens"] = Field(
        "pairs", description="Balance batches by pairs or by tokens; --batch is then the mean number of pairs."
    )
    sample: Literal["balanced"] | None = Field(
        None,
        description="With balanced, an epoch has as many open as closed questions, and as many yes as no; default: "
        "every pair once an epoch, or by the weights of --data.",
    )
    # memory and speed
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Dtype of the frozen weights; trained values are fp32. auto: bfloat16 on a GPU that supports it, "
        "else float32.",
    )
    quantize: Literal["int8", "nf4"] | None = Field(
        None, description="Quantise the language model's linear layers: int8 (torchao) or nf4 (bitsandbytes)."
    )
    memory: Literal["fast", "balanced", "tight"] = Field(
        "fast",
        description="Layers recomputed in the backward pass to save memory: none (fast), every second one "
        "(balanced) or all (tight).",
    )
    cache: Path | None = Field(
        None, description="Folder for cached outputs of frozen layers, one entry per image; runs can share it."
    )
    workers: int | None = Field(
        None, ge=0, description="Threads that read the images of the next batches; default: 2 on a GPU, 0 on a CPU."
    )
    compile: bool = Field(False, description="Compile the language model's layers with torch.compile.")
    max_pixels: int | None = Field(
        None,
        gt=0,
        description="Most pixels of an image that the model reads: fewer image tokens, for families with tokens "
        "that depend on the size of an image. The adapter records it. Default: the model's own.",
    )
    device: str | None = Field(None, description="cpu or cuda; default: cuda if available.")
    # the optimiser: the learning rate rises linearly during the warmup, then follows the schedule
    optimizer: Literal["sgd"] | None = Field(None, description="Optimiser: sgd, without momentum; default: AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW, for matrices only.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the learning rate rises from 0.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning-rate schedule after the warmup."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of the answer tokens.")
    max_grad_norm: float = Field(1.0, gt=0, description="Maximum gradient norm; larger gradients are scaled down.")
    # differential privacy
    dp_epsilon: float | None = Field(
        None,
        gt=0,
        description="Train with differential privacy for each patient (each image, where the data name no patients): "
        "the epsilon that the whole run may spend. inf: no noise. Needs opacus.",
    )
    dp_delta: float | None = Field(
        None, gt=0, lt=1, description="The delta of --dp-epsilon; default: 1 / (10 x number of patients)."
    )
    dp_clip: float | None = Field(
        None, gt=0, description="Largest L2 norm of the gradient of a patient; larger ones are scaled down. Default: 1."
    )
    # validation
    validate_every: Interval = Field(
        None, description="Validate after every N steps, or after every 'epoch'; default: never."
    )
    validation_split: str | None = Field(None, description="Split to validate on; default: validate.")
    validation_limit: int | None = Field(
        None, gt=0, description="Validate on a random sample of this many pairs, the same in every run; default: all."
    )
    metric_for_best: str | None = Field(
        None, description="Metric that chooses the best step: loss, or a score; default: global_exact, or rouge_l."
    )
    patience: int | None = Field(
        None, gt=0, description="Stop after this many validations without a better score; default: never."
    )
    keep: Literal["best", "last"] | None = Field(
        None, description="Values that the adapter has at the end: of the best step or of the last; default: best."
    )
    # checkpoints, logs and randomness
    save_every: int | None = Field(None, gt=0, description="Steps between checkpoints; default: one per epoch.")
    resume: bool = Field(True, description="Resume from the last complete checkpoint under --out.")
    overwrite: bool = Field(
        False, description="Move another or finished run in --out to OUT.old-1 (or -2, ...) before training."
    )
    tracker: str = Field("none", description="Experiment tracker: none, tensorboard, wandb, mlflow, ...")
    seed: int = Field(0, description="Seed of initial values, data order and dropout.")

    @field_serializer("dp_epsilon", "dp_clip", when_used="json")
    def _infinity(self, value: float | None) -> float | str | None:
        return "inf" if value == math.inf else value  # JSON has no infinity

    @field_validator("part_lr")
    @classmethod
    def _check_part_lr(cls, text: str | None) -> str | None:
        _part_rates(text)
        return text

    @property
    def part_rates(self) -> dict[str, float]:
        """Part -> the learning rate that `part_lr` gives it."""
        return _part_rates(self.part_lr)

    def learning_rate(self, method: str, part: str = "") -> float:
        """Return the learning rate of a method in a part: from `part_lr`, else `lr`, else the method's default."""
        if part in self.part_rates:
            return self.part_rates[part]
        return self.lr if self.lr is not None else LEARNING_RATES[method]

    def select(self, examples: Iterable[Example]) -> Examples:
        """Select the examples of a split to train on: a share of the images, then the first `limit` pairs."""
        rows = as_examples(examples)
        if self.share is not None:
            rows = share_of_images(rows, self.share, self.seed)
        return rows[: self.limit]


def _part_rates(text: str | None) -> dict[str, float]:
    """Parse `vision=1e-3,decoder=3e-4`."""
    rates: dict[str, float] = {}
    for entry in text.split(",") if text is not None else ():
        part, _, rate = (word.strip() for word in entry.partition("="))
        if part not in PARTS or part in rates:
            raise ValueError(f"'{entry.strip()}' is not PART=RATE with each part once; parts: {', '.join(PARTS)}")
        try:
            rates[part] = float(rate)
        except ValueError:
            rates[part] = 0.0
        if not 0 < rates[part] < math.inf:
            raise ValueError(f"the rate of {part} must be a number above 0")
    return rates

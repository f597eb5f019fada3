"""What decides a run, checked when it is read; every field is an option of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from normtune.data.options import DataOptions
from normtune.data.records import Example
from normtune.data.splits import share_of_images
from normtune.methods.registry import LEARNING_RATES


class TrainConfig(DataOptions):
    """Everything that decides a training run."""

    model: str = Field(description="Base model: a local directory, a hub name, or 'nano'.")
    out: Path = Field(description="Where the adapter is written.")
    tune: str = Field("ln", description="Recipe: a preset or PART=METHOD[,PART=METHOD].")
    split: str = Field("train", description="The split to train on.")
    limit: int | None = Field(None, gt=0, description="Train on the first so many pairs only.")
    share: float | None = Field(
        None, gt=0, le=1, description="Train on this share of the images, drawn by --seed."
    )
    lr: float | None = Field(None, gt=0, description="Learning rate; by default each method's own.")
    epochs: float = Field(10, gt=0, description="Passes over the training pairs.")
    max_steps: int | None = Field(None, gt=0, description="Stop after so many steps, whatever the epochs.")
    batch: int = Field(24, gt=0, description="Question-answer pairs a step and device.")
    accumulate: int = Field(1, gt=0, description="Batches whose gradients make one step.")
    group: bool = Field(True, description="Share each image among its questions.")
    cap: int | None = Field(
        None, gt=0, description="At most so many questions of one image in a group; by default all."
    )
    balance: Literal["pairs", "tokens"] = Field(
        "pairs", description="What batches hold about as much of; --batch is then their mean size."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the frozen base.")
    quantize: Literal["int8", "nf4"] | None = Field(
        None, description="Hold the language model's linears in 8 bits (torchao) or 4 (bitsandbytes)."
    )
    memory: Literal["fast", "balanced", "tight"] = Field(
        "fast", description="Layers computed again in the backward pass: none, every second one, or all."
    )
    cache: Path | None = Field(
        None, description="Folder where what frozen layers make of images is kept; runs may share it."
    )
    compile: bool = Field(False, description="Compile the language model's layers (torch.compile).")
    device: str | None = Field(None, description="cpu or cuda; by default CUDA where there is one.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, on matrices only.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="The rate after that.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Smoothing of the answer tokens' targets.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    save_every: int | None = Field(
        None, gt=0, description="Steps between checkpoints; by default one an epoch."
    )
    resume: bool = Field(True, description="Go on from the last whole checkpoint under --out.")
    tracker: str = Field("none", description="Where to log: none, tensorboard, wandb, mlflow, ...")
    seed: int = Field(0, description="Of initial values, data order and dropout.")

    def learning_rate(self, method: str) -> float:
        """The rate of one method: the run's own where given, else the method's default."""
        return self.lr if self.lr is not None else LEARNING_RATES[method]

    def select(self, examples: Sequence[Example]) -> list[Example]:
        """The examples of a split that the run trains on: a share of the images, then the first `limit` pairs."""
        if self.share is not None:
            examples = share_of_images(examples, self.share, self.seed)
        return list(examples[: self.limit])

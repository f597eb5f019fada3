"""What decides a run, checked when it is read; every field is an option of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from normtune.errors import InputError, did_you_mean

# Pairs seen being equal, the best of benchmarks/learning_rates.json, by method (tests hold the two together).
LEARNING_RATES: dict[str, float] = {
    "ln": 3e-2,
    "bias": 1e-1,
    "attention": 1e-3,
    "ffn": 1e-3,
    "full": 3e-4,
    "lora": 3e-3,
    "prefix": 3e-3,
    "ptuning": 3e-1,
    "ia3": 1e-1,
    "adapter": 3e-3,
}


CONTROLS = ("blank", "noise", "other")  # images that cannot answer a question: see normtune.reliance


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Build a config.

        Raises:
            InputError: all faults in one line, each with the option it is about.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            faults = []
            for fault in error.errors():
                option = ".".join(str(part) for part in fault["loc"])
                if fault["type"] == "extra_forbidden":
                    faults.append(f"{option}: unknown{did_you_mean(option, cls.model_fields)}")
                else:
                    faults.append(f"--{option.replace('_', '-')}: {fault['msg']} (got {fault['input']!r})")
            raise InputError("; ".join(faults)) from error


class DataOptions(_Options):
    """Which examples of which dataset."""

    data: str = Field(
        description="Dataset: slake, vqa-rad, path-vqa, openi, mimic-cxr, medpix, roco, messages, jsonl, "
        "parquet, phantom-a, phantom-b."
    )
    root: Path | None = Field(None, description="Where the dataset's files lie.")
    language: Literal["en", "zh", "all"] = Field(
        "en", description="Questions of one language, where the dataset has several."
    )
    image_disjoint: bool = Field(
        False, description="Split by image anew, instead of the dataset's own splits."
    )
    task: Literal["vqa", "report"] = Field(
        "vqa", description="Answer questions, or write reports; datasets of reports alone need no word of it."
    )
    sections: Literal["findings", "impression", "both"] = Field(
        "findings", description="What a report is to hold, where the dataset tells its sections apart."
    )
    text_only: bool = Field(False, description="Keep rows whose image files are missing, for their text.")

    def data_options(self) -> dict[str, Any]:
        """The options that open the same data again, from any folder, as a result records them."""
        found = self.model_dump(mode="json", include=set(DataOptions.model_fields))
        if self.root is not None and self.root.exists():  # else it is a hub name
            found["root"] = str(self.root.resolve())
        return found


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


class EvaluateConfig(DataOptions):
    """Everything that decides an evaluation."""

    model: str = Field(description="Base model: a local directory, a hub name, or 'nano'.")
    out: Path = Field(description="Where predictions.jsonl and metrics.json are written.")
    adapter: Path | None = Field(None, description="A trained adapter; none evaluates the base (zero-shot).")
    baseline: Literal["question-only", "most-frequent", "medoid", "retrieval"] | None = Field(
        None,
        description="Predict from the training split instead; retrieval takes the text of its image that is "
        "nearest by MODEL's image features.",
    )
    split: str = Field("test", description="The split to evaluate.")
    limit: int | None = Field(None, gt=0, description="Evaluate the first so many pairs only.")
    batch: int = Field(128, gt=0, description="Questions answered at once.")
    beams: int = Field(1, gt=0, description="Beams of the search; 1 is greedy. MISS uses 3.")
    max_new_tokens: int | None = Field(None, gt=0, description="Longest answer, in tokens.")
    candidates: str | None = Field(
        None, description="Answers to choose from for closed questions, such as yes/no."
    )
    controls: str | None = Field(
        None,
        description="Ask the same of images that cannot answer, too: one or several of blank,noise,other.",
    )
    normalisation: Literal["vqa", "none"] = Field("vqa", description="Of answers before they are compared.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the base.")
    quantize: Literal["int8", "nf4"] | None = Field(
        None, description="Hold the language model's linears in 8 bits (torchao) or 4 (bitsandbytes)."
    )
    cache: Path | None = Field(
        None, description="Folder where what the image encoder makes of images is kept; runs may share it."
    )
    device: str | None = Field(None, description="cpu or cuda; by default CUDA where there is one.")

"""The options of `normtune advise`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from normtune.data.options import DataOptions
from normtune.evaluation.config import EvaluateConfig
from normtune.methods.recipe import parse
from normtune.training.config import TrainConfig

# From few trained parameters to all of them. Left out: methods that docs/small-methods.md found no better than these at
# about the same size, such as `lora(r=1)`, `vera`, `road`, `miss` and `beft`.
DEFAULT_MINUTES = 15.0
RECIPES = ("ln-language", "ln", "ia3", "lora-8", "ffn", "full")
_NOT_TRAINED_WITH = {"out", "epochs", "validation_split", "validation_limit"}


class AdviseConfig(DataOptions):
    """The options of `normtune advise`. The descriptions are what `--help` prints."""

    model: str = Field(description="Base model: a local directory, a hub name, or 'nano'.")
    out: Path = Field(Path("advice"), description="Folder for the trials, the advice and its page.")
    minutes: float | None = Field(
        None, gt=0, description="Time for the search; it becomes a number of pairs, which is recorded. Default: 15."
    )
    pairs: int | None = Field(
        None, gt=0, description="Question-answer pairs to train on in all trials together, instead of --minutes."
    )
    recipes: list[str] | None = Field(
        None, description=f"A recipe to try; repeatable. Default: {', '.join(RECIPES)}, those that fit."
    )
    max_trained: str | None = Field(
        None, description="Most trained parameters: a number, or a share of all parameters such as 1%."
    )
    max_memory: float | None = Field(None, gt=0, description="Most memory of a training, in GiB, as it is planned.")
    epochs: float = Field(10, gt=0, description="Passes of the longest trials, if the budget allows it.")
    metric: str | None = Field(
        None, description="Score to choose by, higher is better; default: global_exact, for reports rouge_l/none."
    )
    split: str = Field("train", description="Split of the dataset to train on.")
    validation_split: str = Field("validate", description="Split that the trials answer.")
    validation_limit: int | None = Field(
        None, gt=0, description="Answer about this many pairs of that split, whole images; default: all."
    )
    batch: int = Field(24, gt=0, description="Question-answer pairs per batch of training.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Dtype of the frozen weights.")
    quantize: Literal["int8", "nf4"] | None = Field(
        None, description="Quantise the language model's linear layers: int8 (torchao) or nf4 (bitsandbytes)."
    )
    memory: Literal["fast", "balanced", "tight"] = Field(
        "fast", description="Layers recomputed in the backward pass: none, every second one, or all."
    )
    max_pixels: int | None = Field(None, gt=0, description="Most pixels of an image that the model reads.")
    device: str | None = Field(None, description="cpu or cuda; default: cuda if available.")
    seed: int = Field(0, description="Seed of training and of the halves of the validation split.")

    @field_validator("recipes")
    @classmethod
    def _check_recipes(cls, recipes: list[str] | None) -> list[str] | None:
        texts = [str(parse(name)) for name in recipes or ()]
        if "all=frozen" in texts:
            raise ValueError("'frozen' trains nothing; the frozen base is always evaluated")
        if len({*texts}) < len(texts):
            raise ValueError("two of the recipes are the same")
        return recipes

    @field_validator("max_trained")
    @classmethod
    def _check_max_trained(cls, text: str | None) -> str | None:
        try:
            ok = text is None or float(text.removesuffix("%")) > 0
        except ValueError:
            ok = False
        if not ok:
            raise ValueError("give a number of parameters, or a share such as 1%")
        return text

    @field_validator("pairs")
    @classmethod
    def _is_the_only_budget(cls, pairs: int | None, info: ValidationInfo) -> int | None:
        if pairs is not None and info.data.get("minutes") is not None:
            raise ValueError("give --minutes or --pairs, not both")
        return pairs

    def most_trained(self, total: int) -> float:
        """The most parameters that a recipe may train, of a model with `total` parameters."""
        if self.max_trained is None:
            return float("inf")
        value = float(self.max_trained.removesuffix("%"))
        return value / 100 * total if self.max_trained.endswith("%") else value

    def train_config(self, **values: Any) -> TrainConfig:
        """The options of a trial's training."""
        return TrainConfig.checked(**self._shared_with(TrainConfig), **values)

    def evaluate_config(self, out: Path, adapter: Path | None) -> EvaluateConfig:
        """The options of a trial's evaluation."""
        values = self._shared_with(EvaluateConfig) | {"split": self.validation_split}
        del values["batch"]
        return EvaluateConfig.checked(**values, out=out, adapter=adapter)

    def _shared_with(self, other: type[DataOptions]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in other.model_fields if name in _SHARED}


_SHARED = AdviseConfig.model_fields.keys() - _NOT_TRAINED_WITH

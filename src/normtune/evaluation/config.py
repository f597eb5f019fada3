"""The options of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from normtune.data.choices import ChoicePrompt
from normtune.data.options import DataOptions

# Ways to choose an option -> their names in metrics; see `normtune.metrics.choices`.
CHOICE_SCORINGS = {"letter": "letter", "text": "text", "text-normalized": "text_normalized", "generate": "generated"}
# Control images, which cannot answer a question: see `normtune.evaluation.image_reliance`.
CONTROLS = ("blank", "noise", "other")


def parse_scorings(text: str | None) -> tuple[str, ...]:
    """Parse a list of scorings such as "letter,generate" into their names in metrics, without repetitions.

    Raises:
        ValueError: a name is unknown.
    """
    words = [word.strip() for word in (text or "letter").split(",") if word.strip()]
    if unknown := [word for word in words if word not in (*CHOICE_SCORINGS, "all")]:
        raise ValueError(f"'{unknown[0]}' is unknown; give one or several of {', '.join(CHOICE_SCORINGS)}, or all")
    scorings = [scoring for word in words for scoring in (CHOICE_SCORINGS if word == "all" else (word,))]
    return tuple(dict.fromkeys(CHOICE_SCORINGS[scoring] for scoring in scorings))


class EvaluateConfig(DataOptions):
    """The options of `normtune evaluate`. The descriptions are what `--help` prints."""

    model: str = Field(description="Base model: a local directory, a hub name, or 'nano'.")
    # None (in Python only): nothing is written
    out: Path | None = Field(description="Folder to write predictions.jsonl and metrics.json to.")
    adapter: Path | None = Field(
        None, description="Folder of an adapter, or its name on the hub; without it, the base is evaluated (zero-shot)."
    )
    baseline: Literal["question-only", "most-frequent", "medoid", "retrieval"] | None = Field(
        None,
        description="Evaluate a baseline that predicts texts of the training split, instead of the model; "
        "retrieval compares images by MODEL's image features.",
    )
    split: str = Field("test", description="The split to evaluate.")
    limit: int | None = Field(None, gt=0, description="Evaluate only the first N rows of the split.")
    batch: int = Field(128, gt=0, description="Number of questions answered at once.")
    beams: int = Field(1, gt=0, description="Width of the beam search; 1 is greedy decoding. MISS uses 3.")
    generation: Literal["checkpoint", "greedy"] | None = Field(
        None,
        description="Settings of generation_config.json, such as a repetition penalty: those of the checkpoint, as "
        "in transformers' generate() (the default), or none (greedy). Sampling is never used.",
    )
    max_new_tokens: int | None = Field(
        None,
        gt=0,
        description="Maximum length of an answer, in tokens; default: that of the longest training reference and a "
        "margin of 8, at least 16 (reports: 128).",
    )
    candidates: str | None = Field(
        None, description="Answers to choose from for closed questions, separated by /, for example yes/no."
    )
    choice_prompt: ChoicePrompt | None = Field(
        None,
        description="How questions with options are written: llava ('A. text' lines), mmmu ('(A) text' lines) or "
        "inline; default: as in the adapter's training, else llava.",
    )
    choice_scoring: str | None = Field(
        None,
        description="How an option is selected: one or several of letter,text,text-normalized,generate, or all; "
        "default: letter. The first decides the prediction.",
    )
    choice_rotations: bool = Field(
        False, description="Score questions with options in each cyclic order of the options, to measure position bias."
    )
    controls: str | None = Field(
        None,
        description="Also answer the questions with control images, to measure how much the image matters: "
        "one or several of blank,noise,other.",
    )
    abstain_below: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Abstain from answers with a confidence below this: they are marked in predictions.jsonl and "
        "counted, and the others are scored by themselves too.",
    )
    conformal: Path | None = Field(
        None,
        description="Result folder of the same model on other images, usually --split validate: calibrates sets of "
        "candidates that contain the answer with a probability of 90% and 95%.",
    )
    metric_model: str | None = Field(
        None,
        description="Also score reports with metrics that need a model, NAME=DIR or NAME=DIR:PYTHON (the Python of "
        "another environment, with RadEval), separated by commas; names: bertscore, chexbert, radgraph, ratescore, "
        "radcliq, green, crimson.",
    )
    normalisation: Literal["vqa", "unicode", "none"] = Field(
        "vqa", description="Normalisation of answers before they are compared."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Data type of the base model; auto: bfloat16 on a GPU that supports it, else float32."
    )
    quantize: Literal["int8", "nf4"] | None = Field(
        None, description="Quantise the language model's linear layers to 8 bits (torchao) or 4 (bitsandbytes)."
    )
    max_pixels: int | None = Field(
        None, gt=0, description="Most pixels of an image that the model reads; default: as in the adapter's training."
    )
    cache: Path | None = Field(
        None, description="Folder for a cache of image encoder outputs; several runs may share it."
    )
    device: str | None = Field(None, description="cpu or cuda; by default CUDA if it is available.")

    @field_validator("choice_scoring")
    @classmethod
    def _check_choice_scoring(cls, text: str | None) -> str | None:
        parse_scorings(text)
        return text

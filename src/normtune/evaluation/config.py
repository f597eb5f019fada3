"""Options of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from normtune.data.options import DataOptions

CONTROLS = (
    "blank",
    "noise",
    "other",
)  # images that cannot answer a question: see normtune.evaluation.image_reliance


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

"""Questions about single images: ask, describe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from normtune.api.models import Adapter, Model, local_adapter, open_model
from normtune.data import tasks
from normtune.inference import ask as inference
from normtune.methods.adapt import TunedModel
from normtune.models.types import Answer

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = str | Path | Image
    Pictures = Picture | Sequence[Picture]


@overload
def ask(model: Model, image: Pictures, question: str, **options: Any) -> Answer: ...
@overload
def ask(model: Model, image: Pictures, question: list[str] | tuple[str, ...], **options: Any) -> list[Answer]: ...
def ask(  # type: ignore[misc]  # the overloads leave the options to this signature
    model: Model,
    image: Pictures,
    question: str | list[str] | tuple[str, ...],
    *,
    adapter: Adapter | None = None,
    beams: int = 1,
    max_new_tokens: int | None = None,
    options: Sequence[str] = (),
    abstain_below: float | None = None,
    device: str | None = None,
    quantize: str | None = None,
    max_pixels: int | None = None,
) -> Answer | list[Answer]:
    """Ask a model about an image. For research use, not for diagnosis.

    ```python
    answer = normtune.ask(model, "chest.png", "Is there a fracture?", adapter="runs/ln")
    print(answer)
    ```

    Args:
        model: a name, or a loaded model, which is the base again afterwards.
        image: an image file or an opened image, or a list of the views of one study.
        question: a question, or a list of questions, which share the computation of the image.
        adapter: directory of an adapter, or the adapter that is in the loaded model; None: the base.
        beams: width of the beam search; 1: greedy decoding.
        max_new_tokens: maximum length of an answer in tokens; None: as the adapter's training recorded, else 16.
        options: two or more texts to choose from; the answer is the one with the most likely letter.
        abstain_below: an answer with a lower confidence is abstained, without its text; from 0 to 1.
        device: cpu or cuda; None: cuda if available.
        quantize: int8 or nf4; None: not quantised.
        max_pixels: the most pixels of an image that the model reads; None: as in the adapter's training.

    Returns:
        The answer, or the answers in the order of the questions.

    Raises:
        InputError: the model, the adapter or an image is not valid.
    """
    adapter = local_adapter(adapter)
    questions = [question] if isinstance(question, str) else question
    with open_model(model, adapter, device=device, quantize=quantize) as family, family.pixel_limit(max_pixels):
        limit = max_new_tokens or _recorded_limit(adapter)
        answers = inference.ask(
            family,
            _images(image),
            questions,
            beams=beams,
            max_new_tokens=limit,
            options=options,
            abstain_below=abstain_below,
        )
    return answers[0] if isinstance(question, str) else answers


def describe(
    model: Model,
    image: Pictures,
    *,
    adapter: Adapter | None = None,
    beams: int = 1,
    max_new_tokens: int = tasks.MAX_REPORT_TOKENS,
    device: str | None = None,
    quantize: str | None = None,
    max_pixels: int | None = None,
) -> Answer:
    """Write a report about an image or the views of one study. For research use, not for diagnosis.

    The arguments are those of `ask`.

    Raises:
        InputError: the model, the adapter or an image is not valid.
    """
    with open_model(model, adapter, device=device, quantize=quantize) as family, family.pixel_limit(max_pixels):
        return inference.ask(family, _images(image), [""], beams=beams, max_new_tokens=max_new_tokens, report=True)[0]


def _images(image: Pictures) -> Sequence[Picture]:
    return image if isinstance(image, Sequence) and not isinstance(image, str) else [image]


def _recorded_limit(adapter: Adapter | None) -> int:
    """Return the limit of an answer that an adapter's file records, in tokens; 16 if there is none."""
    from normtune.adapters.storage import read_adapter_info

    data = None if adapter is None or isinstance(adapter, TunedModel) else read_adapter_info(adapter).data
    return ((data or {}).get("limits") or {}).get("answer") or tasks.MAX_ANSWER_TOKENS

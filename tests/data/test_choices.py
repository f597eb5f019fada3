"""Questions with options are written in three usual wordings."""

from __future__ import annotations

import pytest

from normtune.data.choices import DIRECTLY, ChoiceFormat
from normtune.data.examples import Example
from normtune.training.config import TrainConfig

CHOICE = Example("1", ("i",), "Which organ?", "liver", "choice", "test", options=("lung", "liver"))
PROMPTS = {
    "llava": f"Which organ?\nA. lung\nB. liver\n{DIRECTLY}",
    "mmmu": f"Which organ?\n(A) lung\n(B) liver\n\n{DIRECTLY}",
    "inline": "Which organ? Options: A: lung, B: liver",
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_prompts_of_a_choice(prompt: str) -> None:
    config = TrainConfig(model="nano", data="phantom-a", out="out", choice_prompt=prompt)  # type: ignore[arg-type]
    choices = ChoiceFormat().with_options(config)
    assert choices.question(CHOICE) == PROMPTS[prompt] and choices.answer(CHOICE) == "B"


def test_a_choice_is_trained_by_its_letter_or_its_text() -> None:
    assert ChoiceFormat(target="text").answer(CHOICE) == "liver"
    question = Example("1", ("i",), "Which organ?", "liver", "open", "test")
    assert (ChoiceFormat().question(question), ChoiceFormat().answer(question)) == ("Which organ?", "liver")

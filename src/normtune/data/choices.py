"""How a question with options is written for a model, and the answer that training uses: a letter or a text.

| prompt | the question as the model reads it | after |
|---|---|---|
| `llava` | `Q`, a line `A. text` for each option, and the line `DIRECTLY` | LLaVA 1.5 |
| `mmmu` | `Q`, a line `(A) text` for each option, an empty line, and the line `DIRECTLY` | MMMU, lmms-eval |
| `inline` | `Q Options: A: text, B: text` in one line, without an instruction | PMC-VQA |

`DIRECTLY` is "Answer with the option's letter from the given choices directly."
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from normtune.data.examples import Example, option_letter

ChoicePrompt = Literal["llava", "mmmu", "inline"]
ChoiceTarget = Literal["letter", "text"]
DIRECTLY = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class ChoiceFormat:
    """How a model reads and answers questions with options. The field names are JSON keys of adapters."""

    prompt: ChoicePrompt = "llava"  # how the question is written; see the top of this module
    target: ChoiceTarget = "letter"  # what a model is trained to answer: the letter of the right option, or its text

    def with_options(self, options: Any) -> ChoiceFormat:
        """The format with the options `choice_prompt` and `choice_target` of a run, where they are set."""
        names = {"prompt": "choice_prompt", "target": "choice_target"}
        values = {name: getattr(options, option, None) for name, option in names.items()}
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def question(self, example: Example) -> str:
        """The question of an example as the model reads it, with its options if it has any."""
        return self.write(example.question, example.options)

    def write(self, question: str, options: Sequence[str]) -> str:
        """A question as the model reads it, with its options if there are any."""
        if not options:
            return question
        lettered = [(option_letter(place), text) for place, text in enumerate(options)]
        if self.prompt == "inline":
            return f"{question} Options: {', '.join(f'{letter}: {text}' for letter, text in lettered)}"
        if self.prompt == "mmmu":
            lines = "".join(f"({letter}) {text}\n" for letter, text in lettered)
        else:
            lines = "\n".join(f"{letter}. {text}" for letter, text in lettered)
        return f"{question}\n{lines}\n{DIRECTLY}"

    def answer(self, example: Example) -> str:
        """The answer that the model is trained on."""
        return example.letter if example.options and self.target == "letter" else example.answer

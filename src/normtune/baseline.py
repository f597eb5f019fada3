"""What can be answered without looking: the floor that every model must clear."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from normtune.data.records import Example
from normtune.errors import InputError
from normtune.metrics.text import normalise, tokens
from normtune.metrics.vqa import Prediction

_QUESTION_MARKS = str.maketrans(dict.fromkeys("?!.,;:\"'()？！。，；：、", " "))


def _words(question: str) -> tuple[str, ...]:
    return tuple(tokens(question.lower().translate(_QUESTION_MARKS)))


def _commonest(answers: Sequence[str]) -> str:
    """The answer given most often, spellings of one normalised form counted together.

    Ties go to the alphabetically first form, and among a form's spellings to the commonest, then the first.
    """
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        forms[normalise(answer)][answer] += 1
    form = min(forms, key=lambda form: (-forms[form].total(), form))
    return min(forms[form], key=lambda spelling: (-forms[form][spelling], spelling))


@dataclass(frozen=True)
class QuestionOnly:
    """The commonest training answer to the same question, else to its first two words, else of all rows.

    Two questions are the same when their words are, whatever the case and punctuation.
    """

    by_question: dict[tuple[str, ...], str]
    by_start: dict[tuple[str, ...], str]
    overall: str

    @classmethod
    def fit(cls, train: Sequence[Example]) -> QuestionOnly:
        """Count the answers of the training rows.

        Raises:
            InputError: there are none.
        """
        if not train:
            raise InputError("the question-only baseline needs training rows and got none.")
        questions: dict[tuple[str, ...], list[str]] = defaultdict(list)
        starts: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for example in train:
            words = _words(example.question)
            questions[words].append(example.answer)
            starts[words[:2]].append(example.answer)
        return cls(
            by_question={words: _commonest(answers) for words, answers in questions.items()},
            by_start={words: _commonest(answers) for words, answers in starts.items()},
            overall=_commonest([example.answer for example in train]),
        )

    def predict(self, examples: Sequence[Example]) -> list[Prediction]:
        """One prediction an example, in order; neither its image nor its reference is looked at."""
        return [Prediction(example.id, self._answer(_words(example.question))) for example in examples]

    def _answer(self, words: tuple[str, ...]) -> str:
        return self.by_question.get(words, self.by_start.get(words[:2], self.overall))

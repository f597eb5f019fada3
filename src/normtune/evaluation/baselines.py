"""What can be answered without looking: the floor that every model must clear."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from normtune.data.records import Example, Prediction
from normtune.data.splits import patients
from normtune.errors import InputError
from normtune.metrics.normalisation import normalise, tokens

_QUESTION_MARKS = str.maketrans(dict.fromkeys("?!.,;:\"'()？！。，；：、", " "))


def words_of(question: str) -> tuple[str, ...]:
    """The words that tell a question from another, whatever its case and punctuation."""
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
            words = words_of(example.question)
            questions[words].append(example.answer)
            starts[words[:2]].append(example.answer)
        return cls(
            by_question={words: _commonest(answers) for words, answers in questions.items()},
            by_start={words: _commonest(answers) for words, answers in starts.items()},
            overall=_commonest([example.answer for example in train]),
        )

    def predict(self, examples: Sequence[Example]) -> list[Prediction]:
        """One prediction an example, in order; neither its image nor its reference is looked at."""
        return [Prediction(example.id, self._answer(words_of(example.question))) for example in examples]

    def _answer(self, words: tuple[str, ...]) -> str:
        return self.by_question.get(words, self.by_start.get(words[:2], self.overall))


@dataclass(frozen=True)
class OneText:
    """One training text for every image, however it looks."""

    text: str

    @classmethod
    def most_frequent(cls, train: Sequence[Example]) -> OneText:
        """The report (or answer) of the most patients.

        Texts are the same when their normalised forms are. Each counts once for a patient, a case or, where
        the data name neither, a study: the slices of one case often bear one caption. Of texts that are
        equally frequent the one nearest the middle is taken, see `medoid`.

        Raises:
            InputError: there are no training rows.
        """
        spelt = _spellings(train, "most-frequent")
        cluster = patients(train)
        whose: dict[str, set[str]] = defaultdict(set)  # form -> the patients that have it
        for example in train:
            whose[normalise(example.answer)].add(cluster[example.images[0]] if example.images else example.id)
        most = max(len(them) for them in whose.values())
        return cls(spelt[_medoid([form for form, them in whose.items() if len(them) == most], train)])

    @classmethod
    def medoid(cls, train: Sequence[Example]) -> OneText:
        """The text whose word counts have the highest mean cosine similarity to those of all training rows.

        Of equal ones the first counts.

        Raises:
            InputError: there are no training rows.
        """
        spelt = _spellings(train, "medoid")
        return cls(spelt[_medoid(list(spelt), train)])

    def predict(self, examples: Sequence[Example]) -> list[Prediction]:
        """One prediction an example, in order; only its id is looked at."""
        return [Prediction(example.id, self.text) for example in examples]


def _spellings(train: Sequence[Example], baseline: str) -> dict[str, str]:
    """Normalised form -> its first spelling, in the order of the rows."""
    if not train:
        raise InputError(f"the {baseline} baseline needs training rows and got none.")
    spelt: dict[str, str] = {}
    for example in train:
        spelt.setdefault(normalise(example.answer), example.answer)
    return spelt


def _medoid(forms: Sequence[str], train: Sequence[Example]) -> str:
    """Of `forms` the one nearest all training rows: cosines with all add up to one with their sum."""
    total: Counter[str] = Counter()
    for example in train:
        total.update(_direction(normalise(example.answer)))  # type: ignore[arg-type]  # counts of parts
    return max(forms, key=lambda form: sum(part * total[word] for word, part in _direction(form).items()))


def _direction(text: str) -> dict[str, float]:
    """Word counts, divided by their Euclidean length."""
    counts = Counter(tokens(text))
    length = math.hypot(*counts.values())
    return {word: count / length for word, count in counts.items()}

"""Baselines that answer without the image. Every model should score higher than they do."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from normtune.data.records import Example, Prediction
from normtune.data.splits import patient_of_image
from normtune.errors import InputError
from normtune.metrics.normalisation import normalise, tokens

_QUESTION_MARKS = str.maketrans(dict.fromkeys("?!.,;:\"'()？！。，；：、", " "))


def question_words(question: str) -> tuple[str, ...]:
    """Split a question into lower-case words without punctuation. Equal words mean the same question."""
    return tuple(tokens(question.lower().translate(_QUESTION_MARKS)))


def _most_common(answers: Sequence[str]) -> str:
    """Return the most common answer. Spellings with the same normalised form are counted together.

    If forms are equally common, the alphabetically first one wins. The result is the most common spelling of that
    form, or the first of equally common spellings.
    """
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        forms[normalise(answer)][answer] += 1
    form = min(forms, key=lambda form: (-forms[form].total(), form))
    return min(forms[form], key=lambda spelling: (-forms[form][spelling], spelling))


@dataclass(frozen=True)
class QuestionOnly:
    """Predicts the most common training answer to the same question.

    If training has no such question, it predicts the most common answer to questions with the same first two
    words, else the most common answer of all rows. Case and punctuation of questions are ignored.

    For a question with options, it looks at the training answers to the same question, then to questions with the same
    first two words, then to all questions, and predicts the option that is the most common answer in the first of these
    groups that has any of the options. If none has, it predicts the position that is right most often.
    """

    by_question: dict[tuple[str, ...], str]  # words of a question -> answer
    by_start: dict[tuple[str, ...], str]  # first two words of a question -> answer
    overall: str
    answers: dict[tuple[str, tuple[str, ...]], Counter[str]]  # question, its start or "all" -> normalised answers
    position: int  # the most frequent position of the right option

    @classmethod
    def fit(cls, train: Sequence[Example]) -> QuestionOnly:
        """Count the answers of the training rows. Raises `InputError` if there are no rows."""
        if not train:
            raise InputError("the question-only baseline needs training rows and got none.")
        questions: dict[tuple[str, ...], list[str]] = defaultdict(list)
        starts: dict[tuple[str, ...], list[str]] = defaultdict(list)
        counts: dict[tuple[str, tuple[str, ...]], Counter[str]] = defaultdict(Counter)
        for example in train:
            words = question_words(example.question)
            questions[words].append(example.answer)
            starts[words[:2]].append(example.answer)
            if example.options:
                for key in _answer_keys(words):
                    counts[key][normalise(example.answer)] += 1
        return cls(
            by_question={words: _most_common(answers) for words, answers in questions.items()},
            by_start={words: _most_common(answers) for words, answers in starts.items()},
            overall=_most_common([example.answer for example in train]),
            answers=dict(counts),
            position=_common_position(train),
        )

    def predict(self, examples: Sequence[Example]) -> list[Prediction]:
        """Predict one answer per example, in order. Neither images nor references are used."""
        return [
            Prediction(example.id, self._option(example) if example.options else self._answer(example))
            for example in examples
        ]

    def _option(self, example: Example) -> str:
        forms = [normalise(option) for option in example.options]
        for key in _answer_keys(question_words(example.question)):
            counts = [self.answers.get(key, Counter())[form] for form in forms]
            if any(counts):
                return example.options[counts.index(max(counts))]
        return _option_at(example, self.position)

    def _answer(self, example: Example) -> str:
        words = question_words(example.question)
        return self.by_question.get(words, self.by_start.get(words[:2], self.overall))


def _answer_keys(words: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The groups of training rows that a question belongs to, the most similar first."""
    return ("question", words), ("start", words[:2]), ("all", ())


def _common_position(train: Sequence[Example]) -> int:
    """The position at which the right option is most often; the first of equally common ones."""
    positions = Counter(example.options.index(example.answer) for example in train if example.options)
    return min(positions, key=lambda position: (-positions[position], position), default=0)


def _option_at(example: Example, position: int) -> str:
    """The option at a position, or the last one."""
    return example.options[min(position, len(example.options) - 1)]


@dataclass(frozen=True)
class ConstantText:
    """Predicts the same training text for every image; of questions with options, the same position."""

    text: str
    position: int = 0  # at which the right option is most often

    @classmethod
    def most_frequent(cls, train: Sequence[Example]) -> ConstantText:
        """Take the report (or answer) that the most patients have.

        Texts with the same normalised form are counted together. A text counts once per patient, per case or,
        if the data name neither, per study, because the slices of a case often share one caption. If texts
        are equally frequent, the one with the highest mean similarity to all texts is taken, as in `medoid`.

        Raises:
            InputError: if there are no training rows.
        """
        spellings = _first_spellings(train, "most-frequent")
        patient = patient_of_image(train)
        patients: dict[str, set[str]] = defaultdict(set)  # form -> the patients that have it
        for example in train:
            form = normalise(example.answer)
            patients[form].add(patient[example.images[0]] if example.images else example.id)
        most = max(len(names) for names in patients.values())
        forms = [form for form, names in patients.items() if len(names) == most]
        return cls(spellings[_medoid(forms, train)], _common_position(train))

    @classmethod
    def medoid(cls, train: Sequence[Example]) -> ConstantText:
        """Take the text with the highest mean cosine similarity of word counts to all training rows.

        If texts are equally similar, the first one is taken.

        Raises:
            InputError: if there are no training rows.
        """
        spellings = _first_spellings(train, "medoid")
        return cls(spellings[_medoid(list(spellings), train)], _common_position(train))

    def predict(self, examples: Sequence[Example]) -> list[Prediction]:
        """Predict one text per example, in order. Only the ids and options of the examples are used."""
        return [
            Prediction(example.id, _option_at(example, self.position) if example.options else self.text)
            for example in examples
        ]


def _first_spellings(train: Sequence[Example], baseline: str) -> dict[str, str]:
    """Map each normalised form to its first spelling, in the order of the rows."""
    if not train:
        raise InputError(f"the {baseline} baseline needs training rows and got none.")
    spellings: dict[str, str] = {}
    for example in train:
        spellings.setdefault(normalise(example.answer), example.answer)
    return spellings


def _medoid(forms: Sequence[str], train: Sequence[Example]) -> str:
    """Return the form with the highest mean cosine similarity to all training rows.

    The sum of a vector's cosines with all unit vectors is its dot product with their sum, so the pairs of
    texts need not be compared one by one.
    """
    total: Counter[str] = Counter()
    for example in train:
        total.update(_unit_vector(normalise(example.answer)))  # type: ignore[arg-type]  # fractional counts
    return max(forms, key=lambda f: sum(weight * total[word] for word, weight in _unit_vector(f).items()))


def _unit_vector(text: str) -> dict[str, float]:
    """Count the words of a text and divide the counts by their Euclidean norm."""
    counts = Counter(tokens(text))
    length = math.hypot(*counts.values())
    return {word: count / length for word, count in counts.items()}

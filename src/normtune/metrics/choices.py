"""Scores of answers to questions with options, and the option that a generated text chooses.

========================================  ======================================================================
name                                      the selected option of a row
========================================  ======================================================================
`choice_accuracy`                         the one in `prediction`: by the first scoring of `--choice-scoring`
`choice_accuracy_letter`                  the largest log-likelihood of the letter after the prompt
`choice_accuracy_text`                    the largest log-likelihood of the option's text (lm-eval's `acc`)
`choice_accuracy_text_normalized`         the same divided by the number of characters of the text (`acc_norm`)
`choice_accuracy_generated`               the option that `parse_choice` reads in the generated answer
========================================  ======================================================================

A row scores 1 if the text of the selected option is the answer, else 0. The end token does not count in a likelihood.
Of equal likelihoods the first option is selected. An answer from which no option can be read is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from normtune.data.examples import option_index, option_letter, plain_option
from normtune.data.records import Example, Prediction

SCORINGS = ("letter", "text", "text_normalized", "generated")
METRICS = ("choice_accuracy", *(f"choice_accuracy_{scoring}" for scoring in SCORINGS))

# A single letter that names an option. "A" before a word is an article, unless the word begins a reason.
_LETTER = r"(A(?!\s+(?!because\b|since\b|as\b|due\b)[a-z])|[B-Z])(?![\w'’])"
_ALONE_THERE = r"(?!\W*(?:,|/|&|or|and)\W*[A-Z]\b)"  # "B or C" is no choice
_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\].:]*")  # "B", "(B)", "b."
_LABEL = re.compile(r"(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])[).:](?=\s))")  # "(B) lung", "B. lung", "b) lung"
_STATED = re.compile(
    rf"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|would be))?)\s*[:=]?\s*(?i:option\s+)?[(\[*]*{_LETTER}{_ALONE_THERE}"
)
_ANYWHERE = re.compile(rf"(?<![\w'’]){_LETTER}")


def parse_choice(text: str, options: Sequence[str]) -> int | None:
    """Read which option a text chooses.

    It tries in this order: a letter alone ("B", "(B)"), the text of an option, a label at the beginning ("B. lung"),
    a statement ("the answer is B"), one option's text within the text, one letter within it. Case, blanks and a final
    full stop do not count in texts.

    Returns:
        The position of the option; of several options with that text, the first. None if no rule reads exactly one.
    """
    text = text.strip()
    plain, plain_options = plain_option(text), [plain_option(option) for option in options]
    if (match := _ALONE.fullmatch(text)) and (place := _place(match[1], len(options))) is not None:
        return place
    if plain and plain in plain_options:
        return plain_options.index(plain)
    if (match := _LABEL.match(text)) and (place := _place(match[1] or match[2], len(options))) is not None:
        return place
    for places in (_letters(_STATED, text, options), _named(plain, plain_options), _letters(_ANYWHERE, text, options)):
        if len(places) == 1:
            return places.pop()
    return None


def _place(letter: str, count: int) -> int | None:
    """The position of the option with a letter; None if there are fewer options."""
    place = option_index(letter)
    return place if place < count else None


def _letters(pattern: re.Pattern[str], text: str, options: Sequence[str]) -> set[int]:
    """The options of the letters that a pattern finds."""
    places = (_place(match[1], len(options)) for match in pattern.finditer(text))
    return {place for place in places if place is not None}


def _named(text: str, options: Sequence[str]) -> set[int]:
    """The options with a whole text that occurs in a text; not those within a longer one that occurs too."""
    occurring = {option for option in options if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text)}
    longest = {option for option in occurring if not any(option in other for other in occurring - {option})}
    return {options.index(option) for option in longest}


def chosen_text(text: str, options: Sequence[str]) -> str | None:
    """The text of the option that a prediction names, by its text or as `parse_choice` reads it; None: none."""
    if text in options:
        return text
    place = parse_choice(text, options)
    return None if place is None else options[place]


def chosen_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a text names, as `parse_choice` reads it; None: none."""
    place = parse_choice(text, options)
    return None if place is None else option_letter(place)


def choice_scores(
    examples: Sequence[Example], predictions: Mapping[str, str] | Sequence[Prediction]
) -> dict[str, dict[str, float]]:
    """Score the rows that are choices: metric -> example id -> 1 or 0.

    `predictions` that are texts, or that no likelihood was computed for, have `choice_accuracy` only.
    """
    scores: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    results = {} if isinstance(predictions, Mapping) else {p.id: p.choice for p in predictions if p.choice is not None}
    texts = predictions if isinstance(predictions, Mapping) else {p.id: p.text for p in predictions}
    for example in examples:
        if example.options:
            right = chosen_text(texts[example.id], example.options) == example.answer
            scores["choice_accuracy"][example.id] = float(right)
            for scoring, places in (results[example.id].selected if example.id in results else {}).items():
                selected = None if places[0] is None else example.options[places[0]]
                scores[f"choice_accuracy_{scoring}"][example.id] = float(selected == example.answer)
    return {name: rows for name, rows in scores.items() if rows}


def rotated_options(options: Sequence[str], rotation: int) -> tuple[str, ...]:
    """The options with each one moved `rotation` places towards the end, and the last ones to the front."""
    at = len(options) - rotation
    return (*options[at:], *options[:at])


def chosen_positions(example: Example, places: Sequence[int | None]) -> Iterator[tuple[set[int], int | None]]:
    """For each rotation of a question: the positions of its right options, and the position of the selected option."""
    for rotation, place in enumerate(places):
        options = rotated_options(example.options, rotation)
        yield {at for at, text in enumerate(options) if text == example.answer}, place

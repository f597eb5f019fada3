"""Chooses among the options of questions: by the likelihood of letters or texts, or by the generated answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from normtune.data.examples import option_letter
from normtune.data.groups import Segment
from normtune.data.records import ChoiceResult, Dataset, Example, Prediction
from normtune.inference.predict import Progress, answer_all, candidate_log_probs, finite, log_shares
from normtune.metrics.choices import rotated_options

if TYPE_CHECKING:
    from normtune.models.family import Family
    from normtune.models.image_cache import ImageCache


def answer_choices(
    family: Family,
    dataset: Dataset,
    examples: Sequence[Example],
    scorings: Sequence[str] = ("letter",),
    *,
    rotations: bool = False,
    batch_pairs: int = 64,
    images: ImageCache | None = None,
    progress: Progress | None = None,
    **generation: Any,
) -> list[Prediction]:
    """Choose an option for every example, by one or several scorings.

    All candidates of an example continue one prompt, which is computed once, as is the image of several examples.

    Args:
        examples: questions with options.
        scorings: of `normtune.metrics.choices.SCORINGS`; the first decides the text of the prediction.
        rotations: score each question again with its options in each cyclic order.
        batch_pairs: about how many candidates are scored, or questions answered, at a time.
        images, progress: as for `answer_all`.
        generation: `beams` and `max_new_tokens` of `answer_all`, for generated answers.

    Returns:
        One prediction per example, in their order. `score` is log(p / sum of p over the options) of the selected
        option, where p of `text_normalized` is exp(log-likelihood / characters); of a generated answer that of
        `answer_all`.

    Raises:
        InputError: an image cannot be read, or the device runs out of memory.
    """
    questions: list[Example] = []  # the examples, and each once more for every rotation
    ids: dict[str, list[str]] = {}  # example -> the ids of its questions, by rotation
    used = {example.id for example in examples}
    for example in examples:
        for rotation in range(len(example.options) if rotations else 1):
            id = f"{example.id}~{rotation}" if rotation else example.id
            while rotation and id in used:
                id += "~"
            used.add(id)
            ids.setdefault(example.id, []).append(id)
            questions.append(replace(example, id=id, options=rotated_options(example.options, rotation)))
    scores: dict[str, dict[str, list[float]]] = {}  # id of a question -> scoring -> log-likelihood of each option
    generated: dict[str, Prediction] = {}
    cut: Counter[str] = Counter()  # id of a question -> options that are cut

    def tick(done: int) -> None:
        if progress is not None:
            progress(len(examples) * done // (len(questions) * passes), len(examples))

    likelihoods = [scoring for scoring in ("letter", "text") if any(name.startswith(scoring) for name in scorings)]
    passes = bool(likelihoods) + ("generated" in scorings)
    if likelihoods:
        most = len(likelihoods) * max((len(question.options) for question in questions), default=1)
        scored = candidate_log_probs(
            family,
            dataset,
            questions,
            lambda question: _candidates(family, question, likelihoods, cut),
            most,
            batch_pairs=batch_pairs,
            cap=max(1, batch_pairs // most),
            images=images,
            progress=lambda done, _: tick(done),
        )
        for question, log_probs in scored:
            count = len(question.options)
            scores[question.id] = {scoring: log_probs[at * count :][:count] for at, scoring in enumerate(likelihoods)}
            if "text_normalized" in scorings:
                sums = zip(scores[question.id]["text"], question.options, strict=True)
                scores[question.id]["text_normalized"] = [value / len(text) for value, text in sums]
    if "generated" in scorings:
        answers = answer_all(
            family,
            dataset,
            questions,
            batch_pairs=batch_pairs,
            images=images,
            progress=lambda done, _: tick(len(scores) + done),
            **generation,
        )
        generated = {answer.id: answer for answer in answers}
    return [
        _prediction(
            example,
            scorings,
            [scores.get(id, {}) for id in ids[example.id]],
            [generated.get(id) for id in ids[example.id]],
            cut[example.id],
        )
        for example in examples
    ]


def _candidates(family: Family, question: Example, likelihoods: Sequence[str], cut: Counter[str]) -> list[Segment]:
    """The letters and the texts of the options as answers, without end tokens; `cut` counts those that are cut."""
    letters = [option_letter(place) for place in range(len(question.options))]
    segments = []
    for answer in (text for scoring in likelihoods for text in (letters if scoring == "letter" else question.options)):
        segment = family.tokenize_example(replace(question, id=f"{question.id}={answer}"), answer)
        ended = segment.answer[-1] in family.end_tokens  # a text that is too long loses its end token
        cut[question.id] += not ended
        segments.append(replace(segment, answer=segment.answer[:-1]) if ended else segment)
    return segments


def _prediction(
    example: Example,
    scorings: Sequence[str],
    scores: list[dict[str, list[float]]],
    generated: list[Prediction | None],
    cut: int,
) -> Prediction:
    """The prediction of one example from the scores and generated answers of its rotations."""
    selected: dict[str, tuple[int | None, ...]] = {}
    for scoring in scorings:
        if scoring == "generated":
            results = [answer.choice for answer in generated if answer is not None and answer.choice is not None]
            selected[scoring] = tuple(result.selected[scoring][0] for result in results)
        else:
            selected[scoring] = tuple(max(range(len(row[scoring])), key=row[scoring].__getitem__) for row in scores)
    answer, scoring = generated[0], scorings[0]
    place = selected[scoring][0]
    choice = ChoiceResult(
        selected,
        {name: tuple(map(finite, scores[0][name])) for name in scorings if name != "generated"},
        None if answer is None or answer.choice is None else answer.choice.generated,
        cut,
    )
    reason = None if answer is None else answer.finish_reason
    if scoring == "generated":
        assert answer is not None, "answers are generated"
        return Prediction(example.id, answer.text, answer.score, reason, choice)
    assert place is not None, "a likelihood always chooses"
    return Prediction(example.id, example.options[place], finite(log_shares(scores[0][scoring])[place]), reason, choice)

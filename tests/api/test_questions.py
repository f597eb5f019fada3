"""Questions in Python: image files and opened images, one question and several."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import normtune
from normtune.models.family import Family


@pytest.fixture(scope="module")
def model(base: Path) -> Family:
    return normtune.load(base, device="cpu")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    data = normtune.open_dataset("phantom-b:1")
    data.open_image(data.train[0].images[0]).save(tmp_path / "chest.png")
    return tmp_path / "chest.png"


def test_an_image_is_a_file_or_an_opened_image(model: Family, picture: Path, base: Path) -> None:
    question = "Is there a fracture?"
    answers = [
        normtune.ask(model, image, question) for image in (picture, str(picture), [picture], Image.open(picture))
    ]
    answers.append(normtune.ask(str(base), picture, question, device="cpu"))
    assert len({answer.text for answer in answers}) == 1 and len({answer.score for answer in answers}) == 1
    assert f"{answers[0]}" == answers[0].text


def test_several_questions_have_a_list_of_answers(model: Family, picture: Path) -> None:
    questions = ["Is there a fracture?", "Which organ is it?"]
    answers = normtune.ask(model, picture, questions)
    assert [answer.text for answer in answers] == [normtune.ask(model, picture, text).text for text in questions]


def test_an_answer_below_the_threshold_has_no_text(model: Family, picture: Path) -> None:
    answer = normtune.ask(model, picture, "Which organ is it?")
    assert answer.confidence is not None and 0 < answer.confidence < 1 and not answer.abstained
    below, above = (
        normtune.ask(model, picture, "Which organ is it?", abstain_below=min(1.0, factor * answer.confidence))
        for factor in (0.9, 1.1)
    )
    assert below == answer and (above.text, above.abstained, above.score) == ("", True, answer.score)
    assert str(above) == f"(abstained: confidence {answer.confidence:.2f})"
    with pytest.raises(normtune.InputError, match="from 0 to 1, got 50"):
        normtune.ask(model, picture, "why?", abstain_below=50)


def test_grey_images_of_16_bits_are_scaled_as_in_files(model: Family, tmp_path: Path) -> None:
    image = Image.new("I;16", (48, 48))
    image.putdata([64 * value for value in range(1024)] + [0] * 1280)
    image.save(tmp_path / "deep.png")
    answers = [normtune.describe(model, source, max_new_tokens=4) for source in (image, tmp_path / "deep.png")]
    assert answers[0] == answers[1]


def test_a_study_of_two_views_is_described(model: Family, picture: Path) -> None:
    both = normtune.describe(model, [picture, picture], max_new_tokens=4)
    assert both == normtune.describe(model, (str(picture), Image.open(picture)), max_new_tokens=4)


def test_bad_input_is_an_input_error(model: Family, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(normtune.InputError, match=r"absent\.png: no such image file"):
        normtune.ask(model, tmp_path / "absent.png", "why?")
    with pytest.raises(normtune.InputError, match="no image to ask about"):
        normtune.ask(model, [], "why?")
    with pytest.raises(normtune.InputError, match=r"device is an option of normtune\.load"):
        normtune.ask(model, picture, "why?", device="cpu")


@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_says_whether_the_limit_cut_it(picture: Path, beams: int) -> None:
    nano = normtune.load("nano", device="cpu")
    whole = normtune.ask(nano, picture, "Is there a fracture?", beams=beams)
    assert whole.finish_reason == "stop" and whole.text in ("yes", "no")
    cut = normtune.describe(nano, picture, beams=beams, max_new_tokens=2)
    assert cut.finish_reason == "length" and len(cut.tokens) == 2


def test_the_default_limit_is_that_of_the_adapters_training(model: Family, picture: Path, tmp_path: Path) -> None:
    tuned = normtune.adapt(model, "ln")
    for folder, data in (("new", {"limits": {"answer": 3}}), ("old", None)):
        normtune.save_adapter(tuned, tmp_path / folder, data=data)
    normtune.restore_base(tuned)
    for adapter, limit in ((tmp_path / "new", 3), (tmp_path / "old", 16), (None, 16)):
        default = normtune.ask(model, picture, "Is there a fracture?", adapter=adapter)
        explicit = normtune.ask(model, picture, "Is there a fracture?", adapter=adapter, max_new_tokens=limit)
        assert default == explicit and len(default.tokens) == limit


def test_a_loaded_model_cuts_questions_as_in_training(model: Family, picture: Path, tmp_path: Path) -> None:
    """As a model that is loaded by its name does: an adapter of version 0.1 on MISS reads 35 tokens of a question."""
    tuned = normtune.adapt(model, "ln")
    normtune.save_adapter(tuned, tmp_path / "old")
    normtune.restore_base(tuned)
    start = "Is there a mass in the left lung? " * 5
    adapted = [normtune.ask(model, picture, start + end, adapter=tmp_path / "old") for end in ("Is it big?", "Where?")]
    assert adapted[0].tokens == adapted[1].tokens and adapted[0].score == adapted[1].score
    assert 0 < adapted[1].question_tokens_cut < adapted[0].question_tokens_cut
    of_base = [normtune.ask(model, picture, start + end) for end in ("Is it big?", "Where?")]
    assert of_base[0].score != of_base[1].score and model.prompt_limit is None


def test_an_answer_counts_the_tokens_of_its_question_that_were_not_read(model: Family, picture: Path) -> None:
    limit = model.max_prompt_tokens
    assert limit is not None
    long = "Is there a fracture or " + "an effusion or " * limit + "a mass?"
    cut, whole = normtune.ask(model, picture, [long, "Is there a fracture?"])
    assert cut.question_tokens_cut == len(model.tokenize_whole("0", long, None).prompt) - limit > 0
    assert whole.question_tokens_cut == 0


def test_one_of_several_options_is_chosen_by_its_letter(model: Family, picture: Path) -> None:
    options = ["left lung", "right lung", "heart"]
    answers = normtune.ask(model, picture, ["Where is it?", "Which organ?"], options=options)
    assert all(answer.text in options and answer.score <= 0 for answer in answers)
    repeated = normtune.ask(model, picture, "Where is it?", options=["heart", "heart"])
    assert repeated.text == "heart"
    with pytest.raises(normtune.InputError, match="a choice has 1 options"):
        normtune.ask(model, picture, "Where is it?", options=["heart"])

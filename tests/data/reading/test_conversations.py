from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.reading.conversations import conversation, refers_back
from normtune.data.reading.tables import Fault
from tests.support.report_samples import llava_med_row, messages_row


def test_llava_meds_conversation_is_read_turn_by_turn() -> None:
    row = llava_med_row(
        "a", ("What is shown?", "A CT."), ("Is the liver normal?", "Yes."), ("Where is it?", "Left.")
    )
    found = conversation(row)
    assert found.images == ("a.jpg",)
    assert [(p.turn, p.question, p.answer, p.images, p.refers_back) for p in found.pairs] == [
        (1, "What is shown?", "A CT.", 1, False),
        (2, "Is the liver normal?", "Yes.", 1, False),
        (3, "Where is it?", "Left.", 1, True),
    ]


def test_messages_leave_the_system_out_and_marks_out_of_the_question() -> None:
    (pair,) = conversation(messages_row("<image>\nWhat?", "Lung", "a.png")).pairs
    assert (pair.question, pair.answer, pair.images) == ("What?", "Lung", 1)


def test_images_in_the_content_stand_where_they_are_shown() -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    found = conversation(
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "L"}]}
    )
    assert (found.images, found.pairs[0].question, found.pairs[0].images) == (("a.png",), "What?", 1)


def test_a_later_image_is_not_shown_to_earlier_questions() -> None:
    turns = [("human", "<image> First?"), ("gpt", "a"), ("human", "<image> Second?"), ("gpt", "b")]
    row = {"image": ["a.png", "b.png"], "conversations": [{"from": f, "value": v} for f, v in turns]}
    assert [p.images for p in conversation(row).pairs] == [1, 2]


def test_without_a_mark_images_are_shown_before_the_first_question() -> None:
    assert conversation(messages_row("What?", "Lung", "a.png", "b.png")).pairs[0].images == 2


@pytest.mark.parametrize(
    "question",
    [
        "Where is it located?",
        "What is its size?",
        "Are they malignant?",
        "What does it suggest?",
        "What about the left kidney?",
        "And the spleen?",
        "Why?",
        "What did you mean by the finding you mentioned?",
        "Can you elaborate?",
        "Can you explain your previous answer?",
        "Is there anything else?",
    ],
)
def test_questions_that_need_the_turns_before_them_are_told(question: str) -> None:
    assert refers_back(question)


@pytest.mark.parametrize(
    "question",
    [
        "What imaging modality was used?",
        "What does this image show?",
        "What do the arrows point at?",
        "What is the size of the mass and where is it located?",
        "Is there a pleural effusion in the left lung?",
        "What can be seen above the liver?",
        "Why is contrast given in this CT?",
    ],
)
def test_questions_that_stand_alone_are_kept(question: str) -> None:
    assert not refers_back(question)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"mesages": []}, "no list 'messages' or 'conversations', is it 'mesages'?"),
        ({"messages": "x"}, "no list 'messages' or 'conversations'"),
        ({"messages": []}, "turns do not go from question to answer"),
        ({"messages": [{"role": "user", "content": "x"}]}, "turns do not go from question to answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "turns do not go from question to answer"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1: 'role' is none of user, human"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: 'value' is no text"),
        ({"conversations": ["hello"]}, "turn 1: 'from' is none of"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "a part is neither text nor image",
        ),
        (messages_row("<image><image> What?", "x", "a.png"), "2 <image> marks for 1 images"),
    ],
)
def test_rows_of_another_shape_are_refused(row: dict[str, Any], told: str) -> None:
    with pytest.raises(Fault) as caught:
        conversation(row)
    assert told in caught.value.what


json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["user", "gpt", "<image>", "text", "image", "a"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["messages", "conversations", "images", "image"]), json))
def test_any_json_is_a_conversation_or_a_fault(cells: dict[str, Any]) -> None:
    try:
        found = conversation(cells)
    except Fault as fault:
        assert fault.what and fault.mend
    else:
        assert found.pairs
        assert [p.turn for p in found.pairs] == list(range(1, len(found.pairs) + 1))
        assert all(0 <= p.images <= len(found.images) for p in found.pairs)

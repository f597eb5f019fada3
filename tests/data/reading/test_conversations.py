from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.reading.conversations import read_conversation, refers_back
from normtune.data.reading.tables import RowError
from tests.support.report_samples import llava_med_row, messages_row


def test_a_llava_med_conversation_becomes_pairs_of_turns() -> None:
    row = llava_med_row("a", ("What is shown?", "A CT."), ("Is the liver normal?", "Yes."), ("Where is it?", "Left."))
    conversation = read_conversation(row)
    assert conversation.images == ("a.jpg",)
    assert [(p.turn, p.question, p.answer, p.image_count, p.refers_back) for p in conversation.pairs] == [
        (1, "What is shown?", "A CT.", 1, False),
        (2, "Is the liver normal?", "Yes.", 1, False),
        (3, "Where is it?", "Left.", 1, True),
    ]


def test_system_messages_and_image_marks_are_removed() -> None:
    (pair,) = read_conversation(messages_row("<image>\nWhat?", "Lung", "a.png")).pairs
    assert (pair.question, pair.answer, pair.image_count) == ("What?", "Lung", 1)


def test_images_in_the_content_are_shown_at_their_position() -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    conversation = read_conversation(
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "L"}]}
    )
    assert (conversation.images, conversation.pairs[0].question, conversation.pairs[0].image_count) == (
        ("a.png",),
        "What?",
        1,
    )


def test_a_later_image_is_not_shown_to_earlier_questions() -> None:
    turns = [("human", "<image> First?"), ("gpt", "a"), ("human", "<image> Second?"), ("gpt", "b")]
    row = {"image": ["a.png", "b.png"], "conversations": [{"from": f, "value": v} for f, v in turns]}
    assert [p.image_count for p in read_conversation(row).pairs] == [1, 2]


def test_without_a_mark_images_are_shown_before_the_first_question() -> None:
    assert read_conversation(messages_row("What?", "Lung", "a.png", "b.png")).pairs[0].image_count == 2


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
def test_questions_that_need_earlier_turns_are_recognised(question: str) -> None:
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
def test_independent_questions_do_not_refer_back(question: str) -> None:
    assert not refers_back(question)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"mesages": []}, "no list 'messages' or 'conversations', is it 'mesages'?"),
        ({"messages": "x"}, "no list 'messages' or 'conversations'"),
        ({"messages": []}, "questions and answers do not alternate"),
        ({"messages": [{"role": "user", "content": "x"}]}, "questions and answers do not alternate"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "questions and answers do not alternate"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "turn 1: 'role' is none of user, human"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: 'value' is not text"),
        ({"conversations": ["hello"]}, "turn 1: 'from' is none of"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part is neither text nor image"),
        (messages_row("<image><image> What?", "x", "a.png"), "2 <image> marks for 1 images"),
    ],
)
def test_rows_of_another_shape_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        read_conversation(row)
    assert message in caught.value.what


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["user", "gpt", "<image>", "text", "image", "a"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["messages", "conversations", "images", "image"]), json))
def test_any_json_is_a_conversation_or_an_error(cells: dict[str, Any]) -> None:
    try:
        conversation = read_conversation(cells)
    except RowError as error:
        assert error.what and error.fix
    else:
        assert conversation.pairs
        assert [p.turn for p in conversation.pairs] == list(range(1, len(conversation.pairs) + 1))
        assert all(0 <= p.image_count <= len(conversation.images) for p in conversation.pairs)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}])
def test_answers_that_are_marked_are_not_learnt(mark: dict[str, object]) -> None:
    row = messages_row("What?", "A wrong answer", "a.png")
    row["messages"][2] |= mark
    more = messages_row("Which organ?", "Lung", "a.png")["messages"][1:]
    pairs = read_conversation(row | {"messages": row["messages"] + more}).pairs
    assert [(pair.answer, pair.learnt) for pair in pairs] == [("A wrong answer", False), ("Lung", True)]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "What?", "response": "Lung", "images": ["a.png"]},
        {"instruction": "What?", "input": "", "output": "Lung", "image": "a.png"},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "What?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Lung"}]},
            ]
        },
    ],
)
def test_rows_of_other_toolkits_are_the_same_conversation(row: dict[str, Any]) -> None:
    conversation = read_conversation(row)
    assert conversation.images == ("a.png",)
    assert [(pair.question, pair.answer, pair.image_count) for pair in conversation.pairs] == [("What?", "Lung", 1)]


def test_earlier_turns_are_read_from_the_history() -> None:
    row = {"query": "And the heart?", "response": "Large", "history": [["What?", "Lung"]], "image": "a.png"}
    assert [(p.question, p.answer) for p in read_conversation(row).pairs] == [
        ("What?", "Lung"),
        ("And the heart?", "Large"),
    ]
    with pytest.raises(RowError, match="history"):
        read_conversation(row | {"history": "What?"})

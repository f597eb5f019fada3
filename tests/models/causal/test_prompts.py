"""Conversations are cut where the image ends, and refused where the parts would not be the whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from normtune.errors import InputError
from normtune.models.causal.prompts import ChatPrompt
from normtune.models.families.llava import MISTRAL_TEMPLATE, VICUNA_TEMPLATE
from normtune.models.loading import load
from tests.support.tiny_models import TINY, make_tiny

CHATS = ("llava", "qwen2_vl", "internvl")
_made = {name: TINY[name]()[1] for name in CHATS}


def processor(name: str = "llava", template: str | None = None) -> Any:
    found = copy.deepcopy(_made[name])
    if template is not None:
        found.chat_template = template
    return found


def conversation(found: Any) -> ChatPrompt:
    end = getattr(found, "end_image_token", found.image_token)
    return ChatPrompt(found, end, "", [found.tokenizer.eos_token_id])


def written(found: Any, ids: tuple[int, ...]) -> str:
    return found.tokenizer.decode(ids)


def test_llava_has_its_own_prompt_and_an_end_token() -> None:
    found = processor()
    chat = conversation(found)
    assert written(found, chat.prefix(["<image>"] * 1)).replace(" ", "") == "<s>USER:<image>"
    prompt, answer = chat.segment("1", "Is there a fracture?", "no")
    assert written(found, prompt).strip() == "Is there a fracture? ASSISTANT:"
    assert written(found, answer).strip() == "no</s>"


@pytest.mark.parametrize(
    ("template", "whole"),
    [
        (MISTRAL_TEMPLATE, "[INST] <image>\nIs it? [/INST] no</s>"),
        (VICUNA_TEMPLATE, "USER: <image>\nIs it? ASSISTANT: no</s>"),
    ],
)
def test_templates_of_checkpoints_without_one(template: str, whole: str) -> None:
    found = processor(template=template)
    chat = conversation(found)
    prompt, answer = chat.segment("1", "Is it?", "no")
    tokens = tuple(found.tokenizer(whole).input_ids)
    assert (*chat.prefix(["<image>"]), *prompt, *answer) == tokens


def test_the_misspelt_end_of_llava_1_6_is_no_part_of_an_answer(tmp_path: Path) -> None:
    """The template of llava-v1.6-mistral ends answers with letters that look like the end token."""
    family = load(str(make_tiny("llava_next", tmp_path)))
    assert r"<\s>" in (tmp_path / "chat_template.jinja").read_text()
    answer = family.tokenize("1", "Is it?", "no").answer
    assert written(family.processor, answer).strip() == "no</s>"


def test_an_open_question_ends_where_the_model_is_to_write() -> None:
    chat = conversation(processor())
    prompt, answer = chat.segment("1", "Is it?", None)
    assert answer == () and prompt == chat.segment("1", "Is it?", "no")[0]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(CHATS),
    question=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=30),
    answer=st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=20),
)
def test_prefix_and_segment_are_the_whole_conversation(name: str, question: str, answer: str) -> None:
    """Whatever is asked, the parts are the tokens of the whole, or are refused."""
    found = _made[name]
    chat = conversation(found)
    spread = chat.marker if chat.marker == found.image_token else f"{found.image_token}{chat.marker}"
    try:
        prompt, told = chat.segment("1", question.strip(), answer.strip())
    except InputError:
        return
    content = [{"type": "image"}, {"type": "text", "text": question.strip()}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]},
    ]
    whole = found.apply_chat_template(messages).replace(found.image_token, spread, 1).rstrip()
    tokens = list(found.tokenizer(whole).input_ids)
    if tokens[-1] not in chat.ends:
        tokens.append(found.tokenizer.eos_token_id)
    assert [*chat.prefix([spread]), *prompt, *told] == tokens


def test_a_question_with_the_token_of_an_image_is_refused() -> None:
    with pytest.raises(InputError, match=r"example q7: its text holds '<image>'"):
        conversation(processor()).segment("q7", "What is <image>?", "no")


def test_a_template_that_puts_the_question_first_is_refused() -> None:
    template = (
        "{% for message in messages %}{% for part in message['content'] | reverse %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InputError, match="before the image"):
        conversation(processor(template=template)).segment("1", "Is it?", "no")


def test_a_template_that_rewrites_answered_questions_is_refused() -> None:
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' Answer:' }}{% endif %}"
    )
    with pytest.raises(InputError, match="otherwise once it is answered"):
        conversation(processor(template=template)).segment("1", "Is it?", "no")


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused() -> None:
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InputError, match="joins the end of the prompt"):
        conversation(processor(template=template)).segment("1", "USE", "R: no")


def test_a_tokenizer_that_ends_every_text_is_refused() -> None:
    found = processor()
    found.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(InputError, match="add_eos_token"):
        conversation(found).prefix(["<image>"])


def test_a_processor_without_a_template_is_refused() -> None:
    found = processor()
    found.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        conversation(found)

"""Conversations are cut after the image; an error is raised if the parts would not give the same tokens."""

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
PROCESSORS = {name: TINY[name]()[1] for name in CHATS}


def make_processor(name: str = "llava", template: str | None = None) -> Any:
    copied = copy.deepcopy(PROCESSORS[name])
    if template is not None:
        copied.chat_template = template
    return copied


def make_chat(processor: Any) -> ChatPrompt:
    end = getattr(processor, "end_image_token", processor.image_token)
    return ChatPrompt(processor, end, "", [processor.tokenizer.eos_token_id])


def decode(processor: Any, ids: tuple[int, ...]) -> str:
    return processor.tokenizer.decode(ids)


def test_llava_has_its_own_prompt_and_an_end_token() -> None:
    processor = make_processor()
    chat = make_chat(processor)
    assert decode(processor, chat.prefix(["<image>"] * 1)).replace(" ", "") == "<s>USER:<image>"
    prompt, answer = chat.segment("1", "Is there a fracture?", "no")
    assert decode(processor, prompt).strip() == "Is there a fracture? ASSISTANT:"
    assert decode(processor, answer).strip() == "no</s>"


@pytest.mark.parametrize(
    ("template", "whole"),
    [
        (MISTRAL_TEMPLATE, "[INST] <image>\nIs it? [/INST] no</s>"),
        (VICUNA_TEMPLATE, "USER: <image>\nIs it? ASSISTANT: no</s>"),
    ],
)
def test_templates_of_checkpoints_without_one(template: str, whole: str) -> None:
    processor = make_processor(template=template)
    chat = make_chat(processor)
    prompt, answer = chat.segment("1", "Is it?", "no")
    tokens = tuple(processor.tokenizer(whole).input_ids)
    assert (*chat.prefix(["<image>"]), *prompt, *answer) == tokens


def test_the_misspelt_end_of_llava_1_6_is_not_in_answers(tmp_path: Path) -> None:
    """The template of llava-v1.6-mistral ends answers with letters that look like the end token."""
    family = load(str(make_tiny("llava_next", tmp_path)))
    assert r"<\s>" in (tmp_path / "chat_template.jinja").read_text()
    answer = family.tokenize("1", "Is it?", "no").answer
    assert decode(family.processor, answer).strip() == "no</s>"


def test_without_an_answer_there_is_only_the_prompt() -> None:
    chat = make_chat(make_processor())
    prompt, answer = chat.segment("1", "Is it?", None)
    assert answer == () and prompt == chat.segment("1", "Is it?", "no")[0]


@settings(max_examples=60)
@given(
    name=st.sampled_from(CHATS),
    question=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=30),
    answer=st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=20),
)
def test_prefix_and_segment_give_the_tokens_of_the_conversation(name: str, question: str, answer: str) -> None:
    """For any question, the parts give the tokens of the whole, or an error is raised."""
    processor = PROCESSORS[name]
    chat = make_chat(processor)
    image_text = chat.marker if chat.marker == processor.image_token else f"{processor.image_token}{chat.marker}"
    try:
        prompt, answer_tokens = chat.segment("1", question.strip(), answer.strip())
    except InputError:
        return
    content = [{"type": "image"}, {"type": "text", "text": question.strip()}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]},
    ]
    whole = processor.apply_chat_template(messages).replace(processor.image_token, image_text, 1).rstrip()
    tokens = list(processor.tokenizer(whole).input_ids)
    if tokens[-1] not in chat.end_tokens:
        tokens.append(processor.tokenizer.eos_token_id)
    assert [*chat.prefix([image_text]), *prompt, *answer_tokens] == tokens


def test_a_question_with_the_token_of_an_image_is_refused() -> None:
    with pytest.raises(InputError, match=r"example q7: its text contains '<image>'"):
        make_chat(make_processor()).segment("q7", "What is <image>?", "no")


def test_a_template_that_puts_the_question_first_is_refused() -> None:
    template = (
        "{% for message in messages %}{% for part in message['content'] | reverse %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InputError, match="before the image"):
        make_chat(make_processor(template=template)).segment("1", "Is it?", "no")


def test_a_template_that_rewrites_answered_questions_is_refused() -> None:
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' Answer:' }}{% endif %}"
    )
    with pytest.raises(InputError, match="differently when it has an answer"):
        make_chat(make_processor(template=template)).segment("1", "Is it?", "no")


@pytest.mark.parametrize("answer", ["no", "<b>no</b>"])
def test_an_empty_thought_of_the_generation_prompt_is_before_the_answer_too(answer: str) -> None:
    end = "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}"
    thought = "{% if enable_thinking %}{{ 'now think' }}{% else %}{{ '<pad>' }}{% endif %}"
    assert end in VICUNA_TEMPLATE
    processor = make_processor(template=VICUNA_TEMPLATE.replace(end, end + thought))
    prompt, tokens = make_chat(processor).segment("1", "Is it?", answer)
    assert decode(processor, prompt).replace(" ", "") == "Isit?ASSISTANT:<pad>".replace("Isit", "\nIsit")
    assert decode(processor, tokens).replace(" ", "") == f"{answer}</s>"
    assert prompt == make_chat(processor).segment("1", "Is it?", None)[0]


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused() -> None:
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InputError, match="joins the end of the prompt"):
        make_chat(make_processor(template=template)).segment("1", "USE", "R: no")


def test_a_tokenizer_that_ends_every_text_is_refused() -> None:
    processor = make_processor()
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(InputError, match="add_eos_token"):
        make_chat(processor).prefix(["<image>"])


def test_a_processor_without_a_template_is_refused() -> None:
    processor = make_processor()
    processor.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        make_chat(processor)

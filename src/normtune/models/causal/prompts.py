"""Conversations in a model's own chat template, cut in two after the image.

The text up to and including the image is the prefix that all questions of an image share; the text after it
is a segment. Both are tokenised separately, and it is checked that together they are exactly the tokens of
the whole conversation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any, Protocol

from normtune.errors import InputError

# Example: LLaVA 1.5 with the question "Is it an MRI?" and the answer "yes".
#
#     conversation    <s>USER: <image>\nIs it an MRI? ASSISTANT: yes</s>
#     prefix          <s>USER: <image>                    the image token is repeated, once a feature
#     segment                         \nIs it an MRI? ASSISTANT:     the prompt
#                                                               yes</s>     the answer with its end token
#
# The cut is after the marker, the last special token of the image: <image> here, or the token that ends an
# image, as in Gemma 3 and InternVL. Tokenizers do not merge special tokens with their neighbours, so the two
# parts give the tokens of the whole.

TokenIds = tuple[int, ...]
Turns = Sequence[tuple[str, str]]  # questions with their answers
# Private characters around a control token in a user's text, which is then tokenised as plain text.
_ESCAPE, _UNESCAPE = "\ue000", "\ue001"
_ESCAPED = re.compile(f"{_ESCAPE}([^{_UNESCAPE}]*){_UNESCAPE}")
CACHED_PREFIXES = 1024  # prefixes that are kept, one for each list of image sizes


def template_options(processor: Any) -> dict[str, Any]:
    """Options of a chat template for answers without a thought, for models that can think (Qwen3.5, Gemma 4)."""
    # transformers warns about an option that the template does not read
    return {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}


class PromptFormat(Protocol):
    """How a family writes the shared prefix of a group, and its segments; see `ChatPrompt`."""

    @property
    def template(self) -> str: ...

    def prefix(self, images: Sequence[str]) -> TokenIds: ...

    def segment(self, id: str, question: str, answer: str | None, history: Turns = ()) -> tuple[TokenIds, TokenIds]: ...


class ChatPrompt:
    """Prefixes and segments in the chat template of a processor.

    Args:
        processor: has a `tokenizer`, a chat template, and `image_token`, which the template writes for an
            image and the processor replaces by the image's tokens.
        marker: the last special token of these.
        trailing: text that the processor writes after the marker.

    Raises:
        InputError: the processor has no chat template.
    """

    def __init__(self, processor: Any, marker: str, trailing: str, end_tokens: Sequence[int]) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.marker, self.trailing, self.end_tokens = marker, trailing, frozenset(end_tokens)
        self.marker_id: int = self.tokenizer.convert_tokens_to_ids(marker)
        self._prefixes: dict[tuple[str, ...], TokenIds] = {}
        if processor.chat_template is None:
            raise InputError(
                "the checkpoint has no chat template, so its prompts are unknown. "
                "Add the chat_template.jinja of the model's publisher to its directory."
            )
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted(
            {*special, *self.tokenizer.all_special_tokens} - {processor.image_token}, key=len, reverse=True
        )
        self._control = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._head = self._pieces(["?"], images=1)[0]  # the text before the image

    @property
    def template(self) -> str:
        """The prompt of a question about one image as text; see `Family.prompt_template`."""
        return str(self.processor.image_token).join(self._pieces(["{question}"], images=1))

    def prefix(self, images: Sequence[str]) -> TokenIds:
        """The tokens that all questions of a group share.

        Args:
            images: the texts that the processor writes for the images, such as "<image><image><image>".

        Raises:
            InputError: the tokenizer adds tokens at the end of a text.
        """
        key = tuple(images)
        if key not in self._prefixes:
            pieces = self._pieces(["?"], images=len(images))
            # the last piece is the text after the images, which belongs to the segments
            text = "".join(piece + image for piece, image in zip(pieces, images, strict=False))
            assert text.endswith(self.marker + self.trailing), "an image ends with its marker"
            tokens = self._tokens(text.removesuffix(self.trailing), start=True)
            if tokens[-1] != self.marker_id:
                raise InputError(
                    f"the tokenizer adds tokens at the end of a text (the last is {tokens[-1]}, not "
                    f"{self.marker}), so questions cannot share an image. Set add_eos_token to false in "
                    "tokenizer_config.json."
                )
            if len(self._prefixes) >= CACHED_PREFIXES:  # a server may receive images of any size
                self._prefixes.clear()
            self._prefixes[key] = tokens
        return self._prefixes[key]

    def segment(self, id: str, question: str, answer: str | None, history: Turns = ()) -> tuple[TokenIds, TokenIds]:
        """Tokenise a question and its answer.

        Args:
            id: the example's id, for error messages.
            answer: the answer; None if the model is to write it.
            history: the turns between the image and the question.

        Returns:
            (the prompt: all tokens between the image and the answer; the answer with its end token, or an
            empty tuple).

        Raises:
            InputError: the question contains the image token, or the template or the tokenizer does not
                allow the conversation to be cut.
        """
        turns = [self._escape(text) for turn in history for text in turn] + [self._escape(question)]
        open_text = self._after_image(id, turns)
        prompt = self._segment_tokens(id, open_text)
        if answer is None:
            return prompt, ()
        answered_text = self._with_empty_thought(open_text, self._after_image(id, [*turns, self._escape(answer)]))
        if not answered_text.startswith(open_text):
            raise InputError(
                f"example {id}: the chat template writes the question differently when it has an answer. "
                "Use a template in which an answered conversation begins with its generation prompt."
            )
        tokens = self._answer_tokens(prompt, self._segment_tokens(id, answered_text))
        if tokens is None:  # the template writes no end token, so it is added here
            tokens = self._answer_tokens(
                prompt, self._segment_tokens(id, answered_text.rstrip()), self.tokenizer.eos_token_id
            )
        if tokens is None:
            raise InputError(
                f"example {id}: the tokenizer joins the end of the prompt with the beginning of the answer, "
                "so the model would write other tokens for this answer. "
                "Begin the answer with a letter or a digit, or leave it out."
            )
        return prompt, tokens

    def _escape(self, text: str) -> str:
        """Mark the control tokens in a user's text, so that they stay text: they could end the user's turn."""
        return self._control.sub(lambda token: f"{_ESCAPE}{token[0]}{_UNESCAPE}", text)

    def _with_empty_thought(self, open_text: str, answered_text: str) -> str:
        """Put the empty thought at the end of a generation prompt before the answer, where a template leaves it out.

        The large Gemma 4 models: `<|turn>model\\n<|channel>thought\\n<channel|>` and `<|turn>model\\nyes<turn|>`.
        """
        pairs = enumerate(zip(open_text, answered_text, strict=False))
        difference = next((place for place, (first, second) in pairs if first != second), -1)
        for token in self._control.finditer(open_text):
            if token.start() <= difference < token.end():
                return open_text + answered_text[token.start() :]
        return answered_text

    def _answer_tokens(self, prompt: TokenIds, whole: TokenIds, end: int | None = None) -> TokenIds | None:
        """The answer's tokens, from the end of `prompt` in `whole` up to and including the end token.

        If `end` is given, it is appended. None if `whole` does not begin with `prompt`, or has no end token.
        """
        answer = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            return None
        if end is not None:
            return (*answer, end)
        for count, token in enumerate(answer, start=1):
            if token in self.end_tokens:
                return answer[:count]
        return None

    def _after_image(self, id: str, turns: Sequence[str]) -> str:
        """The conversation's text after the marker of its image; `turns` are questions and answers in turn."""
        try:
            head, rest = self._pieces(turns, images=1)
        except ValueError as error:
            raise InputError(
                f"example {id}: its text contains '{self.processor.image_token}', the image token. "
                "Remove it from the question and the answer."
            ) from error
        if head != self._head:
            raise InputError(
                f"example {id}: the chat template writes a part of the question before the image, so "
                "questions cannot share the image. Use a template that puts the image first."
            )
        return self.trailing + rest

    def _segment_tokens(self, id: str, text: str) -> TokenIds:
        """Tokens of a text that follows the marker; checks that the whole conversation has the same tokens there."""
        # The marker is tokenised with the text and then dropped, since some tokenizers write the beginning of
        # a text differently from its middle.
        tokens = self._tokens(self.marker + text)
        whole = self._tokens(self._head + self.marker + text, start=True)
        if tokens[0] != self.marker_id or whole != self._tokens(self._head, start=True) + tokens:
            raise InputError(
                f"example {id}: the tokenizer splits a conversation differently from its two parts, "
                f"so questions cannot share an image. Make '{self.marker}' a special token of the tokenizer."
            )
        return tokens[1:]

    def _pieces(self, turns: Sequence[str], *, images: int) -> list[str]:
        """The rendered conversation, split at its images: the text before each, and the rest."""
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in zip(cycle(("user", "assistant")), turns, strict=False)
        ]
        messages[0]["content"][:0] = [{"type": "image"}] * images
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=len(turns) % 2 == 1, **template_options(self.processor)
        )
        pieces = text.split(self.processor.image_token)
        if len(pieces) != images + 1:
            raise ValueError(f"{len(pieces) - 1} image tokens for {images} images")
        return pieces

    def _tokens(self, text: str, *, start: bool = False) -> TokenIds:
        """Tokenise a text; with `start` it begins a conversation and gets the first token if it lacks it."""
        # some templates write the first token themselves; it must not occur twice
        first = self.tokenizer.bos_token
        add = start and not (first is not None and text.startswith(first))
        if _ESCAPE not in text:
            return tuple(self.tokenizer(text, add_special_tokens=add).input_ids)
        tokens: list[int] = []
        for number, piece in enumerate(_ESCAPED.split(text)):  # odd pieces are control tokens of the user's text
            options = {"add_special_tokens": add and number == 0, "split_special_tokens": number % 2 == 1}
            tokens += self.tokenizer(piece, **options).input_ids if piece or number == 0 else []
        return tuple(tokens)

"""A question as its model's own chat template writes it, cut in two where the image ends.

What stands up to the image is the prefix that all questions of an image share; what follows is a segment. The
two are tokenised apart, and must give the very tokens that the whole conversation gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from normtune.errors import InputError

TokenIds = tuple[int, ...]
CACHED_PREFIXES = 1024


class PromptFormat(Protocol):
    """How a family writes questions: the shared prefix of a group, and its segments."""

    def prefix(self, images: Sequence[str]) -> TokenIds: ...

    def segment(self, id: str, question: str, answer: str | None) -> tuple[TokenIds, TokenIds]: ...


class ChatPrompt:
    """Prefixes and segments of one processor.

    Args:
        processor: with `tokenizer`, a chat template, and `image_token`, what the template writes of an image.
        marker: the special token that every image ends with once the processor has spread it out.
        trailing: text that the processor writes after the marker.
        ends: the tokens that end an answer.
    """

    def __init__(self, processor: Any, marker: str, trailing: str, ends: Sequence[int]) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.marker, self.trailing, self.ends = marker, trailing, frozenset(ends)
        self.marker_id: int = self.tokenizer.convert_tokens_to_ids(marker)
        self._prefixes: dict[tuple[str, ...], TokenIds] = {}
        if processor.chat_template is None:
            raise InputError(
                "the checkpoint has no chat template, so its prompts are unknown. "
                "Add the chat_template.jinja of the model's publisher to its directory."
            )
        self._head = self._pieces("?", None, images=1)[0]

    def prefix(self, images: Sequence[str]) -> TokenIds:
        """The tokens that all questions of a group share.

        `images[i]` is what the processor writes for image i.

        Raises:
            InputError: the tokenizer adds tokens after a text.
        """
        key = tuple(images)
        if key not in self._prefixes:
            pieces = self._pieces("?", None, images=len(images))
            text = "".join(piece + image for piece, image in zip(pieces, images, strict=False))
            assert text.endswith(self.marker + self.trailing), "an image ends with its marker"
            tokens = self._tokens(text.removesuffix(self.trailing), start=True)
            if tokens[-1] != self.marker_id:
                raise InputError(
                    f"the tokenizer adds tokens after a text (it ends with token {tokens[-1]}, not with "
                    f"{self.marker}), so questions cannot share an image. Set add_eos_token to false in "
                    "tokenizer_config.json."
                )
            if len(self._prefixes) >= CACHED_PREFIXES:  # a server sees images of ever new sizes
                self._prefixes.clear()
            self._prefixes[key] = tokens
        return self._prefixes[key]

    def segment(self, id: str, question: str, answer: str | None) -> tuple[TokenIds, TokenIds]:
        """(what follows the image up to where the model is to write, the answer with its end token).

        Raises:
            InputError: the question holds the image's own token, or the template or the tokenizer does not
                let the conversation be cut.
        """
        asked = self._after_image(id, question, None)
        prompt = self._segment_tokens(id, asked)
        if answer is None:
            return prompt, ()
        told = self._after_image(id, question, answer)
        if not told.startswith(asked):
            raise InputError(
                f"example {id}: the chat template writes the question otherwise once it is answered. "
                "Use a template whose conversations begin with their generation prompt."
            )
        tokens = self._written(prompt, self._segment_tokens(id, told))
        if tokens is None:  # the template leaves the end of the answer to whoever trains
            tokens = self._written(
                prompt, self._segment_tokens(id, told.rstrip()), self.tokenizer.eos_token_id
            )
        if tokens is None:
            raise InputError(
                f"example {id}: the tokenizer joins the end of the prompt with the beginning of the answer, "
                "so the answer's tokens are not those that the model would write. "
                "Begin the answer with a letter or a digit, or leave it out."
            )
        return prompt, tokens

    def _written(self, prompt: TokenIds, whole: TokenIds, end: int | None = None) -> TokenIds | None:
        """The answer's tokens up to its end token, `end` being put there where it is given."""
        answer = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            return None
        if end is not None:
            return (*answer, end)
        for count, token in enumerate(answer, start=1):
            if token in self.ends:
                return answer[:count]
        return None

    def _after_image(self, id: str, question: str, answer: str | None) -> str:
        """What the conversation says after its image."""
        try:
            head, rest = self._pieces(question, answer, images=1)
        except ValueError as error:
            raise InputError(
                f"example {id}: its text holds '{self.processor.image_token}', the token of an image. "
                "Take it out of the question and the answer."
            ) from error
        if head != self._head:
            raise InputError(
                f"example {id}: the chat template writes something of the question before the image, so "
                "questions cannot share it. Use a template that puts the image first."
            )
        return self.trailing + rest

    def _segment_tokens(self, id: str, text: str) -> TokenIds:
        """Tokens of a text that follows the marker, checked to be those of the whole conversation."""
        tokens = self._tokens(self.marker + text)
        whole = self._tokens(self._head + self.marker + text, start=True)
        if tokens[0] != self.marker_id or whole != self._tokens(self._head, start=True) + tokens:
            raise InputError(
                f"example {id}: the tokenizer gives other tokens for a conversation than for its parts, "
                f"so questions cannot share an image. Make '{self.marker}' a special token of the tokenizer."
            )
        return tokens[1:]

    def _pieces(self, question: str, answer: str | None, *, images: int) -> list[str]:
        """The rendered conversation without its images: one piece before each, and the rest.

        Raises:
            ValueError: it holds more image tokens than images.
        """
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None
        )
        pieces = text.split(self.processor.image_token)
        if len(pieces) != images + 1:
            raise ValueError(f"{len(pieces) - 1} image tokens for {images} images")
        return pieces

    def _tokens(self, text: str, *, start: bool = False) -> TokenIds:
        """With `start` the text begins a conversation: it gets the first token if it lacks it."""
        first = self.tokenizer.bos_token
        add = start and not (first is not None and text.startswith(first))
        return tuple(self.tokenizer(text, add_special_tokens=add).input_ids)

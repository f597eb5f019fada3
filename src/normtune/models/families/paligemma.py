"""PaliGemma: a prefix language model, in which image tokens attend to the question (arXiv 2407.07726).

The hidden states of an image therefore differ from question to question. Only the output of the vision tower
and the projector is shared; every question has its own sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from normtune.data.groups import Group, Segment
from normtune.data.records import History
from normtune.models.causal.family import CausalFamily
from normtune.models.causal.prompts import TokenIds
from normtune.models.causal.shared_prefix import PAD, PREFIX, SharedSequence
from normtune.models.types import Batch, Pixels


class PrefixAndSuffix:
    """The format of PaliGemma's processor: images, first token, question, newline; then the answer."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = processor.tokenizer

    @property
    def template(self) -> str:
        """See `Family.prompt_template`; the image's tokens come first."""
        return f"{self.tokenizer.bos_token}{{question}}\n"

    def prefix(self, images: Sequence[str]) -> TokenIds:
        """The tokens before the question, which are the images' tokens only."""
        return tuple(self.tokenizer("".join(images), add_special_tokens=False).input_ids)

    def segment(
        self, id: str, question: str, answer: str | None, history: Sequence[tuple[str, str]] = ()
    ) -> tuple[TokenIds, TokenIds]:
        """See `ChatPrompt.segment`."""
        prompt = (self.tokenizer.bos_token_id, *self._tokens(f"{question}\n"))
        return prompt, () if answer is None else (*self._tokens(answer), self.tokenizer.eos_token_id)

    def _tokens(self, text: str) -> TokenIds:
        # split_special_tokens: a control token in a user's text is plain text
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


class PaliGemmaFamily(CausalFamily):
    """PaliGemma 1 and 2: image and question see each other both ways, the answer sees both and its own past.

    PaliGemma 2's language model caps the logits of attention and of tokens, and half of its layers attend
    within a window (Gemma 2, arXiv 2408.00118). SDPA has no cap, so transformers' eager attention is used.
    """

    shares_prefix = False
    whole_blocks = True
    caps_logits = True

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__(model, processor)
        if getattr(self.config.get_text_config(), "attn_logit_softcapping", None) is not None:
            self.decoder.set_attn_implementation("eager")

    def frozen_trunk(self, trained: Collection[nn.Parameter]) -> None:
        """None: an image's states differ from question to question, so none are cached."""

    def tokenize_whole(self, id: str, question: str, answer: str | None, history: History = ()) -> Segment:
        self.refuse_history(id, history)
        return super().tokenize_whole(id, question, answer)

    def prompt_format(self) -> PrefixAndSuffix:
        return PrefixAndSuffix(self.processor)

    def image_text(self, pixels: Pixels) -> str:
        return self.processor.image_token * self.processor.image_seq_length

    def group_prefixes(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]
    ) -> tuple[list[Group], list[TokenIds], list[Sequence[Pixels]]]:
        """Make one group for each question. Its prefix is image and question, its segment the answer.

        The new groups of an image have the same pixels object, so that the vision tower runs once.
        """
        single_groups: list[Group] = []
        prefixes: list[TokenIds] = []
        images: list[Sequence[Pixels]] = []
        for group, group_images in zip(groups, pixels, strict=True):
            start = self.prompts.prefix([self.image_text(image) for image in group_images])
            for segment in group.segments:
                single_groups.append(Group(group.images, (Segment(segment.id, (), segment.answer),)))
                prefixes.append(start + segment.prompt)
                images.append(group_images)
        return single_groups, prefixes, images

    def bidirectional_blocks(self, batch: Batch) -> Tensor:
        """The prefix (image and question) of each group is one block."""
        return batch["group_of"].where(batch["segment_of"] == PREFIX, PAD)

    def positions(
        self, sequence: SharedSequence, prefixes: Sequence[TokenIds], pixels: Sequence[Sequence[Pixels]]
    ) -> Tensor:
        """PaliGemma counts positions from 1."""
        return sequence.position_ids + 1

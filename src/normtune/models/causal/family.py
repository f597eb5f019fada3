"""Decoder-only families: image features stand among the tokens of a causal language model.

A group is one sequence whose segments see its image and themselves (`normtune.models.causal.shared_prefix`), so that an image
is computed once for all its questions, in training, scoring and answering alike. A family says how its
images become tokens and features, and whatever is its own in masks and positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from normtune.data import tasks
from normtune.data.groups import Group, Segment
from normtune.errors import InputError
from normtune.models.answer_loss import Head
from normtune.models.causal.attention import BLOCK, Backend, additive, takes_blocks, use_shared_attention
from normtune.models.causal.decoding import Masks, SharedCacheDecoder, Windows
from normtune.models.causal.frozen_layers import causal_trunk
from normtune.models.causal.prompts import ChatPrompt, PromptFormat, TokenIds
from normtune.models.causal.shared_prefix import (
    PREFIX,
    Rows,
    SharedSequence,
    block_mask,
    dense_mask,
    shared_sequence,
)
from normtune.models.family import Family
from normtune.models.frozen_trunk import TRUNK_DEPTH, TRUNK_STATES, FrozenTrunk, skip_layers
from normtune.models.generation import Generated, OnTokens, generate
from normtune.models.quantization import loading_options
from normtune.models.types import Answer, AnswerStates, Batch, Pixels

FULL, SLIDING = "full_attention", "sliding_attention"
FEATURES = "features"  # what `seen` calls the features of an image; names of further ones begin with it
ONE_KIND = ""  # the name of the only kind of attention layer, where masks are no dict


class CausalFamily(Family):
    """What decoder-only families share.

    Attributes:
        rows: how groups are laid out, one a row ("pad") or all in one row ("pack").
        attention: masks as tensors ("dense"), or as FlexAttention's blocks ("block"); "auto": blocks on CUDA
            where rows are long.
        ends: the tokens that end an answer.
    """

    model: Any
    config: Any
    image_layers: int = 0  # how many of the first layers take image features besides their input
    whole_blocks: ClassVar[bool] = False  # whether the tokens of a block see each other past a window
    image_options: ClassVar[dict[str, Any]] = {}  # for the image processor
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)  # what is kept of its results

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__(model, processor)
        self.config = self.model.config
        self.rows: Rows = "pad"
        self.attention: Backend = "auto"
        use_shared_attention(self.decoder)
        tokenizer = processor.tokenizer
        self.ends = _end_tokens(model, tokenizer)
        self.pad_id: int = self.ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.image_token_id: int = self.config.image_token_id
        self.windows = _windows(self.config.get_text_config())
        self.prompts = self.prompt_format()
        parameters = inspect.signature(self.decoder.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"  # before 5.24

    @classmethod
    def load(
        cls,
        source: str | Path,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        *,
        quantization: Any = None,
    ) -> Self:
        """Load a checkpoint of transformers' layout."""
        model: Any = AutoModelForImageTextToText.from_pretrained(
            str(source), dtype=dtype, **loading_options(quantization, device)
        )
        model = model.to(device) if quantization is None else model
        return cls(model.eval(), cls.load_processor(str(source), model.config.model_type))

    @classmethod
    def load_processor(cls, source: str, model_type: str) -> Any:
        return AutoProcessor.from_pretrained(source)

    # --- what a family may say otherwise --------------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return self.model.model.language_model

    @property
    def head(self) -> Head:
        """Hidden states [N, width] to logits [N, vocabulary]."""
        head: Head = self.model.lm_head
        return head

    @property
    def image_end(self) -> tuple[str, str]:
        """The last special token of an image as the processor writes it, and the text that follows it."""
        return self.processor.image_token, ""

    def prompt_format(self) -> PromptFormat:
        """How questions are written."""
        return ChatPrompt(self.processor, *self.image_end, self.ends)

    def group_prefixes(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]
    ) -> tuple[Sequence[Group], list[TokenIds], Sequence[Sequence[Pixels]]]:
        """Groups as they share their prefixes: (groups, the prefix of each, the images of each)."""
        texts = [[self.image_text(image) for image in images] for images in pixels]
        return groups, [self.prompts.prefix(images) for images in texts], pixels

    def bidirectional_blocks(self, batch: Batch) -> Tensor | None:
        """[B, S] long, the block of each token, -1 for none; tokens of a block see each other both ways."""
        return None

    def image_text(self, pixels: Pixels) -> str:
        """What the processor writes for one image, its tokens spread out."""
        return self.processor.replace_image_token({name: value[None] for name, value in pixels.items()}, 0)

    def image_inputs(self, images: Sequence[Pixels]) -> dict[str, Tensor]:
        """Several images as the arguments of the model's `get_image_features`."""
        return {name: torch.stack([image[name] for image in images]) for name in images[0]}

    def positions(
        self, sequence: SharedSequence, prefixes: Sequence[TokenIds], pixels: Sequence[Sequence[Pixels]]
    ) -> Tensor:
        """Rotary positions of the tokens: [B, S], or [axes, B, S]."""
        return sequence.position_ids

    def step_positions(self, positions: Tensor) -> Tensor:
        """The same of answer tokens: [B, Q] -> [B, Q], or [axes, B, Q]."""
        return positions

    def features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """The image encoder and connector: `FEATURES` [image tokens of all images, width], and what else the
        decoder is given of each image token."""
        found = self.model.model.get_image_features(**images, return_dict=True)
        return {FEATURES: joined(found.pooler_output)}

    def input_embeddings(self, batch: Batch, features: dict[str, Tensor]) -> dict[str, Any]:
        """The decoder's arguments that hold what is seen and read: `inputs_embeds` [B, S, width] and more."""
        image = batch["input_ids"] == self.image_token_id
        embeds = self.decoder.get_input_embeddings()(batch["input_ids"].masked_fill(image, 0))
        return {"inputs_embeds": embeds.masked_scatter(image[..., None], features[FEATURES].to(embeds.dtype))}

    # --- images and questions to tensors --------------------------------------------------------------------

    def preprocess_image(self, image: Image.Image) -> Pixels:
        """One image as its processor prepares it, without the batch axis."""
        prepared = self.processor.image_processor([image], return_tensors="pt", **self.image_options)
        return {name: prepared[name][0] for name in self.image_keys}

    @torch.no_grad()
    def encode_image(self, pixels: Pixels) -> Pixels:
        """The features of one image, on the CPU, and what of its pixels tells how it is written."""
        found = self.features(send_to_device(self.image_inputs([pixels]), self.device))
        return {name: value for name, value in pixels.items() if not name.startswith("pixel")} | {
            name: value.cpu() for name, value in found.items()
        }

    def without_features(self, pixels: Pixels) -> Pixels:
        """What of `seen` tells how an image is written: its features keep their number, and no width."""
        return {name: value[:, :0] if name.startswith(FEATURES) else value for name, value in pixels.items()}

    def frozen_trunk(self, trained: Collection[nn.Parameter]) -> FrozenTrunk | None:
        return causal_trunk(self, trained, image_layers=self.image_layers)

    def prefix_tokens(self, images: Sequence[Pixels]) -> int:
        return len(self.prompts.prefix([self.image_text(image) for image in images]))

    def tokenize(self, id: str, question: str, answer: str | None, *, report: bool = False) -> Segment:
        """The family's own chat template; no question: the report prompt."""
        prompt, tokens = self.prompts.segment(
            id, question.strip() or tasks.REPORT_PROMPT, None if answer is None else answer.strip()
        )
        limit = tasks.MAX_REPORT_REFERENCE_TOKENS if report else tasks.MAX_ANSWER_REFERENCE_TOKENS
        return Segment(id, prompt, tokens if len(tokens) <= limit else (*tokens[: limit - 1], tokens[-1]))

    def collate(self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]) -> Batch:
        """Keys: those of `layout`, and

        labels [N] long, the answer tokens; answer_rows [N] long, the rows of the flattened hidden states that
        predict them; segment_index [N] long, their segments; pairs int, the number of segments.
        """
        batch, sequence, _ = self.layout(groups, pixels, self.rows)
        return batch | {
            "labels": sequence.labels,
            "answer_rows": sequence.answer_rows,
            "segment_index": sequence.segment_index,
            "pairs": sequence.segments,
        }

    def layout(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], rows: Rows
    ) -> tuple[Batch, SharedSequence, Sequence[Group]]:
        """(batch, sequence, groups as arranged). Keys of the batch, for B rows of S tokens:

        input_ids, group_of, segment_of [B, S] long; place_ids [B, S] long, the tokens that precede each in
        its own conversation; position_ids [B, S] or [axes, B, S] long; images: the model's image arguments,
        or the features as `features` gives them; feature_rows [image tokens] long where an image stands in
        several groups, else None.
        """
        groups, prefixes, pixels = self.group_prefixes(groups, pixels)
        sequence = shared_sequence(groups, prefixes, self.pad_id, rows=rows)
        if self._takes_blocks(sequence.input_ids):
            sequence = shared_sequence(groups, prefixes, self.pad_id, rows=rows, multiple_of=BLOCK)
        distinct = list({id(image): image for image in chain.from_iterable(pixels)}.values())
        batch: Batch = {
            "input_ids": sequence.input_ids,
            "group_of": sequence.group_of,
            "segment_of": sequence.segment_of,
            "place_ids": sequence.position_ids,
            "position_ids": self.positions(sequence, prefixes, pixels),
            "images": _features_of(distinct) or self.image_inputs(distinct),
            "feature_rows": self._feature_rows(distinct, pixels),
        }
        return batch, sequence, groups

    def _feature_rows(self, distinct: Sequence[Pixels], pixels: Sequence[Sequence[Pixels]]) -> Tensor | None:
        """Which feature each image token takes, where an image that is computed once stands several times."""
        shown = [id(image) for image in chain.from_iterable(pixels)]
        if len(shown) == len(distinct):
            return None
        token = self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
        counts = [self.image_text(image).count(token) for image in distinct]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        place = {id(image): i for i, image in enumerate(distinct)}
        return torch.cat([torch.arange(counts[place[i]]) + starts[place[i]] for i in shown])

    # --- the forward pass -----------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        size: int = self.config.get_text_config().vocab_size
        return size

    def answer_states(self, batch: Batch) -> AnswerStates:
        """See `Family.answer_states`."""
        states = self.hidden_states(batch, use_cache=False).flatten(0, 1)
        found = states.index_select(0, batch["answer_rows"])
        return AnswerStates(found, batch["labels"], batch["segment_index"])

    def text_segments(self, batch: Batch) -> Tensor:
        """[B], or [S] where all groups stand in one row; padding belongs to the first group."""
        group_of = batch["group_of"]
        of_answers = group_of.flatten().index_select(0, batch["answer_rows"])
        of_group = batch["segment_index"].new_zeros(int(group_of.max()) + 1)
        of_group[of_answers] = batch["segment_index"]
        units = group_of[0] if len(group_of) == 1 else group_of[:, 0]
        return of_group[units.clamp(min=0)]

    def _logits(self, states: Tensor) -> Tensor:
        return self.head(states).float()

    def hidden_states(self, batch: Batch, **options: Any) -> Tensor:
        """Hidden states [B, S, width] of a laid-out batch."""
        if TRUNK_STATES in batch:  # the first layers are done, see `Family.below`
            arguments = {"inputs_embeds": batch[TRUNK_STATES]}
        else:
            arguments = self.input_embeddings(batch, self._features(batch))
        masks = self._masks(batch, arguments["inputs_embeds"].dtype)
        with skip_layers(self.decoder, range(batch.get(TRUNK_DEPTH, 0))):
            return self.decoder(
                **arguments, attention_mask=masks, position_ids=batch["position_ids"], **options
            ).last_hidden_state

    def _masks(self, batch: Batch, dtype: torch.dtype) -> Any:
        """Who sees whom, as the decoder takes it for states of `dtype`."""
        blocks = self.bidirectional_blocks(batch)
        makes = block_mask if self._takes_blocks(batch["input_ids"]) else dense_mask
        masks: dict[str, Any] = {
            kind: makes(
                batch["group_of"],
                batch["segment_of"],
                image_block=blocks,
                position_ids=batch["place_ids"],
                window=window,
                whole_blocks=self.whole_blocks,
            )
            for kind, window in self.windows.items()
        }
        return _as_argument(masks if makes is block_mask else additive(masks, self.decoder, dtype))

    def _takes_blocks(self, input_ids: Tensor) -> bool:
        """Whether these rows are attended under block masks; lengths are multiples of 128 there."""
        return takes_blocks(self.attention, input_ids.shape[1], self.device, self.decoder)

    def _features(self, batch: Batch) -> dict[str, Tensor]:
        """One row an image token; autograd keeps nothing of a tower in which nothing is trained."""
        images, rows = batch["images"], batch["feature_rows"]
        found = images if FEATURES in images else self.features(images)
        return found if rows is None else {name: one.index_select(0, rows) for name, one in found.items()}

    # --- answers --------------------------------------------------------------------------------------------

    def generate_answers(
        self,
        groups: Sequence[Group],
        pixels: Sequence[Sequence[Pixels]],
        *,
        max_new_tokens: int = 16,
        beams: int = 1,
        on_tokens: OnTokens | None = None,
    ) -> list[list[Answer]]:
        """See `Family.answer`; all questions of all groups are one batch."""
        found = self.generate_tokens(
            groups, pixels, max_new_tokens=max_new_tokens, beams=beams, on_tokens=on_tokens
        )
        return self._as_answers(groups, found)

    @torch.inference_mode()
    def generate_tokens(
        self,
        groups: Sequence[Group],
        pixels: Sequence[Sequence[Pixels]],
        *,
        max_new_tokens: int,
        beams: int,
        on_tokens: OnTokens | None = None,
    ) -> list[Generated]:
        """The tokens of each answer, one a segment in the order given."""
        laid, _, groups = self.layout(groups, pixels, "pad")
        batch: Batch = send_to_device(laid, self.device)
        cache = DynamicCache()  # every layer keeps all columns: masks measure windows in places
        states = self.hidden_states(batch, use_cache=True, **{self._cache_argument: cache})
        branches, last = self._branches(batch, groups, cache)
        return generate(
            self._logits(states[branches.row, last]),
            branches.step,
            end=self.ends,
            max_new_tokens=max_new_tokens,
            beams=beams,
            on_tokens=on_tokens,
        )

    def _branches(
        self, batch: Batch, groups: Sequence[Group], cache: Any
    ) -> tuple[SharedCacheDecoder, Tensor]:
        """One branch a segment, and the column of each segment's last token [segments]."""
        segments = [segment for group in groups for segment in group.segments]
        assert not any(segment.answer for segment in segments), "segments end where the model is to write"
        sizes = [len(group.segments) for group in groups]
        row = torch.arange(len(groups)).repeat_interleave(torch.tensor(sizes)).to(self.device)
        number = torch.cat([torch.arange(size) for size in sizes]).to(self.device) + PREFIX + 1
        segment_of = batch["segment_of"][row]  # [segments, S]
        visible = (segment_of == PREFIX) | (segment_of == number[:, None])
        last = (visible * torch.arange(visible.shape[1], device=visible.device)).argmax(1)
        rotary = batch["position_ids"]
        rotary = rotary if rotary.ndim == 2 else rotary[0]  # text has one position on all axes

        def decode(input_ids: Tensor, position_ids: Tensor, masks: Masks) -> Tensor:
            embeds = self.decoder.get_input_embeddings()(input_ids)
            states = self.decoder(
                inputs_embeds=embeds,
                attention_mask=_as_argument(additive(masks, self.decoder, embeds.dtype)),
                position_ids=self.step_positions(position_ids),
                use_cache=True,
                **{self._cache_argument: cache},
            ).last_hidden_state
            return self._logits(states)

        branches = SharedCacheDecoder(
            cache,
            decode,
            self.windows,
            visible=visible,
            row=row,
            position=rotary[row, last] + 1,
            token_index=batch["place_ids"][row, last] + 1,
            column_token_index=batch["place_ids"],
            on_select=None if self.active_text_rows is None else self.active_text_rows.select,
        )
        return branches, last


def joined(features: Tensor | Sequence[Tensor]) -> Tensor:
    """Features of images, a tensor with or without an axis of images or one an image -> [tokens, width]."""
    whole = features if isinstance(features, Tensor) else torch.cat([*features])
    return whole.flatten(0, -2)


def _features_of(images: Sequence[Pixels]) -> dict[str, Tensor]:
    """Those of images that `seen` has computed; empty where they are to be computed yet."""
    names = [name for name in images[0] if name.startswith(FEATURES)]
    return {name: torch.cat([image[name] for image in images]) for name in names}


def _as_argument(masks: dict[str, Any]) -> Any:
    """Transformers takes a dict of masks where the kinds of layers differ, else the mask itself."""
    return masks.get(ONE_KIND, masks)


def _windows(config: Any) -> Windows:
    """The kinds of attention layers of a language model, each with its window.

    Raises:
        InputError: it has layers that no mask can steer.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {FULL, SLIDING}:
        raise InputError(
            f"the language model has layers of kind {', '.join(sorted(kinds - {FULL, SLIDING}))}, through "
            "which questions of one image would see each other. Choose a model of attention layers alone."
        )
    if SLIDING in kinds:
        return {FULL: None, SLIDING: config.sliding_window}
    return {ONE_KIND: None if kinds else getattr(config, "sliding_window", None)}


def _end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Those of the generation config, as transformers' `generate` takes them, or else the tokenizer's."""
    found = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)

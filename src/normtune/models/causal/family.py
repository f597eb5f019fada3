"""Decoder-only families: image features replace image tokens in the input of a causal language model.

An image and its questions form one sequence (`normtune.models.causal.shared_prefix`), so that the image is
computed once for all its questions, in training, scoring and generation alike. `CausalFamily` does all this;
a subclass in `models/families/` defines how its images become tokens and features, and what is special about
its masks and positions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from normtune.data import tasks
from normtune.data.groups import Group, Segment
from normtune.data.records import History
from normtune.models.answer_loss import Head
from normtune.models.causal.answering import generate_tokens
from normtune.models.causal.attention import (
    BLOCK_SIZE,
    Backend,
    additive_masks,
    attention_windows,
    mask_argument,
    use_shared_attention,
    uses_block_masks,
)
from normtune.models.causal.checkpoint_settings import active_settings, end_tokens
from normtune.models.causal.decoding import ColumnCache
from normtune.models.causal.frozen_layers import causal_trunk
from normtune.models.causal.image_features import (
    FEATURES,
    distinct_images,
    encoded_features,
    feature_rows,
    flatten_features,
)
from normtune.models.causal.prompts import ChatPrompt, PromptFormat, TokenIds
from normtune.models.causal.recurrent import PASSES, RunTree, recurrent_kinds, run_passes, use_run_passes
from normtune.models.causal.shared_prefix import (
    RowLayout,
    SharedSequence,
    block_mask,
    dense_mask,
    mask_tokens,
    shared_sequence,
)
from normtune.models.causal.step_graph import StepGraph
from normtune.models.family import Family
from normtune.models.frozen_trunk import TRUNK_DEPTH, TRUNK_STATES, FrozenTrunk, skip_layers
from normtune.models.generation import Generated
from normtune.models.processors import load_processor
from normtune.models.types import AnswerStates, Batch, Pixels

# The forward pass, with B rows of S tokens, W the language model's width and N answer tokens:
#
#     collate          images, questions, answers -> batch: input_ids [B, S] and what the masks need
#     features         pixels                     -> [image tokens of all images, W], tower and connector
#     input_embeddings input_ids, features        -> [B, S, W], features in place of the image tokens
#     _masks           group_of, segment_of       -> [B, 1, S, S], who sees whom
#     hidden_states    embeddings, masks          -> [B, S, W], all layers of the language model
#     answer_states    [B * S, W], answer_rows    -> [N, W], the rows that predict an answer token
#     head             [N, W]                     -> logits [N, vocabulary], in chunks (`answer_loss`)
#
# Generation runs the same pass over the prompts with a key-value cache, then one token an answer in each step
# (`normtune.models.causal.answering`).


class CausalFamily(Family):
    """The base class of decoder-only families.

    Attributes:
        rows: how groups are laid out, one a row ("pad") or all in one row ("pack").
        attention: masks as tensors ("dense"), or as FlexAttention's block masks ("block"); "auto": block
            masks on CUDA where rows are long.
        end_tokens: the tokens that end an answer.
        windows: the kinds of attention layers, each with the number of positions it sees.
        recurrent: the kinds of layers that carry a state from token to token.
        prompts: how questions are written and tokenised.
        step_graph: captures and replays decoding steps on CUDA.
    """

    model_class = AutoModelForImageTextToText
    model: Any
    config: Any
    processor_class: ClassVar[Any] = None  # of a processor that is loaded without its video part; None: transformers'
    image_processor_class: ClassVar[Any] = None  # in place of the processor's own; needs `processor_class`
    image_end_token: ClassVar[str] = "image_token"  # the processor's attribute with the last special token of an image
    image_layers: int = 0  # how many of the first layers read image features besides their input (Qwen3-VL)
    caps_logits: ClassVar[bool] = False  # whether logits are limited to (-cap, cap) where the config has a cap
    whole_blocks: ClassVar[bool] = False  # whether the tokens of a block see each other past a window
    block_kinds: ClassVar[Collection[str] | None] = None  # kinds of layers with such blocks; None: all
    fixed_layers: Sequence[int] = ()  # layers that take keys and values from images only (cross-attention)
    image_options: ClassVar[dict[str, Any]] = {}  # arguments of the image processor
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)  # the image processor's results that are used
    # how `image_inputs` batches the values of images: joined along their first axis (tiles, patches), or not at all;
    # all others are stacked
    concatenated_keys: ClassVar[Collection[str]] = ()
    unbatched_keys: ClassVar[Collection[str]] = ()

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__(model, processor)
        self.config = self.model.config
        self.rows: RowLayout = "pad"
        self.step_graph = StepGraph()
        self.attention: Backend = "auto"
        use_shared_attention(self.decoder)
        self.recurrent = recurrent_kinds(self.config.get_text_config())
        if self.recurrent:
            use_run_passes(self.decoder)
        tokenizer = processor.tokenizer
        self.end_tokens = end_tokens(model, tokenizer)
        self.pad_id: int = self.end_tokens[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.image_token_id: int = self.config.image_token_id
        self.windows = attention_windows(self.config.get_text_config())
        self.prompts = self.prompt_format()

    @classmethod
    def load_processor(cls, source: str, model_type: str) -> Any:
        return load_processor(source, cls.processor_class, cls.image_processor_class)

    # --- what a family may override -------------------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return self.model.model.language_model

    @property
    def head(self) -> Head:
        """The language model's head: hidden states [N, width] -> logits [N, vocabulary]."""
        head: Head = self.model.lm_head
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None) if self.caps_logits else None
        return head if cap is None else lambda states: cap * torch.tanh(head(states) / cap)

    @property
    def image_end(self) -> tuple[str, str]:
        """The last special token of an image as the processor writes it, and the text that follows it.

        Conversations are cut after this token: see `normtune.models.causal.prompts`.
        """
        return getattr(self.processor, self.image_end_token), ""

    @property
    def prompt_template(self) -> str:
        return self.prompts.template

    def prompt_format(self) -> PromptFormat:
        """How questions are written and tokenised; by default with the model's chat template."""
        return ChatPrompt(self.processor, *self.image_end, self.end_tokens)

    def group_prefixes(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]
    ) -> tuple[Sequence[Group], list[TokenIds], Sequence[Sequence[Pixels]]]:
        """Decide what groups share: (groups, the prefix tokens of each, the images of each).

        PaliGemma returns one group for each question, since its questions cannot share a prefix.
        """
        texts = [[self.image_text(image) for image in images] for images in pixels]
        return groups, [self.prompts.prefix(images) for images in texts], pixels

    def bidirectional_blocks(self, batch: Batch) -> Tensor | None:
        """[B, S] long, the block of each token, -1 for none; tokens of a block see each other both ways.

        None means that all attention is causal.
        """
        return None

    def image_text(self, pixels: Pixels) -> str:
        """The text that the processor writes for one image: its special tokens, one image token a feature."""
        values = {name: value[None] for name, value in pixels.items()}
        # LLaVA's processor reads the size by NumPy, which has no bf16
        values |= {name: value.float() for name, value in values.items() if value.dtype == torch.bfloat16}
        return self.processor.replace_image_token(values, 0)

    def image_inputs(self, images: Sequence[Pixels]) -> dict[str, Tensor]:
        """Batch images as the arguments of the model's `get_image_features`.

        For example, images of 2 and 3 tiles give pixel_values [5, 3, height, width] if this key is concatenated.
        """
        batch = {}
        for name in images[0]:
            if name not in self.unbatched_keys:
                join = torch.cat if name in self.concatenated_keys else torch.stack
                batch[name] = join([image[name] for image in images])
        return batch

    def positions(
        self, sequence: SharedSequence, prefixes: Sequence[TokenIds], pixels: Sequence[Sequence[Pixels]]
    ) -> Tensor:
        """Rotary positions of the tokens of a layout: [B, S], or [axes, B, S] with M-RoPE."""
        return sequence.position_ids

    def step_positions(self, positions: Tensor) -> Tensor:
        """Rotary positions of generated tokens: [B, Q] -> [B, Q], or [axes, B, Q] with M-RoPE."""
        return positions

    def features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the image encoder and the connector.

        Args:
            images: the result of `image_inputs`.

        Returns:
            `FEATURES` [image tokens of all images, width], and any other states that the language model
            takes for each image token.
        """
        output = self.model.model.get_image_features(**images, return_dict=True)
        return {FEATURES: flatten_features(output.pooler_output)}

    def token_arguments(self, input_ids: Tensor, cache: ColumnCache | None = None) -> dict[str, Any]:
        """The decoder's arguments for tokens of text.

        Args:
            input_ids: [B, Q] long.
            cache: the cache of the tokens before them, in a step of generation.

        Returns:
            `inputs_embeds` [B, Q, width], and others in some families.
        """
        return {"inputs_embeds": self.decoder.get_input_embeddings()(input_ids)}

    def input_embeddings(self, batch: Batch, features: dict[str, Tensor]) -> dict[str, Any]:
        """The decoder's arguments: `inputs_embeds` [B, S, width] of tokens and features; others in some families."""
        image = batch["input_ids"] == self.image_token_id  # [B, S]
        # the image token's id may be past the end of the embedding, hence a token in its place
        text_config = self.config.get_text_config()
        arguments = self.token_arguments(batch["input_ids"].masked_fill(image, text_config.pad_token_id or 0))
        embeds = arguments["inputs_embeds"]
        # Features fill the image tokens in reading order: row by row, from left to right. Their places are counted on
        # the host: with a mask in their place, the backward pass would wait for the device.
        places = batch["image_places"].unbind(1)
        return arguments | {"inputs_embeds": embeds.index_put(places, features[FEATURES].to(embeds.dtype))}

    # --- images and questions to tensors --------------------------------------------------------------------

    def preprocess_image(self, image: Image.Image) -> Pixels:
        """One image as the image processor prepares it, without the batch axis."""
        prepared = self.processor.image_processor([image], return_tensors="pt", **self.image_options)
        return {name: prepared[name][0] for name in self.image_keys}

    @torch.no_grad()
    def encode_images(self, images: Sequence[Pixels]) -> list[Pixels]:
        """The features of each image, and its other values (sizes, numbers of tiles).

        `image_text` and `positions` need the latter; only the pixels themselves are replaced.
        """
        features = self.features(send_to_device(self.image_inputs(images), self.device))
        encoded = [{name: value for name, value in image.items() if not name.startswith("pixel")} for image in images]
        for name, values in features.items():  # [image tokens of all images, width]
            for image, part in zip(encoded, values.cpu().split(self._image_tokens(images)), strict=True):
                image[name] = part.clone()  # a view would keep all images of the pass in memory
        return encoded

    def _image_tokens(self, images: Sequence[Pixels]) -> list[int]:
        """The number of image tokens, and so of features, of each image."""
        token = self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
        return [self.image_text(image).count(token) for image in images]

    def without_features(self, pixels: Pixels) -> Pixels:
        """An encoded image without its features' values: they become [image tokens, 0].

        A frozen trunk stores these: the number of image tokens is still known, but no memory is used.
        """
        return {name: value[:, :0] if name.startswith(FEATURES) else value for name, value in pixels.items()}

    def frozen_trunk(self, trained: Collection[nn.Parameter]) -> FrozenTrunk | None:
        return causal_trunk(self, trained)

    def prefix_tokens(self, images: Sequence[Pixels]) -> int:
        return len(self.prompts.prefix([self.image_text(image) for image in images]))

    def tokenize_whole(self, id: str, question: str, answer: str | None, history: History = ()) -> Segment:
        """Tokenise with the family's chat template; an empty question is replaced by the report prompt."""
        turns = [*history, (question, "" if answer is None else answer)]
        *earlier, (question, last) = [(first.strip() or tasks.REPORT_PROMPT, second.strip()) for first, second in turns]
        prompt, tokens = self.prompts.segment(id, question, None if answer is None else last, earlier)
        return Segment(id, prompt, tokens)

    def collate(self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]) -> Batch:
        """See `Family.collate`.

        Returns:
            The batch of `layout`, and

            - labels [N] long, the answer tokens;
            - answer_rows [N] long, the rows of the flattened hidden states that predict them;
            - segment_index [N] long, their segments;
            - pairs int, the number of segments.
        """
        batch, sequence, _ = self.layout(groups, pixels, self.rows)
        return batch | sequence.targets()

    def layout(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], rows: RowLayout, *, keep_states: bool = False
    ) -> tuple[Batch, SharedSequence, Sequence[Group]]:
        """Lay groups and their images out as a batch.

        Args:
            groups, pixels: as for `collate`.
            rows: a row for each group, or one for all; see `RowLayout`.
            keep_states: recurrent layers keep the states after all segments, for answers; see `run_passes`.

        Returns:
            (batch, the shared sequence, the groups after `group_prefixes`). Keys of the batch, for B rows of
            S tokens:

            - input_ids, group_of, segment_of, segment_end [B, S] long, as in `SharedSequence`;
            - token_index [B, S] long, the number of tokens before each in its own conversation;
            - position_ids [B, S] or [axes, B, S] long, the rotary positions;
            - image_places [image tokens, 2] long, the row and column of each image token;
            - images: the result of `image_inputs`, or of `features` where images are encoded already;
            - feature_rows [image tokens] long if an image is in several groups, else None;
            - passes: with recurrent layers, the result of `run_passes`.
        """
        groups, prefixes, pixels = self.group_prefixes(groups, pixels)
        sequence = shared_sequence(groups, prefixes, self.pad_id, rows=rows)
        # whether block masks are used depends on the length, which they then require to be rounded up
        if self._uses_block_masks(sequence.input_ids):
            sequence = shared_sequence(groups, prefixes, self.pad_id, rows=rows, multiple_of=BLOCK_SIZE)
        distinct = distinct_images(pixels)
        batch: Batch = {
            "input_ids": sequence.input_ids,
            "group_of": sequence.group_of,
            "segment_of": sequence.segment_of,
            "segment_end": sequence.segment_end,
            "token_index": sequence.position_ids,
            "position_ids": self.positions(sequence, prefixes, pixels),
            "image_places": (sequence.input_ids == self.image_token_id).nonzero(),
            "images": encoded_features(distinct) or self.image_inputs(distinct),
            "feature_rows": feature_rows(pixels, distinct, self._image_tokens),
        }
        if self.recurrent:
            batch[PASSES] = run_passes(sequence, keep_states=keep_states)
        return batch, sequence, groups

    # --- the forward pass -----------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        return self.config.get_text_config().vocab_size

    def answer_states(self, batch: Batch) -> AnswerStates:
        """See `Family.answer_states`."""
        states = self.hidden_states(batch, use_cache=False).flatten(0, 1)  # [B * S, width]
        # the head, often the largest matrix product, runs over the answer rows only
        answer_rows = states.index_select(0, batch["answer_rows"])  # [N, width]
        return AnswerStates(answer_rows, batch["labels"], batch["segment_index"])

    def hidden_states(self, batch: Batch, **options: Any) -> Tensor:
        """Run the language model over a batch of `layout`: hidden states [B, S, width].

        `options` are further arguments of the decoder, such as a key-value cache.
        """
        # with a frozen trunk the batch holds the states after its layers, and training enters there
        if TRUNK_STATES in batch:
            arguments = {"inputs_embeds": batch[TRUNK_STATES]}
        else:
            arguments = self.input_embeddings(batch, self._image_features(batch))
        if isinstance(batch.get(PASSES), dict):
            batch = batch | {PASSES: RunTree(batch[PASSES])}
        masks = self._masks(batch, arguments["inputs_embeds"].dtype)
        with skip_layers(self.decoder, range(batch.get(TRUNK_DEPTH, 0))):
            return self.decoder(
                **arguments, attention_mask=masks, position_ids=batch["position_ids"], **options
            ).last_hidden_state

    def _masks(self, batch: Batch, dtype: torch.dtype) -> Any:
        """The attention masks, as the decoder takes them for states of `dtype`."""
        tokens = mask_tokens(
            *(batch[name] for name in ("group_of", "segment_of", "segment_end")),
            image_block=self.bidirectional_blocks(batch),
            position_ids=batch["token_index"],  # windows count tokens, not rotary positions
        )
        make: Any = block_mask if self._uses_block_masks(batch["input_ids"]) else dense_mask
        masks = {}
        for kind, window in self.windows.items():
            has_blocks = self.block_kinds is None or kind in self.block_kinds
            masks[kind] = make(tokens if has_blocks else tokens._replace(block=None), window, self.whole_blocks)
        masks = masks if make is block_mask else additive_masks(masks, self.decoder, dtype)
        if self.recurrent:
            masks |= dict.fromkeys(self.recurrent, batch[PASSES])
        return mask_argument(masks)

    def _uses_block_masks(self, input_ids: Tensor) -> bool:
        """Whether these rows are attended under block masks; lengths are then multiples of 128."""
        return uses_block_masks(self.attention, input_ids.shape[1], self.device, self.decoder)

    def _image_features(self, batch: Batch) -> dict[str, Tensor]:
        """Features with one row an image token, computed or taken from the batch.

        No gradient mode is switched: autograd saves nothing in a tower without trained parameters.
        """
        images, rows = batch["images"], batch["feature_rows"]
        features = images if FEATURES in images else self.features(images)
        return features if rows is None else {name: values.index_select(0, rows) for name, values in features.items()}

    # --- answers --------------------------------------------------------------------------------------------

    def generation_settings(self) -> dict[str, Any]:
        """See `Family.generation_settings`."""
        return active_settings(self.model.generation_config) if self.uses_checkpoint_settings else {}

    @torch.inference_mode()
    def generate_tokens(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], **options: Any
    ) -> list[Generated]:
        """See `normtune.models.causal.answering.generate_tokens`."""
        return generate_tokens(self, groups, pixels, **options)

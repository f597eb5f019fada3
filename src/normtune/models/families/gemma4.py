"""Gemma 4: windows in most layers, shared keys, embeddings of tokens in every layer, or mixtures of experts.

The last layers of the small models read keys and values of earlier layers, and every layer reads an embedding of each
token besides the states. In the large models the tokens of an image see each other both ways, in layers with a window
only.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from transformers import ProcessorMixin
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from normtune.errors import InputError
from normtune.models.causal.attention import SLIDING
from normtune.models.causal.decoding import ColumnCache
from normtune.models.causal.family import CausalFamily
from normtune.models.causal.shared_prefix import image_blocks
from normtune.models.frozen_trunk import FrozenTrunk
from normtune.models.types import Batch


class Gemma4Processor(ProcessorMixin):
    """In place of transformers' processor of this name: its parts for sound and video need torchvision."""

    image_token: str
    boi_token: str  # begins an image
    eoi_token: str  # ends an image

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        for name in ("image_token", "image_token_id", "boi_token", "eoi_token"):
            setattr(self, name, getattr(tokenizer, name))

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """The tokens of one image."""
        image = self.image_token * int(image_inputs["num_soft_tokens_per_image"][image_idx])
        return f"{self.boi_token}{image}{self.eoi_token}"

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_soft_tokens_per_image"]


class Gemma4Family(CausalFamily):
    """Gemma 4 E2B and E4B without their sound encoder, and the dense and the mixture-of-experts models."""

    processor_class, image_processor_class = Gemma4Processor, Gemma4ImageProcessorPil
    image_end_token = "eoi_token"
    block_kinds = (SLIDING,)
    caps_logits = True
    # of an image: [patches, patch width], [patches, 2] and a number; all images have the same number of patches, and
    # the positions of padding are -1
    image_keys = ("pixel_values", "image_position_ids", "num_soft_tokens_per_image")
    unbatched_keys = ("num_soft_tokens_per_image",)

    def __init__(self, model: Any, processor: Any) -> None:
        self.text_config = model.config.get_text_config()
        if self.text_config.use_bidirectional_attention == "all":
            raise InputError(
                "the checkpoint is an encoder: all of its tokens see each other (use_bidirectional_attention: all). "
                "Choose a Gemma 4 model that generates text."
            )
        super().__init__(model, processor)

    def bidirectional_blocks(self, batch: Batch) -> Tensor | None:
        if self.text_config.use_bidirectional_attention is None:
            return None
        return image_blocks(batch["input_ids"], self.image_token_id)

    def token_arguments(self, input_ids: Tensor, cache: ColumnCache | None = None) -> dict[str, Any]:
        """See `CausalFamily.token_arguments`; in the small models also the tokens' embeddings for each layer."""
        arguments = super().token_arguments(input_ids, cache)
        if self.text_config.hidden_size_per_layer_input:
            arguments["per_layer_inputs"] = self.decoder.get_per_layer_inputs(input_ids, None)
        return arguments

    def frozen_trunk(self, trained: Collection[nn.Parameter]) -> FrozenTrunk | None:
        """None in the small models: layers read more than the states of the layer below."""
        if self.text_config.hidden_size_per_layer_input or self.text_config.num_kv_shared_layers:
            return None
        return super().frozen_trunk(trained)

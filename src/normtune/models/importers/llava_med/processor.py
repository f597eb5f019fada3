"""Builds the processor of an imported LLaVA-Med: tokenizer, image processor and chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import CLIPVisionConfig, LlamaTokenizer, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from normtune.errors import InputError
from normtune.models.families.llava import MISTRAL_TEMPLATE, VICUNA_TEMPLATE
from normtune.models.importers.llava_med.original_config import OriginalConfig
from normtune.models.processors import check_sentencepiece
from normtune.runtime.files import read_json

IMAGE, PATCH, START, END = "<image>", "<im_patch>", "<im_start>", "<im_end>"  # LLaVA's special tokens
PAD = "<pad>"
SEPARATOR = "###"  # between the turns of a conversation in version 1.0
MULTIPLE = 64  # a grown vocabulary is padded to a multiple of it, as in the published conversions of LLaVA

_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# the format that version 1.0 was trained on; an answer ends where the separator begins the next turn
SEPARATED_TEMPLATE = (
    "{{ '" + _SYSTEM.replace("'", "\\'") + "\n\n' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Human: ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ '\n' }}"
    "{% else %}{{ '### Assistant:' }}"
    "{% for part in message['content'] %}{{ ' ' + part['text'] }}{% endfor %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:' }}{% else %}{{ '###' }}{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of the imported model."""

    tokenizer: PreTrainedTokenizerFast  # the tokenizer, with an image token and a padding token
    image_token: str  # the placeholder token, one for each image feature
    added_tokens: tuple[str, ...]  # tokens that the original vocabulary does not have
    embedding_rows: int  # rows of the embedding and the head
    end_ids: tuple[int, ...]  # tokens that end an answer

    @property
    def image_id(self) -> int:
        token_id: Any = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return int(token_id)

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)


def read_vocabulary(directory: Path, original: OriginalConfig) -> Vocabulary:
    """Read a tokenizer and add the tokens that transformers' LLaVA needs.

    The original code of version 1.5 has no token for an image: it splits the text there and puts -200 between
    the pieces. Version 1.0 has <im_patch>. If the vocabulary grows beyond the embedding, the embedding grows
    to the next multiple of 64 rows.

    Raises:
        InputError: there is no tokenizer, it cannot be read, or it has more tokens than the model.
    """
    tokenizer = _read_tokenizer(directory)
    original_rows: int = original.text_config["vocab_size"]
    if len(tokenizer) > original_rows:
        raise InputError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, the model {original_rows}. "
            "Give --tokenizer with the directory of the tokenizer that the model was trained with."
        )
    vocab = tokenizer.get_vocab()
    if original.image_markers and not {START, END} <= vocab.keys():
        raise InputError(
            f"the model was trained with {START} and {END}, but the tokenizer in {directory} lacks them. "
            "Give --tokenizer with the directory of the tokenizer that the model was trained with."
        )
    image = next((token for token in (IMAGE, PATCH) if token in vocab), IMAGE)
    added = []
    if image not in vocab:
        added.append(image)
    # special: the tokenizer splits the image token off before it normalises the text, also if it was in the
    # vocabulary as a plain token
    tokenizer.add_tokens([AddedToken(image, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.unk_token, tokenizer.eos_token):
        if PAD not in vocab:
            added.append(PAD)
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD, special=True, normalized=False)})
    rows = original_rows if len(tokenizer) <= original_rows else -(-len(tokenizer) // MULTIPLE) * MULTIPLE
    end_ids = [int(tokenizer.eos_token_id)]
    if original.version == "1.0":
        end_ids.append(_separator_id(tokenizer))
    return Vocabulary(tokenizer, image, tuple(added), rows, tuple(end_ids))


def _separator_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The first token of "###" at the beginning of a line; later in a line it can be another token."""
    line = tokenizer("a\n", add_special_tokens=False).input_ids
    with_separator = tokenizer(f"a\n{SEPARATOR}", add_special_tokens=False).input_ids
    assert with_separator[: len(line)] == line, "the newline is a separate token"
    return int(with_separator[len(line)])


def _read_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a directory; it tokenises text after an image as LLaVA does."""
    try:
        if (directory / "tokenizer.json").is_file():
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(directory)
        elif (directory / "tokenizer.model").is_file():
            check_sentencepiece(
                directory, "Or give --tokenizer with a directory that holds the same tokenizer as tokenizer.json."
            )
            path = directory / "tokenizer_config.json"
            config = read_json(path) if path.is_file() else {}
            # LLaMA was trained on texts that begin with <s>; old releases do not say so in their config, and
            # transformers 5 then omits <s>
            with_start = config.get("add_bos_token", True)
            tokenizer = LlamaTokenizer.from_pretrained(directory, legacy=True, add_bos_token=with_start)
        else:
            raise InputError(
                f"{directory} holds no tokenizer (tokenizer.json or tokenizer.model). "
                "Give --tokenizer with a directory that holds it."
            )
    except InputError:
        raise
    except Exception as error:  # tokenizers raise plain exceptions
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"cannot read the tokenizer in {directory}: {reason}. Copy it again.") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {directory} has no eos_token. Copy tokenizer_config.json with it.")
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=_prepend_always(tokenizer.backend_tokenizer),
        **tokens,
        padding_side="left",  # as generation needs it
        clean_up_tokenization_spaces=False,
    )


def _prepend_always(tokenizer: Tokenizer) -> Tokenizer:
    """Make the tokenizer prepend a blank to the text after an image, as to the beginning of any text.

    LLaVA tokenises the pieces between images separately. Newer tokenizers of LLaMA prepend the blank only to
    the first piece, and would give the model other tokens than it was trained on.
    """
    state = json.loads(tokenizer.to_str())
    pre_tokenizer = state.get("pre_tokenizer") or {}
    if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "always"
        return Tokenizer.from_str(json.dumps(state))
    return tokenizer


def build_processor(
    original: OriginalConfig, vision: CLIPVisionConfig, vocabulary: Vocabulary, preprocessor: dict[str, Any]
) -> LlavaProcessor:
    """Build the processor; it pads images to squares with CLIP's mean colour if the model was trained so.

    Args:
        preprocessor: the image encoder's own `preprocessor_config.json`, which gives mean and standard
            deviation of the pixels; without these, CLIP's.
    """
    side: Any = vision.image_size
    statistics = {name: preprocessor[name] for name in ("image_mean", "image_std") if name in preprocessor}
    images = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=original.pad_images,
        **statistics,
    )
    image = vocabulary.image_token
    template = MISTRAL_TEMPLATE if original.kind == "mistral" else VICUNA_TEMPLATE
    if original.version == "1.0":
        template = SEPARATED_TEMPLATE
    return LlavaProcessor(
        images,
        vocabulary.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=original.feature_strategy,
        num_additional_image_tokens=1,  # the class token, which the strategy "default" subtracts again
        image_token=image,
        chat_template=template.replace(IMAGE, START + image + END if original.image_markers else image),
    )

"""Tokenizer, image processor and chat template of an imported LLaVA-Med."""

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
from normtune.models.importers.llava_med.original_config import Original
from normtune.models.processors import check_sentencepiece
from normtune.runtime.files import read_json

IMAGE, PATCH, START, END = "<image>", "<im_patch>", "<im_start>", "<im_end>"
PAD = "<pad>"
SEPARATOR = "###"  # of version 1.0's turns
MULTIPLE = 64  # a grown vocabulary is filled up to it, as in the published conversions of LLaVA

_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# the text that version 1.0 was trained on; the separator that begins the next turn ends an answer
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
    """The tokenizer as the imported model takes it.

    Attributes:
        tokenizer: with an image token and a padding token.
        image_token: what stands for one image feature.
        added: tokens that the original vocabulary has not.
        rows: of the embedding and the head.
        ends: tokens that end an answer.
    """

    tokenizer: PreTrainedTokenizerFast
    image_token: str
    added: tuple[str, ...]
    rows: int
    ends: tuple[int, ...]

    @property
    def image_id(self) -> int:
        found: Any = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return int(found)

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)


def read_vocabulary(directory: Path, original: Original) -> Vocabulary:
    """The checkpoint's tokenizer, with the tokens that transformers' LLaVA needs.

    The original code has no token for an image (it cuts the text there, -200 stands between); version 1.0 has
    <im_patch>. Rows that the vocabulary grows by are filled up to a multiple of 64.

    Raises:
        InputError: there is no tokenizer, it can't be read, or it has more tokens than the model.
    """
    tokenizer = _tokenizer(directory)
    had: int = original.text["vocab_size"]
    if len(tokenizer) > had:
        raise InputError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, the model {had}. "
            "Give --tokenizer with the directory of the one that it was trained with."
        )
    known = tokenizer.get_vocab()
    if original.marked and not {START, END} <= known.keys():
        raise InputError(
            f"the model was trained with {START} and {END}, which the tokenizer in {directory} has not. "
            "Give --tokenizer with the directory of the one that it was trained with."
        )
    image = next((token for token in (IMAGE, PATCH) if token in known), IMAGE)
    added = []
    if image not in known:
        added.append(image)
    # split off before anything else is done with the text, wherever it came from
    tokenizer.add_tokens([AddedToken(image, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.unk_token, tokenizer.eos_token):
        if PAD not in known:
            added.append(PAD)
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD, special=True, normalized=False)})
    rows = had if len(tokenizer) <= had else -(-len(tokenizer) // MULTIPLE) * MULTIPLE
    ends = [int(tokenizer.eos_token_id)]
    if original.version == "1.0":
        ends.append(_separator(tokenizer))
    return Vocabulary(tokenizer, image, tuple(added), rows, tuple(ends))


def _separator(tokenizer: PreTrainedTokenizerFast) -> int:
    """The first token of "###" at the beginning of a line."""
    line = tokenizer("a\n", add_special_tokens=False).input_ids
    with_separator = tokenizer(f"a\n{SEPARATOR}", add_special_tokens=False).input_ids
    assert with_separator[: len(line)] == line, "a line's end is a token of its own"
    return int(with_separator[len(line)])


def _tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory, which reads text beside an image as LLaVA does."""
    try:
        if (directory / "tokenizer.json").is_file():
            found: Any = PreTrainedTokenizerFast.from_pretrained(directory)
        elif (directory / "tokenizer.model").is_file():
            found = _from_sentencepiece(directory)
        else:
            raise InputError(
                f"{directory} holds no tokenizer (tokenizer.json or tokenizer.model). "
                "Give --tokenizer with a directory that holds it."
            )
    except InputError:
        raise
    except Exception as error:  # tokenizers raise plain exceptions
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"cannot read the tokenizer in {directory}: {reason}. Copy it anew.") from error
    if found.eos_token_id is None:
        raise InputError(
            f"the tokenizer in {directory} has no eos_token. Copy tokenizer_config.json with it."
        )
    return PreTrainedTokenizerFast(tokenizer_object=_as_trained(found.backend_tokenizer), **_named(found))


def _from_sentencepiece(directory: Path) -> Any:
    check_sentencepiece(
        directory, "Or give --tokenizer with a directory that holds the same tokenizer as tokenizer.json."
    )
    config = directory / "tokenizer_config.json"
    told = read_json(config) if config.is_file() else {}
    # LLaMA's texts begin with <s>, which releases of its time left unsaid and transformers 5 leaves out
    return LlamaTokenizer.from_pretrained(
        directory, legacy=True, add_bos_token=told.get("add_bos_token", True)
    )


def _named(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    found = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    return {**found, "padding_side": "left", "clean_up_tokenization_spaces": False}


def _as_trained(tokenizer: Tokenizer) -> Tokenizer:
    """Text after an image begins as any text does, with a blank put before it.

    LLaVA tokenises the pieces between images apart. Newer tokenizers of LLaMA put the blank before the first
    piece alone, and would give the model other tokens than it was trained on.
    """
    state = json.loads(tokenizer.to_str())
    before = state.get("pre_tokenizer") or {}
    if before.get("type") == "Metaspace" and before.get("prepend_scheme") == "first":
        before["prepend_scheme"] = "always"
        return Tokenizer.from_str(json.dumps(state))
    return tokenizer


def build_processor(
    original: Original, vision: CLIPVisionConfig, vocabulary: Vocabulary, preparation: dict[str, Any]
) -> LlavaProcessor:
    """The processor; it pads images to squares with CLIP's mean colour if the checkpoint was trained so.

    Mean and deviation are those of `preparation`, the image encoder's own `preprocessor_config.json`.
    """
    side: Any = vision.image_size
    given = {name: preparation[name] for name in ("image_mean", "image_std") if name in preparation}
    images = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=original.pad,
        **given,
    )
    image = vocabulary.image_token
    return LlavaProcessor(
        images,
        vocabulary.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=original.strategy,
        num_additional_image_tokens=1,  # the class token, which the strategy "default" takes away again
        image_token=image,
        chat_template=_template(original).replace(IMAGE, START + image + END if original.marked else image),
    )


def _template(original: Original) -> str:
    if original.version == "1.0":
        return SEPARATED_TEMPLATE
    return MISTRAL_TEMPLATE if original.kind == "mistral" else VICUNA_TEMPLATE

"""A MISS with 60,000 random parameters and a tokenizer with the words of the phantoms."""

from __future__ import annotations

from pathlib import Path

import torch

from normtune.data.phantom import phantom_dataset
from normtune.models.families.miss import MissFamily, miss_processor
from normtune.models.miss.config import MissConfig
from normtune.models.miss.model import MissForQuestionAnswering
from normtune.models.miss.tokenizer import ENCODE, build_bert_tokenizer

SIZE = 48
_WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
_TEXT = {**_WIDTH, "max_position_embeddings": 160}


def tiny_miss(seed: int = 0, dropout: float = 0.1) -> MissFamily:
    """The model with its processor, in eval mode."""
    examples = [e for hospital in "ab" for e in phantom_dataset(hospital, 60, task="all").examples]
    words = sorted({word for e in examples for word in _split_words(f"{e.question} {e.answer}")})
    signs = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs), *words]
    tokenizer = build_bert_tokenizer({piece: index for index, piece in enumerate(dict.fromkeys(pieces))})
    text = {**_TEXT, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = MissConfig(
        vision_dims={**_WIDTH, "image_size": SIZE, "patch_size": 16, "drop_path_rate": dropout},
        encoder_dims=text,
        decoder_dims=text,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        encode_token_id=tokenizer.convert_tokens_to_ids(ENCODE),
        initializer_range=0.1,  # large enough for distinct logits
    )
    torch.manual_seed(seed)
    model = MissForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return MissFamily(model.eval(), miss_processor(tokenizer, SIZE))


def save_tiny_miss(directory: Path, seed: int = 0, dropout: float = 0.1) -> Path:
    """Save the model to `directory`, where `normtune.models.loading.load` can read it."""
    tiny_miss(seed, dropout).save(directory)
    return directory


def _split_words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()

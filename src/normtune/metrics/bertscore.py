"""BERTScore (Zhang et al. 2020) with a local model: greedy cosine matching, no idf, no baseline.

As in the authors' package, a special token may be what a word is matched with, but is not itself scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 16
# The layers that bert-score chose on WMT16; another model's last layer is taken.
_LAYERS = {("bert", 24): 18, ("bert", 12): 9, ("roberta", 24): 17, ("roberta", 12): 10, ("distilbert", 6): 5}


def bertscore_f1(
    pairs: Sequence[tuple[str, str]],
    model: Path | str,
    *,
    layer: int | None = None,
    device: str | None = None,
) -> list[float]:
    """BERTScore's F1 of every (prediction, reference); 0 where one of the two has no word.

    Args:
        pairs: the texts.
        model: local directory of an encoder and its tokenizer, such as roberta-large.
        layer: whose hidden states are compared; by default bert-score's choice for BERT, RoBERTa and
            DistilBERT of the usual depths, else the last.
        device: cpu or cuda; by default CUDA where there is one.

    Raises:
        InputError: the directory holds no such model.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    if not Path(model).is_dir():
        raise InputError(f"BERTScore needs the directory of a model, and {model} is none. Give a local one.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        encoder = AutoModel.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{model} holds no encoder that transformers loads ({type(error).__name__})."
        ) from error
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder.to(where).eval()
    depth = encoder.config.num_hidden_layers
    at = layer or _LAYERS.get((encoder.config.model_type, depth), depth)
    scores: list[float] = []
    for start in range(0, len(pairs), _BATCH):
        said, meant = zip(*pairs[start : start + _BATCH], strict=True)
        ours = _embed(encoder, tokenizer, said, at)
        theirs = _embed(encoder, tokenizer, meant, at)
        scores += [_f1(a, b) for a, b in zip(ours, theirs, strict=True)]
    return scores


def _embed(encoder: Any, tokenizer: Any, texts: Sequence[str], layer: int) -> list[tuple[Tensor, Tensor]]:
    """Of each text the unit vectors of its tokens, [tokens, width], and which of them are words, [tokens]."""
    import torch

    blank = " " if encoder.config.model_type == "roberta" else ""  # or its first word is another token
    longest = min(tokenizer.model_max_length, 512)
    batch = tokenizer(
        [blank + text.strip() for text in texts],
        padding=True,
        truncation=True,
        max_length=longest,
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    special = batch.pop("special_tokens_mask").bool()
    held = batch["attention_mask"].bool()
    with torch.inference_mode():
        inputs = {name: tensor.to(encoder.device) for name, tensor in batch.items()}
        hidden = encoder(**inputs, output_hidden_states=True).hidden_states[layer]
    unit = torch.nn.functional.normalize(hidden.float(), dim=-1).cpu()
    return [(row[kept], ~marks[kept]) for row, kept, marks in zip(unit, held, special, strict=True)]


def _f1(said: tuple[Tensor, Tensor], meant: tuple[Tensor, Tensor]) -> float:
    (ours, our_words), (theirs, their_words) = said, meant
    if not our_words.any() or not their_words.any():
        return 0.0
    cosine = ours @ theirs.T  # [tokens said, tokens meant]
    precision = cosine.max(dim=1).values[our_words].mean()
    recall = cosine.max(dim=0).values[their_words].mean()
    return float(2 * precision * recall / (precision + recall))

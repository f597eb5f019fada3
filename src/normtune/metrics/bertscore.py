"""BERTScore (Zhang et al. 2020) with a local model: greedy cosine matching, without idf weights or baseline.

As in the authors' package, a word may be matched with a special token, but special tokens are not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 16  # pairs of texts per forward pass
# (model type, number of layers) -> the layer that bert-score selected on WMT16. Other models use the last
# layer.
_LAYERS = {("bert", 24): 18, ("bert", 12): 9, ("roberta", 24): 17, ("roberta", 12): 10, ("distilbert", 6): 5}


def bertscore_f1(
    pairs: Sequence[tuple[str, str]], model: Path | str, *, layer: int | None = None, device: str | None = None
) -> list[float]:
    """Compute the F1 of BERTScore for every pair of texts (Zhang et al. 2020, section 3).

    Args:
        pairs: (prediction, reference) of each row.
        model: local directory of an encoder and its tokenizer, such as roberta-large.
        layer: the layer that provides the hidden states. By default it is bert-score's layer for BERT,
            RoBERTa and DistilBERT of the usual depths, else the last layer.
        device: cpu or cuda; by default CUDA if it is available.

    Returns:
        One F1 per pair; 0 if one of the two texts has only special tokens.

    Raises:
        InputError: if the directory has no such model.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    if not Path(model).is_dir():
        raise InputError(f"BERTScore needs the directory of a model, and {model} is no directory. Give a local one.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        encoder = AutoModel.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{model} has no encoder that transformers can load ({type(error).__name__}).") from error
    encoder.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))).eval()
    depth = encoder.config.num_hidden_layers
    layer = layer or _LAYERS.get((encoder.config.model_type, depth), depth)
    scores: list[float] = []
    for start in range(0, len(pairs), _BATCH):
        predictions, references = zip(*pairs[start : start + _BATCH], strict=True)
        predicted = _embed(encoder, tokenizer, predictions, layer)
        expected = _embed(encoder, tokenizer, references, layer)
        scores += [_f1(a, b) for a, b in zip(predicted, expected, strict=True)]
    return scores


def _embed(encoder: Any, tokenizer: Any, texts: Sequence[str], layer: int) -> list[tuple[Tensor, Tensor]]:
    """Embed texts.

    Returns:
        For each text, the unit vectors of its tokens, [tokens, width], and which tokens are words, [tokens].
    """
    import torch

    # RoBERTa has different tokens for a word with and without a blank before it.
    blank = " " if encoder.config.model_type == "roberta" else ""
    longest = min(tokenizer.model_max_length, 512)
    batch = tokenizer(
        [blank + text.strip() for text in texts],
        padding=True,
        truncation=True,
        max_length=longest,
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    special = batch.pop("special_tokens_mask").bool()  # [batch, seq]
    is_token = batch["attention_mask"].bool()  # [batch, seq], False for padding
    with torch.inference_mode():
        inputs = {name: tensor.to(encoder.device) for name, tensor in batch.items()}
        hidden = encoder(**inputs, output_hidden_states=True).hidden_states[layer]  # [batch, seq, width]
    unit = torch.nn.functional.normalize(hidden.float(), dim=-1).cpu()
    return [(row[mask], ~marks[mask]) for row, mask, marks in zip(unit, is_token, special, strict=True)]


def _f1(prediction: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> float:
    """Match each word with its most similar token of the other text and compute F1 from the cosines."""
    (predicted, predicted_is_word), (expected, expected_is_word) = prediction, reference
    if not predicted_is_word.any() or not expected_is_word.any():
        return 0.0
    cosine = predicted @ expected.T  # [tokens of the prediction, tokens of the reference]
    precision = cosine.max(dim=1).values[predicted_is_word].mean()
    recall = cosine.max(dim=0).values[expected_is_word].mean()
    return float(2 * precision * recall / (precision + recall))

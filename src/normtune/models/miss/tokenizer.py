"""BERT's WordPiece tokenizer with two more tokens: [DEC] begins an answer, [ENC] begins a question."""

from __future__ import annotations

from pathlib import Path

from transformers import BertTokenizer, PreTrainedTokenizerBase

from normtune.errors import InputError

DECODE, ENCODE = "[DEC]", "[ENC]"


def build_bert_tokenizer(vocab: Path | dict[str, int]) -> PreTrainedTokenizerBase:
    """Build the tokenizer of MISS and BLIP.

    [DEC] and [ENC] are appended if the vocabulary lacks them; with bert-base-uncased's vocabulary they are
    30522 and 30523.

    Args:
        vocab: a `vocab.txt` with one piece a line, or a dict piece -> id.

    Raises:
        InputError: the file is missing or lacks BERT's special tokens.
    """
    if isinstance(vocab, Path):
        try:
            pieces = vocab.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InputError(f"cannot read {vocab}: {error.strerror or error}. Give BERT's vocab.txt.") from error
        vocab = {piece: index for index, piece in enumerate(pieces)}
    missing = [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if piece not in vocab]
    if missing:
        raise InputError(f"the vocabulary lacks {', '.join(missing)}. Give the vocab.txt of bert-base-uncased.")
    tokenizer = BertTokenizer(vocab=dict(vocab))
    tokenizer.add_special_tokens({"bos_token": DECODE, "additional_special_tokens": [ENCODE]})
    return tokenizer

"""BERT's WordPiece tokenizer with MISS's two words of its own: [DEC] begins an answer, [ENC] a question."""

from __future__ import annotations

from pathlib import Path

from transformers import BertTokenizer, PreTrainedTokenizerBase

from normtune.errors import InputError

DECODE, ENCODE = "[DEC]", "[ENC]"


def bert_tokenizer(vocab: Path | dict[str, int]) -> PreTrainedTokenizerBase:
    """The tokenizer of a `vocab.txt` (one piece a line) or of a piece -> id table.

    [DEC] and [ENC] are appended where the vocabulary lacks them: 30522 and 30523 after bert-base-uncased's.

    Raises:
        InputError: the file is missing or lacks BERT's special pieces.
    """
    if isinstance(vocab, Path):
        try:
            pieces = vocab.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InputError(
                f"cannot read {vocab}: {error.strerror or error}. Give BERT's vocab.txt."
            ) from error
        vocab = {piece: index for index, piece in enumerate(pieces)}
    lacking = [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if piece not in vocab]
    if lacking:
        raise InputError(
            f"the vocabulary lacks {', '.join(lacking)}. Give the vocab.txt of bert-base-uncased."
        )
    tokenizer = BertTokenizer(vocab=dict(vocab))
    tokenizer.add_special_tokens({"bos_token": DECODE, "additional_special_tokens": [ENCODE]})
    return tokenizer

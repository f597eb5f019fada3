"""CheXbert (Smit et al. 2020), loaded from the checkpoint of its authors.

The model is BERT with 14 linear heads on the first token, one for each finding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.errors import InputError
from normtune.metrics.finding_rules import FINDINGS, Status

if TYPE_CHECKING:
    from torch import Tensor

_STATUS: tuple[Status, ...] = ("absent", "positive", "negative", "uncertain")  # classes of a head, in order
_MAX_TOKENS = 512  # most tokens of a report; the rest is truncated
_BATCH = 16  # reports per forward pass
# Reports -> for each report, finding -> status.
Labeller = Callable[[Sequence[str]], list[dict[str, Status]]]


def load_chexbert(directory: Path | str, *, device: str | None = None) -> Labeller:
    """Load CheXbert as a function from reports to the status of each of the 14 findings.

    Args:
        directory: contains `chexbert.pth`, as published by its authors or by those of f1chexbert, and the
            `vocab.txt` of bert-base-uncased. The size of BERT is read from the checkpoint. Attention heads
            are 64 wide.
        device: cpu or cuda; by default CUDA if it is available.

    Raises:
        InputError: if a file is missing, or the checkpoint is not one of CheXbert.
    """
    import torch
    from transformers import BertTokenizer

    directory = Path(directory)
    checkpoint, vocab = directory / "chexbert.pth", directory / "vocab.txt"
    for path in (checkpoint, vocab):
        if not path.is_file():
            raise InputError(
                f"CheXbert needs {path}, which is missing. Put chexbert.pth and the vocab.txt of "
                "bert-base-uncased into one folder, or use findings_rules, which needs no weights."
            )
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        state = {name.removeprefix("module."): tensor for name, tensor in saved["model_state_dict"].items()}
        bert, heads = _build_model(state)
    except Exception as error:  # torch.load raises many kinds of exception for a damaged file
        raise InputError(
            f"{checkpoint} is not CheXbert's checkpoint ({type(error).__name__}). Download it again."
        ) from error
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bert.to(target).eval()
    heads.to(target)
    tokenizer: Any = BertTokenizer(vocab=str(vocab), do_lower_case=True)

    @torch.inference_mode()
    def label(reports: Sequence[str]) -> list[dict[str, Status]]:
        rows: list[dict[str, Status]] = []
        for start in range(0, len(reports), _BATCH):
            texts = [" ".join(report.split()) for report in reports[start : start + _BATCH]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt").to(
                target
            )
            # The states of the first token, [reports, width]
            first = bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0]
            classes = [head(first).argmax(dim=1).tolist() for head in heads]  # [findings][reports]
            for row in zip(*classes, strict=True):
                rows.append({name: _STATUS[at] for name, at in zip(FINDINGS, row, strict=True)})
        return rows

    return label


def _build_model(state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Build BERT and its heads with the checkpoint's weights. The shapes of the weights give the sizes."""
    import torch
    from transformers import BertConfig, BertModel

    rows, width = state["bert.embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=rows,
        hidden_size=width,
        num_hidden_layers=1 + max(int(n.split(".")[3]) for n in state if n.startswith("bert.encoder.layer.")),
        num_attention_heads=max(1, width // 64),
        intermediate_size=state["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=state["bert.embeddings.position_embeddings.weight"].shape[0],
    )
    bert = BertModel(config, add_pooling_layer=False)
    bert_state = {n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")}
    # Not strict, because the checkpoint also has a pooler and old buffers.
    missing = bert.load_state_dict(bert_state, strict=False).missing_keys
    if missing:
        raise KeyError(missing[0])
    sizes = [state[f"linear_heads.{at}.weight"].shape[0] for at in range(len(FINDINGS))]
    heads = torch.nn.ModuleList(torch.nn.Linear(width, size) for size in sizes)
    heads.load_state_dict(
        {n.removeprefix("linear_heads."): t for n, t in state.items() if n.startswith("linear_heads.")}
    )
    return bert, heads

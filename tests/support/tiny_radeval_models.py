"""Tiny models with random weights for the metrics of RadEval, in the folders of `hf download --cache-dir`.

    PYTHON tiny_radeval_models.py FOLDER

PYTHON has RadEval, not Normtune. The layouts are those that RadEval 2.2.1 reads: `metrics/radgraph/_vendor/core.py`
(the archive of a DyGIE model), `metrics/_chexbert_base.py` and `metrics/RadCliQv1/radcliq.py`.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

WORDS = ["no", "the", "heart", "large", "clear", "lungs", "effusion", "pneumonia", "small", "left", ".", "1", "2"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
ENTITIES = ("ABNORMALITY", "ANATOMY", "DISEASE", "NON-ABNORMALITY", "NON-DISEASE")
SCORERS = "StanfordAIMI/RRG_scorers"


def snapshot(root: Path, repository: str) -> Path:
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots/1").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("1")
    return folder / "snapshots/1"


def save_bert(files: Path, model: type = BertModel, **config: Any) -> Any:
    (files / "vocab.txt").write_text("\n".join(BERT))
    BertTokenizer(vocab=str(files / "vocab.txt"), model_max_length=512).save_pretrained(files)
    torch.manual_seed(0)
    bert = model(BertConfig(vocab_size=len(BERT), num_hidden_layers=2, **SIZES, **config))
    bert.save_pretrained(files)
    return bert


def word_tokenizer(special: list[str], unknown: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate([*special, *WORDS])}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def save_ratescore(root: Path) -> None:
    names = dict(enumerate(["O", *(f"{place}-{entity}" for entity in ENTITIES for place in "BI")]))
    labels = {"id2label": names, "label2id": {name: n for n, name in names.items()}}
    save_bert(snapshot(root, "Angelakeke/RaTE-NER-Deberta"), BertForTokenClassification, **labels)
    save_bert(snapshot(root, "FremyCompany/BioLORD-2023-C"))


def save_causal(root: Path, repository: str, template: str | None = None) -> None:
    files = snapshot(root, repository)
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(list(tokens.values()), "<unk>"), **tokens)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(files)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4 + len(WORDS), num_hidden_layers=1, max_position_embeddings=8192, eos_token_id=0, **SIZES
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)  # token 0 comes first: each answer ends at once
    model.save_pretrained(files)


def save_radgraph(root: Path, kind: str) -> Path:
    import radeval

    sys.modules["RadEval"] = radeval  # see normtune.metrics.metric_worker
    from radeval.metrics.radgraph._vendor import core

    encoder = snapshot(root, "tiny/encoder")
    save_bert(encoder)
    bert = {"model_name": "tiny/encoder", "max_length": 64}
    model = {
        "feature_size": 4,
        "max_span_width": 4,
        "target_task": "relation",
        "loss_weights": {"ner": 1.0, "relation": 1.0, "coref": 0.0, "events": 0.0},
        "feedforward_params": {"num_layers": 1, "hidden_dims": 8, "dropout": 0.0},
        "modules": {
            "coref": {"spans_per_word": 0.3, "max_antecedents": 10, "coref_prop": 0},
            "ner": {},
            "relation": {"spans_per_word": 0.5},
            "events": {
                "trigger_spans_per_word": 0.3,
                "argument_spans_per_word": 0.3,
                "loss_weights": {"trigger": 1.0, "arguments": 1.0},
            },
        },
    }
    unused = {"type": "dygie", "initializer": {}, "module_initializer": {}}
    config = {
        "dataset_reader": {"max_span_width": 4, "token_indexers": {"bert": bert}},
        "vocabulary": {},
        "model": {**unused, "embedder": {"token_embedders": {"bert": bert}}, **model},
    }
    work = root / "archive"
    (work / "vocabulary").mkdir(parents=True)
    (work / "config.json").write_text(json.dumps(config))
    (work / "vocabulary/non_padded_namespaces.txt").write_text("*labels\n*tags\n")
    (work / f"vocabulary/{kind}__ner_labels.txt").write_text("\nObservation::definitely present\nAnatomy\n")
    (work / f"vocabulary/{kind}__relation_labels.txt").write_text("\nlocated_at\nmodify\n")
    embedder = core.token_embedders.PretrainedTransformerMismatchedEmbedder(model_name=str(encoder), max_length=64)
    torch.manual_seed(3)
    dygie = core.dygie.DyGIE(
        vocab=core.Vocabulary.from_files(str(work / "vocabulary")),
        embedder=core.text_field_embedders.BasicTextFieldEmbedder({"bert": embedder}),
        **core.DotMap(model),
    )
    torch.save(dygie.state_dict(), work / "weights.th")
    files = snapshot(root, SCORERS)
    with tarfile.open(files / f"{kind}.tar.gz", "w:gz") as archive:
        for name in ("config.json", "weights.th", "vocabulary"):
            archive.add(work / name, name)
    return files


def save_radcliq(root: Path) -> None:
    files = save_radgraph(root, "radgraph")
    bert = save_bert(snapshot(root, "bert-base-uncased"))
    state = {f"module.bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    for head in range(14):
        layer = torch.nn.Linear(SIZES["hidden_size"], 4 if head < 13 else 2)
        state |= {f"module.linear_heads.{head}.{name}": tensor for name, tensor in layer.state_dict().items()}
    torch.save({"model_state_dict": state}, files / "chexbert.pth")
    files = snapshot(root, "distilroberta-base")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = word_tokenizer(special, "<unk>")
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, special.index(name)) for name in ("<s>", "</s>")]
    )
    names = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
    tokens = dict(zip(names, special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **tokens).save_pretrained(files)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(special) + len(WORDS), num_hidden_layers=6, max_position_embeddings=514, pad_token_id=1, **SIZES
    )
    RobertaModel(config).save_pretrained(files)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    save_ratescore(root / "ratescore")
    save_causal(root / "green", "StanfordAIMI/GREEN-radllama2-7b")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    save_causal(root / "crimson", "rajpurkarlab/medgemma-4b-it-crimson", template)
    save_radgraph(root / "radgraph", "radgraph-xl")
    save_radcliq(root / "radcliq")

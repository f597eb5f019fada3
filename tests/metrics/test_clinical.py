from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from normtune.errors import InputError
from normtune.metrics.bertscore import bertscore_f1
from normtune.metrics.clinical import finding_table, label_metrics, label_with_chexbert, radgraph_metrics, rules_metrics
from normtune.metrics.finding_rules import FINDINGS, Status
from tests.support.tolerance import approx

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "effusion", "heart", "large", "clear", "lungs"]


def labels(**statuses: Status) -> dict[str, Status]:
    by_name: dict[str, Status] = {name.replace("_", " "): status for name, status in statuses.items()}
    return {name: by_name.get(name, "absent") for name in FINDINGS}


PREDICTIONS = {"a": labels(Edema="positive", Fracture="positive"), "b": labels(Atelectasis="uncertain")}
REFERENCES = {"a": labels(Edema="positive"), "b": labels(Atelectasis="positive", Consolidation="positive")}


def test_label_f1_by_hand() -> None:
    """True positives: Edema, Atelectasis; false positive: Fracture; false negative: Consolidation."""
    scores = {name: metric.overall() for name, metric in label_metrics(PREDICTIONS, REFERENCES, "x").items()}
    assert scores == pytest.approx(
        {
            "x_f1_micro_14": 2 * 2 / (2 * 2 + 1 + 1),
            "x_f1_macro_14": 2 / 14,
            "x_f1_micro_5": 4 / 5,
            "x_f1_macro_5": 2 / 5,
        }
    )


def test_uncertain_labels_can_count_as_negative() -> None:
    metrics = label_metrics(PREDICTIONS, REFERENCES, "x", uncertain="negative")
    assert metrics["x_f1_micro_5"].overall() == pytest.approx(2 * 1 / (2 * 1 + 0 + 2))


def test_the_table_of_findings_by_hand() -> None:
    table = finding_table(PREDICTIONS, REFERENCES)
    assert tuple(table) == FINDINGS
    assert table["Edema"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "predictions": 1, "references": 1}
    assert table["Fracture"] == {"precision": 0, "recall": 0, "f1": 0, "predictions": 1, "references": 0}
    assert table["Consolidation"]["references"] == 1 and table["Consolidation"]["recall"] == 0


def test_label_f1_equals_the_definition_of_scikit_learn() -> None:
    """On random labels: micro F1 from pooled counts, macro F1 as the mean over findings."""
    draw = torch.Generator().manual_seed(0)
    predicted, expected = (torch.rand(40, 14, generator=draw) < 0.3 for _ in range(2))

    def to_labels(matrix: torch.Tensor) -> dict[str, dict[str, Status]]:
        return {
            str(at): {n: "positive" if on else "absent" for n, on in zip(FINDINGS, row, strict=True)}
            for at, row in enumerate(matrix.tolist())
        }

    scores = {n: m.overall() for n, m in label_metrics(to_labels(predicted), to_labels(expected), "x").items()}
    true, false, missed = (
        counts.sum(0).double() for counts in (predicted & expected, predicted & ~expected, ~predicted & expected)
    )
    f1 = 2 * true / (2 * true + false + missed)
    assert scores["x_f1_macro_14"] == pytest.approx(float(f1.mean()))
    assert scores["x_f1_micro_14"] == pytest.approx(
        float(2 * true.sum() / (2 * true.sum() + false.sum() + missed.sum()))
    )


def test_rules_label_reports_end_to_end() -> None:
    texts = {"a": ("Cardiomegaly.", "The heart is enlarged."), "b": ("Clear.", "Small pleural effusion.")}
    metrics = rules_metrics(texts)
    assert metrics["findings_rules_f1_micro_5"].overall() == pytest.approx(2 / 3)


def chexbert_folder(folder: Path) -> tuple[BertModel, torch.nn.ModuleList]:
    """A checkpoint in CheXbert's layout, with a tiny BERT of random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCAB), hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=32
    )
    bert = BertModel(config).eval()
    heads = torch.nn.ModuleList(torch.nn.Linear(64, 4) for _ in range(13))
    heads.append(torch.nn.Linear(64, 2))
    state = {f"module.bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    state |= {f"module.linear_heads.{name}": tensor for name, tensor in heads.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 1}, folder / "chexbert.pth")
    (folder / "vocab.txt").write_text("\n".join(VOCAB))
    return bert, heads


def test_chexbert_labels_equal_the_outputs_of_its_weights(tmp_path: Path) -> None:
    """In one batch with different lengths; class 1 is positive, 2 negative, 3 uncertain, 0 not mentioned."""
    bert, heads = chexbert_folder(tmp_path)
    texts = {"a": ("no effusion", "heart large"), "b": ("lungs\n clear no effusion", "")}
    predictions, references = label_with_chexbert(texts, tmp_path, device="cpu")
    ids = {"a": [2, 5, 6, 3], "b": [2, 10, 9, 5, 6, 3]}
    for id, row in ids.items():
        first = bert(torch.tensor([row])).last_hidden_state[:, 0]
        classes = [int(head(first).argmax()) for head in heads]
        status = ["absent", "positive", "negative", "uncertain"]
        assert predictions[id] == {name: status[at] for name, at in zip(FINDINGS, classes, strict=True)}
    assert set(references) == {"a", "b"}


def test_chexbert_without_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"CheXbert needs .*chexbert\.pth, which is missing"):
        label_with_chexbert({"a": ("x", "y")}, tmp_path)
    (tmp_path / "chexbert.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    with pytest.raises(InputError, match=r"is not CheXbert's checkpoint"):
        label_with_chexbert({"a": ("x", "y")}, tmp_path)


def test_radgraph_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "radgraph", None)
    with pytest.raises(InputError, match=r"needs the package radgraph.*normtune\[clinical\]"):
        radgraph_metrics({"a": ("x", "y")})


def test_radgraph_scores_are_joined_to_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scorer:
        def __init__(self, **_: object) -> None:
            pass

        def __call__(self, refs: list[str], hyps: list[str]) -> tuple[object, ...]:
            rewards = [float(a == b) for a, b in zip(refs, hyps, strict=True)]
            return 0.0, (rewards, rewards, rewards), [], []

    package = type("radgraph", (), {"F1RadGraph": Scorer})
    monkeypatch.setitem(__import__("sys").modules, "radgraph", package)
    metrics = radgraph_metrics({"a": ("x", "x"), "b": ("x", "y")})
    assert metrics["radgraph_f1_partial"].by_row() == {"a": 1.0, "b": 0.0}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(VOCAB))
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_bertscore_matches_words_by_their_best_cosine(encoder: Path) -> None:
    """Compares with loops over the hidden states. Words may match special tokens, which are not scored."""
    model = BertModel.from_pretrained(encoder).eval()
    prediction, reference = [2, 5, 6, 3], [2, 8, 7, 6, 3]
    states = [
        model(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0].detach()
        for row in (prediction, reference)
    ]
    predicted, reference_states = (state / state.norm(dim=1, keepdim=True) for state in states)
    cosine = predicted @ reference_states.T
    precision = float(torch.stack([cosine[i].max() for i in (1, 2)]).mean())
    recall = float(torch.stack([cosine[:, j].max() for j in (1, 2, 3)]).mean())
    expected = 2 * precision * recall / (precision + recall)
    pairs = [("no effusion", "large heart effusion"), ("clear", "clear"), ("", "clear")]
    scores = bertscore_f1(pairs, encoder, layer=2, device="cpu")
    assert scores == approx([expected, 1.0, 0.0])


def test_bertscore_equals_the_package_of_its_authors(encoder: Path) -> None:
    scorer = pytest.importorskip("bert_score").BERTScorer(model_type=str(encoder), num_layers=2, device="cpu")
    pairs = [("no effusion", "large heart effusion"), ("clear lungs", "lungs clear"), ("heart", "no effusion heart")]
    _, _, expected = scorer.score([prediction for prediction, _ in pairs], [reference for _, reference in pairs])
    assert bertscore_f1(pairs, encoder, layer=2, device="cpu") == approx(expected.tolist())


def test_bertscore_without_a_local_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Give a local one"):
        bertscore_f1([("a", "b")], tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no encoder"):
        bertscore_f1([("a", "b")], tmp_path)

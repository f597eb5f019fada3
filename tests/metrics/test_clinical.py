from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from normtune.errors import InputError
from normtune.metrics.bertscore import bertscore_f1
from normtune.metrics.clinical import (
    chexbert_labels,
    finding_table,
    label_metrics,
    radgraph_metrics,
    rules_metrics,
)
from normtune.metrics.finding_rules import FINDINGS, Status

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "effusion", "heart", "large", "clear", "lungs"]


def labels(**held: Status) -> dict[str, Status]:
    named: dict[str, Status] = {name.replace("_", " "): status for name, status in held.items()}
    return {name: named.get(name, "absent") for name in FINDINGS}


SAID = {"a": labels(Edema="positive", Fracture="positive"), "b": labels(Atelectasis="uncertain")}
MEANT = {"a": labels(Edema="positive"), "b": labels(Atelectasis="positive", Consolidation="positive")}


def test_label_f1_by_hand() -> None:
    """True: Edema, Atelectasis; false: Fracture; missed: Consolidation."""
    found = {name: metric.overall() for name, metric in label_metrics(SAID, MEANT, "x").items()}
    assert found == pytest.approx(
        {
            "x_f1_micro_14": 2 * 2 / (2 * 2 + 1 + 1),
            "x_f1_macro_14": 2 / 14,
            "x_f1_micro_5": 4 / 5,
            "x_f1_macro_5": 2 / 5,
        }
    )


def test_uncertain_labels_can_count_as_negative() -> None:
    found = label_metrics(SAID, MEANT, "x", uncertain="negative")
    assert found["x_f1_micro_5"].overall() == pytest.approx(2 * 1 / (2 * 1 + 0 + 2))


def test_the_table_of_findings_by_hand() -> None:
    table = finding_table(SAID, MEANT)
    assert tuple(table) == FINDINGS
    assert table["Edema"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "predictions": 1, "references": 1}
    assert table["Fracture"] == {"precision": 0, "recall": 0, "f1": 0, "predictions": 1, "references": 0}
    assert table["Consolidation"]["references"] == 1 and table["Consolidation"]["recall"] == 0


def test_label_f1_equals_what_scikit_learn_defines() -> None:
    """Micro is of pooled counts and macro the plain mean, from a matrix of random labels."""
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(40, 14, generator=draw) < 0.3 for _ in range(2))

    def named(matrix: torch.Tensor) -> dict[str, dict[str, Status]]:
        return {
            str(at): {n: "positive" if on else "absent" for n, on in zip(FINDINGS, row, strict=True)}
            for at, row in enumerate(matrix.tolist())
        }

    found = {n: m.overall() for n, m in label_metrics(named(ours), named(theirs), "x").items()}
    true, false, missed = (each.sum(0).double() for each in (ours & theirs, ours & ~theirs, ~ours & theirs))
    f1 = 2 * true / (2 * true + false + missed)
    assert found["x_f1_macro_14"] == pytest.approx(float(f1.mean()))
    assert found["x_f1_micro_14"] == pytest.approx(
        float(2 * true.sum() / (2 * true.sum() + false.sum() + missed.sum()))
    )


def test_rules_label_reports_end_to_end() -> None:
    texts = {"a": ("Cardiomegaly.", "The heart is enlarged."), "b": ("Clear.", "Small pleural effusion.")}
    found = rules_metrics(texts)
    assert found["findings_rules_f1_micro_5"].overall() == pytest.approx(2 / 3)


def chexbert_folder(folder: Path) -> tuple[BertModel, torch.nn.ModuleList]:
    """A checkpoint in CheXbert's layout, with a tiny BERT of random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=32,
    )
    bert = BertModel(config).eval()
    heads = torch.nn.ModuleList(torch.nn.Linear(64, 4) for _ in range(13))
    heads.append(torch.nn.Linear(64, 2))
    state = {f"module.bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    state |= {f"module.linear_heads.{name}": tensor for name, tensor in heads.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 1}, folder / "chexbert.pth")
    (folder / "vocab.txt").write_text("\n".join(VOCAB))
    return bert, heads


def test_chexbert_labels_are_those_of_its_weights(tmp_path: Path) -> None:
    """In one batch and of other lengths; class 1 is positive, 2 negative, 3 uncertain, 0 not mentioned."""
    bert, heads = chexbert_folder(tmp_path)
    texts = {"a": ("no effusion", "heart large"), "b": ("lungs\n clear no effusion", "")}
    said, meant = chexbert_labels(texts, tmp_path, device="cpu")
    ids = {"a": [2, 5, 6, 3], "b": [2, 10, 9, 5, 6, 3]}
    for id, row in ids.items():
        first = bert(torch.tensor([row])).last_hidden_state[:, 0]
        classes = [int(head(first).argmax()) for head in heads]
        status = ["absent", "positive", "negative", "uncertain"]
        assert said[id] == {name: status[at] for name, at in zip(FINDINGS, classes, strict=True)}
    assert set(meant) == {"a", "b"}


def test_chexbert_without_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"CheXbert needs .*chexbert\.pth, which is not there"):
        chexbert_labels({"a": ("x", "y")}, tmp_path)
    (tmp_path / "chexbert.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    with pytest.raises(InputError, match=r"is not CheXbert's checkpoint"):
        chexbert_labels({"a": ("x", "y")}, tmp_path)


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
    found = radgraph_metrics({"a": ("x", "x"), "b": ("x", "y")})
    assert found["radgraph_f1_partial"].by_row() == {"a": 1.0, "b": 0.0}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(VOCAB))
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_bertscore_matches_words_by_their_best_cosine(encoder: Path) -> None:
    """Against loops over the hidden states; special tokens may be matched with but are not scored."""
    model = BertModel.from_pretrained(encoder).eval()
    said, meant = [2, 5, 6, 3], [2, 8, 7, 6, 3]
    states = [
        model(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0].detach()
        for row in (said, meant)
    ]
    ours, theirs = (state / state.norm(dim=1, keepdim=True) for state in states)
    cosine = ours @ theirs.T
    precision = float(torch.stack([cosine[i].max() for i in (1, 2)]).mean())
    recall = float(torch.stack([cosine[:, j].max() for j in (1, 2, 3)]).mean())
    expected = 2 * precision * recall / (precision + recall)
    pairs = [("no effusion", "large heart effusion"), ("clear", "clear"), ("", "clear")]
    found = bertscore_f1(pairs, encoder, layer=2, device="cpu")
    assert found == pytest.approx([expected, 1.0, 0.0], abs=1e-5)


def test_bertscore_without_a_local_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Give a local one"):
        bertscore_f1([("a", "b")], tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no encoder"):
        bertscore_f1([("a", "b")], tmp_path)

"""The report task in every family: one report for two views of a study."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from normtune import cli, describe
from normtune.data import tasks
from normtune.data.groups import Group
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.models.families.miss import MissFamily
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.support.tiny_miss import save_tiny_miss
from tests.support.tiny_models import MORE, TINY, make_tiny
from tests.support.tolerance import MODEL_TERMS, assert_close, differ

FAMILIES = ("miss", *TINY, *MORE)
REPORT = "The heart is normal in size. A fracture of the left rib."


@cache
def view(name: str) -> Image.Image:
    """Noise; each view has another size."""
    width, height = {"frontal": (40, 48), "lateral": (48, 40), "another": (48, 40)}[name]
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator).to(torch.uint8).numpy())


def write(kind: str, directory: Path) -> Path:
    if kind == "miss":
        return save_tiny_miss(directory)
    make_tiny(kind, directory)
    return directory


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return load(str(write(request.param, tmp_path_factory.mktemp(request.param))))


def batch(family: Family, *studies: tuple[str, ...]) -> dict[str, Any]:
    groups = [Group(views, (family.tokenize(str(i), "", REPORT, report=True),)) for i, views in enumerate(studies)]
    return family.collate(groups, [[family.preprocess_image(view(name)) for name in views] for views in studies])


@torch.no_grad()
def log_prob(family: Family, *studies: tuple[str, ...]) -> Tensor:
    return family.log_probs(batch(family, *studies))


def written(family: Family, *studies: tuple[str, ...]) -> list[str]:
    groups = [Group(views, (family.tokenize(str(i), "", None, report=True),)) for i, views in enumerate(studies)]
    pixels = [[family.preprocess_image(view(name)) for name in views] for views in studies]
    return [answers[0].text for answers in family.generate_answers(groups, pixels, max_new_tokens=6)]


def test_every_view_of_a_study_is_seen(family: Family) -> None:
    terms = MODEL_TERMS
    if family.model.config.model_type == "mllama":  # a gate of one value lets little of an image through
        family.model.double()
        terms = 1  # the result alone is rounded to fp32
    both = log_prob(family, ("frontal", "lateral"))
    for other in (("frontal", "another"), ("another", "lateral"), ("frontal",)):
        assert differ(both, log_prob(family, other), terms=terms), other
    family.model.float()


def test_studies_of_one_and_of_two_views_share_a_batch(family: Family) -> None:
    studies = [("frontal", "lateral"), ("another",), ("lateral", "frontal")]
    single = torch.cat([log_prob(family, study) for study in studies])
    assert_close(log_prob(family, *studies), single)
    assert written(family, *studies) == [written(family, study)[0] for study in studies]


def test_both_views_reach_the_gradients(family: Family) -> None:
    gradients = []
    for study in (("frontal", "lateral"), ("frontal",)):
        family.model.zero_grad()
        family.loss(batch(family, study))[0].backward()
        study_gradients = {name: p.grad.clone() for name, p in family.model.named_parameters() if p.grad is not None}
        gradients.append(study_gradients)
    assert any("norm" in name for name in gradients[0])
    assert any(differ(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_every_family_asks_for_a_report_in_the_same_words(family: Family) -> None:
    assert family.tokenize("x", "", None, report=True) == family.tokenize("x", tasks.REPORT_PROMPT, None, report=True)


def test_a_long_reference_is_truncated_to_the_limit_of_model_and_task(family: Family) -> None:
    positions = None
    if isinstance(family, MissFamily):
        positions = family.config.text("decoder").max_position_embeddings
    segment = family.tokenize("x", "", "heart " * 2000, report=True)
    limit = (
        tasks.MAX_REPORT_REFERENCE_TOKENS
        if positions is None
        else min(positions - 1, tasks.MAX_REPORT_REFERENCE_TOKENS)
    )
    assert len(segment.answer) == limit
    whole = family.tokenize_whole("x", "", "heart " * 2000).answer
    assert segment.answer == whole[:limit]  # without the end token: the model does not learn to stop there
    if positions is not None:  # and it can be learned: this was an index error
        pixels = [[family.preprocess_image(view("frontal"))]]
        family.loss(family.collate([Group(("frontal",), (segment,))], pixels))


@pytest.fixture(scope="module")
def openi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Studies of a frontal and a lateral film in R2Gen's layout."""
    root = tmp_path_factory.mktemp("openi")
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for number, split in enumerate(("train", "train", "val", "test")):
        id = f"CXR{number}_IM-0001"
        (root / "images" / id).mkdir(parents=True)
        for place, name in enumerate(("frontal", "lateral")):
            view(name).rotate(number).save(root / "images" / id / f"{place}.png")
        paths = [f"{id}/0.png", f"{id}/1.png"]
        splits[split].append({"id": id, "report": REPORT, "image_path": paths, "split": split})
    (root / "annotation.json").write_text(json.dumps(splits))
    return root


@pytest.mark.parametrize("kind", ["miss", "llava"])
def test_a_study_of_two_views_is_learned_evaluated_and_described(
    kind: str, openi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = write(kind, tmp_path / "model"), tmp_path / "adapter"
    named: dict[str, Any] = {"model": str(model), "data": "openi", "root": openi, "device": "cpu"}
    trained = train(TrainConfig(tune="ln", out=adapter, epochs=1, batch=2, **named))
    assert trained.pairs == 2 and trained.changed > 0.5
    evaluate_config(EvaluateConfig(adapter=adapter, out=tmp_path / "out", max_new_tokens=6, **named))
    row = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())
    files = [openi / "images" / "CXR3_IM-0001" / name for name in ("0.png", "1.png")]
    assert len(row["images"]) == 2
    answer = describe(str(model), files, adapter=adapter, max_new_tokens=6, device="cpu")
    assert answer.text == row["prediction"]
    options = [word for file in files for word in ("--image", str(file))]
    arguments = ["describe", str(model), *options, "--adapter", str(adapter), "--max-new-tokens", "6", "--json"]
    assert cli.app(arguments, standalone_mode=False) is None
    output = json.loads(capsys.readouterr().out)
    assert output["report"] == answer.text and output["images"] == [str(file) for file in files]

"""Model types without a family of their own: two of transformers that no file of the package names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from normtune.adapters.merge import merge_to_disk
from normtune.adapters.storage import load_model
from normtune.data.groups import Group
from normtune.data.registry import open_dataset
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate
from normtune.inference.ask import ask
from normtune.models.causal import family as causal_family
from normtune.models.causal import self_test
from normtune.models.causal.self_test import small_config
from normtune.models.families.generic import GenericFamily
from normtune.models.loading import load
from normtune.serving.engine.engine import Engine
from normtune.training.config import TrainConfig
from normtune.training.inspection import inspect_model, inspect_text
from normtune.training.train import train
from tests.models.families.test_families import (
    GROUPINGS,
    PAIRS,
    assert_same_gradients,
    conversation,
    gradients,
    grouped,
    plain_loss,
    transformers_answer,
    turns,
    with_image,
)
from tests.support.base_models import input_error
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import approx, assert_close, relative_bound
from tests.support.unknown_models import UNKNOWN, make_unknown

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
PASSES = {"aya_vision": True, "glm46v": False, "qwen4_exp": False}
DATA = "phantom-b:2"
SOURCE = Path(self_test.__file__).parents[2]


@pytest.fixture(scope="module", params=UNKNOWN)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GenericFamily]:
    loaded = load(str(make_unknown(request.param, tmp_path_factory.mktemp(request.param))))
    assert isinstance(loaded, GenericFamily)
    yield loaded


def test_no_file_of_the_package_names_them() -> None:
    code = "".join(path.read_text() for path in SOURCE.rglob("*.py"))
    assert not [name for name in UNKNOWN if name in code]


def test_the_self_test_decides_about_grouping(family: GenericFamily) -> None:
    result = family.self_test
    assert result is not None and result.passed == family.grouped == PASSES[result.model_type]
    if result.model_type == "qwen4_exp":
        assert "layers of kind indexed_attention" in (result.reason or "") and result.loss_error is None
        return
    assert result.loss_error is not None and result.gradient_error is not None
    if result.passed:
        assert max(result.loss_error, result.gradient_error) < self_test.TOLERANCE
        assert "passed" in result.text() and result.reason is None
    else:
        assert result.loss_error > 100 * self_test.TOLERANCE
        assert result.text().endswith("every question is computed alone, which is slower.")


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_loss_and_gradients_are_those_of_transformers(family: GenericFamily, grouping: str) -> None:
    groups, pixels = grouped(family, GROUPINGS[grouping])
    batch = family.collate(groups, pixels)
    loss, tokens = family.loss(batch)
    losses = torch.stack([plain_loss(family, i) for i in range(len(PAIRS))])
    expected = gradients(family, losses.sum())
    assert tokens == sum(conversation(family, i)[1] for i in range(len(PAIRS)))
    assert float(loss.detach()) == approx(float(losses.detach().sum()))
    assert_same_gradients(gradients(family, loss), expected)
    with torch.inference_mode():
        assert_close(family.log_probs(batch), -losses.detach()[[*chain(*GROUPINGS[grouping])]])
    if family.grouped:  # an image is one row of tokens for all its questions
        assert len(batch["input_ids"]) == len(groups)


def test_turns_of_conversations_too(family: GenericFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    with_image(monkeypatch, "c")
    group, pixels, histories = turns(family)
    with torch.inference_mode():
        losses = torch.stack([plain_loss(family, i, histories[i]) for i in (2, 0, 5, 1)])
        assert_close(family.log_probs(family.collate([group], [pixels])), -losses)


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_those_of_transformers(family: GenericFamily, beams: int) -> None:
    groups, pixels = grouped(family, GROUPINGS["mixed order"], answered=False)
    streamed: dict[int, list[int]] = {}

    def on_tokens(answers: Any, tokens: Any) -> None:
        for answer, token in zip(answers, tokens, strict=True):
            streamed.setdefault(answer, []).append(token)

    answers = family.generate_tokens(groups, pixels, max_new_tokens=6, beams=beams, on_tokens=on_tokens)
    for i, answer in zip(chain(*GROUPINGS["mixed order"]), answers, strict=True):
        tokens, score = transformers_answer(family, i, beams, max_new_tokens=6)
        assert answer.tokens == tokens
        assert answer.score == approx(score)
    assert [*map(tuple, streamed.values())] == ([answer.tokens for answer in answers] if beams == 1 else [])


@pytest.mark.parametrize("name", UNKNOWN)
def test_it_is_trained_evaluated_asked_and_merged(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_unknown(name, base)
    result = train(
        TrainConfig(
            model=str(base), data=DATA, out=adapter, tune="ln", limit=4, max_steps=2, batch=4, lr=0.05, device="cpu"
        )
    )
    assert result.steps == 2 and result.changed > 0.5
    assert f"type '{name}' has no family of its own" in capsys.readouterr().err
    recorded = json.loads((adapter / "adapter.json").read_text())["metrics"]["self_test"]
    assert recorded["model_type"] == name and recorded["passed"] == PASSES[name]

    tuned = load_model(str(base), adapter, device="cpu")
    assert isinstance(tuned, GenericFamily)
    options = EvaluateConfig(model=str(base), data=DATA, out=tmp_path / "run", max_new_tokens=3)
    run = evaluate(tuned, open_dataset(DATA).test[:4], options)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["self_test"] == recorded
    assert len(run.predictions) == 4
    groups, pixels = grouped(tuned, [[3]], answered=False)
    (tokens,) = (answer.tokens for answer in tuned.generate_tokens(groups, pixels, max_new_tokens=3, beams=1))
    assert tokens == transformers_answer(tuned, 3, 1, max_new_tokens=3)[0]
    answers = ask(tuned, images=[Image.new("RGB", (40, 40))], questions=["Which organ is abnormal?"], max_new_tokens=3)
    assert len(answers) == 1

    merge_to_disk(str(base), adapter, tmp_path / "merged")
    merged, _ = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    inputs, _ = conversation(tuned, 0)
    with torch.no_grad():
        assert_close(merged(**inputs).logits, tuned.model(**inputs).logits)


def test_a_mask_under_which_questions_see_each_other_is_noticed(
    family: GenericFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense_mask = causal_family.dense_mask

    def causal(*args: Any, **options: Any) -> torch.Tensor:
        return torch.ones_like(dense_mask(*args, **options)).tril()

    if not family.grouped:
        pytest.skip("it is not grouped with the right mask either")
    monkeypatch.setattr(self_test, "_results", {})
    monkeypatch.setattr(causal_family, "dense_mask", causal)
    result = self_test.run_self_test(GenericFamily, family.model, family.processor)
    assert not result.passed and result.loss_error is not None and result.loss_error > 1000 * relative_bound()


def test_an_error_in_the_self_test_is_its_reason(family: GenericFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AttributeError("this cache has no columns\nmore")

    monkeypatch.setattr(self_test, "_results", {})
    monkeypatch.setattr(self_test, "_compare", fails)
    result = self_test.run_self_test(GenericFamily, family.model, family.processor)
    assert not result.passed
    assert (result.reason or "").startswith("AttributeError: ") or not family.grouped
    monkeypatch.setattr(self_test, "_results", {})
    monkeypatch.setattr(self_test, "small_config", fails)
    result = self_test.run_self_test(GenericFamily, family.model, family.processor)
    assert result.reason == "no small model of this type could be made: AttributeError: this cache has no columns"


def test_inspect_shows_the_self_test(family: GenericFamily, tmp_path: Path) -> None:
    report = inspect_model(family.source)
    assert report["self_test"]["passed"] == family.grouped
    assert f"type '{family.config.model_type}' has no family of its own" in inspect_text(report)
    assert "self_test" not in inspect_model(str(make_tiny("llava", tmp_path)))


@pytest.mark.parametrize("name", ["aya_vision", "glm46v"])
def test_a_large_config_becomes_a_small_model(name: str) -> None:
    config = AutoConfig.for_model(name)
    if name == "aya_vision":  # the default of transformers has a width that its heads do not divide
        config.vision_config.num_attention_heads = 16
    small = small_config(config, narrow=True)
    with torch.device("meta"):
        large_model, model = (AutoModelForImageTextToText.from_config(each) for each in (config, small))
    size, large_size = (sum(p.numel() for p in each.parameters()) for each in (model, large_model))
    assert size < self_test.MAX_PARAMETERS < large_size
    text = small.get_text_config()
    kinds = getattr(text, "layer_types", None)
    assert text.num_hidden_layers >= self_test.LAYERS and (kinds is None or len(kinds) == text.num_hidden_layers)
    if kinds is not None:
        assert set(kinds) == set(config.get_text_config().layer_types)
    if getattr(text, "sliding_window", None) is not None:
        assert text.sliding_window <= self_test.WINDOW


def test_several_images_are_refused(family: GenericFamily) -> None:
    segment = family.tokenize("1", "What changed?", "nothing")
    pixels = family.preprocess_image(Image.new("RGB", (40, 40)))
    message = input_error(lambda: family.collate([Group(("a", "b"), (segment,))], [[pixels, pixels]]))
    assert "a question is about one image" in message


def test_a_model_that_computes_no_batches_is_not_served(family: GenericFamily) -> None:
    if family.grouped:
        Engine(family).close()
    else:
        assert "cannot be served" in input_error(lambda: Engine(family))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "hulu", "auto_map": {"AutoModel": "model.Hulu"}}, "Normtune never runs such code"),
        ({"model_type": "hulu"}, "the installed transformers does not have"),
        ({"model_type": "bert"}, "no model that answers questions about images"),
    ],
)
def test_what_cannot_be_loaded_is_explained(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert reason in input_error(lambda: load(str(tmp_path)))


def test_an_encoder_decoder_and_a_model_without_an_image_token_are_refused() -> None:
    class Model:
        config = AutoConfig.for_model("florence2")

    with pytest.raises(InputError, match="type 'florence2' needs a family of its own, since it has an encoder-decoder"):
        GenericFamily(Model(), None)  # type: ignore[arg-type]
    Model.config = AutoConfig.for_model("aya_vision")
    with pytest.raises(InputError, match="it has no image token"):
        GenericFamily(Model(), object())  # type: ignore[arg-type]
    processor = UNKNOWN["aya_vision"]()[1]
    processor.chat_template = None
    with pytest.raises(InputError, match="it has no chat template"):
        GenericFamily(Model(), processor)  # type: ignore[arg-type]

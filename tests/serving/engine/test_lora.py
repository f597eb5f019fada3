"""LoRA adapters, norm adapters and the base share batches, and each answers exactly as it would alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.multi.lora import MultiAdapterLoRA
from normtune.adapters.storage import INFO_FILE, load_adapter
from normtune.data.groups import Group
from normtune.methods.adapt import adapt, restore_base
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.models.types import Answer
from normtune.serving.engine.engine import Engine
from normtune.serving.engine.requests import Reply, Request
from tests.models.families.test_families import image
from tests.serving.engine.test_engine import (
    WAIT,
    answer_with,
    end_often,
    record_logits,
    request,
    write_adapter,
    write_adapters,
)
from tests.support.base_models import input_error
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import approx, assert_close

RANK = 4
MAX_TOKENS = 10
RECIPES = {
    "miss": (
        "ln",
        "encoder=lora(r=2,alpha=3)+ln,decoder=lora(r=4,alpha=4)",
        "vision=lora(r=1,alpha=1)",
        "decoder=lora(r=3,alpha=6)",
        "encoder=lora(r=4,alpha=2)[1:]",
    ),
    "llava": (
        "ln",
        "language=lora(r=4,alpha=4)",
        "vision=lora(r=2,alpha=2),language=lora(r=1,alpha=1)",
        "language=lora(r=3,alpha=6)[:1]+ln",
        "language=lora(r=2,alpha=2)",
    ),
}


@pytest.mark.parametrize("kind", ["miss", "llava"])
def test_a_batch_of_lora_and_norm_adapters_and_the_base_equals_each_alone(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA of all supported ranks, in all parts, in some layers; the answers have different lengths."""
    adapter_count = 20
    source = base if kind == "miss" else make_tiny(kind, tmp_path / "base")
    family, single = load(str(source)), load(str(source))
    for model in (family, single):
        end_often(model, monkeypatch)
    gathered_calls: list[int] = []
    forward_rows = MultiAdapterLoRA.forward_rows
    monkeypatch.setattr(
        MultiAdapterLoRA, "forward_rows", lambda self, *args: gathered_calls.append(1) or forward_rows(self, *args)
    )
    batch_steps, single_steps = record_logits(family), record_logits(single)
    expected_of_base: tuple[Answer, list[Tensor]] = (
        answer_with(single, adapter_count, max_new_tokens=MAX_TOKENS),
        [*single_steps],
    )

    def answer_alone(number: int) -> None:
        single_steps.clear()
        expected_of_adapters[number] = answer_with(single, number, max_new_tokens=MAX_TOKENS), [*single_steps]

    expected_of_adapters: dict[int, tuple[Answer, list[Tensor]]] = {}
    adapter_folders = write_adapters(single, RECIPES[kind], adapter_count, tmp_path, answer_alone)
    expected = [*(expected_of_adapters[number] for number in range(adapter_count)), expected_of_base]
    with Engine(family, max_batch=adapter_count + 1, max_wait=WAIT, lora_rank=RANK) as engine:
        for number, folder in enumerate(adapter_folders):
            engine.register(str(number), folder)
        names = [*map(str, range(adapter_count)), None]
        futures = [engine.submit(request(number, name, max_new_tokens=MAX_TOKENS)) for number, name in enumerate(names)]
        replies = [future.result(WAIT) for future in futures]
        stats = engine.stats()
    assert (stats.batches, stats.requests, stats.loaded) == (1, adapter_count + 1, adapter_count) and gathered_calls
    for reply, (answer, _) in zip(replies, expected, strict=True):
        assert reply.text == answer.text and reply.score == approx(answer.score)
    # The base's rows come first in a batch, because its slot is the first.
    rows = [expected_of_base[1], *(steps for _, steps in expected[:-1])]
    assert len(batch_steps) == max(map(len, rows)) > 1
    for step, logits in enumerate(batch_steps):
        expected_logits = torch.cat([row[step] for row in rows if len(row) > step])
        assert_close(logits, expected_logits)
    assert len({reply.text for reply in replies}) > adapter_count // 4 and len({*map(len, rows)}) > 1
    assert not any(isinstance(module, MultiAdapterLoRA) for module in family.model.modules())


@pytest.fixture(scope="module")
def adapter_folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_adapters(load(str(base)), RECIPES["miss"], 5, tmp_path_factory.mktemp("adapters"))


def answer_about_study(family: Family, folder: Path | None, views: tuple[str, ...], **options: Any) -> Answer:
    """Return the answer about a study by one adapter, or by the base."""
    tuned = None if folder is None else load_adapter(family.model, folder)
    group = Group(views, (family.tokenize("q", "Is there a fracture?", None),))
    answer = family.generate_answers([group], [[family.preprocess_image(image(view)) for view in views]], **options)[0][
        0
    ]
    if tuned is not None:
        restore_base(tuned)
    return answer


@pytest.mark.parametrize("beams", [1, 3])
def test_adapters_that_share_a_study_use_their_own_keys_and_values(
    beams: int, family: Family, adapter_folders: list[Path]
) -> None:
    """MISS's text encoder computes keys and values of a study once per adapter, with that adapter's LoRA."""
    studies = [("a",), ("a", "b"), ("a",)]
    requests = [(folder, views) for views in studies for folder in (None, *adapter_folders)]
    replies: list[Reply] = []
    with Engine(family, max_batch=len(requests), max_wait=WAIT, lora_rank=RANK) as engine:
        for folder in adapter_folders:
            engine.register(folder.name, folder)
        futures = [
            engine.submit(
                Request(
                    tuple(map(image, views)),
                    "Is there a fracture?",
                    None if folder is None else folder.name,
                    max_new_tokens=5,
                    beams=beams,
                )
            )
            for folder, views in requests
        ]
        replies = [future.result(WAIT) for future in futures]
        assert engine.stats().batches == 1
    expected = {key: answer_about_study(family, *key, max_new_tokens=5, beams=beams) for key in dict.fromkeys(requests)}
    for reply, key in zip(replies, requests, strict=True):
        answer = expected[key]
        assert reply.text == answer.text and reply.score == approx(answer.score)
    assert len({reply.text for reply in replies}) > 3


def test_a_reused_slot_has_no_values_of_the_evicted_adapter(family: Family, adapter_folders: list[Path]) -> None:
    """One slot besides the base's, which norm and LoRA adapters use in turn."""
    with Engine(family, lora_rank=RANK, max_wait=0) as engine:
        adapter_bytes = engine.register("any", adapter_folders[0]).bytes
    with Engine(family, lora_rank=RANK, max_wait=0, adapter_memory=2 * adapter_bytes) as engine:
        for folder in adapter_folders:
            engine.register(folder.name, folder)
        order = [1, 0, 3, 2, 0, 4, 0]
        texts = [engine.submit(request(0, adapter_folders[index].name)).result(WAIT).text for index in order]
        stats = engine.stats()
    assert (stats.evictions, stats.loaded, stats.adapter_bytes) == (len(order) - 1, 1, adapter_bytes)
    for index, text in zip(order, texts, strict=True):
        tuned = load_adapter(family.model, adapter_folders[index])
        assert answer_with(family, 0).text == text
        restore_base(tuned)
    assert "too small" in input_error(lambda: Engine(family, lora_rank=RANK, adapter_memory=adapter_bytes))
    assert not any(isinstance(module, MultiAdapterLoRA) for module in family.model.modules())


def edited(folder: Path, out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Copy an adapter with a changed `adapter.json`."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    info = json.loads((out / INFO_FILE).read_text())
    edit(info)
    (out / INFO_FILE).write_text(json.dumps(info))
    return out


def test_lora_adapters_that_do_not_fit_are_rejected_with_a_message(
    family: Family, base: Path, adapter_folders: list[Path], tmp_path: Path
) -> None:
    base_fingerprint = fingerprint(family.model)
    large = write_adapter(
        adapt(load(str(base)).model, f"decoder=lora(r={RANK + 1})"), tmp_path / "large", base_fingerprint, 0
    )
    other = write_adapter(adapt(load(str(base)).model, "decoder=attention"), tmp_path / "other", base_fingerprint, 0)
    dora = write_adapter(
        adapt(load(str(base)).model, f"decoder=lora(r={RANK},dora=1)"), tmp_path / "dora", base_fingerprint, 0
    )

    def missing_matrix(info: dict[str, Any]) -> None:
        del info["tensors"][next(name for name in info["tensors"] if name.endswith("lora_B"))]

    def other_layer(info: dict[str, Any]) -> None:
        name = next(name for name in info["tensors"] if name.endswith("lora_A"))
        info["tensors"]["text_decoder.cls.lora_A"] = info["tensors"].pop(name)

    def wrong_shape(info: dict[str, Any]) -> None:
        next(tensor for name, tensor in info["tensors"].items() if name.endswith("lora_A"))["shape"][1] -= 1

    with Engine(family, lora_rank=RANK) as engine:
        error = input_error(lambda: engine.register("large", large))
        assert f"rank {RANK + 1}, and there is room for {RANK}" in error and "--lora-rank" in error
        assert "it has a DoRA" in input_error(lambda: engine.register("dora", dora))
        error = input_error(lambda: engine.register("other", other))
        assert "by attention, but only norms and LoRA can be served" in error
        for edit, message in (
            (missing_matrix, "one matrix is missing"),
            (other_layer, "no query or value projection"),
            (wrong_shape, "of another shape"),
            (lambda info: info.update(recipe="decoder=ln"), "has no lora in part"),
        ):
            folder = edited(adapter_folders[3], tmp_path / message, edit)
            assert message in input_error(lambda folder=folder: engine.register("odd", folder))
        assert engine.adapters() == []
    with Engine(family) as engine:
        error = input_error(lambda: engine.register("lora", adapter_folders[3]))
    assert "but only norms can be served" in error and "--lora-rank" in error

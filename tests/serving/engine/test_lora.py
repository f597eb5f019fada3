"""LoRA adapters, norm adapters and the base share batches, and each answers as by itself."""

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
from normtune.models.causal.family import CausalFamily
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.models.types import Answer
from normtune.serving.engine.engine import Engine
from normtune.serving.engine.requests import Reply, Request
from tests.models.families.test_families import image
from tests.serving.engine.test_engine import TOLERANCE, WAIT, alone, logits_of, request, write, write_all
from tests.support.base_models import outcome
from tests.support.tiny_models import make_tiny

RANK = 4
LONG = 10  # tokens
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
    """Of all ranks up to the room that there is, in all parts, in some layers; answers differ in length."""
    many = 20
    source = base if kind == "miss" else make_tiny(kind, tmp_path / "base")
    family, single = load(str(source)), load(str(source))
    for one in (family, single):  # ends that they come to
        if isinstance(one, CausalFamily):
            one.ends = tuple(range(0, one.vocabulary, 4))
        else:
            one.model.config.eos_token_id = one.processor.tokenizer.vocab["kind"]
    gathered: list[int] = []
    of_each = MultiAdapterLoRA.forward_rows
    monkeypatch.setattr(
        MultiAdapterLoRA, "forward_rows", lambda self, *args: gathered.append(1) or of_each(self, *args)
    )
    together, apart = logits_of(family), logits_of(single)
    of_base: tuple[Answer, list[Tensor]] = (alone(single, many, max_new_tokens=LONG), [*apart])

    def met(number: int) -> None:
        apart.clear()
        found[number] = alone(single, number, max_new_tokens=LONG), [*apart]

    found: dict[int, tuple[Answer, list[Tensor]]] = {}
    folders = write_all(single, RECIPES[kind], many, tmp_path, met)
    wanted = [*(found[number] for number in range(many)), of_base]
    with Engine(family, max_batch=many + 1, max_wait=WAIT, lora_rank=RANK) as engine:
        for number, folder in enumerate(folders):
            engine.register(str(number), folder)
        names = [*map(str, range(many)), None]
        futures = [
            engine.submit(request(number, name, max_new_tokens=LONG)) for number, name in enumerate(names)
        ]
        replies = [future.result(WAIT) for future in futures]
        stats = engine.stats()
    assert (stats.batches, stats.requests, stats.loaded) == (1, many + 1, many) and gathered
    for reply, (answer, _) in zip(replies, wanted, strict=True):
        assert reply.text == answer.text and reply.score == pytest.approx(answer.score, rel=TOLERANCE)
    # the base's rows come first in a batch: its slot is the first
    rows = [of_base[1], *(steps for _, steps in wanted[:-1])]
    assert len(together) == max(map(len, rows)) > 1
    for step, logits in enumerate(together):
        own = torch.cat([row[step] for row in rows if len(row) > step])
        assert logits.shape == own.shape and float((logits - own).abs().max()) < TOLERANCE
    assert len({reply.text for reply in replies}) > many // 4 and len({*map(len, rows)}) > 1
    assert not any(isinstance(module, MultiAdapterLoRA) for module in family.model.modules())


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_all(load(str(base)), RECIPES["miss"], 5, tmp_path_factory.mktemp("adapters"))


def answered(family: Family, folder: Path | None, views: tuple[str, ...], **options: Any) -> Answer:
    """The answer about a study by one adapter, or by the base."""
    tuned = None if folder is None else load_adapter(family.model, folder)
    group = Group(views, (family.tokenize("q", "Is there a fracture?", None),))
    answer = family.generate_answers(
        [group], [[family.preprocess_image(image(view)) for view in views]], **options
    )[0][0]
    if tuned is not None:
        restore_base(tuned)
    return answer


@pytest.mark.parametrize("beams", [1, 3])
def test_studies_that_adapters_share_are_each_adapters_own(
    beams: int, family: Family, folders: list[Path]
) -> None:
    """MISS's text encoder makes keys and values of a study once: by the LoRA of whoever asks about it."""
    studies = [("a",), ("a", "b"), ("a",)]
    asked = [(folder, views) for views in studies for folder in (None, *folders)]
    replies: list[Reply] = []
    with Engine(family, max_batch=len(asked), max_wait=WAIT, lora_rank=RANK) as engine:
        for folder in folders:
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
            for folder, views in asked
        ]
        replies = [future.result(WAIT) for future in futures]
        assert engine.stats().batches == 1
    each = {one: answered(family, *one, max_new_tokens=5, beams=beams) for one in dict.fromkeys(asked)}
    for reply, one in zip(replies, asked, strict=True):
        answer = each[one]
        assert reply.text == answer.text and reply.score == pytest.approx(answer.score, rel=1e-4)
    assert len({reply.text for reply in replies}) > 3


def test_a_slot_that_held_a_lora_forgets_it(family: Family, folders: list[Path]) -> None:
    """Two slots besides the base's; norms, LoRA and norms again take the same ones in turn."""
    with Engine(family, lora_rank=RANK, max_wait=0) as engine:
        each = engine.register("any", folders[0]).bytes
    with Engine(family, lora_rank=RANK, max_wait=0, adapter_memory=2 * each) as engine:
        for folder in folders:
            engine.register(folder.name, folder)
        order = [1, 0, 3, 2, 0, 4, 0]
        texts = [engine.submit(request(0, folders[one].name)).result(WAIT).text for one in order]
        stats = engine.stats()
    assert (stats.evictions, stats.loaded, stats.adapter_bytes) == (len(order) - 1, 1, each)
    for one, text in zip(order, texts, strict=True):
        tuned = load_adapter(family.model, folders[one])
        assert alone(family, 0).text == text
        restore_base(tuned)
    assert "does not hold" in outcome(lambda: Engine(family, lora_rank=RANK, adapter_memory=each))
    assert not any(isinstance(module, MultiAdapterLoRA) for module in family.model.modules())


def edited(folder: Path, out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A delta whose `adapter.json` says something else."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    info = json.loads((out / INFO_FILE).read_text())
    edit(info)
    (out / INFO_FILE).write_text(json.dumps(info))
    return out


def test_what_there_is_no_room_for_is_refused_with_a_word(
    family: Family, base: Path, folders: list[Path], tmp_path: Path
) -> None:
    mark = fingerprint(family.model)
    large = write(adapt(load(str(base)).model, f"decoder=lora(r={RANK + 1})"), tmp_path / "large", mark, 0)
    other = write(adapt(load(str(base)).model, "decoder=attention"), tmp_path / "other", mark, 0)

    def without_one(info: dict[str, Any]) -> None:
        del info["tensors"][next(name for name in info["tensors"] if name.endswith("lora_B"))]

    def elsewhere(info: dict[str, Any]) -> None:
        name = next(name for name in info["tensors"] if name.endswith("lora_A"))
        info["tensors"]["text_decoder.cls.lora_A"] = info["tensors"].pop(name)

    def narrower(info: dict[str, Any]) -> None:
        next(one for name, one in info["tensors"].items() if name.endswith("lora_A"))["shape"][1] -= 1

    with Engine(family, lora_rank=RANK) as engine:
        said = outcome(lambda: engine.register("large", large))
        assert f"rank {RANK + 1}, and there is room for {RANK}" in said and "--lora-rank" in said
        said = outcome(lambda: engine.register("other", other))
        assert "by attention, and adapters are served together by their norms and LoRA alone" in said
        for edit, told in (
            (without_one, "one matrix is missing"),
            (elsewhere, "no query or value projection"),
            (narrower, "of another shape"),
            (lambda info: info.update(recipe="decoder=ln"), "has no lora in part"),
        ):
            folder = edited(folders[3], tmp_path / told, edit)
            assert told in outcome(lambda folder=folder: engine.register("odd", folder))
        assert engine.adapters() == []
    with Engine(family) as engine:
        said = outcome(lambda: engine.register("lora", folders[3]))
    assert "by their norms alone" in said and "--lora-rank" in said

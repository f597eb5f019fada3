"""The engine answers requests of many adapters in one batch exactly as each adapter would alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from threading import Event, current_thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normtune.adapters import storage as delta_module
from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.storage import INFO_FILE, TENSORS_FILE, load_adapter, load_model, save_adapter
from normtune.data.choices import ChoiceFormat
from normtune.data.groups import Group
from normtune.methods.adapt import TunedModel, adapt, restore_base
from normtune.models.causal.family import CausalFamily
from normtune.models.causal.image_features import FEATURES
from normtune.models.family import Family
from normtune.models.generation import generate
from normtune.models.loading import load
from normtune.models.miss import model as miss_model
from normtune.models.types import Answer, Pixels
from normtune.serving.engine import engine as engine_module
from normtune.serving.engine.adapter_slots import AdapterSlots
from normtune.serving.engine.engine import Engine
from normtune.serving.engine.requests import (
    Busy,
    Closed,
    DeviceFailed,
    Request,
    UnknownAdapter,
    UnusableAdapter,
    is_device_failure,
)
from tests.models.families.test_families import image
from tests.support.base_models import input_error
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import DISTINCT, approx, assert_close, relative_bound

MANY = 64
WAIT = 30.0  # seconds, until a batch is full or something is wrong
QUESTIONS = ("What is the modality of this image?", "Is there a fracture?", "Which organ is abnormal?")
RECIPES = {"miss": ("ln", "encoder=ln,decoder=ln", "decoder=ln"), "llava": ("ln", "language=ln")}
TOKENS = 5


def write_adapter(
    tuned: TunedModel, folder: Path, base_fingerprint: str, seed: int, on_saved: Callable[[], None] = lambda: None
) -> Path:
    """Save an adapter with values far from the base's. `on_saved` is called while the model has them."""
    generator = torch.Generator().manual_seed(seed)
    start = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    with torch.no_grad():
        for parameter in tuned.trained.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_adapter(tuned, folder, base_name="tiny", base_fingerprint=base_fingerprint)
    on_saved()
    with torch.no_grad():
        for name, parameter in tuned.trained.items():
            parameter.copy_(start[name])
    return folder


def write_adapters(
    family: Family, recipes: Sequence[str], count: int, out: Path, on_saved: Callable[[int], None] = lambda number: None
) -> list[Path]:
    """Save `count` adapters, with the recipes in turn; see `write_adapter` for `on_saved`."""
    base_fingerprint = fingerprint(family.model)
    adapter_folders = [out / str(number) for number in range(count)]
    for first, recipe in enumerate(recipes):
        tuned = adapt(family.model, recipe)
        for number in range(first, count, len(recipes)):
            write_adapter(tuned, adapter_folders[number], base_fingerprint, number, partial(on_saved, number))
        restore_base(tuned)
    return adapter_folders


def image_and_question(number: int) -> tuple[str, str]:
    """Return the image's name and the question of request `number`."""
    return "abc"[number % 3], QUESTIONS[number // 3 % 3]


def request(number: int, adapter: str | None, **options: Any) -> Request:
    name, question = image_and_question(number)
    options = {"max_new_tokens": TOKENS} | options
    return Request((image(name),), question, adapter, **options)


def answer_with(family: Family, number: int, **options: Any) -> Answer:
    """Return the answer of a model outside the engine, with the adapter that is loaded into it, if any."""
    name, question = image_and_question(number)
    group = Group((name,), (family.tokenize("q", question, None),))
    options = {"max_new_tokens": TOKENS} | options
    return family.generate_answers([group], [[family.preprocess_image(image(name))]], **options)[0][0]


def end_often(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every fourth token of the vocabulary end an answer: a random model rarely generates the end token."""
    ends = tuple(range(0, family.vocabulary, 4))
    if isinstance(family, CausalFamily):
        family.end_tokens = ends
    else:
        monkeypatch.setattr(miss_model, "generate", lambda *args, **options: generate(*args, **options | {"end": ends}))


def record_logits(family: Family) -> list[Tensor]:
    """Record the logits of the head from now on: one tensor per step, [rows, vocabulary]."""
    steps: list[Tensor] = []
    head = family.head
    assert isinstance(head, nn.Module)
    head.register_forward_hook(lambda *args: steps.append(args[2].detach().flatten(0, -2).clone()))
    return steps


@pytest.mark.parametrize("kind", ["miss", "llava"])
def test_a_batch_with_a_different_adapter_per_request_equals_each_adapter_alone(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some adapters tune norms of the image encoder; the answers have different lengths."""
    source = base if kind == "miss" else make_tiny(kind, tmp_path / "base")
    family, single = load(str(source)), load(str(source))
    for model in (family, single):
        end_often(model, monkeypatch)
    batch_steps, single_steps = record_logits(family), record_logits(single)
    expected: dict[int, tuple[Answer, list[Tensor]]] = {}

    def answer_alone(number: int) -> None:
        single_steps.clear()
        expected[number] = answer_with(single, number), [*single_steps]

    adapter_folders = write_adapters(single, RECIPES[kind], MANY, tmp_path, answer_alone)
    with Engine(family, max_batch=MANY, max_wait=WAIT) as engine:
        for number, folder in enumerate(adapter_folders):
            engine.register(str(number), folder)
        futures = [engine.submit(request(number, str(number))) for number in range(MANY)]
        replies = [future.result(WAIT) for future in futures]
        stats = engine.stats()
    assert (stats.batches, stats.requests, stats.loaded) == (1, MANY, MANY)
    for number, reply in enumerate(replies):
        answer = expected[number][0]
        assert reply.text == answer.text and reply.score == approx(answer.score)
    steps_of_rows = [expected[number][1] for number in range(MANY)]
    assert len(batch_steps) == max(map(len, steps_of_rows))
    for step, logits in enumerate(batch_steps):  # rows with answers that ended earlier are no longer in the batch
        expected_logits = torch.cat([row[step] for row in steps_of_rows if len(row) > step])
        assert_close(logits, expected_logits)
    assert len({reply.text for reply in replies}) > MANY // 4 and len({*map(len, steps_of_rows)}) > 1


@pytest.mark.parametrize("kind", ["paligemma", "qwen2_5_vl"])
def test_other_row_layouts_equal_each_adapter_alone(kind: str, tmp_path: Path) -> None:
    """One row per question, and images of several sizes; two questions about one image use one adapter."""
    source = make_tiny(kind, tmp_path / "base")
    family, single = load(str(source)), load(str(source))
    assert isinstance(family, CausalFamily) and family.shares_prefix == (kind != "paligemma")
    numbers, expected = (0, 3, 1, 2), {}
    adapter_folders = write_adapters(
        single, ["ln"], 2, tmp_path, lambda i: expected.update({(n, i): answer_with(single, n) for n in numbers})
    )
    with Engine(family, max_batch=8, max_wait=WAIT) as engine:
        for number, folder in enumerate(adapter_folders):
            engine.register(str(number), folder)
        futures = {(n, adapter): engine.submit(request(n, str(adapter))) for n in numbers for adapter in range(2)}
        for key, future in futures.items():
            reply = future.result(WAIT)
            assert reply.text == expected[key].text
            assert reply.score == approx(expected[key].score)
        assert engine.stats().batches == 1


def test_questions_after_earlier_turns_equal_those_without_an_engine(tmp_path: Path) -> None:
    family = load(str(make_tiny("qwen2_5_vl", tmp_path / "base")))
    histories = [(), (("What is the modality?", "MRI"),), (("What is the modality?", "MRI"), ("Is it normal?", "no"))]
    pixels = [family.preprocess_image(image("a"))]
    expected = [
        family.generate_answers([Group(("a",), (family.tokenize("q", "Which organ?", None, history=h),))], [pixels])
        for h in histories
    ]
    with Engine(family, max_batch=8, max_wait=WAIT / 100) as engine:
        futures = [engine.submit(Request((image("a"),), "Which organ?", history=h)) for h in histories]
        assert [future.result(WAIT).text for future in futures] == [answers[0][0].text for answers in expected]


# --- one engine of a tiny MISS ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of all norms, of the norms of encoder and decoder, of the decoder's norms, and again."""
    return write_adapters(load(str(base)), RECIPES["miss"], 6, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def gate(family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Event, Event]]:
    """Block every batch: yields (set when a batch has started, set it to release the batch)."""
    started, released, generate_answers = Event(), Event(), family.generate_answers

    def gated(*args: Any, **options: Any) -> list[list[Answer]]:
        started.set()
        assert released.wait(WAIT)
        return generate_answers(*args, **options)

    monkeypatch.setattr(family, "generate_answers", gated)
    yield started, released
    released.set()


def test_requests_share_image_encodings_and_groups(
    family: Family, adapter_folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group per adapter and image; adapters that do not change the image encoder share its output."""
    shapes: list[list[int]] = []
    images_are_shared: list[bool] = []
    generate_answers = family.generate_answers

    def record_call(groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], **options: Any) -> Any:
        shapes.append([len(group.segments) for group in groups])
        images_are_shared.append(len({id(image_states) for images in pixels for image_states in images}) == 2)
        return generate_answers(groups, pixels, **options)

    monkeypatch.setattr(family, "generate_answers", record_call)
    adapter_names = [None, "decoder", "all", "decoder", "encoder"]
    with Engine(family, max_batch=5, max_wait=WAIT) as engine:
        for name, folder in zip(("all", "encoder", "decoder"), adapter_folders, strict=False):
            engine.register(name, folder)
        numbers = (0, 0, 0, 3, 0)  # one image, two questions
        for _ in range(2):
            futures = [engine.submit(request(n, name)) for n, name in zip(numbers, adapter_names, strict=True)]
            replies = [future.result(WAIT) for future in futures]
        stats = engine.stats()
    assert shapes == [[1, 2, 1, 1], [1, 2, 1, 1]] and images_are_shared == [True, True]
    assert (stats.images_computed, stats.images_reused) == (2, 8)
    assert stats.image_bytes > 0 and stats.loads == 3
    assert 0 < stats.seconds_loading < stats.seconds_busy
    for number, name, reply in zip(numbers, adapter_names, replies, strict=True):
        model = None if name is None else adapter_folders[("all", "encoder", "decoder").index(name)]
        adapted = load_adapter(family.model, model) if model else None
        answer = answer_with(family, number)
        assert reply.text == answer.text and reply.score == approx(answer.score)
        assert reply.prompt_tokens > 10 and reply.completion_tokens == len(answer.tokens)
        if adapted:
            restore_base(adapted)


def test_views_beams_and_reports_are_answered_as_by_the_family(family: Family, adapter_folders: list[Path]) -> None:
    views = (image("a"), image("b").convert("L"))
    texts: list[str] = []
    with Engine(family, max_wait=0) as engine:
        engine.register("chest", adapter_folders[0])
        study = Request(views, None, "chest", max_new_tokens=9, beams=2)
        reply = engine.submit(study, on_text=texts.append).result(WAIT)
    load_adapter(family.model, adapter_folders[0])
    segment = family.tokenize("r", "", None, report=True)
    pixels = [family.preprocess_image(view.convert("RGB")) for view in views]
    answer = family.generate_answers([Group(("1", "2"), (segment,))], [pixels], max_new_tokens=9, beams=2)[0][0]
    assert texts == [reply.text] == [answer.text] and reply.score == approx(answer.score)


def test_options_are_written_as_in_the_adapters_training(
    family: Family, adapter_folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "inline"
    shutil.copytree(adapter_folders[0], folder)
    info = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    info["data"] = {"choices": {"prompt": "inline"}}
    (folder / "adapter.json").write_text(json.dumps(info), encoding="utf-8")
    questions: list[str] = []
    tokenize = family.tokenize

    def recording(id: str, question: str, *args: Any, **options: Any) -> Any:
        questions.append(question)
        return tokenize(id, question, *args, **options)

    monkeypatch.setattr(family, "tokenize", recording)
    monkeypatch.setattr(engine_module, "finish_answer", lambda *args: ("The answer is B.", 1, "stop"))
    with Engine(family, max_wait=0) as engine:
        engine.register("inline", folder)
        replies = [
            engine.submit(Request((image("a"),), "Where?", adapter, options=("lung", "liver"))).result(WAIT)
            for adapter in (None, "inline")
        ]
        plain = engine.submit(Request((image("a"),), "Where?")).result(WAIT)
        message = input_error(lambda: engine.submit(Request((image("a"),), "Where?", options=("lung",))))
    expected = [ChoiceFormat(prompt).write("Where?", ("lung", "liver")) for prompt in ("llava", "inline")]
    assert questions == [*expected, "Where?"]
    assert [reply.choice for reply in replies] == ["B", "B"] and plain.choice is None
    assert "two or more" in message


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["miss", "llava"])
def test_the_finish_reason_says_whether_the_answer_ended(
    kind: str, beams: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end token that is the last of the allowed tokens ends the answer."""
    family = load(str(base if kind == "miss" else make_tiny(kind, tmp_path / "base")))
    tokens = answer_with(family, 0, max_new_tokens=4, beams=beams).tokens
    segment = family.tokenize("q", image_and_question(0)[1], None)  # a prompt of MISS contains the end token
    monkeypatch.setattr(family, "tokenize", lambda *args, **options: segment)
    family.end_tokens = (tokens[2],)
    if not isinstance(family, CausalFamily):
        family.model.config.eos_token_id = tokens[2]  # type: ignore[union-attr,assignment]
    answers = [answer_with(family, 0, max_new_tokens=limit, beams=beams) for limit in (1, 2, 3, 4)]
    with Engine(family, max_wait=0) as engine:
        for limit, answer in enumerate(answers, 1):
            reply = engine.submit(request(0, None, max_new_tokens=limit, beams=beams)).result(WAIT)
            ended = answer.tokens[-1] == tokens[2]
            assert (reply.text, reply.completion_tokens) == (answer.text, len(answer.tokens))
            assert reply.finish_reason == ("stop" if ended else "length")
            assert ended == (limit > 2) or beams > 1


def test_evicted_adapters_give_the_same_answers_when_loaded_again(family: Family, adapter_folders: list[Path]) -> None:
    """Two slots besides the base's, so that no batch has more than two adapters."""
    with Engine(family, max_wait=0) as engine:
        adapter_bytes = engine.register("first", adapter_folders[0]).bytes
    with Engine(family, max_wait=0.2, adapter_memory=3 * adapter_bytes) as engine:
        for number, folder in enumerate(adapter_folders):
            engine.register(str(number), folder)
        texts_of_rounds = []
        for _ in range(2):
            futures = [engine.submit(request(0, str(number))) for number in range(6)]
            texts_of_rounds.append([future.result(WAIT).text for future in futures])
        stats, infos = engine.stats(), engine.adapters()
    assert texts_of_rounds[0] == texts_of_rounds[1] and stats.failed == 0
    assert stats.batches >= 6 and stats.loads == stats.evictions + 2 and stats.loads >= 10
    assert [info.name for info in infos if info.loaded] == ["4", "5"] and stats.adapter_bytes == 2 * adapter_bytes
    for text, folder in zip(texts_of_rounds[0], adapter_folders, strict=True):
        tuned = load_adapter(family.model, folder)
        assert answer_with(family, 0).text == text
        restore_base(tuned)
    assert "too small" in input_error(lambda: Engine(family, adapter_memory=adapter_bytes))
    assert answer_with(family, 0).text == answer_with(family, 0).text


def test_a_pinned_adapter_is_not_evicted(family: Family, adapter_folders: list[Path]) -> None:
    adapter_bytes = AdapterSlots(family.model).bytes_per_adapter
    family = load(str(family.model.name_or_path))
    adapters = AdapterSlots(family.model, 3 * adapter_bytes)
    registered = []
    for number, folder in enumerate(adapter_folders[:4]):
        adapters.register(str(number), folder)
        registered.append(adapters.find(str(number)))
    first, second, third, fourth = registered
    slot = adapters.pin(first)
    adapters.pin(second)
    adapters.unpin(second)
    assert adapters.pin(third) != slot and second.slot is None and first.slot == slot
    adapters.unpin(first)
    adapters.remove("2")
    assert third.slot is not None, "it runs"
    assert adapters.pin(fourth) == slot and first.slot is None
    adapters.unpin(third)
    assert third.slot is None and adapters.counts() == (3, 1)
    assert adapters.pin(adapters.find(None)) == 0


def test_a_full_queue_refuses_and_a_cancelled_request_leaves_it(family: Family, gate: tuple[Event, Event]) -> None:
    started, released = gate
    with Engine(family, max_batch=1, max_wait=0, queue_limit=2) as engine:
        running = engine.submit(request(0, None))
        assert started.wait(WAIT)
        waiting = [engine.submit(request(number, None)) for number in (1, 2)]
        with pytest.raises(Busy, match="2 requests are waiting"):
            engine.submit(request(3, None))
        assert waiting[0].cancel() and not running.cancel()
        waiting.append(engine.submit(request(3, None)))
        stats = engine.stats()
        assert (stats.queued, stats.running, stats.refused, stats.cancelled) == (2, 1, 1, 1)
        released.set()
        texts = [future.result(WAIT).text for future in (running, *waiting[1:])]
        with pytest.raises(CancelledError):
            waiting[0].result()
        assert engine.stats().requests == 3
    assert texts == [answer_with(family, number).text for number in (0, 2, 3)]


def test_closing_answers_or_rejects_queued_requests(
    family: Family, adapter_folders: list[Path], gate: tuple[Event, Event]
) -> None:
    started, released = gate
    before = [*map(type, family.model.modules())]
    engine = Engine(family, max_batch=2, max_wait=WAIT)
    engine.register("chest", adapter_folders[0])
    futures = [engine.submit(request(number, "chest")) for number in range(3)]
    engine.remove("chest")  # its requests were accepted before
    released.set()
    engine.close()
    assert all(future.done() and future.result().text for future in futures)
    with pytest.raises(Closed):
        engine.submit(request(0, None))
    assert [*map(type, family.model.modules())] == before and family.active_text_rows is None
    released.clear()
    started.clear()
    engine = Engine(family, max_batch=1, max_wait=0)
    running, waiting = (engine.submit(request(number, None)) for number in range(2))
    assert started.wait(WAIT)
    engine.close(timeout=0.01)  # too short to answer the queued request
    with pytest.raises(Closed):
        waiting.result(WAIT)
    released.set()
    assert running.result(WAIT).text
    engine.close()
    assert [*map(type, family.model.modules())] == before


def test_registering_a_thousand_adapters_reads_no_tensors(
    family: Family, adapter_folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / INFO_FILE).write_bytes((adapter_folders[0] / INFO_FILE).read_bytes())
    (tmp_path / TENSORS_FILE).write_bytes(b"no tensors at all")
    with Engine(family, max_wait=0) as engine:
        for number in range(1000):
            engine.register(f"clinic-{number}", tmp_path)
        stats = engine.stats()
        assert (stats.registered, stats.loaded, stats.adapter_bytes) == (1000, 0, 0)
        assert [info.name for info in engine.adapters()][::333] == [f"clinic-{i}" for i in (0, 333, 666, 999)]
        error = input_error(lambda: engine.submit(request(0, "clinic-7")).result(WAIT))
        assert "adapter 'clinic-7' cannot be loaded" in error and str(tmp_path) not in error
        loaded: list[Path] = []
        load_file = delta_module.load_file
        monkeypatch.setattr(delta_module, "load_file", lambda path: loaded.append(path) or load_file(path))
        engine.register("whole", adapter_folders[0])
        assert not loaded
        assert engine.submit(request(0, "whole")).result(WAIT).text
        assert loaded == [adapter_folders[0] / TENSORS_FILE]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("encoder=lora(r=2)", "by lora, but only norms can be served"),
        ("decoder=attention", "by attention, but only norms"),
        ("vision=ln,connector?=full,decoder=bias", "by bias, but only norms"),
    ],
)
def test_adapters_that_train_more_than_norms_are_rejected(
    recipe: str, message: str, family: Family, tmp_path: Path
) -> None:
    base_fingerprint = fingerprint(family.model)
    write_adapter(adapt(family.model, recipe), tmp_path, base_fingerprint, 0)
    with Engine(load(str(family.model.name_or_path))) as engine:
        error = input_error(lambda: engine.register("chest", tmp_path))
    assert message in error and "normtune merge" in error


def test_invalid_adapters_and_requests_are_rejected_with_a_message(
    family: Family, adapter_folders: list[Path], tmp_path: Path
) -> None:
    tuned = adapt(family.model, "ln")
    write_adapter(tuned, tmp_path / "other", "0" * 32 + "-" + "1" * 32, 0)
    restore_base(tuned)
    with Engine(family, max_wait=0) as engine:
        assert "trained on 'tiny'" in input_error(lambda: engine.register("other", tmp_path / "other"))
        assert "is missing" in input_error(lambda: engine.register("none", tmp_path / "none"))
        engine.register("chest", adapter_folders[0])
        assert "already registered" in input_error(lambda: engine.register("chest", adapter_folders[1]))
        assert "needs a name" in input_error(lambda: engine.register(" ", adapter_folders[0]))
        for call in (lambda: engine.submit(request(0, "lungs")), lambda: engine.remove("lungs")):
            with pytest.raises(UnknownAdapter, match="no adapter 'lungs'"):
                call()
        assert "has no image" in input_error(lambda: engine.submit(Request((), "?")))
        assert "stop text is empty" in input_error(lambda: engine.submit(request(0, None, stop=("",))))
        assert "at least one token" in input_error(lambda: engine.submit(request(0, None, max_new_tokens=0)))
        assert engine.has_adapter("chest")
        engine.remove("chest")
        assert engine.adapters() == [] and not engine.has_adapter("chest")


def retrain(family: Family, folder: Path, seed: int) -> None:
    """Write other values of an adapter of the decoder's norms into its folder, with a later time."""
    base_fingerprint = fingerprint(family.model)
    tuned = adapt(family.model, "decoder=ln")
    write_adapter(tuned, folder, base_fingerprint, seed)
    restore_base(tuned)
    os.utime(folder / INFO_FILE, ns=(seed, seed))


def test_an_adapter_trained_again_is_replaced_by_registering_it_again(
    base: Path, tmp_path: Path, gate: tuple[Event, Event], family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    started, released = gate
    trainer, folder = load(str(base)), tmp_path / "chest"
    scores: list[float] = []
    for seed in (1, 2):
        retrain(trainer, folder, seed)
        tuned = load_adapter(trainer.model, folder)
        scores.append(answer_with(trainer, 0).score)
        restore_base(tuned)
    assert abs(scores[0] - scores[1]) > DISTINCT * relative_bound() * abs(scores[1])
    retrain(trainer, folder, 1)
    with Engine(family, max_batch=1, max_wait=0) as engine:
        for name in ("chest", "idle"):
            engine.register(name, folder)
        running = engine.submit(request(0, "chest"))
        assert started.wait(WAIT)
        retrain(trainer, folder, 2)
        with caplog.at_level("WARNING"):
            accepted = [engine.submit(request(0, "chest")) for _ in range(2)]
            idle = engine.submit(request(0, "idle"))
            released.set()
            with pytest.raises(UnusableAdapter, match="Register it again, or restart"):
                idle.result(WAIT)
        assert caplog.text.count("files of adapter chest changed") == 1 and "idle cannot be loaded" in caplog.text
        assert [f.result(WAIT).score for f in (running, *accepted)] == [approx(scores[0])] * 3
        released.clear()
        started.clear()
        blocking, before = engine.submit(request(0, None)), engine.submit(request(0, "chest"))
        assert started.wait(WAIT)
        assert not engine.register("chest", folder / "." / ".." / "chest").loaded
        after = engine.submit(request(0, "chest"))
        released.set()
        assert blocking.result(WAIT).text is not None
        replies = [before.result(WAIT).score, after.result(WAIT).score]
        assert replies == [approx(score) for score in scores], "accepted requests use the old values"
        assert [info.name for info in engine.adapters()] == ["chest", "idle"]
        (folder / INFO_FILE).write_text("{")
        input_error(lambda: engine.register("chest", folder))
        assert engine.submit(request(0, "chest")).result(WAIT).score == approx(scores[1])


def test_a_failing_request_does_not_affect_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = load(str(make_tiny("llava", tmp_path)))

    private_text = "of Mrs Smith: "

    def failing_callback(text: str) -> None:
        raise RuntimeError(private_text + text)

    with Engine(family, max_batch=4, max_wait=WAIT) as engine:
        bad_question = engine.submit(Request((image("a"),), "Is <image> normal?", max_new_tokens=TOKENS))
        bad_callback = engine.submit(request(0, None), on_text=failing_callback)
        good = [engine.submit(request(number, None)) for number in (1, 2)]
        assert "the image token" in input_error(lambda: bad_question.result(WAIT))
        with pytest.raises(RuntimeError):
            bad_callback.result(WAIT)
        texts = [future.result(WAIT).text for future in good]
        assert (engine.stats().failed, engine.stats().batches) == (2, 1)
    assert "RuntimeError" in caplog.text and "in failing_callback" in caplog.text and "Smith" not in caplog.text
    assert texts == [answer_with(family, number).text for number in (1, 2)]


def test_a_batch_that_runs_out_of_memory_is_retried_in_halves(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_answers = family.generate_answers

    def single_group_only(groups: Sequence[Group], pixels: Any, **options: Any) -> Any:
        if len(groups) > 1:
            raise torch.OutOfMemoryError("too many")
        return generate_answers(groups, pixels, **options)

    monkeypatch.setattr(family, "generate_answers", single_group_only)
    with Engine(family, max_batch=3, max_wait=WAIT) as engine:
        futures = [engine.submit(request(number, None)) for number in range(3)]
        texts = [future.result(WAIT).text for future in futures]
        assert engine.stats().batches == 3
    assert texts == [answer_with(family, number).text for number in range(3)]


def test_a_failed_accelerator_fails_all_requests_and_closes_the_engine(
    family: Family, gate: tuple[Event, Event], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every later call would fail too, so that no batch is retried."""
    started, released = gate
    attempts: list[int] = []
    message = "CUDA error: an illegal memory access was encountered\nof Mrs Smith"
    gated = family.generate_answers

    def fail(groups: Sequence[Group], *args: Any, **options: Any) -> Any:
        attempts.append(len(groups))
        gated(groups, *args, **options)
        raise torch.AcceleratorError(message)

    monkeypatch.setattr(family, "generate_answers", fail)
    with Engine(family, max_batch=2, max_wait=0.2) as engine:
        futures = [engine.submit(request(number, None)) for number in range(2)]
        assert started.wait(WAIT)
        futures.append(engine.submit(request(2, None)))
        assert not engine.failed
        released.set()
        for future in futures:
            with pytest.raises(DeviceFailed, match="started again"):
                future.result(WAIT)
        with pytest.raises(DeviceFailed):
            engine.submit(request(3, None))
        assert engine.failed and attempts == [2]
    assert caplog.text.count("an illegal memory access") == 1 and "Smith" not in caplog.text


def test_device_failures_are_told_from_lack_of_memory_and_errors_of_requests() -> None:
    assert is_device_failure(RuntimeError("CUDA error: device-side assert triggered"))
    assert is_device_failure(torch.AcceleratorError("unspecified launch failure"))
    others = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("sizes of tensors must match")]
    others += [torch.AcceleratorError("CUDA error: out of memory"), ValueError("CUDA error")]
    assert not any(map(is_device_failure, others))


def test_the_worker_thread_uses_the_configured_device(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    engine_module._select_device(torch.device("cpu"))
    engine_module._select_device(torch.device("cuda", 1))
    assert calls == [torch.device("cuda", 1)]
    monkeypatch.setattr(engine_module, "_select_device", lambda device: calls.append((device, current_thread().name)))
    with Engine(family):
        pass
    assert calls[1:] == [(family.device, "normtune engine")]


def test_images_are_preprocessed_at_submission_and_encoded_together(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    passes: list[int] = []
    preprocess_image, encode_images = family.preprocess_image, family.encode_images

    def preprocess(picture: Any) -> Pixels:
        threads.append(current_thread().name)
        return preprocess_image(picture)

    def encode(images: Sequence[Pixels]) -> list[Pixels]:
        passes.append(len(images))
        return encode_images(images)

    monkeypatch.setattr(family, "preprocess_image", preprocess)
    monkeypatch.setattr(family, "encode_images", encode)
    with Engine(family, max_batch=4, max_wait=WAIT) as engine:
        for _ in range(2):  # the second time, the images are in the cache
            futures = [engine.submit(request(number, None)) for number in (0, 1, 2, 3)]
            texts = [future.result(WAIT).text for future in futures]
        assert (engine.stats().images_computed, engine.stats().images_reused) == (3, 5)
    assert passes == [3] and threads == [current_thread().name] * 4
    monkeypatch.undo()
    assert texts == [answer_with(family, number).text for number in (0, 1, 2, 3)]


def test_an_image_that_cannot_be_encoded_fails_alone(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_images = family.encode_images

    def encode(images: Sequence[Pixels]) -> list[Pixels]:
        if any(torch.equal(pixels["pixel_values"], bad["pixel_values"]) for pixels in images):
            raise torch.OutOfMemoryError("too large")
        return encode_images(images)

    bad = family.preprocess_image(image("b"))
    monkeypatch.setattr(family, "encode_images", encode)
    with Engine(family, max_batch=3, max_wait=WAIT) as engine:
        futures = [engine.submit(request(number, None)) for number in range(3)]
        texts = [future.result(WAIT).text for future in (futures[0], futures[2])]
        with pytest.raises(torch.OutOfMemoryError):
            futures[1].result(WAIT)
        assert engine.stats().failed == 1 and not engine.failed
    assert texts == [answer_with(family, number).text for number in (0, 2)]


@pytest.mark.parametrize(
    "kind", ["gemma3", "internvl", "llava", "llava_next", "paligemma", "qwen2_5_vl", "qwen3_vl", "smolvlm"]
)
def test_images_encoded_together_equal_those_encoded_alone(kind: str, tmp_path: Path) -> None:
    family = load(str(make_tiny(kind, tmp_path)))
    pictures = [image("a"), image("b").resize((50, 20)), image("c").resize((30, 70))]
    pixels = [family.preprocess_image(picture) for picture in pictures]
    for from_pass, image_pixels in zip(family.encode_images(pixels), pixels, strict=True):
        single = family.encode_image(image_pixels)
        assert from_pass.keys() == single.keys()
        for name, values in single.items():
            assert torch.equal(from_pass[name], values) or name.startswith(FEATURES)
            if values.is_floating_point():
                assert_close(from_pass[name], values)
            assert from_pass[name].untyped_storage().nbytes() == values.untyped_storage().nbytes()


def test_requests_with_other_limits_wait_for_the_next_batch(family: Family, gate: tuple[Event, Event]) -> None:
    """The oldest request decides the limit of the next batch, so that none waits forever."""
    started, released = gate
    with Engine(family, max_batch=4, max_wait=0) as engine:
        first = engine.submit(request(0, None))
        assert started.wait(WAIT)
        limits = (3, 5, 3, 5)
        futures = [engine.submit(request(0, None, max_new_tokens=limit)) for limit in limits]
        released.set()
        replies = [future.result(WAIT) for future in (first, *futures)]
        assert engine.stats().batches == 3
    expected = [answer_with(family, 0, max_new_tokens=limit).text for limit in limits]
    assert [reply.text for reply in replies[1:]] == expected


@pytest.mark.parametrize(("data", "limit"), [(None, 35), ({"limits": {"prompt": 12}}, 12), ({"limits": {}}, None)])
def test_questions_are_cut_as_in_the_adapters_training_and_the_reply_says_so(
    base: Path, tmp_path: Path, data: dict[str, Any] | None, limit: int | None
) -> None:
    """Adapters of version 0.1 record no limits: MISS cut their questions at 35 tokens. The base cuts none of these."""
    family = load(str(base))
    tuned = adapt(family.model, "ln")
    save_adapter(tuned, tmp_path / "a", base_name="tiny", base_fingerprint=fingerprint(family.model), data=data)
    restore_base(tuned)
    question = " ".join(["is there a mass in the left lung?"] * 6)
    whole = len(family.tokenize_whole("", question, None).prompt)
    alone = load_model(str(base), tmp_path / "a")
    assert alone.max_prompt_tokens == (limit or family.max_prompt_tokens) and 35 < whole <= family.max_prompt_tokens
    group = Group(("a",), (alone.tokenize("", question, None),))
    expected = alone.generate_answers([group], [[alone.preprocess_image(image("a"))]], max_new_tokens=TOKENS)[0][0]
    with Engine(family) as engine:
        engine.register("a", tmp_path / "a")
        of_base, of_adapter = (
            engine.submit(Request((image("a"),), question, name, TOKENS)).result(WAIT) for name in (None, "a")
        )
        assert engine.stats().questions_cut == int(limit is not None)
    assert of_adapter.question_tokens_cut == (whole - limit if limit else 0) and of_adapter.text == expected.text
    assert of_base.question_tokens_cut == 0 and of_base.prompt_tokens - of_adapter.prompt_tokens == (
        of_adapter.question_tokens_cut
    )
    assert family.prompt_limit is None

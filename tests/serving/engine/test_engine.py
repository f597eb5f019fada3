"""Requests of many adapters in one batch are answered as by each adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normtune.adapters import storage as delta_module
from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.storage import INFO_FILE, TENSORS_FILE, load_adapter, save_adapter
from normtune.data.groups import Group
from normtune.methods.adapt import TunedModel, adapt, restore_base
from normtune.models.causal.family import CausalFamily
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.models.types import Answer, Pixels
from normtune.serving.engine.adapter_slots import Adapters
from normtune.serving.engine.engine import Engine
from normtune.serving.engine.requests import Busy, Closed, Request, UnknownAdapter
from tests.models.families.test_families import image
from tests.support.base_models import outcome
from tests.support.tiny_models import make_tiny

TOLERANCE = 1e-5
MANY = 64
WAIT = 30.0  # seconds, until a batch is full or something is wrong
QUESTIONS = ("What is the modality of this image?", "Is there a fracture?", "Which organ is abnormal?")
RECIPES = {"miss": ("ln", "encoder=ln,decoder=ln", "decoder=ln"), "llava": ("ln", "language=ln")}
TOKENS = 5


def write(
    tuned: TunedModel, folder: Path, mark: str, seed: int, met: Callable[[], None] = lambda: None
) -> Path:
    """An adapter whose values are far from the base's."""
    generator = torch.Generator().manual_seed(seed)
    start = {name: one.detach().clone() for name, one in tuned.trained.items()}
    with torch.no_grad():
        for one in tuned.trained.values():
            one += 0.3 * torch.randn(one.shape, generator=generator)
    save_adapter(tuned, folder, base_name="tiny", base_fingerprint=mark)
    met()
    with torch.no_grad():
        for name, one in tuned.trained.items():
            one.copy_(start[name])
    return folder


def write_all(
    family: Family,
    recipes: Sequence[str],
    count: int,
    out: Path,
    met: Callable[[int], None] = lambda number: None,
) -> list[Path]:
    """Adapters of the recipes in turn; `met` is called while the model has the adapter's values."""
    mark, folders = fingerprint(family.model), [out / str(number) for number in range(count)]
    for first, recipe in enumerate(recipes):
        tuned = adapt(family.model, recipe)
        for number in range(first, count, len(recipes)):
            write(tuned, folders[number], mark, number, partial(met, number))
        restore_base(tuned)
    return folders


def asked(number: int) -> tuple[str, str]:
    """The image and the question of a request."""
    return "abc"[number % 3], QUESTIONS[number // 3 % 3]


def request(number: int, adapter: str | None, **options: Any) -> Request:
    name, question = asked(number)
    options = {"max_new_tokens": TOKENS} | options
    return Request((image(name),), question, adapter, **options)


def alone(family: Family, number: int, **options: Any) -> Answer:
    """The answer of a family with at most one adapter."""
    name, question = asked(number)
    group = Group((name,), (family.tokenize("q", question, None),))
    options = {"max_new_tokens": TOKENS} | options
    return family.generate_answers([group], [[family.preprocess_image(image(name))]], **options)[0][0]


def logits_of(family: Family) -> list[Tensor]:
    """The rows that the head writes from now on, a tensor a step."""
    found: list[Tensor] = []
    head = family.head
    assert isinstance(head, nn.Module)
    head.register_forward_hook(lambda *args: found.append(args[2].detach().flatten(0, -2).clone()))
    return found


@pytest.mark.parametrize("kind", ["miss", "llava"])
def test_a_batch_of_as_many_adapters_as_requests_equals_each_adapter_alone(
    kind: str, base: Path, tmp_path: Path
) -> None:
    """Vision norms are tuned in some; answers end at different lengths."""
    source = base if kind == "miss" else make_tiny(kind, tmp_path / "base")
    family, single = load(str(source)), load(str(source))
    if isinstance(family, CausalFamily) and isinstance(single, CausalFamily):
        family.ends = single.ends = tuple(range(0, family.vocabulary, 4))
    together, apart = logits_of(family), logits_of(single)
    wanted: dict[int, tuple[Answer, list[Tensor]]] = {}

    def met(number: int) -> None:
        apart.clear()
        wanted[number] = alone(single, number), [*apart]

    folders = write_all(single, RECIPES[kind], MANY, tmp_path, met)
    with Engine(family, max_batch=MANY, max_wait=WAIT) as engine:
        for number, folder in enumerate(folders):
            engine.register(str(number), folder)
        futures = [engine.submit(request(number, str(number))) for number in range(MANY)]
        replies = [future.result(WAIT) for future in futures]
        stats = engine.stats()
    assert (stats.batches, stats.requests, stats.loaded) == (1, MANY, MANY)
    for number, reply in enumerate(replies):
        answer = wanted[number][0]
        assert reply.text == answer.text and reply.score == pytest.approx(answer.score, rel=TOLERANCE)
    rows = [wanted[number][1] for number in range(MANY)]
    assert len(together) == max(map(len, rows))
    for step, found in enumerate(together):  # rows whose answers have ended have left
        own = torch.cat([row[step] for row in rows if len(row) > step])
        assert found.shape == own.shape and float((found - own).abs().max()) < TOLERANCE
    assert len({reply.text for reply in replies}) > MANY // 4 and len({*map(len, rows)}) > 1


@pytest.mark.parametrize("kind", ["paligemma", "qwen2_5_vl"])
def test_families_that_lay_rows_out_otherwise_answer_as_each_adapter_alone(kind: str, tmp_path: Path) -> None:
    """A row a question, and images of several sizes; two questions of an image are of one adapter."""
    source = make_tiny(kind, tmp_path / "base")
    family, single = load(str(source)), load(str(source))
    assert isinstance(family, CausalFamily) and family.shares_prefix == (kind != "paligemma")
    numbers, wanted = (0, 3, 1, 2), {}
    folders = write_all(
        single, ["ln"], 2, tmp_path, lambda i: wanted.update({(n, i): alone(single, n) for n in numbers})
    )
    with Engine(family, max_batch=8, max_wait=WAIT) as engine:
        for number, folder in enumerate(folders):
            engine.register(str(number), folder)
        futures = {
            (n, adapter): engine.submit(request(n, str(adapter))) for n in numbers for adapter in range(2)
        }
        for key, future in futures.items():
            reply = future.result(WAIT)
            assert reply.text == wanted[key].text
            assert reply.score == pytest.approx(wanted[key].score, rel=TOLERANCE)
        assert engine.stats().batches == 1


# --- one engine of a tiny MISS ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters: of all norms, of the encoder's and decoder's, of the decoder's, and so on."""
    return write_all(load(str(base)), RECIPES["miss"], 6, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def gate(family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Event, Event]]:
    """(set once a batch is at work, opens the way for it)."""
    begun, opened, plain = Event(), Event(), family.generate_answers

    def gated(*args: Any, **options: Any) -> list[list[Answer]]:
        begun.set()
        assert opened.wait(WAIT)
        return plain(*args, **options)

    monkeypatch.setattr(family, "generate_answers", gated)
    yield begun, opened
    opened.set()


def test_what_requests_have_in_common_is_computed_once(
    family: Family, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group an adapter and image; one look at an image for all that leave the image encoder alone."""
    shapes: list[list[int]] = []
    shared: list[bool] = []
    plain = family.generate_answers

    def noting(groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], **options: Any) -> Any:
        shapes.append([len(group.segments) for group in groups])
        shared.append(len({id(one) for images in pixels for one in images}) == 2)
        return plain(groups, pixels, **options)

    monkeypatch.setattr(family, "generate_answers", noting)
    tuned = [None, "decoder", "all", "decoder", "encoder"]
    with Engine(family, max_batch=5, max_wait=WAIT) as engine:
        for name, folder in zip(("all", "encoder", "decoder"), folders, strict=False):
            engine.register(name, folder)
        numbers = (0, 0, 0, 3, 0)  # one image, two questions
        for _ in range(2):
            futures = [engine.submit(request(n, name)) for n, name in zip(numbers, tuned, strict=True)]
            replies = [future.result(WAIT) for future in futures]
        stats = engine.stats()
    assert shapes == [[1, 2, 1, 1], [1, 2, 1, 1]] and shared == [True, True]
    assert (stats.images_computed, stats.images_reused) == (2, 8)
    assert stats.image_bytes > 0 and stats.loads == 3
    assert 0 < stats.seconds_loading < stats.seconds_busy
    for number, name, reply in zip(numbers, tuned, replies, strict=True):
        model = None if name is None else folders[("all", "encoder", "decoder").index(name)]
        adapted = load_adapter(family.model, model) if model else None
        answer = alone(family, number)
        assert reply.text == answer.text and reply.score == pytest.approx(answer.score, rel=TOLERANCE)
        assert reply.prompt_tokens > 10 and 1 <= reply.completion_tokens <= TOKENS
        if adapted:
            restore_base(adapted)


def test_views_beams_and_reports_are_answered_as_by_the_family(family: Family, folders: list[Path]) -> None:
    views = (image("a"), image("b").convert("L"))
    texts: list[str] = []
    with Engine(family, max_wait=0) as engine:
        engine.register("chest", folders[0])
        study = Request(views, None, "chest", max_new_tokens=9, beams=2)
        reply = engine.submit(study, on_text=texts.append).result(WAIT)
    load_adapter(family.model, folders[0])
    segment = family.tokenize("r", "", None, report=True)
    pixels = [family.preprocess_image(view.convert("RGB")) for view in views]
    answer = family.generate_answers([Group(("1", "2"), (segment,))], [pixels], max_new_tokens=9, beams=2)[0][
        0
    ]
    assert texts == [reply.text] == [answer.text] and reply.score == pytest.approx(answer.score, rel=1e-4)


def test_adapters_make_room_for_each_other_and_answer_as_before(family: Family, folders: list[Path]) -> None:
    """Two slots besides the base's: no batch holds more adapters."""
    with Engine(family, max_wait=0) as engine:
        each = engine.register("first", folders[0]).bytes
    with Engine(family, max_wait=0.2, adapter_memory=3 * each) as engine:
        for number, folder in enumerate(folders):
            engine.register(str(number), folder)
        found = []
        for _ in range(2):
            futures = [engine.submit(request(0, str(number))) for number in range(6)]
            found.append([future.result(WAIT).text for future in futures])
        stats, infos = engine.stats(), engine.adapters()
    assert found[0] == found[1] and stats.failed == 0
    assert stats.batches >= 6 and stats.loads == stats.evictions + 2 and stats.loads >= 10
    assert [info.name for info in infos if info.loaded] == ["4", "5"] and stats.adapter_bytes == 2 * each
    for text, folder in zip(found[0], folders, strict=True):
        tuned = load_adapter(family.model, folder)
        assert alone(family, 0).text == text
        restore_base(tuned)
    assert "does not hold" in outcome(lambda: Engine(family, adapter_memory=each))
    assert alone(family, 0).text == alone(family, 0).text


def test_a_pinned_adapter_keeps_its_slot(family: Family, folders: list[Path]) -> None:
    each = Adapters(family.model).entry_bytes
    family = load(str(family.model.name_or_path))
    adapters = Adapters(family.model, 3 * each)
    entries = []
    for number, folder in enumerate(folders[:4]):
        adapters.register(str(number), folder)
        entries.append(adapters.find(str(number)))
    first, second, third, fourth = entries
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


def test_a_full_queue_refuses_and_a_cancelled_request_leaves_it(
    family: Family, gate: tuple[Event, Event]
) -> None:
    begun, opened = gate
    with Engine(family, max_batch=1, max_wait=0, queue_limit=2) as engine:
        running = engine.submit(request(0, None))
        assert begun.wait(WAIT)
        waiting = [engine.submit(request(number, None)) for number in (1, 2)]
        with pytest.raises(Busy, match="2 requests are waiting"):
            engine.submit(request(3, None))
        assert waiting[0].cancel() and not running.cancel()
        waiting.append(engine.submit(request(3, None)))
        stats = engine.stats()
        assert (stats.queued, stats.running, stats.refused, stats.cancelled) == (2, 1, 1, 1)
        opened.set()
        texts = [future.result(WAIT).text for future in (running, *waiting[1:])]
        with pytest.raises(CancelledError):
            waiting[0].result()
        assert engine.stats().requests == 3
    assert texts == [alone(family, number).text for number in (0, 2, 3)]


def test_closing_answers_what_waits_or_turns_it_away(
    family: Family, folders: list[Path], gate: tuple[Event, Event]
) -> None:
    begun, opened = gate
    before = [*map(type, family.model.modules())]
    engine = Engine(family, max_batch=2, max_wait=WAIT)
    engine.register("chest", folders[0])
    futures = [engine.submit(request(number, "chest")) for number in range(3)]
    engine.remove("chest")  # they were accepted
    opened.set()
    engine.close()
    assert all(future.done() and future.result().text for future in futures)
    with pytest.raises(Closed):
        engine.submit(request(0, None))
    assert [*map(type, family.model.modules())] == before and family.active_text_rows is None
    opened.clear()
    begun.clear()
    engine = Engine(family, max_batch=1, max_wait=0)
    running, waiting = (engine.submit(request(number, None)) for number in range(2))
    assert begun.wait(WAIT)
    engine.close(timeout=0.01)  # it would drain, and has no time for it
    with pytest.raises(Closed):
        waiting.result(WAIT)
    opened.set()
    assert running.result(WAIT).text
    engine.close()
    assert [*map(type, family.model.modules())] == before


def test_a_thousand_are_registered_without_reading_a_tensor(
    family: Family, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / INFO_FILE).write_bytes((folders[0] / INFO_FILE).read_bytes())
    (tmp_path / TENSORS_FILE).write_bytes(b"no tensors at all")
    with Engine(family, max_wait=0) as engine:
        for number in range(1000):
            engine.register(f"clinic-{number}", tmp_path)
        stats = engine.stats()
        assert (stats.registered, stats.loaded, stats.adapter_bytes) == (1000, 0, 0)
        assert [info.name for info in engine.adapters()][::333] == [f"clinic-{i}" for i in (0, 333, 666, 999)]
        told = outcome(lambda: engine.submit(request(0, "clinic-7")).result(WAIT))
        assert "adapter 'clinic-7' cannot be loaded" in told and str(tmp_path) not in told
        loaded: list[Path] = []
        plain = delta_module.load_file
        monkeypatch.setattr(delta_module, "load_file", lambda path: loaded.append(path) or plain(path))
        engine.register("whole", folders[0])
        assert not loaded
        assert engine.submit(request(0, "whole")).result(WAIT).text
        assert loaded == [folders[0] / TENSORS_FILE]


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("encoder=lora(r=2)", "by lora, and adapters are served together by their norms alone"),
        ("decoder=attention", "by attention, and adapters are served"),
        ("vision=ln,connector?=full,decoder=bias", "by bias, and adapters"),
    ],
)
def test_adapters_of_more_than_norms_are_refused(
    recipe: str, told: str, family: Family, tmp_path: Path
) -> None:
    mark = fingerprint(family.model)
    write(adapt(family.model, recipe), tmp_path, mark, 0)
    with Engine(load(str(family.model.name_or_path))) as engine:
        said = outcome(lambda: engine.register("chest", tmp_path))
    assert told in said and "normtune merge" in said


def test_what_cannot_be_served_is_refused_with_a_word(
    family: Family, folders: list[Path], tmp_path: Path
) -> None:
    tuned = adapt(family.model, "ln")
    write(tuned, tmp_path / "other", "0" * 32 + "-" + "1" * 32, 0)
    restore_base(tuned)
    with Engine(family, max_wait=0) as engine:
        assert "trained on 'tiny'" in outcome(lambda: engine.register("other", tmp_path / "other"))
        assert "is missing" in outcome(lambda: engine.register("none", tmp_path / "none"))
        engine.register("chest", folders[0])
        assert "registered already" in outcome(lambda: engine.register("chest", folders[0]))
        assert "needs a name" in outcome(lambda: engine.register(" ", folders[0]))
        for call in (lambda: engine.submit(request(0, "lungs")), lambda: engine.remove("lungs")):
            with pytest.raises(UnknownAdapter, match="no adapter 'lungs'"):
                call()
        assert "has no image" in outcome(lambda: engine.submit(Request((), "?")))
        assert "at least one token" in outcome(lambda: engine.submit(request(0, None, max_new_tokens=0)))
        assert engine.knows("chest")
        engine.remove("chest")
        assert engine.adapters() == [] and not engine.knows("chest")


def test_a_request_that_fails_takes_no_other_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = load(str(make_tiny("llava", tmp_path)))

    words = "of Mrs Smith: "

    def broken(text: str) -> None:
        raise RuntimeError(words + text)

    with Engine(family, max_batch=4, max_wait=WAIT) as engine:
        bad = engine.submit(Request((image("a"),), "Is <image> normal?", max_new_tokens=TOKENS))
        gone = engine.submit(request(0, None), on_text=broken)
        good = [engine.submit(request(number, None)) for number in (1, 2)]
        assert "the token of an image" in outcome(lambda: bad.result(WAIT))
        with pytest.raises(RuntimeError):
            gone.result(WAIT)
        texts = [future.result(WAIT).text for future in good]
        assert (engine.stats().failed, engine.stats().batches) == (2, 1)
    assert "RuntimeError" in caplog.text and "in broken" in caplog.text and "Smith" not in caplog.text
    assert texts == [alone(family, number).text for number in (1, 2)]


def test_a_batch_that_is_too_large_is_halved(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = family.generate_answers

    def small(groups: Sequence[Group], pixels: Any, **options: Any) -> Any:
        if len(groups) > 1:
            raise torch.OutOfMemoryError("too many")
        return plain(groups, pixels, **options)

    monkeypatch.setattr(family, "generate_answers", small)
    with Engine(family, max_batch=3, max_wait=WAIT) as engine:
        futures = [engine.submit(request(number, None)) for number in range(3)]
        texts = [future.result(WAIT).text for future in futures]
        assert engine.stats().batches == 3
    assert texts == [alone(family, number).text for number in range(3)]


def test_requests_with_other_limits_wait_for_the_next_batch(
    family: Family, gate: tuple[Event, Event]
) -> None:
    """The first in the queue decides, so that nobody waits for ever."""
    begun, opened = gate
    with Engine(family, max_batch=4, max_wait=0) as engine:
        first = engine.submit(request(0, None))
        assert begun.wait(WAIT)
        limits = (3, 5, 3, 5)
        futures = [engine.submit(request(0, None, max_new_tokens=limit)) for limit in limits]
        opened.set()
        replies = [future.result(WAIT) for future in (first, *futures)]
        assert engine.stats().batches == 3
    wanted = [alone(family, 0, max_new_tokens=limit).text for limit in limits]
    assert [reply.text for reply in replies[1:]] == wanted

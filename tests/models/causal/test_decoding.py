"""Decoding steps change buffers in place and read nothing back, so that a CUDA graph can replay them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normtune.models import generation
from normtune.models.causal import answering, decoding, step_graph
from normtune.models.causal.decoding import ColumnCache
from normtune.models.causal.family import CausalFamily
from normtune.models.generation import Generated
from normtune.models.loading import load
from tests.models.families.test_families import GROUPINGS, grouped
from tests.support.tiny_models import MORE, TINY, make_tiny

TOKENS = 14
# operations that make the host wait for a GPU, or copy values of the host to it, so that a replay would
# repeat old ones
FORBIDDEN = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "lift_fresh", "equal", "item")


class NothingForbidden(TorchDispatchMode):
    """Raises on operations that cannot be captured, and on joins of a cache's columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert not name.startswith(FORBIDDEN), f"{name} cannot be captured"
        result = function(*args, **(kwargs or {}))
        if name.startswith("index"):
            indices = [index for index in args[1] if index is not None] if isinstance(args[1], list) else []
            assert all(index.dtype != torch.bool for index in indices), "a bool index has a length of its own"
        if name == "cat":
            assert result.ndim != 4 or result.shape[2] < self.columns, "a step copies the cache"
        return result


@pytest.fixture(scope="module", params=(*TINY, *MORE))
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> CausalFamily:
    loaded = load(str(make_tiny(request.param, tmp_path_factory.mktemp(request.param))))
    assert isinstance(loaded, CausalFamily)
    # a random model hardly ever ends an answer: the token that makes them differ most in length shall end them
    loaded.end_tokens = (-1,)
    answers = tokens(answer(loaded))

    def lengths(end: int) -> set[int]:
        return {row.index(end) if end in row else TOKENS for row in answers}

    loaded.end_tokens = (max(sorted({*chain(*answers)}), key=lambda end: (len(lengths(end)), max(lengths(end)))),)
    return loaded


@pytest.fixture
def llava(tmp_path: Any) -> CausalFamily:
    loaded = load(str(make_tiny("llava", tmp_path)))
    assert isinstance(loaded, CausalFamily)
    return loaded


def answer(family: CausalFamily, **options: Any) -> list[Generated]:
    groups, pixels = grouped(family, GROUPINGS["by image"], answered=False)
    return family.generate_tokens(groups, pixels, **{"max_new_tokens": TOKENS, "beams": 1} | options)


def tokens(answers: list[Generated]) -> list[tuple[int, ...]]:
    return [generated.tokens for generated in answers]


def count_captures(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Any], Any] = lambda step: step) -> list[int]:
    """Replace captures; returns the number of replays of each."""
    replays: list[int] = []

    def capture(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        replays.append(0)
        wrapped = wrap(step)

        def replay() -> Tensor:
            replays[-1] += 1
            result: Tensor = wrapped()
            return result

        return replay

    monkeypatch.setattr(step_graph, "capture", capture)
    return replays


def few_fixed_steps(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """As on CUDA: batches keep their shape for some steps, and the host learns of tokens one step late."""
    for module in (generation, decoding, answering):
        monkeypatch.setattr(module, "FIXED_STEPS", steps)
    monkeypatch.setattr(generation, "_pace", lambda device: (1, steps))


def test_replayed_steps_give_the_same_tokens(family: CausalFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows leave and the buffers grow, after every six steps."""
    expected = tokens(answer(family))
    assert len({len(answered) for answered in expected}) > 1
    few_fixed_steps(monkeypatch, 6)
    assert tokens(answer(family)) == expected
    replays = count_captures(monkeypatch)
    assert tokens(answer(family, cuda_graphs=True)) == expected
    assert sum(replays) >= 4 and max(replays) <= 5, "one of six steps runs as it is"
    assert family.step_graph.replay is None, "freed"


def test_a_step_can_be_captured(family: CausalFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing back, and all its buffers stay where they are."""
    caches: list[ColumnCache] = []
    places: set[tuple[int, ...]] = set()
    make_cache = answering.ColumnCache

    def remember(*options: Any) -> ColumnCache:
        caches.append(make_cache(*options))
        return caches[-1]

    def checked(step: Any) -> Callable[[], Tensor]:
        decoder, (cache,) = step.__self__, caches
        buffers = ("input_ids", "position", "token_index", "visible", "columns", "column_token_index", "all_columns")

        def run() -> Tensor:
            before = {name: getattr(decoder, name) for name in buffers}
            states = [tensor for layer in cache.layer_states.values() for tensor in layer]
            places.add(tuple(tensor.data_ptr() for tensor in (*before.values(), *decoder.at, *states)))
            with NothingForbidden(cache.capacity):
                result: Tensor = step()
            assert all(getattr(decoder, name) is value for name, value in before.items())
            assert cache.columns is decoder.columns and cache.width == cache.capacity
            return result

        return run

    expected = tokens(answer(family))
    monkeypatch.setattr(answering, "ColumnCache", remember)
    monkeypatch.setattr(generation, "_pace", lambda device: (1, 32))
    replays = count_captures(monkeypatch, checked)
    assert tokens(answer(family, cuda_graphs=True)) == expected
    assert sum(replays) > 3 and len(places) == 1


def test_the_check_of_captures_can_fail() -> None:
    values = torch.arange(4.0)
    with NothingForbidden(8):
        _ = values[values.new_zeros(1, dtype=torch.long)]
        for wrong in (values.sum().item, values.nonzero, lambda: values[values > 1], lambda: torch.tensor([1, 2])):
            with pytest.raises(AssertionError, match=r"captured|length of its own"):
                wrong()
        with pytest.raises(AssertionError, match="copies the cache"):
            torch.cat((values.new_zeros(1, 1, 7, 2), values.new_zeros(1, 1, 1, 2)), 2)


def test_beams_can_be_replayed_between_changes_of_their_rows(llava: CausalFamily) -> None:
    assert tokens(answer(llava, beams=3, cuda_graphs=True)) == tokens(answer(llava, beams=3))


def test_steps_that_cannot_be_captured_are_reported_once(
    llava: CausalFamily, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_graph, "fallbacks", type(step_graph.fallbacks)())
    expected = tokens(answer(llava))

    def fail(step: Any, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(step_graph, "capture", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert tokens(answer(llava, cuda_graphs=True)) == expected
    assert list(step_graph.fallbacks.values()) == [3] and len(caplog.records) == 1
    assert "RuntimeError: operation not permitted" in caplog.records[0].getMessage()


def test_hooks_are_called_at_every_step(llava: CausalFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = count_captures(monkeypatch)
    calls: list[int] = []
    for module in (llava.decoder.layers[0], llava.model.lm_head):
        calls.clear()
        hook = module.register_forward_hook(lambda *_: calls.append(1))
        answers = answer(llava, cuda_graphs=True)
        hook.remove()
        assert len(calls) == max(len(generated.tokens) for generated in answers) and not replays
    answer(llava, cuda_graphs=True)
    assert replays

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from normtune.models import answer_loss as answer_loss_module
from normtune.models.answer_loss import answer_loss, chunk_count
from tests.support.tolerance import assert_close

WIDTH, VOCABULARY, ROWS = 12, 40, 23
TINY_LIMIT = 5 * VOCABULARY * 4  # five rows of fp32 logits


def random_states(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()
    return states, torch.randint(0, VOCABULARY, (ROWS,), generator=generator)


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, VOCABULARY)
    transformed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), plain)
    frozen = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    return {"plain": plain, "transformed": transformed, "frozen": frozen}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", heads())
def test_chunks_give_the_whole_loss_and_its_gradients(kind: str, label_smoothing: float) -> None:
    head = heads()[kind]
    states, labels = random_states()
    trained = [states, *(p for p in head.parameters() if p.requires_grad)]
    whole = F.cross_entropy(head(states), labels, reduction="sum", label_smoothing=label_smoothing)
    expected = torch.autograd.grad(whole, trained)
    loss = answer_loss(
        head, states, labels, vocabulary=VOCABULARY, label_smoothing=label_smoothing, limit_bytes=TINY_LIMIT
    )
    assert_close(loss, whole)
    for gradient, reference in zip(torch.autograd.grad(loss, trained), expected, strict=True):
        assert_close(gradient, reference)


def test_a_tied_embedding_gets_both_gradients() -> None:
    table = nn.Embedding(VOCABULARY, WIDTH)
    ids, labels = torch.arange(ROWS), random_states()[1]

    def head(states: Tensor) -> Tensor:
        return F.linear(states, table.weight)

    expected = torch.autograd.grad(F.cross_entropy(head(table(ids)), labels, reduction="sum"), table.weight)
    loss = answer_loss(head, table(ids), labels, vocabulary=VOCABULARY, limit_bytes=TINY_LIMIT)
    assert_close(torch.autograd.grad(loss, table.weight)[0], expected[0])


def test_dropout_in_the_head_is_the_same_in_both_passes() -> None:
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, VOCABULARY))
    states, labels = random_states()
    torch.manual_seed(3)
    loss = answer_loss(head, states, labels, vocabulary=VOCABULARY, limit_bytes=TINY_LIMIT)
    (gradient,) = torch.autograd.grad(loss, states)
    torch.manual_seed(3)
    parts = zip(states.tensor_split(5), labels.tensor_split(5), strict=True)
    whole = torch.stack([F.cross_entropy(head(x), y, reduction="sum") for x, y in parts]).sum()
    (expected,) = torch.autograd.grad(whole, states)
    assert_close(gradient, expected)


def test_only_the_logits_of_one_chunk_are_in_memory() -> None:
    head = heads()["frozen"]
    states, labels = random_states()
    row_counts: list[int] = []
    saved: list[int] = []

    def recording_head(rows: Tensor) -> Tensor:
        row_counts.append(len(rows))
        return head(rows)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = answer_loss(recording_head, states, labels, vocabulary=VOCABULARY, limit_bytes=TINY_LIMIT)
    assert row_counts == [5, 5, 5, 4, 4]
    assert max(saved, default=0) < 4 * VOCABULARY
    loss.backward()
    assert sorted(row_counts) == [4, 4, 4, 4, 5, 5, 5, 5, 5, 5]  # once more in the backward pass


def test_without_gradients_nothing_is_computed_twice() -> None:
    row_counts = []
    states, labels = random_states()
    head = heads()["frozen"]

    def recording_head(rows: Tensor) -> Tensor:
        row_counts.append(len(rows))
        return head(rows)

    with torch.inference_mode():
        loss = answer_loss(recording_head, states, labels, vocabulary=VOCABULARY, limit_bytes=TINY_LIMIT)
        each = answer_loss(
            recording_head, states, labels, vocabulary=VOCABULARY, limit_bytes=TINY_LIMIT, reduction="none"
        )
    assert row_counts == [5, 5, 5, 4, 4] * 2
    torch.testing.assert_close(each.sum(), loss)
    torch.testing.assert_close(each, F.cross_entropy(head(states), labels, reduction="none"))


@given(st.integers(0, 500), st.integers(1, 300_000), st.integers(1, 10**9))
def test_no_chunk_exceeds_the_limit_by_more_than_a_row(rows: int, vocabulary: int, limit: int) -> None:
    count = chunk_count(rows, vocabulary, limit)
    longest = max(len(part) for part in torch.arange(rows).tensor_split(count))
    assert longest <= max(1, limit // (vocabulary * 4) + 1)
    assert rows * vocabulary * 4 > limit or count == 1


def test_bf16_logits_are_summed_in_fp32() -> None:
    head = heads()["plain"].bfloat16()
    states, labels = random_states()
    loss = answer_loss(head, states.bfloat16(), labels, vocabulary=VOCABULARY, limit_bytes=TINY_LIMIT)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(head(states.bfloat16()).float(), labels, reduction="sum")
    assert_close(loss, expected)


def test_liger_is_used_for_frozen_plain_heads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer_loss_module._is_frozen_linear(heads()["frozen"])
    assert not answer_loss_module._is_frozen_linear(heads()["plain"])  # trained
    assert not answer_loss_module._is_frozen_linear(heads()["transformed"].requires_grad_(False))

    class Wrapped(nn.Linear):  # as LoRA or a quantised layer is
        pass

    assert not answer_loss_module._is_frozen_linear(Wrapped(2, 2).requires_grad_(False))


@pytest.mark.parametrize("installed", [True, False])
def test_liger_is_found_where_it_is_installed(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("liger_kernel.transformers.functional")
    module.liger_fused_linear_cross_entropy = len
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if installed else None)
    monkeypatch.setitem(sys.modules, module.__name__, module if installed else None)
    answer_loss_module._liger.cache_clear()
    assert answer_loss_module._liger() is (len if installed else None)
    answer_loss_module._liger.cache_clear()


@pytest.mark.skipif(
    not torch.cuda.is_available() or answer_loss_module._liger() is None, reason="needs CUDA and liger-kernel"
)
def test_liger_gives_the_loss_and_gradient_of_chunks() -> None:
    head = heads()["frozen"].cuda()
    states, labels = (tensor.detach().cuda() for tensor in random_states())
    states.requires_grad_()
    loss = answer_loss(head, states, labels, vocabulary=VOCABULARY, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, states)
    whole = F.cross_entropy(head(states), labels, reduction="sum", label_smoothing=0.1)
    assert_close(loss, whole)
    assert_close(gradient, torch.autograd.grad(whole, states)[0])

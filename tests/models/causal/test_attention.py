"""Shared attention gives what transformers' SDPA gives, and keeps no copies of masks, keys or values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from normtune.errors import InputError
from normtune.methods.adapt import adapt
from normtune.methods.recipe import parse
from normtune.models.causal import attention
from normtune.models.causal.attention import BLOCK, additive, shared_attention, use_shared_attention
from normtune.models.causal.family import CausalFamily
from normtune.models.loading import load
from tests.models.families.test_families import GROUPINGS, assert_same_gradients, gradients, grouped
from tests.support.tiny_models import make_tiny

UNCOMPILED = "ignore:flex_attention called without torch.compile:UserWarning"
LENGTH = 52
HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16


def kept(compute: Callable[[], Any]) -> dict[int, Tensor]:
    """What autograd saves while computing: storage -> one of its tensors."""
    storages: dict[int, Tensor] = {}
    alive = []  # a storage that is freed would lend its address to another

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(compute())
    return storages


def size(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def small_llama(dtype: torch.dtype = torch.float32, layers: int = 1) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
    )
    torch.manual_seed(0)
    decoder = LlamaModel(config).to(dtype).eval()
    use_shared_attention(decoder)
    return decoder


def drawn(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(query, key, value) of two rows, and who sees whom."""
    generator = torch.Generator().manual_seed(0)
    states = tuple(
        torch.randn(2, heads, LENGTH, HEAD_DIM, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    seen = torch.rand(2, 1, LENGTH, LENGTH, generator=generator) > 0.4
    return states, seen | torch.eye(LENGTH, dtype=torch.bool)  # type: ignore[return-value]


def attended(states: tuple[Tensor, ...], mask: Tensor, function: Any) -> tuple[Tensor, ...]:
    """The output and the gradients of query, key and value."""
    layer = small_llama().layers[0].self_attn
    out, _ = function(layer, *states, mask, scaling=HEAD_DIM**-0.5)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), states)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_shared_attention_equals_sdpa_in_double(
    dtype: torch.dtype, tolerance: float, folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_takes_groups", lambda device: not folded)
    states, seen = drawn(dtype)
    mask = additive({"": seen}, small_llama(), dtype)[""]
    assert mask.shape[2] == LENGTH * (HEADS // KEY_HEADS if folded else 1) and mask.dtype == dtype
    found = attended(states, mask, shared_attention)
    exact = tuple(one.detach().double().requires_grad_() for one in states)
    wanted = attended(exact, seen, sdpa_attention_forward)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() / other.norm() < tolerance


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_keeps_keys_and_values_as_few_as_they_are(
    dtype: torch.dtype, folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_takes_groups", lambda device: not folded)
    states, seen = drawn(dtype)
    layer = small_llama().layers[0].self_attn
    mask = additive({"": seen}, small_llama(), dtype)[""]
    saved = kept(lambda: shared_attention(layer, *states, mask))
    del saved[mask.untyped_storage().data_ptr()]
    width, key_width = HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM
    needed = (2 * width + 2 * key_width) * dtype.itemsize + 4 * HEADS  # query, output, key, value, logsumexp
    assert size(saved) == 2 * LENGTH * needed
    usual = kept(lambda: sdpa_attention_forward(layer, *states, seen, scaling=1.0))
    assert size(usual) > size(saved) + 2 * LENGTH * LENGTH * dtype.itemsize


@pytest.mark.parametrize("keys", [40, 41, 47])
def test_rows_of_a_mask_are_aligned_for_kernels(keys: int) -> None:
    seen = torch.rand(2, 1, 5, keys) > 0.5
    mask = additive({"": seen}, small_llama(), torch.bfloat16)[""]
    assert mask.shape == seen.shape and mask.stride(-1) == 1
    assert all(stride % attention.ALIGNED == 0 for stride in mask.stride()[:-1])
    assert torch.equal(mask == 0, seen) and torch.equal(mask == -torch.inf, ~seen)


def test_other_masks_are_transformers_own_affair() -> None:
    states, seen = drawn(torch.float32)
    layer = small_llama().layers[0].self_attn
    for mask in (seen, None):
        found, _ = shared_attention(layer, *states, mask, scaling=0.1, is_causal=True)
        wanted, _ = sdpa_attention_forward(layer, *states, mask, scaling=0.1, is_causal=True)
        assert torch.equal(found, wanted)


# --- in a family ------------------------------------------------------------------------------------------

SOME = (
    "llava_med",
    "gemma3",
    "qwen2_5_vl",
    "paligemma",
)  # a window, two kinds of layers, M-RoPE, a prefix LM


@pytest.fixture(scope="module", params=SOME)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> CausalFamily:
    loaded = load(str(make_tiny(request.param, tmp_path_factory.mktemp(request.param))))
    assert isinstance(loaded, CausalFamily)
    return loaded


def test_only_the_language_model_attends_by_it(family: CausalFamily) -> None:
    assert family.decoder.config._attn_implementation == attention.SHARED
    vision = family.config.vision_config._attn_implementation
    assert vision == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_kept_once_for_all_layers(family: CausalFamily, dtype: torch.dtype) -> None:
    low = type(family)(copy.deepcopy(family.model).to(dtype), family.processor)
    batch = low.collate(*grouped(low, GROUPINGS["by image"]))
    rows, length = batch["input_ids"].shape
    room = rows * length * (length + -length % attention.ALIGNED)

    def masks(saved: dict[int, Tensor]) -> list[Tensor]:
        return [one for one in saved.values() if one.untyped_storage().nbytes() == room * one.itemsize]

    saved = masks(kept(lambda: low.loss(batch)))
    assert len(saved) == len(low.windows) and all(one.dtype == dtype for one in saved)


def test_folded_queries_give_the_same_loss_and_gradients(
    family: CausalFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where SDPA's kernels take no groups."""
    batch = family.collate(*grouped(family, GROUPINGS["cap of two"]))
    loss, _ = family.loss(batch)
    wanted = gradients(family, loss)
    asked, pixels = grouped(family, GROUPINGS["cap of two"], answered=False)
    answers = family.generate_tokens(asked, pixels, max_new_tokens=4, beams=2)
    monkeypatch.setattr(attention, "_takes_groups", lambda device: False)
    again, _ = family.loss(batch)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(family, again), wanted)
    found = family.generate_tokens(asked, pixels, max_new_tokens=4, beams=2)
    assert [one.tokens for one in found] == [one.tokens for one in answers]


@pytest.mark.filterwarnings(UNCOMPILED)
@pytest.mark.parametrize("rows", ["pad", "pack"])
def test_block_masks_give_the_same_log_probs(
    family: CausalFamily, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "rows", rows)
    groups, pixels = grouped(family, GROUPINGS["cap of two"])
    with torch.no_grad():
        wanted = family.log_probs(family.collate(groups, pixels))
        monkeypatch.setattr(family, "attention", "block")
        batch = family.collate(groups, pixels)
        assert batch["input_ids"].shape[1] % BLOCK == 0
        found = family.log_probs(batch)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings(UNCOMPILED)
def test_block_masks_give_the_same_answers(family: CausalFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, pixels = grouped(family, GROUPINGS["mixed order"], answered=False)
    wanted = family.generate_tokens(asked, pixels, max_new_tokens=5, beams=2)
    monkeypatch.setattr(family, "attention", "block")
    found = family.generate_tokens(asked, pixels, max_new_tokens=5, beams=2)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]


def test_training_under_block_masks_is_refused_on_the_cpu(
    family: CausalFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "attention", "block")
    batch = family.collate(*grouped(family, GROUPINGS["by image"]))
    with pytest.raises(InputError, match=r"no backward pass on the CPU.*Choose 'dense'"):
        family.loss(batch)


def test_a_learned_prefix_goes_with_dense_masks_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load(str(make_tiny("llava_med", tmp_path)))
    assert isinstance(family, CausalFamily)
    adapt(family.model, parse("language=prefix(n=3)"), seed=0)
    monkeypatch.setattr(attention, "_takes_groups", lambda device: False)
    batch = family.collate(*grouped(family, GROUPINGS["by image"]))
    loss, _ = family.loss(batch)
    loss.backward()
    monkeypatch.setattr(family, "attention", "block")
    with torch.no_grad(), pytest.raises(InputError, match="does not go with prefix"):
        family.loss(batch)


def test_capped_attention_takes_neither_a_prefix_nor_blocks(tmp_path: Any) -> None:
    family = load(str(make_tiny("paligemma2", tmp_path)))
    assert isinstance(family, CausalFamily)
    with pytest.raises(InputError, match="does not know capped attention, as part 'language' has"):
        adapt(family.model, parse("language=prefix(n=3)"), seed=0)
    family.attention = "block"
    with pytest.raises(InputError, match="nor with PaliGemma 2"):
        family.collate(*grouped(family, GROUPINGS["by image"]))


def test_auto_takes_blocks_on_cuda_where_rows_are_long() -> None:
    decoder = small_llama()
    for device, length in product(("cpu", "cuda"), (attention.BLOCK_FROM - 1, attention.BLOCK_FROM)):
        chosen = attention.takes_blocks("auto", length, torch.device(device), decoder)
        assert chosen == (device == "cuda" and length >= attention.BLOCK_FROM)
        assert not attention.takes_blocks("dense", length, torch.device(device), decoder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["dense", "block"])
def test_cuda_gives_the_loss_and_gradients_of_the_cpu(family: CausalFamily, backend: Any) -> None:
    batch = family.collate(*grouped(family, GROUPINGS["cap of two"]))
    loss, _ = family.loss(batch)
    wanted = gradients(family, loss)
    there = type(family)(copy.deepcopy(family.model).cuda(), family.processor)
    there.attention = backend
    groups, pixels = grouped(there, GROUPINGS["cap of two"])
    moved: dict[str, Any] = {}
    for name, value in there.collate(groups, pixels).items():
        if isinstance(value, dict):
            moved[name] = {key: one.cuda() for key, one in value.items()}
        else:
            moved[name] = value.cuda() if isinstance(value, Tensor) else value
    again, _ = there.loss(moved)
    assert abs(float(again.detach()) - float(loss.detach())) / float(loss.detach()) < 1e-4
    for name, gradient in gradients(there, again).items():
        if gradient.norm() > 1e-5:
            assert (gradient.cpu() - wanted[name]).norm() / wanted[name].norm() < 1e-2, name

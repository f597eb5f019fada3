"""Shared attention gives the results of transformers' SDPA, and saves no copies of masks, keys or values."""

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
from normtune.models.causal.attention import BLOCK_SIZE, additive_masks, shared_attention, use_shared_attention
from normtune.models.causal.family import CausalFamily
from normtune.models.loading import load
from tests.models.families.test_families import GROUPINGS, assert_same_gradients, gradients, grouped
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import assert_close, assert_gradients_close, relative_bound, relative_error

UNCOMPILED = "ignore:flex_attention called without torch.compile:UserWarning"
LENGTH = 52
HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16


def saved_tensors(compute: Callable[[], Any]) -> dict[int, Tensor]:
    """What autograd saves during a computation: address of a storage -> one of its tensors."""
    storages: dict[int, Tensor] = {}
    alive = []  # keeps storages: the address of a freed one could be used for another

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


def random_states(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Random (query, key, value) of two rows, and a random mask."""
    generator = torch.Generator().manual_seed(0)
    states = tuple(
        torch.randn(2, heads, LENGTH, HEAD_DIM, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    visible = torch.rand(2, 1, LENGTH, LENGTH, generator=generator) > 0.4
    return states, visible | torch.eye(LENGTH, dtype=torch.bool)  # type: ignore[return-value]


def output_and_gradients(states: tuple[Tensor, ...], mask: Tensor, function: Any) -> tuple[Tensor, ...]:
    """The output and the gradients of query, key and value."""
    layer = small_llama().layers[0].self_attn
    out, _ = function(layer, *states, mask, scaling=HEAD_DIM**-0.5)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), states)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_attention_equals_sdpa_in_double(
    dtype: torch.dtype, folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_supports_grouped_heads", lambda device: not folded)
    states, visible = random_states(dtype)
    mask = additive_masks({"": visible}, small_llama(), dtype)[""]
    assert mask.shape[2] == LENGTH * (HEADS // KEY_HEADS if folded else 1) and mask.dtype == dtype
    results = output_and_gradients(states, mask, shared_attention)
    double_states = tuple(tensor.detach().double().requires_grad_() for tensor in states)
    expected = output_and_gradients(double_states, visible, sdpa_attention_forward)
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == dtype
        # attention adds in fp32 also where its inputs are bf16
        bound = relative_bound(dtype, terms=1 if dtype == torch.bfloat16 else HEAD_DIM)
        assert relative_error(result.double(), reference) < bound


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_saves_no_copies_of_keys_and_values(
    dtype: torch.dtype, folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_supports_grouped_heads", lambda device: not folded)
    states, visible = random_states(dtype)
    layer = small_llama().layers[0].self_attn
    mask = additive_masks({"": visible}, small_llama(), dtype)[""]
    saved = saved_tensors(lambda: shared_attention(layer, *states, mask))
    del saved[mask.untyped_storage().data_ptr()]
    width, key_width = HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM
    needed = (2 * width + 2 * key_width) * dtype.itemsize + 4 * HEADS  # query, output, key, value, logsumexp
    assert size(saved) == 2 * LENGTH * needed
    usual = saved_tensors(lambda: sdpa_attention_forward(layer, *states, visible, scaling=1.0))
    assert size(usual) > size(saved) + 2 * LENGTH * LENGTH * dtype.itemsize


@pytest.mark.parametrize("keys", [40, 41, 47])
def test_rows_of_a_mask_are_aligned_for_kernels(keys: int) -> None:
    visible = torch.rand(2, 1, 5, keys) > 0.5
    mask = additive_masks({"": visible}, small_llama(), torch.bfloat16)[""]
    assert mask.shape == visible.shape and mask.stride(-1) == 1
    assert all(stride % attention.MASK_ALIGNMENT == 0 for stride in mask.stride()[:-1])
    assert torch.equal(mask == 0, visible) and torch.equal(mask == -torch.inf, ~visible)


def test_other_masks_are_passed_to_transformers() -> None:
    states, visible = random_states(torch.float32)
    layer = small_llama().layers[0].self_attn
    for mask in (visible, None):
        output, _ = shared_attention(layer, *states, mask, scaling=0.1, is_causal=True)
        expected, _ = sdpa_attention_forward(layer, *states, mask, scaling=0.1, is_causal=True)
        assert torch.equal(output, expected)


# --- in a family ------------------------------------------------------------------------------------------

FAMILIES = ("llava_med", "gemma3", "qwen2_5_vl", "paligemma")  # a window, two kinds of layers, M-RoPE, a prefix LM


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> CausalFamily:
    loaded = load(str(make_tiny(request.param, tmp_path_factory.mktemp(request.param))))
    assert isinstance(loaded, CausalFamily)
    return loaded


def test_only_the_language_model_uses_shared_attention(family: CausalFamily) -> None:
    assert family.decoder.config._attn_implementation == attention.ATTENTION_NAME
    vision = family.config.vision_config._attn_implementation
    assert vision == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_saved_once_for_all_layers(family: CausalFamily, dtype: torch.dtype) -> None:
    low = type(family)(copy.deepcopy(family.model).to(dtype), family.processor)
    batch = low.collate(*grouped(low, GROUPINGS["by image"]))
    rows, length = batch["input_ids"].shape
    mask_values = rows * length * (length + -length % attention.MASK_ALIGNMENT)

    def masks(saved: dict[int, Tensor]) -> list[Tensor]:
        return [
            tensor for tensor in saved.values() if tensor.untyped_storage().nbytes() == mask_values * tensor.itemsize
        ]

    saved_masks = masks(saved_tensors(lambda: low.loss(batch)))
    assert len(saved_masks) == len(low.windows) and all(tensor.dtype == dtype for tensor in saved_masks)


def test_folded_queries_give_the_same_loss_and_gradients(family: CausalFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where SDPA's kernels do not support grouped heads under a mask."""
    batch = family.collate(*grouped(family, GROUPINGS["cap of two"]))
    loss, _ = family.loss(batch)
    expected = gradients(family, loss)
    open_groups, pixels = grouped(family, GROUPINGS["cap of two"], answered=False)
    answers = family.generate_tokens(open_groups, pixels, max_new_tokens=4, beams=2)
    monkeypatch.setattr(attention, "_supports_grouped_heads", lambda device: False)
    folded_loss, _ = family.loss(batch)
    assert_close(folded_loss, loss)
    assert_same_gradients(gradients(family, folded_loss), expected)
    folded_answers = family.generate_tokens(open_groups, pixels, max_new_tokens=4, beams=2)
    assert [answer.tokens for answer in folded_answers] == [answer.tokens for answer in answers]


@pytest.mark.filterwarnings(UNCOMPILED)
@pytest.mark.parametrize("rows", ["pad", "pack"])
def test_block_masks_give_the_same_log_probs(family: CausalFamily, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "rows", rows)
    groups, pixels = grouped(family, GROUPINGS["cap of two"])
    with torch.no_grad():
        expected = family.log_probs(family.collate(groups, pixels))
        monkeypatch.setattr(family, "attention", "block")
        batch = family.collate(groups, pixels)
        assert batch["input_ids"].shape[1] % BLOCK_SIZE == 0
        log_probs = family.log_probs(batch)
    assert_close(log_probs, expected)


@pytest.mark.filterwarnings(UNCOMPILED)
def test_block_masks_give_the_same_answers(family: CausalFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    open_groups, pixels = grouped(family, GROUPINGS["mixed order"], answered=False)
    expected = family.generate_tokens(open_groups, pixels, max_new_tokens=5, beams=2)
    monkeypatch.setattr(family, "attention", "block")
    answers = family.generate_tokens(open_groups, pixels, max_new_tokens=5, beams=2)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]


def test_training_under_block_masks_is_refused_on_the_cpu(
    family: CausalFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "attention", "block")
    batch = family.collate(*grouped(family, GROUPINGS["by image"]))
    with pytest.raises(InputError, match=r"no backward pass on the CPU.*Choose 'dense'"):
        family.loss(batch)


def test_a_learned_prefix_supports_dense_masks_only(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load(str(make_tiny("llava_med", tmp_path)))
    assert isinstance(family, CausalFamily)
    adapt(family.model, parse("language=prefix(n=3)"), seed=0)
    monkeypatch.setattr(attention, "_supports_grouped_heads", lambda device: False)
    batch = family.collate(*grouped(family, GROUPINGS["by image"]))
    loss, _ = family.loss(batch)
    loss.backward()
    monkeypatch.setattr(family, "attention", "block")
    with torch.no_grad(), pytest.raises(InputError, match="supports neither prefix or ptuning"):
        family.loss(batch)


def test_capped_attention_supports_neither_a_prefix_nor_blocks(tmp_path: Any) -> None:
    family = load(str(make_tiny("paligemma2", tmp_path)))
    assert isinstance(family, CausalFamily)
    with pytest.raises(InputError, match="does not support attention with capped logits, as in part 'language'"):
        adapt(family.model, parse("language=prefix(n=3)"), seed=0)
    family.attention = "block"
    with pytest.raises(InputError, match="nor PaliGemma 2"):
        family.collate(*grouped(family, GROUPINGS["by image"]))


def test_auto_uses_block_masks_on_cuda_for_long_rows() -> None:
    decoder = small_llama()
    for device, length in product(
        ("cpu", "cuda"), (attention.MIN_BLOCK_MASK_TOKENS - 1, attention.MIN_BLOCK_MASK_TOKENS)
    ):
        uses_blocks = attention.uses_block_masks("auto", length, torch.device(device), decoder)
        assert uses_blocks == (device == "cuda" and length >= attention.MIN_BLOCK_MASK_TOKENS)
        assert not attention.uses_block_masks("dense", length, torch.device(device), decoder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["dense", "block"])
def test_cuda_gives_the_loss_and_gradients_of_the_cpu(family: CausalFamily, backend: Any) -> None:
    batch = family.collate(*grouped(family, GROUPINGS["cap of two"]))
    loss, _ = family.loss(batch)
    expected = gradients(family, loss)
    cuda_family = type(family)(copy.deepcopy(family.model).cuda(), family.processor)
    cuda_family.attention = backend
    groups, pixels = grouped(cuda_family, GROUPINGS["cap of two"])
    cuda_batch: dict[str, Any] = {}
    for name, value in cuda_family.collate(groups, pixels).items():
        if isinstance(value, dict):
            cuda_batch[name] = {key: tensor.cuda() for key, tensor in value.items()}
        else:
            cuda_batch[name] = value.cuda() if isinstance(value, Tensor) else value
    cuda_loss, _ = cuda_family.loss(cuda_batch)
    # CUDA may compute fp32 matmuls in TF32, with a mantissa of as many bits as float16
    assert_close(cuda_loss.cpu(), loss, dtype=torch.float16, terms=1)
    assert_gradients_close(
        {name: gradient.cpu() for name, gradient in gradients(cuda_family, cuda_loss).items()},
        expected,
        dtype=torch.float16,
    )

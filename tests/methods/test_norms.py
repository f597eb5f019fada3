"""A tuned norm computes what the norm of the base computes, with fp32 gains; also with several adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normtune.adapters.multi import norms as multi_norms
from normtune.adapters.multi.norms import MultiAdapterNorm
from normtune.adapters.multi.rows import ActiveRows, RowAdapters
from normtune.methods.norms import TunedNorm, norm_eps
from normtune.models.norm_kinds import norm_kind
from tests.support.tolerance import assert_close

WIDTH = 24


def gemma() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    return Gemma3RMSNorm(WIDTH)


def llama() -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(WIDTH, eps=1e-5)


def gemma4() -> nn.Module:  # applies its gain before x/rms is rounded, LLaMA after
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

    return Gemma4RMSNorm(WIDTH)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(WIDTH, eps=1e-6),
    "layer without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "rms": lambda: nn.RMSNorm(WIDTH),
    "llama": llama,
    "gemma": gemma,
    "gemma4": gemma4,
    "group": lambda: nn.GroupNorm(4, WIDTH),
}


def norm(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A norm with random gains (and biases)."""
    generator = torch.Generator().manual_seed(seed)
    module = MAKERS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.to(dtype)


ROWS = 5 * 7  # of `inputs`: the terms of a gain's gradient


def inputs(name: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (5, WIDTH, 7) if name == "group" else (5, 7, WIDTH)
    return (3 * torch.randn(shape, generator=generator) + 0.5).to(dtype)


@pytest.mark.parametrize("name", MAKERS)
def test_an_untouched_gain_gives_the_bases_output(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        module, x = norm(name, dtype), inputs(name, dtype)
        tuned = TunedNorm.from_norm(module)
        out, expected = tuned(x), module(x)
        assert out.dtype == dtype
        assert all(parameter.dtype == torch.float32 for parameter in tuned.parameters())
        if "layer" in name or name in ("group", "rms"):  # torch's fused kernels sum in another order
            assert_close(out, expected, terms=1)
        else:
            assert torch.equal(out, expected)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_those_of_autograd(name: str) -> None:
    module, x = norm(name), inputs(name)
    tuned = TunedNorm.from_norm(module)
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    tuned(ours).backward(grad_out)
    module(theirs).backward(grad_out)
    assert_close(ours.grad, theirs.grad, terms=WIDTH)
    for attribute, parameter in module.named_parameters():
        assert_close(getattr(tuned, attribute).grad, parameter.grad, terms=ROWS)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "group"])
def test_gradients_of_a_bf16_input_are_the_fp32_ones_rounded(name: str) -> None:
    tuned, x = TunedNorm.from_norm(norm(name, torch.bfloat16)), inputs(name, torch.bfloat16)
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    low, high = x.clone().requires_grad_(), x.float().requires_grad_()
    tuned(low).backward(grad_out)
    low_grads = {attribute: p.grad.clone() for attribute, p in tuned.named_parameters()}
    tuned.zero_grad()
    tuned(high).backward(grad_out.float())
    assert low.grad is not None and low.grad.dtype == torch.bfloat16
    assert_close(low.grad, high.grad.bfloat16(), terms=1)
    for attribute, parameter in tuned.named_parameters():
        assert low_grads[attribute].dtype == torch.float32
        assert_close(low_grads[attribute], parameter.grad, terms=ROWS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["layer", "llama", "gemma", "gemma4"])
def test_cuda_gives_the_output_and_gradients_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    """CUDA has fused kernels of its own. Inputs are transposed, as those of query and key norms are."""
    tuned, x = TunedNorm.from_norm(norm(name, dtype)), inputs(name, dtype).transpose(0, 1)
    grad_out = torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype).transpose(0, 1)
    results = []
    for device in ("cpu", "cuda"):
        module, states = copy.deepcopy(tuned).to(device), x.detach().to(device).requires_grad_()
        out = module(states)
        out.backward(grad_out.to(device))
        assert states.grad is not None
        results.append([out.detach(), states.grad, *(parameter.grad for parameter in module.parameters())])
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert_close(on_cuda.cpu(), on_cpu, terms=ROWS, dtype=dtype)


@pytest.mark.parametrize("name", ["layer", "llama", "gemma"])
def test_gradients_are_right_if_the_input_is_used_twice_and_the_gain_is_frozen(name: str) -> None:
    module, x = norm(name), inputs(name)
    module.requires_grad_(False)
    tuned = TunedNorm.from_norm(module)
    assert not any(parameter.requires_grad for parameter in tuned.parameters())
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (tuned(ours) * ours).sum().backward()
    (module(theirs) * theirs).sum().backward()
    assert_close(ours.grad, theirs.grad, terms=WIDTH)
    assert tuned.weight.grad is None


@pytest.mark.parametrize("name", ["layer", "llama", "gemma"])
def test_only_the_input_and_its_statistics_are_saved(name: str) -> None:
    tuned, x = TunedNorm.from_norm(norm(name, torch.bfloat16)), inputs(name, torch.bfloat16).requires_grad_()
    parameters = {parameter.data_ptr() for parameter in tuned.parameters()}
    saved: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        tuned(x)
    activations = [tensor for tensor in saved if tensor.data_ptr() not in parameters]
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in activations) == 1
    statistics = [tensor for tensor in activations if tensor.data_ptr() != x.data_ptr()]
    rows = x.numel() // WIDTH
    assert sum(tensor.numel() for tensor in statistics) == (2 if name == "layer" else 1) * rows


@pytest.mark.parametrize("name", ["layer", "llama", "gemma"])
def test_fp32_gains_on_a_bf16_base_move_at_lr_1e_4_and_bf16_gains_do_not(name: str) -> None:
    base = norm(name, torch.bfloat16)
    if name != "gemma":  # Gemma stores gain - 1, near 0, where bf16 is fine
        with torch.no_grad():
            base.weight.fill_(1.0)
    tuned = TunedNorm.from_norm(base)
    target = 0.5 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))

    def changes_after_training(module: nn.Module) -> dict[str, Tensor]:
        before = copy.deepcopy(dict(module.named_parameters()))
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.0)
        for step in range(200):
            optimizer.zero_grad()
            (module(inputs(name, torch.bfloat16, seed=step)).float() - target).square().mean().backward()
            optimizer.step()
        return {key: (value - before[key]).abs() for key, value in module.named_parameters()}

    changes = changes_after_training(tuned)
    assert all(bool((change > 1e-4).all()) for change in changes.values())
    if name != "gemma":
        assert not bool(changes_after_training(base)["weight"].any())


# --- Several adapters in one norm ---------------------------------------------------------------------------


def multi_norm(norms: list[TunedNorm]) -> MultiAdapterNorm:
    """A norm with the values of several tuned norms, one per adapter."""
    weight = torch.stack([norm.weight.detach() for norm in norms])
    biases = [norm.bias.detach() for norm in norms if norm.bias is not None]
    bias = torch.stack(biases) if biases else None
    return MultiAdapterNorm(norms[0], weight, bias, ActiveRows())


@pytest.mark.parametrize("max_runs", [0, 16], ids=["gathered", "one kernel per run"])
@pytest.mark.parametrize("name", MAKERS)
def test_each_row_equals_that_of_the_norm_of_its_adapter(
    name: str, max_runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_norms, "MAX_RUNS", max_runs)
    adapters = [2, 0, 1, 1, 2]
    for dtype in (torch.float32, torch.bfloat16):
        single = [TunedNorm.from_norm(norm(name, dtype, seed=seed)) for seed in range(3)]
        multi, x = multi_norm(single), inputs(name, dtype)
        expected = torch.cat([single[adapter](x[i : i + 1]) for i, adapter in enumerate(adapters)])
        with torch.inference_mode(), multi.active_rows.use(RowAdapters(adapters)):
            out = multi(x)
        assert out.dtype == dtype and multi.weight.dtype == torch.float32
        assert_close(out, expected, terms=1)


@pytest.mark.parametrize("name", ["layer", "llama", "gemma"])
def test_rows_of_one_adapter_equal_its_norm_to_the_bit(name: str) -> None:
    single = [TunedNorm.from_norm(norm(name, torch.bfloat16, seed=seed)) for seed in range(3)]
    multi, x = multi_norm(single), inputs(name, torch.bfloat16)
    with multi.active_rows.use(RowAdapters([1])):
        assert torch.equal(multi(x), single[1](x))
    assert not any(parameter.requires_grad for parameter in multi.parameters())


@pytest.mark.parametrize("max_runs", [0, 16])
def test_units_have_equal_numbers_of_rows(max_runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_norms, "MAX_RUNS", max_runs)
    single = [TunedNorm.from_norm(norm("layer", seed=seed)) for seed in range(2)]
    multi, x = multi_norm(single), inputs("layer").view(-1, WIDTH)[:24]

    def adapter_of_each_row(out: Tensor) -> list[int]:
        """The adapter with the nearest result."""
        candidates = torch.stack([tuned(x) for tuned in single])
        return [int((candidates[:, i] - out[i]).abs().sum(-1).argmin()) for i in range(len(x))]

    expected = [1] * 8 + [0] * 8 + [1] * 8
    with multi.active_rows.use(RowAdapters([1, 0, 1])):
        assert adapter_of_each_row(multi(x)) == expected
        assert adapter_of_each_row(multi(x.view(1, 2, 12, WIDTH)).view(24, WIDTH)) == expected
    with (
        pytest.raises(AssertionError, match="24 rows cannot be shared by 5 units"),
        multi.active_rows.use(RowAdapters([0] * 5)),
    ):
        multi(x)
    with pytest.raises(AssertionError, match="adapters of these rows are not set"):
        multi(x)


def test_kinds_and_epsilons_are_the_bases() -> None:
    kinds = {name: (TunedNorm.from_norm(norm(name)).kind, norm_eps(norm(name))) for name in MAKERS}
    assert kinds["layer"] == ("layer", 1e-6)
    assert kinds["llama"] == ("rms", 1e-5)
    assert kinds["gemma"] == ("rms_offset", 1e-6)
    assert kinds["rms"] == ("rms", None)
    assert kinds["group"] == ("group", 1e-5)
    assert norm_kind(TunedNorm.from_norm(norm("gemma"))) == "rms_offset"

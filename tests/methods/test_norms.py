"""The tuned norm is the base's norm, with a gain that learns."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normtune.adapters.multi import rows as norms_module
from normtune.adapters.multi.norms import MultiAdapterNorm
from normtune.adapters.multi.rows import ActiveRows, RowAdapters
from normtune.methods.norms import TunedNorm, norm_eps
from normtune.models.parts import norm_kind

WIDTH = 24


def gemma() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    return Gemma3RMSNorm(WIDTH)


def llama() -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(WIDTH, eps=1e-5)


def gemma4() -> nn.Module:  # its gain is applied before x/rms is rounded, LLaMA's after
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
    """A norm with gains (and biases) away from their start."""
    generator = torch.Generator().manual_seed(seed)
    module = MAKERS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.to(dtype)


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
            step = torch.finfo(dtype).eps
            torch.testing.assert_close(out, expected, rtol=2 * step, atol=2 * step)
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
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    for attribute, parameter in module.named_parameters():
        mine = getattr(tuned, attribute).grad
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "group"])
def test_gradients_of_a_bf16_input_are_the_fp32_ones_rounded(name: str) -> None:
    tuned, x = TunedNorm.from_norm(norm(name, torch.bfloat16)), inputs(name, torch.bfloat16)
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    low, high = x.clone().requires_grad_(), x.float().requires_grad_()
    tuned(low).backward(grad_out)
    low_gains = {name: p.grad.clone() for name, p in tuned.named_parameters()}
    tuned.zero_grad()
    tuned(high).backward(grad_out.float())
    assert low.grad is not None and low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(low.grad, high.grad.bfloat16(), rtol=1e-2, atol=1e-3)
    for name_, parameter in tuned.named_parameters():
        assert low_gains[name_].dtype == torch.float32
        torch.testing.assert_close(low_gains[name_], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["layer", "llama", "gemma"])
def test_a_second_use_of_one_input_and_a_frozen_gain_have_right_gradients(name: str) -> None:
    module, x = norm(name), inputs(name)
    module.requires_grad_(False)
    tuned = TunedNorm.from_norm(module)
    assert not any(parameter.requires_grad for parameter in tuned.parameters())
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (tuned(ours) * ours).sum().backward()
    (module(theirs) * theirs).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    assert tuned.weight.grad is None


@pytest.mark.parametrize("name", ["layer", "llama", "gemma"])
def test_only_the_input_and_its_statistics_are_saved(name: str) -> None:
    tuned, x = TunedNorm.from_norm(norm(name, torch.bfloat16)), inputs(name, torch.bfloat16).requires_grad_()
    own = {parameter.data_ptr() for parameter in tuned.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tuned(x)
    kept = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in kept) == 1
    statistics = [tensor for tensor in kept if tensor.data_ptr() != x.data_ptr()]
    rows = x.numel() // WIDTH
    assert sum(tensor.numel() for tensor in statistics) == (2 if name == "layer" else 1) * rows


@pytest.mark.parametrize("name", ["layer", "llama", "gemma"])
def test_every_gain_of_a_bf16_base_moves_at_lr_1e_4_and_none_of_its_own_would(name: str) -> None:
    base = norm(name, torch.bfloat16)
    if name != "gemma":
        with torch.no_grad():
            base.weight.fill_(1.0)
    tuned = TunedNorm.from_norm(base)
    aim = 0.5 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))

    def steps(module: nn.Module) -> dict[str, Tensor]:
        before = copy.deepcopy(dict(module.named_parameters()))
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.0)
        for step in range(200):
            optimizer.zero_grad()
            (module(inputs(name, torch.bfloat16, seed=step)).float() - aim).square().mean().backward()
            optimizer.step()
        return {key: (value - before[key]).abs() for key, value in module.named_parameters()}

    moved = steps(tuned)
    assert all(bool((change > 1e-4).all()) for change in moved.values())
    if name != "gemma":
        assert not bool(steps(base)["weight"].any())


# --- Several adapters ---------------------------------------------------------------------------------------


def mixed_of(alone: list[TunedNorm]) -> MultiAdapterNorm:
    weight = torch.stack([one.weight.detach() for one in alone])
    bias = (
        None
        if alone[0].bias is None
        else torch.stack([one.bias.detach() for one in alone if one.bias is not None])
    )
    return MultiAdapterNorm.from_norm(alone[0], weight, bias, ActiveRows())


@pytest.mark.parametrize("few", [0, 16], ids=["gathered", "a kernel a run"])
@pytest.mark.parametrize("name", MAKERS)
def test_each_row_of_a_mixed_batch_equals_its_adapter_alone(
    name: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms_module, "MAX_RUNS", few)
    adapters = [2, 0, 1, 1, 2]
    for dtype in (torch.float32, torch.bfloat16):
        alone = [TunedNorm.from_norm(norm(name, dtype, seed=seed)) for seed in range(3)]
        mixed, x = mixed_of(alone), inputs(name, dtype)
        grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        with mixed.rows.use(RowAdapters(adapters)):
            out = mixed(ours)
            out.backward(grad_out)
        expected = torch.cat([alone[one](theirs[i : i + 1]) for i, one in enumerate(adapters)])
        expected.backward(grad_out)
        step = 2 * torch.finfo(dtype).eps
        assert out.dtype == dtype and mixed.weight.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=step, atol=step)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=step, atol=step)
        for key, bank in mixed.named_parameters():
            wanted = torch.stack([getattr(one, key).grad for one in alone])
            torch.testing.assert_close(bank.grad, wanted, rtol=1e-5, atol=2e-5)
        with torch.inference_mode(), mixed.rows.use(RowAdapters(adapters)):
            torch.testing.assert_close(mixed(x), expected, rtol=step, atol=step)


@pytest.mark.parametrize("name", ["layer", "llama", "gemma"])
def test_a_mixed_norm_of_one_adapters_rows_is_its_norm_to_the_bit_and_saves_no_more(name: str) -> None:
    alone = [TunedNorm.from_norm(norm(name, torch.bfloat16, seed=seed)) for seed in range(3)]
    mixed, x = mixed_of(alone), inputs(name, torch.bfloat16).requires_grad_()
    own = {parameter.data_ptr() for parameter in mixed.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with mixed.rows.use(RowAdapters([1])), torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        assert torch.equal(mixed(x), alone[1](x))
    mine = saved[: len(saved) // 2 + 1]
    kept = [tensor for tensor in mine if tensor.data_ptr() not in own and tensor.data_ptr() != x.data_ptr()]
    rows = x.numel() // WIDTH
    assert sum(tensor.numel() for tensor in kept) == (2 if name == "layer" else 1) * rows


@pytest.mark.parametrize("few", [0, 16])
def test_units_share_rows_evenly_or_by_their_sizes(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms_module, "MAX_RUNS", few)
    alone = [TunedNorm.from_norm(norm("layer", seed=seed)) for seed in range(2)]
    mixed, x = mixed_of(alone), inputs("layer").view(-1, WIDTH)[:24]

    def owners(found: Tensor) -> list[int]:
        made = torch.stack([one(x) for one in alone])
        return [int((made[:, i] - found[i]).abs().sum(-1).argmin()) for i in range(len(x))]

    for units, wanted in [
        (RowAdapters([1, 0, 1]), [1] * 8 + [0] * 8 + [1] * 8),
        (RowAdapters([1, 0, 1], [2, 1, 1]), [1] * 12 + [0] * 6 + [1] * 6),
        (RowAdapters([0, 1], [16, 80]), [0] * 4 + [1] * 20),  # patches, four of which became a row
    ]:
        with mixed.rows.use(units):
            assert owners(mixed(x)) == wanted
            assert owners(mixed(x.view(1, 2, 12, WIDTH)).view(24, WIDTH)) == wanted
    with (
        pytest.raises(AssertionError, match="24 rows cannot be shared by 5 units"),
        mixed.rows.use(RowAdapters([0] * 5)),
    ):
        mixed(x)
    with pytest.raises(AssertionError, match="nobody has said"):
        mixed(x)


def test_kinds_and_epsilons_are_the_bases() -> None:
    found = {name: (TunedNorm.from_norm(norm(name)).kind, norm_eps(norm(name))) for name in MAKERS}
    assert found["layer"] == ("layer", 1e-6)
    assert found["llama"] == ("rms", 1e-5)
    assert found["gemma"] == ("rms_offset", 1e-6)
    assert found["rms"] == ("rms", None)
    assert found["group"] == ("group", 1e-5)
    assert norm_kind(TunedNorm.from_norm(norm("gemma"))) == "rms_offset"

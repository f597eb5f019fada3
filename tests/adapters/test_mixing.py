"""Mixed adapters: weighted sums of changes, their limits, what the card records, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.mixing import mix_adapters, sum_products, sum_values
from normtune.adapters.storage import CARD_FILE, load_adapter, read_adapter_info, read_tensors, save_adapter
from normtune.adapters.training_rows import TrainingRows, read_rows
from normtune.methods.adapt import adapt
from tests.support.base_models import compute_logits, input_error, perturb_trained, save_base, tiny_base
from tests.support.tolerance import assert_close, differ, relative_error


def save_trained(
    recipe: str,
    directory: Path,
    seed: int,
    *,
    base: nn.Module | None = None,
    base_name: str = "tiny",
    rows: TrainingRows | None = None,
    **data: Any,
) -> Path:
    """Train a tiny MISS a little and save its adapter."""
    model = tiny_base("miss") if base is None else base
    base_fingerprint = fingerprint(model)
    tuned = adapt(model, recipe)
    perturb_trained(tuned, seed)
    save_adapter(tuned, directory, base_name=base_name, base_fingerprint=base_fingerprint, data=data, rows=rows)
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return read_tensors(directory, read_adapter_info(directory))


@pytest.mark.parametrize("recipe", ["ln", "bias", "full", "vision=ln,language=attention[1:]"])
def test_a_mixed_parameter_is_the_base_plus_the_weighted_changes(recipe: str, tmp_path: Path) -> None:
    base = save_base("miss", tmp_path / "base")
    adapters = [save_trained(recipe, tmp_path / str(seed), seed, base_name=str(base)) for seed in (1, 2)]
    result = mix_adapters({adapters[0]: 0.5, adapters[1]: 0.25}, out=tmp_path / "out")
    parameters = dict(tiny_base("miss").named_parameters(remove_duplicate=False))
    first, second = (tensors_of(directory) for directory in adapters)
    for name, tensor in tensors_of(tmp_path / "out").items():
        start = parameters[name].detach()
        expected = start + 0.5 * (first[name] - start) + 0.25 * (second[name] - start)
        assert_close(tensor, expected, terms=3)
        assert differ(tensor, first[name], terms=3)
    assert result.base_weight == 0.25 and result.tensors == len(first) and result.lost is None
    load_adapter(tiny_base("miss"), tmp_path / "out")  # it loads like any other


def test_weight_one_is_the_adapter_and_weight_zero_the_base(tmp_path: Path) -> None:
    base = save_base("miss", tmp_path / "base")
    adapter = save_trained("ln", tmp_path / "ln", 1)  # its base is not to be found under its name
    mix_adapters({adapter: 1}, out=tmp_path / "all")
    mix_adapters({adapter: 0}, out=tmp_path / "none", model=str(base))
    untouched = tiny_base("miss")
    parameters = dict(untouched.named_parameters())
    before, after, zero = tensors_of(adapter), tensors_of(tmp_path / "all"), tensors_of(tmp_path / "none")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(zero[name], parameters[name]) for name in before)
    loaded = load_adapter(tiny_base("miss"), tmp_path / "none")
    assert torch.equal(compute_logits(loaded.model), compute_logits(untouched))


def lora(rank: int, seed: int, used: slice) -> dict[str, Tensor]:
    """Factors of a LoRA that uses only some of its ranks, and a norm beside it."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.zeros(rank, 6), torch.zeros(5, rank)
    a[used] = torch.randn(a[used].shape, generator=generator)
    b[:, used] = torch.randn(b[:, used].shape, generator=generator)
    return {"q.lora_A": a, "q.lora_B": b, "norm.weight": torch.randn(4, generator=generator)}


def product(state: dict[str, Tensor]) -> Tensor:
    return state["q.lora_B"] @ state["q.lora_A"]


def test_summed_products_are_exact_where_the_rank_suffices_and_summed_factors_are_not() -> None:
    states, weights = [lora(4, seed, slice(0, 2)) for seed in (1, 2)], (0.3, 0.7)  # rank 2 each, 4 together
    dense = 0.3 * product(states[0]) + 0.7 * product(states[1])
    exact, lost = sum_products(states, weights)
    assert_close(product(exact), dense, terms=6)
    assert lost is not None and lost < torch.finfo(torch.float32).eps
    naive = sum_values(states, weights)
    assert relative_error(product(naive), dense) > 0.1, "the terms B_1 A_2 and B_2 A_1 are missing or wrong"
    for result in (exact, naive):
        assert list(result) == list(states[0]) and result["q.lora_A"].shape == (4, 6)
        assert_close(result["norm.weight"], 0.3 * states[0]["norm.weight"] + 0.7 * states[1]["norm.weight"], terms=2)


def test_summed_products_are_truncated_as_an_svd_of_the_dense_sum() -> None:
    states = [lora(2, seed, slice(0, 2)) for seed in (1, 2, 3)]
    dense = sum(product(state).double() for state in states) / 3
    result, lost = sum_products(states, [1 / 3] * 3)
    u, singular, v = torch.linalg.svd(dense, full_matrices=False)
    assert_close(product(result), (u[:, :2] * singular[:2] @ v[:2]).float(), terms=6)
    assert lost == pytest.approx(float(singular[2:].square().sum() / singular.square().sum()))
    assert lost > 0.01


def test_rows_of_a_keep_their_size_so_that_each_direction_can_be_trained() -> None:
    states = [lora(4, seed, slice(0, 4)) for seed in (1, 2)]
    rows = torch.cat([state["q.lora_A"] for state in states])
    for scale in (1.0, 0.0):  # of B: after training, and before it
        scaled = [state | {"q.lora_B": scale * state["q.lora_B"]} for state in states]
        result, _ = sum_products(scaled, [0.5, 0.5])
        assert_close(result["q.lora_A"].norm(dim=1), rows.square().sum(1).mean().sqrt().expand(4), terms=6)


def test_a_linear_that_is_smaller_than_the_rank_and_a_sum_of_zero() -> None:
    state = lora(8, 1, slice(0, 8))  # of a linear of 6 inputs and 5 outputs
    result, _ = sum_products([state], [0.5])
    assert result["q.lora_A"].shape == (8, 6) and result["q.lora_B"].shape == (5, 8)
    assert_close(product(result), 0.5 * product(state), terms=8)
    zero, lost = sum_products([state, state], [1, -1])
    assert lost is not None and not differ(product(zero) + product(state), product(state), terms=8)


def test_a_mixed_lora_adds_half_of_its_change(tmp_path: Path) -> None:
    """The trained norms beside it are mixed with the base."""
    base = save_base("miss", tmp_path / "base")
    adapter = save_trained("vision=ln,language=lora(r=2)", tmp_path / "lora", 1, base_name=str(base))
    result = mix_adapters({adapter: 0.5}, out=tmp_path / "half")
    before, after = tensors_of(adapter), tensors_of(tmp_path / "half")
    linear = next(name for name in before if name.endswith(".lora_A")).removesuffix(".lora_A")
    products = [state[linear + ".lora_B"] @ state[linear + ".lora_A"] for state in (before, after)]
    assert_close(products[1], 0.5 * products[0], terms=2)
    assert result.lost is not None and "LoRA" in str(result)


def test_the_card_records_parents_weights_and_licences(tmp_path: Path) -> None:
    def rows(*numbers: int) -> TrainingRows:
        return TrainingRows(f"d{numbers[0]}", np.array(numbers, np.uint64), tuple(map(str, numbers)))

    limits = {"prompt": 10, "answer": 5}
    slake = save_trained(
        "ln", tmp_path / "a", 1, rows=rows(1, 2), name="slake", split="train", licence="CC BY 4.0", limits=limits
    )
    other = save_trained(
        "ln", tmp_path / "b", 2, rows=rows(2, 3), name="vqa-rad", licence="CC0", limits={"prompt": None, "answer": 9}
    )
    result = mix_adapters({slake: 0.5, other: 0.5}, out=tmp_path / "out")
    assert result.without_rows == []
    data = read_adapter_info(tmp_path / "out").data
    assert data is not None
    assert (data["name"], data["licence"]) == ("slake + vqa-rad", "slake: CC BY 4.0; vqa-rad: CC0")
    assert data["limits"] == {"prompt": None, "answer": 9}
    assert data["parents"][0] == {
        "adapter": "a",
        "weight": 0.5,
        "name": "slake",
        "split": "train",
        "licence": "CC BY 4.0",
        "sha256": read_adapter_info(slake).sha256,
    }
    card = (tmp_path / "out" / CARD_FILE).read_text()
    assert "adapter a, weight 0.5000, name slake, split train, licence CC BY 4.0" in card
    assert str(tmp_path) not in card, "cards are published"
    union = read_rows(tmp_path / "out")
    assert union is not None and union.rows.tolist() == [1, 2, 3] and union.pictures == ("1", "2", "3")
    plain = save_trained("ln", tmp_path / "c", 3)
    assert mix_adapters({slake: 0.5, plain: 0.5}, out=tmp_path / "unknown").without_rows == [str(plain)]
    assert read_rows(tmp_path / "unknown") is None


def test_what_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    first = save_trained("ln", tmp_path / "ln", 1, limits={"max_pixels": 100}, choices={"prompt": "llava"})
    base = tiny_base("miss")
    with torch.no_grad():
        next(base.parameters()).add_(1)
    cases = {
        "which has other values": save_trained("ln", tmp_path / "base", 1, base=base),
        "Mix adapters of one recipe": save_trained("bias", tmp_path / "bias", 1),
        "different --max-pixels": save_trained("ln", tmp_path / "pixels", 1, limits={"max_pixels": 50}),
        "different prompts of options": save_trained(
            "ln", tmp_path / "options", 1, limits={"max_pixels": 100}, choices={"prompt": "letters"}
        ),
    }
    for message, second in cases.items():
        assert message in input_error(partial(mix_adapters, {first: 0.5, second: 0.5}, out=tmp_path / "out"))
    for recipe, message in {
        "ia3": "trained by ia3",
        "lora(r=2,dora=1)": "dora=1",
        "ln+road": "trained by road",
    }.items():
        weights: dict[str | Path, float] = {save_trained(recipe, tmp_path / recipe, 1): 0.5}
        assert message in input_error(partial(mix_adapters, weights, out=tmp_path / "out"))
    other = save_base("miss", tmp_path / "files")
    changed = cases["which has other values"]
    message = input_error(lambda: mix_adapters({changed: 0.5}, out=tmp_path / "out", model=str(other)))
    assert "is not the one that the adapters were trained on" in message
    assert "finite weights" in input_error(lambda: mix_adapters({first: float("nan")}, out=tmp_path / "out"))
    assert "finite weights" in input_error(lambda: mix_adapters({}, out=tmp_path / "out"))
    assert "not an empty directory" in input_error(lambda: mix_adapters({first: 1.0}, out=first))
    assert not (tmp_path / "out").exists()

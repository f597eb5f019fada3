"""Training at sites, and what the average of their adapters is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from normtune.adapters.storage import read_adapter_info
from normtune.federated.rounds import federate
from normtune.federated.rules import average
from normtune.runtime.files import read_json
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.support.base_models import input_error
from tests.support.federated_sites import InProcess, federation, write_site
from tests.support.tolerance import DISTINCT, assert_close, differ, relative_bound, relative_error

PICTURES = {"a": range(4), "b": range(4, 8)}
UNCLIPPED: dict[str, Any] = {"max_grad_norm": 1e9, "lr": 0.1}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sites of equal size, and `pooled` with the rows of both."""
    folder = tmp_path_factory.mktemp("sites")
    roots = {name: write_site(folder / name, numbers) for name, numbers in PICTURES.items()}
    return roots | {"pooled": write_site(folder / "pooled", range(8))}


def run_sites(base: Path, roots: dict[str, Path], out: Path, **options: Any) -> InProcess:
    config = federation(base, out, **options)
    engine = InProcess(config, {name: roots[name] for name in PICTURES})
    federate(config, list(PICTURES), engine, quiet=True)
    return engine


def train_pooled(base: Path, roots: dict[str, Path], out: Path, steps: int, **options: Any) -> dict[str, torch.Tensor]:
    values = {"max_steps": steps, "batch": 16, "warmup": 0, "schedule": "constant", "device": "cpu", **options}
    train(TrainConfig(model=str(base), data="jsonl", root=roots["pooled"], out=out, **values))
    return load_file(out / "adapter.safetensors")


def test_one_step_of_sgd_at_equal_sites_is_one_pooled_step(base: Path, roots: dict[str, Path], tmp_path: Path) -> None:
    """The average of the sites' steps is the step of the average gradient, if a step is linear in the gradient."""
    run_sites(base, roots, tmp_path / "sgd", optimizer="sgd", **UNCLIPPED)
    averaged = load_file(tmp_path / "sgd" / "adapter.safetensors")
    pooled = train_pooled(base, roots, tmp_path / "pooled", 1, optimizer="sgd", **UNCLIPPED)
    start = load_file(tmp_path / "sgd" / "start" / "adapter.safetensors")
    assert any(differ(pooled[name], start[name]) for name in start)
    for name, value in pooled.items():
        assert_close(averaged[name], value)
    # AdamW divides each site's gradient by its own size: not linear
    run_sites(base, roots, tmp_path / "adamw", **UNCLIPPED)
    adamw = load_file(tmp_path / "adamw" / "adapter.safetensors")
    pooled = train_pooled(base, roots, tmp_path / "pooled-adamw", 1, **UNCLIPPED)
    assert any(differ(adamw[name], pooled[name]) for name in pooled)


def test_adam_at_the_server_after_one_step_of_sgd_is_a_pooled_step_of_adam(
    base: Path, roots: dict[str, Path], tmp_path: Path
) -> None:
    """Up to epsilon: in Adam's first step every value moves by the learning rate in its gradient's direction."""
    run_sites(base, roots, tmp_path / "out", optimizer="sgd", server="adam", server_lr=0.1, max_grad_norm=1e9, lr=1e6)
    averaged = load_file(tmp_path / "out" / "adapter.safetensors")
    pooled = train_pooled(base, roots, tmp_path / "pooled", 1, **UNCLIPPED)
    start = load_file(tmp_path / "out" / "start" / "adapter.safetensors")
    bound = relative_bound()
    moved = total = 0
    for name, value in pooled.items():
        clear = (value - start[name]).abs() > 0.1 * (1 - bound)  # the gradient is far above AdamW's epsilon
        assert_close(averaged[name][clear], value[clear])
        moved, total = moved + int(clear.sum()), total + clear.numel()
    assert moved > 0.5 * total


def test_factors_of_lora_average_to_another_product_than_their_products(
    base: Path, roots: dict[str, Path], tmp_path: Path
) -> None:
    """Each site changes a weight by B A. After one step of SGD from B = 0 the sites share A, later they do not."""
    errors: dict[tuple[int, str], float] = {}
    options: dict[str, Any] = {"tune": "decoder=lora(r=2)", "optimizer": "sgd", "max_grad_norm": 1e9, "lr": 1.0}
    for steps in (1, 4):
        engine = run_sites(base, roots, tmp_path / f"{steps}", local_steps=steps, batch=4, **options)
        updates = [update.values for update in engine.updates.values()]
        expected = {
            name: sum(0.5 * torch.from_numpy(v) for v in _products(updates, name)) for name in _linears(updates)
        }
        for method in ("naive", "exact"):
            averaged, _ = average(updates, [0.5, 0.5], method)
            actual = [torch.from_numpy(_products([averaged], name)[0]) for name in expected]
            errors[steps, method] = relative_error(
                torch.cat([value.flatten() for value in actual]),
                torch.cat([torch.as_tensor(value).flatten() for value in expected.values()]),
            )
    assert errors[1, "naive"] < relative_bound() and errors[1, "exact"] < relative_bound()
    assert errors[4, "naive"] > DISTINCT * relative_bound()
    assert errors[4, "exact"] < errors[4, "naive"]  # it loses what the rank cannot hold


def _linears(updates: list[dict[str, np.ndarray]]) -> list[str]:
    return [name.removesuffix(".lora_A") for name in updates[0] if name.endswith(".lora_A")]


def _products(updates: list[dict[str, np.ndarray]], linear: str) -> list[np.ndarray]:
    return [update[f"{linear}.lora_B"] @ update[f"{linear}.lora_A"] for update in updates]


def test_the_proximal_term_keeps_a_site_near_the_start(base: Path, roots: dict[str, Path], tmp_path: Path) -> None:
    norms = []
    for strength in (0.0, 1.0):
        options = {"local_steps": 4, "optimizer": "sgd", "proximal": strength, **UNCLIPPED}
        run_sites(base, roots, tmp_path / f"{strength}", **options)
        start = load_file(tmp_path / f"{strength}" / "start" / "adapter.safetensors")
        final = load_file(tmp_path / f"{strength}" / "adapter.safetensors")
        norms.append(sum(float((final[name] - start[name]).square().sum()) for name in start))
    assert norms[1] < 0.9 * norms[0]


def test_local_norms_stay_at_their_site_and_go_on(base: Path, roots: dict[str, Path], tmp_path: Path) -> None:
    run_sites(base, roots, tmp_path / "out", rounds=2, local="vision", lr=0.1)
    server = load_file(tmp_path / "out" / "adapter.safetensors")
    start = load_file(tmp_path / "out" / "start" / "adapter.safetensors")
    a, b = (load_file(tmp_path / "out" / "sites" / site / "adapter" / "adapter.safetensors") for site in "ab")
    tensors = read_adapter_info(tmp_path / "out").tensors
    vision = [name for name in start if tensors[name].part == "vision"]
    assert vision and all(torch.equal(server[name], start[name]) for name in vision)
    assert any(differ(a[name], b[name]) for name in vision)
    shared = start.keys() - set(vision)
    assert all(torch.equal(server[name], a[name]) and torch.equal(a[name], b[name]) for name in shared)
    # two steps of AdamW move a value by up to twice the rate: the second round started from the first one's values
    assert max(float((a[name] - start[name]).abs().max()) for name in vision) > 1.2 * 0.1


@pytest.mark.skipif(importlib.util.find_spec("opacus") is None, reason="opacus is not installed")
def test_a_private_site_spends_its_budget_over_all_rounds_and_no_more(
    base: Path, roots: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"dp_epsilon": 4.0, "dp_delta": 1e-2, "batch": 2, "rounds": 2}
    run_sites(base, roots, tmp_path / "out", **options)
    record = read_json(tmp_path / "out" / "federation.json")["rounds"]
    first, second = (entry["accepted"]["a"]["epsilon"] for entry in record)
    assert first < second <= 1.01 * 4.0 and second > 0.9 * 4.0
    info = read_adapter_info(tmp_path / "out" / "sites" / "a" / "adapter")
    assert info.data is not None and info.data["privacy"]["epsilon"] == second and info.data["privacy"]["steps"] == 2
    # more rounds would need more noise in those that are over: the sites refuse
    message = input_error(lambda: run_sites(base, roots, tmp_path / "out", **{**options, "rounds": 3}))
    assert "of 3 updates is above --dp-epsilon 4" in message

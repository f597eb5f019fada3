"""Which updates are refused, and how the others are averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normtune.federated.rules import ServerAdam, SiteUpdate, average, find_refusals, site_weights, update_norm
from tests.support.tolerance import approx, assert_close, differ

FINGERPRINT = "0" * 32 + "-" + "1" * 32
START = {"norm.weight": np.ones(4, np.float32), "norm.bias": np.zeros(4, np.float32)}


def update(change: float = 0.1, pairs: int = 10) -> SiteUpdate:
    values = {name: value + np.float32(change) for name, value in START.items()}
    return SiteUpdate(values, pairs, 1, 0.0, None, FINGERPRINT)


def refusals(**others: SiteUpdate) -> dict[str, str]:
    updates = {"a": update(0.1), "b": update(-0.2), "c": update(0.15), **others}
    return find_refusals(updates, START, FINGERPRINT, max_update=10)


def with_values(**values: Any) -> SiteUpdate:
    return replace(update(), values={**update().values, **{f"norm.{name}": value for name, value in values.items()}})


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (with_values(bias=np.array([0, np.nan, 0, 0], np.float32)), "norm.bias has values that are not finite"),
        (with_values(bias=np.full(4, np.inf, np.float32)), "norm.bias has values that are not finite"),
        (with_values(bias=np.zeros((4, 1), np.float32)), "norm.bias has shape (4, 1) float32, not (4,) float32"),
        (with_values(bias=np.zeros(4)), "norm.bias has shape (4,) float64, not (4,) float32"),
        (with_values(bias="0 0 0 0"), "norm.bias is no array"),
        (with_values(gate=np.zeros(4, np.float32)), "1 tensors are missing or unknown, the first is norm.gate"),
        (replace(update(), values={"norm.bias": START["norm.bias"]}), "1 tensors are missing or unknown"),
        (replace(update(), pairs=0), "its number of pairs is not above 0"),
        (replace(update(), base_fingerprint="2" * 32 + "-" + "1" * 32), "its base has other values"),
        (replace(update(), base_fingerprint="x"), "its base has other values"),
        (update(100.0), "times as large as the median (limit 10)"),
    ],
)
def test_a_hostile_update_is_refused_and_named(hostile: SiteUpdate, reason: str) -> None:
    refused = refusals(hostile=hostile)
    assert refused.keys() == {"hostile"} and reason in refused["hostile"]


def test_honest_updates_are_accepted() -> None:
    assert refusals() == {}
    # between two sites there is no majority
    two = {"a": update(), "b": update(100.0)}
    assert find_refusals(two, START, FINGERPRINT, max_update=10) == {}
    # but the updates of the round before are one
    earlier = [update_norm(update().values, START)] * 2
    assert find_refusals(two, START, FINGERPRINT, 10, earlier).keys() == {"b"}


def test_sites_weigh_as_many_pairs_as_they_have() -> None:
    updates = {"a": update(pairs=30), "b": update(pairs=10)}
    assert site_weights(updates, "pairs") == {"a": 0.75, "b": 0.25}
    assert site_weights(updates, "equal") == {"a": 0.5, "b": 0.5}


def test_norms_average_by_weight() -> None:
    averaged, lost = average([update(0.1).values, update(0.5).values], [0.75, 0.25], "exact")
    assert lost is None
    expected = torch.from_numpy(update(0.2).values["norm.weight"])
    assert_close(torch.from_numpy(averaged["norm.weight"]), expected, terms=2)
    assert update_norm(update(0.5).values, START) == approx(0.5 * 8**0.5)


def test_the_exact_average_of_lora_is_the_average_of_its_products() -> None:
    generator = torch.Generator().manual_seed(0)
    states = []
    for _ in range(2):  # products of rank 1, so that the average has the rank 2 of the factors
        a, b = torch.randn(2, 5, generator=generator), torch.randn(6, 2, generator=generator)
        b[:, 1] = 0
        states.append({"q.lora_A": a.numpy(), "q.lora_B": b.numpy()})
    products = [torch.from_numpy(s["q.lora_B"] @ s["q.lora_A"]) for s in states]
    expected = 0.25 * products[0] + 0.75 * products[1]

    def product(method: str) -> torch.Tensor:
        averaged, _ = average(states, [0.25, 0.75], method)
        return torch.from_numpy(averaged["q.lora_B"] @ averaged["q.lora_A"])

    assert_close(product("exact"), expected)
    assert differ(product("naive"), expected)


def test_the_server_takes_the_steps_of_adam() -> None:
    generator = np.random.default_rng(0)
    value = {"gain": generator.normal(size=8).astype(np.float32)}
    parameter = nn.Parameter(torch.from_numpy(value["gain"].copy()))
    server = ServerAdam(0.1)
    reference = torch.optim.Adam([parameter], lr=0.1, betas=server.betas, eps=server.epsilon)
    for _ in range(3):
        change = generator.normal(size=8).astype(np.float32)
        parameter.grad = -torch.from_numpy(change)
        reference.step()
        value = server.step(value, {"gain": value["gain"] + change})
    assert_close(torch.from_numpy(value["gain"]), parameter.detach())

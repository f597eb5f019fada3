"""Encrypted updates: what the server averages without reading it, and what each side can notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from normtune.adapters.info import AdapterInfo
from normtune.errors import InputError
from normtune.federated.config import FederateConfig
from normtune.federated.rounds import STATE_FILE, federate
from normtune.federated.rules import SiteUpdate, Values
from normtune.federated.site import RoundTask, write_site_adapter
from normtune.runtime.files import read_json
from tests.support.base_models import input_error
from tests.support.federated_sites import InProcess, federation, write_site
from tests.support.tolerance import assert_close, differ

tenseal = pytest.importorskip("tenseal")
from normtune.federated import secure  # noqa: E402  # needs TenSEAL

START: Values = {"a": np.ones((50, 100), np.float32), "b": np.zeros(7, np.float32)}  # two ciphertexts

BASE = "1-2"


def make_contexts() -> tuple[Any, Any]:
    """The contexts of a site and of the server, as NVFlare's HEBuilder writes them."""
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        poly_modulus_degree=8192,
        coeff_mod_bit_sizes=[60, 40, 40],
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.generate_relin_keys()
    context.global_scale = 2**40
    site, server = (context.serialize(is_site, is_site, save_galois_keys=False) for is_site in (True, False))
    return tenseal.context_from(site), tenseal.context_from(server)


@pytest.fixture(scope="module")
def contexts() -> tuple[Any, Any]:
    return make_contexts()


def shifted(amount: float) -> Values:
    return {
        name: (value + amount * np.linspace(-1, 1, value.size).reshape(value.shape)) for name, value in START.items()
    }


def as_update(values: Values) -> SiteUpdate:
    return SiteUpdate(values, 10, 1, 0.0, 0.5, BASE)


def test_the_average_of_ciphertexts_is_that_of_the_values(contexts: tuple[Any, Any]) -> None:
    site, server = contexts
    weights = [0.7, 0.2, 0.1]
    values = [{name: value.astype(np.float32) for name, value in shifted(k).items()} for k in (0.1, -0.05, 0.02)]
    encrypted = [secure.encrypt(update, START, site) for update in values]
    assert [sorted(update) for update in encrypted] == [["encrypted/0", "encrypted/1"]] * 3
    averaged = secure.average(encrypted, weights, server)
    decrypted = secure.decrypt(START | averaged, START, site)
    for name in START:
        expected = sum(w * update[name] for w, update in zip(weights, values, strict=True))
        assert_close(torch.from_numpy(decrypted[name]), torch.from_numpy(expected.astype(np.float32)))
        assert differ(torch.from_numpy(decrypted[name]), torch.from_numpy(START[name]))
    with pytest.raises(ValueError, match="secret_key"):  # the server's context has none
        secure.decrypt(START | averaged, START, server)


def test_the_server_refuses_what_it_cannot_average(contexts: tuple[Any, Any]) -> None:
    site, server = contexts
    good = as_update(secure.encrypt(START, START, site))
    first = good.values["encrypted/0"]
    updates = {
        "good": good,
        "other base": replace(good, base_fingerprint="x-y"),
        "no base": replace(good, base_fingerprint="x"),
        "no pairs": replace(good, pairs=0),
        "plain": as_update(START),
        "garbage": as_update(good.values | {"encrypted/1": first[:1000]}),
        "short": as_update({"encrypted/0": first}),
        "averaged": as_update(secure.average([good.values], [1.0], server)),
        "text": as_update({"encrypted/0": "x"}),  # type: ignore[dict-item]
    }
    refused = secure.find_refusals(updates, START, BASE, server)
    assert sorted(refused) == sorted(updates.keys() - {"good"})
    assert refused["short"] == "its update has 4096 encrypted values, not 5007"
    message = input_error(lambda: secure.average([good.values] * 2, [1 - 1e-12, 1e-12], server))
    assert "Use --weights equal" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_site_does_not_send_what_the_server_could_not_notice(value: float, contexts: tuple[Any, Any]) -> None:
    broken = START | {"b": np.full(7, value, np.float32)}
    assert "Lower --lr" in input_error(lambda: secure.encrypt(broken, START, contexts[0]))


class Encrypted(InProcess):
    """Sites that encrypt; those in `scaled` multiply their update."""

    def __init__(self, config: FederateConfig, roots: dict[str, Path], context: Any, scaled: str = "") -> None:
        super().__init__(config, roots)
        self.context, self.scaled = context, scaled

    def train_round(self, task: RoundTask) -> dict[str, SiteUpdate | str]:
        answers: dict[str, SiteUpdate | str] = {}
        for name, site in self.sites.items():
            try:
                update = secure.train_encrypted(task, site, self.folder(name), self.context)
            except InputError as error:
                answers[name] = str(error)
                continue
            if name == self.scaled:
                start, _ = secure.split(task.values)
                trained = secure.decrypt(start | update.values, start, self.context)
                values = {key: value + 1000 * (trained[key] - value) for key, value in start.items()}
                update = replace(update, values=secure.encrypt(values, start, self.context))
            answers[name] = update
        return answers

    def finish(self, info: AdapterInfo, values: Values) -> None:
        names = [name for name, tensor in info.tensors.items() if tensor.part != "vision"]
        for name in self.sites:
            write_site_adapter(self.folder(name), info, secure.decrypt(values, names, self.context))


def test_an_encrypted_federation_ends_with_the_adapter_of_a_plain_one(
    base: Path, contexts: tuple[Any, Any], tmp_path: Path
) -> None:
    roots = {name: write_site(tmp_path / name, numbers) for name, numbers in {"a": range(4), "b": range(4, 6)}.items()}
    options: dict[str, Any] = {"rounds": 2, "optimizer": "sgd", "lr": 0.1, "local": "vision"}
    plain = federation(base, tmp_path / "plain", **options)
    federate(plain, list(roots), InProcess(plain, roots), quiet=True)
    config = federation(base, tmp_path / "out", secure=True, **options)
    result = federate(config, list(roots), Encrypted(config, roots, contexts[0]), quiet=True, context=contexts[1])
    assert "the adapter is at the sites" in str(result) and not (config.out / "adapter.json").exists()
    record = read_json(config.out / "federation.json")
    assert record["finished"] and record["bytes_a_round"] > 10 * result.rounds[0]["accepted"]["a"]["pairs"]
    state, start = load_file(config.out / STATE_FILE), load_file(config.out / "start" / "adapter.safetensors")
    assert all(torch.equal(v, start[n.removeprefix("values/")]) for n, v in state.items() if "encrypted" not in n)
    for site in roots:
        expected, actual = (
            load_file(c.out / "sites" / site / "adapter" / "adapter.safetensors") for c in (plain, config)
        )
        assert any(differ(expected[name], start[name]) for name in expected)
        for name, value in expected.items():
            assert_close(actual[name], value)


def test_sites_notice_a_scaled_update_of_another_site(base: Path, contexts: tuple[Any, Any], tmp_path: Path) -> None:
    roots = {name: write_site(tmp_path / name, [number]) for number, name in enumerate("abc")}
    config = federation(base, tmp_path / "out", secure=True, rounds=2)
    engine = Encrypted(config, roots, contexts[0], scaled="c")
    message = input_error(lambda: federate(config, list(roots), engine, quiet=True, context=contexts[1]))
    assert "round 2: 0 of 3 sites sent a usable update" in message
    assert "another site has sent a scaled update" in message


def test_what_a_blind_server_cannot_do_is_refused(
    run_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    command = ["federate", "nano", "--site", "a=phantom-a:2", "--out", tmp_path / "out", "--secure"]
    for options, message in (
        (["--average", "exact", "--tune", "decoder=lora"], "cannot compute --average exact"),
        (["--server", "adam"], "cannot compute --server adam"),
        ([], "--secure needs --kit"),
    ):
        status, _, error = run_command(*command, *options)
        assert status == 2 and message in error

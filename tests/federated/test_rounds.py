"""The rounds of a server: what is recorded, which sites count, and that a killed server continues."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from normtune.adapters.storage import read_adapter_info
from normtune.federated.rounds import RECORD_FILE, STATE_FILE, Federation, federate
from normtune.federated.rules import SiteUpdate
from normtune.federated.site import RoundTask
from normtune.runtime.files import read_json
from tests.support.base_models import input_error
from tests.support.federated_sites import Answer, Scripted, federation
from tests.support.tolerance import assert_close


def shift(base: Path, amount: float) -> Answer:
    """A site that adds a number to every value in each round."""

    def answer(task: RoundTask) -> SiteUpdate:
        fingerprint = read_adapter_info(task.config.out / "start").base_fingerprint
        values = {name: value + np.float32(amount * task.round) for name, value in task.values.items()}
        return SiteUpdate(values, 10, 1, 0.0, 0.5, fingerprint)

    return answer


def run(base: Path, out: Path, sites: dict[str, Answer], **options: object) -> tuple[Federation, Scripted]:
    engine = Scripted(sites)
    return federate(federation(base, out, **options), list(sites), engine, quiet=True), engine


def test_a_bad_site_is_named_and_the_round_goes_on(base: Path, tmp_path: Path) -> None:
    sites: dict[str, Answer] = {
        **{name: shift(base, 0.1) for name in "abc"},
        "late": lambda task: "late: no answer within 5 s",
        "scaled": shift(base, 1000),
    }
    result, engine = run(base, tmp_path / "out", sites, rounds=2)
    record = read_json(tmp_path / "out" / RECORD_FILE)
    assert [sorted(entry["accepted"]) for entry in record["rounds"]] == [["a", "b", "c"]] * 2
    assert record["rounds"][0]["refused"]["late"] == "late: no answer within 5 s"
    assert result.refused["late"] == [f"round {number}: late: no answer within 5 s" for number in (1, 2)]
    assert "scaled: refused in round 2: its update is" in str(result)
    start, final = engine.tasks[0].values, engine.final
    assert final is not None
    for name, value in start.items():
        assert_close(torch.from_numpy(final[name]), torch.from_numpy(value + np.float32(0.3)))


def test_too_few_sites_stop_the_federation_and_keep_its_rounds(base: Path, tmp_path: Path) -> None:
    def fails_later(task: RoundTask) -> SiteUpdate | str:
        return shift(base, 0.1)(task) if task.round == 1 else "its process was killed by signal 9"

    def attempt() -> None:
        run(base, tmp_path / "out", {"a": shift(base, 0.1), "b": fails_later}, rounds=2)

    message = input_error(attempt)
    assert "round 2: 1 of 2 sites sent a usable update and 2 are needed (b: its process was killed" in message
    assert len(read_json(tmp_path / "out" / RECORD_FILE)["rounds"]) == 1
    assert not (tmp_path / "out" / "adapter.json").exists()
    with_quorum, _ = run(base, tmp_path / "out", {"a": shift(base, 0.1), "b": fails_later}, rounds=2, quorum=1)
    assert with_quorum.resumed_after == 1 and len(with_quorum.rounds) == 2


@pytest.mark.parametrize("server", ["average", "adam"])
def test_a_killed_server_continues_to_the_same_adapter(server: str, base: Path, tmp_path: Path) -> None:
    def killed(task: RoundTask) -> SiteUpdate:
        if task.round == 3:
            raise KeyboardInterrupt
        return shift(base, 0.1)(task)

    def sites(last: Answer) -> dict[str, Answer]:
        return {"a": shift(base, 0.3), "b": last}

    run(base, tmp_path / "whole", sites(shift(base, 0.1)), rounds=4, server=server)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "out", sites(killed), rounds=4, server=server)
    result, engine = run(base, tmp_path / "out", sites(shift(base, 0.1)), rounds=4, server=server)
    assert result.resumed_after == 2 and [task.round for task in engine.tasks] == [3, 4]
    files = [(tmp_path / folder / "adapter.safetensors").read_bytes() for folder in ("whole", "out")]
    assert files[0] == files[1]
    # a finished federation trains nothing more, and more rounds continue it
    assert run(base, tmp_path / "out", sites(killed), rounds=4, server=server)[1].tasks == []
    more, _ = run(base, tmp_path / "out", sites(shift(base, 0.1)), rounds=5, server=server)
    assert more.resumed_after == 4 and len(more.rounds) == 5


def test_another_federation_in_the_folder_is_refused(base: Path, tmp_path: Path) -> None:
    sites = {"a": shift(base, 0.1)}
    run(base, tmp_path / "out", sites)
    before = (tmp_path / "out" / STATE_FILE).read_bytes()
    assert "differs in batch. Repeat" in input_error(lambda: run(base, tmp_path / "out", sites, batch=4))
    assert "differs in sites" in input_error(lambda: run(base, tmp_path / "out", {**sites, "b": shift(base, 1)}))
    assert (tmp_path / "out" / STATE_FILE).read_bytes() == before


def test_the_server_never_has_local_values(base: Path, tmp_path: Path) -> None:
    _, engine = run(base, tmp_path / "out", {"a": shift(base, 0.1)}, local="vision")
    info = read_adapter_info(tmp_path / "out")
    parts = {info.tensors[name].part for name in engine.tasks[0].values}
    assert parts == {"encoder", "decoder"}
    assert engine.final is not None and engine.final.keys() == info.tensors.keys()  # with the base's values
    message = input_error(lambda: run(base, tmp_path / "other", {"a": shift(base, 1)}, local="connector"))
    assert message.startswith("--local: the recipe trains nothing in connector")


def test_a_quorum_above_the_sites_is_refused(base: Path, tmp_path: Path) -> None:
    assert "--quorum 3" in input_error(lambda: run(base, tmp_path / "out", {"a": shift(base, 1)}, quorum=3))

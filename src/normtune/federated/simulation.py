"""A federation on this machine: every site trains in a process of its own, a few at a time.

No network is used, and nothing is hidden from the server: it is for experiments. A deployment runs the same
rounds and rules over NVFlare (`normtune.federated.flare`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from normtune.adapters.info import AdapterInfo
from normtune.federated.config import FederateConfig, SiteOptions
from normtune.federated.rules import SiteUpdate, Values
from normtune.federated.site import RoundTask, train_at_site, write_site_adapter
from normtune.runtime.worker_pool import run_in_processes


@dataclass(frozen=True)
class _Job:
    name: str
    task: RoundTask
    site: SiteOptions
    folder: Path


class _DeadlinePassed(Exception):
    pass


class Simulation:
    """Trains the sites of a federation in processes of this machine; see `Engine`."""

    def __init__(self, config: FederateConfig, sites: Mapping[str, SiteOptions]) -> None:
        self.config, self.sites = config, sites

    def folder(self, site: str) -> Path:
        """The folder of a site."""
        return self.config.out / "sites" / site

    def train_round(self, task: RoundTask) -> dict[str, SiteUpdate | str]:
        """Train one round. Sites that share a process slot share the time until the deadline evenly."""
        config, answers = self.config, dict[str, SiteUpdate | str]()
        deadline = monotonic() + config.deadline * math.ceil(len(self.sites) / config.workers)

        def check_time() -> None:
            if monotonic() > deadline:
                raise _DeadlinePassed

        jobs = [_Job(name, task, site, self.folder(name)) for name, site in self.sites.items()]
        try:
            for job, result in run_in_processes(_train, jobs, config.workers, tick=check_time):
                answers[job.name] = result.value if result.error is None else result.error
        except _DeadlinePassed:  # the processes that still run were ended
            late = f"late: no answer within {config.deadline:g} s"
            answers |= {name: late for name in self.sites if name not in answers}
        return answers

    def finish(self, info: AdapterInfo, values: Values) -> None:
        """Write the final adapter of every site."""
        for name in self.sites:
            write_site_adapter(self.folder(name), info, values)


def _train(job: _Job) -> SiteUpdate:
    job.folder.mkdir(parents=True, exist_ok=True)
    return train_at_site(job.task, job.site, job.folder)

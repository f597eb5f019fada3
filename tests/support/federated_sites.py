"""Federations for tests: small sites, and engines without processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from normtune.adapters.info import AdapterInfo
from normtune.federated.config import FederateConfig, SiteOptions
from normtune.federated.rules import SiteUpdate, Values
from normtune.federated.site import RoundTask, train_at_site, write_site_adapter


def write_site(root: Path, numbers: Sequence[int], text: str = "mass") -> Path:
    """A dataset with two questions about each picture; all answers have one token. A number makes one picture."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in numbers:
        Image.new("RGB", (32, 32), (25 * number, 10, 200 - 20 * number)).save(root / f"{number}.png")
        for answer in ("yes", "no"):
            question = f"is there a {text} {number} {answer}"
            rows.append({"image": f"{number}.png", "question": question, "answer": answer})
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def federation(base: Path, out: Path, **options: Any) -> FederateConfig:
    """Options of a federation with short rounds."""
    values: dict[str, Any] = {"rounds": 1, "local_steps": 1, "batch": 8, "device": "cpu", "site": []} | options
    return FederateConfig(model=str(base), out=out, **values)


class InProcess:
    """Trains the sites one after the other in this process, and keeps what they send."""

    def __init__(self, config: FederateConfig, roots: Mapping[str, Path]) -> None:
        self.config, self.updates = config, dict[str, SiteUpdate]()
        self.sites = {name: SiteOptions(data="jsonl", root=root) for name, root in roots.items()}

    def folder(self, site: str) -> Path:
        return self.config.out / "sites" / site

    def train_round(self, task: RoundTask) -> dict[str, SiteUpdate | str]:
        self.updates = {name: train_at_site(task, site, self.folder(name)) for name, site in self.sites.items()}
        return dict(self.updates)

    def finish(self, info: AdapterInfo, values: Values) -> None:
        for name in self.sites:
            write_site_adapter(self.folder(name), info, values)


Answer = Callable[[RoundTask], SiteUpdate | str]


class Scripted:
    """Sites that answer as a function says, without training."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self.answers, self.tasks = answers, list[RoundTask]()
        self.final: Values | None = None

    def train_round(self, task: RoundTask) -> dict[str, SiteUpdate | str]:
        self.tasks.append(task)
        return {site: answer(task) for site, answer in self.answers.items()}

    def finish(self, info: AdapterInfo, values: Values) -> None:
        self.final = values

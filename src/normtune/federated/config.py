"""The options of a federation: what its sites train, how their adapters are averaged, and the data of a site."""

from __future__ import annotations

import math
from copy import copy
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_serializer, field_validator

from normtune.data.formats import FORMATS, PUBLISHED
from normtune.data.options import DataOptions, Options
from normtune.errors import InputError
from normtune.models.part_names import PARTS
from normtune.training.config import TrainConfig


def _shared(name: str) -> Any:
    """The field of an option that `normtune train` has too."""
    return copy(TrainConfig.model_fields[name])


class SiteOptions(DataOptions):
    """What a site trains on, and the options that are its own; in a deployment the file `site.yaml` of the site."""

    split: str = Field("train", description="Split of the dataset to train on.")
    limit: int | None = Field(None, gt=0, description="Train on the first LIMIT question-answer pairs only.")
    part: str | None = Field(
        None, pattern=r"^[1-9]\d*/[1-9]\d*$", description="Part of the images, such as 1/2 for one of two halves."
    )
    model: str | None = Field(None, description="The base at this site; default: the name that the federation gives.")
    device: str | None = Field(None, description="cpu or cuda at this site; default: that of the federation.")
    # in place of the federation's: a site decides about its own patients
    dp_epsilon: float | None = _shared("dp_epsilon")
    dp_delta: float | None = _shared("dp_delta")
    dp_clip: float | None = _shared("dp_clip")


class FederateConfig(Options):
    """Everything that determines a federation. The descriptions are the help texts of `normtune federate --help`."""

    model: str = _shared("model")
    site: list[str] = Field(
        description="A site as NAME=DATA or NAME=DATA:ROOT, such as a=slake:SLAKE or b=phantom-b, with @1/2 behind it "
        "for one of two parts of the images; or NAME=FILE.yaml with the options of its data. Repeat it for each site."
    )
    out: Path = Field(description="Folder for the averaged adapter, federation.json and a folder for each site.")
    kit: Path | None = Field(
        None,
        description="Startup kit of an administrator (normtune federate-kits): runs on the sites of NVFlare instead of "
        "simulating them; --site is then a name alone.",
    )
    tune: str = _shared("tune")
    rounds: int = Field(10, gt=0, description="Number of rounds.")
    local_epochs: float = Field(1, gt=0, description="Passes of a site over its pairs in each round.")
    local_steps: int | None = Field(None, gt=0, description="Optimiser steps of a site in each round, instead.")
    # how adapters are averaged
    weights: Literal["pairs", "equal"] = Field(
        "pairs", description="Weigh sites by the pairs that they train on (FedAvg), or equally."
    )
    average: Literal["naive", "exact"] = Field(
        "naive",
        description="How LoRA is averaged: its factors (naive), or their products, truncated to the rank (exact). "
        "Norms and other values are averaged as they are.",
    )
    server: Literal["average", "adam"] = Field(
        "average", description="What the server does with the average: use it, or take a step of Adam (FedAdam)."
    )
    server_lr: float = Field(1e-2, gt=0, description="Learning rate of --server adam.")
    proximal: float = Field(0.0, ge=0, description="Strength of FedProx's pull towards the round's start; 0: none.")
    secure: bool = Field(
        False,
        description="Sites encrypt their updates, and the server averages what it cannot read; needs --kit, and kits "
        "of normtune federate-kits --secure.",
    )
    local: str | None = Field(
        None, description="Parts of the model that are trained for each site alone (as in FedBN), such as vision."
    )
    # which answers the server takes
    quorum: int | None = Field(None, gt=0, description="Sites that a round needs; default: more than half of them.")
    deadline: float = Field(
        3600, gt=0, description="Seconds after which a site is late, and the round ends without it."
    )
    max_update: float = Field(
        10, gt=1, description="Refuse an update that is this many times as large as the median of the sites."
    )
    workers: int = Field(1, gt=0, description="Sites that train at once on this machine; each holds the base.")
    # what sites train
    lr: float | None = _shared("lr")
    part_lr: str | None = _shared("part_lr")
    batch: int = _shared("batch")
    accumulate: int = _shared("accumulate")
    group: bool = _shared("group")
    cap: int | None = _shared("cap")
    optimizer: Literal["sgd"] | None = _shared("optimizer")
    weight_decay: float = _shared("weight_decay")
    max_grad_norm: float = _shared("max_grad_norm")
    label_smoothing: float = _shared("label_smoothing")
    choice_prompt: Any = _shared("choice_prompt")
    choice_target: Any = _shared("choice_target")
    dtype: Literal["auto", "float32", "bfloat16"] = _shared("dtype")
    quantize: Literal["int8", "nf4"] | None = _shared("quantize")
    memory: Literal["fast", "balanced", "tight"] = _shared("memory")
    max_pixels: int | None = _shared("max_pixels")
    device: str | None = _shared("device")
    seed: int = _shared("seed")
    # differential privacy at each site; epsilon is that of all rounds
    dp_epsilon: float | None = _shared("dp_epsilon")
    dp_delta: float | None = _shared("dp_delta")
    dp_clip: float | None = _shared("dp_clip")

    @field_serializer("dp_epsilon", "dp_clip", when_used="json")
    def _infinity(self, value: float | None) -> float | str | None:
        return "inf" if value == math.inf else value  # JSON has no infinity

    @field_validator("local")
    @classmethod
    def _check_local(cls, text: str | None) -> str | None:
        for part in (text or "").split(","):
            if text is not None and part.strip() not in PARTS:
                raise ValueError(f"'{part}' is no part of a model; parts: {', '.join(PARTS)}")
        return text

    @field_validator("server")
    @classmethod
    def _check_server(cls, server: str, info: ValidationInfo) -> str:
        if server == "adam" and info.data.get("average") == "exact":
            raise ValueError("adam takes steps on the factors of a LoRA, which --average exact replaces; choose one")
        return server

    @field_validator("secure")
    @classmethod
    def _check_secure(cls, secure: bool, info: ValidationInfo) -> bool:
        for name in ("average", "server"):
            if secure and info.data.get(name) in ("exact", "adam"):
                raise ValueError(f"a server that sees only encrypted values cannot compute --{name} {info.data[name]}")
        return secure

    @property
    def local_parts(self) -> set[str]:
        """The parts of the model with trained values that stay at the sites."""
        return {part.strip() for part in (self.local or "").split(",") if part.strip()}

    def needed(self, sites: int) -> int:
        """Sites that a round needs, of so many."""
        return self.quorum or sites // 2 + 1

    def train_config(self, site: SiteOptions, out: Path) -> TrainConfig:
        """The options of one round's training at a site: a constant learning rate, no checkpoints."""
        options = {name: getattr(self, name) for name in _OF_TRAINING} | {
            name: getattr(site, name) for name in _OF_DATA
        }
        private = site if site.dp_epsilon is not None else self
        options |= {name: getattr(private, name) for name in ("dp_epsilon", "dp_delta", "dp_clip")}
        return TrainConfig.checked(
            **options | {"device": site.device or self.device},
            model=site.model or self.model,
            out=out,
            epochs=self.local_epochs,
            max_steps=self.local_steps,
            warmup=0.0,
            schedule="constant",
            save_every=2**31,
            resume=False,
        )


_OF_DATA = (*DataOptions.model_fields, "split", "limit")
# the options of `normtune train`, without three that mean something else in a federation
_OF_TRAINING = (FederateConfig.model_fields.keys() & TrainConfig.model_fields.keys()) - {"model", "out", "workers"}


def parse_sites(entries: list[str]) -> dict[str, SiteOptions]:
    """Read `--site` options.

    Returns:
        Name of a site -> its options.

    Raises:
        InputError: an entry has no name, a name occurs twice, or its data or file is not valid.
    """
    sites: dict[str, SiteOptions] = {}
    names = site_names([entry.partition("=")[0] for entry in entries])
    for name, entry in zip(names, entries, strict=True):
        data = entry.partition("=")[2]
        if not data:
            raise InputError(f"--site {entry}: give the site's data, as NAME=DATA or NAME=DATA:ROOT.")
        if data.endswith((".yaml", ".yml")):
            sites[name] = read_site(Path(data))
            continue
        data, _, part = data.partition("@")
        family, _, root = data.partition(":")
        has_root = root and (family in PUBLISHED or family in FORMATS)
        sites[name] = SiteOptions.checked(
            data=family if has_root else data, root=root if has_root else None, part=part or None
        )
    return sites


def site_names(names: list[str]) -> list[str]:
    """Check the names of sites: letters, digits, - and _, each once.

    Raises:
        InputError: they are not.
    """
    for index, name in enumerate(names):
        if not name.replace("-", "").replace("_", "").isalnum() or name in names[:index]:
            raise InputError(f"--site {name}: a site needs a name of letters, digits, - and _, each name once.")
    return names


def read_site(path: Path) -> SiteOptions:
    """Read the file with the options of a site's data.

    Raises:
        InputError: the file is missing or not valid.
    """
    from normtune.data.run_file import read_run_file

    return SiteOptions.checked(**read_run_file(path, SiteOptions))

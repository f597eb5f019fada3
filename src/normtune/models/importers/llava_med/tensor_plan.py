"""Every tensor of an imported LLaVA-Med: where it comes from and what is done to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from normtune.errors import InputError
from normtune.models.checkpoints.reader import OriginalCheckpoint, some
from normtune.models.checkpoints.writer import Planned
from normtune.models.importers.llava_med.clip import Tower
from normtune.models.importers.llava_med.tensor_names import (
    EMBEDDING,
    HEAD,
    PROJECTOR,
    TOWER,
    harmless,
    new_name,
)

_ROWS = 1024  # summed at a time for a mean


class Plan:
    """Every tensor of the new model and where it comes from, in the order in which it is read.

    Raises:
        InputError: a name that nothing knows, a tensor that is missing or has another shape.
    """

    def __init__(
        self,
        source: str,
        shards: OriginalCheckpoint,
        tower: Tower | None,
        under: OriginalCheckpoint | None,
        config: LlavaConfig,
        base: str | None,
        rows: int,
    ) -> None:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(config)
        self.shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
        self.source, self.shards, self.under, self.base = source, shards, under, base
        self.rows = rows  # of the original vocabulary
        self.mapped: dict[str, str] = {}
        self.added: list[str] = []
        self.missing: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.left_over: list[str] = []
        self.groups: list[list[Planned]] = []
        self.dtype: torch.dtype = torch.float32
        self._of_checkpoint(replaced=tower is not None)
        if tower is not None:
            self._of_tower(tower)
        self._made(config)
        lacking = [name for name in self.shapes if name not in self.mapped and name not in self.missing]
        if lacking:
            raise InputError(
                f"{source} lacks {some(lacking)} (by transformers' names). Give a whole checkpoint."
            )
        if under is not None:
            self._check_base(under)

    def _of_checkpoint(self, *, replaced: bool) -> None:
        unknown = []
        file = None
        for theirs, entry in self.shards.entries.items():
            ours = new_name(theirs)
            if harmless(theirs):
                self.dropped[theirs] = self.source
            elif replaced and ours is not None and ours.startswith(TOWER):
                self.left_over.append(theirs)
            elif ours is None or ours not in self.shapes:
                unknown.append(theirs)
            else:
                if entry.file != file:
                    file = entry.file
                    self.groups.append([])
                self.groups[-1].append(self._from_checkpoint(ours, theirs))
        if unknown:
            raise InputError(
                f"{self.source} holds {some(unknown)}, which LLaVA-Med of this config has not. "
                "Check that its files belong together, and that it is neither an adapter nor quantised."
            )

    def _from_checkpoint(self, ours: str, theirs: str) -> Planned:
        entry = self.shards.entries[theirs]
        if ours in self.mapped:
            raise InputError(
                f"{self.source} holds {self.mapped[ours]} and {theirs}, which are one tensor. "
                "Take one of them out."
            )
        self.mapped[ours] = theirs
        make: Callable[[], Tensor] = lambda: self.shards.tensor(theirs)  # noqa: E731
        shape, origin = entry.shape, "checkpoint"
        if self.under is not None and theirs in self.under.entries:
            make, origin = self._sum(theirs), "sum"
            self.added.append(ours)
        wanted = self.shapes[ours]
        grown = ours in (EMBEDDING, HEAD) and shape == (self.rows, *wanted[1:]) and shape != wanted
        if ours == EMBEDDING:
            self.dtype = entry.dtype
        if grown:
            before = make
            make, origin = lambda: with_mean_rows(before(), wanted[0]), f"{origin}, grown"
        elif shape != wanted:
            raise InputError(_misshapen(self.source, theirs, shape, wanted))
        return Planned(ours, entry.dtype, wanted, f"{origin}: {theirs}", make)

    def _sum(self, theirs: str) -> Callable[[], Tensor]:
        """Base + delta in the delta's type, as in LLaVA-Med's own script; rows that the base lacks: whole."""
        assert self.under is not None
        under, entry, delta = self.under, self.under.entries[theirs], self.shards.entries[theirs]
        rows = entry.shape[:1] <= delta.shape[:1] if new_name(theirs) in (EMBEDDING, HEAD) else False
        if entry.shape != delta.shape and not (rows and entry.shape[1:] == delta.shape[1:]):
            raise InputError(_misshapen(str(self.base), theirs, entry.shape, delta.shape))

        def add() -> Tensor:
            found = self.shards.tensor(theirs).clone()
            found[: entry.shape[0]] += under.tensor(theirs).to(found.dtype)
            return found

        return add

    def _of_tower(self, tower: Tower) -> None:
        unknown = [theirs for ours, theirs in tower.names.items() if ours not in self.shapes]
        if unknown:
            raise InputError(f"{tower.name} holds {some(unknown)}, which its config has not. Copy it anew.")
        self.dropped |= dict.fromkeys(tower.dropped, tower.name)
        group = []
        for ours, theirs in tower.names.items():
            entry = tower.shards.entries[theirs]
            if entry.shape != self.shapes[ours]:
                raise InputError(_misshapen(tower.name, theirs, entry.shape, self.shapes[ours]))
            self.mapped[ours] = theirs
            make = _reader(tower.shards, theirs)
            group.append(Planned(ours, entry.dtype, entry.shape, f"{tower.name}: {theirs}", make))
        self.groups.append(group)

    def _made(self, config: LlavaConfig) -> None:
        """What the original has not: a second layer of the projector, and a tied head."""
        if config.tie_word_embeddings and HEAD not in self.mapped:
            self.missing[HEAD] = "the embedding (tied)"
        weight, bias = f"{PROJECTOR}.linear_2.weight", f"{PROJECTOR}.linear_2.bias"
        if config.projector_hidden_act != "linear":
            return
        if weight in self.mapped:
            raise InputError(
                f"{self.source} holds {self.mapped[weight]}, but mm_projector_type is 'linear' in its "
                "config.json (or not there): LLaVA-Med 1.5 has 'mlp2x_gelu'. Correct it."
            )
        width, dtype = self.shapes[bias], self.dtype
        self.missing[weight] = "the identity (the original's projector has one layer)"
        self.missing[bias] = "zeros"
        self.groups.append(
            [
                Planned(weight, dtype, (*width, *width), "identity", lambda: torch.eye(*width, dtype=dtype)),
                Planned(bias, dtype, width, "zeros", lambda: torch.zeros(width, dtype=dtype)),
            ]
        )

    def _check_base(self, under: OriginalCheckpoint) -> None:
        """Base and delta belong together: each tensor of the language model is in both."""
        alone = [name for name in under.entries if name not in self.shards.entries and not harmless(name)]
        if alone:
            raise InputError(
                f"{self.base} holds {some(alone)}, which {self.source} has no delta for. Check --base."
            )
        language = [ours for ours in self.mapped if not ours.startswith((TOWER, PROJECTOR))]
        lacking = [self.mapped[ours] for ours in language if ours not in self.added]
        if lacking:
            raise InputError(
                f"{self.base} lacks {some(lacking)}, which {self.source} is a delta of. Check --base."
            )


def with_mean_rows(tensor: Tensor, rows: int) -> Tensor:
    """An embedding or head grown to `rows` rows, the new ones being the mean of the old ones.

    A logit that is the mean of all is below the largest, and 64 of them take at most 64 / 32000 of the
    probability (Jensen's inequality).
    """
    total = torch.zeros(tensor.shape[1], dtype=torch.float64)
    for start in range(0, len(tensor), _ROWS):
        total += tensor[start : start + _ROWS].double().sum(0)
    mean = (total / len(tensor)).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def _reader(shards: OriginalCheckpoint, name: str) -> Callable[[], Tensor]:
    return lambda: shards.tensor(name)


def _misshapen(source: str, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    got, asked = list(shape), list(wanted)
    return f"{source}: {name} is of shape {got}, not {asked}. Check that its files belong together."

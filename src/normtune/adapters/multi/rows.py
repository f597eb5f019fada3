"""Which adapter each row of a batch uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

MAX_RUNS = 16  # runs of one adapter's rows up to which a kernel for each is faster than gains gathered by row
Run = tuple[int, int, int]  # an adapter, and the rows that take it: first, one past the last


class RowAdapters:
    """Which adapter each unit of a batch takes: an image, a row of tokens, a token.

    Units follow each other in a norm's input, and each has its share of the rows there, whatever stands for
    one: tokens, patches, tiles, heads. Shares are equal, or in proportion to `sizes`.
    """

    def __init__(self, adapters: Sequence[int], sizes: Sequence[int] | None = None) -> None:
        assert adapters and (sizes is None or len(sizes) == len(adapters)), "an adapter, and a size, a unit"
        self.adapters = tuple(adapters)
        self.sizes = None if sizes is None or len(set(sizes)) == 1 else tuple(sizes)
        self._runs: dict[int, tuple[Run, ...]] = {}
        self._index: dict[torch.device, Tensor] = {}

    def _share(self, rows: int) -> list[int]:
        """How many of `rows` rows each unit has."""
        sizes = self.sizes or (1,) * len(self.adapters)
        each, rest = divmod(rows, sum(sizes))
        if not rest:
            return [each * size for size in sizes]
        found = [divmod(rows * size, sum(sizes)) for size in sizes]  # a norm after several rows became one
        assert not any(rest for _, rest in found), f"{rows} rows cannot be shared by {len(sizes)} units"
        return [share for share, _ in found]

    def runs(self, rows: int) -> tuple[Run, ...]:
        """The stretches of one adapter in `rows` rows."""
        if rows not in self._runs:
            found: list[Run] = []
            stop = 0
            for adapter, share in zip(self.adapters, self._share(rows), strict=True):
                start, stop = stop, stop + share
                if found and found[-1][0] == adapter:
                    start = found.pop()[1]
                found.append((adapter, start, stop))
            self._runs[rows] = tuple(found)
        return self._runs[rows]

    def index(self, device: torch.device) -> Tensor:
        """[units]: their adapters; made once for all layers."""
        if device not in self._index:
            with torch.inference_mode(False):  # a backward pass may keep it
                self._index[device] = torch.tensor(self.adapters, device=device)
        return self._index[device]

    def gather(self, bank: Tensor, rows: int) -> Tensor:
        """[adapters, width] -> what broadcasts over the rows as [units, share, width], or as [rows, 1, width]
        where shares differ."""
        index = self.index(bank.device)
        if self.sizes is not None:
            index = index.repeat_interleave(torch.tensor(self._share(rows), device=bank.device))
        return bank.index_select(0, index)[:, None]


class ActiveRows:
    """What the norms of one part share: whose rows they are given.

    Attributes:
        owners: set by whoever calls the model (`taken_by`), until the backward pass is done.
    """

    def __init__(self) -> None:
        self.adapters: RowAdapters | None = None

    @contextmanager
    def use(self, owners: RowAdapters | None) -> Iterator[None]:
        """Inside, the norms give each row the gains of its owner."""
        before, self.adapters = self.adapters, owners
        try:
            yield
        finally:
            self.adapters = before

    def select(self, units: Tensor) -> None:
        """Only these units go on, in this order: [units] long. In generation some are done before others."""
        if self.adapters is not None:
            assert self.adapters.sizes is None, "units of one size"
            self.adapters = RowAdapters([self.adapters.adapters[unit] for unit in units.tolist()])

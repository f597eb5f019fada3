"""Which adapter each row of a batch uses.

A *unit* is the smallest piece of a batch that has one adapter: an image, a row of text, or a single token if
rows of several adapters are packed into one. A layer's input, flattened to [rows, width], holds the units one
after the other. How many rows a unit has there depends on the layer: patches, tiles, tokens, or tokens times
heads.

A *run* is a stretch of adjacent rows with the same adapter. Adjacent units of one adapter form one run:

    RowAdapters((0, 0, 2)).runs(6) == ((0, 0, 4), (2, 4, 6))

    row        0   1   2   3   4   5
    unit       0   0   1   1   2   2
    adapter    0   0   0   0   2   2
    run       |-- (0, 0, 4) --|  (2, 4, 6)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Norms have two ways to compute a batch: one kernel per run, or one kernel for all rows with gathered gains.
MAX_RUNS = 16  # with this many runs or fewer, one kernel per run is faster
Run = tuple[int, int, int]  # (adapter, first row, one past the last row)


class RowAdapters:
    """The adapter of each unit of a batch, in the order of the units; all units have equally many rows."""

    def __init__(self, adapters: Sequence[int]) -> None:
        assert adapters, "at least one unit"
        self.adapters = tuple(adapters)
        # the same object serves every layer of a pass: its results are computed once
        self._runs: dict[int, tuple[Run, ...]] = {}  # rows of an input -> its runs
        self._index: dict[torch.device, Tensor] = {}

    def runs(self, rows: int) -> tuple[Run, ...]:
        """The runs of an input of `rows` rows, in order; together they cover all rows."""
        if rows not in self._runs:
            # adapters (0, 0, 2), 6 rows: each unit has 2
            #   unit 0 begins a run:   (0, 0, 2)
            #   unit 1 extends it:     (0, 0, 4)
            #   unit 2 begins another: (0, 0, 4), (2, 4, 6)
            runs: list[Run] = []
            stop = 0
            count, rest = divmod(rows, len(self.adapters))
            assert not rest, f"{rows} rows cannot be shared by {len(self.adapters)} units"
            for adapter in self.adapters:
                start, stop = stop, stop + count
                if runs and runs[-1][0] == adapter:
                    start = runs.pop()[1]  # extend the run of the previous unit
                runs.append((adapter, start, stop))
            self._runs[rows] = tuple(runs)
        return self._runs[rows]

    def index(self, device: torch.device) -> Tensor:
        """[units] long: the adapter of each unit; created once per device, for all layers."""
        if device not in self._index:
            self._index[device] = torch.tensor(self.adapters, device=device)
        return self._index[device]

    def gather(self, bank: Tensor) -> Tensor:
        """The values of each unit's adapter: [adapters, width] -> [units, 1, width]."""
        return bank.index_select(0, self.index(bank.device))[:, None]


class ActiveRows:
    """The adapters of the rows that a group of layers currently processes.

    All layers that see the same units share one object: one for the image parts, one for the text parts.
    """

    def __init__(self) -> None:
        self.adapters: RowAdapters | None = None  # set by the caller of the model (`use`); None: not set

    @contextmanager
    def use(self, row_adapters: RowAdapters | None) -> Iterator[None]:
        """Inside, the layers apply to each row the values of its adapter."""
        before, self.adapters = self.adapters, row_adapters
        try:
            yield
        finally:
            self.adapters = before

    def select(self, units: Tensor) -> None:
        """Continue with these units only, in this order ([units]): in generation some answers end before others."""
        if self.adapters is not None:
            self.adapters = RowAdapters([self.adapters.adapters[unit] for unit in units.tolist()])

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
MAX_RUNS = 16  # up to so many runs one kernel per run is faster
Run = tuple[int, int, int]  # (adapter, first row, one past the last row)


class RowAdapters:
    """The adapter of each unit of a batch.

    Args:
        adapters: the adapter of each unit, in the order of the units in the batch.
        sizes: relative number of rows of each unit, such as its tokens or patches; None: all units have
            equally many.
    """

    def __init__(self, adapters: Sequence[int], sizes: Sequence[int] | None = None) -> None:
        assert adapters and (sizes is None or len(sizes) == len(adapters)), "one adapter and size per unit"
        self.adapters = tuple(adapters)
        self.sizes = None if sizes is None or len(set(sizes)) == 1 else tuple(sizes)
        # the same object serves every layer of a pass: its results are computed once
        self._runs: dict[int, tuple[Run, ...]] = {}  # rows of an input -> its runs
        self._index: dict[torch.device, Tensor] = {}

    def _rows_per_unit(self, rows: int) -> list[int]:
        """How many of `rows` rows belong to each unit."""
        sizes = self.sizes or (1,) * len(self.adapters)
        each, rest = divmod(rows, sum(sizes))
        if not rest:
            # sizes (2, 1, 1), 24 rows: each = 6 -> 12, 6, 6
            return [each * size for size in sizes]
        # Fewer rows than the sizes count: a layer merged several rows into one, such as four patches into one
        # token. sizes (16, 80), 24 rows -> 24 * 16 / 96 = 4 and 24 * 80 / 96 = 20
        quotients = [divmod(rows * size, sum(sizes)) for size in sizes]
        assert not any(rest for _, rest in quotients), f"{rows} rows cannot be shared by {len(sizes)} units"
        return [count for count, _ in quotients]

    def runs(self, rows: int) -> tuple[Run, ...]:
        """The runs of an input of `rows` rows, in order; together they cover all rows."""
        if rows not in self._runs:
            # adapters (0, 0, 2), 6 rows: each unit has 2
            #   unit 0 begins a run:   (0, 0, 2)
            #   unit 1 extends it:     (0, 0, 4)
            #   unit 2 begins another: (0, 0, 4), (2, 4, 6)
            runs: list[Run] = []
            stop = 0
            for adapter, count in zip(self.adapters, self._rows_per_unit(rows), strict=True):
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

    def gather(self, bank: Tensor, rows: int) -> Tensor:
        """Look up the values of each unit's adapter.

        Args:
            bank: [adapters, width].
            rows: rows of the input that they will be multiplied with.

        Returns:
            [units, 1, width], to broadcast over [units, rows per unit, width]; or [rows, 1, width], if units
            have different numbers of rows.
        """
        index = self.index(bank.device)
        if self.sizes is not None:
            # adapters (0, 2), rows per unit (1, 3) -> index (0, 2, 2, 2)
            index = index.repeat_interleave(torch.tensor(self._rows_per_unit(rows), device=bank.device))
        return bank.index_select(0, index)[:, None]


class ActiveRows:
    """The adapters of the rows that a group of layers currently processes.

    All layers that see the same units share one object: one for the image parts, one for the text parts.

    Attributes:
        adapters: set by the caller of the model (`use`); None: not set.
    """

    def __init__(self) -> None:
        self.adapters: RowAdapters | None = None

    @contextmanager
    def use(self, row_adapters: RowAdapters | None) -> Iterator[None]:
        """Inside, the layers apply to each row the values of its adapter."""
        before, self.adapters = self.adapters, row_adapters
        try:
            yield
        finally:
            self.adapters = before

    def select(self, units: Tensor) -> None:
        """Continue with these units only, in this order; in generation some answers end before others.

        Args:
            units: [units that remain] long, indices into the current units.
        """
        if self.adapters is not None:
            assert self.adapters.sizes is None, "units of one size"
            self.adapters = RowAdapters([self.adapters.adapters[unit] for unit in units.tolist()])

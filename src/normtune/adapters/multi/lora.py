"""Several LoRA adapters over one base: a linear adds to each row the update of the row's adapter.

    y = W x + (alpha / r) B A x        (Hu et al. 2021, section 4.1)

W is the base's and computed once for all rows; A [r, in] and B [out, r] are those of the row's adapter. All
adapters share tensors with room for the largest rank. A smaller rank, and every linear that an adapter does
not change, is padded with zeros, which add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normtune.adapters.info import AdapterInfo
from normtune.adapters.multi.rows import ActiveRows, RowAdapters
from normtune.errors import InputError
from normtune.methods.adapt import adapt, restore_base
from normtune.methods.recipe import parse
from normtune.methods.registry import Method
from normtune.methods.sites import CROSS, KEY, VALUE
from normtune.models.part_names import IMAGE_PARTS, PARTS

DOWN, UP = "lora_A", "lora_B"  # last component of the matrices' names in an adapter, after the linear's name
# With this many rows per unit or more, one matmul per run is faster than one batched matmul over gathered matrices.
MIN_ROWS_FOR_RUNS = 16


@dataclass(frozen=True)
class LoRAMatrix:
    """One matrix (A or B) of a linear that LoRA adapts."""

    part: str
    shape: tuple[int, int]  # A: [rank, in]; B: [out, rank]
    columns: slice  # its columns in `LoRABank.values`


def lora_matrices(model: nn.Module, rank: int) -> dict[str, LoRAMatrix]:
    """The matrices of a LoRA of this rank on all parts, by their names in adapters.

    The model is unchanged afterwards, but frozen.

    Raises:
        InputError: no linear of the model takes a LoRA.
    """
    tuned = adapt(model, f"all=lora(r={rank})", train_unused=True)  # the recipe decides which linears have a LoRA
    matrices: dict[str, LoRAMatrix] = {}
    stop = 0
    for name, parameter in tuned.trained.items():
        start, stop = stop, stop + parameter.numel()
        shape = parameter.shape[0], parameter.shape[1]
        matrices[name] = LoRAMatrix(tuned.part_and_role[name][0], shape, slice(start, stop))
    restore_base(tuned)
    return matrices


class MultiAdapterLoRA(nn.Module):
    """A frozen linear with the low-rank matrices of several adapters: each row uses those of its adapter.

    Attributes:
        down: A, [adapters, rank, in] fp32.
        up: B times alpha / r, [adapters, out, rank] fp32.
        active_rows: the adapter of each row; one object for all linears with the same units in their inputs.
        loaded: the adapters that have matrices; the matrices of all others are zeros.
    """

    def __init__(
        self, base_layer: nn.Module, down: Tensor, up: Tensor, active_rows: ActiveRows, loaded: set[int]
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = down, up
        self.active_rows, self.loaded = active_rows, loaded

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], any float dtype -> [..., out]; the sum is computed in fp32 and rounded once."""
        out: Tensor = self.base_layer(x)
        row_adapters = self.active_rows.adapters
        assert row_adapters is not None, "the adapters of these rows are not set: see ActiveRows.use"
        if self.loaded.isdisjoint(row_adapters.adapters):
            return out  # the base's output, to the bit
        wide, flat_out = x.reshape(-1, x.shape[-1]).float(), out.reshape(-1, out.shape[-1])
        runs = [run for run in row_adapters.runs(len(wide)) if run[0] in self.loaded]
        # Gathering copies the matrices once per unit. It pays only for short units, as in generation (one token
        # per row); long units or a single run take one matmul per run.
        if len(runs) == 1 or len(wide) >= MIN_ROWS_FOR_RUNS * len(row_adapters.adapters):
            for adapter, start, stop in runs:
                # [rows, in] @ [in, rank] @ [rank, out], added in place: add_ rounds to out's dtype once
                flat_out[start:stop].add_(wide[start:stop] @ self.down[adapter].T @ self.up[adapter].T)
        else:
            flat_out.add_(self.forward_rows(wide, row_adapters))
        return flat_out.view(out.shape)

    def forward_rows(self, wide: Tensor, row_adapters: RowAdapters) -> Tensor:
        """The updates of rows [rows, in] of many adapters, [rows, out]."""
        index = row_adapters.index(self.down.device)  # [units]
        # [units, rows per unit, in] @ [units, in, rank] -> [units, rows per unit, rank]
        inner = wide.view(len(index), -1, wide.shape[-1]) @ self.down.index_select(0, index).mT
        # ... @ [units, rank, out] -> [units, rows per unit, out] -> [rows, out]
        return (inner @ self.up.index_select(0, index).mT).flatten(0, 1)

    def extra_repr(self) -> str:
        adapters, rank, _ = self.down.shape
        return f"adapters={adapters}, rank={rank}"


@dataclass(frozen=True)
class LoRABank:
    """A model with the matrices of several adapters in its query and value projections."""

    model: nn.Module
    matrices: Mapping[str, LoRAMatrix]  # see `lora_matrices`; their ranks are the largest that an adapter may have
    values: Tensor  # [adapters, values] fp32; the matrices of every linear are views of it
    # the adapters of the images that a text encoder attends to. It computes keys and values of an image once for all
    # questions, so that these rows are images in a text part
    cross_attention_rows: ActiveRows
    linears: Mapping[str, MultiAdapterLoRA]  # the new layers, by name
    loaded: set[int]  # the adapters that have matrices

    @property
    def reads_images(self) -> bool:
        """Whether text layers have a LoRA on linears that read image states.

        Keys and values of an image then depend on the adapter.
        """
        return any(linear.active_rows is self.cross_attention_rows for linear in self.linears.values())

    def check_fits(self, info: AdapterInfo) -> None:
        """Check that the bank has room for the LoRA matrices of an adapter.

        Raises:
            InputError: it has not, or `adapter.json` contradicts itself. The message starts with "it" or "its"
                and completes a sentence about the adapter.
        """
        # the recipe gives each part's rank, the tensors' names and shapes must agree with it
        methods = _lora_methods(info)
        if any(method.option("dora") for method in methods.values()):
            raise InputError("it has a DoRA, and rows with different adapters cannot share its scaled weights")
        linears: dict[str, set[str]] = {DOWN: set(), UP: set()}  # linears with a matrix A, with a matrix B
        for name, tensor in info.tensors.items():
            if tensor.method != "lora":
                continue
            linear, _, side = name.rpartition(".")
            matrix = self.matrices.get(name)
            if matrix is None:
                raise InputError(f"it has a LoRA at {linear}, which is no query or value projection here")
            if matrix.part not in methods:
                raise InputError(f"its recipe '{info.recipe}' has no lora in part '{matrix.part}'")
            linears[side].add(linear)
            # A is [rank, in] and B [out, rank]
            room = matrix.shape[0 if side == DOWN else 1]
            rank = int(methods[matrix.part].option("r"))
            if rank > room:
                raise InputError(f"its LoRA has rank {rank}, and there is room for {room}")
            # the shape in the file, without the padding to the room of the bank
            if tensor.shape != ([rank, matrix.shape[1]] if side == DOWN else [matrix.shape[0], rank]):
                raise InputError(f"it has a {name} of another shape than this base and its recipe require")
        if incomplete := sorted(linears[DOWN] ^ linears[UP]):
            raise InputError(f"of the LoRA at {incomplete[0]} one matrix is missing")

    def pack_values(self, info: AdapterInfo, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Pack LoRA matrices, which `check_fits` has accepted, into a row of `values` on the CPU; None without any."""
        names = [name for name, tensor in info.tensors.items() if tensor.method == "lora"]
        if not names:
            return None
        methods, row = _lora_methods(info), torch.zeros(self.values.shape[1])
        for name in names:
            matrix = self.matrices[name]
            values = tensors[name].float()
            if name.endswith(UP):
                # alpha / r is part of B from here on: adapters with different scales share one matmul
                method = methods[matrix.part]
                rank, alpha = int(method.option("r")), float(method.option("alpha"))
                values = values * (alpha / (math.sqrt(rank) if method.option("rslora") else rank))
            # into the upper left corner; the rest of the room stays zero
            row[matrix.columns].view(matrix.shape)[: values.shape[0], : values.shape[1]] = values
        return row

    def set_adapter(self, adapter: int, row: Tensor | None) -> None:
        """Set the values of one adapter; None: it has no LoRA."""
        if row is not None:
            self.values[adapter].copy_(row)
            self.loaded.add(adapter)
        elif adapter in self.loaded:  # clear what a former adapter left in this row
            self.values[adapter].zero_()
            self.loaded.discard(adapter)

    def image_values(self, row: Tensor | None) -> Tensor:
        """The values of a packed row that change the image parts; empty if there are none or all are zero."""
        if row is None:
            return torch.zeros(0)
        image_columns = [row[matrix.columns] for matrix in self.matrices.values() if matrix.part in IMAGE_PARTS]
        # a serving engine hashes these values: adapters without any share the encoded images of the base
        values = torch.cat(image_columns) if image_columns else torch.zeros(0)
        return values if bool(values.any()) else values[:0]

    def remove(self) -> None:
        """Put the base's linears back into the model."""
        for name, linear in self.linears.items():
            self.model.set_submodule(name, linear.base_layer)


def add_lora_bank(
    model: nn.Module, matrices: Mapping[str, LoRAMatrix], adapters: int, image_rows: ActiveRows, text_rows: ActiveRows
) -> LoRABank:
    """Replace every linear of `matrices` by a `MultiAdapterLoRA`; no adapter has values yet.

    Args:
        matrices: from `lora_matrices`.
        image_rows, text_rows: as in `normtune.adapters.multi.bank.AdapterBank`, which the norms use.
    """
    linear_names = list(dict.fromkeys(name.rpartition(".")[0] for name in matrices))
    device = next(model.parameters()).device
    size = max(matrix.columns.stop for matrix in matrices.values())
    values = torch.zeros((adapters, size), device=device)
    cross_attention_rows, loaded = ActiveRows(), set[int]()
    linears: dict[str, MultiAdapterLoRA] = {}
    for name in linear_names:
        part = matrices[f"{name}.{DOWN}"].part
        # The input decides: rows of image parts are images, cross-attention reads images from a text part.
        active_rows = image_rows if part in IMAGE_PARTS else text_rows
        active_rows = cross_attention_rows if _reads_images(part, name) else active_rows
        # views of the columns of `values`: [adapters, rank, in] and [adapters, out, rank]
        sides = (matrices[f"{name}.{side}"] for side in (DOWN, UP))
        down, up = (values[:, matrix.columns].unflatten(1, matrix.shape) for matrix in sides)
        linears[name] = MultiAdapterLoRA(model.get_submodule(name), down, up, active_rows, loaded)
    for name, linear in linears.items():  # after all look-ups
        model.set_submodule(name, linear)
    return LoRABank(model, matrices, values, cross_attention_rows, linears, loaded)


def _reads_images(part: str, linear: str) -> bool:
    """Whether the inputs of a text part's linear are states of images (the encoder of MISS)."""
    *outer, leaf = linear.split(".")
    return part == "encoder" and bool(set(outer) & set(CROSS)) and leaf in KEY + VALUE


def _lora_methods(info: AdapterInfo) -> dict[str, Method]:
    """Part -> its LoRA, in the adapter's recipe; a part has at most one."""
    parts = [(part, method) for part, methods in parse(info.recipe).parts for method in methods]
    loras = {part: method for part, method in parts if method.name == "lora"}
    of_all = loras.pop("all", None)  # in the recipes that describe PEFT's adapters
    return loras if of_all is None else dict.fromkeys(PARTS, of_all) | loras

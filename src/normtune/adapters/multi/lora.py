"""One base, several LoRA adapters: a linear layer adds to each row what the row's own adapter makes of it.

    W x + (alpha / r) B A x        (Hu et al. 2021, section 4.1), A and B of the row's adapter

The linear is computed once for all rows. An adapter of a smaller rank than there is room for is filled up
with zeros, which add nothing, and so is whatever it leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from normtune.models.part_names import IMAGE_PARTS

DOWN, UP = "lora_A", "lora_B"  # as deltas name them, after the linear's name
MIN_ROWS_FOR_RUNS = (
    16  # rows a unit from which on matmuls for each adapter are faster than one over gathered matrices
)


@dataclass(frozen=True)
class Target:
    """One matrix of a linear that LoRA adapts."""

    part: str
    shape: tuple[int, int]  # A: [rank, in]; B: [out, rank]
    place: slice  # where its values stand in a row of `LoraRows.values`


def targets(model: nn.Module, rank: int) -> dict[str, Target]:
    """The matrices of a LoRA on all parts, in the names of deltas; the model is as before, but frozen.

    Raises:
        InputError: there is no place for LoRA in the model.
    """
    tuned = adapt(model, f"all=lora(r={rank})")
    found: dict[str, Target] = {}
    stop = 0
    for name, one in tuned.trained.items():
        start, stop = stop, stop + one.numel()
        found[name] = Target(tuned.part_and_role[name][0], (one.shape[0], one.shape[1]), slice(start, stop))
    restore_base(tuned)
    return found


class MultiAdapterLoRA(nn.Module):
    """A frozen linear, and the low-rank matrices of several adapters: each row of a batch takes its own's.

    Attributes:
        base_layer: the linear as it was.
        down, up: A [adapters, rank, in] and B [adapters, out, rank], fp32, the latter times alpha / r.
        rows: whose the rows are; one object for all linears whose inputs hold the same units.
        used: the adapters that have matrices; those of the others are zeros.
    """

    def __init__(
        self, base_layer: nn.Module, down: Tensor, up: Tensor, rows: ActiveRows, used: set[int]
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = down, up
        self.rows, self.used = rows, used

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], any float dtype -> [..., out]; the sum is made in fp32 and rounded once."""
        out: Tensor = self.base_layer(x)
        owners = self.rows.adapters
        assert owners is not None, "nobody has said whose these rows are: see Rows.taken_by"
        if self.used.isdisjoint(owners.adapters):
            return out
        wide, found = x.reshape(-1, x.shape[-1]).float(), out.reshape(-1, out.shape[-1])
        runs = [run for run in owners.runs(len(wide)) if run[0] in self.used]
        if (
            len(runs) == 1
            or owners.sizes is not None
            or len(wide) >= MIN_ROWS_FOR_RUNS * len(owners.adapters)
        ):
            for one, start, stop in runs:
                found[start:stop].add_(wide[start:stop] @ self.down[one].T @ self.up[one].T)
        else:
            found.add_(self.forward_rows(wide, owners))
        return found.view(out.shape)

    def forward_rows(self, wide: Tensor, owners: RowAdapters) -> Tensor:
        """What is added to rows [R, in] of many adapters, as many each: [R, out]; matrices are gathered."""
        index = owners.index(self.down.device)
        inner = wide.view(len(index), -1, wide.shape[-1]) @ self.down.index_select(0, index).mT
        return (inner @ self.up.index_select(0, index).mT).flatten(0, 1)

    def extra_repr(self) -> str:
        adapters, rank, _ = self.down.shape
        return f"adapters={adapters}, rank={rank}"


@dataclass(frozen=True)
class LoRABank:
    """A model whose query and value projections hold the matrices of several adapters.

    Attributes:
        targets: see `targets`; ranks are those that there is room for.
        values: [adapters, values] fp32; every linear's matrices are views of it.
        memory: whose are the studies that a text encoder looks at: it makes their keys and values once.
        linears: the layers that were put in, by name.
        used: the adapters that have matrices.
    """

    model: nn.Module
    targets: Mapping[str, Target]
    values: Tensor
    memory: ActiveRows
    linears: Mapping[str, MultiAdapterLoRA]
    used: set[int]

    @property
    def reads_images(self) -> bool:
        """Whether text layers make something of images, which is each adapter's own then."""
        return any(one.rows is self.memory for one in self.linears.values())

    def check(self, info: AdapterInfo) -> None:
        """Check that there is room for the LoRA matrices of a delta.

        Raises:
            InputError: there is not, or `adapter.json` contradicts itself.
        """
        methods = _loras(info)
        sites: dict[str, set[str]] = {DOWN: set(), UP: set()}
        for name, one in info.tensors.items():
            if one.method != "lora":
                continue
            site, _, matrix = name.rpartition(".")
            target = self.targets.get(name)
            if target is None:
                raise InputError(f"it has a LoRA at {site}, which is no query or value projection here")
            if target.part not in methods:
                raise InputError(f"its recipe '{info.recipe}' has no lora in part '{target.part}'")
            sites[matrix].add(site)
            room = target.shape[0 if matrix == DOWN else 1]
            rank = int(methods[target.part].option("r"))
            if rank > room:
                raise InputError(f"its LoRA has rank {rank}, and there is room for {room}")
            if one.shape != _own_shape(target, matrix, rank):
                raise InputError(f"it has a {name} of another shape than this base and its recipe say")
        if odd := sorted(sites[DOWN] ^ sites[UP]):
            raise InputError(f"of the LoRA at {odd[0]} one matrix is missing")

    def row(self, info: AdapterInfo, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The values of an adapter that was checked, [values] on the CPU; None where it has no LoRA."""
        names = [name for name, one in info.tensors.items() if one.method == "lora"]
        if not names:
            return None
        methods, row = _loras(info), torch.zeros(self.values.shape[1])
        for name in names:
            target = self.targets[name]
            own = tensors[name].float()
            if name.endswith(UP):
                method = methods[target.part]
                own = own * (float(method.option("alpha")) / int(method.option("r")))
            row[target.place].view(target.shape)[: own.shape[0], : own.shape[1]] = own
        return row

    def set_adapter(self, adapter: int, row: Tensor | None) -> None:
        """Give an adapter its values; None: it has none."""
        if row is not None:
            self.values[adapter].copy_(row)
            self.used.add(adapter)
        elif adapter in self.used:
            self.values[adapter].zero_()
            self.used.discard(adapter)

    def image_values(self, row: Tensor | None) -> Tensor:
        """The values of a row that change what the image encoder makes of an image; empty where none do."""
        if row is None:
            return torch.zeros(0)
        found = [row[one.place] for one in self.targets.values() if one.part in IMAGE_PARTS]
        values = torch.cat(found) if found else torch.zeros(0)
        return values if bool(values.any()) else values[:0]

    def remove(self) -> None:
        """Give the model its own linears back."""
        for name, linear in self.linears.items():
            self.model.set_submodule(name, linear.base_layer)


def add_lora_bank(
    model: nn.Module, wanted: Mapping[str, Target], adapters: int, images: ActiveRows, texts: ActiveRows
) -> LoRABank:
    """Put a `MixedLinear` in the place of every linear of `wanted`; no adapter has matrices yet.

    `images` and `texts` are those of the norms (`normtune.adapters.multi.bank.Mixed`).
    """
    sites: Sequence[str] = list(dict.fromkeys(name.rpartition(".")[0] for name in wanted))
    device = next(model.parameters()).device
    size = max(target.place.stop for target in wanted.values())
    values = torch.zeros((adapters, size), device=device)
    memory, used = ActiveRows(), set[int]()
    linears: dict[str, MultiAdapterLoRA] = {}
    for site in sites:
        part = wanted[f"{site}.{DOWN}"].part
        rows = memory if _reads_images(part, site) else images if part in IMAGE_PARTS else texts
        down, up = (_matrices(values, wanted[f"{site}.{matrix}"]) for matrix in (DOWN, UP))
        linears[site] = MultiAdapterLoRA(model.get_submodule(site), down, up, rows, used)
    for site, linear in linears.items():
        model.set_submodule(site, linear)
    return LoRABank(model, wanted, values, memory, linears, used)


def _matrices(values: Tensor, target: Target) -> Tensor:
    return values[:, target.place].unflatten(1, target.shape)


def _reads_images(part: str, site: str) -> bool:
    """Whether the linear's input are the states of images, among text layers (the encoder of MISS)."""
    *outer, leaf = site.split(".")
    return part == "encoder" and bool(set(outer) & set(CROSS)) and leaf in KEY + VALUE


def _own_shape(target: Target, matrix: str, rank: int) -> list[int]:
    return [rank, target.shape[1]] if matrix == DOWN else [target.shape[0], rank]


def _loras(info: AdapterInfo) -> dict[str, Method]:
    """Part -> its LoRA, as the delta's recipe has it; a part has one at most."""
    parts = parse(info.recipe).parts
    return {part: one for part, methods in parts for one in methods if one.name == "lora"}

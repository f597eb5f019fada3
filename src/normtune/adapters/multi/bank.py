"""Several norm adapters over one base, to answer with them.

Every tuned norm holds the gains and biases of all adapters (`MultiAdapterNorm`), and each row of a batch uses
its adapter's. Everything between the norms is the base, so that one pass serves all adapters.

The values of all adapters are one tensor, with a row per adapter:

                norm 1 weight | norm 1 bias | norm 2 weight | ...
    values[0]   ---------- adapter 0 (the server keeps the base's own values here)
    values[1]   ---------- adapter 1

The norms' parameters are views of its columns, so that loading an adapter copies a row. No gradients are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normtune.adapters.multi.norms import MultiAdapterNorm
from normtune.adapters.multi.rows import ActiveRows, RowAdapters
from normtune.errors import InputError
from normtune.methods.adapt import TunedModel
from normtune.methods.norms import TunedNorm
from normtune.models.part_names import IMAGE_PARTS


@dataclass(frozen=True)
class AdapterBank:
    """A model with several adapters in its tuned norms."""

    tuned: TunedModel  # the model; its trained parameters are the norms' banks, [adapters, width]
    image_rows: ActiveRows  # the adapters of the rows in the norms of the image parts
    text_rows: ActiveRows  # the same for the text parts
    values: Tensor  # [adapters, trained values] fp32; every norm's gains and biases are views of it
    columns: Mapping[str, slice]  # trained name -> its columns in `values`

    @torch.no_grad()
    def set_adapter(self, adapter: int, tensors: Mapping[str, Tensor]) -> None:
        """Set the values of one adapter, such as those read from its file."""
        for name, span in self.columns.items():
            self.values[adapter, span] = tensors[name].to(self.values)

    @contextmanager
    def use(self, image_adapters: RowAdapters | None, text_adapters: RowAdapters | None) -> Iterator[None]:
        """Inside, the norms apply to each image and each row of text the gains of its adapter.

        None means that no norm of those parts runs. When answers end early in generation,
        `Family.active_text_rows` removes their rows.
        """
        with self.image_rows.use(image_adapters), self.text_rows.use(text_adapters):
            yield


def build_bank(tuned: TunedModel, adapters: int) -> AdapterBank:
    """Replace every tuned norm by a `MultiAdapterNorm` with as many copies of its values.

    Args:
        tuned: a model with a recipe that trains norms only.

    Raises:
        InputError: the recipe trains something else than norms (the model is then unchanged).
    """
    check_only_norms(tuned)
    names = dict.fromkeys(name.rpartition(".")[0] for name in tuned.trained)
    norms = {name: norm for name in names if isinstance(norm := tuned.model.get_submodule(name), TunedNorm)}
    parameters = {f"{name}.{key}": p for name, norm in norms.items() for key, p in norm.named_parameters()}
    # They differ if a norm trains only its gain or only its bias, or is of a kind that TunedNorm does not
    # have.
    if unsupported := sorted(parameters.keys() ^ tuned.trained.keys()):
        raise InputError(f"{unsupported[0]} is of a norm that cannot hold several adapters.")
    # each trained tensor gets its own columns, in the order of the norms
    columns: dict[str, slice] = {}
    stop = 0
    for name, parameter in parameters.items():
        start, stop = stop, stop + parameter.numel()
        columns[name] = slice(start, stop)
    initial_values = torch.cat([parameter.detach() for parameter in parameters.values()])
    values = initial_values.repeat(adapters, 1)  # [adapters, values]
    image_rows, text_rows = ActiveRows(), ActiveRows()
    banks: dict[str, nn.Parameter] = {}
    for name, norm in norms.items():
        # slices of columns are views: writing a row of `values` changes all norms
        weight = values[:, columns[f"{name}.weight"]]
        bias = None if norm.bias is None else values[:, columns[f"{name}.bias"]]
        part, _ = tuned.part_and_role[f"{name}.weight"]
        active_rows = image_rows if part in IMAGE_PARTS else text_rows
        multi = MultiAdapterNorm(norm, weight, bias, active_rows)
        banks |= {f"{name}.{key}": bank for key, bank in multi.named_parameters()}
        tuned.model.set_submodule(name, multi)
    # the same names as before, but each parameter has a first dimension of adapters
    tuned = replace(tuned, trained={name: banks[name] for name in tuned.trained})
    # in the order in which adapters are saved
    saved_order = {name: columns[name] for name in tuned.trained}
    return AdapterBank(tuned, image_rows, text_rows, values, saved_order)


def check_only_norms(tuned: TunedModel) -> None:
    """Raise an `InputError` if a recipe trains anything but norms by the method `ln`."""
    other = sorted(set(tuned.methods.values()) - {"ln"})
    if other:
        raise InputError(
            f"recipe '{tuned.recipe}' trains by {', '.join(other)}, but only norm adapters can share a model. "
            "Choose ln in every part."
        )

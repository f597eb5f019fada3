"""One base, several adapters: every tuned norm holds the gains of all of them, and rows say whose they are.

What lies between the norms is the base's and the same for everybody, so that one pass serves all adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    """A model whose tuned norms hold several adapters.

    Attributes:
        tuned: what is trained, by name: the banks of all adapters; see `alone` for those of one.
        images, texts: whose rows the norms of the image parts and of the text parts are given.
        values: [adapters, trained values] fp32; every norm's gains and biases are views of it.
        grads: the same of the gradients; see `gather`.
        places: trained name -> where its values stand in a row of `values`.
        banks: the norms' gains and biases, in the order of their places.
    """

    tuned: TunedModel
    images: ActiveRows
    texts: ActiveRows
    values: Tensor
    grads: Tensor
    slices: Mapping[str, slice]
    banks: Sequence[nn.Parameter]

    def trained(self, adapter: int) -> dict[str, nn.Parameter]:
        """What one adapter trains, by name; views of `values`."""
        return {name: nn.Parameter(self.values[adapter, place], False) for name, place in self.slices.items()}

    def as_single(self, adapter: int) -> TunedModel:
        """One adapter as `adapt` and training would have left it, for its delta."""
        return replace(self.tuned, trained=self.trained(adapter))

    @torch.no_grad()
    def set_adapter(self, adapter: int, tensors: Mapping[str, Tensor]) -> None:
        """Give an adapter its values, such as those of a delta."""
        for name, place in self.slices.items():
            self.values[adapter, place] = tensors[name].to(self.values)

    def collect_gradients(self) -> None:
        """Add what a backward pass left at the norms to `grads`."""
        found = [torch.zeros_like(bank) if bank.grad is None else bank.grad for bank in self.banks]
        self.grads.add_(torch.cat(found, 1))
        for bank in self.banks:
            bank.grad = None

    @contextmanager
    def use(self, images: RowAdapters | None, texts: RowAdapters | None) -> Iterator[None]:
        """Inside, norms give each image and each row of text the gains of its owner.

        A backward pass belongs inside too: layers may run again there. None: no norm of those parts is met.
        Answers that end early leave the batch: `Family.texts` tells the norms of it.
        """
        with self.images.use(images), self.texts.use(texts):
            yield


def build_bank(tuned: TunedModel, adapters: int) -> AdapterBank:
    """Put a `MixedNorm` in the place of every tuned norm, with as many copies of its values.

    Raises:
        InputError: something else than norms is trained (the model is left as it was).
    """
    check_only_norms(tuned)
    names = dict.fromkeys(name.rpartition(".")[0] for name in tuned.trained)
    held = {name: norm for name in names if isinstance(norm := tuned.model.get_submodule(name), TunedNorm)}
    own = {f"{name}.{key}": one for name, norm in held.items() for key, one in norm.named_parameters()}
    if strange := sorted(own.keys() ^ tuned.trained.keys()):
        raise InputError(
            f"{strange[0]} is of a norm that cannot hold several adapters. Train one after the other."
        )
    places: dict[str, slice] = {}
    stop = 0
    for name, one in own.items():
        start, stop = stop, stop + one.numel()
        places[name] = slice(start, stop)
    start_values = torch.cat([one.detach() for one in own.values()])
    values = start_values.repeat(adapters, 1)
    images, texts = ActiveRows(), ActiveRows()
    banks: dict[str, nn.Parameter] = {}
    for name, norm in held.items():
        weight = values[:, places[f"{name}.weight"]]
        bias = None if norm.bias is None else values[:, places[f"{name}.bias"]]
        part, _ = tuned.part_and_role[f"{name}.weight"]
        mixed = MultiAdapterNorm.from_norm(norm, weight, bias, images if part in IMAGE_PARTS else texts)
        banks |= {f"{name}.{key}": bank for key, bank in mixed.named_parameters()}
        tuned.model.set_submodule(name, mixed)
    tuned = replace(tuned, trained={name: banks[name] for name in tuned.trained})
    in_order = {name: places[name] for name in tuned.trained}
    return AdapterBank(tuned, images, texts, values, torch.zeros_like(values), in_order, [*banks.values()])


def check_only_norms(tuned: TunedModel) -> None:
    """Check that a recipe trains norms by the method `ln` and nothing else.

    Raises:
        InputError: it does not.
    """
    other = sorted(set(tuned.methods.values()) - {"ln"})
    if other:
        raise InputError(
            f"recipe '{tuned.recipe}' trains by {', '.join(other)}, and adapters share a pass by their norms "
            "alone. Choose ln in every part, or train one after the other."
        )

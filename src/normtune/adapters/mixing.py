"""Mix adapters of one base: a weighted sum of what each has changed.

A trained parameter of the base becomes `base + sum_i w_i (tuned_i - base)`, as in task arithmetic (Ilharco et al.
2023, arXiv 2212.04089). One adapter with a weight below 1 keeps part of its change, so that the model forgets less
of what the base could do (arXiv 2508.07577, for norms).

A LoRA changes its linear by a product B A. The sum of products is not the product of summed factors, so there are
two functions: `sum_values` sums the factors, `sum_products` the products.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from normtune.adapters.base_files import open_base
from normtune.adapters.hub import local_folder
from normtune.adapters.info import NOTICE, ROWS_FILE, AdapterInfo
from normtune.adapters.storage import library_versions, read_adapter_info, read_tensors, write_adapter
from normtune.adapters.training_rows import TrainingRows, read_rows
from normtune.errors import InputError
from normtune.methods.lora import MAGNITUDE
from normtune.methods.registry import INTRINSIC
from normtune.runtime.files import atomic_directory, check_new_directory
from normtune.runtime.notebook import Result

_A, _B = ".lora_A", ".lora_B"  # endings of a LoRA's factors: [rank, in] and [out, rank]


@dataclass(frozen=True)
class MixedAdapter(Result):
    """What mixing wrote."""

    out: str
    recipe: str
    weights: dict[str, float]  # adapter -> its weight
    base_weight: float  # weight of the base's values: 1 minus the sum of the weights
    tensors: int
    values: int
    # share of the squared size of the summed LoRA products that their rank cannot hold; None without a LoRA
    lost: float | None
    without_rows: list[str]  # adapters that do not record their training rows; the mixed one then does not either

    def __str__(self) -> str:
        terms = " + ".join(f"{weight:g} x {name}" for name, weight in self.weights.items())
        lines = [
            f"mixed {terms}: {self.out}",
            f"{self.tensors:,} tensors ({self.values:,} values) of '{self.recipe}'; the base has weight "
            f"{self.base_weight:g}",
        ]
        if self.lost is not None:
            lines.append(f"LoRA: {self.lost:.2%} of the squared size of the summed products is lost at this rank")
        if self.without_rows:
            lines.append(f"no {ROWS_FILE}, because there is none of {', '.join(self.without_rows)}")
        return "\n".join(lines)


def mix_adapters(weights: Mapping[str | Path, float], *, out: str | Path, model: str | None = None) -> MixedAdapter:
    """Write the weighted sum of what adapters have changed in their base, as an adapter.

    ```python
    normtune.mix_adapters({"runs/slake": 0.5, "runs/vqa-rad": 0.5}, out="runs/both")
    normtune.mix_adapters({"runs/slake": 0.7}, out="runs/milder")
    ```

    The base is read only if the weights do not sum to 1. Products of a LoRA are summed exactly, and their sum is
    truncated to the LoRA's rank.

    Args:
        weights: folder of each adapter, or its name on the hub -> its weight.
        out: folder of the mixed adapter; it must be new or empty.
        model: the base; None: as the first adapter names it.

    Raises:
        InputError: the adapters are of different bases or recipes, a method cannot be mixed, or `model` is another
            base than theirs.
    """
    if not weights or not all(map(math.isfinite, weights.values())):
        raise InputError("mixing needs one or more adapters with finite weights, such as runs/ln:0.5.")
    check_new_directory(Path(out))
    names, numbers = [str(name) for name in weights], [float(weight) for weight in weights.values()]
    directories = [local_folder(name) for name in names]
    infos = [read_adapter_info(directory) for directory in directories]
    check_mixable(names, infos)
    info, data = infos[0], _data(names, numbers, infos)
    total = math.fsum(numbers)
    base_weight = 0.0 if math.isclose(total, 1) else 1 - total
    # the base is one more term of the sum
    base = [_read_base(model or info.base_name, info)] if base_weight else []
    states = [read_tensors(directory, info) for directory in directories]
    tensors, lost = sum_products([*states, *base], [*numbers, *([base_weight] if base else [])])
    rows = [read_rows(directory) for directory in directories]
    without_rows = [name for name, recorded in zip(names, rows, strict=True) if recorded is None]
    with atomic_directory(out) as building:
        if not without_rows:
            union = _union([recorded for recorded in rows if recorded is not None])
            data["rows_digest"] = union.digest
            union.write(building / ROWS_FILE)
        mixed_info = replace(
            info, base_name=model or info.base_name, data=data, metrics=None, versions=library_versions(), notice=NOTICE
        )
        write_adapter(building, mixed_info, tensors)
    return MixedAdapter(
        out=str(out),
        recipe=info.recipe,
        weights=dict(zip(names, numbers, strict=True)),
        base_weight=base_weight,
        tensors=len(tensors),
        values=sum(tensor.numel() for tensor in tensors.values()),
        lost=lost,
        without_rows=without_rows,
    )


def check_mixable(names: Sequence[str], infos: Sequence[AdapterInfo]) -> None:
    """Check that adapters have one base, recipe and set of tensors, and that their methods can be mixed.

    Args:
        names: of the adapters, for the message.

    Raises:
        InputError: they differ, or have a method that cannot be mixed.
    """
    first = infos[0]
    for name, info in zip(names, infos, strict=True):
        if not info.base_fingerprint:
            raise InputError(f"{name} is an adapter of PEFT, which cannot be mixed. Train it with normtune.")
        if info.base_fingerprint != first.base_fingerprint:
            raise InputError(
                f"{names[0]} is an adapter of the base '{first.base_name}' and {name} of '{info.base_name}', which has "
                "other values. Mix adapters of one base."
            )
        if (info.recipe, info.tensors) != (first.recipe, first.tensors):
            raise InputError(
                f"{names[0]} has the recipe '{first.recipe}' with {len(first.tensors)} tensors, and {name} has "
                f"'{info.recipe}' with {len(info.tensors)}. Mix adapters of one recipe."
            )
    for tensor_name, tensor in first.tensors.items():
        if tensor.method not in (*INTRINSIC, "lora"):
            raise InputError(
                f"part '{tensor.part}' was trained by {tensor.method}, which cannot be mixed: its values do not add "
                "to the base's. Mix adapters of norms, biases, whole parameters or LoRA."
            )
        if tensor_name.endswith(MAGNITUDE):
            raise InputError(
                f"part '{tensor.part}' was trained by lora(dora=1), which cannot be mixed: DoRA rescales the rows of "
                "the sum. Mix LoRA without dora."
            )


def sum_values(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Sum the tensors of each name with weights.

    Factors of a LoRA are summed like all others: the average of factors is not the factors of the average.

    Args:
        states: name -> tensor, with the same names and shapes in each.
        weights: one for each state.

    Returns:
        Name -> weighted sum, in the dtype of the first state.
    """
    sums = {}
    for name, first in states[0].items():
        # in fp64, so that the order of the states does not matter and weights 1 and 0 return a state unchanged
        terms = (weight * state[name].double() for state, weight in zip(states, weights, strict=True))
        sums[name] = sum(terms, start=torch.zeros_like(first, dtype=torch.float64)).to(first.dtype)
    return sums


def sum_products(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> tuple[dict[str, Tensor], float | None]:
    """Sum tensors with weights, but of the factors of a LoRA sum the products.

    The weighted sum of products has up to the sum of their ranks. Its best approximation of one LoRA's rank is its
    truncated singular value decomposition.

    Args:
        states: name -> tensor. A state without a LoRA's factors, such as the base's, adds nothing to it.
        weights: one for each state.

    Returns:
        Name -> weighted sum, with new factors of each LoRA; and the share of the squared size (Frobenius norm) of all
        summed products that the truncation has lost, None if there is no LoRA.
    """
    linears = [name.removesuffix(_A) for name in states[0] if name.endswith(_A)]
    factor_names = {linear + end for linear in linears for end in (_A, _B)}
    sums = sum_values([{n: t for n, t in state.items() if n not in factor_names} for state in states], weights)
    lost = size = 0.0
    for linear in linears:
        pairs = [
            (weight * state[linear + _B].double(), state[linear + _A].double())
            for state, weight in zip(states, weights, strict=True)
            if linear + _A in state
        ]
        sums[linear + _A], sums[linear + _B], squared = _truncated_product(pairs, states[0][linear + _A])
        rank = sums[linear + _A].shape[0]
        lost, size = lost + float(squared[rank:].sum()), size + float(squared.sum())
    if not linears:
        return sums, None
    return {name: sums[name] for name in states[0]}, lost / size if size else 0.0


def _truncated_product(pairs: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors A and B of `sum B_i A_i` truncated to a rank, and the squared singular values of the whole sum.

    Args:
        pairs: (B_i [out, r_i], A_i [r_i, in]), fp64.
        like: a factor A of the rank and dtype of the result: [rank, in].
    """
    rank = like.shape[0]
    # [B_1 B_2 ...] [A_1; A_2; ...] is the sum; QR of both leaves an SVD of the size of the ranks' sum
    left, left_rest = torch.linalg.qr(torch.cat([b for b, _ in pairs], dim=1))  # [out, k], [k, sum of r_i]
    rows = torch.cat([a for _, a in pairs])  # [sum of r_i, in]
    right, right_rest = torch.linalg.qr(rows.T)  # [in, k], [k, sum of r_i]
    u, singular, v = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    # B gets the singular values, and the rows of A keep the size that they have in the summands. If both factors had
    # the root of the singular values, a direction without one would be zero in both and would never get a gradient.
    row_size = rows.square().sum(1).mean().sqrt().clamp(min=1e-12)
    b, a = left @ u[:, :rank] * (singular[:rank] / row_size), row_size * (v[:rank] @ right.T)
    missing = rank - len(a)  # of a linear that is smaller than the rank
    return F.pad(a, (0, 0, 0, missing)).to(like.dtype), F.pad(b, (0, missing)).to(like.dtype), singular.square()


def _read_base(model: str, info: AdapterInfo) -> dict[str, Tensor]:
    """The base's values of an adapter's parameters."""
    base = open_base(model)
    if not base.matches(info.base_fingerprint):
        raise InputError(f"the base {model} is not the one that the adapters were trained on. Give it by --model.")
    return {name: base.value(name) for name, tensor in info.tensors.items() if tensor.method in INTRINSIC}


def _data(names: Sequence[str], weights: Sequence[float], infos: Sequence[AdapterInfo]) -> dict[str, Any]:
    """The entry `data` of the mixed adapter: its parents with their data and licences, and how it reads questions.

    Raises:
        InputError: the parents read images or questions with options differently.
    """
    all_data = [info.data or {} for info in infos]
    datasets = {str(data.get("name", "not recorded")): str(data.get("licence", "unknown")) for data in all_data}
    data: dict[str, Any] = {
        "name": " + ".join(datasets),
        "licence": "; ".join(f"{name}: {licence}" for name, licence in datasets.items()),
        # the datasets that the parents were trained on, as in an adapter that was trained on a mixture
        "mixture": {name: {"name": name} for name in datasets}
        | {name: part for of_parent in all_data for name, part in of_parent.get("mixture", {}).items()},
        "parents": [
            {
                "adapter": Path(name).name if Path(name).exists() else name,  # no paths: cards are published
                "weight": weight,
                **{key: of_parent[key] for key in ("name", "split", "licence") if key in of_parent},
                "sha256": info.sha256,
            }
            for name, weight, of_parent, info in zip(names, weights, all_data, infos, strict=True)
        ],
    }
    limits = [of_parent["limits"] for of_parent in all_data if of_parent.get("limits") is not None]
    if len(limits) == len(infos):  # else as an old adapter: the limits of its version apply
        data["limits"] = _widest_limits(limits)
    choices = [of_parent["choices"] for of_parent in all_data if "choices" in of_parent]
    if choices:
        data["choices"] = choices[0]
        if any(other != choices[0] for other in choices):
            raise InputError("the adapters were trained with different prompts of options, and one prompt is needed.")
    return data


def _widest_limits(limits: Sequence[Mapping[str, int | None]]) -> dict[str, int | None]:
    """The longest limit of each text (None: no limit); the images' limit, which must be one."""
    if len({limit.get("max_pixels") for limit in limits}) > 1:
        raise InputError("the adapters were trained with different --max-pixels, and one value is needed.")
    widest: dict[str, int | None] = {}
    for name in dict.fromkeys(name for limit in limits for name in limit):
        values = [limit.get(name) for limit in limits]
        widest[name] = None if None in values else max(value for value in values if value is not None)
    return widest


def _union(parents: Sequence[TrainingRows]) -> TrainingRows:
    """The rows and pictures that any of the parents was trained on."""
    digest = hashlib.sha256(" ".join(rows.digest for rows in parents).encode()).hexdigest()
    rows = np.unique(np.concatenate([parent.rows for parent in parents]))
    pictures = {picture for parent in parents for picture in parent.pictures}
    return TrainingRows(digest, rows, tuple(sorted(pictures)))

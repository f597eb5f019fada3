"""A model made trainable as a recipe says: `tuned = adapt(model, "vision=ln,language=lora(r=4)")`.

Whatever is trained is held in fp32, since a bf16 value near 1 cannot take an AdamW step of 1e-4: norms become
`TunedNorm`s, any other tensor of a lower-precision base an fp32 parameter that is cast to the base's dtype at
each use. All else is frozen and untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normtune import added
from normtune.added import Addition, Site, set_submodule
from normtune.anatomy import Anatomy, anatomy, norms
from normtune.errors import InputError
from normtune.methods import ADDED, Method, RecipeError
from normtune.norms import TunedNorm
from normtune.recipe import Recipe, parse, resolve
from normtune.selection import trainable

LEARNT_SHARE = 0.01  # below it a run is reported as having learnt nothing


@dataclass
class Tuned:
    """A model with the parameters that its recipe trains."""

    model: nn.Module
    recipe: Recipe  # resolved: it names every part of the model
    anatomy: Anatomy  # of the base, before
    trained: dict[str, nn.Parameter]  # by name; those of the base bear its names
    methods: dict[str, str]  # trained name -> method
    places: dict[str, tuple[str, str]]  # trained name -> (part, role); of an added one: (part, method)
    base_total: int
    additions: list[Addition] = field(default_factory=list)
    base_norms: dict[str, nn.Module] = field(default_factory=dict)  # the norms that were replaced, by name
    cast: list[tuple[nn.Module, str]] = field(default_factory=list)  # (module, attribute) held in fp32
    unmerge: Callable[[], None] | None = None  # set while merged

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.trained.values())

    @property
    def total(self) -> int:
        """Parameters of the base and what was added to it."""
        return self.base_total + sum(p.numel() for one in self.additions for p in one.parameters.values())

    @property
    def share(self) -> float:
        """Trainable part of the total."""
        return self.trainable / self.total


class Cast(nn.Module):
    """An fp32 parameter as the base computes with it; its gradient arrives in fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)


def adapt(model: nn.Module, recipe: Recipe | str, *, seed: int = 0) -> Tuned:
    """Make `model` trainable in place; `seed` decides the start of what is added.

    Raises:
        InputError: the recipe does not fit the model (the model is then as it was, but frozen).
    """
    base = anatomy(model)
    resolved = resolve(parse(recipe) if isinstance(recipe, str) else recipe, base.parts)
    claims = _claims(base, resolved)
    owners = _owners(model, set(claims))
    for name in claims:
        _check_float(name, owners[name])
    model.requires_grad_(False)
    tuned = Tuned(model, resolved, base, {}, {}, {}, base.total)
    try:
        with _seeded(model, seed):
            _add(tuned)
        if not claims and not tuned.additions and any(methods for _, methods in resolved.parts):
            raise RecipeError(f"recipe '{resolved}' finds nothing to train in this model. Change the recipe.")
    except InputError:
        untune(tuned)
        raise
    _train_norms(tuned, {name: owners[name] for name in claims})
    for name, holders in owners.items():
        if name not in tuned.trained:
            tuned.trained[name] = _hold_in_fp32(tuned, holders)
    tuned.trained = {name: tuned.trained[name] for name in claims}
    place_of = {place.name: place for place in base.places}
    for name, method in claims.items():
        tuned.methods[name] = method
        tuned.places[name] = (place_of[name].part, place_of[name].role)
    for addition in tuned.additions:
        tuned.trained |= addition.parameters
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in tuned.trained.values():
        assert parameter.dtype in (torch.float32, torch.float64), "what is trained is held in fp32"
        parameter.requires_grad_(True)
    return tuned


def untune(tuned: Tuned) -> nn.Module:
    """Give the base back: added parts off, the base's own norms on again; returns the model.

    Raises:
        InputError: other tensors of the base were trained (their old values are not kept).
    """
    norm_names = {name for name in tuned.trained if name.rpartition(".")[0] in tuned.base_norms}
    lost = [name for name, method in tuned.methods.items() if method not in ADDED and name not in norm_names]
    if lost:
        raise InputError(f"{lost[0]} was trained in place, its old values are not kept. Load the base again.")
    for addition in reversed(tuned.additions):
        addition.remove()
    for name, norm in tuned.base_norms.items():
        set_submodule(tuned.model, name, norm)
    return tuned.model


def _claims(base: Anatomy, recipe: Recipe) -> dict[str, str]:
    """Trained parameter of the base -> the first method of the recipe that takes it, in the base's order."""
    claimed: dict[str, str] = {}
    for part, methods in recipe.parts:
        for method in methods:
            if method.name in ADDED:
                continue
            alone = Recipe(((part, (method,)),), recipe.optional & {part})
            for name in trainable(base, alone):
                claimed.setdefault(name, method.name)
    return {place.name: claimed[place.name] for place in base.places if place.name in claimed}


def _owners(model: nn.Module, names: set[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Trained name -> every (module, attribute) that holds the parameter; a tied one has several."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters() if name in names}
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if (name := by_id.get(id(parameter))) is not None:
                owners.setdefault(name, []).append((module, attribute))
    assert set(owners) == names, "every trained parameter has an owner"
    return owners


def _check_float(name: str, holders: list[tuple[nn.Module, str]]) -> None:
    module, attribute = holders[0]
    parameter = getattr(module, attribute)
    if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
        raise InputError(
            f"{name} is quantised ({type(parameter.data).__name__}, {parameter.dtype}), it can't be trained: "
            "choose ln or lora there, or load the base without --quantize."
        )


def _add(tuned: Tuned) -> None:
    """Attach the recipe's added methods; all names are still the base's when their places are looked up."""
    sites = [(part, method, _sites(tuned, part, method)) for part, method in _added_methods(tuned.recipe)]
    for part, method, found in sites:
        try:
            addition = added.add(tuned.model, part, method, found)
        except added.NoSite:
            if part in tuned.recipe.optional:
                continue
            raise
        tuned.additions.append(addition)
        for name in addition.parameters:
            tuned.methods[name] = method.name
            tuned.places[name] = (part, method.name)


def _added_methods(recipe: Recipe) -> list[tuple[str, Method]]:
    return [(part, method) for part, methods in recipe.parts for method in methods if method.name in ADDED]


def _sites(tuned: Tuned, part: str, method: Method) -> list[Site]:
    """The part's attention and feed-forward linears in the method's layers."""
    layers = method.layer_range(tuned.anatomy.depth(part))
    found = []
    for place in tuned.anatomy.places:
        name, _, attribute = place.name.rpartition(".")
        if place.part != part or place.role not in ("attention", "ffn"):
            continue
        if place.layer is None or place.layer not in layers:
            continue
        module = tuned.model.get_submodule(name)
        if attribute == "weight" and isinstance(module, nn.Linear):
            found.append(Site(name, place.role, place.layer, module))
    return found


def _train_norms(tuned: Tuned, owners: Mapping[str, list[tuple[nn.Module, str]]]) -> None:
    """Put a `TunedNorm` in the place of every norm that has a trained parameter."""
    names = {id(module): name for name, module in norms(tuned.model).items()}
    wanted: dict[str, dict[str, str]] = {}  # norm -> attribute -> trained name
    for name, holders in owners.items():
        for module, attribute in holders:
            if id(module) in names:
                wanted.setdefault(names[id(module)], {})[attribute] = name
    for norm_name, attributes in wanted.items():
        norm = tuned.model.get_submodule(norm_name)
        tuned.base_norms[norm_name] = norm
        replacement = TunedNorm.of(norm)
        set_submodule(tuned.model, norm_name, replacement)
        for attribute, name in attributes.items():
            tuned.trained[name] = getattr(replacement, attribute)


def _hold_in_fp32(tuned: Tuned, holders: list[tuple[nn.Module, str]]) -> nn.Parameter:
    """The parameter to train in the place of a base's tensor: itself, or fp32 and cast at use."""
    module, attribute = holders[0]
    old = getattr(module, attribute)
    if old.dtype.itemsize >= torch.float32.itemsize:
        return old
    wide = nn.Parameter(old.detach().float())
    for module, attribute in holders:
        setattr(module, attribute, wide)
        parametrize.register_parametrization(module, attribute, Cast(old.dtype), unsafe=True)
        tuned.cast.append((module, attribute))
    return wide


@dataclass(frozen=True)
class Change:
    """How far the trained parameters of one part and role went."""

    part: str
    role: str
    values: int
    changed: float  # share of the values that differ from before
    relative: float | None  # norm of the change over that of the old values; None where all were zero


@dataclass(frozen=True)
class ChangeReport:
    """What training changed; `warning` says so where it changed nothing worth the name."""

    share: float  # share of all trained values that differ from before
    changes: tuple[Change, ...]
    warning: str | None


def change_report(before: Mapping[str, Tensor], tuned: Tuned) -> ChangeReport:
    """Compare the trained parameters with those `before` training (a copy of `tuned.trained`, by name).

    Raises:
        InputError: `before` lacks a trained parameter.
    """
    groups: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    broken = 0
    for name, parameter in tuned.trained.items():
        if name not in before:
            raise InputError(f"no earlier value of {name} to compare with.")
        old, new = before[name].detach().to(parameter.device, torch.float32), parameter.detach()
        groups.setdefault(tuned.places[name], []).append((old, new))
        broken += int((~torch.isfinite(new)).sum())
    changes, moved, values = [], 0, 0
    for (part, role), pairs in groups.items():
        count = sum(new.numel() for _, new in pairs)
        changed = sum(int((old != new).sum()) for old, new in pairs)
        size = sum(float(old.double().square().sum()) for old, _ in pairs) ** 0.5
        step = sum(float((new.double() - old.double()).square().sum()) for old, new in pairs) ** 0.5
        changes.append(Change(part, role, count, changed / count, step / size if size else None))
        moved, values = moved + changed, values + count
    share = moved / values if values else 0.0
    warning = None
    if broken:
        warning = f"{broken} trained values are not finite. Lower the learning rate."
    elif share < LEARNT_SHARE:
        warning = (
            f"only {share:.2%} of the {values:,} trained values changed. "
            "Raise the learning rate or train longer."
        )
    return ChangeReport(share, tuple(changes), warning)


def norm_changes(before: Mapping[str, Tensor], tuned: Tuned) -> list[dict[str, Any]]:
    """How far each trained norm parameter of the base went, one row a parameter; `before` as above.

    `relative` is the norm of its step over that of its old values (None where these are zero), `rms` the root
    mean square of its step.
    """
    rows = []
    for place in tuned.anatomy.places:
        if place.role != "norm" or place.name not in tuned.trained:
            continue
        new = tuned.trained[place.name].detach().double().cpu()
        old = before[place.name].detach().double().cpu()
        step, size = float((new - old).norm()), float(old.norm())
        rows.append(
            {
                "name": place.name,
                "part": place.part,
                "layer": place.layer,
                "kind": "bias" if place.name.endswith("bias") else "gain",
                "count": place.numel,
                "relative": step / size if size else None,
                "rms": step / place.numel**0.5,
            }
        )
    return rows


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, the caller's state again after."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        torch.manual_seed(seed)
        yield

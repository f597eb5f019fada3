"""A model made trainable as a recipe says: `tuned = adapt(model, "vision=ln,language=lora(r=4)")`.

Whatever is trained is held in fp32, since a bf16 value near 1 cannot take an AdamW step of 1e-4: norms become
`TunedNorm`s, any other tensor of a lower-precision base an fp32 parameter that is cast to the base's dtype at
each use. All else is frozen and untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normtune.errors import InputError
from normtune.methods.bottleneck import add_bottleneck
from normtune.methods.lora import add_ia3, add_lora
from normtune.methods.norms import TunedNorm
from normtune.methods.prefix import add_prefix
from normtune.methods.recipe import Recipe, parse, resolve
from normtune.methods.registry import ADDED, INTRINSIC, Method, RecipeError
from normtune.methods.sites import AddedLayers, NoTarget, TargetLinear
from normtune.models.parts import (
    ModelParts,
    ParameterHolder,
    ParameterInfo,
    find_parts,
    is_quantized,
    norms,
    parameter_holders,
)


@dataclass
class TunedModel:
    """A model with the parameters that its recipe trains."""

    model: nn.Module
    recipe: Recipe  # resolved: it names every part of the model
    parts: ModelParts  # of the base, before
    trained: dict[str, nn.Parameter]  # by name; those of the base bear its names
    methods: dict[str, str]  # trained name -> method
    part_and_role: dict[str, tuple[str, str]]  # trained name -> (part, role); of an added one: (part, method)
    base_total: int
    additions: list[AddedLayers] = field(default_factory=list)
    base_norms: dict[str, nn.Module] = field(default_factory=dict)  # the norms that were replaced, by name
    cast: list[ParameterHolder] = field(default_factory=list)  # (module, attribute) held in fp32
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


def adapt(model: nn.Module, recipe: Recipe | str, *, seed: int = 0) -> TunedModel:
    """Make `model` trainable in place; `seed` decides the start of what is added.

    Raises:
        InputError: the recipe does not fit the model (the model is then as it was, but frozen).
    """
    base = find_parts(model)
    resolved = resolve(parse(recipe) if isinstance(recipe, str) else recipe, base.parts)
    claims = _claims(base, resolved)
    claimed = {name: parameter for name, parameter in model.named_parameters() if name in claims}
    owners = parameter_holders(model, claimed)
    for name in claims:
        _check_float(name, owners[name])
    model.requires_grad_(False)
    tuned = TunedModel(model, resolved, base, {}, {}, {}, base.total)
    try:
        with _seeded(model, seed):
            _add(tuned)
        if not claims and not tuned.additions and any(methods for _, methods in resolved.parts):
            raise RecipeError(f"recipe '{resolved}' finds nothing to train in this model. Change the recipe.")
    except InputError:
        restore_base(tuned)
        raise
    _train_norms(tuned, {name: owners[name] for name in claims})
    for name, holders in owners.items():
        if name not in tuned.trained:
            tuned.trained[name] = _train_in_fp32(tuned, holders)
    tuned.trained = {name: tuned.trained[name] for name in claims}
    place_of = {place.name: place for place in base.parameters}
    for name, method in claims.items():
        tuned.methods[name] = method
        tuned.part_and_role[name] = (place_of[name].part, place_of[name].role)
    for addition in tuned.additions:
        tuned.trained |= addition.parameters
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in tuned.trained.values():
        assert parameter.dtype in (torch.float32, torch.float64), "what is trained is held in fp32"
        parameter.requires_grad_(True)
    return tuned


def restore_base(tuned: TunedModel) -> nn.Module:
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
        tuned.model.set_submodule(name, norm)
    return tuned.model


def _claims(base: ModelParts, recipe: Recipe) -> dict[str, str]:
    """Trained parameter of the base -> the first method of the recipe that takes it, in the base's order."""
    claimed: dict[str, str] = {}
    for part, methods in recipe.parts:
        for method in methods:
            if method.name in ADDED:
                continue
            alone = Recipe(((part, (method,)),), recipe.optional & {part})
            for name in select_parameters(base, alone):
                claimed.setdefault(name, method.name)
    return {place.name: claimed[place.name] for place in base.parameters if place.name in claimed}


def _check_float(name: str, holders: list[ParameterHolder]) -> None:
    module, attribute = holders[0]
    parameter = getattr(module, attribute)
    if is_quantized(parameter):
        raise InputError(
            f"{name} is quantised ({type(parameter.data).__name__}, {parameter.dtype}), it can't be trained: "
            "choose ln or lora there, or load the base without --quantize."
        )


def _add(tuned: TunedModel) -> None:
    """Attach the recipe's added methods; all names are still the base's when their places are looked up."""
    sites = [(part, method, _sites(tuned, part, method)) for part, method in _added_methods(tuned.recipe)]
    for part, method, found in sites:
        try:
            addition = add_layers(tuned.model, part, method, found)
        except NoTarget:
            if part in tuned.recipe.optional:
                continue
            raise
        tuned.additions.append(addition)
        for name in addition.parameters:
            tuned.methods[name] = method.name
            tuned.part_and_role[name] = (part, method.name)


def _added_methods(recipe: Recipe) -> list[tuple[str, Method]]:
    return [(part, method) for part, methods in recipe.parts for method in methods if method.name in ADDED]


def _sites(tuned: TunedModel, part: str, method: Method) -> list[TargetLinear]:
    """The part's attention and feed-forward linears in the method's layers."""
    layers = method.layer_range(tuned.parts.depth(part))
    found = []
    for place in tuned.parts.parameters:
        name, _, attribute = place.name.rpartition(".")
        if place.part != part or place.role not in ("attention", "ffn"):
            continue
        if place.layer is None or place.layer not in layers:
            continue
        module = tuned.model.get_submodule(name)
        if attribute == "weight" and isinstance(module, nn.Linear):
            found.append(TargetLinear(name, place.role, place.layer, module))
    return found


def _train_norms(tuned: TunedModel, owners: Mapping[str, list[ParameterHolder]]) -> None:
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
        replacement = TunedNorm.from_norm(norm)
        tuned.model.set_submodule(norm_name, replacement)
        for attribute, name in attributes.items():
            tuned.trained[name] = getattr(replacement, attribute)


def _train_in_fp32(tuned: TunedModel, holders: list[ParameterHolder]) -> nn.Parameter:
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


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, the caller's state again after."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        torch.manual_seed(seed)
        yield


def select_parameters(base: ModelParts, recipe: Recipe) -> list[str]:
    """Names of the parameters that the intrinsic methods of a resolved recipe train, in the model's order.

    Raises:
        RecipeError: a method finds nothing in a part that is not optional.
    """
    chosen: set[str] = set()
    for part, methods in recipe.parts:
        for method in methods:
            if method.name not in INTRINSIC:
                continue
            found = [
                place.name
                for place in base.parameters
                if place.part == part and _selects(method, place, base)
            ]
            if not found and part not in recipe.optional:
                raise RecipeError(_nothing_to_train(base, part, method))
            chosen.update(found)
    return [place.name for place in base.parameters if place.name in chosen]


def _selects(method: Method, place: ParameterInfo, base: ModelParts) -> bool:
    if method.layers is not None and place.layer not in method.layer_range(base.depth(place.part)):
        return False
    if method.name == "bias":
        return place.is_bias
    if method.name == "ln":
        return place.role == "norm" and bool(method.option("bias" if place.name.endswith("bias") else "gain"))
    return method.name == "full" or place.role == method.name


def _nothing_to_train(base: ModelParts, part: str, method: Method) -> str:
    """What was asked, what there is, and what to do."""
    alone = Method(method.name, method.options)
    elsewhere = [
        other
        for other in base.parts
        if any(place.part == other and _selects(alone, place, base) for place in base.parameters)
    ]
    if method.layers is not None and part in elsewhere:
        return f"'{method}' finds nothing: part '{part}' has {base.depth(part)} layers. Change the range"
    having = f"parts that have some: {', '.join(elsewhere)}" if elsewhere else "no part of this model has any"
    return (
        f"'{method}' finds nothing in part '{part}'; {having}. "
        f"Change the recipe, write '{part}?' to skip it, or run normtune inspect"
    )


def add_layers(model: nn.Module, part: str, method: Method, sites: Sequence[TargetLinear]) -> AddedLayers:
    """Add `method` to the linears `sites` of one part.

    Raises:
        NoSite: the part has no place for it.
        InputError: another method stands there, or the part's layers differ too much for it.
    """
    if method.name == "lora":
        return add_lora(model, part, method, sites)
    if method.name == "ia3":
        return add_ia3(model, part, sites)
    if method.name == "adapter":
        return add_bottleneck(part, int(method.option("width")), sites)
    assert method.name in ("prefix", "ptuning"), method.name
    return add_prefix(model, part, int(method.option("n")), method.name == "prefix", sites)

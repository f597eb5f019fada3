"""Norms whose gains learn in fp32, whatever the base's precision.

Near 1 the spacing of bf16 is 0.0078, so a bf16 gain cannot take an AdamW step of 1e-4: it never moves. A
`TunedNorm` holds gain and bias in fp32, computes in fp32, gives its output in the input's dtype, and keeps
for the backward pass only its input, as it came, and one or two statistics a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from normtune.anatomy import norm_kind, tried
from normtune.traced import fresh


def norm_eps(module: nn.Module) -> float | None:
    """The constant added to the variance; None where it is the dtype's own (`nn.RMSNorm`'s default)."""
    for name in ("eps", "variance_epsilon"):
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"{type(module).__name__} names its epsilon neither eps nor variance_epsilon")


def rounds_first(module: nn.Module) -> bool:
    """Whether an "rms" norm rounds x/rms to the input's dtype before its gain (LLaMA) or after it (Gemma 4).

    Both are tried on 64 bf16 numbers; where neither explains the norm to the bit, the nearer one is taken.
    """
    x = torch.linspace(-3.0, 5.0, 64, dtype=torch.bfloat16)[None]
    gain = torch.linspace(0.3, 2.1, 64, dtype=torch.bfloat16)
    got = tried(module, x, gain).float()
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + (norm_eps(module) or 0.0))
    first, after = (unit.bfloat16() * gain).float(), (unit * gain.float()).bfloat16().float()
    return bool((got - first).abs().sum() <= (got - after).abs().sum())


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation (Ba et al. 2016): (result, mean, 1/std)."""
    out, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
    return out.to(x.dtype), mean, rstd


def _layer_norm_backward(
    grad: Tensor, saved: Sequence[Tensor], weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, gain and bias from what was saved: input, mean and 1/std."""
    x, mean, rstd = saved
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.float(), x.float(), weight.shape, mean, rstd, weight, bias, wanted
    )
    return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool, rounds: bool) -> tuple[Tensor, Tensor]:
    """Root-mean-square normalisation (Zhang and Sennrich 2019): (result, 1/rms).

    With `offset` the gain is 1 + weight (Gemma). With `rounds` x/rms is rounded to the input's dtype before
    the gain, as LLaMA's norm does, so that an untouched gain gives the base's output to the bit.
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _gained(wide * rstd, 1.0 + weight if offset else weight, None, x.dtype, rounds), rstd


def _gained(unit: Tensor, gain: Tensor, bias: Tensor | None, dtype: torch.dtype, rounds: bool) -> Tensor:
    """Normalised rows (fp32, overwritten) times gain plus bias, in `dtype`; the two broadcast."""
    if rounds and dtype != torch.float32:
        return (unit.to(dtype) * gain).to(dtype)
    unit = unit.mul_(gain)
    return (unit if bias is None else unit.add_(bias)).to(dtype)


def _rms_norm_backward(
    grad: Tensor, saved: Sequence[Tensor], weight: Tensor, offset: bool, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and gain from what was saved: input and 1/rms."""
    x, rstd = saved
    gain = 1.0 + weight if offset else weight
    wide = grad.float()
    # With a mean of 0 layer norm's kernel gives the gain's gradient, and the input's less one term, which
    # layer norm has and this one has not: 1/rms times the mean of grad * gain.
    grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
        wide, x.float(), weight.shape, torch.zeros_like(rstd), rstd, gain, None, [*wanted[:2], False]
    )
    if grad_x is not None:
        mean = (wide @ gain).unsqueeze(-1) / gain.numel()
        grad_x = grad_x.addcmul_(rstd, mean).to(x.dtype)
    return grad_x, grad_weight


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation that saves x, mean and 1/std and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        out, mean, rstd = _layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return fresh(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, weight, bias = ctx.saved_tensors
        return *_layer_norm_backward(grad, saved, weight, bias, [*ctx.needs_input_grad[:3]]), None


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square normalisation that saves x and 1/rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool, rounds: bool) -> Tensor:
        out, rstd = _rms_norm(x, weight, eps, offset, rounds)
        ctx.save_for_backward(x, rstd, weight)
        ctx.offset = offset
        return fresh(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, weight = ctx.saved_tensors
        found = _rms_norm_backward(grad, saved, weight, ctx.offset, [*ctx.needs_input_grad[:2]])
        return *found, None, None, None


class TunedNorm(nn.Module):
    """A norm made from the base's own, with `weight` and `bias` (where it has one) in fp32.

    Attributes:
        kind: "layer", "rms", "rms_offset" (gain = 1 + weight) or "group".
        rounds: whether x/rms is rounded to the input's dtype before the gain.
        weight: [width] fp32; its `requires_grad`, and the bias's, are those of the norm it was made from.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        kind: str,
        weight: Tensor,
        bias: Tensor | None,
        eps: float | None,
        groups: int = 1,
        rounds: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.groups = groups
        self.rounds = rounds
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True), weight.requires_grad)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(torch.float32, copy=True), bias.requires_grad)

    @classmethod
    def of(cls, module: nn.Module) -> TunedNorm:
        """The tuned counterpart of a norm, on the same device, with copies of its values."""
        weight = module.weight
        assert isinstance(weight, Tensor), "a norm without a gain has nothing to tune"
        bias = getattr(module, "bias", None)
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else 1
        kind = norm_kind(module)
        rounds = kind == "rms" and rounds_first(module)
        tuned = cls(kind, weight, bias, norm_eps(module), groups, rounds)
        return tuned.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] (group: [batch, width, ...]), any float dtype; returns the same shape and dtype."""
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        if self.kind == "group":
            return F.group_norm(x.float(), self.groups, self.weight, self.bias, eps).to(x.dtype)
        if self.kind == "layer":
            return _LayerNorm.apply(x, self.weight, self.bias, eps)
        return _RMSNorm.apply(x, self.weight, eps, self.kind == "rms_offset", self.rounds)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, kind={self.kind}, eps={self.eps}, bias={self.bias is not None}"


# --- Several adapters in one norm ---------------------------------------------------------------------------

FEW = 16  # runs of one adapter's rows up to which a kernel for each is faster than gains gathered by row

Run = tuple[int, int, int]  # an adapter, and the rows that take it: first, one past the last


class Owners:
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

    def gathered(self, bank: Tensor, rows: int) -> Tensor:
        """[adapters, width] -> what broadcasts over the rows as [units, share, width], or as [rows, 1, width]
        where shares differ."""
        index = self.index(bank.device)
        if self.sizes is not None:
            index = index.repeat_interleave(torch.tensor(self._share(rows), device=bank.device))
        return bank.index_select(0, index)[:, None]


class Rows:
    """What the norms of one part share: whose rows they are given.

    Attributes:
        owners: set by whoever calls the model (`taken_by`), until the backward pass is done.
    """

    def __init__(self) -> None:
        self.owners: Owners | None = None

    @contextmanager
    def taken_by(self, owners: Owners | None) -> Iterator[None]:
        """Inside, the norms give each row the gains of its owner."""
        before, self.owners = self.owners, owners
        try:
            yield
        finally:
            self.owners = before

    def select(self, units: Tensor) -> None:
        """Only these units go on, in this order: [units] long. In generation some are done before others."""
        if self.owners is not None:
            assert self.owners.sizes is None, "units of one size"
            self.owners = Owners([self.owners.adapters[unit] for unit in units.tolist()])


class _Mixed(torch.autograd.Function):
    """Layer or RMS normalisation with each row's own gain; saves what the function of one adapter saves."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: MixedNorm, owners: Owners
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        runs = owners.runs(len(flat))
        if len(runs) <= FEW:
            found = [
                norm.of_one(flat[start:stop], weight[one], None if bias is None else bias[one], eps)
                for one, start, stop in runs
            ]
            out, *statistics = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        else:
            out, *statistics = norm.of_each(flat, weight, bias, eps, owners)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.norm, ctx.runs = norm, runs
        return fresh(out.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:3]]
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        grad_x = torch.empty_like(flat) if wanted[0] else None
        banks = [
            torch.zeros_like(bank) if want else None
            for bank, want in zip((weight, bias), wanted[1:], strict=True)
        ]
        for one, start, stop in ctx.runs:
            saved = [tensor[start:stop] for tensor in (flat, *statistics)]
            own_bias = None if bias is None else bias[one]
            if ctx.norm.kind == "layer":
                found = _layer_norm_backward(grad[start:stop], saved, weight[one], own_bias, wanted)
            else:
                offset = ctx.norm.kind == "rms_offset"
                found = *_rms_norm_backward(grad[start:stop], saved, weight[one], offset, wanted), None
            if grad_x is not None and found[0] is not None:
                grad_x[start:stop] = found[0]
            for bank, own in zip(banks, found[1:], strict=True):
                if bank is not None and own is not None:
                    bank[one] += own
        return None if grad_x is None else grad_x.view(x.shape), *banks, None, None, None


class MixedNorm(nn.Module):
    """A `TunedNorm` of several adapters: each row of a batch takes the gain and bias of its own.

    Rows are normalised once, and what one adapter's rows come to is what its `TunedNorm` makes of them.

    Attributes:
        weight: [adapters, width] fp32.
        bias: [adapters, width] fp32, or None.
        rows: whose the rows are; one object for all norms whose inputs hold the same units.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        kind: str,
        weight: Tensor,
        bias: Tensor | None,
        eps: float | None,
        rows: Rows,
        group_count: int = 1,
        rounds: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.rounds = rounds
        self.group_count = group_count
        self.rows = rows
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def of(cls, norm: TunedNorm, weight: Tensor, bias: Tensor | None, rows: Rows) -> MixedNorm:
        """A norm of the kind of `norm` around banks [adapters, width] in fp32, which are not copied."""
        mixed = cls(norm.kind, weight, bias, norm.eps, rows, norm.groups, norm.rounds)
        return mixed.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] (group: [batch, width, ...]), any float dtype; returns the same shape and dtype."""
        owners = self.rows.owners
        assert owners is not None, "nobody has said whose these rows are: see Rows.taken_by"
        units = len(owners.adapters)
        if x.ndim == 4 and len(x) == 1 < units and x.shape[1] != units == x.shape[2]:
            return self(x.transpose(1, 2)).transpose(1, 2)  # the heads of one row's tokens stand before them
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        if self.kind != "group":
            return _Mixed.apply(x, self.weight, self.bias, eps, self, owners)
        bias = [None] * len(self.weight) if self.bias is None else self.bias
        found = [
            F.group_norm(x[start:stop].float(), self.group_count, self.weight[one], bias[one], eps)
            for one, start, stop in owners.runs(len(x))
        ]
        return torch.cat(found).to(x.dtype)

    def of_one(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        """Rows [R, width] of one adapter: (result, statistics ...)."""
        if self.kind == "layer":
            return _layer_norm(x, weight, bias, eps)
        return _rms_norm(x, weight, eps, self.kind == "rms_offset", self.rounds)

    def of_each(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, owners: Owners
    ) -> tuple[Tensor, ...]:
        """The same of rows of many adapters: gains are gathered."""
        wide = x.float()
        if self.kind == "layer":
            unit, *statistics = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
        else:
            statistics = [torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)]
            unit = wide * statistics[0]
        gain = owners.gathered(weight, len(x))
        gain = 1.0 + gain if self.kind == "rms_offset" else gain
        shift = None if bias is None else owners.gathered(bias, len(x))
        unit = unit.view(len(gain), -1, x.shape[-1])
        return _gained(unit, gain, shift, x.dtype, self.rounds).view(x.shape), *statistics

    def extra_repr(self) -> str:
        adapters, width = self.weight.shape
        return f"{width}, adapters={adapters}, kind={self.kind}, eps={self.eps}, bias={self.bias is not None}"

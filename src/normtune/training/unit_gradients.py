"""The gradient of each privacy unit (a patient, with all of its images and questions), for private training.

The loss is a sum over answer tokens, and a token belongs to one unit. With row losses l_r, weights w_r and unit u(r):

    gradient of unit u = sum over the rows r with u(r) = u of w_r * d l_r / d parameters

For a chunk of one unit that is an ordinary backward pass. For norms, the gradients of many units come from one forward
pass and two backward passes for any number of units. With dy the gradient of a norm's output at one token, and
unit(x) the normalised input:

    gradient of the gain of unit u = sum over its tokens of dy * unit(x)
    gradient of the bias of unit u = sum over its tokens of dy

Which tokens of a norm belong to which unit depends on the family: rows of groups, tiles, packed patches, answer rows.
The two backward passes find it out for any layout. The first one multiplies the loss of unit u by 2^(u - c). Products
with powers of two are exact in floating point, so that dy of each token of the unit is multiplied by this very power.
The second pass is the ordinary one. The ratio of both passes is the power, and so names the unit. Example with three
units and c = 1:

    token        dy, first pass    dy, second pass    ratio       unit
    t0           0.15              0.3                1/2         0
    t1           -0.2              -0.2               1           1
    t2           0.8               0.4                2           2
    t3           0.7               0.5                1.4         none: the token depends on several units

A token that depends on several units, as with batch statistics, is an error: the effect of one unit cannot be bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from normtune.errors import InputError
from normtune.methods.norms import TunedNorm
from normtune.training.layer_wrapping import replace_forwards

MAX_UNITS = 64  # of one chunk: the factors are 2^-32 to 2^31, far from the ends of the range of fp32 and bf16
_TOLERANCE = 0.02  # of a ratio: on CUDA two passes may add in another order, and bf16 rounds to 0.4%
_NEGLIGIBLE = 1e-30  # gradients below lose bits when they are multiplied by 2^-32; they are left out
_ROW_NORMS = ("layer", "rms", "rms_offset")  # kinds that normalise the last axis


class _Watch(torch.autograd.Function):
    """The identity of a norm's output; its backward pass hands the output's gradient and the input to `record`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, record: Any, call: int) -> Tensor:
        ctx.save_for_backward(x)  # the tensor that the norm saves too: no further memory, also where layers recompute
        ctx.record, ctx.call = record, call
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.record(ctx.call, ctx.saved_tensors[0], grad)
        return grad, None, None, None


class UnitGradients:
    """Computes the gradients of units as rows of a matrix, [units, trained values].

    Args:
        model: the adapted model.
        trained: the trained parameters by name; the columns are their values, one parameter after the other.

    Attributes:
        many: whether the gradients of several units can be computed together: only norms are trained.
        values: number of trained values.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        self.model, self.parameters = model, list(trained.values())
        ends = torch.tensor([0, *(parameter.numel() for parameter in self.parameters)]).cumsum(0).tolist()
        self.values: int = ends[-1]
        self.dtype = max((parameter.dtype for parameter in self.parameters), key=lambda dtype: dtype.itemsize)
        self.device = self.parameters[0].device
        self._columns = {id(p): slice(*ends[i : i + 2]) for i, p in enumerate(self.parameters)}
        norms = {name: module for name, module in model.named_modules() if isinstance(module, TunedNorm)}
        self._norms = {
            name: norm
            for name, norm in norms.items()
            if norm.kind in _ROW_NORMS and any(id(parameter) in self._columns for parameter in norm.parameters())
        }
        watched = {id(parameter) for norm in self._norms.values() for parameter in norm.parameters()}
        self.many = self._columns.keys() <= watched
        self._calls = count()
        self._largest: dict[int, Tensor] = {}  # of the first pass: call of a norm -> largest |dy| of each token
        self._gradients: Tensor | None = None  # the result, in the second pass

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the norms inside the block, in which the forward passes must run."""
        if not self.many:
            yield
            return
        forwards = {name: partial(self._watched_forward, norm) for name, norm in self._norms.items()}
        with replace_forwards(self.model, forwards):
            yield

    def of_one(self, losses: Tensor) -> Tensor:
        """The gradient of the sum of weighted row losses, which all belong to one unit: [1, trained values]."""
        gradients = torch.autograd.grad(losses.sum(), self.parameters, allow_unused=True)
        pairs = zip(gradients, self.parameters, strict=True)
        flat = [p.new_zeros(p.numel()) if gradient is None else gradient.flatten() for gradient, p in pairs]
        return torch.cat([part.to(self.dtype) for part in flat])[None]

    def of_many(self, losses: Tensor, unit_of: Tensor, units: int) -> Tensor:
        """The gradients of several units from one forward pass inside `watch`.

        Args:
            losses: weighted row losses, [N].
            unit_of: [N] long, the unit of each row, from 0 to `units` - 1.
            units: number of units, at most `MAX_UNITS`.

        Returns:
            [units, trained values].

        Raises:
            InputError: the value of a token depends on several units.
        """
        assert self.many and units <= MAX_UNITS, "only norms, and a power of two for each unit"
        factors = torch.ldexp(torch.ones_like(losses), unit_of - units // 2)
        self._largest = {}
        losses.backward(factors, retain_graph=True)
        self._gradients = torch.zeros(units, self.values, dtype=self.dtype, device=self.device)
        try:
            losses.backward(torch.ones_like(losses))
            return self._gradients
        finally:
            self._gradients = None
            for parameter in self.parameters:  # the sums over all units, which are not clipped
                parameter.grad = None

    def _watched_forward(self, norm: TunedNorm, x: Tensor) -> Tensor:
        y = TunedNorm.forward(norm, x)
        if not (torch.is_grad_enabled() and y.requires_grad):
            return y
        return _Watch.apply(y, x.detach(), partial(self._record, norm), next(self._calls))

    def _record(self, norm: TunedNorm, call: int, x: Tensor, grad: Tensor) -> None:
        """Called in both passes for each call of a norm; x and grad have one shape, [..., width]."""
        rows = grad.flatten(0, -2)  # [tokens, width]
        largest = rows.abs().amax(-1)
        if self._gradients is None:
            self._largest[call] = largest
            return
        units = len(self._gradients)
        counted = largest > _NEGLIGIBLE
        power = torch.log2(self._largest.pop(call)[counted] / largest[counted].to(self.dtype))
        unit = power.round()
        if bool(((power - unit).abs() > _TOLERANCE).any()):
            raise InputError(
                f"--dp-epsilon: a token at {norm} depends on several patients or images, so that the effect of one "
                "cannot be bounded. Choose another recipe or model, or group the questions (without --no-group)."
            )
        unit = (unit.long() + units // 2).clamp(0, units - 1)
        wide = rows[counted].to(self.dtype)
        unit_x = _normalise(norm, x.flatten(0, -2)[counted].to(self.dtype))
        for parameter, values in ((norm.weight, wide * unit_x), (norm.bias, wide)):
            if parameter is not None and id(parameter) in self._columns:
                self._gradients[:, self._columns[id(parameter)]].index_add_(0, unit, values)


def _normalise(norm: TunedNorm, x: Tensor) -> Tensor:
    """The rows before gain and bias, [tokens, width]."""
    shape, eps = (x.shape[-1],), torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    return F.layer_norm(x, shape, eps=eps) if norm.kind == "layer" else F.rms_norm(x, shape, eps=eps)

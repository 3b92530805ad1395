"""Statistics of all replicas together: one sum over a process group in the forward pass, and one in the backward pass.

Replicas add up `algebra.totals`, and in the backward pass the gradient of these, both in float64. Whichever path serves
a replica, it sends the same numbers, so that one may have a kernel that another lacks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd import Function

from batchnorm.core import algebra, normalize
from batchnorm.core.algebra import Moments

from . import checks, cpu, layout
from . import namespace as xp
from .cpu import Replica, Static

__all__ = ["Replicas", "replicas"]

EXACT = torch.float64
COMPILES = torch.__version__ >= "2.13"
"""Whether PyTorch's compilers differentiate a sum over processes; earlier ones gave wrong gradients, without a word."""


class Replicas(NamedTuple):
    """The processes that a batch is spread over; None is the default group."""

    group: Any

    def merge(self, moments: Moments) -> Moments:
        """Put the moments of all replicas together; differentiable."""
        total = _sum(algebra.totals(xp, moments, EXACT), self.group)
        return algebra.from_totals(xp, total, tuple(moments.mean.shape), moments.mean.dtype)

    def merge_of(self, x: Tensor, masked: bool) -> Any:
        """The same as a function for `normalize.train` on an input."""

        def merge(moments: Moments) -> Moments:
            merged = self.merge(moments)
            _check_several(x, merged.count, masked)
            return merged

        return merge

    def totals(self, x: Tensor, weights: Tensor | None, static: Static) -> Tensor:
        """Measure on the CPU kernels, and add up."""
        total = cpu.totals(x, weights, static)
        distributed.all_reduce(total, group=self.group)
        _check_several(x, total, weights is not None)
        return total

    def differentiate(
        self, replica: Replica, dy: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute the gradients of x, factor and offset that are wanted; that of x on all replicas, or on none."""
        total, dfactor, doffset = replica.totals_gradient(dy, wanted[1:])
        if not wanted[0]:
            return None, dfactor, doffset
        distributed.all_reduce(total, group=self.group)
        return replica.gradient(dy, total), dfactor, doffset

    def differentiate_further(
        self,
        dy: Tensor,
        x: Tensor,
        factor: Tensor | None,
        offset: Tensor | None,
        correction: Tensor | None,
        weights: Tensor | None,
        static: Static,
    ) -> list[Tensor | None]:
        """The same gradients with derivatives, by doing the forward pass once more, composed."""
        plan, dtype = layout.plan(x, static.axes, None), layout.accumulation_dtype(x.dtype)
        factor, offset = (
            value if value is None or value.requires_grad else value.detach().requires_grad_()
            for value in (factor, offset)
        )
        y = normalize.train(
            xp,
            x.to(dtype),
            plan,
            static.epsilon,
            gamma=factor,
            beta=offset,
            correction=None if correction is None else (correction[0], correction[1]),
            weights=weights,
            masked="zero",
            merge=self.merge,
        ).y
        given = (x if x.requires_grad else None, factor, offset)
        inputs = [value for value in given if value is not None]
        found = iter(torch.autograd.grad(y, inputs, dy.to(dtype), create_graph=True))
        return [None if value is None else next(found) for value in given]


def replicas(x: Tensor, synchronized: bool, group: Any) -> Replicas | None:
    """The replicas that statistics are merged over; None where there is nothing to merge with, as without a group."""
    if not (synchronized and distributed.is_available() and distributed.is_initialized()):
        return None
    if distributed.get_world_size(group) < 2:
        return None
    if not torch.compiler.is_compiling():
        checks.engine(x, distributed.get_backend_config(group))
    elif not COMPILES:
        raise NotImplementedError(
            f"synchronized=True needs PyTorch 2.13 or later within torch.compile; received {torch.__version__}. Put "
            f"torch.compiler.disable around the layer."
        )
    return Replicas(group)


def _check_several(x: Tensor, totals: Tensor, masked: bool) -> None:
    """Raise for single values, on all replicas alike. Elsewhere looking at the count would break a graph, or wait."""
    if not masked and x.is_cpu and layout.is_eager() and float(totals[0].detach()) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()} and no other value in "
            f"the process group"
        )


def _sum(x: Tensor, group: Any) -> Tensor:
    """Sum over replicas; its gradient is the same sum, and so is every further derivative."""
    kind: Any = _TransformedSum if layout.is_transformed() else _Sum
    total: Tensor = kind.apply(x, group)
    return total


class _Sum(Function):
    """A sum that graphs can hold.

    Compilers know that `all_reduce` has effects, and keep it where a replica has no use for its result: where it is
    empty. An operator of our own they would leave out there, and all others would wait.
    """

    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _sum(gradient, ctx.group), None


class _TransformedSum(_Sum):
    """The same with rules that compilers refuse."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Any:
        return _sum(tangent, ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, group: Any) -> Any:
        return _sum(x, group), in_dims[0]

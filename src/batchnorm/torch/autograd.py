"""The CPU kernels as differentiable functions, called eagerly: a registered operator costs three times as much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from batchnorm.core import normalize
from batchnorm.core.geometry import Geometry
from batchnorm.core.normalize import Pair

from . import cpu, layout
from . import namespace as xp
from .cpu import Averages, Limits, Replica, Static
from .layout import accumulation_dtype
from .synchronized import Replicas

__all__ = ["Call", "composed", "flat", "forward", "second_derivatives", "shaped"]


class Call(NamedTuple):
    """What a training step is told beside what may want gradients: in one object, for PyTorch looks at each argument.

    Attributes:
        static: The arguments that are not tensors.
        plan: The geometry.
        renorm: Renorm's averages, or None.
        limits: Those of its correction.
        weights: What each position counts, or None.
        averages: What is to be moved, or None.
        replicas: Who else has a part of the batch, or None.
    """

    static: Static
    plan: Geometry
    renorm: Pair | None
    limits: Limits | None
    weights: Tensor | None
    averages: Averages | None
    replicas: Replicas | None


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, adjustment: Pair | None, call: Call
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Normalize by the batch, or by that of all replicas, and move the averages, if they are given.

    Returns:
        The output, the means and variances, [2][groups][parameters], what counts in each group, [2][groups], where that
        may differ, and whether an average has moved.
    """
    results: list[Any] = []  # what the graph need not know
    scale, shift = adjustment or (None, None)
    y: Tensor = _Forward.apply(x, weight, bias, scale, shift, call, results)  # type: ignore[no-untyped-call]
    return y, *results


def flat(x: Tensor, plan: Geometry, adjustment: Pair | None) -> Pair | None:
    """An adjustment by feature as the kernels want it."""
    if adjustment is None:
        return None
    dtype = accumulation_dtype(x.dtype)
    scale, shift = (value if value.dtype == dtype else value.to(dtype) for value in adjustment)
    pair: Pair = normalize.by_feature(xp, plan, (scale, shift))
    return pair


class _Forward(Function):
    """The kernels and folding, differentiated by hand: PyTorch's own derivatives take longer than a small batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        weight, bias, scale, shift, call, results = arguments
        static, ctx.plan, renorm, limits, weights, averages, ctx.replicas = call
        pair = flat(x, ctx.plan, None if scale is None else (scale, shift))
        factor, offset = normalize.fold(xp, weight, bias, pair)
        totals = None if ctx.replicas is None else ctx.replicas.totals(x, weights, static)
        y, moments, correction, counts, moved = cpu.forward(
            x, factor, offset, renorm, weights, limits, static, averages, totals
        )
        results += (moments, counts, moved)
        ctx.static, ctx.folded = static, None if pair is None else (pair, factor, offset)
        # Of the bias only that it is there matters, and its shape: it may change before a gradient is asked for.
        shape_of_bias = None if bias is None else bias.data
        ctx.save_for_backward(x, weight, shape_of_bias, scale, shift, moments, correction, weights, counts)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 7
        x, weight, bias, scale, shift, moments, correction, weights, counts = ctx.saved_tensors
        further = torch.is_grad_enabled()
        if ctx.folded is None:
            pair, factor, offset = None, weight, bias
        elif further:  # differentiable, too
            pair = flat(x, ctx.plan, (scale, shift))
            factor, offset = normalize.fold(xp, weight, bias, pair)
        else:
            pair, factor, offset = ctx.folded
        plain = cpu.is_plain(dy) and not layout.is_batched(dy)
        if ctx.replicas is not None:
            if further or not plain:
                dx, dfactor, doffset = ctx.replicas.differentiate_further(
                    dy, x, factor, offset, correction, weights, ctx.static
                )
            else:
                replica = Replica(x, factor, moments, correction, weights, counts, ctx.static)
                wanted = ctx.needs_input_grad[0], factor is not None, offset is not None
                dx, dfactor, doffset = ctx.replicas.differentiate(replica, dy, wanted)
        elif plain:
            differentiate: Any = _Backward.apply if further else cpu.backward
            dx, dfactor, doffset = differentiate(
                dy, x, factor, offset, moments, correction, weights, counts, ctx.static
            )
        else:  # many gradients at once, or a tensor of another kind
            dx, dfactor, doffset = composed(ctx.static, dy, x, factor, offset, correction, weights)
        dscale = dshift = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            shapes = scale.shape, shift.shape
            dscale, dshift = normalize.adjustment_gradient(xp, ctx.plan, dfactor, doffset, weight, shapes)
        dweight, dbias = normalize.fold_gradient(dfactor, doffset, weight, pair)
        return (
            dx, shaped(dweight, weight), shaped(dbias, bias), shaped(dscale, scale), shaped(dshift, shift),
            None, None,
        )  # fmt: skip


class _Backward(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        dy, x, factor, offset, _, correction, weights, _, ctx.static = arguments
        ctx.save_for_backward(dy, x, factor, offset, correction, weights)
        ctx.set_materialize_grads(False)
        return cpu.backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        return (*second_derivatives(ctx.static, upstream, *ctx.saved_tensors), *(None,) * 5)


def shaped(gradient: Tensor | None, value: Tensor | None) -> Tensor | None:
    """A gradient of the shape and type of what it belongs to."""
    if gradient is None or value is None:
        return None
    if gradient.shape != value.shape:
        gradient = gradient.reshape(value.shape)
    return gradient if gradient.dtype == value.dtype else gradient.to(value.dtype)


def composed(
    static: Static,
    dy: Tensor,
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    correction: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `cpu.backward` computes, of PyTorch's own operations, which have derivatives and know batched tensors."""
    plan = layout.plan(x, static.axes, static.virtual_batch_size)
    dtype = accumulation_dtype(x.dtype)
    masked = "zero" if static.zeroed else "normalized"
    given: Any = {"gamma": factor, "beta": offset, "weights": weights, "masked": masked}
    corrected = None if correction is None or not correction.numel() else (correction[0], correction[1])
    trained = normalize.train(xp, x.to(dtype), plan, static.epsilon, correction=corrected, **given)
    found = normalize.train_gradient(xp, dy.to(dtype), trained, plan, static.epsilon, **given)
    dfactor, doffset = (None if value is None else value.reshape(-1) for value in (found.gamma, found.beta))
    return found.x.to(x.dtype), dfactor, doffset


def second_derivatives(
    static: Static,
    upstream: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    correction: Tensor | None,
    weights: Tensor | None,
) -> list[Tensor | None]:
    """Differentiate `composed`, for dy, x, factor and offset.

    Moments are the functions of x that they are, so nothing is left for them as inputs.
    """
    inputs = (dy, x, factor, offset)
    wanted = [None if value is None else by for value, by in zip((x, factor, offset), upstream, strict=True)]
    if all(by is None for by in wanted):
        return [None] * len(inputs)

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        dy, x, factor, offset = (None if value is None else next(given) for value in inputs)
        found = composed(static, dy, x, factor, offset, correction, weights)  # type: ignore[arg-type]  # the first two are there
        return tuple(
            value.reshape(by.shape).to(by.dtype)
            for value, by in zip(found, wanted, strict=True)
            if value is not None and by is not None
        )

    differentiate: Any = torch.func.vjp(gradients, *(value for value in inputs if value is not None))[1]
    second = iter(differentiate(tuple(by for by in wanted if by is not None)))
    return [None if value is None else next(second) for value in inputs]

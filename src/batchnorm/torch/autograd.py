"""The CPU kernels as differentiable functions, called eagerly: a registered operator costs three times as much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from batchnorm.core import normalize
from batchnorm.core.geometry import Geometry
from batchnorm.core.normalize import Pair

from . import cpu, layout
from . import namespace as xp
from .cpu import Averages, Static
from .layout import wide

__all__ = ["flat", "forward", "second_derivatives", "shaped"]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adjustment: Pair | None,
    renorm: Pair | None,
    limits: tuple[float, float, float] | None,
    static: Static,
    plan: Geometry,
    averages: Averages | None,
) -> tuple[Tensor, Tensor]:
    """Normalize by the batch, and move the averages, if they are given as the kernels take them.

    Returns:
        The output, and the means and variances, [2][groups][parameters].
    """
    moments: list[Tensor] = []
    y: Tensor = _Forward.apply(  # type: ignore[no-untyped-call]
        x,
        weight,
        bias,
        *(adjustment or (None, None)),
        *(renorm or (None, None)),
        limits,
        static,
        plan,
        averages,
        moments,
    )
    return y, moments[0]


def flat(x: Tensor, plan: Geometry, adjustment: Pair | None) -> Pair | None:
    """An adjustment by feature as the kernels want it."""
    if adjustment is None:
        return None
    dtype = wide(x)
    scale, shift = (value if value.dtype == dtype else value.to(dtype) for value in adjustment)
    pair: Pair = normalize.by_feature(xp, plan, (scale, shift))
    return pair


class _Forward(Function):
    """The kernels and folding, differentiated by hand: PyTorch's own derivatives take longer than a small batch."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, scale, shift, renorm_mean, renorm_stddev, limits, static, ctx.plan, averages, out = arguments
        pair = flat(x, ctx.plan, None if scale is None else (scale, shift))
        factor, offset = normalize.fold(xp, weight, bias, pair)
        y, moments, correction = cpu.forward(x, factor, offset, renorm_mean, renorm_stddev, limits, static, averages)
        out.append(moments)  # and not a second output, of which the graph would have to know
        ctx.static, ctx.folded = static, None if pair is None else (pair, factor, offset)
        ctx.save_for_backward(x, weight, bias, scale, shift, moments, correction)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 12
        x, weight, bias, scale, shift, moments, correction = ctx.saved_tensors
        further = torch.is_grad_enabled()
        if ctx.folded is None:
            pair, factor, offset = None, weight, bias
        elif further:  # differentiable, too
            pair = flat(x, ctx.plan, (scale, shift))
            factor, offset = normalize.fold(xp, weight, bias, pair)
        else:
            pair, factor, offset = ctx.folded
        differentiate: Any = _Backward.apply if further else cpu.backward
        dx, dfactor, doffset = differentiate(dy, x, factor, offset, moments, correction, ctx.static)
        dscale = dshift = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            shapes = scale.shape, shift.shape
            dscale, dshift = normalize.adjustment_gradient(xp, ctx.plan, dfactor, doffset, weight, shapes)
        dweight, dbias = normalize.fold_gradient(xp, dfactor, doffset, weight, pair)
        return (
            dx, shaped(dweight, weight), shaped(dbias, bias), shaped(dscale, scale), shaped(dshift, shift),
            None, None, None, None, None, None, None,
        )  # fmt: skip


class _Backward(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        dy, x, factor, offset, _, correction, ctx.static = arguments
        ctx.save_for_backward(dy, x, factor, offset, correction)
        ctx.set_materialize_grads(False)
        return cpu.backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        return (*second_derivatives(ctx.static, upstream, *ctx.saved_tensors), None, None, None)


def shaped(gradient: Tensor | None, value: Tensor | None) -> Tensor | None:
    """A gradient of the shape and type of what it belongs to."""
    if gradient is None or value is None:
        return None
    if gradient.shape != value.shape:
        gradient = gradient.reshape(value.shape)
    return gradient if gradient.dtype == value.dtype else gradient.to(value.dtype)


def second_derivatives(
    static: Static,
    upstream: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    correction: Tensor | None,
) -> list[Tensor | None]:
    """Differentiate the composed layer twice, for dy, x, factor and offset.

    Moments are the functions of x that they are, so nothing is left for them as inputs.
    """
    further = torch.is_grad_enabled()

    def placed(value: Tensor | None) -> Tensor | None:
        """The same with a place of its own in the graph, so that dy's part in x is not counted as x's."""
        if value is None or not (further and value.requires_grad):
            return None if value is None else value.detach().requires_grad_()
        return value.view_as(value)

    with torch.enable_grad():
        inputs = [placed(value) for value in (dy, x, factor, offset)]
        dy, x, factor, offset = inputs  # type: ignore[assignment]
        trained = normalize.train(
            xp,
            x.to(wide(x)),
            layout.plan(x, static.axes, static.virtual_batch_size),
            static.epsilon,
            gamma=factor,
            beta=offset,
            correction=None if correction is None or not correction.numel() else (correction[0], correction[1]),
        )
        sources = [value for value in (x, factor, offset) if value is not None]
        weights = [by for value, by in zip((x, factor, offset), upstream, strict=True) if value is not None]
        first = torch.autograd.grad(trained.y.to(x.dtype), sources, dy, create_graph=True)
        pairs = [
            (value, by) for value, by in zip(first, weights, strict=True) if by is not None and value.requires_grad
        ]
        second = iter(
            torch.autograd.grad(
                [value for value, _ in pairs],
                [value for value in inputs if value is not None],
                [by.to(value.dtype).reshape(value.shape) for value, by in pairs],
                create_graph=further,
                allow_unused=True,
            )
        )
    return [None if value is None else next(second) for value in inputs]

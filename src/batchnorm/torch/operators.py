"""The CPU kernels as the operators `batchnorm::forward` and `batchnorm::backward`, which compiled graphs hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.core import geometry
from batchnorm.core.geometry import View
from batchnorm.core.normalize import Renorm

from . import autograd, checks, cpu, layout
from .autograd import shaped
from .cpu import Static
from .layout import accumulation_dtype

__all__ = ["forward"]


def forward(
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    renorm: Renorm | None,
    weights: Tensor | None,
    static: Static,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalize by the batch.

    Returns:
        The output, the means and variances, [2][groups][parameters], and what counts in each group, [2][groups], where
        that may differ.
    """
    mean = stddev = limits = None
    if renorm is not None:
        mean, stddev, clipping = renorm
        numbers = (torch.as_tensor(limit, dtype=torch.float64, device=x.device) for limit in clipping.limits)
        limits = torch.stack(list(numbers))
    y, moments, _, counts = torch.ops.batchnorm.forward(x, factor, offset, mean, stddev, limits, weights, *static)
    return y, moments, None if weights is None and static.virtual_batch_size is None else counts


@torch.library.custom_op("batchnorm::forward", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    renorm_mean: Tensor | None,
    renorm_stddev: Tensor | None,
    limits: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    axes: Sequence[int],
    virtual_batch_size: int | None,
    zeroed: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    static, view = _checked(x, Static(epsilon, tuple(axes), virtual_batch_size, zeroed))
    weights = _weights(weights, x, static)
    if (renorm_mean is None) != (renorm_stddev is None):
        raise ValueError("renorm_mean and renorm_stddev must be given together.")
    if limits is not None and limits.shape != (3,):
        raise ValueError(f"limits must have 3 elements; received shape {tuple(limits.shape)}.")
    cpu.check(x, view, factor=factor, offset=offset, renorm_mean=renorm_mean, renorm_stddev=renorm_stddev)
    renorm = None if renorm_mean is None or renorm_stddev is None else (renorm_mean, renorm_stddev)
    y, moments, correction, counts, _ = cpu.forward(
        x, factor, offset, renorm, weights,
        None if limits is None else tuple(limits.tolist()), static,
    )  # fmt: skip
    correction, counts = (
        moments.new_empty((2, 0), dtype=accumulation_dtype(x.dtype)) if value is None else value
        for value in (correction, counts)
    )
    return y, moments, correction, counts


@_forward.register_fake
def _(
    x: Tensor, factor: Any, offset: Any, renorm_mean: Any, renorm_stddev: Any, limits: Any, weights: Any,
    epsilon: float, axes: Sequence[int], virtual_batch_size: int | None, zeroed: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, parameters = accumulation_dtype(x.dtype), _parameters(x, axes)
    groups = 1 if virtual_batch_size is None else -(-x.shape[0] // virtual_batch_size)
    counted = weights is not None or virtual_batch_size is not None
    return (
        _empty_like(x, axes),
        x.new_empty((2, groups, parameters), dtype=torch.float64),
        x.new_empty((2, 0 if renorm_mean is None else parameters), dtype=dtype),
        x.new_empty((2, groups if counted else 0), dtype=dtype),
    )


@torch.library.custom_op("batchnorm::backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    moments: Tensor,
    correction: Tensor,
    weights: Tensor | None,
    counts: Tensor | None,
    epsilon: float,
    axes: Sequence[int],
    virtual_batch_size: int | None,
    zeroed: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    static, view = _checked(x, Static(epsilon, tuple(axes), virtual_batch_size, zeroed))
    weights = _weights(weights, x, static)
    counted = None if counts is None or not counts.numel() else counts.contiguous()
    corrected = correction.contiguous() if correction.numel() else None
    cpu.check(x, view, dy=dy, factor=factor, offset=offset, moments=moments, correction=corrected, counts=counted)
    if weights is not None and counted is None:
        raise ValueError("counts must be given with weights.")
    dx, dfactor, doffset = cpu.backward(
        dy, x, factor, offset, moments.to(torch.float64).contiguous(), corrected, weights, counted, static
    )
    dfactor, doffset = (
        moments.new_empty(0, dtype=accumulation_dtype(x.dtype)) if gradient is None else gradient
        for gradient in (dfactor, doffset)
    )
    return dx, dfactor, doffset


@_backward.register_fake
def _(
    dy: Any, x: Tensor, factor: Any, offset: Any, moments: Any, correction: Any, weights: Any, counts: Any,
    epsilon: float, axes: Sequence[int], virtual_batch_size: int | None, zeroed: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = _parameters(x, axes)
    return (
        _empty_like(x, axes),
        *(
            x.new_empty((0 if value is None else parameters,), dtype=accumulation_dtype(x.dtype))
            for value in (factor, offset)
        ),
    )


def _checked(x: Tensor, static: Static) -> tuple[Static, View]:
    """Check what tells how an input is seen; anyone may call an operator."""
    if x.dtype not in cpu.TYPES:
        raise TypeError(f"x must be of a type among {sorted(map(str, cpu.TYPES))}; received {x.dtype}.")
    size = static.virtual_batch_size
    if size is not None and size < 1:
        raise ValueError(f"virtual_batch_size must be None or at least 1; received {size}.")
    static = static._replace(axes=geometry.counted_axes(static.axes, x.shape))
    return static, layout.kernel(x, static.axes, static.virtual_batch_size, static.epsilon)[1]


def _weights(weights: Tensor | None, x: Tensor, static: Static) -> Tensor | None:
    if weights is None:
        return None
    return checks.weights(weights, x, layout.plan(x, static.axes, static.virtual_batch_size))


def _parameters(x: Tensor, axes: Sequence[int]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


def _empty_like(x: Tensor, axes: Sequence[int]) -> Tensor:
    kept = layout.is_kept(x, tuple(axes))
    return torch.empty_like(x) if kept else torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- Derivatives.


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, factor, offset, _, _, _, weights, *ctx.static = inputs
    _, moments, correction, counts = output
    ctx.save_for_backward(x, factor, offset, moments, correction, weights, counts)
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
    if dy is None:
        return (None,) * 11
    tensors = ctx.saved_tensors
    dx, dfactor, doffset = torch.ops.batchnorm.backward(dy, *tensors, *ctx.static)
    _, factor, offset, *_ = tensors
    return (dx, shaped(dfactor, factor), shaped(doffset, offset), *(None,) * 8)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, factor, offset, _, correction, weights, _, *ctx.static = inputs
    ctx.save_for_backward(dy, x, factor, offset, correction, weights)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *upstream: Tensor | None) -> Any:
    epsilon, axes, *rest = ctx.static
    static = Static(epsilon, tuple(axes), *rest)
    return (*autograd.second_derivatives(static, upstream, *ctx.saved_tensors), *(None,) * 8)


_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)

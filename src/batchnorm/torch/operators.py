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

from . import autograd, cpu, layout
from .autograd import shaped
from .cpu import Static
from .layout import wide

__all__ = ["forward"]


def forward(
    x: Tensor, factor: Tensor | None, offset: Tensor | None, renorm: Renorm | None, static: Static
) -> tuple[Tensor, Tensor]:
    """Normalize by the batch; also return the means and variances, [2][groups][parameters]."""
    mean = stddev = limits = None
    if renorm is not None:
        mean, stddev, clipping = renorm
        numbers = (torch.as_tensor(limit, dtype=torch.float64, device=x.device) for limit in clipping.limits)
        limits = torch.stack(list(numbers))
    y, moments, _ = torch.ops.batchnorm.forward(x, factor, offset, mean, stddev, limits, *static)
    return y, moments


@torch.library.custom_op("batchnorm::forward", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    renorm_mean: Tensor | None,
    renorm_stddev: Tensor | None,
    limits: Tensor | None,
    epsilon: float,
    axes: Sequence[int],
    virtual_batch_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    static, view = _seen(x, epsilon, axes, virtual_batch_size)
    if (renorm_mean is None) != (renorm_stddev is None):
        raise ValueError("renorm_mean and renorm_stddev must be given together.")
    if limits is not None and limits.shape != (3,):
        raise ValueError(f"limits must have 3 elements; received shape {tuple(limits.shape)}.")
    cpu.check(x, view, factor=factor, offset=offset, renorm_mean=renorm_mean, renorm_stddev=renorm_stddev)
    y, moments, correction = cpu.forward(
        x, factor, offset, renorm_mean, renorm_stddev, None if limits is None else tuple(limits.tolist()), static
    )
    return y, moments, moments.new_empty((2, 0)) if correction is None else correction


@_forward.register_fake
def _(
    x: Tensor, factor: Any, offset: Any, renorm_mean: Any, renorm_stddev: Any, limits: Any, epsilon: float,
    axes: Sequence[int], virtual_batch_size: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, parameters = wide(x), _parameters(x, axes)
    groups = 1 if virtual_batch_size is None else x.shape[0] // virtual_batch_size
    return (
        _empty_like(x, axes),
        x.new_empty((2, groups, parameters), dtype=dtype),
        x.new_empty((2, 0 if renorm_mean is None else parameters), dtype=dtype),
    )


@torch.library.custom_op("batchnorm::backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    moments: Tensor,
    correction: Tensor,
    epsilon: float,
    axes: Sequence[int],
    virtual_batch_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    static, view = _seen(x, epsilon, axes, virtual_batch_size)
    corrected = correction.contiguous() if correction.numel() else None
    cpu.check(x, view, dy=dy, factor=factor, offset=offset, moments=moments, correction=corrected)
    dx, dfactor, doffset = cpu.backward(dy, x, factor, offset, moments.contiguous(), corrected, static)
    dfactor, doffset = (moments.new_empty(0) if gradient is None else gradient for gradient in (dfactor, doffset))
    return dx, dfactor, doffset


@_backward.register_fake
def _(
    dy: Any, x: Tensor, factor: Any, offset: Any, moments: Any, correction: Any, epsilon: float, axes: Sequence[int],
    virtual_batch_size: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = _parameters(x, axes)
    return (
        _empty_like(x, axes),
        *(x.new_empty((0 if value is None else parameters,), dtype=wide(x)) for value in (factor, offset)),
    )


def _seen(x: Tensor, epsilon: float, axes: Sequence[int], virtual_batch_size: int | None) -> tuple[Static, View]:
    """Check what tells how an input is seen; anyone may call an operator."""
    if x.dtype not in cpu.TYPES:
        raise TypeError(f"x must be of a type among {sorted(map(str, cpu.TYPES))}; received {x.dtype}.")
    if virtual_batch_size is not None and virtual_batch_size < 1:
        raise ValueError(f"virtual_batch_size must be None or at least 1; received {virtual_batch_size}.")
    static = Static(epsilon, geometry.counted_axes(tuple(axes), x.shape), virtual_batch_size)
    return static, layout.kernel(x, static.axes, virtual_batch_size, epsilon)[1]


def _parameters(x: Tensor, axes: Sequence[int]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


def _empty_like(x: Tensor, axes: Sequence[int]) -> Tensor:
    kept = layout.is_kept(x, tuple(axes))
    return torch.empty_like(x) if kept else torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- Derivatives.


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, factor, offset, _, _, _, *ctx.static = inputs
    ctx.save_for_backward(x, factor, offset, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
    if dy is None:
        return (None,) * 9
    tensors = ctx.saved_tensors
    dx, dfactor, doffset = torch.ops.batchnorm.backward(dy, *tensors, *ctx.static)
    _, factor, offset, *_ = tensors
    return (dx, shaped(dfactor, factor), shaped(doffset, offset), *(None,) * 6)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, factor, offset, _, correction, *ctx.static = inputs
    ctx.save_for_backward(dy, x, factor, offset, correction)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *upstream: Tensor | None) -> Any:
    epsilon, axes, virtual_batch_size = ctx.static
    static = Static(epsilon, tuple(axes), virtual_batch_size)
    return (*autograd.second_derivatives(static, upstream, *ctx.saved_tensors), *(None,) * 5)


_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)

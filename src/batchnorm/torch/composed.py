"""Normalization of PyTorch's own operations: any device, any derivative, any transformation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.core import algebra, geometry, kernels
from batchnorm.core.algebra import Correction, Moments
from batchnorm.core.geometry import Geometry
from batchnorm.core.options import Clipping

from . import namespace as xp

__all__ = ["Pair", "evaluate", "memory_format", "plan", "train", "wide"]

Pair = tuple[Tensor, Tensor]


def plan(x: Tensor, axes: tuple[int, ...], virtual_batch_size: int | None) -> Geometry:
    """Work out the geometry, without the cache where it would be traced into a graph."""
    known = not torch.compiler.is_compiling() and all(type(size) is int for size in x.shape)
    make = geometry.plan if known else geometry.plan.__wrapped__
    seen: Geometry = make(tuple(x.shape), axes, virtual_batch_size)
    return seen


def wide(x: Tensor) -> torch.dtype:
    """Name the type of statistics: float32 or wider."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def train(
    x: Tensor,
    seen: Geometry,
    epsilon: float,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    adjustment: Pair | None = None,
    renorm: Pair | None = None,
    clipping: Clipping | None = None,
    correction: Pair | None = None,
) -> tuple[Tensor, Moments]:
    """Normalize by the batch; also return the moments that averages move to, of the shape of the parameters.

    Either `renorm`'s mean and standard deviation are given, or the `correction` that they once gave, or neither.
    """
    dtype, shape = wide(x), seen.view_shape
    view = x.reshape(seen.split(x.shape)).to(dtype)

    def parameter(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype).reshape(shape)

    axes = seen.reduced_axes
    moments = kernels.moments(xp, view, axes, seen.count(view.shape), kernels.origin(xp, view.detach(), axes))
    group_axis = seen.group_axis
    averaged = algebra.average_groups(xp, moments, group_axis, None if group_axis is None else view.shape[group_axis])
    averaged = Moments(*(moment.detach() for moment in averaged))
    corrected = None
    if renorm is not None:
        mean, stddev = (value.detach().to(dtype).reshape(shape) for value in renorm)
        given = clipping or Clipping()
        rmin, rmax, dmax = [
            value.to(dtype) if torch.is_tensor(value) else value for value in (given.rmin, given.rmax, given.dmax)
        ]
        limits = Clipping(rmin, rmax, dmax)
        corrected = algebra.correction(xp, averaged, mean, stddev, epsilon, limits)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            corrected = Correction(*[torch.ops.batchnorm.keep(value) for value in corrected])
    elif correction is not None:
        corrected = Correction(*(value.to(dtype).reshape(shape) for value in correction))
    y = _normalize(
        view,
        moments,
        epsilon,
        correction=corrected,
        adjustment=None if adjustment is None else _along(adjustment, x, seen, dtype),
        gamma=parameter(weight),
        beta=parameter(bias),
    )
    return y.reshape(x.shape).to(x.dtype), averaged


@torch.library.custom_op("batchnorm::keep", mutates_args=())
def _keep(value: Tensor) -> Tensor:
    """Copy r or d, which compilers must not compute again for the backward pass: the averages have moved by then."""
    return value.clone()


@_keep.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


def _normalize(view: Tensor, moments: Moments, epsilon: float, **options: Any) -> Tensor:
    """Apply the affine map to distances from the mean, and not from 0.

    The gradient of the scale would lose digits where the mean is large.
    """
    centered = Moments(torch.zeros_like(moments.mean), moments.variance)
    y: Tensor = kernels.scale_shift(view - moments.mean, algebra.affine(xp, centered, epsilon, **options))
    return y


def evaluate(
    x: Tensor, seen: Geometry, epsilon: float, statistics: Moments, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Normalize by given statistics."""
    dtype, shape = wide(x), seen.input_shape
    mean, variance, gamma, beta = (
        None if value is None else value.to(dtype).reshape(shape) for value in (*statistics, weight, bias)
    )
    y: Tensor = _normalize(x.to(dtype), Moments(mean, variance), epsilon, gamma=gamma, beta=beta).to(x.dtype)
    return y


def memory_format(x: Tensor) -> torch.memory_format:
    """Say what PyTorch's own layer makes of an input: channels last if its strides are like that, even with gaps."""
    order = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}.get(x.dim())
    if order is None or x.is_contiguous() or x.stride(1) == 0 or x.numel() == 0:
        return torch.contiguous_format
    least = 0
    for axis in order:
        stride = x.stride(axis)
        if stride < least or (axis == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = stride * max(x.shape[axis], 1)
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def _along(adjustment: Pair, x: Tensor, seen: Geometry, dtype: torch.dtype) -> Pair:
    """An adjustment beside the view; with virtual batches it has one value for each feature."""
    if seen.virtual_batch_size is not None:
        scale, bias = (value.to(dtype).expand(seen.input_shape).reshape(seen.view_shape) for value in adjustment)
    else:
        scale, bias = (value.to(dtype) for value in adjustment)
    return scale, bias

"""The native kernels as operators of PyTorch, `batchnorm::forward` and `batchnorm::backward`, for CPUs.

Called eagerly they go straight to the kernels through addresses; what is compiled, exported or traced holds the
operators.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

import batchnorm.native as native
from batchnorm.core import geometry
from batchnorm.core.geometry import Canonical
from batchnorm.core.options import Clipping

from . import composed
from .composed import Pair, wide

__all__ = ["forward", "serves", "track"]

TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""The kernels' numbers of the types."""

Optional = Tensor | None
Limits = tuple[float, float, float]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def serves(x: Tensor, axes: tuple[int, ...], virtual_batch_size: int | None) -> bool:
    """Tell whether the operators can compute a training step.

    They are for CPUs and know neither forward-mode differentiation nor the transformations of `torch.func`.
    """
    runs = 1 + sum(after - before > 1 for before, after in itertools.pairwise(axes))
    return (
        native.library is not None
        and x.device.type == "cpu"
        and x.dtype in TYPES
        and runs <= (2 if virtual_batch_size is None else 1)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and (_is_plain(x) or _is_traced())
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def forward(
    x: Tensor,
    axes: tuple[int, ...],
    virtual_batch_size: int | None,
    epsilon: float,
    *,
    weight: Optional = None,
    bias: Optional = None,
    adjustment: Pair | None = None,
    renorm: Pair | None = None,
    clipping: Clipping | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by the batch; also return the mean and variance of each group, [groups][parameters]."""
    mean, stddev = renorm or (None, None)
    scale, shift = adjustment or (None, None)
    if _is_traced():
        limits = None if renorm is None else _tensor(clipping or Clipping(), x.device)
        y, m, v, _, _ = torch.ops.batchnorm.forward(
            x, weight, bias, scale, shift, mean, stddev, limits, epsilon, axes, virtual_batch_size
        )
    else:
        numbers = _numbers(clipping or Clipping())
        y, m, v = _Forward.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, scale, shift, mean, stddev, numbers, epsilon, axes, virtual_batch_size
        )
    return y, m, v


def track(
    mean: Tensor, variance: Tensor, running: tuple[Optional, Optional], momentum: float | Tensor, bessel: float,
    epsilon: float, renorm: Pair | None, renorm_momentum: float,
) -> bool:  # fmt: skip
    """Move the averages after `forward` where the kernels can, and tell whether they could.

    One call instead of a dozen operators, of which each takes as long as a small batch.
    """
    averages = (*running, *(renorm or (None, None)))
    if native.library is None or torch.is_tensor(momentum) or _is_traced():
        return False
    for average in averages:
        if average is not None and not (average.dtype == mean.dtype and average.is_contiguous() and _is_plain(average)):
            return False
    running_mean, running_var, renorm_mean, renorm_stddev = map(_at, averages)
    groups, parameters = mean.shape
    wide = mean.dtype == torch.float64
    native.library.track_at(
        parameters, groups, wide, mean.data_ptr(), variance.data_ptr(), running_mean, running_var, momentum,
        bessel, epsilon, renorm_mean, renorm_stddev, renorm_momentum,
    )  # fmt: skip
    return True


UNLIMITED = (-math.inf, math.inf, math.inf)


def _filled(clipping: Clipping) -> list[Any]:
    given = (clipping.rmin, clipping.rmax, clipping.dmax)
    return [least if limit is None else limit for limit, least in zip(given, UNLIMITED, strict=True)]


def _numbers(clipping: Clipping) -> Limits:
    rmin, rmax, dmax = (float(limit) for limit in _filled(clipping))
    return rmin, rmax, dmax


def _tensor(clipping: Clipping, device: torch.device) -> Tensor:
    return torch.stack(
        [
            limit.to(torch.float64)
            if torch.is_tensor(limit)
            else torch.tensor(limit, dtype=torch.float64, device=device)
            for limit in _filled(clipping)
        ]
    )


# ---- How the kernels see a tensor.


@functools.lru_cache(maxsize=1024)
def _canonical(shape: tuple[int, ...], axes: tuple[int, ...], virtual_batch_size: int | None) -> Canonical:
    view = geometry.plan(shape, axes, virtual_batch_size).canonical(shape)
    if view is None:
        raise ValueError(f"axis must be of two runs of axes at most; received {axes} and shape {shape}.")
    return view


def _seen(x: Tensor, axes: tuple[int, ...], virtual_batch_size: int | None) -> tuple[Tensor, Canonical]:
    """Lay a tensor out as the kernels can see it: channels last stays so."""
    if not x.is_contiguous():
        if axes == (1,) and _is_channels_last(x):
            n, channels, *rest = x.shape
            return x, _canonical((n, *rest, channels), (x.ndim - 1,), virtual_batch_size)
        x = x.contiguous()
    return x, _canonical(x.shape, axes, virtual_batch_size)


def _is_channels_last(x: Tensor) -> bool:
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.ndim == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return x.ndim == 3 and x.mT.is_contiguous()


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Lay `values` out as `x` is."""
    return values if values.stride() == x.stride() else torch.empty_like(x).copy_(values)


def _at(value: Optional) -> int:
    return 0 if value is None else value.data_ptr()


def _kept(value: Optional, dtype: torch.dtype) -> Optional:
    return value if value is None or (value.dtype == dtype and value.is_contiguous()) else value.to(dtype).contiguous()


# ---- The computations.


def _compute_forward(
    x: Tensor, weight: Optional, bias: Optional, scale: Optional, shift: Optional, renorm_mean: Optional,
    renorm_stddev: Optional, limits: Limits, epsilon: float, axes: tuple[int, ...], virtual_batch_size: int | None,
) -> Gradients:  # fmt: skip
    assert native.library is not None
    dtype = wide(x)
    x, view = _seen(x, axes, virtual_batch_size)
    y = torch.empty_like(x)
    statistics = torch.empty((2, 1 if view.own else view.groups, view.parameters), dtype=dtype)
    correction = torch.empty((2, 0 if renorm_mean is None else view.parameters), dtype=dtype)
    mean, variance = statistics.unbind()
    r, d = correction.unbind()
    given = [_kept(value, dtype) for value in (weight, bias, scale, shift, renorm_mean, renorm_stddev)]
    native.library.forward_at(
        *view, TYPES[x.dtype], dtype == torch.float64, x.data_ptr(), y.data_ptr(), epsilon, *map(_at, given), *limits,
        mean.data_ptr(), variance.data_ptr(), r.data_ptr(), d.data_ptr(),
    )  # fmt: skip
    return y, mean, variance, r, d


def _compute_backward(
    dy: Tensor, x: Tensor, weight: Optional, bias: Optional, scale: Optional, shift: Optional, mean: Tensor,
    variance: Tensor, r: Tensor, d: Tensor, epsilon: float, axes: tuple[int, ...], virtual_batch_size: int | None,
) -> Gradients:  # fmt: skip
    assert native.library is not None
    dtype = wide(x)
    x, view = _seen(x, axes, virtual_batch_size)
    dy = _like(dy, x)
    dx = torch.empty_like(x)
    parameters = torch.empty((4, view.parameters), dtype=dtype)
    dweight, dbias, dscale, dshift = (
        torch.empty(0, dtype=dtype) if value is None else gradient
        for value, gradient in zip((weight, bias, scale, shift), parameters.unbind(), strict=True)
    )
    corrected = r.numel() > 0
    given = [
        _kept(value, dtype) for value in (weight, r if corrected else None, d if corrected else None, scale, shift)
    ]
    native.library.backward_at(
        *view, TYPES[x.dtype], dtype == torch.float64, x.data_ptr(), dy.data_ptr(), dx.data_ptr(), epsilon,
        mean.data_ptr(), variance.data_ptr(), *map(_at, given),
        *(gradient.data_ptr() if gradient.numel() else 0 for gradient in (dweight, dbias, dscale, dshift)),
    )  # fmt: skip
    return dx, dweight, dbias, dscale, dshift


def _compute_second(
    upstream: Sequence[Optional], dy: Tensor, x: Tensor, weight: Optional, bias: Optional, scale: Optional,
    shift: Optional, r: Tensor, d: Tensor, epsilon: float, axes: tuple[int, ...], virtual_batch_size: int | None,
) -> list[Optional]:  # fmt: skip
    """Differentiate the composed path twice, for dy, x, weight, bias, scale and shift.

    Moments are the functions of x that they are, so nothing is left for them as inputs.
    """
    with torch.enable_grad():
        inputs = [
            None if value is None else value.detach().requires_grad_() for value in (dy, x, weight, bias, scale, shift)
        ]
        dy, x, weight, bias, scale, shift = inputs  # type: ignore[assignment]
        seen = composed.plan(x, tuple(axes), virtual_batch_size)
        pair = None
        if scale is not None and shift is not None:
            pair = scale.reshape(seen.input_shape), shift.reshape(seen.input_shape)
        y, _ = composed.train(
            x, seen, epsilon, weight=weight, bias=bias, adjustment=pair, correction=(r, d) if r.numel() else None
        )
        sources = [value for value in (x, weight, bias, scale, shift) if value is not None]
        weights = [
            one for value, one in zip((x, weight, bias, scale, shift), upstream, strict=True) if value is not None
        ]
        first = torch.autograd.grad(y, sources, dy, create_graph=True)
        pairs = [(one, by) for one, by in zip(first, weights, strict=True) if by is not None and one.requires_grad]
        targets = [value for value in inputs if value is not None]
        second = iter(
            torch.autograd.grad(
                [one for one, _ in pairs], targets, [by.to(one.dtype).reshape(one.shape) for one, by in pairs],
                allow_unused=True,
            )
        )  # fmt: skip
    return [None if value is None else next(second) for value in inputs]


def _shaped(gradient: Tensor, value: Optional) -> Optional:
    return None if value is None else gradient.reshape(value.shape).to(value.dtype)


# ---- Eagerly.


class _Forward(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, scale, shift, _, _, _, *ctx.rest = arguments
        y, mean, variance, r, d = _compute_forward(*arguments)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, variance, r, d)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Optional, *_: Any) -> Any:
        nothing = (None,) * 6
        if dy is None:
            return (None,) * 11
        tensors = ctx.saved_tensors
        differentiate = _Backward.apply if torch.is_grad_enabled() else _compute_backward
        dx, *rest = differentiate(dy, *tensors, *ctx.rest)
        return (dx, *(_shaped(one, value) for one, value in zip(rest, tensors[1:5], strict=True)), *nothing)


class _Backward(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Gradients:
        dy, x, weight, bias, scale, shift, _, _, r, d, *ctx.rest = arguments
        ctx.save_for_backward(dy, x, weight, bias, scale, shift, r, d)
        ctx.set_materialize_grads(False)
        return _compute_backward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Optional) -> Any:
        return (*_compute_second(upstream, *ctx.saved_tensors, *ctx.rest), *(None,) * 7)


# ---- In graphs.


@torch.library.custom_op("batchnorm::forward", mutates_args=(), device_types="cpu")
def _forward_operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adjustment_scale: Tensor | None,
    adjustment_bias: Tensor | None,
    renorm_mean: Tensor | None,
    renorm_stddev: Tensor | None,
    limits: Tensor | None,
    epsilon: float,
    axes: Sequence[int],
    virtual_batch_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rmin, rmax, dmax = UNLIMITED if limits is None else limits.tolist()
    y, *rest = _compute_forward(
        x, weight, bias, adjustment_scale, adjustment_bias, renorm_mean, renorm_stddev, (rmin, rmax, dmax), epsilon,
        tuple(axes), virtual_batch_size,
    )  # fmt: skip
    mean, variance, r, d = (one.clone() for one in rest)  # of an operator, no output may lie in another's memory
    return y, mean, variance, r, d


def _like_seen(x: Tensor, axes: Sequence[int]) -> Tensor:
    keeps = x.is_contiguous() or (tuple(axes) == (1,) and _is_channels_last(x))
    return torch.empty_like(x) if keeps else torch.empty_like(x, memory_format=torch.contiguous_format)


@_forward_operator.register_fake
def _(
    x: Tensor, weight: Any, bias: Any, adjustment_scale: Any, adjustment_bias: Any, renorm_mean: Any,
    renorm_stddev: Any, limits: Any, epsilon: float, axes: Sequence[int], virtual_batch_size: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = wide(x)
    parameters = math.prod(x.shape[axis] for axis in axes)
    groups = 1 if virtual_batch_size is None else x.shape[0] // virtual_batch_size
    statistics = [x.new_empty((groups, parameters), dtype=dtype) for _ in range(2)]
    corrections = [x.new_empty((0 if renorm_mean is None else parameters,), dtype=dtype) for _ in range(2)]
    return (_like_seen(x, axes), *statistics, *corrections)


@torch.library.custom_op("batchnorm::backward", mutates_args=(), device_types="cpu")
def _backward_operator(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adjustment_scale: Tensor | None,
    adjustment_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    r: Tensor,
    d: Tensor,
    epsilon: float,
    axes: Sequence[int],
    virtual_batch_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, *rest = _compute_backward(
        dy, x, weight, bias, adjustment_scale, adjustment_bias, mean.contiguous(), variance.contiguous(),
        r.contiguous(), d.contiguous(), epsilon, tuple(axes), virtual_batch_size,
    )  # fmt: skip
    dweight, dbias, dscale, dshift = (one.clone() for one in rest)
    return dx, dweight, dbias, dscale, dshift


@_backward_operator.register_fake
def _(
    dy: Any, x: Tensor, weight: Any, bias: Any, adjustment_scale: Any, adjustment_bias: Any, mean: Any,
    variance: Any, r: Any, d: Any, epsilon: float, axes: Sequence[int], virtual_batch_size: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = math.prod(x.shape[axis] for axis in axes)
    given = (weight, bias, adjustment_scale, adjustment_bias)
    return (
        _like_seen(x, axes),
        *(x.new_empty((0 if value is None else parameters,), dtype=wide(x)) for value in given),
    )


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, scale, shift, _, _, _, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx: Any, dy: Optional, *_: Any) -> Any:
    if dy is None:
        return (None,) * 11
    tensors = ctx.saved_tensors
    dx, *rest = torch.ops.batchnorm.backward(dy, *tensors, *ctx.rest)
    return (dx, *(_shaped(one, value) for one, value in zip(rest, tensors[1:5], strict=True)), *(None,) * 6)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, bias, scale, shift, _, _, r, d, *ctx.rest = inputs
    ctx.save_for_backward(dy, x, weight, bias, scale, shift, r, d)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *upstream: Optional) -> Any:
    return (*_compute_second(upstream, *ctx.saved_tensors, *ctx.rest), *(None,) * 7)


_forward_operator.register_autograd(_differentiate_forward, setup_context=_save_forward)
_backward_operator.register_autograd(_differentiate_backward, setup_context=_save_backward)

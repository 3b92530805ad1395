"""The native kernels as operators of PyTorch, `batchnorm::forward` and `batchnorm::backward`, for CPUs.

Called eagerly they go straight to the kernels through addresses; what is compiled, exported or traced holds the
operators.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

import batchnorm.native as native
from batchnorm.core import geometry
from batchnorm.core.geometry import Canonical
from batchnorm.core.options import Clipping

from . import composed
from .composed import Pair, wide

__all__ = ["Averages", "How", "Mode", "forward", "is_traced", "mode", "serves", "takes"]

TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""The kernels' numbers of the types."""


def _share_threads() -> None:
    """Let the kernels use PyTorch's own threads, which spin while they wait, and would take the processors from others.

    Where its OpenMP is not found, they keep to theirs.
    """
    folder = pathlib.Path(torch.__file__).parent
    for path in sorted({*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")}):
        try:
            found = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError):  # not the one that is loaded
            continue
        if native.library is not None:
            native.library.use_openmp(ctypes.cast(found, ctypes.c_void_p).value)
        return


_share_threads()

Optional = Tensor | None
Limits = tuple[float, float, float]


class How(NamedTuple):
    """What is not a tensor."""

    epsilon: float
    axes: tuple[int, ...]
    virtual_batch_size: int | None


class Averages(NamedTuple):
    """What a training step moves besides renorm's own averages, and the weights of the new values.

    The variance moves to `bessel` times the batch's.
    """

    running: tuple[Optional, Optional]
    momentum: float
    bessel: float
    renorm_momentum: float


class Mode(NamedTuple):
    """What is at work besides PyTorch's own operators: tracing, and transformations."""

    traced: bool
    transformed: bool


def mode() -> Mode:
    """Look what is at work. Each question takes microseconds where a large batch has emptied the caches."""
    return Mode(is_traced(), is_transformed())


def takes(x: Tensor, shape: tuple[int, ...], values: Sequence[Optional]) -> bool:
    """Tell whether the kernels take parameters and statistics of this shape as they are."""
    dtype = wide(x)
    for value in values:
        if value is not None and not (
            value.dtype == dtype
            and value.shape == shape
            and value.is_cpu
            and value.is_contiguous()
            and _is_plain(value)
        ):
            return False
    return x.is_cpu and x.dtype in TYPES


def serves(x: Tensor, axes: tuple[int, ...], virtual_batch_size: int | None, mode: Mode) -> bool:
    """Tell whether the operators can compute a training step.

    They are for CPUs and know neither forward-mode differentiation nor the transformations of `torch.func`.
    """
    if len(axes) > 1:
        runs = 1 + sum(after - before > 1 for before, after in itertools.pairwise(axes))
        if runs > (2 if virtual_batch_size is None else 1):
            return False
    return (
        native.library is not None
        and x.is_cpu
        and x.dtype in TYPES
        and not mode.transformed
        and (mode.traced or _is_plain(x))
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def is_transformed() -> bool:
    """Tell whether forward-mode derivatives or `torch.func` are at work."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Tell whether what is called now goes into a graph, or to a mode that looks at every operator."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def forward(
    x: Tensor,
    how: How,
    traced: bool,
    *,
    weight: Optional = None,
    bias: Optional = None,
    adjustment: Pair | None = None,
    renorm: Pair | None = None,
    clipping: Clipping,
    averages: Averages | None = None,
) -> tuple[Tensor, Optional]:
    """Normalize by the batch, and move the averages, if they are given as the kernels take them.

    Returns:
        The output, and unless averages have been moved the means and variances, [2][groups][parameters].
    """
    mean, stddev = renorm or (None, None)
    scale, shift = adjustment or (None, None)
    if traced:
        limits = None if renorm is None else _tensor(clipping, x.device)
        y, moments, _ = torch.ops.batchnorm.forward(x, weight, bias, scale, shift, mean, stddev, limits, *how)
        return y, moments
    numbers = UNLIMITED if renorm is None else _numbers(clipping)
    kept: list[Tensor] = []
    y = _Forward.apply(x, weight, bias, scale, shift, mean, stddev, numbers, how, averages, kept)  # type: ignore[no-untyped-call]
    return y, (kept[0] if averages is None else None)


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
    """Lay a tensor out as the kernels can see it: with a single feature axis, channels last stays so."""
    if not x.is_contiguous():
        if len(axes) == 1 and _is_channels_last(x):
            n, channels, *rest = x.shape
            moved = (0, x.ndim - 1, *range(1, x.ndim - 1))[axes[0]]
            return x, _canonical((n, *rest, channels), (moved,), virtual_batch_size)
        x = x.contiguous()
    return x, _canonical(x.shape, axes, virtual_batch_size)


def _is_channels_last(x: Tensor) -> bool:
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.ndim == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return False


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Lay `values` out as `x` is."""
    return values if values.stride() == x.stride() else torch.empty_like(x).copy_(values)


def _at(value: Optional) -> int:
    return 0 if value is None else value.data_ptr()


def _halves(value: Optional) -> tuple[int, int]:
    """Addresses of both halves of a tensor."""
    if value is None:
        return 0, 0
    first = value.data_ptr()
    return first, first + value.nbytes // 2


def _kept(value: Optional, dtype: torch.dtype) -> Optional:
    return value if value is None or (value.dtype == dtype and value.is_contiguous()) else value.to(dtype).contiguous()


# ---- The computations.


def _compute_forward(
    x: Tensor, weight: Optional, bias: Optional, scale: Optional, shift: Optional, renorm_mean: Optional,
    renorm_stddev: Optional, limits: Limits, how: How, averages: Averages | None = None,
) -> tuple[Tensor, Tensor, Optional]:  # fmt: skip
    """Compute the output, the moments, and renorm's r and d in one tensor; move the averages."""
    assert native.library is not None
    dtype = wide(x)
    x, view = _seen(x, how.axes, how.virtual_batch_size)
    y = torch.empty_like(x)
    moments = torch.empty((2, 1 if view.own else view.groups, view.parameters), dtype=dtype)
    correction = None if renorm_mean is None else torch.empty((2, view.parameters), dtype=dtype)
    given = [_kept(value, dtype) for value in (weight, bias, scale, shift, renorm_mean, renorm_stddev)]
    native.library.forward_at(
        torch.get_num_threads(), *view, TYPES[x.dtype], dtype == torch.float64, x.data_ptr(), y.data_ptr(),
        how.epsilon, *map(_at, given), *limits, *_halves(moments), *_halves(correction), *_addresses(averages),
    )  # fmt: skip
    return y, moments, correction


def _addresses(averages: Averages | None) -> tuple[Any, ...]:
    """What the kernels are told of the averages; those of renorm they know already."""
    if averages is None:
        return 0, 0, 0.0, 0.0, 0.0
    (mean, variance), *numbers = averages
    return _at(mean), _at(variance), *numbers


def _compute_backward(
    dy: Tensor, x: Tensor, weight: Optional, bias: Optional, scale: Optional, shift: Optional, moments: Tensor,
    correction: Optional, how: How,
) -> tuple[Tensor, Optional, Optional, Optional, Optional]:  # fmt: skip
    """Compute the gradients of x, and of those parameters that there are, in one row each."""
    assert native.library is not None
    dtype = wide(x)
    x, view = _seen(x, how.axes, how.virtual_batch_size)
    dy = _like(dy, x)
    dx = torch.empty_like(x)
    gradients = [
        None if value is None else torch.empty(view.parameters, dtype=dtype) for value in (weight, bias, scale, shift)
    ]
    weight, scale, shift = (_kept(value, dtype) for value in (weight, scale, shift))
    native.library.backward_at(
        torch.get_num_threads(), *view, TYPES[x.dtype], dtype == torch.float64, x.data_ptr(), dy.data_ptr(),
        dx.data_ptr(), how.epsilon, *_halves(moments), _at(weight), *_halves(correction), _at(scale), _at(shift),
        *map(_at, gradients),
    )  # fmt: skip
    dweight, dbias, dscale, dshift = gradients
    return dx, dweight, dbias, dscale, dshift


def _compute_second(
    upstream: Sequence[Optional], dy: Tensor, x: Tensor, weight: Optional, bias: Optional, scale: Optional,
    shift: Optional, correction: Optional, how: How,
) -> list[Optional]:  # fmt: skip
    """Differentiate the composed path twice, for dy, x, weight, bias, scale and shift.

    Moments are the functions of x that they are, so nothing is left for them as inputs.
    """
    further = torch.is_grad_enabled()

    def own(value: Optional) -> Optional:
        """The same with a place of its own in the graph, so that dy's part in x is not counted as x's."""
        if value is None or not (further and value.requires_grad):
            return None if value is None else value.detach().requires_grad_()
        return value.view_as(value)

    with torch.enable_grad():
        inputs = [own(value) for value in (dy, x, weight, bias, scale, shift)]
        dy, x, weight, bias, scale, shift = inputs  # type: ignore[assignment]
        seen = composed.plan(x, how.axes, how.virtual_batch_size)
        pair = None
        if scale is not None and shift is not None:
            pair = scale.reshape(seen.input_shape), shift.reshape(seen.input_shape)
        corrected = None if correction is None or not correction.numel() else (correction[0], correction[1])
        y, _ = composed.train(x, seen, how.epsilon, weight=weight, bias=bias, adjustment=pair, correction=corrected)
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
                create_graph=further, allow_unused=True,
            )
        )  # fmt: skip
    return [None if value is None else next(second) for value in inputs]


def _shaped(gradient: Optional, value: Optional) -> Optional:
    if gradient is None or value is None:
        return None
    if gradient.shape != value.shape:
        gradient = gradient.reshape(value.shape)
    return gradient if gradient.dtype == value.dtype else gradient.to(value.dtype)


# ---- Eagerly.


class _Forward(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, scale, shift, _, _, _, ctx.how, _, kept = arguments
        y, moments, correction = _compute_forward(*arguments[:-1])
        kept.append(moments)  # and not a second output, of which the graph would have to know
        ctx.save_for_backward(x, weight, bias, scale, shift, moments, correction)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Optional) -> Any:
        if dy is None:
            return (None,) * 11
        tensors = ctx.saved_tensors
        differentiate: Any = _Backward.apply if torch.is_grad_enabled() else _compute_backward
        dx, dweight, dbias, dscale, dshift = differentiate(dy, *tensors, ctx.how)
        _, weight, bias, scale, shift, *_ = tensors
        return (
            dx, _shaped(dweight, weight), _shaped(dbias, bias), _shaped(dscale, scale), _shaped(dshift, shift),
            None, None, None, None, None, None,
        )  # fmt: skip


class _Backward(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        dy, x, weight, bias, scale, shift, _, correction, ctx.how = arguments
        ctx.save_for_backward(dy, x, weight, bias, scale, shift, correction)
        ctx.set_materialize_grads(False)
        return _compute_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *upstream: Optional) -> Any:
        arguments = (upstream, *ctx.saved_tensors, ctx.how)
        return (*_compute_second(*arguments), None, None, None)


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
) -> tuple[Tensor, Tensor, Tensor]:
    rmin, rmax, dmax = UNLIMITED if limits is None else limits.tolist()
    y, moments, correction = _compute_forward(
        x, weight, bias, adjustment_scale, adjustment_bias, renorm_mean, renorm_stddev, (rmin, rmax, dmax),
        How(epsilon, tuple(axes), virtual_batch_size),
    )  # fmt: skip
    return y, moments, moments.new_empty((2, 0)) if correction is None else correction


def _like_seen(x: Tensor, axes: Sequence[int]) -> Tensor:
    keeps = x.is_contiguous() or (len(axes) == 1 and _is_channels_last(x))
    return torch.empty_like(x) if keeps else torch.empty_like(x, memory_format=torch.contiguous_format)


@_forward_operator.register_fake
def _(
    x: Tensor, weight: Any, bias: Any, adjustment_scale: Any, adjustment_bias: Any, renorm_mean: Any,
    renorm_stddev: Any, limits: Any, epsilon: float, axes: Sequence[int], virtual_batch_size: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = wide(x)
    parameters = math.prod(x.shape[axis] for axis in axes)
    groups = 1 if virtual_batch_size is None else x.shape[0] // virtual_batch_size
    corrected = 0 if renorm_mean is None else parameters
    return (
        _like_seen(x, axes),
        x.new_empty((2, groups, parameters), dtype=dtype),
        x.new_empty((2, corrected), dtype=dtype),
    )


@torch.library.custom_op("batchnorm::backward", mutates_args=(), device_types="cpu")
def _backward_operator(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adjustment_scale: Tensor | None,
    adjustment_bias: Tensor | None,
    moments: Tensor,
    correction: Tensor,
    epsilon: float,
    axes: Sequence[int],
    virtual_batch_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, *rest = _compute_backward(
        dy, x, weight, bias, adjustment_scale, adjustment_bias, moments.contiguous(),
        correction.contiguous() if correction.numel() else None, How(epsilon, tuple(axes), virtual_batch_size),
    )  # fmt: skip
    dweight, dbias, dscale, dshift = (moments.new_empty(0) if one is None else one for one in rest)
    return dx, dweight, dbias, dscale, dshift


@_backward_operator.register_fake
def _(
    dy: Any, x: Tensor, weight: Any, bias: Any, adjustment_scale: Any, adjustment_bias: Any, moments: Any,
    correction: Any, epsilon: float, axes: Sequence[int], virtual_batch_size: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = math.prod(x.shape[axis] for axis in axes)
    given = (weight, bias, adjustment_scale, adjustment_bias)
    return (
        _like_seen(x, axes),
        *(x.new_empty((0 if value is None else parameters,), dtype=wide(x)) for value in given),
    )


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, scale, shift, _, _, _, *ctx.how = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx: Any, dy: Optional, *_: Any) -> Any:
    if dy is None:
        return (None,) * 11
    tensors = ctx.saved_tensors
    dx, *rest = torch.ops.batchnorm.backward(dy, *tensors, *ctx.how)
    return (dx, *(_shaped(one, value) for one, value in zip(rest, tensors[1:5], strict=True)), *(None,) * 6)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, bias, scale, shift, _, correction, *ctx.how = inputs
    ctx.save_for_backward(dy, x, weight, bias, scale, shift, correction)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *upstream: Optional) -> Any:
    epsilon, axes, virtual_batch_size = ctx.how
    arguments = (upstream, *ctx.saved_tensors, How(epsilon, tuple(axes), virtual_batch_size))
    return (*_compute_second(*arguments), *(None,) * 5)


_forward_operator.register_autograd(_differentiate_forward, setup_context=_save_forward)
_backward_operator.register_autograd(_differentiate_backward, setup_context=_save_backward)

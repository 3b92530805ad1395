"""Where a tensor's values lie: its plan, the memory formats that PyTorch keeps, and the view of the CPU kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm import cpu
from batchnorm.core import geometry
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import Geometry, View

__all__ = [
    "ChannelsLast",
    "accumulation_dtype",
    "canonical",
    "channels_last",
    "in_format",
    "is_batched",
    "is_eager",
    "is_exported",
    "is_exporting",
    "is_kept",
    "is_recorded",
    "is_traced",
    "is_transformed",
    "kernel",
    "known_sizes",
    "memory_format",
    "plan",
    "training_plan",
    "with_gradients_in_format",
]


def plan(x: Tensor, axes: int | tuple[int, ...], virtual_batch_size: int | None) -> Geometry:
    """Work out the geometry, without the cache where it would be traced into a graph."""
    make = geometry.plan if _is_known(x) else geometry.plan.__wrapped__
    found: Geometry = make(tuple(x.shape), axes, virtual_batch_size)
    return found


def training_plan(x: Tensor, axes: tuple[int, ...], virtual_batch_size: int | None) -> tuple[Geometry, int]:
    """Work out the geometry of a training step, and count the values of each feature in the smallest virtual batch."""
    make = _training_plan if _is_known(x) else _training_plan.__wrapped__
    return make(tuple(x.shape), axes, virtual_batch_size)


@functools.lru_cache(maxsize=1024)
def _training_plan(
    shape: tuple[int, ...], axes: tuple[int, ...], virtual_batch_size: int | None
) -> tuple[Geometry, int]:
    found: Geometry = geometry.plan.__wrapped__(shape, axes, virtual_batch_size)
    return found, found.least(shape)


def _is_known(x: Tensor) -> bool:
    """Tell whether a shape is made of numbers, and nothing traces what is done with it."""
    return not torch.compiler.is_compiling() and all(type(size) is int for size in x.shape)


@contextlib.contextmanager
def known_sizes() -> Iterator[None]:
    """Let sizes be ints within `torch.jit.trace`, which otherwise makes tensors of them and records what is asked."""
    tracing: Any = torch._C
    state = tracing._get_tracing_state()
    tracing._set_tracing_state(None)
    try:
        yield
    finally:
        tracing._set_tracing_state(state)


def is_transformed() -> bool:
    """Tell whether forward-mode derivatives or `torch.func` are at work."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_eager() -> bool:
    """Tell whether a call computes now, once, on what it is given, and its derivatives are those of `backward`."""
    return not (is_traced() or is_transformed())


def is_traced() -> bool:
    """Tell whether what is called now goes into a graph, or to a mode that looks at every operator."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()


def is_recorded() -> bool:
    """Tell whether `torch.jit.trace` is at work, which the older exporter to ONNX uses too."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def is_exported() -> bool:
    """Tell whether what is called now goes into a program that is to run without this package, in one mode."""
    return is_exporting() or is_recorded()


def is_exporting() -> bool:
    """Tell whether `torch.export` is at work."""
    if torch.__version__ >= "2.13":
        return torch.compiler.is_exporting()
    return getattr(torch.compiler, "_is_exporting_flag", False)  # the function is always true in what is compiled


def is_batched(gradient: Tensor) -> bool:
    """Tell whether it stands for many gradients, as with ``is_grads_batched=True``."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, and so of statistics, on tensors of a type: float32 or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- What PyTorch keeps.


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


def canonical(x: Tensor) -> Tensor:
    """The same values where they lie, with the strides of channels last on axes of size 1, too.

    PyTorch's operator asks for the format in two ways, of which one looks at such axes, and the other does not. Where
    they differ, its gradients are wrong (pytorch/pytorch#63224).
    """
    if x.dim() not in (4, 5) or x.is_contiguous() or is_transformed():
        return x
    if not x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d):
        return x
    values = x.movedim(1, -1)
    strides = [1]
    for size in reversed(values.shape[1:]):
        strides.insert(0, strides[0] * size)
    if values.stride() == tuple(strides):
        return x
    return values.flatten().reshape(values.shape).movedim(-1, 1)


def in_format(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Lay a tensor out in a format, if it is not."""
    return x if x.is_contiguous(memory_format=layout) else x.contiguous(memory_format=layout)


def with_gradients_in_format(x: Tensor, layout: torch.memory_format) -> Tensor:
    """The same, with a gradient in a format."""
    same: Tensor = _GradientsInFormat.apply(x, layout)  # type: ignore[no-untyped-call]
    return same


class _GradientsInFormat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: torch.memory_format) -> Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if not (is_batched(gradient) or is_transformed()):  # many at once have no format
            gradient = gradient.contiguous(memory_format=ctx.layout)
        return gradient, None


# ---- What the kernels see.


def kernel(
    x: Tensor, axes: tuple[int, ...], virtual_batch_size: int | None, epsilon: float
) -> tuple[Tensor, View, Any]:
    """Lay a tensor out as the kernels can see it, and find those for it; with one feature axis, channels last stays."""
    shape = x.shape
    if not x.is_contiguous():
        if is_kept(x, axes):
            n, channels, *rest = shape
            axes = ((0, x.ndim - 1, *range(1, x.ndim - 1))[axes[0]],)
            return x, *_kernel((n, *rest, channels), axes, virtual_batch_size, x.dtype, epsilon)
        x = x.contiguous()
    return x, *_kernel(shape, axes, virtual_batch_size, x.dtype, epsilon)


@functools.lru_cache(maxsize=1024)
def _kernel(
    shape: tuple[int, ...], axes: tuple[int, ...], virtual_batch_size: int | None, dtype: torch.dtype, epsilon: float
) -> tuple[View, Any]:
    view = geometry.plan(shape, axes, virtual_batch_size).view(shape)
    if view is None:
        raise ValueError(
            f"axes must be of two runs of axes at most, one with virtual batches; "
            f"received {axes}, virtual_batch_size={virtual_batch_size} and shape {tuple(shape)}."
        )
    return view, cpu.kernel(view, str(dtype).removeprefix("torch."), epsilon)


class ChannelsLast(NamedTuple):
    """How the kernels see a tensor of several feature axes in this format as it lies: with axis 1 behind the others.

    Attributes:
        plan: The geometry of what is seen.
        place: Where axis 1 is among the feature axes, or None: features are in another order, then.
    """

    plan: Geometry
    place: int | None

    def values(self, x: Tensor) -> Tensor:
        """The input, or what broadcasts against it, as it is seen."""
        return x.reshape((1,) * (self.plan.rank - x.dim()) + x.shape).movedim(1, -1)

    def parameter(self, value: Tensor) -> Tensor:
        """What has a value for each feature, in the order of what is seen."""
        return value if self.place is None else value.movedim(self.place, -1).contiguous()

    def back(self, moments: Moments) -> Moments:
        """The moments of what is seen, in the order of the input."""
        if self.place is None:
            return moments
        return Moments(*(value.movedim(-1, self.place) if torch.is_tensor(value) else value for value in moments))


def channels_last(x: Tensor, plan: Geometry) -> ChannelsLast | None:
    """Say how a tensor of several feature axes can be seen as it lies; None where it is copied, or need not be."""
    if len(plan.axes) == 1 or x.is_contiguous() or x.dim() not in (4, 5):
        return None
    axes = tuple(sorted(x.dim() - 1 if axis == 1 else max(axis - 1, 0) for axis in plan.axes))
    shape = (x.shape[0], *x.shape[2:], x.shape[1])
    seen = geometry.Geometry.of(x.dim(), tuple((axis, shape[axis]) for axis in axes), plan.virtual_batch_size)
    return ChannelsLast(seen, plan.axes.index(1) if 1 in plan.axes else None) if seen.collapses(shape) else None


def is_kept(x: Tensor, axes: tuple[int, ...]) -> bool:
    """Tell whether the kernels take a tensor as it lies."""
    if x.is_contiguous():
        return True
    if len(axes) > 1 or x.ndim not in (4, 5):
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)

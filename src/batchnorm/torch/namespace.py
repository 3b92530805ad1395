"""PyTorch as the array namespace that `batchnorm.core` is written over."""

from typing import Any

import torch
from torch import Tensor

from . import layout

__all__ = [
    "astype",
    "broadcast_to",
    "concat",
    "isfinite",
    "maximum",
    "minimum",
    "ones_like",
    "reshape",
    "shape",
    "sqrt",
    "stop_gradient",
    "sum",
    "where",
]

broadcast_to = torch.broadcast_to
isfinite = torch.isfinite
ones_like = torch.ones_like
reshape = torch.reshape
sqrt = torch.sqrt
where = torch.where


def maximum(x1: Any, x2: Any, /) -> Any:
    """Take the larger; the second may be a number."""
    return torch.maximum(x1, x2) if torch.is_tensor(x2) else torch.clamp_min(x1, x2)


def minimum(x1: Any, x2: Any, /) -> Any:
    """Take the smaller; the second may be a number."""
    return torch.minimum(x1, x2) if torch.is_tensor(x2) else torch.clamp_max(x1, x2)


def sum(x: Any, /, *, axis: Any, keepdims: bool) -> Any:
    """Sum over axes; over none of them, too."""
    return torch.sum(x, dim=axis, keepdim=keepdims) if axis != () else x


def concat(arrays: Any, /, *, axis: int) -> Any:
    """Join along an axis."""
    return torch.cat(arrays, dim=axis)


def astype(x: Any, dtype: Any, /) -> Any:
    """Convert a tensor; a number, or a size that is not known yet, stays what it is."""
    return x.to(dtype) if torch.is_tensor(x) else x


def shape(x: Any, /) -> tuple[Any, ...]:
    """Sizes as ints, or as symbols where a graph leaves them open."""
    return tuple(x.shape)


def stop_gradient(x: Any, /) -> Any:
    """Detach small statistics.

    A compiler must not compute them again for the backward pass: by then the averages that r and d are of have moved.
    """
    if torch.compiler.is_compiling() and not layout.is_exporting():
        kept: Tensor = torch.ops.batchnorm.keep(x.detach())
        return kept
    return x.detach()


@torch.library.custom_op("batchnorm::keep", mutates_args=())
def _keep(value: Tensor) -> Tensor:
    """Copy what is to be kept, which to a compiler could be anything."""
    return value.clone()


@_keep.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)

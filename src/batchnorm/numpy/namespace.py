"""NumPy as the array namespace that `batchnorm.core` is written over."""

from typing import Any

import numpy as np

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

concat = np.concatenate
isfinite = np.isfinite
maximum = np.maximum
minimum = np.minimum
ones_like = np.ones_like
reshape = np.reshape
shape = np.shape
sqrt = np.sqrt
sum = np.sum
where = np.where


def astype(x: Any, dtype: Any, /) -> Any:
    """Convert an array; a Python number, or None, stays what it is."""
    return x.astype(dtype, copy=False) if isinstance(x, (np.ndarray, np.generic)) else x


def broadcast_to(x: Any, shape: Any, /) -> Any:
    """Repeat values, in memory of their own, as kernels want them."""
    return np.ascontiguousarray(np.broadcast_to(x, shape))


def stop_gradient(x: Any, /) -> Any:
    """The same: NumPy does not differentiate."""
    return x

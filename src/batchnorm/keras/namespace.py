"""`keras.ops` as the array namespace that `batchnorm.core` is written over, for backends without one of their own."""

from typing import Any

from keras import ops

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

broadcast_to = ops.broadcast_to
isfinite = ops.isfinite
ones_like = ops.ones_like
reshape = ops.reshape
sqrt = ops.sqrt
stop_gradient = ops.stop_gradient
sum = ops.sum


def maximum(x1: Any, x2: Any, /) -> Any:
    """Take the larger; the second may be a number."""
    return ops.maximum(x1, _like(x1, x2))


def minimum(x1: Any, x2: Any, /) -> Any:
    """Take the smaller; the second may be a number."""
    return ops.minimum(x1, _like(x1, x2))


def where(condition: Any, x1: Any, x2: Any, /) -> Any:
    """Choose; one of both may be a number."""
    return ops.where(condition, _like(x2, x1), _like(x1, x2))


def concat(arrays: Any, /, *, axis: int) -> Any:
    """Join along an axis."""
    return ops.concatenate(arrays, axis=axis)


def astype(x: Any, dtype: Any, /) -> Any:
    """Convert a tensor; a Python number, or None, stays what it is."""
    return x if x is None or isinstance(x, (int, float)) else ops.cast(x, dtype)


def shape(x: Any, /) -> tuple[Any, ...]:
    """Sizes as ints where they are known, else scalar tensors."""
    return tuple(ops.shape(x))


def _like(x: Any, number: Any) -> Any:
    """A number in the type of an array, which would else decide on the type of the result."""
    return ops.cast(number, x.dtype) if isinstance(number, (int, float)) and hasattr(x, "dtype") else number

"""JAX as the array namespace that `batchnorm.core` is written over."""

from typing import Any

import jax.numpy as jnp
from jax import lax

__all__ = [
    "accumulation_dtype",
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

broadcast_to = jnp.broadcast_to
isfinite = jnp.isfinite
maximum = jnp.maximum
minimum = jnp.minimum
ones_like = jnp.ones_like
reshape = jnp.reshape
sqrt = jnp.sqrt
stop_gradient = lax.stop_gradient
where = jnp.where


def sum(x: Any, /, *, axis: Any, keepdims: bool) -> Any:
    """Sum over axes."""
    return jnp.sum(x, axis=axis, keepdims=keepdims)


def concat(arrays: Any, /, *, axis: int) -> Any:
    """Join along an axis."""
    return jnp.concatenate(arrays, axis=axis)


def astype(x: Any, dtype: Any, /) -> Any:
    """Convert an array; a Python number stays one, but as a float, for a large count does not fit an int32."""
    if x is None or isinstance(x, float):
        return x
    return float(x) if isinstance(x, int) else jnp.asarray(x, dtype)


def shape(x: Any, /) -> tuple[Any, ...]:
    """Sizes, which JAX always knows."""
    return tuple(x.shape)


def accumulation_dtype(dtype: Any) -> Any:
    """The type of sums, and so of all arithmetic, on arrays of a type: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)

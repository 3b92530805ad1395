"""JAX: our function, Flax's layer with the fast variance and with the exact one, and sbx's BatchRenorm."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import batchnorm
import batchnorm.jax
from batchnorm.core.passes import COMPOSED
from batchnorm.cpu import KERNEL
from batchnorm.jax import primitives
from benchmarks.cases import Case

from . import Array, Contender

__all__ = ["KEEPS_MEMORY", "PEERS", "TITLE", "array", "configure", "contenders", "extras", "ours", "versions"]

TITLE = "JAX"
KEEPS_MEMORY = False
PEERS = ("flax", "flax, exact", "sbx", "batchnorm, composed")
LIMITS = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}


def configure(threads: int) -> None:
    """Set the threads of our kernels; those of XLA are the processors that the process may use."""
    batchnorm.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def versions() -> str:
    """Name JAX and Flax with their versions."""
    return f"JAX {jax.__version__}, Flax {flax.__version__}"


def array(value: Any) -> Array:
    """Copy a result to NumPy."""
    return np.asarray(jnp.asarray(value, jnp.float32))


@functools.lru_cache(maxsize=2)  # cases of one shape follow each other
def _data(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
    x, dy = (jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1))
    return (x * 2 + 0.5).astype(dtype), dy.astype(dtype)


def _axis(case: Case) -> int | tuple[int, ...]:
    if case.option == "two axes":
        return (1, 2) if case.axis == -1 else (1, len(case.shape) - 1)
    return case.axis


def _virtual_batch_size(case: Case) -> int | None:
    size = min(8, case.shape[0])
    return (size - 1 if "uneven" in case.option else size) if "virtual" in case.option else None


def _run(norm: Callable[..., Any], case: Case, parameters: Any, statistics: Any) -> Callable[[], list[Any]]:
    """A compiled program; `norm` takes x, parameters and statistics to y and new statistics."""
    x, dy = _data(case.shape, case.dtype)

    @jax.jit
    def forward(x: Any, parameters: Any, statistics: Any) -> Any:
        return norm(x, parameters, statistics)

    @jax.jit
    def step(x: Any, dy: Any, parameters: Any, statistics: Any) -> Any:
        y, vjp, moved = jax.vjp(lambda x, p: norm(x, p, statistics), x, parameters, has_aux=True)
        return y, vjp(dy.astype(y.dtype)), moved

    def run() -> list[Any]:
        if case.mode.endswith("step"):
            y, (dx, gradients), moved = step(x, dy, parameters, statistics)
            jax.block_until_ready(moved)
            return list(jax.block_until_ready([y, dx, *(gradients[name] for name in ("scale", "bias"))]))
        y, moved = forward(x, parameters, statistics)
        jax.block_until_ready(moved)
        return [jax.block_until_ready(y)]

    return run


def _ours(case: Case, fused: bool | None = None) -> Contender:
    axis = _axis(case)
    axes = axis if isinstance(axis, tuple) else (axis,)
    sizes = tuple(case.shape[each] for each in axes)
    renorm = "renorm" in case.option
    parameters, statistics = batchnorm.jax.init(sizes, renorm=renorm)
    pair = None
    if case.option == "adjustment":
        by_feature = [1] * len(case.shape)
        by_feature[case.axis] = sizes[0]
        scale = jnp.linspace(0.93, 1.07, sizes[0]).reshape(by_feature)
        pair = scale, scale - 1

    def norm(x: Any, parameters: Any, statistics: Any) -> Any:
        training = not case.mode.endswith("inference")
        return batchnorm.jax.batch_norm(
            x,
            parameters,
            statistics,
            training=training,
            axis=axis,
            renorm_clipping=LIMITS if renorm else None,
            virtual_batch_size=_virtual_batch_size(case),
            mask=None if case.mask is None else jnp.expand_dims(case.mask, case.axis),
            adjustment=pair if training else None,
            fused=fused,
        )

    def kernel() -> str:
        x, _ = _data(case.shape, case.dtype)
        text = jax.jit(norm).lower(x, parameters, statistics).as_text()
        return KERNEL if primitives.TARGETS["forward"] in text else COMPOSED

    name = "batchnorm" if fused is None else "batchnorm, composed"
    return Contender(name, _run(norm, case, parameters, statistics), kernel)


def ours(case: Case) -> Contender:
    """Make our layer on the data of a case."""
    return _ours(case)


def _linen(name: str, layer: Any, case: Case, **state: Any) -> Contender:
    """A layer of linen, on the parameters and statistics that ours has."""
    parameters, statistics = batchnorm.jax.init(case.shape[case.axis])

    def norm(x: Any, parameters: Any, statistics: Any) -> Any:
        y, moved = layer.apply({"params": parameters, "batch_stats": statistics}, x, mutable=["batch_stats"])
        return y, moved["batch_stats"]

    return Contender(name, _run(norm, case, parameters, statistics | state))


def _sbx() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a package that sbx imports
        return importlib.import_module("sbx.common.jax_layers").BatchRenorm


def contenders(case: Case) -> tuple[list[Contender], Contender]:
    """Make the contenders of a case, ours first, and the floor: what reading and writing the data takes alone."""
    x, dy = _data(case.shape, case.dtype)
    found = [ours(case)]
    options = {"use_running_average": case.mode.endswith("inference"), "axis": case.axis, "dtype": x.dtype}
    if case.option == "plain":
        found.append(_ours(case, fused=False))
        found.append(_linen("flax", nn.BatchNorm(**options), case))
        found.append(_linen("flax, exact", nn.BatchNorm(use_fast_variance=False, **options), case))
    if case.option == "renorm":
        layer = _sbx()(epsilon=1e-5, **options)
        found.append(_linen("sbx", layer, case, r_max=3, d_max=5, steps=200_000))

    @jax.jit
    def floor(x: Any, dy: Any) -> Any:  # a copy; and for the gradient, two read and one written
        return [-x, x + dy] if case.mode.endswith("step") else [-x]

    return found, Contender("floor", lambda: list(jax.block_until_ready(floor(x, dy))))


def extras(quick: bool) -> list[tuple[Case, list[Contender]]]:
    """Make what is measured besides single layers: nothing."""
    return []

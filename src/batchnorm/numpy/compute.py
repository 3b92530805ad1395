"""Who computes a call on NumPy, and how: the CPU kernels, or the composed layer in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from batchnorm import cpu
from batchnorm.core import algebra, normalize, passes, state
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import Geometry, View
from batchnorm.core.normalize import Masked, Pair, Renorm
from batchnorm.core.options import Options

from . import namespace as xp

__all__ = ["Call", "Gradients", "call", "infer", "train"]

Array = npt.NDArray[Any]
Variables = Mapping[str, Array]
COMPOSED_DTYPE = np.float64
"""The arithmetic of the composed path, whatever is stored: it is what everything else is measured against."""
LINE = 64
LARGE = 7 << 20
"""Bytes from which the kernels write results past the caches."""
AVERAGES = {
    "moving_mean": "running_mean",
    "moving_variance": "running_variance",
    "moving_stddev": "running_stddev",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "renorm_stddev",
}
"""What the kernels call the averages."""


class Gradients(NamedTuple):
    """Gradients of one call for what went in; None where the layer has no such input."""

    inputs: Array
    gamma: Array | None
    beta: Array | None
    adjustment: Pair | None


Gradient = Callable[[npt.ArrayLike], Gradients]


class Call(NamedTuple):
    """How inputs of a shape and type are taken; worked out once."""

    plan: Geometry
    kernel: str
    view: View | None
    kernels: Any  # for that view, or None


def call(plan: Geometry, options: Options, shape: tuple[int, ...], dtype: np.dtype[Any], training: bool) -> Call:
    """Work out who serves inputs of a shape and type."""
    known = cpu.library is not None and math.prod(shape) > 0 and dtype.isnative and dtype.name in cpu.TYPES
    view = (plan if training else plan.whole).view(shape) if known else None
    kernels = None if view is None else cpu.kernel(view, dtype.name, options.epsilon)
    return Call(plan, passes.select(options.fused, {cpu.KERNEL: view is not None}), view, kernels)


# ---- Training.


def train(
    x: Array, of: Call, options: Options, variables: Variables, adjustment: Pair | None, weights: Array | None,
    masked: Masked, move: bool,
) -> tuple[Array, dict[str, Array], Gradient]:  # fmt: skip
    """Normalize by the batch.

    Returns:
        The output; the averages that have moved, if they are to; and the gradient.
    """
    if of.kernel == cpu.KERNEL:
        return _train_cpu(x, of, options, variables, adjustment, weights, masked, move)
    plan, epsilon = of.plan, options.epsilon
    gamma, beta = variables.get("gamma"), variables.get("beta")
    renorm = None
    if options.renorm:
        renorm = Renorm(variables["renorm_mean"], variables["renorm_stddev"], options.renorm_clipping)
    given: dict[str, Any] = {"gamma": gamma, "beta": beta, "adjustment": adjustment}
    given |= {"weights": weights, "masked": masked}
    with np.errstate(invalid="ignore"):  # of what weighs nothing, and may be anything
        trained = normalize.train(xp, x.astype(COMPOSED_DTYPE), plan, epsilon, renorm=renorm, **given)
    moved = _move(algebra.reshaped(xp, trained.averaged, plan.parameter_shape), options, variables) if move else {}
    saved = trained._replace(y=None)

    def gradient(dy: npt.ArrayLike) -> Gradients:
        # Of its own, for an adjustment's gradient may be a view of it.
        upstream = _upstream(np.array(dy), x, COMPOSED_DTYPE)
        with np.errstate(invalid="ignore"):
            found = normalize.train_gradient(xp, upstream, saved, plan, epsilon, **given)
        return _gradients(found, x, gamma, beta)

    return trained.y.astype(x.dtype), moved, gradient


def _train_cpu(
    x: Array, of: Call, options: Options, variables: Variables, adjustment: Pair | None, weights: Array | None,
    masked: Masked, move: bool,
) -> tuple[Array, dict[str, Array], Gradient]:  # fmt: skip
    plan, _, view, kernels = of
    assert view is not None
    gamma, beta = variables.get("gamma"), variables.get("beta")
    raw, dtype = _raw(x), np.float64 if x.dtype == np.float64 else np.float32
    flat = None
    if adjustment is not None:
        scale, bias = (value.astype(dtype, copy=False) for value in adjustment)
        flat = normalize.by_feature(xp, plan, (scale, bias))
    factor, offset = normalize.fold(xp, gamma, beta, flat)
    y, shape = _output(raw), (view.groups, view.features)
    mean, variance = np.empty(shape), np.empty(shape)
    count, squares = np.empty(view.virtual_batches, dtype), np.empty(view.virtual_batches, dtype)
    counts = {"count": count, "square_count": squares}
    weighed = _weighed(weights, dtype, masked)
    r = d = None
    renorm = {}
    if options.renorm:
        r, d = np.empty(view.parameters, dtype), np.empty(view.parameters, dtype)
        rmin, rmax, dmax = options.renorm_clipping.limits
        averages = {name: variables[name] for name in ("renorm_mean", "renorm_stddev")}
        renorm = {"r": r, "d": d, "rmin": rmin, "rmax": rmax, "dmax": dmax, **averages}
    kernels.forward(
        x=raw, y=y, mean=mean, variance=variance, factor=factor, offset=offset, **renorm, **weighed, **counts
    )
    moved: dict[str, Array] = {}
    if move:
        moved = {name: value.copy() for name, value in variables.items() if name not in state.PARAMETERS}
        kernels.move_averages(
            mean=mean,
            variance=variance,
            **{AVERAGES[name]: value for name, value in moved.items()},
            momentum=options.rate,
            skip_nonfinite=options.skip_nonfinite,
            renorm_momentum=options.renorm_rate,
            **counts,
        )

    def gradient(dy: npt.ArrayLike) -> Gradients:
        upstream = _raw(_upstream(dy, x, x.dtype))
        dx = _output(raw)
        dfactor, doffset = (None if value is None else np.empty_like(value) for value in (factor, offset))
        kernels.backward(
            x=raw, dy=upstream, dx=dx, mean=mean, variance=variance, factor=factor, r=r, d=d, dfactor=dfactor,
            doffset=doffset, **weighed, **({"count": count} if weighed else {}),
        )  # fmt: skip
        dadjustment = None
        if adjustment is not None and dfactor is not None and doffset is not None:
            shapes = adjustment[0].shape, adjustment[1].shape
            dadjustment = normalize.adjustment_gradient(xp, plan, dfactor, doffset, gamma, shapes)
        dgamma, dbeta = normalize.fold_gradient(dfactor, doffset, gamma, flat)
        return Gradients(dx.view(x.dtype), _like(dgamma, gamma), _like(dbeta, beta), dadjustment)

    return y.view(x.dtype), moved, gradient


def _move(moments: Moments, options: Options, variables: Variables) -> dict[str, Array]:
    new, _ = algebra.track(
        xp,
        state.averages(variables),
        moments,
        options.epsilon,
        rate=options.rate,
        renorm_rate=options.renorm_rate,
        skip_nonfinite=options.skip_nonfinite,
    )
    return new


# ---- Inference.


def infer(
    x: Array, of: Call, epsilon: Any, variables: Variables, weights: Array | None, masked: Masked
) -> tuple[Array, Gradient]:
    """Normalize by the moving averages; also return the gradient."""
    plan, kernel, _, kernels = of
    mean, variance = variables["moving_mean"], variables["moving_variance"]
    gamma, beta = variables.get("gamma"), variables.get("beta")
    if kernel == cpu.KERNEL:
        affine = algebra.affine(xp, Moments(mean, variance, 1), epsilon, factor=gamma, offset=beta)
        offset = np.zeros_like(mean) if affine.offset is None else affine.offset
        raw = _raw(x)
        out = _output(raw)
        weighed = _weighed(weights, mean.dtype, masked)
        kernels.normalize(x=raw, y=out, mean=mean, scale=affine.scale, offset=offset, **weighed)
        y = out.view(x.dtype)
    else:
        given: dict[str, Any] = {"gamma": gamma, "beta": beta, "weights": weights, "masked": masked}
        with np.errstate(invalid="ignore"):  # of what weighs nothing, and may be anything
            y = normalize.infer(xp, x.astype(COMPOSED_DTYPE), plan, epsilon, mean, variance, **given).astype(x.dtype)
    return y, functools.partial(_infer_gradient, x, plan, epsilon, mean, variance, gamma, beta, weights, masked)


def _infer_gradient(
    x: Array, plan: Geometry, epsilon: Any, mean: Array, variance: Array, gamma: Array | None, beta: Array | None,
    weights: Array | None, masked: Masked, dy: npt.ArrayLike,
) -> Gradients:  # fmt: skip
    upstream = _upstream(dy, x, COMPOSED_DTYPE)
    given: dict[str, Any] = {"gamma": gamma, "beta": beta, "weights": weights, "masked": masked}
    with np.errstate(invalid="ignore"):
        found = normalize.infer_gradient(xp, upstream, x.astype(COMPOSED_DTYPE), plan, epsilon, mean, variance, **given)
    return _gradients(found, x, gamma, beta)


# ---- Arrays.


def _upstream(dy: npt.ArrayLike, x: Array, dtype: npt.DTypeLike) -> Array:
    """What comes back to the output, in a type."""
    upstream = np.asarray(dy, dtype)
    Geometry.check_upstream(upstream.shape, x.shape)
    return upstream


def _weighed(weights: Array | None, dtype: npt.DTypeLike, masked: Masked) -> dict[str, Any]:
    """What counts, as the kernels take it: booleans, or numbers of a type."""
    if weights is None:
        return {}
    if weights.dtype.kind == "b":
        return {"mask": np.ascontiguousarray(weights), "zeroed": masked == "zero"}
    return {"weights": np.ascontiguousarray(weights, dtype), "zeroed": masked == "zero"}


def _gradients(found: normalize.Gradients, x: Array, gamma: Array | None, beta: Array | None) -> Gradients:
    return Gradients(found.x.astype(x.dtype), _like(found.gamma, gamma), _like(found.beta, beta), found.adjustment)


def _like(gradient: Array | None, value: Array | None) -> Array | None:
    """A gradient of the shape and type of what it belongs to."""
    if gradient is None or value is None:
        return None
    if gradient.shape != value.shape:
        gradient = gradient.reshape(value.shape)
    return gradient if gradient.dtype == value.dtype else gradient.astype(value.dtype)


def _output(x: Array) -> Array:
    """Memory like that of an array. Large memory begins with a line of the caches: past them only lines are written.

    NumPy's own memory of that size begins within a line, other frameworks' does not.
    """
    if x.nbytes <= LARGE:
        return np.empty_like(x)
    memory = np.empty(x.nbytes + LINE, np.uint8)
    begin = -memory.ctypes.data % LINE
    return memory[begin : begin + x.nbytes].view(x.dtype).reshape(x.shape)


def _raw(x: Array) -> Array:
    """Lay an array out for the kernels, which know bfloat16 as unsigned integers."""
    flags = x.flags
    if not (flags.c_contiguous and flags.aligned):
        x = np.require(x, requirements=["C", "A"])
    return x if x.dtype.kind == "f" else x.view(np.uint16)

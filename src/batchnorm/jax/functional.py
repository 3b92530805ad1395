"""The layer as a pure function of arrays, its parameters and statistics among them."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from batchnorm.core import algebra, geometry, normalize, passes
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import Geometry
from batchnorm.core.normalize import Pair, Renorm
from batchnorm.core.options import Clipping, Options, flag, pair, received, sizes, small_number
from batchnorm.cpu import KERNEL

from . import namespace as xp
from . import primitives

__all__ = ["batch_norm", "checked_options", "init", "with_renorm", "without_renorm"]

Array = Any
Arrays = Mapping[str, Array]
AVERAGES = {
    "mean": "moving_mean",
    "var": "moving_variance",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "renorm_stddev",
}
"""What `batchnorm.core` calls the statistics."""


def init(
    features: int | tuple[int, ...],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    renorm: bool = False,
    steps: bool = False,
    dtype: Any = jnp.float32,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Make the parameters and the statistics that `batch_norm` takes.

    Args:
        features: Size of the feature axis, or of each of several, in the order of the input's axes.
        use_scale: Whether there is a ``scale`` (γ).
        use_bias: Whether there is a ``bias`` (β).
        renorm: Whether there are ``renorm_mean`` and ``renorm_stddev``, which batch renormalization corrects by.
        steps: Whether steps are counted, for a schedule of renorm's limits.
        dtype: Type of the parameters. Statistics are float32, or float64 if that is.

    Returns:
        Two dictionaries: parameters, with any of ``scale`` and ``bias``; statistics, with ``mean``, ``var`` and the
        rest of what was asked for.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a negative size.

    >>> parameters, statistics = init(3, renorm=True)
    >>> sorted(parameters), sorted(statistics)
    (['bias', 'scale'], ['mean', 'renorm_mean', 'renorm_stddev', 'var'])
    """
    shape, dtype = sizes("features", features), _floating("dtype", dtype)
    average_dtype = xp.accumulation_dtype(dtype)
    parameters = {}
    if flag("use_scale", use_scale):
        parameters["scale"] = jnp.ones(shape, dtype)
    if flag("use_bias", use_bias):
        parameters["bias"] = jnp.zeros(shape, dtype)
    statistics = {"mean": jnp.zeros(shape, average_dtype), "var": jnp.ones(shape, average_dtype)}
    if flag("renorm", renorm):
        statistics |= {"renorm_mean": jnp.zeros(shape, average_dtype), "renorm_stddev": jnp.ones(shape, average_dtype)}
    if flag("steps", steps):
        statistics["steps"] = jnp.zeros((), jnp.int32)
    return parameters, statistics


def batch_norm(
    x: Array,
    parameters: Arrays,
    statistics: Arrays,
    *,
    training: bool,
    axis: int | tuple[int, ...] = -1,
    momentum: Any = 0.99,
    epsilon: Any = 1e-5,
    renorm_clipping: Mapping[str, Any] | Callable[[Array], Mapping[str, Any]] | None = None,
    renorm_momentum: Any = 0.99,
    virtual_batch_size: int | None = None,
    adjustment: Pair | None = None,
    skip_nonfinite: bool = False,
    fused: bool | None = None,
    mask: Array | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    update: bool = True,
    dtype: Any = None,
) -> tuple[Array, dict[str, Array]]:
    """Normalize a batch; a pure function, for every transformation of JAX.

    In training y = (((x − m)/σ·r + d)·a + b)·scale + bias with σ = sqrt(v + epsilon), where m and v are the mean and
    the biased variance of each feature over the batch, or over each virtual batch; r = 1 and d = 0 without renorm,
    a = 1 and b = 0 without adjustment. In inference m and v are the statistics ``mean`` and ``var``, and r, d, a, b are
    left out. The new statistics are constants to derivatives.

    Args:
        x: Batch of any rank with a feature axis, or several; of a floating-point type.
        parameters: A dictionary with any of ``scale`` and ``bias``, of the shape of the feature axes.
        statistics: A dictionary with ``mean`` and ``var`` of that shape. If it has ``renorm_mean`` and
            ``renorm_stddev``, training is corrected by batch renormalization. If it has ``steps``, they are counted.
        training: Whether to normalize by the batch, a Python bool.
        axis: The feature axis, or several.
        momentum: Weight of the old value in the statistics.
        epsilon: Added to the variance.
        renorm_clipping: Limits of renorm's correction, a mapping with any of the keys rmin, rmax and dmax, to numbers
            or scalar arrays; or a function of ``steps`` to one, such as `batchnorm.jax.ClippingSchedule`.
        renorm_momentum: Weight of the old value in renorm's averages.
        virtual_batch_size: Samples in each virtual batch at most, or None for the whole batch. Sample i of N is in
            virtual batch i mod ⌈N / virtual_batch_size⌉.
        adjustment: Scale a and bias b that broadcast to x, applied in training, or None.
        skip_nonfinite: Whether features with moments that are not finite keep their statistics in that step.
        fused: None or True for the CPU kernels where they can serve, False for operations of XLA's only.
        mask: Which values count in the moments: booleans, or weights of at least 0, that broadcast to x; a constant to
            derivatives. What does not count is normalized like the rest. Of nothing that counts, nothing moves. That
            weights are not negative is not checked.
        axis_name: The mapped axis, or axes, of `jax.shard_map`, `jax.pmap` or `jax.vmap` over which moments are those
            of all values together; or None.
        axis_index_groups: Groups of indices of that axis, of one size, each with moments of its own; or None.
        update: Whether the statistics move in training.
        dtype: Type of y; by default that of x.

    Returns:
        y, and the new statistics; in inference, the ones that came.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value out of range, shapes that do not fit, or options that exclude each other.

    Source: Ioffe and Szegedy (2015); Ioffe, Batch Renormalization (2017), algorithm 1; Hoffer et al. (2017).

    >>> import jax.numpy as jnp
    >>> parameters, statistics = init(2)
    >>> y, statistics = batch_norm(jnp.array([[1.0, 10.0], [3.0, 20.0]]), parameters, statistics, training=True)
    >>> print(y.round(3), statistics["mean"].round(3))
    [[-1. -1.]
     [ 1.  1.]] [0.02 0.15]
    """
    x = jnp.asarray(x)
    _floating("x", x.dtype)
    for name, given in (("parameters", parameters), ("statistics", statistics)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{name} must be a dictionary of arrays; {received(given)}.")
    training, update = flag("training", training), flag("update", update)
    if callable(renorm_clipping):
        if statistics.get("steps") is None:
            raise ValueError(
                f"statistics must have 'steps' where renorm_clipping is a function of them; received "
                f"{sorted(statistics)}."
            )
        renorm_clipping = renorm_clipping(statistics["steps"])
    options = checked_options(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        renorm=statistics.get("renorm_mean") is not None,
        renorm_clipping=renorm_clipping,
        renorm_momentum=renorm_momentum,
        virtual_batch_size=virtual_batch_size,
        adjustment=None if adjustment is None else lambda shape: adjustment,
        skip_nonfinite=skip_nonfinite,
        fused=fused,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    plan = geometry.plan(x.shape, options.feature_axis, options.virtual_batch_size)
    _check(plan, x.shape, parameters, statistics)
    weights = None if mask is None else _weights(mask, x, plan)
    y_type = x.dtype if dtype is None else _floating("dtype", dtype)
    x = x.astype(jnp.promote_types(x.dtype, y_type))
    if not training:
        y = normalize.infer(
            xp,
            x.astype(xp.accumulation_dtype(x.dtype)),
            plan,
            epsilon,
            statistics["mean"],
            statistics["var"],
            gamma=parameters.get("scale"),
            beta=parameters.get("bias"),
        )
        return y.astype(y_type), dict(statistics)
    merge = None if axis_name is None else _merge(axis_name, axis_index_groups)
    y, averaged = _train(x, parameters, statistics, plan, options, *_adjustment(options, x, plan), weights, merge)
    if not update:
        return y.astype(y_type), dict(statistics)
    return y.astype(y_type), _moved(statistics, averaged, plan, options)


def with_renorm(statistics: Any, epsilon: float = 1e-5) -> Any:
    """Add what batch renormalization corrects by to the statistics of plain layers, at any depth of dictionaries.

    It begins where they are: ``renorm_mean`` at ``mean``, ``renorm_stddev`` at sqrt(``var`` + epsilon). Statistics that
    have it stay, and so does whatever is no layer's. ``r_max`` and ``d_max``, which sbx's BatchRenorm keeps, go.

    >>> with_renorm({"BatchNorm_0": init(1)[1]}, epsilon=0.0)["BatchNorm_0"]["renorm_stddev"].tolist()
    [1.0]
    """
    small_number("epsilon", epsilon)
    if not isinstance(statistics, Mapping):
        return statistics
    if not {"mean", "var"} <= set(statistics):
        return {name: with_renorm(value, epsilon) for name, value in statistics.items()}
    found = {name: value for name, value in statistics.items() if name not in ("r_max", "d_max")}
    found.setdefault("renorm_mean", jnp.array(found["mean"]))  # of its own, as one array cannot be donated twice
    found.setdefault("renorm_stddev", algebra.stddev(xp, found["var"], epsilon))
    return found


def without_renorm(statistics: Any) -> Any:
    """Leave of the statistics what a layer of Flax has, ``mean`` and ``var``, at any depth of dictionaries.

    >>> sorted(without_renorm(init(1, renorm=True)[1]))
    ['mean', 'var']
    """
    if not isinstance(statistics, Mapping):
        return statistics
    if not {"mean", "var"} <= set(statistics):
        return {name: without_renorm(value) for name, value in statistics.items()}
    return {name: statistics[name] for name in ("mean", "var")}


# ---- Checks.


def checked_options(
    *,
    axis: int | tuple[int, ...],
    momentum: Any,
    epsilon: Any,
    renorm: bool,
    renorm_clipping: Any,
    renorm_momentum: Any,
    virtual_batch_size: int | None,
    adjustment: Callable[[Any], Pair] | None,
    skip_nonfinite: bool,
    fused: bool | None,
    axis_name: Any,
    axis_index_groups: Any,
    num_features: tuple[int, ...] | None = None,
) -> Options:
    """Check what a layer was asked for; a function `renorm_clipping` is checked by what it returns, later."""
    options = Options(
        axis=axis,
        decay=momentum,
        epsilon=epsilon,
        renorm=renorm,
        renorm_clipping=Clipping.of(None if callable(renorm_clipping) else renorm_clipping),
        renorm_decay=renorm_momentum,
        virtual_batch_size=virtual_batch_size,
        adjustment=adjustment,
        fused=fused,
        skip_nonfinite=skip_nonfinite,
    )
    axes = 1 if isinstance(options.feature_axis, int) else len(options.feature_axis)
    if num_features is not None and len(num_features) != axes:
        raise ValueError(f"num_features must have one size for each axis; received {num_features} and axis={axis}.")
    if axis_name is not None and virtual_batch_size is not None:
        raise ValueError(
            f"axis_name and virtual_batch_size cannot be used together, for virtual batches are of one device; "
            f"received axis_name={axis_name!r} and virtual_batch_size={virtual_batch_size}."
        )
    if axis_index_groups is not None and axis_name is None:
        raise ValueError(f"axis_index_groups must come with axis_name; received {axis_index_groups!r} alone.")
    return options


def _floating(name: str, dtype: Any) -> Any:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{name} must be of a floating-point type; {received(dtype)}.") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"{name} must be of a floating-point type; received {found}.")
    return found


def _check(plan: Geometry, shape: tuple[int, ...], parameters: Arrays, statistics: Arrays) -> None:
    for name in ("mean", "var"):
        if statistics.get(name) is None:
            raise ValueError(f"statistics must have 'mean' and 'var'; received {sorted(statistics)}.")
    if (statistics.get("renorm_mean") is None) != (statistics.get("renorm_stddev") is None):
        raise ValueError(
            f"statistics must have 'renorm_mean' and 'renorm_stddev' together; received {sorted(statistics)}."
        )
    values = {name: parameters.get(name) for name in ("scale", "bias")}
    values |= {name: statistics.get(name) for name in AVERAGES}
    for name, value in values.items():
        if value is None:
            continue
        if not hasattr(value, "shape"):
            raise TypeError(f"{name} must be an array; {received(value)}.")
        if tuple(value.shape) != plan.feature_sizes:
            raise ValueError(
                f"{name} must have shape {plan.feature_sizes} for x of shape {shape} with feature axes {plan.axes}; "
                f"received shape {tuple(value.shape)}."
            )


def _weights(mask: Array, x: Array, plan: Geometry) -> Array:
    """A mask in the shape of x, with size 1 on feature axes along which it does not differ."""
    mask = jnp.asarray(mask)
    lead = x.ndim - mask.ndim
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise TypeError(f"mask must be of booleans or real weights; received {mask.dtype}.")
    if lead < 0 or any(size not in (1, x.shape[at]) for at, size in enumerate(mask.shape, lead)):
        raise ValueError(
            f"mask must broadcast to x, of shape {x.shape}; received shape {mask.shape}. One value for each position "
            "has size 1 on the feature axes."
        )
    mask = mask.reshape((1,) * lead + mask.shape)
    sizes = tuple(mask.shape[at] if at in plan.axes else size for at, size in enumerate(x.shape))
    return jax.lax.stop_gradient(jnp.broadcast_to(mask, sizes))


def _adjustment(options: Options, x: Array, plan: Geometry) -> tuple[Pair | None, bool]:
    """The adjustment of a batch, in the type of the arithmetic, and whether it has one value for each feature."""
    if options.adjustment is None:
        return None, True
    dtype = xp.accumulation_dtype(x.dtype)
    scale, bias = (jnp.asarray(value, dtype) for value in pair(options.adjustment(x.shape)))
    return (scale, bias), plan.check_adjustment((scale.shape, bias.shape), x.shape)


# ---- Training.


def _train(
    x: Array,
    parameters: Arrays,
    statistics: Arrays,
    plan: Geometry,
    options: Options,
    adjustment: Pair | None,
    by_feature: bool,
    weights: Array | None,
    merge: Callable[[Moments], Moments] | None,
) -> tuple[Array, Moments]:
    gamma, beta = parameters.get("scale"), parameters.get("bias")
    renorm = None
    if options.renorm:
        renorm = Renorm(statistics["renorm_mean"], statistics["renorm_stddev"], options.renorm_clipping)
    served = (
        merge is None
        and by_feature
        and isinstance(options.epsilon, numbers.Real)
        and primitives.serves(x, plan, weights)
    )
    if passes.select(options.fused, {KERNEL: served}) == KERNEL:
        if adjustment is not None:
            adjustment = normalize.by_feature(xp, plan, adjustment)
        factor, offset = normalize.fold(xp, gamma, beta, adjustment)
        epsilon = float(options.epsilon)
        return primitives.forward(x, plan, epsilon, factor=factor, offset=offset, renorm=renorm, weights=weights)
    trained = normalize.train(
        xp,
        x.astype(xp.accumulation_dtype(x.dtype)),
        plan,
        options.epsilon,
        gamma=gamma,
        beta=beta,
        adjustment=adjustment,
        renorm=renorm,
        weights=weights,
        merge=merge,
    )
    return trained.y, trained.averaged


def _merge(axis_name: Any, groups: Any) -> Callable[[Moments], Moments]:
    """Put the moments of a mapped axis together, of which one collective gathers them all."""

    def merge(moments: Moments) -> Moments:
        mean = moments.mean
        count = jnp.asarray(moments.count, mean.dtype) * xp.ones_like(mean)
        rest = moments.rest * xp.ones_like(mean)
        gathered = primitives.gather(jnp.stack([mean, moments.variance, count, rest]), axis_name, groups)
        gathered = gathered.reshape(-1, *gathered.shape[-mean.ndim - 1 :])
        merged = algebra.merge(xp, Moments(*(gathered[:, i] for i in range(4))), 0)
        return Moments(*(value[0] for value in merged[:4]))

    return merge


def _moved(statistics: Arrays, averaged: Moments, plan: Geometry, options: Options) -> dict[str, Array]:
    """The statistics after a step."""
    found = algebra.reshaped(xp, averaged, plan.feature_sizes)
    mean, variance = (jax.lax.stop_gradient(value) for value in found[:2])
    moments = Moments(mean, variance, found.count)
    averages = {AVERAGES[name]: value for name, value in statistics.items() if name in AVERAGES and value is not None}
    moved, moves = algebra.track(
        xp,
        averages,
        moments,
        options.epsilon,
        rate=options.rate,
        renorm_rate=options.renorm_rate,
        skip_nonfinite=options.skip_nonfinite,
    )
    new = dict(statistics)
    new.update({name: moved[long] for name, long in AVERAGES.items() if long in moved})
    if new.get("steps") is not None:
        new["steps"] = new["steps"] + (1 if moves is None else 0 if moves is False else jnp.any(moves))
    return new

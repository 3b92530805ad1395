"""Who computes a call on TensorFlow, and how: the CPU kernels, TensorFlow's fused operation, or the composed layer."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from batchnorm.core import algebra, normalize, passes
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import REFUSED_WEIGHTS, Geometry
from batchnorm.core.normalize import Pair, Renorm
from batchnorm.core.options import Options

from . import namespace as xp
from . import operations
from .namespace import accumulation_dtype

__all__ = ["assign_moving_average", "infer", "move", "move_by", "train", "view", "weights"]

v1 = tf.compat.v1

FUSED_OP = "FusedBatchNormV3"
"""The name of TensorFlow's own fused operation, where a layer says which kernel served."""
Read = Callable[[str], Any]
"""Reads a variable of a layer, in the type of the arithmetic; None where the layer has none of that name."""
Assign = Callable[[Any, Any, Any], Any]
"""Moves one average: a function of the variable, the value to move to, and the weight of the old value."""


def train(
    x: Any,
    plan: Geometry,
    options: Options,
    read: Read,
    adjustment: Pair | None,
    by_feature: bool,
    fusible: bool,
    *,
    either: bool = False,
    moments: Moments | None = None,
    weights: Any = None,
) -> tuple[Any, Moments, str]:
    """Normalize by the batch.

    Args:
        x: The batch, in the type that the layer returns.
        plan: Its geometry.
        options: What the layer was asked for.
        read: Reads the layer's variables.
        adjustment: Scale and bias, in the type of the arithmetic, or None.
        by_feature: Whether these have one value for each feature.
        fusible: Whether the original fused this call, and so moved its average to the unbiased variance.
        either: Whether the graph infers, too, so that it is likely to be saved and served where nobody has the kernels:
            these then serve with ``fused=True`` only.
        moments: Those to normalize by, of `view` of the batch, in the place of its own; or None.
        weights: How much each position counts, with size 1 on the feature axes, as `weights` gives it; or None.

    Returns:
        The output; what averages move to, in the parameters' shape; and the name of the kernel that served.
    """
    ours = by_feature and (options.fused is True or not either) and operations.serves(x, plan, options.epsilon)
    fused = options.fused if moments is None else False
    fusible = fusible and weights is None
    kernel = passes.select(fused, {operations.KERNEL: ours, FUSED_OP: fusible})
    count = xp.astype(plan.whole.count(xp.shape(x)), accumulation_dtype(x.dtype))
    if kernel == FUSED_OP:
        y, mean, variance = _fused(x, plan, options, read)
        return y, Moments(mean, variance, count), kernel
    x = _divisible(x, plan)
    gamma, beta = read("gamma"), read("beta")
    renorm = None
    if options.renorm:
        # Copies, for the kernel must see the averages of before this step even if it runs later.
        mean, stddev = (tf.identity(read(name)) for name in ("renorm_mean", "renorm_stddev"))
        renorm = Renorm(mean, stddev, options.renorm_clipping)
    if kernel == operations.KERNEL:
        if adjustment is not None:
            adjustment = normalize.by_feature(xp, plan, adjustment)
        factor, offset = normalize.fold(xp, gamma, beta, adjustment)
        y, averaged = operations.forward(
            x, plan, options.epsilon, factor=factor, offset=offset, renorm=renorm, weights=weights
        )
        y.set_shape(x.shape)
        count = count if weights is None else averaged.count
        averaged = Moments(averaged.mean, averaged.variance, count)
        if fusible:
            averaged = averaged._replace(variance=algebra.unbiased_variance(xp, averaged))
        read_first: tuple[Any, ...] = ()
    else:
        trained = normalize.train(
            xp,
            tf.cast(x, accumulation_dtype(x.dtype)),
            plan,
            options.epsilon,
            gamma=gamma,
            beta=beta,
            adjustment=adjustment,
            renorm=renorm,
            moments=moments,
            weights=weights,
            unbiased=fusible,
        )
        y, averaged, read_first = tf.cast(trained.y, x.dtype), trained.averaged, trained.correction or ()
    with tf.control_dependencies(read_first):  # r and d are of the averages before this step
        averaged = algebra.reshaped(xp, averaged, plan.parameter_shape)
    return y, averaged, kernel


def infer(x: Any, plan: Geometry, options: Options, read: Read, fusible: bool) -> tuple[Any, str]:
    """Normalize by the moving averages, with TensorFlow's own operations, so that exported models need no other."""
    # On CPUs the fused operation takes several times as long with features first as the composed map.
    slow = plan.axes != (plan.rank - 1,) and operations.on_cpu()
    kernel = passes.select(options.fused, {FUSED_OP: fusible and not slow})
    moving = read("moving_mean"), read("moving_variance")
    if kernel == FUSED_OP:
        return _fused(x, plan, options, read, moving)[0], kernel
    y = normalize.infer(
        xp,
        tf.cast(x, accumulation_dtype(x.dtype)),
        plan,
        options.epsilon,
        *moving,
        gamma=read("gamma"),
        beta=read("beta"),
    )
    return tf.cast(y, x.dtype), kernel


def _fused(x: Any, plan: Geometry, options: Options, read: Read, moving: tuple[Any, ...] = ()) -> Any:
    """TensorFlow's own fused operation; its variance in training is the unbiased one."""
    first = plan.axes == (1,)
    gamma, beta = read("gamma"), read("beta")
    return v1.nn.fused_batch_norm(
        x,
        tf.ones(plan.parameter_shape) if gamma is None else gamma,
        tf.zeros(plan.parameter_shape) if beta is None else beta,
        *moving,
        epsilon=options.epsilon,
        data_format=("NC" + "DHW"[5 - plan.rank :]) if first else ("N" + "DHW"[5 - plan.rank :] + "C"),
        is_training=not moving,
    )


def view(x: Any, plan: Geometry) -> Any:
    """See a batch in the type of the arithmetic, and by virtual batches, as moments are measured."""
    x = tf.cast(_divisible(x, plan), accumulation_dtype(x.dtype))
    return x if plan.group_axis is None else tf.reshape(x, plan.split(xp.shape(x)))


def weights(mask: Any, x: Any, plan: Geometry) -> Any:
    """A mask as it broadcasts against a batch: of booleans, or of weights in the type of the arithmetic."""
    mask = tf.convert_to_tensor(mask)
    if not (mask.dtype == tf.bool or mask.dtype.is_floating or mask.dtype.is_integer):
        raise TypeError(f"mask must hold booleans or real numbers; received dtype {mask.dtype.name}.")
    given = [None] * (plan.rank - len(plan.axes)) if mask.shape.rank is None else mask.shape.as_list()
    plan.mask_shape(given, x.shape.as_list())
    shape = [1 if axis in plan.axes else size for axis, size in enumerate(xp.shape(x))]
    if mask.dtype == tf.bool:
        return tf.reshape(mask, shape)
    found = tf.reshape(tf.cast(mask, accumulation_dtype(x.dtype)), shape)
    if tf.executing_eagerly() and not bool(tf.reduce_all((found >= 0) & tf.math.is_finite(found))):
        raise ValueError(REFUSED_WEIGHTS)
    return tf.stop_gradient(found)


def _divisible(x: Any, plan: Geometry) -> Any:
    """Check, before it is used, a batch size or a `training` that is known only when the program runs."""
    size = plan.virtual_batch_size
    if size is None or (x.shape[0] is not None and x.shape[0] % size == 0):
        return x
    batch = tf.shape(x)[0]
    check = tf.debugging.Assert(tf.equal(batch % size, 0), plan.divides(batch))
    with tf.control_dependencies([check] if check is not None else []):
        return tf.identity(x)


def move(variables: Mapping[str, Any], moments: Moments, options: Options, active: Any) -> dict[str, Any]:
    """Move averages to moments; return by name what each variable became, or the operation that does it.

    Where `active`, None or a boolean tensor, is false nothing moves.
    """
    follows = variables.get("moving_variance") if options.renorm else None
    averages = {name: tf.convert_to_tensor(v) for name, v in variables.items() if v is not follows}
    taken = algebra.decrements(
        xp,
        averages,
        moments,
        options.epsilon,
        rate=_rate(options.rate, moments.mean.dtype),
        renorm_rate=_rate(options.renorm_rate, moments.mean.dtype),
        moves=active,
    )
    moved = {name: variables[name].assign_sub(tf.cast(step, averages[name].dtype)) for name, step in taken.items()}
    if follows is not None and moved:
        moves = algebra.moving(moments, active)
        moved["moving_variance"] = _follow(follows, moved["moving_stddev"], options, moves)
    return moved


def move_by(
    assign: Assign, variables: Mapping[str, Any], moments: Moments, options: Options, active: Any, outside: bool
) -> dict[str, Any]:
    """Move averages as `move` does, by a function of variable, value and momentum that moves one.

    Where `active` is a tensor, `outside` tells whether the function is called outside of any conditional, with a
    momentum that becomes 1.
    """
    new = algebra.new_values(xp, variables, moments, options.epsilon)

    def moved(name: str) -> Any:
        momentum = options.renorm_decay if name.startswith("renorm") else options.decay
        variable = variables[name]
        if active is None:
            return assign(variable, new[name], momentum)
        if outside:
            return assign(variable, new[name], tf.where(active, tf.cast(momentum, tf.float32), 1.0))
        return tf.cond(active, lambda: assign(variable, new[name], momentum), lambda: tf.convert_to_tensor(variable))

    found = {name: moved(name) for name in variables if name != "moving_variance" or not options.renorm}
    if options.renorm and "moving_variance" in variables:
        found["moving_variance"] = _follow(variables["moving_variance"], found["moving_stddev"], options, active)
    return found


def assign_moving_average(variable: Any, value: Any, momentum: Any) -> Any:
    """Move one average to a value."""
    average = tf.convert_to_tensor(variable)
    rate = xp.astype(_rate(1 - momentum, average.dtype), average.dtype)
    return variable.assign_sub((average - tf.cast(value, average.dtype)) * rate)


def _follow(variance: Any, moving_stddev: Any, options: Options, moves: Any) -> Any:
    """Set the moving variance of renorm to that which belongs to its moving standard deviation."""
    follows = algebra.inference_variance(xp, tf.convert_to_tensor(moving_stddev), options.epsilon)
    if moves is not None:
        follows = tf.where(moves, follows, tf.convert_to_tensor(variance))
    return variance.assign(follows)


def _rate(rate: Any, dtype: Any) -> Any:
    if isinstance(rate, numbers.Real):
        return float(np.float32(rate))  # as in the original, whatever the type of the variable
    return tf.cast(rate, dtype)
